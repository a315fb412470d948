"""DC-AE-V: the deep compression video autoencoder (paper, section on DC-AE-V; spec dc-ae-v 2 to 5).

A deterministic, purely convolutional autoencoder: no attention, no KL term, no quantisation. A video [b, 3, T, H, W] in [-1, 1]
becomes a latent [b, Z, T/4, H/32, W/32] (H/64 for f64). `fXtYcZ` names spatial factor, temporal factor, latent channels.

    encoder:  conv + unshuffle(2) | stage | down(2) | stage | ... | down(t=4) | stage | conv
    decoder:  conv | stage | up(t=4) | stage | ... | up(2) | stage | norm, SiLU, conv + shuffle(2)

A stage is a row of residual blocks  y = x + RMSNorm(conv(SiLU(conv(x)))). Down and up blocks have parameter-free shortcuts (channel
averaging and duplicating, from the image DC-AE): they rearrange space into channels, and the convolution only learns what that misses.
The temporal resampling is the innermost one. Every convolution is chunk-causal (`chunk_causal.py`): one pass over a clip, or
chunk after chunk with the state handed on, give the same latent.

    python ae.py reconstruct assets/bunny.mp4          a clip through the toy autoencoder: side-by-side mp4, contact sheet, PSNR, SSIM
    python ae.py reconstruct CLIP --weights dc-ae-v-1.0-f32t4c32-bf16.pt     the same through official weights
    python ae.py train --data CLIPS --preset small      trains one on a folder of film (`training/autoencoder.py`); --preset toy: on the toy world
    python ae.py eval WEIGHTS ... --data CLIPS          PSNR, SSIM, LPIPS, FVD, flicker, grid of any autoencoder (`training/evaluate.py`)
    python ae.py compare                                chunk-causal against causal and non-causal, on film (`experiments/temporal.py`)
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting threads slow every other process down; must precede torch

import argparse
import dataclasses
import importlib
import math
import re
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import reduce, repeat

import kernels
from chunk_causal import ISOLATED, Conv3d, pixel_shuffle, pixel_shuffle_add, pixel_unshuffle, run_layers, split_state
from files import checkpoint
from files.checkpoint import UserError
from gpu import tiling


@dataclass(frozen=True)
class Config:
    """Size of a DC-AE-V (spec 2.1). `widths` and `depths` have one entry per stage; a stage of depth 0 is skipped altogether."""

    widths: tuple
    depths: tuple
    latent_channels: int
    chunk: int = 40  # frames per chunk at pixel rate; 1: a frame sees itself and the past, at pixel rate as at latent rate
    scale: float = 1.0  # scaling factor: the diffusion model sees scale * encode(x), about unit RMS
    patch: int = 2  # spatial factor of the outermost unshuffle and shuffle
    temporal_factor: int = 4
    temporal: str = "chunk_causal"  # or "causal", "non_causal": the paper's alternatives

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "depths", tuple(self.depths))
        if self.chunk != 1 and (self.chunk < 1 or self.chunk % self.temporal_factor):
            raise ValueError(f"chunk ({self.chunk}) must be 1 or a multiple of temporal_factor ({self.temporal_factor}).")

    @property
    def first(self):
        """Index of the first stage that exists."""
        return next(i for i, d in enumerate(self.depths) if d > 0)

    @property
    def spatial_factor(self):
        return self.patch * 2 ** (len(self.widths) - 2 - self.first)

    @property
    def lead(self):
        """Pixel frames that the first latent frame stands for: as many as any other here, one in the Wan VAE."""
        return self.temporal_factor

    @property
    def latent_chunk(self):
        """Latent frames per chunk."""
        return max(1, self.chunk // self.temporal_factor)

    @property
    def piece(self):
        """Frames that go through at a time: a chunk, or those of one latent frame where chunks are shorter."""
        return self.latent_chunk * self.temporal_factor

    def resample(self, i):
        """(spatial, temporal) factor between stage i and i+1: temporal for the innermost pair, spatial for all others."""
        return (1, self.temporal_factor) if i == len(self.widths) - 2 else (2, 1)


_F32 = dict(widths=(128, 256, 512, 512, 1024, 1024, 1024), depths=(0, 5, 10, 4, 4, 4, 4))
AT_ONCE = 2**17  # pixels times frames (32 frames of 64x64): smaller chunks of a latent at hand are decoded several at a time

PRESETS = {
    "f32t4c32": Config(**_F32, latent_channels=32, scale=0.7241),
    "f32t4c64": Config(**_F32, latent_channels=64, scale=0.7614),
    "f32t4c128": Config(**_F32, latent_channels=128, scale=0.4457),
    "f32t4c256": Config(**_F32, latent_channels=256, scale=0.4752),
    "f64t4c128": Config((128, 256, 512, 512, 1024, 1024, 1024, 1024), (0, 5, 10, 4, 4, 4, 4, 4), 128, scale=0.4752),
    # Laptop models for the toy world of toy.py: the deep autoencoder, and the moderate one of the toy base model.
    "toy": Config((0, 16, 32, 32, 64, 64, 64), (0, 1, 1, 1, 2, 2, 1), 32, chunk=8),
    "toy-base": Config((0, 16, 32, 32, 32), (0, 1, 1, 1, 1), 16, chunk=8),
    # A laptop model for film, f32t4c32: unshuffles by 4 at once, for full-resolution layers cost everything.
    "small": Config((0, 48, 64, 64, 128, 128), (0, 1, 1, 1, 1, 1), 32, chunk=8, patch=4),
    # What it is measured by: f8t4c16 of about as many operations, causal, as the Wan VAE is (but for the first frame, which stands alone there).
    "small-base": Config((0, 48, 64, 64), (0, 1, 1, 6), 16, chunk=8, patch=4, temporal="causal"),
}


# ---------------------------------------------------------------------------------------------------- layers (spec 3)


class RMSNorm(nn.Module):
    """Normalise over channels at each (b, t, h, w), then scale and shift (spec 3.5)."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x, silu=False, shortcut=None):
        return kernels.rms_norm_channels(x, self.weight, self.bias, 1e-5, silu, shortcut)


