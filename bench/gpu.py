"""The suite for one GPU: the operations, steps, decodes and videos of the paper's latency
figures, in ten minutes. No GPU was at hand: no number of this suite is known yet.

* Weights are random, of the true shapes: time does not depend on what the numbers are.
* All blocks of a transformer cost the same, so a step that takes long is measured with a
  few of them and with none. Such rows say "extrapolated". A video is STEPS steps of two
  passes and a decode: always extrapolated.
* Peers run in the same process on the same tensors and in turns with ours: diffusers'
  WanTransformer3DModel, eager and with compiled blocks, and our own plain path.
* Published minutes (paper, latency on one H100, transformer only) stand in a column of
  their own and are compared with nothing: their settings are only partly known.
"""
import copy
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import ae
import dit
import kernels
import sample
from bench import harness
from bench.harness import extrapolated, in_turns, peak_bytes, plainly
from files.checkpoint import UserError
from files.options import TYPES
from gpu import choose, tiling
from gpu.choose import relative_error
from wan import memory, models, vae


@dataclass(frozen=True)
class Space:
    """A latent space: its autoencoder, and the patches of a transformer there."""

    network: type
    config: object
    patch: tuple


BASE, DEEP, DEEPER = "base f8t4c16", "DC f32t4c32", "DC f64t4c128"
SPACES = {
    BASE: Space(vae.WanVAE, vae.PRESETS["wan2.1"], (1, 2, 2)),
    DEEP: Space(ae.DCAEV, ae.PRESETS["f32t4c32"], (1, 1, 1)),
    DEEPER: Space(ae.DCAEV, ae.PRESETS["f64t4c128"], (1, 1, 1)),
}
SIZES = {
    "480p": (480, 832),
    "720p": (720, 1280),
    "1080p": (1080, 1920),
    "2160p": (2160, 3840),
}
WIDTHS = {"1.3B": "wan2.1-t2v-1.3b", "14B": "wan2.1-t2v-14b"}
BLOCKS = {"1.3B": 30, "14B": 8}  # of each width that are in memory
FRAMES, LONGER = 80, (160, 320, 640)  # the longer ones at 720p
STEPS = 50  # of a video
LONGEST_STEP, LONGEST_DECODE = 0.8, 15  # seconds; what takes longer is extrapolated
MATMUL, COPY = 8192, 2**29
PUBLISHED = {  # minutes of the 1.3B model: base, adapted
    ("480p", 80): (1.49, 0.24),
    ("720p", 80): (5.76, 0.70),
    ("1080p", 80): (25.46, 2.27),
    ("2160p", 80): (375.12, 25.41),
    ("720p", 160): (20.18, 1.99),
    ("720p", 320): (75.77, 6.03),
    ("720p", 640): (296.30, 20.86),
}


def device():
    """The GPU. UserError where there is none that multiplies bf16."""
    if not torch.cuda.is_available():
        raise UserError("--suite gpu needs a CUDA GPU, and torch finds none: use --suite cpu.")
    found = torch.device("cuda")
    if reason := choose.without_bf16(found):
        raise UserError(f"--suite gpu measures in bf16, but {reason}: use a newer GPU.")
    return found


@torch.no_grad()
def run(report):
    """The whole suite, what matters most first."""
    choices = Choices(report.device)
    report.write(choices=choices.lines)
    report.measure_ceilings(MATMUL, COPY)
    report.attempt(decode, DEEP, "720p", choices)
    for width in WIDTHS:
        blocks = random_blocks(report, width)
        for size in ("480p", "720p") if width == "1.3B" else ("720p",):
            report.attempt(peers, width, DEEP, size, blocks, choices)
        report.attempt(loop, width, DEEP, "720p", blocks, choices)
        report.attempt(operations, width)
        cases = [(space, size, FRAMES) for size in SIZES for space in SPACES]
        if width == "1.3B":
            cases += [(space, "720p", frames) for frames in LONGER for space in (DEEP, BASE)]
        cases.sort(key=lambda case: flops(width, *case).total)
        for case in cases:
            report.attempt(step, width, *case, blocks)
        del blocks
    for space, size in [(DEEPER, "720p"), (BASE, "480p"), (DEEP, "480p"),
                        (DEEP, "2160p"), (DEEPER, "2160p"), (BASE, "720p")]:
        if size in SIZES:
            report.attempt(decode, space, size, choices)
    report.attempt(decode, DEEP, "720p", choices, "plain")
    report.write(videos=videos(report))
    report.roofline()


