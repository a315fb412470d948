"""The comparison of arms on narrow data: what is narrow about it, the search for each arm's rate, the ledger, verdicts; then the program on tiny models."""
import json
import math
from dataclasses import replace

import pytest
import torch

import dit
import toy
from experiments import arms, claims, compare_adapt
from experiments.arms import ARMS, GROUPS, HELD
from experiments.compare_adapt import Ledger
from files import checkpoint
from files.checkpoint import UserError

# ---------------------------------------------------------------------------------------------------- narrow data


def test_the_adaptation_sees_a_third_of_the_combinations_and_two_words_never():
    seen = [s.attributes() for s in arms.scenes_of("inside", 400, 0)]
    triples = {(a["shape"], a["direction"], a["colour"]) for a in seen}
    assert len(triples) == 4 * 3 * 5 / 3  # of the words that are not held out, a third of the combinations
    for name, word in HELD.items():
        assert {a[name] for a in seen} == set(toy.WORLD[name]) - {word}  # every other word
    assert {(s, d) for s, d, _ in triples} == {(s, d) for s in toy.WORLD["shape"] for d in toy.WORLD["direction"] if d != HELD["direction"]}  # and every pair
    unseen = [s.attributes() for s in arms.scenes_of("combination", 50, 0)]
    assert not triples & {(a["shape"], a["direction"], a["colour"]) for a in unseen} and not any(map(arms.holds, unseen))
    words = [arms.holds(s.attributes()) for s in arms.scenes_of("word", 10, 0)]
    assert words == [{name: HELD[name]} for _ in range(5) for name in HELD]


def test_the_null_word_is_a_word_that_no_prompt_uses():
    text, plain = arms.NullWord(), toy.ToyText()
    prompts = [s.attributes() for s in arms.scenes_of("inside", 3, 0)]
    assert torch.equal(text.encode([*prompts, {}])[:3], plain.encode(prompts))
    assert torch.equal(text.encode([{}]), text.null(1)) and text.null(1).count_nonzero() == 1
    everything = plain.encode([dict(zip(toy.WORLD, words)) for words in zip(*(v * 6 for v in toy.WORLD.values()))])
    assert not (everything * text.null(1)).any()


# ---------------------------------------------------------------------------------------------------- ledger and search


