"""A run of adapt.py behind its stages: what they share, what each leaves behind and how
it is found again, and the files that are exported at the end.
"""
import argparse
import dataclasses
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

import ae
import align
import dit
import flow
import lora
from files import checkpoint, folders
from files.checkpoint import UserError
from files.options import TYPES
from training import bases, journal, loop, toy_base
from wan import models, released


@dataclass
class Job:
    """What all stages share."""

    base: bases.Base
    settings: bases.Settings
    args: argparse.Namespace
    teacher: models.Model
    student: models.Model
    experts: list  # transformers to begin with: the base's, or those of an adapted model
    source: object  # training data (cache.Source or one like it)
    held: object  # held-out data
    journal: journal.Journal
    started: float

    @classmethod
    def prepare(cls, base, settings, args):
        """Models, cache and record -> Job."""
        started, own = time.perf_counter(), loop.start()
        if not args.device or loop.processes() > 1:
            args.device = own
        if loop.rank() == 0 and settings.computed_in(args.device) != TYPES[settings.dtype]:
            print("this CPU multiplies bf16 numbers one by one: weights and products are in fp32")
        if args.cache != "memory":
            folders.writable(args.cache)
        teacher, student = base.models(args, settings)
        experts = base.experts(teacher)
        if args.continue_from:
            experts = adapted_experts(args.continue_from, base, student, experts)
        source, held = base.sources(teacher, student, args, settings)  # the cache
        for model in (teacher, student):
            model.ae.to("cpu")  # not beside the transformer
        target = bases.target_of(student.ae.config)
        record = journal.Journal(args.out, base=base.name, target=target)
        return cls(base, settings, args, teacher, student, experts, source, held, record, started)

    @property
    def device(self):
        return self.args.device

    def times(self, expert):
        """The noise levels that an expert is trained at."""
        s = self.settings
        return flow.Times(s.time_sampling, s.shift, expert.low, expert.high)

    @cached_property
    def tokens(self):
        configs = self.teacher.net.config, self.student.net.config
        return align.Tokens.of(configs, self.held.pair(0))

    def problem(self, expert, source=None):
        """Stage 1a: the embedder, on the training data; or on at most 256 clips of
        another source."""
        most = 256 if source else self.settings.clips_align
        source = source or self.source
        teacher = expert.embedder()
        weight, bias = dit.fresh_embedder(self.student.net.config, self.settings.seed)
        start = weight.to(self.device), None if teacher.bias is None else bias.to(self.device)
        return align.Problem(teacher, start, source.pair, min(len(source), most),
                             self.tokens, self.times(expert))

    def build(self, expert, tensors=None, rank=0, dtype=None, device=None):
        """-> (the base's transformer, the deep one with `tensors` {name: value} over
        what is fresh), frozen but for the ends and, with a rank, adapters.

        They share all that is inherited: two networks in the memory of one.
        """
        dtype = dtype or self.settings.computed_in(self.device)
        base = expert.load(dtype, device or self.device)
        net = expert.nets.inherit(base, self.student.net.config, share=True).eval()
        if rank:
            lora.wrap(net, rank, 2 * rank, full=net.ends)
        else:
            lora.freeze(net, net.ends)
        own = dict(net.state_dict())
        loop.copy_into(net, {k: v.view_as(own[k]) for k, v in (tensors or {}).items()})
        return base, net

    # -- what a stage leaves behind

    def folder(self, expert, stage):
        return Path(self.args.out) / f"{expert.prefix}{stage}"

    def file(self, expert, stage):
        return self.folder(expert, stage) / "trained.safetensors"

    def result(self, expert, stage):
        return checkpoint.load_tensors(self.file(expert, stage))[0]

    def config(self, expert, settings):
        """What decides the result of a stage, in plain values: the base, the data, and
        these settings."""
        chosen = {name: getattr(self.settings, name) for name in settings}
        return dict(base=expert.fingerprint(), data=self.source.fingerprint, **chosen)


