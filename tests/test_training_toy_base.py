"""The toy as a base: caches in both spaces, batches that depend on their place only, exact resuming, pre-training and score."""
import json
import os
import pickle

import numpy as np
import pytest
import torch

import adapt
import ae
import dit
import toy
from files import checkpoint
from files.checkpoint import UserError
from training import toy_base
from wan import released

TEXT = toy.ToyText()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(toy_base, "SHARD", 8)
    monkeypatch.setattr(toy_base, "WITH_IMAGE", 4)


def latents_of(z, with_image=0):
    """Latents around given z; the first `with_image` clips have the image condition: mask on the first latent frame, and a latent."""
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


# ---------------------------------------------------------------------------------------------------- cache


def count_encodes(monkeypatch):
    """A list that grows by the number of clips of every call of an autoencoder's encoder."""
    encoded, encode = [], ae.DCAEV.encode
    monkeypatch.setattr(ae.DCAEV, "encode", lambda self, x, **more: encoded.append(len(x)) or encode(self, x, **more))
    return encoded


def test_both_spaces_hold_the_same_clips_with_the_same_captions(tiny_toy, tmp_path):
    both = [released.load_model(name) for name in ("base", "dc")]
    teacher, student = (toy_base.cache_latents(m, 2, tmp_path) for m in both)
    assert teacher.attributes == student.attributes and len(teacher.attributes) == len(teacher.z) == len(student.z) == 16
    assert teacher.z.shape[2] == student.z.shape[2] == 8  # latent frames pair up one to one
    assert teacher.with_image.tolist() == student.with_image.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    clips, scenes = toy.toy_batch((1, 1), 8)  # the second shard
    assert [s.attributes() for s in scenes] == teacher.attributes[8:]
    for model, latents in zip(both, (teacher, student)):
        with torch.no_grad():
            z, condition = model.encode(clips[:4]), model.condition(4, model.latent_shape(32, (64, 64)), clips[:4, :, 0])
        for cached, exact in ((latents.z[8:12], z), (latents.condition[8:12], condition)):  # cached in bf16 and stored in fp16
            assert (cached - exact).square().mean() < 1e-3 * exact.square().mean()
        assert not latents.condition[12:].any()
    assert len(os.listdir(tmp_path)) == 2 + 1  # a folder for each autoencoder, and the weights


def test_given_scenes_are_encoded_once(tiny_toy, tmp_path, monkeypatch):
    model, encoded = released.load_model("dc"), count_encodes(monkeypatch)
    clips, scenes = toy.toy_batch(5, 3)
    first, again = (toy_base.encode_scenes(model, scenes, tmp_path, "scenes") for _ in range(2))
    assert encoded == [3] and torch.equal(first.z, again.z) and first.attributes == [s.attributes() for s in scenes]
    assert not first.condition.any() and not len(first.with_image)
    toy_base.encode_scenes(model, scenes[:2], tmp_path, "others")
    assert encoded == [3, 2]


