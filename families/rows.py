"""The families: what differs between the video transformers of diffusers, a row for each.

All of them predict noise - data along x = (1 - sigma) z + sigma e, are guided by a second
pass with a negative prompt, and touch the latent with two layers only. What a row says is
where these are, what stands beside the latent, how a prompt is encoded and how the
transformer is called. diffusers' own pipeline is what a row is tested against: the same
latents after guided steps (tests/test_families.py).

A new family is a row of ROWS: data, and up to three functions:

    velocity(net, x, t, prompt)   the call; x [b, z + what is beside it, t, h, w], t [b] in
                                  0..1000 -> v [b, z, t, h, w]
    encode(parts, prompts)        {part: encoder or tokenizer}, sentences -> for each
                                  {name: states [m, d]} without padding
    collate(rows)                 such dicts -> {name: [b, m, d]}, or a list of them,
                                  where prompts cannot share a forward pass
"""
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from families import libraries
from files.checkpoint import UserError
from wan import models, released


@dataclass(frozen=True)
class Family:
    """One family. Names are those of the transformer's modules and of its config."""

    name: str
    transformer: str  # its class, by which a folder is recognised
    pipelines: tuple  # the text-to-video pipelines of its folders
    scheduler: str
    embedder: str  # the first layer
    head: str  # the last, a linear one
    ends: tuple  # beginnings of the names of what is trained whole from stage 1b on
    blocks: str
    targets: tuple  # regular expressions: what LoRA adapts
    velocity: Callable
    encode: Callable | None = None  # None: umT5, as wan/text.py has it
    collate: Callable | None = None
    text: tuple = ("text_encoder", "tokenizer")  # parts of the folder that encode prompts
    projection: str = ""  # a layer of the transformer that encodes them further
    channels: tuple = ("in_channels", "out_channels")  # fields of the config
    stated: tuple = (1, 0)  # the first of them is a z + b
    beside: tuple = (0, 0)  # a z + b channels of zeros beside the latent's z: no condition
    order: str = "c p q r"  # of the numbers that the first layer multiplies
    running: tuple = ()  # fields of the config that are others while it runs
    lora_prefix: str = "transformer."  # of names in the files that its pipeline loads
    solver: str = "euler"  # of flow.SOLVERS, the pipeline's
    steps: int = 50
    guidance: float = 5.0  # g of v_null + g (v - v_null)
    negative: str = ""  # the pipeline's
    fps: int = 24
    frames: int = 121
    size: tuple = (480, 832)
    note: str = ""  # printed when a folder is opened


def pad(rows):
    """[m, d] each -> [b, longest m, d], zero rows past the ends."""
    longest = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])


# ------------------------------------------------ Wan 2.1, and SkyReels-V2 of its architecture


def wan_velocity(net, x, t, states, **told):
    """states: [b, m, d], m <= 512; the zero rows past the prompt are attended."""
    states = F.pad(states, (0, 0, 0, 512 - states.shape[1]))
    return net.transformer(x, t, states, return_dict=False, **told)[0]


def skyreels_velocity(net, x, t, states):
    told = {}
    if net.stored["inject_sample_info"]:
        told["fps"] = [int(net.family.fps != 16)] * len(x)
    return wan_velocity(net, x, t, states, enable_diffusion_forcing=False, **told)


_WAN = dict(
    scheduler="UniPCMultistepScheduler", solver="unipc_diffusers",
    embedder="patch_embedding", head="proj_out", blocks="blocks",
    ends=("patch_embedding.", "proj_out.", "scale_shift_table"),
    targets=(r"blocks\.\d+\.attn1\.(to_[qkv]|to_out\.0)", r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
             r"condition_embedder\.(time_embedder\.linear_[12]|time_proj)"))

WAN = Family("wan", "WanTransformer3DModel", ("WanPipeline",), velocity=wan_velocity, fps=16,
             frames=81, negative=released.NEGATIVE, **_WAN)

SKYREELS = Family(
    "skyreels-v2", "SkyReelsV2Transformer3DModel",
    ("SkyReelsV2Pipeline", "SkyReelsV2DiffusionForcingPipeline"),
    velocity=skyreels_velocity, guidance=6.0, frames=97, size=(544, 960), **_WAN)

