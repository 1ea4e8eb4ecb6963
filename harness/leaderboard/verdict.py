"""The verdict on JS⁰ of raw eigenvalues: fixed rules, a sentence and lines made from numbers.

docs/verdict.md has the rules, fixed before the first run. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from harness.leaderboard import inference
from harness.leaderboard.evidence import (
    DUMMIES,
    MODALITIES,
    PRIMARY,
    Design,
    Pair,
    checked,
    compare_pairs,
    error_of,
    measures,
)
from harness.leaderboard.ranks import Array

MIN_ENTRIES = 16
PLANNED = 18
TRUE_RHO = 0.6
# At n = 18: p < 0.05, and the 5 % quantile under a true ρ of 0.6.
SUPPORTS_ABOVE = 0.40
REFUTES_BELOW = 0.25
SUPPORTS, REFUTES, UNDECIDED, NOTHING = (
    "supports", "refutes as a predictor at this scale", "undecided", "nothing is ranked",
)  # fmt: skip
_NAME = "JS⁰ of raw eigenvalues at initialisation"


@dataclass(frozen=True)
class Gate:
    """Whether the protocol's gate holds: it does where both are empty.

    Attributes:
        reasons: Why it does not.
        unknown: Entries of it whose speed-up is not known yet.
    """

    reasons: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What the page says first.

    Attributes:
        answer: One of SUPPORTS, REFUTES, UNDECIDED, NOTHING.
        sentence: It in a sentence, with the numbers.
        lines: The numbers, a line each.
        measures: Table of `evidence.measures`; empty where nothing is ranked.
        pairs: Table of `evidence.compare_pairs`; likewise.
        chances: Columns true_rho, primary (ρ is above the bound), supports, refutes, undecided;
            likewise.
    """

    answer: str
    sentence: str
    lines: tuple[str, ...]
    measures: pd.DataFrame
    pairs: pd.DataFrame
    chances: pd.DataFrame

    @property
    def parts(self) -> tuple[str, str]:
        """What the sentence says before its colon, such as "Undecided", and after it."""
        answer, _, reasons = self.sentence.partition(": ")
        return answer, reasons


@dataclass(frozen=True)
class Rule:
    """The bounds at the n that is there.

    Attributes:
        n: Entries with J that count.
        above: ρ must exceed it: 0.40 at n = 18, else the critical value of p < 0.05.
        below: ρ below it refutes: 0.25 at n = 18, else the 5 % quantile under a true ρ of 0.6, at
            most `above`.
        pairs: Decided pairs that must be right: p < 0.05; None where even all would not do.
    """

    n: int
    above: float
    below: float
    pairs: int | None

    @classmethod
    def of(cls, j: Array, design: Design) -> Rule:
        """Compute the bounds from the ties and the decided pairs that are there."""
        n, needed = len(j), inference.pairs_needed(len(design.sign))
        if n == PLANNED:
            return cls(n, SUPPORTS_ABOVE, REFUTES_BELOW, needed)
        above = inference.critical_value(j, design.y)
        drawn = inference.spearman(inference.related(design.y, TRUE_RHO), design.y)
        below = float(np.quantile(drawn, inference.ALPHA))
        return cls(n, above, min(above, below), needed)

    def answers(self, x: Array, design: Design) -> tuple[npt.NDArray[np.str_], Array]:
        """Return the answer for each predictor of shape (..., n), and its ρ."""
        rho = inference.spearman(x, design.y)
        enough = design.right_pairs(x) >= (math.inf if self.pairs is None else self.pairs)
        given = inference.partial(x, design.y, design.has_attention)
        supports = (rho > self.above) & enough & (given > 0)
        return np.select([supports, rho < self.below], [SUPPORTS, REFUTES], UNDECIDED), rho

    def chances(self, design: Design) -> pd.DataFrame:
        """Return how often each answer is given, were the true ρ 0.6, or 0, by simulation.

        y, its ties and the decided pairs are those that are there; J is drawn.
        """
        table = []
        for true in (TRUE_RHO, 0.0):
            answers, rho = self.answers(inference.related(design.y, true), design)
            row = {"true_rho": true, "primary": float((rho > self.above).mean())}
            named = {"supports": SUPPORTS, "refutes": REFUTES, "undecided": UNDECIDED}
            table.append(row | {k: float((answers == word).mean()) for k, word in named.items()})
        return pd.DataFrame(table)


