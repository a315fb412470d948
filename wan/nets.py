"""Wan's transformer by its files: what the stages of an adaptation ask of a kind of
transformer. families/net.py answers the same for the folders of diffusers."""
import torch

from dit import Config, PatchEmbedder, WanDiT, deep_config, inherit, load, save
from files import layouts
from files.checkpoint import check_fit, load_strict, read

__all__ = ["deep_config", "embedder", "fingerprint", "inherit", "load", "outline", "read_config",
           "read_ends", "save"]


def read_config(path):
    """The Config that `load` would use, without reading the weights."""
    return Config(**layouts.open_checkpoint(path)[1])


def outline(path):
    """The net that `load` would give, without its weights (on the meta device). UserError
    where the file does not fit, from its header."""
    tensors, settings = layouts.open_checkpoint(path)
    with torch.device("meta"):
        net = WanDiT(Config(**settings))
    check_fit(net.state_dict(), tensors, str(path))
    return net


def embedder(path):
    """The patch embedder alone of a transformer's file or folder, fp32; nothing else is
    read."""
    tensors, config = layouts.open_checkpoint(path)
    net = PatchEmbedder(config["in_channels"], config["dim"], config["patch"])
    own = {k: tensors[f"patch_embedding.{k}"] for k in ("weight", "bias")}
    return load_strict(net, own, str(path))


def read_ends(path):
    """{name: tensor} of a transformer's two ends, fp32; nothing else is read."""
    tensors = layouts.open_checkpoint(path)[0].items()
    return {k: read(v).float() for k, v in tensors if k.startswith(WanDiT.ends)}


def fingerprint(path):
    """What tells any two trained models apart, quickly -> (config, {name: tensor}): all
    vectors (norms, modulation, biases) and the ends."""
    tensors, config = layouts.open_checkpoint(path)
    small = {k: read(v) for k, v in tensors.items()
             if len(v.shape) == 1 or "modulation" in k or k.startswith(WanDiT.ends)}
    return config, small
