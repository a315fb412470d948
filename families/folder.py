"""A base as the folder of a diffusers pipeline: which family it is, whether it can be a
base, and its parts as one model.

    model_index.json     the pipeline's class, and the class of each part
    transformer/         config.json and weights, perhaps in shards
    vae/  text_encoder/  tokenizer/  scheduler/  ...

    model = load_model("HunyuanVideo-1.5-Diffusers-480p_t2v")      wan.models.Model

Everything is looked at before anything is read: what is missing, quantised, of another
task or of no family known is refused in a sentence. No code of the folder is run.
"""
import re
import warnings
from pathlib import Path

import torch

import ae
from families import autoencoder, net
from families.rows import FAMILIES
from families.text import Text
from files import checkpoint
from files.checkpoint import UserError
from wan import models, released
from wan.text import WanText

PREFIX = "diffusers:"  # of a base's name on the command line


class Deferred(models.Deferred):
    """A transformer of diffusers on disk."""

    nets = net


def read_index(folder):
    """model_index.json of a folder -> dict. UserError where the folder cannot be a base."""
    folder = Path(folder)
    file = folder / "model_index.json"
    if not file.is_file():
        raise UserError(f"{folder} is no folder of a diffusers pipeline (it has no "
                        "model_index.json): name the folder that holds transformer/ and vae/.")
    index = checkpoint.read_json(file)
    kinds = {k: v[1] for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1]}
    pipeline = index.get("_class_name")
    if "transformer" not in kinds:
        raise UserError(f"{folder} holds a {pipeline} without a transformer: use a text-to-video "
                        f"pipeline with one of {', '.join(FAMILIES)}.")
    family = net.family_of(kinds["transformer"], folder)
    if pipeline not in family.pipelines:
        raise UserError(f"{folder} holds a {pipeline}, which is for another task: use a folder of "
                        f"{' or '.join(family.pipelines)}.")
    if "image_encoder" in kinds:
        raise UserError(f"{folder} has an image encoder, so it is for image-to-video: use the "
                        "text-to-video model of the family.")
    if "transformer_2" in kinds or index.get("expand_timesteps"):
        raise UserError(f"{folder} is a Wan 2.2 model, which has a path of its own: use --base "
                        "wan2.2-t2v-a14b --weights with this folder.")
    if programs := sorted(folder.rglob("*.py")):
        raise UserError(f"{programs[0]} is a program, and nothing of a folder is run: use a folder "
                        "whose classes diffusers has.")
    check_parts(folder, family, kinds)
    return index


def check_parts(folder, family, kinds):
    """UserError for a part that is missing, in pieces, or stored in a way that cannot be
    trained from."""
    for part in ("transformer", "vae", "scheduler", *family.text):
        path, kind = folder / part, part.removesuffix("_2")
        if part not in kinds or not path.is_dir():
            raise UserError(f"{folder} has no {part}/, or its model_index.json does not say what "
                            "is in it: get this part of the model too.")
        if kind in ("tokenizer", "scheduler"):
            continue
        config = checkpoint.read_json(path / "config.json")
        if "auto_map" in config:
            raise UserError(f"{path} names a program to run (auto_map), and nothing of a folder is "
                            "run: use a folder whose classes diffusers has.")
        if config.get("quantization_config"):
            raise UserError(f"the weights in {path} are quantised: get the bf16 or fp32 ones.")
        checkpoint.open_tensors(path)  # every shard is there, and whole


def load_model(folder, dtype=torch.float32, device="cpu", text_cache=None, loras=()):
    """A pipeline's folder -> wan.models.Model on `device`, the transformer not read yet."""
    folder = Path(folder)
    index = read_index(folder)
    family = net.family_of(index["transformer"][1], folder)
    warn(folder, family)
    transformer = Deferred(folder / "transformer", loras, dtype)
    vae = autoencoder.load(folder / "vae")
    text = text_of(folder, family, index, device, text_cache)
    shift, guidance = schedule_of(folder, family), guidance_of(folder, family)
    return models.Model(
        f"{family.name} ({folder.name})", transformer, vae, text, frames=family.frames,
        size=family.size, fps=family.fps, steps=family.steps, shift=shift, guidance=guidance,
        solver=family.solver, upscale=1, negative=family.negative, task="t2v").to(device)


