"""The page about the estimator's errors, docs/accuracy.md, from what `study` measured."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from spectra_db import js0

NAMES = {"gpt": "GPT", "vit": "ViT", "cnn": "conv net", "mlp": "MLP"}

_PAGE = """# How far estimates are from the truth

Written by `make accuracy` ({machine}); what was measured is kept in `build/accuracy`, so that the
command goes on where it was stopped. P is the number of probes, m that of steps, and a block costs
P × m products. JS⁰ by λ10 at σ = 0.05, at initialisation, of rules that end with the steps taken,
but for [rules that are continued](#rules-that-are-continued), as metrics take them, and `--tol`.

## Against exact spectra

Small nets whose blocks were all diagonalised in float64 (`benchmarks/cases.py`): {nets}. Gaussian
probes look the same in every basis, so each setting was repeated {pool} / P times by Lanczos on the
diagonal matrices of these eigenvalues, which needs no products. All blocks are sampled here, those
of at most 1,000 parameters too, which the protocol diagonalises: real spectra are easier.

- plug-in, corrected: mean error of JS⁰ before and after the jackknife's correction, that is its
  bias; spread: standard deviation of the corrected value; stated: root mean square of the standard
  errors. All relative to the exact JS⁰.
- trace: mean |error| of Σ w̄ θ, divided by the rms eigenvalue; square: mean relative |error| of
  Σ w̄ θ²; W1: Wasserstein-1 distance to the exact spectrum, divided by the rms eigenvalue; means
  over blocks. Of these, a step more than two helps W1 alone.
- covers: part of the stated 90 % intervals that hold the exact JS⁰. Those of few steps miss it
  where `truncation_error` says so: it is not part of the interval.

{repeated}

{coverage}

{scaled}

{sections}
## To a tolerance

`harness spectrum --tol 0.02` of JS⁰ on the same nets, with real products and three seeds. Within:
both errors ended below the tolerance; error: against the exact JS⁰; stated: its standard error and
truncation error; all relative.

{tolerance}

## Against 30 probes × 200 steps

Models on real data in float32, by the protocol: blocks of at most 1,000 parameters are exact. The
reference took {reference_numbers}. Root mean square (and largest) error of the corrected JS⁰ over
disjoint groups of the reference's own probes, relative; groups of ten are a third of the reference,
so that their error is a fifth larger than it looks. A tenth of the paper's 1,000 products a block
is 3 × 33 or 4 × 25.

{reference}

{reference_verdict}

## Arithmetic

The same probes in other arithmetic, 3 × 40, all blocks sampled. largest: the most that a block's
largest |node| moved, relative; W1: mean over blocks of how far the rule moved, in rms eigenvalues;
JS⁰: the corrected value's change, relative, beside which its standard error is {js_error}. TF32 is
emulated: operands rounded to 10 bits, sums in float32. `medium` lets the processor multiply in
bfloat16, where it can.

{arithmetic}

## Rules that alternate

The full spectrum of an MLP of {num_params:,} parameters on digits, {near_zero:.0%} of whose mass is
within a fiftieth of the rms eigenvalue of zero. Wasserstein-1 in units of that rms: the errors of
three ways to take it with the same probe, against 250 reorthogonalised steps; the distance between
the rules in float32 and float64, between those of m and m + 1 steps in float64, and between two
probes.

{full}

Two rules of the same probe in float32 and in float64 can be further apart than two probes are, and
both be right. A rule has a node at the heap of eigenvalues near zero in every second step, and two
beside it in the others. Once Lanczos loses orthogonality it finds large eigenvalues again, which
takes a step each; in float32 that begins some steps earlier, so that after the same number of steps
the two are at different places of the alternation, while the probes of one arithmetic are at the
same. So the distance between arithmetics is a truncation error, of the size of a further step's
effect, not one of rounding: reorthogonalised rules err as much. Errors of W1 are known from more
steps (`truncation_error`), not from the spread of probes.
"""

_SCALED = """### Why intervals miss

Sampled again with other probes, {repetitions} times for each P, at 40 steps: all blocks, as above;
all blocks, but divided by their exact λ10; and as the protocol has it, with blocks of at most 1,000
parameters exact. jump: the largest ratio of neighbours among the 8th to the 13th largest
|eigenvalue|, over all blocks; bias (of corrected JS⁰), spread, stated (median), covers: see above.

{table}

Of {count} settings {inside} cover in 80 to 97 % as above, {known} with λ10 known, and {protocol}
by the protocol. So what is missed is the noise of λ10. It is the size above which lies a mass of 10
eigenvalues, and the sampled mass varies by √(20 / P). The head of a classifier of 10 classes has 9
outliers and then a gap: samples fall on either side of it, however many probes there are, JS⁰ has
two modes, and a symmetric interval about one of them need not reach the truth in the other. The
protocol diagonalises small heads, as all here are. What is left then is a bias of the conv
net, whose eigenvalues fall steeply about the 10th; the jackknife, whose scales stay, doesn't
correct it. Where a larger block has a gap beside its 10th eigenvalue, trust intervals less, and
look at the scale `own_rms` too, which can't jump. Of P = 10 the tables above have 18 repetitions,
whose coverage is known to 9 %; that of 60 is known to 5 %.
"""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; the first column is text, the others numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rms(rows: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """Return the root mean square of column `error` of each group of rows."""
    return (rows["error"] ** 2).groupby([rows[c] for c in by]).mean() ** 0.5


def percent(x: float, sign: bool = False) -> str:
    """Return a fraction in per cent, with two digits."""
    text = f"{100 * x:+.2g}" if sign else f"{100 * x:.2g}"
    return (f"{100 * x:+.0f}" if sign else f"{100 * x:.0f}") if abs(x) >= 0.995 else text


def render(
    *,
    truths: Mapping[str, pd.DataFrame],
    repeated: Mapping[str, pd.DataFrame],
    scaled: Mapping[str, pd.DataFrame],
    exact_heads: Mapping[str, pd.DataFrame],
    sections: Sequence[str],
    tolerance: Mapping[str, pd.DataFrame],
    reference: Mapping[str, pd.DataFrame],
    arithmetic: Mapping[str, pd.DataFrame],
    full: pd.DataFrame,
) -> str:
    """Return the page; see `study.main` for what it is given."""
    sizes = {kind: rows["num_params"] for kind, rows in truths.items()}
    known = {kind: js0(rows, scale="lambda10").value for kind, rows in truths.items()}
    first = next(iter(repeated.values()))
    return _PAGE.format(
        machine=f"{platform.machine()}, one thread",
        nets="; ".join(
            f"{NAMES[k]}, {len(n)} blocks of {min(n):,} to {max(n):,} parameters, "
            f"JS⁰ {known[k]:.3f}"
            for k, n in sizes.items()
        ),
        pool=3 * int(first[["num_probes", "num_steps"]].eq([3, 40]).all(axis=1).sum()),
        repeated="\n\n".join(_repeated(NAMES[k], rows, known[k]) for k, rows in repeated.items()),
        coverage=_coverage(repeated, known),
        scaled=_scaled(scaled, exact_heads, known),
        sections="\n".join(sections),
        tolerance=_tolerance(tolerance),
        reference_numbers=", ".join(
            f"{name} {rows['seconds'].iloc[0]:.2g} s of processor a step "
            f"({rows['num_sampled'].iloc[0]} of {rows['num_blocks'].iloc[0]} blocks sampled)"
            for name, rows in reference.items()
        ),
        reference=_reference(reference),
        reference_verdict=_reference_verdict(reference),
        js_error=", ".join(
            f"{percent(rows['standard_error'].iloc[0] / rows['corrected'].iloc[0])} % ({NAMES[k]})"
            for k, rows in arithmetic.items()
        ),
        arithmetic=_arithmetic(arithmetic),
        num_params=int(full["num_params"].iloc[0]),
        near_zero=float(full["near_zero"].iloc[0]),
        full=_full(full),
    )


def _repeated(name: str, rows: pd.DataFrame, truth: float) -> str:
    header = ["P × m", "plug-in %", "corrected %", "spread %", "stated %", "trace", "square %"]
    header += ["W1", "covers %"]
    lines = []
    for (num_probes, num_steps), group in rows.groupby(["num_probes", "num_steps"]):
        stated = (group["standard_error"] ** 2).mean() ** 0.5 / truth
        lines.append(
            [
                f"{num_probes} × {num_steps}",
                percent(group["value"].mean() / truth - 1, sign=True),
                percent(group["corrected"].mean() / truth - 1, sign=True),
                percent(group["corrected"].std() / truth),
                percent(stated),
                f"{group['trace'].mean():.2g}",
                percent(group["square"].mean()),
                f"{group['w1'].mean():.2g}",
                f"{100 * covered(group, truth).mean():.0f}",
            ]
        )
    return f"### {name}\n\n{table(header, lines)}"


def covered(group: pd.DataFrame, truth: float) -> pd.Series:
    """Tell which intervals hold the truth."""
    return (group["ci_low"] <= truth) & (truth <= group["ci_high"])


def _coverage(repeated: Mapping[str, pd.DataFrame], truths: Mapping[str, float]) -> str:
    most = max(rows["num_steps"].max() for rows in repeated.values())
    lines, every = [], []
    for kind, rows in repeated.items():
        rows = rows[rows["num_steps"] == most]
        hits = covered(rows, truths[kind])
        every.append(hits.groupby(rows["num_probes"]).mean())
        lines.append([NAMES[kind], *(f"{100 * x:.0f}" for x in every[-1])])
    lines.append(["mean of the four", *(f"{100 * x:.0f}" for x in np.mean(every, axis=0))])
    header = ["covers %", *(f"P = {p}" for p in every[0].index)]
    inside = sum(((by >= 0.8) & (by <= 0.97)).sum() for by in every)
    count = sum(len(by) for by in every)
    return (
        f"Intervals at {most} steps, where truncation is over: {inside} of {count} settings cover "
        f"in 80 to 97 % of repetitions.\n\n{table(header, lines)}"
    )


def _scaled(
    found: Mapping[str, pd.DataFrame],
    exact_heads: Mapping[str, pd.DataFrame],
    truths: Mapping[str, float],
) -> str:
    header = ["net", "jump", "P"]
    for what in ("all sampled", "λ10 known", "protocol"):
        header += [f"{what}: bias %", "spread %", "stated %", "covers %"]
    lines, hits = [], np.zeros((0, 3))
    for kind, rows in found.items():
        truth = truths[kind]
        for num_probes, group in rows.groupby("num_probes"):
            heads = exact_heads[kind]
            ways = [group[group["scale"] == scale] for scale in ("lambda10", "raw")]
            ways.append(heads[heads["num_probes"] == num_probes])
            line = [NAMES[kind], f"{rows['jump'].iloc[0]:.3g}", str(num_probes)]
            covers = [100 * covered(way, truth).mean() for way in ways]
            for way, hit in zip(ways, covers, strict=True):
                line += [
                    percent(way["corrected"].mean() / truth - 1, sign=True),
                    percent(way["corrected"].std() / truth),
                    percent(way["standard_error"].median() / truth),
                    f"{hit:.0f}",
                ]
            lines.append(line)
            hits = np.vstack([hits, covers])
    inside, known, protocol = ((hits >= 80) & (hits <= 97)).sum(axis=0)
    return _SCALED.format(
        table=table(header, lines),
        repetitions=len(group) // 2,
        count=len(hits),
        inside=inside,
        known=known,
        protocol=protocol,
    )


def _tolerance(found: Mapping[str, pd.DataFrame]) -> str:
    lines = []
    for kind, rows in found.items():
        for row in rows.itertuples():
            stated = row.standard_error / row.corrected, row.truncation_error / row.corrected
            lines.append(
                [
                    NAMES[kind],
                    f"{row.num_probes} × {row.num_steps}",
                    f"{row.num_probes * row.num_steps:,}",
                    "yes" if row.within else "no",
                    percent(row.corrected / row.truth - 1, sign=True),
                    *map(percent, stated),
                    "yes" if row.ci_low <= row.truth <= row.ci_high else "no",
                ]
            )
    header = ["net", "P × m", "products a block", "within", "error %", "stated %", "truncation %"]
    return table([*header, "interval holds the truth"], lines)


def _errors(rows: pd.DataFrame) -> pd.DataFrame:
    """Return root mean square and largest error of each setting, by products a block."""
    truth = rows["corrected"].iloc[0]
    few = rows.iloc[1:].assign(error=lambda r: r["corrected"] / truth - 1)
    setting = ["num_probes", "num_steps"]
    most = few["error"].abs().groupby([few[c] for c in setting]).max()
    return pd.DataFrame({"rms": rms(few, setting), "most": most})


def _reference(found: Mapping[str, pd.DataFrame]) -> str:
    errors = {name: _errors(rows) for name, rows in found.items()}
    lines = []
    for key in next(iter(errors.values())).index:
        cells = [
            f"{percent(e.loc[key, 'rms'])} ({percent(e.loc[key, 'most'])})" for e in errors.values()
        ]
        lines.append([f"{key[0]} × {key[1]}", f"{key[0] * key[1]:,}", *cells])
    values = (r[["corrected", "standard_error"]].iloc[0] for r in found.values())
    first = [
        "reference JS⁰ ± standard error",
        "6,000",
        *("{:.4f} ± {:.4f}".format(*v) for v in values),
    ]
    return table(["P × m", "products a block", *(f"{n} %" for n in errors)], [first, *lines])


def _reference_verdict(found: Mapping[str, pd.DataFrame]) -> str:
    lines = []
    for name, rows in found.items():
        errors = _errors(rows)
        good = [(p * m, p, m) for (p, m), e in errors.iterrows() if e["rms"] <= 0.02]
        if good:
            products, p, m = min(good)
            lines.append(
                f"- {name}: within 2 % (root mean square) from {p} × {m}, {products} products."
            )
        else:
            best = errors["rms"].min()
            lines.append(
                f"- {name}: not within 2 % by 1,000 products; the best is {percent(best)} %."
            )
    return "\n".join(lines)


def _arithmetic(found: Mapping[str, pd.DataFrame]) -> str:
    header = ["arithmetic"]
    for kind in found:
        header += [f"{NAMES[kind]}: largest", "W1", "JS⁰ %"]
    lines = []
    first = next(iter(found.values()))
    for i, name in enumerate(first["arithmetic"]):
        line = [name]
        for rows in found.values():
            row, base = rows.iloc[i], rows.iloc[0]
            line += [f"{row['largest']:.1g}", f"{row['w1']:.1g}"]
            line.append(f"{100 * (row['corrected'] / base['corrected'] - 1):+.1g}")
        lines.append(line if i else [name, *["0", "0", "0"] * len(found)])
    return table(header, lines)


def _full(rows: pd.DataFrame) -> str:
    names = [c for c in rows.columns if c not in ("num_steps", "num_params", "near_zero")]
    lines = [[f"{r['num_steps']:.0f}", *(f"{r[c]:.3f}" for c in names)] for _, r in rows.iterrows()]
    return table(["m", *names], lines)