def test_finished_work_is_not_done_again_and_a_cut_off_line_is_left_out(tmp_path):
    ledger, made = Ledger(tmp_path, dict(steps=3)), []
    make = lambda: made.append(1) or dict(loss=math.nan)
    assert math.isnan(ledger.once("trial", make, arm="E", lr=0.002)["loss"])
    with open(ledger.file, "a") as f:
        f.write('{"key": {"kind": "tri')
    ledger = Ledger(tmp_path, dict(steps=3))
    assert math.isnan(ledger.once("trial", make, arm="E", lr=0.002)["loss"]) and len(made) == 1
    ledger.once("trial", make, arm="E", lr=0.004)
    assert len(made) == 2 and len(ledger.all("trial", arm="E")) == 2 and not ledger.all("trial", arm="A")
    assert len(Ledger(tmp_path, dict(steps=3)).all("trial")) == 2  # the line after the cut-off one is whole
    with pytest.raises(UserError, match="other settings, or on another base: use the same ones, or another --out"):
        Ledger(tmp_path, dict(steps=4))


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Search over made-up arms: the loss of arm k is a parabola in log(lr) around its optimum -> (rates, {arm: trials})."""
    def search(**optima):
        def run(world, key, lr, seed):
            loss = math.log(lr / optima[key]) ** 2 if lr < 0.5 else math.nan
            return dict(arm=key, lr=lr, seed=seed, curve=[dict(inside=0.0), dict(inside=loss)])
        monkeypatch.setattr(compare_adapt, "run", run)
        world = type("World", (), dict(preset=arms.Preset(rates=(2e-3, 4e-3, 8e-3))))
        ledger = Ledger(tmp_path, {})
        rates = compare_adapt.search(world, ledger, list(optima))
        return rates, {k: sorted(r["lr"] for r in ledger.all("trial", arm=k)) for k in optima}
    return search


def test_the_grid_grows_until_its_best_is_not_at_the_edge_and_all_arms_get_as_many_trials(search):
    rates, trials = search(A=4e-3, B=0.03, C=1.1e-3)
    assert trials["B"] == [2e-3, 4e-3, 8e-3, 0.016, 0.032, 0.064] and rates["B"] == 0.032
    assert {len(t) for t in trials.values()} == {6}
    for key, lr in rates.items():
        assert trials[key][0] < lr < trials[key][-1]
    assert rates["A"] == 4e-3 and rates["C"] == pytest.approx(1e-3, rel=0.2)


def test_a_diverged_trial_is_never_the_best(search):
    rates, trials = search(A=0.4)
    assert max(trials["A"]) > 0.5 and rates["A"] < 0.5


# ---------------------------------------------------------------------------------------------------- verdicts


def test_an_arm_is_better_only_where_the_ranges_over_seeds_do_not_touch():
    low, high, wide = claims.spread([0.1, 0.2]), claims.spread([0.3, 0.4]), claims.spread([0.15, 0.35])
    assert low == dict(mean=pytest.approx(0.15), low=0.1, high=0.2, seeds=2)
    assert claims.against(high, low) == "better" and claims.against(low, high) == "worse"
    assert claims.against(low, high, higher=False) == "better"
    assert claims.against(wide, low) == "undecided (ranges overlap)"
    assert claims.against(claims.spread([0.9]), low) == "undecided (one seed)"


def verdicts(tmp_path, **fits):
    """Claims from made-up results: `fits` gives each arm's fit in every group, for two seeds 0.02 apart."""
    world = type("World", (), dict(preset=replace(arms.Preset(), steps=8, head_steps=2)))
    ledger = Ledger(tmp_path, {})
    numbers = {"mse inside": 1.0, "seconds": 1.0}
    ledger.once("alignments", lambda: dict(closed_form={**numbers, "seconds": 0.001}, sgd_published=numbers))
    ledger.once("moments", lambda: 0.001)
    ledger.once("speed", lambda: [{"side": 64, "time ratio": 3.9, "token ratio": 4.0}])
    spread = lambda v: dict(mean=v, low=v - 0.01, high=v + 0.01, seeds=2)
    arm = lambda v: dict(fit={g: {"2": spread(v / 2), "8": spread(v)} for g in GROUPS}, held={"8": spread(v)}, loss={g: {"2": spread(1 - v), "8": spread(1 - v)} for g in GROUPS},
                         spikes=0, grad_norm=1.0, trained=1, steps=8, **{"steps to 95 %": {g: 8 if v > 0.9 else None for g in GROUPS}})
    summary = dict(passed=["colour"], chance=0.1, base=dict.fromkeys(GROUPS, 0.96), arms={k: arm(v) for k, v in fits.items()})
    return {(c["claim"], c["text"].split()[0]): c["verdict"] for c in claims.claims(world, ledger, summary)}


def test_verdicts_follow_from_the_numbers(tmp_path):
    found = verdicts(tmp_path, A=0.2, B=0.5, C=0.5, D=0.6, E=0.95, F=0.95, G=0.95)
    assert found["C2", "aligned"] == found["C3", "naive"] == found["C4", "training"] == found["C7", "the"] == "supported"
    assert found["C5", "LoRA"] == "supported within the spread of seeds" and found["C6", "speed"] == found["C8", "the"] == "supported"
    assert found["C1", "after"] == "partly"  # 0.475 of 0.96
    found = verdicts(tmp_path, A=0.8, B=0.8, C=0.8, D=0.61, E=0.6, F=0.9, G=0.5)
    assert found["C3", "naive"] == found["C4", "training"] == found["C5", "LoRA"] == found["C8", "closed-form"] == "contradicted"
    assert found["C7", "the"] == "undecided" and found["C2", "aligned"] == "not within this budget"


# ---------------------------------------------------------------------------------------------------- the whole program

