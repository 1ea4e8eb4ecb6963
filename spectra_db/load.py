"""Reading tables: from the bundled release, a folder, or the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from spectra_db import store
from spectra_db.schema import TABLES

BUNDLED = Path(__file__).parent / "data"


class NotFound(ValueError):  # noqa: N818
    """A table, column, model or source that is not there; the text names close matches."""


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
        table: models, spectra, blocks, heterogeneity, training, stages, gaps, runs, leaderboard.
        source: A folder (what `--out` wrote), or the id of a dataset on the Hugging Face Hub;
            None for the release bundled with the package.
        revision: Tag, branch or commit of the Hub's dataset.
        columns: Columns to return; None for all.
        **filters: Column = value, or a list of values, that rows must have.

    Returns:
        The rows, sorted by their key; list columns hold numpy arrays.

    Raises:
        NotFound: Unknown table, column, model or source.
        InvalidTable: A file breaks the schema.

    Example:
        >>> load("spectrum")
        Traceback (most recent call last):
        ...
        spectra_db.load.NotFound: unknown table 'spectrum'; did you mean spectra?
    """
    if table not in TABLES:
        raise NotFound(f"unknown table {table!r}; {_hint(table, TABLES)}")
    names = TABLES[table].names
    columns = names if columns is None else _values(columns)
    for column in [*columns, *filters]:
        if column not in names:
            raise NotFound(f"table {table} has no column {column!r}; {_hint(column, names)}")
    folder = _folder(source, revision, table)
    # By the names of the models, as in the key: "a" before "a-b".
    paths = sorted((folder / table).glob("*.parquet"), key=lambda path: path.stem)
    if not paths:
        raise _no_table(table, source, revision, folder)
    wanted = _values(filters["model"]) if "model" in filters else None
    if wanted is not None:
        models = {path.stem: path for path in paths}
        for model in wanted:
            if model not in models:
                raise NotFound(f"no model {model!r} in table {table}; {_hint(str(model), models)}")
        paths = [path for path in paths if path.stem in wanted]
    where = _condition(table, filters)
    parts = [store.read(path, table, columns=columns, where=where) for path in paths]
    return pa.concat_tables(parts).to_pandas()


def _condition(table: str, filters: dict[str, Any]) -> pc.Expression | None:
    """Return the condition that the reader applies row group by row group."""
    condition = None
    for column, value in filters.items():
        kind = TABLES[table].field(column).type
        if pa.types.is_list(kind):
            raise NotFound(f"column {column} holds lists; filter on another")
        values = _values(value)
        try:
            allowed = pa.array([v for v in values if v is not None], type=kind)
        except (pa.ArrowException, TypeError, ValueError) as error:
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


def _folder(source: Path | str | None, revision: str | None, table: str) -> Path:
    """Return the local folder of a source, downloading a Hub dataset's table."""
    if source is None:
        if not any(BUNDLED.glob("*/*.parquet")):
            raise NotFound(
                "no release is bundled with this version yet; give source=DIR (a folder that "
                "`harness run --out DIR` wrote) or source='owner/name' (a dataset on the Hub)"
            )
        return BUNDLED
    folder = Path(source)
    if folder.is_dir():
        return folder
    if str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise NotFound(f"source {str(source)!r} is neither a folder nor a Hub id like owner/name")
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(
            str(source),
            repo_type="dataset",
            revision=revision,
            allow_patterns=[f"{table}/*.parquet"],
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotFound(
            f"dataset {str(source)!r} at revision {revision or 'main'} can't be had from the "
            f"Hub: {reason}"
        ) from error
    return Path(path)


def _hint(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = get_close_matches(word, known, n=3)
    return f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(known)}"


def _no_table(
    table: str, source: Path | str | None, revision: str | None, folder: Path
) -> NotFound:
    if source is not None and not Path(source).is_dir():
        # Only this table was asked of the Hub: what else is there is not in the folder.
        page = f"https://huggingface.co/datasets/{source}/tree/{revision or 'main'}"
        return NotFound(f"dataset {str(source)!r} holds no table {table}; see {page}")
    tables = [t for t in TABLES if any((folder / t).glob("*.parquet"))]
    known = f"it has {', '.join(tables)}" if tables else "it has no tables at all"
    return NotFound(f"{folder} holds no table {table}; {known}")
