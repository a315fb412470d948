"""Tiny random models in every layout in which the real ones are published (spec wan 3.1, 9.2): the same folders, file names, tensor names
and storage types, the same code path that reads them, a hundred-thousandth of the size.

    python tests/make_tiny_checkpoints.py OUT        18 folders, 11 MB, a few seconds; then for example
    python sample.py --model wan2.1-t2v-1.3b --weights OUT/Wan2.1-T2V-1.3B --prompt "a cat" --frames 5 --size 32x48 --steps 2

What is published twice (original and diffusers layout) is written twice from one set of weights. diffusers' own pipelines read the
`-Diffusers` folders. `FOLDERS` says which folders hold which model.
"""
import json
import os
import shutil
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file

import ae
import dit
from wan import vae
from wan.image import CLIPVision, CLIP_MEAN, CLIP_NAMES, CLIP_STD
from wan.text import UMT5, UMT5_NAMES

FOLDERS = {  # model -> the folders that hold it, once for each layout
    "wan2.1-t2v-1.3b": [["Wan2.1-T2V-1.3B"], ["Wan2.1-T2V-1.3B-Diffusers"]],
    "wan2.1-t2v-14b": [["Wan2.1-T2V-14B"], ["Wan2.1-T2V-14B-Diffusers"]],
    "wan2.1-i2v-14b-480p": [["Wan2.1-I2V-14B-480P"], ["Wan2.1-I2V-14B-480P-Diffusers"]],
    "wan2.1-i2v-14b-720p": [["Wan2.1-I2V-14B-720P"], ["Wan2.1-I2V-14B-720P-Diffusers"]],
    "wan2.2-t2v-a14b": [["Wan2.2-T2V-A14B"], ["Wan2.2-T2V-A14B-Diffusers"]],
    "wan2.2-i2v-a14b": [["Wan2.2-I2V-A14B"], ["Wan2.2-I2V-A14B-Diffusers"]],
    "wan2.2-ti2v-5b": [["Wan2.2-TI2V-5B"], ["Wan2.2-TI2V-5B-Diffusers"]],
    "dc-wan2.1-t2v-14b": [["DC-VideoGen-Wan2.1-14B"], ["DC-Gen-Wan2.1-T2V-14B"]],
    # the newer of the two layouts takes its image encoder from another repository; the single file is named in evaluations
    "dc-wan2.1-i2v-14b": [["DC-VideoGen-Wan2.1-14B"], ["DC-Gen-Wan2.1-I2V-14B", "Wan2.1-I2V-14B-720P-Diffusers"], ["dc_videogen"]],
    "dc-wan2.1-t2v-1.3b": [["dc_videogen"]],
}

# Heads are read from config.json where there is one (two of 12 channels here), else they have the published width: 128 channels in the
# transformer, 80 in CLIP. So what is published as a single .pt has one head of 128.
TEXT_DIM, IMAGE_DIM = 40, 80
SMALL = dict(dim=24, ffn_dim=40, heads=2, layers=2, text_dim=TEXT_DIM)
WIDE = dict(dim=128, ffn_dim=64, heads=1, layers=1, text_dim=TEXT_DIM, freq_dim=64)
TRANSFORMERS = {
    "wan2.1-t2v-1.3b": dit.Config(**SMALL, in_channels=16, out_channels=16),
    "wan2.1-t2v-14b": dit.Config(**SMALL, in_channels=16, out_channels=16),
    "wan2.1-i2v-14b-480p": dit.Config(**SMALL, in_channels=36, out_channels=16, image_dim=IMAGE_DIM),
    "wan2.1-i2v-14b-720p": dit.Config(**SMALL, in_channels=36, out_channels=16, image_dim=IMAGE_DIM),
    "wan2.2-t2v-a14b": dit.Config(**SMALL, in_channels=16, out_channels=16),
    "wan2.2-i2v-a14b": dit.Config(**SMALL, in_channels=36, out_channels=16),
    "wan2.2-ti2v-5b": dit.Config(**SMALL, in_channels=48, out_channels=48),
    "dc-wan2.1-t2v-14b": dit.Config(**SMALL, in_channels=32, out_channels=32, patch=(1, 1, 1)),
    "dc-wan2.1-i2v-14b": dit.Config(**WIDE, in_channels=68, out_channels=32, patch=(1, 1, 1), image_dim=IMAGE_DIM),
    "dc-wan2.1-t2v-1.3b": dit.Config(**WIDE, in_channels=32, out_channels=32, patch=(1, 1, 1)),
}
DC_SHIFT = 3.0  # of the DC-VideoGen folders' scheduler; not the default, so that a test sees it read
WORDS = "a an the of on in at and is cat dog red circle moving slowly left video very long prompt".split()
CHINESE = "色调艳丽过曝静态细节模糊不清字幕风格作品画面一只猫在弹钢琴"


