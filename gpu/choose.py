"""What this GPU does best, found by trying it at the start of a run, in about a second;
each choice is told in one line.

* Thin operations: the fused kernels of gpu/triton_kernels.py, where Triton is there and
  one of them computes rightly. They are installed into kernels.py, which knows no GPU.
* Attention: PyTorch holds several kernels for softmax(q k^T) v: cuDNN's, FlashAttention
  2, a memory-efficient one; FlashAttention 3 can be installed. Which is fastest depends
  on the GPU, the library versions and the shape, and attention is 57 to 85 % of the
  work. So each is timed on the shape that is coming, checked against the formula in
  fp32, and the fastest right one is taken.
* Convolution: the decoder is nothing but 3x3x3 convolutions. Several builds (torch 2.9,
  cuDNN 9.8 to 9.14) compute them in bf16 wrongly or many times too slowly. One is tried
  in both memory layouts, against fp32; where none is right the autoencoder runs in
  fp32.
* Types: GPUs before Ampere (2020) have no bf16; matrix products then stay fp32.

The libraries differ in rounding, not in what they compute, so no choice changes a
result by more than that. On the CPU there is nothing to choose. No GPU was at hand:
written from the libraries' documentation, not run.
"""
import contextlib
import statistics
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F

import kernels


def seconds(task):
    """Median GPU time of five calls, after one that warms up."""
    times = []
    for _ in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        task()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[1:])


def relative_error(a, exact):
    return ((a.float() - exact.float()).norm() / exact.float().norm()).item()


def first_line(error):
    return (str(error).splitlines() or [""])[0]


# ------------------------------------------------------------------- types and compilers


def without_bf16(device):
    """Why bf16 is not used on this device; None where it can be."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no bf16 (it is older than Ampere)"
    if device.type == "cpu" and not kernels.bf16_units():
        return "this CPU has no units for bf16 (AVX-512 or AMX)"
    return None


def without_compiler(device):
    """Why torch.compile does not work on this machine, found by compiling one addition;
    None where it does."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as e:  # no C++ compiler, no Triton, an unknown Python: each its own type
        return f"torch.compile fails here ({type(e).__name__}: {first_line(e)})"
    return None


def compile_blocks(net, backend="inductor"):
    """Compile each block of a transformer by itself: all are the same code, so one
    compilation serves all, in seconds instead of minutes.

    `fullgraph`: a part that cannot be compiled is an error instead of a slow detour.
    Shapes are fixed: a new size compiles anew, a new step or prompt of the same length
    does not.
    """
    for block in net.blocks:
        if block._compiled_call_impl is None:
            block.compile(fullgraph=True, dynamic=False, backend=backend)


# ------------------------------------------------------------------------ thin operations


def choose_kernels(device, plain=False):
    """Install the form in which kernels.py runs on `device` -> a line that says
    which."""
    kernels.use(plain=plain)
    if plain:
        return "thin operations: plain (switched off)"
    if device.type != "cuda":
        other = f"the fused ones are for CUDA, not {device.type}"
        return f"thin operations: torch and oneDNN ({other})"
    try:
        from gpu import triton_kernels  # its package may be missing
        triton_kernels.try_out()
    except Exception as e:  # no Triton, no C compiler for its launchers, an unknown GPU
        return f"thin operations: plain ({type(e).__name__}: {first_line(e)})"
    kernels.use(fused=triton_kernels.KERNELS)
    return "thin operations: fused (Triton)"


# ------------------------------------------------------------------------------ attention

# of scaled_dot_product_attention; "efficient" is always there to fall back on
BACKENDS = ("cudnn", "flash", "efficient")


def set_attention(name):
    """Let attention run through one backend: "cudnn", "flash", "efficient", "flash3";
    None: the library chooses. A call that a backend cannot serve falls back on
    "efficient"."""
    torch.backends.cuda.enable_cudnn_sdp(name in ("cudnn", None))
    torch.backends.cuda.enable_flash_sdp(name in ("flash", None))
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)
    kernels.use(fused={"attention": flash3() if name == "flash3" else None})


def flash3():
    """FlashAttention 3 as a function of q, k, v [b l n c]; None where its package is
    not installed."""
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        return None

    def attention(q, k, v):
        if q.dtype == torch.float32:  # it has 16 bits only
            return kernels.attention.__wrapped__(q, k, v)
        out = flash_attn_func(q, k, v)
        return out[0] if isinstance(out, tuple) else out  # first versions: logsumexp too

    return attention


