"""Adapter files of every program: which tensor of a file changes which parameter of a
Wan transformer, and how (`lora.load` then does it).

One procedure covers PEFT, diffusers, ComfyUI, kohya, VideoX-Fun, DiffSynth and LyCORIS
names and mixtures of them: names are not parsed, but looked up in a table made from the
model itself (`spellings`). Headers are enough: no tensor is read here.
"""
import math
import re
import warnings

import torch

from files import checkpoint
from files.checkpoint import UserError, bare
from files.layouts import to_diffusers, to_original

# A key is <prefix><module name><what it is>, and what it is decides which parameter changes:
KEY = re.compile(r"(?P<name>.+?)\."
                 r"(?P<part>lora_(A|B|down|up)|alpha|diff|diff_[bm])"
                 r"(\.default)?(\.(?P<leaf>weight|bias))?")
ROLES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
CHANGES = {"diff_b": "_bias", "up_bias": "_bias", "diff_m": "_modulation", "full": ""}
PREFIX = re.compile("^(base_model_|model_|diffusion_model_|module_|_?orig_mod_|pipe_dit_|"
                    "transformer_2_|transformer_|lora_unet__|lora_unet_|lycoris_)+")
ELSEWHERE = " (made for another latent space)"
IN_FOLDERS = ("adapter_model.safetensors", "adapter_model.bin",
              "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
#: kinds of adapters -> what marks them in their keys
UNSUPPORTED = {
    "DoRA": r"lora_magnitude_vector|dora_scale",
    "LoKr": r"lokr_", "LoHa": r"hada_", "GLoRA": r"\.[ab][12]\.weight$", "OFT": r"\.b?oft_",
    "IA3": r"ia3_|\.on_input$", "VeRA": r"vera_lambda", "LoCon with a middle matrix": r"lora_mid",
    "LyCORIS norm": r"\.[wb]_norm$",
    "LoRA of fused layers": r"(to_|[._])(qkv|kv)[._](lora|diff|alpha)",
    "patch that sets weights": r"\.set_weight$|\.reshape_weight$"}


def fit(shapes, source, expert=None, latent_layers=(), is_deep=False):
    """What `load` would do to a net of these {parameter: shape}, from the headers alone
    -> ({parameter: {role: Stored tensor}}, keys that fit nothing, PEFT's settings).
    latent_layers: names of those that touch the latent. An update of them may be for
        another latent space; it is where its shape does not fit, or where the net `is_deep`.

    UserError for what is not supported, or was made for another base."""
    what = "the adapter" if isinstance(source, dict) else str(source)
    tensors, config = (source, {}) if isinstance(source, dict) else read(source)
    refuse_unsupported(tensors, what)
    tensors, config = part_of(tensors, expert, what), part_of(config, expert, what)
    config = {re.sub(r"^transformer(_2)?\.", "", k): v for k, v in config.items()}
    updates, skipped = sort(tensors, spellings(shapes), what)
    for name in updates:
        skipped += check(updates, name, shapes[name], latent_layers, is_deep, what)
    roles = {role for update in updates.values() for role in update}
    if roles <= {"full", "alpha"}:
        raise UserError(f"{what} holds no LoRA for this model: none of its {len(tensors)} tensors "
                        "changes one of the model's layers; use an adapter of the same base model.")
    if skipped:
        ends = [name for name in skipped if name.endswith(ELSEWHERE)]
        named = ", ".join(sorted(ends)) or f"first: {min(skipped)}"
        warnings.warn(f"{what}: {len(skipped)} of {len(tensors)} tensors fit nothing in this model "
                      f"({named}); the others are applied.")
    return updates, skipped, config


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
        if found := [key for key in tensors if re.search(mark, key)]:
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


def spellings(parameters):
    """Every way a parameter's name is written in adapter files, dots turned to
    underscores -> its name in the net.

    Once flattened, "blocks_12_self_attn_k" needs no parsing, and names with mixed
    separators are covered too.
    """
    table = {PREFIX.sub("", name.replace(".", "_")): name for name in parameters}
    for name in parameters:
        diffusers = to_diffusers(name)  # LyCORIS mixes: self_attn.to_q
        mixed = diffusers.replace("attn1", "self_attn").replace("attn2", "cross_attn")
        original = to_original(name.removeprefix("transformer."))  # of a net of diffusers
        for alias in (diffusers, mixed, original):  # where both have a name, the net's wins
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


def check(updates, name, shape, latent_layers, is_deep, what):
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
    if (wrong or is_deep) and "full" not in update and module in latent_layers:
        # An adapter of the base model carries over to the deep latent space, except where
        # the latent enters and leaves.
        update.clear()
        return [name + ELSEWHERE]
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


# --------------------------------------------------------------------------- writing


def write(adapters, format, prefix="transformer."):
    """Adapters, (module name, its LoRALinear) each -> ({name: tensor} as a program
    expects them, what belongs into the header); formats as in `lora.save`. prefix: of the
    names in the layout of PEFT."""
    if format not in ("peft", "comfyui", "kohya"):
        raise UserError(f'LoRA format "{format}" is unknown: use peft, comfyui or kohya.')
    if format != "peft" and adapters[0][0].startswith("transformer."):  # diffusers' own names
        raise UserError(f"the names by which {format} knows the layers of this model are not known "
                        "here: use peft.")
    kinds = {(a.rank, a.alpha) for _, a in adapters}
    rank, alpha = kinds.pop() if len(kinds) == 1 else (None, None)
    if format == "peft" and rank is None:
        raise UserError("these adapters differ in rank or alpha, which a PEFT header says badly: "
                        "save as comfyui.")
    tensors, header = {}, dict(rank=rank, alpha=alpha)
    for name, a in adapters:
        if format == "peft":
            stem = prefix + to_diffusers(name.removeprefix("transformer."))
            tensors |= {f"{stem}.lora_A.weight": a.down, f"{stem}.lora_B.weight": a.up}
            continue
        flat = name.replace(".", "_")
        stem = f"diffusion_model.{name}" if format == "comfyui" else f"lora_unet_{flat}"
        tensors |= {f"{stem}.lora_down.weight": a.down, f"{stem}.lora_up.weight": a.up,
                    f"{stem}.alpha": torch.tensor(float(a.alpha))}
    if format == "peft":
        names = [to_diffusers(name.removeprefix("transformer.")) for name, _ in adapters]
        header["lora_adapter_metadata"] = peft_header(rank, alpha, names, prefix)
    return tensors, header


def peft_header(rank, alpha, names, prefix):
    config = {"r": rank, "lora_alpha": alpha, "target_modules": names, "lora_dropout": 0.0,
              "bias": "none", "use_rslora": False, "use_dora": False}
    return {f"{prefix}{k}": v for k, v in config.items()}
