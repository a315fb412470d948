"""Beside diffusers and transformers: what these read from the folders in their layout gives the numbers that we compute from the original
files, part by part and as complete pipelines; and what we export they read.

    python -m pytest -m peer tests/test_peer.py         needs requirements-dev.txt; without it the tests are skipped

Tiny random models (wan/tiny.py, tests/tiny_layouts.py), fp32. The two programs round differently: diffusers makes sinusoids and rotary tables in fp32.
A transformer agrees to 1e-5 or so, and so does a latent after 20 guided steps; 1e-4 is what is asked for here.
"""
import numpy as np
import pytest
import torch
from PIL import Image

import dit
import flow
import sample
import tiny_layouts
from tiny_layouts import FOLDERS, IMAGE_DIM, TEXT_DIM, TRANSFORMERS
from wan import released, vae
from wan.image import WanImage
from wan.text import WanText

pytestmark = pytest.mark.peer
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("ftfy")
BASE = [name for name in FOLDERS if name.startswith("wan")]
SIZE, FRAMES = (64, 96), 9


@pytest.fixture(scope="module", autouse=True)
def quiet():
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def strictly(kind, folder, **more):
    """from_pretrained, and every tensor of the file found its place, every place its tensor."""
    net, info = kind.from_pretrained(folder, output_loading_info=True, **more)
    assert not any(info.values()), info
    return net.eval()


def inputs(config, grid=(3, 8, 12)):
    """Random arguments for a transformer: ours, and the same by the names that diffusers gives them."""
    x, t, context = torch.randn(2, config.in_channels, *grid), torch.tensor([999.0, 17.0]), torch.randn(2, config.text_len, TEXT_DIM)
    clip = torch.randn(2, 257, IMAGE_DIM) if config.image_dim else None
    names = "hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image"
    return (x, t, context, clip), dict(zip(names, (x, t, context, clip)), return_dict=False)


# ---------------------------------------------------------------------------------------------------- part by part


@pytest.mark.parametrize("name, part", [(name, part) for name in BASE for part in ("transformer", "transformer_2")[: 1 + ("a14b" in name)]])
@torch.no_grad()
def test_transformers(tiny_folders, name, part):
    expert = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}[part] if "a14b" in name else ""
    ours = dit.load(tiny_folders / FOLDERS[name][0][0] / expert)
    theirs = strictly(diffusers.WanTransformer3DModel, tiny_folders / FOLDERS[name][1][0] / part)
    arguments, named = inputs(ours.config)
    torch.testing.assert_close(ours(*arguments), theirs(**named)[0], rtol=0, atol=5e-5)


@torch.no_grad()
def test_transformer_with_a_time_for_each_token(tiny_folders):
    """Wan 2.2 TI2V: time 0 for the picture's tokens. diffusers wants a time for every token, we take one for every latent frame too."""
    ours = dit.load(tiny_folders / "Wan2.2-TI2V-5B")
    theirs = strictly(diffusers.WanTransformer3DModel, tiny_folders / "Wan2.2-TI2V-5B-Diffusers" / "transformer")
    (x, _, context, _), named = inputs(ours.config)
    frames = torch.tensor([[0.0, 700.0, 700.0]]).repeat(2, 1)
    tokens = frames.repeat_interleave(4 * 6, dim=1)
    named["timestep"] = tokens
    expected = theirs(**named)[0]
    for t in (frames, tokens):
        torch.testing.assert_close(ours(x, t, context), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name, file", [("Wan2.1-T2V-14B", "Wan2.1_VAE.pth"), ("Wan2.2-TI2V-5B", "Wan2.2_VAE.pth")])
@torch.no_grad()
def test_autoencoders(tiny_folders, name, file):
    ours = vae.load(tiny_folders / name / file)
    theirs = strictly(diffusers.AutoencoderKLWan, tiny_folders / f"{name}-Diffusers" / "vae")
    x, z = torch.rand(1, 3, 9, 32, 64) * 2 - 1, torch.randn(1, ours.config.latent_channels, 3, 2, 4)
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (theirs.config.latents_mean, theirs.config.latents_std))
    torch.testing.assert_close(ours.encode(x), (theirs.encode(x).latent_dist.mode() - mean) / std, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.decode(z).clamp(-1, 1), theirs.decode(z * std + mean).sample, rtol=0, atol=2e-5)


