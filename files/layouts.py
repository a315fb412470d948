"""One Wan transformer, many files: every published layout, read as one dict of tensors
under their original names.

The same weights are published in many spellings. Values are identical, so changing
layout is renaming; only two kinds of file also need arithmetic. `original` undoes all
of it, tensor by tensor and not before a tensor is read:

    original release   blocks.0.self_attn.q.weight
    diffusers          blocks.0.attn1.to_q.weight            other names for all modules
    repacked           model.diffusion_model.blocks.0...     a prefix; or DC's "0."
    fp8                the same and .scale_weight            W = fp8 * scale
    adapter training   ...q.base_layer.weight, .lora_A/B     W = base + 2 B A

The other direction, `save`, writes one file, or a folder as the hubs have it:
config.json, and one file or shards with an index.

Where a file does not carry its sizes, `sizes` and `autoencoder_sizes` read them from the
shapes.
"""
import re
from math import prod
from pathlib import Path

import torch

from files import checkpoint
from files.checkpoint import Stored, UserError, bare, read, renamed

# (original, diffusers); the first that matches whole path components wins.
BLOCK_NAMES = [  # inside blocks.i.
    ("self_attn.o", "attn1.to_out.0"), ("cross_attn.o", "attn2.to_out.0"),
    ("self_attn.q", "attn1.to_q"), ("self_attn.k", "attn1.to_k"), ("self_attn.v", "attn1.to_v"),
    ("cross_attn.q", "attn2.to_q"), ("cross_attn.k", "attn2.to_k"), ("cross_attn.v", "attn2.to_v"),
    ("cross_attn.k_img", "attn2.add_k_proj"), ("cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    ("self_attn", "attn1"), ("cross_attn", "attn2"),  # norm_q, norm_k
    ("norm3", "norm2"),  # the one norm with weights, before cross-attention
    ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"),
    ("modulation", "scale_shift_table"),
]
TOP_NAMES = [
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("head.modulation", "scale_shift_table"), ("head.head", "proj_out"),
]


def to_diffusers(name):
    """Name of a Wan transformer's tensor or module in diffusers' spelling (a name
    already spelt so is kept)."""
    return respell(name, source=0)


def to_original(name):
    """Name of a Wan transformer's tensor or module in the original spelling (a name
    already spelt so is kept)."""
    return respell(name, source=1)


def respell(name, source):
    block, rest = re.fullmatch(r"(blocks\.\d+\.)?(.*)", name).groups(default="")
    for pair in BLOCK_NAMES if block else TOP_NAMES:
        old, new = pair[source], pair[1 - source]
        if rest == old or rest.startswith(old + "."):
            return block + new + rest[len(old):]
    return name


# ------------------------------------------------------------------------------- reading


def open_checkpoint(path, heads=None):
    """A weight file, an index of shards, or a folder -> ({original name: Stored}, the
    settings of `dit.Config` as a dict)

    Settings come from the header of files written by `dit.save`, else from the shapes
    and, in a folder, from config.json in either style for what shapes do not show.
    """
    path = Path(path)
    tensors, metadata = checkpoint.open_tensors(path)
    tensors, stored = original(tensors), metadata.get("wan_dit")
    if stored:
        stored.pop("image_positions", None)  # files of earlier versions have it
        return tensors, {**stored, "patch": tuple(stored["patch"])}
    folder = path.parent if path.name.endswith(".index.json") else path
    config = folder / "config.json"  # below a file there is none
    told = checkpoint.read_json(config) if config.is_file() else {}
    heads = heads or told.get("num_heads") or told.get("num_attention_heads")
    settings = sizes(tensors, heads)
    settings |= {k: told[k] for k in ("eps", "text_len") if k in told}
    # where the last blocks are missing, the strict loader says so
    settings["layers"] = max(settings["layers"], told.get("num_layers", 0))
    return tensors, settings


def sizes(tensors, heads=None):
    """What the shapes under original names say of `dit.Config` -> dict. They do not
    show the heads: 128 channels each by default."""

    def shape(name):
        if name not in tensors:
            raise UserError("these are not the weights of a Wan transformer: the tensor "
                            f"{name} is missing.")
        return tensors[name].shape

    dim, in_channels, *patch = shape("patch_embedding.weight")
    if len(patch) != 3:
        raise UserError("these are not the weights of a Wan transformer: patch_embedding.weight "
                        "must have 5 axes.")
    if heads is None and dim % 128:
        raise UserError(f"width {dim} is not a multiple of 128, so the number of heads must be "
                        "given: heads=...")
    blocks = [int(k.split(".")[1]) for k in tensors if re.match(r"blocks\.\d+\.", k)]
    image = "img_emb.proj.0.weight"
    return dict(
        dim=dim, ffn_dim=shape("blocks.0.ffn.0.weight")[0], heads=heads or dim // 128,
        layers=1 + max(blocks), in_channels=in_channels,
        out_channels=shape("head.head.weight")[0] // prod(patch), patch=tuple(patch),
        text_dim=shape("text_embedding.0.weight")[1],
        freq_dim=shape("time_embedding.0.weight")[1],
        image_dim=shape(image)[0] if image in tensors else None)


def autoencoder_sizes(tensors):
    """What the shapes of a DC-AE-V's weights say of `ae.Config` -> (widths, depths,
    latent channels); of other weights (0,), (0,), 0."""
    block = re.compile(r"encoder\.stages\.(\d+)\.op_list\.\d+\.main\.(conv1?)\.conv\.weight")
    found = [match for match in map(block.fullmatch, tensors) if match]
    n = 1 + max((int(match[1]) for match in found), default=0)
    widths, depths = [0] * n, [0] * n
    for match in found:
        stage = int(match[1])
        widths[stage] = tensors[match[0]].shape[1]
        depths[stage] += match[2] == "conv1"  # the other convolution is the resampling's
    return widths, depths, len(tensors.get("encoder.project_out.conv.weight", ()))


def original(tensors):
    """{name: tensor or Stored} in any published layout -> the transformer under its
    original names, nothing read yet.

    Whatever belongs to no known layout stays under its own name, for the strict loader
    to refuse.
    """
    tensors = renamed(tensors, without_prefix)
    tensors = {k: v for k, v in tensors.items() if not unused(k)}
    tensors = merge_adapters(apply_scales(tensors))
    diffusers = any(k.startswith("condition_embedder.") for k in tensors)
    return renamed(tensors, to_original) if diffusers else tensors


def without_prefix(name):
    return bare(name).removeprefix("0.")


def unused(name):
    """DC-VideoGen's training, ComfyUI's mark on fp8 files, old diffusers exports."""
    return name in ("null_embedding", "scaled_fp8") or "norm_added_q" in name


def apply_scales(tensors):
    """fp8 files of ComfyUI: `X.weight` is stored divided by one number,
    `X.scale_weight`."""
    tensors = dict(tensors)

    def scaled(value, scale):
        number = read(scale).float().reshape(())
        return read(value).float() * number

    for key in [k for k in tensors if k.endswith(".scale_weight")]:
        scale, name = tensors.pop(key), key.removesuffix("scale_weight") + "weight"
        if name not in tensors or prod(scale.shape) != 1:
            raise UserError(f"{key} is not the scale of one weight: this fp8 layout is not "
                            "supported, use bf16, fp16 or fp32 weights.")
        tensors[name] = later(scaled, tensors[name], scale)
    odd = [k for k in tensors if "scale" in k and "scale_shift_table" not in k]
    if odd:
        raise UserError(f"these weights come with {len(odd)} scales of an unknown kind (first: "
                        f"{odd[0]}): use bf16, fp16 or fp32 weights, or fp8 weights with ComfyUI's "
                        "scale_weight.")
    return tensors


def later(make, *parts):
    """make(*parts), of the first one's shape, when it is read."""
    return Stored(tuple(parts[0].shape), torch.float32, lambda: make(*parts))


def merge_adapters(tensors):
    """Checkpoints of adapter training: W = base_layer + (alpha / rank) lora_B lora_A;
    the published recipe has alpha = 2 rank.

    With a magnitude vector (DoRA) each row of W is then scaled to the length that the
    vector says.
    """
    tensors = dict(tensors)

    def merged(base, down, up, length):
        w = read(base).float() + 2 * (read(up).float() @ read(down).float())
        if length is None:
            return w
        return w * (read(length).float().reshape(-1) / w.norm(dim=1))[:, None]

    for key in [k for k in tensors if ".base_layer." in k]:
        base, (stem, leaf) = tensors.pop(key), key.split(".base_layer.")
        tensors[f"{stem}.{leaf}"] = base
        if leaf != "weight":
            continue
        down = tensors.pop(f"{stem}.lora_A.default.weight", None)
        up = tensors.pop(f"{stem}.lora_B.default.weight", None)
        length = tensors.pop(f"{stem}.lora_magnitude_vector.default", None)
        if down is None or up is None:
            raise UserError(f"{stem} has a base layer but not both adapter matrices (lora_A, "
                            "lora_B): the checkpoint is not complete.")
        tensors[f"{stem}.weight"] = later(merged, base, down, up, length)
    return tensors


# ------------------------------------------------------------------------------- writing


def save(path, tensors, config, metadata, dtype=None, format="original", shard_bytes=5e9):
    """Write a transformer. One tensor at a time is converted or fetched from the GPU.

    path: FILE.safetensors, or a folder: config.json and one file, or shards of at most
        `shard_bytes` and their index.
    tensors: original names. config: `dit.Config`. dtype: store all tensors in it.
    format: "diffusers" makes a folder that diffusers'
        WanTransformer3DModel.from_pretrained loads, "original" one named like the
        original release.
    """
    if format not in ("diffusers", "original"):
        raise UserError(f'the format "{format}" is unknown: use original or diffusers.')
    path = Path(path)
    if path.suffix == ".safetensors" and format == "diffusers":
        raise UserError(f"{path} is a file, but diffusers reads a folder: give the name of a "
                        "folder.")
    tensors = checkpoint.in_type(tensors, dtype)
    if path.suffix == ".safetensors":
        return checkpoint.save_tensors(path, tensors, metadata)
    told = original_config(config)
    if format == "diffusers":
        tensors = {to_diffusers(k): v for k, v in tensors.items()}
        told = diffusers_config(config)
    checkpoint.save_shards(path, tensors, {"format": "pt", **metadata}, shard_bytes)
    checkpoint.write_json(path / "config.json", told)


def original_config(c):
    """config.json of the original releases."""
    kind = "i2v" if c.in_channels > c.out_channels else "t2v"
    return dict(_class_name="WanModel", model_type=kind, patch_size=c.patch, text_len=c.text_len,
                in_dim=c.in_channels, dim=c.dim, ffn_dim=c.ffn_dim, freq_dim=c.freq_dim,
                text_dim=c.text_dim, out_dim=c.out_channels, num_heads=c.heads,
                num_layers=c.layers, eps=c.eps)


def diffusers_config(c):
    """config.json of diffusers' WanTransformer3DModel."""
    return dict(_class_name="WanTransformer3DModel", patch_size=c.patch,
                num_attention_heads=c.heads, attention_head_dim=c.dim // c.heads,
                in_channels=c.in_channels, out_channels=c.out_channels, text_dim=c.text_dim,
                freq_dim=c.freq_dim, ffn_dim=c.ffn_dim, num_layers=c.layers, eps=c.eps,
                cross_attn_norm=True, qk_norm="rms_norm_across_heads", image_dim=c.image_dim,
                added_kv_proj_dim=c.dim if c.image_dim else None, rope_max_seq_len=1024,
                pos_embed_seq_len=None)
