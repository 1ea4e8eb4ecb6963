"""The paper's claims, each with its verdict: a rule on the numbers that a section left.

A rule returns status, our value and a note. It is the same for every release: what changes is the
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from spectra_db.words import ANSWERS

REPRODUCED, PARTLY = "reproduced", "partly"
NOT_REPRODUCED, UNDECIDED = "not reproduced", "undecided"
NOT_TESTABLE, NOT_TESTED = "not testable", "not tested here"
STATUSES = (REPRODUCED, PARTLY, NOT_REPRODUCED, UNDECIDED, NOT_TESTABLE, NOT_TESTED)

# Readings of JS⁰ that claims are judged by: metric and scale.
READINGS = ("js0 lambda10", "js0 raw", "js0_paper lambda10", "js0_paper raw")

Values = Mapping[str, Any]
# Status, our value, note.
Verdict = tuple[str, str, str]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        where: Its place in the paper.
        text: The claim.
        paper: The paper's value.
        section: Whose numbers decide.
        rule: From these numbers to the verdict.
    """

    where: str
    text: str
    paper: str
    section: str
    rule: Callable[[Values], Verdict]


def verdict(claim: Claim, record: Mapping[str, Any] | None) -> Verdict:
    """Judge a claim by what its section left."""
    if record is None:
        return NOT_TESTED, "not computed", f"`harness paper {claim.section}` computes it"
    try:
        return claim.rule(record["values"])
    except KeyError:
        gone = "; ".join(record["missing"]) or "numbers of an older version"
        return NOT_TESTED, "not in this release", gone


def _graded(parts: Sequence[bool], *, partly: float = 0.0) -> str:
    """Return reproduced if all parts hold, partly if one does and at least that share of them."""
    share = sum(parts) / len(parts)
    return _graduated(share == 1, 0 < share >= partly)


def _graduated(whole: bool, part: bool) -> str:
    """Return reproduced where all holds, partly where a weaker thing does."""
    return REPRODUCED if whole else PARTLY if part else NOT_REPRODUCED


def _proposition1_printed(v: Values) -> Verdict:
    p = v["proposition1"]
    ours = f"1 − {p['loss_gap']:.3g}, below 1 − 2/(κ+1) = 1 − {p['printed_gap']:.3g}"
    if p["loss_gap"] <= p["printed_gap"]:
        return REPRODUCED, ours, ""
    note = "false by a square: at η = 2/(μ+L) the loss contracts by (1 − 2/(κ+1))², whatever w₀"
    return NOT_REPRODUCED, ours, note


def _proposition1(v: Values) -> Verdict:
    p = v["proposition1"]
    gap = p["printed_gap"]
    holds = p["largest_loss_gap"] <= 1.001 * (2 * gap - gap**2)
    holds &= p["largest_norm_gap"] <= 1.001 * gap and p["least_loss_over_bound"] >= 0.999
    ours = (
        f"least worst case of {p['num_rates']:,} rates: 1 − {p['largest_loss_gap']:.3g} for the "
        f"loss, 1 − {p['largest_norm_gap']:.3g} for ‖w‖"
    )
    note = (
        f"least at η = {p['best_eta_over_2_by_mu_plus_l']:.4g} · 2/(μ+L); with equal loss in both "
        f"modes L(w_t) is at least {p['least_loss_over_bound']:.3g} times ½ρ^2t L(w₀)"
    )
    return _graded([holds]), ours, note


def _theorem1(key: str, v: Values, *, slip: str = "") -> Verdict:
    counts = v["theorem1"]
    broken = sum(c[key] for c in counts.values())
    draws = sum(c["num_draws"] for c in counts.values())
    each = ", ".join(f"{name} {c[key]} of {c['num_draws']}" for name, c in counts.items())
    note = slip if broken else f"no violation in {draws:,} draws of 50 steps"
    return _graded([not broken]), f"violated in {each}", note


def _ratio(v: Values) -> Verdict:
    found = v["ratio_at_most_1000"]
    error = (found["orthonormal"] * (1 - found["orthonormal"]) / v["num_draws"]) ** 0.5
    ours = f"{found['orthonormal']:.3f} ± {error:.3f}; {found['gaussian']:.3f} with Gaussian Q_l"
    short = 2 / 3 - found["orthonormal"]
    note = "with orthonormal Q_l"
    if abs(short) < abs(2 / 3 - found["gaussian"]):
        note += ", which fits better than the Gaussian entries that are stated"
    return _graduated(short <= 2 * error, short < 0.05), ours, note


