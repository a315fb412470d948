"""The bases: published settings, what each stage trains (spec ae-adapt-v 3.3, 5.3,
5.4), the deep transformer's ends; and that a new base is a row."""
import dataclasses
import types

import pytest
import torch

import ae
import dit
import kernels
import lora
from files.checkpoint import UserError
from tiny_layouts import FOLDERS, TEXT_DIM
from training import bases
from training.bases import BASES, Base, Settings
from wan import released

WAN = [name for name in BASES if name != "toy"]


def deep(name, target="f32t4c32"):
    return dit.deep_config(dit.PRESETS[released.RELEASED[name].preset], ae.PRESETS[target])


def arguments(folders, **more):
    return types.SimpleNamespace(weights=folders, target="f32t4c32", ae=None, device="cpu", text_cache=None, buckets=None, continue_from=None,
                                 stage="export", **more)


def test_products_are_computed_in_the_faster_type(monkeypatch):
    """bf16 is chosen for GPUs; a CPU without units for it multiplies such numbers one by one."""
    for units, on_cpu in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(kernels, "bf16_units", lambda: units)
        assert Settings().computed_in("cpu") == on_cpu and Settings().computed_in("meta") == torch.bfloat16
        assert Settings(dtype="fp32").computed_in("cpu") == Settings(dtype="fp32").computed_in("meta") == torch.float32


@pytest.mark.parametrize("name, steps, shift, guidance", [
    ("wan2.1-t2v-1.3b", (20_000, 6_000, 40_000), 8, 3.0), ("wan2.1-t2v-14b", (20_000, 6_000, 8_000), 8, 5.0), ("wan2.1-i2v-14b-480p", (20_000, 6_000, 8_000), 5, 5.0)])
def test_the_defaults_are_the_published_settings(name, steps, shift, guidance):
    """Spec 3.3, 5.3, 5.4."""
    s = BASES[name].settings
    assert (s.steps_align, s.steps_head, s.steps) == steps and s.shift == shift and BASES[name].guidance == guidance
    assert (s.align, s.head, s.time_sampling, s.null, s.drop, s.decay) == ("sgd", "zero", "released", "negative", 0.1, "constant")
    assert (s.lr_align, s.lr_head, s.lr, s.warmup_head, s.warmup, s.clip, s.ema) == (2e-4, 1e-4, 5e-5, 0, 1000, 0.1, 0.9999)
    assert (s.rank, s.alpha, s.batch_align, s.batch) == (256, 512, 4, 2)


@pytest.mark.core
def test_a_step_has_32_clips_however_many_processes_there_are():
    s = Settings()
    assert [s.accumulated(n) * n * s.batch for n in (1, 2, 4, 8, 16)] == [32] * 5
    assert dataclasses.replace(s, accumulate=3).accumulated(5) == 3
    with pytest.raises(UserError, match="cannot be divided among 3 processes with --batch 2: give --accumulate"):
        s.accumulated(3)


EMBEDDER = {"wan2.1-t2v-1.3b": 50_688, "wan2.1-t2v-14b": 168_960, "wan2.1-i2v-14b-480p": 353_280}  # spec 3.3
ADAPTERS = {30: (183, 259.6e6), 40: (243, 820.6e6)}  # spec 5.3: modules, parameters


