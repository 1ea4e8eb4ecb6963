"""Whole entries: the grid, the seeds, the stages and their spectra, resumable from the store."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import tasks
from harness.campaign.engines import local as workers
from harness.campaign.locks import claim
from harness.campaign.pace import Pace
from harness.campaign.plan import Survey, Unit, check_version, missing, settings_of
from harness.campaign.spectrum import (
    Settings,
    checkpoint_sha256,
    code_version,
    rows_of,
    take_spectrum,
    write_failed_blocks,
    write_training,
)
from harness.errors import OutputError, output_error, reason_of
from harness.records import version
from harness.registry import ModelEntry
from harness.tasks.base import target_entropy
from harness.training.gap import gap
from harness.training.reference import reference_loss
from harness.training.speedup import speedup
from harness.training.stages import STAGE_SEED, run_name
from spectra_db import store
from spectra_db.schema import PROTOCOL_VERSION

if TYPE_CHECKING:
    from harness.training import Problem

log = logging.getLogger(__name__)

# Told what happened to a unit, and facts: reason, seconds, fraction of the unit, seconds remaining.
Event = Callable[[str, Unit, dict[str, Any]], None]
OnProgress = Callable[[int, int], None]
Engine = Callable[["Agenda", Callable[..., str | None]], None]

ELSEWHERE = "another process does it"  # how a unit ends that this process could not have
_PATIENCE = 2.0  # seconds between looks at what other processes do


@dataclass(frozen=True)
class Job:
    """Where and how units are executed; sent to the worker processes."""

    out: Path
    entries: dict[str, ModelEntry]
    data_root: Path | None
    device: str | None
    num_threads: int
    command: str
    sharers: int = 1  # processes that share the memory of a device
    kinds: tuple[str, ...] = ()  # of units to do; empty: all

    def missing(self, entry: ModelEntry) -> list[Unit]:
        """List the units of an entry that are missing and are of these kinds."""
        units = missing(entry, self.out)
        return [unit for unit in units if not self.kinds or unit.kind in self.kinds]

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, beside the tables."""
        return self.out / "checkpoints"


def run_entries(
    surveys: Sequence[Survey],
    job: Job,
    *,
    jobs: int = 1,
    engine: Engine | None = None,
    on_event: Event = lambda what, unit, facts: None,
) -> dict[Unit, str]:
    """Do everything for some entries, from where the store stands.

    A unit is tried once; what comes of it may make others ready. Interrupted, the workers end at
    once: a table's file is replaced as a whole, so that only the work in flight is lost. Several
    processes may work in one folder: each takes what no other one does, and waits for the rest.

    Args:
        surveys: The entries; those with a reason get their row of table `models` alone.
        job: Where and how.
        jobs: Worker processes; 1 works in this process.
        engine: What executes the units instead, such as `harness.campaign.engines.ray`'s.
        on_event: Called with start, progress, done, failed or elsewhere, the unit, and facts.

    Returns:
        The units that failed, with their reasons; they are rows in the store too.

    Raises:
        OutputError: The folder can't be written to any more, as when the disk is full, or was
            removed.
        UserError: The folder holds results of another version of an entry.
    """
    try:
        live = [survey.entry for survey in surveys if survey.reason is None]
        costs = {survey.entry.name: survey.unit_flops for survey in surveys}
        for survey in surveys:
            if survey.reason is None:
                check_version(survey.entry, job.out, survey.num_params)
        agenda = Agenda(live, job, on_event, Pace(costs))
        for survey in surveys:
            if survey.reason is None:
                version.note(survey.entry, job.out)
            _write_model(survey, job.out)
        if engine is None:
            job = replace(job, sharers=_sharers(jobs, job.device))
            several = partial(workers.run_in_workers, jobs=jobs, spread=job.device == "cuda")
            engine = workers.run_here if jobs == 1 else several
        engine(agenda, partial(execute, job=job))
        for entry in live:
            _finish(entry, job, agenda.failed)
        return agenda.failed
    except OSError as error:
        if (stop := output_error(job.out, error)) is not None:
            raise stop from error
        raise


