from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

import spectra_db
from harness import tasks
from harness.campaign.drive import drive
from harness.campaign.engines import Engine
from harness.campaign.engines.local import Workers, sharers
from harness.campaign.plan import missing, settings_of
from harness.campaign.run import run_entries
from harness.campaign.spectrum import source_of, take_spectrum
from harness.campaign.survey import Survey, survey
from harness.campaign.unit import Unit
from harness.campaign.work import Job
from harness.errors import OutputError, UserError
from harness.estimator.settings import Settings
from harness.estimator.spectrum import gathered, rules
from harness.records.ledger import Ledger
from harness.records.provenance import code_version
from harness.registry import ModelEntry, Recipe, get
from harness.training import load_problem, train
from spectra_db import store
from spectra_db.heterogeneity import spread
from tests.processes import Process

RECIPE = Recipe(
    num_steps=10, batch_size=64, sgd_lrs=(0.01, 0.1), adamw_lrs=(1e-3, 1e-2), num_lrs=2,
    extend_grid=False, eval_size=512,
)  # fmt: skip


def tiny(**changes: object) -> ModelEntry:
    """Make an entry that is done in a second or two."""
    small = {"name": "tiny", "options": {"widths": (8, 16)}, "hessian_batch_size": 16}
    small |= {"recipe": RECIPE, "num_steps": 3, "full_stages": ("init",)}
    return replace(get("cnn-digits"), **(small | changes))


@dataclass(frozen=True)
class FailingJob(Job):
    """A job of which some units fail."""

    fails: Callable[[Unit], BaseException | None] = lambda unit: None

    def do(self, unit: Unit, on_progress: Callable[[int, int], None]) -> None:
        if (error := self.fails(unit)) is not None:
            raise error
        super().do(unit, on_progress)


def nothing(done: int, total: int) -> None:
    """Take no note of progress."""


def job_of(out: Path, *entries: ModelEntry, **changes: object) -> Job:
    of = {entry.name: entry for entry in entries}
    kind = FailingJob if "fails" in changes else Job
    device = os.environ.get("HARNESS_TEST_DEVICE", "cpu")
    return kind(Ledger(out), of, None, device, "harness run tiny", **changes)


def do(
    out: Path, *entries: ModelEntry, jobs: int = 1, **changes: object
) -> tuple[dict[Unit, str], list[Unit]]:
    """Run entries; return what failed and the units that were started."""
    started: list[Unit] = []

    def on_event(what: str, unit: Unit, facts: dict[str, object]) -> None:
        if what == "start":
            started.append(unit)

    surveys = [survey(entry, None) for entry in entries]
    job = job_of(out, *entries, **changes)
    failed = run_entries(surveys, job, jobs=jobs, on_event=on_event)
    return failed, started


def values(out: Path, table: str) -> pd.DataFrame:
    """Return a table without what differs between two computations of the same."""
    rows = spectra_db.load(table, source=out)
    return rows.drop(columns=["seconds", "peak_bytes", "run_id"], errors="ignore")


def lose(out: Path, table: str, is_lost: Callable[[pd.DataFrame], pd.Series]) -> None:
    """Take rows out of the table of model tiny."""
    path = store.path_of(out, table, "tiny")
    rows = store.read(path, table).to_pandas()
    path.unlink()
    store.write(out, table, rows[~is_lost(rows)])


def of_run(optimizer: str, seed: int) -> Callable[[pd.DataFrame], pd.Series]:
    """Return what tells the rows of a training run."""
    return lambda rows: (rows["optimizer"] == optimizer) & (rows["seed"] == seed)


def is_final(rows: pd.DataFrame) -> pd.Series:
    """Tell which rows are of the final stage."""
    return rows["stage"] == "final"


