"""Weight files: written whole or not at all, read without running anything, refused in one sentence."""
import errno
import json
import os
import pickle
import random

import pytest
import torch
from torch import nn

import checkpoint
from checkpoint import (UserError, atomic_path, load_pickle, load_strict, load_tensors, save_tensors, unwrap,
                        user_errors, write_json)
from conftest import golden

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2]), "half": torch.ones(3).bfloat16()}


# -------------------------------------------------------------------------------------------------- reading and writing

def test_tensors_and_metadata_come_back(tmp_path):
    wrote = {"step": 12, "config": {"dim": 3, "patch": [1, 2]}, "note": "1.3b base"}
    save_tensors(tmp_path / "new folder" / "w.safetensors", TENSORS, wrote)
    tensors, metadata = load_tensors(tmp_path / "new folder" / "w.safetensors")
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in TENSORS.items())
    assert metadata == wrote


def test_views_shared_and_trainable_tensors_can_be_saved(tmp_path):
    base = nn.Parameter(torch.randn(4, 4))
    save_tensors(tmp_path / "w.safetensors", {"whole": base, "transposed": base.t(), "row": base[1]})
    tensors, _ = load_tensors(tmp_path / "w.safetensors")
    assert torch.equal(tensors["transposed"], base.t()) and torch.equal(tensors["row"], base[1])


def test_a_failure_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"old": torch.ones(2)})
    with pytest.raises(OSError):
        with atomic_path(path) as tmp:
            tmp.write_bytes(b"half of a new fi")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert load_tensors(path)[0].keys() == {"old"}
    assert os.listdir(tmp_path) == ["w.safetensors"]                     # and nothing half-written beside it


def test_the_target_appears_only_when_complete(tmp_path):
    with atomic_path(tmp_path / "clip.mp4") as tmp:
        tmp.write_text("bytes")
        assert tmp.suffix == ".mp4" and tmp.parent == tmp_path           # writers choose the format by the suffix
        assert not (tmp_path / "clip.mp4").exists()
    assert (tmp_path / "clip.mp4").read_text() == "bytes"


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "r.json", {"db": 30.5})
    with pytest.raises(TypeError):
        write_json(tmp_path / "r.json", {"db": object()})
    assert json.loads((tmp_path / "r.json").read_text()) == {"db": 30.5}
    assert os.listdir(tmp_path) == ["r.json"]


# ----------------------------------------------------------------------------------------------------- untrusted files

class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))], ids=["torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, write):
    write({"state_dict": {"a": torch.ones(2)}, "x": RunsCode(tmp_path / "it ran")}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="could run code"):
        load_tensors(tmp_path / "w.pt")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, suffix, keep):
    whole = tmp_path / f"whole{suffix}"
    big = {"w": torch.randn(64, 64)}
    save_tensors(whole, big) if suffix == ".safetensors" else torch.save(big, whole)
    data = whole.read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(data[:keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(UserError, match=f"cut{suffix}"):
        load_tensors(tmp_path / f"cut{suffix}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("new_zip_format", [True, False])
def test_damaged_checkpoints_give_a_sentence_never_a_traceback(tmp_path, new_zip_format):
    torch.save({"w": torch.randn(3, 4), "step": 1}, tmp_path / "w.pt", _use_new_zipfile_serialization=new_zip_format)
    data, rng = (tmp_path / "w.pt").read_bytes(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(data[:rng.randrange(len(data))] if rng.random() < 0.3 else data)
        for _ in range(rng.randrange(1, 6) if damaged else 0):
            damaged[rng.randrange(min(len(damaged), 400))] = rng.randrange(256)
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            load_tensors(tmp_path / "damaged.pt")                        # a flipped bit in a number cannot be seen
        except UserError:
            pass


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tensors(tmp_path / "nothing.safetensors")


# ------------------------------------------------------------------------------------------------ official containers

W, EMA = torch.ones(2), torch.zeros(2)


@pytest.mark.parametrize("container, expected", [
    ({"w": W}, {"w": W}),
    ({"state_dict": {"w": W}, "global_step": 3}, {"w": W}),
    ({"model_state_dict": {"w": W}, "best_metric": 0.1}, {"w": W}),
    ({"model_state_dict": {"w": W}, "ema_model_state_dict": {0.9999: {"w": EMA}}}, {"w": EMA}),      # the average wins
    ({"model_state_dict": {"w": W}, "ema_model_state_dict": {}}, {"w": W}),
    ({"module._orig_mod.a._fsdp_wrapped_module.w": W, "b._checkpoint_wrapped_module.w": EMA}, {"a.w": W, "b.w": EMA}),
    ({"my_module.w": W, "step": 3}, {"my_module.w": W})])
def test_unwrap(tmp_path, container, expected):
    got = unwrap(container)
    assert got.keys() == expected.keys() and all(torch.equal(got[k], v) for k, v in expected.items())
    torch.save(container, tmp_path / "w.pt")
    assert load_tensors(tmp_path / "w.pt")[0].keys() == expected.keys()


@pytest.mark.parametrize("container", [[W], {}, {"step": 3}, {"state_dict": {}}, None])
def test_containers_without_weights_are_refused(container):
    with pytest.raises(UserError, match="weight file"):
        unwrap(container)


def test_plain_containers_may_hold_settings(tmp_path):
    torch.save({"optimizer": {"lr": 1e-4, "betas": (0.9, 0.999)}, "rng": torch.get_rng_state()}, tmp_path / "state.pt")
    assert load_pickle(tmp_path / "state.pt")["optimizer"]["betas"] == (0.9, 0.999)


# ----------------------------------------------------------------------------------------------------- strict loading

def test_load_strict_copies_and_converts():
    net = load_strict(nn.Linear(3, 2), {"weight": torch.ones(2, 3).bfloat16(), "bias": torch.zeros(2)}, "w.pt")
    assert net.weight.dtype == torch.float32 and (net.weight == 1).all()


@pytest.mark.parametrize("tensors, says", [
    ({"weight": torch.zeros(2, 3)}, "1 missing (first: bias)"),
    ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "scale": W}, "1 unexpected (first: scale)"),
    ({"weight": torch.zeros(2, 3), "offset": W}, "1 missing (first: bias) and 1 unexpected (first: offset)"),
    ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, "weight has shape [2, 4], expected [2, 3]")])
def test_load_strict_names_what_does_not_fit_and_changes_nothing(tensors, says):
    net = nn.Linear(3, 2)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError) as e:
        load_strict(net, tensors, "w.pt")
    assert says in str(e.value) and str(e.value).startswith("w.pt")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ------------------------------------------------------------------------------------------- errors told to the user

