"""A folder of clips as training data.

Any mix of videos of any size, rate and length becomes an endless stream of batches of
one bucket (frames x height x width):

    scan   every file is decoded once, at 32x32 grey: how many frames and when,
           where the cuts are, whether it is whole. Kept in a small JSON file, so that
           the next run starts at once. What cannot be used is named with the reason.
    draw   sample i of seed s is a function of (s, i) alone: clip, start and crop.
           So a resumed run sees what an uninterrupted one sees, whatever the number of
           workers. A sample never crosses a cut.
    read   one ffmpeg per sample seeks, decodes, crops and scales. Or, with `cache`,
           every clip is decoded once, scaled down, into a file of raw bytes, from which
           samples are cut: 0.17 s of processor time against 0.004 s at 16x128x128
           (results/data.json, by this file as of commit bfdbccb).

    train = Clips("folder", frames=16, size=(128, 128), cache="out/cache")
    for x in loader(train, batch=8): ...      # [8, 3, 16, 128, 128], for ever
    held_out = validation("folder", 16, (128, 128), n=32)   # the same every time

What is held out depends on the files alone, not on frames, size or rate
(`split_clips`).

    python -m training.clips FOLDER   a table of clips, cuts, conversions, and what was
                                      skipped; a contact sheet of samples
    python assets/fetch.py            eight films and some stills into out/clips
"""
from files import errors

errors.begin(__name__)  # before the slow imports: a Ctrl-C, waiting threads

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from files import checkpoint, folders, options, video
from files.errors import UserError, printable
from files.video import crop_box

VIDEOS = set(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .gif "
             ".apng .y4m".split())
INDEX = "out/clips-index.json"
VERSION = 2  # of what the index says; a new one makes every file be scanned again
TINY = 32  # side of the grey pictures in which cuts are looked for
FEW = 20  # of fewer videos than this the end of each is held out, not some of them whole
#: shares of such a clip; the 5 % between them belong to neither, for they look like both
TRAIN, VALIDATION = 0.75, 0.20


# ------------------------------------------------------------------ scanning


@dataclass
class Clip:
    """What is known of a file. Frames are counted as stored; sizes are as shown."""

    path: str
    info: video.ClipInfo = video.ClipInfo(0.0, 0, 0)
    frames: int = 0
    cuts: list = field(default_factory=list)  # numbers of the frames that begin a new scene
    times: list = field(default_factory=list)  # seconds: [first, step] of an even rate, or all
    seeks: bool = False  # whether jumping to a frame's time gives that frame
    error: str = ""  # why it cannot be used

    @property
    def even(self):
        return len(self.times) == 2

    def stamps(self):
        """Seconds of every frame."""
        if self.even:
            return self.times[0] + self.times[1] * np.arange(self.frames)
        return np.array(self.times)

    def end(self, frame):
        """When frame number `frame` - 1 ceases to be shown."""
        stamps = self.stamps()
        return stamps[frame] if frame < self.frames else stamps[-1] + 1 / self.info.fps

    def scenes(self, first, end):
        """[(first, end)] of the stretches without a cut between these two frames."""
        borders = [first, *(c for c in self.cuts if first < c < end), end]
        return list(zip(borders, borders[1:]))

    def found(self, fps=None):
        """What its header says that reading changes, in words."""
        words = list(self.info.conversions)
        if self.times and not self.even:
            words.append("variable rate")
        if fps and abs(self.info.fps / fps - 1) > 0.01:
            repeated = ", frames repeated" if self.info.fps < fps else ""
            words.append(f"{self.info.fps:g} to {fps:g} fps{repeated}")
        return "; ".join(words)


def iter_files(folder):
    """All files under a folder, sorted by path; hidden files and folders are left out.
    Each real folder comes once, also behind links, whatever these lead to; so do links of
    clips that lead nowhere, for whoever opens them to name."""
    found, seen = [], set()
    for where, inner, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        visible = [name for name in inner if not name.startswith(".")]
        inner[:] = sorted(visible, key=lambda f: (os.path.islink(os.path.join(where, f)), f))
        for name in files:
            path = Path(where, name)
            dead = is_video(path) and not path.exists()
            if not name.startswith(".") and (path.is_file() or dead):
                found.append(path)
    return sorted(found)


