"""Networks larger than the GPU: blocks stay in host memory and pass through two buffers
on the device.

A transformer of 14B parameters takes 28 GB in bf16, but at any moment it computes with
one block of 0.7 GB. So the blocks wait in (pinned) host memory, and while the device
computes block i in one buffer, a second CUDA stream copies block i + 1 into the other:

    copy      | 0 |  1  |  2  |  3  | ...           into buffers A, B, A, B, ...
    compute       |  0  |  1  |  2  | ...           from buffers A, B, A, B, ...

PCIe moves 25 to 50 GB/s, a 14B block every 15 to 30 ms. Where computing a block takes
longer than that, the copies cost nothing; else they set the pace. (By the roofline an
H100 computes a block of 17,600 tokens in 23 ms. Estimates: no GPU has run this yet.)
Results are the same bits as with resident blocks. On the CPU the same code runs without
streams or overlap, for tests.
"""
import copy
from math import prod
from typing import NamedTuple

import torch
from torch import nn

ALIGNMENT = 256  # bytes; where parameters begin in a buffer
CHUNK = 16 * 2**20  # pinned memory comes in powers of two: whole blocks would waste up to half


def stream_blocks(net, device):
    """For GPUs smaller than the model, sampling only: the blocks of `net` wait in host
    memory, everything else moves to `device`. Merge LoRA before. Returns net; to move
    or save it again, load it anew."""
    blocks, net.blocks = list(net.blocks), nn.ModuleList()
    net.to(device)
    net.blocks = StreamedBlocks(blocks, device)
    return net


class Place(NamedTuple):
    """Where a parameter lies in the bytes of a block."""

    name: str
    start: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, flat):
        end = self.start + prod(self.shape) * self.dtype.itemsize
        return flat[self.start : end].view(self.dtype).view(self.shape)


def places_of(block):
    """-> [Place] of its parameters, and how many bytes they take."""
    places, end = [], 0
    for name, p in block.state_dict().items():
        places.append(Place(name, end, p.shape, p.dtype))
        end += -(-p.nbytes // ALIGNMENT) * ALIGNMENT
    return places, end


class StreamedBlocks(nn.Module):
    """Stands in for an nn.ModuleList of equally shaped blocks that is only ever
    iterated, without gradients: `for block in streamed: x = block(x)`.

    Each block is yielded on the device, and is valid until the next one is asked for.
    The blocks given are emptied one by one, so that host memory holds them once.
    """

    def __init__(self, blocks, device):
        super().__init__()
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.places, end = places_of(blocks[0])  # equal in all blocks
        empty = copy.deepcopy(blocks[0]).to("meta").requires_grad_(False)
        self.host = [self.pack(block) for block in blocks]  # of each block, its chunks
        self.buffers, self.shells = [], []  # shells: blocks whose parameters lie in a buffer
        for _ in range(2):
            buffer = torch.empty(end, dtype=torch.uint8, device=self.device)
            self.buffers.append(buffer)
            self.shells.append(self.unpack(buffer, copy.deepcopy(empty)))
        self.holds = [None, None]  # the block in each buffer
        if self.cuda:
            self.stream = torch.cuda.Stream(self.device)
            # the buffers' memory may still be read by earlier work, and must not be given
            # away while a copy is on its way
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            for buffer in self.buffers:
                buffer.record_stream(self.stream)
            self.copied = torch.cuda.Event(), torch.cuda.Event()
            self.computed = torch.cuda.Event(), torch.cuda.Event()

    def pack(self, block):
        """A block -> its bytes, in pinned chunks when they go to a GPU. The block is
        empty afterwards."""
        places, size = places_of(block)
        if places != self.places:
            raise ValueError("only blocks of equal shapes and types can be streamed (merge LoRA "
                             "adapters first).")
        tensors, flat = block.state_dict(), torch.empty(size, dtype=torch.uint8)
        for place in places:
            place.view(flat).copy_(tensors[place.name])
        block.to("meta")
        chunks = flat.split(CHUNK)
        return [chunk.pin_memory() for chunk in chunks] if self.cuda else chunks

    def unpack(self, buffer, block):
        """Let the parameters of `block` be views of a buffer."""
        views = {place.name: place.view(buffer) for place in self.places}
        block.load_state_dict(views, assign=True)
        return block.eval()

    def __len__(self):
        return len(self.host)

    def __iter__(self):
        n = len(self)
        slot = self.fetch(0, 0)
        for i in range(n):
            if self.cuda:
                torch.cuda.current_stream(self.device).wait_event(self.copied[slot])
            # after the last block the first, for the next pass
            following = self.fetch((i + 1) % n, 1 - slot)
            yield self.shells[slot]
            if self.cuda:
                self.computed[slot].record(torch.cuda.current_stream(self.device))
            slot = following

    def fetch(self, i, slot):
        """Have block i copied, into buffer `slot` unless a buffer already holds it ->
        the buffer."""
        if i in self.holds:
            return self.holds.index(i)
        self.holds[slot] = i
        if not self.cuda:
            self.transfer(i, slot)
            return slot
        with torch.cuda.stream(self.stream):
            # what used the buffer last; an event never recorded does not wait
            self.stream.wait_event(self.computed[slot])
            self.transfer(i, slot)
            self.copied[slot].record()
        return slot

    def transfer(self, i, slot):
        for part, chunk in zip(self.buffers[slot].split(CHUNK), self.host[i]):
            part.copy_(chunk, non_blocking=True)
