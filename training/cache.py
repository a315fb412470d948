"""Latents of captioned clips, encoded once.

Training a transformer reads every clip many times, but what it reads never changes: the
latent, the image condition, the states of the prompt. So they are made once and kept,
and while the transformer trains, no autoencoder (2 billion parameters), text encoder (6
billion) or image encoder stands beside it:

    clip --first 77 frames--> base autoencoder --> "teacher" [16, 20, h/8, w/8], fp32
    clip --first 80 frames--> DC-AE-V          --> "student" [32, 20, h/32, w/32], bf16
         --first frame------> image condition, CLIP tokens of the picture
    caption --> prompt states [m, 4096], without padding, bf16

Only the alignment (stage 1a) reads the teacher's. Both latents have 20 frames that
begin at frame 0: latent frame 0 is pixel frame 0 of the teacher's clip and 0..3 of the
student's, latent frame k is 4k-3..4k and 4k..4k+3.

One file per clip and latent space, and one per caption (training/entries.py). Folders
are named by a hash of everything that decides (the encoder's weights, scale, type,
frames, rate, buckets), so caches of several autoencoders lie side by side. Files are
named by a hash of the clip's bytes, or of the caption: clips may be moved, renamed and
packed.

    source = cache.Source("clips", student, teacher, folder="out/latents")
    source.batch(step, range(8))  # one bucket, a caption per clip, a tenth dropped
    source.pair(i)                # clip i in both spaces, for stage 1a
"""
import collections
import copy
import hashlib
import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from files import folders, video
from files.checkpoint import UserError
from training import captions, latents, loop, metrics
from training.clips import read_ahead
from training.entries import Entries, hash_encoder, hash_network, hash_of
from wan.image import CLIPVision, WanImage, clip_pixels

PROMPTS = 2048  # for one loading of the text encoder; their states (1 MB each) are in memory


class Batch(NamedTuple):
    """What one training step of a transformer sees; the first axis is the batch.

    The same clips, prompts and dropout for the same (seed, step, position in the global
    batch), whatever the number of processes.
    """

    z: torch.Tensor  # [b, z, t, h, w] clean latent as the transformer sees it (scaled), fp32
    condition: torch.Tensor | None  # [b, 4 + z, t, h, w] mask and condition latent
    #: what the transformer takes behind x and t: prompts (the null prompt where one was dropped),
    #: [b, m, text_dim] or `models.Prompts`; and CLIP tokens, if it has an image branch
    prompt: tuple


@dataclass(frozen=True)
class Options:
    """What is encoded of a clip, where it is kept, and how batches are drawn."""

    folder: str | None = "out/latents"  # caches of all autoencoders; None: keep all in memory
    buckets: str = "480F32MS"  # or "480F64MS", "720F32MS", ..., "64x64F32MS"
    frames: int = 80  # of the student's clip; the teacher reads as many as make equal latents
    fps: float | str | None = None  # None: the student's rate; "native": every stored frame
    caption_per_line: bool = False  # of a .txt; else the whole file is one caption
    split: str = "train"  # "val": a tenth, by the files' contents alone; "all"
    seed: int = 0
    drop: float = 0.1  # share of prompts replaced by the null context
    null: str = "negative"  # which is the model's negative prompt, or "empty"
    workers: int = 2  # threads that decode clips, and later read entries ahead
    verify: bool = False  # look at every byte of finished entries now

    def rate(self, model):
        """Frames per second at which clips are read; None: as they are stored."""
        if self.fps == "native":
            return None
        return self.fps or model.fps


# ------------------------------------------------------------------ what is encoded


