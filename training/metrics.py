"""How good a video is: the table an autoencoder is judged by.

`evaluate` runs any autoencoder over clips and gives the numbers of the published evaluation:
PSNR and SSIM compare pixels, LPIPS what a picture network sees, FVD two crowds of clips
(training/judges.py). None of them tells of two faults that every viewer notices, so there
are two more, defined here:

    flicker    is motion further off where one chunk of frames ends and the next begins?
               1: borders are no worse than the rest
    grid       do the cells of the latent show on walls and skies, in levels of 0..255? 0: no

LPIPS and FVD need packages that bring their networks; where one is missing the rest is
measured, and the result says what is missing.

    through = lambda x: net.decode(net.encode(x))
    result = metrics.evaluate(through, clips, borders={"chunk": (40, 0)}, cell=32)
    print(metrics.format_table({"DC-AE-V": result["mean"]}))
"""
import math
from collections import defaultdict

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from files.checkpoint import UserError
from training import judges
from training.losses import Perceptual


# -------------------------------------------------------------- distance to the original
#
# y is compared with x, both [b, c, t, h, w] in [-1, 1], frame by frame on 8-bit values, as
# files hold them.


def psnr(y, x):
    """Mean PSNR over frames in dB. Frames without any error (infinite PSNR) are left out, as in
    the published evaluation."""
    return finite_mean(psnr_frames(y, x))


def psnr_frames(y, x):
    """10 log10(255^2 / mean squared error) of every frame: [b, t], in dB."""
    error = (_eight_bit(y) - _eight_bit(x)).square().mean(dim=(1, 3, 4))
    return 10 * torch.log10(255**2 / error)


def finite_mean(frames):
    """The mean of the values that are not infinite; infinity where all are (every frame is
    equal). NaN stays NaN."""
    counted = frames[frames != math.inf]
    return counted.mean().item() if counted.numel() else math.inf


def ssim(y, x):
    """Mean structural similarity over frames: 1 is equal."""
    return ssim_frames(y, x).mean().item()


def ssim_frames(y, x):
    """Structural similarity of every frame, [b, t]: 11x11 Gaussian window of sigma 1.5, K1 0.01,
    K2 0.03, reflected at the border; all of it local means under the window.

        ssim = (2 m_x m_y + c1) (2 cov_xy + c2) / ((m_x^2 + m_y^2 + c1) (var_x + var_y + c2))

    One frame at a time, since the maps take five times the memory of what they compare.
    """
    pairs = zip(_eight_bit(y).unbind(2), _eight_bit(x).unbind(2))
    return torch.stack([_ssim(a, b) for a, b in pairs], dim=1)


def check_size(height, width):
    """UserError where frames are too small for the window to be reflected at their border."""
    if min(height, width) < 6:
        raise UserError(f"frames of {height}x{width} are too small for SSIM, which needs 6 "
                        "pixels: use a larger --size, or another clip.")


