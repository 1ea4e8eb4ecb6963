"""What is left to do for whole entries, read from what a folder holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pandas as pd

from harness.campaign.unit import Unit
from harness.estimator.settings import Settings
from harness.records import version
from harness.records.ledger import Ledger
from harness.registry import ModelEntry
from harness.registry.entry import SpeedupRecipe
from harness.training import climb, grid, speedup
from harness.training.gap import SEEDS
from harness.training.stages import STAGE_SEED
from spectra_db.heterogeneity import MOMENTS, that_need
from spectra_db.words import OPTIMIZERS


def settings_of(
    entry: ModelEntry, partition: str | None = None, device: str | None = None
) -> Settings:
    """Return an entry's own settings of a spectrum, of its own partition if none is named.

    With Gram matrices where they are cheap.
    """
    numbers = entry.num_probes, entry.num_steps
    return Settings(partition or entry.partition, *numbers, device=device, gram=None)


def partitions_of(entry: ModelEntry, stage: str) -> list[str]:
    """Return the partitions whose spectra are taken at a stage."""
    return [entry.partition, *(["full"] if stage in entry.full_stages else [])]


def missing(entry: ModelEntry, ledger: Ledger) -> Iterator[Unit]:
    """Yield the units of an entry that a folder does not hold, those that wait marked so.

    A pretrained entry waits for the final weights of the entry that it starts from.

    Raises:
        UserError: The folder holds results of another version of the entry.
    """
    version.check(entry, ledger)
    yield from _missing(entry, ledger)


def _missing(entry: ModelEntry, ledger: Ledger) -> Iterator[Unit]:
    """Yield the units as `missing`, of a folder that is of this version of the entry."""
    start = entry.pretrained
    if start is not None and not ledger.checkpoint(start, "final", STAGE_SEED).exists():
        units = _missing(replace(entry, pretrained=None), ledger)
        yield from (replace(unit, ready=False) for unit in units)
        return
    if entry.speedup is not None:
        yield from _missing_trials(entry, entry.speedup, ledger)
    rows = ledger.rows("training", entry.name)
    retrained = False
    if entry.grid_recipe is not None:
        for optimizer in OPTIMIZERS:
            for unit in _missing_runs(entry, optimizer, rows, ledger):
                # Checkpoints that lie there are then of another run, such as `train --lr`'s.
                retrained |= (unit.optimizer, unit.seed) == ("adamw", STAGE_SEED)
                yield unit
    for stage in entry.stages:
        # A run that ended in nan left no final weights: its spectrum fails, with the reason.
        ready = stage == "init" or (
            not retrained and (_is_kept(entry, ledger, stage) or _diverged(entry, rows))
        )
        for partition in partitions_of(entry, stage):
            if not has_spectrum(entry, ledger, stage, partition):
                yield Unit(entry.name, "spectrum", stage=stage, partition=partition, ready=ready)
    if entry.moments_batch_size is not None and not _has_moments(entry, ledger):
        # The spectrum writes these metrics too, on its own batch: theirs come after.
        ready = has_spectrum(entry, ledger, "init", entry.partition)
        yield Unit(entry.name, "moments", stage="init", ready=ready)


def _missing_trials(entry: ModelEntry, recipe: SpeedupRecipe, ledger: Ledger) -> Iterator[Unit]:
    """Yield the trials to do next, and the one whose checkpoint others start from, if it is gone.

    Where no learning rate is best there is nothing left to do: table `speedups` says so.
    """
    rows = ledger.rows("trials", entry.name)
    with suppress(climb.NoBestRate):
        due = list(speedup.pending(rows, recipe))
        if not due and "final" in entry.stages and not _is_kept(entry, ledger, "final"):
            due = [kept_trial(recipe, speedup.Trials(rows, recipe).best_rate("adamw"))]
        for t in due:
            yield Unit(entry.name, "trial", t.optimizer, t.lr, t.seed, num_steps=t.num_steps)


def kept_trial(recipe: SpeedupRecipe, lr: float) -> speedup.Trial:
    """Return the trial whose final weights are kept, where the best rate of AdamW is `lr`."""
    return speedup.Trial("adamw", recipe.num_steps, lr, STAGE_SEED)


def _missing_runs(
    entry: ModelEntry, optimizer: str, rows: pd.DataFrame, ledger: Ledger
) -> Iterator[Unit]:
    """Yield the runs of the grid, and those of the seeds at its best rate."""
    assert entry.recipe is not None
    rates = grid.pending(entry.recipe, optimizer, rows)
    for lr in rates:
        yield Unit(entry.name, "train", optimizer, lr, grid.GRID_SEED)
    best = None if rates else grid.best(rows, optimizer, entry.recipe)
    for seed in SEEDS:
        done = best is not None and best in grid.final_losses(rows, optimizer, seed).index
        if done and (optimizer, seed) == ("adamw", STAGE_SEED) and not _diverged(entry, rows):
            # Checkpoints are no part of the tables: make them again where a spectrum needs them,
            # or where they are of another rate.
            stages = ledger.rows("stages", entry.name, optimizer="adamw", seed=STAGE_SEED)
            done = set(stages["lr"]) <= {best} and all(
                _is_kept(entry, ledger, stage) or has_spectrum(entry, ledger, stage, partition)
                for stage in entry.stages
                for partition in partitions_of(entry, stage)
                if stage != "init"
            )
        if not done:
            yield Unit(entry.name, "train", optimizer, best or 0.0, seed, ready=best is not None)


def _diverged(entry: ModelEntry, rows: pd.DataFrame) -> bool:
    """Tell whether the run whose stages are kept diverged."""
    if entry.recipe is None or not rows["diverged"].any():
        return False
    best = grid.best(rows, "adamw", entry.recipe)
    run = rows[(rows["optimizer"] == "adamw") & (rows["seed"] == STAGE_SEED)]
    return bool(run.loc[run["lr"] == best, "diverged"].any())


def _is_kept(entry: ModelEntry, ledger: Ledger, stage: str) -> bool:
    return ledger.checkpoint(entry.name, stage, STAGE_SEED).exists()


def _has_moments(entry: ModelEntry, ledger: Ledger) -> bool:
    """Tell whether the metrics that are taken on a larger batch are of it, with a batch error."""
    here = {"stage": "init", "init_seed": STAGE_SEED, "metric": that_need(MOMENTS)[0]}
    rows = ledger.rows("heterogeneity", entry.name, **here)
    complete = (rows["batch_size"] == entry.moments_batch_size) & rows["batch_error"].notna()
    return bool(complete.any())


def has_spectrum(entry: ModelEntry, ledger: Ledger, stage: str, partition: str) -> bool:
    """Tell whether a spectrum is complete: derived tables are written last, `full` is one block."""
    settings = settings_of(entry, partition)
    here = {"stage": stage, "init_seed": STAGE_SEED}
    # Failed rows may be of another batch.
    of = here | settings.key | {"batch_size": entry.hessian_batch_size}
    rows = ledger.rows("spectra", entry.name, **of)
    complete = settings.complete(rows)
    if not complete or set(rows["block"]) != complete:
        return False
    if partition == "full":
        return True
    # Other seeds, partitions and cheap metrics say nothing of whether all blocks are there; a
    # single block has nothing to be compared with.
    if len(set(rows.loc[rows["status"] == "ok", "block"])) > 1:
        compared = here | {"partition": partition, "metric": "js0"}
        return not ledger.rows("heterogeneity", entry.name, **compared).empty
    return bool(ledger.rows("blocks", entry.name, **here)["trace"].notna().any())
