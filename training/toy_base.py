"""The toy as a base model: procedural clips cached in both latent spaces, its training data, its score, its pre-training.

Everything AE-Adapt-V needs of a base exists here in small: an autoencoder of moderate compression (f8t4c16) with a transformer trained on it,
a deep one (f32t4c32) to move into, clips with captions that can be drawn without end, and a score that needs no network, because
`toy.prompt_fit` reads the prompt's attributes back from the pixels.

    cache_latents(model, shards, folder)     the same clips in the latent space of each model -> Latents
    Source(latents, text)                    what a training step sees: batch(step, positions); pairs for the alignment: pair(i)
    pretrain, score                          how the embedded base was made; how the embedded models score
"""
import hashlib
from dataclasses import dataclass
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
from files import checkpoint, video
from files.checkpoint import UserError
from training import metrics
from training.cache import Batch
from training.muon import Muon
from wan import models, released

SHARD = 256  # clips per cache file
WITH_IMAGE = 64  # the first so many of them are cached with an image condition too
SHIFT = 3.0  # of the time sampling, in training as in sampling


# ---------------------------------------------------------------------------------------------------- cache


@dataclass
class Latents:
    """Clips in one latent space: z [n, z, t, h, w], scaled as the transformer sees them; `condition` [n, 4 + z, t, h, w] is zero but for
    the clips in `with_image`; `attributes` are the captions. The same clip has the same index in every space."""

    z: torch.Tensor
    condition: torch.Tensor
    with_image: torch.Tensor
    attributes: list

    def inputs(self, index):
        """Clean transformer input [b, 2 z + 4, t, h, w]: latent, mask, condition."""
        return torch.cat([self.z[index], self.condition[index]], dim=1).float()


def hash_of(net, *more):
    """A fingerprint of a network's config and weights, and of whatever else decides: work done with others is not taken for one's own."""
    digest = hashlib.sha256(repr((net.config, more)).encode())
    for value in net.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def digest(tensor):
    """A short fingerprint of a tensor's values."""
    return hashlib.sha256(tensor.contiguous().cpu().numpy().tobytes()).hexdigest()[:8]


@torch.no_grad()
def cache_latents(model, shards, folder, seed=1):
    """Encode `shards` x SHARD toy clips with the model's autoencoder, shard by shard, into `folder` -> Latents.

    A shard that is there already, made by the same autoencoder from the same clips, is read instead; one that is damaged is made again.
    """
    shape, parts, attributes = model.latent_shape(model.frames, model.size), [], []
    looks = toy.toy_batch(seed, 1, model.frames, model.size[0])[0].double().sum().item()  # changes with the toy world
    fingerprint = hash_of(model.ae, SHARD, shape, looks)
    for shard in tqdm(range(shards), desc=f"cache latents of {model.name}", unit="shard"):
        file = Path(folder) / fingerprint / f"seed{seed}-{shard:04d}.safetensors"
        tensors = None
        if file.exists():
            try:
                tensors, _ = checkpoint.load_tensors(file)
            except UserError as e:
                tqdm.write(f"made again: {e}")
        rng = np.random.default_rng((seed, shard))
        if tensors is None:
            clips, scenes = toy.toy_batch((seed, shard), SHARD, model.frames, model.size[0])
            with kernels.autocast(model.device):
                z = torch.cat([model.encode(x) for x in clips.split(16)])
                condition = torch.cat([model.condition(len(x), shape, x) for x in clips[:WITH_IMAGE, :, 0].split(16)])
            tensors = {"z": z.half().cpu(), "condition": condition.half().cpu()}
            checkpoint.save_tensors(file, tensors)
        attributes += [toy.random_scene(rng).attributes() for _ in range(SHARD)]
        condition = torch.zeros(SHARD, *tensors["condition"].shape[1:], dtype=torch.half)
        condition[:WITH_IMAGE] = tensors["condition"]
        parts.append((tensors["z"], condition))
    index = torch.arange(shards * SHARD)
    return Latents(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), index[index % SHARD < WITH_IMAGE], attributes)


@torch.no_grad()
def encode_scenes(model, scenes, folder, name):
    """Latents of given scenes (without image condition) in the model's space, kept in `folder`; `name` is for the progress bar."""
    shape = model.latent_shape(model.frames, model.size)
    file = Path(folder) / f"scenes-{hash_of(model.ae, shape, scenes)}.safetensors"
    if file.exists():
        z = checkpoint.load_tensors(file)[0]["z"]
    else:
        z = []
        for i in tqdm(range(0, len(scenes), 16), desc=f"encode {name}", leave=False):
            clips = torch.stack([video.to_tensor(toy.render(s, model.frames, model.size[0])) for s in scenes[i : i + 16]])
            with kernels.autocast(model.device):
                z.append(model.encode(clips).half().cpu())
        z = torch.cat(z)
        checkpoint.save_tensors(file, {"z": z})
    return Latents(z, torch.zeros(len(z), 4 + z.shape[1], *z.shape[2:], dtype=z.dtype), torch.arange(0), [s.attributes() for s in scenes])


