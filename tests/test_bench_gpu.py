"""The GPU suite walks through all its parts on the CPU with tiny shapes; what it measures there means nothing."""
import json

import pytest
import torch

from bench import __main__ as bench, gpu as bench_gpu
from files.checkpoint import UserError


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "b.json"
    bench.main(["--suite", "gpu", "--dry-run", "--out", str(out)])
    assert out.with_suffix(".png").stat().st_size > 10_000
    return json.loads(out.read_text())


def test_every_part_runs(report):
    """Nothing is left out but diffusers, where it is not installed."""
    assert all("diffusers is not installed" in row["reason"] for row in report["left_out"])
    parts = {row["part"] for row in report["rows"]}
    assert parts == {"ceiling", "peer", "loop", "operation", "step", "decode", "video"}
    assert {"date", "commit", "gpu", "torch", "dry_run"} <= report.keys()
    for row in report["rows"]:
        assert "ratios" in row or row["seconds"] > 0


def test_everybody_computes_the_same(report):
    """Plain path, compiled blocks and diffusers on the same weights and inputs."""
    differences = {row["name"].split(": ")[1]: row["difference"] for row in report["rows"] if "difference" in row}
    assert {"ours", "ours, plain"} <= differences.keys() and max(differences.values()) < 1e-5


@pytest.mark.peer
def test_diffusers_is_among_them(report):
    pytest.importorskip("diffusers")
    assert {"diffusers", "diffusers, compiled blocks"} <= {row["name"].split(": ")[1] for row in report["rows"] if "difference" in row}


def test_extrapolation_from_few_blocks(report):
    """The row says so where few were measured, which depends on the machine's speed; a video adds 100 forwards and the decode."""
    rows = {row["name"]: row for row in report["rows"]}
    step = rows["1.3B base f8t4c16, 4 frames 720p"]
    assert step["note"] == ("" if step["blocks"] == 4 else f"extrapolated from {step['blocks']} of 4 blocks")
    decode, video = rows["base f8t4c16, 4 frames 720p"], rows["1.3B base f8t4c16, 4 frames 720p, 50 steps"]
    assert video["seconds"] == pytest.approx(100 * step["seconds"] + decode["seconds"])


def test_extrapolation_is_exact_for_equal_blocks(monkeypatch, tmp_path):
    """With a clock that charges 1 s per call of a block and 5 s for the ends, 30 blocks take 35 s, measured with 4."""
    suite = bench_gpu.Suite(bench_gpu.dry(torch.device("cpu")), tmp_path / "b.json", 100)
    suite.ceiling.update(flops=1e9, bytes=1e9)
    monkeypatch.setattr(suite, "clock", lambda task, expected=0: 5.0 + len(task.func.blocks))
    config = bench_gpu.Scale.config
    monkeypatch.setattr(bench_gpu.Scale, "config", lambda *a: bench_gpu.dataclasses.replace(config(*a), layers=30))
    with torch.no_grad():
        blocks = bench_gpu.random_blocks(suite, "1.3B", 4)
        assert bench_gpu.steps_of(suite, "1.3B", "DC f32t4c32", "480p", 4, blocks) == 35.0


def test_a_part_that_fails_is_noted_and_the_rest_goes_on(tmp_path):
    suite = bench_gpu.Suite(bench_gpu.dry(torch.device("cpu")), tmp_path / "b.json", 100)

    @bench_gpu.each
    def decode(suite, size):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 84 GiB\nmore")

    decode(suite, "2160p")
    suite.end = 0
    decode(suite, "480p")
    assert [row["reason"] for row in json.loads((tmp_path / "b.json").read_text())["left_out"]] == \
        ["OutOfMemoryError: CUDA out of memory. Tried to allocate 84 GiB", "out of time"]


def test_decode_flops_are_the_published_ones():
    """2.45 PFLOP for 80 frames of 704x1280 (spec dc-ae-v)."""
    per_cell = bench_gpu.cell_flops(bench_gpu.ae.DCAEV, bench_gpu.ae.PRESETS["f32t4c32"])
    assert per_cell * 20 * 22 * 40 == pytest.approx(2.45e15, rel=0.02)


def test_without_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--suite gpu needs a CUDA GPU, and torch finds none: add --dry-run"):
            bench_gpu.run(tmp_path / "b.json")