def test_a_run_fills_every_table(whole):
    for table in set(spectra_db.schema.TABLES) - {"leaderboard", *spectra_db.schema.VERSIONS}:
        assert len(spectra_db.load(table, source=whole, **({"model": "tiny"}))), table
    spectra = spectra_db.load("spectra", source=whole)
    found = set(zip(spectra["partition"], spectra["stage"], strict=True))
    assert found == {("weights", "init"), ("weights", "final"), ("full", "init")}
    training = spectra_db.load("training", source=whole)
    runs = training.groupby("seed")[["optimizer", "lr"]].apply(lambda r: len(r.drop_duplicates()))
    assert runs.to_dict() == {0: 4, 1: 2, 2: 2, 3: 2}
    assert set(spectra_db.load("gaps", source=whole)["num_seeds"]) == {3}


def test_the_gap_is_also_measured_from_the_entropy_of_the_labels(whole):
    [row] = spectra_db.load("gaps", source=whole).to_dict("records")
    task = tasks.get(tiny().task, **tiny().task_options)
    size = min(tiny().recipe.eval_size, task.size(task.load(), "train"))
    labels = task.fixed(task.load(), "train", size)[1].numpy()
    expected = scipy.stats.entropy(np.unique(labels, return_counts=True)[1])
    assert row["target_entropy"] == pytest.approx(expected)
    assert row["reference_loss"] == pytest.approx(min(expected, row["init_loss"]), rel=0.01)


def test_the_same_command_finds_nothing_left_to_do(whole):
    assert list(missing(tiny(), Ledger(whole))) == []
    assert do(whole, tiny()) == ({}, [])


def test_only_the_units_at_the_best_rate_wait_for_the_grid(tmp_path):
    units = list(missing(tiny(), Ledger(tmp_path)))
    waiting = [unit for unit in units if not unit.ready]
    assert {(u.kind, u.seed) for u in waiting if u.kind == "train"} == {
        ("train", 1), ("train", 2), ("train", 3),
    }  # fmt: skip
    assert [u.stage for u in waiting if u.kind == "spectrum"] == ["final"]


def test_the_grid_grows_while_the_best_is_at_its_edge(tmp_path):
    # Ten steps are so few that the highest rate is the best: each extension is one more unit.
    entry = tiny(recipe=replace(RECIPE, extend_grid=True))
    _, started = do(tmp_path, entry, kinds=("train",))
    on_the_grid = [unit for unit in started if unit.seed == 0]
    assert len(on_the_grid) > 2 * RECIPE.num_lrs


def test_the_moments_of_an_entry_are_taken_on_its_larger_batch_and_its_halves(tmp_path):
    entry = tiny(stages=("init",), full_stages=(), moments_batch_size=40)
    assert [unit.ready for unit in missing(entry, Ledger(tmp_path))] == [True, False]
    failed, started = do(tmp_path, entry)
    assert (failed, [unit.kind for unit in started]) == ({}, ["spectrum", "moments"])
    rows = spectra_db.load("heterogeneity", source=tmp_path).set_index("metric")
    larger = rows.loc[["lambda_rms_spread", "trace_spread", "gradient_rms_spread"]]
    assert set(larger["batch_size"]) == {40}
    assert set(rows.drop(index=larger.index)["batch_size"]) == {16}
    # Three blocks with one product for each of three probes; exact ones take one a parameter.
    assert set(larger.loc[["lambda_rms_spread", "trace_spread"], "num_products"]) == {3 * 3}
    assert survey(entry, None).costs["moments"].num_products == 3 * 3 * 3  # and of two halves
    # What the metric is on a problem of that batch, and on problems of its halves.
    problem = load_problem(replace(entry, hessian_batch_size=40), "init", 1)
    settings = Settings(num_probes=3, num_steps=1, exact_size=3)
    source = {"model": "tiny", "stage": "init", "init_seed": 1}
    of_parts = []
    samples = [torch.cat(tensors) for tensors in zip(*problem.batches, strict=True)]
    for part in (slice(40), slice(20), slice(20, 40)):
        on = problem.on([tuple(tensor[part] for tensor in samples)])
        with on.hessian(settings) as hessian:
            found = gathered(rules(hessian, settings, source), hessian.blocks)
        of_parts.append(spread(found, "lambda_rms").corrected)
    whole, first, second = of_parts
    assert larger.loc["lambda_rms_spread", "corrected"] == pytest.approx(whole)
    error = larger["batch_error"]
    assert error["lambda_rms_spread"] == pytest.approx(abs(first - second), rel=1e-3)
    assert (error > 0).all()
    # Spectra stay those of one batch, and a second run finds all done.
    assert spectra_db.load("spectra", source=tmp_path)["batch_size"].unique().tolist() == [16]
    assert do(tmp_path, entry) == ({}, [])
    before = spectra_db.load("heterogeneity", source=tmp_path)
    # Those of an earlier version, without a batch error, are taken again.
    Ledger(tmp_path).write("heterogeneity", before.assign(batch_error=None))
    assert [unit.kind for unit in missing(entry, Ledger(tmp_path))] == ["moments"]
    Ledger(tmp_path).write("heterogeneity", before)
    # The spectrum's own batch does not put its moments in the place of these.
    settings = Settings(num_probes=3, num_steps=3, device="cpu")
    take_spectrum(load_problem(entry), settings, Ledger(tmp_path), command="")
    pd.testing.assert_frame_equal(before, spectra_db.load("heterogeneity", source=tmp_path))


