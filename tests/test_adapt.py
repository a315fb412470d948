"""AE-Adapt-V, stage by stage: pooling, the closed forms, what is inherited, exact resuming; then the whole program on tiny models."""
import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import adapt
import ae
import checkpoint
import data
import dit
import encoders
import flow
import lora
import models
import sample
from checkpoint import UserError

TEXT = encoders.ToyText()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(adapt, "SHARD", 8)
    monkeypatch.setattr(adapt, "WITH_IMAGE", 4)


def latents_of(z, with_image=0):
    """Latents around given z; the first `with_image` clips have the image condition: mask on the first latent frame, and a latent."""
    n, c, *grid = z.shape
    condition = torch.zeros(n, 4 + c, *grid)
    condition[:with_image, :4, 0] = 1
    condition[:with_image, 4:] = torch.randn(with_image, c, *grid)
    attributes = [s.attributes() for s in data.toy_batch(0, n, 1, 8)[1]]
    return adapt.Latents(z, condition, torch.arange(with_image), attributes)


# ---------------------------------------------------------------------------------------------------- stage 1a: pooling


def test_pooling_averages_the_base_tokens_of_a_deep_token():
    tokens = torch.randn(2, 20, 30, 52, 8)  # 480x832 in the base
    pooled = adapt.pool(tokens, (20, 15, 26))  # in f32
    assert pooled.shape == (2, 20, 15, 26, 8)
    torch.testing.assert_close(pooled[1, 3, 2, 5], tokens[1, 3, 4:6, 10:12].mean(dim=(0, 1)))
    assert adapt.pool(tokens[:, :, :28], (20, 7, 13)).shape == (2, 20, 7, 13, 8)  # 448x832 in f64: s = 4


def test_pooling_in_time_where_the_base_has_more_frames():
    tokens = torch.randn(1, 40, 4, 4, 3)
    torch.testing.assert_close(adapt.pool(tokens, (20, 4, 4))[0, 7, 1, 2], tokens[0, 14:16, 1, 2].mean(dim=0))


