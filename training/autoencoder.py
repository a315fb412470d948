"""Training DC-AE-V: from a folder of clips to an autoencoder (paper, section on DC-AE-V).

A deep autoencoder is trained in phases, as the image DC-AE was, each starting from the
averaged weights of the one before:

    image    single frames, as a 2-D autoencoder: what a latent cell is to hold of space is
             learnt without time, at a third of the operations; then every kernel becomes
             the middle tap of a 3-D one (`inflate`)
    low      small crops, short clips, all layers
    high     large crops, long clips, the inner layers: a latent must mean the same at every
             size and length, and what depends on them sits next to the latent
    refine   small crops, the decoder's head alone, with a GAN: it paints texture, and cannot
             disturb the latent, which a diffusion model may have been trained on already

At the end of each phase that trains the encoder the latent scale 1/RMS is measured and
stored: the diffusion model sees scale * encode(x). Beyond the paper, a deep latent can be
asked to be easy to move into: `latents.Aligner` (--align-to), and the losses at the end of
`Phase`, which are off.

    python ae.py train --data CLIPS --preset small               all phases on a laptop
    python ae.py train --preset toy --align-to weights/toy-base.safetensors       95 minutes
    torchrun --nproc-per-node 8 ae.py train --data CLIPS --preset f32t4c32

Killed and started again, it goes on. OUT/PHASE/ holds log.jsonl, log.png, sheet.png
(original and reconstruction) and the weights, which `python ae.py eval` scores.
"""
import argparse
import dataclasses
import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import repeat
from torch.utils.checkpoint import checkpoint as recompute

import ae
import kernels
import toy
from chunk_causal import ISOLATED, Conv3d
from files import checkpoint, options, video
from files.checkpoint import UserError
from training import clips, latents, loop, losses, metrics
from training.muon import Muon


@dataclass(frozen=True)
class Phase:
    """One phase of the programme. Batch is per process; a weight of 0 switches a loss off."""

    name: str
    trained: str  # "all", "space", "inner", "head" or "decoder": see `part`
    size: tuple  # of the crops: rows, columns
    frames: int  # per clip: two chunks or more, else no path across their border is trained
    batch: int
    steps: int
    lr: float
    expected: str  # time, and score on held-out clips
    optimiser: str = "adamw"
    warmup: int = 500
    decay: str = "constant"
    accumulate: int = 1
    ema: float = 0.999
    images: float = 0.2  # share of steps that train on single frames, each as a clip alone
    perceptual_frames: int = 8  # of each clip
    disc_width: int = 64
    disc_lr: float = 1e-4

    # what is asked of the reconstruction
    l1: float = 1.0
    mse: float = 0.0
    jumps: float = 0.0  # `losses.jumps`
    border: float = 0.0  # `losses.border`: flashes between chunks
    perceptual: float = 0.5
    adversarial: float = 0.0
    noise: float = 0.0  # added before decoding: standard deviation over the latent's RMS

    # what is asked of the latent, so that it is easy to generate in
    align: float = 0.0  # to a base: `latents.Aligner`
    equivariance: float = 0.0  # the latent at half size is to give the clip at half size
    correlation: float = 0.0  # of neighbouring cells: `latents.correlation`; published: 0.002
    front: float = 0.0  # share of steps in which the decoder gets the first channels alone
    masked: float = 0.0  # share of steps in which it does not see some of the cells

    # what is asked of a light decoder: `distill.Distiller`
    full: float = 0.0  # pixels of the full decoder
    features: float = 0.0  # what its innermost stages give
    generated: float = 0.0  # share of steps on latents that a transformer made


CLIP_ENCODER = ("all", "inner")  # what trains the encoder of clips, and so can be aligned
LOSSES = ("l1", "mse", "jumps", "border", "perceptual", "adversarial", "noise",
          "equivariance", "correlation", "front", "masked")  # that --losses may set
DISTILLED = ("full", "features", "generated")

# What is known of DC-AE-V: chunks of 40 frames, no KL term, images and video together (from a
# name), EMA, evaluation and by a reviewer's word training on 80 frames. Of the image DC-AE:
# the phases. From Open-Sora 2.0: weights 1, 0.5, 0.05, a fifth of the steps on stills, AdamW
# betas (0.9, 0.98), lr 5e-5, clipping at 1. Our choice, since nothing is published: to begin
# with images; all steps, sizes and batches, which layers count as inner and as head, the
# learning rate of `low`, the noise on the latent.

