"""The toy as a base: caches in both spaces, batches that depend on their place only,
exact resuming, pre-training and score."""
import json
import os

import numpy as np
import pytest
import torch

import adapt
import dit
import flow
import sample
import toy
from files.checkpoint import UserError
from training import loop, toy_base, toy_score
from training.entries import Entries
from wan import models, released

TEXT = toy.ToyText()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(toy_base, "SHARD", 8)
    monkeypatch.setattr(toy_base, "WITH_IMAGE", 4)


def latents_of(z, with_image=0):
    """Latents around given z; the first `with_image` clips have the image condition:
    mask on the first latent frame, and a latent."""
    n, c, *grid = z.shape
    condition = torch.zeros(n, 4 + c, *grid)
    condition[:with_image, :4, 0] = 1
    condition[:with_image, 4:] = torch.randn(with_image, c, *grid)
    attributes = [s.attributes() for s in toy.toy_batch(0, n, 1, 8)[1]]
    return toy_base.Latents(z, condition, torch.arange(with_image), attributes)


def test_the_transformer_takes_latent_mask_and_condition_in_this_order():
    latents = latents_of(torch.randn(3, 5, 2, 2, 2), with_image=1)
    x = latents.inputs(torch.tensor([0, 2]))
    assert x.shape == (2, 5 + 4 + 5, 2, 2, 2) and x.dtype == torch.float32
    assert torch.equal(x[:, :5], latents.z[[0, 2]])
    assert (x[0, 5:9, 0] == 1).all() and not x[0, 5:9, 1].any() and not x[1, 5:].any()
    assert torch.equal(x[0, 9:], latents.condition[0, 4:])


# ------------------------------------------------ cache


def count_encodes(monkeypatch):
    """A list that grows by the number of clips of every call of a model's
    autoencoder."""
    encoded, encode = [], models.Model.encode

    def counted(self, x):
        encoded.append(len(x))
        return encode(self, x)

    monkeypatch.setattr(models.Model, "encode", counted)
    return encoded


def test_both_spaces_hold_the_same_clips_with_the_same_captions(tiny_toy, tmp_path):
    both = [released.load_model(name) for name in ("base", "dc")]
    teacher, student = (toy_base.cache_latents(m, 2, tmp_path) for m in both)
    assert teacher.attributes == student.attributes and len(teacher.attributes) == len(teacher.z) == len(student.z) == 16
    assert teacher.z.shape[2] == student.z.shape[2] == toy.FRAMES // 4  # latent frames pair up one to one
    assert teacher.with_image.tolist() == student.with_image.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    clips, scenes = toy.toy_batch((1, 1), 8)  # the second shard
    assert [s.attributes() for s in scenes] == teacher.attributes[8:]
    for model, latents in zip(both, (teacher, student)):
        with torch.no_grad():
            z, condition = model.encode(clips[:4]), model.condition(4, model.latent_shape(clips.shape[2], clips.shape[3:]), clips[:4, :, 0])
        for cached, exact in ((latents.z[8:12], z), (latents.condition[8:12], condition)):  # cached in bf16 and stored in fp16
            assert (cached - exact).square().mean() < 1e-3 * exact.square().mean()
        assert not latents.condition[12:].any()
    assert len(os.listdir(tmp_path)) == 2 + 1  # a folder for each autoencoder, and the weights


def test_given_scenes_are_encoded_once(tiny_toy, tmp_path, monkeypatch):
    model, encoded = released.load_model("dc"), count_encodes(monkeypatch)
    _, scenes = toy.toy_batch(5, 3)
    first, again = (toy_base.encode_scenes(model, scenes, tmp_path) for _ in range(2))
    assert encoded == [3] and torch.equal(first.z, again.z)
    assert first.attributes == [s.attributes() for s in scenes]
    assert not first.condition.any() and not len(first.with_image)
    toy_base.encode_scenes(model, scenes[:2], tmp_path)
    assert encoded == [3, 2]


def test_a_cache_goes_on_where_it_stopped(tiny_toy, tmp_path, monkeypatch):
    model, encoded, put = released.load_model("dc"), count_encodes(monkeypatch), Entries.put

    def stop_at_the_second(self, key, tensors):
        if key == "1-0001":
            raise KeyboardInterrupt
        put(self, key, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Entries, "put", stop_at_the_second)
        toy_base.cache_latents(model, 3, tmp_path)
    encoded.clear()
    first = toy_base.cache_latents(model, 3, tmp_path)
    assert sum(encoded) == 2 * (8 + 4)  # shards 1 and 2, clips and images
    encoded.clear()
    again = toy_base.cache_latents(model, 3, tmp_path)
    assert not encoded
    assert torch.equal(first.z, again.z) and torch.equal(first.condition, again.condition)


