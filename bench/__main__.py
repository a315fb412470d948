"""How fast and how large: measured on this machine, written to results/.

    python -m bench --suite toy           base and adapted toy model side by side, about a minute -> results/bench_toy.json
    python -m bench --suite load          host memory of loading and saving a 5.7 GB transformer (Wan 2.1 1.3B in fp32, random) in three
                                          layouts, ten minutes, 12 GB of memory and of disk -> results/load.json
    python -m bench --suite activations   `dit.activation_bytes` against what forwards take, a minute -> results/activations.json
    python -m bench --suite shortcuts     quality and work of guidance intervals, reused velocities and fp8, on the toy, 3 minutes -> results/shortcuts.json
    python -m bench --suite cpu           fast path, plain path and diffusers on one thread, 5 minutes: bench/cpu.py -> results/bench_cpu.json and .png
    python -m bench --suite gpu           on one GPU, ten minutes: bench/gpu.py -> results/bench_gpu.json

Machines are shared and noisy, so of times only ratios within one run are quoted. Models take turns, and medians are compared. Memory is
measured in fresh processes (Linux: /proc/self/status). Anonymous memory is what the machine must have; pages of mapped files count
as resident too, but the system takes them back when it needs them, so they are told apart.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting threads slow every other process down; must precede torch

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import dit
import sample
import toy
from files import ROOT, checkpoint
from files.checkpoint import UserError
from wan import models


def rounds(tasks, repeats):
    """Run {name: function} in turns, `repeats` times after one warm-up -> {name: median seconds}."""
    times = {name: [] for name in tasks}
    for i in range(repeats + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            if i:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(t) for name, t in times.items()}


@torch.no_grad()
def toy_models(repeats):
    """Transformer pass, whole guided loop, decode, and prompt to pixels, for both toy models."""
    both = {name: models.load_model(name) for name in ("base", "dc")}
    size, frames = both["dc"].size, both["dc"].frames
    tasks, tokens, latents = {}, {}, {}
    for name, model in both.items():
        shape = model.latent_shape(frames, size)
        config, context = model.net.config, model.text(["a large red circle moving left slowly on a blue background"])
        x, t = torch.randn(1, config.in_channels, *shape), torch.full((1,), 500.0)
        tokens[name], latents[name] = dit.tokens(config, shape), sample.generate(model, context)
        loop = lambda m=model, c=context: sample.generate(m, c)
        decode = lambda m=model, z=latents[name]: torch.cat(list(m.decode(z, frames, size)), dim=2)
        tasks[name, "transformer pass"] = lambda m=model, x=x, t=t, c=context: m.net(x, t, c)
        tasks[name, "guided loop"] = loop
        tasks[name, "decode"] = decode
        tasks[name, "prompt to pixels"] = lambda m=model, c=context: list(m.decode(sample.generate(m, c), frames, size))
    seconds = rounds(tasks, repeats)
    rows = {what: {name: seconds[name, what] for name in both} for _, what in tasks}
    for row in rows.values():
        row["ratio"] = row["base"] / row["dc"]
    print(f"{frames} frames of {size[0]}x{size[1]}, {both['dc'].steps} steps with guidance; tokens: base {tokens['base']}, "
          f"adapted {tokens['dc']}, ratio {tokens['base'] / tokens['dc']:.1f}")
    for what, row in rows.items():
        print(f"  {what:18s} base {row['base'] * 1e3:8.1f} ms   adapted {row['dc'] * 1e3:8.1f} ms   {row['ratio']:.2f}x")
    return dict(tokens=tokens, median_seconds=rows)


# ---------------------------------------------------------------------------------------------------- memory


def resident():
    """Memory of this process in bytes -> {"anonymous", "of files"}"""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[field].split()[0]) * 1024 for name, field in (("anonymous", "RssAnon"), ("of files", "RssFile"))}


def peak_of(task):
    """Run `task` -> (its result, dict of seconds and of memory before it and at its peak, looked at every 2 ms)."""
    before, peak, done = resident(), resident(), threading.Event()

    def watch():
        while not done.wait(0.002):
            peak.update({name: max(peak[name], size) for name, size in resident().items()})

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    result = task()
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    return result, dict(seconds=round(seconds, 1), before=before, peak=peak)


def fresh(function, **arguments):
    """Call a function of this file in a new process -> what it returns (JSON). Freed tensors go back to the system at once there (glibc
    keeps what is below 32 MB, and fragments would count)."""
    code = f"import json, sys; from bench import __main__ as bench; print(json.dumps(bench.{function}(**json.loads(sys.argv[1]))))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"})
    if done.returncode:
        raise UserError(f"{function} failed in its own process: {(done.stderr.strip().splitlines() or ['killed, out of memory?'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def random_transformer(config):
    with torch.device("meta"):
        net = dit.WanDiT(config)
    net.to_empty(device="cpu")
    for p in net.parameters():
        p.data.uniform_(-0.02, 0.02)
    return net


@torch.no_grad()
def save_transformer(preset, layout, path, shard_bytes=2e9):
    """Write random weights of a preset -> memory and time of writing."""
    net = random_transformer(dit.PRESETS[preset])
    if layout == "training container":
        write = lambda: torch.save({"ema_model_state_dict": {0.999: net.state_dict()}}, path)
    else:
        write = lambda: dit.save(net, path, format=layout, shard_bytes=shard_bytes)
    return peak_of(write)[1]


def load_transformer(path, dtype):
    """Load it in the type -> memory, time, and the bytes of the result."""
    for file in [path] if Path(path).is_file() else Path(path).iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from the system's cache of it
    net, row = peak_of(lambda: dit.load(path, dtype=getattr(torch, dtype)))
    return dict(row, result=sum(p.nbytes for p in net.parameters()))


def load(preset="wan2.1-t2v-1.3b", scratch=None):
    """Every layout written, then loaded as fp32 and as bf16, each in a process of its own."""
    rows, folder = [], Path(tempfile.mkdtemp(dir=scratch))
    print(f"{'layout':20s} {'':16s} {'seconds':>8s} {'files':>8s} {'result':>8s} {'anonymous peak':>15s} {'over result':>12s} "
          f"{'of files':>9s}   GB")
    try:
        for layout in ("original", "diffusers", "training container"):
            path = folder / ("w.pt" if layout == "training container" else layout)
            saved = fresh("save_transformer", preset=preset, layout=layout, path=str(path))
            files = sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()))
            for doing in ("save", "float32", "bfloat16"):
                row = dict(saved, result=files) if doing == "save" else fresh("load_transformer", path=str(path), dtype=doing)
                grown = row["peak"]["anonymous"] - row["before"]["anonymous"]
                extra = grown - (0 if doing == "save" else row["result"])
                mapped = row["peak"]["of files"] - row["before"]["of files"]
                doing = doing if doing == "save" else f"load as {doing}"
                rows.append(dict(layout=layout, doing=doing, files=files, **row, anonymous_growth=grown, beyond_result=extra, files_growth=mapped))
                print(f"{layout:20s} {doing:16s} {row['seconds']:8.1f} {files / 1e9:8.2f} {row['result'] / 1e9:8.2f} {grown / 1e9:15.2f} "
                      f"{extra / 1e9:12.2f} {mapped / 1e9:9.2f}", flush=True)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        shutil.rmtree(folder)
    return dict(preset=preset, unit="bytes", rows=rows)


@torch.no_grad()
def forward(preset, layers, latent, batch, dtype):
    """Peak memory of prompt, times and one forward with random weights -> measured, and estimated by the formula."""
    config, dtype = dataclasses.replace(dit.PRESETS[preset], layers=layers), getattr(torch, dtype)
    net = random_transformer(config).cast_weights(dtype).eval()
    context = torch.zeros(batch, 512, config.text_dim)
    context[:, :120] = torch.randn(batch, 120, config.text_dim)

    def sample(*latent):
        x, prompt = torch.randn(batch, config.in_channels, *latent), net.prompt(context)
        return net(x, net.times(torch.tensor([500.0]))[0], prompt)

    sample(1, *config.patch[1:])  # the libraries' own workspaces
    row = peak_of(lambda: sample(*latent))[1]
    return dict(row, measured=row["peak"]["anonymous"] - row["before"]["anonymous"],
                estimated=dit.activation_bytes(config, latent, batch, dtype, prompts=batch))


def activations():
    """The formula beside measurements on the CPU, for widths of the 1.3B and the 14B model and few layers (the peak is within one)."""
    rows = []
    small, large = "dc-wan2.1-t2v-1.3b", "dc-wan2.1-t2v-14b"
    for preset, latent, batch in ((small, (8, 22, 40), 1), (small, (4, 22, 40), 2), (large, (2, 22, 40), 1)):
        for dtype in ("float32", "bfloat16"):
            row = fresh("forward", preset=preset, layers=2, latent=latent, batch=batch, dtype=dtype)
            rows.append(dict(preset=preset, latent=latent, batch=batch, dtype=dtype, **row, ratio=row["estimated"] / row["measured"]))
            print(f"{preset:20s} {'x'.join(map(str, latent)):>8s} batch {batch} {dtype:8s}  measured {row['measured'] / 1e6:6.0f} MB  "
                  f"estimated {row['estimated'] / 1e6:6.0f} MB  ratio {rows[-1]['ratio']:.2f}", flush=True)
    return dict(layers=2, unit="bytes", rows=rows)


# ---------------------------------------------------------------------------------------------------- shortcuts


#: name -> arguments of sample.generate beyond the model's own
SHORTCUTS = {"full": {}, **{f"{n} steps": dict(steps=n) for n in (15, 10, 7)},
             **{f"guidance in {low:g} to {high:g}": dict(interval=(low, high)) for low, high in ((0.0, 0.9), (0.5, 1.0), (0.3, 0.9))},
             **{f"reuse {r:g}": dict(reuse=r) for r in (0.1, 0.2, 0.3)},
             "bf16": dict(dtype="bf16"), "fp8 products": dict(fp8=True)}


@torch.no_grad()
def shortcuts(prompts=32):
    """What the approximate shortcuts of guided.py and gpu/fp8.py cost on the adapted toy: how much of the network's work is left, how well the
    videos fit their prompts, and how near they are to those of the full run with the same noise."""
    words, rows, full = toy.held_out_prompts(prompts), [], None
    for name, more in SHORTCUTS.items():
        model = models.load_model("dc")
        more = dict(more)
        model.net.cast_weights(getattr(torch, {"bf16": "bfloat16"}.get(more.pop("dtype", None), "float32")))
        work = [0]
        model.net.register_forward_pre_hook(lambda module, args: work.__setitem__(0, work[0] + len(args[0])))
        videos = torch.stack(sample.videos(model, words, seed=0, **more))
        full = videos if full is None else full
        mse = (videos - full).div(2).square().mean((1, 2, 3, 4))
        fit = toy.prompt_fit(list(videos), words)
        row = dict(name=name, work=work[0] / (2 * model.steps * prompts), fit=fit["mean"], shape=fit["shape"],
                   psnr=None if not mse.all() else (-10 * mse.log10()).mean().item())
        rows.append(row)
        print(f"{name:24s} work {row['work']:4.0%}   fit {row['fit']:.3f}   shape {row['shape']:.2f}   "
              + (f"{row['psnr']:.1f} dB to the full run" if row["psnr"] else ""), flush=True)
    return dict(prompts=prompts, rows=rows)


# ---------------------------------------------------------------------------------------------------- command line

SUITES = {"toy": "results/bench_toy.json", "load": "results/load.json", "activations": "results/activations.json",
          "shortcuts": "results/shortcuts.json", "cpu": "results/bench_cpu.json", "gpu": "results/bench_gpu.json"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="toy", help="what to measure")
    parser.add_argument("--repeats", type=int, default=9, help="of --suite toy and cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="--suite gpu with tiny shapes on the CPU")
    parser.add_argument("--scratch", help="folder for the files of --suite load (default: the system's)")
    parser.add_argument("--out", help="where to write the results (default: results/...)")
    args = parser.parse_args(argv)
    if args.suite == "cpu":
        args.threads = args.threads or 1
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes started from here
    if args.suite == "gpu":  # writes after every row
        from bench import gpu
        return gpu.run(args.out or ("out/bench_gpu_dry_run.json" if args.dry_run else SUITES["gpu"]), args.dry_run)
    if args.suite == "cpu":
        from bench import cpu
    started = checkpoint.provenance()
    found = {"toy": lambda: dict(repeats=args.repeats, **toy_models(args.repeats)), "load": lambda: load(scratch=args.scratch),
             "activations": activations, "shortcuts": shortcuts, "cpu": lambda: cpu.run(args.repeats)}[args.suite]()
    out = Path(args.out or SUITES[args.suite])
    checkpoint.write_json(out, dict(**started, suite=args.suite, **found))
    if args.suite == "cpu":
        cpu.plot(found, out.with_suffix(".png"))


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
