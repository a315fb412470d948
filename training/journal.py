"""Is it working? What each stage of an adaptation gave: numbers, pictures, and a
sentence where a number says no.

A low training loss proves nothing: the one public attempt to repeat the paper had an
alignment loss below 0.01, a flow-matching loss that fell from 1 to 0.1, and noise for
videos. So every number here comes with what it would be if nothing had been learnt:

    R^2            of the aligned embeddings on held-out clips. 0: no better than always
                   giving their mean; 1: the base's own
    norm ratio     how loudly noise arrives at the blocks, against the base: 1, as loudly.
                   The clean clips of the alignment do not constrain it
    depth          distance of the features from the base's after so many blocks, in
                   units of their variance. 1: as far as their mean is
    loss by sigma  against that of a predictor that knows the statistics of a latent
                   cell, but no neighbour, prompt or time
    latent RMS     of what the transformer is trained on: about 1, else the scale of the
                   autoencoder is wrong

`examine` measures, `Journal.add` prints, and rewrites `report.json` and `stages.png` (a
row per prompt, a group of columns per stage). Stages that ended in an earlier run stay
in both.
"""
import dataclasses
import math
import time
from pathlib import Path

import torch
from einops import rearrange
from tqdm import tqdm

import align
import flow
from files import checkpoint, video
from gpu import tiling
from wan import memory
from wan.text import release

# ------------------------------------------------ what the numbers say


def sentences(row):
    """What the numbers of a stage say against it, in words -> list, empty where nothing
    is wrong. What is trained need no longer imitate the base; what is not need not yet
    denoise."""
    said = []
    aligned = "1a, " in row["stage"]
    r2, rms = row.get("r2", 1), row.get("latent_rms", 1)
    ratio = row.get("norm_ratio", 1)
    depth = row.get("depth", {}).values()
    if aligned and r2 < 0.2:
        said.append(f"R^2 is {r2:.2f}: the new embedder tells hardly anything of the base's "
                    "embeddings. The pairs do not belong together (see pairs.png: is it the same "
                    "clip twice?), the scale of a latent is wrong, or there are too few clips "
                    "(1,000 are enough).")
    if aligned and not 0.1 < ratio < 10:
        said.append(f"noise arrives {math.sqrt(ratio):.2g} times as loudly as in the base: the "
                    "blocks will take it for another time. Try --align ridge_to_init or "
                    "noise_aware.")
    if aligned and sum(v > 1 for v in depth) > len(depth) / 2:
        said.append("behind most blocks the features are farther from the base's than their mean "
                    "is: the alignment is lost on the way, and stage 1b starts from little. Use "
                    "more clips, another --align, or more steps of stage 1b.")
    if not 0.5 < rms < 2:
        said.append(f"the latents have an RMS of {rms:.2f} and should have about 1: the "
                    "autoencoder's scaling factor is wrong.")
    above = [span(b) for b in row.get("sigma", []) if b["ratio"] >= 1]
    if above and not aligned:
        said.append(f"at sigma {', '.join(above)} the loss is no lower than without any "
                    "transformer: the blocks add nothing there. Train longer, or look at the "
                    "alignment first.")
    return said


def span(found):
    return "{:.1f}-{:.1f}".format(*found["sigma"])


def line(row):
    """The numbers of a stage in one line."""
    told = [f"{row['stage']:24s} {row['seconds']:7.1f} s "]
    told += [f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float) and k != "seconds"]
    if "prompt_fit" in row:
        told += [" prompt fit:", *(f"{k} {v:.2f}" for k, v in row["prompt_fit"].items())]
    return "  ".join(told)


# ------------------------------------------------ the record


