"""LoRA by hand: low-rank adapters, and the key layouts in which the ecosystem stores them.

Fine-tuning moves a weight W by a small amount that is nearly of low rank (Hu et al. 2021, arXiv 2106.09685). So W stays
frozen and only two thin matrices are trained, A [r, in] ("down") and B [out, r] ("up"):

    y = W x + (alpha / r) B A x              merged:  W + (alpha / r) B A

B starts at zero, so step 0 is the base model, bit for bit. AE-Adapt-V trains its last stage this way (paper: end-to-end
fine-tuning with LoRA): rank 256, alpha 512, on self-attention, feed-forward and time layers. The patch embedder and the
head, whose shapes are new in the deep latent space, are trained whole. For Wan 2.1 1.3B that is 183 linear layers and
259.6 M LoRA parameters, for 14B 243 and 820.6 M.

    whole = ("patch_embedding", "head")
    lora.wrap(net, rank=256, alpha=512, full=whole)
    ... train whatever requires_grad ...
    lora.save(net, "adapter.safetensors", format="peft", full=whole, base="wan2.1-t2v-1.3b", step=40000)
    lora.merge(net)                          # plain linears again: same speed as the base
    lora.load(other_net, "adapter.safetensors", strength=0.8)

A file written by anybody else reads the same way. One procedure (`load`) covers PEFT, diffusers, ComfyUI, kohya,
VideoX-Fun, DiffSynth and LyCORIS names and mixtures of them: names are not parsed, but looked up in a table made from
the model itself.
"""
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from files.checkpoint import UserError, load_tensors, save_tensors
from files.layouts import to_diffusers

# What AE-Adapt-V adapts: 6 linears per block and the 3 of the time embedding. Cross-attention, text and image
# embedders, norms and modulation stay as the base has them: what they learned about prompts is what is inherited.
TARGETS = (r"blocks\.\d+\.self_attn\.[qkvo]", r"blocks\.\d+\.ffn\.[02]",
           r"time_embedding\.[02]", r"time_projection\.1")


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update: y = base(x) + (alpha / rank) up(down(x)).

    The two thin matrices are fp32 whatever the base is stored in: updates at a learning rate of 5e-5 are lost in bf16.
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
        """The frozen weight, for whoever asks a linear layer for its dtype, device or shape."""
        return self.base.weight

    def extra_repr(self):
        return f"rank={self.rank}, alpha={self.alpha}"


def adapters(net):
    """The live adapters of a net: (module name in the net, LoRALinear)."""
    return [(name, m) for name, m in net.named_modules() if isinstance(m, LoRALinear)]


def wrap(net, rank, alpha, targets=TARGETS, full=()):
    """Freeze `net` and adapt every linear layer whose whole name matches one of the regular expressions `targets`.

    full: modules that are trained whole instead, e.g. ("patch_embedding", "head").
    Returns net; afterwards `requires_grad` marks exactly what is to be trained.
    """
    _plain_only(net)
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Linear) and any(re.fullmatch(t, n) for t in targets)]
    if not names:
        raise UserError(f"no linear layer of this model is called like {' or '.join(targets)}: nothing to adapt.")
    net.requires_grad_(False)
    for name in names:
        _replace(net, name, LoRALinear(net.get_submodule(name), rank, alpha))
    for name in full:
        net.get_submodule(name).requires_grad_(True)
    return net


@torch.no_grad()
def merge(net):
    """Every adapter becomes a plain linear with W + (alpha / rank) B A, computed in fp32, stored in W's own dtype."""
    for name, adapter in adapters(net):
        _add_(adapter.base.weight, adapter.alpha / adapter.rank, low_rank=(adapter.up, adapter.down))
        _replace(net, name, adapter.base)
    return net


def unwrap(net):
    """Take the adapters off without merging: the base again, bit for bit."""
    for name, adapter in adapters(net):
        _replace(net, name, adapter.base)
    return net


