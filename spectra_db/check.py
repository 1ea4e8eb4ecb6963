"""Checking a release: every file, every row, and what the version before it had."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from spectra_db import card, diff, manifest, merged, store
from spectra_db.derived import DERIVED, Derive, differences, wrong_rules
from spectra_db.manifest import InvalidRelease, Manifest
from spectra_db.release import list_files
from spectra_db.schema import SPECTRUM, TABLES
from spectra_db.store import InvalidTable
from spectra_db.words import WITH_RULE

_SPECTRUM = list(SPECTRUM)
# Columns by which rows of different tables are compared.
_COMPARED = {
    "spectra": [*SPECTRUM, "run_id", "status"],
    "heterogeneity": _SPECTRUM,
    "stages": ["model", "stage", "optimizer", "seed"],
    "runs": ["model", "run_id"],
}
# A release comes with the package and with every clone.
MAX_BYTES = 100_000_000


def problems(
    folder: Path,
    previous: Path | None = None,
    *,
    derived: Mapping[str, Derive] = DERIVED,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Return what is wrong with a release, each with its file and reason; none if it is sound.

    The manifest and the files agree; every table is valid (schema, types, invariants, no key
    twice, one protocol); rows of different tables fit together, and what follows from others is
    what these give, to rounding; the card is that of the tables; the size stays below 100 MB.
    Against an earlier release: no row is lost, and the version goes up by what changed.

    Args:
        folder: The release.
        previous: The release before.
        derived: What is made anew, and from what; `harness.leaderboard.board` adds what needs
            entries.
        on_progress: Called with (files made anew, files in all).
    """
    try:
        known = manifest.read(folder)
    except InvalidRelease as error:
        return [str(error)]
    if known is None:
        return [f"{folder}: no {manifest.NAME}, so it is no release; `harness dataset release`"]
    read: dict[str, list[pd.DataFrame]] = {table: [] for table in _COMPARED}
    found = [*_files(folder, known), *_tables(folder, known, read)]
    if not found:  # else what follows would say the same again
        found += [*_fits(folder, read), *_merged(folder)]
        expected = card.render(folder, known.version).encode()
        if (folder / manifest.CARD).read_bytes() != expected:
            found.append(f"{folder / manifest.CARD}: not the card of these tables")
    if not found:
        found += differences(folder, derived, on_progress)
    if previous is not None:
        found += _follows(folder, known, previous)
    return found


def _files(folder: Path, known: Manifest) -> Iterator[str]:
    """Compare the files with the manifest, names, sizes and contents."""
    for path in [manifest.CARD, manifest.CHANGELOG]:
        if path not in known.files:
            yield f"{folder / path}: a release has one"
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    if links:
        yield f"{links[0]}: a link; a release holds files alone"
    for path in sorted({*known.files, *list_files(folder)}):
        try:
            manifest.check_file(folder, known, path)
        except InvalidRelease as error:
            yield str(error)
    size = sum(file.bytes for file in known.files.values())
    if size > MAX_BYTES:
        yield f"{folder}: {size / 1e6:.0f} MB; a release has at most {MAX_BYTES / 1e6:.0f}"
    if "models" not in known.rows():
        yield f"{folder}: no table models"


def _tables(folder: Path, known: Manifest, read: Mapping[str, list[pd.DataFrame]]) -> Iterator[str]:
    """Validate every table; add the columns that are compared to those that were read."""
    for path, file in sorted(known.files.items()):
        if not manifest.is_table(path) or not (folder / path).is_file():
            continue
        table = path.partition("/")[0]
        try:
            rows = store.read(folder / path, table)
        except ValueError as error:
            yield str(error)
            continue
        if rows.num_rows != file.rows:
            yield f"{folder / path}: {rows.num_rows} rows; the manifest says {file.rows}"
        if table in read:
            read[table].append(rows.select(_COMPARED[table]).to_pandas())
        if table == "spectra" and (wrong := wrong_rules(rows.to_pandas())).any():
            first = int(np.flatnonzero(wrong)[0])
            yield (
                f"{folder / path}: {wrong.sum()} rules are not those of their alphas and betas, "
                f"the first in row {first}"
            )


