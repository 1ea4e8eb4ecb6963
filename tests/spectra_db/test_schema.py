from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest

from spectra_db.schema import EARLIER, KEYS, PROTOCOL_VERSION, TABLES

PROTOCOL = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
COLUMNS = [(table, field) for table, schema in TABLES.items() for field in schema]


@pytest.mark.parametrize(("table", "field"), COLUMNS, ids=[f"{t}.{f.name}" for t, f in COLUMNS])
def test_every_column_says_what_it_holds(table, field):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", field.name)
    assert field.metadata[b"description"].decode().strip()
    assert set(field.metadata) <= {b"description", b"unit", b"since"}
    assert field.metadata.get(b"unit", b"-")


@pytest.mark.parametrize("table", TABLES)
def test_keys_are_columns_that_are_never_null(table):
    schema, key = TABLES[table], KEYS[table]
    assert len(set(schema.names)) == len(schema.names)
    assert len(set(key)) == len(key) > 0
    for name in key:
        field = schema.field(name)
        assert not field.nullable
        assert not pa.types.is_list(field.type)


@pytest.mark.parametrize("table", TABLES)
def test_rows_tell_protocols_apart(table):
    assert not TABLES[table].field("protocol_version").nullable
    # A run's id hashes the version of the code, which knows one protocol; a row of a later protocol
    # takes the place of one of an earlier that is still read.
    assert "protocol_version" in KEYS[table] or table in {"runs", *EARLIER}


@pytest.mark.parametrize("table", [t for t in TABLES if t != "leaderboard"])
def test_tables_of_models_begin_with_the_model(table):
    assert TABLES[table].names[0] == KEYS[table][0] == "model"


@pytest.mark.parametrize("table", [t for t in TABLES if "status" in TABLES[t].names])
def test_a_status_comes_with_a_reason(table):
    assert not TABLES[table].field("status").nullable
    assert TABLES[table].field("reason").nullable


def test_a_spectrum_is_keyed_by_all_that_makes_it_another_one():
    assert TABLES["spectra"].names[: len(KEYS["spectra"])] == list(KEYS["spectra"])
    for name in ("alphas", "betas", "nodes", "weights"):
        assert TABLES["spectra"].field(name).type == pa.list_(pa.float64())


@pytest.mark.parametrize("table", TABLES)
def test_the_reference_page_lists_the_table_with_its_key(table):
    [line] = re.findall(rf"^\| `{table}` \| ([^|]*) \|", PROTOCOL, re.MULTILINE)
    key = [name for name in KEYS[table] if name != "protocol_version"]
    assert line.strip().split(", ") == key
    assert PROTOCOL.startswith(f"# Protocol {PROTOCOL_VERSION}:")
