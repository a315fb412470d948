"""Prompt to video: the guided loop, any length and size, images, the command line and what it says when something is wrong.

Most tests run on tiny random models in place of the embedded ones (conftest.py); the last ones on the embedded weights themselves.
"""
import contextlib
import dataclasses
import errno
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import ae
import dit
import kernels
import lora
import sample
import toy
from conftest import ROOT
from files import checkpoint, errors, folders, video
from files.checkpoint import UserError
from gpu import choose
from training import toy_score
from wan import released, session

SMALL = dict(frames=8, size=(32, 32), steps=2)


@pytest.fixture(params=["base", "dc"])
def model(tiny_toy, request):
    return released.load_model(request.param)


@pytest.fixture
def spy(model):
    """What the transformer was called with: a list of (x, t, context)."""
    calls = []
    model.net.register_forward_pre_hook(lambda module, args: calls.append(args))
    return calls


# ---------------------------------------------------------------------------------------------------- the guided loop


@pytest.mark.core
def test_a_seed_is_a_video(model):
    context = model.text(["a red circle"])
    first, again, other = (sample.generate(model, context, seed=s, **SMALL) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=0.1)


def test_a_batch_gives_what_single_runs_give(model):
    """Sample i of a batch has the noise of `seed + i`, however the prompts are cut into batches."""
    prompts = ["a red circle", "a blue ring moving up", "a small square"]
    batch = sample.generate(model, model.text(prompts), seed=5, **SMALL)
    single = [sample.generate(model, model.text([p]), seed=5 + i, **SMALL) for i, p in enumerate(prompts)]
    torch.testing.assert_close(batch, torch.cat(single), rtol=0, atol=1e-5)
    cut = [torch.stack(sample.videos(model, prompts, batch=n, seed=5, **SMALL)) for n in (3, 2)]
    assert cut[0].shape == (3, 3, 8, 32, 32)
    torch.testing.assert_close(*cut, rtol=0, atol=1e-5)


def test_prompts_may_be_attributes(model):
    words, sentence = [dict(colour="red", shape="ring")], ["a red ring"]
    assert torch.equal(sample.videos(model, words, **SMALL)[0], sample.videos(model, sentence, **SMALL)[0])


@pytest.mark.core
def test_guidance_takes_two_passes_and_guidance_1_only_one(model, spy):
    context = model.text(["a red circle"])
    sample.generate(model, context, guidance=1, plain=True, **SMALL)
    assert [torch.equal(c, context) for _, _, c in spy] == [True] * 2  # steps
    spy.clear()
    sample.generate(model, context, guidance=3, plain=True, cfg_batch=False, **SMALL)
    assert [torch.equal(c, context) for _, _, c in spy] == [True, False] * 2
    assert all(torch.equal(c, model.text.null(1)) for _, _, c in spy[1::2])


def test_the_two_passes_may_be_one_batch(model, spy):
    """Same latent, half the calls; the prompts of the batch may differ in length."""
    context, null = model.text(["a red circle", "a ring"]), torch.randn(2, 3, 32)
    two, one = (sample.generate(model, context, null=null, cfg_batch=batch, **SMALL) for batch in (False, True))
    assert [len(x) for x, *_ in spy] == [2, 2, 2, 2] + [4, 4]
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cfg_batch", [False, True])
def test_what_is_kept_between_steps_changes_nothing(model, cfg_batch):
    """Keys and values of the prompt, times of all steps: exact to rounding (spec wan 11.3)."""
    context = model.text(["a red circle"])
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    kept, plain = (sample.generate(model, context, image, plain=plain, cfg_batch=cfg_batch, **SMALL) for plain in (False, True))
    torch.testing.assert_close(kept, plain, rtol=0, atol=1e-5)


