"""The GPU suite of bench/__main__.py: every operation, step, decode and video of the paper's latency figures, on one GPU in ten minutes.

    python -m bench --suite gpu              -> results/bench_gpu.json and results/bench_gpu.png (roofline)
    python -m bench --suite gpu --dry-run    the same code on the CPU with tiny shapes (a few seconds), so that it cannot rot unnoticed; its
                                             numbers mean nothing

How the numbers come about:

* **Ceilings first**, in the same run: a large bf16 matrix product (FLOP/s) and a large copy (bytes/s, read and write). Everything else
  is given as a share of them too.
* **Random weights** of the true shapes: time does not depend on what the numbers are, as long as they are no zeros.
* **Few blocks where all would take long.** All blocks of a transformer cost the same, so a step of n blocks is measured with k and
  with none, and `seconds` = t(0) + n/k (t(k) - t(0)). Such rows say "extrapolated". A video is `STEPS` steps of two passes and a decode: always
  extrapolated, except for the rows that say how many steps they ran.
* **Peers** in the same process on the same tensors: diffusers' WanTransformer3DModel eager and with compiled blocks, and our own plain path.
* **Published** figures (spec ae-adapt-v 9.3, one H100, transformer only) stand in a column of their own and are compared with nothing automatically: their
  settings are only partly known.
* The file is written after every row, the important ones first; a run that is cut off, or runs out of its time, keeps what it has. What
  was left out is listed with the reason.

No GPU was at hand when this was written: no number of this suite is known yet.
"""
import dataclasses
import gc
import statistics
import time
from functools import lru_cache, partial, wraps
from math import prod

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import ae
import dit
import guided
import kernels
import sample
from files import checkpoint
from gpu import choose, tiling
from wan import models, vae

STEPS = 50  # of a video, with two passes each
SIZES = {"480p": (480, 832), "720p": (720, 1280), "1080p": (1080, 1920), "2160p": (2160, 3840)}
PUBLISHED = {  # minutes: (base, adapted) of the 1.3B model, by (size, frames)
    ("480p", 80): (1.49, 0.24), ("720p", 80): (5.76, 0.70), ("1080p", 80): (25.46, 2.27), ("2160p", 80): (375.12, 25.41),
    ("720p", 160): (20.18, 1.99), ("720p", 320): (75.77, 6.03), ("720p", 640): (296.30, 20.86)}
BYTES = {torch.float32: 4, torch.bfloat16: 2}


