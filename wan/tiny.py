"""Tiny random models in the layouts in which the real ones are published: the same
folders, file names, tensor names and storage types, the same code path that reads them,
a hundred-thousandth of the size. To try that path without 20 GB:

    python -m wan.tiny OUT                  8 folders, 6 MB, seconds; then for example
    python sample.py --model wan2.1-t2v-1.3b --weights OUT/Wan2.1-T2V-1.3B \\
        --prompt "a cat" --frames 5 --size 32x48 --steps 2

The video is noise, of course. Tokens are made by the package tokenizers (pip install
tokenizers). `FOLDERS` says which folder holds which model. (The other published
layouts, those of diffusers, are written by tests/tiny_layouts.py, from the same
weights.)
"""
import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import ae
import dit
from files import errors, layouts
from files.checkpoint import UserError, write_json
from wan import vae
from wan.image import CLIPVision
from wan.text import UMT5

FOLDERS = {
    "wan2.1-t2v-1.3b": "Wan2.1-T2V-1.3B",
    "wan2.1-t2v-14b": "Wan2.1-T2V-14B",
    "wan2.1-i2v-14b-480p": "Wan2.1-I2V-14B-480P",
    "wan2.1-i2v-14b-720p": "Wan2.1-I2V-14B-720P",
    "wan2.2-t2v-a14b": "Wan2.2-T2V-A14B",
    "wan2.2-i2v-a14b": "Wan2.2-I2V-A14B",
    "wan2.2-ti2v-5b": "Wan2.2-TI2V-5B",
    "dc-wan2.1-t2v-1.3b": "dc_videogen",
    "dc-wan2.1-i2v-14b": "dc_videogen",
}
SHARDS = {"wan2.1-t2v-1.3b": 1, "wan2.2-ti2v-5b": 3, "wan2.1-i2v-14b-480p": 7,
          "wan2.1-i2v-14b-720p": 7}  # the others: 6
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"

# Heads are read from config.json where there is one (two of 12 channels here), else they
# have the published width: 128 channels in the transformer, 80 in CLIP. So what is published
# as a single .pt has one head of 128.
TEXT_DIM, IMAGE_DIM = 40, 80
SMALL = dict(dim=24, ffn_dim=40, heads=2, layers=2, text_dim=TEXT_DIM)
WIDE = dict(dim=128, ffn_dim=64, heads=1, layers=1, text_dim=TEXT_DIM, freq_dim=64)
T2V = dict(in_channels=16, out_channels=16)
I2V = dict(in_channels=36, out_channels=16)
DEEP = dict(in_channels=32, out_channels=32, patch=(1, 1, 1))
DEEP_I2V = dict(in_channels=68, out_channels=32, patch=(1, 1, 1), image_dim=IMAGE_DIM)
TRANSFORMERS = {
    "wan2.1-t2v-1.3b": dit.Config(**SMALL, **T2V),
    "wan2.1-t2v-14b": dit.Config(**SMALL, **T2V),
    "wan2.1-i2v-14b-480p": dit.Config(**SMALL, **I2V, image_dim=IMAGE_DIM),
    "wan2.1-i2v-14b-720p": dit.Config(**SMALL, **I2V, image_dim=IMAGE_DIM),
    "wan2.2-t2v-a14b": dit.Config(**SMALL, **T2V),
    "wan2.2-i2v-a14b": dit.Config(**SMALL, **I2V),
    "wan2.2-ti2v-5b": dit.Config(**SMALL, in_channels=48, out_channels=48),
    "dc-wan2.1-t2v-14b": dit.Config(**SMALL, **DEEP),
    "dc-wan2.1-i2v-14b": dit.Config(**WIDE, **DEEP_I2V),
    "dc-wan2.1-t2v-1.3b": dit.Config(**WIDE, **DEEP),
}
WORDS = "a an the of on in at and is cat dog red circle moving slowly left video very long prompt"
CHINESE = "色调艳丽过曝静态细节模糊不清字幕风格作品画面一只猫在弹钢琴"


