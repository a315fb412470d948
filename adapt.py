"""AE-Adapt-V: carry a pre-trained video diffusion transformer into a deeply compressed latent space (paper, section on AE-Adapt-V; spec
ae-adapt-v).

Only the two ends of the transformer touch the latent: the patch embedder E and the head. Swapped for random ones, the blocks see
embeddings they have never seen, and training end to end first improves and then collapses to noise. So the ends are fitted first:

    cache     the latents of the same clips in both spaces, z_T (base, "teacher") and z_S (deep, "student")
    stage 1a  align the patch embedder: E_S(z_S) imitates E_T(z_T), averaged over the s x s base tokens that one deep token covers.
              E_S is affine and the loss quadratic, so this is a linear regression: one solve replaces 20,000 SGD steps
    assemble  blocks, time and text embedders from the base; E_S from 1a; a new head
    stage 1b  align the head (and embedder) with the flow-matching loss, blocks frozen
    stage 2   LoRA on the blocks, embedder and head in full: the light end-to-end fine-tune

    python adapt.py --base toy              all of it on the toy, from the embedded base, in about ten minutes on two cores
    python adapt.py --base toy --pretrain   trains the toy base itself (about an hour on one core)
    python adapt.py --base toy --score      prompt fit of base and adapted model on 256 held-out prompts -> results/toy.json

After each stage it prints R^2 of the embedding, the validation loss, the norm ratio of the embedders and the prompt fit, and renders the
same prompts; out/adapt/stages.png shows what each stage gave. Rerun after an interruption: finished work is kept.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy-waiting threads slow every other process down; must precede torch

import argparse
import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from tqdm import tqdm

import ae
import checkpoint
import data
import dit
import encoders
import flow
import lora
import metrics
import models
import sample
from checkpoint import UserError
from muon import Muon

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


@torch.no_grad()
def cache_latents(model, shards, folder, seed=1):
    """Encode `shards` x SHARD toy clips with the model's autoencoder, shard by shard, into `folder` -> Latents.

    A shard that is there already, made by the same autoencoder from the same clips, is read instead; one that is damaged is made again.
    """
    shape, parts, attributes = model.latent_shape(model.frames, model.size), [], []
    looks = data.toy_batch(seed, 1, model.frames, model.size[0])[0].double().sum().item()  # changes with the toy world
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
            clips, scenes = data.toy_batch((seed, shard), SHARD, model.frames, model.size[0])
            with torch.autocast(model.device.type, torch.bfloat16):
                z = torch.cat([model.encode(x) for x in clips.split(16)])
                condition = torch.cat([model.condition(len(x), shape, x) for x in clips[:WITH_IMAGE, :, 0].split(16)])
            tensors = {"z": z.half().cpu(), "condition": condition.half().cpu()}
            checkpoint.save_tensors(file, tensors)
        attributes += [data.random_scene(rng).attributes() for _ in range(SHARD)]
        condition = torch.zeros(SHARD, *tensors["condition"].shape[1:], dtype=torch.half)
        condition[:WITH_IMAGE] = tensors["condition"]
        parts.append((tensors["z"], condition))
    index = torch.arange(shards * SHARD)
    return Latents(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), index[index % SHARD < WITH_IMAGE], attributes)


# ---------------------------------------------------------------------------------------------------- stage 1a: patch embedder


def tokens_of(x, patch):
    """[b, c, f, h, w] -> the flattened patches [b, f', h', w', c * prod(patch)] that a patch embedder multiplies."""
    pt, ph, pw = patch
    return rearrange(x, "b c (f p) (h q) (w r) -> b f h w (c p q r)", p=pt, q=ph, r=pw)


def pool(tokens, grid):
    """Average base tokens [b, f, h, w, c] over the cells of the deep grid (f', h', w'): the target of stage 1a (spec 3.2).

    Space must divide by one common integer s; in time the longer clip may be an integer multiple. UserError otherwise.
    """
    f, h, w = tokens.shape[1:4]
    if f % grid[0] or h % grid[1] or w % grid[2] or h // grid[1] != w // grid[2]:
        raise UserError(f"the base token grid {f}x{h}x{w} is no integer multiple of the deep one {'x'.join(map(str, grid))}: "
                        "use sizes of the same bucket for both autoencoders.")
    return reduce(tokens, "b (f p) (h q) (w r) c -> b f h w c", "mean", f=grid[0], h=grid[1], w=grid[2])


def paired_tokens(teacher, student, teacher_patch, student_patch):
    """Latents of the same clips -> (x [n, c_T p_T] pooled base patches, u [n, c_S p_S] deep patches), fp64.

    Pooling and the base's embedder are both linear, so patches may be pooled before they are embedded. Clips with an image
    condition come twice, with it and without it.
    """
    index = torch.arange(len(teacher.z))
    pairs = []
    for part in index.split(SHARD):
        t, s = teacher.inputs(part), student.inputs(part)
        t[:, teacher.z.shape[1] :], s[:, student.z.shape[1] :] = 0, 0
        pairs.append((t, s))
    for part in teacher.with_image.split(SHARD):
        pairs.append((teacher.inputs(part), student.inputs(part)))
    x, u = [], []
    for t, s in pairs:
        s = tokens_of(s, student_patch)
        u.append(s.flatten(0, 3))
        x.append(pool(tokens_of(t, teacher_patch), s.shape[1:4]).flatten(0, 3))
    return torch.cat(x).double(), torch.cat(u).double()


def solve_embedding(x, u, teacher, ridge=1e-5, init=None):
    """Closed form of stage 1a (spec 3.4) -> (weight [d, c_S p_S], bias [d]), fp32.

        y = W_T x + b_T,   W_S = (S_yu + l W_0)(S_uu + l I)^-1,   b_S = mean(y) - W_S mean(u),   l = ridge * tr(S_uu) / n

    with S the covariances over all tokens. W_0 is zero, or `init`: shrinking towards a Xavier initialisation keeps latent directions of low
    variance open, which noised inputs need and clean latents do not show.
    """
    weight, bias = teacher.weight.detach().cpu().flatten(1).double(), teacher.bias.detach().cpu().double()
    mean_x, mean_u = x.mean(0), u.mean(0)
    x, u = x - mean_x, u - mean_u
    cov_uu, cov_yu = u.T @ u / len(u), weight @ (x.T @ u) / len(u)
    l = ridge * cov_uu.diagonal().mean()
    start = torch.zeros_like(cov_yu) if init is None else init.detach().cpu().flatten(1).double()
    solved = torch.linalg.solve(cov_uu + l * torch.eye(len(cov_uu), dtype=torch.float64), (cov_yu + l * start).T).T
    return solved.float(), (weight @ mean_x + bias - solved @ mean_u).float()


def sgd_embedding(x, u, teacher, weight, bias, steps=2000, batch=512, lr=2e-3, seed=0):
    """Stage 1a as published (spec 3.3): AdamW, betas (0.9, 0.9), on MSE -> (weight, bias). Batches are of tokens."""
    target = F.linear(x.float(), teacher.weight.detach().cpu().flatten(1), teacher.bias.detach().cpu())
    weight, bias = (p.detach().clone().requires_grad_() for p in (weight, bias))
    opt = torch.optim.AdamW([weight, bias], lr=lr, betas=(0.9, 0.9), weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    for step in tqdm(range(steps), desc="align embedder by SGD", unit="step", leave=False):
        for group in opt.param_groups:
            group["lr"] = lr * (1 - step / steps)
        pick = torch.randint(len(u), (batch,), generator=generator)
        loss = F.mse_loss(F.linear(u[pick].float(), weight, bias), target[pick])
        opt.zero_grad()
        loss.backward()
        opt.step()
    return weight.detach(), bias.detach()


def r_squared(x, u, teacher, weight, bias):
    """(R^2, MSE) of an embedder on held-out pairs: R^2 = 1 - MSE / Var(y). MSE alone proves nothing (spec 9.8)."""
    y = F.linear(x, teacher.weight.detach().cpu().flatten(1).double(), teacher.bias.detach().cpu().double())
    mse = (y - F.linear(u, weight.double(), bias.double())).square().mean()
    return (1 - mse / (y - y.mean(0)).square().mean()).item(), mse.item()


# ---------------------------------------------------------------------------------------------------- stages 1b and 2: flow matching


def batch_of(latents, text, n, rng, null=0.1, drop=0.1, image=0.2):
    """A training batch -> (z, condition, context). Whole prompts are dropped with probability `null` (spec 5.2), single attributes
    with `drop`, so that short prompts work too; a share `image` of the clips is conditioned on its first frame."""
    use_image = rng.random(n) < image
    index = np.where(use_image, rng.choice(latents.with_image.numpy(), n), rng.integers(0, len(latents.z), n))
    prompts = [{} if rng.random() < null else {k: w for k, w in latents.attributes[i].items() if rng.random() >= drop} for i in index]
    condition = latents.condition[index].float()
    condition[torch.from_numpy(~use_image)] = 0
    return latents.z[index].float(), condition, text.encode(prompts)


def flow_loss(net, z, condition, context, generator):
    """Flow-matching loss of a batch -> (loss, per-sample mse, sigma). Noise is drawn on the CPU: the same on every device."""
    z, condition, context = (a.to(next(net.parameters()).device) for a in (z, condition, context))
    return flow.loss(lambda x, t: net(torch.cat([x, condition], dim=1), t, context), z, "shifted", SHIFT, generator)


@torch.no_grad()
def validation_loss(net, latents, text, batches=8, batch=32):
    """Mean flow-matching loss on fixed clips, prompts, noise and times."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    return sum(flow_loss(net, *batch_of(latents, text, batch, rng), generator)[0].item() for _ in range(batches)) / batches


def fit(net, latents, text, opt, lr, steps, batch, state_file, settings, desc, bf16=True, warmup=50, clip=1.0, seed=0, save_every=250):
    """Train what requires gradients with the flow-matching loss -> list of (step, loss). Goes on from `state_file`, exactly.

    The learning rate warms up, then falls linearly to zero. Batches and noise depend on (seed, step) only.
    """
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    settings = {**settings, "lr": lr, "steps": steps, "batch": batch, "seed": seed, "clips": len(latents.z)}
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
            rng, generator = np.random.default_rng((seed, step)), torch.Generator().manual_seed(seed * 1_000_003 + step)
            for group in opt.param_groups:
                group["lr"] = lr * min((step + 1) / warmup, 1 - step / steps)
            with torch.autocast(next(net.parameters()).device.type, torch.bfloat16, enabled=bf16):
                loss, *_ = flow_loss(net, *batch_of(latents, text, batch, rng), generator)
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


@torch.no_grad()
def solve_head(net, latents, text, batches=48, batch=64, ridge=1e-4, seed=7):
    """Closed form of the head (spec 4): the best linear map from the features that enter it to the velocity, by regression.

    Only forward passes at random times: accumulate sum(u u^T) and sum(u v^T) of features u (with a 1 for the bias) and target patches v.
    """
    features = []
    hook = net.head.head.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    d = net.config.dim + 1
    uu, uv = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, len(net.head.head.weight), dtype=torch.float64)
    for step in tqdm(range(batches), desc="align head by regression", unit="batch", leave=False):
        rng, generator = np.random.default_rng((seed, step)), torch.Generator().manual_seed(step)
        z, condition, context = batch_of(latents, text, batch, rng)
        sigma, t, _ = flow.sample_times(batch, "shifted", SHIFT, generator)
        noise = torch.randn(z.shape, generator=generator)
        inputs = torch.cat([flow.add_noise(z, noise, sigma), condition], dim=1), t, context
        net(*(a.to(net.head.head.weight.device) for a in inputs))
        v = rearrange(flow.velocity_target(z, noise), "b c (f p) (h q) (w r) -> (b f h w) (p q r c)",
                      **dict(zip("pqr", net.config.patch))).double()
        u = F.pad(features.pop().flatten(0, 1).double().cpu(), (0, 1), value=1.0)
        uu += u.T @ u
        uv += u.T @ v
    hook.remove()
    solved = torch.linalg.solve(uu + ridge * uu.diagonal().mean() * torch.eye(d, dtype=torch.float64), uv).T
    net.head.head.weight.copy_(solved[:, :-1])
    net.head.head.bias.copy_(solved[:, -1])


# ---------------------------------------------------------------------------------------------------- the stages in order

#: rendered after every stage, with the same noise
PROMPTS = ("a large red circle moving left slowly on a blue background",
           "a small yellow triangle moving up quickly on a black background",
           "a large green square moving right slowly on a white background",
           "a small purple ring moving down quickly on a gray background",
           "a large cyan triangle moving left quickly on a brown background",
           "a small blue square moving up slowly on a green background")


class Journal:
    """What each stage gave: numbers for report.json and a strip of frames for stages.png."""

    def __init__(self, out, latents, prompts):
        self.out, self.latents, self.prompts, self.rows, self.strips = out, latents, data.held_out_prompts(prompts), [], []

    def stage(self, name, model, seconds, latents=None, **numbers):
        """Score and render `model`, print one line, rewrite report.json and stages.png."""
        loss = validation_loss(model.net, latents or self.latents, model.text)
        fit_ = metrics.prompt_fit(sample.videos(model, self.prompts), self.prompts)
        self.rows.append(dict(stage=name, seconds=round(seconds, 1), validation_loss=loss, prompt_fit=fit_, **numbers))
        words = "  ".join(f"{k} {v:.2f}" for k, v in fit_.items())
        extra = "  ".join(f"{k} {v:.3f}" for k, v in numbers.items())
        tqdm.write(f"{name:24s} {seconds:5.0f} s   loss {loss:.4f}   prompt fit: {words}   {extra}")
        self.strips.append([x[:, [0, (x.shape[1] - 1) // 2, -1]] for x in sample.videos(model, PROMPTS)])
        data.contact_sheet(self.out / "stages.png", [torch.cat(row, dim=1) for row in zip(*self.strips)], columns=3 * len(self.strips),
                           labels=PROMPTS, heads=[row["stage"] for row in self.rows if "prompt_fit" in row])
        checkpoint.write_json(self.out / "report.json", dict(**checkpoint.provenance(), prompts=len(self.prompts), stages=self.rows))


def adapt_toy(args):
    """AE-Adapt-V on the toy, stage by stage."""
    if not 0 < args.align_shards < args.shards:
        raise UserError(f"--align-shards must be at least 1 and fewer than --shards, got {args.align_shards} and {args.shards}.")
    out, started = Path(args.out), time.perf_counter()
    base = models.load_model("base")
    deep = models.Model("toy DC-VideoGen", dit.inherit(base.net, dit.PRESETS["toy-dc"]), ae.load(models.WEIGHTS / "toy.safetensors"), base.text)
    base.to(args.device), deep.to(args.device)
    settings = dict(align=args.align, head=args.head, base=hash_of(base.net), autoencoder=hash_of(deep.ae))
    clock = lambda: time.perf_counter() - started

    # cache: alignment needs the same clips in both latent spaces, a few of them; fine-tuning needs many, in the deep space only
    teacher, teacher_held = split(cache_latents(base, args.align_shards + 1, out / "cache"))
    student, student_held = split(cache_latents(deep, args.shards + 1, out / "cache"))
    n = len(teacher.z)
    journal = Journal(out, student_held, args.prompts or 64)
    journal.stage("base", base, clock(), teacher_held)

    # stage 1a: align the patch embedder
    E_T, E_S = base.net.patch_embedding, deep.net.patch_embedding
    patches = base.net.config.patch, deep.net.config.patch
    x, u = paired_tokens(teacher, clips_of(student, 0, n), *patches)
    held = paired_tokens(teacher_held, clips_of(student, n, n + SHARD), *patches)
    W_0, b_0 = E_S.weight.detach().cpu().clone(), E_S.bias.detach().cpu().clone()

    def embedding(weight, bias):
        """How well an embedder imitates the base's, and how strongly it answers to noise."""
        r2, mse = r_squared(*held, E_T, weight, bias)
        return dict(r2=r2, mse=mse, norm_ratio=norm_ratio(weight, E_T, teacher, student, patches))

    now = lambda: embedding(E_S.weight.detach().cpu().flatten(1), E_S.bias.detach().cpu())
    methods = {"random": lambda: (W_0.flatten(1), b_0),
               "sgd": lambda: sgd_embedding(x, u, E_T, W_0.flatten(1), b_0),
               "closed_form": lambda: solve_embedding(x, u, E_T),
               "ridge_to_init": lambda: solve_embedding(x, u, E_T, 3e-2, W_0)}
    aligned = {}
    for method, solve in methods.items():
        begun = time.perf_counter()
        aligned[method] = solve()
        took, numbers = time.perf_counter() - begun, embedding(*aligned[method])
        journal.rows.append(dict(stage=f"1a {method}", seconds=round(took, 2), **numbers))
        tqdm.write(f"1a {method:20s} {took:6.2f} s   " + "  ".join(f"{k} {v:.4f}" for k, v in numbers.items()))

    # assemble: blocks from the base (dit.inherit), the aligned embedder, a zero or regressed head
    with torch.no_grad():
        E_S.weight.copy_(aligned[args.align][0].view_as(E_S.weight))
        E_S.bias.copy_(aligned[args.align][1])
    if args.head == "closed_form":
        solve_head(deep.net, student, deep.text)
    journal.stage("1a, assembled", deep, clock(), **now())

    # stage 1b: align the head with the flow-matching loss, blocks frozen
    deep.net.requires_grad_(False)
    ends = [p.requires_grad_() for part in (deep.net.patch_embedding, deep.net.head) for p in part.parameters()]
    log = fit(deep.net, student, deep.text, torch.optim.AdamW(ends, lr=args.lr_head, weight_decay=0), args.lr_head, args.steps_head, args.batch,
              out / "1b.pt", settings, "1b align head", seed=args.seed)
    journal.stage("1b, head aligned", deep, clock(), **now())
    dit.save(deep.net, out / "aligned.safetensors", dtype=torch.float16)

    # stage 2: LoRA on the blocks, the ends in full
    lora.wrap(deep.net, args.rank, 2 * args.rank, full=("patch_embedding", "head"))
    trained = [p for p in deep.net.parameters() if p.requires_grad]
    log_lora = fit(deep.net, student, deep.text, torch.optim.AdamW(trained, lr=args.lr, weight_decay=0), args.lr, args.steps, args.batch,
                   out / "2.pt", {**settings, "rank": args.rank}, "2 LoRA", seed=args.seed + 1)
    lora.save(deep.net, out / "lora.safetensors", "comfyui", full=("patch_embedding", "head"), base="toy-base", step=args.steps,
              dtype=torch.float16)
    lora.merge(deep.net)
    journal.stage("2, LoRA", deep, clock(), **now())

    dit.save(deep.net, out / "transformer.safetensors")
    ae.save(deep.ae, out / "ae.safetensors")
    offset = log[-1][0] if log else 0
    metrics.plot(out / "train.png", {"training loss: 1b, then 2": log + [(offset + s, l) for s, l in log_lora]})
    total, small = (sum(p.numel() for p in net) for net in (deep.net.parameters(), trained))
    print(f"done in {clock():.0f} s; stage 2 trained {small:,} of {total:,} parameters. See {out / 'stages.png'}, and try\n"
          f"  python sample.py --model {out} --prompt \"{PROMPTS[0]}\"")


def clips_of(latents, start, stop):
    """The clips start .. stop - 1."""
    inside = (latents.with_image >= start) & (latents.with_image < stop)
    return Latents(latents.z[start:stop], latents.condition[start:stop], latents.with_image[inside] - start, latents.attributes[start:stop])


def split(latents):
    """(training part, held-out part: the last shard)."""
    cut = len(latents.z) - SHARD
    return clips_of(latents, 0, cut), clips_of(latents, cut, len(latents.z))


def norm_ratio(weight, teacher, teacher_latents, student_latents, patches):
    """How strongly the new embedder answers to noise, against the base: |W_S|^2 / (|W_T|^2 / s^2), where s^2 base tokens are averaged
    into one deep token (spec 8, row 3). Far below 1: the blocks will see noise too faintly."""
    area = [math.prod(tokens_of(l.z[:1], p).shape[1:4]) for l, p in zip((teacher_latents, student_latents), patches)]
    return weight.square().sum().item() / teacher.weight.detach().square().sum().item() * area[0] / area[1]


def pretrain_toy(args):
    """Train the toy base transformer from nothing on the base autoencoder's latents -> out/toy-base-dit.safetensors."""
    out = Path(args.out)
    net = dit.WanDiT(dit.PRESETS["toy-base"])
    base = models.Model("toy base", net, ae.load(models.WEIGHTS / "toy-base.safetensors"), encoders.ToyText()).to(args.device)
    latents, held = split(cache_latents(base, args.shards + 1, out / "cache"))
    opt = Muon(net, args.lr, adam=(r"patch_embedding.*", r"head.*", r".*modulation", r"text_embedding.*", r"time_.*"))
    log = fit(net, latents, base.text, opt, args.lr, args.steps, args.batch, out / "pretrain.pt", dict(autoencoder=hash_of(base.ae)), "pretrain toy base", seed=args.seed)
    dit.save(net, out / "toy-base-dit.safetensors", dict(training=vars(args), log=log), dtype=torch.float16)
    metrics.plot(out / "pretrain.png", {"training loss": log})
    print(f"validation loss {validation_loss(net, held, base.text):.4f}; wrote {out / 'toy-base-dit.safetensors'}")


def score_toy(args):
    """Prompt fit of both embedded models and the reconstruction ceilings of both autoencoders -> results/toy.json."""
    prompts = data.held_out_prompts(args.prompts or 256)
    rng = np.random.default_rng(10_000_019)
    scenes = [data.scene_of(a, rng) for a in prompts]
    clips = torch.stack([data.to_tensor(data.render(s)) for s in scenes])
    rows = {"chance": {name: metrics.chance(name) for name in (*data.WORLD, "mean")}, "clips": metrics.prompt_fit(clips, prompts)}
    for name in ("base", "dc"):
        model = models.load_model(name).to(args.device)
        with torch.no_grad():
            y = torch.cat([model.ae(x.to(model.device)).cpu() for x in clips.split(16)])
        rows[f"{name}: reconstruction"] = {**metrics.prompt_fit(y, prompts), "psnr": metrics.psnr(y, clips)}
        rows[f"{name}: prompts"] = metrics.prompt_fit(sample.videos(model, prompts, progress=True), prompts)
        images = clips[:64, :, 0]
        made = []
        for i in range(0, len(images), 32):
            z = sample.generate(model, model.text.encode(prompts[i : i + 32]), images[i : i + 32], seed=i)
            made += torch.cat(list(model.decode(z, 32, (64, 64))), 2).cpu().unbind()
        first = metrics.psnr(torch.stack(made)[:, :, :1], images[:, :, None])
        rows[f"{name}: image and prompt"] = {**metrics.prompt_fit(made, prompts[:64]), "psnr": first}
    print(f"{'':26s}" + "".join(f"{k:>12s}" for k in (*data.WORLD, "mean", "psnr")))
    for name, row in rows.items():
        print(f"{name:26s}" + "".join(f"{row[k]:12.3f}" if k in row else f"{'':12s}" for k in (*data.WORLD, "mean", "psnr")))
    checkpoint.write_json(args.results, dict(**checkpoint.provenance(), prompts=len(prompts), rows=rows))


def main(argv=None):
    parser = argparse.ArgumentParser(description="AE-Adapt-V: move a video diffusion transformer into a deep latent space.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--base", choices=["toy"], default="toy", help="the pre-trained model")
    parser.add_argument("--pretrain", action="store_true", help="train the toy base itself instead")
    parser.add_argument("--score", action="store_true", help="score the embedded models on held-out prompts instead")
    parser.add_argument("--out", default="out/adapt", help="folder for caches, checkpoints and results")
    parser.add_argument("--align", choices=["closed_form", "ridge_to_init", "sgd", "random"], default="ridge_to_init", help="stage 1a")
    parser.add_argument("--head", choices=["zero", "closed_form"], default="closed_form", help="the head that stage 1b starts from")
    parser.add_argument("--shards", type=int, default=10, help=f"clips for stages 1b and 2, in shards of {SHARD}")
    parser.add_argument("--align-shards", type=int, default=3, help="the first of them, also used for stage 1a; fewer than --shards")
    parser.add_argument("--steps-head", type=int, default=800, help="steps of stage 1b")
    parser.add_argument("--lr-head", type=float, default=8e-3)
    parser.add_argument("--steps", type=int, default=1400, help="steps of stage 2 (or of --pretrain)")
    parser.add_argument("--lr", type=float, default=4e-3, help="of stage 2 (or of --pretrain)")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA; alpha is twice that, as published")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompts", type=int, help="held-out prompts to score with (default: 64, with --score 256)")
    parser.add_argument("--results", default="results/toy.json", help="where --score writes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    (pretrain_toy if args.pretrain else score_toy if args.score else adapt_toy)(args)


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()
