"""The text encoder: equal to the reference, gentle with memory, clear about what is missing.

Reference tensors come from tests/golden or, uncut, from the folder in GOLDEN_DIR. Tests of mark `peer` build tiny models and tokenizers
with the packages that the released pipelines use, and compare.
"""
import json
import random
import re
import sys
import warnings
import weakref

import pytest
import torch
from conftest import golden
from safetensors.torch import load_file, save_file

from files.checkpoint import UserError
from wan import tiny
from wan.text import position_buckets, Tokenizer, UMT5, WanText, clean_prompt

SENTENCE = "a large red circle moving left slowly on a blue background"


def reference(name):
    """-> ({original key: weight}, {other name: tensor}, the notes beside them)"""
    tensors = load_file(golden(f"{name}.safetensors"))
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    return weights, {k: v for k, v in tensors.items() if not k.startswith("weights/")}, json.loads(golden(f"{name}.json").read_text())


def in_transformers_names(sd, names, prefix=""):
    """The same tensors as transformers spells them, by the reference's own table, which names block 0."""
    out = {}
    for name, value in sd.items():
        block = re.search(r"(?:blocks|transformer)\.(\d+)\.", name)
        respell = (lambda theirs, i=f".{block[1]}.": theirs.replace(".0.", i, 1)) if block else str
        theirs = names[name.replace(f".{block[1]}.", ".0.", 1) if block else name]
        if isinstance(theirs, list):  # one matrix, three names
            out |= {prefix + respell(part): rows.clone() for part, rows in zip(theirs, value.chunk(3))}
        elif name == "visual.head":
            out["visual_projection.weight"] = value.T.contiguous()
        else:
            if theirs.startswith(("embeddings.class", "embeddings.position")):
                value = value[0, 0] if theirs.endswith("class_embedding") else value[0]
            out[prefix + respell(theirs)] = value
    return out


def write_folder(folder, sd, shards=1, **config):
    """A model folder as transformers writes it: config.json and one weight file, or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(sd, folder / "model.safetensors")
    else:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        parts = [dict(list(sd.items())[i::shards]) for i in range(shards)]
        for file, part in zip(files, parts):
            save_file(part, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in zip(files, parts) for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# ------------------------------------------------------------------------------------------------------ prompt cleaning


@pytest.mark.parametrize("raw, clean", json.loads(golden("umt5_tiny.json").read_text())["clean_cases"])
def test_cleaning_equals_reference(raw, clean):
    if not raw.isascii() or "&" in raw:
        pytest.importorskip("ftfy")
    assert clean_prompt(raw) == clean


@pytest.mark.parametrize("raw, clean", {
    "  a  cat\n\n sits\r\n\t": "a cat sits", "Tom & Jerry": "Tom & Jerry", "R&D <b> 5 > 3;": "R&D <b> 5 > 3;", "&copy 2020": "© 2020",
    "": "", "   ": "", "色调艳丽，过曝（静态）。": "色调艳丽,过曝(静态)。"}.items())
def test_plain_ascii_and_common_chinese_need_no_ftfy(monkeypatch, raw, clean):
    """Where ftfy would change nothing but wide punctuation it is not asked for. (html.unescape knows a few entities without a semicolon.)"""
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean_prompt(raw) == clean


@pytest.mark.parametrize("raw", ["色调艳丽，caf\u00e9", "＆amp；", "caf\u00e9", "a cat 😀", "&ldquo;a&rdquo;", "&amp;amp;amp;", "a\x1b[31mb", "\x0b"])
def test_what_ftfy_may_change_is_refused_without_it(monkeypatch, raw):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match="pip install ftfy"):
        clean_prompt(raw)


@pytest.mark.peer
def test_cleaning_equals_diffusers_on_random_text():
    """Three kinds of text: anything in Unicode, anything in ASCII, and pieces that entities, mojibake and terminal colours are made of."""
    pytest.importorskip("ftfy")
    peer = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan").prompt_clean
    draw = random.Random(0)
    pieces = ["&amp;", "&lt;", "&", "amp;", "lt", ";", "&#39;", "&copy", "&ldquo;", "&EACUTE;", "<", ">", " ", "a", "\n", "\r\n",
              "色", "艳丽", "。", "《", "＆", "；", "\x1b[36m", "\x0b", "\x1c", "é", "Ã©", "“", "，", "　"]
    planes = [range(0x80), range(0x3000), range(0xD800), range(0xE000, 0x1FFFF)]
    any_character = lambda: chr(draw.choice(draw.choice(planes)))
    for i in range(3000):
        make = [any_character, lambda: chr(draw.randrange(0x80)), lambda: draw.choice(pieces)][i % 3]
        raw = "".join(make() for _ in range(draw.randrange(20)))
        assert clean_prompt(raw) == peer(raw), repr(raw)


# ------------------------------------------------------------------------------------------------------------ tokenizer

PROMPTS = ["", "a cat", SENTENCE, "色调艳丽,过曝,静态", "a cat 😀 sits", "dog, 99!", "word " * 4999 + "word"]


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory):
    """A folder with a tokenizer.json of a tiny vocabulary."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return folder


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:the prompt")
def test_the_ids_are_those_of_transformers(tiny_tokenizer):
    """Empty, Chinese, with emoji, of 5,000 words: the same ids as the released programs ask for."""
    peer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tiny_tokenizer)
    theirs = peer([clean_prompt(p) for p in PROMPTS], padding="longest", max_length=512, truncation=True, return_tensors="pt")
    ids, mask = Tokenizer(tiny_tokenizer)([clean_prompt(p) for p in PROMPTS])
    assert torch.equal(ids, theirs["input_ids"]) and torch.equal(mask, theirs["attention_mask"])
    assert mask.sum(1)[0] == 1 and mask.sum(1)[-1] == 512  # the empty prompt is one EOS; a long one is cut, and still ends in EOS
    assert (ids.gather(1, mask.sum(1, keepdim=True) - 1) == 1).all() and not ids[mask == 0].any()


