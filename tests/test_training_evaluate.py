"""Files through an autoencoder: what is written is what the autoencoder gives, and the
table is that of `metrics`."""
import json

import pytest
import torch
from PIL import Image

import ae
from conftest import ROOT
from files import video
from files.checkpoint import UserError
from training import evaluate, metrics
from wan import vae


@pytest.fixture
def weights(tmp_path):
    ae.save(ae.DCAEV(ae.Config((0, 8, 8, 8), (0, 1, 1, 1), 4, chunk=8)), tmp_path / "w.safetensors")
    return str(tmp_path / "w.safetensors")


def test_reconstruct_real_footage(tmp_path, weights, capsys):
    name, height, width, fps = "city", 144, 256, 12.5
    source, base = ROOT / "assets" / f"{name}.mp4", tmp_path / "out" / f"{name}_reconstruction"
    ae.main(["reconstruct", str(source), "--weights", weights, "--out", str(tmp_path / "out"), "--frames", "13", "--device", "cpu"])
    clip = video.read_clip(f"{base}.mp4")
    assert clip.shape == (3, 13, height, 2 * width) and video.clip_info(f"{base}.mp4").fps == fps

    x = video.read_clip(source, frames=13)[None]
    with torch.no_grad():
        y = ae.load(weights)(x)
    result = json.loads(base.with_suffix(".json").read_text())
    assert result["frames"] == 13 and result["latent"] == [4, 4, height // 4, width // 4] and result["compression"] == 48
    assert abs(result["psnr"] - metrics.psnr(y, x)) < 0.01 and abs(result["ssim"] - metrics.ssim(y, x)) < 1e-3
    assert metrics.psnr(clip[None, ..., :width], x) > 35  # the left half is the original
    assert base.with_suffix(".png").stat().st_size > 10_000
    assert f"PSNR    {result['psnr']:.2f} dB" in capsys.readouterr().out


def test_a_reconstruction_made_otherwise_is_not_replaced(tmp_path, weights):
    """The same settings have the same name; another size or other weights get a number."""
    def made(*more, seed=None):
        if seed is not None:
            torch.manual_seed(seed)
            net = ae.load(weights)
            torch.nn.init.normal_(net.decoder.project_out.op_list[2].conv.conv.weight)
            ae.save(net, weights)
        ae.main(["reconstruct", str(ROOT / "assets" / "city.mp4"), "--weights", weights, "--out",
                 str(tmp_path / "out"), "--frames", "1", "--device", "cpu", *more])
        return sorted(p.stem.removeprefix("city_reconstruction")
                      for p in (tmp_path / "out").glob("*.mp4"))

    assert made() == made() == [""]
    assert made("--size", "40x40") == ["", "-2"] == made()
    assert made(seed=1) == ["", "-2", "-3"] == made()


def test_reconstruct_any_size(tmp_path, weights):
    args = ["reconstruct", str(ROOT / "assets" / "city.mp4"), "--weights", weights, "--out", str(tmp_path / "out"), "--size", "37x51"]
    ae.main([*args, "--frames", "1"])
    result = json.loads((tmp_path / "out" / "city_reconstruction.json").read_text())
    assert (result["height"], result["width"], result["frames"], result["latent"]) == (37, 51, 1, [4, 2, 10, 13])
    with pytest.raises(UserError, match="--compat is gone"):
        ae.main([*args, "--compat"])
    for command in (args[:-1], ["eval", weights, "--size"]):
        with pytest.raises(UserError, match="frames of 5x80 are too small for SSIM"):
            ae.main([*command, "5x80"])


def test_reconstruct_with_a_wan_vae(tmp_path):
    """Chunks of another kind: the first frame alone, then four at a time."""
    config = vae.Config(4, 4, 3, patch=1, shortcuts=False, mean=(0, 0, 0), std=(1, 1, 1), multipliers=(1, 1), depth=1, temporal=(True,))
    net = vae.WanVAE(config).requires_grad_(False)
    result = evaluate.reconstruct(net, ROOT / "assets" / "city.mp4", tmp_path, frames=8, size=(32, 48))
    assert result["frames"] == 8 and result["latent"] == [3, 5, 16, 24]
    y = net(video.read_clip(ROOT / "assets" / "city.mp4", frames=8, size=(32, 48))[None])
    assert abs(result["psnr"] - metrics.psnr(y, video.read_clip(ROOT / "assets" / "city.mp4", frames=8, size=(32, 48))[None])) < 0.01


def test_nan_weights_write_no_black_video(tmp_path, weights):
    net = ae.load(weights)
    torch.nn.init.constant_(net.decoder.project_in.conv.weight, float("nan"))
    with pytest.raises(UserError, match="NaN"):
        evaluate.reconstruct(net, ROOT / "assets" / "city.mp4", tmp_path / "out", frames=8)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- table


@pytest.mark.core
def test_the_table_has_a_line_for_each_autoencoder(tmp_path, weights, monkeypatch, capsys):
    """Both kinds of file; PSNR is that of the model on the clips that are held out; what is missing is said."""
    monkeypatch.chdir(tmp_path)
    for name, folder in (("bunny", "films"), ("city", "films/val")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / f"{name}.mp4").symlink_to(ROOT / "assets" / f"{name}.mp4")
    monkeypatch.setattr(metrics, "colour_fields", lambda side: torch.zeros(1, 3, 8, 32, 32))
    judge = metrics.evaluate
    monkeypatch.setattr(metrics, "evaluate", lambda *args: judge(*args, optional=()))  # no networks
    ae.main(["eval", weights, "--data", "films", "--clips", "2", "--frames", "8", "--size", "64x64", "--results", "r.json", "--device", "cpu"])
    result = json.loads((tmp_path / "r.json").read_text())["results"]["w"]
    held_out = torch.stack(evaluate.clips.validation("films", 8, (64, 64), 2))
    net = ae.load(weights)
    with torch.no_grad():
        assert result["mean"]["psnr"] == pytest.approx(metrics.psnr(net(held_out), held_out), abs=1e-3)
        assert result["latent"]["rms"] == pytest.approx(net.encode(held_out).square().mean().sqrt().item(), rel=1e-4)
    printed = capsys.readouterr().out
    with Image.open(tmp_path / "r.png") as sheet:  # two clips, a row each for original and reconstruction, of four frames
        assert sheet.size == (4 * 66 * 3, 4 * 66 * 3)
    assert "| w |" in printed and "PSNR dB" in printed and "flicker latent frame" in printed and "inverse_rms" in printed


def test_any_autoencoder_is_loaded(tmp_path, weights, monkeypatch):
    assert isinstance(evaluate.load(weights), ae.DCAEV)
    monkeypatch.setattr(vae, "load", lambda path: f"Wan VAE of {path}")
    assert evaluate.load(tmp_path / "folder") == f"Wan VAE of {tmp_path / 'folder'}"
    monkeypatch.undo()
    with pytest.raises(UserError, match="none.pt does not exist"):
        evaluate.load(tmp_path / "none.pt")


def test_without_weights_film_gets_the_one_for_film_and_the_toy_world_the_toys(tmp_path, capsys):
    """The embedded ones: 23 dB on this clip in full when it was made, where the toy's has 21."""
    ae.main(["reconstruct", str(ROOT / "assets" / "bunny.mp4"), "--frames", "8", "--size", "96x160", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "bunny_reconstruction.json").read_text())
    assert result["latent"] == [128, 2, 3, 5] and result["psnr"] > 22
    ae.main(["eval", "--data", "toy", "--clips", "1", "--frames", "8", "--size", "32x32"])
    assert "| toy |" in capsys.readouterr().out
