"""The paper's claims C1 to C8 (spec ae-adapt-v 10.1) against measured numbers: spreads over seeds, verdicts, tables, plots.

A verdict is computed, never asserted. One arm is "better" than another only where their ranges over the seeds do not touch. Two arms are compared
in four ways: fit on seen combinations, on unseen ones, how often an unseen word comes out right, and validation loss; a claim is supported if
at least one says so and none the opposite, contradicted the other way round, "mixed" if both happen.

The fit is the mean accuracy over the attributes that passed the gate. What cannot be read from a video counts as wrong, so a fit below chance
means that there is no object to see.
"""
import statistics

import torch

import toy
from experiments.arms import ALL, ARMS, GROUPS, OPTIONS
from files import checkpoint, video


def spread(values):
    """Mean and range over seeds."""
    return dict(mean=statistics.fmean(values), low=min(values), high=max(values), seeds=len(values)) if values else None


def against(x, y, higher=True):
    """How x compares with y, both spreads: "better" or "worse" where the ranges over seeds do not touch, else "undecided"."""
    if not x or not y or min(x["seeds"], y["seeds"]) < 2:
        return "undecided (one seed)"
    ahead, behind = (x["low"] > y["high"], x["high"] < y["low"]) if higher else (x["high"] < y["low"], x["low"] > y["high"])
    return "better" if ahead else "worse" if behind else "undecided (ranges overlap)"


def summary(world, ledger, rates):
    """Everything per arm, as spreads over the seeds that are finished."""
    g = ledger.all("gate")[0]
    passed = [k for k, ok in g["passed"].items() if ok]
    fit = lambda found: sum(found[k] for k in passed) / max(len(passed), 1)
    base = {group: fit(found) for group, found in g["base"].items()}
    chance, arms = fit(g["chance"]), {}
    for key, lr in rates.items():
        rows, scores = ledger.all("trial", arm=key, lr=lr), ledger.all("score", arm=key, lr=lr)
        if not rows:
            continue
        steps, scored = [c["step"] for c in rows[0]["curve"]], sorted({x["step"] for x in scores})
        at = lambda step: [x for x in scores if x["step"] == step]
        arm = arms[key] = dict(title=ALL[key].title, rate=lr, seeds=len(rows), steps=rows[0]["steps"], trained=rows[0]["trained"], head_steps=rows[0]["head_steps"],
                               seconds=spread([r["seconds"] for r in rows]), spikes=sum(r["spikes"] for r in rows), grad_norm=max(r["grad_norm"] for r in rows),
                               search={str(r["lr"]): r["curve"][-1]["inside"] for r in ledger.all("trial", arm=key, seed=0)},
                               depth=rows[0]["depth"], sigma=rows[0]["sigma"])
        arm["loss"] = {group: {str(s): spread([c[group] for r in rows for c in r["curve"] if c["step"] == s]) for s in steps} for group in GROUPS}
        arm["fit"] = {group: {str(s): spread([fit(x[group]) for x in at(s)]) for s in scored} for group in GROUPS}
        arm["shape"] = {str(s): spread([sum(x[group]["shape"] for group in GROUPS) / len(GROUPS) for x in at(s)]) for s in scored}
        arm["held"] = {str(s): spread([x["word"]["held"] for x in at(s)]) for s in scored}
        arm["steps to 95 %"] = {group: next((s for s in scored if arm["fit"][group][str(s)]["mean"] >= 0.95 * base[group]), None) for group in GROUPS}
    return dict(passed=passed, base=base, base_held=g["base"]["word"]["held"], chance=chance, arms=arms)


