"""What AE-Adapt-V has to know of a pre-trained model: one row for each base.

The stages of `adapt.py` are the same for every video diffusion transformer. What
differs is said here, by a `Base`:

    settings   how each stage is run: what was published for it
    models     the base as it is ("teacher"), and the same model around the deep
               autoencoder ("student"), whose transformer is still to come
    experts    its transformers, with the range of times in which each of them works:
               one, or the two of Wan 2.2 A14B
    sources    the training data and the held-out clips: captioned, in both latent
               spaces (training/cache.py)
    videos     what it renders after each stage, with the same noise

A new base is a row of BASES: a released model (`released.RELEASED`) and what of the
published settings changes for it. One that is made of other parts, as the toy and the
folders of diffusers are, overrides the methods in which it differs.
"""
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

import ae
import flow
import kernels
import sample
import toy
from families import folder
from files.checkpoint import UserError
from files.options import TYPES
from training import cache, captions, toy_base, toy_score
from training.entries import hash_of, hash_tensors
from training.journal import decoded
from wan import models, released
from wan import nets as wan_nets

RENDERED = 4  # videos after each stage
WORKERS = 2  # threads that decode clips, and later read entries ahead


@dataclass(frozen=True)
class Settings:
    """How the stages are run. The defaults are the published ones for a 14B model; most
    are options of adapt.py."""

    align: str = "sgd"  # stage 1a: sgd, closed_form, ridge_to_init, noise_aware, random
    head: str = "zero"  # what stage 1b starts from: zero, or closed_form
    time_sampling: str = "released"  # of stages 1b and 2: released, or shifted (flow.Times)
    shift: float = 8.0  # of the time sampling; 5 for image-to-video
    null: str = "negative"  # for a dropped prompt: the base's negative prompt, or empty
    drop: float = 0.1  # share of dropped prompts
    clips_align: int = 4096  # stage 1a reads so many at most
    steps_align: int = 20_000
    lr_align: float = 2e-4
    batch_align: int = 4  # clips
    steps_head: int = 6_000
    lr_head: float = 1e-4
    warmup_head: int = 0
    steps: int = 8_000  # of stage 2
    optimiser: str = "adamw"  # of stage 2; muon is for few steps of small networks
    lr: float = 5e-5
    warmup: int = 1_000
    decay: str = "constant"  # of the rate after its warm-up: constant, linear
    rank: int = 256  # of the LoRA; its alpha is twice that
    clip: float = 0.1  # largest norm of the gradient
    ema: float = 0.9999  # of stage 2: the average is evaluated and exported; 0: none
    batch: int = 2  # clips per process
    accumulate: int = 0  # batches per step; 0: as many as make the published 32 clips
    checkpoint_blocks: bool = True  # recompute blocks backwards: a third more time
    dtype: str = "bf16"  # of frozen weights and products (`computed_in`); what is trained is fp32
    export: str = "bf16"  # of the exported transformer
    seed: int = 0

    @property
    def alpha(self):
        return 2 * self.rank

    def accumulated(self, processes):
        """Batches per step and process."""
        if self.accumulate:
            return self.accumulate
        if 32 % (self.batch * processes):
            raise UserError(f"32 clips per step, as published, cannot be divided among {processes} "
                            f"processes with --batch {self.batch}: give --accumulate, the number "
                            "of batches per step.")
        return 32 // (self.batch * processes)

    def computed_in(self, device):
        """The type of frozen weights and matrix products: `dtype`, but fp32 on a CPU that
        multiplies bf16 numbers one by one."""
        return torch.float32 if self.dtype == "fp32" else kernels.matmul_type(torch.device(device))


# ------------------------------------------------ the deep autoencoder

#: target -> file names under which the autoencoder is published
TARGETS = {name: (f"dc-ae-v-{name}-1.0-bf16.pt", f"dc-ae-v-1.0-{name}-bf16.pt")
           for name in ("f32t4c32", "f64t4c128")}


