"""Tiny random models of every family, as the folders that diffusers' pipelines have: the
same parts, classes and file names, a megabyte instead of thirty thousand. To try

    python -m families.tiny OUT                   a folder for each family, seconds
    python adapt.py --base diffusers:OUT/wan ...

before the real one is downloaded. The video is noise, of course.

Every number follows from the name of its tensor alone (`fill`), whatever a class makes of
itself: a zero gate would hide what is behind it.
"""
import zlib
from pathlib import Path

import torch

from families import libraries
from files import checkpoint, errors
from wan import tiny as wan_tiny

TEXT = 16  # width of the text states
LATENT = 4  # channels


def fill(net):
    """Every parameter 0.1 times normal noise of a generator seeded with its name; the
    scales of norms around 1 -> net, in eval mode."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            value = 0.1 * torch.randn(p.shape, generator=seed)
            p.copy_(value + 1 if p.ndim == 1 and name.endswith("weight") else value)
    return net.eval()


# ------------------------------------------------ transformers

_T5 = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=LATENT,
           out_channels=LATENT, text_dim=TEXT, freq_dim=32, ffn_dim=64, num_layers=2)
TRANSFORMERS = {
    "wan": ("WanTransformer3DModel", _T5),
    "skyreels-v2": ("SkyReelsV2Transformer3DModel", _T5),
    "hunyuan-video-1.5": ("HunyuanVideo15Transformer3DModel", dict(
        in_channels=2 * LATENT + 1, out_channels=LATENT, num_attention_heads=2,
        attention_head_dim=16, num_layers=2, num_refiner_layers=1, mlp_ratio=2.0,
        text_embed_dim=TEXT, text_embed_2_dim=12, image_embed_dim=8, rope_axes_dim=(4, 6, 6),
        target_size=64, task_type="t2v")),
    "kandinsky-5": ("Kandinsky5Transformer3DModel", dict(
        in_visual_dim=LATENT, out_visual_dim=LATENT, in_text_dim=TEXT, in_text_dim2=12,
        time_dim=32, patch_size=(1, 2, 2), model_dim=48, ff_dim=64, num_text_blocks=1,
        num_visual_blocks=2, axes_dims=(8, 8, 8), visual_cond=True)),
    "cosmos-predict-2.5": ("CosmosTransformer3DModel", dict(
        in_channels=LATENT + 1, out_channels=LATENT, num_attention_heads=2,
        attention_head_dim=24, num_layers=2, mlp_ratio=2.0, text_embed_dim=TEXT,
        adaln_lora_dim=8, max_size=(32, 32, 32), patch_size=(1, 2, 2), rope_scale=(1, 3, 3),
        concat_padding_mask=True, extra_pos_embed_type=None, use_crossattn_projection=True,
        crossattn_proj_in_channels=2 * TEXT, encoder_hidden_states_channels=TEXT)),
}


def transformer(family, **changes):
    """The transformer of a family, with other values of its config -> the class's own."""
    kind, config = TRANSFORMERS[family]
    return fill(getattr(libraries.diffusers(), kind)(**config | changes))


# ------------------------------------------------ autoencoders and schedulers

_WAN_VAE = ("AutoencoderKLWan", dict(
    base_dim=8, z_dim=LATENT, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
    temperal_downsample=[False, True, True], latents_mean=[0.1, -0.2, 0.3, 0.0],
    latents_std=[1.5, 2.0, 0.5, 1.0]))
AUTOENCODERS = {
    "hunyuan-video-1.5": ("AutoencoderKLHunyuanVideo15", dict(
        latent_channels=LATENT, block_out_channels=(8, 8, 16, 16, 16), layers_per_block=1)),
    "kandinsky-5": ("AutoencoderKLHunyuanVideo", dict(
        latent_channels=LATENT, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        norm_num_groups=4)),
}
_FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000)
SCHEDULERS = {
    "wan": ("UniPCMultistepScheduler", dict(_FLOW, flow_shift=3.0)),
    "skyreels-v2": ("UniPCMultistepScheduler", dict(_FLOW, flow_shift=8.0)),
    "hunyuan-video-1.5": ("FlowMatchEulerDiscreteScheduler", dict(shift=5.0)),
    "kandinsky-5": ("FlowMatchEulerDiscreteScheduler", dict(shift=5.0)),
    "cosmos-predict-2.5": ("UniPCMultistepScheduler", dict(
        _FLOW, use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01)),
}
PIPELINES = {
    "wan": "WanPipeline", "skyreels-v2": "SkyReelsV2Pipeline",
    "hunyuan-video-1.5": "HunyuanVideo15Pipeline", "kandinsky-5": "Kandinsky5T2VPipeline",
    "cosmos-predict-2.5": "Cosmos2_5_PredictBasePipeline",
}