def is_video(path):
    return path.suffix.lower() in VIDEOS


def find_clips(folder):
    """All videos under a folder (or the one file), sorted by path."""
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: give a folder of videos.")
    paths = list(filter(is_video, iter_files(folder)))
    if not paths:
        raise UserError(f"{folder} holds no videos (looked for {' '.join(sorted(VIDEOS))}): give "
                        "another folder.")
    return paths


def scan(path):
    """Decode a file once, in tiny grey pictures -> Clip; one that cannot be used says
    why in `error`."""
    clip = Clip(str(path))
    try:
        scan_video(clip)
    except (UserError, OSError) as e:
        clip.error = str(e)
    return clip


def scan_video(clip):
    """Fill in what is known of a video. UserError if it is damaged, naming the
    frame."""
    clip.info = video.clip_info(clip.path)
    stamps, tiny = [], []
    for seconds, frame in video.decode(clip.path, clip.info, (TINY, TINY), flags="area"):
        stamps.append(seconds)
        tiny.append(grey(frame))
    clip.frames = len(tiny)
    steps = [video.time_step(a, b, clip.info.fps) for a, b in zip(stamps, stamps[1:])]
    first = 0.0 if math.isnan(stamps[0]) else stamps[0]
    times = first + np.cumsum([0.0, *steps])
    step = np.mean(steps) if steps else 1 / clip.info.fps
    even = np.abs(times - first - step * np.arange(clip.frames)).max() < step / 4
    clip.times = [float(first), float(step)] if even else times.tolist()

    # from each frame to the next
    change = np.array([np.abs(a - b).mean() for a, b in zip(tiny, tiny[1:])])
    clip.cuts = find_cuts(change)
    clip.seeks = np.allclose(times, stamps) and seeks_well(clip, tiny, change)


def grey(frame):
    return frame.mean(axis=2, dtype=np.float32)


def find_cuts(change):
    """Numbers of the frames that begin a new scene: the mean change is over 10 of 255
    levels, and 3 times that of the 4 frames on either side."""
    cuts = []
    for i in np.flatnonzero(change > 10):
        around = np.concatenate([change[max(i - 4, 0) : i], change[i + 1 : i + 5]])
        if not len(around) or change[i] > 3 * np.median(around):
            cuts.append(int(i) + 1)
    return cuts


def seeks_well(clip, tiny, change):
    """Whether jumping to a frame's time gives that frame, for not every container can
    do it: tried where the picture changes most, in the middle and towards the end."""
    if clip.frames < 4:
        return False
    for third in np.array_split(np.arange(len(change)), 3)[1:]:
        frame = int(third[change[third].argmax()]) + 1
        jump = ["-ss", f"{before(clip, frame):.6f}"]
        stream = video.decode(
            clip.path, clip.info, (TINY, TINY), options=jump, limit=1, flags="area")
        with contextlib.closing(stream), contextlib.suppress(UserError):
            found = grey(next(stream)[1])
            if np.abs(found - tiny[frame]).mean() <= change[frame - 1] / 4:
                continue
        return False
    return True


def before(clip, frame):
    """A moment between the frame before this one and this one (not the first), in
    seconds."""
    return clip.stamps()[frame - 1 : frame + 1].mean()


def scan_folder(folder, index=INDEX, workers=2):
    """[Clip] of every file in a folder. What the index knows of an unchanged file is
    not scanned again."""
    paths, index = find_clips(folder), Path(index)
    keys, known = {p: file_stamp(p) for p in paths}, read_index(index)
    new = [p for p in paths if keys[p] not in known]
    bar = tqdm(total=len(new), desc=printable(f"scan {folder}"), unit="clip",
               disable=len(new) < 20)
    with ThreadPoolExecutor(max(workers, 1)) as pool, bar:
        for i in range(0, len(new), 256):  # so that little is lost when it is interrupted
            part, found = new[i : i + 256], {}
            for path, clip in zip(part, pool.map(scan, part)):
                found[keys[path]] = dataclasses.asdict(clip)
                bar.update()
            known = read_index(index) | found  # another run may have added to it
            checkpoint.write_json(index, dict(version=VERSION, clips=known))
    clips = []
    for path in paths:
        facts = dict(known[keys[path]], path=str(path))
        clips.append(Clip(**facts | dict(info=video.ClipInfo(**facts["info"]))))
    return clips


