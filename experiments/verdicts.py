"""Verdicts on the paper's claims C1 to C8, computed from the summaries of adaptation.py.

One arm is "better" than another only where their ranges over the seeds do not touch. Two
arms are compared in four ways: fit on seen combinations, on unseen ones, how often an
unseen word comes out right, and validation loss. A claim is supported if at least one
says so and none the opposite, contradicted the other way round, "mixed" if both happen.

The fit is the mean accuracy over the attributes that passed the gate. What cannot be read
from a video counts as wrong, so a fit below chance means that there is no object to see.
"""
import statistics
from dataclasses import dataclass

from files import checkpoint, video
from training.metrics import markdown

GROUPS = ("inside", "combination", "word")  # of prompts

# ---------------------------------------------------------------------------- comparing


def spread(values):
    """Mean and range over seeds."""
    values = list(values)
    return dict(mean=statistics.fmean(values), low=min(values), high=max(values),
                seeds=len(values))


def against(x, y, higher=True):
    """How x compares with y: "better" or "worse" where their ranges do not touch."""
    if min(x["seeds"], y["seeds"]) < 2:
        return "undecided (one seed)"
    if not higher:
        x, y = y, x
    if x["low"] > y["high"]:
        return "better"
    return "worse" if x["high"] < y["low"] else "undecided (ranges overlap)"


# --------------------------------------------------------------------------- the claims


@dataclass(frozen=True)
class Duel:
    """A claim that arm a is better than arm b at equal steps."""

    claim: str
    text: str
    a: str
    b: str
    tie: str = "undecided"


DUELS = [
    Duel("C3", "naive full fine-tuning is worse than AE-Adapt-V at equal steps", "E", "B"),
    Duel("C3", "naive LoRA is worse than AE-Adapt-V at equal steps", "E", "C"),
    Duel("C4", "training from scratch is behind at equal steps", "E", "A"),
    Duel("C5", "LoRA loses nothing against full fine-tuning", "E", "F",
         tie="supported within the spread of seeds"),
    Duel("C7", "the MSE stage matters beyond training the ends", "E", "D"),
    Duel("C8", "closed-form ends and half of 1b do as well as AE-Adapt-V or better", "G", "E"),
]


def judge(duel, arms):
    """Four comparisons: fit on seen combinations and on unseen ones, how often an unseen
    word is right, validation loss. Supported if at least one says so and none the opposite."""
    (fit_a, held_a, loss_a), (fit_b, held_b, loss_b) = ends(arms[duel.a]), ends(arms[duel.b])
    votes, numbers = [], []
    for what, a, b in (("inside", fit_a["inside"], fit_b["inside"]),
                       ("combination", fit_a["combination"], fit_b["combination"]),
                       ("unseen words", held_a, held_b)):
        votes.append(against(a, b))
        numbers.append(f"{what} {duel.a} {shown(a)}, {duel.b} {shown(b)}: {votes[-1]}")
    votes.append(against(loss_a, loss_b, higher=False))
    numbers.append(f"loss inside: {votes[-1]}")
    verdict = duel.tie
    if "better" in votes and "worse" in votes:
        verdict = "mixed"
    elif "better" in votes:
        verdict = "supported"
    elif "worse" in votes:
        verdict = "contradicted"
    return dict(claim=duel.claim, text=duel.text, numbers="; ".join(numbers), verdict=verdict)


def ends(arm):
    """({group: fit}, how often the unseen word is right, loss inside) after all steps."""
    last = str(arm["steps"])
    fits = {group: arm["fit"][group][last] for group in GROUPS}
    return fits, arm["held"], arm["loss"]["inside"][last]


