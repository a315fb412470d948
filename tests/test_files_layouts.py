"""Every published layout of a transformer's weights is read as the same network, and nothing else is; one tensor at a time."""
import dataclasses
import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dit
from conftest import golden
from files import checkpoint, layouts
from files.checkpoint import UserError, save_shards, save_tensors
from tiny_layouts import diffusers_names
from wan import nets as wan_nets

CASES = json.loads(golden("wan_dit_tiny.json").read_text())["cases"]
TINY = dit.Config(dim=48, ffn_dim=40, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=8, text_len=6, freq_dim=32)


def tiny(seed=0, **changes):
    """A small transformer with every parameter random, the zero head included."""
    torch.manual_seed(seed)
    net = dit.WanDiT(dataclasses.replace(TINY, **changes))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


def same(net, other, tolerance=0.0):
    """Equal in every parameter."""
    ours, theirs = net.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all((ours[k].float() - theirs[k].float()).abs().max() <= tolerance for k in ours)


# --------------------------------------------------------------------------------------------------------------- names

PAIRS = {  # original: diffusers
    "patch_embedding.bias": "patch_embedding.bias",
    "text_embedding.0.weight": "condition_embedder.text_embedder.linear_1.weight",
    "text_embedding.2.bias": "condition_embedder.text_embedder.linear_2.bias",
    "time_embedding.0.weight": "condition_embedder.time_embedder.linear_1.weight",
    "time_embedding.2.weight": "condition_embedder.time_embedder.linear_2.weight",
    "time_projection.1.bias": "condition_embedder.time_proj.bias",
    "img_emb.proj.0.weight": "condition_embedder.image_embedder.norm1.weight",
    "img_emb.proj.1.weight": "condition_embedder.image_embedder.ff.net.0.proj.weight",
    "img_emb.proj.3.weight": "condition_embedder.image_embedder.ff.net.2.weight",
    "img_emb.proj.4.weight": "condition_embedder.image_embedder.norm2.weight",
    "blocks.12.modulation": "blocks.12.scale_shift_table",
    **{f"blocks.0.self_attn.{x}.weight": f"blocks.0.attn1.to_{x}.weight" for x in "qkv"},
    **{f"blocks.0.cross_attn.{x}.bias": f"blocks.0.attn2.to_{x}.bias" for x in "qkv"},
    "blocks.0.self_attn.o.weight": "blocks.0.attn1.to_out.0.weight",
    "blocks.0.cross_attn.o.weight": "blocks.0.attn2.to_out.0.weight",
    "blocks.0.self_attn.norm_q.weight": "blocks.0.attn1.norm_q.weight",
    "blocks.0.cross_attn.norm_k.weight": "blocks.0.attn2.norm_k.weight",
    "blocks.0.norm3.weight": "blocks.0.norm2.weight",
    "blocks.0.cross_attn.k_img.weight": "blocks.0.attn2.add_k_proj.weight",
    "blocks.0.cross_attn.v_img.bias": "blocks.0.attn2.add_v_proj.bias",
    "blocks.0.cross_attn.norm_k_img.weight": "blocks.0.attn2.norm_added_k.weight",
    "blocks.0.ffn.0.weight": "blocks.0.ffn.net.0.proj.weight",
    "blocks.0.ffn.2.bias": "blocks.0.ffn.net.2.bias",
    "head.modulation": "scale_shift_table",
    "head.head.weight": "proj_out.weight",
    "blocks.3.self_attn.o": "blocks.3.attn1.to_out.0",                   # module paths too
    "head.head": "proj_out",
}


@pytest.mark.core
def test_original_and_diffusers_names():
    pairs = dict(PAIRS)
    for case in CASES.values():
        pairs |= case["official_to_diffusers"]
    for original, diffusers in pairs.items():
        assert layouts.to_diffusers(original) == diffusers == layouts.to_diffusers(diffusers)
        assert layouts.to_original(diffusers) == original == layouts.to_original(original)
    assert layouts.to_original("something.else") == layouts.to_diffusers("something.else") == "something.else"


