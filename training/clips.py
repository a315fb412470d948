"""A folder of clips as training data.

Any mix of videos of any size, rate and length, and pictures, becomes an endless stream of batches of one bucket (frames x height x width):

    scan    every file is decoded once, at 32x32 grey: how many frames, where the cuts are, whether it is whole. Kept in a small JSON file,
            so that the next run starts at once. What cannot be used is skipped, counted and named, and nothing crashes the run.
    draw    sample i of seed s is a function of (s, i) alone: clip, start, crop and flip. So a resumed run sees what an uninterrupted one
            sees, whatever the number of workers. A sample never crosses a cut.
    read    one ffmpeg per sample seeks, decodes, crops and scales (spec dc-ae-v 7.1: random temporal crop, resize and crop). Or, with
            `cache`, every clip is decoded once, scaled down, into a file of raw bytes, from which samples are cut. Measured on 8 films, processor
            time per clip (results/data.json): 0.17 s against 0.004 s at 16x128x128, 0.38 s against 0.06 s at 80x256x256.

    train = Clips("folder", frames=16, size=(128, 128), cache="out/cache")
    for x in loader(train, batch=8, start_step=1000): ...     # [8, 3, 16, 128, 128] in [-1, 1], for ever
    held_out = validation("folder", 16, (128, 128), n=32)     # the same 32 clips every time

Held out for validation (`split`): a subfolder `val`, where there is one; else a tenth of the files; and of fewer than 20 videos the end of each,
in time. It depends on the files alone, not on frames, size or stride, so that no phase of a training sees what another is judged by.

    python -m training.clips FOLDER              a table of clips, cuts, windows and what was skipped; a contact sheet of samples
    python -m training.clips FOLDER --measure    clips per second with and without the cache, and whether a training step is kept fed -> results/data.json
    python assets/fetch.py              eight films and some stills into out/clips, to try it on
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting threads slow every other process down; must precede torch

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import kernels
from files import checkpoint, video
from files.checkpoint import UserError

VIDEOS = set(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .gif .y4m".split())
PICTURES = set(".png .jpg .jpeg .webp .bmp .tif .tiff".split())
INDEX = "out/clips-index.json"
VERSION = 1  # of what the index says; a new one makes every file be scanned again
TINY = 32  # side of the grey pictures in which cuts are looked for
FEW = 20  # of fewer videos than this the end of each is held out, not some of them whole
TRAIN, VALIDATION = 0.75, 0.20  # shares of such a clip; the 5 % between them belong to neither, for they look like both


# ---------------------------------------------------------------------------------------------------- scanning


@dataclass
class Clip:
    """What is known of a file. Frames are counted as stored; sizes are upright."""

    path: str
    frames: int = 0
    height: int = 0
    width: int = 0
    fps: float = 0.0
    cuts: list = field(default_factory=list)  # numbers of the frames that begin a new scene
    times: list = field(default_factory=list)  # seconds: [first, step] of an even rate, or all; empty: no jumping into this file
    alpha: bool = False
    error: str = ""  # why it cannot be used

    @property
    def picture(self):
        return Path(self.path).suffix.lower() in PICTURES

    def time(self, frame):
        """A moment between the frame before this one and this one (not the first), in seconds from the start of the file."""
        if len(self.times) == 2:
            return self.times[0] + (frame - 0.5) * self.times[1]
        return (self.times[frame - 1] + self.times[frame]) / 2

    def scenes(self, first, end):
        """[(first, end)] of the stretches without a cut between these two frames."""
        borders = [first, *(c for c in self.cuts if first < c < end), end]
        return list(zip(borders, borders[1:]))


def find_clips(folder):
    """All videos and pictures under a folder (or the one file), sorted by path. Hidden files and folders are left out."""
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: give a folder of videos and pictures.")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEOS | PICTURES and p.is_file()
                   and not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not paths:
        raise UserError(f"{folder} holds no videos and no pictures (looked for {' '.join(sorted(VIDEOS | PICTURES))}): give another folder.")
    return paths


def scan(path):
    """Decode a file once, in tiny grey pictures -> Clip; one that cannot be used says why in `error`."""
    clip = Clip(str(path))
    try:
        if clip.picture:
            clip.frames, (clip.height, clip.width) = 1, video.read_image(path).shape[1:]
        else:
            tiny = scan_video(clip)
            change = np.array([np.abs(a.astype(np.int16) - b).mean() for a, b in zip(tiny, tiny[1:])])  # from each frame to the next
            clip.cuts = find_cuts(change)
            if not seeks_well(clip, tiny, change):
                clip.times = []
    except (UserError, OSError) as e:
        clip.error = str(e)
    return clip


def tiny_grey(path, filters="", options=(), output=(), level="error"):
    """Decode a video to uint8 [t, TINY, TINY] -> (it, ffmpeg's status, its log)."""
    args = ["-v", level, "-nostats", *options, *video.source(path), "-map", "0:V:0", "-fps_mode", "passthrough",  # V: not a cover picture
            "-vf", f"{filters}scale={TINY}:{TINY}:flags=area,format=gray", *output, "-f", "rawvideo", "-"]
    with video.ffmpeg(*args, stdout=subprocess.PIPE) as (process, end):
        pixels = np.frombuffer(process.stdout.read(), np.uint8)
        status, log = end()
    return pixels[: len(pixels) // TINY**2 * TINY**2].reshape(-1, TINY, TINY), status, log


#: a line of ffmpeg's log, at level "level+info", that tells of damage: errors, and warnings of frames that were patched up
COMPLAINT = re.compile(r"(\[[^\]]* @ [^\]]*\] )*\[(error|fatal|warning(?=\].*(corrupt|EOI missing)))\]")


def scan_video(clip):
    """Fill in frames, size, rate and times of a video -> its tiny pictures. UserError if it is damaged, naming the frame: ffmpeg's `showinfo`
    filter writes a line for every frame into the log, between the decoder's complaints."""
    tiny, status, log = tiny_grey(clip.path, "showinfo=checksum=0,", level="level+info")
    times, sizes, complaints = [], [], []
    for line in log.splitlines():
        if match := re.search(r"\] n: *\d+ .*pts_time:(\S+) .*fmt:(\S+) .* s:(\d+)x(\d+)", line):
            times.append(float(match[1]) if re.fullmatch(r"-?[\d.]+(e-?\d+)?", match[1]) else math.nan)
            clip.alpha = bool(re.match("yuva|rgba|bgra|argb|abgr|gbrap|ya|pal8", match[2]))
            sizes.append((int(match[4]), int(match[3])))
            if sizes[-1] != sizes[0]:
                raise UserError(f"{clip.path} changes its size at frame {len(sizes) - 1}.")
        elif COMPLAINT.match(line) and (complaint := video.complaint(line)):
            if times:
                raise UserError(f"{clip.path} is damaged or cut off near frame {len(times)} ({complaint}).")
            complaints.append(complaint)
    if "Audio:" in log and "Video:" not in log:
        raise UserError(f"{clip.path} holds sound but no pictures.")
    if status or not times or len(times) != len(tiny):
        raise UserError(f"{clip.path} cannot be read as a video ({complaints[0] if complaints else video.NO_REASON}).")
    clip.frames, (clip.height, clip.width) = len(times), sizes[0]
    steps = np.diff(times)
    if (steps > 0).any():
        clip.fps = round(1 / float(np.median(steps[steps > 0])), 3)
    if len(steps) and (steps > 0).all():
        step = (times[-1] - times[0]) / len(steps)
        even = np.abs(np.array(times) - times[0] - step * np.arange(len(times))).max() < step / 4
        clip.times = [times[0], step] if even else times
    return tiny


def find_cuts(change):
    """Numbers of the frames that begin a new scene: the mean change is over 10 of 255 levels, and 3 times that of the 4 frames on either side."""
    cuts = []
    for i in np.flatnonzero(change > 10):
        around = np.concatenate([change[max(i - 4, 0) : i], change[i + 1 : i + 5]])
        if not len(around) or change[i] > 3 * np.median(around):
            cuts.append(int(i) + 1)
    return cuts


def seeks_well(clip, tiny, change):
    """Whether jumping to a frame's time gives that frame, for not every container can do it: tried where the picture changes most, in the middle
    and towards the end."""
    if not clip.times or clip.frames < 4:
        return False
    for third in np.array_split(np.arange(len(change)), 3)[1:]:
        frame = int(third[change[third].argmax()]) + 1
        found = tiny_grey(clip.path, options=["-ss", f"{clip.time(frame):.6f}"], output=["-frames:v", "1"])[0]
        if len(found) != 1 or np.abs(found[0].astype(np.int16) - tiny[frame]).mean() > change[frame - 1] / 4:
            return False
    return True


def scan_folder(folder, index=INDEX, workers=2):
    """[Clip] of every file in a folder. What the index knows of an unchanged file (path, size, time of change) is not scanned again."""
    paths, index = find_clips(folder), Path(index)
    keys, known = {p: fingerprint(p) for p in paths}, read_index(index)
    new = [p for p in paths if keys[p] not in known]
    with ThreadPoolExecutor(max(workers, 1)) as pool, tqdm(total=len(new), desc=f"scan {folder}", unit="clip", disable=len(new) < 20) as bar:
        for i in range(0, len(new), 256):  # so that little is lost when it is interrupted
            found = {}
            for path, clip in zip(new[i : i + 256], pool.map(scan, new[i : i + 256])):
                found[keys[path]] = dataclasses.asdict(clip)
                bar.update()
            known = read_index(index) | found  # another run may have added to it
            checkpoint.write_json(index, dict(version=VERSION, clips=known))
    return [Clip(**known[keys[p]] | dict(path=str(p))) for p in paths]


def read_index(index):
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(index.read_text())
        if content["version"] == VERSION:
            return content["clips"]
    return {}


def fingerprint(path):
    """A file's path, size and time of change, as one string."""
    stat = os.stat(path)
    return f"{Path(path).resolve()}|{stat.st_size}|{stat.st_mtime_ns}"


# ---------------------------------------------------------------------------------------------------- what is held out


def split_clips(clips, folder, split):
    """What of a folder's usable videos, or of its usable pictures, belongs to the split "train" or "val" -> [(clip, first frame, end)]."""
    if split not in ("train", "val"):
        raise UserError(f'there is no split "{split}": it is "train" or "val".')
    name = lambda clip: Path(os.path.relpath(clip.path, folder)).as_posix()
    held_out = {c.path for c in clips if name(c).startswith("val/")}
    if not held_out and len(clips) < FEW and not any(c.picture for c in clips):
        return [(c, 0, int(TRAIN * c.frames)) if split == "train" else (c, c.frames - int(VALIDATION * c.frames), c.frames) for c in clips]
    if not held_out and len(clips) > 1:
        shuffled = sorted(clips, key=lambda clip: hashlib.sha256(name(clip).encode()).digest())  # by names alone
        held_out = {c.path for c in shuffled[: math.ceil(len(clips) / 10)]}
    return [(c, 0, c.frames) for c in clips if (c.path in held_out) == (split == "val")]


# ---------------------------------------------------------------------------------------------------- reading


def read(clip, start, count, stride, box, size):
    """Every `stride`-th frame from `start` on, `box` (y, x, h, w) of it scaled to `size` -> uint8 [count, *size, 3]. One run of ffmpeg, which
    jumps to the frame where the file allows it and decodes from the beginning where it does not."""
    y, x, h, w = box
    layout, channels = ("rgba", 4) if clip.alpha else ("rgb24", 3)
    jump = bool(clip.times) and start > 0
    filters = [f"trim=start_frame={0 if jump else start}", f"select=not(mod(n\\,{stride}))", f"crop={w}:{h}:{x}:{y}:exact=1",
               f"scale={size[1]}:{size[0]}:flags=bicubic", f"format={layout}"]
    args = ["-v", "error", "-threads", "1", *(["-ss", f"{clip.time(start):.6f}"] if jump else []), *video.source(clip.path), "-map", "0:V:0",
            "-vf", ",".join(filters), "-fps_mode", "passthrough", "-frames:v", str(count), "-f", "rawvideo", "-"]
    with video.ffmpeg(*args, stdout=subprocess.PIPE) as (process, end):
        pixels = np.frombuffer(bytearray(process.stdout.read()), np.uint8)  # a bytearray may be written to, as torch wishes
        log = end()[1]
    if pixels.size != count * size[0] * size[1] * channels:
        reason = video.complaint(log) or "it has changed since it was scanned"
        raise UserError(f"{clip.path} could not be read from frame {start} on ({reason}).")
    return on_white(pixels.reshape(count, *size, channels))


def on_white(frames):
    """uint8 [..., 3] as it is; [..., 4] with its transparent parts on white, as in `video.read_image`."""
    if frames.shape[-1] == 3:
        return frames
    alpha = frames[..., 3:].astype(np.uint16)
    return ((frames[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def resize(frames, box, size):
    """Cut `box` (y, x, h, w) out of uint8 [t, h, w, 3], scaled to `size`, bicubic without aliasing."""
    y, x, h, w = box
    part = torch.from_numpy(np.array(frames[:, y : y + h, x : x + w])).permute(0, 3, 1, 2)
    return F.interpolate(part, size, mode="bicubic", antialias=True).permute(0, 2, 3, 1).numpy()


def crop_box(height, width, size, zoom=1.0, fy=0.5, fx=0.5):
    """The part of a picture that fills `size` -> (y, x, h, w). `zoom` = 1: the largest with that aspect ratio; less is a part of it, but never
    one that would have to be enlarged. fy, fx in 0..1 place it."""
    most = min(height / size[0], width / size[1])
    k = max(most * zoom, min(most, 1.0))
    h, w = min(round(size[0] * k), height), min(round(size[1] * k), width)
    return round((height - h) * fy), round((width - w) * fx), h, w


class Clips:
    """The samples of a folder (or of several, each split on its own), for one bucket: `frames` x `size` (h, w), every `stride`-th frame.

    `fps` instead of `stride`: every clip at about that rate. `zoom`: the smallest share of the frame's side that a random crop may have.
    `flip`: mirror every other sample. `pictures=True`: the folder's pictures instead of its videos, each as a clip of `frames` equal
    frames (1: alone; single frames of the videos are what `frames=1` without it gives). `cache`: a folder for decoded clips, scaled down as far as
    `size` and `zoom` allow. `index`: the file that remembers what the scan found.

    Clips smaller than `size`, without a long enough scene, or damaged are left out: `skipped` is {path: reason}. None left is a UserError.
    """

    def __init__(self, folder, frames, size, split="train", seed=0, stride=1, cache=None, fps=None, zoom=0.5, flip=False, pictures=False,
                 index=INDEX, workers=2):
        self.folder, self.frames, self.size, self.seed, self.zoom, self.flip = folder, frames, tuple(size), seed, zoom, flip
        self.cache, self.clips, self.skipped = cache and Path(cache), {}, {}  # path -> Clip, path -> reason
        self.windows, self.strides = {}, {}  # path -> [(first start, number of starts)], path -> stride
        if min(frames, stride, *size) < 1 or not 0 < zoom <= 1:
            raise UserError(f"{frames} frames of {size[0]}x{size[1]}, stride {stride}, zoom {zoom} make no clip: "
                            "zoom is in 0..1, the others 1 or more.")
        for one in [folder] if isinstance(folder, (str, Path)) else folder:
            clips = [c for c in scan_folder(one, index, workers) if c.picture == pictures]
            self.clips |= {c.path: c for c in clips}
            self.skipped |= {c.path: c.error for c in clips if c.error}
            for clip, first, end in split_clips([c for c in clips if not c.error], one, split):
                self.add(clip, first, end, max(round(clip.fps / fps), 1) if fps else stride, split)
        if self.cache and not pictures:
            self.fill_cache(workers)
        if not self.windows:
            why = f" ({next(iter(self.skipped.values())).rstrip('.')})" if self.skipped else ""
            raise UserError(f"none of the {len(self.clips)} {'pictures' if pictures else 'videos'} in {folder} can be used for {split} with {frames} "
                            f"frames of {size[0]}x{size[1]}{why}: lower --frames or --size, or add clips.")
        self.paths = list(self.windows)
        starts = np.sqrt([self.starts(path) for path in self.paths])
        self.chances = starts / starts.sum()  # long clips come more often, but do not crowd out the short ones

    def add(self, clip, first, end, stride, split):
        """Note where samples may start in frames first..end-1 of a clip, or why none may."""
        span = 1 if clip.picture else (self.frames - 1) * stride + 1
        scenes = clip.scenes(first, end)
        windows = [(a, b - a - span + 1) for a, b in scenes if b - a >= span]
        if clip.height < self.size[0] or clip.width < self.size[1]:
            self.skipped[clip.path] = f"{clip.path} is {clip.height}x{clip.width}, smaller than {self.size[0]}x{self.size[1]}."
        elif not windows:
            longest = max(b - a for a, b in scenes)
            self.skipped[clip.path] = f"{clip.path} has at most {longest} frames without a cut for {split}, and {span} are needed."
        else:
            self.windows[clip.path], self.strides[clip.path] = windows, stride

    def __len__(self):
        """How many different starts there are."""
        return sum(map(self.starts, self.paths))

    def starts(self, path):
        return sum(n for _, n in self.windows[path])

    def start(self, path, k):
        """Frame number of the k-th possible start in a clip."""
        for first, n in self.windows[path]:
            if k < n:
                return first + k
            k -= n

    def draw(self, rng):
        """What a sample shall be -> (clip, start, box, mirrored)."""
        path = self.paths[rng.choice(len(self.paths), p=self.chances)]
        clip, start = self.clips[path], self.start(path, int(rng.integers(self.starts(path))))
        share, fy, fx, coin = rng.random(4)
        box = crop_box(clip.height, clip.width, self.size, self.zoom + (1 - self.zoom) * share, fy, fx)
        return clip, start, box, bool(self.flip and coin < 0.5)

    def rng(self, index):
        """Sample `index` is drawn from this and nothing else."""
        return np.random.default_rng((self.seed, index))

    def sample(self, index):
        """Sample number `index`, from 0 on without end -> uint8 [3, frames, h, w]. A clip that fails by now, though it was whole when it was
        scanned, is named once, and another takes its place."""
        rng = self.rng(index)
        for _ in range(20):
            clip, start, box, mirrored = self.draw(rng)
            try:
                x = self.read(clip, start, box)
                return torch.from_numpy(np.ascontiguousarray(x[:, :, ::-1]) if mirrored else x).permute(3, 0, 1, 2).contiguous()
            except (UserError, OSError) as e:
                if clip.path not in self.skipped:
                    self.skipped[clip.path] = str(e)
                    warnings.warn(f"{e} Another clip takes its place.")
        raise UserError(f"20 clips of {self.folder} in a row could not be read: check the disk.")

    def read(self, clip, start, box):
        """A stretch of a clip -> uint8 [frames, *size, 3], from the cache if there is one."""
        if clip.picture:
            return resize(video.to_uint8(video.read_image(clip.path)[:, None]), box, self.size).repeat(self.frames, axis=0)
        stride = self.strides[clip.path]
        if not self.cache:
            return read(clip, start, self.frames, stride, box, self.size)
        file, (h, w) = self.cached(clip)
        frames = np.memmap(file, np.uint8, "r", shape=(clip.frames, h, w, 3))[start : start + (self.frames - 1) * stride + 1 : stride]
        y, x, bh, bw = box
        ky, kx = h / clip.height, w / clip.width
        return resize(frames, (round(y * ky), round(x * kx), round(bh * ky), round(bw * kx)), self.size)

    def cached(self, clip):
        """File of a clip's decoded frames, and their size: as small as crops of `zoom` allow without being enlarged."""
        k = min(max(self.size[0] / clip.height, self.size[1] / clip.width) / self.zoom, 1)
        h, w = math.ceil(clip.height * k), math.ceil(clip.width * k)
        key = hashlib.sha256(fingerprint(clip.path).encode()).hexdigest()[:12]
        return self.cache / f"{Path(clip.path).stem}-{key}-{h}x{w}.rgb", (h, w)

    def fill_cache(self, workers):
        """Decode every usable clip once. A file of the right size is kept; a clip that fails is skipped like any other."""
        jobs = []
        for path in self.windows:
            clip = self.clips[path]
            file, (h, w) = self.cached(clip)
            if not file.exists() or file.stat().st_size != clip.frames * h * w * 3:
                jobs.append((clip, file, h, w))
        self.cache.mkdir(parents=True, exist_ok=True)
        need, free = sum(clip.frames * h * w * 3 for clip, _, h, w in jobs), shutil.disk_usage(self.cache).free
        if need > free:
            raise UserError(f"decoded clips need {need / 1e9:.1f} GB and {self.cache} has {free / 1e9:.1f}: leave out --cache, or use another disk.")
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            for clip, error in tqdm(pool.map(decode, jobs), "decode", len(jobs), unit="clip", disable=len(jobs) < 20):
                if error:
                    self.skipped[clip.path] = error
                    del self.windows[clip.path]


def decode(job):
    """Write all frames of a clip, scaled to h x w, as raw bytes -> (clip, what went wrong or "")."""
    clip, file, h, w = job
    args = ["-v", "error", "-y", *video.source(clip.path), "-map", "0:V:0", "-vf",
            f"scale={w}:{h}:flags=bicubic,format={'rgba' if clip.alpha else 'rgb24'}", "-fps_mode", "passthrough", "-f", "rawvideo"]
    try:
        with checkpoint.atomic_path(file) as tmp:
            with video.ffmpeg(*args, tmp) as (_, end):
                log = end()[1]
            if clip.alpha:
                on_white(np.fromfile(tmp, np.uint8).reshape(-1, h, w, 4)).tofile(tmp)
            if tmp.stat().st_size != clip.frames * h * w * 3:
                raise UserError(f"{clip.path} could not be decoded into {file.parent} ({video.complaint(log) or video.NO_REASON}).")
    except (UserError, ValueError) as e:
        return clip, str(e)
    return clip, ""


# ---------------------------------------------------------------------------------------------------- streams


def loader(dataset, batch, start_step=0, workers=2, rank=0, ranks=1, device=None, ahead=2):
    """Batches from step `start_step` on, for ever -> [batch, 3, t, h, w] float in [-1, 1], on `device`.

    Step k is made of samples k * batch to (k + 1) * batch - 1 (with several processes, `rank` of `ranks` has its share of a step `ranks` times as
    large), so the stream depends neither on where it starts nor on `workers`: that many threads keep `ahead` batches ready, each driving an
    ffmpeg process or cutting from the cache; with 0 samples are made when they are asked for.
    """
    share = lambda step: range((step * ranks + rank) * batch, (step * ranks + rank + 1) * batch)
    ready = lambda samples: torch.stack(samples).to(device or "cpu").float().div_(127.5).sub_(1)  # bytes travel to the GPU, not floats
    if not workers:
        while True:
            yield ready([dataset.sample(i) for i in share(start_step)])
            start_step += 1
    queue, pool = collections.deque(), ThreadPoolExecutor(workers)
    try:
        while True:
            while len(queue) <= ahead:
                queue.append([pool.submit(dataset.sample, i) for i in share(start_step)])
                start_step += 1
            yield ready([sample.result() for sample in queue.popleft()])
    finally:
        pool.shutdown(cancel_futures=True)


def validation(folder, frames, size, n, **more):
    """Up to `n` held-out clips, the same every time -> list of float [3, frames, h, w] in [-1, 1].

    The clips take turns; of each, starts are spread evenly; the frame is scaled to cover `size` and cropped in the middle (spec dc-ae-v 8.1).
    Fewer than `n` come where there are fewer different starts. `more`: as for `Clips`.
    """
    dataset = Clips(folder, frames, size, "val", **more)
    share = collections.Counter()
    for _ in range(min(n, len(dataset))):
        share[min((p for p in dataset.paths if share[p] < dataset.starts(p)), key=lambda p: share[p])] += 1  # they take turns
    videos = []
    for path, count in sorted(share.items()):
        clip = dataset.clips[path]
        for k in range(count):
            start = dataset.start(path, (2 * k + 1) * dataset.starts(path) // (2 * count))
            videos.append(video.to_tensor(dataset.read(clip, start, crop_box(clip.height, clip.width, dataset.size))))
    return videos


# ---------------------------------------------------------------------------------------------------- the script


def table(folder, frames, size, stride, index, workers):
    """Print what is in a folder and what of it can be used."""
    every, usable = scan_folder(folder, index, workers), {}
    for split in ("train", "val"):
        for pictures in (False, True):
            with contextlib.suppress(UserError):
                part = Clips(folder, frames, size, split, stride=stride, pictures=pictures, index=index)
                usable |= {(path, split): part.starts(path) for path in part.paths}
    print(f"{'clip':40} {'frames':>7} {'size':>10} {'fps':>7} {'cuts':>5} {'train':>7} {'val':>6}   (starts of {frames} frames, stride {stride})")
    for c in every:
        name, numbers = os.path.relpath(c.path, folder)[-40:], [usable.get((c.path, split), 0) for split in ("train", "val")]
        if not c.error:
            print(f"{name:40} {c.frames:7} {f'{c.height}x{c.width}':>10} {c.fps:7.2f} {len(c.cuts):5} {numbers[0]:7} {numbers[1]:6}")
    skipped = [c for c in every if c.error]
    print(f"{len(every) - len(skipped)} of {len(every)} files can be read{'; skipped:' if skipped else '.'}")
    for c in skipped:
        print(f"  {c.error}")


def rate(stream, seconds):
    """Clips per second that a stream delivers, after a batch to warm up."""
    next(stream)
    started, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        count += len(next(stream))
    stream.close()
    return count / passed


def cost(dataset, count=24):
    """Seconds of processor time that a clip takes, ffmpeg's included: hardly changed by what else the machine does."""
    started = sum(os.times()[:4])
    for i in range(count):
        dataset.sample(i)
    return (sum(os.times()[:4]) - started) / count


def measure(folder, cache, index, seconds=10.0, rounds=2, steps=8, preset="small", step_bucket=(16, (64, 64), 8)):
    """Clips per second with and without the cache, and a training step's time on one resident batch and on streams -> a dict for the JSON.

    The training is that of `ae.PRESETS[preset]`, L1 loss, AdamW, bf16 on one thread. The sources take turns, `rounds` times, because
    machines are shared; "waited" is the share of the time spent in `next(stream)`.
    """
    import ae  # a floor further up: only to have something to feed

    result = dict(speed=[], steps=[], load_before=os.getloadavg()[0])
    for frames, size, batch in ((16, (128, 128), 8), (80, (256, 256), 1)):
        for where in (None, cache):
            started = time.perf_counter()
            dataset = Clips(folder, frames, size, cache=where, index=index)
            filled = time.perf_counter() - started
            row = dict(frames=frames, size=size, cached=bool(where), clips=len(dataset.paths), cpu_seconds_per_clip=round(cost(dataset), 4),
                       clips_per_second={n: round(rate(loader(dataset, batch, 0, n), seconds), 2) for n in (1, 2)})
            if where:
                row |= dict(seconds_to_decode=round(filled, 1), bytes=sum(dataset.cached(dataset.clips[p])[0].stat().st_size for p in dataset.paths))
            result["speed"].append(row)
            print(row)

    frames, size, batch = step_bucket
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    net = ae.DCAEV(ae.PRESETS[preset]).to(device)
    optimiser = torch.optim.AdamW(net.parameters(), 1e-4)
    makers = {(name, n): Clips(folder, frames, size, cache=where, index=index) for name, where, n in
              (("decoded", None, 2), ("cached", cache, 0), ("cached", cache, 1))}
    resident = next(loader(makers["cached", 0], batch, 0, 0, device=device))
    sources = {("resident", 0): lambda: itertools.repeat(resident)}
    sources |= {key: functools.partial(loader, dataset, batch, 0, key[1], device=device) for key, dataset in makers.items()}
    waits, totals = collections.defaultdict(list), collections.defaultdict(list)
    for _ in range(rounds):
        for key, source in sources.items():
            stream = source()
            for i in range(steps + 1):
                started = time.perf_counter()
                x = next(stream)
                waited = time.perf_counter() - started
                with kernels.autocast(device):
                    loss = (net(x).float() - x).abs().mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                loss.item()
                if i:  # the first step of a stream finds nothing ready
                    waits[key].append(waited)
                    totals[key].append(time.perf_counter() - started)
            getattr(stream, "close", lambda: None)()
    for (name, n), seconds_each in totals.items():
        result["steps"].append(dict(source=name, workers=n, seconds=round(statistics.median(seconds_each), 4),
                                    waited=round(sum(waits[name, n]) / sum(seconds_each), 4)))
        print(result["steps"][-1])
    return result | dict(preset=preset, step_bucket=step_bucket, rounds=rounds, steps_per_round=steps, load_after=os.getloadavg()[0])


def main(argv=None):
    p = argparse.ArgumentParser(description="Show what a folder of clips holds and how it is sampled.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("folder")
    p.add_argument("--frames", type=int, default=16)
    p.add_argument("--size", type=video.size_arg, default=(128, 128), help="HEIGHTxWIDTH of a sample")
    p.add_argument("--stride", type=int, default=1, help="take every so many-th frame")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--cache", metavar="FOLDER", help="decode into this folder first (to measure: needs about 3 GB)")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--out", default="out/clips.png", help="contact sheet of samples")
    p.add_argument("--index", default=INDEX, help="what earlier scans found")
    p.add_argument("--measure", action="store_true", help="clips per second, and whether a training step is kept fed -> results/data.json")
    args = p.parse_args(argv)
    table(args.folder, args.frames, args.size, args.stride, args.index, args.workers)
    if args.measure:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory(dir=args.cache) as cache:  # a fresh one, so that filling it is measured too
            measured = measure(args.folder, cache, args.index)
        checkpoint.write_json("results/data.json", dict(**checkpoint.provenance(), folder=args.folder, **measured))
        return print("wrote results/data.json")
    dataset = Clips(args.folder, args.frames, args.size, seed=args.seed, stride=args.stride, cache=args.cache, index=args.index)
    labels = ["{0.path} {1} {2}".format(*dataset.draw(dataset.rng(i))) for i in range(12)]
    video.contact_sheet(args.out, next(loader(dataset, 12, 0, args.workers)), labels=labels, scale=1)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