def _preconditioned(v: Values) -> Verdict:
    p = v["preconditioned"]
    paper = (7.09, 18.98, 18.76)
    inside = [a <= x <= b for a, x, b in zip(p["q10"], paper, p["q90"], strict=True)]
    ours = ", ".join(
        f"{m:.3g} (mean {a:.3g}, 10 to 90 %: {low:.2g} to {high:.3g})"
        for m, a, low, high in zip(p["median"], p["mean"], p["q10"], p["q90"], strict=True)
    )
    worse = sum(m > 1 for m in p["median"])
    note = (
        "medians of a heavy-tailed ratio; reproduced: the paper's within 10 to 90 %; "
        f"preconditioning makes κ_l worse in {worse} of {len(paper)} blocks"
    )
    return _graded(inside), ours, note


def _proposition2(v: Values) -> Verdict:
    rows = [r for r in v["proposition2"] if r["beta2"] < 1]
    holds = all(abs(r["end_over_half_eta"] - 1) < 1e-6 for r in rows)
    ours = "; ".join(f"β₂ = {r['beta2']}: ends at {r['end_over_half_eta']:.4g} · η/2" for r in rows)
    deepest = min(rows, key=lambda r: r["log10_least"])
    note = (
        f"on the way |w| falls to 10^{deepest['log10_least']:.0f} (β₂ = {deepest['beta2']}), and "
        "what falls below 10^-308 seems to converge in floating point"
    )
    return _graded([holds]), ours, note


def _case(name: str, v: Values, *, adam_wins: bool) -> Verdict:
    steps, draws = v[name], v["draws"][name]
    # Of the figure's draws, at the best of a grid of rates: gradient descent over Adam.
    decaying = float(steps["steps_gd"]) / float(steps["steps_adam099"])
    ours = (
        f"gradient descent {_count(draws['gradient_descent'])} steps, Adam "
        f"{_count(draws['adam'])} (β₂ = 1): ratio {draws['ratio']:.3g} (10 to 90 %: "
        f"{draws['ratio_q10']:.2g} to {draws['ratio_q90']:.3g}); in the figure's draws "
        f"{_count(steps['steps_gd'])}, and {_count(steps['steps_adam099'])} with β₂ = 0.99: "
        f"{decaying:.3g}"
    )
    model = f"of {steps['model']}; " if "model" in steps else ""
    note = f"{model}steps to {v['tolerance']:g} of the loss, medians of {v['num_draws']} draws"
    ratios = (draws["ratio"], decaying)
    if adam_wins:
        note += "; faster: a ratio above 1 in 90 % of the draws; partly: above 2 for one β₂"
        return _graduated(draws["ratio_q10"] > 1, max(ratios) > 2), ours, note
    alike = [1 / 5 < ratio < 5 for ratio in ratios]
    return _graded(alike), ours, f"{note}; alike: both ratios between 1/5 and 5"


def _count(steps: float | str) -> str:
    """Write a number of steps; "inf" where the loss was not reached."""
    return "none" if isinstance(steps, str) else f"{steps:,.0f}"


def _table2_descent(v: Values) -> Verdict:
    slopes = [v[f]["gradient_descent_slope"] for f in ("heterogeneous", "homogeneous")]
    holds = all(abs(s - 1) < 0.05 for s in slopes)
    ours = f"κ^{slopes[0]:.2f} (blocks apart), κ^{slopes[1]:.2f} (blocks alike)"
    return _graded([holds]), ours, ""


def _table2_adam(v: Values) -> Verdict:
    apart, alike = (v[f]["adam_slope"] for f in ("heterogeneous", "homogeneous"))
    holds = abs(apart) < 0.1 and 0.6 < alike < 1.4
    ours = f"κ^{apart:.2f} where κ_l ≤ 3, κ^{alike:.2f} where κ_l = κ"
    note = "slopes of log steps; reproduced: below 0.1 where κ_l ≤ 3, 0.6 to 1.4 where κ_l = κ"
    return _graded([holds]), ours, note