def test_noise_may_be_given(model):
    context, shape = model.text(["a red circle"]), model.latent_shape(8, (32, 32))
    noise = torch.randn(1, model.net.config.out_channels, *shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(sample.generate(model, context, noise=noise, **SMALL), sample.generate(model, context, seed=7, **SMALL))
    with pytest.raises(UserError, match="the noise has shape .* but 8 frames of 32x32 need"):
        sample.generate(model, context, noise=noise[:, :, :1], **SMALL)


def test_guidance_moves_the_video_towards_the_prompt(model):
    """It is linear in the velocities, so with one Euler step it is linear in the video."""
    run = lambda g: sample.generate(model, model.text(["a red circle"]), guidance=g, frames=8, size=(32, 32), steps=1, solver="euler")
    torch.testing.assert_close(run(5) - run(0), 5 * (run(1) - run(0)), rtol=0, atol=1e-4)


def test_all_solvers_go_to_the_same_place(model):
    run = lambda solver: sample.generate(model, model.text(["a red circle"]), frames=4, size=(32, 32), steps=40, solver=solver)
    first, *others = map(run, ("unipc", "unipc_diffusers", "dpm++", "euler"))
    for x in others:  # each on its own way
        assert 0 < (x - first).square().mean().sqrt() < 0.1 * first.std()


def test_the_defaults_are_the_models_own(model):
    context = model.text(["a red circle"])
    own = dict(frames=8, size=(32, 32), steps=2, shift=5.0, guidance=2.0, solver="euler")
    changed = dataclasses.replace(model, **own)
    assert torch.equal(sample.generate(changed, context), sample.generate(model, context, **own))


@pytest.mark.parametrize("frames", [1, 5, 33])
@pytest.mark.parametrize("size", [(64, 64), (50, 70), (1, 33)], ids=str)
def test_any_length_and_size_is_what_comes_out(model, frames, size):
    z = sample.generate(model, model.text(["a red circle"]), frames=frames, size=size, steps=1)
    pieces = list(model.decode(z, frames, size))
    assert torch.cat(pieces, dim=2).shape == (1, 3, frames, *size) and all(p.shape[2] for p in pieces)


@pytest.mark.core
def test_the_streamed_decode_equals_the_whole(model):
    z = sample.generate(model, model.text(["a red circle"]), frames=33, size=(50, 70), steps=1)
    pieces = list(model.decode(z, 33, (50, 70)))
    whole = model.ae.decode(z / model.ae.config.scale, 33, (50, 70))
    assert sum(p.shape[2] for p in pieces) == 33 and len(pieces) > 1
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, rtol=0, atol=5e-5)


def test_the_transformer_sees_latents_of_unit_scale(model):
    x = torch.rand(1, 3, 8, 32, 32) * 2 - 1
    model.ae.config = dataclasses.replace(model.ae.config, scale=3.0)
    torch.testing.assert_close(model.encode(x), 3 * model.ae.encode(x))
    torch.testing.assert_close(torch.cat(list(model.decode(model.encode(x), 8, (32, 32))), 2), model.ae(x))


def test_nan_stops_the_loop_at_once(model, spy):
    with torch.no_grad():
        model.net.head.head.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="became NaN at step 1 of 2"):
        sample.generate(model, model.text(["a red circle"]), guidance=1, **SMALL)
    assert len(spy) == 1  # of 2 steps


def test_the_deep_model_has_a_quarter_of_the_tokens(tiny_toy):
    count = lambda m: dit.tokens(m.net.config, m.latent_shape(m.frames, m.size))
    assert count(released.load_model("base")) == 400 and count(released.load_model("dc")) == 100


# ---------------------------------------------------------------------------------------------------- a step made fast


@pytest.fixture
def recordings(monkeypatch):
    """A stand-in for CUDA graphs: what is recorded runs again from the same inputs into the same output. -> list of the functions recorded."""
    recorded = []

    def record(function, inputs):
        recorded.append(function)
        output = torch.empty_like(function(*inputs))  # recording computes nothing
        return lambda: output.copy_(function(*inputs)), output

    monkeypatch.setattr(kernels, "record", record)
    return recorded


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("more", [dict(), dict(cfg_batch=False), dict(image=torch.zeros(1, 3, 32, 32))], ids=str)
def test_a_recorded_step_gives_what_the_steps_give(model, recordings, steps, more):
    """For every step count and solver that keeps older velocities: each step's own time is read, and no result is overwritten by the next."""
    context = model.text(["a red circle"])
    run = lambda graph: sample.generate(model, context, frames=8, size=(32, 32), steps=steps, graph=graph, **more)
    assert torch.equal(run(True), run(False))
    assert len(recordings) == (steps > 1)


