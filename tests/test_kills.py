"""Runs that are killed (kill -9) at random moments, or whose disk fills up, end with the
tensors of one that was not.

    KILLS=50 python -m pytest -m slow tests/test_kills.py -s
"""
import functools
import os
import random
import re
import resource
import subprocess
import sys
import time

import pytest

import toy
from files import ROOT, video
from files.checkpoint import load_tensors
from training.entries import hash_tensors
from wan import tiny

KILLS = int(os.environ.get("KILLS", 50))
ADAPT = ["adapt.py", "--base", "wan2.1-t2v-1.3b", "--weights", "Wan2.1-T2V-1.3B", "dc_videogen",
         "--data", "clips", "--buckets", "64x64F32MS", "--frames", "8", "--device", "cpu"]
COMMANDS = {
    "ae.py train": ["ae.py", "train", "--preset", "toy-base", "--phases", "low", "--steps", "4",
                    "--batch", "1", "--save-every", "1"],
    "cache": [*ADAPT, "--stage", "cache"],
    "adapt.py": [*ADAPT, "--steps-align", "3", "--steps-head", "3", "--steps", "3", "--batch", "2",
                 "--accumulate", "1", "--rank", "2", "--sample-steps", "0", "--save-every", "1"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tiny Wan models, and clips with captions."""
    place = tiny.make(tmp_path_factory.mktemp("place"))
    for i in range(10):
        video.write_video(place / "clips" / f"{i}.mp4", toy.toy_batch(i, 1, 8, 64)[0][0], fps=16)
        (place / "clips" / f"{i}.txt").write_text(f"a cat and a dog number {i}")
    return place


def start(command, place, out, largest=resource.RLIM_INFINITY):
    """largest: bytes of a file that the run may write; more is as a full disk."""
    script, *words = command
    command = [sys.executable, str(ROOT / script), *words, "--out", str(out)]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest, largest))
    return subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            preexec_fn=limit)


def weights(out):
    """{name: hash of the tensors} of what a run leaves, but for its checkpoints. (Headers
    hold the log, and so seconds.)"""
    files = [p for p in out.rglob("*.safetensors") if "checkpoint-" not in str(p)]
    return {str(p.relative_to(out)): hash_tensors(load_tensors(p)[0]) for p in files}


def result(process):
    said = process.communicate()[1].decode()
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_runs_end_as_if_they_had_not_been(place, tmp_path, name):
    command, begun = COMMANDS[name], time.perf_counter()
    result(start(command, place, tmp_path / "whole"))
    assert weights(tmp_path / "whole")
    took, rng, kills, rounds = time.perf_counter() - begun, random.Random(0), 0, 0
    while kills < KILLS:
        rounds += 1
        while True:
            process = start(command, place, tmp_path / f"killed{rounds}")
            try:
                process.wait(rng.uniform(0.2, 0.8) * took)  # a resumed run is shorter
                break
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
                process.communicate()
        result(process)
        killed = weights(tmp_path / f"killed{rounds}")
        assert killed == weights(tmp_path / "whole")
        left = [p.name for p in (tmp_path / f"killed{rounds}").rglob(".*")]
        assert not [name for name in left if "~" in name or name == ".lock"]
    print(f"{name}: {kills} kills in {rounds} runs, all equal to the bit")


@pytest.mark.slow
def test_a_run_whose_disk_fills_up_goes_on_later(place, tmp_path):
    """It names the file and the size needed; the checkpoint before stays."""
    command, out = COMMANDS["ae.py train"], tmp_path / "full"
    result(start(command, place, tmp_path / "whole"))
    process = start(command, place, out)
    while not list(out.rglob("checkpoint-0000001")):
        time.sleep(0.1)
    process.kill()
    process.communicate()
    before = [p for p in out.rglob("*") if "checkpoint-" in str(p.parent)]
    for _ in range(2):  # also on a disk that is still full
        process = start(command, place, out, largest=1 << 20)
        said = process.communicate()[1].decode()
        assert process.returncode == 1
        assert re.search(r"error: the disk is full while writing \S*checkpoint-000000\d "
                         r"\([\d.,]+ MB are needed\): free some space", said), said
        assert "Traceback" not in said and all(p.exists() for p in before)
    result(start(command, place, out))
    assert weights(out) == weights(tmp_path / "whole")
