"""Choices at the start of a run, with measurements made up: what is right and fastest is taken, and said. (On a GPU: test_on_gpu.py.)"""
import re
import sys

import pytest
import torch

import kernels
from gpu import choose


def test_attention_is_chosen_by_time_among_the_right_ones(monkeypatch):
    """A backend that is wrong, or has no kernel for this GPU, is not taken however fast."""
    def missing(q, k, v):
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    clock = iter([3.0, 2.0])
    monkeypatch.setattr(choose, "seconds", lambda task: next(clock))
    q, k, v = torch.randn(3, 1, 80, 2, 16)
    times = choose.try_attention(dict(slow=kernels.attention_plain, wrong=lambda q, k, v: q, right=kernels.attention, none=missing), q, k, v)
    assert times == {"slow": 3.0, "right": 2.0}


def test_the_chosen_backend_is_the_one_that_is_switched_on(monkeypatch):
    """Switches are torch's own, so this much runs without a GPU; None puts them back."""
    switched = lambda: (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled(),
                        torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
    monkeypatch.setattr(choose, "seconds", lambda task: 1.0 + torch.backends.cuda.flash_sdp_enabled())
    name, line = choose.choose_attention(torch.device("cpu"), 300, 2, 16, torch.float32)
    assert name in ("cudnn", "efficient") and re.match(rf"attention: {name}, 1000.00 ms for 300 tokens", line)
    assert switched() == (name == "cudnn", False, True, True)
    choose.set_attention(None)
    assert switched() == (True, True, True, True)


@pytest.mark.parametrize("errors, times, dtype, layout, says", [
    ((0.003, 0.003), (1.0, 2.0), torch.bfloat16, torch.channels_last_3d, "bf16, channels last, .* relative error 0.003$"),
    ((0.003, 0.003), (9.0, 2.0), torch.bfloat16, torch.contiguous_format, "bf16, channels first"),
    ((0.9, 0.003), (1.0, 2.0), torch.bfloat16, torch.contiguous_format, "bf16, channels first, .*; channels last is computed wrongly"),
    ((0.9, float("nan")), (1.0, 2.0), torch.float32, torch.channels_last_3d, "fp32, because this build computes them wrongly in bf16 .relative errors 0.9 and nan"),
])
def test_the_convolution_is_checked_before_it_is_used(errors, times, dtype, layout, says, monkeypatch):
    """Several builds compute bf16 convolutions wrongly or slowly; the autoencoder then runs in another layout, or in fp32."""
    trials = iter(zip(errors, times))
    monkeypatch.setattr(choose, "try_convolution", lambda *_: next(trials))
    found = choose.choose_convolution(torch.device("cpu"), torch.bfloat16)
    assert (found.dtype, found.layout) == (dtype, layout) and re.search(says, found.line)


def test_the_check_of_a_convolution_can_fail(monkeypatch):
    x, weight = torch.randn(1, 8, 4, 6, 6), torch.randn(8, 8, 3, 3, 3)
    monkeypatch.setattr(choose, "seconds", lambda task: 1.0)
    check = lambda: choose.try_convolution(x, weight, torch.bfloat16, torch.channels_last_3d)[0]
    assert 1e-4 < check() < 0.01
    right = torch.nn.functional.conv3d
    monkeypatch.setattr(choose.F, "conv3d", lambda x, w, padding: right(x, w, padding=padding) * (1 if x.dtype == torch.float32 else 1.05))
    assert check() > 0.02


def test_kernels_say_why_they_are_plain(monkeypatch):
    """No GPU; no Triton on a machine that has one; switched off."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "for CUDA, not cpu" in choose.choose_kernels(cpu)
    monkeypatch.delattr("gpu.triton_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "gpu.triton_kernels", None)  # importing it now fails, as without Triton
    assert "plain (ModuleNotFoundError: " in choose.choose_kernels(cuda)
    assert choose.choose_kernels(cuda, plain=True) == "thin operations: plain (switched off)"
    assert kernels.plain()
    kernels.use()
