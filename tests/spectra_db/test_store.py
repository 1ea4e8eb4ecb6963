from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectra_db import store
from spectra_db.schema import KEYS, PROTOCOL_VERSION, TABLES, VERSIONS
from spectra_db.store import InvalidTable
from tests.processes import Process

from .synthetic import exact_row, failed_row, model_row, slq_row, zero_row

SMALL = np.array([1.0, 2.0, 4.0])


def spectrum(**changes: Any) -> dict[str, Any]:
    return exact_row(SMALL, "layer.weight") | changes


def sampled(**changes: Any) -> dict[str, Any]:
    start = np.random.default_rng(0).standard_normal(50)
    return slq_row(np.arange(50.0), "layer.weight", 0, start, 5) | changes


def training(**changes: Any) -> dict[str, Any]:
    row = {"model": "made-up", "optimizer": "sgd", "lr": 0.1, "seed": 0, "step": 0, "value": 2.0}
    row |= {"split": "train", "metric": "loss", "diverged": False, "protocol_version": 1}
    return row | changes


def read(root, table="spectra", model="made-up") -> pd.DataFrame:
    return store.read(store.path_of(root, table, model), table).to_pandas()


def value_of(field: pa.Field) -> st.SearchStrategy[Any]:
    number = st.floats(-1e300, 1e300, allow_nan=False)
    by_type = {
        pa.string(): st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5),
        pa.int64(): st.integers(-(2**63), 2**63 - 1),
        pa.int32(): st.integers(-(2**31), 2**31 - 1),
        pa.float64(): number,
        pa.bool_(): st.booleans(),
        pa.list_(pa.int64()): st.lists(st.integers(0, 2**40), max_size=3),
        pa.list_(pa.float64()): st.lists(number, max_size=3),
        pa.timestamp("us", tz="UTC"): st.datetimes(
            pd.Timestamp("1990-01-01").to_pydatetime(), pd.Timestamp("2100-01-01").to_pydatetime()
        ).map(lambda t: pd.Timestamp(t, tz="UTC")),
    }
    value = by_type[field.type]
    return st.one_of(st.none(), value) if field.nullable else value


@st.composite
def any_rows(draw):
    table = draw(st.sampled_from([t for t in TABLES if t != "spectra"]))
    columns = {f.name: value_of(f) for f in TABLES[table]}
    columns["protocol_version"] = st.just(VERSIONS.get(table, PROTOCOL_VERSION))
    for name in {"model", "family", "tier", "task"} & set(columns):
        columns[name] = st.just("made-up")
    if "status" in columns:
        columns["status"] = st.sampled_from(["ok", "failed", "pending", "zero"])
    key = KEYS[table]
    unique = draw(
        st.lists(
            st.fixed_dictionaries(columns),
            min_size=1,
            max_size=4,
            unique_by=lambda row: tuple(row[k] for k in key),
        )
    )
    return table, unique


@given(any_rows())
@settings(deadline=None, max_examples=60)
def test_what_is_written_is_read(tmp_path_factory, drawn):
    table, rows = drawn
    root = tmp_path_factory.mktemp("store")
    store.write(root, table, rows)
    back = store.read(store.path_of(root, table, rows[0].get("model", "all")), table).to_pylist()
    key = KEYS[table]
    as_key = lambda row: tuple(row[k] for k in key)  # noqa: E731
    assert sorted(back, key=as_key) == sorted(rows, key=as_key)


def test_spectra_round_trip_with_arrays_and_nulls(tmp_path):
    rows = [spectrum(), sampled(block="b", peak_bytes=12), zero_row(5, "c"), failed_row("d")]
    store.write(tmp_path, "spectra", rows)
    back = read(tmp_path)
    assert list(back["block"]) == ["b", "c", "d", "layer.weight"]
    assert np.array_equal(back["nodes"].iloc[3], SMALL)
    assert back["peak_bytes"].iloc[0] == 12
    assert back["peak_bytes"].isna().iloc[3]
    assert back["reason"].iloc[2] == "out of memory"
    # What was read, a DataFrame with numpy arrays and nan for null, can be written again.
    store.write(tmp_path / "again", "spectra", back)
    pd.testing.assert_frame_equal(read(tmp_path / "again"), back)


def test_columns_that_may_be_null_may_be_missing(tmp_path):
    row = spectrum()
    for column in ("peak_bytes", "tolerance", "reason"):
        del row[column]
    store.write(tmp_path, "spectra", [row])
    assert read(tmp_path)[["peak_bytes", "tolerance", "reason"]].isna().all(axis=None)