def make(out):
    """Write all folders below `out`."""
    out = Path(out)
    t5, clip, vae21, vae22, deep = text_encoder(), image_encoder(), wan_autoencoder("wan2.1"), wan_autoencoder("wan2.2"), deep_autoencoder()

    def conditioning(folder, diffusers, picture):
        """Text encoder and tokenizer, for image-to-video also the image encoder, in the original or the diffusers layout."""
        if diffusers:
            write_text_encoder(folder / "text_encoder", t5)
            write_tokenizer(folder / "tokenizer")
        else:
            torch_save(folder / "models_t5_umt5-xxl-enc-bf16.pth", t5)
            write_tokenizer(folder / "google" / "umt5-xxl")
        if picture and diffusers:
            write_image_encoder(folder, clip)
        elif picture:
            torch_save(folder / CLIP_FILE, original_clip(clip))

    base = {"wan2.1-t2v-1.3b": 1, "wan2.1-t2v-14b": 6, "wan2.1-i2v-14b-480p": 7, "wan2.1-i2v-14b-720p": 7,  # number of shards
            "wan2.2-t2v-a14b": 6, "wan2.2-i2v-a14b": 6, "wan2.2-ti2v-5b": 3}
    for name, shards in base.items():
        (original,), (diffusers,) = FOLDERS[name]
        experts = [transformer(name, expert) for expert in range(1 + ("a14b" in name))]
        picture = TRANSFORMERS[name].image_dim is not None
        vae = vae22 if "5b" in name else vae21
        for weights, part in zip(experts, ("high_noise_model", "low_noise_model") if len(experts) > 1 else ("",)):
            write_shards(out / original / part, weights, shards)
            write_json(out / original / part / "config.json", original_config(name))
        conditioning(out / original, False, picture)
        torch_save(out / original / ("Wan2.2_VAE.pth" if vae is vae22 else "Wan2.1_VAE.pth"), vae.state_dict())
        for weights, part in zip(experts, ("transformer", "transformer_2")):
            write_transformer(out / diffusers / part, name, weights, 2)
        conditioning(out / diffusers, True, picture)
        write_vae(out / diffusers / "vae", vae)
        write_json(out / diffusers / "scheduler" / "scheduler_config.json", scheduler(3.0))
        write_json(out / diffusers / "model_index.json", model_index(name))

    t2v, i2v = (as_bf16(transformer(f"dc-wan2.1-{task}-14b")) for task in ("t2v", "i2v"))
    for folder, parts in (("DC-VideoGen-Wan2.1-14B", {"transformer_t2v": "dc-wan2.1-t2v-14b", "transformer_i2v": "dc-wan2.1-i2v-14b"}),
                          ("DC-Gen-Wan2.1-T2V-14B", {"transformer": "dc-wan2.1-t2v-14b"}),
                          ("DC-Gen-Wan2.1-I2V-14B", {"transformer": "dc-wan2.1-i2v-14b"})):
        for part, name in parts.items():
            write_transformer(out / folder / part, name, t2v if "t2v" in name else i2v, 2)
        conditioning(out / folder, True, picture=False)
        write_json(out / folder / "scheduler" / "scheduler_config.json", scheduler(DC_SHIFT))
        torch_save(out / folder / "dc-ae-v-f32t4c32-1.0-bf16.pt", {"model_state_dict": as_bf16(deep.state_dict()), "global_step": 1})
    torch_save(out / "DC-VideoGen-Wan2.1-14B" / CLIP_FILE, original_clip(clip))

    folder, null = out / "dc_videogen", torch.zeros(512, TEXT_DIM, dtype=torch.bfloat16)
    sd = {f"0.{name}": value for name, value in as_bf16(transformer("dc-wan2.1-t2v-1.3b")).items()}
    torch_save(folder / "dc_videogen_wan2.1_t2v_1.3b_720p_0.1.pt",
               {"ema_model_state_dict": {0.999: {**sd, "null_embedding": null}}, "global_step": 1})
    torch_save(folder / "dc_videogen_wan2.1_i2v_14b_720p_0.1.pt", {"state_dict": {**i2v, "null_embedding": null}})
    torch_save(folder / "dc-ae-v-1.0-f32t4c32-bf16.pt", {"ema_model_state_dict": {0.999: as_bf16(deep.state_dict())}})
    conditioning(folder, False, picture=True)
    link_equal_files(out)
    return out


