"""Alignment: fit the two ends of a transformer to a new latent space before anything is
trained end to end (paper, section on AE-Adapt-V).

**The embedder.** The new patch embedder E_S (weight W_S, bias b_S) must give the blocks
what they know: the embeddings y of the base's own embedder E_T (W_T, b_T), averaged
over the s x s base tokens that one deep token covers. With u a deep patch and x the
mean of the base patches (embedding and averaging are both linear, so patches may be
averaged first):

    y = W_T x + b_T         L = mean | y - W_S u - b_S |^2      over all tokens

Published are 20,000 steps of stochastic gradient descent, by AdamW (`sgd`). But that is
a linear regression, and it needs nothing of the data but means and second moments
(`Moments`, summed clip by clip in fp64):

    W_S = (S_yu + l W_0) (S_uu + l I)^-1    b_S = mean(y) - W_S mean(u)    S: covariances

The ridge l must not be left out (the four mask channels of an image condition are
equal, so S_uu is singular). It shrinks towards W_0: zero, or the initialisation, which
keeps latent directions of low variance open. The transformer will need them, because
noise fills every direction alike and clean latents do not show it. `noised` asks for
noise instead.

**The head** (`solve_head`): the loss of stage 1b over the head alone is a linear
regression of the velocity on the features that enter it.

A low MSE proves nothing. So: `r_squared` (1: the base's embeddings; 0: their mean),
`norm_ratio` (does noise arrive as loudly?), and more in `training/journal.py`.
"""
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import nn
from tqdm import tqdm

import flow
from files.checkpoint import UserError

# ------------------------------------------------ pairs of tokens


