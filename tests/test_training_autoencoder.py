"""The training programme: phases train what they say, an inflated image autoencoder is the image autoencoder, a killed run is not lost."""
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ae
import toy
from chunk_causal import ISOLATED
from files import checkpoint, video
from files.checkpoint import UserError
from training import autoencoder, latents, loop, losses

TINY = ae.Config((0, 16, 16, 16), (0, 1, 1, 1), 4, chunk=8, patch=4)


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    """A preset for seconds, and neither charts nor long evaluations, which take more time
    than these networks."""
    monkeypatch.setitem(ae.PRESETS, "tiny", TINY)
    monkeypatch.setattr(autoencoder, "JUDGED", 2)
    monkeypatch.setattr(autoencoder, "MEASURED", 4)
    monkeypatch.setattr(loop, "plot", lambda folder: (folder / "log.png").touch())


def tiny(seed=0, config=TINY):
    torch.manual_seed(seed)
    return ae.DCAEV(config)


# ---------------------------------------------------------------------------------------------------- phases


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder of three clips of the toy world, 24 frames of 48x48, and one held out."""
    folder = tmp_path_factory.mktemp("films")
    for i, name in enumerate(("a", "b", "c", "val/d")):
        scene = toy.random_scene(np.random.default_rng(i))
        video.write_video(folder / f"{name}.mp4", video.to_tensor(toy.render(scene, 24, 48)), fps=10)
    return folder


SHORT = dict(batch=1, frames=16, size=(32, 32), ema=0.5, images=0.0)


def choose(names=None, begun=False, steps=(2,), **changes):
    changes = {**SHORT, "disc_width": 8, **changes}
    return autoencoder.choose_phases(autoencoder.LAPTOP, TINY, names, begun, list(steps), **changes)


def run(out, films, monkeypatch, phases, settings=autoencoder.Settings()):
    monkeypatch.chdir(out.parent)  # where the index of clips goes
    settings = dataclasses.replace(settings, perceptual="random")
    source = autoencoder.Films([films], 0, cache=films.parent / "cache")
    return autoencoder.train("tiny", phases, source, out, settings)


def test_the_phases_for_video(tmp_path, films, monkeypatch):
    """Each begins with the averaged weights of the one before and trains its own layers only; the latent scale is measured where the encoder was trained."""
    last = run(tmp_path / "ae", films, monkeypatch, choose(("low", "high", "refine")))
    folders = [tmp_path / "ae" / name for name in ("low", "high", "refine")]
    assert last == folders[2] / "tiny.safetensors"
    for folder in folders:
        assert {"log.jsonl", "log.png", "sheet.png", "tiny.safetensors", "checkpoint-0000002"} <= {p.name for p in folder.iterdir()}
    low, high, refine = (ae.load(folder / "tiny.safetensors").state_dict() for folder in folders)
    kernels = {k for k, v in low.items() if v.ndim == 5}
    moved = lambda a, b: {k for k in kernels if not torch.equal(a[k], b[k])}
    inner = r"encoder\.(stages\.[23]|project_out)|decoder\.(stages\.[23]|project_in)"
    assert moved(low, high) == {k for k in kernels if re.match(inner, k)}
    assert moved(high, refine) == {k for k in kernels if re.match(r"decoder\.(stages\.1|project_out)", k)}

    logs = [loop.read_log(folder)[-1] for folder in folders]
    assert all({"psnr", "ssim", "latent_rms", "l1", "mse", "perceptual", "train_psnr"} <= log.keys() for log in logs)
    assert {"adversarial", "lambda", "disc", "gradient_disc"} <= logs[2].keys() and "disc" not in logs[1]
    metadata = checkpoint.load_tensors(last)[1]
    assert metadata["training"]["perceptual_network"] == "random" and metadata["log"][-1]["step"] == 2
    dataset = autoencoder.clips.Clips(films, 16, (32, 32), "train", 0)
    x = next(autoencoder.clips.loader(dataset, 16, workers=0))
    net = ae.load(last)
    assert net.config.scale == ae.load(folders[1] / "tiny.safetensors").config.scale  # the head leaves the latent alone
    with torch.no_grad():
        assert 0.8 < (net.config.scale * net.encode(x)).square().mean().sqrt() < 1.25


def test_video_begins_with_the_image_autoencoder(tmp_path, films, monkeypatch, capsys):
    """Phase 0 trains everything but what resamples time; the next phase begins with its kernels as middle taps (at a rate of 0 it keeps them)."""
    image, low = choose(("image", "low"), lr=1e-3)
    phases = [image, dataclasses.replace(low, lr=0.0)]
    run(tmp_path / "ae", films, monkeypatch, phases)
    assert "inflated" in capsys.readouterr().out
    still, metadata = checkpoint.load_tensors(tmp_path / "ae" / "image" / "tiny-image.safetensors")
    assert (metadata["training"]["frames"], metadata["training"]["batch"]) == (1, 8) and metadata["log"][-1]["psnr"] > 0
    through_time = re.compile(r"encoder\.stages\.2\.op_list\.1\.|decoder\.stages\.2\.op_list\.0\.")
    untouched = autoencoder.image_autoencoder(TINY).state_dict()
    assert all((not still[k].any()) == bool(through_time.match(k)) for k, v in still.items() if v.ndim == 4) and still.keys() == untouched.keys()

    low, _ = checkpoint.load_tensors(tmp_path / "ae" / "low" / "tiny.safetensors")
    kernels = [k for k, v in still.items() if v.ndim == 4 and not through_time.match(k)]
    assert kernels and all(torch.equal(low[k][:, :, 1], still[k]) and not low[k][:, :, [0, 2]].any() for k in kernels)


def test_the_image_phase_comes_first_or_not_at_all():
    with pytest.raises(UserError, match="image begins from nothing"):
        choose(("low", "image"))
    with pytest.raises(UserError, match="image begins from nothing"):
        choose(["image"], begun=True)
    assert [phase.name for phase in choose(begun=True)] == ["low", "high", "refine"]


def test_weights_to_begin_with(tmp_path, films, monkeypatch):
    """At a rate of 0 they are what comes out."""
    ae.save(tiny(), tmp_path / "start.safetensors")
    settings = autoencoder.Settings(start=tmp_path / "start.safetensors")
    phases = choose(["high"], begun=True, steps=(1,), lr=0.0)
    found = ae.load(run(tmp_path / "on", films, monkeypatch, phases, settings)).state_dict()
    assert all(torch.equal(found[k], v.half().float()) for k, v in tiny().state_dict().items())


def test_a_killed_programme_goes_on_where_it_stopped(tmp_path, films, monkeypatch):
    """Killed in the second step of the GAN phase: what is finished is not trained again, the weights are those of the uninterrupted run, to the bit.
    On one thread: with two, the last bits of this programme's gradients differ from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        killed_and_whole(tmp_path, films, monkeypatch)
    finally:
        torch.set_num_threads(threads)


