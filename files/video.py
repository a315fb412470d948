"""Clips: the procedural toy world, reading video files, writing mp4 and contact sheets.

**The toy world** is a video data set that fits in a function. Each clip shows one sprite moving over a plain, slightly shaded
background, and is described by a sentence:

    "a large red circle moving left slowly on a blue background"

Six attributes are named by the caption (WORLD); position, angle, spin, shading and brightness vary continuously and are not, so no two
clips are equal and nothing can be memorised. Direction exists only in time. `metrics.py` reads the attributes back from the pixels.

    render(scene, frames)            one clip, uint8 [t, h, w, 3]
    random_scene(rng), caption(...)  draw attributes, say them
    toy_batch(seed, n, ...)          n clips as a tensor [n, 3, t, h, w] in [-1, 1], with their scenes

**Files**: every video goes through the ffmpeg that imageio brings along, one piece at a time, so length costs no memory.

    iter_clip(path, ...)             pieces of a clip, [3, t, h, w];  read_clip: the whole;  clip_info: frame rate, size, length
    write_video(path, pieces, fps)   H.264 mp4 from a tensor or from pieces as they come
    read_image, contact_sheet        stills

Pixels are RGB in [-1, 1], layout [3, t, h, w], everywhere in the project. What is wrong with a file is told in one sentence
(UserError), and a file that could not be finished is not left behind.

    python data.py --out out/toy     a contact sheet and an mp4 of the toy world (three seconds)
"""
import argparse
import contextlib
import errno
import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from files import checkpoint
from files.checkpoint import UserError

# ---------------------------------------------------------------------------------------------------- the toy world

#: attribute -> the words for it, in the order a caption names them
WORLD = {
    "size": ("small", "large"),
    "colour": ("red", "yellow", "green", "cyan", "blue", "purple"),
    "shape": ("circle", "square", "triangle", "ring"),
    "direction": ("left", "right", "up", "down"),
    "speed": ("slowly", "quickly"),
    "background": ("black", "gray", "white", "blue", "green", "brown"),
}
COLOURS = {"red": (230, 30, 30), "yellow": (240, 215, 20), "green": (20, 185, 40), "cyan": (20, 205, 220),
           "blue": (30, 60, 235), "purple": (190, 30, 210)}
BACKGROUNDS = {"black": (22, 22, 24), "gray": (120, 120, 120), "white": (226, 226, 224), "blue": (78, 98, 146),
               "green": (80, 128, 92), "brown": (138, 100, 82)}
STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
RADIUS = {"small": 0.15, "large": 0.23}  # of the frame's side
TRAVEL = {"slowly": 0.24, "quickly": 0.48}  # of the frame's side, in 32 frames


@dataclass
class Scene:
    """One clip of the toy world: six named attributes, and what the caption leaves open (fractions of the frame, radians)."""

    size: str
    colour: str
    shape: str
    direction: str
    speed: str
    background: str
    along: float = 0.0  # offset of the path's middle along the direction of motion, -1..1
    across: float = 0.0  # the same across it
    angle: float = 0.0
    spin: float = 0.0  # radians in 32 frames
    shade: tuple = (0.0, 0.0)  # background brightness slope in x and y
    light: float = 1.0  # brightness of the object

    def attributes(self):
        return {name: getattr(self, name) for name in WORLD}


def random_scene(rng):
    """A scene with every attribute drawn uniformly."""
    return scene_of({name: str(rng.choice(words)) for name, words in WORLD.items()}, rng)


def scene_of(attributes, rng):
    """A scene with these attributes; what the caption leaves open is drawn from `rng`."""
    return Scene(**attributes, along=rng.uniform(-1, 1), across=rng.uniform(-1, 1), angle=rng.uniform(-0.25, 0.25),
                 spin=rng.uniform(-0.3, 0.3), shade=tuple(rng.uniform(-12, 12, 2)), light=rng.uniform(0.9, 1.05))


def caption(scene):
    """The sentence that describes a scene (or a dict of attributes; missing ones are left out)."""
    a = scene if isinstance(scene, dict) else scene.attributes()
    words = ["a", a.get("size"), a.get("colour"), a.get("shape", "shape")]
    if "direction" in a or "speed" in a:
        words += ["moving", a.get("direction"), a.get("speed")]
    if "background" in a:
        words += ["on a", a["background"], "background"]
    return " ".join(w for w in words if w)


