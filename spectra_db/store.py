"""Files of the dataset: one Parquet file per table and model, validated, written atomically."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spectra_db.errors import DatasetError, first_line
from spectra_db.files import locked, whole
from spectra_db.schema import EARLIER, KEYS, LISTS, PROTOCOL_VERSION, TABLES, VERSIONS
from spectra_db.words import SLUG, STATUSES, WHOLE, WITH_RULE

# A task of one's own is named as in module:Class.
_WORD = re.compile(r"[A-Za-z0-9_][\w.-]*(:[A-Za-z_]\w*)?", re.ASCII)
# Larger files are no spectra of ours (a model of 100 blocks takes 5 MB a stage): a reader must not
# be made to allocate without bound.
MAX_FILE_BYTES = 1 << 30
TOGETHER = {"spectra": ("probe",), "training": ("step", "split", "metric")}
_TOLERANCE = 1e-9  # of sums of weights
# Pages without a checksum, as older versions wrote them, are taken as they are.
_VERIFIED = {"page_checksum_verification": True}
_REMEDY = "put a whole copy there, or delete it: the command that wrote it makes it again"
# What the checks of these lists need; all of it is read where one of them is.
_RULE = (*LISTS, "method", "num_params", "status", "reason")


class InvalidTable(DatasetError):  # noqa: N818
    """A table that breaks the schema or an invariant; the text says where and how."""


def path_of(root: Path | str, table: str, model: str) -> Path:
    """Return the file of a model's rows.

    Raises:
        InvalidTable: The model's name is no slug: it would not be a safe path.
    """
    if not SLUG.fullmatch(model):
        raise InvalidTable(
            f"model {model!r} can't name a file; use lower-case letters, digits, '.', '_', '-'"
        )
    return Path(root) / table / f"{model}.parquet"


def write(
    root: Path | str,
    table: str,
    rows: pd.DataFrame | Sequence[Mapping[str, Any]],
    *,
    replace: bool = False,
) -> None:
    """Insert rows, replacing those of the same key; in `spectra` all probes of the block at once.

    Each model's file is replaced as a whole by an atomic rename, under a lock: readers see the
    old rows or the new ones, and several processes may write.

    Args:
        root: Folder of the dataset.
        table: Name of the table.
        rows: The rows; columns that may be null may be left out.
        replace: Keep no other rows of these files: for tables that are derived as a whole.

    Raises:
        InvalidTable: The rows are not valid: nothing is written. Or those already in a file are
            not: it stays as it is, other models' rows may be written.
    """
    _check_table(table)
    records: Sequence[Mapping[Any, Any]] = (
        rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows
    )
    by_model: dict[str, list[Mapping[Any, Any]]] = {}
    for record in records:
        by_model.setdefault(str(record.get("model", WHOLE)), []).append(record)
    paths = {model: path_of(root, table, model) for model in by_model}
    fresh = {model: _arrow(table, some) for model, some in by_model.items()}
    for model, new in fresh.items():
        validate(table, new, where=f"rows of {model!r}")
    for model, new in fresh.items():
        path = paths[model]
        with locked(path):
            old = read(path, table) if path.exists() and not replace else None
            merged = _upsert(table, old, new)
            if old is not None:
                validate(table, merged, where=str(path))
            _replace(path, merged)


def read(
    path: Path | str,
    table: str,
    *,
    columns: Sequence[str] | None = None,
    where: pc.Expression | None = None,
) -> pa.Table:
    """Read one file, or some columns and rows of it, and validate what was read.

    A column that the file is older than is null.

    Args:
        path: The file.
        table: Name of its table.
        columns: Columns to read; None for all.
        where: Condition on rows.

    Raises:
        InvalidTable: The file is no Parquet of this table, is too large, or holds rows of
            another model than it is named after; says the file and the reason.
    """
    path = Path(path)
    _check_table(table)
    schema = TABLES[table]
    wanted = schema.names if columns is None else list(columns)
    # What the validation needs beside.
    beside = {*KEYS[table], "protocol_version", *(_RULE if set(LISTS) & set(wanted) else ())}
    needed = [name for name in schema.names if name in beside or name in wanted]
    with reading(path), pq.ParquetFile(path, **_VERIFIED) as file:
        found = file.schema_arrow
        _check_schema(table, found, str(path), may_be_older=True)
        # Damaged metadata of a column raise here; asked for them, pyarrow would abort.
        file.scan_contents()
        _check_size(file.metadata, path)
        held = set(found.names) & set(needed)
        content = file.read([name for name in needed if name in held])
        content.validate(full=True)
    fields = [schema.field(name) for name in needed]
    arrays = [
        content[field.name] if field.name in held else pa.nulls(content.num_rows, field.type)
        for field in fields
    ]
    content = pa.table(arrays, schema=pa.schema(fields))
    # Not while reading: statistics, by which groups of rows are left out, have no checksum.
    content = content if where is None else content.filter(where)
    _check_values(table, content, str(path))
    if table == "models" and where is None and content.num_rows == 0:
        raise InvalidTable(f"{path}: no row; table models has one per model")
    if "model" in needed:
        strangers = set(pc.unique(content["model"]).to_pylist()) - {path.stem}
        if strangers:
            raise InvalidTable(f"{path}: holds rows of model {min(strangers)!r}, not {path.stem!r}")
    return content.select(wanted)


def columns_of(path: Path) -> list[str]:
    """Return the names of a file's columns, which may be fewer than its table has today.

    Raises:
        InvalidTable: It is damaged, or no Parquet.
    """
    with reading(path):
        return list(pq.read_schema(path).names)


def raw(path: Path) -> pa.Table:
    """Read a file as it is, with its pages compared with their checksums, and texts with UTF-8.

    Raises:
        InvalidTable: It is damaged, or no Parquet.
    """
    with reading(path):
        content = pq.read_table(path, partitioning=None, **_VERIFIED)
        content.validate(full=True)
    return content


# Errors that say nothing of the file, which is there and may be whole.
_OF_THE_MACHINE = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into a line with its name, the cause and the remedy.

    Raises:
        InvalidTable: As said, or the file is too large.
        OSError: The disk or the machine fails, of which the file is not the cause.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InvalidTable(f"{path}: {size} bytes; a file has at most {MAX_FILE_BYTES}")
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        number = getattr(error, "errno", None)
        if number in _OF_THE_MACHINE:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise InvalidTable(
            f"{path}: not readable as Parquet: {first_line(error)}; {_REMEDY}"
        ) from error


def _check_table(table: str) -> None:
    if table not in TABLES:
        raise InvalidTable(f"unknown table {table!r}; known are {', '.join(TABLES)}")


def _check_size(metadata: pq.FileMetaData, path: Path) -> None:
    """Refuse a small file that says it unpacks to much."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    cells = sum(g.column(j).num_values for g in groups for j in range(g.num_columns))
    # Dictionaries and runs repeat values for next to nothing: count 8 bytes for each.
    size = max(8 * cells, sum(g.total_byte_size for g in groups))
    if size > MAX_FILE_BYTES:
        raise InvalidTable(f"{path}: unpacks to {size} bytes; at most {MAX_FILE_BYTES}")


