"""A transformer of diffusers with the face of dit.WanDiT, so that no stage of an
adaptation asks which it has: latents [b, z, t, h, w] in, velocities out, a first layer that
is a matrix on patches, a last one that is linear.

    net = load("FOLDER/transformer")              diffusers' own class in it, untouched
    v = net(x, t, prompt)                         t in 0..1000; prompt: of the text encoder
    deep = inherit(net, deep_config(net.config, autoencoder.config))
    save(deep, "OUT/transformer")                 what from_pretrained of that class loads

Only two layers touch the latent (paper: AE-Adapt-V): rebuilt for another latent space, the
weights of the first and of the last (and its bias) are the only tensors that change shape,
in every family.

The matrix products are in the type that the linear layers are stored in (`cast_weights`):
bf16 under autocast, with norms, tables, embeddings, ends and adapters in fp32.
"""
import dataclasses
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import align
import dit
from families import libraries
from families.rows import FAMILIES
from files import checkpoint
from files.checkpoint import UserError
from wan.text import count

BASE_TOKEN = 16  # pixels of a base's token along each side, in every family


@dataclass(frozen=True)
class Config:
    """What the stages ask of a transformer's config."""

    dim: int
    layers: int
    in_channels: int  # of the latent: what stands beside it is the net's own business
    out_channels: int
    patch: tuple
    cell: int  # pixels of a latent cell, along each side
    positions: str = "grid"  # of Kandinsky 5's tokens: rows.kandinsky_velocity; or "index"


class Embedder(NamedTuple):
    """A first layer as a matrix on patches of the latent."""

    weight: torch.Tensor  # [d, z p q r], the latent's channels first
    bias: torch.Tensor | None  # [d]