def render(scene, frames=32, size=64, start=0):
    """Draw a scene -> uint8 [frames, size, size, 3], anti-aliased through the sprite's signed distance function.

    The first frame is number `start` of the scene. Speeds are per frame: a longer clip goes on in the same direction (and may leave the frame).
    """
    r = RADIUS[scene.size] * size
    travel = TRAVEL[scene.speed] * size
    d = np.array(STEP[scene.direction], np.float32)
    room_along = max(size / 2 - travel / 2 - r - 1, 0)
    room_across = size / 2 - r - 1
    middle = size / 2 + scene.along * room_along * d + scene.across * room_across * d[::-1]
    t = np.arange(start, start + frames, dtype=np.float32)
    centre = middle + (t[:, None] - 15.5) / 32 * travel * d  # t 2
    angle = scene.angle + scene.spin * t / 32

    grid = np.arange(size, dtype=np.float32) + 0.5
    dx, dy = grid[None, None, :] - centre[:, 0, None, None], grid[None, :, None] - centre[:, 1, None, None]  # t h w
    distance = SHAPES[scene.shape](dx, dy, r, np.cos(angle)[:, None, None], np.sin(angle)[:, None, None])
    alpha = np.clip(0.5 - distance, 0, 1)[..., None]

    slope = scene.shade[0] * (grid[None, :] / size - 0.5) * 2 + scene.shade[1] * (grid[:, None] / size - 0.5) * 2
    ground = np.array(BACKGROUNDS[scene.background], np.float32) + slope[..., None].astype(np.float32)  # h w 3
    paint = np.array(COLOURS[scene.colour], np.float32) * scene.light
    return np.clip(ground[None] + alpha * (paint - ground[None]) + 0.5, 0, 255).astype(np.uint8)


def _circle(dx, dy, r, c, s):
    return np.sqrt(dx * dx + dy * dy) - 0.94 * r


def _ring(dx, dy, r, c, s):
    return np.abs(np.sqrt(dx * dx + dy * dy) - 0.76 * r) - 0.24 * r


def _square(dx, dy, r, c, s):
    return np.maximum(np.abs(dx * c + dy * s), np.abs(dy * c - dx * s)) - 0.8 * r


def _triangle(dx, dy, r, c, s):
    u, v = dx * c + dy * s, dy * c - dx * s + 0.12 * r  # apex up, centroid in the middle
    return np.maximum(v - 0.5 * r, 0.866 * np.abs(u) - 0.5 * v - 0.5 * r)


#: signed distance to each shape, in pixels: negative inside
SHAPES = {"circle": _circle, "square": _square, "triangle": _triangle, "ring": _ring}


def toy_batch(seed, n, frames=32, size=64, start=0):
    """`n` random clips -> (float tensor [n, 3, frames, size, size] in [-1, 1], list of Scene). The same seed gives the same batch.

    `start=None` draws the first frame of each clip from the 32 that a scene is made for.
    """
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(n)]
    starts = rng.integers(0, max(33 - frames, 1), n) if start is None else [start] * n
    return torch.stack([to_tensor(render(s, frames, size, int(t))) for s, t in zip(scenes, starts)]), scenes


def held_out_prompts(n, seed=10_000_019):
    """`n` fixed attribute dicts for evaluation; the seed is never used in training."""
    rng = np.random.default_rng(seed)
    return [random_scene(rng).attributes() for _ in range(n)]


# ---------------------------------------------------------------------------------------------------- pixels


def to_tensor(frames):
    """uint8 [t, h, w, 3] -> float32 [3, t, h, w] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float().div_(127.5).sub_(1)


def to_uint8(x):
    """float [3, t, h, w] in [-1, 1] -> uint8 [t, h, w, 3], rounded and clamped (spec dc-ae-v 6). NaN is a UserError: it would be black."""
    if not torch.isfinite(x).all():
        raise UserError("the video holds NaN or infinite values, so nothing was written: use --dtype fp32, or other weights.")
    return (x.float() * 127.5 + 128).clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


# ---------------------------------------------------------------------------------------------------- video files


def size_arg(text):
    """argparse type: "180x320" -> (180, 320), rows first."""
    if not (match := re.fullmatch(r"(\d+)x(\d+)", text)) or 0 in (size := tuple(map(int, match.groups()))):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for example 180x320")
    return size


@dataclass
class ClipInfo:
    """What a video's header says. `seconds` is 0 where it says nothing."""

    fps: float
    height: int
    width: int
    seconds: float