def test_a_lost_checkpoint_is_trained_again_for_a_spectrum_that_lacks(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "copy")
    checkpoint = out / "checkpoints" / "tiny" / "adamw-seed1" / "final.safetensors"
    checkpoint.unlink()
    assert list(missing(tiny(), Ledger(out))) == []
    lose(out, "spectra", is_final)
    failed, started = do(out, tiny())
    assert not failed
    assert [(u.kind, u.seed) for u in started if u.kind == "train"] == [("train", 1)]
    assert checkpoint.exists()


def test_spectra_of_weights_that_were_trained_anew_are_taken_anew(tmp_path):
    out = tmp_path
    do(out, tiny(recipe=replace(RECIPE, adamw_lrs=(1e-4, 1e-3)), full_stages=()))
    checkpoint = out / "checkpoints" / "tiny" / "adamw-seed1" / "final.safetensors"
    before = checkpoint.read_bytes()
    # A higher rate is better than all of the grid so far: the run whose stages are kept changes.
    failed, started = do(out, tiny(full_stages=()))
    assert not failed
    assert checkpoint.read_bytes() != before
    assert [u.stage for u in started if u.kind == "spectrum"] == ["final"]
    [sha256] = spectra_db.load("stages", source=out, stage="final")["checkpoint_sha256"]
    assert sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()


def test_runs_of_another_length_are_not_mixed(whole):
    longer = tiny(recipe=replace(RECIPE, num_steps=12))
    with pytest.raises(UserError, match="runs of tiny of 10 steps, its recipe has 12"):
        list(missing(longer, Ledger(whole)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hessian_batch_size": 64}, "spectra of tiny on 16 samples, its batch has 64"),
        ({"options": {"widths": (16, 8)}}, r'options was {"widths": \[8, 16\]}, it is {"widths": '),
        ({"recipe": replace(RECIPE, batch_size=8)}, "its recipe's batch_size was 64, it is 8 now"),
        ({"recipe": replace(RECIPE, weight_decay=0.5)}, "weight_decay was 0.0, it is 0.5 now"),
    ],
)
def test_results_of_another_version_of_an_entry_are_not_taken_for_its_own(whole, changes, said):
    with pytest.raises(UserError, match=f"{said}.*name another --out"):
        do(whole, tiny(**changes))
    assert list(missing(tiny(), Ledger(whole))) == []


def test_results_of_a_model_of_another_size_are_refused_whatever_the_entry_says(whole):
    entry = tiny()
    other = replace(survey(entry, None), num_params=7)
    with pytest.raises(UserError, match=r"tiny of [\d,]+ parameters, it has 7 now: name another"):
        run_entries([other], job_of(whole, entry))


