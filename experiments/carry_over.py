"""Do LoRAs of a base work on the model that was moved into the deep latent space?

Nobody has reported it. AE-Adapt-V keeps the blocks of the base and changes the two ends, so
what a LoRA of the base adds is still there, between an embedder that imitates the old one and
a new head. Here it is measured on the toy, with a word that no model knows: LoRAs are trained
on clips of *orange* objects alone, and every model is asked for two things:

    new      share of prompts for an orange object that show one
    others   prompt fit on the usual prompts: what the LoRA spoils

    base, its own               the LoRA where it was trained
    deep, the base's            the question: the same file on the deep model, as it is
    deep, its own               a LoRA trained on the deep model: what could be had
    base, the deep's            the way back
    adapted with the base's     merged into the base before AE-Adapt-V, which then moves both
    adapted without             the same adaptation, in short as well, of the base as it is
    adapted, then the base's    the LoRA put on that one

each at several strengths, beside both models without a LoRA.

    python -m experiments.carry_over              adaptations included, see docs/claims.md
    python -m experiments.carry_over --adaptations 0

OUT/trials.jsonl holds what is finished, so the same command goes on where it stopped.
"""
from files import errors

errors.begin(__name__)  # before the slow imports: a Ctrl-C, waiting threads

import argparse
import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import adapt
import dit
import kernels
import lora
import sample
import toy
from experiments.adaptation import Ledger
from experiments.verdicts import spread
from files import checkpoint, options, video
from training import bases, loop, toy_base, toy_score
from training.entries import hash_tensors
from wan import released

WORD, PAINT = "orange", (240, 125, 20)
COLOURS = toy.COLOURS | {WORD: PAINT}
#: what LoRAs for Wan usually adapt: cross-attention too, and no layer of time
TARGETS = (r"blocks\.\d+\.(self|cross)_attn\.[qkvo]", r"blocks\.\d+\.ffn\.[02]")
STRENGTHS = (0.5, 1.0, 1.5)
RANK, BATCH, RATE, CLIPS = 16, 16, 1e-3, 256
SOLVER_STEPS = 10  # for each video: half the toy's own, at the same prompt fit (docs/speed.md)
#: how a base is adapted: a seventh of the toy's own steps, and nothing but the result
ADAPTATION = ("--shards", "3", "--steps-head", "100", "--steps", "200", "--prompts", "1",
              "--sample-steps", "0")
SHOWN = 4  # prompts in the picture


class Words(toy.ToyText):
    """The toy's vocabulary and one word more, in a column that no training has used."""

    def __init__(self):
        super().__init__()
        self.column["colour", WORD] = len(self.column)


def new_scenes(n, seed):
    """Scenes with an orange object, else as random as all."""
    rng, scenes = np.random.default_rng(seed), []
    for _ in range(n):
        attributes = toy.random_scene(rng).attributes() | {"colour": WORD}
        scenes.append(replace(toy.scene_of(attributes, rng), paint=PAINT))
    return scenes


