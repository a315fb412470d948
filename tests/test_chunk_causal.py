"""The temporal design of DC-AE-V in code: what a frame sees, why streams of any length are exact, and how state is handed on.

Read from top to bottom. A tiny chunk (4 frames) and few channels show everything; nothing here depends on size.
"""
import pytest
import torch
import torch.nn.functional as F

import kernels
from chunk_causal import (
    ISOLATED, TEMPORAL, Conv3d, pixel_shuffle, pixel_unshuffle, recut, run_layers, split_state)
from conftest import golden
from files.checkpoint import UserError

pytestmark = pytest.mark.core
CHUNK = 4
UNITS = torch.load(golden("dc_ae_v_small.pt"), weights_only=True)["units"]


def clip(frames, channels=3, batch=2):
    return torch.randn(batch, channels, frames, 5, 6)


# ---------------------------------------------------------------------------------------------------- 1. the definition


def by_definition(conv, x, past=None):
    """y[q c + j] = bias + W0 xe(j - 1) + W1 xe(j) + W2 xe(j + 1), frame by frame."""
    frames = list(x.unbind(2))
    zeros = torch.zeros_like(frames[0])
    taps = [lambda frame, w=w: F.conv2d(frame, w, padding=1) for w in conv.weight.unbind(2)]
    before_all, c, out = zeros if past is None else past[:, :, 0], conv.chunk, []
    for i, frame in enumerate(frames):
        before = frames[i - 1] if i else before_all
        after = zeros if i % c == c - 1 else frames[i + 1]  # nothing flows back across a border
        out.append(taps[0](before) + taps[1](frame) + taps[2](after) + conv.bias.view(-1, 1, 1))
    return torch.stack(out, dim=2)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("with_past", [False, True])
def test_the_layer_is_its_definition(chunks, with_past, plain):
    """Without copies, and chunk by chunk as [L | X | 0], L the frame before the chunk X."""
    conv, x = Conv3d(3, 5, CHUNK), clip(chunks * CHUNK)
    past = clip(1) if with_past else None
    kernels.use(plain=plain)
    try:
        y, state = conv(x, past)
    finally:
        kernels.use()
    assert torch.allclose(y, by_definition(conv, x, past), atol=1e-5)
    assert torch.equal(state, x[:, :, -1:])  # all that the next chunk needs to know


def test_reference_convolution():
    """The released code's own numbers: without and with a frame before, and a clip that is no multiple of the chunk."""
    u = UNITS["chunk_conv"]
    conv = Conv3d(3, 4, u["chunk"])
    conv.load_state_dict({"weight": u["weight"], "bias": u["bias"]})
    assert torch.allclose(conv(u["input"])[0], u["out"], atol=1e-6)
    y, state = conv(u["input"], u["left_frame"])
    assert torch.allclose(y, u["out_with_left_frame"], atol=1e-6)
    assert torch.equal(state, u["cache_after"])
    assert torch.allclose(conv(u["input"][:, :, :10], ISOLATED)[0], u["out_t10"], atol=1e-6)


# ---------------------------------------------------------------------------------------------------- 2. what a frame sees


def sees(temporal, layers, frames=3 * CHUNK):
    """[out, in] matrix: 1 where output frame `out` of a row of convolutions changes when input frame `in` does."""
    net = [Conv3d(1, 1, CHUNK, temporal).double() for _ in range(layers)]
    for conv in net:
        conv.weight.data.abs_()  # nothing cancels
    x = torch.randn(1, 1, frames, 3, 3).double()
    y, _ = run_layers(net, x)
    rows = torch.zeros(frames, frames, dtype=int)
    for i in range(frames):
        nudged = x.clone()
        nudged[:, :, i] += 1
        rows[:, i] = (run_layers(net, nudged)[0] != y).any(dim=4).any(dim=3)[0, 0]
    return rows


def matrix(text):
    return torch.tensor([[int(n) for n in row.split()] for row in text.strip().splitlines()])


def test_one_layer():
    """A frame sees its neighbours, and over a chunk border only the frame before."""
    assert torch.equal(sees("chunk_causal", layers=1), matrix("""
        1 1 0 0  0 0 0 0  0 0 0 0
        1 1 1 0  0 0 0 0  0 0 0 0
        0 1 1 1  0 0 0 0  0 0 0 0
        0 0 1 1  0 0 0 0  0 0 0 0
        0 0 0 1  1 1 0 0  0 0 0 0
        0 0 0 0  1 1 1 0  0 0 0 0
        0 0 0 0  0 1 1 1  0 0 0 0
        0 0 0 0  0 0 1 1  0 0 0 0
        0 0 0 0  0 0 0 1  1 1 0 0
        0 0 0 0  0 0 0 0  1 1 1 0
        0 0 0 0  0 0 0 0  0 1 1 1
        0 0 0 0  0 0 0 0  0 0 1 1"""))