@pytest.mark.parametrize("grid", [(20, 14, 26), (20, 15, 13), (20, 60, 104), (12, 15, 26), (40, 15, 26)], ids=str)
def test_grids_that_do_not_divide_by_one_integer_are_refused(grid):
    with pytest.raises(UserError, match="20x30x52 is no integer multiple of the deep one " + "x".join(map(str, grid))):
        adapt.pool(torch.zeros(1, 20, 30, 52, 1), grid)


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 4)])
def test_an_embedder_is_a_matrix_on_tokens_so_it_commutes_with_pooling(patch):
    x, embedder = torch.randn(2, 3, 4, 8, 16), dit.PatchEmbedder(3, 6, patch)
    tokens = adapt.tokens_of(x, patch)
    torch.testing.assert_close(F.linear(tokens, embedder.weight.flatten(1), embedder.bias), embedder(x))
    grid = [n // 2 for n in tokens.shape[1:4]]
    pooled = F.linear(adapt.pool(tokens, grid), embedder.weight.flatten(1), embedder.bias)
    torch.testing.assert_close(pooled, adapt.pool(embedder(x), grid))


# ---------------------------------------------------------------------------------------------------- stage 1a: regression

PATCH_T, PATCH_S = (1, 2, 2), (1, 1, 1)


def linear_pair(n=24, with_image=0):
    """Base latents that are exactly linear in the deep ones: every base patch in a deep cell is A u + b."""
    student = latents_of(torch.randn(n, 6, 2, 3, 4), with_image)
    a, b = torch.randn(4 * 4, 6) / 4, torch.randn(16)
    cells = F.linear(rearrange(student.z, "n c f h w -> n f h w c"), a, b)
    cells = cells.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # s = 2
    teacher = latents_of(rearrange(cells, "n f h w (c p q) -> n c f (h p) (w q)", p=2, q=2), with_image)
    return teacher, student


def real_pair(n=24):
    """Base latents that depend on the deep ones in part, and not linearly."""
    teacher, student = linear_pair(n)
    teacher.z = torch.tanh(teacher.z) + 0.5 * torch.randn(teacher.z.shape)
    return teacher, student


@pytest.fixture
def embedder():
    e = dit.PatchEmbedder(4 + 4 + 4, 16, PATCH_T)  # of an image-to-video base
    nn.init.xavier_uniform_(e.weight.flatten(1).detach())
    return e.requires_grad_(False)


def test_a_teacher_that_is_linear_in_the_student_is_matched(embedder):
    x, u = adapt.paired_tokens(*linear_pair(), PATCH_T, PATCH_S)
    assert x.dtype == torch.float64 and x.shape == (24 * 2 * 3 * 4, 12 * 4) and u.shape == (24 * 2 * 3 * 4, 16)
    r2, mse = adapt.r_squared(x, u, embedder, *adapt.solve_embedding(x, u, embedder, ridge=1e-7))
    assert mse < 1e-10 and r2 > 1 - 1e-9
    start = torch.randn(16, 16) / 4, torch.zeros(16)
    r2, _ = adapt.r_squared(x, u, embedder, *adapt.sgd_embedding(x, u, embedder, *start, steps=1500))
    assert r2 > 1 - 1e-3  # MSE below a thousandth of the variance
    assert adapt.r_squared(x, u, embedder, *start)[0] < 0


def test_downsampling_the_target_and_upsampling_the_student_have_the_same_solution(embedder):
    """Nearest upsampling: every base token is compared with the embedding of the deep token that covers it (spec 3.2)."""
    teacher, student = real_pair()
    x, u = adapt.paired_tokens(teacher, student, PATCH_T, PATCH_S)
    every = torch.arange(len(teacher.z))
    x_up = adapt.tokens_of(teacher.inputs(every), PATCH_T).flatten(0, 3).double()
    u_up = adapt.tokens_of(student.inputs(every), PATCH_S).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).flatten(0, 3).double()
    for a, b in zip(adapt.solve_embedding(x, u, embedder), adapt.solve_embedding(x_up, u_up, embedder)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_closed_form_is_the_optimum_that_sgd_approaches(embedder):
    x, u = adapt.paired_tokens(*real_pair(60), PATCH_T, PATCH_S)
    fit, held = (x[:1200], u[:1200]), (x[1200:], u[1200:])
    solved, trained = adapt.solve_embedding(*fit, embedder), adapt.sgd_embedding(*fit, embedder, torch.zeros(16, 16), torch.zeros(16), steps=1000)
    assert adapt.r_squared(*fit, embedder, *solved)[1] <= adapt.r_squared(*fit, embedder, *trained)[1]
    assert adapt.r_squared(*held, embedder, *solved)[1] <= 1.01 * adapt.r_squared(*held, embedder, *trained)[1]
    for weight in (solved[0] + 0.01 * torch.randn(16, 16), 0.99 * solved[0]):
        assert adapt.r_squared(*fit, embedder, weight, solved[1])[1] > adapt.r_squared(*fit, embedder, *solved)[1]


def test_clips_with_an_image_come_with_and_without_it_and_the_mask_does_no_harm(embedder):
    """The four mask channels are equal, so the covariance is singular; the ridge resolves it (spec 3.4)."""
    teacher, student = linear_pair(with_image=10)
    x, u = adapt.paired_tokens(teacher, student, PATCH_T, PATCH_S)
    assert len(u) == (24 + 10) * 2 * 3 * 4
    plain, shown = u[: 24 * 24], u[24 * 24 :]
    assert not plain[:, 6:].any() and shown[:, 6:10].sum() == 10 * 4 * 3 * 4  # mask: four ones per cell of the first latent frame
    weight, bias = adapt.solve_embedding(x, u, embedder)
    assert torch.isfinite(weight).all() and weight.abs().max() < 10
    mask = weight[:, 6:10]
    torch.testing.assert_close(mask, mask[:, :1].expand(-1, 4))  # what cannot be told apart is shared out evenly


def test_ridge_to_init_goes_from_the_plain_solution_to_the_initialisation(embedder):
    x, u = adapt.paired_tokens(*real_pair(), PATCH_T, PATCH_S)
    init = torch.randn(16, 16, 1, 1, 1)
    seen = u.std(dim=0) > 0  # the condition channels are always zero here
    plain, none, all_of_it = adapt.solve_embedding(x, u, embedder, 1e-9), *(adapt.solve_embedding(x, u, embedder, r, init) for r in (1e-9, 1e9))
    torch.testing.assert_close(none[0][:, seen], plain[0][:, seen])
    torch.testing.assert_close(all_of_it[0], init.flatten(1))
    # directions that the clean latents never take: closed by the plain solution, left open by this one
    assert not plain[0][:, ~seen].any() and torch.equal(none[0][:, ~seen], init.flatten(1)[:, ~seen])
    y = F.linear(x, embedder.weight.flatten(1).double(), embedder.bias.double())
    for weight, bias in (plain, none, all_of_it):  # the bias sets the mean right, whatever the weight
        torch.testing.assert_close(F.linear(u, weight.double(), bias.double()).mean(0), y.mean(0), rtol=0, atol=1e-5)
    errors = [adapt.r_squared(x, u, embedder, *adapt.solve_embedding(x, u, embedder, r, init))[1] for r in (1e-6, 1e-2, 1, 100)]
    assert errors == sorted(errors)


def test_r_squared_is_1_for_a_perfect_and_0_for_a_constant_embedder(embedder):
    x = torch.randn(500, 48).double()
    weight = embedder.weight.flatten(1)
    assert adapt.r_squared(x, x, embedder, weight, embedder.bias)[0] == pytest.approx(1)
    mean = F.linear(x.mean(0), weight.double(), embedder.bias.double())
    r2, mse = adapt.r_squared(x, x, embedder, torch.zeros_like(weight), mean)
    assert r2 == pytest.approx(0, abs=1e-6) and mse > 0


def test_norm_ratio_is_1_where_noise_arrives_as_loudly_as_in_the_base():
    """A deep latent that only rearranges the base's: its ideal embedder averages the four it replaces, and noise with them."""
    base = dit.PatchEmbedder(3, 8, (1, 1, 1))
    teacher, student = latents_of(torch.randn(1, 3, 2, 4, 4)), latents_of(torch.randn(1, 12, 2, 2, 2))
    weight = (base.weight.flatten(1)[:, :, None] / 4).expand(-1, -1, 4).flatten(1)
    assert adapt.norm_ratio(weight, base, teacher, student, ((1, 1, 1), (1, 1, 1))) == pytest.approx(1)
    assert adapt.norm_ratio(0.1 * weight, base, teacher, student, ((1, 1, 1), (1, 1, 1))) == pytest.approx(0.01)


# ---------------------------------------------------------------------------------------------------- assemble

FRESH = {"patch_embedding.weight", "patch_embedding.bias", "head.head.weight", "head.head.bias"}


def trained_base():
    base = dit.WanDiT(dit.PRESETS["toy-base"])
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return base.eval()


def test_everything_but_the_two_ends_is_inherited_bit_for_bit():
    base, config = trained_base(), dit.PRESETS["toy-dc"]
    before = {k: v.clone() for k, v in base.state_dict().items()}
    deep = dit.inherit(base, config)
    assert deep.state_dict().keys() == base.state_dict().keys()
    assert {k for k, v in deep.state_dict().items() if v.shape != before[k].shape or not torch.equal(v, before[k])} == FRESH
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())  # the base is left alone
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(base.parameters(), deep.parameters()))


