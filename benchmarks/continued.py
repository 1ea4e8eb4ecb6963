"""What continuing T is worth: metrics of rules that end, and that go on, against exact measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from benchmarks.study import drawn
from benchmarks.study_page import percent, rms, table
from harness.estimator.lanczos import Recurrence, lanczos
from spectra_db.densities import Array, BlockSpectrum
from spectra_db.heterogeneity import METRICS
from spectra_db.jackknife import Blocks
from spectra_db.quadrature import LENGTH, WINDOW, extended, gauss_rule
from spectra_db.truncation import HALF, TRUNCATION, parts_of, truncation_error

STEPS, PROBES, GROUPS = (8, 10, 15, 20, 40), 3, 4
NOTHING = 1e-3  # an error as small counts as none
UPDATES = 60  # of AdamW, where a net is trained
# Readings that three probes tell: of js0_paper that of raw eigenvalues alone.
READINGS = (
    *(("js0", scale) for scale in ("own_rms", "lambda10", "raw", "own_max", "global_max")),
    *(("js0_paper", "raw"), ("w1", "lambda10")),
)
# Other parts of the steps to average, and other lengths.
VARIED = ((1 / 4, LENGTH), (1 / 2, LENGTH), (1.0, LENGTH), (WINDOW, 45), (WINDOW, 100))
_NAMES = [" ".join(reading) for reading in READINGS]
# Steps, window and length of each rule; both 0: T ends.
SETTINGS = [
    (m, *rule)
    for m in STEPS
    for rule in ((0.0, 0), (WINDOW, LENGTH), *(VARIED if m in (10, 20) else ()))
]
# A rule of one probe: (eigenvalues, its measure on them, its recurrence) ↦ nodes and weights.
Rule = Callable[[Array, Array, Recurrence], tuple[Array, Array]]


def continued(truth: pd.DataFrame) -> pd.DataFrame:
    """Compare rules of known spectra with the probes' own measures, which no step cuts short.

    A probe v has the weights v_i² / |v|² at the eigenvalues: what its rule becomes with all steps.
    So the difference is truncation alone, and needs no average over probes.

    Returns:
        Per group of probes, reading, number of steps, window and length (both 0: T ends) the
        `error` relative to the measures' value, and of the protocol's own rules the `stated` one.
    """
    pools = {
        block: [
            (d.numpy(), (v**2 / (v @ v)).numpy(), lanczos(lambda x, d=d: d * x, v, max(STEPS)))
            for v in starts
        ]
        for block, d, starts in drawn(truth, PROBES * GROUPS)
    }
    found = []
    for group in range(GROUPS):
        probes = slice(PROBES * group, PROBES * (group + 1))
        exact = _values(pools, probes, lambda nodes, weights, run: (nodes, weights))
        for m, window, length in SETTINGS:
            values = _values(pools, probes, _rule(m, window, length))
            fewer = {}
            if (window, length) == (WINDOW, LENGTH):
                for part in (TRUNCATION, HALF):
                    fewer[part] = _values(pools, probes, _rule(int(part * m), window, length))
            for i, (_, scale) in enumerate(READINGS):
                numbers = {"group": group, "num_steps": m, "window": window, "length": length}
                numbers |= {"reading": _NAMES[i], "error": values[i] / exact[i] - 1}
                before = {part: fewer[part][i] for part in parts_of(scale) if fewer}
                stated = truncation_error(values[i], before) / exact[i] if before else np.nan
                found.append(numbers | {"stated": stated})
    return pd.DataFrame(found)


def _rule(num_steps: int, window: float, length: int) -> Rule:
    def rule(nodes: Array, weights: Array, run: Recurrence) -> tuple[Array, Array]:
        T = run.alphas[:num_steps], run.betas[:num_steps]
        ended = run.breakdown and len(run.alphas) <= num_steps
        return gauss_rule(*(extended(*T, window=window, length=length) if not ended else T))

    return rule


def _values(
    pools: dict[str, list[tuple[Array, Array, Recurrence]]], probes: slice, rule: Rule
) -> list[float]:
    """Return the plug-in value of each reading, of some probes' rules."""
    spectra = []
    for name, probes_of in pools.items():
        rules = tuple(rule(*probe) for probe in probes_of[probes])
        size = len(probes_of[0][0])
        spectra.append(BlockSpectrum(name, size, rules, False, False, (), 0))
    blocks = Blocks(spectra, 0, errors_known=False, extended=False)
    sigmas = (dict(METRICS[metric].readings)[scale] for metric, scale in READINGS)
    return [
        METRICS[metric].estimate(blocks, scale, sigma).value
        for (metric, scale), sigma in zip(READINGS, sigmas, strict=True)
    ]


