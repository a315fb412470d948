"""One way to measure: a clock, a meter of memory, a fresh process, a report with its roofline.

Machines are shared and noisy. So variants of the same work take turns, medians are
compared, and only ratios within one run mean anything. On a CPU the clock counts the
processor's time: what other processes do to the clock on the wall does not count.

A report is rewritten after every row, so a run that is cut off keeps what it has. A row
that knows its arithmetic (FLOPs) and its traffic (bytes read and written, as if no cache
helped) is set against the two ceilings that the machine showed in the same run, a matrix
product and a copy: the least time is max(FLOPs / product, bytes / copy).
"""
import gc
import os
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from files import ROOT, checkpoint, layouts, video
from files.options import TYPES
from gpu import tiling
from gpu.choose import first_line

COLOURS = {"fp32": "tab:blue", "bf16": "tab:orange"}
MARKERS = {"ours": "o", "plain": "x"}

# ------------------------------------------------------------------------------ time


def now(device):
    """Seconds: of the processor on a CPU; on the wall, all work done, on a GPU."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turns(tasks, repeats, device=torch.device("cpu"), patience=float("inf")):
    """Run {name: function} in turns, a first round to warm up -> {name: median seconds}.

    After `patience` seconds no further round begins; one round is run in any case.
    """
    times, began = {name: [] for name in tasks}, time.perf_counter()
    for _ in range(repeats + 1):
        for name, task in tasks.items():
            start = now(device)
            task()
            times[name].append(now(device) - start)
        if time.perf_counter() - began > patience:
            break
    return {name: statistics.median(found[1:] or found) for name, found in times.items()}


def extrapolated(ends, some, count, layers):
    """Seconds of all layers, which cost the same, from those of none and of `count`."""
    return ends + layers / count * (some - ends)


def plainly(task):
    """The same on the plain path: the twins of kernels.py and chunk_causal.py."""
    def run():
        kernels.use(plain=True)
        try:
            return task()
        finally:
            kernels.use()

    return run


def fresh_process(*arguments):
    """Run Python in a new process at the project's root -> (its output, CPU seconds)."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed; out of memory?"])[-1]
        raise checkpoint.UserError(f"{' '.join(command[1:])} failed: {last}")
    return done.stdout, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


# ----------------------------------------------------------- memory, arithmetic, traffic


def peak_bytes(task, device):
    """Memory that a call takes at most beyond what was there; None on a CPU."""
    if device.type == "cpu":
        task()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    task()
    return torch.cuda.max_memory_allocated(device) - before


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write; views are free."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.empty.memory_format:
            self.bytes += tiling.bytes_of((args, kwargs, out))
        return out


def work(task):
    """FLOPs of a task's plain form, whose operations torch can count; bytes of the fast."""
    with FlopCounterMode(display=False) as counter:
        plainly(task)()
    with Traffic() as traffic:
        task()
    return dict(flops=counter.get_total_flops(), bytes=traffic.bytes)


# -------------------------------------------------------------------------------- peer


