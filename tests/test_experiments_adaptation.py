"""The comparison on narrow data: what is narrow about it, the search for each arm's rate,
finished work, verdicts; then the program on tiny models."""
import json
import math
from types import SimpleNamespace

import pytest
import torch

import ae
import dit
import toy
from experiments import adaptation, verdicts
from experiments.adaptation import HELD, Ledger, Preset, Trial
from experiments.verdicts import GROUPS, spread
from files.checkpoint import UserError
from training import toy_base

# ------------------------------------------------------------------------ narrow data


def triple(attributes):
    return tuple(attributes[name] for name in ("shape", "direction", "colour"))


@pytest.mark.core
def test_the_adaptation_sees_a_third_of_the_combinations_and_two_words_never():
    """Every word and every pair of shape and direction is seen, but for the held-out ones."""
    seen = [s.attributes() for s in adaptation.scenes_of("inside", 400, 0)]
    triples = {triple(a) for a in seen}
    sizes = {name: len(words) - (name in HELD) for name, words in toy.WORLD.items()}
    assert len(triples) == sizes["shape"] * sizes["direction"] * sizes["colour"] / 3
    assert len({t[:2] for t in triples}) == sizes["shape"] * sizes["direction"]
    for name, word in HELD.items():
        assert {a[name] for a in seen} == set(toy.WORLD[name]) - {word}
    unseen = [s.attributes() for s in adaptation.scenes_of("combination", 50, 0)]
    assert not triples & {triple(a) for a in unseen}
    assert not any(map(adaptation.holds, unseen))
    words = [adaptation.holds(s.attributes()) for s in adaptation.scenes_of("word", 10, 0)]
    assert words == [{name: word} for name, word in HELD.items()] * 5


# ------------------------------------------------------------------- ledger and search


def test_finished_work_is_not_done_again_and_a_cut_off_line_is_left_out(tmp_path):
    ledger, made = Ledger(tmp_path, dict(steps=3)), []

    def make():
        made.append(1)
        return dict(loss=math.nan)

    ledger.once("trial", make, arm="E", lr=0.002)
    with open(ledger.file, "a") as f:
        f.write('{"key": {"kind": "tri')
    ledger = Ledger(tmp_path, dict(steps=3))
    assert math.isnan(ledger.once("trial", make, arm="E", lr=0.002)["loss"])
    assert len(made) == 1
    ledger.once("trial", make, arm="E", lr=0.004)
    keys = [line["key"] for line in Ledger(tmp_path, dict(steps=3)).lines]
    assert len(made) == 2 and [key.get("lr") for key in keys] == [None, 0.002, 0.004]
    with pytest.raises(UserError, match="other settings, or of another base or autoencoder"):
        Ledger(tmp_path, dict(steps=4))


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Search over made-up arms: the loss of an arm is a parabola in log(lr) around its
    optimum -> (rates, {arm: its trials})."""
    def search(**optima):
        def run(trial):
            loss = math.log(trial.lr / optima[trial.key]) ** 2 if trial.lr < 0.5 else math.nan
            tried[trial.key].append(trial.lr)
            return dict(curve=[dict(inside=loss)])

        tried = {key: [] for key in optima}
        monkeypatch.setattr(Trial, "row", run)
        world = SimpleNamespace(preset=Preset(rates=(2e-3, 4e-3, 8e-3)), out=tmp_path)
        rates = adaptation.search(world, list(optima))
        return rates, {key: sorted(rates) for key, rates in tried.items()}

    return search


def test_the_grid_grows_until_its_best_is_inside_and_all_arms_get_as_many_trials(search):
    rates, trials = search(A=4e-3, B=0.03, C=1.1e-3)
    assert trials["B"] == [2e-3, 4e-3, 8e-3, 0.016, 0.032, 0.064] and rates["B"] == 0.032
    assert {len(t) for t in trials.values()} == {6}
    for key, lr in rates.items():
        assert trials[key][0] < lr < trials[key][-1]
    assert rates["A"] == 4e-3 and rates["C"] == pytest.approx(1e-3, rel=0.2)


def test_a_diverged_trial_is_never_the_best(search):
    rates, trials = search(A=0.4)
    assert max(trials["A"]) > 0.5 and rates["A"] < 0.5


# ----------------------------------------------------------------------------- verdicts


def test_an_arm_is_better_only_where_the_ranges_over_seeds_do_not_touch():
    low, high, wide = map(spread, ([0.1, 0.2], [0.3, 0.4], [0.15, 0.35]))
    assert low == dict(mean=pytest.approx(0.15), low=0.1, high=0.2, seeds=2)
    assert verdicts.against(high, low) == "better"
    assert verdicts.against(low, high) == "worse"
    assert verdicts.against(low, high, higher=False) == "better"
    assert verdicts.against(wide, low) == "undecided (ranges overlap)"
    assert verdicts.against(spread([0.9]), low) == "undecided (one seed)"


def judged(**fits):
    """Claims from made-up results: `fits` gives each arm's fit, for two seeds 0.02 apart."""
    def arm(fit):
        def curve(*values):
            return {step: spread([v - 0.01, v + 0.01]) for step, v in zip("28", values)}

        return dict(
            steps=8, head_steps=2, held=spread([fit - 0.01, fit + 0.01]),
            fit={group: curve(fit / 2, fit) for group in GROUPS},
            loss={group: curve(1 - fit, 1 - fit) for group in GROUPS},
            spikes=0, grad_norm=1.0,
            **{"steps to 95 %": {group: 8 if fit > 0.9 else None for group in GROUPS}})

    one = dict(inside=dict(mse=1.0), seconds=1.0)
    alignments = dict(closed_form=one, sgd_published=one) | {"pass": dict(seconds=0.1)}
    summary = dict(
        passed=["colour"], chance=0.1, base=dict.fromkeys(GROUPS, 0.96), alignments=alignments,
        speed=[{"side": 64, "time ratio": 3.9, "token ratio": 4.0}],
        arms={key: arm(fit) for key, fit in fits.items()})
    rows = verdicts.claims(summary)
    return {(row["claim"], row["text"].split()[0]): row["verdict"] for row in rows}


