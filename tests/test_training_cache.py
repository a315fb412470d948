"""Clips with captions, and their latents made once: every form they come in is read alike, a batch is what its numbers say, and bad input is named,
not fatal. On tiny autoencoders of the real kinds (Wan: 1 + 4k frames, 8x8 pixels to a cell; DC-AE-V: 4k frames, 32x32)."""
import copy
import csv
import dataclasses
import errno
import json
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import ae
import dit
import toy
from files import checkpoint, video
from files.checkpoint import UserError
from training import cache, captions, entries, loop
from wan import memory, models, released, vae
from wan.text import WanText

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
    (path / "a.txt").write_text(f"{RED}\n\n  {BLUE} \n")
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


@pytest.fixture(scope="module")
def tiny():
    """tiny(picture) -> (teacher, student), Models without transformers; with `picture` they are image-to-video and have an image encoder."""
    torch.manual_seed(0)
    wan = vae.PRESETS["wan2.1"]
    shallow = vae.WanVAE(vae.Config(4, 4, 16, 1, False, wan.mean, wan.std)).eval()
    deep = ae.DCAEV(ae.Config((0, 8, 8, 8, 8, 8, 8), (0, 1, 1, 1, 1, 1, 1), 32, chunk=8, scale=0.7)).eval()

    def make(picture=False):
        net = lambda z, patch: models.Deferred(None, config=dit.Config(24, 32, 2, 2, in_channels=z + (4 + z) * picture, out_channels=z, patch=patch,
                                                                       text_dim=32, image_dim=5 if picture else None))
        clip = (lambda images: images.mean((2, 3))[:, None].expand(-1, 4, -1)) if picture else None
        teacher = models.Model("base", net(16, (1, 2, 2)), shallow, toy.ToyText(), clip=clip)
        return teacher, models.Model("deep", net(32, (1, 1, 1)), deep, toy.ToyText(), clip=clip, ae_dtype=torch.float32)

    return make


@pytest.fixture(scope="module")
def filled(folder, tiny, tmp_path_factory):
    """A cache of `folder` in both spaces; tests that damage it take a copy."""
    where = tmp_path_factory.mktemp("latents")
    teacher, student = tiny()
    cache.Source(folder, student, teacher, where, FAMILY, frames=8, split="all")
    return where


@pytest.fixture
def source(folder, tiny, filled, tmp_path):
    """source(more arguments) -> Source on a copy of the filled cache; its folder is source.folder."""
    where = tmp_path / "latents"
    shutil.copytree(filled, where)
    teacher, student = tiny()
    make = lambda clips=folder, **more: cache.Source(clips, student, **dict(teacher=teacher, folder=where, buckets=FAMILY, frames=8, split="all") | more)
    make.folder = where
    return make


@pytest.fixture
def encoded(monkeypatch):
    """The clips that are encoded from now on, one [frames, h, w] for each run of an autoencoder."""
    runs, encode = [], models.Model.encode
    monkeypatch.setattr(models.Model, "encode", lambda self, x: runs.append(list(x.shape[2:])) or encode(self, x))
    return runs


def same(a, b):
    return all(x is None and y is None or torch.equal(x, y) for x, y in zip(a, b))


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
        for name in ("a.mp4", "a.txt", "orphan.txt", "b.mp4"):
            tar.add(folder / name, name)
    whole = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"b.mp4") + 1000])
    samples, skipped = captions.find_samples(tmp_path)
    assert [s.captions for s in samples] == [{RED: 1, BLUE: 1}]
    why = {name.removeprefix(f"{tmp_path}/"): reason for name, reason in skipped.items()}
    assert why["rows.csv, row 2 (gone.mp4)"] == why["rows.csv, row 3"] == why["cut.tar/orphan"] == captions.NO_CLIP
    assert why[f"{folder}/b.mp4"] == captions.NO_CAPTION and why["cut.tar/b.mp4"].startswith("cut off")
    assert why["other.csv"].startswith("table without") and why["bad.jsonl"].startswith("unreadable table") and why["bytes.csv"].startswith("unreadable")
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


