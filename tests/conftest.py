"""Shared by all tests: passive OpenMP threads (before torch is imported), the project on the path, the reference tensors."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for tests/test_gpu_triton_kernels.py; must precede triton, which other packages import too


def golden(name):
    """Path of a file of reference tensors: from the full set where GOLDEN_DIR names one, else the cut shipped in tests/golden."""
    full = Path(os.environ.get("GOLDEN_DIR", "")) / name
    return full if os.environ.get("GOLDEN_DIR") and full.exists() else ROOT / "tests" / "golden" / name


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_toy(tmp_path, monkeypatch):
    """Random models a thousandth the size take the place of the embedded ones: same files, ratios and code path -> their folder.

    The base's head is not zero, as if it had been trained; the adapter has moved every adapted layer and the ends.
    """
    import ae
    import dit
    import lora
    from wan import released

    folder = tmp_path / "weights"
    size = dict(dim=24, ffn_dim=32, heads=2, layers=2, text_dim=32, text_len=8)
    monkeypatch.setitem(dit.PRESETS, "toy-base", dit.Config(**size, in_channels=12, out_channels=4))
    monkeypatch.setitem(dit.PRESETS, "toy-dc", dit.Config(**size, in_channels=20, out_channels=8, patch=(1, 1, 1)))
    monkeypatch.setattr(released, "WEIGHTS", folder)

    ae.save(ae.DCAEV(ae.Config((0, 8, 8, 8, 8), (0, 1, 1, 1, 1), 4, chunk=8)), folder / "toy-base.safetensors")
    ae.save(ae.DCAEV(ae.Config((0, 8, 8, 8, 8, 8, 8), (0, 1, 1, 1, 1, 1, 1), 8, chunk=8)), folder / "toy.safetensors")
    base = dit.WanDiT(dit.PRESETS["toy-base"])
    torch.nn.init.normal_(base.head.head.weight, std=0.2)
    dit.save(base, folder / "toy-base-dit.safetensors")
    deep = lora.wrap(dit.inherit(base, dit.PRESETS["toy-dc"]), rank=2, alpha=4, full=("patch_embedding", "head"))
    for p in deep.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    lora.save(deep, folder / "toy-dc-lora.safetensors", "comfyui", full=("patch_embedding", "head"))
    return folder


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """Tiny models in every official layout (wan/tiny.py) -> the folder that holds theirs. Tests only read there."""
    from wan import tiny

    return tiny.make(tmp_path_factory.mktemp("released"))