def test_a_cache_goes_on_where_it_stopped(tiny_toy, tmp_path, monkeypatch):
    model, encoded, save = released.load_model("dc"), count_encodes(monkeypatch), checkpoint.save_tensors

    def stop_at_the_second(file, tensors):
        if file.name == "seed1-0001.safetensors":
            raise KeyboardInterrupt
        save(file, tensors)

    monkeypatch.setattr(checkpoint, "save_tensors", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        toy_base.cache_latents(model, 3, tmp_path / "cache")
    monkeypatch.setattr(checkpoint, "save_tensors", save)
    encoded.clear()
    first = toy_base.cache_latents(model, 3, tmp_path / "cache")
    assert sum(encoded) == 2 * (8 + 4)  # shards 1 and 2, clips and images
    encoded.clear()
    again = toy_base.cache_latents(model, 3, tmp_path / "cache")
    assert not encoded and torch.equal(first.z, again.z) and torch.equal(first.condition, again.condition)


def test_a_damaged_shard_is_made_again(tiny_toy, tmp_path, monkeypatch):
    model, encoded = released.load_model("dc"), count_encodes(monkeypatch)
    first = toy_base.cache_latents(model, 3, tmp_path / "cache")
    file = next((tmp_path / "cache").rglob("seed1-0001.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    encoded.clear()
    again = toy_base.cache_latents(model, 3, tmp_path / "cache")
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


def test_the_last_shard_is_held_out():
    latents = latents_of(torch.arange(24.0).view(24, 1, 1, 1, 1).expand(-1, 2, 2, 2, 2), with_image=24)
    latents.with_image = torch.tensor([0, 1, 8, 16, 19])
    train, held = toy_base.split(latents)
    assert len(train.z) == len(train.attributes) == 16 and train.with_image.tolist() == [0, 1, 8]
    assert len(held.z) == len(held.attributes) == 8 and held.with_image.tolist() == [0, 3]
    assert torch.equal(held.inputs(held.with_image), latents.inputs(torch.tensor([16, 19])))
    assert train.attributes + held.attributes == latents.attributes


# ---------------------------------------------------------------------------------------------------- batches


def test_prompts_and_attributes_are_dropped_and_images_shown_as_often_as_asked():
    latents = latents_of(torch.randn(40, 2, 1, 1, 1), with_image=10)
    z, condition, context, _ = toy_base.Source(latents, TEXT, null=0.1, drop=0.2, image=0.3).batch(0, range(4000))
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


def test_a_sample_depends_on_seed_step_and_position_only():
    """So two processes with half a batch each see what one process sees, and a resumed run goes on with the same batches."""
    latents = latents_of(torch.randn(40, 2, 1, 1, 1), with_image=10)
    source = toy_base.Source(latents, TEXT, seed=3)
    whole, parts = source.batch(7, range(16)), [source.batch(7, part) for part in (range(8), range(8, 16))]
    assert all(torch.equal(a, torch.cat(b)) for a, *b in zip(whole[:3], *(p[:3] for p in parts)))
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


@pytest.fixture
def tiny(tiny_toy):
    """A tiny base in its latent space: (net, latents). Latents are correlated within and between cells, as real ones are."""
    z = torch.randn(16, 4, 1, 1, 1) + 0.3 * torch.randn(16, 4, 2, 4, 4)
    return released.load_model("base").net, latents_of(z, with_image=4)


def zero_head(net):
    with torch.no_grad():
        for p in net.head.head.parameters():
            p.zero_()
    return net


# ---------------------------------------------------------------------------------------------------- training


def run_fit(net, latents, folder, steps=6, **settings):
    """Stage 1b in small: the ends of a fresh copy of `net` -> (net, log)."""
    copy = dit.from_state_dict(net.state_dict(), config=net.config).requires_grad_(False)
    ends = [p.requires_grad_() for part in (copy.patch_embedding, copy.head) for p in part.parameters()]
    return copy, toy_base.fit(copy, toy_base.Source(latents, TEXT), torch.optim.AdamW(ends, lr=1e-2), 1e-2, steps, 4, folder / "state.pt", settings, "test", save_every=2)


def fail_at(monkeypatch, call, outcome):
    """From now on the `call`-th loss (from 0) is `outcome`, or raised if it is an exception."""
    flow_loss, calls = toy_base.flow_loss, []

    def failing(*args):
        calls.append(1)
        if len(calls) == call + 1 and isinstance(outcome, BaseException):
            raise outcome
        loss, *rest = flow_loss(*args)
        return loss * outcome if len(calls) == call + 1 else loss, *rest

    monkeypatch.setattr(toy_base, "flow_loss", failing)


def test_resumed_equals_uninterrupted_bit_for_bit(tiny, tmp_path, monkeypatch):
    whole, log = run_fit(*tiny, tmp_path / "a")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        fail_at(m, 5, KeyboardInterrupt())  # step 5 was begun; the last state is that after 4
        run_fit(*tiny, tmp_path / "b")
    assert checkpoint.load_pickle(tmp_path / "b" / "state.pt")["step"] == 4
    resumed, resumed_log = run_fit(*tiny, tmp_path / "b")
    assert [step for step, _ in log] == [2, 4, 6] and resumed_log == log
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not torch.equal(whole.head.head.weight, tiny[0].head.head.weight)
    assert all(torch.equal(a, b) for a, b in zip(whole.blocks.parameters(), tiny[0].blocks.parameters()))  # frozen


def test_a_finished_run_is_not_run_again(tiny, tmp_path, monkeypatch):
    first, log = run_fit(*tiny, tmp_path)
    monkeypatch.setattr(toy_base, "flow_loss", None)
    again, same = run_fit(*tiny, tmp_path)
    assert same == log and all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))


def test_a_state_made_with_other_settings_is_refused(tiny, tmp_path):
    run_fit(*tiny, tmp_path, steps=2, align="sgd")
    for other in (dict(steps=4, align="sgd"), dict(steps=2, align="closed_form")):
        with pytest.raises(UserError, match="made with other settings .*use those, or another --out"):
            run_fit(*tiny, tmp_path, **other)


def test_a_nan_loss_stops_and_the_last_good_state_stays(tiny, tmp_path, monkeypatch):
    whole, _ = run_fit(*tiny, tmp_path / "whole")
    with monkeypatch.context() as m, pytest.raises(UserError, match="the loss is nan at step 3 of 'test': lower its learning rate"):
        fail_at(m, 3, torch.nan)
        run_fit(*tiny, tmp_path)
    saved = checkpoint.load_pickle(tmp_path / "state.pt")
    assert saved["step"] == 2 and all(torch.isfinite(p).all() for p in saved["trained"].values())
    resumed, _ = run_fit(*tiny, tmp_path)  # the fault was ours: it goes on
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {Evil.trace}",)


def test_a_state_file_that_would_run_code_does_not(tiny, tmp_path):
    Evil.trace = tmp_path / "trace"
    (tmp_path / "state.pt").write_bytes(pickle.dumps(dict(settings=Evil()), protocol=2))
    with pytest.raises(UserError, match="could run code, so it was not loaded"):
        run_fit(*tiny, tmp_path)
    assert not Evil.trace.exists()


def test_training_learns(tiny, tmp_path):
    net, latents = tiny
    trained, log = run_fit(zero_head(net), latents, tmp_path, steps=60)
    assert toy_base.validation_loss(trained, latents, TEXT, batches=2) < 0.8 * toy_base.validation_loss(net, latents, TEXT, batches=2)
    assert log[-1][1] < log[0][1]


def test_the_validation_loss_is_always_the_same(tiny):
    assert toy_base.validation_loss(*tiny, TEXT, batches=1) == toy_base.validation_loss(*tiny, TEXT, batches=1)


def test_pretraining_makes_a_base_that_loads(tiny_toy, tmp_path):
    out = tmp_path / "out"
    adapt.main(["--pretrain", "--out", str(out), "--shards", "1", "--steps", "3", "--batch", "4"])
    net = dit.load(out / "toy-base-dit.safetensors")
    assert net.config == dit.PRESETS["toy-base"] and net.head.head.weight.any() and (out / "pretrain.png").exists()


def test_scores_of_both_models_beside_chance_and_their_ceilings(tiny_toy, tmp_path):
    adapt.main(["--score", "--prompts", "3", "--results", str(tmp_path / "toy.json")])
    report = json.loads((tmp_path / "toy.json").read_text())
    assert report["prompts"] == 3 and {"date", "commit", "torch", "threads"} <= report.keys()
    kinds = ("reconstruction", "prompts", "image and prompt")
    assert list(report["rows"]) == ["chance", "clips", *(f"{m}: {k}" for m in ("base", "dc") for k in kinds)]
    assert report["rows"]["clips"]["mean"] == 1 and report["rows"]["chance"]["mean"] == pytest.approx(5 / 24)
    assert all("psnr" in report["rows"][f"dc: {k}"] for k in ("reconstruction", "image and prompt"))
