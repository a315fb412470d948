"""Flow matching: the objective the transformer is trained with and the solvers that sample from it.

A clip's latent z and white noise e of its shape are joined by a straight line; sigma in [0, 1] says how far along:

    x = (1 - sigma) z + sigma e          v = dx / dsigma = e - z

The network learns v from x and sigma (told to it as t, on a scale of 0..1000). Sampling starts from pure noise at
sigma = 1 and integrates dx = v dsigma down to sigma = 0. The training loss (paper: section on AE-Adapt-V) is

    L = mean over the batch of  w(sigma) * mean((net(x, t) - v)^2)

Training and sampling both bend u in [0, 1] towards high noise by one map, the *shift* S, because in a large clip more
noise is needed before the coarse structure disappears:

    shift(u) = S u / (1 + (S - 1) u)         S = 5 to sample at 720p; DC-VideoGen trains text-to-video with S = 8

At any point the network also gives an estimate of the clean latent, x0 = x - sigma v. Every solver here makes the same
step from noise level s to t, straight towards such an estimate, and they differ only in how good it is:

    x_t = x0 + (t/s) (x_s - x0)

    Euler       x0 as found at s; the step is then x_s + (t - s) v
    DPM++       x0 extrapolated to the middle of the step, from this one and the last
    UniPC       the same, and afterwards each step is redone with the x0 found at its end

The extrapolation is linear in lambda = log((1 - sigma) / sigma), half the log signal-to-noise ratio, because along it
x0 changes more evenly than along sigma. Noise and solver state are fp32, the scalar coefficients are float64.
"""
import math

import numpy as np
import torch

from files.checkpoint import UserError

# ------------------------------------------------------------------------- The straight line and the training objective


def add_noise(z, noise, sigma):
    """x = (1 - sigma) z + sigma noise, in fp32. `sigma`: one value per sample [B], or a number."""
    sigma = _per_sample(sigma, z)
    return (1 - sigma) * z.float() + sigma * noise.float()


def velocity_target(z, noise):
    """What the network should answer: noise minus data, in fp32."""
    return noise.float() - z.float()


def shift_sigma(u, shift):
    """Bend u in [0, 1] towards 1 (more noise): S u / (1 + (S - 1) u). Works on numbers, arrays and tensors."""
    return shift * u / (1 + (shift - 1) * u)


def released_grid(shift, points=50):
    """The training grid of the released code: (sigmas, weights), float64, from sigma = 1 downwards.

    As many points as inference steps. The weights are a bell around t = 500, lowered so that sigma = 1 weighs nothing
    and scaled to mean 1 over the grid.
    """
    sigmas = shift_sigma(1 - torch.arange(points, dtype=torch.float64) / points, shift)
    bell = torch.exp(-2 * (sigmas - 0.5) ** 2)
    bell = bell - bell.min()
    return sigmas, bell * points / bell.sum()


def sample_times(batch, mode="shifted", shift=5.0, generator=None, device="cpu", inside=(0.0, 1.001)):
    """Draw the noise level of each training sample -> (sigma, t, weight), fp32, [batch].

    inside: the times low <= t / 1000 < high of an expert that works in these only. Others are drawn again.

    "released": what the released code does. An integer t is drawn uniformly from 0..999 and told to the network, but
        the noise is that of the nearest of 50 shifted grid points. So the shift hardly moves the distribution towards
        noise, it only makes the grid coarse at low noise: with S = 8 nothing below sigma = 0.14 is ever seen, and one
        draw in five lands on that value while the network is told anything from 0 up. For parity runs.
    "shifted": u uniform, sigma = shift(u), t = 1000 sigma, weight 1. What the network is told is what it sees.
    """
    where = generator.device if generator is not None else device
    if mode == "released":
        grid, weights = (g.to(where) for g in released_grid(shift))
        t = torch.randint(0, 1000, (batch,), generator=generator, device=where)
        k = (1000 * grid[None] - t[:, None]).abs().argmin(dim=1)
        sigma, weight = grid[k], weights[k]
    elif mode == "shifted":
        u = torch.rand(batch, generator=generator, device=where, dtype=torch.float64)
        sigma = shift_sigma(u, shift)
        t, weight = 1000 * sigma, torch.ones_like(sigma)
    else:
        raise UserError(f'time sampling "{mode}" is unknown: use "released" or "shifted".')
    outside = (t < 1000 * inside[0]) | (t >= 1000 * inside[1])
    if outside.any():
        again = sample_times(int(outside.sum()), mode, shift, generator, where, inside)
        sigma, t, weight = (a.to(b.dtype).masked_scatter(outside, b) for a, b in zip((sigma, t, weight), again))
    return tuple(a.to(device, torch.float32) for a in (sigma, t, weight))


