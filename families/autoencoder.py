"""The base's autoencoder: that of a folder of diffusers, with the face of
ae.VideoAutoencoder. Wan's (which SkyReels-V2 and Cosmos have too) is read by wan/vae.py,
so that its latents, and caches of them, are the same wherever they come from.
"""
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from families import libraries
from files import checkpoint
from files.checkpoint import UserError
from gpu import tiling
from wan import vae


@dataclass(frozen=True)
class Config:
    spatial_factor: int
    temporal_factor: int
    latent_channels: int
    std: float  # of the encoder's own latents
    lead: int = 1  # frames of the first latent frame
    scale: float = 1.0  # of the latents: they are made unit RMS here


class Autoencoder(nn.Module):
    """Pixels [b, 3, 1 + 4k, h, w] in [-1, 1] <-> latents [b, z, 1 + k, h', w'] of about
    unit RMS. `vae` is diffusers' own, in the ways of working that it has by default: with
    tiles in time, blended, where its pipeline decodes with these."""

    def __init__(self, net):
        super().__init__()
        c, self.vae = net.config, net
        self.config = Config(c.spatial_compression_ratio, c.temporal_compression_ratio,
                             c.latent_channels, 1 / c.scaling_factor)

    def encode(self, x):
        """A clip's sides and length are filled up by repeating its last row, column and
        frame."""
        c = self.config
        h, w = (-n % c.spatial_factor for n in x.shape[3:])
        t = -(x.shape[2] - c.lead) % c.temporal_factor
        x = F.pad(x, (0, w, 0, h, 0, t), mode="replicate")
        x = x.to(next(self.parameters()).dtype)
        return self.vae.encode(x).latent_dist.mean / c.std

    def decode(self, z, frames=None, size=None):
        h, w = size or (None, None)
        z = z.to(next(self.parameters()).dtype)
        return self.vae.decode(z * self.config.std).sample[:, :, :frames, :h, :w]

    def encode_stream(self, clips):
        """Clips of one video in order -> its latent, in one piece."""
        yield self.encode(torch.cat(list(clips), dim=2))

    def decode_stream(self, z):
        """A latent, or pieces of one in order -> its frames, in one piece."""
        yield self.decode(z if torch.is_tensor(z) else torch.cat(list(z), dim=2))

    @torch.no_grad()
    def peak(self, side, shape, dtype):
        """`tiling.peak` of a latent (t, h, w), from a run on the meta device, where tensors
        have shapes and no numbers."""
        c, (t, h, w) = self.config, shape
        net = copy.deepcopy(self).to("meta", dtype)
        size = 3, c.lead + (t - 1) * c.temporal_factor, h * c.spatial_factor, w * c.spatial_factor
        if side == "decoder":
            size = c.latent_channels, *shape
        x = torch.empty(1, *size, dtype=dtype, device="meta")
        with tiling.Meter() as meter:
            net.decode(x) if side == "decoder" else net.encode(x)
        return meter.peak


KINDS = ("AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15")


def load(path):
    """A folder `vae` -> an autoencoder in eval mode, fp32, without gradients."""
    stored = checkpoint.read_json(Path(path) / "config.json")
    kind = stored.get("_class_name")
    if kind == "AutoencoderKLWan":
        return vae.load(path)
    if kind not in KINDS:
        raise UserError(f"{path} holds a {kind}, an autoencoder that is not known here: use a "
                        f"folder with one of {', '.join(KINDS)}, AutoencoderKLWan.")
    kind = libraries.a_class(libraries.diffusers(), kind)
    with libraries.empty_weights():
        net = kind.from_config(stored)
    tensors, _ = checkpoint.open_tensors(path)
    checkpoint.check_fit(net.state_dict(), tensors, str(path))
    net.load_state_dict({k: v.read().float().clone() for k, v in tensors.items()}, assign=True)
    return Autoencoder(net).eval().requires_grad_(False)
