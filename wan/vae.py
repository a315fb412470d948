"""The Wan video autoencoders, 2.1 and 2.2: the latent space that the base models live
in (Wan, arXiv 2503.20314, section 4.1).

Where DC-AE-V goes deep (32x32 pixels to a cell), these are shallow: 2.1 makes 16
channels of 8x8 pixels, 2.2 makes 48 of 16x16. Both are causal in time, the plainest of
the three designs in `chunk_causal.py`: a frame sees itself and the past. The first
frame becomes a latent frame of its own and every further one stands for four frames, so
an image is a video of one frame:

    [b, 3, 1 + 4k, H, W]  ->  [b, 16, 1 + k, H/8, W/8]

    encoder: conv | level, down | level, down (t) | level, down (t) | level | mid | head
    decoder: conv | mid | level, up (t) | level, up (t) | level, up | level | head

A level is a row of residual blocks  y = x + conv(SiLU(norm(conv(SiLU(norm(x)))))), the
mid a block, an attention within each frame and a block, the head norm, SiLU, conv.
2.2 puts a shortcut without parameters around every level (DC-AE-V has the same around
its resampling), and moves 2x2 pixels into the channels before all else. `encode` gives
the mean of the posterior, normalised per channel to about unit variance: what the
diffusion model sees, so `scale` is 1.

It is in the layers, `y, state = layer(x, state)` with None at the start of a video,
that the first frame is treated apart. So a video may be cut between any two latent
frames, and memory does not grow with length. `load` takes the original names of tensors
and diffusers'.
"""
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce, repeat

from ae import VideoAutoencoder
from chunk_causal import Conv3d, pixel_shuffle, pixel_unshuffle, run_layers, split_state
from files import checkpoint
from files.checkpoint import UserError
from kernels import attention


