"""Shared by all tests: the project on the path, threads that do not wait busily, the
reference tensors, tiny models."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # must precede torch

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

if not torch.cuda.is_available():  # for test_gpu_triton_kernels.py; must precede triton
    os.environ["TRITON_INTERPRET"] = "1"


def golden(name):
    """Path of a file of reference tensors: from the full set where GOLDEN_DIR names one, else
    the cut in tests/golden."""
    full = Path(os.environ.get("GOLDEN_DIR", "")) / name
    if os.environ.get("GOLDEN_DIR") and full.exists():
        return full
    return ROOT / "tests" / "golden" / name


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_toy(tmp_path, monkeypatch):
    """Random models a thousandth the size take the place of the embedded ones: same files,
    ratios and code path -> their folder.

    The base's head is not zero, as if it had been trained; the adapter has moved every
    adapted layer and the ends.
    """
    import ae
    import dit
    import lora
    from wan import released

    folder = tmp_path / "weights"
    monkeypatch.setattr(released, "WEIGHTS", folder)
    for name, channels in (("toy-base", 4), ("toy", 8)):
        stages = len(ae.PRESETS[name].widths) - 1
        config = ae.Config((0, *[8] * stages), (0, *[1] * stages), channels, chunk=8)
        ae.save(ae.DCAEV(config), folder / f"{name}.safetensors")
    size = dict(dim=24, ffn_dim=32, heads=2, layers=2)
    for name, channels in (("toy-base", 4), ("toy-dc", 8)):
        ends = dict(in_channels=2 * channels + 4, out_channels=channels)
        monkeypatch.setitem(dit.PRESETS, name, replace(dit.PRESETS[name], **size, **ends))

    base = dit.WanDiT(dit.PRESETS["toy-base"])
    torch.nn.init.normal_(base.head.head.weight, std=0.2)
    dit.save(base, folder / "toy-base-dit.safetensors")
    ends = ("patch_embedding", "head")
    deep = lora.wrap(dit.inherit(base, dit.PRESETS["toy-dc"]), rank=2, alpha=4, full=ends)
    for p in deep.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    lora.save(deep, folder / "toy-dc-lora.safetensors", "comfyui", full=ends)
    return folder


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """Tiny models in every official layout (tests/tiny_layouts.py) -> the folder that
    holds theirs. Tests only read there."""
    import tiny_layouts

    return tiny_layouts.make(tmp_path_factory.mktemp("released"))
