"""Prompt (and image) to video: the guided loop in latent space, then a streaming decode (paper, results; spec ae-adapt-v 7, wan 8 to 10).

    noise [b z t h w]  --solver, `steps` times: v = net(x, t, prompt), guided-->  latent  --autoencoder, chunk by chunk-->  video

The loop is the same for every model; what a model is made of stands in `Model`. The toy models are embedded in weights/:

    python sample.py --prompt "a large red circle moving left slowly on a blue background"            the adapted model, a few seconds
    python sample.py --model base --prompt "..."                                                      its base: 4x the tokens
    python sample.py --prompt "a green ring moving up" --image picture.png                            image to video
    python sample.py --model out/adapt --prompt "..."                                                 a model made by adapt.py

Writes NAME.mp4, NAME.png (contact sheet), NAME.json (settings and timings) and NAME.safetensors (the latent, before it is decoded).
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting threads slow every other process down; must precede torch

import argparse
import re
import resource
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import ae
import checkpoint
import data
import dit
import encoders
import flow
import lora
from checkpoint import UserError

WEIGHTS = Path(__file__).resolve().parent / "weights"


@dataclass
class Model:
    """A text- or image-to-video model and its defaults."""

    name: str
    net: dit.WanDiT
    ae: ae.DCAEV
    text: encoders.ToyText
    frames: int = 32
    size: tuple = (64, 64)  # height, width
    fps: int = 16
    steps: int = 20
    shift: float = 3.0
    guidance: float = 4.0
    solver: str = "unipc"
    upscale: int = 4  # of the mp4: yuv420 halves the colour resolution, which 64x64 cannot afford

    def __post_init__(self):
        ours, theirs = self.net.config.out_channels, self.ae.config.latent_channels
        if ours != theirs:
            raise UserError(f"the transformer of {self.name} makes latents of {ours} channels, but its autoencoder reads {theirs}: "
                            "they do not belong together.")

    def latent_shape(self, frames, size):
        """(t, h, w) of the latent that covers `frames` frames of `size` pixels and that the patches divide."""
        c, (pt, ph, pw) = self.ae.config, self.net.config.patch
        up = lambda n, cell, patch: -(-n // (cell * patch)) * patch
        return up(frames, c.temporal_factor, pt), up(size[0], c.spatial_factor, ph), up(size[1], c.spatial_factor, pw)

    @property
    def device(self):
        return next(self.net.parameters()).device

    def to(self, device):
        self.net.to(device)
        self.ae.to(device)
        return self

    def encode(self, x):
        """Pixels -> the latent the transformer sees (scaled, about unit RMS)."""
        return self.ae.encode(x.to(self.device)) * self.ae.config.scale

    def decode(self, z, frames, size):
        """The transformer's latent -> pieces [b, 3, t, *size] of a video of `frames` frames, chunk by chunk."""
        for x in self.ae.decode_stream(z / self.ae.config.scale):
            x = x[:, :, :frames, : size[0], : size[1]]
            frames -= x.shape[2]
            if x.shape[2]:
                yield x

    def condition(self, n, shape, image=None):
        """What an image-to-video transformer sees beside the noise: mask (4) and condition latent (z), [n, 4 + z, *shape].

        The clip "image for one latent frame, then mid grey" is encoded; the mask is 1 on that latent frame (spec ae-adapt-v 6).
        Without an image everything is 0. None for transformers without these channels.
        """
        c = self.net.config
        if c.in_channels == c.out_channels:
            if image is not None:
                raise UserError(f"{self.name} is a text-to-video model: leave --image away.")
            return None
        y = torch.zeros(n, c.in_channels - c.out_channels, *shape, device=self.device)
        if image is not None:
            t, s = self.ae.config.temporal_factor, self.ae.config.spatial_factor
            image = F.pad(image, (0, shape[2] * s - image.shape[3], 0, shape[1] * s - image.shape[2]), mode="replicate")
            clip = torch.zeros(len(image), 3, shape[0] * t, *image.shape[2:])
            clip[:, :, :t] = image[:, :, None]
            y[:, :4, 0] = 1
            y[:, 4:] = self.encode(clip)[:, :, : shape[0]]
        return y