def shown(found):
    if found is None:
        return "-"
    if found["seeds"] == 1:
        return f"{found['mean']:.2f}"
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def claims(s):
    """The paper's claims, each with its numbers and the verdict that follows from them."""
    rows, arms = [], s["arms"]
    if not s["passed"]:
        rows.append(dict(claim="C1 to C5, C7", text="all that compares fits", verdict="not tested",
                         numbers="no attribute passed the gate: there is nothing to inherit"))
        arms = {}
    duels = list(DUELS)
    for key in filter(str.islower, arms):  # options of E
        text = f"E with {arms[key]['title']} is better than E"
        duels.append(Duel(f"option {key}", text, key, "E"))
    rows += [judge(duel, arms) for duel in duels if {duel.a, duel.b} <= arms.keys()]
    if "E" in arms:
        rows += [right_after_alignment(s), small_fraction(s)]
    if {"B", "E"} <= arms.keys():
        rows.append(less_stable(arms))
    rows += [follows_tokens(s["speed"]), equals_sgd(s["alignments"])]
    return sorted(rows, key=lambda row: row["claim"])


def right_after_alignment(s):
    arm = s["arms"]["E"]
    after, chance, base = arm["fit"]["inside"][str(arm["head_steps"])], s["chance"], s["base"]
    share = max(0, after["mean"] - chance) / (base["inside"] - chance)
    verdict = "not shown"
    if share >= 0.25:
        verdict = "supported" if share >= 0.75 else "partly"
    return dict(
        claim="C1", verdict=verdict,
        text="after alignment the frozen backbone already generates the right content",
        numbers=f"E after 1b {shown(after)}, chance {chance:.2f}, base {base['inside']:.2f}: "
                f"{share:.0%} of the way")


def small_fraction(s):
    reached, numbers = s["arms"]["E"]["steps to 95 %"], []
    for group, step in reached.items():
        share = ends(s["arms"]["E"])[0][group]["mean"] / s["base"][group]
        numbers.append(f"{group}: step {step}" if step else f"{group}: {share:.0%} at the end")
    verdict = "supported" if all(reached.values()) else "not within this budget"
    if any(reached.values()) and not all(reached.values()):
        verdict = "partly"
    return dict(claim="C2", numbers=", ".join(numbers), verdict=verdict,
                text="aligned + LoRA reaches 95 % of the base in a small fraction of its training")


def less_stable(arms):
    rose, numbers = [], []
    for key in "BE":
        losses = [found["mean"] for found in arms[key]["loss"]["inside"].values()]
        if losses[-1] > 1.1 * min(losses):
            rose.append(key)
        numbers.append(f"{key}: {arms[key]['spikes']} spikes of the loss, largest gradient norm "
                       f"{arms[key]['grad_norm']:.1f}")
    numbers.append(f"loss rose again: {', '.join(rose) or 'none'}")
    unstable = "B" in rose or arms["B"]["spikes"] > arms["E"]["spikes"]
    return dict(claim="C3", text="naive full fine-tuning is less stable",
                numbers="; ".join(numbers), verdict="supported" if unstable else "not shown")


def follows_tokens(rows):
    reach, told = [], []
    for row in rows:
        tokens, time = row["token ratio"], row["time ratio"]
        reach.append(time / tokens)
        told.append(f"{row['side']} px: tokens {tokens:.1f}x, time {time:.1f}x")
    verdict = "not shown"
    if max(reach) >= 0.9:
        verdict = "supported" if min(reach) >= 0.9 else "partly"
    return dict(claim="C6", text="speed follows the token ratio", numbers="; ".join(told),
                verdict=verdict)


def equals_sgd(rows):
    solved, sgd = rows["closed_form"], rows["sgd_published"]
    ratio = solved["inside"]["mse"] / sgd["inside"]["mse"]
    solve = solved["seconds"] / sgd["seconds"]
    both = solve + rows["pass"]["seconds"] / sgd["seconds"]
    return dict(claim="C8", text="the closed form equals converged SGD",
                numbers=f"held-out MSE {ratio:.4f} of SGD's; the solve takes {solve:.2g} of its "
                        f"time, with the pass over the clips {both:.2g}",
                verdict="supported" if ratio <= 1.01 else "contradicted")


# ------------------------------------------------------------------------------ report


