from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner

from harness.campaign.unfinished import unfinished
from harness.cli import main
from harness.errors import UserError
from harness.leaderboard.board import derived_of_release
from harness.records.derived import derived
from harness.registry import get
from spectra_db import store
from spectra_db.derived import DERIVED, differences, rows_of
from spectra_db.followed import note_of
from spectra_db.loading import BUNDLED
from spectra_db.schema import TABLES, VERSIONS

MODEL = "mlp-mnist-c1"

pytestmark = pytest.mark.skipif(
    not (BUNDLED / "spectra" / f"{MODEL}.parquet").exists(), reason="no release is bundled"
)


def run(*arguments):
    """Return exit code and output of a command line."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.fixture
def source(tmp_path):
    """Return the tables of one model of the bundled release."""
    for table in TABLES:
        path = BUNDLED / table / f"{MODEL}.parquet"
        if path.exists():
            (tmp_path / "tables" / table).mkdir(parents=True)
            shutil.copyfile(path, tmp_path / "tables" / table / path.name)
    return tmp_path / "tables"


def test_a_release_is_made_checked_and_compared_by_command(source, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    code, output = run("dataset", "release", source, "--out", old, "--version", "0.1.0")
    assert code == 0, output
    assert "old is a sound release, version 0.1.0" in output
    code, output = run("dataset", "check", old)
    assert (code, output.strip()) == (0, f"{old} is a sound release, version 0.1.0")

    rows = store.read(source / "training" / f"{MODEL}.parquet", "training").to_pandas()
    mine = (rows["optimizer"] == "sgd") & (rows["step"] > 0) & (rows["split"] == "train")
    store.write(source, "training", rows.assign(value=rows["value"].where(~mine, 0.5)))
    gaps = rows_of(source, "gaps", MODEL)
    store.write(source, "gaps", made_anew(source, gaps))
    assert run("dataset", "release", source, "--out", new, "--version", "0.1.1")[0] == 0
    code, output = run("dataset", "diff", old, new)
    assert code == 0
    [line] = [line for line in output.splitlines() if line.startswith("gaps: ")]
    assert line.startswith(f"gaps: {MODEL}, 1: gap ")
    answer = json.loads(run("dataset", "diff", old, new, "--json")[1])
    assert [row["change"] for row in answer["gaps"]] == ["changed"]

    (new / "gaps" / f"{MODEL}.parquet").unlink()
    code, output = run("dataset", "check", new)
    assert code == 1
    assert f"gaps/{MODEL}.parquet: the manifest lists it, it is not there" in output


def made_anew(folder, gaps):
    [row] = derived()["gaps"](folder, gaps).to_dict("records")
    return gaps.assign(**{k: v for k, v in row.items() if k in gaps})


@pytest.mark.parametrize(
    ("table", "column", "values"),
    [
        ("gaps", "gap", 0.9),
        ("gaps", "sgd_lr", 0.5),
        ("training", "value", 2.0),  # flattened curves
        ("blocks", "trace", 1.0),
    ],
)
def test_numbers_that_do_not_follow_from_each_other_are_named(source, table, column, values):
    store.write(source, table, rows_of(source, table, MODEL).assign(**{column: values}))
    of = "gaps" if table == "training" else table
    [problem] = differences(source, {of: derived()[of]})
    assert problem.startswith(f"{source / of / MODEL}.parquet: ")
    assert "made anew" in problem


def test_metrics_of_protocol_1_are_derived_anew_by_command_and_then_follow(source):
    of_all = {"heterogeneity": DERIVED["heterogeneity"]}
    rows = rows_of(source, "heterogeneity", MODEL)
    store.write(source, "heterogeneity", rows.assign(protocol_version=1), replace=True)
    code, output = run("dataset", "derive", source)
    assert (code, output.strip()) == (
        0,
        "1 models derived anew, the others are of the last protocol",
    )
    now = rows_of(source, "heterogeneity", MODEL)
    assert set(now["protocol_version"]) == {VERSIONS["heterogeneity"]}
    assert len(now) == len(rows)
    assert differences(source, of_all) == []
    assert run("dataset", "derive", source)[1].startswith("0 models")


def test_a_gap_without_its_entry_can_not_be_made_anew(source):
    def unknown(name):
        raise UserError(f"no model {name!r}")

    [problem] = differences(source, derived(unknown), models=[MODEL])
    assert "--registry DIR adds entries" in problem


def test_what_follows_from_other_tables_in_the_bundled_release_does():
    others = {table: derived()[table] for table in ("blocks", "gaps", "stages")}
    assert differences(BUNDLED, others, models=["gpt-nano-sft", "vit-cifar10"]) == []
    assert differences(BUNDLED, DERIVED, models=[MODEL]) == []


def test_what_follows_by_our_own_entries_is_noted_and_by_others_is_not(tmp_path):
    path = BUNDLED / "gaps" / "vit-cifar10.parquet"
    assert all(note_of(BUNDLED, path, make) for make in derived_of_release().values())
    others = derived_of_release(tmp_path)
    assert {table for table in others if note_of(BUNDLED, path, others[table]) is None} == {
        "gaps",
        "speedups",
    }


def test_every_model_of_the_bundled_release_goes_into_the_next():
    assert unfinished(BUNDLED) == {}


def test_models_that_are_not_finished_stay_out_with_the_reason(source, tmp_path):
    out = tmp_path / "out"
    (source / "gaps" / f"{MODEL}.parquet").unlink()
    code, output = run("dataset", "release", source, "--out", out, "--version", "0.1.0")
    assert code == 2
    assert "has no model to release" in output
    assert not out.exists()
    assert unfinished(source) == {MODEL: "its gap is missing"}
    (source / "spectra" / f"{MODEL}.parquet").unlink()
    assert "units are missing, the first" in unfinished(source)[MODEL]


def test_a_failure_with_its_reason_is_released(source):
    rows = store.read(source / "gaps" / f"{MODEL}.parquet", "gaps").to_pandas()
    store.write(source, "gaps", rows.assign(status="failed", reason="all runs diverged", gap=None))
    training = store.read(source / "training" / f"{MODEL}.parquet", "training").to_pandas()
    path = source / "training" / f"{MODEL}.parquet"
    path.unlink()
    store.write(source, "training", training[training["seed"] != 2])
    assert unfinished(source) == {}


def test_moments_that_wait_for_a_failed_spectrum_keep_nothing_out_of_a_release(source, monkeypatch):
    entry = replace(get(MODEL), moments_batch_size=4096)
    monkeypatch.setattr(
        "harness.campaign.unfinished.registry.entries", lambda registry_dir: [entry]
    )
    assert "moments on a larger batch" in unfinished(source)[MODEL]
    rows = store.read(source / "spectra" / f"{MODEL}.parquet", "spectra").to_pandas()
    rows = rows[(rows["stage"] == "init") & (rows["partition"] == entry.partition)]
    nothing = {c: [[] for _ in range(len(rows))] for c in ("alphas", "betas", "nodes", "weights")}
    store.write(source, "spectra", rows.assign(status="failed", reason="out of memory", **nothing))
    assert unfinished(source) == {}


def test_a_model_that_the_registry_does_not_know_stays_out(source):
    rows = store.read(source / "models" / f"{MODEL}.parquet", "models").to_pandas()
    store.write(source, "models", rows.assign(model="stranger"))
    assert unfinished(source) == {"stranger": "not in the registry; --registry DIR adds entries"}