class Choices:
    """What gpu/choose.py found best here, as sample.py asks it at the start of a run."""

    def __init__(self, device):
        self.attention, self.dtype, self.layout = None, torch.float32, torch.contiguous_format
        self.lines = [choose.choose_kernels(device)]
        if device.type == "cuda":
            self.attention, line = choose.choose_attention(device, 17600, 12)
            convolution = choose.choose_convolution(device, torch.bfloat16)
            self.dtype, self.layout = convolution.dtype, convolution.layout
            self.lines += [line, convolution.line]


# ---------------------------------------------------------------- networks of random weights


def config(width, space):
    """The published transformer of this width, with ends for the latent space."""
    c = SPACES[space].config.latent_channels
    found = dit.PRESETS[WIDTHS[width]]
    return replace(found, in_channels=c, out_channels=c, patch=SPACES[space].patch)


def latent(space, size, frames):
    """(t, h, w) of a video's latent, in whole patches."""
    return models.latent_shape(SPACES[space].config, SPACES[space].patch, frames, SIZES[size])


def flops(width, space, size, frames):
    """memory.Flops of one forward."""
    return memory.flops(config(width, space), latent(space, size, frames))


def random(build, device, dtype):
    """A network on the device with random weights that keep activations near 1; norms and
    biases as in a trained one."""
    with torch.device("meta"):
        net = build()
    net = net.cast_weights(dtype) if isinstance(net, dit.WanDiT) else net.to(dtype)
    net = net.to_empty(device=device)
    for name, p in net.named_parameters():
        if p.ndim > 1 and not name.endswith("modulation"):
            p.data.normal_(std=p[0].numel() ** -0.5)
        else:
            is_scale = "norm" in name and name.endswith("weight")
            p.data.normal_(std=0.02).add_(float(is_scale))
    return net.eval().requires_grad_(False)


def random_blocks(report, width):
    """Blocks that all networks of this width share."""
    some = replace(config(width, DEEP), layers=BLOCKS[width])
    return random(lambda: dit.WanDiT(some), report.device, torch.bfloat16).blocks


def network(report, width, space, blocks):
    ends = replace(config(width, space), layers=0)
    net = random(lambda: dit.WanDiT(ends), report.device, torch.bfloat16)
    net.blocks, net.config = blocks, replace(ends, layers=len(blocks))
    return net


def inputs(device, net, shape):
    """Latent, time, prompt states of 100 words."""
    c = net.config
    words = min(100, c.text_len - 1)
    context = torch.zeros(1, c.text_len, c.text_dim, device=device)
    context[:, :words] = torch.randn(1, words, c.text_dim, device=device)
    x = torch.randn(1, c.in_channels, *shape, device=device)
    return x, torch.tensor([500.0], device=device), context


def prepared(net, x, t, context):
    """One forward as sampling makes it: what time and prompt need is computed before."""
    return partial(net, x, net.times(t)[0], net.prompt(context))


# --------------------------------------------------------------------- parts of the suite