def verdict(
    entries: pd.DataFrame,
    rivals: Mapping[str, int],
    pairs: Sequence[Pair],
    gate: Gate,
) -> Verdict:
    """Return the verdict by the fixed rules, with its sentence and numbers.

    Args:
        entries: A row per entry. Columns model, family (its architecture), modality (images or
            text), y (log2 speed-up; 2, or -2 where SGD wins, if beyond 4T), y_error, censored (y is
            beyond 4T), y_prime, trained (it counts), at_edge (a best rate is at an edge),
            adam_needed (yes, no, unclear), has_attention, log_params, log_classes, J and the
            rivals (nan where missing); a measure's <name>_error, or <name>_low and <name>_high
            (95 %), over initialisation seeds, if known.
        rivals: Column of each rival, and 1 if more of it is said to need Adam more, else -1: the
            whole list, fixed beforehand, as Holm's correction counts it.
        pairs: Pairs of entries that differ in one factor.
        gate: The gate's result.

    Raises:
        UserError: The table is not as described.
    """
    rows = checked(entries, rivals, pairs)
    reasons = _why_nothing(rows, gate)
    if reasons:
        sentence = f"Nothing is ranked: {'; '.join(reasons)}."
        empty = pd.DataFrame()
        return Verdict(NOTHING, sentence, (*reasons, *_left_out(rows)), empty, empty, empty)
    counting = rows[rows["trained"]]
    compared = compare_pairs(rows, pairs)
    with_j = counting[counting[PRIMARY].notna()]
    design, j = Design.of(with_j, compared), with_j[PRIMARY].to_numpy(np.float64)
    rule = Rule.of(j, design)
    table = measures(counting, rivals, compared)
    answer = str(rule.answers(j, design)[0])
    chances = rule.chances(design)
    lines = [
        *_primary_lines(table.iloc[0], rule),
        _dummies_line(table),
        _pairs_line(compared, design, with_j),
        *_chance_lines(chances, rule),
        *_left_out(rows),
    ]
    sentence = _sentence(answer, table.iloc[0], rule, chances)
    return Verdict(answer, sentence, tuple(lines), table, compared, chances)


def _why_nothing(rows: pd.DataFrame, gate: Gate) -> list[str]:
    """Return why nothing may be ranked; empty where it may."""
    reasons = []
    if gate.reasons:
        reasons.append(f"the gate does not hold ({'; '.join(gate.reasons)})")
    if gate.unknown:
        reasons.append(f"the gate waits for the runs of {' and '.join(gate.unknown)}")
    used = rows[rows["trained"] & rows[PRIMARY].notna()]
    if len(used) < MIN_ENTRIES:
        have = "1 entry counts and has" if len(used) == 1 else f"{len(used)} entries count and have"
        reasons.append(f"{have} {PRIMARY}, where {MIN_ENTRIES} are needed")
    same = [c for c in ("y", PRIMARY) if used[c].min() == used[c].max()]
    if same and len(used) > 1:
        reasons.append(f"all entries have the same {' and the same '.join(same)}")
    edge = rows.loc[rows["at_edge"], "model"].tolist()
    if edge:
        reasons.append(f"a best learning rate is at an edge ({', '.join(edge)})")
    return reasons


def _left_out(rows: pd.DataFrame) -> list[str]:
    """Name the entries that don't enter the primary test."""
    trained = rows["trained"]
    lacking = {"Not trained": ~trained, f"Without {PRIMARY}": trained & rows[PRIMARY].isna()}
    return [f"{w}: {', '.join(rows.loc[m, 'model'])}." for w, m in lacking.items() if m.any()]


def _sentence(answer: str, j: Any, rule: Rule, chances: Any) -> str:
    numbers = f"ρ = {j.rho:.2f} over {j.n} entries ({_p(j.p)})"
    pairs = f"{j.right_pairs} of {j.decided_pairs} decided pairs"
    what = "how many more steps SGD needs than AdamW"
    if answer == SUPPORTS:
        return (
            f"Supported: {_NAME} ranks models by {what}, with Spearman's {numbers} where more than "
            f"{rule.above:.2f} was asked, the right order in {pairs}, and "
            f"ρ = {j.given_attention:.2f} given whether a model has attention."
        )
    if answer == REFUTES:
        return (
            f"Refuted as a predictor at this scale: {_NAME} does not rank models by {what}; "
            f"Spearman's {numbers} is below {rule.below:.2f}, where a true ρ of {TRUE_RHO} would "
            f"bring it with a chance of {100 * chances.refutes[0]:.0f} %, and it has the right "
            f"order in {pairs}."
        )
    given = _value(j.given_attention)
    return (
        f"Undecided: whether {_NAME} ranks models by {what} can't be told from Spearman's "
        f"{numbers}, the right order in {pairs} and ρ = {given} given whether a model has "
        f"attention; it {_missed(j, rule)}, and a true ρ of {TRUE_RHO} would have been supported "
        f"with a chance of {100 * chances.supports[0]:.0f} %."
    )


