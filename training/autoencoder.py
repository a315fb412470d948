"""Training DC-AE-V: the programme that turns a folder of clips into an autoencoder (paper, section on DC-AE-V; spec dc-ae-v 7).

A deep autoencoder is trained in phases, as the image DC-AE was, each starting from the averaged weights of the one before:

    image    single frames, as a 2-D autoencoder:         L1 + 0.5 perceptual.  What a latent cell is to hold of space is learnt without time,
             at a third of the operations; then every kernel becomes the middle tap of a 3-D one (`inflate`)
    low      small crops, short clips, all layers:        L1 + 0.5 perceptual
    high     large crops, long clips, the inner layers:   L1 + 0.5 perceptual.  A latent must mean the same at every size and length, and
             what depends on size and length sits in the deep layers, next to the latent. The rest is frozen, and costs little
    refine   small crops, the decoder's head alone:       L1 + 0.5 perceptual + 0.05 adversarial.  The GAN paints texture, and cannot
             disturb the latent, which a diffusion model may have been trained on already

At the end of each phase the latent scale 1/RMS is measured on training clips and stored: the diffusion model sees scale * encode(x).

What is known and what is our choice. Known of DC-AE-V (spec 7.1): chunks of 40 frames, no KL term, joint training on images and video
(from a name), EMA, evaluation and by a reviewer's word training on 80 frames. Known of the image DC-AE: the three phases. From Open-Sora
2.0 (spec 7.3): weights 1, 0.5, 0.05, a fifth of the steps on stills, AdamW betas (0.9, 0.98), lr 5e-5, clipping at 1. Our choice, since
nothing is published (spec 7.2): to begin with images; all step counts, sizes and batches below, which layers count as inner and as head, the learning rate of
`low`, the noise on the latent.

    python ae.py train --data CLIPS --preset small                   all phases on a laptop
    python ae.py train --data CLIPS --preset f32t4c32 --phases image low      the first two at full size
    torchrun --nproc-per-node 8 ae.py train ...                      any of them on several GPUs
    python ae.py train --data CLIPS --preset f32t4c32 --inflate dc-ae-2d.safetensors      starts from a published image autoencoder
    python ae.py train --overfit out/clips/box.mp4 --preset small    one clip by heart: shows that model and losses work
    python ae.py train --preset toy-base                             the toy base's autoencoder on the toy world (20 minutes on one core)
    python ae.py train --preset toy --grow-from weights/toy-base.safetensors     the deep toy (an hour on one core)

Any of them can be killed and started again (`training/loop.py`). OUT/PHASE/ holds log.jsonl, log.png, sheet.png (original and reconstruction) and the
weights; `python ae.py eval OUT/low/small.safetensors --data CLIPS` scores them.
"""
import argparse
import dataclasses
import functools
import itertools
import os
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import repeat
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

import ae
import kernels
import toy
from chunk_causal import ISOLATED, Conv3d, run_layers
from files import checkpoint, video
from files.checkpoint import UserError
from training import clips, loop, losses, metrics
from training.muon import Muon


@dataclass(frozen=True)
class Phase:
    """One phase of the programme. Batch is per process; a weight of 0 switches a loss off."""

    trained: str  # "all", "inner" or "head": see `part`
    size: tuple  # of the crops: rows, columns
    frames: int  # per clip: whole chunks, two or more, or else the path across chunk borders is never trained (spec 7.3)
    batch: int
    steps: int
    lr: float
    expected: str  # time, and score on held-out clips
    optimiser: str = "adamw"
    warmup: int = 500
    decay: str = "constant"
    accumulate: int = 1
    ema: float = 0.999
    images: float = 0.2  # share of the steps that train on single frames, each as a clip that stands alone
    l1: float = 1.0
    mse: float = 0.0
    perceptual: float = 0.5
    perceptual_frames: int = 8  # of each clip
    adversarial: float = 0.0
    noise: float = 0.0  # standard deviation, relative to the latent's RMS, of noise added before decoding
    disc_width: int = 64
    disc_lr: float = 1e-4