def killed_and_whole(tmp_path, films, monkeypatch):
    phases = choose(("low", "refine"), images=0.5)
    whole = checkpoint.load_tensors(run(tmp_path / "whole", films, monkeypatch, phases))[0]
    shutil.copytree(tmp_path / "whole" / "low", tmp_path / "resumed" / "low")
    hinge_d, calls = losses.hinge_d, []

    def killed(*logits):
        calls.append(logits)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return hinge_d(*logits)

    monkeypatch.setattr(losses, "hinge_d", killed)
    plan = autoencoder.Settings(save_every=1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", films, monkeypatch, phases, plan)
    monkeypatch.setattr(losses, "hinge_d", hinge_d)
    with pytest.raises(UserError, match="lr .* -> 0.5"):
        run(tmp_path / "resumed", films, monkeypatch, choose(("low", "refine"), lr=0.5))
    resumed = checkpoint.load_tensors(run(tmp_path / "resumed", films, monkeypatch, phases))[0]
    assert len(loop.read_log(tmp_path / "resumed" / "refine")) == 2  # the first step was kept
    assert all(torch.equal(resumed[k], v) for k, v in whole.items())


def step(net, phase, x, number=0, disc=None, perceptual=None):
    return list(autoencoder.Objective(net, phase, perceptual=perceptual, disc=disc)(x, number))


PLAIN = autoencoder.Phase("low", "all", (32, 32), 16, 1, 1, 1e-3, "", images=0.0, perceptual=0.0)


def test_a_step_of_stills_takes_each_frame_alone():
    """As many frames as the clips have, each encoded and decoded as a clip of its own: the loss is that of the model on single images."""
    net, x = tiny(), torch.rand(2, 3, 16, 32, 32) * 2 - 1
    pictures = autoencoder.stills(x, 4)
    assert pictures.shape == (8, 3, 4, 32, 32) and torch.equal(pictures[1, :, 3], x[0, :, 5])
    (name, loss, values), = step(net, dataclasses.replace(PLAIN, images=1.0), x)
    y = net.decoder(net.encoder(pictures, ISOLATED)[0], ISOLATED)[0]
    assert name == "net" and torch.allclose(loss, (y - pictures).abs().mean())
    share = [rng.random() < 0.2 for rng in (np.random.default_rng((0, n)) for n in range(500))]
    assert 70 < sum(share) < 130


@pytest.mark.core
def test_the_adversary_pulls_the_decoder_and_not_itself():
    """The autoencoder's loss leaves no gradient in the discriminator, whose own loss leaves none in the autoencoder."""
    net, disc, x = tiny(), losses.Discriminator(8), torch.rand(1, 3, 16, 32, 32) * 2 - 1
    phase = dataclasses.replace(PLAIN, adversarial=0.05)
    steps = autoencoder.Objective(net, phase, disc=disc)(x, 0)
    _, loss, values = next(steps)
    assert torch.allclose(loss, values["l1"] + 0.05 * values["lambda"] * values["adversarial"]) and values["lambda"] > 0
    loss.backward()
    assert all(p.grad is None for p in disc.parameters()) and all(p.grad is not None for p in net.parameters())
    before = [p.grad.clone() for p in net.parameters()]
    name, loss, _ = next(steps)
    loss.backward()
    assert name == "disc" and all(p.grad.abs().sum() > 0 for p in disc.parameters() if p.ndim == 5)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before))


