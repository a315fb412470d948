"""The suites for a processor: fast path, plain path and diffusers; the two toy models.

The plain path is what `sample.py --slow` runs: explicit concatenation, attention scores
in memory, the usual memory layout, guidance in two passes, nothing kept between steps.
The peer is diffusers' WanTransformer3DModel, eager, with our weights in its own format.
Everything runs on one thread and is timed in processor seconds.
"""
import contextlib
import copy
import tempfile
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

import ae
import dit
import kernels
import sample
import toy
from bench import harness
from bench.harness import fresh_process, in_turns, plainly, work
from files.options import TYPES
from gpu.choose import relative_error
from wan import light, memory, released

SMALL = dit.Config(  # shaped like Wan 2.1
    dim=512, ffn_dim=2048, heads=4, layers=8, in_channels=16, out_channels=16
)
LATENTS = [(4, 32, 32), (4, 64, 64)]  # 1,024 and 4,096 tokens
MIDDLE = ae.Config(  # an eighth of f32t4c32's work at each pixel
    (0, 64, 128, 128, 256, 256, 256), (0, 2, 3, 1, 1, 1, 1), 32, chunk=16
)
DECODES = {  # name: network, latent; None: that of a toy clip
    "toy": (ae.PRESETS["toy"], None),
    "toy-base": (ae.PRESETS["toy-base"], None),
    "toy, 8x8 cells": (ae.PRESETS["toy"], (2, 8, 8)),
    "small": (ae.PRESETS["small"], (4, 4, 4)),
    "middle": (MIDDLE, (4, 3, 4)),
    "middle, 6x8 cells": (MIDDLE, (4, 6, 8)),
}
LIGHT_SIDES = (128, 256, 512)  # of frames
PROMPT = "a large red circle moving left slowly on a blue background"


def usable_types():
    """fp32; bf16 where the processor multiplies it: elsewhere it would take hours."""
    return [name for name in TYPES if name == "fp32" or kernels.bf16_units()]


# ------------------------------------------------------------------------ --suite cpu


def run(report, repeats):
    torch.manual_seed(0)
    report.measure_ceilings(2048, 2**25)
    with torch.inference_mode():
        for latent in LATENTS:
            transformer(report, repeats, latent)
    for name in ("dc", "base"):
        sampling(report, repeats, name)
    for name in DECODES:
        decoding(report, repeats, name)
    training(report, repeats)
    report.write(start=start())
    report.roofline()


def transformer(report, repeats, latent):
    """One step with a prompt of 100 rows; diffusers gets it padded to 512, as its pipeline
    does. Of many tokens no plain form: its scores would take too long."""
    net = dit.WanDiT(SMALL).eval()
    torch.nn.init.normal_(net.head.head.weight, std=0.02)
    x, t = torch.randn(1, SMALL.in_channels, *latent), torch.tensor([500.0])
    context = torch.zeros(1, 512, SMALL.text_dim)
    context[:, :100] = torch.randn(1, 100, SMALL.text_dim)
    tasks = {}
    for name in usable_types():
        ours = copy.deepcopy(net).cast_weights(TYPES[name])
        prompt, moment = ours.prompt(context), ours.times(t)[0]
        tasks[f"ours {name}"] = partial(ours, x, moment, prompt)
    if latent == LATENTS[0]:
        tasks["plain fp32"] = plainly(partial(net, x, t, context))
    with contextlib.suppress(ImportError):
        for name in usable_types():
            peer = harness.diffusers_twin(copy.deepcopy(net).cast_weights(TYPES[name]))
            given = x.to(TYPES[name]), t, context.to(TYPES[name])
            tasks[f"diffusers {name}"] = lambda f=peer, a=given: f(*a, return_dict=False)[0]
    exact = tasks.get("plain fp32", tasks["ours fp32"])()
    errors = {name: relative_error(task(), exact) for name, task in tasks.items()}
    counted = work(tasks["ours fp32"]) | dict(flops=memory.flops(SMALL, latent).total)
    seconds = in_turns(tasks, repeats)
    name = f"transformer, {dit.tokens(SMALL, latent)} tokens"
    report.add(name, seconds, relative_error=errors, **counted)


def sampling(report, repeats, name):
    """The whole guided loop of an embedded model."""
    model = released.load_model(name)
    ours = partial(sample.generate, model, model.text([PROMPT]))
    plain = plainly(partial(ours, cfg_batch=False, plain=True))
    seconds = in_turns({"ours fp32": ours, "plain fp32": plain}, repeats)
    report.add(f"toy sampling, {name}", seconds, relative_error=relative_error(ours(), plain()))


@torch.no_grad()
def decoding(report, repeats, name):
    config, shape = DECODES[name]
    usual = ae.DCAEV(config).eval()
    ours = copy.deepcopy(usual).to(memory_format=torch.channels_last_3d)  # as ae.load does
    shape = shape or usual.latent_shape(*toy.toy_batch(0, 1)[0].shape[2:])
    z = torch.randn(1, config.latent_channels, *shape)
    tasks = {}
    for dtype in usable_types():
        net = copy.deepcopy(ours).to(TYPES[dtype])
        tasks[f"ours {dtype}"] = partial(net.decode, z.to(TYPES[dtype]))
    tasks["plain fp32"] = plainly(partial(usual.decode, z))
    exact = tasks["plain fp32"]()
    errors = {who: relative_error(task(), exact) for who, task in tasks.items()}
    counted = work(tasks["ours fp32"])
    seconds = in_turns(tasks, repeats, patience=30)
    report.add(f"decode, {name}", seconds, relative_error=errors, latent=shape, **counted)