def _block_diagonal(v: Values) -> Verdict:
    ratios = {name: found["diagonal_over_others"] for name, found in v.items()}
    ends = {}
    for which in ("at the start", "trained"):
        for start in ("N(0, 0.02²)", "torch's"):
            found = [r for name, r in ratios.items() if start in name and which in name]
            ends[f"{start} {which}"] = (min(found), max(found))
    ours = "; ".join(f"{name}: {low:.3g} to {high:.3g}" for name, (low, high) in ends.items())
    near = [low > 10 for low, _ in ends.values()]
    note = (
        "mean |entry| of diagonal over other blocks, 2, 4 and 8 layers; near: above 10, which "
        f"holds in {sum(near)} of {len(near)} rows of the figure"
    )
    return _graded(near), ours, note


def _coupling(v: Values) -> Verdict:
    models = v["models"]
    ours = "; ".join(
        f"{name}: {m['diagonal_share']:.0%} ± {m['diagonal_share_error']:.0%}, median pair "
        f"{m['median']:.2g}"
        for name, m in models.items()
    )
    near = [m["diagonal_share"] > 0.9 for m in models.values()]
    note = (
        "share of ‖H‖_F² in the diagonal blocks, and ‖H_kl‖/√(‖H_kk‖‖H_ll‖) of the median pair; "
        "near: above 90 %"
    )
    return _graded(near, partly=0.5), ours, note


def _slq(v: Values) -> Verdict:
    found, within, texts = v["errors"].values(), [], []
    for what, name in (("quadrature", "one vector's density"), ("total", "the spectrum's")):
        errors = [e[f"{what}_{width}"] for e in found for width in ("raw", "lambda10")]
        small = [error < 1e-14 for error in errors]
        texts.append(
            f"{name}: {min(errors):.1g} to {max(errors):.2g}, below 1e-14 in {sum(small)} of "
            f"{len(small)}"
        )
        within.append(small)
    note = f"L1 distance (of 2); {len(found)} matrices, smoothed by two widths each"
    return _graduated(all(within[1]), any(within[0])), "; ".join(texts), note


def _full_spectra(v: Values) -> Verdict:
    parts, alike = [], []
    for stage in ("init", "final"):
        d = v[stage]
        within = (d["cnn"] + d["transformer"]) / 2
        parts.append(
            f"{stage}: {d['between']:.3f} between, {d['cnn']:.3f} among CNNs, "
            f"{d['transformer']:.3f} among Transformers"
        )
        alike.append(d["between"] <= 1.25 * within)
    counts = " and ".join(str(v[stage]["num_models"]) for stage in ("init", "final"))
    note = (
        f"mean JS distance of full spectra by λ10, {counts} models; alike: between at most 1.25 "
        "times the mean of within"
    )
    return _graded(alike), "; ".join(parts), note


def _four_blocks(v: Values) -> Verdict:
    cnn, transformer = v["cnn"], v["transformer"]
    ours = ", ".join(f"{x['model']} {x['mean_distance']:.3f}" for x in (cnn, transformer))
    ratio = transformer["mean_distance"] / cnn["mean_distance"]
    note = "mean JS distance of four blocks, by λ10; reproduced: 1.5 times as large"
    return _graduated(ratio > 1.5, ratio > 1), ours, note


def _heterogeneous(metric: str, v: Values) -> Verdict:
    found = v[metric]
    cnn, transformer = found["cnn"].values(), found["transformer"].values()
    ours = (
        f"CNNs {min(cnn):.3g} to {max(cnn):.3g} ({len(cnn)} models), Transformers "
        f"{min(transformer):.3g} to {max(transformer):.3g} ({len(transformer)})"
    )
    note = f"one-sided Mann-Whitney p = {found['p_value']:.2g}"
    return _graduated(min(transformer) > max(cnn), found["p_value"] < 0.05), ours, note


