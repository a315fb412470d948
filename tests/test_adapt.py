"""AE-Adapt-V, stage by stage: what is inherited and what is fresh; then the whole
program on tiny models."""
import dataclasses
import errno
import json
import re

import numpy as np
import pytest
import torch
import torch.distributed.run as torchrun
from PIL import Image
from torch import nn

import adapt
import ae
import align
import dit
import flow
import lora
import sample
import toy
from conftest import ROOT
from files import checkpoint, errors, video
from files.checkpoint import UserError
from tiny_layouts import FOLDERS, TEXT_DIM
from training import bases, loop, toy_base
from training.job import Job, export
from wan import models, released
from wan.text import WanText

TEXT = toy.ToyText()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(toy_base, "SHARD", 8)
    monkeypatch.setattr(toy_base, "WITH_IMAGE", 4)


# ------------------------------------------------ assemble

FRESH = {"patch_embedding.weight", "patch_embedding.bias", "head.head.weight", "head.head.bias"}


def trained_base():
    base = dit.WanDiT(dit.PRESETS["toy-base"])
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return base.eval()


@pytest.mark.core
def test_everything_but_the_two_ends_is_inherited_bit_for_bit():
    base, config = trained_base(), dit.PRESETS["toy-dc"]
    before = {k: v.clone() for k, v in base.state_dict().items()}
    deep = dit.inherit(base, config)
    assert deep.state_dict().keys() == base.state_dict().keys()
    assert {k for k, v in deep.state_dict().items() if v.shape != before[k].shape or not torch.equal(v, before[k])} == FRESH
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())  # the base is left alone
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(base.parameters(), deep.parameters()))
    assert not deep.head.head.weight.any()


@torch.no_grad()
def test_of_a_base_that_shares_its_memory_the_ends_are_its_own():
    base = trained_base()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    deep = dit.inherit(base, dit.PRESETS["toy-dc"], share=True)
    for name, p in deep.named_parameters():
        if name.startswith(deep.ends):
            p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert deep.blocks[0].ffn[0].weight.data_ptr() == base.blocks[0].ffn[0].weight.data_ptr()


@torch.no_grad()
def test_the_assembled_model_predicts_exactly_zero(job):
    """After stage 1a: the base's blocks between an aligned embedder and a zero head."""
    job = job("--head", "zero")
    ends, fresh = job.result(job.expert, "1a"), job.problem(job.expert).start[0]
    assert not torch.equal(ends["patch_embedding.weight"].flatten(1), fresh)
    net, batch = job.build(job.expert, ends)[1], job.held.batch(0, range(2))
    v = align.velocity_of(net, batch, "cpu")(batch.z, torch.tensor([10.0, 990.0]))
    assert v.shape == batch.z.shape and not v.any()


def test_the_fresh_embedder_is_xavier_with_a_small_random_bias():
    weight, bias = dit.inherit(trained_base(), dit.PRESETS["toy-dc"]).patch_embedding.parameters()
    bound = (6 / (68 + dit.PRESETS["toy-dc"].dim)) ** 0.5
    assert 0.95 * bound < weight.abs().max() <= bound and 0 < bias.abs().max() <= 32**-0.5


def test_a_base_of_another_size_is_refused():
    wide = dit.Config(**{**vars(dit.PRESETS["toy-dc"]), "ffn_dim": 48})
    with pytest.raises(UserError, match="the base transformer does not fit this model: blocks.0.ffn"):
        dit.inherit(trained_base(), wide)
    deeper = dit.Config(**{**vars(dit.PRESETS["toy-dc"]), "layers": 7})
    with pytest.raises(UserError, match="missing"):
        dit.inherit(trained_base(), deeper)


@torch.no_grad()
def test_merged_lora_equals_live_lora_on_the_toy():
    deep = dit.inherit(trained_base(), dit.PRESETS["toy-dc"])
    lora.wrap(deep, 32, 64, full=("patch_embedding", "head"))
    for p in deep.parameters():
        if p.requires_grad:
            p.normal_(std=0.05)
    args = torch.randn(2, 68, 3, 2, 2), torch.tensor([10.0, 990.0]), TEXT(["a red circle", "a ring"])
    live = deep(*args)
    assert live.std() > 0.1 and (lora.merge(deep)(*args) - live).abs().max() < 1e-4


