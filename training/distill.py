"""A light decoder (wan/light.py), distilled from the full one of the same latent.

The encoder is frozen, and what the light decoder is to give is known twice: the film
itself, and what the full decoder makes of its latent. So it learns from

    L = |y - film|  +  a |y - full|  +  perceptual
        +  b mean_l |A_l f_l - f_l_full|^2 / var(f_l_full)

f_l: what the innermost stages give, which stand at the same rates in both decoders; A_l:
a matrix from the light stage's channels to the full one's, learned beside it and thrown
away (Turbo-VAED, AAAI 2026, arXiv 2508.09136, whose target is the film). Last the GAN
of `refine`, for the head. A part of the steps may take latents that a transformer made,
which is what the decoder will meet; for these the full decoder's video stands for the
film.

It is a programme of phases like any other (training/autoencoder.py), with a teacher:

    python ae.py distill --weights FULL.pt --data CLIPS --preset f32t4c32-light
    python ae.py distill --weights weights/toy.safetensors --preset toy-light --model dc

OUT/PHASE/PRESET.safetensors is the decoder alone. Beside the full one, under the name
STEM-light.safetensors, it is `sample.py --decoder light`; `ae.py eval FULL --decoder
LIGHT` compares.
"""
import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import ae
import sample
import toy
from chunk_causal import run_layers
from files import checkpoint, options
from files.checkpoint import UserError
from training import autoencoder, loop, losses
from training.entries import hash_tensors
from wan import light, released

MATCHED = 3  # innermost stages whose features are compared
GENERATED = 256  # latents that a transformer makes


def like(programme, which, **changes):
    """The phase `which` of a programme, with changes."""
    phase, = (phase for phase in programme if phase.name == which)
    return dataclasses.replace(phase, **changes)


#: All numbers are a choice. (Turbo-VAED has 1 for features, but does not divide by their
#: variance, and no pixels of the full decoder.) Muon's rates are far above those of full
#: decoders: its steps are as large, but the few numbers of a light one are larger.
LEARN = dict(name="distill", trained="decoder", full=1.0, features=0.3, expected="not run")
FULL = (
    like(autoencoder.FULL, "low", **LEARN, steps=100_000),
    like(autoencoder.FULL, "refine", full=1.0, expected="not run"),
)
LAPTOP = (  # `small`, on film
    like(autoencoder.LAPTOP, "low", **LEARN, steps=1000, lr=1e-2),
    like(autoencoder.LAPTOP, "refine", full=1.0, expected="not run"),
)
TOY = (  # no GAN: its shapes have no texture
    like(autoencoder.TOY, "decoder", **LEARN | dict(expected="3 s per step in fp32, 50 minutes"),
         lr=1e-2, noise=0.0, generated=0.25),
)


class Distiller(nn.Module):
    """What a light decoder learns from: the full decoder, and latents that a
    transformer made (or None). Of this only the adapters A_l are trained.

    full: the whole autoencoder; net: the same with the light decoder.
    """

    def __init__(self, full, net, generated=None, **about):
        super().__init__()
        self.full, self.generated = full.requires_grad_(False), generated
        first = max(full.config.mirror.first, net.config.mirror.first)
        stages = range(max(first, len(full.config.widths) - MATCHED), len(full.config.widths))
        self.adapters = nn.ModuleDict()
        for i in stages:
            widths = net.config.mirror.widths[i], full.config.mirror.widths[i]
            self.adapters[str(i)] = nn.Conv3d(*widths, 1)
        self.about = dict(taught_by=hash_tensors(full.state_dict()), **about)

    def forward(self, net, phase, x, state, rng):
        """A step's decoding -> (what y should be [b, 3, t, h, w], y, losses).

        x: film [b, 3, t, h, w]; state: None, or ISOLATED for stills."""
        with torch.no_grad():
            made = self.generated is not None and rng.random() < phase.generated
            if made:
                drawn = rng.integers(len(self.generated), size=len(x))
                z, state = self.generated[drawn].to(x), None
            else:
                z = self.full.encoder(x, state)[0]
            target, wanted = staged(self.full.decoder, z, state)
        y, found = staged(net.decoder, z, state)
        y, target = y.float(), target.float()
        values = {}
        if phase.full:
            values["full"] = losses.l1(y, target)
        if phase.features:
            errors = [self.error(i, found, wanted) for i in self.adapters]
            values["features"] = sum(errors) / len(errors)
        return target if made else x, y, values

    def error(self, i, found, wanted):
        """Squared error of a stage's features, over the variance of the full decoder's."""
        theirs = wanted[i].float()
        ours = self.adapters[i](found[i]).float()
        return (ours - theirs).square().mean() / (theirs.var() + 1e-8)

    def decode(self, latents, shape, autocast):
        """The full decoder's videos of raw latents [1, z, t, h, w], cropped to `shape`,
        on the CPU."""
        with torch.no_grad(), autocast:
            made = [self.full.decode(z, shape[2], shape[3:]).float().cpu() for z in latents]
        return torch.cat(made)


