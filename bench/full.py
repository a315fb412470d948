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
from tqdm import tqdm

import ae
import dit
import kernels
from bench import gpu, harness
from bench.gpu import BASE, DEEP, DEEPER, STEPS
from bench.harness import TYPES
from files import video
from files.checkpoint import UserError
from gpu import tiling
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
BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"
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
    measure: Callable  # (report, rounds, watch) -> None

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
    with tqdm(total=total, bar_format=BAR, leave=False) as bar:
        for row in rows:
            bar.set_description(row.name)
            rounds = row.rounds(repeats)
            row.measure(report, rounds, partial(watched, bar, row.seconds))
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report.write(headline=headline(report), peak_memory_gib=round(kib / 2**20, 1))
    show(report)


def plan(ceilings, only=PARTS, at=None, longest=LONGEST):
    """-> [Row], the quick ones first."""
    rate = {name: REACHED * ceilings[name] for name in TYPES if name in ceilings}
    widths = [width for width in gpu.WIDTHS if width in only]
    cases = [(width, size) for width in widths for size in at or sizes()]
    rows = [forward_row(*case, rate, longest) for case in cases]
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


def watched(bar, seconds, tasks):
    """The tasks of a row, of which a round takes so many seconds, with progress."""
    def watch(task):
        def call():
            task()
            bar.update(seconds / len(tasks))
        return call

    return {name: watch(task) for name, task in tasks.items()}


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
    for space in gpu.SPACES:
        c, shape = gpu.config(width, space), gpu.latent(space, size, gpu.FRAMES)
        tokens, part = dit.tokens(c, shape), tokens_at_once(c, shape, rate[low], longest)
        block = memory.flops(c, shape).total / c.layers / rate[low]
        seconds += block * part / tokens * (BLOCKS + 0.5 * (part == tokens))
        s = TYPES[low].itemsize
        kept += 4 * part * c.dim + 2 * s * tokens * c.dim  # inputs; keys and values of all
        peak = max(peak, part * ((8 + s) * c.dim + 2 * s * c.ffn_dim), 22 * part * c.dim)
        parts[space] = part
    with torch.device("meta"):
        net = dit.WanDiT(replace(c, layers=BLOCKS)).named_parameters()
    weights = sum(p.numel() * (4 if dit.keeps_fp32(name) else s) for name, p in net)
    measure = partial(measure_forwards, width, size, parts)
    return Row(f"{width} {size}", seconds, weights + kept + peak, measure)


def measure_forwards(width, size, parts, report, rounds, watch):
    """parts: {space: tokens that go through a block}."""
    low, few = low_type(), replace(gpu.config(width, BASE), layers=BLOCKS)
    base = gpu.random(lambda: dit.WanDiT(few), CPU, TYPES[low])
    forwards = {space: Forward(base, width, space, size, parts[space]) for space in parts}
    tasks = {}
    for space, forward in forwards.items():
        tasks |= {(space, name): task for name, task in forward.tasks.items()}
    found = harness.in_turns(watch(tasks), rounds - 1)
    spaces = {}
    for space, forward in forwards.items():
        spaces[space] = forward.summary({name: found[space, name] for name in forward.tasks})
    for space in spaces.values():
        reached = (space["linear_flops"] + space["attention_flops"]) / space["seconds"]
        space["share_of_ceiling"] = reached / report.ceilings[low]
    seconds = {f"{space} {low}": spaces[space]["seconds"] for space in (DEEP, BASE, DEEPER)}
    with tqdm.external_write_mode():
        report.add(f"{width} {size}", seconds, case=(width, size), rounds=rounds, spaces=spaces)