def target_of(config):
    """Name of an autoencoder's latent space, as in f32t4c32."""
    return f"f{config.spatial_factor}t{config.temporal_factor}c{config.latent_channels}"


def deep_autoencoder(target, file, folders):
    """The autoencoder to move to: from `file`, or from one of the folders under a
    published name. UserError where it is another one."""
    path = Path(file) if file else released.find(TARGETS[target], folders)
    if path is None:
        raise UserError(f"the deep autoencoder is in none of {', '.join(map(str, folders))}: name "
                        "its file with --ae, or with --weights the folder that holds "
                        f"{' or '.join(TARGETS[target])}.")
    net = ae.load(path)
    if target_of(net.config) != target:
        raise UserError(f"{path} is an autoencoder {target_of(net.config)}, not {target}: give "
                        "another file with --ae, or another --target.")
    return net


def deep_net(teacher, autoencoder):
    """The teacher's transformer in the latent space of an autoencoder, still to come."""
    net = teacher.net
    return type(net)(None, config=net.nets.deep_config(net.config, autoencoder.config))


def buckets_of(args, autoencoder):
    """The family of frame sizes: --buckets, or the published one."""
    return args.buckets or f"480F{autoencoder.config.spatial_factor}MS"


# ------------------------------------------------ a base


class Expert(NamedTuple):
    """One transformer of a base, and the times that it works at."""

    name: str  # "", or "high" and "low"
    path: Path
    low: float = flow.Times.low  # times t / 1000 in [low, high)
    high: float = flow.Times.high
    nets: ModuleType = wan_nets  # what knows its kind of transformer

    @property
    def prefix(self):
        """What the names of its folders begin with."""
        return f"{self.name}-" if self.name else ""

    def load(self, dtype=torch.float32, device="cpu"):
        """The base's transformer, frozen."""
        return self.nets.load(self.path, dtype=dtype, device=device).requires_grad_(False)

    def embedder(self):
        """Its patch embedder alone, in fp32; nothing else is read."""
        return self.nets.embedder(self.path)

    def fingerprint(self):
        """Hash of what differs between any two trained models; quick for 14B."""
        config, small = self.nets.fingerprint(self.path)
        return hash_of([config, hash_tensors(small)])


