"""A training run that can be killed.

Long runs end in the middle: a laptop is closed, a node is taken away, a disk fills. What a run needs so that nothing is lost but
the steps since its last checkpoint is the same for every network, and stands here once:

* everything random in a step is drawn from the number of the step, so "where was I?" is one integer;
* a checkpoint (weights, their moving average, optimisers, torch's CPU random state, step, config) is written beside the last one and then
  renamed: a full disk or a `kill -9` leaves the old one. On one machine a resumed run equals the uninterrupted one, on the CPU bit for
  bit;
* a folder that belongs to a run with another config is refused, and the difference is shown;
* a loss or gradient that is not finite stops the run before it reaches the weights, and is traced to the layer it came from;
* every number goes to `log.jsonl`, one line per few steps, and is drawn in `log.png`.

    run = train.Run("out/x", dict(batch=8), {"net": net}, {"net": torch.optim.AdamW(net.parameters(), 1e-4)}, train.Plan(steps=1000))
    run.fit(batches, losses)        # batches: an iterator that starts at batch number run.number

`losses(batch, number)` yields (name of an optimiser, loss, {what to log: value}), once per optimiser. It is a generator, and each loss goes
backward before the next one is made, so the second loss of a GAN may reuse what the first one computed.

Several processes (`torchrun --nproc-per-node 8 ae.py train ...`): each takes its own batches, gradients are averaged. The averaging is a
plain all-reduce after the backward pass, not DDP or FSDP: it works for any loss and any set of trained layers, and for a convolutional
network it costs next to nothing (8.6 GB of gradients of the full DC-AE-V against a step of seconds). With its 2.1 billion parameters,
fp32 masters, Adam and average take 43 GB per GPU; sharding them would be the next step for a GPU with less than 80 GB.
"""
import contextlib
import json
import math
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
from checkpoint import UserError


@dataclass(frozen=True)
class Plan:
    """Length of a run, its learning-rate curve, and how often its state is kept. Peak learning rates are the optimisers' own."""

    steps: int
    warmup: int = 50  # steps of linear rise
    decay: str = "linear"  # afterwards: "linear" or "cosine" to zero over the whole run, or "constant"
    clip: float = 1.0  # largest norm of the gradient of one optimiser's parameters
    accumulate: int = 1  # batches per step
    ema: float = 0.0  # decay of the moving average of the first net's weights; 0: none
    save_every: int = 200
    log_every: int = 10
    keep: int = 2  # checkpoints

    def rate(self, step):
        """Factor on the peak learning rates at `step`, 0 to 1."""
        done = step / self.steps
        fall = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[self.decay]
        return min((step + 1) / self.warmup, fall) if self.warmup else fall