def validate(table: str, content: pa.Table, *, where: str = "the table") -> None:
    """Check a table against its schema and invariants.

    Args:
        table: Name of the table.
        content: All its columns.
        where: What the error calls the content.

    Raises:
        InvalidTable: Says where and what: column names and types, nulls, numbers that are not
            finite, names that are no slugs, statuses, keys that repeat, protocol versions, and
            for spectra the rules.
    """
    _check_table(table)
    _check_schema(table, content.schema, where)
    _check_values(table, content, where)


def _check_schema(table: str, found: pa.Schema, where: str, *, may_be_older: bool = False) -> None:
    """Check names, order and types of the columns; an older file may lack those that came later."""
    schema = TABLES[table]
    if may_be_older:
        there = set(found.names)
        schema = pa.schema([f for f in schema if f.name in there or b"since" not in f.metadata])
    if found.names != schema.names:
        missing = sorted(set(schema.names) - set(found.names))
        unknown = sorted(set(found.names) - set(schema.names))
        reason = f"missing {missing}, unknown {unknown}" if missing or unknown else "out of order"
        raise InvalidTable(
            f"{where}: columns of table {table} are not those of the schema: {reason}"
        )
    for field in schema:
        kind = found.field(field.name).type
        if kind != field.type:
            raise InvalidTable(f"{where}: column {field.name} is {kind}; it must be {field.type}")


