"""The toy world: a video data set that fits in a function, and the words for it.

Each clip shows one sprite that moves over a plain, slightly shaded background, and is
described by a sentence:

    "a large red circle moving left slowly on a blue background"

Six attributes are named by the caption (WORLD); position, angle, spin, shading and
brightness vary continuously and are not, so no two clips are equal and nothing can be
memorised. Direction exists only in time. `training/toy_score.py` reads the attributes
back from the pixels.

    render(scene, frames)            one clip, uint8 [t, h, w, 3]
    random_scene(rng), caption(...)  draw attributes, say them
    toy_batch(seed, n, ...)          n clips [n, 3, t, h, w] in [-1, 1], and scenes
    ToyText()(["a red circle"])      context [b, 8, 32]: a vocabulary, not a network

    python toy.py --out out/toy      a contact sheet and an mp4 of it (three seconds)
"""
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from files import errors, options
from files.checkpoint import UserError
from files.video import contact_sheet, to_tensor, write_video

# ------------------------------------------------------------------ clips

#: attribute -> the words for it, in the order a caption names them
WORLD = {
    "size": ("small", "large"),
    "colour": ("red", "yellow", "green", "cyan", "blue", "purple"),
    "shape": ("circle", "square", "triangle", "ring"),
    "direction": ("left", "right", "up", "down"),
    "speed": ("slowly", "quickly"),
    "background": ("black", "gray", "white", "blue", "green", "brown"),
}
COLOURS = {
    "red": (230, 30, 30), "yellow": (240, 215, 20), "green": (20, 185, 40),
    "cyan": (20, 205, 220), "blue": (30, 60, 235), "purple": (190, 30, 210)}
BACKGROUNDS = {
    "black": (22, 22, 24), "gray": (120, 120, 120), "white": (226, 226, 224),
    "blue": (78, 98, 146), "green": (80, 128, 92), "brown": (138, 100, 82)}
STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FRAMES, SIZE = 16, 80  # of a clip
RADIUS = {"small": 0.2, "large": 0.3}  # of the frame's side
TRAVEL = {"slowly": 0.16, "quickly": 0.36}  # of the frame's side, in FRAMES frames


@dataclass
class Scene:
    """One clip of the toy world: six named attributes, and what the caption leaves open
    (fractions of the frame, radians)."""

    size: str
    colour: str
    shape: str
    direction: str
    speed: str
    background: str
    along: float = 0.0  # offset of the path's middle along the direction of motion, -1..1
    across: float = 0.0  # the same across it
    angle: float = 0.0
    spin: float = 0.0  # radians in FRAMES frames
    shade: tuple = (0.0, 0.0)  # background brightness slope in x and y
    light: float = 1.0  # brightness of the object
    paint: tuple | None = None  # RGB in 0..255 in place of the colour's, and
    ground: tuple | None = None  # in place of the background's: colours that no word names

    def attributes(self):
        return {name: getattr(self, name) for name in WORLD}


def random_scene(rng):
    """A scene with every attribute drawn uniformly."""
    return scene_of({name: str(rng.choice(words)) for name, words in WORLD.items()}, rng)


def scene_of(attributes, rng):
    """A scene with these attributes; what the caption leaves open is drawn from
    `rng`."""
    return Scene(
        **attributes,
        along=rng.uniform(-1, 1),
        across=rng.uniform(-1, 1),
        angle=rng.uniform(-0.25, 0.25),
        spin=rng.uniform(-0.3, 0.3),
        shade=tuple(rng.uniform(-12, 12, 2)),
        light=rng.uniform(0.9, 1.05),
    )


def caption(scene):
    """The sentence that describes a scene (or a dict of attributes; missing ones are
    left out)."""
    a = scene if isinstance(scene, dict) else scene.attributes()
    words = ["a", a.get("size"), a.get("colour"), a.get("shape", "shape")]
    if "direction" in a or "speed" in a:
        words += ["moving", a.get("direction"), a.get("speed")]
    if "background" in a:
        words += ["on a", a["background"], "background"]
    return " ".join(w for w in words if w)


def render(scene, frames=FRAMES, size=SIZE, start=0):
    """Draw a scene -> uint8 [frames, size, size, 3], anti-aliased through the sprite's
    signed distance function.

    The first frame is number `start` of the scene. Speeds are per frame: a longer clip
    goes on in the same direction (and may leave the frame).
    """
    r = RADIUS[scene.size] * size
    travel = TRAVEL[scene.speed] * size
    d = np.array(STEP[scene.direction], np.float32)
    room_along = max(size / 2 - travel / 2 - r - 1, 0)
    room_across = size / 2 - r - 1
    middle = size / 2 + scene.along * room_along * d + scene.across * room_across * d[::-1]
    t = np.arange(start, start + frames, dtype=np.float32)
    centre = middle + (t[:, None] - (FRAMES - 1) / 2) / FRAMES * travel * d  # t 2
    angle = scene.angle + scene.spin * t / FRAMES

    grid = np.arange(size, dtype=np.float32) + 0.5
    x, y = grid[None, None, :], grid[None, :, None]
    dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]  # t h w
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    distance = SHAPES[scene.shape](dx, dy, r, cos, sin)
    alpha = np.clip(0.5 - distance, 0, 1)[..., None]

    slope_x = scene.shade[0] * (grid[None, :] / size - 0.5) * 2
    slope_y = scene.shade[1] * (grid[:, None] / size - 0.5) * 2
    slope = slope_x + slope_y
    ground = np.array(scene.ground or BACKGROUNDS[scene.background], np.float32)
    ground = ground + slope[..., None].astype(np.float32)  # h w 3
    paint = np.array(scene.paint or COLOURS[scene.colour], np.float32) * scene.light
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


