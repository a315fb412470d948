"""The Wan transformer: equal to the reference, named like the published checkpoints, and honest about what it refuses.

Reference tensors come from tests/golden (two of the five cases) or, all of them, from the folder in GOLDEN_DIR.
"""
import dataclasses
import json
import os
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import dit
from files import layouts
from files.checkpoint import UserError
from tiny_layouts import diffusers_names
from wan import memory

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")
CASES = json.loads((GOLDEN / "wan_dit_tiny.json").read_text())["cases"]
TENSORS = load_file(GOLDEN / "wan_dit_tiny.safetensors")
TOLERANCE = 1e-5  # outputs reach 5; moving the input by one ulp moves the output of case dc_t2v by up to 6e-6
TINY = dit.Config(dim=64, ffn_dim=96, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=8, text_len=6)


def golden(case):
    """-> (state dict, forward arguments, {name: expected tensor})"""
    part = {k.removeprefix(f"{case}/"): v for k, v in TENSORS.items() if k.startswith(f"{case}/")}
    inputs = [part.get(f"in/{name}") for name in ("x", "t", "context", "clip_fea")]
    weights = {k.removeprefix("weights/"): v for k, v in part.items() if k.startswith("weights/")}
    return weights, inputs, {k: v for k, v in part.items() if k.startswith(("out", "act/"))}


def tiny(seed=0, **changes):
    """A small transformer with every parameter random, the zero head included, and inputs for a batch of two."""
    torch.manual_seed(seed)
    c = dataclasses.replace(TINY, **changes)
    net = dit.WanDiT(c)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    clip_fea = torch.randn(2, 5, c.image_dim) if c.image_dim else None
    inputs = torch.randn(2, c.in_channels, 3, 4, 6), torch.tensor([17.0, 940.0]), torch.randn(2, 5, c.text_dim), clip_fea
    return net, inputs


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---------------------------------------------------------------------------------------------- equal to the reference

