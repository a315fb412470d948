"""The pictures of the README.

    python docs/figures.py          a minute -> docs/sample.gif, adaptation.png, temporal.png

sample.gif is the video of the README's first command, made anew.
"""
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
from files import ROOT, checkpoint, video

DOCS = ROOT / "docs"
PROMPT = "a large red circle moving left slowly on a blue background"

GREY, BLUE, RED = "#c9ccd1", "#4878cf", "#d1603d"
FRAMES, CHUNK, LAYERS, SEEN_FROM = 12, 4, 4, 5
#: rule -> frames that a convolution looks at from frame j, before those of its layer end
REACH = {"causal": (-2, -1, 0), "chunk-causal": (-1, 0, 1), "non-causal": (-1, 0, 1)}


def animation(path):
    """What the first command makes, as an animated GIF."""
    with tempfile.TemporaryDirectory() as folder:
        sample.main(["--prompt", PROMPT, "--out", folder, "--name", "sample"])
        clip = video.to_uint8(video.read_clip(Path(folder) / "sample.mp4"))
    pictures = [Image.fromarray(frame).quantize(64) for frame in clip]
    with checkpoint.atomic_path(path) as tmp:
        pictures[0].save(tmp, "GIF", save_all=True, append_images=pictures[1:], loop=0,
                         duration=1000 // 16, optimize=True)


def inputs_of(rule, frame):
    """The frames of one layer's input that a frame of its output sees."""
    found = [frame + offset for offset in REACH[rule] if 0 <= frame + offset < FRAMES]
    if rule == "chunk-causal":  # nothing flows back across a border
        found = [f for f in found if f // CHUNK <= frame // CHUNK]
    return found


def temporal(path):
    """What a frame may see: layers of dots, and the ways into one output frame."""
    with video.figure(path, 1, 3, size=(4.2, 2.9)) as axes:
        for ax, rule in zip(axes[0], REACH):
            seen = {SEEN_FROM}
            for layer in range(LAYERS, -1, -1):
                colours = [BLUE if f in seen else GREY for f in range(FRAMES)]
                if layer == LAYERS:
                    colours[SEEN_FROM] = RED
                ax.scatter(range(FRAMES), [layer] * FRAMES, s=60, c=colours, zorder=3)
                if layer == 0:
                    break
                for f in range(FRAMES):
                    for g in inputs_of(rule, f):
                        style = dict(color=BLUE, lw=1.4) if f in seen else dict(color=GREY, lw=0.5)
                        ax.annotate("", (f, layer - 0.12), (g, layer - 0.88), zorder=1 + (f in seen),
                                    arrowprops=dict(arrowstyle="->", shrinkA=0, shrinkB=0, **style))
                seen = {g for f in seen for g in inputs_of(rule, f)}
            if rule == "chunk-causal":
                for border in range(CHUNK, FRAMES, CHUNK):
                    ax.axvline(border - 0.5, color="black", linestyle=":", lw=1)
            ax.set(title=rule, yticks=(0, LAYERS), yticklabels=("input", "output"),
                   xticks=range(FRAMES), xlabel="frame")
            ax.tick_params(length=0)
            ax.spines[:].set_visible(False)


#: column -> (title, what is below it, parts from the latent upwards: (text, state))
COLUMNS = [
    ("base", "as it came",
     [("latent, 8x8 pixels a cell", "given"), ("patch embedder", "given"), ("blocks", "given"),
      ("head", "given")]),
    ("1a", "embedder imitates\nthe base's embeddings",
     [("latent, 32x32 a cell", "given"), ("new embedder", "trained"), ("", "none"), ("", "none")]),
    ("1b", "flow-matching loss,\nblocks frozen",
     [("latent, 32x32 a cell", "given"), ("new embedder", "trained"), ("blocks", "frozen"),
      ("new head", "trained")]),
    ("2", "the same loss, LoRA on\nthe blocks: light, end to end",
     [("latent, 32x32 a cell", "given"), ("new embedder", "trained"), ("blocks + LoRA", "lora"),
      ("new head", "trained")]),
    ("result", "merged: the base's blocks,\na quarter of its tokens",
     [("latent, 32x32 a cell", "given"), ("new embedder", "new"), ("blocks", "new"),
      ("new head", "new")]),
]
FACES = dict(given=GREY, frozen=GREY, trained=RED, lora=GREY, new=BLUE)


def adaptation(path):
    """The stages of AE-Adapt-V: which part is trained when."""
    from matplotlib.patches import Rectangle

    heights = (0.7, 0.7, 1.6, 0.7)
    with video.figure(path, size=(12.4, 4.2)) as axes:
        ax = axes[0, 0]
        for column, (title, below, parts) in enumerate(COLUMNS):
            x, y = 3.0 * column, 0.0
            for (text, state), height in zip(parts, heights):
                if state != "none":
                    ax.add_patch(Rectangle((x, y), 2.3, height, facecolor=FACES[state],
                                           edgecolor="black", lw=0.8))
                    if state == "lora":
                        for strip in range(5):
                            ax.add_patch(Rectangle((x + 0.2 + 0.4 * strip, y + 0.1), 0.12,
                                                   height - 0.2, facecolor=RED))
                    colour = "black" if FACES[state] == GREY else "white"
                    box = dict(facecolor=GREY, edgecolor="none", pad=2) if state == "lora" else None
                    ax.text(x + 1.15, y + height / 2, text, ha="center", va="center",
                            color=colour, fontsize=9, bbox=box)
                y += height + 0.25
            ax.text(x + 1.15, y + 0.05, title, ha="center", fontsize=12, weight="bold")
            ax.text(x + 1.15, -0.25, below, ha="center", va="top", fontsize=9)
        middle = heights[0] + 0.25 + heights[1] / 2
        ax.annotate("", (3.0, middle), (2.3, middle), arrowprops=dict(arrowstyle="->", lw=1.5))
        ax.text(2.65, middle + 0.12, "MSE", ha="center", fontsize=9)
        for column in range(1, len(COLUMNS) - 1):
            x = 3.0 * column + 2.4
            ax.annotate("", (x + 0.5, 3.3), (x, 3.3), arrowprops=dict(arrowstyle="->", lw=1.5))
        ax.text(4.15, 2.6, "(blocks and head\nplay no part)", ha="center", color="grey", fontsize=9)
        for i, (colour, text) in enumerate([(GREY, "from the base, or frozen"), (RED, "trained"),
                                            (BLUE, "ready to sample")]):
            ax.add_patch(Rectangle((3.2 * i + 2.6, 5.25), 0.3, 0.25, facecolor=colour,
                                   edgecolor="black", lw=0.5))
            ax.text(3.2 * i + 3.0, 5.37, text, va="center", fontsize=9)
        ax.set(xlim=(-0.2, 14.6), ylim=(-0.9, 5.65))
        ax.axis("off")


if __name__ == "__main__":
    with checkpoint.user_errors():
        temporal(DOCS / "temporal.png")
        adaptation(DOCS / "adaptation.png")
        animation(DOCS / "sample.gif")
