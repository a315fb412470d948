"""The paper's comparison, on film: what may a frame see? (paper, section on DC-AE-V, figures
on temporal modelling and on chunk size)

Every arm is the same small DC-AE-V at f8t4 between two fixed layers, the principal components
of single patches and their inverse. All arms begin with the same weights and get the same clips
for the same number of steps; `GROUPS` says what differs. Expected from the paper: inside the
training length chunk-causal is close to non-causal and far above causal; beyond it non-causal
degrades and chunk-causal does not; quality rises with the chunk. Hard for a small net: a
convolution treats every moment alike, and to split a chunk's content over its latent frames it
must tell them apart by the zeros behind each chunk. `still` measures how far an arm got.

    python ae.py compare          under an hour on one core -> OUT/compare.json, .png

Killed and started again it goes on. Films: assets/fetch.py fetches some.
"""
import argparse
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from einops import rearrange

import ae
import kernels
from files import checkpoint, folders, options, video
from training import clips, loop, metrics
from training.muon import Muon

SIZE, LONG = (64, 64), 96  # rows and columns; frames of the long clips
LENGTHS = {16: 24, 80: 12, LONG: 12}  # frames of the clips that arms are judged on: how many
HELD_OUT = ("bigbuckbunny", "carphone_pristine", "cup", "china", "home", "squirrel_cls")
ZOOM = 0.25  # smallest side of a crop, as a share of the frame's
LR = 2e-3
PATCH = 8  # side of a patch
KEPT = 40  # numbers of 192 that describe one: the rest, at 35 dB, is lost to all rules alike
PATCHES = 1000  # clips whose patches tell what these numbers are
WINDOW = 32  # side of what arms are trained and judged on
BASE = ae.Config((0, 64, 64), (0, 1, 2), 2, chunk=8, patch=PATCH)  # f8t4c2

#: group -> (steps, frames, batch, what it changes in BASE, to which values). Chunk 1 is causal
#: with one frame of memory per layer; a causal convolution sees two frames back.
GROUPS = {
    "temporal": (1200, 16, 8, "temporal", ("chunk_causal", "causal", "non_causal")),
    "chunk": (500, 80, 2, "chunk", (40, 8, 1, 20, 4)),
}


@dataclass(frozen=True)
class Arm:
    """One trained model: what it changes in BASE, and its batches."""

    group: str
    label: str
    changes: dict
    frames: int = 16
    batch: int = 8

    @property
    def name(self):
        return f"{self.group}-{self.label}"

    @property
    def config(self):
        return dataclasses.replace(BASE, **self.changes)


ARMS = []
for group, (_, frames, batch, changed, values) in GROUPS.items():
    ARMS += [Arm(group, str(value), {changed: value}, frames, batch) for value in values]


def draw(films, frames, n):
    """`n` random crops of the films held out, the same every time: [n, 3, frames, h, w]."""
    dataset = clips.Clips(films, frames, SIZE, "val", zoom=ZOOM)
    return torch.stack([dataset.sample(i) for i in range(n)]).float() / 127.5 - 1


def hold_out(folders, out):
    """Gather films of several folders in one, as links: those of HELD_OUT under val/, which
    `clips.Clips` keeps from training."""
    for folder in folders:
        for film in sorted(clips.find_clips(folder)):
            part = "val" if film.stem in HELD_OUT else ""
            link = out / "films" / part / film.name
            if film.suffix.lower() in clips.VIDEOS and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(film.resolve())
    return out / "films"


# -------------------------------------------------------------- training


