"""Reading and writing weights safely.

Every weight file of the project goes through this file, in both directions:

* reading: safetensors, or `torch.load(weights_only=True)`. Nothing is ever unpickled freely, so a file that
  tries to run code is refused, not run.
* writing: to a temporary file beside the target, then one atomic rename. A full disk or a `kill -9` leaves
  either the old file or the new one, never half of one.

It also holds the two spellings of a Wan transformer's tensor names (`to_diffusers`, `to_original`), and
`UserError`: a mistake that the user can mend. Its text is one sentence that says what to do; scripts
print it without a traceback and exit with status 1 (`user_errors`).
"""
import contextlib
import datetime
import errno
import json
import os
import pickle
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes


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


def provenance():
    """Where a measured number comes from: date, commit, hardware, versions. Part of every file in results/."""
    root = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return dict(date=datetime.date.today().isoformat(), commit=git.stdout.strip() or "unknown", torch=torch.__version__,
                python=platform.python_version(), cpu=f"{cpu}, {os.cpu_count()} cores", threads=torch.get_num_threads(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def save_tensors(path, tensors, metadata=None):
    """Write a flat dict of tensors as safetensors, atomically. `metadata`: a JSON-able dict, kept in the header."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    header = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    data = safetensors_bytes(tensors, metadata=header)
    with atomic_path(path) as tmp:
        tmp.write_bytes(data)


def load_tensors(path):
    """Read one weight file -> (flat dict of CPU tensors in their stored dtype, metadata dict).

    `.safetensors` by its own reader; anything else as a torch container with `weights_only=True`, unwrapped by
    `unwrap`. Metadata values that are JSON are parsed. Raises UserError for a missing, truncated or unsafe file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path of a weight file.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as f:
                tensors = {k: f.get_tensor(k) for k in f.keys()}
                metadata = f.metadata() or {}
        except (SafetensorError, ValueError, RuntimeError) as e:
            raise UserError(f"{path} is not a complete safetensors file ({e}): download or copy it again.") from e
        return tensors, {k: _parse(v) for k, v in metadata.items()}
    return unwrap(load_pickle(path)), {}


def load_pickle(path):
    """`torch.load` of tensors and plain containers only; a pickle that would run code is refused with a UserError."""
    with open(path, "rb") as f:
        try:
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
    """Copy `tensors` into `net` (any float dtype widens or narrows to the parameter's own). Strict: a missing,
    unexpected or wrongly shaped tensor is a UserError that names it; nothing is copied then."""
    own = net.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        parts = [f"{len(m)} {w} (first: {m[0]})" for m, w in ((missing, "missing"), (extra, "unexpected")) if m]
        raise UserError(f"{what} does not fit this model: {' and '.join(parts)} tensors; "
                        "use the weights of the same model.")
    for name, value in own.items():
        if tensors[name].shape != value.shape:
            raise UserError(f"{what} does not fit this model: {name} has shape {list(tensors[name].shape)}, "
                            f"expected {list(value.shape)}; use the weights of the same model.")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])
    return net


# The two spellings of a Wan transformer's names: the original release's and diffusers'. Values are identical, so
# changing format is pure renaming. (original, diffusers); the first that matches whole path components wins.
BLOCK_NAMES = [                              # inside blocks.i.
    ("self_attn.o", "attn1.to_out.0"), ("cross_attn.o", "attn2.to_out.0"),
    ("self_attn.q", "attn1.to_q"), ("self_attn.k", "attn1.to_k"), ("self_attn.v", "attn1.to_v"),
    ("cross_attn.q", "attn2.to_q"), ("cross_attn.k", "attn2.to_k"), ("cross_attn.v", "attn2.to_v"),
    ("cross_attn.k_img", "attn2.add_k_proj"), ("cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    ("self_attn", "attn1"), ("cross_attn", "attn2"),     # norm_q, norm_k
    ("norm3", "norm2"),                                  # the one norm with weights, before cross-attention
    ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"),
    ("modulation", "scale_shift_table"),
]
TOP_NAMES = [
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("head.modulation", "scale_shift_table"), ("head.head", "proj_out"),
]


def to_diffusers(name):
    """Name of a Wan transformer's tensor or module in diffusers' spelling (a name already spelt so is kept)."""
    return _respell(name, source=0)


def to_original(name):
    """Name of a Wan transformer's tensor or module in the original spelling (a name already spelt so is kept)."""
    return _respell(name, source=1)


def _respell(name, source):
    block, rest = re.fullmatch(r"(blocks\.\d+\.)?(.*)", name).groups(default="")
    for pair in BLOCK_NAMES if block else TOP_NAMES:
        if rest == pair[source] or rest.startswith(pair[source] + "."):
            return block + pair[1 - source] + rest[len(pair[source]):]
    return name


def _parse(text):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
