"""The prompt: what conditions the transformer (Wan, arXiv 2503.20314: text encoder).

    prompt --clean--> text --SentencePiece--> m <= 512 token ids, the last one EOS
           --umT5-XXL--> context [b, m, 4096]

The encoder is used once per video and is large (5.7 billion parameters, 11.4 GB in
bf16), so it never stands beside the transformer: `WanText` holds paths, not weights.
Called, it loads its network, uses it and frees it. Weights go from the file to their
place tensor by tensor: loading to the CPU takes the model's size once, to a GPU hardly
anything of the host. `WanText` can also keep what it made (`--text-cache FILE`);
whoever has that file needs no text encoder and no tokenizer.

    WanText(encoder, tokenizer, device="cuda")(["a cat", "..."])
        -> context [b, m, 4096], zero rows past the end of each prompt

Parameter names are those of the original checkpoints; `from_state_dict` and `load` also
take transformers' names.
"""
import copy
import gc
import hashlib
import html
import math
import re
import warnings
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from files.checkpoint import UserError, load_strict, load_tensors, open_tensors, save_tensors
from kernels import matmul_type, rms_norm

# --------------------------------------------------------------------- prompt to token ids


def clean_prompt(text):
    """The cleaning that the models were trained with: repair mojibake, fold wide
    punctuation ("，" becomes ","), resolve HTML entities, one space between words. The
    package ftfy does the first two; it is asked for only where it might do more than
    fold, which plain ASCII and common Chinese without entities never need (so the
    default negative prompt does without it)."""
    common = re.fullmatch(r"[\t\n\f\r -~\u4e00-\u9fff\uff01-\uff5e。、《》]*", text)
    if common:  # the wide forms of ASCII stand in its order
        text = re.sub(r"[\uff01-\uff5e]", lambda m: chr(ord(m[0]) - 0xFEE0), text)
    if not common or re.search(r"&#?[0-9A-Za-z]{1,24};", text):
        try:
            import ftfy
        except ImportError as e:
            raise UserError(f"the prompt {shorten(text)!r} has characters beyond plain ASCII, or "
                            "HTML entities, and cleaning these as the model expects needs the "
                            "package ftfy: pip install ftfy.") from e
        text = ftfy.fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def shorten(text):  # for messages
    return text if len(text) <= 60 else text[:57] + "..."


class Tokenizer:
    """Sentences -> token ids of umT5's SentencePiece vocabulary, from `tokenizer.json`.
    Ends with EOS, has no BOS; the ids of EOS and padding are the file's."""

    def __init__(self, path, length=512):
        self.length = length
        file = Path(path) if Path(path).is_file() else Path(path) / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{path} holds no tokenizer.json: give the tokenizer folder that comes "
                            "with the model.")
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError as e:
            raise UserError(f"reading {file} needs the package tokenizers: pip install "
                            "tokenizers.") from e
        try:
            self.reader = Reader.from_file(str(file))
        except Exception as e:  # the package raises bare exceptions
            raise UserError(f"{file} cannot be read as a tokenizer ({e}): get the file "
                            "again.") from e
        self.reader.no_truncation()
        self.reader.no_padding()  # the file may come with settings of its own
        self.eos, self.pad = map(self.reader.token_to_id, ("</s>", "<pad>"))
        if self.eos is None or self.pad is None:
            raise UserError(f"{file} has no </s> or no <pad> token, so it is not umT5's: give the "
                            "tokenizer that comes with the model.")

    def encode(self, text):
        """All ids of a text, without EOS."""
        return self.reader.encode(text, add_special_tokens=False).ids

    def __call__(self, prompts):
        """List of b cleaned prompts -> ids, mask [b, l], int64, l = the longest; a
        prompt cut to `length` tokens brings a warning."""
        rows = []
        for prompt in prompts:
            row, most = self.encode(prompt), self.length - 1
            if len(row) > most:
                warnings.warn(f"the prompt {shorten(prompt)!r} has {len(row)} tokens: the text "
                              f"encoder reads the first {most}.")
            rows.append(torch.tensor(row[:most] + [self.eos]))
        ids = pad_sequence(rows, batch_first=True, padding_value=self.pad)
        return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