@pytest.mark.core
def test_verdicts_follow_from_the_numbers():
    found = judged(A=0.2, B=0.5, C=0.5, D=0.6, E=0.95, F=0.95, G=0.95)
    for claim in (("C2", "aligned"), ("C3", "naive"), ("C4", "training"), ("C6", "speed"),
                  ("C7", "the"), ("C8", "the")):
        assert found[claim] in ("supported", "not shown")
    assert found["C4", "training"] == found["C7", "the"] == found["C2", "aligned"] == "supported"
    assert found["C5", "LoRA"] == "supported within the spread of seeds"
    assert found["C1", "after"] == "partly"  # 0.475 of 0.96
    found = judged(A=0.8, B=0.8, C=0.8, D=0.61, E=0.6, F=0.9, G=0.5)
    for claim in (("C4", "training"), ("C5", "LoRA"), ("C8", "closed-form")):
        assert found[claim] == "contradicted"
    assert found["C7", "the"] == "undecided"
    assert found["C2", "aligned"] == "not within this budget"


# --------------------------------------------------------------------- the whole program

TINY = Preset(
    clips=4, held=2, prompts=2, sampling_steps=1, steps=4, head_steps=1, batch=2, warmup=1,
    rank=2, seeds=1, sgd=(3, 2, 2e-3), sgd_published=(5, 2, 2e-3), head_batches=2,
    marks=(0, 1), scored=(1,),
)


@pytest.fixture
def program(tiny_toy, tmp_path, monkeypatch):
    """The command with tiny models, one rate in place of the search, small frames for the
    comparison of speed -> function of further arguments -> its report."""
    def search(world, keys):
        for key in keys:
            Trial(world, key, 2e-3, 0).row()
        return dict.fromkeys(keys, 2e-3)

    speed = adaptation.speed
    monkeypatch.setattr(adaptation, "search", search)
    monkeypatch.setattr(adaptation, "speed", lambda world: speed(world, (1,), 1))
    monkeypatch.setitem(adaptation.PRESETS, "laptop", TINY)
    monkeypatch.setattr(adaptation, "HALF", adaptation.HalfSize(shards=1, steps=1, batch=2))
    monkeypatch.setattr(toy_base, "SHARD", 4)

    def program(*arguments):
        adaptation.main([*arguments, "--out", str(tmp_path)])
        return json.loads((tmp_path / "adaptation.json").read_text())["autoencoders"]

    return program