def test_many_layers():
    """Deep networks see their whole chunk, in both directions, and all chunks before it. Never a later one."""
    one, none = torch.ones(CHUNK, CHUNK, dtype=int), torch.zeros(CHUNK, CHUNK, dtype=int)
    chunks = torch.cat([torch.cat([one, none, none], 1), torch.cat([one, one, none], 1), torch.cat([one, one, one], 1)])
    assert torch.equal(sees("chunk_causal", layers=11), chunks)


def test_the_alternatives_of_the_paper():
    everything = torch.ones(3 * CHUNK, 3 * CHUNK, dtype=int)
    assert torch.equal(sees("causal", layers=6), everything.tril())
    assert torch.equal(sees("non_causal", layers=11), everything)


# ---------------------------------------------------------------------------------------------------- 3. streaming


def stream(layers, x, cuts, state=None):
    out = []
    for piece in x.split(cuts, dim=2):
        y, state = run_layers(layers, piece, state)
        out.append(y)
    return torch.cat(out, dim=2)


@pytest.mark.parametrize("temporal, cuts", [
    ("chunk_causal", [4, 4, 4, 4]), ("chunk_causal", [8, 4, 4]), ("chunk_causal", [4, 12]),  # whole chunks, any number at a time
    ("causal", [4, 4, 4, 4]), ("causal", [1, 1, 2, 5, 7]),  # any cut at all
])
def test_a_stream_in_pieces_is_the_whole_clip(temporal, cuts):
    layers, x = [Conv3d(3, 3, CHUNK, temporal) for _ in range(5)], clip(16)
    assert torch.allclose(stream(layers, x, cuts), run_layers(layers, x)[0], atol=1e-6)


@pytest.mark.parametrize("first, lengths", [(None, [4, 4, 4, 1]), (1, [1, 4, 4, 4])])
def test_pieces_cut_anywhere_become_chunks(first, lengths):
    x = clip(13)
    chunks = list(recut(x.split([3, 1, 7, 2], dim=2), 3, 4, first))
    assert [c.shape[2] for c in chunks] == lengths and torch.equal(torch.cat(chunks, dim=2), x)
    with pytest.raises(UserError, match="the layout is"):
        next(recut([x.transpose(1, 2)], 3, 4))


def test_a_non_causal_network_cannot_stream():
    layers, x = [Conv3d(3, 3, CHUNK, "non_causal") for _ in range(5)], clip(16)
    assert not torch.allclose(stream(layers, x, [8, 8]), run_layers(layers, x)[0], atol=1e-2)


def test_state_is_explicit():
    """Layers remember nothing. The state of a row of layers is the list of theirs; `None` starts a stream anywhere."""
    layers, x = [Conv3d(3, 3, CHUNK) for _ in range(2)], clip(CHUNK)
    y, state = run_layers(layers, x)
    assert torch.equal(run_layers(layers, x)[0], y)
    assert torch.equal(state[0], x[:, :, -1:]) and torch.equal(state[1], layers[0](x)[0][:, :, -1:])
    assert split_state(None, 2) == [None, None]
    x.zero_()
    assert state[0].any()  # a copy: the caller may reuse its buffers


def test_old_and_new_state_do_not_pile_up():
    """A row of layers replaces the states in the list that it was given, one by one."""
    layers, x = [Conv3d(3, 3, CHUNK) for _ in range(2)], clip(CHUNK)
    _, state = run_layers(layers, x)
    old = list(state)
    _, new = run_layers(layers, x + 1, state)
    assert new is state and not any(torch.equal(a, b) for a, b in zip(old, new))


def test_two_streams_do_not_meet():
    layers, a, b = [Conv3d(3, 3, CHUNK) for _ in range(2)], clip(8), clip(8)
    (ya, sa), (yb, sb) = run_layers(layers, a[:, :, :4]), run_layers(layers, b[:, :, :4])
    ya, yb = (torch.cat([y, run_layers(layers, x[:, :, 4:], s)[0]], 2) for x, y, s in ((a, ya, sa), (b, yb, sb)))
    together = run_layers(layers, torch.cat([a, b]))[0]
    assert torch.allclose(torch.cat([ya, yb]), together, atol=1e-6)