# ------------------------------------------------------------------------------------ umT5


def position_buckets(length, buckets=32):
    """Which row of the bias table belongs to each pair (query, key): [l, l]. Half of
    the buckets for each sign of key - query; in each half one bucket per distance while
    near, then logarithmically wider ones up to 128, the last for all beyond.

    On the CPU always: at distances such as 16 and 32 the logarithm's quotient is a
    whole number and the last bit of a device would decide.
    """
    half, exact = buckets // 2, buckets // 4
    offset = torch.arange(length) - torch.arange(length)[:, None]
    distance = offset.abs()
    octaves = (distance.clamp(min=1) / exact).log() / math.log(128 / exact)
    far = (exact + (octaves * (half - exact)).long()).clamp(max=half - 1)
    return half * (offset > 0) + torch.where(distance < exact, distance, far)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class T5Block(nn.Module):
    def __init__(self, dim, attn_dim, ffn_dim, heads, buckets):
        super().__init__()
        self.heads = heads
        linear = partial(nn.Linear, bias=False)
        self.norm1, self.norm2 = RMSNorm(dim, 1e-6), RMSNorm(dim, 1e-6)
        self.attn = nn.ModuleDict({"q": linear(dim, attn_dim), "k": linear(dim, attn_dim),
                                   "v": linear(dim, attn_dim), "o": linear(attn_dim, dim)})
        self.pos_embedding = nn.ModuleDict({"embedding": nn.Embedding(buckets, heads)})
        gate = nn.Sequential(linear(dim, ffn_dim), nn.GELU("tanh"))
        self.ffn = nn.ModuleDict({"gate": gate, "fc1": linear(dim, ffn_dim),
                                  "fc2": linear(ffn_dim, dim)})

    def forward(self, x, buckets, padding):
        """x [b l d], buckets [l l], padding [b 1 1 l]: True where a key is none. The
        logits are not divided by sqrt(c)."""
        y, split = self.norm1(x), "b l (n c) -> b n l c"
        q, k, v = (rearrange(self.attn[name](y), split, n=self.heads) for name in "qkv")
        bias = self.pos_embedding.embedding(buckets).permute(2, 0, 1)  # n l l
        logits = q @ k.transpose(-1, -2) + bias  # b n l l
        logits = logits.masked_fill(padding, torch.finfo(x.dtype).min)
        y = logits.softmax(-1, dtype=torch.float32).to(x.dtype) @ v
        x = x + self.attn.o(rearrange(y, "b n l c -> b l (n c)"))
        y = self.norm2(x)
        return x + self.ffn.fc2(self.ffn.fc1(y) * self.ffn.gate(y))


