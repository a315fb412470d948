"""AE-Adapt-V: carry a pre-trained video diffusion transformer into a deeply compressed latent space (paper, section on AE-Adapt-V; spec
ae-adapt-v).

Only the two ends of the transformer touch the latent: the patch embedder E and the head. Swapped for random ones, the blocks see
embeddings they have never seen, and training end to end first improves and then collapses to noise. So the ends are fitted first:

    cache     the latents of the same clips in both spaces, z_T (base, "teacher") and z_S (deep, "student")
    stage 1a  align the patch embedder: E_S(z_S) imitates E_T(z_T), averaged over the s x s base tokens that one deep token covers.
              E_S is affine and the loss quadratic, so this is a linear regression: one solve replaces 20,000 SGD steps
    assemble  blocks, time and text embedders from the base; E_S from 1a; a new head
    stage 1b  align the head (and embedder) with the flow-matching loss, blocks frozen
    stage 2   LoRA on the blocks, embedder and head in full: the light end-to-end fine-tune
    export    the LoRA in three layouts, and merged: a folder that sample.py takes as a model

    python adapt.py --base toy                                              the toy, from its embedded base, in a quarter of an hour on two cores
    python adapt.py --base wan2.1 --weights DIR [DIR] --data CLIPS          Wan 2.1 1.3B, with what was published for it (`training/bases.py`)
    torchrun --nproc-per-node 8 adapt.py --base wan2.1-t2v-14b ...          the same on eight GPUs, weights and optimiser sharded
    python adapt.py --base wan2.1-t2v-14b --gpus 8 --plan                   what that needs, before it is paid for
    python adapt.py --base wan2.1 ... --buckets 720F32MS --continue-from OUT --out OUT2      on at a higher resolution: stage 2 alone, a fresh LoRA
    python adapt.py --base toy --pretrain | --score | --compare             train the toy base; score both toys; the comparison of ways to adapt

Every stage has a folder in --out. Rerun the same command after an interruption: what is finished is not done again, what was begun goes on,
and other settings are refused. `--stage head` stops after stage 1b. The base is never changed; what is trained (fp32) lies beside its weights
(bf16). After each stage `training/journal.py` says whether it works: report.json, stages.png.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting threads slow every other process down; must precede torch

import argparse
import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import ae
import align
import dit
import flow
import lora
from files import checkpoint, layouts, video
from files.checkpoint import UserError
from training import bases, loop, toy_base
from training.bases import DTYPES
from training.entries import hash_tensors
from training.journal import Journal
from wan import models, released
from wan.text import release

STAGES = ("cache", "align", "head", "lora", "export")
ENDS = ("patch_embedding", "head")  # trained whole, from stage 1b on

# ---------------------------------------------------------------------------------------------------- the stages in order


@dataclass
class Job:
    """What all stages share."""

    base: bases.Base
    settings: bases.Settings
    args: argparse.Namespace
    device: torch.device
    teacher: models.Model
    student: models.Model
    source: object  # training data (cache.Source or one like it)
    held: object  # held-out data
    journal: Journal
    started: float

    def folder(self, expert, stage):
        return Path(self.args.out) / f"{expert.prefix}{stage}"

    @property
    def experts(self):
        """The transformers to begin with: the base's, or with --continue-from those of an adapted model."""
        found, adapted = self.base.experts(self.teacher), self.args.continue_from
        if not adapted:
            return found
        files = [released.find((f"{stem}.safetensors", f"{stem}/*.safetensors"), [adapted]) for stem in ("transformer", "transformer_2")[: len(found)]]
        for file, expert in zip(files, found):
            told = file and checkpoint.open_tensors(file)[1].get("adapted", {})
            if not told or (told["base"], told["target"]) != (self.base.name, bases.target_of(self.student.ae.config)):
                raise UserError(f"{adapted} holds no {self.base.name} adapted to {bases.target_of(self.student.ae.config)}"
                                + (f", but {told['base']} adapted to {told['target']}" if told else "") + ": --continue-from wants the --out of such a run.")
        return [expert._replace(path=file) for file, expert in zip(files, found)]


