"""Exact spatial tiling: decode (or encode) a large frame in the memory of a small one, without a seam and without blending.

A pixel of the decoder's output depends on a patch of the latent only: every 3x3 convolution looks one position further to each side, every
enlargement by r divides positions by r. Walk through the layers from the end to the start, and the rows [a, b) that are wanted at the
output become the rows that are needed at the input of each layer:

    3x3 convolution           [a, b)  <-  [a - 1, b + 1)
    enlargement by r          [a, b)  <-  [floor(a / r), ceil(b / r))
    reduction by r            [a, b)  <-  [a r, b r)

cut off at the borders of the frame, where the zero padding of the convolutions is the true one. So a tile is decoded from a window that is
larger by a *halo*; what is wrong near an inner border of the window never reaches the tile, and the window is trimmed to what is still
needed after each layer. The result is the untiled one, to rounding.

The deeper a layer, the more latent cells its halo spans, and an attention over the whole frame needs all of it. But deep layers are
small. So the network is cut in two at a change of resolution: the deep layers run whole, the shallow ones, where nearly all the
memory goes, are swept tile by tile. Where to cut follows from an estimate of the peak (`peak`); so does the tile (`choose`).

    latent --deep layers, whole--> features --window--> shallow layers --> tile

Time is the inner loop: `GROUP` latent frames go through the deep layers, then each tile goes through all of them before the next tile is
begun, so the streaming state of one tile only is in use at a time. For longer videos the others wait in the memory of the host.

The estimate is itself a run: `Meter` counts the bytes that are alive, for large networks on the meta device, where tensors have shapes and no
numbers. It takes half a second and knows no layer by name.

    python -m gpu.tiling           peak memory against tile size, measured and estimated -> results/tiling.json (6 minutes on one core)
"""
import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
import weakref
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from files import ROOT, checkpoint

GROUP = 32  # latent frames whose features are held at once: 128 frames of video


# ---------------------------------------------------------------------------------------------------- what depends on what


def steps(module):
    """What a module does to positions along an axis, in order: (kernel, stride, padding) of a convolution, or a zoom factor.

    Modules that change the resolution otherwise say so: `zoom` is 2 where sides are doubled, 1/2 where they are halved.
    """
    if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
        yield module.kernel_size[-1], module.stride[-1], module.padding[-1]
    for child in module.children():
        yield from steps(child)
    if getattr(module, "zoom", 1) != 1:
        yield module.zoom


def path(layers):
    """The steps of every layer."""
    return [tuple(steps(layer)) for layer in layers]


def zoom(*path):
    """Steps of layers -> positions that come out for each that goes in, along an axis."""
    return math.prod(1 / s[1] if isinstance(s, tuple) else s for layer in path for s in layer)


