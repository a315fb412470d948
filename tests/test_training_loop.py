"""A run that can be killed: nothing is lost but the steps since the last checkpoint, and nothing is wrong afterwards."""
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.run as torchrun
import torch.nn as nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import dit
import lora
from conftest import ROOT
from files.checkpoint import UserError
from training import loop

PLAN = loop.Plan(steps=8, warmup=2, accumulate=2, ema=0.9, save_every=3, log_every=2)


def make(folder, plan=PLAN, seed=0, **config):
    """A small GAN: two networks, two optimisers, dropout (which draws from torch's global generator), gradients from two batches per step."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Dropout(0.2), nn.Linear(16, 4))
    disc = nn.Linear(4, 1)
    optimisers = {"net": torch.optim.AdamW(net.parameters(), 1e-2), "disc": torch.optim.SGD(disc.parameters(), 1e-2, momentum=0.9)}
    return loop.Run(folder, dict(batch=6, seed=seed, **config), {"net": net, "disc": disc}, optimisers, plan)


def batches(number):
    for n in itertools.count(number):
        yield torch.randn(6, 4, generator=torch.Generator().manual_seed(n))


def losses_of(run):
    def losses(x, number):
        y = run.nets["net"](x)
        loss = (y - x).square().mean() - 0.1 * run.nets["disc"](y).mean()
        yield "net", loss, {"loss": loss.detach()}
        run.nets["disc"].zero_grad()  # what the first loss left there
        loss = (run.nets["disc"](y.detach()) - run.nets["disc"](x)).square().mean()
        yield "disc", loss, {"disc": loss.detach()}
    return losses


def fit(run):
    return run.fit(batches(run.number), losses_of(run))


def tensors(run):
    weights = {f"{n}.{k}": v for n, net in run.nets.items() for k, v in net.state_dict().items()}
    return {**weights, **{f"ema.{k}": v for k, v in run.average.items()}}


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was left in peace."""
    return fit(make(tmp_path_factory.mktemp("whole")))


@pytest.mark.core
@pytest.mark.parametrize("stop", [0, 2, 3, 5, 7])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, whole, stop):
    """Stopped in the middle of any step, with weights half-way: weights, average, log are those of the run that was left in peace."""
    run, served = make(tmp_path / "resumed"), batches(0)

    def until_interrupted():
        for n in range(2 * stop + 1):
            yield next(served)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.fit(until_interrupted(), losses_of(run))
    again = make(tmp_path / "resumed")
    assert again.step == stop // 3 * 3 and again.number == 2 * again.step
    assert_equal(tensors(fit(again)), tensors(whole))
    untimed = lambda line: {k: v for k, v in line.items() if k != "seconds_per_step"}
    logs = [list(map(untimed, loop.read_log(r.folder))) for r in (whole, again)]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [2, 3, 4, 6, 8]
    assert_equal(tensors(fit(make(tmp_path / "resumed"))), tensors(whole))  # a finished run is left as it is


KILLED = """
import sys; sys.path[:0] = [{tests!r}, {root!r}]
import test_training_loop
run = test_training_loop.make({folder!r}, test_training_loop.LONG)
run.nets["disc"].register_forward_hook(lambda *_: test_training_loop.wait() if run.step == 11 else None)
test_training_loop.fit(run)
"""


def wait():
    print("half of step 11", flush=True)
    time.sleep(600)


LONG = loop.Plan(steps=20, warmup=2, ema=0.9, save_every=2)


def test_kill_9_in_the_middle_of_a_step(tmp_path):
    """Killed without warning and started again: only the step since the last checkpoint is made again, the weights are the same, bit for bit."""
    code = KILLED.format(tests=str(ROOT / "tests"), root=str(ROOT), folder=str(tmp_path / "run"))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "half of step 11\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert make(tmp_path / "run", LONG).step == 10
    whole, resumed = fit(make(tmp_path / "whole", LONG)), fit(make(tmp_path / "run", LONG))
    assert_equal(tensors(resumed), tensors(whole))
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


