"""Fused GPU kernels: the thin operations of kernels.py, each in one pass over memory.

A GPU multiplies matrices at 800 TFLOP/s but reads memory at 3 to 5 TB/s: in the time
that one number of two bytes takes to arrive it could do hundreds of multiplications.
Between its large matrix products a transformer block only normalises, scales, rotates
and adds, so these cost exactly as much as the memory they touch. PyTorch runs each
operation as a kernel of its own, which reads its input from memory and writes its
result back for the next one to read again. A fused kernel reads once, keeps a row (one
token, all channels) in the registers of one multiprocessor, and writes once. Bytes per
token and channel, residual stream in fp32, matrix products in bf16, counted from the
operations of kernels.py:

                                           without   fused
    LayerNorm, modulate, round to bf16          14       6   read x 4, write 2
    x + y * gate                                18      10   read x 4, y 2, write x 4
    the same, and the next LayerNorm            32      12   normalised in registers
    RMSNorm of q (or k), rotate, round          60       4   read 2, write 2
    autoencoder: RMSNorm (+ shortcut)           40       4   (46 and 6)
    fp8: largest value of a row, scale, round   33       3   read 2, write 1

A 14B block over 17,600 tokens moves 24 GB in thin operations without them and 6 GB with
them: at 3 TB/s 8 ms and 2 ms, beside 23 ms of matrix products and attention. (Counts,
not measured.)

Forward only; arithmetic is fp32 and is rounded where the plain forms round. On the CPU
the kernels run in Triton's interpreter (tests/test_gpu_triton_kernels.py).
"""
import triton
import triton.language as tl

import torch

# ------------------------------------------------------------------- the residual stream


@triton.jit
def residual_norm_kernel(x, y, gate, scale, shift, total, normed, d, tokens, run,
                         gate_b, gate_g, scale_b, scale_g, eps,
                         ADD: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
                         AFFINE: tl.constexpr, BLOCK: tl.constexpr):
    """One program per token: total = x + y * gate; normed = LN(total) * (1 + scale) +
    shift.

    AFFINE: scale and shift are the weight and bias of the norm. `run`: consecutive
    tokens that share a row of gate, scale and shift.
    """
    row = tl.program_id(0).to(tl.int64)  # times d it may pass 2^31
    b, g = row // tokens, row % tokens // run
    column = tl.arange(0, BLOCK)
    inside = column < d
    here = row * d + column
    value = tl.load(x + here, inside, 0.0).to(tl.float32)
    if ADD:
        branch = tl.load(y + here, inside, 0.0).to(tl.float32)
        if GATED:
            branch *= tl.load(gate + b * gate_b + g * gate_g + column, inside, 0.0)
        value += branch
        tl.store(total + here, value, inside)
    if NORM:
        mean = tl.sum(value, 0) / d
        centred = tl.where(inside, value - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / d + eps)
        vector = b * scale_b + g * scale_g + column
        s = tl.load(scale + vector, inside, 0.0)
        t = tl.load(shift + vector, inside, 0.0)
        if not AFFINE:
            s += 1.0
        tl.store(normed + here, (centred * rstd * s + t).to(normed.dtype.element_ty), inside)


def layer_norm_modulate(x, scale, shift, eps, dtype=None):
    """LN(x) * (1 + scale) + shift -> [b l d] in `dtype` (default: x's); arguments as
    kernels.layer_norm_modulate."""
    return residual_norm(x, None, None, scale, shift, eps, dtype)[1]


def gate_residual(x, y, gate):
    """x + y * gate -> [b l d] in x's type; arguments as kernels.gate_residual. gate
    None: x + y."""
    return residual_norm(x, y, gate, None, None)[0]


