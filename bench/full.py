"""The headline at its real widths, on a processor: 50 guided steps and the decode of 80
frames, by the base and in both deep latent spaces, from minutes of measuring.

    python -m bench --suite full                             all of it
    python -m bench --suite full --size 480p --only 1.3B     a part, put beside what is there

* All blocks of a transformer cost the same: BLOCKS of them run, on random weights, each
  timed by itself (`alike`: the slowest over the quickest), times the number of blocks.
* A block costs by the token: matrix products with it, and its look at all tokens. Where a
  block would take longer than --seconds, only as many tokens as fit go through it, look at
  keys and values of all (`Slice`), and the time is multiplied. Blocks that run whole also
  run with half the tokens; `half` is what that would have made of their time, over it.
* A decoder runs on one tile, times FLOPs of the video over FLOPs of the tile, counted.
  What tiles of a video compute twice at their borders is left out.
* 2160p is not run: the time at the largest size, grown as the tokens, that of attention
  as their square.
* bf16 where the processor multiplies it, else fp32; the Wan autoencoder always in fp32, as
  the released programs have it. Everybody takes turns; seconds are of the processor.

Beside the ratios stand the paper's (one H100, transformer alone) and the law of
operations: FLOPs of the base's transformer over FLOPs of the deep one's.
"""
import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, prod

import torch
from torch import nn

import ae
import dit
import kernels
from bench import gpu, harness
from bench.gpu import BASE, DEEP, DEEPER, STEPS
from files import video
from files.checkpoint import UserError
from files.options import TYPES
from gpu import tiling
from training.metrics import markdown
from wan import light, memory

CPU = torch.device("cpu")
BLOCKS = 2  # of each transformer
LONGEST, SHORTEST = 20, 1024  # seconds of a block; tokens it takes at least
PATIENCE = 120  # seconds that all rounds of a row take; two are made in any case
TILES = (256, 128, 64)  # pixels a side: the largest that takes no longer than three blocks
TILE_FRAMES = 5  # latent frames, where chunks are shorter
FURTHER = "2160p"  # extrapolated
REACHED = 0.8  # of a large product's rate: what the plan expects
MATMUL, COPY = 2048, 2**25
PARTS = (*gpu.WIDTHS, "decode")
PUBLISHED = {("14B", "720p"): (27.52, 3.58)}  # minutes of base and adapted (paper, VBench)
PUBLISHED |= {("1.3B", size): gpu.PUBLISHED[size, 80] for size in gpu.SIZES}


def sizes():
    """Those that are measured."""
    return [size for size in gpu.SIZES if size != FURTHER]


def low_type():
    """The type in which the transformers and DC-AE-V are multiplied here."""
    return "bf16" if kernels.bf16_units() else "fp32"


@dataclass(frozen=True)
class Row:
    """A row of the report, before it is measured."""

    name: str
    seconds: float  # expected of the processor, for a round
    bytes: float  # of memory
    measure: Callable  # (report, rounds) -> None

    def rounds(self, repeats):
        return min(repeats + 1, max(2, round(PATIENCE / self.seconds)))


@torch.inference_mode()
def run(report, repeats, only=PARTS, at=None, longest=LONGEST):
    """The parts `only` at the sizes `at` (default: all), a block of a transformer taking
    no longer than `longest` seconds. Rows that the report has are left as they are.
    UserError where memory is too small."""
    threads = torch.get_num_threads()
    report.measure_ceilings(MATMUL, COPY)
    rows = [row for row in plan(report.ceilings, only, at, longest) if row.name not in report.rows]
    check_memory(rows)
    total = sum(row.seconds * row.rounds(repeats) for row in rows)
    why = "" if low_type() == "bf16" else ", as this processor does not multiply bf16"
    print(f"{low_type()}{why}; about {ceil(total / 60 / threads)} minutes")
    for row in rows:
        print(f"{row.name} ...", flush=True)
        row.measure(report, row.rounds(repeats))
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report.write(headline=headline(report), peak_memory_gib=round(kib / 2**20, 1))
    show(report)


def plan(ceilings, only=PARTS, at=None, longest=LONGEST):
    """-> [Row], the quick ones first."""
    rate, rows = {name: REACHED * ceiling for name, ceiling in ceilings.items()}, []
    for width in gpu.WIDTHS:
        for size in at or sizes():
            if width in only:
                rows.append(forward_row(width, size, rate, longest))
    if "decode" in only:
        rows.append(decode_row(rate, 3 * longest))
    return sorted(rows, key=lambda row: row.seconds)


def check_memory(rows):
    free = memory.free_memory(CPU)
    for row in rows:
        if row.bytes > 0.9 * free:
            raise UserError(f"the row {row.name} needs about {row.bytes / 2**30:.1f} GiB, but "
                            f"{free / 2**30:.1f} GiB are free: choose other rows with --only and "
                            "--size, or make room.")


