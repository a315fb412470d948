"""Every option of the three scripts with bad values: each is refused in one sentence, nothing is
written, and nothing is read that takes long."""
import argparse

import pytest
import torch
from PIL import Image

import adapt
import ae
import flow
import sample
import toy
from files import checkpoint, errors, options, video
from training import evaluate, loop
from training.clips import main as clips_main
from wan import models, released
from wan.text import WanText

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


# ---------------------------------------------------------------- what options lead to


class Begun(Exception):
    """The expensive part was reached."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with bad files of every kind, and good ones beside them."""
    place = tmp_path_factory.mktemp("place")
    (place / "folder").mkdir()
    for suffix in ("safetensors", "pt", "mp4", "png", "csv", "tar", "json"):
        (place / f"empty.{suffix}").touch()
        (place / f"words.{suffix}").write_text("these are words\n" * 40)
    checkpoint.save_tensors(place / "other.safetensors", {"x": torch.zeros(3)})
    checkpoint.save_tensors(place / "nothing.safetensors", {})
    whole = (released.WEIGHTS / "toy.safetensors").read_bytes()
    (place / "cut.safetensors").write_bytes(whole[:-100])
    (place / "dead.safetensors").symlink_to("gone")
    video.write_video(place / "films" / "a.mp4", toy.toy_batch(0, 1, 40, 64)[0][0], fps=16)
    (place / "films" / "a.txt").write_text("a cat")
    Image.new("RGB", (64, 64)).save(place / "picture.png")
    return place


@pytest.fixture
def cheap(tiny_toy, place, monkeypatch):
    """Nothing expensive behind the options: that raises `Begun`."""
    def begun(*_, **__):
        raise Begun

    for owner, name in ((loop.Run, "fit"), (flow, "solve"), (models.Model, "encode"),
                        (models.Model, "decode"), (ae.VideoAutoencoder, "encode_stream"),
                        (evaluate, "evaluate"), (WanText, "encode")):
        monkeypatch.setattr(owner, name, begun)
    monkeypatch.chdir(place)


WEIGHTS = ["none", "", "folder", "empty.safetensors", "words.pt", "other.safetensors",
           "cut.safetensors", "dead.safetensors", "films/a.mp4", "x" * 300]
FOLDERS = ["words.json", "words.json/below", "/proc/a", "x" * 300, "/dev/null"]
CLIPS = ["none", "", "folder", "empty.mp4", "words.csv", "words.tar", "other.safetensors",
         "x" * 300, "\udce9"]
PICTURES = ["none", "", "folder", "empty.png", "words.png", "films/a.mp4", "x" * 300, "/dev/null"]
PROMPTS = ["", " ", "\0", "\x1b[31m", "\udce9", "xyzzy", "word " * 5000]
FILES = ["folder", "words.json/below.json", "/proc/a.json", "x" * 300]


