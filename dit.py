"""The Wan video diffusion transformer, for any latent space.

A transformer that looks at a noisy video latent and predicts the flow velocity v = noise - x0 (Wan, arXiv 2503.20314).
It is the backbone that DC-VideoGen (arXiv 2509.25182, section on AE-Adapt-V) moves into a deep latent space, and the
move touches only its two ends: the patch embedder (first layer) and the head (last layer) meet the latent, everything
between sees tokens of width D and keeps its weights.

    x [B, C, F, H, W]  --patch (pt, ph, pw)-->  L = F/pt * H/ph * W/pw tokens of width D
    block:  x += gate1 * SelfAttention(LN(x) * (1 + scale1) + shift1)        all tokens with all, 3-axis rotary positions
            x += CrossAttention(LN3(x), text [, image])                      the prompt (and the condition picture)
            x += gate2 * MLP(LN(x) * (1 + scale2) + shift2)
            (shift, scale, gate: from the diffusion time, plus a learned table per block)
    head:   Linear(LN(x) * (1 + scale) + shift)  --unpatchify-->  v [B, C, F, H, W]

Why a deep latent space is fast: f32t4 with patch 1 has 4.3x fewer tokens than f8t4 with patch 2 (17,600 instead of
75,600 at 720p). Linear layers cost 12 L D^2 + 4 L D f and attention 4 L^2 D per block (`flops`), so one step gets 9.5x
(14B) to 12x (1.3B) cheaper.

Precision is a policy, stated once: residual stream, norms, modulation, time embedding and head are fp32; the matrix
products of patch embedder, text and image MLPs and blocks run in `matmul_dtype()`: bf16 under autocast (training, fp32
masters) or after `cast_weights(torch.bfloat16)` (sampling), else fp32.

Sampling calls the network a hundred times for one video. What does not change between the calls is computed once, exactly:

    prompt = net.prompt(context)          keys and values of every block's cross-attention, padding merged into a few keys
    times = net.times(timesteps)          what the timesteps turn into, for all steps at once
    v = net(x, times[i], prompt)          instead of net(x, t, context)

Parameter names are those of the original checkpoints; `load` reads every published layout (files/layouts.py).

    python dit.py                      every preset: parameters, tokens and TFLOP of one forward (5 seconds)
    python dit.py --latent 20x68x120   for one latent size: 80 frames of 2176x3840 in f32t4 are 163,200 tokens
"""
import argparse
import dataclasses
import math
import re
from contextlib import nullcontext
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from files import layouts
from files.checkpoint import Stored, UserError, load_strict, save_tensors, user_errors
from kernels import attention, gate_residual, layer_norm_modulate, linear_gelu, residual_norm, rms_norm, rms_norm_rope


@dataclasses.dataclass(frozen=True)
class Config:
    dim: int  # D, model width
    ffn_dim: int  # f, width inside the MLP
    heads: int
    layers: int
    in_channels: int  # image-to-video: noisy latent + 4 mask channels + condition latent
    out_channels: int
    patch: tuple = (1, 2, 2)  # pt, ph, pw
    text_dim: int = 4096
    text_len: int = 512  # prompts are padded to this; the padded rows are attended too
    freq_dim: int = 256
    eps: float = 1e-6
    image_dim: int | None = None  # width of the CLIP features; None: no image cross-attention
    image_positions: int | None = None  # first-and-last-frame models: learned positions for 2 x 257 image tokens


_1B = dict(dim=1536, ffn_dim=8960, heads=12, layers=30)
_5B = dict(dim=3072, ffn_dim=14336, heads=24, layers=30)
_14B = dict(dim=5120, ffn_dim=13824, heads=40, layers=40)
_TOY = dict(dim=160, ffn_dim=640, heads=5, layers=6, text_dim=32, text_len=8)

