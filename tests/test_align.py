"""Alignment of embedder and head: pooling, the closed forms and their published SGD
twin, noise, and the diagnostics."""
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import align
import dit
import flow
from align import Moments, Tokens
from files.checkpoint import UserError
from training import loop

PATCHES = (1, 2, 2), (1, 1, 1)
TOKENS = Tokens(PATCHES, latent=(4 * 4, 6), s=2)  # of the pairs below


# ------------------------------------------------ pooling


def test_pooling_averages_the_base_tokens_of_a_deep_token():
    tokens = torch.randn(2, 20, 30, 52, 8)  # 480x832 in the base
    pooled = align.pool(tokens, (20, 15, 26))  # in f32
    assert pooled.shape == (2, 20, 15, 26, 8)
    torch.testing.assert_close(pooled[1, 3, 2, 5], tokens[1, 3, 4:6, 10:12].mean(dim=(0, 1)))
    assert align.pool(tokens[:, :, :28], (20, 7, 13)).shape == (2, 20, 7, 13, 8)  # 448x832 in f64: s = 4


def test_pooling_in_time_where_the_base_has_more_frames():
    tokens = torch.randn(1, 40, 4, 4, 3)
    torch.testing.assert_close(align.pool(tokens, (20, 4, 4))[0, 7, 1, 2], tokens[0, 14:16, 1, 2].mean(dim=0))


@pytest.mark.parametrize("grid", [(20, 14, 26), (20, 15, 13), (20, 60, 104), (12, 15, 26), (40, 15, 26)], ids=str)
def test_grids_that_do_not_divide_by_one_integer_are_refused(grid):
    with pytest.raises(UserError, match="20x30x52 is no integer multiple of the deep one " + "x".join(map(str, grid))):
        align.pool(torch.zeros(1, 20, 30, 52, 1), grid)


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 4)])
def test_an_embedder_is_a_matrix_on_tokens_so_it_commutes_with_pooling(patch):
    x, embedder = torch.randn(2, 3, 4, 8, 16), dit.PatchEmbedder(3, 6, patch)
    tokens = align.tokens_of(x, patch)
    torch.testing.assert_close(F.linear(tokens, embedder.weight.flatten(1), embedder.bias), embedder(x))
    grid = [n // 2 for n in tokens.shape[1:4]]
    pooled = F.linear(align.pool(tokens, grid), embedder.weight.flatten(1), embedder.bias)
    torch.testing.assert_close(pooled, align.pool(embedder(x), grid))


def test_a_clip_with_more_latent_frames_is_averaged_to_the_other():
    teacher, student = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 6, 6, 2, 2)
    x, u = align.pair_tokens(teacher, student, PATCHES)
    assert x.shape == (2 * 2 * 2, 16) and u.shape == (8, 6)
    torch.testing.assert_close(u[0], student[0, :, :3, 0, 0].mean(1))


# ------------------------------------------------ pairs


def linear_pairs(n=24, with_image=0, noise=0.0):
    """Clips whose base latents are exactly linear in the deep ones: every base patch in
    a deep cell is A u + b. The first `with_image` have an
    image condition: four equal mask channels, ones on the first latent frame, and a
    latent. `noise`: what the deep latents do not tell."""
    z = torch.randn(n, 6, 2, 3, 4)
    a, b = torch.randn(16, 6) / 4, torch.randn(16)
    cells = F.linear(rearrange(z, "n c f h w -> n f h w c"), a, b).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # s = 2
    base = rearrange(cells, "n f h w (c p q) -> n c f (h p) (w q)", p=2, q=2)
    base = torch.tanh(base) + noise * torch.randn(base.shape) if noise else base

    def inputs(z):
        condition = torch.zeros(n, 4 + z.shape[1], *z.shape[2:])
        condition[:with_image, :4, 0] = 1
        condition[:with_image, 4:] = torch.randn(with_image, *z.shape[1:])
        return torch.cat([z, condition], dim=1)

    return list(zip(inputs(base), inputs(z)))