@dataclass(frozen=True)
class Base:
    """A released Wan model as a base, and its data: a folder, table or archive of
    captioned clips."""

    name: str  # of released.RELEASED
    settings: Settings = Settings()
    guidance: float | tuple = 5.0  # of the adapted model
    validation: int = 32  # held-out samples that a loss is measured on
    labels: tuple | None = None  # of the videos
    gpus: int = 8  # that a plan is made for
    format: str = "original"  # of the exported transformer
    lora_formats: tuple = ("comfyui", "kohya", "peft")

    def outline(self):
        """Its Model without weights: enough to plan."""
        return released.outline(self.name)

    def folders(self, args):
        """Where its files are, and the deep autoencoder's."""
        return [Path(w) for w in args.weights] or [Path("checkpoints") / self.name]

    def load(self, args, dtype):
        """Its Model on args.device, whose transformer is not read."""
        return released.load_model(
            self.name, self.folders(args), (), dtype, args.device, args.text_cache)

    def models(self, args, settings):
        """-> (teacher, student), two `models.Model` on args.device whose transformers
        are not read."""
        autoencoder = deep_autoencoder(args.target, args.ae, self.folders(args))  # likelier to miss
        teacher = self.load(args, TYPES[settings.dtype])
        return teacher, self.student(teacher, autoencoder, settings, buckets_of(args, autoencoder))

    def student(self, teacher, autoencoder, settings, buckets):
        """The teacher around the deep autoencoder. It samples as the released
        DC-VideoGen models do, in the 16:9 that it is trained at."""
        size = captions.bucket_sizes(buckets)[0.5625]
        changed = dict(
            name=f"{self.name} in {target_of(autoencoder.config)}",
            net=deep_net(teacher, autoencoder),
            low=None,
            ae=autoencoder,
            ae_dtype=TYPES[settings.dtype],
            size=size,
            frames=80,
            area=size[0] * size[1] if teacher.area else 0,
            picture="dc",
            solver="unipc_diffusers",
            shift=teacher.shift if teacher.low else 5.0,
            guidance=self.guidance)
        if settings.null == "empty":
            changed["negative"] = ""
        return replace(teacher, **changed).to(teacher.device)

    def experts(self, teacher):
        """Its transformers, the one for high noise first."""
        if teacher.low is None:
            return [Expert("", teacher.net.path, nets=teacher.net.nets)]
        return [Expert("high", teacher.net.path, low=teacher.boundary),
                Expert("low", teacher.low.path, high=teacher.boundary)]

    def sources(self, teacher, student, args, settings):
        """-> (training data, held-out data)"""
        if not args.data:
            raise UserError(f"--base {self.name} needs --data: a folder of captioned clips (x.mp4 "
                            "with x.txt), a CSV, a JSONL or a web-dataset tar.")
        source = cache.Source(
            args.data, student,
            teacher=None if args.continue_from else teacher,  # only stage 1 reads its latents
            folder=None if args.cache == "memory" else args.cache,
            buckets=buckets_of(args, student.ae), frames=args.frames,
            fps=args.fps, caption_per_line=args.caption_per_line,
            seed=settings.seed, drop=settings.drop, null=settings.null,
            workers=WORKERS, verify=args.stage == "cache")
        return source, source.held_out()

    def weights(self, args):
        """Where sample.py finds what the adapted model has from the base."""
        return args.weights

    def before(self, teacher, held):
        """What to measure first, for comparison -> (transformer, its Model, its
        held-out data), or None: a large base is known well enough."""

    def score(self, model, args):
        """Further numbers about a model -> dict."""
        return {}

    @torch.no_grad()
    def videos(self, model, expert, held, steps):
        """RENDERED videos from the prompts (and pictures) of held-out clips -> list of [3, t,
        h, w]; the i-th with noise i, by plain Euler.

        An expert alone shows what it does: that for low noise starts from a held-out
        clip under as much noise as it gets, that for high noise ends with its last
        estimate of the clean latent.
        """
        sigmas, times = flow.schedule("euler", max(steps, 4), model.shift)
        inside = (times >= 1000 * expert.low) & (times < 1000 * expert.high)
        sigmas, times = torch.cat([sigmas[:-1][inside], torch.zeros(1)]), times[inside]
        batch = held.batch(0, range(RENDERED))
        null = held.held_out(drop=1.0).batch(0, range(RENDERED)).prompt[0].to(model.device)
        context, *clip = (part.to(model.device) for part in batch.prompt)
        condition = None if batch.condition is None else batch.condition.to(model.device)
        image = models.ImageCondition(condition, clip=clip[0] if clip else None)
        how = sample.Sampling(guidance=model.guidance, cfg_batch=False, plain=True)
        velocity = sample.Velocity(model, context, null, image, times, how)

        noise = sample.draw_noise(model, batch.z.shape[2:], range(RENDERED))
        start = flow.add_noise(batch.z, noise, sigmas[0].item()).to(model.device)
        return decoded(model, flow.euler(velocity, start, sigmas, times))


@dataclass(frozen=True)
class Diffusers(Base):
    """A video transformer of any family that diffusers has, as the folder of its pipeline
    (families/). Nothing is published about moving these: Wan 2.1 14B's settings."""

    folder: Path = Path()
    format: str = "diffusers"
    lora_formats: tuple = ("peft",)

    def outline(self):
        model = folder.load_model(self.folder, device="cpu")
        model.ae.to("meta")
        return model

    def folders(self, args):
        return [self.folder, *map(Path, args.weights)]

    def load(self, args, dtype):
        return folder.load_model(self.folder, dtype, args.device, args.text_cache)

    def student(self, teacher, autoencoder, settings, buckets):
        """It samples as its base does."""
        student = super().student(teacher, autoencoder, settings, buckets)
        own = {name: getattr(teacher, name) for name in ("solver", "shift", "guidance")}
        return replace(student, **own)

    def weights(self, args):
        return [self.folder]