def toy_batch(seed, n, frames=FRAMES, size=SIZE, any_colour=False):
    """`n` random clips -> (float tensor [n, 3, frames, size, size] in [-1, 1], list of
    Scene). The same seed gives the same batch.

    any_colour: every other clip has colours that no word names. An autoencoder that has
    seen them can draw more than the toy's vocabulary.
    """
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(n)]
    if any_colour:
        for scene in scenes[1::2]:
            scene.paint, scene.ground = (tuple(rng.uniform(10, 245, 3)) for _ in range(2))
    return clips_of(scenes, frames, size), scenes


def clips_of(scenes, frames=FRAMES, size=SIZE):
    """Float tensor [n, 3, frames, size, size] in [-1, 1]."""
    return torch.stack([to_tensor(render(scene, frames, size)) for scene in scenes])


def held_out_prompts(n, seed=10_000_019):
    """`n` fixed attribute dicts for evaluation; the seed is never used in training."""
    rng = np.random.default_rng(seed)
    return [random_scene(rng).attributes() for _ in range(n)]


# ------------------------------------------------------------------ the vocabulary

SYNONYMS = {
    "big": "large", "huge": "large", "tiny": "small", "little": "small",
    "magenta": "purple", "violet": "purple", "grey": "gray", "backdrop": "background",
    "disc": "circle", "disk": "circle", "ball": "circle", "box": "square", "donut": "ring",
    "leftward": "left", "leftwards": "left", "rightward": "right", "rightwards": "right",
    "upward": "up", "upwards": "up", "downward": "down", "downwards": "down",
    "fast": "quickly", "quick": "quickly", "rapidly": "quickly", "slow": "slowly"}
FILLERS = set(
    "a an the is on over in of at to towards with and it that which moves moving moved drifting "
    "going flying gliding sliding shape object background before against front video clip "
    "showing".split())


class ToyText:
    """Toy prompts -> context rows: rules in place of a network.

    A prompt becomes one row per attribute of WORLD, each a one-hot vector of the word;
    rows of attributes that it leaves out, and the rows up to text_len, are zeros, like
    the rows past the end of a Wan prompt. The null prompt of classifier-free guidance
    is all zeros.
    """

    text_len, text_dim = 8, 32

    def __init__(self):
        words = [(name, word) for name in WORLD for word in WORLD[name]]
        self.row = {name: i for i, name in enumerate(WORLD)}
        self.column = {key: i for i, key in enumerate(words)}

    def parse(self, prompt):
        """Prompt -> ({attribute: word}, [words left out]). A colour right before
        "background" is the background's. Left out is what the toy does not know, and a
        second word for the same attribute: there is one object."""
        words = [SYNONYMS.get(w, w) for w in re.findall(r"[^\W\d_]+", prompt.lower())]
        found, unknown = {}, []
        for word, following in zip(words, words[1:] + [""]):
            of_ground = following == "background"
            slots = [name for name in WORLD if (name == "background") == of_ground]
            slot = next((name for name in slots if word in WORLD[name]), None)
            if slot and found.setdefault(slot, word) == word or word in FILLERS:
                continue
            unknown.append(word)
        return found, unknown

    def encode(self, attributes):
        """List of {attribute: word} -> context [b, 8, 32]."""
        context = torch.zeros(len(attributes), self.text_len, self.text_dim)
        for b, given in enumerate(attributes):
            for name, word in given.items():
                context[b, self.row[name], self.column[name, word]] = self.text_dim**0.5
        return context

    def __call__(self, prompts):
        """List of sentences -> context [b, 8, 32]. Warns of words it does not know; a
        prompt without any known word is a UserError."""
        attributes = []
        for prompt in prompts:
            found, unknown = self.parse(prompt)
            if not found:
                raise UserError(f"the toy model knows no word of {prompt!r}. {self.vocabulary()}")
            if unknown:
                words = ", ".join(map(repr, dict.fromkeys(unknown)))
                warnings.warn(f"the toy model leaves out {words}. {self.vocabulary()}")
            attributes.append(found)
        return self.encode(attributes)

    def null(self, n):
        """The unconditional context, [n, 8, 32]."""
        return torch.zeros(n, self.text_len, self.text_dim)

    @staticmethod
    def vocabulary():
        lists = [f"{name}: {', '.join(words)}" for name, words in WORLD.items()]
        return f"It knows {'; '.join(lists)}."


def words():
    """The vocabulary for people, a line per attribute, and an example."""
    lines = [f"{name:12s}{', '.join(of)}" for name, of in WORLD.items()]
    example = caption({name: of[-1] for name, of in WORLD.items()})
    return "\n".join([*lines, "", f'python sample.py --prompt "{example}"'])


# ------------------------------------------------------------------ command line


def main():
    p = options.Parser(description="Show the toy world: a contact sheet and an mp4.")
    p.add_argument("--out", default="out/toy", help="folder for the results (out/toy)")
    p.add_argument("--clips", type=options.whole(1, 1000), default=12, help="how many (12)")
    p.add_argument("--seed", type=options.seed, default=0, help="of what is drawn (0)")
    args, _ = p.parse()
    out, (videos, scenes) = Path(args.out), toy_batch(args.seed, args.clips)
    contact_sheet(out / "toy.png", videos, labels=[caption(s) for s in scenes])
    write_video(out / "toy.mp4", list(videos), fps=16, scale=4)
    print(f"wrote {out}/toy.png and {out}/toy.mp4")


if __name__ == "__main__":
    with errors.user_errors():
        main()
