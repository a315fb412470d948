"""A training run that can be killed.

Long runs end in the middle: a laptop is closed, a node is taken away, a disk fills. What
a run needs so that nothing is lost but the steps since its last checkpoint is the same
for every network, and stands here once:

* everything random in a step is drawn from the number of the step, so "where was I?" is
  one integer;
* a checkpoint is written beside the last one and then renamed: a full disk or `kill -9`
  leaves the old one. A resumed run equals the uninterrupted one, on the CPU to the bit;
* a folder that belongs to a run with another config is refused, naming the difference;
* a loss or gradient that is not finite stops the run before it reaches the weights, and
  is traced to the layer it came from;
* every number goes to `log.jsonl`, one line per few steps, and is drawn in `log.png`.

    plan, opt = loop.Plan(steps=1000), torch.optim.AdamW(net.parameters(), 1e-4)
    run = loop.Run("out/x", dict(batch=8), {"net": net}, {"net": opt}, plan)
    run.fit(batches, losses)      # batches: an iterator that starts at run.number

`losses(batch, number)` yields (name of an optimiser, loss, {what to log: value}), once
per optimiser. Each loss goes backward before the next one is made, so the second loss of
a GAN may reuse what the first one computed. Several processes (`torchrun`) are one with
a larger batch; their networks are copies, or sharded (`shard`).
"""
import contextlib
import errno
import json
import math
import os
import pickle
import re
import shutil
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from files import checkpoint, folders, video
from files.errors import is_full, naming, system_error
from files.checkpoint import UserError
from gpu import choose


@dataclass(frozen=True)
class Plan:
    """Length of a run, its learning-rate curve, and how often its state is kept. Peak
    learning rates are the optimisers' own."""

    steps: int
    warmup: int = 50  # steps of linear rise
    decay: str = "linear"  # afterwards: "linear" to zero, or "constant"
    clip: float = 1.0  # largest norm of the gradient of one optimiser's parameters
    accumulate: int = 1  # batches per step
    ema: float = 0.0  # decay of the moving average of the first net's weights; 0: none
    save_every: int = 200
    log_every: int = 10
    keep: int = 2  # checkpoints

    def rate(self, step):
        """Factor on the peak learning rates at `step`, 0 to 1."""
        fall = 1.0
        if self.decay == "linear":
            fall = 1 - step / self.steps
        return min((step + 1) / self.warmup, fall) if self.warmup else fall


KEEPING = ("save_every", "log_every", "keep")  # of a plan: what does not decide the result


