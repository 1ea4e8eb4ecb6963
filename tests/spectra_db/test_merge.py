"""Folders of tables brought together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import spectra_db
from harness.cli import main
from spectra_db import store
from spectra_db.heterogeneity import metrics
from spectra_db.merge import merge
from spectra_db.release import list_files
from tests.harness.leaderboard.tables import speedup_row

from .synthetic import COMMON, exact_row, exact_rows, failed_row, gap_row, run_row, write_tables


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Return two folders of one model each."""
    root = tmp_path_factory.mktemp("folders")
    return write_tables(root / "one", ["one"]), write_tables(root / "two", ["two"])


def rows_of(folder: Path, table: str) -> list[dict]:
    frame = spectra_db.load(table, source=folder)
    return sorted(map(str, frame.map(lambda x: list(x) if hasattr(x, "__len__") else x).values))


def test_no_row_is_lost_and_every_run_is_kept(folders, tmp_path):
    found = merge(folders, tmp_path)
    assert not found.conflicts
    assert not found.derived
    for table in ("spectra", "training", "stages", "heterogeneity", "models", "gaps", "runs"):
        expected = sorted(row for folder in folders for row in rows_of(folder, table))
        assert rows_of(tmp_path, table) == expected, table
        assert found.added[table] == len(expected)
    assert merge(folders, tmp_path).added.keys() == found.added.keys()
    assert set(merge(folders, tmp_path).added.values()) == {0}


def block(values: float, **changes: object) -> dict:
    return exact_row([values, 2 * values], "b") | {"run_id": "r"} | changes


def folder_of(path: Path, *rows: dict) -> Path:
    store.write(path, "spectra", list(rows))
    store.write(path, "runs", [run_row(COMMON["model"], run_id=rows[0]["run_id"])])
    return path


def test_the_same_taken_twice_is_kept_once(tmp_path):
    one = folder_of(tmp_path / "one", block(1.0, seconds=1.0))
    two = folder_of(tmp_path / "two", block(1.0, seconds=9.0, run_id="other"))
    assert not merge([two], one).conflicts
    assert spectra_db.load("spectra", source=one)["seconds"].tolist() == [1.0]
    assert set(spectra_db.load("runs", source=one)["run_id"]) == {"r", "other"}


def test_folders_that_disagree_are_named_and_nothing_is_written(tmp_path):
    one, two = folder_of(tmp_path / "one", block(1.0)), folder_of(tmp_path / "two", block(3.0))
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["dataset", "merge", str(one), str(two), "--out", str(out)])
    assert done.exit_code == 1
    for text in ("spectra/made-up.parquet", "block b", str(one), str(two), "differ in nodes"):
        assert text in done.output
    assert not list_files(out)
    assert not out.exists()


@pytest.mark.parametrize("order", [("good", "bad"), ("bad", "good")])
def test_what_failed_in_one_folder_and_came_of_the_other_is_there(tmp_path, order):
    folder_of(tmp_path / "good", block(1.0))
    folder_of(tmp_path / "bad", failed_row("b") | {"run_id": "x"})
    assert not merge([tmp_path / name for name in order], tmp_path / "out").conflicts
    assert spectra_db.load("spectra", source=tmp_path / "out")["status"].tolist() == ["ok"]


def test_probes_of_a_block_come_from_one_folder(tmp_path):
    few, many = tmp_path / "few", tmp_path / "many"
    write_tables(few, ["one"])
    rows = store.read(few / "spectra" / "one.parquet", "spectra").to_pylist()
    store.write(many, "spectra", [row for row in rows if row["probe"] < 2])
    found = merge([few, many], tmp_path / "out")
    assert len(found.conflicts) == 4  # two blocks at two stages
    assert all("probe" in text for text in found.conflicts)


@pytest.mark.parametrize(
    ("table", "row", "column"),
    [("gaps", gap_row("m"), "gap"), ("speedups", speedup_row("m"), "log2_speedup")],
)
def test_what_follows_from_runs_is_left_to_be_derived_again_where_it_differs(
    tmp_path, table, row, column
):
    for name, value in (("one", 0.2), ("two", 0.3)):
        store.write(tmp_path / name, table, [row | {column: value}])
    out = tmp_path / "out"
    command = ["dataset", "merge", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0
    assert f"`harness run` derives it again: {table}/m.parquet: model m" in done.output
    assert not list_files(out)


def test_results_of_two_versions_of_an_entry_do_not_go_together(folders, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, width in ((one, 8), (two, 16)):
        shutil.copytree(folders[0], folder)
        (folder / "entries").mkdir()
        (folder / "entries" / "one.json").write_text(json.dumps({"options": {"width": width}}))
    assert "different versions" in merge([one, two], tmp_path / "out").conflicts[-1]
    assert not merge([one], tmp_path / "out").conflicts
    assert (tmp_path / "out" / "entries" / "one.json").read_text() == '{"options": {"width": 8}}'


def test_tables_of_larger_batches_are_brought_along(tmp_path):
    folder_of(tmp_path / "one" / "larger_batch", block(1.0))
    merge([tmp_path / "one"], tmp_path / "out")
    assert len(spectra_db.load("spectra", source=tmp_path / "out" / "larger_batch")) == 1


def test_folders_of_two_protocols_are_refused_before_anything_is_written(tmp_path):
    for seed, (name, version) in enumerate((("one", 2), ("two", 3))):
        rows = exact_rows([np.arange(1.0, 4), np.arange(4.0)]).assign(init_seed=seed)
        store.write(tmp_path / name, "spectra", rows)
        store.write(tmp_path / name, "heterogeneity", metrics(rows, version=version))
    with pytest.raises(store.InvalidTable, match=r"one has .* 2, .*two has .* 3; .*derive"):
        merge([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