@dataclass(frozen=True)
class Config:
    """Size of a Wan autoencoder."""

    width: int  # channels of the encoder's first level
    decoder_width: int  # channels of the decoder's last level
    latent_channels: int
    patch: int  # pixels per side that are moved into the channels first
    shortcuts: bool  # a parameter-free shortcut around every level
    mean: tuple  # of the raw latent, per channel: the diffusion model sees (raw - mean) / std
    std: tuple
    multipliers: tuple = (1, 2, 4, 4)  # channels of each level, in units of the width
    depth: int = 2  # residual blocks per level of the encoder; the decoder has one more
    temporal: tuple = (False, True, True)  # which downsamplings halve the frame rate too

    scale = 1.0  # latents are normalised already
    lead = 1  # pixel frames that the first latent frame stands for
    latent_chunk = 1  # latent frames that go through at a time

    def __post_init__(self):
        for name in ("mean", "std", "multipliers", "temporal"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def spatial_factor(self):
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def temporal_factor(self):
        return 2 ** sum(self.temporal)

    @property
    def piece(self):
        """Frames that go through at a time, after the first."""
        return self.latent_chunk * self.temporal_factor


_WAN21 = dict(
    mean=(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715,
          0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    std=(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652,
         1.5579, 1.6382, 1.1253, 2.8251, 1.916))
_WAN22 = dict(
    mean=(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542,
          0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109,
          0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899,
          -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748,
          0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    std=(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894,
         1.0901, 0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146,
         0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709,
         0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537,
         0.5444, 0.4089, 0.7468, 0.7744))
NORMALISATION = {16: _WAN21, 48: _WAN22}  # by latent channels
PRESETS = {
    "wan2.1": Config(96, 96, 16, patch=1, shortcuts=False, **_WAN21),
    "wan2.2": Config(160, 256, 48, patch=2, shortcuts=True, **_WAN22),
}


# ------------------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    """x / ||x|| * sqrt(C) * gamma over the channels of each pixel; the length in fp32.
    `axes`: how many axes follow the channels."""

    def __init__(self, channels, axes=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes))

    def forward(self, x):
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        scale = math.sqrt(x.shape[1]) / length.clamp_min(1e-12)
        return x * scale.to(x.dtype) * self.gamma


def conv3(cin, cout):
    """3x3x3, causal: the state is the last two input frames."""
    return Conv3d(cin, cout, chunk=1, temporal="causal")


class ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))); 1x1x1 to change channels."""

    def __init__(self, cin, cout):
        super().__init__()
        self.residual = nn.ModuleList([
            RMSNorm(cin), nn.SiLU(), conv3(cin, cout),
            RMSNorm(cout), nn.SiLU(), nn.Identity(), conv3(cout, cout)])
        self.shortcut = nn.Conv3d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, state=None):
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        state1, state2 = split_state(state, 2)
        y, state1 = conv1(F.silu(norm1(x), inplace=True), state1)
        y, state2 = conv2(F.silu(norm2(y), inplace=True), state2)
        return y + self.shortcut(x), (state1, state2)


class Attention(nn.Module):
    """x + attention of one head among all positions of a frame."""

    whole_frame = True  # cannot be tiled (gpu/tiling.py)

    def __init__(self, channels):
        super().__init__()
        self.norm = RMSNorm(channels, axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x, state=None):
        b, _, _, h, _ = x.shape
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        qkv = self.to_qkv(self.norm(frames))
        q, k, v = rearrange(qkv, "n (three c) h w -> three n (h w) 1 c", three=3)
        y = self.proj(rearrange(attention(q, k, v), "n (h w) 1 c -> n c h w", h=h))
        return x + rearrange(y, "(b t) c h w -> b c t h w", b=b), None


class Nearest(nn.Module):
    """Every pixel becomes 2x2 equal ones."""

    zoom = 2  # of the sides, for gpu/tiling.py

    def forward(self, x):
        return F.interpolate(x, scale_factor=2.0, mode="nearest-exact")


class Downsample(nn.Module):
    """Half the size, frame by frame (zeros at the right and the bottom only);
    `temporal`: then half the frame rate.

    The first frame of a video passes the temporal convolution untouched; from then on
    two frames and the one before them become one. State: the last frame before that
    convolution.
    """

    def __init__(self, channels, temporal):
        super().__init__()
        pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
        self.resample, self.time_conv = nn.ModuleList([pad, conv]), None
        if temporal:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x, state=None):
        pad, conv = self.resample
        # One by one: the padded copy is of one frame.
        x = torch.stack([conv(pad(frame)) for frame in x.unbind(2)], dim=2)
        return (x, None) if self.time_conv is None else self._halve_frames(x, state)

    def _halve_frames(self, x, last):
        start = last is None
        x = x if start else torch.cat([last, x], dim=2)  # the frame before the first pair
        y = self.time_conv(x) if x.shape[2] > 1 else x[:, :, :0]
        y = torch.cat([x[:, :, :1], y], dim=2) if start else y
        return y, x[:, :, -1:].clone()


class Upsample(nn.Module):
    """`temporal`: twice the frame rate; then twice the size, frame by frame.

    The first latent frame of a video passes the temporal convolution untouched, and
    later ones do not see it: they see zeros instead. State: the last two frames before
    that convolution.
    """

    def __init__(self, cin, cout, temporal):
        super().__init__()
        self.resample = nn.ModuleList([Nearest(), nn.Conv2d(cin, cout, 3, padding=1)])
        self.time_conv = nn.Conv3d(cin, 2 * cin, (3, 1, 1)) if temporal else None

    def forward(self, x, state=None):
        if self.time_conv is not None:
            x, state = self._double_frames(x, state)
        enlarge, conv = self.resample
        return torch.stack([conv(enlarge(frame)) for frame in x.unbind(2)], dim=2), state

    def _double_frames(self, x, past):
        first = x[:, :, :0]
        if past is None:
            first, x = x[:, :, :1], x[:, :, 1:]
            past = x.new_zeros(x.shape[0], x.shape[1], 2, *x.shape[3:])
        y, x = x[:, :, :0], torch.cat([past, x], dim=2)
        if x.shape[2] > 2:
            y = rearrange(self.time_conv(x), "b (n c) t h w -> b c (t n) h w", n=2)
        return torch.cat([first, y], dim=2), x[:, :, -2:].clone()


class DownGroup(nn.Module):
    """Wan 2.2: a level of the encoder, plus its input rearranged into channels (t
    frames, r x r pixels) and averaged down to `cout`.

    A first call starts with a single frame, so its number of frames is odd: a frame of
    zeros completes the first pair.
    """

    def __init__(self, layers, cout, r, t):
        super().__init__()
        self.downsamples, self.cout, self.r, self.t = nn.ModuleList(layers), cout, r, t

    def forward(self, x, state=None):
        y, state = run_layers(self.downsamples, x, state)
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.t, 0))
        x = pixel_unshuffle(x, self.r, self.t)
        return y + reduce(x, "b (o g) t h w -> b o t h w", "mean", o=self.cout), state