def load_model(name="dc", weights=None):
    """"base" and "dc" are the embedded toy models (or those in the folder `weights`); a folder written by adapt.py is its merged
    model, and a LoRA file of such a folder is put on the embedded base."""
    path, weights = Path(name), Path(weights or WEIGHTS)
    base_file = weights / "toy-base-dit.safetensors"
    if name == "base":
        return Model("toy base", dit.load(base_file), ae.load(weights / "toy-base.safetensors"), encoders.ToyText())
    if path.is_dir():
        return Model(name, dit.load(path / "transformer.safetensors"), ae.load(path / "ae.safetensors"), encoders.ToyText())
    if name != "dc" and path.suffix != ".safetensors":
        raise UserError(f"there is no model {name!r}: use base, dc, a folder made by adapt.py, or its lora.safetensors.")
    net = dit.inherit(dit.load(base_file), dit.PRESETS["toy-dc"])
    lora.load(net, weights / "toy-dc-lora.safetensors" if name == "dc" else path)
    return Model("toy DC-VideoGen" if name == "dc" else name, net.eval(), ae.load(weights / "toy.safetensors"), encoders.ToyText())


@torch.no_grad()
def generate(model, context, image=None, frames=None, size=None, steps=None, guidance=None, shift=None, solver=None, seed=0,
             noise=None, progress=False):
    """The guided loop -> latent [b, z, t, h, w] in the transformer's scale, fp32.

    `context`: prompt states [b, m, d]. `image`: [b, 3, *size] in [-1, 1] or None. The rest defaults to the model's own settings. The noise
    of sample i depends on `seed + i` and the shape only, so a batch gives what single runs give. NaN in the latent is a UserError.
    """
    n, device = len(context), model.device
    frames, size = frames or model.frames, size or model.size
    shape = model.latent_shape(frames, size)
    if noise is None:
        draw = lambda s: torch.randn(model.net.config.out_channels, *shape, generator=torch.Generator().manual_seed(s))
        noise = torch.stack([draw(seed + i) for i in range(n)])
    condition = model.condition(n, shape, image)

    def net(x, t, context):
        x = x if condition is None else torch.cat([x, condition], dim=1)
        return model.net(x, t.expand(n), context)

    steps = model.steps if steps is None else steps
    velocity = flow.guided(net, context.to(device), model.text.null(n).to(device), model.guidance if guidance is None else guidance)
    with tqdm(total=steps, desc="denoise", disable=not progress, leave=False) as bar:

        def callback(step, x, x0):
            if not torch.isfinite(x).all():
                raise UserError(f"the latent became NaN at step {step + 1} of {steps}: use --dtype fp32, or other weights.")
            bar.update()

        return flow.solve(velocity, noise.to(device), steps, model.shift if shift is None else shift, solver or model.solver, callback)


@torch.no_grad()
def videos(model, prompts, batch=32, progress=False, **settings):
    """Many prompts (sentences, or dicts of toy attributes) -> list of videos [3, t, h, w], the i-th with seed + i."""
    seed, out = settings.pop("seed", 0), []
    frames, size = settings.get("frames") or model.frames, settings.get("size") or model.size
    for i in tqdm(range(0, len(prompts), batch), desc="videos", disable=not progress, leave=False):
        part = prompts[i : i + batch]
        context = model.text(part) if isinstance(part[0], str) else model.text.encode(part)
        z = generate(model, context, seed=seed + i, **settings)
        out += torch.cat(list(model.decode(z, frames, size)), dim=2).float().cpu().unbind()
    return out


# ---------------------------------------------------------------------------------------------------- command line


