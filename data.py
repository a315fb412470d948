"""Clips: the procedural toy world, reading video files, writing mp4 and contact sheets.

**The toy world** is a video data set that fits in a function. Each clip shows one sprite moving over a plain, slightly shaded
background, and is described by a sentence:

    "a large red circle moving left slowly on a blue background"

Six attributes are named by the caption (WORLD); position, angle, spin, shading and brightness vary continuously and are not, so no two
clips are equal and nothing can be memorised. Direction exists only in time. `metrics.py` reads the attributes back from the pixels.

    render(scene, frames)            one clip, uint8 [t, h, w, 3]
    random_scene(rng), caption(...)  draw attributes, say them
    toy_batch(seed, n, ...)          n clips as a tensor [n, 3, t, h, w] in [-1, 1], with their scenes

**Files**: `read_clip`, `read_image`, `write_video`, `contact_sheet`. Pixels are RGB in [-1, 1], layout [3, t, h, w], everywhere in the project.

    python data.py --out out/toy      writes a contact sheet of the toy world
"""
import argparse
import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

import checkpoint
from checkpoint import UserError

# ---------------------------------------------------------------------------------------------------- the toy world

#: attribute -> the words for it, in the order a caption names them
WORLD = {
    "size": ("small", "large"),
    "colour": ("red", "yellow", "green", "cyan", "blue", "purple"),
    "shape": ("circle", "square", "triangle", "ring"),
    "direction": ("left", "right", "up", "down"),
    "speed": ("slowly", "quickly"),
    "background": ("black", "gray", "white", "blue", "green", "brown"),
}
COLOURS = {"red": (230, 30, 30), "yellow": (240, 215, 20), "green": (20, 185, 40), "cyan": (20, 205, 220),
           "blue": (30, 60, 235), "purple": (190, 30, 210)}
BACKGROUNDS = {"black": (22, 22, 24), "gray": (120, 120, 120), "white": (226, 226, 224), "blue": (78, 98, 146),
               "green": (80, 128, 92), "brown": (138, 100, 82)}
STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
RADIUS = {"small": 0.15, "large": 0.23}  # of the frame's side
TRAVEL = {"slowly": 0.24, "quickly": 0.48}  # of the frame's side, in 32 frames


@dataclass
class Scene:
    """One clip of the toy world: six named attributes, and what the caption leaves open (fractions of the frame, radians)."""

    size: str
    colour: str
    shape: str
    direction: str
    speed: str
    background: str
    along: float = 0.0  # offset of the path's middle along the direction of motion, -1..1
    across: float = 0.0  # the same across it
    angle: float = 0.0
    spin: float = 0.0  # radians in 32 frames
    shade: tuple = (0.0, 0.0)  # background brightness slope in x and y
    light: float = 1.0  # brightness of the object

    def attributes(self):
        return {name: getattr(self, name) for name in WORLD}


def random_scene(rng):
    """A scene with every attribute drawn uniformly."""
    return scene_of({name: str(rng.choice(words)) for name, words in WORLD.items()}, rng)


def scene_of(attributes, rng):
    """A scene with these attributes; what the caption leaves open is drawn from `rng`."""
    return Scene(**attributes, along=rng.uniform(-1, 1), across=rng.uniform(-1, 1), angle=rng.uniform(-0.25, 0.25),
                 spin=rng.uniform(-0.3, 0.3), shade=tuple(rng.uniform(-12, 12, 2)), light=rng.uniform(0.9, 1.05))


def caption(scene):
    """The sentence that describes a scene (or a dict of attributes; missing ones are left out)."""
    a = scene if isinstance(scene, dict) else scene.attributes()
    words = ["a", a.get("size"), a.get("colour"), a.get("shape", "shape")]
    if "direction" in a or "speed" in a:
        words += ["moving", a.get("direction"), a.get("speed")]
    if "background" in a:
        words += ["on a", a["background"], "background"]
    return " ".join(w for w in words if w)