class UpGroup(nn.Module):
    """Wan 2.2: a level of the decoder, plus its input with repeated channels rearranged
    into t frames and r x r pixels.

    The first latent frame of a video makes a single frame: the other t - 1 are dropped.
    """

    def __init__(self, layers, cout, r, t):
        super().__init__()
        self.upsamples, self.cout, self.r, self.t = nn.ModuleList(layers), cout, r, t

    def forward(self, x, state=None):
        y, after = run_layers(self.upsamples, x, state)
        if self.r > 1:  # the last level has no shortcut
            n = self.cout * self.t * self.r**2 // x.shape[1]
            repeated = repeat(x, "b c t h w -> b (c n) t h w", n=n)
            x = pixel_shuffle(repeated, self.r, self.t)
            y = y + (x[:, :, self.t - 1 :] if state is None else x)
        return y, after


class Head(nn.ModuleList):
    """Norm, SiLU, convolution."""

    def __init__(self, cin, cout):
        super().__init__([RMSNorm(cin), nn.SiLU(), conv3(cin, cout)])

    def forward(self, x, state=None):
        norm, _, conv = self
        return conv(F.silu(norm(x), inplace=True), state)


class Patchify(nn.Module):
    """2x2 pixels become channels, the column slower than the row: (c 2 + dx) 2 + dy."""

    def __init__(self, patch):
        super().__init__()
        self.patch, self.zoom = patch, 1 / patch

    def forward(self, x, state=None):
        p = self.patch
        return rearrange(x, "b c t (h p) (w q) -> b (c q p) t h w", p=p, q=p), None


class Unpatchify(nn.Module):
    """The inverse of Patchify."""

    def __init__(self, patch):
        super().__init__()
        self.patch = self.zoom = patch

    def forward(self, x, state=None):
        p = self.patch
        return rearrange(x, "b (c q p) t h w -> b c t (h p) (w q)", p=p, q=p), None


def middle(channels):
    first, last = ResBlock(channels, channels), ResBlock(channels, channels)
    return nn.ModuleList([first, Attention(channels), last])


def res_blocks(cin, cout, n):
    return [ResBlock(cin if i == 0 else cout, cout) for i in range(n)]