def autoencoder(family):
    kind, config = AUTOENCODERS.get(family, _WAN_VAE)
    return fill(getattr(libraries.diffusers(), kind)(**config))


# ------------------------------------------------ text


def bytes_as_text():
    """The characters by which byte-level tokenizers write the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(others))]


CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}"
        "{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def qwen_tokenizer():
    """A token for each byte; nothing is merged."""
    kind = libraries.transformers().Qwen2Tokenizer
    vocabulary = {c: i for i, c in enumerate(bytes_as_text())}
    tokenizer = kind(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen_config():
    """Qwen 2.5 VL, two layers of 16."""
    text = dict(vocab_size=320, hidden_size=TEXT, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[1, 1, 2]),
                bos_token_id=0, eos_token_id=0, pad_token_id=256)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=TEXT,
                  fullatt_block_indexes=[0])
    return text, vision


def qwen(whole):
    """Qwen 2.5 VL's text part alone, or (`whole`) the model that sees pictures too."""
    t = libraries.transformers()
    text, vision = qwen_config()
    if not whole:
        config = t.models.qwen2_5_vl.Qwen2_5_VLTextConfig(**text)
        return fill(t.Qwen2_5_VLTextModel(config))
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, vocab_size=320,
                                image_token_id=300, video_token_id=301,
                                vision_start_token_id=302, vision_end_token_id=303)
    return fill(t.Qwen2_5_VLForConditionalGeneration(config))


def byt5():
    """The encoder of words that are to be drawn, HunyuanVideo 1.5."""
    t = libraries.transformers()
    config = t.T5Config(vocab_size=384, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2,
                        feed_forward_proj="gated-gelu")
    return fill(t.T5EncoderModel(config)), t.ByT5Tokenizer()


def clip():
    """The encoder of the pooled prompt, Kandinsky 5."""
    t = libraries.transformers()
    characters = bytes_as_text()
    words = ["<|startoftext|>", "<|endoftext|>", *characters, *(c + "</w>" for c in characters)]
    tokenizer = t.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])
    config = t.CLIPTextConfig(vocab_size=len(words), hidden_size=12, intermediate_size=16,
                              num_hidden_layers=1, num_attention_heads=2, bos_token_id=0,
                              eos_token_id=1, pad_token_id=1)
    return fill(t.CLIPTextModel(config)), tokenizer


def umt5():
    t = libraries.transformers()
    config = t.UMT5Config(vocab_size=len(wan_tiny.pieces()), d_model=TEXT, d_kv=8, d_ff=32,
                          num_layers=1, num_heads=2)
    return fill(t.UMT5EncoderModel(config))


def text_parts(family):
    """-> {part: encoder or tokenizer}"""
    if family in ("wan", "skyreels-v2"):
        return dict(text_encoder=umt5())
    parts = dict(text_encoder=qwen(family != "hunyuan-video-1.5"), tokenizer=qwen_tokenizer())
    second = {"hunyuan-video-1.5": byt5, "kandinsky-5": clip}.get(family)
    if second:
        parts["text_encoder_2"], parts["tokenizer_2"] = second()
    return parts


# ------------------------------------------------ folders


def write(family, out):
    """A pipeline's folder."""
    out = Path(out)
    library = libraries.diffusers()
    kind, config = SCHEDULERS[family]
    parts = dict(transformer=transformer(family), vae=autoencoder(family),
                 scheduler=getattr(library, kind)(**config), **text_parts(family))
    if family == "hunyuan-video-1.5":
        parts["guider"] = library.ClassifierFreeGuidance(guidance_scale=6.0)
    index = {"_class_name": PIPELINES[family], "_diffusers_version": library.__version__}
    for name, part in parts.items():
        part.save_pretrained(out / name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    if "tokenizer" not in parts:
        wan_tiny.write_tokenizer(out / "tokenizer")
        index["tokenizer"] = ["transformers", "T5TokenizerFast"]
    if family == "cosmos-predict-2.5":
        index["safety_checker"] = [None, None]
    checkpoint.write_json(out / "model_index.json", index)
    return out


def main():
    out = wan_tiny.out_argument("Write tiny random models of the families that diffusers holds, "
                                "as its folders.")
    for family in PIPELINES:
        write(family, out / family)
        print(out / family)


if __name__ == "__main__":
    with errors.user_errors():
        main()
