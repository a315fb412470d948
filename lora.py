"""LoRA by hand: low-rank adapters, merged, saved and loaded in every program's layout.

Fine-tuning moves a weight W by a small amount that is nearly of low rank (Hu et al.
2021, arXiv 2106.09685). So W stays frozen and only two thin matrices are trained, A [r,
in] ("down") and B [out, r] ("up"):

    y = W x + (alpha / r) B A x              merged:  W + (alpha / r) B A

B starts at zero, so step 0 of training is the base model, bit for bit. AE-Adapt-V
trains its last stage this way (paper: end-to-end fine-tuning with LoRA): rank 256,
alpha 512, on self-attention, feed-forward and time layers. The patch embedder and the
head, whose shapes are new in the deep latent space, are trained whole. For Wan 2.1 1.3B
that is 183 linear layers and 259.6 M LoRA parameters, for 14B 243 and 820.6 M.

    lora.wrap(net, rank=256, alpha=512, full=net.ends)
    ... train whatever requires_grad ...
    lora.save(net, "adapter.safetensors", full=net.ends, step=40000)
    lora.merge(net)                          # plain linears again: the base's speed
    lora.load(other_net, "adapter.safetensors", strength=0.8)

A file written by anybody else reads the same way. One procedure (`load`) covers PEFT,
diffusers, ComfyUI, kohya, VideoX-Fun, DiffSynth and LyCORIS names and mixtures of them
(files/lora_keys.py).
"""
import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from files import checkpoint, lora_keys
from files.checkpoint import UserError, save_tensors


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update:
    y = base(x) + (alpha / rank) up(down(x)).

    The two thin matrices are fp32 whatever the base is stored in: updates at a learning
    rate of 5e-5 are lost in bf16.
    """

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base
        self.rank, self.alpha = rank, alpha
        like = dict(device=base.weight.device, dtype=torch.float32)
        self.down = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x):
        thin = F.linear(x, self.down.to(x.dtype))
        return self.base(x) + (self.alpha / self.rank) * F.linear(thin, self.up.to(x.dtype))

    @property
    def weight(self):
        """The frozen weight, for whoever asks a linear layer for its dtype, device or
        shape."""
        return self.base.weight


def adapters(net):
    """The live adapters of a net: (module name in the net, LoRALinear)."""
    return [(name, m) for name, m in net.named_modules() if isinstance(m, LoRALinear)]


def wrap(net, rank, alpha, targets=None, full=()):
    """Freeze `net` and adapt every linear layer whose whole name matches one of the
    regular expressions `targets` (default: what AE-Adapt-V adapts, `net.lora_targets`).

    full: beginnings of the names of what is trained whole instead, e.g. `net.ends`.
    Returns net; afterwards `requires_grad` marks exactly what is to be trained.
    """
    plain_only(net)
    targets = targets or net.lora_targets
    wanted = re.compile("|".join(targets))
    linears = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)]
    names = [name for name in linears if wanted.fullmatch(name)]
    if not names:
        raise UserError(f"no linear layer of this model is called like {' or '.join(targets)}: "
                        "nothing to adapt.")
    freeze(net, full)
    for name in names:
        replace(net, name, LoRALinear(net.get_submodule(name), rank, alpha))
    return net


def freeze(net, but=()):
    """Train nothing of `net` but the parameters whose names begin so -> net."""
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith(tuple(but)))
    return net


@torch.no_grad()
def merge(net):
    """Every adapter becomes a plain linear with W + (alpha / rank) B A, computed in
    fp32, stored in W's own dtype."""
    for name, adapter in adapters(net):
        update = low_rank(adapter.up, adapter.down, adapter.base.weight)
        add_(adapter.base.weight, adapter.alpha / adapter.rank, update)
        replace(net, name, adapter.base)
    return net


def add_(w, scale, update):
    """w += scale * update in fp32, in place, stored in w's dtype."""
    w.copy_(w.float() + scale * update.to(w.device, torch.float32))


def low_rank(up, down, w):
    """up @ down in w's shape, fp32, on its device; of convolutions too."""
    up, down = (m.to(w.device, torch.float32).flatten(1) for m in (up, down))
    return (up @ down).view(w.shape)