#: For the published sizes on 8 H100. None of these has been run: times follow from the
#: operations (forward, once more for `recompute_blocks`, twice backward) at 40 % of the peak.
FULL = (
    Phase("image", "space", (256, 256), 1, 64, 50_000, 1e-4, "0.9 s per step, 13 hours",
          images=0.0, perceptual_frames=1),
    Phase("low", "all", (256, 256), 80, 2, 200_000, 1e-4,
          "7 s per step, 16 days; the released model has 31.1 dB"),
    Phase("high", "inner", (512, 512), 120, 1, 20_000, 5e-5, "11 s per step, 2.5 days"),
    Phase("refine", "head", (256, 256), 80, 2, 20_000, 5e-5,
          "2.5 s per step, 14 hours; sharper, PSNR a little lower", adversarial=0.05),
)
#: For `small` on a laptop whose CPU has units for bf16 (others take longer). Muon, because
#: AdamW hardly gets off the ground in so few steps (training/muon.py).
_LAPTOP = dict(optimiser="muon", warmup=50, decay="linear", ema=0.99, mse=1.0, disc_width=16)
_LOOK = dict(perceptual=0.1, perceptual_frames=2)
_PIXELS = dict(perceptual=0.0, images=0.0)
LAPTOP = (
    Phase("image", "space", (64, 64), 1, 64, 800, 4e-3,
          "0.6 s per step on one core, 8 minutes; 19.7 dB on frames of films held out",
          **_LAPTOP, **_PIXELS),
    Phase("low", "all", (64, 64), 16, 8, 500, 2e-4,
          "2 s per step, 18 minutes; 19.4 dB on clips", **_LAPTOP, **_LOOK),
    Phase("high", "inner", (128, 128), 32, 1, 100, 5e-4,
          "1.3 s per step, 2 minutes; 20.4 dB at 128x128", **_LAPTOP, **_LOOK),
    Phase("refine", "head", (64, 64), 16, 4, 100, 2e-4,
          "1.4 s per step, 2 minutes; sharper, 0.4 dB lower",
          adversarial=0.05, **_LAPTOP, **_LOOK),
)
#: For `film`, on one core without units for bf16. At a rate of 4e-4 what `image` gave was lost
#: in `low`.
FILM = (
    Phase("image", "space", (128, 128), 1, 16, 2400, 2.5e-3,
          "0.65 s per step, 26 minutes; 23.2 dB on films held out", **_LAPTOP, **_PIXELS),
    Phase("low", "all", (128, 128), 16, 2, 700, 1.2e-4,
          "3.1 s per step, 38 minutes; 23.4 dB", **_LAPTOP, perceptual=0.0),
)
#: For the toy autoencoders on the toy world, on one core. Once the encoder is frozen the
#: latent stays what it is: a transformer can be trained on it while the decoder still learns.
#: The noise spreads information evenly over the latent, which diffusion needs; more of it
#: later teaches the decoder to mend what a transformer's latents have wrong.
_TOY = dict(optimiser="muon", warmup=50, decay="linear", ema=0.0, mse=5.0)
_WORLD = dict(size=(toy.SIZE, toy.SIZE), frames=toy.FRAMES, batch=4)
TOY = (
    Phase("low", "all", **_WORLD, steps=2400, lr=6e-4, jumps=0.1, noise=0.1,
          expected="1.9 s per step, 75 minutes", **_TOY, **_PIXELS),
    Phase("decoder", "decoder", **_WORLD, steps=1000, lr=5e-4, jumps=0.4, border=1.0,
          noise=0.3, expected="1.2 s per step, 20 minutes", **_TOY, **_PIXELS),
)
#: One clip by heart: no stills, nothing held out, pixels only. Every window of two chunks is
#: drawn; judged is the whole clip.
MEMORISE = (
    Phase("memorise", "all", (128, 128), 16, 1, 500, 3e-3,
          "over 35 dB on the clip itself; 1 s per step, 8 minutes", **_LAPTOP, **_PIXELS),
)
LENGTH = 80  # frames of that clip
HELD_OUT = 9_000_000  # seed of toy clips that are trained on by nobody
JUDGED = 8  # held-out clips that a phase is judged on
MEASURED = 16  # batches that the latent's scale is measured on


