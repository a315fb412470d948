"""Reading and writing weights safely.

Every weight file of the project goes through this file, in both directions:

* reading: safetensors, or `torch.load(weights_only=True)`. Nothing is ever unpickled
  freely, so a file that tries to run code is refused, not run.
* writing: to a temporary file beside the target, then one atomic rename. A full disk or
  a `kill -9` leaves either the old file or the new one, never half of one.
* one tensor at a time, for models that fill the memory of the machine: `open_tensors`
  says what a file, or a folder of shards, holds (`Stored`: shape, dtype, and how to
  fetch it); `load_strict` and `save_tensors` fetch, use and forget each. Renaming,
  converting and merging are functions on that dict, and read nothing yet.

    tensors, metadata = open_tensors("Wan2.1-T2V-14B")   # 57 GB in files, milliseconds
    tensors["head.head.weight"].shape                    # (64, 5120)
    tensors["head.head.weight"].read()                   # now this one is in memory
"""
import contextlib
import datetime
import json
import os
import pickle
import platform
import re
import struct
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from files import ROOT, folders
from files.errors import UserError, naming, printable, user_errors  # noqa: F401, also from here


# ------------------------------------------------------------------------- files of any kind


@contextlib.contextmanager
def atomic_path(path, size=0):
    """Yield a temporary path beside `path` (same suffix); on success it replaces
    `path`, on failure it is removed. size: bytes that will be needed, for the sentence
    about a full disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(path.suffix, folders.owned_prefix(path), path.parent)
    os.close(fd)
    os.chmod(name, 0o644)
    try:
        with naming(path, size):
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
    """Where a measured number comes from: date, commit, hardware, versions. Part of
    every file in results/."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    cpu = found[1].strip() if found else platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(date=datetime.date.today().isoformat(), commit=commit or "unknown",
                torch=torch.__version__, python=platform.python_version(),
                cpu=f"{cpu}, {os.cpu_count()} cores", threads=torch.get_num_threads(), gpu=gpu)


# -------------------------------------------------------------------------- writing tensors

DTYPES = {  # by safetensors' names
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool}


class Stored(NamedTuple):
    """A tensor that is still in its file. Nothing is kept: every `read()` fetches it
    anew."""
    shape: tuple
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    file: str = ""  # its name, for messages


def read(tensor):
    """The tensor itself, whether it is one already or still `Stored`."""
    return tensor.read() if isinstance(tensor, Stored) else tensor


def in_type(tensors, dtype):
    """{name: tensor} -> {name: `Stored`} of one type (None: each of its own), converted when
    it is written."""
    def converted(tensor):
        kind = dtype or tensor.dtype
        return Stored(tuple(tensor.shape), kind, lambda: tensor.to(kind))

    return {name: converted(tensor) for name, tensor in tensors.items()}


def size_of(tensor):
    """Bytes of a tensor or `Stored` one."""
    return prod(tensor.shape) * tensor.dtype.itemsize


def save_tensors(path, tensors, metadata=None):
    """Write a flat dict of tensors (or `Stored`) as safetensors, atomically.
    `metadata`: a JSON-able dict, kept in the header.

    The format is a length, a JSON header, and the bytes of the tensors in a row, so it
    is written here tensor by tensor: of what is on a GPU, in another file or to be
    converted, one tensor at a time is in memory.
    """
    # wide types first: everything stays aligned
    order = sorted(tensors, key=lambda k: (-tensors[k].dtype.itemsize, k))
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {}, 0
    if metadata:
        header["__metadata__"] = {
            k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    for name in order:
        tensor = tensors[name]
        start, end = end, end + size_of(tensor)
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[start, end])
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with atomic_path(path, len(head) + end) as tmp, open(tmp, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head)
        for name in order:  # without a name for it, which would keep it until the next one
            f.write(bytes_of(read(tensors[name])))


def bytes_of(tensor):
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


STEM = "diffusion_pytorch_model"  # of the files' names, on the hubs


