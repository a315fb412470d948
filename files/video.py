"""Clips and pictures on disk: one reader for all commands, which does what a file's
header says, and one writer.

    clip_info(path)                 what the header says: rate, size, conversions
    decode(path, info, ...)         frame by frame, with times; all reading is this
    iter_clip(path, ...)            pieces of a clip, [3, t, h, w]; read_clip: all of it
    write_video(path, pieces, fps)  H.264 mp4 from a tensor or from pieces as they come
    read_image, contact_sheet       stills

Whatever is stored, what comes out is what a good player shows (`conversion`): upright,
square pixels, whole frames instead of fields, BT.709 in full range, standard dynamic
range, transparent parts on white. At a given rate, output frame k is what is on the
screen at time k / fps, so speed is kept: a 48 fps clip read at 16 fps shows every third
frame.

Pixels are RGB in [-1, 1], layout [3, t, h, w], everywhere in the project. Every video
goes through the ffmpeg that imageio brings along, so length costs no memory. What is
wrong with a file is told in one sentence (UserError), and a file that could not be
finished is not left behind.
"""
import argparse
import contextlib
import errno
import itertools
import math
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from files import checkpoint
from files.checkpoint import UserError

READER = 1  # what is done to pixels; latents made by another version are made anew

# ------------------------------------------------------------------ pixels


def to_tensor(frames):
    """uint8 [t, h, w, 3] -> float32 [3, t, h, w] in [-1, 1]."""
    frames = torch.from_numpy(np.ascontiguousarray(frames))
    return frames.permute(3, 0, 1, 2).float().div_(127.5).sub_(1)


def to_uint8(x):
    """float [3, t, h, w] in [-1, 1] -> uint8 [t, h, w, 3], rounded and clamped. NaN is
    a UserError: it would be black."""
    if not torch.isfinite(x).all():
        raise UserError("the video holds NaN or infinite values, so nothing was written: use "
                        "--dtype fp32, or other weights.")
    levels = (x.float() * 127.5 + 128).clamp_(0, 255).to(torch.uint8)
    return levels.permute(1, 2, 3, 0).cpu().numpy()


def on_white(frames):
    """uint8 [..., 3] as it is; [..., 4] with premultiplied colours on white."""
    if frames.shape[-1] == 3:
        return frames
    colours, alpha = frames[..., :3].astype(np.int16), frames[..., 3:]
    return np.minimum(colours + 255 - alpha, 255).astype(np.uint8)


LARGEST = 16384  # side of a frame that anything here can be asked for


def size_arg(text):
    """argparse type: "180x320" -> (180, 320), rows first."""
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    size = tuple(map(int, match.groups())) if match else (0, 0)
    if 0 in size:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for example 180x320")
    if max(size) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} has a side of more than {LARGEST} pixels")
    return size


def rate_arg(text):
    """argparse type: frames per second, or "native" for every stored frame."""
    if text == "native":
        return text
    with contextlib.suppress(ValueError):
        if 0.1 <= float(text) <= 1000:
            return float(text)
    raise argparse.ArgumentTypeError(f'{text!r} is neither a rate of 0.1 to 1000 nor "native"')


# ------------------------------------------------------------------ what a header says

#: transfer functions of high dynamic range -> their names
HDR = {"smpte2084": "PQ", "arib-std-b67": "HLG"}
#: primaries of wide colour -> their names
WIDE = {"bt2020": "BT.2020", "smpte431": "P3", "smpte432": "P3"}
#: matrix, or matrix/primaries/transfer, as ffmpeg writes them
COLOURS = re.compile(r"[^/]+/[^/]+/[^/]+|bt\d+\w*|smpte\w+|gbr|fcc|film|ycgco.*|ictcp|ipt.*|"
                     "chroma.*")
ALPHA = re.compile("yuva|rgba|bgra|argb|abgr|gbrap|ya|pal8")  # beginnings of pixel formats
#: a video's line in what `ffmpeg -i` says
STREAM = re.compile(
    r"Stream #[^\n]*?: Video: (?P<codec>\w+)[^\n]*?, "
    r"(?P<pixels>\w+)(?:\((?P<tags>(?:[^()]|\([^()]*\))*)\))?, "
    r"(?P<width>\d+)x(?P<height>\d+)(?P<rest>[^\n]*)")