def adapt(base, settings, args):
    """AE-Adapt-V, stage by stage, into the folder args.out."""
    started, own = time.perf_counter(), loop.start()
    args.device = args.device if args.device and loop.processes() == 1 else own
    teacher, student = base.models(args, settings)
    source, held = base.sources(teacher, student, args, settings)  # the cache
    for model in (teacher, student):
        model.ae.to("cpu")  # not beside the transformer
    journal = Journal(args.out, base=base.name, target=bases.target_of(student.ae.config))
    job = Job(base, settings, args, args.device, teacher, student, source, held, journal, started)
    last = STAGES.index(args.stage)
    for number, stage in enumerate((align_ends, train_head, train_lora), 1):
        for expert in job.experts:
            if number <= last and (stage is train_lora or not args.continue_from):
                stage(job, expert)
    if last == len(STAGES) - 1:
        export(job)


def align_ends(job, expert):
    """Stage 1a: the patch embedder by regression on clean latents; and the head that stage 1b starts from -> 1a/ends.safetensors."""
    s, file = job.settings, job.folder(expert, "1a") / "ends.safetensors"
    config = config_of(job, expert, "align", "head", "clips_align", "seed")
    if s.align == "sgd":
        config |= config_of(job, expert, "steps_align", "lr_align", "batch_align")
    if s.align == "noise_aware" or s.head == "closed_form":
        config |= config_of(job, expert, "time_sampling", "shift")
    if finished(file, config):
        return
    start = initial_embedder(job.student.net.config, s.seed)
    sgd = align_by_sgd(job, expert, *start, config) if s.align == "sgd" else None
    if not alone(file):
        return

    if before := job.base.before(job.teacher, job.held):
        examine(job, expert, "base", *before)
    weight, bias, numbers = align_embedder(job, expert, start, sgd)

    # assemble: blocks from the base, the aligned embedder, a zero or regressed head
    base, net = build(job, expert, {})
    loop.copy_into(net, {"patch_embedding.weight": weight.view_as(net.patch_embedding.weight), "patch_embedding.bias": bias})
    if s.head == "closed_form":
        align.solve_head(net, job.source, batches=96, batch=s.batch, mode=s.time_sampling, shift=s.shift, inside=(expert.low, expert.high))
    examine(job, expert, "1a, assembled", net, depth=depth(job, base, net), **numbers)
    checkpoint.save_tensors(file, {k: v for k, v in net.state_dict().items() if k.startswith(ENDS)}, {"settings": config})


def train_head(job, expert):
    """Stage 1b: align the head (and go on with the embedder) by the flow-matching loss, blocks frozen -> 1b/trained.safetensors."""
    start, s = result(job.folder(expert, "1a") / "ends.safetensors"), job.settings
    config = config_of(job, expert, "steps_head", "lr_head", "warmup_head", "decay", start=hash_tensors(start))

    def ready():
        net = build(job, expert, start)[1]
        for part in ENDS:
            net.get_submodule(part).requires_grad_(True)
        return net

    fit(job, expert, "1b", "1b, head aligned", ready, config, s.steps_head, s.lr_head, s.warmup_head, 0.0, 0)


def train_lora(job, expert):
    """Stage 2: LoRA on the blocks (spec 5.3), embedder and head in full -> 2/trained.safetensors. It begins where 1b ended, or an adapted model."""
    s, first = job.settings, job.folder(expert, "1b") / "trained.safetensors"
    if job.args.continue_from:
        first = job.folder(expert, "2") / "start.safetensors"
        if not first.exists() and alone(first):
            examine(job, expert, "before", build(job, expert, ends(expert))[1])
            checkpoint.save_tensors(first, ends(expert))
    start = result(first)
    config = config_of(job, expert, "steps", "lr", "warmup", "decay", "rank", "alpha", "ema", start=hash_tensors(start))
    fit(job, expert, "2", "2, LoRA", lambda: build(job, expert, start, adapters=True)[1], config, s.steps, s.lr, s.warmup, s.ema, s.steps_head)