class ConvLayer(nn.Module):
    """Convolution, then optionally RMSNorm, then optionally SiLU. `shortcut`, where given, is added last."""

    def __init__(self, cin, cout, chunk, temporal, bias=True, norm=False, act=False):
        super().__init__()
        self.conv = Conv3d(cin, cout, chunk, temporal, bias=bias)
        self.norm = RMSNorm(cout) if norm else None
        self.act = act

    def forward(self, x, state=None, shortcut=None):
        x, state = self.conv(x, state)
        if self.norm is not None:
            return self.norm(x, self.act, shortcut), state
        x = F.silu(x, inplace=not x.requires_grad) if self.act else x
        return x if shortcut is None else x + shortcut, state


class ResBlock(nn.Module):
    """x + RMSNorm(conv(SiLU(conv(x)))), the second convolution without bias (spec 3.6)."""

    def __init__(self, channels, chunk, temporal):
        super().__init__()
        self.main = nn.ModuleDict({
            "conv1": ConvLayer(channels, channels, chunk, temporal, act=True),
            "conv2": ConvLayer(channels, channels, chunk, temporal, bias=False, norm=True)})

    def forward(self, x, state=None):
        state1, state2 = split_state(state, 2)
        y, state1 = self.main.conv1(x, state1)
        y, state2 = self.main.conv2(y, state2, shortcut=x)
        return y, (state1, state2)