@dataclass(frozen=True)
class ClipInfo:
    """What a video's header says. The size is that shown: upright, with square
    pixels."""

    fps: float
    height: int
    width: int
    seconds: float = 0.0  # 0 where it says nothing
    aspect: str = "1:1"  # of a pixel as stored and turned upright
    turned: bool = False
    interlaced: bool = False
    assumed: str = ""  # what it leaves open, as `setparams` takes it
    transfer: str = ""  # of high dynamic range
    primaries: str = ""  # of wide colour
    alpha: bool = False
    decoder: str = ""  # where ffmpeg's own would drop something

    @property
    def conversions(self):
        """What reading changes -> [words]."""
        words = []
        if self.turned:
            words.append("turned upright")
        if self.aspect != "1:1":
            words.append(f"pixels {self.aspect} made square")
        if self.interlaced:
            words.append("deinterlaced")
        if self.transfer:
            words.append(f"{HDR[self.transfer]} to SDR")
        elif self.primaries:
            words.append(f"{WIDE[self.primaries]} to BT.709")
        if self.alpha:
            words.append("transparency on white")
        return words


def clip_info(path):
    """What the header of a clip, and of its first frame, says -> ClipInfo."""
    look = ["-map", "0:V:0", "-vf", "showinfo=checksum=0", "-frames:v", "1", "-f", "null", "-"]
    with ffmpeg(*source(path), *look) as (process, log):
        process.wait()
        text = log.update()
    streams = [m for m in STREAM.finditer(text) if "(attached pic)" not in m["rest"]]
    if not streams and "Audio:" in text:
        raise UserError(f"{path} holds sound but no pictures.")
    if not streams:
        raise UserError(f"{path} cannot be read as a video ({log.reason}): it may be incomplete "
                        "or of another kind.")
    stream = streams[0]
    tags = (stream["tags"] or "").split(", ")
    height, width = int(stream["height"]), int(stream["width"])
    transfer, primaries, assumed = colours(
        tags, large=width >= 1280 or height > 576, coded="yuv" in stream["pixels"])
    turned = re.search(r"rotation of (-?[\d.]+) degrees", text)
    quarter = round(float(turned[1]) / 90) % 4 if turned else 0
    aspect = pixel_aspect(path, stream["rest"])
    if quarter % 2:
        height, width, aspect = width, height, 1 / aspect
    if aspect > 1:
        width = round(width * aspect)
    else:
        height = round(height / aspect)

    with_alpha = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # ffmpeg's own drop it
    decoder = with_alpha.get(stream["codec"], "") if "alpha_mode      : 1" in text else ""
    return ClipInfo(
        fps=frame_rate(stream["rest"]),
        height=height,
        width=width,
        seconds=duration(text),
        aspect=f"{aspect.numerator}:{aspect.denominator}",
        turned=quarter != 0,
        interlaced=any("first" in tag for tag in tags) or "T" in log.fields or "B" in log.fields,
        transfer=transfer,
        primaries=primaries,
        assumed=assumed,
        alpha=bool(decoder or ALPHA.match(stream["pixels"])),
        decoder=decoder,
    )


def colours(tags, large, coded):
    """Words about the pixels, such as "tv", "bt2020nc/bt2020/smpte2084" -> (transfer if
    it is one of HDR, primaries if they are one of WIDE, what is assumed of what is not
    said).

    Untagged colours of large frames are BT.709, as players guess, of others BT.601, as
    ffmpeg does.
    """
    said = next(filter(COLOURS.fullmatch, tags), "unknown")
    matrix, primaries, transfer = said.split("/") if said.count("/") == 2 else [said] * 3
    transfer = transfer if transfer in HDR else ""
    primaries = primaries if primaries in WIDE else ""
    assumed = []
    if coded and matrix == "unknown" and (large or transfer):
        assumed.append(f"colorspace={'bt2020nc' if transfer else 'bt709'}")
    if transfer and not primaries:
        assumed.append("color_primaries=bt2020")
    if primaries and not transfer:
        assumed.append("color_trc=bt709")
    return transfer, primaries, ":".join(assumed)


