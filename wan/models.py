"""The released models: which files each is made of, in every published layout, and the settings it was made for (spec wan 1.2, 3.1, 7, 9).

A text- or image-to-video model is four networks that meet in few places, and `Model` is that meeting:

    prompt --umT5--> context [b, m, 4096]                              once per prompt, then freed (11 GB); a --text-cache replaces it
    picture --CLIP--> 257 tokens, --autoencoder--> condition latent    image-to-video only
    noise, context, condition --transformer, `steps` times--> latent   (Wan 2.2 A14B: two experts that take turns)
    latent --autoencoder--> frames

Base and DC-VideoGen models differ in numbers only: autoencoder 8x8x4 with 1+4k frames against 32x32x4 with 4k frames, patch 2 against 1.
The rows of `RELEASED` hold those numbers. `load_model` looks for a row's files in the folders it is given, in the original, the
diffusers and both DC-VideoGen layouts, and says exactly which are missing; nothing is downloaded unasked.

    python -m wan.models                     the table: files, sizes, memory, defaults
"""
import argparse
import dataclasses
import gc
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import ae
import dit
import lora
import toy
from files import ROOT, checkpoint, video
from files.checkpoint import UserError
from wan import vae
from wan.image import WanImage
from wan.text import WanText

WEIGHTS = ROOT / "weights"  # the embedded toy models