@torch.no_grad()
def test_the_assembled_model_predicts_exactly_zero():
    deep = dit.inherit(trained_base(), dit.PRESETS["toy-dc"])
    v = deep(torch.randn(2, 68, 3, 2, 2), torch.tensor([10.0, 990.0]), TEXT(["a red circle", "a ring"]))
    assert v.shape == (2, 32, 3, 2, 2) and not v.any()


def test_the_fresh_embedder_is_xavier_with_a_small_random_bias():
    weight, bias = dit.inherit(trained_base(), dit.PRESETS["toy-dc"]).patch_embedding.parameters()
    bound = (6 / (68 + 160)) ** 0.5
    assert 0.95 * bound < weight.abs().max() <= bound and 0 < bias.abs().max() <= 32**-0.5


def test_a_base_of_another_size_is_refused():
    wide = dit.Config(**{**vars(dit.PRESETS["toy-dc"]), "ffn_dim": 48})
    with pytest.raises(UserError, match="the base transformer does not fit this model: blocks.0.ffn"):
        dit.inherit(trained_base(), wide)
    deeper = dit.Config(**{**vars(dit.PRESETS["toy-dc"]), "layers": 7})
    with pytest.raises(UserError, match="missing"):
        dit.inherit(trained_base(), deeper)


@torch.no_grad()
def test_merged_lora_equals_live_lora_on_the_toy():
    deep = dit.inherit(trained_base(), dit.PRESETS["toy-dc"])
    lora.wrap(deep, 32, 64, full=("patch_embedding", "head"))
    for p in deep.parameters():
        if p.requires_grad:
            p.normal_(std=0.05)
    args = torch.randn(2, 68, 3, 2, 2), torch.tensor([10.0, 990.0]), TEXT(["a red circle", "a ring"])
    live = deep(*args)
    assert live.std() > 0.1 and (lora.merge(deep)(*args) - live).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------- image-to-video input