def pixel_aspect(path, rest):
    """Width over height of a stored pixel -> Fraction. The container's word goes before
    the codec's, which stands in brackets."""
    outside, inside = re.search(r", SAR (\d+):(\d+)", rest), re.search(r"\[SAR (\d+):(\d+)", rest)
    said = outside or inside
    if not said or "0" in said.groups():
        return Fraction(1)
    aspect = Fraction(int(said[1]), int(said[2]))
    if not 1 / 8 <= aspect <= 8:
        raise UserError(f"{path} says that a pixel is {aspect} as wide as high, which cannot be "
                        "right: mend its header.")
    return aspect


def frame_rate(rest):
    """Average rate in a stream's line, or where that is a clock's, the rate that ffmpeg
    guesses; 25 where there is none."""
    rates = [float(number) * (1000 if kilo else 1)
             for number, kilo in re.findall(r"([\d.]+)(k?) (?:fps|tbr)", rest)]
    return next((rate for rate in rates if 0 < rate <= 240), max(rates, default=0) or 25.0)


def duration(text):
    """Seconds; 0 where the header says nothing."""
    found = re.search(r"Duration: (\d+):(\d+):([\d.]+)", text)
    hours, minutes, seconds = map(float, found.groups()) if found else (0.0, 0.0, 0.0)
    return 3600 * hours + 60 * minutes + seconds


# ------------------------------------------------------------------ decoding


def source(path):
    """ffmpeg's input arguments for a clip: local files only, whatever their names and
    whatever a playlist in them refers to."""
    path = Path(path)
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {why}: give the path of a video file.")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes): copy or download it again.")
    return "-protocol_whitelist", "file,pipe", "-i", f"file:{path}"


