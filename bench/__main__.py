"""How fast and how large, measured on this machine, always beside something else.

    python -m bench --suite toy    base and adapted toy model, a minute
    python -m bench --suite cpu    fast path, plain path and diffusers on one thread of a
                                   processor, five minutes
    python -m bench --suite light  full and light decoders, a minute
    python -m bench --suite gpu    on one GPU, ten minutes
    python -m bench --suite full   the paper's speed-up at full width on a processor, half
                                   an hour; by parts with --only and --size

Each writes RESULTS/bench_SUITE.json; all but toy and light a plot beside it.
"""
from files import errors

errors.begin(__name__)  # before the slow imports: a Ctrl-C, waiting threads

import argparse
from pathlib import Path

import torch

from bench import cpu, full, gpu
from bench.harness import Report
from files import options


def main(argv=None):
    parser = options.Parser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--suite", choices=("toy", "cpu", "light", "gpu", "full"), default="toy")
    parser.add_argument("--repeats", type=options.whole(1, 10_000), default=7,
                        help="rounds, of which the median counts")
    parser.add_argument("--threads", type=options.threads, default=1, help="of the CPU")
    parser.add_argument("--results", default="out", help="folder for the report")
    parser.add_argument("--only", nargs="+", choices=full.PARTS, help="full: these parts (all)")
    parser.add_argument("--size", nargs="+", choices=full.sizes(), help="full: these sizes (all)")
    parser.add_argument("--seconds", type=options.real(0, 1e5, above=True), default=full.LONGEST,
                        help="full: that a block of a transformer may take")
    args, given = parser.parse(argv)
    if args.suite != "full":
        parser.refuse(f"--suite {args.suite}", given & {"only", "size", "seconds"})
    torch.set_num_threads(args.threads)
    path = Path(args.results) / f"bench_{args.suite}.json"
    if args.suite == "gpu":
        report = Report(path, gpu.device(), budget=570, suite="gpu", steps=gpu.STEPS)
        gpu.run(report)
    elif args.suite == "full":
        report = Report(path, suite="full", dtype=full.low_type(), clock="processor time")
        report.resume()
        full.run(report, args.repeats, args.only or full.PARTS, args.size, args.seconds)
    else:
        report = Report(path, suite=args.suite, repeats=args.repeats, clock="processor time")
        suites = {"cpu": cpu.run, "toy": cpu.toy_models, "light": cpu.light_decoders}
        suites[args.suite](report, args.repeats)
    print(f"wrote {path}")


if __name__ == "__main__":
    with errors.user_errors():
        main()