def staged(decoder, z, state=None):
    """`decoder(z, state)` -> (video, {stage: what it gives}), for whole clips."""
    x, found = decoder.project_in(z, state)[0], {}
    for i, stage in reversed(list(enumerate(decoder.stages))):
        if stage.op_list:
            x = found[str(i)] = run_layers(stage.op_list, x, state)[0]
    return decoder.project_out(x, state)[0], found


# -------------------------------------------------------------- latents that a transformer made


@torch.no_grad()
def generate(model, attributes, seed=0):
    """What a toy model makes of prompts (dicts of attributes) -> raw latents [n, z, t,
    h, w], whole chunks, on the CPU."""
    found = []
    for i in tqdm(range(0, len(attributes), 32), "generate latents", leave=False):
        context = model.text.encode(attributes[i : i + 32])
        z = sample.generate(model, context, seed=seed + i) / model.ae.config.scale
        found.append(torch.cat([piece for piece, _ in model.ae.latent_chunks(z)], dim=2).cpu())
    return torch.cat(found)


def toy_model(name, full, device="cpu"):
    """A toy model by its name (`sample.py --model`). UserError where it works in another
    latent than `full`, or is no toy."""
    if released.is_large(name):
        raise UserError(f"--model {name} is no toy: only the toy has captions without end; leave "
                        "it out.")
    model = released.load_model(name, device=device)
    light.check_latent(f"--model {name}", model.ae.config, full)
    return model


def generated_latents(name, full, seed, out, device="cpu"):
    """GENERATED latents of a toy model for random prompts. Kept in OUT, for a run that
    goes on."""
    model = toy_model(name, full, device)
    network = hash_tensors(model.net.state_dict())
    about = dict(model=network, latents=GENERATED, seed=seed)
    path = Path(out) / "generated.safetensors"
    if path.is_file():
        tensors, metadata = checkpoint.load_tensors(path)
        if metadata.get("made") == about:
            return tensors["latents"], about
    rng = np.random.default_rng((seed, 1))
    prompts = [toy.random_scene(rng).attributes() for _ in range(GENERATED)]
    found = generate(model, prompts, seed)
    checkpoint.save_tensors(path, {"latents": found}, {"made": about})
    return found, about


# -------------------------------------------------------------- the programme


def distill(full, preset, phases, source, out, settings, model=None):
    """Distil a light decoder, phase after phase -> path of the last weights. full: the
    autoencoder; model: name of a toy model whose latents are learned too."""
    device, found, about = loop.start(), None, {}
    if model:
        found, about = generated_latents(model, full, settings.seed, out, device)
    torch.manual_seed(settings.seed)
    net = autoencoder.fresh(light.configure(full.config, preset))
    net.encoder = full.encoder
    autoencoder.prepare(net, device)
    distiller = Distiller(full, net, found, **about).to(device)
    for phase in phases:
        folder = Path(out) / phase.name
        path = autoencoder.run_phase(preset, net, phase, source, folder, settings,
                                     distiller=distiller)
    return path


def arguments():
    p = options.Parser(
        prog="ae.py distill",
        description="Distil a light decoder from an autoencoder's own, on a folder of clips, or on "
        "the toy world. Interrupted, the same command goes on where it stopped. What is left out "
        "has the default of the phase.")
    p.add_argument("--weights", required=True, metavar="FILE", help="the whole autoencoder")
    p.add_argument("--preset", choices=light.PRESETS, default="toy-light",
                   help="of the light decoder (default: %(default)s)")
    p.add_argument("--out", default="out/light", help="folder for weights, logs, pictures "
                   "(default: %(default)s)")
    p.add_argument("--model", metavar="NAME", help="learn on latents of this toy model too: dc, or "
                   "what sample.py --model takes")
    known = ("l1", "mse", "jumps", "border", "perceptual", "adversarial",
             *autoencoder.DISTILLED)
    autoencoder.add_shared(p, known)
    return p


def main_distill(argv):
    p = arguments()
    a, given = p.parse(argv)
    source, programme = autoencoder.choose_source(p, a, given, FULL, LAPTOP, TOY)
    changes = autoencoder.changes_of(a)
    full = ae.load(a.weights)
    config = light.configure(full.config, a.preset)
    if not a.model:
        if changes.get("generated"):
            raise UserError("--losses generated=... needs --model, which makes the latents.")
        changes["generated"] = 0.0
    elif not changes.get("generated", 1):
        raise UserError("--model says nothing to --losses generated=0: leave one of them out.")
    phases = autoencoder.choose_phases(programme, config, a.phases, False, a.steps, a.batch,
                                       **changes)
    if a.model and not any(phase.generated for phase in phases):
        raise UserError("--model needs a share of steps on its latents: --losses generated=0.25.")
    settings = autoencoder.Settings(a.seed, a.save_every, not a.fp32, start=a.weights)
    loop.start(a.threads)
    with loop.lock(a.out):
        path = distill(full, a.preset, phases, source, a.out, settings, a.model)
    print("wrote", path)
