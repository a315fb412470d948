"""The comparison: arms differ in what they say and in nothing else; films held out are held out; a killed arm goes on."""
import json

import numpy as np
import pytest
import torch

import ae
import compare_ae
import data
from compare_ae import ARMS, BASE


def test_arms_differ_in_one_thing():
    """Within a group all have the same clips, batches and steps, and but for the latent channels as many weights."""
    for group, field in (("temporal", "temporal"), ("shallow", "temporal"), ("chunk", "chunk"), ("latent", "latent_channels")):
        arms = [arm for arm in ARMS if arm.group == group]
        assert len({(arm.frames, arm.batch) for arm in arms}) == 1
        for arm in arms:
            assert set(arm.changes) == {field} and arm.frames % arm.config.piece == 0 and arm.frames >= 2 * arm.config.piece
        sizes = {sum(p.numel() for p in ae.DCAEV(arm.config).parameters()) for arm in arms}
        assert len(sizes) == (1 if group != "latent" else len(arms))
    assert {arm.label for arm in ARMS if arm.group == "chunk"} == {"1", "4", "8", "20", "40"}
    assert len({arm.name for arm in ARMS}) == len(ARMS) and BASE.spatial_factor == 32 and compare_ae.LONG == 6 * ARMS[0].frames


def test_ways_to_meet_a_long_clip():
    """The non-causal model sees across pieces only in one call; the others give in one call what they give as a stream."""
    x = torch.rand(1, 3, 32, 32, 32) * 2 - 1
    nets = {arm.label: ae.DCAEV(arm.config).eval() for arm in ARMS if arm.group == "temporal"}
    with torch.no_grad():
        y = compare_ae.pieces(nets["non_causal"], x, 16)
        assert torch.allclose(y[:, :, 16:], compare_ae.whole(nets["non_causal"], x[:, :, 16:]), atol=1e-5)
        assert not torch.allclose(y, compare_ae.whole(nets["non_causal"], x), atol=1e-3)
        for temporal in ("chunk_causal", "causal"):
            assert torch.allclose(nets[temporal](x), compare_ae.whole(nets[temporal], x), atol=5e-5)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.name in ("temporal-causal", "shallow-non_causal", "chunk-20", "latent-16")], ids=lambda arm: arm.name)
def test_arms_start_from_one_image_autoencoder(arm):
    """Inflated, it gives each frame of a clip that stands still what it gives the image, whatever the arm may see of time."""
    image, net, x = compare_ae.image_autoencoder(arm.config), ae.DCAEV(arm.config), torch.rand(1, 3, 1, 32, 32) * 2 - 1
    compare_ae.inflate(net, image.state_dict())
    with torch.no_grad():
        y = compare_ae.whole(image, x)
        assert y.std() > 0.05 and torch.allclose(compare_ae.whole(net, x.expand(-1, -1, 40, -1, -1)), y.expand(-1, -1, 40, -1, -1), atol=1e-4)


def test_the_comparison_runs_and_resumes(tmp_path, monkeypatch, capsys):
    """Two steps of two arms on toy films: results, plot, table; the second call judges what is there; the film held out is trained on by none."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a", "b", "cup")):
        (tmp_path / "films").mkdir(exist_ok=True)
        film = data.render(data.random_scene(np.random.default_rng(i)), 32, 64)
        data.write_video(tmp_path / "films" / f"{name}.mp4", data.to_tensor(film), fps=10)
    monkeypatch.setattr(compare_ae, "ARMS", [arm for arm in ARMS if arm.name in ("temporal-chunk_causal", "temporal-non_causal")])
    monkeypatch.setattr(compare_ae, "LONG", 32)
    monkeypatch.setattr(compare_ae, "LENGTHS", {16: 2, 32: 1})
    monkeypatch.setattr(compare_ae, "IMAGES", 2)
    ae.main(["compare", "--data", "films", "--steps", "2", "--image-steps", "1"])
    result = json.loads((tmp_path / "results" / "compare.json").read_text())
    assert list(result["arms"]) == ["temporal-chunk_causal", "temporal-non_causal"]
    assert set(result["arms"]["temporal-non_causal"]["long"]) == {"whole", "pieces"}
    long = result["arms"]["temporal-chunk_causal"]["long"]["streamed"]
    assert len(long["psnr_frames"]) == 32 and long["psnr_beyond"] == pytest.approx(np.mean(long["psnr_frames"][16:]), abs=1e-3)
    assert (tmp_path / "results" / "compare.png").stat().st_size > 10_000 and "| temporal: non_causal | 2 |" in capsys.readouterr().out
    dataset = compare_ae.clips.Clips(tmp_path / "out" / "compare" / "films", 16, (64, 64), "train")
    assert sorted(p.rsplit("/")[-1] for p in dataset.paths) == ["a.mp4", "b.mp4"]

    monkeypatch.setattr(compare_ae.training.Run, "_one_step", None)  # nothing is trained again
    ae.main(["compare", "--data", "films", "--steps", "2", "--image-steps", "1", "--score"])
    again = json.loads((tmp_path / "results" / "compare.json").read_text())
    assert {k: v["psnr"] for k, v in again["arms"].items()} == {k: v["psnr"] for k, v in result["arms"].items()}