def _fits(folder: Path, read: Mapping[str, list[pd.DataFrame]]) -> Iterator[str]:
    """Compare tables with each other."""
    spectra, heterogeneity, stages, runs = (
        pd.concat(read[table], ignore_index=True) if read[table] else pd.DataFrame(columns=columns)
        for table, columns in _COMPARED.items()
    )
    models = {path.stem for path in (folder / "models").glob("*.parquet")}
    for table in TABLES:
        paths = sorted((folder / table).glob("*.parquet"))
        for path in paths:
            if table != "leaderboard" and path.stem not in models:
                yield f"{path}: table models has no model {path.stem}"
        # Who reads a table's files as one, such as polars, is refused where they differ.
        columns = [store.columns_of(path) for path in paths]
        for path, names in zip(paths, columns, strict=True):
            if names != columns[0]:
                yield f"{path}: has other columns than {paths[0].name}; release the folder again"
    made = spectra[spectra["status"].isin(WITH_RULE)]
    yield from _without(made, runs, ["model", "run_id"], folder / "spectra", "runs")
    trained = made[made["stage"] != "init"]
    yield from _without(trained, stages, ["model", "stage"], folder / "spectra", "stages")
    yield from _without(heterogeneity, made, _SPECTRUM, folder / "heterogeneity", "spectra")


def _merged(folder: Path) -> Iterator[str]:
    """Compare merged tables, where there are some, with those that they are of."""
    if not (folder / merged.FOLDER).is_dir():
        return
    for name, content in merged.make(folder).items():
        path = merged.path_of(folder, name)
        if not path.exists() or not _holds(path, content):
            yield f"{path}: not the rows of the tables; `harness dataset release --merge`"


def _holds(path: Path, content: pa.Table) -> bool:
    try:
        with store.reading(path):
            return bool(pq.ParquetFile(path).read().equals(content))
    except InvalidTable:
        return False


def _without(
    rows: pd.DataFrame, other: pd.DataFrame, columns: list[str], place: Path, table: str
) -> Iterator[str]:
    """Name the first row whose values are not in another table."""
    there = pd.MultiIndex.from_frame(other[columns])
    missing = ~pd.MultiIndex.from_frame(rows[columns]).isin(there)
    if missing.any():
        first = rows[missing].iloc[0]
        values = ", ".join(f"{column} {first[column]!r}" for column in columns[1:])
        path = place / f"{first['model']}.parquet"
        yield f"{path}: {missing.sum()} rows that table {table} does not have, first: {values}"


def _follows(folder: Path, known: Manifest, previous: Path) -> Iterator[str]:
    """Compare with the release before: its rows, and how the version goes up."""
    try:
        before = manifest.read(previous)
    except InvalidRelease as error:
        yield str(error)
        return
    if before is None:
        yield f"{previous}: no {manifest.NAME}, so it is no release to compare with"
        return
    if before == known:
        return
    new, old = manifest.version_of(known.version), manifest.version_of(before.version)
    if new <= old:
        yield f"{folder}: version {known.version} does not follow {before.version}"
    if new[0] > old[0]:
        return
    try:
        lost = diff.removed(previous, folder)
    except InvalidTable as error:
        yield str(error)
        return
    for table, keys in lost.items():
        yield (
            f"{folder / table}: {len(keys)} rows of {before.version} are lost, "
            f"the first {keys.iloc[0].to_dict()}; only a MAJOR version may lose rows"
        )
    schemas = [(_columns(root, table), table) for table in TABLES for root in (previous, folder)]
    for (was, table), (now, _) in zip(schemas[::2], schemas[1::2], strict=True):
        if was and not was.items() <= now.items():
            yield f"{folder / table}: columns changed; that takes a MAJOR version"
        elif now and was != now and new[:2] == old[:2]:
            yield f"{folder / table}: has new columns; that takes a MINOR version"
    added = sorted(set(known.models()) - set(before.models()))
    if added and new[:2] == old[:2]:
        yield f"{folder}: has new models ({', '.join(added[:3])}); that takes a MINOR version"


def _columns(folder: Path, table: str) -> dict[str, str]:
    """Return the columns of a table with their types, from its first file."""
    paths = sorted((folder / table).glob("*.parquet"))
    if not paths:
        return {}
    with store.reading(paths[0]):
        schema = pq.read_schema(paths[0])
    return {field.name: str(field.type) for field in schema}