def read_index(index):
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(index.read_text())
        if content["version"] == VERSION:
            return content["clips"]
    return {}


def file_stamp(path):
    """A file's path, size, time of change and place on the disk, as one string."""
    stat = os.stat(path) if os.path.exists(path) else os.lstat(path)  # a link to nothing
    return f"{os.path.realpath(path)}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"


# ------------------------------------------------------------------ what is held out


def split_clips(clips, folder, split):
    """What of a folder's usable videos belongs to the split "train" or "val"
    -> [(clip, first frame, end)].

    Held out is a subfolder `val`, where there is one; else a tenth of the files; and of
    fewer than 20 videos the end of each, in time: no phase of a training sees what
    another is judged by.
    """
    names = {c.path: Path(os.path.relpath(c.path, folder)).as_posix() for c in clips}
    held_out = {path for path, name in names.items() if name.startswith("val/")}
    if not held_out and len(clips) < FEW:
        if split == "train":
            return [(c, 0, int(TRAIN * c.frames)) for c in clips]
        return [(c, c.frames - int(VALIDATION * c.frames), c.frames) for c in clips]
    if not held_out:
        order = sorted(names, key=lambda p: hashlib.sha256(os.fsencode(names[p])).digest())
        held_out = set(order[: math.ceil(len(clips) / 10)])  # by names alone
    return [(c, 0, c.frames) for c in clips if (c.path in held_out) == (split == "val")]


# ------------------------------------------------------------------ reading


def read(clip, numbers, box, size):
    """The frames `numbers` (rising) of a clip, `box` (y, x, h, w) of them scaled to
    `size` -> uint8 [len(numbers), *size, 3]. One run of ffmpeg, which jumps to the
    first where the file allows it and decodes from the beginning where it does not."""
    wanted, place = np.unique(numbers, return_inverse=True)
    first, last = int(wanted[0]), int(wanted[-1])
    options, offset = ["-threads", "1"], 0
    if clip.seeks and first > 0:
        options += ["-ss", f"{before(clip, first):.6f}"]
        offset = first
    chosen = "+".join(f"eq(n\\,{n - offset})" for n in wanted)
    if len(wanted) == last - first + 1:
        chosen = f"between(n\\,{first - offset}\\,{last - offset})"
    pick = [f"select={chosen}"]
    stream = video.decode(clip.path, clip.info, size, box, pick, options, limit=len(wanted))
    with contextlib.closing(stream):
        frames = [frame for _, frame in itertools.islice(stream, len(wanted))]
    if len(frames) < len(wanted):
        raise UserError(f"{clip.path} could not be read from frame {first} on (it has changed "
                        "since it was scanned).")
    return np.stack(frames)[place]


def resize(frames, box, size):
    """Cut `box` (y, x, h, w) out of uint8 [t, h, w, 3], scaled to `size`, bicubic
    without aliasing."""
    y, x, h, w = box
    part = torch.from_numpy(np.array(frames[:, y : y + h, x : x + w])).permute(0, 3, 1, 2)
    part = F.interpolate(part, size, mode="bicubic", antialias=True)
    return part.permute(0, 2, 3, 1).numpy()