# -------------------------------------------------------------------------- a transformer


class Slice(nn.Module):
    """Self-attention of a block for some tokens of a video, which look at the `keys` and
    `values` of all [b m n c]; None: they are all. `times`: seconds of the softmax
    attention in each call, the part that is quadratic in the tokens."""

    def __init__(self, layer, keys=None, values=None):
        super().__init__()
        self.layer, self.keys, self.values, self.times = layer, keys, values, []

    def forward(self, x, rope):
        a = self.layer
        q = kernels.rms_norm_rope(a.q(x), a.norm_q.weight, rope, a.heads, a.eps)
        k = kernels.rms_norm_rope(a.k(x), a.norm_k.weight, rope, a.heads, a.eps)
        v = a.split(a.v(x))
        if self.keys is not None:
            k, v = self.keys, self.values
        start = harness.now(CPU)
        y = kernels.attention(q, k, v)
        self.times.append(harness.now(CPU) - start)
        return a.o(y.flatten(2))


def random_keys(config, tokens, dtype):
    """Keys and values of all tokens. Every head gets the same numbers, quickly made, in
    memory of its own."""
    width = config.dim // config.heads
    numbers = torch.randn(2, 1, tokens, 1, width, dtype=dtype)
    return numbers.expand(-1, -1, -1, config.heads, -1).contiguous()


def tokens_at_once(config, shape, rate, longest):
    """How many go through a block: all, or as many as so many seconds allow."""
    tokens = dit.tokens(config, shape)
    block = memory.flops(config, shape).total / config.layers
    possible = int(tokens * longest * rate / block) // 256 * 256
    return min(tokens, max(possible, SHORTEST))


def forward_row(width, size, rate, longest):
    """One forward of a transformer of this width, in every space."""
    seconds = kept = peak = 0
    low, parts = low_type(), {}
    s = TYPES[low].itemsize
    for space in gpu.SPACES:
        c, shape = gpu.config(width, space), gpu.latent(space, size, gpu.FRAMES)
        tokens, part = dit.tokens(c, shape), tokens_at_once(c, shape, rate[low], longest)
        block = memory.flops(c, shape).total / c.layers / rate[low]
        seconds += block * part / tokens * (BLOCKS + 0.5 * (part == tokens))
        kept += 4 * part * c.dim + 2 * s * tokens * c.dim  # inputs; keys and values of all
        peak = max(peak, memory.block_bytes(c, part, s))
        parts[space] = part
    weights = sum(memory.parameter_bytes(replace(c, layers=BLOCKS), TYPES[low]).values())
    measure = partial(measure_forwards, width, size, parts)
    return Row(f"{width} {size}", seconds, weights + kept + peak, measure)


def measure_forwards(width, size, parts, report, rounds):
    """parts: {space: tokens that go through a block}."""
    low, few = low_type(), replace(gpu.config(width, BASE), layers=BLOCKS)
    base = gpu.random(lambda: dit.WanDiT(few), CPU, TYPES[low])
    forwards, tasks, spaces = {}, {}, {}
    for space, part in parts.items():
        forwards[space] = Forward(base, width, space, size, part)
        for name, task in forwards[space].tasks.items():
            tasks[space, name] = task
    found = harness.in_turns(tasks, rounds - 1)
    for space, forward in forwards.items():
        row = forward.summary({name: found[space, name] for name in forward.tasks})
        reached = (row["linear_flops"] + row["attention_flops"]) / row["seconds"]
        spaces[space] = row | dict(share_of_ceiling=reached / report.ceilings[low])
    seconds = {f"{space} {low}": spaces[space]["seconds"] for space in (DEEP, BASE, DEEPER)}
    report.add(f"{width} {size}", seconds, rounds=rounds, spaces=spaces)


