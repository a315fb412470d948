"""The released models: every published layout through the command line, the files and settings of each, and what is said when something is
wrong. All on tiny random models in the official layouts (wan/tiny.py, tests/tiny_layouts.py), through the code that reads the real files.

Prompts come from a text cache, as the packages of the real tokenizer may not be there; where they are, one test goes through tokenizer and
text encoder too. What other programs make of the same files: test_peer.py.
"""
import dataclasses
import fnmatch
import gc
import itertools
import json
import re
import shutil
import sys
import types
import warnings
import weakref
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dit
import flow
import lora
import sample
from conftest import ROOT, golden
from files import checkpoint, errors, video
from files.checkpoint import UserError
from gpu import choose
from tiny_layouts import DC_SHIFT, FOLDERS, TEXT_DIM
from wan import models, released, vae
from wan.image import CLIPVision
from wan.text import UMT5, WanText, clean_prompt

PROMPT, NEGATIVE = "a cat", "blurred"


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """Models collect garbage when they free memory; let that look only at what these tests make, not at all of torch and pytest."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def text_cache(tmp_path_factory):
    """A text cache with random states for PROMPT and NEGATIVE -> its path."""
    text = WanText(None, None, cache=tmp_path_factory.mktemp("text") / "cache.safetensors", text_dim=TEXT_DIM)
    text.known = {PROMPT: torch.randn(4, TEXT_DIM), NEGATIVE: torch.randn(3, TEXT_DIM)}
    text.write_cache(list(text.known))
    return text.cache


@pytest.fixture(scope="session")
def load(tiny_folders, text_cache):
    """load(name, layout number) -> Model, each loaded once"""
    @lru_cache
    def load(name, layout=0):
        return released.load_model(name, [tiny_folders / f for f in FOLDERS[name][layout]], text_cache=text_cache)

    return load


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.effect_noise((64, 48), 80).convert("RGB").save(file)
    return file


@pytest.fixture
def run(tiny_folders, text_cache, picture, tmp_path, monkeypatch):
    """run(name, folders, *more arguments) -> (video file without suffix, latent): the command line with one step, three frames of 24x34, and a
    picture for a model that takes one, where `more` does not say otherwise."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # main sets it: put back

    numbers = itertools.count()

    def run(name, folders, *more, weights=tiny_folders, with_picture=True):
        defaults = {"--prompt": PROMPT, "--negative": NEGATIVE, "--frames": 3, "--size": "24x34", "--steps": 1, "--text-cache": text_cache,
                    "--device": "cpu", "--out": tmp_path / "out" / str(next(numbers)), "--name": name}
        if released.RELEASED[name].task != "t2v" and with_picture:
            defaults["--image"] = picture
        given = [*map(str, more)]
        defaults = [str(part) for pair in defaults.items() if pair[0] not in given for part in pair]
        sample.main(["--model", name, "--weights", *(str(weights / f) for f in folders), *defaults, *given])
        file = Path(defaults[defaults.index("--out") + 1]) / name
        return file, checkpoint.load_tensors(f"{file}.safetensors")[0]["latent"]

    return run


@pytest.fixture
def refusal(run, tmp_path, capsys):
    """refusal(...) as run(...), which must refuse -> what it says: an error of status 1 without traceback, and no file is written."""
    def refusal(*arguments, **more):
        with pytest.raises(SystemExit) as e, errors.user_errors():
            run(*arguments, **more)
        said = capsys.readouterr().err
        assert e.value.code == 1 and "Traceback" not in said and "error: " in said
        assert not list(tmp_path.glob("out/*/*"))
        return said[said.index("error: ") + 7 :].strip()

    return refusal


@pytest.fixture
def copy(tiny_folders, tmp_path):
    """copy(folder) -> a copy of one folder that a test may damage; its parent is to be given as weights=."""
    return lambda folder: Path(shutil.copytree(tiny_folders / folder, tmp_path / "damaged" / folder))


# ---------------------------------------------------------------------------------------------------- every layout runs