@pytest.mark.parametrize("changes", [{}, dict(image_dim=16), dict(patch=(1, 1, 1))])
def test_renaming_there_and_back_keeps_the_tensors(changes):
    sd = tiny(**changes).state_dict()
    renamed = diffusers_names(sd)
    back = layouts.original(renamed)
    assert back.keys() == sd.keys() and all(back[k] is sd[k] for k in sd)


# ------------------------------------------------------------------------------------------------- layouts of one file

LAYOUTS = {
    "original": lambda sd: sd,
    "diffusers": diffusers_names,
    "ComfyUI": lambda sd: {f"model.diffusion_model.{k}": v for k, v in sd.items()},
    "DC-VideoGen training": lambda sd: {f"0.{k}": v for k, v in sd.items()} | {"0.null_embedding": torch.zeros(6, 8)},
    "old diffusers": lambda sd: diffusers_names(sd) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(48)},
}
CONTAINERS = {
    "bare": lambda sd: sd,
    "average": lambda sd: {"ema_model_state_dict": {0.999: sd}, "model_state_dict": {k: v + 1 for k, v in sd.items()}, "step": 3},
    "model": lambda sd: {"model_state_dict": {f"module.{k}": v for k, v in sd.items()}, "optimizer": {"lr": 1e-4}},
    "state_dict": lambda sd: {"state_dict": sd},
}


@pytest.mark.core
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_spelling_is_the_same_network(tmp_path, layout):
    net = tiny()
    save_tensors(tmp_path / "w.safetensors", LAYOUTS[layout](net.state_dict()))
    assert same(dit.load(tmp_path / "w.safetensors", heads=2), net)


