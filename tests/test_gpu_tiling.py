"""Tiling is exact: a tile and its halo decode to the same pixels as the whole frame, for every autoencoder, cut, tile and length."""
import dataclasses
import math

import pytest
import torch

import ae
from gpu import tiling
from wan import vae


def small(name, **changes):
    return vae.WanVAE(dataclasses.replace(vae.PRESETS[name], width=4, decoder_width=4, **changes))


# A block or two at every resolution; f4 and f8, so that frames have many cells. DC-AE-V: chunks of 2 latent frames.
MAKE = {
    "dc-ae-v": lambda: ae.DCAEV(ae.Config((0, 8, 16, 16, 16), (0, 1, 2, 1, 1), 4, chunk=8)),
    "dc-ae-v causal": lambda: ae.DCAEV(ae.Config((0, 16, 16, 16), (0, 2, 1, 1), 4, chunk=8, patch=4, temporal="causal")),
    "wan2.1": lambda: small("wan2.1", multipliers=(1, 2, 2), temporal=(True, True), depth=1),
    "wan2.2": lambda: small("wan2.2", multipliers=(1, 2, 2), temporal=(True, True), depth=1),
}


@pytest.fixture(scope="module", params=MAKE)
def net(request):
    torch.manual_seed(1)
    net = MAKE[request.param]().requires_grad_(False)
    for p in net.parameters():  # biases and norms too: a wrong border would show
        p.add_(0.1 * torch.randn_like(p))
    return net


def latent(net, t=5, h=5, w=7, batch=1):
    return torch.randn(batch, net.config.latent_channels, t, h, w)


def decode(net, z, tile):
    return torch.cat(list(tiling.decode_stream(net, z, tile)), dim=2)


def encode(net, x, tile):
    return torch.cat(list(tiling.encode_stream(net, [x], tile)), dim=2)


def same(a, b):
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * max(1, b.abs().max()), (a.shape, (a - b).abs().max(), b.abs().max())


def places(net, side):
    """Every layer at which the network can be cut at all: what is tiled must not see the whole frame."""
    layers = tiling.costs(type(net), net.config, side, torch.float32)
    return [at for at in range(len(layers) + 1) if not any(layer.whole for layer in layers[slice(*tiling.shallow_layers(layers, side, at))])]


# ---------------------------------------------------------------------------------------------------- exact


@pytest.mark.core
@pytest.mark.parametrize("tile", [(2, 3), (1, 20), (5, 7)])
def test_tiled_decode_is_the_untiled_one(net, tile):
    """Tiles that do not divide the frame, tiles wider than it, one tile for all; five latent frames, several calls of the layers."""
    z = latent(net)
    same(decode(net, z, tile), net.decode(z))


@pytest.mark.parametrize("tile", [(2, 2), (3, 4)])
def test_tiled_encode_is_the_untiled_one(net, tile):
    """For pictures and clips that are too large to encode whole; sizes that are no multiple of a cell."""
    f = net.config.spatial_factor
    x = torch.rand(1, 3, 9, 4 * f - 3, 6 * f - 5) * 2 - 1
    same(encode(net, x, tile), net.encode(x))


@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_every_cut_gives_the_same(net, side, monkeypatch):
    """Wherever the network is parted into deep and tiled layers."""
    f, z = net.config.spatial_factor, latent(net, 3, 4, 5)
    x = torch.rand(1, 3, 9, 4 * f, 5 * f) * 2 - 1
    code = lambda tile: decode(net, z, tile) if side == "decoder" else encode(net, x, tile)
    whole, tried = code(None), places(net, side)
    assert len(tried) > 3
    for at in tried:
        monkeypatch.setattr(tiling, "cut", lambda *_: at)
        same(code((3, 2)), whole)


def test_streams_batches_and_crops(net):
    """Latents that come in pieces, two videos at once, and the size and number of frames that were asked for."""
    z, c = latent(net, 3, batch=2), net.config
    whole = net.decode(z)
    same(torch.cat(list(tiling.decode_stream(net, z.split([2, 1], dim=2), (3, 4))), dim=2), whole)
    h, w = 5 * c.spatial_factor - 5, 7 * c.spatial_factor - 2
    same(decode(net, z, (3, 4))[:, :, :7, :h, :w], net.decode(z, 7, (h, w)))


def test_longer_videos_hand_the_states_of_all_tiles_on(net, monkeypatch):
    """Groups of two latent frames in place of 32; for the autoencoders with chunks that is one chunk."""
    monkeypatch.setattr(tiling, "GROUP", 2)
    z = latent(net, 7, 3, 4)
    same(decode(net, z, (2, 3)), net.decode(z))
    pieces = [z[:, :, i : i + 1] for i in range(7)]
    read = []
    stream = tiling.decode_stream(net, (read.append(1) or piece for piece in pieces), (2, 3))
    next(stream)
    assert len(read) < 7  # the end of the video is not waited for


# ---------------------------------------------------------------------------------------------------- the halo


