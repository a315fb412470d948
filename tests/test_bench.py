"""The suites run and say what they measured; how fast is not a test."""
import gc
import json
import time
import weakref
from dataclasses import replace

import pytest
import torch

import ae
import dit
import kernels
from bench import __main__ as bench, cpu, full, gpu, harness
from files.checkpoint import UserError
from wan import light

CPU = torch.device("cpu")
TINY_AE = ae.Config((0, 8, 8, 8, 8), (0, 1, 1, 1, 1), 4, chunk=8)


# ---------------------------------------------------------------------------- harness


@pytest.mark.core
def test_variants_take_turns_and_medians_count(monkeypatch):
    """The first round warms up; no round begins when patience is at its end."""
    ticks = iter([0, 9, 0, 9, 0, 1, 0, 5, 0, 3, 0, 5, 0, 2, 0, 5])
    monkeypatch.setattr(harness, "now", lambda device: next(ticks))
    order = []
    tasks = {name: lambda name=name: order.append(name) for name in "ab"}
    assert harness.in_turns(tasks, 3) == dict(a=2, b=5)
    assert "".join(order) == "abababab"
    monkeypatch.setattr(harness, "now", lambda device: time.perf_counter())
    slow = lambda: order.append(time.sleep(0.01))
    order.clear()
    assert harness.in_turns({"slow": slow}, 100, patience=0)["slow"] >= 0.01
    assert len(order) == 1


def test_a_report_is_written_after_every_row_and_goes_on_after_failures(tmp_path):
    report = harness.Report(tmp_path / "b.json", budget=100, suite="x")
    report.ceilings = dict(fp32=1e9, bf16=2e9, copy=1e8)

    def part(report, size):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 84 GiB\nmore")

    report.attempt(part, "2160p")
    report.end = 0
    report.attempt(part, "480p")
    report.add("a", {"ours bf16": 2.0, "plain bf16": 3.0}, flops=2e9, bytes=2e8)
    found = json.loads((tmp_path / "b.json").read_text())
    assert {"date", "commit", "torch", "cpu", "suite", "ceilings"} <= found.keys()
    assert found["left_out"] == {
        "part 2160p": "OutOfMemoryError: CUDA out of memory. Tried to allocate 84 GiB",
        "part 480p": "out of time",
    }
    row = found["rows"]["a"]
    assert row["ratio"] == {"ours bf16": 1.0, "plain bf16": 1.5}
    assert row["share_of_ceiling"] == 0.5  # 1 s of products, 1 s of copies in bf16


def test_work_counts_flops_of_the_plain_form_and_bytes_of_the_fast():
    a = torch.ones(8, 16)
    counted = dict(flops=2 * 8 * 8 * 16, bytes=4 * (2 * 8 * 16 + 8 * 8))
    assert harness.work(lambda: a @ a.T) == counted
    assert not kernels.plain()


def test_a_fresh_process_that_fails_says_why():
    output, seconds = harness.fresh_process("-c", "print(6 * 7)")
    assert output.strip() == "42" and seconds > 0
    with pytest.raises(UserError, match="failed: ValueError: no"):
        harness.fresh_process("-c", "raise ValueError('no')")


# ------------------------------------------------------------------------------ suites


@pytest.fixture
def suite(tmp_path):
    """Run a suite from the command line with one repeat -> its report."""
    threads = torch.get_num_threads()

    def run(name):
        bench.main(["--suite", name, "--repeats", "1", "--results", str(tmp_path)])
        return json.loads((tmp_path / f"bench_{name}.json").read_text())

    yield run
    torch.set_num_threads(threads)


@pytest.mark.core
def test_toy_suite(suite, tiny_toy):
    report = suite("toy")
    assert report["tokens"]["base"] == 4 * report["tokens"]["dc"]
    rows = {"transformer pass", "guided loop", "decode", "prompt to pixels"}
    assert report["rows"].keys() == rows
    for row in report["rows"].values():
        assert row["ratio"]["base fp32"] > 0 and row["ratio"]["dc fp32"] == 1


def no_diffusers(net):
    raise ImportError