def _check_values(table: str, content: pa.Table, where: str) -> None:
    """Check the invariants of those columns of a table that are there."""
    schema, names = TABLES[table], content.schema.names

    def refuse(reason: str) -> None:
        raise InvalidTable(f"{where}: {reason}")

    for name in names:
        column = content[name]
        if not schema.field(name).nullable and column.null_count:
            row = pc.index(column.is_null(), True).as_py()
            refuse(f"row {row}: column {name} is null (or nan)")
        if pa.types.is_floating(column.type):
            row = pc.index(pc.is_finite(column), False).as_py()
            if row >= 0:
                refuse(f"row {row}: column {name} is an infinity or nan")
        if pa.types.is_list(column.type) and table != "spectra":  # whose rules are checked below
            flat = pc.list_flatten(column)
            if flat.null_count or not pc.all(pc.is_finite(flat), min_count=0).as_py():
                refuse(f"column {name} holds a null, an infinity or nan")
    if content.num_rows == 0:
        return
    if "model" in names:
        for model in pc.unique(content["model"]).to_pylist():
            if not SLUG.fullmatch(model):
                refuse(f"model {model!r} is no slug")
    for name in ("family", "tier", "task") if table == "models" else ():
        for word in pc.unique(content[name]).to_pylist() if name in names else ():
            if not _WORD.fullmatch(word):
                refuse(f"{name} {word!r} is no slug")
    versions = pc.unique(content["protocol_version"]).to_pylist()
    known = VERSIONS.get(table, PROTOCOL_VERSION)
    readable = (known, *EARLIER.get(table, ()))
    if len(versions) > 1 and set(versions) <= set(readable):
        refuse(
            f"rows of protocol versions {sorted(versions)} don't go together; "
            "`harness dataset derive FOLDER` derives those of a folder anew"
        )
    if versions[0] not in readable or len(versions) > 1:
        only = " or ".join(map(str, sorted(readable)))
        refuse(f"protocol versions {sorted(versions)}; this code reads {only} alone")
    if "status" in names:
        strange = set(pc.unique(content["status"]).to_pylist()) - set(STATUSES)
        if strange:
            refuse(f"unknown status {sorted(strange)}; known are {', '.join(STATUSES)}")
    if set(KEYS[table]) <= set(names):
        keys = content.select(KEYS[table])
        if keys.group_by(KEYS[table], use_threads=False).aggregate([]).num_rows < keys.num_rows:
            row = int(np.flatnonzero(keys.to_pandas().duplicated())[0])
            refuse(f"the key of row {row} repeats an earlier one")
    if table == "spectra" and set(_RULE) <= set(names):
        _validate_rules(content, refuse)


def _validate_rules(content: pa.Table, refuse: Any) -> None:
    """Check lengths, order, weights and finiteness of the rules of table `spectra`."""
    count = content.num_rows
    flat, size, row_of = {}, {}, {}

    def first(bad: np.ndarray, reason: str) -> None:
        if bad.any():
            refuse(f"row {int(np.flatnonzero(bad)[0])}: {reason}")

    def marked(rows: np.ndarray) -> np.ndarray:
        return np.bincount(rows, minlength=count) > 0

    for name in LISTS:
        column = content[name].combine_chunks()
        # A null becomes nan.
        flat[name] = column.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
        size[name] = np.asarray(pc.list_value_length(column))
        row_of[name] = np.repeat(np.arange(count), size[name])
        bad = marked(row_of[name][~np.isfinite(flat[name])])
        first(bad, f"column {name} holds a null, an infinity or nan")
    status = np.asarray(content["status"].to_pylist())
    method = np.asarray(content["method"].to_pylist())
    num_params = np.asarray(content["num_params"])
    first(~np.isin(method, ["slq", "exact"]), "method must be slq or exact")
    first(num_params < 1, "num_params must be at least 1")
    for name, other in (("nodes", "weights"), ("alphas", "betas")):
        first(size[name] != size[other], f"{name} and {other} differ in length")

    present = np.isin(status, WITH_RULE)
    unexplained = np.asarray(pc.fill_null(pc.equal(content["reason"], ""), True))
    first(~present & (size["nodes"] + size["alphas"] > 0), "a failed or pending row has no rule")
    first(~present & unexplained, "a failed or pending row needs a reason")
    first(present & (size["nodes"] == 0), "a row of status ok or zero needs nodes")
    sampled, exact = present & (method == "slq"), present & (method == "exact")
    first(sampled & (size["alphas"] != size["nodes"]), "alphas and nodes differ in length")
    first(exact & (size["alphas"] > 0), "an exact row has no alphas")

    nodes, weights, rows = flat["nodes"], flat["weights"], row_of["nodes"]
    few, many = size["nodes"] < num_params, size["nodes"] > num_params
    incomplete = exact & (status == "ok") & (many | (few & ~marked(rows[nodes == 0])))
    first(incomplete, "an exact row needs as many nodes as parameters, or one node 0 for the rest")
    zero = present & (status == "zero")
    first(zero & ((size["nodes"] != 1) | marked(rows[nodes != 0])), "a zero row has one node, 0")
    descending = (rows[1:] == rows[:-1]) & (np.diff(nodes) < 0)
    first(marked(rows[1:][descending]), "nodes are not ascending")
    first(marked(rows[weights < 0]), "a weight is negative")
    sums = np.bincount(rows, weights, minlength=count)
    first(present & (np.abs(sums - 1) > _TOLERANCE), "the weights do not sum to 1")
    # One node 0 may stand for all the eigenvalues that are not there.
    count_of = 1 + np.where(nodes == 0, (num_params - size["nodes"])[rows], 0)
    unequal = np.abs(weights * num_params[rows] / count_of - 1) > _TOLERANCE
    first(
        exact & marked(rows[unequal]),
        "the weights of an exact row are 1/n each, and of a 0 for the rest as many times that",
    )