@pytest.mark.parametrize("name, with_picture", [(name, True) for name in FOLDERS] + [("wan2.2-ti2v-5b", False)])
def test_every_layout_makes_the_same_video(run, name, with_picture):
    """Official folders -> mp4, through the command line; the layouts hold the same weights, so they give the same latent. Frames and rows
    are those that were asked for, also where latent frames (4) and cells (8, 16, 32 pixels) do not divide them."""
    steps = 2 if "a14b" in name else 1  # both experts
    latents = []
    for folders in FOLDERS[name]:
        file, z = run(name, folders, "--shift", 4, "--steps", steps, with_picture=with_picture)  # some folders bring a shift of their own
        latents.append(z)
    assert video.read_clip(f"{file}.mp4").shape == (3, 3, 24, 34) and video.clip_info(f"{file}.mp4").fps == ROWS[name][3]
    assert 0.3 < latents[0].std() < 10
    for z in latents[1:]:
        torch.testing.assert_close(z, latents[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_latent_is_that_of_its_autoencoder_and_transformer(load, name):
    model = load(name)
    z, cell, frames = {"wan2.1": (16, 16, 3), "wan2.2": (16, 16, 3), "dc-wan": (32, 32, 2)}[name[:6]] if "5b" not in name else (48, 32, 3)
    assert model.latent_shape(6, (40, 50)) == (frames, *(-(-n // cell) * cell // model.ae.config.spatial_factor for n in (40, 50)))
    assert model.net.config.out_channels == z and model.net.config.text_dim == TEXT_DIM


@pytest.mark.parametrize("frames, size", [(1, "16x16"), (2, "33x47"), (9, "7x90")])
@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.2-ti2v-5b", "dc-wan2.1-t2v-14b"])
def test_any_length_and_size_is_what_comes_out(load, name, frames, size):
    model, size = load(name), video.size_arg(size)
    z = sample.generate(model, torch.randn(1, 3, TEXT_DIM), frames=frames, size=size, steps=1, null=torch.zeros(1, 1, TEXT_DIM))
    assert torch.cat(list(model.decode(z, frames, size)), dim=2).shape == (1, 3, frames, *size)


def test_an_odd_size_gets_a_row_and_a_column_more_in_the_mp4_only(run):
    """H.264 needs even sizes."""
    file, _ = run("wan2.1-t2v-1.3b", ["Wan2.1-T2V-1.3B"], "--size", "33x47")
    assert video.read_clip(f"{file}.mp4").shape == (3, 3, 34, 48)


# ---------------------------------------------------------------------------------------------------- defaults

AREA = {480: 832 * 480, 720: 1280 * 720}
ROWS = {  # spec wan 1.2 and 9: height, width, frames, fps, steps, shift, guidance (low, high), solver, boundary
    "wan2.1-t2v-1.3b": (480, 832, 81, 16, 50, 5, 5, "unipc", 0),
    "wan2.1-t2v-14b": (720, 1280, 81, 16, 50, 5, 5, "unipc", 0),
    "wan2.1-i2v-14b-480p": (480, 832, 81, 16, 40, 3, 5, "unipc", 0),
    "wan2.1-i2v-14b-720p": (720, 1280, 81, 16, 40, 5, 5, "unipc", 0),
    "wan2.2-t2v-a14b": (720, 1280, 81, 16, 40, 12, (3, 4), "unipc", 0.875),
    "wan2.2-i2v-a14b": (720, 1280, 81, 16, 40, 5, (3.5, 3.5), "unipc", 0.9),
    "wan2.2-ti2v-5b": (704, 1280, 121, 24, 50, 5, 5, "unipc", 0),
    "dc-wan2.1-t2v-14b": (704, 1280, 80, 16, 50, 5, 5, "unipc_diffusers", 0),
    "dc-wan2.1-i2v-14b": (704, 1280, 80, 16, 50, 5, 5, "unipc_diffusers", 0),
    "dc-wan2.1-t2v-1.3b": (704, 1280, 80, 16, 50, 5, 3, "unipc_diffusers", 0),
}


@pytest.mark.parametrize("name", released.RELEASED)
def test_defaults_are_those_of_the_specification(load, name):
    height, width, *rest = ROWS[name]
    for given in (released.RELEASED[name], dataclasses.replace(load(name), shift=ROWS[name][5])):  # a folder's own shift: below
        assert given.size == (height, width)
        assert [given.frames, given.fps, given.steps, given.shift, given.guidance, given.solver, given.boundary] == rest
        assert given.task == ("ti2v" if "ti2v" in name else "i2v" if "i2v" in name else "t2v")


def test_the_rows_are_all_there_and_name_the_official_repositories():
    assert released.RELEASED.keys() == ROWS.keys() == FOLDERS.keys()
    for name, row in released.RELEASED.items():
        if row.repo:
            assert row.repo.split("/")[1] == FOLDERS[name][0][0]
        assert row.preset in dit.PRESETS


def test_negative_prompts_are_the_published_ones():
    text = (ROOT / "docs" / "spec" / "wan.md").read_text()
    after = lambda heading: re.search(re.escape(heading) + r".*?\n\n    (.*?)\n", text, re.S)[1]
    chinese, english = after("Default negative prompt (Wan):"), after("English negative prompt")
    for name, row in released.RELEASED.items():
        kind = "dc" if name.startswith("dc-") else "i2v" if "wan2.1-i2v" in name else "other"
        assert row.negative == {"dc": english, "i2v": "镜头晃动，" + chinese, "other": chinese}[kind]


@pytest.mark.parametrize("name, h, w, expected", [  # spec wan 7.2: area kept, multiples of 16, the picture's aspect; 7.3: multiples of 32
    ("wan2.1-i2v-14b-480p", 480, 832, (464, 832)),  # not 480: as in the original program, 480 / 832 is rounded and then floored
    ("wan2.1-i2v-14b-480p", 1000, 1000, (624, 624)), ("wan2.1-i2v-14b-720p", 720, 1280, (720, 1280)),
    ("wan2.1-i2v-14b-720p", 1280, 720, (1280, 720)), ("wan2.2-i2v-a14b", 3000, 1000, (1648, 544)), ("wan2.2-ti2v-5b", 704, 1280, (704, 1280)),
    ("wan2.2-ti2v-5b", 1920, 1080, (1248, 704)), ("wan2.2-ti2v-5b", 500, 500, (928, 960)), ("dc-wan2.1-i2v-14b", 2160, 3840, (704, 1280)),
    ("dc-wan2.1-i2v-14b", 600, 800, (832, 1088))])
def test_the_size_is_the_models_area_in_the_pictures_aspect(load, name, h, w, expected):
    assert load(name).size_for(torch.empty(3, h, w)) == expected


def test_the_scheduler_file_of_a_dc_videogen_folder_sets_the_shift(load, copy, text_cache):
    """spec wan 9.3: read it, default 5. The diffusers conversions of the base models ship 3, which their original programs do not use."""
    assert [load("dc-wan2.1-i2v-14b", layout).shift for layout in (0, 1, 2)] == [DC_SHIFT, DC_SHIFT, 5.0]
    assert load("wan2.1-t2v-1.3b", 1).shift == 5.0


def test_the_boundary_of_a_diffusers_folder_is_its_own(load, copy, text_cache):
    folder = copy("Wan2.2-T2V-A14B-Diffusers")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.5}))
    assert released.load_model("wan2.2-t2v-a14b", [folder], text_cache=text_cache).boundary == 0.5
    assert load("wan2.2-t2v-a14b", 1).boundary == 0.875


# ---------------------------------------------------------------------------------------------------- two experts


class Constant(torch.nn.Module):
    """A transformer whose velocity is the mean of its context, and which notes its timesteps."""

    def __init__(self, config):
        super().__init__()
        self.config, self.timesteps = config, []

    def forward(self, x, t, context):
        self.timesteps.append(t.item())
        return torch.full_like(x, context.mean())


@pytest.mark.core
@pytest.mark.parametrize("steps, shift", [(8, 12.0), (5, 2.0)])
def test_experts_take_turns_at_the_boundary_each_with_its_guidance(load, steps, shift):
    model = load("wan2.2-t2v-a14b")
    high, low = Constant(model.net.config), Constant(model.net.config)
    model = dataclasses.replace(model, net=high, low=low)
    noise = torch.randn(1, 16, 1, 2, 2)
    one, zero = torch.ones(1, 1, TEXT_DIM), torch.zeros(1, 1, TEXT_DIM)
    z = sample.generate(model, one, null=zero, noise=noise, frames=1, size=(16, 16), steps=steps, shift=shift, guidance=(3.0, 4.0),
                        solver="euler", cfg_batch=False, plain=True)
    sigmas, timesteps = flow.schedule("euler", steps, shift)
    before = [t.item() for t in timesteps if t >= 875]
    assert high.timesteps[::2] == before and low.timesteps[::2] == [t.item() for t in timesteps[len(before) :]]
    assert 0 < len(before) < steps
    guidance = torch.where(timesteps >= 875, 4.0, 3.0)  # the velocity is 1 with the prompt, 0 without
    torch.testing.assert_close(z, noise + (sigmas.diff() * guidance).sum().float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [0, 1])
def test_only_one_expert_is_in_memory(load, monkeypatch, layout):
    """When the second one is read, nothing holds the first one any more."""
    alive, most, read = weakref.WeakSet(), [], dit.load

    def watched(path, **more):
        most.append(len(alive))
        net = read(path, **more)
        alive.add(net)
        return net

    monkeypatch.setattr(models.wan_nets, "load", watched)
    model = load("wan2.2-t2v-a14b", layout)
    model = dataclasses.replace(model, net=models.Deferred(model.net.path), low=models.Deferred(model.low.path))
    assert model.net.net is None  # read when it is needed
    sample.generate(model, torch.randn(1, 3, TEXT_DIM), null=torch.zeros(1, 1, TEXT_DIM), frames=1, size=(16, 16), steps=8)
    assert most == [0, 0] and model.net.net is None and model.low.net is not None


# ---------------------------------------------------------------------------------------------------- pictures


def reference(case):
    """The golden pipeline: its tensors, and the transformer of the case."""
    tensors = {k.removeprefix(f"{case}/").removeprefix("in/"): v for k, v in load_file(golden("wan_pipeline_tiny.safetensors")).items()
               if k.startswith((f"{case}/", "in/"))}
    weights = load_file(golden("wan_dit_tiny.safetensors")).items()
    weights = {k.removeprefix(f"{case}/weights/"): v for k, v in weights if k.startswith(f"{case}/weights/")}
    settings = dict(steps=6, shift=5.0, guidance=3.0, noise=tensors["noise"], null=tensors["negative_prompt_embeds"][None])
    return tensors, dit.from_state_dict(weights, heads=2), tensors["prompt_embeds"][None], settings


def stub_autoencoder(mix, scale, factor=32, lead=4):
    """The autoencoder of the golden pipeline: the latent is `mix` times the mean colour of each block of 4 x 32 x 32 pixels."""
    config = types.SimpleNamespace(latent_channels=len(mix), spatial_factor=factor, temporal_factor=4, lead=lead, scale=scale)
    stub = types.SimpleNamespace(config=config)
    def encode_stream(clips):
        for x in clips:
            mean = torch.nn.functional.avg_pool3d(x, (4, 32, 32))
            yield torch.einsum("zc,bcthw->bzthw", mix, mean)

    stub.encode_stream = encode_stream
    stub.to = lambda *_: stub
    return stub


@pytest.mark.core
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_text_to_video_equals_the_reference(solver, plain):
    """The whole guided loop of the released program, with and without what is kept from step to step."""
    tensors, net, context, settings = reference("t2v")
    model = models.Model("golden", net, stub_autoencoder(torch.zeros(16, 3), 1.0, factor=8, lead=1), None, task="t2v")
    settings["noise"] = settings["noise"][None]
    z = sample.generate(model, context, frames=9, size=(64, 96), solver=solver, plain=plain, **settings)
    torch.testing.assert_close(z[0], tensors[f"latents_{solver}"], rtol=0, atol=2e-4)


@pytest.mark.core
@pytest.mark.parametrize("plain", [False, True])
def test_dc_videogen_image_to_video_equals_the_reference(plain):
    """Condition (mask and latent) and the whole guided loop of the released pipeline."""
    tensors, net, context, settings = reference("dc_i2v")
    autoencoder = stub_autoencoder(tensors["ae_stub_mix"], 0.7241)
    model = models.Model("golden", net, autoencoder, None, task="i2v", clip=lambda image: tensors["clip_fea"])
    image = tensors["image"] * 2 - 1
    seen = model.image_condition(1, model.latent_shape(16, (64, 96)), (64, 96), image)
    torch.testing.assert_close(seen.condition, tensors["condition"], rtol=0, atol=1e-6)
    z = sample.generate(model, context, image, frames=16, size=(64, 96), solver="unipc_diffusers", plain=plain, **settings)
    torch.testing.assert_close(z, tensors["latents_unipc_diffusers"], rtol=0, atol=2e-4)


def test_the_condition_of_the_base_model_equals_the_reference():
    """Condition latent and mask of the original image-to-video program (spec wan 7.2); with the full golden file also its resized picture."""
    tensors = load_file(golden("wan_vae_tiny.safetensors"))
    autoencoder = vae.from_state_dict({k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")})
    net = dit.WanDiT(dit.Config(dim=24, ffn_dim=8, heads=2, layers=1, in_channels=36, out_channels=16, text_dim=8))
    model = models.Model("golden", net, autoencoder, None, task="i2v", picture="wan")
    resized = tensors["out/i2v_image_resized"][None]
    image, size = tensors["in/image"][None] if "in/image" in tensors else resized, tuple(resized.shape[2:])
    seen = model.image_condition(1, model.latent_shape(9, size), size, image)
    torch.testing.assert_close(models.resize(image, size, "wan"), resized, rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.condition[0], tensors["out/i2v_condition"], rtol=0, atol=2e-5)


def test_ti2v_keeps_the_picture_as_its_first_frame(load):
    """At every step the transformer sees the picture's latent in frame 0, at time 0, and so does the result (spec wan 2.8)."""
    model, image, calls = load("wan2.2-ti2v-5b"), torch.rand(1, 3, 40, 60) * 2 - 1, []
    spy = model.transformer().register_forward_pre_hook(lambda module, args: calls.append(args))
    settings = dict(frames=9, size=(64, 96), steps=3, null=torch.zeros(1, 1, TEXT_DIM), plain=True, cfg_batch=False)
    z = sample.generate(model, torch.randn(1, 3, TEXT_DIM), image, **settings)
    first = model.encode(models.resize(image, (64, 96), "dc")[:, :, None])
    assert torch.equal(z[:, :, :1], first) and len(calls) == 6
    for x, t, *_ in calls:
        assert torch.equal(x[:, :, :1], first) and not t[:, 0].any() and t[:, 1:].min() == t[:, 1:].max() > 0
    spy.remove()
    other = sample.generate(model, torch.randn(1, 3, TEXT_DIM), -image, **settings)
    assert not torch.allclose(z[:, :, 1:], other[:, :, 1:], atol=0.01)  # the rest of the video knows of it


@pytest.mark.parametrize("name, frames", [("dc-wan2.1-i2v-14b", 12), ("wan2.2-i2v-a14b", 13)])
def test_first_and_last_frame(load, name, frames):
    """The last picture stands at the end of the condition clip: 4 frames of it where the first latent frame is 4, else 1 (spec wan 7.2, 7.4)."""
    model, (first, last) = load(name), torch.rand(2, 1, 3, 64, 64) * 2 - 1
    shape = model.latent_shape(frames, (64, 64))
    lead = 4 if name.startswith("dc") else 1
    clip = torch.cat([first[:, :, None].expand(-1, -1, lead, -1, -1), torch.zeros(1, 3, frames - 2 * lead, 64, 64),
                      last[:, :, None].expand(-1, -1, lead, -1, -1)], dim=2)
    seen = model.image_condition(1, shape, (64, 64), first, last).condition
    torch.testing.assert_close(seen[:, 4:], model.encode(clip)[:, :, : shape[0]])
    mask = seen[0, :4, :, 0, 0]
    assert mask[:, 0].tolist() == [1] * 4 and mask[:, -1].tolist() == [0] * (4 - lead) + [1] * lead and not mask[:, 1:-1].any()
    assert torch.equal(mask[:, :, None, None].expand(-1, -1, *shape[1:]), seen[0, :4])


def test_the_last_frame_from_the_command_line(run, picture):
    make = lambda *more: run("wan2.2-i2v-a14b", ["Wan2.2-I2V-A14B"], *more)[1]
    assert not torch.allclose(make(), make("--last-image", picture), atol=0.01)


def test_pictures_that_a_model_cannot_use(refusal, picture):
    assert "is a text-to-video model: leave --image away." in refusal("wan2.1-t2v-1.3b", ["Wan2.1-T2V-1.3B"], "--image", picture)
    assert "takes only a first frame" in refusal("wan2.2-ti2v-5b", ["Wan2.2-TI2V-5B"], "--image", picture, "--last-image", picture)
    assert "does not exist: give the path of a picture" in refusal("wan2.1-i2v-14b-480p", ["Wan2.1-I2V-14B-480P"], "--image", "none.png")


def test_an_image_to_video_model_without_a_picture(load):
    model = load("wan2.1-i2v-14b-480p")
    with pytest.raises(UserError, match="needs the first frame: give a picture with --image"):
        sample.generate(model, torch.randn(1, 3, TEXT_DIM), null=torch.zeros(1, 1, TEXT_DIM), frames=1, size=(16, 16), steps=1)


def test_a_picture_of_odd_size_with_transparency_that_lies_on_its_side(run, tmp_path):
    """It is what a viewer shows: upright, on white."""
    upright = Image.effect_noise((47, 33), 80).convert("RGB")
    mask = Image.linear_gradient("L").resize(upright.size).point(lambda v: 255 * (v > 128))
    clear, upright = upright.copy(), Image.composite(upright, Image.new("RGB", upright.size, "white"), mask)
    upright.save(tmp_path / "plain.png")
    clear.putalpha(mask)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees to the right"
    clear.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    make = lambda file: run("wan2.2-i2v-a14b", ["Wan2.2-I2V-A14B"], "--image", tmp_path / file, "--size", "33x47")[1]
    assert torch.equal(make("turned.png"), make("plain.png"))


# ---------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture
def adapter(tiny_folders, tmp_path):
    """adapter(folder) -> {layout: file}: one adapter for the transformer in this folder, in every layout of the wild."""
    def write(folder):
        net = lora.wrap(dit.load(tiny_folders / folder), rank=2, alpha=4)
        for _, layer in lora.adapters(net):
            torch.nn.init.normal_(layer.up, std=0.5)
        files = {layout: tmp_path / f"{layout}.safetensors" for layout in ("peft", "comfyui", "kohya", "delta")}
        for layout in ("peft", "comfyui", "kohya"):
            lora.save(net, files[layout], layout)
        delta = {f"diffusion_model.{name}.diff": layer.alpha / layer.rank * layer.up @ layer.down for name, layer in lora.adapters(net)}
        checkpoint.save_tensors(files["delta"], delta)
        return files

    return write


def test_loras_in_every_layout(tiny_folders, adapter):
    """All four change the weights in the same way, half as much at half the strength, and two of them add up."""
    weights = lambda *loras: models.Deferred(tiny_folders / "Wan2.1-T2V-1.3B", loras).get("cpu").state_dict()
    plain, files = weights(), adapter("Wan2.1-T2V-1.3B")
    peft = weights((files["peft"], 1.0))
    changed = [name for name in plain if not torch.equal(plain[name], peft[name])]
    assert "blocks.1.ffn.2.weight" in changed and "blocks.0.cross_attn.q.weight" not in changed
    for file in files.values():
        once, half, twice = weights((file, 1.0)), weights((file, 0.5)), weights((files["peft"], 0.5), (file, 0.5))
        for name in plain:
            torch.testing.assert_close(once[name], peft[name], rtol=0, atol=1e-5)
            torch.testing.assert_close(half[name] - plain[name], 0.5 * (peft[name] - plain[name]), rtol=0, atol=1e-5)
            torch.testing.assert_close(twice[name], peft[name], rtol=0, atol=1e-5)


def test_loras_from_the_command_line(run, adapter):
    file = adapter("Wan2.1-T2V-1.3B")["kohya"]
    make = lambda *more: run("wan2.1-t2v-1.3b", ["Wan2.1-T2V-1.3B"], *more)[1]
    plain, once, halves = make(), make("--lora", file), make("--lora", f"{file}:0.5", "--lora", f"{file}:0.5")
    torch.testing.assert_close(halves, once, rtol=0, atol=1e-4)
    assert not torch.allclose(once, plain, atol=0.01)


def test_a_lora_for_one_expert(load, adapter, tiny_folders):
    file = adapter("Wan2.2-T2V-A14B/high_noise_model")["comfyui"]
    plain = [load("wan2.2-t2v-a14b").transformer(t).state_dict()["blocks.0.ffn.0.weight"] for t in (999, 1)]
    for only, changed in ((), (True, True)), (("high",), (True, False)), (("low",), (False, True)):
        model = released.load_model("wan2.2-t2v-a14b", tiny_folders / "Wan2.2-T2V-A14B", loras=[(file, 1.0, *only)])
        now = [model.transformer(t).state_dict()["blocks.0.ffn.0.weight"] for t in (999, 1)]
        assert tuple(not torch.equal(a, b) for a, b in zip(now, plain)) == changed


def test_a_lora_of_another_base_or_none(refusal, adapter, tmp_path):
    wide = adapter("DC-VideoGen-Wan2.1-14B/transformer_i2v")["peft"]
    said = refusal("wan2.1-t2v-1.3b", ["Wan2.1-T2V-1.3B"], "--lora", wide)
    assert re.search(r"was made for another base: its \S+ is \d* ?x? ?128\b.*, this model's is .*\b24\b", said)
    assert "none.safetensors does not exist" in refusal("wan2.1-t2v-1.3b", ["Wan2.1-T2V-1.3B"], "--lora", "none.safetensors:0.5")


# ---------------------------------------------------------------------------------------------------- again and in other ways


def test_a_saved_latent_is_decoded_again(run, tmp_path, capsys):
    """The same frames, from the model, folder, size and frames that the file names; the transformer is not read."""
    name = "dc-wan2.1-t2v-14b"
    file, _ = run(name, FOLDERS[name][0])
    sample.main(["--decode", f"{file}.safetensors", "--device", "cpu", "--out", str(tmp_path / "again")])
    again, first = (video.read_clip(f) for f in (tmp_path / "again" / f"{name}.mp4", f"{file}.mp4"))
    assert torch.equal(again, first)
    assert sorted(f.name for f in (tmp_path / "again").iterdir()) == [f"{name}.{suffix}" for suffix in ("json", "mp4", "png")]


def test_a_plan_writes_nothing(run, tmp_path, capsys):
    sample.main(["--model", "wan2.1-t2v-14b", "--prompt", PROMPT, "--plan", "--device", "cpu", "--memory", "80"])
    said = capsys.readouterr().out
    assert "81 frames of 720x1280" in said and "GiB" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["wan2.2-i2v-a14b", "wan2.2-ti2v-5b", "dc-wan2.1-i2v-14b"])
def test_other_ways_to_the_same_latent(load, name):
    """One pass or two, with and without what is kept between steps: equal to rounding, with all that a transformer may see."""
    model, image = load(name), torch.rand(1, 3, 40, 50) * 2 - 1
    context, null = torch.randn(1, 7, TEXT_DIM), torch.randn(1, 3, TEXT_DIM)
    first, *others = (sample.generate(model, context, image, frames=6, size=(24, 34), steps=2, shift=4, null=null, cfg_batch=batch, plain=plain)
                      for batch, plain in ((False, True), (True, True), (False, False), (True, False)))
    for z in others:
        torch.testing.assert_close(z, first, rtol=0, atol=1e-4)


def test_bf16(run, monkeypatch):
    """Matrix products of the transformer in bf16, for DC-VideoGen its autoencoder too: the same video, but for rounding."""
    monkeypatch.setattr(choose, "without_bf16", lambda device: None)  # slow on some CPUs, but right
    name = "dc-wan2.1-i2v-14b"
    exact, rounded = run(name, FOLDERS[name][0])[1], run(name, FOLDERS[name][0], "--dtype", "bf16")[1]
    assert 1e-4 < (rounded - exact).abs().mean() < 0.05


def test_other_ways_to_the_same_video(run):
    """Whatever leaves the device meanwhile."""
    way = lambda *more: run("wan2.2-t2v-a14b", ["Wan2.2-T2V-A14B"], *more)
    file, z = way("--offload", "none")
    frames = video.read_clip(f"{file}.mp4")
    for more in (["--offload", "parts"], ["--offload", "blocks"]):
        again, other = way(*more)
        torch.testing.assert_close(other, z, rtol=0, atol=1e-4)
        assert (video.read_clip(f"{again}.mp4") - frames).abs().mean() < 2 / 255  # the codec may see another rounding


@pytest.mark.parametrize("more, says", [
    (["--guidance", "3,4"], "has one transformer, no experts: give one number with --guidance."),
    (["--lora", "{cache}:1:high"], "has one transformer, no experts: use --lora .*:1 without :high."),
    (["--text-cache", "cache.pt"], "must have a name that ends in .safetensors"),
    (["--memory", "1e-6"], "needs about .* GiB free: use a smaller --size"),
    (["--shift", "0"], "argument --shift: '0' is not a number above 0"),
])
def test_arguments_that_do_not_fit(refusal, text_cache, more, says):
    said = refusal("wan2.1-t2v-1.3b", ["Wan2.1-T2V-1.3B"], *(part.format(cache=text_cache) for part in more))
    assert re.search(says, said) and "\n" not in said, said


# ---------------------------------------------------------------------------------------------------- files that are not there


@pytest.mark.parametrize("name, gone, missing", [
    ("wan2.1-t2v-1.3b", ["Wan2.1_VAE.pth"], ["autoencoder: Wan2.1_VAE.pth or vae/*.safetensors"]),
    ("wan2.1-i2v-14b-480p", ["models_*.pth", "google"], [
        "text encoder: models_t5_umt5-xxl-enc-bf16.pth or text_encoder/*.safetensors", "tokenizer: google/umt5-xxl/* or tokenizer/*",
        "image encoder: models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or image_encoder/*.safetensors"]),
    ("wan2.2-t2v-a14b", ["low_noise_model"], ["low-noise transformer: low_noise_model/*.safetensors or transformer_2/*.safetensors"]),
    ("wan2.2-ti2v-5b", ["Wan2.2_VAE.pth"], ["autoencoder: Wan2.2_VAE.pth or vae/*.safetensors"]),
    ("dc-wan2.1-t2v-14b", ["*.pt", "transformer_t2v"], [
        "transformer: transformer_t2v/*.safetensors or transformer/*.safetensors",
        "autoencoder: dc-ae-v-f32t4c32-1.0-bf16.pt or dc-ae-v-1.0-f32t4c32-bf16.pt"]),
])
def test_missing_files_are_listed_with_the_command_that_fetches_them(refusal, copy, tmp_path, name, gone, missing):
    """Exactly those that are missing, all at once."""
    folder = copy(FOLDERS[name][0][0])
    for pattern in gone:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = refusal(name, [folder.name], "--text-cache", tmp_path / "new.safetensors", weights=folder.parent)
    first, *lines = said.splitlines()
    assert first == f"{name} is not complete in {folder}; missing are"
    assert [line.strip() for line in lines if re.match(r"    \S+( \S+)?( \S+)?: ", line)] == missing
    command = lines[-1].strip()
    assert command.startswith(f"hf download {released.RELEASED[name].repo} --include ") and command.endswith(f" --local-dir {folder}")
    for part in missing:
        assert f'"{part.split(": ")[1].split(" or ")[0]}"' in command


def test_a_folder_that_is_not_there(refusal, tmp_path):
    said = refusal("wan2.1-t2v-14b", ["nowhere"], "--text-cache", tmp_path / "new.safetensors", weights=tmp_path)
    assert len(re.findall(r"\n    \S+( \S+)?: ", said)) == len(released.RELEASED["wan2.1-t2v-14b"].files)
    assert "nothing" not in said and "Wan-AI/Wan2.1-T2V-14B" in said


def test_a_full_text_cache_needs_no_text_encoder(copy, text_cache):
    folder = copy("Wan2.1-T2V-1.3B")
    shutil.rmtree(folder / "google")
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    model = released.load_model("wan2.1-t2v-1.3b", folder, text_cache=text_cache)
    assert [len(states[0]) for states in model.contexts([PROMPT], NEGATIVE)] == [4, 4]
    with pytest.raises(UserError, match="'a dog' is not in .*cache.safetensors, and (to|for) encod.* it the text encoder .* must be there"):
        model.contexts(["a dog"], NEGATIVE)


def test_parts_may_lie_in_several_folders(copy, tiny_folders, text_cache):
    folder, other = copy("Wan2.1-T2V-1.3B"), tiny_folders / "Wan2.1-T2V-14B"
    (folder / "Wan2.1_VAE.pth").unlink()
    model = released.load_model("wan2.1-t2v-1.3b", [folder, other], text_cache=text_cache)
    assert (model.net.path, model.text.encoder_path.parent) == (folder, folder)
    assert released.locate("wan2.1-t2v-1.3b", [folder, other])["autoencoder"].parent == other


@pytest.fixture
def hub(tiny_folders, monkeypatch):
    """The hub's client, with the tiny folders as the hub."""
    def snapshot_download(repo_id, local_dir, allow_patterns):
        source = tiny_folders / repo_id.split("/")[1]
        for file in (file for file in source.rglob("*") if file.is_file()):
            path = str(file.relative_to(source))
            if any(fnmatch.fnmatch(path, pattern) for pattern in allow_patterns):  # as the client does it: * goes across folders
                (Path(local_dir) / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, Path(local_dir) / path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))


@pytest.mark.parametrize("name", [name for name, row in released.RELEASED.items() if row.repo])
def test_download_fetches_all_that_is_needed(hub, tmp_path, name):
    """From the model's own repository, into the folder that was named; of a repository with two models only this one's transformer."""
    released.download(name, tmp_path / "new")
    model = released.load_model(name, tmp_path / "new")
    assert isinstance(model.transformer(), dit.WanDiT) and UMT5.load(model.text.encoder_path)
    assert (Path(model.text.tokenizer_path) / "tokenizer.json").is_file()
    assert model.clip is None or CLIPVision.load(model.clip.encoder_path)
    if name.startswith("dc-"):
        assert {f.parent.name for f in (tmp_path / "new").glob("transformer*/*.safetensors")} == {f"transformer_{name.split('-')[2]}"}
        assert model.shift == DC_SHIFT  # its scheduler came too


def test_download_from_the_command_line(hub, run, tmp_path):
    run("wan2.1-t2v-1.3b", [tmp_path / "new"], "--download")
    assert (tmp_path / "new" / "Wan2.1_VAE.pth").is_file()


def test_downloads_that_fail(monkeypatch, tmp_path, refusal):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not installed
    said = refusal("wan2.1-t2v-1.3b", [tmp_path / "new"], "--download")
    assert said.startswith("--download needs the hub's client: pip install huggingface_hub") and "hf download Wan-AI/Wan2.1-T2V-1.3B" in said
    assert "no place to fetch dc-wan2.1-t2v-1.3b from is known" in refusal("dc-wan2.1-t2v-1.3b", [tmp_path / "new"], "--download")

    def fails(*_, **__):
        raise OSError("no network\nsecond line")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=fails))
    said = refusal("wan2.1-t2v-1.3b", [tmp_path / "new"], "--download")
    assert said == "the download of Wan-AI/Wan2.1-T2V-1.3B failed (no network): run it again, finished files are kept."