class Net(nn.Module):
    """net(x, t, prompt) -> velocity. `transformer` is diffusers' own; its names are the
    net's, behind "transformer."."""

    def __init__(self, transformer, family, config):
        super().__init__()
        self.transformer, self.family, self.config = transformer, family, config
        #: of the class, as it is exported; diffusers' notes on it (which fields are its
        #: defaults) would bring those back
        self.stored = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
        self.latent_layers = f"transformer.{family.embedder}", f"transformer.{family.head}"
        self.ends = tuple(f"transformer.{name}" for name in family.ends)
        self.lora_targets = tuple(rf"transformer\.{name}" for name in family.targets)
        self.lora_prefix = family.lora_prefix
        transformer.register_to_config(**dict(family.running))
        self.weight_dtype = torch.float32

    # -- the two ends, and what is between

    @property
    def is_deep(self):
        """In a deep latent space? A token is larger there; shapes may be the base's."""
        return self.config.cell * self.config.patch[1] != BASE_TOKEN

    @property
    def embedder(self):
        """The first layer -> Embedder, of the latent's channels alone."""
        layer = self.transformer.get_submodule(self.family.embedder)
        return view(self.family, self.config, layer.weight, layer.bias)

    @torch.no_grad()
    def set_embedder(self, weight, bias):
        """Give the first layer a weight [d, z p q r] for the latent and a bias [d] (or
        None), in place."""
        layer, z = self.transformer.get_submodule(self.family.embedder), self.config.in_channels
        old = per_channel(self.family, self.config, layer.weight)
        old[:, :z] = weight.to(old).reshape(old[:, :z].shape)
        if layer.bias is not None:
            layer.bias.copy_(bias)

    @property
    def head_layer(self):
        """The last layer: what enters it are the features of tokens."""
        return self.transformer.get_submodule(self.family.head)

    @property
    def blocks(self):
        return self.transformer.get_submodule(self.family.blocks)

    @property
    def checkpointing(self):
        """Recompute blocks in the backward pass?"""
        return self.transformer.gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, on):
        self.transformer.gradient_checkpointing = False
        if on:
            self.transformer.enable_gradient_checkpointing()

    # -- precision

    def cast_weights(self, dtype):
        """Store the linear layers between the ends in `dtype`, and compute with it; but
        for those that the class keeps in fp32."""
        fp32 = set(getattr(self.transformer, "_keep_in_fp32_modules", None) or ())
        for name, module in self.named_modules():
            an_end = f"{name}.".startswith(self.ends) or fp32 & set(name.split("."))
            if isinstance(module, nn.Linear) and not an_end:
                module.to(dtype)
        self.weight_dtype = dtype
        return self

    def autocast(self, x):
        kind = x.device.type
        if self.weight_dtype == torch.float32 or dit.autocast_is_on(x) or kind == "meta":
            return nullcontext()
        return torch.autocast(kind, self.weight_dtype)

    # -- forward

    def embed_patches(self, x):  # b z t h w -> b t' h' w' d
        dit.check_latent(x, self.config)
        weight, bias = self.embedder
        return F.linear(align.tokens_of(x, self.config.patch), weight, bias).float()

    def forward(self, x, t, prompt, return_features=None):
        """-> velocity fp32 [b z t h w]

        x: [b z t h w]; channels for conditions are added here, zero: there is none.
        t: [b], 0..1000. prompt: `wan.models.Prompts`, or Wan's tensor [b, m, d].
        return_features: block numbers; the result is then (v, {number: output of that
            block, b t' h' w' d}).
        """
        if isinstance(prompt, list):
            prompt = self.family.collate(prompt)
        if isinstance(prompt, list):  # they cannot share a forward pass
            parts = zip(x.split(1), t.split(1), prompt, strict=True)
            return joined([self.run(*part, return_features) for part in parts])
        return self.run(x, t, prompt, return_features)

    def run(self, x, t, prompt, return_features=None):
        """`forward`, of a collated prompt."""
        dit.check_latent(x, self.config)
        a, b = self.family.beside
        beside = x.new_zeros(len(x), a * x.shape[1] + b, *x.shape[2:])
        whole = torch.cat([x, beside], dim=1).float()
        with self.autocast(x), watch(self.blocks, return_features) as features:
            v = self.family.velocity(self, whole, t.float(), prompt).float()
        if return_features is None:
            return v
        grid = [s // p for s, p in zip(x.shape[2:], self.config.patch)]
        for i, f in features.items():
            features[i] = f.unflatten(1, grid) if f.ndim == 3 else f
        return v, features


def joined(results):
    """The results of single samples -> that of their batch."""
    if torch.is_tensor(results[0]):
        return torch.cat(results)
    v, features = zip(*results)
    together = {}
    for i in features[0]:
        together[i] = torch.cat([f[i] for f in features])
    return torch.cat(v), together


@contextmanager
def watch(blocks, numbers):
    """-> {number: what that block gave}, filled while blocks run; of two streams the
    first, the video's."""
    found, hooks = {}, []

    def keep(i):
        def hook(module, args, out):
            found[i] = out[0] if isinstance(out, tuple) else out
        return hook

    try:
        for i in numbers or ():
            hooks.append(blocks[i].register_forward_hook(keep(i)))
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def per_channel(family, config, weight):
    """A first layer's own weight -> a view of it, [d, c, p, q, r]."""
    sizes = dict(zip("pqr", config.patch))
    return rearrange(weight.flatten(1), f"d ({family.order}) -> d c p q r", **sizes)


def view(family, config, weight, bias):
    """A first layer's own weight and bias -> Embedder."""
    found = per_channel(family, config, weight)
    return Embedder(found[:, : config.in_channels].flatten(1), bias)


# ------------------------------------------------ another latent space


def deep_config(config, autoencoder):
    """Config of a base, config of an autoencoder -> Config of its transformer in that
    latent space: a token for each latent cell."""
    z = autoencoder.latent_channels
    return replace(config, in_channels=z, out_channels=z, patch=(1, 1, 1),
                   cell=autoencoder.spatial_factor)


def restated(family, stored, config):
    """The class's own config with the ends of `config`."""
    (a, b), z = family.stated, config.in_channels
    takes, makes = family.channels
    sizes = {takes: a * z + b, makes: config.out_channels}
    if isinstance(stored["patch_size"], int):
        sizes |= dict(patch_size_t=config.patch[0], patch_size=config.patch[1])
    else:
        sizes["patch_size"] = config.patch
    return {**stored, **sizes}


def build(family, stored):
    """diffusers' class by its config, parameters on the meta device and tables real. What
    it draws for its weights is drawn apart: nobody's random numbers depend on it."""
    kind = libraries.a_class(libraries.diffusers(), family.transformer)
    with libraries.empty_weights(), torch.random.fork_rng(devices=[]):
        return kind.from_config(stored)


@torch.no_grad()
def inherit(base, config, share=False):
    """A net for another latent space with everything it can take from `base`: all but the
    first and the last layer. The last is zero, so it predicts exactly 0; the first is a
    fresh one. Where `config` is the base's, it is the base, bit for bit.

    share: the inherited tensors but those of the ends are the base's own, not copies.
    """
    family = base.family
    transformer = build(family, restated(family, base.stored, config))
    own, device = transformer.state_dict(), base.head_layer.weight.device
    tensors = {k: v if share and not k.startswith(family.ends) else v.clone()
               for k, v in base.transformer.state_dict().items()}
    new = config != base.config
    if new:  # named, for a deep latent may have as many channels as the base's
        for k in own:
            if k.rpartition(".")[0] in (family.embedder, family.head):
                tensors[k] = torch.zeros(own[k].shape, device=device)
    checkpoint.check_fit(own, tensors, "the base transformer")
    transformer.load_state_dict(tensors, assign=True)
    net = Net(transformer, family, config)
    net.weight_dtype = base.weight_dtype
    if new:
        net.set_embedder(*dit.fresh_embedder(config))
        keep_masks(base, net)
    return net.eval()


def keep_masks(base, net):
    """The columns for masks, which mean the same at any resolution: the base's, summed
    over its patch. (Those for a condition latent stay zero: it is another latent.)"""
    def columns(n):
        layer = n.transformer.get_submodule(n.family.embedder)
        whole = per_channel(n.family, n.config, layer.weight)
        return whole[:, whole.shape[1] - n.family.beside[1] :]

    columns(net).copy_(columns(base).sum((2, 3, 4), keepdim=True))


# ------------------------------------------------ files


class Opened(NamedTuple):
    """A transformer's folder, looked at."""

    family: object
    stored: dict  # its config.json, for the class
    config: Config
    tensors: dict  # {name: checkpoint.Stored}


def look(path):
    """A transformer's folder, as diffusers has it -> Opened; nothing is read but headers."""
    path = Path(path)
    stored = checkpoint.read_json(path / "config.json")
    family = family_of(stored.get("_class_name"), path)
    refuse_variants(stored, path)
    tensors, header = checkpoint.open_tensors(path)
    if "patch_size" not in stored:
        raise UserError(f"{path / 'config.json'} has no patch_size: get this file again.")
    first, last = tensors.get(f"{family.embedder}.weight"), tensors.get(f"{family.head}.weight")
    if first is None or last is None:
        raise UserError(f"{path} holds no {family.embedder} or no {family.head}: it is not "
                        f"complete, get it again.")
    patch = stored["patch_size"]
    if isinstance(patch, int):
        patch = stored["patch_size_t"], patch, patch
    takes = prod(first.shape[1:]) // prod(patch)
    makes = last.shape[0] // prod(patch)
    a, b = family.beside
    if takes != makes + a * makes + b:
        raise UserError(f"{path} takes {takes} channels and makes {makes}: it is not the "
                        f"text-to-video transformer of {family.name}, which would take "
                        f"{makes + a * makes + b}.")
    saved = header.get("families", {})
    config = Config(first.shape[0], count(tensors, family.blocks), makes, makes, tuple(patch),
                    saved.get("cell", BASE_TOKEN // patch[1]), saved.get("positions", "grid"))
    return Opened(family, stored, config, tensors)


def family_of(name, path):
    if name in FAMILIES:
        return FAMILIES[name]
    known = ", ".join(FAMILIES)
    raise UserError(f"{path} holds a {name or 'model without a class'}, which is of no family "
                    f"known here: use a folder with one of {known}, or add a row to "
                    "families/rows.py (where its first and last layer are, what stands beside "
                    "the latent, how it is called).")


def refuse_variants(stored, path):
    """UserError for what has the class but is another model."""
    said = None
    if stored.get("quantization_config"):
        said = "its weights are quantised: get the bf16 or fp32 ones"
    elif stored.get("use_meanflow"):
        said = "it is distilled to few steps (use_meanflow): use the model it was made from"
    elif stored.get("image_dim") or stored.get("added_kv_proj_dim"):
        said = "it is for image-to-video: use the text-to-video model of the family"
    elif stored.get("task_type", "t2v") != "t2v":
        said = f"its task is {stored['task_type']}: use the text-to-video model of the family"
    elif stored.get("img_context_dim_in") or stored.get("controlnet_block_every_n"):
        said = "it is steered by pictures (Transfer): use the Predict 2.5 model"
    elif stored.get("extra_pos_embed_type"):
        said = "it learned its positions (Cosmos 1.0 or 2.0): use a Cosmos-Predict 2.5 model"
    if said:
        raise UserError(f"{path} cannot be a base, because {said}.")


def outline(path):
    """The net that `load` would give, without its weights (on the meta device). UserError
    where the file does not fit, from its header."""
    opened = look(path)
    transformer = build(opened.family, opened.stored)
    checkpoint.check_fit(transformer.state_dict(), opened.tensors, str(path))
    return Net(transformer, opened.family, opened.config)


def load(path, dtype=torch.float32, device="cpu"):
    """A transformer's folder -> Net in eval mode, linear layers stored in `dtype`, and
    computing in it. Strict; one tensor at a time is read."""
    net = outline(path).cast_weights(dtype)
    own = net.transformer.state_dict()
    tensors = {name: stored.read().to(device, own[name].dtype, copy=True)
               for name, stored in look(path).tensors.items()}
    net.transformer.load_state_dict(tensors, assign=True)
    return net.to(device).eval()


def embedder(path):
    """The first layer alone of a transformer's folder -> Embedder, fp32."""
    family, _, config, tensors = look(path)
    weight = tensors[f"{family.embedder}.weight"].read().float()
    bias = tensors.get(f"{family.embedder}.bias")
    return view(family, config, weight, bias and bias.read().float())


def read_ends(path):
    """{name in a Net: tensor} of what is trained whole, fp32; nothing else is read."""
    family, _, _, tensors = look(path)
    return {f"transformer.{k}": v.read().float() for k, v in tensors.items()
            if k.startswith(family.ends)}


def fingerprint(path):
    """What tells any two trained models apart, quickly -> (config, {name: tensor}): all
    vectors and the ends."""
    family, stored, _, tensors = look(path)
    small = {}
    for k, v in tensors.items():
        if len(v.shape) == 1 or "scale_shift_table" in k or k.startswith(family.ends):
            small[k] = v.read()
    return {k: v for k, v in stored.items() if not k.startswith("_")}, small


def save(net, folder, metadata=None, dtype=None, format="diffusers", shard_bytes=5e9):
    """Write a folder that `from_pretrained` of the transformer's class loads, with the
    channels that the net has: `config.json`, and one file or shards."""
    if format != "diffusers":
        raise UserError(f"a {net.family.name} has no {format} layout here: use --format "
                        "diffusers.")
    tensors = checkpoint.in_type(net.transformer.state_dict(), dtype)
    header = {"format": "pt", **(metadata or {}), "families": dataclasses.asdict(net.config)}
    checkpoint.save_shards(folder, tensors, header, shard_bytes)
    told = {"_class_name": net.family.transformer,
            "_diffusers_version": libraries.diffusers().__version__,
            **net.stored}
    checkpoint.write_json(Path(folder) / "config.json", told)
