"""Is it working? What each stage of an adaptation gave: numbers, pictures, and a sentence where a number says no.

A low training loss proves nothing: the one public attempt to repeat the paper had an alignment loss below 0.01, a flow-matching loss that fell from 1
to 0.1, and noise for videos (spec ae-adapt-v 9.8). So every number here comes with what it would be if nothing had been learnt:

    R^2            of the aligned embeddings on held-out clips. 0: no better than always giving their mean; 1: the base's own
    norm ratio     how loudly noise arrives at the blocks, against the base. 1: as loudly. The clean clips of the alignment do not constrain it
    depth          distance of the features from the base's after so many blocks, in units of their variance. 1: as far as their mean is
    loss by sigma  against that of a predictor that knows the statistics of a latent cell, but no neighbour, prompt or time
    latent RMS     of what the transformer is trained on: about 1, else the scale of the autoencoder is wrong

`Journal.add` prints them, and rewrites `report.json` and `stages.png` (a row per prompt, a group of columns per stage). Stages that ended in an
earlier run stay in both.
"""
import math
from pathlib import Path

import torch
from tqdm import tqdm

from files import checkpoint, video


def sentences(row):
    """What the numbers of a stage say against it, in words -> list, empty where nothing is wrong."""
    said, aligned = [], "1a, " in row["stage"]  # what is trained afterwards need no longer imitate the base; what is not, not yet denoise
    if aligned and (r2 := row.get("r2")) is not None and r2 < 0.2:
        said.append(f"R^2 is {r2:.2f}: the new embedder tells hardly anything of the base's embeddings. The pairs do not belong together (see pairs.png: is it the same "
                    "clip twice?), the scale of a latent is wrong, or there are too few clips (1,000 are enough).")
    if aligned and (ratio := row.get("norm_ratio")) is not None and not 0.1 < ratio < 10:
        said.append(f"noise arrives {math.sqrt(ratio):.2g} times as loudly as in the base: the blocks will take it for another time. Try --align ridge_to_init or noise_aware.")
    if aligned and (depth := row.get("depth")) and sum(v > 1 for v in depth.values()) > len(depth) / 2:
        said.append("behind most blocks the features are farther from the base's than their mean is: the alignment is lost on the way, and stage 1b starts from little. Use "
                    "more clips, another --align, or more steps of stage 1b.")
    if (rms := row.get("latent_rms")) is not None and not 0.5 < rms < 2:
        said.append(f"the latents have an RMS of {rms:.2f} and should have about 1: the autoencoder's scaling factor is wrong.")
    above = [b for b in row.get("sigma", []) if b["ratio"] >= 1]
    if above and not aligned:
        said.append("at sigma " + ", ".join(f"{b['sigma'][0]:.1f}-{b['sigma'][1]:.1f}" for b in above) + " the loss is no lower than without any transformer: the blocks add "
                    "nothing there. Train longer, or look at the alignment first.")
    return said


class Journal:
    """The record of a run in the folder `out`."""

    def __init__(self, out, **facts):
        self.out, self.facts = Path(out), facts
        report, strips = self.out / "report.json", self.out / "stages.safetensors"
        self.rows = checkpoint.read_json(report)["stages"] if report.exists() else []
        self.strips = checkpoint.load_tensors(strips)[0] if strips.exists() else {}

    def __contains__(self, stage):
        return any(row["stage"] == stage for row in self.rows)

    def add(self, row, videos=(), labels=None):
        """Record a stage: {"stage": its name, "seconds": ..., any numbers}, and the videos [3, t, h, w] that its model made of `labels`."""
        row["says"] = sentences(row)
        self.rows = [r for r in self.rows if r["stage"] != row["stage"]] + [row]
        tqdm.write(line(row))
        for key, label, value in (("depth", "distance by depth", lambda d: "  ".join(f"{k} {v:.2f}" for k, v in d.items())),
                                  ("sigma", "loss by sigma (without transformer)", bins)):
            if key in row:
                tqdm.write(f"    {label}: {value(row[key])}")
        for sentence in row["says"]:
            tqdm.write(f"    ! {sentence}")
        if videos:
            frames = torch.stack([x[:, [0, (x.shape[1] - 1) // 2, -1]] for x in videos])
            self.strips = {k: v for k, v in self.strips.items() if k != row["stage"]} | {row["stage"]: ((frames + 1) * 127.5).round().clamp(0, 255).byte()}
            checkpoint.save_tensors(self.out / "stages.safetensors", self.strips)
            self.draw(labels)
        checkpoint.write_json(self.out / "report.json", dict(**checkpoint.provenance(), **self.facts, stages=self.rows))

    def draw(self, labels=None):
        """stages.png, from the strips of all stages so far."""
        heads = [row["stage"] for row in self.rows if row["stage"] in self.strips]
        strips = [self.strips[head].float() / 127.5 - 1 for head in heads]
        width = strips[0].shape[-1]
        video.contact_sheet(self.out / "stages.png", [torch.cat(row, dim=1) for row in zip(*strips)], columns=3 * len(heads), labels=labels, heads=heads,
                           scale=2 if width <= 256 else 256 / width)


def line(row):
    """The numbers of a stage in one line."""
    plain = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float) and k != "seconds")
    fit = "   prompt fit: " + "  ".join(f"{k} {v:.2f}" for k, v in row["prompt_fit"].items()) if "prompt_fit" in row else ""
    return f"{row['stage']:24s} {row['seconds']:7.1f} s   {plain}{fit}"


def bins(rows):
    return "  ".join(f"{b['sigma'][0]:.1f}-{b['sigma'][1]:.1f}: {b['loss']:.3f} ({b['bound']:.3f})" for b in rows if b["loss"] == b["loss"])
