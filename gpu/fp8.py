"""Eight-bit matrix products (opt-in: `sample.py --fp8`).

A Hopper GPU multiplies fp8 numbers twice as fast as bf16 ones. fp8 "e4m3" has 3 bits
after the leading one, a relative error of up to 1/16, and reaches from 0.002 to 448, so
numbers are first divided by a scale. One scale per row is the finest that the matrix
product takes out for free: row i of x has s_i (one per token: outlier tokens do not
spoil the others), row j of W has r_j (one per output channel, computed once),

    (x W^T)_ij = s_i r_j sum_k x8_ik W8_jk           products exact, sums fp32

The errors of single numbers are independent and average out in the sum: the result is
off by about 4 % of its norm per product, whatever the width, for random inputs
(tests/test_gpu_fp8.py). Quantised are the large products of the blocks; patches,
prompt, time and head stay as they are. Rounding x costs a pass over memory that would
eat the gain if it were made of separate operations, so it is a fused kernel
(gpu/triton_kernels.py). On other devices than Hopper and later GPUs the same numbers
are computed in fp32: slow, for measuring the quality. Speed on a GPU: not measured.
"""
import torch
from torch import nn

from kernels import operation

DTYPE = torch.float8_e4m3fn
LAYERS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
          "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")


@operation()
def quantize_rows(x):
    """x [m d] -> (x / scale in fp8 [m d], scale fp32 [m 1]) with the largest value of
    each row at the end of the range."""
    largest = torch.finfo(DTYPE).max
    scale = (x.abs().amax(1, keepdim=True).float() / largest).clamp(min=1e-12)
    return (x.float() / scale).clamp(-largest, largest).to(DTYPE), scale


def multiply(x, x_scale, w, w_scale, bias, dtype):
    """x8 [m d] and w8 [n d] with scales [m 1] and [n 1] -> x W^T + bias [m n] in
    `dtype`."""
    if hardware(x.device):
        out = torch._scaled_mm(x, w.t(), x_scale, w_scale.t(), bias.bfloat16(),
                               out_dtype=torch.bfloat16, use_fast_accum=True)
        return out.to(dtype)
    x, w = x.float() * x_scale, w.float() * w_scale
    return torch.addmm(bias.float(), x, w.t()).to(dtype)


def hardware(device):
    """Does this device multiply fp8 with a scale per row? (Hopper and later.)"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class Linear(nn.Module):
    """nn.Linear with weights in fp8, a scale per output channel. Forward only; in bf16
    or fp32 as x is."""

    def __init__(self, linear):
        super().__init__()
        w, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", w)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x):  # [... d] -> [... n]
        rows, scale = quantize_rows(x.flatten(0, -2))
        y = multiply(rows, scale, self.weight, self.scale, self.bias, x.dtype)
        return y.view(*x.shape[:-1], -1)


def convert(net):
    """Put the large products of a transformer's blocks into fp8, in place -> net.
    Widths must be multiples of 16, as they are for every Wan."""
    for block in net.blocks:
        for name in LAYERS:
            linear = block.get_submodule(name)
            if not isinstance(linear, Linear):  # else converted before
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, Linear(linear))
    return net
