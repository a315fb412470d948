"""Prompt (and image) to video: the guided loop in latent space, then a streaming decode
(paper: results).

    noise [b z t h w] --solver, `steps` velocities--> latent --autoencoder--> video

    v = v_null + g (v_text - v_null)      classifier-free guidance: two passes

One loop for every model, base or DC-VideoGen, text or image; what a model is made of
stands in wan/models.py. The toy models are embedded:

    python sample.py --prompt "a large red circle moving left on a blue background"
    python sample.py --model base --prompt "..."           its base: 4x the tokens
    python sample.py --prompt "a green ring moving up" --image picture.png
    python sample.py --model out/adapt --prompt "..."      a model made by adapt.py
    python sample.py --model dc-wan2.1-t2v-14b --weights DIR --prompt "..." --plan

The adapted toy takes a few seconds; --plan says what a run needs, without running it. A
step is made fast by kernels.py (operations, CUDA graph), gpu/choose.py (choices made by
measuring; the first lines say what runs, and why) and gpu/fp8.py. All equals the plain
path to rounding, except what its flag calls approximate; `--slow` runs the plain path.

Writes NAME.mp4, NAME.png (contact sheet), NAME.json (settings and timings) and
NAME.safetensors (the latent before it is decoded: `--decode NAME.safetensors`).
"""
from files import errors

errors.begin(__name__)  # before the slow imports: a Ctrl-C, waiting threads

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

import dit
import flow
import toy
from families import folder
from files import checkpoint, options, video
from files.checkpoint import UserError
from gpu import choose, fp8
from kernels import Replay
from wan import released, session
from wan.models import Prompts
from wan.session import check_streamed, no_graph

# -------------------------------------------------------------------------- the guided loop


@dataclass(frozen=True)
class Sampling:
    """How a video is sampled; None: as the model was made for."""

    frames: int | None = None
    size: tuple | None = None  # height, width
    steps: int | None = None
    shift: float | None = None  # of the noise schedule
    guidance: float | tuple | None = None  # 1: none; or (low-noise, high-noise expert)
    solver: str | None = None
    seed: int = 0
    # how a step is computed: all equal to rounding, but fp8
    cfg_batch: bool | None = None  # both passes as one batch; None: if one is too small
    plain: bool = False  # nothing is kept from step to step
    graph: bool | None = None  # a step is one CUDA graph; None: where it can be
    compiled: bool = False
    fp8: bool = False

    def resolved(self, model):
        """The same with the model's own settings in place of None."""
        names = ("frames", "size", "steps", "shift", "guidance", "solver")
        own = {name: getattr(model, name) for name in names if getattr(self, name) is None}
        s = replace(self, **own)
        if isinstance(s.guidance, tuple) and model.low is None:
            raise UserError(f"{model.name} has one transformer, no experts: give one number with "
                            "--guidance.")
        flow.schedule(s.solver, s.steps, s.shift)  # refuses what cannot be
        small = dit.tokens(model.net.config, model.latent_shape(s.frames, s.size)) <= 4096
        batch = small if s.cfg_batch is None else s.cfg_batch
        plain = s.plain or not model.is_wan
        graph = no_graph(model, plain) is None if s.graph is None else s.graph
        return replace(s, cfg_batch=batch, graph=graph, plain=plain)


