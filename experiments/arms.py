"""The arms of the comparison: ways to carry a transformer into the deep latent space, and one trial of each (spec ae-adapt-v 10.4, 10.5).

What adaptation is for: the base knows more than the adaptation data can teach. So the data here are *narrow*: a few hundred clips, of a third
of the combinations of shape, direction and colour (a Latin square), and two words never occur in them (HELD). A model is scored on prompts

    inside        combinations that the adaptation has seen
    combination   the other two thirds: its words were seen, never together
    word          prompts with a word that no adaptation clip shows; "held" is how often just that one comes out right

The base was trained on everything. Arms (same seeds, same total of steps, those of stage 1b included):

    A scratch             all random, all trained                    E AE-Adapt-V     1a (SGD), 1b, LoRA: as published
    B naive full          base blocks, random ends, all trained      F aligned full   1a (SGD), 1b, then everything
    C naive LoRA          the same, ends and LoRA trained            G closed form    embedder and head by regression, half of 1b, LoRA
    D no MSE stage        random embedder, 1b, LoRA

and OPTIONS: E with one thing changed each (other alignments, time samplings, null condition), and some arms with eight times the samples.
"""
import copy
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

import ae
import align
import dit
import flow
import kernels
import lora
import sample
import toy
from dit import ENDS
from training import journal, loop, toy_base
from wan import models, released

HELD = {"colour": "purple", "direction": "up"}  # words that no adaptation clip shows
GROUPS = ("inside", "combination", "word")


@dataclass(frozen=True)
class Arm:
    """How an adapted model comes about. `head_steps`: stage 1b as a share of the preset's; lora: else everything is trained."""

    title: str
    base: bool = True
    align: str | None = None  # sgd, closed_form, ridge_to_init, noise_aware; None: random
    head: str = "zero"  # or closed_form
    head_steps: float = 0.0
    lora: bool = True
    times: flow.Times = toy_base.TIMES
    null: str = "empty"
    stretch: tuple = (1, 1)  # steps and batch, as multiples of the preset's
    like: str = "E"  # of an option: the arm whose learning rate it takes


ARMS = {
    "A": Arm("scratch", base=False, lora=False),
    "B": Arm("naive full", lora=False),
    "C": Arm("naive LoRA"),
    "D": Arm("no MSE stage", head_steps=1),
    "E": Arm("AE-Adapt-V", align="sgd", head_steps=1),
    "F": Arm("aligned full", align="sgd", head_steps=1, lora=False),
    "G": Arm("closed form", align="closed_form", head="closed_form", head_steps=0.5),
}
#: E with one thing changed
OPTIONS = {
    "a1": replace(ARMS["E"], title="plain closed form", align="closed_form"),
    "a2": replace(ARMS["E"], title="ridge to init", align="ridge_to_init"),
    "a3": replace(ARMS["E"], title="regressed head", head="closed_form"),
    "b": replace(ARMS["E"], title="noise-aware", align="noise_aware"),
    "ab": replace(ARMS["E"], title="noise-aware, regressed head", align="noise_aware", head="closed_form"),
    "c1": replace(ARMS["E"], title="released times, S 8", times=flow.Times("released", 8.0)),
    "c2": replace(ARMS["E"], title="shifted times, S 8", times=flow.Times("shifted", 8.0)),
    "d": replace(ARMS["E"], title="null is a word", null="word"),
}
#: some arms with eight times the samples
OPTIONS |= {f"L{k}": replace(ARMS[k], title=f"{ARMS[k].title}, 2x steps, 4x batch", stretch=(2, 4), like=k) for k in "ABEG"}
ALL = {**ARMS, **OPTIONS}


@dataclass(frozen=True)
class Preset:
    """Sizes of the experiment. `scored`: steps at which videos are made and read, as shares of `steps`; the loss is measured at `marks`."""

    clips: int = 512
    held: int = 64  # clips per group for the validation loss
    prompts: tuple = (24, 24, 24)  # per group
    sampling_steps: int = 8
    steps: int = 300
    head_steps: int = 60
    batch: int = 32
    warmup: int = 20
    rates: tuple = (2e-3, 5e-3, 1.25e-2)
    lr_head: float = 8e-3
    rank: int = 32
    seeds: int = 3
    sgd: tuple = (2000, 16, 2e-3)  # steps, clips, rate of stage 1a in the arms
    sgd_published: tuple = (20000, 4, 2e-4)
    head_batches: int = 24
    marks: tuple = (0, 0.25, 0.5, 0.75, 1)
    scored: tuple = (0.25, 1)