class Clips:
    """The samples of a folder (or of several, each split on its own), for one bucket:
    `frames` x `size` (h, w).

    `fps`: the rate at which clips are read; None: their own. `zoom`: the smallest share of
    the frame's side that a random crop may have. `cache`: a folder for decoded clips,
    scaled down as far as `size` and `zoom` allow. `index`: the file that remembers what
    the scan found.

    Clips smaller than `size`, without a long enough scene, or damaged are left out:
    `skipped` is {path: reason}. None left is a UserError.
    """

    def __init__(self, folder, frames, size, split="train", seed=0, cache=None, fps=None, zoom=0.5,
                 index=INDEX, workers=2):
        self.folder, self.frames, self.size, self.seed = folder, frames, tuple(size), seed
        self.zoom, self.fps = zoom, fps
        self.cache, self.clips, self.skipped = cache and Path(cache), {}, {}
        self.windows = {}  # path -> [(first start, number of starts)]
        if min(frames, *size) < 1 or not 0 < zoom <= 1:
            raise UserError(f"{frames} frames of {size[0]}x{size[1]}, zoom {zoom} "
                            "make no clip: zoom is in 0..1, the others 1 or more.")
        for one in [folder] if isinstance(folder, (str, Path)) else folder:
            usable = []
            for clip in scan_folder(one, index, workers):
                self.clips[clip.path] = clip
                if clip.error:
                    self.skipped[clip.path] = clip.error
                else:
                    usable.append(clip)
            for clip, first, end in split_clips(usable, one, split):
                self.add(clip, first, end, split)
        if self.cache:
            self.fill_cache(workers)
        if not self.windows:
            why = f" ({next(iter(self.skipped.values())).rstrip('.')})" if self.skipped else ""
            raise UserError(f"none of the {len(self.clips)} videos in {folder} can be used for "
                            f"{split} with {frames} frames of {size[0]}x{size[1]}{why}: lower "
                            "--frames or --size, or add clips.")
        self.paths = list(self.windows)
        starts = np.sqrt([self.starts(path) for path in self.paths])
        # long clips come more often, but do not crowd out the short ones
        self.chances = starts / starts.sum()

    def add(self, clip, first, end, split):
        """Note where samples may start in frames first..end-1 of a clip, or why none
        may."""
        longest, windows = 0, []
        for scene, border in clip.scenes(first, end):
            longest = max(longest, border - scene)
            starts = self.count_starts(clip, scene, border)
            if starts > 0:
                windows.append((scene, starts))
        if clip.info.height < self.size[0] or clip.info.width < self.size[1]:
            self.skipped[clip.path] = (
                f"{clip.path} is {clip.info.height}x{clip.info.width}, smaller than "
                f"{self.size[0]}x{self.size[1]}.")
        elif not windows:
            rate = f" at {self.fps:g} per second" if self.fps else ""
            self.skipped[clip.path] = (
                f"{clip.path} has at most {longest} frames without a cut for {split}, and "
                f"{self.frames}{rate} are needed.")
        else:
            self.windows[clip.path] = windows

    def count_starts(self, clip, first, end):
        """In how many of these frames, from the first on, a sample may start that ends
        before frame `end`."""
        if not self.fps:
            return end - first - (self.frames - 1)
        last = self.ticks()[-1]  # when the sample's last frame is shown
        return int((clip.stamps()[first:end] + last < clip.end(end)).sum())

    def ticks(self):
        """Seconds from a sample's start to each of its frames."""
        return (np.arange(self.frames) + video.SLACK) / self.fps

    def numbers(self, clip, start):
        """Numbers of the stored frames that a sample consists of."""
        if not self.fps:
            return start + np.arange(self.frames)
        stamps = clip.stamps()
        return np.searchsorted(stamps, stamps[start] + self.ticks(), side="right") - 1

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
        """What a sample shall be -> (clip, start, box)."""
        path = self.paths[rng.choice(len(self.paths), p=self.chances)]
        clip, start = self.clips[path], self.start(path, int(rng.integers(self.starts(path))))
        share, fy, fx = rng.random(3)
        zoom = self.zoom + (1 - self.zoom) * share
        box = crop_box(clip.info.height, clip.info.width, self.size, zoom, fy, fx)
        return clip, start, box

    def rng(self, index):
        """Sample `index` is drawn from this and nothing else."""
        return np.random.default_rng((self.seed, index))

    def sample(self, index):
        """Sample number `index`, from 0 on without end -> uint8 [3, frames, h, w]. A
        clip that fails by now, though it was whole when it was scanned, is named once,
        and another takes its place."""
        rng = self.rng(index)
        for _ in range(20):
            clip, start, box = self.draw(rng)
            try:
                x = self.read(clip, start, box)
            except (UserError, OSError) as e:
                if clip.path not in self.skipped:
                    self.skipped[clip.path] = str(e)
                    warnings.warn(f"{printable(e)} Another clip takes its place.")
                continue
            return torch.from_numpy(x).permute(3, 0, 1, 2).contiguous()
        raise UserError(f"20 clips of {self.folder} in a row could not be read: check the disk.")

    def read(self, clip, start, box):
        """A stretch of a clip -> uint8 [frames, *size, 3], from the cache if there is
        one."""
        numbers = self.numbers(clip, start)
        if not self.cache:
            return read(clip, numbers, box, self.size)
        file, (h, w) = self.cached(clip)
        frames = np.memmap(file, np.uint8, "r", shape=(clip.frames, h, w, 3))[numbers]
        ky, kx = h / clip.info.height, w / clip.info.width
        box = [round(length * k) for length, k in zip(box, (ky, kx, ky, kx))]
        return resize(frames, box, self.size)

    # ---- the cache of decoded clips

    def cached(self, clip):
        """File of a clip's decoded frames, and their size: as small as crops of `zoom`
        allow without being enlarged."""
        height, width = clip.info.height, clip.info.width
        k = min(max(self.size[0] / height, self.size[1] / width) / self.zoom, 1)
        h, w = math.ceil(height * k), math.ceil(width * k)
        stamp = f"{file_stamp(clip.path)}|{video.READER}"
        key = hashlib.sha256(os.fsencode(stamp)).hexdigest()[:12]
        return self.cache / f"{Path(clip.path).stem[:80]}-{key}-{h}x{w}.rgb", (h, w)

    def fill_cache(self, workers):
        """Decode every usable clip once. A file of the right size is kept; a clip that
        fails is skipped like any other."""
        jobs, need = [], 0
        for path in self.windows:
            clip = self.clips[path]
            file, (h, w) = self.cached(clip)
            size = clip.frames * h * w * 3
            if not file.exists() or file.stat().st_size != size:
                jobs.append((clip, file, (h, w)))
                need += size
        folders.check_room(self.cache, need, "decoded clips")
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            done = pool.map(decode, jobs)
            for clip, error in tqdm(done, "decode", len(jobs), unit="clip", disable=len(jobs) < 20):
                if error:
                    self.skipped[clip.path] = error
                    del self.windows[clip.path]