def residual_norm(x, y, gate, scale, shift, eps=0.0, dtype=None, affine=False):
    """(x + y * gate, LN of that * (1 + scale) + shift), the second in `dtype`.

    x fp32 [b l d]; y [b l d] of any type, or None; gate [b g d] or [1 g d], or None
    (1). scale and shift like gate; `affine`: [d], the weight and bias of the norm;
    None: no norm. What is not asked for is x itself, or None.
    """
    b, l, d = x.shape
    x, y = x.contiguous(), None if y is None else y.contiguous()
    total = x if y is None else torch.empty_like(x)
    normed = None if scale is None else torch.empty_like(x, dtype=dtype or x.dtype)
    if affine:
        scale, shift = scale.expand(1, 1, d), shift.expand(1, 1, d)
    groups = 1
    for v in (gate, scale):
        groups = groups if v is None else max(groups, v.shape[1])
    if shift is not None and shift.stride() != scale.stride():
        scale, shift = scale.contiguous(), shift.contiguous()
    # a kernel has no optional pointers: those it will not touch get x
    pointers = [x if v is None else v for v in (x, y, gate, scale, shift, total, normed)]
    strides = *group_strides(gate, groups), *group_strides(scale, groups)
    parts = dict(ADD=y is not None, GATED=gate is not None, NORM=normed is not None)
    residual_norm_kernel[(b * l,)](
        *pointers, d, l, l // groups, *strides, eps, **parts, AFFINE=affine, **launch(d))
    return total, normed


def group_strides(v, groups):
    """How far apart the rows of v [b g d] are for samples and for groups; 0 where one
    serves all. They are often views into [b g 6 d]."""
    if v is None:
        return 0, 0
    if v.stride(2) != 1 or v.shape[1] not in (1, groups):
        raise ValueError(f"vectors of shape {list(v.shape)} with strides {v.stride()} do not fit "
                         f"{groups} groups of tokens.")
    return v.stride(0) * (v.shape[0] > 1), v.stride(1) * (v.shape[1] > 1)


def launch(d):
    """Block size and warps for a row of d numbers: the next power of two, at most 32
    numbers in each thread."""
    block = triton.next_power_of_2(d)
    return dict(BLOCK=block, num_warps=min(max(block // 1024, 1), 16))


# ---------------------------------------------------------------------- queries and keys


@triton.jit
def rms_norm_rope_kernel(x, weight, rope, out, d, stride, tokens, c, eps,
                         ROTATE: tl.constexpr, BLOCK: tl.constexpr):
    """One program per token: normalise all heads together, then turn each channel pair
    (2p, 2p + 1) of each head of width c."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d
    value = tl.load(x + row * stride + column, inside, 0.0)
    wide = value.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / d + eps)
    # rounded in between, as the plain form
    wide = (wide * rstd).to(value.dtype).to(tl.float32) * tl.load(weight + column, inside, 0.0)
    if ROTATE:
        # cos, sin, cos, sin, ...: the same for every head. Whole rows are loaded, so that
        # memory is read in order.
        turn = tl.load(rope + row % tokens * c + column % c, inside, 0.0)
        real, imaginary = tl.split(tl.reshape(wide, (BLOCK // 2, 2)))
        cos, sin = tl.split(tl.reshape(turn, (BLOCK // 2, 2)))
        wide = tl.interleave(real * cos - imaginary * sin, real * sin + imaginary * cos)
    tl.store(out + row * d + column, wide.to(value.dtype), inside)


def rms_norm(x, weight, eps):
    """Arguments as kernels.rms_norm."""
    return rms_norm_rope(x, weight, None, 1, eps).view(x.shape)


def rms_norm_rope(x, weight, rope, heads, eps):
    """Arguments as kernels.rms_norm_rope; x may be a slice of a wider [b l 3d]. rope
    None: no rotation."""
    d, tokens = x.shape[-1], x.shape[-2]
    rows = x.flatten(0, -2)  # a view where it can be
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    rotate = rope is not None
    turn = torch.view_as_real(rope) if rotate else weight
    rms_norm_rope_kernel[(len(rows),)](
        rows, weight, turn, out, d, rows.stride(0), tokens, d // heads, eps, ROTATE=rotate,
        **launch(d))
    return out.view(*x.shape[:-1], heads, -1)


# ----------------------------------------------------------------------- the autoencoder


@triton.jit
def rms_norm_channels_kernel(x, weight, bias, shortcut, out, positions, channels, sample,
                             along_p, along_c, eps, SILU: tl.constexpr, ADD: tl.constexpr,
                             P: tl.constexpr, C: tl.constexpr):
    """One program per P positions of a sample, all channels: out = RMSNorm(x) * weight
    + bias (then SiLU) (+ shortcut)."""
    p = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)[:, None]
    c = tl.arange(0, C)[None]
    here = tl.program_id(1).to(tl.int64) * sample + p * along_p + c * along_c
    inside = (p < positions) & (c < channels)
    value = tl.load(x + here, inside, 0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(value * value, 1) / channels + eps)
    w = tl.load(weight + c, c < channels, 0.0).to(tl.float32)
    b = tl.load(bias + c, c < channels, 0.0).to(tl.float32)
    value = value * rstd[:, None] * w + b
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    if ADD:
        value = value.to(out.dtype.element_ty).to(tl.float32)
        value += tl.load(shortcut + here, inside, 0.0).to(tl.float32)
    tl.store(out + here, value.to(out.dtype.element_ty), inside)


def rms_norm_channels(x, weight, bias, eps=1e-5, silu=False, shortcut=None):
    """Arguments as kernels.rms_norm_channels: x [b c ...]; `silu` follows the norm, and
    the `shortcut` of a residual block is added last.

    In the channels-last layout, which convolutions on tensor cores want anyway, the
    channels of a position lie side by side; in the other one neighbouring positions do.
    The same kernel reads both in order: a tile of P positions times all channels.
    """
    if not (x.is_contiguous() or along_channels(x)):
        x = x.contiguous()
    out = torch.empty_like(x)  # keeps the layout
    if shortcut is not None and shortcut.stride() != x.stride():
        shortcut = torch.empty_like(x).copy_(shortcut)
    b, channels = x.shape[:2]
    positions, last = x[0, 0].numel(), along_channels(x)
    along_p, along_c = (channels, 1) if last else (1, positions)
    C = triton.next_power_of_2(channels)
    P = max(8192 // C, 1 if last else 16)
    rms_norm_channels_kernel[(triton.cdiv(positions, P), b)](
        x, weight, bias, x if shortcut is None else shortcut, out, positions, channels,
        x.stride(0), along_p, along_c, eps, SILU=silu, ADD=shortcut is not None, P=P, C=C,
        num_warps=8)
    return out


def along_channels(x):
    """Is x [b c ...] stored with its channels innermost (channels-last)?"""
    return x.movedim(1, -1).is_contiguous()


# ---------------------------------------------------------------------------- eight bits


@triton.jit
def quantize_rows_kernel(x, out, scales, d, largest, BLOCK: tl.constexpr):
    """One program per row: scale = max |x| / largest, out = x / scale in fp8."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d
    value = tl.load(x + row * d + column, inside, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0) / largest, 1e-12)
    tl.store(scales + row, scale)
    value = tl.clamp(value / scale, -largest, largest)
    tl.store(out + row * d + column, value.to(out.dtype.element_ty), inside)


def quantize_rows(x):
    """x [m d] -> (x / scale in fp8 [m d], scale fp32 [m 1]); as fp8.quantize_rows."""
    x, d, dtype = x.contiguous(), x.shape[1], torch.float8_e4m3fn
    out = torch.empty_like(x, dtype=dtype)
    scales = torch.empty(len(x), 1, device=x.device)
    quantize_rows_kernel[(len(x),)](x, out, scales, d, torch.finfo(dtype).max, **launch(d))
    return out, scales


# ----------------------------------------------------------------------------- installed

#: operation -> its kernel, as gpu/choose.py installs them into kernels.py
KERNELS = {kernel.__name__: kernel for kernel in (
    layer_norm_modulate, gate_residual, residual_norm, rms_norm, rms_norm_rope,
    rms_norm_channels, quantize_rows)}


def try_out():
    """Run one kernel on the GPU. Raises what stands in its way, or RuntimeError where
    its result is wrong."""
    x, scale = torch.randn(1, 3, 96, device="cuda"), torch.randn(1, 1, 96, device="cuda")
    expected = torch.nn.functional.layer_norm(x, (96,)) * (1 + scale) + scale
    if not torch.allclose(layer_norm_modulate(x, scale, scale, 1e-5), expected, atol=1e-4):
        raise RuntimeError("a fused kernel computes wrongly on this GPU")
