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


# ------------------------------------------------------------------ types of options


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
