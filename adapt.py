"""AE-Adapt-V: carry a pre-trained video diffusion transformer into a deeply compressed
latent space (paper, section on AE-Adapt-V).

Only the two ends of the transformer touch the latent: the patch embedder E and the
head. Swapped for random ones, the blocks see embeddings they have never seen, and
training end to end first improves and then collapses to noise. So the ends are fitted
first:

    cache     latents of the same clips in both spaces: z_T ("teacher"), z_S ("student")
    stage 1a  align the patch embedder (align.py): E_S(z_S) imitates E_T(z_T), averaged
              over the s x s base tokens that one deep token covers; a new head
    stage 1b  align the head (and embedder) with the flow-matching loss, blocks frozen
    stage 2   LoRA on the blocks, embedder and head in full: a light end-to-end fine-tune
    export    the LoRA in three layouts, and merged: a folder that sample.py takes

    python adapt.py --base toy                                  20 minutes on one core
    python adapt.py --base wan2.1 --weights DIR --data CLIPS    as published for 1.3B
    torchrun --nproc-per-node 8 adapt.py --base wan2.1-t2v-14b ...    weights sharded
    python adapt.py --base wan2.1-t2v-14b --plan                what that needs
    python adapt.py ... --continue-from OUT --out OUT2    stage 2 again, on other clips

Rerun the same command after an interruption: what is finished is not done again, what
was begun goes on, and other settings are refused. Each stage has a folder in --out;
after each `training/journal.py` says whether it works: report.json, stages.png.
"""
from files import errors

errors.begin(__name__)  # before the slow imports: a Ctrl-C, waiting threads

import argparse
import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import align
import flow
from files import checkpoint, options, video
from training import bases, journal, loop, toy_base
from training.entries import hash_tensors
from training.job import Job, export, finished, main_process_first, start_again
from training.muon import Muon

STAGES = ("cache", "align", "head", "lora", "export")

# ------------------------------------------------ the stages in order


@dataclass(frozen=True)
class Stage:
    """A stage of training: a row of the recipe."""

    name: str  # of its folder
    title: str  # in the journal
    steps: int
    lr: float
    warmup: int
    ema: float = 0.0  # decay of the average that is evaluated and exported; 0: none
    rank: int = 0  # of the LoRA; 0: none, the ends alone
    first_batch: int = 0  # of the data, so that stage 2 does not begin with the clips of 1b
    optimiser: str = "adamw"


def recipe(s):
    """What is trained, from bases.Settings: the ends alone, then everything lightly."""
    return (Stage("1b", "1b, head aligned", s.steps_head, s.lr_head, s.warmup_head),
            Stage("2", "2, LoRA", s.steps, s.lr, s.warmup, s.ema, s.rank,
                  first_batch=s.steps_head, optimiser=s.optimiser))


def adapt(base, settings, args):
    """AE-Adapt-V, stage by stage, into the folder args.out."""
    job = Job.prepare(base, settings, args)
    last = STAGES.index(args.stage)
    if last == 0 and loop.rank() == 0:
        print(job.source.table())
    for stage in (align_once, train_head, train_lora)[:last]:
        for expert in job.experts:
            if stage is train_lora or not args.continue_from:
                stage(job, expert)
    if args.stage == "export" and loop.rank() == 0:
        export(job)


def align_ends(job, expert, by_sgd=None):
    """Stage 1a: the patch embedder, so that it imitates the base's on clean latents;
    and the head that stage 1b starts from -> {name: tensor} of both ends.
    by_sgd: (weight, bias) of `align.sgd`, which `align_once` starts if it is chosen."""
    s, problem = job.settings, job.problem(expert)
    weight, bias = by_sgd or align.fit(s.align, problem)

    # assemble: blocks from the base, the aligned embedder, a zero or regressed head
    base, net = job.build(expert)
    net.set_embedder(weight, bias)
    if s.head == "closed_form":
        align.solve_head(net, job.source, job.times(expert), batches=96, batch=s.batch)
    journal.examine_aligned(job, expert, base, net, problem, by_sgd)
    return {k: v for k, v in net.state_dict().items() if k.startswith(net.ends)}