@torch.no_grad()
def generate(model, context, image=None, *, last_image=None, null=None, noise=None,
             progress=False, sampling=None, **settings):
    """The guided loop -> latent [b, z, t, h, w] in the transformer's scale, fp32.

    `context`, `null`: prompt states [b, m, d] of the prompts and of the unconditional
    pass (default: the model's own negative prompt). `image`, `last_image`: first and
    last frame, [b, 3, h, w] in [-1, 1] of any size, or None. The noise of sample i
    depends on `seed + i` and the shape only, so a batch gives what single runs give;
    `noise` [b, z, t, h, w] replaces it. `sampling`, `settings`: `Sampling`, and fields
    of it. NaN is a UserError.
    """
    s = replace(sampling or Sampling(), **settings).resolved(model)
    n, device = len(context), model.device
    shape = model.latent_shape(s.frames, s.size)
    if noise is None:
        noise = draw_noise(model, shape, range(s.seed, s.seed + n))
    needed = n, model.net.config.out_channels, *shape
    if noise.shape != needed:
        raise UserError(f"the noise has shape {list(noise.shape)}, but {s.frames} frames of "
                        f"{s.size[0]}x{s.size[1]} need {list(needed)}.")
    null = model.null(n) if null is None else null
    image = model.image_condition(n, shape, s.size, image, last_image)
    timesteps = flow.schedule(s.solver, s.steps, s.shift)[1]
    velocity = Velocity(model, context.to(device), null.to(device), image, timesteps, s)
    with tqdm(total=s.steps, desc="denoise", disable=not progress, leave=False) as bar:

        def callback(step, x, x0):
            if not torch.isfinite(x).all():
                raise UserError(f"the latent became NaN at step {step + 1} of {s.steps}: use "
                                "--dtype fp32, or other weights.")
            bar.update()

        z = flow.solve(velocity, noise.to(device), s.steps, s.shift, s.solver, callback)
        return velocity.keep_first(z)


def draw_noise(model, shape, seeds):
    """Noise [n, z, *shape], drawn on the CPU: a seed is a video on every machine."""
    shape = model.net.config.out_channels, *shape
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