def export(job):
    """The adapted model as files that others read, in args.out: the transformer(s) merged, the LoRA in three layouts, the autoencoder."""
    s, out, dtype = job.settings, Path(job.args.out), DTYPES[job.settings.export]
    if loop.rank():
        return
    about = dict(base=job.base.name, target=bases.target_of(job.student.ae.config), rank=s.rank, alpha=s.alpha, step=s.steps)
    shown = {k: getattr(job.student, k) for k in released.SAMPLING}
    for number, expert in enumerate(job.experts):
        suffix = "_2" if number else ""  # as diffusers calls the second transformer
        trained = result(job.folder(expert, "2") / "trained.safetensors")
        net = build(job, expert, trained, adapters=True, dtype=dtype, device="cpu")[1]
        half = torch.float16 if dtype == torch.float32 else dtype
        for layout, ending in (("comfyui", ""), ("kohya", "-kohya"), ("peft", "-peft")):  # diffusers refuses a LoRA with whole tensors
            lora.save(net, out / f"lora{suffix}{ending}.safetensors", layout, full=() if layout == "peft" else ENDS, dtype=half, **about)
        lora.merge(net)
        file = f"transformer{suffix}" + (".safetensors" if job.args.format == "original" else "")
        metadata = {"adapted": {**about, "settings": dataclasses.asdict(s), "sampling": shown}}
        dit.save(net, out / file, metadata, dtype, job.args.format)
    ae.save(job.student.ae, out / "ae.safetensors", dtype)
    print(f"done in {time.perf_counter() - job.started:.0f} s. See {out / 'stages.png'} and {out / 'report.json'}, and try\n"
          f"  python sample.py --model {out} " + (f"--weights {' '.join(map(str, job.args.weights))} " if job.args.weights else "")
          + ("--image PICTURE " if job.student.task == "i2v" else "") + f"--prompt \"{toy_base.PROMPTS[0] if job.base.name == 'toy' else '...'}\"")


# ---------------------------------------------------------------------------------------------------- stage 1a: the patch embedder


def align_embedder(job, expert, start, sgd):
    """-> (weight, bias, numbers about them) by --align. The other ways cost nothing beside reading the pairs, so their numbers are told too.

    start: the fresh embedder; sgd: what SGD made of it, where that was asked for.
    """
    s, E_T = job.settings, expert.embedder()
    fitted, held = (moments(source, s.clips_align, patches_of(job)) for source in (job.source, job.held))
    ways = {"random": lambda: start,
            "closed_form": lambda: align.solve_embedding(fitted, E_T),
            "ridge_to_init": lambda: align.solve_embedding(fitted, E_T, 3e-2, start[0]),
            "noise_aware": lambda: align.solve_noised(fitted, E_T, *noise_of(job), s.time_sampling, s.shift, inside=(expert.low, expert.high)),
            **({"sgd": lambda: sgd} if sgd else {})}
    numbers, found = {}, {}
    for way, solve in ways.items():
        begun = time.perf_counter()
        found[way] = solve()
        numbers[way] = embedding(job, expert, *found[way], held)
        job.journal.add(dict(stage=f"{expert.prefix}1a {way}", seconds=time.perf_counter() - begun, **numbers[way]))
    if not job.args.no_samples:
        show_pair(job)
    rms = job.held.batch(0, range(8)).z.square().mean().sqrt().item()
    return *found[s.align], dict(numbers[s.align], latent_rms=rms, clips=min(len(job.source), s.clips_align))


def moments(source, clips, patches):
    """Of the token pairs of at most so many clips."""
    pairs = (source.pair(i) for i in tqdm(range(min(len(source), clips)), "read pairs", unit="clip", leave=False))
    return align.Moments.of(pairs, patches)


