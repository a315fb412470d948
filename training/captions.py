"""Clips with captions: finding them in whatever form they come, and cutting them to the sizes that a transformer is trained on (spec ae-adapt-v
2.1 to 2.3).

    find      a folder (with its subfolders) of  x.mp4 + x.txt  or  x.mp4 + x.json;  tables (CSV, JSONL) with the columns path and caption;
              web-dataset tars. A clip may have several captions, each with a score; `caption_chances` says how often each is drawn.
    bucket    clips are trained on in a few sizes ("buckets") of about equal area and different aspect, so that a portrait clip stays one. A
              batch is of one bucket. A family has a name: 480F32MS is area 480 x 832, sides multiples of 32 (so that 32x32 pixels become one
              latent cell), multi-scale. Its sizes follow from a rule,  h = round(sqrt(A r) / m) m,  w = round(sqrt(A / r) / m) m.
    read      the first frames of a clip, every stored frame, scaled to cover its bucket and cropped in the middle

What cannot be used is named with the reason and left out: nothing in a folder stops a run, unless nothing is left.
"""
import contextlib
import csv
import json
import math
import os
import re
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from files import video
from files.checkpoint import UserError
from training.clips import VIDEOS
from training.entries import hash_file

NO_CAPTION = "clip without caption"
NO_CLIP = "caption without clip"
NAMES = ("captions", "extended_prompt", "caption", "prompt", "text")  # of what a JSON or a row says of a clip: the first that is there


@dataclass
class Sample:
    """A clip and what is said of it."""

    name: str  # for people: its path, or archive and member
    file: str  # the video, or the tar that it is in
    captions: dict = field(default_factory=dict)  # caption -> score
    offset: int = 0  # of the video in the tar, in bytes
    size: int | None = None  # bytes in the tar; None: the file is the video
    key: str = ""  # fingerprint of the video's bytes: the same wherever the file lies


# ---------------------------------------------------------------------------------------------------- finding


def find_samples(data):
    """Clips with captions -> ([Sample] by name, {name: why it was left out}).

    data: a folder, a video, a CSV or JSONL table, a tar, or a list of these. What two places say of one clip is put together. Files with the
    same bytes are one clip. UserError if a place does not exist or no clip with a caption is left.
    """
    found, skipped = {}, {}
    places = [Path(place) for place in ([data] if isinstance(data, (str, Path)) else data)]
    for place in places:
        for sample in look(place, skipped):
            first = found.setdefault((os.path.realpath(sample.file), sample.offset), sample)
            first.captions |= sample.captions
    skipped |= {s.name: NO_CAPTION for s in found.values() if not s.captions and s.name not in skipped}
    samples, spoken = {}, sorted((s for s in found.values() if s.captions), key=lambda s: s.name)
    with ThreadPoolExecutor(16) as pool:  # a disk far away answers many questions at once
        keys = list(pool.map(lambda s: key_of(s, skipped), spoken))
    for sample, key in zip(spoken, keys):
        sample.key = key
        first = samples.setdefault(key, sample) if key else sample
        if first is not sample:
            skipped[sample.name] = "the same bytes as another clip; their captions are put together"
            first.captions |= sample.captions
    for sample in samples.values():
        sample.captions = dict(sorted(sample.captions.items()))  # whichever place spoke first
    if not samples:
        raise UserError(f"there are no clips with captions in {', '.join(map(str, places))}{summary(skipped)}: give x.mp4 with x.txt or x.json beside it, "
                        "a CSV or JSONL with the columns path and caption, or web-dataset tars.")
    return list(samples.values()), skipped


def key_of(sample, skipped):
    """Fingerprint of a sample's video; "" where it cannot be read."""
    try:
        return hash_file(sample.file, sample.offset, sample.size)
    except OSError as e:
        skipped[sample.name] = f"cannot be read ({e.strerror})"
        return ""


def summary(skipped, examples=1):
    """{name: reason} in a few words, for the end of a sentence: " (3 x clip without caption: a.mp4, ...)"; "" for none."""
    groups = {reason: sorted(name for name in skipped if skipped[name] == reason) for reason in sorted(set(skipped.values()))}
    words = [f"{len(names)} x {reason}: {', '.join(names[:examples])}{', ...' if len(names) > examples else ''}" for reason, names in groups.items()]
    return f" ({'; '.join(words)})" if words else ""