def state_dict(net):
    """Only the adapters' tensors, by their names in the net; `load_state_dict(..., strict=False)` puts them back."""
    return {f"{name}.{k}": getattr(a, k).detach() for name, a in adapters(net) for k in ("down", "up")}


# ---------------------------------------------------------------------------------------------------------------- Files


def save(net, path, format="peft", full=(), dtype=None, **metadata):
    """Write the adapters of `net` as one safetensors file that other programs read.

    format    names                                      alpha                    read by
    peft      transformer.<diffusers name>.lora_A/B      in the header            diffusers, PEFT
    comfyui   diffusion_model.<name>.lora_down/up        tensor .alpha            ComfyUI
    kohya     lora_unet_<name with _>.lora_down/up       tensor .alpha            musubi-tuner, VideoX-Fun, ComfyUI

    full: modules stored whole, under their own plain tensor names in every format. `load` puts them in place; other
        programs have no names for whole tensors in an adapter, and diffusers refuses a file that has any.
    metadata: whatever is worth knowing (base=..., step=...); rank and alpha are always added.
    """
    found = adapters(net)
    kinds = {(a.rank, a.alpha) for _, a in found}
    if not found:
        raise ValueError("this net has no adapters: wrap it first, or it is already merged.")
    rank, alpha = kinds.pop() if len(kinds) == 1 else (None, None)
    tensors = {}
    if format == "peft":
        if rank is None:
            raise UserError("these adapters differ in rank or alpha, which a PEFT header says badly: save as comfyui.")
        for name, a in found:
            stem = f"transformer.{to_diffusers(name)}"
            tensors |= {f"{stem}.lora_A.weight": a.down, f"{stem}.lora_B.weight": a.up}
        config = {"r": rank, "lora_alpha": alpha, "target_modules": [to_diffusers(name) for name, _ in found],
                  "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False}
        metadata["lora_adapter_metadata"] = {f"transformer.{k}": v for k, v in config.items()}
    elif format in ("comfyui", "kohya"):
        for name, a in found:
            stem = f"diffusion_model.{name}" if format == "comfyui" else f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": a.down, f"{stem}.lora_up.weight": a.up,
                        f"{stem}.alpha": torch.tensor(float(a.alpha))}
    else:
        raise UserError(f'LoRA format "{format}" is unknown: use peft, comfyui or kohya.')
    for module in full:
        tensors |= {f"{module}.{k}": v for k, v in net.get_submodule(module).state_dict().items()}
    if dtype is not None:
        tensors = {k: v.to(dtype) for k, v in tensors.items()}
    save_tensors(path, tensors, {"format": "pt", "rank": rank, "alpha": alpha, **metadata})


class Loaded(NamedTuple):
    """What `load` did: the net's parameters that it changed, and the file's keys that fit nothing in this net."""
    applied: list
    skipped: list