def loss(velocity, z, mode="shifted", shift=5.0, generator=None):
    """One flow-matching training loss -> (loss, mse, sigma).

    velocity: called once as velocity(x, t), x shaped like `z` and t [B] in 0..1000. Conditions (text, image) are the
        caller's: `lambda x, t: net(x, t, context)`.
    z: clean latents, already multiplied by the scaling factor  # b c t h w
    loss is the scalar to differentiate; mse [B] (unweighted, detached) and sigma [B] are for logging by noise level
    (`by_sigma`). Everything but the network itself is fp32.
    """
    sigma, t, weight = sample_times(len(z), mode, shift, generator, z.device)
    where = generator.device if generator is not None else z.device
    noise = torch.randn(z.shape, generator=generator, device=where).to(z.device)
    error = velocity(add_noise(z, noise, sigma), t).float() - velocity_target(z, noise)
    mse = error.pow(2).flatten(1).mean(dim=1)
    return (weight * mse).mean(), mse.detach(), sigma


def by_sigma(mse, sigma, bins=5):
    """Mean loss in `bins` equal bins of sigma; nan where nothing was drawn. One mean over all sigma hides what is being
    learned: at high sigma layout and motion, at low sigma texture."""
    index = (sigma * bins).long().clamp(max=bins - 1)
    return [mse[index == i].mean().item() for i in range(bins)]


def guided(net, context, null, scale):
    """Classifier-free guidance (Ho & Salimans 2022) as a velocity function: v_null + scale (v_text - v_null).

    Trades variety for fit to the prompt. Two passes of `net(x, t, context)`; scale = 1 is the plain network, one pass.
    """
    if scale == 1:
        return lambda x, t: net(x, t, context)

    def velocity(x, t):
        v_text, v_null = net(x, t, context).float(), net(x, t, null).float()
        return v_null + scale * (v_text - v_null)
    return velocity


# ---------------------------------------------------------------------------- Schedules: which noise levels are visited


def schedule(solver, steps, shift):
    """Noise levels of a solver -> (sigmas [steps + 1], ending in 0; timesteps [steps], what the network is told), fp32.

    All are a straight line bent by the shift; they differ at its ends. That is enough to change a sample by about
    1e-3, so each base model wants the variant it was published with. UniPC and DPM++ truncate (not round) the time to
    an integer.
    """
    if solver not in SOLVERS:
        raise UserError(f'solver "{solver}" is unknown: use one of {", ".join(SOLVERS)}.')
    if steps < 1 or steps != int(steps):
        raise UserError(f"{steps} sampling steps are impossible: --steps must be a whole number, at least 1.")
    if not shift > 0:
        raise UserError(f"a shift of {shift} is impossible: --shift must be above 0.")
    steps = int(steps)
    if solver == "unipc":                      # as Wan: starts one training step below pure noise
        u = np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1]
    elif solver == "unipc_diffusers":          # as diffusers: from 1 towards 0.001, which itself is left out
        u = np.linspace(1, 0.001, steps + 1)[:-1]
    elif solver == "euler_diffusers":          # as diffusers: the end of the line is shifted too, and is kept
        u = np.linspace(1, float(shift_sigma(np.float32(0.001), np.float32(shift))), steps)
    else:                                      # euler, dpm++
        u = np.linspace(1, 0, steps + 1)[:-1]
    sigmas = shift_sigma(u, shift)
    if solver == "unipc_diffusers" and abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6                      # lambda(1) would be infinite
    timesteps = 1000 * sigmas                  # before the rounding to fp32: truncation as in the reference
    if solver == "euler_diffusers":
        timesteps = np.float32(1000) * sigmas.astype(np.float32)
    elif solver != "euler":
        timesteps = np.trunc(timesteps)
    return torch.from_numpy(np.append(sigmas, 0)).float(), torch.from_numpy(timesteps).float()