class Run:
    """A run in `folder`. Resumes by itself where the folder holds a checkpoint.

    config: plain values that decide the result (seed, batch, data, ...); with the plan
    they must be those of the checkpoint. nets: {name: module}, optimisers: {name:
    optimiser}. Parameters that require no gradient are not saved: the caller builds them.
    `run.step`: optimiser steps done; `run.number`: batches consumed by this process,
    which is where `batches` has to start.

    With several processes the folder must be on a disk that all of them see. Another
    number of processes may go on with a run, if the batches per step (processes x
    accumulate) are as many. Two runs at a time are refused (`lock`).
    """

    def __init__(self, folder, config, nets, optimisers, plan):
        self.folder, self.plan, self.step = Path(folder), plan, 0
        self.lock = lock(folder)  # until the end of `fit`
        self.nets, self.optimisers = nets, optimisers
        decisive = {k: v for k, v in asdict(plan).items() if k not in KEEPING}
        config = {**config, **decisive, "processes": processes()}
        self.config = json.loads(json.dumps(config, default=str))  # as a file gives it back
        self.rates = {}
        for name, opt in optimisers.items():
            self.rates[name] = [group["lr"] for group in opt.param_groups]
        self.net = next(iter(nets.values()))
        parameters = [p for net in nets.values() for p in net.parameters()]
        self.sharded = any(map(is_sharded, parameters))
        broadcast(p for p in parameters if not is_sharded(p))
        self.average = {}
        if plan.ema:
            self.average = {k: p.detach().float().clone() for k, p in trained(self.net).items()}
        self._resume()

    @property
    def number(self):
        return self.step * self.plan.accumulate

    def positions(self, number, batch):
        """Which samples this process's batch `number` of `batch` samples has to hold ->
        (step, range of positions in that step's global batch).

        Process r with k batches per step: its m-th batch is samples (r k + m) b to
        (r k + m + 1) b - 1 of the step. A sample that depends on nothing but (seed, step,
        position) is the same however the global batch is divided.
        """
        step, micro = divmod(number, self.plan.accumulate)
        start = (rank() * self.plan.accumulate + micro) * batch
        return step, range(start, start + batch)

    # ---- the loop

    def fit(self, batches, losses, report=None, what="train"):
        """Train up to plan.steps -> self.

        `report(run)` is called before every checkpoint; what it returns ({name: value}) is
        logged. Logged are means over all processes. The report is process 0's alone; but
        where a net is sharded every process makes it (a forward pass needs all of them),
        and only process 0 should write files.
        """
        bar = tqdm(total=self.plan.steps, initial=self.step, desc=what, unit="step",
                   mininterval=5, disable=rank() > 0)
        folders.check_room(self.folder, self.checkpoint_bytes(), "the checkpoints")
        with self.lock, one_dies_all_die(self.folder), bar:
            rows, begun = [], time.perf_counter()
            while self.step < self.plan.steps:
                rows.append(self._one_step(batches, losses))
                bar.update()
                save = self.step % self.plan.save_every == 0 or self.step == self.plan.steps
                if not save and self.step % self.plan.log_every:
                    continue
                seconds = (time.perf_counter() - begun) / len(rows)
                line = {"step": self.step, **mean_of(sum(all_gather(rows), []))}
                line["seconds_per_step"] = seconds
                if save and report and (rank() == 0 or self.sharded):
                    line |= report(self)
                self._log(line)
                shown = [f"{k} {line[k]:.4g}" for k in ("loss", "psnr") if k in line]
                bar.set_postfix_str(", ".join(shown))
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
                if not all_true(torch.isfinite(loss)):
                    value = next(v for v in all_gather(loss.item()) if not math.isfinite(v))
                    self._stop(f"the loss of '{name}' is {value}", losses, batch, number)
                (loss / k).backward()
                for key, value in values.items():
                    parts[key] = parts.get(key, 0) + float(value) / k
        for name, opt in self.optimisers.items():
            params = parameters_of(opt)
            average_gradients(params)
            norm = torch.nn.utils.clip_grad_norm_(params, self.plan.clip or math.inf)
            norm = full_tensor(norm)  # over all shards
            if not torch.isfinite(norm):
                self._stop(f"the gradient of '{name}' is not finite", losses, batch, number)
            parts["gradient" if len(self.optimisers) == 1 else f"gradient_{name}"] = norm.item()
        for opt in self.optimisers.values():  # only now that all gradients are known to be finite
            opt.step()
        self.step += 1
        if self.average:  # as in the released trainer: a short memory at the beginning
            decay = self.plan.ema * (1 - math.exp(-self.step / 2000))
            for key, p in trained(self.net).items():
                self.average[key].lerp_(p.detach().float(), 1 - decay)
        return parts

    @contextlib.contextmanager
    def averaged(self):
        """Within this block the first net has the moving average of its weights (if the
        plan has one)."""
        own = {}
        if self.average:
            own = {k: p.detach().clone() for k, p in trained(self.net).items()}
        copy_into(self.net, self.average)
        try:
            yield self.net
        finally:
            copy_into(self.net, own)

    def _stop(self, what, losses, batch, number):
        layer = suspect(self.nets, lambda: list(losses(batch, number)))
        last = self.checkpoints()
        good = last[-1] if last else "none yet"
        raise UserError(
            f"{what} at step {self.step}, first in {layer}: lower the learning rate, or look "
            f"at the data; the last good checkpoint is {good}.")

    def _log(self, line):
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / "log.jsonl"
            text = json.dumps(line) + "\n"
            with naming(file, len(text)), open(file, "a") as f:
                f.write(text)

    # ---- what must not be lost

    def checkpoints(self):
        """Folders of the checkpoints, oldest first."""
        number = lambda path: int(re.search(r"\d+", path.name)[0])
        return sorted(self.folder.glob("checkpoint-*"), key=number)

    def save(self):
        """Write a checkpoint, all processes together; remove the oldest beyond plan.keep."""
        path = self.folder / f"checkpoint-{self.step:07d}"
        about = dict(config=self.config, step=self.step, processes=processes())
        save_sharded(path, self._state(), about)
        if rank() == 0:
            for old in self.checkpoints()[: -self.plan.keep]:
                shutil.rmtree(old)

    def _state(self):
        """{name: tensor} of all that steps change; the random state is each process's own."""
        state = {f"random/{rank()}": torch.get_rng_state()}
        if torch.cuda.is_available():
            state[f"random_cuda/{rank()}"] = torch.cuda.get_rng_state()
        for key, value in self.average.items():
            state[f"average/{key}"] = value
        for name, net in self.nets.items():
            frozen = {k for k, p in net.named_parameters() if not p.requires_grad}
            for key, value in net.state_dict().items():
                if key not in frozen:
                    state[f"net/{name}/{key}"] = value
        for name, opt in self.optimisers.items():
            for i, values in opt.state_dict()["state"].items():
                for key, value in values.items():
                    state[f"optimiser/{name}/{i}/{key}"] = torch.as_tensor(value)
        return state

    def checkpoint_bytes(self):
        """What a checkpoint takes, the optimisers' two moments included."""
        size = 0
        for key, value in self._state().items():
            if not key.startswith("optimiser/"):
                size += checkpoint.size_of(value)
        for net in self.nets.values():
            size += 8 * sum(p.numel() for p in trained(net).values())
        return size

    def _like(self, about, stored):
        """What to read a checkpoint into: tensors as this process holds them, however
        many processes wrote it. stored: {name: (shape, dtype)} of the checkpoint."""
        like = {}
        for key, value in self._state().items():
            if key.startswith(("net/", "average/")):
                like[key] = torch.empty_like(value)
        for key, (shape, dtype) in stored.items():
            kind, _, name = key.partition("/")
            if kind == "optimiser":  # moments are sharded as their parameter is; counts are not
                name, index, _ = name.split("/")
                p = parameters_of(self.optimisers[name])[int(index)]
                like[key] = torch.empty(shape, dtype=dtype)
                if p.shape == shape:
                    like[key] = torch.empty_like(p, dtype=dtype, requires_grad=False)
            elif kind.startswith("random") and int(name) == rank() % about["processes"]:
                like[key] = torch.empty(shape, dtype=dtype)
        return like

    def _restore(self, tensors):
        """Take over the tensors of a checkpoint."""
        moments = {name: {} for name in self.optimisers}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "random":
                torch.set_rng_state(value)
            elif kind == "random_cuda" and torch.cuda.is_available():
                torch.cuda.set_rng_state(value)
            elif kind == "average":
                self.average[name].copy_(value)
            elif kind == "net":
                name, _, tensor = name.partition("/")
                copy_into(self.nets[name], {tensor: value})
            elif kind == "optimiser":
                name, index, field = name.split("/")
                plain = value.dtype == torch.int64 and value.ndim == 0  # was a plain int
                moments[name].setdefault(int(index), {})[field] = value.item() if plain else value
        for name, opt in self.optimisers.items():
            opt.load_state_dict({**opt.state_dict(), "state": moments[name]})

    def _resume(self):
        if rank() == 0:
            for left in self.folder.glob(".checkpoint-*"):  # of a run killed while it wrote
                shutil.rmtree(left)
        if any(path.is_file() for path in self.checkpoints()):
            raise UserError(f"{self.folder} holds a run of an earlier version: use another --out.")
        seen = all_gather([path.name for path in self.checkpoints()])
        if any(names != seen[0] for names in seen):
            raise UserError(f"the processes see different checkpoints in {self.folder}: "
                            "put it on a disk that all of them share.")
        for path in reversed(self.checkpoints()):
            about, damage = together(read_about, path)
            if not damage and (different := difference(about["config"], self.config)):
                raise UserError(f"{self.folder} holds a run with other settings ({different}): "
                                "use the same ones, or another --out.")
            if not damage:
                like = lambda stored: self._like(about, stored)
                tensors, damage = together(load_sharded, path, like)
            if not damage:
                self._restore(tensors)
                self.step = about["step"]
                break
            if rank() == 0:
                tqdm.write(f"going back to the checkpoint before: {damage}")
        if rank() == 0 and self.folder.exists():  # lines of steps that will be made again
            lines = [line for line in read_log(self.folder) if line["step"] <= self.step]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            file = self.folder / "log.jsonl"
            if not file.exists() or file.read_text() != text:
                with checkpoint.atomic_path(file, len(text)) as tmp:
                    tmp.write_text(text)