def decode(job):
    """Write all frames of a clip, scaled, as raw bytes -> (clip, what went wrong or
    "")."""
    clip, file, size = job
    try:
        with checkpoint.atomic_path(file) as tmp, open(tmp, "wb") as out:
            count = 0
            for _, frame in video.decode(clip.path, clip.info, size):
                out.write(frame.tobytes())
                count += 1
            if count != clip.frames:
                raise UserError(f"{clip.path} has changed since it was scanned.")
    except UserError as e:
        return clip, str(e)
    return clip, ""


# ------------------------------------------------------------------ streams


def read_ahead(read, items, workers, ahead):
    """(item, future of read(item)) in order, read by threads that are up to `ahead` items
    in front."""
    queue, pool = collections.deque(), ThreadPoolExecutor(max(workers, 1))
    try:
        for item in items:
            queue.append((item, pool.submit(read, item)))
            if len(queue) > ahead:
                yield queue.popleft()
        yield from queue
    finally:
        pool.shutdown(cancel_futures=True)


def loader(dataset, batch, start_step=0, workers=2, rank=0, ranks=1, device=None):
    """Batches from step `start_step` on, for ever -> [batch, 3, t, h, w] float in [-1,
    1], on `device`.

    Step k is made of samples k * batch to (k + 1) * batch - 1 (with several processes,
    `rank` of `ranks` has its share of a step `ranks` times as large), so the stream
    depends neither on where it starts nor on `workers`: that many threads keep two
    batches ready, each driving an ffmpeg process or cutting from the cache; with 0
    samples are made when they are asked for.
    """

    def numbers():
        for step in itertools.count(start_step):
            first = (step * ranks + rank) * batch
            yield from range(first, first + batch)

    def samples():
        if workers:
            for _, sample in read_ahead(dataset.sample, numbers(), workers, 2 * batch):
                yield sample.result()
        else:
            yield from map(dataset.sample, numbers())

    stream = samples()
    while True:  # bytes travel to the GPU, not floats
        x = torch.stack(list(itertools.islice(stream, batch))).to(device or "cpu")
        yield x.float().div_(127.5).sub_(1)