def save_shards(folder, tensors, metadata=None, shard_bytes=5e9):
    """Write `tensors` into a folder as the hubs have it: one file, or files of at most
    `shard_bytes` and an index of them."""
    folder, shards, room = Path(folder), [], 0
    for name, tensor in tensors.items():
        size = size_of(tensor)
        if not shards or size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
    n, index = len(shards), folder / f"{STEM}.safetensors.index.json"
    files = [f"{STEM}-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    ours = {*files, index.name}
    if n == 1:
        files = [f"{STEM}.safetensors"]
        ours = set(files)
    for there in sorted((*folder.glob("*.safetensors"), *folder.glob("*.index.json"))):
        if there.name not in ours:
            raise UserError(f"{folder} already holds other weights ({there.name}), and together "
                            "they could not be read: choose an empty folder.")
    where = {}
    for file, shard in zip(files, shards):
        save_tensors(folder / file, shard, metadata)
        where |= dict.fromkeys(shard, file)
    if n > 1:
        total = sum(map(size_of, tensors.values()))
        write_json(index, {"metadata": {"total_size": total}, "weight_map": where})


# -------------------------------------------------------------------------- reading tensors


def open_tensors(path):
    """Look into a weight file, or a folder of them, without reading the tensors ->
    ({name: Stored}, metadata dict).

    path: a `.safetensors` file, a torch container (`unwrap`; mapped into memory, so
    that only what is read is fetched), an index (`*.index.json`) of shards, or a folder
    with such an index or with one weight file. Metadata: as in `load_tensors`, of the
    last shard. UserError for whatever is missing, truncated or mixed up.
    """
    path = Path(path)
    index = index_in(path)
    if index is None:
        return open_file(only_file(path))
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index} is not an index of shards (it has no weight_map): get this file "
                        "again.")
    where = {bare(name): file for name, file in where.items()}
    tensors, metadata = {}, {}
    for file in sorted({index.parent / name for name in where.values()}):
        if not file.exists() and not file.is_symlink():
            raise UserError(f"{file} does not exist, but {index.name} names it: the download is "
                            "not complete, get this file too.")
        found, metadata = open_file(file)
        for name in tensors.keys() & found.keys():
            raise UserError(f"{name} is in both {tensors[name].file} and {file.name} of "
                            f"{file.parent}: these are shards of two models, get them again.")
        tensors |= found
    for name in sorted(where.keys() ^ tensors.keys()):
        place = "only in the shards" if name in tensors else "in none of the shards"
        raise UserError(f"{name} is {place}, against {index}: these are shards of another model, "
                        "get them again.")
    return tensors, metadata


def index_in(path):
    """The index of shards that `path` is, or that the folder `path` holds; None without
    one."""
    if path.name.endswith(".index.json"):
        return path
    found = sorted(path.glob("*.index.json"))
    if len(found) > 1:
        names = ", ".join(f.name for f in found)
        raise UserError(f"{path} holds {len(found)} indexes ({names}): give one of these files "
                        "instead.")
    return found[0] if found else None


def only_file(path):
    """The weight file that `path` is, or the only one in the folder `path`."""
    if not existing(path).is_dir():
        return path
    for suffixes in ((".safetensors",), (".pt", ".pth", ".bin")):
        files = [f for f in path.iterdir() if f.suffix in suffixes]
        usual = [f for f in files if f.stem in (STEM, "model")]
        files = usual or files  # a LoRA or text cache may lie beside the usual one
        if len(files) == 1:
            return files[0]
        if files:
            raise UserError(f"{path} holds {len(files)} {'/'.join(suffixes)} files and no index: "
                            "give the path of the right file.")
    raise UserError(f"{path} holds no weight file: give the folder or the file with the weights.")


def existing(path):
    """The path, if there is something. UserError where there is not, or a link to
    nothing."""
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist: get the "
                        "file again.")
    if not path.exists():
        raise UserError(f"{path} does not exist: give the path of a weight file.")
    return path


def open_file(file):
    """One weight file -> ({name: Stored}, metadata)"""
    existing(file)

    def stored(name):  # opened anew for each tensor (0.6 ms): no pages stay mapped
        with open_safetensors(file) as f:
            return f.get_tensor(name)

    tensors = {}
    if file.suffix != ".safetensors":
        for name, value in unwrap(load_pickle(file, mmap=True)).items():
            shape = tuple(value.shape)
            tensors[name] = Stored(shape, value.dtype, lambda value=value: value, file.name)
        return tensors, {}
    with open_safetensors(file) as f:
        for name in f.keys():
            entry = f.get_slice(name)
            dtype, shape = entry.get_dtype(), tuple(entry.get_shape())
            if dtype not in DTYPES:
                raise UserError(f"{name} in {file} has the type {dtype}, which is not supported: "
                                "use bf16, fp16 or fp32 weights.")
            tensors[name] = Stored(shape, DTYPES[dtype], lambda name=name: stored(name), file.name)
        return renamed(tensors, bare, str(file)), metadata_of(f)


@contextlib.contextmanager
def open_safetensors(path):
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (SafetensorError, ValueError, RuntimeError) as e:
        raise UserError(f"{path} is not a complete safetensors file ({e}): download or copy it "
                        "again.") from e