@pytest.mark.parametrize("new_zip_format", [True, False])
@pytest.mark.parametrize("layout", ["original", "DC-VideoGen training"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_training_containers(tmp_path, container, layout, new_zip_format):
    """.pt files, mapped into memory where they are zip archives."""
    net = tiny()
    torch.save(CONTAINERS[container](LAYOUTS[layout](net.state_dict())), tmp_path / "w.pt", _use_new_zipfile_serialization=new_zip_format)
    with torch.inference_mode():
        again = dit.load(tmp_path / "w.pt", heads=2)
    assert same(again, net) and again.config == dataclasses.replace(TINY, text_len=512)


@pytest.mark.parametrize("stored, tolerance", [(torch.bfloat16, 2e-3), (torch.float16, 3e-4), (torch.float8_e4m3fn, 4e-2), (torch.float8_e5m2, 8e-2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_types(tmp_path, stored, tolerance, dtype):
    """Whatever the file's type, what must be fp32 is, and the rest has the type that was asked for."""
    net = tiny()
    save_tensors(tmp_path / "w.safetensors", {k: v.to(stored) for k, v in net.state_dict().items()})
    again = dit.load(tmp_path / "w.safetensors", heads=2, dtype=dtype)
    assert same(again, net, tolerance + (2e-3 if dtype == torch.bfloat16 else 0))
    for name, p in again.named_parameters():
        assert p.dtype == (torch.float32 if dit.keeps_fp32(name) else dtype), name


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("spell", [lambda k: k, lambda k: f"model.diffusion_model.{k}"])
def test_fp8_with_scales(tmp_path, shape, spell):
    """ComfyUI: every large matrix divided by a number so that it fills the range of fp8, which stands beside it."""
    net, tensors = tiny(), {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for k, v in net.state_dict().items():
        if v.ndim == 2 and k.startswith("blocks"):
            scale = v.abs().max() / 448
            tensors |= {k: (v / scale).to(torch.float8_e4m3fn), k.removesuffix("weight") + "scale_weight": scale.reshape(shape)}
        else:
            tensors[k] = v
    save_tensors(tmp_path / "w.safetensors", {spell(k): v for k, v in tensors.items()})
    again = dit.load(tmp_path / "w.safetensors", heads=2)
    q = "blocks.1.ffn.0.weight"
    exact = tensors[q].float() * tensors["blocks.1.ffn.0.scale_weight"]
    assert torch.equal(again.state_dict()[q], exact) and same(again, net, 0.03)


@pytest.mark.parametrize("scale, says", [
    ({"blocks.0.ffn.0.scale_weight": torch.ones(40)}, "blocks.0.ffn.0.scale_weight is not the scale of one weight"),
    ({"blocks.9.ffn.0.scale_weight": torch.ones(1)}, "blocks.9.ffn.0.scale_weight is not the scale"),
    ({"blocks.0.ffn.0.weight_scale": torch.ones(1), "blocks.1.ffn.0.scale_input": torch.ones(1)}, r"2 scales .* \(first: blocks.0.ffn.0.weight_scale\)")])
def test_other_scales_are_refused_by_name(scale, says):
    with pytest.raises(UserError, match=says):
        dit.from_state_dict(tiny().state_dict() | scale, heads=2)


def adapter_training(sd, rank=4, length=None):
    """-> (a checkpoint of adapter training, the merged weights that it means)"""
    given, merged = {}, dict(sd)
    for k, v in sd.items():
        if ".self_attn.q." in k or k.startswith("time_projection"):
            stem, leaf = k.rsplit(".", 1)
            given[f"0.{stem}.base_layer.{leaf}"] = v
            if leaf == "weight":
                down, up = torch.randn(rank, v.shape[1]), torch.randn(v.shape[0], rank)
                given |= {f"0.{stem}.lora_A.default.weight": down, f"0.{stem}.lora_B.default.weight": up}
                merged[k] = v + 2 * up @ down
                if length:
                    given[f"0.{stem}.lora_magnitude_vector.default.weight"[:-7]] = torch.full((len(v),), length)
                    merged[k] = torch.nn.functional.normalize(merged[k], dim=1) * length
        else:
            given[f"0.{k}"] = v
    return given, merged


@pytest.mark.parametrize("length", [None, 1.7])
def test_checkpoints_of_adapter_training_are_merged(tmp_path, length):
    """W + 2 B A, and with a magnitude vector (DoRA) rows of that length."""
    net = tiny()
    given, merged = adapter_training(net.state_dict(), length=length)
    torch.save({"model_state_dict": given}, tmp_path / "w.pt")
    again = dit.load(tmp_path / "w.pt", heads=2)
    net.load_state_dict(merged)
    assert same(again, net, 1e-5) and not same(again, tiny(), 0.1)
    if length:
        assert again.blocks[0].self_attn.q.weight.norm(dim=1).sub(length).abs().max() < 1e-5


def test_half_an_adapter_is_refused():
    given, _ = adapter_training(tiny().state_dict())
    del given["0.blocks.1.self_attn.q.lora_B.default.weight"]
    with pytest.raises(UserError, match="blocks.1.self_attn.q has a base layer but not both"):
        dit.from_state_dict(given, heads=2)


# ------------------------------------------------------------------------------------------------------------- folders

def folder(path, sd, config=None, shards=3):
    """A folder as the hubs have it, with `shards` files."""
    save_shards(path, sd, shard_bytes=sum(v.nbytes for v in sd.values()) / shards * 1.1)
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return sorted(f.name for f in path.glob("*.safetensors"))


@pytest.mark.parametrize("layout, config", [
    ("original", {"num_heads": 2, "num_layers": 2, "text_len": 6, "model_type": "t2v"}),
    ("diffusers", {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "eps": 1e-5})])
def test_folder_of_shards(tmp_path, layout, config):
    net = tiny()
    files = folder(tmp_path, LAYOUTS[layout](net.state_dict()), config)
    assert files == [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors.index.json"):
        again = dit.load(path)
        assert same(again, net) and again.config == wan_nets.read_config(path)
        assert again.config == dataclasses.replace(TINY, text_len=config.get("text_len", 512), eps=config.get("eps", 1e-6))


def test_what_is_wrong_with_a_folder_is_one_sentence(tmp_path):
    config, index = {"num_heads": 2}, "diffusion_pytorch_model.safetensors.index.json"
    sd, first, second = tiny().state_dict(), "diffusion_pytorch_model-00001-of-00003.safetensors", "diffusion_pytorch_model-00002-of-00003.safetensors"

    def broken(name, damage):
        path = tmp_path / name
        folder(path, sd, config)
        damage(path)
        with pytest.raises(UserError) as e:
            dit.load(path)
        assert str(e.value).count(". ") == 0 and "\n" not in str(e.value)
        return str(e.value)

    def from_another(path):
        folder(tmp_path / "wide", tiny(dim=96).state_dict())
        (tmp_path / "wide" / second).rename(path / second)

    def twice(path):
        save_tensors(path / second, load_file(path / second) | load_file(path / first))

    def other_layers(path):
        part = load_file(path / second)
        save_tensors(path / second, {k.replace("blocks.1", "blocks.2"): v for k, v in part.items()})

    assert f"{second} does not exist, but {index} names it" in broken("missing", lambda p: (p / second).unlink())
    assert "shards of two models" in broken("twice", twice)
    assert f"in {second}, expected [48" in broken("another width", from_another)
    assert "these are shards of another model" in broken("other layers", other_layers)
    assert f"{second} is not a complete safetensors file" in broken("cut", lambda p: (p / second).write_bytes((p / second).read_bytes()[:-9]))
    assert "is not valid JSON" in broken("half an index", lambda p: (p / index).write_text('{"weight_map": {"a'))
    assert "has no weight_map" in broken("no map", lambda p: (p / index).write_text("{}"))
    assert "config.json is not valid JSON" in broken("no config", lambda p: (p / "config.json").write_text("<html>"))
    assert "holds 2 indexes" in broken("two indexes", lambda p: (p / "other.index.json").write_text("{}"))
    assert "3 .safetensors files and no index" in broken("no index", lambda p: (p / index).unlink())
    assert "holds no weight file" in broken("empty", lambda p: [f.unlink() for f in p.iterdir()])
    assert "does not exist" in broken("gone", lambda p: [f.unlink() for f in p.iterdir()] and p.rmdir())
    assert "27 missing (first: blocks.2.cross_attn.k.bias)" in broken("fewer layers", lambda p: (p / "config.json").write_text(json.dumps({"num_heads": 2, "num_layers": 3})))


@pytest.mark.parametrize("damage, says", [
    (lambda sd: sd.pop("blocks.1.ffn.0.bias"), "missing .first: blocks.1.ffn.0.bias"),
    (lambda sd: sd.update({"blocks.0.surprise.weight": torch.zeros(3)}), "unexpected .first: blocks.0.surprise.weight"),
    (lambda sd: sd.update({"blocks.1.norm3.weight": torch.zeros(47)}), r"blocks.1.norm3.weight has shape \[47\], expected \[48\]"),
    (lambda sd: sd.update({"0.head.head.bias": torch.zeros(16)}), "hold head.head.bias twice, as head.head.bias and as 0.head.head.bias"),
    (lambda sd: (sd.clear(), sd.update({"encoder.weight": torch.zeros(3)})), "patch_embedding.weight is missing")])
def test_wrong_weights_are_named(damage, says):
    sd = tiny().state_dict()
    damage(sd)
    with pytest.raises(UserError, match=says):
        dit.from_state_dict(sd, heads=2)


def test_unreadable_files(tmp_path):
    net = tiny()
    dit.save(net, tmp_path / "net.safetensors")
    data = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cut.safetensors is not a complete safetensors file"):
        dit.load(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        dit.load(tmp_path / "nothing.safetensors")
    save_tensors(tmp_path / "bare.safetensors", net.state_dict())
    with pytest.raises(UserError, match="heads"):  # width 48 is no multiple of 128
        dit.load(tmp_path / "bare.safetensors")


# ------------------------------------------------------------------------------------------------------ memory, saving

@pytest.fixture
def one_at_a_time(monkeypatch):
    """Fails when a tensor is fetched while another one that was fetched is still in memory."""
    last = []

    def read(tensor, original=checkpoint.read):
        if not isinstance(tensor, checkpoint.Stored):
            return tensor
        assert not last or last.pop()() is None
        value = original(tensor)
        last.append(weakref.ref(value.untyped_storage()))
        return value

    monkeypatch.setattr(checkpoint, "read", read)


def test_loading_and_saving_hold_one_tensor(tmp_path, one_at_a_time):
    net = tiny()
    save_shards(tmp_path / "in", net.state_dict(), shard_bytes=100_000)
    again = dit.load(tmp_path / "in", heads=2, dtype=torch.bfloat16)
    dit.save(again, tmp_path / "out", dtype=torch.float16, shard_bytes=50_000)
    with pytest.raises(AssertionError):  # the fixture would notice
        [checkpoint.read(v) for v in checkpoint.open_tensors(tmp_path / "in")[0].values()]
    assert same(dit.load(tmp_path / "out"), net, 2e-3)


def test_our_own_file_carries_its_config(tmp_path):
    """heads, text_len and the rest come back without being told."""
    net = tiny(image_dim=16)
    dit.save(net, tmp_path / "net.safetensors", {"step": 7})
    assert wan_nets.read_config(tmp_path / "net.safetensors") == net.config and same(dit.load(tmp_path / "net.safetensors"), net)
    dit.save(net, tmp_path / "half.safetensors", dtype=torch.float16)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "net.safetensors").stat().st_size
    assert same(dit.load(tmp_path / "half.safetensors"), net, 3e-4)


@pytest.mark.parametrize("shard_bytes", [5e9, 60_000])
@pytest.mark.parametrize("format", ["original", "diffusers"])
@pytest.mark.parametrize("changes", [{}, dict(in_channels=12, image_dim=16)])
def test_exported_folders_load_again(tmp_path, format, shard_bytes, changes):
    """Names, config.json and index are enough: without our header the folder still means the same network."""
    net = tiny(**changes)
    dit.save(net, tmp_path, format=format, shard_bytes=shard_bytes)
    again = dit.load(tmp_path)
    assert same(again, net) and again.config == net.config
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 5e9) == (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists()
    for file in files:
        with safe_open(file, "pt") as f:
            assert f.metadata()["format"] == "pt"
        save_file(part := load_file(file), file)
        assert len(files) == 1 or sum(v.nbytes for v in part.values()) <= shard_bytes
    again = dit.load(tmp_path)
    assert same(again, net) and again.config == dataclasses.replace(net.config, text_len=6 if format == "original" else 512)
    told = json.loads((tmp_path / "config.json").read_text())
    if format == "original":
        assert told["model_type"] == ("i2v" if changes else "t2v") and told["num_heads"] == 2
    else:
        assert told["_class_name"] == "WanTransformer3DModel" and told["attention_head_dim"] == 24 and told["patch_size"] == [1, 2, 2]


def test_what_cannot_be_exported(tmp_path):
    net = tiny()
    with pytest.raises(UserError, match="name of a folder"):
        dit.save(net, tmp_path / "a.safetensors", format="diffusers")
    with pytest.raises(UserError, match="onnx"):
        dit.save(net, tmp_path / "a", format="onnx")
    dit.save(net, tmp_path, shard_bytes=60_000)
    with pytest.raises(UserError, match="already holds other weights .*00001-of.*choose an empty folder"):
        dit.save(net, tmp_path)


@pytest.mark.peer
@pytest.mark.parametrize("changes", [{}, dict(in_channels=12, image_dim=16), dict(patch=(1, 1, 1))])
@pytest.mark.parametrize("shard_bytes", [5e9, 60_000])
def test_diffusers_loads_what_we_export(tmp_path, changes, shard_bytes):
    """Strictly, with equal numbers; and we load what it saves."""
    diffusers = pytest.importorskip("diffusers")
    net = tiny(text_len=512, **changes).eval()
    dit.save(net, tmp_path / "ours", format="diffusers", shard_bytes=shard_bytes)
    theirs, report = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    x, t = torch.randn(2, net.config.in_channels, 3, 4, 6), torch.tensor([20, 900])
    context, clip_fea = torch.randn(2, 512, 8), torch.randn(2, 257, 16) if "image_dim" in changes else None
    with torch.no_grad():
        v = net(x, t, context, clip_fea)
        assert (theirs.eval()(x, t, context, clip_fea).sample - v).abs().max() < 2e-5 * v.abs().max().clamp(min=1)
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
        assert torch.equal(dit.load(tmp_path / "theirs")(x, t, context, clip_fea), v)
