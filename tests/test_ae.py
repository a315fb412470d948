"""DC-AE-V: equal to the released model number by number, exact however a clip is cut, kind to whoever feeds it wrong files."""
import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch

import ae
from chunk_causal import ISOLATED, pixel_shuffle_add
from conftest import ROOT, golden
from files import checkpoint
from files.checkpoint import UserError
from training import metrics

GOLDEN = torch.load(golden("dc_ae_v_small.pt"), weights_only=True)
STRIDE = GOLDEN.get("stride", 1)  # the shipped cut holds every 5th pixel of what comes out
CASES = GOLDEN["A"]["cases"]
CHUNK = 8


def config(name):
    c = GOLDEN[name]["config"]
    return ae.Config(c["width_list"], c["depth_list"], c["latent_channels"], c["chunk_length"], temporal_factor=c["temporal_factor"])


@pytest.fixture(scope="module")
def net():
    """The reference model A (f32t4c4, chunk 8) with the reference weights."""
    return ae.DCAEV(config("A")).load_official(GOLDEN["A"]["state_dict"]).requires_grad_(False)


def clip(frames, height=32, width=32, batch=1):
    return torch.rand(batch, 3, frames, height, width) * 2 - 1


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance, (a.shape, b.shape, (a - b).abs().max())


# ---------------------------------------------------------------------------------------------------- the reference tensors


def tail_alone(net, x, chunk):
    """The released inference code: a tail shorter than a chunk sees nothing of the past."""
    body = x.shape[2] // chunk * chunk
    return torch.cat([net(x[:, :, :body])[0], net(x[:, :, body:], ISOLATED)[0]], dim=2)


@pytest.mark.core
@pytest.mark.parametrize("name", CASES)
def test_reference_case(net, name):
    case = CASES[name]
    x = case["input"] if "input" in case else CASES["t24"]["input"][:1, :, : int(name[1:3])] if "input_is" in case else None
    if name == "image":  # one latent frame that stands alone
        frames = x.unsqueeze(2).expand(-1, -1, 4, -1, -1)
        z, y = net.encoder(frames, ISOLATED)[0], net.decoder(case["latent"], ISOLATED)[0][:, :, 0]
    elif name == "t16_nocache":  # every chunk starts from nothing
        z, y = torch.cat([net.encode(c) for c in x.split(CHUNK, dim=2)], dim=2), None
    elif name == "t20_whole_plain":  # the whole clip in one call of the released code
        z, y = net.encoder(x, ISOLATED)[0], net.decoder(case["latent"], ISOLATED)[0]
    elif name in ("t20_stream", "decode_l5"):  # its tail of 4 frames stands alone
        z = None if x is None else tail_alone(net.encoder, x, CHUNK)
        y = tail_alone(net.decoder, case["latent"], net.config.latent_chunk)
    else:
        z, y = net.encode(x), net.decode(case["latent"], frames=x.shape[2])
    if z is not None:
        close(z, case["latent"])
    if y is not None:
        close(y[..., ::STRIDE, ::STRIDE], case["recon"])


def test_reference_trace(net):
    """The output of every block, so that a mistake shows where it is."""
    found, trace = {}, GOLDEN["A"]["trace"]["outputs"]
    hooks = [module.register_forward_hook(lambda m, args, out, name=name: found.update({name: out[0]}))
             for name, module in net.named_modules() if name in trace]
    net.encoder(CASES["t24"]["input"][:1, :, :CHUNK, :, :32])
    net.decoder(trace["encoder.project_out"])
    for hook in hooks:
        hook.remove()
    assert list(found) == list(trace)
    for name, expected in trace.items():
        close(found[name][..., ::STRIDE, ::STRIDE], expected)


def test_reference_model_with_other_factors():
    """B: f4t4c4."""
    b = GOLDEN["B"]
    net = ae.DCAEV(config("B"))
    assert (net.config.spatial_factor, net.config.latent_chunk) == (4, 2)
    net.encoder.load_state_dict({k[8:]: v for k, v in b["state_dict"].items() if k.startswith("encoder.")})
    with torch.no_grad():
        close(net.encode(b["cases"]["tiled"]["input"]), b["cases"]["untiled"]["latent"])