PRESETS = {
    "wan2.1-t2v-1.3b": Config(**_1B, in_channels=16, out_channels=16),
    "wan2.1-t2v-14b": Config(**_14B, in_channels=16, out_channels=16),
    "wan2.1-i2v-14b": Config(**_14B, in_channels=36, out_channels=16, image_dim=1280),
    "wan2.1-flf2v-14b": Config(**_14B, in_channels=36, out_channels=16, image_dim=1280, image_positions=514),
    "wan2.2-t2v-a14b": Config(**_14B, in_channels=16, out_channels=16),  # each of its two experts
    "wan2.2-i2v-a14b": Config(**_14B, in_channels=36, out_channels=16),
    "wan2.2-ti2v-5b": Config(**_5B, in_channels=48, out_channels=48),
    "dc-wan2.1-t2v-1.3b": Config(**_1B, in_channels=32, out_channels=32, patch=(1, 1, 1)),
    "dc-wan2.1-t2v-14b": Config(**_14B, in_channels=32, out_channels=32, patch=(1, 1, 1)),
    "dc-wan2.1-i2v-14b": Config(**_14B, in_channels=68, out_channels=32, patch=(1, 1, 1), image_dim=1280),
    "dc-wan2.1-t2v-14b-f64t4c128": Config(**_14B, in_channels=128, out_channels=128, patch=(1, 1, 1)),
    "dc-wan2.1-t2v-1.3b-f64t4c128": Config(**_1B, in_channels=128, out_channels=128, patch=(1, 1, 1)),
    # One toy does text- and image-to-video: without an image, mask and condition channels are zero.
    "toy-base": Config(**_TOY, in_channels=36, out_channels=16),
    "toy-dc": Config(**_TOY, in_channels=68, out_channels=32, patch=(1, 1, 1)),
}


# ------------------------------------------------------------------------------------------------- positions and time