@pytest.mark.core
def test_another_config_is_refused_and_the_difference_shown(tmp_path):
    fit(make(tmp_path))
    with pytest.raises(UserError, match=r"other settings \(steps 8 -> 9, lr missing -> 0.1\): use the same ones, or another --out"):
        make(tmp_path, loop.Plan(**{**PLAN.__dict__, "steps": 9}), lr=0.1)
    make(tmp_path, loop.Plan(**{**PLAN.__dict__, "save_every": 1, "keep": 1, "log_every": 1}))  # how often it is saved changes no result
    (tmp_path / "checkpoint-0000001.pt").touch()
    with pytest.raises(UserError, match="holds a run of an earlier version: use another --out"):
        make(tmp_path)


def test_so_many_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path, capsys):
    run = fit(make(tmp_path))
    assert [p.name for p in run.checkpoints()] == ["checkpoint-0000006", "checkpoint-0000008"]
    file = run.checkpoints()[-1] / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:1000])
    again = make(tmp_path)
    assert again.step == 6 and "going back" in capsys.readouterr().out
    assert_equal(tensors(fit(again)), tensors(run))


def test_frozen_weights_are_not_saved(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.BatchNorm1d(2), nn.Linear(2, 2))
    run = loop.Run(tmp_path, {}, {"net": net}, {"net": torch.optim.SGD(loop.trained(net).values(), 0.1)}, loop.Plan(1))
    run.save()
    stored = FileSystemReader(run.checkpoints()[0]).read_metadata().state_dict_metadata
    saved = {k.removeprefix("net/net/") for k in stored if k.startswith("net/")}
    assert saved == set(net.state_dict()) - {"0.weight", "0.bias"} and "1.running_mean" in saved


def full_disk(folder, step):
    """Make the disk full where this process's part of a checkpoint will be written."""
    part = Path(folder) / f".checkpoint-{step:07d}" / f"__{loop.rank()}_0.distcp"
    part.parent.mkdir(exist_ok=True)
    part.symlink_to("/dev/full")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """Every write to /dev/full fails as a full disk does: an OSError that says so, and the
    run goes on from the checkpoint before."""
    run = fit(make(tmp_path))
    content = lambda: {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    before, run.step = content(), 9
    full_disk(tmp_path, 9)
    with pytest.raises(OSError) as error:
        run.save()
    assert error.value.errno == errno.ENOSPC
    assert content() == before and make(tmp_path).step == 8


def test_a_disk_that_is_full_from_the_start_is_told_with_the_size_needed(tmp_path, monkeypatch):
    """Going on writes nothing before that."""
    fit(make(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    run = make(tmp_path)
    run.step = 4
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(loop.folders.shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match="the checkpoints need 0.0 MB and .* has 0.0: free some"):
        fit(run)
    left = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.name != ".lock"}
    assert left.keys() == before.keys()
    assert all(left[p] == before[p] for p in before if p.is_file())


# ---------------------------------------------------------------------------------------------------- not a number


@pytest.mark.parametrize("where, expected", [
    ("loss", "the loss of 'net' is nan at step 4, first in the loss itself"),
    ("layer", "the loss of 'net' is nan at step 4, first in the output of net.1"),
    ("gradient", "the gradient of 'net' is not finite at step 4, first in the gradient of net.0.weight")])
def test_nan_stops_the_run_and_is_traced(tmp_path, where, expected):
    """The sentence names step and layer; neither the weights nor the last good checkpoint have met it."""
    run = make(tmp_path)
    plain = losses_of(run)

    class Bad(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, g: g * float("nan"))

    def losses(x, number):
        hook = None
        if number == 9 and where != "loss":  # the second batch of step 4
            hook = run.nets["net"][1].register_forward_hook(lambda m, a, out: out * float("nan") if where == "layer" else Bad.apply(out))
        for name, loss, values in plain(x, number):
            yield name, loss * float("nan") if (number, where) == (9, "loss") else loss, values
        if hook:
            hook.remove()

    with pytest.raises(UserError, match=f"{expected}.*the last good checkpoint is .*checkpoint-0000003"):
        run.fit(batches(0), losses)
    assert run.step == 4 and all(torch.isfinite(v).all() for v in tensors(run).values()) and make(tmp_path).step == 3


# ---------------------------------------------------------------------------------------------------- the arithmetic


@pytest.mark.core
def test_learning_rate():
    rates = lambda **k: [round(loop.Plan(steps=10, **k).rate(s), 3) for s in (0, 1, 5, 9)]
    assert rates(warmup=4) == [0.25, 0.5, 0.5, 0.1] and rates(warmup=4, decay="constant") == [0.25, 0.5, 1, 1]


def quadratic(folder, plan, rows, momentum=0.0):
    """One linear layer on given batches of rows -> its weight after plan.steps."""
    net = nn.Linear(4, 1, bias=False)
    nn.init.constant_(net.weight, 1 + loop.rank())  # all begin with those of process 0
    run = loop.Run(folder, {}, {"net": net}, {"net": torch.optim.SGD(net.parameters(), 0.1, momentum)}, plan)

    def losses(x, number):
        loss = net(x).square().mean()
        yield "net", loss, {}

    run.fit(iter(rows), losses)
    return run


@pytest.mark.core
def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path):
    x = torch.randn(8, 4)
    a = quadratic(tmp_path / "a", loop.Plan(1, warmup=0), [x])
    b = quadratic(tmp_path / "b", loop.Plan(1, warmup=0, accumulate=4), x.split(2))
    assert torch.allclose(a.net.weight, b.net.weight, atol=1e-6) and not torch.allclose(a.net.weight, torch.ones(1, 4))


def test_gradients_are_clipped(tmp_path):
    x = 100 * torch.randn(8, 4)
    run = quadratic(tmp_path, loop.Plan(1, warmup=0, clip=0.5), [x])
    assert (run.net.weight - 1).norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)
    assert loop.read_log(tmp_path)[0]["gradient"] > 100  # what is logged is the norm before