def look(place, skipped):
    """Samples of one place, as they come; without captions where there are none. Adds to `skipped`."""
    if place.is_dir():
        files = sorted(p for p in place.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(place).parts))
    elif place.is_file():
        files = [place]
    else:
        raise UserError(f"{place} does not exist: give a folder of clips with captions, a table, or a tar.")
    clips = {p.with_suffix("") for p in files if p.suffix.lower() in VIDEOS}
    for file in files:
        kind = file.suffix.lower()
        if kind in VIDEOS:
            sample = Sample(str(file), str(file))
            for beside in (file.with_suffix(".txt"), file.with_suffix(".json")):
                if beside.is_file():
                    hear(sample, beside.suffix, beside.read_bytes(), skipped)
            yield sample
        elif kind in (".csv", ".jsonl"):
            yield from rows(file, skipped)
        elif kind == ".tar":
            yield from members(file, skipped)
        elif kind in (".txt", ".json") and file.with_suffix("") not in clips:
            skipped[str(file)] = NO_CLIP
        elif file.name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".zip")):
            skipped[str(file)] = "compressed archive (unpack it, or make it a plain tar)"


def hear(sample, suffix, raw, skipped):
    """Add what a .txt (a caption per line) or .json says to a sample."""
    try:
        text = raw.decode("utf-8-sig")
        sample.captions |= captions_of(text.splitlines() if suffix == ".txt" else json.loads(text))
    except ValueError as e:  # that is what decoding and json raise, too
        skipped[sample.name] = f"unreadable captions ({e})"


def captions_of(said):
    """A JSON value -> {caption: score}: a string, a list of these, or an object with one of NAMES and perhaps `scores` (or `score`).
    ValueError where scores do not fit."""
    scores = None
    if isinstance(said, dict):
        scores = next((said[name] for name in ("scores", "score") if said.get(name) not in (None, "")), None)
        said = next((said[name] for name in NAMES if said.get(name)), [])
    said = said if isinstance(said, list) else [said]
    if any(isinstance(one, dict) for one in said):
        return {caption: score for one in said for caption, score in captions_of(one).items()}
    scores = [1.0] * len(said) if scores is None else scores if isinstance(scores, list) else [scores]
    if len(scores) != len(said):
        raise ValueError(f"{len(said)} captions but {len(scores)} scores")
    try:
        scores = [float(score) for score in scores]
    except (TypeError, ValueError):
        scores = [math.nan]
    if not all(math.isfinite(score) and score >= 0 for score in scores):
        raise ValueError("a score is no number from 0 on")
    if not all(isinstance(caption, str) for caption in said):
        raise ValueError("a caption is no text")
    return {caption.strip(): score for caption, score in zip(said, scores) if caption.strip()}


def rows(table, skipped):
    """Samples of a CSV or JSONL; paths are relative to it. Several rows may name one clip."""
    try:
        text = table.read_text("utf-8-sig")
        if table.suffix.lower() == ".csv":
            lines = list(csv.DictReader(text.splitlines(keepends=True)))
        else:
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, csv.Error) as e:
        skipped[str(table)] = f"unreadable table ({e})"
        return
    if not lines or not all(isinstance(line, dict) for line in lines) or "path" not in lines[0] or not set(NAMES) & set(lines[0]):
        skipped[str(table)] = "table without the columns path and caption"
        return
    for number, line in enumerate(lines, 1):
        path, where = line.get("path"), f"{table}, row {number}"
        if not path or not isinstance(path, str):
            skipped[where] = NO_CLIP
        elif not (file := table.parent / path).is_file():
            skipped[f"{where} ({path})"] = NO_CLIP
        else:
            sample = Sample(str(file), str(file))
            hear(sample, ".json", json.dumps(line).encode(), skipped)
            yield sample


