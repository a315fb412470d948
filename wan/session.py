"""A run of sample.py around its loop: arguments become a model on the device, with what
runs fast there chosen and said; a latent becomes files.
"""
import argparse
import hashlib
import itertools
import json
import os
import re
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

import dit
from files import checkpoint, folders, options, video
from files.checkpoint import UserError
from files.options import TYPES
from gpu import choose, fp8
from wan import light, memory, released
from wan.models import Lora, Model

#: what a video does not depend on
NEUTRAL = ("memory", "offload", "download", "text_cache")
#: what decides a latent, which --decode has already
LATENT = ("prompt", "negative", "image", "last_image", "seed", "text_cache", "lora", "steps",
          "solver", "guidance", "shift", "compile", "fp8")
LONGEST = 200  # bytes of a name, to which suffixes are added


def no_graph(model, plain=False):
    """Why a step is not run as one CUDA graph; None where it is."""
    if plain:
        return "nothing is kept from step to step"
    if model.device.type != "cuda":
        return f"graphs are for CUDA, not {model.device.type}"
    return "the blocks are streamed" if model.offload == "blocks" else None


def check_streamed(model, sampling):
    """UserError where something is asked for that streamed blocks, or those of another
    family, cannot do."""
    if not (sampling.compiled or sampling.fp8):
        return
    flag = "--compile" if sampling.compiled else "--fp8"
    if not model.is_wan:
        raise UserError(f"{flag} is for Wan's transformer, and {model.name} has another: leave it "
                        "away.")
    if model.offload == "blocks":
        raise UserError(f"{flag} needs all blocks on the device, but here they are streamed: "
                        "leave it away, or use --offload parts.")


class Timer(dict):
    """Seconds by name: `with timer("text"): ...`; waits for the GPU."""

    @contextmanager
    def __call__(self, name):
        started = time.perf_counter()
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self[name] = time.perf_counter() - started


@dataclass
class Run:
    """What a run of the command line knows: `begin` and `prepare` fill it."""

    args: argparse.Namespace
    name: str = ""  # of the results
    stored: dict = field(default_factory=dict)  # settings of a latent to decode again
    seconds: Timer = field(default_factory=Timer)
    latent: torch.Tensor | None = None  # to decode again
    model: Model | None = None
    images: tuple = (None, None)  # first and last frame
    sampling: object = None  # a resolved sample.Sampling
    choices: list = field(default_factory=list)  # lines that say what runs
    plan: memory.Plan | None = None

    def file(self, suffix):
        """Path of a result."""
        return Path(self.args.out) / (self.name + suffix)

    def claim(self):
        """Choose the name of the results -> the lock that keeps it for this process:
        --name, or model, prompt and seed; with a number behind it where that one holds a
        video made with other settings, or another process is at it."""
        args = self.args
        path = Path(args.model)
        label = path.stem if path.exists() or len(path.parts) > 1 else args.model
        words = re.sub(r"\W+", "-", args.prompt.lower()).strip("-")[:60] or "prompt"
        wanted = args.name or (Path(args.decode).stem if args.decode else None)
        wanted = wanted or f"{label[:60]}-{words}-{args.seed}"
        wanted = os.fsencode(wanted)[:LONGEST].decode(errors="ignore")
        for number in itertools.count(1):
            self.name = wanted if number == 1 else f"{wanted}-{number}"
            with suppress(folders.Locked):
                lock = folders.Lock(args.out, f".{self.name}.lock")
                if self.is_ours():
                    return lock
                lock.release()

    def is_ours(self):
        """Is there no video of this name yet, or one of these settings?"""
        if not any(self.file(s).exists() for s in (".json", ".safetensors", ".mp4", ".png")):
            return True
        made = {}
        with suppress(UserError):
            if self.file(".json").exists():
                made = checkpoint.read_json(self.file(".json")).get("settings")
            elif self.file(".safetensors").exists():
                made = checkpoint.open_tensors(self.file(".safetensors"))[1].get("settings")
        ours = json.loads(json.dumps(settings_of(self), default=str))
        decisive = [k for k in ours if k not in NEUTRAL]
        return isinstance(made, dict) and all(made.get(k) == ours[k] for k in decisive)