def choose_phases(programme, config, names=None, begun=False, steps=None, batch=None, **changes):
    """The phases to run, in order, with what the user changes about them -> [Phase].

    names: by default all, but image where weights to begin with are given (`begun`). steps:
    a list of one number for all phases, or one for each. batch: of clips; in the phase image
    as many times more pictures as by default.
    """
    known = {phase.name: phase for phase in programme}
    names = names or [name for name in known if not (begun and name == "image")]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"there is no phase {unknown[0]} here: use {', '.join(known)}.")
    if "image" in names and (begun or names[0] != "image"):
        raise UserError("the phase image begins from nothing: name it first in --phases, and "
                        "without --start and --inflate.")
    if steps and len(steps) not in (1, len(names)):
        raise UserError(f"--steps has {len(steps)} numbers for {len(names)} phases "
                        f"({', '.join(names)}): give one, or one for each.")
    phases = []
    for i, name in enumerate(names):
        own = dict(changes)
        if steps:
            own["steps"] = steps[i % len(steps)]
        if batch:
            own["batch"] = batch
        if name == "image":
            own["frames"] = 1
            pictures = known["image"].batch // known["low"].batch  # in place of each clip
            own["batch"] = (batch or known["low"].batch) * pictures
        phases.append(dataclasses.replace(known[name], **own))
        check(phases[-1], config)
    return phases


def check(phase, config):
    """UserError where a phase does not fit an autoencoder."""
    cell, piece = config.spatial_factor, config.piece
    if phase.trained != "space" and (phase.frames % piece or phase.frames < 2 * piece):
        raise UserError(f"--frames must be a multiple of the chunk ({piece}) and at least two "
                        f"chunks, got {phase.frames}.")
    if phase.size[0] % cell or phase.size[1] % cell:
        raise UserError(f"--size must be multiples of a latent cell ({cell} pixels), got "
                        f"{phase.size[0]}x{phase.size[1]}.")
    even = not (phase.size[0] % (2 * cell) or phase.size[1] % (2 * cell))
    if (phase.equivariance or phase.correlation) and not even:
        raise UserError(f"equivariance and correlation need an even number of latent cells a "
                        f"side: give --size in multiples of {2 * cell}.")


# -------------------------------------------------------------- what is trained


def through_time(net):
    """The two blocks that resample time, of the encoder and of the decoder."""
    return net.encoder.stages[-2].op_list[-1], net.decoder.stages[-2].op_list[0]


def part(net, which):
    """The layers that a phase trains, as a module list.

    all: everything. space: all but what resamples time. inner: the two deepest stages of
    encoder and decoder, on both sides of the temporal resampling, and the projections to and
    from the latent. decoder: all of it. head: its last stage and the projection to pixels.
    """
    enc, dec = net.encoder, net.decoder
    if which == "all":
        blocks = [enc, dec]
    elif which == "space":
        blocks = [b for b in (*enc.layers, *dec.layers) if b not in through_time(net)]
    elif which == "inner":
        deep = [*enc.stages[-2:], *dec.stages[-2:]]
        blocks = [*deep, enc.project_out, dec.project_in]
    elif which == "decoder":
        blocks = [dec]
    elif which == "head":
        blocks = [dec.stages[net.config.mirror.first], dec.project_out]
    return nn.ModuleList(blocks)


def optimiser(which, module, lr):
    """Muon, or AdamW without weight decay as everybody trains these."""
    if which == "muon":
        return Muon(module, lr)
    return torch.optim.AdamW(module.parameters(), lr, betas=(0.9, 0.98), weight_decay=0)


def prepare(net, device):
    """Move a net to where it is trained. On a GPU: channels last, which cuDNN's 3-D kernels
    want, and `recompute_blocks`."""
    net.to(device)
    if device.type == "cuda":
        net.to(memory_format=torch.channels_last_3d)
        recompute_blocks(net)
    return net


def recompute_blocks(net):
    """Activation checkpointing: a block keeps only its input and is computed once more in the
    backward pass. Same numbers, less memory."""
    for block in (*net.encoder.layers, *net.decoder.layers):
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False)


# -------------------------------------------------------------- one step


def stills(x, per_clip):
    """[b, 3, t, h, w] -> `per_clip` evenly spaced frames of each, every one repeated for one
    latent frame, as single images are encoded: [b n, 3, 4, h, w]."""
    frames = x[:, :, torch.linspace(0, x.shape[2] - 1, per_clip).round().long()]
    return repeat(frames, "b c n h w -> (b n) c t h w", t=4)


