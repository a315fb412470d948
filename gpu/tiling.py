"""Exact spatial tiling: decode (or encode) a large frame in the memory of a small one,
without a seam and without blending.

A pixel of the decoder's output depends on a patch of the latent only: every 3x3
convolution looks one position further to each side, every enlargement by r divides
positions by r. Walk from the end to the start, and the rows [a, b) that are wanted of
the output become those that are needed of the input of each layer, cut off at the
borders of the frame, where the zero padding of the convolutions is the true one:

    3x3 convolution           [a, b)  <-  [a - 1, b + 1)
    enlargement by r          [a, b)  <-  [floor(a / r), ceil(b / r))
    reduction by r            [a, b)  <-  [a r, b r)

So a tile is decoded from a window that is larger by a *halo*. After each layer the
window is trimmed to what is still needed; what is wrong near its inner borders never
reaches the tile.

The deeper a layer, the more latent cells its halo spans, and an attention over the
frame needs all of them. But deep layers are small. So they run whole, and the shallow
ones, where nearly all the memory goes, are swept tile by tile. Where to `cut`, and how
large a tile to `choose`, follows from an estimate of the `peak`.

    latent --deep layers, whole--> features --window--> shallow layers --> tile

Time is the inner loop: `GROUP` latent frames go through the deep layers, then each tile
goes through all of them, so the streaming state of one tile only is in use at a time.
"""
import itertools
import math
import weakref
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from files.checkpoint import allocate

GROUP = 32  # latent frames whose features are held at once: 128 frames of video


def encode_stream(net, clips, tile=None):
    """`net.encode_stream` in tiles of (rows, columns) cells; None: whole frames."""
    if tile is None:
        yield from net.encode_stream(clips)
        return
    for features in sweep(net, "encoder", net.pixel_chunks(clips), tile):
        yield net.to_latent(features)


def decode_stream(net, z, tile=None):
    """`net.decode_stream` in tiles of (rows, columns) cells; None: whole frames."""
    if tile is None:
        yield from net.decode_stream(z)
        return
    pieces = [z] if isinstance(z, torch.Tensor) else z
    surplus = []  # of the chunks that are on their way

    def features():
        for chunk, more in net.latent_chunks(iter(pieces)):
            surplus.append(more)
            yield chunk

    for x in sweep(net, "decoder", features(), tile):
        yield x[:, :, : x.shape[2] - surplus.pop(0)]


# ---------------------------------------------------------------- what depends on what


def axis_ops(module):
    """What a layer does to positions along an axis, in order: (kernel, stride, padding)
    of a convolution, or a factor where it changes the resolution otherwise, which it
    says itself: `zoom` is 2 where sides are doubled, 1/2 where they are halved."""
    if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
        yield module.kernel_size[-1], module.stride[-1], module.padding[-1]
    for child in module.children():
        yield from axis_ops(child)
    if getattr(module, "zoom", 1) != 1:
        yield module.zoom


def layer_ops(layers):
    """The axis_ops of every layer."""
    return [tuple(axis_ops(layer)) for layer in layers]


def scale_of(ops):
    """A layer's axis_ops -> positions that come out for each that goes in."""
    return math.prod(1 / op[1] if isinstance(op, tuple) else op for op in ops)


def scales(ops, start=1):
    """layer_ops -> positions at the input of every layer, and at the end."""
    found = [start]
    for layer in ops:
        found.append(round(found[-1] * scale_of(layer)))
    return found


