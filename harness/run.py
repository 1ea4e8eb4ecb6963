"""Whole entries: the grid, the seeds, the stages and their spectra, resumable from the store."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from harness import tasks
from harness.plan import STAGE_SEED, Survey, Unit, missing, rows_of, settings_of
from harness.registry import ModelEntry
from harness.spectra import take_spectrum, write_failed_blocks
from harness.training.gap import gap
from harness.training.stages import run_name
from spectra_db import store
from spectra_db.schema import PROTOCOL_VERSION

log = logging.getLogger(__name__)

Event = Callable[[str, Unit], None]


@dataclass(frozen=True)
class Job:
    """Where and how units are executed; sent to the worker processes."""

    out: Path
    entries: dict[str, ModelEntry]
    data_root: Path | None
    device: str | None
    num_threads: int
    command: str

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, beside the tables."""
        return self.out / "checkpoints"


def run_entries(
    surveys: Sequence[Survey],
    job: Job,
    *,
    jobs: int = 1,
    on_event: Event = lambda what, unit: None,
) -> dict[Unit, str]:
    """Do everything for some entries, from where the store stands.

    A unit is tried once; what comes of it may make others ready. Interrupted, the workers end at
    once: a table's file is replaced as a whole, so that only the work in flight is lost.

    Args:
        surveys: The entries; those with a reason get their row of table `models` alone.
        job: Where and how.
        jobs: Worker processes; 1 works in this process.
        on_event: Called with start, done or failed, and the unit.

    Returns:
        The units that failed, with their reasons; they are rows in the store too.
    """
    for survey in surveys:
        _write_model(survey, job.out)
    live = [survey.entry for survey in surveys if survey.reason is None]
    failed = (_run_here if jobs == 1 else _run_in_workers)(live, job, jobs, on_event)
    for entry in live:
        if entry.recipe is not None:
            reasons = [r for u, r in failed.items() if (u.model, u.kind) == (entry.name, "train")]
            row = gap(entry.name, rows_of(job.out, "training", entry.name), entry.recipe)
            if reasons:
                row |= {"status": "failed", "reason": reasons[0]}
            store.write(job.out, "gaps", [row])
    return failed


def _run_here(live: list[ModelEntry], job: Job, jobs: int, on_event: Event) -> dict[Unit, str]:
    """Execute one unit after another in this process."""
    tried: set[Unit] = set()
    failed: dict[Unit, str] = {}
    for entry in live:
        while ready := [u for u in missing(entry, job.out) if u.ready and u not in tried]:
            tried.add(ready[0])
            on_event("start", ready[0])
            reason = execute(ready[0], job)
            if reason is not None:
                failed[ready[0]] = reason
            on_event("done" if reason is None else "failed", ready[0])
    return failed


def _run_in_workers(
    live: list[ModelEntry], job: Job, jobs: int, on_event: Event
) -> dict[Unit, str]:
    """Keep worker processes busy with what is ready.

    When a worker dies all units in flight are lost, and none can be told to be the cause. They
    are tried again one at a time; one that dies alone has failed.
    """
    left = {entry.name: list(missing(entry, job.out)) for entry in live}
    tried: set[Unit] = set()
    failed: dict[Unit, str] = {}
    suspects: list[Unit] = []
    running: dict[Future[str | None], Unit] = {}
    pool = _pool(jobs)
    try:
        while True:
            ready = [u for units in left.values() for u in units if u.ready and u not in tried]
            free = jobs - len(running)
            if suspects:
                ready, free = suspects, 1 - len(running)
            for unit in ready[:free]:
                if unit in suspects:
                    suspects.remove(unit)
                else:
                    on_event("start", unit)
                tried.add(unit)
                running[pool.submit(execute, unit, job)] = unit
            if not running:
                return failed
            wait(running, return_when=FIRST_COMPLETED)
            if any(isinstance(f.exception(), BrokenProcessPool) for f in running if f.done()):
                lost = list(running.values())
                running.clear()
                pool.shutdown()
                pool = _pool(jobs)
                if len(lost) > 1:
                    suspects += lost
                    continue
                died = "the worker process died: out of memory, or killed"
                _write_failed(lost[0], job, died)
                outcomes: dict[Unit, str | None] = {lost[0]: died}
            else:
                done = [future for future in running if future.done()]
                outcomes = {running.pop(future): future.result() for future in done}
            for unit, reason in outcomes.items():
                if reason is not None:
                    failed[unit] = reason
                left[unit.model] = list(missing(job.entries[unit.model], job.out))
                on_event("done" if reason is None else "failed", unit)
    finally:
        pool.shutdown(wait=not running, cancel_futures=True)
        if running:  # interrupted: readers see whole files whatever a worker is at
            for process in multiprocessing.active_children():
                process.terminate()