def test_a_file_older_than_a_column_is_read_and_added_to(tmp_path):
    row = {"model": "made-up", "stage": "init", "init_seed": 1, "train_run": "", "metric": "w1"}
    row |= {"partition": "weights", "scale": "lambda10", "sigma": 0.0, "protocol_version": 1}
    row |= {"num_blocks": 2, "num_zero_blocks": 0, "num_products": 10}
    store.write(tmp_path, "heterogeneity", [row | {"batch_size": 16}])
    path = store.path_of(tmp_path, "heterogeneity", "made-up")
    pq.write_table(pq.read_table(path).drop_columns(["batch_size"]), path)
    assert read(tmp_path, "heterogeneity")["batch_size"].isna().all()
    where = pc.field("batch_size") == 16
    assert store.read(path, "heterogeneity", where=where).num_rows == 0
    store.write(tmp_path, "heterogeneity", [row | {"stage": "final", "batch_size": 64}])
    found = read(tmp_path, "heterogeneity").set_index("stage")["batch_size"]
    assert found.dropna().to_dict() == {"final": 64}
    assert len(found) == 2


def test_writing_a_run_again_replaces_it_whole_and_leaves_others(tmp_path):
    store.write(tmp_path, "training", [training(), training(step=5), training(seed=2)])
    store.write(tmp_path, "training", [training(value=1.0), training(step=3)])
    back = read(tmp_path, "training")
    assert list(zip(back["seed"], back["step"], back["value"], strict=True)) == [
        (training()["seed"], 0, 1.0),
        (training()["seed"], 3, 2.0),
        (2, 0, 2.0),
    ]


def test_new_probes_of_a_block_replace_all_of_its_old_ones(tmp_path):
    store.write(tmp_path, "spectra", [sampled(probe=p) for p in range(5)])
    store.write(tmp_path, "spectra", [sampled(block="other")])
    store.write(tmp_path, "spectra", [sampled(probe=p, run_id="new") for p in range(3)])
    back = read(tmp_path)
    mine = back[back["block"] == "layer.weight"]
    assert list(mine["probe"]) == [0, 1, 2]
    assert set(mine["run_id"]) == {"new"}
    assert "other" in set(back["block"])


def test_each_model_has_its_file(tmp_path):
    store.write(tmp_path, "spectra", [spectrum(), spectrum(model="b")])
    assert sorted(p.name for p in (tmp_path / "spectra").glob("[!.]*")) == [
        "b.parquet",
        "made-up.parquet",
    ]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch, moment):
    store.write(tmp_path, "training", [training()])

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, die)
        with pytest.raises(KeyboardInterrupt):
            store.write(tmp_path, "training", [training(value=7.0)])
    assert list(read(tmp_path, "training")["value"]) == [2.0]
    assert not list(tmp_path.rglob("*.tmp"))
    store.write(tmp_path, "training", [training(value=3.0)])
    assert list(read(tmp_path, "training")["value"]) == [3.0]


def process(code: str, folder: Path, row: dict[str, Any], first: int = 0) -> Process:
    head = f"import os; from spectra_db import store; folder, row = {str(folder)!r}, {row!r}\n"
    return Process([f"{head}first = {first}\n{code}"], {}, folder)


def test_a_process_killed_before_the_rename_blocks_nobody(tmp_path):
    store.write(tmp_path, "training", [training()])
    code = "os.replace = lambda *_: os._exit(9); store.write(folder, 'training', [row])"
    assert process(code, tmp_path, training(value=7.0)).communicate()[0] == 9
    assert list(read(tmp_path, "training")["value"]) == [2.0]
    store.write(tmp_path, "training", [training(value=3.0)])
    assert list(read(tmp_path, "training")["value"]) == [3.0]


def test_processes_that_write_the_same_file_lose_no_row(tmp_path):
    code = (
        "for step in range(first, first + 10):\n"
        "    store.write(folder, 'training', [row | {'seed': step}])"
    )
    workers = [process(code, tmp_path, training(), 10 * i) for i in range(3)]
    assert [worker.communicate()[0] for worker in workers] == [0, 0, 0]
    assert list(read(tmp_path, "training")["seed"]) == list(range(30))