def test_a_damaged_shard_is_made_again(tiny_toy, tmp_path, monkeypatch):
    model, encoded = released.load_model("dc"), count_encodes(monkeypatch)
    first = toy_base.cache_latents(model, 3, tmp_path)
    file = next(tmp_path.rglob("1-0001.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    encoded.clear()
    again = toy_base.cache_latents(model, 3, tmp_path)
    assert sum(encoded) == 8 + 4 and torch.equal(first.z, again.z)


def test_another_autoencoder_never_reads_these_latents(tiny_toy, tmp_path, monkeypatch):
    model, encoded = released.load_model("dc"), count_encodes(monkeypatch)
    first = toy_base.cache_latents(model, 1, tmp_path / "cache")
    with torch.no_grad():
        next(model.ae.parameters()).add_(0.1)
    encoded.clear()
    other = toy_base.cache_latents(model, 1, tmp_path / "cache")
    assert sum(encoded) == 8 + 4 and not torch.equal(first.z, other.z)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_part_has_its_own_clips_captions_and_images():
    z = torch.arange(24.0).view(24, 1, 1, 1, 1).expand(-1, 2, 2, 2, 2)
    latents = latents_of(z, with_image=24)
    latents.with_image = torch.tensor([0, 1, 8, 16, 19])
    train, held = latents.part(0, 16), latents.part(16, 24)
    assert len(train.z) == 16 and train.with_image.tolist() == [0, 1, 8]
    assert len(held.z) == 8 and held.with_image.tolist() == [0, 3]
    assert torch.equal(held.inputs(held.with_image), latents.inputs(torch.tensor([16, 19])))
    assert train.attributes + held.attributes == latents.attributes


# ------------------------------------------------ batches


def test_prompts_and_attributes_are_dropped_and_images_shown_as_often_as_asked():
    latents = latents_of(torch.randn(40, 2, 1, 1, 1), with_image=10)
    z, condition, (context,) = toy_base.Source(latents, TEXT, null=0.1, drop=0.2, image=0.3).batch(0, range(4000))
    rows = (context != 0).any(dim=2)[:, : len(toy.WORLD)]  # which attributes are named
    said = rows.any(dim=1)
    assert 0.08 < 1 - said.float().mean() < 0.12
    assert 0.78 < rows[said].float().mean() < 0.82
    shown = condition.flatten(1).any(dim=1)
    assert 0.27 < shown.float().mean() < 0.33
    clip = (z[:, None] == latents.z[None]).flatten(2).all(dim=2).int().argmax(dim=1)  # which clip each sample is
    assert clip[shown].max() < 10 and set(clip[~shown].tolist()) == set(range(40))
    assert torch.equal(condition[shown], latents.condition[clip[shown]])
    everything = [TEXT.encode([latents.attributes[i]])[0] for i in clip]
    assert all(torch.equal(c[: len(r)][r], e[: len(r)][r]) for c, e, r in zip(context, everything, rows))  # its own caption


@pytest.mark.core
def test_a_sample_depends_on_seed_step_and_position_only():
    """So two processes with half a batch each see what one process sees, and a resumed
    run goes on with the same batches."""
    latents = latents_of(torch.randn(40, 2, 1, 1, 1), with_image=10)
    source = toy_base.Source(latents, TEXT, seed=3)
    whole, parts = source.batch(7, range(16)), [source.batch(7, part) for part in (range(8), range(8, 16))]
    whole_of = lambda batch: [*batch[:2], *batch.prompt]
    assert all(torch.equal(a, torch.cat(b)) for a, *b in zip(*map(whole_of, [whole, *parts])))
    assert not torch.equal(whole.z, source.batch(8, range(16)).z)
    other = toy_base.Source(latents, TEXT, seed=4)
    assert not torch.equal(whole.z, other.batch(7, range(16)).z) and other.fingerprint != source.fingerprint
    assert toy_base.Source(latents, TEXT, seed=3).fingerprint == source.fingerprint


def test_a_pair_is_the_same_clip_in_both_spaces_with_its_image_where_it_has_one():
    student, teacher = latents_of(torch.randn(8, 2, 1, 1, 1), with_image=1), latents_of(torch.randn(4, 3, 1, 2, 2), with_image=1)
    source = toy_base.Source(student, TEXT, teacher)
    assert len(source) == 4
    for i in range(4):
        x, u = source.pair(i)
        assert torch.equal(x[:3], teacher.z[i]) and torch.equal(u[:2], student.z[i])
        assert x[3:].any() == u[2:].any() == (i == 0)


# ------------------------------------------------ pre-training, score


def pretrain(out, *more):
    adapt.main(["--pretrain", "--out", str(out), "--shards", "1", "--steps", "4", "--batch", "4",
                "--save-every", "2", "--ema", "0.9", "--device", "cpu", *more])


def test_pretraining_makes_a_base_that_loads_and_can_be_killed(tiny_toy, tmp_path, monkeypatch):
    """Averaged weights; a report of validation loss and prompt fit at every checkpoint,
    on prompts that are not the scored ones; resumed, the run is the uninterrupted
    one."""
    asked, videos = [], sample.videos
    monkeypatch.setattr(sample, "videos", lambda model, prompts: asked.append(prompts) or videos(
        model, prompts[:2], steps=2))
    monkeypatch.setattr(toy_score, "prompt_fit", lambda videos, prompts: {"mean": 0.5})
    pretrain(tmp_path / "whole")
    assert len(asked[0]) == 32 and asked[0] != toy.held_out_prompts(32)
    log = [line for line in loop.read_log(tmp_path / "whole") if "validation" in line]
    assert [(line["step"], line["fit_mean"]) for line in log] == [(2, 0.5), (4, 0.5)]
    net = dit.load(tmp_path / "whole" / "toy-base-dit.safetensors")
    assert net.config == dit.PRESETS["toy-base"] and net.head.head.weight.any()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        calls, loss = [], flow.loss

        def dies(*args):
            calls.append(torch.is_grad_enabled())
            if sum(calls) == 4:
                raise KeyboardInterrupt
            return loss(*args)

        patch.setattr(flow, "loss", dies)
        pretrain(tmp_path / "broken")
    pretrain(tmp_path / "broken")
    again = dit.load(tmp_path / "broken" / "toy-base-dit.safetensors")
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="other settings .lr 0.002 -> 0.5.: use the same ones"):
        pretrain(tmp_path / "whole", "--lr", "0.5")


def test_pretraining_goes_on_from_weights(tiny_toy, tmp_path, monkeypatch):
    """At a learning rate of next to nothing what comes out is what went in; a transformer
    of another size is refused."""
    monkeypatch.setattr(toy_score, "prompt_fit", lambda videos, prompts: {"mean": 0.5})
    monkeypatch.setattr(sample, "videos", lambda model, prompts: [])
    begun = tiny_toy / "toy-base-dit.safetensors"
    pretrain(tmp_path / "on", "--continue-from", str(begun), "--lr", "1e-12")
    again = dit.load(tmp_path / "on" / "toy-base-dit.safetensors")
    for a, b in zip(dit.load(begun).parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)  # written in fp16
    deep = dit.WanDiT(dit.PRESETS["toy-dc"])
    dit.save(deep, tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match="is no base of this toy"):
        pretrain(tmp_path / "no", "--continue-from", str(tmp_path / "deep.safetensors"))


def test_scores_of_both_models_beside_chance_and_their_ceilings(tiny_toy, tmp_path):
    adapt.main(["--base", "toy", "--score", "--prompts", "3", "--results", str(tmp_path / "toy.json")])
    report = json.loads((tmp_path / "toy.json").read_text())
    assert report["prompts"] == 3 and {"date", "commit", "torch", "threads"} <= report.keys()
    kinds = ("reconstruction", "prompts", "image and prompt")
    assert list(report["rows"]) == ["chance", "clips", *(f"{m}: {k}" for m in ("base", "dc") for k in kinds)]
    assert report["rows"]["clips"]["mean"] == 1 and report["rows"]["chance"]["mean"] == pytest.approx(5 / 24)
    assert report["rows"]["clips"]["object"] == 1 and report["rows"]["clips"]["border"] == pytest.approx(1, abs=0.1)
    assert all("psnr" in report["rows"][f"dc: {k}"] for k in ("reconstruction", "image and prompt"))