def test_recomputed_stages_give_the_same_gradients():
    net, again, x = tiny(), tiny(), torch.rand(1, 3, 16, 32, 32) * 2 - 1
    autoencoder.recompute_blocks(again)
    for n in (net, again):
        step(n, PLAIN, x)[0][1].backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), again.parameters()))
    assert net.state_dict().keys() == again.state_dict().keys()


@pytest.mark.core
def test_latent_noise_spreads_by_a_share_of_the_rms():
    z = 3 * torch.randn(4, 8, 4, 8, 8)
    noise = latents.add_latent_noise(z, 0.1, seed=5) - z
    assert noise.std().item() == pytest.approx(0.3, rel=0.05) and torch.equal(latents.add_latent_noise(z, 0.1, 5) - z, noise)


@pytest.mark.parametrize("frames", [8, 20])
def test_clips_hold_two_chunks_or_more(frames):
    with pytest.raises(UserError, match=r"--frames must be a multiple of the chunk \(8\) and at least two chunks"):
        choose(("low",), frames=frames)


def test_steps_are_one_number_or_one_for_each_phase():
    assert [phase.steps for phase in choose(("low", "refine"), steps=[2, 1])] == [2, 1]
    with pytest.raises(UserError, match=r"--steps has 2 numbers for 4 phases \(image, low, high, refine\)"):
        choose(steps=[2, 1])