@pytest.fixture
def embedder():
    """Of an image-to-video base: 4 latent, 4 mask and 4 condition channels."""
    e = dit.PatchEmbedder(4 + 4 + 4, 16, PATCHES[0])
    nn.init.xavier_uniform_(e.weight.flatten(1).detach())
    return e.requires_grad_(False)


def rows(pairs):
    return (torch.cat(side).double() for side in zip(*(align.pair_tokens(x[None], u[None], PATCHES) for x, u in pairs)))


def by_sgd(pairs, embedder, start, steps, folder):
    """Stage 1a as published, on a training loop."""
    problem = align.Problem(embedder, start, pairs.__getitem__, len(pairs), TOKENS, flow.Times())
    plan = loop.Plan(steps, warmup=0, decay="constant", clip=0.0, save_every=steps)
    return align.sgd(problem, partial(loop.Run, folder, {}, plan=plan), lr=2e-2)


def same(a, b, tolerance=1e-9):
    for mine, other in zip(vars(a).values(), vars(b).values()):
        torch.testing.assert_close(torch.as_tensor(mine).double(), torch.as_tensor(other).double(), rtol=tolerance, atol=tolerance)


# ------------------------------------------------ moments, regression


def test_moments_of_parts_add_up_to_those_of_the_whole():
    """So clips may stream through, or be shared out over processes."""
    pairs = linear_pairs()
    whole = Moments.of(pairs, PATCHES)
    assert whole.n == 24 * 2 * 3 * 4 and whole.xu.shape == (48, 16) and whole.uu.dtype == torch.float64
    same(whole, Moments.of(pairs[:5], PATCHES) + Moments.of(pairs[5:], PATCHES))
    x, u = rows(pairs)
    same(whole, Moments().add(x, u))
    torch.testing.assert_close(whole.centred()[4], u.T.cov(correction=0))
    with pytest.raises(UserError, match="no clips to align with"):
        Moments().centred()


def test_a_teacher_that_is_linear_in_the_student_is_matched(embedder, tmp_path):
    pairs = linear_pairs()
    moments = Moments.of(pairs, PATCHES)
    r2, mse = align.r_squared(moments, embedder, *align.solve_embedding(moments, embedder, ridge=1e-7))
    assert mse < 1e-10 and r2 > 1 - 1e-9
    start = torch.randn(16, 16) / 4, torch.zeros(16)
    r2, _ = align.r_squared(moments, embedder, *by_sgd(pairs, embedder, start, 300, tmp_path))
    assert r2 > 1 - 1e-3  # MSE below a thousandth of the variance
    assert align.r_squared(moments, embedder, *start)[0] < 0


def test_each_way_to_align_by_name(embedder):
    pairs, start = linear_pairs(noise=0.5), (torch.randn(16, 16) / 4, torch.zeros(16))
    problem = align.Problem(embedder, start, pairs.__getitem__, 24, TOKENS, flow.Times(shift=3.0))
    found = {way: align.fit(way, problem) for way in align.CLOSED_FORMS}
    assert found["random"] is start
    r2 = {way: align.r_squared(problem.moments, embedder, *found[way])[0] for way in found}
    assert r2["closed_form"] == max(r2.values()) > r2["ridge_to_init"] > r2["random"]
    with pytest.raises(UserError, match='"svd" is no way to align: use sgd, random, closed_form'):
        align.fit("svd", problem)


@pytest.mark.core
def test_closed_form_is_the_optimum_that_sgd_approaches(embedder, tmp_path):
    pairs = linear_pairs(60, noise=0.5)
    seen, held = Moments.of(pairs[:50], PATCHES), Moments.of(pairs[50:], PATCHES)
    trained = by_sgd(pairs[:50], embedder, (torch.zeros(16, 16), torch.zeros(16)), 200, tmp_path)
    solved = align.solve_embedding(seen, embedder)
    assert align.r_squared(seen, embedder, *solved)[1] <= align.r_squared(seen, embedder, *trained)[1]
    assert align.r_squared(held, embedder, *solved)[1] <= 1.01 * align.r_squared(held, embedder, *trained)[1]
    for weight in (solved[0] + 0.01 * torch.randn(16, 16), 0.99 * solved[0]):
        assert align.r_squared(seen, embedder, weight, solved[1])[1] > align.r_squared(seen, embedder, *solved)[1]


