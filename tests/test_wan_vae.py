"""The Wan autoencoders: equal to the released programs number by number, exact however a video is cut, both spellings of the files."""
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import golden
from files import checkpoint
from files.checkpoint import UserError
from tiny_layouts import write_vae
from wan import vae

NAMES = {"wan2.1": "wan_vae_tiny", "wan2.2": "wan22_vae_tiny"}
GOLDEN = {name: load_file(golden(f"{file}.safetensors")) for name, file in NAMES.items()}
NOTES = {name: json.loads(golden(f"{file}.json").read_text()) for name, file in NAMES.items()}


def weights(name):
    """The reference weights, original names."""
    return {k.removeprefix("weights/"): v for k, v in GOLDEN[name].items() if k.startswith("weights/")}


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def net(name):
    return vae.from_state_dict(weights(name))


def renamed(net):
    """State dict with diffusers' names."""
    return {vae.diffusers_name(name, net.config): value for name, value in net.state_dict().items()}


def clip(net, frames, rows=2, columns=3, batch=1):
    f = net.config.spatial_factor
    return torch.rand(batch, 3, frames, rows * f, columns * f) * 2 - 1


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance, (a.shape, b.shape, (a - b).abs().max())


# ---------------------------------------------------------------------------------------------------- the reference tensors


@pytest.mark.core
def test_reference_encode_and_decode(net, name):
    data, stride = GOLDEN[name], NOTES[name].get("stride", 1)  # the shipped cut holds every 5th pixel of what comes out
    close(net.encode(data["in/video"]), data["out/latent"])
    close(net.decode(data["in/latent"])[..., ::stride, ::stride], data["out/decoded"])
    if "out/decoded_roundtrip" in data:
        close(net.decode(data["out/latent"]), data["out/decoded_roundtrip"])


def test_reference_image():
    """A video of one frame, and the first frame of a latent: the same as in the longer video."""
    net, data, stride = vae.from_state_dict(weights("wan2.1")), GOLDEN["wan2.1"], NOTES["wan2.1"].get("stride", 1)
    close(net.encode(data["in/video"][:, :, :1]), data["out/latent_T1"])
    close(net.decode(data["in/latent"][:, :, :1])[..., ::stride, ::stride], data["out/decoded_T1"])


def test_reference_image_condition():
    """Image-to-video sees a picture as the first frame of a grey video, encoded; channels 4 to 19 of the condition (spec wan 7.2)."""
    net, data = vae.from_state_dict(weights("wan2.1")), GOLDEN["wan2.1"]
    image = data["out/i2v_image_resized"][None, :, None]
    close(net.encode(torch.cat([image, torch.zeros(1, 3, 8, *image.shape[3:])], dim=2))[0], data["out/i2v_condition"][4:])


def test_the_config_is_inferred_and_the_constants_are_the_published_ones(net, name):
    c, published, notes = net.config, vae.PRESETS[name], NOTES[name]
    width = notes["config"]["dim"]
    assert c == dataclasses.replace(published, width=width, decoder_width=notes["config"].get("dec_dim", width))
    assert c.mean == tuple(notes["mean"]) and c.std == tuple(notes["std"])
    assert (c.spatial_factor, c.temporal_factor, c.lead, c.scale) == ({"wan2.1": 8, "wan2.2": 16}[name], 4, 1, 1.0)


@pytest.mark.parametrize("name, parameters, tensors", [("wan2.1", 126_892_531, 194), ("wan2.2", 704_688_668, 196)])
def test_the_published_sizes(name, parameters, tensors):
    with torch.device("meta"):
        net = vae.WanVAE(vae.PRESETS[name])
    assert sum(p.numel() for p in net.parameters()) == parameters and len(net.state_dict()) == tensors
    assert vae.infer_config(net.state_dict()) == vae.infer_config(renamed(net)) == vae.PRESETS[name]


# ---------------------------------------------------------------------------------------------------- exact in every cut


def raw(net, z):
    """A normalised latent -> what the decoder takes."""
    return net.conv2(z * net._constant("std", z) + net._constant("mean", z))


