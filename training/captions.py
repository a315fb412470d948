"""Clips with captions: finding them in whatever form they come, and cutting them to the
sizes that a transformer is trained on.

    find     a folder (with its subfolders) of x.mp4 + x.txt or x.mp4 + x.json; tables
             (CSV, TSV, JSONL) with a column for the file and one for the caption;
             web-dataset tars. A clip may have several captions, each with a score;
             `caption_chances` says how often each is drawn.
    bucket   clips are trained on in a few sizes ("buckets") of about equal area and
             different aspect, so that a portrait clip stays one. A batch is of one
             bucket. A family has a name: 480F32MS is area 480 x 832, sides multiples of
             32 (so that 32x32 pixels become one latent cell), multi-scale. Its sizes
             follow from a rule:
             h = round(sqrt(A r) / m) m, w = round(sqrt(A / r) / m) m.
    read     the first frames of a clip at the model's rate, scaled to cover its bucket
             and cropped in the middle

What cannot be used is named with the reason and left out: nothing in a folder stops a
run, unless nothing is left, and a bad row of a table costs that row.
"""
import codecs
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
from files.errors import UserError, printable
from training.clips import VIDEOS, is_video, iter_files
from training.entries import blocks, hash_file

NO_CAPTION = "clip without caption"
NO_CLIP = "caption without clip"
#: names of what a JSON or a row says of a clip: the first that is there counts
PATHS = ("path", "video", "file_name", "filename", "file", "video_path", "clip")
NAMES = ("captions", "extended_prompt", "caption", "prompt", "text", "description")
SCORES = ("scores", "score")
SPOKEN = (".txt", ".json")
PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".zip")
LONGEST = 1 << 20  # bytes of a file, row or tar member of captions
WORDIEST = 1 << 15  # characters of a caption; encoders read 512 tokens


@dataclass
class Sample:
    """A clip and what is said of it."""

    name: str  # for people: its path, or archive and member
    file: str  # the video, or the tar that it is in
    captions: dict = field(default_factory=dict)  # caption -> score
    offset: int = 0  # of the video in the tar, in bytes
    size: int | None = None  # bytes in the tar; None: the file is the video
    key: str = ""  # fingerprint of the video's bytes: the same wherever the file lies


# ------------------------------------------------------------------ finding


def find_samples(data, per_line=False):
    """Clips with captions -> ([Sample] by name, {name: why it was left out}).

    data: a folder, a video, a table, a tar, or a list of these. per_line: each line of
    a .txt is a caption, else the whole file is one. What two places say of one clip is
    put together. Files with the same bytes are one clip. UserError if a place does not
    exist or no clip with a caption is left.
    """
    found, skipped = {}, {}
    places = [Path(place) for place in ([data] if isinstance(data, (str, Path)) else data)]
    for place in places:
        for sample in iter_samples(place, skipped, per_line):
            first = found.setdefault((os.path.realpath(sample.file), sample.offset), sample)
            first.captions |= sample.captions
    spoken = []
    for sample in sorted(found.values(), key=lambda s: s.name):
        if sample.captions:
            spoken.append(sample)
        else:
            skipped.setdefault(sample.name, NO_CAPTION)
    samples = list(join_equal(spoken, skipped))
    for sample in samples:
        sample.captions = dict(sorted(sample.captions.items()))  # whichever place spoke first
    if not samples:
        where = printable(", ".join(map(str, places)))
        raise UserError(f"there are no clips with captions in {where}{summary(skipped)}: give "
                        "x.mp4 with x.txt or x.json beside it, a CSV or JSONL with the columns "
                        "path and caption, or web-dataset tars.")
    return samples, skipped


def join_equal(samples, skipped):
    """Samples by the bytes of their videos; equal ones become one with the captions of
    all."""

    def key_of(sample):
        try:
            return hash_file(sample.file, sample.offset, sample.size)
        except OSError as e:
            skipped[sample.name] = f"cannot be read ({e.strerror})"
            return ""

    by_key = {}
    with ThreadPoolExecutor(16) as pool:  # a disk far away answers many questions at once
        for sample, key in zip(samples, pool.map(key_of, samples)):
            sample.key = key
            first = by_key.setdefault(key, sample) if key else sample
            if first is not sample:
                skipped[sample.name] = ("the same bytes as another clip; their captions are put "
                                        "together")
                first.captions |= sample.captions
    return by_key.values()


def summary(skipped, examples=1):
    """{name: reason} in a few words, for the end of a sentence:
    " (3 x clip without caption: a.mp4, ...)"; "" for none."""
    groups = {}
    for name, reason in sorted(skipped.items(), key=lambda item: (item[1], item[0])):
        groups.setdefault(reason, []).append(name)
    words = []
    for reason, names in groups.items():
        more = ", ..." if len(names) > examples else ""
        words.append(f"{len(names)} x {reason}: {', '.join(names[:examples])}{more}")
    return f" ({printable('; '.join(words))})" if words else ""