def test_a_fingerprint_is_that_of_the_bytes(folder, tmp_path):
    """Not of name, place or time; a large file is sampled at its ends and in between."""
    moved = shutil.copy(folder / "a.mp4", tmp_path / "x.mp4")
    assert entries.hash_file(moved) == entries.hash_file(folder / "a.mp4") != entries.hash_file(folder / "b.mp4")
    large = bytearray(10 * entries.BLOCK)
    (tmp_path / "l").write_bytes(large)
    for place in (0, len(large) // 3, len(large) - 1):
        changed = bytearray(large)
        changed[place] = 1
        (tmp_path / "m").write_bytes(changed)
        assert entries.hash_file(tmp_path / "m") != entries.hash_file(tmp_path / "l")


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


def test_80_frames_of_the_student_are_77_of_the_teacher():
    """Then both have 20 latent frames, and in every bucket grids of the same aspect (spec 2.2, 3.1)."""
    teacher, student = released.outline("wan2.1-t2v-1.3b"), released.outline("dc-wan2.1-t2v-1.3b")
    assert cache.frames_alike(student, teacher, 80) == 77
    for size in captions.bucket_sizes("480F32MS").values():
        base, deep = teacher.latent_shape(77, size), student.latent_shape(80, size)
        assert base[0] == deep[0] == 20
        cache.check_grids(base, deep, size)
    assert deep == (20, 28, 14)
    with pytest.raises(UserError, match="in the bucket 544x704 .* do not divide: use a family"):
        cache.check_grids((20, 68, 88), (20, 9, 11), (544, 704))


# ---------------------------------------------------------------------------------------------------- what a batch holds


@torch.no_grad()  # as entries are made: with gradients, convolutions may round otherwise
def test_latents_are_those_of_the_models(source, folder, tiny):
    """A pair is the same clip in both spaces: 5 and 8 frames here, two latent frames each."""
    teacher, student = tiny()
    pairs = source()
    assert len(pairs) == 3
    for i, sample in enumerate(pairs.clips):
        x, _ = captions.read_sample(sample, 8, captions.bucket_sizes(FAMILY))
        base, deep = pairs.pair(i)
        assert torch.equal(base, teacher.encode(x[None, :, :5])[0]) and torch.equal(deep, student.encode(x[None])[0])
        assert base.shape[1] == deep.shape[1] == 2 and base.shape[2] * deep.shape[3] == deep.shape[2] * base.shape[3]
    with pytest.raises(UserError, match="give the source a teacher"):
        source(teacher=None).pair(0)


def test_cached_in_memory_and_from_a_tar_are_the_same_batches(source, folder, tmp_path):
    cached, memory = source(), source(folder=None)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(folder, "somewhere")
    packed = source(tmp_path / "all.tar")
    for step in range(4):
        batch = cached.batch(step, range(3))
        assert same(batch, memory.batch(step, range(3))) and same(batch, packed.batch(step, range(3)))
    assert cached.fingerprint == memory.fingerprint == packed.fingerprint


def test_a_sample_is_a_function_of_seed_step_and_position(source):
    """So two processes with a batch of 2 see what one with a batch of 4 sees, in whatever order steps are asked for."""
    whole, parts = source(), source()
    for step in (3, 0, 1):
        a, b, c = whole.batch(step, range(4)), parts.batch(step, range(2)), parts.batch(step, range(2, 4))
        assert torch.equal(a.z, torch.cat([b.z, c.z]))
        rows = [row for part in (b, c) for row in part.context]
        assert all(torch.equal(x[: len(y)], y) and not x[len(y) :].any() for x, y in zip(a.context, rows))
    drawn = lambda s: [s.draw(step, p)[0].key for step in range(8) for p in range(4)]
    assert drawn(source()) == drawn(whole) != drawn(source(seed=1))


def test_one_bucket_per_step_as_often_as_it_has_clips(source):
    some = source()
    assert {size: len(clips) for size, clips in some.by_bucket.items()} == {(32, 64): 2, (64, 32): 1}
    assert {tuple(some.batch(step, range(2)).z.shape) for step in range(8)} == {(2, 32, 2, 1, 2), (2, 32, 2, 2, 1)}
    wide = [len({some.bucket[some.draw(step, p)[0].key] for p in range(3)}) == 1 and some.bucket[some.draw(step, 0)[0].key] == (32, 64)
            for step in range(600)]
    assert np.mean(wide) == pytest.approx(2 / 3, abs=0.06)


def test_prompts_are_drawn_by_score_and_dropped_for_the_null_context(source, tiny):
    some = source()
    drawn = [some.draw(step, p) for step in range(600) for p in range(2)]
    assert np.mean([caption is None for _, caption in drawn]) == pytest.approx(0.1, abs=0.03)
    said = [caption for sample, caption in drawn if sample.name.endswith("b.mp4") and caption]
    assert np.mean([caption == RED for caption in said]) == pytest.approx(0.9**10 / (0.9**10 + 0.8**10), abs=0.06)
    text, kept, dropped = toy.ToyText(), source(drop=0.0), source(drop=1.0).batch(0, range(2)).context
    assert dropped.shape == (2, 1, 32) and not dropped.any()  # the toy's null context: zeros, of which any number of rows is the same
    assert all(kept.draw(step, 0)[1] for step in range(50))
    context, expected = kept.batch(0, range(2)).context, text([kept.draw(0, p)[1] for p in range(2)]).to(torch.bfloat16).float()
    assert torch.equal(context, expected[:, : context.shape[1]]) and not expected[:, context.shape[1] :].any()


def test_the_null_context_is_the_negative_prompt_or_the_empty_one(folder, tiny, tmp_path):
    _, student = tiny()
    student = dataclasses.replace(student, negative=BLUE)
    make = lambda null: cache.Source(folder, student, None, tmp_path, FAMILY, 8, drop=1.0, null=null, split="all").batch(0, range(1)).context
    assert torch.equal(make("negative")[0], cache.encode_prompts(student.text, [BLUE])[BLUE].float()) and not make("empty").any()
    with pytest.raises(UserError, match='null is "negative" or "empty"'):
        make("zero")


def test_states_of_a_text_encoder_are_kept_without_padding():
    """WanText is asked for all new prompts at once, and keeps none of them in memory."""
    text = WanText(None, None, text_dim=6)
    text.known = {"a cat": torch.randn(3, 6)}
    asked = []
    text.encode = lambda prompts: asked.append(prompts) or {p: torch.randn(len(p) + 1, 6) for p in prompts}
    states = cache.encode_prompts(text, ["a  cat", "dog", "", "dog"])
    assert {p: len(s) for p, s in states.items()} == {"a  cat": 3, "dog": 4, "": 1}
    assert list(text.known) == ["a cat"] and asked == [["dog", ""]] and states["dog"].dtype == torch.bfloat16


@torch.no_grad()  # as entries are made: with gradients, convolutions may round otherwise
def test_image_to_video_has_conditions(folder, tiny, tmp_path):
    """Mask and latent of "first frame, then grey" behind the latent; the image encoder sees the whole first frame, before the crop."""
    teacher, student = tiny(picture=True)
    some = cache.Source([folder / "a.mp4", folder / "b.mp4"], student, teacher, tmp_path, FAMILY, frames=8, split="all", drop=1.0)
    batch = some.batch(0, range(2))
    assert batch.condition.shape == (2, 36, *batch.z.shape[2:]) and batch.clip_fea.shape == (2, 4, 3)
    assert batch.condition[:, :4].sum((1, 2, 3, 4)).tolist() == [4 * batch.z.shape[3] * batch.z.shape[4]] * 2  # latent frame 0 is given (spec 11.7)
    for i, sample in enumerate(some.clips):
        base, deep = some.pair(i)
        x, first = captions.read_sample(sample, 8, captions.bucket_sizes(FAMILY))
        assert len(base) == 36 and len(deep) == 68 and base.shape[1] == deep.shape[1]
        assert torch.equal(deep[32:], student.condition(1, deep.shape[1:], x[None, :, 0])[0])
        assert torch.equal(some.read(sample, None)["clip_fea"], student.clip(first[None])[0])


def test_what_is_held_out_depends_on_the_files_alone(source, folder, tmp_path):
    """A tenth, at least one of two, never trained on; not even the buckets or the number of frames change it."""
    everything = tmp_path / "many"
    everything.mkdir()
    for i in range(4):
        shutil.copy(folder / "short.mp4", everything / f"{i}.mp4")
        with open(everything / f"{i}.mp4", "ab") as f:
            f.write(b"\0\0\0\x08free" * (i + 1))
        (everything / f"{i}.txt").write_text(RED)
    training = source(everything, split="train", teacher=None, frames=4)
    held_out = training.held_out()
    assert len(training) == 3 and len(held_out) == 1 and not {s.key for s in training.clips} & {s.key for s in held_out.clips}
    assert held_out.drop == 0 and held_out.fingerprint != training.fingerprint
    with pytest.raises(UserError, match=r"none of the 1 held-out clips can be used \(4 x shorter than 8 frames: "):
        source(everything, split="val", teacher=None, frames=8, buckets="32x32F32MS")
    assert source(everything, split="val", teacher=None, frames=4, buckets="32x32F32MS").clips[0].key == held_out.clips[0].key
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(everything / "0.mp4", one)
    shutil.copy(everything / "0.txt", one)
    with pytest.raises(UserError, match="none of the 0 held-out clips can be used"):
        source(one, split="train", teacher=None, frames=4).held_out()


# ---------------------------------------------------------------------------------------------------- filling


def test_bad_clips_are_named_and_not_decoded_again(source, encoded, monkeypatch):
    monkeypatch.setattr(captions, "read_sample", None)  # would fail if it were called
    some = source()
    why = {Path(name).name: reason for name, reason in some.skipped.items()}
    assert why.pop("broken.mp4").startswith("cannot be read as a video")
    assert why == {"short.mp4": "shorter than 8 frames", "lonely.mp4": captions.NO_CAPTION, "orphan.txt": captions.NO_CLIP}
    assert not encoded and "| 64x32 | 1 | 32x2x2x1 | 16x2x8x4 |" in some.table() and "1 x clip without caption: " in some.table()


def test_only_bad_clips_are_one_sentence(folder, source, tmp_path):
    for name in ("short.mp4", "short.txt"):
        (tmp_path / "bad").mkdir(exist_ok=True)
        shutil.copy(folder / name, tmp_path / "bad")
    with pytest.raises(UserError, match=r"none of the 1 clips can be used \(1 x shorter than 8 frames: .*short.mp4\): add clips"):
        source(tmp_path / "bad")


def test_another_caption_or_place_needs_no_new_latents(source, folder, encoded, tmp_path):
    before = source().fingerprint
    shutil.copytree(folder, tmp_path / "moved")
    assert source(tmp_path / "moved").fingerprint == before
    (tmp_path / "moved" / "a.txt").write_text("a yellow triangle")
    assert source(tmp_path / "moved").fingerprint != before and not encoded


def test_another_autoencoder_scale_or_type_has_a_cache_of_its_own(source, tiny, encoded):
    """And an entry that was copied over from there is refused by its hash."""
    teacher, student = tiny()
    some, before = source(), set(source.folder.iterdir())
    hash_with = lambda frames=8, **more: cache.Space(dataclasses.replace(copy.deepcopy(student), **more), frames, FAMILY, source.folder, True).entries.hash
    scaled, retouched = (ae.DCAEV(dataclasses.replace(student.ae.config, scale=scale)) for scale in (0.6, 0.7))
    for net in (scaled, retouched):
        net.load_state_dict(student.ae.state_dict())
    with torch.no_grad():
        next(retouched.decoder.parameters()).add_(1)
    assert hash_with() == hash_with(ae=retouched) == some.student.entries.hash  # latents owe nothing to the decoder
    assert len({hash_with(), hash_with(ae=scaled), hash_with(ae_dtype=torch.bfloat16), hash_with(frames=4)}) == 4
    other = source(teacher=None, frames=4)
    assert len(set(source.folder.iterdir()) - before) == 1 and sorted(encoded) == [*[[4, 32, 64]] * 3, [4, 64, 32]]  # short.mp4 too
    key = some.clips[0].key
    shutil.copy(other.student.entries.file(key), some.student.entries.file(key))
    with pytest.raises(UserError, match="was made by another encoder, scale or setting .*: delete it, or use another folder"):
        some.pair(0)
    with pytest.raises(UserError, match="was made by another encoder"):
        source()


def test_a_damaged_entry_is_made_again(source, encoded):
    """One that is cut short is seen from its header at the start; flipped bits when it is read, or at the start with `verify`."""
    some = source()
    entries, key = some.student.entries, some.clips[0].key
    whole = entries.file(key).read_bytes()
    entries.file(key).write_bytes(whole[:-100])
    assert same(source().pair(0), some.pair(0)) and len(encoded) == 1 and entries.file(key).read_bytes() == whole
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    entries.file(key).write_bytes(flipped)
    source()
    assert len(encoded) == 1
    with pytest.raises(UserError, match="is damaged .*its content is not what was written.* was removed: start again"):
        some.pair(0)
    source()
    assert len(encoded) == 2 and entries.file(key).read_bytes() == whole
    entries.file(key).write_bytes(flipped)
    source(verify=True)
    shutil.copy(entries.file(some.clips[1].key), entries.file(key))  # a whole entry under a wrong name
    source()
    assert len(encoded) == 4 and entries.file(key).read_bytes() == whole


def test_filling_goes_on_where_it_was_killed(source, folder, tiny, encoded, monkeypatch, tmp_path):
    teacher, student = tiny()
    save, written = checkpoint.save_tensors, []

    def killed(path, *more):
        if len(written) == 6:
            Path(path).with_name(f".{Path(path).stem}-half.safetensors").write_bytes(b"half")  # what kill -9 leaves
            raise KeyboardInterrupt
        written.append(path)
        save(path, *more)

    monkeypatch.setattr(checkpoint, "save_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.Source(folder, student, teacher, tmp_path / "new", FAMILY, frames=8, split="all")
    monkeypatch.setattr(checkpoint, "save_tensors", save)
    times = {f: f.stat().st_mtime_ns for f in written}
    resumed = cache.Source(folder, student, teacher, tmp_path / "new", FAMILY, frames=8, split="all")
    assert all(f.stat().st_mtime_ns == t for f, t in times.items()) and len(encoded) <= 7  # six, and one that was lost
    assert same(resumed.batch(0, range(2)), source().batch(0, range(2)))


def test_a_full_disk_is_one_sentence_and_loses_nothing(folder, tiny, monkeypatch, tmp_path, capsys):
    _, student = tiny()
    save, written = checkpoint.save_tensors, []

    def full(path, *more):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save(path, *more)

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    make = lambda: cache.Source(folder, student, None, tmp_path, FAMILY, frames=8, split="all")
    with pytest.raises(SystemExit), checkpoint.user_errors():
        make()
    assert f"error: the disk is full while writing {tmp_path}" in capsys.readouterr().err
    assert all(f.exists() for f in written) and not list(tmp_path.rglob(".*"))
    monkeypatch.setattr(checkpoint, "save_tensors", save)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(UserError, match=r"the latents of \d clips need .* GB and .* has 0.0: free some space"):
            make()
    assert len(make()) == 3


def test_processes_share_the_work(source, folder, tiny, monkeypatch, tmp_path):
    """Two, as torchrun starts them: each encodes its half, the entries are those of one process, and both see the same source. Threads here,
    with a rank each."""
    me, made, encode = threading.local(), {0: 0, 1: 0}, models.Model.encode
    monkeypatch.setattr(loop, "rank", lambda: getattr(me, "rank", 0))
    monkeypatch.setattr(loop, "processes", lambda: 2)
    meet = threading.Barrier(2, timeout=60)

    def counted(self, x):
        if not made[me.rank]:
            meet.wait()  # neither has done the work before the other has begun
        made[me.rank] += 1
        return encode(self, x)

    monkeypatch.setattr(models.Model, "encode", counted)
    sources = {}

    def run(rank):
        me.rank = rank
        sources[rank] = cache.Source(folder, *tiny()[::-1], tmp_path / "two", FAMILY, frames=8, split="all")

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    monkeypatch.undo()
    alone = source()
    assert min(made.values()) >= 2 and sum(made.values()) <= 2 * 6
    assert sources[0].fingerprint == sources[1].fingerprint == alone.fingerprint
    content = lambda where: {f.relative_to(where): checkpoint.load_tensors(f)[0] for f in Path(where).rglob("*.safetensors")}
    two, one = content(tmp_path / "two"), content(source.folder)
    assert two.keys() == one.keys() and all(torch.equal(two[f][n], one[f][n]) for f in one for n in one[f])


def test_frames_and_buckets_that_do_not_fit_are_refused_before_anything_is_encoded(source, encoded):
    with pytest.raises(UserError, match="9 frames are no whole number of latent frames of deep: use --frames 8"):
        source(frames=9)
    with pytest.raises(UserError, match="the bucket .* is no multiple of the 32x32 pixels of a token of deep: use the family 32X48F32MS"):
        source(buckets="32x48F16MS")
    with pytest.raises(UserError, match='split is "train", "val" or "all"'):
        source(split="test")
    assert not encoded


def test_the_script_fills_and_checks_a_cache(folder, tiny_folders, tmp_path, capsys, monkeypatch):
    """From checkpoints in the official layouts; prompts from a text cache, in place of an encoder of 11 GB."""
    name = "wan2.1-t2v-1.3b"
    monkeypatch.setitem(released.RELEASED, name, dataclasses.replace(released.RELEASED[name], negative="blurred"))  # the real one needs ftfy
    text = WanText(None, None, cache=tmp_path / "text.safetensors", text_dim=40)
    text.known = {p: torch.randn(3, 40) for p in (RED, BLUE, "a large green ring", "blurred")}
    text.write_cache(list(text.known))
    folders = [str(tiny_folders / f) for f in ("Wan2.1-T2V-1.3B", "dc_videogen")]
    arguments = [str(folder / "a.mp4"), str(folder / "short.mp4"), "--base", name, "--weights", *folders, "--text-cache", str(text.cache),
                 "--out", str(tmp_path / "out"), "--buckets", FAMILY, "--frames", "8"]
    cache.main(arguments)
    said = capsys.readouterr().out
    assert "| 32x64 | 1 | 32x2x1x2 | 16x2x4x8 |" in said and "skipped: 1 (1 x shorter than 8 frames: " in said
    cache.main(arguments + ["--quick"])
    assert capsys.readouterr().out == said