class UMT5(nn.Module):
    """The encoder of umT5: net(ids, mask) -> states. The defaults are umT5-XXL's.

    A T5 encoder: no biases, an RMS norm before each branch, a gated MLP, and no
    positions but a learned bias on the attention logits, one per head and bucket of the
    distance. Unlike in T5, each layer has its own table. Norm statistics and softmax in
    fp32, all else in the weights' dtype; fp16 would overflow. On a CPU without bf16
    units a bf16 encoder computes in fp32, one widened block at a time (see
    `kernels.matmul_type`).
    """

    def __init__(self, vocab=256384, dim=4096, attn_dim=4096, ffn_dim=10240, heads=64,
                 layers=24, buckets=32):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            self.blocks.append(T5Block(dim, attn_dim, ffn_dim, heads, buckets))
        self.norm = RMSNorm(dim, 1e-6)

    def forward(self, ids, mask):
        """Token ids and mask (0: padding) [b l] -> states [b l dim], zero where the
        mask is. They do not depend on the padded length."""
        x = self.token_embedding(ids)
        rows = self.blocks[0].pos_embedding.embedding.num_embeddings
        buckets = position_buckets(ids.shape[1], rows).to(ids.device)
        padding = (mask == 0)[:, None, None]
        dtype = x.dtype
        widen = dtype == torch.bfloat16 and matmul_type(x.device) != dtype
        x = x.float() if widen else x
        for block in self.blocks:
            block = copy.deepcopy(block).float() if widen else block
            x = block(x, buckets, padding)
        return self.norm(x.to(dtype)).masked_fill((mask == 0)[..., None], 0)

    @classmethod
    def from_state_dict(cls, sd, dtype=torch.float32, device="cpu"):
        """State dict (tensors, or `Stored` ones) in either naming -> UMT5 in eval mode,
        sized by the shapes."""
        sd = {rename(name, UMT5_NAMES): value for name, value in sd.items()}
        try:
            buckets, heads = sd["blocks.0.pos_embedding.embedding.weight"].shape
            vocab, dim = sd["token_embedding.weight"].shape
            attn_dim = sd["blocks.0.attn.q.weight"].shape[0]
            ffn_dim = sd["blocks.0.ffn.fc1.weight"].shape[0]
        except KeyError as e:
            raise UserError(f"these are not the weights of a umT5 encoder: the tensor {e.args[0]} "
                            "is missing.") from e
        with torch.device("meta"):
            net = cls(vocab, dim, attn_dim, ffn_dim, heads, count(sd, "blocks"), buckets)
        load_strict(net.to(dtype), sd, "the text encoder's state dict", device)
        return net.eval().requires_grad_(False)

    @classmethod
    def load(cls, path, dtype=torch.bfloat16, device="cpu"):
        """The original .pth, a .safetensors file, or a transformers folder (single file
        or shards with index) -> UMT5 in eval mode."""
        return cls.from_state_dict(open_tensors(path)[0], dtype, device)


UMT5_NAMES = [  # transformers -> original, replaced in this order
    ("encoder.embed_tokens.", "token_embedding."),  # one matrix under two names
    ("shared.", "token_embedding."),
    ("encoder.final_layer_norm.", "norm."), ("encoder.block.", "blocks."),
    (".layer.0.layer_norm.", ".norm1."), (".layer.1.layer_norm.", ".norm2."),
    (".layer.0.SelfAttention.relative_attention_bias.", ".pos_embedding.embedding."),
    (".layer.0.SelfAttention.", ".attn."),
    (".layer.1.DenseReluDense.wi_0.", ".ffn.gate.0."),
    (".layer.1.DenseReluDense.wi_1.", ".ffn.fc1."),
    (".layer.1.DenseReluDense.wo.", ".ffn.fc2."),
]


def rename(name, pairs):
    for theirs, ours in pairs:
        name = name.replace(theirs, ours)
    return name


def count(sd, layers):
    """How many numbered layers a state dict has: 1 + the highest i of `layers`.i.*."""
    highest = -1
    for name in sd:
        if name.startswith(f"{layers}."):
            highest = max(highest, int(name.split(".")[1]))
    return highest + 1