@dataclass
class Objective:
    """The losses of a batch, as `loop.Run.fit` wants them: for the autoencoder, then for the
    discriminator if there is one. Whether the batch is one of clips or of stills, and all
    that is random, depend on (seed, number) alone."""

    net: ae.DCAEV
    phase: Phase
    seed: int = 0
    autocast: torch.autocast = torch.autocast("cpu", enabled=False)
    perceptual: losses.Perceptual | None = None
    disc: losses.Discriminator | None = None
    aligner: latents.Aligner | None = None
    mask: latents.MaskToken | None = None
    distiller: nn.Module | None = None  # training/distill.py: of a light decoder

    def __call__(self, x, number):
        net, phase, state = self.net, self.phase, None
        rng = np.random.default_rng((self.seed, number))
        if rng.random() < phase.images:  # as many frames as the clips would have had
            x, state = stills(x, x.shape[2] // net.config.temporal_factor), ISOLATED
        with self.autocast:
            if self.distiller:
                x, y, values = self.distiller(net, phase, x, state, rng)
            else:
                z, values = net.encoder(x, state)[0], {}
                y = net.decoder(self.disturbed(z, rng), state)[0].float()
        if phase.l1:
            values["l1"] = losses.l1(y, x)
        if phase.mse:
            values["mse"] = (y - x).square().mean()
        if phase.jumps:
            values["jumps"] = losses.jumps(y, x)
        if phase.border and state is None:
            values["border"] = losses.border(y, x, net.config.piece)
        if phase.perceptual:
            frames = torch.Generator().manual_seed(int(rng.integers(2**31)))
            values["perceptual"] = self.perceptual(y, x, frames)
        if phase.equivariance:
            with self.autocast:
                small = net.decoder(F.avg_pool3d(z, (1, 2, 2)), state)[0]
            values["equivariance"] = losses.l1(small, F.avg_pool3d(x, (1, 2, 2)))
        if self.aligner and state is None:
            values["align"] = self.aligner(x, z)
        loss = sum(getattr(phase, name) * value for name, value in values.items())
        if phase.correlation:
            values["correlation"] = latents.correlation(z)
            last = net.encoder.project_out.conv.weight
            balance = losses.adaptive_weight(loss, values["correlation"], last)
            loss = loss + phase.correlation * balance * values["correlation"]
        if self.disc:
            self.disc.requires_grad_(False)  # its gradient is not wanted here
            with self.autocast:
                values["adversarial"] = losses.hinge_g(self.disc(y))
            self.disc.requires_grad_(True)
            *_, last = (p for p in net.decoder.project_out.parameters() if p.ndim == 5)
            values["lambda"] = losses.adaptive_weight(loss, values["adversarial"], last)
            loss = loss + phase.adversarial * values["lambda"] * values["adversarial"]
        values = {name: value.detach() for name, value in values.items()}
        psnr = -10 * torch.log10((y.detach() - x).square().mean() / 4)
        yield "net", loss, {"loss": loss.detach(), "train_psnr": psnr, **values}
        if self.disc:
            with self.autocast:
                loss = losses.hinge_d(self.disc(x), self.disc(y.detach()))
            yield "disc", loss, {"disc": loss.detach()}

    def trained(self):
        """-> ({name: module}, {name: optimiser}) of all that the phase trains."""
        phase, adapters = self.phase, self.distiller and self.distiller.adapters
        layers = part(self.net, phase.trained).requires_grad_(True)
        nets, optimisers = {"net": self.net}, {"net": optimiser(phase.optimiser, layers, phase.lr)}
        beside = dict(disc=(self.disc, phase.disc_lr), align=(self.aligner, 5e-3),
                      adapters=(adapters, 1e-3), mask=(self.mask, phase.lr))
        for name, (module, lr) in beside.items():
            if module is not None:
                nets[name] = module.requires_grad_(True)
                optimisers[name] = optimiser("adamw", module, lr)
        return nets, optimisers

    @torch.no_grad()
    def judge(self, held_out, stream):
        """Reconstruct held-out clips [n, 3, t, h, w] -> ({name: number}, [a few originals,
        a full decoder's of them where there is one, reconstructions])."""
        net, measured = self.net, {}
        device = next(net.parameters()).device
        z, y = [], []
        with self.autocast:
            for x in held_out.split(1):
                z.append(net.encode(x.to(device)).float())
                y.append(net.decode(z[-1], x.shape[2], x.shape[3:]).float().cpu())
            if self.aligner:
                some = itertools.islice(stream(0), self.aligner.BATCHES)
                unseen = (x.to(device) for x in held_out.split(1))
                measured["r_squared"] = self.aligner.r_squared(net, some, unseen)
        y = torch.cat(y)
        columns = [held_out[:4], y[:4]]
        if self.distiller:
            full = self.distiller.decode(z, held_out.shape, self.autocast)
            columns.insert(1, full[:4])
            measured["psnr_full"] = metrics.psnr(y, full)
        for name, value in metrics.latent_statistics(z).items():
            measured[f"latent_{name}"] = value
        found = dict(psnr=metrics.psnr(y, held_out), ssim=metrics.ssim(y, held_out))
        return found | measured, columns

    def disturbed(self, z, rng):
        """The latent as the decoder gets it."""
        phase = self.phase
        if phase.noise:
            z = latents.add_latent_noise(z, phase.noise, int(rng.integers(2**31)))
        if phase.front and rng.random() < phase.front:
            z = latents.first_channels(z, rng)
        if phase.masked and rng.random() < phase.masked:
            z = self.mask(z, rng)
        return z


# -------------------------------------------------------------- where clips come from


@dataclass(frozen=True)
class Films:
    """Folders of clips (training/clips.py)."""

    folders: list
    workers: int = 2
    cache: str | None = None
    fps: float | None = None  # at which they are read; None: their own rates

    @property
    def about(self):
        data = dict(data=" ".join(Path(folder).name for folder in self.folders))
        return dict(data, fps=self.fps) if self.fps else data

    def stream(self, phase, seed, device):
        """-> function of the number of a batch: the batches from that one on."""
        dataset = clips.Clips(self.folders, phase.frames, phase.size, "train", seed,
                              cache=self.cache, fps=self.fps)
        for reason in dataset.skipped.values():
            print(f"skipped: {checkpoint.printable(reason)}")
        return lambda number: clips.loader(dataset, phase.batch, number, self.workers,
                                           loop.rank(), loop.processes(), device)

    def held_out(self, phase):
        """-> list of clips [3, t, h, w]"""
        return clips.validation(self.folders, phase.frames, phase.size, JUDGED, fps=self.fps)


@dataclass(frozen=True)
class ToyWorld:
    """Clips of the toy world (toy.py), no two alike."""

    about = {}

    def stream(self, phase, seed, device):
        def batches(number):
            for n in itertools.count(number):
                place = (seed, loop.processes() * n + loop.rank())
                x, _ = toy.toy_batch(place, phase.batch, phase.frames, phase.size[0], True)
                yield x.to(device)

        return batches

    def held_out(self, phase):
        return list(toy.toy_batch(HELD_OUT, 2 * JUDGED, phase.frames, phase.size[0])[0])


@dataclass(frozen=True)
class OneClip:
    """The beginning of one clip, LENGTH frames, and every window of it."""

    path: str

    @property
    def about(self):
        return dict(data=Path(self.path).name, length=LENGTH)

    def stream(self, phase, seed, device):
        film, = self.held_out(phase)
        starts = film.shape[1] - phase.frames + 1
        if starts < 1:
            raise UserError(f"{self.path} has {film.shape[1]} frames, fewer than {phase.frames}: "
                            "give a longer clip, or fewer --frames.")

        def windows(number):
            for n in itertools.count(number):
                drawn = np.random.default_rng((seed, n)).integers(0, starts, phase.batch)
                cut = [film[:, s : s + phase.frames] for s in drawn.tolist()]
                yield torch.stack(cut).to(device)

        return windows

    def held_out(self, phase):
        return [video.read_clip(self.path, LENGTH, phase.size)]


# -------------------------------------------------------------- the programme


@dataclass(frozen=True)
class Settings:
    """What all phases of a run have in common."""

    seed: int = 0
    save_every: int = 200
    bf16: bool = True
    perceptual: str = "auto"  # network of that loss
    start: str | None = None  # weights of the same preset to begin with
    inflate: str | None = None  # weights of an image autoencoder to begin with
    align_to: tuple = ()  # files of `latents.Teacher`


def train(preset, phases, source, out, settings=Settings()):
    """Train a preset, phase after phase -> path of the last weights."""
    device, config = loop.start(), ae.PRESETS[preset]
    teacher = None
    if settings.align_to:
        teacher = latents.Teacher(settings.align_to, device)
        teacher.check(config)
    torch.manual_seed(settings.seed)
    net = ae.load(settings.start, config) if settings.start else fresh(config)
    if settings.inflate:
        print(inflate(net, checkpoint.load_tensors(settings.inflate)[0]))
    prepare(net, device)
    for phase in phases:
        folder = Path(out) / phase.name
        if phase.trained != "space":
            path = run_phase(preset, net, phase, source, folder, settings, teacher)
            continue
        flat = prepare(image_autoencoder(net.config), device)
        path = run_phase(f"{preset}-image", flat, phase, source, folder, settings)
        print(inflate(net, flat.state_dict()))
    return path


@torch.no_grad()
def fresh(config):
    """An untrained autoencoder whose residual blocks begin as the identity. Else what they
    add, as large as the signal and still noise, is drowned: the layers between them grow, by
    four orders of magnitude in one trial, and the blocks do nothing from then on."""
    net = ae.DCAEV(config)
    for block in net.modules():
        if isinstance(block, ae.ResBlock):
            block.main.conv2.norm.weight.zero_()
    return net


def names(*files):
    """Of files, without the folders of the machine that they lie on."""
    return " ".join(Path(file).name for file in files if file)


def run_phase(name, net, phase, source, out, settings, teacher=None, distiller=None):
    """Train `net` in place through one phase in folder `out` -> path of its weights NAME, the
    averaged ones; with a `distiller` those of its decoder."""
    device, seed = next(net.parameters()).device, settings.seed
    stream, held_out = source.stream(phase, seed, device), torch.stack(source.held_out(phase))
    torch.manual_seed(seed)
    net.requires_grad_(False)
    objective = Objective(net, phase, seed, kernels.autocast(device, settings.bf16))
    if teacher and phase.trained in CLIP_ENCODER:
        objective.aligner = latents.Aligner(teacher, net, stream).to(device)
    if phase.adversarial:
        objective.disc = losses.Discriminator(phase.disc_width).to(device)
    if phase.masked:
        objective.mask = latents.MaskToken(net.config.latent_channels).to(device)
    if phase.perceptual:
        network = losses.Perceptual(settings.perceptual, phase.perceptual_frames)
        objective.perceptual = network.to(device)
    objective.distiller = distiller

    plan = loop.Plan(phase.steps, phase.warmup, phase.decay, 1.0, phase.accumulate, phase.ema,
                     settings.save_every)
    config = run_config(name, objective, source, settings)
    run = loop.Run(out, config, *objective.trained(), plan)

    def report(run):
        with run.averaged():
            measured, columns = objective.judge(held_out, stream)
        rows = list(itertools.chain(*zip(*columns)))
        scale = max(1, 96 // held_out.shape[3])
        video.contact_sheet(out / "sheet.png", rows, columns=8, scale=scale)
        loop.plot(out)  # up to the checkpoint before
        return measured

    run.fit(stream(run.number), objective, report, phase.name)
    loop.copy_into(net, run.average)  # the next phase goes on from it
    net.requires_grad_(False)
    about, written = {}, "decoder." if distiller else ""
    if phase.trained not in ("decoder", "head"):  # else the latent is what it was
        with torch.no_grad(), objective.autocast:
            some = itertools.islice(stream(0), MEASURED)
            about["latent"] = metrics.latent_statistics(net.encode(x).float() for x in some)
        scale = float(f"{about['latent']['inverse_rms']:.4g}")
        net.config = dataclasses.replace(net.config, scale=scale)
    path = out / f"{name}.safetensors"
    if loop.rank() == 0:
        loop.plot(out)
        about["log"] = [line for line in loop.read_log(out) if "psnr" in line]
        ae.save(net, path, torch.float16, written, training=run.config, **about)
    return path


def run_config(name, objective, source, settings):
    """What decides the result of a phase, in plain values."""
    net, distiller = objective.net, objective.distiller
    config = dataclasses.asdict(objective.phase) | dataclasses.asdict(net.config) | source.about
    config |= dict(preset=name, seed=settings.seed, bf16=settings.bf16)
    config |= dict(start=names(settings.start), inflated=names(settings.inflate))
    config["align_to"] = objective.aligner and names(*settings.align_to)
    config["perceptual_network"] = objective.perceptual and objective.perceptual.name
    config |= distiller.about if distiller else {}
    for key in ("expected", "scale"):
        del config[key]
    for key in ("decoder_depths", "separable", "border", *DISTILLED):
        if not config[key]:  # runs begun before there were these go on
            del config[key]
    return config


# -------------------------------------------------------------- from images to video


class Still(nn.Module):
    """What is left of a 3-D convolution on single frames: its middle tap."""

    def __init__(self, conv):
        super().__init__()
        weight = conv.weight[:, :, 1].detach() * 3**0.5  # of a third of the inputs: as strong
        self.weight, self.bias, self.groups = nn.Parameter(weight), conv.bias, conv.groups

    def forward(self, x, state=None):
        x = F.conv2d(x[:, :, 0], self.weight, self.bias, padding=1, groups=self.groups)
        return x[:, :, None], state


def image_autoencoder(config):
    """The 2-D autoencoder of these widths, for clips of one frame: a third of the operations.
    What resamples time does nothing, so the widths on both sides of it must be equal, as they
    are in all published presets."""
    if config.widths[-1] != config.widths[-2]:
        raise ValueError(f"the last two widths, {config.widths[-2:]}, must be equal for an image "
                         "autoencoder to start from.")
    net = fresh(dataclasses.replace(config, temporal_factor=1, chunk=1))
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv3d):
                setattr(module, name, Still(child))
    for block in through_time(net):
        block.requires_grad_(False)
        *_, weight, bias = block.parameters()  # of its last convolution
        nn.init.zeros_(weight), nn.init.zeros_(bias)
    return net


@torch.no_grad()
def inflate(net, tensors):
    """Start `net` from an image autoencoder's weights -> a sentence about what fitted.

    A 3x3 kernel becomes the middle tap of a 3x3x3 one (the last, where it is causal), the
    other taps zero; biases and norms are copied. What resamples time has no counterpart in an
    image, nor has the stage behind it, unless it is there by name: the last layer of their
    branches starts from zero, so that only the shortcuts are left, averaging four frames and
    repeating them. (Not all layers: behind a zero no gradient arrives.) A clip that stands
    still then gives, frame by frame, what the image autoencoder gives. Names are those of our
    own files; tensors of other names (the attention blocks of the published DC-AE) are left
    out, and counted.
    """
    own, used, n = net.state_dict(), set(), len(net.config.widths)
    now = 2 if net.config.temporal == "causal" else 1  # the tap on the frame itself
    for name, value in own.items():
        flat = tensors.get(name)
        if flat is None:
            continue
        if flat.ndim == 4 and value.ndim == 5 and flat.shape == value[:, :, now].shape:
            value.zero_()
            value[:, :, now] = flat
            used.add(name)
        elif flat.shape == value.shape:
            value.copy_(flat)
            used.add(name)
    if not used:
        raise UserError("no tensor of the image autoencoder fits this preset by name and shape: "
                        "use a DC-AE of the same widths.")
    down = len(net.encoder.stages[n - 2].op_list) - 1  # the encoder's block that resamples time
    temporal = (f"encoder.stages.{n - 1}.", f"encoder.stages.{n - 2}.op_list.{down}.",
                f"decoder.stages.{n - 1}.", f"decoder.stages.{n - 2}.op_list.0.")
    last = re.compile(r"main\.conv\.conv\.|conv2\.norm\.")
    for name, value in own.items():
        if name.startswith(temporal) and name not in used and last.search(name):
            value.zero_()
    left = len(tensors) - len(used)
    return (f"inflated {len(used)} of {len(own)} tensors; {left} tensors of the image "
            "autoencoder had no place.")


# -------------------------------------------------------------- command line

def loss_weight(known):
    """argparse type: "jumps=0.5" -> ("jumps", 0.5), of a name that is known."""
    def convert(text):
        name, _, weight = text.partition("=")
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not NAME=WEIGHT, with a name of {', '.join(known)}")
        return name, options.real(0, 1e6)(weight)

    return convert


def add_shared(p, known_losses):
    """The arguments of every training of an autoencoder, or of a part of one."""
    add = p.add_argument
    add("--data", nargs="+", metavar="FOLDER", help="clips to train on")
    add("--fps", type=video.rate_arg, default="native",
        help="at which these are read (default: native, their own rates)")
    add("--phases", nargs="+", metavar="NAME", help="default: all, one after the other")
    add("--steps", type=options.whole(1), nargs="+",
        help="one number for each phase, or one for all")
    add("--batch", type=options.whole(1, 65536),
        help="clips per step and process; in the phase image, so many times 8 (published "
        "sizes: 32) pictures")
    add("--accumulate", type=options.whole(1, 65536), help="batches per step")
    add("--frames", type=options.whole(1, 10_000),
        help="frames per clip: whole chunks, two or more")
    add("--size", type=video.size_arg, metavar="HxW", help="of the crops")
    add("--lr", type=options.learning_rate, help="peak learning rate")
    add("--losses", nargs="+", type=loss_weight(known_losses), default=(), metavar="NAME=WEIGHT",
        help=f"other weights than the phase's; 0 is off: {', '.join(known_losses)}")
    add("--workers", type=options.whole(0, 256), default=2,
        help="threads that decode clips (default: %(default)s)")
    add("--cache", metavar="FOLDER", help="keep decoded clips there: ten times faster to read")
    add("--fp32", action="store_true", help="no bf16")
    add("--save-every", type=options.whole(1), default=200,
        help="steps between checkpoints (%(default)s)")
    add("--seed", type=options.seed, default=0, help="of weights and clips")
    add("--threads", type=options.threads, help="CPU threads")


def choose_source(p, a, given, full, laptop, toy_world):
    """Films or the toy world -> (source, programme: one of the three)."""
    if a.data:
        films = Films(a.data, a.workers, a.cache, None if a.fps == "native" else a.fps)
        return films, full if a.preset.startswith(("f32", "f64")) else laptop
    p.refuse("a run without --data", given & {"workers", "cache", "fps"})
    if a.preset.startswith("toy"):
        return ToyWorld(), toy_world
    raise UserError(f"--preset {a.preset} needs --data with a folder of clips.")


def changes_of(a):
    """What the arguments change about every phase."""
    changes = dict(a.losses)
    for name in ("accumulate", "frames", "size", "lr"):
        if getattr(a, name) is not None:
            changes[name] = getattr(a, name)
    return changes


def arguments():
    p = options.Parser(
        prog="ae.py train",
        description="Train an autoencoder on a folder of clips, or a toy on the toy world. "
        "Interrupted, the same command goes on where it stopped. What is left out has the "
        "default of the phase.")
    add = p.add_argument
    add("--preset", choices=ae.PRESETS, default="toy", help="default: %(default)s")
    add("--out", default="out/ae", help="folder for weights, logs, pictures (default: %(default)s)")
    add("--overfit", metavar="CLIP", help=f"learn {LENGTH} frames of one clip by heart instead")
    add("--start", metavar="FILE", help="weights of the same preset to begin with")
    add("--inflate", metavar="FILE", help="weights of an image autoencoder to begin with")
    add("--align-to", nargs="+", default=(), metavar="FILE",
        help="a base that the latent is to predict: weights of its autoencoder, and of its "
        "transformer; or its name, for files in checkpoints/NAME")
    add("--align-weight", type=options.real(0, 1e6), default=0.05,
        help="of that loss (default: %(default)s)")
    add_shared(p, LOSSES)
    p.refuse_gone(options.GONE["ae.py train"])
    return p


def refuse_unused(p, a, given):
    """UserError for an option that this run would ignore."""
    if a.overfit:
        p.refuse("--overfit, which reads one clip", given & {"data", "workers", "cache", "fps"})
    if not a.align_to:
        p.refuse("a run without --align-to", given & {"align_weight"})
    if a.inflate:
        p.refuse("--inflate, which begins with other weights", given & {"start"})


def main_train(argv):
    p = arguments()
    a, given = p.parse(argv)
    refuse_unused(p, a, given)
    if a.overfit:
        source, programme = OneClip(a.overfit), MEMORISE
    else:
        laptop = FILM if a.preset == "film" else LAPTOP
        source, programme = choose_source(p, a, given, FULL, laptop, TOY)
    changes = changes_of(a)
    if a.align_to:
        changes["align"] = a.align_weight
    begun, config = bool(a.start or a.inflate), ae.PRESETS[a.preset]
    phases = choose_phases(programme, config, a.phases, begun, a.steps, a.batch, **changes)
    if a.align_to and not any(phase.trained in CLIP_ENCODER for phase in phases):
        raise UserError("--align-to needs a phase that trains the encoder of clips: low or high.")
    settings = Settings(a.seed, a.save_every, not a.fp32, start=a.start, inflate=a.inflate,
                        align_to=tuple(a.align_to))
    loop.start(a.threads)
    with loop.lock(a.out):
        path = train(a.preset, phases, source, a.out, settings)
    if a.overfit:
        log = [line for line in loop.read_log(path.parent) if "psnr" in line]
        about = dict(clip=Path(a.overfit).name, length=LENGTH, preset=a.preset)
        phase = dataclasses.asdict(phases[0])
        told = dict(**checkpoint.provenance(), **about, phase=phase, log=log)
        checkpoint.write_json(Path(a.out) / "overfit.json", told)
    print("wrote", path)
