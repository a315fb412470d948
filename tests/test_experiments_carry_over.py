"""LoRAs of the base on the deep model: a word more, and the program on tiny models."""
import json

import pytest
import torch

import toy
from experiments import carry_over
from training import toy_score


@pytest.mark.core
def test_the_new_word_is_none_of_the_old_ones():
    """Its clips are read as orange by the longer palette, and never by the toy's own; its
    column in the context is one that no prompt has used."""
    scenes = carry_over.new_scenes(4, seed=0)
    clips = toy.clips_of(scenes)
    prompts = [scene.attributes() for scene in scenes]
    assert toy_score.prompt_fit(clips, prompts, carry_over.COLOURS)["colour"] == 1
    assert toy_score.prompt_fit(clips, prompts)["colour"] == 0
    new = carry_over.Words().encode([{"colour": carry_over.WORD}])
    old = toy.ToyText().encode([{name: word} for name in toy.WORLD for word in toy.WORLD[name]])
    assert new.any() and not (old * new).any()
    assert torch.equal(carry_over.Words().encode(prompts[:1])[:, 2:], toy.ToyText().encode(
        [{k: v for k, v in prompts[0].items() if k != "colour"}])[:, 2:])


def test_the_experiment_on_tiny_models(tiny_toy, tmp_path, monkeypatch, capsys):
    """Every model is scored once, also when the command is run again; what is adapted with
    the LoRA merged begins from a base that has it."""
    for name, value in dict(CLIPS=8, BATCH=2, RANK=2, SHOWN=2).items():
        monkeypatch.setattr(carry_over, name, value)
    monkeypatch.setattr(carry_over.toy_base, "SHARD", 64)
    real = carry_over.sample.videos
    monkeypatch.setattr(carry_over.sample, "videos", lambda model, prompts, steps: real(
        model, prompts, steps=1))
    seen = []
    monkeypatch.setattr(carry_over.adapt, "adapt", lambda base, settings, args: seen.append(base))
    monkeypatch.setattr(carry_over.released, "load_model", adapted_is_dc(carry_over.released))
    argv = ["--steps", "1", "--seeds", "2", "--adaptations", "1", "--prompts", "2",
            "--out", str(tmp_path / "out")]
    carry_over.main(argv)
    first = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "carry_over.json").read_text())["rows"]
    assert rows.keys() == {"base, no LoRA", "deep, no LoRA", "base, its own", "base, the deep's",
                           "deep, its own", "deep, the base's", "adapted with the base's",
                           "adapted without", "adapted, then the base's"}
    assert rows["deep, the base's"].keys() == {"0.5", "1.0", "1.5"}
    assert rows["deep, the base's"]["1.0"]["new"]["seeds"] == 2
    assert (tmp_path / "out" / "carry_over.png").exists()
    merged, plain, _ = seen
    assert merged.transformer.name == "merged-0.safetensors" and plain.transformer is None
    monkeypatch.setattr(carry_over.sample, "videos", None)  # nothing is made again
    carry_over.main(argv)
    assert capsys.readouterr().out == first


def adapted_is_dc(released):
    """`released.load_model` that takes the folder of an adaptation for the embedded model."""
    load = released.load_model
    return lambda name, **more: load(name if name in ("base", "dc") else "dc", **more)