class Space:
    """Clips in the latent space of one model, as entries of its `ae_dtype`:
    {latent [z, t, h, w], condition [4 + z, t, h, w], clip_fea [257, d]}.

    The condition only for image-to-video models, clip_fea only with an image encoder
    and `picture`. frames: read from the clip.
    """

    def __init__(self, model, frames, options, picture):
        self.model, self.frames = model, frames
        self.sizes = captions.bucket_sizes(options.buckets)
        self.clip, self.image_encoder = model.clip if picture else None, None
        model.ae.to(model.device, model.ae_dtype)
        made_by = dict(
            autoencoder=hash_encoder(model.ae),
            type=str(model.ae_dtype),
            frames=frames,
            fps=options.rate(model),
            reader=video.READER,
            buckets=list(self.sizes.items()),
            condition=model.net.config.in_channels - model.net.config.out_channels,
            image=self.clip and getattr(self.clip, "rule", "own"),
        )
        origin = hash_network(getattr(self.clip, "encoder_path", None))
        self.entries = Entries(options.folder, "latents", made_by, origin)
        self._check_sizes(options.buckets)

    def _check_sizes(self, family):
        """UserError where a bucket is no whole number of tokens."""
        factor = self.model.ae.config.spatial_factor
        cell = [factor * p for p in self.model.net.config.patch[1:]]
        for h, w in self.sizes.values():
            if h % cell[0] or w % cell[1]:
                better = f"{family.upper().split('F')[0]}F{math.lcm(*cell)}MS"
                raise UserError(f"the bucket {h}x{w} of {family} is no multiple of the "
                                f"{cell[0]}x{cell[1]} pixels of a token of {self.model.name}: "
                                f"use the family {better}.")

    def shape(self, size):
        """(t, h, w) of the latents of a bucket."""
        return self.model.latent_shape(self.frames, size)

    def bytes(self, size):
        """Of an entry's tensors, in the bucket `size`."""
        channels = self.model.net.config.in_channels
        return channels * math.prod(self.shape(size)) * self.model.ae_dtype.itemsize

    @torch.no_grad()
    def encode(self, x, first):
        """A clip [3, frames or more, h, w] and its first frame as shown -> an entry's
        tensors."""
        x = x[None, :, : self.frames]
        shape = self.shape(x.shape[3:])
        tensors = {"latent": self.model.encode(x)[0, :, : shape[0]]}
        condition = self.model.condition(1, shape, x[:, :, 0])
        if condition is not None:
            tensors["condition"] = condition[0]
        if self.clip:
            self.image_encoder = self.image_encoder or keep_loaded(self.clip)
            tensors["clip_fea"] = self.image_encoder(first[None])[0]
        return {name: value.to(self.model.ae_dtype).cpu() for name, value in tensors.items()}

    def inputs(self, tensors):
        """An entry -> clean input of the transformer [c, t, h, w], fp32: latent, mask,
        condition latent."""
        parts = [tensors[name] for name in ("latent", "condition") if name in tensors]
        return torch.cat(parts).float()


def latent_frames(model, frames):
    """Of a clip of so many frames. UserError where they are no whole number."""
    c = model.ae.config
    left = (frames - c.lead) % c.temporal_factor
    if frames < c.lead or left:
        raise UserError(f"{frames} frames are no whole number of latent frames of {model.name}: "
                        f"use --frames {max(frames - left, c.lead)}.")
    return (frames - c.lead) // c.temporal_factor + 1


def check_grids(teacher, student, size):
    """UserError where two latents (t, h, w) of a bucket do not belong together: equal
    aspect, times in an integer ratio."""
    same_aspect = teacher[1] * student[2] == student[1] * teacher[2]
    if not same_aspect or max(teacher[0], student[0]) % min(teacher[0], student[0]):
        shapes = " and ".join("x".join(map(str, shape)) for shape in (teacher, student))
        raise UserError(f"in the bucket {size[0]}x{size[1]} the latents {shapes} do not divide: "
                        "use a family of buckets whose sides both autoencoders divide, such as "
                        "480F64MS.")


def keep_loaded(clip):
    """An image encoder that stays in memory between calls; `WanImage` itself loads its
    network for each, which is right for one picture."""
    if not isinstance(clip, WanImage) or clip.encoder_path is None:
        return clip
    net = CLIPVision.load(clip.encoder_path, clip.dtype, clip.device)

    def encode(images):
        pixels = clip_pixels(images, clip.rule, net.image_size)
        return net(pixels.to(clip.device, clip.dtype)).float().cpu()

    return encode


def encode_prompts(text, prompts):
    """Sentences -> {sentence: {name: states [m, d]}} as entries hold them: bf16, without
    the zero rows at the end, but for one; "" is the empty prompt."""
    found = {}
    for prompt, row in text.states(prompts).items():
        found[prompt] = {name: unpadded(s).to(torch.bfloat16) for name, s in row.items()}
    return found