@torch.no_grad()
def load(net, source, strength=1.0, merge=True, expert=None):
    """Apply an adapter file (path, or a dict of tensors) to a plain net -> Loaded(applied, skipped).

        W += strength (alpha / r) up down        no alpha anywhere means a factor of 1
        W += strength diff                       full deltas: .diff (weight), .diff_b (bias), .diff_m (modulation)
        W  = (1 - strength) W + strength full    whole tensors under plain names (what `save(full=...)` wrote)

    in fp32, stored in W's own dtype. With merge=False low-rank updates of linear layers stay live, trainable adapters.
    Keys of modules this net does not have (an image branch, a text encoder) are skipped and reported. A file for a
    base of another size is refused before anything is changed.
    expert: which of Wan 2.2's two transformers `net` is, "high" or "low" (noise). Of a file with a part for each
        (`transformer.`, `transformer_2.`) only that part is looked at; a file with one part fits either.
    """
    _plain_only(net)
    what = "the adapter" if isinstance(source, dict) else str(source)
    tensors, config = (source, {}) if isinstance(source, dict) else _read(source)
    tensors, config = _part(tensors, expert, what), _part(config, expert, what)
    config = {re.sub(r"^transformer(_2)?\.", "", k): v for k, v in config.items()}
    parameters = dict(net.named_parameters())
    updates, skipped = _sort(tensors, _spellings(parameters), what)
    for name in updates:
        skipped += _check(updates, name, parameters[name].shape, what)
    if all(role in ("full", "alpha") for roles in updates.values() for role in roles):
        raise UserError(f"{what} holds no LoRA for this model: none of its {len(tensors)} tensors changes one of the "
                        "model's layers; use an adapter of the same base model.")

    for name, roles in updates.items():
        w = parameters[name]
        if "full" in roles:
            w.copy_(torch.lerp(w.float(), roles["full"].to(w.device, torch.float32), strength))
        if "down" in roles:
            scale = strength * _scale(name, roles, config)
            linear = net.get_submodule(name.removesuffix(".weight"))
            if merge or not isinstance(linear, nn.Linear):
                _add_(w, scale, low_rank=(roles["up"], roles["down"]))
            else:
                rank = len(roles["down"])
                adapter = LoRALinear(linear.requires_grad_(False), rank, scale * rank)
                adapter.down.copy_(roles["down"])
                adapter.up.copy_(roles["up"])
                _replace(net, name.removesuffix(".weight"), adapter)
        if "up_bias" in roles:
            low = updates[name.removesuffix("bias") + "weight"]
            _add_(w, strength * _scale(name, low, config), roles["up_bias"])
        for role in ("diff", "diff_b", "diff_m"):
            if role in roles:
                _add_(w, strength, roles[role])
    return Loaded(sorted(name for name, roles in updates.items() if roles.keys() - {"alpha"}), sorted(skipped))


def _read(path):
    """Adapter file -> (tensors, PEFT's settings: from the file's header, or from adapter_config.json beside it)."""
    tensors, metadata = load_tensors(path)
    config = metadata.get("lora_adapter_metadata") or {}
    beside = Path(path).parent / "adapter_config.json"
    if not config and Path(path).stem == "adapter_model" and beside.is_file():
        config = json.loads(beside.read_text())
    return tensors, config


def _part(entries, expert, what):
    """A file's entries without those of the other expert; where it has entries for one expert only, all of them."""
    high, low = ({k for k in entries if k.startswith(prefix)} for prefix in ("transformer.", "transformer_2."))
    if not (high and low):
        return entries
    if expert not in ("high", "low"):
        raise UserError(f"{what} holds adapters for the two transformers of Wan 2.2 A14B, but this model has one: use an adapter of "
                        'the same base model (in Python, name the part with expert="high" or "low").')
    return {k: v for k, v in entries.items() if k not in (low if expert == "high" else high)}


# A key is <prefix><module name><what it is>. What it is, and which of the module's parameters it changes:
KEY = re.compile(r"(?P<name>.+?)\.(?P<part>lora_(A|B|down|up|magnitude_vector)|dora_scale|alpha|diff|diff_b|diff_m)"
                 r"(\.default)?(\.(?P<leaf>weight|bias))?")
ROLES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up",
         "lora_magnitude_vector": "dora", "dora_scale": "dora"}
CHANGES = {"diff_b": "_bias", "up_bias": "_bias", "diff_m": "_modulation", "full": ""}        # all others: "_weight"
PREFIX = re.compile("^(base_model_model_|model_diffusion_model_|diffusion_model_|pipe_dit_|transformer_2_|transformer_|"
                    "lora_unet__|lora_unet_|lycoris_)+")