# ------------------------------------------------ HunyuanVideo 1.5


def hunyuan_encode(parts, prompts):
    """Qwen's states of the prompt; ByT5's of what it wants written, which is what stands
    in quotation marks. Rows that the pipeline masks are left out."""
    pipeline, device = libraries.diffusers().HunyuanVideo15Pipeline, parts["text_encoder"].device
    rows = []
    for prompt in prompts:
        states, mask = pipeline._get_mllm_prompt_embeds(
            parts["text_encoder"], parts["tokenizer"], prompt, device)
        glyphs, glyph_mask = pipeline._get_byt5_prompt_embeds(
            parts["tokenizer_2"], parts["text_encoder_2"], prompt, device)
        rows.append(dict(states=states[mask.bool()], glyphs=glyphs[glyph_mask.bool()]))
    return rows


def hunyuan_collate(rows):
    """Padding is masked, so it changes nothing."""
    found = {}
    for name in rows[0]:
        states = [row[name] for row in rows]
        found[name] = pad(states)
        ones = [torch.ones(len(s), 1, device=s.device) for s in states]
        found[f"{name}_mask"] = pad(ones)[..., 0]
    return found


def hunyuan_velocity(net, x, t, prompt):
    no_picture = x.new_zeros(len(x), 0, net.stored["image_embed_dim"])
    return net.transformer(
        x, t, prompt["states"], prompt["states_mask"],
        encoder_hidden_states_2=prompt["glyphs"], encoder_attention_mask_2=prompt["glyphs_mask"],
        image_embeds=no_picture, return_dict=False)[0]


HUNYUAN = Family(
    "hunyuan-video-1.5", "HunyuanVideo15Transformer3DModel", ("HunyuanVideo15Pipeline",),
    scheduler="FlowMatchEulerDiscreteScheduler",
    embedder="x_embedder.proj", head="proj_out", blocks="transformer_blocks",
    ends=("x_embedder.proj.", "norm_out.", "proj_out."),
    targets=(r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)",
             r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
             r"time_embed\.timestep_embedder\.linear_[12]"),
    velocity=hunyuan_velocity, encode=hunyuan_encode, collate=hunyuan_collate,
    text=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    stated=(2, 1), beside=(1, 1), lora_prefix="", guidance=6.0)

# ------------------------------------------------ Kandinsky 5 Lite


def kandinsky_encode(parts, prompts):
    """Qwen's states, and CLIP's pooled vector as a single row."""
    make = libraries.diffusers().Kandinsky5T2VPipeline
    pipeline = make(transformer=None, vae=None, scheduler=None, **parts)
    rows = []
    for prompt in prompts:  # one by one: a batch would be padded, and there is no mask
        states, pooled, _ = pipeline.encode_prompt(prompt, device=parts["text_encoder"].device)
        rows.append(dict(states=states[0], pooled=pooled))
    return rows


def kandinsky_collate(rows):
    """Each prompt alone: padding would be attended."""
    return models.Prompts(rows).each(lambda states: states[None])


