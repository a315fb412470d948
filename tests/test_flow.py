"""Flow matching: the line, the training times, the schedules and solvers against the
published programs' numbers."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dit
import flow
from conftest import golden
from files.checkpoint import UserError
from flow import Times

TRACES = json.loads(golden("unipc_trace.json").read_text())
RUNS = [run for run in TRACES["runs"] if run["solver"] in flow.SOLVERS]


def toy_velocity(x, t):
    s = t / 1000
    return torch.tanh(1.3 * x) * (0.4 + s) + 0.25 * torch.sin(2 * x + 3 * s) - 0.1


# ------------------------------------------------ solvers

@pytest.mark.core
@pytest.mark.parametrize("run", RUNS, ids=lambda r: f"{r['solver']}-{r['steps']}-shift{r['shift']:g}")
def test_solver_follows_the_reference_step_by_step(run):
    steps = []
    x = flow.solve(toy_velocity, torch.tensor(TRACES["x0"]), run["steps"], run["shift"], run["solver"],
                   callback=lambda i, x, x0: steps.append(x))
    torch.testing.assert_close(torch.stack(steps), torch.tensor(run["trace"]), rtol=0, atol=5e-6)
    assert torch.equal(x, steps[-1]) and x.dtype == torch.float32


TABLES = {tuple(k.rsplit("_", 2)): v for k, v in TRACES["schedule_tables"].items()}
TABLES |= {(r["solver"], r["steps"], r["shift"]): r for r in RUNS}


@pytest.mark.parametrize("key", TABLES, ids=str)
def test_schedules_are_bit_equal(key):
    solver, steps, shift = key
    sigmas, timesteps = flow.schedule(solver, int(steps), float(shift))
    np.testing.assert_array_equal(sigmas.numpy(), np.float32(TABLES[key]["sigmas"]))
    np.testing.assert_array_equal(timesteps.numpy(), np.float32(TABLES[key]["timesteps"]))


@pytest.mark.parametrize("solver", flow.SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_exact_velocity_leads_to_the_data(solver, steps):
    """v = noise - z is constant on the line, so even one step lands on z. With the sign
    turned it would run away."""
    torch.manual_seed(0)
    z, noise = torch.randn(2, 2, 3, 4, 4)
    sigmas, _ = flow.schedule(solver, steps, 5.0)
    start = flow.add_noise(z, noise, sigmas[0])          # UniPC begins just below sigma = 1
    x = flow.SOLVERS[solver](lambda x, t: noise - z, start, *flow.schedule(solver, steps, 5.0))
    torch.testing.assert_close(x, z, rtol=0, atol=2e-5)


def test_higher_order_pays():
    """If the data are Gaussian, N(m, d^2), the perfect network and result are known:
    noise e becomes m + d e. With 20 network calls each, the second-order solvers come
    several times closer than Euler."""
    m, d = 0.5, 0.3

    def velocity(x, t):                                   # the mean of noise - z, given x
        s = t / 1000
        r = (x - (1 - s) * m) / ((1 - s) ** 2 * d ** 2 + s ** 2)
        return s * r - (m + (1 - s) * d ** 2 * r)
    noise = torch.linspace(-2, 2, 12)
    exact = m + d * noise
    error = {s: (flow.solve(velocity, noise, 20, 1.0, s) - exact).abs().max() for s in ("euler", "dpm++", "unipc")}
    assert error["euler"] < 0.06 and error["dpm++"] < 0.007 and error["unipc"] < 0.006


def test_velocity_sees_the_time_as_one_number_on_the_devices_scale():
    seen = []
    flow.solve(lambda x, t: (seen.append(t), x)[1], torch.zeros(2, 3), 4, 5.0, "unipc")
    assert all(t.dim() == 0 and t.dtype == torch.float32 for t in seen)
    assert [t.item() for t in seen] == [999.0, 937.0, 833.0, 624.0]


def test_batch_of_two_is_two_batches_of_one():
    noise = torch.randn(2, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    both = flow.solve(toy_velocity, noise, 8, 5.0)
    assert torch.equal(both, torch.cat([flow.solve(toy_velocity, n[None], 8, 5.0) for n in noise]))


def test_half_precision_network_is_solved_in_fp32():
    x = flow.solve(lambda x, t: toy_velocity(x, t).bfloat16(), torch.zeros(3, dtype=torch.bfloat16), 4, 5.0)
    assert x.dtype == torch.float32


@pytest.mark.parametrize("solver, steps, shift, says", [
    ("heun", 10, 5.0, "unipc"), ("unipc", 0, 5.0, "--steps"), ("euler", -3, 5.0, "--steps"),
    ("euler", 2.5, 5.0, "--steps"), ("euler", 10, 0.0, "--shift")])
def test_impossible_requests_are_one_sentence(solver, steps, shift, says):
    with pytest.raises(UserError, match=says):
        flow.solve(toy_velocity, torch.zeros(3), steps, shift, solver)


# ------------------------------------------------ training

def test_line_and_target():
    z, noise = torch.randn(2, 3, 4, 2, 2, 2)
    assert torch.equal(flow.add_noise(z, noise, 0), z) and torch.equal(flow.add_noise(z, noise, 1), noise)
    sigma = torch.tensor([0.1, 0.5, 0.9])
    x = flow.add_noise(z, noise, sigma)
    torch.testing.assert_close(x[1], (z[1] + noise[1]) / 2)
    torch.testing.assert_close(x - sigma.view(3, 1, 1, 1, 1) * flow.velocity_target(z, noise), z)     # x0 = x - sigma v


@pytest.mark.parametrize("shift, smallest, share, mean, weights, mean_weight, bins", [
    (8, 0.140, 0.196, 0.509, (0, 2.47, 1.04), 1.64, (.125, .211, .312, .260, .093)),
    (5, 0.093, 0.133, 0.504, (0, 2.08, 0.59), 1.34, (.117, .213, .330, .251, .090))])
def test_released_time_sampling_is_what_it_is(shift, smallest, share, mean, weights, mean_weight, bins):
    """The numbers of the released sampling, by enumerating all 1000 integer times
    instead of drawing them."""
    grid, w = flow.released_grid(shift)
    assert len(grid) == 50 and grid[0] == 1
    np.testing.assert_allclose((w[0], w.max(), w[-1]), weights, atol=0.005)
    np.testing.assert_allclose(w.mean(), 1)
    k = (1000 * grid[None] - torch.arange(1000)[:, None]).abs().argmin(1)
    sigma, weight = grid[k], w[k]
    close = dict(rtol=0, atol=5.01e-4)
    np.testing.assert_allclose(sigma.min(), smallest, **close)
    np.testing.assert_allclose((sigma == sigma.min()).double().mean(), share, **close)
    np.testing.assert_allclose(sigma.mean(), mean, **close)
    np.testing.assert_allclose(weight.mean(), mean_weight, atol=0.005)
    got = [weight[(sigma >= i / 5) & ((sigma < (i + 1) / 5) | (i == 4))].sum() / weight.sum() for i in range(5)]
    np.testing.assert_allclose(got, bins, **close)


def test_released_samples_lie_on_the_grid_and_t_is_the_integer():
    sigma, t, weight = flow.sample_times(5000, Times("released", 8.0), torch.Generator().manual_seed(0))
    grid, w = flow.released_grid(8.0)
    k = (1000 * grid[None] - t[:, None]).abs().argmin(1)
    assert torch.equal(sigma, grid[k].float()) and torch.equal(weight, w[k].float())
    assert torch.equal(t, t.round()) and 0 <= t.min() and t.max() <= 999
    assert abs((sigma == grid[-1].float()).float().mean() - 0.196) < 0.02
    assert (t / 1000 - sigma).abs().max() > 0.13           # at low noise the network is told one thing and sees another


@pytest.mark.parametrize("shift, mean", [(8.0, 0.80), (5.0, 0.75)])
def test_shifted_samples_tell_the_network_what_it_sees(shift, mean):
    sigma, t, weight = flow.sample_times(20000, Times("shifted", shift), torch.Generator().manual_seed(0))
    torch.testing.assert_close(t, 1000 * sigma)
    assert (weight == 1).all() and abs(sigma.mean() - mean) < 0.01


@pytest.mark.parametrize("mode", ["released", "shifted"])
def test_times_of_one_expert_are_those_of_all_within_its_range(mode):
    """Same distribution as throwing away what lies outside; the weights go with their
    times."""
    sigma, t, weight = flow.sample_times(40_000, Times(mode), torch.Generator().manual_seed(0))
    keep = (t >= 300) & (t < 875)
    inside = Times(mode, low=0.3, high=0.875)
    mine = flow.sample_times(40_000, inside, torch.Generator().manual_seed(0))
    assert mine[1].min() >= 300 and mine[1].max() < 875 and len(mine[1]) == 40_000
    for a, b in zip((sigma, t, weight), mine):
        assert b[keep].equal(a[keep]) and b.mean().item() == pytest.approx(a[keep].mean().item(), rel=0.01)


def test_unknown_time_sampling_is_refused():
    with pytest.raises(UserError, match="released"):
        flow.sample_times(1, Times("logit-normal"))


def test_a_sample_depends_on_seed_step_and_position_only():
    """So it does not matter how a batch is divided; each sample has its own time and
    noise."""
    draw = lambda *where: flow.draw((3, 2, 2, 2), Times("shifted", 8.0), *where)
    whole, parts = draw(1, 7, range(4)), [draw(1, 7, range(2)), draw(1, 7, range(2, 4))]
    assert all(torch.equal(a, torch.cat(b)) for a, *b in zip(whole, *parts))
    assert len(set(whole.sigma.tolist())) == 4 and whole.noise.shape == (4, 3, 2, 2, 2)
    for other in (draw(2, 7, range(4)), draw(1, 8, range(4))):
        assert not torch.equal(other.sigma, whole.sigma)
        assert not torch.equal(other.noise, whole.noise)


@pytest.mark.core
@pytest.mark.parametrize("mode", ["shifted", "released"])
def test_loss(mode):
    """Zero for the true velocity; for a network that answers zero, the weighted mean
    square of (noise - z)."""
    z = torch.randn(4, 3, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    drawn = flow.draw(z.shape[1:], Times(mode, 8.0), 2, 0, range(4))

    def perfect(x, t):  # solves x = (1 - sigma) z + sigma noise for noise
        assert torch.equal(t, drawn.t)
        return (x - z) / drawn.sigma.view(4, 1, 1, 1, 1)

    value, mse = flow.loss(perfect, z, drawn)
    assert value < 1e-10 and mse.shape == (4,)
    value, mse = flow.loss(lambda x, t: torch.zeros_like(x), z, drawn)
    torch.testing.assert_close(mse, (drawn.noise - z).pow(2).mean((1, 2, 3, 4)))
    torch.testing.assert_close(value, (drawn.weight * mse).mean())


def test_loss_has_a_gradient_and_bf16_networks_are_compared_in_fp32():
    scale, z = torch.ones((), requires_grad=True), torch.randn(3, 2, 1, 2, 2)
    drawn = flow.draw(z.shape[1:], Times(), 0, 0, range(3))
    value, mse = flow.loss(lambda x, t: (scale * x).bfloat16(), z, drawn)
    value.backward()
    assert value.dtype == torch.float32 and scale.grad is not None and not mse.requires_grad


# ------------------------------------------------ complete guided loops of the published pipelines

def guided(net, context, null, scale):
    """Classifier-free guidance by definition, two passes."""
    def velocity(x, t):
        v_text, v_null = net(x, t, context).float(), net(x, t, null).float()
        return v_null + scale * (v_text - v_null)

    return velocity


def tiny_transformer(case):
    prefix = f"{case}/weights/"
    weights = load_file(golden("wan_dit_tiny.safetensors")).items()
    return dit.from_state_dict({k.removeprefix(prefix): v for k, v in weights if k.startswith(prefix)}, heads=2)


@pytest.fixture(scope="module")
def pipeline():
    data = load_file(golden("wan_pipeline_tiny.safetensors"))
    data["text"], data["null"] = data["in/prompt_embeds"][None], data["in/negative_prompt_embeds"][None]
    return data


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_text_to_video_loop(pipeline, solver):
    net = tiny_transformer("t2v")
    velocity = guided(net, pipeline["text"], pipeline["null"], 3.0)
    x = flow.solve(velocity, pipeline["t2v/noise"][None], 6, 5.0, solver)
    torch.testing.assert_close(x[0], pipeline[f"t2v/latents_{solver}"], rtol=0, atol=2e-4)


def test_dc_videogen_image_to_video_loop(pipeline):
    """The condition (mask and image latent) joins the channels at every step; the
    solver never touches it."""
    net = tiny_transformer("dc_i2v")
    condition, clip = pipeline["dc_i2v/condition"], pipeline["dc_i2v/clip_fea"]

    def conditioned(x, t, context):
        return net(torch.cat([x, condition], dim=1), t, context, clip)
    velocity = guided(conditioned, pipeline["text"], pipeline["null"], 3.0)
    x = flow.solve(velocity, pipeline["dc_i2v/noise"], 6, 5.0, "unipc_diffusers")
    torch.testing.assert_close(x, pipeline["dc_i2v/latents_unipc_diffusers"], rtol=0, atol=2e-4)
