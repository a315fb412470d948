"""The paper's comparison, on film: what may a frame see? (paper, section on DC-AE-V, figures on temporal modelling and on chunk size)

**What each rule allows** (group `limits`): the best linear coder of every rule, in closed form, so that no training blurs the answer. Film is cut
into 8x8 patches; c numbers may be kept per patch and four frames, as in an f8t4 autoencoder with c latent channels (c = 2 compresses 384 times, as
f32t4c32 does). Frames that may see each other are coded together, by the principal components of what the decoder cannot predict
linearly from the numbers that came before:

    causal          4 frames at a time          chunk-causal    a chunk at a time          non-causal    the whole clip at once

The reason for the difference is in this: what stays the same for 16 frames is coded once for 16 frames, with four times as many numbers, if the
decoder may look at all of them. A causal one must code it with the first latent frame.

**What trained networks make of it**: every arm is the same small DC-AE-V at f8t4 between two fixed layers (`on_patches`): the principal components
of single 8x8 patches, and their inverse. How space is coded is not in question here, and learning it takes nearly all of a laptop's steps:
f32t4c32 arms from pixels stayed within 0.05 dB of each other (results/compare_pixels.json). All arms begin with the same random weights and
get the same clips in the same order for the same number of steps. One thing differs per group:

    temporal   chunk-causal (8 frames), causal, non-causal convolutions, 2 latent channels: 384 times smaller, as f32t4c32; trained on 16 frames (two
               chunks), judged on those and on clips six times as long
    latent     1 or 4 latent channels in place of 2 (as 16 and 64 in place of 32 at f32)
    chunk      chunks of 1, 4, 8, 20, 40 frames, trained on 80 frames. Chunk 1 is causal with one frame of memory per layer: a frame sees itself and
               the one before it. (A causal convolution sees two back.)

Expected from the paper: inside the training length chunk-causal is close to non-causal and far above causal; beyond it non-causal degrades and
chunk-causal does not; quality rises with the chunk. One thing is hard for a small net: a convolution treats every moment alike, and to split a
chunk's content over its latent frames it must learn to treat them differently, by what the zeros behind each chunk tell it of its place. Eight
frames are two latent frames, which one layer can tell apart; forty need many layers, which the published network has and these have not.
`still` measures how far an arm got: the share of the latent's variance that lies within stretches of 16 frames of a clip that stands still.
A non-causal model meets a long clip in two ways: the whole clip at once, longer than any it was trained on, or in pieces of the training
length that know nothing of each other.

Judged is on films that no arm has seen (HELD_OUT). Clips are 32x32 windows of 64x64 crops, which are a quarter of the frame's side or more.

    python assets/fetch.py && python ae.py compare --groups limits      3 minutes on one core -> results/limits.json, limits.png
    python ae.py compare            limits and all arms, an hour on one core -> results/compare.json, compare.png
    python ae.py compare --groups temporal --steps 300        a quick look

Killed and started again it goes on where it stopped. --score judges again what is trained.
"""
import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from einops import rearrange
from tqdm import tqdm

import ae
import kernels
from files import checkpoint
from training import clips, loop, metrics
from training.muon import Muon

SIZE, LONG = (64, 64), 96  # rows and columns; frames of the long clips
LENGTHS = {16: 24, 80: 12, LONG: 12}  # frames of the clips that arms are judged on: how many
HELD_OUT = ("bigbuckbunny", "carphone_pristine", "cup", "china", "home", "squirrel_cls")
ZOOM = 0.25  # smallest side of a crop, as a share of the frame's
STEPS = {"temporal": 1200, "latent": 1200, "chunk": 500}
LR = 2e-3
PATCH, KEPT = 8, 40  # side of a patch; numbers that describe one, of 192: the rest, at 35 dB, is lost to all rules alike
PATCHES = 1000  # clips whose patches tell what these numbers are
WINDOW = 32  # side of what arms are trained and judged on
BASE = ae.Config((0, 64, 64), (0, 1, 2), 2, chunk=8, patch=PATCH)  # f8t4c2


