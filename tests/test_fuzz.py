"""Every option of the three scripts with bad values: each is refused in one sentence, nothing is
written, and nothing is read that takes long."""
import argparse

import pytest

import adapt
import ae
import sample
from files import errors, options

BAD = ["", "nan", "inf", "-1", "-1e9", "1e400", "9" * 400, "0x10", "1;2", "\x1b[31m", "\udce9", "..", "/", "\0"]
MODES = {
    "sample": (sample.main, ["--prompt", "a ring"]),
    "adapt": (adapt.main, ["--base", "toy"]),
    "train": (lambda argv: ae.main(["train", *argv]), []),
    "eval": (lambda argv: ae.main(["eval", *argv]), ["weights/toy.safetensors"]),
    "reconstruct": (lambda argv: ae.main(["reconstruct", *argv]), ["assets/bunny.mp4"]),
    "compare": (lambda argv: ae.main(["compare", *argv]), []),
}


class Parsed(Exception):
    """The options were taken."""


def parser_of(monkeypatch, main):
    """The parser that a command makes."""
    found = []

    def look(self, argv=None):
        found.append(self)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(options.Parser, "parse", look)
        main([])
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_no_number_without_sense_is_taken(monkeypatch, tmp_path, mode):
    """Options with a range or choices; free words (paths, prompts) are taken here and looked at later."""
    main, needed = MODES[mode]
    parser, parse, tried = parser_of(monkeypatch, main), options.Parser.parse, 0

    def stop(self, argv=None):
        parse(self, argv)
        raise Parsed

    monkeypatch.setattr(options.Parser, "parse", stop)
    monkeypatch.chdir(tmp_path)
    for action in parser._actions:
        free = not action.type and not action.choices or action.help == argparse.SUPPRESS
        words = ("lora", "continue_from")
        if free or not action.option_strings or action.nargs == 0 or action.dest in words:
            continue
        for bad in BAD:
            if action.dest == "name" and bad in ("nan", "inf", "-1", "-1e9", "1e400", "0x10", "1;2"):
                continue  # these are names
            with pytest.raises(errors.UserError) as e:
                main([*needed, f"{action.option_strings[-1]}={bad}"])
            assert "\n" not in str(e.value)
            tried += 1
    assert tried and not any(tmp_path.iterdir())
    print(f"{mode}: {tried} refused")
