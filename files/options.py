"""Command lines that take nothing without sense: every number has a range, every device
is there, and no mode ignores an option.

    parser = options.Parser(description="...")
    parser.add_argument("--steps", type=options.whole(1, 1000))
    args, given = parser.parse(argv)            # given: names of the options that were there
    parser.refuse("--plan", given - {"plan", "size"})

All that is wrong is one UserError that names the option.
"""
import argparse
import math

import torch

from files.errors import UserError

SEED = (0, 2**63 - 1)  # what torch and numpy both take
MAY_BE_EMPTY = {"prompt", "negative"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors, and which knows what was given."""

    def error(self, message):
        raise UserError(f"{message} (--help says more).")

    def parse(self, argv=None):
        """-> (arguments, names of those that were given, be it with their default)"""
        actions = {a.dest: a for a in self._actions if a.default is not argparse.SUPPRESS}
        args = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(actions)))
        given = {name for name in actions if getattr(args, name) is not None}
        for name in given - MAY_BE_EMPTY:
            value = getattr(args, name)
            if value == "" or (isinstance(value, list) and "" in value):
                option = actions[name].option_strings[-1:] or [name]
                raise UserError(f"{option[0]} is empty: give it a value, or leave it out.")
        for name in actions.keys() - given:
            default = actions[name].default
            if isinstance(default, str) and actions[name].type:
                default = actions[name].type(default)
            setattr(args, name, default)
        return args, given

    def refuse(self, mode, unused):
        """UserError for an option that this mode would ignore."""
        if unused:
            option = min(unused).replace("_", "-")
            raise UserError(f"--{option} says nothing to {mode}: leave it out.")

    def refuse_gone(self, gone):
        """Options that went, {"--old": "what to use instead"}: each is refused in one
        sentence. They are not in --help."""
        class Gone(argparse.Action):
            def __call__(self, parser, namespace, values, option):
                raise UserError(f"{option} is gone: {gone[option]}.")

        for option in gone:
            self.add_argument(option, nargs="*", action=Gone, default=argparse.SUPPRESS,
                              help=argparse.SUPPRESS)


# -------------------------------------------------------------- options that went

IN_BASES = "other values are a row of BASES in training/bases.py"
NOT_GROWN = "train the deep toy from nothing, with --align-to the base's autoencoder"
SOLVER_STEPS = "fewer --steps come nearer to the full run at the same work"
#: command -> {option: what to use instead}
GONE = {
    "sample.py": {
        "--guidance-interval": SOLVER_STEPS,
        "--reuse": SOLVER_STEPS,
        "--cfg-batch": "both passes are one batch where one is too small to fill the machine",
        "--no-cfg-batch": "--slow switches what makes a step fast off",
        "--graph": "a step is one CUDA graph where it can be",
        "--no-graph": "use --slow, the plain path",
        "--lora-high": "use --lora FILE:STRENGTH:high",
        "--lora-low": "use --lora FILE:STRENGTH:low",
        "--tile": "use --memory GIB, from which the tile is chosen",
        "--noise": "in Python, sample.generate(noise=...) takes it"},
    "adapt.py": {
        "--no-cache": "use --cache memory",
        "--no-samples": "use --sample-steps 0",
        "--alpha": "it is twice --rank",
        "--align-shards": "stage 1a takes the first three of --shards",
        "--workers": "two threads read clips (WORKERS in training/bases.py)",
        "--clips-align": IN_BASES, "--lr-align": IN_BASES, "--batch-align": IN_BASES,
        "--warmup-head": IN_BASES, "--decay": IN_BASES, "--clip": IN_BASES, "--export": IN_BASES},
    "ae.py train": {
        "--measure": "the step was timed by this script as of commit 1fd6ad8",
        "--grow-from": NOT_GROWN, "--grow-steps": NOT_GROWN, "--grow-clips": NOT_GROWN,
        "--compile": "no step was ever measured with it: leave it off",
        "--perceptual": "the best network that is installed is used; --losses perceptual=0 is "
                        "none",
        "--length": "--overfit takes the first 80 frames"},
}

# ------------------------------------------------------------------ types of options

#: what --dtype takes
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def whole(low, high=10**9):
    """argparse type: a whole number of a range."""
    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {low} to {high}")
        return value

    return convert


def real(low, high=math.inf, above=False):
    """argparse type: a number of a range, which `above` does not contain its lower end."""
    said = f"above {low:g}" if above else f"of {low:g} or more"
    if high < math.inf:
        said = f"above {low:g}, up to {high:g}" if above else f"from {low:g} to {high:g}"

    def convert(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        fits = low <= value <= high and math.isfinite(value) and not (above and value == low)
        if not fits:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {said}")
        return value

    return convert


seed = whole(*SEED)
threads = whole(1, 4096)
learning_rate = real(0, 1, above=True)


def device(text):
    """argparse type: cpu, cuda, cuda:1, ... -> torch.device that there is."""
    try:
        found = torch.device(text)
        torch.zeros(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise argparse.ArgumentTypeError(
            f"there is no device {text!r} that can be used: use {' or '.join(there)}") from e
    return found
