from __future__ import annotations

import numpy as np
import pytest

from spectra_db import store
from spectra_db.diff import compare
from spectra_db.loading import BUNDLED
from spectra_db.store import InvalidTable

from .synthetic import gap_row, model_row, run_row, slq_row

RNG = np.random.default_rng(0)
SPECTRUM, START = np.sort(RNG.standard_normal(400) ** 3), RNG.standard_normal(400)


def differ(tmp_path, table, old, new):
    """Return the one row of the comparison of two rows, None if it is empty."""
    store.write(tmp_path / "old", table, [old])
    store.write(tmp_path / "new", table, [new])
    found = compare(tmp_path / "old", tmp_path / "new", table)
    return None if found.empty else found.iloc[0]


@pytest.mark.parametrize(
    ("gap", "change"), [(0.2, None), (0.2 + 0.056, "within"), (0.2 + 0.058, "changed")]
)
def test_a_gap_may_move_by_two_standard_errors_of_the_difference(tmp_path, gap, change):
    row = differ(tmp_path, "gaps", gap_row("a"), gap_row("a", gap=gap))
    assert (row is None and change is None) or row["change"] == change
    if row is not None:
        assert (row["column"], row["before"], row["after"]) == ("gap", 0.2, gap)
        assert row["allowed"] == pytest.approx(2 * np.hypot(0.02, 0.02), rel=1e-3)


def test_ends_of_intervals_move_with_their_number_and_errors_by_their_size(tmp_path):
    old = gap_row("a", ci_low=0.16, ci_high=0.24)
    moved = {"gap": 0.21, "ci_low": 0.17, "ci_high": 0.25, "standard_error": 0.022}
    assert differ(tmp_path, "gaps", old, old | moved)["change"] == "within"
    for table, column, by, change in (
        ("speedups", "log2_speedup", 0.5, "within"),
        ("speedups", "log2_speedup", 3.5, "changed"),
        ("predictors", "value", 0.5, "within"),
        ("predictors", "value", 3.5, "changed"),
        ("heterogeneity", "truncation_error", None, "within"),
        ("heterogeneity", "batch_error", None, "within"),
    ):
        place = tmp_path / f"{table}-{column}-{by}"
        rows = store.read(BUNDLED / table / "cifar-vit.parquet", table).to_pandas()
        rows = rows[rows[column].gt(0) & rows["standard_error"].gt(0)]
        old = rows.iloc[0].to_dict()
        new = 1.2 * old[column] if by is None else old[column] + by * old["standard_error"]
        row = differ(place, table, old, old | {column: new})
        assert (row["change"], row["column"]) == (change, column)


def test_a_probe_may_move_by_rounding_and_by_its_truncation(tmp_path):
    old = slq_row(SPECTRUM, "block", 0, START, 20)
    noise = 1 + 1e-8 * RNG.standard_normal(400)
    again = slq_row(SPECTRUM * noise, "block", 0, START, 20)
    for dtype, change in (("float32", "within"), ("float64", "changed")):
        rows = (row | {"dtype": dtype} for row in (old, again))
        assert differ(tmp_path / dtype, "spectra", *rows)["change"] == change
    other = slq_row(SPECTRUM, "block", 0, RNG.standard_normal(400), 20)
    row = differ(tmp_path / "other", "spectra", old, other | {"probe_seed": 7})
    assert row["change"] == "changed"
    larger = slq_row(2 * SPECTRUM, "block", 0, START, 20)
    row = differ(tmp_path / "larger", "spectra", old, larger)
    assert (row["change"], row["column"]) == ("changed", "nodes")
    assert row["after"] == pytest.approx(2 * row["before"])


def test_when_and_where_a_row_was_made_is_no_change(tmp_path):
    old = slq_row(SPECTRUM, "block", 0, START, 5)
    new = old | {"seconds": 9.0, "run_id": "other", "device": "cuda", "peak_bytes": 5}
    assert differ(tmp_path, "spectra", old, new) is None
    later = run_row("a", command="harness run a b", code_version="0.2.0")
    assert differ(tmp_path, "runs", run_row("a"), later) is None


@pytest.mark.parametrize("changes", [{"licence": "MIT"}, {"num_params": 141}, {"reason": "why"}])
def test_texts_and_counts_may_not_move_at_all(tmp_path, changes):
    row = differ(tmp_path, "models", model_row("a"), model_row("a", **changes))
    assert row["change"] == "changed"
    assert row["column"] in changes


def test_lists_are_compared_as_wholes(tmp_path):
    path = next(BUNDLED.with_name("campaign").glob("trials/*.parquet"))
    old = store.read(path, "trials").slice(0, 1).to_pylist()[0] | {"eval_losses": [2.0, 1.0]}
    row = differ(tmp_path, "trials", old, old | {"eval_losses": [2.0, 1.5]})
    assert (row["change"], row["column"], row["after"]) == ("changed", "eval_losses", (2.0, 1.5))
    assert differ(tmp_path / "same", "trials", old, old | {"seconds": 1e3}) is None


def test_a_number_that_came_or_went_is_a_change(tmp_path):
    row = differ(tmp_path, "gaps", gap_row("a"), gap_row("a", ci_low=0.1))
    assert (row["change"], row["column"], row["after"]) == ("changed", "ci_low", 0.1)


def test_the_largest_move_next_to_what_is_allowed_is_named(tmp_path):
    new = gap_row("a", gap=0.21, adam_loss=0.001, sgd_loss=0.41)
    row = differ(tmp_path, "gaps", gap_row("a"), new)
    assert (row["change"], row["column"]) == ("changed", "adam_loss")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    store.write(tmp_path / "old", "gaps", [gap_row("a")])
    (tmp_path / "old" / "gaps" / "a.parquet").write_bytes(b"torn")
    with pytest.raises(InvalidTable, match=r"gaps/a\.parquet: not readable as Parquet"):
        compare(tmp_path / "old", tmp_path / "old", "gaps")


def test_columns_that_came_with_a_version_are_no_obstacle(tmp_path):
    store.write(tmp_path / "new", "gaps", [gap_row("a")])
    path = tmp_path / "old" / "gaps" / "a.parquet"
    path.parent.mkdir(parents=True)
    table = store.read(tmp_path / "new" / "gaps" / "a.parquet", "gaps")
    store.pq.write_table(table.drop_columns(["sgd_lr"]), path)
    row = compare(tmp_path / "old", tmp_path / "new", "gaps").iloc[0]
    assert (row["change"], row["column"]) == ("changed", "sgd_lr")