@pytest.mark.parametrize("name", ["base", "dc"])
def test_the_image_condition_is_mask_and_latent_of_a_clip_that_begins_with_the_image(tiny_toy, name):
    model = models.load_model(name)
    t, h, w = shape = model.latent_shape(16, (64, 64))
    image, z = torch.rand(2, 3, 64, 64) * 2 - 1, model.net.config.out_channels
    condition = model.condition(2, shape, image)
    assert condition.shape == (2, 4 + z, t, h, w)
    mask = condition[:, :4]
    assert mask.sum(dim=(1, 2, 3, 4)).tolist() == [4 * h * w] * 2 and (mask[:, :, 0] == 1).all()
    clip = torch.zeros(2, 3, 16, 64, 64)  # mid grey
    clip[:, :, :4] = image[:, :, None]  # one latent frame is four frames
    torch.testing.assert_close(condition[:, 4:], model.encode(clip))
    assert not model.condition(2, shape).any()


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
    both = [models.load_model(name) for name in ("base", "dc")]
    teacher, student = (adapt.cache_latents(m, 2, tmp_path) for m in both)
    assert teacher.attributes == student.attributes and len(teacher.attributes) == len(teacher.z) == len(student.z) == 16
    assert teacher.z.shape[2] == student.z.shape[2] == 8  # latent frames pair up one to one
    assert teacher.with_image.tolist() == student.with_image.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    clips, scenes = data.toy_batch((1, 1), 8)  # the second shard
    assert [s.attributes() for s in scenes] == teacher.attributes[8:]
    for model, latents in zip(both, (teacher, student)):
        with torch.no_grad():
            z, condition = model.encode(clips[:4]), model.condition(4, model.latent_shape(32, (64, 64)), clips[:4, :, 0])
        for cached, exact in ((latents.z[8:12], z), (latents.condition[8:12], condition)):  # cached in bf16 and stored in fp16
            assert (cached - exact).square().mean() < 1e-3 * exact.square().mean()
        assert not latents.condition[12:].any()
    assert len(os.listdir(tmp_path)) == 2 + 1  # a folder for each autoencoder, and the weights