def iter_samples(place, skipped, per_line=False):
    """Samples of one place, as they come; without captions where there are none. Adds
    to `skipped`."""
    if place.is_dir():
        files = iter_files(place)
    elif place.is_file():
        files = [place, *beside(place)]
    else:
        raise UserError(f"{place} does not exist: give a folder of clips with captions, a table, "
                        "or a tar.")
    clips, spoken = set(), {}  # paths without suffix; files of captions for each of them
    for file in files:
        if is_video(file):
            clips.add(file.with_suffix(""))
        elif file.suffix.lower() in SPOKEN:
            spoken.setdefault(file.with_suffix(""), []).append(file)
    for file in files:
        kind = file.suffix.lower()
        if is_video(file):
            sample = Sample(str(file), str(file))
            for other in spoken.get(file.with_suffix(""), []):
                with unreadable(sample.name, skipped):
                    sample.captions |= read_captions(other, per_line)
            yield sample
        elif kind in (".csv", ".tsv", ".jsonl"):
            yield from rows(file, skipped)
        elif kind == ".tar":
            yield from members(file, skipped, per_line)
        elif kind in SPOKEN and file.with_suffix("") not in clips:
            skipped[str(file)] = NO_CLIP
        elif file.name.lower().endswith(PACKED):
            skipped[str(file)] = "compressed archive (unpack it, or make it a plain tar)"


def beside(clip):
    """Files of captions beside one clip."""
    if not is_video(clip):
        return []
    same = [p for p in clip.parent.iterdir() if p.with_suffix("") == clip.with_suffix("")]
    return sorted(p for p in same if p.suffix.lower() in SPOKEN and p.is_file())


# ------------------------------------------------------------------ what is said of a clip


@contextlib.contextmanager
def unreadable(name, skipped):
    """Captions that cannot be read in this block are noted under `name`."""
    try:
        yield
    except (ValueError, RecursionError, OverflowError, OSError) as e:
        skipped[name] = f"unreadable captions ({reason_of(e)})"


def reason_of(error):
    """What is wrong with a text, without the place: equal reasons are counted
    together."""
    reason = getattr(error, "msg", getattr(error, "reason", None))  # of JSON, of Unicode
    return str(reason or error)[:200]


def read_captions(file, per_line):
    """A .txt or .json -> {caption: score}."""
    if file.stat().st_size > LONGEST:
        raise ValueError(f"more than {LONGEST >> 20} MB")
    return parse_captions(file.suffix, file.read_bytes(), per_line)


def parse_captions(suffix, raw, per_line):
    """What a .txt or .json holds -> {caption: score}."""
    text = raw.decode(encoding_of(raw))
    if suffix.lower() == ".json":
        return captions_of(json.loads(text))
    return captions_of(text.split("\n") if per_line else text)