class Journal:
    """The record of a run in the folder `out`."""

    def __init__(self, out, **facts):
        self.out, self.facts = Path(out), facts
        self.rows, self.strips = [], {}
        report = self.out / "report.json"
        if report.exists():
            self.rows = checkpoint.read_json(report)["stages"]
        strips = self.out / "stages.safetensors"
        if strips.exists():
            self.strips, _ = checkpoint.load_tensors(strips)

    def __contains__(self, stage):
        return any(row["stage"] == stage for row in self.rows)

    def add(self, row, videos=(), labels=None):
        """Record a stage: {"stage": its name, "seconds": ..., any numbers}, and the
        videos [3, t, h, w] that its model made of `labels`."""
        row["says"] = sentences(row)
        self.rows = [r for r in self.rows if r["stage"] != row["stage"]] + [row]
        tqdm.write(line(row))
        if "depth" in row:
            told = "  ".join(f"{k} {v:.2f}" for k, v in row["depth"].items())
            tqdm.write(f"    distance by depth: {told}")
        if "sigma" in row:
            told = "  ".join(f"{span(b)}: {b['loss']:.3f} ({b['bound']:.3f})" for b in row["sigma"])
            tqdm.write(f"    loss by sigma (without transformer): {told}")
        for sentence in row["says"]:
            tqdm.write(f"    ! {sentence}")
        if videos:
            frames = torch.stack([x[:, [0, (x.shape[1] - 1) // 2, -1]] for x in videos])
            self.strips[row["stage"]] = ((frames + 1) * 127.5).round().clamp(0, 255).byte()
            checkpoint.save_tensors(self.out / "stages.safetensors", self.strips)
            self.draw(labels)
        report = dict(**checkpoint.provenance(), **self.facts, stages=self.rows)
        checkpoint.write_json(self.out / "report.json", report)

    def draw(self, labels=None):
        """stages.png, from the strips of all stages so far."""
        heads = [row["stage"] for row in self.rows if row["stage"] in self.strips]
        strips = [self.strips[head].float() / 127.5 - 1 for head in heads]
        rows = [torch.cat(row, dim=1) for row in zip(*strips)]
        video.contact_sheet(self.out / "stages.png", rows, columns=3 * len(heads), labels=labels,
                            heads=heads, scale=scale_of(strips[0].shape[-1]))


def scale_of(width):
    """On a sheet of pictures: small ones twice as large, large ones 256 pixels wide."""
    return 2 if width <= 256 else 256 / width


# ------------------------------------------------ the loss


@torch.no_grad()
def validation_loss(net, source, times, samples, batch=32):
    """The training loss on fixed samples, prompts, noise and times of a held-out
    source."""
    device, total = next(net.parameters()).device, 0.0
    for step, start in enumerate(range(0, samples, batch)):
        positions = range(min(batch, samples - start))
        clips = source.batch(step, positions)
        drawn = flow.draw(clips.z.shape[1:], times, 10_000_019, step, positions)
        loss, _ = flow.loss(align.velocity_of(net, clips, device), clips.z, drawn)
        total += loss.item() * len(positions)
    return total / samples


def linear_bound(spectrum, sigma):
    """Lowest loss at `sigma` (tensor) of a predictor that knows a latent cell's channel
    statistics but no neighbour, prompt or time: for Gaussian latents with eigenvalues l
    of the channel covariance, mean over l / ((1 - sigma)^2 l + sigma^2)."""
    sigma = sigma.double()[..., None]
    seen = (1 - sigma) ** 2 * spectrum + sigma**2
    return (spectrum / seen.clamp(min=1e-12)).mean(-1)


BINS = 5


def by_sigma(mse, sigma):
    """Mean loss in equal bins of sigma; nan where nothing was drawn. One mean over all
    sigma hides what is being learned: at high sigma layout and motion, at low sigma
    texture."""
    index = (sigma * BINS).long().clamp(max=BINS - 1)
    return [mse[index == i].mean().item() for i in range(BINS)]


@torch.no_grad()
def loss_by_sigma(net, source, batches, batch=32):
    """Loss per bin of sigma with its bound, on batches of `source`
    -> [{"sigma": (from, to), "loss", "bound", "ratio"}]. All sigmas come alike.

    bound: `linear_bound` with the latents' own spectrum at the same noise levels.
    Expect ratio < 1 in every bin where something was drawn; near 1, the blocks add
    nothing to what a cell's own channels tell. nan: nothing was drawn there.
    """
    device, times = next(net.parameters()).device, flow.Times(shift=1.0)
    mse, sigma, cells = [], [], []
    for step in range(batches):
        clips = source.batch(step, range(batch))
        drawn = flow.draw(clips.z.shape[1:], times, 0, step, range(batch))
        _, error = flow.loss(align.velocity_of(net, clips, device), clips.z, drawn)
        mse.append(error.cpu())
        sigma.append(drawn.sigma)
        cells.append(rearrange(clips.z, "b c f h w -> c (b f h w)").double())
    mse, sigma = torch.cat(mse), torch.cat(sigma)
    spectrum = torch.linalg.eigvalsh(torch.cat(cells, dim=1).cov()).clamp(min=0)
    bounds, rows = by_sigma(linear_bound(spectrum, sigma), sigma), []
    for i, (loss, bound) in enumerate(zip(by_sigma(mse, sigma), bounds)):
        inside = (i / BINS, (i + 1) / BINS)
        rows.append(dict(sigma=inside, loss=loss, bound=bound, ratio=loss / bound))
    return rows


# ------------------------------------------------ the alignment


def imitation(weight, bias, held):
    """How well an embedder imitates the base's on held-out clips (align.Problem), and
    how loudly it lets noise in. From stage 1b on it need not imitate."""
    r2, mse = align.r_squared(held.moments, held.teacher, weight, bias)
    loudness = align.norm_ratio(weight, held.teacher, held.tokens)
    return dict(r2=r2, mse=mse, norm_ratio=loudness)


def examine_aligned(job, expert, base, net, problem, by_sgd=None):
    """`examine` for stage 1a; before it a row for every way to align, as the closed forms
    cost nothing beside reading the pairs, and pairs.png. by_sgd: what SGD found, if it
    was asked for."""
    held = job.problem(expert, job.held)
    for way in (*align.CLOSED_FORMS, *(["sgd"] if by_sgd else [])):
        begun = time.perf_counter()
        found = by_sgd if way == "sgd" else align.fit(way, problem)
        row = dict(stage=f"{expert.prefix}1a {way}", seconds=time.perf_counter() - begun)
        job.journal.add(row | imitation(*found, held))
    if job.args.sample_steps:
        show_pair(job.journal.out / "pairs.png", (job.teacher, job.student), held.pair(0))
    rms = job.held.batch(0, range(8)).z.square().mean().sqrt()
    numbers = imitation(net.embedder.weight, net.embedder.bias, held)
    numbers |= dict(latent_rms=rms.item(), clips=problem.clips, depth=depth(job.held, base, net))
    examine(job, expert, "1a, assembled", net, **numbers)


@torch.no_grad()
def depth_curve(base, deep, teacher, student, prompt, blocks):
    """How far the new model's features are from the base's, after each of these blocks
    -> {"block": mse / variance of the base's}.

    teacher, student: clean inputs of the same clips [b, c, t, h, w]; prompt: what both
    transformers take behind x and t. Both see the same clip without noise; the base's
    features are averaged over the cells of the deep grid. "embedding" is stage 1a's own
    distance. The patch embedder alone is aligned, so the curve tells how much of that
    survives the blocks.
    """
    features = []
    for net, x in ((base, teacher), (deep, student)):
        x = x.to(next(net.parameters()).device)
        prompt = [part.to(x.device) for part in prompt]
        _, seen = net(x, torch.zeros(len(x), device=x.device), *prompt, return_features=blocks)
        features.append({"embedding": net.embed_patches(x), **seen})
    curve = {}
    for block, ours in features[1].items():
        y = align.pool(features[0][block].float(), ours.shape[1:4]).cpu()
        mse = (y - ours.float().cpu()).square().mean().item()
        variance = (y - y.flatten(0, 3).mean(0)).square().mean().item()
        curve[str(block)] = mse / variance
    return curve


def depth(held, base, net):
    """`depth_curve` on held-out clips at about seven depths."""
    first = held.pair(0)
    pairs = [first]
    for i in range(1, min(len(held), 4)):
        pair = held.pair(i)
        if pair[1].shape == first[1].shape:  # of one bucket
            pairs.append(pair)
    batch = held.batch(0, range(1))  # any prompt, the same for both
    prompt = [part.expand(len(pairs), -1, -1) for part in batch.prompt]
    layers = base.config.layers
    blocks = list(range(0, layers, max(layers // 6, 1)))
    return depth_curve(base, net, *map(torch.stack, zip(*pairs)), prompt, blocks)


# ------------------------------------------------ a stage


def examine(job, expert, title, net, model=None, held=None, **numbers):
    """Measure and render what a stage of an adaptation (job.Job) gave, and record it.
    By process 0 alone, on a net that is not sharded.

    model, held: of the transformer `net` and what it is measured on, where it is not
        the deep one. numbers: what is known of it already.
    """
    model = dataclasses.replace(model or job.student, net=net)
    held = held or job.held
    samples = job.base.validation
    batch = min(job.settings.batch, samples)
    row = dict(stage=f"{expert.prefix}{title}", **numbers)
    times = job.times(expert)
    row["validation_loss"] = validation_loss(net, held, times, samples, batch)
    row["sigma"] = []
    for found in loss_by_sigma(net, held, samples // batch, batch):
        low, high = found["sigma"]
        inside = high > expert.low and low < expert.high
        if inside and not math.isnan(found["loss"]):
            row["sigma"].append(found)
    videos = []
    if job.args.sample_steps:
        row |= job.base.score(model, job.args)
        videos = job.base.videos(model, expert, held, job.args.sample_steps)
    model.ae.to("cpu")  # the next stage needs the room
    row["seconds"] = time.perf_counter() - job.started
    job.journal.add(row, videos, job.base.labels)
    if job.device.type == "cuda":
        release()


def examine_trained(job, expert, stage):
    """`examine` for a stage of training, from the result that it left."""
    tensors = job.result(expert, stage.name)
    base, net = job.build(expert, tensors, stage.rank)
    numbers = dict(trained=sum(v.numel() for v in tensors.values()))
    if not job.args.continue_from:  # there the base's own space plays no part
        numbers["depth"] = depth(job.held, base, net)
        held = job.problem(expert, job.held)
        numbers |= imitation(net.embedder.weight, net.embedder.bias, held)
    examine(job, expert, stage.title, net, **numbers)


@torch.no_grad()
def decoded(model, z):
    """Latents [n, z, t, h, w] -> list of n videos [3, t, h, w], whole; in tiles where
    the device has little room."""
    c = model.ae.config
    room = 0.8 * memory.free_memory(model.device)
    tile = tiling.choose(model.ae, tuple(z.shape[2:]), room, model.ae_dtype)
    frames = c.lead + (z.shape[2] - 1) * c.temporal_factor
    size = tuple(n * c.spatial_factor for n in z.shape[3:])
    videos = []
    for x in z:
        pieces = [piece[0].float().cpu() for piece in model.decode(x[None], frames, size, tile)]
        videos.append(torch.cat(pieces, dim=1))
    return videos


def show_pair(file, models, pair):
    """The same held-out clip out of both autoencoders. If these are two clips, nothing
    can be aligned."""
    rows = []
    for model, x in zip(models, pair):
        rows += decoded(model, x[None, : model.net.config.out_channels])
        model.ae.to("cpu")
    names = [model.name for model in models]
    video.contact_sheet(file, rows, 6, names, scale=scale_of(rows[0].shape[3]))
