"""Clips with captions: every form they come in is read alike, and what is wrong is named, costs
itself and nothing else."""
import csv
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import toy
from files import video
from files.checkpoint import UserError
from training import captions, entries

FAMILY = "32x48F32MS"  # 32x64, 32x32, 64x32
RED, BLUE = "a red circle moving left", "a blue square"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three clips that can be used (two wide, one in portrait), and one of every kind that cannot."""
    path = tmp_path_factory.mktemp("clips")
    (path / "deep").mkdir()
    movie = lambda seed, h, w, frames=12: toy.toy_batch(seed, 1, frames, 64)[0][0, :, :, :h, :w]
    for name, x in {"a.mp4": movie(0, 36, 64), "b.mp4": movie(1, 36, 64), "deep/portrait.mp4": movie(2, 60, 32), "short.mp4": movie(3, 36, 64, 5)}.items():
        video.write_video(path / name, x, fps=16)
    (path / "a.json").write_text(json.dumps([RED, f"  {BLUE} \n"]))
    (path / "b.json").write_text(json.dumps({"captions": [RED, BLUE], "scores": [0.9, 0.8], "height": 36, "width": 64}))
    (path / "deep" / "portrait.txt").write_text("a large green ring")
    (path / "short.txt").write_text(RED)
    shutil.copy(path / "a.mp4", path / "lonely.mp4")
    with open(path / "lonely.mp4", "ab") as f:
        f.write(b"\0" * 8)  # so that its bytes are not those of a.mp4
    (path / "orphan.txt").write_text(BLUE)
    (path / "broken.mp4").write_bytes(b"no video" * 100)
    (path / "broken.txt").write_text(RED)
    return path


# ---------------------------------------------------------------------------------------------------- finding


def test_clips_and_captions_find_each_other(folder):
    samples, skipped = captions.find_samples(folder)
    assert {s.name: s.captions for s in samples} == {
        f"{folder}/a.mp4": {RED: 1, BLUE: 1}, f"{folder}/b.mp4": {RED: 0.9, BLUE: 0.8}, f"{folder}/deep/portrait.mp4": {"a large green ring": 1},
        f"{folder}/broken.mp4": {RED: 1}, f"{folder}/short.mp4": {RED: 1}}  # the last two come to light when they are read
    assert skipped == {f"{folder}/lonely.mp4": captions.NO_CAPTION, f"{folder}/orphan.txt": captions.NO_CLIP}


def test_tables_and_tars_say_the_same_as_a_folder(folder, tmp_path):
    """CSV (a row per caption), JSONL and web-dataset tars give the same clips and captions; out of a tar the same bytes are read."""
    samples = captions.find_samples(folder)[0]
    expected = {s.key: s.captions for s in samples}
    with open(tmp_path / "t.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerows([["path", "caption", "score"], *([s.name, c, p] for s in samples for c, p in s.captions.items())])
    lines = [json.dumps(dict(path=s.name, captions=list(s.captions), scores=list(s.captions.values()))) for s in samples]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for i, s in enumerate(samples):
            (tmp_path / "said.json").write_text(json.dumps([{"caption": c, "score": p} for c, p in s.captions.items()]))
            tar.add(tmp_path / "said.json", f"{i:05d}.json")
            tar.add(s.name, f"{i:05d}.mp4")
    for file in ("t.csv", "t.jsonl", "t.tar"):
        found, skipped = captions.find_samples(tmp_path / file)
        assert {s.key: s.captions for s in found} == expected and not skipped
    originals = {s.key: Path(s.name).read_bytes() for s in samples}
    for s in found:
        with captions.video_file(s) as path:
            assert path.read_bytes() == originals[s.key] and path.suffix == ".mp4"
    both, skipped = captions.find_samples([folder, tmp_path / "t.tar"])
    assert {s.key: list(s.captions) for s in both} == {key: sorted(said) for key, said in expected.items()}  # whichever place comes first
    assert sum("same bytes" in why for why in skipped.values()) == len(samples)


def test_whatever_is_wrong_with_a_table_or_tar_is_named(folder, tmp_path):
    (tmp_path / "rows.csv").write_text(f"path,caption\n{folder}/a.mp4,{RED}\ngone.mp4,{RED}\n,{RED}\n{folder}/b.mp4,\n")
    (tmp_path / "other.csv").write_text("name,age\nx,1\n")
    (tmp_path / "bad.jsonl").write_text('{"path": \n')
    (tmp_path / "bytes.csv").write_bytes(b"path,caption\n\xff\xfe,x\n")
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    with tarfile.open(tmp_path / "cut.tar", "w") as tar:
        for name in ("a.mp4", "a.json", "orphan.txt", "b.mp4"):
            tar.add(folder / name, name)
    whole = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"b.mp4") + 1000])
    samples, skipped = captions.find_samples(tmp_path)
    assert [s.captions for s in samples] == [{RED: 1, BLUE: 1}]
    why = {name.removeprefix(f"{tmp_path}/"): reason for name, reason in skipped.items()}
    assert why["rows.csv, row 2 (gone.mp4)"] == why["rows.csv, row 3"] == why["cut.tar/orphan"] == captions.NO_CLIP
    assert why[f"{folder}/b.mp4"] == captions.NO_CAPTION and why["cut.tar/b.mp4"].startswith("cut off")
    assert why["other.csv"].startswith("table without") and why["bad.jsonl, row 1"].startswith("row that is no JSON") and any(name.startswith("bytes.csv, row 1") for name in why)
    assert why["cut.tar"].startswith("archive that is cut off") and why["x.tar.gz"].startswith("compressed archive")
    assert len(why) == 11 and sum("same bytes" in reason for reason in why.values()) == 1


def test_captions_come_in_many_forms():
    """The extended prompt goes before the prompt; scores must fit, and decide with a power of ten how often a caption is drawn."""
    assert captions.captions_of("x") == captions.captions_of(["x", " "]) == captions.captions_of({"text": "x", "height": 2}) == {"x": 1}
    assert captions.captions_of({"prompt": "short", "extended_prompt": "long"}) == {"long": 1}
    assert captions.captions_of({"caption": "x", "score": "0.5"}) == {"x": 0.5} and captions.captions_of({"caption": "x", "score": ""}) == {"x": 1}
    assert captions.captions_of({"height": 2}) == {}
    for wrong in ({"captions": ["x", "y"], "scores": [1]}, {"caption": "x", "score": -1}, {"caption": "x", "score": "high"}, [1, 2]):
        with pytest.raises(ValueError):
            captions.captions_of(wrong)
    chances = lambda *scores: captions.caption_chances(captions.Sample("", "", {str(i): s for i, s in enumerate(scores)})).tolist()
    assert chances(0.5, 1.0) == pytest.approx([1 / 1025, 1024 / 1025]) and chances(0, 0) == [0.5, 0.5]


def test_nothing_to_train_on_is_one_sentence(tmp_path, folder):
    with pytest.raises(UserError, match="does not exist: give a folder"):
        captions.find_samples(tmp_path / "none")
    shutil.copy(folder / "lonely.mp4", tmp_path)
    with pytest.raises(UserError, match=r"no clips with captions .*1 x clip without caption: .*lonely.mp4\): give x.mp4 with x.txt"):
        captions.find_samples(tmp_path)


def test_a_fingerprint_is_that_of_the_bytes(folder, tmp_path, monkeypatch):
    """Not of name, place or time, and of every byte: uncompressed clips of equal size agree in
    most places. Large files are hashed once."""
    monkeypatch.setattr(entries, "LARGE", 1000)
    monkeypatch.setattr(entries, "REMEMBERED", str(tmp_path / "new" / "hashes.jsonl"))
    entries.remembered.cache_clear()
    moved = shutil.copy(folder / "a.mp4", tmp_path / "x.mp4")
    assert entries.hash_file(moved) == entries.hash_file(folder / "a.mp4")
    assert entries.hash_file(moved) != entries.hash_file(folder / "b.mp4")
    large = bytearray(300_000)
    hashes = set()
    for place in (0, 100_001, 200_002, 299_999):
        (tmp_path / str(place)).write_bytes(large[:place] + b"x" + large[place + 1 :])
        hashes.add(entries.hash_file(tmp_path / str(place)))
    assert len(hashes) == 4
    whole = entries.hash_file(moved)
    entries.remembered.cache_clear()  # as if another process asked
    monkeypatch.setattr(entries.hashlib, "sha256", lambda start: 1 / 0)
    stamps = json.loads(Path(entries.REMEMBERED).read_text().splitlines()[0])
    assert stamps[1] == whole and len(entries.remembered()) == 7
    entries.remembered.cache_clear()


# ------------------------------------------------------------------ captions as people write them


def placed(folder, files, clips=("a.mp4", "b.mp4"), encoding="utf-8"):
    """A folder with unreadable but different clips, and files of captions -> what is found."""
    folder.mkdir()
    for name in clips:
        (folder / name).write_text(name)
    for name, text in files.items():
        (folder / name).write_text(text, encoding=encoding, newline="")
    samples, skipped = captions.find_samples(folder)
    found = {os.path.relpath(s.name, folder): list(s.captions) for s in samples}
    return found, {name.removeprefix(f"{folder}/"): why for name, why in skipped.items()}


ODD = "a cat\u2028runs\x0cover\x85there"  # what str.splitlines would take for line ends


@pytest.mark.core
@pytest.mark.parametrize("name, text", [
    ("m.csv", f'path,caption\na.mp4,{ODD}\r\nb.mp4,"a dog, two\nlines"\n'),
    ("m.tsv", f'Video\tPrompt\na.mp4\t{ODD}\nb.mp4\t"a dog, two\nlines"'),
    ("m.CSV", f'file_name;text;score\na.mp4;{ODD};1\nb.mp4;"a dog, two\nlines";\n'),
    ("m.jsonl", json.dumps({"video": "a.mp4", "text": ODD}, ensure_ascii=False) + "\n\n"
     + json.dumps({"File_Name ": "b.mp4", "prompt": "a dog, two\nlines"})),
])
def test_lines_end_at_newlines_and_columns_have_common_names(tmp_path, name, text):
    found, skipped = placed(tmp_path / "x", {name: text})
    assert found == {"a.mp4": [ODD], "b.mp4": ["a dog, two\nlines"]} and not skipped


@pytest.mark.core
@pytest.mark.parametrize("files", [
    {"m.csv": f"path,caption\na.mp4,{ODD}\nb.mp4,猫\n"},
    {"m.jsonl": "\n".join(json.dumps({"path": path, "caption": said}, ensure_ascii=False)
                          for path, said in (("a.mp4", ODD), ("b.mp4", "猫")))},
    {"a.txt": ODD, "b.json": '"猫"'}])
def test_texts_of_spreadsheets_are_utf_16(tmp_path, files):
    found, skipped = placed(tmp_path / "x", files, encoding="utf-16")
    assert found == {"a.mp4": [ODD], "b.mp4": ["猫"]} and not skipped


@pytest.mark.core
def test_a_bad_row_costs_that_row_and_is_named_by_its_number(tmp_path):
    rows = ["path,caption", "a.mp4,a black cat, running fast", 'b.mp4,"an open quote', "a.mp4,a cat",
            "gone.mp4,x", f"{'x' * 5000}.mp4,x", "b.mp4,a dog"]
    found, skipped = placed(tmp_path / "csv", {"m.csv": "\n".join(rows)})
    assert found == {"a.mp4": ["a cat"], "b.mp4": ["a dog"]}
    why = [skipped[name][:16] for name in sorted(skipped)]
    assert sorted(name[:12] for name in skipped) == [f"m.csv, row {n}" for n in (1, 2, 4, 5)]
    assert why == ["row with 3 value", "row that is no C", captions.NO_CLIP[:16], captions.NO_CLIP[:16]]

    good = [json.dumps(dict(path=name, caption="x")) for name in ("a.mp4", "b.mp4")]
    bad = ['{"path": "b.mp4", "caption": "a dog",}', "[" * 200_000, '{"path": "a.mp4", "caption": "\\ud800"}',
           '{"path": "a.mp4", "caption": "y", "score": 1' + "0" * 400 + "}", "[1]",
           json.dumps(dict(path="a.mp4", caption="y" * 2_000_000))]
    found, skipped = placed(tmp_path / "jsonl", {"m.jsonl": "\n".join([good[0], *bad, good[1]])})
    assert found == {"a.mp4": ["x"], "b.mp4": ["x"]}
    assert sorted(skipped) == [f"m.jsonl, row {n}" for n in range(2, 8)]


@pytest.mark.core
def test_a_text_file_is_one_caption_unless_told(tmp_path):
    said = "A cat runs.\n\nThe camera pans left.\n"
    found, skipped = placed(tmp_path / "x", {"a.TXT": said, "b.Json": '{"caption": "a dog"}'})
    assert found == {"a.mp4": ["A cat runs.\n\nThe camera pans left."], "b.mp4": ["a dog"]}
    by_line = captions.find_samples(tmp_path / "x", per_line=True)[0]
    assert list(by_line[0].captions) == ["A cat runs.", "The camera pans left."] and not skipped
    alone = captions.find_samples(tmp_path / "x" / "a.mp4")[0]
    assert [list(s.captions) for s in alone] == [["A cat runs.\n\nThe camera pans left."]]


def test_what_is_read_is_bounded(tmp_path):
    """Huge captions are named, not read: beside a clip, and in a tar, where a file without
    content may claim 200 GB."""
    huge = {"a.txt": "x" * 50_000_000, "b.json": '{"caption": "' + "y" * 40_000 + '"}'}
    (tmp_path / "y").mkdir()
    with pytest.raises(UserError, match="there are no clips with captions"):
        placed(tmp_path / "x", huge)
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, text in (("a.mp4", "film"), ("a.txt", "a cat"), ("b.txt", "y" * 2_000_000)):
            (tmp_path / name).write_text(text)
            tar.add(tmp_path / name, name)
        sparse = tarfile.TarInfo("c.txt")
        sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "c.txt",
                              "GNU.sparse.size": str(200 << 30), "GNU.sparse.numblocks": "0",
                              "GNU.sparse.map": ""}
        tar.addfile(sparse)
    samples, skipped = captions.find_samples(tmp_path / "t.tar")
    assert [list(s.captions) for s in samples] == [["a cat"]]
    assert len(skipped) == 2 and "more than 1 MB" in skipped[f"{tmp_path}/t.tar/b.txt"]


@pytest.mark.parametrize("end", [-1, 100, 512])
def test_a_tar_cut_inside_a_header_is_named(tmp_path, end):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in ("a.mp4", "a.txt", "b.mp4"):
            (tmp_path / name).write_text(name)
            tar.add(tmp_path / name, name)
    with tarfile.open(tmp_path / "t.tar") as tar:
        last = tar.getmember("b.mp4").offset
    whole = (tmp_path / "t.tar").read_bytes()
    cut = whole[: last + end] if end > 0 else whole[:last] + b"damage" * 100 + whole[last + 600 :]
    (tmp_path / "t.tar").write_bytes(cut)
    samples, skipped = captions.find_samples(tmp_path / "t.tar")
    assert len(samples) == 1 and any("cut off" in why for why in skipped.values())


def test_folders_behind_links_are_read_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("real/a.mp4", "real/a.txt", "data/deep/b.mp4", "data/deep/b.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "data" / "far").symlink_to(tmp_path / "real")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "data")
    samples, skipped = captions.find_samples(tmp_path / "data")
    names = [os.path.relpath(s.name, tmp_path / "data") for s in samples]
    assert names == ["again/a.mp4", "deep/b.mp4"] and not skipped


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_of_any_bytes_are_shown_without_control_characters(tmp_path):
    clip = os.fsencode(tmp_path) + b"/caf\xe9\x1b[31m.mp4"
    open(clip, "wb").close()
    open(clip.replace(b"mp4", b"txt"), "w").write("a cat")
    samples, _ = captions.find_samples(tmp_path)
    assert len(samples) == 1
    said = captions.summary({samples[0].name: "bad"})
    assert said.isprintable() and said.encode() and "caf\\udce9\\x1b[31m.mp4" in said


# ---------------------------------------------------------------------------------------------------- buckets and pixels


@pytest.mark.parametrize("family, published", [  # spec 2.2
    ("480F32MS", "448x896 480x832 512x768 544x704 640x640 672x608 704x544 768x512 832x480 832x480 896x448"),
    ("480f64ms", "448x896 448x832 512x768 576x704 640x640 640x576 704x576 768x512 832x512 832x448 896x448"),
    ("720F32MS", "672x1344 704x1280 800x1152 832x1088 960x960 1024x896 1088x832 1152x800 1248x736 1280x736 1344x672")])
def test_the_rule_gives_the_published_buckets(family, published):
    assert [f"{h}x{w}" for h, w in captions.bucket_sizes(family).values()] == published.split()


def test_larger_families_and_own_areas_follow_the_rule():
    assert captions.bucket_sizes("1080F32MS")[0.5625] == (1088, 1920) and captions.bucket_sizes("2160F64MS")[0.5625] == (2176, 3840)
    assert captions.bucket_of(1280, 720, captions.bucket_sizes("480F32MS")) == (832, 480)
    assert min(min(size) for size in captions.bucket_sizes("8x8F32MS").values()) == 32
    for wrong in ("480", "500F32MS", "480F0MS", "480x0F32MS"):
        with pytest.raises(UserError, match="there are no buckets"):
            captions.bucket_sizes(wrong)


def test_a_clip_covers_its_bucket(folder):
    """Every stored frame from the first on; the picture keeps its aspect; portrait clips get a portrait bucket."""
    sizes = captions.bucket_sizes(FAMILY)
    samples = {Path(s.name).name: s for s in captions.find_samples(folder)[0]}
    x, first = captions.read_sample(samples["portrait.mp4"], 8, sizes)
    stored = video.read_clip(folder / "deep" / "portrait.mp4")
    assert x.shape == (3, 8, 64, 32) and torch.equal(first, stored[:, 0])
    scaled = torch.nn.functional.interpolate(stored[:, :8].transpose(0, 1), (64, 34), mode="bilinear").transpose(0, 1)
    assert torch.equal(x, scaled[..., 1:33])
    assert captions.read_sample(samples["a.mp4"], 12, sizes)[0].shape == (3, 12, 32, 64)
    with pytest.raises(UserError, match="^shorter than 8 frames$"):
        captions.read_sample(samples["short.mp4"], 8, sizes)
    with pytest.raises(UserError, match="^cannot be read as a video"):
        captions.read_sample(samples["broken.mp4"], 8, sizes)


