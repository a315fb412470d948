"""LoRA: merged == wrapped, step 0 == base, and one adapter in every key layout of the ecosystem gives one result."""
import dataclasses
import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import dit
import kernels
import lora
from conftest import golden
from files import lora_keys
from files.checkpoint import UserError
from files.layouts import to_diffusers

TINY = dit.Config(dim=32, ffn_dim=48, heads=2, layers=2, in_channels=12, out_channels=4, patch=(1, 1, 1),
                  text_dim=16, text_len=6, image_dim=10)
FULL = ("patch_embedding", "head")


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    net = dit.WanDiT(dataclasses.replace(TINY, **changes)).eval()
    nn.init.normal_(net.head.head.weight, std=0.1)        # a zero head would hide every difference
    return net


@torch.no_grad()
def output(net):
    g = torch.Generator().manual_seed(7)
    x, context, clip = (torch.randn(s, generator=g) for s in ((2, 12, 2, 3, 3), (2, 4, 16), (2, 5, 10)))
    return net(x, torch.tensor([900.0, 30.0]), context, clip)


def trained(net, rank=4, alpha=8, **more):
    """A wrapped net whose adapters are not zero any more, as after training; what is trained whole has moved too."""
    lora.wrap(net, rank, alpha, **more)
    for _, a in lora.adapters(net):
        nn.init.normal_(a.up, std=0.1)
    with torch.no_grad():
        for module in more.get("full", ()):
            for p in net.get_submodule(module).parameters():
                p.add_(0.1 * torch.randn_like(p))
    return net


# ----------------------------------------------------------------------------------------------------- wrap and merge

@pytest.mark.core
def test_at_step_0_the_wrapped_net_is_the_base_bit_for_bit():
    base = tiny().requires_grad_(False)    # frozen alike: for trainable weights torch may pick another rounding
    wrapped = lora.wrap(tiny(), rank=4, alpha=8)
    assert torch.allclose(output(base), output(wrapped), atol=1e-6)  # sampling on a CPU fuses GELU into layers without adapter
    kernels.use(plain=True)
    try:
        assert torch.equal(output(base), output(wrapped))
    finally:
        kernels.use(plain=False)


@pytest.mark.core
def test_merged_equals_wrapped():
    net = trained(tiny())
    live = output(net)
    assert not torch.equal(live, output(tiny()))
    merged = lora.merge(net)
    assert not lora.adapters(merged) and merged.state_dict().keys() == tiny().state_dict().keys()
    assert (output(merged) - live).abs().max() < 1e-5


def test_merge_computes_in_fp32_and_keeps_the_dtype():
    net = nn.Sequential(nn.Linear(8, 8).bfloat16())
    before = net[0].weight.detach().clone()
    lora.wrap(net, 2, 2, targets=["0"])
    assert net[0].down.dtype == torch.float32
    nn.init.normal_(net[0].up)
    up, down = net[0].up.detach(), net[0].down.detach()
    assert net(torch.randn(3, 8).bfloat16()).dtype == torch.bfloat16
    lora.merge(net)
    assert torch.equal(net[0].weight, (before.float() + up @ down).bfloat16())


@pytest.mark.parametrize("preset, modules, millions", [
    ("dc-wan2.1-t2v-1.3b", 183, 259.6), ("dc-wan2.1-t2v-14b", 243, 820.6), ("dc-wan2.1-i2v-14b", 243, 820.6)])
def test_published_trainable_set(preset, modules, millions):
    """Rank 256 on self-attention, feed-forward and time layers; patch embedder and head whole; all else frozen."""
    with torch.device("meta"):
        net = lora.wrap(dit.WanDiT(dit.PRESETS[preset]), rank=256, alpha=512, full=FULL)
    found = lora.adapters(net)
    assert len(found) == modules
    assert all(a.alpha / a.rank == 2 for _, a in found)
    assert round(sum(p.numel() for _, a in found for p in (a.down, a.up)) / 1e6, 1) == millions
    assert {re.sub(r"\d+", "i", name, count=1) for name, _ in found if name.startswith("blocks")} == {
        *(f"blocks.i.self_attn.{x}" for x in "qkvo"), "blocks.i.ffn.0", "blocks.i.ffn.2"}
    assert {name for name, _ in found if not name.startswith("blocks")} == {
        "time_embedding.0", "time_embedding.2", "time_projection.1"}
    trained_names = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trained_names == {f"{n}.{k}" for n, _ in found for k in ("down", "up")} | {
        "patch_embedding.weight", "patch_embedding.bias", "head.head.weight", "head.head.bias", "head.modulation"}


