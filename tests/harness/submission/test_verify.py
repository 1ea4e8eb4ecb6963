from __future__ import annotations

import itertools
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import spectra_db
from harness.campaign.spectrum import source_of
from harness.cli import main
from harness.estimator.operators import opened
from harness.estimator.settings import Settings
from harness.estimator.spectrum import gathered, rules
from harness.registry import ModelEntry, get
from harness.submission.recompute import Means
from harness.submission.retrain import compare_runs, verify_runs
from harness.submission.verify import at_hand, sample_rows, verify, verify_sample
from harness.training import load_problem
from harness.training.stages import checkpoint_path
from spectra_db import store
from spectra_db.quadrature import gauss_rule
from spectra_db.schema import LISTS
from spectra_db.verified import verified_models


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a trained model's checkpoints and its spectra, sampled and by Gram matrices."""
    out = tmp_path_factory.mktemp("published")
    call = CliRunner().invoke
    assert call(main, ["train", "cnn-digits", "--lr", "0.003", "--out", str(out)]).exit_code == 0
    for stage, how in (("init", "--no-gram"), ("final", "--gram")):
        arguments = ["spectrum", "cnn-digits", "--stage", stage, "--num-steps", "12", how]
        assert call(main, [*arguments, "--out", str(out)]).exit_code == 0
    return out


@pytest.fixture
def folder(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "copy"))


def rows_of(folder: Path, **only: object) -> pd.DataFrame:
    return spectra_db.load("spectra", source=folder, **only)


def check_of(folder: Path, row: dict, **changes: object):
    stages = spectra_db.load("stages", source=folder)
    means = Means(checkpoint_dir=folder / "checkpoints")
    return verify(row | changes, get("cnn-digits"), stages, means)


def test_rows_of_every_kind_and_stage_agree_to_the_last_bit_on_the_machine_that_made_them(folder):
    rows = sample_rows(rows_of(folder), 100, seed=0)
    assert set(rows["method"]) == {"slq", "exact"}
    assert set(rows["stage"]) == {"init", "final"}
    stages = spectra_db.load("stages", source=folder)
    checks = verify_sample(rows, stages, get, Means(checkpoint_dir=folder / "checkpoints"))
    assert len(checks) == len(rows)
    assert {check.outcome for check in checks} == {"agrees"}
    assert max(check.deviation for check in checks) < 1e-6


@pytest.mark.parametrize("factor", [1.02, 0.98, -1.0])
def test_a_spectrum_that_was_stretched_deviates(folder, factor):
    row = rows_of(folder, stage="init", method="slq").iloc[0].to_dict()
    changed = {"nodes": factor * row["nodes"]}
    changed |= {"alphas": factor * row["alphas"], "betas": abs(factor) * row["betas"]}
    assert check_of(folder, row, **changed).outcome == "deviates"


@pytest.mark.parametrize("factor", [1.001, 8.0])
def test_an_exact_spectrum_with_one_eigenvalue_altered_deviates(folder, factor):
    rows = rows_of(folder, stage="init", method="exact")
    for row in rows[rows["probe"] == 0].to_dict("records"):
        nodes = row["nodes"].copy()
        nodes[-1] *= factor
        assert check_of(folder, row, nodes=nodes).outcome == "deviates"


@pytest.mark.parametrize(("roundings", "outcome"), [(300, "agrees"), (5000, "deviates")])
def test_an_exact_spectrum_may_be_off_by_the_rounding_of_its_products(folder, roundings, outcome):
    row = rows_of(folder, stage="init", method="exact").iloc[0].to_dict()
    off = roundings * np.finfo(np.float32).eps * np.abs(row["nodes"]).max()
    assert check_of(folder, row, nodes=row["nodes"] + off).outcome == outcome