def section(found: Mapping[str, pd.DataFrame]) -> str:
    """Return the page's section; `found` has what `continued` gives, by the name of each case."""
    every = pd.concat([rows.assign(case=c) for c, rows in found.items()], ignore_index=True)
    ended = every[every["length"] == 0]
    ours = every[(every["length"] == LENGTH) & np.isclose(every["window"], WINDOW)]
    return _SECTION.format(
        length=LENGTH,
        updates=UPDATES,
        both=f"{len(found)} cases, {GROUPS} groups of {PROBES} probes each",
        nothing=NOTHING,
        of_own_rms=_by_case(ended, ours, "js0 own_rms"),
        of_lambda10=_by_case(ended, ours, "js0 lambda10"),
        of_raw=_by_case(ended, ours, "js0 raw"),
        readings=_by_reading(ended, ours),
        varied=_varied(every[every["num_steps"].isin((10, 20)) & (every["length"] > 0)]),
        covered=_covered(ours),
    )


def _by_case(ended: pd.DataFrame, ours: pd.DataFrame, reading: str) -> str:
    names = list(dict.fromkeys(ours["case"]))
    means = [
        rows[rows["reading"] == reading].groupby(["num_steps", "case"])["error"].mean()
        for rows in (ended, ours)
    ]
    lines = [
        [str(m), *(" → ".join(percent(e[m, n], sign=True) for e in means) for n in names)]
        for m in STEPS
    ]
    return table(["steps", *(f"{name} %" for name in names)], lines)


def _by_reading(ended: pd.DataFrame, ours: pd.DataFrame) -> str:
    means = [rms(rows, ["reading", "num_steps"]) for rows in (ended, ours)]
    lines = [[n, *(" → ".join(percent(e[n, m]) for e in means) for m in STEPS)] for n in _NAMES]
    return table(["reading", *(f"{m} steps %" for m in STEPS)], lines)


def _varied(rows: pd.DataFrame) -> str:
    of_rule = rms(rows, ["num_steps", "reading", "window", "length"])
    columns = [(m, f"js0 {s}") for m in (10, 20) for s in ("own_rms", "lambda10", "raw")]
    lines = [
        [f"last {rule[0]:.0%} to {rule[1]}", *(percent(of_rule[*c, *rule]) for c in columns)]
        for rule in sorted({(WINDOW, LENGTH), *VARIED})
    ]
    return table(["mean of", *(f"{m}: {reading} %" for m, reading in columns)], lines)


def _covered(ours: pd.DataFrame) -> str:
    error = ours["error"].abs()
    hit = error <= np.maximum(ours["stated"], NOTHING)
    times = (ours["stated"] / error)[error > NOTHING]
    lines = []
    for name in (*_NAMES, "all"):
        rows = slice(None) if name == "all" else ours["reading"] == name
        by, numbers = hit[rows].groupby(ours["num_steps"]).mean(), times[rows]
        each = [f"{100 * by[m]:.0f}" for m in STEPS]
        lines.append([name, *each, f"{100 * hit[rows].mean():.0f}", f"{numbers.median():.2g}"])
    return table(["covered %", *(f"{m} steps" for m in STEPS), "any", "stated / true"], lines)


_SECTION = """## Rules that are continued

Metrics take the Gauss rule of T continued to {length} steps by the mean of the last third of its
alphas and betas (docs/protocol.md, Metrics). Here it is set beside the rule that ends, on the
small nets above at initialisation and after {updates} steps of AdamW, all blocks sampled: {both}.
The truth is what the same probes give with all steps: the measure of a probe v is known, (v · u)²
at the eigenvalue of each eigenvector u. So all that differs is truncation; how probes spread is
above. Errors are of plug-in values and relative.

By the block's own rms (`own_rms`), mean error, rule that ends → continued:

{of_own_rms}

By λ10, the same:

{of_lambda10}

Of raw eigenvalues, σ = √1e-5, the same:

{of_raw}

Root mean square error over all cases, by reading:

{readings}

Other means and lengths, root mean square error after 10 and after 20 steps:

{varied}

How often `truncation_error` ([protocol.md](protocol.md#error)) is at least the true error of
truncation, one below {nothing:.1%} counting as none, and in the median how many times the true
error it is:

{covered}
"""