def make(out):
    """Write all folders below `out`."""
    out = Path(out)
    for name, folder in FOLDERS.items():
        if name.startswith("wan"):
            write_base(out / folder, name)
    write_dc_videogen(out / "dc_videogen")
    link_equal_files(out)
    return out


def write_base(folder, name):
    """A base model as the original repositories have it."""
    experts = ["high_noise_model", "low_noise_model"] if "a14b" in name else [""]
    for expert, part in enumerate(experts):
        write_shards(folder / part, transformer(name, expert), SHARDS.get(name, 6))
        write_json(folder / part / "config.json", original_config(name))
    write_conditioning(folder, TRANSFORMERS[name].image_dim is not None)
    kind = "2.2" if "5b" in name else "2.1"
    torch_save(folder / f"Wan{kind}_VAE.pth", wan_autoencoder(f"wan{kind}").state_dict())


def write_dc_videogen(folder):
    """DC-VideoGen as single files of its training."""
    null = {"null_embedding": torch.zeros(512, TEXT_DIM, dtype=torch.bfloat16)}
    i2v = as_bf16(transformer("dc-wan2.1-i2v-14b"))
    t2v = {f"0.{k}": v for k, v in as_bf16(transformer("dc-wan2.1-t2v-1.3b")).items()}
    torch_save(folder / "dc_videogen_wan2.1_i2v_14b_720p_0.1.pt", {"state_dict": i2v | null})
    torch_save(folder / "dc_videogen_wan2.1_t2v_1.3b_720p_0.1.pt",
               {"ema_model_state_dict": {0.999: t2v | null}, "global_step": 1})
    torch_save(folder / "dc-ae-v-1.0-f32t4c32-bf16.pt",
               {"ema_model_state_dict": {0.999: as_bf16(deep_autoencoder().state_dict())}})
    write_conditioning(folder, True)


def write_conditioning(folder, picture):
    """Text encoder and tokenizer, for image-to-video also the image encoder."""
    torch_save(folder / "models_t5_umt5-xxl-enc-bf16.pth", text_encoder())
    write_tokenizer(folder / "google" / "umt5-xxl")
    if picture:
        torch_save(folder / CLIP_FILE, original_clip(image_encoder()))


# --------------------------------------------------------------------------------- weights


def seeded(make):
    """make() with random numbers of its own: the same weights whatever was made
    before."""
    def run(*args):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(sum(map(ord, make.__name__ + str(args))))
            return make(*args)
    return run


@seeded
def transformer(name, expert=0):
    """State dict in the original names, fp32. As if trained: the head is not zero,
    prompt and time matter, and the two experts differ."""
    net = dit.WanDiT(TRANSFORMERS[name])
    for linear in (net.head.head, *net.text_embedding[::2], *net.time_embedding[::2]):
        torch.nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    for key, p in net.named_parameters():
        if key.endswith("bias") or "norm" in key:
            p.add_(0.1 * torch.randn_like(p))
    return net.state_dict()


@seeded
def wan_autoencoder(preset):
    """4 channels wide instead of 96 (2.1) or 160 and 256 (2.2); else as released. (With
    2, norms would magnify rounding a thousandfold.)"""
    published = vae.PRESETS[preset]
    return randomised(vae.WanVAE(replace(published, width=4, decoder_width=4)), "gamma")


@seeded
def deep_autoencoder():
    """DC-AE-V f32t4c32, 8 channels wide and one block deep."""
    config = ae.Config((0, 8, 8, 8, 8, 8, 8), (0, 1, 1, 1, 1, 1, 1), 32)
    return randomised(ae.DCAEV(config), "norm.weight")


def randomised(net, scales):
    for name, p in net.named_parameters():
        if name.endswith(scales):
            p.add_(0.2 * torch.randn_like(p))
    return net.eval()


@seeded
def text_encoder():
    """State dict in the original names, bf16."""
    net = UMT5(len(pieces()), TEXT_DIM, attn_dim=24, ffn_dim=48, heads=2, layers=2)
    return as_bf16(net.state_dict())