def needed_rows(layer, a, b, size):
    """Rows [a, b) of a layer's output -> those needed of its input, of `size`."""
    r = max(1, round(1 / scale_of(layer)))
    for op in reversed(layer):
        if isinstance(op, tuple):
            kernel, stride, padding = op
            a, b = a * stride - padding, (b - 1) * stride - padding + kernel
        else:
            a, b = math.floor(a / op), math.ceil(b / op)
    return max(a // r * r, 0), min(-(-b // r) * r, size)  # a reduction by r keeps its grid


def row_spans(ops, size, a, b):
    """Rows [a, b) of the last layer's output -> those needed of every layer's input, of
    which the first has `size`, in order, and [a, b) itself."""
    sizes = scales(ops, size)
    spans = [(a, min(b, sizes[-1]))]
    for layer, n in zip(reversed(ops), reversed(sizes[:-1])):
        spans.append(needed_rows(layer, *spans[-1], n))
    return spans[::-1]


def tile_spans(ops, size, tile):
    """Cut the last layer's output into tiles -> row_spans of every row of tiles, and of
    every column. `size`: (height, width) of the first layer's input."""
    axes = []
    for n, step in zip(size, tile):
        starts = range(0, scales(ops, n)[-1], step)
        axes.append([row_spans(ops, n, a, a + step) for a in starts])
    return axes


# ------------------------------------------------------------------------------ running


def run(layers, x, states, window=None):
    """One chunk of a video through streaming layers, only the `window` (row spans,
    column spans) of it -> y. The list `states` is updated."""
    for i, layer in enumerate(layers):
        x = x if window is None else trim(x, layers, window, i)
        x, states[i] = layer(x, states[i])
    return x if window is None else trim(x, layers, window, len(layers))


def trim(x, layers, window, i):
    """What comes out of layer i - 1, cut to what layer i needs: a copy."""
    scale = scale_of(tuple(axis_ops(layers[i - 1]))) if i else 0
    top, left = (round(axis[max(i - 1, 0)][0] * scale) for axis in window)  # x in the frame
    (a, b), (c, d) = (axis[i] for axis in window)
    return x[..., a - top : b - top, c - left : d - left].contiguous()


def sweep(net, side, chunks, tile):
    """Consecutive chunks of a video through `net.encoder` or `net.decoder` (side), the
    shallow layers tile by tile -> generator of what they become."""
    c, layers = net.config, getattr(net, side).layers
    pixels = scales(layer_ops(layers), c.spatial_factor if side == "encoder" else 1)
    deep_states, waiting, at = [None] * len(layers), {}, None
    for group, last in groups(chunks, max(1, GROUP // c.latent_chunk)):
        if at is None:
            h, w = (n // pixels[0] for n in group[0].shape[3:])
            shape = len(group) * c.latent_chunk, h, w
            at = cut(net, side, shape, tile, group[0].dtype)
        lo, hi = shallow_layers(layers, side, at)
        deep = layers[:lo] + layers[hi:]
        if side == "decoder":
            group[:] = [run(deep, x, deep_states) for x in group]
        size = [n * pixels[hi] for n in tile]
        group[:] = sweep_tiles(layers[lo:hi], group, size, waiting, last)  # the input is freed
        while group:
            x = group.pop(0)
            yield x if side == "decoder" else run(deep, x, deep_states)


def sweep_tiles(layers, chunks, tile, waiting, last):
    """Consecutive chunks through shallow `layers`, tile by tile -> list of what they
    become.

    waiting: {tile: its states} between groups of chunks, in the memory of the host,
    kept by the caller; after the `last` they are dropped.
    """
    out, ops, size, device = [], layer_ops(layers), chunks[0].shape[3:], chunks[0].device
    height, width = scales(ops, size[0])[-1], scales(ops, size[1])[-1]
    for window in itertools.product(*tile_spans(ops, size, tile)):
        (a, b), (c, d) = (axis[-1] for axis in window)
        states = waiting.pop((a, c), [None] * len(layers))
        states = tree_map_only(torch.Tensor, lambda s: s.to(device), states)
        for i, x in enumerate(chunks):
            y = run(layers, x, states, window)
            if i == len(out):
                out.append(y.new_empty(*y.shape[:3], height, width))
            out[i][..., a:b, c:d] = y
            del y  # before the next one is made
        if not last:
            waiting[a, c] = tree_map_only(torch.Tensor, lambda s: s.cpu(), states)
    return out


def shallow_layers(layers, side, at):
    """The layers lo to hi that are tiled: from `at` on, in the encoder up to it."""
    return (at, len(layers)) if side == "decoder" else (0, at)


def groups(chunks, size):
    """Lists of `size` chunks, each with whether it is the last."""
    held = []
    for chunk in chunks:
        if len(held) == size:
            yield held, False
            held = []
        held.append(chunk)
    if held:
        yield held, True


# ------------------------------------------------------------------------------- memory


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that are created while it is on, and their peak.

    A convolution is charged a copy of its input and output on top: libraries rearrange
    both into the layout that their kernels want.
    """

    @classmethod
    def _should_skip_dynamo(cls):
        """Torch's compiler need not know it: it would be imported, 2 s."""
        return False

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        for t in tensors(out):
            storage = t.untyped_storage()
            if storage._cdata not in known:  # else a view, or in place
                known.add(storage._cdata)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        if func in CONVOLUTIONS:
            self.peak = max(self.peak, self.alive + bytes_of((args[0], out)))
        return out

    def add(self, n):
        self.alive += n
        self.peak = max(self.peak, self.alive)


CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.mkldnn_convolution.default)


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def bytes_of(tree):
    return sum(t.numel() * t.itemsize for t in tensors(tree))


class Cost(NamedTuple):
    """Bytes of one call of a layer, for each latent cell of its frame."""

    input: float
    output: float
    state: float
    work: float  # peak of what the call creates: temporary tensors, output and new state


class Layer(NamedTuple):
    ops: tuple
    whole: bool  # sees the whole frame
    first: Cost  # of the first call of a video
    later: Cost


@lru_cache
def costs(kind, config, side, dtype):
    """What the layers of `kind(config).encoder` or `.decoder` (side) need -> [Layer].

    Two calls are run under a `Meter`, over 8x8 cells on the meta device, where tensors
    have shapes and no numbers; it knows no layer by name. A network of at most 16
    million parameters really runs, over 2x2 cells: with the meta device torch would
    import its compiler first, 2 s.
    """
    with torch.device("meta"):
        net = getattr(kind(config).to(dtype), side).requires_grad_(False)
    small = sum(p.numel() for p in net.parameters()) <= 2**24
    device, cells = ("cpu", 2) if small else ("meta", 8)
    allocate(net, device)
    for p in net.parameters():
        p.zero_()
    layers = net.layers
    calls, states = [[], []], [None] * len(layers)
    for call in calls:
        if side == "decoder":
            shape = config.latent_channels, config.latent_chunk, cells, cells
        else:
            frames = config.piece - (config.temporal_factor - config.lead) * (call is calls[0])
            shape = 3, frames, cells * config.spatial_factor, cells * config.spatial_factor
        x = torch.empty(1, *shape, dtype=dtype, device=device)
        for i, layer in enumerate(layers):
            with Meter() as meter, torch.no_grad():
                y, states[i] = layer(x, states[i])
            n = cells**2
            call.append(Cost(bytes_of(x) / n, bytes_of(y) / n, bytes_of(states[i]) / n,
                             meter.peak / n))
            x = y
    found = []
    for layer, first, later in zip(layers, *calls):
        whole = any(hasattr(m, "whole_frame") for m in layer.modules())
        found.append(Layer(tuple(axis_ops(layer)), whole, first, later))
    return found


def run_peak(layers, areas, calls, together=1):
    """`run`, called `calls` times, with layers whose frames have `areas` latent cells
    -> bytes at its peak, and of the states it leaves.

    together: of `areas`, so many are chunks of the same cells in a call, which share a
    state.
    """
    states, peak = 0, 0
    for layer, area in zip(layers, areas):
        peak = max(peak, states + (layer.first.input + layer.first.work) * area)
        states += layer.first.state * area / together
    if calls > 1:  # from the second call on, the states of all layers are there all the time
        for layer, area in zip(layers, areas):
            peak = max(peak, states + (layer.later.input + layer.later.work) * area)
    return peak, states


def peak(net, side, shape, tile=None, dtype=torch.float32, at=None):
    """Estimated peak bytes of `encode_stream` or `decode_stream` (side: "encoder",
    "decoder") for a latent of shape (t, h, w), batch 1, beside the weights: tensors,
    and the workspace of convolutions, for a consumer that keeps no more than one chunk.
    at: the layer where the network is cut (default: as `cut` chooses)."""
    if not hasattr(net.config, "latent_chunk"):  # another library's: it does not stream
        return net.peak(side, shape, dtype)
    layers, (t, h, w) = costs(type(net), net.config, side, dtype), shape
    calls = math.ceil(t / net.config.latent_chunk)
    if tile is None:
        together = min(calls, net.chunks_at_once(h, w)) if side == "decoder" else 1
        calls, area = math.ceil(calls / together), h * w * together
        # What went in is there all the while, and the consumer may hold what came out
        # before.
        held = layers[0].later.input + layers[-1].later.output * (calls > 1)
        return round(run_peak(layers, [area] * len(layers), calls, together)[0] + held * area)
    at = cut(net, side, shape, tile, dtype) if at is None else at
    return tiled_peak(net, side, layers, calls, (h, w), tile, at)


def tiled_peak(net, side, layers, calls, cells, tile, at):
    """`peak` with tiles: what is held between deep and shallow layers, plus the larger
    of two peaks: of the deep layers, and of the shallow ones' largest window."""
    c, (lo, hi), (h, w) = net.config, shallow_layers(layers, side, at), cells
    ops = [layer.ops for layer in layers]
    pixels = scales(ops, c.spatial_factor if side == "encoder" else 1)
    size, end = (h * pixels[lo], w * pixels[lo]), [n * pixels[hi] for n in tile]
    rows, columns = tile_spans(ops[lo:hi], size, end)
    areas = []
    for a, b, n in zip(longest(rows), longest(columns), pixels[lo:hi]):
        areas.append(a * b / n**2)
    tile_peak, tile_states = run_peak(layers[lo:hi], areas, calls)
    grouped = min(calls, max(1, GROUP // c.latent_chunk))
    waiting = 0
    if calls > grouped and next(net.parameters()).device.type == "cpu":
        waiting = tile_states * len(rows) * len(columns)  # else in the memory of the host

    def held(i, n):  # n chunks of what enters layer i, or leaves the last one
        if i < len(layers):
            first, later = layers[i].first.input, layers[i].later.input
        else:
            first, later = layers[-1].first.output, layers[-1].later.output
        return (first + (n - 1) * later) * h * w

    deep = layers[:lo] + layers[hi:]
    deep_peak, deep_states = run_peak(deep, [h * w] * len(deep), calls)
    if side == "decoder":  # while the deep layers make the last chunk, the others wait
        deep_peak += held(lo, grouped) - held(lo, 1)
    else:
        deep_peak += held(hi, grouped)
        deep_states *= calls > grouped
    shallow_peak = deep_states + held(lo, grouped) + held(hi, grouped) + tile_peak
    return round(waiting + max(deep_peak, shallow_peak))


def longest(axis):
    """The row_spans of all tiles -> of each layer, the rows of the tile that needs most."""
    found = []
    for spans in zip(*axis):
        found.append(max(b - a for a, b in spans))
    return found


def cut(net, side, shape, tile, dtype):
    """Where to part deep and tiled layers -> `at` of `peak`: the deepest halo costs
    most arithmetic, so the change of resolution with the smallest halo among those
    whose peak is within 5 % of the best."""
    layers, peaks = costs(type(net), net.config, side, dtype), {}
    n = len(layers)
    for at in range(n) if side == "decoder" else range(n, 0, -1):  # largest halo first
        lo, hi = shallow_layers(layers, side, at)
        border = layers[lo if side == "decoder" else hi - 1]
        if scale_of(border.ops) != 1 and not any(layer.whole for layer in layers[lo:hi]):
            peaks[at] = peak(net, side, shape, tile, dtype, at)
    least = min(peaks.values())
    return [at for at, needs in peaks.items() if needs <= 1.05 * least][-1]


def choose(net, shape, budget, dtype=torch.float32, side="decoder"):
    """The largest tile whose estimated peak fits into `budget` bytes: None (whole
    frames), or (rows, columns) in latent cells. Where none fits: the one that needs
    least.

    shape: (t, h, w) of the latent, batch 1. Tiles come from halving the longer side,
    down to 128 pixels: with smaller ones nearly all the arithmetic goes into halos.
    """
    if not hasattr(net.config, "latent_chunk"):  # another library's: it does not stream
        return None
    rows, columns = shape[1:]
    needs, tile = {}, None
    while True:
        needs[tile] = peak(net, side, shape, tile, dtype)
        if needs[tile] <= budget:
            return tile
        if max(rows, columns) * net.config.spatial_factor <= 128:
            return min(needs, key=needs.get)
        if rows > columns:
            rows = -(-rows // 2)
        else:
            columns = -(-columns // 2)
        tile = rows, columns