# ------------------------------------------------ image-to-video input


@pytest.mark.parametrize("name", ["base", "dc"])
def test_the_image_condition_is_mask_and_latent_of_a_clip_that_begins_with_the_image(tiny_toy, name):
    model = released.load_model(name)
    t, h, w = shape = model.latent_shape(16, (64, 64))
    image, z = torch.rand(2, 3, 64, 64) * 2 - 1, model.net.config.out_channels
    condition = model.condition(2, shape, image)
    assert condition.shape == (2, 4 + z, t, h, w)
    mask = condition[:, :4]
    assert mask.sum(dim=(1, 2, 3, 4)).tolist() == [4 * h * w] * 2 and (mask[:, :, 0] == 1).all()
    clip = torch.zeros(2, 3, 16, 64, 64)  # mid grey
    clip[:, :, :4] = image[:, :, None]  # one latent frame is four frames
    torch.testing.assert_close(condition[:, 4:], model.encode(clip))
    assert not model.condition(2, shape).any()


# ------------------------------------------------ the whole program


@pytest.fixture
def quick(monkeypatch):
    """Fewer regression batches, validation samples and pictures than the real run."""
    videos = sample.videos
    monkeypatch.setattr(sample, "videos", lambda *args, **more: videos(*args, **{"steps": 2, **more}))
    monkeypatch.setattr(loop, "plot", lambda folder: None)
    monkeypatch.setattr(toy_base, "PROMPTS", toy_base.PROMPTS[:2])
    solve_head = align.solve_head
    monkeypatch.setattr(align, "solve_head", lambda *args, **more: solve_head(*args, **more | dict(batches=3, batch=16)))
    monkeypatch.setitem(bases.BASES, "toy", dataclasses.replace(bases.BASES["toy"], validation=4, labels=toy_base.PROMPTS))


TINY_RUN = ["--base", "toy", "--shards", "2", "--steps-head", "4", "--steps", "4", "--batch", "4", "--accumulate", "1", "--prompts", "2",
            "--rank", "2", "--device", "cpu"]


def optimisers(out):
    """By which of them stages 1b and 2 were trained."""
    return [checkpoint.open_tensors(out / stage / "trained.safetensors")[1]["settings"]["optimiser"] for stage in "1b 2".split()]