@pytest.mark.core
def test_streaming_is_the_whole_clip(net, name):
    """All frames in one call, or the first latent frames and then the others with the state handed on, give the same."""
    x, z = clip(net, 13), GOLDEN[name]["in/latent"]
    whole, _ = net.encoder(x)
    first, state = net.encoder(x[:, :, :5])
    close(torch.cat([first, net.encoder(x[:, :, 5:], state)[0]], dim=2), whole)
    moments = net.conv1(whole)[:, : net.config.latent_channels]
    close(net.encode(x), (moments - net._constant("mean", x)) / net._constant("std", x))

    whole, _ = net.decoder(raw(net, z))
    first, state = net.decoder(raw(net, z[:, :, :2]))
    close(torch.cat([first, net.decoder(raw(net, z[:, :, 2:]), state)[0]], dim=2), whole)
    close(net.decode(z), whole)


@pytest.mark.parametrize("cuts", [[9], [1] * 9, [3, 4, 2], [5, 4]])
def test_streams_may_be_cut_anywhere(net, cuts):
    x = clip(net, 9)
    z = net.encode(x)
    assert torch.equal(torch.cat(list(net.encode_stream(x.split(cuts, dim=2))), dim=2), z)
    pieces = list(net.decode_stream(z.split([1, 2], dim=2)))
    assert [y.shape[2] for y in pieces] == [1, 4, 4] and torch.equal(torch.cat(pieces, dim=2), net.decode(z))


def test_streams_are_lazy(net):
    """A latent frame comes out as soon as its four frames have gone in: the memory of a film is that of four frames."""
    read = []

    def film():
        while True:
            read.append(1)
            yield clip(net, 1, 1, 1)

    frames = net.decode_stream(net.encode_stream(film()))
    assert next(frames).shape[2] == 1 and len(read) == 1
    assert next(frames).shape[2] == 4 and len(read) == 5


@pytest.mark.core
def test_causality(net):
    """A latent frame depends on its own four frames and the past, a decoded frame on its latent frame and the past."""
    x = clip(net, 13)
    z, nudged = net.encode(x), x.clone()
    nudged[:, :, 8] += 0.5  # the last frame of latent frame 2
    change = (net.encode(nudged) - z).abs().amax(dim=(0, 1, 3, 4))
    assert (change[:2] == 0).all() and (change[2:] > 0).all()
    assert torch.equal(net.encode(x[:, :, :9]), z[:, :, :3]) and torch.equal(net.decode(z[:, :, :2]), net.decode(z)[:, :, :5])


@pytest.mark.parametrize("frames, latent_frames", [(1, 1), (2, 2), (4, 2), (5, 2), (6, 3)])
def test_any_number_of_frames(net, frames, latent_frames):
    """Padded to 1 + 4k by repeating the last frame, cropped when decoded."""
    x = clip(net, frames)
    padded = torch.cat([x] + [x[:, :, -1:]] * (-(frames - 1) % 4), dim=2)
    z = net.encode(x)
    assert z.shape[2:] == net.latent_shape(*x.shape[2:]) == (latent_frames, 2, 3)
    assert torch.equal(z, net.encode(padded)) and torch.equal(net(x), net.decode(z)[:, :, :frames])


