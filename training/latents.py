"""Latents that are easy to move into and to generate in: beyond the paper, and off by default.

A deep latent is judged by what it reconstructs. What makes it easy for a diffusion model is
something else, and can be asked for while the autoencoder is trained (training/autoencoder.py,
`Phase`), at some cost in PSNR, which has to be reported beside it:

    Aligner            the latent predicts, linearly, the patch embeddings of the base that is
                       to move into it: what stage 1a of AE-Adapt-V starts from
    correlation        neighbouring cells are alike (SSVAE, arXiv 2512.05394)
    MaskToken          the decoder fills in hidden cells from their neighbours (the same)
    first_channels     the first channels alone decode (DC-AE 1.5, arXiv 2508.00413)
    add_latent_noise   the decoder bears noise
    report             the spectrum of a finished latent, and its R^2 to a base

Scale equivariance, the decoder of a latent at half size (arXiv 2502.14831), is a line in
`Objective`. All of these can be won by a latent that holds less.
"""
import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import ae
import align
from files import checkpoint, layouts
from files.checkpoint import UserError
from training import loop
from wan import released, vae


def add_latent_noise(z, noise, seed):
    """z plus Gaussian noise of `noise` times its RMS; the same for a seed on every device."""
    e = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    return z + noise * z.square().mean().sqrt() * e.to(z)


class MaskToken(nn.Module):
    """What the decoder gets in place of a hidden cell (SSVAE, arXiv 2512.05394): learned.

    In a share of the steps a quarter, half or three quarters of the cells are hidden, the
    same for the whole batch; the decoder is to fill them in from their neighbours.
    """

    def __init__(self, channels):
        super().__init__()
        self.token = nn.Parameter(torch.randn(channels))

    def forward(self, z, rng):
        ratio, shape = rng.choice([0.25, 0.5, 0.75]), z.shape[2:]
        hidden = np.zeros(shape.numel(), bool)
        hidden[rng.permutation(len(hidden))[: max(1, int(ratio * len(hidden)))]] = True
        hidden = torch.from_numpy(hidden).view(shape).to(z.device)
        return torch.where(hidden, self.token.to(z)[:, None, None, None], z)


def first_channels(z, rng):
    """z with all but the first channels zero, a random number of eighths of them: what the
    first alone can decode comes to stand first (DC-AE 1.5, arXiv 2508.00413)."""
    count = z.shape[1] * int(rng.integers(1, 8)) // 8
    return torch.cat([z[:, :count], torch.zeros_like(z[:, count:])], dim=1)


def correlation(z, target=0.75):
    """The loss max(0, target - R), R of `neighbours`. Multiply with a weight and with
    `losses.adaptive_weight` at the encoder's last convolution."""
    return F.relu(target - neighbours(z))


def neighbours(z):
    """R: how alike a cell of a latent [b, c, t, h, w] is to its neighbours: the mean Pearson
    correlation over channels, standardised first, of all pairs of cells in windows of 2x2x2.
    A clip of one latent frame has windows of 1x2x2."""
    dims, frames = (0, 2, 3, 4), min(2, z.shape[2])
    z = z.float()
    mean, std = z.detach().mean(dims, keepdim=True), z.detach().std(dims, keepdim=True)
    z = whole_blocks((z - mean) / (std + 1e-6), frames, 2)
    cells = rearrange(z, "b c (f t) (h p) (w q) -> (b f h w) (t p q) c", t=frames, p=2, q=2)
    cells = cells - cells.mean(dim=2, keepdim=True)
    unit = cells / (cells.norm(dim=2, keepdim=True) + 1e-8)
    n = unit.shape[1]
    pairs = unit.sum(dim=1).square().sum(dim=1) - n  # all pairs of u . u', but each with itself
    return pairs.mean() / (n * (n - 1))