def test_a_cache_goes_on_where_it_stopped(tiny_toy, tmp_path, monkeypatch):
    model, encoded, save = models.load_model("dc"), count_encodes(monkeypatch), checkpoint.save_tensors

    def stop_at_the_second(file, tensors):
        if file.name == "seed1-0001.safetensors":
            raise KeyboardInterrupt
        save(file, tensors)

    monkeypatch.setattr(checkpoint, "save_tensors", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        adapt.cache_latents(model, 3, tmp_path / "cache")
    monkeypatch.setattr(checkpoint, "save_tensors", save)
    encoded.clear()
    first = adapt.cache_latents(model, 3, tmp_path / "cache")
    assert sum(encoded) == 2 * (8 + 4)  # shards 1 and 2, clips and images
    encoded.clear()
    again = adapt.cache_latents(model, 3, tmp_path / "cache")
    assert not encoded and torch.equal(first.z, again.z) and torch.equal(first.condition, again.condition)


def test_a_damaged_shard_is_made_again(tiny_toy, tmp_path, monkeypatch):
    model, encoded = models.load_model("dc"), count_encodes(monkeypatch)
    first = adapt.cache_latents(model, 3, tmp_path / "cache")
    file = next((tmp_path / "cache").rglob("seed1-0001.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    encoded.clear()
    again = adapt.cache_latents(model, 3, tmp_path / "cache")
    assert sum(encoded) == 8 + 4 and torch.equal(first.z, again.z)


def test_another_autoencoder_never_reads_these_latents(tiny_toy, tmp_path, monkeypatch):
    model, encoded = models.load_model("dc"), count_encodes(monkeypatch)
    first = adapt.cache_latents(model, 1, tmp_path / "cache")
    with torch.no_grad():
        next(model.ae.parameters()).add_(0.1)
    encoded.clear()
    other = adapt.cache_latents(model, 1, tmp_path / "cache")
    assert sum(encoded) == 8 + 4 and not torch.equal(first.z, other.z)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_last_shard_is_held_out():
    latents = latents_of(torch.arange(24.0).view(24, 1, 1, 1, 1).expand(-1, 2, 2, 2, 2), with_image=24)
    latents.with_image = torch.tensor([0, 1, 8, 16, 19])
    train, held = adapt.split(latents)
    assert len(train.z) == len(train.attributes) == 16 and train.with_image.tolist() == [0, 1, 8]
    assert len(held.z) == len(held.attributes) == 8 and held.with_image.tolist() == [0, 3]
    assert torch.equal(held.inputs(held.with_image), latents.inputs(torch.tensor([16, 19])))
    assert train.attributes + held.attributes == latents.attributes


# ---------------------------------------------------------------------------------------------------- batches


def test_prompts_and_attributes_are_dropped_and_images_shown_as_often_as_asked():
    latents = latents_of(torch.randn(40, 2, 1, 1, 1), with_image=10)
    z, condition, context = adapt.batch_of(latents, TEXT, 4000, np.random.default_rng(0), null=0.1, drop=0.2, image=0.3)
    rows = (context != 0).any(dim=2)[:, : len(data.WORLD)]  # which attributes are named
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


def test_a_batch_depends_on_its_generator_only():
    latents = latents_of(torch.randn(40, 2, 1, 1, 1), with_image=10)
    one, two = (adapt.batch_of(latents, TEXT, 16, np.random.default_rng((3, 7))) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))


# ---------------------------------------------------------------------------------------------------- the head by regression


@pytest.fixture
def toy(tiny_toy):
    """A tiny base in its latent space: (net, latents). Latents are correlated within and between cells, as real ones are."""
    z = torch.randn(16, 4, 1, 1, 1) + 0.3 * torch.randn(16, 4, 2, 4, 4)
    return models.load_model("base").net, latents_of(z, with_image=4)


def zero_head(net):
    with torch.no_grad():
        for p in net.head.head.parameters():
            p.zero_()
    return net


def test_a_regressed_head_starts_below_a_zero_head(toy):
    net, latents = toy
    before = adapt.validation_loss(zero_head(net), latents, TEXT, batches=2)
    adapt.solve_head(net, latents, TEXT, batches=4, batch=32)
    assert adapt.validation_loss(net, latents, TEXT, batches=2) < 0.8 * before


@torch.no_grad()
def test_the_regressed_head_is_the_least_squares_solution(toy, monkeypatch):
    """No other linear map from the features that enter the head fits the velocities of these batches better."""
    net, latents = toy
    features, targets, target = [], [], flow.velocity_target
    net.head.head.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    monkeypatch.setattr(flow, "velocity_target", lambda z, noise: targets.append(target(z, noise)) or targets[-1])
    adapt.solve_head(net, latents, TEXT, batches=3, batch=16, ridge=1e-9)

    u, v = torch.cat(features), torch.cat(targets)
    error = lambda head: (net.unpatchify(head(u), (2, 2, 2)) - v).square().mean()
    ours = error(net.head.head)
    best = torch.linalg.lstsq(F.pad(u.flatten(0, 1), (0, 1), value=1).double(),
                              rearrange(v, "b c f (h p) (w q) -> (b f h w) (p q c)", p=2, q=2).double()).solution.float()
    assert ours == pytest.approx(error(lambda u: u @ best[:-1] + best[-1]).item(), rel=1e-5)
    assert ours < error(lambda u: 0 * net.head.head(u))
    for _ in range(3):
        w = net.head.head.weight + 0.01 * torch.randn_like(net.head.head.weight)
        assert error(lambda u: F.linear(u, w, net.head.head.bias)) > ours


# ---------------------------------------------------------------------------------------------------- training


def run_fit(net, latents, folder, steps=6, **settings):
    """Stage 1b in small: the ends of a fresh copy of `net` -> (net, log)."""
    copy = dit.from_state_dict(net.state_dict(), config=net.config).requires_grad_(False)
    ends = [p.requires_grad_() for part in (copy.patch_embedding, copy.head) for p in part.parameters()]
    return copy, adapt.fit(copy, latents, TEXT, torch.optim.AdamW(ends, lr=1e-2), 1e-2, steps, 4, folder / "state.pt", settings, "test", save_every=2)


def fail_at(monkeypatch, call, outcome):
    """From now on the `call`-th loss (from 0) is `outcome`, or raised if it is an exception."""
    flow_loss, calls = adapt.flow_loss, []

    def failing(*args):
        calls.append(1)
        if len(calls) == call + 1 and isinstance(outcome, BaseException):
            raise outcome
        loss, *rest = flow_loss(*args)
        return loss * outcome if len(calls) == call + 1 else loss, *rest

    monkeypatch.setattr(adapt, "flow_loss", failing)


def test_resumed_equals_uninterrupted_bit_for_bit(toy, tmp_path, monkeypatch):
    whole, log = run_fit(*toy, tmp_path / "a")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        fail_at(m, 5, KeyboardInterrupt())  # step 5 was begun; the last state is that after 4
        run_fit(*toy, tmp_path / "b")
    assert checkpoint.load_pickle(tmp_path / "b" / "state.pt")["step"] == 4
    resumed, resumed_log = run_fit(*toy, tmp_path / "b")
    assert [step for step, _ in log] == [2, 4, 6] and resumed_log == log
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not torch.equal(whole.head.head.weight, toy[0].head.head.weight)
    assert all(torch.equal(a, b) for a, b in zip(whole.blocks.parameters(), toy[0].blocks.parameters()))  # frozen


def test_a_finished_run_is_not_run_again(toy, tmp_path, monkeypatch):
    first, log = run_fit(*toy, tmp_path)
    monkeypatch.setattr(adapt, "flow_loss", None)
    again, same = run_fit(*toy, tmp_path)
    assert same == log and all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))