@pytest.mark.parametrize("height, width", [(1, 1), (15, 33)])
def test_any_size(net, height, width):
    """Padded by repeating the edge, cropped when decoded."""
    f, x = net.config.spatial_factor, torch.rand(1, 3, 5, height, width) * 2 - 1
    rows, columns = (torch.arange(-(-n // f) * f).clamp(max=n - 1) for n in (height, width))
    z = net.encode(x)
    assert z.shape[2:] == net.latent_shape(5, height, width) and torch.equal(z, net.encode(x[:, :, :, rows][..., columns]))
    assert net(x).shape == x.shape


def test_a_batch_is_its_clips(net):
    x = clip(net, 5, batch=2)
    close(net.encode(x), torch.cat([net.encode(x[:1]), net.encode(x[1:])]), 5e-5)
    close(net(x), torch.cat([net(x[:1]), net(x[1:])]), 5e-5)


def test_bf16_is_close_to_fp32(net, name):
    half, x = vae.from_state_dict(weights(name)).to(torch.bfloat16), clip(net, 5)
    z = net.encode(x)
    for ours, exact in ((half.encode(x), z), (half.decode(z), net.decode(z))):
        assert ours.dtype == torch.bfloat16 and (ours.float() - exact).norm() / exact.norm() < 0.05


def test_wrong_layouts_are_named(net):
    with pytest.raises(UserError, match=r"\[batch, 3, frames, height, width\], got the shape \[1, 5, 3, 32, 48\]"):
        net.encode(torch.zeros(1, 5, 3, 32, 48))
    with pytest.raises(UserError, match="frames, height, width"):
        net.decode(torch.zeros(1, 7, 1, 2, 2))


# ---------------------------------------------------------------------------------------------------- files


def test_diffusers_names_are_the_published_ones(net, name):
    assert {k: vae.diffusers_name(k, net.config) for k in net.state_dict()} == NOTES[name]["official_to_diffusers"]


def test_every_kind_of_file_gives_the_same_model(net, name, tmp_path):
    """Original .pth, bare or in a container, .safetensors in both spellings, a diffusers folder."""
    sd, theirs = weights(name), renamed(net)
    torch.save(sd, tmp_path / "vae.pth")
    torch.save({"state_dict": sd}, tmp_path / "container.pth")
    checkpoint.save_tensors(tmp_path / "original.safetensors", sd)
    checkpoint.save_tensors(tmp_path / "diffusers.safetensors", theirs)
    checkpoint.save_tensors(tmp_path / "bf16.safetensors", {k: v.bfloat16() for k, v in sd.items()})
    write_vae(tmp_path / "folder", net)
    for file in ("vae.pth", "container.pth", "original.safetensors", "diffusers.safetensors", "folder"):
        loaded = vae.load(tmp_path / file)
        assert loaded.config == net.config and not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert all(torch.equal(v, sd[k]) for k, v in loaded.state_dict().items()), file
    assert all(torch.equal(v, sd[k].bfloat16().float()) for k, v in vae.load(tmp_path / "bf16.safetensors").state_dict().items())


def test_other_sizes_and_constants(tmp_path):
    """Levels, depth, latent channels and temporal flags come from the shapes, the constants from a folder's config.json."""
    config = vae.Config(4, 6, 3, patch=1, shortcuts=True, mean=(0.5, 0, -1), std=(2, 1, 3), multipliers=(1, 2, 2), depth=1,
                            temporal=(True, False))
    net = vae.WanVAE(config).eval()
    write_vae(tmp_path, net)
    loaded = vae.load(tmp_path)
    assert loaded.config == config
    x = torch.rand(1, 3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.encode(x), net.encode(x)) and net(x).shape == x.shape
    with pytest.raises(UserError, match="mean and std of 3 latent channels"):
        vae.load(tmp_path / "diffusion_pytorch_model.safetensors")


def test_wrong_files_are_refused(tmp_path):
    sd = weights("wan2.1")
    cut = {k: v for k, v in sd.items() if k != "decoder.middle.1.proj.bias"}
    with pytest.raises(UserError, match=r"1 missing \(first: decoder.middle.1.proj.bias\)"):
        vae.from_state_dict(cut)
    with pytest.raises(UserError, match=r"1 unexpected \(first: extra\)"):
        vae.from_state_dict({**sd, "extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"conv1.weight has shape \[32, 16, 3, 3, 3\], expected \[64, 16, 3, 3, 3\]"):
        vae.from_state_dict({**sd, "decoder.head.2.weight": torch.zeros(3, 16, 3, 3, 3)})
    for no_vae in ({"blocks.0.ffn.0.weight": torch.zeros(2, 2)}, {"encoder.conv1.weight": torch.zeros(8, 3, 3, 3)}):
        with pytest.raises(UserError, match="no Wan autoencoder"):
            vae.from_state_dict(no_vae)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no weight file"):
        vae.load(tmp_path / "empty")


# ---------------------------------------------------------------------------------------------------- the peer


@pytest.mark.peer
def test_diffusers_agrees(net, name, tmp_path):
    """In diffusers' layout it loads strictly there and gives the same latents and pixels."""
    peer_class = pytest.importorskip("diffusers").AutoencoderKLWan
    write_vae(tmp_path, net)
    peer, info = peer_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert peer.config.scale_factor_spatial == net.config.spatial_factor
    x, z = clip(net, 9, 4, 5), GOLDEN[name]["in/latent"]
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (peer.config.latents_mean, peer.config.latents_std))
    with torch.no_grad():
        close(net.encode(x), (peer.encode(x).latent_dist.mode() - mean) / std)
        close(net.decode(z).clamp(-1, 1), peer.decode(z * std + mean).sample)
        assert net.decode(z).std() > 0.1
