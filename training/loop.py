"""A training run that can be killed.

Long runs end in the middle: a laptop is closed, a node is taken away, a disk fills. What a run needs so that nothing is lost but
the steps since its last checkpoint is the same for every network, and stands here once:

* everything random in a step is drawn from the number of the step, so "where was I?" is one integer;
* a checkpoint (weights, their moving average, optimisers, torch's random state, step, config) is written beside the last one and then
  renamed: a full disk or a `kill -9` leaves the old one. On one machine a resumed run equals the uninterrupted one, on the CPU bit for
  bit;
* a folder that belongs to a run with another config is refused, and the difference is shown;
* a loss or gradient that is not finite stops the run before it reaches the weights, and is traced to the layer it came from;
* every number goes to `log.jsonl`, one line per few steps, and is drawn in `log.png`.

    run = train.Run("out/x", dict(batch=8), {"net": net}, {"net": torch.optim.AdamW(net.parameters(), 1e-4)}, train.Plan(steps=1000))
    run.fit(batches, losses)        # batches: an iterator that starts at batch number run.number

`losses(batch, number)` yields (name of an optimiser, loss, {what to log: value}), once per optimiser. It is a generator, and each loss goes
backward before the next one is made, so the second loss of a GAN may reuse what the first one computed.

Several processes (`torchrun --nproc-per-node 8 ...`) are one with a larger batch. Each takes its own part of it (`Run.positions`), and the
gradients are averaged. A network is held in one of two ways:

    copied    every process has all of it; gradients are averaged by a plain all-reduce after the backward pass, which works for any loss
              and any set of trained layers. For the convolutional DC-AE-V it costs next to nothing (8.6 GB of gradients against a step of
              seconds); 2.1 billion parameters with fp32 masters, Adam and average take 43 GB per GPU
    sharded   `shard(net, net.blocks)`, before the optimiser is made: of n processes each keeps 1/n of every tensor (PyTorch's FSDP2), of its
              gradient, its moments and its average; a block's weights are gathered when it runs and dropped again

A parameter travels in the type in which it is stored, and the network itself says what is computed in which (dit.py: a block mixes bf16
matrices with fp32 norms and modulation). FSDP's own casting goes by whole units and would round what has to stay fp32; its rule is one
type for all *trained* parameters of a unit: fp32, as masters must be. The frozen ones beside them are bf16. So LoRA travels in fp32: for
14B and rank 256 3.3 GB more beside 28 GB, and no second copy.
"""
import contextlib
import json
import math
import os
import re
import shutil
import time
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map
from tqdm import tqdm