def test_cpu_suite(suite, tiny_toy, tmp_path, monkeypatch):
    """Every part with networks a thousandth the size; the plain path is switched off again."""
    monkeypatch.setattr(harness, "diffusers_twin", no_diffusers)
    size = dict(dim=24, ffn_dim=32, heads=2, layers=1)
    monkeypatch.setattr(cpu, "SMALL", dit.Config(**size, in_channels=16, out_channels=16))
    monkeypatch.setattr(cpu, "LATENTS", [(4, 4, 4), (4, 8, 8)])
    monkeypatch.setattr(cpu, "DECODES", {"toy": (TINY_AE, (2, 2, 2))})
    monkeypatch.setattr(cpu, "start", dict)
    monkeypatch.setattr(cpu, "training", lambda report, repeats: None)  # only at full size
    measure = harness.Report.measure_ceilings
    monkeypatch.setattr(harness.Report, "measure_ceilings", lambda r, *_: measure(r, 64, 2**12))
    report = suite("cpu")
    rows = report["rows"]
    assert {"transformer, 16 tokens", "transformer, 64 tokens", "decode, toy"} <= rows.keys()
    assert {"toy sampling, dc", "toy sampling, base"} <= rows.keys()
    for row in rows.values():
        found = row["relative_error"]
        assert (found["ours fp32"] if isinstance(found, dict) else found) < 1e-4
    assert report["threads"] == 1 and (tmp_path / "bench_cpu.png").stat().st_size > 5000
    assert not kernels.plain()


def test_light_suite(suite, monkeypatch):
    """The counts are those of every preset; light and full decoder take turns."""
    monkeypatch.setattr(cpu, "LIGHT_SIDES", (32,))
    report = suite("light")
    assert report["counts"]["f32t4c32-light"]["fewer"] > 15
    assert report["counts"]["f32t4c32-light"]["full"]["parameters"] == 1_221_980_428
    assert report["rows"]["decode, small, 32x32"]["ratio"].keys() == {"light fp32", "full fp32"}


def test_decode_flops_are_the_published_ones():
    """2.45 PFLOP for 80 frames of 704x1280 (DC-AE-V, table of autoencoders)."""
    assert gpu.decode_flops(gpu.SPACES[gpu.DEEP], (20, 22, 40)) == pytest.approx(2.45e15, rel=0.02)


@pytest.mark.parametrize("name", [gpu.BASE, gpu.DEEP])
def test_decode_flops_follow_from_small_counts(tiny_gpu, name):
    """Of three chunks and six cells, counted as they are."""
    space = gpu.SPACES[name]
    z = torch.randn(1, space.config.latent_channels, 3 * space.config.latent_chunk, 2, 3)
    with torch.no_grad(), gpu.FlopCounterMode(display=False) as counter:
        list(space.network(space.config).to("meta").decode_stream([z.to("meta")]))
    assert gpu.decode_flops(space, tuple(z.shape[2:])) == counter.get_total_flops()


@pytest.fixture(scope="module")
def tiny_gpu():
    """The GPU suite's networks, sizes and counts, a thousandth as large."""
    tiny = dict(dim=48, heads=2, ffn_dim=96, layers=4, text_dim=32, text_len=16)
    preset, spaces = gpu.WIDTHS["1.3B"], {}
    for name, space in gpu.SPACES.items():
        c = space.config
        if name == gpu.BASE:
            c = replace(c, width=8, decoder_width=8)
        else:
            ones = [1] * (len(c.widths) - 1)
            c = replace(c, widths=(8,) * len(c.widths), depths=(0, *ones), chunk=4)
        spaces[name] = replace(space, config=c)
    constants = dict(
        SPACES=spaces, WIDTHS={"1.3B": preset}, BLOCKS={"1.3B": 2}, FRAMES=4, LONGER=(8,),
        SIZES={"480p": (32, 64), "720p": (64, 64)}, MATMUL=64, COPY=2**12, LONGEST_STEP=1e-5,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dit.PRESETS, preset, replace(dit.PRESETS[preset], **tiny))
        for name, value in constants.items():
            patch.setattr(gpu, name, value)
        patch.setattr(gpu, "in_turns", lambda tasks, *_, **more: harness.in_turns(tasks, 0))
        yield


class Report(harness.Report):
    """Of a processor that multiplies bf16, as the GPU would."""

    def measure_ceilings(self, side, numbers):
        super().measure_ceilings(side, numbers)
        self.ceilings.setdefault("bf16", self.ceilings["fp32"])


