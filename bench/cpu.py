"""`python -m bench --suite cpu`: what the fast path is worth on a processor, beside the plain path and beside diffusers, in one run.

Machines are shared and noisy. So everything runs on one thread, variants of the same work take turns, times are processor time (what other processes do
to the clock on the wall does not count) and medians are compared. Only ratios within a run mean anything.

The plain path is what `sample.py --slow` runs: the plain twins of kernels.py and chunk_causal.py (explicit concatenation, scores in memory, usual memory
layout), guidance in two passes, nothing kept between steps. The peer is diffusers' WanTransformer3DModel, eager, with our weights in its own format.

The roofline plot: arithmetic against memory traffic, below the two ceilings that this machine showed in the same run, a matrix product and a copy.
Traffic is counted from the operations: what each reads and writes, as if no cache helped.
"""
import copy
import os
import subprocess
import sys
import tempfile
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import ae
import dit
import kernels
import sample
from files import ROOT
from wan import models

SMALL = dit.Config(dim=512, ffn_dim=2048, heads=4, layers=8, in_channels=16, out_channels=16)  # shaped like Wan 2.1
LATENTS = (4, 32, 32), (4, 64, 64)  # 1,024 and 4,096 tokens
MIDDLE = ae.Config((0, 64, 128, 128, 256, 256, 256), (0, 2, 3, 1, 1, 1, 1), 32, chunk=16)  # an eighth of f32t4c32's work at each pixel
DECODES = {"toy": (ae.PRESETS["toy"], (8, 2, 2)), "toy-base": (ae.PRESETS["toy-base"], (8, 8, 8)), "toy, 128x128": (ae.PRESETS["toy"], (8, 4, 4)),
           "toy, 256x256": (ae.PRESETS["toy"], (2, 8, 8)), "small, 128x128": (ae.PRESETS["small"], (4, 4, 4)),
           "middle, 96x128": (MIDDLE, (4, 3, 4)), "middle, 192x256": (MIDDLE, (4, 6, 8))}  # name -> network, latent
PROMPT = "a large red circle moving left slowly on a blue background"

# Written down before the changes were made or measured, from one profile of the code as it stood -> the name of the row that tells.
PREDICTED = {
    "transformer, 1,024 tokens, fp32: 1.2x diffusers from what is computed once": "transformer, 1024 tokens",
    "transformer, 4,096 tokens, fp32: 1.1x diffusers; attention in blocks of full matrix products instead of the library's kernel: 1.5x": "transformer, 4096 tokens",
    "transformer in bf16: 2.2x diffusers in fp32; GELU inside the product: 9 % of a bf16 step, 5 % of an fp32 one": "transformer, 1024 tokens",
    "decode: 1.2x from channels-last, 1.1x from norms without fp32 copies, 1.15x from no concatenation": "decode, toy",
    "toy sampling: 1.6x the plain path": "toy sampling, dc",
}


def processor_seconds(task):
    started = time.process_time()
    task()
    return time.process_time() - started


