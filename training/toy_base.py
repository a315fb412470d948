"""The toy as a base model: procedural clips cached in both latent spaces, its training
data, its score, its pre-training.

Everything AE-Adapt-V needs of a base exists here in small: an autoencoder of moderate
compression with a transformer trained on it, a deep one to move into, clips with
captions that can be drawn without end, and a score that needs no network, because
`toy_score.prompt_fit` reads the prompt's attributes back from the pixels.

    cache_latents(model, shards, folder)   the same clips in each model's space -> Latents
    Source(latents, text)                  what a training step sees: batch(step, positions),
                                           and the alignment: pair(i)
    pretrain, score                        how the embedded base was made; how the
                                           embedded models score
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import ae
import align
import dit
import flow
import kernels
import sample
import toy
from files import checkpoint, folders
from files.checkpoint import UserError
from training import loop, metrics, toy_score
from training.cache import Batch
from training.entries import Entries, hash_encoder, hash_of, hash_tensors
from training.journal import validation_loss
from training.muon import Muon
from wan import models, released

SHARD = 256  # clips per cache entry
WITH_IMAGE = 64  # the first so many of them are cached with an image condition too
TIMES = flow.Times("shifted", shift=3.0)  # in training as in sampling

#: prompts to look at, rendered after every stage with the same noise
PROMPTS = ("a large red circle moving left slowly on a blue background",
           "a small yellow triangle moving up quickly on a black background",
           "a large green square moving right slowly on a white background",
           "a small purple ring moving down quickly on a gray background",
           "a large cyan triangle moving left quickly on a brown background",
           "a small blue square moving up slowly on a green background")

# ------------------------------------------------ cache


@dataclass
class Latents:
    """Clips in one latent space. The same clip has the same index in every space."""

    z: torch.Tensor  # [n, z, t, h, w], scaled as the transformer sees them
    condition: torch.Tensor  # [n, 4 + z, t, h, w], zero but for the clips in `with_image`
    with_image: torch.Tensor  # indices
    attributes: list  # the captions

    def inputs(self, index):
        """Clean transformer input [b, 2 z + 4, t, h, w]: latent, mask, condition."""
        return torch.cat([self.z[index], self.condition[index]], dim=1).float()

    def part(self, start, stop):
        """The clips start .. stop - 1."""
        inside = (self.with_image >= start) & (self.with_image < stop)
        rows = slice(start, stop)
        return Latents(self.z[rows], self.condition[rows], self.with_image[inside] - start,
                       self.attributes[rows])


@torch.no_grad()
def encode(model, clips, with_image=0):
    """Clips [n, 3, t, h, w] -> the tensors of an entry, fp16: their latents, and the
    image conditions of the first `with_image`."""
    shape = model.latent_shape(clips.shape[2], clips.shape[3:])
    with kernels.autocast(model.device):
        tensors = {"z": torch.cat([model.encode(x) for x in clips.split(16)])}
        if with_image:
            images = clips[:with_image, :, 0].split(16)
            conditions = [model.condition(len(x), shape, x) for x in images]
            tensors["condition"] = torch.cat(conditions)
    return {name: value.half().cpu() for name, value in tensors.items()}


def entries_of(model, folder):
    """Where the latents of a model's autoencoder are kept. The sum over one clip
    changes with the toy world."""
    clip = toy.toy_batch(1, 1, model.frames, model.size[0])[0]
    made_by = dict(autoencoder=hash_encoder(model.ae), clips=[SHARD, WITH_IMAGE],
                   world=clip.double().sum().item(), shape=list(clip.shape[2:]))
    return Entries(folder, "toy", made_by)


def cache_latents(model, shards, folder, seed=1):
    """Encode `shards` x SHARD toy clips with the model's autoencoder into `folder` ->
    Latents. A shard that is there already is read instead; one that is damaged is made
    again."""
    entries, parts, attributes = entries_of(model, folder), [], []
    for shard in tqdm(range(shards), f"cache latents of {model.name}", unit="shard"):
        key = f"{seed}-{shard:04d}"
        if entries.facts(key) is None:
            clips, _ = toy.toy_batch((seed, shard), SHARD, model.frames, model.size[0])
            entries.put(key, encode(model, clips, WITH_IMAGE))
        tensors = entries.get(key)
        condition = torch.zeros(SHARD, *tensors["condition"].shape[1:], dtype=torch.half)
        condition[:WITH_IMAGE] = tensors["condition"]
        parts.append((tensors["z"], condition))
        rng = np.random.default_rng((seed, shard))  # as `toy.toy_batch` draws its scenes
        attributes += [toy.random_scene(rng).attributes() for _ in range(SHARD)]
    z, condition = map(torch.cat, zip(*parts))
    index = torch.arange(len(z))
    with_image = index[index % SHARD < WITH_IMAGE]
    return Latents(z, condition, with_image, attributes)


def encode_scenes(model, scenes, folder):
    """Latents of given scenes in the model's space, without image condition; kept in
    `folder`."""
    entries = entries_of(model, folder)
    key = f"scenes-{hash_of([asdict(scene) for scene in scenes])}"
    if entries.facts(key) is None:
        clips = toy.clips_of(scenes, model.frames, model.size[0])
        entries.put(key, encode(model, clips))
    z = entries.get(key)["z"]
    condition = torch.zeros(len(z), 4 + z.shape[1], *z.shape[2:], dtype=z.dtype)
    return Latents(z, condition, torch.arange(0), [s.attributes() for s in scenes])


# ------------------------------------------------ training data


class Source:
    """Toy clips as training data. The clips and prompts of a sample depend on (seed,
    step, its position in the global batch) only.

    teacher: the same clips (or the first of them) in the base's latent space, for
    `pair`. null: share of samples whose whole prompt is dropped; drop: share of single
    attributes, so
        that short prompts work too; image: share of samples that are conditioned on
        their first frame.
    """

    def __init__(self, latents, text, teacher=None, seed=0, null=0.1, drop=0.1, image=0.2):
        self.latents, self.text, self.teacher = latents, text, teacher
        self.seed, self.null, self.drop = seed, null, drop
        self.image = image if len(latents.with_image) else 0.0
        clips = f"toy {len(latents.z)} clips {hash_tensors({'z': latents.z})}"
        self.fingerprint = f"{clips}, seed {seed}, null {null}, drop {drop}, image {self.image}"

    def __len__(self):
        return len(self.latents.z if self.teacher is None else self.teacher.z)

    def table(self):
        return f"{len(self.latents.z)} clips, {len(self)} of them in both spaces"

    def draw(self, step, position):
        """-> (index of a clip, its prompt as attributes, is it conditioned on its
        image?)"""
        rng = np.random.default_rng((self.seed, step, position))
        shown = rng.random() < self.image
        choices = self.latents.with_image.numpy() if shown else len(self.latents.z)
        index = int(rng.choice(choices))
        prompt = {}
        if rng.random() >= self.null:
            for name, word in self.latents.attributes[index].items():
                if rng.random() >= self.drop:
                    prompt[name] = word
        return index, prompt, shown

    def batch(self, step, positions):
        """The samples at these positions of a step's global batch -> Batch on the
        CPU."""
        drawn = [self.draw(step, position) for position in positions]
        index, prompts, shown = map(list, zip(*drawn))
        shown = torch.tensor(shown)[:, None, None, None, None]
        condition = self.latents.condition[index].float() * shown
        return Batch(self.latents.z[index].float(), condition, (self.text.encode(prompts),))

    def pair(self, i):
        """Clean input of clip i in both spaces, [c, t, h, w] each; with the image
        condition where the clip has one."""
        return self.teacher.inputs([i])[0], self.latents.inputs([i])[0]


# ------------------------------------------------ pre-training

#: in place of what the stages of an adaptation have
PRETRAINING = dict(steps=1900, lr=2e-3, batch=16, ema=0.998)
#: what Muon leaves to Adam
FIRST_AND_LAST = (r"patch_embedding.*", r"head.*", r".*modulation", r"text_embedding.*",
                  r"time_.*")


def pretrain(args):
    """Train the toy base transformer, from nothing or from the weights that
    --continue-from names, on the base autoencoder's latents -> OUT/toy-base-dit.safetensors,
    the averaged weights."""
    out = Path(args.out)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    net = dit.WanDiT(dit.PRESETS["toy-base"])
    if args.continue_from:
        net = dit.load(args.continue_from)
        if net.config != dit.PRESETS["toy-base"]:
            raise UserError(f"{args.continue_from} is no base of this toy: give --continue-from "
                            "the file of an earlier --pretrain, or leave it out.")
    autoencoder = ae.load(args.ae or released.WEIGHTS / "toy-base.safetensors")
    base = models.Model("toy base", net, autoencoder, toy.ToyText()).to(device)
    latents = cache_latents(base, args.shards + 1, args.cache)
    last = args.shards * SHARD  # the shard behind it is held out
    source = Source(latents.part(0, last), base.text, seed=args.seed)
    held_out = Source(latents.part(last, last + SHARD), base.text)
    prompts = toy.held_out_prompts(32, seed=20_000_003)  # not those that `score` uses

    opt = Muon(net, args.lr, adam=FIRST_AND_LAST)
    plan = loop.Plan(args.steps, warmup=100, ema=args.ema, save_every=args.save_every)
    config = dict(autoencoder=hash_encoder(autoencoder), data=source.fingerprint, lr=args.lr,
                  batch=args.batch, seed=args.seed)
    if args.continue_from:
        config["start"] = hash_tensors(net.state_dict())
    run = loop.Run(out, config, {"net": net}, {"net": opt}, plan)

    def report(run):
        with run.averaged(), kernels.autocast(device):
            net.eval()
            fit = toy_score.prompt_fit(sample.videos(base, prompts), prompts)
            measured = {"validation": validation_loss(net, held_out, TIMES, SHARD)}
        loop.plot(out)
        return measured | {f"fit_{name}": value for name, value in fit.items()}

    fit(run, net, source, args.batch, args.seed, "pretrain toy base", report=report)
    loop.copy_into(net, run.average)
    log = [line for line in loop.read_log(out) if "validation" in line]
    metadata = dict(training=run.config, log=log)
    dit.save(net, out / "toy-base-dit.safetensors", metadata, dtype=torch.float16)
    loop.plot(out)
    print(f"wrote {out / 'toy-base-dit.safetensors'}")


def fit(run, net, source, size, seed, what, first=0, before=None, report=None):
    """The training run of `net` with the flow-matching loss on batches of `size` clips of a
    `Source`. Its steps count from `first`; before(step) is called at the beginning of each."""
    device = next(net.parameters()).device

    def batches(number):
        while True:
            step, positions = run.positions(number, size)
            step += first
            batch = source.batch(step, positions)
            yield batch, flow.draw(batch.z.shape[1:], TIMES, seed, step, positions)
            number += 1

    def losses(both, number):
        batch, drawn = both
        if before:
            before(first + number)
        with kernels.autocast(device):
            velocity = align.velocity_of(net.train(), batch, device)
            loss, _ = flow.loss(velocity, batch.z, drawn)
        yield "net", loss, {"loss": loss.detach()}

    run.fit(batches(run.number), losses, report, what)


# ------------------------------------------------ score


def score(args):
    """Prompt fit of both embedded models and the reconstruction ceilings of both
    autoencoders -> args.results, and a table."""
    folders.writable_file(args.results)
    prompts = toy.held_out_prompts(args.prompts or 256)
    rng = np.random.default_rng(10_000_019)
    clips = toy.clips_of([toy.scene_of(a, rng) for a in prompts])
    chance = {name: toy_score.chance(name) for name in (*toy.WORLD, "mean")}
    rows = {"chance": chance, "clips": judge(clips, prompts)}
    for name in ("base", "dc"):
        model = released.load_model(name).to(args.device)
        rows[f"{name}: reconstruction"] = score_reconstruction(model, prompts, clips)
        made = sample.videos(model, prompts, progress=True)
        rows[f"{name}: prompts"] = judge(torch.stack(made), prompts)
        rows[f"{name}: image and prompt"] = score_images(model, prompts[:64], clips[:64])
    columns = (*toy.WORLD, "mean", "object", "border", "psnr")
    print(" " * 26 + "".join(f"{k:>12s}" for k in columns))
    for name, row in rows.items():
        cells = [f"{row[k]:.3f}" if k in row else "" for k in columns]
        print(f"{name:26s}" + "".join(cell.rjust(12) for cell in cells))
    found = dict(**checkpoint.provenance(), prompts=len(prompts), rows=rows)
    checkpoint.write_json(args.results, found)


def judge(videos, prompts):
    """Prompt fit of videos [n, 3, t, h, w]; "object": share in which one is found;
    "border": change from frame to frame where chunks of 8 meet over that elsewhere."""
    still = torch.zeros_like(videos)
    return {**toy_score.prompt_fit(videos, prompts),
            "object": toy_score.shows_something(videos),
            "border": metrics.flicker(videos, still, ae.PRESETS["toy"].chunk)}


@torch.no_grad()
def score_reconstruction(model, prompts, clips):
    """Prompt fit and PSNR of what a model's autoencoder makes of the clips of prompts."""
    made = torch.cat([model.ae(x.to(model.device)).float().cpu() for x in clips.split(16)])
    return {**judge(made, prompts), "psnr": metrics.psnr(made, clips)}


def score_images(model, prompts, clips):
    """Prompt fit of videos that begin with the first frames of `clips`, and the PSNR of
    their own first frames."""
    made = torch.stack(sample.videos(model, prompts, images=clips[:, :, 0]))
    return {**judge(made, prompts), "psnr": metrics.psnr(made[:, :, :1], clips[:, :, :1])}
