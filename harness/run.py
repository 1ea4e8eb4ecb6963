"""Whole entries: the grid, the seeds, the stages and their spectra, resumable from the store."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness import tasks
from harness.errors import UserError
from harness.registry import ModelEntry
from harness.spectra import Settings, blocks_of, take_spectrum, write_failed_blocks
from harness.training import grid
from harness.training.gap import SEEDS, gap
from spectra_db import store
from spectra_db.schema import PROTOCOL_VERSION

# The run whose stages are kept; it also seeds their initialisation and their probes.
STAGE_SEED = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unit:
    """One piece of work that is done as a whole or again: a training run, or a spectrum.

    Attributes:
        model: Name of the entry.
        kind: train or spectrum.
        optimizer, lr, seed: Of a training run.
        stage, partition: Of a spectrum.
    """

    model: str
    kind: str
    optimizer: str = ""
    lr: float = 0.0
    seed: int = STAGE_SEED
    stage: str = ""
    partition: str = ""

    def __str__(self) -> str:
        if self.kind == "train":
            return f"{self.model}: {self.optimizer} at {self.lr:g}, seed {self.seed}"
        return f"{self.model}: {self.partition} spectrum at {self.stage}"


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


def ready(entry: ModelEntry, out: Path) -> Iterator[Unit]:
    """Yield the units of an entry that are missing from the store and could start now."""
    rows = _rows(out, "training", entry.name)
    recipe = entry.recipe
    trained = False
    if recipe is not None:
        left = {optimizer: grid.pending(recipe, optimizer, rows) for optimizer in ("sgd", "adamw")}
        for optimizer, rates in left.items():
            for lr in rates:
                yield Unit(entry.name, "train", optimizer, lr, grid.GRID_SEED)
            best = grid.best(rows, optimizer)
            if rates or best is None:
                continue
            for seed in SEEDS:
                if best not in grid.final_losses(rows, optimizer, seed).index:
                    yield Unit(entry.name, "train", optimizer, best, seed)
                elif (optimizer, seed) == ("adamw", STAGE_SEED):
                    trained = True
    for stage in entry.stages:
        if stage == "init" or trained:
            for partition in ("weights", "full") if stage in entry.full_stages else ("weights",):
                if not _has_spectrum(entry, out, stage, partition):
                    yield Unit(entry.name, "spectrum", stage=stage, partition=partition)


def num_units(entry: ModelEntry) -> int:
    """Return how many units an entry takes if no grid is extended."""
    if entry.status != "ok":
        return 0
    training = 0 if entry.recipe is None else 2 * (entry.recipe.num_lrs + len(SEEDS))
    return training + len(entry.stages) + len(entry.full_stages)


def run_entries(
    entries: Sequence[ModelEntry],
    job: Job,
    *,
    jobs: int = 1,
    on_event: Callable[[str, Unit], None] = lambda what, unit: None,
) -> list[tuple[Unit, str]]:
    """Do everything for some entries, from where the store stands.

    Args:
        entries: The entries; pending ones get their row of table `models` alone.
        job: Where and how.
        jobs: Worker processes; 1 works in this process.
        on_event: Called with start, done or failed, and the unit.

    Returns:
        The units that failed, with their reasons; they are rows in the store too.
    """
    failed: dict[Unit, str] = {}
    live = [entry for entry in entries if entry.status == "ok"]
    for entry in entries:
        _write_model(entry, job)
    with _executor(jobs) as executor:
        running: dict[Future[str | None], Unit] = {}
        while True:
            busy = set(running.values()) | set(failed)
            todo = (unit for entry in live for unit in ready(entry, job.out) if unit not in busy)
            for unit in todo:
                if len(running) >= jobs:
                    break
                on_event("start", unit)
                running[executor.submit(execute, unit, job)] = unit
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                reason = future.result()
                if reason is not None:
                    failed[unit] = reason
                on_event("done" if reason is None else "failed", unit)
    for entry in live:
        if entry.recipe is not None:
            reasons = [r for u, r in failed.items() if (u.model, u.kind) == (entry.name, "train")]
            _write_gap(entry, job.out, reasons)
    return list(failed.items())


def execute(unit: Unit, job: Job) -> str | None:
    """Do one unit and write its rows; return the reason if it failed.

    A failure becomes rows with a status and a reason and does not stop the others.
    """
    import torch

    torch.set_num_threads(job.num_threads)
    entry = job.entries[unit.model]
    try:
        if unit.kind == "train":
            _train(unit, entry, job)
        else:
            _take(unit, entry, job)
    except Exception as error:
        log.debug("%s failed", unit, exc_info=True)
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _train(unit: Unit, entry: ModelEntry, job: Job) -> None:
    """Train once; keep the stages of the run that they are taken from."""
    from harness.training import train

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


def _take(unit: Unit, entry: ModelEntry, job: Job) -> None:
    """Take one spectrum; on failure write failed rows for the blocks that are missing."""
    from harness.training import load_problem

    problem = load_problem(
        entry,
        unit.stage,
        unit.seed,
        data_root=job.data_root,
        checkpoint_dir=job.checkpoints,
    )
    settings = settings_of(entry, unit.partition, job.device)
    try:
        take_spectrum(problem, settings, job.out, command=job.command)
    except Exception as error:
        write_failed_blocks(problem, settings, job.out, f"{type(error).__name__}: {error}")
        raise


def settings_of(entry: ModelEntry, partition: str, device: str | None) -> Settings:
    """Return an entry's own settings of a spectrum."""
    return Settings(
        partition=partition,
        num_probes=entry.num_probes,
        num_steps=entry.num_steps,
        device=device,
    )