def link_equal_files(folder):
    """Text encoder and autoencoder are the same in most folders: let them share their room on the disk. Who changes a file copies it first."""
    first = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        other = first.setdefault(file.read_bytes(), file)
        if other is not file:
            file.unlink()
            os.link(other, file)


# ---------------------------------------------------------------------------------------------------- weights


def seeded(make):
    """make() with random numbers of its own: the same weights whatever was made before."""
    def run(*args):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(sum(map(ord, make.__name__ + str(args))))
            return make(*args)
    return run


@seeded
def transformer(name, expert=0):
    """State dict in the original names, fp32. As if trained: the head is not zero, prompt and time matter, and the two experts differ."""
    net = dit.WanDiT(TRANSFORMERS[name])
    for linear in (net.head.head, *net.text_embedding[::2], *net.time_embedding[::2]):
        torch.nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    for key, p in net.named_parameters():
        if key.endswith("bias") or "norm" in key:
            p.add_(0.1 * torch.randn_like(p))
    return net.state_dict()


@seeded
def wan_autoencoder(preset):
    """4 channels wide instead of 96 (2.1) or 160 and 256 (2.2); else as released. (With 2, norms would magnify rounding a thousandfold.)"""
    published = vae.PRESETS[preset]
    net = vae.WanVAE(vae.Config(4, 4, published.latent_channels, published.patch, published.shortcuts, published.mean, published.std))
    return randomised(net, "gamma")


@seeded
def deep_autoencoder():
    """DC-AE-V f32t4c32, 8 channels wide and one block deep."""
    return randomised(ae.DCAEV(ae.Config((0, 8, 8, 8, 8, 8, 8), (0, 1, 1, 1, 1, 1, 1), 32)), "norm.weight")


def randomised(net, scales):
    for name, p in net.named_parameters():
        if name.endswith(scales):
            p.add_(0.2 * torch.randn_like(p))
    return net.eval()


@seeded
def text_encoder():
    """State dict in the original names, bf16."""
    net = UMT5(vocab=len(pieces()), dim=TEXT_DIM, attn_dim=24, ffn_dim=48, heads=2, layers=2)
    return as_bf16(net.state_dict())


@seeded
def image_encoder():
    """State dict of CLIP's vision tower in the original names without prefix, fp32: two blocks, of which the last is not used."""
    net = CLIPVision(dim=IMAGE_DIM, mlp_dim=40, heads=1, layers=1 + 2, patch=7, tokens=1 + 4 * 4)  # builds all but the last
    for p in (net.cls_embedding, net.pos_embedding):
        p.normal_()
    return {**net.state_dict(), "post_norm.weight": torch.ones(IMAGE_DIM), "post_norm.bias": torch.zeros(IMAGE_DIM)}


def as_bf16(sd):
    return {name: value.bfloat16() for name, value in sd.items()}


# ---------------------------------------------------------------------------------------------------- original layout

CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def torch_save(file, container):
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(container, file)


def write_json(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2))


