"""Clips with captions, and their latents made once: every form they come in is read alike, a batch is what its numbers say, and bad input is named,
not fatal. On tiny autoencoders of the real kinds (Wan: 1 + 4k frames, 8x8 pixels to a cell; DC-AE-V: 4k frames, 32x32)."""
import copy
import dataclasses
import errno
import re
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import ae
import dit
import toy
from files import checkpoint, errors
from files.checkpoint import UserError
from training import cache, captions, entries, latents, loop
from wan import models, released, vae
from wan.text import WanText
from test_training_captions import BLUE, FAMILY, RED, folder  # noqa: F401 (a fixture)

HOW = dict(buckets=FAMILY, frames=8, split="all")


class Text(toy.ToyText):
    """A text encoder without a network, of captions of the toy: what a cache asks of one."""

    def states(self, prompts):
        return {p: {"states": (self([p]) if p else self.null(1))[0]} for p in prompts}

    @staticmethod
    def collate(rows):
        return pad_sequence([row["states"] for row in rows], batch_first=True)


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
        teacher = models.Model("base", net(16, (1, 2, 2)), shallow, Text(), clip=clip)
        return teacher, models.Model("deep", net(32, (1, 1, 1)), deep, Text(), clip=clip, ae_dtype=torch.float32)

    return make


@pytest.fixture(scope="module")
def filled(folder, tiny, tmp_path_factory):
    """A cache of `folder` in both spaces; tests that damage it take a copy."""
    where = tmp_path_factory.mktemp("latents")
    teacher, student = tiny()
    cache.Source(folder, student, teacher, folder=where, **HOW)
    return where


@pytest.fixture
def source(folder, tiny, filled, tmp_path):
    """source(more arguments) -> Source on a copy of the filled cache; its folder is source.folder."""
    where = tmp_path / "latents"
    shutil.copytree(filled, where)
    teacher, student = tiny()

    def make(data=folder, **more):
        return cache.Source(data, student, **dict(HOW, teacher=teacher, folder=where) | more)

    make.folder = where
    return make


@pytest.fixture
def encoded(monkeypatch):
    """The clips that are encoded from now on, one [frames, h, w] for each run of an autoencoder."""
    runs, encode = [], models.Model.encode
    monkeypatch.setattr(models.Model, "encode", lambda self, x: runs.append(list(x.shape[2:])) or encode(self, x))
    return runs


def same(a, b):
    a, b = (([*x[:2], *x.prompt] if isinstance(x, cache.Batch) else x) for x in (a, b))
    return all(x is None and y is None or torch.equal(x, y) for x, y in zip(a, b))


# ---------------------------------------------------------------------------------------------------- grids


def test_80_frames_of_the_student_are_77_of_the_teacher():
    """Then both have 20 latent frames, and in every bucket grids of the same aspect (spec 2.2, 3.1)."""
    teacher, student = released.outline("wan2.1-t2v-1.3b"), released.outline("dc-wan2.1-t2v-1.3b")
    assert cache.latent_frames(student, 80) == 20
    assert latents.frames_alike(teacher.ae.config, student.ae.config, 20) == 77
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
        rows = [row for part in (b, c) for row in part.prompt[0]]
        assert all(torch.equal(x[: len(y)], y) and not x[len(y) :].any() for x, y in zip(a.prompt[0], rows))
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
    text, kept, dropped = Text(), source(drop=0.0), source(drop=1.0).batch(0, range(2)).prompt[0]
    assert dropped.shape == (2, 1, 32) and not dropped.any()  # the toy's null context: zeros, of which any number of rows is the same
    assert all(kept.draw(step, 0)[1] for step in range(50))
    context, expected = kept.batch(0, range(2)).prompt[0], text([kept.draw(0, p)[1] for p in range(2)]).to(torch.bfloat16).float()
    assert torch.equal(context, expected[:, : context.shape[1]]) and not expected[:, context.shape[1] :].any()


def test_the_null_context_is_the_negative_prompt_or_the_empty_one(folder, tiny, tmp_path):
    _, student = tiny()
    student = dataclasses.replace(student, negative=BLUE)

    def make(null):
        source = cache.Source(folder, student, folder=tmp_path, drop=1.0, null=null, **HOW)
        return source.batch(0, range(1)).prompt[0]

    assert torch.equal(make("negative")[0], cache.encode_prompts(student.text, [BLUE])[BLUE]["states"].float()) and not make("empty").any()


def test_states_of_a_text_encoder_are_kept_without_padding():
    """WanText is asked for all new prompts at once, and keeps none of them in memory."""
    text = WanText(None, None, text_dim=6)
    text.known = {"a cat": torch.randn(3, 6)}
    asked = []
    text.encode = lambda prompts: asked.append(prompts) or {p: torch.randn(len(p) + 1, 6) for p in prompts}
    states = {p: row["states"] for p, row in cache.encode_prompts(text, ["a  cat", "dog", "", "dog"]).items()}
    assert {p: len(s) for p, s in states.items()} == {"a  cat": 3, "dog": 4, "": 1}
    assert list(text.known) == ["a cat"] and asked == [["dog", ""]] and states["dog"].dtype == torch.bfloat16