class Resample(nn.Module):
    """Convolution, then space-time to depth (down) or depth to space-time (`up`), by r in space and t in time (spec 3.4).

    Down: [b, cin, T, H, W] -> [b, cout, T/t, H/r, W/r]. Up: [b, cin, T, H, W] -> [b, cout, T*t, H*r, W*r].
    """

    def __init__(self, cin, cout, r, t, chunk, temporal, up=False):
        super().__init__()
        self.r, self.t, self.shuffle = r, t, pixel_shuffle if up else pixel_unshuffle
        self.zoom = r if up else 1 / r  # of the sides; gpu/tiling.py reads it
        self.conv = ConvLayer(cin, cout * t * r * r if up else cout // (t * r * r), chunk, temporal)

    def forward(self, x, state=None):
        x, state = self.conv(x, state)
        return self.shuffle(x, self.r, self.t), state


def averaging_shortcut(x, cout, r, t):
    """Unshuffle, then average consecutive groups of channels down to `cout` (spec 3.4)."""
    return reduce(pixel_unshuffle(x, r, t), "b (o g) t h w -> b o t h w", "mean", o=cout)


class DownBlock(nn.Module):
    """Resampling down plus the averaging shortcut."""

    def __init__(self, cin, cout, r, t, chunk, temporal):
        super().__init__()
        self.main, self.cout = Resample(cin, cout, r, t, chunk, temporal), cout

    def forward(self, x, state=None):
        y, state = self.main(x, state)
        return y + averaging_shortcut(x, self.cout, self.main.r, self.main.t), state


class UpBlock(nn.Module):
    """Resampling up plus the duplicating shortcut: each channel of x repeated until a shuffle gives `cout` channels, then shuffled (spec 3.4)."""

    def __init__(self, cin, cout, r, t, chunk, temporal):
        super().__init__()
        self.main = Resample(cin, cout, r, t, chunk, temporal, up=True)

    def forward(self, x, state=None):
        y, state = self.main.conv(x, state)
        return pixel_shuffle_add(y, x, self.main.r, self.main.t), state


class Stage(nn.Module):
    """A row of streaming blocks at one resolution."""

    def __init__(self, blocks):
        super().__init__()
        self.op_list = nn.ModuleList(blocks)

    def forward(self, x, state=None):
        return run_layers(self.op_list, x, state)


class Encoder(nn.Module):
    """[b, 3, T, H, W] -> [b, Z, T/4, H/f, W/f] (spec 2.2). Module names are those of the official checkpoints."""

    def __init__(self, cfg):
        super().__init__()
        n, W, s = len(cfg.widths), cfg.widths, cfg.first
        self.project_in = Resample(3, W[s], cfg.patch, 1, cfg.chunk, cfg.temporal)
        self.stages = nn.ModuleList()
        for i in range(n):
            chunk = cfg.latent_chunk if i == n - 1 else cfg.chunk
            blocks = [ResBlock(W[i], chunk, cfg.temporal) for _ in range(cfg.depths[i])]
            if s <= i < n - 1:
                blocks.append(DownBlock(W[i], W[i + 1], *cfg.resample(i), chunk, cfg.temporal))
            self.stages.append(Stage(blocks))
        self.project_out = ConvLayer(W[-1], cfg.latent_channels, cfg.latent_chunk, cfg.temporal)

    @property
    def layers(self):
        """All blocks in order, for gpu/tiling.py."""
        return (self.project_in, *(block for stage in self.stages for block in stage.op_list), self.project_out)

    def forward(self, x, state=None):
        return run_layers((self.project_in, *self.stages, self.project_out), x, state)


class Head(nn.Module):
    """RMSNorm, SiLU, conv and shuffle to pixels. In the checkpoints the three are a list, of which SiLU is number 1."""

    def __init__(self, width, cfg):
        super().__init__()
        self.op_list = nn.ModuleList([RMSNorm(width), nn.SiLU(), Resample(width, 3, cfg.patch, 1, cfg.chunk, cfg.temporal, up=True)])

    def forward(self, x, state=None):
        norm, _, up = self.op_list
        return up(norm(x, silu=True), state)


class Decoder(nn.Module):
    """[b, Z, T/4, H/f, W/f] -> [b, 3, T, H, W], not clamped (spec 2.3). Stages are stored 0..n-1 and run from the last to the first."""

    def __init__(self, cfg):
        super().__init__()
        n, W, s = len(cfg.widths), cfg.widths, cfg.first
        self.project_in = ConvLayer(cfg.latent_channels, W[-1], cfg.latent_chunk, cfg.temporal)
        self.stages = nn.ModuleList()
        for i in range(n):
            chunk = cfg.latent_chunk if i == n - 1 else cfg.chunk
            blocks = [ResBlock(W[i], chunk, cfg.temporal) for _ in range(cfg.depths[i])]
            if s <= i < n - 1:  # the convolution of the temporal up block still runs at the latent rate
                up_chunk = cfg.latent_chunk if i == n - 2 else cfg.chunk
                blocks.insert(0, UpBlock(W[i + 1], W[i], *cfg.resample(i), up_chunk, cfg.temporal))
            self.stages.append(Stage(blocks))
        self.project_out = Head(W[s], cfg)

    @property
    def layers(self):
        """All blocks in order, for gpu/tiling.py."""
        return (self.project_in, *(block for stage in reversed(self.stages) for block in stage.op_list), self.project_out)

    def forward(self, z, state=None):
        return run_layers((self.project_in, *reversed(self.stages), self.project_out), z, state)


# ---------------------------------------------------------------------------------------------------- the autoencoder


class DCAEV(nn.Module):
    """DC-AE-V (spec 2 to 4). Pixels in [-1, 1], layout [b, c, t, h, w]; `encode` returns the raw latent: the diffusion model's
    latent is `config.scale` times that (spec 6)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    # ---- any length and size: pad and crop (spec 4.1)

    def latent_shape(self, frames, height, width):
        """(t, h, w) of the latent of a clip: sizes are padded up to whole cells, frames to whole chunks."""
        c = self.config
        return (math.ceil(frames / c.piece) * c.latent_chunk, math.ceil(height / c.spatial_factor), math.ceil(width / c.spatial_factor))

    def pad(self, x, whole_chunks=True):
        """Repeat the last row and column up to a whole latent cell, and the last frame up to a whole chunk."""
        f = self.config.spatial_factor
        t, h, w = -x.shape[2] % self.config.piece * whole_chunks, -x.shape[3] % f, -x.shape[4] % f
        return F.pad(x, (0, w, 0, h, 0, t), mode="replicate") if t or h or w else x

    def encode(self, x, tile=None, compat=False):
        """[b, 3, T, H, W] in [-1, 1] -> raw latent [b, Z, t, h, w] with (t, h, w) = latent_shape(T, H, W).

        Any T >= 1 and any size: the clip is padded by repeating its edge. `compat=True` instead does what the released inference
        code does: sizes must fit, T must be a multiple of 4, and a tail shorter than a chunk is encoded as a clip of its
        own that sees nothing of the past (spec 4.2.5; visible, so not the default). Raises UserError for other input.
        tile: (rows, columns) in latent cells, for less memory and the same result (gpu/tiling.py); None for whole frames.
        """
        return torch.cat(list(self.encode_stream([x], tile, compat)), dim=2)

    def decode(self, z, frames=None, size=None, tile=None, compat=False):
        """Raw latent [b, Z, t, h, w] -> [b, 3, frames, *size], not clamped. Default: everything the latent holds.

        A latent that ends inside a chunk is padded by repeating its last frame and the result is cropped, unless `compat` (see `encode`).
        tile: see `encode`.
        """
        x = torch.cat(list(self.decode_stream(z, tile, compat)), dim=2)
        h, w = size or x.shape[3:]
        return x[:, :, :frames, :h, :w]

    def forward(self, x):
        """Reconstruction of a clip of any length and size: encode, decode, crop."""
        return self.decode(self.encode(x), x.shape[2], x.shape[3:])

    # ---- single images (spec 4.1)

    def encode_image(self, x):
        """[b, 3, H, W] -> latent [b, Z, 1, h, w]: the image repeated for one latent frame, as a clip that stands alone."""
        clip = repeat(x, "b c h w -> b c t h w", t=self.config.temporal_factor)
        return self.encoder(self.pad(clip, whole_chunks=False), ISOLATED)[0]

    def decode_image(self, z, size=None):
        """Latent [b, Z, 1, h, w] -> image [b, 3, *size]: the first of the frames it decodes to."""
        x = self.decoder(z, ISOLATED)[0][:, :, 0]
        h, w = size or x.shape[2:]
        return x[:, :, :h, :w]

    # ---- streams: memory does not grow with length (spec 4.2)

    def encode_stream(self, clips, tile=None, compat=False):
        """An iterable of clips [b, 3, any T, H, W] in order -> raw latents, one chunk at a time.

        The pieces are parts of one video, cut anywhere. Only the video's end is padded. Joined along time, this is `encode`.
        """
        chunks, state = self._rechunk(clips, 3, self.config.piece), None
        if not compat:
            yield from tiling.stream(self, "encoder", map(self.pad, chunks), tile)
            return
        for x in self._whole(chunks, tile):
            z, state = self.encode_chunk(x, state, compat)
            yield z

    def decode_stream(self, z, tile=None, compat=False):
        """Raw latents (a tensor, or an iterable of pieces cut anywhere) -> frames [b, 3, t, H, W], one chunk at a time."""
        c, state, lengths, whole = self.config, None, [], isinstance(z, torch.Tensor)
        together = self.chunks_at_once(*z.shape[3:]) if whole and not compat and tile is None else 1
        chunks = self._rechunk([z] if whole else z, c.latent_channels, c.latent_chunk * together)

        def padded():
            for z in chunks:
                lengths.append(z.shape[2])
                yield F.pad(z, (0, 0, 0, 0, 0, -z.shape[2] % c.latent_chunk), mode="replicate")

        if not compat:
            for x in tiling.stream(self, "decoder", padded(), tile):
                yield x[:, :, : lengths.pop(0) * c.temporal_factor]
            return
        for z in self._whole(chunks, tile):
            x, state = self.decode_chunk(z, state, compat)
            yield x

    def chunks_at_once(self, h, w):
        """Chunks of a latent of h x w cells that one call of the decoder takes: several, where one is so small that the layers' fixed costs
        are most of its time."""
        return max(1, AT_ONCE // (self.config.piece * h * w * self.config.spatial_factor**2))

    def decode_peak(self, shape, tile=None, dtype=torch.float32):
        """Estimated peak bytes of activations while `decode_stream` runs on a latent of shape (t, h, w), batch 1."""
        return tiling.peak(self, "decoder", shape, tile, dtype)

    @staticmethod
    def _whole(chunks, tile):
        if tile is not None:
            raise UserError("compat works on whole frames only: leave the tile or compat away.")
        return chunks

    def encode_chunk(self, x, state=None, compat=False):
        """One chunk of a video, or its shorter end -> (raw latent, state for the next chunk)."""
        c, (frames, h, w) = self.config, x.shape[2:]
        if not compat:
            x = self.pad(x)
        elif frames % c.temporal_factor or h % c.spatial_factor or w % c.spatial_factor:
            raise UserError(f"compat needs frames in multiples of {c.temporal_factor} and sides in multiples of {c.spatial_factor}, "
                            f"but {frames} frames of {h}x{w} are left: leave --compat off to pad and crop.")
        return self.encoder(x, state if x.shape[2] == c.piece else ISOLATED)

    def decode_chunk(self, z, state=None, compat=False):
        """One chunk of a latent, or its shorter end -> (frames [b, 3, 4 t, H, W], state for the next chunk)."""
        c, t = self.config, z.shape[2]
        if not compat:
            z = F.pad(z, (0, 0, 0, 0, 0, c.latent_chunk - t), mode="replicate")
        x, state = self.decoder(z, state if z.shape[2] == c.latent_chunk else ISOLATED)
        return x[:, :, : t * c.temporal_factor], state

    @staticmethod
    def _rechunk(pieces, channels, size):
        """Re-cut pieces of a video into pieces of `size` frames; the last one may be shorter."""
        held, count = [], 0
        for piece in pieces:
            if piece.ndim != 5 or piece.shape[1] != channels or 0 in piece.shape:
                raise UserError(f"the layout is [batch, {channels}, frames, height, width], got the shape {list(piece.shape)}.")
            while piece.shape[2]:
                part, piece = piece[:, :, : size - count], piece[:, :, size - count :]
                held.append(part)
                count += part.shape[2]
                if count == size:
                    yield torch.cat(held, dim=2)
                    held, count = [], 0
        if held:
            yield torch.cat(held, dim=2)

    # ---- weights (spec 5)

    def load_official(self, state_dict):
        """Copy an official state dict (bare, or in its training container), any float dtype, strictly -> self in eval mode."""
        return checkpoint.load_strict(self, checkpoint.unwrap(state_dict), "the autoencoder weights").eval()


def infer_config(tensors, name=""):
    """Config from the shapes of official weights (spec 5.3). What shapes do not show (chunk, scale) is that of the preset with as many stages
    and latent channels; if several have, of the one with these widths and depths, else of the first. UserError if none has."""
    convs = [(int(m[1]), m[2], tensors[m[0]].shape[1])
             for m in (re.fullmatch(r"encoder\.stages\.(\d+)\.op_list\.\d+\.main\.(conv1?)\.conv\.weight", k) for k in tensors) if m]
    stages = [[(kind, width) for i, kind, width in convs if i == stage] for stage in range(1 + max((i for i, *_ in convs), default=-1))]
    widths = tuple(s[0][1] if s else 0 for s in stages)
    depths = tuple([kind for kind, _ in s].count("conv1") for s in stages)  # the other convolution is the resampling's
    z = tensors.get("encoder.project_out.conv.weight")
    alike = [c for c in PRESETS.values() if any(depths) and z is not None and len(c.depths) == len(depths) and not any(depths[: c.first])
             and depths[c.first] and c.latent_channels == len(z)]
    if not alike:
        raise UserError(f"{name or 'this file'} holds no DC-AE-V of a known preset ({', '.join(PRESETS)}): give another file, or in Python "
                        "its Config.")
    same = [c for c in alike if c.depths == depths and c.widths[c.first :] == widths[c.first :]]
    return same[0] if same else dataclasses.replace(alike[0], widths=widths, depths=depths)


def load(path, config=None):
    """Weights of a DC-AE-V -> DCAEV in eval mode, fp32 (bf16 files are widened).

    `path`: an official container (bare state dict, `model_state_dict`, `ema_model_state_dict`), or our own .safetensors, which carries
    its config. The preset is inferred from the shapes where no config is given.
    """
    tensors, metadata = checkpoint.load_tensors(path)
    if config is None:
        own, names = metadata.get("config"), {f.name for f in dataclasses.fields(Config)}
        ours = isinstance(own, dict) and {"widths", "depths"} <= own.keys() <= names
        config = Config(**own) if ours else infer_config(tensors, path)
    with torch.device("meta"):
        net = DCAEV(config)
    net = checkpoint.load_strict(net.to_empty(device="cpu"), tensors, str(path)).eval()
    return net.to(memory_format=torch.channels_last_3d)  # as convolutions want it (kernels.py); activations follow


def save(net, path, dtype=torch.float32, **metadata):
    """Write weights and config as safetensors, atomically; official key names."""
    tensors = {k: v.to(dtype) for k, v in net.state_dict().items()}
    checkpoint.save_tensors(path, tensors, {"config": dataclasses.asdict(net.config), **metadata})


# ---------------------------------------------------------------------------------------------------- command line


def main(argv=None):
    """Each command lives in a file above this one, which is imported only when asked for."""
    argv = sys.argv[1:] if argv is None else argv
    files = {"reconstruct": "training.evaluate", "train": "training.autoencoder", "eval": "training.evaluate", "compare": "experiments.temporal"}
    p = argparse.ArgumentParser(description="DC-AE-V, the deep compression video autoencoder.", usage="ae.py COMMAND ... (COMMAND --help says more)")
    p.add_argument("command", choices=files, help="reconstruct: a video file through the autoencoder; train: on the toy world or on a folder of "
                   "clips; eval: table of PSNR, SSIM, ... for any autoencoder; compare: chunk-causal against causal and non-causal")
    command = p.parse_args(argv[:1]).command
    getattr(importlib.import_module(files[command]), f"main_{command}")(argv[1:])


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
