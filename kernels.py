"""The hot operations, each in one named function, with the plain formula beside it.

A transformer step is a few large matrix products with thin operations in between. The thin ones do almost no
arithmetic but read and write the whole activation: at 17,600 tokens of width 5120 one fp32 pass over the residual stream
moves 360 MB in and 360 MB out, and an unfused block makes 20 to 30 such passes. So what counts is how often memory is
touched, and each function here is one unit that a fused kernel can replace. On CUDA it is (gpu/triton_kernels.py); what stands here otherwise is
differentiable and right on every device, and takes from the CPU's library what that is fast at. Every function has a plain twin at the
end of the file: what one writes first, from the formula. `use(plain=True)` puts the twins in place, and tests compare the two.

Precision, for all of them: inputs may be bf16, statistics and sums are fp32, the result is rounded once at the end.
Shapes: b batch, l tokens, d model width, n heads, c width of one head (d = n c).
"""
from functools import lru_cache
from itertools import repeat

import torch
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------- which form runs

_plain = False  # set by `use`
_attention = None  # an installed kernel for attention, set by `use_attention`
_refused = None  # why no fused kernel runs on this machine's GPU; "": they run; None: not tried yet


def use(plain=False):
    """plain: the plain forms everywhere, from now on, in this process (`sample.py --slow`)."""
    global _plain
    _plain = plain


def use_attention(kernel):
    """From now on attention in 16 bits without offset and gradients is `kernel`(q, k, v), [b l n c] each; None: the library's (gpu/choose.py chooses)."""
    global _attention
    _attention = kernel


def plain():
    """Do the plain forms run?"""
    return _plain


def fused(*inputs):
    """Do these tensors go through a fused kernel (gpu/triton_kernels.py)? On CUDA, without gradients, where Triton is there and works."""
    return not _plain and inputs[0].is_cuda and not recorded(*inputs) and not refused()


def recorded(*inputs):
    """Will gradients be asked for?"""
    return torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in inputs)


def refused():
    """Why no fused kernel runs on this machine's GPU, found by trying one once; empty where they run."""
    global _refused
    if _refused is None:
        try:
            from gpu import triton_kernels
            triton_kernels.try_out()
            _refused = ""
        except Exception as e:  # no Triton, no C compiler for its launchers, a GPU it does not know: each has exceptions of its own
            _refused = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
    return _refused


def describe(device):
    """Which form runs on `device`, and why, for the first lines of a run."""
    if _plain:
        return "plain (switched off)"
    if device.type != "cuda":
        return f"torch and oneDNN (the fused ones are for CUDA, not {device.type})"
    return f"plain ({refused()})" if refused() else "fused (Triton)"


def onednn(*inputs):
    """Do these tensors go straight to oneDNN, the CPU's library for networks? Without gradients (its own operations have none), in a type it has."""
    dtype = inputs[0].dtype
    return (not _plain and inputs[0].device.type == "cpu" and not torch.compiler.is_compiling() and not recorded(*inputs) and all(a is None or a.dtype == dtype for a in inputs)
            and (dtype == torch.float32 or dtype == torch.bfloat16 and bf16_units()) and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


@lru_cache
def bf16_units():
    """Does this CPU multiply bf16 numbers (AVX-512 BF16, AMX)?"""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(device, bf16=True):
    """`torch.autocast` to bf16 where that is the faster type, else one that does nothing: on a CPU without `bf16_units` oneDNN multiplies bf16
    numbers one by one (a product of 2048x2048 took 190 times as long as in fp32 on a Zen 3)."""
    faster = matmul_type(device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and faster)


def matmul_type(device):
    """The type in which `device` multiplies matrices fastest: bf16, but for CPUs without
    `bf16_units`."""
    return torch.bfloat16 if device.type != "cpu" or bf16_units() else torch.float32


# ------------------------------------------------------------------------------------------------------ the operations


def attention(q, k, v, offset=None):
    """Softmax attention softmax(q k^T / sqrt(c) + offset) v without a mask: q [b l n c], k and v [b m n c] -> [b l n c].

    offset: [m] in q's type, added to the logits of each key: ln(n) makes one key count as n. (FlashAttention takes none, so
    on CUDA the library then picks its memory-efficient or cuDNN kernel; leave it None where it is not needed.)

    Hot because it costs 4 l m d FLOPs, quadratic in the tokens: 57 % of a 1.3B forward at 17,600 tokens, 85 % at 75,600.
    The library's kernel never writes the [l, m] score matrix to memory and sums in fp32. On the CPU its bf16
    backward is five times slower than the explicit form while the scores still fit the cache, so short sequences
    (a toy in training) take that one.
    """
    if _plain or q.device.type == "cpu" and k.shape[1] <= (256 if q.dtype == torch.bfloat16 else 16):
        return attention_plain(q, k, v, offset)
    if _attention is not None and offset is None and q.is_cuda and q.dtype != torch.float32 and not torch.is_grad_enabled():
        return _attention(q, k, v)
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))  # b n l c
    mask = None if offset is None else offset.view(1, 1, 1, -1)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def linear_gelu(layer, x):
    """GELU(layer(x)) with the tanh formula, the first half of an MLP: x [... d] -> [... f].

    On its own the activation function reads and writes the widest tensor of a block, and its tanh is slow: on the CPU 9 % of an fp32 step and
    12 % of a bf16 one. oneDNN applies it to the product's tiles while they are in registers.
    """
    if type(layer) is torch.nn.Linear and onednn(x, layer.weight, layer.bias):
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "tanh")
    return F.gelu(layer(x), approximate="tanh")


