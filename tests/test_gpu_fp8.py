"""Eight-bit products: how far off they are, and that they are called as a GPU wants them."""
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dit
from gpu import fp8


def test_eight_bit_products():
    """Off by 4 % of the result's norm, whatever the width, the scale of a token or of a channel; a token far out does not spoil the others."""
    for width in (64, 1536):
        linear, x = torch.nn.Linear(width, 48), torch.randn(2, 5, width)
        linear.weight.data *= torch.logspace(-3, 3, 48)[:, None]
        linear.bias.data.zero_()
        x[0, 0] *= 1e4
        size = x.norm(dim=-1, keepdim=True) * linear.weight.norm(dim=1)  # what each result is made of
        exact, error = linear(x) / size, (fp8.Linear(linear)(x) - linear(x)) / size
        assert 0.03 < error.norm() / exact.norm() < 0.045
        assert (error.norm(dim=-1) < 0.06 * exact.norm(dim=-1).mean()).all()  # of every token


@torch.no_grad()
def test_eight_bit_products_are_called_as_a_gpu_wants_them(monkeypatch):
    """Shapes, types and memory order pass the checks of torch's own kernel, on tensors that only pretend to be on a GPU; a wrong scale does not."""
    monkeypatch.setattr(fp8, "hardware", lambda device: True)
    with FakeTensorMode():
        fake = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, device="cuda", dtype=dtype)
        layer = fp8.Linear(types.SimpleNamespace(weight=fake(512, 1536), bias=fake(512)))
        y = layer(fake(2, 77, 1536))
        assert y.shape == (2, 77, 512) and y.dtype == torch.bfloat16 and y.device.type == "cuda"
        with pytest.raises(RuntimeError, match="Invalid scaling configuration"):
            fp8.multiply(fake(77, 1536, dtype=fp8.DTYPE), fake(77, 2, dtype=torch.float32), layer.weight, layer.scale, layer.bias, torch.bfloat16)


@torch.no_grad()
def test_a_transformer_in_eight_bits(tiny_toy):
    """The large products of the blocks and nothing else; once converted it stays so."""
    net = dit.WanDiT(dit.Config(dim=64, ffn_dim=128, heads=2, layers=2, in_channels=4, out_channels=4, text_dim=32)).eval()
    torch.nn.init.normal_(net.head.head.weight, std=0.1)
    inputs = torch.randn(1, 4, 2, 8, 8), torch.tensor([500.0]), torch.randn(1, 7, 32)
    exact = net(*inputs)
    fp8.convert(net)
    first = net(*inputs)
    assert 1e-3 < (first - exact).norm() / exact.norm() < 0.1
    assert torch.equal(fp8.convert(net)(*inputs), first)
    kinds = {name: type(module) for name, module in net.named_modules() if isinstance(module, (torch.nn.Linear, fp8.Linear))}
    assert all((kind is fp8.Linear) == (name.startswith("blocks.") and name.split(".", 2)[2] in fp8.LAYERS) for name, kind in kinds.items())