def _has_spectrum(entry: ModelEntry, out: Path, stage: str, partition: str) -> bool:
    """Tell whether a spectrum is complete: heterogeneity is written last, `full` is one block."""
    rows = _rows(out, "spectra", entry.name)
    if len(rows):
        rows = rows[(rows["stage"] == stage) & (rows["partition"] == partition)]
        rows = rows[rows["init_seed"] == STAGE_SEED]
    if not len(rows):
        return False
    sampled = rows[(rows["method"] == "slq") & (rows["status"] == "ok")]
    asked = (sampled["num_steps"] == entry.num_steps) | sampled["breakdown"]
    enough = sampled.groupby("block")["probe"].count() >= entry.num_probes
    if not (asked.all() and enough.all()):
        return False
    if partition == "full":
        return True
    metrics = _rows(out, "heterogeneity", entry.name)
    return bool(len(metrics)) and bool((metrics["stage"] == stage).any())


def _write_gap(entry: ModelEntry, out: Path, reasons: list[str]) -> None:
    """Write the row of table `gaps`."""
    assert entry.recipe is not None
    row = gap(entry.name, _rows(out, "training", entry.name), entry.recipe)
    if reasons:
        row |= {"status": "failed", "reason": reasons[0]}
    store.write(out, "gaps", [row])


def _write_model(entry: ModelEntry, job: Job) -> None:
    """Write the row of table `models`; a pending entry's model is built without its data."""
    row: dict[str, Any] = {
        "model": entry.name,
        "family": entry.family,
        "tier": entry.tier,
        "task": entry.task,
        "num_params": 0,
        "num_blocks": 0,
        "source": entry.source,
        "licence": entry.licence,
        "reference": entry.reference,
        "status": entry.status,
        "reason": entry.reason,
        "protocol_version": PROTOCOL_VERSION,
    }
    if entry.status == "ok":
        from harness.training import load_problem

        try:
            problem = load_problem(entry, "init", STAGE_SEED, data_root=job.data_root)
            blocks = blocks_of(problem, "weights")
            total = sum(p.numel() for p in problem.model.parameters())
            row |= {"num_params": total, "num_blocks": len(blocks)}
        except UserError as error:
            row |= {"status": "failed", "reason": str(error)}
    store.write(job.out, "models", [row])


def _rows(out: Path, table: str, model: str) -> pd.DataFrame:
    """Return a model's rows of a table, none where there is no file."""
    path = store.path_of(out, table, model)
    return store.read(path, table).to_pandas() if path.exists() else pd.DataFrame()


class _InProcess:
    """An executor that works at once, in this process."""

    def __enter__(self) -> _InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., str | None], *args: Any) -> Future[str | None]:
        future: Future[str | None] = Future()
        future.set_result(function(*args))
        return future


def _executor(jobs: int) -> Any:
    """Return a pool of spawned workers: torch's threads don't survive a fork."""
    if jobs == 1:
        return _InProcess()
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def num_threads(jobs: int) -> int:
    """Return torch's threads per worker: the cores shared out."""
    return max(1, (os.cpu_count() or 1) // jobs)