@pytest.mark.parametrize(
    "model", ["../escape", "a/b", "..", ".hidden", "", "A", "a b", "/etc/passwd", "a\n"]
)
def test_names_that_are_no_slugs_never_become_paths(tmp_path, model):
    with pytest.raises(InvalidTable, match="can't name a file"):
        store.write(tmp_path / "root", "training", [training(model=model)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (spectrum(weights=[0.5, 0.5, 0.5]), "row 0: the weights do not sum to 1"),
        (spectrum(weights=[1.5, -0.5, 0.0]), "row 0: a weight is negative"),
        (spectrum(nodes=[4.0, 2.0, 1.0]), "row 0: nodes are not ascending"),
        (
            spectrum(nodes=[1.0, 2.0, np.nan]),
            "row 0: column nodes holds a null, an infinity or nan",
        ),
        (
            spectrum(nodes=[1.0, 2.0, np.inf]),
            "row 0: column nodes holds a null, an infinity or nan",
        ),
        (spectrum(nodes=[1.0, 2.0]), "nodes and weights differ in length"),
        (spectrum(nodes=[1.0], weights=[1.0]), "as many nodes as parameters"),
        (spectrum(nodes=[0.0] * 4, weights=[0.25] * 4), "as many nodes as parameters"),
        (spectrum(nodes=[0.0, 1.0], weights=[0.5, 0.5]), "of a 0 for the rest as many times that"),
        (spectrum(nodes=[], weights=[]), "needs nodes"),
        (spectrum(alphas=[1.0], betas=[0.0]), "an exact row has no alphas"),
        (sampled(betas=[1.0]), "alphas and betas differ in length"),
        (sampled(alphas=[1.0], betas=[1.0]), "alphas and nodes differ in length"),
        (spectrum(weights=[0.5, 0.25, 0.25]), "row 0: the weights of an exact row are 1/n each"),
        (spectrum(nodes=[1.0, None, 2.0]), "row 0: column nodes holds a null, an infinity or nan"),
        (spectrum(nodes=None), "row 0: column nodes is null"),
        (zero_row(5, "b") | {"nodes": [1.0]}, "row 0: a zero row has one node, 0"),
        (zero_row(5, "b") | {"nodes": [0.0] * 2, "weights": [0.5] * 2}, "a zero row has one node"),
        (failed_row("b") | {"alphas": [1.0], "betas": [1.0]}, "failed or pending row has no rule"),
        (failed_row("b") | {"reason": ""}, "a failed or pending row needs a reason"),
        (spectrum(method="guess"), "method must be slq or exact"),
        (spectrum(num_params=0), "num_params must be at least 1"),
        (spectrum(status="done"), r"unknown status \['done'\]; known are ok, zero"),
        (failed_row("b") | {"reason": None}, "a failed or pending row needs a reason"),
        (failed_row("b") | {"nodes": [1.0], "weights": [1.0]}, "failed or pending row has no rule"),
        (spectrum(seconds=np.inf), "row 0: column seconds is an infinity or nan"),
        (spectrum(seconds=np.nan), "row 0: column seconds is null"),
        (spectrum(stage=None), "row 0: column stage is null"),
        (spectrum(protocol_version=2), r"protocol versions \[2\]; this code reads 1 alone"),
        (spectrum(num_params="many"), "column num_params must be int64"),
        (spectrum(color="red"), "table spectra has no column 'color'"),
    ],
)
def test_invalid_rows_are_refused_with_the_reason(tmp_path, row, message):
    with pytest.raises(InvalidTable, match=message):
        store.write(tmp_path, "spectra", [row])
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_key_that_repeats_is_refused(tmp_path):
    with pytest.raises(InvalidTable, match="the key of row 1 repeats an earlier one"):
        store.write(tmp_path, "training", [training(), training(value=1.0)])


def test_unknown_tables_are_refused(tmp_path):
    with pytest.raises(InvalidTable, match="unknown table 'spectrum'; known are models"):
        store.write(tmp_path, "spectrum", [training()])


def test_a_file_that_is_no_parquet_is_refused_by_name(tmp_path):
    path = tmp_path / "made-up.parquet"
    path.write_bytes(b"PAR1 nothing of the sort PAR1")
    with pytest.raises(InvalidTable, match=r"made-up\.parquet: not readable as Parquet"):
        store.read(path, "training")


def test_a_link_that_leads_nowhere_is_refused_by_name(tmp_path):
    path = tmp_path / "made-up.parquet"
    path.symlink_to(tmp_path / "gone.parquet")
    with pytest.raises(InvalidTable, match=r"made-up\.parquet: not readable"):
        store.read(path, "training")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_disk_that_fails_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch, number):
    store.write(tmp_path, "training", [training()])
    path = store.path_of(tmp_path, "training", "made-up")

    def fail(*args, **options):
        raise OSError(number, "no file is read")

    monkeypatch.setattr(store.pq, "ParquetFile", fail)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        store.read(path, "training")
    assert (caught.value.errno, caught.value.filename) == (number, str(path))


