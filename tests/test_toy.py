"""The toy world: reproducible, says what it shows; its words are found in prompts."""
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import toy
from conftest import ROOT
from files import video
from files.checkpoint import UserError

SENTENCE = "a large red circle moving left slowly on a blue background"


# ---------------------------------------------------------------------------------------------------- clips


def test_a_seed_is_a_batch():
    (x, scenes), (again, _), (other, _) = (toy.toy_batch(seed, 3, 16, 32) for seed in (1, 1, 2))
    assert x.shape == (3, 3, 16, 32, 32) and x.dtype == torch.float32 and -1 <= x.min() and x.max() <= 1
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert len({toy.caption(s) + str(s.along) for s in scenes}) == 3
    later = video.to_tensor(toy.render(scenes[0], 8, 32, start=8))  # entered 8 frames later
    assert torch.equal(later, x[0, :, 8:])
    free, painted = toy.toy_batch(1, 3, 16, 32, any_colour=True)  # every other in any colour
    assert torch.equal(free[0], x[0]) and not torch.equal(free[1], x[1]) and painted[1].paint


def test_captions_say_every_attribute():
    scene = toy.random_scene(np.random.default_rng(0))
    assert set(scene.attributes()) == set(toy.WORLD)
    assert all(word in toy.caption(scene).split() for word in scene.attributes().values())
    words = dict(size="large", colour="red", shape="circle", direction="left", speed="slowly", background="blue")
    assert toy.caption(words) == "a large red circle moving left slowly on a blue background"
    assert toy.caption(dict(colour="red")) == "a red shape"


def test_attributes_are_what_is_drawn():
    """The sprite moves as far and in the direction that its words say, and covers what its size says."""
    for direction, (sx, sy) in toy.STEP.items():
        for speed, travel in toy.TRAVEL.items():
            for size, radius in toy.RADIUS.items():
                words = dict(size=size, colour="red", shape="circle", direction=direction, speed=speed, background="black")
                clip = toy.render(toy.scene_of(words, np.random.default_rng(0)), frames=toy.FRAMES, size=64)
                red = clip[..., 0] > 128
                (y0, x0), (y1, x1) = (np.argwhere(red[i]).mean(axis=0) for i in (0, -1))
                assert np.allclose([x1 - x0, y1 - y0], (1 - 1 / toy.FRAMES) * travel * 64 * np.array([sx, sy]), atol=0.3)
                assert abs(red[0].sum() - np.pi * (0.94 * radius * 64) ** 2) < 0.1 * red[0].sum()


def test_held_out_prompts_are_fixed():
    assert toy.held_out_prompts(4) == toy.held_out_prompts(6)[:4]


# ---------------------------------------------------------------------------------------------------- the vocabulary


@pytest.fixture
def text():
    return toy.ToyText()


def test_every_attribute_of_a_sentence_is_found(text):
    words = dict(size="large", colour="red", shape="circle", direction="left", speed="slowly", background="blue")
    assert text.parse(SENTENCE) == (words, [])
    assert text.parse(SENTENCE.upper() + "!") == (words, [])


def test_captions_round_trip(text):
    rng = np.random.default_rng(0)
    for _ in range(200):
        attributes = toy.random_scene(rng).attributes()
        given = {name: word for name, word in attributes.items() if rng.random() < 0.7}  # partial captions too
        assert text.parse(toy.caption(given)) == (given, [])


@pytest.mark.parametrize("prompt, words", {
    "a blue ring on a green background": dict(colour="blue", shape="ring", background="green"),
    "blue background, green ring": dict(colour="green", shape="ring", background="blue"),
    "green square against a green backdrop": dict(colour="green", shape="square", background="green"),
    "a black background": dict(background="black"),
    "blue": dict(colour="blue"),
}.items())
def test_a_colour_before_background_is_the_backgrounds(text, prompt, words):
    assert text.parse(prompt) == (words, [])


def test_synonyms_mean_words_of_the_world(text):
    assert text.parse("a tiny magenta disk drifting upwards rapidly over a grey backdrop") == (
        dict(size="small", colour="purple", shape="circle", direction="up", speed="quickly", background="gray"), [])
    assert set(toy.SYNONYMS.values()) <= {word for words in toy.WORLD.values() for word in words} | {"background"}


def test_unknown_words_are_left_out_with_a_warning_that_lists_the_vocabulary(text):
    with pytest.warns(UserWarning) as caught:
        context = text(["a shiny red circle jumping left, shiny"])
    message = str(caught[0].message)
    assert len(caught) == 1 and message.count("'shiny'") == 1 and "'jumping'" in message
    assert all(word in message for words in toy.WORLD.values() for word in words)
    assert torch.equal(context, text(["a red circle left"]))


def test_there_is_one_object_so_a_second_word_for_an_attribute_is_left_out(text):
    assert text.parse("a red and yellow ring") == (dict(colour="red", shape="ring"), ["yellow"])
    assert text.parse("a large, huge ring") == (dict(size="large", shape="ring"), [])  # says the same twice


def test_a_prompt_without_any_known_word_is_refused(text):
    for prompt in ("a cat plays the piano", "", "123 !?"):
        with pytest.raises(UserError) as error:
            text([SENTENCE, prompt])
        assert repr(prompt) in str(error.value) and all(word in str(error.value) for words in toy.WORLD.values() for word in words)


def test_context_has_a_row_per_attribute_and_zeros_elsewhere(text):
    context = text([SENTENCE, "a red circle", "a yellow circle"])
    assert context.shape == (3, text.text_len, text.text_dim) and context.dtype == torch.float32
    used = context.abs().sum(dim=2) > 0
    assert used.sum(dim=1).tolist() == [6, 2, 2]
    rows = list(toy.WORLD)
    assert torch.equal(context[0, rows.index("colour")], context[1, rows.index("colour")])  # does not depend on the rest
    assert not torch.equal(context[1], context[2])
    assert torch.allclose(context[0].square().mean(dim=1)[:6], torch.ones(6))  # unit RMS, like the states of a language model


def test_every_word_has_a_column_of_its_own(text):
    everything = torch.stack([text.encode([{name: word}])[0].sum(0) for name, words in toy.WORLD.items() for word in words])
    assert (everything != 0).any(0).sum() == len(everything) <= text.text_dim  # "blue" object and "blue" background differ


def test_null_is_a_prompt_that_says_nothing(text):
    assert torch.equal(text.null(2), text.encode([{}, {}])) and not text.null(2).any()


def test_known_sentences_bring_no_warning(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text([SENTENCE, "the small ball is going down fast", "a video showing a cyan shape that moves towards the right"])


# ---------------------------------------------------------------------------------------------------- command line


def test_the_script_shows_the_toy_world(tmp_path):
    command = [sys.executable, ROOT / "toy.py", "--out", tmp_path, "--clips", "2"]
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    assert video.read_clip(tmp_path / "toy.mp4").shape == (3, 2 * toy.FRAMES, 4 * toy.SIZE, 4 * toy.SIZE) and (tmp_path / "toy.png").exists()