@dataclasses.dataclass(frozen=True)
class Space:
    """A latent space: its autoencoder's factors, and the ends that the transformer has for it."""

    factor: int
    channels: int
    patch: tuple
    lead: int  # pixel frames of the first latent frame

    def grid(self, frames, size):
        """Latent (t, h, w) that covers a video, whole patches."""
        up = lambda n, cell: -(-n // cell)
        return (1 + up(max(frames - self.lead, 0), 4), *(up(n, self.factor * p) * p for n, p in zip(size, self.patch[1:])))


SPACES = {"base f8t4c16": Space(8, 16, (1, 2, 2), 1), "DC f32t4c32": Space(32, 32, (1, 1, 1), 4), "DC f64t4c128": Space(64, 128, (1, 1, 1), 4)}


@dataclasses.dataclass(frozen=True)
class Scale:
    """What differs between the real suite and the dry run."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    widths: tuple = (("1.3B", "wan2.1-t2v-1.3b", 30), ("14B", "wan2.1-t2v-14b", 8))  # name, preset, blocks at hand
    sizes: tuple = tuple(SIZES.items())
    frames: int = 80
    longer: tuple = (160, 320, 640)  # at 720p
    repeats: int = 7
    matmul: int = 8192
    copy: int = 2**30  # numbers
    limit: float = 0.8  # seconds that one forward may take before blocks are left out
    compiler: str = "inductor"

    def config(self, width, space):
        c = dit.PRESETS[next(preset for name, preset, _ in self.widths if name == width)]
        if self.device.type == "cpu":  # a thousandth of everything
            c = dataclasses.replace(c, dim=48, heads=2, ffn_dim=96, layers=4, text_dim=32, text_len=16)
        s = SPACES[space]
        return dataclasses.replace(c, in_channels=s.channels, out_channels=s.channels, patch=s.patch)

    def autoencoder(self, space):
        tiny = self.device.type == "cpu"
        if space.startswith("base"):
            c = vae.PRESETS["wan2.1"]
            return vae.WanVAE(dataclasses.replace(c, width=8, decoder_width=8) if tiny else c)
        c = ae.PRESETS[space.split()[1]]
        return ae.DCAEV(dataclasses.replace(c, widths=(8,) * len(c.widths), depths=(0, *(1,) * (len(c.widths) - 1)), chunk=4) if tiny else c)


def dry(device):
    """The suite at a size that a laptop walks through in seconds."""
    return Scale(device, torch.float32, widths=(("1.3B", "wan2.1-t2v-1.3b", 4),), sizes=(("480p", (32, 64)), ("720p", (64, 64))), frames=4, longer=(8,),
                 repeats=1, matmul=128, copy=2**16, limit=1e-3, compiler="eager")


# ---------------------------------------------------------------------------------------------------- clock, rows, time left


class Suite:
    """Rows measured so far, the file they are kept in, and the time that is left."""

    def __init__(self, scale, out, budget):
        self.scale, self.out, self.end = scale, out, time.perf_counter() + budget
        self.report = dict(**checkpoint.provenance(), suite="gpu", steps=STEPS, dry_run=scale.device.type == "cpu", rows=[], left_out=[])
        self.ceiling = dict(flops=None, bytes=None)
        self.attention = self.convolution = None  # what gpu/choose.py chose

    def attend(self, name):
        """Let attention run through a backend of gpu/choose.py; None: as the library chooses."""
        if self.scale.device.type == "cuda":
            choose.set_attention(name)

    def left(self):
        return self.end - time.perf_counter()

    def add(self, part, name, **row):
        """Keep a row and write the file. With `flops` or `bytes` beside `seconds`: also rates and shares of the ceilings."""
        for what, unit in (("flops", "tflops_per_second"), ("bytes", "tbytes_per_second")):
            if row.get(what) and row.get("seconds"):
                row[unit] = row[what] / row["seconds"] / 1e12
                if self.ceiling[what]:
                    row[f"share_of_{'matmul' if what == 'flops' else 'copy'}"] = row[what] / row["seconds"] / self.ceiling[what]
        self.report["rows"].append(dict(part=part, name=name, **row))
        checkpoint.write_json(self.out, self.report)
        shown = [f"{row['seconds'] * 1e3:12.2f} ms" if row.get("seconds") else " " * 15]
        shown += [f"{row[k]:8.2f} {u}" for k, u in (("tflops_per_second", "TFLOP/s"), ("tbytes_per_second", "TB/s"), ("peak_gib", "GiB")) if k in row]
        shown += [f"{row[k]:5.0%} of {u}" for k, u in (("share_of_matmul", "matmul"), ("share_of_copy", "copy")) if k in row]
        print(f"{part:10s} {name:58s}" + "  ".join(shown) + ("  " + row["note"] if row.get("note") else ""), flush=True)

    def leave_out(self, part, name, reason):
        self.report["left_out"].append(dict(part=part, name=name, reason=reason))
        checkpoint.write_json(self.out, self.report)
        print(f"{part:10s} {name:58s} left out: {reason}", flush=True)

    def clock(self, task, expected=0.0):
        """Seconds of a call: the median of up to 7 after a warm-up, of fewer where it takes long; no warm-up where 2 s are expected."""
        times = []
        if expected < 2 and self.scale.repeats > 1:
            task()
        while not times or (len(times) < self.scale.repeats and sum(times) < 1):
            synchronize(self.scale.device)
            started = time.perf_counter()
            task()
            synchronize(self.scale.device)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def peak(self, task):
        """GiB that `task` allocates at most, beyond what was there (weights) -> dict for a row; empty on the CPU."""
        if self.scale.device.type != "cuda":
            task()
            return {}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task()
        torch.cuda.synchronize()
        return dict(peak_gib=(torch.cuda.max_memory_allocated() - before) / 2**30)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def tidy():
    """Give memory back between parts."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def each(function):
    """A part of the suite: what goes wrong in it, such as too little memory, is noted and the rest goes on."""
    @wraps(function)
    def run(suite, *args):
        name = " ".join([function.__name__.replace("_", " "), *(str(a) for a in args if isinstance(a, (str, int)))])
        try:
            if suite.left() <= 0:
                suite.leave_out(function.__name__, name, "out of time")
            else:
                return function(suite, *args)
        except Exception as e:  # out of memory, a peer of another version, ...: the other parts are worth measuring all the same
            suite.leave_out(function.__name__, name, f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}")
        finally:
            kernels.use()
            tidy()
    return run


def rand(*shape, scale, dtype=None):
    return torch.randn(*shape, device=scale.device, dtype=dtype or scale.dtype)


# ---------------------------------------------------------------------------------------------------- ceilings and single operations


@each
def ceilings(suite):
    s = suite.scale
    a, b = rand(s.matmul, s.matmul, scale=s), rand(s.matmul, s.matmul, scale=s)
    seconds = suite.clock(lambda: a @ b)
    suite.ceiling["flops"] = 2 * s.matmul**3 / seconds
    suite.add("ceiling", f"matrix product {s.matmul} x {s.matmul} x {s.matmul}", seconds=seconds, flops=2 * s.matmul**3)
    x = rand(s.copy, scale=s)
    y = torch.empty_like(x)
    seconds = suite.clock(lambda: y.copy_(x))
    suite.ceiling["bytes"] = 2 * x.nbytes / seconds
    suite.add("ceiling", f"copy of {x.nbytes / 2**30:.2g} GiB", seconds=seconds, bytes=2 * x.nbytes)


@each
def operations(suite, width):
    """The operations of one block at 720p: matrix products and attention with their FLOPs; thin ones, fused and plain, with the bytes
    that one pass must move (each input read once, each output written once)."""
    s = suite.scale
    c, grid = s.config(width, "DC f32t4c32"), SPACES["DC f32t4c32"].grid(s.frames, dict(s.sizes)["720p"])
    l, d, f, low = prod(grid), c.dim, c.ffn_dim, BYTES[s.dtype]
    a, wide = rand(1, l, d, scale=s), rand(1, l, f, scale=s)
    for name, x, out in (("projection", a, d), ("MLP in", a, f), ("MLP out", wide, d)):
        w, bias = rand(out, x.shape[2], scale=s), rand(out, scale=s)
        suite.add("operation", f"{width} {name} {l} x {x.shape[2]} x {out}", seconds=suite.clock(lambda: F.linear(x, w, bias)),
                  flops=2 * l * x.shape[2] * out, bytes=x.nbytes + w.nbytes + l * out * low)
    q, k, v = (rand(1, l, c.heads, d // c.heads, scale=s) for _ in range(3))
    suite.add("operation", f"{width} attention, {l} tokens, {c.heads} heads", seconds=suite.clock(lambda: kernels.attention(q, k, v)),
              flops=4 * l * l * d, bytes=4 * q.nbytes)
    del q, k, v, wide
    x, y, weight = rand(1, l, d, scale=s, dtype=torch.float32), rand(1, l, d, scale=s), rand(d, scale=s, dtype=torch.float32)
    scale, shift, gate = rand(1, 1, 3, d, scale=s, dtype=torch.float32).unbind(2)
    rope = dit.rope_table(grid, d // c.heads, s.device)
    thin = {"LayerNorm, modulate": (lambda: kernels.layer_norm_modulate(x, scale, shift, 1e-6, s.dtype), 4 + low),
            "residual + gate": (lambda: kernels.gate_residual(x, y, gate), 8 + low),
            "residual + gate, LayerNorm": (lambda: kernels.residual_norm(x, y, gate, scale, shift, 1e-6, s.dtype), 8 + 2 * low),
            "RMSNorm, rotate": (lambda: kernels.rms_norm_rope(a, weight, rope, c.heads, 1e-6), 2 * low + 4 / c.heads)}
    for name, (task, per_number) in thin.items():
        for plain in (False, True):
            kernels.use(plain=plain)
            suite.add("operation", f"{width} {name}, {'plain' if plain else 'fused'}", seconds=suite.clock(task), bytes=l * d * per_number,
                      note="" if plain or kernels.fused(x) else f"runs {kernels.describe(s.device)}")


# ---------------------------------------------------------------------------------------------------- transformers


def random_blocks(suite, width, count):
    """`count` blocks with random weights, on the device, shared by all networks of that width."""
    config = dataclasses.replace(suite.scale.config(width, "DC f32t4c32"), layers=count)
    with torch.device("meta"):
        net = dit.WanDiT(config).cast_weights(suite.scale.dtype)
    return fill(net.to_empty(device=suite.scale.device)).blocks


@torch.no_grad()
def fill(net):
    """Random weights of a size that keeps activations near 1; norms and biases as in a trained network."""
    for name, p in net.named_parameters():
        if p.ndim > 1 and not name.endswith("modulation"):
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            p.normal_(std=0.02).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return net.eval().requires_grad_(False)


def network(suite, width, space, blocks):
    """A transformer for a latent space made of given blocks."""
    config = dataclasses.replace(suite.scale.config(width, space), layers=0)
    with torch.device("meta"):
        net = dit.WanDiT(config).cast_weights(suite.scale.dtype)
    net = fill(net.to_empty(device=suite.scale.device))
    net.blocks, net.config = blocks, dataclasses.replace(config, layers=len(blocks))
    return net


def inputs(suite, net, grid):
    """Latent, time, prompt states of 100 words."""
    s, c = suite.scale, net.config
    context = torch.zeros(1, c.text_len, c.text_dim, device=s.device)
    context[:, : min(100, c.text_len - 1)] = torch.randn(1, min(100, c.text_len - 1), c.text_dim, device=s.device)
    return rand(1, c.in_channels, *grid, scale=s, dtype=torch.float32), torch.tensor([500.0], device=s.device), context


def sampled(net, x, t, context):
    """One forward as sampling makes it: time and prompt prepared."""
    return partial(net, x, net.times(t)[0], net.prompt(context))


def steps_of(suite, width, space, size, frames, blocks):
    """A row: one forward of `width` in a latent space, all blocks or extrapolated from a few -> seconds, or None."""
    s = suite.scale
    name, grid = f"{width} {space}, {frames} frames {size}", SPACES[space].grid(frames, dict(s.sizes)[size])
    full = s.config(width, space)
    cost = dit.flops(full, grid)
    expected = cost.total / (0.4 * suite.ceiling["flops"])  # seconds, if 40 % of the ceiling is reached
    count = min(len(blocks), max(1, int(full.layers * s.limit / max(expected, 1e-9))))
    if 3 * expected * count / full.layers > suite.left():
        return suite.leave_out("step", name, "out of time")
    net = network(suite, width, space, blocks[:count])
    arguments = inputs(suite, net, grid)
    task = sampled(net, *arguments)
    memory = suite.peak(task)  # also warms up
    seconds = suite.clock(task, expected * count / full.layers)
    note = ""
    if count < full.layers:
        net.blocks = net.blocks[:0]
        ends = suite.clock(sampled(net, *arguments))
        seconds = ends + full.layers / count * (seconds - ends)
        note = f"extrapolated from {count} of {full.layers} blocks"
    tokens = dit.tokens(full, grid)
    suite.add("step", name, seconds=seconds, tokens=tokens, flops=cost.total, attention_share=cost.attention / cost.total, note=note, blocks=count, **memory)
    return seconds


@each
def steps(suite, width, space, size, frames, blocks, found):
    found[width, space, size, frames] = steps_of(suite, width, space, size, frames, blocks)


# ---------------------------------------------------------------------------------------------------- peers


def diffusers_twin(net):
    """diffusers' WanTransformer3DModel on the same tensors, where its types are ours: in bf16 it keeps fewer of them in fp32."""
    from diffusers import WanTransformer3DModel

    c = net.config
    with torch.device("meta"):
        peer = WanTransformer3DModel(patch_size=c.patch, num_attention_heads=c.heads, attention_head_dim=c.dim // c.heads, in_channels=c.in_channels,
                                     out_channels=c.out_channels, text_dim=c.text_dim, freq_dim=c.freq_dim, ffn_dim=c.ffn_dim, num_layers=c.layers,
                                     cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=c.eps, rope_max_seq_len=1024)
    wide = lambda name: net.weight_dtype == torch.float32 or any(part in name for part in peer._keep_in_fp32_modules)
    peer.load_state_dict({k: v.float() if wide(k) else v.to(net.weight_dtype) for k, v in dit.to_diffusers(net.state_dict()).items()}, assign=True)
    with torch.device(net.head.head.weight.device):
        peer.rope = type(peer.rope)(c.dim // c.heads, c.patch, 1024)  # its tables are no part of the weights
    return peer.eval().requires_grad_(False)


@each
def peers(suite, width, size, space, blocks):
    """One forward by everybody, on the same weights and inputs, in turn."""
    s = suite.scale
    net = network(suite, width, space, blocks)
    grid = SPACES[space].grid(s.frames, dict(s.sizes)[size])
    x, t, context = inputs(suite, net, grid)
    title = f"{width} {space} {size}, {dit.tokens(net.config, grid)} tokens, {len(blocks)} blocks"
    reference, flops, times = net(x, t, context), dit.flops(net.config, grid).total, {}

    def row(who, task):
        off, memory = relative(task(), reference), suite.peak(task)
        times[who] = suite.clock(task)
        suite.add("peer", f"{title}: {who}", seconds=times[who], flops=flops, difference=off, **memory)

    row("ours", sampled(net, x, t, context))
    if s.device.type == "cuda":
        moment, prompt = net.times(t)[0], net.prompt(context)
        step = guided.Replay(lambda x, *time: net(x, dit.Time(*time), prompt))
        step(x, *moment)
        row("ours, one CUDA graph", lambda: step(x, *moment))
        del step
    kernels.use(plain=True)
    row("ours, plain", partial(net, x, t, context))
    kernels.use()
    try:
        peer = diffusers_twin(net)
    except ImportError:
        return suite.leave_out("peer", f"{title}: diffusers", "diffusers is not installed (requirements-dev.txt)")
    call = lambda: peer(hidden_states=x.to(s.dtype), timestep=t, encoder_hidden_states=context.to(s.dtype), return_dict=False)[0]
    suite.attend(None)  # as its users get it
    row("diffusers", call)
    peer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=s.compiler)
    row("diffusers, compiled blocks", call)
    suite.attend(suite.attention)
    guided.compile_blocks(net, s.compiler)
    row("ours, compiled blocks", sampled(net, x, t, context))
    for block in blocks:  # other networks share them
        block._compiled_call_impl = None
    suite.add("peer", f"{title}: ratios", ratios={f"{slow} / {fast}": times[slow] / times[fast] for fast in times if fast.startswith("ours")
                                                  for slow in ("ours, plain", "diffusers", "diffusers, compiled blocks") if slow != fast})


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


# ---------------------------------------------------------------------------------------------------- the guided loop and the decode


def model_of(suite, width, space, blocks, dtype=torch.float32):
    """A Model with random weights and no text encoder."""
    autoencoder = fill(suite.scale.autoencoder(space)).to(suite.scale.device, dtype)
    if suite.convolution:
        autoencoder.to(memory_format=suite.convolution.layout)
    return models.Model(f"{width} {space}", network(suite, width, space, blocks), autoencoder, text=None, task="t2v", ae_dtype=dtype, device=suite.scale.device)


@each
def loop(suite, width, size, space, blocks, count=6):
    """`sample.generate` itself, a few steps of it: solver, both guidance passes, the step as a CUDA graph."""
    s = suite.scale
    model, grid = model_of(suite, width, space, blocks), SPACES[space].grid(s.frames, dict(s.sizes)[size])
    context = inputs(suite, model.net, grid)[2]
    run = lambda: sample.generate(model, context, frames=s.frames, size=dict(s.sizes)[size], steps=count, guidance=5.0, shift=5.0, null=-context)
    memory, seconds = suite.peak(run), suite.clock(run)
    suite.add("loop", f"{width} {space} {size}, {len(blocks)} blocks, {count} guided steps", seconds=seconds, seconds_per_step=seconds / count,
              flops=2 * count * dit.flops(model.net.config, grid).total, **memory)


@lru_cache
def cell_flops(kind, config):
    """FLOPs of decoding, for each position of the latent: counted on the meta device for a piece of 8x8 cells."""
    with torch.device("meta"), torch.no_grad():
        z = torch.empty(1, config.latent_channels, config.latent_chunk, 8, 8)
        with FlopCounterMode(display=False) as counter:
            for _ in kind(config).decode_stream(z):
                pass
    return counter.get_total_flops() / (64 * config.latent_chunk)


@each
def decode(suite, space, size, frames, found, plain=False):
    """The autoencoder's decode of a whole video, in tiles as large as fit; extrapolated from its first chunks where it would take long."""
    s = suite.scale
    dtype = torch.float32 if space.startswith("base") else suite.convolution.dtype if suite.convolution else s.dtype
    kernels.use(plain=plain)
    net = fill(s.autoencoder(space)).to(s.device, dtype)
    if suite.convolution and not plain:
        net.to(memory_format=suite.convolution.layout)
    grid = SPACES[space].grid(frames, dict(s.sizes)[size])
    name = f"{space}, {frames} frames {size}{', plain' if plain else ''}"
    flops, chunk = cell_flops(type(net), net.config) * prod(grid), net.config.latent_chunk
    pieces = -(-grid[0] // chunk)
    expected = flops / (0.3 * suite.ceiling["flops"])
    part = max(1, min(pieces, int(pieces * 15 / max(expected, 1e-9))))  # 15 s at most, but one chunk
    if 2 * expected * part / pieces > suite.left():
        return suite.leave_out("decode", name, "out of time")
    tile = tiling.choose(net, (part * chunk, *grid[1:]), 0.9 * sample.free_memory(s.device), dtype)
    z = rand(1, net.config.latent_channels, min(part * chunk, grid[0]), *grid[1:], scale=s, dtype=dtype)

    def run():
        for _ in net.decode_stream(z, tile):
            pass

    memory = suite.peak(run)
    seconds = suite.clock(run, expected=9) * grid[0] / z.shape[2]
    if not plain:
        found[space, size, frames] = seconds
    suite.add("decode", name, seconds=seconds, flops=flops, tile=tile, dtype=str(dtype).split(".")[1], **memory,
              note=f"extrapolated from {part} of {pieces} pieces" if part < pieces else "")


def videos(suite, steps, decodes):
    """Whole videos out of the rows measured: `STEPS` steps of two passes, and the decode; published minutes beside them."""
    for (width, space, size, frames), seconds in steps.items():
        if seconds is None:
            continue
        decode, published = decodes.get((space, size, frames)), PUBLISHED.get((size, frames)) if width == "1.3B" and "f64" not in space else None
        suite.add("video", f"{width} {space}, {frames} frames {size}, {STEPS} steps", seconds=2 * STEPS * seconds + (decode or 0),
                  transformer_minutes=2 * STEPS * seconds / 60, decode_seconds=decode,
                  published_transformer_minutes=published and published["base" not in space],
                  note="extrapolated from one step" + ("" if decode else ", without decode")
                  + (f"; published {published['base' not in space]} min" if published else ""))


# ---------------------------------------------------------------------------------------------------- plot, and the order of things


def plot(suite, path):
    """Roofline: FLOP/s against FLOPs per byte of memory traffic, for the operations with the ceilings as measured."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in suite.report["rows"] if r["part"] == "operation"]
    fig, ax = plt.subplots(figsize=(9, 6))
    x = [2**n for n in range(-3, 15)]
    ax.plot(x, [min(suite.ceiling["flops"], i * suite.ceiling["bytes"]) / 1e12 for i in x], "k-", lw=1)
    for r in rows:
        flops = r.get("flops") or 8 * r["bytes"] / 6  # thin: some eight operations for every number, of six bytes
        plain = r["name"].endswith("plain")
        ax.plot(flops / r["bytes"], flops / r["seconds"] / 1e12, "rx" if plain else "bo")
        ax.annotate(r["name"].split(",")[0].removesuffix(", fused"), (flops / r["bytes"], flops / r["seconds"] / 1e12), fontsize=6)
    ax.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must move", ylabel="TFLOP/s",
           title=f"{suite.report['gpu'] or suite.report['cpu']}: circles fused or library, crosses plain")
    with checkpoint.atomic_path(path) as tmp:
        fig.savefig(tmp, dpi=120, format="png")
    plt.close(fig)


@torch.no_grad()
def run(out, dry_run=False, budget=570.0):
    """The whole suite -> its report, which is in `out` as well. Raises UserError without a GPU, unless it is the dry run."""
    if not dry_run and not torch.cuda.is_available():
        raise checkpoint.UserError("--suite gpu needs a CUDA GPU, and torch finds none: add --dry-run to walk through it with tiny shapes on the CPU.")
    scale = dry(torch.device("cpu")) if dry_run else Scale(torch.device("cuda"))
    if not dry_run and (reason := choose.without_bf16(scale.device)):
        raise checkpoint.UserError(f"--suite gpu measures in bf16, but {reason}: use a newer GPU.")
    suite = Suite(scale, out, budget)
    if not dry_run:
        suite.attention, line = choose.choose_attention(scale.device, 17600, 12)
        suite.convolution = choose.choose_convolution(scale.device, scale.dtype)
        suite.report["choices"] = [line, suite.convolution.line, f"thin operations: {kernels.describe(scale.device)}"]
        print("\n".join(suite.report["choices"]))
    ceilings(suite)
    if suite.ceiling["bytes"] is None:
        raise checkpoint.UserError(f"the ceilings could not be measured ({suite.report['left_out'][0]['reason']}): free the GPU and try again.")
    found, decodes = {}, {}
    sizes, deep, deeper, base = dict(scale.sizes), "DC f32t4c32", "DC f64t4c128", "base f8t4c16"
    frames = scale.frames
    decode(suite, deep, "720p", frames, decodes)
    for width, _, count in scale.widths:
        blocks = random_blocks(suite, width, count)
        for size in ("480p", "720p") if width == "1.3B" else ("720p",):
            peers(suite, width, size, deep, blocks)
        loop(suite, width, "720p", deep, blocks)
        operations(suite, width)
        cases = [(space, size, frames) for size in sizes for space in (deep, deeper, base)]
        if width == "1.3B":
            cases += [(space, "720p", longer) for longer in scale.longer for space in (deep, base)]
        for case in sorted(cases, key=lambda c: dit.flops(scale.config(width, c[0]), SPACES[c[0]].grid(c[2], sizes[c[1]])).total):
            steps(suite, width, *case, blocks, found)
        del blocks
        tidy()
    for space, size in ((deeper, "720p"), (base, "480p"), (deep, "480p"), (deep, "2160p"), (deeper, "2160p"), (base, "720p")):
        if size in sizes:
            decode(suite, space, size, frames, decodes)
    decode(suite, deep, "720p", frames, decodes, True)
    videos(suite, found, decodes)
    suite.report["seconds"] = round(budget - suite.left(), 1)
    checkpoint.write_json(out, suite.report)
    plot(suite, str(out).removesuffix(".json") + ".png")
    return suite.report
