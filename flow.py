"""Flow matching: the objective the transformer is trained with and the solvers that
sample from it.

A clip's latent z and white noise e of its shape are joined by a straight line; sigma in
[0, 1] says how far along:

    x = (1 - sigma) z + sigma e          v = dx / dsigma = e - z

The network learns v from x and sigma (told to it as t, on a scale of 0..1000). Sampling
starts from pure noise at sigma = 1 and integrates dx = v dsigma down to sigma = 0. The
training loss (paper: section on AE-Adapt-V) is

    L = mean over the batch of  w(sigma) * mean((net(x, t) - v)^2)

Training and sampling both bend u in [0, 1] towards high noise by one map, the *shift*
S, because in a large clip more noise is needed before the coarse structure disappears:

    shift(u) = S u / (1 + (S - 1) u)      5 to sample at 720p; 8 to train text-to-video

At any point the network also gives an estimate of the clean latent, x0 = x - sigma v.
Every solver here makes the same step from noise level s to t, straight towards such an
estimate, x_t = x0 + (t/s) (x_s - x0), and they differ only in how good it is:

    Euler       x0 as found at s; the step is then x_s + (t - s) v
    DPM++       x0 extrapolated to the middle of the step, from this one and the last
    UniPC       the same; then each step is redone with the x0 found at its end
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from files.checkpoint import UserError

# ------------------------------------------------ the line and the objective


def add_noise(z, noise, sigma):
    """x = (1 - sigma) z + sigma noise, in fp32. sigma: one per sample [b], or a
    number."""
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=z.device)
    if sigma.dim():
        sigma = sigma.reshape(-1, *[1] * (z.dim() - 1))  # b 1 1 1 1
    return (1 - sigma) * z.float() + sigma * noise.float()


def velocity_target(z, noise):
    """What the network should answer: noise minus data, in fp32."""
    return noise.float() - z.float()


class Draw(NamedTuple):
    """What is random in training samples; the first axis is the batch."""

    sigma: torch.Tensor  # [b] noise level
    t: torch.Tensor  # [b] what the network is told of it
    weight: torch.Tensor  # [b] w(sigma) of the loss
    noise: torch.Tensor  # [b, c, t, h, w]


def draw(shape, times, seed, step, positions):
    """Times and noise of the samples at these positions of a step's batch -> Draw on
    the CPU.

    Each sample depends on (seed, step, its position) alone, so it does not matter how a
    batch is divided among processes, and a resumed run goes on with the same ones.
    """
    rows = []
    for position in positions:
        state = np.random.SeedSequence((seed, step, position)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> 1))
        level = sample_times(1, times, generator)
        rows.append((*level, torch.randn(1, *shape, generator=generator)))
    return Draw(*map(torch.cat, zip(*rows)))


def loss(velocity, z, drawn):
    """The training loss -> (scalar to differentiate, mse [b] per sample, unweighted,
    detached).

    velocity(x, t): called once; x like z, t [b] in 0..1000. Prompt and image are the
        caller's (`align.velocity_of`). It may answer from another device.
    z: clean latents, already multiplied by the scaling factor  # b c t h w
    drawn: of `draw`. Everything but the network itself is fp32.
    """
    v = velocity(add_noise(z, drawn.noise, drawn.sigma), drawn.t).float()
    error = v - velocity_target(z, drawn.noise).to(v.device)
    mse = error.square().flatten(1).mean(1)
    return (drawn.weight.to(v.device) * mse).mean(), mse.detach()


# ------------------------------------------------ which times training sees


@dataclass(frozen=True)
class Times:
    """How the noise levels of training are drawn (`sample_times`)."""

    mode: str = "shifted"  # or "released"
    shift: float = 5.0
    low: float = 0.0  # only times low <= t / 1000 < high, those of an expert
    high: float = 1.001  # a time of 1000 is drawn now and then


def shift_sigma(u, shift):
    """Bend u in [0, 1] towards 1 (more noise). Works on numbers, arrays and tensors."""
    return shift * u / (1 + (shift - 1) * u)


def released_grid(shift, points=50):
    """The training grid of the released code: (sigmas, weights), float64, from sigma =
    1 down.

    As many points as inference steps. The weights are a bell around t = 500, lowered so
    that sigma = 1 weighs nothing and scaled to mean 1 over the grid.
    """
    sigmas = shift_sigma(1 - torch.arange(points, dtype=torch.float64) / points, shift)
    bell = torch.exp(-2 * (sigmas - 0.5) ** 2)
    bell = bell - bell.min()
    return sigmas, bell * points / bell.sum()


def sample_times(n, times, generator=None):
    """Draw the noise levels of n training samples -> (sigma, t, weight), fp32, [n].

    "released": what the released code does. An integer t is drawn uniformly from 0..999
        and told to the network, but the noise is that of the nearest of 50 shifted grid
        points. So the shift hardly moves the distribution towards noise, it only makes
        the grid coarse at low noise: with S = 8 nothing below sigma = 0.14 is ever
        seen, and one draw in five lands on that value while the network is told
        anything from 0 up. For parity runs.
    "shifted": u uniform, sigma = shift(u), t = 1000 sigma, weight 1. What the network
        is told is what it sees.
    """
    if times.mode == "released":
        grid, weights = released_grid(times.shift)
        t = torch.randint(0, 1000, (n,), generator=generator)
        nearest = (1000 * grid[None] - t[:, None]).abs().argmin(dim=1)
        sigma, weight = grid[nearest], weights[nearest]
    elif times.mode == "shifted":
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        sigma = shift_sigma(u, times.shift)
        t, weight = 1000 * sigma, torch.ones_like(sigma)
    else:
        raise UserError(
            f'time sampling "{times.mode}" is unknown: use "released" or "shifted".')
    found = [a.float() for a in (sigma, t, weight)]
    outside = (t < 1000 * times.low) | (t >= 1000 * times.high)
    if outside.any():
        again = sample_times(int(outside.sum()), times, generator)
        found = [a.masked_scatter(outside, b) for a, b in zip(found, again)]
    return tuple(found)


# ------------------------------------------------ schedules: noise levels visited


def schedule(solver, steps, shift):
    """Noise levels of a solver -> (sigmas [steps + 1], ending in 0; timesteps [steps],
    what the network is told), fp32.

    All are a straight line bent by the shift; they differ at its ends. That is enough
    to change a sample by about 1e-3, so each base model wants the variant it was
    published with. UniPC and DPM++ truncate (not round) the time to an integer.
    "unipc_karras" is no line: its noise levels are those of Cosmos-Predict 2.5.
    """
    if solver not in SOLVERS:
        raise UserError(f'solver "{solver}" is unknown: use one of {", ".join(SOLVERS)}.')
    if steps < 1 or steps != int(steps):
        raise UserError(f"{steps} sampling steps are impossible: --steps must be a whole number, "
                        "at least 1.")
    if not shift > 0:
        raise UserError(f"a shift of {shift} is impossible: --shift must be above 0.")
    start, end = 1.0, 0.0  # the end itself is left out
    if solver == "unipc":  # as Wan: starts one training step below pure noise
        start = float(np.float32(0.999))
    if solver == "unipc_diffusers":
        end = 0.001
    u = np.linspace(start, end, int(steps) + 1)[:-1]
    if solver == "euler_diffusers":  # the end is kept, and shifted twice
        u = np.linspace(1, float(shift_sigma(np.float32(0.001), np.float32(shift))), int(steps))
    if solver == "unipc_karras":  # noise over data from 200 to 0.01 in equal steps of its 7th root
        ratio = np.linspace(200 ** (1 / 7), 0.01 ** (1 / 7), int(steps)) ** 7
        u = ratio / (1 + ratio)
    sigmas = shift_sigma(u, shift)
    if solver == "unipc_diffusers" and abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6  # lambda(1) would be infinite
    timesteps = 1000 * sigmas  # before the rounding to fp32: truncation as in the reference
    if solver == "euler_diffusers":
        timesteps = np.float32(1000) * sigmas.astype(np.float32)
    elif solver in ("unipc", "unipc_diffusers", "dpm++"):
        timesteps = np.trunc(timesteps)
    return torch.from_numpy(np.append(sigmas, 0)).float(), torch.from_numpy(timesteps).float()


# ------------------------------------------------ solvers, all of one signature
#
# x0 is extrapolated along lambda = log((1 - sigma) / sigma), half the log signal-to-noise
# ratio, because along it x0 changes more evenly than along sigma. Noise and solver state
# are fp32, the scalar coefficients are float64.


def euler(velocity, x, sigmas, timesteps, callback=None):
    """First order, in the plainest form: follow the velocity."""
    s = sigmas.tolist()
    for i, t in enumerate(timesteps):
        v = velocity(x, t).float()
        x0 = x - s[i] * v
        x = x + (s[i + 1] - s[i]) * v
        if callback is not None:
            callback(i, x, x0)
    return x


def dpm_plus_plus(velocity, x, sigmas, timesteps, callback=None):
    """DPM-Solver++(2M), the midpoint form with data prediction (Lu et al. 2022, arXiv
    2211.01095, algorithm 2).

    Second order for free: the change of x0 since the last step stands in for its
    derivative. The first step, from sigma = 1, is infinitely long in lambda, so its
    change says nothing and the second step is of first order too.
    """
    s = sigmas.tolist()
    previous = None
    for i, t in enumerate(timesteps):
        x0 = x - s[i] * velocity(x, t).float()
        data = x0
        if previous is not None and s[i + 1] > 0 and s[i - 1] < 1:
            data = _extrapolate(x0, previous, s, i)
        x = _step(x, data, s[i], s[i + 1])
        previous = x0
        if callback is not None:
            callback(i, x, x0)
    return x


def unipc(velocity, x, sigmas, timesteps, callback=None):
    """UniPC of order 2, B(h) = exp(-h) - 1 ("bh2"), data prediction (Zhao et al. 2023,
    arXiv 2302.04867).

    A predictor like DPM-Solver++(2M), and a corrector that redoes the *last* step with
    the x0 found at its end. The network is not called again for the corrected sample,
    so a step still costs one call.
    """
    s = sigmas.tolist()
    steps = len(timesteps)
    history = []  # x0 of the last two steps, newest last
    order, start = 0, None  # of the last predictor: its order, and the sample it started from
    for i, t in enumerate(timesteps):
        x0 = x - s[i] * velocity(x, t).float()
        if i > 0:
            x = _unipc_correct(start, x0, history, s, i, order)
        history = [*history[-1:], x0]
        order = min(2, steps - i, i + 1)  # first and last step are of first order
        start = x
        data = x0
        if order == 2:
            data = _extrapolate(x0, history[0], s, i)
        x = _step(x, data, s[i], s[i + 1])
        if callback is not None:
            callback(i, x, x0)
    return x


def _unipc_correct(start, x0, history, s, i, order):
    """Redo the step sigma[i-1] -> sigma[i] from `start`, knowing x0 at both ends (and
    one earlier, for order 2)."""
    last = history[-1]
    if order == 1:
        return _step(start, last + 0.5 * (x0 - last), s[i - 1], s[i])
    h = _lambda(s[i]) - _lambda(s[i - 1])
    r = (_lambda(s[i - 2]) - _lambda(s[i - 1])) / h
    E = math.expm1(-h)
    g1 = E / -h - 1
    b1, b2 = g1 / E, 2 * (g1 / -h - 0.5) / E
    rho1 = (b1 - b2) / (1 - r)  # solves rho1 + rho2 = b1, r rho1 + rho2 = b2
    rho2 = b1 - rho1
    data = last + rho1 / r * (history[0] - last) + rho2 * (x0 - last)
    return _step(start, data, s[i - 1], s[i])


def _step(x, x0, s, t):
    """From noise level s to t along the line through x that ends in x0. Exact if x0 is;
    at t = 0 it is x0 itself."""
    return x0 + (t / s) * (x - x0)


def _extrapolate(x0, previous, s, i):
    """x0 half a step ahead of sigma[i], on the line through x0 there and `previous` at
    sigma[i-1], in lambda."""
    ratio = (_lambda(s[i + 1]) - _lambda(s[i])) / (_lambda(s[i]) - _lambda(s[i - 1]))
    return x0 + 0.5 * ratio * (x0 - previous)


def _lambda(sigma):
    return math.log1p(-sigma) - math.log(sigma)


SOLVERS = {"unipc": unipc, "unipc_diffusers": unipc, "unipc_karras": unipc,
           "dpm++": dpm_plus_plus, "euler": euler, "euler_diffusers": euler}


@torch.no_grad()
def solve(velocity, noise, steps, shift, solver="unipc", callback=None):
    """From noise (sigma = 1) to a clean latent, fp32.

    velocity(x, t): the network's answer; t is a 0-d fp32 tensor in 0..1000 (per sample:
        `t.expand(len(x))`)
    noise: standard normal, b c t h w; the solvers draw nothing themselves, so equal
        noise gives equal results
    callback(step, x, x0): after each step, with the new sample and the clean latent
        that the network expects
    """
    sigmas, timesteps = schedule(solver, steps, shift)
    follow = SOLVERS[solver]
    return follow(velocity, noise.float(), sigmas, timesteps.to(noise.device), callback)
