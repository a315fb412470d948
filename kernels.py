"""The hot operations, each in one named function, with the plain formula beside it.

A transformer step is a few large matrix products with thin operations in between. The
thin ones do almost no arithmetic but read and write the whole activation: at 17,600
tokens of width 5120 one fp32 pass over the residual stream moves 360 MB in and 360 MB
out, and an unfused block makes 20 to 30 such passes. So what counts is how often memory
is touched, and each function here is one unit that a fused kernel can replace.

An operation has up to three forms, and `use` says which of them run in this process:

    plain     NAME_plain: what one writes first, from the formula (`sample.py --slow`)
    library   NAME: differentiable and right on every device, fast on the CPU
    fused     a GPU kernel of that name (gpu/triton_kernels.py), which gpu/choose.py
              tries and installs at the start of a run; for calls without gradients

Tests compare them. Precision, for all: inputs may be bf16, statistics and sums are
fp32, the result is rounded once at the end. Shapes: b batch, l tokens, d model width, n
heads, c width of one head (d = n c).
"""
import warnings
from functools import lru_cache, wraps
from itertools import repeat

import einops
import torch
import torch.nn.functional as F


def operation(twin=None):
    """Decorator: a call runs the form that was chosen by `use`. twin: the plain
    form."""

    def decorate(library):
        name = library.__name__

        @wraps(library)
        def call(*inputs, **options):
            if _plain:
                return (twin or library)(*inputs, **options)
            fused = _fused.get(name)
            if fused and fusable(*inputs, *options.values()):
                return fused(*inputs, **options)
            return library(*inputs, **options)

        return call

    return decorate


# ------------------------------------------------------------------------ the transformer


def attention_plain(q, k, v):
    """The formula, with all scores in memory."""
    q, k, v = (a.transpose(1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))  # b n l c
    return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)


@operation(attention_plain)
def attention(q, k, v):
    """Softmax attention softmax(q k^T / sqrt(c)) v without a mask: q [b l n c], k and v
    [b m n c] -> [b l n c].

    Hot because it costs 4 l m d FLOPs, quadratic in the tokens: 57 % of a 1.3B forward
    at 17,600 tokens, 85 % at 75,600. The library's kernel never writes the [l, m]
    scores to memory and sums in fp32. On the CPU the explicit form is the faster one
    for a few keys, and for more of them in bf16, above all backwards (one core, 4 heads
    of 64, forward and backward: 0.11 s against 0.14 s at 400 keys, 0.16 against 0.17 at
    1024).
    """
    few = 16
    if q.dtype == torch.bfloat16:
        few = 1024 if recorded(q, k, v) else 256
    if q.device.type == "cpu" and k.shape[1] <= few:
        return attention_plain(q, k, v)
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))  # b n l c
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def linear_gelu_plain(layer, x):
    return F.gelu(layer(x), approximate="tanh")


@operation(linear_gelu_plain)
def linear_gelu(layer, x):
    """GELU(layer(x)) with the tanh formula, the first half of an MLP: x [... d] -> [...
    f].

    On its own the activation function reads and writes the widest tensor of a block,
    and its tanh is slow: on the CPU 9 % of an fp32 step and 12 % of a bf16 one. oneDNN
    applies it to the product's tiles while they are in registers.
    """
    if type(layer) is torch.nn.Linear and onednn(x, layer.weight, layer.bias):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "tanh")
    return linear_gelu_plain(layer, x)


def layer_norm_modulate_plain(x, scale, shift, eps, dtype=None):
    run = x.shape[1] // scale.shape[1]
    scale, shift = (a.repeat_interleave(run, 1) for a in (scale, shift))  # b l d
    return (F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift).to(dtype or x.dtype)


