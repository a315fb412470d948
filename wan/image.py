"""The picture: what conditions the transformer for image-to-video.

    image [-1, 1] --resize to 224x224--> 16 x 16 patches of 14x14 and one class token
                  --CLIP ViT-H/14--> [b, 257, 1280]

Like the text encoder it never stands beside the transformer: `WanImage` holds a path,
loads its network for a call and frees it.

    WanImage(encoder, device="cuda")(images) -> clip_fea [b, 257, 1280]

Parameter names are those of the original checkpoints; `from_state_dict` and `load` also
take transformers' names.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import nn

from files.checkpoint import Stored, UserError, load_strict, open_tensors, read
from kernels import attention
from wan.text import count, release, rename

CLIP_MEAN = 0.48145466, 0.4578275, 0.40821073
CLIP_STD = 0.26862954, 0.26130258, 0.27577711


def clip_pixels(image, rule="wan", size=224):
    """Image [b 3 h w] in [-1, 1] -> what CLIP looks at, [b 3 size size], normalised per
    channel, fp32.

    "wan", the original programs: the whole picture squeezed to a square, bicubic, no
    antialiasing. "dc", DC-VideoGen and diffusers: the shorter edge to `size` with
    pillow's antialiased bicubic filter on 8-bit pixels, then the middle square.
    """
    if rule == "wan":
        square = (size, size)
        image = F.interpolate(image.float(), square, mode="bicubic", align_corners=False)
    else:
        image = torch.stack([middle_square(picture, size) for picture in image])
    mean = torch.tensor(CLIP_MEAN, device=image.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, device=image.device).view(3, 1, 1)
    return (image * 0.5 + 0.5 - mean) / std


def middle_square(image, size):
    """[3 h w] in [-1, 1] -> [3 size size]: shorter edge to `size`, then a centre crop;
    through pillow, so 8 bits per value."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    picture = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    h, w = image.shape[1:]
    width, height = int(size * w / min(h, w)), int(size * h / min(h, w))
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    picture = picture.crop((left, top, left + size, top + size))
    return (torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1).to(image.device)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):  # in fp32, whatever the weights are stored in
        weight, bias = self.weight.float(), self.bias.float()
        y = F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
        return y.to(x.dtype)