def paths():
    """(command, arguments, option, bad values): each is to be refused."""
    s = ["--prompt", "a ring", "--frames", "8", "--steps", "2"]
    wan = [*s, "--model", "wan2.1-t2v-1.3b"]
    tiny = [*wan, "--weights", "TINY/Wan2.1-T2V-1.3B", "--size", "32x48"]
    adapted = ["--base", "wan2.1", "--device", "cpu", "--weights", "TINY/Wan2.1-T2V-1.3B",
               "TINY/dc_videogen"]
    clips = ["--data", "films", "--buckets", "64x64F32MS", "--frames", "8"]
    train = ["train", "--steps", "2"]
    film = [*train, "--preset", "small", "--data", "films"]
    made = ["WEIGHTS/toy.safetensors"]
    scan = ["films", "--size", "32x32"]
    yield sample.main, [], "--prompt", PROMPTS
    yield sample.main, s, "--model", WEIGHTS
    yield sample.main, s, "--lora", WEIGHTS
    yield sample.main, s, "--image", PICTURES
    yield sample.main, [*s, "--image", "PICTURE"], "--last-image", PICTURES
    yield sample.main, [], "--decode", WEIGHTS
    yield sample.main, s, "--out", FOLDERS
    yield sample.main, wan, "--weights", WEIGHTS
    yield sample.main, tiny, "--lora", WEIGHTS
    yield sample.main, tiny, "--text-cache", ["folder", "words.safetensors", "cut.safetensors"]
    yield sample.main, s, "--size", ["16384x16384"]
    yield sample.main, tiny, "--size", ["16384x16384"]
    yield ae.main, train, "--size", ["1x1", "31x33", "16384x16384"]
    yield ae.main, ["eval", *made, "--data", "films"], "--size", ["1x1", "5x64", "65x65"]
    yield ae.main, ["reconstruct", "films/a.mp4"], "--size", ["1x1", "5x64"]
    yield adapt.main, [], "--ae", WEIGHTS
    yield adapt.main, [], "--out", FOLDERS
    yield adapt.main, [], "--cache", FOLDERS
    yield adapt.main, ["--score"], "--results", FILES
    yield adapt.main, [], "--continue-from", WEIGHTS
    yield adapt.main, ["--base", "wan2.1", *clips], "--weights", WEIGHTS
    yield adapt.main, [*adapted, "--buckets", "64x64F32MS", "--frames", "8"], "--data", CLIPS
    yield adapt.main, [*adapted, *clips], "--ae", WEIGHTS
    yield adapt.main, [*adapted, *clips], "--cache", FOLDERS
    yield adapt.main, [*adapted, *clips], "--buckets", ["", "0F32MS", "480F0MS", "480F33MS", "x"]
    yield adapt.main, [*adapted, *clips], "--continue-from", WEIGHTS
    yield ae.main, train, "--out", FOLDERS
    yield ae.main, train, "--start", WEIGHTS
    yield ae.main, train, "--inflate", WEIGHTS
    yield ae.main, train, "--align-to", WEIGHTS
    yield ae.main, train, "--overfit", CLIPS
    yield ae.main, [*train, "--preset", "small"], "--data", CLIPS
    yield ae.main, film, "--cache", FOLDERS
    yield ae.main, ["eval", *made], "--data", CLIPS
    yield ae.main, ["eval", *made, "--data", "films", "--size", "64x64"], "--base", WEIGHTS
    yield ae.main, ["eval", *made, "--data", "films", "--size", "64x64"], "--results", FILES
    yield ae.main, ["reconstruct", "films/a.mp4"], "--weights", WEIGHTS
    yield ae.main, ["reconstruct", "films/a.mp4"], "--out", FOLDERS
    yield ae.main, ["compare"], "--data", ["none", "", "folder", "x" * 300, "\udce9"]
    yield ae.main, ["compare", "--data", "films"], "--out", FOLDERS
    yield ae.main, ["eval"], "", WEIGHTS
    yield ae.main, ["reconstruct"], "", CLIPS
    yield clips_main, [], "", CLIPS
    yield clips_main, scan, "--out", FILES
    yield clips_main, scan, "--index", FILES
    yield clips_main, ["films"], "--size", ["16384x16384", "65x65"]
    yield clips_main, ["films"], "--frames", ["10000", "41"]


def listing(place):
    """Every file below, with its size and time of change; but for what is known of the clips
    that were looked at, which is kept whatever comes of it."""
    files = [p for p in place.rglob("*") if p.is_file() and p.name != "clips-index.json"]
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


@pytest.mark.slow
@pytest.mark.parametrize("row", list(paths()), ids=lambda row: f"{row[0].__module__} {row[1]} {row[2]}")
def test_no_file_without_sense_is_taken(cheap, place, tiny_folders, row):
    """Missing, empty, cut off, of another kind, a folder, a name that cannot be: refused in
    one sentence before the expensive part, and nothing is written."""
    main, argv, option, values = row
    names = {"TINY": str(tiny_folders), "WEIGHTS": str(released.WEIGHTS), "PICTURE": "picture.png"}
    for name, path in names.items():
        argv = [word.replace(name, path) for word in argv]
    before, wrong = listing(place), []
    for bad in values:
        words = [option, bad] if option else [bad]
        try:
            main([*argv, *words])
            wrong.append((bad, "status 0"))
        except SystemExit as e:
            wrong.append((bad, f"exit {e.code}"))
        except Exception as e:
            told, *listed = (errors.sentence(e) or "").strip().splitlines() or [""]
            # only files that are missing are listed, with the commands that fetch them
            if not told or (listed and not told.endswith("missing are")):
                wrong.append((bad, f"{type(e).__name__} {e}"[:300]))
        if listing(place) != before:
            wrong.append((bad, f"wrote {listing(place).keys() - before.keys()}"))
            before = listing(place)
    assert not wrong, "\n".join(map(str, wrong))
