"""What an adaptation needs, before it is paid for: memory of a GPU part by part, FLOPs,
GPU-hours, disk.

    python adapt.py --base wan2.1-t2v-14b --gpus 8 --plan        in seconds

Parameters, activations and operations are counted, not estimated. The real modules are
built on the meta device, where tensors have shapes and no numbers; one training step
runs there, forward and backward, while the bytes alive (`tiling.Meter`) and the FLOPs
of every matrix product are counted.

**Memory.** With n bytes per parameter:
    frozen weights    2, bf16 (norms, modulation and time layers 4); these and the next
                      four are shared out among the GPUs
    trained weights   4, fp32 masters
    gradients         4
    Adam moments      8
    average           4, stage 2
    gathered          sharded only: two blocks whole (one at work, the next on its way),
                      and what is outside of the blocks
    activations       what autograd keeps for the backward pass; with recomputed blocks
                      the residual stream at each, and one block
Not counted: the CUDA context, NCCL's buffers and the allocator's slack, 2 to 4 GB.

**FLOPs.** Freezing saves less than one may think: gradients must pass through frozen
layers to reach the patch embedder at the very beginning. A linear layer with forward
cost F costs 2 F backwards where it is trained, F where it is frozen; flash attention
2.5 F, as it computes the scores again; recomputing a block one more forward pass. So a
step of stage 1b, with all blocks frozen, still costs 3.3 forward passes of the 14B
model, and one of stage 2 hardly more, as LoRA's matrices are thin.
"""
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

import ae
import dit
import lora
from files import options
from gpu import tiling
from training import bases, captions, loop
from training.latents import frames_alike
from training.metrics import markdown
from wan import models, released
from wan.image import CLIPVision
from wan.memory import counted, free_memory
from wan.text import UMT5

H100 = 989e12  # bf16 FLOP/s, dense, as specified
EFFICIENCY = 0.4  # share of it that is reached
CLIPS = 10_000  # that the caches are planned for
WORDS = 128  # rows of a prompt's states, padding left out: 100 words
PAPER = ("paper: 10 H100 GPU-days for the 14B model; from the published settings at 350 "
         "TFLOP/s: 1.5e20 + 2.8e20 FLOP, 12 to 15 GPU-days for 14B, about 3 for 1.3B with "
         "20,000 steps")

# ------------------------------------------------ the network of a stage


def transformer(config, stage, settings, build=dit.WanDiT):
    """The transformer build(config) as stage "1b" or "2" trains it, on the meta device:
    frozen weights in settings.dtype, trained ones in fp32."""
    with torch.device("meta"):
        net = build(config).cast_weights(options.TYPES[settings.dtype])
        if stage == "2":
            lora.wrap(net, settings.rank, settings.alpha, full=net.ends)
        else:
            lora.freeze(net, net.ends)
    net.checkpointing = settings.checkpoint_blocks
    return loop.masters(net)


def nbytes(parameters, trained=None):
    """Bytes of parameters: all of them, or only those that are (not) trained."""
    return sum(p.nbytes for p in parameters if trained in (None, p.requires_grad))


def count(parameters, trained=None):
    return sum(p.numel() for p in parameters if trained in (None, p.requires_grad))


# ------------------------------------------------ one step, without numbers


class Step(NamedTuple):
    """What one batch costs."""

    forward: float  # FLOPs of its forward pass
    total: float  # of both passes, recomputation included
    peak: int  # bytes that both take at their peak