PRESETS = {
    "laptop": Preset(),
    "short": Preset(held=32, prompts=(12, 12, 12), steps=120, head_steps=30, batch=8, marks=(0, 0.25, 0.5, 1)),
    "gpu": Preset(steps=400, head_steps=100, batch=32, held=64, prompts=(128, 128, 64), sampling_steps=20, rates=(8e-4, 2e-3, 5e-3, 1.25e-2),
                  head_batches=64, marks=tuple(i / 8 for i in range(9)), scored=(0.25, 0.5, 0.75, 1)),
    "smoke": Preset(clips=12, held=4, prompts=(2, 2, 2), sampling_steps=2, steps=4, head_steps=1, batch=2, warmup=1, rates=(1e-3, 2e-3, 4e-3), rank=2,
                    seeds=1, sgd=(5, 2, 2e-3), sgd_published=(20, 2, 2e-3), head_batches=2, marks=(0, 0.25, 1), scored=(0.25, 1)),
}


# ---------------------------------------------------------------------------------------------------- narrow data


def inside(attributes):
    """Does the adaptation see this combination? A Latin square over shape, direction and colour, without the held-out words."""
    index = sum(toy.WORLD[name].index(attributes[name]) for name in ("shape", "direction", "colour"))
    return index % 3 == 0 and not holds(attributes)


def holds(attributes):
    """The held-out words of a prompt: {attribute: word}."""
    return {name: word for name, word in HELD.items() if attributes[name] == word}


def scenes_of(group, n, seed):
    """n random scenes of a group. "word": one held-out word each, in turns."""
    rng, out = np.random.default_rng(seed), []
    while len(out) < n:
        scene = toy.random_scene(rng)
        a = scene.attributes()
        wanted = list(HELD)[len(out) % len(HELD)]
        if {"inside": inside(a), "combination": not inside(a) and not holds(a), "word": list(holds(a)) == [wanted]}[group]:
            out.append(scene)
    return out


class NullWord(toy.ToyText):
    """The toy's vocabulary with a word in place of nothing as its null prompt: what stands here for Wan's negative prompt (spec 2.5), which on
    the toy has no meaning of its own. Row and column are used by no attribute, so the base has never seen it."""

    def null(self, n):
        context = torch.zeros(n, self.text_len, self.text_dim)
        context[:, -1, -1] = self.text_dim**0.5
        return context

    def encode(self, attributes):
        context = super().encode(attributes)
        empty = [not given for given in attributes]
        context[empty] = self.null(sum(empty))
        return context


# ---------------------------------------------------------------------------------------------------- one trial


