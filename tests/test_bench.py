"""The benchmark runs and says what it measured; how fast is not a test."""
import json
from pathlib import Path

import pytest
import torch

import bench
import models


def test_toy_suite(tmp_path, monkeypatch):
    monkeypatch.setattr(models.Model, "steps", 2)
    bench.main(["--repeats", "1", "--out", str(tmp_path / "b.json")])
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["tokens"] == {"base": 128, "dc": 32}
    assert set(report["median_seconds"]) == {"transformer pass", "guided loop", "decode", "prompt to pixels"}
    for row in report["median_seconds"].values():
        assert row["ratio"] == row["base"] / row["dc"] > 0
    assert {"date", "commit", "cpu", "torch", "threads"} <= report.keys()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_is_seen(tmp_path):
    """The peak is that of the moment, not of the end; what is kept and what was freed both count."""
    def task():
        torch.ones(30_000_000)  # 120 MB, freed
        return torch.ones(10_000_000)  # 40 MB, kept

    kept, row = bench.peak_of(task)
    assert 0.9 * 120e6 < row["peak"]["anonymous"] - row["before"]["anonymous"] < 180e6
    row = bench.save_transformer("toy-base", "original", str(tmp_path / "w"), shard_bytes=4e6)
    assert row["peak"]["anonymous"] >= row["before"]["anonymous"] > 0 and len(list((tmp_path / "w").glob("*.safetensors"))) > 1
    row = bench.load_transformer(str(tmp_path / "w"), "bfloat16")
    assert row["result"] < 0.75 * sum(f.stat().st_size for f in (tmp_path / "w").iterdir())