def test_the_average_has_a_short_memory_at_first(tmp_path):
    """decay_t = decay (1 - exp(-t / 2000)) (spec 7.1); within `averaged` the net has these weights."""
    x = torch.randn(3, 8, 4)
    weights = [quadratic(tmp_path / str(n), loop.Plan(3, warmup=0, decay="constant", ema=0.9), x[:3]) for n in (0,)]
    run, expected, w = weights[0], torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    for t, batch in enumerate(x.double(), 1):
        grad = 2 * (batch @ w.T * batch).mean(0, keepdim=True)
        w = w - 0.1 * grad * min(1, 1 / grad.norm())
        decay = 0.9 * (1 - torch.exp(torch.tensor(-t / 2000)))
        expected = decay * expected + (1 - decay) * w
    assert torch.allclose(run.average["weight"].double(), expected, atol=1e-5)
    with run.averaged() as net:
        assert torch.equal(net.weight, run.average["weight"])
    assert torch.allclose(run.net.weight.double(), w, atol=1e-5)


def test_log_and_plot(tmp_path):
    """Numbers are means over the steps since the last line; a report comes with each checkpoint."""
    run = make(tmp_path)
    run.fit(batches(0), losses_of(run), report=lambda run: {"psnr": run.step / 2})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("psnr") for line in lines] == [None, 1.5, None, 3.0, 4.0]
    assert lines[0]["rate"] == pytest.approx((0.5 + 7 / 8) / 2)
    assert {"loss", "disc", "gradient_net", "gradient_disc", "seconds_per_step"} < lines[0].keys()
    loop.plot(tmp_path)
    assert (tmp_path / "log.png").stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------- several processes

TINY = dit.Config(dim=24, ffn_dim=32, heads=2, layers=2, in_channels=4, out_channels=4, patch=(1, 1, 1), text_dim=8, text_len=4)


def adapter(dtype=torch.float32):
    """A tiny transformer as stage 2 trains it: LoRA on frozen blocks (stored in `dtype`), embedder and head whole. Each process draws another."""
    torch.manual_seed(loop.rank())
    net = dit.WanDiT(TINY)
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    net.weight_dtype = dtype
    lora.wrap(net, 2, 4, full=("patch_embedding", "head"))
    for name, p in net.named_parameters():
        if not p.requires_grad and not dit.keeps_fp32(name):
            p.data = p.data.to(dtype)
    return net


