"""Latents of captioned clips, encoded once (spec ae-adapt-v 2).

Training a transformer reads every clip many times, but what it reads never changes: the latent, the image condition, the states of the prompt. So
they are made once and kept, and while the transformer trains, no autoencoder (2 billion parameters), text encoder (6 billion) or image encoder
stands beside it:

    clip --first 77 frames--> base autoencoder --> "teacher" latent [16, 20, h/8, w/8], fp32    only for the alignment (stage 1a)
    clip --first 80 frames--> DC-AE-V          --> "student" latent [32, 20, h/32, w/32], bf16
         --first frame------> image condition, and CLIP tokens of the whole picture (image-to-video)
    caption --> prompt states [m, 4096], without padding, bf16

Both latents have 20 frames, and both start at frame 0: latent frame 0 is pixel frame 0 of the teacher's clip and 0..3 of the student's, latent frame k is
4k-3..4k and 4k..4k+3.

One file per clip and latent space, and one per caption (training/entries.py). Folders are named by a hash of everything that decides (the encoder's weights,
scale, type, frames, buckets), so caches of several autoencoders lie side by side and none is taken for another. Files are named by a hash of the
clip's bytes, or of the caption: clips may be moved, renamed and packed. Filling goes on where it was stopped, by any number of processes.

    source = cache.Source("clips", student, teacher, folder="out/latents")
    source.batch(step, range(8))       # one bucket, one caption per clip, a tenth of the prompts replaced by the null context
    source.pair(i)                     # clip i in both spaces, for stage 1a

    python -m training.cache CLIPS --base wan2.1 --weights WEIGHTS --out out/latents        fill or check a cache; prints a table
    torchrun --nproc-per-node 8 -m training.cache CLIPS ...                                    the same on eight GPUs
    python -m training.cache --measure                                                      how fast batches are read -> results/cache.json
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting threads slow every other process down; must precede torch

import argparse
import collections
import copy
import hashlib
import json
import math
import random
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from files import checkpoint
from files.checkpoint import UserError
from training import captions, loop
from training.entries import Entries, hash_encoder, hash_file, hash_network, hash_of
from wan.image import CLIPVision, WanImage, clip_pixels
from wan.text import WanText, clean_prompt

PROMPTS = 2048  # encoded for one loading of the text encoder; their states (about 1 MB each) are held in memory
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Batch(NamedTuple):
    """What one training step of a transformer sees; the first axis is the batch.

    The same clips, prompts and dropout for the same (seed, step, position in the global batch), whatever the number of processes.
    """

    z: torch.Tensor  # [b, z, t, h, w] clean latent as the transformer sees it (scaled), fp32
    condition: torch.Tensor | None  # [b, 4 + z, t, h, w] mask and condition latent, for image-to-video
    context: torch.Tensor  # [b, m, text_dim]; the null context where the prompt was dropped
    clip_fea: torch.Tensor | None  # [b, 257, image_dim], where the transformer has an image branch


# ---------------------------------------------------------------------------------------------------- what is encoded


class Space:
    """Clips in the latent space of one model: entries {latent [z, t, h, w], condition [4 + z, t, h, w], clip_fea [257, d]} of its `ae_dtype`.

    The condition only for image-to-video models (spec 6), clip_fea only with an image encoder and `picture`. frames: read from the clip.
    """

    def __init__(self, model, frames, family, folder, picture):
        self.model, self.frames, self.sizes = model, frames, captions.bucket_sizes(family)
        self.clip, self.look = model.clip if picture else None, None
        model.ae.to(model.device, model.ae_dtype)
        self.entries = Entries(folder, "latents", dict(
            autoencoder=hash_encoder(model.ae), type=str(model.ae_dtype), frames=frames, buckets=list(self.sizes.items()),
            condition=model.net.config.in_channels - model.net.config.out_channels, image=self.clip and getattr(self.clip, "rule", "own")),
            origin=hash_network(getattr(self.clip, "encoder_path", None)))
        cell = [model.ae.config.spatial_factor * p for p in model.net.config.patch[1:]]
        for size in self.sizes.values():
            if size[0] % cell[0] or size[1] % cell[1]:
                raise UserError(f"the bucket {size[0]}x{size[1]} of {family} is no multiple of the {cell[0]}x{cell[1]} pixels of a token of {model.name}: "
                                f"use the family {family.upper().split('F')[0]}F{math.lcm(*cell)}MS.")

    def shape(self, size):
        """(t, h, w) of the latents of a bucket."""
        return self.model.latent_shape(self.frames, size)

    def bytes(self, size):
        """Of an entry's tensors, in the bucket `size`."""
        c = self.model.net.config
        return c.in_channels * math.prod(self.shape(size)) * self.model.ae_dtype.itemsize

    @torch.no_grad()
    def encode(self, x, first):
        """A clip [3, frames or more, h, w] and its first frame as stored -> the tensors of an entry."""
        x, dtype = x[None, :, : self.frames], self.model.ae_dtype
        shape = self.shape(x.shape[3:])
        tensors = {"latent": self.model.encode(x)[0, :, : shape[0]]}
        condition = self.model.condition(1, shape, x[:, :, 0])
        if condition is not None:
            tensors["condition"] = condition[0]
        if self.clip:
            self.look = self.look or keep_loaded(self.clip)
            tensors["clip_fea"] = self.look(first[None])[0]
        return {name: value.to(dtype).cpu() for name, value in tensors.items()}

    def inputs(self, tensors):
        """An entry -> clean input of the transformer [c, t, h, w], fp32: latent, mask, condition latent."""
        return torch.cat([tensors[name] for name in ("latent", "condition") if name in tensors]).float()