def _table1(column: str, what: str, v: Values) -> Verdict:
    found = v[column]
    known = f"{len(found['systems'])} of {len(v['systems'])} {what}"
    if len(found["systems"]) < 4:
        without = ", ".join(s for s in v["systems"] if s not in found["systems"])
        return NOT_TESTED, "too few in this release", f"{known}; without {without}"
    readings = found["readings"]
    best = sorted(readings, key=lambda name: -readings[name]["rho"])[:2]
    named = dict.fromkeys([*READINGS, *best])
    ours = "; ".join(f"{name} ρ = {readings[name]['rho']:.2f}" for name in named)
    nearest = min(readings, key=lambda name: readings[name]["factor"])
    note = (
        "definition unpublished: neither paper nor code says which eigenvalues, scale, grid or "
        f"sum; Spearman with Table 1 of four readings of JS⁰ and the best two of "
        f"{len(readings)}, {known}; nearest in size is {nearest}, off by a factor of "
        f"{readings[nearest]['factor']:.3g} on average; batches are in the table below"
    )
    return NOT_TESTABLE, ours, note


def _sweep_gap(v: Values) -> Verdict:
    status, ours, note = _rising(["c against gap", "c against accuracy_gap"], v)
    edges = _edges(v["rows"])
    if not edges:
        return status, ours, note
    note += f"; partly at most, as the grid ends: {edges}, and beyond it is not known"
    return (PARTLY if status == REPRODUCED else status), ours, note


def _edges(rows: list[Values]) -> str:
    """Say where the best rates of the sweep are at the edge of the grid."""
    parts: dict[tuple[str, str, float], list[int]] = {}
    for row in rows:
        for optimizer, name in (("sgd", "SGD"), ("adamw", "AdamW")):
            if row[f"{optimizer}_edge"]:
                key = (name, row[f"{optimizer}_edge"], row[f"{optimizer}_lr"])
                parts.setdefault(key, []).append(row["c"])
    return ", ".join(
        f"{name}'s best rate is its {edge} one, {rate:g}, for c = {_span(several)}"
        for (name, edge, rate), several in parts.items()
    )


def _span(numbers: list[int]) -> str:
    """Write ascending whole numbers, as a range where none is left out.

    >>> _span([6, 7, 8]), _span([1, 7])
    ('6 to 8', '1, 7')
    """
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _sweep_curves(v: Values) -> Verdict:
    rows = v["rows"]
    first, last = rows[0], rows[-1]
    ours = "; ".join(
        f"{name} {first[o]:.2f} at c = {first['c']}, {last[o]:.2f} at c = {last['c']}"
        for name, o in (("AdamW", "adamw"), ("SGD", "sgd"))
    )
    unaffected = min(row["adamw"] for row in rows) >= 0.9 * max(row["adamw"] for row in rows)
    falls = v["c against sgd"]["rho"] < -0.5 and v["c against sgd"]["p_value"] < 0.05
    edges = _edges(rows)
    note = (
        "test accuracy at the best rate; unaffected: AdamW's least at least 0.9 of its largest; "
        "worse: SGD's falls with c, ρ below −0.5 with p < 0.05"
    ) + (f"; {edges}" if edges else "")
    return _graduated(unaffected and falls and not edges, unaffected or falls), ours, note


def _rising(names: Sequence[str], v: Values) -> Verdict:
    found = [v[name] for name in names]
    ours = "; ".join(f"{n}: ρ = {f['rho']:.2f}" for n, f in zip(names, found, strict=True))
    rises = [f["rho"] > 0.5 and f["p_value"] < 0.05 for f in found]
    note = f"Spearman over {v['num_models']} models; reproduced: all above 0.5 with p < 0.05"
    return _graded(rises), ours, note


def _pretrained(key: str, v: Values) -> Verdict:
    pretrained, scratch = v["gpt-nano-sft"], v["gpt-nano-books"]
    difference = scratch[key] - pretrained[key]
    error = (scratch[f"{key}_error"] ** 2 + pretrained[f"{key}_error"] ** 2) ** 0.5
    ours = ", ".join(
        f"{name} {x[key]:.3f} ± {x[f'{key}_error']:.3f}"
        for name, x in (("pretrained", pretrained), ("from scratch", scratch))
    )
    note = "our GPT on books, then on instructions; not GPT-2, whose weights can't be had here"
    return _graduated(difference > 2 * error, difference > 0), ours, note


def _gap_against_js0(v: Values) -> Verdict:
    texts = [
        f"{name}: ρ = {v[name]['rho']:.2f} [{v[name]['low']:.2f}, {v[name]['high']:.2f}]"
        for name in READINGS
    ]
    note = (
        f"Spearman over {v['num_models']} small models of {v['num_families']} families, 95 % "
        "intervals as the leaderboard's. The gap of protocol 1 can't decide: a few hundred steps, "
        "divided by the loss of an untrained model, as much of batch and budget as of the model"
    )
    return UNDECIDED, "; ".join(texts), note


