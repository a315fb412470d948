"""How well a toy video fits its prompt: a score that needs no network.

    read_attributes(video)        {attribute: the word for it}, from the pixels
    prompt_fit(videos, prompts)   share of the attributes shown as they were asked for

The mean is over FIT, what a viewer sees at once; size and speed are reported beside it.
"""
import torch
import torch.nn.functional as F

from toy import BACKGROUNDS, COLOURS, FRAMES, RADIUS, TRAVEL, WORLD


def read_attributes(x, colours=COLOURS):
    """Read the toy world's attributes back from a video: [3, t, h, w] in [-1, 1] ->
    {attribute: word, or None where undecidable}.

    No network: the background is the median of the border, the object is what differs
    from it in chroma (brightness slopes cancel), motion is the slope of the object's
    centroid. Checked on clean, blurred, noisy and half-resolution clips in
    tests/test_training_toy_score.py.
    """
    rgb = x.float().clamp(-1, 1).add(1).div(2)  # 3 t h w in [0, 1]
    edges = rgb[:, :, :2], rgb[:, :, -2:], rgb[..., :2], rgb[..., -2:]
    ground = torch.cat([edge.flatten(1) for edge in edges], dim=1).median(dim=1).values
    found = dict.fromkeys(WORLD)
    found["background"] = _nearest(ground, BACKGROUNDS)

    distance = (_chroma(rgb) - _chroma(ground)[:, None, None, None]).norm(dim=0)  # t h w
    # single noisy pixels do not count
    distance = F.avg_pool2d(distance, 3, stride=1, padding=1, count_include_pad=False)
    peak = distance.flatten().kthvalue(max(1, int(0.98 * distance.numel()))).values
    mask = (distance > peak / 2).float()
    if peak < 0.15 or mask.mean() > 0.4:  # nothing, or nearly all, stands out
        return found
    area = mask.sum(dim=(1, 2))
    seen = area > 0.5 * area.median().clamp(min=12)
    if seen.sum() < 4:
        return found
    core = distance > 0.8 * peak
    found["colour"] = _nearest(torch.stack([c[core].median() for c in rgb]), colours)
    found |= _read_motion(mask, area, seen)

    edges = mask[:, 0], mask[:, -1], mask[..., 0], mask[..., -1]
    inside = seen & (sum(edge.sum(dim=1) for edge in edges) == 0)
    if inside.any():
        found |= _read_shape(mask[inside])
    return found


def _chroma(colours):
    return colours - colours.mean(dim=0, keepdim=True)


def _centroids(mask):
    """mask [t, h, w] -> x, y [t] in pixels, and the coordinates x [w], y [h]."""
    h, w = mask.shape[1:]
    ys, xs = torch.arange(h) + 0.5, torch.arange(w) + 0.5
    area = mask.sum(dim=(1, 2)).clamp(min=1)
    return (mask * xs).sum((1, 2)) / area, (mask * ys[:, None]).sum((1, 2)) / area, xs, ys


def _read_motion(mask, area, seen):
    """Direction and speed of a mask [t, h, w], by the frames in which it is seen."""
    t, h, w = mask.shape
    cx, cy, _, _ = _centroids(mask)
    time = torch.arange(t)[seen].float()
    time = time - time.mean()
    travel = []  # in x and y, as shares of the side, in FRAMES frames
    for centre, side in ((cx, w), (cy, h)):
        slope = (centre[seen] * time).sum() / time.square().sum()
        travel.append(FRAMES * slope.item() / side)
    if max(map(abs, travel)) <= 0.06:
        return {}
    axis = 0 if abs(travel[0]) > abs(travel[1]) else 1
    words = (("left", "right"), ("up", "down"))[axis]
    speed = "quickly" if abs(travel[axis]) > SPEED_BORDER else "slowly"
    return dict(direction=words[travel[axis] > 0], speed=speed)


def _read_shape(m):
    """Shape and size of masks m [t, h, w] that lie inside their frames.

    The shape is told by its rotational harmonics, c_k = |sum m (dx + i dy)^k| / sum m
    |d|^k: a triangle has c_3, a square c_4, a disc neither, and a ring has a hole.
    """
    cx, cy, xs, ys = _centroids(m)
    d = torch.complex(xs - cx[:, None, None], (ys - cy[:, None])[:, :, None])
    area = m.sum((1, 2))
    # of the disc with this second moment
    radius = (d.abs().square() * m).sum((1, 2)).div(area).mul(2).sqrt()
    centre = (d.abs() < 0.3 * radius[:, None, None]).float()
    fill = ((m * centre).sum((1, 2)) / centre.sum((1, 2)).clamp(min=1)).mean()

    def harmonic(k):
        return ((m * d**k).sum((1, 2)).abs() / (m * d.abs() ** k).sum((1, 2))).mean()

    if fill < 0.5:
        shape = "ring"
    elif harmonic(3) > 0.2:
        shape = "triangle"
    else:
        shape = "square" if harmonic(4) > 0.1 else "circle"
    share = area.mean().item() / (m.shape[1] * m.shape[2])
    return dict(shape=shape, size="large" if share > SIZE_BORDER[shape] else "small")


def _nearest(colour, palette):
    def distance(name):
        return sum((c - p / 255) ** 2 for c, p in zip(colour.tolist(), palette[name]))

    return min(palette, key=distance)


AREA = {"circle": 2.78, "square": 2.56, "triangle": 1.3, "ring": 2.32}  # over radius^2
SPEED_BORDER = sum(TRAVEL.values()) / 2
#: share of the frame halfway between a shape's small and its large version
MIDDLE = sum(r**2 for r in RADIUS.values()) / 2
SIZE_BORDER = {shape: factor * MIDDLE for shape, factor in AREA.items()}

#: whose mean accuracy is "the" prompt fit; size and speed are reported beside it
FIT = ("colour", "shape", "direction", "background")


def prompt_fit(videos, prompts, colours=COLOURS):
    """How well videos fit their prompts: {attribute: accuracy} and "mean" over FIT.
    `prompts`: dicts of attributes. colours: the palette to choose from, {word: RGB}."""
    right = {name: [] for name in WORLD}
    for video, prompt in zip(videos, prompts, strict=True):
        found = read_attributes(video, colours)
        for name, word in prompt.items():
            right[name].append(found[name] == word)
    scores = {name: sum(r) / len(r) for name, r in right.items() if r}
    known = [scores[name] for name in FIT if name in scores]
    return {**scores, "mean": sum(known) / max(len(known), 1)}


def shows_something(videos):
    """Share of videos in which an object is found."""
    found = [read_attributes(video)["colour"] is not None for video in videos]
    return sum(found) / len(found)


def chance(name):
    """Accuracy of guessing an attribute; "mean" averages over FIT."""
    return sum(map(chance, FIT)) / len(FIT) if name == "mean" else 1 / len(WORLD[name])