def keep_loaded(clip):
    """An image encoder that stays in memory between calls; `WanImage` itself loads its network for each, which is right for one picture."""
    if not isinstance(clip, WanImage) or clip.encoder_path is None:
        return clip
    net = CLIPVision.load(clip.encoder_path, clip.dtype, clip.device)
    return lambda images: net(clip_pixels(images, clip.rule, net.image_size).to(clip.device, clip.dtype)).float().cpu()


def encode_prompts(text, prompts):
    """Sentences -> {sentence: states [m, text_dim]} without padding, at least one row; "" is the empty prompt."""
    if isinstance(text, WanText):
        clean = {p: clean_prompt(p) for p in prompts}
        new = text.uncached(prompts)
        known = text.known | (text.encode(new) if new else {})  # not kept in `text`: a million captions would fill the memory
        states = {p: known[clean[p]] for p in prompts}
    else:  # the toy's
        states = {p: (text([p]) if p else text.null(1))[0] for p in prompts}
    rows = lambda s: max([1, *(s.ne(0).any(1).nonzero().flatten() + 1).tolist()])
    return {p: s[: rows(s)].to(torch.bfloat16) for p, s in states.items()}


def prompt_entries(model, folder):
    """Where the prompt states of a model's text encoder are kept, under `caption_key`: {states [m, text_dim]}."""
    return Entries(folder, "text", dict(text=type(model.text).__name__, width=model.net.config.text_dim),
                   origin=hash_network(getattr(model.text, "encoder_path", None)))


def caption_key(caption):
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------- the source