@dataclass(frozen=True)
class Tokens:
    """What a token holds in both spaces, the base's first."""

    patches: tuple  # (t, h, w) of a patch, twice
    latent: tuple  # how many of a patch's leading entries are latent, and so get noise
    s: int = 1  # base tokens per deep token and axis of space

    @classmethod
    def of(cls, configs, pair):
        """From the configs of both transformers and the inputs of one clip in both
        spaces."""
        patches = tuple(c.patch for c in configs)
        rows = [x.shape[-2] // patch[1] for x, patch in zip(pair, patches)]
        latent = tuple(c.out_channels * prod(c.patch) for c in configs)
        return cls(patches, latent, rows[0] // rows[1])


def tokens_of(x, patch):
    """[b, c, f, h, w] -> the flattened patches [b, f', h', w', c * prod(patch)] that a
    patch embedder multiplies."""
    pt, ph, pw = patch
    return rearrange(x, "b c (f p) (h q) (w r) -> b f h w (c p q r)", p=pt, q=ph, r=pw)


def pool(tokens, grid):
    """Average tokens [b, f, h, w, c] over the cells of a coarser grid (f', h', w').

    Space must divide by one common integer s; in time the longer clip may be an integer
    multiple. UserError otherwise.
    """
    f, h, w = tokens.shape[1:4]
    whole = f % grid[0] == h % grid[1] == w % grid[2] == 0
    if not whole or h // grid[1] != w // grid[2]:
        raise UserError(f"the base token grid {f}x{h}x{w} is no integer multiple of the deep one "
                        f"{'x'.join(map(str, grid))}: use sizes of the same bucket for both "
                        "autoencoders.")
    cells = dict(f=grid[0], h=grid[1], w=grid[2])
    return reduce(tokens, "b (f p) (h q) (w r) c -> b f h w c", "mean", **cells)


def pair_tokens(teacher, student, patches):
    """Clean inputs of the same clips, [b, c, t, h, w] in each space -> (x [n, c_T p_T],
    u [n, c_S p_S]), one row per pair: base patches averaged over a deep token.

    Where one clip has an integer multiple of the other's latent frames, its tokens are
    averaged in time.
    """
    x = tokens_of(teacher, patches[0])
    u = tokens_of(student, patches[1])
    if u.shape[1] > x.shape[1]:
        u = pool(u, (x.shape[1], *u.shape[2:4]))
    return pool(x, u.shape[1:4]).flatten(0, 3), u.flatten(0, 3)


@dataclass
class Moments:
    """First and second moments of token pairs, fp64: the sums from which every closed
    form here follows. Thousands of clips stream through; moments of different clips add
    up (`a + b`), so processes may share the work."""

    n: int | float = 0
    x: torch.Tensor | float = 0.0  # [c_T p_T] sum of the base patches
    u: torch.Tensor | float = 0.0  # [c_S p_S] sum of the deep patches
    xx: torch.Tensor | float = 0.0  # sums of the outer products: x x', x u', u u'
    xu: torch.Tensor | float = 0.0
    uu: torch.Tensor | float = 0.0

    @classmethod
    def of(cls, pairs, patches):
        """Of an iterable of (teacher input, student input), each [c, t, h, w] or
        batched."""
        total = cls()
        for pair in pairs:
            batched = [a.double() if a.dim() == 5 else a[None].double() for a in pair]
            total = total.add(*pair_tokens(*batched, patches))
        return total

    def add(self, x, u):
        """With more pairs of tokens, x [n, c_T p_T] and u [n, c_S p_S] -> Moments."""
        x = x.double()
        u = u.double()
        return self + Moments(len(x), x.sum(0), u.sum(0), x.T @ x, x.T @ u, u.T @ u)

    def __add__(self, other):
        mine, theirs = vars(self).values(), vars(other).values()
        return Moments(*map(operator.add, mine, theirs))

    def centred(self, intercept=True):
        """(mean x, mean u, S_xx, S_xu, S_uu): means and covariances. Without an intercept
        nothing is subtracted: the means count as zero."""
        if not self.n:
            raise UserError("there are no clips to align with: give at least one clip that has "
                            "latents in both spaces.")
        x = self.x / self.n * intercept
        u = self.u / self.n * intercept
        cov_xx = self.xx / self.n - x.outer(x)
        cov_xu = self.xu / self.n - x.outer(u)
        cov_uu = self.uu / self.n - u.outer(u)
        return x, u, cov_xx, cov_xu, cov_uu


def matrix(embedder):
    """(weight [d, c * prod(patch)], bias [d] or None) of a patch embedder, fp64 on the
    CPU."""
    return flat(embedder.weight), flat(embedder.bias)


def flat(p):
    """A parameter as a matrix, or a vector: fp64, on the CPU. None stays None."""
    if p is None:
        return None
    p = p.detach().cpu().double()
    return p.flatten(1) if p.dim() > 1 else p


# ------------------------------------------------ stage 1a: the patch embedder


@dataclass
class Problem:
    """Stage 1a: which embedder is to imitate which, on which clips."""

    teacher: nn.Module  # the base's patch embedder
    start: tuple  # (weight, bias) of the fresh one; the bias None where the base has none
    pair: Callable  # i -> clip i in both spaces, clean inputs [c, t, h, w]
    clips: int
    tokens: Tokens
    times: flow.Times  # of the training that follows, for `solve_noised`

    @cached_property
    def moments(self):
        bar = tqdm(range(self.clips), "read pairs", unit="clip", leave=False)
        return Moments.of(map(self.pair, bar), self.tokens.patches)


CLOSED_FORMS = ("random", "closed_form", "ridge_to_init", "noise_aware")


def fit(method, problem):
    """Stage 1a without SGD -> (weight [d, c_S p_S], bias [d]), fp32. Where the base's
    embedder has no bias there is none here either, and the bias is None."""
    p = problem
    if method == "random":
        return p.start
    if method == "closed_form":
        return solve_embedding(p.moments, p.teacher)
    if method == "ridge_to_init":
        return solve_embedding(p.moments, p.teacher, 3e-2, p.start[0])
    if method == "noise_aware":
        return solve_noised(p.moments, p.teacher, p.tokens, p.times)
    raise UserError(f'"{method}" is no way to align: use sgd, {", ".join(CLOSED_FORMS)}.')


def sgd(problem, begin, batch=4, lr=2e-4, seed=0):
    """Stage 1a as published: minimise L over batches of random clips by AdamW, betas (0.9,
    0.9), constant rate, pooling and loss in fp32 -> (weight, bias), fp32.

    begin(nets, optimisers) -> the training.loop.Run that carries the steps: how many
    there are, how they survive an interruption and are divided among processes is its
    business.
    """
    device = problem.start[0].device
    weight, bias = map(flat, problem.start)
    net = nn.Linear(*reversed(weight.shape), bias=bias is not None, device=device)
    own = dict(weight=weight, bias=bias)
    net.load_state_dict({k: v for k, v in own.items() if v is not None})
    W, b = (p if p is None else p.float().to(device) for p in matrix(problem.teacher))
    opt = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.9), weight_decay=0)
    run = begin({"net": net}, {"net": opt})

    def pairs(step, position):
        clip = int(np.random.default_rng((seed, step, position)).integers(problem.clips))
        pair = [a[None].float() for a in problem.pair(clip)]
        return pair_tokens(*pair, problem.tokens.patches)

    def batches(number):
        while True:
            step, positions = run.positions(number, batch)
            sides = zip(*(pairs(step, position) for position in positions))
            yield [torch.cat(side).to(device) for side in sides]
            number += 1

    def losses(batch, number):
        x, u = batch
        loss = F.mse_loss(net(u), F.linear(x, W, b))
        yield "net", loss, {"loss": loss.detach()}

    run.fit(batches(run.number), losses, what="align embedder by SGD")
    return net.weight.detach().cpu(), None if bias is None else net.bias.detach().cpu()