def needed(layer, a, b, size):
    """Rows [a, b) of a layer's output -> the rows of its input, of which there are `size`, that they depend on."""
    r = max(1, round(1 / zoom(layer)))
    for s in reversed(layer):
        if isinstance(s, tuple):
            kernel, stride, padding = s
            a, b = a * stride - padding, (b - 1) * stride - padding + kernel
        else:
            a, b = math.floor(a / s), math.ceil(b / s)
    return max(a // r * r, 0), min(-(-b // r) * r, size)  # a reduction by r keeps its grid


def spans(path, size, a, b):
    """Rows [a, b) of the last layer's output -> the rows that are needed of every layer's input, in order, and [a, b) itself."""
    sizes = [size]
    for layer in path:
        sizes.append(round(sizes[-1] * zoom(layer)))
    found = [(a, min(b, sizes[-1]))]
    for layer, n in zip(reversed(path), reversed(sizes[:-1])):
        found.append(needed(layer, *found[-1], n))
    return found[::-1]


def grid(config, side, path):
    """Positions per latent cell, along an axis, at the input of every layer of the encoder or decoder (side), and at the end."""
    found = [config.spatial_factor if side == "encoder" else 1]
    for layer in path:
        found.append(round(found[-1] * zoom(layer)))
    return found


def tiles(path, size, tile):
    """Cut the last layer's output into tiles of `tile` -> (spans of every row of tiles, spans of every column). `size`: of the first input."""
    return [[spans(path, n, a, a + t) for a in range(0, round(n * zoom(*path)), t)] for n, t in zip(size, tile)]


# ---------------------------------------------------------------------------------------------------- running


def run(layers, x, states, window=None):
    """One piece of a video through streaming layers -> y. window: (row spans, column spans), or None for the whole frame.

    states: a list, one for each layer (None at the start of a video). Each is replaced at once, so that old and new do not pile up.
    """
    for i, layer in enumerate(layers):
        x = x if window is None else trim(x, layers, window, i)
        x, states[i] = layer(x, states[i])
    return x if window is None else trim(x, layers, window, len(layers))


def trim(x, layers, window, i):
    """What comes out of layer i - 1, cut to what layer i needs. A copy, so that the rest is freed."""
    z = zoom(tuple(steps(layers[i - 1]))) if i else 0
    top, left = (round(axis[max(i - 1, 0)][0] * z) for axis in window)  # where x begins in the frame
    (a, b), (c, d) = (axis[i] for axis in window)
    return x[..., a - top : b - top, c - left : d - left].contiguous()


def sweep(layers, pieces, tile, waiting, last):
    """Consecutive `pieces` of a video through `layers`, tile by tile -> list of what they become.

    waiting: {tile: its states} between groups of pieces, kept by the caller; after the `last` they are dropped.
    """
    out, here, size = [], path(layers), pieces[0].shape[3:]
    rows, columns = tiles(here, size, tile)
    for window in ((r, c) for r in rows for c in columns):
        (a, b), (c, d) = (axis[-1] for axis in window)
        states = tree_map_only(torch.Tensor, lambda s: s.to(pieces[0].device), waiting.pop((a, c), [None] * len(layers)))
        for i, x in enumerate(pieces):
            y = run(layers, x, states, window)
            if i == len(out):
                out.append(y.new_empty(*y.shape[:3], *(round(n * zoom(*here)) for n in size)))
            out[i][..., a:b, c:d] = y
            del y  # before the next one is made
        if not last:
            waiting[a, c] = tree_map_only(torch.Tensor, lambda s: s.cpu(), states)
    return out


def stream(net, side, pieces, tile=None):
    """Consecutive pieces of a video through `net.decoder` or `net.encoder` (side: its name) -> generator of what they become.

    Each piece has as many frames as the layers take in a call. tile: (rows, columns) in latent cells, None for whole frames.
    """
    layers = getattr(net, side).layers
    states, waiting = [None] * len(layers), {}
    if tile is None:
        for x in pieces:
            yield run(layers, x, states)
        return
    at, p = None, grid(net.config, side, path(layers))
    for group, last in groups(pieces, max(1, GROUP // net.config.latent_chunk)):
        if at is None:
            h, w = (n // p[0] for n in group[0].shape[3:])
            at = cut(net, side, (len(group) * net.config.latent_chunk, h, w), tile, group[0].dtype)
        lo, hi = swept(layers, side, at)
        deep = layers[:lo] + layers[hi:]
        if side == "decoder":
            group[:] = [run(deep, x, states) for x in group]
        group[:] = sweep(layers[lo:hi], group, [n * p[hi] for n in tile], waiting, last)  # in place: what went in is freed
        while group:
            x = group.pop(0)
            yield x if side == "decoder" else run(deep, x, states)


def swept(layers, side, at):
    """The layers lo to hi that are tiled: in the decoder from `at` on, in the encoder up to there."""
    return (at, len(layers)) if side == "decoder" else (0, at)


def groups(pieces, size):
    """Lists of `size` pieces, each with whether it is the last."""
    held = []
    for piece in pieces:
        if len(held) == size:
            yield held, False
            held = []
        held.append(piece)
    if held:
        yield held, True


# ---------------------------------------------------------------------------------------------------- memory


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that are created while it is on, and their peak.

    A convolution is charged a copy of its input and output on top: libraries rearrange both into the layout that their kernels want.
    """

    @classmethod
    def _should_skip_dynamo(cls):
        """Torch's compiler need not know this class: it would be imported for that, 2 s. (Versions without this question need no answer.)"""
        return False

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        for storage in {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors(out)}.values():
            if storage._cdata not in given:  # else a view, or in place
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.mkldnn_convolution.default):
            self.peak = max(self.peak, self.alive + sum(t.numel() * t.itemsize for t in (args[0], out)))
        return out

    def add(self, n):
        self.alive += n
        self.peak = max(self.peak, self.alive)


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
    steps: tuple
    whole: bool  # sees the whole frame
    first: Cost  # of the first call of a video
    later: Cost


@lru_cache
def costs(kind, config, side, dtype):
    """What the layers of `kind(config).encoder` or `.decoder` (side) need, measured on the meta device over 8x8 latent cells -> [Layer].

    A network of at most 16 million parameters really runs, over 2x2 cells: on the meta device torch would import its compiler first, 2 s.
    """
    f = config.spatial_factor
    with torch.device("meta"):
        net = getattr(kind(config).to(dtype), side).requires_grad_(False)
    device, cells = ("cpu", 2) if sum(p.numel() for p in net.parameters()) <= 2**24 else ("meta", 8)
    with torch.device(device), torch.no_grad():
        net.to_empty(device=device)
        for p in net.parameters():
            p.zero_()
        layers = net.layers
        calls, states = [[], []], [None] * len(layers)
        for i, call in enumerate(calls):
            if side == "decoder":
                x = torch.empty(1, config.latent_channels, config.latent_chunk, cells, cells, dtype=dtype)
            else:
                frames = config.latent_chunk * config.temporal_factor - (config.temporal_factor - config.lead) * (i == 0)
                x = torch.empty(1, 3, frames, cells * f, cells * f, dtype=dtype)
            for j, layer in enumerate(layers):
                with Meter() as meter:
                    y, states[j] = layer(x, states[j])
                call.append(Cost(*(n / cells**2 for n in (bytes_of(x), bytes_of(y), bytes_of(states[j]), meter.peak))))
                x = y
    return [Layer(tuple(steps(layer)), any(getattr(m, "whole_frame", False) for m in layer.modules()), *pair)
            for layer, *pair in zip(layers, *calls)]


def run_peak(layers, areas, calls, together=1):
    """`run`, called `calls` times, with layers whose frames have `areas` latent cells -> bytes at its peak, and of the states it leaves.

    together: of `areas`, so many are chunks of the same cells in one call, which share a state.
    """
    states, peak = 0, 0
    for layer, area in zip(layers, areas):
        peak = max(peak, states + (layer.first.input + layer.first.work) * area)
        states += layer.first.state * area / together
    if calls > 1:  # from the second call on, the states of all layers are there all the time
        peak = max(peak, *(states + (layer.later.input + layer.later.work) * area for layer, area in zip(layers, areas)))
    return peak, states


def peak(net, side, shape, tile=None, dtype=torch.float32, at=None):
    """Estimated peak bytes of `stream` for a latent of shape (t, h, w), batch 1: tensors beside the weights, and the workspace of convolutions.

    It holds for a consumer that keeps no more than one piece. at: the layer where the network is cut; default: as `cut` chooses.
    """
    c, (t, h, w) = net.config, shape
    layers = costs(type(net), c, side, dtype)
    calls = math.ceil(t / c.latent_chunk)
    if tile is None:  # all the while, the piece that went in is there, and the consumer may still hold the one before
        together = min(calls, getattr(net, "chunks_at_once", lambda h, w: 1)(h, w)) if side == "decoder" else 1
        calls, area = math.ceil(calls / together), h * w * together
        return round(run_peak(layers, [area] * len(layers), calls, together)[0]
                     + (layers[0].later.input + layers[-1].later.output * (calls > 1)) * area)
    at = cut(net, side, shape, tile, dtype) if at is None else at
    lo, hi = swept(layers, side, at)
    steps = [layer.steps for layer in layers]
    p = grid(c, side, steps)
    axes = tiles(steps[lo:hi], (h * p[lo], w * p[lo]), [n * p[hi] for n in tile])
    rows, columns = ([max(b - a for a, b in inputs) for inputs in zip(*axis)] for axis in axes)  # of the largest window, layer by layer
    tile_peak, tile_states = run_peak(layers[lo:hi], [a * b / p[lo + i] ** 2 for i, (a, b) in enumerate(zip(rows[:-1], columns))], calls)
    grouped = min(calls, max(1, GROUP // c.latent_chunk))
    waiting = 0
    if calls > grouped and next(net.parameters()).device.type == "cpu":  # else they wait in the memory of the host
        waiting = tile_states * len(axes[0]) * len(axes[1])

    def held(i, n):  # n pieces of what enters layer i, or leaves the last one
        first, later = ((call.input for call in layers[i][2:]) if i < len(layers) else (call.output for call in layers[-1][2:]))
        return (first + (n - 1) * later) * h * w

    deep = layers[:lo] + layers[hi:]
    deep_peak, deep_states = run_peak(deep, [h * w] * len(deep), calls)
    if side == "decoder":  # while the deep layers make the last piece, the others wait
        deep_peak += held(lo, grouped) - held(lo, 1)
    else:
        deep_peak += held(hi, grouped)
        deep_states *= calls > grouped
    return round(waiting + max(deep_peak, deep_states + held(lo, grouped) + held(hi, grouped) + tile_peak))


def cut(net, side, shape, tile, dtype):
    """Where to part deep and tiled layers -> `at` of `peak`: the deepest halo costs most arithmetic, so the change of resolution with the
    smallest halo among those whose peak is within 5 % of the best."""
    layers = costs(type(net), net.config, side, dtype)
    peaks = {}
    for at in range(len(layers)) if side == "decoder" else range(len(layers), 0, -1):  # from the largest halo to the smallest
        lo, hi = swept(layers, side, at)
        outermost = layers[lo if side == "decoder" else hi - 1]  # of the tiled layers: the one next to the deep ones
        if zoom(outermost.steps) != 1 and not any(layer.whole for layer in layers[lo:hi]):
            peaks[at] = peak(net, side, shape, tile, dtype, at)
    return [at for at, n in peaks.items() if n <= 1.05 * min(peaks.values())][-1]


def choose(net, shape, budget, dtype=torch.float32, side="decoder"):
    """The largest tile whose estimated peak fits into `budget` bytes: None (whole frames), or (rows, columns) in latent cells.

    shape: (t, h, w) of the latent, batch 1. Tiles come from halving the longer side, down to 128 pixels: with smaller ones nearly all the
    arithmetic goes into halos. Where none fits: the one that needs least.
    """
    tile, options = tuple(shape[1:]), [None]
    while max(tile) * net.config.spatial_factor > 128:
        tile = (-(-tile[0] // 2), tile[1]) if tile[0] > tile[1] else (tile[0], -(-tile[1] // 2))
        options.append(tile)
    needs = {}
    for option in options:
        needs[option] = peak(net, side, shape, option, dtype)
        if needs[option] <= budget:
            return option
    return min(needs, key=needs.get)


@lru_cache
def arithmetic(kind, config, side):
    """Multiplications of every layer for one chunk, per latent cell of its frame, counted on the meta device. -> list"""
    from torch.utils.flop_counter import FlopCounterMode

    cells, found = 8, []
    with torch.device("meta"), torch.no_grad():
        f, frames = config.spatial_factor, config.latent_chunk * config.temporal_factor
        latent, pixels = (config.latent_channels, config.latent_chunk, cells, cells), (3, frames, cells * f, cells * f)
        x = torch.empty(1, *(latent if side == "decoder" else pixels))
        for layer in getattr(kind(config), side).layers:
            with FlopCounterMode(display=False) as counter:
                x, _ = layer(x, None)
            found.append(counter.get_total_flops() / 2 / cells**2)
    return found


def extra_work(net, side, shape, tile, dtype=torch.float32):
    """Multiplications with tiles over those without: what the halos cost. 1 for whole frames."""
    if tile is None:
        return 1.0
    (_, h, w), amounts, at = shape, arithmetic(type(net), net.config, side), cut(net, side, shape, tile, dtype)
    lo, hi = swept(amounts, side, at)
    steps = path(getattr(net, side).layers)
    p = grid(net.config, side, steps)
    axes = tiles(steps[lo:hi], (h * p[lo], w * p[lo]), [n * p[hi] for n in tile])
    whole = sum(amounts) * h * w
    deep = (sum(amounts[:lo]) + sum(amounts[hi:])) * h * w
    swept_area = lambda i: math.prod(sum(b - a for a, b in (span[i] for span in axis)) for axis in axes) / p[lo + i] ** 2
    return (deep + sum(amounts[lo + i] * swept_area(i) for i in range(hi - lo))) / whole


# ---------------------------------------------------------------------------------------------------- measuring


def cases():
    """Name -> (network of reduced width, latent shape, tiles). Large enough for the convolutions to take the library's fast path."""
    import ae
    from wan import vae

    narrow = lambda name, **widths: vae.WanVAE(dataclasses.replace(vae.PRESETS[name], **widths))
    return {
        "dc-ae-v": (lambda: ae.DCAEV(ae.Config((0, 64, 128, 128, 256, 256, 256), (0, 2, 3, 1, 1, 1, 1), 32, chunk=16)), (8, 6, 8),
                    [None, (6, 4), (3, 4), (2, 3)]),
        "wan2.1": (lambda: narrow("wan2.1", width=48, decoder_width=48), (3, 24, 32), [None, (24, 16), (12, 16), (12, 8)]),
        "wan2.2": (lambda: narrow("wan2.2", width=40, decoder_width=64), (3, 16, 20), [None, (16, 10), (8, 10), (8, 5)]),
    }


def measure(case, index):
    """Decode once in this process -> dict of what it took. The peak is that of the resident memory, above what it was before."""
    make, shape, options = cases()[case]
    torch.manual_seed(0)
    net, tile = make().eval().requires_grad_(False), options[index]
    memory = lambda field: int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    estimated, z = net.decode_peak(shape, tile), torch.randn(1, net.config.latent_channels, *shape)
    list(net.decode_stream(z[:, :, :1, :1, :1]))  # every library is loaded before it starts
    before, start = memory("VmRSS"), time.process_time()
    for _ in net.decode_stream(z, tile):
        pass
    seconds, measured = time.process_time() - start, memory("VmHWM") - before
    return dict(case=case, latent=shape, tile=tile, cut=tile and cut(net, "decoder", shape, tile, z.dtype), layers=len(net.decoder.layers),
                measured_mib=round(measured / 2**20, 1), estimated_mib=round(estimated / 2**20, 1), ratio=round(estimated / measured, 3),
                cpu_seconds=round(seconds, 1))


def full_size(preset="f32t4c32", frames=40, size=(2160, 3840), dtype=torch.bfloat16):
    """Estimates for one chunk of a large film -> rows: tile, GiB of activations, extra work, of decoder and encoder."""
    import ae

    with torch.device("meta"):
        net = ae.DCAEV(ae.PRESETS[preset])
    shape, rows = net.latent_shape(frames, *size), []
    for tile in (None, *((-(-shape[1] // n), -(-shape[2] // n)) for n in (2, 4, 8))):
        rows.append(dict(preset=preset, frames=frames, size=size, dtype=str(dtype), tile=tile))
        for side in ("decoder", "encoder"):
            rows[-1][f"{side}_gib"] = round(peak(net, side, shape, tile, dtype) / 2**30, 1)
            rows[-1][f"{side}_work"] = round(extra_work(net, side, shape, tile, dtype), 3)
        print("tile {tile!s:9s} decoder {decoder_gib:6.1f} GiB, {decoder_work:.2f} times the work; "
              "encoder {encoder_gib:6.1f} GiB, {encoder_work:.2f} times".format(**rows[-1]), flush=True)
    return rows


def main():
    p = argparse.ArgumentParser(description="Peak memory of decoding against tile size: measured (one process each, one thread) and estimated.")
    p.add_argument("--out", default="results/tiling.json", help="default: %(default)s")
    p.add_argument("--one", nargs=2, metavar=("CASE", "INDEX"), help="one measurement in this process, printed as JSON")
    p.add_argument("--full-size", action="store_true", help="only the estimates for 2160x3840; what --out holds already is kept")
    args = p.parse_args()
    if args.one:
        return print(json.dumps(measure(args.one[0], int(args.one[1]))))
    if args.full_size:
        return checkpoint.write_json(args.out, {**json.loads(Path(args.out).read_text()), "full_size": full_size()})
    # small blocks too go back to the system when they are freed, so that resident memory is memory in use
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    rows = []
    for case, (_, _, options) in cases().items():
        for index in range(len(options)):
            done = subprocess.run([sys.executable, "-m", "gpu.tiling", "--one", case, str(index)], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout))
            print("{case:8s} tile {tile!s:9s} measured {measured_mib:7.1f} MiB  estimated {estimated_mib:7.1f} MiB  ({ratio:.2f})  {cpu_seconds:6.1f} s"
                  .format(**rows[-1]), flush=True)
    checkpoint.write_json(args.out, {**checkpoint.provenance(), "threads": 1, "dtype": "fp32", "runs": rows, "full_size": full_size()})


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