NEGATIVE = ("色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
            "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
NEGATIVE_ENGLISH = ("Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall gray, worst quality, "
                    "low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, "
                    "misshapen limbs, fused fingers, still picture, messy background, three legs, many people in the background, walking backwards")


# ---------------------------------------------------------------------------------------------------- what was released


@dataclass(frozen=True)
class Released:
    """One released model: its files and its defaults."""

    repo: str | None  # id on the model hub; None: the files are named in publications, but no place to fetch them from is known
    preset: str  # of dit.PRESETS
    files: dict  # part -> patterns, relative to the folder; the first is the repo's own, the others are other published layouts
    size: tuple = (720, 1280)  # height, width; for image-to-video base models an area that takes the picture's aspect
    frames: int = 81
    fps: int = 16
    steps: int = 50
    shift: float = 5.0
    guidance: float | tuple = 5.0  # or (low-noise expert, high-noise expert)
    solver: str = "unipc"
    negative: str = NEGATIVE
    boundary: float = 0.0  # the high-noise expert works at timesteps >= 1000 * boundary
    task: str = "t2v"  # "i2v": needs a picture; "ti2v": takes one
    picture: str = "dc"  # how a picture is resized: "wan" or "dc", see `resize`
    area: int = 0  # image-to-video: pixels of a frame, whose aspect is the picture's; 0: always `size`


_TEXT = {"text encoder": ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder/*.safetensors"), "tokenizer": ("google/umt5-xxl/*", "tokenizer/*")}
_CLIP = {"image encoder": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "image_encoder/*.safetensors")}
_VAE = {"autoencoder": ("Wan2.1_VAE.pth", "vae/*.safetensors")}
_WAN = {"transformer": ("diffusion_pytorch_model*.safetensors", "transformer/*.safetensors"), **_VAE, **_TEXT}
_EXPERTS = {"transformer": ("high_noise_model/*.safetensors", "transformer/*.safetensors"),
            "low-noise transformer": ("low_noise_model/*.safetensors", "transformer_2/*.safetensors"), **_VAE, **_TEXT}
_DC_AE = {"autoencoder": ("dc-ae-v-f32t4c32-1.0-bf16.pt", "dc-ae-v-1.0-f32t4c32-bf16.pt")}
_DC_TEXT = {"text encoder": _TEXT["text encoder"][::-1], "tokenizer": _TEXT["tokenizer"][::-1]}
_DC = dict(size=(704, 1280), frames=80, solver="unipc_diffusers", negative=NEGATIVE_ENGLISH)

RELEASED = {
    "wan2.1-t2v-1.3b": Released("Wan-AI/Wan2.1-T2V-1.3B", "wan2.1-t2v-1.3b", _WAN, size=(480, 832)),
    "wan2.1-t2v-14b": Released("Wan-AI/Wan2.1-T2V-14B", "wan2.1-t2v-14b", _WAN),
    "wan2.1-i2v-14b-480p": Released("Wan-AI/Wan2.1-I2V-14B-480P", "wan2.1-i2v-14b", _WAN | _CLIP, size=(480, 832), steps=40, shift=3.0, area=480 * 832,
                                    negative="镜头晃动，" + NEGATIVE, task="i2v", picture="wan"),
    "wan2.1-i2v-14b-720p": Released("Wan-AI/Wan2.1-I2V-14B-720P", "wan2.1-i2v-14b", _WAN | _CLIP, steps=40, area=720 * 1280,
                                    negative="镜头晃动，" + NEGATIVE, task="i2v", picture="wan"),
    "wan2.2-t2v-a14b": Released("Wan-AI/Wan2.2-T2V-A14B", "wan2.2-t2v-a14b", _EXPERTS, steps=40, shift=12.0, guidance=(3.0, 4.0), boundary=0.875),
    "wan2.2-i2v-a14b": Released("Wan-AI/Wan2.2-I2V-A14B", "wan2.2-i2v-a14b", _EXPERTS, steps=40, guidance=(3.5, 3.5), boundary=0.9, task="i2v",
                                picture="wan", area=720 * 1280),
    "wan2.2-ti2v-5b": Released("Wan-AI/Wan2.2-TI2V-5B", "wan2.2-ti2v-5b", _WAN | {"autoencoder": ("Wan2.2_VAE.pth", "vae/*.safetensors")},
                               size=(704, 1280), frames=121, fps=24, task="ti2v", area=704 * 1280),
    "dc-wan2.1-t2v-14b": Released("nvidia/DC-VideoGen-Wan2.1-14B", "dc-wan2.1-t2v-14b",
                                  {"transformer": ("transformer_t2v/*.safetensors", "transformer/*.safetensors"), **_DC_AE, **_DC_TEXT}, **_DC),
    "dc-wan2.1-i2v-14b": Released("nvidia/DC-VideoGen-Wan2.1-14B", "dc-wan2.1-i2v-14b",
                                  {"transformer": ("transformer_i2v/*.safetensors", "transformer/*.safetensors", "dc_videogen_wan2.1_i2v_14b_720p_0.1.pt"),
                                   **_DC_AE, **_DC_TEXT, **_CLIP}, task="i2v", area=720 * 1280, **_DC),
    "dc-wan2.1-t2v-1.3b": Released(None, "dc-wan2.1-t2v-1.3b",
                                   {"transformer": ("dc_videogen_wan2.1_t2v_1.3b_720p_0.1.pt", "transformer/*.safetensors", "transformer_t2v/*.safetensors"),
                                    **_DC_AE, **_DC_TEXT}, guidance=3.0, **_DC),
}


def find(patterns, folders):
    """The first of the patterns that exists in one of the folders -> a file, or the folder that holds several; None if there is none."""
    for folder in folders:
        for pattern in patterns:
            found = sorted(Path(folder).glob(pattern))
            if found:
                return found[0].parent if "*" in pattern else found[0]
    return None


def locate(name, folders, optional=()):
    """Where the parts of a released model lie -> {part: path}. Missing parts are a UserError that lists them and the command that fetches
    them; parts in `optional` may be missing (their path is None)."""
    row = RELEASED[name]
    found = {part: find(patterns, folders) for part, patterns in row.files.items()}
    missing = [f"{part}: {' or '.join(row.files[part])}" for part, path in found.items() if path is None and part not in optional]
    if missing:
        fetch = f", or fetch them with --download or with\n    {download_command(name, folders[0])}" if row.repo else "; no place to fetch them from is known."
        raise UserError(f"{name} is not complete in {', '.join(map(str, folders))}; missing are\n    " + "\n    ".join(missing)
                        + f"\nname the folders that hold them with --weights DIR [DIR ...]{fetch}")
    return found


def download_command(name, folder):
    """The command of the hub's own client that fetches a model's files."""
    patterns = " ".join(f'"{pattern}"' for pattern in wanted(name))
    return f"hf download {RELEASED[name].repo} --include {patterns} --local-dir {folder}"


def wanted(name):
    """Patterns to download: the repo's own layout, and the small files (configs, indices) beside the weights."""
    return [*(patterns[0] for patterns in RELEASED[name].files.values()), "*.json"]


def download(name, folder):
    """Fetch a model's files with the hub's own client, resumable; a UserError says what to install where it is missing."""
    if RELEASED[name].repo is None:
        raise UserError(f"no place to fetch {name} from is known: leave --download away and name its folder with --weights.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError("--download needs the hub's client: pip install huggingface_hub, or fetch the files yourself with "
                        + download_command(name, folder)) from None
    try:
        snapshot_download(RELEASED[name].repo, local_dir=folder, allow_patterns=wanted(name))
    except Exception as e:  # no network, no such repo, no access: the client's own exceptions have no common base class
        raise UserError(f"the download of {RELEASED[name].repo} failed ({str(e).splitlines()[0]}): run it again, finished files are kept.") from e


# ---------------------------------------------------------------------------------------------------- a model, ready to run


class Deferred:
    """A transformer on disk. It is read when first called for, which is after the text encoder has gone, and put away when its memory
    is needed: Wan 2.2's experts take turns, and with --offload it makes room for the decode."""

    def __init__(self, path, loras=(), dtype=torch.float32, expert=None, config=None):
        self.path, self.loras, self.dtype, self.expert = path, loras, dtype, expert
        self.config = config or dit.read_config(path)
        self.net = None

    def get(self, device, stream=False):
        if self.net is None:
            self.net = dit.load(self.path, dtype=self.dtype, device="cpu" if stream else device)
            for file, strength in self.loras:
                lora.load(self.net, file, strength, expert=self.expert)
            if stream:
                self.net = dit.stream_blocks(self.net, device)
        return self.net

    def put_away(self):
        if self.net is not None:
            self.net = None
            gc.collect()
            torch.cuda.empty_cache()


class Seen(NamedTuple):
    """What a transformer sees of the given pictures; each may be None."""

    condition: torch.Tensor | None  # [n, 4 + z, t, h, w], beside the noise on the channel axis
    first: torch.Tensor | None  # [n, z, 1, h, w], in place of latent frame 0
    clip: torch.Tensor | None  # [n, 257, 1280], for the image cross-attention


@dataclass
class Model:
    """A text- or image-to-video model and its defaults. `net` (and `low`) are transformers, or Deferred ones."""

    name: str
    net: dit.WanDiT | Deferred
    ae: ae.DCAEV | vae.WanVAE
    text: toy.ToyText | WanText
    frames: int = 32
    size: tuple = (64, 64)  # height, width
    fps: int = 16
    steps: int = 20
    shift: float = 3.0
    guidance: float | tuple = 4.0
    solver: str = "unipc"
    upscale: int = 4  # of the mp4: yuv420 halves the colour resolution, which 64x64 cannot afford
    negative: str | None = None  # prompt of the unconditional pass; None: zeros, as the toy was trained
    task: str = "ti2v"  # "t2v", "i2v" (needs a picture), "ti2v" (takes one)
    picture: str = "dc"  # how a picture is resized: `resize`
    area: int = 0  # image-to-video: pixels of a frame, whose aspect is the picture's; 0: always `size`
    clip: Callable | None = None  # the image encoder, where the transformer has an image branch
    low: dit.WanDiT | Deferred | None = None  # expert for timesteps below 1000 * boundary; `net` is then the high-noise one
    boundary: float = 0.0
    offload: str = "none"  # or "parts": one network on the device at a time; "blocks": also the transformer block by block
    encode_tile: tuple | None = None  # of the condition's encoding, in latent cells (gpu/tiling.py)
    ae_dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    def __post_init__(self):
        z, c = self.ae.config.latent_channels, self.net.config
        if c.out_channels != z:
            raise UserError(f"the transformer of {self.name} makes latents of {c.out_channels} channels, but its autoencoder reads {z}: "
                            "they do not belong together.")
        if c.in_channels not in (z, 2 * z + self.ae.config.temporal_factor):
            raise UserError(f"the transformer of {self.name} takes {c.in_channels} channels, neither {z} (latent) nor "
                            f"{2 * z + self.ae.config.temporal_factor} (latent, mask, condition): it is for another task.")

    # ---- where it runs

    def to(self, device):
        """Run on `device`. Networks in memory move at once, deferred ones when they are used."""
        self.device = torch.device(device)
        for part in (self.net, self.low):
            if isinstance(part, dit.WanDiT):
                part.to(device)
        self.ae.to("cpu" if self.offload != "none" else device, self.ae_dtype)
        return self

    def transformer(self, t=1000):
        """The transformer for timestep t (0..1000), on the device; its fellow expert is put away."""
        part, other = (self.net, self.low) if self.low is None or t >= 1000 * self.boundary else (self.low, self.net)
        if isinstance(other, Deferred):
            other.put_away()
        if self.offload != "none" and isinstance(part, Deferred) and part.net is None:
            self.ae.to("cpu")
        return part.get(self.device, self.offload == "blocks") if isinstance(part, Deferred) else part

    def autoencoder(self):
        """The autoencoder on the device; with `offload` the transformer is put away for it."""
        if self.offload != "none":
            for part in (self.net, self.low):
                if isinstance(part, Deferred):
                    part.put_away()
        return self.ae.to(self.device)

    # ---- shapes

    def latent_shape(self, frames, size):
        """(t, h, w) of the latent that covers `frames` frames of `size` pixels and that the patches divide."""
        c, (pt, ph, pw) = self.ae.config, self.net.config.patch
        up = lambda n, cell: math.ceil(n / cell) * cell
        return (up(1 + math.ceil(max(frames - c.lead, 0) / c.temporal_factor), pt),
                up(math.ceil(size[0] / c.spatial_factor), ph), up(math.ceil(size[1] / c.spatial_factor), pw))

    def size_for(self, picture):
        """Height and width for a picture [.., h, w]: the model's area in the picture's aspect, whole patches (spec wan 7.2, 7.3)."""
        (h, w), area = picture.shape[-2:], self.area
        if not area:
            return self.size
        f, p = self.ae.config.spatial_factor, self.net.config.patch[1]
        if self.picture == "wan":
            return tuple(int(math.sqrt(a) // f // p * p) * f for a in (area * (h / w), area / (h / w)))
        m, r = f * p, w / h
        floor = lambda x: max(int(x // m), 1) * m
        wide, high = floor(math.sqrt(area * r)), floor(math.sqrt(area / r))
        first, second = (floor(area / wide), wide), (high, floor(area / high))
        off = lambda size: max(r * size[0] / size[1], size[1] / size[0] / r)
        return first if off(first) < off(second) else second

    # ---- what conditions the transformer

    def contexts(self, prompts, negative=None):
        """Prompts -> (context, null context), each [b, m, text_dim]. One call, so that a text encoder is loaded once."""
        negative = self.negative if negative is None else negative
        if negative is None:
            return self.text(prompts), self.text.null(len(prompts))
        both = self.text([*prompts, negative])
        return both[:-1], both[-1:].expand(max(len(prompts), 1), -1, -1)

    def null(self, n):
        """The unconditional context for n videos."""
        return self.contexts([])[1].expand(n, -1, -1) if self.negative is not None else self.text.null(n)

    def check_pictures(self, image, last=None):
        """UserError for a picture too many or too few (None: not given)."""
        if self.task == "t2v" and (image is not None or last is not None):
            raise UserError(f"{self.name} is a text-to-video model: leave --image away.")
        if last is not None and self.net.config.in_channels == self.net.config.out_channels:
            raise UserError(f"{self.name} takes only a first frame: leave --last-image away.")
        if image is None and (last is not None or self.task == "i2v"):
            raise UserError(f"{self.name} needs the first frame: give a picture with --image.")

    def see(self, n, shape, size, image=None, last=None):
        """Pictures [n, 3, h, w] in [-1, 1] of any size, or None -> what the transformer sees of them in a video of `size`."""
        self.check_pictures(image, last)
        if image is None:
            return Seen(self.condition(n, shape), None, None)
        fit = lambda x: None if x is None else resize(x, size, self.picture)
        s = self.ae.config.spatial_factor
        pad = lambda x: None if x is None else F.pad(x, (0, shape[2] * s - size[1], 0, shape[1] * s - size[0]), mode="replicate")
        clip = None if self.clip is None else self.clip(image if self.picture == "wan" else fit(image)).to(self.device)
        first, last = pad(fit(image)), pad(fit(last))
        if self.net.config.in_channels > self.net.config.out_channels:
            return Seen(self.condition(n, shape, first, last), None, clip)
        return Seen(None, self.encode(first[:, :, None]), clip)

    def condition(self, n, shape, image=None, last=None):
        """What an image-to-video transformer sees beside the noise: mask (4) and condition latent (z), [n, 4 + z, *shape].

        The clip "image for one latent frame, then mid grey" (and at the end `last`, another picture) is encoded. The mask marks the
        given pixel frames, 4 to a latent frame (spec wan 7.2, 7.4; ae-adapt-v 6). image, last: [n, 3, h, w] in [-1, 1], the padded
        size of the video. Without an image everything is 0. None for transformers without these channels.
        """
        c, a = self.net.config, self.ae.config
        if c.in_channels == c.out_channels:
            return None
        y = torch.zeros(n, c.in_channels - c.out_channels, *shape, device=self.device)
        if image is None:
            return y
        frames = a.lead + (shape[0] - 1) * a.temporal_factor
        mask = torch.zeros(frames)
        mask[: a.lead] = 1
        grey = torch.zeros(len(image), 3, frames - a.lead, *image.shape[2:])
        if last is not None:
            mask[-a.lead :] = 1
            grey[:, :, -a.lead :] = last[:, :, None]
        mask = torch.cat([mask[:1].expand(a.temporal_factor - a.lead), mask]).unflatten(0, (-1, a.temporal_factor))
        y[:, : a.temporal_factor] = mask.T[:, :, None, None]
        clip = torch.cat([image[:, :, None].expand(-1, -1, a.lead, -1, -1), grey], dim=2)
        y[:, a.temporal_factor :] = self.encode(clip)[:, :, : shape[0]]
        return y

    # ---- pixels and latents

    def encode(self, x):
        """Pixels [b, 3, t, h, w] -> the latent the transformer sees (scaled, about unit RMS), fp32."""
        return self.autoencoder().encode(x.to(self.device, self.ae_dtype), tile=self.encode_tile).float() * self.ae.config.scale

    def decode(self, z, frames, size, tile=None):
        """The transformer's latent -> pieces [b, 3, t, *size] of a video of `frames` frames, chunk by chunk."""
        for x in self.autoencoder().decode_stream((z / self.ae.config.scale).to(self.device, self.ae_dtype), tile=tile):
            x = x[:, :, :frames, : size[0], : size[1]]
            frames -= x.shape[2]
            if x.shape[2]:
                yield x


def resize(image, size, rule):
    """A picture [b, 3, h, w] in [-1, 1] -> `size`. "wan": bicubic without antialiasing, as the original programs; "dc": Lanczos. Where the
    aspect differs the picture covers the size and is cropped at its centre (spec wan 7.2, 7.3)."""
    (h, w), (height, width) = image.shape[-2:], size
    if (h, w) == tuple(size):
        return image
    scale = max(height / h, width / w)
    cover = max(height, round(h * scale)), max(width, round(w * scale))
    if rule == "wan":
        if max(cover[0] - height, cover[1] - width) < 16:  # the aspect is the picture's own up to the rounding of the size: no crop
            return F.interpolate(image, size, mode="bicubic", align_corners=False)
        image = F.interpolate(image, cover, mode="bicubic", align_corners=False)
    else:
        pictures = [Image.fromarray(x).resize(cover[::-1], Image.LANCZOS) for x in video.to_uint8(image.transpose(0, 1))]
        image = video.to_tensor(np.stack(pictures)).transpose(0, 1)
    top, left = (cover[0] - height) // 2, (cover[1] - width) // 2
    return image[..., top : top + height, left : left + width]


# ---------------------------------------------------------------------------------------------------- by name


def load_model(name="dc", weights=(), loras=(), dtype=torch.float32, device="cpu", text_cache=None):
    """A model by name -> Model on `device`.

    "base" and "dc": the embedded toy models. A name of RELEASED: its files in the folders `weights` (default: checkpoints/NAME). A folder
    written by adapt.py: its merged model; a LoRA file of such a folder is put on the embedded base. `loras`: (file, strength[,
    "high" | "low"]) put on the transformer. dtype: of the transformer's matrix products.
    """
    path, weights = Path(name), [Path(w) for w in ([weights] if isinstance(weights, (str, Path)) else weights)]
    for file, _, *expert in loras:
        if not Path(file).is_file():  # known now, not when the transformer is read
            raise UserError(f"{file} does not exist: give the path of a LoRA file.")
        if expert and not (name in RELEASED and RELEASED[name].boundary or (path / "transformer_2.safetensors").exists() or (path / "transformer_2").exists()):
            raise UserError(f"{name} has one transformer, no experts: use --lora {file} instead of --lora-{expert[0]}.")
    if name in RELEASED:
        return released(name, weights or [Path("checkpoints") / name], loras, dtype, device, text_cache).to(device)
    if path.is_dir():
        model = adapted(path, weights, loras, dtype, device, text_cache)
    else:
        model = embedded(name, weights[0] if weights else WEIGHTS)
        for file, strength, *_ in loras:
            lora.load(model.net, file, strength)
        model.net.cast_weights(dtype)
    return model.to(device)


def released(name, folders, loras=(), dtype=torch.float32, device="cpu", text_cache=None):
    """One of RELEASED from its files."""
    row = RELEASED[name]
    cached = ("text encoder", "tokenizer") if text_cache and Path(text_cache).exists() else ()
    parts = locate(name, folders, optional=cached)
    net = Deferred(parts["transformer"], [l[:2] for l in loras if "low" not in l[2:]], dtype, expert="high")
    low = None
    if "low-noise transformer" in parts:
        low = Deferred(parts["low-noise transformer"], [l[:2] for l in loras if "high" not in l[2:]], dtype, expert="low")
    for part in (net, low) if low else (net,):
        check_ends(part, name)
    dc = name.startswith("dc-")
    autoencoder = ae.load(parts["autoencoder"]) if dc else vae.load(parts["autoencoder"])
    text = WanText(parts["text encoder"], parts["tokenizer"], device, cache=text_cache, text_dim=net.config.text_dim)
    clip = WanImage(parts["image encoder"], device, rule=row.picture) if "image encoder" in parts else None
    settings = settings_of(row) | stored_settings(folders, dc)
    return Model(name, net, autoencoder, text, upscale=1, low=low, clip=clip, ae_dtype=ae_type(name, dtype),
                 **settings)


def check_ends(part, name):
    """UserError where what a transformer takes and makes is not what the released model `name` does."""
    ends = lambda c: (f"{c.in_channels} channels in, {c.out_channels} out, patches of {'x'.join(map(str, c.patch))}, "
                      f"{'an' if c.image_dim else 'no'} image branch")
    found, expected = ends(part.config), ends(dit.PRESETS[RELEASED[name].preset])
    if found != expected:
        raise UserError(f"{part.path} holds the transformer of another model: {found}; {name} has {expected}: name its folder with --weights.")


def ae_type(name, dtype):
    """The released programs run the Wan VAE in fp32 and the DC-AE-V in bf16; on request of fp32 all is fp32."""
    return dtype if name.startswith("dc-") else torch.float32


def outline(name, dtype=torch.float32):
    """A released model without its files, of published shapes: enough to plan memory, not to run."""
    row = RELEASED[name]
    with torch.device("meta"):
        if name.startswith("dc-"):
            autoencoder = ae.DCAEV(ae.PRESETS["f32t4c32"])
        else:
            autoencoder = vae.WanVAE(vae.PRESETS["wan2.2" if name == "wan2.2-ti2v-5b" else "wan2.1"])
    experts = {"low": Deferred(None, config=dit.PRESETS[row.preset])} if row.boundary else {}
    return Model(name, Deferred(None, config=dit.PRESETS[row.preset]), autoencoder, text=None, upscale=1, ae_dtype=ae_type(name, dtype), **experts,
                 **settings_of(row))


def settings_of(row):
    """The defaults that a Model takes over from its row."""
    names = {f.name for f in dataclasses.fields(Released)} & {f.name for f in dataclasses.fields(Model)}
    return {name: getattr(row, name) for name in names}


def stored_settings(folders, dc):
    """Settings that a folder in diffusers' layout brings: the experts' boundary, and for DC-VideoGen the schedule's shift (spec wan 9.3)."""
    def read(name):
        file = find([name], folders)
        return json.loads(file.read_text()) if file else {}

    stored = {"boundary": read("model_index.json").get("boundary_ratio"),
              "shift": read("scheduler/scheduler_config.json").get("flow_shift") if dc else None}
    return {k: v for k, v in stored.items() if v is not None}


def embedded(name, weights=WEIGHTS):
    """The embedded toy models, or a LoRA file on their base."""
    base_file = weights / "toy-base-dit.safetensors"
    if name == "base":
        return Model("toy base", dit.load(base_file), ae.load(weights / "toy-base.safetensors"), toy.ToyText())
    if name != "dc" and Path(name).suffix != ".safetensors":
        raise UserError(f"there is no model {name!r}: use base, dc, {', '.join(RELEASED)}, a folder made by adapt.py, or its lora.safetensors.")
    net = dit.inherit(dit.load(base_file), dit.PRESETS["toy-dc"])
    lora.load(net, weights / "toy-dc-lora.safetensors" if name == "dc" else name)
    return Model("toy DC-VideoGen" if name == "dc" else str(name), net.eval(), ae.load(weights / "toy.safetensors"), toy.ToyText())


#: what adapt.py notes in the header of a model that it writes, and `adapted` reads
SAMPLING = ("frames", "size", "fps", "steps", "shift", "guidance", "solver", "upscale", "negative", "task", "picture", "area", "boundary")


def adapted(path, folders, loras=(), dtype=torch.float32, device="cpu", text_cache=None):
    """A folder written by adapt.py: ae.safetensors and transformer.safetensors (for Wan 2.2 also transformer_2, for low noise), or folders of these
    names in diffusers' layout. How it samples stands in the transformer's header; without that it is taken for the released DC-VideoGen model
    of the same shape. Text (and image) encoder come from `folders`."""
    high, low = (find((f"{stem}.safetensors", f"{stem}/*.safetensors"), [path]) for stem in ("transformer", "transformer_2"))
    if high is None or not (path / "ae.safetensors").is_file():
        raise UserError(f"{path / ('transformer' if high is None else 'ae')}.safetensors does not exist: give a folder made by adapt.py, or a model's name with "
                        f"--weights {path}.")
    net = Deferred(high, [l[:2] for l in loras if "low" not in l[2:]], dtype, expert=low and "high")
    low = low and Deferred(low, [l[:2] for l in loras if "high" not in l[2:]], dtype, expert="low")
    told, c = checkpoint.open_tensors(high)[1].get("adapted", {}), net.config
    task = "t2v" if c.in_channels == c.out_channels else "i2v"
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in told.get("sampling", {}).items()}
    autoencoder = ae.load(path / "ae.safetensors")
    if c.text_dim == toy.ToyText.text_dim:
        return Model(str(path), net.get("cpu"), autoencoder, toy.ToyText(), **{"task": "t2v" if task == "t2v" else "ti2v", **own})
    row = RELEASED[told.get("base") or ("dc-wan2.1-t2v-1.3b" if c.dim < 5120 else f"dc-wan2.1-{task}-14b")]
    parts = {part: find(patterns, folders) for part, patterns in row.files.items()}
    text = WanText(parts["text encoder"], parts["tokenizer"], device, cache=text_cache, text_dim=c.text_dim)
    clip = WanImage(parts["image encoder"], device, rule="dc") if c.image_dim else None
    return Model(str(path), net, autoencoder, text, low=low, clip=clip, ae_dtype=dtype, **{"upscale": 1, **settings_of(row), **own})


def is_wan(name):
    """Is a model, by its name, anything but the toy? A folder is if its transformer reads umT5's prompts."""
    transformer = find(("transformer.safetensors", "transformer/*.safetensors"), [name])
    return name in RELEASED or transformer is not None and dit.read_config(transformer).text_dim != toy.ToyText.text_dim


def weight_bytes(config, dtype):
    """Memory of a transformer's weights -> (all of them, those on the device while the blocks are streamed: ends and two blocks)."""
    with torch.device("meta"):
        sizes = {n: p.numel() * (4 if dit.keeps_fp32(n) else dtype.itemsize) for n, p in dit.WanDiT(config).named_parameters()}
    waiting = sum(size for n, size in sizes.items() if n.startswith("blocks.") and not n.startswith(("blocks.0.", "blocks.1.")))
    return sum(sizes.values()), sum(sizes.values()) - waiting


def table(dtype=torch.bfloat16):
    """The released models in Markdown: defaults, and the estimated GiB that each needs on a device at its default size."""
    lines = ["| model | default video | tokens | transformer | denoising, resident | denoising, streamed | autoencoder | decode, whole | decode, 4x4 tiles |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name in RELEASED:
        m = outline(name, dtype)
        shape, gib = m.latent_shape(m.frames, m.size), lambda n: f"{n / 2**30:.1f}"
        weights, streamed = weight_bytes(m.net.config, dtype)
        step = dit.activation_bytes(m.net.config, shape, dtype=dtype)
        autoencoder = sum(p.numel() for p in m.ae.parameters()) * m.ae_dtype.itemsize
        tile = tuple(math.ceil(n / 4) for n in shape[1:])
        decode = [autoencoder + m.ae.decode_peak(shape, t, m.ae_dtype) for t in (None, tile)]
        lines.append(f"| `{name}` | {m.frames} x {m.size[0]}x{m.size[1]} | {dit.tokens(m.net.config, shape):,d} | "
                     + " | ".join(map(gib, (weights, weights + step, streamed + step, autoencoder, *decode))) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="The released models: their files in every known layout, defaults, and memory (estimated, bf16).")
    parser.parse_args()
    for name, row in RELEASED.items():
        print(f"{name}: {row.repo or 'no known place to fetch it from'}; {row.frames} frames of {row.size[0]}x{row.size[1]} at {row.fps} fps, "
              f"{row.steps} steps, shift {row.shift:g}, guidance {row.guidance}, {row.solver}")
        for part, patterns in row.files.items():
            print(f"    {part:22s} {' or '.join(patterns)}")
    print("\nGiB on the device (estimated):\n\n" + table())


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