class Patches(nn.Module):
    """A frame as patches, each as its KEPT leading principal components over `clips`, an
    iterable of [b, 3, t, h, w].

    [b, 3, t, h, w] -> [b, KEPT, t, h / PATCH, w / PATCH], of unit variance on average; `back`
    is the inverse, as far as there is one.
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


class ToPatches(nn.Module):
    """Pixels -> patches, then a layer, as one streaming layer."""

    def __init__(self, patches, layer):
        super().__init__()
        self.patches, self.layer = patches, layer

    def forward(self, x, state=None):
        return self.layer(self.patches(x), state)


class ToPixels(ToPatches):
    """A layer, then patches -> pixels, as one streaming layer."""

    def forward(self, x, state=None):
        y, state = self.layer(x, state)
        return self.patches.back(y), state


def on_patches(config, patches):
    """A DC-AE-V from pixels to pixels whose first and last layer are `patches` and fixed; what
    is between them is one at patch 1."""
    net = ae.DCAEV(dataclasses.replace(config, patch=1))
    net.config, k, width = config, patches.basis.shape[1], config.widths[config.first]
    how = (1, 1, config.chunk, config.temporal)
    net.encoder.project_in = ToPatches(patches, ae.Resample(k, width, *how))
    net.decoder.project_out.op_list[2] = ae.Resample(width, k, *how, up=True)
    net.decoder.project_out = ToPixels(patches, net.decoder.project_out)
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
    dataset = clips.Clips(
        films, arm.frames, SIZE, "train", seed, cache=out / "cache", zoom=ZOOM)
    numbers = range(10**6, 10**6 + PATCHES)
    patches = Patches(dataset.sample(i)[None].float() / 127.5 - 1 for i in numbers)
    torch.manual_seed(seed)
    net = on_patches(arm.config, patches)
    config = dict(arm=arm.name, **dataclasses.asdict(arm.config), frames=arm.frames,
                  batch=arm.batch, lr=LR, seed=seed, starts=len(dataset))
    plan = loop.Plan(steps, save_every=100, keep=1)
    run = loop.Run(out / arm.name, config, {"net": net}, {"net": Muon(net, LR)}, plan)

    def error(x, number):
        x = window(x, number, seed)
        with kernels.autocast(x.device):
            y = whole(net, x).float()
        mse = (y - x).square().mean()
        yield "net", mse, {"loss": mse.detach(), "psnr": 10 * torch.log10(4 / mse.detach())}

    run.fit(clips.loader(dataset, arm.batch, run.number, workers=0), error, what=arm.name)
    log = loop.read_log(run.folder)
    seconds = sorted(line["seconds_per_step"] for line in log)[len(log) // 2]
    return net.eval(), dict(
        steps=steps, frames=arm.frames, batch=arm.batch,
        parameters=sum(p.numel() for p in net.parameters()), seconds_per_step=round(seconds, 3),
        train_psnr=[(line["step"], round(line["psnr"], 3)) for line in log])


# -------------------------------------------------------------- judging


def whole(net, x):
    """All of a clip in one call, whatever its length."""
    return net.decoder(net.encoder(x)[0])[0]


def meet(net, arm, x, way):
    """A clip longer than those an arm was trained on: as a stream; or, where every frame sees
    all others, the whole clip at once, or in pieces of the training length, which know nothing
    of each other."""
    if way == "streamed":
        return net(x)
    pieces = x.split(arm.frames, dim=2) if way == "pieces" else [x]
    return torch.cat([whole(net, piece) for piece in pieces], dim=2)


@torch.no_grad()
def within_chunks(net, arm, short):
    """How differently the latent frames of a clip that stands still are used: their variance
    within stretches of 16 frames, over all variance. 0: each of them says the same. 3/4: the
    four of them say four things of equal weight."""
    still = short[:, :, :1].expand(-1, -1, arm.frames, -1, -1)
    z = torch.cat([net.encoder(x)[0] for x in still.split(16)])
    z = rearrange(z, "b c (k n) h w -> c (b k h w) n", n=16 // arm.config.temporal_factor)
    inside, all_over = z.var(dim=2, correction=0), z.flatten(1).var(dim=1, correction=0)
    return (inside.mean() / all_over.mean()).item()


@torch.no_grad()
def score(net, arm, short, long):
    """Numbers of one arm -> dict: PSNR and SSIM on clips of the training length; on long ones,
    for each way to meet them, PSNR over frame index and flicker."""
    y = torch.cat([whole(net, x) for x in short.split(16)])
    result = dict(psnr=metrics.psnr(y, short), ssim=metrics.ssim(y, short),
                  still=within_chunks(net, arm, short), long={})
    ways, period = ("streamed",), max(arm.config.chunk, 4)
    if arm.config.temporal == "causal":
        period = 4
    elif arm.config.temporal == "non_causal":
        ways, period = ("whole", "pieces"), arm.frames
    for way in ways:
        y = torch.cat([meet(net, arm, x, way) for x in long.split(4)])
        frames = metrics.psnr_frames(y, long).mean(dim=0)
        beyond = frames[arm.frames :].mean().item() if arm.frames < LONG else None
        result["long"][way] = dict(
            psnr=frames.mean().item(), psnr_start=frames[: arm.frames].mean().item(),
            psnr_beyond=beyond, border=period, flicker=metrics.flicker(y, long, period),
            psnr_frames=[round(v, 3) for v in frames.tolist()])
    return result


def plot(path, arms):
    """PSNR over frame index, quality against chunk size."""
    groups = {}
    for name, arm in arms.items():
        group, label = name.split("-")
        groups.setdefault(group, {})[label] = arm
    draw_group = dict(temporal=plot_temporal, chunk=plot_chunks)
    with video.figure(path, columns=len(groups), size=(6, 4), dpi=100) as axes:
        for ax, (group, mine) in zip(axes[0], groups.items()):
            draw_group[group](ax, mine)
            ax.grid(alpha=0.3)


def plot_chunks(ax, arms):
    chunks = sorted(arms, key=int)
    lengths = [int(chunk) for chunk in chunks]
    ax.plot(lengths, [arms[chunk]["psnr"] for chunk in chunks], marker="o")
    ax.set(title="quality against the chunk", xlabel="frames per chunk", ylabel="dB")
    flicker = [arms[chunk]["long"]["streamed"]["flicker"] for chunk in chunks]
    twin = ax.twinx()
    twin.plot(lengths, flicker, marker="x", color="tab:red")
    twin.set_ylabel("flicker at borders (1: none)", color="tab:red")


def plot_temporal(ax, arms):
    for label, arm in arms.items():
        for way, long in arm["long"].items():
            ax.plot(long["psnr_frames"], label=f"{label} ({way})", linewidth=1)
    ax.axvline(arm["frames"], color="black", linestyle=":", label="end of the training length")
    ax.set(title=f"f8t4c2: clips of {LONG} frames", xlabel="frame", ylabel="dB")
    ax.legend(fontsize=7)


def table(arms):
    """Markdown: one line per arm and way of meeting long clips."""
    rows = [["arm", "steps", "PSNR dB", "SSIM", "still", "long clips", "first frames", "beyond",
             "flicker"]]
    for name, arm in arms.items():
        for way, long in arm["long"].items():
            beyond = "-" if long["psnr_beyond"] is None else f"{long['psnr_beyond']:.2f}"
            flicker = "-" if math.isnan(long["flicker"]) else f"{long['flicker']:.2f}"
            rows.append([name.replace("-", ": ", 1), arm["steps"], f"{arm['psnr']:.2f}",
                         f"{arm['ssim']:.4f}", f"{arm['still']:.3f}", f"{way} {long['psnr']:.2f}",
                         f"{long['psnr_start']:.2f}", beyond, flicker])
    return metrics.markdown(rows)


# -------------------------------------------------------------- command line


def main_compare(argv):
    p = options.Parser(
        prog="ae.py compare", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train and judge the arms of the paper's comparison on film.")
    p.add_argument("--data", nargs="+", default=["out/clips", "out/pans"], metavar="FOLDER",
                   help="films (assets/fetch.py fetches some)")
    p.add_argument("--out", default="out/compare", help="folder of the runs")
    p.add_argument("--results", metavar="FOLDER",
                   help="of compare.json and its plot, where it is not --out")
    p.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    p.add_argument("--steps", type=options.whole(1), help="of each arm, in place of its group's")
    p.add_argument("--seed", type=options.seed, default=0, help="of weights and clips")
    p.add_argument("--threads", type=options.threads, default=1, help="CPU threads")
    p.refuse_gone({"--score": "what is finished is only judged: leave it out"})
    args, _ = p.parse(argv)
    torch.set_num_threads(args.threads)
    with folders.Lock(args.out):
        compare(args)


def compare(args):
    """Train and judge what is not finished, arm by arm."""
    out, arms = Path(args.out), {}
    results, films = Path(args.results or out), hold_out(args.data, out)
    told = dict(**checkpoint.provenance(), size=SIZE, zoom=ZOOM, held_out=HELD_OUT, patch=PATCH,
                kept=KEPT, seed=args.seed)
    for arm in ARMS:
        if arm.group not in args.groups:
            continue
        steps = args.steps or GROUPS[arm.group][0]
        net, took = train_arm(arm, films, out, steps, args.seed)
        short, long = (windows(draw(films, t, LENGTHS[t])) for t in (arm.frames, LONG))
        arms[arm.name] = {**took, **score(net, arm, short, long)}
        x = draw(films, 16, LENGTHS[16])
        flat = metrics.psnr(x.mean(dim=(2, 3, 4), keepdim=True).expand_as(x), x)
        base = dataclasses.asdict(BASE)
        checkpoint.write_json(results / "compare.json", dict(
            **told, lr=LR, window=WINDOW, base=base, flat_colour=flat, arms=arms))
        print(table(arms), flush=True)
    if arms:
        plot(results / "compare.png", arms)
