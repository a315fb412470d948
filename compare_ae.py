"""The paper's comparison, on film: what may a frame see? (paper, section on DC-AE-V, figures on temporal modelling and on chunk size)

Every arm is the same small f32t4 autoencoder, trained from the same start on the same clips in the same order for the same number of
steps. The start is an image autoencoder of the same widths, trained once on single frames and inflated (`train_ae.inflate`, spec 3.7):
what a latent cell is to hold of space need not be learned ten times, and the arms' budget goes into time. What differs is one thing per
group:

    temporal   chunk-causal, causal, non-causal convolutions; trained on 32 frames (two chunks of 16), judged on those and on clips three
               times as long
    shallow    the same three at f8t4c16, where little of space is lost, and what is lost is time
    latent     16 or 64 latent channels in place of 32
    chunk      chunks of 1, 4, 8, 20, 40 frames, trained on 80 frames. Chunk 1 is causal with one frame of memory per layer: a frame sees itself
               and the one before it. (A causal convolution sees two back.)

Expected from the paper: inside the training length chunk-causal is close to non-causal and far above causal; beyond it non-causal degrades and
chunk-causal does not; quality rises with the chunk. The arms are tiny and their training is short, so differences count here, not
levels. A non-causal model meets a long clip in two ways: the whole clip at once, longer than any it was trained on, or in pieces of the training
length that know nothing of each other.

Judged is on films that no arm has seen (HELD_OUT). All clips are 64x64 crops, a quarter of the frame's side or more.

    python assets/fetch.py && python ae.py compare            all arms, about an hour on one core -> results/compare.json, compare.png
    python ae.py compare --groups temporal --steps 300        a quick look

Killed and started again it goes on where it stopped. --score judges again what is trained.
"""
import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import ae
import checkpoint
import clips
import data
import metrics
import train as training
from chunk_causal import Conv3d
from muon import Muon
from train_ae import inflate

SIZE, LONG = (64, 64), 96  # rows and columns; frames of the long clips
LENGTHS = {32: 24, 80: 18, LONG: 18}  # frames of the clips that arms are judged on: how many
HELD_OUT = ("bigbuckbunny", "carphone_pristine", "cup", "china", "home", "squirrel_cls")
ZOOM = 0.25  # smallest side of a crop, as a share of the frame's
IMAGES, IMAGE_STEPS = 64, 800  # the start: single frames per step, steps
STEPS = {"temporal": 600, "shallow": 400, "chunk": 200, "latent": 400}
BASE = ae.Config((0, 16, 32, 32, 64, 64), (0, 1, 1, 1, 1, 1), 32, chunk=16, patch=4)  # f32t4c32
SHALLOW = ae.Config((0, 16, 32, 32), (0, 1, 1, 1), 16, chunk=16, patch=4)  # f8t4c16


@dataclass(frozen=True)
class Arm:
    """One trained model: what it changes in BASE, and its batches."""

    group: str
    label: str
    changes: dict = field(default_factory=dict)
    frames: int = 32
    batch: int = 2
    base: ae.Config = BASE

    @property
    def name(self):
        return f"{self.group}-{self.label}"

    @property
    def config(self):
        return dataclasses.replace(self.base, **self.changes)


ARMS = [*(Arm("temporal", t, {"temporal": t}) for t in ("chunk_causal", "causal", "non_causal")),
        *(Arm("shallow", t, {"temporal": t}, base=SHALLOW) for t in ("chunk_causal", "causal", "non_causal")),
        *(Arm("chunk", str(c), {"chunk": c}, frames=80, batch=1) for c in (40, 8, 1, 20, 4)),
        *(Arm("latent", str(z), {"latent_channels": z}) for z in (16, 64))]  # 32 is temporal-chunk_causal


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


# ---------------------------------------------------------------------------------------------------- training


class Still(nn.Module):
    """What is left of a 3-D convolution on single frames: its middle tap."""

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = nn.Parameter(conv.weight[:, :, 1].detach() * 3**0.5), conv.bias  # a third of the inputs: as strong as before

    def forward(self, x, state=None):
        return F.conv2d(x[:, :, 0], self.weight, self.bias, padding=1)[:, :, None], state


def image_autoencoder(config):
    """The 2-D autoencoder of these widths, for clips of one frame; what resamples time does nothing."""
    net = ae.DCAEV(dataclasses.replace(config, temporal_factor=1, chunk=1))
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv3d):
                setattr(module, name, Still(child))
    for p in (*net.encoder.stages[-2].op_list[-1].parameters(), *net.decoder.stages[-2].op_list[0].parameters()):
        nn.init.zeros_(p).requires_grad_(False)
    return net