class ClipBlock(nn.Module):
    def __init__(self, dim, mlp_dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.attn = nn.ModuleDict({"to_qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x):  # b l d
        qkv = self.attn.to_qkv(self.norm1(x))
        q, k, v = rearrange(qkv, "b l (s n c) -> s b l n c", s=3, n=self.heads)
        x = x + self.attn.proj(attention(q, k, v).flatten(2))
        return x + self.mlp(self.norm2(x))


class CLIPVision(nn.Module):
    """The vision tower of CLIP ViT-H/14: net(pixels) -> the tokens after all blocks but
    the last, which is not even built.

    The transformer wants what the picture shows where; the last block, and what follows
    it, only gathers that into one vector that can be compared with a caption. The
    defaults are ViT-H's; `layers` counts the last block too.
    """

    def __init__(self, dim=1280, mlp_dim=5120, heads=16, layers=32, patch=14, tokens=257):
        super().__init__()
        self.image_size = patch * math.isqrt(tokens - 1)
        self.patch_embedding = nn.Conv2d(3, dim, patch, stride=patch, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, tokens, dim))
        self.pre_norm = LayerNorm(dim)
        self.transformer = nn.ModuleList()
        for _ in range(layers - 1):
            self.transformer.append(ClipBlock(dim, mlp_dim, heads))

    def forward(self, pixels):
        """Pixels [b 3 image_size image_size] as `clip_pixels` makes them -> tokens
        [b 257 dim], the class token first."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # b l d
        x = torch.cat([self.cls_embedding.expand(len(x), -1, -1), x], 1)
        x = self.pre_norm(x + self.pos_embedding)
        for block in self.transformer:
            x = block(x)
        return x

    @classmethod
    def from_state_dict(cls, sd, heads=None, dtype=torch.float32, device="cpu"):
        """State dict (tensors, or `Stored` ones) in either naming -> CLIPVision in eval
        mode, sized by the shapes; no shape shows the heads: 80 channels each by
        default."""
        sd = clip_names(sd)
        try:
            mlp_dim, dim = sd["transformer.0.mlp.0.weight"].shape
            patch = sd["patch_embedding.weight"].shape[-1]
            tokens = sd["pos_embedding"].shape[1]
        except KeyError as e:
            raise UserError("these are not the weights of a CLIP vision tower: the tensor "
                            f"{e.args[0]} is missing.") from e
        if dim % (heads or 80):
            raise UserError(f"width {dim} cannot be split into heads of 80 channels, so their "
                            "number must be given: heads=...")
        layers = count(sd, "transformer")
        with torch.device("meta"):
            net = cls(dim, mlp_dim, heads or dim // 80, layers, patch, tokens).to(dtype)
        unused = (f"transformer.{layers - 1}.", "post_norm.", "head", "visual_projection.",
                  "embeddings.position_ids")
        sd = {name: value for name, value in sd.items() if not name.startswith(unused)}
        load_strict(net, sd, "the image encoder's state dict", device)
        return net.eval().requires_grad_(False)

    @classmethod
    def load(cls, path, dtype=torch.float32, device="cpu"):
        """The original .pth (its text tower is left in the file), a .safetensors file,
        or a transformers folder -> CLIPVision in eval mode."""
        config = Path(path) / "config.json"
        config = json.loads(config.read_text()) if config.is_file() else {}
        if config.get("hidden_act", "gelu") != "gelu":
            raise UserError(f"{path} holds a CLIP with {config['hidden_act']} activations, but "
                            "Wan's has gelu: give the image encoder that comes with the model.")
        heads = config.get("num_attention_heads")
        return cls.from_state_dict(open_tensors(path)[0], heads, dtype, device)


CLIP_NAMES = [  # transformers -> original, replaced in this order
    ("embeddings.class_embedding", "cls_embedding"),
    ("embeddings.position_embedding.weight", "pos_embedding"),
    ("embeddings.patch_embedding.", "patch_embedding."),
    ("pre_layrnorm.", "pre_norm."), ("post_layernorm.", "post_norm."),
    ("encoder.layers.", "transformer."),
    (".layer_norm1.", ".norm1."), (".layer_norm2.", ".norm2."),
    (".self_attn.out_proj.", ".attn.proj."), (".self_attn.", ".attn."),
    (".mlp.fc1.", ".mlp.0."), (".mlp.fc2.", ".mlp.2."),
]


def clip_names(sd):
    """State dict with the original names, bare of prefix and text tower; of
    transformers' separate q, k and v one matrix is made. What needs work is `Stored`
    anew, so that nothing is read here."""
    renamed = {}
    for name, value in sd.items():
        if not name.startswith(("textual.", "log_scale")):
            bare = name.removeprefix("visual.").removeprefix("vision_model.")
            renamed[rename(bare, CLIP_NAMES)] = value
    sd = renamed
    for name in sd.keys() & {"cls_embedding", "pos_embedding"}:  # transformers: fewer axes
        sd[name] = later(as_table, sd[name])
    for q in [name for name in sd if ".attn.q_proj." in name]:
        parts = [q.replace("q_proj", f"{part}_proj") for part in "qkv"]
        alike = all(part in sd and sd[part].shape == sd[q].shape for part in parts)
        if alike:  # else the strict check names what is wrong
            sd[q.replace("q_proj", "to_qkv")] = later(joined, *map(sd.pop, parts))
    return sd


def as_table(x):
    return x.reshape(1, -1, x.shape[-1])


def joined(*parts):
    return torch.cat(parts)


def later(make, *parts):
    """make(*parts), when it is read; its shape is known now."""
    shape = make(*(torch.empty(part.shape, device="meta") for part in parts)).shape
    return Stored(tuple(shape), parts[0].dtype, lambda: make(*map(read, parts)))


class WanImage:
    """Images -> CLIP tokens: the network is loaded for a call and freed after it.
    `rule`: of `clip_pixels`, "wan" or "dc"."""

    dtype = torch.float32

    def __init__(self, encoder_path, device="cpu", rule="wan"):
        self.encoder_path, self.device, self.rule = encoder_path, device, rule

    def __call__(self, images):
        """Images [b 3 h w] in [-1, 1] of any size -> tokens [b 257 1280], fp32 on the
        CPU."""
        if self.encoder_path is None or not Path(self.encoder_path).exists():
            raise UserError(f"the image encoder ({self.encoder_path or 'none given'}) is missing: "
                            "get it, the model needs it for images.")
        net = CLIPVision.load(self.encoder_path, self.dtype, self.device)
        pixels = clip_pixels(images, self.rule, net.image_size).to(self.device, self.dtype)
        with torch.no_grad():
            tokens = net(pixels).float().cpu()
        del net
        release()
        return tokens