@pytest.mark.parametrize("preset", [p for p in ae.PRESETS if not p.startswith("toy") and p != "tiny"])
def test_every_phase_fits_every_preset(preset):
    """Whole chunks, crops of whole latent cells, and layers to train."""
    config = ae.PRESETS[preset]
    with torch.device("meta"):
        net = ae.DCAEV(config)
        y = autoencoder.image_autoencoder(config)(torch.zeros(1, 3, 1, config.spatial_factor, config.spatial_factor))
    assert y.shape[2] == 1
    for phase in autoencoder.FULL if preset.startswith(("f32", "f64")) else autoencoder.FILM if preset == "film" else autoencoder.LAPTOP:
        assert phase.frames == 1 or phase.name != "image"
        autoencoder.check(phase, config)
        assert sum(p.numel() for p in autoencoder.part(net, phase.trained).parameters()) > 0
    inner = sum(p.numel() for p in autoencoder.part(net, "inner").parameters())
    assert 0.2 < inner / sum(p.numel() for p in net.parameters()) < 0.98


def test_one_clip_by_heart(tmp_path, monkeypatch):
    """--overfit: every window of two chunks is drawn; the score is that of the whole clip, and rises."""
    film = video.to_tensor(toy.render(toy.random_scene(np.random.default_rng(0)), 24, 32))
    video.write_video(tmp_path / "film.mp4", film, fps=10)
    quick = dataclasses.replace(autoencoder.MEMORISE[0], ema=0.0, warmup=5)
    monkeypatch.setattr(autoencoder, "MEMORISE", (quick,))
    monkeypatch.setattr(autoencoder, "LENGTH", 24)
    autoencoder.main_train([
        "--preset", "tiny", "--overfit", str(tmp_path / "film.mp4"), "--size", "32x32", "--batch", "4",
        "--steps", "20", "--save-every", "10", "--out", str(tmp_path / "out")])
    told = json.loads((tmp_path / "out" / "overfit.json").read_text())
    log = [line["psnr"] for line in told["log"]]
    assert len(log) == 2 and log[0] < log[1]


# ---------------------------------------------------------------------------------------------------- inflation


def image_autoencoder(sd, n, x, patch):
    """A 2-D DC-AE written down with plain torch: x [b, 3, h, w] -> (latent, reconstruction). Widths are constant; no temporal stage."""
    conv = lambda x, name: F.conv2d(x, sd[f"{name}.weight"], sd.get(f"{name}.bias"), padding=1)
    affine = lambda x, name: x * sd[f"{name}.weight"][:, None, None] + sd[f"{name}.bias"][:, None, None]
    norm = lambda x, name: affine(x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt(), name)
    block = lambda x, name: x + norm(conv(F.silu(conv(x, f"{name}.main.conv1.conv")), f"{name}.main.conv2.conv"), f"{name}.main.conv2.norm")
    x = F.pixel_unshuffle(conv(x, "encoder.project_in.conv.conv"), patch)
    for i in range(1, n):
        x = block(x, f"encoder.stages.{i}.op_list.0")
        if i < n - 1:
            x = F.pixel_unshuffle(conv(x, f"encoder.stages.{i}.op_list.1.main.conv.conv"), 2) + F.avg_pool2d(x, 2)
    z = conv(x, "encoder.project_out.conv")
    x = conv(z, "decoder.project_in.conv")
    for i in range(n - 1, 0, -1):
        if i < n - 1:
            x = F.pixel_shuffle(conv(x, f"decoder.stages.{i}.op_list.0.main.conv.conv"), 2) + F.interpolate(x, scale_factor=2)
        x = block(x, f"decoder.stages.{i}.op_list.{int(i < n)}")
    x = F.silu(norm(x, "decoder.project_out.op_list.0"))
    return z, F.pixel_shuffle(conv(x, "decoder.project_out.op_list.2.conv.conv"), patch)


@pytest.mark.parametrize("changes", [dict(temporal="causal"), dict(temporal="non_causal"), dict(chunk=20), dict(chunk=1), dict(separable=3)], ids=str)
def test_an_image_autoencoder_is_inflated_under_every_temporal_rule(changes):
    """Inflated, it gives each frame of a clip that stands still what it gives the image, whatever a frame may see."""
    config = dataclasses.replace(TINY, **changes)
    torch.manual_seed(0)
    image, net, x = autoencoder.image_autoencoder(config), ae.DCAEV(config), torch.rand(1, 3, 1, 32, 32) * 2 - 1
    autoencoder.inflate(net, image.state_dict())
    clip = lambda v: v.expand(-1, -1, 2 * config.piece, -1, -1)
    through = lambda net, v: net.decoder(net.encoder(v)[0])[0]
    with torch.no_grad():
        y = through(image, x)
        assert y.std() > 0.05 and torch.allclose(through(net, clip(x)), clip(y), atol=1e-4)


