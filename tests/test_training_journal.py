"""What a stage's numbers say against it, and the record that outlives a run."""
import json
import re

import pytest
import torch
from PIL import Image

import align
import dit
import flow
from test_align import SIZE, Clips, net, zero_head
from training import journal

GOOD = dict(r2=0.8, norm_ratio=0.7, depth={"embedding": 0.2, "0": 0.3, "24": 0.6}, latent_rms=0.96,
            sigma=[dict(sigma=(0.0, 0.2), loss=0.5, bound=0.9, ratio=0.55), dict(sigma=(0.8, 1.0), loss=0.3, bound=0.5, ratio=0.6)])
ABOVE = [dict(sigma=(0.6, 0.8), loss=1.2, bound=1.0, ratio=1.2)]


@pytest.mark.core
def test_good_numbers_need_no_words():
    assert journal.sentences(dict(stage="1a, assembled", **GOOD)) == journal.sentences(dict(stage="2, LoRA", **GOOD)) == []


@pytest.mark.parametrize("stage, wrong, says", [
    ("1a, assembled", dict(r2=0.1), r"R\^2 is 0.10: .* do not belong together .see pairs.png"),
    ("high-1a, assembled", dict(r2=-3.0), r"R\^2 is -3.00"),
    ("1a, assembled", dict(norm_ratio=0.01), "noise arrives 0.1 times as loudly as in the base"),
    ("1a, assembled", dict(depth={"embedding": 0.3, "0": 1.1, "20": 1.4}), "behind most blocks the features are farther"),
    ("2, LoRA", dict(latent_rms=0.1), "RMS of 0.10 and should have about 1: the autoencoder's scaling factor is wrong"),
    ("1b, head aligned", dict(sigma=ABOVE), "at sigma 0.6-0.8 the loss is no lower than without any transformer"),
])
def test_a_bad_number_is_told_in_a_sentence(stage, wrong, says):
    (said,) = journal.sentences(dict(stage=stage, **GOOD | wrong))
    assert re.search(says, said) and "\n" not in said


@pytest.mark.core
def test_what_is_trained_may_leave_the_base_behind():
    """After stage 1a the embedder is trained for something else; before 1b nothing can
    denoise."""
    assert not journal.sentences(dict(stage="2, LoRA", **GOOD | dict(r2=-1.0, norm_ratio=50.0, depth={"0": 3.0})))
    assert not journal.sentences(dict(stage="1a, assembled", **GOOD | dict(sigma=ABOVE)))


def test_the_record_goes_on_after_an_interruption(tmp_path, capsys):
    video = torch.linspace(-1, 1, 3 * 4 * 8 * 8).view(3, 4, 8, 8)
    book = journal.Journal(tmp_path, base="toy")
    book.add(dict(stage="1a, assembled", seconds=1.0, **GOOD), [video, -video])
    again = journal.Journal(tmp_path, base="toy")
    assert "1a, assembled" in again and "2, LoRA" not in again
    again.add(dict(stage="2, LoRA", seconds=2.0, **GOOD), [video, -video], ["a", "b"])
    again.add(dict(stage="2, LoRA", seconds=3.0, **GOOD | dict(latent_rms=9.0)), [video, -video], ["a", "b"])  # measured anew
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["stage"], row["seconds"], len(row["says"])) for row in report["stages"]] == [("1a, assembled", 1.0, 0), ("2, LoRA", 3.0, 1)]
    assert report["base"] == "toy" and "commit" in report
    assert Image.open(tmp_path / "stages.png").size == (2 * 6 * 10, 2 * 2 * 10 + 16)  # two prompts; two stages of three frames, with a margin
    said = capsys.readouterr().out
    assert "r2 0.8000" in said and "0.0-0.2: 0.500 (0.900)" in said and "! the latents have an RMS of 9.00" in said


# ------------------------------------------------ what is measured


