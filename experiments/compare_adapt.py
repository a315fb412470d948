"""The paper's claims put to the test on the toy (spec ae-adapt-v 10; paper, figure on convergence, ablations of AE-Adapt-V).

First the *gate*: an arm cannot inherit what the base does not know, so attributes that the detector, an autoencoder or the base misses are
reported, but left out of the fit that is compared. Then every arm (`experiments/arms.py`) runs at each learning rate of a grid, extended until its best is
not at the edge, with the same number of trials for all; the best is chosen on the validation loss *inside* the adaptation data and the first seed.
Then the other seeds at that rate. The options run at the rate of the arm that they vary. `experiments/claims.py` draws the conclusions. No ordering is a pass/fail test.

    python adapt.py --base toy --compare                    or python -m experiments.compare_adapt: the laptop preset: an hour and a half on one busy core
    python -m experiments.compare_adapt --preset short                  half an hour on one busy core
    python -m experiments.compare_adapt --arms E b ab                   options are E with one thing changed, and take its learning rate
    python -m experiments.compare_adapt --preset gpu                    on a GPU (not measured)
    python -m experiments.compare_adapt --preset smoke                  two minutes, numbers without meaning

Finished trials are kept in OUT/trials.jsonl, their weights in OUT/weights: the command goes on where it stopped. The report, results/compare_adapt.json,
.png and _videos.png with the tables in OUT/compare_adapt.md, is rewritten after each seed.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting threads slow every other process down; must precede torch

import argparse
import contextlib
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import align
import dit
import kernels
import toy
from experiments import claims
from experiments.arms import ALL, ARMS, GROUPS, HELD, OPTIONS, PRESETS, World, run, weights_file
from files import checkpoint, video
from files.checkpoint import UserError
from training import metrics
from training.entries import hash_tensors

# ---------------------------------------------------------------------------------------------------- before any arm


def gate(world):
    """What the arms can inherit at all (spec 10.4): accuracy per attribute of the detector on real clips, of both reconstructions and of the
    base's samples. An attribute passes with real clips >= 0.95, reconstructions within 0.03 of them, base samples >= 0.9 of the base's
    reconstructions. The base's score per group is the line that the arms are measured against."""
    prompts = [p for group in world.prompts.values() for p in group]
    rng = np.random.default_rng(98)
    clips = torch.stack([video.to_tensor(toy.render(toy.scene_of(p, rng))) for p in prompts])
    rows = {"clips": toy.prompt_fit(clips, prompts)}
    for name, model in (("base", world.base), ("deep", world.deep)):
        with torch.no_grad(), kernels.autocast(world.device):
            made = torch.cat([model.ae(x.to(world.device)).float().cpu() for x in clips.split(16)])
        rows[f"{name} reconstruction"] = {**toy.prompt_fit(made, prompts), "psnr": metrics.psnr(made, clips)}
    base, strips = world.score(world.base)
    keep_strips(world, "base", strips)
    counts = {g: len(p) for g, p in world.prompts.items()}
    rows["base samples"] = {k: sum(base[g][k] * n for g, n in counts.items()) / len(prompts) for k in toy.WORLD}
    passed = {k: rows["clips"][k] >= 0.95 and all(rows[f"{n} reconstruction"][k] >= rows["clips"][k] - 0.03 for n in ("base", "deep"))
              and rows["base samples"][k] >= 0.9 * rows["base reconstruction"][k] for k in toy.WORLD}
    return dict(rows=rows, passed=passed, base=base, chance={k: toy.chance(k) for k in toy.WORLD})


def alignments(world):
    """Stage 1a by every method: R^2 and MSE on held-out clips inside the data and outside it, norm ratio, seconds."""
    rows, net = {}, world.fresh(0)
    for method in (None, "sgd_published", "sgd", "closed_form", "ridge_to_init", "noise_aware"):
        began = time.perf_counter()
        weight, bias = world.embedder(method, net, 0)
        row = rows[method or "random"] = dict(seconds=round(time.perf_counter() - began, 4))
        for group in ("inside", "combination"):
            row[f"r2 {group}"], row[f"mse {group}"] = align.r_squared(world.moments[group], world.base.net.patch_embedding, weight, bias)
        row["norm_ratio"] = align.norm_ratio(weight, world.base.net.patch_embedding, world.tokens)
    return rows