def validation(folder, frames, size, n, **more):
    """Up to `n` held-out clips, the same every time -> list of float [3, frames, h, w]
    in [-1, 1].

    The clips take turns; of each, starts are spread evenly; the frame is scaled to
    cover `size` and cropped in the middle, as the published numbers are measured. Fewer
    than `n` come where there are fewer different starts. `more`: as for `Clips`.
    """
    dataset = Clips(folder, frames, size, "val", **more)
    share = collections.Counter()
    for _ in range(min(n, len(dataset))):
        open_paths = [p for p in dataset.paths if share[p] < dataset.starts(p)]
        share[min(open_paths, key=lambda p: share[p])] += 1
    videos = []
    for path, count in sorted(share.items()):
        clip = dataset.clips[path]
        box = crop_box(clip.info.height, clip.info.width, dataset.size)
        for k in range(count):
            start = dataset.start(path, (2 * k + 1) * dataset.starts(path) // (2 * count))
            videos.append(video.to_tensor(dataset.read(clip, start, box)))
    return videos


# ------------------------------------------------------------------ the script


def table(folder, frames, size, fps, index, workers):
    """Print what is in a folder, what reading changes, and what of it can be used."""
    every, usable = scan_folder(folder, index, workers), {}
    for split in ("train", "val"):
        with contextlib.suppress(UserError):
            part = Clips(folder, frames, size, split, fps=fps, index=index)
            usable |= {(path, split): part.starts(path) for path in part.paths}
    print(f"{'clip':40} {'frames':>7} {'size':>10} {'fps':>7} {'cuts':>5} {'train':>7} {'val':>6}  "
          f"found and converted   (train, val: starts of {frames} frames)")
    for c in every:
        if not c.error:
            name = printable(os.path.relpath(c.path, folder))[-40:]
            shown = f"{c.info.height}x{c.info.width}"
            train, val = (usable.get((c.path, split), 0) for split in ("train", "val"))
            print(f"{name:40} {c.frames:7} {shown:>10} {c.info.fps:7.2f} {len(c.cuts):5} "
                  f"{train:7} {val:6}  {c.found(fps)}".rstrip())
    skipped = [c for c in every if c.error]
    read = f"{len(every) - len(skipped)} of {len(every)} files can be read"
    print(f"{read}; skipped:" if skipped else f"{read}.")
    for c in skipped:
        print(f"  {printable(c.error)}")


def main(argv=None):
    p = options.Parser(description="Show what a folder of clips holds, how it is read and how "
                       "it is sampled.",
                       formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("folder")
    add("--frames", type=options.whole(1, 10_000), default=16)
    add("--size", type=video.size_arg, default=(128, 128), help="HEIGHTxWIDTH of a sample")
    add("--fps", type=video.rate_arg, default="native", help="rate at which clips are read")
    add("--seed", type=options.seed, default=0)
    add("--workers", type=options.whole(0, 256), default=2)
    add("--out", default="out/clips.png", help="contact sheet of samples")
    add("--index", default=INDEX, help="what earlier scans found")
    args, _ = p.parse(argv)
    for file in (args.out, args.index):
        folders.writable_file(file)
    fps = None if args.fps == "native" else args.fps
    table(args.folder, args.frames, args.size, fps, args.index, args.workers)
    dataset = Clips(args.folder, args.frames, args.size, seed=args.seed, fps=fps, index=args.index)
    labels = []
    for i in range(12):
        clip, start, box = dataset.draw(dataset.rng(i))
        labels.append(f"{printable(clip.path)} {start} {box}")
    samples = next(loader(dataset, 12, 0, args.workers))
    video.contact_sheet(args.out, samples, labels=labels, scale=1)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    with errors.user_errors():
        main()