@torch.no_grad()
def test_text_encoder_and_tokenizer(tiny_folders):
    """Cleaned, tokenised, encoded, padded to 512 with zeros; the .pth is stored in bf16, the folder in fp32."""
    original, folder = tiny_folders / "Wan2.1-T2V-14B", tiny_folders / "Wan2.1-T2V-14B-Diffusers"
    parts = original / "models_t5_umt5-xxl-enc-bf16.pth", original / "google" / "umt5-xxl"
    ours = WanText(*parts, dtype=torch.float32, text_dim=TEXT_DIM)
    pipe = diffusers.WanPipeline.from_pretrained(folder, transformer=None, vae=None, dtype=torch.float32)
    strictly(transformers.UMT5EncoderModel, folder / "text_encoder")
    prompts = ["a cat is playing", released.NEGATIVE, "", "very long prompt " * 250, "a 🐱 &amp; a  dog\n", "caf\u00c3\u00a9"]
    with pytest.warns(UserWarning, match="reads the first 511"):
        context = ours(prompts)
    expected, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
    assert context.shape[1] == 512
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_image_encoder_and_its_processor(tiny_folders):
    folder = tiny_folders / "Wan2.1-I2V-14B-720P-Diffusers"
    theirs = strictly(transformers.CLIPVisionModel, folder / "image_encoder", attn_implementation="eager")
    processor = transformers.CLIPImageProcessor.from_pretrained(folder / "image_processor")
    picture = noise_picture((50, 70))
    expected = theirs(**processor(images=picture, return_tensors="pt"), output_hidden_states=True).hidden_states[-2]
    for path in (folder / "image_encoder", tiny_folders / "Wan2.1-I2V-14B-720P" / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"):
        ours = WanImage(path, rule="dc")(tensor(picture))
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("steps, shift", [(1, 3.0), (2, 5.0), (20, 3.0), (50, 12.0)])
def test_unipc(tiny_folders, steps, shift):
    """Times are equal; the way through a velocity field that bends is the same."""
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(tiny_folders / "Wan2.1-T2V-14B-Diffusers" / "scheduler", flow_shift=shift)
    scheduler.set_timesteps(steps)
    velocity = lambda x, t: torch.sin(3 * x) + x * torch.as_tensor(t).float().mean() / 1000
    x = noise = torch.randn(4, 5)
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t), t, x, return_dict=False)[0]
    sigmas, timesteps = flow.schedule("unipc_diffusers", steps, shift)
    assert timesteps.tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(sigmas.float(), scheduler.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.solve(velocity, noise, steps, shift, "unipc_diffusers"), x, rtol=0, atol=2e-5)


# ---------------------------------------------------------------------------------------------------- complete pipelines


def noise_picture(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size[::-1], Image.BICUBIC)


def tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.mark.parametrize("name, pictures", [
    ("wan2.1-t2v-1.3b", 0), ("wan2.1-t2v-14b", 0), ("wan2.1-i2v-14b-480p", 1), ("wan2.1-i2v-14b-720p", 1), ("wan2.2-t2v-a14b", 0),
    ("wan2.2-i2v-a14b", 1), ("wan2.2-i2v-a14b", 2), ("wan2.2-ti2v-5b", 0), ("wan2.2-ti2v-5b", 1)])