def tune(folder, batch, steps=3, accumulate=1, net=None, poison=None):
    """Train it with flow matching on samples that depend on their step and position only -> the run. poison(number): what a loss is multiplied by."""
    net = loop.shard(net or adapter(), net.blocks if net else ())
    net.checkpointing = loop.processes() > 1  # recomputing changes nothing, and must get along with sharding
    plan = loop.Plan(steps, 2, "constant", 0.5, accumulate, ema=0.9, save_every=1, log_every=1)
    optimiser = torch.optim.AdamW(loop.trained(net).values(), 1e-2)
    run = loop.Run(folder, dict(global_batch=4), {"net": net}, {"net": optimiser}, plan)

    def batches():
        for number in itertools.count(run.number):
            step, positions = run.positions(number, batch)
            draws = [torch.Generator().manual_seed(100 * step + p) for p in positions]
            yield [torch.stack([torch.randn(shape, generator=g) for g in draws]) for shape in ((4, 2, 2, 2), (4, 2, 2, 2), (3, 8))]

    def losses(samples, number):
        z, noise, context = samples
        loss = (net((z + noise) / 2, torch.full((batch,), 500.0), context) - (noise - z)).square().mean() * (poison(number) if poison else 1)
        yield "net", loss, {"loss": loss.detach()}

    def held_out(run):
        with torch.no_grad(), run.averaged() as averaged:
            return {"held_out": averaged(torch.ones(1, 4, 2, 2, 2), torch.full((1,), 500.0), torch.ones(1, 3, 8)).square().mean().item()}

    return run.fit(batches(), losses, held_out)


def full(run):
    """The whole weights of a run, on the CPU."""
    tensors = {k: loop.full_tensor(v.detach()) for k, v in run.net.state_dict().items()}
    return {k: v.to("cpu", copy=True) for k, v in tensors.items()}


