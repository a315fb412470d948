"""How fast: base and adapted model side by side, in one run, on one machine.

Machines are shared and noisy, so only ratios within one run are quoted. The two models take turns, and medians are compared.

    python bench.py --suite toy     the embedded models on this machine, about a minute -> results/bench_toy.json
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting threads slow every other process down; must precede torch

import argparse
import statistics
import time

import torch

import checkpoint
import dit
import sample


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
def toy(repeats):
    """Transformer pass, whole guided loop, decode, and prompt to pixels, for both toy models."""
    models = {name: sample.load_model(name) for name in ("base", "dc")}
    size, frames = models["dc"].size, models["dc"].frames
    tasks, tokens, latents = {}, {}, {}
    for name, model in models.items():
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
    rows = {what: {name: seconds[name, what] for name in models} for _, what in tasks}
    for row in rows.values():
        row["ratio"] = row["base"] / row["dc"]
    print(f"{frames} frames of {size[0]}x{size[1]}, {models['dc'].steps} steps with guidance; tokens: base {tokens['base']}, "
          f"adapted {tokens['dc']}, ratio {tokens['base'] / tokens['dc']:.1f}")
    for what, row in rows.items():
        print(f"  {what:18s} base {row['base'] * 1e3:8.1f} ms   adapted {row['dc'] * 1e3:8.1f} ms   {row['ratio']:.2f}x")
    return dict(tokens=tokens, median_seconds=rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--suite", choices=["toy"], default="toy", help="what to measure")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--out", default="results/bench_toy.json")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    checkpoint.write_json(args.out, dict(**checkpoint.provenance(), suite=args.suite, repeats=args.repeats, **toy(args.repeats)))


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
