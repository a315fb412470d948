"""Latents that are easy to move into: the aligner's loss is 1 - R^2 of stage 1a, each trick is
what it says, and the report tells smooth latents from noise."""
import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import torch

import ae
import align
import dit
import toy
from files.checkpoint import UserError
from training import autoencoder, latents, loop

TINY = ae.Config((0, 16, 16, 16), (0, 1, 1, 1), 6, chunk=8, patch=4)  # f8
BASE = ae.Config((0, 8, 8, 8), (0, 1, 1, 1), 3, chunk=8)  # f4


@pytest.fixture(autouse=True, scope="module")
def quick():
    """A preset for seconds, no charts, short evaluations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ae.PRESETS, "tiny", TINY)
        patch.setattr(loop, "plot", lambda folder: None)
        patch.setattr(autoencoder, "JUDGED", 2)
        patch.setattr(autoencoder, "MEASURED", 4)
        yield


def tiny(config=TINY):
    torch.manual_seed(0)
    return ae.DCAEV(config)


def clips(number=0):
    for n in itertools.count(number):
        yield toy.toy_batch((0, n), 2, 16, 32)[0]


@pytest.fixture
def base(tmp_path):
    """Files of a base: autoencoder, and transformer with patches of 1x2x2, so tokens of 8."""
    ae.save(tiny(BASE), tmp_path / "base.safetensors")
    size = dict(dim=24, ffn_dim=32, heads=2, layers=1, text_dim=8, text_len=4)
    net = dit.WanDiT(dit.Config(**size, in_channels=10, out_channels=3, patch=(1, 2, 2)))
    dit.save(net, tmp_path / "dit.safetensors")
    return [tmp_path / "base.safetensors", tmp_path / "dit.safetensors"]


@pytest.mark.core
def test_the_loss_is_one_less_r_squared_of_stage_1a(base):
    """Of the embeddings themselves, 24 numbers a token, by align.py alone: the same number, though
    the aligner works with 12. (The condition's channels of the embedder play no part.)"""
    net, teacher = tiny(), latents.Teacher(base)
    aligner = latents.Aligner(teacher, net, clips)
    assert aligner.linear.out_features == 12
    embedder = torch.nn.Conv3d(3, 24, (1, 2, 2))
    embedder.weight.data = teacher.embed.view_as(embedder.weight).float()
    x = list(itertools.islice(clips(), aligner.BATCHES))
    pairs = [(teacher.latent(v, TINY), net.encode(v).detach()) for v in x]
    moments = align.Moments.of(pairs, ((1, 2, 2), (1, 1, 1)))
    solved = align.solve_embedding(moments, embedder)
    expected = align.r_squared(moments, embedder, *solved)[0]
    loss = torch.stack([aligner(v, u) for v, (_, u) in zip(x, pairs)]).mean().item()
    assert 0.05 < loss < 0.95 and loss == pytest.approx(1 - expected, abs=2e-3)
    assert aligner.r_squared(net, x, x) == pytest.approx(expected, abs=2e-3)


def test_the_aligner_moves_the_encoder_and_not_the_base(base):
    net, teacher = tiny(), latents.Teacher(base[:1])  # whitened latents, where there is no transformer
    aligner, x = latents.Aligner(teacher, net, clips), next(clips())
    phase = dataclasses.replace(autoencoder.TOY[0], align=1.0, l1=0.0, mse=0.0, jumps=0.0)
    (_, loss, values), = autoencoder.Objective(net, phase, aligner=aligner)(x, 0)
    loss.backward()
    assert loss.item() == pytest.approx(values["align"].item())
    assert all(p.grad is not None for p in (*net.encoder.parameters(), *aligner.linear.parameters()))
    assert all(p.grad is None for p in (*net.decoder.parameters(), *teacher.net.parameters()))
    y = torch.cat([torch.nn.functional.linear(aligner.pairs(v, net.encode(v))[0], aligner.weight, aligner.bias)
                   for v in itertools.islice(clips(), aligner.BATCHES)])
    torch.testing.assert_close(torch.cov(y.T), torch.eye(3), atol=0.02, rtol=0)


def test_aligned_training_raises_r_squared_and_resumes(tmp_path, base, monkeypatch):
    """`--align-to`: R^2 stands beside PSNR; from half of it on, the weights are the same."""
    monkeypatch.setattr(latents.Aligner, "BATCHES", 4)
    phases = autoencoder.choose_phases(autoencoder.TOY, TINY, ["low"], False, [20], 2, size=(32, 32),
                                       frames=16, lr=2e-3, warmup=1, align=1.0, l1=0.1, mse=0.1)

    def run(out):
        settings = autoencoder.Settings(align_to=tuple(base), save_every=10)
        return autoencoder.train("tiny", phases, autoencoder.ToyWorld(), tmp_path / out, settings)

    whole = ae.load(run("whole")).state_dict()
    log = [line for line in loop.read_log(tmp_path / "whole" / "low") if "psnr" in line]
    assert log[-1]["r_squared"] > log[0]["r_squared"] + 0.02 and "gradient_align" in log[0]
    half = "low/checkpoint-0000010"
    shutil.copytree(tmp_path / "whole" / half, tmp_path / "resumed" / half)
    resumed = ae.load(run("resumed")).state_dict()
    assert all(torch.equal(resumed[k], v) for k, v in whole.items())


def test_a_base_that_does_not_fit_is_refused(tmp_path, base):
    with pytest.raises(UserError, match="covers no whole number of the tokens .* give --align-to a base less deep"):
        latents.Teacher(base[:1]).check(dataclasses.replace(TINY, patch=1))  # f2 under f4
    ae.save(tiny(dataclasses.replace(BASE, latent_channels=4)), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="makes 4 channels and .* takes 3: give --align-to two files of one base"):
        latents.Teacher([tmp_path / "other.safetensors", base[1]])
    with pytest.raises(UserError, match="holds no autoencoder of wan2.1-t2v-1.3b"):
        latents.Teacher(["wan2.1-t2v-1.3b"])
    with pytest.raises(UserError, match="two files, got 3"):
        latents.Teacher([*base, base[0]])


def test_a_wan_base_reads_as_many_frames_as_make_the_same_latent_frames(tiny_folders):
    """4n + 1 pixel frames: 13 of 16 for the Wan VAE, 4 latent frames in both."""
    folder = tiny_folders / "Wan2.1-T2V-1.3B"
    files = [folder / "Wan2.1_VAE.pth", folder / "diffusion_pytorch_model.safetensors"]
    f16 = ae.Config((0, 16, 16, 16, 16), (0, 1, 1, 1, 1), 6, chunk=8, patch=4)
    teacher, net = latents.Teacher(files), tiny(f16)
    teacher.check(net.config)
    x = torch.rand(1, 3, 16, 64, 64) * 2 - 1
    z = teacher.latent(x, net.config)
    torch.testing.assert_close(z, teacher.net.encode(x[:, :, :13]))
    loss = latents.Aligner(teacher, net, lambda number: iter([x]))(x, net.encode(x))
    assert z.shape[2] == 4 and torch.isfinite(loss)


# -------------------------------------------------------------- the tricks


@pytest.mark.core
def test_neighbours_and_their_hinge():
    z = torch.randn(2, 16, 4, 8, 8)
    alike = z[:, :, ::2, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    assert abs(latents.neighbours(z)) < 0.02 and latents.neighbours(alike) == pytest.approx(1, abs=1e-3)
    assert latents.correlation(alike) == 0 and latents.correlation(z) > 0.7
    assert latents.neighbours(z[:, :, :1]).isfinite() and latents.neighbours(z[:, :, :3]).isfinite()
    one = latents.neighbours(torch.cat([z[:, :, :1, :2, :2], -z[:, :, :1, :2, :2]], 2))  # by hand
    u = torch.cat([z[:, :, :1, :2, :2], -z[:, :, :1, :2, :2]], 2)
    u = ((u - u.mean((0, 2, 3, 4), keepdim=True)) / u.std((0, 2, 3, 4), keepdim=True)).flatten(2)
    rho = torch.stack([torch.corrcoef(v.T) for v in u])
    assert one.item() == pytest.approx((rho.sum((1, 2)) - 8).mean().item() / 56, abs=1e-4)


def test_first_channels_and_hidden_cells():
    z, rng = torch.randn(2, 16, 2, 4, 4), np.random.default_rng(0)
    counts = {latents.first_channels(z, rng).abs().sum((0, 2, 3, 4)).count_nonzero().item() for _ in range(50)}
    assert counts == {2, 4, 6, 8, 10, 12, 14}
    mask = latents.MaskToken(16)
    masked = mask(z, rng)
    hidden = (masked == mask.token[:, None, None, None]).all(1)
    assert hidden.sum().item() / 2 in (8, 16, 24) and torch.equal(hidden[0], hidden[1])
    masked.square().sum().backward()
    assert mask.token.grad.abs().sum() > 0


def two_steps(out, **changes):
    """Train a toy with losses changed -> (weights, last line of the log)."""
    phases = autoencoder.choose_phases(
        autoencoder.TOY, TINY, ["low"], False, [2], 1, size=(32, 32), frames=16)
    changed = [dataclasses.replace(p, **changes) for p in phases]
    file = autoencoder.train("tiny", changed, autoencoder.ToyWorld(), out)
    return ae.load(file).state_dict(), loop.read_log(file.parent)[-1]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, quick):
    return two_steps(tmp_path_factory.mktemp("plain"))[0]


@pytest.mark.parametrize("field", ["equivariance", "correlation", "front", "masked"])
def test_each_trick_is_a_weight_of_the_same_losses(tmp_path, plain, field):
    """Trained for two steps, it gives other weights than without, and finite ones."""
    other, logged = two_steps(tmp_path, **{field: 1.0})
    assert all(torch.isfinite(v).all() for v in other.values())
    assert any(not torch.equal(plain[k], v) for k, v in other.items())
    assert field in logged or field in ("front", "masked")


# -------------------------------------------------------------- the report


@pytest.mark.core
def test_the_report_tells_a_smooth_latent_from_noise():
    noise = torch.randn(8, 16, 4, 8, 8)
    basis = torch.randn(16, 2)
    ramp = torch.linspace(-1, 1, 8)
    fields = torch.stack([ramp.expand(8, 8), ramp[:, None].expand(8, 8)])
    smooth = torch.einsum("cf,fhw,bft->bcthw", basis, fields, torch.randn(8, 2, 4)) + 0.01 * noise
    a, b = latents.report(noise), latents.report(smooth)
    assert a["leading 2"] == pytest.approx(2 / 16, abs=0.02) and b["leading 2"] > 0.99
    assert a["effective"] > 15 and b["effective"] < 2.1
    assert a["high"] == pytest.approx(8 / 15, abs=0.03) and b["high"] < 0.01
    assert abs(a["neighbours"]) < 0.05 < b["neighbours"]