class Velocity:
    """velocity(x, t) for a solver: a model's transformer under guidance. Called once
    per step, in order.

    Wan 2.2's experts take turns, each with its own guidance. A model without condition
    channels sees its picture in place of latent frame 0, at time 0. Computed once, not
    at every step: keys and values of the prompt, and the time vectors of all steps
    (dit.py).

    context, null: prompt states [b m d] of both passes. image: `ImageCondition`.
    timesteps: of the solver. sampling: a resolved `Sampling`.
    """

    def __init__(self, model, context, null, image, timesteps, sampling):
        check_streamed(model, sampling)
        self.model, self.context, self.null, self.image = model, context, null, image
        self.timesteps, self.sampling = timesteps, sampling
        self.step, self.high, self.evaluate = 0, None, None

    def __call__(self, x, t):
        now = self.timesteps[self.step].item()
        high = now >= 1000 * self.model.boundary  # the high-noise expert, or the only one
        if high != self.high:
            self.high, self.times, self.evaluate = high, None, None  # before the other comes
            self.prepare(self.model.transformer(now), x)
        v = self.evaluate(x, *self.times[self.step])
        self.step += 1
        return v

    def prepare(self, net, x):
        """Get ready for the steps of one transformer."""
        s = self.sampling
        if s.fp8:
            fp8.convert(net)
        if s.compiled:
            choose.compile_blocks(net)
        scale = s.guidance[self.high] if isinstance(s.guidance, tuple) else s.guidance
        self.times = self.all_times(net, x)
        self.evaluate = partial(self.guided, net, self.prompts(net, scale), scale)
        if s.graph:
            self.evaluate = Replay(self.evaluate)

    def all_times(self, net, x):
        """What the transformer takes as time, as a tuple of tensors for each step."""
        times = self.timesteps.to(x.device)
        if self.image.first is not None:  # one time per latent frame: the picture's is 0
            times = times[:, None].repeat(1, x.shape[2])
            times[:, 0] = 0
        return [(t,) for t in times] if self.sampling.plain else net.times(times)

    def prompts(self, net, scale):
        """The transformer's arguments after x and time, for each pass."""
        contexts = [self.context]
        if scale != 1:
            contexts = [self.context, self.null]
            if self.sampling.cfg_batch:
                contexts = [joined(*contexts)]
        arguments = []
        for context in contexts:
            clip, more = self.image.clip, ()
            if clip is not None:
                more = (clip.repeat(len(context) // len(self.context), 1, 1),)
            arguments.append((context, *more))
        return arguments if self.sampling.plain else [(net.prompt(*a),) for a in arguments]

    def guided(self, net, prompts, scale, x, *time):
        """One step: latent [b z t h w] and time -> v_null + scale (v_text - v_null)."""
        x = self.keep_first(x)
        if self.image.condition is not None:
            x = torch.cat([x, self.image.condition], dim=1)
        if scale != 1 and len(prompts) == 1:  # both passes in one batch
            x = x.repeat(2, 1, 1, 1, 1)
        if self.sampling.plain:
            time = time[0].expand(len(x), *time[0].shape)
        else:
            time = dit.Time(*time)
        v = torch.cat([net(x, time, *prompt).float() for prompt in prompts])
        if scale == 1:
            return v
        v_text, v_null = v.chunk(2)
        return v_null + scale * (v_text - v_null)

    def keep_first(self, x):
        """Put the picture's latent in place of frame 0. The solvers mix values of the
        same position only, so the other frames come out as if this had been done after
        every step."""
        if self.image.first is None:
            return x
        first = self.image.first.expand(len(x), -1, -1, -1, -1)
        return torch.cat([first, x[:, :, 1:]], dim=2)


def joined(context, null):
    """Both guidance contexts as one batch [2b, m, d]; the shorter gets zero rows, as
    every prompt of Wan has after its end."""
    if isinstance(context, Prompts):
        return Prompts([*context, *null])
    m = max(context.shape[1], null.shape[1])
    return torch.cat([F.pad(c, (0, 0, 0, m - c.shape[1])) for c in (context, null)])


@torch.no_grad()
def videos(model, prompts, images=None, batch=32, progress=False, seed=0, **settings):
    """Many prompts (sentences, or dicts of toy attributes), and first frames [n, 3, h, w]
    or None -> list of videos [3, t, h, w], the i-th with seed + i."""
    out, s = [], Sampling(**settings).resolved(model)
    starts = range(0, len(prompts), batch)
    for i in tqdm(starts, desc="videos", disable=not progress, leave=False):
        part = prompts[i : i + batch]
        words = isinstance(part[0], str)
        context = model.text(part) if words else model.text.encode(part)
        image = None if images is None else images[i : i + batch]
        z = generate(model, context, image, sampling=s, seed=seed + i)
        pieces = list(model.decode(z, s.frames, s.size))
        out += torch.cat(pieces, dim=2).float().cpu().unbind()
    return out


# ----------------------------------------------------------------------------- command line

def arguments(argv=None):
    parser = options.Parser(description="Prompt (and image) to video. What is left out is as the "
                            "model was made for.")
    what = parser.add_argument_group("what").add_argument
    what("--prompt", help="what the video shows")
    what("--words", action="store_true", help="print the words that the toy knows, and stop")
    what("--negative", help="what it should not show")
    what("--image", metavar="FILE", help="picture that becomes the first frame")
    what("--last-image", metavar="FILE", help="and the last frame")
    what("--frames", type=options.whole(1, 100_000), help="number of frames")
    what("--size", type=video.size_arg, metavar="HxW",
         help="height x width in pixels; with --image the picture's aspect is kept")
    what("--seed", type=options.seed, default=0, help="of the noise, the same on every machine (0)")
    which = parser.add_argument_group("which model").add_argument
    which("--model", help="dc (default) or base: the embedded toys; a folder made by adapt.py, "
          f"or a LoRA file in it; {', '.join(released.RELEASED)}")
    which("--weights", nargs="+", default=[], metavar="DIR",
          help="folders with the model's files (default: checkpoints/MODEL)")
    which("--download", action="store_true", help="fetch them into the first of these folders")
    which("--text-cache", metavar="FILE", help="prompts in it need no text encoder")
    which("--lora", type=session.lora_arg, action="append", default=[],
          metavar="FILE[:STRENGTH[:EXPERT]]",
          help="add a LoRA (to the expert high or low only); may be repeated")
    which("--decoder", metavar="light|full|FILE", help="of the autoencoder: light is the one of "
          "ae.py distill that lies beside it (default: full)")
    how = parser.add_argument_group("how").add_argument
    how("--steps", type=options.whole(1, 1000), help="solver steps")
    how("--solver", choices=list(flow.SOLVERS))
    how("--guidance", type=session.guidance_arg, metavar="G",
        help="classifier-free guidance; 1 is none; LOW,HIGH for two experts")
    how("--shift", type=options.real(0, 1000, above=True), help="shift of the noise schedule")
    how("--slow", action="store_true",
        help="the plain path: plain kernels, nothing kept between steps; equal to rounding")
    how("--compile", action="store_true",
        help="compile the transformer's blocks (a minute at the start of every size)")
    how("--fp8", action="store_true",
        help="approximate: the blocks' matrix products in 8 bits (fast on Hopper and later)")
    how("--dtype", choices=options.TYPES, help="of the matrix products (bf16 on a GPU, toy: fp32)")
    how("--device", type=options.device, default=options.DEVICE)
    how("--offload", choices=["none", "parts", "blocks"],
        help="what leaves the device while it is not used (default: as little as fits)")
    how("--memory", type=options.real(0, 1e6, above=True), metavar="GIB",
        help="memory to plan for (default: what is free)")
    how("--plan", action="store_true", help="print what the run needs, and stop")
    output = parser.add_argument_group("output").add_argument
    output("--out", default="out/sample", help="folder for the results (out/sample)")
    output("--name", type=session.name_arg,
           help="file name without suffix (default: model, prompt and seed); a number is added "
           "where it holds a video made with other settings")
    output("--decode", metavar="FILE", help="only decode a latent saved by an earlier run again")
    parser.refuse_gone(options.GONE["sample.py"])
    args, given = parser.parse(argv)
    if args.words:
        parser.refuse("--words, which only prints", given - {"words"})
        return args
    if args.slow and (args.compile or args.fp8):
        raise UserError("--slow is the plain path: leave --compile and --fp8 away.")
    if args.decode is not None:
        parser.refuse("--decode, for the latent is made", given & set(session.LATENT))
    elif args.prompt is None:
        parser.error("--prompt is needed (or --decode FILE); --words lists what the toy knows.")
    if args.model in (None, "dc", "base"):
        parser.refuse("the embedded models", given & {"download", "text_cache"})
    return args


def resolved(args, model):
    """What the arguments say of sampling."""
    return Sampling(
        frames=args.frames, size=args.size and tuple(args.size), steps=args.steps,
        shift=args.shift, guidance=args.guidance, solver=args.solver, seed=args.seed,
        plain=args.slow, compiled=args.compile, fp8=args.fp8).resolved(model)


def produce(run):
    """Prompt -> latent (unless one is decoded again) -> files."""
    args, model, s, latent = run.args, run.model, run.sampling, run.latent
    if latent is None:
        with run.seconds("text"):
            context, null = model.contexts([args.prompt], args.negative)
        first, last = run.images
        with run.seconds("transformer"):
            latent = generate(model, context, first, last_image=last, null=null, progress=True,
                              sampling=s)
        settings = {"settings": session.settings_of(run)}
        checkpoint.save_tensors(run.file(".safetensors"), {"latent": latent}, settings)
    with run.seconds("decode"):
        session.write(model, latent, s, run.file, run.plan.tile)


def main(argv=None):
    args = arguments(argv)
    if args.words:
        print(toy.words())
        return
    run = session.begin(args, folder.load_any)
    run.sampling = resolved(run.args, run.model)
    session.prepare(run)
    if run.args.plan:
        return
    with run.claim():
        produce(run)
        session.report(run)


if __name__ == "__main__":
    with errors.user_errors():
        main()