def test_isolated_clips():
    """A clip shorter than a chunk (an image, a tail in the released code) stands alone: zeros around it, no state read or written."""
    for temporal in TEMPORAL:
        conv, x = Conv3d(3, 3, CHUNK, temporal), clip(3)
        y, state = conv(x, ISOLATED)
        zeros = (0, 0, 0, 0, 2, 0) if temporal == "causal" else (0, 0, 0, 0, 1, 1)  # a causal network stays causal
        expected = F.conv3d(F.pad(x, zeros), conv.weight, conv.bias, padding=(0, 1, 1))
        assert torch.allclose(y, expected, atol=1e-6) and state is ISOLATED
    assert split_state(ISOLATED, 3) == [ISOLATED] * 3


@pytest.mark.parametrize("frames", [1, 3, 5, 6])
def test_no_frame_count_is_rounded_in_silence(frames):
    with pytest.raises(ValueError, match=f"multiple of 4 frames, got {frames}"):
        Conv3d(3, 3, CHUNK)(clip(frames))


def test_unknown_mode():
    with pytest.raises(ValueError, match="chunk_causal, causal, non_causal"):
        Conv3d(3, 3, CHUNK, "casual")


# ---------------------------------------------------------------------------------------------------- 4. training


def test_gradients_cross_the_border_forward_in_time_only():
    layers = [Conv3d(3, 3, CHUNK) for _ in range(3)]
    x = clip(12).requires_grad_()
    run_layers(layers, x)[0][:, :, 4:8].sum().backward()  # a loss on the middle chunk
    reach = x.grad.abs().amax(dim=(0, 1, 3, 4)) > 0
    assert reach.tolist() == [False, True, True, True] + [True] * 4 + [False] * 4  # three layers: three frames back


def test_gradients_of_a_stream_are_those_of_the_clip():
    """The state carries the graph. Who trains on endless streams detaches it between calls."""
    layers, x = [Conv3d(3, 3, CHUNK) for _ in range(3)], clip(12)
    weights = [w for conv in layers for w in conv.parameters()]
    target = torch.randn_like(x)
    whole = torch.autograd.grad((run_layers(layers, x)[0] * target).sum(), weights)
    pieces = torch.autograd.grad((stream(layers, x, [4, 4, 4]) * target).sum(), weights)
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(whole, pieces))


def test_the_gradient_in_bf16_is_that_of_fp32():
    """Also at two frames, where the CPU's own bf16 gradient was found to be garbage."""
    for frames in (2, 4, 8):
        conv, x = Conv3d(8, 8, frames), clip(frames, channels=8)
        exact, = torch.autograd.grad(conv(x)[0].square().sum(), conv.weight)
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)[0]
        half, = torch.autograd.grad(y.float().square().sum(), conv.weight)
        assert y.dtype == torch.bfloat16 and (half - exact).norm() / exact.norm() < 0.02


# ---------------------------------------------------------------------------------------------------- 5. space-time to depth


def test_order_of_unshuffled_channels():
    """out[((k t + dt) r + dh) r + dw, T, h, w] = in[k, T t + dt, h r + dh, w r + dw]: channel slowest, then time, row, column."""
    r, t = 2, 4
    x = torch.randn(1, 3, 2 * t, 3 * r, 2 * r)
    y = pixel_unshuffle(x, r, t)
    assert y.shape == (1, 3 * t * r * r, 2, 3, 2)
    for k in range(3):
        for dt in range(t):
            for dh in range(r):
                for dw in range(r):
                    assert torch.equal(y[:, ((k * t + dt) * r + dh) * r + dw], x[:, k, dt::t, dh::r, dw::r])
    assert torch.equal(pixel_shuffle(y, r, t), x)


def test_without_time_it_is_the_usual_pixel_unshuffle_of_every_frame():
    x = torch.randn(2, 3, 5, 6, 8)
    frames = torch.stack([F.pixel_unshuffle(f, 2) for f in x.unbind(2)], dim=2)
    assert torch.equal(pixel_unshuffle(x, 2), frames)


@pytest.mark.parametrize("name, layer", [
    ("unshuffle_r2t4", lambda x: pixel_unshuffle(x, 2, 4)), ("unshuffle_r2t1", lambda x: pixel_unshuffle(x, 2)),
    ("shuffle_r2t4", lambda x: pixel_shuffle(x, 2, 4))])
def test_reference_shuffles(name, layer):
    assert torch.equal(layer(UNITS[name]["input"]), UNITS[name]["out"])