def write_shards(folder, tensors, count, stem="diffusion_pytorch_model"):
    """One .safetensors file, or `count` of them and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    if count == 1:
        save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    where = {name: f"{stem}-{1 + i * count // len(tensors):05d}-of-{count:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: value for name, value in tensors.items() if where[name] == file}, folder / file, metadata={"format": "pt"})
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def original_config(name):
    """config.json as the original repositories have it: no patch size, no text_dim."""
    c = TRANSFORMERS[name]
    kind = next(task for task in ("ti2v", "t2v", "i2v") if task in name)
    return {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": kind, "text_len": c.text_len, "in_dim": c.in_channels,
            "dim": c.dim, "ffn_dim": c.ffn_dim, "freq_dim": c.freq_dim, "out_dim": c.out_channels, "num_heads": c.heads,
            "num_layers": c.layers, "eps": c.eps}


def original_clip(sd):
    """The original CLIP file: the vision tower, what follows it, and beginnings of the text tower, which nobody reads here."""
    return {**{f"visual.{name}": value for name, value in sd.items()}, "visual.head": torch.zeros(IMAGE_DIM, 16), "log_scale": torch.zeros([]),
            "textual.token_embedding.weight": torch.zeros(8, 16), "textual.head.0.weight": torch.zeros(16, 16)}


# ---------------------------------------------------------------------------------------------------- diffusers layout


def write_transformer(folder, name, weights, shards):
    c = TRANSFORMERS[name]
    write_shards(folder, dit.to_diffusers(weights), shards)
    write_json(folder / "config.json", {
        "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0", "patch_size": c.patch, "num_attention_heads": c.heads,
        "attention_head_dim": c.dim // c.heads, "in_channels": c.in_channels, "out_channels": c.out_channels, "text_dim": c.text_dim,
        "freq_dim": c.freq_dim, "ffn_dim": c.ffn_dim, "num_layers": c.layers, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
        "eps": c.eps, "image_dim": c.image_dim, "added_kv_proj_dim": c.dim if c.image_dim else None, "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None})


def write_vae(folder, net):
    """A folder that diffusers' AutoencoderKLWan reads."""
    c = net.config
    tensors = {vae.diffusers_name(name, c): value for name, value in net.state_dict().items()}
    write_shards(folder, tensors, 1)
    config = {
        "_class_name": "AutoencoderKLWan", "_diffusers_version": "0.33.0", "base_dim": c.width,
        "z_dim": c.latent_channels, "dim_mult": c.multipliers, "num_res_blocks": c.depth,
        "attn_scales": [], "temperal_downsample": c.temporal, "dropout": 0.0,
        "latents_mean": c.mean, "latents_std": c.std}
    if c.shortcuts:  # 2.2
        pixels = 3 * c.patch**2
        config |= {
            "is_residual": True, "decoder_base_dim": c.decoder_width, "in_channels": pixels,
            "out_channels": pixels, "patch_size": c.patch if c.patch > 1 else None,
            "scale_factor_temporal": c.temporal_factor,
            "scale_factor_spatial": c.spatial_factor}
    write_json(folder / "config.json", config)


def write_text_encoder(folder, sd):
    """transformers' UMT5EncoderModel, in shards, stored in fp32."""
    theirs = {respell(name, UMT5_NAMES[1:]): value.float() for name, value in sd.items()}
    write_shards(folder, {**theirs, "encoder.embed_tokens.weight": theirs["shared.weight"]}, 3, "model")
    write_json(folder / "config.json", {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "vocab_size": len(pieces()), "d_model": TEXT_DIM, "d_kv": 12, "d_ff": 48,
        "num_layers": 2, "num_heads": 2, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "dropout_rate": 0.1,
        "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True, "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": True, "use_cache": True, "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1,
        "decoder_start_token_id": 0, "torch_dtype": "float32"})


def write_image_encoder(folder, sd):
    """transformers' CLIPVisionModel and CLIPImageProcessor."""
    theirs = {}
    for name, value in sd.items():
        name = "vision_model." + respell(name, CLIP_NAMES)
        if "to_qkv" in name:
            theirs |= {name.replace("to_qkv", f"{part}_proj"): third for part, third in zip("qkv", value.chunk(3))}
        else:  # the embeddings have no batch axes there
            theirs[name] = value.flatten() if "class_embedding" in name else value[0] if "position_embedding" in name else value
    write_shards(folder / "image_encoder", theirs, 1, "model")
    write_json(folder / "image_encoder" / "config.json", {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_size": IMAGE_DIM, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 28, "patch_size": 7, "num_channels": 3, "hidden_act": "gelu",
        "layer_norm_eps": 1e-5, "attention_dropout": 0.0, "projection_dim": 16, "torch_dtype": "float32"})
    write_json(folder / "image_processor" / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 28}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": 28, "width": 28}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "do_convert_rgb": True})


def respell(name, pairs):
    """The way back of `wan.text.rename`: original -> transformers."""
    for theirs, ours in pairs:
        name = name.replace(ours, theirs)
    return name


