"""Metrics. Scores of autoencoders: published programs' numbers, and faults made to measure, whose size is known."""
import math
import sys

import pytest
import torch

from files.checkpoint import UserError
from training import judges, metrics


# ---------------------------------------------------------------------------------------------------- distance to the original


@pytest.mark.core
def test_psnr_and_ssim_equal_published_programs():
    """Three frames from a formula, as 8-bit values. SSIM: torchmetrics 1.9.0, data_range=(0.0, 255.0). PSNR: scikit-image 0.26.0."""
    t, h, w = torch.meshgrid(torch.arange(3.0), torch.arange(40.0), torch.arange(56.0), indexing="ij")
    wave = lambda c: 0.7 * torch.sin(0.21 * h * (c + 1) + 0.13 * w + 0.9 * t) * torch.cos(0.045 * w * (3 - c) - 0.3 * t)
    x = torch.stack([wave(c) for c in range(3)])[None]
    y = 0.9 * x.roll(1, dims=4) + 0.06 * torch.sin(1.7 * h + 2.3 * w + t)
    assert metrics.ssim_frames(y, x)[0].tolist() == pytest.approx([0.8967985510826111, 0.902414083480835, 0.9082162976264954], abs=1e-5)
    assert metrics.psnr_frames(y, x)[0].tolist() == pytest.approx([25.66316977410088, 25.782818369411025, 26.108467348697655], abs=1e-4)


# ---------------------------------------------------------------------------------------------------- what viewers notice


def step_errors(x, steps):
    """x with a brightness that jumps up and down by `steps` levels from frame to frame: its temporal errors are `steps`."""
    signs = torch.tensor([1, -1]).repeat(len(steps))[: len(steps)]
    offsets = torch.cat([torch.zeros(1), (signs * torch.tensor(steps)).cumsum(0)])
    return x + offsets[:, None, None] / 127.5


def test_flicker_by_hand():
    """Motion off by 1, 2, 2 levels between frames of one chunk and by 3 where chunks of 4 meet: flicker 3 / (5 / 3)."""
    x = 0.5 * torch.rand(2, 3, 12, 8, 8) - 0.25
    steps = [1.0, 2, 2, 3] * 2 + [1.0, 2, 2]
    y = step_errors(x, steps)
    assert metrics.temporal_error(y, x)[1].tolist() == pytest.approx(steps, rel=1e-4)
    assert metrics.flicker(y, x, 4) == pytest.approx(1.8, rel=1e-4)
    assert metrics.flicker(y, x, 8) == pytest.approx(3 / ((sum(steps) - 3) / 10), rel=1e-4)  # of the two borders, one is inside now
    assert metrics.flicker(y, x, 4, lead=1) == pytest.approx(1 / ((sum(steps) - 3) / 8), rel=1e-4)  # Wan's: before frames 1, 5, 9


def test_flicker_of_perfect_and_of_short_clips():
    x = torch.rand(1, 3, 8, 4, 4)
    still = x.clone()
    still[:, :, 4:] += 0.1  # right inside both chunks, and a jump between
    assert metrics.flicker(x, x, 4) == 1
    assert metrics.flicker(still - 0.2, x - 0.2, 4) > 1e4
    assert math.isnan(metrics.flicker(x, x, 8)) and math.isnan(metrics.flicker(x, x, 1))
    assert math.isnan(metrics.flicker(x[:, :, :1], x[:, :, :1], 4))


def test_grid_is_the_rms_of_a_repeating_pattern():
    """A tile of noise of 2 levels RMS on every cell of 16 pixels measures 2, as it does where 32 or 48 are asked for; 15 do not find it."""
    fields = metrics.colour_fields(frames=1, side=192)
    tile = torch.randn(16, 16)
    tile = 2 * (tile - tile.mean()) / tile.std(correction=0)
    y = fields + tile.repeat(12, 12) / 127.5
    for cell in (16, 32, 48):
        assert metrics.grid(y, fields, cell) == pytest.approx(2, rel=1e-3)
    assert metrics.grid(y, fields, 15) < 0.1


def test_grid_sees_a_faint_pattern_through_noise_and_slopes():
    """Noise of 8 levels, a wrong colour, a slope, a dark rim: none of them is a grid. A grid of half a level under them all is found."""
    fields = metrics.colour_fields(frames=2, side=128)
    rim = 0.3 * torch.linspace(-1, 1, 128).square()
    spoiled = 0.8 * fields - 0.03 + torch.linspace(-0.1, 0.1, 128) - rim - rim[:, None] + 8 / 127.5 * torch.randn(fields.shape)
    spoiled = spoiled.clamp(-0.9, 0.9)
    assert metrics.grid(fields, fields, 8) == 0 and metrics.grid(spoiled, fields, 8) < 0.15
    lines = torch.zeros(128)
    lines[::8] = 1  # a brighter column at the left of each cell
    lines *= 0.5 / lines.std(correction=0)
    assert metrics.grid(spoiled + lines / 127.5, fields, 8) == pytest.approx(0.5, abs=0.06)


