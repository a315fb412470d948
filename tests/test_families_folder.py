"""Folders of diffusers without diffusers: what is wrong with one is told before anything is imported, and then what to install."""
import json
import sys

import pytest
import torch

from families import folder, libraries
from files.checkpoint import UserError, save_tensors


def pipeline(out, kind="WanPipeline", transformer="WanTransformer3DModel", **parts):
    """A folder with the files of a Wan pipeline, and hardly anything in them."""
    index = {"_class_name": kind, "transformer": ["diffusers", transformer], "vae": ["diffusers", "AutoencoderKLWan"],
             "scheduler": ["diffusers", "UniPCMultistepScheduler"], "text_encoder": ["transformers", "UMT5EncoderModel"],
             "tokenizer": ["transformers", "T5TokenizerFast"], **parts}
    for part in index.keys() - {"_class_name"}:
        (out / part).mkdir(parents=True)
        (out / part / "config.json").write_text(json.dumps({"_class_name": index[part][1], "patch_size": [1, 2, 2]}))
    for part in ("transformer", "vae", "text_encoder"):
        save_tensors(out / part / "model.safetensors", {"patch_embedding.weight": torch.zeros(48, 4, 1, 2, 2), "proj_out.weight": torch.zeros(16, 48)})
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}))
    (out / "model_index.json").write_text(json.dumps(index))
    return out


@pytest.mark.parametrize("library", ["diffusers", "accelerate"])
def test_missing_packages_are_named(tmp_path, monkeypatch, library):
    pytest.importorskip("diffusers" if library == "accelerate" else "torch")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match="pip install diffusers transformers accelerate"):
        folder.load_model(pipeline(tmp_path))


def test_an_old_version_is_told(monkeypatch):
    class Old:
        __name__, __version__ = "diffusers", "0.30"

    with pytest.raises(UserError, match="diffusers 0.30 has no WanTransformer3DModel: install a version"):
        libraries.a_class(Old(), "WanTransformer3DModel")


@pytest.mark.parametrize("kind, transformer, said", [
    ("FluxPipeline", "FluxTransformer2DModel", "FluxTransformer2DModel, which is of no family known here: use a folder with one of Wan"),
    ("WanVACEPipeline", "WanTransformer3DModel", "another task: use a folder of WanPipeline"),
    ("CosmosTextToWorldPipeline", "CosmosTransformer3DModel", "another task: use a folder of Cosmos2_5"),
])
def test_other_models_are_refused_without_a_library(tmp_path, monkeypatch, kind, transformer, said):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=said):
        folder.load_model(pipeline(tmp_path, kind, transformer))