def _adam_needed(wanted: str, v: Values) -> Verdict:
    models = {m: x for m, x in v["models"].items() if x["answer"] in ANSWERS}
    ours = ", ".join(
        f"{m} {x['gap']:.2f} ± {x['error']:.2f} ({x['answer']})" for m, x in models.items()
    )
    answers = [x["answer"] for x in models.values()]
    said, unclear = answers.count(wanted), answers.count("unclear")
    idle = ", ".join(m for m, x in v["models"].items() if x["answer"] == "not trained")
    note = (
        "gap from R, after a few hundred steps, of models that count as trained; Adam needed: "
        f"its 95 % interval is above 0.1 (yes) or below (no); {wanted} in {said} of "
        f"{len(models)}, unclear in {unclear}"
    ) + (f"; not trained: {idle}" if idle else "")
    if not models:
        return NOT_TESTED, "not in this release", "no gap from R of a trained model"
    if 2 * unclear >= len(models):
        return UNDECIDED, ours, note
    return _graded([a == wanted for a in answers], partly=0.5), ours, note


def _causal(v: Values) -> Verdict:
    models = v["models"]
    texts, closed = [], []
    for model, found in models.items():
        variants = {k: x for k, x in found.items() if k != "sgd_gap"}
        shares = ", ".join(
            f"{k}: {x['closed']['value']:.0%} ± {x['closed']['error']:.0%}"
            for k, x in variants.items()
        )
        texts.append(f"{model} (gap {found['sgd_gap']['value']:.2f}) {shares}")
        closed.append(
            any(x["closed"]["value"] - 2 * x["closed"]["error"] > 0.5 for x in variants.values())
        )
    note = (
        "share of SGD's gap to AdamW closed; more than half, by two standard errors, in "
        f"{sum(closed)} of {len(closed)} models; not a claim of the paper but what its "
        "explanation implies"
    )
    return _graded(closed, partly=0.5), "; ".join(texts), note


_FULL = "Full Hessian spectra of CNNs and Transformers are alike, early and late"

