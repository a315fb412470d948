"""Clips: files come back as they were, or one sentence tells why not."""
import contextlib
import errno
import os
import subprocess
import tempfile

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import toy
from conftest import ROOT
from files import checkpoint, errors, video
from files.checkpoint import UserError

BUNNY = ROOT / "assets" / "bunny.mp4"


# ---------------------------------------------------------------------------------------------------- pixels


def test_eight_bits_come_back():
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    x = video.to_tensor(frames)
    assert x.shape == (3, 2, 5, 7) and np.array_equal(video.to_uint8(x), frames)
    beyond = torch.tensor([-3.0, -1, 0, 1, 3]).expand(3, 1, 1, 5)
    assert video.to_uint8(beyond)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


# ---------------------------------------------------------------------------------------------------- reading clips


def ffmpeg(*args):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, args)], check=True)


def lossless(path, clip):
    """Write uint8 [t, h, w, 3] so that not a bit is lost: FFV1, whatever the size."""
    raw = path.with_suffix(".raw")
    raw.write_bytes(clip.tobytes())
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{clip.shape[2]}x{clip.shape[1]}", "-r", 10, "-i", raw, "-c:v", "ffv1", path)
    return path


def noise(frames, height, width):
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("frames, height, width", [(5, 16, 24), (1, 16, 16), (7, 33, 51), (3, 1, 1)])
def test_every_frame_comes_back_exactly(tmp_path, frames, height, width):
    clip = noise(frames, height, width)
    path = lossless(tmp_path / "a clip: 100 %.mkv", clip)
    assert np.array_equal(video.to_uint8(video.read_clip(path)), clip)
    info = video.clip_info(path)
    assert (info.height, info.width, info.fps) == (height, width, 10) and info.seconds == pytest.approx(frames / 10)


def test_pieces_and_parts(tmp_path):
    clip = noise(11, 6, 8)
    path = lossless(tmp_path / "clip.mkv", clip)
    pieces = list(video.iter_clip(path, piece=4))
    assert [p.shape[1] for p in pieces] == [4, 4, 3]
    assert torch.equal(torch.cat(pieces, dim=1), video.to_tensor(clip))
    assert torch.equal(video.read_clip(path, frames=3), video.to_tensor(clip[:3]))


def test_reading_may_stop_anywhere(monkeypatch):
    """Half-read clips leave no process behind."""
    started, Popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(Popen(*args, **more)) or started[-1])
    pieces = video.iter_clip(BUNNY, piece=2)
    assert next(pieces).shape == (3, 2, 180, 320) and started[-1].poll() is None
    pieces.close()
    assert all(process.poll() is not None for process in started)


def test_variable_frame_rates_lose_and_double_nothing(tmp_path):
    clip = noise(6, 8, 8)
    source, slowing = lossless(tmp_path / "clip.mkv", clip), "setpts='N*N*0.05/TB'"
    ffmpeg("-i", source, "-vf", slowing, "-fps_mode", "vfr", "-c:v", "ffv1", tmp_path / "vfr.mkv")
    assert np.array_equal(video.to_uint8(video.read_clip(tmp_path / "vfr.mkv")), clip)


@pytest.mark.parametrize("size", [(40, 30), (33, 51), (120, 40)])
def test_size_covers_and_crops_the_middle(tmp_path, size):
    """No black bars, no distortion: a disc in the middle stays a disc in the middle."""
    y, x = np.mgrid[:60, :80]
    disc = ((y - 29.5) ** 2 + (x - 39.5) ** 2 < 15**2)[..., None] * np.full(3, 255, np.uint8)
    clip = video.read_clip(lossless(tmp_path / "disc.mkv", disc[None].astype(np.uint8)), size=size)
    assert clip.shape == (3, 1, *size)
    inside = np.argwhere(clip[0, 0].numpy() > 0)
    assert np.allclose(inside.mean(axis=0), (np.array(size) - 1) / 2, atol=0.5)
    radius = 15 * max(size[0] / 60, size[1] / 80)
    if 2 * radius < min(size):
        assert np.sqrt(len(inside) / np.pi) == pytest.approx(radius, rel=0.03)


