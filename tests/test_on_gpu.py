"""The same code on a GPU: `python -m pytest -m gpu`. Everything else is tested on the CPU; here only that a CUDA device gives the same, and
that each fast path there gives what the plain one gives. The kernels one by one: test_gpu_triton_kernels.py, which runs on the GPU too."""
import warnings

import pytest
import torch

import adapt
import ae
import dit
import kernels
import sample
from gpu import choose, fp8, offload
from training import loop, toy_base
from wan import released

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def exact_fp32():
    """TF32 rounds to 10 bits; comparisons with the CPU need all 23."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    kernels.use()
    choose.set_attention(None)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@torch.no_grad()
def test_autoencoder():
    net, x = ae.DCAEV(ae.PRESETS["toy"]).eval(), torch.rand(1, 3, 16, 64, 64) * 2 - 1
    z, y = net.encode(x), net(x)
    net.cuda()
    torch.testing.assert_close(net.encode(x.cuda()).cpu(), z, atol=1e-3 * z.abs().max().item(), rtol=0)
    torch.testing.assert_close(net(x.cuda()).cpu(), y, atol=1e-3 * y.abs().max().item(), rtol=0)
    low = net.bfloat16()(x.cuda().bfloat16()).float().cpu()
    assert (low - y).norm() / y.norm() < 0.05


@torch.no_grad()
def test_transformer():
    net = dit.WanDiT(dit.PRESETS["toy-dc"]).eval()
    torch.nn.init.normal_(net.head.head.weight, std=0.02)
    inputs = torch.randn(2, 68, 8, 2, 2), torch.tensor([30.0, 900.0]), torch.randn(2, 8, 32)
    v = net(*inputs)
    net.cuda()
    torch.testing.assert_close(net(*(a.cuda() for a in inputs)).cpu(), v, atol=1e-4, rtol=0)
    low = net.cast_weights(torch.bfloat16)(*(a.cuda() for a in inputs)).cpu()
    assert (low - v).norm() / v.norm() < 0.05


def test_the_same_seed_gives_the_same_video_on_both():
    model = released.load_model("dc")
    context = model.text(["a large red circle moving left slowly on a blue background"])
    z = sample.generate(model, context, steps=6)
    model.to("cuda")
    torch.testing.assert_close(sample.generate(model, context, steps=6).cpu(), z, atol=1e-3, rtol=0)


def test_command_line(tmp_path):
    sample.main(["--prompt", "a red ring on a black background", "--device", "cuda", "--dtype", "bf16", "--out", str(tmp_path), "--name", "v"])
    assert (tmp_path / "v.mp4").stat().st_size > 1000


@torch.inference_mode()
def test_prompt_and_times_computed_ahead():
    """In fp32 and bf16, with head width 128."""
    net = dit.WanDiT(dit.Config(dim=256, ffn_dim=512, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=32)).eval().cuda()
    torch.nn.init.normal_(net.head.head.weight, std=0.1)
    x, context, times = torch.randn(2, 4, 3, 16, 16).cuda(), torch.randn(2, 77, 32).cuda(), torch.tensor([900.0, 40.0])
    context[1, 20:] = 0
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        net.cast_weights(dtype)
        prompt = net.prompt(context)
        for t, time in zip(times, net.times(times)):
            plain = net(x, t.expand(2).cuda(), context)
            assert (net(x, time, prompt) - plain).norm() < tolerance * plain.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_streamed_blocks(dtype):
    """The same bits as with all blocks on the GPU, over many steps in a row so that copies and work overlap; the memory of two blocks."""
    config = dit.Config(dim=1024, ffn_dim=4096, heads=8, layers=9, in_channels=4, out_channels=4, text_dim=32)
    resident, streamed = (dit.WanDiT(config).eval().cast_weights(dtype) for _ in range(2))
    torch.nn.init.normal_(resident.head.head.weight, std=0.1)
    streamed.load_state_dict(resident.state_dict())
    block = sum(p.nbytes for p in resident.blocks[0].parameters())
    before = torch.cuda.memory_allocated()
    offload.stream_blocks(streamed, "cuda")
    assert all(chunk.is_pinned() for chunks in streamed.blocks.host for chunk in chunks)
    rest = sum(p.nbytes for p in streamed.parameters())
    assert torch.cuda.memory_allocated() - before < rest + 2.1 * block
    resident.cuda()
    context = torch.randn(1, 40, 32).cuda()
    for side in (8, 64):  # 64 tokens: the copies set the pace; 4,096 tokens: the computation
        x = torch.randn(1, 4, 4, side, side).cuda()
        prompts = [net.prompt(context) for net in (resident, streamed)]
        times = [net.times(torch.linspace(999, 1, 12)) for net in (resident, streamed)]
        expected = [resident(x, t, prompts[0]) for t in times[0]]
        for v, t in zip(expected, times[1]):
            assert torch.equal(streamed(x, t, prompts[1]), v)


def test_weights_go_straight_to_the_gpu(tmp_path):
    net = dit.WanDiT(dit.PRESETS["toy-dc"])
    dit.save(net, tmp_path, dtype=torch.float16, shard_bytes=1e6)
    again = dit.load(tmp_path, dtype=torch.bfloat16, device="cuda")
    for (name, p), q in zip(again.named_parameters(), net.parameters()):
        assert p.is_cuda and p.dtype == (torch.float32 if dit.keeps_fp32(name) else torch.bfloat16)
        torch.testing.assert_close(p.float().cpu(), q, atol=1e-3, rtol=1e-2)


# ---------------------------------------------------------------------------------------------------- fast equals plain


def wide(layers=3, **more):
    """A transformer with heads of 128 channels, as every Wan has, whose head is not zero."""
    net = dit.WanDiT(dit.Config(dim=512, ffn_dim=1024, heads=4, layers=layers, in_channels=4, out_channels=4, text_dim=32, **more)).eval().cuda()
    torch.nn.init.normal_(net.head.head.weight, std=0.1)
    return net


def error(a, exact):
    return ((a.float() - exact.float()).norm() / exact.float().norm()).item()


@pytest.mark.parametrize("times", [torch.tensor([700.0, 20.0]), torch.rand(2, 3) * 1000], ids=["per clip", "per frame"])
@torch.no_grad()
def test_fused_transformer_equals_the_plain_one(times):
    """fp32: 1e-5. bf16: no further from fp32 than the plain bf16 one."""
    line = choose.choose_kernels(torch.device("cuda"))
    if "plain" in line:
        pytest.skip(line)
    net, inputs = wide(), (torch.randn(2, 4, 3, 10, 14).cuda(), times.cuda(), torch.randn(2, 40, 32).cuda())
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        net.cast_weights(dtype)
        for plain in (True, False):
            kernels.use(plain=plain)
            found[dtype, plain] = net(*inputs)
    exact = found[torch.float32, True]
    assert error(found[torch.float32, False], exact) < 1e-5
    assert error(found[torch.bfloat16, False], exact) < 1.1 * error(found[torch.bfloat16, True], exact)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["channels first", "channels last"])
@torch.no_grad()
def test_fused_autoencoder_equals_the_plain_one(layout):
    net, z = ae.DCAEV(ae.PRESETS["toy"]).eval().cuda(), torch.randn(1, 32, 4, 3, 5).cuda()
    kernels.use(plain=True)
    exact, low = net.decode(z), net.bfloat16().decode(z.bfloat16())
    kernels.use()
    assert error(net.to(memory_format=layout).decode(z.bfloat16()), exact) < 1.1 * error(low, exact)
    assert error(net.float().to(memory_format=layout).decode(z), exact) < 5e-3  # weights were rounded to bf16 before


def test_gradients_take_the_plain_path():
    net = wide(layers=1)
    net(torch.randn(1, 4, 1, 4, 4).cuda(), torch.tensor([500.0]).cuda(), torch.randn(1, 5, 32).cuda()).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.blocks.parameters())


@pytest.mark.parametrize("more", [dict(), dict(cfg_batch=False), dict(image=torch.zeros(1, 3, 64, 64))], ids=str)
def test_a_recorded_step_gives_the_same_bits(more):
    """Whatever the step count, for another prompt, and without a warning that recording failed."""
    model = released.load_model("dc", device="cuda")
    for prompt, steps in (("a large red circle moving left", 2), ("a ring", 7)):
        context = model.text([prompt])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            graph = sample.generate(model, context, steps=steps, graph=True, **more)
        assert torch.equal(graph, sample.generate(model, context, steps=steps, graph=False, **more))


def test_compiled_blocks_equal_eager_ones():
    """With our kernels inside, and recorded as a graph."""
    reason = choose.without_compiler(torch.device("cuda"))
    if reason:
        pytest.skip(reason)
    model = released.load_model("dc", device="cuda")
    context = model.text(["a ring"])
    plain = sample.generate(model, context, steps=4, graph=False)
    for graph in (False, True):
        torch.testing.assert_close(sample.generate(model, context, steps=4, graph=graph, compiled=True), plain, atol=1e-3, rtol=0)


@torch.no_grad()
def test_eight_bit_products_equal_their_emulation():
    """Tensor cores add fp8 products in fewer bits than fp32 has: 0.5 % here, where fp8 itself costs 4 %."""
    if not fp8.hardware(torch.device("cuda")):
        pytest.skip("needs Hopper or later")
    linear = torch.nn.Linear(1536, 512).cuda().bfloat16()
    x = torch.randn(2, 77, 1536).cuda().bfloat16()
    layer = fp8.Linear(linear)
    emulated = fp8.Linear(linear.cpu())(x.cpu())
    assert error(layer(x).cpu(), emulated) < 5e-3 < error(layer(x).cpu(), linear(x.cpu()))


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient", "flash3"])
@torch.no_grad()
def test_every_attention_backend(name):
    if name == "flash3" and choose.flash3() is None:
        pytest.skip("FlashAttention 3 is not installed")
    choose.set_attention(name)
    q, k, v = torch.randn(3, 1, 200, 4, 128).cuda().bfloat16()
    for keys in (200, 40):  # self- and cross-attention
        k, v = k[:, :keys], v[:, :keys]
        exact = kernels.attention_plain(q.float(), k.float(), v.float())
        assert error(kernels.attention(q, k, v), exact) < 1e-2


def test_choices_are_made_and_told():
    name, line = choose.choose_attention(torch.device("cuda"), 2000, 4)
    assert name in (*choose.BACKENDS, "flash3") and f"attention: {name}" in line
    found = choose.choose_convolution(torch.device("cuda"), torch.bfloat16)
    assert found.line.startswith("convolutions: ") and (found.dtype == torch.bfloat16) == ("TFLOP/s" in found.line)


def test_slow_path_equals_the_fast_one_on_the_command_line(tmp_path):
    for name, flags in (("fast", []), ("slow", ["--slow"])):
        sample.main(["--prompt", "a red ring", "--device", "cuda", "--steps", "4", "--out", str(tmp_path), "--name", name, *flags])
    fast, slow = (sample.checkpoint.load_tensors(tmp_path / f"{name}.safetensors")[0]["latent"] for name in ("fast", "slow"))
    torch.testing.assert_close(fast, slow, atol=1e-3, rtol=0)


def test_adapt_trains_on_the_gpu_in_bf16(tiny_toy, tmp_path, monkeypatch):
    """All stages of the tiny toy, frozen weights in bf16; what the CPU trains in fp32 differs by rounding only."""
    monkeypatch.setattr(toy_base, "SHARD", 8)
    monkeypatch.setattr(toy_base, "WITH_IMAGE", 4)
    losses = []
    for device, dtype in (("cpu", "fp32"), ("cuda", "bf16")):
        adapt.main(["--base", "toy", "--device", device, "--dtype", dtype, "--shards", "2", "--align-shards", "1", "--steps-head", "3", "--steps", "3", "--batch", "4",
                    "--accumulate", "1", "--prompts", "2", "--rank", "2", "--save-every", "1", "--head", "zero", "--cache", str(tmp_path / "cache"),
                    "--out", str(tmp_path / device)])
        losses.append([line["loss"] for stage in ("1b", "2") for line in loop.read_log(tmp_path / device / stage)])
    assert len(losses[0]) == 6
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.05, atol=0.05)