@lru_cache(maxsize=16)
def rope_table(grid, head_dim, device):
    """Rotations e^{i angle} of every token of a (f, h, w) grid: complex64 [L, head_dim/2], made in float64 once per grid.

    The channel pairs of a head are divided among the axes: head_dim//6 each for height and width, the rest (first) for
    time. Pair j of an axis with N pairs turns by position * 10000^(-j/N).
    """
    side = head_dim // 6
    pairs = (head_dim // 2 - 2 * side, side, side)
    with torch.inference_mode(False):  # a cached table may be made while sampling and used later in training
        angles = []
        for axis, (length, n) in enumerate(zip(grid, pairs)):
            j = torch.arange(n, dtype=torch.float64, device=device)
            angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * 10000.0 ** (-j / n)
            angles.append(angle.view(*[length if a == axis else 1 for a in range(3)], n).expand(*grid, n))
        angles = torch.cat(angles, -1).flatten(0, 2)  # l c/2
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def sinusoid(t, dim):
    """[cos(t w), sin(t w)] with w_i = 10000^(-i / (dim/2)): float64 inside, since t reaches 1000; fp32 out."""
    w = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angle = t.double()[..., None] * w
    return torch.cat([angle.cos(), angle.sin()], -1).float()


# -------------------------------------------------------------------------------------------------------------- layers

class PatchEmbedder(nn.Conv3d):
    """Non-overlapping patches -> tokens: a convolution whose stride is its kernel, so it is one matrix product."""

    def __init__(self, in_channels, dim, patch):
        super().__init__(in_channels, dim, patch, stride=patch)

    def forward(self, x):  # b c f h w -> b f/pt h/ph w/pw d
        pt, ph, pw = self.kernel_size
        patches = rearrange(x, "b c (f pt) (h ph) (w pw) -> b f h w (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        # contiguous: else the product chosen, and so the last bit, would depend on whether the weight is being trained
        return F.linear(patches.contiguous().to(self.weight.dtype), self.weight.flatten(1), self.bias)


class SelfAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.eps = c.heads, c.eps
        self.q, self.k, self.v, self.o = (nn.Linear(c.dim, c.dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(c.dim, c.eps), nn.RMSNorm(c.dim, c.eps)

    def forward(self, x, rope):  # b l d
        q = rms_norm_rope(self.q(x), self.norm_q.weight, rope, self.heads, self.eps)
        k = rms_norm_rope(self.k(x), self.norm_k.weight, rope, self.heads, self.eps)
        v = self.v(x).unflatten(2, (self.heads, -1))  # b l n c
        return self.o(attention(q, k, v).flatten(2))


class Context(NamedTuple):
    """What cross-attention looks at: the prompt and perhaps a picture, as tokens of width D."""
    text: torch.Tensor  # b m d
    image: torch.Tensor | None = None  # b m' d
    offset: torch.Tensor | None = None  # [m]: added to the logits of the text, where a row stands for many equal ones


class KeysValues(NamedTuple):
    """The context as one block sees it: the same at every step of a video, since it depends on neither x nor t."""
    text: tuple  # keys, values: b m n c
    image: tuple | None
    offset: torch.Tensor | None


class Prompt(NamedTuple):
    """What `WanDiT.prompt` makes and `forward` takes in place of the prompt states."""
    blocks: tuple  # of KeysValues


class Time(NamedTuple):
    """What `WanDiT.times` makes of one timestep and `forward` takes in its place; g is 1, the latent frames or the tokens."""
    e: torch.Tensor  # 1 g d, for the head
    e0: torch.Tensor  # 1 g 6 d, for the blocks


class CrossAttention(nn.Module):
    """Tokens look at the prompt; with an image branch the same queries look at the picture in a second, separate softmax
    and the two results are added before the output projection. No positions, no mask."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.eps = c.heads, c.eps
        self.q, self.k, self.v, self.o = (nn.Linear(c.dim, c.dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(c.dim, c.eps), nn.RMSNorm(c.dim, c.eps)
        if c.image_dim:
            self.k_img, self.v_img = nn.Linear(c.dim, c.dim), nn.Linear(c.dim, c.dim)
            self.norm_k_img = nn.RMSNorm(c.dim, c.eps)

    def forward(self, x, context):  # b l d, Context or KeysValues
        seen = context if isinstance(context, KeysValues) else self.keys_values(context)
        q = self.split(rms_norm(self.q(x), self.norm_q.weight, self.eps))
        y = attention(q, *seen.text, seen.offset)
        if seen.image is not None:
            y = y + attention(q, *seen.image)
        return self.o(y.flatten(2))

    def keys_values(self, context):  # Context -> KeysValues
        key = lambda c, k, norm: self.split(rms_norm(k(c), norm.weight, self.eps))
        text = key(context.text, self.k, self.norm_k), self.split(self.v(context.text))
        image = None
        if context.image is not None:
            image = key(context.image, self.k_img, self.norm_k_img), self.split(self.v_img(context.image))
        return KeysValues(text, image, context.offset)

    def split(self, x):  # b l d -> b l n c
        return x.unflatten(2, (self.heads, -1))


def modulation(n, dim):
    """A learned table of n vectors [1 n dim], small random numbers. (On the meta device even these would make torch import its compiler, 2 s.)"""
    table = torch.empty(1, n, dim)
    return nn.Parameter(table if table.is_meta else table.normal_(std=dim**-0.5))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.eps = c.eps
        self.self_attn = SelfAttention(c)
        self.norm3 = nn.LayerNorm(c.dim, eps=c.eps)  # the cross-attention norm; norms 1 and 2 have no parameters
        self.cross_attn = CrossAttention(c)
        self.ffn = nn.Sequential(nn.Linear(c.dim, c.ffn_dim), nn.GELU("tanh"), nn.Linear(c.ffn_dim, c.dim))
        self.modulation = modulation(6, c.dim)

    def forward(self, x, e0, rope, context, dtype):
        """x fp32 [b l d]; e0 fp32 [b g 6 d]; context (Context or KeysValues) in `dtype`, the type of the matrix products."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e0).unbind(2)  # each b g d
        a = layer_norm_modulate(x, scale1, shift1, self.eps, dtype)
        x, a = residual_norm(x, self.self_attn(a, rope), gate1, self.norm3.weight, self.norm3.bias, self.eps, dtype, affine=True)
        x, a = residual_norm(x, self.cross_attn(a, context), None, scale2, shift2, self.eps, dtype)
        return gate_residual(x, self.ffn[2](linear_gelu(self.ffn[0], a)), gate2)


class Head(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.eps = c.eps
        self.head = nn.Linear(c.dim, prod(c.patch) * c.out_channels)
        self.modulation = modulation(2, c.dim)

    def forward(self, x, e):  # b l d, b g d
        shift, scale = (self.modulation + e.unsqueeze(2)).unbind(2)
        return self.head(layer_norm_modulate(x, scale, shift, self.eps))


class ImageEmbedding(nn.Module):
    """CLIP tokens of the condition image -> width D. Two images (first and last frame) arrive as 514 tokens."""

    def __init__(self, c):
        super().__init__()
        self.proj = nn.Sequential(nn.LayerNorm(c.image_dim), nn.Linear(c.image_dim, c.image_dim), nn.GELU(),
                                  nn.Linear(c.image_dim, c.dim), nn.LayerNorm(c.dim))
        if c.image_positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, c.image_positions, c.image_dim))

    def forward(self, clip_fea, dtype):  # b m image_dim -> b m d
        x = clip_fea.float()
        if hasattr(self, "emb_pos"):
            x = x.reshape(-1, *self.emb_pos.shape[1:]) + self.emb_pos  # [2b, 257, .] or [b, 514, .]
        norm_in, *mlp, norm_out = self.proj
        x = norm_in(x).to(dtype)
        for layer in mlp:
            x = layer(x)
        return norm_out(x.float()).to(dtype)


# --------------------------------------------------------------------------------------------------------- transformer

class WanDiT(nn.Module):
    """net(x, t, context, clip_fea=None) -> velocity. Set `net.checkpointing = True` to recompute blocks in the backward
    pass: memory of one block instead of all, for a third more compute."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.dim % c.heads or (c.dim // c.heads) % 2:
            raise UserError(f"width {c.dim} cannot be split into {c.heads} heads of even width: choose another number.")
        self.patch_embedding = PatchEmbedder(c.in_channels, c.dim, c.patch)
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, c.dim), nn.GELU("tanh"), nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.head = Head(c)
        if c.image_dim:
            self.img_emb = ImageEmbedding(c)
        self.checkpointing = False
        self.weight_dtype = torch.float32
        if not self.head.head.weight.is_meta:  # else the weights come from a file
            self.initialise()

    @torch.no_grad()
    def initialise(self):
        """As the original trains from scratch. The zero head makes the first prediction exactly zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, PatchEmbedder)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view
                nn.init.zeros_(module.bias)
        for linear in (self.text_embedding[0], self.text_embedding[2], self.time_embedding[0], self.time_embedding[2]):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    # -- precision

    def cast_weights(self, dtype):
        """Store the large matrices in `dtype` and compute with it; norms, modulation, time and head stay fp32."""
        for name, p in self.named_parameters():
            p.data = p.data.to(torch.float32 if keeps_fp32(name) else dtype)
        self.weight_dtype = dtype
        return self

    def matmul_dtype(self, x):
        """The type in which patches, prompt and blocks are multiplied: autocast's where it is on, else the weights'."""
        return torch.get_autocast_dtype(x.device.type) if autocast_is_on(x) else self.weight_dtype

    # -- what the blocks receive

    def embed_patches(self, x):  # b c f h w -> b f/pt h/ph w/pw d
        c = self.config
        if x.ndim != 5 or x.shape[1] != c.in_channels:
            raise UserError(f"the latent has shape {list(x.shape)}, but this transformer takes [batch, {c.in_channels}, "
                            "frames, height, width]: use this model's autoencoder (and condition channels).")
        if any(s % p for s, p in zip(x.shape[2:], c.patch)):
            raise UserError(f"a latent of {'x'.join(map(str, x.shape[2:]))} (frames, height, width) cannot be cut into "
                            f"patches of {'x'.join(map(str, c.patch))}: choose another --size or --frames.")
        return self.patch_embedding(x).float()

    def embed_time(self, t):
        """t [b] (or [b g], see `forward`) -> e fp32 [b g d] for the head, e0 fp32 [b g 6 d] for the blocks."""
        if self.time_embedding[0].weight.dtype != torch.float32:
            raise ValueError("the time embedding must stay fp32: use net.cast_weights(dtype) instead of net.to(dtype).")
        with no_autocast(t):
            e = self.time_embedding(sinusoid(t if t.ndim == 2 else t.reshape(-1, 1), self.config.freq_dim))
            return Time(e, self.time_projection(e).unflatten(-1, (6, -1)))

    def embed_context(self, context, clip_fea=None, merge_padding=False):
        """Prompt states [b m text_dim], m <= text_len, and CLIP features -> Context.

        Rows past the prompt, up to text_len, are zeros BEFORE the text MLP and are attended, there is no mask: the model was
        trained with them. merge_padding: keep only a few of these equal rows and let the last ones count for all others.
        """
        c, dtype = self.config, self.matmul_dtype(context)
        if context.ndim != 3 or context.shape[2] != c.text_dim or context.shape[1] > c.text_len:
            raise UserError(f"the prompt states have shape {list(context.shape)}, but this transformer takes [batch, "
                            f"at most {c.text_len}, {c.text_dim}]: use the text encoder of this model.")
        rows, offset = c.text_len, None
        if merge_padding:
            filled = context.ne(0).any(2).any(0).nonzero()  # zero rows of a shorter prompt in the batch stay: they are padding too
            used = int(filled[-1]) + 1 if len(filled) else 0
            rows = min(-(-(used + 3) // 8) * 8, c.text_len)  # attention kernels like multiples of 8
            if rows < c.text_len:
                offset = torch.cat([torch.zeros(rows - 3, dtype=dtype), shared_weight(c.text_len - rows + 3, 3, dtype)]).to(context.device)
        context = F.pad(context, (0, 0, 0, rows - context.shape[1]))  # or cut, where there is more padding than is kept
        return Context(self.text_embedding(context.to(dtype)), self.embed_image(clip_fea), offset)

    def embed_image(self, clip_fea):
        if self.config.image_dim is None:
            if clip_fea is not None:
                raise UserError("this transformer has no image branch: leave clip_fea away.")
            return None
        if clip_fea is None:
            raise UserError("this transformer has an image branch: give clip_fea, the CLIP features of the image.")
        return self.img_emb(clip_fea, self.matmul_dtype(clip_fea))

    # -- what is the same at every step of a video

    @torch.no_grad()
    def prompt(self, context, clip_fea=None, merge_padding=True):
        """The cross-attention's keys and values for a prompt (and picture), for `forward` to take as `context` -> Prompt.

        Exact to rounding. Saves 4 (512 + 257) D^2 FLOPs per block and step. In bf16 a 14B prompt of 512 rows takes 420 MB;
        merged (`embed_context`), a prompt of 100 words about 100 MB, and its cross-attention costs a fifth. Prompts of a batch
        may differ in length.
        """
        context = self.embed_context(context, clip_fea, merge_padding)
        return Prompt(tuple(block.cross_attn.keys_values(context) for block in self.blocks))

    @torch.no_grad()
    def times(self, timesteps):
        """All timesteps of a solver, [steps] or [steps g] -> tuple of Time, for `forward` to take as `t`, the i-th at step i."""
        e, e0 = self.embed_time(timesteps.to(self.time_embedding[0].weight.device))
        return tuple(map(Time, e.split(1), e0.split(1)))

    # -- forward

    def forward(self, x, t, context, clip_fea=None, return_features=None):
        """-> velocity fp32 [b out_channels f h w]

        x: [b in_channels f h w].
        t: 0..1000, [b]; or [b f/pt], a time for each latent frame (image-to-video in Wan 2.2 5B: 0 for the picture); or [b l],
            for each token; or a Time out of `times`.
        context: [b m text_dim], clip_fea: [b 257 image_dim]; or only a Prompt out of `prompt`.
        return_features: block numbers; the result is then (v, {number: residual stream after that block, b f h w d}),
            for comparing two models depth by depth.
        """
        h = self.embed_patches(x)
        grid = h.shape[1:4]
        h = h.flatten(1, 3)  # b l d, the residual stream
        e, e0 = t if isinstance(t, Time) else self.embed_time(t)
        if e.shape[1] not in (1, grid[0], h.shape[1]):
            raise UserError(f"{e.shape[1]} times do not fit {grid[0]} latent frames of {h.shape[1] // grid[0]} tokens: "
                            "give one time, one per frame or one per token.")
        if isinstance(context, Prompt):
            contexts = context.blocks
        else:
            contexts = (self.embed_context(context, clip_fea),) * self.config.layers  # each block makes its own keys and values
        rope = rope_table(tuple(grid), self.config.dim // self.config.heads, x.device)
        dtype = self.matmul_dtype(x)
        recompute = self.checkpointing and torch.is_grad_enabled()
        features = {}
        for i, (block, seen) in enumerate(zip(self.blocks, contexts)):
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            h = run(h, e0, rope, seen, dtype)
            if return_features and i in return_features:
                features[i] = h.unflatten(1, grid)
        with no_autocast(x):
            v = self.unpatchify(self.head(h, e), grid)
        return v if return_features is None else (v, features)

    def unpatchify(self, y, grid):
        """Token outputs [b l (pt ph pw c)], channels fastest -> [b c f h w]."""
        (f, h, w), (pt, ph, pw) = grid, self.config.patch
        return rearrange(y, "b (f h w) (pt ph pw c) -> b c (f pt) (h ph) (w pw)", f=f, h=h, w=w, pt=pt, ph=ph, pw=pw)


def shared_weight(count, keys, dtype):
    """Logit offsets of a few equal keys that together weigh as much as `count` of them: exp(o_1) + ... = count, [keys].

    ln(count) on one key is the idea. But attention kernels take offsets in the type of q, and bf16 rounds ln(435) = 6.075 to
    6.0625, 1.3 % too light. So each offset is rounded down and the next key carries what is left: after three, 1e-5 or less.
    """
    offsets = torch.full((keys,), -torch.inf, dtype=dtype)
    for i in range(keys):
        if count > 0:
            offsets[i] = math.log(count)
            if offsets[i].item() > math.log(count):
                offsets[i] = torch.nextafter(offsets[i], torch.tensor(-torch.inf, dtype=dtype))
            count -= math.exp(offsets[i].item())
    return offsets


def keeps_fp32(name):
    """Is this parameter one of those that `cast_weights` leaves alone?"""
    return (name.startswith(("time_", "head.", "img_emb.proj.0", "img_emb.proj.4")) or "norm" in name
            or name.endswith(("modulation", "emb_pos")))


def autocast_is_on(x):
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)  # meta tensors know no autocast


def no_autocast(x):
    """Time and head are computed in fp32, whatever the surroundings say."""
    return torch.autocast(x.device.type, enabled=False) if autocast_is_on(x) else nullcontext()


def stream_blocks(net, device):
    """For GPUs smaller than the model, sampling only: the blocks wait in host memory and pass through two buffers on `device`
    (gpu/offload.py), everything else moves there. Merge LoRA before. Returns net; to move or save it again, load it anew."""
    blocks, net.blocks = list(net.blocks), nn.ModuleList()
    net.to(device)
    from gpu.offload import StreamedBlocks  # a floor further up

    net.blocks = StreamedBlocks(blocks, device)
    return net


# ---------------------------------------------------------------------------------------------------------------- cost

class Flops(NamedTuple):
    linear: float
    attention: float

    @property
    def total(self):
        return self.linear + self.attention


def tokens(config, latent):
    """Number of tokens of a latent of (frames, height, width)."""
    return prod(s // p for s, p in zip(latent, config.patch))


def flops(config, latent, image_tokens=257):
    """FLOPs (2 per multiply-add) of one forward, batch 1; a guided step is two. The time MLPs (one row) are left out."""
    c, L = config, tokens(config, latent)
    T, I = c.text_len, (c.image_positions or image_tokens) if c.image_dim else 0
    linear = c.layers * (12 * L * c.dim**2 + 4 * L * c.dim * c.ffn_dim + 4 * (T + I) * c.dim**2)
    linear += 2 * L * c.dim * prod(c.patch) * (c.in_channels + c.out_channels) + 2 * T * (c.text_dim * c.dim + c.dim**2)
    linear += 2 * I * ((c.image_dim or 0) ** 2 + (c.image_dim or 0) * c.dim)
    return Flops(linear, c.layers * (4 * L**2 * c.dim + 4 * L * (T + I) * c.dim))


def activation_bytes(config, latent, batch=1, dtype=torch.bfloat16, prompts=2, rows=128, image_tokens=257):
    """Peak memory that sampling a latent (frames, height, width) takes beside the weights, estimated: one forward without gradients,
    and the `Prompt` of so many prompts (guidance has two) with `rows` text rows each (128: 100 words, padding merged).

    Per token and channel the peak is in cross-attention (22 bytes: the residual stream as the block got it and as it is now, 4
    each; input and output of the projection of q, 2 each; the latter and its norm in fp32, and the norm rounded) or in the MLP (the same 8,
    its input, its hidden layer before and after the activation function). Attention itself needs no scores in memory.
    """
    c, L, s = config, tokens(config, latent), dtype.itemsize
    block = batch * L * max(22 * c.dim, (8 + s) * c.dim + 2 * s * c.ffn_dim)
    seen = prompts * c.layers * (rows + ((c.image_positions or image_tokens) if c.image_dim else 0)) * 2 * c.dim * s
    ends = batch * L * prod(c.patch) * (c.in_channels + c.out_channels) * 4
    return block + seen + ends + L * 4 * c.dim // c.heads  # the last: rotary table, complex64


# --------------------------------------------------------------------------------------------------------- checkpoints

def to_diffusers(sd):
    """State dict with diffusers' names, the same tensors."""
    return {layouts.to_diffusers(k): v for k, v in sd.items()}


def infer_config(sd, heads=None):
    """Config from the shapes of a state dict in original names; no shape shows the heads: 128 channels each by default."""
    return Config(**layouts.sizes(sd, heads))


@torch.no_grad()
def inherit(base, config, share=False):
    """A transformer for another latent space with everything it can take from `base`: all tensors but patch embedder and head
    matrix. The head matrix is zero, so it predicts exactly 0; the patch embedder is Xavier with a small random bias
    (spec ae-adapt-v 3.3 and 4). Both are fp32, whatever the base is stored in.

    share: the inherited tensors are the base's own, not copies, so both transformers need the memory of one; neither may then be
        changed in place (adapters are fine: `lora.wrap` puts them beside the weights).
    """
    with torch.device("meta"):  # no memory and no random numbers: every tensor comes from the base or is made below
        net = WanDiT(config)
    fresh = {k: torch.zeros(v.shape, device=base.head.head.weight.device) for k, v in net.state_dict().items()
             if k.startswith(("patch_embedding.", "head.head."))}
    bound = (config.out_channels * prod(config.patch)) ** -0.5
    nn.init.xavier_uniform_(fresh["patch_embedding.weight"].flatten(1))  # a view
    nn.init.uniform_(fresh["patch_embedding.bias"], -bound, bound)
    taken = {k: v if share else v.clone() for k, v in base.state_dict().items() if k not in fresh}
    load_strict(net, {**taken, **fresh}, "the base transformer")  # only looks, as there is nothing to fill
    net.load_state_dict({**taken, **fresh}, assign=True)
    net.weight_dtype = base.weight_dtype
    return net


def from_state_dict(sd, heads=None, config=None, dtype=torch.float32, device="cpu", what="the transformer state dict"):
    """State dict (tensors or Stored) in any published spelling -> WanDiT in eval mode. With `dtype` bf16 the large matrices are
    stored in it. Strict: a missing, unexpected or wrongly shaped tensor is a UserError that names it, and `what` holds it."""
    sd = layouts.original(sd)
    config = config or infer_config(sd, heads)
    with torch.device("meta"):  # no memory and no random numbers: every tensor is filled below, one at a time
        net = WanDiT(config).cast_weights(dtype)
    return load_strict(net.to_empty(device=device), sd, what).eval()


def load(path, heads=None, dtype=torch.float32, device="cpu"):
    """A weight file, an index of shards, or a folder with weights and perhaps config.json, in any published layout
    (files/layouts.py), stored in fp32, bf16, fp16 or fp8 -> WanDiT in eval mode.

    Needs the memory of the result and of one tensor; the files are never held whole. device: where the tensors go directly.
    """
    tensors, settings = layouts.open_checkpoint(path, heads)
    return from_state_dict(tensors, config=Config(**settings), dtype=dtype, device=device, what=str(path))


def read_config(path, heads=None):
    """The Config that `load` would use, without reading the weights."""
    return Config(**layouts.open_checkpoint(path, heads)[1])


def save(net, path, metadata=None, dtype=None, format="original", shard_bytes=5e9):
    """Write `net` with its config, so that `load` needs nothing else. `dtype`: store all tensors in it.

    path: FILE.safetensors, or a folder: config.json and one file, or shards of at most `shard_bytes` and their index.
    format: "diffusers" makes a folder that diffusers' WanTransformer3DModel.from_pretrained loads, "original" one named like
        the original release. One tensor at a time is converted or fetched from the GPU.
    """
    sd = {k: Stored(tuple(v.shape), dtype or v.dtype, lambda v=v: v.to(dtype or v.dtype)) for k, v in net.state_dict().items()}
    metadata = {**(metadata or {}), "wan_dit": dataclasses.asdict(net.config)}
    if Path(path).suffix != ".safetensors":
        layouts.save_folder(Path(path), sd, net.config, format, metadata, shard_bytes)
    elif format == "original":
        save_tensors(path, sd, metadata)
    else:
        raise UserError(f"{path} is a file, but diffusers reads a folder: give the name of a folder.")


# 720p for the autoencoder that has so many latent channels: Wan 2.1 81 frames, Wan 2.2 121, DC-AE-V 80
EXAMPLE_LATENTS = {16: (21, 90, 160), 48: (31, 44, 80), 32: (20, 22, 40), 128: (20, 11, 20)}


def main():
    parser = argparse.ArgumentParser(description="Parameters, tokens and FLOPs of one forward, for every preset.")
    parser.add_argument("--latent", help="frames x height x width of the latent, as in 20x22x40 (default: about 720p)")
    args = parser.parse_args()
    if args.latent and not re.fullmatch(r"\d+x\d+x\d+", args.latent):
        raise UserError(f"--latent {args.latent} is not frames x height x width: write for example --latent 20x22x40.")
    print(f"{'preset':30s} {'parameters':>15s} {'latent':>10s} {'tokens':>7s} {'TFLOP':>10s} {'attention':>9s}")
    for name, config in PRESETS.items():
        latent = {"toy-base": (8, 8, 8), "toy-dc": (8, 2, 2)}.get(name) or EXAMPLE_LATENTS[config.out_channels]
        latent = tuple(map(int, args.latent.split("x"))) if args.latent else latent
        with torch.device("meta"):
            parameters = sum(p.numel() for p in WanDiT(config).parameters())
        cost = flops(config, latent)
        print(f"{name:30s} {parameters:15,d} {'x'.join(map(str, latent)):>10s} {tokens(config, latent):7,d} "
              f"{cost.total / 1e12:10.4f} {cost.attention / max(cost.total, 1):9.0%}")


if __name__ == "__main__":
    with user_errors():
        main()