class Run:
    """A run in `folder`. Resumes by itself where the folder holds a checkpoint.

    config: plain values that decide the result (seed, batch, data, ...); with the plan they must be those of the checkpoint.
    nets: {name: module}, optimisers: {name: optimiser}. Parameters that require no gradient are not saved: the caller builds them.
    `run.step`: optimiser steps done; `run.number`: batches consumed by this process, which is where `batches` has to start.
    """

    def __init__(self, folder, config, nets, optimisers, plan):
        self.folder, self.nets, self.optimisers, self.plan, self.step = Path(folder), nets, optimisers, plan, 0
        keeping = {"save_every", "log_every", "keep"}
        self.config = {**config, **{k: v for k, v in asdict(plan).items() if k not in keeping}, "processes": processes()}
        self.config = json.loads(json.dumps(self.config, default=str))  # as it comes back from a file: tuples are lists, paths are strings
        self.rates = {name: [group["lr"] for group in opt.param_groups] for name, opt in optimisers.items()}
        self.net = next(iter(nets.values()))
        for p in (p for net in nets.values() for p in net.parameters() if processes() > 1):
            dist.broadcast(p.data, 0)  # whatever seeds the others had
        self.average = {k: p.detach().float().clone() for k, p in trained(self.net).items()} if plan.ema else {}
        self._resume()

    @property
    def number(self):
        return self.step * self.plan.accumulate

    # ---- the loop

    def fit(self, batches, losses, report=None, what="train"):
        """Train up to plan.steps -> self. `report(run)` is called before every checkpoint; what it returns ({name: value}) is logged."""
        rows, begun = [], time.perf_counter()
        with tqdm(total=self.plan.steps, initial=self.step, desc=what, unit="step", mininterval=5, disable=rank() > 0) as bar:
            while self.step < self.plan.steps:
                rows.append(self._one_step(batches, losses))
                bar.update()
                save = self.step % self.plan.save_every == 0 or self.step == self.plan.steps
                if not save and self.step % self.plan.log_every:
                    continue
                line = {k: sum(r[k] for r in rows if k in r) / sum(k in r for r in rows) for k in {k: 0 for r in rows for k in r}}
                line["seconds_per_step"] = (time.perf_counter() - begun) / len(rows)
                line |= report(self) if save and report and rank() == 0 else {}
                self._log({"step": self.step, **line})
                bar.set_postfix_str(", ".join(f"{k} {v:.4g}" for k, v in line.items() if k in ("loss", "psnr")))
                if save:
                    self.save()
                rows, begun = [], time.perf_counter()
        return self

    def _one_step(self, batches, losses):
        k, parts = self.plan.accumulate, {"rate": self.plan.rate(self.step)}
        for name, opt in self.optimisers.items():
            opt.zero_grad()
            for group, peak in zip(opt.param_groups, self.rates[name]):
                group["lr"] = peak * parts["rate"]
        for micro in range(k):
            batch, number = next(batches), self.number + micro
            for name, loss, values in losses(batch, number):
                if not torch.isfinite(loss):
                    self._stop(f"the loss of '{name}' is {loss.item()}", lambda: list(losses(batch, number)))
                (loss / k).backward()
                for key, value in values.items():
                    parts[key] = parts.get(key, 0) + float(value) / k
        for name, opt in self.optimisers.items():
            params = [p for group in opt.param_groups for p in group["params"]]
            average_gradients(params)
            norm = torch.nn.utils.clip_grad_norm_(params, self.plan.clip or math.inf)
            if not torch.isfinite(norm):
                self._stop(f"the gradient of '{name}' is not finite", lambda: list(losses(batch, number)))
            parts["gradient" if len(self.optimisers) == 1 else f"gradient_{name}"] = norm.item()
        for opt in self.optimisers.values():  # only now that all gradients are known to be finite
            opt.step()
        self.step += 1
        if self.average:  # as in the released trainer (spec dc-ae-v 7.1): a short memory at the beginning
            decay = self.plan.ema * (1 - math.exp(-self.step / 2000))
            for key, p in trained(self.net).items():
                self.average[key].lerp_(p.detach().float(), 1 - decay)
        return parts

    @contextlib.contextmanager
    def averaged(self):
        """Within this block the first net has the moving average of its weights (if the plan has one)."""
        own = {k: p.detach().clone() for k, p in trained(self.net).items() if self.average}
        copy_into(self.net, self.average)
        try:
            yield self.net
        finally:
            copy_into(self.net, own)

    # ---- what must not be lost

    def checkpoints(self):
        """Paths of the checkpoints in the folder, oldest first."""
        return sorted(self.folder.glob("checkpoint-*.pt"), key=lambda p: int(re.search(r"(\d+)\.pt", p.name)[1]))

    def save(self):
        """Write a checkpoint and remove the oldest beyond plan.keep. Only process 0 writes."""
        if rank():
            return
        state = dict(config=self.config, step=self.step, random=torch.get_rng_state(), average=self.average,
                     nets={name: kept(net) for name, net in self.nets.items()},
                     optimisers={name: opt.state_dict() for name, opt in self.optimisers.items()})
        with checkpoint.atomic_path(self.folder / f"checkpoint-{self.step:07d}.pt") as tmp, open(tmp, "wb") as f:
            torch.save(state, f)  # into an open file: a full disk is an OSError only this way
            f.flush()
            os.fsync(f.fileno())
        for old in self.checkpoints()[: -self.plan.keep]:
            old.unlink()

    def _resume(self):
        files = self.checkpoints()
        while files:
            try:
                saved = checkpoint.load_pickle(files[-1])
                break
            except UserError as e:
                tqdm.write(f"going back to the checkpoint before: {e}")
                files.pop()
        if files:
            if different := difference(saved["config"], self.config):
                raise UserError(f"{self.folder} holds a run with other settings ({different}): use the same ones, or another --out.")
            for name, net in self.nets.items():
                copy_into(net, saved["nets"][name])
            for name, opt in self.optimisers.items():
                opt.load_state_dict(saved["optimisers"][name])
            for key, value in self.average.items():
                value.copy_(saved["average"][key])
            torch.set_rng_state(saved["random"])
            self.step = saved["step"]
        if rank() == 0 and self.folder.exists():  # lines of steps that will be made again
            lines = [line for line in read_log(self.folder) if line["step"] <= self.step]
            with checkpoint.atomic_path(self.folder / "log.jsonl") as tmp:
                tmp.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _log(self, line):
        if rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")

    def _stop(self, what, again):
        layer = suspect(self.nets, again)
        last = self.checkpoints()
        raise UserError(f"{what} at step {self.step}, first in {layer}: lower the learning rate, or look at the data; "
                        f"the last good checkpoint is {last[-1] if last else 'none yet'}.")