@pytest.mark.parametrize("name", WAN)
def test_what_is_trained_by_name_and_count(name):
    """Stage 1a: the embedder. 1b: the ends. 2: the ends, and LoRA on six linears of
    each block and three of the time; nothing else."""
    config = deep(name)
    with torch.device("meta"):
        net = lora.wrap(dit.WanDiT(config), 256, 512, full=("patch_embedding", "head"))
    trained = {n: p.numel() for n, p in net.named_parameters() if p.requires_grad}
    ends = {n for n in trained if not n.endswith((".down", ".up"))}
    assert ends == {"patch_embedding.weight", "patch_embedding.bias", "head.head.weight", "head.head.bias", "head.modulation"}
    assert sum(trained[n] for n in ends if "patch" in n) == EMBEDDER.get(name, EMBEDDER["wan2.1-i2v-14b-480p" if "i2v" in name else "wan2.1-t2v-14b"])
    names = {n.rsplit(".", 1)[0] for n in trained.keys() - ends}
    assert names == {f"blocks.{i}.{part}" for i in range(config.layers) for part in
                     ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2")} | {"time_embedding.0", "time_embedding.2", "time_projection.1"}
    modules, parameters = ADAPTERS[config.layers]
    assert len(names) == modules and sum(trained[n] for n in trained.keys() - ends) == pytest.approx(parameters, rel=1e-3)


@pytest.mark.core
@pytest.mark.parametrize("name, target, channels, tokens", [  # spec 1.1, 1.2: raw values per token, tokens of 480x832 and 80 frames
    ("wan2.1-t2v-14b", "f32t4c32", (32, 32), 7800), ("wan2.1-i2v-14b-480p", "f32t4c32", (68, 32), 7800),
    ("wan2.1-t2v-14b", "f64t4c128", (128, 128), 1820), ("wan2.1-i2v-14b-480p", "f64t4c128", (260, 128), 1820)])
def test_the_deep_transformer_differs_in_its_ends_only(name, target, channels, tokens):
    base, config = dit.PRESETS[released.RELEASED[name].preset], deep(name, target)
    assert (config.in_channels, config.out_channels) == channels and config.patch == (1, 1, 1)
    assert dataclasses.replace(config, in_channels=base.in_channels, out_channels=base.out_channels, patch=base.patch) == base
    cell = ae.PRESETS[target].spatial_factor
    assert 20 * (480 // cell) * (832 // cell) == tokens


@pytest.mark.parametrize("name", WAN)
def test_models_from_the_official_layouts(tiny_folders, name):
    """The student has the base's encoders and task, the deep autoencoder and its size;
    the base's transformer is not read."""
    folders = [tiny_folders / f for f in (*FOLDERS[name][0], "DC-VideoGen-Wan2.1-14B")]
    base = BASES[name]
    teacher, student = base.models(arguments(folders), dataclasses.replace(base.settings, dtype="fp32"))
    assert teacher.net.net is None and (teacher.ae.config.spatial_factor, student.ae.config.spatial_factor) == (8, 32)
    assert student.net.config == dit.deep_config(teacher.net.config, student.ae.config) and student.low is None
    assert (student.frames, student.size, student.task, student.text) == (80, (480, 832), teacher.task, teacher.text)
    assert student.negative == teacher.negative and student.shift == (teacher.shift if "a14b" in name else 5.0)
    empty = base.models(arguments(folders), dataclasses.replace(base.settings, dtype="fp32", null="empty"))[1]
    assert empty.negative == ""

    experts = base.experts(teacher)
    assert [e.prefix for e in experts] == (["high-", "low-"] if "a14b" in name else [""])
    times = torch.linspace(0, 1, 101)
    inside = torch.stack([(times >= e.low) & (times < e.high) for e in experts])
    assert (inside.sum(0) == 1).all()  # each time belongs to one of them
    for expert in experts:
        net = expert.load()
        assert torch.equal(net.patch_embedding.weight, expert.embedder().weight) and not any(p.requires_grad for p in net.parameters())
    assert len({e.fingerprint() for e in experts}) == len(experts)


def test_a_new_base_is_a_row(tiny_folders, monkeypatch):
    """The 720p image-to-video model."""
    row = Base("wan2.1-i2v-14b-720p", Settings(shift=5.0))
    monkeypatch.setitem(BASES, row.name, row)
    folders = [tiny_folders / f for f in ("Wan2.1-I2V-14B-720P", "DC-VideoGen-Wan2.1-14B")]
    teacher, student = bases.find(row.name).models(arguments(folders), row.settings)
    assert student.net.config.in_channels == 68 and student.clip is teacher.clip is not None


def test_what_is_not_there_is_told_in_one_sentence(tiny_folders):
    assert bases.find("wan2.1") is BASES["wan2.1-t2v-1.3b"]
    with pytest.raises(UserError, match="there is no base 'wan': use one of toy, wan2.1-t2v-1.3b"):
        bases.find("wan")
    with pytest.raises(UserError, match="the deep autoencoder is in none of .*: name its file with --ae"):
        bases.deep_autoencoder("f32t4c32", None, [tiny_folders / "Wan2.1-T2V-1.3B"])
    with pytest.raises(UserError, match="is an autoencoder f32t4c32, not f64t4c128: give another file with --ae, or another --target"):
        bases.deep_autoencoder("f64t4c128", tiny_folders / "DC-VideoGen-Wan2.1-14B" / "dc-ae-v-f32t4c32-1.0-bf16.pt", [])


class Held:
    """Held-out clips of one latent each, with a constant prompt; dropped prompts are
    zeros."""

    def __init__(self, z, value=1.0):
        self.z, self.value = z, value

    def held_out(self, drop):
        return Held(self.z, 1 - drop)

    def batch(self, step, positions):
        return bases.cache.Batch(self.z.expand(len(positions), -1, -1, -1, -1), None, (torch.full((len(positions), 1, TEXT_DIM), self.value),))


@pytest.mark.parametrize("expert", [bases.Expert("", None), bases.Expert("high", None, low=0.9), bases.Expert("low", None, high=0.9)], ids=["one", "high", "low"])
def test_samples_after_a_stage_stay_in_the_experts_times(tiny_folders, expert):
    """A network that knows the clip brings every expert's sample to that clip; with
    guidance on top of the dropped prompt."""
    name = "wan2.1-t2v-1.3b"
    student = BASES[name].models(arguments([tiny_folders / f for f in (*FOLDERS[name][0], "DC-VideoGen-Wan2.1-14B")]), Settings(dtype="fp32"))[1]
    z, times = torch.randn(1, 32, 2, 1, 2), []

    class Knows(torch.nn.Module):
        config = student.net.config

        def forward(self, x, t, context):
            times.extend(t.tolist())
            v = (x - z) / (t / 1000).view(-1, 1, 1, 1, 1)
            return v * context.mean()  # without the prompt it says nothing

    model = dataclasses.replace(student, guidance=1.0)
    model.net = Knows()
    made = BASES[name].videos(model, expert, Held(z), steps=6)
    assert min(times) >= 1000 * expert.low and max(times) < 1000 * expert.high and len(times) >= 4
    known = torch.cat(list(model.decode(z, 8, (32, 64))), 2)[0]
    for x in made:
        assert x.shape == (3, 8, 32, 64)
        torch.testing.assert_close(x, known, atol=1e-3, rtol=1e-3)