def trained(net):
    """{name: parameter} of what requires a gradient."""
    return {k: p for k, p in net.named_parameters() if p.requires_grad}


def parameters_of(optimiser):
    """All that it trains, in its own order."""
    return [p for group in optimiser.param_groups for p in group["params"]]


@torch.no_grad()
def copy_into(net, tensors):
    own = net.state_dict()
    for key, value in tensors.items():
        own[key].copy_(value)


def mean_of(rows):
    """Of dicts of numbers, the mean under each name, over those that have it."""
    values = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: sum(v) / len(v) for name, v in values.items()}


def difference(old, new):
    """What differs between two configs, in words: "lr 0.001 -> 0.002, seed missing -> 1";
    empty where nothing does. How the batches of a step are divided among processes is no
    difference."""
    per_step = [c.get("processes", 1) * c.get("accumulate", 1) for c in (old, new)]
    divided = ("processes", "accumulate") if per_step[0] == per_step[1] else ()
    said = []
    for k in {**old, **new}:
        if k not in divided and (k in old, old.get(k)) != (k in new, new.get(k)):
            said.append(f"{k} {old.get(k, 'missing')} -> {new.get(k, 'missing')}")
    return ", ".join(said)


# -------------------------------------------------------------- log and picture


def read_log(folder, name="log.jsonl"):
    """The lines of a run's log as dicts. A line cut off by a crash is left out."""
    file, lines = Path(folder) / name, []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def plot(folder):
    """Draw a run's log, one panel per number, as log.png."""
    lines = read_log(folder)
    keys = [k for k in mean_of(lines) if k != "step"]
    if not keys:
        return
    columns, rows = min(len(keys), 4), math.ceil(len(keys) / 4)
    with video.figure(Path(folder) / "log.png", rows, columns, (4, 2.6), dpi=90) as axes:
        for ax, key in zip(axes.flat, keys):
            points = [(line["step"], line[key]) for line in lines if key in line]
            ax.plot(*zip(*points))
            ax.set(title=key, xlabel="step")
            ax.grid(alpha=0.3)
        for ax in axes.flat[len(keys) :]:
            ax.remove()