def test_the_mask_channels_are_equal_and_the_ridge_shares_them_out(embedder):
    """Image conditions make the covariance singular (spec 3.4)."""
    moments = Moments.of(linear_pairs(with_image=10), PATCHES)
    assert torch.linalg.matrix_rank(moments.centred()[4]) < 16
    for weight, bias in (align.solve_embedding(moments, embedder), align.solve_noised(moments, embedder, TOKENS, flow.Times())):
        assert torch.isfinite(weight).all() and weight.abs().max() < 10
        torch.testing.assert_close(weight[:, 6:10], weight[:, 6:7].expand(-1, 4), rtol=0, atol=1e-4)


def test_ridge_to_init_goes_from_the_plain_solution_to_the_initialisation(embedder):
    moments, init = Moments.of(linear_pairs(noise=0.5), PATCHES), torch.randn(16, 16, 1, 1, 1)
    mean_x, mean_u, *_, cov = moments.centred()
    seen = cov.diagonal() > 0  # the condition channels are always zero here
    plain, none, all_of_it = align.solve_embedding(moments, embedder, 1e-9), *(align.solve_embedding(moments, embedder, r, init) for r in (1e-9, 1e9))
    torch.testing.assert_close(none[0][:, seen], plain[0][:, seen])
    torch.testing.assert_close(all_of_it[0], init.flatten(1))
    # directions that the clean latents never take: closed by the plain solution, left open by this one
    assert not plain[0][:, ~seen].any() and torch.equal(none[0][:, ~seen], init.flatten(1)[:, ~seen])
    W, b = align.matrix(embedder)
    for weight, bias in (plain, none, all_of_it):  # the bias sets the mean right, whatever the weight
        torch.testing.assert_close(weight.double() @ mean_u + bias, W @ mean_x + b, rtol=0, atol=1e-5)
    errors = [align.r_squared(moments, embedder, *align.solve_embedding(moments, embedder, r, init))[1] for r in (1e-6, 1e-2, 1, 100)]
    assert errors == sorted(errors)


# ------------------------------------------------ noise


def test_the_coupled_noise_of_the_base_is_white_with_the_variance_of_a_mean(embedder):
    """C C' = I / s^2 where deep patches hold as many numbers; where they hold fewer, as
    here, C' C is: all of the student's noise arrives."""
    moments = Moments.of(linear_pairs(noise=0.5), PATCHES)
    lift = align.coupling(moments, embedder, TOKENS)
    torch.testing.assert_close(lift.T @ lift, torch.eye(6, dtype=torch.float64) / 4)
    W, _ = align.matrix(embedder)
    response = W[:, :16] @ lift  # the base's answer to noise: of all couplings, the closest to its answer to data
    target = (W @ moments.centred()[3])[:, :6]
    for _ in range(5):
        other = torch.linalg.qr(torch.randn(16, 6).double())[0] / 2
        assert (W[:, :16] @ other * target).sum() < (response * target).sum()


