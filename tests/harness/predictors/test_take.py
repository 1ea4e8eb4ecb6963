from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

import spectra_db
from harness.campaign.metric import halves as halves_of
from harness.campaign.metric import take_batch_error
from harness.campaign.spectrum import take_spectrum
from harness.cli import main
from harness.errors import UserError
from harness.estimator.settings import Settings
from harness.predictors import PREDICTORS
from harness.predictors import take as module
from harness.predictors.take import take
from harness.records.ledger import Ledger
from harness.registry import get
from spectra_db.schema import VERSIONS

SPECTRAL = {p.name for p in PREDICTORS if p.family == "spectrum"}


@pytest.fixture(scope="module")
def entry():
    return replace(get("cnn-digits"), name="tiny", options={"widths": (4, 6)})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, entry):
    """A folder with all predictors, on 32 images and for two initialisations."""
    out = tmp_path_factory.mktemp("predictors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "IMAGES", 32)
        patch.setattr(module, "SEEDS", (1, 2))
        seen = []
        take(entry, None, out, "cpu", lambda done, total: seen.append((done, total)))
        yield out, seen


def rows_of(out: Path) -> pd.DataFrame:
    return spectra_db.load("predictors", source=out).set_index(["init_seed", "predictor"])


def test_every_predictor_is_there_for_every_seed_with_its_halves(whole):
    out, seen = whole
    rows = rows_of(out)
    assert set(rows.index) == {(s, p.name) for s in (1, 2) for p in PREDICTORS}
    assert (seen[0], seen[-1]) == ((0, 10), (10, 10))
    assert set(rows["protocol_version"]) == {VERSIONS["predictors"]} == {2}
    assert set(rows["batch_size"]) == {32}
    families = {p.name: p.family for p in PREDICTORS}
    family = rows.index.get_level_values("predictor").map(families)
    on_halves = family.isin(["gradient", "blocks", "full"])
    assert (rows["status"] == "ok").equals(pd.Series(family != "spectrum", rows.index))
    assert rows.loc[on_halves, ["first_half", "second_half", "unstable"]].notna().all(axis=None)
    assert rows.loc[~on_halves, ["first_half", "second_half", "unstable"]].isna().all(axis=None)
    difference = (rows["first_half"] - rows["second_half"]).abs()[on_halves]
    unstable = difference > 0.2 * rows["value"].abs()[on_halves]
    assert (rows["unstable"][on_halves].astype(bool) == unstable).all()
    assert unstable.any()
    runs = spectra_db.load("runs", source=out)
    assert set(rows["run_id"]) <= set(runs["run_id"])


def test_what_is_there_is_not_measured_again_and_what_is_missing_is(whole, entry, monkeypatch):
    out, _ = whole
    before = rows_of(out)

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "of_full", fail)
    monkeypatch.setattr(module, "of_gradients", fail)
    take(entry, None, out, "cpu")
    after = rows_of(out)
    measured = before["status"] == "ok"
    assert after[measured].equals(before[measured])
    # On another batch they are other numbers.
    monkeypatch.setattr(module, "IMAGES", 31)
    with pytest.raises(AssertionError, match="measured again"):
        take(entry, None, out, "cpu")


def test_spectra_are_read_and_those_that_are_missing_are_pending(whole, entry):
    out, _ = whole
    assert set(rows_of(out).loc[1].loc[sorted(SPECTRAL), "status"]) == {"pending"}
    small = replace(entry, hessian_batch_size=32)
    settings = Settings(num_probes=3, num_steps=4, device="cpu")
    problem = module.load(small, 1, None, Ledger(out))
    take_spectrum(problem, settings, Ledger(out), command="")
    take_batch_error(halves_of(problem, settings), settings, Ledger(out), command="")
    take(small, None, out, "cpu")
    rows = rows_of(out)
    metrics = spectra_db.load("heterogeneity", source=out, metric="js0")
    found = rows.loc[1].loc[sorted(SPECTRAL)]
    for name, scale in (
        ("js0_raw", "raw"),
        ("js0_own_rms", "own_rms"),
        ("js0_lambda10", "lambda10"),
    ):
        [row] = metrics[metrics["scale"] == scale].to_dict("records")
        assert found.loc[name, "value"] == pytest.approx(row["corrected"])
        assert found.loc[name, "standard_error"] == pytest.approx(row["standard_error"])
        difference = abs(found.loc[name, "first_half"] - found.loc[name, "second_half"])
        assert difference == pytest.approx(row["batch_error"])
    assert 0 < found.loc["energy_js", "value"] < 1
    assert set(rows.loc[2].loc[sorted(SPECTRAL), "status"]) == {"pending"}
    assert "harness spectrum" in rows.loc[(2, "js0_raw"), "reason"]
    # Spectra of halves that are gone leave what was measured of them.
    for half in Ledger(out).halves:
        shutil.rmtree(half.folder)
    take(small, None, out, "cpu")
    assert rows_of(out).loc[1].loc[sorted(SPECTRAL)].equals(found)


def test_an_entry_that_is_not_trained_is_refused(tmp_path, entry):
    with pytest.raises(UserError, match="not trained"):
        take(replace(entry, recipe=None, stages=("init",), full_stages=()), None, tmp_path, "cpu")
    assert not (tmp_path / "predictors").exists()


def test_the_command_says_what_it_found(whole, monkeypatch, tmp_path):
    out, _ = whole
    monkeypatch.setattr(module, "IMAGES", 32)
    registry = tmp_path / "registry"
    registry.mkdir()
    (registry / "tiny.py").write_text(
        "from dataclasses import replace\n"
        "from harness.registry import get\n"
        'CHANGES = {"name": "tiny", "options": {"widths": (4, 6)}, "hessian_batch_size": 32}\n'
        'ENTRIES = [replace(get("cnn-digits"), **CHANGES)]\n'
    )
    arguments = ["predictors", "tiny", "--registry", str(registry), "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    assert "tiny: 32 ok, 4 pending" in result.stdout
    assert "unstable" in result.stdout
    assert CliRunner().invoke(main, ["predictors", "--out", str(out)]).exit_code == 2