# -------------------------------------------------------------- not a number


def suspect(nets, again):
    """Run `again()` once more and name the layer that is to blame: the first whose weights
    or output are not finite; if none is, the first whose gradient is not. All processes
    look, and all give the same answer: that of the first that found something."""
    named = []
    for name, net in nets.items():
        named += [(f"{name}.{key}", p) for key, p in net.named_parameters()]
    finite = lambda tensor: torch.isfinite(local_part(tensor)).all()
    bad = [f"the weights of {key}" for key, p in named if not finite(p)]
    if bad := first_found(bad):
        return bad[0]

    found, layers = [], {}
    for name, net in nets.items():
        for key, module in net.named_modules():
            layers[module] = f"{name}.{key}".rstrip(".")

    def look(module, args, out):
        out = out[0] if isinstance(out, tuple) else out
        if isinstance(out, torch.Tensor) and not torch.isfinite(out).all():
            found.append(f"the output of {layers[module]}")

    hooks = [module.register_forward_hook(look) for module in layers]
    with torch.no_grad():  # a layer is called back before the layers that contain it
        again()
    for hook in hooks:
        hook.remove()
    for key, p in named:
        if p.grad is not None and not finite(p.grad):
            found.append(f"the gradient of {key}")
    found = first_found(found)
    return found[0] if found else "the loss itself"