def kandinsky_velocity(net, x, t, prompt):
    """Positions are token indices, whose angles the pipeline divides by a factor of the
    frame's size in pixels: 2 near 480p, else 3.16. A deep token of 32 pixels covers s = 2
    base tokens, and divided by factor / s its angles are those of the first of them; with
    positions "index" its angles are those of the base token of its index."""
    c = net.config
    grid = [n // p for n, p in zip(x.shape[2:], c.patch)]
    if max(grid) > 128:
        raise UserError(f"Kandinsky 5 has positions for 128 tokens along each side, not for "
                        f"{max(grid)}: use a smaller --size or fewer --frames.")
    near_480p = all(480 <= n * c.cell <= 854 for n in x.shape[3:])
    factor = 2 if near_480p else 3.16
    if c.positions == "grid":
        factor *= 16 / (c.cell * c.patch[1])
    positions = [torch.arange(n, device=x.device) for n in grid]
    states = prompt["states"]
    v = net.transformer(
        x.permute(0, 2, 3, 4, 1).contiguous(), states, t, prompt["pooled"][:, 0], positions,
        torch.arange(states.shape[1], device=x.device), (1, factor, factor), return_dict=False)
    return v.permute(0, 4, 1, 2, 3)


KANDINSKY = Family(
    "kandinsky-5", "Kandinsky5Transformer3DModel", ("Kandinsky5T2VPipeline",),
    scheduler="FlowMatchEulerDiscreteScheduler", solver="euler_diffusers",
    embedder="visual_embeddings.in_layer", head="out_layer.out_layer",
    blocks="visual_transformer_blocks", ends=("visual_embeddings.in_layer.", "out_layer."),
    targets=(r"visual_transformer_blocks\.\d+\.self_attention\.(to_(query|key|value)|out_layer)",
             r"visual_transformer_blocks\.\d+\.feed_forward\.(in|out)_layer",
             r"time_embeddings\.(in|out)_layer"),
    velocity=kandinsky_velocity, encode=kandinsky_encode, collate=kandinsky_collate,
    text=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    channels=("in_visual_dim", "out_visual_dim"), beside=(1, 1), order="p q r c", size=(512, 768),
    negative="Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low "
             "quality, ugly, deformed, walking backwards")

# ------------------------------------------------ Cosmos-Predict 2.5


def cosmos_encode(parts, prompts):
    """All layers of Qwen, 100,352 numbers per row, through the transformer's own first
    projection, which sees neither latent nor time: a hundredth of that is kept."""
    make, device = libraries.diffusers().Cosmos2_5_PredictBasePipeline, parts["text_encoder"].device
    holder = SimpleNamespace(text_encoder=parts["text_encoder"], tokenizer=parts["tokenizer"])
    rows = []
    for prompt in prompts:  # padded to 512 rows, and all are attended
        states = make._get_prompt_embeds(holder, prompt, device=device, dtype=torch.float32)
        hidden = F.linear(states[0], parts["crossattn_proj.0.weight"].to(states),
                          parts["crossattn_proj.0.bias"].to(states))
        rows.append(dict(states=F.gelu(hidden)))
    return rows


def cosmos_collate(rows):
    return {"states": pad([row["states"] for row in rows])}  # all of one length


def cosmos_velocity(net, x, t, prompt):
    return net.transformer(x, t / 1000, prompt["states"], return_dict=False)[0]


COSMOS = Family(
    "cosmos-predict-2.5", "CosmosTransformer3DModel", ("Cosmos2_5_PredictBasePipeline",),
    scheduler="UniPCMultistepScheduler", solver="unipc_karras",
    embedder="patch_embed.proj", head="proj_out", blocks="transformer_blocks",
    ends=("patch_embed.", "norm_out.", "proj_out."),
    targets=(r"transformer_blocks\.\d+\.attn1\.(to_[qkv]|to_out\.0)",
             r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
             r"time_embed\.t_embedder\.linear_[12]"),
    velocity=cosmos_velocity, encode=cosmos_encode, collate=cosmos_collate,
    projection="crossattn_proj", stated=(1, 1), beside=(0, 2),
    # the padding mask is zero, and stands beside the latent without torchvision's help; the
    # prompt comes projected
    running=(("concat_padding_mask", False), ("use_crossattn_projection", False)),
    steps=36, guidance=8.0, fps=16, frames=93, size=(704, 1280),
    note="no guardrail is run here; NVIDIA's Open Model License asks for its own (the package "
         "cosmos_guardrail) or one like it",
    negative=(
        "The video captures a series of frames showing ugly scenes, static with no "
        "motion, motion blur, over-saturation, shaky footage, low resolution, grainy "
        "texture, pixelated images, poorly lit areas, underexposed and overexposed "
        "scenes, poor color balance, washed out colors, choppy sequences, jerky "
        "movements, low frame rate, artifacting, color banding, unnatural transitions, "
        "outdated special effects, fake elements, unconvincing visuals, poorly edited "
        "content, jump cuts, visual noise, and flickering. Overall, the video is of poor "
        "quality."))

# ------------------------------------------------ the table

ROWS = (WAN, SKYREELS, HUNYUAN, KANDINSKY, COSMOS)
FAMILIES = {row.transformer: row for row in ROWS}