def of_scaled_outputs(scale: float) -> tuple[ModelEntry, list[dict]]:
    """Return a perceptron and two probes of a block in float64, said to be of float32."""
    options = {"widths": (16, 16, 16), "scale": scale}
    entry = replace(get("cnn-digits"), factory=get("mlp-mnist-c15").factory, options=options)
    problem = load_problem(entry)
    settings = Settings(num_probes=2, num_steps=12, exact_size=0, dtype="float64")
    block = problem.blocks("weights")[0]
    with opened(problem.objective, [block], settings) as hessian:
        stamp = source_of(problem) | {"run_id": "run", "dtype": "float32"}
        rows = gathered(rules(hessian, settings, stamp), [block]).to_dict("records")
    arrays = [{name: np.array(row[name]) for name in LISTS} for row in rows]
    return entry, [
        row | lists | {"dtype": "float32"} for row, lists in zip(rows, arrays, strict=True)
    ]


@pytest.mark.parametrize(
    ("scale", "mine", "other"),
    [(12.5, "agrees", "deviates"), (25.0, "unverifiable", "unverifiable")],
)
def test_of_networks_whose_products_round_more_as_much_is_allowed(scale, mine, other):
    entry, [row, second] = of_scaled_outputs(scale)
    stages = pd.DataFrame(columns=["model", "stage", "seed", "optimizer"])
    check = verify(row, entry, stages, Means())
    assert check.outcome == mine
    passed_off = verify(row | {name: second[name] for name in LISTS}, entry, stages, Means())
    assert passed_off.outcome == other


def test_a_row_of_coarse_arithmetic_that_any_probe_would_fit_is_not_verified(folder):
    row = rows_of(folder, stage="init", method="slq").iloc[0].to_dict()
    lists = {name: 3 * row[name] for name in ("alphas", "betas", "nodes")}
    check = check_of(folder, row, matmul_precision="medium", **lists)
    assert check.outcome == "unverifiable"
    assert "precision medium" in check.reason


def test_any_probe_by_differences_agrees_with_itself():
    problem = load_problem(get("cnn-digits"))
    settings = Settings(num_probes=2, num_steps=2, exact_size=0, product="differences")
    block = min(problem.blocks("weights"), key=lambda block: block.num_params)
    with opened(problem.objective, [block], settings) as hessian:
        stamp = source_of(problem) | {"run_id": "run"}
        rows = gathered(rules(hessian, settings, stamp), [block])
    stages = pd.DataFrame(columns=["model", "stage", "seed", "optimizer"])
    for row in rows.to_dict("records"):
        lists = {name: np.array(row[name]) for name in LISTS}
        check = verify(row | lists, problem.entry, stages, Means())
        assert (check.outcome, check.reason) == ("agrees", None)
        assert check.deviation < 1e-6


def test_another_probe_passed_off_as_this_one_deviates(folder):
    rows = rows_of(folder, stage="init", method="slq").to_dict("records")
    names = ("alphas", "betas", "nodes", "weights")
    check = check_of(folder, rows[0], **{name: rows[1][name] for name in names})
    assert check.outcome == "deviates"
    assert "another probe" in check.reason


def test_a_seed_that_is_not_the_probe_s_own_is_told(folder):
    row = rows_of(folder, stage="init", method="slq").iloc[0].to_dict()
    check = check_of(folder, row, probe_seed=7)
    assert check.outcome == "deviates"
    assert "seed" in check.reason


def test_another_batch_and_other_data_deviate(folder):
    row = rows_of(folder, stage="init").iloc[0].to_dict()
    assert check_of(folder, row, batch_hash="0" * 16).outcome == "deviates"
    for changes in ({"data_source": "other digits"}, {"batch_hash": "0" * 16, "data_source": "x"}):
        check = check_of(folder, row, **changes)
        assert check.outcome == "deviates"
        assert changes["data_source"] in check.reason


def test_a_rule_that_is_not_that_of_its_coefficients_deviates(folder):
    row = rows_of(folder, stage="init", method="slq").iloc[0].to_dict()
    check = check_of(folder, row, nodes=1.1 * row["nodes"])
    assert check.outcome == "deviates"
    assert "not that of its alphas and betas" in check.reason


