"""Entries of protocol 2 as units of work: resumed, filtered, filled in."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest

import spectra_db
from harness.campaign.plan import missing
from harness.campaign.run import run_entries
from harness.campaign.survey import survey
from harness.campaign.unit import Unit
from harness.campaign.work import Job
from harness.errors import UserError
from harness.records.ledger import Ledger
from harness.registry import get
from harness.registry.entry import SpeedupRecipe
from harness.training.speedup import pending
from harness.training.stages import STAGE_SEED
from spectra_db import store
from spectra_db.derived import DERIVED, differences
from spectra_db.words import ANSWERS

RECIPE = SpeedupRecipe(num_steps=40, batch_size=64, sgd_lr=0.3, adamw_lr=1e-2, eval_size=256)
TINY = replace(
    get("cnn-digits"),
    name="tiny",
    factory="harness.registry.networks.mlp:MLP",
    options={"widths": (16,)},
    hessian_batch_size=16,
    recipe=None,
    speedup=RECIPE,
    stages=("init",),
    full_stages=(),
    num_steps=3,
)


def job_of(out, *entries, kinds=("trial",)) -> Job:
    of = {entry.name: entry for entry in entries}
    return Job(Ledger(out), of, None, "cpu", "harness run tiny", kinds=kinds)


def do(out, *entries, kinds=("trial",)) -> list[Unit]:
    """Run entries and return the units that were started."""
    started: list[Unit] = []

    def on_event(what, unit, facts):
        if what == "start":
            started.append(unit)

    surveys = [survey(entry, None) for entry in entries]
    assert not run_entries(surveys, job_of(out, *entries, kinds=kinds), on_event=on_event)
    return started


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of an entry's trials."""
    out = tmp_path_factory.mktemp("trials")
    do(out, TINY)
    return out


def test_trials_end_with_a_speedup(whole):
    trials = spectra_db.load("trials", source=whole)
    assert pending(trials, RECIPE) == []
    row = spectra_db.load("speedups", source=whole).iloc[0]
    assert row["status"] == "ok"
    assert row["trained"]
    assert row["adam_needed"] in ANSWERS
    assert row["num_trials"] == len(trials)
    assert set(trials["protocol_version"]) == {2}


def test_only_the_kinds_that_are_asked_for_are_done(whole):
    assert not (whole / "spectra").exists()
    assert {unit.kind for unit in missing(TINY, Ledger(whole))} == {"spectrum"}


def test_what_was_lost_is_done_again_and_nothing_else(whole, tmp_path):
    rows = spectra_db.load("trials", source=whole)
    kept = rows.sample(frac=0.8, random_state=0)
    store.write(tmp_path, "trials", kept)
    key = ["optimizer", "num_steps", "lr", "seed"]
    started = {(u.optimizer, u.num_steps, u.lr, u.seed) for u in do(tmp_path, TINY)}
    before = rows.set_index(key)["final_loss"]
    # A climb that begins with its best runs may do without some that led there.
    assert started <= set(before.drop(list(kept[key].itertuples(index=False, name=None))).index)
    again = spectra_db.load("trials", source=tmp_path).set_index(key)["final_loss"]
    assert again.equals(before[again.index])
    y = [spectra_db.load("speedups", source=s)["log2_speedup"].item() for s in (whole, tmp_path)]
    assert y[0] == y[1]


def test_runs_of_other_lengths_are_of_another_version_of_the_entry(whole):
    other = replace(TINY, speedup=replace(RECIPE, num_steps=50))
    with pytest.raises(UserError, match="name another --out"):
        list(missing(other, Ledger(whole)))


def test_weights_that_are_kept_are_those_of_t_steps(tmp_path):
    first = replace(TINY, stages=("init", "final"))
    job = job_of(tmp_path, first)
    path = job.ledger.checkpoint("tiny", "final", STAGE_SEED)
    for num_steps in (2 * RECIPE.num_steps, RECIPE.num_steps):
        assert not path.exists()
        unit = Unit("tiny", "trial", "adamw", 1e-2, STAGE_SEED, num_steps=num_steps)
        job.do(unit, lambda *done: None)
    assert job.ledger.rows("stages", "tiny")["step"].tolist() == [RECIPE.num_steps]
    assert path.exists()


@pytest.mark.slow
def test_an_entry_that_starts_from_another_waits_for_its_weights_which_are_kept(tmp_path):
    first = replace(TINY, name="first", stages=("init", "final"))
    quick = replace(RECIPE, num_steps=10)
    tuned = replace(TINY, name="tuned", pretrained="first", speedup=quick)
    assert not any(unit.ready for unit in missing(tuned, Ledger(tmp_path)))
    started = do(tmp_path, first, tuned)
    models = [unit.model for unit in started]
    assert models.index("tuned") > models.index("first")
    rows = spectra_db.load("trials", source=tmp_path, model="tuned")
    assert (rows["reference_loss"] == rows["init_loss"]).all()
    # Weights that are gone are made again, bit for bit.
    path = next((tmp_path / "checkpoints").rglob("final.safetensors"))
    before = path.read_bytes()
    kept = spectra_db.load("stages", source=tmp_path, model="first").iloc[0]
    assert kept["stage"] == "final"
    assert kept["checkpoint_sha256"] == sha256(before).hexdigest()
    assert not differences(tmp_path, {"stages": DERIVED["stages"]})
    path.unlink()
    started = do(tmp_path, first)
    assert [(u.optimizer, u.seed) for u in started] == [("adamw", 1)]
    assert path.read_bytes() == before
    forged = spectra_db.load("stages", source=tmp_path, model="first").assign(loss=0.1)
    store.write(tmp_path, "stages", forged)
    (found,) = differences(tmp_path, {"stages": DERIVED["stages"]})
    assert "loss 0.1, made anew" in found