# -------------------------------------------------------------- several processes
#
# A network is held in one of two ways. Copied: every process has all of it; gradients are
# averaged by a plain all-reduce after the backward pass, which works for any loss and any
# set of trained layers. Sharded: see `shard`.

PATIENCE = timedelta(minutes=30)  # how long the others wait for one: process 0 scores alone


def start(threads=None):
    """Join the other processes where torchrun started this one -> the device to train on."""
    if threads:
        torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        choose.choose_kernels(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    return device


def rank():
    """Number of this process; 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(tensors):
    """Give all processes what process 0 has."""
    if processes() > 1:
        for t in tensors:
            dist.broadcast(t.data, 0)


def all_gather(value):
    """[the value of process 0, of process 1, ...]: any small object. All must call it."""
    values = [value] * processes()
    if processes() > 1:
        dist.all_gather_object(values, value)
    return values


def first_found(found):
    """What the first process found that found something (not None or empty), or None."""
    return next(filter(None, all_gather(found)), None)


def together(task, *args):
    """-> (what `task` gives here, the sentence of the first process in which it could not
    be done, or None)."""
    result = said = None
    try:
        result = task(*args)
    except UserError as e:
        said = str(e)
    return result, first_found(said)


def lock(folder):
    """A folder for this run alone, taken by process 0 for all of them -> a context in
    which it is held. UserError in all processes where another run has it."""
    take = contextlib.nullcontext if rank() else folders.Lock
    held, refused = together(take, folder)
    if refused:
        raise UserError(refused)
    return held


def all_true(flag):
    """Is a flag (bool tensor) true in all processes? One number is exchanged: every step asks."""
    if processes() > 1:
        flag = flag.float()
        dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def average_gradients(params):
    """Mean of each gradient over all processes, as if their batches had been one. FSDP has
    done it for the sharded ones."""
    if processes() > 1:
        for p in params:
            if p.grad is not None and not is_sharded(p.grad):
                dist.all_reduce(p.grad)
                p.grad /= processes()


@contextlib.contextmanager
def one_dies_all_die(folder):
    """The process that fails says why; here the others, whose exchange with it breaks, say
    so in one sentence. (With gloo at once. NCCL cannot tell: there torchrun ends the
    others, or PATIENCE does.)"""
    try:
        yield
    except RuntimeError as e:
        broken = isinstance(e, dist.DistError) or re.search("gloo|nccl|connection", str(e), re.I)
        if processes() == 1 or not broken:
            raise
        raise UserError(
            f"process {rank()} of {processes()} lost contact with the others: one of them has "
            "ended, see its message; run it again, and it goes on from the last checkpoint in "
            f"{folder}.") from e


# -------------------------------------------------------------- sharded weights


def shard(net, units=()):
    """Spread the weights of `net` over all processes, in place -> net: each keeps 1/n of
    every tensor (PyTorch's FSDP2), of its gradient, moments and average. With one process
    it stays as it is.

    units: the modules that are gathered one at a time (a transformer's blocks); the rest of
    the net is one more unit. Before: weights loaded, layers frozen and adapted, on the
    device (28 GB for 14B, once). After: make the optimiser. Process 0's weights are the
    ones that count. Then call the net, not its parts: the weights are whole only inside of
    a forward pass.

    A parameter travels in the type in which it is stored, and the network says what is
    computed in which. FSDP's own casting goes by whole units and would round what has to
    stay fp32. It wants one type for all *trained* parameters of a unit: fp32 (`masters`);
    the frozen ones beside them are bf16.
    """
    if processes() == 1:
        return net
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise UserError(f"sharding needs torch 2.7 or newer, this is {torch.__version__}: "
                        "update it, or run one process.") from None
    # It fears for views that are changed in place, as no block's output is here.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    broadcast([*net.parameters(), *net.buffers()])
    mesh = init_device_mesh(next(net.parameters()).device.type, (processes(),))
    for module in (*units, net):  # the rest too, or it stays whole after a mere forward pass
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return net


def masters(net):
    """Store in fp32 what is trained, whatever the rest is stored in -> net: an update of
    5e-5 is lost in bf16."""
    for p in trained(net).values():
        p.data = p.data.float()
    return net


def is_sharded(tensor):
    """Is it a DTensor, of which this process holds some rows?"""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor):
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(tensor):
    return tensor.to_local() if is_sharded(tensor) else tensor


# -------------------------------------------------------------- checkpoints on disk
#
# A folder in the format of torch.distributed.checkpoint, which reshards when it reads, and
# about.json beside it: what it is of, and the sizes of its files, for a copy may be cut off.


def save_sharded(path, tensors, about):
    """Write tensors of all processes: each its part of what is sharded, process 0 also what
    is the same in all, every process what bears its number. The folder gets its name when
    all is on the disk."""
    from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, save

    tmp, own = path.with_name(f".{path.name}"), f"/{rank()}"
    mine = {k: v for k, v in tensors.items() if rank() == 0 or is_sharded(v) or k.endswith(own)}
    try:
        with quietly():
            save(mine, storage_writer=FileSystemWriter(tmp))
    except CheckpointException as e:
        all_gather(None)
        if rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        not_saved(path, e, sum(map(checkpoint.size_of, mine.values())))
    if rank() == 0:
        sizes = {p.name: p.stat().st_size for p in sorted(tmp.iterdir())}
        checkpoint.write_json(tmp / "about.json", {**about, "files": sizes})
        shutil.rmtree(path, ignore_errors=True)  # a damaged one of this very step
        sync_folder(tmp)
        tmp.rename(path)
        sync_folder(path.parent)
    all_gather(None)  # nobody goes on before it has its name


def not_saved(path, failed, need):
    """Raise what stopped this process, or what it heard of another one. need: bytes."""
    if rank() not in failed.failures:
        number, (error, _) = min(failed.failures.items())
        raise UserError(
            f"process {number} could not write its part of {path} ({error}): the checkpoint "
            "before is whole; make room and run it again.") from failed
    error = failed.failures[rank()][0]
    system = system_error(error)
    if system and is_full(system) or shutil.disk_usage(path.parent).free < need:
        with naming(path, need):
            raise OSError(errno.ENOSPC, "No space left on device") from failed
    if system:
        raise OSError(system.errno, system.strerror, str(path)) from failed
    raise error


def read_about(path):
    """What `save_sharded` was told about a checkpoint. UserError where a part is missing."""
    try:
        about = json.loads((path / "about.json").read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is no checkpoint of this version, or damaged ({e}).") from None
    for name, size in about["files"].items():
        file = path / name
        if not file.exists() or file.stat().st_size != size:
            raise UserError(f"{path} holds no whole {name}: copy the folder again.")
    return about


def load_sharded(path, like):
    """Read a checkpoint -> {name: tensor}. like({name: (shape, dtype)} of what is there):
    the tensors to read into, each sharded as this process wants it."""
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load

    reader = FileSystemReader(path)
    try:
        stored = reader.read_metadata().state_dict_metadata
        tensors = like({k: (v.size, v.properties.dtype) for k, v in stored.items()})
        with quietly():
            load(tensors, storage_reader=reader)
    except (CheckpointException, OSError, ValueError, KeyError, pickle.UnpicklingError) as e:
        reason = str(e).strip().splitlines()[-1]
        raise UserError(f"{path} is damaged ({reason}): copy the folder again.") from e
    return tensors


@contextlib.contextmanager
def quietly():
    """One process is not a mistake."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def sync_folder(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