@pytest.mark.peer
def test_a_prompt_that_is_cut_brings_a_warning(tiny_tokenizer):
    tokenizer = Tokenizer(tiny_tokenizer)
    n = len(tokenizer.encode("cat " * 5000))
    with pytest.warns(UserWarning, match=f"has {n} tokens: the text encoder reads the first 511"):
        tokenizer(["cat " * 5000])
    fits = Tokenizer(tiny_tokenizer, length=n + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fits(["cat " * 5000])[0].shape == (1, n + 1)  # EOS is the last one


@pytest.mark.peer
def test_settings_of_the_tokenizer_file_do_not_matter(tiny_tokenizer, tmp_path):
    """Some files come with truncation and padding switched on."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=600)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert torch.equal(Tokenizer(tmp_path)([SENTENCE])[0], Tokenizer(tiny_tokenizer)([SENTENCE])[0])


def test_a_damaged_tokenizer_is_told(tiny_tokenizer, tmp_path):
    content = (tiny_tokenizer / "tokenizer.json").read_bytes()
    for damaged in (b"", content[: len(content) // 2]):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        with pytest.raises(UserError, match="tokenizer.json cannot be read as a tokenizer"):
            Tokenizer(tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").touch()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        Tokenizer(tmp_path)


def test_a_missing_tokenizer_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="holds no tokenizer.json"):
            Tokenizer(path)


# ----------------------------------------------------------------------------------------------------------------- umT5


@pytest.mark.core
@torch.inference_mode()
def test_umt5_equals_reference():
    weights, tensors, notes = reference("umt5_tiny")
    net = UMT5.from_state_dict(weights)
    ids, mask = tensors["in/ids"], tensors["in/mask"]
    assert mask.sum(1).tolist() == notes["lens"]
    assert (net(ids, mask) - tensors["out"]).abs().max() < 1e-5  # rows past the mask are zeros in both


def test_position_buckets_equal_reference():
    assert torch.equal(position_buckets(256), reference("umt5_tiny")[1]["bucket_256"].long())
    buckets = position_buckets(512)
    assert buckets.min() == 0 and buckets.max() == 31 and (buckets[0, 128:] == 31).all() and (buckets[128:, 0] == 15).all()


@torch.inference_mode()
def test_the_result_does_not_depend_on_padding_or_batch():
    """So a prompt is encoded at its exact length and zeros are put behind it."""
    weights, tensors, _ = reference("umt5_tiny")
    net, (ids, mask) = UMT5.from_state_dict(weights), (tensors["in/ids"], tensors["in/mask"])
    batch = net(ids, mask)
    for row, n in enumerate(mask.sum(1)):
        alone = net(ids[row : row + 1, :n], mask[row : row + 1, :n])
        assert (alone[0] - batch[row, :n]).abs().max() < 1e-5
        assert not batch[row, n:].any()


@torch.inference_mode()
@pytest.mark.parametrize("embedding", [["shared"], ["encoder.embed_tokens"], ["shared", "encoder.embed_tokens"]])
def test_umt5_takes_transformers_names(embedding):
    weights, tensors, notes = reference("umt5_tiny")
    theirs = in_transformers_names(weights, notes["official_to_transformers"])
    table = theirs.pop("shared.weight")
    theirs |= {f"{name}.weight": table for name in embedding}
    a, b = UMT5.from_state_dict(weights), UMT5.from_state_dict(theirs)
    assert torch.equal(a(tensors["in/ids"], tensors["in/mask"]), b(tensors["in/ids"], tensors["in/mask"]))


def test_umt5_xxl_has_the_published_size():
    with torch.device("meta"):
        net = UMT5()
    assert sum(p.numel() for p in net.parameters()) == 5_680_910_336 and len(net.state_dict()) == 242


@torch.inference_mode()
def test_umt5_loads_every_layout(tmp_path):
    """The original .pth, one file, a folder, and a folder of shards: the same bf16 network, on whose weights nothing is trained."""
    weights, tensors, notes = reference("umt5_tiny")
    weights = {k: v.bfloat16() for k, v in weights.items()}
    theirs = in_transformers_names(weights, notes["official_to_transformers"])
    torch.save(weights, tmp_path / "models_t5.pth")
    save_file(weights, tmp_path / "t5.safetensors")
    paths = [tmp_path / "models_t5.pth", tmp_path / "t5.safetensors", write_folder(tmp_path / "one" / "text_encoder", theirs),
             write_folder(tmp_path / "many" / "text_encoder", theirs, shards=3)]
    expected = UMT5.from_state_dict(weights, dtype=torch.bfloat16)(tensors["in/ids"], tensors["in/mask"])
    for path in paths:
        net = UMT5.load(path)
        assert not net.training and {(p.dtype, p.requires_grad) for p in net.parameters()} == {(torch.bfloat16, False)}
        assert torch.equal(net(tensors["in/ids"], tensors["in/mask"]), expected), path
    rounded = (expected - tensors["out"]).norm() / tensors["out"].norm()
    assert 1e-4 < rounded < 0.03  # bf16 has 8 bits


@torch.inference_mode()
def test_umt5_in_bf16_on_any_cpu(monkeypatch):
    """With units for bf16 and without, where the products are in fp32: bf16 comes out, as near to fp32 as bf16 is, and the weights stay bf16."""
    weights, tensors, _ = reference("umt5_tiny")
    net, error = UMT5.from_state_dict({k: v.bfloat16() for k, v in weights.items()}, dtype=torch.bfloat16), {}
    for units in (True, False):
        monkeypatch.setattr("kernels.bf16_units", lambda: units)
        y = net(tensors["in/ids"], tensors["in/mask"])
        assert y.dtype == torch.bfloat16 and {p.dtype for p in net.parameters()} == {torch.bfloat16}
        error[units] = ((y - tensors["out"]).norm() / tensors["out"].norm()).item()
    assert 1e-4 < error[False] < error[True] < 0.03


@pytest.mark.parametrize("change, sentence", {
    "missing": r"1 missing \(first: blocks.1.attn.o.weight\)", "extra": r"1 unexpected \(first: lm_head.weight\)",
    "shape": r"blocks.2.ffn.fc2.weight has shape \[64, 95\]", "other": "not the weights of a umT5 encoder"}.items())
def test_wrong_umt5_weights_are_refused(change, sentence):
    weights, _, _ = reference("umt5_tiny")
    if change == "missing":
        del weights["blocks.1.attn.o.weight"]
    elif change == "extra":
        weights["lm_head.weight"] = torch.zeros(2, 2)
    elif change == "shape":
        weights["blocks.2.ffn.fc2.weight"] = torch.zeros(64, 95)
    else:
        weights = reference("clip_vit_tiny")[0]
    with pytest.raises(UserError, match=sentence):
        UMT5.from_state_dict(weights)


@pytest.mark.peer
@torch.inference_mode()
@pytest.mark.parametrize("dtype, tolerance", {torch.float32: 1e-5, torch.bfloat16: 0.03}.items())
def test_umt5_equals_transformers(tmp_path, dtype, tolerance):
    """The same random weights, written by transformers and read by `UMT5.load`; and what we hold loads there strictly."""
    transformers = pytest.importorskip("transformers")
    config = transformers.UMT5Config(vocab_size=100, d_model=32, d_kv=6, num_heads=4, d_ff=48, num_layers=3, feed_forward_proj="gated-gelu")
    peer = transformers.UMT5EncoderModel(config).eval()
    for p in peer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    peer = peer.to(dtype)
    peer.save_pretrained(tmp_path / "text_encoder")
    net = UMT5.load(tmp_path / "text_encoder", dtype)
    ids, mask = torch.randint(2, 100, (2, 150)), torch.ones(2, 150, dtype=torch.long)
    mask[1, 40:] = 0
    theirs = peer(ids, mask).last_hidden_state * mask[..., None]
    ours = net(ids, mask)
    assert ours.dtype == dtype and (ours - theirs).norm() / theirs.norm() < tolerance
    exported = in_transformers_names(net.state_dict(), reference("umt5_tiny")[2]["official_to_transformers"])
    exported["encoder.embed_tokens.weight"] = exported["shared.weight"]
    peer.load_state_dict(exported, strict=True)


# ------------------------------------------------------------------------------------------------- prompts to contexts


class LetterTokenizer:
    """Stands in where no tokenizer library is installed: a token per character."""

    def __init__(self, path, length):
        self.length = length

    def __call__(self, prompts):
        (prompt,) = prompts
        ids = torch.tensor([[2 + ord(c) % 500 for c in prompt][: self.length - 1] + [1]])
        return ids, torch.ones_like(ids)


@pytest.fixture
def text_files(tmp_path, monkeypatch):
    """(encoder file, tokenizer folder) with the reference's tiny umT5."""
    weights, _, _ = reference("umt5_tiny")
    torch.save(weights, tmp_path / "models_t5.pth")
    (tmp_path / "tokenizer").mkdir()
    monkeypatch.setattr("wan.text.Tokenizer", LetterTokenizer)
    return tmp_path / "models_t5.pth", tmp_path / "tokenizer"


@pytest.fixture
def loads(monkeypatch):
    """A list that grows with every umT5 that is loaded."""
    calls, load = [], UMT5.load
    monkeypatch.setattr(UMT5, "load", lambda *args: calls.append(args) or load(*args))
    return calls


def test_context_is_trimmed_to_the_longest_prompt_with_zeros_past_the_others(text_files):
    text = WanText(*text_files, dtype=torch.float32, text_dim=64)
    context = text(["a cat", "", "  a  large\nred circle "])
    assert context.shape == (3, len("a large red circle") + 1, text.text_dim) and context.dtype == torch.float32
    assert [(row.abs().sum(-1) > 0).sum().item() for row in context] == [6, 1, 19]
    net = UMT5.load(text_files[0], torch.float32)
    ids, mask = LetterTokenizer(None, 512)(["a cat"])
    assert torch.equal(context[0, :6], net(ids, mask)[0])
    assert text(["x" * 600]).shape == (1, text.text_len, 64)


def test_a_prompt_is_encoded_once_and_alone(text_files, loads):
    """All new prompts of a call share one load; the same prompt, also differently spaced, needs none; the company changes nothing."""
    text = WanText(*text_files, text_dim=64)
    context = text(["a cat", "a dog", "a cat"])
    assert len(loads) == 1 and torch.equal(context[0], context[2])
    assert text.uncached(["a dog", "a  cat", "a cow", " a cow"]) == ["a cow"]
    assert torch.equal(text([" a  cat"]), context[:1]) and len(loads) == 1
    assert text(["&ampampamp"]).shape[1] == len("&amp") + 1 and len(loads) == 2  # cleaned once: no further
    assert torch.equal(WanText(*text_files, text_dim=64)(["a cat"]), context[:1]) and len(loads) == 3


def test_the_encoder_is_freed_after_the_call(text_files, monkeypatch):
    nets, load = [], UMT5.load
    monkeypatch.setattr(UMT5, "load", lambda *args: nets.append(weakref.ref(net := load(*args))) or net)
    text = WanText(*text_files, text_dim=64)
    text(["a cat"])
    assert len(nets) == 1 and nets[0]() is None


def test_with_a_cache_later_runs_need_no_encoder_and_no_tokenizer(text_files, loads, tmp_path):
    cache = tmp_path / "new folder" / "prompts.safetensors"
    prompts = ["a cat", "123", "null", '{"a": 1}']  # text that looks like JSON stays text
    context = WanText(*text_files, cache=cache, text_dim=64)(prompts)
    text = WanText(None, tmp_path / "nowhere", cache=cache, text_dim=64)
    assert text.uncached(prompts) == [] and torch.equal(text(prompts), context) and len(loads) == 1
    with pytest.raises(UserError, match="'a dog' is not in .*prompts.safetensors.* text encoder .none given. and the tokenizer .*nowhere"):
        text(["a cat", "a dog"])


def test_the_cache_grows_and_keeps_what_others_wrote(text_files, loads, tmp_path):
    first, second = (WanText(*text_files, cache=tmp_path / "prompts.safetensors", text_dim=64) for _ in range(2))
    first(["a cat"])
    second(["a dog"])  # opened before the cat was written
    third = WanText(None, None, cache=tmp_path / "prompts.safetensors", text_dim=64)
    assert torch.equal(third(["a cat", "a dog"]), WanText(*text_files, text_dim=64)(["a cat", "a dog"]))


def test_an_interrupted_write_leaves_the_old_cache(text_files, tmp_path, monkeypatch):
    text = WanText(*text_files, cache=tmp_path / "prompts.safetensors", text_dim=64)
    text(["a cat"])
    before = (tmp_path / "prompts.safetensors").read_bytes()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("files.checkpoint.os.replace", full_disk)
    with pytest.raises(OSError):
        text(["a dog"])
    assert (tmp_path / "prompts.safetensors").read_bytes() == before


def test_a_cache_that_is_none_is_refused_and_kept(text_files, tmp_path):
    """Damaged, another kind of file, another encoder's, or without the right ending: one sentence, before any work."""
    WanText(*text_files, cache=tmp_path / "good.safetensors", text_dim=64)(["a cat"])
    good = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(good[:-100])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    for file in ("cut", "empty", "weights"):
        before = (tmp_path / f"{file}.safetensors").read_bytes()
        with pytest.raises(UserError, match="damaged or no text cache"):
            WanText(*text_files, cache=tmp_path / f"{file}.safetensors", text_dim=64)
        assert (tmp_path / f"{file}.safetensors").read_bytes() == before
    with pytest.raises(UserError, match="width 64, but this model reads 4096"):
        WanText(*text_files, cache=tmp_path / "good.safetensors")
    with pytest.raises(UserError, match="must have a name that ends in .safetensors"):
        WanText(*text_files, cache=tmp_path / "prompts.pt")


def test_parts_that_do_not_belong_together_are_refused(text_files, monkeypatch):
    with pytest.raises(UserError, match="makes states of width 64, but this model reads 4096"):
        WanText(*text_files)(["a cat"])
    monkeypatch.setattr(LetterTokenizer, "__call__", lambda self, prompts: (torch.tensor([[512, 1]]), torch.ones(1, 2)))
    with pytest.raises(UserError, match="has more tokens than the 512"):
        WanText(*text_files, text_dim=64)(["a cat"])