# --------------------------------------------------------------------- Solvers: one function each, all of one signature


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
    """DPM-Solver++(2M), the midpoint form with data prediction (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    Second order for free: the change of x0 since the last step stands in for its derivative. The first step, from
    sigma = 1, is infinitely long in lambda, so its change says nothing and the second step is of first order too.
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
    """UniPC of order 2, B(h) = exp(-h) - 1 ("bh2"), data prediction (Zhao et al. 2023, arXiv 2302.04867).

    A predictor like DPM-Solver++(2M), and a corrector that redoes the *last* step with the x0 found at its end. The
    network is not called again for the corrected sample, so a step still costs one call.
    """
    s = sigmas.tolist()
    steps = len(timesteps)
    history = []                             # x0 of the last two steps, newest last
    order, start = 0, None                   # of the last predictor: its order, and the sample it started from
    for i, t in enumerate(timesteps):
        x0 = x - s[i] * velocity(x, t).float()
        if i > 0:
            x = _unipc_correct(start, x0, history, s, i, order)
        history = [*history[-1:], x0]
        order = min(2, steps - i, i + 1)     # first and last step are of first order
        start = x
        data = x0
        if order == 2:
            data = _extrapolate(x0, history[0], s, i)
        x = _step(x, data, s[i], s[i + 1])
        if callback is not None:
            callback(i, x, x0)
    return x


def _unipc_correct(start, x0, history, s, i, order):
    """Redo the step sigma[i-1] -> sigma[i] from `start`, knowing x0 at both ends (and one earlier, for order 2)."""
    last = history[-1]
    if order == 1:
        return _step(start, last + 0.5 * (x0 - last), s[i - 1], s[i])
    h = _lambda(s[i]) - _lambda(s[i - 1])
    r = (_lambda(s[i - 2]) - _lambda(s[i - 1])) / h
    E = math.expm1(-h)
    g1 = E / -h - 1
    b1, b2 = g1 / E, 2 * (g1 / -h - 0.5) / E
    rho1 = (b1 - b2) / (1 - r)               # solves rho1 + rho2 = b1, r rho1 + rho2 = b2
    rho2 = b1 - rho1
    data = last + rho1 / r * (history[0] - last) + rho2 * (x0 - last)
    return _step(start, data, s[i - 1], s[i])


def _step(x, x0, s, t):
    """From noise level s to t along the line through x that ends in x0. Exact if x0 is; at t = 0 it is x0 itself."""
    return x0 + (t / s) * (x - x0)


def _extrapolate(x0, previous, s, i):
    """x0 half a step ahead of sigma[i], on the line through x0 there and `previous` at sigma[i-1], in lambda."""
    ratio = (_lambda(s[i + 1]) - _lambda(s[i])) / (_lambda(s[i]) - _lambda(s[i - 1]))
    return x0 + 0.5 * ratio * (x0 - previous)


def _lambda(sigma):
    return math.log1p(-sigma) - math.log(sigma)


SOLVERS = {"unipc": unipc, "unipc_diffusers": unipc, "dpm++": dpm_plus_plus, "euler": euler, "euler_diffusers": euler}


@torch.no_grad()
def solve(velocity, noise, steps, shift, solver="unipc", callback=None):
    """From noise (sigma = 1) to a clean latent, fp32.

    velocity(x, t): the network's answer; t is a 0-d fp32 tensor in 0..1000 (per sample: `t.expand(len(x))`)
    noise: standard normal, b c t h w; the solvers draw nothing themselves, so equal noise gives equal results
    callback(step, x, x0): after each step, with the new sample and the clean latent that the network expects
    """
    sigmas, timesteps = schedule(solver, steps, shift)
    return SOLVERS[solver](velocity, noise.float(), sigmas, timesteps.to(noise.device), callback)


def _per_sample(a, like):
    """[B] -> [B, 1, 1, ...] so that it broadcasts over the samples of `like`."""
    a = torch.as_tensor(a, dtype=torch.float32, device=like.device)
    return a.reshape(-1, *[1] * (like.dim() - 1)) if a.dim() else a