def _spellings(parameters):
    """Every way a parameter's name is written in adapter files, dots turned to underscores -> its name in the net.

    Once flattened, "blocks_12_self_attn_k" needs no parsing, and names with mixed separators are covered too.
    """
    table = {name.replace(".", "_"): name for name in parameters}
    for name in parameters:
        diffusers = to_diffusers(name)
        mixed = diffusers.replace("attn1", "self_attn").replace("attn2", "cross_attn")    # LyCORIS: self_attn.to_q
        for alias in (diffusers, mixed):
            table.setdefault(alias.replace(".", "_"), name)          # where both spellings have a name, the net's wins
    return table


def _sort(tensors, table, what):
    """File's keys -> ({parameter name: {role: tensor}}, keys that fit nothing)."""
    updates, skipped = {}, []
    for key, value in tensors.items():
        match = KEY.fullmatch(key)
        role, flat = "full", key
        if match:
            role, flat = ROLES.get(match["part"], match["part"]), match["name"]
            role = "up_bias" if role == "up" and match["leaf"] == "bias" else role
        flat = PREFIX.sub("", flat.replace(".", "_"))
        name = table.get(flat + CHANGES.get(role, "_weight"))
        if name is None:
            skipped.append(key)
        elif role in updates.setdefault(name, {}):
            raise UserError(f"{what} holds two updates of {name} (the second is {key}): give a file with one of them.")
        else:
            updates[name][role] = value
    return updates, skipped


def _check(updates, name, shape, what):
    """Refuse an update that cannot be meant for this net -> what was dropped from `updates` instead, for the report."""
    roles, module = updates[name], name.rpartition(".")[0]
    if "dora" in roles:
        raise UserError(f"{what} is a DoRA (it has magnitude vectors), which is not supported: use a plain LoRA.")
    low = updates.get(f"{module}.weight", {}) if "up_bias" in roles else roles
    if low.keys() & {"down", "up"} or "up_bias" in roles:
        if not ("down" in low and "up" in low and low["up"][0].numel() == len(low["down"])):
            raise UserError(f"{what} does not hold both matrices for {module}: it is damaged, get it again.")
    wrong = None
    for role in roles.keys() - {"alpha", "up"}:
        theirs, ours = list(roles[role].shape), list(shape)
        if role == "down":                   # of a convolution too: its kernel counts as inputs
            theirs, ours = [len(roles["up"]), roles["down"][0].numel()], [shape[0], math.prod(shape[1:])]
        if theirs != ours:
            wrong = f"its {name} is {' x '.join(map(str, theirs))}, this model's is {' x '.join(map(str, ours))}"
    if wrong and "full" not in roles and module.split(".")[0] in ("patch_embedding", "head"):
        # An adapter of the base model carries over to the deep latent space, except where the latent enters and leaves.
        roles.clear()
        return [f"{name} (made for another latent space)"]
    if wrong:
        raise UserError(f"{what} was made for another base: {wrong}; use an adapter of the same base model.")
    return []


def _scale(name, roles, config):
    """alpha / r of one adapter: from its own .alpha tensor, else from PEFT's settings, else 1."""
    rank = len(roles["down"])
    if "alpha" in roles:
        return float(roles["alpha"]) / rank
    if "lora_alpha" not in config:
        return 1.0
    alpha = config["lora_alpha"]
    module = name.rpartition(".")[0]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if any(re.fullmatch(rf"(.*\.)?{pattern}", spelling) for spelling in (module, to_diffusers(module))):
            alpha = value
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _add_(w, scale, delta=None, low_rank=None):
    """w += scale * delta (or scale * up @ down), in fp32, in place, stored in w's dtype."""
    if low_rank is not None:
        up, down = (m.to(w.device, torch.float32).flatten(1) for m in low_rank)
        delta = (up @ down).view(w.shape)
    w.copy_(w.float() + scale * delta.to(w.device, torch.float32))


def _replace(net, name, module):
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, module)


def _plain_only(net):
    if adapters(net):
        raise ValueError("this net already has live adapters: merge(net) or unwrap(net) first.")