from files import checkpoint
from files.checkpoint import UserError


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

    With several processes the folder must be on a disk that all of them see. The checkpoint is a folder then, with a part from each.
    Another number of processes may go on with it, if the batches per step (processes x accumulate) are as many.
    """

    def __init__(self, folder, config, nets, optimisers, plan):
        self.folder, self.nets, self.optimisers, self.plan, self.step = Path(folder), nets, optimisers, plan, 0
        keeping = {"save_every", "log_every", "keep"}
        self.config = {**config, **{k: v for k, v in asdict(plan).items() if k not in keeping}, "processes": processes()}
        self.config = json.loads(json.dumps(self.config, default=str))  # as it comes back from a file: tuples are lists, paths are strings
        self.rates = {name: [group["lr"] for group in opt.param_groups] for name, opt in optimisers.items()}
        self.net = next(iter(nets.values()))
        self.sharded = any(is_sharded(p) for net in nets.values() for p in net.parameters())
        for net in nets.values():
            from_first(p for p in net.parameters() if not is_sharded(p))
        self.average = {k: p.detach().float().clone() for k, p in trained(self.net).items()} if plan.ema else {}
        self._resume()

    @property
    def number(self):
        return self.step * self.plan.accumulate

    def positions(self, number, batch):
        """Which samples this process's batch `number` of `batch` samples has to hold -> (step, range of positions in that step's global batch).

        Process r with k batches per step: its m-th batch is samples (r k + m) b to (r k + m + 1) b - 1 of the step. A sample that depends on
        nothing but (seed, step, position) is the same however the global batch is divided among processes and batches.
        """
        step, micro = divmod(number, self.plan.accumulate)
        start = (rank() * self.plan.accumulate + micro) * batch
        return step, range(start, start + batch)

    # ---- the loop

    def fit(self, batches, losses, report=None, what="train"):
        """Train up to plan.steps -> self. `report(run)` is called before every checkpoint; what it returns ({name: value}) is logged.

        Logged are means over all processes. The report is process 0's alone; but where a net is sharded every process makes it (a forward
        pass needs all of them), and only process 0 should write files.
        """
        with one_dies_all_die(self.folder):
            return self._fit(batches, losses, report, what)

    def _fit(self, batches, losses, report, what):
        rows, begun = [], time.perf_counter()
        with tqdm(total=self.plan.steps, initial=self.step, desc=what, unit="step", mininterval=5, disable=rank() > 0) as bar:
            while self.step < self.plan.steps:
                rows.append(self._one_step(batches, losses))
                bar.update()
                save = self.step % self.plan.save_every == 0 or self.step == self.plan.steps
                if not save and self.step % self.plan.log_every:
                    continue
                seconds, rows = (time.perf_counter() - begun) / len(rows), sum(everywhere(rows), [])
                line = {k: sum(r[k] for r in rows if k in r) / sum(k in r for r in rows) for k in {k: 0 for r in rows for k in r}}
                line["seconds_per_step"] = seconds
                line |= report(self) if save and report and (rank() == 0 or self.sharded) else {}
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
                if not agreed(torch.isfinite(loss)):
                    value = next(v for v in everywhere(loss.item()) if not math.isfinite(v))
                    self._stop(f"the loss of '{name}' is {value}", lambda: list(losses(batch, number)))
                (loss / k).backward()
                for key, value in values.items():
                    parts[key] = parts.get(key, 0) + float(value) / k
        for name, opt in self.optimisers.items():
            params = [p for group in opt.param_groups for p in group["params"]]
            average_gradients(params)
            norm = whole(torch.nn.utils.clip_grad_norm_(params, self.plan.clip or math.inf))  # over all shards
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
        """Paths of the checkpoints in the folder, oldest first: files, or folders with a part from each of several processes."""
        return sorted(self.folder.glob("checkpoint-*"), key=lambda p: int(re.search(r"\d+", p.name)[0]))

    def save(self):
        """Write a checkpoint, all processes together, and remove the oldest beyond plan.keep."""
        state = dict(config=self.config, step=self.step, random=torch.get_rng_state(), average=self.average,
                     nets={name: kept(net) for name, net in self.nets.items()},
                     optimisers={name: opt.state_dict() for name, opt in self.optimisers.items()})
        if torch.cuda.is_available():
            state["random_cuda"] = torch.cuda.get_rng_state()
        path = self.folder / f"checkpoint-{self.step:07d}"
        if processes() == 1:
            with checkpoint.atomic_path(path.with_suffix(".pt")) as tmp:
                write_synced(tmp, state)
        else:
            self._save_parts(path, state)
        for old in self.checkpoints()[: -self.plan.keep] if rank() == 0 else ():
            remove(old)

    def _save_parts(self, path, state):
        """Each process writes what it alone holds, process 0 also what is the same in all; the folder gets its name when all are done."""
        mine = lambda v: v.to_local() if is_sharded(v) else v if rank() == 0 else None
        state |= {key: tree_map(mine, state[key]) for key in ("average", "nets", "optimisers")}
        tmp, error = path.with_name(f".{path.name}"), None
        try:
            tmp.mkdir(parents=True, exist_ok=True)
            write_synced(tmp / f"part-{rank()}-of-{processes()}.pt", state)
        except OSError as e:
            error = e
        if failed := first(error and f"process {rank()} could not write its part of {path} ({error})"):
            if rank() == 0:
                shutil.rmtree(tmp, ignore_errors=True)
            raise error or UserError(f"{failed}: the checkpoint before is whole; make room and run it again.")
        if rank() == 0:
            remove(path)  # a damaged one of this very step
            sync_folder(tmp)
            tmp.rename(path)
            sync_folder(self.folder)
        everywhere(None)  # nobody goes on before it has its name

    def _resume(self):
        if rank() == 0:
            for left in self.folder.glob(".checkpoint-*"):  # of a run that was killed while it wrote
                remove(left)
        files = self.checkpoints()
        if len({tuple(f.name for f in seen) for seen in everywhere(files)}) > 1:
            raise UserError(f"the processes see different checkpoints in {self.folder}: put it on a disk that all of them share.")
        while files:
            parts, damage = [], None
            try:
                parts = read_parts(files[-1])
            except UserError as e:
                damage = str(e)
            if not (damage := first(damage)):
                break
            if rank() == 0:
                tqdm.write(f"going back to the checkpoint before: {damage}")
            files.pop()
        if files:
            saved = parts[0]
            if different := difference(saved["config"], self.config):
                raise UserError(f"{self.folder} holds a run with other settings ({different}): use the same ones, or another --out.")
            for name, net in self.nets.items():
                own = net.state_dict()
                copy_into(net, {k: held([p["nets"][name][k] for p in parts], own[k]) for k in saved["nets"][name]})
            for name, opt in self.optimisers.items():
                opt.load_state_dict(held_by(opt, [p["optimisers"][name] for p in parts]))
            for key, value in self.average.items():
                value.copy_(held([p["average"][key] for p in parts], value))
            own = parts[rank() % len(parts)]
            torch.set_rng_state(own["random"])
            if torch.cuda.is_available() and "random_cuda" in own:
                torch.cuda.set_rng_state(own["random_cuda"])
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
    """What differs between two configs, in words: "lr 0.001 -> 0.002, seed missing -> 1"; empty where nothing does. How the batches of a
    step are divided among processes is no difference."""
    both = {**old, **new}
    per_step = [c.get("processes", 1) * c.get("accumulate", 1) for c in (old, new)]
    divided = ("processes", "accumulate") if per_step[0] == per_step[1] else ()
    return ", ".join(f"{k} {old.get(k, 'missing')} -> {new.get(k, 'missing')}" for k in both
                     if k not in divided and (k in old, old.get(k)) != (k in new, new.get(k)))


def write_synced(path, state):
    with open(path, "wb") as f:
        torch.save(state, f)  # into an open file: a full disk is an OSError only this way
        f.flush()
        os.fsync(f.fileno())


def sync_folder(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_parts(path):
    """A checkpoint -> what each of the processes that wrote it put in, in order; a file is one part. UserError where something is missing."""
    if path.is_file():
        return [checkpoint.load_pickle(path)]
    files = sorted(path.glob("part-*.pt"), key=lambda p: int(p.name.split("-")[1]))
    if not files or len(files) != int(re.search(r"of-(\d+)", files[0].name)[1]):
        raise UserError(f"{path} holds {len(files)} parts, and that is not all of them: copy the folder again.")
    return [checkpoint.load_pickle(f, mmap=True) for f in files]  # mapped: only what is used is read


def held(pieces, like):
    """One tensor of a checkpoint as this process holds `like`. pieces: the rows that each part has of it; or the whole tensor in the first
    part and None in the others."""
    tensor = lambda: pieces[0] if len(pieces) == 1 or None in pieces else torch.cat(pieces)
    if not is_sharded(like):
        return tensor()
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, placements, device = like.device_mesh, like.placements, like.to_local().device
    if len(pieces) == processes() and None not in pieces:
        return DTensor.from_local(pieces[rank()].to(device), mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return distribute_tensor(tensor().to(device), mesh, placements, src_data_rank=None)  # each cuts out its own rows


def held_by(opt, parts):
    """An optimiser's state dict from those of all parts. What it keeps for a parameter is sharded as the parameter is, or a number."""
    params = [p for group in opt.param_groups for p in group["params"]]
    value = lambda pieces, p: held(pieces, p) if isinstance(pieces[0], torch.Tensor) and pieces[0].ndim else pieces[0]
    state = {i: {k: value([part["state"][i][k] for part in parts], params[i]) for k in kept} for i, kept in parts[0]["state"].items()}
    return {**parts[0], "state": state}