def clips_of(latents, start, stop):
    """The clips start .. stop - 1."""
    inside = (latents.with_image >= start) & (latents.with_image < stop)
    return Latents(latents.z[start:stop], latents.condition[start:stop], latents.with_image[inside] - start, latents.attributes[start:stop])


def split(latents):
    """(training part, held-out part: the last shard)."""
    cut = len(latents.z) - SHARD
    return clips_of(latents, 0, cut), clips_of(latents, cut, len(latents.z))


# ---------------------------------------------------------------------------------------------------- training


class Source:
    """Toy clips as training data. The clips and prompts of a sample depend on (seed, step, its position in the global batch) only.

    teacher: the same clips (or the first of them) in the base's latent space, for `pair`.
    null: share of samples whose whole prompt is dropped (spec 5.2); drop: share of single attributes, so that short prompts work too;
    image: share of samples that are conditioned on their first frame.
    """

    def __init__(self, latents, text, teacher=None, seed=0, null=0.1, drop=0.1, image=0.2):
        self.latents, self.text, self.teacher, self.seed = latents, text, teacher, seed
        self.null, self.drop, self.image = null, drop, image if len(latents.with_image) else 0.0
        self.fingerprint = f"toy {len(latents.z)} clips {digest(latents.z)}, seed {seed}, null {null}, drop {drop}, image {self.image}"

    def __len__(self):
        return len(self.latents.z if self.teacher is None else self.teacher.z)

    def batch(self, step, positions):
        """The samples at these positions of a step's global batch -> cache.Batch on the CPU."""
        index, prompts, shown = [], [], []
        for position in positions:
            rng = np.random.default_rng((self.seed, step, position))
            shown.append(rng.random() < self.image)
            index.append(int(rng.choice(self.latents.with_image.numpy()) if shown[-1] else rng.integers(len(self.latents.z))))
            dropped = rng.random() < self.null
            prompts.append({} if dropped else {k: w for k, w in self.latents.attributes[index[-1]].items() if rng.random() >= self.drop})
        condition = self.latents.condition[index].float() * torch.tensor(shown)[:, None, None, None, None]
        return Batch(self.latents.z[index].float(), condition, self.text.encode(prompts), None)

    def pair(self, i):
        """Clean input of clip i in both spaces, [c, t, h, w] each; with the image condition where the clip has one."""
        return self.teacher.inputs([i])[0], self.latents.inputs([i])[0]


def flow_loss(net, batch, generator, mode="shifted"):
    """Flow-matching loss of a batch -> (loss, per-sample mse, sigma). Noise is drawn on the CPU: the same on every device."""
    device = next(net.parameters()).device
    return flow.loss(align.velocity_of(net, batch, device), batch.z.to(device), mode, SHIFT, generator)


@torch.no_grad()
def validation_loss(net, latents, text, batches=8, batch=32):
    """Mean flow-matching loss on fixed clips, prompts, noise and times."""
    source, generator = Source(latents, text), torch.Generator().manual_seed(0)
    return sum(flow_loss(net, source.batch(step, range(batch)), generator)[0].item() for step in range(batches)) / batches


def fit(net, source, opt, lr, steps, batch, state_file, settings, desc, bf16=True, warmup=50, clip=1.0, seed=0, save_every=250):
    """Train what requires gradients with the flow-matching loss -> list of (step, loss). Goes on from `state_file`, exactly.

    The learning rate warms up, then falls linearly to zero. Batches and noise depend on (seed, step) only.
    """
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    settings = {**settings, "lr": lr, "steps": steps, "batch": batch, "seed": seed, "data": source.fingerprint}
    step, log = 0, []
    if state_file.exists():
        saved = checkpoint.load_pickle(state_file)
        if saved["settings"] != settings:
            raise UserError(f"{state_file} was made with other settings ({saved['settings']}): use those, or another --out.")
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(saved["trained"][name])
        opt.load_state_dict(saved["opt"])
        step, log = saved["step"], saved["log"]
    net.train()
    running = []
    with tqdm(total=steps, initial=step, desc=desc, unit="step", mininterval=2) as bar:
        while step < steps:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            for group in opt.param_groups:
                group["lr"] = lr * min((step + 1) / warmup, 1 - step / steps)
            with kernels.autocast(next(net.parameters()).device, bf16):
                loss, *_ = flow_loss(net, source.batch(step, range(batch)), generator)
            if not torch.isfinite(loss):
                raise UserError(f"the loss is {loss.item()} at step {step} of '{desc}': lower its learning rate; {state_file} holds the last good state.")
            opt.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), clip)
            opt.step()
            step += 1
            running.append(loss.item())
            bar.update()
            if step % save_every == 0 or step == steps:
                log.append((step, sum(running) / len(running)))
                running.clear()
                bar.set_postfix(loss=f"{log[-1][1]:.4f}")
                state = dict(trained={k: p.detach() for k, p in trained.items()}, opt=opt.state_dict(), step=step, log=log, settings=settings)
                with checkpoint.atomic_path(state_file) as tmp, open(tmp, "wb") as f:  # a full disk is an OSError only this way
                    torch.save(state, f)
    net.eval()
    return log