#: For the published sizes on 8 H100. None of these has been run: times follow from the operations of spec 9 (forward, once more for
#: `recompute_blocks`, twice for the backward pass) at 40 % of the peak.
FULL = {
    "image": Phase("space", (256, 256), 1, 64, 50_000, 1e-4, "0.9 s per step, 13 hours", images=0.0, perceptual_frames=1),
    "low": Phase("all", (256, 256), 80, 2, 200_000, 1e-4, "7 s per step, 16 days; the released model has 31.1 dB (spec 8.3)"),
    "high": Phase("inner", (512, 512), 120, 1, 20_000, 5e-5, "11 s per step, 2.5 days"),
    "refine": Phase("head", (256, 256), 80, 2, 20_000, 5e-5, "2.5 s per step, 14 hours; sharper, PSNR a little lower", adversarial=0.05),
}
#: For `small` on a laptop whose CPU has units for bf16 (others take longer): Muon, because AdamW hardly gets off the ground in so few steps (`training/muon.py`).
_LAPTOP = dict(optimiser="muon", warmup=50, decay="linear", ema=0.99, mse=1.0, perceptual=0.1, perceptual_frames=2, disc_width=16)
LAPTOP = {
    "image": Phase("space", (64, 64), 1, 64, 800, 4e-3, "0.6 s per step on one core, 8 minutes; 19.7 dB on frames of films held out", **{**_LAPTOP, "images": 0.0, "perceptual": 0.0}),
    "low": Phase("all", (64, 64), 16, 8, 500, 2e-4, "2 s per step, 18 minutes; 19.4 dB on clips", **_LAPTOP),
    "high": Phase("inner", (128, 128), 32, 1, 100, 5e-4, "1.3 s per step, 2 minutes; 20.4 dB at 128x128", **_LAPTOP),
    "refine": Phase("head", (64, 64), 16, 4, 100, 2e-4, "1.4 s per step, 2 minutes; sharper, 0.4 dB lower", adversarial=0.05, **_LAPTOP),
}


def programme(preset):
    """{phase name: Phase} for a preset."""
    return FULL if preset.startswith("f") else LAPTOP


# ---------------------------------------------------------------------------------------------------- what is trained


def through_time(net):
    """The two blocks that resample time, of the encoder and of the decoder."""
    return net.encoder.stages[-2].op_list[-1], net.decoder.stages[-2].op_list[0]


def part(net, which):
    """The layers that a phase trains, as a module list.

    all: everything. space: all but what resamples time. inner: the two deepest stages of encoder and decoder, on both sides of the temporal
    resampling, and the projections to and from the latent. head: the decoder's last stage and projection to pixels.
    """
    enc, dec, first = net.encoder, net.decoder, net.config.first
    return nn.ModuleList({"all": [enc, dec], "space": [block for block in (*enc.layers, *dec.layers) if block not in through_time(net)],
                          "inner": [*enc.stages[-2:], enc.project_out, dec.project_in, *dec.stages[-2:]],
                          "head": [dec.stages[first], dec.project_out]}[which])


def optimiser(which, module, lr):
    """Muon, or AdamW without weight decay as everybody trains these (spec 7.1, 7.3)."""
    return Muon(module, lr) if which == "muon" else torch.optim.AdamW(module.parameters(), lr, betas=(0.9, 0.98), weight_decay=0)


def prepare(net, device, compiled=False):
    """Move a net to where it is trained. On a GPU: channels last, which cuDNN's 3-D kernels want, and `recompute_blocks`."""
    net.to(device)
    if device.type == "cuda":
        net.to(memory_format=torch.channels_last_3d)
        recompute_blocks(net)
    if compiled:
        net.encoder.compile(), net.decoder.compile()
    return net


def recompute_blocks(net):
    """Activation checkpointing: a block keeps only its input and is computed once more in the
    backward pass. Same numbers, less memory."""
    for block in (*net.encoder.layers, *net.decoder.layers):
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False)


def add_latent_noise(z, noise, seed):
    """z plus Gaussian noise of `noise` times its RMS; the same noise for the same seed on every device."""
    return z + noise * z.square().mean().sqrt() * torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z)


# ---------------------------------------------------------------------------------------------------- one step