def in_two_processes(folder):
    """What the tests below look at; started twice by torchrun."""
    loop.start()
    folder, rank, said = Path(folder), loop.rank(), {}

    def refused(name, task, error=UserError):
        try:
            task()
        except error as e:
            (folder / f"{name}-{rank}").write_text(str(e))

    x = torch.load(folder / "rows.pt")
    torch.save(quadratic(folder / "copied", loop.Plan(2, warmup=0), x[:, rank]).net.weight.detach(), folder / f"copied-{rank}.pt")

    net = adapter()
    run = tune(folder / "sharded", 1, accumulate=2, net=net)
    with run.averaged():
        averages = full(run)
    if rank == 0:
        shutil.copytree(folder / "sharded" / "checkpoint-0000002", folder / "resumed" / "checkpoint-0000002")
    again = tune(folder / "resumed", 1, accumulate=2, net=adapter())
    own = [sum(loop.local_part(p).numel() for p in n.parameters()) for n in (net, adapter())]
    weights = [full(r) for r in (run, again)]
    if rank == 0:
        torch.save(dict(weights=weights, averages=averages, own=own), folder / "sharded.pt")

    mixed = tune(folder / "mixed", 1, 1, net=adapter(torch.bfloat16))  # frozen bf16 beside trained fp32 in one unit
    assert {p.dtype for p in mixed.net.blocks.parameters()} == {torch.float32, torch.bfloat16}

    bad = lambda number: float("nan") if (number, rank) == (3, 1) else 1.0
    refused("nan", lambda: tune(folder / "nan", 1, accumulate=2, net=adapter(), poison=bad))

    plain = loop.save_sharded

    def no_room(path, tensors, about):
        if rank and about["step"] == 2:
            full_disk(path.parent, 2)
        plain(path, tensors, about)

    loop.save_sharded = no_room
    refused("full", lambda: tune(folder / "full", 1, accumulate=2, net=adapter()), (OSError, UserError))
    loop.save_sharded = plain

    def die(number):
        if (number, rank) == (3, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0
    refused("killed", lambda: tune(folder / "killed", 1, accumulate=2, net=adapter(), poison=die))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes have worked in."""
    folder = tmp_path_factory.mktemp("two")
    torch.save(torch.randn(2, 2, 6, 4, generator=torch.Generator().manual_seed(0)), folder / "rows.pt")  # step, process, rows
    script = f"import sys; sys.path[:0] = {[str(ROOT / 'tests'), str(ROOT)]}\nimport test_training_loop\ntest_training_loop.in_two_processes({str(folder)!r})"
    (folder / "script.py").write_text(script)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ChildFailedError, match="SIGKILL"):  # the last thing they do
        patch.setenv("OMP_NUM_THREADS", "1")
        torchrun.main(["--standalone", "--nproc-per-node", "2", "--monitor-interval", "1", str(folder / "script.py")])
    return folder


def test_two_processes_are_one_with_twice_the_batch(two, tmp_path):
    """Each with half of the rows: both end with the weights of one process that has them all."""
    whole = quadratic(tmp_path, loop.Plan(2, warmup=0), torch.load(two / "rows.pt").flatten(1, 2))
    for rank in (0, 1):
        assert torch.allclose(torch.load(two / f"copied-{rank}.pt"), whole.net.weight, atol=1e-6)
    assert len(list((two / "copied").glob("checkpoint-*"))) == 1
    with pytest.raises(UserError, match="processes 2 -> 1"):  # the batch would be another
        quadratic(two / "copied", loop.Plan(2, warmup=0), [])


def test_sharded_over_two_processes_equals_one(two, tmp_path):
    """Two processes of two batches of one sample, weights sharded, blocks recomputed: losses, gradient norms, validation, weights and average
    of one process with a batch of four."""
    run, shared = tune(tmp_path, 4), torch.load(two / "sharded.pt")
    logs = [[(line["loss"], line["gradient"], line["held_out"]) for line in loop.read_log(f)] for f in (tmp_path, two / "sharded")]
    torch.testing.assert_close(*map(torch.tensor, logs), atol=1e-5, rtol=0)
    assert logs[0][0][0] > 1.1 * logs[0][-1][0]  # it learned something
    for key, value in run.net.state_dict().items():
        torch.testing.assert_close(shared["weights"][0][key], value, atol=1e-4, rtol=0)
    with run.averaged() as net:
        for key, value in net.state_dict().items():
            torch.testing.assert_close(shared["averages"][key], value, atol=1e-4, rtol=0)
    assert shared["own"][0] < 0.52 * shared["own"][1]  # each held half of it


def test_a_sharded_run_goes_on_bit_for_bit_and_in_one_process(two):
    """From step 2: in two processes the same bits; in one process, from both parts, with as many samples per step, the same to rounding."""
    a, b = torch.load(two / "sharded.pt")["weights"]
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    shutil.rmtree(two / "resumed" / "checkpoint-0000003")
    run = tune(two / "resumed", 1, accumulate=4)
    assert [p.name for p in run.checkpoints()] == ["checkpoint-0000002", "checkpoint-0000003"]
    for key, value in run.net.state_dict().items():
        torch.testing.assert_close(a[key], value, atol=1e-4, rtol=0)


def test_a_checkpoint_without_one_of_its_parts_is_passed_over(two, capsys):
    (two / "copied" / "checkpoint-0000002" / "__1_0.distcp").unlink()
    with pytest.raises(StopIteration):
        quadratic(two / "copied", loop.Plan(2, warmup=0), [])
    assert "holds no whole __1_0.distcp" in capsys.readouterr().out


def test_all_processes_stop_where_one_has_nan(two):
    """The same sentence in both, and neither has stepped."""
    said = [(two / f"nan-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and "the loss of 'net' is nan at step 1, first in the loss itself" in said[0]
    assert [p.name for p in (two / "nan").glob("checkpoint*")] == ["checkpoint-0000001"]


def test_a_full_disk_of_one_process_leaves_the_old_checkpoint(two):
    assert "No space left" in (two / "full-1").read_text() and "process 1 could not write its part" in (two / "full-0").read_text()
    assert sorted(p.name for p in (two / "full").iterdir()) == ["checkpoint-0000001", "log.jsonl"]


def test_when_one_process_is_killed_the_other_says_so(two):
    said = (two / "killed-0").read_text()
    assert "process 0 of 2 lost contact with the others" in said and "goes on from the last checkpoint" in said
    assert [p.name for p in (two / "killed").glob("checkpoint*")] == ["checkpoint-0000001"]