def train_head(job, expert):
    """Stage 1b: align the head, and go on with the embedder, by the flow-matching loss;
    blocks frozen."""
    head, _ = recipe(job.settings)
    train_once(job, expert, head, start=job.result(expert, "1a"))


def train_lora(job, expert):
    """Stage 2: LoRA on the blocks, embedder and head in full. It begins where 1b ended,
    or with --continue-from where an adapted model did."""
    _, tune = recipe(job.settings)
    before = start_again(job, expert) if job.args.continue_from else "1b"
    train_once(job, expert, tune, start=job.result(expert, before))


def train(job, expert, stage, start, config):
    """Train what a stage trains, by all processes together -> {name: trained tensor}, whole
    only in process 0. start: {name: tensor}, what the stage before left; config: what
    decides the result."""
    s, times = job.settings, job.times(expert)
    torch.manual_seed(s.seed)
    net = loop.masters(job.build(expert, start, stage.rank)[1]).train()
    net.checkpointing = s.checkpoint_blocks
    loop.shard(net, net.blocks)
    trained = loop.trained(net)
    if stage.optimiser == "muon":
        opt = Muon(net, stage.lr, adam=toy_base.FIRST_AND_LAST)
    else:
        opt = torch.optim.AdamW(trained.values(), lr=stage.lr, betas=(0.9, 0.999), weight_decay=0)
    plan = loop.Plan(stage.steps, stage.warmup, s.decay, s.clip, s.accumulated(loop.processes()),
                     stage.ema, job.args.save_every)
    run = loop.Run(job.folder(expert, stage.name), config, {"net": net}, {"net": opt}, plan)

    def batches(number):
        while True:
            step, positions = run.positions(number, s.batch)
            step += stage.first_batch
            batch = job.source.batch(step, positions)
            yield batch, flow.draw(batch.z.shape[1:], times, s.seed + 1, step, positions)
            number += 1

    def losses(both, number):
        batch, drawn = both
        loss, mse = flow.loss(align.velocity_of(net, batch, job.device), batch.z, drawn)
        yield "net", loss, {"loss": loss.detach(), "mse": mse.mean()}

    def report(run):
        samples = job.base.validation
        with run.averaged():
            loss = journal.validation_loss(net, job.held, times, samples, s.batch)
        return {"validation": loss}

    run.fit(batches(run.number), losses, report, what=f"{expert.prefix}{stage.title}")
    with run.averaged():
        return {k: loop.full_tensor(p.detach()).to("cpu", copy=True) for k, p in trained.items()}


# ------------------------------------------------ each stage once


