"""The comparison: arms differ in what they say and in nothing else; films held out are held
out; a killed arm goes on."""
import json
import re

import numpy as np
import pytest
import torch

import ae
import toy
from chunk_causal import Conv3d
from experiments import temporal
from experiments.temporal import ARMS, BASE
from files import video


@pytest.mark.core
def test_arms_differ_in_one_thing():
    """Within a group all have the same clips, batches, steps and as many weights."""
    for group, field in (("temporal", "temporal"), ("chunk", "chunk")):
        arms = [arm for arm in ARMS if arm.group == group]
        assert len({(arm.frames, arm.batch) for arm in arms}) == 1
        for arm in arms:
            assert set(arm.changes) == {field} and arm.frames % arm.config.piece == 0 and arm.frames >= 2 * arm.config.piece
        with torch.device("meta"):
            sizes = {sum(p.numel() for p in ae.DCAEV(arm.config).parameters()) for arm in arms}
        assert len(sizes) == 1
    assert {arm.label for arm in ARMS if arm.group == "chunk"} == {"1", "4", "8", "20", "40"}
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    assert BASE.spatial_factor == 8 and 3 * 8 * 8 * 4 / BASE.latent_channels == 384


# ---------------------------------------------------------------------------------------------------- arms


@pytest.fixture(scope="module")
def still_life():
    """Clips of 16 frames: four random patterns per clip that stand still, each patch a mixture of 4 patterns; so 4 numbers say all of it."""
    rng = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 3 * 64, generator=rng) * torch.tensor([[8.0], [4.0], [2.0], [1.0]])
    patches = torch.randn(60, 16, 4, generator=rng) @ patterns / 100
    return temporal.rearrange(patches, "b (h w) (c p q) -> b c 1 (h p) (w q)", h=4, w=4, p=8, q=8).expand(-1, -1, 16, -1, -1)


@pytest.fixture(scope="module")
def patches(still_life):
    return temporal.Patches(still_life.split(10))


def test_patches_keep_what_their_components_say(still_life, patches):
    """Four patterns make all patches of these clips, so 40 components keep everything, and of noise 40 of 192 numbers."""
    y = patches(still_life)
    assert y.shape == (60, 40, 16, 4, 4) and y.square().mean() == pytest.approx(1, rel=0.3)
    torch.testing.assert_close(patches.back(y), still_life, atol=1e-4, rtol=0)
    noise = torch.randn(2, 3, 4, 32, 32)
    assert 0.6 < (patches.back(patches(noise)) - noise).square().mean() < 0.95


def test_an_arm_sees_and_makes_pixels(patches):
    """Its first and last layer are fixed; what is trained lies between. Whole clip and stream are the same."""
    net, x = temporal.on_patches(BASE, patches).eval(), torch.rand(1, 3, 16, 32, 32) * 2 - 1
    fixed = {name for name, _ in net.named_buffers()}
    assert {name.rsplit(".")[-1] for name in fixed} == {"mean", "basis", "rms"} and not fixed & {name for name, _ in net.named_parameters()}
    with torch.no_grad():
        assert net.encode(x).shape == (1, 2, 4, 4, 4)
        torch.testing.assert_close(net(x), temporal.whole(net, x), atol=5e-5, rtol=0)


def test_latent_frames_of_a_still_clip(patches):
    """The two latent frames of a chunk differ by what the zeros behind it do; without that tap none does."""
    arm, x = ARMS[0], torch.rand(1, 3, 16, 32, 32) * 2 - 1
    net = temporal.on_patches(arm.config, patches)
    assert temporal.within_chunks(net, arm, x) > 1e-3
    for module in net.encoder.modules():
        if isinstance(module, Conv3d):
            module.weight.data[:, :, 0] = module.weight.data[:, :, 2] = 0
    assert temporal.within_chunks(net, arm, x) < 1e-6


