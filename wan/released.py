"""The released models: which files each is made of, in every published layout, the
settings it was made for, and how it is loaded.

`load_model` looks for the files of a row of `RELEASED` in the folders it is given, in
the original, the diffusers and both DC-VideoGen layouts, and says exactly which are
missing; nothing is downloaded unasked. It also loads the embedded toys and what
adapt.py writes.
"""
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

import ae
import dit
import lora
import toy
from files import ROOT, checkpoint, lora_keys
from files.checkpoint import UserError
from wan import nets, vae
from wan.image import WanImage
from wan.models import Deferred, Lora, Model
from wan.text import WanText

WEIGHTS = ROOT / "weights"  # the embedded toy models

NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")
NEGATIVE_I2V = "镜头晃动，" + NEGATIVE
NEGATIVE_ENGLISH = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, "
    "images, static, overall gray, worst quality, low quality, JPEG compression residue, ugly, "
    "incomplete, extra fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, "
    "misshapen limbs, fused fingers, still picture, messy background, three legs, many people in "
    "the background, walking backwards")


# ----------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Released:
    """One released model: its files and its defaults."""

    repo: str | None  # on the model hub; None: no place to fetch the files from is known
    preset: str  # of dit.PRESETS
    files: dict  # part -> patterns, relative to the folder; the repo's own layout first
    size: tuple = (720, 1280)  # height, width
    frames: int = 81
    fps: int = 16
    steps: int = 50
    shift: float = 5.0
    guidance: float | tuple = 5.0  # or (low-noise expert, high-noise expert)
    solver: str = "unipc"
    negative: str = NEGATIVE
    boundary: float = 0.0  # the high-noise expert works at timesteps >= 1000 * boundary
    task: str = "t2v"  # "i2v": needs a picture; "ti2v": takes one
    picture: str = "dc"  # how a picture is resized: "wan" or "dc", see `models.resize`
    area: int = 0  # image-to-video: pixels of a frame of the picture's aspect; 0: `size`