# ---------------------------------------------------------------------------------------------------- helpers


def trained(net):
    """{name: parameter} of what requires a gradient."""
    return {k: p for k, p in net.named_parameters() if p.requires_grad}


def kept(net):
    """{name: tensor} of a checkpoint: everything but frozen parameters."""
    frozen = {k for k, p in net.named_parameters() if not p.requires_grad}
    return {k: v for k, v in net.state_dict().items() if k not in frozen}


@torch.no_grad()
def copy_into(net, tensors):
    own = net.state_dict()
    for key, value in tensors.items():
        own[key].copy_(value)


def difference(old, new):
    """What differs between two configs, in words: "lr 0.001 -> 0.002, seed missing -> 1"; empty where nothing does."""
    both = {**old, **new}
    return ", ".join(f"{k} {old.get(k, 'missing')} -> {new.get(k, 'missing')}" for k in both
                     if (k in old, old.get(k)) != (k in new, new.get(k)))


def suspect(nets, again):
    """Run `again()` once more and name the layer that is to blame: the first whose weights or output are not finite; if none is, the first
    whose gradient is not."""
    for name, net in nets.items():
        for key, p in net.named_parameters():
            if not torch.isfinite(p).all():
                return f"the weights of {name}.{key}"
    found, hooks = [], []
    for name, net in nets.items():
        for key, module in net.named_modules():
            def look(module, args, out, layer=f"{name}.{key}".rstrip(".")):
                out = out[0] if isinstance(out, tuple) else out
                if isinstance(out, torch.Tensor) and not torch.isfinite(out).all():
                    found.append(f"the output of {layer}")
            hooks.append(module.register_forward_hook(look))
    with torch.no_grad():  # a layer is called back before the layers that contain it
        again()
    for hook in hooks:
        hook.remove()
    bad = (f"the gradient of {name}.{key}" for name, net in nets.items() for key, p in net.named_parameters()
           if p.grad is not None and not torch.isfinite(p.grad).all())
    return found[0] if found else next(bad, "the loss itself")


def read_log(folder):
    """The lines of a run's log as dicts. A line cut off by a crash is left out."""
    file, lines = Path(folder) / "log.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def plot(folder, keys=None):
    """Draw a run's log, one panel per number (or per one of `keys`), as log.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(folder)
    keys = keys or list(dict.fromkeys(k for line in lines for k in line if k != "step"))
    if not keys:
        return
    rows = math.ceil(len(keys) / 4)
    fig, axes = plt.subplots(rows, min(len(keys), 4), figsize=(4 * min(len(keys), 4), 2.6 * rows), squeeze=False)
    for ax, key in zip(axes.flat, keys):
        ax.plot(*zip(*[(line["step"], line[key]) for line in lines if key in line]))
        ax.set(title=key, xlabel="step")
        ax.grid(alpha=0.3)
    fig.tight_layout()
    with checkpoint.atomic_path(Path(folder) / "log.png") as tmp:
        fig.savefig(tmp, dpi=90)
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------- several processes


def start():
    """Join the other processes where torchrun started this one -> the device to train on."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return device


def rank():
    """Number of this process; 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(params):
    """Mean of each gradient over all processes, as if their batches had been one."""
    if processes() > 1:
        for p in params:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= processes()
