"""Every fast operation beside its plain twin: equal in fp32 to 1e-5, in bf16 as close to fp32 as the twin is. And the switch between them.

(The fused GPU kernels against the same twins: tests/test_gpu_triton_kernels.py.)
"""
import copy

import pytest
import torch
import torch.nn.functional as F

import ae
import chunk_causal
import dit
import kernels

FP32, BF16 = torch.float32, torch.bfloat16
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last_3d}


@pytest.fixture
def slow():
    """Call it to run something on the plain path."""
    def run(function, *args, **kwargs):
        kernels.use(plain=True)
        try:
            return function(*args, **kwargs)
        finally:
            kernels.use()

    yield run
    assert not kernels.plain()


def twins_agree(function, twin, *inputs, tolerance=1e-5):
    """function == twin in fp32; in bf16 (whatever of the inputs a network would hold in bf16) its error is at most that of the twin, and a rounding."""
    with torch.inference_mode():
        exact = twin(*inputs)
        scale = exact.abs().max().clamp(min=1)
        assert (function(*inputs) - exact).abs().max() <= tolerance * scale
        low = [a.to(BF16) if isinstance(a, torch.Tensor) and a.dtype == FP32 and a.ndim > 2 else a for a in inputs]
        error = lambda f: (f(*low).float() - exact).abs()
        ours, theirs = error(function), error(twin)
        assert 1e-5 * scale < theirs.max() and ours.max() <= theirs.max() + 2**-8 * scale and ours.norm() <= 1.1 * theirs.norm()


# ---------------------------------------------------------------------------------------------------- the transformer


@pytest.mark.core
@pytest.mark.parametrize("keys, length", [(8, 40), (100, 40), (300, 40), (300, 300)])
def test_attention(keys, length):
    q, k, v = (torch.randn(2, n, 3, 32) for n in (length, keys, keys))
    twins_agree(kernels.attention, kernels.attention_plain, q, k, v)


@pytest.mark.parametrize("keys, training, explicit", [(400, True, True), (400, False, False), (1200, True, False)])
def test_the_form_of_attention_on_the_cpu(monkeypatch, keys, training, explicit):
    """In bf16 the scores are written out for up to 1024 keys where gradients are recorded, for up to 256 where not."""
    called, library = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: called.append(1) or library(*a))
    q, k, v = (torch.randn(1, n, 2, 16, dtype=BF16, requires_grad=training) for n in (8, keys, keys))
    kernels.attention(q, k, v)
    assert bool(called) != explicit


