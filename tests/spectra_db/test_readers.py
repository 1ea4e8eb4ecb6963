"""pyarrow, pandas, polars, DuckDB and `datasets` read the same values."""

from __future__ import annotations

import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import spectra_db
from spectra_db import store
from spectra_db.loading import BUNDLED
from spectra_db.release import release
from spectra_db.schema import TABLES

from .synthetic import failed_row, write_tables, zero_row


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundled release, or a small one with nulls and empty lists."""
    root = tmp_path_factory.mktemp("readers")
    tables = write_tables(root / "tables")
    rows = [zero_row(10, "zero") | {"model": "digits-cnn"}]
    rows.append(failed_row("failed") | {"model": "digits-cnn", "peak_bytes": 2**40})
    store.write(tables, "spectra", rows)
    release(tables, root / "data", "0.1.0")
    return root / "data"


def of_pandas(path):
    return pd.read_parquet(path)


def of_polars(path):
    import polars

    return {c.name: c.to_list() for c in polars.read_parquet(path)}


def of_duckdb(path):
    import duckdb

    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        answer = connection.sql(f"SELECT * FROM read_parquet('{path}')")
        return dict(zip(answer.columns, zip(*answer.fetchall(), strict=True), strict=True))


def of_datasets(path, cache):
    import datasets

    return datasets.Dataset.from_parquet(str(path), cache_dir=str(cache)).to_dict()


def plain(value):
    """Return a value as Python's own types say it."""
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.UTC).replace(tzinfo=None)
    if value is None or value is pd.NaT or value != value:
        return None
    return value.item() if isinstance(value, np.generic) else value


def check_readers(path, cache):
    expected = pq.read_table(path, partitioning=None).to_pydict()
    readers = {"pandas": of_pandas(path), "polars": of_polars(path), "duckdb": of_duckdb(path)}
    readers["datasets"] = of_datasets(path, cache)
    for name, columns in readers.items():
        assert list(columns) == list(expected), name
        for column, values in expected.items():
            found = [plain(v) for v in columns[column]]
            assert found == [plain(v) for v in values], (name, path.name, column)


def test_all_read_the_same_value_of_every_column(folder, tmp_path):
    paths = sorted(folder.glob("*/digits-cnn.parquet"))
    of_protocol_2 = {"trials", "speedups", "predictors"}
    others = {"leaderboard", "blocks"} | of_protocol_2
    assert {path.parent.name for path in paths} == set(TABLES) - others
    for path in paths:
        check_readers(path, tmp_path)


@pytest.mark.skipif(not (BUNDLED / "manifest.json").exists(), reason="no release is bundled")
def test_all_read_the_same_value_of_the_bundled_release_and_campaign(tmp_path):
    campaign = BUNDLED.with_name("campaign")
    paths = [*BUNDLED.glob("*/*.parquet"), *campaign.glob("*/*.parquet")]
    assert {path.parent.name for path in paths} >= set(TABLES) - {"predictors"}
    for folder in sorted({path.parent for path in paths}):
        check_readers(min(folder.glob("*.parquet")), tmp_path)


def test_the_globs_of_the_card_read_all_models_as_load_does(folder):
    import duckdb
    import polars

    expected = spectra_db.load("spectra", source=folder, stage="init")
    rows = polars.scan_parquet(folder / "spectra" / "*.parquet")
    rows = rows.filter(polars.col("stage") == "init").collect()
    assert rows["nodes"].to_list() == [list(nodes) for nodes in expected["nodes"]]
    with duckdb.connect() as connection:
        query = f"SELECT model, nodes FROM '{folder}/spectra/*.parquet' WHERE stage = 'init'"
        found = connection.sql(query).fetchall()
    key = sorted((model, list(nodes)) for model, nodes in found)
    assert key == sorted(
        (m, list(n)) for m, n in zip(expected["model"], expected["nodes"], strict=True)
    )


def test_every_reader_is_told_meaning_and_unit(folder):
    for path in folder.glob("*/digits-cnn.parquet"):
        for ours, theirs in zip(TABLES[path.parent.name], pq.read_schema(path), strict=True):
            assert ours == theirs
            # Parquet adds its own.
            assert ours.metadata.items() <= theirs.metadata.items()
    field = pq.read_schema(folder / "spectra" / "digits-cnn.parquet").field("nodes")
    assert field.metadata[b"unit"] == b"loss per squared parameter"
    assert field.type == pa.list_(pa.float64())