class Forward:
    """One forward in a latent space in pieces, `tasks`: the ends, on one latent frame, and
    each block, on `part` of the tokens. All weights but the ends' are those of `base`."""

    def __init__(self, base, width, space, size, part):
        self.config, self.shape = gpu.config(width, space), gpu.latent(space, size, gpu.FRAMES)
        self.tokens, self.part = dit.tokens(self.config, self.shape), part
        c = self.config
        net = self.net = dit.inherit(base, replace(c, layers=BLOCKS), share=True)
        frame = torch.randn(1, c.in_channels, c.patch[0], *self.shape[1:])
        _, t, context = gpu.inputs(CPU, self.net, self.shape)
        time, prompt = self.net.times(t)[0], self.net.prompt(context).blocks
        x, dtype = torch.randn(1, part, c.dim), self.net.weight_dtype
        grid = tuple(n // p for n, p in zip(self.shape, c.patch))
        rope = dit.rope_table(grid, c.dim // c.heads, CPU)
        seen = random_keys(c, self.tokens, dtype)

        def ends():  # without `self`: a cycle would keep a row's memory into the next ones
            h = net.embed_patches(frame)
            net.unpatchify(net.head(h.flatten(1, 3), time.e), h.shape[1:4])

        def block(block, prompt, part):
            block(x[:, :part], time.e0, rope[:part], prompt, dtype)

        self.tasks = {"ends": ends}
        for i, own in enumerate(self.net.blocks):
            own.self_attn = Slice(own.self_attn, *(() if part == self.tokens else seen))
            self.tasks[f"block {i}"] = partial(block, own, prompt[i], part)
        if 1 < part == self.tokens:
            own = dit.inherit(base, self.net.config, share=True).blocks[0]
            own.self_attn = Slice(own.self_attn, *seen)
            self.tasks["half"] = partial(block, own, prompt[0], part // 2)

    def summary(self, seconds):
        """Median seconds of each task -> those of one forward, and how they came about."""
        c, more = self.config, self.tokens / self.part
        blocks = [more * seconds[f"block {i}"] for i in range(BLOCKS)]
        mean, alike = statistics.mean(blocks), max(blocks) / min(blocks)
        times = [block.self_attn.times for block in self.net.blocks]
        attention = more * statistics.mean(statistics.median(t[1:] or t) for t in times)
        ends = seconds["ends"] * self.shape[0] / c.patch[0]
        flops = memory.flops(c, self.shape)
        found = dict(seconds=ends + c.layers * mean, attention_seconds=c.layers * attention,
                     tokens=self.tokens, tokens_run=self.part, blocks=blocks, alike=alike,
                     linear_flops=flops.linear, attention_flops=flops.attention)
        if "half" in seconds:
            found["half"] = seconds["half"] * self.tokens / (self.part // 2) / mean
        return found


# ------------------------------------------------------------------------------ decoders


def decoders():
    """{name: (Space, type)}: of every space, and the light one where there is one."""
    found = {}
    for name, space in gpu.SPACES.items():
        found[name] = space, "fp32" if name == BASE else low_type()
        preset = f"{name.split()[-1]}-light"
        if preset in light.PRESETS:
            config = light.configure(space.config, preset)
            found[light_name(name)] = replace(space, config=config), low_type()
    return found


def light_name(space):
    return f"{space} light"


def decoder(space):
    """An autoencoder without its encoder."""
    net = space.network(space.config)
    net.encoder = None
    return net


def tile_shape(space, rate, longest):
    """(t, h, w) of the largest tile's latent that is quick enough, or of the smallest."""
    c = space.config
    frames = max(TILE_FRAMES // c.latent_chunk, 1) * c.latent_chunk
    for side in TILES:
        cells = max(side // c.spatial_factor, 1)
        shape = frames, cells, cells
        if gpu.decode_flops(space, shape) / rate <= longest:
            break
    return shape


def decode_row(rate, longest):
    """All decoders, on a tile each."""
    seconds = weights = peak = 0
    shapes = {}
    for name, (space, dtype) in decoders().items():
        shape = shapes[name] = tile_shape(space, rate[dtype], longest)
        seconds += gpu.decode_flops(space, shape) / rate[dtype]
        with torch.device("meta"):
            net = space.network(space.config)
        weights += sum(p.numel() for p in net.decoder.parameters()) * TYPES[dtype].itemsize
        peak = max(peak, tiling.peak(net, "decoder", shape, dtype=TYPES[dtype]))
    return Row("decode", seconds, weights + peak, partial(measure_decoders, shapes))


def measure_decoders(shapes, report, rounds):
    """shapes: {decoder: latent of its tile}."""
    tasks, used = {}, decoders()
    for name, shape in shapes.items():
        space, dtype = used[name]
        net = gpu.random(partial(decoder, space), CPU, TYPES[dtype])
        if isinstance(net, ae.DCAEV):
            net.to(memory_format=torch.channels_last_3d)  # as ae.load does
        z = torch.randn(1, space.config.latent_channels, *shape).to(TYPES[dtype])
        tasks[f"{name} {dtype}"] = partial(net.decode, z)
    seconds, details = harness.in_turns(tasks, rounds - 1), {}
    for name, shape in shapes.items():
        space, dtype = used[name]
        took, flops = seconds[f"{name} {dtype}"], gpu.decode_flops(space, shape)
        share = flops / took / report.ceilings[dtype]
        details[name] = dict(seconds=took, latent=shape, flops=flops, share_of_ceiling=share)
    report.add("decode", seconds, rounds=rounds, decoders=details)


# ------------------------------------------------------------------------- the headline


def headline(report):
    """A line for every width, size and space: minutes, and the base's over them."""
    lines = []
    for width in gpu.WIDTHS:
        last = None
        for size in sizes():
            if f"{width} {size}" in report.rows:
                last, spaces = size, report.rows[f"{width} {size}"]["spaces"]
                found = {space: row["seconds"] for space, row in spaces.items()}
                lines += compare(report, width, size, found)
        if last:
            found = {space: grown(row, space) for space, row in spaces.items()}
            lines += compare(report, width, FURTHER, found, extrapolated_from=last)
    return lines


def grown(row, space):
    """Seconds of a forward of size FURTHER from a row of the report."""
    c = gpu.config(next(iter(gpu.WIDTHS)), space)
    more = dit.tokens(c, gpu.latent(space, FURTHER, gpu.FRAMES)) / row["tokens"]
    attention = row["attention_seconds"]
    return more * (row["seconds"] - attention) + more**2 * attention


def compare(report, width, size, seconds, **more):
    """{space: seconds of a forward} -> lines of the headline."""
    lines, base = [], 2 * STEPS * seconds[BASE]
    law = gpu.flops(width, BASE, size, gpu.FRAMES).total
    published = PUBLISHED.get((width, size))
    base_decode = decode_seconds(report, BASE, BASE, size)
    for space in seconds:
        own = 2 * STEPS * seconds[space]
        line = dict(width=width, size=size, space=space, transformer_minutes=own / 60)
        line["ratio"] = base / own
        line["law"] = law / gpu.flops(width, space, size, gpu.FRAMES).total
        line["paper"] = published[0] / published[1] if published and space == DEEP else None
        for name, decoder in (("decode", space), ("light_decode", light_name(space))):
            decode = decode_seconds(report, decoder, space, size)
            if decode is not None and base_decode is not None:
                line[f"{name}_minutes"] = decode / 60
                line[f"ratio_with_{name}"] = (base + base_decode) / (own + decode)
        lines.append(line | more)
    return lines


def decode_seconds(report, name, space, size):
    """Of a whole video, by the decoder `name`; None where it was not measured."""
    tile = report.rows.get("decode", {}).get("decoders", {}).get(name)
    if tile is None:
        return None
    used = decoders()[name][0]
    whole = gpu.decode_flops(used, gpu.latent(space, size, gpu.FRAMES))
    return tile["seconds"] * whole / tile["flops"]


COLUMNS = {  # of the table: its head, the key of a line
    "transformer, min": "transformer_minutes",
    "decode, min": "decode_minutes",
    "light, min": "light_decode_minutes",
    "ratio": "ratio",
    "law": "law",
    "paper": "paper",
    "with decode": "ratio_with_decode",
    "with light": "ratio_with_light_decode",
}


def show(report):
    """Print the headline as a table; plot it beside the report."""
    lines = report.found["headline"]
    if not lines:
        return print("the decoders alone make no headline: run a width too")
    rows = [["", *COLUMNS]]
    for line in lines:
        row = [f"{line['width']} {line['size']} {line['space']}"]
        row[0] += ", extrapolated" * ("extrapolated_from" in line)
        for key in COLUMNS.values():
            value = line.get(key)
            row.append("-" if value is None else f"{value:,.1f}")
        rows.append(row)
    print(f"\n{markdown(rows)}")
    with video.figure(report.path.with_suffix(".png"), size=(9, 5.5)) as axes:
        draw(axes[0, 0], lines)


def draw(axis, lines):
    """Ratios against the pixels of a frame; hollow: extrapolated."""
    curves = {}
    for line in lines:
        if line["space"] != BASE:
            curves.setdefault(f"{line['width']}, {line['space']}", []).append(line)
    for number, (label, own) in enumerate(curves.items()):
        colour, pixels = f"C{number}", [prod(gpu.SIZES[line["size"]]) for line in own]
        axis.plot(pixels, [line["law"] for line in own], "--", color=colour, linewidth=1)
        axis.plot(pixels, [line["ratio"] for line in own], color=colour, label=label)
        for x, line in zip(pixels, own):
            filled = "none" if "extrapolated_from" in line else colour
            axis.plot(x, line["ratio"], "o", color=colour, markerfacecolor=filled)
            if "ratio_with_decode" in line:
                axis.plot(x, line["ratio_with_decode"], "v", color=colour, markersize=5)
            if line["paper"]:
                axis.plot(x, line["paper"], "k*")
    axis.plot([], [], "k*", label="paper, one H100")
    axis.set(xscale="log", yscale="log", xlabel="pixels of a frame")
    axis.set(ylabel="base's time over deep time")
    axis.set_title("o transformer, v with decode, dashed: law of operations", fontsize=9)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
