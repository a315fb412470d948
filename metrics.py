"""How good a video is: PSNR, SSIM, and how well a toy video fits its prompt."""
import math

import torch


def psnr(y, x):
    """Mean over frames of the PSNR of y against x, both [b, c, t, h, w] in [-1, 1], in dB, on 8-bit values (spec dc-ae-v 8.2)."""
    y, x = ((v.float().clamp(-1, 1) * 127.5 + 128).floor().clamp(max=255) for v in (y, x))
    mse = (y - x).square().mean(dim=(1, 3, 4))
    return (10 * torch.log10(255**2 / mse.clamp(min=1e-10))).mean().item()


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