# ---------------------------------------------------------------------------------------------------- score, pre-training

#: prompts to look at, rendered after every stage with the same noise
PROMPTS = ("a large red circle moving left slowly on a blue background",
           "a small yellow triangle moving up quickly on a black background",
           "a large green square moving right slowly on a white background",
           "a small purple ring moving down quickly on a gray background",
           "a large cyan triangle moving left quickly on a brown background",
           "a small blue square moving up slowly on a green background")


def pretrain(args):
    """Train the toy base transformer from nothing on the base autoencoder's latents -> out/toy-base-dit.safetensors."""
    out = Path(args.out)
    net = dit.WanDiT(dit.PRESETS["toy-base"])
    base = models.Model("toy base", net, ae.load(released.WEIGHTS / "toy-base.safetensors"), toy.ToyText()).to(args.device)
    latents, held = split(cache_latents(base, args.shards + 1, out / "cache"))
    opt = Muon(net, args.lr, adam=(r"patch_embedding.*", r"head.*", r".*modulation", r"text_embedding.*", r"time_.*"))
    log = fit(net, Source(latents, base.text, seed=args.seed), opt, args.lr, args.steps, args.batch, out / "pretrain.pt", dict(autoencoder=hash_of(base.ae)), "pretrain toy base", seed=args.seed)
    dit.save(net, out / "toy-base-dit.safetensors", dict(training=dict(lr=args.lr, steps=args.steps, batch=args.batch, shards=args.shards, seed=args.seed), log=log), dtype=torch.float16)
    metrics.plot(out / "pretrain.png", {"training loss": log})
    print(f"validation loss {validation_loss(net, held, base.text):.4f}; wrote {out / 'toy-base-dit.safetensors'}")


def score(args):
    """Prompt fit of both embedded models and the reconstruction ceilings of both autoencoders -> results/toy.json."""
    prompts = toy.held_out_prompts(args.prompts or 256)
    rng = np.random.default_rng(10_000_019)
    scenes = [toy.scene_of(a, rng) for a in prompts]
    clips = torch.stack([video.to_tensor(toy.render(s)) for s in scenes])
    rows = {"chance": {name: toy.chance(name) for name in (*toy.WORLD, "mean")}, "clips": toy.prompt_fit(clips, prompts)}
    for name in ("base", "dc"):
        model = released.load_model(name).to(args.device)
        with torch.no_grad():
            y = torch.cat([model.ae(x.to(model.device)).cpu() for x in clips.split(16)])
        rows[f"{name}: reconstruction"] = {**toy.prompt_fit(y, prompts), "psnr": metrics.psnr(y, clips)}
        rows[f"{name}: prompts"] = toy.prompt_fit(sample.videos(model, prompts, progress=True), prompts)
        images = clips[:64, :, 0]
        made = []
        for i in range(0, len(images), 32):
            z = sample.generate(model, model.text.encode(prompts[i : i + 32]), images[i : i + 32], seed=i)
            made += torch.cat(list(model.decode(z, 32, (64, 64))), 2).cpu().unbind()
        first = metrics.psnr(torch.stack(made)[:, :, :1], images[:, :, None])
        rows[f"{name}: image and prompt"] = {**toy.prompt_fit(made, prompts[:64]), "psnr": first}
    print(f"{'':26s}" + "".join(f"{k:>12s}" for k in (*toy.WORLD, "mean", "psnr")))
    for name, row in rows.items():
        print(f"{name:26s}" + "".join(f"{row[k]:12.3f}" if k in row else f"{'':12s}" for k in (*toy.WORLD, "mean", "psnr")))
    checkpoint.write_json(args.results, dict(**checkpoint.provenance(), prompts=len(prompts), rows=rows))