@dataclass(frozen=True)
class Arm:
    """One trained model: what it changes in BASE, and its batches."""

    group: str
    label: str
    changes: dict = field(default_factory=dict)
    frames: int = 16
    batch: int = 8

    @property
    def name(self):
        return f"{self.group}-{self.label}"

    @property
    def config(self):
        return dataclasses.replace(BASE, **self.changes)


ARMS = [*(Arm("temporal", t, {"temporal": t}) for t in ("chunk_causal", "causal", "non_causal")),
        *(Arm("chunk", str(c), {"chunk": c}, frames=80, batch=2) for c in (40, 8, 1, 20, 4)),
        *(Arm("latent", str(z), {"latent_channels": z}) for z in (1, 4))]  # 2 is temporal-chunk_causal


def draw(films, frames, n):
    """`n` random crops of the films held out, the same every time: [n, 3, frames, h, w]."""
    dataset = clips.Clips(films, frames, SIZE, "val", zoom=ZOOM)
    return torch.stack([dataset.sample(i) for i in range(n)]).float() / 127.5 - 1


def hold_out(folders, out):
    """Gather films of several folders in one, as links: those of HELD_OUT under val/, which `clips.Clips` keeps from training."""
    for film in sorted(p for folder in folders for p in clips.find_clips(folder) if p.suffix.lower() in clips.VIDEOS):
        link = out / "films" / ("val" if film.stem in HELD_OUT else "") / film.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(film.resolve())
    return out / "films"


# ---------------------------------------------------------------------------------------------------- what each rule allows

#: rule -> (frames coded together, whether what came before is known). Of the clips of 80 frames that this is done on.
RULES = {"each latent frame alone": (4, False), "causal": (4, True), "chunk-causal 8": (8, True), "chunk-causal 16": (16, True),
         "chunk-causal 20": (20, True), "chunk-causal 40": (40, True), "non-causal": (80, True), "non-causal, pieces of 32": (32, False)}
CHANNELS = (1, 2, 4, 8, 16)  # numbers per patch and four frames


class Patches(nn.Module):
    """A frame as patches, each as its KEPT leading principal components over `clips`, an iterable of [b, 3, t, h, w].

    [b, 3, t, h, w] -> [b, KEPT, t, h / PATCH, w / PATCH], of unit variance on average; `back` is the inverse, as far as there is one.
    """

    def __init__(self, clips):
        super().__init__()
        sample = torch.cat([self.cut(x[:, :, ::4]).flatten(0, 3) for x in clips])
        mean = sample.mean(dim=0)
        variance, basis = torch.linalg.eigh((sample - mean).T @ (sample - mean) / len(sample))
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis.flip(1)[:, :KEPT])
        self.register_buffer("rms", (variance.sum() / KEPT).sqrt())

    @staticmethod
    def cut(x):
        return rearrange(x, "b c t (h p) (w q) -> b t h w (c p q)", p=PATCH, q=PATCH)

    def forward(self, x):
        return ((self.cut(x) - self.mean) @ self.basis / self.rms).permute(0, 4, 1, 2, 3)

    def back(self, y):
        x = y.permute(0, 2, 3, 4, 1) * self.rms @ self.basis.T + self.mean
        return rearrange(x, "b t h w (c p q) -> b c t (h p) (w q)", p=PATCH, q=PATCH)