def test_initialisation_is_kaiming_uniform_and_zero():
    _, a = lora.adapters(lora.wrap(tiny(), 4, 8))[0]
    bound = a.base.in_features ** -0.5                     # kaiming-uniform with a = sqrt(5)
    assert (a.up == 0).all() and a.down.abs().max() <= bound and a.down.abs().max() > 0.8 * bound


def test_only_the_adapters_train():
    net = lora.wrap(tiny(), 4, 8)
    x, context, clip = torch.randn(1, 12, 1, 2, 2), torch.randn(1, 4, 16), torch.randn(1, 5, 10)
    net(x, torch.tensor([500.0]), context, clip).square().mean().backward()
    trained_names = {n for n, p in net.named_parameters() if p.grad is not None}
    assert trained_names == {f"{n}.{k}" for n, _ in lora.adapters(net) for k in ("down", "up")}


def test_wrapping_twice_or_nothing_is_refused():
    with pytest.raises(ValueError, match="merge"):
        lora.wrap(lora.wrap(tiny(), 4, 8), 4, 8)
    with pytest.raises(UserError, match="nothing to adapt"):
        lora.wrap(tiny(), 4, 8, targets=[r"transformer\.h\.\d+"])
    with pytest.raises(ValueError, match="no adapters"):
        lora.save(tiny(), "never-written.safetensors")


# ---------------------------------------------------------------------------------------------------------------- files

@pytest.mark.core
@pytest.mark.parametrize("format", ["peft", "comfyui", "kohya"])
def test_save_and_load_in_every_layout(tmp_path, format):
    net = trained(tiny(), rank=4, alpha=6, full=FULL)
    path = tmp_path / "adapter.safetensors"
    lora.save(net, path, format, full=FULL, base="toy", step=12)
    assert {"rank": "4", "alpha": "6", "base": "toy", "step": "12"}.items() <= safe_open(path, "pt").metadata().items()

    merged = tiny()
    result = lora.load(merged, path)
    assert not result.skipped and len(result.applied) == 15 + 5
    assert (output(merged) - output(net)).abs().max() < 1e-5

    live = tiny()
    lora.load(live, path, merge=False)
    assert len(lora.adapters(live)) == 15 and torch.equal(output(live), output(net))
    lora.save(live, tmp_path / "again.safetensors", format, full=FULL)
    again, first = load_file(tmp_path / "again.safetensors"), load_file(path)
    assert again.keys() == first.keys() and all(torch.equal(again[k], first[k]) for k in first)