def test_a_folder_without_notes_of_its_entries_is_complete(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(out / "entries")
    assert list(missing(tiny(), Ledger(out))) == []
    assert do(out, tiny()) == ({}, [])


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_note_of_an_entry_that_cannot_be_read_is_not_passed_over(whole, tmp_path, text):
    out = shutil.copytree(whole, tmp_path / "copy")
    note = out / "entries" / "tiny.json"
    note.write_text(text)
    with pytest.raises(UserError, match=r"tiny\.json, which says .* can't be read .*: restore it"):
        do(out, tiny())
    assert note.read_text() == text


def test_where_nothing_was_finished_an_entry_may_be_changed(tmp_path):
    entry = tiny(recipe=None, stages=("init",), full_stages=())
    assert do(tmp_path, entry, fails=lambda unit: MemoryError("no memory"))[0]
    entry = replace(entry, hessian_batch_size=8, options={"widths": (4, 8)})
    assert not do(tmp_path, entry)[0]
    assert list(missing(entry, Ledger(tmp_path))) == []


def test_an_entry_whose_code_fails_does_not_stop_the_others(tmp_path):
    good = tiny(recipe=None, stages=("init",), full_stages=())
    wrong = {"in_features": 3, "out_features": 10}  # images have 8 columns
    bad = replace(good, name="bad", factory="torch.nn:Linear", options=wrong)
    failed, started = do(tmp_path, bad, good)
    assert (failed, {unit.model for unit in started}) == ({}, {"tiny"})
    rows = spectra_db.load("models", source=tmp_path).set_index("model")
    assert list(rows.loc[["bad", "tiny"], "status"]) == ["failed", "ok"]
    assert rows.loc["bad", "reason"].startswith("entry 'bad': RuntimeError: mat1 and mat2 shapes")


@pytest.mark.parametrize(
    ("device", "gpus", "jobs", "expected"),
    [("cpu", 0, 4, 4), ("cpu", 0, 1, 1), ("cuda", 2, 4, 2), ("cuda", 2, 3, 2), ("cuda:1", 2, 3, 3)],
)
def test_workers_share_the_memory_of_their_device(monkeypatch, device, gpus, jobs, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert sharers(jobs, device) == expected


def test_a_worker_s_budget_is_its_part_of_half_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.estimator.device.device_memory", lambda device: 1200)
    unit = Unit("tiny", "spectrum", stage="init", partition="weights")
    alone, shared = (job_of(tmp_path, tiny(), sharers=n).settings(unit) for n in (1, 3))
    assert (alone.memory_budget, shared.memory_budget) == (None, 200)


def test_a_failed_unit_leaves_rows_with_the_reason_and_does_not_stop_the_others(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "copy")
    lose(out, "training", of_run("sgd", 3))
    for table in ("spectra", "blocks", "heterogeneity", "gaps"):
        shutil.rmtree(out / table)

    def fails(unit: Unit) -> BaseException | None:
        return FloatingPointError("a product is not finite") if unit.stage == "final" else None

    failed, started = do(out, tiny(), fails=fails)
    assert len(started) == 4
    assert list(failed.values()) == ["FloatingPointError: a product is not finite"]
    rows = spectra_db.load("spectra", source=out, stage="final")
    assert set(rows["status"]) == {"failed"}
    assert set(rows["reason"]) == set(failed.values())
    assert set(spectra_db.load("gaps", source=out)["num_seeds"]) == {3}

    failed, started = do(out, tiny())
    assert not failed
    assert [unit.stage for unit in started] == ["final"]
    assert set(spectra_db.load("spectra", source=out)["status"]) == {"ok"}


def test_a_failed_training_run_leaves_failed_rows_for_the_spectra_that_waited(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "copy")
    lose(out, "training", of_run("adamw", 1))
    lose(out, "spectra", is_final)
    lose(out, "heterogeneity", is_final)
    for folder in ("stages", "checkpoints"):
        shutil.rmtree(out / folder)

    def fails(unit: Unit) -> BaseException | None:
        return MemoryError("no memory") if (unit.optimizer, unit.seed) == ("adamw", 1) else None

    do(out, tiny(), fails=fails)
    rows = spectra_db.load("spectra", source=out, stage="final")
    assert set(rows["status"]) == {"failed"}
    [reason] = set(rows["reason"])
    assert reason.startswith("its stage was not trained: out of memory")
    assert set(spectra_db.load("spectra", source=out, stage="init")["status"]) == {"ok"}

    failed, _ = do(out, tiny())
    assert not failed
    assert set(spectra_db.load("spectra", source=out)["status"]) == {"ok"}


def test_a_failure_that_can_not_be_written_down_is_still_reported(tmp_path):
    entry = tiny(recipe=None, stages=("init",), full_stages=())
    gone = job_of(tmp_path, replace(entry, task="gone"))  # since it was surveyed
    [reason] = run_entries([survey(entry, None)], gone).values()
    assert "unknown task 'gone'" in reason


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_trained_by_hand_at_another_rate_are_not_taken_for_the_stages(
    whole, tmp_path, when
):
    entry = tiny(full_stages=())
    stale = Unit("tiny", "train", "adamw", 0.5, 1)
    if when == "after":
        shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    job_of(tmp_path, entry).do(stale, nothing)
    units = {
        (u.kind, u.optimizer, u.seed, u.stage): u.ready for u in missing(entry, Ledger(tmp_path))
    }
    assert ("train", "adamw", 1, "") in units
    assert units["spectrum", "", 1, "final"] is False
    do(tmp_path, entry)
    [rate] = set(spectra_db.load("stages", source=tmp_path, stage="final")["lr"])
    assert rate == spectra_db.load("gaps", source=tmp_path)["adam_lr"].item()
    assert list(missing(entry, Ledger(tmp_path))) == []


def test_a_training_that_is_stopped_leaves_the_stages_of_the_run_before(whole, tmp_path):
    entry, out = tiny(), shutil.copytree(whole, tmp_path / "copy")
    before = {p: p.read_bytes() for p in (out / "checkpoints").rglob("*.safetensors")}

    def stop(done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job_of(out, entry).do(Unit("tiny", "train", "adamw", 0.5, 1), stop)
    assert {p: p.read_bytes() for p in (out / "checkpoints").rglob("*.*")} == before


def test_a_checkpoint_of_another_run_than_the_table_says_is_refused(whole, tmp_path):
    entry, out = tiny(), shutil.copytree(whole, tmp_path / "copy")
    job_of(tmp_path / "other", entry).do(Unit("tiny", "train", "adamw", 0.5, 1), nothing)
    shutil.rmtree(out / "checkpoints")
    shutil.move(tmp_path / "other" / "checkpoints", out / "checkpoints")
    unit = Unit("tiny", "spectrum", stage="final", partition="weights")
    with pytest.raises(UserError, match="does not have the sha256"):
        job_of(out, entry).do(unit, nothing)


def test_training_another_seed_leaves_the_spectra_of_the_stages(whole, tmp_path):
    entry, out = tiny(), shutil.copytree(whole, tmp_path / "copy")
    rate = spectra_db.load("gaps", source=out)["adam_lr"].item()
    data = tasks.get(entry.task, **entry.task_options).load(None)
    for seed in (2, 1):
        options = {"optimizer": "adamw", "lr": rate, "checkpoint_dir": out / "checkpoints"}
        Ledger(out).write_training(train(entry, data, seed=seed, **options))
    assert set(spectra_db.load("stages", source=out)["seed"]) == {1, 2}
    assert set(spectra_db.load("spectra", source=out)["status"]) <= {"ok", "zero"}


def test_rows_of_another_seed_do_not_make_a_torn_spectrum_whole(tmp_path):
    entry = tiny(recipe=None, stages=("init",), full_stages=())
    other = Settings(num_probes=3, num_steps=3, device="cpu")
    take_spectrum(load_problem(entry, "init", 5), other, Ledger(tmp_path), command="")
    do(tmp_path, entry)
    lose(
        tmp_path,
        "spectra",
        lambda rows: (rows["init_seed"] == 1) & (rows["block"] == rows["block"].iloc[0]),
    )
    lose(tmp_path, "heterogeneity", lambda rows: rows["init_seed"] == 1)
    assert [unit.stage for unit in missing(entry, Ledger(tmp_path))] == ["init"]


def test_cheap_metrics_do_not_make_a_torn_spectrum_whole(tmp_path):
    entry = tiny(recipe=None, stages=("init",), full_stages=())
    do(tmp_path, entry)
    metrics = Ledger(tmp_path).rows("heterogeneity", "tiny")
    lose(tmp_path, "spectra", lambda rows: rows["block"] == rows["block"].iloc[0])
    lose(tmp_path, "heterogeneity", lambda rows: rows["metric"] != "gradient_rms_spread")
    assert [unit.stage for unit in missing(entry, Ledger(tmp_path))] == ["init"]
    store.write(tmp_path, "heterogeneity", metrics.assign(partition="all"))
    assert [unit.stage for unit in missing(entry, Ledger(tmp_path))] == ["init"]


def test_fewer_probes_and_steps_than_are_there_take_none_away(tmp_path):
    entry = tiny(recipe=None, stages=("init",), full_stages=())
    problem = load_problem(entry)
    for num_probes, num_steps in ((4, 3), (3, 3), (1, 1)):
        settings = Settings(num_probes=num_probes, num_steps=num_steps, device="cpu")
        rows = take_spectrum(problem, settings, Ledger(tmp_path), command="")
        stored = spectra_db.load("heterogeneity", source=tmp_path, metric="js0", scale="own_rms")
        assert stored["corrected"].item() == pytest.approx(spectra_db.js0(rows).corrected)
        assert rows["probe"].max() == 3


def test_a_model_of_a_single_block_is_done_although_there_is_nothing_to_compare(tmp_path):
    entry = tiny(options={"widths": ()}, recipe=None, stages=("init",), full_stages=())
    failed, _ = do(tmp_path, entry)
    assert not failed
    assert list(missing(entry, Ledger(tmp_path))) == []


def test_without_git_the_code_is_known_by_its_version_alone(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code_version.cache_clear()
    try:
        assert code_version() == version("hessian-spectra")
    finally:
        code_version.cache_clear()


def test_a_model_that_can_not_be_built_is_a_row_with_the_reason(tmp_path):
    entry = tiny(options={"depth": 9}, recipe=None, stages=("init",), full_stages=())
    surveyed = survey(entry, None)
    assert "unexpected keyword argument 'depth'" in str(surveyed.reason)
    assert run_entries([surveyed], job_of(tmp_path, entry)) == {}
    [row] = spectra_db.load("models", source=tmp_path).to_dict("records")
    assert (row["status"], row["reason"]) == ("failed", surveyed.reason)


def test_a_pending_entry_is_a_row_with_its_reason(tmp_path):
    entry = tiny(status="pending", reason="the weights can't be had")
    assert run_entries([survey(entry, None)], job_of(tmp_path, entry)) == {}
    [row] = spectra_db.load("models", source=tmp_path).to_dict("records")
    assert (row["status"], row["reason"]) == ("pending", "the weights can't be had")


def test_a_pretrained_entry_waits_for_its_pretraining_and_starts_from_it(tmp_path):
    first = tiny(full_stages=())
    second = replace(first, name="tiny-tuned", pretrained="tiny")
    assert not any(unit.ready for unit in missing(second, Ledger(tmp_path)))
    failed, started = do(tmp_path, second, first, kinds=("train",))
    assert not failed
    models = [unit.model for unit in started]
    final = next(u for u in started if (u.model, u.optimizer, u.seed) == ("tiny", "adamw", 1))
    assert models.index("tiny-tuned") == started.index(final) + 1
    stages = spectra_db.load("stages", source=tmp_path).set_index(["model", "stage"])
    pretrained, tuned = stages.loc[("tiny", "final")], stages.loc[("tiny-tuned", "init")]
    assert tuned["loss"] == pytest.approx(pretrained["loss"])


def die_on_seed_2(execute: Callable, unit: Unit, on_progress: object) -> str | None:
    """Execute a unit; die as the kernel kills for memory, on one of them."""
    if unit.kind == "train" and unit.seed == 2 and unit.optimizer == "sgd":
        os.kill(os.getpid(), signal.SIGKILL)
    return execute(unit, on_progress)


@pytest.mark.usefixtures("_quick_workers")
def test_a_worker_that_dies_fails_its_unit_alone_and_the_rows_end_up_the_same(whole, tmp_path):
    started: list[Unit] = []
    failed = run_entries(
        [survey(tiny(), None)],
        job_of(tmp_path, tiny()),
        engine=lambda execute: Workers(partial(die_on_seed_2, execute), 2),
        on_event=lambda what, unit, facts: started.append(unit) if what == "start" else None,
    )
    assert {(u.optimizer, u.seed): reason for u, reason in failed.items()} == {
        ("sgd", 2): "the worker process died: out of memory, or killed"
    }
    assert len(started) == len(set(started))
    [gap] = spectra_db.load("gaps", source=tmp_path).to_dict("records")
    assert (gap["status"], gap["reason"]) == ("failed", next(iter(failed.values())))

    assert len(do(tmp_path, tiny())[1]) == 1
    for name in ("training", "stages", "spectra", "heterogeneity", "blocks", "gaps"):
        pd.testing.assert_frame_equal(values(whole, name), values(tmp_path, name))


class Frail(Engine):
    """Two workers; with one that is given a deadly unit both die."""

    dies_whole = True

    def __init__(self, deadly: Unit | None = None, refused: int = 0) -> None:
        self.deadly, self.refused = deadly, refused
        self.revived, self.deaths = 0, 0
        self.running: dict[Unit, Future[str | None]] = {}

    def slots(self) -> int:
        return 2

    def submit(self, unit: Unit) -> Future[str | None]:
        self.refused -= 1
        if self.refused == 0:
            raise BrokenExecutor
        self.running[unit] = future = Future()
        if unit == self.deadly:
            self.deaths += 1
            for each in self.running.values():
                if not each.done():
                    each.set_exception(BrokenExecutor())
        elif self.deadly not in self.running:
            future.set_result(None)
        return future

    def revive(self) -> None:
        self.revived += 1
        self.running.clear()


class Todo:
    """An agenda of units that need nothing."""

    def __init__(self, units: list[Unit]) -> None:
        self.left, self.done, self.dead = list(units), [], []

    def start(self) -> Unit | None:
        return self.left.pop(0) if self.left else None

    def settle(self, unit: Unit, reason: str | None) -> None:
        self.done.append(unit)

    def lost(self, unit: Unit) -> None:
        self.dead.append(unit)

    def wait(self) -> bool:
        return False


UNITS = [Unit("m", "train", "sgd", 0.1, seed) for seed in range(6)]


def test_workers_found_dead_when_work_is_handed_out_stop_nothing():
    agenda, engine = Todo(UNITS), Frail(refused=2)
    drive(agenda, engine)
    assert engine.revived == 1
    assert not agenda.dead
    assert sorted(agenda.done, key=UNITS.index) == UNITS


def test_a_unit_that_may_have_killed_its_worker_is_tried_again_alone():
    agenda, engine = Todo(UNITS), Frail(deadly=UNITS[0])
    drive(agenda, engine)
    assert sorted(agenda.done, key=UNITS.index) == UNITS[1:]
    assert agenda.dead == UNITS[:1]
    assert engine.deaths == 2


def runs(pid: str) -> bool:
    """Tell whether a process runs; one that has ended may wait for its parent to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_leaves_no_worker_and_continues(tmp_path, stop):
    out = tmp_path / "out"
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from harness.registry import get\n"
        "demo = get('cnn-digits')\n"
        "recipe = replace(demo.recipe, num_lrs=2, num_steps=40, extend_grid=False)\n"
        "small = {'options': {'widths': (8, 16)}, 'hessian_batch_size': 16, 'num_steps': 3}\n"
        "ENTRIES = (replace(demo, name='mine', recipe=recipe, full_stages=(), **small),)\n"
    )
    command = ["run", "mine", "--jobs", "2", "--device", "cpu", "--out", out]
    command += ["--registry", tmp_path / "registry", "--log", tmp_path / "log"]
    process = Process(command, {}, tmp_path)
    training = out / "training" / "mine.parquet"
    deadline = time.monotonic() + 300
    while not training.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = process.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) >= 2
    os.kill(pid, stop)
    code, printed, errors = process.communicate()
    output = printed + errors
    if stop != signal.SIGKILL:
        assert code == 130, output
        assert output.strip().endswith("the same command continues.")
        events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        assert [events[0]["event"], events[-1]["event"]] == ["begin", "stopped"]
    assert "Traceback" not in output
    deadline = time.monotonic() + 20
    while any(map(runs, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if runs(child)]
    done = len(spectra_db.load("training", source=out, step=0, split="train", metric="loss"))
    assert 0 < done < 10

    entry = get("mine", registry_dir=tmp_path / "registry")
    assert len(do(out, entry)[1]) == 12 - done
    assert len(spectra_db.load("training", source=out, step=0, split="train", metric="loss")) == 10
    assert set(spectra_db.load("gaps", source=out)["status"]) == {"ok"}


def test_the_forecast_counts_the_products_that_are_made():
    problem, settings = load_problem(tiny()), settings_of(tiny())
    with problem.hessian(settings) as hessian:
        rows = gathered(rules(hessian, settings, source_of(problem)), hessian.blocks)
    cost = problem.forecast(settings)
    assert rows["num_products"].sum() == cost.num_products + cost.num_gram * cost.gram_passes


def test_a_survey_of_a_pending_entry_costs_nothing():
    entry = tiny(status="pending", reason="no data")
    assert survey(entry, None) == Survey(entry, reason="no data")


def test_an_entry_of_tier_paper_takes_the_paper_s_blocks_and_is_not_trained_for_them(tmp_path):
    entry = tiny(tier="paper", stages=("init",), full_stages=(), paper_blocks=("0.*", "3.*"))
    assert entry.recipe is not None
    failed, started = do(tmp_path, entry)
    assert failed == {}
    assert [(unit.kind, unit.partition) for unit in started] == [("spectrum", "paper")]
    rows = store.read(tmp_path / "spectra" / "tiny.parquet", "spectra").to_pandas()
    assert set(rows["block"]) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    surveyed = survey(entry, None)
    assert (surveyed.num_units, surveyed.num_blocks, surveyed.training_flops) == (1, 4, 0.0)
    assert list(missing(entry, Ledger(tmp_path))) == []
    assert not (tmp_path / "gaps").exists()


def test_the_gap_of_a_model_is_written_before_the_next_model_starts(whole, tmp_path):
    first, second = tiny(), tiny(name="tiny-b", recipe=None, stages=("init",), full_stages=())
    out = shutil.copytree(whole, tmp_path / "copy")
    lose(out, "training", of_run("sgd", 3))
    shutil.rmtree(out / "gaps")
    gaps = {}

    def on_event(what: str, unit: Unit, facts: dict[str, object]) -> None:
        if unit.model == "tiny-b":
            gaps.setdefault(what, (out / "gaps" / "tiny.parquet").exists())

    surveys = [survey(entry, None) for entry in (first, second)]
    run_entries(surveys, job_of(out, first, second), on_event=on_event)
    assert gaps["start"]


@pytest.mark.parametrize("at", ["start", "progress"])
def test_a_folder_that_is_removed_in_mid_run_ends_it_in_one_line(tmp_path, at):
    out = tmp_path / "out"

    def remove(what: str, unit: Unit, facts: dict[str, object]) -> None:
        if what == at:
            shutil.rmtree(out, ignore_errors=True)

    entry = tiny(stages=("init",), full_stages=(), recipe=None)
    with pytest.raises(OutputError, match="out was removed, or emptied, while this ran"):
        run_entries([survey(entry, None)], job_of(out, entry), on_event=remove)