def _arrow(table: str, records: Sequence[Mapping[Any, Any]]) -> pa.Table:
    """Turn rows into an Arrow table of the schema."""
    schema = TABLES[table]
    unknown = sorted({key for record in records for key in record} - set(schema.names), key=str)
    if unknown:
        raise InvalidTable(
            f"table {table} has no column {unknown[0]!r}; it has {', '.join(schema.names)}"
        )
    arrays = []
    for field in schema:
        values = [_plain(record.get(field.name)) for record in records]
        try:
            arrays.append(pa.array(values, type=field.type))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise InvalidTable(
                f"table {table}: column {field.name} must be {field.type}: {error}"
            ) from error
    return pa.Table.from_arrays(arrays, schema=schema)


def _plain(value: Any) -> Any:
    """Return what Arrow takes: no missing-value sentinels of pandas."""
    if isinstance(value, list | tuple | np.ndarray):
        return value
    return None if value is pd.NaT or value is pd.NA or value != value else value


def _upsert(table: str, old: pa.Table | None, new: pa.Table) -> pa.Table:
    """Return old rows whose key is not among the new ones, and the new ones, sorted by key."""
    keys = list(KEYS[table])
    if old is not None:
        # The probes of a block belong together, as do the steps of a run: those of other settings,
        # or of a run that went further, must not stay beside.
        matched = [key for key in keys if key not in TOGETHER.get(table, ())]
        rows = old.select(matched).append_column("row", pa.array(range(old.num_rows)))
        taken = new.select(matched)
        others = rows.join(taken, matched, join_type="left anti", use_threads=False)
        new = pa.concat_tables([old.take(others["row"]), new])
    return new.sort_by([(key, "ascending") for key in keys])


def rewrite(source: Path, target: Path, table: str, columns: Collection[str]) -> None:
    """Copy a file as this version writes it, with some columns: null where it is older than one.

    Raises:
        InvalidTable: The file is not valid; nothing is written.
    """
    content = read(source, table, columns=[c for c in TABLES[table].names if c in columns])
    target.parent.mkdir(parents=True, exist_ok=True)
    _replace(target, _upsert(table, None, content))


def encoding(schema: pa.Schema) -> dict[str, Any]:
    """Return how a file is written: bytes of equal rank of the floats side by side, and zstd.

    A quarter smaller than a dictionary of floats, which hardly ever repeat. Pages have checksums:
    a flipped bit is no other number.
    """
    floats = {
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name: field.name
        for field in schema
        if pa.types.is_floating(getattr(field.type, "value_type", field.type))
    }
    return {
        "compression": "zstd",
        "compression_level": 9,
        "use_dictionary": [name for name in schema.names if name not in floats.values()],
        "column_encoding": dict.fromkeys(floats, "BYTE_STREAM_SPLIT"),
        "write_page_checksum": True,
    }


def _replace(path: Path, content: pa.Table) -> None:
    """Write a file beside the old one and rename it over."""
    with whole(path) as part:
        pq.write_table(content, part, **encoding(content.schema))