class Counter(tiling.Meter):
    """Counts FLOPs too, of every matrix product and convolution (2 per multiply-add),
    and of attention as flash kernels do it."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def __enter__(self):
        self.plain, dit.attention = dit.attention, self.attention
        return super().__enter__()

    def __exit__(self, *error):
        dit.attention = self.plain
        return super().__exit__(*error)

    def attention(self, q, k, v):
        return Flash.apply(q, k, v, self)


class Flash(torch.autograd.Function):
    """Attention, shapes only: besides q, k, v and the result a flash kernel keeps one
    number per query and head, no scores."""

    @staticmethod
    def forward(ctx, q, k, v, counter):  # b l n c, b m n c
        ctx.counter = counter
        ctx.product = 2 * prod(q.shape) * k.shape[1]  # FLOPs of q k^T, and of the other product
        counter.flops += 2 * ctx.product
        out, norms = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, norms)
        return out

    @staticmethod
    def backward(ctx, grad):
        # the scores once more, and four products for the three gradients
        ctx.counter.flops += 5 * ctx.product
        return *(torch.empty_like(t) for t in ctx.saved_tensors[:3]), None


def step(net, latent, batch, gradients=False):
    """One forward and backward pass of a net on the meta device, for `batch` latents of
    (frames, height, width) -> Step.

    gradients: those of the step's earlier batches are there already, so the peak is
        what comes on top of them; else they come into being during the backward pass,
        while activations go, and belong to the peak.
    """
    c = net.config
    for p in net.parameters():
        p.grad = torch.empty_like(p) if gradients and p.requires_grad else None
    dit.rope_table.cache_clear()  # it is counted too
    with Counter() as counter, torch.device("meta"):
        target = torch.empty(batch, c.out_channels, *latent)
        context = torch.empty(batch, c.text_len, c.text_dim)
        image = torch.empty(batch, 257, c.image_dim) if c.image_dim else None
        x = torch.empty(batch, c.in_channels, *latent)
        v = net(x, torch.empty(batch), context, image)
        forward = counter.flops
        (v - target).square().mean().backward()
    for p in net.parameters():
        p.grad = None
    dit.rope_table.cache_clear()
    return Step(forward, counter.flops, counter.peak)


@lru_cache
def training_step(config, stage, settings, latent, gradients):
    """`step` of a stage's network. With all gradients there each block adds the same,
    so two and three blocks tell the rest."""
    def run(layers):
        net = transformer(replace(config, layers=layers), stage, settings)
        return step(net, latent, settings.batch, gradients)

    if not gradients or config.layers < 4:
        return run(config.layers)
    two, three = run(2), run(3)
    return Step(*(a + (b - a) * (config.layers - 2) for a, b in zip(two, three)))


# ------------------------------------------------ memory


def memory(config, stage, settings, latent, gpus=1, sharded=False, accumulate=1,
           build=dit.WanDiT):
    """Bytes on each GPU while a stage trains -> ({part: bytes}, Step). The step of
    another family is that of a Wan of its width and depth."""
    net, there = transformer(config, stage, settings, build), sharded or accumulate > 1
    cost = training_step(counted(config), stage, settings, latent, gradients=there)
    everything, blocks = nbytes(net.parameters()), nbytes(net.blocks.parameters())
    share, trained = gpus if sharded else 1, nbytes(net.parameters(), True)
    parts = {
        "frozen weights": nbytes(net.parameters(), False) / share,
        "trained weights": trained / share,
        "gradients": trained / share,
        "Adam moments": 2 * trained / share,
        "average": trained / share if stage == "2" and settings.ema else 0,
        "gathered": 2 * blocks / config.layers + everything - blocks if sharded else 0,
        "activations": cost.peak - (0 if there else trained)}
    return parts, cost


# ------------------------------------------------ caches


@torch.no_grad()
def encoding(net, frames, size):
    """FLOPs of encoding one clip with an autoencoder on the meta device."""
    dtype = next(net.parameters()).dtype
    with Counter() as counter:
        net.encode(torch.empty(1, 3, frames, *size, device="meta", dtype=dtype))
    return counter.flops


class Cached(NamedTuple):
    """What keeping one thing of each clip costs."""

    name: str
    flops: float
    disk: int  # bytes
    memory: int  # of the GPU, while its encoder works


def cached_latents(name, net, dtype, config, frames, size):
    """net: autoencoder on the meta device; config: of the transformer."""
    c = net.config
    latent = (1 + (frames - c.lead) // c.temporal_factor, *(n // c.spatial_factor for n in size))
    disk = config.in_channels * prod(latent) * dtype.itemsize
    if not hasattr(net, "encoder"):  # diffusers' own
        return Cached(f"{name} latent (its encoder is not counted)", 0.0, disk,
                      count(net.parameters()) * dtype.itemsize)
    passes = 1 if config.in_channels == config.out_channels else 2  # the condition is a clip too
    weights = count(net.encoder.parameters()) * dtype.itemsize
    need = weights + tiling.peak(net, "encoder", latent, dtype=dtype)
    return Cached(f"{name} latent", passes * encoding(net, frames, size), disk, need)


def cached_words(case):
    """Prompt states, and CLIP tokens where the transformer reads them; nothing for the
    toy."""
    config = case.config
    if case.text:  # of a folder: its encoders as they are stored, mostly in two bytes
        stored = case.text.stored_bytes()
        return [Cached("prompt", stored * WORDS, WORDS * case.text.text_dim * 2, stored)]
    if config.text_dim != 4096:
        return []
    with torch.device("meta"):
        text, clip = UMT5(), CLIPVision()
    matrices = sum(p.numel() for n, p in text.named_parameters() if "embedding" not in n)
    rows = [Cached("prompt", 2.0 * matrices * WORDS, WORDS * config.text_dim * 2,
                   2 * count(text.parameters()))]
    if config.image_dim:
        n = count(clip.parameters())
        rows.append(Cached("CLIP tokens", 2.0 * 257 * n, 257 * config.image_dim * 2, 2 * n))
    return rows


def caches(case):
    """-> [Cached], in the order in which they are filled."""
    frames = frames_alike(case.teacher.config, case.student.config, case.latent[0])
    wan = torch.float32 if hasattr(case.teacher, "conv1") or case.text else torch.bfloat16
    return [cached_latents("base", case.teacher, wan, case.base_config, frames, case.size),
            cached_latents("deep", case.student, torch.bfloat16, case.config, case.frames,
                           case.size),
            *cached_words(case)]


# ------------------------------------------------ the plan


@dataclass
class Case:
    """What is adapted to what, on which clips. Networks are on the meta device."""

    base_config: dit.Config
    teacher: object  # autoencoders
    student: object
    config: dit.Config  # of the deep transformer
    frames: int
    size: tuple
    latent: tuple  # (t, h, w) of a deep one
    build: Callable = dit.WanDiT  # Config -> transformer
    text: object = None  # text encoder, of a base that is a folder of diffusers

    @classmethod
    def of(cls, base, target, buckets, frames):
        outline = None if base.name == "toy" else base.outline()
        with torch.device("meta"):
            if base.name == "toy":
                teacher, student = (ae.DCAEV(ae.PRESETS[name]) for name in ("toy-base", "toy"))
                base_config = dit.PRESETS["toy-base"]
                size, frames = models.Model.size, models.Model.frames
            else:
                student = ae.DCAEV(ae.PRESETS[target])
                base_config, teacher = outline.net.config, outline.ae
                family = buckets or f"480F{student.config.spatial_factor}MS"
                size = captions.bucket_sizes(family)[0.5625]  # its 16:9
        deep = dit.deep_config
        more = {}
        if isinstance(base, bases.Diffusers):
            nets, deep = outline.net.nets, outline.net.nets.deep_config
            net = outline.net.outline()
            more = dict(build=lambda config: nets.inherit(net, config, share=True),
                        text=outline.text)
        config = deep(base_config, student.config)
        latent = student.latent_shape(frames, *size)
        return cls(base_config, teacher, student, config, frames, size, latent, **more)


def embedder_flops(case):
    """Stage 1a per clip: both embedders forward, and the gradient of one weight."""
    ratio = case.student.config.spatial_factor // case.teacher.config.spatial_factor
    base = 2 * prod(case.latent) * ratio**2 * case.base_config.in_channels * case.config.dim
    deep = 2 * prod(case.latent) * case.config.in_channels * case.config.dim
    return base + 2 * deep


def hours(flops):
    """On one H100."""
    return flops / (EFFICIENCY * H100) / 3600


def gib(n):
    return f"{n / 2**30:.1f}" if n else "-"


def work_table(case, settings, samples, costs, experts):
    """What is trained, and what it costs -> (table, FLOPs in all). costs: {stage:
    Step}"""
    nets = {stage: transformer(case.config, stage, settings, case.build) for stage in costs}
    sgd = settings.steps_align if settings.align == "sgd" else 0  # one solve costs nothing
    embedder = nets["1b"].embedder
    ends = count(p for p in (embedder.weight, embedder.bias) if p is not None)
    rows = [("1a", ends, 0, sgd, embedder_flops(case), "", settings.batch_align)]
    for (stage, cost), steps in zip(costs.items(), (settings.steps_head, settings.steps)):
        parameters = list(nets[stage].parameters())
        passes = f"{cost.total / cost.forward:.2f}"
        rows.append((stage, count(parameters, True), count(parameters, False), steps,
                     cost.total / settings.batch, passes, samples))
    total = 0
    table = [["stage", "trained parameters", "frozen", "steps", "TFLOP per clip",
              "in forward passes", "FLOP in all", "H100 hours"]]
    for stage, trained, frozen, steps, per_clip, passes, clips in rows:
        work = experts * per_clip * steps * clips
        total += work
        table.append([stage, f"{trained:,d}", f"{frozen:,d}", f"{steps:,d}",
                      f"{per_clip / 1e12:,.3g}", passes, f"{work:.2g}", f"{hours(work):,.1f}"])
    return table, total


def memory_table(case, settings, gpus, accumulate):
    """Every way to hold the network -> (table, {stage: Step} of the way in which
    adapt.py does it)."""
    table, costs = [], {}
    sharding = (True, False) if gpus > 1 else (False,)
    for stage, sharded, again in itertools.product(("1b", "2"), sharding, (True, False)):
        changed = replace(settings, checkpoint_blocks=again)
        parts, cost = memory(case.config, stage, changed, case.latent, gpus, sharded, accumulate,
                             case.build)
        if (sharded, again) == (gpus > 1, settings.checkpoint_blocks):
            costs[stage] = cost
        weights = "sharded" if sharded else "copied" if gpus > 1 else "whole"
        blocks = "recomputed" if again else "kept"
        table = table or [["GiB per GPU: stage, weights, blocks", *parts, "sum"]]
        table.append([f"{stage}, {weights}, {blocks}", *map(gib, parts.values()),
                      f"**{gib(sum(parts.values()))}**"])
    return table, costs


def report(base, settings, target, gpus, buckets=None, frames=80):
    """The plan in Markdown. base: a row of bases.BASES; buckets: the family of frame
    sizes, of which its 16:9 is planned; frames: of a clip."""
    case = Case.of(base, target, buckets, frames)
    accumulate = settings.accumulated(gpus)
    samples = settings.batch * accumulate * gpus
    wan = released.RELEASED.get(base.name)
    experts = 2 if wan and wan.boundary else 1

    held, costs = memory_table(case, settings, gpus, accumulate)
    work, total = work_table(case, settings, samples, costs, experts)
    kept = caches(case)
    encoded, disk = sum(c.flops for c in kept) * CLIPS, sum(c.disk for c in kept) * CLIPS
    many = f"{gpus} GPU" if gpus == 1 else f"{gpus} GPUs"
    title = f"# {base.name} to {bases.target_of(case.student.config)} on {many}"
    if experts == 2:
        title += ", two experts one after the other"
    whole = ""
    if gpus > 1:
        n = nbytes(transformer(case.config, "2", settings, case.build).parameters())
        whole = f" Before the network is cut, each GPU holds it whole: {gib(n)} GiB."
    per_clip = [f"{c.name} {c.flops / 1e12:,.4g} TFLOP and {c.disk / 1e6:,.2f} MB" for c in kept]
    encoders = [f"{c.name} {gib(c.memory)} GiB" for c in kept]
    height, width = case.size
    return f"""{title}

