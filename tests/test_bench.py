"""The benchmark runs and says what it measured; how fast is not a test."""
import json

import bench
import sample


def test_toy_suite(tmp_path, monkeypatch):
    monkeypatch.setattr(sample.Model, "steps", 2)
    bench.main(["--repeats", "1", "--out", str(tmp_path / "b.json")])
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["tokens"] == {"base": 128, "dc": 32}
    assert set(report["median_seconds"]) == {"transformer pass", "guided loop", "decode", "prompt to pixels"}
    for row in report["median_seconds"].values():
        assert row["ratio"] == row["base"] / row["dc"] > 0
    assert {"date", "commit", "cpu", "torch", "threads"} <= report.keys()
