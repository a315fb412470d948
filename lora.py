"""LoRA by hand: low-rank adapters, and the key layouts in which the ecosystem stores
them.

Fine-tuning moves a weight W by a small amount that is nearly of low rank (Hu et al.
2021, arXiv 2106.09685). So W stays frozen and only two thin matrices are trained, A [r,
in] ("down") and B [out, r] ("up"):

    y = W x + (alpha / r) B A x              merged:  W + (alpha / r) B A

B starts at zero, so step 0 is the base model, bit for bit. AE-Adapt-V trains its last
stage this way (paper: end-to-end fine-tuning with LoRA): rank 256, alpha 512, on
self-attention, feed-forward and time layers. The patch embedder and the head, whose
shapes are new in the deep latent space, are trained whole. For Wan 2.1 1.3B that is 183
linear layers and 259.6 M LoRA parameters, for 14B 243 and 820.6 M.

    whole = ("patch_embedding", "head")
    lora.wrap(net, rank=256, alpha=512, full=whole)
    ... train whatever requires_grad ...
    lora.save(net, "adapter.safetensors", format="peft", full=whole, step=40000)
    lora.merge(net)                          # plain linears again: the base's speed
    lora.load(other_net, "adapter.safetensors", strength=0.8)

A file written by anybody else reads the same way. One procedure (`load`) covers PEFT,
diffusers, ComfyUI, kohya, VideoX-Fun, DiffSynth and LyCORIS names and mixtures of them:
names are not parsed, but looked up in a table made from the model itself.
"""
import math
import re
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from files import checkpoint
from files.checkpoint import UserError, bare, save_tensors
from files.layouts import to_diffusers

# What AE-Adapt-V adapts: 6 linears per block and the 3 of the time embedding.
# Cross-attention, text and image embedders, norms and modulation stay as the base has them:
# what they learned about prompts is what is inherited.
TARGETS = (r"blocks\.\d+\.self_attn\.[qkvo]", r"blocks\.\d+\.ffn\.[02]",
           r"time_embedding\.[02]", r"time_projection\.1")


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

    def extra_repr(self):
        return f"rank={self.rank}, alpha={self.alpha}"


def adapters(net):
    """The live adapters of a net: (module name in the net, LoRALinear)."""
    return [(name, m) for name, m in net.named_modules() if isinstance(m, LoRALinear)]