class Source:
    """Captioned clips as latents: encoded once into `folder` (or into memory), then read batch by batch.

    data: a folder of `x.mp4` + `x.txt` / `x.json`, a CSV, a JSONL, a web-dataset tar, or a list of these (training/captions.py).
    student: the Model whose latents are trained on; its text (and image) encoder and negative prompt make the conditions. With
    in_channels == out_channels there is no image condition.
    teacher: the base's Model, for `pair` (stage 1a); None where only batches are needed.
    folder: where the caches of all autoencoders lie side by side; None: nothing is written, everything is encoded at the start and kept in memory.
    buckets: "480F32MS", "480F64MS", "720F32MS", "1080F32MS", ..., or "HEIGHTxWIDTHFxxMS", for example "64x64F32MS" (spec 2.2).
    frames: of the student's clip; the teacher reads as many as make the same number of latent frames: 77 of 80.
    split: "train", "val" (a tenth, by the files' contents alone), or "all".
    drop: share of prompts replaced by the null context; null: "negative" (the model's negative prompt) or "empty" (spec 2.5).
    workers: threads that decode clips, and later read entries ahead. verify: look at every byte of finished entries now.

    Each model encodes, and is stored, in its `ae_dtype` (published: teacher fp32, student bf16). The models need no transformer weights:
    a models.Deferred with a config will do. Clips that cannot be used: `skipped` is {name: reason}; none left is a UserError.
    With several processes each encodes its share, and then whatever is still missing.
    """

    def __init__(self, data, student, teacher=None, folder="out/latents", buckets="480F32MS", frames=80, split="train", seed=0, drop=0.1,
                 null="negative", workers=2, verify=False):
        if split not in ("train", "val", "all") or null not in ("negative", "empty"):
            raise UserError(f'split is "train", "val" or "all" and null is "negative" or "empty", not {split!r} and {null!r}.')
        self.split, self.seed, self.drop, self.workers, self.ahead = split, seed, drop, max(workers, 1), {}
        self.null = (student.negative or "") if null == "negative" else ""
        a = student.ae.config
        if frames < a.lead or (frames - a.lead) % a.temporal_factor:
            raise UserError(f"{frames} frames are no whole number of latent frames of {student.name}: use --frames "
                            f"{max(frames - (frames - a.lead) % a.temporal_factor, a.lead)}.")
        samples, self.skipped = captions.find_samples(data)
        self.student = Space(student, frames, buckets, folder, picture=True)
        self.teacher = teacher and Space(teacher, frames_alike(student, teacher, frames), buckets, folder, picture=False)
        self.spaces = [self.student, self.teacher] if teacher else [self.student]
        if teacher:
            for size in self.student.sizes.values():
                check_grids(self.teacher.shape(size), self.student.shape(size), size)
        self.text = prompt_entries(student, folder)
        self._fill(samples, verify)
        self.samples, self.bucket = samples, {}
        for sample in samples:
            facts = next((f for f in (s.entries.facts(sample.key) for s in self.spaces) if "skipped" in f), None)
            if facts:
                self.skipped[sample.name] = facts["skipped"]
            else:
                self.bucket[sample.key] = tuple(self.student.entries.facts(sample.key)["bucket"])
        self._select()

    # ---- filling

    def _fill(self, samples, verify):
        """Encode what is missing: first this process's share, then what the others have not done yet, both in random order, so that processes
        that know nothing of each other seldom do the same. What is made does not depend on the order."""
        prompts = list(dict.fromkeys([self.null, *(c for s in samples for c in s.captions)]))
        missing = lambda s: any(space.entries.facts(s.key) is None for space in self.spaces)
        if verify:
            keys = [(space.entries, s.key) for s in samples for space in self.spaces] + [(self.text, caption_key(p)) for p in prompts]
            for entries, key in tqdm(keys, "verify", unit="entry", disable=loop.rank() > 0, leave=False):
                entries.facts(key, whole=True)
        alone = self.text.folder is None or loop.processes() == 1
        for turn in (0,) if alone else (0, 1):
            share = slice(loop.rank(), None, loop.processes()) if not alone and turn == 0 else slice(None)
            todo_prompts = shuffled(p for p in prompts[share] if self.text.facts(caption_key(p)) is None)
            todo = shuffled(s for s in samples[share] if missing(s))
            if turn == 0:
                self._check_room(sum(map(missing, samples)))
            with tqdm(total=len(todo_prompts), desc="prompts", unit="prompt", disable=not todo_prompts or loop.rank() > 0) as bar:
                for i in range(0, len(todo_prompts), PROMPTS):
                    for prompt, states in encode_prompts(self.student.model.text, todo_prompts[i : i + PROMPTS]).items():
                        self.text.put(caption_key(prompt), {"states": states}, name=prompt)
                        bar.update()
            with tqdm(total=len(todo), desc="clips", unit="clip", disable=not todo or loop.rank() > 0) as bar:
                for sample, clip in self._read_ahead(todo, missing):
                    self._encode(sample, clip)
                    bar.update()
        for space in self.spaces:
            space.look = None  # the image encoder's memory

    def _read_ahead(self, samples, wanted):
        """(sample, future of its pixels), decoded by threads a little ahead of the encoding. What is done by now, by others, is left out."""
        read = lambda s: captions.read_sample(s, max(space.frames for space in self.spaces), self.student.sizes) if wanted(s) else None
        with ThreadPoolExecutor(self.workers) as pool:
            queue = collections.deque()
            for sample in samples:
                queue.append((sample, pool.submit(read, sample)))
                if len(queue) > self.workers:
                    yield queue.popleft()
            yield from queue

    def _encode(self, sample, clip):
        """Write the missing entries of a sample: its latents, or why there are none."""
        try:
            if (pixels := clip.result()) is None:
                return
        except UserError as e:
            pixels, reason = None, str(e)
        for space in self.spaces:
            if space.entries.facts(sample.key) is None:
                tensors = space.encode(*pixels) if pixels else {}
                facts = dict(bucket=list(pixels[0].shape[2:])) if pixels else dict(skipped=reason)
                space.entries.put(sample.key, tensors, name=sample.name, **facts)

    def _check_room(self, clips):
        """UserError now, not after a night, where the disk has no room for so many clips."""
        if self.text.folder is None or not clips:
            return
        need = clips * sum(space.bytes(self.student.sizes[1.0]) for space in self.spaces)
        free = shutil.disk_usage(next(p for p in self.text.folder.absolute().parents if p.exists())).free
        if need > free:
            raise UserError(f"the latents of {clips} clips need {need / 1e9:.1f} GB and {self.text.folder.parent} has {free / 1e9:.1f}: free some space, "
                            "or use another folder.")

    # ---- what it holds

    def _select(self):
        """Choose the clips of the split: held out is a tenth of all, the first by their keys, usable or not, so it depends on the files alone."""
        keys = sorted(s.key for s in self.samples)
        held_out = set(keys[: math.ceil(len(keys) / 10)] if len(keys) > 1 else [])
        wanted = {"train": set(keys) - held_out, "val": held_out, "all": set(keys)}[self.split]
        self.clips = sorted((s for s in self.samples if s.key in wanted & self.bucket.keys()), key=lambda s: s.key)
        if not self.clips:
            which = {"train": "clips for training", "val": "held-out clips", "all": "clips"}[self.split]
            raise UserError(f"none of the {len(wanted)} {which} can be used{captions.summary(self.skipped)}: add clips, or lower --frames.")
        self.by_bucket = collections.defaultdict(list)
        for sample in self.clips:
            self.by_bucket[self.bucket[sample.key]].append(sample)
        self.by_bucket = dict(sorted(self.by_bucket.items()))

    def held_out(self, drop=0.0):
        """The same source for the held-out clips -> Source. For a fixed validation set: `source.held_out().batch(0, range(32))`."""
        other = copy.copy(self)
        other.split, other.drop, other.ahead = "val", drop, {}
        other._select()
        return other

    def __len__(self):
        """Number of clips."""
        return len(self.clips)

    @property
    def fingerprint(self):
        """String that changes with the clips, captions, encoders, and whatever else decides what a batch holds; not with paths or `folder`."""
        return hash_of([[space.entries.hash for space in self.spaces], self.text.hash, self.split, self.seed, self.drop, self.null,
                        [[s.key, s.captions] for s in self.clips]])

    def table(self):
        """What the source holds, in Markdown: clips per bucket, bytes on disk, what was skipped and why."""
        lines = [f"| bucket | {self.split} clips |" + "".join(f" latent of {space.model.name} |" for space in self.spaces),
                 "|---|---:|" + "---:|" * len(self.spaces)]
        for size, clips in self.by_bucket.items():
            shapes = (f" {space.model.net.config.out_channels}x{'x'.join(map(str, space.shape(size)))} |" for space in self.spaces)
            lines.append(f"| {size[0]}x{size[1]} | {len(clips)} |" + "".join(shapes))
        lines.append("")
        for entries, what in [(space.entries, f"latents of {space.model.name}, {space.frames} frames") for space in self.spaces] + [(self.text, "prompts")]:
            if entries.folder:
                sizes = [f.stat().st_size for f in entries.folder.glob("*.safetensors")]
                lines.append(f"{what}: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB in {entries.folder}")
        lines.append(f"skipped: {len(self.skipped)}{captions.summary(self.skipped, examples=5)}")
        return "\n".join(lines)

    # ---- reading

    def draw(self, step, position):
        """Which clip, and which of its captions (None: dropped), position `position` of the global batch of `step` is -> (Sample, caption)."""
        sizes = list(self.by_bucket)
        share = np.cumsum([len(self.by_bucket[size]) for size in sizes]) / len(self)
        bucket = np.random.default_rng((self.seed, 1, step)).random()  # 1 and 2: so that no sample's numbers are its bucket's
        clips = self.by_bucket[sizes[int((share <= bucket).sum())]]
        clip, caption, drop = np.random.default_rng((self.seed, 2, step, position)).random(3)
        sample = clips[int(clip * len(clips))]
        chosen = list(sample.captions)[int((np.cumsum(captions.caption_chances(sample))[:-1] <= caption).sum())]
        return sample, None if drop < self.drop else chosen

    def read(self, sample, caption):
        """-> the entry's tensors, with the prompt's (None: the null prompt's) `states`."""
        prompt = self.null if caption is None else caption
        return self.student.entries.get(sample.key) | self.text.get(caption_key(prompt))

    def batch(self, step, positions):
        """Samples `positions` (a range) of the global batch of `step` -> Batch on the CPU, all of one bucket.

        Threads meanwhile read what the same positions of the next step need.
        """
        positions = tuple(positions)
        rows = self.ahead.pop((step, positions), None) or self._submit(step, positions)
        self.ahead = {asked: read for asked, read in self.ahead.items() if step <= asked[0] <= step + 1}
        if (step + 1, positions) not in self.ahead:
            self.ahead[step + 1, positions] = self._submit(step + 1, positions)
        rows = [row.result() for row in rows]
        stack = lambda name: torch.stack([row[name].float() for row in rows]) if name in rows[0] else None
        return Batch(stack("latent"), stack("condition"), pad_sequence([row["states"].float() for row in rows], batch_first=True), stack("clip_fea"))

    def _submit(self, step, positions):
        if not hasattr(self, "pool"):
            self.pool = ThreadPoolExecutor(self.workers)
        return [self.pool.submit(self.read, *self.draw(step, position)) for position in positions]

    def pair(self, i):
        """Clip i in both latent spaces -> (teacher input [c_T, t, h, w], student input [c_S, t, h, w]), fp32 on the CPU: the latent, and where
        the model is image-to-video the mask and condition latent behind it. The grids belong together: h_T w_S = h_S w_T."""
        if self.teacher is None:
            raise UserError("pairs need the base's latents too: give the source a teacher.")
        return tuple(space.inputs(space.entries.get(self.clips[i].key)) for space in (self.teacher, self.student))