@seeded
def image_encoder():
    """State dict of CLIP's vision tower in the original names without prefix, fp32: two
    blocks, of which the last is not used."""
    # builds all but the last
    net = CLIPVision(IMAGE_DIM, mlp_dim=40, heads=1, layers=1 + 2, patch=7, tokens=1 + 4 * 4)
    for p in (net.cls_embedding, net.pos_embedding):
        p.normal_()
    after = {"post_norm.weight": torch.ones(IMAGE_DIM), "post_norm.bias": torch.zeros(IMAGE_DIM)}
    return net.state_dict() | after


def as_bf16(sd):
    return {name: value.bfloat16() for name, value in sd.items()}


# ----------------------------------------------------------------------------------- files


def torch_save(file, container):
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(container, file)


def write_shards(folder, tensors, count, stem="diffusion_pytorch_model"):
    """One .safetensors file, or `count` of them and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    shards, where = {name: {} for name in names}, {}
    for i, (name, value) in enumerate(tensors.items()):
        where[name] = names[i * count // len(tensors)]
        shards[where[name]][name] = value.contiguous().clone()
    for file, shard in shards.items():
        save_file(shard, folder / file, metadata={"format": "pt"})
    if count > 1:
        size = sum(value.nbytes for value in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def link_equal_files(folder):
    """Text encoder and autoencoder are the same in most folders: let them share their
    room on the disk. Who changes a file copies it first."""
    first = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        other = first.setdefault(file.read_bytes(), file)
        if other is not file:
            file.unlink()
            os.link(other, file)


def original_config(name):
    """config.json as the original repositories have it: no patch size, no text_dim."""
    told = layouts.original_config(TRANSFORMERS[name])
    del told["patch_size"], told["text_dim"]
    kind = next(task for task in ("ti2v", "t2v", "i2v") if task in name)
    return told | dict(_diffusers_version="0.30.0", model_type=kind)


def original_clip(sd):
    """The original CLIP file: the vision tower, what follows it, and beginnings of the
    text tower, which nobody reads here."""
    vision = {f"visual.{name}": value for name, value in sd.items()}
    return vision | {
        "visual.head": torch.zeros(IMAGE_DIM, 16), "log_scale": torch.zeros([]),
        "textual.token_embedding.weight": torch.zeros(8, 16),
        "textual.head.0.weight": torch.zeros(16, 16)}


def pieces():
    """The vocabulary as (piece, log probability): <pad> 0, </s> 1, <unk> 2, then words
    and single characters."""
    ascii = "".join(map(chr, range(33, 127)))
    characters = dict.fromkeys("▁" + ascii + CHINESE + "é—、。")
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -4.0 - 0.01 * i) for i, word in enumerate(WORDS.split())]
    return special + words + [(c, -10.0 - 0.01 * i) for i, c in enumerate(characters)]


def write_tokenizer(folder):
    """A SentencePiece unigram tokenizer as `tokenizer.json`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = []
    for i, (piece, _) in enumerate(pieces()[:3]):
        special.append({"id": i, "content": piece, **flags, "special": True})
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    ending = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence",
                          "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
        "post_processor": {"type": "TemplateProcessing", "single": [one, end],
                           "pair": [one, end, other, end], "special_tokens": {"</s>": ending}},
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces(), "byte_fallback": False}})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>", "extra_ids": 0, "additional_special_tokens": [],
        "model_max_length": 512, "clean_up_tokenization_spaces": False})


def out_argument(description):
    """The command line's only argument -> a folder that is new or empty."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, help="folder to write them to, new or empty")
    out = parser.parse_args().out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there and not empty: name a new folder.")
    return out


def main():
    out = out_argument("Write tiny random models in the layouts in which the real ones are "
                       "published.")
    files = [f for f in make(out).rglob("*") if f.is_file()]
    size = sum(f.stat().st_size / f.stat().st_nlink for f in files) / 1e6
    print(f"{len(files)} files, {size:.1f} MB, in {out}")


if __name__ == "__main__":
    with errors.user_errors():
        main()