def wrap(net, rank, alpha, targets=TARGETS, full=()):
    """Freeze `net` and adapt every linear layer whose whole name matches one of the
    regular expressions `targets`.

    full: modules that are trained whole instead, e.g. ("patch_embedding", "head").
    Returns net; afterwards `requires_grad` marks exactly what is to be trained.
    """
    plain_only(net)
    wanted = re.compile("|".join(targets))
    linears = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)]
    names = [name for name in linears if wanted.fullmatch(name)]
    if not names:
        raise UserError(f"no linear layer of this model is called like {' or '.join(targets)}: "
                        "nothing to adapt.")
    net.requires_grad_(False)
    for name in names:
        replace(net, name, LoRALinear(net.get_submodule(name), rank, alpha))
    for name in full:
        net.get_submodule(name).requires_grad_(True)
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

    full: modules stored whole, under their own plain tensor names in every format.
        `load` puts them in place; other programs have no names for whole tensors in an
        adapter, and diffusers refuses a file that has any.
    metadata: whatever is worth knowing (base=..., step=...); rank and alpha are added.
    """
    found = adapters(net)
    if not found:
        raise ValueError("this net has no adapters: wrap it first, or it is already merged.")
    if format not in ("peft", "comfyui", "kohya"):
        raise UserError(f'LoRA format "{format}" is unknown: use peft, comfyui or kohya.')
    kinds = {(a.rank, a.alpha) for _, a in found}
    rank, alpha = kinds.pop() if len(kinds) == 1 else (None, None)
    if format == "peft" and rank is None:
        raise UserError("these adapters differ in rank or alpha, which a PEFT header says badly: "
                        "save as comfyui.")
    tensors = {}
    for name, a in found:
        if format == "peft":
            stem = f"transformer.{to_diffusers(name)}"
            tensors |= {f"{stem}.lora_A.weight": a.down, f"{stem}.lora_B.weight": a.up}
            continue
        flat = name.replace(".", "_")
        stem = f"diffusion_model.{name}" if format == "comfyui" else f"lora_unet_{flat}"
        tensors |= {f"{stem}.lora_down.weight": a.down, f"{stem}.lora_up.weight": a.up,
                    f"{stem}.alpha": torch.tensor(float(a.alpha))}
    if format == "peft":
        metadata["lora_adapter_metadata"] = peft_header(rank, alpha, [name for name, _ in found])
    for module in full:
        for name, value in net.get_submodule(module).state_dict().items():
            tensors[f"{module}.{name}"] = value
    if dtype is not None:
        tensors = {k: v.to(dtype) for k, v in tensors.items()}
    save_tensors(path, tensors, {"format": "pt", "rank": rank, "alpha": alpha, **metadata})


def peft_header(rank, alpha, names):
    config = {"r": rank, "lora_alpha": alpha, "target_modules": list(map(to_diffusers, names)),
              "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False}
    return {f"transformer.{k}": v for k, v in config.items()}


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
    is refused before anything is changed (`fit`).
    expert: which of Wan 2.2's two transformers `net` is, "high" or "low" (noise). Of a
        file with a part for each (`transformer.`, `transformer_2.`) only that part is
        looked at; a file with one part fits either.
    """
    plain_only(net)
    parameters = dict(net.named_parameters())
    updates, skipped, config = fit({k: p.shape for k, p in parameters.items()}, source, expert)
    for name, update in updates.items():
        update = {role: checkpoint.read(value) for role, value in update.items()}
        w, module = parameters[name], name.rpartition(".")[0]
        if "full" in update:
            whole = update["full"].to(w.device, torch.float32)
            w.copy_(torch.lerp(w.float(), whole, strength))
        if "down" in update:
            scale = strength * scale_of(name, update, config)
            linear = net.get_submodule(module)
            if merge or not isinstance(linear, nn.Linear):
                add_(w, scale, low_rank(update["up"], update["down"], w))
            else:
                replace(net, module, live_adapter(linear, update, scale))
        if "up_bias" in update:
            low = updates[f"{module}.weight"]
            scale = scale_of(name, {k: checkpoint.read(v) for k, v in low.items()}, config)
            add_(w, strength * scale, update["up_bias"])
        for role in update.keys() & {"diff", "diff_b", "diff_m"}:
            add_(w, strength, update[role])
    applied = [name for name, update in updates.items() if update.keys() - {"alpha"}]
    return Loaded(sorted(applied), sorted(skipped))


def fit(shapes, source, expert=None):
    """What `load` would do to a net of these {parameter: shape}, from the headers alone
    -> ({parameter: {role: Stored tensor}}, keys that fit nothing, PEFT's settings).

    UserError for what is not supported, or was made for another base."""
    what = "the adapter" if isinstance(source, dict) else str(source)
    tensors, config = (source, {}) if isinstance(source, dict) else read(source)
    refuse_unsupported(tensors, what)
    tensors, config = part_of(tensors, expert, what), part_of(config, expert, what)
    config = {re.sub(r"^transformer(_2)?\.", "", k): v for k, v in config.items()}
    updates, skipped = sort(tensors, spellings(shapes), what)
    for name in updates:
        skipped += check(updates, name, shapes[name], what)
    roles = {role for update in updates.values() for role in update}
    if roles <= {"full", "alpha"}:
        raise UserError(f"{what} holds no LoRA for this model: none of its {len(tensors)} tensors "
                        "changes one of the model's layers; use an adapter of the same base model.")
    if skipped:
        warnings.warn(f"{what}: {len(skipped)} of {len(tensors)} tensors fit nothing in this model "
                      f"(first: {min(skipped)}); the others are applied.")
    return updates, skipped, config