def _ssim(y, x):  # [b, c, h, w] in 0..255 -> [b]
    mx, my, xx, yy, xy = _blur(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    variances = (xx - mx * mx).clamp(min=0) + (yy - my * my).clamp(min=0)
    above = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    below = (mx * mx + my * my + c1) * (variances + c2)
    return (above / below).mean(dim=(1, 2, 3))


def _blur(m):  # b c h w
    # sums, since convolutions on a GPU may round to TF32, which ruins a variance
    h, w = m.shape[2:]
    g = torch.exp(-torch.arange(-5.0, 6.0).square() / (2 * 1.5**2))
    m = F.pad(m, (5, 5, 5, 5), mode="reflect")
    for axis, n in ((2, h), (3, w)):
        m = sum(k * m.narrow(axis, i, n) for i, k in enumerate((g / g.sum()).tolist()))
    return m


def _eight_bit(v):
    return (v.float().clamp(-1, 1) * 127.5 + 128).floor().clamp(max=255)


# -------------------------------------------------------------- what viewers notice
#
# Not rounded to 8 bits: a step of half a level is the network's fault, whether or not it
# survives rounding on this very colour.


def temporal_error(y, x):
    """Mean |(y[i+1] - y[i]) - (x[i+1] - x[i])| of each pair of neighbouring frames, in levels of
    0..255: [b, t - 1]."""
    return 127.5 * (y.float().clamp(-1, 1) - x.float()).diff(dim=2).abs().mean(dim=(1, 3, 4))


def flicker(y, x, period, lead=0):
    """Mean temporal error of the pairs of frames that cross a border over that of the pairs that
    do not: 1 is no border to be seen, 2 motion twice as far off where chunks meet.

    A border lies before each frame lead + k period: (period, lead) is (chunk, 0) for DC-AE-V's
    chunks, (4, 0) for its latent frames, and (4, 1) for those of Wan, whose first stands for
    one frame. Every chunk border is a border of latent frames as well, so look at both. NaN
    where the clip does not have both kinds of pairs.
    """
    return _ratio(*_at_borders(temporal_error(y, x), period, lead))


def _at_borders(errors, period, lead):  # [..., t - 1] -> those at borders, those inside
    at = (torch.arange(1, errors.shape[-1] + 1, device=errors.device) - lead) % period == 0
    return errors[..., at].flatten(), errors[..., ~at].flatten()


def _ratio(border, inside):
    if not border.numel() or not inside.numel():
        return math.nan
    border, inside = border.mean().item(), inside.mean().item()
    if inside:
        return border / inside
    return math.inf if border else 1.0


def grid(y, x, cell):
    """How strongly the error y - x repeats from cell to cell of cell x cell pixels: RMS of the
    repeating pattern in levels of 0..255.

    Meant for flat and smooth pictures (`colour_fields`), where nothing else repeats. In each
    frame and channel,

        r = (y - x) - its mean over the cell x cell pixels around     what is smooth goes
        m[a, b] = mean of r over all cells at place (a, b)            the pattern
        V = var(m) - (var(r) - var(m)) / (cells - 1)                  less what noise leaves in m

    and grid = sqrt(mean V), 0 if that is negative. Checkerboards of 2 or 4 pixels repeat with
    the cell too, and count.
    """
    h, w = x.shape[3:]
    rows, columns = (h - cell + 1) // cell, (w - cell + 1) // cell
    if min(rows, columns) < 2:
        raise UserError(f"a grid of {cell} pixels shows from {3 * cell - 1} pixels a side on, got "
                        f"{h}x{w}: give larger pictures.")
    r = 127.5 * (y.float().clamp(-1, 1) - x.float()).flatten(0, 2)  # n h w
    # of the pixels that have a whole cell around them
    around = F.avg_pool2d(F.avg_pool2d(r, (cell, 1), stride=1), (1, cell), stride=1)
    inner = r[:, cell // 2 :, cell // 2 :]
    whole = (slice(None), slice(rows * cell), slice(columns * cell))
    r = inner[whole] - around[whole]
    m = rearrange(r, "n (i a) (j b) -> n (i j) (a b)", a=cell, b=cell).mean(dim=1)
    var_m, var_r = m.var(dim=1, correction=0), r.flatten(1).var(dim=1, correction=0)
    pattern = var_m - (var_r - var_m) / (rows * columns - 1)
    return pattern.mean().clamp(min=0).sqrt().item()


def colour_fields(frames=8, side=256):
    """Still clips without any detail, on which only the autoencoder can draw: [8, 3, frames,
    side, side], six colours and two gradients."""
    colours = torch.tensor([(0, 0, 0), (-0.8, -0.8, -0.8), (0.8, 0.8, 0.8),
                            (0.7, -0.5, -0.5), (-0.2, 0.3, 0.8), (0.7, 0.4, 0.2)])
    ramp = torch.linspace(-0.6, 0.6, side).expand(side, side)
    grey = torch.stack([ramp, ramp, ramp])
    colourful = torch.stack([0.5 * (ramp + ramp.T), 0.3 * ramp, -0.5 * ramp.T])
    flat = repeat(colours, "n c -> n c h w", h=side, w=side)
    pictures = torch.cat([flat, grey[None], colourful[None]])
    return pictures[:, :, None].repeat(1, 1, frames, 1, 1)


# -------------------------------------------------------------- the table


def optional_networks(columns):
    """The networks of the columns that need a package -> ({column: network}, {column: why it is
    left out})."""
    nets, left_out = {}, {}
    for column in columns:
        try:
            if column == "lpips":
                nets[column] = Perceptual("lpips-alex")
            elif column == "lite0":
                nets[column] = Perceptual("efficientnet-lite0")
            elif column == "fvd":
                nets[column] = judges.I3D.load()
        except UserError as e:
            left_out[column] = str(e)
    return nets, left_out


@torch.no_grad()
def evaluate(reconstruct, clips, borders=None, cell=None, optional=("lpips", "lite0", "fvd")):
    """Judge an autoencoder -> dict(mean={column: number}, clips=[a dict per clip],
    left_out={column: reason}).

    reconstruct: x [1, 3, t, h, w] in [-1, 1] -> y of the same shape. clips: iterable of (name,
    x [3, t, h, w]), one in memory at a time. borders: {name: (period, lead)}, each a column
    "flicker NAME"; cell: side of a latent cell in pixels, for the column "grid". optional: the
    columns to try that need a package: "lpips" (AlexNet), "lite0" (EfficientNet-Lite0, not
    LPIPS), "fvd".

    Means run over all frames of all clips; PSNR leaves out and counts frames without any error
    ("equal_frames"). A flicker's mean is that of the mean errors. FVD and grid belong to all
    clips together. Each clip has its "psnr_frames" too, to plot over time.
    """
    nets, left_out = optional_networks(optional)
    i3d, rows, features = nets.pop("fvd", None), [], []
    frames, pairs = defaultdict(list), defaultdict(list)  # of each column

    for name, x in clips:
        x = x[None]
        y = reconstruct(x).to(x)
        if y.shape != x.shape:
            raise UserError(f"the autoencoder makes {list(y.shape)} of {name}, which is "
                            f"{list(x.shape)}: pad before and crop after.")
        y8, x8 = (_eight_bit(v) / 127.5 - 1 for v in (y, x))
        found = dict(psnr=psnr_frames(y, x), ssim=ssim_frames(y, x))
        for column, net in nets.items():
            found[column] = net.to(x.device).per_frame(y8, x8)
        row = dict(name=str(name), frames=x.shape[2], height=x.shape[3], width=x.shape[4])
        for column, values in found.items():
            frames[column].append(values[0].cpu())
            row[column] = finite_mean(values[0])
        for border, where in (borders or {}).items():
            column = f"flicker {border}"
            pairs[column].append(_at_borders(temporal_error(y, x).cpu(), *where))
            row[column] = _ratio(*pairs[column][-1])
        rows.append({**row, "psnr_frames": frames["psnr"][-1].tolist()})
        if i3d and x.shape[2] < 9:
            i3d, left_out["fvd"] = None, f"{name} has {x.shape[2]} frames, but I3D needs 9."
        if i3d:
            features.append([judges.features(i3d.to(x.device), v) for v in (y8, x8)])
    if not rows:
        raise UserError("there are no clips to evaluate on: give a folder that has some.")

    mean = {column: finite_mean(torch.cat(values)) for column, values in frames.items()}
    for column, both in pairs.items():
        border, inside = zip(*both)
        mean[column] = _ratio(torch.cat(border), torch.cat(inside))
    if i3d and len(rows) > 1:
        made, original = zip(*features)
        mean["fvd"] = judges.frechet(torch.cat(made), torch.cat(original))
    elif i3d:
        left_out["fvd"] = "it compares crowds: give two clips or more, better hundreds."
    if cell:
        fields = colour_fields(side=max(256, 4 * cell)).to(x.device)
        drawn = [reconstruct(field[None]).to(field) for field in fields]
        mean["grid"] = grid(torch.cat(drawn), fields, cell)
    mean["equal_frames"] = int(torch.cat(frames["psnr"]).isinf().sum())
    mean["clips"] = len(rows)
    return dict(mean=mean, clips=rows, left_out=left_out)


#: heading and digits of a column; the columns stand in this order, flicker before grid
COLUMNS = {
    "psnr": ("PSNR dB", 2),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
    "lite0": ("Lite0 features (not LPIPS)", 4),
    "fvd": ("FVD", 1),
    "fit": ("prompt fit", 3),
    "flicker": ("flicker", 2),
    "grid": ("grid", 2),
    "psnr_full": ("PSNR to full dB", 2),
    "ms": ("ms/frame", 2),
    "mib": ("decode MiB", 0),
    "clips": ("clips", 0),
}


def format_table(rows):
    """{name: the "mean" of an evaluation} -> Markdown table, one line per name and one column
    per number that any of them has."""
    present = {}  # column -> digits
    for known, (_, digits) in COLUMNS.items():
        for row in rows.values():
            for column in row:
                if column.split()[0] == known:  # "flicker chunk" is a "flicker"
                    present[column] = digits
    table = [[""]]
    for column in present:
        known = column.split()[0]
        table[0].append(column.replace(known, COLUMNS[known][0]))
    for name, row in rows.items():
        table.append([name])
        for column, digits in present.items():
            table[-1].append(f"{row[column]:.{digits}f}" if column in row else "-")
    return markdown(table)


def markdown(table):
    """Rows of cells, the headings first -> Markdown table, which is one to the eye too."""
    columns = []
    for i, column in enumerate(zip(*table)):
        cells = list(map(str, column))
        width = max(map(len, cells))
        cells.insert(1, "-" * width if i == 0 else "-" * (width - 1) + ":")
        columns.append([cell.rjust(width) if i else cell.ljust(width) for cell in cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns))


def latent_statistics(latents):
    """Mean, RMS, 1 / RMS and standard deviation over all elements of an iterable of latents,
    summed in float64. 1 / RMS is the scale that a diffusion model wants."""
    n, total, squares = 0, 0.0, 0.0
    for z in latents:
        z = z.double()
        n += z.numel()
        total += z.sum().item()
        squares += z.square().sum().item()
    mean, rms = total / n, math.sqrt(squares / n)
    std = math.sqrt(max(squares / n - mean**2, 0))
    return dict(mean=mean, rms=rms, inverse_rms=1 / rms, std=std)