def test_a_file_cut_short_is_refused_by_name(tmp_path):
    store.write(tmp_path, "training", [training()])
    path = store.path_of(tmp_path, "training", "made-up")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidTable, match=r"made-up\.parquet: not readable"):
        store.read(path, "training")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns("value"), r"missing \['value'\], unknown \[\]"),
        (lambda t: t.append_column("extra", pa.array([1])), r"unknown \['extra'\]"),
        (lambda t: t.select(t.schema.names[::-1]), "out of order"),
        (
            lambda t: t.set_column(4, "step", pa.array(["0"])),
            "column step is string; it must be int64",
        ),
        (
            lambda t: t.set_column(0, "model", pa.array(["other"])),
            "holds rows of model 'other', not 'made-up'",
        ),
    ],
)
def test_files_of_another_schema_are_refused_by_name(tmp_path, change, message):
    store.write(tmp_path, "training", [training()])
    path = store.path_of(tmp_path, "training", "made-up")
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)
    with pytest.raises(InvalidTable, match=rf"made-up\.parquet: .*{message}"):
        store.read(path, "training")


def test_files_too_large_are_refused_before_they_are_read(tmp_path, monkeypatch):
    store.write(tmp_path, "training", [training()])
    path = store.path_of(tmp_path, "training", "made-up")
    monkeypatch.setattr(store, "MAX_FILE_BYTES", 100)
    with pytest.raises(InvalidTable, match=r"made-up\.parquet: \d+ bytes; a file has at most 100"):
        store.read(path, "training")


def test_small_files_that_unpack_to_much_are_refused(tmp_path, monkeypatch):
    rows = [spectrum(nodes=np.ones(50_000), weights=np.full(50_000, 2e-5), num_params=50_000)]
    store.write(tmp_path, "spectra", rows)
    path = store.path_of(tmp_path, "spectra", "made-up")
    size = path.stat().st_size
    assert size < 100_000
    monkeypatch.setattr(store, "MAX_FILE_BYTES", 200_000)
    with pytest.raises(InvalidTable, match=r"made-up\.parquet: unpacks to \d+ bytes"):
        store.read(path, "spectra")


@pytest.mark.parametrize(
    ("columns", "change", "message"),
    [
        (["nodes"], {"weights": [0.5, 0.25, 0.25]}, "the weights of an exact row are 1/n each"),
        (["alphas"], {"nodes": [3.0, 2.0, 1.0]}, "nodes are not ascending"),
        (["block"], {"protocol_version": 2}, r"protocol versions \[2\]"),
        (["nodes"], {"model": "other"}, "holds rows of model 'other'"),
    ],
)
def test_reading_some_columns_checks_what_they_depend_on(tmp_path, columns, change, message):
    store.write(tmp_path, "spectra", [spectrum()])
    path = store.path_of(tmp_path, "spectra", "made-up")
    rows = [row | change for row in pq.read_table(path, partitioning=None).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=TABLES["spectra"]), path)
    with pytest.raises(InvalidTable, match=rf"made-up\.parquet: .*{message}"):
        store.read(path, "spectra", columns=columns)


def test_a_key_that_repeats_in_a_file_is_refused_by_name_in_any_column(tmp_path):
    store.write(tmp_path, "training", [training()])
    path = store.path_of(tmp_path, "training", "made-up")
    rows = pq.read_table(path, partitioning=None)
    pq.write_table(pa.concat_tables([rows, rows]), path)
    with pytest.raises(InvalidTable, match=r"made-up\.parquet: the key of row 1 repeats"):
        store.read(path, "training", columns=["value"])


@pytest.mark.parametrize("column", ["family", "tier", "task"])
def test_names_of_families_tiers_and_tasks_are_no_markup(tmp_path, column):
    with pytest.raises(InvalidTable, match=f"{column} '<b>' is no slug"):
        store.write(tmp_path, "models", [model_row("a", **{column: "<b>"})])
    store.write(tmp_path, "models", [model_row("a", task="module.of:Mine")])


def test_a_curve_with_a_loss_that_is_not_finite_is_refused(tmp_path):
    row = dict.fromkeys(TABLES["trials"].names, 0) | {
        "model": "made-up", "optimizer": "sgd", "protocol_version": 2, "diverged": False,
        "eval_steps": [0, 1], "eval_losses": [2.0, float("nan")], "data_source": "",
        "code_version": "", "torch_version": "", "device": "cpu",
    }  # fmt: skip
    with pytest.raises(InvalidTable, match="eval_losses holds a null, an infinity or nan"):
        store.write(tmp_path, "trials", [row])
    store.write(tmp_path, "trials", [row | {"eval_losses": [2.0, 1.0]}])