def duplicated(x, cout, r, t):
    """The shortcut of an up block whose convolution gives zeros."""
    return pixel_shuffle_add(x.new_zeros(x.shape[0], cout * t * r * r, *x.shape[2:]), x, r, t)


def test_reference_layers():
    u = GOLDEN["units"]
    down, up = u["avg_shortcut_in2_out4_r2t4"], u["dup_shortcut_in32_out8_r2t4"]
    close(ae.averaging_shortcut(down["input"], 4, 2, 4), down["out"], 1e-6)
    assert torch.equal(duplicated(up["input"], 8, 2, 4), up["out"])
    norm = ae.RMSNorm(6)
    norm.load_state_dict({k: u["rms_norm"][k] for k in ("weight", "bias")})
    close(norm(u["rms_norm"]["input"]), u["rms_norm"]["out"], 1e-6)


def test_shortcuts_alone_lose_as_little_as_averaging_does():
    """1024 -> 1024, r = 2: the down shortcut is 2x2 mean pooling per channel, the up shortcut nearest enlargement (spec 3.4)."""
    x = torch.randn(1, 8, 2, 4, 6)
    assert torch.allclose(ae.averaging_shortcut(x, 8, 2, 1), torch.nn.functional.avg_pool3d(x, (1, 2, 2)), atol=1e-6)
    assert torch.equal(duplicated(x, 8, 2, 1), x.repeat_interleave(2, 3).repeat_interleave(2, 4))


# ---------------------------------------------------------------------------------------------------- the published models


