"""Finished work on disk: what takes long to make, made once.

    entries = Entries("out/latents", "latents", dict(autoencoder=..., frames=80))
    entries.put("3f9a", {"latent": z}, bucket=(480, 832))    # one file, whole or not at all
    entries.facts("3f9a")   # {"bucket": [480, 832], ...}, from the header; None: still to be made
    entries.get("3f9a")     # the tensors, every byte verified

Three things must never happen: work done with other weights or settings is taken for
one's own (folders are named by a hash of all that decides, and every entry repeats it),
half an entry is taken for a whole one (files are renamed into place; a header that
promises more than the file holds is damage), or one flipped bit trains a model (the
header holds a hash of the tensors). Damage costs one entry, which is made again.

The three fingerprints of the project are here: of plain values, of tensors, of files.
"""
import contextlib
import errno
import functools
import hashlib
import json
import os
from pathlib import Path

import torch
from tqdm import tqdm

from files import checkpoint, folders
from files.checkpoint import UserError

# ------------------------------------------------ fingerprints

BLOCK = 4 << 20  # bytes that are read at once
LARGE = 16 << 20  # bytes of a file from which on its hash is remembered
REMEMBERED = "out/fingerprints.jsonl"


def hash_of(value):
    """A JSON-able value -> 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def hash_tensors(tensors):
    """{name: tensor} -> 16 hex digits of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def hash_file(file, offset=0, size=None):
    """Of all bytes of a file (or of a part of it) -> 32 hex digits: the same wherever it
    lies and whenever it was written. What was found for large files is remembered in
    REMEMBERED, by path, size, time of change and inode."""
    stat = os.stat(file)
    size = stat.st_size - offset if size is None else size
    stamp = [os.path.realpath(file), offset, size, stat.st_size, stat.st_mtime_ns, stat.st_ino]
    if size >= LARGE and (known := remembered().get(hash_of(stamp))):
        return known
    digest = hashlib.sha256(str(size).encode())
    for block in blocks(file, offset, size):
        digest.update(block)
    found = digest.hexdigest()[:32]
    if size >= LARGE:
        remembered()[hash_of(stamp)] = found
        with contextlib.suppress(OSError):  # a folder that cannot be written
            Path(REMEMBERED).parent.mkdir(parents=True, exist_ok=True)
            with open(REMEMBERED, "a") as f:  # a short line is written whole, or not at all
                f.write(json.dumps([hash_of(stamp), found]) + "\n")
    return found


def blocks(file, offset, size):
    """The bytes of a part of a file, some megabytes at a time."""
    with open(file, "rb") as f:
        f.seek(offset)
        while block := f.read(min(size, BLOCK)):
            size -= len(block)
            yield block


@functools.cache
def remembered():
    """{hash of a file's stamp: hash of its bytes}, as earlier runs found them."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path(REMEMBERED).read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                stamp, digest = json.loads(line)
                found[stamp] = digest
    return found


def hash_network(path):
    """Of a network's file, or of the files in its folder; "" where there are none."""
    if not path:
        return ""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return hash_of([hash_file(f) for f in files]) if files else ""


#: what of an autoencoder's config decides a latent, beside the encoder's weights. These names
#: are hashed: whoever renames a field of a config keeps them, or all caches are made anew.
DECIDES = ("patch", "temporal_factor", "temporal", "chunk", "scale", "mean", "std")


def hash_encoder(autoencoder):
    """Of all that a latent depends on."""
    tensors = autoencoder.state_dict().items()
    weights = {k: v for k, v in tensors if not k.startswith(("decoder.", "conv2."))}
    settings = {name: getattr(autoencoder.config, name, None) for name in DECIDES}
    return hash_of([hash_tensors(weights), settings])


# ------------------------------------------------ entries


class Damaged(Exception):
    """An entry that cannot be used."""