@pytest.mark.core
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_output_equals_reference(case):
    weights, inputs, expected = golden(case)
    v = dit.from_state_dict(weights, heads=2)(*inputs)
    assert (v - expected["out"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_output_equals_reference_with_everything_computed_ahead(case):
    """Prompt (in the full set two of different lengths in one batch) and time prepared once."""
    weights, (x, t, context, clip_fea), expected = golden(case)
    net = dit.from_state_dict(weights, heads=2)
    prompt = net.prompt(context, clip_fea)
    if t.ndim == 2:  # two times, one for the tokens of the first frame: given per frame
        t = t[:, :: t.shape[1] // x.shape[2]]
        assert t.shape == (1, 3)
    v = net(x, net.embed_time(t), prompt)
    assert (v - expected["out"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_activations_equal_reference(case):
    """Every intermediate that the reference kept, so that a mistake shows where it is made."""
    weights, inputs, expected = golden(case)
    net, seen = dit.from_state_dict(weights, heads=2), {}
    parts = {"patch": net.patch_embedding, "text_embedding": net.text_embedding, "time_embedding": net.time_embedding,
             "time_projection": net.time_projection, "head": net.head, "img_emb": getattr(net, "img_emb", None)}
    for i, block in enumerate(net.blocks):
        parts |= {f"block{i}": block, f"block{i}.self_attn": block.self_attn, f"block{i}.cross_attn": block.cross_attn}
    for name, module in parts.items():
        if module is not None:
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    net(*inputs)
    for key, value in expected.items():
        if key.startswith("act/"):
            ours = seen[key.removeprefix("act/")].flatten(1, -2) if key == "act/patch" else seen[key.removeprefix("act/")]
            ours = ours[:, : value.shape[1]] if key == "act/text_embedding" else ours.reshape(value.shape)
            assert (ours - value).abs().max() < TOLERANCE, key


# --------------------------------------------------------------------------------- named and sized like the checkpoints

PARAMETERS = {
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "wan2.1-i2v-14b": 16_394_878_784,
    "wan2.2-t2v-a14b": 14_288_491_584,
    "wan2.2-i2v-a14b": 14_288_901_184,
    "wan2.2-ti2v-5b": 4_999_787_712,
    "dc-wan2.1-t2v-1.3b": 1_418_898_464,
    "dc-wan2.1-t2v-14b": 14_288_163_872,
    "dc-wan2.1-i2v-14b": 16_394_325_792,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_has_the_published_size_and_is_inferred_from_its_shapes(name):
    with torch.device("meta"):
        net = dit.WanDiT(dit.PRESETS[name])
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    for sd in (net.state_dict(), layouts.original(diffusers_names(net.state_dict()))):
        assert dit.Config(**layouts.sizes(sd)) == dit.PRESETS[name]


@pytest.mark.parametrize("name, keys, block", [
    ("wan2.1-t2v-1.3b", 825, 46_440_704), ("wan2.1-t2v-14b", 1095, 351_394_304), ("wan2.1-i2v-14b", 1303, 403_838_464),
    ("wan2.2-ti2v-5b", 825, 163_656_704)])
def test_key_counts_and_block_sizes(name, keys, block):
    with torch.device("meta"):
        net = dit.WanDiT(dit.PRESETS[name])
    assert len(net.state_dict()) == keys
    assert sum(p.numel() for p in net.blocks[0].parameters()) == block


# ----------------------------------------------------------------------------------------------------------- exactness

@pytest.mark.core
@pytest.mark.parametrize("patch, image_dim", [((1, 2, 2), None), ((1, 1, 1), 16), ((3, 2, 1), None)])
@torch.inference_mode()
def test_batch_of_two_equals_two_batches_of_one(patch, image_dim):
    net, inputs = tiny(patch=patch, image_dim=image_dim)
    both = net(*inputs)
    assert both.shape == inputs[0].shape
    for i in range(2):
        one = net(*(a if a is None else a[i : i + 1] for a in inputs))
        assert (one - both[i : i + 1]).abs().max() < 1e-5


@torch.inference_mode()
def test_time_per_token():
    """[B, L] with one value everywhere is [B]; another time for the first frame's tokens changes the result."""
    net, (x, t, context, _) = tiny()
    per_token = t[:, None].repeat(1, dit.tokens(net.config, x.shape[2:]))
    assert (net(x, per_token, context) - net(x, t, context)).abs().max() < 1e-5
    per_token[:, :6] = 0
    assert relative(net(x, per_token, context), net(x, t, context)) > 1e-3


@torch.inference_mode()
def test_time_per_frame():
    """[B, F], a time for each latent frame, is [B, L] with it repeated; any other count is refused."""
    net, (x, t, context, _) = tiny()
    per_frame = torch.tensor([[0.0, 400.0, 400.0], [0.0, 30.0, 990.0]])
    v = net(x, per_frame, context)
    assert (v - net(x, per_frame.repeat_interleave(6, 1), context)).abs().max() < 1e-5
    assert relative(v, net(x, per_frame[:, 1], context)) > 1e-3
    with pytest.raises(UserError, match="4 times do not fit 3 latent frames of 6 tokens"):
        net(x, torch.zeros(2, 4), context)


@pytest.mark.parametrize("timesteps", [torch.tensor([999.0, 641.0, 20.0]), torch.tensor([[0.0, 999.0, 999.0], [0.0, 20.0, 20.0]])])
@torch.inference_mode()
def test_times_of_all_steps_at_once(timesteps):
    """What step i would have computed, for every sample of the batch."""
    net, (x, _, context, _) = tiny()
    for t, time in zip(timesteps, net.times(timesteps), strict=True):
        assert (net(x, time, context) - net(x, t.expand(2, *t.shape), context)).abs().max() < 1e-5


@pytest.mark.core
@torch.inference_mode()
def test_prompt_computed_once():
    """Keys and values of a prompt serve every step; padded by the caller or not, the result is the plain one."""
    net, (x, t, _, clip_fea) = tiny(image_dim=16, text_len=40)
    context = torch.randn(2, 9, 8)
    context[1, 4:] = 0  # a batch of two prompts, 9 and 4 words
    plain = net(x, t, context, clip_fea)
    for given in (context, F.pad(context, (0, 0, 0, 31))):
        prompt = net.prompt(given, clip_fea)
        assert torch.equal(net(x, t, prompt), plain)  # the same operations in another order
        assert torch.equal(net(x, t / 2, prompt), net(x, t / 2, context, clip_fea))
    empty = torch.zeros(2, 0, 8)
    assert torch.equal(net(x, t, net.prompt(empty, clip_fea)), net(x, t, empty, clip_fea))


@pytest.mark.slow
@torch.inference_mode()
def test_one_graph():
    """torch.compile sees a single graph, with prompt and time computed ahead."""
    net, (x, _, context, _) = tiny()
    prompt, times = net.prompt(context), net.times(torch.tensor([900.0, 30.0]))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for time in times:
        assert torch.equal(compiled(x, time, prompt), net(x, time, prompt))


@torch.inference_mode()
def test_prompt_padding_is_attended():
    """A short prompt is a prompt with zero rows up to text_len, and those rows count: without them the result differs."""
    net, (x, t, context, _) = tiny()
    padded = F.pad(context, (0, 0, 0, 1))
    assert torch.equal(net(x, t, context), net(x, t, padded))
    short = dit.from_state_dict(net.state_dict(), config=dataclasses.replace(net.config, text_len=5))
    assert relative(short(x, t, context), net(x, t, padded)) > 1e-4


def test_untrained_network_predicts_zero():
    net = dit.WanDiT(dit.PRESETS["toy-dc"])
    x = torch.randn(1, 68, 2, 2, 2)
    assert not net(x, torch.tensor([500.0]), torch.randn(1, 4, 32)).any()


def test_patches():
    """Embedding patches by one matrix product is the strided convolution; unpatchify has channels fastest."""
    net, (x, *_) = tiny(patch=(1, 2, 2))
    conv = F.conv3d(x, net.patch_embedding.weight, net.patch_embedding.bias, stride=(1, 2, 2))
    assert (net.embed_patches(x).permute(0, 4, 1, 2, 3) - conv).abs().max() < 1e-5
    y = torch.arange(2 * 3 * 16.0).view(1, 6, 16)  # grid 1 x 2 x 3, 16 = (1 2 2 c)
    video = net.unpatchify(y, (1, 2, 3))
    assert video.shape == (1, 4, 1, 4, 6)
    assert torch.equal(video[0, :, 0, 2, 5], y[0, 5, 4:8])  # token (1, 2), inside it row 0, column 1


def test_rope_depends_on_distance_only():
    """Rotated q . k is the same for every pair of tokens with the same offset, on all three axes."""
    rope = dit.rope_table((4, 5, 6), 128, torch.device("cpu")).view(4, 5, 6, 64)
    assert torch.equal(rope[0, 0, 0], torch.ones(64, dtype=torch.complex64))
    turned = rope[1:, 1:, 1:] * rope[:-1, :-1, :-1].conj()
    assert (turned - turned[0, 0, 0]).abs().max() < 1e-6
    for axis, pairs in enumerate((slice(0, 22), slice(22, 43), slice(43, 64))):  # 22 time, 21 height, 21 width
        move = [0, 0, 0]
        move[axis] = 1
        changed = (rope[tuple(move)] != 1).nonzero().flatten()
        assert changed.tolist() == list(range(64))[pairs]


def test_features_by_depth():
    net, inputs = tiny()
    v, features = net(*inputs, return_features=(0, 1))
    assert torch.equal(v, net(*inputs))
    assert features[0].shape == (2, 3, 2, 3, 64)  # b f h w d
    e, _ = net.embed_time(inputs[1])
    assert torch.equal(net.unpatchify(net.head(features[1].flatten(1, 3), e), (3, 2, 3)), v)


# ----------------------------------------------------------------------------------------------- precision and training

def test_bf16():
    """Autocast over fp32 masters and stored bf16 matrices are the same computation (but for where GELU is rounded), within a percent of
    fp32; what must stay fp32 does."""
    weights, inputs, _ = golden("dc_i2v")
    net, stored = (dit.from_state_dict(weights, heads=2, dtype=d) for d in (torch.float32, torch.bfloat16))
    with torch.inference_mode():
        exact, cast = net(*inputs), stored(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            autocast, features = net(*inputs, return_features=(0, 1))
    assert relative(cast, autocast) < relative(cast, exact)
    assert 1e-4 < relative(cast, exact) < 1e-2
    assert cast.dtype == autocast.dtype == features[1].dtype == torch.float32
    for name, p in stored.named_parameters():
        fp32 = any(part in name for part in ("norm", "modulation", "time_", "head.", "img_emb.proj.0", "img_emb.proj.4"))
        assert p.dtype == (torch.float32 if fp32 else torch.bfloat16), name
    with pytest.raises(ValueError, match="cast_weights"):
        tiny()[0].to(torch.bfloat16)(*tiny()[1])


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_everything_and_checkpointing_changes_none(autocast):
    net, inputs = tiny(image_dim=16)
    gradients = []
    for net.checkpointing in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            net(*inputs).square().mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all() and gradient.any(), name
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_table_made_while_sampling_serves_training():
    net, inputs = tiny()
    dit.rope_table.cache_clear()
    with torch.inference_mode():
        net(*inputs)
    net(*inputs).sum().backward()


# ---------------------------------------------------------------------------------------------------------------- cost

@pytest.mark.parametrize("name, latent, tokens, linear, attention", [
    ("wan2.1-t2v-1.3b", (21, 60, 104), 32_760, 82.1, 200.9),
    ("wan2.1-t2v-1.3b", (21, 90, 160), 75_600, 189.2, 1060.6),
    ("wan2.1-t2v-1.3b", (21, 270, 480), 680_400, 1702.0, 85394.1),
    ("dc-wan2.1-t2v-1.3b", (20, 22, 40), 17_600, 44.2, 58.8),
    ("wan2.1-t2v-14b", (21, 90, 160), 75_600, 1809.7, 4713.7),
    ("dc-wan2.1-t2v-14b", (20, 22, 40), 17_600, 423.0, 261.1),
    ("dc-wan2.1-t2v-14b", (20, 68, 120), 163_200, 3904.0, 21887.2),
    ("wan2.1-i2v-14b", (21, 90, 160), 75_600, 1810.8, 4729.6),
    ("dc-wan2.1-i2v-14b", (20, 22, 40), 17_600, 424.1, 264.8),
    ("wan2.2-ti2v-5b", (31, 44, 80), 27_280, 237.5, 279.5),
])
def test_flops_table(name, latent, tokens, linear, attention):
    """TFLOP of one forward at the published sizes."""
    config = dit.PRESETS[name]
    cost = memory.flops(config, latent)
    assert dit.tokens(config, latent) == tokens
    assert cost.linear / 1e12 == pytest.approx(linear, abs=0.06)
    assert cost.attention / 1e12 == pytest.approx(attention, abs=0.06)


@pytest.mark.parametrize("name", ["dc-wan2.1-t2v-1.3b", "dc-wan2.1-i2v-14b"])
def test_flops_are_what_the_network_does(name):
    """The formula against torch's own counter, on the meta device, where nothing is computed."""
    config = dataclasses.replace(dit.PRESETS[name], layers=2)
    latent = (20, 22, 40)
    with torch.device("meta"), torch.no_grad():
        net = dit.WanDiT(config)
        clip_fea = torch.empty(1, 257, 1280) if config.image_dim else None
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, config.in_channels, *latent), torch.empty(1), torch.empty(1, 512, 4096), clip_fea)
    assert counter.get_total_flops() == pytest.approx(memory.flops(config, latent).total, rel=1e-3)


class Allocations(TorchDispatchMode):
    """Bytes that live tensors made in this context hold, and their peak."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        storages = lambda tree: {t.untyped_storage()._cdata: t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}
        given = storages((args, kwargs))
        for key, storage in storages(result).items():
            if key not in self.held and key not in given:  # else it is a view
                self.held.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, key, storage.nbytes())
        return result

    def free(self, key, size):
        self.held.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, latent, batch", [("dc-wan2.1-t2v-14b", (20, 22, 40), 2), ("wan2.1-t2v-1.3b", (21, 60, 104), 1),
                                                 ("wan2.1-i2v-14b", (21, 90, 160), 1), ("toy-dc", (8, 8, 8), 4)])
def test_activation_memory_is_what_the_network_allocates(monkeypatch, name, latent, batch, dtype):
    """The formula against every allocation of a real-size forward, on the meta device; attention as a kernel that allocates its result."""
    monkeypatch.setattr(dit, "attention", lambda q, k, v: torch.empty_like(q))
    config = dataclasses.replace(dit.PRESETS[name], layers=3)
    with torch.device("meta"), torch.no_grad():
        net = dit.WanDiT(config).cast_weights(dtype)
        context = torch.empty(batch, config.text_len, config.text_dim)
        clip_fea = torch.empty(batch, 257, config.image_dim) if config.image_dim else None
        with Allocations() as found:
            x, prompt = torch.empty(batch, config.in_channels, *latent), net.prompt(context, clip_fea)
            net(x, net.times(torch.empty(1))[0], prompt)
    estimate = memory.activation_bytes(config, latent, batch, dtype, prompts=batch)
    assert found.peak == pytest.approx(estimate, rel=0.05)


# ------------------------------------------------------------------------------------------------------- bad inputs

def test_inputs_that_do_not_fit():
    net, (x, t, context, _) = tiny()
    with pytest.raises(UserError, match="3x5x6.*cannot be cut into patches of 1x2x2"):
        net(torch.randn(2, 4, 3, 5, 6), t, context)
    with pytest.raises(UserError, match=r"takes \[batch, 4"):
        net(torch.randn(2, 8, 3, 4, 6), t, context)
    with pytest.raises(UserError, match="text encoder"):
        net(x, t, torch.randn(2, 7, 8))
    with pytest.raises(UserError, match="no image branch"):
        net(x, t, context, torch.randn(2, 5, 16))
    with pytest.raises(UserError, match="give clip_fea"):
        tiny(image_dim=16)[0](x, t, context)
    with pytest.raises(UserError, match="heads"):
        dit.WanDiT(dataclasses.replace(TINY, heads=5))
