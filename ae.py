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
    python ae.py train --preset toy-base                                trains the toy base's autoencoder (20 minutes on one core)
    python ae.py train --preset toy --grow-from weights/toy-base.safetensors    trains the deep one (an hour on one core)
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting threads slow every other process down; must precede torch

import argparse
import dataclasses
import inspect
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from tqdm import tqdm

import checkpoint
import data
import kernels
import metrics
from checkpoint import UserError
from chunk_causal import ISOLATED, Conv3d, pixel_shuffle, pixel_unshuffle, run_layers, split_state
from muon import Muon


@dataclass(frozen=True)
class Config:
    """Size of a DC-AE-V (spec 2.1). `widths` and `depths` have one entry per stage; a stage of depth 0 is skipped altogether."""

    widths: tuple
    depths: tuple
    latent_channels: int
    chunk: int = 40  # frames per chunk at pixel rate
    scale: float = 1.0  # scaling factor: the diffusion model sees scale * encode(x), about unit RMS
    patch: int = 2  # spatial factor of the outermost unshuffle and shuffle
    temporal_factor: int = 4
    temporal: str = "chunk_causal"  # or "causal", "non_causal": the paper's alternatives

    def __post_init__(self):
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "depths", tuple(self.depths))
        if self.chunk % self.temporal_factor:
            raise ValueError(f"chunk ({self.chunk}) must be a multiple of temporal_factor ({self.temporal_factor}).")

    @property
    def first(self):
        """Index of the first stage that exists."""
        return next(i for i, d in enumerate(self.depths) if d > 0)

    @property
    def spatial_factor(self):
        return self.patch * 2 ** (len(self.widths) - 2 - self.first)

    @property
    def latent_chunk(self):
        return self.chunk // self.temporal_factor

    def resample(self, i):
        """(spatial, temporal) factor between stage i and i+1: temporal for the innermost pair, spatial for all others."""
        return (1, self.temporal_factor) if i == len(self.widths) - 2 else (2, 1)


_F32 = dict(widths=(128, 256, 512, 512, 1024, 1024, 1024), depths=(0, 5, 10, 4, 4, 4, 4))
PRESETS = {
    "f32t4c32": Config(**_F32, latent_channels=32, scale=0.7241),
    "f32t4c64": Config(**_F32, latent_channels=64, scale=0.7614),
    "f32t4c128": Config(**_F32, latent_channels=128, scale=0.4457),
    "f32t4c256": Config(**_F32, latent_channels=256, scale=0.4752),
    "f64t4c128": Config((128, 256, 512, 512, 1024, 1024, 1024, 1024), (0, 5, 10, 4, 4, 4, 4, 4), 128, scale=0.4752),
    # Laptop models for the toy world of data.py: the deep autoencoder, and the moderate one of the toy base model.
    "toy": Config((0, 16, 32, 32, 64, 64, 64), (0, 1, 1, 1, 2, 2, 1), 32, chunk=8),
    "toy-base": Config((0, 16, 32, 32, 32), (0, 1, 1, 1, 1), 16, chunk=8),
}


# ---------------------------------------------------------------------------------------------------- layers (spec 3)