def noise_of(job):
    """(base tokens per deep token and axis, [entries of a base patch, of a deep patch, that are latent and so get noise])"""
    grids = [x.shape[3] // patch[2] for x, patch in zip(job.held.pair(0), patches_of(job))]
    return grids[0] // grids[1], [c.out_channels * math.prod(c.patch) for c in (job.teacher.net.config, job.student.net.config)]


def initial_embedder(config, seed):
    """What stage 1a starts from (spec 3.3) -> weight [d, c * prod(patch)], bias [d]; the same in every process and on every day."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.init.xavier_uniform_(torch.empty(config.dim, config.in_channels * math.prod(config.patch)), generator=generator)
    bound = (config.out_channels * math.prod(config.patch)) ** -0.5
    return weight, nn.init.uniform_(torch.empty(config.dim), -bound, bound, generator=generator)


def align_by_sgd(job, expert, weight, bias, config):
    """Stage 1a as published: AdamW, betas (0.9, 0.9), constant rate, batches of clips -> (weight, bias). A run that can be killed."""
    s, net = job.settings, nn.Linear(*reversed(weight.shape)).to(job.device)
    loop.copy_into(net, {"weight": weight, "bias": bias})
    W, b = (p.float().to(job.device) for p in align.matrix(expert.embedder()))
    opt = torch.optim.AdamW(net.parameters(), lr=s.lr_align, betas=(0.9, 0.9), weight_decay=0)
    plan = loop.Plan(s.steps_align, warmup=0, decay="constant", clip=0.0, save_every=1000, log_every=100, keep=1)
    run = loop.Run(job.folder(expert, "1a"), config, {"net": net}, {"net": opt}, plan)
    clips, batch = min(len(job.source), s.clips_align), max(s.batch_align // loop.processes(), 1)

    def batches(number):
        while True:
            step, positions = run.positions(number, batch)
            pairs = [job.source.pair(int(np.random.default_rng((s.seed, step, position)).integers(clips))) for position in positions]
            tokens = [align.pair_tokens(*(a[None].float() for a in pair), patches_of(job)) for pair in pairs]
            yield [torch.cat(side).to(job.device) for side in zip(*tokens)]
            number += 1

    def losses(batch, number):
        x, u = batch
        loss = F.mse_loss(net(u), F.linear(x, W, b))
        yield "net", loss, {"loss": loss.detach()}

    run.fit(batches(run.number), losses, what=f"{expert.prefix}1a by SGD")
    return net.weight.detach().cpu(), net.bias.detach().cpu()


def patches_of(job):
    """(of the base, of the deep model)"""
    return job.teacher.net.config.patch, job.student.net.config.patch


# ---------------------------------------------------------------------------------------------------- stages 1b and 2: flow matching


def draw(shape, settings, expert, seed, step, positions):
    """Time and noise of samples -> sigma, t, weight [b], noise [b, *shape]. Each depends on (seed, step, its position) alone, so that it does
    not matter how a batch is divided; times are drawn again until one lies in the expert's range."""
    rows = []
    for position in positions:
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step, position)).generate_state(1, np.uint64)[0] >> 1))
        sigma, t, weight = flow.sample_times(1, settings.time_sampling, settings.shift, generator, inside=(expert.low, expert.high))
        rows.append((sigma, t, weight, torch.randn(1, *shape, generator=generator)))
    return [torch.cat(column) for column in zip(*rows)]


def objective(net, batch, sigma, t, weight, noise):
    """Flow-matching loss of a batch (spec 5.1) -> (loss, mse [b]). Noise, target and loss are fp32."""
    device = next(net.parameters()).device
    x = flow.add_noise(batch.z, noise, sigma).to(device)
    v = align.velocity_of(net, batch, device)(x, t.to(device))
    mse = (v.float() - flow.velocity_target(batch.z, noise).to(device)).square().flatten(1).mean(1)
    return (weight.to(device) * mse).mean(), mse.detach()


@torch.no_grad()
def validation_loss(job, expert, net, held=None):
    """The loss on fixed held-out samples, prompts, noise and times."""
    s, n, total = job.settings, job.base.validation, 0.0
    for step, start in enumerate(range(0, n, s.batch)):
        positions = range(min(s.batch, n - start))
        batch = (held or job.held).batch(step, positions)
        total += objective(net, batch, *draw(batch.z.shape[1:], s, expert, 10_000_019, step, positions))[0].item() * len(positions)
    return total / n


