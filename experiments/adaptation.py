"""The paper's claims put to the test on the toy: ways to carry a transformer into the deep
latent space, side by side (paper, convergence and ablations of AE-Adapt-V).

What adaptation is for: the base knows more than the adaptation data can teach. So the
data here are *narrow*: a few hundred clips, of a third of the combinations of shape,
direction and colour, and two words never occur in them. A model is scored on prompts

    inside        combinations that the adaptation has seen
    combination   the others: its words were seen, never together
    word          prompts with a word that no clip shows; "held": how often that one is right

First the *gate*: an arm cannot inherit what the base does not know, so attributes that the
base misses are reported, but left out of the fit that is compared. Then every arm runs at
each learning rate of a grid, extended until its best is not at the edge, with as many
trials for all; the best is chosen on the validation loss inside the data. Then the other
seeds at that rate. `verdicts.py` says what follows from the spread over seeds.

    python -m experiments.adaptation                        hours on one core
    python -m experiments.adaptation --arms E b ab          with options of E
    python -m experiments.adaptation --ae plain.safetensors aligned.safetensors
                                                            deep autoencoders side by side

OUT/trials.jsonl holds what is finished, so the same command goes on where it stopped.
"""
from files import errors

errors.begin(__name__)  # before the slow imports: a Ctrl-C, waiting threads

import argparse
import copy
import functools
import itertools
import json
import math
import shutil
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import ae
import align
import dit
import kernels
import lora
import sample
import toy
from experiments import verdicts
from experiments.verdicts import GROUPS, spread
from files import checkpoint, folders, options, video
from files.checkpoint import UserError
from training import journal, loop, toy_base, toy_score
from training.entries import hash_of, hash_tensors
from training.muon import Muon
from training.toy_base import TIMES
from wan import released

# ------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class Arm:
    """How an adapted model comes about."""

    title: str
    base: bool = True  # blocks are the base's; else random
    align: str = "random"  # stage 1a: a way of align.fit, or sgd
    head: str = "zero"  # or closed_form
    head_steps: float = 0.0  # stage 1b, as a share of the preset's
    lora: bool = True  # afterwards; else everything is trained


ARMS = {
    "A": Arm("scratch", base=False, lora=False),
    "B": Arm("naive full", lora=False),
    "C": Arm("naive LoRA"),
    "D": Arm("no MSE stage", head_steps=1),
    "E": Arm("AE-Adapt-V", align="sgd", head_steps=1),
    "F": Arm("aligned full", align="sgd", head_steps=1, lora=False),
    "G": Arm("closed form", align="closed_form", head="closed_form", head_steps=0.5),
}
#: E with one thing changed, at E's learning rate
OPTIONS = {
    "b": dict(title="noise-aware", align="noise_aware"),
    "ab": dict(title="noise-aware, regressed head", align="noise_aware", head="closed_form"),
}
ALL = ARMS | {key: replace(ARMS["E"], **changes) for key, changes in OPTIONS.items()}


@dataclass(frozen=True)
class Preset:
    """Sizes of the experiment; the number of steps is the same for all arms."""

    clips: int = 512
    held: int = 64  # clips per group for the validation loss
    prompts: int = 24  # per group
    sampling_steps: int = 8
    steps: int = 300  # stage 1b counts
    head_steps: int = 60  # of stage 1b
    batch: int = 32
    warmup: int = 20
    rates: tuple = (2e-3, 5e-3, 1.25e-2)
    lr_head: float = 8e-3
    rank: int = 32
    seeds: int = 3
    sgd: tuple = (2000, 16, 2e-3)  # steps, clips and rate of stage 1a in the arms
    sgd_published: tuple = (20000, 4, 2e-4)
    head_batches: int = 24
    marks: tuple = (0, 0.25, 0.5, 0.75, 1)  # shares of steps at which the loss is measured,
    scored: tuple = (0.25, 1)  # and at which videos are made and read


PRESETS = {
    "laptop": Preset(),
    "gpu": Preset(
        steps=400, head_steps=100, prompts=128, sampling_steps=20, head_batches=64,
        rates=(8e-4, 2e-3, 5e-3, 1.25e-2), scored=(0.25, 0.5, 0.75, 1),
    ),
}


