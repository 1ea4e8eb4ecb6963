from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

from harness.cli import main
from harness.leaderboard.statistics import measurements
from spectra_db import manifest, store
from spectra_db.loading import NotFound, load
from spectra_db.provenance import trace
from spectra_db.release import release

from .synthetic import write_tables


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    release(write_tables(root / "tables"), root / "data", "0.1.0")
    return root / "data"


def test_checkpoints_are_those_of_the_spectrum_s_own_seed(source, tmp_path):
    shutil.copytree(source, tmp_path / "tables", ignore=shutil.ignore_patterns("manifest.json"))
    rows = load("stages", source=source, model="digits-cnn")
    store.write(tmp_path / "tables", "stages", rows.assign(seed=2, checkpoint_sha256="1" * 64))
    found = trace("digits-cnn", tmp_path / "tables")["spectra"]
    assert [spectrum["checkpoint_sha256"] for spectrum in found] == [None, "0" * 64]


def test_every_spectrum_leads_to_its_run_command_code_and_seeds(source):
    found = trace("digits-cnn", source)
    runs = {run["run_id"]: run for run in found["runs"]}
    assert [s["stage"] for s in found["spectra"]] == ["init", "final"]
    for spectrum in found["spectra"]:
        assert (spectrum["rows"], spectrum["blocks"], spectrum["probes"]) == (6, 2, 3)
        run = runs[spectrum["run_id"]]
        assert run["command"] == "harness run digits-cnn"
        assert (run["code_version"], run["seeds"]) == ("0.1.0+abc", [1])
    assert [s["checkpoint_sha256"] for s in found["spectra"]] == [None, "0" * 64]


def test_the_speed_up_leads_to_its_trials():
    found = trace("cifar-vit")
    assert found["speedup"]["num_trials"] == len(found["trials"])
    command = ["describe", "cifar-vit", "--provenance"]
    output = CliRunner().invoke(main, command).output
    assert "log2 speed-up 0.76 [0.68, 0.83]: 58 trials" in output
    best = [t for t in found["trials"] if t["lr"] == found["speedup"]["adam_lr"]]
    assert output.count("adamw at 0.00533, seed") == len(best)
    assert "gap" not in output
    assert "at init, seed 3, partition weights" in output


def test_the_gap_leads_to_the_ends_of_training_runs(source):
    found = trace("digits-cnn", source)
    assert found["gap"]["gap"] == 0.2
    [run] = found["training"]
    assert (run["optimizer"], run["seed"], run["step"], run["loss"]) == ("adamw", 1, 4, 0.4)


def test_files_come_with_the_sha256_of_the_release(source):
    found = trace("digits-cnn", source)
    known = manifest.read(source)
    assert found["version"] == "0.1.0"
    assert set(found["files"]) == {p for p in known.files if p.endswith("/digits-cnn.parquet")}
    assert trace("digits-cnn", source.parent / "tables")["version"] is None


def test_an_unknown_model_is_refused(source):
    with pytest.raises(NotFound, match="no model 'digits-cn' in table models; did you"):
        trace("digits-cn", source)


def test_the_command_prints_it_and_json_has_the_same(source):
    command = ["describe", "digits-cnn", "--provenance", "--source", str(source)]
    answer = CliRunner().invoke(main, [*command, "--json"])
    assert json.loads(answer.output) == trace("digits-cnn", source)
    output = CliRunner().invoke(main, command).output
    for text in ("gap 0.2000 ± 0.0200", "harness run digits-cnn", "code 0.1.0+abc", "seeds 1"):
        assert text in output
    for sha256 in trace("digits-cnn", source)["files"].values():
        assert sha256 in output


@pytest.mark.slow
def test_every_measurement_of_the_leaderboard_leads_to_spectra_and_runs(bundled):
    entered = measurements(bundled.models, bundled.heterogeneity, bundled.gaps)
    entered = entered[entered["enters"] & (entered["metric"] == "js0")]
    assert entered["model"].nunique() >= 44
    for model, ours in entered.groupby("model"):
        found = trace(str(model))
        runs = {run["run_id"] for run in found["runs"]}
        stages = {s["stage"] for s in found["spectra"] if s["run_id"] in runs and not s["failed"]}
        assert set(ours["stage"]) <= stages, model