def main(argv=None):
    parser = argparse.ArgumentParser(description="Prompt (and image) to video.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prompt", required=True, help="what the video shows")
    parser.add_argument("--model", default="dc", help="base, dc, a folder made by adapt.py, or a LoRA file of such a folder")
    parser.add_argument("--image", help="picture that becomes the first frame")
    parser.add_argument("--frames", type=int, help="number of frames (default: the model's)")
    parser.add_argument("--size", type=data.size_arg, help="HEIGHTxWIDTH in pixels (default: the model's)")
    parser.add_argument("--steps", type=int, help="solver steps (default: the model's)")
    parser.add_argument("--solver", choices=["unipc", "unipc_diffusers", "dpm++", "euler"], help="(default: the model's)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none (default: the model's)")
    parser.add_argument("--shift", type=float, help="shift of the noise schedule (default: the model's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/sample", help="folder for the results")
    parser.add_argument("--name", help="file name without suffix (default: model, prompt and seed)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the transformer's matrix products")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for flag, low in (("frames", 1), ("steps", 1)):
        if getattr(args, flag) is not None and getattr(args, flag) < low:
            raise UserError(f"--{flag} must be at least {low}, got {getattr(args, flag)}.")

    started = time.perf_counter()
    model = load_model(args.model).to(args.device)
    if args.dtype == "bf16":
        model.net.cast_weights(torch.bfloat16)
    for name in ("frames", "size", "steps", "solver", "guidance", "shift"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(model, name))
    slug = re.sub(r"[^a-z0-9]+", "-", args.prompt.lower()).strip("-")[:60] or "prompt"
    base = Path(args.out) / (args.name or f"{Path(args.model).stem}-{slug}-{args.seed}")
    file = lambda suffix: base.with_name(base.name + suffix)
    seconds = {"load": time.perf_counter() - started}

    def timed(what, started):
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[what] = time.perf_counter() - started

    started = time.perf_counter()
    context = model.text([args.prompt])
    image = None if args.image is None else data.read_image(args.image, args.size)[None]
    timed("text", started)
    base.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=base.parent).close()  # a folder that cannot be written is told now, not after the work

    started = time.perf_counter()
    z = generate(model, context, image, args.frames, args.size, args.steps, args.guidance, args.shift, args.solver, args.seed, progress=True)
    timed("transformer", started)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "name")}
    checkpoint.save_tensors(file(".safetensors"), {"latent": z}, {"settings": settings})

    started = time.perf_counter()
    shown, kept, count = {round(i * (args.frames - 1) / 7) for i in range(8)}, [], 0

    def pieces():  # written as they are decoded; only the frames of the contact sheet stay in memory
        nonlocal count
        for piece in model.decode(z, args.frames, args.size):
            piece = piece[0].float().cpu()
            kept.extend(piece[:, i].clone() for i in range(piece.shape[1]) if count + i in shown)
            count += piece.shape[1]
            yield piece

    with torch.no_grad():
        data.write_video(file(".mp4"), pieces(), model.fps, scale=model.upscale)
    timed("decode", started)
    data.contact_sheet(file(".png"), [torch.stack(kept, dim=1)], columns=len(kept), scale=model.upscale // 2)

    passes = 1 if args.guidance == 1 else 2
    cost = passes * args.steps * dit.flops(model.net.config, z.shape[2:]).total
    memory = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report = dict(model=model.name, prompt=args.prompt, frames=args.frames, size=args.size, steps=args.steps, passes=passes,
                  tokens=dit.tokens(model.net.config, z.shape[2:]), seconds={k: round(v, 3) for k, v in seconds.items()},
                  tflops_per_second=cost / seconds["transformer"] / 1e12, peak_memory_gib=memory / 2**30)
    checkpoint.write_json(file(".json"), {**report, "settings": settings})
    print(f"{model.name}: {args.frames} frames of {args.size[0]}x{args.size[1]}, {report['tokens']} tokens, {args.steps} steps x {passes} passes")
    print("  " + ", ".join(f"{what} {s:.2f} s" for what, s in seconds.items())
          + f"; {report['tflops_per_second']:.3f} TFLOP/s, peak memory {report['peak_memory_gib']:.2f} GiB")
    print(f"  {file('.mp4')}   {file('.png')}")


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