@dataclass(frozen=True)
class HalfSize:
    """How the base is trained on at half its size, for the control: on all of the world."""

    shards: int = 10
    steps: int = 600
    batch: int = 16
    lr: float = 1.5e-3


HALF = HalfSize()

# ------------------------------------------------------------------------- narrow data

HELD = {"colour": "purple", "direction": "up"}  # words that no adaptation clip shows


def group_of(attributes):
    """Inside is a Latin square over shape, direction and colour, without words of HELD.
    None: both of them occur."""
    held = holds(attributes)
    if held:
        return "word" if len(held) == 1 else None
    square = ("shape", "direction", "colour")
    index = sum(toy.WORLD[name].index(attributes[name]) for name in square)
    return "combination" if index % 3 else "inside"


def holds(attributes):
    """The held-out words of a prompt: {attribute: word}."""
    return {name: word for name, word in HELD.items() if attributes[name] == word}


def scenes_of(group, n, seed):
    """n random scenes of a group; in "word" the held-out words take turns."""
    rng, turns, scenes = np.random.default_rng(seed), itertools.cycle(HELD), []
    turn = next(turns)
    while len(scenes) < n:
        scene = toy.random_scene(rng)
        attributes = scene.attributes()
        if group_of(attributes) == group and (group != "word" or turn in holds(attributes)):
            scenes.append(scene)
            turn = next(turns)
    return scenes


# ------------------------------------------------------------------- what all trials share