@contextlib.contextmanager
def ffmpeg(*args):
    """Run ffmpeg for the length of a `with` -> (the process, its Log)."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-nostats",
               "-v", "level+info", *args]
    # a file, not a pipe: a damaged clip brings more complaints than a pipe holds
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        try:
            yield process, Log(log.fileno())
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


#: a line that tells of damage: an error, or a warning of frames that were patched up
COMPLAINT = re.compile(r"(\[[^\]]* @ [^\]]*\] )*"
                       r"\[(error|fatal|warning(?=\].*(corrupt|EOI missing)))\] ")
#: called an error though every frame comes out right: slips of the encoder, times that only a
#: muxer would miss
HARMLESS = re.compile(
    "non-intra slice in an IDR|mmco: unref short failure|reference frames exceeds max|"
    r"co located POCs|\[(rawvideo|out#0/rawvideo) @|Last message repeated")
#: what a decoder says that joins a broadcast in its middle, before the first whole frame
JOINING = re.compile("non-existing [PS]PS|no frame!|Could not find ref|decode_slice_header|"
                     r"[PS]PS id out of range|frame dimensions 0x0")
SHOWN = re.compile(r"\] n: *\d+ .*pts_time:(\S+) .* s:(\d+x\d+) i:(\w)")  # of `showinfo`


class Log:
    """What ffmpeg says, read while it runs: the filter `showinfo` writes a line for
    every frame, between the complaints."""

    def __init__(self, file):
        self.file, self.place, self.rest = file, 0, ""
        # of the frames: seconds, "64x48", P for whole ones, T or B for such of two fields
        self.times, self.sizes, self.fields = [], [], []
        self.complaints = []  # (frames before it, text)

    def update(self):
        """Read what is new -> its text."""
        raw = b""
        while more := os.pread(self.file, 1 << 20, self.place):
            raw, self.place = raw + more, self.place + len(more)
        text = self.rest + raw.decode(errors="replace")
        *lines, self.rest = text.split("\n")
        for line in lines:
            if match := SHOWN.search(line):
                number = re.fullmatch(r"-?[\d.]+(e-?\d+)?", match[1])
                self.times.append(float(match[1]) if number else math.nan)
                self.sizes.append(match[2])
                self.fields.append(match[3])
            elif COMPLAINT.match(line) and not HARMLESS.search(line):
                self._complain(line)
        return text

    def _complain(self, line):
        """Note a line. The demuxer runs ahead of the decoder: what it says is about the
        end."""
        text = re.sub(r"^(\[[^\]]*\] )+", "", line).strip(" .")
        if self.times or not JOINING.search(text):
            ahead = line.startswith("[in#")
            self.complaints.append((math.inf if ahead else len(self.times), text))

    @property
    def reason(self):
        return self.complaints[0][1] if self.complaints else "ffmpeg gives no reason"


SCALING = "bicubic+full_chroma_int"
#: Linear light in which the white of a page, 203 cd/m2 (BT.2408), is 1; colours of BT.709; up
#: to 0.7 all stays as it is, above it 1000 cd/m2 are rolled off to 1; gamma 2.4 (BT.1886).
TO_LINEAR = "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709"
ROLL_OFF = "tonemap=mobius:param=0.7:peak=4.926:desat=0"
TO_SDR = "zscale=t=bt709:r=full,format=gbrp"


def decode(path, info, size=None, box=None, pick=(), options=(), limit=None, flags=SCALING):
    """(seconds, uint8 [h, w, 3]) of the frames of a clip, in order, none left out or
    doubled; seconds are as stored, NaN where they are not.

    box: part of the shown frame, (y, x, h, w); size: that it is scaled to. pick:
    filters that choose frames; limit: how many are wanted; options: of ffmpeg, before
    the input. UserError behind the last frame if the file is damaged, cut off, or
    changes its size.
    """
    h, w = size or (info.height, info.width)
    channels = 4 if info.alpha else 3
    filters = ["showinfo=checksum=0", *pick, *conversion(info, (h, w), box, flags)]
    decoder = ("-c:v", info.decoder) if info.decoder else ()
    enough = ("-frames:v", str(limit)) if limit else ()
    # V: not a cover picture
    args = [*decoder, *options, *source(path), "-map", "0:V:0", "-vf", ",".join(filters),
            "-fps_mode", "passthrough", *enough, "-f", "rawvideo", "-"]
    count = 0
    with ffmpeg(*args) as (process, log):
        while len(pixels := process.stdout.read(h * w * channels)) == h * w * channels:
            log.update()
            yield log.times[count], on_white(np.frombuffer(pixels, np.uint8).reshape(h, w, -1))
            count += 1
            if log.sizes[count - 1] != log.sizes[0]:
                raise UserError(f"{path} changes its size at frame {count - 1}.")
        status = process.wait()
        log.update()
    if not count and (status or not pick):
        raise UserError(f"{path} cannot be read as a video ({log.reason}): it may be incomplete "
                        "or of another kind.")
    if status or log.complaints:
        near = min([count, *(before for before, _ in log.complaints if before)])
        raise UserError(f"{path} is damaged or cut off near frame {near} ({log.reason}): get the "
                        "whole file, or read only its beginning with --frames.")


def conversion(info, size, box=None, flags=SCALING):
    """ffmpeg's filters from stored frames to RGB (with alpha: RGBA, premultiplied) ->
    list. Rotation needs none: ffmpeg applies it on its own, before these."""
    steps = []
    if info.assumed:
        steps.append(f"setparams={info.assumed}")
    if info.interlaced:
        steps.append("bwdif=mode=send_frame:deint=interlaced")
    if info.alpha:  # premultiplied, so that no hidden colour bleeds into the edges
        steps.append("format=gbrap16,premultiply=inplace=1")
    if box and info.aspect != "1:1":
        steps.append(f"scale={info.width}:{info.height}:flags={flags}")
    if box:
        y, x, h, w = box
        steps.append(f"crop={w}:{h}:{x}:{y}:exact=1")
    steps.append(f"scale={size[1]}:{size[0]}:flags={flags}")
    if info.transfer or info.primaries:
        curve = ",".join([TO_LINEAR, *([ROLL_OFF] if info.transfer else []), TO_SDR])
        if info.alpha:  # which zscale would bend too
            curve = ("unpremultiply=inplace=1,split[c][a];[a]format=rgba,alphaextract[alpha];"
                     f"[c]format=gbrp16,{curve}[sdr];[sdr][alpha]alphamerge,premultiply=inplace=1")
        steps.append(curve)
    steps.append(f"format={'rgba' if info.alpha else 'rgb24'}")
    return steps


# ------------------------------------------------------------------ rates

PAUSE = 10.0  # seconds that a frame may stand; more is a jump in the time stamps
SLACK = 0.1  # of a tick: time stamps are rounded, to milliseconds in mkv


def time_step(before, after, fps):
    """Seconds from a frame to the next, by their time stamps; 1 / fps where these are
    missing, go back or jump."""
    return after - before if 0 < after - before <= PAUSE else 1 / fps


def at_rate(frames, fps, stored_fps):
    """(seconds, frame) as `decode` gives them -> frames at a steady rate: the k-th is
    the one on screen at time k / fps. What is slower is shown repeatedly, what is
    faster left out."""
    tick, now, last, shown = 0, 0.0, None, None
    for seconds, frame in frames:
        if shown is not None:
            now += time_step(last, seconds, stored_fps)
        while shown is not None and (tick + SLACK) / fps < now:
            yield shown
            tick += 1
        last, shown = seconds, frame
    while shown is not None and (tick + SLACK) / fps < now + 1 / stored_fps:
        yield shown
        tick += 1


# ------------------------------------------------------------------ whole clips


def crop_box(height, width, size, zoom=1.0, fy=0.5, fx=0.5):
    """The part of a picture that fills `size` -> (y, x, h, w). `zoom` = 1: the largest
    with that aspect ratio; less is a part of it, but never one that would have to be
    enlarged. fy, fx in 0..1 place it."""
    most = min(height / size[0], width / size[1])
    k = max(most * zoom, min(most, 1.0))
    h, w = min(round(size[0] * k), height), min(round(size[1] * k), width)
    return round((height - h) * fy), round((width - w) * fx), h, w


def iter_clip(path, frames=None, size=None, fps=None, piece=16):
    """The frames of a video file in pieces [3, up to `piece`, h, w], float in [-1, 1];
    memory holds one piece.

    fps: the rate at which it is read; None: every stored frame exactly once. `frames`:
    how many, all by default. `size=(h, w)`: cropped in the middle to that aspect and
    scaled. UserError if the file is unreadable, damaged or cut off before the last
    frame asked for, or has fewer than `frames`.
    """
    if frames is not None and frames < 1:
        raise UserError(f"there are no {frames} frames: --frames counts from 1.")
    info = clip_info(path)
    box = crop_box(info.height, info.width, size) if size else None
    limit = None if fps else frames
    with contextlib.closing(decode(path, info, size, box, limit=limit)) as stored:
        stream = at_rate(stored, fps, info.fps) if fps else (frame for _, frame in stored)
        count, stream = 0, itertools.islice(stream, frames)
        while held := list(itertools.islice(stream, piece)):
            count += len(held)
            yield to_tensor(np.stack(held))
    if frames and count < frames:
        raise UserError(f"{path} holds {count} frames, not {frames}: lower --frames.")


def read_clip(path, frames=None, size=None, fps=None):
    """A whole video file -> float [3, t, h, w] in [-1, 1]; arguments and errors as for
    `iter_clip`."""
    return torch.cat(list(iter_clip(path, frames, size, fps)), dim=1)


#: an mp4 that every player shows: H.264 of high quality, its colours tagged as BT.709
MP4 = ["-crf", "16", "-movflags", "+faststart", "-vf", "scale=out_color_matrix=bt709:out_range=tv",
       "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]


def write_video(path, x, fps, scale=1):
    """Write an mp4 (H.264, yuv420p, BT.709): x is [3, t, h, w] in [-1, 1], or an
    iterable of such pieces, written as they come. `scale`: nearest-neighbour
    enlargement, since yuv420p halves the resolution of colour (toy clips: 4).

    Odd sizes are padded by repeating the last row or column (H.264 needs even ones).
    The file appears when it is complete. UserError for NaN or no frames, OSError where
    the folder is read-only or the disk full.
    """
    pieces = map(to_uint8, [x] if isinstance(x, torch.Tensor) else x)
    first = next(pieces, None)  # what is wrong with the source comes to light first
    if first is None or len(first) == 0:
        raise UserError(f"there are no frames to write to {path}: ask for at least one.")
    height, width = ((n * scale + 1) // 2 * 2 for n in first.shape[1:3])
    how = dict(fps=fps, codec="libx264", quality=None, macro_block_size=1, output_params=MP4,
               ffmpeg_log_level="quiet")
    count = 0
    with checkpoint.atomic_path(path) as tmp:
        with contextlib.closing(imageio.get_writer(tmp, format="FFMPEG", **how)) as writer:
            for frame in itertools.chain.from_iterable(itertools.chain([first], pieces)):
                frame = frame.repeat(scale, axis=0).repeat(scale, axis=1)
                rest = ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0))
                try:
                    writer.append_data(np.pad(frame, rest, mode="edge"))
                except OSError:  # ffmpeg has given up
                    break
                count += 1
        check_written(path, tmp, count)


def check_written(path, tmp, frames):
    """OSError or UserError where a file does not hold what was written: imageio does
    not say how ffmpeg ended."""
    with contextlib.suppress(UserError):
        info = clip_info(tmp)
        if info.seconds * info.fps > frames - 1:
            return
    try:
        with open(tmp, "ab") as file:
            file.write(bytes(1 << 16))
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise OSError(e.errno, e.strerror, str(path)) from None
    raise UserError(f"ffmpeg could not write {path}: check --out and the frame size.")


# ------------------------------------------------------------------ pictures


def read_image(path):
    """A picture file -> float [3, h, w] in [-1, 1]. Upright (EXIF), transparent parts
    on white."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip it to white
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        image = image.convert("RGBA")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of a picture.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"{path} is not a picture that can be read, or an incomplete one ({e}): "
                        "give a PNG, JPEG or WebP.") from e
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    return to_tensor(np.array(image)[None])[:, 0]