# ---------------------------------------------------------------------------------------------------- files that are wrong


def cut(file, size):
    """Truncate; negative: leave away so many bytes at the end."""
    file.write_bytes(file.read_bytes()[:size])


def change(file, how):
    """Rewrite a .safetensors file with what `how` makes of its tensors."""
    tensors, metadata = checkpoint.load_tensors(file)
    checkpoint.save_tensors(file, how(tensors), metadata)


LARGE, SINGLE, DC = "wan2.1-t2v-14b", "wan2.1-t2v-1.3b", "dc-wan2.1-t2v-14b"  # in shards, in one file, in 32 channels
FILE, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
SHARD = "diffusion_pytorch_model-00003-of-00006.safetensors"
T5, CLIP, DEEP = "models_t5_umt5-xxl-enc-bf16.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "dc-ae-v-f32t4c32-1.0-bf16.pt"
DAMAGE = {  # what was done: (model, layout, how: given the folder and all folders, what is said)
    "shard cut early": (LARGE, 0, lambda f, _: cut(f / SHARD, 1000), f"{SHARD} is not a complete safetensors file"),
    "shard cut at the end": (LARGE, 0, lambda f, _: cut(f / SHARD, -1), f"{SHARD} is not a complete safetensors file"),
    "shard empty": (LARGE, 0, lambda f, _: cut(f / SHARD, 0), f"{SHARD} is not a complete safetensors file"),
    "shard gone": (LARGE, 0, lambda f, _: (f / SHARD).unlink(), f"{SHARD} does not exist, but {INDEX} names it"),
    "shard gone, diffusers": (LARGE, 1, lambda f, _: (f / "transformer" / SHARD.replace("3-of-00006", "2-of-00002")).unlink(),
                              "00002-of-00002.safetensors does not exist, but .* names it"),
    "shard of a larger model": (LARGE, 0, lambda f, all: shutil.copy(all / "Wan2.1-I2V-14B-480P" / SHARD.replace("06.", "07."), f / SHARD),
                                "these are shards of"),
    "shard twice": (LARGE, 0, lambda f, _: shutil.copy(f / SHARD.replace("00003", "00002"), f / SHARD), "these are shards of two models"),
    "shard of another width": (LARGE, 0, lambda f, _: change(f / SHARD, lambda t: {k: v[..., :-1] for k, v in t.items()}),
                               rf"has shape \[.*\] in {SHARD}, expected"),
    "index is a web page": (LARGE, 0, lambda f, _: (f / INDEX).write_text("<html>"), f"{INDEX} is not valid JSON"),
    "index gone": (LARGE, 0, lambda f, _: (f / INDEX).unlink(), "holds 6 .safetensors files and no index"),
    "config cut": (LARGE, 0, lambda f, _: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "tensor gone": (SINGLE, 0, lambda f, _: change(f / FILE, lambda t: {k: t[k] for k in t if k != "blocks.1.norm3.bias"}),
                    "1 missing .first: blocks.1.norm3.bias"),
    "tensor too many": (SINGLE, 0, lambda f, _: change(f / FILE, lambda t: {**t, "blocks.0.audio.weight": torch.zeros(1)}),
                        "1 unexpected .first: blocks.0.audio.weight"),
    "autoencoder cut": (SINGLE, 0, lambda f, _: cut(f / "Wan2.1_VAE.pth", 5000), "Wan2.1_VAE.pth is not a complete torch checkpoint"),
    "autoencoder of 2.2": (SINGLE, 0, lambda f, all: shutil.copy(all / "Wan2.2-TI2V-5B" / "Wan2.2_VAE.pth", f / "Wan2.1_VAE.pth"),
                           "makes latents of 16 channels, but its autoencoder reads 48"),
    "text encoder as autoencoder": (SINGLE, 0, lambda f, _: shutil.copy(f / T5, f / "Wan2.1_VAE.pth"), "holds no Wan autoencoder"),
    "image encoder cut": ("wan2.1-i2v-14b-480p", 0, lambda f, _: cut(f / CLIP, 5000), f"{CLIP} is not a complete torch checkpoint"),
    "autoencoder as image encoder": ("wan2.1-i2v-14b-480p", 0, lambda f, _: shutil.copy(f / "Wan2.1_VAE.pth", f / CLIP),
                                     "not the weights of a CLIP vision tower"),
    "DC-AE-V cut": (DC, 0, lambda f, _: cut(f / DEEP, 5000), f"{DEEP} is not a complete torch checkpoint"),
    "base autoencoder as DC-AE-V": (DC, 0, lambda f, all: shutil.copy(all / "Wan2.1-T2V-14B" / "Wan2.1_VAE.pth", f / DEEP),
                                    "holds no DC-AE-V"),
    "base transformer in a DC folder": (
        DC, 0, lambda f, all: shutil.copytree(all / "Wan2.1-T2V-14B-Diffusers" / "transformer", f / "transformer_t2v", dirs_exist_ok=True),
        "transformer of another model: 16 channels in, 16 out, patches of 1x2x2, no image branch; dc-wan2.1-t2v-14b has 32 channels in"),
    "one expert cut": ("wan2.2-t2v-a14b", 0, lambda f, _: cut(f / "low_noise_model" / SHARD, 1000),
                       f"low_noise_model/{SHARD} is not a complete safetensors file"),
}


@pytest.mark.parametrize("name, layout, damage, says", DAMAGE.values(), ids=DAMAGE)
def test_damaged_and_mixed_up_files(refusal, copy, tiny_folders, name, layout, damage, says):
    """One sentence that names the file or the tensor."""
    folder = copy(FOLDERS[name][layout][0])
    damage(folder, tiny_folders)
    said = refusal(name, [folder.name], weights=folder.parent)
    assert re.search(says, said) and "\n" not in said, said


@pytest.mark.parametrize("name, folders", [
    ("wan2.1-t2v-14b", ["Wan2.1-I2V-14B-480P"]),
    ("wan2.1-i2v-14b-480p", ["Wan2.2-I2V-A14B-Diffusers", "Wan2.1-I2V-14B-480P"]),
    ("wan2.2-i2v-a14b", ["Wan2.2-T2V-A14B"]), ("dc-wan2.1-i2v-14b", ["DC-Gen-Wan2.1-T2V-14B", "Wan2.1-I2V-14B-480P"]),
    ("dc-wan2.1-t2v-14b", ["Wan2.1-T2V-14B-Diffusers", "DC-VideoGen-Wan2.1-14B"])])
def test_the_files_of_another_model(refusal, name, folders):
    said = refusal(name, folders)
    assert re.fullmatch(rf"\S+ holds the transformer of another model: \d+ channels in, .*; {name} has .*: name its folder .*", said)


# ---------------------------------------------------------------------------------------------------- prompts

AWKWARD = {"empty": "", "5,000 words": "very long prompt " * 1667, "Chinese": "一只猫在弹钢琴，画面模糊", "emoji": "a 🐱 on the piano 🎹",
           "only emoji": "🎹", "line breaks": "a cat\n\n  on the piano\t"}


@pytest.mark.filterwarnings("ignore:the prompt")
@pytest.mark.parametrize("prompt", AWKWARD.values(), ids=AWKWARD)
def test_awkward_prompts_through_the_text_encoder(run, tmp_path, prompt):
    """From tokenizer and text encoder, with the model's own negative prompt, into a cache; the second run needs neither of them."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("ftfy")
    make = lambda: run("wan2.1-t2v-1.3b", ["Wan2.1-T2V-1.3B"], "--prompt", prompt, "--negative", released.NEGATIVE, "--text-cache",
                       tmp_path / "new.safetensors")[1]
    first = make()
    known, metadata = checkpoint.load_tensors(tmp_path / "new.safetensors")
    assert len(known) == 2 and max(len(states) for states in known.values()) <= 512
    assert clean_prompt(prompt) in metadata["prompts"].values()
    assert torch.equal(make(), first)


@pytest.mark.parametrize("prompt", [AWKWARD["empty"], AWKWARD["5,000 words"]], ids=["empty", "5,000 words"])
def test_awkward_prompts_from_the_cache(run, tmp_path, prompt):
    text = WanText(None, None, cache=tmp_path / "new.safetensors", text_dim=TEXT_DIM)
    text.known = {clean_prompt(prompt): torch.randn(512, TEXT_DIM), NEGATIVE: torch.randn(1, TEXT_DIM)}
    text.write_cache(list(text.known))
    file, _ = run("wan2.1-t2v-1.3b", ["Wan2.1-T2V-1.3B"], "--prompt", prompt, "--text-cache", tmp_path / "new.safetensors")
    assert json.loads(Path(f"{file}.json").read_text())["prompt"] == prompt


def test_the_file_is_named_after_the_prompt(tiny_folders, tmp_path, monkeypatch):
    """Also where it is long or has no letters."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(released.WanText, "__call__", lambda self, prompts: torch.zeros(len(prompts), 1, TEXT_DIM))
    for prompt in (AWKWARD["5,000 words"], AWKWARD["Chinese"], AWKWARD["only emoji"]):
        sample.main(["--model", "wan2.1-t2v-1.3b", "--weights", str(tiny_folders / "Wan2.1-T2V-1.3B"), "--prompt", prompt, "--frames", "1",
                     "--size", "16x16", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)])
    slugs = "prompt", "very-long-prompt-very-long-prompt-very-long-prompt-very-long", "一只猫在弹钢琴-画面模糊"
    assert {f.stem for f in tmp_path.glob("*.mp4")} == {f"wan2.1-t2v-1.3b-{slug}-0" for slug in slugs}