class World:
    """Base and deep autoencoder, narrow data in both spaces, prompts, finished work."""

    def __init__(self, preset, out, autoencoder, base, device="cpu"):
        self.preset, self.out, self.device = preset, Path(out), torch.device(device)
        self.base = base.to(device)
        self.config = dit.deep_config(base.net.config, autoencoder.config)
        self.deep = replace(base, name="deep", net=self.fresh(0), ae=autoencoder).to(device)
        decisive = dict(preset=asdict(preset), held=HELD)
        for name, net in (("base", base.net), ("autoencoder", autoencoder)):
            decisive[name] = hash_tensors(net.state_dict())
        self.ledger = Ledger(self.out, decisive)

        self.clips, self.pairs, self.prompts = {}, {}, {}
        self.take("train", scenes_of("inside", preset.clips, 1))
        for i, group in enumerate(GROUPS):
            self.take(group, scenes_of(group, preset.held, (2, i)))
            scored = scenes_of(group, preset.prompts, (99, i))
            self.prompts[group] = [scene.attributes() for scene in scored]

    def take(self, group, scenes):
        """Encode the clips of a group, and pose stage 1a on them."""
        cache = self.out.parent / "cache"  # shared by all autoencoders
        self.clips[group] = toy_base.encode_scenes(self.deep, scenes, cache)
        if group != "word":
            self.pairs[group] = self.problem(group, scenes, cache)

    def fresh(self, seed, base=True):
        """A transformer for the deep space with nothing aligned; without `base` nothing
        inherited either."""
        torch.manual_seed(seed)
        net = dit.inherit(self.base.net, self.config) if base else dit.WanDiT(self.config)
        return net.to(self.device)

    def problem(self, group, scenes, cache):
        """What stage 1a has to solve on the clips of a group."""
        teacher = toy_base.encode_scenes(self.base, scenes, cache)
        source = toy_base.Source(self.clips[group], self.base.text, teacher)
        tokens = align.Tokens.of((self.base.net.config, self.config), source.pair(0))
        embedder, start = self.base.net.embedder, self.deep.net.embedder
        start = start.weight, start.bias
        pair = functools.cache(source.pair)
        return align.Problem(embedder, start, pair, len(source), tokens, TIMES)

    def align(self, method, net, seed):
        """Stage 1a from the embedder that `net` has -> (weight, bias)."""
        problem = copy.copy(self.pairs["train"])  # with the moments, once they are known
        problem.start = net.embedder.weight, net.embedder.bias
        if not method.startswith("sgd"):
            return align.fit(method, problem)
        steps, clips, lr = getattr(self.preset, method)
        plan = loop.Plan(steps, warmup=0, decay="constant", clip=0, save_every=steps,
                         log_every=steps, keep=1)
        begin = functools.partial(loop.Run, self.out / "starts" / f"{method}-{seed}", {}, plan=plan)
        return align.sgd(problem, begin, clips, lr, seed)

    def source(self, group, **settings):
        return toy_base.Source(self.clips[group], self.base.text, image=0, **settings)

    def score(self, model, enlarge=1):
        """Videos of all prompts, read back -> ({group: fit}, {group: pictures of two})."""
        found, shown = {}, {}
        for group, prompts in self.prompts.items():
            with kernels.autocast(self.device):
                videos = sample.videos(model, prompts, steps=self.preset.sampling_steps)
            if enlarge > 1:
                videos = [enlarged(x, enlarge) for x in videos]
            found[group] = toy_score.prompt_fit(videos, prompts)
            two = torch.stack(videos[:2])
            shown[group] = two[:, :, [0, (two.shape[2] - 1) // 2, -1]]
        right = []
        for x, prompt in zip(videos, prompts):  # of the last group, "word"
            right += toy_score.prompt_fit([x], [holds(prompt)]).values()
        found["word"]["held"] = statistics.fmean(right)
        return found, shown


def enlarged(x, factor):
    frames = x.transpose(0, 1)  # t c h w
    return F.interpolate(frames, scale_factor=factor, mode="bicubic").transpose(0, 1)


class Ledger:
    """Finished work as JSON lines: what is there is not made again. A line that a crash cut
    off is removed."""

    def __init__(self, folder, settings):
        self.file = Path(folder) / "trials.jsonl"
        self.lines = loop.read_log(folder, self.file.name)
        with checkpoint.atomic_path(self.file) as tmp:
            tmp.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self.settings = self.once("settings", lambda: settings)
        if self.settings != json.loads(json.dumps(settings)):
            raise UserError(f"{folder} holds a comparison with other settings, or of another base "
                            "or autoencoder: use the same ones, or another --out.")

    def once(self, kind, make, **key):
        """The value of this kind and key; made and written now if it is not there."""
        key = dict(kind=kind, **key)
        for line in self.lines:
            if line["key"] == key:
                return line["value"]
        value = json.loads(json.dumps(make()))
        self.lines.append(dict(key=key, value=value))
        with open(self.file, "a") as f:
            f.write(json.dumps(self.lines[-1]) + "\n")
        return value


# --------------------------------------------------------------------------- one trial


class Trial:
    """An arm at one learning rate with one seed."""

    def __init__(self, world, key, lr, seed):
        self.world, self.key, self.lr, self.seed = world, key, lr, seed
        self.arm, p = ALL[key], world.preset
        self.total, self.head_steps = p.steps, round(p.head_steps * self.arm.head_steps)
        self.marks, self.scored = {self.head_steps}, {self.head_steps}
        self.marks.update(round(share * self.total) for share in p.marks)
        self.scored.update(round(share * self.total) for share in p.scored)
        if self.arm.head == "zero":
            self.scored.discard(0)  # a head of zeros makes no videos
        arm = self.arm
        begins = [arm.base, arm.align, arm.head, self.head_steps]
        self.start = world.out / "starts" / hash_of([*begins, seed])  # shared with other trials
        self.folder = world.out / "trials" / f"{key}-{lr:g}-{seed}"

    def weights(self, step):
        folder = self.start if step <= self.head_steps else self.folder
        return folder / f"{step}.safetensors"

    def row(self):
        """Its numbers; run now if that was not done."""
        key = dict(arm=self.key, lr=self.lr, seed=self.seed)
        return self.world.ledger.once("trial", self.run, **key)

    def run(self):
        net, lines = self.aligned()
        net.requires_grad_(True)
        if self.arm.lora:
            torch.manual_seed(1000 + self.seed)
            rank = self.world.preset.rank
            lora.wrap(net, rank, 2 * rank, full=net.ends)
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        steps = self.total - self.head_steps
        lines = lines + self.train(net, self.folder, self.head_steps, steps, self.lr)
        shutil.rmtree(self.folder / "run")
        curve = [self.look(net, step) for step in sorted(self.marks)]
        return dict(
            steps=self.total, head_steps=self.head_steps, trained=trained, curve=curve,
            spikes=spikes([line["loss"] for line in lines]),
            grad_norm=max(line["gradient"] for line in lines),
            seconds=sum(line["seconds_per_step"] for line in lines),
        )

    def aligned(self):
        """The transformer after stages 1a and 1b, and the log of 1b."""
        world, arm, ready = self.world, self.arm, self.start / "net.safetensors"
        net = world.fresh(self.seed, arm.base)
        if not ready.exists():
            weight, bias = world.align(arm.align, net, self.seed)
            net.set_embedder(weight, bias)
            if arm.head == "closed_form":
                source = world.source("train", seed=self.seed)
                align.solve_head(net, source, TIMES, world.preset.head_batches, 32)
            lines = []
            if self.head_steps:
                lora.freeze(net, net.ends)
                lr = world.preset.lr_head
                lines = self.train(net, self.start, 0, self.head_steps, lr)
                shutil.rmtree(self.start / "run")
            else:
                self.look(net, 0)
            checkpoint.save_tensors(ready, net.state_dict(), {"log": lines})
        tensors, metadata = checkpoint.load_tensors(ready)
        net.load_state_dict(tensors)
        return net, metadata["log"]

    def train(self, net, folder, first, steps, lr):
        """Steps `first` to `first + steps` with the flow-matching loss -> their log."""
        world, size = self.world, self.world.preset.batch
        source = world.source("train", seed=self.seed)
        opt = torch.optim.AdamW(loop.trained(net).values(), lr=lr, weight_decay=0)
        plan = loop.Plan(steps, world.preset.warmup, log_every=1, keep=1)
        config = dict(data=source.fingerprint, first=first, lr=lr, batch=size)
        run = loop.Run(folder / "run", config, {"net": net}, {"net": opt}, plan)

        def before(step):
            if step in self.marks:
                self.look(net, step)

        what = f"{self.key}, rate {lr:g}, seed {self.seed}"
        toy_base.fit(run, net, source, size, self.seed, what, first, before)
        self.look(net, first + steps)
        return loop.read_log(run.folder)

    @torch.no_grad()
    def look(self, net, step):
        """Keep the weights of a step that will be scored. -> its loss on held-out clips of
        each group, with the same prompts, noise and times for all arms."""
        world = self.world
        file = self.weights(step)

        def make():
            net.eval()
            if step in self.scored:
                dit.save(lora.merge(copy.deepcopy(net)), file, dtype=torch.float16)
            found = dict(step=step)
            for group in GROUPS:
                source = world.source(group, null=0, drop=0)
                found[group] = journal.validation_loss(net, source, TIMES, world.preset.held)
            return found

        return world.ledger.once("look", make, at=str(file.relative_to(world.out)))

    def score(self):
        """Videos at the scored steps, read back -> [{group: fit, "step"}]."""
        world, rows = self.world, []
        for step in sorted(self.scored):
            file = self.weights(step)

            def make():
                net = dit.load(file).to(world.device)
                found, shown = world.score(replace(world.deep, net=net))
                if self.seed == 0 and step == self.total:
                    checkpoint.save_tensors(world.out / "shown" / f"{self.key}.safetensors", shown)
                return dict(step=step, **found)

            at = str(file.relative_to(world.out))
            rows.append(world.ledger.once("score", make, at=at))
        return rows


def spikes(losses):
    """How often a loss is twice the median of the 20 before it."""
    found = 0
    for i in range(20, len(losses)):
        found += losses[i] > 2 * statistics.median(losses[i - 20 : i])
    return found


# --------------------------------------------------------------------- before any arm


@torch.no_grad()
def gate(world):
    """What the arms can inherit: accuracy per attribute on clips, on the reconstructions of
    both autoencoders and on the base's samples. An attribute passes where the base has at
    least 0.9 and the deep autoencoder loses at most 0.03."""
    prompts = sum(world.prompts.values(), [])
    rng = np.random.default_rng(98)
    scenes = [toy.scene_of(p, rng) for p in prompts]
    clips = toy.clips_of(scenes, world.base.frames, world.base.size[0])
    rows = {"clips": toy_score.prompt_fit(clips, prompts)}
    for name, model in (("base", world.base), ("deep", world.deep)):
        found = toy_base.score_reconstruction(model, prompts, clips)
        rows[f"{name} reconstruction"] = found
    base, shown = world.score(world.base)
    checkpoint.save_tensors(world.out / "shown" / "base.safetensors", shown)
    passed, samples = {}, {}
    for k in toy.WORLD:
        samples[k] = statistics.fmean(base[group][k] for group in GROUPS)
        kept = rows["deep reconstruction"][k] >= rows["clips"][k] - 0.03
        passed[k] = samples[k] >= 0.9 and kept
    rows["base samples"] = samples
    chance = {k: toy_score.chance(k) for k in toy.WORLD}
    return dict(rows=rows, passed=passed, base=base, chance=chance)


def half_size(world):
    """The control that a reviewer asks for: the base at half the size, which has as few
    tokens as the deep model, trained on at that size; its videos enlarged."""
    half = replace(world.base, net=copy.deepcopy(world.base.net),
                   size=tuple(n // 2 for n in world.base.size))
    latents = toy_base.cache_latents(half, HALF.shards, world.out.parent / "cache")
    source = toy_base.Source(latents, half.text)
    opt = Muon(half.net, HALF.lr, adam=toy_base.FIRST_AND_LAST)
    plan = loop.Plan(HALF.steps, keep=1)
    config = dict(base=hash_tensors(half.net.state_dict()), data=source.fingerprint, **asdict(HALF))
    folder = world.out.parent / "half"  # shared by all autoencoders
    run = loop.Run(folder, config, {"net": half.net}, {"net": opt}, plan)
    toy_base.fit(run, half.net, source, HALF.batch, 0, "base at half size")
    return world.score(half, enlarge=2)[0]


def alignments(world):
    """Stage 1a by every method, on held-out clips inside the data and outside it."""
    rows, net = {}, world.fresh(0)
    began = time.perf_counter()
    world.pairs["train"].moments  # one pass over the clips, which closed forms need
    rows["pass"] = dict(seconds=time.perf_counter() - began)
    for method in ("random", "sgd_published", "sgd", *align.CLOSED_FORMS[1:]):
        began = time.perf_counter()
        found = world.align(method, net, 0)
        row = rows[method] = dict(seconds=time.perf_counter() - began)
        for group in GROUPS[:2]:
            row[group] = journal.imitation(*found, world.pairs[group])
    return rows


@torch.no_grad()
def speed(world, sizes=(1, 2, 3, 4), repeats=3):
    """Forward seconds, the best of a few, of both transformers on growing frames, beside
    the ratio of their tokens."""
    rows = []
    for factor in sizes:
        size = tuple(factor * n for n in world.base.size)
        row = dict(side=size[0])
        for name, model in (("base", world.base), ("deep", world.deep)):
            shape, c = model.latent_shape(model.frames, size), model.net.config
            x = torch.zeros(1, c.in_channels, *shape, device=world.device)
            t, context = x.new_ones(1), model.text.encode([{}]).to(world.device)
            times = []
            for _ in range(repeats + 1):
                began = time.perf_counter()
                model.net(x, t, context).cpu()
                times.append(time.perf_counter() - began)
            row[f"{name} tokens"], row[f"{name} seconds"] = dit.tokens(c, shape), min(times[1:])
        row["token ratio"] = row["base tokens"] / row["deep tokens"]
        row["time ratio"] = row["base seconds"] / row["deep seconds"]
        rows.append(row)
    return rows


# ---------------------------------------------------------------- the experiment in order


def compare(world, keys, seeds, rate=None):
    """Gate, alignments, search (without `rate`: one for all, or one for each of `keys`), seeds,
    options; yields a summary after each seed."""
    ledger, found = world.ledger, dict(settings=world.ledger.settings)
    found["gate"] = ledger.once("gate", lambda: gate(world))
    found["half size"] = ledger.once("half size", lambda: half_size(world))
    found["alignments"] = ledger.once("alignments", lambda: alignments(world))
    found["speed"] = ledger.once("speed", lambda: speed(world))
    if rate:
        rates = dict(zip(keys, itertools.cycle(rate)))
    else:
        rates = search(world, [key for key in keys if key in ARMS])
        clear(world, rates)
        rates |= {key: rates["E"] for key in keys if key in OPTIONS}
    for seed in range(seeds):
        for key, lr in rates.items():
            trial = Trial(world, key, lr, seed)
            loss = trial.row()["curve"][-1]
            trial.score()
            told = "  ".join(f"{group} {loss[group]:.4f}" for group in GROUPS)
            tqdm.write(f"{key:3s} {ALL[key].title:24s} rate {lr:g} seed {seed}: loss {told}")
        yield summary(world, found, rates, seed + 1)


def search(world, keys):
    """Every arm at its own best rate -> {arm: rate}. The grid grows by its own spacing until
    no best is at an edge; then arms with fewer trials get more, halfway to the better
    neighbour of their best, until all have had as many."""
    rates = world.preset.rates
    factor = rates[-1] / rates[-2]
    found = {key: {} for key in keys}  # {arm: {rate: loss}}

    def attempt(key, lr):
        lr = float(f"{lr:.3g}")
        loss = Trial(world, key, lr, 0).row()["curve"][-1]["inside"]
        found[key][lr] = loss if math.isfinite(loss) else math.inf

    def best(key):
        return min(found[key], key=found[key].get)

    for key in keys:
        for lr in rates:
            attempt(key, lr)
        while best(key) in (min(found[key]), max(found[key])) and len(found[key]) < 10:
            up = best(key) == max(found[key])
            attempt(key, best(key) * factor if up else best(key) / factor)
    most = max(map(len, found.values()))
    for key in keys:
        while len(found[key]) < most:
            grid = sorted(found[key])
            i = grid.index(best(key))
            neighbours = grid[max(i - 1, 0) : i] + grid[i + 1 : i + 2]
            nearest = min(neighbours, key=found[key].get)
            attempt(key, math.sqrt(grid[i] * nearest))
    return {key: best(key) for key in keys}


def clear(world, rates):
    """Remove the weights of trials that lost the search: nobody will score them."""
    for folder in (world.out / "trials").glob("*-0"):
        key, lr = folder.name.removesuffix("-0").split("-", 1)
        if key in rates and lr != f"{rates[key]:g}":
            shutil.rmtree(folder)


# ------------------------------------------------------------------------------ results


def summary(world, found, rates, seeds):
    """Everything of the finished seeds, and of what was `found` before: spreads for every
    arm, and the verdicts."""
    gate = found["gate"]
    passed = [k for k, ok in gate["passed"].items() if ok]
    base, half = {}, {}
    for group in GROUPS:
        base[group] = mean_of(gate["base"][group], passed)
        half[group] = mean_of(found["half size"][group], passed)
    found = dict(found, passed=passed, chance=mean_of(gate["chance"], passed), base=base,
                 half=half, base_held=gate["base"]["word"]["held"], seeds=seeds, arms={})
    for key, lr in rates.items():
        trials = [Trial(world, key, lr, seed) for seed in range(seeds)]
        found["arms"][key] = arm_of(trials, passed, base)
    return found | dict(claims=verdicts.claims(found))


def mean_of(accuracies, passed):
    """The fit that is compared: of the attributes that passed the gate."""
    return sum(accuracies[k] for k in passed) / max(len(passed), 1)


def arm_of(trials, passed, base):
    """An arm's trials, one for each seed -> its row of the summary."""
    rows, looks, scores = [], [], []
    for trial in trials:
        rows.append(trial.row())
        looks += rows[-1]["curve"]
        scores += trial.score()
    arm = {name: rows[0][name] for name in ("steps", "head_steps", "trained")}
    arm |= dict(title=trials[0].arm.title, rate=trials[0].lr, loss={}, fit={})
    arm["seconds"] = spread(row["seconds"] for row in rows)
    arm["spikes"] = sum(row["spikes"] for row in rows)
    arm["grad_norm"] = max(row["grad_norm"] for row in rows)
    arm["steps to 95 %"] = {}
    for group in GROUPS:
        arm["loss"][group] = over_seeds(looks, lambda look: look[group])
        fits = over_seeds(scores, lambda score: mean_of(score[group], passed))
        reached = [int(step) for step, fit in fits.items() if fit["mean"] >= 0.95 * base[group]]
        arm["fit"][group], arm["steps to 95 %"][group] = fits, min(reached, default=None)
    last = str(arm["steps"])
    arm["held"] = over_seeds(scores, lambda score: score["word"]["held"])[last]
    arm["shape"] = over_seeds(scores, mean_shape)[last]
    return arm


def over_seeds(rows, value):
    """Rows of {"step", ...}, several of a step -> {step: spread of value(row)}."""
    found = {}
    for row in rows:
        found.setdefault(str(row["step"]), []).append(value(row))
    return {step: spread(values) for step, values in found.items()}


def mean_shape(score):
    return statistics.fmean(score[group]["shape"] for group in GROUPS)


def show(world, path):
    """A contact sheet: the first videos of every arm beside the base's."""
    stills, rows, labels = {}, [], []
    for key in ("base", *ALL):
        file = world.out / "shown" / f"{key}.safetensors"
        if file.exists():
            stills[key] = checkpoint.load_tensors(file)[0]
    for group, prompts in world.prompts.items():
        for i, prompt in enumerate(prompts[:2]):
            rows.append(torch.cat([found[group][i] for found in stills.values()], dim=1))
            labels.append(f"{group}: {toy.caption(prompt)}")
    video.contact_sheet(path, rows, 3 * len(stills), labels, list(stills))


# ------------------------------------------------------------------------- command line


def main(argv=None):
    p = options.Parser(
        description="Ways to move a transformer into a deep latent space, on narrow toy data.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = p.add_argument
    add("--preset", choices=PRESETS, default="laptop", help="sizes of the experiment")
    add("--arms", nargs="+", choices=ALL, default=list(ARMS),
        help=f"A to G, or options of E: {', '.join(OPTIONS)} (ARMS and OPTIONS in this file)")
    add("--ae", nargs="+", type=Path, default=[released.WEIGHTS / "toy.safetensors"],
        help="deep autoencoders, each of which gets the whole comparison")
    add("--steps", type=options.whole(1),
        help="of every arm, in place of the preset's; stage 1b keeps its share")
    add("--rate", nargs="+", type=options.learning_rate,
        help="of all arms, or one for each, in place of a search")
    add("--seeds", type=options.whole(1, 1000),
        help="fewer than the preset's; the others can be added later")
    add("--base-weights", help="transformer of the base in place of the embedded one")
    add("--out", type=Path, default=Path("out/adaptation"), help="caches, trials, weights")
    add("--results", type=Path, help="report and pictures (default: OUT)")
    add("--device", type=options.device, default=options.DEVICE)
    add("--threads", type=options.threads, help="CPU threads (default: all)")
    args, _ = p.parse(argv)
    if not args.rate and "E" not in args.arms and set(args.arms) & OPTIONS.keys():
        raise UserError("options take the learning rate of E: add E to --arms, or give --rate.")
    names = [file.stem for file in args.ae]
    if len(set(names)) < len(names):
        raise UserError("two autoencoders of --ae have the same file name: rename one.")
    if args.rate and len(args.rate) not in (1, len(args.arms)):
        raise UserError(f"--rate: give one for all arms, or {len(args.arms)}, one for each.")
    if args.threads:
        torch.set_num_threads(args.threads)
    with folders.Lock(args.out):
        compare_all(args, names)


def compare_all(args, names):
    """The comparison for every autoencoder, by its name."""
    preset = PRESETS[args.preset]
    if args.steps:
        head_steps = round(preset.head_steps * args.steps / preset.steps)
        preset = replace(preset, steps=args.steps, head_steps=head_steps)
    autoencoders = [ae.load(file) for file in args.ae]
    found, results = {}, args.results or args.out
    for name, autoencoder in zip(names, autoencoders):
        base = released.load_model("base")
        if args.base_weights:
            base = replace(base, net=dit.load(args.base_weights))
        world = World(preset, args.out / name, autoencoder, base, args.device)
        for found[name] in compare(world, args.arms, args.seeds or preset.seeds, args.rate):
            verdicts.report(found, results)
            verdicts.draw(found[name], results / f"adaptation_{name}.png")
        show(world, results / f"adaptation_{name}_videos.png")


if __name__ == "__main__":
    with errors.user_errors():
        main()