def test_grid_needs_three_cells():
    x = torch.zeros(1, 3, 1, 95, 200)
    assert metrics.grid(x, x, 32) == 0
    with pytest.raises(UserError, match="from 191 pixels a side on, got 95x200"):
        metrics.grid(x, x, 64)


def test_colour_fields_hold_no_detail():
    """Neighbouring pixels and frames differ by at most one level."""
    x = metrics.colour_fields(frames=3, side=256)
    assert x.shape == (8, 3, 3, 256, 256) and x.abs().max() <= 0.8
    assert x.diff(dim=2).count_nonzero() == 0 and max(x.diff(dim=d).abs().max() for d in (3, 4)) < 1 / 127.5
    assert all((a - b).abs().max() > 0.2 for i, a in enumerate(x) for b in x[:i])


# ---------------------------------------------------------------------------------------------------- the table


def noisy(levels):
    """An autoencoder whose frames are off by `levels` everywhere, up and down in turns."""
    def reconstruct(x):
        return x + levels / 127.5 * torch.tensor([1.0, -1.0]).repeat(x.shape[2])[: x.shape[2], None, None]

    return reconstruct


def test_evaluate_is_the_mean_over_all_frames():
    """Two exact and two bad frames, then ten fair ones: exact frames are counted and left out of PSNR, long clips weigh more."""
    def reconstruct(x):
        y = noisy(8.0 if x.shape[2] == 4 else 2.0)(x)
        if x.shape[2] == 4:
            y[:, :, :2] = x[:, :, :2]
        return y

    clips = {"short": torch.randint(50, 200, (3, 4, 16, 16)) / 127.5 - 1, "long": torch.randint(50, 200, (3, 10, 16, 16)) / 127.5 - 1}
    result = metrics.evaluate(reconstruct, iter(clips.items()), borders={"chunk": (4, 0), "latent": (2, 0)}, optional=())
    db = lambda levels: 20 * math.log10(255 / levels)
    mean, (short, long) = result["mean"], result["clips"]
    assert mean["psnr"] == pytest.approx((2 * db(8) + 10 * db(2)) / 12, abs=1e-3) and mean["equal_frames"] == 2 and mean["clips"] == 2
    assert short["psnr"] == pytest.approx(db(8), abs=1e-3) and long["psnr"] == pytest.approx(db(2), abs=1e-3)
    assert (short["name"], short["frames"], short["height"], short["width"]) == ("short", 4, 16, 16) and result["left_out"] == {}
    assert long["psnr_frames"] == pytest.approx([db(2)] * 10, abs=1e-3) and short["psnr_frames"][0] == math.inf
    assert math.isnan(short["flicker chunk"]) and long["flicker chunk"] == pytest.approx(1, rel=1e-4)
    # pairs: 0, 8, 16 levels in the short clip, 4 in each of 9 of the long one; borders of latents after frames 1, 3, 5, 7
    assert mean["flicker latent"] == pytest.approx(((8 + 4 * 4) / 5) / ((0 + 16 + 5 * 4) / 7), rel=1e-4)
    ssim = [metrics.ssim_frames(reconstruct(x[None]), x[None])[0] for x in clips.values()]
    assert mean["ssim"] == pytest.approx(torch.cat(ssim).mean().item())


def test_evaluate_puts_colour_fields_through_the_autoencoder():
    """One that draws a dot of 16 levels into each cell of 32 pixels: RMS 16 / 32."""
    def reconstruct(x):
        y = x.clone()
        y[..., ::32, ::32] -= 16 / 127.5
        return y

    clips = [("clip", torch.zeros(3, 2, 16, 16))]
    assert metrics.evaluate(reconstruct, clips, cell=32, optional=())["mean"]["grid"] == pytest.approx(0.5, rel=2e-3)


def test_evaluate_says_what_it_leaves_out(monkeypatch):
    """Without the packages everything else is measured, and the reasons tell how to get the rest."""
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = metrics.evaluate(noisy(2.0), [("clip", torch.zeros(3, 10, 16, 16))])
    assert result["mean"].keys() == {"psnr", "ssim", "equal_frames", "clips"}
    assert result["left_out"].keys() == {"lpips", "lite0", "fvd"} and all("pip install" in why for why in result["left_out"].values())