def encoding_of(beginning):
    """Of a text, by its byte order mark: spreadsheets write UTF-16, all others UTF-8."""
    utf16 = beginning[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return "utf-16" if utf16 else "utf-8-sig"


def captions_of(said):
    """A JSON value -> {caption: score}: a string, a list of these, or an object with
    one of NAMES and perhaps `scores` (or `score`). ValueError where scores do not
    fit."""
    scores = None
    if isinstance(said, dict):
        scores = first_of(said, SCORES)
        said = first_of(said, NAMES) or []
    said = said if isinstance(said, list) else [said]
    found = {}
    if any(isinstance(one, dict) for one in said):
        for one in said:
            found |= captions_of(one)
        return found
    if scores is None:
        scores = [1.0] * len(said)
    scores = scores if isinstance(scores, list) else [scores]
    if len(scores) != len(said):
        raise ValueError(f"{len(said)} captions but {len(scores)} scores")
    for one, score in zip(said, scores):
        caption, score = caption_of(one), score_of(score)
        if caption:
            found[caption] = score
    return found


def first_of(said, names):
    """The value of the first of `names` that an object has; None without one. Names are
    compared as people write them: " File_Name" is "file_name"."""
    by_name = {str(name).strip().lower(): value for name, value in said.items()}
    for name in names:
        if by_name.get(name) not in (None, "", []):
            return by_name[name]


def score_of(value):
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if math.isfinite(float(value)) and float(value) >= 0:
            return float(value)
    raise ValueError("a score is no number from 0 on")


def caption_of(value):
    if not isinstance(value, str):
        raise ValueError("a caption is no text")
    if len(value) > WORDIEST:
        raise ValueError(f"a caption of {len(value)} characters, {WORDIEST} at most are read")
    with contextlib.suppress(UnicodeEncodeError):
        return value.strip() if value.encode() else ""
    raise ValueError("a caption is no valid Unicode")


def caption_chances(sample):
    """How often each caption is drawn: proportional to score^(1 / 0.1), as DC-VideoGen
    does."""
    scores = np.array(list(sample.captions.values()))
    weights = (scores / scores.max()) ** 10 if scores.max() else np.ones(len(scores))
    return weights / weights.sum()


# ------------------------------------------------------------------ tables


def rows(table, skipped):
    """Samples of a CSV, TSV or JSONL; paths are relative to it. Several rows may name
    one clip. A bad row is named by its number and costs nothing else."""
    read = json_rows if table.suffix.lower() == ".jsonl" else csv_rows
    for number, row in read(lines_of(table)):
        where = f"{table}, row {number}" if number else str(table)
        if not isinstance(row, dict):
            skipped[where] = row if isinstance(row, str) else "row that is no object"
            continue
        path = first_of(row, PATHS)
        if not path or not isinstance(path, str):
            skipped[where] = NO_CLIP
        elif not os.path.isfile(file := table.parent / path):
            skipped[f"{where} ({path[:200]})"] = NO_CLIP
        else:
            sample = Sample(str(file), str(file))
            with unreadable(where, skipped):
                sample.captions = captions_of(row)
            if sample.captions or where not in skipped:
                yield sample


def lines_of(table):
    """Lines of a text file, which end at newlines only; each is at most LONGEST + 1
    long. What is no UTF-8 comes as surrogates, so that it costs its row."""
    with open(table, "rb") as f:
        encoding = encoding_of(f.read(2))
    how = dict(encoding=encoding, errors="surrogateescape", newline="\n")
    with open(table, **how) as f:
        while line := f.readline(LONGEST + 1):
            yield line
            while len(line) > LONGEST and not line.endswith("\n"):  # the rest of a row too long
                line = f.readline(LONGEST + 1)


def json_rows(lines):
    """(number, object) of the lines that are not empty; instead of an object what is
    wrong."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(line) > LONGEST:
            yield number, f"row of more than {LONGEST >> 20} MB"
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as e:
            yield number, f"row that is no JSON ({reason_of(e)})"


def csv_rows(lines):
    """(number, {column: value}) of the rows under the heads; instead of a row what is
    wrong. A row that opens a quote and never closes it costs itself, not those
    below."""
    lines = list(lines)
    heads = next(csv.reader(lines[:1], delimiter=delimiter(lines)), [])
    known = {head.strip().lower() for head in heads}
    if not known & set(PATHS) or not known & set(NAMES):
        yield 0, (f"table without a column for the file ({', '.join(PATHS)}) and one for the "
                  f"caption ({', '.join(NAMES)})")
        return
    number, place = 0, 1
    while place < len(lines):
        number += 1
        rest = (lines[i] for i in range(place, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter(lines), strict=True)
        try:
            row = next(reader)
        except csv.Error as e:
            place += 1
            yield number, f"row that is no CSV ({e})"
            continue
        place += reader.line_num
        while len(row) > len(heads) and not row[-1].strip():
            row.pop()
        if len(row) > len(heads):
            yield number, (f"row with {len(row)} values for {len(heads)} columns (a caption with "
                           "commas needs quotes)")
        elif row:
            yield number, dict(zip(heads, row))


def delimiter(lines):
    """What separates the columns: a comma, or where spreadsheets write that, a
    semicolon or tab."""
    return max(",;\t", key=lines[0].count) if lines else ","


# ------------------------------------------------------------------ tars


def members(archive, skipped, per_line=False):
    """Samples of a web-dataset tar: members key.mp4 with key.json or key.txt. Only
    headers and captions are read."""
    clips, said = {}, {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                key, suffix = os.path.splitext(member.name)
                if not member.isreg() or os.path.basename(key).startswith("."):
                    continue
                name, kind = f"{archive}/{member.name}", suffix.lower()
                if member.issparse() and kind in VIDEOS | set(SPOKEN):
                    skipped[name] = "sparse member of an archive (pack it without holes)"
                elif kind in VIDEOS:
                    clips[key] = Sample(name, str(archive), offset=member.offset_data,
                                        size=member.size)
                elif kind in SPOKEN and member.size > LONGEST:
                    skipped[name] = f"unreadable captions (more than {LONGEST >> 20} MB)"
                elif kind in SPOKEN:
                    said.setdefault(key, []).append((kind, tar.extractfile(member).read()))
            check_end(archive, tar.offset)
    except (tarfile.TarError, EOFError, OSError, ValueError) as e:
        skipped[str(archive)] = (f"archive that is cut off or damaged ({e}); what comes before is "
                                 "used")
    size = archive.stat().st_size
    for key, sample in clips.items():
        for kind, raw in said.pop(key, []):
            with unreadable(sample.name, skipped):
                sample.captions |= parse_captions(kind, raw, per_line)
        if sample.offset + sample.size > size:
            skipped[sample.name] = "cut off with its archive"
        else:
            yield sample
    skipped |= {f"{archive}/{key}": NO_CLIP for key in said}


def check_end(archive, offset):
    """ValueError where a tar's last header is cut off or damaged, which tarfile takes
    for the end: there must be nothing, or zeros."""
    with open(archive, "rb") as f:
        f.seek(offset)
        block = f.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0") or len(block) not in (0, tarfile.BLOCKSIZE):
        raise ValueError("a header is not whole")


# ------------------------------------------------------------------ buckets

AREAS = {480: (480, 832), 720: (720, 1280), 1080: (1080, 1920), 2160: (2160, 3840)}
#: height / width
RATIOS = (0.5, 0.5625, 0.68, 0.78, 1.0, 1.13, 1.29, 1.46, 1.67, 1.75, 2.0)
#: of the families 1080 and 2160
LARGE_RATIOS = (0.25, 0.42, 0.5625, 0.81, 0.94, 1.0, 1.06, 1.23, 1.67, 2.4, 4.0)


def bucket_sizes(family):
    """{height / width: (height, width)} of a family by name: "480F32MS", "720F32MS",
    "1080F64MS", ..., or of any area, "96x128F32MS"."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?F(\d+)MS", family, re.IGNORECASE)
    numbers = [int(n) for n in match.groups() if n] if match else [0]
    named = len(numbers) == 2
    if 0 in numbers or named and numbers[0] not in AREAS:
        raise UserError(f"there are no buckets {family!r}: use 480F32MS, 480F64MS, 720F32MS, or "
                        "HEIGHTxWIDTHF32MS for an area of your own.")
    h, w = AREAS[numbers[0]] if named else numbers[:2]
    multiple, ratios = numbers[-1], LARGE_RATIOS if named and h >= 1080 else RATIOS

    sizes = {}
    for ratio in ratios:
        sides = math.sqrt(h * w * ratio), math.sqrt(h * w / ratio)
        sizes[ratio] = tuple(max(round(side / multiple), 1) * multiple for side in sides)
    return sizes