def report(found, results):
    """{autoencoder: summary} -> adaptation.json and .md in `results`."""
    text = dict(**checkpoint.provenance(), autoencoders=found)
    checkpoint.write_json(results / "adaptation.json", text)
    lines = []
    for name, s in found.items():
        claims = [["claim", "numbers", "verdict"]]
        for row in s["claims"]:
            claims.append([f"{row['claim']}: {row['text']}", row["numbers"],
                           f"**{row['verdict']}**"])
        lines += [f"## {name}", "", markdown(table(s)), "", markdown(claims), ""]
    with checkpoint.atomic_path(results / "adaptation.md") as tmp:
        tmp.write_text("\n".join(lines))


COLUMNS = ("arm", "rate", "fit inside after 1a", "after 1b", "at the end", "combination", "word",
           "unseen word", "shape", "loss after 1a", "after 1b", "at the end", "95 % of base, steps",
           "trained", "s")


def table(s):
    """Rows of cells: every arm, the base, the base at half size."""
    rows = [COLUMNS]
    for key, arm in s["arms"].items():
        fit, loss, first = arm["fit"], arm["loss"]["inside"], str(arm["head_steps"])
        aligned = shown(fit["inside"].get(first)) if arm["head_steps"] else "-"
        last, held, _ = ends(arm)
        row = [f"{key} {arm['title']}", f"{arm['rate']:g}", shown(fit["inside"].get("0")), aligned]
        row += [shown(last[group]) for group in GROUPS]
        row += [shown(held), shown(arm["shape"])]
        row += [f"{loss[step]['mean']:.3f}" for step in ("0", first, str(arm["steps"]))]
        row.append(" / ".join(str(step or "-") for step in arm["steps to 95 %"].values()))
        row += [f"{arm['trained']:,}", f"{arm['seconds']['mean']:.0f}"]
        rows.append(row)
    for title, fits in (("base", s["base"]), ("base at half size, enlarged", s["half"])):
        fits = [f"{fits[group]:.2f}" for group in GROUPS]
        rows.append([title, "", "", "", *fits, *[""] * (len(COLUMNS) - 7)])
    return rows


def draw(s, path):
    """Losses and fits over steps, unseen words at the end. Bands are ranges over seeds."""
    core = [key for key in s["arms"] if key.isupper()]
    with video.figure(path, rows=2, columns=4, size=(5.2, 4.2), dpi=80) as axes:
        for row, what in enumerate(("loss", "fit")):
            for ax, group in zip(axes[row], GROUPS):
                for i, key in enumerate(core):
                    arm = s["arms"][key]
                    curve(ax, arm[what][group], f"C{i}", f"{key} {arm['title']}")
                ax.set(title=f"{what}, {group}", xlabel="steps (stage 1b counts)")
        for ax, group in zip(axes[1], GROUPS):
            ax.axhline(s["base"][group], color="k", ls="--", lw=1)
            ax.axhline(s["chance"], color="k", ls=":", lw=1)
            ax.set_ylim(0, 1.03)
        axes[0, 0].legend(fontsize=7)
        axes[0, 3].set_axis_off()
        for key, arm in s["arms"].items():
            held = arm["held"]
            errors = [[held["mean"] - held["low"]], [held["high"] - held["mean"]]]
            colour = f"C{core.index(key)}" if key in core else "gray"
            axes[1, 3].bar(key, held["mean"], yerr=errors, color=colour)
        axes[1, 3].axhline(s["base_held"], color="k", ls="--", lw=1)
        axes[1, 3].set(title="unseen word comes out right, at the end")


def curve(ax, spreads, colour, label):
    steps, low, mean, high = [], [], [], []
    for step, found in spreads.items():
        steps.append(int(step))
        low.append(found["low"])
        mean.append(found["mean"])
        high.append(found["high"])
    ax.plot(steps, mean, "o-", ms=3, color=colour, label=label)
    ax.fill_between(steps, low, high, color=colour, alpha=0.15)
    ax.grid(alpha=0.3)