def test_adapt_runs_the_stages_and_its_model_loads_merged_and_as_lora(tiny_toy, quick, tmp_path, monkeypatch, capsys):
    out, heads = tmp_path / "out", []
    contact_sheet = video.contact_sheet
    monkeypatch.setattr(video, "contact_sheet", lambda *a, **k: heads.append((k.get("heads"), len(a[1]), k.get("columns"))) or contact_sheet(*a, **k))
    adapt.main([*TINY_RUN, "--out", str(out)])
    stages = ["base", "1a, assembled", "1b, head aligned", "2, LoRA"]
    heads = [h for h in heads if h[0]]
    assert heads == [(stages[: i + 1], len(toy_base.PROMPTS), 3 * (i + 1)) for i in range(4)]  # stages.png: a row per prompt, three columns per stage

    report = json.loads((out / "report.json").read_text())
    rows = {row["stage"]: row for row in report["stages"]}
    assert list(rows) == [stages[0], "1a random", "1a closed_form", "1a ridge_to_init", "1a noise_aware", *stages[1:]]
    assert all({"validation_loss", "prompt_fit", "sigma"} <= rows[s].keys() for s in stages)
    assert {"r2", "mse", "norm_ratio"} <= rows["1a random"].keys() and rows["1a, assembled"]["r2"] == rows["1a noise_aware"]["r2"]
    assert rows["1a closed_form"]["r2"] > rows["1a random"]["r2"] and rows["1a ridge_to_init"]["r2"] > rows["1a random"]["r2"]
    assert {p.name for p in out.iterdir()} == {
        "cache", "1a", "1b", "2", "report.json", "stages.png", "stages.safetensors", "pairs.png", "transformer.safetensors", "ae.safetensors",
        "lora.safetensors", "lora-peft.safetensors", "lora-kohya.safetensors"}
    assert f"python sample.py --model {out}" in capsys.readouterr().out

    base, merged = (dit.load(f).state_dict() for f in (tiny_toy / "toy-base-dit.safetensors", out / "transformer.safetensors"))
    moved = {re.sub(r"\d+", "0", k) for k in merged if k not in FRESH and not torch.equal(merged[k], base[k])}
    assert moved == {"head.modulation", *(f"blocks.0.self_attn.{p}.weight" for p in "qkvo"), "blocks.0.ffn.0.weight",
                     "time_embedding.0.weight", "time_projection.0.weight"}  # 0 stands for every number

    made = [released.load_model(str(name)) for name in (out, out / "lora.safetensors")]
    for a, b in zip(*(m.net.parameters() for m in made), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # the LoRA is stored in fp16
    shown = [sample.videos(m, ["a red circle"], frames=8, size=(32, 32), steps=4)[0] for m in made]
    assert (shown[0] - shown[1]).square().mean().sqrt() < 2e-3

    # once more: everything is there, nothing is encoded or trained
    files = {f: checkpoint.load_tensors(f)[0] for f in (out / "transformer.safetensors", out / "lora.safetensors")}
    assert optimisers(out) == ["adamw", "muon"]
    for optimiser in (torch.optim.AdamW, adapt.Muon):
        monkeypatch.setattr(optimiser, "step", None)
    monkeypatch.setattr(models.Model, "encode", None)
    adapt.main([*TINY_RUN, "--out", str(out)])
    for file, before in files.items():
        after = checkpoint.load_tensors(file)[0]
        assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert json.loads((out / "report.json").read_text()) == report


# ------------------------------------------------ Wan, from clips to a sample


CAPTIONS = ("a cat", "a dog on the piano")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four clips with captions, one of them in portrait."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(4):
        x = toy.toy_batch(i, 1, 8, 64)[0][0]
        video.write_video(folder / f"{i}.mp4", x[:, :, :, 16:48] if i == 3 else x[:, :, 8:50], fps=16)
        (folder / f"{i}.txt").write_text(CAPTIONS[i % 2])
    return folder


@pytest.fixture(scope="module")
def text_cache(tmp_path_factory):
    """States for the captions and the empty prompt, so that no text encoder is
    needed."""
    text = WanText(None, None, cache=tmp_path_factory.mktemp("text") / "cache.safetensors", text_dim=TEXT_DIM)
    text.known = {prompt: torch.randn(4, TEXT_DIM) for prompt in (*CAPTIONS, "")}
    text.write_cache(list(text.known))
    return text.cache


@pytest.fixture
def wan(tiny_folders, clips, text_cache, quick, tmp_path, monkeypatch):
    """wan(base, *more) -> the folder that `adapt.py --base BASE ...` has written, from
    tiny checkpoints in the official layout."""
    def run(base, *more, deep="DC-VideoGen-Wan2.1-14B", layout=0, out=tmp_path / "out"):
        name = bases.ALIASES.get(base, base)
        monkeypatch.setitem(bases.BASES, name, dataclasses.replace(bases.BASES[name], validation=4))
        ends = [] if "--continue-from" in more else ["--steps-head", "2"]
        ends += [] if {"--align", "--continue-from"} & {*more} else ["--steps-align", "3"]
        adapt.main(["--base", base, "--weights", *(str(tiny_folders / f) for f in (*FOLDERS[name][layout], deep)), "--data", str(clips), "--buckets", "64x96F32MS",
                    "--frames", "8", "--text-cache", str(text_cache), "--null", "empty", "--out", str(out), "--device", "cpu", "--batch", "1", "--accumulate", "2",
                    *ends, "--steps", "3", "--warmup", "2", "--lr", "1e-2", "--rank", "2", "--sample-steps", "2", *more])
        return out

    return run


def sampled(out, folders, text_cache, tmp_path, *more):
    """sample.py on an exported folder -> (the video, what the json says)."""
    sample.main(["--model", str(out), "--weights", *map(str, folders), "--prompt", CAPTIONS[0], "--frames", "5", "--size", "64x96", "--steps", "1", "--device", "cpu",
                 "--text-cache", str(text_cache), "--out", str(tmp_path / "videos"), "--name", "x", *more])
    return video.read_clip(tmp_path / "videos" / "x.mp4"), json.loads((tmp_path / "videos" / "x.json").read_text())


def test_text_to_video_from_clips_to_a_sample(wan, tiny_folders, text_cache, tmp_path):
    """python adapt.py --base wan2.1 --data CLIPS, as published but for the number of
    steps; then python sample.py on what it wrote."""
    out = wan("wan2.1")
    rows = {row["stage"]: row for row in json.loads((out / "report.json").read_text())["stages"]}
    assert list(rows)[-3:] == ["1a, assembled", "1b, head aligned", "2, LoRA"] and "1a sgd" in rows
    for stage in list(rows)[-3:]:
        assert rows[stage]["validation_loss"] > 0 and list(rows[stage]["depth"]) == ["embedding", "0", "1"] and len(rows[stage]["sigma"]) > 1
    assert {"stages.png", "pairs.png", "lora-peft.safetensors", "lora-kohya.safetensors"} <= {p.name for p in out.iterdir()}
    assert optimisers(out) == ["adamw", "adamw"]  # as published
    told = checkpoint.open_tensors(out / "transformer.safetensors")[1]["adapted"]
    assert (told["base"], told["target"], told["rank"], told["alpha"], told["step"]) == ("wan2.1-t2v-1.3b", "f32t4c32", 2, 4, 3)
    video, report = sampled(out, [tiny_folders / "Wan2.1-T2V-1.3B"], text_cache, tmp_path)
    assert video.shape == (3, 5, 64, 96) and report["settings"]["shift"] == 5.0 and report["settings"]["guidance"] == 3.0


def test_an_adapted_model_goes_on_at_another_size(wan, tiny_folders, text_cache, tmp_path):
    """--continue-from: stage 2 alone, on the exported model, in larger buckets. Nothing
    of the base's latent space is made or read."""
    first = wan("wan2.1", "--align", "closed_form", "--sample-steps", "0", out=tmp_path / "first")
    out = wan("wan2.1", "--continue-from", str(first), "--buckets", "96x128F32MS", "--sample-steps", "0", out=tmp_path / "second")
    rows = {row["stage"]: row for row in json.loads((out / "report.json").read_text())["stages"]}
    assert list(rows) == ["before", "2, LoRA"] and rows["before"]["validation_loss"] > 0 and not {"r2", "depth"} & rows["2, LoRA"].keys()
    assert {p.name for p in out.iterdir()} >= {"2", "transformer.safetensors", "lora.safetensors"} and not {"1a", "1b"} & {p.name for p in out.iterdir()}
    assert len([p for p in (out / "cache").iterdir() if p.is_dir()]) == len([p for p in (first / "cache").iterdir() if p.is_dir()]) - 1
    before, after = (dit.load(o / "transformer.safetensors").state_dict() for o in (first, out))
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert {"patch_embedding.weight", "head.head.weight", "blocks.0.self_attn.q.weight"} <= moved and "blocks.0.norm3.weight" not in moved
    model = released.load_model(str(out), [tiny_folders / "Wan2.1-T2V-1.3B"], text_cache=text_cache)
    assert model.size == (96, 160) and sampled(out, [tiny_folders / "Wan2.1-T2V-1.3B"], text_cache, tmp_path)[0].shape == (3, 5, 64, 96)
    with pytest.raises(UserError, match="holds no wan2.1-t2v-1.3b adapted to f32t4c32: --continue-from wants"):
        wan("wan2.1", "--continue-from", str(tmp_path), out=tmp_path / "third")
    with pytest.raises(UserError, match="but wan2.1-t2v-1.3b adapted to f32t4c32"):
        wan("wan2.1-t2v-14b", "--continue-from", str(first), out=tmp_path / "third")


def test_into_f64t4c128(wan, tiny_folders, text_cache, tmp_path):
    """--target f64t4c128: a deep token covers 4 x 4 of the base's; 128 latent channels;
    buckets that 64 divides."""
    torch.manual_seed(0)
    ae.save(ae.DCAEV(ae.Config((0, *[16] * 7), (0, *[1] * 7), 128, chunk=8)), tmp_path / "f64.safetensors")
    out = wan("wan2.1", "--target", "f64t4c128", "--ae", str(tmp_path / "f64.safetensors"), "--buckets", "128x192F64MS", "--align", "closed_form", "--sample-steps", "0")
    net = dit.load(out / "transformer.safetensors")
    assert (net.config.in_channels, net.config.out_channels, net.config.patch) == (128, 128, (1, 1, 1))
    rows = {row["stage"]: row for row in json.loads((out / "report.json").read_text())["stages"]}
    assert rows["1a closed_form"]["r2"] > rows["1a random"]["r2"] and rows["2, LoRA"]["validation_loss"] > 0
    video, report = sampled(out, [tiny_folders / "Wan2.1-T2V-1.3B"], text_cache, tmp_path, "--size", "64x128")
    assert video.shape == (3, 5, 64, 128)


def test_a_continuation_takes_a_share_of_the_steps(monkeypatch):
    told = []
    monkeypatch.setattr(adapt, "adapt", lambda base, settings, args: told.append((settings.steps, settings.warmup)))
    adapt.main(["--base", "wan2.1-t2v-14b", "--continue-from", "x"])
    adapt.main(["--base", "wan2.1-t2v-14b", "--continue-from", "x", "--steps", "700"])
    assert told == [(1200, 150), (700, 150)]


def test_image_to_video_from_clips_to_a_sample(wan, tiny_folders, text_cache, tmp_path):
    """From diffusers' layout to diffusers' layout, by regression. The exported model
    has mask and condition channels and the image branch."""
    out = wan("wan2.1-i2v-14b-480p", "--align", "closed_form", "--sample-steps", "0", "--format", "diffusers", layout=1)
    assert json.loads((out / "transformer" / "config.json").read_text())["in_channels"] == 32 + 4 + 32
    rows = {row["stage"]: row for row in json.loads((out / "report.json").read_text())["stages"]}
    assert rows["1a, assembled"]["r2"] == rows["1a closed_form"]["r2"] and not (out / "stages.png").exists()
    Image.effect_noise((96, 64), 80).convert("RGB").save(tmp_path / "picture.png")
    make = lambda *more: sampled(out, [tiny_folders / "Wan2.1-I2V-14B-480P-Diffusers"], text_cache, tmp_path, "--image", str(tmp_path / "picture.png"), *more)
    video, report = make()
    assert video.shape == (3, 5, 64, 96) and report["settings"]["guidance"] == 5.0
    with pytest.raises(UserError, match="needs the first frame: give a picture with --image"):
        sampled(out, [tiny_folders / "Wan2.1-I2V-14B-480P-Diffusers"], text_cache, tmp_path)


@pytest.mark.slow
def test_both_experts_of_wan_2_2_each_in_its_own_times(wan, tiny_folders, text_cache, tmp_path, monkeypatch):
    """Two transformers, adapted one after the other; the exported folder samples with
    both, which take turns at the base's boundary."""
    told, loss, train = {"high": [], "low": []}, flow.loss, adapt.train

    def spied(job, expert, *rest):
        with monkeypatch.context() as patch:
            patch.setattr(flow, "loss", lambda velocity, z, drawn: told[expert.name].extend(drawn.t.tolist()) or loss(velocity, z, drawn))
            return train(job, expert, *rest)

    monkeypatch.setattr(adapt, "train", spied)
    out = wan("wan2.2-t2v-a14b", "--align", "noise_aware", "--head", "closed_form", "--sample-steps", "0")
    assert min(told["high"]) >= 875 > max(told["low"]) and len(told["high"]) == len(told["low"]) > 10
    assert {f"{e}-{stage}" for e in ("high", "low") for stage in ("1a", "1b", "2")} <= {p.name for p in out.iterdir()}
    one, two = (dit.load(out / f"transformer{n}.safetensors").state_dict() for n in ("", "_2"))
    bases_ = [dit.load(tiny_folders / "Wan2.2-T2V-A14B" / f).state_dict() for f in ("high_noise_model", "low_noise_model")]
    for made, base in zip((one, two), bases_):
        torch.testing.assert_close(made["blocks.0.cross_attn.q.weight"], base["blocks.0.cross_attn.q.weight"], atol=0.01, rtol=0.01)  # exported as bf16
    model = released.load_model(str(out), [tiny_folders / "Wan2.2-T2V-A14B"], text_cache=text_cache)
    assert model.boundary == 0.875 and model.guidance == (3.0, 4.0) and model.low is not None
    assert sampled(out, [tiny_folders / "Wan2.2-T2V-A14B"], text_cache, tmp_path, "--steps", "3")[0].shape == (3, 5, 64, 96)


# ------------------------------------------------ a run that can be divided, stopped and continued


def random_latents(model, shards, folder):
    """In place of toy.cache_latents: as many clips, of noise."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    n, z, shape = shards * toy_base.SHARD, model.net.config.out_channels, model.latent_shape(model.frames, model.size)
    condition = torch.randn(n, 4 + z, *shape, generator=generator) * (torch.arange(n) % 2 == 0)[:, None, None, None, None]
    return toy_base.Latents(torch.randn(n, z, *shape, generator=generator), condition, torch.arange(0, n, 2), [toy.random_scene(rng).attributes() for _ in range(n)])


@pytest.fixture
def job(tiny_toy, quick, tmp_path, monkeypatch):
    """job(*more arguments) -> what the stages share, on the tiny toy in fp32; with
    stage 1a done."""
    monkeypatch.setattr(toy_base, "cache_latents", random_latents)

    def make(*more, out=tmp_path / "run"):
        args, given = adapt.arguments([*TINY_RUN, "--dtype", "fp32", "--sample-steps", "0", "--save-every", "1", "--out", str(out), *more])
        base = bases.find("toy")
        settings = dataclasses.replace(base.settings, **given)
        job = Job.prepare(base, settings, args)
        job.expert = job.experts[0]
        adapt.align_once(job, job.expert)
        return job

    return make


def losses(folder):
    return [line["loss"] for line in loop.read_log(folder)]


def test_a_batch_of_two_is_the_mean_of_two_of_one(job):
    """The loss and its gradient; every sample with its own clip, prompt, time and
    noise, by its position."""
    job = job()
    net = job.build(job.expert, job.result(job.expert, "1a"), rank=2)[1]

    def step(positions):
        batch = job.source.batch(3, positions)
        drawn = flow.draw(batch.z.shape[1:], job.times(job.expert), 0, 3, positions)
        loss, _ = flow.loss(align.velocity_of(net, batch, "cpu"), batch.z, drawn)
        return loss, torch.autograd.grad(loss, list(loop.trained(net).values()))

    (both, g), (one, g1), (two, g2) = step(range(2)), step(range(1)), step(range(1, 2))
    assert abs(one - two) > 1e-3
    torch.testing.assert_close(both, (one + two) / 2, atol=1e-6, rtol=1e-6)
    for a, b, c in zip(g, g1, g2):
        torch.testing.assert_close(a, (b + c) / 2, atol=1e-5, rtol=1e-4)


def test_accumulated_batches_are_one_large_batch(job, tmp_path):
    """Two batches of two give the losses of one batch of four, in both stages."""
    runs = [job("--batch", str(batch), "--accumulate", str(4 // batch), out=tmp_path / str(batch)) for batch in (4, 2)]
    for run in runs:
        adapt.train_head(run, run.expert), adapt.train_lora(run, run.expert)
    for stage in ("1b", "2"):
        a, b = (losses(tmp_path / batch / stage) for batch in "42")
        assert len(a) == 4 and len(set(a)) == 4
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-5, rtol=0)


def test_resumed_equals_uninterrupted_bit_for_bit(job, tmp_path, monkeypatch):
    """Killed in the middle of each stage and started again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, broken = job("--ema", "0.9", out=tmp_path / "a"), job("--ema", "0.9", out=tmp_path / "b")
        for run in (adapt.train_head, adapt.train_lora):
            run(whole, whole.expert)
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                calls, loss = [], flow.loss

                def dies(*args):
                    calls.append(torch.is_grad_enabled())
                    if sum(calls) == 3:
                        raise KeyboardInterrupt
                    return loss(*args)

                patch.setattr(flow, "loss", dies)
                run(broken, broken.expert)
            run(broken, broken.expert)
    finally:
        torch.set_num_threads(threads)
    for stage in ("1b", "2"):
        a, b = (run.result(run.expert, stage) for run in (whole, broken))
        assert losses(tmp_path / "a" / stage) == losses(tmp_path / "b" / stage)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_other_settings_are_refused_with_the_difference(job, tiny_toy):
    """Nothing of the old run is touched. A changed base counts as another setting."""
    adapt.train_head(first := job(), first.expert)
    for more, difference in ((["--align", "closed_form"], "align noise_aware -> closed_form"), (["--seed", "1"], "data .*, seed 0 -> 1")):
        with pytest.raises(UserError, match=f"run/1a was made with other settings .{difference}.: use the same ones, or another --out"):
            job(*more)
    with pytest.raises(UserError, match="run/1b was made with other settings .lr 0.008 -> 0.5.: use"):
        adapt.train_head(again := job("--lr-head", "0.5"), again.expert)
    base = dit.load(tiny_toy / "toy-base-dit.safetensors")
    nn.init.normal_(base.blocks[0].norm3.bias)
    dit.save(base, tiny_toy / "toy-base-dit.safetensors")
    with pytest.raises(UserError, match="run/1[ab] was made with other settings .base"):
        job()


@pytest.mark.core
def test_step_0_of_the_lora_is_the_assembled_model_bit_for_bit(job):
    """As stage 1b left it and as stage 2 finds it, both in training. (For sampling
    without adapters the CPU has faster, differently rounded products.)"""
    job = job("--rank", "4")
    ends = job.result(job.expert, "1a")
    plain, wrapped = (job.build(job.expert, ends, rank)[1] for rank in (0, 4))
    batch = job.held.batch(0, range(2))
    before, after = (net(torch.cat([batch.z, batch.condition], dim=1), torch.tensor([300.0, 900.0]), batch.prompt[0]) for net in (plain, wrapped))
    assert before.any() and torch.equal(before, after)


@torch.no_grad()
def test_the_exported_model_is_the_trained_one(job, tmp_path):
    """Merged and written, with the run's own rank and alpha, it predicts what it
    predicted with live adapters."""
    job = job("--rank", "3")
    with torch.enable_grad():
        adapt.train_head(job, job.expert), adapt.train_lora(job, job.expert)
    export(job)
    live = job.build(job.expert, job.result(job.expert, "2"), rank=3)[1]
    batch = job.held.batch(0, range(2))
    args = torch.cat([batch.z, batch.condition], dim=1), torch.tensor([300.0, 900.0]), batch.prompt[0]
    merged, start = dit.load(tmp_path / "run" / "transformer.safetensors")(*args), job.build(job.expert, {})[0]
    assert (merged - live(*args)).abs().max() < 1e-4
    for _, adapter in lora.adapters(live):
        nn.init.zeros_(adapter.up)
    assert (merged - live(*args)).abs().max() > 1e-3  # the adapters do something


def test_a_nan_loss_stops_with_the_last_good_checkpoint(job, monkeypatch):
    job, loss = job(), flow.loss

    def nan_at_the_third_step(*args):
        value, mse = loss(*args)
        trained = len(losses(job.folder(job.expert, "1b")))
        return value * (float("nan") if torch.is_grad_enabled() and trained == 2 else 1), mse

    monkeypatch.setattr(flow, "loss", nan_at_the_third_step)
    with pytest.raises(UserError, match="loss of 'net' is nan at step 2, .*: lower the learning rate, or look at the data; the last good checkpoint is .*1b/checkpoint-0000002"):
        adapt.train_head(job, job.expert)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(job, monkeypatch, capsys):
    job, write = job(), loop.save_sharded

    def full(path, tensors, about):
        if about["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, tensors, about)

    with monkeypatch.context() as patch, pytest.raises(SystemExit), errors.user_errors():
        patch.setattr(loop, "save_sharded", full)
        adapt.train_head(job, job.expert)
    assert "the disk is full while writing" in capsys.readouterr().err
    adapt.train_head(job, job.expert)
    assert len(losses(job.folder(job.expert, "1b"))) == 4


@pytest.mark.core
@pytest.mark.parametrize("argv, says", [
    (["--no-samples"], "--no-samples is gone: use --sample-steps 0"),
    (["--alpha", "8"], "--alpha is gone: it is twice --rank"),
    (["--clip", "1.0"], "--clip is gone: other values are a row of BASES in training/bases.py"),
    (["--data", "clips"], "--data says nothing to --base toy: leave it out"),
    (["--base", "wan2.1", "--shards", "2"], "--shards says nothing to --base wan2.1"),
    (["--score", "--rank", "2"], "--rank says nothing to --score"),
    (["--gpus", "2"], "--gpus says nothing to a run .torchrun"),
    (["--shards", "0"], "argument --shards: '0' is not a whole number from 1")])
def test_an_option_that_went_or_would_be_ignored_is_refused(tiny_toy, argv, says):
    with pytest.raises(UserError, match=says):
        adapt.main([*argv, "--device", "cpu"])


def test_bad_input_is_one_sentence(wan, tmp_path, tiny_folders):
    with pytest.raises(UserError, match="there is no base 'wan3': use one of toy, wan2.1-t2v-1.3b, .*wan2.1, or diffusers:FOLDER"):
        adapt.main(["--base", "wan3"])
    weights = ["--weights", str(tiny_folders / "Wan2.1-T2V-1.3B"), "--device", "cpu", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="the deep autoencoder is in none of .*: name its file with --ae, or with --weights the folder that holds dc-ae-v-f32t4c32"):
        adapt.main(["--base", "wan2.1", *weights])
    autoencoder = ["--ae", str(tiny_folders / "DC-VideoGen-Wan2.1-14B" / "dc-ae-v-f32t4c32-1.0-bf16.pt")]
    with pytest.raises(UserError, match="is an autoencoder f32t4c32, not f64t4c128"):
        adapt.main(["--base", "wan2.1", *weights, *autoencoder, "--target", "f64t4c128"])
    with pytest.raises(UserError, match="--base wan2.1-t2v-1.3b needs --data: a folder of captioned clips"):
        adapt.main(["--base", "wan2.1", *weights, *autoencoder])
    (tmp_path / "clips").mkdir()
    video.write_video(tmp_path / "clips" / "a.mp4", toy.toy_batch(0, 1, 8, 64)[0][0], fps=16)
    with pytest.raises(UserError, match="caption"):
        adapt.main(["--base", "wan2.1", *weights, *autoencoder, "--data", str(tmp_path / "clips"), "--buckets", "64x96F32MS", "--frames", "8", "--null", "empty"])


# ------------------------------------------------ several processes


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(wan, tiny_folders, clips, text_cache, tmp_path):
    """torchrun with gloo, weights sharded, blocks recomputed, all three stages: each
    process one clip per batch, against one process with two."""
    more = ["--save-every", "1", "--dtype", "fp32", "--sample-steps", "0", "--cache", str(tmp_path / "cache")]
    one = wan("wan2.1", *more, "--batch", "2", "--accumulate", "1", "--stage", "lora", out=tmp_path / "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torchrun.main(["--standalone", "--nproc-per-node", "2", "--monitor-interval", "1", str(ROOT / "adapt.py"), "--base", "wan2.1", "--weights", *(
            str(tiny_folders / f) for f in ("Wan2.1-T2V-1.3B", "DC-VideoGen-Wan2.1-14B")), "--data", str(clips), "--buckets", "64x96F32MS", "--frames", "8",
            "--text-cache", str(text_cache), "--null", "empty", "--out", str(tmp_path / "two"), "--batch", "1", "--accumulate", "1", "--steps-align", "3",
            "--steps-head", "2", "--steps", "3", "--warmup", "2", "--lr", "1e-2", "--rank", "2", *more])
    for stage in ("1b", "2"):
        a, b = (torch.tensor([(line["loss"], line["gradient"]) for line in loop.read_log(folder / stage)]) for folder in (one, tmp_path / "two"))
        assert len(a) == len(b) >= 2
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    rows = [json.loads((folder / "report.json").read_text())["stages"] for folder in (one, tmp_path / "two")]
    assert [row["stage"] for row in rows[0]] == [row["stage"] for row in rows[1]]
    assert (tmp_path / "two" / "transformer.safetensors").exists()