def release():
    """After a network was deleted: its memory goes back to the system and the GPU now,
    not at some later time."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------ loaded, then freed


class WanText:
    """Prompts -> context, through umT5 and its tokenizer: loaded when a prompt is new,
    freed right after.

    encoder_path, tokenizer_path: as `UMT5.load` and `Tokenizer` take them; None or
    missing will do while every prompt is in the cache.
    cache: a .safetensors file that keeps what was encoded, {hash of the cleaned prompt:
    states [m, text_dim]}, the prompts in its header.
    """

    text_len = 512

    def __init__(self, encoder_path, tokenizer_path, device="cpu", dtype=torch.bfloat16,
                 cache=None, text_dim=4096):
        self.encoder_path, self.tokenizer_path = encoder_path, tokenizer_path
        self.device, self.dtype = device, dtype
        self.cache, self.text_dim = cache and Path(cache), text_dim
        self.known = self.read_cache()  # and what this object encodes

    def __call__(self, prompts):
        """List of sentences -> context [b, m, text_dim], fp32 on the CPU, m = the
        longest prompt's length, zero rows past the others' ends. One call with all
        prompts of a run, the negative one included, loads the encoder once; a prompt is
        encoded only once."""
        if new := self.uncached(prompts):
            self.known |= self.encode(new)
            self.write_cache(new)
        states = [self.known[clean_prompt(p)].float() for p in prompts]
        return pad_sequence(states, batch_first=True)

    def states(self, prompts):
        """List of sentences -> {sentence: {"states": [m, text_dim]}}. What is new is not
        kept here: a million captions would fill the memory."""
        new = self.uncached(prompts)
        known = self.known | (self.encode(new) if new else {})
        return {p: {"states": known[clean_prompt(p)]} for p in prompts}

    @staticmethod
    def collate(rows):
        """List of {"states": [m, text_dim]} -> context [b, m, text_dim], zero rows past
        the ends."""
        return pad_sequence([row["states"] for row in rows], batch_first=True)

    def stored_bytes(self):
        """Size of the text encoder's files; 0 where there are none."""
        if not self.encoder_path:
            return 0
        path = Path(self.encoder_path)
        files = [path] if path.is_file() else path.glob("*.safetensors")
        return sum(f.stat().st_size for f in files)

    def uncached(self, prompts):
        """Those of the prompts that need the encoder, cleaned, each once."""
        return [p for p in dict.fromkeys(map(clean_prompt, prompts)) if p not in self.known]

    def encode(self, prompts):
        """Cleaned prompts -> {prompt: states [m, text_dim]}: each alone, at its exact
        length."""
        missing = []
        parts = {"text encoder": self.encoder_path, "tokenizer": self.tokenizer_path}
        for part, path in parts.items():
            if path is None or not Path(path).exists():
                missing.append(f"the {part} ({path or 'none given'})")
        if missing:
            cache = self.cache or "a text cache"
            raise UserError(f"the prompt {shorten(prompts[0])!r} is not in {cache}, and for "
                            f"encoding it {' and '.join(missing)} must be there: get what is "
                            "missing, or name a cache with this prompt by --text-cache.")
        tokenizer = Tokenizer(self.tokenizer_path, self.text_len)
        tokens = {p: tokenizer([p]) for p in prompts}
        net = UMT5.load(self.encoder_path, self.dtype, self.device)
        vocab, dim = net.token_embedding.weight.shape
        if dim != self.text_dim:
            raise UserError(f"{self.encoder_path} makes states of width {dim}, but this model "
                            f"reads {self.text_dim}: give the text encoder that comes with it.")
        if max(ids.max() for ids, _ in tokens.values()) >= vocab:
            raise UserError(f"{self.tokenizer_path} has more tokens than the {vocab} of "
                            f"{self.encoder_path}: they do not belong together.")
        states = {}
        with torch.no_grad():
            for prompt, (ids, mask) in tokens.items():
                states[prompt] = net(ids.to(self.device), mask.to(self.device))[0].cpu()
        del net
        release()
        return states

    def read_cache(self):
        """-> {cleaned prompt: states}, empty where there is no file yet."""
        if self.cache is None:
            return {}
        if self.cache.suffix != ".safetensors":
            raise UserError(f"the text cache {self.cache} must have a name that ends in "
                            ".safetensors.")
        if not self.cache.exists():
            return {}
        try:
            tensors, metadata = load_tensors(self.cache)
            known = {prompt: tensors[key] for key, prompt in metadata["prompts"].items()}
        except (UserError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{self.cache} is damaged or no text cache: delete it, or name another "
                            "file with --text-cache.") from e
        for states in known.values():  # what can be seen of the encoder they came from
            width = states.shape[-1]
            if width != self.text_dim:
                raise UserError(f"{self.cache} holds prompts of an encoder of width {width}, but "
                                f"this model reads {self.text_dim}: name another file with "
                                "--text-cache.")
        return known

    def write_cache(self, new):
        """Add the prompts `new` to the file, keeping what other runs have written there
        meanwhile."""
        if not self.cache:
            return
        known = {**self.read_cache(), **{p: self.known[p] for p in new}}
        keys = {hashlib.sha256(p.encode()).hexdigest(): p for p in known}
        tensors = {key: known[p] for key, p in keys.items()}
        save_tensors(self.cache, tensors, {"prompts": keys})