FRAME = ((0, 0), (1, 1), (1, 1), (0, 0))  # a white line around each frame of a sheet


def contact_sheet(path, videos, columns=8, labels=None, heads=None, scale=2):
    """One row of `columns` evenly spaced frames per video ([3, t, h, w] in [-1, 1]), as
    a PNG, enlarged or reduced by `scale`.

    `labels` are written into the rows, `heads` above equally wide groups of columns.
    """
    rows = []
    for x in videos:
        places = np.linspace(0, x.shape[1] - 1, columns).round().astype(int)
        frames = np.pad(to_uint8(x[:, places]), FRAME, constant_values=255)
        rows.append(np.concatenate(list(frames), axis=1))
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255)
            for row in rows]
    sheet = Image.fromarray(np.concatenate(rows))
    size = round(sheet.width * scale), round(sheet.height * scale)
    sheet = sheet.resize(size, Image.NEAREST if scale >= 1 else Image.BOX)
    if labels:
        draw, y = ImageDraw.Draw(sheet), 0
        for row, label in zip(rows, labels):
            draw.text((5, y + 3), label, fill="white", stroke_width=2, stroke_fill="black")
            y += row.shape[0] * scale
    if heads:
        sheet = ImageOps.expand(sheet, (0, 16, 0, 0), fill="white")
        draw = ImageDraw.Draw(sheet)
        for i, head in enumerate(heads):
            draw.text((sheet.width * i / len(heads) + 5, 3), head, fill="black")
    with checkpoint.atomic_path(path) as tmp:
        sheet.save(tmp)


@contextlib.contextmanager
def figure(path, rows=1, columns=1, size=(5, 3.2), dpi=110):
    """Axes [rows, columns] of matplotlib to draw on, `size` inches each; written as a
    PNG when the block ends."""
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
