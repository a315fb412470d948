"""The toy's attributes are read back from pixels, and prompts scored by them."""
import pytest
import torch
import torch.nn.functional as F

import toy
from training import toy_score

CLIPS = 48


@pytest.fixture(scope="module")
def world():
    clips, scenes = toy.toy_batch(3, CLIPS)
    return clips, [s.attributes() for s in scenes]


@pytest.mark.parametrize("change", {
    "clean": lambda x: x,
    "noisy": lambda x: x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
    "blurred": lambda x: F.avg_pool3d(x, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False),
    "half resolution": lambda x: F.avg_pool3d(x, (1, 2, 2)),
}.items(), ids=lambda c: c[0])
def test_attributes_are_read_back(world, change):
    clips, attributes = world
    fit = toy_score.prompt_fit(change[1](clips), attributes)
    assert fit.keys() == {*toy.WORLD, "mean"} and min(fit.values()) >= 0.97, fit


def test_half_the_frames_are_enough(world):
    clips, attributes = world
    assert toy_score.prompt_fit(clips[:12, :, ::2], attributes[:12])["direction"] == 1


@pytest.mark.parametrize("background", toy.BACKGROUNDS)
def test_an_empty_scene_has_a_background_and_nothing_else(background):
    colour = torch.tensor(toy.BACKGROUNDS[background]).float().div(127.5).sub(1)
    empty = colour.view(3, 1, 1, 1) + 0.05 * torch.randn(3, 8, 64, 64)
    assert toy_score.read_attributes(empty) == {**dict.fromkeys(toy.WORLD), "background": background}


@pytest.mark.parametrize("size", [64, 8], ids=["fine", "coarse"])
def test_noise_shows_no_object(size):
    noise = F.interpolate(torch.randn(1, 3, 8, size, size), (8, 64, 64), mode="trilinear")[0]
    found = toy_score.read_attributes(noise)
    assert [found[name] for name in ("size", "colour", "shape", "direction", "speed")] == [None] * 5
    clip = toy.toy_batch(0, 1)[0][0]
    assert toy_score.shows_something([noise, clip, clip]) == pytest.approx(2 / 3)


def test_still_and_very_short_clips_have_no_direction(world):
    still = toy_score.read_attributes(world[0][0, :, 15:16].expand(-1, 16, -1, -1))
    assert still["direction"] is None and still["speed"] is None and still["shape"] == world[1][0]["shape"]
    assert toy_score.read_attributes(world[0][0, :, :1])["direction"] is None


def test_prompt_fit_counts_what_the_prompt_asks_for(monkeypatch):
    seen = dict(size="small", colour="red", shape="ring", direction=None, speed="slowly", background="blue")
    monkeypatch.setattr(toy_score, "read_attributes", lambda video, colours: seen)
    fit = toy_score.prompt_fit([0, 0], [dict(colour="red", shape="circle", speed="slowly"), dict(colour="blue", direction="up")])
    # colour 1 of 2, shape 0 of 1, direction undecidable counts as wrong; speed is reported but not part of the mean
    assert fit == dict(colour=0.5, shape=0, direction=0, speed=1, mean=pytest.approx(0.5 / 3))
    assert toy_score.prompt_fit([0], [dict(speed="quickly")]) == dict(speed=0, mean=0)
    with pytest.raises(ValueError):  # as many videos as prompts
        toy_score.prompt_fit([0], [seen, seen])


def test_chance_is_guessing():
    assert toy_score.chance("shape") == 1 / 4 and toy_score.chance("colour") == 1 / 6
    assert toy_score.chance("mean") == pytest.approx((1 / 6 + 1 / 4 + 1 / 4 + 1 / 6) / 4)
