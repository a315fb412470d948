"""The same code on a GPU: `python -m pytest -m gpu`. Everything else is tested on the CPU; here only that a CUDA device gives the same."""
import pytest
import torch

import ae
import dit
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
    model = sample.load_model("dc")
    context = model.text(["a large red circle moving left slowly on a blue background"])
    z = sample.generate(model, context, steps=6)
    model.to("cuda")
    torch.testing.assert_close(sample.generate(model, context, steps=6).cpu(), z, atol=1e-3, rtol=0)


def test_command_line(tmp_path):
    sample.main(["--prompt", "a red ring on a black background", "--device", "cuda", "--dtype", "bf16", "--out", str(tmp_path), "--name", "v"])
    assert (tmp_path / "v.mp4").stat().st_size > 1000