@torch.no_grad()
def test_pipelines(tiny_folders, name, pictures):
    """Prompt, negative prompt, pictures and noise in, 20 guided steps, frames out: WanPipeline and WanImageToVideoPipeline from the diffusers
    folder, ours from the original one."""
    kind = diffusers.WanImageToVideoPipeline if pictures else diffusers.WanPipeline
    pipe = kind.from_pretrained(tiny_folders / FOLDERS[name][1][0], dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    model = released.load_model(name, tiny_folders / FOLDERS[name][0][0])
    model.text.dtype = torch.float32
    if model.clip:
        model.clip.rule = "dc"  # diffusers prepares the picture for CLIP as DC-VideoGen does
    prompt, low, high = "a cat is on the left, very red", 3.0, 4.0
    given = [noise_picture(SIZE), noise_picture(SIZE).transpose(Image.FLIP_LEFT_RIGHT)][:pictures]
    noise = torch.randn(1, model.net.config.out_channels, *model.latent_shape(FRAMES, SIZE))

    latents = []
    more = dict(zip(("image", "last_image"), given)) | (dict(guidance_scale_2=low) if model.low else {})
    theirs = pipe(prompt=prompt, negative_prompt=model.negative, height=SIZE[0], width=SIZE[1], num_frames=FRAMES, num_inference_steps=20,
                  guidance_scale=high, latents=noise, output_type="pt",
                  callback_on_step_end=lambda pipe, i, t, kept: latents.append(kept["latents"]) or {}, **more).frames[0]

    context, null = model.contexts([prompt])
    first, last = ([tensor(p) for p in given] + [None, None])[:2]
    z = sample.generate(model, context, first, frames=FRAMES, size=SIZE, steps=20, guidance=(low, high) if model.low else high, solver="unipc_diffusers",
                        shift=pipe.scheduler.config.flow_shift, noise=noise, null=null, last_image=last)
    ours = torch.cat(list(model.decode(z, FRAMES, SIZE)), dim=2)[0].transpose(0, 1) / 2 + 0.5

    start = 1 if name == "wan2.2-ti2v-5b" and pictures else 0  # diffusers puts the picture's latent in place after the last call back
    assert len(latents) == 20
    torch.testing.assert_close(z[:, :, start:], latents[-1][:, :, start:], rtol=0, atol=1e-4)
    difference = (ours.clamp(0, 1) - theirs).abs()
    assert ours.shape == theirs.shape and (difference <= 1 / 255).double().mean() >= 0.999
    assert theirs.std() > 0.05 and (theirs[0] - theirs[-1]).abs().mean() > 0.02  # there is something to compare


# ---------------------------------------------------------------------------------------------------- what we export


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_exported_transformers_load_in_diffusers(tiny_folders, tmp_path, name):
    """Those of the DC-VideoGen models too: their classes are the same. In shards, and stored in bf16."""
    net = dit.WanDiT(TRANSFORMERS[name]).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    arguments, named = inputs(net.config)
    dit.save(net, tmp_path / "fp32", format="diffusers", shard_bytes=60_000)
    assert len(list((tmp_path / "fp32").glob("*.safetensors"))) > 1
    theirs = strictly(diffusers.WanTransformer3DModel, tmp_path / "fp32")
    torch.testing.assert_close(theirs(**named)[0], net(*arguments), rtol=1e-4, atol=1e-4)

    dit.save(net, tmp_path / "bf16", dtype=torch.bfloat16, format="diffusers")
    theirs = strictly(diffusers.WanTransformer3DModel, tmp_path / "bf16", dtype=torch.float32)
    torch.testing.assert_close(theirs(**named)[0], dit.load(tmp_path / "bf16")(*arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("file", ["Wan2.1-T2V-14B/Wan2.1_VAE.pth", "Wan2.2-TI2V-5B/Wan2.2_VAE.pth"])
@torch.no_grad()
def test_exported_autoencoders_load_in_diffusers(tiny_folders, tmp_path, file):
    net = vae.load(tiny_folders / file)
    tiny_layouts.write_vae(tmp_path / "vae", net)
    theirs = strictly(diffusers.AutoencoderKLWan, tmp_path / "vae")
    x = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (theirs.config.latents_mean, theirs.config.latents_std))
    torch.testing.assert_close((theirs.encode(x).latent_dist.mode() - mean) / std, net.encode(x), rtol=0, atol=2e-5)
