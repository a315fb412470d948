"""Reading and writing weights safely.

Every weight file of the project goes through this file, in both directions:

* reading: safetensors, or `torch.load(weights_only=True)`. Nothing is ever unpickled freely, so a file that
  tries to run code is refused, not run.
* writing: to a temporary file beside the target, then one atomic rename. A full disk or a `kill -9` leaves
  either the old file or the new one, never half of one.
* one tensor at a time, for models that fill the memory of the machine: `open_tensors` says what a file, or a folder of
  shards, holds (`Stored`: shape, dtype, and how to fetch it); `load_strict` and `save_tensors` fetch, use and forget
  each. Renaming, converting and merging are functions on that dict, and read nothing yet.

    tensors, metadata = open_tensors("Wan2.1-T2V-14B")      # 57 GB in six files; a few milliseconds
    tensors["head.head.weight"].shape                       # (64, 5120)
    tensors["head.head.weight"].read()                      # now this one is in memory

It also holds `UserError`: a mistake that the user can mend. Its text is one sentence that says what to do; scripts print it
without a traceback and exit with status 1 (`user_errors`).
"""
import argparse
import contextlib
import datetime
import errno
import json
import os
import pickle
import platform
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from files import ROOT


class UserError(Exception):
    """A mistake the user can mend, told in one sentence that says what to do."""


