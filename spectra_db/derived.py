"""What follows from other tables: made anew and compared, so that no number is forged alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from spectra_db import followed, store
from spectra_db.heterogeneity import GRADIENT, MOMENTS, metrics, that_need
from spectra_db.schema import KEYS, SPECTRUM, TABLES, VERSIONS
from spectra_db.truncation import CHANGES
from spectra_db.words import WITH_RULE

# (folder, rows that one file of the table holds) ↦ the rows that follow, with those columns that
# do. Rows that say themselves that they come from what a release does not hold are handed back.
Derive = Callable[[Path, pd.DataFrame], pd.DataFrame]

# The settings of PROTOCOL's spectra; a folder may hold others beside them.
STANDARD = {
    "operator": "hessian",
    "norm_mode": "eval",
    "dtype": "float32",
    "probe_distribution": "gaussian",
}
# Another version of scipy moved a metric by 1e-8 of itself, and a small difference of large
# numbers by as much of these.
_RELATIVE, _OF_ROW = 1e-5, 1e-7
# A metric has no unit, and the root of a divergence that is rounding is 1e-8.
_ABSOLUTE = {"heterogeneity": 1e-7}
_ON_LARGER_BATCHES = that_need(MOMENTS, GRADIENT)


def differences(
    folder: Path,
    derived: Mapping[str, Derive],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    models: Collection[str] | None = None,
) -> list[str]:
    """Return, per file of a derived table that holds other numbers than follow, what differs.

    Args:
        folder: Folder of tables, each valid.
        derived: Table ↦ what makes it from others. What a plain function makes is not made again
            where the same bytes were found to follow before (`followed`).
        on_progress: Called with (files done, files in all).
        models: Compare their files alone; None: all.
    """
    paths = [path for table in derived for path in sorted((folder / table).glob("*.parquet"))]
    paths = [path for path in paths if models is None or path.stem in models]
    found: list[str] = []
    compare = partial(_of_file, folder, derived)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # most of it is numpy's, without the lock
        for done, problem in enumerate(threads.map(compare, paths)):
            on_progress(done, len(paths))
            found += problem
    on_progress(len(paths), len(paths))
    return found


def _of_file(folder: Path, derived: Mapping[str, Derive], path: Path) -> list[str]:
    table = path.parent.name
    note = followed.note_of(folder, path, derived[table])
    if note is not None and followed.is_there(note):
        return []
    stored = store.read(path, table).to_pandas()
    try:
        expected = derived[table](folder, stored)
    except ValueError as error:
        return [f"{path}: it can't be made anew from other tables: {error}"]
    found = [f"{path}: {reason}" for reason in unlike(table, stored, expected)]
    if note is not None and not found:
        followed.write(note)
    return found


def unlike(table: str, stored: pd.DataFrame, expected: pd.DataFrame) -> Iterator[str]:
    """Say which rows are not those that follow, beyond rounding; nothing if all are.

    Args:
        table: Name of the table.
        stored: Its rows.
        expected: Rows of the same keys, with the columns that follow; others are not compared.
    """
    key = list(KEYS[table])
    strangers = ~pd.MultiIndex.from_frame(stored[key]).isin(pd.MultiIndex.from_frame(expected[key]))
    if strangers.any():
        first = _name(stored[strangers], key)
        yield f"{strangers.sum()} rows follow from no table, first: {first or 'the only one'}"
    columns = [c for c in expected.columns if c not in key]
    both = stored[[*key, *columns]].merge(expected, on=key, suffixes=("", " made anew"))
    floats = [c for c in columns if pa.types.is_floating(TABLES[table].field(c).type)]
    pairs = {c: (both[c], both[f"{c} made anew"]) for c in columns}
    sizes = [np.abs(pd.to_numeric(x)).fillna(0.0) for c in floats for x in pairs[c]]
    of_row = np.max(sizes, axis=0) if sizes else 0.0
    wrong = {}
    for column, (was, now) in pairs.items():
        same = (was == now) | (was.isna() & now.isna())
        if column in floats:
            a, b = (x.to_numpy(dtype=np.float64) for x in (was, now))
            allowed = _RELATIVE * np.maximum(np.abs(a), np.abs(b)) + _OF_ROW * of_row
            allowed += _ABSOLUTE.get(table, 0.0)
            same |= np.abs(a - b) <= allowed
        wrong[column] = ~same.to_numpy(dtype=bool)
    if not wrong or not (bad := np.any(list(wrong.values()), axis=0)).any():
        return
    at = int(np.flatnonzero(bad)[0])
    column = next(c for c in columns if wrong[c][at])
    was, now = (x.iloc[at] for x in pairs[column])
    yield (
        f"{bad.sum()} rows are not what other tables give, first: {_name(both[bad], key)}"
        f"{column} {was}, made anew {now}"
    )


def _name(rows: pd.DataFrame, key: list[str]) -> str:
    first = rows.iloc[0]
    names = [str(first[c]) for c in key if c not in ("model", "protocol_version")]
    return f"{', '.join(names)}: " if names else ""


def rows_of(folder: Path, table: str, model: str) -> pd.DataFrame:
    """Return a model's rows of a table, none where there is no file."""
    path = store.path_of(folder, table, model)
    rows = store.read(path, table) if path.exists() else TABLES[table].empty_table()
    return rows.to_pandas()


