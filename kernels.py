"""The hot operations, each in one named function.

A transformer step is a few large matrix products with thin operations in between. The thin ones do almost no
arithmetic but read and write the whole activation: at 17,600 tokens of width 5120 one fp32 pass over the residual stream
moves 360 MB in and 360 MB out, and an unfused block makes 20 to 30 such passes. So what counts is how often memory is
touched, and each function here is one unit that a fused kernel can replace. These are the plain forms: short,
differentiable, right on every device. In fp32 none of them makes a needless copy or cast.

Precision, for all of them: inputs may be bf16, statistics and sums are fp32, the result is rounded once at the end.
Shapes: b batch, l tokens, d model width, n heads, c width of one head (d = n c).
"""
import torch
import torch.nn.functional as F


def attention(q, k, v, offset=None):
    """Softmax attention softmax(q k^T / sqrt(c) + offset) v without a mask: q [b l n c], k and v [b m n c] -> [b l n c].

    offset: [m] in q's type, added to the logits of each key: ln(n) makes one key count as n. (FlashAttention takes none, so
    on CUDA the library then picks its memory-efficient or cuDNN kernel; leave it None where it is not needed.)

    Hot because it costs 4 l m d FLOPs, quadratic in the tokens: 57 % of a 1.3B forward at 17,600 tokens, 85 % at 75,600.
    The library's kernel never writes the [l, m] score matrix to memory and sums in fp32. On the CPU its bf16
    backward is five times slower than the explicit form while the scores still fit the cache, so short sequences
    (a toy in training) take that one.
    """
    if q.device.type == "cpu" and k.shape[1] <= (256 if q.dtype == torch.bfloat16 else 16):
        return attention_explicit(q, k, v, offset)
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))  # b n l c
    mask = None if offset is None else offset.view(1, 1, 1, -1)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def attention_explicit(q, k, v, offset=None):
    """The formula itself, scores in memory: the twin that `attention` must equal."""
    q, k, v = (a.transpose(1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))  # b n l c
    scores = q @ k.transpose(-1, -2)
    return ((scores if offset is None else scores + offset).softmax(-1) @ v).transpose(1, 2)


def layer_norm_modulate(x, scale, shift, eps):
    """LN(x) * (1 + scale) + shift, LN without weights: x fp32 [b l d]; scale, shift fp32 [b g d], one for each of g equal runs of
    tokens (1: the whole clip; its latent frames; or every token), or [1 g d].

    Adaptive layer norm: the diffusion time decides scale and shift. Twice per block over the residual stream, and
    memory bound; `addcmul` keeps it to two passes and broadcasts the vectors without expanding them.
    """
    y = F.layer_norm(x, x.shape[-1:], eps=eps).unflatten(1, (scale.shape[1], -1))  # b g l/g d
    return torch.addcmul(shift[:, :, None], y, 1 + scale[:, :, None]).flatten(1, 2)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: x [... d], weight fp32 [d]; returns x's dtype.

    Statistics in fp32; the normalised value is rounded to x's dtype before the fp32 weight multiplies it, as the released
    models do. Written out because on the CPU autograd through these operations beats the backward of F.rms_norm.
    """
    return _rms_norm(x, weight, eps).to(x.dtype)


def _rms_norm(x, weight, eps):  # the same, not yet rounded at the end: fp32
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rms_norm_rope(x, weight, rope, heads, eps):
    """RMSNorm over the full width, split into heads, rotate: x [b l d] -> [b l n c]. For q and k, in every block.

    `rope` is complex64 [l, c/2], one unit number e^{i angle} per token and channel pair. Adjacent channels (2p, 2p+1) are
    the real and imaginary part of one complex number and the rotation is one complex product:
    (a, b) -> (a cos - b sin, a sin + b cos). Angles that grow with position make q . k depend on the distance only.
    The norm runs over all heads together, so it must come before the split. (Ten times faster on the CPU than slicing
    even and odd channels, whose strided access defeats vector units.)
    """
    pairs = _rms_norm(x, weight, eps).float().view(*x.shape[:2], heads, -1, 2)
    return torch.view_as_real(torch.view_as_complex(pairs) * rope[:, None]).flatten(3).to(x.dtype)


def gate_residual(x, y, gate):
    """x + y * gate in fp32: residual stream x fp32 [b l d], branch output y fp32 or bf16, gate fp32 [b g d] or [1 g d] for g equal
    runs of tokens, as above.

    The residual stream stays fp32 from the first block to the last: 40 blocks add small terms to large values, and bf16
    (8 bits) would lose them.
    """
    x, y = (a.unflatten(1, (gate.shape[1], -1)) for a in (x, y.to(x.dtype)))  # b g l/g d
    return torch.addcmul(x, y, gate[:, :, None]).flatten(1, 2)


def rms_norm_channels(x, weight, bias, eps=1e-5):
    """x / sqrt(mean_c(x^2) + eps) * weight + bias at every pixel: x [b c t h w] (any trailing axes), weight, bias [c].

    The autoencoder's norm. It looks at one position at a time, so neither frames nor tiles see each other through it:
    streaming and tiled decoding stay exact. Hot because it passes over full-resolution activations. fp32 inside, x's
    dtype out.
    """
    wide = x.float()
    weight, bias = (p.float().view(-1, *[1] * (x.ndim - 2)) for p in (weight, bias))
    return torch.addcmul(bias, wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps), weight).to(x.dtype)