def test_a_state_made_with_other_settings_is_refused(toy, tmp_path):
    run_fit(*toy, tmp_path, steps=2, align="sgd")
    for other in (dict(steps=4, align="sgd"), dict(steps=2, align="closed_form")):
        with pytest.raises(UserError, match="made with other settings .*use those, or another --out"):
            run_fit(*toy, tmp_path, **other)


def test_a_nan_loss_stops_and_the_last_good_state_stays(toy, tmp_path, monkeypatch):
    whole, _ = run_fit(*toy, tmp_path / "whole")
    with monkeypatch.context() as m, pytest.raises(UserError, match="the loss is nan at step 3 of 'test': lower its learning rate"):
        fail_at(m, 3, torch.nan)
        run_fit(*toy, tmp_path)
    saved = checkpoint.load_pickle(tmp_path / "state.pt")
    assert saved["step"] == 2 and all(torch.isfinite(p).all() for p in saved["trained"].values())
    resumed, _ = run_fit(*toy, tmp_path)  # the fault was ours: it goes on
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {Evil.trace}",)


def test_a_state_file_that_would_run_code_does_not(toy, tmp_path):
    Evil.trace = tmp_path / "trace"
    (tmp_path / "state.pt").write_bytes(pickle.dumps(dict(settings=Evil()), protocol=2))
    with pytest.raises(UserError, match="could run code, so it was not loaded"):
        run_fit(*toy, tmp_path)
    assert not Evil.trace.exists()