@pytest.mark.parametrize("mode", ["shifted", "released"])
def test_moments_with_noise_are_those_of_noised_pairs(mode):
    """The closed form against a million drawn noises: mask and condition stay clean,
    latents and noise are mixed at each noise level."""
    torch.manual_seed(3)
    x, u = rows(linear_pairs(4, with_image=2))
    lift = torch.linalg.qr(torch.randn(16, 6).double())[0] / 2
    expected = align.noised(Moments().add(x, u), lift, TOKENS, flow.Times(mode, 3.0))
    drawn, weights, generator = Moments(), 0.0, torch.Generator().manual_seed(1)
    noises, levels = torch.randn(500, len(u), 6, generator=generator).double(), flow.sample_times(500, flow.Times(mode, 3.0), generator)
    for e, sigma, weight in zip(noises, *(levels[i].double() for i in (0, 2))):
        rest = torch.eye(16).double() / 4 - lift @ lift.T  # what the student's noise leaves open, so that the base's is white
        more = torch.randn(len(u), 16, generator=generator).double() @ torch.linalg.cholesky(rest + 1e-9 * torch.eye(16)).T
        a, b = x.clone(), u.clone()
        a[:, :16] = (1 - sigma) * x[:, :16] + sigma * (e @ lift.T + more)
        b[:, :6] = (1 - sigma) * u[:, :6] + sigma * e
        m = Moments().add(a, b)
        drawn, weights = drawn + Moments(*(weight * v for v in vars(m).values())), weights + weight
    for name in ("x", "u", "xx", "xu", "uu"):
        torch.testing.assert_close(getattr(drawn, name) / weights / len(u), getattr(expected, name) / len(u), rtol=0.05, atol=0.05)


def test_noise_awareness_is_a_ridge_towards_the_coupled_embedder(embedder):
    """Text-to-video, zero means: the docstring's formula."""
    x, u = rows(linear_pairs(noise=0.5))
    x, u = x - x.mean(0), u - u.mean(0)
    moments = Moments().add(x[:, :16], u[:, :6])
    t2v = SimpleNamespace(weight=embedder.weight[:, :4], bias=embedder.bias)
    sigma = flow.sample_times(100_000, flow.Times(shift=3.0), torch.Generator().manual_seed(0))[0].double()
    l = sigma.square().mean() / (1 - sigma).square().mean()
    assert l == pytest.approx(3, rel=0.01)  # the shift
    W, C, (*_, xu, uu) = align.matrix(t2v)[0], align.coupling(moments, t2v, TOKENS), moments.centred()
    expected = torch.linalg.solve(uu + l * torch.eye(6), (W @ xu + l * W @ C).T).T
    torch.testing.assert_close(align.solve_noised(moments, t2v, TOKENS, flow.Times(shift=3.0), ridge=1e-9)[0], expected.float(), rtol=1e-4, atol=1e-5)


def test_noise_aware_alignment_answers_to_noise_as_the_base_does(embedder):
    """A deep channel that clean latents never use: the plain solve closes it, the
    noise-aware one leaves it as open as the others."""
    pairs = [(x, torch.cat([u[:5], 0 * u[5:6], u[6:]])) for x, u in linear_pairs(60, noise=0.5)]
    moments = Moments.of(pairs, PATCHES)
    plain, aware = align.solve_embedding(moments, embedder)[0], align.solve_noised(moments, embedder, TOKENS, flow.Times())[0]
    assert plain[:, 5].norm() < 1e-3 < 0.1 < aware[:, 5].norm()
    assert align.r_squared(moments, embedder, aware, torch.zeros(16))[1] > 0


def test_r_squared_is_1_for_a_perfect_and_0_for_a_constant_embedder_and_equals_the_definition(embedder):
    x, u = rows(linear_pairs(noise=0.5))
    weight, bias = align.matrix(embedder)
    itself = Moments().add(x, x)
    assert align.r_squared(itself, embedder, weight, bias)[0] == pytest.approx(1)
    mean = F.linear(x.mean(0), weight, bias)
    r2, mse = align.r_squared(itself, embedder, torch.zeros_like(weight), mean)
    assert r2 == pytest.approx(0, abs=1e-6) and mse > 0
    other = torch.randn(16, 16).double(), torch.randn(16).double()
    y, made = F.linear(x, weight, bias), F.linear(u, *other)
    r2, mse = align.r_squared(Moments().add(x, u), embedder, *other)
    assert mse == pytest.approx((y - made).square().mean().item())
    assert r2 == pytest.approx(1 - mse / (y - y.mean(0)).square().mean().item())