def render(scene, frames=32, size=64, start=0):
    """Draw a scene -> uint8 [frames, size, size, 3], anti-aliased through the sprite's signed distance function.

    The first frame is number `start` of the scene. Speeds are per frame: a longer clip goes on in the same direction (and may leave the frame).
    """
    r = RADIUS[scene.size] * size
    travel = TRAVEL[scene.speed] * size
    d = np.array(STEP[scene.direction], np.float32)
    room_along = max(size / 2 - travel / 2 - r - 1, 0)
    room_across = size / 2 - r - 1
    middle = size / 2 + scene.along * room_along * d + scene.across * room_across * d[::-1]
    t = np.arange(start, start + frames, dtype=np.float32)
    centre = middle + (t[:, None] - 15.5) / 32 * travel * d  # t 2
    angle = scene.angle + scene.spin * t / 32

    grid = np.arange(size, dtype=np.float32) + 0.5
    dx, dy = grid[None, None, :] - centre[:, 0, None, None], grid[None, :, None] - centre[:, 1, None, None]  # t h w
    distance = SHAPES[scene.shape](dx, dy, r, np.cos(angle)[:, None, None], np.sin(angle)[:, None, None])
    alpha = np.clip(0.5 - distance, 0, 1)[..., None]

    slope = scene.shade[0] * (grid[None, :] / size - 0.5) * 2 + scene.shade[1] * (grid[:, None] / size - 0.5) * 2
    ground = np.array(BACKGROUNDS[scene.background], np.float32) + slope[..., None].astype(np.float32)  # h w 3
    paint = np.array(COLOURS[scene.colour], np.float32) * scene.light
    return np.clip(ground[None] + alpha * (paint - ground[None]) + 0.5, 0, 255).astype(np.uint8)


def _circle(dx, dy, r, c, s):
    return np.sqrt(dx * dx + dy * dy) - 0.94 * r


def _ring(dx, dy, r, c, s):
    return np.abs(np.sqrt(dx * dx + dy * dy) - 0.76 * r) - 0.24 * r


def _square(dx, dy, r, c, s):
    return np.maximum(np.abs(dx * c + dy * s), np.abs(dy * c - dx * s)) - 0.8 * r


def _triangle(dx, dy, r, c, s):
    u, v = dx * c + dy * s, dy * c - dx * s + 0.12 * r  # apex up, centroid in the middle
    return np.maximum(v - 0.5 * r, 0.866 * np.abs(u) - 0.5 * v - 0.5 * r)


#: signed distance to each shape, in pixels: negative inside
SHAPES = {"circle": _circle, "square": _square, "triangle": _triangle, "ring": _ring}


def toy_batch(seed, n, frames=32, size=64, start=0):
    """`n` random clips -> (float tensor [n, 3, frames, size, size] in [-1, 1], list of Scene). The same seed gives the same batch.

    `start=None` draws the first frame of each clip from the 32 that a scene is made for.
    """
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(n)]
    starts = rng.integers(0, max(33 - frames, 1), n) if start is None else [start] * n
    return torch.stack([to_tensor(render(s, frames, size, int(t))) for s, t in zip(scenes, starts)]), scenes


def held_out_prompts(n, seed=10_000_019):
    """`n` fixed attribute dicts for evaluation; the seed is never used in training."""
    rng = np.random.default_rng(seed)
    return [random_scene(rng).attributes() for _ in range(n)]


# ---------------------------------------------------------------------------------------------------- pixels


def to_tensor(frames):
    """uint8 [t, h, w, 3] -> float32 [3, t, h, w] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float().div_(127.5).sub_(1)


def to_uint8(x):
    """float [3, t, h, w] in [-1, 1] -> uint8 [t, h, w, 3], rounded and clamped (spec dc-ae-v 6). NaN is a UserError: it would be black."""
    if not torch.isfinite(x).all():
        raise UserError("the video holds NaN or infinite values, so nothing was written: use --dtype fp32, or other weights.")
    return (x.float() * 127.5 + 128).clamp_(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


# ---------------------------------------------------------------------------------------------------- pictures


def contact_sheet(path, videos, columns=8, labels=None, scale=2):
    """One row of `columns` evenly spaced frames per video ([3, t, h, w] in [-1, 1]), as a PNG."""
    rows = []
    for x in videos:
        frames = to_uint8(x[:, np.linspace(0, x.shape[1] - 1, columns).round().astype(int)])
        rows.append(np.concatenate([np.pad(f, ((1, 1), (1, 1), (0, 0)), constant_values=255) for f in frames], axis=1))
    width = max(r.shape[1] for r in rows)
    rows = [np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0)), constant_values=255) for r in rows]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.NEAREST)
    if labels:
        draw, y = ImageDraw.Draw(sheet), 0
        for row, label in zip(rows, labels):
            draw.text((5, y + 3), label, fill=(255, 255, 255), stroke_width=2, stroke_fill=(0, 0, 0))
            y += row.shape[0] * scale
    with checkpoint.atomic_path(path) as tmp:
        sheet.save(tmp)