@pytest.mark.core
@pytest.mark.parametrize("layer, rows, expected", [
    ([(3, 1, 1)], (4, 8), (3, 9)),  # a 3x3 convolution
    ([(3, 1, 1)], (0, 8), (0, 9)),  # at the border of the frame the window ends there
    ([(1, 1, 0)], (4, 8), (4, 8)),
    ([2, (3, 1, 1)], (4, 8), (1, 5)),  # doubled, then a convolution: rows 3 to 8, which come from 1 to 4
    ([(3, 1, 1), 2], (4, 8), (1, 5)),  # a convolution, then doubled: rows 2 and 3, and one around them
    ([(3, 2, 0)], (4, 8), (8, 18)),  # halved, zeros at the end only: rows 8 to 16, and 17 to keep pairs whole
])
def test_rows_that_a_layer_needs(layer, rows, expected):
    assert tiling.needed_rows(tuple(layer), *rows, 20) == expected


def test_the_halo_of_the_published_decoder():
    """f32t4c32: the 11 convolutions at half the pixel rate, then 20 blocks of convolutions at a quarter, ... down to the latent."""
    with torch.device("meta"):
        layers = tiling.layer_ops(ae.DCAEV(ae.PRESETS["f32t4c32"]).decoder.layers)
    found = tiling.row_spans(layers, 1000, 16000, 16032)[0]  # the pixels of latent cell 500
    halo, convolutions = 0, [("1/2", 1 + 10), ("1/4", 1 + 20), ("1/8", 1 + 8), ("1/16", 1 + 8), ("1/32", 1 + 8 + 1 + 8 + 1)]
    for i, (_, n) in enumerate(convolutions):
        halo = (math.ceil(halo / 2) if i else 0) + n
    assert found == (500 - halo, 501 + halo)


@pytest.mark.core
def test_the_halo_is_what_reaches_the_tile_and_no_more(net):
    """The outermost rows of the window change the tile, the rows beyond do not."""
    if any(layer.whole for layer in tiling.costs(type(net), net.config, "decoder", torch.float32)):
        layers, f = net.decoder.layers[places(net, "decoder")[0] :], 1
    else:
        layers, f = net.decoder.layers, 1
    ops = tiling.layer_ops(layers)
    size, at = 60, 30
    scale = tiling.scales(ops, size)[-1] / size
    a, b = round(at * scale), round((at + 1) * scale)
    lo, hi = tiling.row_spans(ops, size, a, b)[0]
    assert 0 < lo < at and at + 1 < hi < size
    channels = [m for m in layers[0].modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))][0].in_channels
    frames = 2 if isinstance(net, ae.DCAEV) and len(layers) == len(net.decoder.layers) else 1
    x = torch.randn(1, channels, frames, size, 2).requires_grad_()
    y = tiling.run(layers, x, [None] * len(layers))
    touched = torch.autograd.grad(y[..., a:b, :].square().sum(), x)[0].abs().amax(dim=(0, 1, 2, 4)).nonzero().flatten()
    assert (touched.min(), touched.max() + 1) == (lo, hi)


# ---------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("side, tile", [("decoder", None), ("decoder", (3, 4)), ("decoder", (2, 7)), ("encoder", (3, 4))])
def test_the_estimate_is_what_a_run_creates(net, side, tile):
    """The estimate comes from shapes alone; here a real run is counted, tensor by tensor."""
    z, c = latent(net, 6), net.config
    x = torch.rand(1, 3, c.lead + 5 * c.temporal_factor, 5 * c.spatial_factor, 7 * c.spatial_factor)
    estimate = tiling.peak(net, side, tuple(z.shape[2:]), tile)
    with tiling.Meter() as meter:
        for _ in tiling.decode_stream(net, z, tile) if side == "decoder" else tiling.encode_stream(net, [x], tile):
            pass
    assert estimate == pytest.approx(meter.peak, rel=0.07)


PUBLISHED = {
    "wan2.1 720p": (vae.WanVAE, vae.PRESETS["wan2.1"], (21, 90, 160)),
    "wan2.2 704p": (vae.WanVAE, vae.PRESETS["wan2.2"], (31, 44, 80)),
    "f32t4c32 704p": (ae.DCAEV, ae.PRESETS["f32t4c32"], (20, 22, 40)),
    "f32t4c32 2176p": (ae.DCAEV, ae.PRESETS["f32t4c32"], (20, 68, 120)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_choose_takes_the_largest_tile_that_fits(name):
    """The published models at published sizes, without holding anything: no weights, no frames."""
    make, config, shape = PUBLISHED[name]
    with torch.device("meta"):
        net = make(config)
    need = lambda tile: tiling.peak(net, "decoder", shape, tile, torch.bfloat16)
    assert tiling.choose(net, shape, 1e15, torch.bfloat16) is None
    budget = 0.4 * need(None)
    tile = tiling.choose(net, shape, budget, torch.bfloat16)
    wider = (tile[0] * 2, tile[1]) if tile[0] < tile[1] else (tile[0], tile[1] * 2)
    assert need(tile) <= budget < need(wider) < need(None) < tiling.peak(net, "decoder", shape, None, torch.float32)
    least = tiling.choose(net, shape, 0, torch.bfloat16)  # nothing fits: the caller says so, with a number
    assert 0 < need(least) < need(tile)