def unpadded(states):
    """Rows [m, d] up to the last that is not all zeros, at least one. A single vector is
    left alone."""
    if states.ndim < 2:
        return states
    used = states.ne(0).any(dim=1).nonzero().flatten().tolist()
    return states[: max(used, default=0) + 1]


def prompt_entries(model, folder):
    """Where the prompt states of a model's text encoder are kept, under `caption_key`, as
    `encode_prompts` makes them."""
    made_by = dict(text=type(model.text).__name__, width=model.text.text_dim)
    made_by |= getattr(model.text, "made_by", {})  # of a folder of diffusers
    encoder = getattr(model.text, "encoder_path", None)
    return Entries(folder, "text", made_by, origin=hash_network(encoder))


def caption_key(caption):
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


# ------------------------------------------------------------------ the source


class Source:
    """Captioned clips as latents: encoded once, then read batch by batch.

    data: a folder of `x.mp4` + `x.txt` / `x.json`, a CSV, a JSONL, a web-dataset tar,
    or a list of these (training/captions.py). student: the Model whose latents are
    trained on; its text (and image) encoder and negative prompt make the conditions.
    With in_channels == out_channels there is no image condition. teacher: the base's
    Model, for `pair` (stage 1a); None where only batches are needed. options: those of
    `Options`, by name.

    Each model encodes, and is stored, in its `ae_dtype` (published: teacher fp32,
    student bf16). The models need no transformer weights: a models.Deferred with a
    config will do. Clips that cannot be used: `skipped` is {name: reason}; none left is
    a UserError.
    """

    def __init__(self, data, student, teacher=None, **options):
        o = self.options = Options(**options)
        self.split, self.drop, self.ahead = o.split, o.drop, {}
        self.null = (student.negative or "") if o.null == "negative" else ""
        count = latent_frames(student, o.frames)
        self.pool = ThreadPoolExecutor(max(o.workers, 1))
        self.samples, self.skipped = captions.find_samples(data, o.caption_per_line)

        self.student, self.teacher = Space(student, o.frames, o, picture=True), None
        self.spaces = [self.student]
        if teacher:
            frames = latents.frames_alike(teacher.ae.config, student.ae.config, count)
            self.teacher = Space(teacher, frames, o, picture=False)
            self.spaces.append(self.teacher)
            for size in self.student.sizes.values():
                check_grids(self.teacher.shape(size), self.student.shape(size), size)
        self.text = prompt_entries(student, o.folder)

        prompts = [self.null]
        for sample in self.samples:
            prompts += sample.captions
        fill_cache(self.samples, self.spaces, self.text, prompts, o)
        self.bucket = {}  # key -> (height, width)
        for sample in self.samples:
            for space in self.spaces:
                facts = space.entries.facts(sample.key)
                if "skipped" in facts:
                    self.skipped[sample.name] = facts["skipped"]
                    break
            else:
                self.bucket[sample.key] = tuple(facts["bucket"])
        self._select()

    def _select(self):
        """Choose the clips of the split: held out is a tenth of all, the first by their
        keys, usable or not, so it depends on the files alone."""
        wanted = sorted(self.samples, key=lambda s: s.key)
        count = math.ceil(len(wanted) / 10) if len(wanted) > 1 else 0
        what = "clips"
        if self.split == "train":
            wanted, what = wanted[count:], "clips for training"
        elif self.split == "val":
            wanted, what = wanted[:count], "held-out clips"
        self.clips = [s for s in wanted if s.key in self.bucket]
        if not self.clips:
            raise UserError(f"none of the {len(wanted)} {what} can be used"
                            f"{captions.summary(self.skipped)}: add clips, or lower --frames.")
        by_bucket = collections.defaultdict(list)
        for sample in self.clips:
            by_bucket[self.bucket[sample.key]].append(sample)
        self.by_bucket = dict(sorted(by_bucket.items()))

    def held_out(self, drop=0.0):
        """The same source for the held-out clips -> Source. For a fixed validation set:
        `source.held_out().batch(0, range(32))`."""
        other = copy.copy(self)
        other.split, other.drop, other.ahead = "val", drop, {}
        other._select()
        return other

    def __len__(self):
        """Number of clips."""
        return len(self.clips)

    def draw(self, step, position):
        """Which clip, and which of its captions (None: dropped), position `position` of
        the global batch of `step` is -> (Sample, caption)."""
        seed = self.options.seed
        sizes = [len(clips) for clips in self.by_bucket.values()]
        # 1 and 2: so that no sample's numbers are its bucket's
        clips = weighted_choice(
            np.random.default_rng((seed, 1, step)), list(self.by_bucket.values()), sizes)
        rng = np.random.default_rng((seed, 2, step, position))
        sample = weighted_choice(rng, clips, np.ones(len(clips)))
        chances = captions.caption_chances(sample)
        chosen = weighted_choice(rng, list(sample.captions), chances)
        return sample, None if rng.random() < self.drop else chosen

    def read(self, sample, caption):
        """-> tensors of the clip's entry, and of the prompt's (None: the null prompt's)."""
        prompt = self.null if caption is None else caption
        return self.student.entries.get(sample.key), self.text.get(caption_key(prompt))

    def batch(self, step, positions):
        """Samples `positions` (a range) of the global batch of `step` -> Batch on the
        CPU, all of one bucket. Threads meanwhile read what the same positions of the
        next step need."""
        positions = tuple(positions)
        rows = self.ahead.pop((step, positions), None) or self._submit(step, positions)
        self.ahead = {key: read for key, read in self.ahead.items() if step <= key[0] <= step + 1}
        if (step + 1, positions) not in self.ahead:
            self.ahead[step + 1, positions] = self._submit(step + 1, positions)
        clips, prompts = zip(*(row.result() for row in rows))

        def stack(name):
            return torch.stack([clip[name].float() for clip in clips]) if name in clips[0] else None

        prompts = [{name: states.float() for name, states in row.items()} for row in prompts]
        prompt, clip_fea = self.student.model.text.collate(prompts), stack("clip_fea")
        seen = (prompt,) if clip_fea is None else (prompt, clip_fea)
        return Batch(stack("latent"), stack("condition"), seen)

    def _submit(self, step, positions):
        return [self.pool.submit(self.read, *self.draw(step, place)) for place in positions]

    def pair(self, i):
        """Clip i in both latent spaces -> (teacher input [c_T, t, h, w], student input
        [c_S, t, h, w]), fp32 on the CPU: the latent, and where the model is
        image-to-video the mask and condition latent behind it. The grids belong
        together: h_T w_S = h_S w_T."""
        if self.teacher is None:
            raise UserError("pairs need the base's latents too: give the source a teacher.")
        key = self.clips[i].key
        return tuple(s.inputs(s.entries.get(key)) for s in (self.teacher, self.student))

    @property
    def fingerprint(self):
        """String that changes with the clips, captions, encoders, and whatever else
        decides what a batch holds; not with paths or `folder`."""
        spaces = [space.entries.hash for space in self.spaces]
        clips = [[s.key, s.captions] for s in self.clips]
        o = self.options
        return hash_of([spaces, self.text.hash, self.split, o.seed, self.drop, self.null, clips])

    def table(self):
        """What the source holds, in Markdown: clips per bucket, captions, bytes on
        disk, what was skipped and why."""
        rows = [["bucket", f"{self.split} clips"]]
        for space in self.spaces:
            rows[0].append(f"latent of {space.model.name}")
        for size, clips in self.by_bucket.items():
            rows.append([f"{size[0]}x{size[1]}", len(clips)])
            for space in self.spaces:
                shape = (space.model.net.config.out_channels, *space.shape(size))
                rows[-1].append("x".join(map(str, shape)))

        rate, said = self.options.rate(self.student.model), 0
        for sample in self.clips:
            said += len(sample.captions)
        rule = "each line of a .txt" if self.options.caption_per_line else "a whole .txt"
        lines = [
            metrics.markdown(rows) + "\n",
            f"read at {rate:g} frames per second" if rate else "read at their own rate",
            f"captions: {said} of {len(self.clips)} clips ({rule} counts as one)"]
        kept = {f"latents of {s.model.name}, {s.frames} frames": s.entries for s in self.spaces}
        for what, entries in (*kept.items(), ("prompts", self.text)):
            if entries.folder:
                sizes = [f.stat().st_size for f in entries.folder.glob("*.safetensors")]
                lines.append(f"{what}: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB in "
                             f"{entries.folder}")
        lines.append(f"skipped: {len(self.skipped)}{captions.summary(self.skipped, examples=5)}")
        return "\n".join(lines)


