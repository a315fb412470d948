"""What an adaptation needs, before it is paid for: memory of a GPU part by part, FLOPs, GPU-hours, disk (spec ae-adapt-v 5, 9.6).

Parameters, activations and operations are counted, not estimated. The real modules are built on the meta device, where tensors have shapes
and no numbers; one training step runs there, forward and backward, while the bytes alive (`tiling.Meter`) and the FLOPs of every matrix
product are counted.

**Memory.** With n bytes per parameter:
    frozen weights    2, bf16 (norms, modulation and time layers 4)       shared out among the GPUs, and so are the next four
    trained weights   4, fp32 masters
    gradients         4
    Adam moments      8
    average           4, stage 2
    gathered          sharded only: two blocks whole (one at work, the next on its way), and what is outside of the blocks
    activations       what autograd keeps for the backward pass; with recomputed blocks the residual stream at each, and one block
Not counted: the CUDA context, NCCL's buffers and the allocator's slack, together 2 to 4 GB.

**FLOPs.** Freezing saves less than one may think. A frozen layer needs no gradient for its weight, but gradients must pass through it to reach
the patch embedder at the very beginning. Of a linear layer's forward cost F the backward pass takes 2 F where it is trained, 1 F
where it is frozen; flash attention 2.5 F, as it computes the scores again; and recomputing a block one more forward pass. So a step of stage 1b, with all
blocks frozen, still costs 3.3 forward passes of the 14B model, and one of stage 2 hardly more, as LoRA's matrices are thin.

    python -m training.plan --base wan2.1-t2v-14b --gpus 8            the plan, in seconds; the same as adapt.py --plan
    python -m training.plan --base wan2.1 --gpus 1 --target f64t4c128 --size 704x1280 --efficiency 0.3
    python -m training.plan --measure                                 its memory beside what training takes on this machine -> results/plan.json (5 minutes)
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting threads slow every other process down; must precede torch

import argparse
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

import ae
import dit
import lora
from files import ROOT, checkpoint, video
from gpu import tiling
from training import bases, captions, loop
from wan import released
from wan.image import CLIPVision
from wan.text import UMT5

H100 = 989e12  # bf16 FLOP/s, dense, as specified
ENDS = ("patch_embedding", "head")
WORDS = 128  # rows of a prompt's states, padding left out: 100 words
PAPER = ("paper: 10 H100 GPU-days for the 14B model; spec 9.6, from the published settings at 350 TFLOP/s: 1.5e20 + 2.8e20 FLOP, 12 to 15 GPU-days for 14B, "
         "about 3 for 1.3B with 20,000 steps")


# ---------------------------------------------------------------------------------------------------- the network of a stage


def transformer(config, stage, settings):
    """The transformer as stage "1b" or "2" trains it, on the meta device: frozen weights in settings.dtype, trained ones in fp32."""
    with torch.device("meta"):
        net = dit.WanDiT(config).cast_weights(bases.DTYPES[settings.dtype]).requires_grad_(False)
        if stage == "2":
            lora.wrap(net, settings.rank, settings.alpha)
    for end in ENDS:
        net.get_submodule(end).requires_grad_(True)
    net.checkpointing = settings.checkpoint_blocks
    return loop.masters(net)


def nbytes(parameters, trained=None):
    """Bytes of parameters: all of them, or only those that are (not) trained."""
    return sum(p.nbytes for p in parameters if trained in (None, p.requires_grad))


# ---------------------------------------------------------------------------------------------------- one step, without numbers


class Step(NamedTuple):
    """What one batch costs: FLOPs of its forward pass and of both passes (recomputation included), and the bytes that both take at their peak."""

    forward: float
    total: float
    peak: int


class Counter(tiling.Meter):
    """Counts FLOPs too, of every matrix product and convolution (2 per multiply-add), and of attention as flash kernels do it."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def __enter__(self):
        self.plain, dit.attention = dit.attention, lambda q, k, v, offset=None: Flash.apply(q, k, v, self)
        return super().__enter__()

    def __exit__(self, *error):
        dit.attention = self.plain
        return super().__exit__(*error)


class Flash(torch.autograd.Function):
    """Attention, shapes only: besides q, k, v and the result a flash kernel keeps one number per query and head, no scores."""

    @staticmethod
    def forward(ctx, q, k, v, counter):  # b l n c, b m n c
        ctx.product, ctx.counter = 2 * prod(q.shape) * k.shape[1], counter  # FLOPs of q k^T; those of the other product are as many
        counter.flops += 2 * ctx.product
        out, norms = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, norms)
        return out

    @staticmethod
    def backward(ctx, grad):
        ctx.counter.flops += 5 * ctx.product  # the scores once more, and four products for the three gradients
        return *(torch.empty_like(t) for t in ctx.saved_tensors[:3]), None


