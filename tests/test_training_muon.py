"""Muon: every direction of a matrix moves equally fast, vectors get Adam, and a resumed
run is the uninterrupted one."""
import io

import pytest
import torch
from torch import nn

import kernels
from training.muon import Muon, orthogonalise


def iteration(m, steps=5):
    """As written in the docstring, in fp64."""
    x = (m.T if m.shape[0] > m.shape[1] else m).double()
    x = x / x.norm()
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if m.shape[0] > m.shape[1] else x


@pytest.fixture(params=["fp32", "bf16"])
def multiplied_in(request, monkeypatch):
    """What the processor multiplies fastest."""
    found = {"fp32": torch.float32, "bf16": torch.bfloat16}[request.param]
    monkeypatch.setattr(kernels, "matmul_type", lambda device: found)
    return found


@pytest.mark.core
@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_orthogonalise_keeps_the_singular_vectors_and_evens_out_the_values(shape, multiplied_in):
    m = torch.randn(shape)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    seen = u.T @ orthogonalise(m) @ vh.T  # in the coordinates of m's singular vectors: diagonal
    values = seen.diagonal()
    assert (seen - values.diag()).abs().max() < (1e-3 if multiplied_in == torch.float32 else 0.1)
    clear = s > 0.02 * s.norm()  # five steps do not lift what is nearly zero
    assert clear.sum() > 10 and 0.6 < values[clear].min() and values[clear].max() < 1.3


@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("shape", [(64, 1728), (64, 64), (96, 16)])
def test_few_digits_keep_the_directions_that_stand_out(shape, rank, multiplied_in):
    """Also where most singular values are 10,000 times smaller than the first. In fp32
    all of the matrix is that of the iteration as written; in bf16 what lies above its
    rounding is."""
    m = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]) + 1e-3 * torch.randn(shape)
    ours, exact = orthogonalise(m), iteration(m)
    assert ours.dtype == m.dtype
    if multiplied_in == torch.float32:
        assert (ours - exact).abs().max() < 1e-3 * exact.abs().max()
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    clear = s > 0.02 * s.norm()
    seen = u[:, clear].T @ (ours - exact) @ vh[clear].T
    assert clear.sum() >= 4 and seen.abs().max() < 0.1


def test_the_step_does_not_depend_on_the_size_of_the_gradient():
    steps = []
    for factor in (1, 1000):
        torch.manual_seed(0)
        net = nn.Linear(6, 4)
        before, opt = net.weight.detach().clone(), Muon(net, lr=0.1)
        (factor * net(torch.randn(8, 6)).square().sum()).backward()
        opt.step()
        steps.append(net.weight.detach() - before)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-5)
    # of Adam's size: 0.2 sqrt(max(rows, columns)) x an orthogonal matrix has entries of about 0.2 lr
    assert 0.1 < steps[0].square().mean().sqrt() / (0.2 * 0.1) < 1.3


def test_the_direction_is_that_of_the_momentum_looking_one_step_ahead():
    net, grads = nn.Linear(6, 4, bias=False), torch.randn(2, 4, 6)
    opt, before = Muon(net, lr=0.1), net.weight.detach().clone()
    for net.weight.grad in grads:
        opt.step()
    ahead = [grads[0] * 1.95, grads[1] + 0.95 * (0.95 * grads[0] + grads[1])]
    expected = before - 0.1 * 0.2 * 6**0.5 * sum(map(orthogonalise, ahead))
    torch.testing.assert_close(net.weight.detach(), expected)


def test_kernels_are_matrices_vectors_and_named_tables_get_adam():
    net = nn.Sequential(nn.Conv3d(2, 4, 3), nn.Linear(4, 5), nn.RMSNorm(5), nn.Linear(5, 3), nn.Linear(3, 1))
    net[2].requires_grad_(False)  # not trained: in no group
    matrices, rest = Muon(net, 0.1, adam=(r"3\..*",)).param_groups
    names = {id(p): n for n, p in net.named_parameters()}
    assert [names[id(p)] for p in matrices["params"]] == ["0.weight", "1.weight"]
    assert [names[id(p)] for p in rest["params"]] == ["0.bias", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias"]


def test_vectors_move_as_under_adam():
    torch.manual_seed(0)
    ours, theirs = nn.RMSNorm(6), nn.RMSNorm(6)
    pair = Muon(ours, 0.01), torch.optim.Adam(theirs.parameters(), 0.01, (0.9, 0.95))
    for _ in range(5):
        x = torch.randn(4, 6)
        for net, opt in zip((ours, theirs), pair):
            opt.zero_grad()
            (net(x) - x.abs()).square().sum().backward()
            opt.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def regression(steps, saved=None):
    """Fit y = tanh(x W) -> (net, last loss, state after it). Goes on from `saved`."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = torch.tanh(x @ torch.randn(8, 4))
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    opt, first = Muon(net, 0.02), 0
    if saved:
        saved = torch.load(io.BytesIO(saved), weights_only=True)
        net.load_state_dict(saved["net"])
        opt.load_state_dict(saved["opt"])
        first = saved["step"]
    for _ in range(first, steps):
        loss = (net(x) - y).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    file = io.BytesIO()
    torch.save(dict(net=net.state_dict(), opt=opt.state_dict(), step=steps), file)
    return net, loss.item(), file.getvalue()


def test_it_fits_a_small_regression():
    assert regression(1)[1] > 0.3 and regression(150)[1] < 0.01


def test_resumed_equals_uninterrupted_bit_for_bit():
    whole, resumed = regression(12)[0], regression(12, saved=regression(5)[2])[0]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