@contextlib.contextmanager
def user_errors():
    """Wrap a script's `main`: what the user can mend becomes one sentence on stderr and exit status 1.

    Set `DEBUG=1` to see the traceback instead.
    """
    try:
        yield
        return
    except UserError as e:
        error, message = e, str(e)
    except torch.cuda.OutOfMemoryError as e:
        error, message = e, "out of GPU memory: lower --frames, --size or --batch, or use --device cpu."
    except OSError as e:
        error = e
        if e.errno == errno.ENOSPC:
            message = f"the disk is full while writing {e.filename or 'a file'}: free some space and run it again."
        elif e.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            message = (f"{e.filename} cannot be written or read (permission denied or read-only): "
                       "choose another folder with --out.")
        elif isinstance(e, FileNotFoundError):
            message = f"{e.filename} does not exist: check the path."
        else:
            message = str(e)
    except KeyboardInterrupt:
        print("stopped; finished work is kept.", file=sys.stderr)
        raise SystemExit(130)
    if os.environ.get("DEBUG"):
        raise error
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def refuse_options(parser, gone):
    """Options that went, {"--old": "what to use instead"}: each is refused in one sentence.
    They are not in --help."""
    class Gone(argparse.Action):
        def __call__(self, parser, namespace, values, option):
            raise UserError(f"{option} is gone: {gone[option]}.")

    for option in gone:
        parser.add_argument(option, nargs="*", action=Gone, help=argparse.SUPPRESS)


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path` (same suffix); on success it replaces `path`, on failure it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(fd)
    os.chmod(name, 0o644)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path):
    """A JSON file that holds an object -> dict."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: check the path.")
    try:
        return dict(json.loads(Path(path).read_text()))
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is not valid JSON ({e}): get this file again.") from e


def provenance():
    """Where a measured number comes from: date, commit, hardware, versions. Part of every file in results/."""
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return dict(date=datetime.date.today().isoformat(), commit=git.stdout.strip() or "unknown", torch=torch.__version__,
                python=platform.python_version(), cpu=f"{cpu}, {os.cpu_count()} cores", threads=torch.get_num_threads(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


# ------------------------------------------------------------------------------------------------------------- tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,  # safetensors' names
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


class Stored(NamedTuple):
    """A tensor that is still in its file. Nothing is kept: every `read()` fetches it anew."""
    shape: tuple
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    file: str = ""  # its name, for messages


def read(tensor):
    """The tensor itself, whether it is one already or still `Stored`."""
    return tensor.read() if isinstance(tensor, Stored) else tensor


def save_tensors(path, tensors, metadata=None):
    """Write a flat dict of tensors (or `Stored`) as safetensors, atomically. `metadata`: a JSON-able dict, kept in the header.

    The format is a length, a JSON header, and the bytes of the tensors in a row, so it is written here tensor by tensor:
    of what is on a GPU, in another file or to be converted, one tensor at a time is in memory.
    """
    order = sorted(tensors, key=lambda k: (-tensors[k].dtype.itemsize, k))  # wide types first: everything stays aligned
    names, header, end = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    if metadata:
        header["__metadata__"] = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    for name in order:
        start, end = end, end + prod(tensors[name].shape) * tensors[name].dtype.itemsize
        header[name] = dict(dtype=names[tensors[name].dtype], shape=list(tensors[name].shape), data_offsets=[start, end])
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with atomic_path(path) as tmp, open(tmp, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for name in order:
            f.write(read(tensors[name]).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def save_shards(folder, tensors, metadata=None, shard_bytes=5e9, stem="diffusion_pytorch_model"):
    """Write `tensors` into a folder as the hubs have it: one file, or files of at most `shard_bytes` and an index of them."""
    folder, shards, room = Path(folder), [], 0
    for name, tensor in tensors.items():
        size = prod(tensor.shape) * tensor.dtype.itemsize
        if not shards or size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
    n = len(shards)
    files = [f"{stem}.safetensors"] if n == 1 else [f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    index = folder / f"{stem}.safetensors.index.json"
    there = {f.name for pattern in ("*.safetensors", "*.index.json") for f in folder.glob(pattern)}
    others = there - {*files, *([index.name] if n > 1 else [])}
    if others:
        raise UserError(f"{folder} already holds other weights ({min(others)}), and together they could not be read: "
                        "choose an empty folder.")
    for file, shard in zip(files, shards):
        save_tensors(folder / file, shard, metadata)
    if n > 1:
        size = sum(prod(t.shape) * t.dtype.itemsize for t in tensors.values())
        write_json(index, {"metadata": {"total_size": size}, "weight_map": {k: file for file, shard in zip(files, shards) for k in shard}})


def open_tensors(path):
    """Look into a weight file, or a folder of them, without reading the tensors -> ({name: Stored}, metadata dict).

    path: a `.safetensors` file, a torch container (`unwrap`; mapped into memory, so that only what is read is fetched), an
    index (`*.index.json`) of shards, or a folder with such an index or with one weight file. Metadata: as in
    `load_tensors`, of the last shard. UserError for whatever is missing, truncated or mixed up.
    """
    path = Path(path)
    tensors, metadata = {}, {}
    index = _index_in(path)
    where = _read_index(index) if index else None
    for file in sorted({index.parent / name for name in where.values()}) if index else [_only_file(path)]:
        if index and not file.is_file():
            raise UserError(f"{file} does not exist, but {index.name} names it: the download is not complete, get this file too.")
        found, metadata = _open_file(file)
        for name in tensors.keys() & found.keys():
            raise UserError(f"{name} is in both {tensors[name].file} and {file.name} of {file.parent}: these are shards of two "
                            "models, get them again.")
        tensors |= found
    for name in sorted(where.keys() ^ tensors.keys()) if index else ():
        raise UserError(f"{name} is {'only in the shards' if name in tensors else 'in none of the shards'}, against {index}: "
                        "these are shards of another model, get them again.")
    return tensors, metadata


def _index_in(path):
    """The index of shards that `path` is, or that the folder `path` holds; None without one."""
    if path.name.endswith(".index.json"):
        return path
    found = sorted(path.glob("*.index.json"))
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} indexes ({', '.join(f.name for f in found)}): give one of these files instead.")
    return found[0] if found else None


def _read_index(index):
    """Index file -> {tensor name: file name}"""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index} is not an index of shards (it has no weight_map): get this file again.")
    return where


def _only_file(path):
    """The weight file that `path` is, or the only one in the folder `path`."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give the path of a weight file.")
    if path.is_file():
        return path
    for suffixes in ((".safetensors",), (".pt", ".pth", ".bin")):
        files = [f for f in path.iterdir() if f.suffix in suffixes]
        files = [f for f in files if f.stem in ("diffusion_pytorch_model", "model")] or files  # a LoRA or text cache may lie beside it
        if len(files) == 1:
            return files[0]
        if files:
            raise UserError(f"{path} holds {len(files)} {'/'.join(suffixes)} files and no index: give the path of the right file.")
    raise UserError(f"{path} holds no weight file: give the folder or the file with the weights.")


def _open_file(file):
    """One weight file -> ({name: Stored}, metadata)"""
    if file.suffix != ".safetensors":
        tensors = unwrap(load_pickle(file, mmap=True))
        return {k: Stored(tuple(v.shape), v.dtype, lambda v=v: v, file.name) for k, v in tensors.items()}, {}

    def fetch(name):  # opened anew for each tensor (0.6 ms): the pages of earlier ones do not stay mapped
        with _safetensors(file) as f:
            return f.get_tensor(name)

    tensors = {}
    with _safetensors(file) as f:
        for name in f.keys():
            entry = f.get_slice(name)
            if entry.get_dtype() not in DTYPES:
                raise UserError(f"{name} in {file} has the type {entry.get_dtype()}, which is not supported: "
                                "use bf16, fp16 or fp32 weights.")
            tensors[name] = Stored(tuple(entry.get_shape()), DTYPES[entry.get_dtype()], lambda name=name: fetch(name), file.name)
        return tensors, _metadata(f)


@contextlib.contextmanager
def _safetensors(path):
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (SafetensorError, ValueError, RuntimeError) as e:
        raise UserError(f"{path} is not a complete safetensors file ({e}): download or copy it again.") from e


def _metadata(f):
    return {k: _parse(v) for k, v in (f.metadata() or {}).items()}


def load_tensors(path):
    """Read one weight file whole -> (flat dict of CPU tensors in their stored dtype, metadata dict).

    `.safetensors` by its own reader; anything else as a torch container with `weights_only=True`, unwrapped by
    `unwrap`. Metadata values that are JSON are parsed. Raises UserError for a missing, truncated or unsafe file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path of a weight file.")
    if path.suffix == ".safetensors":
        with _safetensors(path) as f:
            return {k: f.get_tensor(k) for k in f.keys()}, _metadata(f)
    return unwrap(load_pickle(path)), {}


def load_pickle(path, mmap=False):
    """`torch.load` of tensors and plain containers only; a pickle that would run code is refused with a UserError.

    mmap: leave the tensors in the file until they are used (files of before 2020, which are no zip archives, cannot).
    """
    with open(path, "rb") as f:
        try:
            if mmap and zipfile.is_zipfile(f):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            f.seek(0)
            return torch.load(f, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as e:
            raise UserError(f"{path} is damaged or holds more than tensors, and unpickling it could run code, so it "
                            "was not loaded: get the file again from a source you trust, or as .safetensors.") from e
        except MemoryError:
            raise
        except Exception as e:                 # damaged files fail in a dozen ways: OSError, IndexError, struct.error
            raise UserError(f"{path} is not a complete torch checkpoint (truncated?): get the file again.") from e


WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"}


def unwrap(container):
    """Official training container -> bare state dict (spec dc-ae-v 5.2, wan 3.2).

    `ema_model_state_dict` is `{decay: state_dict}` and wins (first entry), then `model_state_dict`, then `state_dict`,
    then the dict itself. The wrappers of distributed training are removed from the names, wherever they stand.
    """
    sd = container
    if not isinstance(sd, dict):
        raise UserError("this file holds no state dict: give a model's weight file.")
    if sd.get("ema_model_state_dict"):
        sd = next(iter(sd["ema_model_state_dict"].values()))
    elif isinstance(sd.get("model_state_dict"), dict):
        sd = sd["model_state_dict"]
    elif isinstance(sd.get("state_dict"), dict):
        sd = sd["state_dict"]
    tensors = {}
    for name, value in sd.items():
        if isinstance(value, torch.Tensor):
            tensors[".".join(part for part in str(name).split(".") if part not in WRAPPERS)] = value
    if not tensors:
        raise UserError("this file holds no tensors: give a model's weight file.")
    return tensors


def load_strict(net, tensors, what):
    """Copy `tensors` (or `Stored`, fetched one at a time) into `net`; any float dtype widens or narrows to the parameter's own.
    Strict: a missing, unexpected or wrongly shaped tensor is a UserError that names it; nothing is copied then."""
    own = net.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        parts = [f"{len(m)} {w} (first: {m[0]})" for m, w in ((missing, "missing"), (extra, "unexpected")) if m]
        raise UserError(f"{what} does not fit this model: {' and '.join(parts)} tensors; "
                        "use the weights of the same model.")
    for name, value in own.items():
        given = tensors[name]
        if tuple(given.shape) != tuple(value.shape):
            place = f" in {given.file}" if isinstance(given, Stored) and given.file else ""
            raise UserError(f"{what} does not fit this model: {name} has shape {list(given.shape)}{place}, "
                            f"expected {list(value.shape)}; use the weights of the same model.")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(read(tensors[name]))
    return net


def _parse(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
