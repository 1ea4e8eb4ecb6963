"""Reading tables: from the bundled release, a folder, or the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from spectra_db import manifest, store
from spectra_db.errors import HubError, NotFound, hint
from spectra_db.schema import TABLES
from spectra_db.words import PARTITIONS, STAGES, STATUSES, is_stage

BUNDLED = Path(__file__).parent / "data"
# Columns of few words, a misspelt one of which would select nothing.
_WORDS = {
    "stage": STAGES,
    "status": STATUSES,
    "partition": (*PARTITIONS, "custom"),
}
# Columns of names that the data decide: one that no row has is misspelt, or not there.
_NAMES = (
    *("block", "block_kind", "dtype", "family", "kind", "left_out", "method", "metric"),
    *("norm_mode", "operator", "optimizer", "probe_distribution", "scale", "split", "statistic"),
    *("task", "tier"),
)


def load(
    table: str,
    *,
    source: Path | str | None = None,
    revision: str | None = None,
    columns: Sequence[str] | None = None,
    **filters: Any,
) -> pd.DataFrame:
    """Read rows of a table.

    Args:
        table: models, spectra, blocks, heterogeneity, training, stages, gaps, runs, leaderboard;
            of protocol 2 trials, speedups, predictors.
        source: A folder (what `--out` wrote), or the id of a dataset on the Hugging Face Hub;
            None for the release bundled with the package.
        revision: Tag, branch or commit of the Hub's dataset. A folder has the one version that its
            manifest names.
        columns: Columns to return; None for all.
        **filters: Column = value, or a list of values, that rows must have.

    Returns:
        The rows, sorted by their key; list columns hold numpy arrays.

    Raises:
        NotFound: Unknown table, column, model, source or revision; a stage, status or partition
            that can't be, or a name (of a block, metric, optimizer, ...) that no row has.
        InvalidTable: A file breaks the schema.
        InvalidRelease: A file is not the one that the release's manifest lists.
        HubError: The Hub can't be reached, and the cache lacks the revision.

    Example:
        >>> load("spectrum")
        Traceback (most recent call last):
        ...
        spectra_db.errors.NotFound: unknown table 'spectrum'; did you mean spectra?
    """
    if table not in TABLES:
        raise NotFound(f"unknown table {table!r}; {hint(table, TABLES)}")
    names = TABLES[table].names
    columns = names if columns is None else _values(columns)
    for column in [*columns, *filters]:
        if column not in names:
            raise NotFound(f"table {table} has no column {column!r}; {hint(column, names)}")
    wanted = _values(filters["model"]) if "model" in filters else None
    files = [f"{table}/{model}.parquet" for model in wanted or ["*"]]
    folder = folder_of(source, revision, files)
    known = manifest.read(folder)
    # By the names of the models, as in the key: "a" before "a-b".
    paths = sorted(_paths(folder, table, known), key=lambda path: path.stem)
    if not paths:
        raise _no_table(table, source, revision, folder, wanted, known)
    if wanted is not None:
        models = {path.stem: path for path in paths}
        for model in wanted:
            if model not in models:
                raise NotFound(f"no model {model!r} in table {table}; {hint(str(model), models)}")
        paths = [path for path in paths if path.stem in wanted]
    where = _condition(table, filters)
    if known is not None:
        for path in paths:
            manifest.check_file(folder, known, f"{table}/{path.name}")
    named = [column for column in filters if column in _NAMES]
    needed = list(dict.fromkeys([*columns, *named]))
    parts = [store.read(path, table, columns=needed, where=where) for path in paths]
    found = pa.concat_tables([TABLES[table].empty_table().select(needed), *parts])
    for column in named:
        _check_names(table, column, _values(filters[column]), found, paths)
    return found.select(columns).to_pandas()


def optional(table: str, source: Path | str | None = None, **filters: Any) -> pd.DataFrame:
    """Read rows of a table as `load` does; none where what is asked for is not there."""
    try:
        return load(table, source=source, **filters)
    except NotFound:
        return TABLES[table].empty_table().to_pandas()


def _check_names(
    table: str, column: str, wanted: list[Any], found: pa.Table, paths: list[Path]
) -> None:
    """Raise if no row of the files has one of the names, whatever the other filters are."""
    present = set(found[column].unique().to_pylist())
    absent = [name for name in wanted if name not in present]
    if not absent or not paths:
        return
    parts = [store.read(path, table, columns=[column])[column].unique() for path in paths]
    there = sorted({name for part in parts for name in part.to_pylist()} - {None})
    for name in absent:
        if name is not None and name not in there:
            raise NotFound(f"no {column} {name!r} in table {table}; {hint(str(name), there)}")


def _condition(table: str, filters: dict[str, Any]) -> pc.Expression | None:
    """Return the condition that the reader applies row group by row group."""
    condition = None
    for column, value in filters.items():
        kind = TABLES[table].field(column).type
        if pa.types.is_list(kind):
            raise NotFound(f"column {column} holds lists; filter on another")
        values = _values(value)
        words = _WORDS.get(column, ())
        for word in values if words else ():
            if word not in words and not (column == "stage" and is_stage(str(word))):
                raise NotFound(f"no {column} {word!r}; {hint(str(word), words)}")
        try:
            asked = [v for v in values if v is not None]
            allowed = pa.array(asked, type=kind)
            if pa.types.is_integer(kind) and allowed.to_pylist() != asked:
                raise ValueError("it holds integers")
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise NotFound(f"column {column} can't be {value!r}: {error}") from error
        test = pc.field(column).isin(allowed)
        if None in values:
            test = test | pc.field(column).is_null()
        condition = test if condition is None else condition & test
    return condition


def _values(value: Any) -> list[Any]:
    """Return one value or several as a list without repetitions."""
    several = isinstance(value, Iterable) and not isinstance(value, str)
    return list(dict.fromkeys(value if several else [value]))


def folder_of(
    source: Path | str | None, revision: str | None = None, paths: Sequence[str] = ()
) -> Path:
    """Return the local folder of a source.

    Args:
        source: As of `load`.
        revision: As of `load`.
        paths: Patterns of the files that will be read, which are downloaded from the Hub beside
            card and manifest.

    Raises:
        NotFound, HubError: As `load`.
    """
    if source is None and not any(BUNDLED.glob("*/*.parquet")):
        raise NotFound(
            "no release is bundled with this version yet; give source=DIR (a folder that "
            "`harness run --out DIR` wrote) or source='owner/name' (a dataset on the Hub)"
        )
    folder = BUNDLED if source is None else Path(source)
    if folder.is_dir():
        known = manifest.read(folder)
        versions = () if known is None else (known.version, f"v{known.version}")
        if revision is not None and revision not in versions:
            version = "has no versions" if known is None else f"is version {known.version}"
            raise NotFound(f"{folder} {version}; revision {revision!r} is not to be had from it")
        return folder
    if str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise NotFound(f"source {str(source)!r} is neither a folder nor a Hub id like owner/name")
    from spectra_db import hub

    try:
        return hub.fetch(str(source), revision, list(paths))
    except HubError as error:
        raise HubError(f"{error}; nor is there a folder {source} here") from error


def _paths(folder: Path, table: str, known: manifest.Manifest | None) -> Iterator[Path]:
    """Yield the files of a table: those that the manifest lists, where there is one."""
    if known is None:
        yield from (folder / table).glob("*.parquet")
        return
    for path in known.files:
        if path.startswith(f"{table}/") and path.endswith(".parquet"):
            yield folder / path


def _no_table(
    table: str,
    source: Path | str | None,
    revision: str | None,
    folder: Path,
    models: list[Any] | None,
    held: manifest.Manifest | None,
) -> NotFound:
    if source is not None and not Path(source).is_dir():
        # Only this was asked of the Hub: what else is there is not in the folder.
        page = f"https://huggingface.co/datasets/{source}/tree/{revision or 'main'}"
        of = "" if models is None else f" of {', '.join(map(str, models))}"
        return NotFound(f"dataset {str(source)!r} holds no table {table}{of}; see {page}")
    tables = [t for t in TABLES if any(_paths(folder, t, held))]
    known = f"it has {', '.join(tables)}" if tables else "it has no tables at all"
    return NotFound(f"{folder} holds no table {table}; {known}")