def test_a_comparison_runs_reports_and_goes_on_where_it_stopped(
        program, tiny_toy, tmp_path, monkeypatch):
    report = program("--arms", "B", "E", "G", "b")["toy"]
    assert set(report["arms"]) == {"B", "E", "G", "b"}
    assert set(report["gate"]["passed"]) == set(toy.WORLD)
    if not report["passed"]:  # a random base knows nothing, so nothing can be inherited
        verdict = {row["claim"]: row["verdict"] for row in report["claims"]}
        assert verdict["C1 to C5, C7"] == "not tested"
    assert {"random", "sgd_published", "sgd", "closed_form"} < set(report["alignments"])
    assert set(report["half size"]) == set(GROUPS)
    assert (tmp_path / "adaptation_toy.png").stat().st_size > 10_000
    assert (tmp_path / "adaptation_toy_videos.png").exists()
    assert "| E AE-Adapt-V " in (tmp_path / "adaptation.md").read_text()
    # both heads are zero at first, so both predict zero; a regressed head makes videos at once
    losses = {key: arm["loss"]["inside"] for key, arm in report["arms"].items()}
    assert losses["B"]["0"] == losses["E"]["0"] != losses["G"]["0"]
    assert list(report["arms"]["G"]["fit"]["inside"]) == ["0", "4"]
    assert list(losses["E"]) == ["0", "1", "4"]
    assert report["arms"]["E"]["trained"] < report["arms"]["B"]["trained"]

    # stage 1b leaves the blocks as they are; then LoRA moves them, as the naive arm does
    base = dit.load(tiny_toy / "toy-base-dit.safetensors").blocks.state_dict()

    def moved(file):
        blocks = dit.load(file).blocks.state_dict()
        return any(not torch.equal(v, base[k].half().float()) for k, v in blocks.items())

    folder = tmp_path / "toy"
    assert not any(map(moved, folder.glob("starts/*/1.safetensors")))
    assert moved(folder / "trials" / "E-0.002-0" / "4.safetensors")
    assert moved(folder / "trials" / "B-0.002-0" / "4.safetensors")

    monkeypatch.setattr(Trial, "run", None)
    monkeypatch.setattr(adaptation.World, "score", None)
    (tmp_path / "adaptation.json").unlink()
    again = program("--arms", "B", "E", "G", "b")["toy"]  # only the report is made again
    assert again["arms"] == report["arms"] and again["claims"] == report["claims"]


def test_deep_autoencoders_side_by_side(program, tiny_toy, tmp_path, monkeypatch):
    for module, name in ((verdicts, "draw"), (adaptation, "show")):
        monkeypatch.setattr(module, name, lambda *args: None)
    config = ae.load(tiny_toy / "toy.safetensors").config
    ae.save(ae.DCAEV(config), tmp_path / "other.safetensors")
    files = [str(tiny_toy / "toy.safetensors"), str(tmp_path / "other.safetensors")]
    report = program("--arms", "G", "b", "--rate", "0.004", "--ae", *files)
    assert set(report) == {"toy", "other"}
    assert {arm["rate"] for s in report.values() for arm in s["arms"].values()} == {0.004}
    losses = [s["arms"]["G"]["loss"]["inside"]["4"] for s in report.values()]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("arguments, sentence", [
    (["--arms", "B", "ab"], "add E to --arms"),
    (["--ae", "a/x.safetensors", "b/x.safetensors"], "the same file name: rename one"),
])
def test_bad_input_is_one_sentence(tmp_path, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        adaptation.main([*arguments, "--out", str(tmp_path)])


def test_another_base_may_be_named(program, tiny_toy, tmp_path, monkeypatch):
    """A base trained longer takes the place of the embedded one, and is told from it."""
    monkeypatch.setattr(adaptation, "compare", lambda *args: [{}])
    for module, name in ((verdicts, "report"), (verdicts, "draw"), (adaptation, "show")):
        monkeypatch.setattr(module, name, lambda *args: None)
    adaptation.main(["--out", str(tmp_path)])
    other = dit.load(tiny_toy / "toy-base-dit.safetensors")
    torch.nn.init.zeros_(other.head.head.weight)
    dit.save(other, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="of another base"):
        adaptation.main(["--out", str(tmp_path), "--base-weights",
                         str(tmp_path / "other.safetensors")])
