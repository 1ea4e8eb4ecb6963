"""One unit of work is done, in whatever process: a trial, a training run, a spectrum, moments."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from harness import tasks
from harness.campaign.claims import claim
from harness.campaign.metric import take_moments
from harness.campaign.plan import kept_trial, missing, settings_of
from harness.campaign.spectrum import take_spectrum, write_failed
from harness.campaign.unit import Unit
from harness.errors import output_error, reason_of
from harness.estimator.device import memory_share
from harness.estimator.settings import Settings
from harness.estimator.spectrum import OnProgress
from harness.records.ledger import Ledger
from harness.records.provenance import code_version
from harness.registry import ModelEntry
from harness.tasks.base import Data
from harness.training import Problem, load_problem, train
from harness.training.speedup import Trial
from harness.training.stages import STAGE_SEED, run_name
from harness.training.trial import run_trial

log = logging.getLogger(__name__)

ELSEWHERE = "another process does it"  # how a unit ends that this process could not have


@dataclass(frozen=True)
class Job:
    """Where and how units are done; sent to the worker processes.

    Attributes:
        ledger: The folder of results.
        entries: By name.
        data_root: Folder of data sets.
        device: Where to compute.
        command: The command line, for table `runs`.
        num_threads: Of torch, for each unit.
        sharers: Processes that share the memory of a device.
        kinds: Of units to do; empty: all.
    """

    ledger: Ledger
    entries: Mapping[str, ModelEntry]
    data_root: Path | None
    device: str | None
    command: str
    num_threads: int = 1
    sharers: int = 1
    kinds: tuple[str, ...] = ()

    def missing(self, entry: ModelEntry) -> list[Unit]:
        """List the units of an entry that are missing and are of these kinds."""
        units = missing(entry, self.ledger)
        return [unit for unit in units if not self.kinds or unit.kind in self.kinds]

    def data(self, entry: ModelEntry) -> Data:
        """Load an entry's data."""
        return tasks.of(entry).load(self.data_root)

    def problem(self, unit: Unit, *, batch_size: int | None = None) -> Problem:
        """Load the model of a unit at its stage, from the checkpoint that the tables name."""
        return load_problem(
            self.entries[unit.model],
            unit.stage,
            unit.seed,
            data_root=self.data_root,
            checkpoint_dir=self.ledger.checkpoints,
            sha256=self.ledger.checkpoint_sha256(unit.model, unit.stage, unit.seed),
            batch_size=batch_size,
        )

    def settings(self, unit: Unit) -> Settings:
        """Return the settings of a unit's entry, with this process's part of the memory."""
        settings = settings_of(self.entries[unit.model], unit.partition, self.device)
        if self.sharers == 1:
            return settings
        memory = memory_share(torch.device(self.device or "cpu"))
        return replace(settings, memory_budget=memory // self.sharers)

    def do(self, unit: Unit, on_progress: OnProgress) -> None:
        """Do a unit and write its rows."""
        work = {"trial": _try, "train": _train, "spectrum": _take, "moments": _take_moments}
        work[unit.kind](unit, self, on_progress)


def execute(unit: Unit, on_progress: OnProgress, *, job: Job) -> str | None:
    """Do one unit and write its rows; return the reason if it failed.

    A failure becomes rows with a status and a reason and does not stop the others.

    Raises:
        OSError: The folder can't be written to.
    """
    torch.set_num_threads(job.num_threads)
    try:
        with claim(job.ledger.folder, unit) as ours:
            # It may have been done since.
            whole = replace(unit, blocks=())
            if not ours or whole not in missing(job.entries[unit.model], job.ledger):
                return ELSEWHERE
            job.do(unit, on_progress)
    except Exception as error:
        if output_error(job.ledger.folder, error) is not None:
            raise
        log.debug("%s failed", unit, exc_info=True)
        reason = reason_of(error)
    else:
        return None
    # Only here, where the error no longer holds what may have filled the memory.
    if not unit.blocks:  # else the whole spectrum tries them again
        note_failure(unit, job, reason)
    return reason


def _train(unit: Unit, job: Job, on_progress: OnProgress) -> None:
    """Train once; keep the stages of the run that they are taken from."""
    entry, checkpoints = job.entries[unit.model], job.ledger.checkpoints
    keeps_stages = unit.optimizer == "adamw" and unit.seed == STAGE_SEED
    if keeps_stages:  # no other run writes there, so that these are of a process that was killed
        for torn in (checkpoints / unit.model).glob(f".{run_name(unit.seed)}[-.]*"):
            shutil.rmtree(torn)
    run = train(
        entry,
        job.data(entry),
        optimizer=unit.optimizer,
        lr=unit.lr,
        seed=unit.seed,
        checkpoint_dir=checkpoints if keeps_stages else None,
        pretrained_dir=checkpoints,
        device=job.device or "cpu",
        on_step=on_progress,
    )
    job.ledger.write_training(run)


def _try(unit: Unit, job: Job, on_progress: OnProgress) -> None:
    """Do a trial; keep the weights that others start from."""
    entry = job.entries[unit.model]
    trial = Trial(unit.optimizer, unit.num_steps, unit.lr, unit.seed)
    is_kept = entry.speedup is not None and trial == kept_trial(entry.speedup, unit.lr)
    row, stage_rows = run_trial(
        entry,
        job.data(entry),
        trial,
        checkpoint_dir=job.ledger.checkpoints,
        keep=is_kept and "final" in entry.stages,
        device=job.device or "cpu",
        on_step=on_progress,
    )
    job.ledger.write_stages(stage_rows)
    job.ledger.write("trials", [row | {"code_version": code_version()}])


def _take(unit: Unit, job: Job, on_progress: OnProgress) -> None:
    """Take one spectrum, or some blocks of it."""
    problem = job.problem(unit)
    take_spectrum(
        problem,
        job.settings(unit),
        job.ledger,
        command=job.command,
        on_progress=on_progress,
        only=unit.blocks,
    )


def _take_moments(unit: Unit, job: Job, on_progress: OnProgress) -> None:
    """Take the metrics that need few products on the entry's larger batch."""
    problem = job.problem(unit, batch_size=job.entries[unit.model].moments_batch_size)
    settings = job.settings(unit)
    take_moments(problem, settings, job.ledger, command=job.command, on_progress=on_progress)


def note_failure(unit: Unit, job: Job, reason: str) -> None:
    """Write failed rows for a spectrum's missing blocks; a run's failure is its model's gap's."""
    if unit.kind != "spectrum":
        return
    # Weights may be what failed; blocks and batch are those of any model of the entry.
    entry = replace(job.entries[unit.model], pretrained=None)
    settings = settings_of(entry, unit.partition, job.device)
    try:
        problem = load_problem(entry, "init", unit.seed, data_root=job.data_root)
        train_run = "" if unit.stage == "init" else run_name(unit.seed)
        problem = replace(problem, stage=unit.stage, train_run=train_run)
        write_failed(problem, settings, job.ledger, reason)
    except Exception:  # such as a full disk: the failure is still reported, and tried again
        log.debug("no rows of %s", unit, exc_info=True)


def num_threads() -> int:
    """Return torch's threads per unit: OMP_NUM_THREADS, else 1.

    The number of threads changes the last bits of sums, so it must not follow from the number of
    jobs, or of cores.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else 1