@pytest.mark.core
def test_an_inflated_model_is_the_image_model_on_a_clip_that_stands_still():
    """Synthetic 2-D weights, stated in a second way above: every frame of the clip gives the image's latent and reconstruction."""
    config = ae.Config((0, 16, 16, 16, 16), (0, 1, 1, 1, 1), 4, chunk=8)
    net = tiny(config=config)
    names = {k: v for k, v in net.state_dict().items() if not re.search(r"stages\.(4|3\.op_list\.1\.main\.conv\.conv)", k)
             or k.startswith("decoder.stages.3.op_list.1")}
    like = lambda v: torch.randn(v.shape[:2] + v.shape[3:]) / (9 * v.shape[1]) ** 0.5 if v.ndim == 5 else torch.randn(v.shape)
    flat = {k: like(v) for k, v in names.items() if not k.startswith("decoder.stages.3.op_list.0")}
    said = autoencoder.inflate(net, {**flat, "encoder.stages.3.op_list.0.attention.qkv.weight": torch.zeros(3, 3)})
    assert said == f"inflated {len(flat)} of {len(net.state_dict())} tensors; 1 tensors of the image autoencoder had no place."
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z, y = image_autoencoder(flat, 4, x, 2)
        clip = x[:, :, None].expand(-1, -1, 16, -1, -1)
        latent = net.encode(clip)
        assert torch.allclose(latent, z[:, :, None].expand_as(latent), atol=1e-5)
        assert torch.allclose(net.decode(latent), y[:, :, None].expand(-1, -1, 16, -1, -1), atol=1e-4)


def test_what_an_image_model_has_nothing_for_can_still_learn():
    """Its branches give nothing at first, but a gradient reaches the last layer of each (behind a zero none would arrive)."""
    net = tiny(config=ae.Config((0, 16, 16, 16, 16), (0, 1, 1, 1, 1), 4, chunk=8))
    autoencoder.inflate(net, {k: v[:, :, 1] for k, v in tiny(1, net.config).state_dict().items() if k.startswith("decoder.project_in") and v.ndim == 5})
    step(net, PLAIN, torch.rand(1, 3, 16, 32, 32) * 2 - 1)[0][1].backward()
    for name in ("encoder.stages.4.op_list.0.main.conv2.norm.weight", "encoder.stages.3.op_list.1.main.conv.conv.weight",
                 "decoder.stages.3.op_list.0.main.conv.conv.weight", "decoder.stages.4.op_list.0.main.conv2.norm.weight"):
        value = net.get_parameter(name)
        assert not value.any() and value.grad.abs().sum() > 0, name


def test_a_separable_layer_that_resamples_time_can_still_learn():
    """The image autoencoder has half of it: that half must not arrive as zeros, or both would stay so."""
    config = dataclasses.replace(TINY, separable=3)
    net = ae.DCAEV(config)
    autoencoder.inflate(net, autoencoder.image_autoencoder(config).state_dict())
    step(net, PLAIN, torch.rand(1, 3, 16, 32, 32) * 2 - 1)[0][1].backward()
    layer = net.decoder.stages[-2].op_list[0].main.conv.conv
    assert not layer.pointwise.weight.any() and layer.pointwise.weight.grad.any() and layer.depthwise.weight.any()


def test_an_image_model_of_other_widths_is_refused():
    with pytest.raises(UserError, match="no tensor of the image autoencoder fits"):
        autoencoder.inflate(tiny(), {"encoder.project_in.conv.conv.weight": torch.zeros(5, 3, 3, 3)})


# ---------------------------------------------------------------------------------------------------- the toy