def execute(unit: Unit, job: Job) -> str | None:
    """Do one unit and write its rows; return the reason if it failed.

    A failure becomes rows with a status and a reason and does not stop the others.
    """
    import torch

    torch.set_num_threads(job.num_threads)
    try:
        if unit.kind == "train":
            _train(unit, job)
        else:
            _take(unit, job)
    except Exception as error:
        log.debug("%s failed", unit, exc_info=True)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _write_failed(unit, job, reason)
        return reason
    return None


def _train(unit: Unit, job: Job) -> None:
    """Train once; keep the stages of the run that they are taken from."""
    from harness.training import train

    entry = job.entries[unit.model]
    data = tasks.get(entry.task, **entry.task_options).load(job.data_root)
    keeps_stages = unit.optimizer == "adamw" and unit.seed == STAGE_SEED
    result = train(
        entry,
        data,
        optimizer=unit.optimizer,
        lr=unit.lr,
        seed=unit.seed,
        checkpoint_dir=job.checkpoints if keeps_stages else None,
        device=job.device or "cpu",
    )
    if result.stage_rows:
        store.write(job.out, "stages", result.stage_rows)
    store.write(job.out, "training", result.rows)


def _take(unit: Unit, job: Job) -> None:
    """Take one spectrum."""
    from harness.training import load_problem

    entry = job.entries[unit.model]
    problem = load_problem(
        entry, unit.stage, unit.seed, data_root=job.data_root, checkpoint_dir=job.checkpoints
    )
    settings = settings_of(entry, unit.partition, job.device)
    take_spectrum(problem, settings, job.out, command=job.command)


def _write_failed(unit: Unit, job: Job, reason: str) -> None:
    """Write failed rows for a spectrum's missing blocks; a run's failure is its model's gap's."""
    from harness.training import load_problem

    if unit.kind != "spectrum":
        return
    entry = job.entries[unit.model]
    # The stage's weights may be what failed; blocks and batch are those of the initial model.
    problem = load_problem(entry, "init", unit.seed, data_root=job.data_root)
    train_run = "" if unit.stage == "init" else run_name(unit.seed)
    problem = replace(problem, stage=unit.stage, train_run=train_run)
    write_failed_blocks(problem, settings_of(entry, unit.partition, job.device), job.out, reason)


def _write_model(survey: Survey, out: Path) -> None:
    """Write the row of table `models`."""
    entry = survey.entry
    status = "ok" if survey.reason is None else "pending" if entry.status != "ok" else "failed"
    row = {
        "model": entry.name,
        "family": entry.family,
        "tier": entry.tier,
        "task": entry.task,
        "num_params": survey.num_params,
        "num_blocks": survey.num_blocks,
        "source": entry.source,
        "licence": entry.licence,
        "reference": entry.reference,
        "status": status,
        "reason": survey.reason,
        "protocol_version": PROTOCOL_VERSION,
    }
    store.write(out, "models", [row])


def _pool(jobs: int) -> ProcessPoolExecutor:
    """Return a pool of spawned workers: torch's threads don't survive a fork."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def num_threads(jobs: int) -> int:
    """Return torch's threads per worker: the cores shared out."""
    return max(1, (os.cpu_count() or 1) // jobs)