def fit(name, net, films, out, frames, batch, steps, seed, lr=4e-3, **settings):
    """Train on clips of so many frames -> (net in eval mode, what it took). Muon, L1 + MSE in pixels: the toy's recipe without noise."""
    dataset = clips.Clips(films, frames, SIZE, "train", seed, cache=out / "cache", zoom=ZOOM)
    config = dict(frames=frames, batch=batch, lr=lr, seed=seed, starts=len(dataset), **settings)
    run = training.Run(out / name, config, {"net": net}, {"net": Muon(net, lr)}, training.Plan(steps, save_every=100, keep=1))

    def error(x, number):
        with torch.autocast("cpu", torch.bfloat16):
            y = net.decoder(net.encoder(x)[0])[0].float()
        l1, mse = (y - x).abs().mean(), (y - x).square().mean()
        yield "net", l1 + mse, {"loss": (l1 + mse).detach(), "psnr": 10 * torch.log10(4 / mse.detach())}

    run.fit(clips.loader(dataset, batch, run.number, workers=0), error, what=name)
    log = training.read_log(run.folder)
    seconds = sorted(line["seconds_per_step"] for line in log)[len(log) // 2]
    return net.eval(), dict(steps=steps, frames=frames, batch=batch, parameters=sum(p.numel() for p in net.parameters()),
                            seconds_per_step=round(seconds, 3), train_psnr=[(line["step"], round(line["psnr"], 3)) for line in log])


def train_arm(arm, films, out, steps, image_steps, short, seed=0):
    """The image autoencoder (once per size of the latent), inflated and trained as this arm -> (net, what it took).

    `start_psnr` is that of the inflated net on clips `short`: an arm must beat it. The learning rate is low for that reason: at 2e-3 the f32
    arms ended their 700 steps below it.
    """
    torch.manual_seed(seed)
    latent = f"f{arm.config.spatial_factor}c{arm.config.latent_channels}"
    image, _ = fit(f"image-{latent}", image_autoencoder(arm.config), films, out, 1, IMAGES, image_steps, seed)
    net = ae.DCAEV(arm.config)
    inflate(net, image.state_dict())
    with torch.no_grad():
        start = metrics.psnr(torch.cat([whole(net, x) for x in short.split(4)]), short)
    net, took = fit(arm.name, net, films, out, arm.frames, arm.batch, steps, seed, lr=5e-4, arm=arm.name, changes=arm.changes,
                    image_steps=image_steps)
    return net, dict(start_psnr=start, **took)


# ---------------------------------------------------------------------------------------------------- judging


def whole(net, x):
    """All of a clip in one call, whatever its length."""
    return net.decoder(net.encoder(x)[0])[0]


def pieces(net, x, frames):
    """Pieces of `frames` frames that know nothing of each other."""
    return torch.cat([whole(net, piece) for piece in x.split(frames, dim=2)], dim=2)


@torch.no_grad()
def score(net, arm, short, long):
    """Numbers of one arm: PSNR and SSIM on clips of the training length; PSNR over frame index and flicker on long ones. -> dict

    Long clips: {"streamed" or "whole" or "pieces": {psnr, psnr_frames, psnr_start and psnr_beyond the training length, flicker at its borders}}.
    """
    y = torch.cat([whole(net, x) for x in short.split(4)])
    result = dict(psnr=metrics.psnr(y, short), ssim=metrics.ssim(y, short), long={})
    period = dict(chunk_causal=max(arm.config.chunk, 4), causal=4, non_causal=arm.frames)[arm.config.temporal]
    ways = {"streamed": lambda net, x: net(x)}
    if arm.config.temporal == "non_causal":
        ways = {"whole": whole, "pieces": lambda net, x: pieces(net, x, arm.frames)}
    for way, run in ways.items():
        y = torch.cat([run(net, x) for x in long.split(1)])
        frames = metrics.psnr_frames(y, long).mean(dim=0)
        result["long"][way] = dict(psnr=frames.mean().item(), psnr_start=frames[: arm.frames].mean().item(),
                                   psnr_beyond=frames[arm.frames :].mean().item() if arm.frames < LONG else None,
                                   border=period, flicker=metrics.flicker(y, long, period), psnr_frames=[round(v, 3) for v in frames.tolist()])
    return result


def plot(path, arms):
    """PSNR over frame index at f32 and f8, quality against chunk size, quality against latent channels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 4, figsize=(20, 4))
    for ax, group, title in zip(axes, ("temporal", "shallow"), ("f32t4c32", "f8t4c16")):
        for name, arm in arms.items():
            for way, long in arm["long"].items() if name.startswith(group) else ():
                ax.plot(long["psnr_frames"], label=f"{name.split('-')[1]} ({way})", linewidth=1)
        ax.axvline(32, color="black", linestyle=":", label="end of the training length")
        ax.set(title=f"{title}: PSNR over frame index, clips of {LONG} frames", xlabel="frame", ylabel="dB")
        ax.legend(fontsize=7)
    points = lambda group, pick: sorted((int(n.split("-")[1]), pick(a)) for n, a in arms.items() if n.startswith(group))
    axes[2].plot(*zip(*points("chunk", lambda a: a["psnr"]) or [(0, 0)]), marker="o")
    axes[2].set(title="quality against chunk size, clips of 80 frames", xlabel="frames per chunk", ylabel="dB")
    twin = axes[2].twinx()
    twin.plot(*zip(*points("chunk", lambda a: a["long"]["streamed"]["flicker"]) or [(0, 0)]), marker="x", color="tab:red")
    twin.set_ylabel("flicker at borders (1: none)", color="tab:red")
    channels = points("latent", lambda a: a["psnr"]) + ([(32, arms["temporal-chunk_causal"]["psnr"])] if "temporal-chunk_causal" in arms else [])
    axes[3].plot(*zip(*sorted(channels) or [(0, 0)]), marker="o")
    axes[3].set(title="quality against latent channels", xlabel="channels", ylabel="dB")
    for ax in axes:
        ax.grid(alpha=0.3)
    fig.tight_layout()
    with checkpoint.atomic_path(path) as tmp:
        fig.savefig(tmp, dpi=100)
    plt.close(fig)


def table(arms):
    """Markdown: one line per arm and way of meeting long clips."""
    number = lambda v, digits=2: "-" if v is None or v != v else f"{v:.{digits}f}"
    lines = ["| arm | steps | start dB | PSNR dB | SSIM | long clips | first frames | beyond | flicker |", "|---|---|---|---|---|---|---|---|---|"]
    for name, arm in arms.items():
        for way, long in arm["long"].items():
            lines.append(f"| {name.replace('-', ': ', 1)} | {arm['steps']} | {number(arm['start_psnr'])} | {number(arm['psnr'])} "
                         f"| {number(arm['ssim'], 4)} | {way} {number(long['psnr'])} | {number(long['psnr_start'])} | {number(long['psnr_beyond'])} | {number(long['flicker'])} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- command line


def main_compare(argv):
    p = argparse.ArgumentParser(prog="ae.py compare", description="Train and judge the arms of the paper's comparison on film.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", nargs="+", default=["out/clips", "out/pans"], metavar="FOLDER", help="films (assets/fetch.py fetches some)")
    p.add_argument("--out", default="out/compare", help="folder of the runs")
    p.add_argument("--results", default="results", help="folder for compare.json and compare.png")
    p.add_argument("--groups", nargs="+", choices=list(STEPS), default=list(STEPS))
    p.add_argument("--steps", type=int, help=f"optimiser steps of each arm (default: {', '.join(f'{g} {n}' for g, n in STEPS.items())})")
    p.add_argument("--image-steps", type=int, default=IMAGE_STEPS, help="optimiser steps of the image autoencoder that all start from")
    p.add_argument("--score", action="store_true", help="train nothing, judge what is finished")
    p.add_argument("--seed", type=int, default=0, help="of weights and clips")
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    out, arms = Path(args.out), {}
    films = hold_out(args.data, out)
    held_out = {frames: draw(films, frames, n) for frames, n in LENGTHS.items()}
    for arm in ARMS:
        steps = args.steps or STEPS[arm.group]
        if arm.group not in args.groups or args.score and not (out / arm.name / f"checkpoint-{steps:07d}.pt").exists():
            continue
        net, took = train_arm(arm, films, out, steps, args.image_steps, held_out[arm.frames], args.seed)
        arms[arm.name] = {**took, **score(net, arm, held_out[arm.frames], held_out[LONG])}
        short = held_out[32]
        flat = metrics.psnr(short.mean(dim=(2, 3, 4), keepdim=True).expand_as(short), short)
        checkpoint.write_json(Path(args.results) / "compare.json", dict(
            **checkpoint.provenance(), size=SIZE, zoom=ZOOM, image_steps=args.image_steps, held_out=HELD_OUT, seed=args.seed,
            base=dataclasses.asdict(BASE), shallow=dataclasses.asdict(SHALLOW), flat_colour=flat, arms=arms))
        plot(Path(args.results) / "compare.png", arms)
        print(table(arms), flush=True)