def test_evaluate_with_networks(monkeypatch):
    """FVD is that of the whole set, of 8-bit values, and needs two clips of nine frames; perceptual columns are means over frames."""
    class TinyI3D(torch.nn.Module):  # two features: the mean colour, and the mean square
        def forward(self, x):
            return torch.stack([x.mean(dim=(1, 2, 3, 4)), x.square().mean(dim=(1, 2, 3, 4))], dim=1)

    class Brightness(torch.nn.Module):
        def per_frame(self, y, x):
            return (y - x).abs().mean(dim=(1, 3, 4))

    monkeypatch.setattr(judges.I3D, "load", TinyI3D)
    monkeypatch.setattr(metrics, "Perceptual", lambda name: Brightness())
    x = (torch.randint(0, 200, (3, 3, 9, 1, 1)) / 127.5 - 1).expand(-1, -1, -1, 16, 16).contiguous()
    clips, brighter = [(str(i), v) for i, v in enumerate(x)], lambda v: v + 10.4 / 127.5  # 10 after rounding
    mean = metrics.evaluate(brighter, clips)["mean"]
    assert mean["lpips"] == mean["lite0"] == pytest.approx(10 / 127.5, rel=1e-4)
    features = lambda v: TinyI3D()(v)
    assert mean["fvd"] == pytest.approx(judges.frechet(features(x + 10 / 127.5), features(x)), rel=1e-3)
    assert abs(metrics.evaluate(lambda v: v, clips)["mean"]["fvd"]) < 1e-9
    one = metrics.evaluate(brighter, clips[:1])
    short = metrics.evaluate(brighter, [*clips, ("brief", x[0, :, :8])])
    assert "fvd" not in one["mean"] and "two clips" in one["left_out"]["fvd"]
    assert "fvd" not in short["mean"] and short["left_out"]["fvd"] == "brief has 8 frames, but I3D needs 9."


def test_a_broken_autoencoder_does_not_look_perfect():
    """NaN in one frame is NaN in every mean."""
    def reconstruct(x):
        y = noisy(2.0)(x)
        y[:, :, 3] = math.nan
        return y

    mean = metrics.evaluate(reconstruct, [("clip", torch.zeros(3, 8, 16, 16))], borders={"chunk": (4, 0)}, optional=())["mean"]
    assert all(math.isnan(mean[column]) for column in ("psnr", "ssim", "flicker chunk"))


def test_evaluate_refuses_other_shapes_and_no_clips():
    with pytest.raises(UserError, match=r"\[1, 3, 4, 8, 8\] of clip, which is \[1, 3, 5, 8, 8\]"):
        metrics.evaluate(lambda x: x[:, :, :4], [("clip", torch.zeros(3, 5, 8, 8))], optional=())
    with pytest.raises(UserError, match="no clips"):
        metrics.evaluate(lambda x: x, [], optional=())


@pytest.mark.core
def test_table():
    rows = {"ours": {"psnr": 31.0825, "flicker chunk": 1.234, "flicker latent": 1.5, "equal_frames": 0, "clips": 12},
            "Wan": {"psnr": 9.5, "ssim": 0.90094, "fvd": 13.7873, "flicker latent": math.nan, "clips": 12}}
    assert metrics.format_table(rows).splitlines() == [
        "|      | PSNR dB |   SSIM |  FVD | flicker chunk | flicker latent | clips |",
        "| ---- | ------: | -----: | ---: | ------------: | -------------: | ----: |",
        "| ours |   31.08 |      - |    - |          1.23 |           1.50 |    12 |",
        "| Wan  |    9.50 | 0.9009 | 13.8 |             - |            nan |    12 |"]


def test_latent_statistics():
    """Over all elements of all latents, whatever their sizes; bf16 is summed in double."""
    latents = [torch.randn(1, 4, 3, 5, 5) + 2, torch.randn(2, 4, 1, 2, 2)]
    every = torch.cat([z.flatten() for z in latents]).double()
    s = metrics.latent_statistics(iter(latents))
    assert s["mean"] == pytest.approx(every.mean().item()) and s["std"] == pytest.approx(every.std(correction=0).item())
    assert s["rms"] == pytest.approx(every.square().mean().sqrt().item()) and s["inverse_rms"] * s["rms"] == pytest.approx(1)
    assert metrics.latent_statistics([torch.full((9999,), 1.0078125, dtype=torch.bfloat16)])["mean"] == pytest.approx(1.0078125)