def diffusers_twin(net):
    """diffusers' transformer on the same tensors, where its types are ours: in bf16 it
    keeps fewer of them in fp32."""
    from diffusers import WanTransformer3DModel

    c = net.config
    with torch.device("meta"):
        peer = WanTransformer3DModel.from_config(layouts.diffusers_config(c))
    weights = {}
    for name, value in net.state_dict().items():
        name = layouts.to_diffusers(name)
        wide = any(part in name for part in peer._keep_in_fp32_modules)
        weights[name] = value.float() if wide else value.to(net.weight_dtype)
    peer.load_state_dict(weights, assign=True)
    with torch.device(net.head.head.weight.device):  # its tables are no part of the weights
        peer.rope = type(peer.rope)(c.dim // c.heads, c.patch, 1024)
    return peer.eval().requires_grad_(False)


# ------------------------------------------------------------------------------ report


class Report:
    """Rows {name: seconds by variant, and more}, printed and written as they come.

    The name of a variant ends in its type, "ours bf16"; ratios are to the first one.
    """

    def __init__(self, path, device=torch.device("cpu"), budget=float("inf"), **settings):
        self.path, self.device, self.end = path, device, time.perf_counter() + budget
        self.rows, self.left_out, self.ceilings = {}, {}, {}
        self.found = dict(**checkpoint.provenance(), **settings)

    def write(self, **more):
        self.found |= more
        tables = dict(ceilings=self.ceilings, rows=self.rows, left_out=self.left_out)
        checkpoint.write_json(self.path, dict(**self.found, **tables))

    def resume(self):
        """Keep the rows of the report that is at this path, if it was made with the same
        settings by the same versions on the same machine."""
        if not self.path.is_file():
            return
        before = checkpoint.read_json(self.path)
        other = [k for k, v in self.found.items() if k != "date" and before.get(k) != v]
        if other:
            print(f"{self.path} has another {other[0]}: it is begun anew")
        else:
            self.rows = before["rows"]
            print(f"{self.path}: {len(self.rows)} rows are kept")

    def measure_ceilings(self, side, numbers):
        """Matrix products of side^3 in the types that the machine multiplies; a copy."""
        tasks = {}
        for name, dtype in TYPES.items():
            if name == "fp32" or self.device.type == "cuda" or kernels.bf16_units():
                a = torch.randn(side, side, device=self.device, dtype=dtype)
                tasks[name] = lambda a=a: a @ a
        x = torch.randn(numbers, device=self.device)
        y = torch.empty_like(x)
        tasks["copy"] = lambda: y.copy_(x)
        for name, seconds in in_turns(tasks, 9, self.device).items():
            amount = 2 * x.nbytes if name == "copy" else 2 * side**3
            self.ceilings[name] = amount / seconds
            print(f"ceiling: {name} {amount / seconds:.3g} {'B/s' if name == 'copy' else 'FLOP/s'}")

    def least_seconds(self, variant, flops, bytes):
        """What the ceilings allow. Traffic is counted in fp32: half of it for bf16."""
        dtype = variant.split()[-1]
        moved = bytes * TYPES[dtype].itemsize / 4
        return max(flops / self.ceilings[dtype], moved / self.ceilings["copy"])

    def add(self, name, seconds, **more):
        """Keep, print and write a row. With `flops` and `bytes` also the share reached."""
        ours = next(iter(seconds))
        ratio = {variant: s / seconds[ours] for variant, s in seconds.items()}
        row = dict(seconds=seconds, ratio=ratio, **more)
        if "flops" in more:
            least = self.least_seconds(ours, more["flops"], more.get("bytes", 0))
            row["share_of_ceiling"] = least / seconds[ours]
        self.rows[name] = row
        self.write()
        shown = [f"{v} {s * 1e3:,.1f} ms ({ratio[v]:.2f}x)" for v, s in seconds.items()]
        print(f"{name:44s} " + "   ".join([*shown, more.get("note", "")]), flush=True)

    def leave_out(self, name, reason):
        self.left_out[name] = reason
        self.write()
        print(f"{name:44s} left out: {reason}", flush=True)

    def attempt(self, part, *arguments):
        """part(self, *arguments). What goes wrong in it, such as too little memory or a
        peer of another version, is noted, and the rest goes on."""
        names = [str(a) for a in arguments if isinstance(a, (str, int))]
        name = " ".join([part.__name__.replace("_", " "), *names])
        if time.perf_counter() > self.end:
            return self.leave_out(name, "out of time")
        try:
            return part(self, *arguments)
        except Exception as e:
            self.leave_out(name, f"{type(e).__name__}: {first_line(e)}")
        finally:
            kernels.use()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def roofline(self):
        """Plot beside the report: FLOP/s against FLOPs per byte, under the ceilings."""
        with video.figure(self.path.with_suffix(".png"), size=(9, 5.5)) as axes:
            axis, intensities = axes[0, 0], [2 ** (i / 4) for i in range(-8, 57)]
            for dtype, colour in COLOURS.items():
                if dtype in self.ceilings:
                    slope, top = self.ceilings["copy"], self.ceilings[dtype]
                    roof = [min(top, slope * i) for i in intensities]
                    axis.plot(intensities, roof, color=colour, label=f"ceiling, {dtype}")
            for name, row in self.rows.items():
                if row.get("bytes"):
                    self._mark(axis, name, row)
            axis.set(xscale="log", yscale="log", ylabel="FLOP/s")
            axis.set(xlabel="FLOPs per byte, counted without caches (o ours, x plain, ^ others)")
            axis.legend(fontsize=7)

    def _mark(self, axis, name, row):
        for variant, seconds in row["seconds"].items():
            who, dtype = variant.split()[0], variant.split()[-1]
            moved = row["bytes"] * TYPES[dtype].itemsize / 4
            at = row["flops"] / moved, row["flops"] / seconds
            axis.plot(*at, MARKERS.get(who, "^"), color=COLOURS[dtype], markersize=5)
            if who == "ours":
                below = dict(xytext=(4, -8), textcoords="offset points")
                axis.annotate(name, at, fontsize=6, **below)
