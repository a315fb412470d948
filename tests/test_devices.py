"""Ready for a GPU, shown without one: every pipeline with its networks on a device that is not
the CPU.

The device is `meta`, where tensors have shapes and no numbers. Files, clips, noise and schedules
are on the CPU, as on a machine with a GPU; a tensor left on the wrong side meets one of the other
in some operation, and `Meeting` says which. What is read out of a tensor there (`.item()`,
`.cpu()`) is made up. Autograd goes through the same operations. Sharding is not shown here: FSDP
refuses weights on `meta`, and test_training_loop.py runs it in two processes.
"""
import dataclasses
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adapt
import ae
import kernels
import sample
import toy
from gpu import fp8, tiling
from tiny_layouts import FOLDERS, TEXT_DIM
from training import autoencoder, bases, distill, latents, loop, toy_base
from wan import light, released, vae
from wan.text import WanText

aten = torch.ops.aten
META, CPU = torch.device("meta"), torch.device("cpu")
BOTH_SIDES = {  # operations that take tensors of two devices on a GPU too
    aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default,
    aten.index_put.default}


class Meeting(TorchDispatchMode):
    """AssertionError where tensors of two devices meet; numbers for what is read out of `meta`.
    A single number on the CPU may meet anything, as on a GPU."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [t for t in given if t.is_meta]
        if there and func is aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1 if not args[0].is_floating_point() else 0.5)
        if there and func is aten._to_copy.default and kwargs.get("device") == CPU:
            return self.numbers(args[0], kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0].copy_(self.numbers(args[1], args[0].dtype))
        if there and func not in BOTH_SIDES:
            here = [list(t.shape) for t in given if not t.is_meta and t.ndim]
            assert not here, f"{func} meets {here} on the CPU and {list(there[0].shape)} elsewhere"
        return func(*args, **kwargs)

    @staticmethod
    def numbers(like, dtype):
        n = torch.linspace(0.1, 0.9, like.numel() or 1)[: like.numel()]
        return n.view(like.shape).to(dtype)


@pytest.fixture(autouse=True)
def meeting(monkeypatch):
    """All of a test under the mode; autocast, which `meta` has not, does nothing there."""
    real = torch.autocast

    def autocast(device_type, *args, **more):
        return real("cpu", enabled=False) if device_type == "meta" else real(device_type, *args, **more)

    monkeypatch.setattr(torch, "autocast", autocast)
    with Meeting():
        yield


def test_a_tensor_on_the_wrong_side_is_found():
    a, b = torch.ones(3), torch.ones(3, device=META, requires_grad=True)
    with pytest.raises(AssertionError, match="mul.Tensor meets .* on the CPU"):
        a * b
    (b * b).sum().backward()
    assert b.grad.is_meta and b.sum().item() == 0.5 and b.cpu().device == CPU


# ------------------------------------------------------------------------------------- sampling


SMALL = dict(frames=8, size=(32, 32), steps=3)


@pytest.fixture(params=["base", "dc"])
def model(tiny_toy, request):
    return released.load_model(request.param).to(META)


def video_of(model, z, frames=8, size=(32, 32), tile=None):
    return torch.cat(list(model.decode(z, frames, size, tile)), dim=2)


@pytest.mark.parametrize("solver", ["unipc", "unipc_diffusers", "dpm++", "euler"])
def test_sampling_with_every_solver(model, solver):
    context, image = model.text(["a red circle"]), torch.rand(1, 3, 40, 50)
    z = sample.generate(model, context, image, last_image=image, solver=solver, **SMALL)
    assert z.is_meta and video_of(model, z).shape == (1, 3, 8, 32, 32)


@pytest.mark.parametrize("how", [dict(cfg_batch=False), dict(cfg_batch=True, fp8=True)], ids=str)
def test_every_way_to_make_a_step(model, how):
    z = sample.generate(model, model.text(["a red circle", "a ring"]), **how, **SMALL)
    assert z.is_meta and len(z) == 2


def test_plain_kernels(model):
    kernels.use(plain=True)
    try:
        z = sample.generate(model, model.text(["a ring"]), plain=True, **SMALL)
        assert video_of(model, z).is_meta
    finally:
        kernels.use()


def test_many_prompts_and_a_score(model):
    assert all(v.device == CPU for v in sample.videos(model, ["a ring", "a circle"], **SMALL))


@pytest.fixture(scope="module")
def text_cache(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "cache.safetensors"
    text = WanText(None, None, cache=file, text_dim=TEXT_DIM)
    text.known = {"": torch.randn(3, TEXT_DIM), "a cat": torch.randn(4, TEXT_DIM)}
    text.write_cache(list(text.known))
    return text.cache


@pytest.mark.parametrize("name", [
    "wan2.2-t2v-a14b", "wan2.2-ti2v-5b", "dc-wan2.1-i2v-14b",
    pytest.param("dc-wan2.1-t2v-1.3b", marks=pytest.mark.slow),
    pytest.param("wan2.1-i2v-14b-480p", marks=pytest.mark.slow)])
def test_released_models(tiny_folders, text_cache, name):
    """Text and image encoder, both experts, a picture in its channels or as the first frame."""
    folders = [tiny_folders / folder for folder in FOLDERS[name][0]]
    model = released.load_model(name, folders, (), torch.bfloat16, META, text_cache)
    context, null = model.contexts(["a cat"], "")
    image = torch.rand(1, 3, 40, 50) if model.task != "t2v" else None
    settings = dict(frames=5, size=(64, 64), steps=2)
    z = sample.generate(model, context, image, null=null, **settings)
    assert z.is_meta and video_of(model, z, 5, (64, 64)).shape == (1, 3, 5, 64, 64)


# --------------------------------------------------------------------------------- autoencoders


AUTOENCODERS = {
    "DC-AE-V": (ae.DCAEV, ae.Config((0, 8, 8, 8), (0, 1, 1, 1), 4, chunk=8)),
    "causal": (ae.DCAEV, ae.Config((0, 8, 8, 8), (0, 1, 1, 1), 4, chunk=8, temporal="causal")),
    "Wan 2.1": (vae.WanVAE, dataclasses.replace(vae.PRESETS["wan2.1"], width=4, decoder_width=4)),
    "Wan 2.2": (vae.WanVAE, dataclasses.replace(vae.PRESETS["wan2.2"], width=4, decoder_width=4)),
}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders_whole_streamed_and_tiled(name):
    kind, config = AUTOENCODERS[name]
    net, side = kind(config).requires_grad_(False).to(META), 2 * config.spatial_factor
    x = torch.zeros(1, 3, 11, side, side, device=META)
    z = net.encode(x)
    made = [net.decode(z, 11, (side, side)),
            torch.cat(list(net.decode_stream(iter(z.split(1, dim=2)))), dim=2)[:, :, :11],
            torch.cat(list(tiling.decode_stream(net, z, (1, 1))), dim=2)[:, :, :11]]
    assert all(y.is_meta and y.shape == x.shape for y in made)
    latents = [torch.cat(list(net.encode_stream(x.split(3, dim=2))), dim=2),
               torch.cat(list(tiling.encode_stream(net, [x], (1, 1))), dim=2)]
    assert all(found.is_meta and found.shape == z.shape for found in latents)


WORLD = dict(size=(32, 32), frames=16, batch=2, steps=2, lr=1e-3, expected="", warmup=1, disc_width=4)
EVERYTHING = dict(
    perceptual_frames=1,
    l1=1.0, mse=1.0, jumps=0.1, border=0.1, perceptual=0.1, adversarial=0.05, noise=0.1, align=0.1,
    equivariance=0.1, correlation=0.1, front=1.0, masked=1.0)


@pytest.mark.parametrize("phases", [
    pytest.param([autoencoder.Phase("image", "space", **WORLD | dict(frames=1), images=0.0, perceptual=0.0),
                  autoencoder.Phase("low", "all", **WORLD, **EVERYTHING, images=0.5)], marks=pytest.mark.slow),
    [autoencoder.Phase("refine", "head", **WORLD, optimiser="muon", adversarial=0.05, perceptual_frames=1)],
], ids=["everything", "muon and an adversary"])
def test_training_an_autoencoder(tiny_toy, tmp_path, monkeypatch, phases):
    """Every loss, every part that is learned beside the network, evaluation, checkpoint."""
    monkeypatch.setitem(ae.PRESETS, "tiny", ae.Config((0, 8, 8, 8), (0, 1, 1, 1), 4, chunk=8))
    monkeypatch.setattr(autoencoder, "JUDGED", 1)
    monkeypatch.setattr(autoencoder, "MEASURED", 2)
    monkeypatch.setattr(latents.Aligner, "BATCHES", 2)
    monkeypatch.setattr(loop, "plot", lambda folder: None)
    monkeypatch.setattr(loop, "start", lambda: META)
    monkeypatch.setattr(latents, "load_autoencoder", lambda file: ae.DCAEV(ae.Config((0, 8, 8), (0, 1, 1), 4, chunk=8)))
    settings = autoencoder.Settings(perceptual="random", align_to=("base",))
    path = autoencoder.train("tiny", phases, autoencoder.ToyWorld(), tmp_path, settings)
    log = loop.read_log(path.parent)
    assert log[-1]["step"] == 2 and {"psnr", "ssim", "latent_rms"} <= log[-1].keys()
    if phases[0].name == "image":
        assert {"align", "correlation", "adversarial", "r_squared"} <= log[-1].keys()


def test_distilling_a_light_decoder(tiny_toy, tmp_path, monkeypatch):
    """From film and from latents that a transformer made there; with the adversary of the head."""
    monkeypatch.setitem(light.PRESETS, "tiny-light", dict(decoder_widths=(8, 8), decoder_depths=(1, 1), separable=1))
    monkeypatch.setattr(distill, "GENERATED", 2)
    monkeypatch.setattr(autoencoder, "JUDGED", 1)
    monkeypatch.setattr(loop, "plot", lambda folder: None)
    monkeypatch.setattr(loop, "start", lambda: META)
    shared = dict(WORLD, size=(toy.SIZE, toy.SIZE), images=0.0, perceptual=0.0, full=1.0)
    phases = [autoencoder.Phase("distill", "decoder", **shared, features=0.3, generated=1.0),
              autoencoder.Phase("refine", "head", **shared, adversarial=0.05)]
    full = ae.load(tiny_toy / "toy.safetensors")
    path = distill.distill(full, "tiny-light", phases, autoencoder.ToyWorld(), tmp_path,
                           autoencoder.Settings(perceptual="random"), "dc")
    assert path.is_file() and loop.read_log(path.parent)[-1]["step"] == 2


# ------------------------------------------------------------------------------------ adaptation


@pytest.fixture
def adapted(tiny_toy, tmp_path, monkeypatch):
    """adapted(*arguments) -> the folder that adapt.py made, all stages."""
    monkeypatch.setattr(toy_base, "SHARD", 8)
    monkeypatch.setattr(toy_base, "WITH_IMAGE", 4)
    monkeypatch.setattr(toy_base, "PROMPTS", toy_base.PROMPTS[:2])
    monkeypatch.setattr(loop, "plot", lambda folder: None)
    videos = sample.videos
    monkeypatch.setattr(sample, "videos", lambda *a, **more: videos(*a, **{"steps": 2, **more}))
    solve, toy = adapt.align.solve_head, bases.BASES["toy"]
    monkeypatch.setattr(adapt.align, "solve_head", lambda *a, **more: solve(*a, **more | dict(batches=1, batch=2)))
    monkeypatch.setitem(bases.BASES, "toy", dataclasses.replace(toy, validation=4, labels=toy_base.PROMPTS))

    def run(*more):
        args, given = adapt.arguments(["--base", "toy", "--shards", "1", "--steps-head", "1", "--steps", "2", "--batch", "2",
                                       "--accumulate", "1", "--rank", "2", "--prompts", "2", "--sample-steps", "4",
                                       "--out", str(tmp_path / "run"), *more])
        args.device, base = META, bases.find("toy")
        adapt.adapt(base, dataclasses.replace(base.settings, **given), args)
        return tmp_path / "run"

    return run


@pytest.mark.parametrize("more", [
    pytest.param(["--align", "sgd", "--steps-align", "2", "--head", "closed_form", "--checkpoint-blocks"],
                 marks=pytest.mark.slow),
    ["--align", "noise_aware", "--dtype", "fp32", "--ema", "0"]], ids=["sgd", "noise_aware"])
def test_all_stages_of_an_adaptation(adapted, more):
    """Latents and prompts encoded, both ends aligned, trained, LoRA, samples, report, export."""
    out = adapted(*more)
    stages = [row["stage"] for row in json.loads((out / "report.json").read_text())["stages"]]
    assert stages[0] == "base" and stages[-3:] == ["1a, assembled", "1b, head aligned", "2, LoRA"]
    assert {"transformer.safetensors", "lora.safetensors"} <= {p.name for p in out.iterdir()}


def test_the_toy_base(tiny_toy, tmp_path, monkeypatch):
    monkeypatch.setattr(toy_base, "SHARD", 4)
    monkeypatch.setattr(toy_base, "WITH_IMAGE", 2)
    videos = sample.videos
    monkeypatch.setattr(sample, "videos", lambda model, prompts: videos(model, prompts[:2], steps=2))
    monkeypatch.setattr(toy_base.toy_score, "prompt_fit", lambda made, prompts: {})
    monkeypatch.setattr(loop, "plot", lambda folder: None)
    args, _ = adapt.arguments(["--base", "toy", "--pretrain", "--shards", "1", "--steps", "2", "--batch", "2", "--lr", "1e-3",
                                "--ema", "0.9", "--seed", "0", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path)])
    args.device = META
    toy_base.pretrain(args)
    assert loop.read_log(tmp_path)[-1]["step"] == 2