@torch.no_grad()
def speed(world, sides=(64, 128, 192, 256), repeats=3):
    """Forward seconds (best of a few) of both transformers on a clip of 32 frames at growing sizes, beside the ratio of their tokens."""
    rows = []
    for side in sides:
        row = dict(side=side)
        for name, model in (("base", world.base), ("deep", world.deep)):
            shape, c = model.latent_shape(32, (side, side)), model.net.config
            x, t, context = torch.zeros(1, c.in_channels, *shape, device=world.device), torch.ones(1, device=world.device), model.text.encode([{}]).to(world.device)
            times = []
            for _ in range(repeats + 1):
                began = time.perf_counter()
                model.net(x, t, context).cpu()
                times.append(time.perf_counter() - began)
            row |= {f"{name} tokens": math.prod(shape) // math.prod(c.patch), f"{name} seconds": min(times[1:])}
        rows.append({**row, "token ratio": row["base tokens"] / row["deep tokens"], "time ratio": row["base seconds"] / row["deep seconds"]})
    return rows


# ---------------------------------------------------------------------------------------------------- the experiment in order


class Ledger:
    """Finished work as JSON lines: what is there is not made again. A line that a crash cut off is removed."""

    def __init__(self, folder, settings):
        self.file, self.lines = folder / "trials.jsonl", []
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                self.lines.append(json.loads(line))
        with checkpoint.atomic_path(self.file) as tmp:
            tmp.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        if self.once("settings", lambda: settings) != json.loads(json.dumps(settings)):
            raise UserError(f"{folder} holds a comparison with other settings, or on another base: use the same ones, or another --out.")

    def once(self, kind, make, **key):
        """The line of this kind and key -> its value; made and written now if it is not there."""
        key = dict(kind=kind, **key)
        for line in self.lines:
            if line["key"] == key:
                return line["value"]
        value = json.loads(json.dumps(make()))
        self.lines.append(dict(key=key, value=value))
        with open(self.file, "a") as f:
            f.write(json.dumps(self.lines[-1]) + "\n")
        return value

    def all(self, kind, **key):
        """The values of this kind whose key holds all of `key`."""
        return [line["value"] for line in self.lines if line["key"]["kind"] == kind and key.items() <= line["key"].items()]


def best_rate(ledger, key):
    """(learning rate with the lowest final loss inside the adaptation data on the first seed, {rate: loss}). A diverged trial counts as infinite."""
    found = {row["lr"]: row["curve"][-1]["inside"] for row in ledger.all("trial", arm=key, seed=0)}
    found = {lr: loss if math.isfinite(loss) else math.inf for lr, loss in sorted(found.items())}
    return min(found, key=found.get), found


def search(world, ledger, keys):
    """Every arm at its own best rate: the grid, extended by its own spacing until no best is at an edge; then arms with fewer trials get
    more of them, halfway to the better neighbour of their best, until all have had the same number -> {arm: rate}."""
    def trial(key, lr):
        lr = float(f"{lr:.3g}")
        ledger.once("trial", lambda: run(world, key, lr, 0), arm=key, lr=lr, seed=0)

    rates = world.preset.rates
    factor = rates[-1] / rates[-2]
    for key in keys:
        for lr in rates:
            trial(key, lr)
        while (best := best_rate(ledger, key))[0] in ((grid := list(best[1]))[0], grid[-1]) and len(grid) < 10:
            trial(key, best[0] * factor if best[0] == grid[-1] else best[0] / factor)
    most = max(len(best_rate(ledger, key)[1]) for key in keys)
    for key in keys:
        while len(found := best_rate(ledger, key)[1]) < most:
            grid = list(found)
            i = grid.index(min(found, key=found.get))
            neighbour = min(grid[max(i - 1, 0) : i] + grid[i + 1 : i + 2], key=found.get)
            trial(key, (grid[i] * neighbour) ** 0.5)
    return {key: best_rate(ledger, key)[0] for key in keys}


def keep_strips(world, name, strips):
    checkpoint.save_tensors(world.out / "strips" / f"{name}.safetensors", {g: torch.stack(v) for g, v in strips.items()})


def score_trial(world, ledger, row):
    """Videos of a trial's scored steps, read back; kept in the ledger."""
    steps = {round(m * row["steps"]) for m in world.preset.scored} | ({row["head_steps"]} - {0})
    for step in sorted(steps):
        def make():
            net = dit.load(weights_file(world.out, row, step)).to(world.device)
            found, strips = world.score(replace(world.deep, net=net), ALL[row["arm"]].null)
            if row["seed"] == 0 and step == row["steps"]:
                keep_strips(world, row["arm"], strips)
            return dict(step=step, **found)
        ledger.once("score", make, arm=row["arm"], lr=row["lr"], seed=row["seed"], step=step)


def clear(world, ledger, rates):
    """Remove the weights of trials that lost the search: nobody will score them."""
    keep = {weights_file(world.out, dict(arm=key, lr=lr, seed=0), 0).name.rsplit("-", 2)[0] for key, lr in rates.items()}
    for file in (world.out / "weights").glob("*-0-*.safetensors"):
        if file.name.rsplit("-", 2)[0] not in keep and file.name.split("-")[0] in rates:
            file.unlink()


def compare(world, ledger, keys, seeds, results):
    """Gate, alignments, search, seeds, options; the report is rewritten after each seed."""
    ledger.once("gate", lambda: gate(world))
    ledger.once("alignments", lambda: alignments(world))
    ledger.once("speed", lambda: speed(world))
    ledger.once("moments", lambda: world.seconds["train"])
    core = [k for k in keys if k in ARMS]
    rates = search(world, ledger, core)
    clear(world, ledger, rates)
    rates |= {k: rates[OPTIONS[k].like] for k in keys if k in OPTIONS}
    for seed in range(seeds):
        for key, lr in rates.items():
            row = ledger.once("trial", lambda: run(world, key, lr, seed), arm=key, lr=lr, seed=seed)
            score_trial(world, ledger, row)
            tqdm.write(f"{key:3s} {ALL[key].title:24s} rate {lr:g} seed {seed}: loss " + "  ".join(f"{g} {row['curve'][-1][g]:.4f}" for g in GROUPS))
        claims.report(world, ledger, rates, results)


def main(argv=None):
    p = argparse.ArgumentParser(description="Arms of AE-Adapt-V on the toy, on narrow data.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--preset", choices=list(PRESETS), default="laptop", help="sizes of the experiment")
    p.add_argument("--out", default="out/compare_adapt", help="folder for caches, trials and weights")
    p.add_argument("--results", default="results", help="folder for compare_adapt.json and .png")
    p.add_argument("--arms", nargs="+", choices=list(ALL), default=list(ARMS),
                   help=f"which; besides A to G the options {', '.join(OPTIONS)} (experiments/arms.py)")
    p.add_argument("--steps", type=int, help="of every arm, in place of the preset's")
    p.add_argument("--seeds", type=int, help="fewer seeds than the preset's; the others can be added later")
    p.add_argument("--base-weights", help="transformer of the base in place of the embedded one (.safetensors)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = p.parse_args(argv)
    if missing := sorted({OPTIONS[k].like for k in args.arms if k in OPTIONS} - set(args.arms)):
        raise UserError(f"options take the learning rate of the arm that they vary: add {' '.join(missing)} to --arms.")
    if args.threads:
        torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset] if args.steps is None else replace(PRESETS[args.preset], steps=args.steps)
    world = World(preset, Path(args.out), args.base_weights, args.device)
    settings = dict(preset=asdict(world.preset), base=hash_tensors(world.base.net.state_dict()), autoencoder=hash_tensors(world.deep.ae.state_dict()), held=HELD)
    compare(world, Ledger(world.out, settings), args.arms, args.seeds or world.preset.seeds, Path(args.results))


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