def align_once(job, expert):
    """`align_ends`, unless its result is there. SGD is done by all processes together,
    the rest by the first alone."""
    s, file = job.settings, job.file(expert, "1a")
    decides = ["align", "head", "clips_align", "seed"]
    if s.align == "sgd":
        decides += ["steps_align", "lr_align", "batch_align"]
    if s.align == "noise_aware" or s.head == "closed_form":
        decides += ["time_sampling", "shift"]
    config = job.config(expert, decides)
    if finished(file, config):
        return
    by_sgd = None
    if s.align == "sgd":
        plan = loop.Plan(s.steps_align, warmup=0, decay="constant", clip=0.0, save_every=1000,
                         log_every=100, keep=1)
        begin = partial(loop.Run, job.folder(expert, "1a"), config, plan=plan)
        batch = max(s.batch_align // loop.processes(), 1)
        by_sgd = align.sgd(job.problem(expert), begin, batch, s.lr_align, s.seed)
    if main_process_first(file):
        if before := job.base.before(job.teacher, job.held):
            journal.examine(job, expert, "base", *before)
        ends = align_ends(job, expert, by_sgd)
        checkpoint.save_tensors(file, ends, {"settings": config})


def train_once(job, expert, stage, start):
    """`train`, unless its result is there; then the stage's row in the journal."""
    file = job.file(expert, stage.name)
    config = job.config(expert, ("time_sampling", "shift", "decay", "clip", "dtype", "seed"))
    s = job.settings
    clips = s.batch * s.accumulated(loop.processes()) * loop.processes()
    config |= dataclasses.asdict(stage) | dict(clips_per_step=clips, start=hash_tensors(start))
    new = not finished(file, config)
    if new:
        tensors = train(job, expert, stage, start, config)
        if loop.rank() == 0:
            loop.plot(file.parent)
            checkpoint.save_tensors(file, tensors, {"settings": config, "step": stage.steps})
        loop.all_gather(None)  # nobody looks for the file before it is there
    if loop.rank() == 0 and (new or f"{expert.prefix}{stage.title}" not in job.journal):
        journal.examine_trained(job, expert, stage)


# ------------------------------------------------ command line

#: which of bases.Settings are options, with their choices or their range
OPTIONS = dict(
    align=("sgd", *align.CLOSED_FORMS), head=("zero", "closed_form"),
    time_sampling=("released", "shifted"), shift=options.real(0, 1000, above=True),
    null=("negative", "empty"), drop=options.real(0, 1),
    steps_align=options.whole(1), steps_head=options.whole(1), steps=options.whole(1),
    lr_head=options.learning_rate, lr=options.learning_rate, warmup=options.whole(0),
    rank=options.whole(1, 4096), ema=options.real(0, 0.999999), batch=options.whole(1, 65536),
    accumulate=options.whole(1, 65536), checkpoint_blocks=None, dtype=tuple(options.TYPES),
    seed=options.seed)
#: what a mode other than adapting uses
USED = {
    "pretrain": {"out", "cache", "ae", "continue_from", "shards", "steps", "lr", "batch", "ema",
                 "seed", "save_every"},
    "score": {"out", "prompts", "results"},
    "compare": set()}
TOY_ONLY = {"shards", "prompts", "results"}
NOT_TOY = {"weights", "data", "buckets", "frames", "fps", "caption_per_line", "text_cache",
           "target", "null"}


def parser():
    p = options.Parser(
        description="AE-Adapt-V: move a video diffusion transformer into a deep latent space. "
                    "What is left out of the settings is what was published for the base, or "
                    "what was chosen for the toy (training/bases.py).")
    what = p.add_argument_group("what")
    add = what.add_argument
    add("--base", default="toy",
        help=f"the pre-trained model: {', '.join(bases.BASES)} (default: toy); wan2.1 is "
             "wan2.1-t2v-1.3b; or diffusers:FOLDER, the folder of a diffusers pipeline")
    add("--target", choices=bases.TARGETS, default="f32t4c32",
        help="the deep latent space (default: f32t4c32)")
    add("--weights", nargs="+", default=[], metavar="DIR",
        help="folders with the files of base and autoencoder (default: checkpoints/BASE)")
    add("--ae", metavar="FILE", help="the deep autoencoder, where it is not in these folders")
    add("--data", nargs="+", metavar="CLIPS",
        help="captioned clips: folders of x.mp4 + x.txt, CSV, JSONL, web-dataset tars")
    add("--out", default="out/adapt", help="folder for everything (default: out/adapt)")
    add("--continue-from", type=Path, metavar="OUT",
        help="an adapted model, the --out of another run: train it on with a fresh LoRA, 15 %% "
             "of stage 2's steps, for example on 720p clips (--buckets 720F32MS); with --pretrain "
             "the weights to begin with")
    add("--stage", choices=STAGES, default="export",
        help="stop after this one; cache: fill and verify it (default: export)")
    add("--plan", action="store_true", help="print what the run needs, and stop")
    add("--gpus", type=options.whole(1, 65536), help="for --plan (default: 8; for the toy 1)")
    add("--pretrain", action="store_true", help="train the toy base itself instead")
    add("--score", action="store_true", help="score the embedded toys instead")
    add("--compare", action="store_true",
        help="the comparison of ways to adapt, on the toy, instead")

    add = p.add_argument_group("clips").add_argument
    add("--cache", metavar="FOLDER",
        help="latents and prompt states (default: OUT/cache); may be shared by runs; memory: "
             "they are kept there, for small sets")
    add("--buckets", help="family of frame sizes (default: 480F32MS for f32, 480F64MS for f64)")
    add("--frames", type=options.whole(1, 10_000), default=80,
        help="of a clip (default: 80; the base sees the first 77)")
    add("--fps", type=video.rate_arg,
        help="at which clips are read, or native: every stored frame (default: the model's)")
    add("--caption-per-line", action="store_true",
        help="each line of a .txt is a caption (default: the file is one)")
    add("--text-cache", metavar="FILE", help="prompts in it need no text encoder")
    add("--shards", type=options.whole(1, 10_000), default=10,
        help=f"toy: clips, in shards of {toy_base.SHARD} (default: 10)")

    settings = p.add_argument_group("settings", "what each is: Settings in training/bases.py")
    for field in dataclasses.fields(bases.Settings):
        if field.name not in OPTIONS:
            continue
        allowed = OPTIONS[field.name]
        more = dict(type=allowed, metavar="N")
        if allowed is None:
            more = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(allowed, tuple):
            more = dict(choices=allowed)
        settings.add_argument(f"--{field.name.replace('_', '-')}", **more)

    add = p.add_argument_group("how").add_argument
    add("--format", choices=["original", "diffusers"],
        help="of the exported transformer (default: original; of a diffusers:FOLDER diffusers)")
    add("--sample-steps", type=options.whole(0, 1000), default=12,
        help="of the samples after each stage (default: 12; 0: none)")
    add("--save-every", type=options.whole(1), default=250,
        help="steps between checkpoints (default: 250)")
    add("--prompts", type=options.whole(1, 100_000),
        help="toy: held-out prompts to score with (default: 64, with --score 256)")
    add("--results", help="toy: where --score writes (default: OUT/toy.json)")
    add("--device", type=options.device, help="(default: a GPU if there is one)")
    add("--threads", type=options.threads, help="CPU threads (default: all)")
    p.refuse_gone(options.GONE["adapt.py"])
    return p


def arguments(argv=None):
    """-> (arguments, settings that were given)"""
    p = parser()
    args, given = p.parse(argv)
    refuse_unused(p, args, given)
    args.cache = args.cache or str(Path(args.out) / "cache")
    args.results = args.results or str(Path(args.out) / "toy.json")
    return args, {k: getattr(args, k) for k in OPTIONS if k in given}


def refuse_unused(p, args, given):
    """UserError for an option that this run would ignore."""
    base = bases.find(args.base)
    toy = base.name == "toy"
    if args.format == "original" and base.format == "diffusers":
        p.refuse(f"--base {args.base}, which becomes a folder of diffusers again", {"format"})
    p.refuse(f"--base {args.base}", given & (NOT_TOY if toy else TOY_ONLY))
    for mode, used in USED.items():
        if getattr(args, mode):
            always = {mode, "device", "threads"} | ({"base"} if toy else set())
            p.refuse(f"--{mode}", given - used - always)
    if not args.plan:
        started = "a run (torchrun --nproc-per-node N starts N processes)"
        p.refuse(started, given & {"gpus"})
    if not args.score:
        p.refuse("a run without --score", given & {"results"})
    if args.continue_from:
        before = {"align", "head", "steps_align", "steps_head", "lr_head"}
        p.refuse("--continue-from", given & before)
    settings = base.settings
    if (args.align or settings.align) != "sgd":
        p.refuse(f"--align {args.align or settings.align}", given & {"steps_align"})


def main(argv=None):
    args, given = arguments(argv)
    base = bases.find(args.base)
    settings = dataclasses.replace(base.settings, **given)
    if args.pretrain:
        settings = dataclasses.replace(settings, **toy_base.PRETRAINING | given)
    elif args.continue_from:  # our choice
        shorter = {k: getattr(settings, k) * 15 // 100 for k in ("steps", "warmup")}
        settings = dataclasses.replace(settings, **shorter | given)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(settings.seed)
    if args.plan:
        from training import plan

        gpus = args.gpus or base.gpus
        return print(plan.report(base, settings, args.target, gpus, args.buckets, args.frames))
    if args.compare:
        from experiments import adaptation

        argv = ["--threads", str(args.threads)] if args.threads else []
        argv += ["--device", str(args.device)] if args.device else []
        return adaptation.main(argv)
    if args.pretrain or args.score:
        vars(args).update(vars(settings), device=str(args.device or loop.start()))
        return toy_base.pretrain(args) if args.pretrain else toy_base.score(args)
    loop.start()
    with loop.lock(args.out):
        adapt(base, settings, args)


if __name__ == "__main__":
    with errors.user_errors():
        main()