class Forward:
    """One forward in a latent space in pieces, `tasks`: the ends, on one latent frame, and
    each block, on `part` of the tokens. All weights but the ends' are those of `base`."""

    def __init__(self, base, width, space, size, part):
        self.config, self.shape = gpu.config(width, space), gpu.latent(space, size, gpu.FRAMES)
        self.tokens, self.part = dit.tokens(self.config, self.shape), part
        c, grid = self.config, [n // p for n, p in zip(self.shape, self.config.patch)]
        self.net = dit.inherit(base, replace(c, layers=BLOCKS), share=True)
        frame = torch.randn(1, c.in_channels, c.patch[0], *self.shape[1:])
        _, t, context = gpu.inputs(CPU, self.net, self.shape)
        time, prompt = self.net.times(t)[0], self.net.prompt(context).blocks
        x, dtype = torch.randn(1, part, c.dim), self.net.weight_dtype
        rope = dit.rope_table(tuple(grid), c.dim // c.heads, CPU)
        seen = random_keys(c, self.tokens, dtype)

        def ends():
            h = self.net.embed_patches(frame)
            self.net.unpatchify(self.net.head(h.flatten(1, 3), time.e), h.shape[1:4])

        def block(block, prompt, part):
            block(x[:, :part], time.e0, rope[:part], prompt, dtype)

        self.tasks, self.attention = {"ends": ends}, []
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


def measure_decoders(shapes, report, rounds, watch):
    """shapes: {decoder: latent of its tile}."""
    tasks, used = {}, decoders()
    for name, shape in shapes.items():
        space, dtype = used[name]
        net = gpu.random(partial(decoder, space), CPU, TYPES[dtype])
        if isinstance(net, ae.DCAEV):
            net.to(memory_format=torch.channels_last_3d)  # as ae.load does
        z = torch.randn(1, space.config.latent_channels, *shape).to(TYPES[dtype])
        tasks[f"{name} {dtype}"] = partial(net.decode, z)
    seconds = harness.in_turns(watch(tasks), rounds - 1)
    flops = {name: gpu.decode_flops(used[name][0], shape) for name, shape in shapes.items()}
    details = {}
    for name, shape in shapes.items():
        dtype = used[name][1]
        took = seconds[f"{name} {dtype}"]
        share = flops[name] / took / report.ceilings[dtype]
        details[name] = dict(seconds=took, latent=shape, flops=flops[name], share_of_ceiling=share)
    with tqdm.external_write_mode():
        report.add("decode", seconds, rounds=rounds, decoders=details)


# ------------------------------------------------------------------------- the headline


def headline(report):
    """A line for every width, size and space: minutes, and the base's over them."""
    rows = {tuple(row["case"]): row["spaces"] for row in report.rows.values() if "case" in row}
    lines = []
    for width in gpu.WIDTHS:
        measured = [size for size in sizes() if (width, size) in rows]
        for size in measured:
            found = {space: row["seconds"] for space, row in rows[width, size].items()}
            lines += compare(report, width, size, found)
        if measured:
            last = measured[-1]
            found = {space: grown(row, space) for space, row in rows[width, last].items()}
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
    flops, lines = {}, []
    for space in seconds:
        shape = gpu.latent(space, size, gpu.FRAMES)
        flops[space] = memory.flops(gpu.config(width, space), shape).total
    total = {space: 2 * STEPS * s for space, s in seconds.items()}
    decode = {space: decode_seconds(report, space, space, size) for space in total}
    for space in total:
        by_light = decode_seconds(report, light_name(space), space, size)
        base, deep = PUBLISHED.get((width, size), (None, None))
        line = dict(width=width, size=size, space=space, transformer_minutes=total[space] / 60)
        line |= dict(ratio=total[BASE] / total[space], law=flops[BASE] / flops[space])
        line["paper"] = base / deep if base and space == DEEP else None
        for name, own in (("decode", decode[space]), ("light_decode", by_light)):
            if own is not None and decode[BASE] is not None:
                line[f"{name}_minutes"] = own / 60
                all_base, all_own = total[BASE] + decode[BASE], total[space] + own
                line[f"ratio_with_{name}"] = all_base / all_own
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


COLUMNS = {  # of the table: its head, the key of a line, how it is written
    "transformer, min": ("transformer_minutes", ",.1f"),
    "decode, min": ("decode_minutes", ",.1f"),
    "light, min": ("light_decode_minutes", ",.1f"),
    "ratio": ("ratio", ".1f"),
    "law": ("law", ".1f"),
    "paper": ("paper", ".1f"),
    "with decode": ("ratio_with_decode", ".1f"),
    "with light": ("ratio_with_light_decode", ".1f"),
}


def show(report):
    """Print the headline as a table; plot it beside the report."""
    lines = report.found["headline"]
    if not lines:
        return print("the decoders alone make no headline: run a width too")
    print(f"\n{'':32s}" + "".join(f"{head:>18s}" for head in COLUMNS))
    for line in lines:
        cells = []
        for key, how in COLUMNS.values():
            value = line.get(key)
            cells.append(f"{'-' if value is None else format(value, how):>18s}")
        about = f"{line['width']} {line['size']} {line['space']}"
        print(f"{about:32s}" + "".join(cells) + " extrapolated" * ("extrapolated_from" in line))
    with video.figure(report.path.with_suffix(".png"), size=(9, 5.5)) as axes:
        draw(axes[0, 0], lines)


def draw(axis, lines):
    """Ratios against the pixels of a frame; hollow: extrapolated."""
    deep = [line for line in lines if line["space"] != BASE]
    curves = dict.fromkeys((line["width"], line["space"]) for line in deep)
    for number, (width, space) in enumerate(curves):
        own = [line for line in deep if (line["width"], line["space"]) == (width, space)]
        pixels = [prod(gpu.SIZES[line["size"]]) for line in own]
        colour = f"C{number}"
        axis.plot(pixels, [line["law"] for line in own], "--", color=colour, linewidth=1)
        axis.plot(pixels, [line["ratio"] for line in own], color=colour, label=f"{width}, {space}")
        for x, line in zip(pixels, own):
            filled = "none" if "extrapolated_from" in line else colour
            axis.plot(x, line["ratio"], "o", color=colour, markerfacecolor=filled)
            if "ratio_with_decode" in line:
                axis.plot(x, line["ratio_with_decode"], "v", color=colour, markersize=5)
    paper = [line for line in lines if line["paper"]]
    places = [prod(gpu.SIZES[line["size"]]) for line in paper]
    axis.plot(places, [line["paper"] for line in paper], "k*", label="paper, one H100")
    axis.set(xscale="log", yscale="log", xlabel="pixels of a frame")
    axis.set(ylabel="base's time over deep time")
    axis.set_title("o transformer, v with decode, dashed: law of operations", fontsize=9)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
