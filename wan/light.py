"""Light decoders: an autoencoder's latent, decoded with a tenth of the work and less.

With few tokens the decoder is what is left of a video's cost, and nearly all of that is
full-width convolutions at high resolution. A light decoder is `ae.Decoder` with other
numbers (`ae.Config.mirror`): few channels where there are many pixels, a large pixel
shuffle in place of the last stages, depthwise convolutions where there are many
channels. The encoder, and so the latent and every transformer trained in it, stay as
they are; so does the chunk-causal rule: streaming and tiling are exact, any length works.

It is distilled from the full decoder (training/distill.py), stored beside it without
the encoder, and refused by any other latent:

    weights/toy.safetensors  weights/toy-light.safetensors     sample.py --decoder light
"""
import dataclasses
from pathlib import Path

import torch

import ae
from files import checkpoint
from files.checkpoint import UserError

#: Innermost stages of the decoder, deepest last. Of the published sizes as Turbo-VAED has
#: them (AAAI 2026, arXiv 2508.09136: 45.8 M parameters, 45 times the frames per second of
#: its f32t4 teacher, 0.9 dB below it); `small` as measured on one core of a CPU.
PRESETS = {
    "f32t4c32-light": dict(decoder_widths=(64, 128, 256, 512, 512),
                           decoder_depths=(4, 3, 3, 3, 4), separable=2),
    "f64t4c128-light": dict(decoder_widths=(64, 128, 256, 512, 512, 512),
                            decoder_depths=(4, 3, 3, 3, 3, 4), separable=3),
    "small-light": dict(decoder_widths=(64, 128, 128), decoder_depths=(2, 1, 1), separable=3),
    "toy-light": dict(decoder_widths=(16, 32, 64, 64, 64), decoder_depths=(1, 1, 1, 1, 1),
                      separable=5),
}
DECODER = ("decoder_widths", "decoder_depths", "separable")  # of a Config: no matter of the latent
SUFFIX = "-light.safetensors"


def configure(config, preset):
    """An autoencoder's Config with a light decoder. UserError where it does not fit."""
    light = dataclasses.replace(config, **PRESETS[preset])
    stages = len(light.decoder_widths)
    if stages > len(config.widths) - config.first:
        raise UserError(f"{preset} has {stages} stages, more than the full decoder: use another "
                        f"--preset of {', '.join(PRESETS)}.")
    return light


def load(net, path):
    """The DC-AE-V `net` with a light decoder from a file of `ae.py distill`; the
    encoder is shared. UserError for a file of another kind, or of another latent."""
    tensors, metadata = checkpoint.load_tensors(path)
    config = ae.stored_config(metadata)
    if any(name.startswith("encoder.") for name in tensors):
        raise UserError(f"{path} holds a whole autoencoder, not a decoder alone: give --decoder a "
                        "file written by ae.py distill.")
    if config is None:
        raise UserError(f"{path} holds no light decoder: give --decoder a file written by ae.py "
                        "distill.")
    check_latent(path, config, net)
    with torch.device("meta"):
        light = ae.DCAEV(config)
    light.encoder = net.encoder
    weights = {name.removeprefix("decoder."): value for name, value in tensors.items()}
    checkpoint.load_strict(light.decoder, weights, str(path), "cpu")
    like = next(net.parameters())
    light.decoder.to(like.device, like.dtype, memory_format=torch.channels_last_3d)
    return light.eval()


def choose(net, which):
    """An autoencoder with the decoder that `sample.py --decoder` names -> (autoencoder,
    the decoder's file or None)."""
    if which in (None, "full"):
        return net, None
    if not isinstance(net, ae.DCAEV):
        raise UserError("--decoder is for a DC-AE-V, which this model's autoencoder is not: leave "
                        "it out.")
    if which == "light" and net.path is None:  # an outline, to plan with
        factor = net.config.spatial_factor
        preset = next(name for name in PRESETS if name.startswith(f"f{factor}t"))
        with torch.device("meta"):
            return ae.DCAEV(configure(net.config, preset)), which
    file = str(beside(net.path)) if which == "light" else which
    return load(net, file), file


def check_latent(what, config, net):
    """UserError where `what`, of an autoencoder of this Config, works in another latent
    than `net`: one of other channels, scale, or encoder."""
    for field in dataclasses.fields(ae.Config):
        theirs, ours = getattr(config, field.name), getattr(net.config, field.name)
        if field.name not in DECODER and theirs != ours:
            raise UserError(f"{what} belongs to another latent: its {field.name} is {theirs}, this "
                            f"autoencoder's {ours}; use the one distilled from these weights.")


def beside(path):
    """The file of the light decoder that lies beside an autoencoder's: the one of its
    name, or else the only one. UserError without."""
    path = Path(path)
    own = path.with_name(path.stem + SUFFIX)
    if own.is_file():
        return own
    found = sorted(path.parent.glob(f"*{SUFFIX}"))
    if len(found) == 1:
        return found[0]
    raise UserError(f"{own} does not exist: make it with ae.py distill --weights {path} and copy "
                    "it there, give --decoder a file, or leave it out.")