@contextlib.contextmanager
def ffmpeg(*args, **pipes):
    """Run ffmpeg for the length of a `with`: yields the process, and a function that waits for its end -> (status, complaints)."""
    with tempfile.TemporaryFile() as log:  # a file, not a pipe: a damaged clip brings more complaints than a pipe holds
        process = subprocess.Popen([imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", *args], stderr=log, **pipes)

        def end():
            status = process.wait()
            log.seek(0)
            return status, log.read().decode(errors="replace").strip()

        try:
            yield process, end
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe and pipe.close()


def source(path):
    """ffmpeg's input arguments for a clip: local files only, whatever their names and whatever a playlist in them refers to."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give the path of a video file.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): copy or download it again.")
    return "-protocol_whitelist", "file,pipe", "-i", f"file:{path}"


#: what ffmpeg calls an error though every frame comes out right: slips of the encoder, and times that only a muxer would miss
HARMLESS = re.compile(r"non-intra slice in an IDR|mmco: unref short failure|reference frames exceeds max|co located POCs|"
                      r"\[(rawvideo|image2pipe) @")
NO_REASON = "ffmpeg gives no reason"


def complaint(log):
    """The first error in ffmpeg's log (of level "error") that means damage, without its prefixes, as the end of a sentence; "" if there is none."""
    serious = (line for line in log.splitlines() if line.strip() and not HARMLESS.search(line))
    return re.sub(r"^(\[[^\]]*\] )+", "", next(serious, "")).strip(" .")


def clip_info(path):
    """Frame rate, upright size and length of a clip -> ClipInfo, without decoding it."""
    with ffmpeg(*source(path)) as (_, end):
        log = end()[1]
    if not (match := re.search(r"Stream #.*?Video: (.*?)(\d+)x(\d+)[ ,\n](.*)", log)):
        raise UserError(f"{path} holds no video that ffmpeg can read: give an mp4, mkv, webm, mov, avi or gif.")
    codec, width, height, rest = match.groups()
    if (turn := re.search(r"rotation of (-?[\d.]+) degrees", log)) and round(float(turn[1]) / 90) % 2:
        width, height = height, width
    rate = re.search(r"([\d.]+) fps", rest) or re.search(r"([\d.]+) tbr", rest)
    length = re.search(r"Duration: (\d+):(\d+):([\d.]+)", log)
    seconds = sum(float(n) * unit for n, unit in zip(length.groups(), (3600, 60, 1))) if length else 0.0
    return ClipInfo(float(rate[1]) if rate else 25.0, int(height), int(width), seconds)


def iter_clip(path, frames=None, size=None, start=0, piece=16):
    """The frames of a video file in pieces [3, up to `piece`, h, w], float in [-1, 1]; memory holds one piece.

    Every stored frame comes exactly once, upright (the file's rotation is applied). `start`: frames to skip; `frames`: how many to
    read, all by default. `size=(h, w)`: scaled (bicubic) to cover that size, then cropped in the middle. Raises UserError if the
    file is unreadable, damaged or cut off before the last frame asked for, or has fewer than `frames`.
    """
    if frames is not None and frames < 1 or start < 0:
        raise UserError(f"there are no {frames} frames from number {start} on: --frames counts from 1.")
    filters = [f"trim=start_frame={start}", "format=rgb24"]
    if size:
        h, w = size
        filters.append(f"scale={w}:{h}:force_original_aspect_ratio=increase:flags=bicubic,crop={w}:{h}")
    limit = ["-frames:v", str(frames)] if frames else []
    # A row of PPM pictures: each says its own size, which ffmpeg alone knows after rotation and scaling.
    args = [*source(path), "-map", "0:v:0", "-vf", ",".join(filters), "-fps_mode", "passthrough", *limit,
            "-f", "image2pipe", "-c:v", "ppm", "-"]
    held, count = [], 0
    with ffmpeg("-v", "error", *args, stdout=subprocess.PIPE) as (process, end):
        while process.stdout.readline() == b"P6\n":
            width, height = map(int, process.stdout.readline().split())
            process.stdout.readline()  # 255
            pixels = process.stdout.read(3 * height * width)
            if len(pixels) < 3 * height * width:  # ffmpeg died
                break
            held.append(np.frombuffer(pixels, np.uint8).reshape(height, width, 3))
            count += 1
            if len(held) == piece:
                yield to_tensor(np.stack(held))
                held = []
        status, log = end()
    if status and not count:
        raise UserError(f"{path} cannot be read as a video ({complaint(log) or NO_REASON}): it may be incomplete or of another kind.")
    if (status or complaint(log)) and count != frames:
        raise UserError(f"{path} is damaged or cut off near frame {start + count} ({complaint(log) or NO_REASON}): get the whole file, "
                        "or read only its beginning with --frames.")
    if not count or frames and count < frames:
        raise UserError(f"{path} holds {count} frames from number {start} on, not {frames or 'one'}: lower --frames.")
    if held:
        yield to_tensor(np.stack(held))


def read_clip(path, frames=None, size=None, start=0):
    """A whole video file -> float [3, t, h, w] in [-1, 1]; arguments and errors as for `iter_clip`."""
    return torch.cat(list(iter_clip(path, frames, size, start)), dim=1)


def write_video(path, x, fps, scale=1):
    """Write an mp4 that every player shows (H.264, yuv420p, BT.709): x is [3, t, h, w] in [-1, 1], or an iterable of such pieces,
    written as they come. `scale`: nearest-neighbour enlargement, since yuv420p halves the resolution of colour (toy clips: 4).

    Odd sizes are padded by repeating the last row or column (H.264 needs even ones). The file appears when it is complete. Raises
    UserError for NaN or no frames, OSError where the folder is read-only or the disk full.
    """
    pieces = map(to_uint8, [x] if isinstance(x, torch.Tensor) else x)
    first = next(pieces, None)  # what is wrong with the source comes to light before the folder is touched
    if first is None or len(first) == 0:
        raise UserError(f"there are no frames to write to {path}: ask for at least one.")
    height, width = ((n * scale + 1) // 2 * 2 for n in first.shape[1:3])
    args = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-",
            "-vf", "scale=out_color_matrix=bt709:out_range=tv", "-colorspace", "bt709", "-color_primaries", "bt709",
            "-color_trc", "bt709", "-c:v", "libx264", "-crf", "16", "-pix_fmt", "yuv420p", "-movflags", "+faststart", "-f", "mp4"]
    with checkpoint.atomic_path(path) as tmp, ffmpeg("-v", "error", "-y", *args, tmp, stdin=subprocess.PIPE) as (process, end):
        with contextlib.suppress(BrokenPipeError):  # ffmpeg has given up; `end` says why
            for frames in itertools.chain([first], pieces):
                frames = frames.repeat(scale, axis=1).repeat(scale, axis=2)
                rest = ((0, 0), (0, height - frames.shape[1]), (0, width - frames.shape[2]), (0, 0))
                process.stdin.write(np.pad(frames, rest, mode="edge").tobytes())
            process.stdin.close()
        status, log = end()
        if "No space left" in log or status == 256 - errno.ENOSPC:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        if status:
            raise UserError(f"ffmpeg could not write {path} ({complaint(log) or NO_REASON}): check --out and the frame size.")


# ---------------------------------------------------------------------------------------------------- pictures


def read_image(path, size=None):
    """A picture file -> float [3, h, w] in [-1, 1]. Upright (EXIF), transparent parts on white; `size=(h, w)` as for `iter_clip`."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip it to white
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        image = image.convert("RGBA")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of a picture.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"{path} is not a picture that can be read, or an incomplete one ({e}): give a PNG, JPEG or WebP.") from e
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if size:
        image = ImageOps.fit(image, size[::-1], Image.BICUBIC)
    return to_tensor(np.array(image)[None])[:, 0]


def contact_sheet(path, videos, columns=8, labels=None, heads=None, scale=2):
    """One row of `columns` evenly spaced frames per video ([3, t, h, w] in [-1, 1]), as a PNG, enlarged or reduced by `scale`.

    `labels` are written into the rows, `heads` above equally wide groups of columns.
    """
    rows = []
    for x in videos:
        frames = to_uint8(x[:, np.linspace(0, x.shape[1] - 1, columns).round().astype(int)])
        rows.append(np.concatenate([np.pad(f, ((1, 1), (1, 1), (0, 0)), constant_values=255) for f in frames], axis=1))
    width = max(r.shape[1] for r in rows)
    rows = [np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0)), constant_values=255) for r in rows]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet = sheet.resize((round(sheet.width * scale), round(sheet.height * scale)), Image.NEAREST if scale >= 1 else Image.BOX)
    if labels:
        draw, y = ImageDraw.Draw(sheet), 0
        for row, label in zip(rows, labels):
            draw.text((5, y + 3), label, fill=(255, 255, 255), stroke_width=2, stroke_fill=(0, 0, 0))
            y += row.shape[0] * scale
    if heads:
        sheet = ImageOps.expand(sheet, (0, 16, 0, 0), fill=(255, 255, 255))
        for i, head in enumerate(heads):
            ImageDraw.Draw(sheet).text((sheet.width * i / len(heads) + 5, 3), head, fill=(0, 0, 0))
    with checkpoint.atomic_path(path) as tmp:
        sheet.save(tmp)


def main():
    p = argparse.ArgumentParser(description="Show the toy world: a contact sheet and an mp4.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", default="out/toy", help="folder for the results")
    p.add_argument("--clips", type=int, default=12, help="how many clips")
    p.add_argument("--frames", type=int, default=32, help="frames per clip")
    p.add_argument("--size", type=int, default=64, help="side of a frame in pixels")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same clips")
    args = p.parse_args()
    videos, scenes = toy_batch(args.seed, args.clips, args.frames, args.size)
    out = Path(args.out)
    contact_sheet(out / "toy.png", videos, labels=[caption(s) for s in scenes])
    write_video(out / "toy.mp4", list(videos), fps=16, scale=4)
    print(f"wrote {out}/toy.png and {out}/toy.mp4")


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