def _sharers(jobs: int, device: str | None) -> int:
    """Return how many of so many processes share the memory of a device."""
    import torch

    # Named alone, GPUs are taken in turn.
    return -(-jobs // max(1, torch.cuda.device_count())) if device == "cuda" else jobs


def _finish(entry: ModelEntry, job: Job, failed: dict[Unit, str]) -> None:
    """Write an entry's gap, and rows for the stages that a failed run left without weights."""
    if entry.speedup is not None:
        rows = rows_of(job.out, "trials", entry.name)
        store.write(job.out, "speedups", [speedup(entry.name, rows, entry.speedup)])
    if not entry.trains or entry.recipe is None:
        return
    reasons = [r for u, r in failed.items() if (u.model, u.kind) == (entry.name, "train")]
    for unit in missing(entry, job.out) if reasons else ():
        if unit.kind == "spectrum" and not unit.ready:
            _write_failed(unit, job, f"its stage was not trained: {reasons[0]}")
    entropy = _target_entropy(entry, job)
    row = gap(
        entry.name,
        rows_of(job.out, "training", entry.name),
        entry.recipe,
        entropy=entropy,
        reference=partial(reference_loss, entry, entropy=entropy),
    )
    if reasons:
        row |= {"status": "failed", "reason": reasons[0]}
    store.write(job.out, "gaps", [row])


def _target_entropy(entry: ModelEntry, job: Job) -> float | None:
    """Return the entropy of the targets over the subset that an entry's final losses are of."""
    assert entry.recipe is not None
    task = tasks.get(entry.task, **entry.task_options)
    data = task.load(job.data_root)
    size = min(entry.recipe.eval_size, task.size(data, "train"))
    return target_entropy(task, task.fixed(data, "train", size))


class Agenda:
    """Which units are ready, which were tried, and which failed with what reason."""

    def __init__(
        self, live: list[ModelEntry], job: Job, on_event: Event, pace: Pace | None = None
    ) -> None:
        self._job, self._on_event, self._pace = job, on_event, pace or Pace({})
        self._left = {entry.name: job.missing(entry) for entry in live}
        self._tried: set[Unit] = set()
        self._elsewhere: set[Unit] = set()
        self.failed: dict[Unit, str] = {}

    def start(self) -> Unit | None:
        """Return a unit that could start now and was not tried, if there is one."""
        for unit in (unit for units in self._left.values() for unit in units):
            if unit.ready and unit not in self._tried:
                self._tried.add(unit)
                self._pace.start(unit)
                self._tell("start", unit)
                return unit
        return None

    def progress(self, unit: Unit, fraction: float) -> None:
        """Note how far a unit is."""
        self._pace.progress(unit, fraction)
        self._tell("progress", unit, fraction=round(fraction, 4))

    def settle(self, unit: Unit, reason: str | None) -> None:
        """Note how a unit ended, and look what waited for it."""
        seconds = round(self._pace.finish(unit, counts=reason is None), 3)
        self._check_folder(unit)
        if reason == ELSEWHERE:
            if unit not in self._elsewhere:
                self._tell("elsewhere", unit)
            self._elsewhere.add(unit)
            self._look(unit.model)
            return
        self._elsewhere.discard(unit)
        if reason is not None:
            self.failed[unit] = reason
        self._look(unit.model)
        if reason is None:
            self._tell("done", unit, seconds=seconds)
        else:
            self._tell("failed", unit, seconds=seconds, reason=reason)

    def lost(self, unit: Unit) -> None:
        """Note that the process that did a unit died."""
        reason = "the worker process died: out of memory, or killed"
        _write_failed(unit, self._job, reason)
        self.settle(unit, reason)

    def claim(self, unit: Unit) -> AbstractContextManager[bool]:
        """Take a unit for this process, as `claim`."""
        return claim(self._job.out, unit)

    def wait(self) -> bool:
        """Wait for units that other processes do; tell whether there are any."""
        left = {unit for units in self._left.values() for unit in units}
        theirs = self._elsewhere & left
        if not theirs:
            return False
        time.sleep(_PATIENCE)
        for model in {unit.model for unit in theirs}:
            self._look(model)
        for unit in theirs:
            with self.claim(unit) as ours:
                if ours:  # it was done, or its process ended before that
                    self._tried.discard(unit)
        return True

    def _check_folder(self, unit: Unit) -> None:
        """Raise if the folder was removed: a unit makes it anew, without what was in it.

        The row of table `models` is written before any unit starts, and by nothing else.
        """
        out = self._job.out
        if not store.path_of(out, "models", unit.model).is_file():
            raise OutputError(
                f"{out} was removed, or emptied, while this ran, and what was finished is gone "
                "with it; the same command begins anew"
            )

    def _look(self, model: str) -> None:
        """Look again what is left of a model and of those that start from it."""
        for name in self._left:
            entry = self._job.entries[name]
            if model in (name, entry.pretrained):
                self._left[name] = self._job.missing(entry)
                if not self._left[name]:  # others may take hours yet
                    _finish(entry, self._job, self.failed)

    def _tell(self, what: str, unit: Unit, **facts: Any) -> None:
        left = [unit for units in self._left.values() for unit in units]
        open_ = [unit for unit in left if unit not in self.failed]
        remaining = self._pace.remaining(open_)
        facts |= {"units_left": len(open_), "remaining": remaining and round(remaining)}
        self._on_event(what, unit, facts)


def execute(unit: Unit, on_progress: OnProgress | None = None, *, job: Job) -> str | None:
    """Do one unit and write its rows; return the reason if it failed.

    A failure becomes rows with a status and a reason and does not stop the others.

    Raises:
        OSError: The folder can't be written to.
    """
    import torch

    torch.set_num_threads(job.num_threads)
    try:
        with claim(job.out, unit) as ours:
            if not ours:
                return ELSEWHERE
            left = missing(job.entries[unit.model], job.out)
            if replace(unit, blocks=()) not in left:  # it was done since
                return ELSEWHERE
            do = {"trial": _try, "train": _train, "spectrum": _take, "moments": _take_moments}
            do[unit.kind](unit, job, on_progress)
    except Exception as error:
        if output_error(job.out, error) is not None:
            raise
        log.debug("%s failed", unit, exc_info=True)
        reason = reason_of(error)
    else:
        return None
    # Only here, where the error no longer holds what may have filled the memory.
    if not unit.blocks:  # else the whole spectrum tries them again
        _write_failed(unit, job, reason)
    return reason


def _train(unit: Unit, job: Job, on_progress: OnProgress | None = None) -> None:
    """Train once; keep the stages of the run that they are taken from."""
    from harness.training import train

    entry = job.entries[unit.model]
    data = tasks.get(entry.task, **entry.task_options).load(job.data_root)
    keeps_stages = unit.optimizer == "adamw" and unit.seed == STAGE_SEED
    if keeps_stages:  # no other run writes there, so that these are of a process that was killed
        for torn in (job.checkpoints / unit.model).glob(f".{run_name(unit.seed)}[-.]*"):
            shutil.rmtree(torn)
    result = train(
        entry,
        data,
        optimizer=unit.optimizer,
        lr=unit.lr,
        seed=unit.seed,
        checkpoint_dir=job.checkpoints if keeps_stages else None,
        pretrained_dir=job.checkpoints,
        device=job.device or "cpu",
        on_step=on_progress,
    )
    write_training(result, job.out)


def _try(unit: Unit, job: Job, on_progress: OnProgress | None = None) -> None:
    """Do a trial; keep the weights that others start from."""
    from harness.training.trial import run_trial

    entry = job.entries[unit.model]
    data = tasks.get(entry.task, **entry.task_options).load(job.data_root)
    first = (unit.optimizer, unit.seed) == ("adamw", STAGE_SEED)
    row = run_trial(
        entry,
        data,
        optimizer=unit.optimizer,
        lr=unit.lr,
        seed=unit.seed,
        num_steps=unit.num_steps,
        checkpoint_dir=job.checkpoints,
        keep=first and "final" in entry.stages,
        device=job.device or "cpu",
        on_step=on_progress,
    )
    store.write(job.out, "trials", [row | {"code_version": code_version()}])


def _take(unit: Unit, job: Job, on_progress: OnProgress | None = None) -> None:
    """Take one spectrum."""
    settings = _settings(unit.partition, job.entries[unit.model], job)
    problem = _problem(unit, job)
    take_spectrum(problem, settings, job.out, command=job.command, on_progress=on_progress)


def _take_moments(unit: Unit, job: Job, on_progress: OnProgress | None = None) -> None:
    """Take the metrics that need few products on the entry's larger batch."""
    from harness.campaign.metric import take_moments

    entry = job.entries[unit.model]
    settings = _settings(entry.partition, entry, job)
    problem = _problem(unit, job, batch_size=entry.moments_batch_size)
    take_moments(problem, settings, job.out, command=job.command, on_progress=on_progress)


def _settings(partition: str, entry: ModelEntry, job: Job) -> Settings:
    """Return an entry's settings, with this process's part of the memory."""
    import torch

    from harness.estimator.device import memory_share

    settings = settings_of(entry, partition, job.device)
    if job.sharers == 1:
        return settings
    memory = memory_share(torch.device(job.device or "cpu"))
    return replace(settings, memory_budget=memory // job.sharers)


def _problem(unit: Unit, job: Job, *, batch_size: int | None = None) -> Problem:
    """Load the model of a unit at its stage, from the checkpoint that the tables name."""
    from harness.training import load_problem

    return load_problem(
        job.entries[unit.model],
        unit.stage,
        unit.seed,
        data_root=job.data_root,
        checkpoint_dir=job.checkpoints,
        sha256=checkpoint_sha256(job.out, unit.model, unit.stage, unit.seed),
        batch_size=batch_size,
    )


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


def num_threads() -> int:
    """Return torch's threads per unit: OMP_NUM_THREADS, else 1.

    The number of threads changes the last bits of sums, so it must not follow from the number of
    jobs, or of cores.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else 1