def claims(world, ledger, s):
    """The paper's claims (spec 10.1), each with its numbers and a verdict that follows from them."""
    total, first, arms = str(world.preset.steps), str(world.preset.head_steps), s["arms"]
    rows, say = [], lambda v: f"{v['mean']:.2f} ({v['low']:.2f} to {v['high']:.2f})" if v else "-"
    end = lambda k, what: arms[k]["held"].get(total) if what == "held" else arms[k]["fit"][what].get(total)

    def duel(claim, text, a, b, wanted="better"):
        """Arms a and b at equal steps: fit inside, on unseen combinations, and of unseen words."""
        if not {a, b} <= arms.keys():
            return
        found = {what: against(end(a, what), end(b, what)) for what in ("inside", "combination", "held")}
        numbers = "; ".join(f"{what} {a} {say(end(a, what))}, {b} {say(end(b, what))}: {v}" for what, v in found.items())
        loss = against(*(arms[k]["loss"]["inside"][total] for k in (a, b)), higher=False)
        opposite = {"better": "worse", "worse": "better"}[wanted]
        votes = [*found.values(), loss]
        verdict = "mixed" if wanted in votes and opposite in votes else "supported" if wanted in votes else "contradicted" if opposite in votes else "undecided"
        rows.append(dict(claim=claim, text=text, numbers=f"{numbers}; loss inside: {loss}", verdict=verdict))

    if not s["passed"]:
        rows.append(dict(claim="C1 to C5, C7", text="all that compares fits", numbers="no attribute passed the gate: the base has nothing to inherit", verdict="not tested"))
        arms = {}
    if "E" in arms:
        after = arms["E"]["fit"]["inside"][first]
        share = max(0, after["mean"] - s["chance"]) / (s["base"]["inside"] - s["chance"])
        rows.append(dict(claim="C1", text="after alignment the frozen backbone already generates the right content", verdict=
                         "supported" if share >= 0.75 else "partly" if share >= 0.25 else "not shown",
                         numbers=f"E after 1b {say(after)}, chance {s['chance']:.2f}, base {s['base']['inside']:.2f}: {share:.0%} of the way"))
        reached = arms["E"]["steps to 95 %"]
        rows.append(dict(claim="C2", text="aligned + LoRA reaches 95 % of the base in a small fraction of its training", verdict=
                         "supported" if all(reached.values()) else "partly" if any(reached.values()) else "not within this budget",
                         numbers=", ".join(f"{g}: {'step %d' % reached[g] if reached[g] else '%.0f %% after %s' % (100 * end('E', g)['mean'] / s['base'][g], total)}" for g in GROUPS)))
    duel("C3", "naive full fine-tuning is worse than AE-Adapt-V at equal steps", "E", "B")
    duel("C3", "naive LoRA is worse than AE-Adapt-V at equal steps", "E", "C")
    if {"B", "E"} <= arms.keys():
        spikes = {k: arms[k]["spikes"] for k in "BE"}
        rose = [k for k in "BE" if arms[k]["loss"]["inside"][total]["mean"] > 1.1 * min(v["mean"] for v in arms[k]["loss"]["inside"].values())]
        rows.append(dict(claim="C3", text="and less stable", numbers=f"loss spikes B {spikes['B']}, E {spikes['E']}; largest gradient norm B {arms['B']['grad_norm']:.1f}, "
                         f"E {arms['E']['grad_norm']:.1f}; loss rose again: {', '.join(rose) or 'none'}", verdict=
                         "supported" if "B" in rose or spikes["B"] > spikes["E"] else "not shown"))
    duel("C4", "training from scratch is behind at equal steps", "E", "A")
    duel("C5", "LoRA loses nothing against full fine-tuning", "E", "F")
    if {"E", "F"} <= arms.keys():
        rows[-1]["numbers"] += f"; trained {arms['E']['trained']:,} and {arms['F']['trained']:,}"
        rows[-1]["verdict"] = {"undecided": "supported within the spread of seeds"}.get(rows[-1]["verdict"], rows[-1]["verdict"])
    fast = ledger.all("speed")[0]
    reach = [r["time ratio"] / r["token ratio"] for r in fast]
    rows.append(dict(claim="C6", text="speed follows the token ratio", verdict="supported" if min(reach) >= 0.9 else "partly" if max(reach) >= 0.9 else "not shown",
                     numbers="; ".join(f"{r['side']} px: tokens {r['token ratio']:.1f}x, time {r['time ratio']:.1f}x" for r in fast)))
    duel("C7", "the MSE stage matters beyond training the ends", "E", "D")
    a = ledger.all("alignments")[0]
    ratio = a["closed_form"]["mse inside"] / a["sgd_published"]["mse inside"]
    solve, whole = (took / a["sgd_published"]["seconds"] for took in (a["closed_form"]["seconds"], a["closed_form"]["seconds"] + ledger.all("moments")[0]))
    rows.append(dict(claim="C8", text="the closed form equals converged SGD", verdict="supported" if ratio <= 1.01 else "contradicted",
                     numbers=f"held-out MSE {ratio:.4f} of SGD's; the solve takes {solve:.2g} of its time, with the pass over the clips {whole:.2g}"))
    duel("C8", "closed-form ends and half of 1b do as well as AE-Adapt-V or better", "G", "E")
    for key, option in OPTIONS.items():
        if option.stretch == (1, 1):
            duel(f"option {key}", f"E with {option.title} is better than E", key, "E")
    return rows


