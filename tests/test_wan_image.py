"""The image encoder: equal to the reference, gentle with memory, clear about what is missing.

Reference tensors and tests of mark `peer`: as in test_wan_text.py.
"""
import weakref

import numpy as np
import pytest
import torch

from files.checkpoint import UserError
from test_wan_text import in_transformers_names, reference, write_folder
from wan.image import CLIP_MEAN, CLIP_STD, CLIPVision, WanImage, clip_pixels


def clip_reference():
    """As `reference`, with what the cut leaves out because it must not matter: last block, post_norm, head and text tower, all noise."""
    weights, tensors, notes = reference("clip_vit_tiny")
    noise = {k.replace(".2.", ".3.", 1): torch.randn_like(v) for k, v in weights.items() if ".transformer.2." in k}
    noise |= {"visual.post_norm.weight": torch.randn(64), "visual.post_norm.bias": torch.randn(64), "visual.head": torch.randn(64, 32)}
    return noise | weights, tensors, notes


@pytest.mark.core
@torch.inference_mode()
def test_clip_equals_reference():
    weights, tensors, notes = clip_reference()
    net = CLIPVision.from_state_dict({**weights, "textual.token_embedding.weight": torch.zeros(3, 3), "log_scale": torch.zeros(())}, heads=4)
    assert len(net.transformer) == notes["config"]["num_layers"] - 1 and net.image_size == notes["config"]["image_size"]
    pixels = clip_pixels(tensors["in/image"], "wan", net.image_size)
    assert (pixels - tensors["act/pixel_values"]).abs().max() < 1e-5
    assert (net(tensors["act/pixel_values"]) - tensors["out"]).abs().max() < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_clip_loads_every_layout(tmp_path, prefix):
    """The original file with its text tower, and a transformers folder, in one file or in shards; heads from config.json there."""
    weights, tensors, notes = clip_reference()
    theirs = in_transformers_names(weights, notes["official_to_transformers"], prefix)
    theirs["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # a buffer that old exports contain
    torch.save({**weights, "textual.token_embedding.weight": torch.zeros(3, 3)}, tmp_path / "clip.pth")
    expected = CLIPVision.from_state_dict(weights, heads=4)(tensors["act/pixel_values"])
    for shards in (1, 4):
        folder = write_folder(tmp_path / str(shards), theirs, shards, num_attention_heads=4, hidden_act="gelu")
        assert torch.equal(CLIPVision.load(folder)(tensors["act/pixel_values"]), expected)
    half = CLIPVision.load(folder, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    rounded = (half(tensors["act/pixel_values"].bfloat16()) - expected).norm() / expected.norm()
    assert 1e-4 < rounded < 0.03
    with pytest.raises(UserError, match="heads="):  # width 64 is no multiple of 80, and a .pth has no config
        CLIPVision.load(tmp_path / "clip.pth")


def test_vit_h_has_the_published_size():
    """Ours is the published tower without last block, post_norm and head."""
    with torch.device("meta"):
        net = CLIPVision()
        rest = [*net.transformer[0].parameters(), torch.empty(1280), torch.empty(1280), torch.empty(1280, 1024)]
    parameters = [*net.parameters(), *rest]
    assert sum(p.numel() for p in parameters) == 632_076_800 and len(parameters) == 392


@pytest.mark.parametrize("change, sentence", {
    "missing": r"1 missing \(first: transformer.1.attn.proj.bias\)", "extra": r"1 unexpected \(first: pre_norm.gain\)",
    "q": r"unexpected \(first: transformer.0.attn.q_proj.weight\)", "other": "not the weights of a CLIP vision tower"}.items())
def test_wrong_clip_weights_are_refused(change, sentence):
    weights, _, notes = clip_reference()
    if change == "missing":
        del weights["visual.transformer.1.attn.proj.bias"]
    elif change == "extra":
        weights["visual.pre_norm.gain"] = torch.zeros(1)
    elif change == "q":  # one of the three matrices that become one is missing
        weights = in_transformers_names(weights, notes["official_to_transformers"])
        del weights["encoder.layers.0.self_attn.k_proj.weight"]
    else:  # of another network, one that also has a patch embedding
        weights = {"patch_embedding.weight": torch.zeros(4, 4, 1, 2, 2), "blocks.0.modulation": torch.zeros(1, 6, 4)}
    with pytest.raises(UserError, match=sentence):
        CLIPVision.from_state_dict(weights, heads=4)


def test_other_activations_are_refused(tmp_path):
    """OpenAI's CLIP has the same names, but a faster GELU: the numbers would be wrong in silence."""
    folder = write_folder(tmp_path, {}, hidden_act="quick_gelu")
    with pytest.raises(UserError, match="quick_gelu"):
        CLIPVision.load(folder)


def test_the_rules_of_preprocessing_differ_in_aspect_and_crop():
    """A wide picture, dark left half, bright right half: "wan" squeezes it, so the edge stays in the middle; "dc" cuts its sides off.
    A bright strip at the far left is visible in the squeezed picture only."""
    image = torch.full((1, 3, 100, 300), -1.0)
    image[..., 150:] = 1
    image[..., :20] = 1
    wan, dc = (clip_pixels(image, rule, 48) for rule in ("wan", "dc"))
    assert wan.shape == dc.shape == (1, 3, 48, 48)
    assert (wan[..., 0] > 0).all() and (dc[..., 0] < 0).all() and (dc[..., -1] > 0).all()
    lowest, highest = ((torch.tensor([v] * 3) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD) for v in (0.0, 1.0))
    assert torch.allclose(dc[0, :, 24, 5], lowest, atol=1e-5) and torch.allclose(dc[0, :, 24, -5], highest, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("size", [(300, 517), (513, 224), (97, 98), (224, 224), (704, 1280)])
def test_the_dc_rule_is_that_of_transformers_image_processor(size):
    """To rounding: resize on 8-bit pixels, odd rests of the crop included. It is also what diffusers' image-to-video pipeline does."""
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = transformers.CLIPImageProcessor()(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    ours = clip_pixels(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1, "dc")
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-5


@pytest.mark.peer
@torch.inference_mode()
def test_clip_equals_transformers(tmp_path):
    """The same random weights, written by transformers and read by `CLIPVision.load`: ours is hidden_states[-2]. What we hold loads there."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(hidden_size=160, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=56,
                                           patch_size=14, hidden_act="gelu", layer_norm_eps=1e-5, projection_dim=8)
    peer = transformers.CLIPVisionModel(config).eval()
    for p in peer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    peer.save_pretrained(tmp_path / "image_encoder")
    net = CLIPVision.load(tmp_path / "image_encoder")
    pixels = torch.randn(2, 3, 56, 56)
    theirs = peer(pixels, output_hidden_states=True).hidden_states[-2]
    assert (net(pixels) - theirs).abs().max() < 1e-5
    names = reference("clip_vit_tiny")[2]["official_to_transformers"]
    exported = in_transformers_names({f"visual.{k}": v for k, v in net.state_dict().items()}, names)
    missing, unexpected = peer.load_state_dict(exported, strict=False)
    assert not unexpected and all(name.startswith(("encoder.layers.2.", "post_layernorm.")) for name in missing)


def test_the_image_encoder_is_loaded_used_and_freed(tmp_path, monkeypatch):
    weights, tensors, notes = clip_reference()
    folder = write_folder(tmp_path / "image_encoder", in_transformers_names(weights, notes["official_to_transformers"], "vision_model."),
                          num_attention_heads=4)
    nets, load = [], CLIPVision.load
    monkeypatch.setattr(CLIPVision, "load", lambda *args: nets.append(weakref.ref(net := load(*args))) or net)
    image = WanImage(folder)
    tokens = image(tensors["in/image"])
    assert (tokens - tensors["out"]).abs().max() < 1e-5 and tokens.dtype == torch.float32
    assert len(nets) == 1 and nets[0]() is None
    for path, said in ((tmp_path / "nowhere", "nowhere"), (None, "none given")):
        with pytest.raises(UserError, match=f"the image encoder .*{said}.* is missing"):
            WanImage(path)(tensors["in/image"])