@dataclass
class Experiment:
    """What all trials share: both models, the prompts, the finished work."""

    base: object  # wan.models.Model
    deep: object
    steps: int
    prompts: int
    out: Path

    def __post_init__(self):
        nets = {k: hash_tensors(m.net.state_dict()) for k, m in self.models.items()}
        self.ledger = Ledger(self.out, dict(nets, steps=self.steps, prompts=self.prompts))
        self.new = [scene.attributes() for scene in new_scenes(self.prompts, seed=99)]
        self.others = toy.held_out_prompts(self.prompts)

    @property
    def models(self):
        return {"base": self.base, "deep": self.deep}

    def lora_of(self, name, seed):
        """The LoRA trained on one of the models -> its file; trained now if it is not there."""
        file = self.out / f"{name}-{seed}.safetensors"
        if not file.exists():
            net = train(self.models[name], self.steps, self.out, f"{name}-{seed}", seed)
            lora.save(net, file)
        return file

    def adapted(self, seed, merged):
        """The base, as it is or with its LoRA merged, moved into the deep space by adapt.py
        -> Model."""
        base, name = bases.find("toy"), f"merged-{seed}" if merged else f"plain-{seed}"
        if merged:
            file = self.out / f"{name}.safetensors"
            if not file.exists():
                dit.save(with_lora(self.base, self.lora_of("base", seed), 1.0).net, file)
            base = replace(base, transformer=file)
        out = self.out / "adapted" / name
        line = ["--base", "toy", "--out", str(out), "--cache", str(self.out / "cache"),
                "--seed", str(seed), *ADAPTATION]
        args, given = adapt.arguments(line)
        adapt.adapt(base, replace(base.settings, **given), args)
        return replace(released.load_model(str(out)), text=Words())

    def score(self, model, picture=None):
        """-> {"new": ..., "others": ...}; the first videos of both kinds go to `picture`."""
        with kernels.autocast(model.device):
            new = sample.videos(model, self.new, steps=SOLVER_STEPS)
            others = sample.videos(model, self.others, steps=SOLVER_STEPS)
        found = dict(new=toy_score.prompt_fit(new, self.new, COLOURS)["colour"],
                     others=toy_score.prompt_fit(others, self.others, COLOURS)["mean"])
        if picture is not None:
            shown = torch.stack(new[:SHOWN] + others[:SHOWN])
            checkpoint.save_tensors(picture, {"stills": shown[:, :, shown.shape[2] // 2]})
        return found

    def trial(self, title, make, strength=None, seed=0):
        """The score of a model, made now if that was not done."""
        picture = None
        if seed == 0 and strength in (None, 1.0):
            picture = self.out / "shown" / f"{title}.safetensors"
        key = dict(title=title, strength=strength, seed=seed)
        return self.ledger.once("score", lambda: self.score(make(), picture), **key)


def with_lora(model, file, strength):
    """A model with a LoRA merged into a copy of it."""
    net = copy.deepcopy(model.net)
    lora.load(net, file, strength)
    return replace(model, net=net)


def train(model, steps, out, name, seed):
    """A LoRA on clips of orange objects -> the transformer with it."""
    scenes = new_scenes(CLIPS, (7, seed))
    latents = toy_base.encode_scenes(model, scenes, out / "cache")
    source = toy_base.Source(latents, model.text, seed=seed, image=0)
    torch.manual_seed(seed)
    net = lora.wrap(copy.deepcopy(model.net), RANK, RANK, TARGETS).train()
    opt = torch.optim.AdamW(loop.trained(net).values(), lr=RATE, weight_decay=0)
    plan = loop.Plan(steps, warmup=20, keep=1)
    config = dict(data=source.fingerprint, seed=seed, lr=RATE, batch=BATCH, rank=RANK)
    run = loop.Run(out / "runs" / name, config, {"net": net}, {"net": opt}, plan)
    toy_base.fit(run, net, source, BATCH, seed, f"LoRA on the {name}")
    return net.eval()


# ------------------------------------------------------------------------------ results


def run(experiment, seeds, adaptations):
    """All trials -> {title: {strength: {"new": spread, "others": spread}}}."""
    e, rows = experiment, {}

    def score(title, make, strength=None, seed=0):
        by_strength = rows.setdefault(title, {})
        found = e.trial(title, make, strength, seed)
        by_strength.setdefault(str(strength or ""), []).append(found)

    for name, model in e.models.items():
        score(f"{name}, no LoRA", lambda: model)
    for seed in range(seeds):
        for name in e.models:
            for trained_on in e.models:
                whose = "its own" if name == trained_on else f"the {trained_on}'s"
                file = e.lora_of(trained_on, seed)
                for strength in STRENGTHS:
                    make = partial(with_lora, e.models[name], file, strength)
                    score(f"{name}, {whose}", make, strength, seed)
    for seed in range(adaptations):
        score("adapted with the base's", partial(e.adapted, seed, True), seed=seed)
        plain, file = partial(e.adapted, seed, False), e.lora_of("base", seed)
        score("adapted without", plain, seed=seed)
        score("adapted, then the base's", lambda: with_lora(plain(), file, 1.0), seed=seed)
    for by_strength in rows.values():
        for strength, found in by_strength.items():
            new, others = [row["new"] for row in found], [row["others"] for row in found]
            by_strength[strength] = dict(new=spread(new), others=spread(others))
    return rows


def table(rows):
    """The numbers as lines: means, and the range over seeds where there is one."""
    lines = [f"{'':26s}{'strength':>9s}{'new':>20s}{'others':>20s}"]
    for title, by_strength in rows.items():
        for strength, found in by_strength.items():
            new, others = cell(found["new"]), cell(found["others"])
            lines.append(f"{title:26s}{strength:>9s}{new:>20s}{others:>20s}")
    return "\n".join(lines)


def cell(s):
    if s["seeds"] == 1:
        return f"{s['mean']:.2f}"
    return f"{s['mean']:.2f} ({s['low']:.2f}-{s['high']:.2f})"


def show(experiment, path):
    """A contact sheet: a row for each prompt, a column for each model at strength 1."""
    files = sorted((experiment.out / "shown").glob("*.safetensors"))
    columns = [checkpoint.load_tensors(f)[0]["stills"] for f in files]
    prompts = experiment.new[:SHOWN] + experiment.others[:SHOWN]
    rows = list(torch.stack(columns, dim=2))  # of [3, models, h, w] each
    labels = [toy.caption(prompt) for prompt in prompts]
    video.contact_sheet(path, rows, len(files), labels, [f.stem for f in files])


# ------------------------------------------------------------------------- command line


def main(argv=None):
    p = options.Parser(
        description="LoRAs of the toy base on the deep model, and the reverse.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--steps", type=options.whole(1), default=120, help="of each LoRA, batch 16")
    add("--seeds", type=options.whole(1, 1000), default=3)
    add("--adaptations", type=options.whole(0, 1000), default=1,
        help="seeds for which the base is adapted, in short, with the LoRA merged and without")
    add("--prompts", type=options.whole(SHOWN), default=24, help="of both kinds")
    add("--out", type=Path, default=Path("out/carry_over"), help="LoRAs, trials, pictures")
    add("--results", type=Path, help="report and picture (default: OUT)")
    add("--device", type=options.device, default=options.DEVICE)
    add("--threads", type=options.threads, help="CPU threads (default: all)")
    args, _ = p.parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    results = args.results or args.out
    with loop.lock(args.out):
        base = replace(released.load_model("base", device=args.device), text=Words())
        deep = replace(released.load_model("dc", device=args.device), text=Words())
        experiment = Experiment(base, deep, args.steps, args.prompts, args.out)
        rows = run(experiment, args.seeds, args.adaptations)
        print(table(rows))
        show(experiment, results / "carry_over.png")
        found = dict(**checkpoint.provenance(), steps=args.steps, prompts=args.prompts, rows=rows)
        checkpoint.write_json(results / "carry_over.json", found)


if __name__ == "__main__":
    with errors.user_errors():
        main()
