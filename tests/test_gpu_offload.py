"""Streamed blocks give the resident network's bits, hold the weights once, and are refused where they cannot work."""
import dataclasses

import pytest
import torch

import lora
from gpu import offload
from test_files_layouts import TINY, tiny


def inputs(net):
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=g)
    return draw(2, net.config.in_channels, 3, 4, 6), torch.tensor([20.0, 900.0]), draw(2, 5, 8)


@pytest.mark.core
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_streamed_equals_resident(monkeypatch, layers, dtype):
    """Bit for bit, step after step, with the prompt computed ahead or not; blocks in several chunks."""
    monkeypatch.setattr(offload, "CHUNK", 1000)
    net, streamed = (tiny(layers=layers).cast_weights(dtype).eval() for _ in range(2))
    offload.stream_blocks(streamed, "cpu")
    x, t, context = inputs(net)
    for step in range(3):
        assert torch.equal(streamed(x, t / (1 + step), context), net(x, t / (1 + step), context))
    assert torch.equal(streamed(x, t, streamed.prompt(context)), net(x, t, net.prompt(context)))


@torch.inference_mode()
def test_only_two_blocks_are_beside_the_host_copy():
    """The blocks given are emptied; what is left on the device is two buffers of one block each."""
    net = tiny(layers=4)
    blocks, size = list(net.blocks), sum(p.nbytes for p in net.blocks[0].parameters())
    offload.stream_blocks(net, "cpu")
    assert all(p.is_meta for block in blocks for p in block.parameters())
    assert not any(name.startswith("blocks") for name, _ in net.named_parameters())
    assert len(net.blocks.buffers) == 2 and all(size <= b.nbytes < 1.1 * size for b in net.blocks.buffers)
    assert sum(c.untyped_storage().nbytes() for block in net.blocks.host for c in block[:1]) < 4.4 * size


@torch.inference_mode()
def test_each_block_is_copied_once_a_step(monkeypatch):
    """Also after a step that stopped in the middle. The next block is under way before the present one is used."""
    net = tiny(layers=5)
    x, t, context = inputs(net)
    expected = net(x, t, context)
    offload.stream_blocks(net, "cpu")
    copied, transfer = [], offload.StreamedBlocks.transfer
    monkeypatch.setattr(offload.StreamedBlocks, "transfer", lambda self, i, slot: (copied.append(i), transfer(self, i, slot)))
    blocks = iter(net.blocks)
    next(blocks), next(blocks)
    assert copied == [0, 1, 2]
    del blocks, copied[:]
    assert torch.equal(net(x, t, context), expected)
    assert copied == [0, 2, 3, 4, 0]  # block 1 was still there
    del copied[:]
    assert torch.equal(net(x, t, context), expected)
    assert copied == [1, 2, 3, 4, 0]


def test_live_adapters_are_refused():
    """Blocks that are not all alike cannot share a buffer: an adapter on some of them must be merged first."""
    net = lora.wrap(tiny(), rank=2, alpha=2, targets=[r"blocks\.1\.ffn\.0"])
    with pytest.raises(ValueError, match="merge"):
        offload.stream_blocks(net, "cpu")
    merged = lora.merge(lora.wrap(tiny(), rank=2, alpha=2, targets=[r"blocks\.1\.ffn\.0"]))
    assert len(offload.stream_blocks(merged, "cpu").blocks) == dataclasses.asdict(TINY)["layers"]