def run_toy(out, settings=autoencoder.Settings(save_every=2), names=("low",), **changes):
    small = dict(frames=16, size=(32, 32), lr=1e-3) | changes
    phases = autoencoder.choose_phases(autoencoder.TOY, TINY, list(names), False, [4], 1, **small)
    return autoencoder.train("tiny", phases, autoencoder.ToyWorld(), out, settings)


def test_where_only_the_decoder_is_trained_on_the_latent_keeps_its_scale(tmp_path):
    ae.save(ae.DCAEV(dataclasses.replace(TINY, scale=4.5)), tmp_path / "start.safetensors")
    settings = autoencoder.Settings(start=tmp_path / "start.safetensors")
    made = run_toy(tmp_path / "out", settings, names=["decoder"])
    assert ae.load(made).config.scale == 4.5


def test_a_resumed_toy_training_is_the_uninterrupted_one(tmp_path, monkeypatch):
    whole = checkpoint.load_tensors(run_toy(tmp_path / "whole"))[0]
    toy_batch = toy.toy_batch

    def stop_at_the_fourth(seed, *args, **more):
        if seed == (0, 3):
            raise KeyboardInterrupt
        return toy_batch(seed, *args, **more)

    monkeypatch.setattr(toy, "toy_batch", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path / "resumed")
    monkeypatch.setattr(toy, "toy_batch", toy_batch)
    with pytest.raises(UserError, match="lr 0.001 -> 0.002"):
        run_toy(tmp_path / "resumed", lr=2e-3)
    resumed, metadata = checkpoint.load_tensors(run_toy(tmp_path / "resumed"))
    assert all(torch.equal(resumed[k], v) for k, v in whole.items())
    assert [r["step"] for r in metadata["log"]] == [2, 4] and metadata["training"]["steps"] == 4

    net = ae.load(tmp_path / "resumed" / "low" / "tiny.safetensors")  # the scale makes the latents of the toy world about unit RMS
    z = net.config.scale * net.encode(toy.toy_batch(1, 8, 16)[0])
    assert 0.8 < z.square().mean().sqrt() < 1.25


# ---------------------------------------------------------------------------------------------------- command line


def test_the_command_line_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--preset small needs --data with a folder of clips"):
        ae.main(["train", "--preset", "small", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="does not exist"):
        ae.main(["train", "--preset", "small", "--data", str(tmp_path / "none"), "--out", str(tmp_path)])
    for argument, said in (("--grow-from", "gone: train the deep toy from nothing"),
                           ("--measure", "gone: the step was timed by this script")):
        with pytest.raises(UserError, match=f"{argument} is {said}"):
            ae.main(["train", "--preset", "toy", argument, "w"])
    with pytest.raises(UserError, match="'beauty=1' is not NAME=WEIGHT"):
        ae.main(["train", "--losses", "beauty=1"])
    with pytest.raises(UserError, match="no phase refine here: use low, decoder"):
        ae.main(["train", "--preset", "toy", "--phases", "refine"])
    with pytest.raises(UserError, match="--align-to needs a phase that trains the encoder"):
        ae.main(["train", "--preset", "toy", "--phases", "decoder", "--align-to", "base"])
    with pytest.raises(UserError, match="--size must be multiples of a latent cell"):
        ae.main(["train", "--preset", "toy", "--size", "50x50"])


@pytest.mark.core
def test_the_command_line_is_a_list_of_phases(monkeypatch):
    called = []
    monkeypatch.setattr(autoencoder, "train", lambda *a: called.extend(a))
    ae.main(["train", "--preset", "toy", "--lr", "3e-4", "--steps", "600", "300", "--out", "o",
             "--align-to", "base", "--size", "64x64", "--losses", "jumps=0", "equivariance=0.25"])
    preset, phases, source, out, settings = called
    assert (preset, out, settings.align_to) == ("toy", "o", ("base",))
    assert [(p.name, p.steps) for p in phases] == [("low", 600), ("decoder", 300)]
    weights = {(p.lr, p.jumps, p.equivariance, p.align, p.correlation) for p in phases}
    assert weights == {(3e-4, 0.0, 0.25, 0.05, 0.0)} and isinstance(source, autoencoder.ToyWorld)