TINY = replace(arms.PRESETS["smoke"], clips=4, held=2, prompts=(1, 1, 2), sampling_steps=1)


@pytest.fixture
def one_rate(monkeypatch):
    """One trial per arm in place of the search."""
    def search(world, ledger, keys):
        for key in keys:
            ledger.once("trial", lambda: compare_adapt.run(world, key, 2e-3, 0), arm=key, lr=2e-3, seed=0)
        return dict.fromkeys(keys, 2e-3)
    monkeypatch.setattr(compare_adapt, "search", search)


def test_a_comparison_runs_reports_and_goes_on_where_it_stopped(tiny_toy, one_rate, tmp_path, monkeypatch):
    monkeypatch.setitem(compare_adapt.PRESETS, "smoke", TINY)
    out, results = tmp_path / "out", tmp_path / "results"
    command = ["--preset", "smoke", "--arms", "B", "E", "d", "--out", str(out), "--results", str(results)]
    compare_adapt.main(command)
    report = json.loads((results / "compare_adapt.json").read_text())
    assert set(report["arms"]) == {"B", "E", "d"} and report["arms"]["d"]["rate"] == report["arms"]["E"]["rate"]
    assert set(report["gate"]["passed"]) == set(toy.WORLD)  # a random base knows nothing
    assert report["passed"] == [] and {c["claim"]: c["verdict"] for c in report["claims"]}["C1 to C5, C7"] == "not tested"  # so nothing can be inherited
    assert set(report["alignments"]) == {"random", "sgd_published", "sgd", "closed_form", "ridge_to_init", "noise_aware"}
    assert (results / "compare_adapt.png").stat().st_size > 10_000 and (results / "compare_adapt_videos.png").exists()
    assert "| E AE-Adapt-V |" in (out / "compare_adapt.md").read_text()

    # in stage 1b the blocks are the base's; afterwards LoRA moves them, as the naive arm does all along (but for its first step: the head is zero)
    base, state = (dit.load(tiny_toy / "toy-base-dit.safetensors").blocks.state_dict(), lambda key, step: dit.load(
        arms.weights_file(out, dict(arm=key, lr=report["arms"][key]["rate"], seed=0), step)).blocks.state_dict())
    same = lambda other: all(torch.equal(v, base[k].half().float()) for k, v in other.items())
    assert same(state("E", 1)) and not same(state("E", 4)) and not same(state("B", 4))
    assert report["arms"]["E"]["trained"] < report["arms"]["B"]["trained"] == sum(p.numel() for p in dit.WanDiT(dit.PRESETS["toy-dc"]).parameters())
    first = {row["arm"]: row["curve"] for row in report["trials"]}
    assert [c["step"] for c in first["E"]] == [0, 1, 4] and first["B"][0] == first["E"][0]  # both predict zero at first

    monkeypatch.setattr(compare_adapt, "run", None)
    monkeypatch.setattr(compare_adapt.World, "score", None)
    (results / "compare_adapt.json").unlink()
    compare_adapt.main(command)  # nothing is made again but the report
    again = json.loads((results / "compare_adapt.json").read_text())
    assert again["arms"] == report["arms"] and again["claims"] == report["claims"]


def test_options_need_the_arm_whose_rate_they_take(tmp_path):
    with pytest.raises(UserError, match="add E to --arms"):
        compare_adapt.main(["--arms", "B", "a1", "--out", str(tmp_path)])


def test_another_base_may_be_named(tiny_toy, tmp_path, monkeypatch):
    """A base trained longer takes the place of the embedded one, and is told from it."""
    monkeypatch.setattr(compare_adapt, "compare", lambda *args: None)
    monkeypatch.setitem(compare_adapt.PRESETS, "smoke", TINY)
    command = ["--preset", "smoke", "--out", str(tmp_path / "out")]
    compare_adapt.main(command)
    other = dit.load(tiny_toy / "toy-base-dit.safetensors")
    torch.nn.init.zeros_(other.head.head.weight)
    dit.save(other, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="on another base"):
        compare_adapt.main([*command, "--base-weights", str(tmp_path / "other.safetensors")])