def training(report, repeats):
    """Forward and backward. Chunk-causal padding matters here too; other operations take
    their plain forms, which have gradients."""
    base, net = released.load_model("base"), ae.DCAEV(ae.PRESETS["toy"])
    clips, scenes = toy.toy_batch(0, 4)
    context = base.text.encode([scene.attributes() for scene in scenes])
    shape = base.latent_shape(clips.shape[2], clips.shape[3:])
    z, t = torch.randn(4, base.net.config.in_channels, *shape), torch.full((4,), 500.0)

    def autoencoder_step():
        made = net.decoder(net.encoder(clips)[0])[0]
        (made - clips).abs().mean().backward()

    def transformer_step():
        base.net(z, t, context).square().mean().backward()

    for name, step in (("autoencoder", autoencoder_step), ("transformer", transformer_step)):
        seconds = in_turns({"ours fp32": step, "plain fp32": plainly(step)}, repeats)
        report.add(f"toy training step, {name}", seconds)


IMPORTS = """
import time; a = time.process_time()
import torch; b = time.process_time()
import ae, dit, sample
print(b - a, time.process_time() - b)
"""


def start():
    """Cold start: CPU seconds of importing torch, of our own imports beyond it, and of the
    README's first command, video written; the best of three each."""
    best = dict.fromkeys(("torch", "own_imports", "prompt_to_mp4"), float("inf"))
    for _ in range(3):
        of_torch, own = fresh_process("-c", IMPORTS)[0].split()
        with tempfile.TemporaryDirectory() as folder:
            video = fresh_process("sample.py", "--prompt", PROMPT, "--out", folder)[1]
        for name, seconds in zip(best, (float(of_torch), float(own), video)):
            best[name] = min(best[name], seconds)
    print(f"start: torch {best['torch']:.2f} s, our imports {best['own_imports']:.2f} s more; "
          f"prompt to mp4 {best['prompt_to_mp4']:.1f} s")
    return best


# ------------------------------------------------------------------------ --suite light


@torch.no_grad()
def light_decoders(report, repeats):
    """Counted: operations per pixel and parameters of the decoders of every latent that
    has a light one. Measured: those of `small`, random weights, 16 frames of a size."""
    counts = {}
    for preset in light.PRESETS:
        config = ae.PRESETS[preset.removesuffix("-light")]
        full, part = decoder_counts(config), decoder_counts(light.configure(config, preset))
        fewer = full["operations_per_pixel"] / part["operations_per_pixel"]
        counts[preset] = dict(full=full, light=part, fewer=fewer)
        print(f"{preset}: {part['parameters'] / 1e6:.1f} M of {full['parameters'] / 1e6:.1f} M "
              f"parameters, {fewer:.1f} times fewer operations")
    report.write(counts=counts)
    config = ae.PRESETS["small"]
    for side in LIGHT_SIDES:
        tasks, cells = {}, side // config.spatial_factor
        z = torch.randn(1, config.latent_channels, 4, cells, cells)
        for who, c in (("light", light.configure(config, "small-light")), ("full", config)):
            net = ae.DCAEV(c).eval().to(memory_format=torch.channels_last_3d)
            tasks[f"{who} fp32"] = partial(net.decode, z)
        report.add(f"decode, small, {side}x{side}", in_turns(tasks, repeats))


def decoder_counts(config):
    """Parameters of a decoder, and its operations for each pixel (a multiplication and
    an addition are two), counted over one chunk of 8x8 cells without numbers."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        decoder = ae.Decoder(config)
        z = torch.empty(1, config.latent_channels, config.latent_chunk, 8, 8)
        pixels = decoder(z)[0][0, 0].numel()
    parameters = sum(p.numel() for p in decoder.parameters())
    return dict(parameters=parameters, operations_per_pixel=counter.get_total_flops() / pixels)


# ------------------------------------------------------------------------ --suite toy


@torch.no_grad()
def toy_models(report, repeats):
    """Base and adapted toy model: one pass, guided loop, decode, prompt to pixels."""
    tasks = {"transformer pass": {}, "guided loop": {}, "decode": {}, "prompt to pixels": {}}
    tokens = {}
    for name in ("dc", "base"):
        model = released.load_model(name)
        config, shape = model.net.config, model.latent_shape(model.frames, model.size)
        context, t = model.text([PROMPT]), torch.full((1,), 500.0)
        x, latent = torch.randn(1, config.in_channels, *shape), sample.generate(model, context)
        tokens[name] = dit.tokens(config, shape)
        who = f"{name} fp32"
        tasks["transformer pass"][who] = partial(model.net, x, t, context)
        tasks["guided loop"][who] = partial(sample.generate, model, context)
        tasks["decode"][who] = partial(decoded, model, latent)
        tasks["prompt to pixels"][who] = partial(prompt_to_pixels, model, context)
    for what, variants in tasks.items():
        report.add(what, in_turns(variants, repeats))
    report.write(tokens=tokens, frames=model.frames, size=model.size, steps=model.steps)


def decoded(model, z):
    return list(model.decode(z, model.frames, model.size))


def prompt_to_pixels(model, context):
    return decoded(model, sample.generate(model, context))