def fit(job, expert, name, title, ready, config, steps, lr, warmup, ema, first):
    """Train what requires gradients in the net that `ready()` builds -> the file NAME/trained.safetensors with all of that, consolidated.

    first: number of the source's batch at step 0, so that stage 2 does not begin with the clips of 1b.
    """
    s, folder = job.settings, job.folder(expert, name)
    clips = s.batch * s.accumulated(loop.processes()) * loop.processes()
    config |= config_of(job, expert, "time_sampling", "shift", "clip", "dtype", "seed", clips_per_step=clips)
    if new := not finished(folder / "trained.safetensors", config):
        train(job, expert, folder, f"{expert.prefix}{title}", ready, config, steps, lr, warmup, ema, first)
    if loop.rank() == 0 and (new or f"{expert.prefix}{title}" not in job.journal):
        tensors = result(folder / "trained.safetensors")
        base, net = build(job, expert, tensors, adapters=name == "2")
        numbers = {} if job.args.continue_from else dict(  # there the base's own space plays no part
            depth=depth(job, base, net), **embedding(job, expert, net.patch_embedding.weight, net.patch_embedding.bias))
        examine(job, expert, title, net, trained=sum(v.numel() for v in tensors.values()), **numbers)


def train(job, expert, folder, what, ready, config, steps, lr, warmup, ema, first):
    """The training of `fit`, by all processes together."""
    s = job.settings
    torch.manual_seed(s.seed)
    net = loop.masters(ready()).train()
    net.checkpointing = s.checkpoint_blocks
    loop.shard(net, net.blocks)
    trained = loop.trained(net)
    opt = torch.optim.AdamW(trained.values(), lr=lr, betas=(0.9, 0.999), weight_decay=0)
    plan = loop.Plan(steps, warmup, s.decay, s.clip, s.accumulated(loop.processes()), ema, job.args.save_every)
    run = loop.Run(folder, config, {"net": net}, {"net": opt}, plan)

    def batches(number):
        while True:
            step, positions = run.positions(number, s.batch)
            batch = job.source.batch(first + step, positions)
            yield batch, draw(batch.z.shape[1:], s, expert, s.seed + 1, first + step, positions)
            number += 1

    def losses(batch, number):
        loss, mse = objective(net, batch[0], *batch[1])
        yield "net", loss, {"loss": loss.detach(), "mse": mse.mean()}

    def report(run):
        with run.averaged():
            return {"validation": validation_loss(job, expert, net)}

    run.fit(batches(run.number), losses, report, what=what)
    with run.averaged():
        tensors = {k: loop.full_tensor(p.detach()).to("cpu", copy=True) for k, p in trained.items()}
    if loop.rank() == 0:
        loop.plot(folder)
        checkpoint.save_tensors(folder / "trained.safetensors", tensors, {"settings": config, "step": steps})
    loop.all_gather(None)  # nobody looks for the file before it is there


# ---------------------------------------------------------------------------------------------------- the model between the stages


def build(job, expert, tensors, adapters=False, dtype=None, device=None):
    """-> (the base's transformer, the deep one with what was trained so far), frozen but for adapters and, with them, the ends.

    They share all that is inherited: two networks in the memory of one. tensors: {name: value} over what is fresh.
    """
    s = job.settings
    base = expert.load(dtype or DTYPES[s.dtype], device or job.device)
    net = dit.inherit(base, job.student.net.config, share=True).requires_grad_(False).eval()
    if adapters:
        lora.wrap(net, s.rank, s.alpha, full=ENDS)
    loop.copy_into(net, tensors)
    return base, net


def ends(expert):
    """The embedder and head of a transformer, fp32."""
    tensors = layouts.open_checkpoint(expert.path)[0]
    return {k: checkpoint.read(v).float() for k, v in tensors.items() if k.startswith(ENDS)}


def config_of(job, expert, *names, **more):
    """What decides the result of a stage, in plain values: the base, the data, and these settings."""
    return dict(base=expert.fingerprint(), data=job.source.fingerprint, **{name: getattr(job.settings, name) for name in names}, **more)


def finished(file, config):
    """Is there a result, made with these settings? UserError where the settings were others."""
    if not file.exists():
        return False
    made = checkpoint.open_tensors(file)[1].get("settings", {})
    if different := loop.difference(made, config):
        raise UserError(f"{file.parent} was made with other settings ({different}): use the same ones, or another --out.")
    return True


def alone(file):
    """True in process 0, which does the work that ends with `file`; the others wait here for it. (Not in an exchange, which has a time limit.)"""
    while loop.rank() and not file.exists():
        time.sleep(0.2)
    return loop.rank() == 0


def result(file):
    """The tensors of a finished stage."""
    return checkpoint.load_tensors(file)[0]