def turns(tasks, repeats):
    """Run {name: function} in turns, `repeats` times after one warm-up -> {name: median seconds of processor time}."""
    times = {name: [] for name in tasks}
    for i in range(repeats + 1):
        for name, task in tasks.items():
            seconds = processor_seconds(task)
            times[name] += [seconds] if i else []
    return {name: sorted(t)[repeats // 2] for name, t in times.items()}


def plainly(task):
    """The same on the plain path."""
    def run():
        kernels.use(plain=True)
        try:
            return task()
        finally:
            kernels.use()
    return run


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write; views are free."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.empty.memory_format:
            self.bytes += sum(t.numel() * t.itemsize for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
        return out


def intensity(task):
    """FLOPs of a task (of its plain form, whose operations torch can count), bytes of its fast form."""
    with FlopCounterMode(display=False) as counter:
        plainly(task)()
    with Traffic() as traffic:
        task()
    return counter.get_total_flops(), traffic.bytes


def relative(y, exact):
    return ((y.float() - exact).norm() / exact.norm()).item()


class Table(dict):
    """name -> row; prints as it grows."""

    def add(self, name, seconds, against, errors=None, **more):
        """seconds: {variant: median}; against: variants that the first one is compared with."""
        ours = next(iter(seconds))
        row = dict(seconds=seconds, ratio={v: {b: seconds[b] / seconds[v] for b in against if b in seconds} for v in seconds if v not in against}, **more)
        if errors:
            row["relative_error"] = errors
        self[name] = row
        print(f"{name:28s} " + "   ".join(f"{v} {s * 1e3:,.0f} ms" for v, s in seconds.items())
              + "   | " + ", ".join(f"{seconds[b] / seconds[ours]:.2f}x {b}" for b in against if b in seconds), flush=True)


def ceilings():
    """What this machine reaches on one thread: a matrix product in both types, and a copy."""
    tasks, flops = {}, 2 * 2048**3
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        tasks[name] = lambda a=a, b=b: a @ b
    x, y = torch.randn(2**25), torch.empty(2**25)
    tasks["copy"] = lambda: y.copy_(x)
    seconds = turns(tasks, 9)
    found = dict(fp32=flops / seconds["fp32"], bf16=flops / seconds["bf16"], copy=2 * x.nbytes / seconds["copy"])
    print(f"ceilings: matrix product {found['fp32'] / 1e9:.3g} GFLOP/s in fp32, {found['bf16'] / 1e9:.3g} in bf16; copy {found['copy'] / 1e9:.1f} GB/s", flush=True)
    return found


def transformer(table, repeats):
    """One step for 1,024 and 4,096 tokens, a prompt of 100 rows (diffusers gets it padded to 512, as its pipeline does)."""
    net = dit.WanDiT(SMALL).eval()
    torch.nn.init.normal_(net.head.head.weight, std=0.02)
    nets = {"fp32": net, **({"bf16": copy.deepcopy(net).cast_weights(torch.bfloat16)} if kernels.bf16_units() else {})}  # else it would take hours
    context = torch.zeros(1, 512, SMALL.text_dim)
    context[:, :100] = torch.randn(1, 100, SMALL.text_dim)
    t = torch.tensor([500.0])
    try:
        import diffusers
        diffusers.utils.logging.set_verbosity_error()
        with tempfile.TemporaryDirectory() as folder:
            dit.save(net, folder, format="diffusers")
            peer = diffusers.WanTransformer3DModel.from_pretrained(folder).eval()
        peers = {"diffusers fp32": (peer, torch.float32), "diffusers bf16": (copy.deepcopy(peer).to(torch.bfloat16), torch.bfloat16)}
        peers = {name: peer for name, peer in peers.items() if name.split()[1] in nets}
        version = diffusers.__version__
    except ImportError:
        peers, version = {}, "not installed"
    for latent in LATENTS:
        x = torch.randn(1, SMALL.in_channels, *latent)
        tasks = {}
        for name, n in nets.items():
            prompt, time_ = n.prompt(context), n.times(t)[0]
            tasks[name] = lambda n=n, prompt=prompt, time_=time_: n(x, time_, prompt)
        if latent == LATENTS[0]:  # scores of 4,096 x 4,096 in memory take too long
            tasks["plain fp32"] = plainly(lambda: net(x, t, context))
        for name, (p, dtype) in peers.items():
            tasks[name] = lambda p=p, dtype=dtype: p(x.to(dtype), t, context.to(dtype), return_dict=False)[0]
        exact = tasks.get("plain fp32", tasks["fp32"])()
        flops = dit.flops(SMALL, latent).total
        table.add(f"transformer, {dit.tokens(SMALL, latent)} tokens", turns(tasks, repeats), ("plain fp32", "diffusers fp32", "diffusers bf16"),
                  {name: relative(task(), exact) for name, task in tasks.items()}, flops=flops, bytes=intensity(tasks["fp32"])[1], diffusers=version)


def sampling(table, repeats):
    """The whole guided loop of the embedded models."""
    for name in ("dc", "base"):
        model = models.load_model(name)
        context = model.text([PROMPT])
        fast = lambda m=model, c=context: sample.generate(m, c)
        plain = plainly(lambda m=model, c=context: sample.generate(m, c, cfg_batch=False, plain=True))
        table.add(f"toy sampling, {name}", turns({"fast": fast, "plain": plain}, repeats), ("plain",), {"fast": relative(fast(), plain())})


def decoding(table, repeats):
    """Several networks and sizes; fp32, and what bf16 would give."""
    for name, (config, shape) in DECODES.items():
        usual = ae.DCAEV(config).eval()
        fast = copy.deepcopy(usual).to(memory_format=torch.channels_last_3d)  # as ae.load does
        low, z = copy.deepcopy(fast).bfloat16(), torch.randn(1, config.latent_channels, *shape)
        tasks = {"fast": lambda: fast.decode(z), "plain": plainly(lambda: usual.decode(z))}
        if kernels.bf16_units():
            tasks["fast bf16"] = lambda low=low: low.decode(z.bfloat16())
        exact = tasks["plain"]()
        counted = intensity(tasks["fast"])
        table.add(f"decode, {name}", turns(tasks, repeats if "middle, 192" not in name else max(repeats // 2, 1)), ("plain",), {k: relative(f(), exact) for k, f in tasks.items()},
                  flops=counted[0], bytes=counted[1], latent=shape)


def training(table, repeats):
    """Forward and backward: chunk-causal padding matters here too; the other operations take their plain forms, which have gradients."""
    net, x = ae.DCAEV(ae.PRESETS["toy"]), torch.rand(4, 3, 16, 64, 64) * 2 - 1
    base, z, context = dit.WanDiT(dit.PRESETS["toy-base"]), torch.randn(16, 36, 8, 8, 8), torch.randn(16, 8, 32)
    for name, step in (("autoencoder", lambda: (net.decoder(net.encoder(x)[0])[0] - x).abs().mean().backward()),
                       ("transformer", lambda: base(z, torch.full((16,), 500.0), context).square().mean().backward())):
        with torch.enable_grad():
            table.add(f"toy training step, {name}", turns({"fast": step, "plain": plainly(step)}, repeats), ("plain",))


def start():
    """Cold start: seconds of `import ae, dit, sample` over torch itself, and of the first command of the README, mp4 written; the best of three."""
    here, env = ROOT, {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    code = "import time; a = time.process_time(); import torch; b = time.process_time(); import ae, dit, sample; print(b - a, time.process_time() - b)"
    imports = [[float(n) for n in subprocess.run([sys.executable, "-c", code], cwd=here, env=env, capture_output=True, text=True, check=True).stdout.split()] for _ in range(3)]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            wall, before = time.perf_counter(), os.times()
            subprocess.run([sys.executable, "sample.py", "--prompt", PROMPT, "--out", folder], cwd=here, env=env, capture_output=True, check=True)
            after = os.times()
            runs.append((after.children_user + after.children_system - before.children_user - before.children_system, time.perf_counter() - wall))
    found = dict(torch_import=min(t for t, _ in imports), own_imports=min(t for _, t in imports), prompt_to_mp4=min(runs)[0], prompt_to_mp4_wall=min(w for _, w in runs))
    print(f"start: torch {found['torch_import']:.2f} s, our imports {found['own_imports']:.2f} s more; prompt to mp4 {found['prompt_to_mp4']:.1f} s of processor time "
          f"({found['prompt_to_mp4_wall']:.1f} s on the wall)", flush=True)
    return found


def plot(report, path):
    """Roofline: rows of the table that know their FLOPs and bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(8, 4.5))
    top, x = report["ceilings"], [10 ** (i / 20) for i in range(-10, 61)]
    for name, colour in (("fp32", "tab:blue"), ("bf16", "tab:orange")):
        axis.plot(x, [min(top[name], top["copy"] * i) / 1e9 for i in x], color=colour, label=f"ceiling, {name}")
    marks = {"fp32": ("tab:blue", "o"), "fast": ("tab:blue", "o"), "bf16": ("tab:orange", "o"), "fast bf16": ("tab:orange", "o"), "plain": ("tab:blue", "x"),
             "plain fp32": ("tab:blue", "x"), "diffusers fp32": ("tab:blue", "^"), "diffusers bf16": ("tab:orange", "^")}
    for name, row in report["rows"].items():
        for variant, seconds in row["seconds"].items() if "flops" in row else ():
            colour, marker = marks[variant]
            at = row["flops"] / row["bytes"] * (2 if "bf16" in variant else 1), row["flops"] / seconds / 1e9
            axis.plot(*at, marker, color=colour, markersize=5, fillstyle="full" if marker == "o" else "none")
            if variant in ("fp32", "fast"):
                axis.annotate(name, at, fontsize=6, xytext=(4, -8), textcoords="offset points")
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte (counted without caches; bf16 taken as half the bytes)", ylabel="GFLOP/s, one thread")
    axis.plot([], [], "ko", label="fast"), axis.plot([], [], "kx", label="plain"), axis.plot([], [], "k^", fillstyle="none", label="diffusers")
    axis.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


@torch.no_grad()
def run(repeats=5):
    """The whole suite -> report."""
    torch.manual_seed(0)
    report, table = dict(repeats=repeats, clock="processor time", ceilings=ceilings()), Table()
    with torch.inference_mode():
        transformer(table, repeats)
    sampling(table, repeats)
    decoding(table, repeats)
    training(table, repeats)
    return dict(report, rows=table, start=start(), predicted={said: table[name]["ratio"] for said, name in PREDICTED.items() if name in table})