def solve_embedding(moments, teacher, ridge=1e-5, init=None):
    """Closed form of stage 1a -> (weight [d, c_S p_S], bias [d]), fp32.

    teacher: the base's embedder. The ridge is a multiple of the mean variance of u;
    init [d, c_S p_S] (or in the embedder's shape) is what it shrinks towards.
    """
    weight, bias = matrix(teacher)
    mean_x, mean_u, _, cov_xu, cov_uu = moments.centred(bias is not None)
    cov_yu = weight @ cov_xu
    l = ridge * cov_uu.diagonal().mean()
    start = 0.0 if init is None else flat(init)
    regular = cov_uu + l * torch.eye(len(cov_uu), dtype=torch.float64)
    solved = torch.linalg.solve(regular, (cov_yu + l * start).T).T
    if bias is None:
        return solved.float(), None
    offset = weight @ mean_x + bias - solved @ mean_u
    return solved.float(), offset.float()


# ------------------------------------------------ with noise
#
# The embedder sees noised latents, and what it makes of noise should be what the base
# makes of noise:
#
#     u' = (1 - sigma) u + sigma e       x' = (1 - sigma) x + sigma C e,       e ~ N(0, I)
#
# The base's noise must be a function of the student's: were the two independent, noise
# would only be an error in u, which regression answers by closing the noisy directions. It
# is C e, where base patches hold more numbers than deep ones plus what e cannot determine,
# which is independent and changes nothing. The mean of s^2 white base patches has variance
# 1 / s^2, so C may be any map with singular values up to 1 / s; of those, the one under
# which the base's answer to noise, W_T C, is closest to its answer to data, S_yu
# (orthogonal Procrustes: 1/s times the polar factor of W_T' S_yu). For a text-to-video
# embedder, and but for the means, fitting noised pairs is then
#
#     W_S = (S_yu + l W_T C) (S_uu + l I)^-1      l = E[sigma^2] / E[(1 - sigma)^2]
#
# the ridge again, towards an initialisation that is not random and with a strength that is
# not guessed: for shifted times l is the shift S itself. At the noise levels of training
# most of what the embedder sees is noise, which is why this pays: on the toy it lowers the
# loss after stage 1b and at the end (option b of `experiments/`).


def solve_noised(moments, teacher, tokens, times, ridge=1e-5):
    """Noise-aware closed form of stage 1a -> (weight, bias): the regression on pairs
    with coupled noise at the training's noise levels."""
    lift = coupling(moments, teacher, tokens)
    return solve_embedding(noised(moments, lift, tokens, times), teacher, ridge)


def coupling(moments, teacher, tokens):
    """C [latent entries of a base patch, of a deep one]: how the base's pooled noise follows
    from the student's."""
    base, deep = tokens.latent
    weight, bias = matrix(teacher)
    cov_yu = weight @ moments.centred(bias is not None)[3][:, :deep]
    a, _, b = torch.linalg.svd(weight[:, :base].T @ cov_yu, full_matrices=False)
    return a @ b / tokens.s


def noised(moments, lift, tokens, times, draws=100_000):
    """Moments of the same tokens with noise of the training distribution, base and
    student coupled by `lift` (from `coupling`). No noise is drawn: its moments are
    known.

    An entry of a noised patch is k z + sigma e: where it is latent k = 1 - sigma; where
    it is mask or condition k = 1, and there is no noise. So every moment is the clean
    one times E[k k'], plus E[sigma^2] times the noise's covariance: 1/s^2 for the base,
    1 for the student, `lift` between them.
    """
    drawn = flow.sample_times(draws, times, torch.Generator().manual_seed(0))
    sigma, _, weight = (a.double() for a in drawn)
    share = weight / weight.sum()
    keep = (share * (1 - sigma)).sum()
    keep2 = (share * (1 - sigma) ** 2).sum()
    noise2 = (share * sigma**2).sum()

    def expected_product(a, b):
        """E[k k'] of an entry of one patch and one of another; a, b: which are
        latent."""
        product = torch.ones(len(a), len(b), dtype=torch.float64)  # both condition
        product[a[:, None] != b] = keep  # one of them latent
        product[a[:, None] & b] = keep2  # both
        return product

    m = moments
    x = torch.arange(len(m.x)) < tokens.latent[0]  # which entries are latent
    u = torch.arange(len(m.u)) < tokens.latent[1]
    noise_x = m.n * noise2 * x.double() / tokens.s**2
    noise_u = m.n * noise2 * u.double()
    noise_xu = torch.zeros_like(m.xu)
    noise_xu[: lift.shape[0], : lift.shape[1]] = m.n * noise2 * lift
    return Moments(
        m.n,
        m.x * torch.where(x, keep, 1.0),
        m.u * torch.where(u, keep, 1.0),
        m.xx * expected_product(x, x) + noise_x.diag(),
        m.xu * expected_product(x, u) + noise_xu,
        m.uu * expected_product(u, u) + noise_u.diag())