def suspect(nets, again):
    """Run `again()` once more and name the layer that is to blame: the first whose weights or output are not finite; if none is, the first
    whose gradient is not. All processes look, and all give the same answer: that of the first that found something."""
    found, hooks = [], []
    named = [(f"{name}.{key}", p) for name, net in nets.items() for key, p in net.named_parameters()]
    if bad := first(next((f"the weights of {key}" for key, p in named if not torch.isfinite(own_part(p)).all()), None)):
        return bad
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
    bad = (f"the gradient of {key}" for key, p in named if p.grad is not None and not torch.isfinite(own_part(p.grad)).all())
    return first(found[0] if found else next(bad, None)) or "the loss itself"


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


PATIENCE = timedelta(minutes=30)  # how long the others wait for one process: process 0 scores and draws alone


def start():
    """Join the other processes where torchrun started this one -> the device to train on."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    return device


def rank():
    """Number of this process; 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(tensors):
    """Give all processes what process 0 has."""
    for t in tensors if processes() > 1 else ():
        dist.broadcast(t.data, 0)


def everywhere(value):
    """[the value of process 0, of process 1, ...]: any small object. All processes must call it."""
    values = [value] * processes()
    if processes() > 1:
        dist.all_gather_object(values, value)
    return values


def first(found):
    """What the first process found that found something (not None or empty); None if nobody did."""
    return next(filter(None, everywhere(found)), None)


