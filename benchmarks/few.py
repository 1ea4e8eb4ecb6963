"""How far JS⁰ is from the truth after few products: on nets that are known, and on a large one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

import spectra_db
from benchmarks.cases import gpt_10m
from benchmarks.study import TOLERANCE, groups_of, rows_of, runs_of, sampled
from benchmarks.study_page import NAMES, percent, rms, table

# Probes × steps, by products, and how often each is sampled.
LADDER = ((2, 8), (2, 10), (3, 8), (3, 10), (4, 8), (5, 8), (4, 12), (5, 12), (4, 20))
REPETITIONS = 36
SCALES = ("lambda10", "raw", "own_rms")
# Of the large GPT: seeds of its probes, and the steps of the first probe and of the others.
SEEDS, LONG, SHORT = (1, 2, 3, 4, 5), 40, 10
_LARGE = "GPT of 10.8 M"


def few(truth: pd.DataFrame, scales: Sequence[str] = SCALES) -> pd.DataFrame:
    """Sample known spectra with each setting of LADDER, all blocks, by rules that are continued.

    Args:
        truth: Exact rows.
        scales: What eigenvalues are divided by.

    Returns:
        Per setting, sample and scale the relative `error` of JS⁰ as `best` gives it; `truncation`
        is False.
    """
    known = {scale: spectra_db.js0(truth, scale=scale).value for scale in scales}
    most_probes, most_steps = (max(numbers) for numbers in zip(*LADDER, strict=True))
    pools = sampled(truth, REPETITIONS * most_probes, most_steps)
    found = pd.DataFrame(
        {"num_probes": p, "num_steps": m, "scale": s, "error": best(rows, s) / known[s] - 1}
        for p, m in LADDER
        for rows in groups_of(truth, pools, p, m, REPETITIONS)
        for s in scales
    )
    return found.assign(truncation=False)


def large_rows() -> pd.DataFrame:
    """Take five probes of every block of the GPT of 10.8 million parameters: 80 products a block.

    A probe has a seed of its own; the first has LONG steps, the others SHORT.
    """
    case = gpt_10m()
    found = []
    for probe, seed in enumerate(SEEDS):
        steps = SHORT if probe else LONG
        rows = case.spectra(num_probes=1, num_steps=steps, seed=seed, memory_budget=8 << 30)
        found.append(rows.assign(probe=probe))
    return pd.concat(found, ignore_index=True).drop(columns=["reason", "tolerance"])


def large(rows: pd.DataFrame) -> pd.DataFrame:
    """Return what `few` does of each subset of one to three of the large GPT's probes.

    The truth is the value of all five × SHORT. Where `truncation` holds, the error is that of the
    first probe after so many steps, against its LONG.
    """
    runs = runs_of(rows)
    blocks = rows[rows["probe"] == 0]

    def value(probes: Sequence[int], num_steps: int, scale: str) -> float:
        return best(rows_of(blocks, runs, probes, num_steps), scale)

    found = []
    for scale, num_steps in itertools.product(SCALES, (8, SHORT)):
        truth = value(range(len(SEEDS)), SHORT, scale)
        numbers = {"num_steps": num_steps, "scale": scale}
        change = value([0], num_steps, scale) / value([0], LONG, scale) - 1
        found.append(numbers | {"num_probes": 1, "error": change, "truncation": True})
        for num_probes in (1, 2, 3):
            numbers |= {"num_probes": num_probes, "truncation": False}
            for probes in itertools.combinations(range(len(SEEDS)), num_probes):
                found.append(numbers | {"error": value(probes, num_steps, scale) / truth - 1})
    return pd.DataFrame(found)


def best(rows: pd.DataFrame, scale: str) -> float:
    """Return JS⁰, corrected where there are probes enough for that."""
    e = spectra_db.js0(rows, scale=scale)
    return e.value if np.isnan(e.corrected) else e.corrected


def products_within(errors: pd.DataFrame, scale: str, tolerance: float = TOLERANCE) -> int | None:
    """Return the fewest products a block whose error, in root mean square, is within a tolerance.

    Args:
        errors: As `few` and `large` return them.
        scale: One of those in it.
        tolerance: Relative.
    """
    found = _rms(errors)
    return min((p * m for p, m, s in found[found <= tolerance].index if s == scale), default=None)


def _rms(errors: pd.DataFrame) -> pd.Series:
    return rms(errors[~errors["truncation"]], ["num_probes", "num_steps", "scale"])


def section(found: Mapping[str, pd.DataFrame], rows: pd.DataFrame) -> str:
    """Return the page's section.

    Args:
        found: What `few` gives, by the kind of net.
        rows: Of the large GPT.
    """
    errors = {NAMES[kind]: of_kind for kind, of_kind in found.items()} | {_LARGE: large(rows)}
    means = {name: _rms(of_net) for name, of_net in errors.items()}
    settings = sorted({(p * m, p, m) for e in means.values() for p, m, _ in e.index})
    lines = [
        [
            f"{p} × {m}",
            str(products),
            *(
                ", ".join(percent(e[p, m, s]) for s in SCALES) if (p, m, SCALES[0]) in e else "–"
                for e in means.values()
            ),
        ]
        for products, p, m in settings
    ]
    fewest = [
        [name, *(str(products_within(of_net, s) or "more") for s in SCALES)]
        for name, of_net in errors.items()
    ]
    cut = errors[_LARGE][errors[_LARGE]["truncation"]].set_index(["num_steps", "scale"])["error"]
    truncation = [[str(m), *(percent(cut[m, s], sign=True) for s in SCALES)] for m in (8, SHORT)]
    sizes = rows.drop_duplicates("block")["num_params"]
    return _SECTION.format(
        repetitions=REPETITIONS,
        blocks=f"{len(sizes)} blocks of {sizes.min():,} to {sizes.max():,}",
        subsets=f"the subsets of {len(SEEDS)} probes, against all of them × {SHORT}",
        errors=table(["P × m", "products a block", *(f"{name} %" for name in means)], lines),
        fewest=table([f"products a block to {TOLERANCE:.0%}", *SCALES], fewest),
        long=LONG,
        truncation=table(["steps", *(f"{s} %" for s in SCALES)], truncation),
    )


_SECTION = """## Few products

Error of JS⁰ after few products a block, of rules that are continued, in root mean square and
relative: by λ10, of raw eigenvalues, and by the block's own rms. The small nets above were sampled
{repetitions} times, all blocks, and are set against their exact spectra; of the GPT of 10.8 million
parameters ({blocks}, 512 tokens, `benchmarks/cases.py`) it is
{subsets}. Three probes or more give the corrected value,
fewer the plug-in one.

{errors}

{fewest}

Truncation of the large GPT, the first probe against its own {long} steps:

{truncation}
"""