@torch.no_grad()
def test_the_validation_loss_is_the_mean_over_fixed_samples(net):
    """Three batches of 4, 4 and 2: each counts by its samples, and it is the same each
    time."""
    source, times, means = Clips(), flow.Times("released", 8.0), []
    for step, n in enumerate((4, 4, 2)):
        batch = source.batch(step, range(n))
        drawn = flow.draw(batch.z.shape[1:], times, 10_000_019, step, range(n))
        means.append(flow.loss(align.velocity_of(net, batch, "cpu"), batch.z, drawn)[0] * n)
    found = [journal.validation_loss(net, source, times, 10, batch=4) for _ in range(2)]
    assert found[0] == found[1] == pytest.approx(sum(means).item() / 10)


@torch.no_grad()
def test_the_depth_curve_is_zero_for_the_same_model_and_grows_with_the_embedders_error(net):
    """The base against itself; then against itself with a disturbed patch embedder."""
    x, context = torch.randn(3, 12, 2, 4, 4), torch.randn(3, 8, 32)
    curve = journal.depth_curve(net, net, x, x, (context,), [0, 1])
    assert curve == {"embedding": 0, "0": 0, "1": 0}
    other = dit.WanDiT(net.config).eval()
    other.load_state_dict(net.state_dict())
    other.patch_embedding.weight.add_(0.02 * torch.randn_like(other.patch_embedding.weight))
    near = journal.depth_curve(net, other, x, x, (context,), [0, 1])
    other.patch_embedding.weight.add_(0.2 * torch.randn_like(other.patch_embedding.weight))
    far = journal.depth_curve(net, other, x, x, (context,), [1])
    assert list(far) == ["embedding", "1"] and all(0 < near[k] < far[k] for k in far)


@torch.no_grad()
def test_the_depth_curve_pools_the_base_to_the_deep_grid(net):
    """A deep model that sees one token where the base sees four."""
    deep = dit.inherit(net, dit.Config(**SIZE, in_channels=5, out_channels=5, patch=(1, 1, 1)))
    x, u = torch.randn(3, 12, 2, 4, 4), torch.randn(3, 5, 2, 1, 1)
    found = journal.depth_curve(net, deep, x, u, (torch.zeros(3, 8, 32),), [])["embedding"]
    y = net.embed_patches(x).mean(dim=(2, 3), keepdim=True)
    mse, variance = (y - deep.embed_patches(u)).square().mean(), (y - y.mean(dim=(0, 1))).square().mean()
    assert found == pytest.approx((mse / variance).item(), rel=1e-4)


def test_the_bound_per_sigma_is_what_the_best_guess_without_neighbours_reaches():
    """Gaussian latents: E[v | x] is linear in x. At sigma 1 only the latent's own
    variance is left, at sigma 0 that of the noise."""
    spectrum = torch.tensor([0.5, 2.0]).double()
    z, e = torch.randn(2, 200_000).double() * spectrum.sqrt()[:, None], torch.randn(2, 200_000).double()
    for s in (0.1, 0.5, 0.9):
        x, v = (1 - s) * z + s * e, e - z
        slope = (x * v).mean(1, keepdim=True) / x.square().mean(1, keepdim=True)
        assert journal.linear_bound(spectrum, torch.tensor(s)).item() == pytest.approx((v - slope * x).square().mean().item(), rel=0.02)
    assert journal.linear_bound(spectrum, torch.tensor([0.0, 1.0])).tolist() == [1.0, 1.25]


def test_by_sigma():
    mean = journal.by_sigma(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.05, 0.19, 1.0]))
    assert mean[0] == 2 and mean[4] == 5 and all(m != m for m in mean[1:4])


def test_loss_by_sigma_stands_beside_its_bound(net):
    """A regressed head on correlated latents beats what a cell alone tells, a zero head
    does not."""
    source = Clips()
    zero = journal.loss_by_sigma(zero_head(net), source, 4)
    assert [row["sigma"] for row in zero] == [(i / 5, (i + 1) / 5) for i in range(5)]
    assert all(row["ratio"] > 1 for row in zero if row["loss"] == row["loss"])
    align.solve_head(net, source, flow.Times(), batches=8)
    assert sum(row["loss"] for row in journal.loss_by_sigma(net, source, 4)[2:]) < 0.9 * sum(row["loss"] for row in zero[2:])
