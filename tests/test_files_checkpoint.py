"""Weight files: written whole or not at all, read without running anything, refused in one sentence."""
import errno
import json
import os
import pickle
import random

import pytest
import torch
from torch import nn

from files.checkpoint import (Stored, UserError, atomic_path, load_pickle, load_strict, load_tensors, open_tensors, read_json, save_shards,
                              save_tensors, unwrap, user_errors, write_json)

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2]), "half": torch.ones(3).bfloat16(), "number": torch.tensor(2.5),
           "none": torch.empty(0, 3), "eighth": torch.tensor([0.5, -448]).to(torch.float8_e4m3fn), "mask": torch.tensor([True, False, True])}


# -------------------------------------------------------------------------------------------------- reading and writing

@pytest.mark.core
def test_tensors_and_metadata_come_back(tmp_path):
    wrote = {"step": 12, "config": {"dim": 3, "patch": [1, 2]}, "note": "1.3b base"}
    save_tensors(tmp_path / "new folder" / "w.safetensors", TENSORS, wrote)
    tensors, metadata = load_tensors(tmp_path / "new folder" / "w.safetensors")
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[k].double(), v.double()) and tensors[k].dtype == v.dtype for k, v in TENSORS.items())
    assert metadata == wrote


@pytest.mark.parametrize("how", ["safetensors", "torch", "torch before 2020", "one file in a folder", "shards", "index"])
def test_tensors_are_known_before_they_are_read(tmp_path, how):
    """Shapes and types at once; the values, read one by one, are those of the file."""
    tensors = {k: v for k, v in TENSORS.items() if k != "eighth" or "2020" not in how}  # fp8 is younger
    if how == "safetensors":
        save_tensors(path := tmp_path / "w.safetensors", tensors, {"step": 3})
    elif how.startswith("torch"):
        torch.save({"state_dict": tensors}, path := tmp_path / "w.pt", _use_new_zipfile_serialization=how == "torch")
    else:
        save_shards(tmp_path, tensors, {"step": 3}, shard_bytes=10 if "one" not in how else 5e9)
        path = tmp_path / "diffusion_pytorch_model.safetensors.index.json" if how == "index" else tmp_path
    stored, metadata = open_tensors(path)
    assert metadata == ({} if how.startswith("torch") else {"step": 3})
    assert {k: (s.shape, s.dtype) for k, s in stored.items()} == {k: (tuple(v.shape), v.dtype) for k, v in tensors.items()}
    for k, s in stored.items():
        assert torch.equal(s.read().double(), tensors[k].double()) and s.read().dtype == tensors[k].dtype and s.file


def test_stored_tensors_can_be_converted_and_written_without_being_held(tmp_path):
    """From file to file: each is fetched when it is written."""
    save_tensors(tmp_path / "wide.safetensors", {"a": torch.randn(50), "b": torch.randn(3, 4)})
    wide, _ = open_tensors(tmp_path / "wide.safetensors")
    save_tensors(tmp_path / "half.safetensors", {k: Stored(s.shape, torch.float16, lambda s=s: s.read().half()) for k, s in wide.items()})
    half, _ = load_tensors(tmp_path / "half.safetensors")
    assert all(torch.equal(half[k], s.read().half()) for k, s in wide.items())


@pytest.mark.parametrize("limit, files", [(5e9, 1), (48, 4), (1, 5)])
def test_shards_are_no_larger_than_asked_unless_one_tensor_is(tmp_path, limit, files):
    tensors = {f"t{i}": torch.full((4 + i,), float(i)) for i in range(5)}       # 16, 20, 24, 28, 32 bytes
    save_shards(tmp_path, tensors, shard_bytes=limit)
    written = sorted(tmp_path.glob("*.safetensors"))
    assert len(written) == files
    sizes = [sum(v.nbytes for v in load_tensors(f)[0].values()) for f in written]
    assert sum(sizes) == 120 and max(sizes) <= max(limit, 32)
    if files > 1:
        assert read_json(tmp_path / "diffusion_pytorch_model.safetensors.index.json")["metadata"]["total_size"] == 120
    assert all(torch.equal(s.read(), tensors[k]) for k, s in open_tensors(tmp_path)[0].items())


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


@pytest.mark.core
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
    for read in (load_tensors, open_tensors):
        with pytest.raises(UserError, match=f"cut{suffix}"):
            read(tmp_path / f"cut{suffix}")


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
        for read in (load_tensors, open_tensors):
            try:
                read(tmp_path / "damaged.pt")                            # a flipped bit in a number cannot be seen
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


@pytest.mark.core
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


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "diffusion_model."])
def test_names_are_bare_in_every_kind_of_file(tmp_path, prefix, suffix):
    file, tensors = tmp_path / f"a{suffix}", {f"{prefix}w.weight": torch.ones(2)}
    torch.save(tensors, file) if suffix == ".pt" else save_tensors(file, tensors)
    assert [*load_tensors(file)[0]] == [*open_tensors(file)[0]] == ["w.weight"]


def test_whole_numbers_without_scales_are_no_weights():
    with pytest.raises(UserError, match="holds weight in int8, whole numbers without a scale"):
        load_strict(torch.nn.Linear(2, 2, bias=False), {"weight": torch.ones(2, 2, dtype=torch.int8)}, "a.safetensors")


def test_a_dead_link_names_itself_and_its_end(tmp_path):
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="a.safetensors is a link to .*gone, which does not exist"):
        open_tensors(tmp_path / "a.safetensors")
