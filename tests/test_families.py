"""Bases from diffusers' folders: what a row of families/rows.py makes of one is what diffusers' own pipeline makes of it.

    python -m pytest -m peer tests/test_families.py         needs requirements-dev.txt; without it the tests are skipped

Tiny random models (families/tiny.py), fp32.
"""
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange

import align
import dit
import flow
import lora
import sample
from families import autoencoder, folder, rows, tiny
from families import net as nets
from files import layouts
from files.checkpoint import UserError
from gpu import tiling
from training.cache import prompt_entries
from training.entries import hash_encoder
from wan import nets as wan_nets
from wan import vae
from wan.models import Prompts

pytestmark = pytest.mark.peer
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
FAMILIES = list(tiny.PIPELINES)
UMT5 = "wan", "skyreels-v2"
NEW_KEYS = {  # whose shape is another one in a deep latent space
    "wan": {"patch_embedding.weight", "proj_out.weight", "proj_out.bias"},
    "skyreels-v2": {"patch_embedding.weight", "proj_out.weight", "proj_out.bias"},
    "hunyuan-video-1.5": {"x_embedder.proj.weight", "proj_out.weight", "proj_out.bias"},
    "kandinsky-5": {"visual_embeddings.in_layer.weight", "out_layer.out_layer.weight", "out_layer.out_layer.bias"},
    "cosmos-predict-2.5": {"patch_embed.proj.weight", "proj_out.weight"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> the folder of its pipeline, written when first asked for. Tests only read there."""
    out = tmp_path_factory.mktemp("families")

    def get(family):
        return out / family if (out / family).exists() else tiny.write(family, out / family)

    return get


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompts_for(family, n=1, length=6):
    """n prompts as the transformer takes them, random states."""
    if family in UMT5:
        return noise(100, n, length, tiny.TEXT)
    found = []
    for i in range(n):
        row = dict(states=noise(100 + i, length, tiny.TEXT))
        if family == "hunyuan-video-1.5":
            row["glyphs"] = noise(300 + i, 2, 12)
        if family == "kandinsky-5":
            row["pooled"] = noise(200 + i, 1, 12)
        found.append(row)
    return Prompts(found)


def deep_of(net, channels=8):
    config = nets.deep_config(net.config, SimpleNamespace(latent_channels=channels, spatial_factor=32))
    return nets.inherit(net, config, share=True)


def as_if_trained(net):
    """Both ends random."""
    for name, p in net.named_parameters():
        if name.startswith(net.ends):
            p.copy_(0.1 * torch.randn_like(p))
    return net


def latent_for(net, frames=3, seed=1):
    h, w = (2, 3) if net.config.patch[1] == 1 else (4, 6)
    return noise(seed, 1, net.config.in_channels, frames, h, w)


# ---------------------------------------------------------------------------------------------------- against diffusers


class NoChecker(diffusers.configuration_utils.ConfigMixin):
    """In the place of Cosmos' guardrail, for random weights."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return True


def pipeline(path, family):
    if family != "cosmos-predict-2.5":
        return getattr(diffusers, tiny.PIPELINES[family]).from_pretrained(path)
    index = json.loads((path / "model_index.json").read_text())
    parts = {name: getattr(diffusers, kind[1]).from_pretrained(path / name) for name, kind in index.items()
             if isinstance(kind, list) and kind[0] == "diffusers"}
    import transformers

    parts["text_encoder"] = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(path / "text_encoder")
    parts["tokenizer"] = transformers.AutoTokenizer.from_pretrained(path / "tokenizer")
    if family == "cosmos-predict-2.5":
        # its padding mask goes through torchvision, which gives zeros for zeros
        transforms = SimpleNamespace(InterpolationMode=SimpleNamespace(NEAREST=0), functional=SimpleNamespace(
            resize=lambda mask, size, interpolation: mask.new_zeros(*mask.shape[:2], *size)))
        diffusers.models.transformers.transformer_cosmos.transforms = transforms
    return diffusers.Cosmos2_5_PredictBasePipeline(safety_checker=NoChecker(), **parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_guided_steps_are_those_of_the_pipeline(folders, family):
    """Prompt, negative prompt and noise in, 4 guided steps, latents out."""
    path = folders(family)
    model, theirs = folder.load_model(path), pipeline(path, family)
    theirs.set_progress_bar_config(disable=True)
    if family in UMT5:
        model.text.dtype = torch.float32
    prompt, negative, cell = 'a "cat" on the left', "dog, ugly", model.ae.config.spatial_factor
    start, size, frames = noise(5, 1, 4, 3, 4, 6), (4 * cell, 6 * cell), 9
    given = dict(height=size[0], width=size[1], num_frames=frames, num_inference_steps=4, output_type="latent")
    if family != "hunyuan-video-1.5":  # whose guider has it
        given["guidance_scale"] = model.guidance - (family == "cosmos-predict-2.5")
    if family == "kandinsky-5":
        latents = rearrange(torch.cat([start, torch.zeros(1, 5, 3, 4, 6)], 1), "b c t h w -> b t h w c").clone()
        expected = rearrange(theirs(prompt, negative, latents=latents, **given).frames, "b t h w c -> b c t h w")
    else:
        expected = theirs(prompt=prompt, negative_prompt=negative, latents=start, **given).frames

    context, null = model.contexts([prompt], negative) if family in UMT5 else (model.text([prompt]), model.text([negative]))
    z = sample.generate(model, context, null=null, noise=start, frames=frames, size=size, steps=4, plain=True, cfg_batch=False)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-4)
    assert (z - start).abs().mean() > 0.05  # there is something to compare


CHECK = {  # mean, mean magnitude and first number of the base's velocity, and of the deep transformer's: seen in diffusers 0.42
    "wan": ((-0.07446, 0.59731, 0.72435), (0.03545, 0.60491, -0.48949)),
    "skyreels-v2": ((-0.07446, 0.59731, 0.72435), (0.03545, 0.60491, -0.48949)),
    "hunyuan-video-1.5": ((-0.09331, 0.48596, -0.54588), (-0.01253, 0.50735, 0.26395)),
    "kandinsky-5": ((-0.11221, 0.55111, -0.16755), (-0.23953, 0.58844, -0.82912)),
    "cosmos-predict-2.5": ((-0.08095, 0.51521, -0.36590), (-0.07623, 0.57271, 1.04997)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_stay_what_they_were(family, monkeypatch):
    """A guard against both sides drifting together."""
    monkeypatch.setattr(rows, "F", SimpleNamespace(pad=lambda x, by: x))  # no zero rows after the prompt
    changes = dict(crossattn_proj_in_channels=24) if family == "cosmos-predict-2.5" else {}
    theirs = tiny.transformer(family, **changes)
    row = rows.FAMILIES[type(theirs).__name__]
    patch = (1, 1, 1) if family == "hunyuan-video-1.5" else (1, 2, 2)
    # cells so large that Kandinsky divides positions by 2
    dim = theirs.get_submodule(row.embedder).weight.shape[0]
    base = nets.Net(theirs, row, nets.Config(dim, 2, 4, 4, patch, cell=130, positions="index"))
    text = noise(100, 1, 6, 24 if family == "cosmos-predict-2.5" else tiny.TEXT)
    prompt = {"hunyuan-video-1.5": Prompts([dict(states=text[0, :4], glyphs=torch.zeros(0, 12))]),
              "kandinsky-5": Prompts([dict(states=text[0], pooled=noise(200, 1, 12))])}.get(family, text)
    if family == "cosmos-predict-2.5":
        prompt = Prompts([dict(states=theirs.crossattn_proj(text)[0])])
    deep = deep_of(base)
    tiny.fill(deep.transformer)
    deep.config = replace(deep.config, cell=260, positions="index")
    for net, x, expected in ((base, noise(0, 1, 4, 3, 4, 6), CHECK[family][0]), (deep, noise(1, 1, 8, 3, 2, 3), CHECK[family][1])):
        v = net(x, torch.tensor([500.0]), prompt)
        found = v.mean(), v.abs().mean(), v.flatten()[0]
        torch.testing.assert_close(torch.stack(found), torch.tensor(expected), rtol=0, atol=2e-5)


def test_skyreels_with_a_rate(folders, tmp_path):
    """Models with inject_sample_info are told whether a clip has 16 frames per second (0) or not (1)."""
    theirs = tiny.transformer("skyreels-v2", inject_sample_info=True)
    theirs.save_pretrained(tmp_path)
    net = nets.load(tmp_path)
    x, t, states = noise(0, 1, 4, 3, 4, 6), torch.tensor([500.0]), noise(1, 1, 512, tiny.TEXT)
    same, other = (theirs(x, t, states, fps=[fps], return_dict=False)[0] for fps in (1, 0))
    torch.testing.assert_close(net(x, t, states), same, rtol=0, atol=1e-5)
    assert not torch.allclose(same, other)


def test_wan_is_what_our_own_wan_is(folders):
    """The check of all the others: embeddings, velocities, losses, and what is inherited."""
    path = folders("wan") / "transformer"
    ours, theirs = dit.load(path), nets.load(path)
    x, t, states = noise(0, 2, 4, 3, 4, 6), torch.tensor([500.0, 20.0]), noise(1, 2, 6, tiny.TEXT)
    torch.testing.assert_close(theirs.embed_patches(x), ours.embed_patches(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs(x, t, states), ours(x, t, states), rtol=0, atol=1e-5)
    deep = [dit.inherit(ours, replace(ours.config, in_channels=8, out_channels=8, patch=(1, 1, 1))), deep_of(theirs)]
    weight, bias = noise(2, 48, 8), noise(3, 48)
    losses = []
    for net in deep:
        net.set_embedder(weight, bias)
        net.head_layer.weight.copy_(0.1 * noise(4, 8, 48))
        drawn = flow.draw((8, 3, 2, 3), flow.Times(), 0, 0, range(2))
        losses.append(flow.loss(lambda x, t: net(x, t, states), noise(5, 2, 8, 3, 2, 3), drawn)[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)
    assert nets.fingerprint(path)[1].keys() == {layouts.to_diffusers(k) for k in wan_nets.fingerprint(path)[1]}
    model, own = folder.load_model(folders("wan")), vae.load(folders("wan") / "vae")
    assert hash_encoder(model.ae) == hash_encoder(own)  # so caches of its latents serve both


# ---------------------------------------------------------------------------------------------------- the two ends


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layer_is_a_matrix_on_patches(folders, family):
    """With the latent's channels first, whatever the order of the layer's own inputs is."""
    net = nets.load(folders(family) / "transformer")
    x, got = latent_for(net), []
    layer = net.transformer.get_submodule(net.family.embedder)
    hook = layer.register_forward_hook(lambda module, args, out: got.append(out))
    net(x, torch.tensor([500.0]), prompts_for(family))
    hook.remove()
    theirs = got[0].movedim(1, -1) if isinstance(layer, torch.nn.Conv3d) else got[0]
    torch.testing.assert_close(net.embed_patches(x), theirs.reshape(net.embed_patches(x).shape), rtol=0, atol=1e-5)
    found = nets.embedder(folders(family) / "transformer")
    assert torch.equal(found.weight, net.embedder.weight)
    assert found.bias is None if net.embedder.bias is None else torch.equal(found.bias, net.embedder.bias)

    weight = torch.randn_like(net.embedder.weight)
    bias = None if net.embedder.bias is None else torch.randn_like(net.embedder.bias)
    before = net(x, torch.tensor([500.0]), prompts_for(family))
    net.set_embedder(weight, bias)
    assert torch.equal(net.embedder.weight, weight)
    assert not torch.allclose(net(x, torch.tensor([500.0]), prompts_for(family)), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_but_the_ends_is_inherited(folders, family):
    base = nets.load(folders(family) / "transformer")
    for n in (8, 4):  # as many channels as the base's is another latent space too
        deep = deep_of(base, n)
        theirs, ours = base.transformer.state_dict(), deep.transformer.state_dict()
        assert theirs.keys() == ours.keys()
        new = {k for k in ours if ours[k].data_ptr() != theirs[k].data_ptr()}
        assert new == {k for k in ours if k.startswith(base.family.ends)}  # and may be trained in place
        shapes = {k for k in ours if ours[k].shape != theirs[k].shape}
        assert shapes == NEW_KEYS[family] if n == 8 else shapes <= NEW_KEYS[family]
        x = latent_for(deep)
        assert (deep(x, torch.tensor([500.0]), prompts_for(family)) == 0).all()
    fresh = getattr(diffusers, base.family.transformer).from_config(deep.stored)
    fresh.load_state_dict(ours)
    as_if_trained(deep)
    fresh.load_state_dict(deep.transformer.state_dict())
    fresh.register_to_config(**dict(base.family.running))
    again = nets.Net(fresh.eval(), base.family, deep.config)
    inputs = x, torch.tensor([500.0]), prompts_for(family)
    torch.testing.assert_close(again(*inputs), deep(*inputs), rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_same_latent_space_it_is_the_base(folders, family):
    base = nets.load(folders(family) / "transformer")
    x, t, prompt = latent_for(base), torch.tensor([500.0]), prompts_for(family)
    expected = base(x, t, prompt)
    assert torch.equal(nets.inherit(base, base.config)(x, t, prompt), expected)
    wrapped = lora.wrap(nets.inherit(base, base.config), 2, 4, full=base.ends)
    assert torch.equal(wrapped(x, t, prompt), expected)


RELEASED = {  # name: (family, what its config has beside the class's defaults, parameters, layers with LoRA and their parameters at rank 256,
    #                first layer's parameters, and those for f32t4c32), as the conversion scripts and the authors' files have it
    "wan2.1-1.3b": ("wan", dict(num_attention_heads=12, ffn_dim=8960, num_layers=30), 1.419e9, 183, 259.6e6, 99_840, 50_688),
    "wan2.1-14b": ("wan", dict(num_attention_heads=40, ffn_dim=13824, num_layers=40), 14.288e9, 243, 820.6e6, 332_800, 168_960),
    "skyreels-v2-14b": ("skyreels-v2", dict(num_attention_heads=40, ffn_dim=13824, num_layers=40), 14.288e9, 243, 820.6e6, 332_800, 168_960),
    "hunyuan-video-1.5": ("hunyuan-video-1.5", dict(task_type="t2v"), 8.327e9, 326, 511.2e6, 135_168, 135_168),
    "kandinsky-5-lite": ("kandinsky-5", dict(in_visual_dim=16, out_visual_dim=16, visual_cond=True, model_dim=1792, ff_dim=7168),
                         2.008e9, 194, 265.1e6, 238_336, 118_272),
    "cosmos-predict-2.5-2b": ("cosmos-predict-2.5", dict(
        in_channels=17, num_attention_heads=16, rope_scale=(1, 3, 3), extra_pos_embed_type=None, use_crossattn_projection=True,
        crossattn_proj_in_channels=100_352), 2.059e9, 170, 267.4e6, 147_456, 69_632),
    "cosmos-predict-2.5-14b": ("cosmos-predict-2.5", dict(
        in_channels=17, num_attention_heads=40, num_layers=36, rope_scale=(1, 3, 3), extra_pos_embed_type=None,
        use_crossattn_projection=True, crossattn_proj_in_channels=100_352), 14.368e9, 218, 857.2e6, 368_640, 174_080),
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_trainable_sets_of_released_models(name):
    """Of their shapes alone: six linear layers of a block and the time's, as the paper has it for Wan, and the two ends."""
    family, config, parameters, layers, adapted, first, deep_first = RELEASED[name]
    kind, _ = tiny.TRANSFORMERS[family]
    row = rows.FAMILIES[kind]
    with torch.device("meta"):
        theirs = getattr(diffusers, kind)(**config)
    weight = theirs.get_submodule(row.embedder).weight
    channels, patch = (32, (1, 1, 1)) if family == "hunyuan-video-1.5" else (16, (1, 2, 2))
    base = nets.Net(theirs, row, nets.Config(len(weight), len(theirs.get_submodule(row.blocks)), channels, channels, patch, 16 // patch[1]))
    # those of the transformer that the prompt went through before are counted too
    assert sum(p.numel() for p in base.parameters()) == pytest.approx(parameters, rel=1e-3)
    deep_config = nets.deep_config(base.config, SimpleNamespace(latent_channels=32, spatial_factor=32))
    with torch.device("meta"):
        deep = nets.Net(nets.build(row, nets.restated(row, base.stored, deep_config)), row, deep_config)
        lora.wrap(deep, 256, 512)
    found = lora.adapters(deep)
    assert len(found) == layers
    assert sum(a.up.numel() + a.down.numel() for _, a in found) == pytest.approx(adapted, rel=1e-3)
    for net, expected in ((base, first), (deep, deep_first)):
        layer = net.transformer.get_submodule(row.embedder)
        assert sum(p.numel() for p in layer.parameters()) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_columns_for_masks_are_the_base_s(folders, family):
    """Masks mean the same at any resolution; a condition latent is another one there, and its columns are zero."""
    base = nets.load(folders(family) / "transformer")
    columns = []
    for net in (base, deep_of(base)):
        weight = net.transformer.get_submodule(net.family.embedder).weight.flatten(1)
        weight = rearrange(weight, f"d ({net.family.order}) -> d c (p q r)", **dict(zip("pqr", net.config.patch)))
        columns.append(weight.sum(2)[:, net.config.in_channels :])
    a, masks = base.family.beside
    n = columns[0].shape[1] - masks
    torch.testing.assert_close(columns[1][:, columns[1].shape[1] - masks :], columns[0][:, n:])
    assert n == 4 * a and not columns[1][:, : columns[1].shape[1] - masks].any()


def test_kandinsky_s_deep_tokens_keep_their_places(folders):
    """A token of 32 pixels turns by the angles of the first base token under it; with "index", by those of the base token of its index."""
    base, tables = nets.load(folders("kandinsky-5") / "transformer"), []
    deep = deep_of(base)
    by_index = nets.inherit(base, replace(deep.config, positions="index"))
    for net, n in ((base, 2), (deep, 1), (by_index, 1)):
        rope = net.transformer.visual_rope_embeddings
        rope.register_forward_hook(lambda module, args, out: tables.append(out))
        side = 4 * n if net is base else 2
        net(noise(0, 1, net.config.in_channels, 2, side, side), torch.tensor([500.0]), prompts_for("kandinsky-5"))
    of_base, of_deep, of_index = tables
    torch.testing.assert_close(of_deep, of_base[:, :, ::2, ::2], rtol=0, atol=1e-6)
    torch.testing.assert_close(of_index, of_base[:, :, :2, :2], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_samples(folders, family):
    """Prompts of several lengths too: where there is a mask, padding changes nothing; where there is none, nothing is padded."""
    net = nets.load(folders(family) / "transformer")
    x, t = torch.cat([latent_for(net, seed=i) for i in range(3)]), torch.tensor([100.0, 500.0, 900.0])
    rows_of = [prompts_for(family, 3, length)[i : i + 1] for i, length in enumerate((6, 6, 6) if family == "cosmos-predict-2.5" else (3, 9, 6))]
    if family in UMT5:
        whole = torch.cat([torch.nn.functional.pad(p, (0, 0, 0, 9 - p.shape[1])) for p in rows_of])
    else:
        whole = Prompts([row for p in rows_of for row in p])
        if family == "hunyuan-video-1.5":
            whole[0]["glyphs"] = whole[0]["glyphs"][:0]
    v, features = net(x, t, whole, return_features=[1])
    single = torch.cat([net(x[i : i + 1], t[i : i + 1], rows_of[i]) for i in range(3)])
    torch.testing.assert_close(v, single, rtol=0, atol=2e-6)
    assert features[1].shape == (3, *net.embed_patches(x).shape[1:])


def test_kandinsky_would_see_padding(folders):
    """There is no mask: so prompts of a batch are never padded."""
    net = nets.load(folders("kandinsky-5") / "transformer")
    [row] = prompts_for("kandinsky-5")
    padded = {**row, "states": torch.nn.functional.pad(row["states"], (0, 0, 0, 3))}
    v, other = (net(latent_for(net), torch.tensor([500.0]), Prompts([r])) for r in (row, padded))
    assert (v - other).std() > 0.1 * v.std()


def test_cosmos_asks_for_no_torchvision(folders, monkeypatch):
    """Whose resize diffusers wants for a mask of zeros: another channel of zeros does the same."""
    module = diffusers.models.transformers.transformer_cosmos
    transforms = SimpleNamespace(InterpolationMode=SimpleNamespace(NEAREST=0), functional=SimpleNamespace(
        resize=lambda mask, size, interpolation: mask.new_zeros(*mask.shape[:2], *size)))
    monkeypatch.setattr(module, "transforms", transforms, raising=False)
    theirs = diffusers.CosmosTransformer3DModel.from_pretrained(folders("cosmos-predict-2.5") / "transformer")
    x, states = noise(0, 1, 4, 3, 4, 6), noise(1, 1, 6, 2 * tiny.TEXT)
    expected = theirs(x, torch.tensor([0.5]), states, condition_mask=torch.zeros(1, 1, 3, 4, 6),
                      padding_mask=torch.zeros(1, 1, 32, 48), return_dict=False)[0]
    monkeypatch.delattr(module, "transforms")
    net = nets.load(folders("cosmos-predict-2.5") / "transformer")
    v = net(x, torch.tensor([500.0]), Prompts([dict(states=theirs.crossattn_proj(states)[0])]))
    torch.testing.assert_close(v, expected, rtol=0, atol=2e-6)


def test_each_family_keeps_its_prompts_apart(folders):
    """Families share text encoders, but not what they make of them."""
    made = [str(prompt_entries(folder.load_model(folders(family)), None).hash) for family in FAMILIES[2:]]
    assert len(set(made)) == 3


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("family", FAMILIES)
def test_alignment_in_closed_form(folders, family):
    """Where the base's embeddings are linear in the deep latent, with or without a bias, R^2 is 1; where they are not, converged SGD
    does no better."""
    net = nets.load(folders(family) / "transformer")
    side = 2 * net.config.patch[1]  # cells of the base per deep cell: two tokens
    deep = deep_of(net, 4 * side**2)
    intercept = net.embedder.bias is not None
    pairs = []
    for i in range(4):
        x = noise(i, 1, 4, 3, 4, 8) + 0.5
        pairs.append((x, rearrange(x, "b c t (h p) (w q) -> b (c p q) t h w", p=side, q=side)))
    moments = align.Moments.of(pairs, (net.config.patch, deep.config.patch))
    weight, bias = align.solve_embedding(moments, net.embedder, ridge=1e-9)
    assert (bias is not None) == intercept
    r2, mse = align.r_squared(moments, net.embedder, weight, bias)
    assert r2 > 0.9999
    deep.set_embedder(weight, bias)
    target = align.pool(net.embed_patches(pairs[0][0]), deep.embed_patches(pairs[0][1]).shape[1:4])
    torch.testing.assert_close(deep.embed_patches(pairs[0][1]), target, rtol=0, atol=1e-3)

    pairs = [(x, u[:, ::6] ** 2 + u[:, ::6]) for x, u in pairs]  # fewer numbers, and bent
    moments = align.Moments.of(pairs, (net.config.patch, deep.config.patch))
    _, best = align.r_squared(moments, net.embedder, *align.solve_embedding(moments, net.embedder, ridge=1e-9))
    fitted = torch.nn.Linear(pairs[0][1].shape[1], net.config.dim, bias=intercept)
    x, u = (torch.cat(side) for side in zip(*(align.pair_tokens(*pair, (net.config.patch, deep.config.patch)) for pair in pairs)))
    y = torch.nn.functional.linear(x, *net.embedder)
    steps = torch.optim.LBFGS(fitted.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        steps.zero_grad()
        loss = torch.nn.functional.mse_loss(fitted(u), y)
        loss.backward()
        return loss

    with torch.enable_grad():
        steps.step(closure)
        found = closure().item()
    assert best == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_and_recomputed_blocks(folders, family):
    """bf16 linear layers under autocast, all else fp32; gradients arrive at both ends and the adapters."""
    torch.manual_seed(0)
    base = nets.load(folders(family) / "transformer")
    x, t, prompt = None, torch.tensor([500.0]), prompts_for(family)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        net = nets.load(folders(family) / "transformer", dtype)
        net = lora.wrap(deep_of(net), 2, 4, full=net.ends).train()
        net.checkpointing = True
        assert net.checkpointing
        net.set_embedder(*(None if p is None else 0.1 * noise(7, *p.shape) for p in net.embedder))
        net.head_layer.weight.copy_(0.1 * noise(8, *net.head_layer.weight.shape))
        for name, p in net.named_parameters():
            if name.endswith(".up"):
                p.copy_(0.1 * noise(9, *p.shape))
            if name.endswith(".down"):
                p.copy_(0.1 * noise(10, *p.shape))
        assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}
        low = {name.split(".")[1] for name, p in net.named_parameters() if p.dtype == torch.bfloat16}
        assert (net.family.blocks in low) == (dtype == torch.bfloat16)
        assert not low & {"time_embeddings", "patch_embedding", "patch_embed", "proj_out", "out_layer"}
        x = latent_for(net)
        with torch.enable_grad():
            net(x, t, prompt).square().mean().backward()
        gradients.append({k: p.grad for k, p in net.named_parameters() if p.requires_grad})
    full, half = gradients
    assert full.keys() == half.keys() and sum(k.endswith(".up") for k in full) > 10
    for name in full:
        if full[name].abs().max() > 1e-4 and ".up" not in name and ".down" not in name:
            assert (half[name] - full[name]).norm() < 0.1 * full[name].norm(), name
    assert base.weight_dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- what is exported


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_loads_in_diffusers(folders, tmp_path, family):
    """With the new channels; and here again, as the same net."""
    base = nets.load(folders(family) / "transformer")
    deep = as_if_trained(deep_of(base))
    nets.save(deep, tmp_path / "transformer", {"adapted": {"base": "x"}}, shard_bytes=100_000)
    kind = getattr(diffusers, base.family.transformer)
    theirs, info = kind.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not any(info.values()), info
    takes, makes = base.family.channels
    a, b = base.family.stated
    assert theirs.config[makes] == 8 and theirs.config[takes] == 8 * a + b
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in deep.transformer.state_dict().items()}
    again = nets.load(tmp_path / "transformer")
    assert again.config == deep.config
    x, t, prompt = latent_for(deep), torch.tensor([500.0]), prompts_for(family)
    torch.testing.assert_close(again(x, t, prompt), deep(x, t, prompt), rtol=0, atol=1e-5)
    assert nets.read_ends(tmp_path / "transformer").keys() == {k for k in deep.state_dict() if k.startswith(deep.ends)}
    assert torch.equal(nets.embedder(tmp_path / "transformer").weight, deep.embedder.weight)

    nets.save(base, tmp_path / "base")
    for name in ("transformer", "base"):
        stored = json.loads((tmp_path / name / "config.json").read_text())
        original = json.loads((folders(family) / "transformer" / "config.json").read_text())
        changed = {k for k in original if stored.get(k) != original[k] and not k.startswith("_")}
        assert changed <= {takes, makes, "patch_size", "patch_size_t"} if name == "transformer" else not changed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_loads_in_diffusers(folders, tmp_path, family):
    pytest.importorskip("peft")
    net = lora.wrap(nets.load(folders(family) / "transformer"), 2, 4)
    for _, adapter in lora.adapters(net):
        torch.nn.init.normal_(adapter.up, std=0.3)
    lora.save(net, tmp_path / "lora.safetensors", "peft")
    for format in ("comfyui", "kohya"):
        with pytest.raises(UserError, match="use peft"):
            lora.save(net, tmp_path / "other.safetensors", format)
    count = len(lora.adapters(net))
    lora.merge(net)
    again = nets.load(folders(family) / "transformer")
    found = lora.load(again, tmp_path / "lora.safetensors")
    assert len(found.applied) == count and not found.skipped
    x, t, prompt = latent_for(net), torch.tensor([500.0]), prompts_for(family)
    expected = net(x, t, prompt)
    torch.testing.assert_close(again(x, t, prompt), expected, rtol=0, atol=1e-6)

    pipe = pipeline(folders(family), family)
    if family == "hunyuan-video-1.5":  # whose pipeline has no loader
        pipe.transformer.load_lora_adapter(tmp_path, weight_name="lora.safetensors", prefix=None)
    else:
        pipe.load_lora_weights(tmp_path / "lora.safetensors")
    pipe.transformer.register_to_config(**dict(net.family.running))
    theirs = nets.Net(pipe.transformer, net.family, net.config)
    torch.testing.assert_close(theirs(x, t, prompt), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", UMT5)
def test_a_lora_in_the_original_names_of_wan_fits(folders, tmp_path, family):
    """As ComfyUI and kohya have them; SkyReels-V2 is of Wan's architecture."""
    own = lora.wrap(dit.load(folders("wan") / "transformer"), 2, 4)
    for _, adapter in lora.adapters(own):
        torch.nn.init.normal_(adapter.up, std=0.3)
    net, x, t, states = None, noise(0, 1, 4, 3, 4, 6), torch.tensor([500.0]), prompts_for(family)
    for format in ("comfyui", "kohya", "peft"):
        lora.save(own, tmp_path / f"{format}.safetensors", format)
        net = nets.load(folders(family) / "transformer")
        before = net(x, t, states)
        assert not lora.load(net, tmp_path / f"{format}.safetensors").skipped
        torch.testing.assert_close(net(x, t, states), own(x, t, states), rtol=0, atol=2e-5)
        assert not torch.allclose(net(x, t, states), before, atol=1e-3)


# ---------------------------------------------------------------------------------------------------- the autoencoder


@pytest.mark.parametrize("family", ["wan", "hunyuan-video-1.5", "kandinsky-5"])
def test_autoencoders(folders, family):
    """77 frames are 20 latent frames, and the numbers are diffusers'."""
    ours, theirs = autoencoder.load(folders(family) / "vae"), tiny.autoencoder(family)
    c = theirs.config
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (c.get("latents_mean", [0.0]), c.get("latents_std") or [1 / c.scaling_factor]))
    x = noise(3, 1, 3, 77, 32, 32).clamp(-1, 1)
    z = ours.encode(x)
    assert z.shape[1:3] == (4, 20)
    torch.testing.assert_close(z, (theirs.encode(x).latent_dist.mean - mean) / std, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.decode(z, 70), theirs.decode(z * std + mean).sample[:, :, :70], rtol=0, atol=1e-5)
    x = noise(3, 1, 3, 5, 32, 32).clamp(-1, 1)
    expected = {"wan": (0.10226, 0.06309), "kandinsky-5": (0.22205, 0.44049), "hunyuan-video-1.5": (3.52910, 0.12365)}[family]
    latent = theirs.encode(x).latent_dist.mean
    found = latent.abs().mean(), theirs.decode(latent).sample.abs().mean()
    torch.testing.assert_close(torch.stack(found), torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["hunyuan-video-1.5", "kandinsky-5"])
def test_memory_of_an_autoencoder(folders, family):
    """Counted without numbers: it grows with the frame, and decoding takes more than the clip itself."""
    net = autoencoder.load(folders(family) / "vae")
    small, large = (tiling.peak(net, "decoder", (3, n, n)) for n in (2, 4))
    pixels = 4 * 3 * 9 * (2 * net.config.spatial_factor) ** 2
    assert pixels < small < large < 5 * small
    assert tiling.peak(net, "encoder", (3, 2, 2)) > pixels
    assert tiling.choose(net, (3, 2, 2), 10) is None


# ---------------------------------------------------------------------------------------------------- what is refused


def copied(source, out, **json_changes):
    """A copy of a folder, with changes {"file.json": {key: value}} to what its files say."""
    shutil.copytree(source, out)
    for file, changes in json_changes.items():
        path = out / file
        told = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in told.items() if v != "gone"}))
    return out


CONFIG = "transformer/config.json"
INDEX = "model_index.json"


@pytest.mark.parametrize("changes, said", [
    ({INDEX: {"_class_name": "WanImageToVideoPipeline"}}, "another task"),
    ({INDEX: {"image_encoder": ["transformers", "CLIPVisionModel"]}}, "image-to-video"),
    ({INDEX: {"transformer": ["diffusers", "FluxTransformer2DModel"]}}, "no family known here.*WanTransformer3DModel.*add a row"),
    ({INDEX: {"_class_name": "StableAudioPipeline", "transformer": "gone"}}, "without a transformer"),
    ({INDEX: {"transformer_2": ["diffusers", "WanTransformer3DModel"]}}, "Wan 2.2"),
    ({INDEX: {"expand_timesteps": True}}, "Wan 2.2"),
    ({CONFIG: {"quantization_config": {"load_in_4bit": True}}}, "quantised"),
    ({"text_encoder/config.json": {"quantization_config": {"load_in_4bit": True}}}, "quantised"),
    ({"text_encoder/config.json": {"auto_map": {"AutoModel": "x.Y"}}}, "nothing of a folder is run"),
    ({CONFIG: {"image_dim": 1280}}, "image-to-video"),
    ({CONFIG: {"num_layers": 3}}, "does not fit"),
    ({"vae/config.json": {"_class_name": "AutoencoderKLMagi"}}, "not known here"),
])
def test_folders_that_cannot_be_a_base(folders, tmp_path, changes, said):
    path = copied(folders("wan"), tmp_path / "copy", **changes)
    with pytest.raises(UserError, match=said):
        folder.load_model(path)


@pytest.mark.parametrize("family, changes, said", [
    ("hunyuan-video-1.5", {CONFIG: {"use_meanflow": True}}, "use_meanflow"),
    ("hunyuan-video-1.5", {CONFIG: {"task_type": "i2v"}}, "its task is i2v"),
    ("cosmos-predict-2.5", {CONFIG: {"img_context_dim_in": 8}}, "Transfer"),
    ("cosmos-predict-2.5", {CONFIG: {"extra_pos_embed_type": "learnable"}}, "Cosmos 1.0 or 2.0"),
    ("cosmos-predict-2.5", {INDEX: {"_class_name": "Cosmos2TextToImagePipeline"}}, "another task"),
    ("kandinsky-5", {INDEX: {"_class_name": "Kandinsky5I2VPipeline"}}, "another task"),
])
def test_variants_that_cannot_be_a_base(folders, tmp_path, family, changes, said):
    with pytest.raises(UserError, match=said):
        folder.load_model(copied(folders(family), tmp_path / "copy", **changes))


def test_what_is_missing_is_named(folders, tmp_path):
    with pytest.raises(UserError, match="no model_index.json"):
        folder.load_model(tmp_path)
    for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        path = copied(folders("wan"), tmp_path / part)
        shutil.rmtree(path / part)
        with pytest.raises(UserError, match=f"has no {part}/"):
            folder.load_model(path)
    path = copied(folders("wan"), tmp_path / "shards")
    shutil.rmtree(path / "transformer")
    nets.save(nets.load(folders("wan") / "transformer"), path / "transformer", shard_bytes=100_000)
    assert folder.load_model(path).net.config.layers == 2
    sorted((path / "transformer").glob("*.safetensors"))[1].unlink()
    with pytest.raises(UserError, match="get this file too"):
        folder.load_model(path)
    (path / "model.py").write_text("")
    with pytest.raises(UserError, match="is a program"):
        folder.load_model(path)


def test_distilled_models_are_told_of(folders, tmp_path):
    path = copied(folders("hunyuan-video-1.5"), tmp_path / "copy", **{"guider/guider_config.json": {"guidance_scale": 1.0}})
    with pytest.warns(UserWarning, match="without guidance"):
        assert folder.load_model(path).guidance == 1
    with pytest.warns(UserWarning, match="without guidance"):
        folder.load_model(copied(folders("kandinsky-5"), tmp_path / "K5-nocfg"))
    with pytest.warns(UserWarning, match="dense"):
        folder.load_model(copied(folders("kandinsky-5"), tmp_path / "pro", **{CONFIG: {"attention_type": "nabla"}}))
    with pytest.warns(UserWarning, match="samples will differ"):
        folder.load_model(copied(folders("wan"), tmp_path / "wan", **{"scheduler/scheduler_config.json": {"solver_order": 3}}))


def test_a_text_encoder_too_large_for_the_machine(folders, monkeypatch):
    model = folder.load_model(folders("kandinsky-5"))
    monkeypatch.setattr("families.text.free_memory", lambda device: 1000)
    with pytest.raises(UserError, match="--stage cache"):
        model.text(["a cat"])