class Entries:
    """Finished work, {key: tensors}: one safetensors file each in `folder`/`kind`-HASH,
    or in memory where `folder` is None.

    made_by: JSON-able values that decide what an entry holds; HASH is theirs, and every
        entry repeats it.
    origin: fingerprint of a further network, which may be absent ("") once the entries
        are there, but must not be another one.

    Two processes may write the same entry: they write the same bytes, and the last
    rename wins.
    """

    def __init__(self, folder, kind, made_by, origin=""):
        self.made_by, self.hash, self.origin = made_by, hash_of(made_by), origin
        self.known = {}  # facts of entries that were seen to be finished
        self.memory = {}  # entries, where there is no folder
        self.folder = folder and Path(folder) / f"{kind}-{self.hash}"
        if self.folder:
            folders.sweep(self.folder)  # what runs that were killed left half written

    def file(self, key):
        return self.folder / f"{key}.safetensors"

    def put(self, key, tensors, **facts):
        """Keep tensors and a few JSON-able facts about them."""
        tensors = {name: value.detach().cpu() for name, value in tensors.items()}
        for name, value in tensors.items():
            if not torch.isfinite(value).all():
                raise UserError(f"the {name} of {facts.get('name', key)} came out with NaN or "
                                "infinite values: encode in fp32, or use other weights.")
        facts |= dict(key=key, made_by=self.hash, origin=self.origin)
        facts["content"] = hash_tensors(tensors)
        if self.folder is None:
            self.known[key], self.memory[key] = facts, tensors
            return
        try:
            about = self.folder / "about.json"
            if not about.exists():  # for people; nothing reads it
                checkpoint.write_json(about, self.made_by)
            checkpoint.save_tensors(self.file(key), tensors, {"entry": facts})
        except OSError as e:
            if e.errno == errno.ENOSPC:  # a name for the sentence; finished entries stay
                raise OSError(e.errno, e.strerror, str(self.folder)) from e
            raise
        self.known[key] = facts

    def facts(self, key, whole=False):
        """Facts about an entry; None where there is none yet. One that is cut short is
        removed, so that it is made again; one that something else made is a UserError.
        Looks at the header only, or with `whole` at every byte."""
        if self.folder and (whole or key not in self.known) and self.file(key).exists():
            try:
                if whole:
                    self.known[key] = self._read(key)[1]
                else:
                    self.known[key] = self._open(key, checkpoint.open_tensors)[1]
            except Damaged as e:
                tqdm.write(f"made again: {e}")
        return self.known.get(key)

    def get(self, key):
        """The tensors of a finished entry, verified. Damage is a UserError, after which
        the entry is gone and will be made again."""
        if self.folder is None:
            return self.memory[key]
        try:
            return self._read(key)[0]
        except Damaged as e:
            raise UserError(f"{e} and was removed: start again and it is made anew; finished "
                            "work is kept.") from e

    def _read(self, key):
        """-> (tensors, facts) of a file, every byte of it verified: what is finite and
        of the right shape was checked when it was written."""
        tensors, facts = self._open(key, checkpoint.load_tensors)
        if hash_tensors(tensors) != facts["content"]:
            self._damaged(key, "its content is not what was written")
        return tensors, facts

    def _open(self, key, how):
        """-> (tensors, facts) of a file that is whole and of the right origin."""
        try:
            tensors, metadata = how(self.file(key))
        except UserError as e:
            self._damaged(key, str(e).split(": ")[0])
        facts = metadata.get("entry")
        if not isinstance(facts, dict) or facts.get("key") != key:
            self._damaged(key, "it is not the entry that its name says")
        for ours, theirs in ((self.hash, facts["made_by"]), (self.origin, facts["origin"])):
            if ours and theirs and ours != theirs:
                raise UserError(f"{self.file(key)} was made by another encoder, scale or setting "
                                f"(hash {theirs}, not {ours}): delete it, or use another folder "
                                "for the cache.")
        return tensors, facts

    def _damaged(self, key, why):
        self.known.pop(key, None)
        self.file(key).unlink(missing_ok=True)
        raise Damaged(f"{self.file(key)} is damaged ({why})")