class Encoder(nn.Module):
    """[b, 3, 1 + 4k, H, W] -> [b, 2 Z, 1 + k, H/f, W/f], not yet the moments."""

    def __init__(self, c):
        super().__init__()
        widths = [c.width * m for m in (c.multipliers[0], *c.multipliers)]
        self.patchify = Patchify(c.patch)
        self.conv1 = conv3(3 * c.patch**2, widths[0])
        self.downsamples = nn.ModuleList()
        for i, (cin, cout) in enumerate(zip(widths, widths[1:])):
            layers, r, t = res_blocks(cin, cout, c.depth), 1, 1
            if i < len(c.temporal):
                layers.append(Downsample(cout, c.temporal[i]))
                r, t = 2, 2 if c.temporal[i] else 1
            self.downsamples.extend([DownGroup(layers, cout, r, t)] if c.shortcuts else layers)
        self.middle = middle(widths[-1])
        self.head = Head(widths[-1], 2 * c.latent_channels)

    @property
    def layers(self):
        """All layers in order."""
        return self.patchify, self.conv1, *self.downsamples, *self.middle, self.head

    def forward(self, x, state=None):
        return run_layers(self.layers, x, state)


class Decoder(nn.Module):
    """[b, Z, 1 + k, h, w] -> [b, 3, 1 + 4k, f h, f w], not clamped."""

    def __init__(self, c):
        super().__init__()
        widths = [c.decoder_width * m for m in (c.multipliers[-1], *c.multipliers[::-1])]
        self.conv1 = conv3(c.latent_channels, widths[0])
        self.middle = middle(widths[0])
        self.upsamples = nn.ModuleList()
        for i, (cin, cout) in enumerate(zip(widths, widths[1:])):
            halved = i > 0 and not c.shortcuts  # 2.1: upsampling halves the channels
            layers, r, t = res_blocks(cin // 2 if halved else cin, cout, c.depth + 1), 1, 1
            if i < len(c.temporal):
                temporal = c.temporal[::-1][i]
                layers.append(Upsample(cout, cout if c.shortcuts else cout // 2, temporal))
                r, t = 2, 2 if temporal else 1
            self.upsamples.extend([UpGroup(layers, cout, r, t)] if c.shortcuts else layers)
        self.head = Head(widths[-1], 3 * c.patch**2)
        self.unpatchify = Unpatchify(c.patch)

    @property
    def layers(self):
        """All layers in order."""
        return self.conv1, *self.middle, *self.upsamples, self.head, self.unpatchify

    def forward(self, z, state=None):
        return run_layers(self.layers, z, state)


class WanVAE(VideoAutoencoder):
    """Pixels [b, 3, T, H, W] <-> normalised latents, t = 1 + ceil((T - 1) / 4)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        z = config.latent_channels
        self.conv1 = nn.Conv3d(2 * z, 2 * z, 1)  # after the encoder
        self.conv2 = nn.Conv3d(z, z, 1)  # before the decoder

    def to_latent(self, features):
        mean = self.conv1(features).chunk(2, dim=1)[0]
        return (mean - self._constant("mean", mean)) / self._constant("std", mean)

    def from_latent(self, z):
        raw = z * self._constant("std", z) + self._constant("mean", z)
        return self.conv2(raw.to(self.conv2.weight.dtype))

    def _constant(self, name, like):
        values = getattr(self.config, name)
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)


# ------------------------------------------------------------------------------ weights

LEAVES = [  # (original, diffusers), inside a residual block
    ("residual.0", "norm1"), ("residual.2", "conv1"), ("residual.3", "norm2"),
    ("residual.6", "conv2"), ("shortcut", "conv_shortcut")]
ENDS = [("conv1", "quant_conv"), ("conv2", "post_quant_conv")]  # at the start of a name
SIDES = [  # in the encoder and in the decoder
    ("conv1", "conv_in"), ("middle.0", "mid_block.resnets.0"),
    ("middle.1", "mid_block.attentions.0"), ("middle.2", "mid_block.resnets.1"),
    ("head.0", "norm_out"), ("head.2", "conv_out")]
for _side in ("encoder", "decoder"):
    ENDS += [(f"{_side}.{ours}", f"{_side}.{theirs}") for ours, theirs in SIDES]


def diffusers_name(name, config):
    """Original name of a tensor -> diffusers' name."""
    for ours, theirs in LEAVES:
        name = re.sub(rf"\.{re.escape(ours)}\.", f".{theirs}.", name)
    for ours, theirs in ENDS:
        if name.startswith(ours + "."):
            return theirs + name[len(ours):]
    level = re.fullmatch(r"(encoder\.down|decoder\.up)samples\.(\d+)\.(.*)", name)
    side, i, rest = level[1], int(level[2]), level[3]
    n = config.depth + (side == "decoder.up")  # residual blocks in a level
    if config.shortcuts:
        j, rest = re.fullmatch(r"\w+\.(\d+)\.(.*)", rest).groups()
        block = f"resnets.{j}" if int(j) < n else f"{side[8:]}sampler"
    elif side == "encoder.down":  # 2.1: diffusers keeps the flat row in the encoder only
        return f"{side}_blocks.{i}.{rest}"
    else:
        i, j = divmod(i, n + 1)
        block = f"resnets.{j}" if j < n else "upsamplers.0"
    return f"{side}_blocks.{i}.{block}.{rest}"


#: field of a Config -> what a diffusers folder calls it in its config.json
STORED = dict(mean="latents_mean", std="latents_std", multipliers="dim_mult",
              depth="num_res_blocks", temporal="temperal_downsample")


def infer_config(tensors, stored=None):
    """Config from the shapes of a state dict in either spelling. What is in `STORED` comes
    from `stored`, a folder's config.json, or else is as published."""
    width, cin = _shape(tensors, "encoder.conv1.weight", "encoder.conv_in.weight")[:2]
    decoder_width = _shape(tensors, "decoder.head.2.weight", "decoder.conv_out.weight")[1]
    z = _shape(tensors, "conv2.weight", "post_quant_conv.weight")[0]
    told = dict(NORMALISATION.get(z, {}))
    for field, theirs in STORED.items():
        if theirs in (stored or {}):
            told[field] = stored[theirs]
    if not {"mean", "std"} <= told.keys():
        known = ", ".join(map(str, NORMALISATION))
        raise UserError(f"the mean and std of {z} latent channels are not known here (known: "
                        f"{known}): load a diffusers folder whose config.json has them.")
    shortcut = re.compile(r"downsamples\.\d+\.downsamples|downsampler")
    return Config(width, decoder_width, z, patch=math.isqrt(cin // 3),
                  shortcuts=any(map(shortcut.search, tensors)), **told)


def _shape(tensors, *names):
    found = next((tensors[name].shape for name in names if name in tensors), ())
    if len(found) != 5:
        raise UserError(f"this holds no Wan autoencoder (no {names[0]}): give Wan2.1_VAE.pth, "
                        "Wan2.2_VAE.pth or a diffusers vae folder.")
    return found


def from_state_dict(sd):
    """State dict in either spelling, or a container of one -> WanVAE in eval mode, fp32,
    without gradients. Strict: a missing, unexpected or wrongly shaped tensor is a
    UserError that names it. The config follows from the shapes."""
    tensors = checkpoint.unwrap(sd)
    return _build(tensors, infer_config(tensors), "the autoencoder state dict")


def load(path):
    """`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`, a .safetensors in either spelling, or a
    diffusers `vae/` folder -> WanVAE as `from_state_dict`.

    Tensors are read one at a time, so the weights are in memory once. A folder's
    config.json gives the mean and std, and its depth.
    """
    tensors, _ = checkpoint.open_tensors(path)
    file = Path(path) / "config.json"
    stored = checkpoint.read_json(file) if file.is_file() else {}
    return _build(tensors, infer_config(tensors, stored), str(path))


def _build(tensors, config, what):
    with torch.device("meta"):  # no memory and no random numbers: every tensor is filled below
        net = WanVAE(config)
    ours = {diffusers_name(name, config): name for name in net.state_dict()}
    tensors = {ours.get(name, name): tensor for name, tensor in tensors.items()}
    net = checkpoint.load_strict(net, tensors, what, "cpu")
    return net.eval().requires_grad_(False)
