"""Light decoders: exact in chunks, tiles and batches as the full one is; counted; distilled, killed and resumed; refused by
every latent but their own."""
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import ae
import kernels
import sample
import toy
from bench import cpu
from chunk_causal import ISOLATED
from files import checkpoint, video
from files.checkpoint import UserError
from gpu import tiling
from training import autoencoder, distill, evaluate, loop, losses, metrics
from wan import light, released, vae

TINY = ae.Config((0, 16, 16, 16), (0, 1, 1, 1), 4, chunk=8, patch=2, scale=0.5)
LIGHT = {
    "tiny-light": dict(decoder_widths=(8, 16), decoder_depths=(1, 1), separable=2),  # a shuffle of 4, all separable
    "tiny-plain": dict(decoder_widths=(8, 16), decoder_depths=(2, 1), separable=1),  # head and shallow stage not
    "tiny-deep": dict(decoder_widths=(8, 16, 16), decoder_depths=(1, 1, 2), separable=2),  # as many stages as the full one
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Presets for seconds, and no charts."""
    monkeypatch.setitem(ae.PRESETS, "tiny", TINY)
    for name, changes in LIGHT.items():
        monkeypatch.setitem(light.PRESETS, name, changes)
    monkeypatch.setattr(autoencoder, "JUDGED", 2)
    monkeypatch.setattr(loop, "plot", lambda folder: (folder / "log.png").touch())


def full(seed=0, **changes):
    torch.manual_seed(seed)
    return ae.DCAEV(dataclasses.replace(TINY, **changes)).requires_grad_(False).eval()


@pytest.fixture(params=LIGHT)
def net(request):
    torch.manual_seed(1)
    net = ae.DCAEV(light.configure(TINY, request.param)).requires_grad_(False)
    for p in net.parameters():  # biases and norms too: a wrong border would show
        p.add_(0.1 * torch.randn_like(p))
    return net


def count(module):
    return sum(p.numel() for p in module.parameters())


def same(a, b):
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


# ---------------------------------------------------------------------------------------------------- exact


@pytest.mark.core
@pytest.mark.parametrize("cuts", [(2, 2, 2), (1, 3, 2), (6,)])
def test_streaming_is_the_whole_clip(net, cuts):
    """Chunk after chunk, cut anywhere, or all three chunks in one call of the layers."""
    z = torch.randn(1, 4, 6, 2, 3)
    y = torch.cat(list(net.decode_stream(iter(z.split(cuts, dim=2)))), dim=2)
    same(y, net.decoder(z)[0])
    same(net.decode(z), y)


@pytest.mark.parametrize("tile", [(2, 3), (1, 20)])
def test_tiled_is_untiled(net, tile):
    z = torch.randn(1, 4, 5, 5, 6)
    same(torch.cat(list(tiling.decode_stream(net, z, tile)), dim=2), net.decode(z))


@pytest.mark.core
def test_a_batch_is_its_clips_and_the_past_does_not_see_the_future(net):
    z = torch.randn(2, 4, 6, 2, 2)
    y = net.decode(z)
    same(y, torch.cat([net.decode(z[:1]), net.decode(z[1:])]))
    later = z.clone()
    later[:, :, 4:] += 1
    changed = (net.decode(later) - y).abs().amax(dim=(0, 1, 3, 4))
    assert not changed[:16].any() and changed[16:].all()


def test_fast_and_plain_forms_agree(net):
    last = net.to(memory_format=torch.channels_last_3d)
    z = torch.randn(2, 4, 4, 3, 2)
    fast = last.decode(z)
    kernels.use(plain=True)
    try:
        same(fast, net.decode(z))
    finally:
        kernels.use()


def test_any_length_and_size(net):
    x = torch.rand(1, 3, 11, 13, 22) * 2 - 1
    assert net(x).shape == x.shape


def test_with_as_many_channels_depthwise_and_pointwise_can_be_a_whole_convolution():
    """One output channel, one input channel: the pointwise weight scales the depthwise kernel."""
    plain = ae.Conv3d(1, 1, 4)
    separable = ae.Separable(plain)
    separable.load_state_dict({"depthwise.weight": plain.weight, "pointwise.weight": torch.ones(1, 1, 1, 1, 1), "pointwise.bias": plain.bias})
    x = torch.randn(1, 1, 8, 5, 5)
    same(separable(x)[0].detach(), plain(x)[0].detach())


# ---------------------------------------------------------------------------------------------------- counted


@pytest.mark.parametrize("preset, parameters, fewer", [("f32t4c32-light", 60e6, 80), ("f64t4c128-light", 60e6, 80), ("small-light", 0.5e6, 50)])
def test_parameters_and_operations(preset, parameters, fewer):
    config = ae.PRESETS[preset.removesuffix("-light")]
    whole, part = cpu.decoder_counts(config), cpu.decoder_counts(light.configure(config, preset))
    assert part["parameters"] <= parameters and whole["operations_per_pixel"] >= fewer * part["operations_per_pixel"]


def test_every_preset_fits_its_latent_and_no_shallower_one():
    for preset in ("f32t4c32-light", "f64t4c128-light", "small-light", "toy-light"):
        config = ae.PRESETS[preset.removesuffix("-light")]
        with torch.device("meta"):
            net = ae.DCAEV(light.configure(config, preset))
            shape = 1, config.latent_channels, config.latent_chunk, 2, 3
            f = config.spatial_factor
            assert net.decoder(torch.zeros(shape))[0].shape == (1, 3, config.piece, 2 * f, 3 * f)
        for phase in (distill.FULL if preset.startswith("f") else distill.TOY if preset.startswith("toy") else distill.LAPTOP):
            autoencoder.check(phase, config)
            assert count(autoencoder.part(net, phase.trained)) > 0
    with pytest.raises(UserError, match="f64t4c128-light has 6 stages, more than the full decoder"):
        light.configure(TINY, "f64t4c128-light")


# ---------------------------------------------------------------------------------------------------- files


def save_both(folder, name="tiny-light", **changes):
    """A full autoencoder and a light decoder of its latent on disk -> (full, light)."""
    whole = full(**changes)
    part = ae.DCAEV(light.configure(whole.config, name))
    ae.save(whole, folder / "tiny.safetensors")
    ae.save(part, folder / "tiny-light.safetensors", part="decoder.")
    return whole, part


@pytest.mark.core
def test_a_file_is_the_decoder_alone(tmp_path):
    whole, part = save_both(tmp_path)
    assert all(name.startswith("decoder.") for name in checkpoint.load_tensors(tmp_path / "tiny-light.safetensors")[0])
    found = ae.load(tmp_path / "tiny.safetensors")
    joined = light.load(found, light.beside(found.path))
    assert joined.encoder is found.encoder and joined.config == part.config and not joined.training
    z = torch.randn(1, 4, 2, 2, 2)
    with torch.no_grad():
        same(joined.decode(z), part.decode(z))
        same(found.decode(z), whole.decode(z))  # is still the full one


def test_wrong_files_are_refused(tmp_path):
    whole, _ = save_both(tmp_path)
    with pytest.raises(UserError, match="tiny.safetensors holds a whole autoencoder, not a decoder alone"):
        light.load(whole, tmp_path / "tiny.safetensors")
    with pytest.raises(UserError, match="tiny-light.safetensors holds a decoder alone: give its whole autoencoder"):
        ae.load(tmp_path / "tiny-light.safetensors")
    for changes, says in ((dict(scale=0.7), "its scale is 0.5, this autoencoder's 0.7"),
                          (dict(latent_channels=8), "its latent_channels is 4, this autoencoder's 8"),
                          (dict(widths=(0, 8, 8, 16)), "its widths is")):
        with pytest.raises(UserError, match=f"belongs to another latent: {says}"):
            light.load(full(**changes), tmp_path / "tiny-light.safetensors")
    checkpoint.save_tensors(tmp_path / "other.safetensors", {"latent": torch.zeros(1)})
    with pytest.raises(UserError, match="other.safetensors holds no light decoder"):
        light.load(whole, tmp_path / "other.safetensors")
    tensors, metadata = checkpoint.load_tensors(tmp_path / "tiny-light.safetensors")
    tensors.popitem()
    checkpoint.save_tensors(tmp_path / "cut.safetensors", tensors, metadata)
    with pytest.raises(UserError, match="cut.safetensors does not fit this model: 1 missing"):
        light.load(whole, tmp_path / "cut.safetensors")


def test_the_one_beside_is_found_by_name_or_because_it_is_the_only_one(tmp_path):
    save_both(tmp_path)
    assert light.beside(tmp_path / "tiny.pt").name == "tiny-light.safetensors"
    assert light.beside(tmp_path / "dc-ae-v.pt").name == "tiny-light.safetensors"
    shutil.copy(tmp_path / "tiny-light.safetensors", tmp_path / "b-light.safetensors")
    with pytest.raises(UserError, match="dc-ae-v-light.safetensors does not exist: make it with ae.py distill"):
        light.beside(tmp_path / "dc-ae-v.pt")


# ---------------------------------------------------------------------------------------------------- distillation


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    for i, name in enumerate(("a", "b", "val/c")):
        scene = toy.random_scene(np.random.default_rng(i))
        video.write_video(folder / f"{name}.mp4", video.to_tensor(toy.render(scene, 24, 48)), fps=10)
    return folder


def run(tmp_path, films, monkeypatch, *more, out="out", steps=("2", "2")):
    """The command on a tiny full autoencoder -> folder of the results."""
    monkeypatch.chdir(tmp_path)  # where the index of clips goes
    monkeypatch.setattr(autoencoder, "Settings", lambda *a, **k: settings(*a, **k, perceptual="random"))
    ae.save(full(), tmp_path / "tiny.safetensors")
    small = ["--batch", "1", "--frames", "16", "--size", "32x32", "--workers", "0", "--save-every", "1"]
    ae.main(["distill", "--weights", "tiny.safetensors", "--preset", "tiny-light", "--data", str(films), "--out", out,
             "--steps", *steps, *small, *more])
    return tmp_path / out


settings = autoencoder.Settings


def test_the_command_from_film_to_table(tmp_path, films, monkeypatch, capsys):
    """Both phases; of the net only the decoder moves and is written; the latent's scale stays; `eval` sets both in one table."""
    out = run(tmp_path, films, monkeypatch)
    first, last = (out / name / "tiny-light.safetensors" for name in ("distill", "refine"))
    tensors, metadata = checkpoint.load_tensors(last)
    assert all(name.startswith("decoder.") for name in tensors)
    assert metadata["config"]["scale"] == 0.5 and metadata["training"]["perceptual_network"] == "random"
    before = checkpoint.load_tensors(first)[0]
    moved = {k for k, v in tensors.items() if v.ndim == 5 and not torch.equal(v, before[k])}
    assert moved == {k for k in tensors if tensors[k].ndim == 5 and k.startswith(("decoder.stages.2.", "decoder.project_out"))}
    logs = [loop.read_log(path.parent)[-1] for path in (first, last)]
    assert {"psnr", "psnr_full", "l1", "full", "features", "perceptual"} <= logs[0].keys()
    assert {"adversarial", "disc", "lambda", "full"} <= logs[1].keys()

    monkeypatch.setattr(metrics, "colour_fields", lambda side: torch.zeros(1, 3, 8, 32, 32))
    judge = metrics.evaluate
    monkeypatch.setattr(metrics, "evaluate", lambda *args: judge(*args, optional=()))  # no networks
    ae.main(["eval", "tiny.safetensors", "--decoder", str(last), "--data", str(films), "--clips", "2", "--frames", "16",
             "--size", "32x32", "--results", "r.json", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "PSNR to full dB" in printed and "ms/frame" in printed and "flicker chunk" in printed
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    whole = ae.load("tiny.safetensors")
    held_out = torch.stack(evaluate.clips.validation(films, 16, (32, 32), 2))
    with torch.no_grad():
        z = whole.encode(held_out)
        expected = metrics.psnr(light.load(whole, last).decode(z), whole.decode(z))
    assert results["tiny-light"]["mean"]["psnr_full"] == pytest.approx(expected, abs=1e-3) and "psnr_full" not in results["tiny"]["mean"]
    assert results["tiny-light"]["mean"]["mib"] < results["tiny"]["mean"]["mib"] and results["tiny"]["mean"]["ms"] > 0


def test_a_killed_distillation_goes_on_where_it_stopped(tmp_path, films, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = checkpoint.load_tensors(run(tmp_path, films, monkeypatch, out="whole") / "refine" / "tiny-light.safetensors")[0]
        l1, calls = losses.l1, []

        def killed(*pair):
            calls.append(pair)
            if len(calls) == 4:  # two in each step: film and full
                raise KeyboardInterrupt
            return l1(*pair)

        monkeypatch.setattr(losses, "l1", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, films, monkeypatch, out="killed")
        monkeypatch.setattr(losses, "l1", l1)
        with pytest.raises(UserError, match="features 0.3 -> 0.5"):
            run(tmp_path, films, monkeypatch, "--losses", "features=0.5", out="killed")
        resumed = checkpoint.load_tensors(run(tmp_path, films, monkeypatch, out="killed") / "refine" / "tiny-light.safetensors")[0]
    finally:
        torch.set_num_threads(threads)
    assert len(loop.read_log(tmp_path / "killed" / "distill")) == 2  # the first step was kept
    assert all(torch.equal(resumed[k], v) for k, v in whole.items())


def pupil(generated=None, name="tiny-light", seed=1):
    teacher = full()
    torch.manual_seed(seed)
    net = ae.DCAEV(light.configure(TINY, name))
    net.encoder = teacher.encoder
    return net, distill.Distiller(teacher, net, generated)


PHASE = autoencoder.Phase("distill", "decoder", (32, 32), 16, 1, 1, 1e-3, "", images=0.0, perceptual=0.0, full=2.0, features=0.5)


def test_the_losses_of_a_step():
    """Pixels of the film and of the full decoder, features of the two stages that both have, in units of their variance."""
    net, distiller = pupil()
    x = torch.rand(1, 3, 16, 16, 16) * 2 - 1
    (_, loss, values), = autoencoder.Objective(net, PHASE, distiller=distiller)(x, 0)
    with torch.no_grad():
        z = net.encoder(x)[0]
        y, target = net.decoder(z)[0], distiller.full.decoder(z)[0]
    assert torch.allclose(values["l1"], (y - x).abs().mean()) and torch.allclose(values["full"], (y - target).abs().mean())
    assert torch.allclose(loss, values["l1"] + 2 * values["full"] + 0.5 * values["features"])
    assert sorted(distiller.adapters) == ["2", "3"]  # the full decoder has stage 1 too
    loss.backward()
    assert all(p.grad is not None for p in (*net.decoder.parameters(), *distiller.adapters.parameters()))
    assert all(p.grad is None for p in distiller.full.parameters())


def test_a_decoder_that_is_the_full_one_has_nothing_to_learn_from_it():
    net, distiller = pupil()
    net = distiller.full
    for i, adapter in distiller.adapters.items():
        distiller.adapters[i] = torch.nn.Conv3d(16, 16, 1, bias=False)
        distiller.adapters[i].weight.data = torch.eye(16)[:, :, None, None, None]
    (_, _, values), = autoencoder.Objective(net, PHASE, distiller=distiller)(torch.rand(1, 3, 16, 16, 16), 0)
    assert values["full"] < 1e-6 and values["features"] < 1e-6 < values["l1"]


def test_for_a_latent_that_was_generated_the_full_decoders_video_is_the_film():
    made = torch.randn(3, 4, 4, 2, 2)
    net, distiller = pupil(made)
    phase = dataclasses.replace(PHASE, generated=1.0)
    (_, _, values), = autoencoder.Objective(net, phase, distiller=distiller)(torch.zeros(1, 3, 16, 16, 16), 0)
    assert values["l1"] == values["full"] > 0
    target, y, _ = distiller(net, phase, torch.zeros(2, 3, 16, 16, 16), ISOLATED, np.random.default_rng(0))
    assert any(torch.allclose(target[:1], distiller.full.decoder(z[None])[0], atol=1e-5) for z in made) and y.shape == target.shape


def test_it_learns():
    """Forty steps on the toy world: nearer to a full decoder of random weights."""
    net, distiller = pupil()
    x, phase = toy.toy_batch(0, 2, 16, 32)[0], dataclasses.replace(PHASE, l1=0.0)
    opt = autoencoder.optimiser("muon", torch.nn.ModuleList([net.decoder, distiller.adapters]), 1e-2)
    seen = []
    for _ in range(40):
        (_, loss, values), = autoencoder.Objective(net, phase, distiller=distiller)(x, 0)
        opt.zero_grad()
        loss.backward()
        opt.step()
        seen.append(values)
    assert seen[-1]["full"] < 0.7 * seen[0]["full"] and seen[-1]["features"] < 0.8 * seen[0]["features"]


@pytest.fixture
def toy_light(tiny_toy, monkeypatch):
    """A light decoder beside the embedded (tiny) toy -> its file."""
    whole = ae.load(tiny_toy / "toy.safetensors")
    monkeypatch.setitem(light.PRESETS, "toy-light", dict(decoder_widths=(8, 8), decoder_depths=(1, 1), separable=2))
    torch.manual_seed(3)
    part = ae.DCAEV(light.configure(whole.config, "toy-light"))
    ae.save(part, tiny_toy / "toy-light.safetensors", part="decoder.")
    return tiny_toy / "toy-light.safetensors"


def test_the_toy_learns_on_what_its_transformer_makes(toy_light, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "GENERATED", 3)
    world = ["--weights", str(toy_light.with_name("toy.safetensors")), "--model", "dc", "--out", str(tmp_path / "out"),
             "--batch", "1", "--steps", "2", "--losses", "generated=1"]
    ae.main(["distill", *world])
    tensors, metadata = checkpoint.load_tensors(tmp_path / "out" / "generated.safetensors")
    assert len(tensors["latents"]) == 3 and metadata["made"]["latents"] == 3
    monkeypatch.setattr(distill, "generate", None)  # they are kept
    ae.main(["distill", *world])
    made = tmp_path / "out" / "distill" / "toy-light.safetensors"
    assert light.load(ae.load(world[1]), made).config.separable == 2


def test_the_embedded_one_shows_what_the_embedded_toy_does():
    """PSNR to the full decoder on clips held out: 30 dB when it was made."""
    whole = ae.load(released.WEIGHTS / "toy.safetensors")
    x, _ = toy.toy_batch(autoencoder.HELD_OUT, 4)
    with torch.no_grad():
        z = whole.encode(x)
        theirs = whole.decode(z)
        ours = light.choose(whole, "light")[0].decode(z)
    assert metrics.psnr(ours, theirs) > 28


# ---------------------------------------------------------------------------------------------------- sample.py

QUICK = ["--prompt", "a ring", "--frames", "8", "--size", "64x64", "--steps", "1"]


def test_sampling_with_the_light_decoder(toy_light, tmp_path, capsys):
    """full or nothing, light or its file are the same; the latent is the same, the pixels are not, and a number stands behind the name."""
    for more in ([], ["--decoder", "full"], ["--decoder", "light"], ["--decoder", str(toy_light)]):
        sample.main([*QUICK, "--out", str(tmp_path), *more])
    assert f"decoder: {toy_light}" in capsys.readouterr().out
    assert len(list(tmp_path.glob("dc-a-ring*.mp4"))) == 2
    names = [tmp_path / f"dc-a-ring-0{n}" for n in ("", "-2")]
    latents = [checkpoint.load_tensors(f"{name}.safetensors")[0]["latent"] for name in names]
    clips = [video.read_clip(f"{name}.mp4") for name in names]
    assert torch.equal(*latents) and not torch.equal(*clips)


def test_decoders_that_do_not_fit_are_refused_before_the_work(toy_light, tmp_path):
    def refused(says, *more):
        with pytest.raises(UserError, match=says):
            sample.main([*QUICK, "--out", str(tmp_path / "out"), *more])

    refused("toy.safetensors holds a whole autoencoder", "--decoder", str(toy_light.with_name("toy.safetensors")))
    refused("belongs to another latent: its widths is", "--model", "base", "--decoder", str(toy_light))
    refused("none does not exist", "--decoder", str(tmp_path / "none"))
    toy_light.rename(tmp_path / "elsewhere")
    refused("toy-light.safetensors does not exist: make it with ae.py distill", "--decoder", "light")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--decoder is for a DC-AE-V"):
        light.choose(vae.WanVAE(dataclasses.replace(vae.PRESETS["wan2.1"], width=4, decoder_width=4)), "light")


def test_a_plan_with_the_light_decoder_needs_less(tmp_path, capsys):
    plan = ["--plan", "--prompt", "a cat", "--model", "dc-wan2.1-t2v-1.3b", "--memory", "80", "--dtype", "fp32"]
    net = released.outline("dc-wan2.1-t2v-1.3b").ae
    part, _ = light.choose(net, "light")
    assert count(part.decoder) < count(net.decoder) / 20 and part.config.spatial_factor == 32
    sample.main([*plan, "--decoder", "light"])
    assert "expected memory" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- refusals


def test_the_command_line_says_what_is_missing(toy_light, tmp_path):
    weights = str(toy_light.with_name("toy.safetensors"))

    def refused(says, *argv):
        with pytest.raises(UserError, match=says):
            ae.main([*argv, "--out", str(tmp_path / "out")] if argv[0] == "distill" else list(argv))

    refused("--weights", "distill")
    refused("holds a decoder alone", "distill", "--weights", str(toy_light))
    refused("--preset small-light needs --data", "distill", "--weights", weights, "--preset", "small-light")
    refused("'align=1' is not NAME=WEIGHT", "distill", "--weights", weights, "--losses", "align=1")
    refused("generated=... needs --model", "distill", "--weights", weights, "--losses", "generated=0.5")
    refused("--model says nothing to --losses generated=0", "distill", "--weights", weights, "--model", "dc", "--losses", "generated=0")
    refused("--model dc-wan2.1-t2v-1.3b is no toy", "distill", "--weights", weights, "--model", "dc-wan2.1-t2v-1.3b")
    refused("--model base belongs to another latent", "distill", "--weights", weights, "--model", "base")
    refused("--cache says nothing to a run without --data", "distill", "--weights", weights, "--cache", "c")
    refused("there is no phase refine here", "distill", "--weights", weights, "--phases", "refine")
    refused("are about one latent", "eval", weights, str(toy_light.with_name("toy-base.safetensors")), "--decoder", str(toy_light))
    refused("--model says nothing to a run without --prompts", "eval", weights, "--model", "base")
    refused("holds a decoder alone", "eval", str(toy_light))
    refused("the toy world is square", "eval", weights, "--data", "toy", "--size", "32x64")
    refused("--model base belongs to another latent", "eval", weights, "--prompts", "1", "--model", "base")


def test_prompt_fit_of_both_decoders(toy_light):
    whole = ae.load(toy_light.with_name("toy.safetensors"))
    fits = evaluate.prompt_fits({"full": whole, "light": light.load(whole, toy_light)}, released.load_model("dc"), 2)
    assert fits.keys() == {"full", "light"} and all(0 <= fit <= 1 for fit in fits.values())