def live_adapter(linear, update, scale):
    """A linear layer with a loaded low-rank update, trainable."""
    rank = len(update["down"])
    adapter = LoRALinear(linear.requires_grad_(False), rank, scale * rank)
    adapter.down.copy_(update["down"])
    adapter.up.copy_(update["up"])
    return adapter


# ------------------------------------------------------------------ the ecosystem's keys


def read(path):
    """Adapter file -> (tensors, PEFT's settings: from the file's header, or from
    adapter_config.json beside it)."""
    path = file_of(path)
    tensors, metadata = checkpoint.open_tensors(path)
    config = metadata.get("lora_adapter_metadata") or {}
    beside = path.parent / "adapter_config.json"
    if not config and path.stem == "adapter_model" and beside.is_file():
        config = checkpoint.read_json(beside)
    if not isinstance(config, dict):
        raise UserError(f"the header of {path} is damaged (lora_adapter_metadata is no object, so "
                        "its alpha is not known): get the file again.")
    return tensors, config


def file_of(path):
    """An adapter file, or the one in a folder as PEFT and diffusers write it."""
    path = checkpoint.existing(path)
    if not path.is_dir():
        return path
    found = [path / name for name in IN_FOLDERS if (path / name).exists()]
    if not found:
        raise UserError(f"{path} is a folder without {IN_FOLDERS[0]}: give the LoRA file itself.")
    return found[0]


def refuse_unsupported(tensors, what):
    """UserError for a kind of adapter that would only be applied in part."""
    for kind, mark in UNSUPPORTED.items():
        if found := [key for key in tensors if mark.search(key)]:
            raise UserError(f"{what} is a {kind} (it has {min(found)}), which is not supported: "
                            "use a plain LoRA.")


def part_of(entries, expert, what):
    """A file's entries without those of the other expert; where it has entries for one
    expert only, all of them."""
    high = {k for k in entries if k.startswith("transformer.")}
    low = {k for k in entries if k.startswith("transformer_2.")}
    if not (high and low):
        return entries
    if expert not in ("high", "low"):
        raise UserError(f"{what} holds adapters for the two transformers of Wan 2.2 A14B, but this "
                        "model has one: use an adapter of the same base model (in Python, name "
                        'the part with expert="high" or "low").')
    other = low if expert == "high" else high
    return {k: v for k, v in entries.items() if k not in other}


# A key is <prefix><module name><what it is>, and what it is decides which parameter changes:
KEY = re.compile(r"(?P<name>.+?)\."
                 r"(?P<part>lora_(A|B|down|up)|alpha|diff|diff_[bm])"
                 r"(\.default)?(\.(?P<leaf>weight|bias))?")
ROLES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
CHANGES = {"diff_b": "_bias", "up_bias": "_bias", "diff_m": "_modulation", "full": ""}
PREFIX = re.compile("^(base_model_|model_|diffusion_model_|module_|_?orig_mod_|pipe_dit_|"
                    "transformer_2_|transformer_|lora_unet__|lora_unet_|lycoris_)+")