def step(net, latent, batch, gradients=False):
    """One forward and backward pass of a net on the meta device, for `batch` latents of (frames, height, width) -> Step.

    gradients: those of the step's earlier batches are there already, so the peak is what comes on top of them; else they come into being
    during the backward pass, while activations go, and belong to the peak.
    """
    c, empty = net.config, lambda *shape: torch.empty(*shape, device="meta")
    for p in net.parameters():
        p.grad = torch.empty_like(p) if gradients and p.requires_grad else None
    dit.rope_table.cache_clear()  # it is counted too
    with Counter() as counter:
        target, context = empty(batch, c.out_channels, *latent), empty(batch, c.text_len, c.text_dim)
        image = empty(batch, 257, c.image_dim) if c.image_dim else None
        v = net(empty(batch, c.in_channels, *latent), empty(batch), context, image)
        forward = counter.flops
        (v - target).square().mean().backward()
    for p in net.parameters():
        p.grad = None
    dit.rope_table.cache_clear()
    return Step(forward, counter.flops, counter.peak)


@lru_cache
def training_step(config, stage, settings, latent, gradients):
    """`step` of a stage's network. With all gradients there each block adds the same, so two and three blocks tell the rest."""
    run = lambda n: step(transformer(dataclasses.replace(config, layers=n), stage, settings), latent, settings.batch, gradients)
    if not gradients or config.layers < 4:
        return run(config.layers)
    return Step(*(two + (three - two) * (config.layers - 2) for two, three in zip(run(2), run(3))))


# ---------------------------------------------------------------------------------------------------- memory


def memory(config, stage, settings, latent, gpus=1, sharded=False, accumulate=1):
    """Bytes on each GPU while a stage trains -> ({part: bytes}, Step)."""
    net = transformer(config, stage, settings)
    cost = training_step(config, stage, settings, latent, gradients=sharded or accumulate > 1)
    blocks = list(net.blocks.parameters())
    inside = {id(p) for p in blocks}
    parameters, outside = list(net.parameters()), [p for p in net.parameters() if id(p) not in inside]
    share, trained = gpus if sharded else 1, nbytes(parameters, True)
    parts = {"frozen weights": nbytes(parameters, False) / share, "trained weights": trained / share, "gradients": trained / share,
             "Adam moments": 2 * trained / share, "average": trained / share if stage == "2" and settings.ema else 0,
             "gathered": (2 * nbytes(blocks) / config.layers + nbytes(outside)) if sharded else 0,
             "activations": cost.peak - (0 if sharded or accumulate > 1 else trained)}
    return parts, cost


# ---------------------------------------------------------------------------------------------------- caches


@torch.no_grad()
def encoding(net, frames, size):
    """FLOPs of encoding one clip with an autoencoder on the meta device."""
    with Counter() as counter:
        net.encode(torch.empty(1, 3, frames, *size, device="meta", dtype=next(net.parameters()).dtype))
    return counter.flops


class Caches(NamedTuple):
    """Per clip: FLOPs and bytes of everything that is kept; and what the encoders need of a GPU, one after the other."""

    flops: dict
    disk: dict
    memory: dict


