"""Runs that are killed (kill -9) at random moments end with the tensors of one that was not.

    KILLS=50 python -m pytest -m slow tests/test_kills.py -s
"""
import os
import random
import subprocess
import sys
import time

import pytest

from files import ROOT
from files.checkpoint import load_tensors
from training.entries import hash_tensors

KILLS = int(os.environ.get("KILLS", 50))
COMMANDS = {
    "ae.py train": ["ae.py", "train", "--preset", "toy-base", "--phases", "low", "--steps", "6",
                    "--batch", "1", "--save-every", "1"],
    "adapt.py": ["adapt.py", "--base", "toy", "--shards", "1", "--steps-head", "3", "--steps", "3",
                 "--batch", "2", "--accumulate", "1", "--rank", "2", "--prompts", "2",
                 "--sample-steps", "0", "--save-every", "1"],
}


def start(command, out):
    return subprocess.Popen([sys.executable, *command, "--out", str(out)], cwd=ROOT,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


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
def test_killed_runs_end_as_if_they_had_not_been(tmp_path, name):
    command, begun = COMMANDS[name], time.perf_counter()
    result(start(command, tmp_path / "whole"))
    took, rng, kills, rounds = time.perf_counter() - begun, random.Random(0), 0, 0
    while kills < KILLS:
        rounds += 1
        while True:
            process = start(command, tmp_path / f"killed{rounds}")
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
