"""Folders that several runs may meet in: who holds one, is there room, and whose
temporary files are these.

    with folders.lock("out/adapt"):          # one process at a time; the next is told who
        ...

A lock (flock) ends with its process, however that ends, so a killed run leaves none.
Temporary files have their owner's process in their names: what the dead left is removed
by `sweep`, what the living write is left alone.
"""
import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

from files.errors import UserError

HOST = re.sub(r"\W", "", socket.gethostname())[:20]
OWNED = re.compile(r"\..*~(\w*)~(\d+)~")  # of a temporary file: host, process


def owned_prefix(path):
    """What the name of a temporary file of this process for `path` begins with."""
    return f".{Path(path).stem[:40]}~{HOST}~{os.getpid()}~"


def sweep(folder):
    """Remove the temporary files of processes of this machine that have ended."""
    for left in Path(folder).glob(".*~*~*~*"):
        owner = OWNED.match(left.name)
        if owner and owner[1] == HOST and not is_alive(int(owner[2])):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Locked(UserError):
    """Another run holds the folder."""


class Lock:
    """This process has `folder` to itself, from now until `release` (or its end)."""

    def __init__(self, folder, name=".lock"):
        self.fd = None
        writable(folder, keep=True)
        self.file = Path(folder) / name
        while self.fd is None:
            fd = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                holder = os.pread(fd, 500, 0).decode(errors="replace").strip()
                os.close(fd)
                if e.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    return  # a disk without locks
                raise Locked(f"{folder} is in use by {holder or 'another process'}: wait for "
                                "it, end it, or choose another --out.") from None
            self.fd = fd
            if not self.is_current():  # removed by whom we waited for
                os.close(fd)
                self.fd = None
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, this_process().encode(), 0)
        sweep(folder)

    def is_current(self):
        try:
            return os.path.samestat(os.stat(self.file), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    def release(self):
        if self.fd is not None:
            with contextlib.suppress(OSError):
                if self.is_current():
                    self.file.unlink()
            os.close(self.fd)
            self.fd = None

    __del__ = release

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()


def this_process():
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:300]
    since = time.strftime("%Y-%m-%d %H:%M")
    return f"process {os.getpid()} on {socket.gethostname()} ({command}; since {since})"


def writable(folder, keep=False):
    """UserError now where nothing can be written into this folder, not after the work.
    One that is not there yet is made only if it is to be kept: work that fails leaves
    none behind."""
    folder = Path(folder)
    made = [p for p in (folder, *folder.parents) if not keep and not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        reason = e.strerror.lower()
        if e.errno in (errno.EEXIST, errno.ENOTDIR):
            reason = "it is a file, or below one"
        raise UserError(f"nothing can be written into the folder {folder} ({reason}): choose "
                        "another one.") from e
    finally:
        for path in made:  # the innermost first
            with contextlib.suppress(OSError):
                path.rmdir()


def writable_file(path):
    """UserError now where no file of this name can be written."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, but the name of a file is needed: choose one in it.")
    writable(Path(path).parent)


def free_name(folder, name, settings):
    """FOLDER/NAME, with a number behind it where NAME.json there tells of a result that was
    made with other settings (plain values, as JSON gives them back)."""
    for number in itertools.count(1):
        path = Path(folder) / (name if number == 1 else f"{name}-{number}")
        try:
            told = json.loads(Path(f"{path}.json").read_text()).get("settings")
        except FileNotFoundError:
            return path
        except (ValueError, AttributeError):  # somebody else's
            continue
        if told == settings:
            return path


def check_room(folder, need, what):
    """UserError now, not after a night, where the disk of `folder` has no room for so
    many bytes."""
    there = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents)
                 if p.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        raise UserError(f"{what} need {need / 1e6:,.1f} MB and {folder} has {free / 1e6:,.1f}: "
                        "free some space, or use another folder.")