IN_FOLDERS = ("adapter_model.safetensors", "adapter_model.bin",
              "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
#: kinds of adapters -> what marks them in their keys
UNSUPPORTED = {kind: re.compile(mark) for kind, mark in {
    "DoRA": r"lora_magnitude_vector|dora_scale",
    "LoKr": r"lokr_", "LoHa": r"hada_", "GLoRA": r"\.[ab][12]\.weight$", "OFT": r"\.b?oft_",
    "IA3": r"ia3_|\.on_input$", "VeRA": r"vera_lambda", "LoCon with a middle matrix": r"lora_mid",
    "LyCORIS norm": r"\.[wb]_norm$",
    "LoRA of fused layers": r"(to_|[._])(qkv|kv)[._](lora|diff|alpha)",
    "patch that sets weights": r"\.set_weight$|\.reshape_weight$",
}.items()}


def spellings(parameters):
    """Every way a parameter's name is written in adapter files, dots turned to
    underscores -> its name in the net.

    Once flattened, "blocks_12_self_attn_k" needs no parsing, and names with mixed
    separators are covered too.
    """
    table = {name.replace(".", "_"): name for name in parameters}
    for name in parameters:
        diffusers = to_diffusers(name)  # LyCORIS mixes: self_attn.to_q
        mixed = diffusers.replace("attn1", "self_attn").replace("attn2", "cross_attn")
        for alias in (diffusers, mixed):  # where both have a name, the net's wins
            table.setdefault(alias.replace(".", "_"), name)
    return table


def sort(tensors, table, what):
    """File's keys -> ({parameter name: {role: tensor}}, keys that fit nothing)."""
    updates, skipped = {}, []
    for key, value in tensors.items():
        match = KEY.fullmatch(bare(key))
        role, flat = "full", bare(key)
        if match:
            role, flat = ROLES.get(match["part"], match["part"]), match["name"]
            role = "up_bias" if role == "up" and match["leaf"] == "bias" else role
        flat = PREFIX.sub("", flat.replace(".", "_"))
        name = table.get(flat + CHANGES.get(role, "_weight"))
        if name is None and role == "diff":  # of a parameter that is no layer's weight
            name = table.get(flat)
        if name is None:
            skipped.append(key)
        elif role in updates.setdefault(name, {}):
            raise UserError(f"{what} holds two updates of {name} (the second is {key}): give a "
                            "file with one of them.")
        else:
            updates[name][role] = value
    return updates, skipped


def check(updates, name, shape, what):
    """Refuse an update that cannot be meant for this net -> what was dropped from
    `updates` instead, for the report."""
    update, module = updates[name], name.rpartition(".")[0]
    low = updates.get(f"{module}.weight", {}) if "up_bias" in update else update
    if low.keys() & {"down", "up"} or "up_bias" in update:
        both = "down" in low and "up" in low
        if not both or math.prod(low["up"].shape[1:]) != low["down"].shape[0]:
            raise UserError(f"{what} does not hold both matrices for {module}: it is damaged, get "
                            "it again.")
    wrong = None
    for role in update.keys() - {"alpha", "up"}:
        theirs, ours = list(update[role].shape), list(shape)
        if role == "down":  # of a convolution too: its kernel counts as inputs
            theirs = [update["up"].shape[0], math.prod(update["down"].shape[1:])]
            ours = [shape[0], math.prod(shape[1:])]
        if theirs != ours:
            theirs, ours = (" x ".join(map(str, sizes)) for sizes in (theirs, ours))
            wrong = f"its {name} is {theirs}, this model's is {ours}"
    if wrong and "full" not in update and module.split(".")[0] in ("patch_embedding", "head"):
        # An adapter of the base model carries over to the deep latent space, except where
        # the latent enters and leaves.
        update.clear()
        return [f"{name} (made for another latent space)"]
    if wrong:
        raise UserError(f"{what} was made for another base: {wrong}; use an adapter of the same "
                        "base model.")
    return []


def scale_of(name, update, config):
    """alpha / r of one adapter: from its own .alpha tensor, else from PEFT's settings,
    else 1."""
    rank = len(update["down"])
    if "alpha" in update:
        return float(update["alpha"]) / rank
    if "lora_alpha" not in config:
        return 1.0
    alpha, module = config["lora_alpha"], name.rpartition(".")[0]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        suffix = re.compile(rf"(.*\.)?{pattern}")
        if suffix.fullmatch(module) or suffix.fullmatch(to_diffusers(module)):
            alpha = value
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
