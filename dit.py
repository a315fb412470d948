"""The Wan video diffusion transformer, for any latent space.

A transformer that looks at a noisy video latent and predicts the flow velocity v =
noise - x0 (Wan, arXiv 2503.20314). It is the backbone that DC-VideoGen (arXiv
2509.25182, section on AE-Adapt-V) moves into a deep latent space, and the move touches
only its two ends: the patch embedder (first layer) and the head (last layer) meet the
latent, everything between sees tokens of width D and keeps its weights.

    x [B, C, F, H, W]  --patch (pt, ph, pw)-->  L = F/pt * H/ph * W/pw tokens of width D
    block:  x += gate1 * SelfAttention(LN(x) * (1 + scale1) + shift1)   rotary positions
            x += CrossAttention(LN3(x), text [, image])                 prompt, picture
            x += gate2 * MLP(LN(x) * (1 + scale2) + shift2)
            (shift, scale, gate: from the diffusion time, and a learned table per block)
    head:   Linear(LN(x) * (1 + scale) + shift)  --unpatchify-->  v [B, C, F, H, W]

Why a deep latent space is fast: f32t4 with patch 1 has 4.3x fewer tokens than f8t4 with
patch 2 (17,600 instead of 75,600 at 720p). Linear layers cost 12 L D^2 + 4 L D f and
attention 4 L^2 D per block, so one step is 9.5x (14B) to 12x (1.3B) cheaper
(wan/memory.py counts).

Precision is a policy, stated once: residual stream, norms, modulation, time embedding
and head are fp32; the matrix products of patch embedder, text and image MLPs and blocks
run in `matmul_dtype()`: bf16 under autocast (training, fp32 masters) or after
`cast_weights(torch.bfloat16)` (sampling), else fp32. Parameter names are those of the
original checkpoints; `load` reads every published layout.
"""
import dataclasses
from contextlib import nullcontext
from functools import lru_cache, partial
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from files import layouts
from files.checkpoint import UserError, check_fit, load_strict
from kernels import (attention, gate_residual, layer_norm_modulate, linear_gelu, residual_norm,
                     rms_norm, rms_norm_rope)


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


_1B = dict(dim=1536, ffn_dim=8960, heads=12, layers=30)
_5B = dict(dim=3072, ffn_dim=14336, heads=24, layers=30)
_14B = dict(dim=5120, ffn_dim=13824, heads=40, layers=40)
_TOY = dict(dim=256, ffn_dim=1024, heads=4, layers=4, text_dim=32, text_len=8)
_WAN = dict(in_channels=16, out_channels=16)
_WAN_I2V = dict(in_channels=36, out_channels=16)
_DEEP = dict(in_channels=32, out_channels=32, patch=(1, 1, 1))
_DEEP_I2V = dict(in_channels=68, out_channels=32, patch=(1, 1, 1))

PRESETS = {
    "wan2.1-t2v-1.3b": Config(**_1B, **_WAN),
    "wan2.1-t2v-14b": Config(**_14B, **_WAN),
    "wan2.1-i2v-14b": Config(**_14B, **_WAN_I2V, image_dim=1280),
    "wan2.2-t2v-a14b": Config(**_14B, **_WAN),  # each of its two experts
    "wan2.2-i2v-a14b": Config(**_14B, **_WAN_I2V),
    "wan2.2-ti2v-5b": Config(**_5B, in_channels=48, out_channels=48),
    "dc-wan2.1-t2v-1.3b": Config(**_1B, **_DEEP),
    "dc-wan2.1-t2v-14b": Config(**_14B, **_DEEP),
    "dc-wan2.1-i2v-14b": Config(**_14B, **_DEEP_I2V, image_dim=1280),
    # One toy does text- and image-to-video: without an image, mask and condition are zero.
    "toy-base": Config(**_TOY, **_WAN_I2V, patch=(1, 1, 1)),
    "toy-dc": Config(**_TOY, **_DEEP_I2V),
}


