"""Alignment: fit the two ends of a transformer to a new latent space before anything is trained end to end (paper, section on AE-Adapt-V; spec
ae-adapt-v 3, 4 and 8).

**The embedder.** The new patch embedder E_S (weight W_S, bias b_S) must give the blocks what they know: the embeddings y of the base's own
embedder E_T (W_T, b_T), averaged over the s x s base tokens that one deep token covers. With u a deep patch and x the mean of the base
patches (embedding and averaging are both linear, so patches may be averaged first):

    y = W_T x + b_T              L = mean | y - W_S u - b_S |^2                   over all tokens of all clips

That is a linear regression. It needs nothing of the data but means and second moments, which `Moments` sums up clip by clip in fp64:

    W_S = (S_yu + l W_0) (S_uu + l I)^-1        b_S = mean(y) - W_S mean(u)       S: covariances;  S_yu = W_T S_xu

one solve in place of 20,000 SGD steps (`sgd_embedding`, as published). The ridge l must not be left out (the four mask channels of an
image condition are equal, so S_uu is singular). It shrinks towards W_0: zero, or the initialisation, which keeps latent directions of
low variance open. The transformer will need them, because noise fills every direction alike and clean latents do not show it.

**Noise** can be asked for instead (`noised`). The embedder sees noised latents, and what it makes of noise should be what the base makes
of noise:

    u' = (1 - sigma) u + sigma e           x' = (1 - sigma) x + sigma C e,       e ~ N(0, I)

The base's noise must be a function of the student's: were the two independent, noise would only be an error in u, which regression
answers by closing the noisy directions. It is C e, where base patches hold more numbers than deep ones plus what e cannot determine, which
is independent and changes nothing. The mean of s^2 white base patches has variance 1 / s^2, so C may be any map with singular values up to 1 / s;
of those, the one under which the base's answer to noise, W_T C, is closest to its answer to data, S_yu (orthogonal Procrustes: 1/s times
the polar factor of W_T' S_yu). For a text-to-video embedder, and but for the means, fitting noised pairs is then

    W_S = (S_yu + l W_T C) (S_uu + l I)^-1      l = E[sigma^2] / E[(1 - sigma)^2]

the ridge again, towards an initialisation that is not random and with a strength that is not guessed: for shifted times l is the shift S itself. No
noise is drawn: its moments are known. At the noise levels of training most of what the embedder sees is noise, which is why this pays: on the toy it
lowers the loss after stage 1b and at the end (`experiments/compare_adapt.py`, option b).

**The head** (`solve_head`): the loss of stage 1b over the head alone is a linear regression of the velocity on the features that enter it.

A low MSE proves nothing (spec 9.8). So: `r_squared` (1: the base's embeddings; 0: their mean), `norm_ratio` (does noise arrive as loudly?),
`depth_curve` (do the blocks still say the same?), `loss_by_sigma` (against what is possible without knowing any neighbour or prompt).
"""
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from tqdm import tqdm

import flow
from files.checkpoint import UserError

# ---------------------------------------------------------------------------------------------------- pairs of tokens


def tokens_of(x, patch):
    """[b, c, f, h, w] -> the flattened patches [b, f', h', w', c * prod(patch)] that a patch embedder multiplies."""
    pt, ph, pw = patch
    return rearrange(x, "b c (f p) (h q) (w r) -> b f h w (c p q r)", p=pt, q=ph, r=pw)


def pool(tokens, grid):
    """Average tokens [b, f, h, w, c] over the cells of a coarser grid (f', h', w'): the target of stage 1a (spec 3.2).

    Space must divide by one common integer s; in time the longer clip may be an integer multiple. UserError otherwise.
    """
    f, h, w = tokens.shape[1:4]
    if f % grid[0] or h % grid[1] or w % grid[2] or h // grid[1] != w // grid[2]:
        raise UserError(f"the base token grid {f}x{h}x{w} is no integer multiple of the deep one {'x'.join(map(str, grid))}: "
                        "use sizes of the same bucket for both autoencoders.")
    return reduce(tokens, "b (f p) (h q) (w r) c -> b f h w c", "mean", f=grid[0], h=grid[1], w=grid[2])


