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
from harness.plan import STAGE_SEED, Survey, Unit, missing, settings_of
from harness.registry import ModelEntry
from harness.spectra import rows_of, take_spectrum, write_failed_blocks, write_training
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
    agenda = _Agenda(live, job, on_event)
    if jobs == 1:
        _run_here(agenda, job)
    else:
        _run_in_workers(agenda, job, jobs)
    for entry in live:
        _finish(entry, job, agenda.failed)
    return agenda.failed


def _finish(entry: ModelEntry, job: Job, failed: dict[Unit, str]) -> None:
    """Write an entry's gap, and rows for the stages that a failed run left without weights."""
    if not entry.trains or entry.recipe is None:
        return
    reasons = [r for u, r in failed.items() if (u.model, u.kind) == (entry.name, "train")]
    for unit in missing(entry, job.out) if reasons else ():
        if unit.kind == "spectrum" and not unit.ready:
            _write_failed(unit, job, f"its stage was not trained: {reasons[0]}")
    row = gap(entry.name, rows_of(job.out, "training", entry.name), entry.recipe)
    if reasons:
        row |= {"status": "failed", "reason": reasons[0]}
    store.write(job.out, "gaps", [row])


class _Agenda:
    """Which units are ready, which were tried, and which failed with what reason."""

    def __init__(self, live: list[ModelEntry], job: Job, on_event: Event) -> None:
        self._job, self._on_event = job, on_event
        self._left = {entry.name: list(missing(entry, job.out)) for entry in live}
        self._tried: set[Unit] = set()
        self.failed: dict[Unit, str] = {}

    def start(self) -> Unit | None:
        """Return a unit that could start now and was not tried, if there is one."""
        for unit in (unit for units in self._left.values() for unit in units):
            if unit.ready and unit not in self._tried:
                self._tried.add(unit)
                self._on_event("start", unit)
                return unit
        return None

    def settle(self, unit: Unit, reason: str | None) -> None:
        """Note how a unit ended, and look what waited for it."""
        if reason is not None:
            self.failed[unit] = reason
        for name in self._left:
            entry = self._job.entries[name]
            if unit.model in (name, entry.pretrained):
                self._left[name] = list(missing(entry, self._job.out))
                if not self._left[name]:  # others may take hours yet
                    _finish(entry, self._job, self.failed)
        self._on_event("done" if reason is None else "failed", unit)


def _run_here(agenda: _Agenda, job: Job) -> None:
    """Execute one unit after another in this process."""
    while unit := agenda.start():
        agenda.settle(unit, execute(unit, job))


def _run_in_workers(agenda: _Agenda, job: Job, jobs: int) -> None:
    """Keep worker processes busy with what is ready.

    When a worker dies all units in flight are lost, and none can be told to be the cause. They
    are tried again one at a time; one that dies alone has failed.
    """
    suspects: list[Unit] = []
    running: dict[Future[str | None], Unit] = {}
    pool = _pool(jobs)
    try:
        while True:
            refused: list[Unit] = []
            while len(running) < (1 if suspects else jobs):
                unit = suspects.pop() if suspects else agenda.start()
                if unit is None:
                    break
                try:
                    running[pool.submit(execute, unit, job)] = unit
                except BrokenProcessPool:  # a worker died since the last look
                    refused.append(unit)
                    break
            if running:
                wait(running, return_when=FIRST_COMPLETED)
            elif not refused:
                return
            died = any(isinstance(f.exception(), BrokenProcessPool) for f in running if f.done())
            if died or refused:
                lost = [*running.values(), *refused]
                running.clear()
                pool.shutdown()
                pool = _pool(jobs)
                if len(lost) > 1 or refused:
                    suspects += lost
                    continue
                reason = "the worker process died: out of memory, or killed"
                _write_failed(lost[0], job, reason)
                agenda.settle(lost[0], reason)
            for future in [future for future in running if future.done()]:
                agenda.settle(running.pop(future), future.result())
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
        pretrained_dir=job.checkpoints,
        device=job.device or "cpu",
    )
    write_training(result, job.out)


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
    # Weights may be what failed; blocks and batch are those of any model of the entry.
    entry = replace(job.entries[unit.model], pretrained=None)
    settings = settings_of(entry, unit.partition, job.device)
    try:
        problem = load_problem(entry, "init", unit.seed, data_root=job.data_root)
        train_run = "" if unit.stage == "init" else run_name(unit.seed)
        problem = replace(problem, stage=unit.stage, train_run=train_run)
        write_failed_blocks(problem, settings, job.out, reason)
    except Exception:  # such as a full disk: the failure is still reported, and tried again
        log.debug("no rows of %s", unit, exc_info=True)


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
    """Return torch's threads per worker: the cores shared out, at most OMP_NUM_THREADS."""
    cores = os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores // jobs, int(asked) if asked.isdigit() else cores))