def test_peft_header_says_what_diffusers_needs(tmp_path):
    lora.save(trained(tiny(), rank=4, alpha=6), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        config = json.loads(f.metadata()["lora_adapter_metadata"])
        keys = set(f.keys())
    assert config["transformer.r"] == 4 and config["transformer.lora_alpha"] == 6
    for module in config["transformer.target_modules"]:
        keys -= {f"transformer.{module}.lora_A.weight", f"transformer.{module}.lora_B.weight"}
    assert not keys


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_strength(tmp_path, format):
    """Strength scales every change, also that of whole tensors: 0 is the base bit for bit, and 1 + (-1) cancels."""
    net = trained(tiny(), full=FULL)
    lora.save(net, tmp_path / "a.safetensors", format, full=FULL)
    base, half, none, back = tiny(), tiny(), tiny(), tiny()
    lora.load(none, tmp_path / "a.safetensors", strength=0)
    assert torch.equal(output(none), output(base))
    lora.load(half, tmp_path / "a.safetensors", strength=0.5)
    whole = dict(lora.merge(net).named_parameters())
    for name, p in half.named_parameters():
        torch.testing.assert_close(p, (dict(base.named_parameters())[name] + whole[name]) / 2)
    lora.save(trained(tiny()), tmp_path / "b.safetensors", format)
    lora.load(back, tmp_path / "b.safetensors", strength=1.0)
    lora.load(back, tmp_path / "b.safetensors", strength=-1.0)
    assert (output(back) - output(base)).abs().max() < 1e-5


# ---------------------------------------------------------------------------------- golden: one adapter, many spellings

@pytest.fixture(scope="module")
def adapters():
    """A rank-4 adapter of a tiny image-to-video transformer in several layouts, the transformer and merged outputs."""
    data = load_file(golden("wan_lora_tiny.safetensors"))
    for key, same in json.loads(golden("wan_lora_tiny.json").read_text()).get("aliases", {}).items():
        data[key] = data[same]                     # the shipped cut stores equal tensors once
    if "i2v/in/x" not in data:                     # the full set keeps the transformer in its own file
        data |= {k: v for k, v in load_file(golden("wan_dit_tiny.safetensors")).items() if k.startswith("i2v/")}
    return data


def part(data, prefix):
    return {k.removeprefix(prefix + "/"): v for k, v in data.items() if k.startswith(prefix + "/")}


@torch.no_grad()
def output_with(adapter, data, strength=1.0, merge=True):
    net = dit.from_state_dict(part(data, "i2v/weights"), heads=2)
    result = lora.load(net, adapter, strength, merge)
    return net(*(data[f"i2v/in/{k}"] for k in ("x", "t", "context", "clip_fea"))), result


@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("layout", ["peft_diffusers", "comfy", "kohya"])
def test_golden_layouts(adapters, layout, merge, strength):
    y, result = output_with(part(adapters, layout), adapters, strength, merge)
    torch.testing.assert_close(y, adapters[f"out/strength_{strength}"], rtol=0, atol=2e-5)
    assert not result.skipped


def test_golden_full_deltas(adapters):
    y, result = output_with(part(adapters, "lightx2v"), adapters)
    torch.testing.assert_close(y, adapters["out/lightx2v_strength_1.0"], rtol=0, atol=2e-5)
    assert not result.skipped and "blocks.0.modulation" in result.applied


RESPELLINGS = {  # how other programs spell blocks.0.self_attn.q (kohya's file is the source)
    "videox-fun": lambda k: k.replace("lora_unet_", "lora_unet__"),
    "mixed separators": lambda k: re.sub(r"blocks_(\d)_(self|cross)_attn_", r"blocks_\1.\2_attn.", k),
}
ORIGINAL = {  # the ComfyUI file is the source: dotted original names
    "diffsynth": lambda n, s: f"{n}.{s.replace('lora_down', 'lora_A.default').replace('lora_up', 'lora_B.default')}",
    "diffsynth pipe": lambda n, s: f"pipe.dit.{n}.{s.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}",
    "raw peft": lambda n, s: f"base_model.model.{n}.{s.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}",
    "kijai": lambda n, s: f"diffusion_model.{n}.{s.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}",
    "repacked": lambda n, s: f"model.diffusion_model.{n}.{s}",
    "diffusers without prefix": lambda n, s: f"{to_diffusers(n)}.{s}",
    "second expert": lambda n, s: f"transformer_2.{to_diffusers(n)}.{s}",
    "lycoris": lambda n, s: "lycoris_" + re.sub(r"attn(\d)", lambda m: ("self", "cross")[int(m[1]) - 1] + "_attn",
                                                to_diffusers(n)).replace(".", "_") + "." + s,
}


@pytest.mark.parametrize("spelling", [*RESPELLINGS, *ORIGINAL])
def test_spellings_seen_in_the_wild(adapters, spelling):
    if spelling in RESPELLINGS:
        adapter = {RESPELLINGS[spelling](k): v for k, v in part(adapters, "kohya").items()}
    else:
        adapter = {}
        for k, v in part(adapters, "comfy").items():
            name, suffix = re.fullmatch(r"diffusion_model\.(.+?)\.(lora_.*|alpha)", k).groups()
            adapter[ORIGINAL[spelling](name, suffix)] = v
    y, result = output_with(adapter, adapters)
    torch.testing.assert_close(y, adapters["out/strength_1.0"], rtol=0, atol=2e-5)
    assert not result.skipped


# ------------------------------------------------------------------------------------------------ alpha and other rules

def one(path, module="transformer.blocks.0.attn1.to_q", rank=4, dim=32, **metadata):
    g = torch.Generator().manual_seed(3)
    down, up = torch.randn(rank, dim, generator=g), torch.randn(dim, rank, generator=g)
    save_file({f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}, path,
              {k: json.dumps(v) for k, v in metadata.items()})
    return up @ down


def change(path):
    net = tiny()
    lora.load(net, path)
    return net.blocks[0].self_attn.q.weight - tiny().blocks[0].self_attn.q.weight


@pytest.mark.parametrize("settings, factor", [
    ({}, 1), ({"transformer.r": 4, "transformer.lora_alpha": 8}, 2), ({"r": 4, "lora_alpha": 2}, 0.5),
    ({"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": True}, 4),
    ({"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"blocks.0.attn1.to_q": 4}}, 1),
    ({"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"to_k": 4}}, 2)])
def test_alpha_in_the_header(tmp_path, settings, factor):
    delta = one(tmp_path / "a.safetensors", **({"lora_adapter_metadata": settings} if settings else {}))
    torch.testing.assert_close(change(tmp_path / "a.safetensors"), factor * delta, rtol=1e-4, atol=1e-4)


def test_alpha_in_adapter_config_json_beside_a_peft_file(tmp_path):
    delta = one(tmp_path / "adapter_model.safetensors", "base_model.model.blocks.0.self_attn.q")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 16, "use_rslora": true}')
    torch.testing.assert_close(change(tmp_path / "adapter_model.safetensors"), 8 * delta, rtol=1e-4, atol=1e-4)


def test_bias_of_the_up_matrix_is_scaled_like_it():
    net, rank = tiny(), 2
    stem = "diffusion_model.blocks.0.self_attn.q"
    adapter = {f"{stem}.lora_A.weight": torch.zeros(rank, 32), f"{stem}.lora_B.weight": torch.zeros(32, rank),
               f"{stem}.lora_B.bias": torch.ones(32), f"{stem}.alpha": torch.tensor(6.0)}
    lora.load(net, adapter, strength=0.5)
    torch.testing.assert_close(net.blocks[0].self_attn.q.bias, tiny().blocks[0].self_attn.q.bias + 0.5 * 6 / 2)


def test_norms_keep_apart_original_norm3_is_diffusers_norm2():
    for key in ("diffusion_model.blocks.1.norm3.diff_b", "transformer.blocks.1.norm2.diff_b"):
        net = tiny()
        assert lora.load(net, {key: torch.ones(32)}).applied == ["blocks.1.norm3.bias"]
        assert (net.blocks[1].norm3.bias == 1).all()


def test_modules_this_net_does_not_have_are_skipped_and_reported(tmp_path):
    """An image-to-video adapter on a text-to-video net, with a text encoder's part in the file."""
    net = trained(tiny(), targets=[r"blocks\.\d+\.(self|cross)_attn\..+", r"img_emb\.proj\.[13]"])
    lora.save(net, tmp_path / "a.safetensors", "comfyui")
    adapter = load_file(tmp_path / "a.safetensors") | {"lora_te1_text_model.lora_up.weight": torch.zeros(2, 2)}
    result = lora.load(tiny(image_dim=None), adapter)
    assert len(result.applied) == 2 * 8
    assert len(result.skipped) == 3 * (2 * 2 + 2) + 1
    assert all(re.search("_img|img_emb|lora_te1", k) for k in result.skipped)


def test_an_adapter_of_the_base_fits_the_deep_latent_space_except_at_its_two_ends():
    """Updates of patch_embedding and head have the base latent's shape: skipped and reported, the rest is applied."""
    adapter = {"diffusion_model.patch_embedding.diff": torch.ones(32, 16, 1, 2, 2),
               "diffusion_model.patch_embedding.diff_b": torch.ones(32),
               "diffusion_model.head.head.lora_down.weight": torch.ones(2, 32),
               "diffusion_model.head.head.lora_up.weight": torch.ones(64, 2),
               "diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 32)}
    net = tiny()
    result = lora.load(net, adapter)
    assert result.applied == ["blocks.0.modulation", "patch_embedding.bias"]
    assert result.skipped == [f"{k}.weight (made for another latent space)" for k in ("head.head", "patch_embedding")]
    torch.testing.assert_close(net.blocks[0].modulation, tiny().blocks[0].modulation + 1)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_a_file_for_both_experts_of_wan_2_2(tmp_path, expert):
    """`transformer.` is the high-noise expert, `transformer_2.` the low-noise one, each with its own alpha; a net of neither kind refuses."""
    q = "blocks.0.attn1.to_q"
    deltas = {"high": 2 * one(tmp_path / "high.safetensors", f"transformer.{q}"), "low": 3 * one(tmp_path / "low.safetensors", f"transformer_2.{q}", rank=2)}
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer_2.r": 2, "transformer_2.lora_alpha": 6}
    save_file(load_file(tmp_path / "high.safetensors") | load_file(tmp_path / "low.safetensors"), tmp_path / "both.safetensors",
              {"lora_adapter_metadata": json.dumps(settings)})
    net = tiny()
    result = lora.load(net, tmp_path / "both.safetensors", expert=expert)
    assert result == (["blocks.0.self_attn.q.weight"], [])
    torch.testing.assert_close(net.blocks[0].self_attn.q.weight, tiny().blocks[0].self_attn.q.weight + deltas[expert], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="both.safetensors holds adapters for the two transformers of Wan 2.2"):
        lora.load(tiny(), tmp_path / "both.safetensors")
    for file in ("high", "low"):                                          # one part fits either
        assert lora.load(tiny(), tmp_path / f"{file}.safetensors", expert=expert).applied


@pytest.mark.parametrize("format", ["peft", "comfyui", "kohya"])
def test_an_adapter_of_another_size_is_refused_and_nothing_is_changed(tmp_path, format):
    lora.save(trained(tiny()), tmp_path / "small.safetensors", format)
    net = tiny(dim=64, ffn_dim=96)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError, match=r"small.safetensors was made for another base.* \d+ x 32, this .* \d+ x 64;"):
        lora.load(net, tmp_path / "small.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_whole_tensors_of_another_latent_space_are_refused(tmp_path):
    lora.save(trained(tiny(), full=FULL), tmp_path / "a.safetensors", full=FULL)
    with pytest.raises(UserError, match="another base.*patch_embedding.weight"):
        lora.load(tiny(in_channels=8), tmp_path / "a.safetensors")


q = "diffusion_model.blocks.0.self_attn.q"
matrices = {f"{q}.lora_A.weight": torch.zeros(2, 32), f"{q}.lora_B.weight": torch.zeros(32, 2)}


@pytest.mark.parametrize("adapter, says", [
    ({}, "holds no LoRA"),
    ({"lora_unet_down_blocks_0_attentions_0.lora_up.weight": torch.zeros(4, 4)}, "holds no LoRA"),   # another network
    ({"patch_embedding.weight": torch.zeros(32, 12, 1, 1, 1)}, "holds no LoRA"),                     # a whole model
    ({f"{q}.lora_A.weight": torch.zeros(2, 32)}, "both matrices"),
    ({f"{q}.lora_B.bias": torch.zeros(32)}, "both matrices"),
    (matrices | {f"{q}.dora_scale": torch.ones(32, 1)}, "DoRA"),
    (matrices | {k.replace("diffusion_model", "transformer"): v for k, v in matrices.items()}, "two updates"),
    ({"diffusion_model.head.head.diff": torch.zeros(64, 32)}, "holds no LoRA"),                    # only the ends
    (matrices | {f"{q}.lora_B.weight": torch.zeros(32, 3)}, "both matrices")])
def test_files_that_cannot_be_applied_are_one_sentence(adapter, says):
    with pytest.raises(UserError, match=says):
        lora.load(tiny(), adapter)


def test_unknown_format_and_mixed_ranks(tmp_path):
    net = trained(tiny())
    with pytest.raises(UserError, match="comfyui"):
        lora.save(net, tmp_path / "a.safetensors", "onnx")
    net.blocks[0].ffn[0].alpha = 3
    with pytest.raises(UserError, match="differ"):
        lora.save(net, tmp_path / "a.safetensors", "peft")
    lora.save(net, tmp_path / "a.safetensors", "comfyui")
    again = tiny()
    lora.load(again, tmp_path / "a.safetensors")
    assert (output(again) - output(net)).abs().max() < 1e-5


# ----------------------------------------------------------------------------------------------------- beside diffusers

@pytest.mark.peer
def test_diffusers_and_we_read_each_others_files(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    config = dict(image_dim=None, in_channels=4, out_channels=4, text_len=512)
    net = trained(tiny(**config), rank=4, alpha=6)
    lora.save(net, tmp_path / "ours.safetensors", "peft")

    def peer():
        p = diffusers.WanTransformer3DModel(
            patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=256, ffn_dim=48, num_layers=2, eps=1e-6)
        p.load_state_dict({to_diffusers(k): v for k, v in tiny(**config).state_dict().items()})
        return p.eval()

    @torch.no_grad()
    def run(model):
        g = torch.Generator().manual_seed(7)
        x, context = torch.randn(1, 4, 2, 3, 3, generator=g), torch.randn(1, 4, 16, generator=g)
        t = torch.tensor([500.0])
        if isinstance(model, dit.WanDiT):
            return model(x, t, context)
        return model(x, t, torch.nn.functional.pad(context, (0, 0, 0, 508))).sample

    theirs = peer()
    with safe_open(tmp_path / "ours.safetensors", "pt") as f:      # as their pipelines' load_lora_weights does
        theirs.load_lora_adapter({k: f.get_tensor(k) for k in f.keys()}, prefix="transformer",
                                 metadata=json.loads(f.metadata()["lora_adapter_metadata"]))
    assert (run(theirs) - run(net)).abs().max() < 1e-4 < (run(peer()) - run(net)).abs().max()

    layers = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "ours.safetensors").items()}
    diffusers.WanPipeline.save_lora_weights(
        tmp_path / "theirs", layers, transformer_lora_adapter_metadata=theirs.peft_config["default_0"].to_dict())
    ours = tiny(**config)
    assert not lora.load(ours, tmp_path / "theirs" / "pytorch_lora_weights.safetensors").skipped
    assert (run(ours) - run(net)).abs().max() < 1e-5


@pytest.mark.parametrize("kind, key", [
    ("LoKr", "self_attn.q.lokr_w1"), ("LoHa", "self_attn.q.hada_w1_a"), ("DoRA", "self_attn.q.dora_scale"),
    ("LoRA of fused layers", "self_attn.to_qkv.lora_down.weight"), ("patch that sets weights", "norm3.set_weight")])
def test_a_kind_that_is_not_supported_is_refused_by_name(kind, key):
    """Also beside a part that would fit."""
    fits = {"diffusion_model.blocks.0.norm3.diff": torch.zeros(24)}
    with pytest.raises(UserError, match=f"is a {kind} .it has .*, which is not supported: use a plain LoRA"):
        lora_keys.fit({"blocks.0.norm3.weight": (24,)}, fits | {f"diffusion_model.blocks.0.{key}": torch.zeros(4, 4)})


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "diffusion_model.", "model.diffusion_model.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_and_what_fits_nothing_is_said(prefix):
    tensors = {f"{prefix}a.{key}": torch.ones(1, 3) for key in ("lora_A.weight",)} | {f"{prefix}a.lora_B.weight": torch.ones(2, 1)}
    updates, skipped, _ = lora_keys.fit({"a.weight": (2, 3)}, tensors)
    assert updates["a.weight"].keys() == {"down", "up"} and not skipped
    with pytest.warns(UserWarning, match="the adapter: 1 of 3 tensors fit nothing in this model .first: b.diff"):
        lora_keys.fit({"a.weight": (2, 3)}, tensors | {"b.diff": torch.ones(1)})


def test_a_modulation_has_a_difference_too():
    updates, skipped, _ = lora_keys.fit({"blocks.0.modulation": (1, 6, 4)}, {"diffusion_model.blocks.0.modulation.diff": torch.ones(1, 6, 4)})
    assert updates["blocks.0.modulation"].keys() == {"diff"} and not skipped