def _missed(j: Any, rule: Rule) -> str:
    """Say which conditions of support don't hold."""
    missed = []
    if not j.rho > rule.above:
        missed.append(f"ρ above {rule.above:.2f}")
    if rule.pairs is None:
        missed.append("5 decided pairs, all of them right")
    elif j.right_pairs < rule.pairs:
        missed.append(f"the right order in at least {rule.pairs} pairs")
    if not j.given_attention > 0:
        missed.append("a positive ρ given attention")
    return f"lacks {' and '.join(missed)}"


def _primary_lines(j: Any, rule: Rule) -> list[str]:
    """Return the rule and the lines on J."""
    source = "fixed" if rule.n == PLANNED else f"p < 0.05, computed at n = {rule.n}"
    quantile = "fixed" if rule.n == PLANNED else "computed"
    needed = "at least 5 decided pairs" if rule.pairs is None else f"at least {rule.pairs} right"
    apart = (f"{m} {_value(j[f'rho_{m}'])}" for m in MODALITIES)
    return [
        f"Supports: ρ > {rule.above:.3f} ({source}), of {j.decided_pairs} decided pairs {needed}, "
        f"and ρ given attention > 0. Refutes: ρ < {rule.below:.3f} ({quantile}).",
        f"Primary: Spearman's ρ of {PRIMARY} with y over {j.n} entries is {_value(j.rho)}, "
        f"one-sided permutation {_p(j.p)}.",
        f"95 % intervals of ρ: [{_value(j.family_low)}, {_value(j.family_high)}] with families "
        f"resampled, [{_value(j.noise_low)}, {_value(j.noise_high)}] by the errors of y and "
        f"{PRIMARY}. Lowest without one architecture: {_value(j.without_low)} "
        f"(without {j.without}).",
        f"Apart: {', '.join(apart)}. With y′ in place of y: {_value(j.rho_y_prime)}.",
        f"Given attention: {_value(j.given_attention)}; given log parameters: "
        f"{_value(j.given_params)}.",
    ]


def _dummies_line(table: pd.DataFrame) -> str:
    """Return which dummies J beats, and how it does beside the majority."""
    j = table.iloc[0]
    beaten = [d for d in DUMMIES if j.rho > table.loc[table["measure"] == d, "rho"].item()]
    return (
        f"{PRIMARY} has a larger ρ than these of the {len(DUMMIES)} dummies: "
        f"{', '.join(beaten) or 'none'}. A threshold on {PRIMARY} set on the other families tells "
        f"yes from no in {_value(j.accuracy)} of the clear entries, always the more "
        f"frequent answer in {_value(j.majority)}."
    )


def _pairs_line(compared: pd.DataFrame, design: Design, with_j: pd.DataFrame) -> str:
    """Return the paired test."""
    j = with_j[PRIMARY].to_numpy(np.float64)
    right, decided = int(design.right_pairs(j)), len(design.sign)
    shuffled = design.right_pairs(inference.ranks(j)[inference.orders(len(j))])
    error = error_of(with_j, PRIMARY)
    close = np.abs(j[design.a] - j[design.b]) <= 2 * np.hypot(error[design.a], error[design.b])
    return (
        f"Pairs: {decided} of {len(compared)} decided; the larger {PRIMARY} has the larger y in "
        f"{right}: {_p(inference.binomial_p(right, decided))} were they independent, "
        f"{_p(float((shuffled >= right).mean()))} with {PRIMARY} permuted among the entries, which "
        f"pairs share. In {int(close.sum())} of the decided ones the difference of {PRIMARY} is "
        "within 2 standard errors."
    )


def _chance_lines(chances: pd.DataFrame, rule: Rule) -> list[str]:
    """Return what the rule would say under a true ρ of 0.6, and under none."""
    rows: Any = chances.itertuples()
    return [
        f"Power at n = {rule.n}, were the true ρ {c.true_rho:g}: ρ > {rule.above:.2f} with a "
        f"chance of {c.primary:.2f}; by the whole rule supported {c.supports:.2f}, refuted "
        f"{c.refutes:.2f}, undecided {c.undecided:.2f}."
        for c in rows
    ]


def _value(x: float) -> str:
    return "undefined" if np.isnan(x) else f"{x:.2f}"


def _p(p: float) -> str:
    return "p undefined" if np.isnan(p) else "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"
