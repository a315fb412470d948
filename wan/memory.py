"""What a run needs, estimated before it starts: memory, and how it is made to fit; and
arithmetic (`flops`).

    denoising   weights + one forward without gradients + keys and values of the prompts
    decode      autoencoder + the activations of one tile, over all its chunks

Text and image encoder run before anything else is loaded, so they never stand beside
the transformer. Figures are estimates; the peak that `sample.py` reports is measured.
"""
import re
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

import dit
from files.checkpoint import UserError
from gpu import tiling
from wan.models import Deferred
from wan.text import WanText


IMAGE_TOKENS = 257  # of a picture


class Plan(NamedTuple):
    """How a run fits into memory."""

    offload: str  # "none", "parts" or "blocks"
    tile: tuple | None  # of the decode, in latent cells; None: whole
    gib: dict  # what needs how much


def plan(model, frames, size, dtype, fold=1, offload=None, free=None):
    """Choose how a run fits into memory -> Plan. Raises UserError where nothing fits.

    offload: "none" (transformer and autoencoder stay on the device), "parts" (one of
    them at a time), "blocks" (the transformer's blocks stream through two buffers); the
    first that fits, unless given. The tile is the largest that fits. fold: samples in
    one pass.
    free: bytes to plan for (default: what is free on the device). Also sets the model's
    tile for encoding, and sends a text encoder larger than the GPU to the CPU.
    """
    shape = model.latent_shape(frames, size)
    free = free or free_memory(model.device)
    budget = 0.9 * free  # the allocator loses some to fragments
    weights, streamed = weight_bytes(model, dtype)
    autoencoder = sum(p.numel() for p in model.ae.parameters()) * model.ae_dtype.itemsize
    step = activation_bytes(model.net.config, shape, fold, dtype)
    ways = ["none", "parts", "blocks"]
    if model.device.type == "cpu" or not model.is_wan:
        ways = ways[:2]
    if not isinstance(model.net, Deferred):
        ways = ways[:1]
    on_device = {"none": weights + autoencoder, "parts": weights, "blocks": streamed}
    for way in [offload] if offload else ways:
        denoise = on_device[way] + step
        base = on_device["none"] if way == "none" else autoencoder
        tile = tiling.choose(model.ae, shape, budget - base, model.ae_dtype)
        decode = base + tiling.peak(model.ae, "decoder", shape, tile, model.ae_dtype)
        if max(denoise, decode) <= budget:
            break
    if model.task != "t2v":
        room = budget - autoencoder
        model.encode_tile = tiling.choose(model.ae, shape, room, model.ae_dtype, side="encoder")
    if isinstance(model.text, WanText) and model.text.stored_bytes() > budget:
        model.text.device = "cpu"
    if max(denoise, decode) > budget:
        part = "denoising" if denoise > budget else "the decode"
        need = denoise if denoise > budget else decode
        more = " or --offload blocks" if "blocks" in ways and way != "blocks" else ""
        raise UserError(f"{part} of {frames} frames of {size[0]}x{size[1]} needs about "
                        f"{need / 2**30:.1f} GiB, but {model.device} has {free / 2**30:.1f} GiB "
                        f"free: use a smaller --size, fewer --frames, --dtype bf16{more}.")
    needs = dict(transformer=weights, autoencoder=autoencoder, denoising_peak=denoise,
                 decode_peak=decode, free=free)
    return Plan(way, tile, {name: round(n / 2**30, 3) for name, n in needs.items()})


def free_memory(device):
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    file = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", file.read_text() if file.exists() else "")
    return int(found[1]) * 1024 if found else 8 * 2**30


def counted(config):
    """The dit.Config that a transformer is counted by: another family's as a Wan of its
    width and depth, with the usual MLP."""
    c = config
    if isinstance(c, dit.Config):
        return c
    return dit.Config(dim=c.dim, ffn_dim=4 * c.dim, heads=max(c.dim // 128, 1), layers=c.layers,
                      in_channels=c.in_channels, out_channels=c.out_channels, patch=c.patch)


def weight_bytes(model, dtype):
    """Memory of a transformer's weights -> (all of them, those on the device while the
    blocks are streamed: ends and two blocks)."""
    if not model.is_wan:
        whole = sum(p.numel() for p in model.net.outline().parameters()) * dtype.itemsize
        return whole, whole
    whole = on_device = 0
    for name, size in parameter_bytes(model.net.config, dtype).items():
        whole += size
        if not name.startswith("blocks.") or name.startswith(("blocks.0.", "blocks.1.")):
            on_device += size
    return whole, on_device


def parameter_bytes(config, dtype):
    """{name: bytes} of the parameters of a Wan transformer."""
    with torch.device("meta"):
        net = dit.WanDiT(config)
    found = {}
    for name, p in net.named_parameters():
        found[name] = p.numel() * (4 if dit.keeps_fp32(name) else dtype.itemsize)
    return found


def activation_bytes(config, latent, batch=1, dtype=torch.bfloat16, prompts=2):
    """Peak memory that sampling a latent (frames, height, width) takes beside the
    weights: one forward without gradients, and the `dit.Prompt` of so many prompts
    (guidance has two)."""
    c, L, s = counted(config), dit.tokens(config, latent), dtype.itemsize
    keys = prompts * c.layers * (c.text_len + (IMAGE_TOKENS if c.image_dim else 0)) * 2 * c.dim * s
    ends = batch * L * prod(c.patch) * (c.in_channels + c.out_channels) * 4
    rope = L * 4 * c.dim // c.heads  # complex64
    return block_bytes(c, batch * L, s) + keys + ends + rope


def block_bytes(c, tokens, s):
    """Peak memory of one block, matrix products in numbers of s bytes.

    Per token and channel the peak is in cross-attention (22 bytes: the residual stream
    as the block got it and as it is now, 4 each; input and output of the projection of
    q, 2 each; the latter and its norm in fp32, and the norm rounded) or in the MLP (the
    same 8, its input, its hidden layer before and after the activation function).
    Attention itself needs no scores in memory.
    """
    return tokens * max(22 * c.dim, (8 + s) * c.dim + 2 * s * c.ffn_dim)


# ----------------------------------------------------------------- arithmetic


class Flops(NamedTuple):
    linear: float
    attention: float

    @property
    def total(self):
        return self.linear + self.attention


def flops(config, latent):
    """FLOPs (2 per multiply-add) of one forward, batch 1; a guided step is two. The
    time MLPs (one row) are left out."""
    c, L = counted(config), dit.tokens(config, latent)
    T = c.text_len
    I, width = (IMAGE_TOKENS, c.image_dim) if c.image_dim else (0, 0)
    block = 12 * L * c.dim**2 + 4 * L * c.dim * c.ffn_dim + 4 * (T + I) * c.dim**2
    ends = 2 * L * c.dim * prod(c.patch) * (c.in_channels + c.out_channels)
    text = 2 * T * (c.text_dim * c.dim + c.dim**2)
    image = 2 * I * (width**2 + width * c.dim)
    attention = c.layers * (4 * L**2 * c.dim + 4 * L * (T + I) * c.dim)
    return Flops(c.layers * block + ends + text + image, attention)