def weighted_choice(rng, items, weights):
    """One of `items`, drawn with one random number in proportion to `weights`."""
    borders = np.cumsum(weights)
    index = np.searchsorted(borders, rng.random() * borders[-1], side="right")
    return items[min(int(index), len(items) - 1)]


# ------------------------------------------------------------------ filling


def fill_cache(samples, spaces, text, prompts, options):
    """Encode what is missing of `samples` in all `spaces`, and of `prompts`.

    With several processes each does its share, and then whatever is still missing, both
    in random order, so that processes that know nothing of each other seldom do the
    same. What is made does not depend on the order.
    """
    prompts = list(dict.fromkeys(prompts))
    if options.verify:
        verify(samples, spaces, text, prompts)
    missing, need = 0, 0
    for sample in samples:
        if is_missing(sample, spaces):
            missing += 1
            need += sum(space.bytes(space.sizes[1.0]) for space in spaces)
    if text.folder is not None:
        folders.check_room(text.folder.parent, need, f"the latents of {missing} clips")
    shares = [slice(None)]
    if text.folder is not None and loop.processes() > 1:
        shares = [slice(loop.rank(), None, loop.processes()), slice(None)]
    for share in shares:
        fill_prompts(spaces[0].model.text, text, prompts[share])
        fill_clips(samples[share], spaces, options)
    for space in spaces:
        space.image_encoder = None  # its memory