# ---------------------------------------------------------------------------------------------------- is it working?


def examine(job, expert, title, net, model=None, held=None, **numbers):
    """Measure and render what a stage gave, and tell the journal. By process 0 alone, on a net that is not sharded.

    model, held: of the transformer `net` and what it is measured on, where it is not the deep one.
    """
    s, model, held = job.settings, dataclasses.replace(model or job.student, net=net), held or job.held
    batch = min(s.batch, job.base.validation)
    bins = align.loss_by_sigma(net, held, batches=job.base.validation // batch, batch=batch, shift=1.0)  # shift 1: all sigmas alike
    row = dict(stage=f"{expert.prefix}{title}", validation_loss=validation_loss(job, expert, net, held), **numbers,
               sigma=[b for b in bins if b["ratio"] == b["ratio"] and b["sigma"][1] > expert.low and b["sigma"][0] < expert.high])
    videos = []
    if not job.args.no_samples:
        row |= job.base.score(model, job.args)
        videos = job.base.videos(model, expert, held, job.args.sample_steps)
    model.ae.to("cpu")  # the next stage needs the room
    row["seconds"] = time.perf_counter() - job.started
    job.journal.add(row, videos, job.base.labels)
    if job.device.type == "cuda":
        release()


def depth(job, base, net):
    """Distance of the features from the base's after so many blocks, relative to their variance (spec 3.5) -> {block: ratio}."""
    pairs = [job.held.pair(i) for i in range(min(len(job.held), 4))]
    pairs = [pair for pair in pairs if pair[1].shape == pairs[0][1].shape]
    batch = job.held.batch(0, range(1))  # any prompt, the same for both
    seen = [c.expand(len(pairs), -1, -1) for c in (batch.context, batch.clip_fea) if c is not None]
    blocks = range(0, base.config.layers, max(base.config.layers // 6, 1))
    curve = align.depth_curve(base, net, *map(torch.stack, zip(*pairs)), seen, blocks=blocks)
    return {str(block): relative for block, (_, relative) in curve.items()}


def embedding(job, expert, weight, bias, held=None):
    """How well an embedder imitates the base's on held-out clips, and how loudly it lets noise in. From stage 1b on it need not imitate."""
    E_T, held = expert.embedder(), held or moments(job.held, 256, patches_of(job))
    r2, mse = align.r_squared(held, E_T, weight, bias)
    return dict(r2=r2, mse=mse, norm_ratio=align.norm_ratio(weight, E_T, *noise_of(job)))


def show_pair(job):
    """pairs.png: the same held-out clip out of both autoencoders. If these are two clips, nothing can be aligned (spec 3.5)."""
    rows = []
    for model, x in zip((job.teacher, job.student), job.held.pair(0)):
        rows += bases.decoded(model, x[None, : model.net.config.out_channels])
        model.ae.to("cpu")
    width = rows[0].shape[3]
    video.contact_sheet(Path(job.args.out) / "pairs.png", rows, 6, [job.teacher.name, job.student.name], scale=2 if width <= 256 else 256 / width)


# ---------------------------------------------------------------------------------------------------- command line


def arguments(argv=None):
    """-> (arguments, settings that were given)"""
    p = argparse.ArgumentParser(description="AE-Adapt-V: move a video diffusion transformer into a deep latent space. What is left out of the settings is "
                                            "what was published for the base, or what was chosen for the toy (training/bases.py).")
    what = p.add_argument_group("what")
    what.add_argument("--base", default="toy", help=f"the pre-trained model: {', '.join(bases.BASES)} (default: toy); wan2.1 is wan2.1-t2v-1.3b")
    what.add_argument("--target", choices=bases.TARGETS, default="f32t4c32", help="the deep latent space (default: f32t4c32)")
    what.add_argument("--weights", nargs="+", default=[], metavar="DIR", help="folders with the files of base and autoencoder (default: checkpoints/BASE)")
    what.add_argument("--ae", metavar="FILE", help="the deep autoencoder, where it is not in these folders")
    what.add_argument("--data", nargs="+", metavar="CLIPS", help="captioned clips: folders of x.mp4 + x.txt, CSV, JSONL, web-dataset tars")
    what.add_argument("--out", default="out/adapt", help="folder for everything (default: out/adapt)")
    what.add_argument("--continue-from", type=Path, metavar="OUT", help="an adapted model, the --out of another run: train it on with a fresh LoRA, 15 %% of "
                      "stage 2's steps, for example on 720p clips (--buckets 720F32MS)")
    what.add_argument("--stage", choices=STAGES, default="export", help="stop after this one (default: export)")
    for name, text in dict(plan="print what the run needs, and stop", pretrain="train the toy base itself instead", score="score the embedded toys instead",
                           compare="the comparison of ways to adapt, on the toy, instead").items():
        what.add_argument(f"--{name}", action="store_true", help=text)
    what.add_argument("--gpus", type=int, default=8, help="for --plan (default: 8)")
    clips = p.add_argument_group("clips")
    clips.add_argument("--cache", metavar="FOLDER", help="latents and prompt states (default: OUT/cache); may be shared by runs")
    clips.add_argument("--no-cache", action="store_true", help="keep them in memory; for small sets")
    clips.add_argument("--buckets", help="family of frame sizes (default: 480F32MS for f32, 480F64MS for f64)")
    clips.add_argument("--frames", type=int, default=80, help="of a clip (default: 80; the base sees the first 77)")
    clips.add_argument("--text-cache", metavar="FILE", help="prompts in it need no text encoder")
    clips.add_argument("--workers", type=int, default=2, help="threads that read clips and entries (default: 2)")
    clips.add_argument("--shards", type=int, default=10, help=f"toy: clips for stages 1b and 2, in shards of {toy_base.SHARD} (default: 10)")
    clips.add_argument("--align-shards", type=int, default=3, help="toy: the first of them, used for stage 1a (default: 3)")
    settings = p.add_argument_group("settings")
    choices = dict(align=("sgd", "closed_form", "ridge_to_init", "noise_aware", "random"), head=("zero", "closed_form"), time_sampling=("released", "shifted"),
                   null=("negative", "empty"), decay=("constant", "linear", "cosine"), dtype=tuple(DTYPES), export=tuple(DTYPES))
    for field in dataclasses.fields(bases.Settings):
        flag, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        more = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, choices=choices.get(field.name), metavar=None if kind is str else "N")
        settings.add_argument(flag, default=None, **more)
    how = p.add_argument_group("how")
    how.add_argument("--format", choices=["original", "diffusers"], default="original", help="of the exported transformer (default: original)")
    how.add_argument("--no-samples", action="store_true", help="render nothing after the stages")
    how.add_argument("--sample-steps", type=int, default=12, help="of these samples (default: 12)")
    how.add_argument("--save-every", type=int, default=250, help="steps between checkpoints (default: 250)")
    how.add_argument("--prompts", type=int, help="toy: held-out prompts to score with (default: 64, with --score 256)")
    how.add_argument("--results", default="results/toy.json", help="toy: where --score writes")
    how.add_argument("--device", type=torch.device, help="(default: a GPU if there is one)")
    how.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = p.parse_args(argv)
    args.cache = args.cache or str(Path(args.out) / "cache")
    return args, {f.name: v for f in dataclasses.fields(bases.Settings) if (v := getattr(args, f.name)) is not None}


def main(argv=None):
    args, given = arguments(argv)
    base = bases.find(args.base)
    settings = dataclasses.replace(base.settings, **given)
    if args.continue_from:  # spec 5.4: 10 to 20 % of the steps
        settings = dataclasses.replace(settings, **{k: getattr(settings, k) * 15 // 100 for k in ("steps", "warmup") if k not in given})
    if "rank" in given and "alpha" not in given:
        settings = dataclasses.replace(settings, alpha=2 * settings.rank)  # the published ratio
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(settings.seed)
    if args.plan:
        from training import plan

        return plan.show(base, settings, args)
    if args.compare:
        from experiments import compare_adapt

        passed = {"--threads": args.threads, "--device": args.device}
        return compare_adapt.main([str(part) for pair in passed.items() if pair[1] is not None for part in pair])
    if args.pretrain or args.score:
        vars(args).update(vars(settings), device=str(args.device or loop.start()))
        return (toy_base.pretrain if args.pretrain else toy_base.score)(args)
    adapt(base, settings, args)


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
