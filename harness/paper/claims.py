"""The paper's claims, each with its verdict: a rule on the numbers that a section left.

A rule returns status, our value and a note; it is fixed here, before the numbers are known, and
never edited to fit them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

REPRODUCED, PARTLY = "reproduced", "partly"
NOT_REPRODUCED, NOT_TESTED = "not reproduced", "not tested here"

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
    note = "reached at η = 2/(μ+L) alone; with equal loss in both modes L(w_t) ≥ ½ρ^2t L(w₀)"
    return (REPRODUCED if holds else NOT_REPRODUCED), ours, note


def _theorem1(key: str, other: str) -> Callable[[Values], Verdict]:
    def rule(v: Values) -> Verdict:
        counts = v["theorem1"]
        broken = sum(c[key] for c in counts.values())
        draws = sum(c["num_draws"] for c in counts.values())
        each = ", ".join(f"{name} {c[key]} of {c['num_draws']}" for name, c in counts.items())
        return (
            (NOT_REPRODUCED if broken else REPRODUCED),
            f"violated in {each}",
            (other if broken else f"no violation in {draws:,} draws of 50 steps"),
        )

    return rule


def _ratio(v: Values) -> Verdict:
    found = v["ratio_at_most_1000"]
    error = (found["orthonormal"] * (1 - found["orthonormal"]) / v["num_draws"]) ** 0.5
    close = abs(found["orthonormal"] - 2 / 3) < 0.05
    ours = f"{found['orthonormal']:.3f} ± {error:.3f}; {found['gaussian']:.3f} with Gaussian Q_l"
    note = (
        "slightly under the stated bound; Q_l orthonormalised, which fits and is not what is said"
    )
    return (PARTLY if close and found["orthonormal"] < 2 / 3 else REPRODUCED), ours, note


def _preconditioned(v: Values) -> Verdict:
    p = v["preconditioned"]
    paper = (7.09, 18.98, 18.76)
    inside = all(a <= x <= b for a, x, b in zip(p["q10"], paper, p["q90"], strict=True))
    ours = ", ".join(
        f"{m:.3g} (mean {a:.3g}, 10 to 90 %: {low:.2g} to {high:.3g})"
        for m, a, low, high in zip(p["median"], p["mean"], p["q10"], p["q90"], strict=True)
    )
    note = (
        "medians; heavy-tailed, so a mean of few draws says little; preconditioning makes κ_l worse"
    )
    return (REPRODUCED if inside else PARTLY), ours, note


def _proposition2(v: Values) -> Verdict:
    rows = [r for r in v["proposition2"] if r["beta2"] < 1]
    holds = all(abs(r["end_over_half_eta"] - 1) < 1e-6 for r in rows)
    ours = "; ".join(f"β₂ = {r['beta2']}: ends at {r['end_over_half_eta']:.4g} · η/2" for r in rows)
    deepest = min(r["log10_least"] for r in rows)
    note = (
        "a cycle of period 2 about the minimum; on the way |w| falls to "
        f"10^{deepest:.0f}, so that in floating point β₂ ≥ 0.999 seems to converge"
    )
    return (REPRODUCED if holds else NOT_REPRODUCED), ours, note


def _case(name: str, *, adam_wins: bool) -> Callable[[Values], Verdict]:
    def rule(v: Values) -> Verdict:
        steps, draws = v[name], v["draws"][name]
        slow = "none" if steps["steps_adam099"] == "inf" else f"{steps['steps_adam099']:,.0f}"
        ours = (
            f"{draws['gradient_descent']:,.0f} steps against {draws['adam']:,.0f} (β₂ = 1); ratio "
            f"{draws['ratio']:.3g} (10 to 90 %: {draws['ratio_q10']:.2g} to "
            f"{draws['ratio_q90']:.3g}); β₂ = 0.99: {slow}"
        )
        model = f"of {v[name]['model']}; " if "model" in v[name] else ""
        note = f"{model}steps to {v['tolerance']:g} of the loss, medians of {v['num_draws']} draws"
        wins = draws["ratio_q10"] > 1
        alike = draws["ratio"] < 5
        if adam_wins:
            clear = REPRODUCED if wins else PARTLY if draws["ratio"] > 2 else NOT_REPRODUCED
            return clear, ours, note
        return (REPRODUCED if alike else NOT_REPRODUCED), ours, note

    return rule


def _table2_descent(v: Values) -> Verdict:
    slopes = [v[f]["gradient_descent_slope"] for f in ("heterogeneous", "homogeneous")]
    holds = all(abs(s - 1) < 0.05 for s in slopes)
    ours = f"κ^{slopes[0]:.2f} (blocks apart), κ^{slopes[1]:.2f} (blocks alike)"
    return (REPRODUCED if holds else NOT_REPRODUCED), ours, ""


def _table2_adam(v: Values) -> Verdict:
    apart, alike = (v[f]["adam_slope"] for f in ("heterogeneous", "homogeneous"))
    holds = abs(apart) < 0.1 and 0.6 < alike < 1.4
    ours = f"κ^{apart:.2f} where κ_l ≤ 3, κ^{alike:.2f} where κ_l = κ"
    note = "O(r max κ_l): only the condition numbers of the blocks count"
    return (REPRODUCED if holds else NOT_REPRODUCED), ours, note


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
        "mean |entry| of diagonal over other blocks, 2, 4 and 8 layers; the initialisation decides"
    )
    return (REPRODUCED if all(near) else PARTLY if any(near) else NOT_REPRODUCED), ours, note


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
    return (REPRODUCED if all(near) else PARTLY if any(near) else NOT_REPRODUCED), ours, note


def _slq(v: Values) -> Verdict:
    errors = v["errors"]
    quadrature = [max(e["quadrature_raw"], e["quadrature_lambda10"]) for e in errors.values()]
    total = [max(e["total_raw"], e["total_lambda10"]) for e in errors.values()]
    every, any_ = max(total) < 1e-14, min(quadrature) < 1e-14
    ours = (
        f"one vector's density: {min(quadrature):.1g} to {max(quadrature):.2g}; "
        f"the spectrum's: {min(total):.2g} to {max(total):.2g} (L1, of 2)"
    )
    note = (
        "below 1e-14 is the quadrature of one vector where the spectrum is narrow next to σ or of "
        "low rank; the ten probes leave orders of magnitude more"
    )
    return (REPRODUCED if every else PARTLY if any_ else NOT_REPRODUCED), ours, note


CLAIMS = (
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
        _case("case1", adam_wins=True),
    ),
    Claim(
        "Section 3, case 2",
        "With a CNN's block spectra both are alike",
        "similar (Fig. 8)",
        "fig8",
        _case("case2", adam_wins=False),
    ),
    Claim(
        "Section 3, case 3",
        "With blocks {1, 2, 3}, {99, 100, 101}, {4998, 4999, 5000} Adam is faster",
        "Adam faster by far (Fig. 8)",
        "fig8",
        _case("case3", adam_wins=True),
    ),
    Claim(
        "Section 3, case 4",
        "With the same eigenvalues dealt out evenly both are alike",
        "similar (Fig. 8)",
        "fig8",
        _case("case4", adam_wins=False),
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
        _theorem1("violations_proof", ""),
    ),
    Claim(
        "Theorem 1, with the stated η = min 1/C_{l,1}",
        "The same",
        "stated",
        "theory",
        _theorem1("violations_statement", "a slip of the statement: the proof uses min C_{l,1}"),
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
