"""Numbers without sense, devices that are not there, and options that a mode ignores are refused."""
import pytest
import torch

from files import options
from files.errors import UserError

PARSER = options.Parser(prog="p")
for name, kind, default in [("steps", options.whole(1, 1000), 20), ("drop", options.real(0, 1), 0.1),
                            ("lr", options.learning_rate, None), ("seed", options.seed, 0),
                            ("device", options.device, "cpu")]:
    PARSER.add_argument(f"--{name}", type=kind, default=default)
PARSER.add_argument("--lora", action="append", default=[])
PARSER.add_argument("--slow", action="store_true")
PARSER.refuse_gone({"--old": "use --new"})


@pytest.mark.core
@pytest.mark.parametrize("option, bad", [
    ("steps", "0"), ("steps", "-1"), ("steps", "1001"), ("steps", "1.5"), ("steps", "nan"),
    ("steps", "1e2"), ("steps", ""), ("steps", "9" * 5000), ("drop", "-0.1"), ("drop", "1.1"),
    ("drop", "nan"), ("drop", "inf"), ("drop", "x"), ("lr", "0"), ("lr", "-1"), ("lr", "2"),
    ("seed", "-1"), ("seed", str(2**63)), ("device", "mps:7"), ("device", "xpu"), ("device", "meta"),
    ("device", "cuda:99"), ("device", "toaster"), ("device", "")])
def test_what_is_out_of_range_is_refused_by_its_name(option, bad):
    with pytest.raises(UserError, match=f"^argument --{option}: "):
        PARSER.parse([f"--{option}={bad}"])


def test_what_is_in_range_is_taken():
    args, given = PARSER.parse(["--steps", "1000", "--drop", "0", "--lr", "1", "--seed", str(2**63 - 1)])
    assert (args.steps, args.drop, args.lr, args.seed) == (1000, 0, 1, 2**63 - 1)
    assert given == {"steps", "drop", "lr", "seed"} and args.device == torch.device("cpu")
    torch.Generator().manual_seed(args.seed)


def test_given_is_what_was_there_also_with_its_default():
    args, given = PARSER.parse(["--steps", "20", "--lora", "a", "--lora", "b", "--slow"])
    assert given == {"steps", "lora", "slow"} and args.lora == ["a", "b"] and args.drop == 0.1
    with pytest.raises(UserError, match="--lora says nothing to a plan: leave it out"):
        PARSER.refuse("a plan", given & {"lora"})
    PARSER.refuse("a plan", given & {"drop"})
    assert PARSER.parse([])[1] == set() and PARSER.parse([])[0].lora == []


@pytest.mark.parametrize("words, says", [
    (["--old", "3"], "--old is gone: use --new"), (["--stepz", "3"], "unrecognized arguments: --stepz"),
    (["--steps"], "argument --steps: expected one argument")])
def test_other_complaints_are_one_sentence_too(words, says):
    with pytest.raises(UserError, match=says):
        PARSER.parse(words)


def test_an_empty_value_is_no_value():
    """A shell variable that was never set: to be told, not to be taken for the default. A
    prompt may be empty."""
    parser = options.Parser()
    parser.add_argument("--ae")
    parser.add_argument("--weights", nargs="+")
    parser.add_argument("--negative")
    for argv in (["--ae", ""], ["--weights", "a", ""]):
        with pytest.raises(UserError, match=f"^{argv[0]} is empty: give it a value"):
            parser.parse(argv)
    assert parser.parse(["--negative", ""])[0].negative == ""