def begin(args, load_model=released.load_model):
    """Arguments -> Run: files, model and pictures are looked at, and the arguments that were
    left out filled in."""
    run = Run(args)
    if args.decode:
        tensors, metadata = checkpoint.load_tensors(args.decode)
        run.latent, run.stored = tensors.get("latent"), metadata.get("settings")
        if run.latent is None or not isinstance(run.stored, dict):
            raise UserError(f"{args.decode} is not a latent saved by sample.py: give the "
                            ".safetensors file beside a video.")
        for name in ("steps", "shift", "solver", "guidance"):
            value = run.stored.get(name)
            setattr(args, name, tuple(value) if isinstance(value, list) else value)
    for name, default in dict(model="dc", weights=[], frames=None, size=None, prompt="").items():
        if getattr(args, name) in (None, []):
            setattr(args, name, run.stored.get(name) or default)
    if args.download and args.model not in released.RELEASED:
        raise UserError(f"--download says nothing to {args.model}: leave it out.")
    if args.download:
        args.weights = args.weights or [f"checkpoints/{args.model}"]
        released.download(args.model, args.weights[0])
    args.dtype = matmul_dtype(args)
    dtype = TYPES[args.dtype]
    with run.seconds("load"):
        if args.plan and args.model in released.RELEASED:
            run.model = released.outline(args.model, dtype)
        else:
            run.model = load_model(args.model, args.weights, args.lora, dtype, args.device,
                                   args.text_cache)
        run.model.ae, args.decoder = light.choose(run.model.ae, args.decoder)
    run.images = read_picture(args.image), read_picture(args.last_image)
    if args.size is None and args.image:
        args.size = run.model.size_for(run.images[0])
    return run


def read_picture(file):
    return None if file is None else video.read_image(file)[None]


def matmul_dtype(args):
    """Name of the type of the matrix products."""
    wide = args.device.type == "cuda" and released.is_large(args.model)
    name = args.dtype or ("bf16" if wide else "fp32")
    elsewhere = args.plan and args.device.type == "cpu"  # a plan made here for a GPU
    if name == "bf16" and not elsewhere and (reason := choose.without_bf16(args.device)):
        print(f"matrix products: fp32, because {reason}")
        return "fp32"
    return name


def prepare(run):
    """Choose what runs on this device and how it fits into memory; says both."""
    args, model, s = run.args, run.model, run.sampling
    if not args.plan:
        run.choices = choose_fast_paths(run)
        s = run.sampling
    free = args.memory and args.memory * 2**30
    plan = memory.plan(model, s.frames, s.size, TYPES[args.dtype], 1 + s.cfg_batch,
                       args.offload, free)
    model.offload, run.plan = plan.offload, plan
    needs = ", ".join(f"{name.replace('_', ' ')} {n:.2f}" for name, n in plan.gib.items())
    tile = "untiled"
    if plan.tile:
        tile = f"in tiles of {plan.tile[0]}x{plan.tile[1]} latent cells"
    print(f"{model.name}: {s.frames} frames of {s.size[0]}x{s.size[1]}; expected memory {needs} "
          f"GiB; offload {plan.offload}, decode {tile}")
    if args.plan:
        return
    check_streamed(model, s)
    if not args.decode:
        model.check_pictures(*run.images)
        run.sampling = s = replace(s, graph=no_graph(model, args.slow) is None)
        run.choices.append(describe_step(model, s))
    print("\n".join(f"  {line}" for line in run.choices))
    folders.writable(args.out)
    pixels = s.frames * s.size[0] * s.size[1] * model.upscale**2
    folders.check_room(args.out, 10e6 + pixels / 10, "the results")
    model.to(args.device)


def choose_fast_paths(run):
    """What is decided by trying it on the device -> lines that say what runs, and
    why."""
    args, model, s = run.args, run.model, run.sampling
    lines = [choose.choose_kernels(args.device, plain=args.slow)]
    if args.device.type == "cuda":
        if args.device.index is not None:
            torch.cuda.set_device(args.device)  # kernels are launched on the current one
        if args.dtype == "bf16" and not args.slow and model.is_wan:
            c = model.net.config
            tokens = dit.tokens(c, model.latent_shape(s.frames, s.size))
            width = c.dim // c.heads
            lines.append(choose.choose_attention(args.device, tokens, c.heads, width)[1])
        convolution = choose.choose_convolution(args.device, model.ae_dtype)
        model.ae_dtype = convolution.dtype
        layout = torch.contiguous_format if args.slow else convolution.layout
        model.ae.to(memory_format=layout)
        lines.append(convolution.line)
    if args.decoder:
        lines.append(f"decoder: {args.decoder}")
    if args.compile and (reason := choose.without_compiler(args.device)):
        run.sampling = replace(s, compiled=False)
        lines.append(f"blocks: not compiled, because {reason}")
    if args.fp8:
        emulated = ""
        if not fp8.hardware(args.device):
            emulated = (f", computed in fp32: {args.device} multiplies no fp8 (for measuring the "
                        "quality)")
        lines.append(f"matrix products: fp8{emulated}")
    return lines


def describe_step(model, s):
    reason = no_graph(model, s.plain)
    parts = [f"kernel by kernel ({reason})" if reason else "one CUDA graph"]
    if s.compiled:
        parts.append("compiled blocks")
    if s.cfg_batch:
        parts.append("both guidance passes in one batch")
    return f"a step: {', '.join(parts)}"


def settings_of(run):
    """What the run was made with, by the names of the options."""
    left_out = ("out", "name", "plan", "decode")
    given = {k: v for k, v in vars(run.args).items() if k not in left_out}
    chosen = {k: v for k, v in asdict(run.sampling).items() if k in given}
    before = {k: run.stored[k] for k in LATENT if k in run.stored}
    files = run.stored.get("files", {}) | stamps(run.args)
    return {**given, **chosen, "device": str(run.args.device), "files": files, **before}


WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


def stamps(args):
    """{path: hash of the sizes and times of change of its files} of all that was given: what
    lies under a path may be replaced, and makes another video then."""
    given = [args.model, *(args.weights or [f"checkpoints/{args.model}"]), args.decoder,
             args.image, args.last_image, *(one.file for one in args.lora)]
    found = {}
    for path in (Path(name) for name in given if name and Path(name).exists()):
        files = [path]
        if path.is_dir():
            files = [*path.glob("*"), *path.glob("*/*")]
            files = sorted(f for f in files if f.suffix in WEIGHTS and f.is_file())
        stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        found[str(path)] = hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
    return found


def report(run):
    """Print what was made and how fast, and write it to NAME.json."""
    args, model, s = run.args, run.model, run.sampling
    shape = model.latent_shape(s.frames, s.size)
    tokens, passes = dit.tokens(model.net.config, shape), 1 if s.guidance in (1, (1, 1)) else 2
    if args.device.type == "cuda":
        used = torch.cuda.max_memory_allocated()
    else:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = dict(
        model=model.name, prompt=args.prompt, frames=s.frames, size=s.size, steps=s.steps,
        passes=passes, tokens=tokens, plan=run.plan._asdict(), choices=run.choices,
        seconds={name: round(t, 3) for name, t in run.seconds.items()},
        peak_memory_gib=used / 2**30)
    times = ", ".join(f"{name} {t:.2f} s" for name, t in run.seconds.items())
    if not args.decode:
        work = passes * s.steps * memory.flops(model.net.config, shape).total
        found["tflops_per_second"] = work / run.seconds["transformer"] / 1e12
        times += f"; {found['tflops_per_second']:.3f} TFLOP/s"
    checkpoint.write_json(run.file(".json"), {**found, "settings": settings_of(run)})
    print(f"{model.name}: {s.frames} frames of {s.size[0]}x{s.size[1]}, {tokens} tokens, "
          f"{s.steps} steps x {passes} passes\n  {times}; peak memory {used / 2**30:.2f} GiB\n"
          f"  {run.file('.mp4')}   {run.file('.png')}")


def write(model, z, s, file, tile):
    """Latent -> NAME.mp4 and the contact sheet NAME.png. Frames are written as they are
    decoded, the next ones while these are encoded; only the sheet's stay in memory."""
    shown = {round(i * (s.frames - 1) / 7) for i in range(8)}
    kept, count = [], 0

    def pieces():
        nonlocal count
        cuda = model.device.type == "cuda"
        on_device = torch.cuda.device(model.device) if cuda else nullcontext()
        with torch.no_grad(), on_device:  # inside: both hold for one thread
            for piece in model.decode(z, s.frames, s.size, tile):
                piece = piece[0].float().cpu()
                for i in range(piece.shape[1]):
                    if count + i in shown:
                        kept.append(piece[:, i].clone())
                count += piece.shape[1]
                bar.update(piece.shape[1])
                yield piece

    with tqdm(total=s.frames, desc="decode", leave=False) as bar:
        made = pieces() if s.plain else ahead(pieces())
        video.write_video(file(".mp4"), made, model.fps, scale=model.upscale)
    small = s.size[1] <= 256
    scale = max(model.upscale // 2, 1) if small else 256 / s.size[1]
    sheet = [torch.stack(kept, dim=1)]
    video.contact_sheet(file(".png"), sheet, columns=len(kept), scale=scale)


def ahead(pieces):
    """The same pieces, the next one being made in a thread while the consumer works on
    this one."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, pieces, None)
        while (piece := following.result()) is not None:
            following = thread.submit(next, pieces, None)
            yield piece


# ------------------------------------------------ arguments of sample.py


def lora_arg(text):
    """FILE, FILE:STRENGTH or FILE:STRENGTH:high (low) -> Lora; a path may have
    colons."""
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)"
    file, strength, expert = re.fullmatch(
        rf"(.*?)(?::({number}))?(?::(high|low))?", text, re.DOTALL).groups()
    return Lora(file, options.real(-100, 100)(strength or "1"), expert or "")


def guidance_arg(text):
    """One number, or LOW,HIGH -> float or pair."""
    values = [options.real(0, 100)(part) for part in text.split(",")]
    if len(values) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or LOW,HIGH")
    return values[0] if len(values) == 1 else tuple(values)


def name_arg(text):
    """A file name without suffix: no path, and short enough for every suffix."""
    if not text.isprintable() or not text or "/" in text or text.startswith("."):
        raise argparse.ArgumentTypeError(f"{text!r} is not a file name; --out takes the folder")
    if len(os.fsencode(text)) > LONGEST:
        raise argparse.ArgumentTypeError(f"a name of {len(os.fsencode(text))} bytes is too long, "
                                         f"{LONGEST} are possible")
    return text