def finished(file, config):
    """Is there a result, made with these settings? UserError where they were others."""
    if not file.exists():
        return False
    made = checkpoint.open_tensors(file)[1].get("settings", {})
    if different := loop.difference(made, config):
        raise UserError(f"{file.parent} was made with other settings ({different}): use the same "
                        "ones, or another --out.")
    return True


def main_process_first(file):
    """True in process 0, which does the work that ends with `file`; the others wait
    here for it. (Not in an exchange, which has a time limit.)"""
    while loop.rank() and not file.exists():
        time.sleep(0.2)
    return loop.rank() == 0


# ------------------------------------------------ on from an adapted model


def adapted_experts(folder, base, student, experts):
    """With --continue-from `folder`: the same, with the transformers there."""
    found, wanted = [], (base.name, bases.target_of(student.ae.config))
    for expert, stem in zip(experts, ("transformer", "transformer_2")):
        file = released.find(released.transformer_files(stem), [folder])
        told = checkpoint.open_tensors(file)[1].get("adapted", {}) if file else {}
        if (told.get("base"), told.get("target")) != wanted:
            but = ", but {base} adapted to {target}".format_map(told) if told else ""
            raise UserError(f"{folder} holds no {wanted[0]} adapted to {wanted[1]}{but}: "
                            "--continue-from wants the --out of such a run.")
        found.append(expert._replace(path=file))
    return found


def start_again(job, expert):
    """With --continue-from: the ends of the adapted model, as the result of a stage
    "start" -> its name."""
    file = job.file(expert, "start")
    if not file.exists() and main_process_first(file):
        ends = expert.nets.read_ends(expert.path)
        journal.examine(job, expert, "before", job.build(expert, ends)[1])
        checkpoint.save_tensors(file, ends)
    return "start"


# ------------------------------------------------ export


def export(job):
    """The adapted model as files that others read, in args.out: the transformer(s)
    merged, the LoRA in three layouts, the autoencoder."""
    s, out, dtype = job.settings, Path(job.args.out), TYPES[job.settings.export]
    half = torch.float16 if dtype == torch.float32 else dtype
    about = dict(base=job.base.name, target=bases.target_of(job.student.ae.config), rank=s.rank,
                 alpha=s.alpha, step=s.steps)
    sampling = {k: getattr(job.student, k) for k in released.SAMPLING}
    adapted = {**about, "settings": dataclasses.asdict(s), "sampling": sampling}
    for expert, suffix in zip(job.experts, ("", "_2")):  # as diffusers calls the second one
        trained = job.result(expert, "2")
        net = job.build(expert, trained, s.rank, dtype=dtype, device="cpu")[1]
        for layout in job.base.lora_formats:
            ending = "" if layout == "comfyui" else f"-{layout}"
            full = () if layout == "peft" else net.ends  # diffusers refuses whole tensors there
            file = out / f"lora{suffix}{ending}.safetensors"
            lora.save(net, file, layout, full=full, dtype=half, **about)
        lora.merge(net)
        file = out / f"transformer{suffix}"
        form = job.args.format or job.base.format
        if form == "original":
            file = file.with_suffix(".safetensors")
        expert.nets.save(net, file, {"adapted": adapted}, dtype, form)
    ae.save(job.student.ae, out / "ae.safetensors", dtype)
    command = ["python sample.py --model", out]
    if folders := job.base.weights(job.args):
        command += ["--weights", *folders]
    if job.student.task == "i2v":
        command.append("--image PICTURE")
    prompt = toy_base.PROMPTS[0] if job.base.name == "toy" else "..."
    see = out / "report.json"
    if (out / "stages.png").exists():  # without samples there is none
        see = f"{out / 'stages.png'} and {see}"
    print(f"done in {time.perf_counter() - job.started:.0f} s. See {see}, and try\n"
          f"  {' '.join(map(str, command))} --prompt \"{prompt}\"")