def caches(teacher, student, config, base_config, frames, size):
    """teacher, student: autoencoders on the meta device; config, base_config: of the transformers -> Caches"""
    t = student.config
    shape = student.latent_shape(frames, *size)
    kept = shape[0] if teacher.config.temporal_factor == t.temporal_factor else shape[0] * t.temporal_factor // teacher.config.temporal_factor
    base_frames = teacher.config.lead + (kept - 1) * teacher.config.temporal_factor
    image = config.in_channels != config.out_channels
    latent = {"base": (kept, *teacher.latent_shape(base_frames, *size)[1:]), "deep": shape}
    types = {"base": torch.float32 if hasattr(teacher, "conv1") else torch.bfloat16, "deep": torch.bfloat16}  # as released.ae_type
    flops, disk, need = {}, {}, {}
    for name, net, n in (("base", teacher, base_frames), ("deep", student, frames)):
        one, channels = encoding(net, n, size), {"base": base_config, "deep": config}[name].in_channels
        flops[f"{name} latent"] = one * (2 if image else 1)  # the image condition is a clip of its own
        disk[f"{name} latent"] = channels * prod(latent[name]) * types[name].itemsize
        weights = sum(p.numel() for p in net.encoder.parameters()) * types[name].itemsize
        need[f"{name} autoencoder, encoding"] = weights + tiling.peak(net, "encoder", latent[name], dtype=types[name])
    if config.text_dim == 4096:
        with torch.device("meta"):
            text, clip = UMT5(), CLIPVision()
        matrices = sum(p.numel() for n, p in text.named_parameters() if "embedding" not in n)
        flops["prompt"], disk["prompt"] = 2.0 * matrices * WORDS, WORDS * config.text_dim * 2
        need["text encoder"] = 2 * sum(p.numel() for p in text.parameters())
        if config.image_dim:
            flops["CLIP tokens"], disk["CLIP tokens"] = 2.0 * 257 * sum(p.numel() for p in clip.parameters()), 257 * config.image_dim * 2
            need["image encoder"] = 2 * sum(p.numel() for p in clip.parameters())
    return Caches(flops, disk, need)


# ---------------------------------------------------------------------------------------------------- the plan


def networks(base, target):
    """-> (config of the base's transformer, its autoencoder, the deep autoencoder), on the meta device."""
    with torch.device("meta"):
        if base.name == "toy":
            return dit.PRESETS["toy-base"], ae.DCAEV(ae.PRESETS["toy-base"]), ae.DCAEV(ae.PRESETS["toy"])
        outline = released.outline(base.name)
        return outline.net.config, outline.ae, ae.DCAEV(ae.PRESETS[target])