@pytest.mark.parametrize("degrees, turns", [(90, 1), (180, 2), (270, 3)])
def test_rotated_clips_come_out_upright(tmp_path, degrees, turns):
    """Phones store portrait clips lying down, with a note how to turn them."""
    flat = np.zeros((4, 32, 48, 3), np.uint8)
    flat[:, :16, :24] = 255  # a white corner
    video.write_video(tmp_path / "flat.mp4", video.to_tensor(flat), fps=8)
    ffmpeg("-display_rotation", degrees, "-i", tmp_path / "flat.mp4", "-c", "copy", tmp_path / "turned.mp4")
    upright = video.read_clip(tmp_path / "turned.mp4")
    expected = video.to_tensor(np.rot90(flat, turns, axes=(1, 2)))
    info = video.clip_info(tmp_path / "turned.mp4")
    assert upright.shape == expected.shape == (3, 4, info.height, info.width)
    assert (upright - expected).abs().mean() < 0.05


def test_gif_and_still(tmp_path):
    frames = [Image.fromarray(np.full((8, 9, 3), v, np.uint8)) for v in (0, 120, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    assert np.array_equal(video.to_uint8(video.read_clip(tmp_path / "a.gif"))[:, 0, 0, 0], [0, 120, 255])
    frames[1].save(tmp_path / "a.png")
    assert video.read_clip(tmp_path / "a.png").shape == (3, 1, 8, 9)


# ------------------------------------------------------------------ what a header says


def encoded(path, clip, *how, pixels="rgb24", rate=16):
    """Write uint8 [t, h, w, 3 or 4] with ffmpeg's options `how`."""
    size = f"{clip.shape[2]}x{clip.shape[1]}"
    raw = ["-f", "rawvideo", "-pix_fmt", pixels, "-s", size, "-r", str(rate), "-i", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *raw, *how, str(path)]
    subprocess.run(command, input=clip.tobytes(), check=True)
    return path


def plain(level, frames=2, size=(48, 64)):
    return np.full((frames, *size, 3), level, np.uint8)


def moving(frames, step=1.0, width=64):
    """A white bar that moves `step` pixels a frame."""
    clip = plain(0, frames, (16, width))
    for i, frame in enumerate(clip):
        x = round(i * step)
        frame[:, x : x + 4] = 255
    return clip


def places(clip):
    """Where the bar is in each frame of [3, t, h, w]."""
    light = (clip[0].mean(dim=1) + 1).numpy()
    return (light * np.arange(light.shape[1])).sum(1) / light.sum(1) - 1.5


@pytest.mark.core
@pytest.mark.parametrize("aspect, turned", [("64/45", 0), ("8/9", 0), ("2/1", 90)])
def test_pixels_that_are_not_square_are_made_so(tmp_path, aspect, turned):
    """A disc on an old or wide film is round."""
    wide = eval(aspect)
    y, x = np.mgrid[:96, :128]
    disc = (y - 47.5) ** 2 + ((x - 63.5) * wide) ** 2 < 30**2
    clip = (disc[None, ..., None] * np.full(3, 255)).astype(np.uint8)
    path = encoded(tmp_path / "a.mp4", clip, "-vf", f"setsar={aspect}", "-crf", "1")
    if turned:
        ffmpeg("-display_rotation", turned, "-i", path, "-c", "copy", tmp_path / "turned.mp4")
        path = tmp_path / "turned.mp4"
    info, read = video.clip_info(path), video.read_clip(path)
    assert read.shape[2:] == (info.height, info.width)
    ys, xs = np.nonzero(read[0, 0].numpy() > 0)
    round_ = (np.ptp(ys) + 1) / (np.ptp(xs) + 1)
    assert round_ == pytest.approx(1, abs=0.05) and "made square" in info.conversions[-1]


#: name -> (options, what a grey of 128 and white become)
COLOURS = {
    "BT.601": ["-vf", "scale=out_color_matrix=bt601,format=yuv444p", "-colorspace", "smpte170m"],
    "BT.709": ["-vf", "scale=out_color_matrix=bt709,format=yuv444p", "-colorspace", "bt709"],
    "full range": ["-vf", "scale=out_range=pc,format=yuvj444p", "-color_range", "pc"],
    "10 bit": ["-vf", "scale=out_color_matrix=bt709,format=yuv444p10le", "-colorspace", "bt709"],
}


@pytest.mark.core
@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_those_of_the_header(tmp_path, name):
    for colour in ((200, 40, 90), (255, 255, 255), (0, 0, 0)):
        clip = plain(0) + np.array(colour, np.uint8)
        path = encoded(tmp_path / "a.mp4", clip, *COLOURS[name], "-crf", "1")
        read = video.to_uint8(video.read_clip(path)).astype(int)
        assert np.abs(read - colour).max() <= 3


def test_untagged_colours_of_large_films_are_those_of_hd(tmp_path):
    for size, matrix in (((48, 64), "bt601"), ((720, 1280), "bt709")):
        clip = plain(0, 1, size) + np.array((200, 40, 90), np.uint8)
        path = encoded(tmp_path / "a.mp4", clip, "-vf", f"scale=out_color_matrix={matrix},format=yuv420p",
                       "-crf", "1", "-preset", "ultrafast")
        assert np.abs(video.to_uint8(video.read_clip(path)).astype(int) - (200, 40, 90)).max() <= 4


def pq(nits):
    """Signal 0..1 of the perceptual quantiser (SMPTE ST 2084)."""
    y = (nits / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


@pytest.mark.core
@pytest.mark.parametrize("transfer, name, signals", [
    ("smpte2084", "PQ", (pq(10), pq(50), pq(100))),
    ("arib-std-b67", "HLG", (0.2542, 0.4972, 0.6296)),  # which show as many cd/m2 at a peak of 1,000
])
def test_high_dynamic_range_becomes_standard(tmp_path, transfer, name, signals):
    """What is less bright than paper (203 cd/m2) is shown as bright as on an SDR screen whose
    white is paper; lights are rolled off, not clipped."""
    def shown(signal):
        code = round(64 + 876 * signal)
        ffmpeg("-f", "lavfi", "-i", "color=s=64x48:d=0.1", "-vf",
               f"format=yuv420p10le,geq=lum={code}:cb=512:cr=512,setparams=color_primaries=bt2020:"
               f"color_trc={transfer}:colorspace=bt2020nc", "-c:v", "ffv1", tmp_path / "a.mkv")
        assert f"{name} to SDR" in video.clip_info(tmp_path / "a.mkv").conversions
        return video.to_uint8(video.read_clip(tmp_path / "a.mkv"))[0, 20, 20].astype(float)

    for signal, nits in zip(signals, (10, 50, 100)):
        assert shown(signal) == pytest.approx(255 * (nits / 203) ** (1 / 2.4), abs=3)
    paper, light = (shown(0.75), shown(0.9)) if name == "HLG" else (shown(pq(203)), shown(pq(600)))
    assert 230 < paper[0] < 250 < light[0] < 255


@pytest.mark.core
def test_fields_become_whole_frames(tmp_path):
    """A bar that moves between the two fields of a frame shows no comb."""
    path = tmp_path / "a.mp4"
    encoded(path, moving(16, 4, 80), "-vf", "interlace=lowpass=off", "-flags", "+ildct+ilme", "-crf", "1",
            rate=32)
    assert "deinterlaced" in video.clip_info(path).conversions
    read = video.read_clip(path)[0, 2:6]
    rows = (read[:, 4:12] + 1) / 2
    comb = (rows[:, 1:] - rows[:, :-1]).abs().mean()
    assert len(read) == 4 and comb < 0.03


def test_fields_that_only_the_frames_tell_of(tmp_path):
    """DV: its header says neither that nor a rate that can be believed."""
    clip = np.repeat(moving(6, 40, 720), 36, axis=1)
    path = encoded(tmp_path / "a.dv", clip, "-c:v", "dvvideo", "-pix_fmt", "yuv420p", rate=25)
    info = video.clip_info(path)
    assert info.interlaced and info.fps == 25


@pytest.mark.core
@pytest.mark.parametrize("name, how", [
    ("a.mov", ["-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le"]),
    ("a.mov", ["-c:v", "qtrle", "-pix_fmt", "argb"]),
    ("a.webm", ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-crf", "4", "-b:v", "0"]),
    ("a.webm", ["-c:v", "libvpx", "-pix_fmt", "yuva420p", "-crf", "4", "-b:v", "1M", "-auto-alt-ref", "0"]),
    ("a.apng", ["-f", "apng"])])
def test_transparent_parts_of_a_clip_become_white(tmp_path, name, how):
    """Whatever colour hides there, in every reader; edges mix with white, not with it."""
    clip = np.zeros((3, 48, 64, 4), np.uint8)
    clip[..., 0], clip[:, :, :32, 3], clip[:, :, 32:, 2] = 200, 255, 255
    path = encoded(tmp_path / name, clip, *how, pixels="rgba")
    for size in (None, (24, 32)):
        read = video.to_uint8(video.read_clip(path, size=size)).astype(int)
        left, right = np.split(read, 2, axis=2)
        assert np.abs(right[:, :, 4:] - 255).max() <= 3
        assert np.abs(left[:, :, :-4] - (200, 0, 0)).max() <= 6


def test_high_dynamic_range_with_transparent_parts(tmp_path):
    """Grey of 50 cd/m2 on the left, half of it in the middle, none on the right: alpha mixes
    what is shown with white, after the tone curve."""
    grey, code = 255 * (50 / 203) ** (1 / 2.4), round(64 + 876 * pq(50))
    ffmpeg("-f", "lavfi", "-i", "color=s=96x48:d=0.1", "-vf",
           f"format=yuva444p10le,geq=lum={code}:cb=512:cr=512:"
           "a='1023*lt(X,32)+511.5*between(X,32,63)',setparams=color_primaries=bt2020:"
           "color_trc=smpte2084:colorspace=bt2020nc", "-c:v", "ffv1", tmp_path / "a.mkv")
    info = video.clip_info(tmp_path / "a.mkv")
    assert info.conversions == ["PQ to SDR", "transparency on white"]
    for size in (None, (24, 48)):
        row = video.to_uint8(video.read_clip(tmp_path / "a.mkv", size=size))[0, 12]
        third = len(row) // 3
        shown = [row[n * third + third // 2].astype(float) for n in range(3)]
        assert shown[0] == pytest.approx(grey, abs=3)
        assert shown[1] == pytest.approx((grey + 255) / 2, abs=3)
        assert shown[2] == pytest.approx(255, abs=3)


@pytest.mark.core
@pytest.mark.parametrize("stored, suffix", [(12, "mp4"), (16, "mkv"), (24, "mp4"), (30, "mkv"), (48, "mkv")])
def test_speed_is_kept_at_another_rate(tmp_path, stored, suffix):
    """A film stored at any rate and read at 16 per second moves as its 16 fps original does; at
    whole ratios exactly, else within the time that a stored frame stands."""
    clip = moving(stored, 48 / stored)
    path = encoded(tmp_path / f"a.{suffix}", clip, "-crf", "1", "-g", "5", rate=stored)
    read = video.read_clip(path, fps=16)
    assert read.shape[1] == 16
    late = 3 * np.arange(16) - places(read)
    assert late.min() > -0.8 and late.max() < 48 / stored + 0.8
    if stored in (16, 48):
        assert np.abs(late).max() < 0.8
    assert video.read_clip(path).shape[1] == stored  # native


def test_variable_rates_are_resampled_by_their_times(tmp_path):
    """Frames 0, 1, ... are shown at 0, 0.05, 0.2, 0.45, 0.8 s: at 20 per second, for 1, 3, 5 and 7
    ticks."""
    clip = np.stack([plain(50 * i, 1)[0] for i in range(5)])
    source = lossless(tmp_path / "clip.mkv", clip)
    ffmpeg("-i", source, "-vf", "settb=1/1000,setpts=N*N*50", "-fps_mode", "passthrough",
           "-enc_time_base", "1:1000", "-c:v", "ffv1", tmp_path / "v.mkv")
    levels = video.to_uint8(video.read_clip(tmp_path / "v.mkv", fps=20))[:, 0, 0, 0] // 50
    assert levels[:16].tolist() == [0] + [1] * 3 + [2] * 5 + [3] * 7


def test_times_that_go_back_count_as_one_frame(tmp_path):
    """As screen recorders write them: the clip is whole, and its rate the one of the header."""
    whole = lossless(tmp_path / "w.mkv", noise(40, 16, 16))
    back = "setpts='PTS+if(gte(N,20),-0.5/TB,0)'"
    ffmpeg("-i", whole, "-vf", back, "-fps_mode", "passthrough", "-c:v", "ffv1", tmp_path / "dup.mkv")
    assert torch.equal(video.read_clip(tmp_path / "dup.mkv"), video.read_clip(whole))
    assert torch.equal(video.read_clip(tmp_path / "dup.mkv", fps=10), video.read_clip(whole))


@pytest.mark.core
@pytest.mark.parametrize("share", [0.6, 2 / 3, 0.7, 0.9])
def test_a_clip_cut_behind_its_first_frames_is_damaged(tmp_path, share):
    """Also where the complaint comes before the first frame, since the demuxer runs ahead."""
    ffmpeg("-i", encoded(tmp_path / "w.mp4", moving(24), "-crf", "8"), "-c", "copy", "-movflags", "+faststart",
           tmp_path / "fast.mp4")
    content = (tmp_path / "fast.mp4").read_bytes()
    path = write(tmp_path / "cut.mp4", content[: int(len(content) * share)])
    with pytest.raises(UserError, match="damaged or cut off near frame|cannot be read as a video"):
        video.read_clip(path)


def test_a_recording_that_begins_between_key_frames_is_not_damaged(tmp_path):
    path = encoded(tmp_path / "a.ts", noise(48, 48, 64), "-g", "16", "-c:v", "libx264")
    content = path.read_bytes()
    joined = write(tmp_path / "b.ts", content[188 * (len(content) // 188 // 6) :])
    assert 16 <= video.read_clip(joined).shape[1] < 48


def cut_off(path, source):
    path.write_bytes(source.read_bytes()[: source.stat().st_size * 6 // 10])
    return path


@pytest.mark.parametrize("make, sentence", [
    (lambda d: d / "none.mp4", "does not exist: give the path of a video file"),
    (lambda d: d, "is a folder: give the path of a video file"),
    (lambda d: write(d / "empty.mp4", b""), r"is empty \(0 bytes\)"),
    (lambda d: write(d / "text.mp4", b"no video at all"), "cannot be read as a video"),
    (lambda d: write(d / "list.m3u8", b"#EXTM3U\n#EXTINF:1,\nhttp://localhost:1/a.ts\n"), "cannot be read as a video"),
    (lambda d: cut_off(d / "cut.mp4", BUNNY), r"damaged or cut off near frame \d+ .*--frames"),
    (lambda d: cut_off(d / "cut.mkv", lossless(d / "whole.mkv", noise(20, 32, 32))), "damaged or cut off near frame 1[0-3] "),
    (lambda d: cut_off(d / "cut.mp4", late_header(d)), "cannot be read as a video .*: it may be incomplete"),
    (lambda d: sound(d / "sound.wav"), "holds sound but no pictures"),
], ids=["missing", "folder", "empty", "text", "playlist", "cut mp4", "cut mkv", "cut mp4 without header", "sound"])
def test_unreadable_clips(tmp_path, make, sentence):
    path = make(tmp_path)
    with pytest.raises(UserError, match=sentence) as e:
        video.read_clip(path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


def write(path, content):
    path.write_bytes(content)
    return path


def late_header(folder):
    ffmpeg("-i", BUNNY, "-c", "copy", folder / "late.mp4")  # the table of frames at the end of the file
    return folder / "late.mp4"


def sound(path):
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.2", path)
    return path


def complaints(*lines):
    """What a log with these lines, behind the first frame, holds against a clip."""
    with tempfile.TemporaryFile() as file:
        shown = "[Parsed_showinfo_0 @ 0x1] [info] n:   0 pts: 0 pts_time:0 fmt:yuv420p sar:1/1 s:64x48 i:P"
        file.write("\n".join([shown, *lines, ""]).encode())
        file.flush()
        log = video.Log(file.fileno())
        log.update()
        return [text for _, text in log.complaints]


def test_a_slip_of_the_encoder_is_no_damage():
    """ffmpeg calls more an error than hurts the frames (OpenCV's box.mp4 is such a clip)."""
    slip = "[h264 @ 0x1] [error] A non-intra slice in an IDR NAL unit."
    broken = "[h264 @ 0x1] [error] error while decoding MB 38 24, bytestream -6"
    assert complaints(slip, "    Last message repeated 2 times") == []
    assert complaints(slip, broken) == ["error while decoding MB 38 24, bytestream -6"]
    assert complaints("[in#0/mov @ 0x1] [error] partial file.") == ["partial file"]
    assert complaints("[in#0/mov @ 0x1] [warning] Packet corrupt (stream = 0).") != []


def test_the_beginning_of_a_damaged_clip_can_be_read(tmp_path):
    path = cut_off(tmp_path / "cut.mp4", BUNNY)
    assert torch.equal(video.read_clip(path, frames=8), video.read_clip(BUNNY, frames=8))


def test_frame_counts_are_kept_or_refused():
    assert video.read_clip(BUNNY, frames=64).shape[1] == 64
    with pytest.raises(UserError, match="holds 64 frames, not 65: lower --frames"):
        video.read_clip(BUNNY, frames=65)
    with pytest.raises(UserError, match="--frames counts from 1"):
        video.read_clip(BUNNY, frames=0)


def test_size_argument():
    import argparse

    assert video.size_arg("720x1280") == (720, 1280)  # rows first
    for wrong in ("720", "720x", "0x5", "a x b", "-1x5"):
        with pytest.raises(argparse.ArgumentTypeError, match="HEIGHTxWIDTH"):
            video.size_arg(wrong)


# ---------------------------------------------------------------------------------------------------- writing clips


def test_toy_clips_survive_an_mp4(tmp_path):
    """Colours stay (the matrix is tagged), also at saturated edges, thanks to the enlargement."""
    x = toy.toy_batch(3, 1, 16, 64)[0][0]
    path = tmp_path / "new folder" / "toy.mp4"
    video.write_video(path, x, fps=12.5, scale=4)
    y = video.read_clip(path)
    assert y.shape == (3, 16, 256, 256) and video.clip_info(path).fps == 12.5
    assert (y[:, :, 1::4, 1::4] - x).square().mean() < 1e-3
    header = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", path], capture_output=True, text=True).stderr
    assert "h264" in header and "yuv420p" in header and "bt709" in header


def test_pieces_are_written_as_they_come(tmp_path):
    x = video.read_clip(BUNNY, frames=10)
    taken = []

    def pieces():
        for p in x.split([1, 4, 5], dim=1):
            taken.append(p.shape[1])
            assert not (tmp_path / "clip.mp4").exists()  # it appears when it is complete
            yield p

    video.write_video(tmp_path / "clip.mp4", pieces(), fps=25)
    video.write_video(tmp_path / "whole.mp4", x, fps=25)
    assert taken == [1, 4, 5] and (tmp_path / "clip.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


@pytest.mark.parametrize("height, width", [(33, 51), (1, 1), (16, 17)])
def test_odd_sizes_are_padded_with_their_edge(tmp_path, height, width):
    x = torch.linspace(-1, 1, width).expand(3, 3, height, width)
    video.write_video(tmp_path / "odd.mp4", x, fps=8)
    y = video.read_clip(tmp_path / "odd.mp4")
    assert y.shape[2:] == (height + height % 2, width + width % 2)
    assert (y[:, :, :height, :width] - x).abs().max() < 0.1 and (y[:, :, -1, -1] - x[:, :, -1, -1]).abs().max() < 0.1


def test_nan_writes_nothing(tmp_path):
    good, bad = torch.zeros(3, 2, 8, 8), torch.full((3, 2, 8, 8), float("nan"))
    for pieces in (bad, [good, bad]):
        with pytest.raises(UserError, match="NaN"):
            video.write_video(tmp_path / "clip.mp4", pieces, fps=8)
    with pytest.raises(UserError, match="NaN"):
        video.contact_sheet(tmp_path / "sheet.png", [bad])
    with pytest.raises(UserError, match="no frames"):
        video.write_video(tmp_path / "clip.mp4", [], fps=8)
    assert not any(tmp_path.iterdir())


def test_a_failing_source_leaves_the_old_file(tmp_path):
    path = write(tmp_path / "clip.mp4", b"old")

    def pieces():
        yield torch.zeros(3, 2, 8, 8)
        raise UserError("the decoder gave up.")

    with pytest.raises(UserError, match="gave up"):
        video.write_video(path, pieces(), fps=8)
    assert os.listdir(tmp_path) == ["clip.mp4"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("frames", [1, 20], ids=["noticed at the end", "noticed on the way"])
def test_a_full_disk_is_told(tmp_path, monkeypatch, capsys, frames):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (tmp_path / "full.mp4").symlink_to("/dev/full")  # where every write fails
    full = contextlib.nullcontext(tmp_path / "full.mp4")
    monkeypatch.setattr(checkpoint, "atomic_path", lambda path: full)
    with pytest.raises(SystemExit), errors.user_errors():
        video.write_video(tmp_path / "a.mp4", torch.zeros(3, 4 * frames, 128, 128), fps=8)
    said = f"error: the disk is full while writing {tmp_path / 'a.mp4'}: free some space"
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("frames", [1, 20], ids=["noticed at the end", "noticed on the way"])
def test_a_file_that_may_not_grow_leaves_nothing(tmp_path, capsys, frames):
    """ffmpeg dies in the middle of the file (here of a limit on file size): one sentence, and
    no half-written file."""
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        with pytest.raises(SystemExit), errors.user_errors():
            pieces = (torch.rand(3, 4, 128, 128) * 2 - 1 for _ in range(frames))
            video.write_video(tmp_path / "clip.mp4", pieces, fps=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    said = f"error: ffmpeg could not write {tmp_path / 'clip.mp4'}"
    assert capsys.readouterr().err.startswith(said)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    blocked = write(tmp_path / "file", b"")
    with pytest.raises(OSError):
        video.write_video(blocked / "clip.mp4", torch.zeros(3, 2, 8, 8), fps=8)

    def read_only(*args, **more):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path))

    monkeypatch.setattr(checkpoint.tempfile, "mkstemp", read_only)
    with pytest.raises(SystemExit) as e, errors.user_errors():
        video.write_video(tmp_path / "clip.mp4", torch.zeros(3, 2, 8, 8), fps=8)
    assert e.value.code == 1 and "choose another folder with --out" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- pictures


def test_pictures(tmp_path):
    picture = noise(1, 7, 5)[0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert torch.equal(video.read_image(tmp_path / "a.png"), video.to_tensor(picture[None])[:, 0])


def test_pictures_of_phones_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    lying = np.repeat([[[0] * 3] * 8, [[255] * 3] * 8], 8, axis=0).astype(np.uint8)  # black above white, 16x8
    Image.fromarray(lying).save(tmp_path / "a.jpg", exif=exif, quality=95)
    x = video.read_image(tmp_path / "a.jpg")
    assert x.shape == (3, 8, 16) and x[:, :, :8].mean() > 0.9 and x[:, :, 8:].mean() < -0.9


def test_transparent_parts_become_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, 3] = 255  # black above, nothing below
    Image.fromarray(rgba).save(tmp_path / "a.png")
    x = video.read_image(tmp_path / "a.png")
    assert (x[:, :2] == -1).all() and (x[:, 2:] == 1).all()


def test_grey_and_16_bit_pictures(tmp_path):
    Image.fromarray(np.full((4, 4), 128, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert torch.equal(video.read_image(tmp_path / "grey.png"), video.read_image(tmp_path / "deep.png"))


@pytest.mark.parametrize("mode, name", [("P", "a.png"), ("P", "a.gif"), ("CMYK", "a.tif"), ("CMYK", "a.jpg"), ("YCbCr", "a.jpg"), ("LA", "a.png"),
                                        ("RGBA", "a.webp"), ("L", "a.bmp")])
def test_every_kind_of_picture_has_its_colours(tmp_path, mode, name):
    """Palettes, print colours, grey with alpha; odd sizes stay."""
    image = Image.new("RGB", (7, 5), (204, 102, 51))
    image.convert(mode).save(tmp_path / name, quality=95)
    x = video.read_image(tmp_path / name)
    grey = np.asarray(image.convert("L"))[0, 0]
    expected = (grey, grey, grey) if mode in ("L", "LA") else (204, 102, 51)
    assert x.shape == (3, 5, 7) and np.abs(video.to_uint8(x[:, None]).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("pixels", ["rgb48be", "rgba64be", "gray16be"])
def test_16_bit_pictures_keep_their_brightness(tmp_path, pixels):
    ffmpeg("-f", "lavfi", "-i", "color=c=0xc86432:s=7x5", "-frames:v", 1, "-pix_fmt", pixels, tmp_path / "a.png")
    expected = (124, 124, 124) if pixels == "gray16be" else (200, 100, 50)
    assert np.abs(video.to_uint8(video.read_image(tmp_path / "a.png")[:, None]).astype(int) - expected).max() <= 2


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "a.png", transparency=1)
    assert video.to_uint8(video.read_image(tmp_path / "a.png")[:, None])[0, 0].tolist() == [[255, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "text", "cut off"])
def test_unreadable_pictures(tmp_path, content):
    Image.fromarray(noise(1, 64, 64)[0]).save(tmp_path / "whole.png")
    path = write(tmp_path / "a.png", (tmp_path / "whole.png").read_bytes()[:3000] if content is None else content)
    with pytest.raises(UserError, match="a.png is not a picture that can be read"):
        video.read_image(path)
    with pytest.raises(UserError, match="does not exist"):
        video.read_image(tmp_path / "none.png")


def test_contact_sheet(tmp_path):
    x = toy.toy_batch(0, 2, 16, 32)[0]
    video.contact_sheet(tmp_path / "sheet.png", x, columns=4, labels=["one", "two"])
    assert Image.open(tmp_path / "sheet.png").size == (2 * 4 * 34, 2 * 2 * 34)
    video.contact_sheet(tmp_path / "sheet.png", x, columns=4, scale=0.5)
    assert Image.open(tmp_path / "sheet.png").size == (2 * 34, 34)