def bucket_of(height, width, sizes):
    """The size whose aspect is the closest to that of a clip."""
    return sizes[min(sizes, key=lambda ratio: abs(ratio - height / width))]


# ------------------------------------------------------------------ reading


@contextlib.contextmanager
def video_file(sample):
    """The clip as a file of its own, for the length of a `with`; out of a tar it is
    copied into a temporary one."""
    if sample.size is None:
        yield Path(sample.file)
        return
    with tempfile.NamedTemporaryFile(suffix=Path(sample.name).suffix) as tmp:
        tmp.writelines(blocks(sample.file, sample.offset, sample.size))
        tmp.flush()
        yield Path(tmp.name)


def read_sample(sample, frames, sizes, fps=None):
    """The first `frames` frames of a clip at `fps` (None: every stored one) in its
    bucket, one of `sizes` -> (x [3, frames, h, w] in [-1, 1], its first frame as shown
    [3, h0, w0]).

    UserError, without the clip's name, if it is damaged or has fewer frames.
    """
    pieces, first, count = [], None, 0
    with video_file(sample) as path:
        try:
            with contextlib.closing(video.iter_clip(path, fps=fps)) as stream:
                for piece in stream:
                    first = piece[:, 0] if first is None else first
                    pieces.append(cover(piece, bucket_of(*first.shape[1:], sizes)))
                    count += piece.shape[1]
                    if count >= frames:
                        break
        except UserError as e:
            raise UserError(str(e).removeprefix(f"{path} ").split(": ")[0].rstrip(".")) from None
    if count < frames:
        rate = f" at {fps:g} per second" if fps else ""
        raise UserError(f"shorter than {frames} frames{rate}")
    return torch.cat(pieces, dim=1)[:, :frames], first


def cover(x, size):
    """Frames [3, t, h, w] scaled to cover `size`, bilinear without antialiasing, and
    cropped in the middle, as DC-VideoGen was trained."""
    (h, w), (height, width) = x.shape[2:], size
    scale = max(height / h, width / w)
    h, w = max(height, round(h * scale)), max(width, round(w * scale))
    x = F.interpolate(x.transpose(0, 1), (h, w), mode="bilinear", align_corners=False)
    top, left = (h - height) // 2, (w - width) // 2
    return x.transpose(0, 1)[:, :, top : top + height, left : left + width]
