"""A text- or image-to-video model: four networks that meet in few places, and where
they live.

    prompt --umT5--> context [b, m, 4096]             once, then freed (11 GB)
    picture --CLIP--> 257 tokens                      image-to-video only
            --autoencoder--> condition latent         (`ImageCondition`)
    noise, context, condition --transformer, `steps` times--> latent
    latent --autoencoder--> frames

Base and DC-VideoGen models differ in numbers only: autoencoder 8x8x4 with 1+4k frames
against 32x32x4 with 4k frames, patch 2 against 1. Wan 2.2 A14B has two transformers,
experts for high and low noise that take turns. The rows of the released models, their
files and how they are loaded: wan/released.py.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import ae
import dit
import lora
import toy
from files import lora_keys, video
from files.checkpoint import UserError
from gpu import tiling
from gpu.offload import stream_blocks
from wan import nets as wan_nets
from wan import vae
from wan.text import WanText, release


class Prompts(list):
    """The prompts of several videos as a text encoder that is not umT5 sees them, {name:
    states [m, d]} each, without padding. Their transformer makes of them what it needs;
    for all others they are handled like the one tensor [b, m, d] that Wan takes."""

    def each(self, change):
        """The same, change(states) in place of all states."""
        found = Prompts()
        for row in self:
            found.append({name: change(states) for name, states in row.items()})
        return found

    def to(self, device):
        return self.each(lambda states: states.to(device))

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return Prompts(found) if isinstance(index, slice) else found

    def expand(self, n, *_):
        """One prompt, n times."""
        return Prompts(self * (n if len(self) == 1 else 1))


class Lora(NamedTuple):
    """A LoRA file to put on the transformer."""

    file: str | Path
    strength: float = 1.0
    expert: str = ""  # "high" or "low": on this expert only


class Deferred:
    """A transformer on disk. It is read when first called for, which is after the text
    encoder has gone, and unloaded when its memory is needed: Wan 2.2's experts take
    turns, and with --offload it makes room for the decode."""

    nets = wan_nets  # what knows its kind of transformer: load, outline

    def __init__(self, path, loras=(), dtype=torch.float32, expert=None, config=None):
        self.path, self.dtype, self.expert = path, dtype, expert
        self.loras, self.net = [], None
        for given in loras:
            one = Lora(*given)
            if one.expert in ("", expert):
                self.loras.append(one)
        self.config = config or self.look()

    def look(self):
        """-> its config. UserError now, not after the text encoder, where the file or a
        LoRA does not fit."""
        net = self.outline()
        shapes = {name: p.shape for name, p in net.named_parameters()}
        for one in self.loras:
            lora_keys.fit(shapes, one.file, self.expert, net.latent_layers, net.is_deep)
        return net.config

    def outline(self):
        """The net without its weights, on the meta device."""
        return self.nets.outline(self.path)

    def get(self, device, stream=False):
        if self.net is None:
            start = "cpu" if stream else device
            self.net = self.nets.load(self.path, dtype=self.dtype, device=start)
            for one in self.loras:
                lora.load(self.net, one.file, one.strength, expert=self.expert)
            if stream:
                self.net = stream_blocks(self.net, device)
        return self.net

    def unload(self):
        if self.net is not None:
            self.net = None
            release()


class ImageCondition(NamedTuple):
    """What a transformer sees of the given pictures; each may be None."""

    condition: torch.Tensor | None = None  # [n, 4 + z, t, h, w], beside the noise
    first: torch.Tensor | None = None  # [n, z, 1, h, w], in place of latent frame 0
    clip: torch.Tensor | None = None  # [n, 257, 1280], for the image cross-attention


@dataclass
class Model:
    """A text- or image-to-video model and its defaults. `net` (and `low`) are
    transformers, or Deferred ones."""

    name: str
    net: dit.WanDiT | Deferred
    ae: ae.DCAEV | vae.WanVAE
    text: toy.ToyText | WanText
    frames: int = toy.FRAMES
    size: tuple = (toy.SIZE, toy.SIZE)  # height, width
    fps: int = 16
    steps: int = 20
    shift: float = 3.0
    guidance: float | tuple = 3.0  # or (low-noise expert, high-noise expert)
    solver: str = "unipc"
    upscale: int = 4  # of the mp4: yuv420 halves the colour resolution, too coarse for 64x64
    negative: str | None = None  # unconditional prompt; None: zeros, as the toy was trained
    task: str = "ti2v"  # "t2v", "i2v" (needs a picture), "ti2v" (takes one)
    picture: str = "dc"  # how a picture is resized: `resize`
    area: int = 0  # image-to-video: pixels of a frame of the picture's aspect; 0: `size`
    clip: Callable | None = None  # image encoder, where the transformer has an image branch
    low: dit.WanDiT | Deferred | None = None  # expert for times below 1000 * boundary
    boundary: float = 0.0
    offload: str = "none"  # "parts": one network on the device at a time; "blocks": streamed
    encode_tile: tuple | None = None  # of the condition's encoding, in latent cells
    ae_dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    def __post_init__(self):
        z, c = self.ae.config.latent_channels, self.net.config
        with_condition = 2 * z + self.ae.config.temporal_factor
        if c.out_channels != z:
            raise UserError(f"the transformer of {self.name} makes latents of {c.out_channels} "
                            f"channels, but its autoencoder reads {z}: they do not belong "
                            "together.")
        if self.low is not None and self.low.config != c:
            raise UserError(f"the two transformers of {self.name} are of different shapes: they do "
                            "not belong together.")
        if c.in_channels not in (z, with_condition):
            raise UserError(f"the transformer of {self.name} takes {c.in_channels} channels, "
                            f"neither {z} (latent) nor {with_condition} (latent, mask, "
                            "condition): it is for another task.")

    @property
    def is_wan(self):
        """Is the transformer our own (dit.py)? Of another family's nothing can be kept
        from step to step."""
        return isinstance(self.net.config, dit.Config)

    # -- where it runs

    def to(self, device):
        """Run on `device`. Networks in memory move at once, deferred ones when they are
        used."""
        self.device = torch.device(device)
        for part in (self.net, self.low):
            if isinstance(part, torch.nn.Module):
                part.to(device)
        self.ae.to("cpu" if self.offload != "none" else device, self.ae_dtype)
        return self

    def transformer(self, t=1000):
        """The transformer for timestep t (0..1000), on the device; its fellow expert is
        unloaded."""
        part, other = self.net, self.low
        if self.low is not None and t < 1000 * self.boundary:
            part, other = other, part
        if isinstance(other, Deferred):
            other.unload()
        if not isinstance(part, Deferred):
            return part
        if self.offload != "none" and part.net is None:
            self.ae.to("cpu")
        return part.get(self.device, self.offload == "blocks")

    def autoencoder(self):
        """The autoencoder on the device; with `offload` the transformer is unloaded for
        it."""
        for part in (self.net, self.low):
            if self.offload != "none" and isinstance(part, Deferred):
                part.unload()
        return self.ae.to(self.device)

    # -- shapes

    def latent_shape(self, frames, size):
        """(t, h, w) of the latent that covers `frames` frames of `size` pixels and that
        the patches divide."""
        return latent_shape(self.ae.config, self.net.config.patch, frames, size)

    def size_for(self, picture):
        """Height and width for a picture [.., h, w]: the model's area in the picture's
        aspect, whole patches, as the original program ("wan") or diffusers ("dc")
        rounds."""
        (h, w), area = picture.shape[-2:], self.area
        if not area:
            return self.size
        cell, patch = self.ae.config.spatial_factor, self.net.config.patch[1]
        if self.picture == "wan":
            sides = math.sqrt(area * (h / w)), math.sqrt(area / (h / w))
            return tuple(int(side // cell // patch * patch) * cell for side in sides)
        unit, aspect = cell * patch, w / h

        def whole(side):
            return max(int(side // unit), 1) * unit

        def distortion(size):
            ratio = aspect * size[0] / size[1]
            return max(ratio, 1 / ratio)

        wide, high = whole(math.sqrt(area * aspect)), whole(math.sqrt(area / aspect))
        by_width, by_height = (whole(area / wide), wide), (high, whole(area / high))
        return by_width if distortion(by_width) < distortion(by_height) else by_height

    # -- what conditions the transformer

    def contexts(self, prompts, negative=None):
        """Prompts -> (context, null context), each [b, m, text_dim]. One call, so that
        a text encoder is loaded once."""
        negative = self.negative if negative is None else negative
        if negative is None:
            return self.text(prompts), self.text.null(len(prompts))
        both = self.text([*prompts, negative])
        return both[:-1], both[-1:].expand(max(len(prompts), 1), -1, -1)

    def null(self, n):
        """The unconditional context for n videos."""
        if self.negative is None:
            return self.text.null(n)
        return self.contexts([])[1].expand(n, -1, -1)

    def check_pictures(self, image, last=None):
        """UserError for a picture too many or too few (None: not given)."""
        if self.task == "t2v" and (image is not None or last is not None):
            raise UserError(f"{self.name} is a text-to-video model: leave --image away.")
        if last is not None and self.net.config.in_channels == self.net.config.out_channels:
            raise UserError(f"{self.name} takes only a first frame: leave --last-image away.")
        if image is None and (last is not None or self.task == "i2v"):
            raise UserError(f"{self.name} needs the first frame: give a picture with --image.")

    def image_condition(self, n, shape, size, image=None, last=None):
        """Pictures [n, 3, h, w] in [-1, 1] of any size, or None -> ImageCondition of n
        videos of `size`."""
        self.check_pictures(image, last)
        if image is None:
            return ImageCondition(self.condition(n, shape))
        cell = self.ae.config.spatial_factor
        margins = (0, shape[2] * cell - size[1], 0, shape[1] * cell - size[0])
        clip, picture = None, resize(image, size, self.picture)
        if self.clip is not None:
            clip = self.clip(image if self.picture == "wan" else picture).to(self.device)
        first = F.pad(picture, margins, mode="replicate")
        if self.net.config.in_channels == self.net.config.out_channels:
            return ImageCondition(first=self.encode(first[:, :, None]), clip=clip)
        if last is not None:
            last = F.pad(resize(last, size, self.picture), margins, mode="replicate")
        return ImageCondition(self.condition(n, shape, first, last), clip=clip)

    def condition(self, n, shape, image=None, last=None):
        """What an image-to-video transformer sees beside the noise: mask (4) and
        condition latent (z), [n, 4 + z, *shape].

        The clip "image for one latent frame, then mid grey" (and at the end `last`,
        another picture) is encoded. The mask marks the given pixel frames, 4 to a
        latent frame.
        image, last: [n, 3, h, w] in [-1, 1], the padded size of the video. Without an
        image everything is 0. None for transformers without these channels.
        """
        c, a = self.net.config, self.ae.config
        if c.in_channels == c.out_channels:
            return None
        y = torch.zeros(n, c.in_channels - c.out_channels, *shape, device=self.device)
        if image is None:
            return y
        k, frames = a.temporal_factor, a.lead + (shape[0] - 1) * a.temporal_factor
        mask, clip = torch.zeros(frames), torch.zeros(len(image), 3, frames, *image.shape[2:])
        mask[: a.lead] = 1
        clip[:, :, : a.lead] = image[:, :, None]
        if last is not None:
            mask[-a.lead :] = 1
            clip[:, :, -a.lead :] = last[:, :, None]
        mask = torch.cat([mask[:1].expand(k - a.lead), mask])  # a lone first frame fills its four
        y[:, :k] = mask.unflatten(0, (-1, k)).T[:, :, None, None]
        y[:, k:] = self.encode(clip)[:, :, : shape[0]]
        return y

    # -- pixels and latents

    def encode(self, x):
        """Pixels [b, 3, t, h, w] -> the latent the transformer sees (scaled, about unit
        RMS), fp32."""
        x = x.to(self.device, self.ae_dtype)
        pieces = tiling.encode_stream(self.autoencoder(), [x], self.encode_tile)
        return torch.cat(list(pieces), dim=2).float() * self.ae.config.scale

    def decode(self, z, frames, size, tile=None):
        """The transformer's latent -> pieces [b, 3, t, *size] of a video of `frames`
        frames, chunk by chunk."""
        z = (z / self.ae.config.scale).to(self.device, self.ae_dtype)
        for x in tiling.decode_stream(self.autoencoder(), z, tile):
            x = x[:, :, :frames, : size[0], : size[1]]
            frames -= x.shape[2]
            if x.shape[2]:
                yield x


def latent_shape(c, patch, frames, size):
    """`Model.latent_shape`, of an autoencoder's config."""
    cells = (1 + math.ceil(max(frames - c.lead, 0) / c.temporal_factor),
             math.ceil(size[0] / c.spatial_factor), math.ceil(size[1] / c.spatial_factor))
    return tuple(math.ceil(n / p) * p for n, p in zip(cells, patch))


def resize(image, size, rule):
    """A picture [b, 3, h, w] in [-1, 1] -> `size`. "wan": bicubic without antialiasing,
    as the original programs; "dc": Lanczos. Where the aspect differs the picture covers
    the size and is cropped at its centre."""
    (h, w), (height, width) = image.shape[-2:], size
    if (h, w) == tuple(size):
        return image
    scale = max(height / h, width / w)
    cover = max(height, round(h * scale)), max(width, round(w * scale))
    if rule == "wan":
        if max(cover[0] - height, cover[1] - width) < 16:  # off by the size's rounding: no crop
            cover = tuple(size)
        image = F.interpolate(image, cover, mode="bicubic", align_corners=False)
    else:
        pictures = map(Image.fromarray, video.to_uint8(image.transpose(0, 1)))
        resized = [picture.resize(cover[::-1], Image.LANCZOS) for picture in pictures]
        image = video.to_tensor(np.stack(resized)).transpose(0, 1)
    top, left = (cover[0] - height) // 2, (cover[1] - width) // 2
    return image[..., top : top + height, left : left + width]