def members(archive, skipped):
    """Samples of a web-dataset tar: members key.mp4 with key.json or key.txt. Only headers and captions are read."""
    clips, said = {}, {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                key, suffix = os.path.splitext(member.name)
                if not member.isreg() or os.path.basename(key).startswith("."):
                    continue
                if suffix.lower() in VIDEOS:
                    clips[key] = Sample(f"{archive}/{member.name}", str(archive), offset=member.offset_data, size=member.size)
                elif suffix.lower() in (".txt", ".json"):
                    said.setdefault(key, []).append((suffix.lower(), tar.extractfile(member).read()))
    except (tarfile.TarError, EOFError) as e:
        skipped[str(archive)] = f"archive that is cut off or damaged ({e}); what comes before is used"
    end = archive.stat().st_size
    for key, sample in clips.items():
        for suffix, raw in said.pop(key, []):
            hear(sample, suffix, raw, skipped)
        if sample.offset + sample.size > end:
            skipped[sample.name] = "cut off with its archive"
        else:
            yield sample
    skipped |= {f"{archive}/{key}": NO_CLIP for key in said}


def caption_chances(sample):
    """How often each caption is drawn: proportional to score^(1 / 0.1) (spec 2.3)."""
    scores = np.array(list(sample.captions.values()))
    weights = (scores / scores.max()) ** 10 if scores.max() else np.ones(len(scores))
    return weights / weights.sum()


# ---------------------------------------------------------------------------------------------------- buckets

AREAS = {480: (480, 832), 720: (720, 1280), 1080: (1080, 1920), 2160: (2160, 3840)}
RATIOS = (0.5, 0.5625, 0.68, 0.78, 1.0, 1.13, 1.29, 1.46, 1.67, 1.75, 2.0)  # height / width
LARGE_RATIOS = (0.25, 0.42, 0.5625, 0.81, 0.94, 1.0, 1.06, 1.23, 1.67, 2.4, 4.0)  # of the families 1080 and 2160


def bucket_sizes(family):
    """{height / width: (height, width)} of a family by name: "480F32MS", "720F32MS", "1080F64MS", ..., or of any area, "96x128F32MS"."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?F(\d+)MS", family, re.IGNORECASE)
    if not match or not match[2] and int(match[1]) not in AREAS or 0 in (numbers := [int(n) for n in match.groups() if n]):
        raise UserError(f"there are no buckets {family!r}: use 480F32MS, 480F64MS, 720F32MS, or HEIGHTxWIDTHF32MS for an area of your own.")
    h, w = numbers[:2] if match[2] else AREAS[numbers[0]]
    multiple, ratios = numbers[-1], LARGE_RATIOS if not match[2] and h >= 1080 else RATIOS
    side = lambda length: max(round(length / multiple), 1) * multiple
    return {r: (side(math.sqrt(h * w * r)), side(math.sqrt(h * w / r))) for r in ratios}


def bucket_of(height, width, sizes):
    """The size whose aspect is the closest to that of a clip."""
    return sizes[min(sizes, key=lambda ratio: abs(ratio - height / width))]


# ---------------------------------------------------------------------------------------------------- reading


@contextlib.contextmanager
def video_file(sample):
    """The clip as a file of its own, for the length of a `with`; out of a tar it is copied into a temporary one."""
    if sample.size is None:
        yield Path(sample.file)
        return
    with tempfile.NamedTemporaryFile(suffix=Path(sample.name).suffix) as tmp, open(sample.file, "rb") as tar:
        tar.seek(sample.offset)
        left = sample.size
        while block := tar.read(min(left, 1 << 20)):
            left -= tmp.write(block)
        tmp.flush()
        yield Path(tmp.name)


def read_sample(sample, frames, sizes):
    """The first `frames` frames of a clip in its bucket, one of `sizes` -> (x [3, frames, h, w] in [-1, 1], its first frame as stored [3, h0, w0]).

    No frame is left out or repeated, whatever the rate. UserError, without the clip's name, if it is damaged or has fewer frames.
    """
    pieces, first, count = [], None, 0
    with video_file(sample) as path, contextlib.closing(video.iter_clip(path)) as stream:
        try:
            for piece in stream:
                first = piece[:, 0] if first is None else first
                if piece.shape[2:] != first.shape[1:]:
                    raise ValueError
                pieces.append(cover(piece, bucket_of(*first.shape[1:], sizes)))
                count += piece.shape[1]
                if count >= frames:
                    break
        except ValueError:
            raise UserError("changes its size on the way") from None
        except UserError as e:
            raise UserError(str(e).removeprefix(f"{path} ").split(": ")[0]) from None
    if count < frames:
        raise UserError(f"shorter than {frames} frames")
    return torch.cat(pieces, dim=1)[:, :frames], first


def cover(x, size):
    """Frames [3, t, h, w] scaled to cover `size`, bilinear without antialiasing, and cropped in the middle (spec 2.2)."""
    (h, w), (height, width) = x.shape[2:], size
    scale = max(height / h, width / w)
    h, w = max(height, round(h * scale)), max(width, round(w * scale))
    x = F.interpolate(x.transpose(0, 1), (h, w), mode="bilinear", align_corners=False).transpose(0, 1)
    top, left = (h - height) // 2, (w - width) // 2
    return x[:, :, top : top + height, left : left + width]