def pair_tokens(teacher, student, patches, mode="downsample"):
    """Clean inputs of the same clips, [b, c, t, h, w] in each space -> (x [n, c_T p_T], u [n, c_S p_S]), one row per pair of tokens.

    mode "downsample": base patches averaged over a deep token, as published for video. "nearest", "bilinear": deep patches brought to
    the base's grid instead, as published for images. Nearest has the solution of downsample; s^2 times the rows.
    Where one clip has an integer multiple of the other's latent frames, its tokens are averaged in time.
    """
    x, u = tokens_of(teacher, patches[0]), tokens_of(student, patches[1])
    if u.shape[1] > x.shape[1]:
        u = pool(u, (x.shape[1], *u.shape[2:4]))
    pooled = pool(x, u.shape[1:4])
    if mode == "downsample":
        x = pooled
    elif mode in ("nearest", "bilinear"):
        x = pool(x, (u.shape[1], *x.shape[2:4]))
        smooth = dict(mode="bilinear", align_corners=False) if mode == "bilinear" else dict(mode="nearest")
        u = rearrange(F.interpolate(rearrange(u, "b f h w c -> (b f) c h w"), x.shape[2:4], **smooth), "(b f) c h w -> b f h w c", f=u.shape[1])
    else:
        raise UserError(f'alignment mode "{mode}" is unknown: use downsample, nearest or bilinear.')
    return x.flatten(0, 3), u.flatten(0, 3)