@pytest.mark.parametrize("error, says, status", [
    (UserError("give --out."), "give --out.", 1),
    (OSError(errno.ENOSPC, "No space left", "out.mp4"), "the disk is full while writing out.mp4", 1),
    (OSError(errno.EROFS, "Read-only", "out.mp4"), "choose another folder", 1),
    (PermissionError(errno.EACCES, "denied", "out.mp4"), "choose another folder", 1),
    (FileNotFoundError(errno.ENOENT, "no", "in.mp4"), "in.mp4 does not exist", 1),
    (torch.cuda.OutOfMemoryError("CUDA"), "out of GPU memory", 1),
    (KeyboardInterrupt(), "stopped", 130)])
def test_what_the_user_can_mend_is_one_sentence(capsys, monkeypatch, error, says, status):
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit) as e, user_errors():
        raise error
    captured = capsys.readouterr()
    assert e.value.code == status and says in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_debug_shows_the_traceback_and_bugs_are_never_hidden(monkeypatch):
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(UserError, match="give --out"), user_errors():
        raise UserError("give --out.")
    monkeypatch.delenv("DEBUG")
    with pytest.raises(ZeroDivisionError), user_errors():
        1 / 0


def test_no_error_passes_through():
    with user_errors():
        pass


# ------------------------------------------------------------------------------------ two spellings of one transformer

PAIRS = {  # original: diffusers
    "patch_embedding.bias": "patch_embedding.bias",
    "text_embedding.0.weight": "condition_embedder.text_embedder.linear_1.weight",
    "text_embedding.2.bias": "condition_embedder.text_embedder.linear_2.bias",
    "time_embedding.0.weight": "condition_embedder.time_embedder.linear_1.weight",
    "time_embedding.2.weight": "condition_embedder.time_embedder.linear_2.weight",
    "time_projection.1.bias": "condition_embedder.time_proj.bias",
    "img_emb.proj.0.weight": "condition_embedder.image_embedder.norm1.weight",
    "img_emb.proj.1.weight": "condition_embedder.image_embedder.ff.net.0.proj.weight",
    "img_emb.proj.3.weight": "condition_embedder.image_embedder.ff.net.2.weight",
    "img_emb.proj.4.weight": "condition_embedder.image_embedder.norm2.weight",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "blocks.12.modulation": "blocks.12.scale_shift_table",
    **{f"blocks.0.self_attn.{x}.weight": f"blocks.0.attn1.to_{x}.weight" for x in "qkv"},
    **{f"blocks.0.cross_attn.{x}.bias": f"blocks.0.attn2.to_{x}.bias" for x in "qkv"},
    "blocks.0.self_attn.o.weight": "blocks.0.attn1.to_out.0.weight",
    "blocks.0.cross_attn.o.weight": "blocks.0.attn2.to_out.0.weight",
    "blocks.0.self_attn.norm_q.weight": "blocks.0.attn1.norm_q.weight",
    "blocks.0.cross_attn.norm_k.weight": "blocks.0.attn2.norm_k.weight",
    "blocks.0.norm3.weight": "blocks.0.norm2.weight",
    "blocks.0.cross_attn.k_img.weight": "blocks.0.attn2.add_k_proj.weight",
    "blocks.0.cross_attn.v_img.bias": "blocks.0.attn2.add_v_proj.bias",
    "blocks.0.cross_attn.norm_k_img.weight": "blocks.0.attn2.norm_added_k.weight",
    "blocks.0.ffn.0.weight": "blocks.0.ffn.net.0.proj.weight",
    "blocks.0.ffn.2.bias": "blocks.0.ffn.net.2.bias",
    "head.modulation": "scale_shift_table",
    "head.head.weight": "proj_out.weight",
    "blocks.3.self_attn.o": "blocks.3.attn1.to_out.0",                   # module paths too
    "head.head": "proj_out",
}


def test_original_and_diffusers_names():
    for case in json.loads(golden("wan_dit_tiny.json").read_text())["cases"].values():
        PAIRS.update(case["official_to_diffusers"])
    for original, diffusers in PAIRS.items():
        assert checkpoint.to_diffusers(original) == diffusers == checkpoint.to_diffusers(diffusers)
        assert checkpoint.to_original(diffusers) == original == checkpoint.to_original(original)
    assert checkpoint.to_original("something.else") == checkpoint.to_diffusers("something.else") == "something.else"
