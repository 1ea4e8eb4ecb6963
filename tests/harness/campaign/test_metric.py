from __future__ import annotations

from pathlib import Path

import pandas as pd
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
    call(tmp_path, "--num-probes", "3", "--num-steps", "10", "--no-gram")
    before, _, _ = tables(tmp_path)
    assert set(before["tolerance"].isna()) == {True}
    shown = call(tmp_path, "--tol", "0.2")
    assert "js0 0." in shown
    rows, metrics, _ = tables(tmp_path)
    assert set(rows["tolerance"].dropna()) == {0.2}
    [js0] = metrics[(metrics["metric"] == "js0") & (metrics["scale"] == "own_rms")].to_dict(
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
    assert "the relative error of js0 is still above 0.0001" in said
    assert "raise --num-steps" in said
    rows, _, _ = tables(tmp_path)
    assert set(rows["num_steps"]) <= {0, 5}


@pytest.mark.slow
def test_the_batch_error_is_the_difference_of_the_metrics_on_two_halves(tmp_path):
    arguments = ["--num-probes", "3", "--num-steps", "8", "--no-gram"]
    shown = call(tmp_path, *arguments, "--batch-error")
    rows = spectra_db.load("heterogeneity", source=tmp_path)
    [js0] = rows.loc[(rows["metric"] == "js0") & (rows["scale"] == "own_rms"), "batch_error"]
    assert f"js0 of the batch's halves: {js0:.4f} apart" in shown
    assert (rows["batch_error"] >= 0).all()
    from harness.estimator.settings import Settings
    from harness.estimator.spectrum import gathered, rules
    from harness.registry import get
    from harness.training import load_problem

    problem = load_problem(get(MODEL))
    [(images, labels)] = problem.batches
    middle = len(images) // 2
    settings, halves = Settings(num_probes=3, num_steps=8), []
    source = {"model": MODEL, "stage": "init", "init_seed": 1}
    for part in (slice(middle), slice(middle, None)):
        with problem.on([(images[part], labels[part])]).hessian(settings) as hessian:
            rows = gathered(rules(hessian, settings, source), hessian.blocks)
        halves.append(spectra_db.js0(rows).corrected)
    assert js0 == pytest.approx(abs(halves[0] - halves[1]), abs=1e-6)
    # The whole batch's spectrum stands alone, and nothing is taken twice.
    assert len(set(spectra_db.load("spectra", source=tmp_path)["batch_hash"])) == 1
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("halves/*/spectra/*.parquet")}
    assert len(stamps) == 2
    assert call(tmp_path, *arguments, "--batch-error") == shown
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    # Another seed in the same folder has an error of its own, and leaves the first one's.
    first = spectra_db.load("heterogeneity", source=tmp_path)
    shown = call(tmp_path, *arguments, "--batch-error", "--seed", "2")
    rows = spectra_db.load("heterogeneity", source=tmp_path)
    other = rows[(rows["metric"] == "js0") & (rows["scale"] == "own_rms") & rows["init_seed"].eq(2)]
    assert f"js0 of the batch's halves: {other['batch_error'].item():.4f} apart" in shown
    pd.testing.assert_frame_equal(rows[rows["init_seed"] == 1].reset_index(drop=True), first)


def test_the_batch_error_refuses_what_it_has_no_meaning_for(tmp_path):
    assert "leave out --tol" in call(tmp_path, "--batch-error", "--tol", "0.1", code=2)
    said = call(tmp_path, "--batch-error", "--dtype", "float64", "--num-steps", "2", code=2)
    assert "the protocol's settings" in said
    assert not (tmp_path / "spectra").exists()