class RMSNorm(nn.Module):
    """Normalise over channels at each (b, t, h, w), then scale and shift (spec 3.5)."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return kernels.rms_norm_channels(x, self.weight, self.bias, eps=1e-5)


class ConvLayer(nn.Module):
    """Convolution, then optionally RMSNorm, then optionally SiLU."""

    def __init__(self, cin, cout, chunk, temporal, bias=True, norm=False, act=False):
        super().__init__()
        self.conv = Conv3d(cin, cout, chunk, temporal, bias=bias)
        self.norm = RMSNorm(cout) if norm else None
        self.act = act

    def forward(self, x, state=None):
        x, state = self.conv(x, state)
        x = x if self.norm is None else self.norm(x)
        return F.silu(x) if self.act else x, state


class TwoConvs(nn.Module):
    """The residual branch of a block: conv, SiLU, conv (no bias), RMSNorm (spec 3.6)."""

    def __init__(self, channels, chunk, temporal):
        super().__init__()
        self.conv1 = ConvLayer(channels, channels, chunk, temporal, act=True)
        self.conv2 = ConvLayer(channels, channels, chunk, temporal, bias=False, norm=True)

    def forward(self, x, state=None):
        return run_layers((self.conv1, self.conv2), x, state)


class Resample(nn.Module):
    """Convolution, then space-time to depth (down) or depth to space-time (`up`), by r in space and t in time (spec 3.4).

    Down: [b, cin, T, H, W] -> [b, cout, T/t, H/r, W/r]. Up: [b, cin, T, H, W] -> [b, cout, T*t, H*r, W*r].
    """

    def __init__(self, cin, cout, r, t, chunk, temporal, up=False):
        super().__init__()
        self.r, self.t, self.shuffle = r, t, pixel_shuffle if up else pixel_unshuffle
        self.conv = ConvLayer(cin, cout * t * r * r if up else cout // (t * r * r), chunk, temporal)

    def forward(self, x, state=None):
        x, state = self.conv(x, state)
        return self.shuffle(x, self.r, self.t), state


def averaging_shortcut(x, cout, r, t):
    """Unshuffle, then average consecutive groups of channels down to `cout` (spec 3.4)."""
    return reduce(pixel_unshuffle(x, r, t), "b (o g) t h w -> b o t h w", "mean", o=cout)


def duplicating_shortcut(x, cout, r, t):
    """Repeat each channel until a shuffle gives `cout` channels, then shuffle (spec 3.4)."""
    return pixel_shuffle(repeat(x, "b c t h w -> b (c n) t h w", n=cout * t * r * r // x.shape[1]), r, t)


class Residual(nn.Module):
    """main(x) + shortcut(x); `main` is the streaming part."""

    def __init__(self, main, shortcut=lambda x: x):
        super().__init__()
        self.main, self.shortcut = main, shortcut

    def forward(self, x, state=None):
        y, state = self.main(x, state)
        return y + self.shortcut(x), state


def res_block(channels, chunk, temporal):
    return Residual(TwoConvs(channels, chunk, temporal))


def down_block(cin, cout, r, t, chunk, temporal):
    return Residual(Resample(cin, cout, r, t, chunk, temporal), lambda x: averaging_shortcut(x, cout, r, t))


def up_block(cin, cout, r, t, chunk, temporal):
    return Residual(Resample(cin, cout, r, t, chunk, temporal, up=True), lambda x: duplicating_shortcut(x, cout, r, t))


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
            blocks = [res_block(W[i], chunk, cfg.temporal) for _ in range(cfg.depths[i])]
            if s <= i < n - 1:
                blocks.append(down_block(W[i], W[i + 1], *cfg.resample(i), chunk, cfg.temporal))
            self.stages.append(Stage(blocks))
        self.project_out = ConvLayer(W[-1], cfg.latent_channels, cfg.latent_chunk, cfg.temporal)

    def forward(self, x, state=None):
        return run_layers((self.project_in, *self.stages, self.project_out), x, state)


class Head(nn.Module):
    """RMSNorm, SiLU, conv and shuffle to pixels. In the checkpoints the three are a list, of which SiLU is number 1."""

    def __init__(self, width, cfg):
        super().__init__()
        self.op_list = nn.ModuleList([RMSNorm(width), nn.SiLU(), Resample(width, 3, cfg.patch, 1, cfg.chunk, cfg.temporal, up=True)])

    def forward(self, x, state=None):
        norm, act, up = self.op_list
        return up(act(norm(x)), state)


class Decoder(nn.Module):
    """[b, Z, T/4, H/f, W/f] -> [b, 3, T, H, W], not clamped (spec 2.3). Stages are stored 0..n-1 and run from the last to the first."""

    def __init__(self, cfg):
        super().__init__()
        n, W, s = len(cfg.widths), cfg.widths, cfg.first
        self.project_in = ConvLayer(cfg.latent_channels, W[-1], cfg.latent_chunk, cfg.temporal)
        self.stages = nn.ModuleList()
        for i in range(n):
            chunk = cfg.latent_chunk if i == n - 1 else cfg.chunk
            blocks = [res_block(W[i], chunk, cfg.temporal) for _ in range(cfg.depths[i])]
            if s <= i < n - 1:  # the convolution of the temporal up block still runs at the latent rate
                up_chunk = cfg.latent_chunk if i == n - 2 else cfg.chunk
                blocks.insert(0, up_block(W[i + 1], W[i], *cfg.resample(i), up_chunk, cfg.temporal))
            self.stages.append(Stage(blocks))
        self.project_out = Head(W[s], cfg)

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
        return (math.ceil(frames / c.chunk) * c.latent_chunk, math.ceil(height / c.spatial_factor), math.ceil(width / c.spatial_factor))

    def pad(self, x, whole_chunks=True):
        """Repeat the last row and column up to a whole latent cell, and the last frame up to a whole chunk."""
        f = self.config.spatial_factor
        t, h, w = -x.shape[2] % self.config.chunk * whole_chunks, -x.shape[3] % f, -x.shape[4] % f
        return F.pad(x, (0, w, 0, h, 0, t), mode="replicate") if t or h or w else x

    def encode(self, x, compat=False):
        """[b, 3, T, H, W] in [-1, 1] -> raw latent [b, Z, t, h, w] with (t, h, w) = latent_shape(T, H, W).

        Any T >= 1 and any size: the clip is padded by repeating its edge. `compat=True` instead does what the released inference
        code does: sizes must fit, T must be a multiple of 4, and a tail shorter than a chunk is encoded as a clip of its
        own that sees nothing of the past (spec 4.2.5; visible, so not the default). Raises UserError for other input.
        """
        return torch.cat(list(self.encode_stream([x], compat)), dim=2)

    def decode(self, z, frames=None, size=None, compat=False):
        """Raw latent [b, Z, t, h, w] -> [b, 3, frames, *size], not clamped. Default: everything the latent holds.

        A latent that ends inside a chunk is padded by repeating its last frame and the result is cropped, unless `compat` (see `encode`).
        """
        x = torch.cat(list(self.decode_stream(z, compat)), dim=2)
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

    def encode_stream(self, clips, compat=False):
        """An iterable of clips [b, 3, any T, H, W] in order -> raw latents, one chunk at a time.

        The pieces are parts of one video, cut anywhere. Only the video's end is padded. Joined along time, this is `encode`.
        """
        state = None
        for x in self._rechunk(clips, 3, self.config.chunk):
            z, state = self.encode_chunk(x, state, compat)
            yield z

    def decode_stream(self, z, compat=False):
        """Raw latents (a tensor, or an iterable of pieces cut anywhere) -> frames [b, 3, t, H, W], one chunk at a time."""
        state = None
        for z in self._rechunk([z] if isinstance(z, torch.Tensor) else z, self.config.latent_channels, self.config.latent_chunk):
            x, state = self.decode_chunk(z, state, compat)
            yield x

    def encode_chunk(self, x, state=None, compat=False):
        """One chunk of a video, or its shorter end -> (raw latent, state for the next chunk)."""
        c, (frames, h, w) = self.config, x.shape[2:]
        if not compat:
            x = self.pad(x)
        elif frames % c.temporal_factor or h % c.spatial_factor or w % c.spatial_factor:
            raise UserError(f"compat needs frames in multiples of {c.temporal_factor} and sides in multiples of {c.spatial_factor}, "
                            f"but {frames} frames of {h}x{w} are left: leave --compat off to pad and crop.")
        return self.encoder(x, state if x.shape[2] == c.chunk else ISOLATED)

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
    """The published preset whose shapes these weights have. The five differ in depth and latent channels (spec 5.3)."""
    for preset, config in PRESETS.items():
        with torch.device("meta"):
            own = DCAEV(config).state_dict()
        if own.keys() == tensors.keys() and all(own[k].shape == tensors[k].shape for k in own):
            return config
    raise UserError(f"{name or 'this file'} holds no DC-AE-V of a known preset ({', '.join(PRESETS)}): give another file, or in Python "
                    "its Config.")


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
    return checkpoint.load_strict(net.to_empty(device="cpu"), tensors, str(path)).eval()


def save(net, path, dtype=torch.float32, **metadata):
    """Write weights and config as safetensors, atomically; official key names."""
    tensors = {k: v.to(dtype) for k, v in net.state_dict().items()}
    checkpoint.save_tensors(path, tensors, {"config": dataclasses.asdict(net.config), **metadata})


# ---------------------------------------------------------------------------------------------------- training


def train(preset, out, steps=1000, batch=8, frames=16, lr=2e-3, noise=0.1, grow_from=None, grow_steps=2400, grow_clips=4096, seed=0,
          threads=None, bf16=True, save_every=200):
    """Train a preset on the toy world -> path of its weights. An interrupted run goes on where it stopped, bit for bit on one machine.

    Loss: L1 + MSE in pixels. `noise`: standard deviation, relative to the latent's RMS, of the noise added before decoding: it
    spreads the information evenly over the latent, which the diffusion model needs. Clips hold at least two chunks, so that the path
    across chunk borders is trained. Muon, for AdamW hardly gets off the ground here (`muon.py`); the learning rate warms up over 50 steps
    and falls linearly to zero. `grow_from`: weights of a shallower autoencoder to start from (`grow`); then only a gentle fine-tune in
    pixels is left, lr 3e-4: 2e-3 undoes part of what was gained.
    """
    config = PRESETS[preset]
    if frames < 2 * config.chunk or frames % config.chunk:
        raise UserError(f"--frames must be a multiple of the chunk ({config.chunk}) and at least two chunks, got {frames}.")
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = torch.autocast(device, torch.bfloat16, enabled=bf16)
    out = Path(out)
    torch.manual_seed(seed)
    net = DCAEV(config).to(device)
    grown = dict(grow_from=grow_from and Path(grow_from).name, grow_steps=grow_steps, grow_clips=grow_clips)
    settings = dict(preset=preset, steps=steps, batch=batch, frames=frames, lr=lr, noise=noise, seed=seed, **grown)
    held_out = data.toy_batch(9_000_000, 16, 32)[0].to(device)
    log = []

    def report(step, loss):
        with torch.no_grad(), autocast:
            y = torch.cat([net(x).float() for x in held_out.split(4)])
        log.append(dict(step=step, loss=loss, psnr=metrics.psnr(y, held_out)))
        metrics.plot(out / "train.png", {"PSNR on held-out clips (dB)": [(r["step"], r["psnr"]) for r in log],
                                         "training loss": [(r["step"], r["loss"]) for r in log]})
        data.contact_sheet(out / "train_sheet.png", [v for pair in zip(held_out[:4], y[:4]) for v in pair], columns=8)
        return f"{log[-1]['psnr']:.2f} dB"

    if grow_from and not (out / "train.pt").exists():
        grow(net, load(grow_from).to(device), grow_steps, 4 * batch, grow_clips, frames, noise, seed, autocast, out / "grow.pt",
             dict(preset=preset, batch=batch, frames=frames, noise=noise, seed=seed, **grown))

    def loss_at(step):
        x = data.toy_batch((seed, step), batch, frames, start=None)[0].to(device)
        with autocast:
            z = add_latent_noise(net.encoder(x)[0], noise, seed * 1_000_003 + step)
            y = net.decoder(z)[0].float()
        return (y - x).abs().mean() + (y - x).square().mean()

    optimise(net, net, loss_at, lr, steps, out / "train.pt", settings, report, f"train {preset}", log, save_every)
    with torch.no_grad():
        z = torch.cat([net.encode(x) for x in data.toy_batch(9_000_001, 64, 32)[0].to(device).split(8)])
    net.config = dataclasses.replace(config, scale=round(1 / z.square().mean().sqrt().item(), 4))
    save(net, out / f"{preset}.safetensors", torch.float16, training=settings, log=log)
    return out / f"{preset}.safetensors"


def add_latent_noise(z, noise, seed):
    """z plus Gaussian noise of `noise` times its RMS; the same noise for the same seed on every device."""
    return z + noise * z.square().mean().sqrt() * torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z)


def optimise(net, trained, loss_at, lr, steps, state_file, settings, report, what, log, save_every):
    """Minimise loss_at(step) over the parameters of `trained`, a part of `net`, with Muon, from `state_file` on where it exists.

    `report(step, loss)` is called with every checkpoint and returns a word for the progress bar; `log` is kept in the checkpoint.
    """
    opt, step = Muon(trained, lr), 0
    if state_file.exists():
        saved = checkpoint.load_pickle(state_file)
        if saved["settings"] != settings:
            raise UserError(f"{state_file} was made with other settings ({saved['settings']}): use the same ones, or another --out.")
        net.load_state_dict(saved["net"])
        opt.load_state_dict(saved["opt"])
        step, log[:] = saved["step"], saved["log"]
    with tqdm(total=steps, initial=step, desc=what, unit="step", mininterval=5) as bar:
        while step < steps:
            for group in opt.param_groups:
                group["lr"] = lr * min((step + 1) / 50, 1 - step / steps)
            loss = loss_at(step)
            if not torch.isfinite(loss):
                raise UserError(f"the loss is {loss.item()} at step {step}: lower --lr; the last good checkpoint is {state_file}.")
            opt.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            opt.step()
            step += 1
            bar.update()
            if step % save_every == 0 or step == steps:
                bar.set_postfix_str(f"loss {loss.item():.4f}, {report(step, loss.item())}")
                state = dict(net=net.state_dict(), opt=opt.state_dict(), step=step, log=log, settings=settings)
                with checkpoint.atomic_path(state_file) as tmp, open(tmp, "wb") as f:
                    torch.save(state, f)


def in_order(part):
    """The blocks of an encoder or decoder in the order they run."""
    stages = part.stages if isinstance(part, Encoder) else reversed(part.stages)
    return [part.project_in, *(block for stage in stages for block in stage.op_list), part.project_out]


def grow(net, teacher, steps, batch, clips, frames, noise, seed, autocast, state_file, settings, lr=2e-3):
    """Start `net` from a shallower autoencoder that is trained already.

    The blocks at high resolution, where nearly all the time goes, are equal in both: they are copied. The deep blocks of `net` then learn
    what the deep blocks of `teacher` do, to turn the features h of the last common encoder block into the features d of
    the first common decoder block, only through a smaller latent. At an eighth of the resolution about six times as many clips pass per second.
    (Our choice for a laptop, in the spirit of DC-AE's phases that tune the middle layers alone; how DC-AE-V was trained is not published.)
    """
    device = next(net.parameters()).device
    enc, dec, enc_t, dec_t = (in_order(part) for part in (net.encoder, net.decoder, teacher.encoder, teacher.decoder))
    kind = lambda block: [p.shape for p in block.parameters()] + [(m.r, m.t) for m in block.modules() if isinstance(m, Resample)]
    common = lambda a, b: next(i for i, (x, y) in enumerate(zip(a, b)) if kind(x) != kind(y))
    down, up = common(enc, enc_t), common(dec[::-1], dec_t[::-1])
    for mine, theirs in zip(enc[:down] + dec[-up:], enc_t[:down] + dec_t[-up:]):
        mine.load_state_dict(theirs.state_dict())

    features, targets = [], []
    if not (state_file.exists() and checkpoint.load_pickle(state_file)["step"] == steps):
        for i in tqdm(range(0, clips, 16), desc=f"features of {clips} clips", unit="batch", mininterval=5):
            with torch.no_grad(), autocast:
                x = data.toy_batch((seed, 1, i), 16, frames, start=None)[0].to(device)
                h, _ = run_layers(enc_t[:down], x)
                d, _ = run_layers(dec_t[:-up], run_layers(enc_t[down:], h)[0])
            features.append(h.half())
            targets.append(d.half())
        features, targets = torch.cat(features), torch.cat(targets)
        variance = targets[:256].float().var()

    def loss_at(step):
        pick = torch.randint(len(features), (batch,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        with autocast:
            z = add_latent_noise(run_layers(enc[down:], features[pick].float())[0], noise, step)
            d = run_layers(dec[:-up], z)[0]
        return (d.float() - targets[pick].float()).square().mean() / variance

    deep = nn.ModuleList(enc[down:] + dec[:-up])
    optimise(net, deep, loss_at, lr, steps, state_file, settings, lambda step, loss: "relative error of the features", "grow", [], 200)


# ---------------------------------------------------------------------------------------------------- reconstruction


@torch.no_grad()
def reconstruct(net, clip, out, frames=None, size=None, compat=False):
    """A video file through the autoencoder, chunk by chunk, so that length costs no memory -> dict of the results.

    Writes OUT/<clip>_reconstruction.mp4 (original | reconstruction), .png (evenly spaced frames of both), .json (the results; PSNR
    and SSIM as in spec 8.2).
    """
    c, like, info = net.config, next(net.parameters()), data.clip_info(clip)
    psnr, ssim, shown, latent, seconds = [], [], [], [], dict(encode=0.0, decode=0.0)
    step = max(1, (frames or int(info.seconds * info.fps) or 8 * c.chunk) // 8)  # between the frames of the contact sheet

    def now():
        if like.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def side_by_side():
        encoder_state = decoder_state = None
        bar = tqdm(total=frames or int(info.seconds * info.fps) or None, desc="reconstruct", unit="frame", leave=False)
        for x in data.iter_clip(clip, frames, size, piece=c.chunk):
            x, start = x[None], now()
            z, encoder_state = net.encode_chunk(x.to(like), encoder_state, compat)
            middle = now()
            y, decoder_state = net.decode_chunk(z, decoder_state, compat)
            seconds["encode"] += middle - start
            seconds["decode"] += now() - middle
            y = y[:, :, : x.shape[2], : x.shape[3], : x.shape[4]].to(x)
            if -len(psnr) % step < x.shape[2]:
                shown.append(torch.cat([x, y])[:, :, -len(psnr) % step :: step].clone())
            psnr.extend(metrics.psnr_frames(y, x)[0].tolist())
            ssim.extend(metrics.ssim_frames(y, x)[0].tolist())
            latent.append(z.shape[2])
            bar.update(x.shape[2])
            yield torch.cat([x, y], dim=4)[0]
        bar.close()

    h, w = size or (info.height, info.width)
    path = f"{Path(out) / Path(clip).stem}_reconstruction"
    data.write_video(f"{path}.mp4", side_by_side(), info.fps, scale=max(1, 256 // h))
    data.contact_sheet(f"{path}.png", torch.cat(shown, dim=2), labels=["original", "reconstruction"], scale=min(2, 200 / h))
    result = dict(
        clip=str(clip), written=path, frames=len(psnr), height=h, width=w, fps=info.fps,
        psnr=round(metrics.finite_mean(torch.tensor(psnr)), 3), ssim=round(sum(ssim) / len(ssim), 4),
        latent=[c.latent_channels, sum(latent), *net.latent_shape(1, h, w)[1:]],
        compression=3 * c.spatial_factor**2 * c.temporal_factor / c.latent_channels, chunk=c.chunk, compat=compat,
        seconds={k: round(v, 3) for k, v in seconds.items()},
        dtype=str(like.dtype), device=str(like.device), threads=torch.get_num_threads(), torch=torch.__version__)
    checkpoint.write_json(f"{path}.json", result)
    return result


# ---------------------------------------------------------------------------------------------------- command line


def main(argv=None):
    p = argparse.ArgumentParser(description="DC-AE-V, the deep compression video autoencoder.")
    commands = p.add_subparsers(dest="command", required=True)
    r = commands.add_parser("reconstruct", help="a video file through the autoencoder: side-by-side mp4, contact sheet, PSNR, SSIM")
    r.add_argument("clip", help="video file")
    toy = Path(__file__).parent / "weights" / "toy.safetensors"
    r.add_argument("--weights", default=toy, help="official .pt, or .safetensors (default: the toy's)")
    r.add_argument("--out", default="out/reconstruct", help="folder for the results (default: %(default)s)")
    r.add_argument("--frames", type=int, help="read only the first FRAMES frames (default: all)")
    r.add_argument("--size", type=data.size_arg, metavar="HxW", help="scale and crop; 180x320 gives 180 rows (default: as it is)")
    r.add_argument("--compat", action="store_true", help="treat the end of the clip as the released code does: no padding")
    r.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    r.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on the CPU")
    t = commands.add_parser("train", help="train a toy autoencoder from nothing on the toy world of data.py",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    t.add_argument("--preset", choices=("toy", "toy-base"), default="toy", help="the deep one, or the moderate one of the base model")
    t.add_argument("--out", default="out/ae", help="folder for weights and plots; the same one resumes an interrupted run")
    t.add_argument("--grow-from", metavar="FILE", help="trained weights of a shallower autoencoder to start from")
    known = inspect.signature(train).parameters  # whose defaults are those of the command line
    for name, what in dict(steps="optimiser steps", batch="clips per step", frames="frames per clip: two chunks or more, whole ones",
                           lr="peak learning rate", grow_steps="steps of the deep blocks alone, with --grow-from",
                           grow_clips="clips for them", seed="of weights and clips", threads="CPU threads").items():
        t.add_argument(f"--{name.replace('_', '-')}", type=float if name == "lr" else int, default=known[name].default, help=what)
    args = vars(p.parse_args(argv))

    if args.pop("command") == "train":
        return print("wrote", train(**args))
    device, dtype, weights = torch.device(args.pop("device")), args.pop("dtype"), args.pop("weights")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use: leave --device off, or install a CUDA build of torch.")
    bf16 = dtype == "bf16" or dtype is None and device.type == "cuda"
    result = reconstruct(load(weights).to(device, torch.bfloat16 if bf16 else torch.float32), **args)
    n = result["frames"]
    print(f"clip    {n} frames of {result['height']}x{result['width']}, {result['fps']:g} per second")
    print(f"latent  {' x '.join(map(str, result['latent']))}, compression {result['compression']:g}x")
    print(f"PSNR    {result['psnr']:.2f} dB    SSIM {result['ssim']:.4f}")
    for what, s in result["seconds"].items():
        print(f"{what}  {s:.2f} s, {n / s:.1f} frames per second")
    print(f"wrote   {result['written']}.mp4, .png, .json")


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