def test_a_node_of_no_weight_that_makes_another_maximum_deviates(folder):
    row = rows_of(folder, stage="init", method="slq").iloc[0].to_dict()
    alphas = row["alphas"].copy()
    alphas[-1] = 3 * row["nodes"][-1]
    nodes, weights = gauss_rule(alphas, row["betas"])
    assert weights[-1] < 1e-6
    check = check_of(folder, row, alphas=alphas, nodes=nodes, weights=weights)
    assert (check.outcome, check.deviation < check.allowed) == ("deviates", True)
    assert "further apart" in check.reason


@pytest.mark.parametrize("changes", [{"breakdown": True}, {"num_steps": 4}])
def test_a_recurrence_that_ended_elsewhere_deviates(folder, changes):
    row = rows_of(folder, stage="init", method="slq").iloc[0].to_dict()
    check = check_of(folder, row, **changes)
    assert check.outcome == "deviates"
    assert "the recurrence took" in check.reason


def test_a_later_coefficient_that_was_altered_deviates_before_an_eigenvalue_has_converged(folder):
    row = rows_of(folder, stage="init", method="slq").iloc[0].to_dict()
    alphas = row["alphas"].copy()
    alphas[1] *= 1.1
    nodes, weights = gauss_rule(alphas, row["betas"])
    check = check_of(folder, row, alphas=alphas, nodes=nodes, weights=weights)
    assert check.outcome == "deviates"
    assert "first products" in check.reason


@pytest.mark.parametrize("harm", ["altered", "missing"])
def test_a_trained_stage_whose_checkpoint_is_not_the_published_one_can_t_be_verified(folder, harm):
    row = rows_of(folder, stage="final").iloc[0].to_dict()
    path = next((folder / "checkpoints").rglob("final.safetensors"))
    path.write_bytes(path.read_bytes() + b" ") if harm == "altered" else path.unlink()
    check = check_of(folder, row)
    assert check.outcome == "unverifiable"
    assert check.deviation is None
    assert "checkpoint of cnn-digits at final" in check.reason


def test_the_sample_follows_from_the_seed_and_holds_no_row_twice(folder):
    rows = rows_of(folder)
    first, again, other = (sample_rows(rows, 8, seed) for seed in (1, 1, 2))
    assert list(first.index) == list(again.index) != list(other.index)
    assert first.index.is_unique


def test_a_row_s_time_follows_from_its_products_here_not_from_what_it_says(folder, monkeypatch):
    clock = itertools.count()  # a second from look to look
    monkeypatch.setattr("harness.submission.verify.time.monotonic", lambda: float(next(clock)))
    rows = rows_of(folder, stage="init", method="slq").assign(seconds=0.0, num_steps=10**9)
    stages = spectra_db.load("stages", source=folder)
    means = Means(deadline=10**8)
    assert verify_sample(rows.head(2), stages, get, means) == []
    rows = rows_of(folder, stage="init", method="slq").assign(seconds=np.inf)
    assert len(verify_sample(rows.head(1), stages, get, means)) == 1


def test_a_training_run_repeats_and_another_curve_deviates(folder):
    def repeated(deadline=float("inf")):
        return verify_runs(folder, ["cnn-digits"], get, 1, Means(deadline=deadline), seed=0)

    [check] = repeated()
    assert (check.outcome, check.stage, check.block) == ("agrees", "training", "adamw at 0.003")
    assert check.deviation < 1e-6
    assert repeated(deadline=time.monotonic() + 0.01) == []
    path = store.path_of(folder, "training", "cnn-digits")
    rows = store.read(path, "training").to_pandas()
    flat = rows["value"].where(rows["step"] == 0, rows["value"].iloc[0])
    for changed, reason in ((flat, "the curve is another"), (0.9 * rows["value"], "it begins at")):
        found = compare_runs(rows.assign(value=changed), rows)[1]
        assert reason in found


