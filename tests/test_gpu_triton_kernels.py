"""The fused kernels equal their plain twins: on the GPU where there is one, else in Triton's interpreter on the CPU.

    python -m pytest -m peer tests/test_gpu_triton_kernels.py        without a GPU; needs the triton package
    python -m pytest -m gpu tests/test_gpu_triton_kernels.py

Sizes are odd on purpose: widths that are no power of two, token counts that fill no block. The interpreter takes some 5 ms for each token.
"""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

ON_GPU = torch.cuda.is_available()  # if not, conftest.py has asked for the interpreter
pytest.importorskip("triton")

import dit
import kernels
from conftest import ROOT
from gpu import triton_kernels as fused

pytestmark = pytest.mark.gpu if ON_GPU else pytest.mark.peer
DEVICE = "cuda" if ON_GPU else "cpu"
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def round_as_hardware_does(monkeypatch):
    """To the nearest. The interpreter cuts bf16 off, and loses the carry of an fp8 mantissa (triton 3.9): torch rounds in its place."""
    if ON_GPU:
        return
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(data, source, target, mode):
        kind = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}.get(target.name)
        if source.name != "fp32" or kind is None:
            return theirs(data, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(kind)
        return rounded.view(torch.int16 if kind == torch.bfloat16 else torch.int8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture(autouse=True)
def plain_twins():
    kernels.use(plain=True)  # else the twins would be the kernels themselves
    yield
    kernels.use()


def rand(*shape, dtype=FP32, offset=0.0):
    return (torch.randn(*shape, device=DEVICE) + offset).to(dtype)


def modulation(b, groups, d, n=3):
    """Vectors as a block gets them: views into [b groups n d]."""
    return (rand(b, groups, n, d) * 0.5).unbind(2)


def same(ours, plain, exact=None):
    """fp32: within 1e-5 of the plain result. bf16: no further from the `exact` result than rounding takes the plain one."""
    assert ours.shape == plain.shape and ours.dtype == plain.dtype
    if ours.dtype == FP32:
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    else:
        error = lambda a: (a.float() - exact.float()).norm()
        assert error(ours) <= 1.02 * error(plain) and (ours.float() - exact.float()).abs().max() <= 2**-7 * exact.abs().max()


SHAPES = [(2, 6, 1, 96), (1, 6, 3, 1536), (2, 4, 4, 5120), (1, 3, 1, 1)]  # b, tokens, groups that share their modulation, width


@pytest.mark.parametrize("b, l, groups, d", SHAPES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_layer_norm_modulate(b, l, groups, d, dtype):
    """One modulation for the clip, one per latent frame, one per token; mean far from zero."""
    x, (scale, shift, _) = rand(b, l, d, offset=3.0), modulation(b, groups, d)
    plain = kernels.layer_norm_modulate(x, scale, shift, 1e-6)
    same(fused.layer_norm_modulate(x, scale, shift, 1e-6, dtype), plain.to(dtype), plain)
    same(fused.layer_norm_modulate(x, scale[:1], shift[:1], 1e-6, dtype), kernels.layer_norm_modulate(x, scale[:1], shift[:1], 1e-6).to(dtype),
         kernels.layer_norm_modulate(x, scale[:1], shift[:1], 1e-6))  # one for the batch, as `times` makes it


@pytest.mark.parametrize("b, l, groups, d", SHAPES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gate_and_residual(b, l, groups, d, dtype):
    """The residual stream stays fp32 whatever the branch is, and x is not written to."""
    x, y, (gate, *_) = rand(b, l, d), rand(b, l, d, dtype=dtype), modulation(b, groups, d)
    before = x.clone()
    same(fused.gate_residual(x, y, gate), kernels.gate_residual(x, y, gate))
    same(fused.gate_residual(x, y, None), x + y)
    assert torch.equal(x, before)


@pytest.mark.parametrize("gated, affine", [(True, True), (False, False), (True, False)], ids=["before attention to the prompt", "before the MLP", "both"])
@pytest.mark.parametrize("b, l, groups, d", SHAPES)
def test_residual_and_next_norm(b, l, groups, d, gated, affine):
    """Sum and norm of the sum in one pass: what a block does between its three parts."""
    x, y, (gate, scale, shift) = rand(b, l, d, offset=1.0), rand(b, l, d, dtype=BF16), modulation(b, groups, d)
    gate = gate if gated else None
    total = x + y if gate is None else kernels.gate_residual(x, y, gate)
    if affine:
        scale, shift = rand(d), rand(d)
        normed = torch.nn.functional.layer_norm(total, (d,), scale, shift, 1e-6)
    else:
        normed = kernels.layer_norm_modulate(total, scale, shift, 1e-6)
    ours = fused.residual_norm(x, y, gate, scale, shift, 1e-6, FP32, affine)
    same(ours[0], total)
    same(ours[1], normed)
    same(fused.residual_norm(x, y, gate, scale, shift, 1e-6, BF16, affine)[1], normed.bfloat16(), normed)


@pytest.mark.parametrize("heads, d", [(3, 96), (12, 1536), (40, 5120)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rms_norm_and_rotation(heads, d, dtype):
    """Norm over all heads, rotation in three axes with the table of the transformer, one table for all samples."""
    grid = (2, 1, 3)
    x, weight, rope = rand(2, 6, d, dtype=dtype), rand(d, offset=1.0), dit.rope_table(grid, d // heads, torch.device(DEVICE))
    exact = kernels.rms_norm_rope(x.double().float(), weight, rope, heads, 1e-6)
    same(fused.rms_norm_rope(x, weight, rope, heads, 1e-6), kernels.rms_norm_rope(x, weight, rope, heads, 1e-6), exact)
    same(fused.rms_norm(x, weight, 1e-6), kernels.rms_norm(x, weight, 1e-6), kernels.rms_norm(x.float(), weight, 1e-6))
    wide = torch.cat([x, x, x], 2)[:, :, d : 2 * d]  # q, k and v out of one product
    assert torch.equal(fused.rms_norm_rope(wide, weight, rope, heads, 1e-6), fused.rms_norm_rope(x, weight, rope, heads, 1e-6))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["channels first", "channels last"])
@pytest.mark.parametrize("b, channels, size", [(2, 24, (2, 3, 5)), (1, 128, (1, 7, 9)), (1, 1000, (1, 3, 3))])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_autoencoder_norm(layout, b, channels, size, dtype):
    """Alone, with SiLU, with the shortcut of a residual block; the layout is kept."""
    x, shortcut = (rand(b, channels, *size, dtype=dtype).to(memory_format=layout) for _ in range(2))
    weight, bias = rand(channels, dtype=dtype, offset=1.0), rand(channels, dtype=dtype)
    plain, exact = kernels.rms_norm_channels(x, weight, bias), kernels.rms_norm_channels(x.float(), weight.float(), bias.float())
    ours = fused.rms_norm_channels(x, weight, bias)
    same(ours, plain, exact)
    assert ours.stride() == x.stride()
    for more in (dict(silu=True), dict(shortcut=shortcut)):
        exact = kernels.rms_norm_channels(x.float(), weight.float(), bias.float(), **{k: v if v is True else v.float() for k, v in more.items()})
        same(fused.rms_norm_channels(x, weight, bias, **more), kernels.rms_norm_channels(x, weight, bias, **more), exact)


@pytest.mark.parametrize("rows, d", [(5, 96), (3, 5120), (2, 1000)])
def test_rows_to_eight_bits(rows, d):
    """The same bytes and scales as torch gives; a row of zeros stays zeros."""
    from gpu import fp8

    x = rand(rows, d, dtype=BF16) * torch.logspace(-3, 3, rows, device=DEVICE)[:, None].bfloat16()
    x[-1] = 0
    (ours, scale), (plain, expected) = fused.quantize_rows(x), fp8.quantize_rows(x)
    torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)
    assert (ours.float() != plain.float()).sum() <= 1e-2 * x.numel() and not ours[-1].float().any()  # a tie may fall either way
    assert ((ours.float() * scale - x.float()).norm(dim=1) <= 0.04 * x.float().norm(dim=1)).all()


def through_kernels(monkeypatch):
    """From here on every operation that has a kernel takes it, on the CPU too; -> list of the names of those that ran."""
    ran = []

    def noting(name, kernel):
        def run(*inputs, **options):
            ran.append(name)
            return kernel(*inputs, **options)
        return run

    kernels.use()
    monkeypatch.setattr(kernels, "_fused", {name: noting(name, kernel) for name, kernel in fused.KERNELS.items()})
    monkeypatch.setattr(kernels, "fusable", lambda *inputs: True)
    return ran


@pytest.mark.parametrize("dtype", [FP32, BF16])
@torch.no_grad()
def test_a_whole_transformer(monkeypatch, dtype):
    """Every kernel in its place: prompt and times prepared, a time per latent frame, an odd number of tokens."""
    net = dit.WanDiT(dit.Config(dim=96, ffn_dim=128, heads=3, layers=2, in_channels=4, out_channels=4, text_dim=32, text_len=12)).eval().to(DEVICE)
    torch.nn.init.normal_(net.head.head.weight, std=0.1)
    for name, p in net.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, mean=1.0, std=0.2)
    x, t, context = rand(1, 4, 3, 2, 6), rand(1, 3).abs() * 300, rand(1, 5, 32)
    exact = net(x, t, context)
    plain = net.cast_weights(dtype)(x, t, context)
    ran = through_kernels(monkeypatch)
    v = net(x, net.times(t)[0], net.prompt(context))
    assert set(ran) == {"layer_norm_modulate", "gate_residual", "residual_norm", "rms_norm", "rms_norm_rope"}
    error = lambda a: ((a - exact).norm() / exact.norm()).item()
    assert error(v) < (1e-5 if dtype == FP32 else 1.3 * error(plain))


@torch.no_grad()
def test_a_whole_autoencoder(monkeypatch):
    import ae

    net = ae.DCAEV(ae.Config((0, 8, 16, 16), (0, 1, 1, 1), 4, chunk=4)).eval().to(DEVICE)
    for name, p in net.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, mean=1.0, std=0.2)
    z = rand(1, 4, 2, 2, 3)
    plain = net.decode(z)
    ran = through_kernels(monkeypatch)
    torch.testing.assert_close(net.decode(z), plain, atol=1e-5, rtol=1e-5)
    assert set(ran) == {"rms_norm_channels"}


COMPILE = """
import subprocess, tempfile
from triton import compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gpu.triton_kernels import *

F32, BF16, ROW = "*fp32", "*bf16", launch(5120)
INTEGERS = dict.fromkeys("d tokens run gate_b gate_g scale_b scale_g stride c".split(), "i32")
CASES = [  # kernel, types, constants, warps: as sampling a 14B model calls it
    (residual_norm_kernel, dict(x=F32, y=BF16, gate=F32, scale=F32, shift=F32, total=F32, normed=BF16, eps="fp32"),
     dict(ADD=True, GATED=True, NORM=True, AFFINE=False, BLOCK=ROW["BLOCK"]), ROW["num_warps"]),
    (rms_norm_rope_kernel, dict(x=BF16, weight=F32, rope=F32, out=BF16, eps="fp32"),
     dict(ROTATE=True, BLOCK=ROW["BLOCK"]), ROW["num_warps"]),
    (rms_norm_channels_kernel, dict(x=BF16, weight=BF16, bias=BF16, shortcut=BF16, out=BF16, positions="i64", channels="i32",
                                    sample="i64", along_p="i64", eps="fp32"),
     dict(along_c=1, SILU=False, ADD=True, P=32, C=256), 8),
    (quantize_rows_kernel, dict(x=BF16, out="*fp8e4nv", scales=F32, largest="fp32"), dict(BLOCK=ROW["BLOCK"]), ROW["num_warps"])]
for capability in (80, 90):
    for kernel, types, constants, warps in CASES[: 3 if capability < 89 else 4]:
        types = {name: {**INTEGERS, **types}.get(name, "constexpr") if name not in constants else "constexpr" for name in kernel.arg_names}
        made = compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", capability, 32), options=dict(num_warps=warps))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            said = subprocess.run([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        print(capability, kernel.__name__, *(part for part in said.split() if part.startswith(("REG:", "STACK:"))))
"""


@pytest.mark.skipif(ON_GPU, reason="there is a GPU to run on")
def test_kernels_compile_to_machine_code():
    """For A100 and H100, without a GPU: what the interpreter accepts and the compiler does not comes to light here. Nothing is spilled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7 and all(line.endswith(" STACK:0") for line in lines), done.stdout


TRACE = """
import torch, torch.utils._triton
from torch._subclasses.fake_tensor import FakeTensorMode
import dit, kernels

torch.utils._triton.has_triton = lambda: True  # else the tracer does not look for kernels
from gpu import triton_kernels
kernels.use(fused=triton_kernels.KERNELS)  # as if they had been tried
FP32, BF16 = torch.float32, torch.bfloat16

class Traced(Exception):
    pass

def backend(graph, inputs):
    raise Traced(sum("triton_kernel" in str(node.target) for node in graph.graph.nodes))

with torch.device("meta"):
    block = dit.WanDiT(dit.Config(dim=256, ffn_dim=512, heads=2, layers=1, in_channels=4, out_channels=4)).blocks[0]
with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
    empty = lambda *shape, dtype=BF16: torch.empty(*shape, dtype=dtype, device="cuda")  # only pretends to be on a GPU
    for module in block.modules():
        for name, p in module._parameters.items():
            wide = p is not None and ("Norm" in type(module).__name__ or name == "modulation")
            module._parameters[name] = p if p is None else torch.nn.Parameter(empty(*p.shape, dtype=FP32 if wide else BF16), False)
    keys, rope = empty(1, 16, 2, 128), empty(24, 64, dtype=torch.complex64)
    inputs = empty(1, 24, 256, dtype=FP32), empty(1, 1, 6, 256, dtype=FP32), rope, dit.KeysValues((keys, keys)), BF16
    try:
        torch.compile(block, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    except Exception as e:
        print(e.inner_exception if hasattr(e, "inner_exception") else e)
"""


@pytest.mark.skipif(ON_GPU, reason="there is a GPU to run on")
def test_a_compiled_block_keeps_its_kernels():
    """torch.compile takes a block as one graph (`fullgraph`) with seven of our kernels in it: traced on pretended GPU tensors, nothing is run."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", TRACE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "7", done.stdout + done.stderr