def is_missing(sample, spaces):
    return any(space.entries.facts(sample.key) is None for space in spaces)


def verify(samples, spaces, text, prompts):
    """Look at every byte of finished entries; the damaged are removed."""
    keys = [(text, caption_key(prompt)) for prompt in prompts]
    for space in spaces:
        keys += [(space.entries, sample.key) for sample in samples]
    for entries, key in tqdm(keys, "verify", unit="entry", disable=loop.rank() > 0, leave=False):
        entries.facts(key, whole=True)


def fill_prompts(encoder, text, prompts):
    """Encode prompts that have no entry, many for one loading of the encoder."""
    todo = shuffled(p for p in prompts if text.facts(caption_key(p)) is None)
    hidden = not todo or loop.rank() > 0
    with tqdm(total=len(todo), desc="prompts", unit="prompt", disable=hidden) as bar:
        for i in range(0, len(todo), PROMPTS):
            for prompt, states in encode_prompts(encoder, todo[i : i + PROMPTS]).items():
                text.put(caption_key(prompt), states, name=prompt)
                bar.update()


def fill_clips(samples, spaces, options):
    """Encode clips that miss an entry; threads decode them a little ahead."""
    todo = shuffled(s for s in samples if is_missing(s, spaces))
    frames, sizes = max(space.frames for space in spaces), spaces[0].sizes
    rate = options.rate(spaces[0].model)

    def read(sample):
        if is_missing(sample, spaces):  # another process may have made it by now
            return captions.read_sample(sample, frames, sizes, rate)

    hidden = not todo or loop.rank() > 0
    with tqdm(total=len(todo), desc="clips", unit="clip", disable=hidden) as bar:
        for sample, pixels in read_ahead(read, todo, options.workers, ahead=options.workers):
            encode_sample(sample, pixels, spaces)
            bar.update()


def encode_sample(sample, pixels, spaces):
    """Write the missing entries of a sample: its latents, or why there are none."""
    try:
        pixels = pixels.result()
        if pixels is None:
            return
        about = dict(bucket=list(pixels[0].shape[2:]))
    except UserError as e:
        about = dict(skipped=str(e))
    for space in spaces:
        if space.entries.facts(sample.key) is None:
            tensors = {} if "skipped" in about else space.encode(*pixels)
            space.entries.put(sample.key, tensors, name=sample.name, **about)


def shuffled(items):
    """A list in an order that no other process has."""
    items = list(items)
    random.SystemRandom().shuffle(items)
    return items