CLAIMS = (
    Claim("Figure 1", _FULL, "alike to the eye", "fig1", _full_spectra),
    Claim(
        "Figure 3",
        "At initialisation the blocks of a CNN are alike, those of a Transformer differ",
        "VGG16 alike, BERT differs",
        "fig3",
        _four_blocks,
    ),
    Claim(
        "Figure 4",
        "JS distances between blocks are larger in Transformers than in CNNs (js0)",
        "larger in every Transformer",
        "fig4",
        partial(_heterogeneous, "js0"),
    ),
    Claim(
        "Figure 4",
        "The same in our reading of the paper's units (js0_paper)",
        "larger in every Transformer",
        "fig4",
        partial(_heterogeneous, "js0_paper"),
    ),
    Claim(
        "Table 1",
        "JS⁰: ResNet18 0.10, VGG16 0.09, GPT2 pretrained 18.84, mixer 34.90, BERT 53.38, GPT2 "
        "83.23, ViT-base 286.41",
        "this order",
        "table1",
        partial(_table1, "ours", "systems at their real size"),
    ),
    Claim(
        "Table 1, small kin",
        "The same order among small models",
        "–",
        "table1",
        partial(_table1, "small", "systems by their small kin"),
    ),
    Claim(
        "Figure 5",
        "As the perceptron is scaled, SGD falls behind Adam",
        "gap of accuracy grows",
        "fig5",
        _sweep_gap,
    ),
    Claim(
        "Figure 5",
        "Heterogeneity grows with the scale",
        "JS⁰ grows",
        "fig5",
        partial(_rising, [f"c against {name}" for name in READINGS]),
    ),
    Claim(
        "Figure 6",
        "A pretrained GPT is less heterogeneous than one from scratch",
        "18.84 against 83.23",
        "fig6",
        partial(_pretrained, "js0"),
    ),
    Claim(
        "Figure 6",
        "and SGD falls less behind in fine-tuning it",
        "SGD close to Adam",
        "fig6",
        partial(_pretrained, "gap"),
    ),
    Claim(
        "Figure 7",
        "The gap grows with JS⁰",
        "monotone over the paper's systems",
        "fig7",
        _gap_against_js0,
    ),
    Claim("Figure 9", "On CNNs SGD is on par", "on par", "fig9", partial(_adam_needed, "no")),
    Claim(
        "Figure 10",
        "On Transformers it is worse",
        "worse on all",
        "fig10",
        partial(_adam_needed, "yes"),
    ),
    Claim(
        "Figure 14",
        "As the perceptron is scaled Adam's training is unaffected and SGD's gets worse",
        "Adam unaffected",
        "fig14",
        _sweep_curves,
    ),
    Claim(
        "Beyond the paper",
        "SGD catches up if each block gets a rate in proportion to 1/λ_max^p",
        "–",
        "causal",
        _causal,
    ),
    Claim(
        "Figure 2",
        "The Hessians of small Transformers are nearly block diagonal",
        "seen in heat maps of 2, 4 and 8 layers",
        "fig2",
        _block_diagonal,
    ),
    Claim(
        "Figure 2, left open",
        "Larger models' Hessians are nearly block diagonal",
        "assumed",
        "blockdiagonal",
        _coupling,
    ),
    Claim(
        "Section 3, case 1",
        "With a Transformer's block spectra Adam is faster than gradient descent",
        "Adam faster by far (Fig. 8)",
        "fig8",
        partial(_case, "case1", adam_wins=True),
    ),
    Claim(
        "Section 3, case 2",
        "With a CNN's block spectra both are alike",
        "similar (Fig. 8)",
        "fig8",
        partial(_case, "case2", adam_wins=False),
    ),
    Claim(
        "Section 3, case 3",
        "With blocks {1, 2, 3}, {99, 100, 101}, {4998, 4999, 5000} Adam is faster",
        "Adam faster by far (Fig. 8)",
        "fig8",
        partial(_case, "case3", adam_wins=True),
    ),
    Claim(
        "Section 3, case 4",
        "With the same eigenvalues dealt out evenly both are alike",
        "similar (Fig. 8)",
        "fig8",
        partial(_case, "case4", adam_wins=False),
    ),
    Claim(
        "Proposition 1, as printed",
        "For some H and w₀, every η leaves L(w_{t+1}) ≥ (1 − 2/(κ+1)) L(w_t)",
        "κ = 5000: factor ≥ 1 − 4e-4",
        "theory",
        _proposition1_printed,
    ),
    Claim(
        "Proposition 1, mended",
        "No constant η has a worst case below ρ² for the loss, ρ = 1 − 2/(κ+1) for ‖w‖",
        "Ω(κ) steps",
        "theory",
        _proposition1,
    ),
    Claim(
        "Theorem 1, with the proof's η = min C_{l,1}",
        "L(w_{t+1}) ≤ max_l (1 − 1/(r κ_l)) L(w_t) for Adam with β₂ = 1",
        "proved",
        "theory",
        partial(_theorem1, "violations_proof"),
    ),
    Claim(
        "Theorem 1, with the stated η = min 1/C_{l,1}",
        "The same",
        "stated",
        "theory",
        partial(
            _theorem1,
            "violations_statement",
            slip="a slip of the statement: the proof uses min C_{l,1}",
        ),
    ),
    Claim(
        "After Theorem 1",
        "r ≤ 1000 in case 3 with a probability of at least 2/3",
        "≥ 2/3",
        "theory",
        _ratio,
    ),
    Claim(
        "After Theorem 1",
        "Adam's preconditioner multiplies κ of the three blocks of case 3",
        "7.09, 18.98, 18.76 ×",
        "theory",
        _preconditioned,
    ),
    Claim(
        "Proposition 2",
        "Adam with a constant rate and β₂ < 1 ends in a cycle",
        "does not converge",
        "theory",
        _proposition2,
    ),
    Claim("Table 2", "Gradient descent takes O(κ) steps", "κ", "table2", _table2_descent),
    Claim("Table 2", "Adam with β₂ = 1 takes O(r max κ_l)", "max κ_l", "table2", _table2_adam),
    Claim(
        "Appendix D.1",
        "m = 100 and n_v = 10 give an error below 1e-14",
        "< 1e-14",
        "slq",
        _slq,
    ),
)