@pytest.fixture(scope="module")
def gpu_report(tiny_gpu, tmp_path_factory):
    """The suite walks through its parts on the CPU, without diffusers."""
    out = tmp_path_factory.mktemp("bench") / "b.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "diffusers_twin", no_diffusers)
        gpu.run(Report(out, CPU, budget=570, suite="gpu"))
    assert out.with_suffix(".png").stat().st_size > 10_000
    return json.loads(out.read_text())


def test_every_part_of_the_gpu_suite_runs(gpu_report):
    """Nothing is left out but diffusers, where it is not installed."""
    assert all("requirements-dev" in reason for reason in gpu_report["left_out"].values())
    parts = {name.split(":")[0] for name in gpu_report["rows"] if ":" in name}
    assert parts == {"peers", "loop", "step", "decode"}
    assert len(gpu_report["videos"]) == 8  # two sizes in three spaces, the longer clip in two


@pytest.mark.peer
def test_everybody_computes_the_same(tiny_gpu, tmp_path):
    """Plain path and diffusers on the same weights and inputs."""
    pytest.importorskip("diffusers")
    report = Report(tmp_path / "b.json", CPU)
    report.measure_ceilings(64, 2**12)
    with torch.no_grad():
        blocks = gpu.random_blocks(report, "1.3B")
        gpu.peers(report, "1.3B", gpu.DEEP, "480p", blocks, gpu.Choices(CPU))
    (row,) = report.rows.values()
    assert {"ours bf16", "plain bf16", "diffusers bf16"} == row["relative_error"].keys()
    assert max(row["relative_error"].values()) < 0.02


def test_extrapolation_from_few_blocks(gpu_report):
    """Four equal blocks and two ends, measured as one block: 5 + 30 x 1 from 5 and 6."""
    assert harness.extrapolated(ends=5, some=9, count=4, layers=30) == 35
    row = gpu_report["rows"]["step: 1.3B base f8t4c16, 4 frames 720p"]
    assert row["note"] == f"extrapolated from {row['blocks']} of 4 blocks"


def test_the_gpu_suite_without_a_gpu():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a CUDA GPU, and torch finds none"):
            bench.main(["--suite", "gpu"])


# --------------------------------------------------------------------------- --suite full


@pytest.fixture
def tiny_full(tiny_gpu, monkeypatch):
    """The suite's networks a thousandth as large; of many tokens a block gets 8."""
    monkeypatch.setattr(gpu, "SIZES", {**gpu.SIZES, full.FURTHER: (64, 128)})
    monkeypatch.setattr(full, "MATMUL", 64)
    monkeypatch.setattr(full, "COPY", 2**12)
    monkeypatch.setattr(full, "TILES", (64,))
    few = dict(decoder_widths=(8, 8), decoder_depths=(1, 1), separable=2)
    for preset in light.PRESETS:
        monkeypatch.setitem(light.PRESETS, preset, few)
    monkeypatch.setattr(full, "tokens_at_once", lambda c, shape, *_: min(dit.tokens(c, shape), 8))


def full_suite(folder, *more):
    bench.main(["--suite", "full", "--repeats", "1", "--results", str(folder), *more])
    return json.loads((folder / "bench_full.json").read_text())


def test_the_full_suite_compares_minutes_with_paper_and_operations(tiny_full, tmp_path, capsys):
    """Every row, its parts, the headline with what is extrapolated, table and plot."""
    report = full_suite(tmp_path)
    assert report["rows"].keys() == {"1.3B 480p", "1.3B 720p", "decode"}
    spaces = report["rows"]["1.3B 720p"]["spaces"]
    base, deep = spaces[gpu.BASE], spaces[gpu.DEEP]
    assert (base["tokens_run"], base["tokens"]) == (8, 32) and "half" not in base
    assert deep["tokens_run"] == deep["tokens"] == 4 and deep["half"] > 0
    assert len(deep["blocks"]) == 2 and deep["alike"] >= 1
    lines = {(line["size"], line["space"]): line for line in report["headline"]}
    line = lines["480p", gpu.DEEP]
    seconds = report["rows"]["1.3B 480p"]["seconds"]
    assert line["paper"] == pytest.approx(1.49 / 0.24)
    assert line["ratio"] == pytest.approx(seconds[f"{gpu.BASE} {full.low_type()}"] / seconds[f"{gpu.DEEP} {full.low_type()}"])
    assert line["ratio_with_decode"] > 0 and "extrapolated_from" not in line
    assert lines["2160p", gpu.DEEP]["extrapolated_from"] == "720p"
    assert "1.3B 2160p DC f32t4c32" in capsys.readouterr().out
    assert (tmp_path / "bench_full.png").stat().st_size > 10_000