def whole_blocks(z, frames, side):
    """z without the cells at its end that fill no block."""
    t, h, w = (n // size * size for n, size in zip(z.shape[2:], (frames, side, side)))
    return z[:, :, :t, :h, :w]


# -------------------------------------------------------------- the report


def report(latents, side=4):
    """What a latent [n, c, t, h, w] of held-out clips looks like to a diffusion model -> dict.

    leading 1, c/8, c/4   share of the variance in so many principal components of channels
    effective             channels in use: (sum l)^2 / sum l^2 over their variances l
    high                  share of the spectrum (DCT of side x side cells, channels
                          standardised, the mean left out) in the upper half of frequencies
    neighbours            R of `neighbours`

    Steeper and fewer is easier, at equal reconstruction; compare autoencoders of equal factor,
    channels, clips and size only. White noise: leading k/c, high about 1/2, neighbours 0.
    """
    z = latents.double()
    channels = z.shape[1]
    spectrum = torch.linalg.eigvalsh(torch.cov(z.movedim(1, 0).flatten(1))).flip(0)
    share = spectrum.cumsum(0) / spectrum.sum()
    found = {}
    for k in sorted({1, max(channels // 8, 1), max(channels // 4, 1)}):
        found[f"leading {k}"] = share[k - 1].item()
    found["effective"] = (spectrum.sum() ** 2 / spectrum.square().sum()).item()
    if min(z.shape[3:]) >= side:
        k = torch.arange(side, dtype=torch.float64)
        dct = torch.cos(math.pi / side * k[:, None] * (k + 0.5)) * (2 / side) ** 0.5
        dct[0] /= 2**0.5
        z = z - z.mean((0, 2, 3, 4), keepdim=True)
        z = whole_blocks(z / z.std((0, 2, 3, 4), keepdim=True), 1, side)
        blocks = rearrange(z, "b c t (h p) (w q) -> (b c t h w) p q", p=side, q=side)
        power = (dct @ blocks @ dct.T).square().mean(0)
        power[0, 0] = 0
        order = (k[:, None] + k).flatten().argsort(stable=True)  # the zigzag
        power = power.flatten()[order]
        found["high"] = (power[side**2 // 2 :].sum() / power.sum()).item()
    if min(z.shape[3:]) >= 2:
        found["neighbours"] = neighbours(latents).item()
    return found


# -------------------------------------------------------------- alignment to a base


def load_autoencoder(path):
    """Weights of a DC-AE-V or of a Wan VAE (a file, or a diffusers folder) -> that autoencoder,
    in eval mode."""
    try:
        return ae.load(path)
    except UserError as no_dc_ae_v:
        try:
            return vae.load(path)
        except UserError:
            raise no_dc_ae_v from None


def frames_alike(base, deep, count):
    """How many frames of a clip a base reads, so that they become as many latent frames as
    `count` of a deep latent stand for: 77 for 20, which are 80 of the deep one's."""
    alike = count * deep.temporal_factor // base.temporal_factor
    return base.lead + (alike - 1) * base.temporal_factor


class Teacher:
    """A base as the aligner sees it: its autoencoder, and what its transformer's patch
    embedder does to a latent.

    files: weights of the autoencoder, and of the transformer if there is one yet; or the name
    of a released model, whose files lie in checkpoints/NAME. Nothing of it is trained.
    """

    def __init__(self, files, device="cpu"):
        self.files = list(map(str, files))
        if len(files) == 1 and files[0] in released.RELEASED:
            parts, folder = released.RELEASED[files[0]].files, Path("checkpoints") / files[0]
            name, files = files[0], []
            for part in ("autoencoder", "transformer"):
                files.append(released.find(parts[part], [folder]))
                if files[-1] is None:
                    raise UserError(f"{folder} holds no {part} of {name}: put it there, or give "
                                    "--align-to the files of its autoencoder and transformer.")
        if len(files) > 2:
            raise UserError("--align-to takes the weights of a base's autoencoder, and of its "
                            f"transformer: two files, got {len(files)}.")
        self.net = load_autoencoder(files[0]).requires_grad_(False).to(device)
        self.patch, self.embed = (1, 1, 1), None
        channels = self.net.config.latent_channels
        if len(files) > 1:
            tensors = layouts.original(checkpoint.open_tensors(files[1])[0])
            self.patch = tuple(tensors["patch_embedding.weight"].shape[2:])
            taken = tensors["head.head.weight"].shape[0] // math.prod(self.patch)
            if taken != channels:
                raise UserError(f"{files[0]} makes {channels} channels and {files[1]} takes "
                                f"{taken}: give --align-to two files of one base.")
            weight = checkpoint.read(tensors["patch_embedding.weight"])
            self.embed = weight[:, :channels].double().flatten(1)

    def check(self, config):
        """UserError where a deep cell does not cover whole tokens of the base."""
        base = self.net.config
        token = base.spatial_factor * self.patch[1]
        times = sorted((base.temporal_factor * self.patch[0], config.temporal_factor))
        if config.spatial_factor % token or times[1] % times[0]:
            raise UserError(
                f"a latent cell of {config.spatial_factor} pixels and {config.temporal_factor} "
                f"frames covers no whole number of the tokens of {self.files[0]}, {token} pixels "
                f"and {base.temporal_factor} frames: give --align-to a base less deep.")

    @torch.no_grad()
    def latent(self, x, config):
        """Clean latent of a clip as the base's transformer sees it (`frames_alike`)."""
        base, like = self.net.config, next(self.net.parameters())
        frames = frames_alike(base, config, x.shape[2] // config.temporal_factor)
        return base.scale * self.net.encode(x[:, :, :frames].to(like)).float()


class Aligner(nn.Module):
    """Asks the deep latent to predict the base's patch embeddings, linearly: a latent that
    stage 1a can start from (beyond the paper).

        L = mean |y - W u - b|^2 / var(y)

    y: the embeddings of the same clip, averaged over a deep token, as in stage 1a (align.py);
    u: the deep token; W, b: learned beside the autoencoder. At the best W and b this is
    1 - R^2 of stage 1a. The gradient reaches the encoder through u; the base stays as it is.

    An embedding W_T x has d numbers, far more than the patch x. But |W_T e| = |R e| for every
    e, with W_T = Q R and Q's columns orthonormal: so R x stands for the embedding. Of a base
    without a transformer the whitened latent does.
    """

    BATCHES = 16  # that the scale, and each R^2, are measured on

    def __init__(self, teacher, net, stream):
        super().__init__()
        self.teacher, self.config = teacher, net.config
        moments = self.moments(net, itertools.islice(stream(0), self.BATCHES))
        mean, _, covariance, *_ = moments.centred()
        if teacher.embed is None:
            ridge = 1e-6 * covariance.diagonal().mean() * torch.eye(len(covariance)).double()
            factor = torch.linalg.inv(torch.linalg.cholesky(covariance + ridge))
        else:
            factor = torch.linalg.qr(teacher.embed, mode="r").R
        factor = factor / ((factor @ covariance * factor).sum() / len(factor)).sqrt()
        self.register_buffer("weight", factor.float())  # y = R x + b, of mean variance 1
        self.register_buffer("bias", (-factor @ mean).float())
        self.linear = nn.Linear(net.config.latent_channels, len(factor))
        weight, bias = align.solve_embedding(moments, self)
        loop.copy_into(self.linear, {"weight": weight, "bias": bias})

    def pairs(self, x, u):
        """Clip [b, 3, T, H, W] and its deep latent -> (base patches, averaged, [n, p]; deep
        tokens [n, z])."""
        z = self.teacher.latent(x, self.config)
        return align.pair_tokens(z, u.float(), (self.teacher.patch, (1, 1, 1)))

    def forward(self, x, u):
        """-> the loss."""
        x, u = self.pairs(x, u)
        return (F.linear(x, self.weight, self.bias) - self.linear(u)).square().mean()

    @torch.no_grad()
    def moments(self, net, batches):
        total = align.Moments()
        for x in batches:
            total = total.add(*(side.cpu() for side in self.pairs(x, net.encode(x))))
        return total

    def r_squared(self, net, batches, held_out):
        """R^2 of stage 1a's closed form for the encoder as it is: solved on batches, held out
        from it the others."""
        solved = align.solve_embedding(self.moments(net, batches), self)
        return align.r_squared(self.moments(net, held_out), self, *solved)[0]


def r_squared(teacher, net, clips):
    """R^2 of an autoencoder's latent to a base: solved on every other clip [3, t, h, w], held
    out from it the rest."""
    teacher.check(net.config)
    fitted, held_out = ([x[None] for x in clips[i::2]] for i in (0, 1))
    aligner = Aligner(teacher, net, lambda number: iter(fitted))
    return aligner.r_squared(net, fitted, held_out)