class World:
    """What all trials share: the base, the deep autoencoder, narrow data in both spaces, prompts, and the alignments of each seed."""

    def __init__(self, preset, out, base_weights, device):
        self.preset, self.out, self.device = preset, out, torch.device(device)
        self.base = released.load_model("base")
        if base_weights:
            self.base.net = dit.load(base_weights)
        autoencoder = ae.load(released.WEIGHTS / "toy.safetensors")
        self.deep = models.Model("deep", dit.inherit(self.base.net, dit.PRESETS["toy-dc"]), autoencoder, self.base.text).to(device)
        self.base.to(device)
        self.prompts = {g: [s.attributes() for s in scenes_of(g, n, (99, i))] for i, (g, n) in enumerate(zip(GROUPS, preset.prompts))}
        sets = {"train": scenes_of("inside", preset.clips, 1), **{g: scenes_of(g, preset.held, (2, i)) for i, g in enumerate(GROUPS)}}
        self.clips = {k: toy_base.encode_scenes(self.deep, s, out / "cache") for k, s in sets.items()}
        self.teacher = {k: toy_base.encode_scenes(self.base, sets[k], out / "cache") for k in ("train", "inside", "combination")}
        self.pairs = toy_base.Source(self.clips["train"], self.base.text, self.teacher["train"])
        self.tokens = align.Tokens.of((self.base.net.config, self.deep.net.config), self.pairs.pair(0))
        self.seconds = {}  # of the one pass over each set of clips that the closed forms need
        self.moments = {k: self.pass_over(k) for k in self.teacher}
        self.kept = {}  # alignments, and states after stage 1b, that several trials share

    def pass_over(self, k):
        began, index = time.perf_counter(), torch.arange(len(self.teacher[k].z))
        pairs = ((self.teacher[k].inputs(i), self.clips[k].inputs(i)) for i in index.split(64))
        moments = align.Moments.of(pairs, self.tokens.patches)
        self.seconds[k] = round(time.perf_counter() - began, 3)
        return moments

    def fresh(self, seed, base=True):
        """A transformer for the deep space that has nothing aligned; without `base`, nothing inherited either."""
        torch.manual_seed(seed)
        net = dit.inherit(self.base.net, dit.PRESETS["toy-dc"]) if base else dit.WanDiT(dit.PRESETS["toy-dc"])
        return net.to(self.device)

    def embedder(self, method, net, seed):
        """Stage 1a by one of the methods -> (weight, bias)."""
        fresh = net.patch_embedding
        problem = align.Problem(self.base.net.patch_embedding, (fresh.weight, fresh.bias), self.pairs.pair, len(self.pairs), self.tokens, toy_base.TIMES)
        problem.moments = self.moments["train"]
        if method not in ("sgd", "sgd_published"):
            return align.fit(method or "random", problem)
        steps, clips, lr = getattr(self.preset, method)
        plan = loop.Plan(steps, warmup=0, decay="constant", clip=0.0, save_every=steps, log_every=steps, keep=1)
        with tempfile.TemporaryDirectory() as folder:
            return align.sgd(problem, partial(loop.Run, folder, {}, plan=plan), clips, lr, seed)

    def source(self, arm, seed):
        return toy_base.Source(self.clips["train"], NullWord() if arm.null == "word" else self.base.text, seed=seed, image=0.0)

    def aligned(self, arm, seed):
        """The arm's start: embedder and head aligned, stage 1b not begun."""
        net = self.fresh(seed, arm.base)
        if arm.align:
            if (arm.align, seed) not in self.kept:
                self.kept[arm.align, seed] = self.embedder(arm.align, net, seed)
            weight, bias = self.kept[arm.align, seed]
            with torch.no_grad():
                net.patch_embedding.weight.copy_(weight.view_as(net.patch_embedding.weight))
                net.patch_embedding.bias.copy_(bias)
        if arm.head == "closed_form":
            align.solve_head(net, self.source(arm, seed), arm.times, self.preset.head_batches, 32)
        return net

    @torch.no_grad()
    def losses(self, net):
        """Validation loss per group: same clips, prompts, noise and times for all arms (shifted times, whatever the arm trains with)."""
        out, training = {}, net.training
        net.eval()
        for group in GROUPS:
            source = toy_base.Source(self.clips[group], self.base.text, null=0, drop=0, image=0.0)
            out[group] = journal.validation_loss(net, source, toy_base.TIMES, self.preset.held)
        net.train(training)
        return out

    def depth(self, net):
        """Feature distance per block, relative to the base's variance, on held-out clips without noise."""
        n = min(32, self.preset.held)
        teacher, student = (c["inside"].inputs(range(n)) for c in (self.teacher, self.clips))
        context = self.base.text.encode(self.clips["inside"].attributes[:n])
        return {str(k): v[1] for k, v in journal.depth_curve(self.base.net, net, teacher, student, (context,)).items()}

    def score(self, model, null="empty"):
        """Videos of all prompts, read back -> ({group: prompt_fit, and "held"}, the first two videos of each group as three frames)."""
        model = replace(model, text=NullWord()) if null == "word" else model
        found, shown = {}, {}
        for group, prompts in self.prompts.items():
            with kernels.autocast(self.device):
                videos = sample.videos(model, prompts, steps=self.preset.sampling_steps)
            found[group], shown[group] = toy.prompt_fit(videos, prompts), [v[:, [0, (v.shape[1] - 1) // 2, -1]] for v in videos[:2]]
            held = [(v, holds(p)) for v, p in zip(videos, prompts) if holds(p)]
            if held:
                found[group]["held"] = sum(toy.prompt_fit([v], [words])[k] for v, words in held for k in words) / len(held)
        return found, shown


def run(world, key, lr, seed):
    """One trial -> its row; weights at the scored steps are kept beside it."""
    arm, p = ALL[key], world.preset
    began = time.perf_counter()
    total, batch_size, head_steps = p.steps * arm.stretch[0], p.batch * arm.stretch[1], round(p.head_steps * arm.head_steps)
    source = world.source(arm, seed)
    marks = {round(m * total) for m in p.marks}
    scored = {round(m * total) for m in p.scored} | {head_steps} - {0}
    row = dict(arm=key, lr=lr, seed=seed, steps=total, head_steps=head_steps, curve=[], depth={}, spikes=0, grad_norm=0.0)
    history = []

    def stop(net, step):
        if step in marks | {head_steps}:
            row["curve"].append(dict(step=step, **world.losses(net)))
        if step in scored:
            merged = lora.merge(copy.deepcopy(net))
            dit.save(merged, weights_file(world.out, row, step), dtype=torch.float16)
        if step in (0, head_steps, total):
            row["depth"][str(step)] = world.depth(net)

    def train(net, first, steps, lr):
        net.train()
        params = [q for q in net.parameters() if q.requires_grad]
        opt = torch.optim.AdamW(params, lr=lr, weight_decay=0, fused=True)
        for i in range(steps):
            for group in opt.param_groups:
                group["lr"] = lr * min((i + 1) / p.warmup, 1 - i / steps)
            batch = source.batch(first + i, range(batch_size))
            drawn = flow.draw(batch.z.shape[1:], arm.times, seed, first + i, range(batch_size))
            with kernels.autocast(world.device, world.device.type == "cuda"):  # no gain on the CPU at these sizes
                loss, _ = flow.loss(align.velocity_of(net, batch, world.device), batch.z, drawn)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(params, 1.0).item()
            opt.step()
            history.append(loss.item())
            row["grad_norm"] = max(row["grad_norm"], norm)
            row["spikes"] += len(history) > 20 and history[-1] > 2 * statistics.median(history[-21:-1])
            if i + 1 < steps:
                stop(net, first + i + 1)
        return sum(q.numel() for q in params)

    shared = (arm.base, arm.align, arm.head, head_steps, arm.times, arm.null, batch_size, seed)
    if shared in world.kept:
        state, done = world.kept[shared]
        net = world.fresh(seed, arm.base)
        net.load_state_dict(state)
        row.update(copy.deepcopy(done))
        if head_steps in scored:
            dit.save(net, weights_file(world.out, row, head_steps), dtype=torch.float16)
    else:
        net = world.aligned(arm, seed)
        stop(net, 0)
        if head_steps:
            net.requires_grad_(False)
            for end in ENDS:
                net.get_submodule(end).requires_grad_(True)
            row["trained_1b"] = train(net, 0, head_steps, p.lr_head)
            stop(net, head_steps)
        world.kept[shared] = copy.deepcopy(net.state_dict()), {k: copy.deepcopy(row[k]) for k in ("curve", "depth", "spikes", "grad_norm")}
        world.kept[shared][1]["seconds_before"] = round(time.perf_counter() - began, 1)
        row["seconds_before"] = 0.0
    net.requires_grad_(True)
    if arm.lora:
        torch.manual_seed(1000 + seed)
        lora.wrap(net, p.rank, 2 * p.rank, full=ENDS)
    row["trained"] = train(net, head_steps, total - head_steps, lr)
    stop(net, total)
    inside = toy_base.Source(world.clips["inside"], world.base.text, null=0, drop=0, image=0.0)
    row["sigma"] = journal.loss_by_sigma(net.eval(), inside, 4, p.held, toy_base.TIMES.shift)
    row["seconds"] = round(time.perf_counter() - began + row.pop("seconds_before"), 1)
    return row


def weights_file(out, row, step):
    return out / "weights" / f"{row['arm']}-{row['lr']:g}-{row['seed']}-{step}.safetensors"