def scheduler(shift):
    return {"_class_name": "UniPCMultistepScheduler", "_diffusers_version": "0.33.0", "num_train_timesteps": 1000, "solver_order": 2,
            "solver_type": "bh2", "prediction_type": "flow_prediction", "predict_x0": True, "use_flow_sigmas": True, "flow_shift": shift,
            "lower_order_final": True, "final_sigmas_type": "zero", "thresholding": False, "timestep_spacing": "linspace"}


def model_index(name):
    """What diffusers' from_pretrained reads first: the pipeline's class and its parts."""
    i2v, branch, experts = "i2v" in name and "ti2v" not in name, TRANSFORMERS[name].image_dim is not None, "a14b" in name
    model = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanImageToVideoPipeline" if i2v else "WanPipeline", "_diffusers_version": "0.35.0",
             "scheduler": ["diffusers", "UniPCMultistepScheduler"], "text_encoder": ["transformers", "UMT5EncoderModel"],
             "tokenizer": ["transformers", "T5TokenizerFast"], "transformer": model, "vae": ["diffusers", "AutoencoderKLWan"]}
    if i2v:
        index |= {"image_encoder": ["transformers", "CLIPVisionModel"] if branch else [None, None],
                  "image_processor": ["transformers", "CLIPImageProcessor"] if branch else [None, None]}
    if "2.2" in name:
        index |= {"transformer_2": model if experts else [None, None], "boundary_ratio": (0.9 if i2v else 0.875) if experts else None,
                  "expand_timesteps": "5b" in name}
    return index


# ---------------------------------------------------------------------------------------------------- tokenizer


def pieces():
    """The vocabulary as (piece, log probability): <pad> 0, </s> 1, <unk> 2, then words and single characters."""
    characters = dict.fromkeys("▁" + "".join(map(chr, range(33, 127))) + CHINESE + "é—、。")
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -4.0 - 0.01 * i) for i, word in enumerate(WORDS)),
            *((c, -10.0 - 0.01 * i) for i, c in enumerate(characters))]


def write_tokenizer(folder):
    """A SentencePiece unigram tokenizer as both files that come with umT5: `tokenizer.json`, and `spiece.model` with the same pieces."""
    special = [{"id": i, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
               for i, (piece, _) in enumerate(pieces()[:3])]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    template = lambda *parts: [{"Sequence" if part in "AB" else "SpecialToken": {"id": part, "type_id": 0}} for part in parts]
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
        "post_processor": {"type": "TemplateProcessing", "single": template("A", "</s>"), "pair": template("A", "</s>", "B", "</s>"),
                           "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
        "decoder": space, "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces(), "byte_fallback": False}})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0,
        "additional_special_tokens": [], "model_max_length": 512, "clean_up_tokenization_spaces": False})
    (folder / "spiece.model").write_bytes(spiece())


def spiece():
    """A SentencePiece model: a protobuf message of pieces (1), trainer settings (2) and normaliser settings (3).

    A field is a key, 8 * number + kind, and its value; kind 0 is an integer, 2 bytes with their length, 5 a float.
    """
    def varint(n):
        return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + varint(n // 128)

    integer = lambda number, value: varint(8 * number) + varint(value)
    message = lambda number, value: varint(8 * number + 2) + varint(len(value)) + value
    real = lambda number, value: varint(8 * number + 5) + struct.pack("<f", value)
    normal, unknown, control = 1, 2, 3
    kinds = [control, control, unknown] + [normal] * len(pieces())
    vocabulary = b"".join(message(1, message(1, piece.encode()) + real(2, score) + integer(3, kind))
                          for (piece, score), kind in zip(pieces(), kinds))
    unigram, no_bos = 1, 2**64 - 1  # -1 in 64 bits
    trainer = (integer(3, unigram) + integer(4, len(pieces())) + integer(40, 2) + integer(41, no_bos) + integer(42, 1) + integer(43, 0)
               + message(45, b"<unk>") + message(47, b"</s>") + message(48, b"<pad>"))
    return vocabulary + message(2, trainer) + message(3, message(1, b"identity"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/make_tiny_checkpoints.py OUT")
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    files = [f for f in make(sys.argv[1]).rglob("*") if f.is_file()]
    print(f"{len(files)} files, {sum(f.stat().st_size / f.stat().st_nlink for f in files) / 1e6:.1f} MB, in {sys.argv[1]}")