def test_norm_ratio_is_1_where_noise_arrives_as_loudly_as_in_the_base():
    """A deep latent that only rearranges the base's: its ideal embedder averages the
    four it replaces, and noise with them."""
    base, tokens = dit.PatchEmbedder(3, 8, (1, 1, 1)), Tokens(((1, 1, 1),) * 2, (3, 12), s=2)
    weight = (base.weight.flatten(1)[:, :, None] / 4).expand(-1, -1, 4).flatten(1)
    assert align.norm_ratio(weight, base, tokens) == pytest.approx(1)
    assert align.norm_ratio(0.1 * weight, base, tokens) == pytest.approx(0.01)
    assert align.norm_ratio(F.pad(weight, (0, 5), value=9.0), base, tokens) == pytest.approx(1)  # mask and condition see no noise


# ------------------------------------------------ transformers

SIZE = dict(dim=24, ffn_dim=32, heads=2, layers=2, text_dim=32, text_len=8)


class Clips:
    """A source of random clips that are correlated within and between cells, as real
    ones are."""

    def __init__(self, n=16, channels=4, condition=8):
        self.z = torch.randn(n, channels, 1, 1, 1) + 0.3 * torch.randn(n, channels, 2, 4, 4)
        self.condition = condition and torch.zeros(n, condition, 2, 4, 4)

    def batch(self, step, positions):
        i = [(7 * step + p) % len(self.z) for p in positions]
        return SimpleNamespace(z=self.z[i], condition=self.condition[i] if torch.is_tensor(self.condition) else None, prompt=(torch.zeros(len(i), 8, 32),))


@pytest.fixture
def net():
    net = dit.WanDiT(dit.Config(**SIZE, in_channels=12, out_channels=4)).eval()
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return net


def zero_head(net):
    for p in net.head.head.parameters():
        nn.init.zeros_(p)
    return net


@torch.no_grad()
def mean_loss(net, source):
    clips = source.batch(0, range(32))
    drawn = flow.draw(clips.z.shape[1:], flow.Times(), 99, 0, range(32))
    return flow.loss(align.velocity_of(net, clips, "cpu"), clips.z, drawn)[0].item()


@pytest.mark.core
def test_a_regressed_head_starts_below_a_zero_head(net):
    source = Clips()
    before = mean_loss(zero_head(net), source)
    align.solve_head(net, source, flow.Times(), batches=4, batch=32)
    assert mean_loss(net, source) < 0.8 * before


@torch.no_grad()
@pytest.mark.parametrize("mode", ["shifted", "released"])
def test_the_regressed_head_is_the_weighted_least_squares_solution(net, monkeypatch, mode):
    """No other linear map from the features that enter the head fits the weighted
    velocities of these batches better."""
    features, drawn, draw, source = [], [], flow.draw, Clips()
    net.head.head.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    monkeypatch.setattr(flow, "draw", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    align.solve_head(net, source, flow.Times(mode), batches=3, batch=16, ridge=1e-9)

    z = [source.batch(step, range(16)).z for step in range(3)]
    u, w = torch.cat(features), torch.cat([d.weight for d in drawn])[:, None, None]
    v = torch.cat([flow.velocity_target(z, d.noise) for z, d in zip(z, drawn)])
    v = rearrange(v, "b c f (h p) (w q) -> b (f h w) (p q c)", p=2, q=2)
    error = lambda y: (w * (y - v).square()).mean()
    ours = error(net.head.head(u))
    root = w.sqrt().double()
    best = torch.linalg.lstsq((root * F.pad(u, (0, 1), value=1).double()).flatten(0, 1), (root * v).flatten(0, 1)).solution.float()
    assert ours == pytest.approx(error(u @ best[:-1] + best[-1]).item(), rel=1e-4)
    for _ in range(3):
        assert error(F.linear(u, net.head.head.weight + 0.01 * torch.randn_like(net.head.head.weight), net.head.head.bias)) > ours