def agreed(flag):
    """Is a flag (bool tensor) true in all processes?"""
    if processes() > 1:
        flag = flag.float()
        dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def average_gradients(params):
    """Mean of each gradient over all processes, as if their batches had been one. FSDP has done it for the sharded ones."""
    if processes() > 1:
        for p in params:
            if p.grad is not None and not is_sharded(p.grad):
                dist.all_reduce(p.grad)
                p.grad /= processes()


@contextlib.contextmanager
def one_dies_all_die(folder):
    """The process that fails says why; here the others, whose exchange with it breaks, say so in one sentence. (With gloo at once. NCCL cannot
    tell: there torchrun ends the others, or PATIENCE does.)"""
    try:
        yield
    except RuntimeError as e:
        if processes() == 1 or not isinstance(e, dist.DistError) and not re.search("gloo|nccl|connection", str(e), re.I):
            raise
        raise UserError(f"process {rank()} of {processes()} lost contact with the others: one of them has ended, see its message; run it again, "
                        f"and it goes on from the last checkpoint in {folder}.") from e


# ---------------------------------------------------------------------------------------------------- sharded weights


def shard(net, units=()):
    """Spread the weights of `net` over all processes, in place -> net. With one process it stays as it is.

    units: the modules that are gathered one at a time (a transformer's blocks); the rest of the net is one more unit, gathered throughout a pass.
    Before: weights loaded, layers frozen and adapted, on the device. After: make the optimiser. Process 0's weights are the ones that
    count. Then call the net, not its parts: the weights are whole only inside of a forward pass. `consolidate` gets them back.

    Trained parameters of one unit must have one type (`masters`). On a GPU the whole net is there once, before it is cut: 28 GB for 14B.
    """
    if processes() == 1:
        return net
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise UserError(f"sharding needs torch 2.7 or newer, this is {torch.__version__}: update it, or run one process.") from None
    # It fears for views that are changed in place, as no block's output is here.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    from_first([*net.parameters(), *net.buffers()])
    mesh = init_device_mesh(next(net.parameters()).device.type, (processes(),))
    for module in (*units, net):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)  # the rest too: else its weights stay whole after a forward without backward
    return net


def masters(net):
    """Store in fp32 what is trained, whatever the rest is stored in -> net: an update of 5e-5 is lost in bf16."""
    for p in trained(net).values():
        p.data = p.data.float()
    return net


def consolidate(run):
    """The whole weights of the run's first net, on the CPU: {name: tensor} in process 0, {} in the others, and all must call it. Within
    `run.averaged()` they are the averaged ones."""
    tensors = {}
    for key, value in run.net.state_dict().items():
        value = whole(value.detach())  # one at a time
        if rank() == 0:
            tensors[key] = value.to("cpu", copy=True)
    return tensors


def is_sharded(tensor):
    """Is it a DTensor, of which this process holds some rows?"""
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_part(tensor):
    return tensor.to_local() if is_sharded(tensor) else tensor