def test_another_prompt_or_size_needs_no_restart(model, recordings):
    for prompt, size in (("a red circle", (32, 32)), ("a blue ring moving up", (32, 32)), ("a ring", (64, 32))):
        context = model.text([prompt])
        runs = [sample.generate(model, context, frames=8, size=size, steps=3, graph=graph) for graph in (True, False)]
        assert torch.equal(*runs)


def test_a_driver_that_refuses_graphs(model, monkeypatch):
    """One warning, the same video."""
    def refuse(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(kernels, "record", refuse)
    context = model.text(["a red circle"])
    with pytest.warns(UserWarning, match="could not be recorded as a CUDA graph .operation not permitted when stream is capturing.") as said:
        z = sample.generate(model, context, frames=8, size=(32, 32), steps=4, graph=True)
    assert len(said) == 1 and torch.equal(z, sample.generate(model, context, frames=8, size=(32, 32), steps=4))


def test_blocks_compile_whole_and_once(tiny_toy):
    """One graph for all blocks, no breaks (`fullgraph` raises at one), nothing compiled again at later steps or for another prompt."""
    import torch._dynamo as dynamo

    model = released.load_model("dc")
    contexts = [model.text([prompt]) for prompt in ("a red circle", "a blue ring")]
    plain = [sample.generate(model, c, frames=8, size=(32, 32), steps=2) for c in contexts]
    dynamo.reset()
    dynamo.utils.counters.clear()
    choose.compile_blocks(model.net, backend="eager")  # the graph, without the minute that generating code takes
    found = [sample.generate(model, c, frames=8, size=(32, 32), steps=2, compiled=True) for c in contexts]
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1 and not dynamo.utils.counters["graph_break"]
    sample.generate(model, contexts[0], frames=8, size=(64, 32), steps=2, compiled=True)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the count can tell: a new size is a new graph
    dynamo.reset()


def test_slow_path_equals_the_fast_one(tiny_toy, out):
    for name, flags in (("fast", []), ("slow", ["--slow"])):
        sample.main(["--prompt", "a red circle", "--name", name, "--out", str(out), *flags, *QUICK])
    fast, slow = (checkpoint.load_tensors(out / f"{name}.safetensors")[0]["latent"] for name in ("fast", "slow"))
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
    assert json.loads((out / "slow.json").read_text())["choices"][0] == "thin operations: plain (switched off)"
    kernels.use()


def test_eight_bits_from_the_command_line(tiny_toy, out, capsys):
    """On a device that multiplies no fp8 the same numbers are computed in fp32, and the first lines say so."""
    sample.main(["--prompt", "a ring", "--out", str(out), "--name", "a", "--fp8", *QUICK])
    assert "matrix products: fp8, computed in fp32: cpu multiplies no fp8 (for measuring the quality)" in capsys.readouterr().out


def test_frames_are_made_ahead():
    """The next piece is made while this one is used, no more than one ahead; errors of the maker reach the user, and all pieces come in order."""
    made, used = [], []

    def pieces():
        for i in range(5):
            made.append(i)
            yield torch.full((2,), i)
        raise UserError("the video holds NaN")

    with pytest.raises(UserError, match="holds NaN"):
        for piece in session.ahead(pieces()):
            used.append(int(piece[0]))
            assert len(made) <= len(used) + 1
    assert used == made == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("flags, says", [
    (["--slow", "--fp8"], "--slow is the plain path: leave --compile and --fp8 away"),
    (["--reuse", "0.1"], "--reuse is gone: fewer --steps come nearer"),
    (["--guidance-interval", "0.1,0.9"], "--guidance-interval is gone: fewer --steps"),
    (["--lora-high", "a.safetensors"], "--lora-high is gone: use --lora FILE:STRENGTH:high"),
])
def test_flags_that_do_not_fit(tiny_toy, out, capsys, flags, says):
    assert says in refusal(capsys, "--prompt", "a ring", "--out", out, *flags)


def test_an_old_gpu_computes_in_fp32_and_says_so(tiny_toy, out, capsys, monkeypatch):
    monkeypatch.setattr(choose, "without_bf16", lambda device: "Tesla V100 has no bf16 (it is older than Ampere)")
    sample.main(["--prompt", "a ring", "--out", str(out), "--name", "a", "--dtype", "bf16", *QUICK])
    assert "matrix products: fp32, because Tesla V100 has no bf16" in capsys.readouterr().out
    assert json.loads((out / "a.json").read_text())["settings"]["dtype"] == "fp32"


def test_so_does_a_cpu_without_bf16_but_not_in_a_plan_for_another_machine(tiny_toy, out, capsys, monkeypatch):
    monkeypatch.setattr(choose.kernels, "bf16_units", lambda: False)
    for more, said in (([], True), (["--plan"], False)):
        sample.main(["--prompt", "a ring", "--out", str(out), "--dtype", "bf16", *more, *QUICK])
        assert ("matrix products: fp32, because this CPU has no units for bf16" in capsys.readouterr().out) == said


def test_streamed_blocks_are_neither_compiled_nor_eight_bits():
    model = released.outline("dc-wan2.1-t2v-14b", torch.bfloat16)
    model.offload = "blocks"
    with pytest.raises(UserError, match="--fp8 needs all blocks on the device, but here they are streamed"):
        sample.check_streamed(model, sample.Sampling(fp8=True))


# ---------------------------------------------------------------------------------------------------- image to video


def test_the_picture_stands_beside_the_noise_in_both_passes(model, spy):
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    with_image = sample.generate(model, model.text(["a red circle"]), image, cfg_batch=False, **SMALL)
    with torch.no_grad():  # with gradients other kernels run, which round differently
        condition, z = model.condition(1, model.latent_shape(8, (32, 32)), image), model.net.config.out_channels
    assert len(spy) == 4 and all(torch.equal(x[:, z:], condition) for x, *_ in spy)
    spy.clear()
    without = sample.generate(model, model.text(["a red circle"]), cfg_batch=False, **SMALL)
    assert all(not x[:, z:].any() for x, *_ in spy)
    assert not torch.allclose(with_image, without)


def test_pictures_of_any_size(model):
    image = torch.rand(2, 3, 50, 70) * 2 - 1
    z = sample.generate(model, model.text(["a red circle", "a ring"]), image, frames=5, size=(50, 70), steps=1)
    assert z.shape == (2, model.net.config.out_channels, *model.latent_shape(5, (50, 70)))


def test_a_text_to_video_model_refuses_a_picture(model):
    config = dataclasses.replace(model.net.config, in_channels=model.net.config.out_channels)
    text_only = dataclasses.replace(model, net=dit.WanDiT(config), name="plain", task="t2v")
    context = model.text(["a red circle"])
    assert sample.generate(text_only, context, **SMALL).shape[0] == 1
    with pytest.raises(UserError, match="plain is a text-to-video model: leave --image away"):
        sample.generate(text_only, context, torch.zeros(1, 3, 32, 32), **SMALL)


# ---------------------------------------------------------------------------------------------------- command line

QUICK = ["--frames", "5", "--size", "50x70", "--steps", "2"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new folder" / "out"


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def refusal(capsys, *argv):
    """Run the command line with arguments it must refuse -> the one sentence it says."""
    with pytest.raises(SystemExit) as e, errors.user_errors():
        sample.main(list(map(str, argv)))
    said = capsys.readouterr().err
    assert e.value.code in (1, 2) and "Traceback" not in said
    said = said.splitlines()[-1]
    assert re.match(r"(\S+: )?error: ", said)
    return said


@pytest.mark.core
def test_the_command_writes_video_sheet_settings_and_latent(tiny_toy, out, capsys):
    sample.main(["--prompt", "a red circle", "--name", "a", "--out", str(out), "--seed", "3", *QUICK])
    assert files(out) == ["a.json", "a.mp4", "a.png", "a.safetensors"]
    assert video.read_clip(out / "a.mp4").shape == (3, 5, 200, 280)  # enlarged 4 times
    assert Image.open(out / "a.png").width == 5 * 2 * (70 + 2)
    report = json.loads((out / "a.json").read_text())
    assert report["tokens"] == 2 * 4 * 5 and report["seconds"].keys() == {"load", "text", "transformer", "decode"}
    assert report["settings"]["guidance"] == 3 and report["settings"]["seed"] == 3  # also what was not given
    latent, metadata = checkpoint.load_tensors(out / "a.safetensors")
    model = released.load_model("dc")
    again = sample.generate(model, model.text(["a red circle"]), frames=5, size=(50, 70), steps=2, seed=3)
    torch.testing.assert_close(latent["latent"], again)
    assert metadata["settings"] == report["settings"]
    assert "5 frames of 50x70, 40 tokens, 2 steps x 2 passes" in capsys.readouterr().out


def test_the_words_of_the_toy(capsys):
    sample.main(["--words"])
    example = capsys.readouterr().out.split('"')[1]
    found, unknown = toy.ToyText().parse(example)
    assert found.keys() == toy.WORLD.keys() and not unknown
    assert "--prompt says nothing to --words" in refusal(capsys, "--words", "--prompt", "a ring")


def test_model_image_solver_and_type_from_the_command_line(tiny_toy, out):
    Image.new("RGB", (90, 60), "red").save(out.parent.parent / "picture.png")
    sample.main(["--prompt", "a ring", "--out", str(out), "--model", "base", "--image", str(out.parent.parent / "picture.png"),
                 "--solver", "euler", "--guidance", "1", "--shift", "5", "--dtype", "bf16", *QUICK])
    assert files(out) == [f"base-a-ring-0.{suffix}" for suffix in ("json", "mp4", "png", "safetensors")]
    report = json.loads((out / "base-a-ring-0.json").read_text())
    assert report["model"] == "toy base" and report["passes"] == 1


def test_a_folder_and_a_lora_file_are_models_too(tiny_toy, tmp_path):
    """What adapt.py writes: the merged transformer with its autoencoder, and the same as a LoRA on the base."""
    dc = released.load_model("dc")
    dit.save(dc.net, tmp_path / "transformer.safetensors")
    ae.save(dc.ae, tmp_path / "ae.safetensors")
    made = [sample.videos(released.load_model(name), ["a red circle"], **SMALL)[0]
            for name in ("dc", str(tmp_path), str(tiny_toy / "toy-dc-lora.safetensors"))]
    torch.testing.assert_close(made[1], made[0])
    assert torch.equal(made[2], made[0])


def test_a_video_made_with_other_settings_is_never_replaced(tiny_toy, out):
    """The same settings have the same name; others get a number; a latent decoded again is what it was made with."""
    for more in ([], ["--guidance", "1"], [], ["--prompt", "a ring!"], ["--guidance", "1"]):
        sample.main(["--prompt", "a ring", "--out", str(out), *QUICK, *more])
    assert {f.split(".")[0] for f in files(out)} == {"dc-a-ring-0", "dc-a-ring-0-2", "dc-a-ring-0-3"}
    made = [json.loads((out / f"dc-a-ring-0{n}.json").read_text())["settings"] for n in ("", "-2", "-3")]
    assert [m["guidance"] for m in made] == [3, 1, 3] and made[2]["prompt"] == "a ring!"
    sample.main(["--decode", str(out / "dc-a-ring-0-2.safetensors"), "--out", str(out)])
    assert len(files(out)) == 12  # in place of the same video
    again = json.loads((out / "dc-a-ring-0-2.json").read_text())
    assert again["steps"] == 2 and again["settings"] == made[1]
    with pytest.raises(UserError, match="--prompt says nothing to --decode"):
        sample.main(["--decode", str(out / "dc-a-ring-0.safetensors"), "--prompt", "a ring"])


def test_files_that_change_in_place_are_other_settings(tiny_toy, out, tmp_path):
    """The same path is not the same LoRA, nor the same model."""
    adapter, model = tmp_path / "a.safetensors", tmp_path / "m.safetensors"

    def made():
        sample.main(["--model", str(model), "--lora", str(adapter), "--prompt", "a ring",
                     "--out", str(out), *QUICK])
        return {f.split(".")[0] for f in files(out)}

    model.write_bytes((tiny_toy / "toy-dc-lora.safetensors").read_bytes())
    net = lora.wrap(dit.load(tiny_toy / "toy-base-dit.safetensors"), rank=2, alpha=4)
    lora.save(net, adapter, "comfyui")
    first = made()
    assert len(first) == 1 and made() == first
    os.utime(adapter, ns=(1, 1))
    assert len(made()) == 2
    os.utime(model, ns=(1, 1))
    assert len(made()) == 3 == len(made())


def test_unknown_words_are_warned_about(tiny_toy, out):
    with pytest.warns(UserWarning, match="leaves out 'shiny'.*colour: red, yellow"):
        sample.main(["--prompt", "a shiny circle", "--out", str(out), *QUICK])
    assert len(files(out)) == 4


@pytest.mark.parametrize("flag, value, says", [
    ("--prompt", "a cat on the piano", "knows no word of 'a cat on the piano'. It knows size: small, large; colour"),
    ("--image", "none.png", "none.png does not exist: give the path of a picture."),
    ("--model", "dcc", "there is no model 'dcc': use base, dc, wan2.1-t2v-1.3b, "),
    ("--model", ".", "transformer.safetensors does not exist: give a folder made by adapt.py, or a model's name with --weights"),
    ("--model", "none.safetensors", "none.safetensors does not exist"),
    ("--size", "64", "'64' is not HEIGHTxWIDTH, for example 180x320"),
    ("--size", "64x0", "'64x0' is not HEIGHTxWIDTH"),
    ("--frames", "0", "argument --frames: '0' is not a whole number from 1 to 100000"),
    ("--steps", "1000000000", "argument --steps: '1000000000' is not a whole number from 1 to 1000"),
    ("--shift", "0", "argument --shift: '0' is not a number above 0, up to 1000"),
    ("--guidance", "nan", "argument --guidance: 'nan' is not a number from 0 to 100"),
    ("--memory", "nan", "'nan' is not a number above 0"),
    ("--seed", "18446744073709551616", "is not a whole number from 0 to 9223372036854775807"),
    ("--size", "999968x999968", "has a side of more than 16384 pixels"),
    ("--device", "mps", "there is no device 'mps' that can be used: use cpu"),
    ("--name", "x" * 300, "a name of 300 bytes is too long, 200 are possible"),
    ("--text-cache", "a", "--text-cache says nothing to the embedded models: leave it out"),
    ("--solver", "magic", "invalid choice: 'magic'"),
])
def test_bad_arguments(tiny_toy, tmp_path, out, capsys, monkeypatch, flag, value, says):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert says in refusal(capsys, "--prompt", "a red circle", "--out", out, flag, value)
    assert not files(out)


@pytest.mark.parametrize("content", [b"", b"no picture at all", None], ids=["empty", "text", "cut off"])
def test_a_damaged_picture(tiny_toy, tmp_path, out, capsys, content):
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    if content is None:
        content = (tmp_path / "a.png").read_bytes()[:2000]
    (tmp_path / "a.png").write_bytes(content)
    assert "a.png is not a picture that can be read" in refusal(capsys, "--prompt", "a ring", "--image", tmp_path / "a.png", "--out", out)
    assert not out.exists()


def test_a_picture_for_a_text_to_video_model(tiny_toy, tmp_path, out, capsys):
    model = released.load_model("dc")
    dit.save(dit.WanDiT(dataclasses.replace(model.net.config, in_channels=8)), tmp_path / "plain" / "transformer.safetensors")
    ae.save(model.ae, tmp_path / "plain" / "ae.safetensors")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    said = refusal(capsys, "--prompt", "a ring", "--model", tmp_path / "plain", "--image", tmp_path / "a.png", "--out", out)
    assert "is a text-to-video model: leave --image away." in said and not files(out)


@pytest.mark.parametrize("weights", ["toy", "toy-base-dit", "toy-dc-lora"])
@pytest.mark.parametrize("size", [1000, -1, 0], ids=["cut early", "cut at the end", "empty"])
def test_truncated_weights(tiny_toy, out, capsys, weights, size):
    file = tiny_toy / f"{weights}.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert f"{file} is not a complete safetensors file" in refusal(capsys, "--prompt", "a ring", "--out", out)
    assert not out.exists()


def test_weights_of_the_wrong_model(tiny_toy, tmp_path, out, capsys):
    say = lambda name: refusal(capsys, "--prompt", "a ring", "--out", out, "--model", name)
    # an autoencoder, and a whole transformer, given as a LoRA
    assert "toy.safetensors holds no LoRA for this model" in say(tiny_toy / "toy.safetensors")
    assert "toy-base-dit.safetensors" in say(tiny_toy / "toy-base-dit.safetensors")
    # a folder whose files are swapped, and one whose files belong to different models
    folder = tmp_path / "model"
    for transformer, autoencoder, says in (("toy", "toy-base-dit", "these are not the weights of a Wan transformer"),
                                           ("toy-base-dit", "toy-base-dit", "holds no DC-AE-V of a known preset"),
                                           ("toy-base-dit", "toy", "makes latents of 4 channels, but its autoencoder reads 8")):
        folder.mkdir(exist_ok=True)
        (folder / "transformer.safetensors").write_bytes((tiny_toy / f"{transformer}.safetensors").read_bytes())
        (folder / "ae.safetensors").write_bytes((tiny_toy / f"{autoencoder}.safetensors").read_bytes())
        assert says in say(folder)
    # a LoRA for a wider base
    wide = dit.WanDiT(dataclasses.replace(dit.PRESETS["toy-dc"], dim=48))
    lora.save(lora.wrap(wide, 2, 4), tmp_path / "wide.safetensors", "comfyui")
    assert "was made for another base" in say(tmp_path / "wide.safetensors")
    assert not out.exists()


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {Evil.trace}",)


def test_a_pickle_that_would_run_code_does_not_run(tiny_toy, tmp_path, out, capsys):
    Evil.trace = tmp_path / "trace"
    evil = pickle.dumps({"latent": Evil()})
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("transformer.safetensors", "ae.safetensors", "lora.safetensors"):
        (folder / name).write_bytes(evil)
    for model in (folder, folder / "lora.safetensors"):
        assert "is not a complete safetensors file" in refusal(capsys, "--prompt", "a ring", "--model", model, "--out", out)
    assert not Evil.trace.exists() and not out.exists()
    pickle.loads(evil)  # it is the real thing
    assert Evil.trace.exists()


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tiny_toy, tmp_path, out, capsys, monkeypatch):
    def read_only(*args, dir=None, **more):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(sample, "generate", None)  # is not reached
    monkeypatch.setattr(folders.tempfile, "TemporaryFile", read_only)  # permissions mean nothing to the super user
    assert f"nothing can be written into the folder {out} (read-only file system)" in refusal(capsys, "--prompt", "a ring", "--out", out)
    (tmp_path / "file").write_text("")
    assert "file" in refusal(capsys, "--prompt", "a ring", "--out", tmp_path / "file" / "below")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("full_from, left", [(".safetensors", []), (".mp4", ["a.safetensors"]), (".png", ["a.mp4", "a.safetensors"])])
def test_a_full_disk(tiny_toy, out, capsys, monkeypatch, full_from, left):
    """Nothing half-written stays, and the latent is on disk before the decode begins."""
    atomic_path, device = checkpoint.atomic_path, out.parent.parent / f"device{full_from}"
    device.symlink_to("/dev/full")  # every write fails with "no space left on device"

    @contextlib.contextmanager
    def full(path, size=0):
        if Path(path).suffix == full_from:
            yield device
        else:
            with atomic_path(path, size) as tmp:
                yield tmp

    monkeypatch.setattr(checkpoint, "atomic_path", full)
    assert "the disk is full" in refusal(capsys, "--prompt", "a ring", "--name", "a", "--out", out, *QUICK)
    assert files(out) == left


def poison(file, part):
    """NaN in all tensors of a weight file whose name begins with `part`."""
    tensors, metadata = checkpoint.load_tensors(file)
    for name, value in tensors.items():
        if name.startswith(part):
            value.fill_(torch.nan)
    checkpoint.save_tensors(file, tensors, metadata)


def test_nan_in_the_latent_writes_nothing(tiny_toy, out, capsys):
    poison(tiny_toy / "toy-dc-lora.safetensors", "head.")
    said = refusal(capsys, "--prompt", "a ring", "--out", out, *QUICK)
    assert "the latent became NaN at step 1 of 2: use --dtype fp32, or other weights." in said
    assert not files(out)


def test_nan_in_the_decoder_writes_no_black_video_but_keeps_the_latent(tiny_toy, out, capsys):
    poison(tiny_toy / "toy.safetensors", "decoder.project_out")
    said = refusal(capsys, "--prompt", "a ring", "--name", "a", "--out", out, *QUICK)
    assert "the video holds NaN or infinite values, so nothing was written" in said
    assert files(out) == ["a.safetensors"]


# ---------------------------------------------------------------------------------------------------- the embedded weights

EMBEDDED = [ROOT / "weights" / f"{name}.safetensors" for name in ("toy-base", "toy-base-dit", "toy", "toy-dc-lora")]
missing = [f"weights/{file.name}" for file in EMBEDDED if not file.exists()]
embedded = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not there")


@embedded
def test_readme_command(tmp_path):
    prompt = "a large red circle moving left slowly on a blue background"
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--prompt", prompt, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name = "dc-a-large-red-circle-moving-left-slowly-on-a-blue-background-0"
    assert files(tmp_path) == [f"{name}.{suffix}" for suffix in ("json", "mp4", "png", "safetensors")]
    clip = video.read_clip(tmp_path / f"{name}.mp4", size=(toy.SIZE, toy.SIZE))
    found = toy_score.read_attributes(clip)
    words = dict(size="large", colour="red", shape="circle", direction="left", speed="slowly", background="blue")
    assert clip.shape[1] == toy.FRAMES and found == words


@embedded
@pytest.mark.parametrize("name", ["base", "dc"])
def test_videos_show_what_the_prompt_says(name):
    prompts = ["a large red circle moving left slowly on a blue background", "a small yellow triangle moving up quickly on a black background",
               "a large green square moving right quickly on a white background", "a large purple ring moving down slowly on a gray background"]
    model = released.load_model(name)
    videos = sample.videos(model, prompts, seed=0)
    fit = toy_score.prompt_fit(videos, [model.text.parse(p)[0] for p in prompts])
    assert fit["colour"] >= 0.75 and fit["background"] >= 0.75 and fit["mean"] >= 0.7, fit


@embedded
def test_embedded_weights_are_small_and_deep():
    assert sum(file.stat().st_size for file in (ROOT / "weights").iterdir()) <= 32 * 2**20
    base, deep = (released.load_model(name) for name in ("base", "dc"))
    count = lambda m: dit.tokens(m.net.config, m.latent_shape(m.frames, m.size))
    assert count(base) >= 4 * count(deep)