def test_tables_that_do_not_follow_deviate_and_are_not_marked(folder):
    arguments = ["verify", str(folder), "--sample", "2", "--runs", "0", "--mark"]
    rows = store.read(store.path_of(folder, "heterogeneity", "cnn-digits"), "heterogeneity")
    rows = rows.to_pandas()
    mine = rows["metric"] == "js0"
    store.write(folder, "heterogeneity", rows.assign(value=rows["value"].where(~mine, 0.9)))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "tables that follow from others: 2 agree, 1 deviate" in result.stderr
    assert verified_models(folder) == {}


def test_the_command_ends_with_0_only_if_all_agree(folder):
    command = ["verify", str(folder), "--sample", "4", "--runs", "0", "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert {check["outcome"] for check in json.loads(result.stdout)} == {"agrees"}
    rows = rows_of(folder)
    rows["nodes"] = rows["nodes"] * 1.5
    rows["alphas"] = rows["alphas"] * 1.5
    rows["betas"] = rows["betas"] * 1.5
    store.write(folder, "spectra", rows)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "4 deviate" in result.stderr


def test_rows_are_drawn_of_stages_whose_weights_are_here(folder):
    command = ["verify", str(folder), "--sample", "100", "--runs", "0", "--json"]
    shutil.rmtree(folder / "checkpoints")
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    rows = rows_of(folder)
    at_init = int(((rows["stage"] == "init") & (rows["status"] == "ok")).sum())
    without = int((rows["stage"] != "init").sum())
    assert f"{without} rows are of checkpoints that are not here" in result.stderr
    assert f"{at_init} agree, 0 deviate, 0 can't be verified here" in result.stderr
    store.write(folder, "spectra", rows[rows["stage"] != "init"], replace=True)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "0 agree, 0 deviate" in result.stderr
    assert "the checkpoint of cnn-digits at final is not here" in result.stdout


def test_rows_that_all_failed_can_not_be_verified(folder):
    rows = rows_of(folder).assign(status="failed", reason="no memory")
    rows = rows[rows["probe"] == 0].assign(
        **{name: [()] * int((rows["probe"] == 0).sum()) for name in LISTS}
    )
    store.write(folder, "spectra", rows, replace=True)
    result = CliRunner().invoke(main, ["verify", str(folder)])
    assert result.exit_code != 0
    assert f"none of {len(rows)} rows holds a spectrum" in result.stderr


def test_initial_weights_that_were_given_are_those_of_a_checkpoint(tmp_path):
    rows = pd.DataFrame({"model": ["gpt-nano-sft"], "stage": ["init"], "init_seed": [3]})
    assert at_hand(rows, get, None).empty
    path = checkpoint_path(tmp_path, "gpt-nano-books", 1, "final")
    path.parent.mkdir(parents=True)
    path.touch()
    assert len(at_hand(rows, get, tmp_path)) == 1
    assert at_hand(rows.assign(model="stranger"), get, tmp_path).empty


def test_the_command_fails_where_nothing_can_be_verified(folder):
    rows = rows_of(folder).assign(model="stranger")
    (folder / "spectra" / "cnn-digits.parquet").unlink()
    store.write(folder, "spectra", rows)
    command = ["verify", "stranger", "--source", str(folder), "--sample", "5"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "not verifiable here (5)" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "no model 'no-such-model'"),
        (["--sample", "0"], "0 is not in the range"),
        (["--budget", "-1"], "must be positive"),
        (["--budget", "nan"], "must be positive"),
    ],
)
def test_arguments_out_of_range_are_usage_errors(folder, arguments, message):
    result = CliRunner().invoke(main, ["verify", "--source", str(folder), *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_a_folder_that_is_not_there_is_no_model(tmp_path):
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert f"there is no folder {tmp_path / 'none'}" in result.stderr


def test_what_agrees_is_marked_as_verified_on_request(folder):
    arguments = ["verify", str(folder), "--sample", "2"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert verified_models(folder) == {}
    assert CliRunner().invoke(main, [*arguments, "--mark"]).exit_code == 0
    extent = verified_models(folder)["cnn-digits"]
    assert (extent.rows_checked, extent.runs_checked, extent.runs) == (2, 1, 1)
    assert extent.rows == (rows_of(folder)["status"] == "ok").sum()