class Linear:
    """The best linear coders of film under a temporal rule, from second moments alone.

    A patch over t frames is a vector of t * KEPT numbers (`Patches`); C is its covariance over `clips`, an iterable of [b, 3, t, h, w]. A group
    of frames f is coded by the n leading eigenvectors v of C[f, f]. Knowing z = v'x[f], the best linear guess of everything is
    C[:, f] v (v' C[f, f] v)^-1 z. Take it off, from C and from the clip: what is left is what the next group has to code. For each
    group this is the best choice; it does not spend numbers on the groups to come.
    """

    def __init__(self, clips):
        clips = list(clips)
        self.patches = Patches(clips)
        flat = torch.cat([self.project(x).flatten(0, 1) for x in clips]).flatten(1)
        self.centre = flat.mean(dim=0)
        flat -= self.centre
        self.covariance = flat.T @ flat / len(flat)

    def project(self, x):
        return rearrange(self.patches(x) * self.patches.rms, "b k t h w -> b (h w) t k")

    def psnr(self, x, together, past, channels):
        """PSNR of every frame of clips x [b, 3, t, h, w], coded `together` frames at a time: [b, t]."""
        C, left, t = self.covariance.clone(), self.project(x).flatten(2) - self.centre, x.shape[2]
        exact = rearrange(self.patches.cut(x) - self.patches.mean, "b t h w v -> b (h w) t v")
        lost = exact.square().sum(-1) - self.project(x).square().sum(-1)  # b patches t
        error = torch.empty_like(lost)
        for start in range(0, t, together):
            count = min(together, t - start)
            f = slice(start * KEPT, (start + count) * KEPT)
            v = torch.linalg.eigh(C[f, f])[1][:, -channels * count // 4 :]
            guess = torch.linalg.solve(v.T @ C[f, f] @ v, v.T @ C[f])  # n, t * KEPT
            z = left[..., f] @ v
            if past:
                C, left = C - C[:, f] @ v @ guess, left - z @ guess
            else:
                left[..., f] -= z @ guess[:, f]
            error[:, :, start : start + count] = left[..., f].unflatten(-1, (count, KEPT)).square().sum(-1)
        return 10 * torch.log10(4 * exact.shape[-1] / (error + lost).mean(dim=1).clamp(min=1e-6))


def limits(films, cache, seed=0, train=400, held=24, frames=80):
    """Every rule at 2 channels, causal and chunk-causal at all CHANNELS -> {(rule, channels): dict(psnr, psnr_frames)}."""
    dataset = clips.Clips(films, frames, SIZE, "train", seed, cache=cache, zoom=ZOOM)
    linear, result = Linear(dataset.sample(i)[None].float() / 127.5 - 1 for i in tqdm(range(train), "clips", mininterval=5)), {}
    x = draw(films, frames, held)
    pairs = [(rule, 2) for rule in RULES] + [(rule, c) for rule in ("causal", "chunk-causal 16", "chunk-causal 40") for c in CHANNELS]
    for rule, channels in dict.fromkeys(pairs):
        psnr = linear.psnr(x, *RULES[rule], channels).mean(dim=0)
        result[f"{rule}, {channels}"] = dict(psnr=psnr.mean().item(), psnr_frames=[round(v, 3) for v in psnr.tolist()])
        print(f"{rule}, {channels} channels: {psnr.mean():.2f} dB", flush=True)
    return result


def plot_limits(path, result):
    """PSNR over frame index, against the frames coded together, against channels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(17, 4.2))
    for rule in ("each latent frame alone", "causal", "chunk-causal 16", "chunk-causal 40", "non-causal"):
        axes[0].plot(result[f"{rule}, 2"]["psnr_frames"], label=rule, linewidth=1.2)
    axes[0].set(title="best linear coders, 2 numbers per 8x8 patch and 4 frames", xlabel="frame", ylabel="dB")
    sizes = {4: "causal", **{c: f"chunk-causal {c}" for c in (8, 16, 20, 40)}, 80: "non-causal"}
    axes[1].plot(list(sizes), [result[f"{rule}, 2"]["psnr"] for rule in sizes.values()], marker="o")
    axes[1].set(title="frames coded together (4: causal, 80: non-causal)", xlabel="frames", ylabel="dB", xscale="log")
    axes[1].set_xticks(list(sizes), list(map(str, sizes)))
    for rule in ("causal", "chunk-causal 16", "chunk-causal 40"):
        axes[2].plot(CHANNELS, [result[f"{rule}, {c}"]["psnr"] for c in CHANNELS], marker="o", label=rule)
    axes[2].set(title="numbers per patch and 4 frames", xlabel="channels at f8 (times 16: at f32)", ylabel="dB", xscale="log")
    axes[2].set_xticks(CHANNELS, list(map(str, CHANNELS)))
    for ax in axes:
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8), axes[2].legend(fontsize=8)
    fig.tight_layout()
    with checkpoint.atomic_path(path) as tmp:
        fig.savefig(tmp, dpi=100)
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------- training


class Into(nn.Module):
    """Pixels -> patches, as a streaming layer."""

    def __init__(self, patches):
        super().__init__()
        self.patches = patches

    def forward(self, x, state=None):
        return self.patches(x), state


class Out(Into):
    """Patches -> pixels, as a streaming layer."""

    def forward(self, y, state=None):
        return self.patches.back(y), state


def on_patches(config, patches):
    """A DC-AE-V from pixels to pixels whose first and last layer are `patches` and fixed; what is between them is one at patch 1."""
    net = ae.DCAEV(dataclasses.replace(config, patch=1))
    net.config, k, width = config, patches.basis.shape[1], config.widths[config.first]
    net.encoder.project_in = ae.Stage([Into(patches), ae.Resample(k, width, 1, 1, config.chunk, config.temporal)])
    net.decoder.project_out.op_list[2] = ae.Resample(width, k, 1, 1, config.chunk, config.temporal, up=True)
    net.decoder.project_out = ae.Stage([net.decoder.project_out, Out(patches)])
    return net


def window(x, number, seed):
    """A WINDOW out of a batch of clips, at a place that (seed, number) alone decides."""
    i, j = np.random.default_rng((seed, number)).integers(0, x.shape[3] - WINDOW + 1, 2)
    return x[..., i : i + WINDOW, j : j + WINDOW]


def windows(x):
    """Clips cut into all their windows: [b, 3, t, h, w] -> [b * windows, 3, t, WINDOW, WINDOW]."""
    return rearrange(x, "b c t (h p) (w q) -> (b h w) c t p q", p=WINDOW, q=WINDOW)


def train_arm(arm, films, out, steps, seed=0):
    """Train one arm -> (net in eval mode, what it took). Muon, mean squared error in pixels."""
    dataset = clips.Clips(films, arm.frames, SIZE, "train", seed, cache=out / "cache", zoom=ZOOM)
    patches = Patches(dataset.sample(10**6 + i)[None].float() / 127.5 - 1 for i in range(PATCHES))
    torch.manual_seed(seed)
    net = on_patches(arm.config, patches)
    config = dict(arm=arm.name, **dataclasses.asdict(arm.config), frames=arm.frames, batch=arm.batch, lr=LR, seed=seed, starts=len(dataset))
    run = loop.Run(out / arm.name, config, {"net": net}, {"net": Muon(net, LR)}, loop.Plan(steps, save_every=100, keep=1))

    def error(x, number):
        x = window(x, number, seed)
        with kernels.autocast(x.device):
            y = whole(net, x).float()
        mse = (y - x).square().mean()
        yield "net", mse, {"loss": mse.detach(), "psnr": 10 * torch.log10(4 / mse.detach())}

    run.fit(clips.loader(dataset, arm.batch, run.number, workers=0), error, what=arm.name)
    log = loop.read_log(run.folder)
    seconds = sorted(line["seconds_per_step"] for line in log)[len(log) // 2]
    return net.eval(), dict(steps=steps, frames=arm.frames, batch=arm.batch, parameters=sum(p.numel() for p in net.parameters()),
                            seconds_per_step=round(seconds, 3), train_psnr=[(line["step"], round(line["psnr"], 3)) for line in log])


# ---------------------------------------------------------------------------------------------------- judging


def whole(net, x):
    """All of a clip in one call, whatever its length."""
    return net.decoder(net.encoder(x)[0])[0]


def pieces(net, x, frames):
    """Pieces of `frames` frames that know nothing of each other."""
    return torch.cat([whole(net, piece) for piece in x.split(frames, dim=2)], dim=2)


@torch.no_grad()
def within_chunks(net, arm, short, together=16):
    """How differently the latent frames of a clip that stands still are used: their variance within stretches of 16 frames, over all variance.

    0: each of them says the same. 3/4: the four of them say four things of equal weight.
    """
    z = torch.cat([net.encoder(x[:, :, :1].expand(-1, -1, arm.frames, -1, -1))[0] for x in short.split(16)])
    z = rearrange(z, "b c (k n) h w -> c (b k h w) n", n=together // arm.config.temporal_factor)
    return (z.var(dim=2, correction=0).mean() / z.flatten(1).var(dim=1, correction=0).mean()).item()


@torch.no_grad()
def score(net, arm, short, long):
    """Numbers of one arm: PSNR and SSIM on clips of the training length; PSNR over frame index and flicker on long ones. -> dict

    Long clips: {"streamed" or "whole" or "pieces": {psnr, psnr_frames, psnr_start and psnr_beyond the training length, flicker at its borders}}.
    """
    y = torch.cat([whole(net, x) for x in short.split(16)])
    result = dict(psnr=metrics.psnr(y, short), ssim=metrics.ssim(y, short), still=within_chunks(net, arm, short), long={})
    period = dict(chunk_causal=max(arm.config.chunk, 4), causal=4, non_causal=arm.frames)[arm.config.temporal]
    ways = {"streamed": lambda net, x: net(x)}
    if arm.config.temporal == "non_causal":
        ways = {"whole": whole, "pieces": lambda net, x: pieces(net, x, arm.frames)}
    for way, run in ways.items():
        y = torch.cat([run(net, x) for x in long.split(4)])
        frames = metrics.psnr_frames(y, long).mean(dim=0)
        result["long"][way] = dict(psnr=frames.mean().item(), psnr_start=frames[: arm.frames].mean().item(),
                                   psnr_beyond=frames[arm.frames :].mean().item() if arm.frames < LONG else None,
                                   border=period, flicker=metrics.flicker(y, long, period), psnr_frames=[round(v, 3) for v in frames.tolist()])
    return result


def plot(path, arms):
    """PSNR over frame index, quality against chunk size, quality against latent channels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [g for g in STEPS if any(name.startswith(g) for name in arms)]
    fig, axes = plt.subplots(1, len(groups), figsize=(3 + 5 * len(groups), 4), squeeze=False)
    axes = axes[0]
    points = lambda group, pick: sorted((int(n.split("-")[1]), pick(a)) for n, a in arms.items() if n.startswith(group))
    for ax, group in zip(axes, groups):
        if group == "temporal":
            for name, arm in arms.items():
                for way, long in arm["long"].items() if name.startswith(group) else ():
                    ax.plot(long["psnr_frames"], label=f"{name.split('-')[1]} ({way})", linewidth=1)
                    frames = arm["frames"]
            ax.axvline(frames, color="black", linestyle=":", label="end of the training length")
            ax.set(title=f"f8t4c2: PSNR over frame index, clips of {LONG} frames", xlabel="frame", ylabel="dB")
            ax.legend(fontsize=7)
        elif group == "chunk":
            ax.plot(*zip(*points("chunk", lambda a: a["psnr"])), marker="o")
            ax.set(title="quality against chunk size, clips of 80 frames", xlabel="frames per chunk", ylabel="dB")
            twin = ax.twinx()
            twin.plot(*zip(*points("chunk", lambda a: a["long"]["streamed"]["flicker"])), marker="x", color="tab:red")
            twin.set_ylabel("flicker at borders (1: none)", color="tab:red")
        else:
            middle = [(2, arms["temporal-chunk_causal"]["psnr"])] if "temporal-chunk_causal" in arms else []
            ax.plot(*zip(*sorted(points("latent", lambda a: a["psnr"]) + middle)), marker="o")
            ax.set(title="quality against latent channels", xlabel="channels", ylabel="dB")
    for ax in axes:
        ax.grid(alpha=0.3)
    fig.tight_layout()
    with checkpoint.atomic_path(path) as tmp:
        fig.savefig(tmp, dpi=100)
    plt.close(fig)


def table(arms):
    """Markdown: one line per arm and way of meeting long clips."""
    number = lambda v, digits=2: "-" if v is None or v != v else f"{v:.{digits}f}"
    lines = ["| arm | steps | PSNR dB | SSIM | still | long clips | first frames | beyond | flicker |", "|---|---|---|---|---|---|---|---|---|"]
    for name, arm in arms.items():
        for way, long in arm["long"].items():
            lines.append(f"| {name.replace('-', ': ', 1)} | {arm['steps']} | {number(arm['psnr'])} "
                         f"| {number(arm['ssim'], 4)} | {number(arm['still'], 3)} | {way} {number(long['psnr'])} | {number(long['psnr_start'])} "
                         f"| {number(long['psnr_beyond'])} | {number(long['flicker'])} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- command line


def main_compare(argv):
    p = argparse.ArgumentParser(prog="ae.py compare", description="Train and judge the arms of the paper's comparison on film.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", nargs="+", default=["out/clips", "out/pans"], metavar="FOLDER", help="films (assets/fetch.py fetches some)")
    p.add_argument("--out", default="out/compare", help="folder of the runs")
    p.add_argument("--results", default="results", help="folder for limits.json, compare.json and their plots")
    p.add_argument("--groups", nargs="+", choices=["limits", *STEPS], default=["limits", *STEPS])
    p.add_argument("--steps", type=int, help=f"optimiser steps of each arm (default: {', '.join(f'{g} {n}' for g, n in STEPS.items())})")
    p.add_argument("--score", action="store_true", help="train nothing, judge what is finished")
    p.add_argument("--seed", type=int, default=0, help="of weights and clips")
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    out, arms = Path(args.out), {}
    films = hold_out(args.data, out)
    if "limits" in args.groups:
        result = limits(films, out / "cache", args.seed)
        checkpoint.write_json(Path(args.results) / "limits.json", dict(
            **checkpoint.provenance(), size=SIZE, zoom=ZOOM, held_out=HELD_OUT, patch=PATCH, kept=KEPT, rules=RULES, seed=args.seed, psnr=result))
        plot_limits(Path(args.results) / "limits.png", result)
        if args.groups == ["limits"]:
            return
    held_out = {frames: draw(films, frames, n) for frames, n in LENGTHS.items()}
    for arm in ARMS:
        steps = args.steps or STEPS[arm.group]
        if arm.group not in args.groups or args.score and not (out / arm.name / f"checkpoint-{steps:07d}").exists():
            continue
        net, took = train_arm(arm, films, out, steps, args.seed)
        short, long = (windows(held_out[frames]) for frames in (arm.frames, LONG))
        arms[arm.name] = {**took, **score(net, arm, short, long)}
        short = held_out[16]
        flat = metrics.psnr(short.mean(dim=(2, 3, 4), keepdim=True).expand_as(short), short)
        checkpoint.write_json(Path(args.results) / "compare.json", dict(
            **checkpoint.provenance(), size=SIZE, zoom=ZOOM, lr=LR, patch=PATCH, kept=KEPT, window=WINDOW, held_out=HELD_OUT, seed=args.seed,
            base=dataclasses.asdict(BASE), flat_colour=flat, arms=arms))
        print(table(arms), flush=True)
    if arms:
        plot(Path(args.results) / "compare.png", arms)
