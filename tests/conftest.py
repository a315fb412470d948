"""Shared by all tests: passive OpenMP threads (before torch is imported), the project on the path, the reference tensors."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch


def golden(name):
    """Path of a file of reference tensors: from the full set where GOLDEN_DIR names one, else the cut shipped in tests/golden."""
    full = Path(os.environ.get("GOLDEN_DIR", "")) / name
    return full if os.environ.get("GOLDEN_DIR") and full.exists() else ROOT / "tests" / "golden" / name


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