def layer_norm_modulate(x, scale, shift, eps, dtype=None):
    """LN(x) * (1 + scale) + shift in `dtype` (default: x's), LN without weights: x fp32 [b l d]; scale, shift fp32 [b g d], one for each of g
    equal runs of tokens (1: the whole clip; its latent frames; or every token), or [1 g d].

    Adaptive layer norm: the diffusion time decides scale and shift. Twice per block over the residual stream, and
    memory bound: one pass where one pair of vectors serves all (they are then the norm's own weight and bias), else two.
    """
    if _plain:
        return layer_norm_modulate_plain(x, scale, shift, eps, dtype)
    if fused(x, scale, shift):
        from gpu import triton_kernels
        return triton_kernels.layer_norm_modulate(x, scale, shift, eps, dtype)
    if scale.shape[:2] == (1, 1) and not recorded(x, scale, shift):
        return F.layer_norm(x, x.shape[-1:], 1 + scale.flatten(), shift.flatten(), eps).to(dtype or x.dtype)
    y = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (scale.shape[1], -1))  # b g l/g d
    y = torch.addcmul(shift[:, :, None], y, 1 + scale[:, :, None])  # the norm is freed before the result is rounded
    return y.flatten(1, 2).to(dtype or x.dtype)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: x [... d], weight fp32 [d]; returns x's dtype.

    Statistics in fp32; the normalised value is rounded to x's dtype before the fp32 weight multiplies it, as the released
    models do. Written out because on the CPU autograd through these operations beats the backward of F.rms_norm.
    """
    if fused(x, weight):
        from gpu import triton_kernels
        return triton_kernels.rms_norm(x, weight, eps)
    return _rms_norm(x, weight, eps).to(x.dtype)


def _rms_norm(x, weight, eps):  # the same, not yet rounded at the end: fp32
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if _plain or recorded(x, weight):
        return (wide * inverse).to(x.dtype) * weight
    return (wide * inverse).to(x.dtype).float().mul_(weight)  # in place: on the CPU a new tensor costs more than the product, page by page


def rms_norm_rope(x, weight, rope, heads, eps):
    """RMSNorm over the full width, split into heads, rotate: x [b l d] -> [b l n c]. For q and k, in every block.

    `rope` is complex64 [l, c/2], one unit number e^{i angle} per token and channel pair. Adjacent channels (2p, 2p+1) are
    the real and imaginary part of one complex number and the rotation is one complex product:
    (a, b) -> (a cos - b sin, a sin + b cos). Angles that grow with position make q . k depend on the distance only.
    The norm runs over all heads together, so it must come before the split. (Complex numbers: ten times faster on the CPU than
    slicing even and odd channels, whose strided access defeats vector units.)
    """
    if _plain:
        return rms_norm_rope_plain(x, weight, rope, heads, eps)
    if fused(x, weight):
        from gpu import triton_kernels
        return triton_kernels.rms_norm_rope(x, weight, rope, heads, eps)
    pairs = torch.view_as_complex(_rms_norm(x, weight, eps).float().view(*x.shape[:2], heads, -1, 2))
    turned = pairs * rope[:, None] if recorded(x, weight) else pairs.mul_(rope[:, None])
    return torch.view_as_real(turned).flatten(3).to(x.dtype)


def gate_residual(x, y, gate):
    """x + y * gate in fp32: residual stream x fp32 [b l d], branch output y fp32 or bf16, gate fp32 [b g d] or [1 g d] for g equal
    runs of tokens, as above.

    The residual stream stays fp32 from the first block to the last: 40 blocks add small terms to large values, and bf16
    (8 bits) would lose them.
    """
    if _plain:
        return gate_residual_plain(x, y, gate)
    if fused(x, y, gate):
        from gpu import triton_kernels
        return triton_kernels.gate_residual(x, y, gate)
    x, y = (a.unflatten(1, (gate.shape[1], -1)) for a in (x, y.to(x.dtype)))  # b g l/g d
    return torch.addcmul(x, y, gate[:, :, None]).flatten(1, 2)


def residual_norm(x, y, gate, scale, shift, eps, dtype, affine=False):
    """(x + y * gate, and LN of that * (1 + scale) + shift in `dtype`): what lies between two parts of a block. gate None: 1.

    affine: scale and shift are the weight and bias [d] of the norm. Two results, so that a fused kernel normalises the sum while it is at
    hand; here they are made one after the other.
    """
    if fused(x, y, gate, scale, shift):
        from gpu import triton_kernels
        return triton_kernels.residual_norm(x, y, gate, scale, shift, eps, dtype, affine)
    x = x + y if gate is None else gate_residual(x, y, gate)
    if affine:
        return x, F.layer_norm(x, x.shape[-1:], scale, shift, eps).to(dtype)
    return x, layer_norm_modulate(x, scale, shift, eps, dtype)


def rms_norm_channels(x, weight, bias, eps=1e-5, silu=False, shortcut=None):
    """x / sqrt(mean_c(x^2) + eps) * weight + bias at every pixel: x [b c t h w] (any trailing axes), weight, bias [c]. With `silu`
    SiLU of that; `shortcut`, like x, is added last.

    The autoencoder's norm. It looks at one position at a time, so neither frames nor tiles see each other through it:
    streaming and tiled decoding stay exact. Hot because it passes over full-resolution activations. fp32 inside, x's
    dtype out.

    Sampling goes through it in slices of `SLICE` positions times channels: what one operation leaves is still in the cache when the next one
    reads it, and no fp32 copy of a whole bf16 activation exists (half of the decode's peak memory, once).
    """
    if fused(x, weight, bias):
        from gpu import triton_kernels
        return triton_kernels.rms_norm_channels(x, weight, bias, eps, silu, shortcut)
    size = SLICE.get(x.device.type, 2**24)
    if _plain or recorded(x, weight, bias, shortcut) or x.numel() <= size:
        return rms_norm_channels_plain(x, weight, bias, eps, silu, shortcut)
    out = torch.empty_like(x, memory_format=layout(x))
    positions = max(size // (x.shape[0] * x.shape[1]), 1)
    slices = lambda a: a.flatten(2).split(positions, 2)  # views: b c p
    for y, part, more in zip(slices(out), slices(x), repeat(None) if shortcut is None else slices(shortcut)):
        y.copy_(rms_norm_channels_plain(part, weight, bias, eps, silu, more))
    return out


def layout(x):
    """The memory format of a video [b c t h w]: channels-last, where the channels of a pixel lie side by side, or the usual one."""
    last = x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return torch.channels_last_3d if last else torch.contiguous_format


def convolution(x, weight, bias, padding):
    """Convolution with stride 1: x [b c ...], weight [o c ...] with 2 or 3 trailing axes, `padding` for each of them.

    Left to itself, torch multiplies an unfolded copy of the input (27 times its size) where batch x channels x frames x rows is at most 20,480,
    which is where a toy lives: oneDNN's direct convolution is 3 to 8 times faster there (fp32, one core). In the channels-last layout
    (`tensor.to(memory_format=torch.channels_last_3d)`, of x or weight) it reads and writes as it is, else both are rearranged before and after.
    """
    if onednn(x, weight, bias):
        one = (1,) * len(padding)
        return torch.mkldnn_convolution(x, weight, bias, padding, one, one, 1)
    return (F.conv3d if weight.ndim == 5 else F.conv2d)(x, weight, bias, padding=padding)


SLICE = {"cpu": 2**17}  # elements, of `rms_norm_channels`: the second-level cache; elsewhere 2**24, to keep a GPU busy


# ------------------------------------------------------------------------------------------------------ the plain twins


def attention_plain(q, k, v, offset=None):
    """The formula, with all scores in memory. (On the CPU also the faster form for few keys.)"""
    q, k, v = (a.transpose(1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))  # b n l c
    scores = q @ k.transpose(-1, -2)
    return ((scores if offset is None else scores + offset).softmax(-1) @ v).transpose(1, 2)


def layer_norm_modulate_plain(x, scale, shift, eps, dtype=None):
    scale, shift = (a.repeat_interleave(x.shape[1] // a.shape[1], 1) for a in (scale, shift))  # b l d
    return (F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift).to(dtype or x.dtype)


def rms_norm_rope_plain(x, weight, rope, heads, eps):
    a, b = _rms_norm(x, weight, eps).unflatten(-1, (heads, -1, 2)).unbind(-1)  # b l n c/2
    cos, sin = rope.real[:, None], rope.imag[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3).to(x.dtype)


def gate_residual_plain(x, y, gate):
    return x + y * gate.repeat_interleave(x.shape[1] // gate.shape[1], 1)


def rms_norm_channels_plain(x, weight, bias, eps=1e-5, silu=False, shortcut=None):
    wide = x.float()
    weight, bias = (p.float().view(-1, *[1] * (x.ndim - 2)) for p in (weight, bias))
    y = torch.addcmul(bias, wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps), weight).to(x.dtype)
    y = F.silu(y) if silu else y
    return y if shortcut is None else y + shortcut
