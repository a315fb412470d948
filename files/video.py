"""Clips and pictures on disk: every video goes through the ffmpeg that imageio brings along, one piece at a time, so length costs no memory.

    iter_clip(path, ...)             pieces of a clip, [3, t, h, w];  read_clip: the whole;  clip_info: frame rate, size, length
    write_video(path, pieces, fps)   H.264 mp4 from a tensor or from pieces as they come
    read_image, contact_sheet        stills;  figure: a chart

Pixels are RGB in [-1, 1], layout [3, t, h, w], everywhere in the project. What is wrong with a file is told in one sentence
(UserError), and a file that could not be finished is not left behind.
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


@contextlib.contextmanager
def figure(path, rows=1, columns=1, size=(5, 3.2), dpi=110):
    """Axes [rows, columns] of matplotlib to draw on, `size` inches each; written as a PNG
    when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    whole = (size[0] * columns, size[1] * rows)
    fig, axes = plt.subplots(rows, columns, figsize=whole, squeeze=False)
    try:
        yield axes
        fig.tight_layout()
        with checkpoint.atomic_path(path) as tmp:
            fig.savefig(tmp, dpi=dpi, format="png")
    finally:
        plt.close(fig)