@pytest.mark.parametrize("shape", [(1, 5, 48), (2, 64, 48)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_linear_and_gelu(slow, shape, dtype):
    """In bf16 the fused form is the better one: it does not round before the activation function."""
    layer, x = torch.nn.Linear(48, 96), 3 * torch.randn(shape)
    exact = F.gelu(layer(x), approximate="tanh").detach()
    layer, x = layer.to(dtype), x.to(dtype)
    with torch.inference_mode():
        fast, plain = kernels.linear_gelu(layer, x), slow(kernels.linear_gelu, layer, x)
    assert (plain - exact).abs().max() < (1e-5 if dtype == FP32 else 0.05)
    assert (fast - exact).norm() <= 1.02 * (plain - exact).norm() + 1e-5 * exact.norm()
    assert kernels.linear_gelu(layer, x).requires_grad  # training takes the form that has a gradient


@pytest.mark.parametrize("groups, batch", [(1, 1), (1, 2), (3, 2), (12, 2)])
def test_modulation_of_runs_of_tokens(groups, batch):
    """One vector for all tokens (of all samples, or of each), one for each third of them, or one each."""
    x, y = torch.randn(2, 12, 8), torch.randn(2, 12, 8)
    scale, shift, gate = (torch.randn(batch, groups, 8) for _ in range(3))
    each = lambda a: a.repeat_interleave(12 // groups, 1)
    expected = F.layer_norm(x, (8,)) * (1 + each(scale)) + each(shift)
    with torch.inference_mode():
        for modulate in (kernels.layer_norm_modulate, kernels.layer_norm_modulate_plain):
            assert (modulate(x, scale, shift, 1e-5) - expected).abs().max() < 1e-5
            assert modulate(x, scale, shift, 1e-5, BF16).dtype == BF16
        for gated in (kernels.gate_residual, kernels.gate_residual_plain):
            assert (gated(x, y, gate) - (x + y * each(gate))).abs().max() < 1e-5


def test_rms_norm_and_rotation():
    """Against the textbook formula in float64; the result keeps the input's dtype."""
    x, weight = torch.randn(2, 12, 24), torch.randn(24)
    d = x.double()
    rms = d / (d.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    rope = dit.rope_table((2, 2, 3), 12, torch.device("cpu"))  # two heads of 12
    a, b = rms.view(2, 12, 2, 6, 2).unbind(-1)
    cos, sin = rope.real[:, None], rope.imag[:, None]
    rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3)
    for dtype, tolerance in ((FP32, 1e-5), (BF16, 4e-2)):
        y = kernels.rms_norm(x.to(dtype), weight, 1e-6)
        assert y.dtype == dtype and (y - rms).abs().max() < tolerance
        y = kernels.rms_norm_rope(x.to(dtype), weight, rope, 2, 1e-6)
        assert y.dtype == dtype and (y - rotated).abs().max() < tolerance
    twins_agree(kernels.rms_norm_rope, kernels.rms_norm_rope_plain, x, weight, rope, 2, 1e-6)
    kept = x.clone()
    with torch.inference_mode():
        kernels.rms_norm_rope(x, weight, rope, 2, 1e-6)
    assert torch.equal(x, kept)  # it works in place, but on its own copy


@pytest.mark.core
@pytest.mark.parametrize("groups", [1, 3])
def test_a_whole_transformer(slow, groups):
    """The switch reaches every operation; fp32 to 1e-5."""
    net = dit.WanDiT(dit.Config(dim=64, ffn_dim=96, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=16, text_len=20)).eval()
    torch.nn.init.normal_(net.head.head.weight)
    inputs = torch.randn(2, 4, 3, 8, 8), torch.rand(2, groups) * 1000, torch.randn(2, 9, 16)
    with torch.inference_mode():
        fast, plain = net(*inputs), slow(net, *inputs)
    assert not torch.equal(fast, plain) and (fast - plain).abs().max() <= 1e-5 * plain.abs().max()


# ---------------------------------------------------------------------------------------------------- the autoencoder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("silu, shortcut", [(False, False), (True, False), (False, True)])
def test_autoencoder_norm_in_slices(monkeypatch, layout, silu, shortcut):
    """The same numbers whole and in slices that do not divide the video; the layout is kept; no slice touches the input."""
    x, more = (torch.randn(2, 24, 3, 5, 7).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    weight, bias = torch.randn(24), torch.randn(24)
    more, kept = more if shortcut else None, x.clone()
    whole = kernels.rms_norm_channels(x, weight, bias, 1e-5, silu, more)
    monkeypatch.setitem(kernels.SLICE, "cpu", 2 * 24 * 11)
    sliced = kernels.rms_norm_channels(x, weight, bias, 1e-5, silu, more)
    torch.testing.assert_close(sliced, whole, atol=2e-6, rtol=1e-6)
    assert kernels.layout(sliced) == LAYOUTS[layout] and torch.equal(x, kept)
    twins_agree(kernels.rms_norm_channels, kernels.rms_norm_channels_plain, x, weight, bias, 1e-5, silu, more)
    d = x.double()
    norm = d / (d.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.view(24, 1, 1, 1) + bias.view(24, 1, 1, 1)
    assert ((F.silu(norm) if silu else norm) + (0 if more is None else more) - sliced).abs().max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes, padding", [(2, (1, 1)), (3, (1, 1, 1)), (3, (0, 1, 1))])
def test_convolution(layout, axes, padding):
    """Where torch itself would not ask oneDNN: one clip, few numbers."""
    x, weight, bias = torch.randn(1, 8, *(4, 5, 6)[-axes:]), torch.randn(7, 8, *[3] * axes), torch.randn(7)
    if axes == 3:
        x, weight = (a.to(memory_format=LAYOUTS[layout]) for a in (x, weight))
    plain = lambda x, w, b: (F.conv3d if axes == 3 else F.conv2d)(x, w, b, padding=padding)
    for b in (bias, None):
        exact = plain(x, weight, b)
        assert (kernels.convolution(x, weight, b, padding) - exact).abs().max() <= 1e-5 * exact.abs().max()
        low = [None if a is None else a.to(BF16) for a in (x, weight, b)]
        assert (kernels.convolution(*low, padding) - exact).norm() <= 1.1 * (plain(*low) - exact).norm()
    weight.requires_grad_()
    assert torch.autograd.grad(kernels.convolution(x, weight, None, padding).sum(), weight)[0].shape == weight.shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunks, with_past", [(1, False), (1, True), (3, False), (3, True)])
def test_chunk_causal_convolution(slow, layout, chunks, with_past):
    """Padding by the convolution plus one tap, against the concatenation of the definition."""
    conv = chunk_causal.Conv3d(6, 5, 4).requires_grad_(False).to(memory_format=LAYOUTS[layout])
    x, past = torch.randn(2, 6, 4 * chunks, 5, 6), torch.randn(2, 6, 1, 5, 6) if with_past else None
    for dtype, tolerance in ((FP32, 1e-5), (BF16, 2e-2)):
        conv = conv.to(dtype)
        given = [None if a is None else a.to(dtype) for a in (x, past)]
        (fast, state), (plain, expected) = conv(*given), slow(conv, *given)
        assert (fast - plain).float().norm() <= tolerance * plain.float().norm() and torch.equal(state, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cin, cout, r, t", [(4, 8, 2, 1), (8, 4, 2, 1), (8, 2, 2, 1), (4, 4, 1, 4)])
def test_shuffle_and_its_shortcut(slow, layout, cin, cout, r, t):
    """The same additions in another order of shuffling: to the bit. The layout is kept, in both directions."""
    x, y = (torch.randn(2, c, 2, 3, 4).to(memory_format=LAYOUTS[layout]) for c in (cin, cout * t * r * r))
    fast = chunk_causal.pixel_shuffle_add(y, x, r, t)
    assert torch.equal(fast, slow(chunk_causal.pixel_shuffle_add, y, x, r, t))
    assert kernels.layout(fast) == kernels.layout(chunk_causal.pixel_unshuffle(fast, r, t)) == LAYOUTS[layout]
    assert torch.equal(chunk_causal.pixel_unshuffle(chunk_causal.pixel_shuffle(y, r, t), r, t), y)


@pytest.mark.core
def test_a_whole_autoencoder(slow):
    """Encode and decode, two chunks, in the layout and grouping that sampling uses, against the plain path in the usual layout."""
    torch.manual_seed(1)
    net = ae.DCAEV(ae.Config((0, 8, 16, 16, 16), (0, 1, 1, 1, 1), 4, chunk=8)).eval().requires_grad_(False)
    fast, x = copy.deepcopy(net).to(memory_format=torch.channels_last_3d), torch.rand(1, 3, 16, 32, 48) * 2 - 1
    z, expected = fast.encode(x), slow(net.encode, x)
    assert (z - expected).abs().max() <= 1e-5 * expected.abs().max() and fast.chunks_at_once(*z.shape[3:]) > 1
    y, expected = fast.decode(z), slow(net.decode, z)
    assert not torch.equal(y, expected) and (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    exact, plain = expected, slow(net.bfloat16().decode, z.bfloat16())
    assert (fast.bfloat16().decode(z.bfloat16()) - exact).norm() <= 1.2 * (plain - exact).norm()


def test_bf16_on_a_cpu_only_where_it_has_units_for_it(monkeypatch):
    """A product is computed in fp32 on a CPU that would go through bf16 number by number; a GPU is not asked."""
    x = torch.ones(2, 2)
    for units, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(kernels, "bf16_units", lambda: units)
        with kernels.autocast(x.device):
            assert (x @ x).dtype == dtype
    with kernels.autocast(x.device, bf16=False):
        assert (x @ x).dtype == torch.float32