@torch.no_grad()  # as entries are made: with gradients, convolutions may round otherwise
def test_image_to_video_has_conditions(folder, tiny, tmp_path):
    """Mask and latent of "first frame, then grey" behind the latent; the image encoder sees the whole first frame, before the crop."""
    teacher, student = tiny(picture=True)
    some = cache.Source([folder / "a.mp4", folder / "b.mp4"], student, teacher, folder=tmp_path,
                        drop=1.0, **HOW)
    batch = some.batch(0, range(2))
    assert batch.condition.shape == (2, 36, *batch.z.shape[2:]) and batch.prompt[1].shape == (2, 4, 3)
    assert batch.condition[:, :4].sum((1, 2, 3, 4)).tolist() == [4 * batch.z.shape[3] * batch.z.shape[4]] * 2  # latent frame 0 is given (spec 11.7)
    for i, sample in enumerate(some.clips):
        base, deep = some.pair(i)
        x, first = captions.read_sample(sample, 8, captions.bucket_sizes(FAMILY))
        assert len(base) == 36 and len(deep) == 68 and base.shape[1] == deep.shape[1]
        assert torch.equal(deep[32:], student.condition(1, deep.shape[1:], x[None, :, 0])[0])
        assert torch.equal(some.read(sample, None)[0]["clip_fea"], student.clip(first[None])[0])


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
    with pytest.raises(UserError, match=r"none of the 1 held-out clips can be used \(4 x shorter than 8 frames at 16 per second: "):
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
    assert why == {"short.mp4": "shorter than 8 frames at 16 per second", "lonely.mp4": captions.NO_CAPTION, "orphan.txt": captions.NO_CLIP}
    assert not encoded and re.search(r"^\| 64x32  \| +1 \| +32x2x2x1 \| +16x2x8x4 \|$", some.table(), re.M) and "1 x clip without caption: " in some.table()


def test_only_bad_clips_are_one_sentence(folder, source, tmp_path):
    for name in ("short.mp4", "short.txt"):
        (tmp_path / "bad").mkdir(exist_ok=True)
        shutil.copy(folder / name, tmp_path / "bad")
    with pytest.raises(UserError, match=r"none of the 1 clips can be used \(1 x shorter than 8 frames at 16 per second: .*short.mp4\): add clips"):
        source(tmp_path / "bad")


def test_another_caption_or_place_needs_no_new_latents(source, folder, encoded, tmp_path):
    before = source().fingerprint
    shutil.copytree(folder, tmp_path / "moved")
    assert source(tmp_path / "moved").fingerprint == before
    (tmp_path / "moved" / "a.json").write_text('["a yellow triangle"]')
    assert source(tmp_path / "moved").fingerprint != before and not encoded


def test_another_autoencoder_scale_or_type_has_a_cache_of_its_own(source, tiny, encoded):
    """And an entry that was copied over from there is refused by its hash."""
    teacher, student = tiny()
    some, before = source(), set(source.folder.iterdir())

    def hash_with(frames=8, fps=None, **more):
        options = cache.Options(**dict(HOW, folder=source.folder, fps=fps))
        model = dataclasses.replace(copy.deepcopy(student), **more)
        return cache.Space(model, frames, options, True).entries.hash

    scaled, retouched = (ae.DCAEV(dataclasses.replace(student.ae.config, scale=scale)) for scale in (0.6, 0.7))
    for net in (scaled, retouched):
        net.load_state_dict(student.ae.state_dict())
    with torch.no_grad():
        next(retouched.decoder.parameters()).add_(1)
    assert hash_with() == hash_with(ae=retouched) == some.student.entries.hash  # latents owe nothing to the decoder
    assert len({hash_with(), hash_with(ae=scaled), hash_with(ae_dtype=torch.bfloat16), hash_with(frames=4),
                hash_with(fps="native")}) == 5
    assert hash_with(fps=16) == hash_with()
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
        cache.Source(folder, student, teacher, folder=tmp_path / "new", **HOW)
    monkeypatch.setattr(checkpoint, "save_tensors", save)
    times = {f: f.stat().st_mtime_ns for f in written}
    resumed = cache.Source(folder, student, teacher, folder=tmp_path / "new", **HOW)
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
    make = lambda: cache.Source(folder, student, folder=tmp_path, **HOW)
    with pytest.raises(SystemExit), errors.user_errors():
        make()
    assert f"error: the disk is full while writing {tmp_path}" in capsys.readouterr().err
    assert all(f.exists() for f in written) and not list(tmp_path.rglob(".*"))
    monkeypatch.setattr(checkpoint, "save_tensors", save)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(UserError, match=r"the latents of \d clips need .* MB and .* has 0.0: free some space"):
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
        sources[rank] = cache.Source(folder, *tiny()[::-1], folder=tmp_path / "two", **HOW)

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
    assert not encoded