def published_shapes(c):
    """Names and shapes by the rule of spec 5.3, in order."""
    n, s, W, D, Z = len(c.widths), c.first, c.widths, c.depths, c.latent_channels

    def conv(name, cin, cout, bias=True):
        yield f"{name}.weight", (cout, cin, 3, 3, 3)
        if bias:
            yield f"{name}.bias", (cout,)

    def block(name, w):
        yield from conv(f"{name}.main.conv1.conv", w, w)
        yield from conv(f"{name}.main.conv2.conv", w, w, bias=False)
        yield from ((f"{name}.main.conv2.norm.{p}", (w,)) for p in ("weight", "bias"))

    yield from conv("encoder.project_in.conv.conv", 3, W[s] // 4)
    for i in range(s, n):
        for j in range(D[i]):
            yield from block(f"encoder.stages.{i}.op_list.{j}", W[i])
        if i < n - 1:
            yield from conv(f"encoder.stages.{i}.op_list.{D[i]}.main.conv.conv", W[i], W[i + 1] // 4)
    yield from conv("encoder.project_out.conv", W[-1], Z)
    yield from conv("decoder.project_in.conv", Z, W[-1])
    for i in range(s, n):
        up = i < n - 1
        if up:
            yield from conv(f"decoder.stages.{i}.op_list.0.main.conv.conv", W[i + 1], W[i] * 4)
        for j in range(D[i]):
            yield from block(f"decoder.stages.{i}.op_list.{up + j}", W[i])
    yield from ((f"decoder.project_out.op_list.0.{p}", (W[s],)) for p in ("weight", "bias"))
    yield from conv("decoder.project_out.op_list.2.conv.conv", W[s], 12)


@pytest.mark.parametrize("preset, encoder, decoder, tensors, scale", [
    ("f32t4c32", 916_655_008, 1_221_980_428, 340, 0.7241), ("f32t4c64", 917_539_776, 1_222_865_164, 340, 0.7614),
    ("f32t4c128", 919_309_312, 1_224_634_636, 340, 0.4457), ("f32t4c256", 922_848_384, 1_228_173_580, 340, 0.4752),
    ("f64t4c128", 1_152_892_160, 1_564_389_644, 384, 0.4752)])
def test_published_presets(preset, encoder, decoder, tensors, scale):
    c = ae.PRESETS[preset]
    with torch.device("meta"):
        net = ae.DCAEV(c)
    own = [(name, tuple(v.shape)) for name, v in net.state_dict().items()]
    assert own == list(published_shapes(c)) and len(own) == tensors
    assert [sum(p.numel() for p in part.parameters()) for part in (net.encoder, net.decoder)] == [encoder, decoder]
    f, z = int(preset[1:3]), int(preset.split("c")[1])
    assert (c.spatial_factor, c.temporal_factor, c.latent_channels, c.chunk, c.latent_chunk, c.scale) == (f, 4, z, 40, 10, scale)

    # The memory of a stream in elements, as a multiple of the video's height x width (spec 4.2)
    x = torch.empty(1, 3, 40, f, f, device="meta")
    z_, state = net.encoder(x)
    y, decoder_state = net.decoder(z_)
    assert z_.shape == (1, z, 10, 1, 1) and y.shape == x.shape
    expected = (1505, 1502 + z / 1024) if f == 32 else (1500.5, 1497.5 + z / 4096)
    assert (elements(state) / f**2, elements(decoder_state) / f**2) == expected


def elements(state):
    return state.numel() if isinstance(state, torch.Tensor) else sum(map(elements, state))


# ---------------------------------------------------------------------------------------------------- weight files

TINY = ae.Config((0, 8, 8, 8), (0, 1, 1, 1), 4, chunk=4)  # f4


def tiny(seed=0, cfg=TINY):
    torch.manual_seed(seed)
    return ae.DCAEV(cfg).eval()


def same(net, state_dict):
    own = net.state_dict()
    return own.keys() == state_dict.keys() and all(torch.equal(own[k], v) for k, v in state_dict.items())


@pytest.mark.parametrize("container", [
    lambda sd, other: sd,
    lambda sd, other: {"model_state_dict": sd, "global_step": 7},
    lambda sd, other: {"ema_model_state_dict": {0.9999: sd, 0.5: other}, "model_state_dict": other, "dist_size": 8, "best_metric": 1.5},
    lambda sd, other: {"ema_model_state_dict": {}, "model_state_dict": sd},
    lambda sd, other: {"model_state_dict": {f"_fsdp_wrapped_module._orig_mod.{k}": v for k, v in sd.items()}},
    lambda sd, other: {"module." + k.replace("stages", "_checkpoint_wrapped_module.stages"): v for k, v in sd.items()},
], ids=["bare", "model", "ema", "empty ema", "fsdp", "checkpointed"])
def test_official_containers(tmp_path, container):
    sd, other = tiny().state_dict(), tiny(1).state_dict()
    for name in ("dc-ae-v-1.0-f32t4c32.pt", "dc-ae-v-f32t4c32-1.0.pt"):  # both orders occur; the name decides nothing
        torch.save(container(sd, other), tmp_path / name)
        assert same(ae.load(tmp_path / name, TINY), sd)


def test_bf16_files_are_widened(tmp_path):
    sd = {k: v.bfloat16() for k, v in tiny().state_dict().items()}
    torch.save({"model_state_dict": sd}, tmp_path / "dc-ae-v-1.0-f32t4c32-bf16.pt")
    net = ae.load(tmp_path / "dc-ae-v-1.0-f32t4c32-bf16.pt", TINY)
    assert not net.training and same(net, {k: v.float() for k, v in sd.items()})


def test_safetensors_of_an_official_state_dict(tmp_path):
    checkpoint.save_tensors(tmp_path / "w.safetensors", tiny().state_dict())
    assert same(ae.load(tmp_path / "w.safetensors", TINY), tiny().state_dict())


def test_own_files_carry_their_config(tmp_path):
    net = tiny(cfg=ae.Config((0, 8, 8, 8), (0, 1, 1, 1), 4, chunk=12, scale=0.5, temporal="causal"))
    ae.save(net, tmp_path / "w.safetensors", torch.float16, note="half the size")
    again = ae.load(tmp_path / "w.safetensors")
    assert again.config == net.config
    assert same(again, {k: v.half().float() for k, v in net.state_dict().items()})


def test_the_preset_is_inferred_from_the_shapes(tmp_path):
    torch.save(ae.DCAEV(ae.PRESETS["toy-base"]).state_dict(), tmp_path / "w.pt")
    assert ae.load(tmp_path / "w.pt").config == ae.PRESETS["toy-base"]
    for preset in ("f32t4c64", "f64t4c128"):
        with torch.device("meta"):
            tensors = ae.DCAEV(ae.PRESETS[preset]).state_dict()
        assert ae.infer_config(tensors) == ae.PRESETS[preset]


def test_wrong_weights_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    checkpoint.save_tensors(path, {"blocks.0.attn1.to_q.weight": torch.zeros(4, 4)}, {"config": {"dim": 4}})
    with pytest.raises(UserError, match="no DC-AE-V of a known preset"):
        ae.load(path)
    with pytest.raises(UserError, match="missing"):
        ae.load(path, TINY)
    ae.save(tiny(cfg=ae.Config((0, 8, 8, 8), (0, 1, 1, 1), 2, chunk=4)), path)
    with pytest.raises(UserError, match=r"encoder.project_out.conv.weight has shape \[2, 8, 3, 3, 3\], expected \[4"):
        ae.load(path, TINY)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_truncated_weights_are_refused(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    torch.save(tiny().state_dict(), path) if suffix == "pt" else ae.save(tiny(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="not a complete"):
        ae.load(path)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "code ran"),)

    torch.save({"model_state_dict": Malicious()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="could run code"):
        ae.load(tmp_path / "w.pt")
    assert not (tmp_path / "code ran").exists()


# ---------------------------------------------------------------------------------------------------- exact in every cut


@pytest.mark.core
def test_streaming_is_the_whole_clip(net):
    """One call over three chunks, chunk by chunk, two chunks and then one: equal to rounding."""
    x = clip(3 * CHUNK, 32, 64)
    whole, _ = net.encoder(x)
    close(net.encode(x), whole, 5e-5)
    first, state = net.encoder(x[:, :, : 2 * CHUNK])
    close(torch.cat([first, net.encoder(x[:, :, 2 * CHUNK :], state)[0]], dim=2), whole, 5e-5)

    decoded, _ = net.decoder(whole)
    close(net.decode(whole), decoded, 5e-5)
    first, state = net.decoder(whole[:, :, :4])
    close(torch.cat([first, net.decoder(whole[:, :, 4:], state)[0]], dim=2), decoded, 5e-5)


@pytest.mark.parametrize("cuts", [[20], [1] * 20, [3, 8, 9], [8, 8, 4], [17, 3]])
def test_streams_may_be_cut_anywhere(net, cuts):
    x = clip(20)
    z = net.encode(x)
    assert torch.equal(torch.cat(list(net.encode_stream(x.split(cuts, dim=2))), dim=2), z)
    y = torch.cat(list(net.decode_stream(z.split([1, 3, 2], dim=2))), dim=2)
    close(y, net.decode(z), 1e-5)  # which takes several small chunks in one call
    assert torch.equal(net.decode(z)[:, :, :20], net(x))


def test_streams_are_lazy(net):
    """A latent comes out as soon as its chunk has gone in: the memory of a film is that of a chunk."""
    read = []

    def film():
        for i in range(10**9):
            read.append(i)
            yield clip(CHUNK)

    frames = net.decode_stream(net.encode_stream(film()))
    assert next(frames).shape == (1, 3, CHUNK, 32, 32) and len(read) == 1
    next(frames)
    assert len(read) == 2


@pytest.mark.core
def test_prefix_and_causality(net):
    """Latents of a chunk depend on it and on earlier chunks, on all of their frames, and on nothing later, to the bit."""
    x = clip(3 * CHUNK)
    z = net.encode(x)
    assert torch.equal(net.encode(x[:, :, :CHUNK]), z[:, :, :2]) and torch.equal(net.encode(x[:, :, : 2 * CHUNK]), z[:, :, :4])
    for frame in (CHUNK, 2 * CHUNK - 1):  # first and last of the middle chunk
        nudged = x.clone()
        nudged[:, :, frame] += 0.5
        change = (net.encode(nudged) - z).abs().amax(dim=(0, 1, 3, 4))
        assert (change[:2] == 0).all() and (change[2:] > 0).all()

    y, nudged = net.decode(z), z.clone()
    nudged[:, :, 3] += 0.5  # the last latent of the middle chunk reaches the first frame of that chunk
    change = (net.decode(nudged) - y).abs().amax(dim=(0, 1, 3, 4))
    assert (change[:CHUNK] == 0).all() and (change[CHUNK:] > 0).all()
    assert torch.equal(net.decode(z[:, :, :4]), y[:, :, : 2 * CHUNK])


def test_a_batch_is_its_clips(net):
    x = clip(2 * CHUNK, batch=2)
    close(net.encode(x), torch.cat([net.encode(x[:1]), net.encode(x[1:])]), 5e-5)
    close(net(x), torch.cat([net(x[:1]), net(x[1:])]), 5e-5)


@pytest.mark.core
@pytest.mark.parametrize("frames", range(1, 2 * CHUNK + 1))
def test_any_number_of_frames(net, frames):
    """Padded by repeating the last frame, then cropped. 9 frames give 9 frames."""
    x = clip(frames)
    padded = torch.cat([x] + [x[:, :, -1:]] * (-frames % CHUNK), dim=2)
    z = net.encode(x)
    assert z.shape[2:] == net.latent_shape(frames, 32, 32) == (2 if frames <= CHUNK else 4, 1, 1)
    assert torch.equal(z, net.encode(padded))
    assert torch.equal(net(x), net.decode(z)[:, :, :frames])


@pytest.mark.parametrize("height, width", [(1, 1), (31, 33), (50, 70)])
def test_any_size(net, height, width):
    x = clip(CHUNK, height, width)
    z = net.encode(x)
    assert z.shape[2:] == net.latent_shape(CHUNK, height, width)
    rows, columns = (torch.arange(-(-n // 32) * 32).clamp(max=n - 1) for n in (height, width))
    assert torch.equal(z, net.encode(x[:, :, :, rows][..., columns]))
    assert net(x).shape == x.shape


def test_a_latent_that_ends_inside_a_chunk(net):
    z = torch.randn(1, 4, 3, 1, 1)
    assert torch.equal(net.decode(z), net.decode(torch.cat([z, z[:, :, -1:]], dim=2))[:, :, :12])


def test_wrong_layouts_are_named(net):
    with pytest.raises(UserError, match=r"\[batch, 3, frames, height, width\], got the shape \[1, 8, 3, 32, 32\]"):
        net.encode(clip(CHUNK).transpose(1, 2))
    with pytest.raises(UserError, match=r"\[batch, 4, frames, height, width\], got the shape \[1, 16, 2, 1, 1\]"):
        net.decode(torch.zeros(1, 16, 2, 1, 1))
    with pytest.raises(UserError, match="got the shape"):
        net.encode(clip(0))


@pytest.mark.parametrize("temporal", ["causal", "non_causal"])
def test_the_papers_alternatives(temporal):
    """The same autoencoder with the other two ways of seeing time: the causal one streams as exactly, the non-causal one cannot."""
    net, x = tiny(cfg=ae.Config((0, 8, 8, 8), (0, 1, 1, 1), 4, chunk=4, temporal=temporal)), clip(12)
    with torch.no_grad():
        assert net(x[:, :, :7]).shape == (1, 3, 7, 32, 32)
        assert torch.allclose(net.encode(x), net.encoder(x)[0], atol=5e-5) == (temporal == "causal")


def test_a_chunk_of_one_frame():
    """A frame sees itself and the past, at pixel rate as at latent rate; a latent frame is still made of four frames, which stream together."""
    net = tiny(cfg=ae.Config((0, 8, 8, 8), (0, 1, 1, 1), 4, chunk=1))
    c, x = net.config, clip(10)
    assert (c.latent_chunk, c.piece) == (1, 4) and {m.chunk for m in net.modules() if hasattr(m, "chunk")} == {1}
    with torch.no_grad():
        z = net.encode(x)
        assert z.shape[2:] == net.latent_shape(10, 32, 32) == (3, 8, 8) and net(x).shape == x.shape
        close(net.encoder(x[:, :, :8])[0], z[:, :, :2], 5e-5)
        nudged = x.clone()
        nudged[:, :, 6] += 0.5
        assert ((net.encode(nudged) - z).abs().amax(dim=(0, 1, 3, 4)) > 0).tolist() == [False, True, True]
        for m in net.encoder.modules():  # the tap on the frame that comes next meets only zeros
            if isinstance(m, torch.nn.Conv3d):
                m.weight[:, :, 2] += 1
        close(net.encode(x), z, 1e-6)
    for chunk in (0, 2, 6, -4):
        with pytest.raises(ValueError, match="must be 1 or a multiple"):
            ae.Config((0, 8, 8, 8), (0, 1, 1, 1), 4, chunk=chunk)


def test_bf16_is_close_to_fp32(net):
    x = clip(2 * CHUNK, 64, 64)
    half = ae.DCAEV(net.config).load_official(net.state_dict()).bfloat16()
    for ours, exact in ((half.encode(x.bfloat16()), net.encode(x)), (half(x.bfloat16()), net(x))):
        assert ours.dtype == torch.bfloat16 and (ours.float() - exact).norm() / exact.norm() < 0.03


def test_gradients_cross_chunk_borders():
    net, x = tiny(), clip(8).requires_grad_()
    net.encoder(x)[0][:, :, 1].sum().backward()  # the latent of the second chunk
    assert (x.grad.abs().amax(dim=(0, 1, 3, 4)) > 0).all()


# ---------------------------------------------------------------------------------------------------- scores


def test_psnr():
    """10 log10(255^2 / mse) on 8-bit values, mean over frames; a frame without any error has no finite PSNR and is left out."""
    x = torch.zeros(1, 3, 3, 12, 12)  # 128 of 255
    y = x.clone()
    y[:, :, 0] += 10 / 127.5
    y[:, :, 1] += 0.4 / 127.5  # gone in the rounding
    y[:, 0, 2] += 3 / 127.5
    expected = [10 * math.log10(255**2 / 100), math.inf, 10 * math.log10(255**2 / 3)]
    assert metrics.psnr_frames(y, x)[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert metrics.psnr(y, x) == pytest.approx((expected[0] + expected[2]) / 2, rel=1e-5)
    assert metrics.psnr(x, x) == math.inf and metrics.ssim(x, x) == 1


def test_ssim_is_its_definition():
    """Window by window in double precision, for one channel of an image with an edge and noise."""
    x = torch.linspace(-1, 1, 14).expand(12, 14).clone()
    x[:, 9:] -= 0.8
    y = (x + 0.2 * torch.randn(12, 14)).clamp(-1, 1)
    a, b = ((v.clamp(-1, 1).double() * 127.5 + 128).floor().clamp(max=255) for v in (x, y))
    a, b = (torch.nn.functional.pad(v[None, None], (5, 5, 5, 5), mode="reflect")[0, 0] for v in (a, b))
    g = torch.exp(-torch.arange(-5.0, 6.0).double() ** 2 / (2 * 1.5**2))
    window = g[:, None] * g / (g[:, None] * g).sum()
    values = []
    for i in range(12):
        for j in range(14):
            u, v = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mu, mv = (window * u).sum(), (window * v).sum()
            vu, vv, cov = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum(), (window * (u - mu) * (v - mv)).sum()
            values.append((2 * mu * mv + 2.55**2) * (2 * cov + 7.65**2) / ((mu**2 + mv**2 + 2.55**2) * (vu + vv + 7.65**2)))
    assert metrics.ssim(y.view(1, 1, 1, 12, 14), x.view(1, 1, 1, 12, 14)) == pytest.approx(torch.stack(values).mean().item(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------- command line


def test_the_script_tells_mistakes_in_one_sentence(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"PK\x03\x04 no weights")
    clip = ROOT / "assets" / "city.mp4"
    command = [sys.executable, ROOT / "ae.py", "reconstruct", clip, "--weights", tmp_path / "w.pt", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout
    assert not (tmp_path / "out").exists()


def test_decoder_of_other_widths():
    """The decoder alone may be wider or narrower; file and latent keep their form."""
    config = ae.Config((0, 8, 8, 8), (0, 1, 1, 1), 4, chunk=8, decoder_widths=(0, 16, 16, 16))
    net, alike = ae.DCAEV(config), ae.DCAEV(dataclasses.replace(config, decoder_widths=()))
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(net.encoder) == count(alike.encoder)
    assert count(net.decoder) > 3 * count(alike.decoder)
    x = torch.zeros(1, 3, 8, 16, 16)
    assert net(x).shape == x.shape