def test_a_window_depends_on_the_number_of_the_batch(monkeypatch):
    x = torch.rand(2, 3, 4, 64, 64)
    assert torch.equal(temporal.window(x, 3, 0), temporal.window(x, 3, 0)) and temporal.window(x, 3, 0).shape == (2, 3, 4, 32, 32)
    assert not torch.equal(temporal.window(x, 3, 0), temporal.window(x, 4, 0))
    assert torch.equal(temporal.windows(x)[1], x[0, :, :, :32, 32:]) and len(temporal.windows(x)) == 8


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_short_chunks_in_bf16_are_those_of_fp32(frames):
    """oneDNN gives garbage for a single bf16 frame of few channels: chunks of one frame are where it showed."""
    conv, x = Conv3d(3, 3, frames), torch.randn(2, 3, 8, 16, 16)
    junk = [torch.full((n,), float("nan")) for n in (10_000, 100_000) * 20]  # memory that is freed with something telling in it
    del junk
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)[0]
    assert torch.allclose(y.float(), conv(x)[0], atol=0.05)


def test_ways_to_meet_a_long_clip(patches):
    """The non-causal model sees across pieces only in one call; the others give in one call what they give as a stream."""
    x = torch.rand(1, 3, 32, 32, 32) * 2 - 1
    nets = {arm.label: temporal.on_patches(arm.config, patches).eval() for arm in ARMS if arm.group == "temporal"}
    with torch.no_grad():
        y = temporal.meet(nets["non_causal"], ARMS[0], x, "pieces")
        assert torch.allclose(y[:, :, 16:], temporal.whole(nets["non_causal"], x[:, :, 16:]), atol=1e-5)
        assert not torch.allclose(y, temporal.whole(nets["non_causal"], x), atol=1e-3)
        for name in ("chunk_causal", "causal"):
            assert torch.allclose(nets[name](x), temporal.whole(nets[name], x), atol=5e-5)


def test_the_comparison_runs_and_resumes(tmp_path, monkeypatch, capsys):
    """Two steps of two arms on toy films: results, plot, table; the second call judges what is there; the film held out is trained on by none."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a", "b", "cup")):
        (tmp_path / "films").mkdir(exist_ok=True)
        film = toy.render(toy.random_scene(np.random.default_rng(i)), 64, 64)
        video.write_video(tmp_path / "films" / f"{name}.mp4", video.to_tensor(film), fps=10)
    monkeypatch.setattr(temporal, "BASE", ae.Config((0, 16, 16), (0, 1, 1), 2, chunk=8, patch=8))
    monkeypatch.setattr(temporal, "ARMS", [temporal.Arm("temporal", t, {"temporal": t}, batch=2) for t in ("chunk_causal", "non_causal")])
    monkeypatch.setattr(temporal, "LONG", 64)
    monkeypatch.setattr(temporal, "LENGTHS", {16: 1, 64: 1})
    monkeypatch.setattr(temporal, "PATCHES", 4)
    ae.main(["compare", "--data", "films", "--groups", "temporal", "--steps", "2", "--results", "results"])
    result = json.loads((tmp_path / "results" / "compare.json").read_text())
    assert list(result["arms"]) == ["temporal-chunk_causal", "temporal-non_causal"]
    assert set(result["arms"]["temporal-non_causal"]["long"]) == {"whole", "pieces"}
    long = result["arms"]["temporal-chunk_causal"]["long"]["streamed"]
    assert len(long["psnr_frames"]) == 64 and long["psnr_beyond"] == pytest.approx(np.mean(long["psnr_frames"][16:]), abs=1e-3)
    assert (tmp_path / "results" / "compare.png").stat().st_size > 10_000 and re.search(r"^\| temporal: non_causal +\| +2 \|", capsys.readouterr().out, re.M)
    dataset = temporal.clips.Clips(tmp_path / "out" / "compare" / "films", 16, (64, 64), "train")
    assert sorted(p.rsplit("/")[-1] for p in dataset.paths) == ["a.mp4", "b.mp4"]

    monkeypatch.setattr(temporal.loop.Run, "_one_step", None)  # nothing is trained again
    ae.main(["compare", "--data", "films", "--groups", "temporal", "--steps", "2", "--results", "results"])
    again = json.loads((tmp_path / "results" / "compare.json").read_text())
    assert {k: v["psnr"] for k, v in again["arms"].items()} == {k: v["psnr"] for k, v in result["arms"].items()}