def try_attention(candidates, q, k, v):
    """{name: function of q, k, v [b l n c]} -> {name: seconds} of those that are right."""
    exact, times = kernels.attention_plain(q[:, :64].float(), k.float(), v.float()), {}
    for name, run in candidates.items():
        with contextlib.suppress(RuntimeError):  # no kernel for this GPU, type or shape
            if relative_error(run(q, k, v)[:, :64], exact) < 0.02:
                times[name] = seconds(lambda: run(q, k, v))
    return times


@torch.no_grad()
def choose_attention(device, tokens, heads, width=128, dtype=torch.bfloat16):
    """Time the backends on [1, tokens, heads, width] (at most 16,384 tokens), set the
    fastest -> (its name, a line that says so)."""
    q, k, v = torch.randn(3, 1, min(tokens, 16384), heads, width, device=device).to(dtype)

    def through(name):
        def run(q, k, v):
            set_attention(name)
            if name in ("cudnn", "flash"):  # no fallback, whose time would be taken for its
                torch.backends.cuda.enable_mem_efficient_sdp(False)
                torch.backends.cuda.enable_math_sdp(False)
            return kernels.attention(q, k, v)
        return run

    names = [*BACKENDS, "flash3"] if flash3() else BACKENDS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reasons why a backend has no kernel
        times = try_attention({name: through(name) for name in names}, q, k, v)
    if not times:
        set_attention(None)
        return None, "attention: no backend could be checked, so the library chooses"
    best, *others = sorted(times, key=times.get)
    set_attention(best)
    line = f"attention: {best}, {times[best] * 1e3:.2f} ms for {q.shape[1]:,d} tokens"
    if others:
        line += f" ({', '.join(f'{name} {times[name] * 1e3:.2f}' for name in others)})"
    return best, line


# ---------------------------------------------------------------------------- convolution


class Convolution(NamedTuple):
    """How the autoencoder is to run."""

    dtype: torch.dtype
    layout: torch.memory_format
    line: str


LAYOUTS = {torch.channels_last_3d: "channels last", torch.contiguous_format: "channels first"}


def try_convolution(x, weight, dtype, layout):
    """A 3x3x3 convolution of fp32 x [b c t h w] in a type and layout -> (relative error
    against fp32, seconds)."""
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        exact = F.conv3d(x, weight, padding=1)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    x = x.to(dtype).to(memory_format=layout)
    weight = weight.to(dtype).to(memory_format=layout)
    error = relative_error(F.conv3d(x, weight, padding=1), exact)
    return error, seconds(lambda: F.conv3d(x, weight, padding=1))


@torch.no_grad()
def choose_convolution(device, dtype):
    """The fastest right way to convolve in `dtype`, or in fp32 where none is right in
    bf16, -> Convolution.

    Tried at 128 channels of 8x96x160 (most of the decoder's work is at such a width).
    In bf16 a right result is off by 0.3 %.
    """
    last = torch.channels_last_3d
    if dtype == torch.float32:
        return Convolution(dtype, last, "convolutions: fp32, channels last")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 128, 8, 96, 160, generator=generator).to(device)
    weight = torch.randn(128, 128, 3, 3, 3, generator=generator).to(device)
    errors, times = {}, {}
    for layout in LAYOUTS:
        errors[layout], times[layout] = try_convolution(x, weight, dtype, layout)
    right = [layout for layout in LAYOUTS if errors[layout] < 0.02]
    if not right:
        found = " and ".join(f"{error:.2g}" for error in errors.values())
        build = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
        line = ("convolutions: fp32, because this build computes them wrongly in bf16 "
                f"(relative errors {found}; {build})")
        return Convolution(torch.float32, last, line)
    best = min(right, key=times.get)
    speed = 2 * x.numel() * weight[:, 0].numel() / times[best] / 1e12
    line = (f"convolutions: bf16, {LAYOUTS[best]}, {speed:.0f} TFLOP/s, "
            f"relative error {errors[best]:.2g}")
    wrong = LAYOUTS.keys() - set(right)
    if wrong:
        line += f"; {LAYOUTS[wrong.pop()]} is computed wrongly"
    return Convolution(dtype, best, line)