def text_of(folder, family, index, device="cpu", text_cache=None):
    """The text encoder of a pipeline's folder: umT5 as Wan's own path has it, or `Text`."""
    config = checkpoint.read_json(folder / "text_encoder" / "config.json")
    if family.encode is None:
        return WanText(folder / "text_encoder", folder / "tokenizer", device, cache=text_cache,
                       text_dim=config["d_model"])
    if text_cache:
        raise UserError(f"--text-cache says nothing to {family.name}, whose prompts are kept with "
                        "the latents: leave it out.")
    width = config.get("hidden_size") or config["text_config"]["hidden_size"]
    return Text(folder, family, index, width, device)


# ------------------------------------------------ what the folder says of sampling

#: scheduler's class -> (its field for the shift, what must be as the solvers here have it)
SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": ("shift", dict(
        use_dynamic_shifting=False, stochastic_sampling=False, invert_sigmas=False,
        shift_terminal=None, use_karras_sigmas=False, use_exponential_sigmas=False,
        use_beta_sigmas=False)),
    "UniPCMultistepScheduler": ("flow_shift", dict(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2,
        solver_type="bh2", predict_x0=True, use_dynamic_shifting=False, shift_terminal=None,
        use_karras_sigmas=False)),
}


def schedule_of(folder, family):
    """The shift of the noise levels that the folder's scheduler has. Where it works in
    another way than the family's solver here, a warning."""
    file = folder / "scheduler" / "scheduler_config.json"
    told = checkpoint.read_json(file)
    field, expected = SCHEDULERS[family.scheduler]
    if family.solver == "unipc_karras":
        expected = expected | dict(use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01)
    odd = [f"{k} {told[k]}" for k, v in expected.items() if told.get(k, v) != v]
    if told.get("_class_name") != family.scheduler:
        odd = [told.get("_class_name")]
    if odd:
        warnings.warn(f"{file} has {', '.join(odd)}, which is not how {family.name} samples "
                      f"here: {family.solver} takes its place, and samples will differ.")
    return float(told.get(field, 1.0))


def guidance_of(folder, family):
    """The strength of classifier-free guidance that the folder has, or the family."""
    file = folder / "guider" / "guider_config.json"
    if not file.is_file():
        return family.guidance
    told = checkpoint.read_json(file)
    return float(told.get("guidance_scale", family.guidance)) if told.get("enabled", True) else 1.0


def warn(folder, family):
    """What is possible, but not what the family was made for."""
    if family.note:
        print(f"{family.name}: {family.note}")
    config = checkpoint.read_json(folder / "transformer" / "config.json")
    by_name = re.search(r"distill|nocfg", folder.name.lower())
    if by_name or guidance_of(folder, family) == 1:
        warnings.warn(f"{folder} is distilled to run without guidance: train with --drop 0, and "
                      "sample with --guidance 1.")
    if config.get("attention_type") == "nabla":
        warnings.warn(f"{folder} has sparse attention (nabla), and here it is dense, which it was "
                      "not trained with.")


# ------------------------------------------------ what adapt.py made of a base


def load_adapted(path, folders, loras=(), dtype=torch.float32, device="cpu"):
    """A folder that adapt.py wrote from a base of diffusers -> wan.models.Model. The text
    encoder is that of the base's folder, the first of `folders`."""
    path = Path(path)
    family = net.look(path / "transformer").family
    if not folders:
        raise UserError(f"{path} was made from a folder of {family.name}, which has its text "
                        "encoder: name that folder with --weights.")
    base = Path(folders[0])
    text = text_of(base, family, read_index(base), device)
    _, header = checkpoint.open_tensors(path / "transformer")
    settings = released.sampling_of(header.get("adapted", {}))
    transformer = Deferred(path / "transformer", loras, dtype)
    return models.Model(str(path), transformer, ae.load(path / "ae.safetensors"), text,
                        ae_dtype=dtype, **settings).to(device)


def load_any(name, weights=(), loras=(), dtype=torch.float32, device="cpu", text_cache=None):
    """A model by the name that `sample.py --model` takes: `released.load_model`; a folder of
    diffusers (diffusers:FOLDER), or what adapt.py made of one, whose text encoder comes from
    the folder `weights`."""
    if name.startswith(PREFIX):
        return load_model(name.removeprefix(PREFIX), dtype, device, text_cache, loras)
    if released.is_of_family(name):
        return load_adapted(name, weights, loras, dtype, device)
    return released.load_model(name, weights, loras, dtype, device, text_cache)