# ------------------------------------------------ is it working?


def r_squared(moments, teacher, weight, bias):
    """(R^2, MSE) of an embedder on the pairs behind `moments` (held out, please).
    R^2 = 1 - MSE / Var(y). Exact, from the moments alone."""
    W, b = matrix(teacher)
    weight, bias = flat(weight), flat(bias)
    mean_x, mean_u, xx, xu, uu = moments.centred()
    variance = (W @ xx * W).sum() / len(W)
    b, bias = (0.0 if p is None else p for p in (b, bias))
    offset = W @ mean_x + b - weight @ mean_u - bias
    unexplained = ((weight @ uu - 2 * W @ xu) * weight).sum() / len(W)
    mse = variance + unexplained + offset.square().mean()
    return (1 - mse / variance).item(), mse.clamp(min=0).item()


def norm_ratio(weight, teacher, tokens):
    """How loudly noise arrives, against the base: |W_S|^2 / (|W_T|^2 / s^2) over the
    latent entries. s^2 base tokens are averaged into one deep token, and their noise
    with them. Far below 1: the blocks will see noise too faintly."""
    base, deep = tokens.latent
    ours = flat(weight)[:, :deep].square().sum()
    theirs = flat(teacher.weight)[:, :base].square().sum() / tokens.s**2
    return (ours / theirs).item()


# ------------------------------------------------ the head


def velocity_of(net, batch, device):
    """A batch's transformer as a velocity function (x, t) -> v on `device`, with the
    batch's prompt and image condition."""
    condition = None if batch.condition is None else batch.condition.to(device)
    prompt = [part.to(device) for part in batch.prompt]

    def velocity(x, t):
        x = x.to(device)
        if condition is not None:
            x = torch.cat([x, condition], dim=1)
        return net(x, t.to(device), *prompt)

    return velocity


@torch.no_grad()
def solve_head(net, source, times, batches=48, batch=64, ridge=1e-4, seed=7):
    """Closed form of the head: the best linear map from the features that enter it to
    the velocity, in place.

    Only forward passes at random times: sum w u u' and w u v' over features u (with a 1
    for the bias, if there is one) and target patches v, with the weights w of the time
    sampling.
    `source` gives the batches. Features are adapted to the embedder, so align that
    first.
    """
    layer, features = net.head_layer, []
    device, ones = layer.weight.device, int(layer.bias is not None)
    patch = dict(zip("pqr", net.config.patch))
    hook = layer.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    uu = uv = 0.0
    try:
        for step in tqdm(range(batches), "align head by regression", unit="batch", leave=False):
            clips = source.batch(step, range(batch))
            drawn = flow.draw(clips.z.shape[1:], times, seed, step, range(batch))
            x = flow.add_noise(clips.z, drawn.noise, drawn.sigma)
            velocity_of(net, clips, device)(x, drawn.t)
            v = flow.velocity_target(clips.z, drawn.noise).to(device)
            v = rearrange(v, "b c (f p) (h q) (w r) -> b (f h w) (p q r c)", **patch)
            u = features.pop().double().flatten(1, -2)
            u = F.pad(u, (0, ones), value=1.0)
            weight = drawn.weight.to(u)[:, None, None]
            weighted = (u * weight).flatten(0, 1)
            uu += weighted.T @ u.flatten(0, 1)
            uv += weighted.T @ v.double().flatten(0, 1)
    finally:
        hook.remove()
    regular = uu + ridge * uu.diagonal().mean() * torch.eye(len(uu)).to(uu)
    solved = torch.linalg.solve(regular, uv).T
    layer.weight.copy_(solved[:, : layer.in_features])
    if ones:
        layer.bias.copy_(solved[:, -1])
