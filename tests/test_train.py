"""A run that can be killed: nothing is lost but the steps since the last checkpoint, and nothing is wrong afterwards."""
import contextlib
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import checkpoint
import train
from checkpoint import UserError
from conftest import ROOT

PLAN = train.Plan(steps=8, warmup=2, accumulate=2, ema=0.9, save_every=3, log_every=2)


def make(folder, plan=PLAN, seed=0, **config):
    """A small GAN: two networks, two optimisers, dropout (which draws from torch's global generator), gradients from two batches per step."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Dropout(0.2), nn.Linear(16, 4))
    disc = nn.Linear(4, 1)
    optimisers = {"net": torch.optim.AdamW(net.parameters(), 1e-2), "disc": torch.optim.SGD(disc.parameters(), 1e-2, momentum=0.9)}
    return train.Run(folder, dict(batch=6, seed=seed, **config), {"net": net, "disc": disc}, optimisers, plan)


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


@pytest.mark.parametrize("stop", [0, 2, 3, 5, 7])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop):
    """Stopped in the middle of any step, with weights half-way: weights, average, log are those of the run that was left in peace."""
    whole = fit(make(tmp_path / "whole"))
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
    logs = [list(map(untimed, train.read_log(tmp_path / name))) for name in ("whole", "resumed")]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [2, 3, 4, 6, 8]
    assert_equal(tensors(fit(make(tmp_path / "resumed"))), tensors(whole))  # a finished run is left as it is


KILLED = """
import sys; sys.path[:0] = [{tests!r}, {root!r}]
import test_train
run = test_train.make({folder!r}, test_train.LONG)
run.nets["disc"].register_forward_hook(lambda *_: test_train.wait() if run.step == 31 else None)
test_train.fit(run)
"""


def wait():
    print("half of step 31", flush=True)
    time.sleep(600)


LONG = train.Plan(steps=60, warmup=2, ema=0.9, save_every=2)


def test_kill_9_in_the_middle_of_a_step(tmp_path):
    """Killed without warning and started again: only the step since the last checkpoint is made again, the weights are the same, bit for bit."""
    code = KILLED.format(tests=str(ROOT / "tests"), root=str(ROOT), folder=str(tmp_path / "run"))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "half of step 31\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert make(tmp_path / "run", LONG).step == 30
    whole, resumed = fit(make(tmp_path / "whole", LONG)), fit(make(tmp_path / "run", LONG))
    assert_equal(tensors(resumed), tensors(whole))
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_another_config_is_refused_and_the_difference_shown(tmp_path):
    fit(make(tmp_path))
    with pytest.raises(UserError, match=r"other settings \(steps 8 -> 9, lr missing -> 0.1\): use the same ones, or another --out"):
        make(tmp_path, train.Plan(**{**PLAN.__dict__, "steps": 9}), lr=0.1)
    make(tmp_path, train.Plan(**{**PLAN.__dict__, "save_every": 1, "keep": 1, "log_every": 1}))  # how often it is saved changes no result


def test_so_many_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path, capsys):
    run = fit(make(tmp_path))
    assert [p.name for p in run.checkpoints()] == ["checkpoint-0000006.pt", "checkpoint-0000008.pt"]
    file = run.checkpoints()[-1]
    file.write_bytes(file.read_bytes()[:1000])
    again = make(tmp_path)
    assert again.step == 6 and "going back" in capsys.readouterr().out
    assert_equal(tensors(fit(again)), tensors(run))


def test_frozen_weights_are_not_saved(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.BatchNorm1d(2), nn.Linear(2, 2))
    run = train.Run(tmp_path, {}, {"net": net}, {"net": torch.optim.SGD(train.trained(net).values(), 0.1)}, train.Plan(1))
    run.save()
    saved = checkpoint.load_pickle(run.checkpoints()[0])["nets"]["net"]
    assert set(saved) == set(net.state_dict()) - {"0.weight", "0.bias"} and "1.running_mean" in saved


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """Every write to /dev/full fails as a full disk does: an OSError that says so, and the run goes on from the checkpoint before."""
    run = fit(make(tmp_path))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    run.step = 9
    monkeypatch.setattr(checkpoint, "atomic_path", lambda path: contextlib.nullcontext(Path("/dev/full")))
    with pytest.raises(OSError) as error:
        run.save()
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before and make(tmp_path).step == 8


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

    with pytest.raises(UserError, match=f"{expected}.*the last good checkpoint is .*checkpoint-0000003.pt"):
        run.fit(batches(0), losses)
    assert run.step == 4 and all(torch.isfinite(v).all() for v in tensors(run).values()) and make(tmp_path).step == 3


# ---------------------------------------------------------------------------------------------------- the arithmetic


def test_learning_rate():
    rates = lambda **k: [round(train.Plan(steps=10, **k).rate(s), 3) for s in (0, 1, 5, 9)]
    assert rates(warmup=4) == [0.25, 0.5, 0.5, 0.1] and rates(warmup=4, decay="constant") == [0.25, 0.5, 1, 1]
    assert rates(warmup=0, decay="cosine") == [1, 0.976, 0.5, 0.024]


def quadratic(folder, plan, rows, momentum=0.0):
    """One linear layer on given batches of rows -> its weight after plan.steps."""
    net = nn.Linear(4, 1, bias=False)
    nn.init.constant_(net.weight, 1 + train.rank())  # all begin with those of process 0
    run = train.Run(folder, {}, {"net": net}, {"net": torch.optim.SGD(net.parameters(), 0.1, momentum)}, plan)

    def losses(x, number):
        loss = net(x).square().mean()
        yield "net", loss, {}

    run.fit(iter(rows), losses)
    return run


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path):
    x = torch.randn(8, 4)
    a = quadratic(tmp_path / "a", train.Plan(1, warmup=0), [x])
    b = quadratic(tmp_path / "b", train.Plan(1, warmup=0, accumulate=4), x.split(2))
    assert torch.allclose(a.net.weight, b.net.weight, atol=1e-6) and not torch.allclose(a.net.weight, torch.ones(1, 4))


def test_gradients_are_clipped(tmp_path):
    x = 100 * torch.randn(8, 4)
    run = quadratic(tmp_path, train.Plan(1, warmup=0, clip=0.5), [x])
    assert (run.net.weight - 1).norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)
    assert train.read_log(tmp_path)[0]["gradient"] > 100  # what is logged is the norm before


def test_the_average_has_a_short_memory_at_first(tmp_path):
    """decay_t = decay (1 - exp(-t / 2000)) (spec 7.1); within `averaged` the net has these weights."""
    x = torch.randn(3, 8, 4)
    weights = [quadratic(tmp_path / str(n), train.Plan(3, warmup=0, decay="constant", ema=0.9), x[:3]) for n in (0,)]
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
    train.plot(tmp_path)
    assert (tmp_path / "log.png").stat().st_size > 5000


# ---------------------------------------------------------------------------------------------------- several processes

PROCESS = """
import sys; sys.path[:0] = [{tests!r}, {root!r}]
import torch, test_train, train
train.start()
x = torch.load({rows!r})
run = test_train.quadratic({folder!r}, train.Plan(2, warmup=0), x[:, train.rank()])
torch.save(run.net.weight.detach(), {folder!r} + f"-{{train.rank()}}.pt")
"""


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """Started as torchrun does it, each with half of the rows: both end with the weights of one process that has them all."""
    x = torch.randn(2, 2, 6, 4)  # step, process, rows
    torch.save(x, tmp_path / "rows.pt")
    code = PROCESS.format(tests=str(ROOT / "tests"), root=str(ROOT), rows=str(tmp_path / "rows.pt"), folder=str(tmp_path / "run"))
    (tmp_path / "script.py").write_text(code)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tmp_path / "script.py"],
                   check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    whole = quadratic(tmp_path / "whole", train.Plan(2, warmup=0), x.flatten(1, 2))
    for rank in (0, 1):
        assert torch.allclose(torch.load(tmp_path / f"run-{rank}.pt"), whole.net.weight, atol=1e-6)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1  # only process 0 writes
    with pytest.raises(UserError, match="processes 2 -> 1"):  # the batch would be another
        quadratic(tmp_path / "run", train.Plan(2, warmup=0), [])