{case.frames} frames of {height}x{width}: {dit.tokens(case.config, case.latent):,d} tokens; \
{samples} clips per step (batch {settings.batch}, {accumulate} per step and GPU); frozen \
weights and matrix products {settings.dtype}.

{markdown(work)}

In all {total:.2g} FLOP: {hours(total):,.0f} H100 hours ({hours(total) / 24:,.1f} GPU-days) at \
{EFFICIENCY:.0%} of {H100 / 1e12:.0f} TFLOP/s, {hours(total) / gpus:,.1f} hours on {many}; \
without samples and validation.
({PAPER}.)

{markdown(held)}

adapt.py shards over all GPUs and recomputes blocks unless told --no-checkpoint-blocks. An \
H100 has 74.5 GiB, of which 2 to 4 go to CUDA, NCCL and gaps.{whole}

Caches, filled once, before the transformer is read: {', '.join(per_clip)} per clip.
{CLIPS:,d} clips: {hours(encoded):,.1f} H100 hours at the same efficiency, {disk / 1e9:,.0f} \
GB of disk. On the GPU, while each is made: {', '.join(encoders)}.{remarks(case)}"""


def remarks(case):
    """What is different in the plan of a folder of diffusers, in sentences."""
    if case.text is None:
        return ""
    said = ("\n\nFLOPs and activations are those of a Wan transformer of this width and depth; "
            "parameters are the folder's own.")
    need, free = case.text.stored_bytes(), free_memory(torch.device(options.DEVICE))
    if need > free:
        said += (f"\nThe text encoder needs {gib(need)} GiB, {gib(free)} are free here: fill the "
                 "cache on a larger machine (--stage cache --cache FOLDER) and use that folder.")
    return said
