"""A folder of clips as training data: every sample is what its number says, nothing crosses a cut, and bad files are named, not fatal."""
import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT
from files import video
from files.checkpoint import UserError
from test_files_video import cut_off, encoded, ffmpeg, lossless, moving, noise, sound, write
from training import clips

SIZE = (24, 32)  # of the test clips


def coded(frames, cuts=(), size=SIZE):
    """A clip that says where it was cut from -> uint8 [t, h, w, 3]: red grows by 2 a frame, every other scene from 100 on, green with x, blue with y."""
    clip = np.zeros((frames, *size, 3), np.uint8)
    for t in range(frames):
        scene = sum(c <= t for c in cuts)
        clip[t, ..., 0] = 2 * (t - max([0, *(c for c in cuts if c <= t)])) + 100 * (scene % 2)
    clip[..., 1] = np.linspace(0, 240, size[1])[None, :]
    clip[..., 2] = np.linspace(0, 240, size[0])[:, None]
    return clip


def numbers(x):
    """Red of each frame of a sample [3, t, h, w]."""
    return x[0].float().mean(dim=(1, 2)).round().int().tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two long clips, one with a cut at frame 30, and a short one."""
    path = tmp_path_factory.mktemp("clips")
    (path / "deep" / "er").mkdir(parents=True)
    lossless(path / "a.mkv", coded(50))
    lossless(path / "deep" / "er" / "b.mkv", coded(60, cuts=[30]))
    lossless(path / "short.mkv", coded(6))
    for raw in path.rglob("*.raw"):
        raw.unlink()
    return path


@pytest.fixture
def index(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "index.json"  # shared: each file is scanned once


# ---------------------------------------------------------------------------------------------------- scanning


def test_clips_are_found_in_all_folders_in_order(folder, tmp_path):
    assert [p.relative_to(folder).as_posix() for p in clips.find_clips(folder)] == ["a.mkv", "deep/er/b.mkv", "short.mkv"]
    assert clips.find_clips(folder / "a.mkv") == [folder / "a.mkv"]
    for name in ("notes.txt", "picture.png", ".hidden.mp4", ".git/x.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, b"x")
    with pytest.raises(UserError, match="holds no videos"):
        clips.find_clips(tmp_path)
    with pytest.raises(UserError, match="does not exist: give a folder"):
        clips.find_clips(tmp_path / "none")


def test_a_scan_counts_frames_and_finds_cuts(folder, index):
    a, b, short = clips.scan_folder(folder, index)
    assert (a.frames, a.info.height, a.info.width, a.info.fps, a.cuts, a.error) == (50, 24, 32, 10, [], "")
    assert (b.frames, b.cuts, short.frames) == (60, [30], 6)


def test_motion_is_not_a_cut():
    """Only what stands out from the frames around it is one, be the motion ever so fast."""
    quick = np.full(20, 25.0)
    assert clips.find_cuts(quick) == [] and clips.find_cuts(np.full(20, 2.0)) == [] and clips.find_cuts(np.zeros(0)) == []
    quick[7] = 90
    assert clips.find_cuts(quick) == [8]
    assert clips.find_cuts(np.array([40.0])) == [1]


def test_the_index_saves_scanning_again(folder, tmp_path, monkeypatch):
    scanned = []
    scan = clips.scan
    monkeypatch.setattr(clips, "scan", lambda path: scanned.append(path.name) or scan(path))
    for name in ("one.mkv", "two.mkv"):
        write(tmp_path / name, (folder / "short.mkv").read_bytes())
    first = clips.scan_folder(tmp_path, tmp_path / "i.json")
    assert clips.scan_folder(tmp_path, tmp_path / "i.json") == first and sorted(scanned) == ["one.mkv", "two.mkv"]
    write(tmp_path / "two.mkv", b"broken now")  # a file that changed is scanned again, and what is wrong with it remembered
    assert [bool(c.error) for c in clips.scan_folder(tmp_path, tmp_path / "i.json")] == [False, True]
    assert clips.scan_folder(tmp_path, tmp_path / "i.json")[1].error and scanned[2:] == ["two.mkv"]
    write(tmp_path / "i.json", b"{damaged")
    assert clips.scan_folder(tmp_path, tmp_path / "i.json")[0] == first[0] and len(scanned) == 5


@pytest.mark.parametrize("how", ["rotated", "10 bit", "variable rate", "odd size", "gif"])
def test_unusual_clips_are_read_right(tmp_path, how):
    """The sample at frame 6 shows frames 6, 7, 8, upright, whether ffmpeg jumps there or decodes from the beginning."""
    source = lossless(tmp_path / "clip.mkv", coded(20, size=(33, 51) if how == "odd size" else SIZE))
    path = {"rotated": tmp_path / "x.mp4", "10 bit": tmp_path / "x.mp4", "gif": tmp_path / "x.gif"}.get(how, tmp_path / "x.mkv")
    if how == "rotated":
        ffmpeg("-i", source, "-c:v", "libx264", "-crf", "1", "-pix_fmt", "yuv420p", tmp_path / "flat.mp4")
        ffmpeg("-display_rotation", 90, "-i", tmp_path / "flat.mp4", "-c", "copy", path)
    elif how == "10 bit":
        ffmpeg("-i", source, "-c:v", "libx264", "-crf", "1", "-pix_fmt", "yuv420p10le", path)
    elif how == "variable rate":
        ffmpeg("-i", source, "-vf", "setpts='N*N*0.05/TB'", "-fps_mode", "vfr", "-c:v", "ffv1", path)
    elif how == "gif":
        ffmpeg("-i", source, "-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse", path)
    else:
        path = source
    clip = clips.scan(path)
    info = clip.info
    upright = (32, 24) if how == "rotated" else (33, 51) if how == "odd size" else SIZE
    assert not clip.error and (clip.frames, info.height, info.width) == (20, *upright) and clip.seeks
    assert clip.even != (how == "variable rate")
    jumped = clips.read(clip, [6, 7, 8], (0, 0, *upright), upright)
    clip.seeks = False
    assert np.array_equal(jumped, clips.read(clip, [6, 7, 8], (0, 0, *upright), upright))
    chosen = clips.read(clip, [6, 6, 8], (0, 0, *upright), upright)
    assert np.array_equal(chosen, jumped[[0, 0, 2]])
    whole = video.to_uint8(video.read_clip(path))[6:9]
    assert np.abs(jumped.astype(int) - whole).mean() < 3
    if how != "gif":  # whose palette knows no such reds
        assert np.abs(jumped[..., 0].mean((1, 2)) - [12, 14, 16]).max() < 3


@pytest.mark.core
@pytest.mark.parametrize("stored", [12, 24, 30, 48])
def test_samples_and_whole_clips_are_resampled_alike(tmp_path, stored):
    """At 16 per second a sample from frame 0 on is what reading the whole clip gives, and in the
    middle of a clip, where ffmpeg jumps to, motion is as fast."""
    path = encoded(tmp_path / "a.mkv", moving(3 * stored, 24 / stored, 96), "-crf", "1", "-g", "7", rate=stored)
    dataset = clips.Clips(path, 16, (16, 96), fps=16, index=tmp_path / "i.json")
    clip = dataset.clips[str(path)]
    whole = video.to_uint8(video.read_clip(path, fps=16))
    box = (0, 0, 16, 96)
    assert clip.seeks and np.array_equal(dataset.read(clip, 0, box), whole[:16])
    assert np.array_equal(dataset.read(clip, stored, box), whole[16:32])
    end = int(0.75 * 3 * stored) / stored  # of what is for training, in seconds
    ends = np.arange(3 * stored) / stored + 15.1 / 16  # of a sample from each frame on
    assert dataset.starts(str(path)) == (ends < end).sum()


@pytest.mark.core
@pytest.mark.parametrize("make", ["whole", "cut", "cut early", "repeated times", "broken"])
def test_a_scan_and_a_reading_judge_damage_alike(tmp_path, make):
    whole = encoded(tmp_path / "w.mp4", noise(24, 48, 64), "-crf", "30", "-movflags", "+faststart")
    content, path = whole.read_bytes(), tmp_path / "a.mp4"
    if make == "repeated times":
        path = tmp_path / "a.mkv"
        ffmpeg("-i", whole, "-vf", "setpts='PTS+if(gte(N,20),-0.5/TB,0)'", "-fps_mode", "passthrough",
               "-c:v", "ffv1", path)
    elif make == "broken":
        broken(path, whole)
    else:
        share = dict(whole=1.0, cut=0.7)
        write(path, content[: int(len(content) * share.get(make, 0.12))])
    clip, sentence = clips.scan(path), ""
    try:
        assert video.read_clip(path).shape[1] == clip.frames == 24
    except UserError as e:
        sentence = str(e)
    assert clip.error.split(" near frame")[0] == sentence.split(" near frame")[0]
    assert bool(sentence) == (make not in ("whole", "repeated times"))


def test_what_reading_changes_is_shown(tmp_path, capsys):
    encoded(tmp_path / "a.mp4", moving(48), "-vf", "setsar=2", "-color_range", "tv", rate=48)
    encoded(tmp_path / "b.mp4", moving(20), rate=10)
    clips.main([str(tmp_path), "--frames", "4", "--size", "12x16", "--fps", "16", "--index", str(tmp_path / "i.json"),
                "--out", str(tmp_path / "s.png")])
    shown = capsys.readouterr().out
    assert "pixels 2:1 made square; 48 to 16 fps" in shown and "10 to 16 fps, frames repeated" in shown
    assert "16x128" in shown


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_of_any_bytes(folder, tmp_path, capsys):
    os.symlink(os.fsencode(folder / "a.mkv"), os.fsencode(tmp_path) + b"/caf\xe9\x1b[31m.mkv")
    clips.main([str(tmp_path), "--frames", "4", "--size", "12x16", "--index", str(tmp_path / "i.json"),
                "--out", str(tmp_path / "s.png")])
    shown = capsys.readouterr().out
    assert "caf\\udce9\\x1b[31m.mkv" in shown and shown.replace("\n", "").isprintable()


def test_where_nothing_can_be_written_is_found_before_the_scan(tmp_path):
    for option, file in (("--out", tmp_path), ("--index", "/proc/a/i.json")):
        with pytest.raises(UserError, match="is a folder, but|nothing can be written into"):
            clips.main(["/nonexistent", option, str(file)])


def test_folders_behind_links_come_once(folder, tmp_path):
    (tmp_path / "far").symlink_to(folder / "deep")
    (tmp_path / "again").symlink_to(folder / "deep")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert clips.find_clips(tmp_path) == [tmp_path / "again" / "er" / "b.mkv"]


def test_transparent_parts_of_a_clip_are_white(tmp_path):
    frames = np.zeros((4, 16, 16, 4), np.uint8)
    frames[:, :8, :, 3] = 255  # black above, nothing below
    write(tmp_path / "a.raw", frames.tobytes())
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgba", "-s", "16x16", "-i", tmp_path / "a.raw", "-c:v", "qtrle", "-pix_fmt", "argb", tmp_path / "a.mov")
    for cache in (None, tmp_path / "cache"):
        x = clips.Clips(tmp_path, 2, (16, 16), cache=cache, index=tmp_path / "i.json").sample(0)
        assert (x[:, :, :8] == 0).all() and (x[:, :, 8:] == 255).all()


def test_a_container_that_cannot_jump_is_found_out(folder):
    """Times that lead to other frames, as in some MPEG and AVI files, are not used."""
    clip = clips.scan(folder / "a.mkv")
    change = np.full(49, 2.0)
    stream = video.decode(clip.path, clip.info, (32, 32), flags="area")
    tiny = [clips.grey(frame) for _, frame in stream]
    assert clip.seeks and clips.seeks_well(clip, tiny, change)
    clip.times[0] += 0.35
    assert not clips.seeks_well(clip, tiny, change)


# ---------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("cached", [False, True], ids=["decoded", "cached"])
def test_a_sample_is_what_was_drawn(folder, index, tmp_path, cached):
    """Its frames follow each other from the start drawn, and its colours are those of the box drawn."""
    dataset = clips.Clips(folder, 8, (12, 12), cache=tmp_path if cached else None, index=index)
    seen = set()
    for i in range(12):
        clip, start, (y, x, h, w) = dataset.draw(dataset.rng(i))
        sample = dataset.sample(i)
        assert sample.shape == (3, 8, 12, 12) and sample.dtype == torch.uint8 and sample.is_contiguous()
        first = 2 * (start - 30 if "b.mkv" in clip.path and start >= 30 else start) + (100 if start >= 30 and "b.mkv" in clip.path else 0)
        assert numbers(sample) == pytest.approx(range(first, first + 16, 2), abs=1)
        green, blue = sample[1].float().mean((0, 1)), sample[2].float().mean((0, 2))
        assert green.mean() == pytest.approx((x + (w - 1) / 2) * 240 / 31, abs=3)
        assert blue.mean() == pytest.approx((y + (h - 1) / 2) * 240 / 23, abs=3)
        assert green[-1] - green[0] == pytest.approx(w * 11 / 12 * 240 / 31, abs=6)
        seen.add((clip.path, start, y, x, h))
    assert len(seen) > 8 and len({s[0] for s in seen}) == 2 and len({s[-1] for s in seen}) > 3


def test_no_sample_crosses_a_cut(folder, index):
    dataset = clips.Clips(folder / "deep", 10, (12, 12), index=index)
    assert dataset.windows == {str(folder / "deep" / "er" / "b.mkv"): [(0, 21), (30, 6)]}  # 45 of 60 frames are for training
    starts = {dataset.draw(dataset.rng(i))[1] for i in range(300)}
    assert starts == {*range(0, 21), *range(30, 36)} and len(dataset) == 27


def test_clips_at_another_rate(folder, index):
    """Of a clip with 10 frames per second: as many per second as asked for, of which a
    sample may start at any stored frame."""
    path = str(folder / "a.mkv")
    dataset = clips.Clips(path, 4, (12, 12), index=index, fps=2)
    assert dataset.windows == {path: [(0, 37 - 15)]}
    assert np.diff(numbers(dataset.sample(3))) == pytest.approx(10, abs=1)
    slow = clips.Clips(path, 4, (12, 12), fps=20, index=index)  # each frame is shown twice
    assert slow.numbers(slow.clips[path], 3).tolist() == [3, 3, 4, 4]
    assert slow.windows == {path: [(0, 36)]}


def test_long_clips_do_not_crowd_out_short_ones(folder, index):
    """Chances go with the square root of the number of starts."""
    dataset = clips.Clips(folder, 4, (12, 12), index=index)
    starts = [dataset.starts(p) for p in dataset.paths]
    assert starts == [34, 39, 1] and len(dataset) == sum(starts)
    assert dataset.chances == pytest.approx(np.sqrt(starts) / np.sqrt(starts).sum())


@pytest.mark.parametrize("height, width, size, zoom, box", [
    (720, 1280, (128, 128), 1.0, (0, 280, 720, 720)), (720, 1280, (128, 128), 0.5, (180, 460, 360, 360)),
    (720, 1280, (90, 320), 1.0, (180, 0, 360, 1280)), (144, 256, (128, 128), 0.5, (8, 64, 128, 128)), (24, 32, (24, 32), 0.1, (0, 0, 24, 32))])
def test_crops_are_never_enlarged(height, width, size, zoom, box):
    assert clips.crop_box(height, width, size, zoom) == box
    for fy, fx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        y, x, h, w = clips.crop_box(height, width, size, zoom, fy, fx)
        assert (y, x) == ((height - h) * fy, (width - w) * fx) and h >= size[0] and w >= size[1]


def test_fine_patterns_are_averaged_not_aliased():
    """Black and white columns, scaled to a fifth, become grey."""
    frames = np.zeros((1, 40, 40, 3), np.uint8)
    frames[:, :, ::2] = 255
    assert np.abs(clips.resize(frames, (0, 0, 40, 40), (8, 8)).astype(int) - 127).max() < 12


# ---------------------------------------------------------------------------------------------------- streams


def test_a_stream_depends_neither_on_workers_nor_on_where_it_starts(folder, index):
    dataset = clips.Clips(folder, 4, (12, 12), seed=3, index=index)

    def steps(first, workers, n=2, **more):
        stream = clips.loader(dataset, 2, first, workers, **more)
        batches = [next(stream) for _ in range(n)]
        stream.close()
        return torch.stack(batches)

    whole = steps(0, 0, 4)
    assert whole.shape == (4, 2, 3, 4, 12, 12) and whole.dtype == torch.float32 and -1 <= whole.min() and whole.max() <= 1
    assert torch.equal(whole[0, 1], dataset.sample(1).float() / 127.5 - 1)
    assert torch.equal(steps(0, 1, 4), whole) and torch.equal(steps(2, 3), whole[2:])
    shares = [steps(0, 1, 2, rank=rank, ranks=2) for rank in (0, 1)]  # two processes share what one sees in twice as many steps
    assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), whole)
    other = clips.Clips(folder, 4, (12, 12), seed=4, index=index)
    assert not torch.equal(other.sample(0), dataset.sample(0)) and not torch.equal(dataset.sample(1), dataset.sample(0))


def test_a_stream_leaves_the_random_numbers_alone(folder, index):
    """Or else a resumed training would not be the same."""
    dataset, state = clips.Clips(folder, 4, (12, 12), index=index), torch.get_rng_state()
    next(clips.loader(dataset, 1, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_cache_is_filled_once_and_changes_little(folder, index, tmp_path, monkeypatch):
    plain = clips.Clips(folder, 4, (6, 8), index=index)
    cached = clips.Clips(folder, 4, (6, 8), index=index, cache=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [f.stat().st_size for f in files] == [50 * 12 * 16 * 3, 60 * 12 * 16 * 3, 6 * 12 * 16 * 3]  # half the size will do for zoom 0.5
    for i in range(4):
        assert (plain.sample(i).float() - cached.sample(i).float()).abs().mean() < 6  # boxes are rounded to half as many pixels
    decoded = []
    decode = clips.decode
    monkeypatch.setattr(clips, "decode", lambda job: decoded.append(job[1]) or decode(job))
    write(files[1], b"cut off")
    again = clips.Clips(folder, 4, (6, 8), index=index, cache=tmp_path)
    assert decoded == [files[1]] and torch.equal(again.sample(0), cached.sample(0))


def test_a_disk_too_small_for_the_cache_is_told(folder, index, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), dict(free=1000)))
    with pytest.raises(UserError, match="decoded clips need 0.[0-9] MB and .* use another folder"):
        clips.Clips(folder, 4, (12, 12), index=index, cache=tmp_path)


# ---------------------------------------------------------------------------------------------------- what is held out


def test_the_end_of_each_of_few_clips_is_held_out(folder, index):
    """Whatever the frames: no phase of a training sees what another is judged by."""
    for frames in (1, 4, 8):
        ends = {}
        for split in ("train", "val"):
            dataset = clips.Clips(folder / "a.mkv", frames, (12, 12), split, index=index)
            (first, n), = dataset.windows[str(folder / "a.mkv")]
            ends[split] = (first, first + n + frames - 1)
        assert ends == {"train": (0, 37), "val": (40, 50)}


def fake(names, frames=40):
    return [clips.Clip(name, frames=frames) for name in names]


def test_of_many_clips_some_are_held_out_whole():
    for n, held_out in ((45, 5), (20, 2)):
        many = fake([f"f/{i}.mp4" for i in range(n)])
        train, val = (clips.split_clips(many, "f", split) for split in ("train", "val"))
        assert len(val) == held_out and {c.path for c, *_ in train} ^ {c.path for c, *_ in val} == {c.path for c in many}
        assert all((first, end) == (0, 40) for _, first, end in train + val)
        moved = clips.split_clips(fake([c.path.replace("f/", "elsewhere/") for c in many[::-1]]), "elsewhere", "val")
        assert {Path(c.path).name for c, *_ in moved} == {Path(c.path).name for c, *_ in val}  # by names alone


def test_a_folder_val_is_what_is_held_out():
    names = lambda split: [c.path for c, *_ in clips.split_clips(fake(["f/a.mp4", "f/val/b.mp4", "f/b/val/c.mp4"]), "f", split)]
    assert names("val") == ["f/val/b.mp4"] and names("train") == ["f/a.mp4", "f/b/val/c.mp4"]


def test_several_folders_are_split_each_on_its_own(folder, index):
    one, other, both = (clips.Clips(f, 4, (12, 12), index=index) for f in (folder / "a.mkv", folder / "deep", [folder / "a.mkv", folder / "deep"]))
    assert both.windows == one.windows | other.windows


def test_validation_is_fixed_and_spread(folder, index):
    """The clips take turns, starts are spread over each, the crop is in the middle; there are no more than there are."""
    videos = clips.validation(folder, 4, (12, 12), 4, index=index)
    assert len(videos) == 4 and all(v.shape == (3, 4, 12, 12) and v.dtype == torch.float32 for v in videos)
    assert [numbers((v + 1) * 127.5)[0] for v in videos] == pytest.approx([2 * 41, 2 * 45, 100 + 2 * 20, 100 + 2 * 24], abs=1)
    assert all(((v[1].mean() + 1) * 127.5).item() == pytest.approx(120, abs=1) for v in videos)  # the middle column
    assert all(torch.equal(a, b) for a, b in zip(videos, clips.validation(folder, 4, (12, 12), 4, index=index)))
    assert len(clips.validation(folder, 4, (12, 12), 100, index=index)) == 7 + 9


# ---------------------------------------------------------------------------------------------------- bad files


def broken(path, source):
    """A clip in whose middle some bytes were overwritten."""
    content = bytearray(source.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = np.random.default_rng(0).bytes(2000)
    return write(path, bytes(content))


def other_sizes(path, source):
    """Two clips of different size, one after the other, in one file."""
    ffmpeg("-i", source, "-frames:v", 10, "-c:v", "libx264", path.with_name("1.ts"))
    ffmpeg("-i", source, "-frames:v", 10, "-vf", "scale=64:48", "-c:v", "libx264", path.with_name("2.ts"))
    return write(path, b"".join(path.with_name(n).read_bytes() for n in ("1.ts", "2.ts")))


BAD = {
    "empty": (lambda d, good: write(d / "bad.mp4", b""), r"is empty \(0 bytes\)"),
    "text": (lambda d, good: write(d / "bad.mp4", b"no video at all"), "cannot be read as a video"),
    "sound": (lambda d, good: sound(d / "bad.wav").rename(d / "bad.avi"), "holds sound but no pictures"),
    "cut off": (lambda d, good: cut_off(d / "bad.mkv", good), r"damaged or cut off near frame \d+"),
    "broken in the middle": (lambda d, good: broken(d / "bad.mp4", ROOT / "assets" / "bunny.mp4"), r"damaged or cut off near frame \d+"),
    "changing size": (lambda d, good: other_sizes(d / "bad.ts", good), "changes its size at frame 10"),
    "dead link": (lambda d, good: dead_link(d / "bad.mkv"), "does not exist"),
}


def dead_link(path):
    path.symlink_to("gone")
    return path


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_skipped_and_named(folder, tmp_path, name):
    make, sentence = BAD[name]
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "good.mkv").symlink_to(folder / "a.mkv")
    made = make(tmp_path, folder / "a.mkv")
    bad = made.rename(tmp_path / "clips" / made.name)
    dataset = clips.Clips(tmp_path / "clips", 1, (12, 12), index=tmp_path / "i.json")
    assert len(dataset) == 37 and dataset.sample(0).shape == (3, 1, 12, 12)
    clip = next(c for c in clips.scan_folder(tmp_path / "clips", tmp_path / "i.json") if c.path == str(bad))
    assert clip.error.startswith(str(bad)) and "\n" not in clip.error
    with pytest.raises(UserError, match=sentence):
        clips.Clips(bad, 1, (12, 12), index=tmp_path / "i.json")  # nothing else is left
    assert list(dataset.skipped) == [str(bad)]


def test_clips_too_short_or_too_small_are_counted(folder, index):
    dataset = clips.Clips(folder, 20, (12, 12), index=index)
    assert list(dataset.skipped.values()) == [f"{folder / 'short.mkv'} has at most 4 frames without a cut for train, and 20 are needed."]
    with pytest.raises(UserError, match=r"none of the 3 videos in .* can be used for train with 200 frames of 12x12 \(.*: lower --frames or --size"):
        clips.Clips(folder, 200, (12, 12), index=index)
    with pytest.raises(UserError, match="is 24x32, smaller than 32x24"):
        clips.Clips(folder, 4, (32, 24), index=index)
    with pytest.raises(UserError, match="make no clip"):
        clips.Clips(folder, 0, (12, 12), index=index)


@pytest.mark.parametrize("cached", [False, True], ids=["decoded", "cached"])
def test_a_clip_that_fails_during_training_is_named_once(folder, tmp_path, cached):
    """Deleted or overwritten after the scan: another clip takes its place, and the run goes on."""
    for name in ("a", "b"):
        write(tmp_path / f"{name}.mkv", (folder / "a.mkv").read_bytes())
    dataset = clips.Clips(tmp_path, 4, (12, 12), index=tmp_path / "i.json", cache=tmp_path / "cache" if cached else None)
    if cached:
        dataset.cached(dataset.clips[str(tmp_path / "a.mkv")])[0].unlink()
    else:
        write(tmp_path / "a.mkv", b"gone")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert len([dataset.sample(i) for i in range(8)]) == 8
    assert [str(w.message).endswith("Another clip takes its place.") for w in told] == [True] and list(dataset.skipped) == [str(tmp_path / "a.mkv")]
    (tmp_path / "b.mkv").unlink()
    for file in (tmp_path / "cache").glob("*"):
        file.unlink()
    with pytest.raises(UserError, match="in a row could not be read"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.sample(0)


def test_a_clip_that_cannot_be_cached_is_skipped(folder, index, tmp_path, monkeypatch):
    decode = clips.decode
    monkeypatch.setattr(clips, "decode", lambda job: (job[0], "a.mkv: disk error.") if "a.mkv" in job[0].path else decode(job))
    dataset = clips.Clips(folder, 4, (12, 12), index=index, cache=tmp_path)
    assert dataset.skipped == {str(folder / "a.mkv"): "a.mkv: disk error."} and str(folder / "a.mkv") not in dataset.paths


# ---------------------------------------------------------------------------------------------------- the scripts


def test_the_script_shows_a_folder(folder, index, tmp_path, capsys):
    write(tmp_path / "bad.mp4", b"no video")
    (tmp_path / "a.mkv").symlink_to(folder / "a.mkv")
    out = ["--out", str(tmp_path / "sheet.png"), "--index", str(tmp_path / "i.json")]
    clips.main([str(tmp_path), "--frames", "4", "--size", "12x16", "--workers", "1", *out])
    shown = capsys.readouterr().out
    assert "a.mkv" in shown and "24x32" in shown and "1 of 2 files can be read; skipped:" in shown and "bad.mp4 cannot be read as a video" in shown
    assert Image.open(tmp_path / "sheet.png").size[1] == 12 * 14


@pytest.fixture(scope="module")
def fetch():
    spec = importlib.util.spec_from_file_location("fetch", ROOT / "assets" / "fetch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_still_becomes_a_clip(fetch, tmp_path):
    """Every frame is a part of the picture, and they differ."""
    fetch.pan(Image.fromarray(coded(1, size=(60, 80))[0]), tmp_path / "pan.mp4", frames=12)
    x = video.read_clip(tmp_path / "pan.mp4")
    assert x.shape == (3, 12, 36, 48)
    middles = [((x[c].mean((1, 2)) + 1) / 2 * 255) for c in (1, 2)]
    assert all(m.min() > 30 and m.max() < 210 for m in middles)
    assert all(m.max() - m.min() > 1 for m in middles)  # a twelfth of the way in as many frames


def test_what_cannot_be_fetched_is_said(fetch, tmp_path, monkeypatch, capsys):
    def run(command, **more):
        if command[0] == "apt-get":
            raise FileNotFoundError(2, "none", "apt-get")
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    with pytest.raises(UserError, match="nothing could be fetched: check the network"):
        fetch.main(["--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "left out: pip could not download scikit-learn (no network)." in shown and "opencv-doc needs apt-get, which is not here" in shown