def metadata_of(f):
    """The header's metadata; values that are JSON are parsed."""
    found = {}
    for key, text in (f.metadata() or {}).items():
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


def load_tensors(path):
    """Read one weight file whole -> (flat dict of CPU tensors in their stored dtype,
    metadata dict).

    `.safetensors` by its own reader; anything else as a torch container with
    `weights_only=True`, unwrapped by `unwrap`. Metadata values that are JSON are
    parsed. Raises UserError for a missing, truncated or unsafe file.
    """
    path = existing(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the path of a weight file.")
    if path.suffix == ".safetensors":
        with open_safetensors(path) as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}
            return renamed(tensors, bare, str(path)), metadata_of(f)
    return unwrap(load_pickle(path)), {}


def load_pickle(path, mmap=False):
    """`torch.load` of tensors and plain containers only; a pickle that would run code
    is refused with a UserError.

    mmap: leave the tensors in the file until they are used (files of before 2020, which
    are no zip archives, cannot).
    """
    with open(path, "rb") as f:
        try:
            if mmap and zipfile.is_zipfile(f):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            f.seek(0)
            return torch.load(f, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as e:
            raise UserError(f"{path} is damaged or holds more than tensors, and unpickling it "
                            "could run code, so it was not loaded: get the file again from a "
                            "source you trust, or as .safetensors.") from e
        except MemoryError:
            raise
        except Exception as e:  # damaged files fail in a dozen ways: OSError, IndexError, ...
            raise UserError(f"{path} is not a complete torch checkpoint (truncated?): get the file "
                            "again.") from e


WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"}
HOLDERS = ("model.", "diffusion_model.")  # programs that keep a network inside of another one


def bare(name):
    """A tensor's name without what compilers, distributed training and other programs
    add to it: the same for weights and adapters, in every kind of file."""
    name = ".".join(part for part in str(name).split(".") if part not in WRAPPERS)
    while name.startswith(HOLDERS):
        name = name.partition(".")[2]
    return name


def renamed(tensors, spell, what="these weights"):
    """{spell(name): tensor}. UserError where two names become one."""
    names = {}
    for key in tensors:
        if names.setdefault(spell(key), key) != key:
            raise UserError(f"{what} hold {spell(key)} twice, as {names[spell(key)]} and as "
                            f"{key}: get a file with one model.")
    return {name: tensors[key] for name, key in names.items()}


def unwrap(container):
    """Official training container -> bare state dict.

    `ema_model_state_dict` is `{decay: state_dict}` and wins (first entry), then
    `model_state_dict`, then `state_dict`, then the dict itself. Names are `bare`.
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
    tensors = {name: value for name, value in sd.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError("this file holds no tensors: give a model's weight file.")
    return renamed(tensors, bare)


def allocate(net, device):
    """Give a net on the meta device memory, not initialised. `Module.to_empty` asks the meta
    tensors for copies, and the first of these imports sympy: half a second."""
    return net._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))


def load_strict(net, tensors, what, device=None):
    """Copy `tensors` (or `Stored`, fetched one at a time) into `net`; any float dtype
    widens or narrows to the parameter's own. Nothing is copied where they do not fit.
    device: where a net on the meta device is to be."""
    check_fit(net.state_dict(), tensors, what)
    if device is not None:
        allocate(net, device)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            value.copy_(read(tensors[name]))
    return net


def check_fit(own, tensors, what):
    """Strict: a missing, unexpected or wrongly shaped tensor is a UserError that names
    it, and so are whole numbers where floats belong. Looks at headers only."""
    wrong = {"missing": own.keys() - tensors.keys(), "unexpected": tensors.keys() - own.keys()}
    parts = [f"{len(names)} {how} (first: {min(names)})" for how, names in wrong.items() if names]
    if parts:
        raise UserError(f"{what} does not fit this model: {' and '.join(parts)} tensors; use the "
                        "weights of the same model.")
    for name, value in own.items():
        given = tensors[name]
        if tuple(given.shape) != tuple(value.shape):
            place = f" in {given.file}" if isinstance(given, Stored) and given.file else ""
            raise UserError(f"{what} does not fit this model: {name} has shape {list(given.shape)}"
                            f"{place}, expected {list(value.shape)}; use the weights of the same "
                            "model.")
        if value.is_floating_point() and not given.dtype.is_floating_point:
            raise UserError(f"{what} holds {name} in {str(given.dtype)[6:]}, whole numbers without "
                            "a scale that is known here: use bf16, fp16, fp32 or fp8 weights.")