def table(world, s, what):
    """Markdown rows of all arms: fits at the end, steps to 95 %, trained parameters, seconds."""
    first = str(world.preset.head_steps)
    say = lambda v: "-" if v is None else f"{v['mean']:.2f} [{v['low']:.2f}, {v['high']:.2f}]" if v["seeds"] > 1 else f"{v['mean']:.2f}"
    lines = ["| arm | rate | after 1b's steps: inside | inside | combination | word | unseen word right | shape | loss inside | 95 % of base, steps | trained | s |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for key, a in s["arms"].items():
        if (key in ARMS) == (what == "arms"):
            steps, total = [a["steps to 95 %"][g] for g in GROUPS], str(a["steps"])
            lines.append(f"| {key} {a['title']} | {a['rate']:g} | {say(a['fit']['inside'].get(first))} | " + " | ".join(say(a["fit"][g][total]) for g in GROUPS)
                         + f" | {say(a['held'][total])} | {say(a['shape'][total])} | {a['loss']['inside'][total]['mean']:.3f} | {' / '.join(str(x or '-') for x in steps)} | {a['trained']:,} | {a['seconds']['mean']:.0f} |")
    if what == "arms":
        lines.append("| base | | | " + " | ".join(f"{s['base'][g]:.2f}" for g in GROUPS) + f" | {s['base_held']:.2f} | | | | | |")
    return "\n".join(lines)


def report(world, ledger, rates, results):
    """compare_adapt.json, .png and _videos.png (the first videos of every arm) in `results`; the tables as compare_adapt.md in the run's folder."""
    s = summary(world, ledger, rates)
    verdicts = claims(world, ledger, s)
    out = dict(**checkpoint.provenance(), settings=ledger.all("settings")[0], gate=ledger.all("gate")[0], alignments=ledger.all("alignments")[0],
               speed=ledger.all("speed")[0], claims=verdicts, **s, trials=ledger.all("trial"), scores=[line for line in ledger.lines if line["key"]["kind"] == "score"])
    checkpoint.write_json(results / "compare_adapt.json", out)
    text = "\n\n".join([table(world, s, "arms"), table(world, s, "options"), "| claim | numbers | verdict |\n|---|---|---|\n"
                        + "\n".join(f"| {c['claim']}: {c['text']} | {c['numbers']} | **{c['verdict']}** |" for c in verdicts)])
    with checkpoint.atomic_path(world.out / "compare_adapt.md") as tmp:
        tmp.write_text(text + "\n")
    draw(world, s, results / "compare_adapt.png")
    strips = {k: checkpoint.load_tensors(f)[0] for k in ("base", *ARMS) if (f := world.out / "strips" / f"{k}.safetensors").exists()}
    shown = [(g, i) for g in GROUPS for i in range(len(strips["base"][g]))]
    rows = [torch.cat([x[g][i] for x in strips.values()], dim=1) for g, i in shown]
    video.contact_sheet(results / "compare_adapt_videos.png", rows, columns=3 * len(strips), heads=list(strips),
                       labels=[f"{g}: {toy.caption(world.prompts[g][i])}" for g, i in shown])


def draw(world, s, path):
    """Losses, fits, feature distance and what alignment alone gives, arms A to G; bands are ranges over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    total, first = str(world.preset.steps), str(world.preset.head_steps)
    fig, axes = plt.subplots(2, 4, figsize=(21, 8.5))
    core = {k: a for k, a in s["arms"].items() if k in ARMS}
    colours = dict(zip(ARMS, plt.get_cmap("tab10").colors))

    def curves(ax, title, pick, line=None):
        for key, a in core.items():
            points = {int(step): v for step, v in pick(a).items() if v}
            ax.plot(list(points), [v["mean"] for v in points.values()], "o-", ms=3, color=colours[key], label=f"{key} {a['title']}")
            ax.fill_between(list(points), [v["low"] for v in points.values()], [v["high"] for v in points.values()], color=colours[key], alpha=0.15)
        if line:
            ax.axhline(line, color="k", ls="--", lw=1, label="base")
        ax.set(title=title, xlabel="steps (stage 1b counts)")
        ax.grid(alpha=0.3)

    words = {"inside": "seen combinations", "combination": "unseen combinations", "word": "prompts with an unseen word"}
    for ax, group in zip(axes[0], GROUPS):
        curves(ax, f"validation loss, {words[group]}", lambda a: a["loss"][group])
    for ax, group in zip(axes[1], GROUPS[:2]):
        curves(ax, f"prompt fit, {words[group]}", lambda a: a["fit"][group], s["base"][group])
        ax.axhline(s["chance"], color="k", ls=":", lw=1)
    curves(axes[1, 2], "unseen word comes out right", lambda a: a["held"], s["base_held"])
    for ax in axes[1]:
        ax.set_ylim(0, 1.03)
    axes[0, 0].legend(fontsize=7)
    ax = axes[0, 3]
    for key, a in core.items():
        for step, style in (("0", ":"), (total, "-")):
            if step in a["depth"]:
                ax.semilogy(a["depth"][step].values(), "o" + style, ms=3, color=colours[key], alpha=0.6 if style == ":" else 1)
    blocks = next(iter(core.values()))["depth"]["0"]
    ax.set(title="feature distance to the base / its variance\n(dotted: at the start, solid: at the end)", xlabel="after block")
    ax.set_xticks(range(len(blocks)), blocks, fontsize=7)
    ax.grid(alpha=0.3)
    ax = axes[1, 3]
    for i, group in enumerate(GROUPS):
        found = {k: a["fit"][group][first] for k, a in s["arms"].items() if a["fit"][group].get(first)}
        ax.bar([n + 0.27 * (i - 1) for n in range(len(found))], [v["mean"] for v in found.values()], 0.25, label=words[group],
               yerr=[[max(0, v["mean"] - v["low"]) for v in found.values()], [max(0, v["high"] - v["mean"]) for v in found.values()]])
        ax.set_xticks(range(len(found)), [f"{k}" for k in found])
    ax.axhline(s["base"]["inside"], color="k", ls="--", lw=1)
    ax.axhline(s["chance"], color="k", ls=":", lw=1)
    ax.set(title=f"prompt fit after {first} steps (D, E: blocks still frozen)")
    ax.legend(fontsize=7)
    fig.tight_layout()
    with checkpoint.atomic_path(path) as tmp:
        fig.savefig(tmp, dpi=80)
    plt.close(fig)