_TEXT = {
    "text encoder": ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder/*.safetensors"),
    "tokenizer": ("google/umt5-xxl/*", "tokenizer/*"),
}
_DC_TEXT = {part: patterns[::-1] for part, patterns in _TEXT.items()}
_CLIP = {"image encoder": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
                           "image_encoder/*.safetensors")}
_VAE = {"autoencoder": ("Wan2.1_VAE.pth", "vae/*.safetensors")}
_VAE_22 = {"autoencoder": ("Wan2.2_VAE.pth", "vae/*.safetensors")}
_DC_AE = {"autoencoder": ("dc-ae-v-f32t4c32-1.0-bf16.pt", "dc-ae-v-1.0-f32t4c32-bf16.pt")}
_WAN = {
    "transformer": ("diffusion_pytorch_model*.safetensors", "transformer/*.safetensors"),
    **_VAE, **_TEXT,
}
_EXPERTS = {
    "transformer": ("high_noise_model/*.safetensors", "transformer/*.safetensors"),
    "low-noise transformer": ("low_noise_model/*.safetensors", "transformer_2/*.safetensors"),
    **_VAE, **_TEXT,
}
_DC_T2V = {
    "transformer": ("transformer_t2v/*.safetensors", "transformer/*.safetensors"),
    **_DC_AE, **_DC_TEXT,
}
_DC_I2V = {
    "transformer": ("transformer_i2v/*.safetensors", "transformer/*.safetensors",
                    "dc_videogen_wan2.1_i2v_14b_720p_0.1.pt"),
    **_DC_AE, **_DC_TEXT, **_CLIP,
}
_DC_SMALL = {
    "transformer": ("dc_videogen_wan2.1_t2v_1.3b_720p_0.1.pt", "transformer/*.safetensors",
                    "transformer_t2v/*.safetensors"),
    **_DC_AE, **_DC_TEXT,
}
_I2V = dict(task="i2v", picture="wan", steps=40)
_DC = dict(size=(704, 1280), frames=80, solver="unipc_diffusers", negative=NEGATIVE_ENGLISH)

RELEASED = {
    "wan2.1-t2v-1.3b": Released(
        "Wan-AI/Wan2.1-T2V-1.3B", "wan2.1-t2v-1.3b", _WAN, size=(480, 832)),
    "wan2.1-t2v-14b": Released("Wan-AI/Wan2.1-T2V-14B", "wan2.1-t2v-14b", _WAN),
    "wan2.1-i2v-14b-480p": Released(
        "Wan-AI/Wan2.1-I2V-14B-480P", "wan2.1-i2v-14b", _WAN | _CLIP, size=(480, 832),
        area=480 * 832, shift=3.0, negative=NEGATIVE_I2V, **_I2V),
    "wan2.1-i2v-14b-720p": Released(
        "Wan-AI/Wan2.1-I2V-14B-720P", "wan2.1-i2v-14b", _WAN | _CLIP, area=720 * 1280,
        negative=NEGATIVE_I2V, **_I2V),
    "wan2.2-t2v-a14b": Released(
        "Wan-AI/Wan2.2-T2V-A14B", "wan2.2-t2v-a14b", _EXPERTS, steps=40, shift=12.0,
        guidance=(3.0, 4.0), boundary=0.875),
    "wan2.2-i2v-a14b": Released(
        "Wan-AI/Wan2.2-I2V-A14B", "wan2.2-i2v-a14b", _EXPERTS, area=720 * 1280,
        guidance=(3.5, 3.5), boundary=0.9, **_I2V),
    "wan2.2-ti2v-5b": Released(
        "Wan-AI/Wan2.2-TI2V-5B", "wan2.2-ti2v-5b", _WAN | _VAE_22, size=(704, 1280),
        area=704 * 1280, frames=121, fps=24, task="ti2v"),
    "dc-wan2.1-t2v-14b": Released(
        "nvidia/DC-VideoGen-Wan2.1-14B", "dc-wan2.1-t2v-14b", _DC_T2V, **_DC),
    "dc-wan2.1-i2v-14b": Released(
        "nvidia/DC-VideoGen-Wan2.1-14B", "dc-wan2.1-i2v-14b", _DC_I2V, task="i2v",
        area=720 * 1280, **_DC),
    "dc-wan2.1-t2v-1.3b": Released(
        None, "dc-wan2.1-t2v-1.3b", _DC_SMALL, guidance=3.0, **_DC),
}


def settings_of(row):
    """The defaults that a Model takes over from its row."""
    own = {f.name for f in dataclasses.fields(Model)}
    return {name: value for name, value in vars(row).items() if name in own}


# ---------------------------------------------------------------------------- the files


def find(patterns, folders):
    """The first of the patterns that exists in one of the folders -> a file, or the
    folder that holds several; None if there is none."""
    for folder in folders:
        for pattern in patterns:
            found = sorted(Path(folder).glob(pattern))
            if found:
                return found[0].parent if "*" in pattern else found[0]
    return None


def locate(name, folders, optional=()):
    """Where the parts of a released model lie -> {part: path}. Missing parts are a
    UserError that lists them and the command that fetches them; parts in `optional` may
    be missing (their path is None)."""
    row = RELEASED[name]
    found = {part: find(patterns, folders) for part, patterns in row.files.items()}
    missing = [part for part in found if found[part] is None and part not in optional]
    if missing:
        lines = [f"    {part}: {' or '.join(row.files[part])}" for part in missing]
        fetch = "; no place to fetch them from is known."
        if row.repo:
            command = download_command(name, folders[0])
            fetch = f", or fetch them with --download or with\n    {command}"
        lines.append(f"name the folders that hold them with --weights DIR [DIR ...]{fetch}")
        where = ", ".join(map(str, folders))
        first = f"{name} is not complete in {where}; missing are\n"
        raise UserError(first + "\n".join(lines))
    return found


def wanted(name):
    """Patterns to download: the repo's own layout, and the small files (configs,
    indices) beside the weights."""
    return [*(patterns[0] for patterns in RELEASED[name].files.values()), "*.json"]


def download_command(name, folder):
    """The command of the hub's own client that fetches a model's files."""
    patterns = " ".join(f'"{pattern}"' for pattern in wanted(name))
    return f"hf download {RELEASED[name].repo} --include {patterns} --local-dir {folder}"


def download(name, folder):
    """Fetch a model's files with the hub's own client, resumable; a UserError says what
    to install where it is missing."""
    repo = RELEASED[name].repo
    if repo is None:
        raise UserError(f"no place to fetch {name} from is known: leave --download away and name "
                        "its folder with --weights.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError("--download needs the hub's client: pip install huggingface_hub, or fetch "
                        f"the files yourself with {download_command(name, folder)}") from None
    try:
        snapshot_download(repo, local_dir=folder, allow_patterns=wanted(name))
    except Exception as e:  # no network, repo or access: the client's own, no common base
        reason = str(e).splitlines()[0]
        raise UserError(f"the download of {repo} failed ({reason}): run it again, finished files "
                        "are kept.") from e


# --------------------------------------------------------------------------- by its name


def load_model(name="dc", weights=(), loras=(), dtype=torch.float32, device="cpu",
               text_cache=None):
    """A model by name -> Model on `device`.

    "base" and "dc": the embedded toy models. A name of RELEASED: its files in the
    folders `weights` (default: checkpoints/NAME). A folder written by adapt.py: its
    merged model; a LoRA file of such a folder is put on the embedded base. `loras`:
    `models.Lora`, or (file, strength), put on the transformer. dtype: of the
    transformer's matrix products.
    """
    one = isinstance(weights, (str, Path))
    folders = [Path(w) for w in ([weights] if one else weights)]
    loras = [Lora(*given) for given in loras]
    check_loras(name, loras)
    if name in RELEASED:
        folders = folders or [Path("checkpoints") / name]
        return load_released(name, folders, loras, dtype, device, text_cache).to(device)
    if Path(name).is_dir():
        return load_adapted(Path(name), folders, loras, dtype, device, text_cache).to(device)
    model = load_embedded(name, folders[0] if folders else WEIGHTS)
    for file, strength, _ in loras:
        lora.load(model.net, file, strength)
    model.net.cast_weights(dtype)
    return model.to(device)


def check_loras(name, loras):
    """UserError now, not when the transformer is read."""
    experts = name in RELEASED and RELEASED[name].boundary > 0
    experts = experts or bool(find(transformer_files("transformer_2"), [name]))
    for file, strength, expert in loras:
        lora_keys.file_of(file)
        if expert and not experts:
            raise UserError(f"{name} has one transformer, no experts: use --lora "
                            f"{file}:{strength:g} without :{expert}.")


def load_released(name, folders, loras=(), dtype=torch.float32, device="cpu", text_cache=None):
    """One of RELEASED from its files."""
    row, dc = RELEASED[name], name.startswith("dc-")
    cached = ("text encoder", "tokenizer") if text_cache and Path(text_cache).exists() else ()
    parts = locate(name, folders, optional=cached)
    net, low = Deferred(parts["transformer"], loras, dtype, expert="high"), None
    check_ends(net, name)
    if "low-noise transformer" in parts:
        low = Deferred(parts["low-noise transformer"], loras, dtype, expert="low")
        check_ends(low, name)
    autoencoder = (ae if dc else vae).load(parts["autoencoder"])
    settings = settings_of(row) | stored_settings(folders, dc)
    return Model(name, net, autoencoder, text_of(parts, net, device, text_cache), upscale=1,
                 low=low, clip=clip_of(parts, device, row.picture),
                 ae_dtype=ae_type(name, dtype), **settings)


def text_of(parts, net, device, text_cache):
    return WanText(parts["text encoder"], parts["tokenizer"], device, cache=text_cache,
                   text_dim=net.config.text_dim)


def clip_of(parts, device, rule):
    if "image encoder" not in parts:
        return None
    return WanImage(parts["image encoder"], device, rule=rule)


def check_ends(part, name):
    """UserError where what a transformer takes and makes is not what the released model
    `name` does."""
    expected = ends(dit.PRESETS[RELEASED[name].preset])
    if ends(part.config) != expected:
        raise UserError(f"{part.path} holds the transformer of another model: "
                        f"{ends(part.config)}; {name} has {expected}: name its folder with "
                        "--weights.")


def ends(config):
    patch = "x".join(map(str, config.patch))
    branch = "an image branch" if config.image_dim else "no image branch"
    return (f"{config.in_channels} channels in, {config.out_channels} out, patches of {patch}, "
            f"{branch}")


def ae_type(name, dtype):
    """The released programs run the Wan VAE in fp32 and the DC-AE-V in bf16; on request
    of fp32 all is fp32."""
    return dtype if name.startswith("dc-") else torch.float32


def stored_settings(folders, dc):
    """Settings that a folder in diffusers' layout brings: the experts' boundary, and
    for DC-VideoGen the schedule's shift. (The diffusers conversions of the base models
    bring one too, but not the one their original programs use.)"""

    def stored(file, key):
        path = find([file], folders)
        return json.loads(path.read_text()).get(key) if path else None

    found = {"boundary": stored("model_index.json", "boundary_ratio")}
    if dc:
        found["shift"] = stored("scheduler/scheduler_config.json", "flow_shift")
    return {name: value for name, value in found.items() if value is not None}


def outline(name, dtype=torch.float32):
    """A released model without its files, of published shapes: enough to plan memory,
    not to run."""
    row = RELEASED[name]
    with torch.device("meta"):
        if name.startswith("dc-"):
            autoencoder = ae.DCAEV(ae.PRESETS["f32t4c32"])
        else:
            kind = "wan2.2" if name == "wan2.2-ti2v-5b" else "wan2.1"
            autoencoder = vae.WanVAE(vae.PRESETS[kind])
    net = Deferred(None, config=dit.PRESETS[row.preset])
    low = Deferred(None, config=net.config) if row.boundary else None
    return Model(name, net, autoencoder, text=None, upscale=1, low=low,
                 ae_dtype=ae_type(name, dtype), **settings_of(row))


def load_embedded(name, weights):
    """The embedded toy models, or a LoRA file on their base."""
    base = weights / "toy-base-dit.safetensors"
    if name == "base":
        autoencoder = ae.load(weights / "toy-base.safetensors")
        return Model("toy base", dit.load(base), autoencoder, toy.ToyText())
    if name != "dc" and Path(name).suffix != ".safetensors":
        raise UserError(f"there is no model {name!r}: use base, dc, {', '.join(RELEASED)}, a "
                        "folder made by adapt.py, or its lora.safetensors.")
    net = dit.inherit(dit.load(base), dit.PRESETS["toy-dc"])
    lora.load(net, weights / "toy-dc-lora.safetensors" if name == "dc" else name)
    title = "toy DC-VideoGen" if name == "dc" else str(name)
    return Model(title, net.eval(), ae.load(weights / "toy.safetensors"), toy.ToyText())


# ------------------------------------------------------------------- what adapt.py writes

#: what adapt.py notes in the header of a model that it writes, and `load_adapted` reads
SAMPLING = ("frames", "size", "fps", "steps", "shift", "guidance", "solver", "upscale",
            "negative", "task", "picture", "area", "boundary")


def sampling_of(told):
    """What adapt.py noted in a transformer's header -> those fields of a Model."""
    found = {}
    for name, value in told.get("sampling", {}).items():
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


def transformer_files(stem):
    """Patterns of a transformer as one file or as a folder in diffusers' layout."""
    return f"{stem}.safetensors", f"{stem}/*.safetensors"


def load_adapted(path, folders, loras=(), dtype=torch.float32, device="cpu", text_cache=None):
    """A folder written by adapt.py: ae.safetensors and transformer.safetensors (for Wan
    2.2 also transformer_2, for low noise), or folders of these names in diffusers'
    layout. How it samples stands in the transformer's header; without that it is taken
    for the released DC-VideoGen model of the same shape. Text (and image) encoder come
    from `folders`."""
    high = find(transformer_files("transformer"), [path])
    low = find(transformer_files("transformer_2"), [path])
    for stem, there in (("transformer", high), ("ae", (path / "ae.safetensors").is_file())):
        if not there:
            raise UserError(f"{path / stem}.safetensors does not exist: give a folder made by "
                            f"adapt.py, or a model's name with --weights {path}.")
    net = Deferred(high, loras, dtype, expert=low and "high")
    low = low and Deferred(low, loras, dtype, expert="low")
    autoencoder = ae.load(path / "ae.safetensors")
    told, c = checkpoint.open_tensors(high)[1].get("adapted", {}), net.config
    own = sampling_of(told)
    picture = c.in_channels > c.out_channels
    if c.text_dim == toy.ToyText.text_dim:
        settings = {"task": "ti2v" if picture else "t2v", **own}
        return Model(str(path), net.get("cpu"), autoencoder, toy.ToyText(), **settings)
    alike = f"dc-wan2.1-{'i2v' if picture else 't2v'}-14b"
    row = RELEASED[told.get("base") or ("dc-wan2.1-t2v-1.3b" if c.dim < 5120 else alike)]
    parts = {part: find(patterns, folders) for part, patterns in row.files.items()}
    settings = {"upscale": 1, **settings_of(row), **own}
    return Model(str(path), net, autoencoder, text_of(parts, net, device, text_cache), low=low,
                 clip=clip_of(parts, device, "dc") if c.image_dim else None, ae_dtype=dtype,
                 **settings)


def is_large(name):
    """Is a model, by its name, anything but the toy? A folder is if its transformer
    reads umT5's prompts, or is of another family."""
    if name in RELEASED or name.startswith("diffusers:") or is_of_family(name):
        return True
    file = find(transformer_files("transformer"), [name])
    return bool(file) and nets.read_config(file).text_dim != toy.ToyText.text_dim


def is_of_family(path):
    """Is it a folder that adapt.py made of a base in diffusers' layout (families/)?"""
    file = Path(path) / "transformer"
    return (file / "config.json").is_file() and "families" in checkpoint.open_tensors(file)[1]