def report(base, settings=None, target="f32t4c32", gpus=8, size=None, frames=None, clips=10_000, efficiency=0.4):
    """The plan in Markdown. base: a row of bases.BASES; settings: bases.Settings (default: the base's); size, frames: of the clips
    (default 480x832, 80; the toy's); clips: how many there are, for the caches; efficiency: share of an H100's peak that is reached."""
    settings = settings or base.settings
    size, frames = size or ((64, 64) if base.name == "toy" else (480, 832)), frames or (32 if base.name == "toy" else 80)
    base_config, teacher, student = networks(base, target)
    config = bases.deep_config(base_config, student.config)
    cell = student.config.spatial_factor
    size = tuple(n // cell * cell for n in size)
    latent = student.latent_shape(frames, *size)
    accumulate, sharded, many = settings.accumulated(gpus), gpus > 1, f"{gpus} GPU{'s' * (gpus > 1)}"
    samples = settings.batch * accumulate * gpus
    experts = 2 if base.name in released.RELEASED and released.RELEASED[base.name].boundary else 1
    hours = lambda flops: flops / (efficiency * H100) / 3600
    gib = lambda n: f"{n / 2**30:.1f}" if n else "-"

    # what is trained, and what it costs
    sgd = settings.align == "sgd"  # or one solve, which costs nothing
    steps = {"1a": settings.steps_align if sgd else 0, "1b": settings.steps_head, "2": settings.steps}
    nets = {stage: transformer(config, stage, settings) for stage in ("1b", "2")}
    count = lambda net, which: sum(p.numel() for p in net.parameters() if p.requires_grad == which)
    trained = {"1a": count(nets["1b"].patch_embedding, True), **{stage: count(net, True) for stage, net in nets.items()}}
    frozen = {"1a": 0, **{stage: count(net, False) for stage, net in nets.items()}}
    per_clip = {"1a": embedder_flops(base_config, config, latent, cell // teacher.config.spatial_factor)}
    passes, parts = {"1a": ""}, {}
    ways = [(a, b) for a in ((True, False) if sharded else (False,)) for b in (True, False)]  # weights sharded, blocks recomputed
    for stage, way in itertools.product(nets, ways):
        parts[stage, way], cost = memory(config, stage, dataclasses.replace(settings, checkpoint_blocks=way[1]), latent, gpus, way[0], accumulate)
        if way == (sharded, settings.checkpoint_blocks):  # as adapt.py does it
            per_clip[stage], passes[stage] = cost.total / settings.batch, f"{cost.total / cost.forward:.2f}"
    work = {stage: experts * per_clip[stage] * n * (settings.batch_align if stage == "1a" else samples) for stage, n in steps.items()}
    total, cache = sum(work.values()), caches(teacher, student, config, base_config, frames, size)

    lines = [f"# {base.name} to {bases.target_of(student.config)} on {many}" + ", two experts one after the other" * (experts - 1), "",
             f"{frames} frames of {size[0]}x{size[1]}: {dit.tokens(config, latent):,d} tokens; {samples} clips per step (batch {settings.batch}, "
             f"{accumulate} batch{'es' * (accumulate > 1)} per step and GPU); frozen weights and matrix products {settings.dtype}.", "",
             "| stage | trained parameters | frozen | steps | TFLOP per clip | in forward passes | FLOP in all | H100 hours |", "|---" * 8 + "|"]
    lines += [f"| {stage} | {trained[stage]:,d} | {frozen[stage]:,d} | {steps[stage]:,d} | {per_clip[stage] / 1e12:,.3g} | {passes[stage]} | "
              f"{work[stage]:.2g} | {hours(work[stage]):,.1f} |" for stage in steps]
    lines += ["", f"In all {total:.2g} FLOP: {hours(total):,.0f} H100 hours ({hours(total) / 24:,.1f} GPU-days) at {efficiency:.0%} of "
              f"{H100 / 1e12:.0f} TFLOP/s, {hours(total) / gpus:,.1f} hours on {many}; without samples and validation.", f"({PAPER}.)", "",
              f"| GiB per GPU: stage, weights, blocks | {' | '.join(next(iter(parts.values())))} | sum |", "|---" * 9 + "|"]
    lines += [f"| {stage}, {'sharded' if way[0] else 'copied' if sharded else 'whole'}, {'recomputed' if way[1] else 'kept'} | "
              f"{' | '.join(map(gib, row.values()))} | **{gib(sum(row.values()))}** |" for (stage, way), row in parts.items()]
    lines += ["", "adapt.py shards over all GPUs and recomputes blocks unless told --no-checkpoint-blocks. An H100 has 74.5 GiB, of which 2 to 4 go to CUDA, "
              "NCCL and gaps." + f" Before the network is cut, each GPU holds it whole: {gib(nbytes(nets['2'].parameters()))} GiB." * sharded, "",
              "Caches, filled once, before the transformer is read: "
              + ", ".join(f"{k} {cache.flops[k] / 1e12:,.4g} TFLOP and {cache.disk[k] / 1e6:,.2f} MB" for k in cache.disk) + " per clip.",
              f"{clips:,d} clips: {hours(sum(cache.flops.values()) * clips):,.1f} H100 hours at the same efficiency, {sum(cache.disk.values()) * clips / 1e9:,.0f} GB "
              "of disk. On the GPU, one after the other: " + ", ".join(f"{k} {gib(v)} GiB" for k, v in cache.memory.items()) + "."]
    return "\n".join(lines)


def embedder_flops(base_config, config, latent, ratio):
    """Stage 1a per clip: both embedders forward, and the gradient of one weight. The base's latent has `ratio` times the rows and columns."""
    each = lambda c, positions: 2 * positions * c.in_channels * c.dim
    return each(base_config, prod(latent) * ratio**2) + 2 * each(config, prod(latent))


def show(base, settings, args):
    """`adapt.py --plan`: for the family of buckets that is asked for, its 16:9."""
    size = captions.bucket_sizes(args.buckets)[0.5625] if args.buckets else None
    print(report(base, settings, args.target, args.gpus, size, None if base.name == "toy" else args.frames))


# ---------------------------------------------------------------------------------------------------- measured on this machine

#: Small enough for a laptop, and not all alike: activations or optimiser state prevail
_NARROW = dict(dim=512, ffn_dim=2048, heads=4, layers=4, latent=(5, 10, 16), rank=32)
_WIDE = dict(dim=1024, ffn_dim=4096, heads=8, layers=2, latent=(3, 10, 12), rank=256)
CASES = [dict(stage=stage, dtype=dtype, checkpoint_blocks=again, accumulate=1, **_NARROW)
         for stage, dtype, again in itertools.product(("1b", "2"), ("fp32", "bf16"), (True, False))]
CASES += [dict(stage="2", dtype="bf16", checkpoint_blocks=True, accumulate=n, **_WIDE) for n in (1, 2)]


def case(stage, dtype, checkpoint_blocks, accumulate, latent, rank, **shape):
    """-> (transformer config, stage, settings, latent, accumulate)"""
    config = dit.Config(in_channels=32, out_channels=32, patch=(1, 1, 1), text_dim=512, **shape)
    settings = bases.Settings(rank=rank, alpha=2 * rank, dtype=dtype, checkpoint_blocks=checkpoint_blocks, batch=2)
    return config, stage, settings, tuple(latent), accumulate


def measure(index):
    """Train one of CASES for two steps in this process -> what its memory grew by, in bytes.

    Anonymous memory: what the system must provide. Linux keeps the peak of all resident memory; the part that is files is taken off.
    """
    def training(config, stage, settings, latent, accumulate):
        net = transformer(config, stage, settings).to_empty(device="cpu")
        for p in net.parameters():
            p.data.uniform_(-0.02, 0.02)
        trained = list(loop.trained(net).values())
        plan = loop.Plan(2, 0, "constant", 0.1, accumulate, settings.ema if stage == "2" else 0.0)
        with tempfile.TemporaryDirectory() as folder:
            run = loop.Run(folder, {}, {"net": net}, {"net": torch.optim.AdamW(trained, 1e-4)}, plan)

            def losses(batch, number):
                z, noise, context = batch
                loss = (net(z + noise, torch.full((len(z),), 500.0), context) - (noise - z)).square().mean()
                yield "net", loss, {}

            draw = lambda: [torch.randn(settings.batch, *s) for s in ((32, *latent), (32, *latent), (config.text_len, config.text_dim))]
            run.fit((draw() for _ in itertools.count()), losses)

    status = lambda field: int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    tiny = dict(CASES[index], dim=48, ffn_dim=64, layers=1, rank=2, latent=(1, 2, 300))
    training(*case(**tiny))  # everything is loaded before it starts, the larger attention kernels too
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = status("RssAnon")
    training(*case(**CASES[index]))
    return status("VmHWM") - status("RssFile") - before


def measured(out):
    """Every case in a process of its own, and the plan's figure beside it -> `out`."""
    rows = []
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0", "OMP_NUM_THREADS": "1"}  # freed memory goes back at once
    for i, row in enumerate(CASES):
        done = subprocess.run([sys.executable, "-m", "training.plan", "--one", str(i)], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        parts, _ = memory(*(arguments := case(**row))[:4], accumulate=arguments[4])
        took, planned = json.loads(done.stdout.splitlines()[-1]), round(sum(parts.values()))
        rows.append(dict(row, measured=took, planned=planned, ratio=round(planned / took, 3), parts={k: round(v) for k, v in parts.items()}))
        print(f"width {row['dim']:4d}, {row['layers']} blocks, stage {row['stage']:2s} {row['dtype']} {'recomputed' if row['checkpoint_blocks'] else 'kept':10s} "
              f"{row['accumulate']} per step   measured {took / 1e6:6.0f} MB   planned {planned / 1e6:6.0f} MB   ratio {planned / took:.2f}", flush=True)
    checkpoint.write_json(out, dict(**checkpoint.provenance(), unit="bytes", rows=rows))


# ---------------------------------------------------------------------------------------------------- command line


def main(argv=None):
    p = argparse.ArgumentParser(description="Memory, FLOPs, H100 hours and disk of an adaptation with the published settings.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--base", default="wan2.1", help="the pre-trained model")
    p.add_argument("--target", choices=bases.TARGETS, default="f32t4c32", help="the deep latent space")
    p.add_argument("--gpus", type=int, default=8)
    p.add_argument("--size", type=video.size_arg, metavar="HxW", help="of the clips (default: 480x832)")
    p.add_argument("--frames", type=int, help="of the clips (default: 80)")
    p.add_argument("--clips", type=int, default=10_000, help="how many, for the caches")
    p.add_argument("--efficiency", type=float, default=0.4, help="share of an H100's peak that is reached")
    for name in ("batch", "accumulate", "rank", "steps_head", "steps"):
        p.add_argument(f"--{name.replace('_', '-')}", type=int, help="in place of the published one")
    p.add_argument("--measure", action="store_true", help="compare with training on this machine (Linux) instead")
    p.add_argument("--one", type=int, metavar="CASE", help="one of these measurements in this process, printed in bytes")
    p.add_argument("--out", default="results/plan.json", help="of --measure")
    args = p.parse_args(argv)
    if args.one is not None:
        return print(measure(args.one))
    if args.measure:
        return measured(args.out)
    base = bases.find(args.base)
    given = {k: v for k in ("batch", "accumulate", "rank", "steps_head", "steps") if (v := getattr(args, k)) is not None}
    if "rank" in given:
        given["alpha"] = 2 * args.rank
    print(report(base, dataclasses.replace(base.settings, **given), args.target, args.gpus, args.size, args.frames, args.clips, args.efficiency))


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
