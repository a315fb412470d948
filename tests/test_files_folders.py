"""Two runs never harm each other: one holds the folder, and temporary files have an owner."""
import os
import shutil
import signal
import subprocess
import sys

import pytest

from experiments import adaptation, temporal
from files import ROOT, checkpoint, folders
from files.errors import UserError
from training import entries

HOLD = """
import sys, time
from pathlib import Path
from files import folders
lock = folders.Lock(sys.argv[1])
(Path(sys.argv[1]) / (folders.owned_prefix("x") + "left.json")).touch()
print(flush=True)
time.sleep(99)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder, and has a temporary file there."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


@pytest.mark.core
def test_a_folder_is_one_run_s_and_the_next_is_told_whose(tmp_path, other):
    with pytest.raises(UserError, match=f"{tmp_path} is in use by process {other.pid} on .* since .*: wait for it"):
        folders.Lock(tmp_path)


def test_a_killed_run_leaves_no_lock_and_its_temporary_files_go(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert len(list(tmp_path.glob(".x~*"))) == 1
    with folders.Lock(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    assert not any(tmp_path.iterdir())


def test_temporary_files_of_the_living_are_left_alone(tmp_path, other):
    folders.sweep(tmp_path)
    assert len(list(tmp_path.glob(".x~*"))) == 1
    with checkpoint.atomic_path(tmp_path / "a.json") as tmp:
        folders.sweep(tmp_path)
        tmp.write_text("{}")
    assert (tmp_path / "a.json").read_text() == "{}"


def test_a_killed_run_s_half_written_entries_go(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    left = next(tmp_path.glob(".x~*"))
    folder = entries.Entries(tmp_path, "latents", {}).folder
    folder.mkdir()
    left.rename(folder / left.name)
    entries.Entries(tmp_path, "latents", {})
    assert not any(folder.iterdir())


@pytest.mark.parametrize("main", [adaptation.main, temporal.main_compare])
def test_a_comparison_has_its_folder_to_itself(tmp_path, other, main):
    with pytest.raises(UserError, match=f"in use by process {other.pid}"):
        main(["--out", str(tmp_path)])


def test_within_a_process_too_and_again_after_release(tmp_path):
    lock = folders.Lock(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        folders.Lock(tmp_path)
    lock.release()
    with folders.Lock(tmp_path), folders.Lock(tmp_path, ".other"):
        pass


@pytest.mark.parametrize("below", ["file", "file/below"])
def test_a_file_is_no_folder(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="nothing can be written into the folder .*it is a file, or below one"):
        folders.writable(tmp_path / below)


def test_looking_leaves_nothing_behind(tmp_path):
    folders.writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    folders.writable(tmp_path / "a" / "b", keep=True)
    assert (tmp_path / "a" / "b").is_dir()
    folders.writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_room_on_the_disk_is_looked_at_before(tmp_path):
    folders.check_room(tmp_path / "new", 1000, "the checkpoints")
    with pytest.raises(UserError, match="the checkpoints need .* MB and .*new has .*: free some space"):
        folders.check_room(tmp_path / "new", 2 * shutil.disk_usage(tmp_path).total, "the checkpoints")


def test_names_as_long_as_the_disk_takes_them(tmp_path):
    checkpoint.write_json(tmp_path / ("猫" * 80 + ".json"), {})