def shuffled(items):
    """A list in an order that no other process has."""
    return sorted(items, key=lambda _: random.SystemRandom().random())


def frames_alike(student, teacher, frames):
    """How many frames the teacher reads of the student's `frames` (spec 2.2): those of as many latent frames, 77 of 80."""
    s, t = student.ae.config, teacher.ae.config
    spans = (frames - s.lead) // s.temporal_factor + 1
    return t.lead + (spans * s.temporal_factor // t.temporal_factor - 1) * t.temporal_factor


def check_grids(teacher, student, size):
    """UserError where two latents (t, h, w) of a bucket do not belong together (spec 2.2): equal aspect, times in an integer ratio."""
    if teacher[1] * student[2] != student[1] * teacher[2] or max(teacher[0], student[0]) % min(teacher[0], student[0]):
        raise UserError(f"in the bucket {size[0]}x{size[1]} the latents {'x'.join(map(str, teacher))} and {'x'.join(map(str, student))} do not "
                        "divide: use a family of buckets whose sides both autoencoders divide, such as 480F64MS.")


# ---------------------------------------------------------------------------------------------------- the script


def measure(clips=64, batch=2, steps=200, rows=100):
    """Batches per second out of a cache of published shapes: 480x832, image-to-video, prompts of `rows` tokens -> a dict for the JSON. The
    entries hold random numbers and were just written, so this is what reading costs the processor, not the disk."""
    import ae
    import dit
    from wan import models

    config = dit.PRESETS["dc-wan2.1-i2v-14b"]
    student = models.Model("dc-wan2.1-i2v-14b", models.Deferred(None, config=config), ae.DCAEV(ae.Config((0, *[4] * 6), (0, *[1] * 6), 32)),
                           WanText(None, None), clip=WanImage(None), ae_dtype=torch.bfloat16, negative="")
    random16 = lambda *shape: torch.randn(shape).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        space, text = Space(student, 80, "480F32MS", folder, True), prompt_entries(student, folder)
        t, h, w = space.shape((480, 832))
        for i in range(clips):  # files that look like clips; they are never decoded, for their entries are there
            Path(folder, f"{i}.mp4").write_bytes(bytes([i]) * 1000)
            Path(folder, f"{i}.txt").write_text(f"caption {i}")
            tensors = dict(latent=random16(32, t, h, w), condition=random16(36, t, h, w), clip_fea=random16(257, config.image_dim))
            space.entries.put(hash_file(Path(folder, f"{i}.mp4")), tensors, bucket=(480, 832))
            text.put(caption_key(f"caption {i}"), dict(states=random16(rows, config.text_dim)))
        text.put(caption_key(""), dict(states=random16(1, config.text_dim)))
        size = sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors")) / clips
        source = Source(folder, student, folder=folder, split="all")
        result = dict(clips=clips, batch=batch, workers=source.workers, bytes_per_clip=round(size), load_before=os.getloadavg()[0])
        ways = {"entries, one thread": lambda step: [source.read(*source.draw(step, p)) for p in range(batch)],
                "batches, read ahead": lambda step: source.batch(step, range(batch))}
        for name, read in ways.items():
            cpu, started = sum(os.times()[:2]), time.perf_counter()
            for step in range(steps):
                read(step)
            passed = time.perf_counter() - started
            result[name] = dict(batches_per_second=round(steps / passed, 1), megabytes_per_second=round(steps * batch * size / passed / 1e6),
                                cpu_seconds_per_batch=round((sum(os.times()[:2]) - cpu) / steps, 4))
    return result


def main(argv=None):
    p = argparse.ArgumentParser(description="Encode captioned clips once, or check what was encoded, and print a table.")
    p.add_argument("data", nargs="*", help="folders of clips with captions, CSV, JSONL, or tars")
    p.add_argument("--base", default="wan2.1", help="model whose autoencoder and encoders are used (training/bases.py)")
    p.add_argument("--target", default="f32t4c32", help="the deep latent space")
    p.add_argument("--weights", nargs="+", default=[], metavar="DIR", help="folders with the files of base and autoencoder (default: checkpoints/BASE)")
    p.add_argument("--ae", metavar="FILE", help="the deep autoencoder, where it is not in these folders")
    p.add_argument("--text-cache", metavar="FILE", help="prompts in it need no text encoder")
    p.add_argument("--out", default="out/latents", metavar="FOLDER", help="of the caches (default: out/latents)")
    p.add_argument("--buckets", help="family of frame sizes (default: 480F32MS for f32, 480F64MS for f64)")
    p.add_argument("--frames", type=int, default=80, help="of a clip (default: 80; the base sees the first 77)")
    p.add_argument("--student-only", action="store_true", help="leave out the base's latents, which only stage 1a reads")
    p.add_argument("--dtype", nargs=2, choices=TYPES, default=["fp32", "bf16"], metavar=("BASE", "DEEP"),
                   help="in which each autoencoder encodes and is stored: fp32 or bf16 (default: fp32 bf16, as published)")
    p.add_argument("--workers", type=int, default=2, help="threads that decode clips (default: 2)")
    p.add_argument("--quick", action="store_true", help="of finished entries look only at the headers")
    p.add_argument("--measure", action="store_true", help="how fast batches are read -> results/cache.json")
    args = p.parse_args(argv)
    if args.measure:
        torch.set_num_threads(1)
        measured = measure()
        checkpoint.write_json("results/cache.json", dict(**checkpoint.provenance(), **measured))
        return print(f"{json.dumps(measured, indent=1)}\nwrote results/cache.json")
    if not args.data:
        p.error("name a folder of clips with captions")
    from training import bases  # a floor further up: which models belong together

    base, args.device = bases.find(args.base), loop.start()
    teacher, student = base.models(args, base.settings)
    teacher.ae_dtype, student.ae_dtype = (TYPES[name] for name in args.dtype)
    buckets = args.buckets or f"480F{student.ae.config.spatial_factor}MS"
    source = Source(args.data, student, None if args.student_only else teacher, args.out, buckets, args.frames, "all", null=base.settings.null,
                    workers=args.workers, verify=not args.quick)
    if loop.rank() == 0:
        print(source.table())


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
