from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import spectra_db
from harness.cli import main
from spectra_db.heterogeneity import measure

MODEL = "cnn-digits"


def call(out: Path, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(
        main, ["spectrum", MODEL, "--device", "cpu", "--out", str(out), *arguments]
    )
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def tables(out: Path):
    return [spectra_db.load(table, source=out) for table in ("spectra", "heterogeneity", "blocks")]


def test_a_scale_metric_takes_ten_products_a_block_and_says_nothing_of_other_metrics(tmp_path):
    shown = call(tmp_path, "--metric", "lambda_rms_spread")
    assert "lambda_rms_spread 0." in shown
    assert "10 probes × 1 steps" in shown
    rows, metrics, blocks = tables(tmp_path)
    sampled = rows[rows["method"] == "slq"]
    assert set(sampled.groupby("block")["num_products"].sum()) == {10}
    assert "js0" not in set(metrics["metric"])
    assert {"lambda_rms_spread", "trace_spread", "gradient_rms_spread"} <= set(metrics["metric"])
    assert set(blocks["block"]) == set(rows["block"])


def test_a_gradient_metric_takes_no_product_and_keeps_what_is_there(tmp_path):
    shown = call(tmp_path, "--metric", "gradient_rms_spread")
    assert not (tmp_path / "spectra").exists()
    blocks = spectra_db.load("blocks", source=tmp_path)
    assert blocks["trace"].isna().all()
    assert (blocks["gradient_rms"] > 0).all()
    call(tmp_path, "--metric", "lambda_rms_spread")
    before = spectra_db.load("blocks", source=tmp_path)
    assert call(tmp_path, "--metric", "gradient_rms_spread") == shown
    assert spectra_db.load("blocks", source=tmp_path).equals(before)


def test_a_tolerance_is_met_stored_and_builds_on_what_is_there(tmp_path):
    call(tmp_path, "--num-probes", "3", "--num-steps", "10")
    before, _, _ = tables(tmp_path)
    assert set(before["tolerance"].isna()) == {True}
    shown = call(tmp_path, "--tol", "0.2")
    assert "js0 0." in shown
    rows, metrics, _ = tables(tmp_path)
    assert set(rows["tolerance"].dropna()) == {0.2}
    [js0] = metrics[(metrics["metric"] == "js0") & (metrics["scale"] == "lambda10")].to_dict(
        "records"
    )
    assert max(js0["standard_error"], js0["truncation_error"]) <= 0.2 * js0["corrected"]
    estimate, truncation_error = measure(rows, "js0")
    assert (estimate.standard_error, truncation_error) == pytest.approx(
        (js0["standard_error"], js0["truncation_error"])
    )
    # A cheaper question afterwards takes nothing away.
    call(tmp_path, "--metric", "lambda_rms_spread", "--num-probes", "3")
    assert len(spectra_db.load("spectra", source=tmp_path)) >= len(rows)
    assert "js0" in set(spectra_db.load("heterogeneity", source=tmp_path)["metric"])


def test_a_tolerance_that_is_not_met_is_a_failure_that_keeps_what_was_reached(tmp_path):
    said = call(tmp_path, "--tol", "0.0001", "--num-probes", "3", "--num-steps", "5", code=1)
    assert "not known to 0.0001 of itself" in said
    assert "raise --num-steps" in said
    rows, _, _ = tables(tmp_path)
    assert set(rows["num_steps"]) <= {0, 5}
