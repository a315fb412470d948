"""The same code on a GPU: `python -m pytest -m gpu`. Everything else is tested on the CPU; here only that a CUDA device gives the same."""
import pytest
import torch

import ae
import dit
import models
import sample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def exact_fp32():
    """TF32 rounds to 10 bits; comparisons with the CPU need all 23."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
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
    model = models.load_model("dc")
    context = model.text(["a large red circle moving left slowly on a blue background"])
    z = sample.generate(model, context, steps=6)
    model.to("cuda")
    torch.testing.assert_close(sample.generate(model, context, steps=6).cpu(), z, atol=1e-3, rtol=0)


def test_command_line(tmp_path):
    sample.main(["--prompt", "a red ring on a black background", "--device", "cuda", "--dtype", "bf16", "--out", str(tmp_path), "--name", "v"])
    assert (tmp_path / "v.mp4").stat().st_size > 1000


@torch.inference_mode()
def test_prompt_and_times_computed_ahead():
    """Merged padding goes through the attention kernels that take an offset: in fp32 and bf16, with head width 128."""
    net = dit.WanDiT(dit.Config(dim=256, ffn_dim=512, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=32)).eval().cuda()
    torch.nn.init.normal_(net.head.head.weight, std=0.1)
    x, context, times = torch.randn(2, 4, 3, 16, 16).cuda(), torch.randn(2, 77, 32).cuda(), torch.tensor([900.0, 40.0])
    context[1, 20:] = 0
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        net.cast_weights(dtype)
        prompt = net.prompt(context)
        assert prompt.blocks[0].text[0].shape[1] == 80
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
    dit.stream_blocks(streamed, "cuda")
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
