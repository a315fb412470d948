"""The tiny models of wan/tiny.py in the other published layouts: those of diffusers, and DC-VideoGen's two. Written from the same weights, so
that tests can compare; diffusers' own pipelines read the `-Diffusers` folders.
"""
from pathlib import Path


from files.layouts import to_diffusers
from wan import tiny, vae
from wan.image import CLIP_MEAN, CLIP_NAMES, CLIP_STD
from wan.text import UMT5_NAMES
from wan.tiny import CLIP_FILE, IMAGE_DIM, TEXT_DIM, TRANSFORMERS, as_bf16, pieces, torch_save, write_json, write_shards, write_tokenizer

# model -> the folders that hold it, once for each layout
FOLDERS = {name: [[folder], [f"{folder}-Diffusers"]] for name, folder in tiny.FOLDERS.items() if name.startswith("wan")}
FOLDERS |= {
    "dc-wan2.1-t2v-14b": [["DC-VideoGen-Wan2.1-14B"], ["DC-Gen-Wan2.1-T2V-14B"]],
    # the newer of the two layouts takes its image encoder from another repository; the single file is named in evaluations
    "dc-wan2.1-i2v-14b": [["DC-VideoGen-Wan2.1-14B"], ["DC-Gen-Wan2.1-I2V-14B", "Wan2.1-I2V-14B-720P-Diffusers"], ["dc_videogen"]],
    "dc-wan2.1-t2v-1.3b": [["dc_videogen"]],
}
DC_SHIFT = 3.0  # of the DC-VideoGen folders' scheduler; not the default, so that a test sees it read


def make(out):
    """Write all folders below `out`."""
    out = Path(out)
    tiny.make(out)
    for name, layouts in FOLDERS.items():
        if name.startswith("wan"):
            write_base(out / layouts[1][0], name)
    write_dc(out / "DC-VideoGen-Wan2.1-14B", {"transformer_t2v": "dc-wan2.1-t2v-14b", "transformer_i2v": "dc-wan2.1-i2v-14b"})
    torch_save(out / "DC-VideoGen-Wan2.1-14B" / CLIP_FILE, tiny.original_clip(tiny.image_encoder()))
    write_dc(out / "DC-Gen-Wan2.1-T2V-14B", {"transformer": "dc-wan2.1-t2v-14b"})
    write_dc(out / "DC-Gen-Wan2.1-I2V-14B", {"transformer": "dc-wan2.1-i2v-14b"})
    tiny.link_equal_files(out)
    return out


def write_base(folder, name):
    """A base model as diffusers has it."""
    for expert, part in enumerate(("transformer", "transformer_2") if "a14b" in name else ("transformer",)):
        write_transformer(folder / part, name, tiny.transformer(name, expert), 2)
    write_conditioning(folder, TRANSFORMERS[name].image_dim is not None)
    write_vae(folder / "vae", tiny.wan_autoencoder("wan2.2" if "5b" in name else "wan2.1"))
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler(3.0))
    write_json(folder / "model_index.json", model_index(name))


def write_dc(folder, parts):
    """DC-VideoGen as its repositories have it: transformers with diffusers' names, the autoencoder as a training container."""
    for part, name in parts.items():
        write_transformer(folder / part, name, as_bf16(tiny.transformer(name)), 2)
    write_conditioning(folder, picture=False)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler(DC_SHIFT))
    deep = as_bf16(tiny.deep_autoencoder().state_dict())
    torch_save(folder / "dc-ae-v-f32t4c32-1.0-bf16.pt", {"model_state_dict": deep, "global_step": 1})


def write_conditioning(folder, picture):
    write_text_encoder(folder / "text_encoder", tiny.text_encoder())
    write_tokenizer(folder / "tokenizer")
    if picture:
        write_image_encoder(folder, tiny.image_encoder())


def diffusers_names(tensors):
    return {to_diffusers(name): value for name, value in tensors.items()}


def write_transformer(folder, name, weights, shards):
    c = TRANSFORMERS[name]
    write_shards(folder, diffusers_names(weights), shards)
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