def standard(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one spectrum of several of a stage: the protocol's settings first, then low seeds."""
    if rows.empty:
        return rows
    settings = list(STANDARD)
    rank = (rows[settings] != pd.Series(STANDARD)).sum(axis=1)
    spectrum = [*settings, "init_seed", "train_run", "batch_hash"]
    first = rows.assign(rank=rank).sort_values(["rank", *spectrum], kind="stable").iloc[0]
    return rows[(rows[spectrum] == first[spectrum]).all(axis=1)]


def renew(
    folder: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Derive table `heterogeneity` of a folder anew where it is of an earlier protocol.

    Those of the folders within it too, of a batch's halves and of larger batches. The rows stay,
    and of each what spectra here do not tell: the batch error, which is that of the earlier
    protocol, and what was taken on a larger batch, moments and gradients, which are the same in
    both.

    Args:
        folder: Folder of tables, each valid.
        on_progress: Called with (files done, files in all).

    Returns:
        The models that were of an earlier protocol.

    Raises:
        ValueError: The rows of a model do not follow from its other tables.
    """
    paths = sorted(folder.rglob("heterogeneity/*.parquet"))
    found = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        renewed = threads.map(lambda path: _renew(path.parents[1], path.stem), paths)
        for done, (path, was_older) in enumerate(zip(paths, renewed, strict=True), start=1):
            found += [path.stem] if was_older else []
            on_progress(done, len(paths))
    return list(dict.fromkeys(found))


def _renew(folder: Path, model: str) -> bool:
    """Derive a model's rows anew if they are of an earlier protocol, and say whether they were."""
    now, table = VERSIONS["heterogeneity"], "heterogeneity"
    stored = rows_of(folder, table, model)
    if stored.empty or (stored["protocol_version"] == now).all():
        return False
    # What is of a larger batch, which these spectra don't tell, is of rules that aren't continued.
    times = CHANGES[now] / CHANGES[int(stored["protocol_version"].iloc[0])]
    states = stored["truncation_error"] * times
    made = _heterogeneity(folder, stored.assign(protocol_version=now, truncation_error=states))
    key = list(KEYS[table])
    if len(made) != len(stored):
        raise ValueError(
            f"{store.path_of(folder, table, model)}: rows follow from no spectrum here"
        )
    kept = stored[[*key, *(c for c in stored if c not in made)]]
    store.write(folder, table, made.merge(kept, on=key), replace=True)
    return True


def _heterogeneity(folder: Path, stored: pd.DataFrame) -> pd.DataFrame:
    """Return the metrics of each spectrum; those of a larger batch come from no table here."""
    version = int(stored["protocol_version"].iloc[0])
    model = str(stored["model"].iloc[0])
    spectra, blocks = (rows_of(folder, table, model) for table in ("spectra", "blocks"))
    of_spectrum = dict(list(spectra.groupby(list(SPECTRUM))))
    parts = []
    for key, ours in stored.groupby(list(SPECTRUM)):
        rows = standard(of_spectrum.get(key, spectra[:0]))
        where = [c for c in SPECTRUM if c != "partition"]
        beside = blocks[(blocks[where] == ours.iloc[0][where]).all(axis=1)]
        larger = ours["metric"].isin(_ON_LARGER_BATCHES)
        larger &= ours["batch_size"] > rows["batch_size"].max()
        names = set(ours.loc[~larger, "metric"])
        gradient = "gradient_rms_spread" in names
        made = metrics(rows, block_rows=beside if gradient else None, names=names, version=version)
        parts += [made.drop(columns="batch_error"), ours[larger]]
    found = pd.concat(parts, ignore_index=True)
    older = stored["batch_size"].isna().all()  # than the column
    return found.drop(columns=["batch_error", *(["batch_size"] if older else [])])


def _blocks(folder: Path, stored: pd.DataFrame) -> pd.DataFrame:
    """Return trace and extreme eigenvalues of each block; rows of sizes alone have none."""
    key = list(KEYS["blocks"])
    columns = ["trace", "lambda_max", "lambda_min"]
    rows = rows_of(folder, "spectra", str(stored["model"].iloc[0]))
    rows = rows[(rows["partition"] != "full") & rows["status"].isin(WITH_RULE)]
    parts = [standard(some) for _, some in rows.groupby(list(SPECTRUM))]
    rows = pd.concat(parts, ignore_index=True) if parts else rows
    made = rows[[*key, "partition"]].assign(
        trace=rows["num_params"]
        * [w @ x for w, x in zip(rows["weights"], rows["nodes"], strict=True)],
        lambda_max=[x[-1] for x in rows["nodes"]],
        lambda_min=[x[0] for x in rows["nodes"]],
    )
    how = {"trace": "mean", "lambda_max": "max", "lambda_min": "min"}
    made = made.groupby([*key, "partition"], as_index=False).agg(how).drop_duplicates(key)
    alone = stored[columns].isna().all(axis=1)
    return pd.concat([made[[*key, *columns]], stored.loc[alone, [*key, *columns]]])


def _stages(folder: Path, stored: pd.DataFrame) -> pd.DataFrame:
    """Return the losses of the first and the last stage; those between are in no other table."""
    key, run = list(KEYS["stages"]), ["model", "optimizer", "lr", "seed", "step"]
    model = str(stored["model"].iloc[0])
    rows = rows_of(folder, "training", model)
    rows = rows[(rows["split"] == "train") & (rows["metric"] == "loss")]
    trials = rows_of(folder, "trials", model)
    trials = trials.assign(step=trials["num_steps"], value=trials["final_loss"])
    losses = pd.concat([table.loc[~table["diverged"], [*run, "value"]] for table in (rows, trials)])
    ends = stored["stage"].isin(["init", "final"])
    made = stored.loc[ends].drop(columns="loss").merge(losses, on=run)
    made = made.rename(columns={"value": "loss"})
    return pd.concat([made[[*key, "loss"]], stored.loc[~ends, [*key, "loss"]]])


def wrong_rules(rows: pd.DataFrame) -> pd.Series:
    """Tell which rows of table `spectra` hold a rule that is not the one of their recurrence.

    T has the coefficients, θ and w are its eigenvalues and the squares of its eigenvectors' first
    entries: Σ w θ = α₁, Σ w θ² = α₁² + β₁², Σ θ = tr T and Σ θ² = tr T².
    """
    sampled = (rows["method"] == "slq") & (rows["status"] == "ok")
    lists = rows.loc[sampled, ["alphas", "betas", "nodes", "weights"]]
    wrong = [_misses(*rule) for rule in lists.to_numpy()]
    return pd.Series(wrong, index=lists.index, dtype=bool).reindex(rows.index, fill_value=False)


def _misses(a: np.ndarray, b: np.ndarray, x: np.ndarray, w: np.ndarray) -> bool:
    if not len(a) or len(a) != len(x):
        return True
    size = np.abs(x).max()
    second = a[0] ** 2 + (b[0] ** 2 if len(a) > 1 else 0.0)
    first = max(abs(w @ x - a[0]), abs(x.sum() - a.sum()) / len(a))
    squares = abs((x**2).sum() - (a**2).sum() - 2 * (b[:-1] ** 2).sum()) / len(a)
    return bool(first > _OF_ROW * size or max(squares, abs(w @ x**2 - second)) > _OF_ROW * size**2)


DERIVED: dict[str, Derive] = {
    "blocks": _blocks,
    "heterogeneity": _heterogeneity,
    "stages": _stages,
}