def tokens(config, latent):
    """Number of tokens of a latent of (frames, height, width)."""
    return prod(s // p for s, p in zip(latent, config.patch))


# ------------------------------------------------------------------- positions and time

@lru_cache(maxsize=16)
def rope_table(grid, head_dim, device):
    """Rotations e^{i angle} of every token of a (f, h, w) grid: complex64 [L,
    head_dim/2], made in float64 once per grid.

    The channel pairs of a head are divided among the axes: head_dim//6 each for height
    and width, the rest (first) for time. Pair j of an axis with N pairs turns by
    position * 10000^(-j/N).
    """
    side = head_dim // 6
    pairs = (head_dim // 2 - 2 * side, side, side)
    with torch.inference_mode(False):  # the cached table may be used later in training
        angles = []
        for axis, (length, n) in enumerate(zip(grid, pairs)):
            j = torch.arange(n, dtype=torch.float64, device=device)
            position = torch.arange(length, dtype=torch.float64, device=device)
            shape = [1, 1, 1, n]
            shape[axis] = length
            angle = position[:, None] * 10000.0 ** (-j / n)
            angles.append(angle.view(shape).expand(*grid, n))
        angles = torch.cat(angles, -1).flatten(0, 2)  # l c/2
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def sinusoid(t, dim):
    """[cos(t w), sin(t w)] with w_i = 10000^(-i / (dim/2)): float64 inside, since t
    reaches 1000; fp32 out."""
    w = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angle = t.double()[..., None] * w
    return torch.cat([angle.cos(), angle.sin()], -1).float()


# -------------------------------------------------------------------------------- layers

class PatchEmbedder(nn.Conv3d):
    """Non-overlapping patches -> tokens: a convolution whose stride is its kernel, so
    it is one matrix product."""

    def __init__(self, in_channels, dim, patch):
        super().__init__(in_channels, dim, patch, stride=patch)

    def forward(self, x):  # b c f h w -> b f/pt h/ph w/pw d
        pt, ph, pw = self.kernel_size
        pattern = "b c (f pt) (h ph) (w pw) -> b f h w (c pt ph pw)"
        # contiguous: else which product is chosen, and so the last bit, would depend on
        # whether the weight is being trained
        patches = rearrange(x, pattern, pt=pt, ph=ph, pw=pw).contiguous()
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class Attention(nn.Module):
    """What both kinds have: four projections, and norms of queries and keys."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.eps = c.heads, c.eps
        self.q, self.k, self.v, self.o = (nn.Linear(c.dim, c.dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(c.dim, c.eps), nn.RMSNorm(c.dim, c.eps)

    def split(self, x):  # b l d -> b l n c
        return x.unflatten(2, (self.heads, -1))


class SelfAttention(Attention):
    def forward(self, x, rope):  # b l d
        q = rms_norm_rope(self.q(x), self.norm_q.weight, rope, self.heads, self.eps)
        k = rms_norm_rope(self.k(x), self.norm_k.weight, rope, self.heads, self.eps)
        return self.o(attention(q, k, self.split(self.v(x))).flatten(2))


class Context(NamedTuple):
    """What cross-attention looks at: the prompt and perhaps a picture, as tokens of
    width D."""
    text: torch.Tensor  # b m d
    image: torch.Tensor | None = None  # b m' d


class KeysValues(NamedTuple):
    """The context as one block sees it: the same at every step of a video, since it
    depends on neither x nor t."""
    text: tuple  # keys, values: b m n c
    image: tuple | None = None


class Prompt(NamedTuple):
    """What `WanDiT.prompt` makes and `forward` takes in place of the prompt states."""
    blocks: tuple  # of KeysValues


class Time(NamedTuple):
    """What `WanDiT.times` makes of one timestep and `forward` takes in its place; g is
    1, the latent frames or the tokens."""
    e: torch.Tensor  # 1 g d, for the head
    e0: torch.Tensor  # 1 g 6 d, for the blocks


class CrossAttention(Attention):
    """Tokens look at the prompt; with an image branch the same queries look at the
    picture in a second, separate softmax and the two results are added before the
    output projection. No positions, no mask."""

    def __init__(self, c):
        super().__init__(c)
        if c.image_dim:
            self.k_img, self.v_img = nn.Linear(c.dim, c.dim), nn.Linear(c.dim, c.dim)
            self.norm_k_img = nn.RMSNorm(c.dim, c.eps)

    def forward(self, x, context):  # b l d, Context or KeysValues
        kv = context if isinstance(context, KeysValues) else self.keys_values(context)
        q = self.split(rms_norm(self.q(x), self.norm_q.weight, self.eps))
        y = attention(q, *kv.text)
        if kv.image is not None:
            y = y + attention(q, *kv.image)
        return self.o(y.flatten(2))

    def keys_values(self, context):  # Context -> KeysValues
        k = rms_norm(self.k(context.text), self.norm_k.weight, self.eps)
        text = self.split(k), self.split(self.v(context.text))
        if context.image is None:
            return KeysValues(text)
        k = rms_norm(self.k_img(context.image), self.norm_k_img.weight, self.eps)
        return KeysValues(text, (self.split(k), self.split(self.v_img(context.image))))


def modulation(n, dim):
    """A learned table of n vectors [1 n dim], small random numbers. (On the meta device
    even these would make torch import its compiler, 2 s.)"""
    table = torch.empty(1, n, dim)
    return nn.Parameter(table if table.is_meta else table.normal_(std=dim**-0.5))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.eps = c.eps
        self.self_attn = SelfAttention(c)
        self.norm3 = nn.LayerNorm(c.dim, eps=c.eps)  # before cross-attention; 1 and 2 are bare
        self.cross_attn = CrossAttention(c)
        self.ffn = nn.Sequential(nn.Linear(c.dim, c.ffn_dim), nn.GELU("tanh"),
                                 nn.Linear(c.ffn_dim, c.dim))
        self.modulation = modulation(6, c.dim)

    def forward(self, x, e0, rope, context, dtype):
        """x fp32 [b l d]; e0 fp32 [b g 6 d]; context (Context or KeysValues) in
        `dtype`, the type of the matrix products."""
        # each b g d
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + e0).unbind(2)
        norm3 = self.norm3.weight, self.norm3.bias, self.eps, dtype
        norm2 = scale2, shift2, self.eps, dtype
        a = layer_norm_modulate(x, scale1, shift1, self.eps, dtype)
        # results are passed on without a name, which would keep them in memory
        x, a = residual_norm(x, self.self_attn(a, rope), gate1, *norm3, affine=True)
        x, a = residual_norm(x, self.cross_attn(a, context), None, *norm2)
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
    """CLIP tokens of the condition image -> width D."""

    def __init__(self, c):
        super().__init__()
        width = c.image_dim
        self.proj = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(),
                                  nn.Linear(width, c.dim), nn.LayerNorm(c.dim))

    def forward(self, clip_fea, dtype):  # b m image_dim -> b m d
        norm_in, *mlp, norm_out = self.proj
        x = norm_in(clip_fea.float()).to(dtype)
        for layer in mlp:
            x = layer(x)
        return norm_out(x.float()).to(dtype)


# --------------------------------------------------------------------------- transformer

class WanDiT(nn.Module):
    """net(x, t, context, clip_fea=None) -> velocity.

    Sampling calls the network a hundred times for one video. What does not change
    between the calls is computed once, exactly:

        prompt = net.prompt(context)      keys and values of all cross-attention
        times = net.times(timesteps)      what they turn into, for all steps at once
        v = net(x, times[i], prompt)      instead of net(x, t, context)

    Set `net.checkpointing = True` to recompute blocks in the backward pass: memory of
    one block instead of all, for a third more compute.

    What the stages of an adaptation ask of a transformer, of this one and of any other
    (families/): config, ends, lora_targets, embedder, set_embedder, head_layer, blocks,
    checkpointing, embed_patches, and a call with `return_features`.
    """

    # the modules that touch the latent: beginnings of the names of what is trained whole
    ends = ("patch_embedding", "head")
    # 6 linears per block and the 3 of the time embedding. Cross-attention, text and image
    # embedders, norms and modulation stay: what they learned about prompts is inherited.
    lora_targets = (r"blocks\.\d+\.self_attn\.[qkvo]", r"blocks\.\d+\.ffn\.[02]",
                    r"time_embedding\.[02]", r"time_projection\.1")
    lora_prefix = "transformer."  # of the names in the files that diffusers' pipeline loads
    latent_layers = ("patch_embedding", "head.head")
    is_deep = False  # of Wan the shapes tell whether an adapter of these fits

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.dim % c.heads or (c.dim // c.heads) % 2:
            raise UserError(f"width {c.dim} cannot be split into {c.heads} heads of even width: "
                            "choose another number.")
        self.patch_embedding = PatchEmbedder(c.in_channels, c.dim, c.patch)
        self.text_embedding = nn.Sequential(nn.Linear(c.text_dim, c.dim), nn.GELU("tanh"),
                                            nn.Linear(c.dim, c.dim))
        self.time_embedding = nn.Sequential(nn.Linear(c.freq_dim, c.dim), nn.SiLU(),
                                            nn.Linear(c.dim, c.dim))
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
        """As the original trains from scratch. The zero head makes the first prediction
        exactly zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, PatchEmbedder)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view
                nn.init.zeros_(module.bias)
        for linear in (*self.text_embedding[::2], *self.time_embedding[::2]):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    # -- the two ends

    @property
    def embedder(self):
        """The first layer: its weight [d, c pt ph pw], the latent's channels first, and
        its bias, or None."""
        return self.patch_embedding

    @torch.no_grad()
    def set_embedder(self, weight, bias):
        """Give the first layer a weight [d, c pt ph pw] and a bias [d], in place."""
        self.patch_embedding.weight.copy_(weight.view_as(self.patch_embedding.weight))
        self.patch_embedding.bias.copy_(bias)

    @property
    def head_layer(self):
        """The last layer, a linear one: what enters it are a token's features."""
        return self.head.head

    # -- precision

    def cast_weights(self, dtype):
        """Store the large matrices in `dtype` and compute with it; norms, modulation,
        time and head stay fp32."""
        for name, p in self.named_parameters():
            p.data = p.data.to(torch.float32 if keeps_fp32(name) else dtype)
        self.weight_dtype = dtype
        return self

    def matmul_dtype(self, x):
        """The type in which patches, prompt and blocks are multiplied: autocast's where
        it is on, else the weights'."""
        if autocast_is_on(x):
            return torch.get_autocast_dtype(x.device.type)
        return self.weight_dtype

    # -- what the blocks receive

    def embed_patches(self, x):  # b c f h w -> b f/pt h/ph w/pw d
        check_latent(x, self.config)
        return self.patch_embedding(x).float()

    def embed_time(self, t):
        """t [b] (or [b g], see `forward`) -> Time: e fp32 [b g d] for the head, e0 fp32
        [b g 6 d] for the blocks."""
        if self.time_embedding[0].weight.dtype != torch.float32:
            raise ValueError("the time embedding must stay fp32: use net.cast_weights(dtype) "
                             "instead of net.to(dtype).")
        t = t if t.ndim == 2 else t.reshape(-1, 1)
        with no_autocast(t):
            e = self.time_embedding(sinusoid(t, self.config.freq_dim))
            return Time(e, self.time_projection(e).unflatten(-1, (6, -1)))

    def embed_context(self, context, clip_fea=None):
        """Prompt states [b m text_dim], m <= text_len, and CLIP features -> Context.

        Rows past the prompt, up to text_len, are zeros BEFORE the text MLP and are
        attended, there is no mask: the model was trained with them.
        """
        c = self.config
        b, m, width = context.shape if context.ndim == 3 else (0, 0, None)
        if width != c.text_dim or m > c.text_len:
            raise UserError(f"the prompt states have shape {list(context.shape)}, but this "
                            f"transformer takes [batch, at most {c.text_len}, {c.text_dim}]: use "
                            "the text encoder of this model.")
        context = F.pad(context, (0, 0, 0, c.text_len - m)).to(self.matmul_dtype(context))
        return Context(self.text_embedding(context), self.embed_image(clip_fea))

    def embed_image(self, clip_fea):
        if self.config.image_dim is None:
            if clip_fea is not None:
                raise UserError("this transformer has no image branch: leave clip_fea away.")
            return None
        if clip_fea is None:
            raise UserError("this transformer has an image branch: give clip_fea, the CLIP "
                            "features of the image.")
        return self.img_emb(clip_fea, self.matmul_dtype(clip_fea))

    # -- what is the same at every step of a video

    @torch.no_grad()
    def prompt(self, context, clip_fea=None):
        """The cross-attention's keys and values for a prompt (and picture), for
        `forward` to take as `context` -> Prompt.

        Saves 4 n D^2 FLOPs per block and step, n = 512 tokens of the prompt, 257 more with a
        picture. A 14B prompt in bf16, without picture: 420 MB.
        """
        context = self.embed_context(context, clip_fea)
        return Prompt(tuple(block.cross_attn.keys_values(context) for block in self.blocks))

    @torch.no_grad()
    def times(self, timesteps):
        """All timesteps of a solver, [steps] or [steps g] -> tuple of Time, for
        `forward` to take as `t`, the i-th at step i."""
        e, e0 = self.embed_time(timesteps.to(self.time_embedding[0].weight.device))
        return tuple(map(Time, e.split(1), e0.split(1)))

    # -- forward

    def forward(self, x, t, context, clip_fea=None, return_features=None):
        """-> velocity fp32 [b out_channels f h w]

        x: [b in_channels f h w].
        t: 0..1000, [b]; or [b f/pt], a time for each latent frame (image-to-video in
            Wan 2.2 5B: 0 for the picture); or [b l], for each token; or a Time out of
            `times`.
        context: [b m text_dim], clip_fea: [b 257 image_dim]; or only a Prompt.
        return_features: block numbers; the result is then (v, {number: residual stream
            after that block, b f h w d}), for comparing two models depth by depth.
        """
        h = self.embed_patches(x)
        grid = h.shape[1:4]
        h = h.flatten(1, 3)  # b l d, the residual stream
        e, e0 = t if isinstance(t, Time) else self.embed_time(t)
        if e.shape[1] not in (1, grid[0], h.shape[1]):
            raise UserError(f"{e.shape[1]} times do not fit {grid[0]} latent frames of "
                            f"{h.shape[1] // grid[0]} tokens: give one time, one per frame or one "
                            "per token.")
        if isinstance(context, Prompt):
            contexts = context.blocks
        else:  # each block makes its own keys and values
            contexts = (self.embed_context(context, clip_fea),) * self.config.layers
        rope = rope_table(tuple(grid), self.config.dim // self.config.heads, x.device)
        dtype = self.matmul_dtype(x)
        recompute = self.checkpointing and torch.is_grad_enabled()
        features = {}
        for i, (block, context) in enumerate(zip(self.blocks, contexts)):
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            h = run(h, e0, rope, context, dtype)
            if return_features and i in return_features:
                features[i] = h.unflatten(1, grid)
        with no_autocast(x):
            v = self.unpatchify(self.head(h, e), grid)
        return v if return_features is None else (v, features)

    def unpatchify(self, y, grid):
        """Token outputs [b l (pt ph pw c)], channels fastest -> [b c f h w]."""
        (f, h, w), (pt, ph, pw) = grid, self.config.patch
        pattern = "b (f h w) (pt ph pw c) -> b c (f pt) (h ph) (w pw)"
        return rearrange(y, pattern, f=f, h=h, w=w, pt=pt, ph=ph, pw=pw)


def check_latent(x, config):
    """UserError where a latent does not fit the transformer's channels or patches."""
    if x.ndim != 5 or x.shape[1] != config.in_channels:
        raise UserError(f"the latent has shape {list(x.shape)}, but this transformer takes "
                        f"[batch, {config.in_channels}, frames, height, width]: use this model's "
                        "autoencoder (and condition channels).")
    if any(s % p for s, p in zip(x.shape[2:], config.patch)):
        latent, patch = ("x".join(map(str, shape)) for shape in (x.shape[2:], config.patch))
        raise UserError(f"a latent of {latent} (frames, height, width) cannot be cut into "
                        f"patches of {patch}: choose another --size or --frames.")


def keeps_fp32(name):
    """Is this parameter one of those that `cast_weights` leaves alone?"""
    starts = ("time_", "head.", "img_emb.proj.0", "img_emb.proj.4")
    return name.startswith(starts) or "norm" in name or name.endswith("modulation")


def autocast_is_on(x):  # meta tensors know no autocast
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def no_autocast(x):
    """Time and head are computed in fp32, whatever the surroundings say."""
    on = autocast_is_on(x)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


# ------------------------------------------------------------- what is inherited; files

@torch.no_grad()
def fresh_embedder(config, seed=None):
    """What a patch embedder starts from: Xavier, with a small random bias
    -> (weight [d, c * prod(patch)], bias [d]), fp32. With a seed the same everywhere."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    weight = torch.empty(config.dim, config.in_channels * prod(config.patch))
    bias = torch.empty(config.dim)
    bound = (config.out_channels * prod(config.patch)) ** -0.5
    nn.init.xavier_uniform_(weight, generator=generator)
    nn.init.uniform_(bias, -bound, bound, generator=generator)
    return weight, bias


def deep_config(config, autoencoder):
    """Config of a base, and of a deep autoencoder -> that of the base's transformer in its
    latent space: only the two ends differ. An image condition is a mask and a latent."""
    z, condition = autoencoder.latent_channels, 0
    if config.in_channels != config.out_channels:
        condition = autoencoder.temporal_factor + z
    return dataclasses.replace(config, in_channels=z + condition, out_channels=z, patch=(1, 1, 1))


@torch.no_grad()
def inherit(base, config, share=False):
    """A transformer for another latent space with everything it can take from `base`:
    all tensors but patch embedder and head matrix (paper: AE-Adapt-V). The head matrix
    is zero, so it predicts exactly 0; the patch embedder is a fresh one. Both are fp32,
    whatever the base is stored in.

    share: the inherited tensors but those of the ends are the base's own, not copies, so
        both transformers need the memory of one; these may then not be changed in place
        (adapters are fine: `lora.wrap` puts them beside the weights).
    """
    with torch.device("meta"):  # every tensor comes from the base or is made below
        net = WanDiT(config)
    own, device = net.state_dict(), base.head.head.weight.device
    weight, bias = fresh_embedder(config)
    fresh = {"patch_embedding.weight": weight.view_as(own["patch_embedding.weight"]),
             "patch_embedding.bias": bias,
             "head.head.weight": torch.zeros(own["head.head.weight"].shape),
             "head.head.bias": torch.zeros(own["head.head.bias"].shape)}
    taken = {k: v if share and not k.startswith(base.ends) else v.clone()
             for k, v in base.state_dict().items()}
    tensors = taken | {k: v.to(device) for k, v in fresh.items()}
    check_fit(own, tensors, "the base transformer")
    net.load_state_dict(tensors, assign=True)
    net.weight_dtype = base.weight_dtype
    return net


def from_state_dict(sd, heads=None, config=None, dtype=torch.float32, device="cpu",
                    what="the transformer state dict"):
    """State dict (tensors or Stored) in any published spelling -> WanDiT in eval mode,
    sized by `config` or by the shapes (which do not show the heads: 128 channels each).
    With `dtype` bf16 the large matrices are stored in it. Strict: a missing, unexpected
    or wrongly shaped tensor is a UserError that names it, and `what` holds it."""
    sd = layouts.original(sd)
    config = config or Config(**layouts.sizes(sd, heads))
    with torch.device("meta"):  # every tensor is filled below, one at a time
        net = WanDiT(config).cast_weights(dtype)
    return load_strict(net, sd, what, device).eval()


def load(path, heads=None, dtype=torch.float32, device="cpu"):
    """A weight file, an index of shards, or a folder with weights and perhaps
    config.json, in any published layout (files/layouts.py), stored in fp32, bf16, fp16
    or fp8 -> WanDiT in eval mode.

    Needs the memory of the result and of one tensor; the files are never held whole.
    device: where the tensors go directly.
    """
    tensors, settings = layouts.open_checkpoint(path, heads)
    return from_state_dict(tensors, None, Config(**settings), dtype, device, str(path))


def save(net, path, metadata=None, dtype=None, format="original", shard_bytes=5e9):
    """Write `net` with its config, so that `load` needs nothing else: a file, or a
    folder as the original release or diffusers has it (`layouts.save`)."""
    metadata = {**(metadata or {}), "wan_dit": dataclasses.asdict(net.config)}
    layouts.save(path, net.state_dict(), net.config, metadata, dtype, format, shard_bytes)
