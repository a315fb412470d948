"""The toy's text encoder: sentences become rows of attributes; what it cannot use is said, with what it can."""
import warnings

import numpy as np
import pytest
import torch

import data
import encoders
from checkpoint import UserError

SENTENCE = "a large red circle moving left slowly on a blue background"


@pytest.fixture
def text():
    return encoders.ToyText()


def test_every_attribute_of_a_sentence_is_found(text):
    words = dict(size="large", colour="red", shape="circle", direction="left", speed="slowly", background="blue")
    assert text.parse(SENTENCE) == (words, [])
    assert text.parse(SENTENCE.upper() + "!") == (words, [])


def test_captions_round_trip(text):
    rng = np.random.default_rng(0)
    for _ in range(200):
        attributes = data.random_scene(rng).attributes()
        given = {name: word for name, word in attributes.items() if rng.random() < 0.7}  # partial captions too
        assert text.parse(data.caption(given)) == (given, [])


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
    assert set(encoders.SYNONYMS.values()) <= {word for words in data.WORLD.values() for word in words} | {"background"}


def test_unknown_words_are_left_out_with_a_warning_that_lists_the_vocabulary(text):
    with pytest.warns(UserWarning) as caught:
        context = text(["a shiny red circle jumping left, shiny"])
    message = str(caught[0].message)
    assert len(caught) == 1 and message.count("'shiny'") == 1 and "'jumping'" in message
    assert all(word in message for words in data.WORLD.values() for word in words)
    assert torch.equal(context, text(["a red circle left"]))


def test_there_is_one_object_so_a_second_word_for_an_attribute_is_left_out(text):
    assert text.parse("a red and yellow ring") == (dict(colour="red", shape="ring"), ["yellow"])
    assert text.parse("a large, huge ring") == (dict(size="large", shape="ring"), [])  # says the same twice


def test_a_prompt_without_any_known_word_is_refused(text):
    for prompt in ("a cat plays the piano", "", "123 !?"):
        with pytest.raises(UserError) as error:
            text([SENTENCE, prompt])
        assert repr(prompt) in str(error.value) and all(word in str(error.value) for words in data.WORLD.values() for word in words)


def test_context_has_a_row_per_attribute_and_zeros_elsewhere(text):
    context = text([SENTENCE, "a red circle", "a yellow circle"])
    assert context.shape == (3, text.text_len, text.text_dim) and context.dtype == torch.float32
    used = context.abs().sum(dim=2) > 0
    assert used.sum(dim=1).tolist() == [6, 2, 2]
    rows = list(data.WORLD)
    assert torch.equal(context[0, rows.index("colour")], context[1, rows.index("colour")])  # does not depend on the rest
    assert not torch.equal(context[1], context[2])
    assert torch.allclose(context[0].square().mean(dim=1)[:6], torch.ones(6))  # unit RMS, like the states of a language model


def test_every_word_has_a_column_of_its_own(text):
    everything = torch.stack([text.encode([{name: word}])[0].sum(0) for name, words in data.WORLD.items() for word in words])
    assert (everything != 0).any(0).sum() == len(everything) <= text.text_dim  # "blue" object and "blue" background differ


def test_null_is_a_prompt_that_says_nothing(text):
    assert torch.equal(text.null(2), text.encode([{}, {}])) and not text.null(2).any()


def test_known_sentences_bring_no_warning(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text([SENTENCE, "the small ball is going down fast", "a video showing a cyan shape that moves towards the right"])