def replace(net, name, module):
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, module)


def plain_only(net):
    if adapters(net):
        raise ValueError("this net already has live adapters: merge(net) first.")


# --------------------------------------------------------------------------------- files


def save(net, path, format="peft", full=(), dtype=None, **metadata):
    """Write the adapters of `net` as one safetensors file that other programs read.

    format    names                                    alpha            read by
    peft      transformer.<diffusers>.lora_A/B         in the header    diffusers, PEFT
    comfyui   diffusion_model.<name>.lora_down/up      tensor .alpha    ComfyUI
    kohya     lora_unet_<name with _>.lora_down/up     tensor .alpha    musubi-tuner,
                                                                        VideoX-Fun,
                                                                        ComfyUI

    full: beginnings of the names of what is stored whole, under its own plain tensor
        names in every format. `load` puts it in place; other programs have no names for
        whole tensors in an adapter, and diffusers refuses a file that has any.
    metadata: whatever is worth knowing (base=..., step=...); rank and alpha are added.
    """
    found = adapters(net)
    if not found:
        raise ValueError("this net has no adapters: wrap it first, or it is already merged.")
    tensors, header = lora_keys.write(found, format, net.lora_prefix)
    tensors |= {k: v for k, v in net.state_dict().items() if k.startswith(tuple(full))}
    if dtype is not None:
        tensors = {k: v.to(dtype) for k, v in tensors.items()}
    save_tensors(path, tensors, {"format": "pt", **header, **metadata})


class Loaded(NamedTuple):
    """What `load` did."""
    applied: list  # the net's parameters that it changed
    skipped: list  # the file's keys that fit nothing in this net


@torch.no_grad()
def load(net, source, strength=1.0, merge=True, expert=None):
    """Apply an adapter file (path, or a dict of tensors) to a plain net -> Loaded.

        W += strength (alpha / r) up down        no alpha anywhere means a factor of 1
        W += strength diff                       .diff (weight), .diff_b (bias), .diff_m
        W  = (1 - strength) W + strength full    plain names, of `save(full=...)`

    in fp32, stored in W's own dtype. With merge=False low-rank updates of linear layers
    stay live, trainable adapters. Keys of modules this net does not have (an image
    branch, a text encoder) are skipped, with a warning. A file for a base of another size
    is refused before anything is changed (`lora_keys.fit`).
    expert: which of Wan 2.2's two transformers `net` is, "high" or "low" (noise). Of a
        file with a part for each (`transformer.`, `transformer_2.`) only that part is
        looked at; a file with one part fits either.
    """
    plain_only(net)
    parameters = dict(net.named_parameters())
    shapes = {name: p.shape for name, p in parameters.items()}
    updates, skipped, config = lora_keys.fit(shapes, source, expert, net.latent_layers,
                                            net.is_deep)
    for name, update in updates.items():
        update = {role: checkpoint.read(value) for role, value in update.items()}
        w, module = parameters[name], name.rpartition(".")[0]
        if "full" in update:
            whole = update["full"].to(w.device, torch.float32)
            w.copy_(torch.lerp(w.float(), whole, strength))
        if "down" in update:
            scale = strength * lora_keys.scale_of(name, update, config)
            linear = net.get_submodule(module)
            if merge or not isinstance(linear, nn.Linear):
                add_(w, scale, low_rank(update["up"], update["down"], w))
            else:
                replace(net, module, live_adapter(linear, update, scale))
        if "up_bias" in update:
            low = {k: checkpoint.read(v) for k, v in updates[f"{module}.weight"].items()}
            scale = lora_keys.scale_of(name, low, config)
            add_(w, strength * scale, update["up_bias"])
        for role in update.keys() & {"diff", "diff_b", "diff_m"}:
            add_(w, strength, update[role])
    applied = [name for name, update in updates.items() if update.keys() - {"alpha"}]
    return Loaded(sorted(applied), sorted(skipped))


def live_adapter(linear, update, scale):
    """A linear layer with a loaded low-rank update, trainable."""
    rank = len(update["down"])
    adapter = LoRALinear(linear.requires_grad_(False), rank, scale * rank)
    adapter.down.copy_(update["down"])
    adapter.up.copy_(update["up"])
    return adapter