def operations(report, width):
    """The operations of one block at 720p. Bytes: each input read, each output written."""
    c, shape, device = config(width, DEEP), latent(DEEP, "720p", FRAMES), report.device
    l, d, hidden, heads = prod(shape), c.dim, c.ffn_dim, c.heads
    rand = partial(torch.randn, device=device)
    low = partial(torch.randn, device=device, dtype=torch.bfloat16)

    def add(name, numbers, flops, **tasks):
        seconds = in_turns({f"{who} bf16": task for who, task in tasks.items()}, 7, device)
        report.add(f"{width} {name}", seconds, flops=flops, bytes=4 * numbers)

    for name, wide, out in (("projection", d, d), ("MLP in", d, hidden), ("MLP out", hidden, d)):
        a, w, bias = low(1, l, wide), low(out, wide), low(out)
        product = partial(F.linear, a, w, bias)
        add(name, a.numel() + w.numel() + l * out, 2 * l * wide * out, ours=product)
    q, k, v = low(3, 1, l, heads, d // heads)
    attention = partial(kernels.attention, q, k, v)
    add(f"attention, {l} tokens", 4 * l * d, 4 * l * l * d, ours=attention)

    x, y, a, weight = rand(1, l, d), low(1, l, d), low(1, l, d), rand(d)
    scale, shift, gate = rand(1, 1, 3, d).unbind(2)
    rope = dit.rope_table(shape, d // heads, device)
    modulated = scale, shift, 1e-6, torch.bfloat16
    thin = {  # numbers of 2 bytes that each moves per channel and token
        "LayerNorm, modulate": (partial(kernels.layer_norm_modulate, x, *modulated), 3),
        "residual + gate": (partial(kernels.gate_residual, x, y, gate), 5),
        "residual, LayerNorm": (partial(kernels.residual_norm, x, y, gate, *modulated), 6),
        "RMSNorm, rotate": (partial(kernels.rms_norm_rope, a, weight, rope, heads, 1e-6), 2),
    }
    for name, (task, numbers) in thin.items():
        add(name, numbers * l * d, 8 * l * d, ours=task, plain=plainly(task))


def step(report, width, space, size, frames, blocks):
    """One forward: with all blocks, or extrapolated from as many as are quick enough."""
    full, shape = config(width, space), latent(space, size, frames)
    cost = flops(width, space, size, frames)
    expected = cost.total / (0.4 * report.ceilings["bf16"])  # at 40 % of the product's rate
    quick = int(full.layers * LONGEST_STEP / expected)
    count = min(len(blocks), max(1, quick))
    net = network(report, width, space, blocks[:count])
    given = inputs(report.device, net, shape)
    task = prepared(net, *given)
    peak = peak_bytes(task, report.device)
    seconds, note = in_turns({"some": task}, 5, report.device, patience=5)["some"], ""
    if count < full.layers:
        net.blocks = net.blocks[:0]
        ends = in_turns({"ends": prepared(net, *given)}, 5, report.device)["ends"]
        seconds = extrapolated(ends, seconds, count, full.layers)
        note = f"extrapolated from {count} of {full.layers} blocks"
    report.add(
        f"step: {width} {space}, {frames} frames {size}",
        {"ours bf16": seconds},
        flops=cost.total, attention_share=cost.attention / cost.total,
        tokens=dit.tokens(full, shape), blocks=count, peak_bytes=peak, note=note,
        case=(width, space, size, frames),
    )


def peers(report, width, space, size, blocks, choices):
    """One forward by everybody, on the same weights and inputs."""
    net, on_gpu = network(report, width, space, blocks), report.device.type == "cuda"
    shape = latent(space, size, FRAMES)
    x, t, context = given = inputs(report.device, net, shape)
    tasks = {"ours bf16": prepared(net, *given), "plain bf16": plainly(partial(net, *given))}
    if on_gpu:
        moment, prompt = net.times(t)[0], net.prompt(context)
        graph = kernels.Replay(lambda x, *time: net(x, dit.Time(*time), prompt))
        tasks["graph bf16"] = lambda: graph(x, *moment)
        compiled = network(report, width, space, copy.deepcopy(blocks))
        compiled.load_state_dict(net.state_dict())
        choose.compile_blocks(compiled)
        tasks["compiled bf16"] = prepared(compiled, *given)
    name = f"peers: {width} {space} {size}, {len(blocks)} blocks"
    try:
        low = dict(hidden_states=x.bfloat16(), encoder_hidden_states=context.bfloat16())
        for who in ("diffusers bf16", "diffusers, compiled blocks bf16")[: 1 + on_gpu]:
            peer = harness.diffusers_twin(net)
            if "compiled" in who:
                peer.compile_repeated_blocks(fullgraph=True, dynamic=False)
            call = partial(peer, timestep=t, return_dict=False, **low)
            tasks[who] = as_its_users_do(lambda call=call: call()[0], choices)
    except ImportError:
        report.leave_out(f"{name}: diffusers", "not installed (requirements-dev.txt)")
    exact = tasks["ours bf16"]()
    errors = {who: relative_error(task(), exact) for who, task in tasks.items()}
    seconds = in_turns(tasks, 5, report.device, patience=20)
    work = memory.flops(net.config, shape).total
    report.add(name, seconds, flops=work, relative_error=errors)


def as_its_users_do(task, choices):
    """The call with the attention that the library chooses, in place of ours."""
    if choices.attention is None:
        return task

    def run():
        choose.set_attention(None)
        try:
            return task()
        finally:
            choose.set_attention(choices.attention)

    return run


def loop(report, width, space, size, blocks, choices, steps=6):
    """`sample.generate` itself for a few steps: solver, both passes, the CUDA graph."""
    net = network(report, width, space, blocks)
    autoencoder = random(partial(SPACES[space].network, SPACES[space].config),
                         report.device, choices.dtype)
    model = models.Model(width, net, autoencoder, text=None, device=report.device)
    context = inputs(report.device, net, latent(space, size, FRAMES))[2]
    settings = dict(frames=FRAMES, size=SIZES[size], steps=steps, guidance=5.0, shift=5.0)
    task = partial(sample.generate, model, context, null=-context, **settings)
    peak = peak_bytes(task, report.device)
    seconds = in_turns({"ours bf16": task}, 3, report.device, patience=20)
    name = f"loop: {width} {space} {size}, {len(blocks)} blocks, {steps} guided steps"
    report.add(name, seconds, peak_bytes=peak)


@lru_cache
def counted(space, chunks, cells):
    """FLOPs of decoding a latent of 1 x `cells` cells, counted on the meta device."""
    c = space.config
    with torch.device("meta"), torch.no_grad():
        z = torch.empty(1, c.latent_channels, chunks * c.latent_chunk, 1, cells)
        with FlopCounterMode(display=False) as counter:
            for _ in space.network(c).decode_stream([z]):
                pass
    return counter.get_total_flops()


def decode_flops(space, shape):
    """FLOPs of decoding a latent (t, h, w) of a Space. Convolutions go as the cells, the
    attention of the Wan autoencoder as their square, and chunks after the first are all
    alike: four small ones are counted."""
    n, chunks = prod(shape[1:]), ceil(shape[0] / space.config.latent_chunk)

    def frame(chunks):
        one, two = counted(space, chunks, 1), counted(space, chunks, 2)
        square = (two - 2 * one) / 2
        return (one - square) * n + square * n**2

    first, both = frame(1), frame(2)
    return first + (chunks - 1) * (both - first)


def decode(report, space, size, choices, who="ours"):
    """A whole video, in tiles as large as fit; extrapolated from its first chunks where
    it would take long."""
    low = "fp32" if space == BASE or choices.dtype == torch.float32 else "bf16"
    c, shape = SPACES[space].config, latent(space, size, FRAMES)
    net = random(partial(SPACES[space].network, c), report.device, TYPES[low])
    if who == "ours":
        net.to(memory_format=choices.layout)
    chunks = ceil(shape[0] / c.latent_chunk)
    work = decode_flops(SPACES[space], shape)
    expected = work / (0.3 * report.ceilings[low])
    part = min(chunks, max(1, int(chunks * LONGEST_DECODE / expected)))
    frames = min(part * c.latent_chunk, shape[0])
    covered = (part * c.latent_chunk, *shape[1:])
    budget = 0.9 * memory.free_memory(report.device)
    tile = tiling.choose(net, covered, budget, TYPES[low])
    z = torch.randn(1, c.latent_channels, frames, *shape[1:], device=report.device).to(TYPES[low])

    def task():
        for _ in tiling.decode_stream(net, z, tile):
            pass

    task = plainly(task) if who == "plain" else task
    peak = peak_bytes(task, report.device)
    seconds = in_turns({"": task}, 3, report.device, patience=10)[""] * shape[0] / frames
    note = f"extrapolated from {part} of {chunks} chunks" if part < chunks else ""
    name = f"decode: {space}, {FRAMES} frames {size}" + ", plain" * (who == "plain")
    more = dict(tile=tile, peak_bytes=peak, note=note)
    if who == "ours":
        more["case"] = None, space, size, FRAMES
    report.add(name, {f"{who} {low}": seconds}, flops=work, **more)


def videos(report):
    """Whole videos out of the rows measured: STEPS steps of two passes, and the decode."""
    took, found = {}, {}
    for row in report.rows.values():
        if "case" in row:
            (took[row["case"]],) = row["seconds"].values()
    for (width, space, size, frames), seconds in took.items():
        if width is None:  # a decode
            continue
        known = width == "1.3B" and space != DEEPER
        published = PUBLISHED.get((size, frames)) if known else None
        found[f"{width} {space}, {frames} frames {size}"] = dict(
            transformer_minutes=2 * STEPS * seconds / 60,
            decode_seconds=took.get((None, space, size, frames)),
            published_transformer_minutes=published and published[space != BASE],
        )
    return found