@dataclass(frozen=True)
class Toy(Base):
    """The embedded toy (training/toy_base.py): an endless supply of procedural clips,
    and a score."""

    validation: int = 256
    labels: tuple = toy_base.PROMPTS
    gpus: int = 1
    transformer: Path | None = None  # the base's, in place of the embedded one

    def models(self, args, settings):
        teacher = released.load_model("base", device=args.device)
        file = self.transformer or released.WEIGHTS / "toy-base-dit.safetensors"
        dtype = settings.computed_in(teacher.device)
        teacher = replace(teacher, net=models.Deferred(file, dtype=dtype))
        autoencoder = ae.load(args.ae or released.WEIGHTS / "toy.safetensors")
        net = deep_net(teacher, autoencoder)
        student = replace(teacher, name="toy DC-VideoGen", net=net, ae=autoencoder)
        return teacher, student.to(args.device)

    def sources(self, teacher, student, args, settings):
        """The first shard is held out; the next ones are encoded in both spaces, for
        stage 1a, and the others in the deep one only."""
        both = min(3, args.shards)
        folder = None if args.cache == "memory" else args.cache
        base = toy_base.cache_latents(teacher, both + 1, folder)
        deep = toy_base.cache_latents(student, args.shards + 1, folder)
        first = toy_base.SHARD
        train = toy_base.Source(
            deep.part(first, len(deep.z)), student.text, base.part(first, len(base.z)),
            settings.seed, null=settings.drop)
        held = toy_base.Source(
            deep.part(0, first), student.text, base.part(0, first), null=0.0, drop=0.0)
        return train, held

    def before(self, teacher, held):
        source = toy_base.Source(held.teacher, teacher.text, null=0.0, drop=0.0)
        return teacher.net.get(teacher.device), teacher, source

    def score(self, model, args):
        prompts = toy.held_out_prompts(args.prompts or 64)
        return {"prompt_fit": toy_score.prompt_fit(sample.videos(model, prompts), prompts)}

    def videos(self, model, expert, held, steps):
        return sample.videos(model, toy_base.PROMPTS)


# ------------------------------------------------ the rows

# 20 minutes on one core with bf16: regression in place of the first steps, Muon, a higher
# learning rate that falls, no average
_TOY = Settings(
    align="noise_aware", head="closed_form", time_sampling="shifted", shift=toy_base.TIMES.shift,
    null="empty", steps_align=2000, lr_align=2e-3, batch_align=16,
    steps_head=800, lr_head=8e-3, warmup_head=50,
    steps=800, optimiser="muon", lr=8e-3, warmup=50, decay="linear", rank=32, clip=1.0,
    ema=0.0, batch=32, checkpoint_blocks=False, export="fp32")
_I2V = Settings(shift=5.0)

BASES = {base.name: base for base in (
    Toy("toy", _TOY),
    Base("wan2.1-t2v-1.3b", Settings(steps=40_000), guidance=3.0),
    Base("wan2.1-t2v-14b"),
    Base("wan2.1-i2v-14b-480p", _I2V),
    # nothing is published about moving these two: Wan 2.1's settings
    Base("wan2.2-t2v-a14b", guidance=(3.0, 4.0)),
    Base("wan2.2-i2v-a14b", _I2V, guidance=(3.5, 3.5)),
)}
ALIASES = {"wan2.1": "wan2.1-t2v-1.3b"}


def find(name):
    """A base by name, or diffusers:FOLDER. UserError with the names where there is
    none."""
    if name.startswith(folder.PREFIX):
        path = Path(name.removeprefix(folder.PREFIX))
        return Diffusers(folder.PREFIX + path.absolute().name, folder=path)
    name = ALIASES.get(name, name)
    if name not in BASES:
        known = ", ".join([*BASES, *ALIASES])
        raise UserError(f"there is no base {name!r}: use one of {known}, or {folder.PREFIX}FOLDER, "
                        "the folder of a diffusers pipeline.")
    return BASES[name]
