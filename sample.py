"""Prompt (and image) to video: the guided loop in latent space, then a streaming decode (paper, results; spec ae-adapt-v 7, wan 8 to 10).

    noise [b z t h w]  --solver, `steps` times: v = net(x, t, prompt), guided-->  latent  --autoencoder, chunk by chunk-->  video

One loop for every model, base or DC-VideoGen, text or image; what a model is made of stands in `wan/models.py`. The toy models are embedded:

    python sample.py --prompt "a large red circle moving left slowly on a blue background"            the adapted model, a few seconds
    python sample.py --model base --prompt "..."                                                      its base: 4x the tokens
    python sample.py --prompt "a green ring moving up" --image picture.png                            image to video
    python sample.py --model out/adapt --prompt "..."                                                 a model made by adapt.py

    python sample.py --model wan2.1-t2v-1.3b --weights DIR --prompt "..."                             official weights in DIR (`wan/models.py`)
    python sample.py --model dc-wan2.1-t2v-14b --weights DIR --prompt "..." --plan                    what it needs, without running

How it is made fast stands in guided.py (a step), kernels.py and gpu/triton_kernels.py (the operations), gpu/choose.py (choices made at the start by measuring; the
first lines say what runs, and why) and gpu/fp8.py. All of it equals the plain path to rounding, except what its flag calls approximate; `--slow` runs the
plain path.

Writes NAME.mp4, NAME.png (contact sheet), NAME.json (settings and timings) and NAME.safetensors (the latent, before it is decoded:
`--decode NAME.safetensors` decodes it again).
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting threads slow every other process down; must precede torch

import argparse
import re
import resource
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

import dit
import flow
import guided
import kernels
from files import checkpoint, video
from files.checkpoint import UserError
from gpu import choose, fp8, tiling
from wan import models
from wan.text import WanText

# ---------------------------------------------------------------------------------------------------- the guided loop


@torch.no_grad()
def generate(model, context, image=None, frames=None, size=None, steps=None, guidance=None, shift=None, solver=None, seed=0,
             noise=None, progress=False, null=None, last_image=None, cfg_batch=None, plain=False, graph=None, **fast):
    """The guided loop -> latent [b, z, t, h, w] in the transformer's scale, fp32.

    `context`, `null`: prompt states [b, m, d] of the prompts and of the unconditional pass (default: the model's own negative prompt).
    `image`, `last_image`: first and last frame, [b, 3, h, w] in [-1, 1] of any size, or None. `guidance`: one number, or a pair for
    (low-noise, high-noise) expert. `cfg_batch`: both guidance passes as one batch (default: where a pass is too small to fill the
    machine). `plain`: nothing is kept from step to step. `graph`: each step is one CUDA graph (default: where it can be). `fast`: compiled,
    fp8, interval, reuse of guided.py. The rest defaults to the model's own settings. The noise of sample i depends on
    `seed + i` and the shape only, so a batch gives what single runs give; `noise` [b, z, t, h, w] replaces it.
    NaN in the latent is a UserError.
    """
    n, device = len(context), model.device
    frames, size, steps = frames or model.frames, size or model.size, model.steps if steps is None else steps
    guidance = model.guidance if guidance is None else guidance
    shape = model.latent_shape(frames, size)
    if noise is None:
        draw = lambda s: torch.randn(model.net.config.out_channels, *shape, generator=torch.Generator().manual_seed(s))
        noise = torch.stack([draw(seed + i) for i in range(n)])
    elif noise.shape[1:] != (model.net.config.out_channels, *shape):
        raise UserError(f"the noise has shape {list(noise.shape)}, but {frames} frames of {size[0]}x{size[1]} need "
                        f"[{n}, {model.net.config.out_channels}, {', '.join(map(str, shape))}].")
    null = model.null(n) if null is None else null
    seen = model.see(n, shape, size, image, last_image)
    solver, shift = solver or model.solver, model.shift if shift is None else shift
    cfg_batch = dit.tokens(model.net.config, shape) <= 4096 if cfg_batch is None else cfg_batch
    graph = no_graph(model, plain) is None if graph is None else graph
    velocity = guided.Velocity(model, context.to(device), null.to(device), seen, guidance, flow.schedule(solver, steps, shift)[1], cfg_batch, plain, graph, **fast)
    with tqdm(total=steps, desc="denoise", disable=not progress, leave=False) as bar:

        def callback(step, x, x0):
            if not torch.isfinite(x).all():
                raise UserError(f"the latent became NaN at step {step + 1} of {steps}: use --dtype fp32, or other weights.")
            bar.update()

        return velocity.keep_first(flow.solve(velocity, noise.to(device), steps, shift, solver, callback))


def no_graph(model, plain=False):
    """Why a step is not run as one CUDA graph; None where it is."""
    if plain:
        return "the graph is switched off"
    if model.device.type != "cuda":
        return f"graphs are for CUDA, not {model.device.type}"
    return "the blocks are streamed" if model.offload == "blocks" else None


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


# ---------------------------------------------------------------------------------------------------- memory


def plan(model, frames, size, dtype, fold, offload=None, tile=None, free=None):
    """Choose how a run fits into memory, before it starts -> (offload, tile, report). Raises UserError where nothing fits.

    offload: "none" (transformer and autoencoder stay on the device), "parts" (one of them at a time), "blocks" (the transformer's
    blocks stream through two buffers); the first that fits, unless given. tile: of the decode, in latent cells; the largest that
    fits. Text and image encoder run before anything else is loaded; a text encoder larger than the GPU runs on the CPU. Figures are
    estimates; the report's peak is measured after the run.
    """
    c, shape = model.net.config, model.latent_shape(frames, size)
    weights, streamed = models.weight_bytes(c, dtype)
    autoencoder = sum(p.numel() for p in model.ae.parameters()) * model.ae_dtype.itemsize
    step = dit.activation_bytes(c, shape, fold, dtype)
    free = free or free_memory(model.device)
    budget = 0.9 * free  # the allocator loses some to fragments
    ways = ["none"] if not isinstance(model.net, models.Deferred) else ["none", "parts"] if model.device.type == "cpu" else ["none", "parts", "blocks"]
    for offload in [offload] if offload else ways:
        resident = weights + autoencoder if offload == "none" else 0
        denoise = resident + step + {"none": 0, "parts": weights, "blocks": streamed}[offload]
        base = resident or autoencoder
        here = tile or tiling.choose(model.ae, shape, budget - base, model.ae_dtype)
        decode = base + model.ae.decode_peak(shape, here, model.ae_dtype)
        if max(denoise, decode) <= budget:
            break
    if model.task != "t2v":
        model.encode_tile = tiling.choose(model.ae, shape, budget - autoencoder, model.ae_dtype, side="encoder")
    if isinstance(model.text, WanText) and model.text.stored_bytes() > budget:
        model.text.device = "cpu"
    report = dict(offload=offload, tile=here, gib={k: round(v / 2**30, 3) for k, v in dict(
        transformer=weights, autoencoder=autoencoder, denoising_peak=denoise, decode_peak=decode, free=free).items()})
    if max(denoise, decode) > budget:
        part, need = ("denoising", denoise) if denoise > budget else ("the decode", decode)
        raise UserError(f"{part} of {frames} frames of {size[0]}x{size[1]} needs about {need / 2**30:.1f} GiB, but {model.device} has {free / 2**30:.1f} GiB free: "
                        "use a smaller --size, fewer --frames, --dtype bf16" + (" or --offload blocks." if "blocks" in ways and offload != "blocks" else "."))
    return offload, here, report


def free_memory(device):
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    found = re.search(r"MemAvailable:\s+(\d+) kB", fields)
    return int(found[1]) * 1024 if found else 8 * 2**30


# ---------------------------------------------------------------------------------------------------- command line


def arguments(argv=None):
    parser = argparse.ArgumentParser(description="Prompt (and image) to video.")
    add = lambda group, *names, **more: group.add_argument(*names, **more)
    what = parser.add_argument_group("what")
    add(what, "--prompt", help="what the video shows")
    add(what, "--negative", help="what it should not show (default: the model's negative prompt)")
    add(what, "--image", help="picture that becomes the first frame")
    add(what, "--last-image", help="picture that becomes the last frame (DC image-to-video)")
    add(what, "--frames", type=int, help="number of frames (default: the model's)")
    add(what, "--size", type=video.size_arg, help="HEIGHTxWIDTH in pixels (default: the model's; with --image its area, the picture's aspect)")
    add(what, "--seed", type=int, default=0, help="of the noise; drawn on the CPU, so a seed is a video on every machine (default: 0)")
    add(what, "--noise", help="safetensors file whose tensor `noise` [1, z, t, h, w] replaces the drawn noise")
    which = parser.add_argument_group("which model")
    add(which, "--model", default=None, help="dc (default) or base: the embedded toys; a released model's name (python -m wan.models lists them); "
                                             "a folder made by adapt.py, or a LoRA file of such a folder")
    add(which, "--weights", nargs="+", default=[], metavar="DIR", help="folders with the model's files (default: checkpoints/MODEL)")
    add(which, "--download", action="store_true", help="fetch the model's files into the first of these folders")
    add(which, "--text-cache", metavar="FILE", help="keep prompt embeddings in FILE; prompts in it need no text encoder")
    for suffix, where in (("", ""), ("-high", " of the high-noise expert only"), ("-low", " of the low-noise expert only")):
        add(which, f"--lora{suffix}", type=lora_arg, action="append", default=[], metavar="FILE[:STRENGTH]",
            help=f"add a LoRA to the transformer{where}; may be repeated")
    how = parser.add_argument_group("how")
    add(how, "--steps", type=int, help="solver steps (default: the model's)")
    add(how, "--solver", choices=["unipc", "unipc_diffusers", "dpm++", "euler"], help="(default: the model's)")
    add(how, "--guidance", type=guidance_arg, help="classifier-free guidance; 1 is none; LOW,HIGH for two experts (default: the model's)")
    add(how, "--shift", type=float, help="shift of the noise schedule (default: the model's)")
    add(how, "--cfg-batch", action=argparse.BooleanOptionalAction, help="both guidance passes as one batch (default: for few tokens)")
    add(how, "--slow", action="store_true", help="the plain path: plain kernels, no graph, nothing kept between steps; equal to rounding")
    add(how, "--graph", action=argparse.BooleanOptionalAction, help="run a step as one CUDA graph (default: where it can be)")
    add(how, "--compile", action="store_true", help="compile the transformer's blocks (a minute at the start of every size)")
    add(how, "--fp8", action="store_true", help="approximate: the blocks' matrix products in 8 bits (fast on Hopper and later)")
    add(how, "--guidance-interval", type=interval_arg, default=(0.0, 1.0), metavar="LOW,HIGH", help="approximate: guidance only between these noise levels, 0..1")
    add(how, "--reuse", type=float, default=0.0, metavar="CHANGE",
        help="approximate: keep the velocity while it is expected to change by less than this fraction (try 0.15)")
    add(how, "--dtype", choices=["fp32", "bf16"], help="of the transformer's matrix products (default: bf16 on a GPU, fp32 for the toy)")
    add(how, "--device", type=device_arg, default="cuda" if torch.cuda.is_available() else "cpu")
    add(how, "--offload", choices=["none", "parts", "blocks"], help="what leaves the device while it is not used (default: as little as fits)")
    add(how, "--tile", type=video.size_arg, metavar="ROWSxCOLUMNS", help="decode in tiles of so many latent cells (default: as large as fits)")
    add(how, "--memory", type=float, metavar="GIB", help="memory to plan for (default: what is free on the device)")
    add(how, "--plan", action="store_true", help="print what the run needs, and stop; needs no files")
    output = parser.add_argument_group("output")
    add(output, "--out", default="out/sample", help="folder for the results (default: out/sample)")
    add(output, "--name", help="file name without suffix (default: model, prompt and seed)")
    add(output, "--decode", metavar="FILE", help="decode a latent saved by an earlier run again, without its transformer")
    args = parser.parse_args(argv)
    for flag, low in (("frames", 1), ("steps", 1)):
        if getattr(args, flag) is not None and getattr(args, flag) < low:
            raise UserError(f"--{flag} must be at least {low}, got {getattr(args, flag)}.")
    if args.slow and (args.compile or args.fp8 or args.graph or args.reuse or args.guidance_interval != (0, 1)):
        raise UserError("--slow is the plain path: leave --graph, --compile, --fp8, --guidance-interval and --reuse away.")
    if args.reuse < 0:
        raise UserError(f"--reuse must not be negative, got {args.reuse:g}.")
    if args.prompt is None and args.decode is None:
        parser.error("--prompt is needed (or --decode FILE).")
    return args


def lora_arg(text):
    """FILE or FILE:STRENGTH -> (path, strength)."""
    file, _, strength = text.rpartition(":")
    if not file:
        return text, 1.0
    try:
        return file, float(strength)
    except ValueError:
        return text, 1.0  # a colon in the path


def device_arg(text):
    """cpu, cuda, cuda:1, ... -> torch.device"""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device: give cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text} is not there: torch finds {torch.cuda.device_count()} GPUs")
    return device


def guidance_arg(text):
    """One number, or LOW,HIGH -> float or pair."""
    values = [float(v) for v in text.split(",")]
    if len(values) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or LOW,HIGH")
    return values[0] if len(values) == 1 else tuple(values)


def interval_arg(text):
    """LOW,HIGH -> two noise levels in 0..1."""
    low, high = (float(v) for v in text.split(","))
    if not 0 <= low < high <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW,HIGH with 0 <= LOW < HIGH <= 1")
    return low, high


class Timer(dict):
    """Seconds by name: `with timer("text"): ...`; waits for the GPU."""

    def __call__(self, name):
        self.name = name
        return self

    def __enter__(self):
        self.started = time.perf_counter()

    def __exit__(self, *_):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self[self.name] = time.perf_counter() - self.started


def choose_fast_paths(model, args):
    """What is decided by trying it on the device, before memory is planned -> lines that say what runs, and why."""
    kernels.use(plain=args.slow)
    lines = [f"thin operations: {kernels.describe(args.device)}"]
    if args.device.type == "cuda":
        if args.device.index is not None:
            torch.cuda.set_device(args.device)  # kernels are launched on the current one
        c = model.net.config
        if args.dtype == "bf16" and not args.slow:
            lines.append(choose.choose_attention(args.device, dit.tokens(c, model.latent_shape(args.frames, args.size)), c.heads, c.dim // c.heads)[1])
        convolution = choose.choose_convolution(args.device, model.ae_dtype)
        model.ae_dtype = convolution.dtype
        model.ae.to(memory_format=torch.contiguous_format if args.slow else convolution.layout)
        lines.append(convolution.line)
    if args.compile and (reason := choose.without_compiler(args.device)):
        args.compile = False
        lines.append(f"blocks: not compiled, because {reason}")
    if args.fp8:
        lines.append("matrix products: fp8" + ("" if fp8.hardware(args.device) else
                                               f", computed in fp32: {args.device} multiplies no fp8 (for measuring the quality)"))
    return lines


def main(argv=None):
    args, seconds = arguments(argv), Timer()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    stored = {}
    if args.decode:
        tensors, metadata = checkpoint.load_tensors(args.decode)
        stored = metadata.get("settings")
        if "latent" not in tensors or not isinstance(stored, dict):
            raise UserError(f"{args.decode} is not a latent saved by sample.py: give the .safetensors file beside a video.")
    for name, default in dict(model="dc", weights=[], frames=None, size=None, prompt="").items():
        if not getattr(args, name):
            setattr(args, name, stored.get(name) or default)
    if args.download and args.model in models.RELEASED:
        args.weights = args.weights or [f"checkpoints/{args.model}"]
        models.download(args.model, args.weights[0])
    args.dtype = args.dtype or ("bf16" if args.device.type == "cuda" and models.is_wan(args.model) else "fp32")
    elsewhere = args.plan and args.device.type == "cpu"  # a plan made here for a machine with a GPU
    if args.dtype == "bf16" and not elsewhere and (reason := choose.without_bf16(args.device)):
        print(f"matrix products: fp32, because {reason}")
        args.dtype = "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    loras = [*args.lora, *((*l, "high") for l in args.lora_high), *((*l, "low") for l in args.lora_low)]
    with seconds("load"):
        if args.plan and args.model in models.RELEASED:
            model = models.outline(args.model, dtype)
        else:
            model = models.load_model(args.model, args.weights, loras, dtype, args.device, args.text_cache)
    image, last = (None if file is None else video.read_image(file)[None] for file in (args.image, args.last_image))
    if args.size is None and image is not None:
        args.size = model.size_for(image)
    for name in ("frames", "size", "steps", "solver", "guidance", "shift"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(model, name))
    args.size = tuple(args.size)
    if args.cfg_batch is None:
        args.cfg_batch = dit.tokens(model.net.config, model.latent_shape(args.frames, args.size)) <= 4096
    choices = [] if args.plan else choose_fast_paths(model, args)
    model.offload, args.tile, memory = plan(model, args.frames, args.size, dtype, 1 + args.cfg_batch, args.offload, args.tile,
                                           args.memory and args.memory * 2**30)
    print(f"{model.name}: {args.frames} frames of {args.size[0]}x{args.size[1]}; expected memory "
          + ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in memory["gib"].items()) + f" GiB; offload {model.offload}, "
          + ("decode " + (f"in tiles of {args.tile[0]}x{args.tile[1]} latent cells" if args.tile else "untiled")))
    if args.plan:
        return
    guided.check(model, args.compile, args.fp8)
    if not args.decode:
        choices.append(f"a step: {'kernel by kernel (' + reason + ')' if (reason := no_graph(model, args.slow or args.graph is False)) else 'one CUDA graph'}"
                       + ", compiled blocks" * args.compile + ", both guidance passes in one batch" * args.cfg_batch)
    print("\n".join(f"  {line}" for line in choices))
    if not args.decode:
        model.check_pictures(image, last)
        if isinstance(args.guidance, tuple) and model.low is None:
            raise UserError(f"{model.name} has one transformer, no experts: give one number with --guidance.")
    model.to(args.device)

    label = Path(args.model).stem if Path(args.model).exists() else args.model
    slug = re.sub(r"\W+", "-", args.prompt.lower()).strip("-")[:60] or "prompt"
    base = Path(args.out) / (args.name or (Path(args.decode).stem if args.decode else f"{label}-{slug}-{args.seed}"))
    file = lambda suffix: base.with_name(base.name + suffix)
    settings = {k: str(v) if isinstance(v, torch.device) else v for k, v in vars(args).items() if k not in ("out", "name", "plan", "decode")}
    if args.decode:
        z = tensors["latent"]
    else:
        with seconds("text"):
            context, null = model.contexts([args.prompt], args.negative)
        base.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=base.parent).close()  # a folder that cannot be written is told now, not after the work
        noise = None if args.noise is None else checkpoint.load_tensors(args.noise)[0].get("noise")
        if args.noise and noise is None:
            raise UserError(f"{args.noise} holds no tensor called noise: give a .safetensors file that does.")
        with seconds("transformer"):
            z = generate(model, context, image, args.frames, args.size, args.steps, args.guidance, args.shift, args.solver, args.seed, noise,
                         progress=True, null=null, last_image=last, cfg_batch=args.cfg_batch, plain=args.slow, graph=args.graph, compiled=args.compile,
                         fp8=args.fp8, interval=args.guidance_interval, reuse=args.reuse)
        checkpoint.save_tensors(file(".safetensors"), {"latent": z}, {"settings": settings})
    with seconds("decode"):
        write(model, z, args.frames, args.size, file, args.tile, overlap=not args.slow)

    shape, passes = z.shape[2:], 1 if args.guidance in (1, (1, 1)) else 2
    used = torch.cuda.max_memory_allocated() if args.device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report = dict(model=model.name, prompt=args.prompt, frames=args.frames, size=args.size, steps=args.steps, passes=passes,
                  tokens=dit.tokens(model.net.config, shape), seconds={k: round(v, 3) for k, v in seconds.items()}, plan=memory,
                  choices=choices, peak_memory_gib=used / 2**30)
    text = f"{model.name}: {args.frames} frames of {args.size[0]}x{args.size[1]}, {report['tokens']} tokens, {args.steps} steps x {passes} passes\n  "
    text += ", ".join(f"{what} {s:.2f} s" for what, s in seconds.items())
    if not args.decode and not args.reuse and args.guidance_interval == (0, 1):  # else it is not known here how much was computed
        report["tflops_per_second"] = passes * args.steps * dit.flops(model.net.config, shape).total / seconds["transformer"] / 1e12
        text += f"; {report['tflops_per_second']:.3f} TFLOP/s"
    checkpoint.write_json(file(".json"), {**report, "settings": settings})
    print(f"{text}; peak memory {report['peak_memory_gib']:.2f} GiB\n  {file('.mp4')}   {file('.png')}")


def write(model, z, frames, size, file, tile=None, overlap=True):
    """Latent -> NAME.mp4 and the contact sheet NAME.png. Frames are written as they are decoded; only the sheet's stay in memory.

    overlap: the next frames are decoded while these are encoded.
    """
    shown, kept, count = {round(i * (frames - 1) / 7) for i in range(8)}, [], 0

    def pieces():
        nonlocal count
        with torch.no_grad(), torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext():  # inside: both hold for one thread
            for piece in model.decode(z, frames, size, tile):
                piece = piece[0].float().cpu()
                kept.extend(piece[:, i].clone() for i in range(piece.shape[1]) if count + i in shown)
                count += piece.shape[1]
                bar.update(piece.shape[1])
                yield piece

    with tqdm(total=frames, desc="decode", leave=False) as bar:
        video.write_video(file(".mp4"), ahead(pieces()) if overlap else pieces(), model.fps, scale=model.upscale)
    video.contact_sheet(file(".png"), [torch.stack(kept, dim=1)], columns=len(kept), scale=max(model.upscale // 2, 1) if size[1] <= 256 else 256 / size[1])


def ahead(pieces):
    """The same pieces, the next one being made in a thread while the consumer works on this one."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, pieces, None)
        while (piece := following.result()) is not None:
            following = thread.submit(next, pieces, None)
            yield piece


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
