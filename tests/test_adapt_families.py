"""Adapting a base in diffusers' layout, through the command line, on tiny random folders of every family: the same stages, and what they
leave behind is what diffusers reads.

    python -m pytest -m peer tests/test_adapt_families.py         needs requirements-dev.txt; without it the tests are skipped
"""
import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import adapt
import align
import dit
import flow
import lora
import sample
from conftest import ROOT
from families import net as nets
from families import tiny
from files import checkpoint
from files.checkpoint import UserError
from files.layouts import to_diffusers
from training import bases, loop
from wan import released
from wan import tiny as wan_tiny

pytestmark = pytest.mark.peer
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
FAMILIES = list(tiny.PIPELINES)
HOW = ["--buckets", "64x64F32MS", "--frames", "20", "--fps", "native", "--device", "cpu", "--dtype", "fp32", "--batch", "2", "--accumulate", "1",
       "--rank", "2", "--warmup", "0", "--steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What all runs read: the deep autoencoder, captioned clips; folders of the families, written when first asked for."""
    out = tmp_path_factory.mktemp("bases")
    wan_tiny.torch_save(out / bases.TARGETS["f32t4c32"][0], {"model_state_dict": wan_tiny.deep_autoencoder().state_dict()})
    (out / "clips").mkdir()
    for name, caption in (("bunny", "a rabbit"), ("city", 'a city, a sign "open"')):
        shutil.copy(ROOT / "assets" / f"{name}.mp4", out / "clips")
        (out / "clips" / f"{name}.txt").write_text(caption)
    return out


def base_of(folder, family):
    return folder / family if (folder / family).exists() else tiny.write(family, folder / family)


def run(folder, base, out, *more):
    adapt.main(["--base", str(base), "--weights", str(folder), "--data", str(folder / "clips"), "--out", str(out), *HOW, *map(str, more)])


@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_exported_and_sampled(folder, tmp_path, family, capsys):
    """All stages, the second half by a second run that goes on; diffusers' own class reads the transformer, with the new channel counts, and
    gives what ours does; a prompt becomes a video."""
    base, out = base_of(folder, family), tmp_path / "out"
    at_once = ["--align", "closed_form", "--steps-head", "2", "--sample-steps", "0"]
    run(folder, f"diffusers:{base}", out, *at_once, "--stage", "align")
    started = (out / "1a" / "trained.safetensors").stat().st_mtime_ns
    run(folder, f"diffusers:{base}", out, *at_once)
    assert (out / "1a" / "trained.safetensors").stat().st_mtime_ns == started
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[:6] == ["python", "sample.py", "--model", str(out), "--weights", str(base)]
    stages = [row["stage"] for row in checkpoint.read_json(out / "report.json")["stages"]]
    assert stages == [*(f"1a {way}" for way in align.CLOSED_FORMS), "1a, assembled", "1b, head aligned", "2, LoRA"]

    # the transformer, in diffusers
    ours = nets.load(out / "transformer")
    theirs = getattr(diffusers, tiny.TRANSFORMERS[family][0]).from_pretrained(out / "transformer")
    assert ours.config.in_channels == ours.config.out_channels == 32 and ours.config.patch == (1, 1, 1)
    tensors = theirs.state_dict()
    assert all(torch.equal(p.float(), tensors[name.removeprefix("transformer.")].float()) for name, p in ours.named_parameters())
    takes = theirs.config[ours.family.channels[0]]
    assert takes == ours.family.stated[0] * 32 + ours.family.stated[1] or family == "kandinsky-5"

    # the LoRA, merged into the base with the trained ends, is the export
    trained, again = checkpoint.load_tensors(out / "2" / "trained.safetensors")[0], nets.inherit(nets.load(base / "transformer"), ours.config)
    loop.copy_into(again, {name: value for name, value in trained.items() if name.startswith(again.ends)})
    assert not lora.load(again, out / "lora-peft.safetensors").skipped
    for name, p in again.named_parameters():
        torch.testing.assert_close(p, dict(ours.named_parameters())[name], rtol=0.01, atol=1e-3)

    sample.main(["--model", str(out), "--weights", str(base), "--prompt", "a cat", "--frames", "8", "--size", "64x64", "--steps", "2",
                 "--device", "cpu", "--out", str(tmp_path / "video"), "--name", "cat"])
    assert (tmp_path / "video" / "cat.mp4").exists()
    assert checkpoint.load_tensors(tmp_path / "video" / "cat.safetensors")[0]["latent"].shape == (1, 32, 2, 2, 2)


@pytest.mark.parametrize("family", ["kandinsky-5", "skyreels-v2"])
def test_the_base_itself_makes_a_video(folder, tmp_path, family):
    """Through an autoencoder of diffusers' own, and through Wan's."""
    sample.main(["--model", f"diffusers:{base_of(folder, family)}", "--prompt", "a cat", "--frames", "5", "--size", "32x48", "--steps", "2",
                 "--device", "cpu", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("*.mp4"))) == 1


def test_samples_sgd_and_on_from_an_adapted_model(folder, tmp_path, capsys):
    """The paper's way through stage 1a, pictures after each stage, and then stage 2 once more on what came out."""
    base = f"diffusers:{base_of(folder, 'kandinsky-5')}"
    run(folder, base, tmp_path / "one", "--align", "sgd", "--steps-align", "20", "--steps-head", "2", "--sample-steps", "4")
    assert (tmp_path / "one" / "stages.png").exists() and (tmp_path / "one" / "pairs.png").exists()
    run(folder, base, tmp_path / "two", "--sample-steps", "0", "--continue-from", tmp_path / "one")
    ends = [nets.read_ends(tmp_path / name / "transformer") for name in ("one", "two")]
    moved = [(ends[1][name] - value).abs().max() for name, value in ends[0].items()]
    assert 0 < max(moved) < 0.01  # two steps from where the other ended


def test_resumed_equals_uninterrupted_bit_for_bit(folder, tmp_path, monkeypatch):
    """Killed in the middle of stage 2 and started again, with prompts that are padded and masked."""
    base = f"diffusers:{base_of(folder, 'hunyuan-video-1.5')}"
    go = [base, "--align", "closed_form", "--steps-head", "1", "--save-every", "1", "--sample-steps", "0", "--stage", "lora", "--threads", "1",
          "--cache", tmp_path / "cache"]
    threads = torch.get_num_threads()
    try:
        run(folder, go[0], tmp_path / "whole", *go[1:])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            calls, loss = [], flow.loss

            def dies(*args):
                calls.append(torch.is_grad_enabled())
                if sum(calls) == 3:  # one step of stage 1b, one of stage 2
                    raise KeyboardInterrupt
                return loss(*args)

            patch.setattr(flow, "loss", dies)
            run(folder, go[0], tmp_path / "broken", *go[1:])
        run(folder, go[0], tmp_path / "broken", *go[1:])
    finally:
        torch.set_num_threads(threads)
    whole, broken = (checkpoint.load_tensors(tmp_path / out / "2" / "trained.safetensors")[0] for out in ("whole", "broken"))
    assert whole.keys() == broken.keys() and all(torch.equal(whole[k], broken[k]) for k in whole)


def test_wan_by_diffusers_is_wan_by_our_own_files(folder, tiny_folders, tmp_path):
    """Embeddings, losses and exports of both ways through all stages, within 1e-5: the same clips, noise, prompts and fresh tensors."""
    path = tiny_folders / "Wan2.1-T2V-1.3B-Diffusers"
    same = ["--align", "closed_form", "--steps-head", "2", "--null", "empty", "--sample-steps", "0", "--format", "diffusers"]
    adapt.main(["--base", "wan2.1-t2v-1.3b", "--weights", str(path), str(folder), "--data", str(folder / "clips"), "--out", str(tmp_path / "ours"), *HOW, *same])
    run(folder, f"diffusers:{path}", tmp_path / "theirs", *same)
    reports = [checkpoint.read_json(tmp_path / out / "report.json")["stages"] for out in ("ours", "theirs")]
    for ours, theirs in zip(*reports, strict=True):
        numbers = {name: value for name, value in ours.items() if isinstance(value, float) and name != "seconds"}
        assert numbers == pytest.approx({name: theirs[name] for name in numbers}, rel=1e-5, abs=1e-6)
    for stage in ("1b", "2"):
        ours, theirs = (loop.read_log(tmp_path / out / stage) for out in ("ours", "theirs"))
        assert ours and [a["loss"] for a in ours] == pytest.approx([a["loss"] for a in theirs], rel=1e-5)
    ours, theirs = (released.dit.load(tmp_path / out / "transformer") for out in ("ours", "theirs"))  # by our own reader
    assert ours.config == theirs.config
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0.01, atol=1e-5, msg=name)  # stored in bf16
    ours, theirs = (checkpoint.load_tensors(tmp_path / out / "2" / "trained.safetensors")[0] for out in ("ours", "theirs"))
    theirs = {name.removeprefix("transformer."): value for name, value in theirs.items()}
    assert theirs.keys() == {to_diffusers(name) for name in ours}
    apart = {name: (value - theirs[to_diffusers(name)].view_as(value)).abs().max().item() for name, value in ours.items()}
    assert max(apart.values()) < 1e-5, sorted(apart.items(), key=lambda item: -item[1])[:5]  # what the export is made of, in fp32
    ours, theirs = (checkpoint.load_tensors(tmp_path / out / "lora-peft.safetensors")[0] for out in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all((ours[k].float() - theirs[k].float()).abs().max() < 1e-4 for k in ours)


@pytest.mark.parametrize("family", ["kandinsky-5", "cosmos-predict-2.5"])
def test_the_closed_form_is_where_sgd_ends(folder, tmp_path, family):
    """The SGD of stage 1a on a matrix whose channels vary fastest, and on one without a bias: MSE within 1 %."""
    teacher, g = nets.embedder(base_of(folder, family) / "transformer"), torch.Generator().manual_seed(0)
    patch, s = nets.look(folder / family / "transformer").config.patch, 2
    latent = [torch.randn(6, 3, 2, 2, generator=g) + 0.3 for _ in range(8)]
    mix = torch.randn(4, 6, generator=g)

    def pair(i):
        base = torch.einsum("zc,cthw->zthw", mix, latent[i]) + 0.5
        fine = base.repeat_interleave(s * patch[1], 2).repeat_interleave(s * patch[2], 3)
        return fine + 0.1 * torch.randn(fine.shape, generator=torch.Generator().manual_seed(i)), latent[i]

    config = dit.Config(dim=len(teacher.weight), ffn_dim=1, heads=1, layers=1, in_channels=6, out_channels=6, patch=(1, 1, 1))
    weight, bias = dit.fresh_embedder(config, seed=0)
    tokens = align.Tokens((patch, (1, 1, 1)), (teacher.weight.shape[1], 6), s)
    problem = align.Problem(teacher, (weight, None if teacher.bias is None else bias), pair, 8, tokens, flow.Times())
    solved = align.fit("closed_form", problem)
    plan = loop.Plan(600, warmup=0, decay="linear", clip=0.0, save_every=600, log_every=100, keep=1)
    found = align.sgd(problem, partial(loop.Run, tmp_path / "run", {}, plan=plan), batch=8, lr=2e-2)
    mse = [align.r_squared(problem.moments, teacher, *way)[1] for way in (solved, found)]
    assert (solved[1] is None) == (found[1] is None) == (family == "cosmos-predict-2.5")
    assert mse[0] <= mse[1] * 1.001 and mse[1] == pytest.approx(mse[0], rel=0.01)


@pytest.mark.parametrize("family, targets", [("wan", r"transformer\.(blocks\.\d+\.attn[12]\.to_[qv]|proj_out)"),
                                             ("hunyuan-video-1.5", r"transformer\.(transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)|proj_out)")])
def test_a_lora_of_the_base_on_the_deep_model(folder, tmp_path, recwarn, family, targets):
    """What fits is applied; the last layer, which belongs to the base's latent, is named, also where its shape would fit."""
    base = base_of(folder, family) / "transformer"
    net = nets.load(base)
    lora.wrap(net, 2, 4, targets=[targets])
    for _, adapter in lora.adapters(net):
        torch.nn.init.normal_(adapter.up)
    lora.save(net, tmp_path / "style.safetensors")
    space = SimpleNamespace(latent_channels=4, spatial_factor=32)
    deep = nets.inherit(nets.load(base), nets.deep_config(nets.load(base).config, space))
    assert family == "wan" or deep.head_layer.weight.shape == nets.load(base).head_layer.weight.shape
    before = {name: p.clone() for name, p in deep.named_parameters()}
    result = lora.load(deep, tmp_path / "style.safetensors", 0.5)
    assert [name for name in result.skipped] == ["transformer.proj_out.weight (made for another latent space)"]
    assert "transformer.proj_out.weight (made for another latent space)" in str(recwarn.pop(UserWarning).message)
    assert len(result.applied) == 8
    assert {name for name, p in deep.named_parameters() if not torch.equal(p, before[name])} == set(result.applied)


def test_plans(folder, capsys, monkeypatch):
    """Parameters of the folder's own transformer; a text encoder that is too large is told of."""
    from training import plan

    monkeypatch.setattr(plan, "free_memory", lambda device: 1000)
    adapt.main(["--base", f"diffusers:{base_of(folder, 'kandinsky-5')}", "--plan", "--gpus", "1"])
    text = capsys.readouterr().out
    deep = nets.inherit(nets.load(folder / "kandinsky-5" / "transformer"), nets.deep_config(
        nets.load(folder / "kandinsky-5" / "transformer").config, bases.ae.PRESETS["f32t4c32"]))
    ends = sum(p.numel() for name, p in deep.named_parameters() if name.startswith(deep.ends))
    assert re.search(rf"^\| 1b +\| +{ends:,d} \| ", text, re.M) and "--stage cache" in text and "encoder is not counted" in text


@pytest.mark.parametrize("options, said", [
    (["--format", "original"], "--format says nothing to --base diffusers:"),
    (["--shards", "3"], "--shards says nothing to"),
    (["--steps-align", "3", "--align", "closed_form"], "--steps-align says nothing"),
])
def test_options_that_say_nothing_are_refused(folder, tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        run(folder, f"diffusers:{base_of(folder, 'wan')}", tmp_path / "out", *options)


def test_what_is_missing_is_asked_for(folder, tmp_path):
    base = f"diffusers:{base_of(folder, 'wan')}"
    with pytest.raises(UserError, match="diffusers:FOLDER"):
        bases.find("hunyuan")
    with pytest.raises(UserError, match="name its file with --ae"):
        adapt.main(["--base", base, "--data", str(folder / "clips"), "--out", str(tmp_path)])
    with pytest.raises(UserError, match="needs --data"):
        adapt.main(["--base", base, "--weights", str(folder), "--out", str(tmp_path)])
