"""What changed between two versions of the tables: rows added, removed, or beyond their errors."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from spectra_db import rules, store
from spectra_db.schema import KEYS, LISTS, TABLES
from spectra_db.store import InvalidTable

# Which column states the error of which.
ERRORS = {
    "blocks": {
        name: f"{name}_error" for name in ("trace", "frobenius", "lambda_max", "lambda_min")
    },
    "heterogeneity": dict.fromkeys(("value", "corrected"), "standard_error"),
    "gaps": dict.fromkeys(("gap", "ci_low", "ci_high"), "standard_error")
    | {f"gap_from_reference{end}": "gap_from_reference_error" for end in ("", "_low", "_high")},
    "speedups": dict.fromkeys(("log2_speedup", "ci_low", "ci_high"), "standard_error")
    | {"relative_gap": "relative_gap_error"},
    "predictors": {"value": "standard_error"},
}
# Errors that are the error of no column alone.
_SIZES = {"truncation_error", "batch_error"}
# Standard errors of a difference that chance explains.
_ERRORS = 2.0
# Numbers without a stated error come from float32; a recomputation moves them by a few roundings.
_RELATIVE = 1e-5
# How a row came about, not what it says.
_CIRCUMSTANCES = {"run_id", "seconds", "peak_bytes", "started", "device", "microbatch_size"}
COLUMNS = ["change", "column", "before", "after", "allowed"]


def compare(old: Path, new: Path, table: str) -> pd.DataFrame:
    """Return the rows of a table that two folders do not have alike.

    Returns:
        The key's columns; change (added, removed, changed, or within: a number that moved by no
        more than the errors explain); and for the last two, per row, the column with the largest
        move next to what is allowed: column, before, after, allowed.

    Raises:
        InvalidTable: A file can't be read.
    """
    key = list(KEYS[table])
    parts = []
    for paths in _unlike(old, new, table):
        was, now = (_read(path, table).set_index(key) for path in paths)
        for rows, others, change in ((was, now, "removed"), (now, was, "added")):
            alone = rows.index[~rows.index.isin(others.index)]
            parts.append(alone.to_frame(index=False).assign(change=change))
        parts.append(_changes(table, was, now))
    columns = [*key, *COLUMNS]
    parts = [part for part in parts if len(part)]
    return (
        pd.concat(parts, ignore_index=True).reindex(columns=columns)
        if parts
        else pd.DataFrame(columns=columns)
    )


def removed(old: Path, new: Path) -> dict[str, pd.DataFrame]:
    """Return the keys that a later version lacks, per table; `leaderboard` is derived anew."""
    lost = {}
    for table in TABLES:
        if table == "leaderboard":
            continue
        key, parts = list(KEYS[table]), []
        for paths in _unlike(old, new, table):
            was, now = (_read(path, table, key) for path in paths)
            there = pd.MultiIndex.from_frame(now[key])
            parts.append(was[~pd.MultiIndex.from_frame(was[key]).isin(there)])
        if any(map(len, parts)):
            lost[table] = pd.concat(parts, ignore_index=True)
    return lost


def _unlike(old: Path, new: Path, table: str) -> Iterator[tuple[Path, Path]]:
    """Yield the paths of a model's rows in both folders, of which one may have none.

    Raises:
        InvalidTable: Files that are alike are damaged.
    """
    names = {path.name for root in (old, new) for path in (root / table).glob("*.parquet")}
    for name in sorted(names):
        was, now = (root / table / name for root in (old, new))
        if was.exists() and now.exists() and filecmp.cmp(was, now, shallow=False):
            store.raw(was)
        else:
            yield was, now


def _read(path: Path, table: str, columns: list[str] | None = None) -> pd.DataFrame:
    """Read a file of any version: columns that it lacks are empty."""
    names = columns or TABLES[table].names
    if not path.exists():
        return TABLES[table].empty_table().select(names).to_pandas()
    content = store.raw(path)
    for name in names:
        if name not in content.schema.names:
            empty = pa.nulls(content.num_rows, TABLES[table].field(name).type)
            content = content.append_column(name, empty)
    try:
        content = content.select(names).cast(TABLES[table].empty_table().select(names).schema)
    except (pa.ArrowException, ValueError) as error:
        raise InvalidTable(f"{path}: {error}") from error
    rows = content.to_pandas()
    for field in content.schema:  # arrays of several elements compare element by element
        if pa.types.is_list(field.type) and field.name not in LISTS:
            rows[field.name] = rows[field.name].map(tuple, na_action="ignore")
    repeated = rows.duplicated([key for key in KEYS[table] if key in names])
    if repeated.any():
        raise InvalidTable(
            f"{path}: the key of row {int(repeated.argmax())} repeats an earlier one"
        )
    return rows


def _changes(table: str, was: pd.DataFrame, now: pd.DataFrame) -> pd.DataFrame:
    """Return rows of the same key, the index, that differ, each with its largest move."""
    key = list(KEYS[table])
    places = now.index.get_indexer(was.index)
    was, now = was[places >= 0], now.iloc[places[places >= 0]]
    common = was.index
    names = [c for c in was.columns if c not in _CIRCUMSTANCES and c not in LISTS]
    moves = {name: _move(table, name, was, now) for name in names if table != "runs"}
    if table == "spectra":
        moves["nodes"] = _rules(was, now)
    if not moves or common.empty:
        return pd.DataFrame(columns=[*key, *COLUMNS])
    ratios = np.column_stack([ratio for *_, ratio in moves.values()])
    largest = np.argmax(np.nan_to_num(ratios, nan=-1.0, posinf=np.inf), axis=1)
    rows = []
    for at in np.flatnonzero(~np.isnan(ratios).all(axis=1)).tolist():
        name = list(moves)[largest[at]]
        numbers = [values[at] for values in moves[name][:3]]
        change = "changed" if ratios[at, largest[at]] > 1 else "within"
        place = common[at] if len(key) > 1 else (common[at],)
        rows.append([*place, change, name, *numbers])
    return pd.DataFrame(rows, columns=[*key, *COLUMNS])


# A column of rows of the same key before and after, by how much it may move, and its move over
# that: nan where there is none, inf where none is allowed. Shape (rows,) each.
_Move = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _move(table: str, column: str, was: pd.DataFrame, now: pd.DataFrame) -> _Move:
    before, after = was[column], now[column]
    same = np.asarray((before == after) | (before.isna() & after.isna()), dtype=bool)
    allowed = np.zeros(len(was))
    if pd.api.types.is_float_dtype(before) and pd.api.types.is_float_dtype(after):
        allowed = _allowed(table, column, was, now)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.abs(after.to_numpy() - before.to_numpy()) / allowed
        ratio[np.asarray(before.isna() != after.isna()) | np.isnan(ratio)] = np.inf
    else:
        ratio = np.full(len(was), np.inf)
    ratio[same] = np.nan
    return before.to_numpy(), after.to_numpy(), allowed, ratio


def _allowed(table: str, column: str, was: pd.DataFrame, now: pd.DataFrame) -> np.ndarray:
    """Return by how much a number may move: its rounding, and twice its stated errors."""

    def numbers(name: str) -> np.ndarray:
        both = np.stack([was[name].to_numpy(dtype=float), now[name].to_numpy(dtype=float)])
        return np.nan_to_num(both)

    size = np.abs(numbers(column)).max(axis=0)
    stated = ERRORS.get(table, {})
    if column in stated:
        return _RELATIVE * size + _ERRORS * np.hypot(*numbers(stated[column]))
    if table == "leaderboard":  # a statistic is known to its interval
        return _RELATIVE * size + np.abs(numbers("ci_high") - numbers("ci_low")).max(axis=0)
    if (
        column in stated.values() or column in _SIZES
    ):  # an error of few probes is known to a part of itself
        return size
    return _RELATIVE * size


def _rules(was: pd.DataFrame, now: pd.DataFrame) -> _Move:
    """Compare the rules of probes; before and after are the means of |θ|."""
    lists = [rows[name] for name in ("nodes", "weights") for rows in (was, now)]
    unlike = [
        not (np.array_equal(a, b) and np.array_equal(u, v))
        for a, b, u, v in zip(*lists, strict=True)
    ]
    records = (rows[unlike].reset_index("dtype").to_dict("records") for rows in (was, now))
    moves = np.full((len(was), 4), np.nan)
    pairs = zip(*records, strict=True)
    moves[unlike] = np.reshape([_rule(old, new) for old, new in pairs], (-1, 4))
    before, after, allowed, ratio = moves.T
    return before, after, allowed, ratio


def _rule(old: dict[Any, Any], new: dict[Any, Any]) -> list[float]:
    """Return the mean |θ| of both, what is allowed, and the distance over it."""
    a, u, b, v = old["nodes"], old["weights"], new["nodes"], new["weights"]
    sizes = [float(w @ np.abs(nodes)) if len(nodes) else np.nan for nodes, w in ((a, u), (b, v))]
    if not len(a) or not len(b) or old["method"] != new["method"]:
        return [*sizes, 0.0, np.inf]
    found = rules.compare(old, new)
    ratio = found.distance / found.allowed if found.allowed else np.inf
    alike = found.is_first_alike and found.are_ends_alike
    return [*sizes, found.allowed, ratio if alike else np.inf]