@operation(layer_norm_modulate_plain)
def layer_norm_modulate(x, scale, shift, eps, dtype=None):
    """LN(x) * (1 + scale) + shift in `dtype` (default: x's), LN without weights: x fp32
    [b l d]; scale, shift fp32 [b g d], one for each of g equal runs of tokens (1: the
    whole clip; its latent frames; or every token), or [1 g d].

    Adaptive layer norm: the diffusion time decides scale and shift. Twice per block
    over the residual stream, and memory bound: one pass where one pair of vectors
    serves all (they are then the norm's own weight and bias), else two.
    """
    width = x.shape[-1:]
    if scale.shape[:2] == (1, 1) and not recorded(x, scale, shift):
        weight, bias = 1 + scale.flatten(), shift.flatten()
        return F.layer_norm(x, width, weight, bias, eps).to(dtype or x.dtype)
    y = F.layer_norm(x, width, eps=eps).unflatten(1, (scale.shape[1], -1))  # b g l/g d
    y = torch.addcmul(shift[:, :, None], y, 1 + scale[:, :, None])  # frees the norm first
    return y.flatten(1, 2).to(dtype or x.dtype)


def gate_residual_plain(x, y, gate):
    return x + y * gate.repeat_interleave(x.shape[1] // gate.shape[1], 1)


@operation(gate_residual_plain)
def gate_residual(x, y, gate):
    """x + y * gate in fp32: residual stream x fp32 [b l d], branch output y fp32 or
    bf16, gate fp32 [b g d] or [1 g d] for g equal runs of tokens, as above.

    The residual stream stays fp32 from the first block to the last: 40 blocks add small
    terms to large values, and bf16 (8 bits) would lose them.
    """
    x, y = (a.unflatten(1, (gate.shape[1], -1)) for a in (x, y.to(x.dtype)))  # b g l/g d
    return torch.addcmul(x, y, gate[:, :, None]).flatten(1, 2)


@operation()
def residual_norm(x, y, gate, scale, shift, eps, dtype, affine=False):
    """(x + y * gate, and LN of that * (1 + scale) + shift in `dtype`): what lies
    between two parts of a block. gate None: 1.

    affine: scale and shift are the weight and bias [d] of the norm. Two results, so
    that a fused kernel normalises the sum while it is at hand; here one is made after
    the other.
    """
    x = x + y if gate is None else gate_residual(x, y, gate)
    if affine:
        return x, F.layer_norm(x, x.shape[-1:], scale, shift, eps).to(dtype)
    return x, layer_norm_modulate(x, scale, shift, eps, dtype)


def _rms_norm(x, weight, eps, in_place=False):  # not yet rounded at the end: fp32
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (wide * inverse).to(x.dtype).float()
    return y.mul_(weight) if in_place else y * weight


def rms_norm_plain(x, weight, eps):
    return _rms_norm(x, weight, eps).to(x.dtype)


@operation(rms_norm_plain)
def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: x [... d], weight fp32
    [d]; returns x's dtype.

    Statistics in fp32; the normalised value is rounded to x's dtype before the fp32
    weight multiplies it, as the released models do. Written out because on the CPU
    autograd through these operations beats the backward of F.rms_norm; without
    gradients the product is made in place, as a new tensor costs more there than the
    product, page by page.
    """
    return _rms_norm(x, weight, eps, in_place=not recorded(x, weight)).to(x.dtype)


def rms_norm_rope_plain(x, weight, rope, heads, eps):
    a, b = _rms_norm(x, weight, eps).unflatten(-1, (heads, -1, 2)).unbind(-1)  # b l n c/2
    cos, sin = rope.real[:, None], rope.imag[:, None]
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    return turned.flatten(3).to(x.dtype)


@operation(rms_norm_rope_plain)
def rms_norm_rope(x, weight, rope, heads, eps):
    """RMSNorm over the full width, split into heads, rotate: x [b l d] -> [b l n c].
    For q and k, in every block.

    `rope` is complex64 [l, c/2], one unit number e^{i angle} per token and channel
    pair. Adjacent channels (2p, 2p+1) are the real and imaginary part of one complex
    number and the rotation is one complex product: (a, b) -> (a cos - b sin, a sin + b
    cos). Angles that grow with position make q . k depend on the distance only. The
    norm runs over all heads together, so it must come before the split. (Complex
    numbers: ten times faster on the CPU than slicing even and odd channels, whose
    strided access defeats vector units.)
    """
    in_place = not recorded(x, weight)
    normed = _rms_norm(x, weight, eps, in_place).view(*x.shape[:2], heads, -1, 2)
    pairs, turns = torch.view_as_complex(normed), rope[:, None]
    turned = pairs.mul_(turns) if in_place else pairs * turns
    return torch.view_as_real(turned).flatten(3).to(x.dtype)


# ------------------------------------------------------------------------ the autoencoder


def rms_norm_channels_plain(x, weight, bias, eps=1e-5, silu=False, shortcut=None):
    wide = x.float()
    weight, bias = (p.float().view(-1, *[1] * (x.ndim - 2)) for p in (weight, bias))
    inverse = torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    y = torch.addcmul(bias, wide * inverse, weight).to(x.dtype)
    y = F.silu(y) if silu else y
    return y if shortcut is None else y + shortcut


@operation(rms_norm_channels_plain)
def rms_norm_channels(x, weight, bias, eps=1e-5, silu=False, shortcut=None):
    """x / sqrt(mean_c(x^2) + eps) * weight + bias at every pixel: x [b c t h w] (any
    trailing axes), weight, bias [c]. With `silu` SiLU of that; `shortcut`, like x, is
    added last. fp32 inside, x's dtype out.

    The autoencoder's norm. It looks at one position at a time, so neither frames nor
    tiles see each other through it: streaming and tiled decoding stay exact. Hot
    because it passes over full-resolution activations.

    Sampling goes through it in slices of `SLICE` positions times channels: what one
    operation leaves is still in the cache when the next one reads it, and no fp32 copy
    of a whole bf16 activation exists (half of the decode's peak memory, once).
    """
    size = SLICE.get(x.device.type, 2**24)
    if recorded(x, weight, bias, shortcut) or x.numel() <= size:
        return rms_norm_channels_plain(x, weight, bias, eps, silu, shortcut)
    positions = max(size // (x.shape[0] * x.shape[1]), 1)

    def slices(a):  # views: b c p
        return a.flatten(2).split(positions, 2)

    out = torch.empty_like(x, memory_format=layout(x))
    added = repeat(None) if shortcut is None else slices(shortcut)
    for y, part, more in zip(slices(out), slices(x), added):
        y.copy_(rms_norm_channels_plain(part, weight, bias, eps, silu, more))
    return out


SLICE = {"cpu": 2**17}  # numbers: the second-level cache; elsewhere 2**24, for a busy GPU


def layout(x):
    """The memory format of a video [b c t h w]: channels-last, where the channels of a
    pixel lie side by side, or the usual one."""
    last = torch.channels_last_3d
    if x.ndim == 5 and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        return last
    return torch.contiguous_format


def rearrange(x, pattern, **sizes):
    """einops.rearrange of a video, "... -> b channels t h w": keeps the memory format."""
    if layout(x) == torch.contiguous_format:
        return einops.rearrange(x, pattern, **sizes)
    before, after = pattern.split(" -> b ")
    channels, places = after.split(") " if after[0] == "(" else " ", 1)
    channels += ")" * (after[0] == "(")
    return einops.rearrange(x, f"{before} -> b {places} {channels}", **sizes).movedim(-1, 1)


def too_short_for_bf16(x):
    """On a CPU, with a kernel of three frames, oneDNN (torch 2.13) computes in bf16 from
    uninitialised memory: the output of one frame with few channels, and the weight gradient
    of exactly two. So short a clip costs nothing: it gets fp32."""
    short = x.device.type == "cpu" and x.ndim == 5 and x.shape[2] <= 2
    return short and (x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu"))


def convolution_plain(x, weight, bias, padding):
    if too_short_for_bf16(x):
        with torch.autocast("cpu", enabled=False):
            wide = (None if a is None else a.float() for a in (x, weight, bias))
            return convolution_plain(*wide, padding).to(torch.bfloat16)
    conv = F.conv3d if weight.ndim == 5 else F.conv2d
    return conv(x, weight, bias, padding=padding, groups=x.shape[1] // weight.shape[1])


@operation(convolution_plain)
def convolution(x, weight, bias, padding):
    """Convolution with stride 1: x [b c ...], weight [o c ...] with 2 or 3 trailing
    axes, `padding` for each of them; weight [o c/groups ...] is one in groups.

    Left to itself, torch multiplies an unfolded copy of the input (27 times its size)
    where batch x channels x frames x rows is at most 20,480, which is where a toy
    lives: oneDNN's direct convolution is 3 to 8 times faster there (fp32, one core). In
    the channels-last layout (`tensor.to(memory_format=torch.channels_last_3d)`, of x or
    weight) it reads and writes as it is, else both are rearranged before and after.
    """
    if onednn(x, weight, bias) and not too_short_for_bf16(x):
        one = (1,) * len(padding)
        groups = x.shape[1] // weight.shape[1]
        return torch.mkldnn_convolution(x, weight, bias, padding, one, one, groups)
    return convolution_plain(x, weight, bias, padding)


# ------------------------------------------------------------------------ which form runs

_plain = False
_fused = {}  # name of an operation -> the kernel installed for it


def use(plain=False, fused=None):
    """Choose the forms, from now on, in this process.

    plain: the plain forms everywhere. fused: {operation: kernel with its arguments},
    added to what is installed; None takes one out.
    """
    global _plain
    _plain = plain
    _fused.update(fused or {})


def plain():
    """Do the plain forms run?"""
    return _plain


def fusable(*inputs):
    """Can these go through a fused kernel? They run on a GPU and have no backward
    pass."""
    return inputs[0].is_cuda and not recorded(*inputs)


def recorded(*inputs):
    """Will gradients be asked for?"""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(a, torch.Tensor) and a.requires_grad for a in inputs)


def onednn(*inputs):
    """Do these tensors go straight to oneDNN, the CPU's library for networks? Without
    gradients (its own operations have none), in a type that the CPU has."""
    if inputs[0].device.type != "cpu" or torch.compiler.is_compiling() or recorded(*inputs):
        return False
    dtype = inputs[0].dtype
    if any(a is not None and a.dtype != dtype for a in inputs):
        return False
    has_type = dtype == torch.float32 or (dtype == torch.bfloat16 and bf16_units())
    mkldnn = torch.backends.mkldnn
    there = mkldnn.is_available() and mkldnn.enabled
    return has_type and there and not torch.is_autocast_enabled("cpu")


@lru_cache
def bf16_units():
    """Does this CPU multiply bf16 numbers (AVX-512 BF16, AMX)?"""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def matmul_type(device):
    """The type in which `device` multiplies matrices fastest: bf16, but for a CPU
    without `bf16_units`, where oneDNN multiplies bf16 numbers one by one (a product of
    2048x2048 took 190 times as long as in fp32 on a Zen 3)."""
    return torch.bfloat16 if device.type != "cpu" or bf16_units() else torch.float32


def autocast(device, bf16=True):
    """`torch.autocast` to bf16 where that is the faster type, else one that does
    nothing."""
    faster = bf16 and matmul_type(device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=faster)


# ------------------------------------------------------------------ a step as one graph


def record(function, inputs):
    """Record what `function(*inputs)` does on the GPU -> (a function that does it
    again, reading and writing the same memory; the output)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = function(*inputs)
    return graph.replay, output


class Replay:
    """A function of tensors of fixed shapes, run as one CUDA graph from its second call
    on.

    A 1.3B pass is some 700 kernels, each launched from Python, which takes some 10
    microseconds: 7 ms and more, beside 50 ms of work for 7,800 tokens, and far more
    than the work for few. A graph is launched as a whole: no Python, no gaps.
    (Estimates.)

    The first call runs the function as it is: libraries load their kernels, compiled
    code is made. The second records the graph, which executes nothing, and from then on
    inputs are copied to the addresses that the graph reads (a latent: microseconds).
    The kernels are the same, so the numbers are. Everything else that the function
    reads (weights, prompt, rotary table) must stay where it is while this object lives.

    Where the driver refuses, the function goes on being called as it is, and one
    warning says why.
    """

    def __init__(self, function):
        self.function, self.calls, self.replay = function, 0, None

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls == 2:
            self.record(inputs)
        if self.replay is None:
            return self.function(*inputs)
        for here, a in zip(self.inputs, inputs):
            here.copy_(a)
        self.replay()
        return self.output.clone()  # the next launch overwrites it

    def record(self, inputs):
        self.inputs = [a.clone() for a in inputs]
        try:
            self.replay, self.output = record(self.function, self.inputs)
        except RuntimeError as e:  # torch.AcceleratorError is one
            reason = str(e).splitlines()[0]
            warnings.warn(f"the step could not be recorded as a CUDA graph ({reason}): its "
                          "kernels are launched one by one, with the same result.")
