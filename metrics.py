"""How good a video is: PSNR, SSIM, and how well a toy video fits its prompt."""
import math

import torch
import torch.nn.functional as F

import data


# ---------------------------------------------------------------------------------------------------- distance to the original
#
# y is compared with x, both [b, c, t, h, w] in [-1, 1], frame by frame on 8-bit values, as files hold them (spec dc-ae-v 8.2).


def psnr(y, x):
    """Mean PSNR over frames in dB. Frames without any error (infinite PSNR) are left out, as in the published evaluation."""
    return finite_mean(psnr_frames(y, x))


def psnr_frames(y, x):
    """10 log10(255^2 / mean squared error) of every frame: [b, t], in dB."""
    return 10 * torch.log10(255**2 / (_eight_bit(y) - _eight_bit(x)).square().mean(dim=(1, 3, 4)))


def finite_mean(frames):
    """The mean of the finite values; infinity where there are none (every frame is equal)."""
    return frames[frames.isfinite()].mean().item() if frames.isfinite().any() else math.inf


def ssim(y, x):
    """Mean structural similarity over frames: 1 is equal."""
    return ssim_frames(y, x).mean().item()


def ssim_frames(y, x):
    """Structural similarity of every frame, [b, t]: 11x11 Gaussian window of sigma 1.5, K1 0.01, K2 0.03, reflected at the border.

    ssim = (2 m_x m_y + c1) (2 cov_xy + c2) / ((m_x^2 + m_y^2 + c1) (var_x + var_y + c2)), all of them local means under the window.
    One frame at a time, since the maps take five times the memory of what they compare.
    """
    return torch.stack([_ssim(_eight_bit(y[:, :, i]), _eight_bit(x[:, :, i])) for i in range(x.shape[2])], dim=1)