@dataclass
class Moments:
    """First and second moments of token pairs, fp64: the sums from which every closed form here follows. Thousands of clips stream through;
    moments of different clips add up (`a + b`), so processes may share the work."""

    n: int | float = 0
    x: torch.Tensor | float = 0.0  # [c_T p_T] sum of the base patches
    u: torch.Tensor | float = 0.0  # [c_S p_S] sum of the deep patches
    xx: torch.Tensor | float = 0.0  # sums of the outer products: x x', x u', u u'
    xu: torch.Tensor | float = 0.0
    uu: torch.Tensor | float = 0.0

    @classmethod
    def of(cls, pairs, patches, mode="downsample"):
        """Of an iterable of (teacher input, student input), each [c, t, h, w] or batched: e.g. `map(source.pair, range(len(source)))`."""
        total = cls()
        for teacher, student in pairs:
            batched = (a if a.dim() == 5 else a[None] for a in (teacher, student))
            total = total.add(*pair_tokens(*(a.double() for a in batched), patches, mode))
        return total

    def add(self, x, u):
        """With more pairs of tokens, x [n, c_T p_T] and u [n, c_S p_S] -> Moments."""
        x, u = x.double(), u.double()
        return self + Moments(len(x), x.sum(0), u.sum(0), x.T @ x, x.T @ u, u.T @ u)

    def __add__(self, other):
        return Moments(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def centred(self):
        """(mean x, mean u, S_xx, S_xu, S_uu): means and covariances."""
        if not self.n:
            raise UserError("there are no clips to align with: give at least one clip that has latents in both spaces.")
        x, u = self.x / self.n, self.u / self.n
        return x, u, self.xx / self.n - x.outer(x), self.xu / self.n - x.outer(u), self.uu / self.n - u.outer(u)


def matrix(embedder):
    """(weight [d, c * prod(patch)], bias [d]) of a patch embedder, fp64 on the CPU."""
    return embedder.weight.detach().cpu().double().flatten(1), embedder.bias.detach().cpu().double()


# ---------------------------------------------------------------------------------------------------- stage 1a: patch embedder


def solve_embedding(moments, teacher, ridge=1e-5, init=None):
    """Closed form of stage 1a (spec 3.4) -> (weight [d, c_S p_S], bias [d]), fp32. `teacher`: the base's embedder.

    The ridge is a multiple of the mean variance of u; `init` [d, c_S p_S] (or in the embedder's shape) is what it shrinks towards.
    """
    weight, bias = matrix(teacher)
    mean_x, mean_u, _, cov_xu, cov_uu = moments.centred()
    l, cov_yu = ridge * cov_uu.diagonal().mean(), weight @ cov_xu
    start = torch.zeros_like(cov_yu) if init is None else init.detach().cpu().double().flatten(1)
    solved = torch.linalg.solve(cov_uu + l * torch.eye(len(cov_uu), dtype=torch.float64), (cov_yu + l * start).T).T
    return solved.float(), (weight @ mean_x + bias - solved @ mean_u).float()


def coupling(moments, teacher, s, noisy):
    """C [p_T, p_S] of the file's docstring: how the base's pooled noise follows from the student's. `noisy`: how many of the leading
    entries of x and of u are latent, and so get noise; mask and condition behind them do not."""
    weight, _ = matrix(teacher)
    cov_xu = moments.centred()[3]
    a, _, b = torch.linalg.svd(weight[:, : noisy[0]].T @ weight @ cov_xu[:, : noisy[1]], full_matrices=False)
    return a @ b / s


def noised(moments, lift, s, noisy, mode="shifted", shift=5.0, draws=100_000, inside=(0.0, 1.001)):
    """Moments of the same tokens with noise of the training distribution, base and student coupled by `lift` (from `coupling`).

    An entry of a noised patch is k z + sigma e with k = 1 - sigma where it is latent; where it is mask or condition, k = 1 and there is no
    noise. So every moment is the clean one times E[k k'], plus E[sigma^2] times the noise's covariance: 1/s^2 for the base, 1 for the
    student, `lift` between them. For pairs made with mode "downsample".
    """
    sigma, _, weight = (a.double() for a in flow.sample_times(draws, mode, shift, torch.Generator().manual_seed(0), inside=inside))
    mean = lambda f: (weight * f).sum() / weight.sum()
    A, a, B = mean((1 - sigma) ** 2), mean(1 - sigma), mean(sigma**2)
    latent = [(torch.arange(len(m)) < n).double() for m, n in zip((moments.x, moments.u), noisy)]
    first = [1 + (a - 1) * m for m in latent]  # E[k]
    second = lambda m, o: 1 + (a - 1) * (m[:, None] + o - 2 * m[:, None] * o) + (A - 1) * m[:, None] * o  # E[k k']
    x, u = latent
    lifted = F.pad(lift, (0, len(u) - noisy[1], 0, len(x) - noisy[0]))
    n = moments.n
    return Moments(n, moments.x * first[0], moments.u * first[1], moments.xx * second(x, x) + n * B * x.diag() / s**2,
                   moments.xu * second(x, u) + n * B * lifted, moments.uu * second(u, u) + n * B * u.diag())


def solve_noised(moments, teacher, s, noisy, mode="shifted", shift=5.0, ridge=1e-5, inside=(0.0, 1.001)):
    """Noise-aware closed form of stage 1a -> (weight, bias): the regression on pairs with coupled noise at the training's noise levels."""
    return solve_embedding(noised(moments, coupling(moments, teacher, s, noisy), s, noisy, mode, shift, inside=inside), teacher, ridge)


def sgd_embedding(pair, n, patches, teacher, weight, bias, steps=20000, batch=4, lr=2e-4, seed=0, keep=512, progress=True):
    """Stage 1a as published (spec 3.3): AdamW, betas (0.9, 0.9), on batches of clips -> (weight, bias), fp32.

    pair: i -> (teacher input, student input) of clip i of n, as `Moments.of` takes them; the tokens of the last `keep` clips stay in memory.
    Pooling and loss in fp32.
    """
    tokens = functools.lru_cache(keep)(lambda i: pair_tokens(*(a[None].float() for a in pair(i)), patches))
    W, b = (p.float() for p in matrix(teacher))
    weight, bias = (p.detach().cpu().float().flatten(1) if p.dim() > 1 else p.detach().cpu().float() for p in (weight, bias))
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    opt = torch.optim.AdamW([weight, bias], lr=lr, betas=(0.9, 0.9), weight_decay=0, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc="align embedder by SGD", unit="step", leave=False, disable=not progress):
        x, u = (torch.cat(side) for side in zip(*map(tokens, torch.randint(n, (batch,), generator=generator).tolist())))
        loss = F.mse_loss(F.linear(u, weight, bias), F.linear(x, W, b))
        opt.zero_grad()
        loss.backward()
        opt.step()
    return weight.detach(), bias.detach()


# ---------------------------------------------------------------------------------------------------- is it working?


def r_squared(moments, teacher, weight, bias):
    """(R^2, MSE) of an embedder on the pairs behind `moments` (held out, please): R^2 = 1 - MSE / Var(y). Exact, from the moments alone."""
    W, b = matrix(teacher)
    weight, bias = weight.detach().cpu().double().flatten(1), bias.detach().cpu().double()
    mean_x, mean_u, xx, xu, uu = moments.centred()
    variance = (W @ xx * W).sum() / len(W)
    offset = W @ mean_x + b - weight @ mean_u - bias
    mse = variance + ((weight @ uu - 2 * W @ xu) * weight).sum() / len(W) + offset.square().mean()
    return (1 - mse / variance).item(), mse.clamp(min=0).item()


def norm_ratio(weight, teacher, s, noisy):
    """How loudly noise arrives, against the base: |W_S|^2 / (|W_T|^2 / s^2) over the latent entries (spec 8, row 3). s^2 base tokens are
    averaged into one deep token, and their noise with them. Far below 1: the blocks will see noise too faintly."""
    return (weight.detach().double().flatten(1)[:, : noisy[1]].square().sum().cpu()
            / matrix(teacher)[0][:, : noisy[0]].square().sum() * s**2).item()


@torch.no_grad()
def depth_curve(base, deep, teacher, student, contexts, t=0.0, blocks=None):
    """How far the new model's features are from the base's, block by block (spec 3.5, 9.5) -> {block: (mse, mse / variance of the base's)}.

    teacher, student: clean inputs of the same clips [b, c, t, h, w]; contexts: the prompt (and clip_fea) for both, as the transformers take
    them. Both see the same clip at the same time t; the base's features are averaged over the cells of the deep grid. "embedding" is
    stage 1a's own distance. The patch embedder alone is aligned, so the curve tells how much of that survives the blocks.
    """
    blocks = list(range(base.config.layers)) if blocks is None else list(blocks)
    out = {}
    features = []
    for net, x in ((base, teacher), (deep, student)):
        device = next(net.parameters()).device
        x = x.to(device)
        times = torch.full((len(x),), float(t), device=device)
        _, seen = net(x, times, *(c.to(device) for c in contexts), return_features=blocks)
        features.append({"embedding": net.embed_patches(x), **seen})
    for block, ours in features[1].items():
        y = pool(features[0][block].float(), ours.shape[1:4]).cpu()
        mse = (y - ours.float().cpu()).square().mean().item()
        out[block] = mse, mse / (y - y.flatten(0, 3).mean(0)).square().mean().item()
    return out


def linear_bound(spectrum, sigma):
    """Lowest loss at `sigma` (tensor) of a predictor that knows a latent cell's channel statistics but no neighbour, prompt or time:
    for Gaussian latents with eigenvalues l of the channel covariance, mean over l / ((1 - sigma)^2 l + sigma^2)."""
    sigma = sigma.double()[..., None]
    return (spectrum / ((1 - sigma) ** 2 * spectrum + sigma**2).clamp(min=1e-12)).mean(-1)


@torch.no_grad()
def loss_by_sigma(net, source, batches=8, batch=32, mode="shifted", shift=5.0, bins=5):
    """Loss per bin of sigma with its bound -> [{"sigma": (from, to), "loss", "bound", "ratio"}], on batches of `source`.

    bound: `linear_bound` with the latents' own spectrum at the same noise levels. Expect ratio < 1 in every bin where something was
    drawn; near 1, the blocks add nothing to what a cell's own channels tell. nan: nothing was drawn there.
    """
    device = next(net.parameters()).device
    mse, sigma, z = [], [], []
    for step in range(batches):
        clips = source.batch(step, range(batch))
        generator = torch.Generator().manual_seed(step)
        _, error, level = flow.loss(velocity_of(net, clips, device), clips.z.to(device), mode, shift, generator)
        mse.append(error.cpu()), sigma.append(level.cpu()), z.append(rearrange(clips.z, "b c f h w -> (b f h w) c").double())
    mse, sigma, z = torch.cat(mse), torch.cat(sigma), torch.cat(z)
    bound = linear_bound(torch.linalg.eigvalsh(z.T.cov()).clamp(min=0), sigma)
    losses, bounds = flow.by_sigma(mse, sigma, bins), flow.by_sigma(bound, sigma, bins)
    return [dict(sigma=(i / bins, (i + 1) / bins), loss=a, bound=b, ratio=a / b) for i, (a, b) in enumerate(zip(losses, bounds))]


# ---------------------------------------------------------------------------------------------------- the head


def velocity_of(net, batch, device):
    """A batch's transformer as a velocity function (x, t) -> v, with the batch's prompt and image condition."""
    condition, context, clip_fea = (None if a is None else a.to(device) for a in (batch.condition, batch.context, batch.clip_fea))
    more = () if clip_fea is None else (clip_fea,)
    return lambda x, t: net(x if condition is None else torch.cat([x, condition], dim=1), t, context, *more)


@torch.no_grad()
def solve_head(net, source, batches=48, batch=64, ridge=1e-4, mode="shifted", shift=5.0, seed=7, inside=(0.0, 1.001)):
    """Closed form of the head (spec 4): the best linear map from the features that enter it to the velocity, in place.

    Only forward passes at random times: sum w u u' and w u v' over features u (with a 1 for the bias) and target patches v, with the
    weights w of the time sampling. `source` gives the batches. Features are adapted to the embedder, so align that first.
    """
    layer, features = net.head.head, []
    device, d = layer.weight.device, net.config.dim + 1
    hook = layer.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    uu, uv = (torch.zeros(d, n, dtype=torch.float64, device=device) for n in (d, layer.out_features))
    try:
        for step in tqdm(range(batches), desc="align head by regression", unit="batch", leave=False):
            clips, generator = source.batch(step, range(batch)), torch.Generator().manual_seed(seed * 1_000_003 + step)
            sigma, t, weight = flow.sample_times(batch, mode, shift, generator, inside=inside)
            noise = torch.randn(clips.z.shape, generator=generator)
            velocity_of(net, clips, device)(flow.add_noise(clips.z, noise, sigma).to(device), t.to(device))
            v = rearrange(flow.velocity_target(clips.z, noise).to(device), "b c (f p) (h q) (w r) -> b (f h w) (p q r c)",
                          **dict(zip("pqr", net.config.patch))).double()
            u = F.pad(features.pop().double(), (0, 1), value=1.0)
            weighted = u * weight.to(u)[:, None, None]
            uu += weighted.flatten(0, 1).T @ u.flatten(0, 1)
            uv += weighted.flatten(0, 1).T @ v.flatten(0, 1)
    finally:
        hook.remove()
    solved = torch.linalg.solve(uu + ridge * uu.diagonal().mean() * torch.eye(d, dtype=torch.float64, device=device), uv).T
    layer.weight.copy_(solved[:, :-1])
    layer.bias.copy_(solved[:, -1])