def stills(x, per_clip):
    """[b, 3, t, h, w] -> `per_clip` evenly spaced frames of each, every one repeated for one latent frame (spec 4.1): [b n, 3, 4, h, w]."""
    frames = x[:, :, torch.linspace(0, x.shape[2] - 1, per_clip).round().long()]
    return repeat(frames, "b c n h w -> (b n) c t h w", t=4)


def step_losses(net, phase, perceptual, disc, seed, autocast, x, number):
    """The losses of batch `number`, as `loop.Run.fit` wants them: for the autoencoder, then for the discriminator if there is one.

    Whether the batch is one of clips or of stills, and the noise, depend on (seed, number) alone.
    """
    rng = np.random.default_rng((seed, number))
    state = None
    if rng.random() < phase.images:
        x, state = stills(x, x.shape[2] // net.config.temporal_factor), ISOLATED  # as many frames as the clips would have had
    with autocast:
        z = net.encoder(x, state)[0]
        noisy = add_latent_noise(z, phase.noise, int(rng.integers(2**31))) if phase.noise else z
        y = net.decoder(noisy, state)[0].float()
    values = dict(l1=losses.l1(y, x), mse=(y - x).square().mean())
    if phase.perceptual:
        values["perceptual"] = perceptual(y, x, torch.Generator().manual_seed(int(rng.integers(2**31))))
    loss = sum(getattr(phase, name) * value for name, value in values.items())
    if disc is not None:
        disc.requires_grad_(False)  # its gradient is not wanted here
        with autocast:
            values["adversarial"] = losses.hinge_g(disc(y))
        disc.requires_grad_(True)
        values["lambda"] = losses.adaptive_weight(loss, values["adversarial"], net.decoder.project_out.op_list[2].conv.conv.weight)
        loss = loss + phase.adversarial * values["lambda"] * values["adversarial"]
    psnr = -10 * torch.log10(values["mse"].detach() / 4)
    yield "net", loss, {"loss": loss.detach(), "train_psnr": psnr, **{k: v.detach() for k, v in values.items()}}
    if disc is not None:
        with autocast:
            loss = losses.hinge_d(disc(x), disc(y.detach()))
        yield "disc", loss, {"disc": loss.detach()}


# ---------------------------------------------------------------------------------------------------- one phase


def run_phase(net, phase, name, out, stream, held_out, seed=0, save_every=200, bf16=True, perceptual="auto", **settings):
    """Train `net` in place through one phase in folder `out` -> path of its weights (the averaged ones).

    `stream(number)`: an iterator of batches from that batch number on. `held_out`: list of clips [3, t, h, w]. `settings`: whatever else
    decides the result; `preset` names the file.
    """
    c, device = net.config, next(net.parameters()).device
    if phase.trained != "space" and (phase.frames % c.piece or phase.frames < 2 * c.piece):
        raise UserError(f"--frames must be a multiple of the chunk ({c.piece}) and at least two chunks, got {phase.frames}.")
    out, autocast = Path(out), kernels.autocast(device, bf16)
    torch.manual_seed(seed)
    net.requires_grad_(False)
    module = part(net, phase.trained).requires_grad_(True)
    nets, optimisers = {"net": net}, {"net": optimiser(phase.optimiser, module, phase.lr)}
    disc = None
    if phase.adversarial:
        disc = nets["disc"] = losses.Discriminator(phase.disc_width).to(device)
        optimisers["disc"] = torch.optim.AdamW(disc.parameters(), phase.disc_lr, betas=(0.9, 0.98), weight_decay=0)
    feature_distance = losses.Perceptual(perceptual, phase.perceptual_frames).to(device) if phase.perceptual else None
    plan = loop.Plan(phase.steps, phase.warmup, phase.decay, 1.0, phase.accumulate, phase.ema, save_every)
    config = {**dataclasses.asdict(phase), **dataclasses.asdict(c), "seed": seed, "bf16": bf16, **settings,
              "perceptual_network": feature_distance.name if feature_distance else None}
    del config["expected"], config["scale"]
    run = loop.Run(out, config, nets, optimisers, plan)
    shown = torch.stack(held_out)

    def report(run):
        with torch.no_grad(), run.averaged(), autocast:
            z = [net.encode(x.to(device)).float() for x in shown.split(1)]
            y = torch.cat([net.decode(v, shown.shape[2], shown.shape[3:]).float().cpu() for v in z])
        video.contact_sheet(out / "sheet.png", [v for pair in zip(shown[:4], y[:4]) for v in pair], columns=8, scale=max(1, 96 // y.shape[3]))
        loop.plot(out)  # up to the checkpoint before
        latent = {f"latent_{k}": v for k, v in metrics.latent_statistics(z).items() if k != "inverse_rms"}
        return dict(psnr=metrics.psnr(y, shown), ssim=metrics.ssim(y, shown), **latent)

    run.fit(stream(run.number), functools.partial(step_losses, net, phase, feature_distance, disc, seed, autocast), report, name)
    loop.copy_into(net, run.average)  # the next phase goes on from it
    net.requires_grad_(False)
    with torch.no_grad(), autocast:
        latent = metrics.latent_statistics(net.encode(x).float() for x in itertools.islice(stream(0), 16))
    net.config = dataclasses.replace(c, scale=round(latent["inverse_rms"], 4))
    path = out / f"{settings['preset']}.safetensors"
    if loop.rank() == 0:
        loop.plot(out)
        log = [line for line in loop.read_log(out) if "psnr" in line]
        ae.save(net, path, torch.float16, training=run.config, latent=latent, log=log)
    return path


# ---------------------------------------------------------------------------------------------------- the programme


def train_clips(preset, folder, out, phases=None, start=None, inflate_from=None, workers=2, cache=None, compiled=False, seed=0,
                changes={}, **more):
    """Train a preset on a folder of clips, phase after phase (by default all of the programme) -> path of the last weights.

    `start`: weights to begin with; `inflate_from`: an image autoencoder to begin with. `changes`: fields of Phase that replace those of every
    phase run; "steps" may be a list, a number for each. `more`: as for `run_phase`.
    """
    device = loop.start()
    torch.manual_seed(seed)
    net = ae.load(start, ae.PRESETS[preset]) if start else ae.DCAEV(ae.PRESETS[preset])
    if inflate_from:
        print(inflate(net, checkpoint.load_tensors(inflate_from)[0]))
    prepare(net, device, compiled)
    begun = start or inflate_from
    phases, steps = list(phases or [name for name in programme(preset) if not (begun and name == "image")]), changes.get("steps")
    if "image" in phases and (begun or phases[0] != "image"):
        raise UserError("the phase image begins from nothing: name it first in --phases, and without --start and --inflate.")
    if isinstance(steps, list) and len(steps) != len(phases):
        raise UserError(f"--steps has {len(steps)} numbers for {len(phases)} phases ({', '.join(phases)}): give one, or one for each.")
    films = str(folder) if isinstance(folder, (str, Path)) else " ".join(map(str, folder))
    for i, name in enumerate(phases):
        phase = dataclasses.replace(programme(preset)[name], **changes)
        if isinstance(steps, list):
            phase = dataclasses.replace(phase, steps=steps[i])
        if name == "image":  # of clips, `changes` speaks; in place of each as many pictures as by default
            per_clip = programme(preset)["image"].batch // programme(preset)["low"].batch
            phase = dataclasses.replace(phase, frames=1, batch=changes["batch"] * per_clip if "batch" in changes else phase.batch)
        dataset = clips.Clips(folder, phase.frames, phase.size, "train", seed, cache=cache)
        for reason in dataset.skipped.values():
            print(f"skipped: {reason}")
        stream = functools.partial(batches, dataset, phase.batch, workers, device)
        trained = prepare(image_autoencoder(net.config), device, compiled) if name == "image" else net
        path = run_phase(trained, phase, name, Path(out) / name, stream, clips.validation(folder, phase.frames, phase.size, 8), seed,
                         preset=preset + "-image" * (name == "image"), data=films, start=start and str(start),
                         inflated=inflate_from and str(inflate_from), **more)
        if name == "image":
            print(inflate(net, trained.state_dict()))
    return path


def batches(dataset, batch, workers, device, number):
    return clips.loader(dataset, batch, number, workers, loop.rank(), loop.processes(), device)


#: One clip by heart: no stills, nothing held out, pixels only. Every window of two chunks is drawn; judged is the whole clip.
MEMORISE = Phase("all", (128, 128), 16, 1, 500, 3e-3, "over 35 dB on the clip itself; 1 s per step, 8 minutes",
                 **{**_LAPTOP, "perceptual": 0.0, "images": 0.0})


def memorise(preset, clip, out, length=80, compiled=False, seed=0, changes={}, **more):
    """Overfit the first `length` frames of one clip -> path of the weights. The log's psnr is that of the whole clip, streamed; it
    is in OUT/overfit.json too."""
    phase = dataclasses.replace(MEMORISE, **changes)
    film = video.read_clip(clip, length, phase.size)
    device = loop.start()
    torch.manual_seed(seed)

    def windows(number):
        for n in itertools.count(number):
            starts = np.random.default_rng((seed, n)).integers(0, film.shape[1] - phase.frames + 1, phase.batch)
            yield torch.stack([film[:, s : s + phase.frames] for s in starts.tolist()]).to(device)

    net = prepare(ae.DCAEV(ae.PRESETS[preset]), device, compiled)
    path = run_phase(net, phase, "memorise", out, windows, [film], seed, preset=preset, data=Path(clip).name, length=length, **more)
    log = [{k: line[k] for k in ("step", "psnr", "ssim", "seconds_per_step")} for line in loop.read_log(out) if "psnr" in line]
    checkpoint.write_json(Path(out) / "overfit.json", dict(
        **checkpoint.provenance(), clip=Path(clip).name, length=length, preset=preset, phase=dataclasses.asdict(phase), log=log,
        parameters=sum(p.numel() for p in net.parameters())))
    return path


# ---------------------------------------------------------------------------------------------------- how fast


def naive_chunk_causal(conv, x, past):
    """What `Conv3d._chunk_causal` does, written down straight: every chunk between the frame before it and a frame of zeros."""
    out = []
    for piece in x.split(conv.chunk, dim=2):
        zero = torch.zeros_like(piece[:, :, :1])
        glued = torch.cat([zero if past is None else past.to(piece.dtype), piece, zero], dim=2)
        out.append(F.conv3d(glued, conv.weight, conv.bias, padding=(0, 1, 1)))
        past = piece[:, :, -1:]
    return torch.cat(out, dim=2), past


def straightforward(net, device):
    """A net as one would first train it: contiguous layout, nothing recomputed, chunks glued together with their neighbours."""
    for module in net.modules():
        if isinstance(module, Conv3d) and module.temporal == "chunk_causal":
            module._chunk_causal = functools.partial(naive_chunk_causal, module)
    return net.to(device)


def measure(preset, folder, cache, workers, changes={}, rounds=12, bf16=True):
    """Seconds per training step of the first phase: this file's way, a straightforward loop, and each of their two differences alone -> dict

    The ways take turns, step by step, in one process; medians. Compared are the convolutions and memory layout, and where clips come from
    (decoded once into `cache`, cut out by threads; or decoded by the training process when they are wanted).
    """
    device, phase = loop.start(), dataclasses.replace(programme(preset)["low"], perceptual=0.0, images=0.0, **changes)
    autocast = kernels.autocast(device, bf16)
    ways = {"ours": (prepare, True), "straightforward": (straightforward, False), "our data, plain net": (straightforward, True),
            "our net, plain data": (prepare, False)}
    running, seconds = {}, {name: [] for name in ways}
    for name, (make, fed) in ways.items():
        torch.manual_seed(0)
        net = make(ae.DCAEV(ae.PRESETS[preset]), device)
        dataset = clips.Clips(folder, phase.frames, phase.size, cache=cache if fed else None)
        running[name] = net, optimiser(phase.optimiser, net, phase.lr), batches(dataset, phase.batch, workers if fed else 0, device, 0)
    for number in range(rounds + 1):
        for name, (net, opt, stream) in running.items():
            begun = time.perf_counter()
            (_, loss, _), = step_losses(net, phase, None, None, 0, autocast, next(stream), number)
            opt.zero_grad()
            loss.backward()
            opt.step()
            loss.item()  # waits for a GPU
            if number:  # the first step loads libraries
                seconds[name].append(time.perf_counter() - begun)
    median = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    return dict(preset=preset, phase=dataclasses.asdict(phase), rounds=rounds, workers=workers,
                load=os.getloadavg()[0], seconds_per_step=median, ratio=round(median["straightforward"] / median["ours"], 3), all_seconds=seconds)


# ---------------------------------------------------------------------------------------------------- from images to video


class Still(nn.Module):
    """What is left of a 3-D convolution on single frames: its middle tap."""

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = nn.Parameter(conv.weight[:, :, 1].detach() * 3**0.5), conv.bias  # a third of the inputs: as strong as before

    def forward(self, x, state=None):
        return F.conv2d(x[:, :, 0], self.weight, self.bias, padding=1)[:, :, None], state


def image_autoencoder(config):
    """The 2-D autoencoder of these widths, for clips of one frame: a third of the operations. What resamples time does nothing, so the widths
    on both sides of it must be equal, as they are in all published presets."""
    if config.widths[-1] != config.widths[-2]:
        raise ValueError(f"the last two widths, {config.widths[-2:]}, must be equal for an image autoencoder to start from.")
    net = ae.DCAEV(dataclasses.replace(config, temporal_factor=1, chunk=1))
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv3d):
                setattr(module, name, Still(child))
    for block in through_time(net):
        for p in block.parameters():
            nn.init.zeros_(p).requires_grad_(False)
    return net


@torch.no_grad()
def inflate(net, tensors):
    """Start `net` from an image autoencoder's weights (spec 3.7) -> a sentence about what fitted.

    A 3x3 kernel becomes the middle tap of a 3x3x3 one (the last, where it is causal), the other taps zero; biases and norms are copied.
    What resamples time has no counterpart in an image, nor has the stage behind it, unless it is there by name: the last layer of their
    branches starts from zero, so that only the shortcuts are left, averaging four frames and repeating them. (Not all layers: behind a zero
    no gradient arrives.) A clip that stands still then gives, frame by frame, what the image autoencoder gives. Names are those of our own
    files; tensors of other names (the attention blocks of the published DC-AE) are left out, and counted.
    """
    own, used, n = net.state_dict(), set(), len(net.config.widths)
    now = 2 if net.config.temporal == "causal" else 1  # the tap on the frame itself
    for name, value in own.items():
        flat = tensors.get(name)
        if flat is not None and flat.ndim == 4 and value.ndim == 5 and flat.shape == value[:, :, now].shape:
            value.zero_()
            value[:, :, now] = flat
            used.add(name)
        elif flat is not None and flat.shape == value.shape:
            value.copy_(flat)
            used.add(name)
    if not used:
        raise UserError("no tensor of the image autoencoder fits this preset by name and shape: use a DC-AE of the same widths.")
    temporal = (f"encoder.stages.{n - 1}.", f"encoder.stages.{n - 2}.op_list.{len(net.encoder.stages[n - 2].op_list) - 1}.",
                f"decoder.stages.{n - 1}.", f"decoder.stages.{n - 2}.op_list.0.")
    for name, value in own.items():
        if name.startswith(temporal) and name not in used and re.search(r"main\.conv\.conv\.|conv2\.norm\.", name):
            value.zero_()
    return f"inflated {len(used)} of {len(own)} tensors; {len(tensors) - len(used)} tensors of the image autoencoder had no place."


# ---------------------------------------------------------------------------------------------------- the toy


def train(preset, out, steps=1000, batch=8, frames=16, lr=2e-3, noise=0.1, grow_from=None, grow_steps=2400, grow_clips=4096, seed=0,
          bf16=True, save_every=200):
    """Train a toy preset on the toy world -> path of its weights.

    Loss: L1 + MSE in pixels. `noise` on the latent spreads the information evenly over it, which the diffusion model needs. Muon, for
    AdamW hardly gets off the ground here (`training/muon.py`). `grow_from`: weights of a shallower autoencoder to start from (`grow`); then only a
    gentle fine-tune in pixels is left, lr 3e-4: 2e-3 undoes part of what was gained.
    """
    device, out = loop.start(), Path(out)
    phase = Phase("all", (64, 64), frames, batch, steps, lr, "", "muon", 50, "linear", ema=0.0, images=0.0, mse=1.0, perceptual=0.0, noise=noise)
    grown = dict(grow_from=grow_from and Path(grow_from).name, grow_steps=grow_steps, grow_clips=grow_clips)
    torch.manual_seed(seed)
    net = prepare(ae.DCAEV(ae.PRESETS[preset]), device)
    if grow_from:
        grow(net, ae.load(grow_from).to(device), out / "grow", grow_steps, 4 * batch, grow_clips, frames, noise, seed,
             kernels.autocast(device, bf16))

    def toy_clips(number):
        for n in itertools.count(number):
            yield toy.toy_batch((seed, n), batch, frames, start=None)[0].to(device)

    return run_phase(net, phase, f"train {preset}", out, toy_clips, list(toy.toy_batch(9_000_000, 16, 32)[0]), seed, save_every, bf16=bf16,
                     preset=preset, **grown)


def grow(net, teacher, out, steps, batch, clips, frames, noise, seed, autocast, lr=2e-3):
    """Start `net` from a shallower autoencoder that is trained already.

    The blocks at high resolution, where nearly all the time goes, are equal in both: they are copied. The deep blocks of `net` then learn
    what the deep blocks of `teacher` do, to turn the features h of the last common encoder block into the features d of
    the first common decoder block, only through a smaller latent. At an eighth of the resolution about six times as many clips pass per second.
    (Our choice for a laptop, in the spirit of DC-AE's phases that tune the middle layers alone; how DC-AE-V was trained is not published.)
    """
    device = next(net.parameters()).device
    enc, dec, enc_t, dec_t = (list(part.layers) for part in (net.encoder, net.decoder, teacher.encoder, teacher.decoder))
    kind = lambda block: [p.shape for p in block.parameters()] + [(m.r, m.t) for m in block.modules() if isinstance(m, ae.Resample)]
    common = lambda a, b: next(i for i, (x, y) in enumerate(zip(a, b)) if kind(x) != kind(y))
    down, up = common(enc, enc_t), common(dec[::-1], dec_t[::-1])
    for mine, theirs in zip(enc[:down] + dec[-up:], enc_t[:down] + dec_t[-up:]):
        mine.load_state_dict(theirs.state_dict())
    deep = nn.ModuleList(enc[down:] + dec[:-up])
    config = dict(teacher=dataclasses.asdict(teacher.config), batch=batch, clips=clips, frames=frames, noise=noise, seed=seed, lr=lr)
    run = loop.Run(out, config, {"deep": deep}, {"deep": Muon(deep, lr)}, loop.Plan(steps))
    if run.step == steps:
        return

    features, targets = [], []
    for i in tqdm(range(0, clips, 16), desc=f"features of {clips} clips", unit="batch", mininterval=5):
        with torch.no_grad(), autocast:
            x = toy.toy_batch((seed, 1, i), 16, frames, start=None)[0].to(device)
            h, _ = run_layers(enc_t[:down], x)
            d, _ = run_layers(dec_t[:-up], run_layers(enc_t[down:], h)[0])
        features.append(h.half())
        targets.append(d.half())
    features, targets = torch.cat(features), torch.cat(targets)
    variance = targets[:256].float().var()

    def picks(number):
        for n in itertools.count(number):
            yield torch.randint(len(features), (batch,), generator=torch.Generator().manual_seed(seed * 1_000_003 + n))

    def error(pick, number):
        with autocast:
            z = add_latent_noise(run_layers(enc[down:], features[pick].float())[0], noise, number)
            d = run_layers(dec[:-up], z)[0]
        loss = (d.float() - targets[pick].float()).square().mean() / variance
        yield "deep", loss, {"loss": loss.detach()}

    run.fit(picks(run.number), error, what="grow")


# ---------------------------------------------------------------------------------------------------- command line


def main_train(argv):
    p = argparse.ArgumentParser(prog="ae.py train", description="Train an autoencoder on a folder of clips, or a toy on the toy world. "
                                "Interrupted, the same command goes on where it stopped. What is left out has the default of the phase.")
    p.add_argument("--preset", choices=ae.PRESETS, default="toy", help="default: %(default)s")
    p.add_argument("--out", default="out/ae", help="folder for weights, logs and pictures (default: %(default)s)")
    p.add_argument("--data", nargs="+", metavar="FOLDER", help="clips to train on")
    p.add_argument("--overfit", metavar="CLIP", help="learn the beginning of one clip by heart instead")
    p.add_argument("--length", type=int, default=80, help="of that beginning, in frames (default: %(default)s)")
    p.add_argument("--phases", nargs="+", choices=list(FULL), help="default: all, one after the other")
    p.add_argument("--start", metavar="FILE", help="weights of the same preset to begin with")
    p.add_argument("--inflate", metavar="FILE", help="weights of an image autoencoder to begin with")
    p.add_argument("--steps", type=int, nargs="+", help="optimiser steps: one number for each phase, or one for all")
    p.add_argument("--batch", type=int, help="clips per step and process; in the phase image, so many times 8 (published sizes: 32) pictures")
    p.add_argument("--accumulate", type=int, help="batches per step")
    p.add_argument("--frames", type=int, help="frames per clip: whole chunks, two or more")
    p.add_argument("--size", type=video.size_arg, metavar="HxW", help="of the crops")
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.add_argument("--perceptual", default="auto", help="network of that loss, or none (default: the best one installed)")
    p.add_argument("--workers", type=int, default=2, help="threads that decode clips (default: %(default)s)")
    p.add_argument("--cache", metavar="FOLDER", help="where to keep decoded clips; about ten times faster to read")
    p.add_argument("--measure", action="store_true", help="train nothing; time the step against a straightforward loop -> results/train_speed.json")
    p.add_argument("--compile", action="store_true", help="torch.compile")
    p.add_argument("--fp32", action="store_true", help="no bf16")
    p.add_argument("--save-every", type=int, default=200, help="steps between checkpoints (default: %(default)s)")
    p.add_argument("--grow-from", metavar="FILE", help="toy: trained weights of a shallower autoencoder to start from")
    p.add_argument("--grow-steps", type=int, default=2400, help="toy: steps of the deep blocks alone (default: %(default)s)")
    p.add_argument("--grow-clips", type=int, default=4096, help="toy: clips for them (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of weights and clips")
    p.add_argument("--threads", type=int, help="CPU threads")
    a = p.parse_args(argv)
    if a.threads:
        torch.set_num_threads(a.threads)
    changes = {k: v for k in ("steps", "batch", "accumulate", "frames", "size", "lr") if (v := getattr(a, k)) is not None}
    if a.steps and len(a.steps) == 1:
        changes["steps"] = a.steps[0]
    if a.perceptual == "none":
        changes["perceptual"] = 0.0
    how = dict(seed=a.seed, save_every=a.save_every, bf16=not a.fp32)
    if a.measure:
        if not a.data or not a.cache:
            raise UserError("--measure needs --data with a folder of clips, and --cache with one for decoded clips.")
        result = measure(a.preset, a.data, a.cache, a.workers, changes, bf16=not a.fp32)
        checkpoint.write_json("results/train_speed.json", dict(**checkpoint.provenance(), data=a.data, **result))
        return print(f"seconds per step: {result['seconds_per_step']}\n{result['ratio']} times a straightforward loop; wrote "
                     "results/train_speed.json")
    if a.overfit:
        path = memorise(a.preset, a.overfit, a.out, a.length, changes=changes, compiled=a.compile, **how)
    elif a.data:
        path = train_clips(a.preset, a.data, a.out, a.phases, a.start, a.inflate, a.workers, a.cache, changes=changes, compiled=a.compile,
                           perceptual=a.perceptual, **how)
    elif a.preset.startswith("toy"):
        path = train(a.preset, a.out, grow_from=a.grow_from, grow_steps=a.grow_steps, grow_clips=a.grow_clips, **changes, **how)
    else:
        raise UserError(f"--preset {a.preset} needs --data with a folder of clips, or --overfit with one clip.")
    print("wrote", path)