def _ssim(y, x):  # [b, c, h, w] in 0..255 -> [b]
    mx, my, xx, yy, xy = _blur(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    variances = (xx - mx * mx).clamp(min=0) + (yy - my * my).clamp(min=0)
    return ((2 * mx * my + c1) * (2 * (xy - mx * my) + c2) / ((mx * mx + my * my + c1) * (variances + c2))).mean(dim=(1, 2, 3))


def _blur(m):  # [b, c, h, w]; written as sums, since convolutions on a GPU may round to TF32, which ruins a variance
    h, w = m.shape[2:]
    g = torch.exp(-torch.arange(-5.0, 6.0).square() / (2 * 1.5**2))
    m = F.pad(m, (5, 5, 5, 5), mode="reflect")
    for axis, n in ((2, h), (3, w)):
        m = sum(k * m.narrow(axis, i, n) for i, k in enumerate((g / g.sum()).tolist()))
    return m


def _eight_bit(v):
    return (v.float().clamp(-1, 1) * 127.5 + 128).floor().clamp(max=255)


def plot(path, panels):
    """One panel per entry of {title: [(x, y), ...]} as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    import checkpoint

    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.2), squeeze=False)
    for ax, (title, points) in zip(axes[0], panels.items()):
        ax.plot(*zip(*points))
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.3)
    fig.tight_layout()
    with checkpoint.atomic_path(path) as tmp:
        fig.savefig(tmp, dpi=110)
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------- prompt fit


def read_attributes(x):
    """Read the toy world's attributes back from a video: [3, t, h, w] in [-1, 1] -> {attribute: word, or None where undecidable}.

    No network: the background is the median of the border, the object is what differs from it in chroma (brightness slopes cancel),
    motion is the slope of the object's centroid. The shape is told by its rotational harmonics
    c_k = |sum m (dx + i dy)^k| / sum m |d|^k over the object's mask m: a triangle has c_3, a square c_4, a disc neither, and a
    ring has a hole. Checked on clean, blurred, noisy and half-resolution clips in tests/test_metrics.py.
    """
    rgb = x.float().clamp(-1, 1).add(1).div(2)  # 3 t h w in [0, 1]
    t, h, w = rgb.shape[1:]
    border = torch.cat([rgb[:, :, :2].flatten(1), rgb[:, :, -2:].flatten(1), rgb[..., :2].flatten(1), rgb[..., -2:].flatten(1)], 1)
    ground = border.median(dim=1).values
    found = dict.fromkeys(data.WORLD)
    found["background"] = _nearest(ground, data.BACKGROUNDS)

    chroma = lambda c: c - c.mean(dim=0, keepdim=True)
    distance = (chroma(rgb) - chroma(ground)[:, None, None, None]).norm(dim=0)  # t h w
    distance = F.avg_pool2d(distance, 3, stride=1, padding=1, count_include_pad=False)  # single noisy pixels do not count
    peak = distance.flatten().kthvalue(max(1, int(0.98 * distance.numel()))).values
    mask = (distance > peak / 2).float()
    if peak < 0.15 or mask.mean() > 0.4:  # nothing stands out, or nearly everything does: the largest object fills 0.15 of a frame
        return found
    area = mask.sum(dim=(1, 2))
    seen = area > 0.5 * area.median().clamp(min=12)
    if seen.sum() < 4:
        return found
    core = distance > 0.8 * peak
    found["colour"] = _nearest(torch.stack([c[core].median() for c in rgb]), data.COLOURS)

    ys, xs = torch.arange(h) + 0.5, torch.arange(w) + 0.5
    cx, cy = (mask * xs).sum((1, 2)) / area.clamp(min=1), (mask * ys[:, None]).sum((1, 2)) / area.clamp(min=1)
    time = torch.arange(t)[seen].float()
    time = time - time.mean()
    travel = [32 * ((c[seen] * time).sum() / time.square().sum()).item() / side for c, side in ((cx, w), (cy, h))]
    if max(map(abs, travel)) > 0.06:
        axis = 0 if abs(travel[0]) > abs(travel[1]) else 1
        found["direction"] = (("left", "right"), ("up", "down"))[axis][travel[axis] > 0]
        found["speed"] = "quickly" if abs(travel[axis]) > 0.36 else "slowly"

    inside = seen & (mask[:, 0].sum(1) + mask[:, -1].sum(1) + mask[..., 0].sum(1) + mask[..., -1].sum(1) == 0)
    if inside.any():
        m, cx, cy = mask[inside], cx[inside], cy[inside]
        d = torch.complex(xs - cx[:, None, None], (ys - cy[:, None])[:, :, None])
        radius = (d.abs().square() * m).sum((1, 2)).div(m.sum((1, 2))).mul(2).sqrt()  # of the disc with this second moment
        centre = (d.abs() < 0.3 * radius[:, None, None]).float()
        fill = ((m * centre).sum((1, 2)) / centre.sum((1, 2)).clamp(min=1)).mean()
        c3, c4 = (((m * d**k).sum((1, 2)).abs() / (m * d.abs() ** k).sum((1, 2))).mean() for k in (3, 4))
        found["shape"] = "ring" if fill < 0.5 else "triangle" if c3 > 0.2 else "square" if c4 > 0.1 else "circle"
        area = m.sum((1, 2)).mean().item() / (h * w)
        found["size"] = "large" if area > SIZE_BORDER[found["shape"]] else "small"
    return found


def _nearest(colour, palette):
    return min(palette, key=lambda name: sum((c - p / 255) ** 2 for c, p in zip(colour.tolist(), palette[name])))


#: area of each shape (fraction of the frame) halfway between its small and its large version
SIZE_BORDER = {shape: factor * sum(r**2 for r in data.RADIUS.values()) / 2
               for shape, factor in {"circle": 2.78, "square": 2.56, "triangle": 1.3, "ring": 2.32}.items()}

#: the four attributes whose mean accuracy is "the" prompt fit; size and speed are reported beside it
FIT = ("colour", "shape", "direction", "background")


def prompt_fit(videos, prompts):
    """How well videos fit their prompts: {attribute: accuracy} and "mean" over FIT. `prompts`: dicts of attributes."""
    right = {name: [] for name in data.WORLD}
    for video, prompt in zip(videos, prompts, strict=True):
        found = read_attributes(video)
        for name, word in prompt.items():
            right[name].append(found[name] == word)
    scores = {name: sum(r) / len(r) for name, r in right.items() if r}
    known = [scores[name] for name in FIT if name in scores]
    return {**scores, "mean": sum(known) / max(len(known), 1)}


def chance(name):
    """Accuracy of guessing an attribute; "mean" averages over FIT."""
    return sum(map(chance, FIT)) / len(FIT) if name == "mean" else 1 / len(data.WORLD[name])
