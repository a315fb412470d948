"""The benchmark runs and says what it measured; how fast is not a test."""
import json
from pathlib import Path

import pytest
import torch

import ae
import dit
import kernels
from bench import __main__ as bench, cpu as bench_cpu
from wan import models


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


def test_cpu_suite(tmp_path, monkeypatch):
    """Every part with networks a thousandth the size: each row has its ratios, the plain path ran and was switched off again, the plot is drawn."""
    tiny = ae.Config((0, 8, 8, 8, 8), (0, 1, 1, 1, 1), 4, chunk=8)
    monkeypatch.setattr(bench_cpu, "SMALL", dit.Config(dim=24, ffn_dim=32, heads=2, layers=1, in_channels=16, out_channels=16))
    monkeypatch.setattr(bench_cpu, "LATENTS", ((4, 4, 4), (4, 8, 8)))
    monkeypatch.setattr(bench_cpu, "DECODES", {"toy": (tiny, (2, 2, 2))})
    monkeypatch.setattr(bench_cpu, "ceilings", lambda: dict(fp32=1e11, bf16=4e11, copy=1e10))
    monkeypatch.setattr(bench_cpu, "start", dict)
    monkeypatch.setattr(bench_cpu, "training", lambda table, repeats: None)  # at its full size only
    monkeypatch.setattr(models.Model, "steps", 1)
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))  # put back at the end
    bench.main(["--suite", "cpu", "--repeats", "1", "--out", str(tmp_path / "b.json")])
    torch.set_num_threads(threads)
    report = json.loads((tmp_path / "b.json").read_text())
    assert {"transformer, 16 tokens", "transformer, 64 tokens", "toy sampling, dc", "decode, toy"} <= report["rows"].keys()
    for row in report["rows"].values():
        assert all(r == row["seconds"][b] / row["seconds"][v] for v, against in row["ratio"].items() for b, r in against.items())
        assert row["relative_error"][next(iter(row["seconds"]))] < 1e-4
    assert report["threads"] == 1 and (tmp_path / "b.png").stat().st_size > 5000
    assert not kernels.plain()