def test_training_learns(toy, tmp_path):
    net, latents = toy
    trained, log = run_fit(zero_head(net), latents, tmp_path, steps=60)
    assert adapt.validation_loss(trained, latents, TEXT, batches=2) < 0.8 * adapt.validation_loss(net, latents, TEXT, batches=2)
    assert log[-1][1] < log[0][1]


def test_the_validation_loss_is_always_the_same(toy):
    assert adapt.validation_loss(*toy, TEXT, batches=1) == adapt.validation_loss(*toy, TEXT, batches=1)


# ---------------------------------------------------------------------------------------------------- the whole program


@pytest.fixture
def quick(monkeypatch):
    """Fewer SGD steps and regression batches than the real run."""
    for name, values in dict(sgd_embedding=dict(steps=50), solve_head=dict(batches=3, batch=16), validation_loss=dict(batches=1)).items():
        function = getattr(adapt, name)
        monkeypatch.setattr(adapt, name, lambda *args, function=function, values=values: function(*args, **values))


TINY_RUN = ["--base", "toy", "--shards", "2", "--align-shards", "1", "--steps-head", "4", "--steps", "4", "--batch", "4", "--prompts", "2", "--rank", "2"]


def test_adapt_runs_the_stages_and_its_model_loads_merged_and_as_lora(tiny_toy, quick, tmp_path, monkeypatch, capsys):
    out, heads = tmp_path / "out", []
    contact_sheet = data.contact_sheet
    monkeypatch.setattr(data, "contact_sheet", lambda *a, **k: heads.append((k["heads"], len(a[1]), k["columns"])) or contact_sheet(*a, **k))
    adapt.main([*TINY_RUN, "--out", str(out)])
    stages = ["base", "1a, assembled", "1b, head aligned", "2, LoRA"]
    assert heads == [(stages[: i + 1], len(adapt.PROMPTS), 3 * (i + 1)) for i in range(4)]  # stages.png: a row per prompt, three columns per stage

    report = json.loads((out / "report.json").read_text())
    rows = {row["stage"]: row for row in report["stages"]}
    assert list(rows) == [stages[0], "1a random", "1a sgd", "1a closed_form", "1a ridge_to_init", *stages[1:]]
    assert all({"validation_loss", "prompt_fit"} <= rows[s].keys() for s in stages)
    assert {"r2", "mse", "norm_ratio"} <= rows["1a random"].keys() and rows["1a, assembled"]["r2"] == rows["1a ridge_to_init"]["r2"]
    assert rows["1a closed_form"]["r2"] > rows["1a random"]["r2"] and rows["1a ridge_to_init"]["r2"] > rows["1a random"]["r2"]
    assert {p.name for p in out.iterdir()} == {"cache", "1b.pt", "2.pt", "aligned.safetensors", "lora.safetensors", "transformer.safetensors",
                                               "ae.safetensors", "report.json", "stages.png", "train.png"}
    assert f"python sample.py --model {out}" in capsys.readouterr().out

    base, merged = (dit.load(f).state_dict() for f in (tiny_toy / "toy-base-dit.safetensors", out / "transformer.safetensors"))
    moved = {re.sub(r"\d+", "0", k) for k in merged if k not in FRESH and not torch.equal(merged[k], base[k])}
    assert moved == {"head.modulation", *(f"blocks.0.self_attn.{p}.weight" for p in "qkvo"), "blocks.0.ffn.0.weight",
                     "time_embedding.0.weight", "time_projection.0.weight"}  # 0 stands for every number

    made = [models.load_model(str(name)) for name in (out, out / "lora.safetensors")]
    for a, b in zip(*(m.net.parameters() for m in made), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # the LoRA is stored in fp16
    shown = [sample.videos(m, ["a red circle"], frames=8, size=(32, 32), steps=4)[0] for m in made]
    assert (shown[0] - shown[1]).square().mean().sqrt() < 2e-3

    # once more: everything is there, nothing is encoded or trained
    files = {f: checkpoint.load_tensors(f)[0] for f in (out / "transformer.safetensors", out / "lora.safetensors")}
    monkeypatch.setattr(torch.optim.AdamW, "step", None)
    monkeypatch.setattr(adapt, "sgd_embedding", lambda x, u, teacher, weight, bias: (weight, bias))
    monkeypatch.setattr(ae.DCAEV, "encode", None)
    adapt.main([*TINY_RUN, "--out", str(out)])
    for file, before in files.items():
        after = checkpoint.load_tensors(file)[0]
        assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_a_changed_base_does_not_go_on_from_the_old_state(tiny_toy, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(adapt.Journal, "stage", lambda *args, **numbers: None)
    run = lambda *more: adapt.main([*TINY_RUN, "--out", str(tmp_path / "out"), "--steps-head", "1", "--steps", "1", *more])
    run()
    with pytest.raises(UserError, match="made with other settings"):
        run("--head", "zero")
    base = dit.load(tiny_toy / "toy-base-dit.safetensors")
    nn.init.normal_(base.head.head.bias)
    dit.save(base, tiny_toy / "toy-base-dit.safetensors")
    with pytest.raises(UserError, match="made with other settings"):
        run()


def test_published_alignment_with_a_zero_head(tiny_toy, quick, tmp_path):
    """SGD in stage 1a and a head of zeros, as released; stages may be left out."""
    adapt.main([*TINY_RUN, "--out", str(tmp_path / "out"), "--align", "sgd", "--head", "zero", "--steps-head", "0", "--steps", "0"])
    rows = {row["stage"]: row for row in json.loads((tmp_path / "out" / "report.json").read_text())["stages"]}
    assert rows["1a, assembled"]["r2"] == rows["1a sgd"]["r2"]
    assert len({rows[stage]["validation_loss"] for stage in ("1a, assembled", "1b, head aligned", "2, LoRA")}) == 1
    assert not dit.load(tmp_path / "out" / "transformer.safetensors").head.head.weight.any()


def test_pretraining_makes_a_base_that_loads(tiny_toy, quick, tmp_path):
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
