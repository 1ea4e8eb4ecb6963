"""Protocol 2 on the pages: what its tables say of each entry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from harness import registry
from harness.leaderboard.ranking import Ranking
from harness.predictors import PREDICTORS
from harness.registry.ranked import PAIRS

SPEEDUP_TIERS = ("ranked", "reference")
# What a verdict and its pages are made of.
FILES = tuple(f"{table}/*.parquet" for table in ("models", "speedups", "predictors", "trials"))
_WORDS = {p.name: p.what for p in PREDICTORS} | {"J": "JS⁰ of raw eigenvalues (J)"}


def of_entries(found: Ranking) -> list[dict[str, Any]]:
    """Return what the first page shows of each entry, the largest speed-up first.

    Entries that are not complete have no y and say why as `reason`. An end of an interval that is
    None has no bound.
    """
    tables = [found.entries.assign(ranked=True), found.references.assign(ranked=False)]
    rows: list[dict[str, Any]] = []
    for table in tables:
        rows += [_standing(row) for row in table.to_dict("records")]
    rows.sort(key=lambda row: -math.inf if row["y"] is None else row["y"], reverse=True)
    empty = dict.fromkeys(("y", "low", "high", "J", "J_error"))
    waiting = [
        {"model": name, "family": registry.get(name).family, "ranked": True, "reason": reason}
        | {"needed": "", "speedup": "–", **empty}
        for name, reason in found.pending.items()
    ]
    return rows + waiting


def points(standings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries that a picture draws J against speed-up of.

    None while J of a ranked entry with a speed-up is not known: it would show a part of them.
    """
    known = [row for row in standings if row["y"] is not None]
    is_whole = all(row["J"] is not None for row in known if row["ranked"])
    return [row for row in known if row["J"] is not None] if is_whole else []


def measure_table(measures: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the verdict's numbers of each measure, for a table; in the order fixed beforehand."""
    shown = ["kind", "n", "rho", "p", "p_holm", "right_pairs", "decided_pairs"]
    shown += ["difference", "difference_low", "difference_high"]
    return [
        {"label": _WORDS.get(row["measure"], row["measure"]) + (", less of it" * (row["sign"] < 0))}
        | {key: row[key] for key in shown}
        for row in measures.to_dict("records")
    ]


def pair_table(found: Ranking) -> list[dict[Any, Any]]:
    """Return the pairs, for a table, each with its `outcome`: right, wrong or why none.

    A decided one says whose interval has no bound: where `adam_needed` is unclear for that reason,
    the standard errors by which pairs are decided may still be small. Pairs of entries that are
    not complete come last.
    """
    bounds = found.entries.set_index("model")[["y_low", "y_high"]]
    unbounded = set(bounds.index[bounds.isna().any(axis=1)])
    words = {True: "right", False: "wrong"}
    rows = found.verdict.pairs.to_dict("records")
    for row in rows:
        row["outcome"] = words[row["right"]] if row["decided"] else f"undecided: {row['why']}"
        if row["decided"] and (open_ := unbounded & {row["model_a"], row["model_b"]}):
            row["outcome"] += f"; the interval of {' and '.join(sorted(open_))} has no bounds"
    waiting = [pair for pair in PAIRS if found.pending.keys() & {*pair[1:]}]
    return rows + [
        {"pair": name, "model_a": a, "model_b": b, "dy": math.nan, "dy_error": math.nan}
        | {"decided": False, "dj": math.nan, "right": None, "outcome": "waits for training runs"}
        for name, a, b in waiting
        if not found.verdict.pairs.empty
    ]


def _standing(row: dict[Any, Any]) -> dict[str, Any]:
    trained = bool(row["trained"])
    columns = {"y": "y", "low": "y_low", "high": "y_high", "J": "J", "J_error": "J_error"}
    numbers = {key: short(row[column]) if trained else None for key, column in columns.items()}
    return {
        "model": row["model"],
        "family": row["family"],
        "ranked": row["ranked"],
        "needed": answer(row),
        "speedup": interval(
            *(numbers[end] for end in ("y", "low", "high")), is_bound=bool(row["censored"])
        ),
        "reason": "",
    } | numbers


def answer(row: Mapping[Any, Any]) -> str:
    """Say whether a model needs Adam by its speed-up, in a word or two of a row of `speedups`."""
    return str(row["adam_needed"]) if row["trained"] else "not trained"


def interval(y: float | None, low: float | None, high: float | None, *, is_bound: bool) -> str:
    """Return a speed-up with its interval, as 1.75 [1.73, 1.78], or > 2.00 [1.50, ∞]."""
    if y is None:
        return "–"
    sign = "" if not is_bound else "> " if y > 0 else "< "
    ends = f"[{'−∞' if low is None else f'{low:z.2f}'}, {'∞' if high is None else f'{high:z.2f}'}]"
    return f"{sign}{y:z.2f} {ends}".replace("-", "−")


def short(value: Any) -> float | None:
    """Round to six digits; None for nan."""
    return None if pd.isna(value) else float(f"{value:.6g}")