def test_a_full_suite_goes_on_by_parts(tiny_full, tmp_path, capsys, monkeypatch):
    """Rows that are there are kept; a report of other versions is begun anew."""
    before = full_suite(tmp_path, "--only", "1.3B", "--size", "480p")["rows"]
    assert before.keys() == {"1.3B 480p"}
    after = full_suite(tmp_path, "--only", "decode", "1.3B", "--size", "480p")["rows"]
    assert after.keys() == {"1.3B 480p", "decode"} and after["1.3B 480p"] == before["1.3B 480p"]
    monkeypatch.setattr(harness.checkpoint, "provenance", lambda: dict(commit="other"))
    assert full_suite(tmp_path, "--only", "decode")["rows"].keys() == {"decode"}
    assert "has another commit: it is begun anew" in capsys.readouterr().out


def test_light_decoders_get_a_column(tiny_full, tmp_path):
    """Both deep spaces have one, of fewer operations than the full one; the base has none."""
    report = full_suite(tmp_path, "--size", "480p")
    found = {line["space"] for line in report["headline"] if "ratio_with_light_decode" in line}
    assert found == {gpu.DEEP, gpu.DEEPER}
    flops = {name: row["flops"] for name, row in report["rows"]["decode"]["decoders"].items()}
    assert all(flops[full.light_name(space)] < flops[space] for space in found)


def test_too_little_memory_is_told_before_the_work(tiny_full, tmp_path, monkeypatch):
    monkeypatch.setattr(full.memory, "free_memory", lambda device: 2**16)
    with pytest.raises(UserError, match="row 1.3B 480p needs about .* choose other rows"):
        full_suite(tmp_path)


@torch.no_grad()
def test_a_forward_frees_its_memory_at_once(tiny_full):
    """Not when Python looks for cycles, which may be rows later: 14B at 1080p leaves no room for them."""
    few = replace(gpu.config("1.3B", gpu.BASE), layers=full.BLOCKS)
    forward = full.Forward(gpu.random(lambda: dit.WanDiT(few), CPU, torch.float32), "1.3B", gpu.DEEP, "480p", 2)
    for name in forward.tasks:
        forward.tasks[name]()
    net = weakref.ref(forward.net)
    gc.disable()
    try:
        del forward
        assert net() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_slice_of_the_tokens_is_what_all_of_them_give():
    config = dit.Config(dim=24, ffn_dim=32, heads=2, layers=1, in_channels=4, out_channels=4)
    layer, x, rope = dit.SelfAttention(config), torch.randn(1, 12, 24), dit.rope_table((3, 2, 2), 12, CPU)
    exact = layer(x, rope)
    assert torch.equal(full.Slice(layer)(x, rope), exact)
    assert len(full.random_keys(config, 12, torch.float32)) == 2
    keys = kernels.rms_norm_rope(layer.k(x), layer.norm_k.weight, rope, 2, config.eps)
    part = full.Slice(layer, keys, layer.split(layer.v(x)))
    assert torch.allclose(part(x[:, :5], rope[:5]), exact[:, :5], atol=1e-6)
    assert len(part.times) == 1


@pytest.mark.parametrize("width", gpu.WIDTHS)
def test_the_full_suite_fits_the_memory_and_time_it_promises(width):
    """24 GiB; half an hour on two cores that multiply bf16 at 0.5 TFLOP/s each."""
    rows = full.plan(dict(fp32=7e10, bf16=5e11), only=(width, "decode"))
    assert max(row.bytes for row in rows) < 0.9 * 22 * 2**30


def test_sizes_and_parts_are_for_the_full_suite():
    with pytest.raises(UserError, match="--size says nothing to --suite cpu"):
        bench.main(["--suite", "cpu", "--size", "480p"])
