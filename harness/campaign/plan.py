"""What is left to do for whole entries, read from the store, and what it costs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from harness.campaign.spectrum import Settings, forecast_of, rows_of
from harness.errors import UserError, reason_of
from harness.records import version
from harness.registry import ModelEntry
from harness.registry.entry import SpeedupRecipe
from harness.training import climb, grid, speedup
from harness.training.gap import SEEDS
from harness.training.stages import STAGE_SEED, checkpoint_path
from spectra_db.heterogeneity import MOMENTS, that_need

if TYPE_CHECKING:
    from harness.estimator.cost import Forecast

# Of an entry, for the forecast: two climbs, the seeds, and 2T and 4T for half of the entries.
TYPICAL_TRIALS, TYPICAL_LENGTH = 40, 50


@dataclass(frozen=True)
class Unit:
    """One piece of work that is done as a whole or again.

    Attributes:
        model: Name of the entry.
        kind: trial (a training run of protocol 2), train (one of protocol 1), spectrum, or moments:
            metrics that need few products, on a larger batch.
        optimizer, lr, seed: Of a training run.
        num_steps: Of a trial.
        stage, partition: Of a spectrum; moments are of the entry's partition.
        ready: Whether it could start now; a run at the best rate has no rate before.
        blocks: Some blocks of a spectrum, to be taken alone; empty for all.
    """

    model: str
    kind: str
    optimizer: str = ""
    lr: float = 0.0
    seed: int = STAGE_SEED
    stage: str = ""
    partition: str = ""
    ready: bool = True
    blocks: tuple[str, ...] = ()
    num_steps: int = 0

    @property
    def slug(self) -> str:
        """A name for files; runs that keep their stages, in one folder, have one at all rates."""
        of = self.partition or self.kind
        if self.kind == "train" and (self.optimizer, self.seed) != ("adamw", STAGE_SEED):
            of = f"{self.lr:g}"
        what = self.stage or self.optimizer, of, str(self.seed)
        name = "-".join([self.model, *what])
        blocks = hashlib.sha256("\n".join(self.blocks).encode()).hexdigest()[:8]
        return f"{name}-{blocks}" if self.blocks else name

    def __str__(self) -> str:
        if self.kind in ("train", "trial"):
            steps = f", {self.num_steps} steps" if self.num_steps else ""
            return f"{self.model}: {self.optimizer} at {self.lr:g}, seed {self.seed}{steps}"
        if self.kind == "moments":
            return f"{self.model}: moments on a larger batch at {self.stage}"
        return f"{self.model}: {self.partition} spectrum at {self.stage}"


@dataclass(frozen=True)
class Survey:
    """What an entry takes when nothing is done yet.

    Attributes:
        entry: The entry.
        reason: Why it can't be worked on; the numbers are zero then.
        num_params: Parameters of the model.
        num_blocks: Blocks of the entry's partition.
        num_units: Training runs, spectra and moments, if no grid is extended.
        num_products: Hessian-vector products of all spectra and moments.
        spectra_flops: Floating-point operations of all spectra and moments.
        training_flops: Floating-point operations of all training runs.
        graph_bytes: Memory of the kept graph of the largest batch, in bytes.
        costs: Forecast of the spectrum of each partition, and of "moments" where they are taken.
        counts: At how many stages each is taken.
        run_flops: Operations of one training run of protocol 1.
        step_flops: Operations of one step of a trial.
    """

    entry: ModelEntry
    reason: str | None = None
    num_params: int = 0
    num_blocks: int = 0
    num_units: int = 0
    num_products: int = 0
    spectra_flops: float = 0.0
    training_flops: float = 0.0
    graph_bytes: int = 0
    costs: Mapping[str, Forecast] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    run_flops: float = 0.0
    step_flops: float = 0.0

    @property
    def unit_flops(self) -> dict[str, float]:
        """Operations of one unit, by its kind or partition; of one step for a "trial"."""
        spectra = {p: float(c.flops) for p, c in self.costs.items()}
        return {"train": self.run_flops, "trial": self.step_flops, **spectra}


def survey(entry: ModelEntry, data_root: Path | None) -> Survey:
    """Count what an entry costs, from one product per block on one sample.

    A pending entry, or one whose data or model can't be had or fail, comes back with the reason.
    """
    if entry.status != "ok":
        return Survey(entry, reason=entry.reason)
    try:
        return _survey(entry, data_root)
    except UserError as error:
        return Survey(entry, reason=str(error))
    except Exception as error:  # of the author's code
        return Survey(entry, reason=f"entry {entry.name!r}: {reason_of(error)}")


def _survey(entry: ModelEntry, data_root: Path | None) -> Survey:
    """Count what an entry costs, as `survey`."""
    from harness.training import load_problem

    # The pretraining's weights change no cost, and may not be there yet.
    fresh = replace(entry, pretrained=None)
    problem = load_problem(fresh, "init", STAGE_SEED, data_root=data_root)
    counts = Counter(partition for stage in entry.stages for partition in _partitions(entry, stage))
    costs = {p: forecast_of(problem, p, entry.num_probes, entry.num_steps) for p in counts}
    if entry.moments_batch_size is not None:
        larger = load_problem(
            fresh, "init", STAGE_SEED, data_root=data_root, batch_size=entry.moments_batch_size
        )
        costs["moments"] = forecast_of(
            larger, entry.partition, entry.num_probes, 1, exact_size=entry.num_probes
        )
        counts["moments"] = 1
    runs, training, step = 0, 0.0, 0.0
    per_sample = costs[entry.partition].pass_flops / problem.batch_size
    if entry.speedup is not None:
        runs = TYPICAL_TRIALS
        step = per_sample * entry.speedup.batch_size
        training = step * entry.speedup.num_steps * TYPICAL_LENGTH
    if entry.trains and entry.recipe is not None:
        runs = 2 * (entry.recipe.num_lrs + len(SEEDS))
        # The fixed subset is seen forward before and after, which is a third of both ways.
        samples = entry.recipe.num_steps * entry.recipe.batch_size + 2 * entry.recipe.eval_size / 3
        training = per_sample * samples * runs
    return Survey(
        entry,
        num_params=sum(p.numel() for p in problem.model.parameters()),
        num_blocks=len(costs[entry.partition].block_flops),
        num_units=runs + sum(counts.values()),
        num_products=sum(cost.num_products * counts[p] for p, cost in costs.items()),
        spectra_flops=sum(cost.flops * counts[p] for p, cost in costs.items()),
        training_flops=training,
        graph_bytes=max(cost.graph_bytes for cost in costs.values()),
        costs=costs,
        counts=counts,
        run_flops=training / max(runs, 1) if entry.trains else 0.0,
        step_flops=step,
    )


def missing(entry: ModelEntry, out: Path) -> Iterator[Unit]:
    """Yield the units of an entry that the store does not hold, those that wait marked so.

    A pretrained entry waits for the final weights of the entry that it starts from.

    Raises:
        UserError: The store holds results of another version of the entry.
    """
    check_version(entry, out)
    yield from _missing(entry, out)


def check_version(entry: ModelEntry, out: Path, num_params: int | None = None) -> None:
    """Raise unless the results that the store holds of an entry are of this version of it.

    Args:
        entry: The entry.
        out: Folder of the tables.
        num_params: Of the model that it builds, where that is known.

    Raises:
        UserError: Their length, batch or model's size is another, or the note beside them differs.
    """
    runs = rows_of(out, "training", entry.name)
    spectra = rows_of(out, "spectra", entry.name)
    spectra = spectra[spectra["status"].isin(["ok", "zero"])]
    if entry.trains and entry.recipe is not None:
        ends = runs.loc[(runs["split"] == "train") & (runs["step"] > 0) & ~runs["diverged"]]
        if strange := set(ends["step"]) - {entry.recipe.num_steps}:
            raise UserError(
                f"{out} holds runs of {entry.name} of {min(strange)} steps, its recipe has "
                f"{entry.recipe.num_steps}: name another --out"
            )
    if strange := set(spectra["batch_size"]) - {entry.hessian_batch_size}:
        raise UserError(
            f"{out} holds spectra of {entry.name} on {min(strange)} samples, its batch has "
            f"{entry.hessian_batch_size}: name another --out"
        )
    trials = rows_of(out, "trials", entry.name)
    if entry.speedup is not None:
        allowed = {length * entry.speedup.num_steps for length in speedup.LENGTHS}
        if strange := set(trials["num_steps"]) - allowed:
            raise UserError(
                f"{out} holds runs of {entry.name} of {min(strange)} steps, its recipe has "
                f"{', '.join(map(str, sorted(allowed)))}: name another --out"
            )
    if not (len(runs) or len(spectra) or len(trials)):
        return
    version.check(entry, out)
    models = rows_of(out, "models", entry.name)
    known = set(models.loc[models["status"] == "ok", "num_params"])
    if num_params is not None and (strange := known - {num_params}):
        raise UserError(
            f"{out} holds results of a {entry.name} of {min(strange):,} parameters, it has "
            f"{num_params:,} now: name another --out"
        )


def _missing(entry: ModelEntry, out: Path) -> Iterator[Unit]:
    """Yield the units as `missing`, of a store that is of this version of the entry."""
    if entry.pretrained is not None:
        start = checkpoint_path(out / "checkpoints", entry.pretrained, STAGE_SEED, "final")
        if not start.exists():
            units = _missing(replace(entry, pretrained=None), out)
            yield from (replace(unit, ready=False) for unit in units)
            return
    if entry.speedup is not None:
        yield from _missing_trials(entry, entry.speedup, out)
    rows = rows_of(out, "training", entry.name)
    retrained = False
    if entry.trains and entry.recipe is not None:
        for optimizer in ("sgd", "adamw"):
            for unit in _missing_runs(entry, optimizer, rows, out):
                # Checkpoints that lie there are then of another run, such as `train --lr`'s.
                retrained |= (unit.optimizer, unit.seed) == ("adamw", STAGE_SEED)
                yield unit
    for stage in entry.stages:
        # A run that ended in nan left no final weights: its spectrum fails, with the reason.
        there = _stage_path(entry, out, stage).exists() or _diverged(entry, rows)
        ready = stage == "init" or (there and not retrained)
        for partition in _partitions(entry, stage):
            if not _has_spectrum(entry, out, stage, partition):
                yield Unit(entry.name, "spectrum", stage=stage, partition=partition, ready=ready)
    if entry.moments_batch_size is not None and not _has_moments(entry, out):
        # The spectrum writes these metrics too, on its own batch: theirs come after.
        ready = _has_spectrum(entry, out, "init", entry.partition)
        yield Unit(entry.name, "moments", stage="init", ready=ready)


def _missing_trials(entry: ModelEntry, recipe: SpeedupRecipe, out: Path) -> Iterator[Unit]:
    """Yield the trials to do next, and the one whose checkpoint others start from, if it is gone.

    Where no learning rate is best there is nothing left to do: table `speedups` says so.
    """
    rows = rows_of(out, "trials", entry.name)
    with suppress(climb.NoBestRate):
        due = list(speedup.pending(rows, recipe))
        if not due and "final" in entry.stages and not _stage_path(entry, out, "final").exists():
            lr = speedup.Trials(rows, recipe).best_rate("adamw")
            due = [speedup.Trial("adamw", recipe.num_steps, lr, STAGE_SEED)]
        for t in due:
            yield Unit(entry.name, "trial", t.optimizer, t.lr, t.seed, num_steps=t.num_steps)


def _partitions(entry: ModelEntry, stage: str) -> list[str]:
    """Return the partitions whose spectra are taken at a stage."""
    return [entry.partition, *(["full"] if stage in entry.full_stages else [])]


def _missing_runs(
    entry: ModelEntry, optimizer: str, rows: pd.DataFrame, out: Path
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
            done = _stage_rates(entry, out) <= {best} and all(
                _stage_path(entry, out, stage).exists()
                or _has_spectrum(entry, out, stage, partition)
                for stage in entry.stages
                for partition in _partitions(entry, stage)
                if stage != "init"
            )
        if not done:
            yield Unit(entry.name, "train", optimizer, best or 0.0, seed, ready=best is not None)


def _stage_rates(entry: ModelEntry, out: Path) -> set[float]:
    """Return the learning rates of the run that the stages were last taken from, at most one."""
    rows = rows_of(out, "stages", entry.name)
    return set(rows.loc[(rows["optimizer"] == "adamw") & (rows["seed"] == STAGE_SEED), "lr"])


def _diverged(entry: ModelEntry, rows: pd.DataFrame) -> bool:
    """Tell whether the run whose stages are kept diverged."""
    best = grid.best(rows, "adamw", entry.recipe)
    run = rows[(rows["optimizer"] == "adamw") & (rows["seed"] == STAGE_SEED)]
    return bool(run.loc[run["lr"] == best, "diverged"].any())


def _stage_path(entry: ModelEntry, out: Path, stage: str) -> Path:
    return checkpoint_path(out / "checkpoints", entry.name, STAGE_SEED, stage)


def _has_moments(entry: ModelEntry, out: Path) -> bool:
    """Tell whether the metrics that are taken on a larger batch are of that batch."""
    rows = rows_of(out, "heterogeneity", entry.name)
    rows = rows[(rows["stage"] == "init") & (rows["init_seed"] == STAGE_SEED)]
    rows = rows[rows["metric"] == that_need(MOMENTS)[0]]
    return bool((rows["batch_size"] == entry.moments_batch_size).any())


def _has_spectrum(entry: ModelEntry, out: Path, stage: str, partition: str) -> bool:
    """Tell whether a spectrum is complete: derived tables are written last, `full` is one block."""
    rows = rows_of(out, "spectra", entry.name)
    wanted = {"stage": stage, "partition": partition, "init_seed": STAGE_SEED}
    wanted |= {"batch_size": entry.hessian_batch_size}  # failed rows may be of another
    standard = settings_of(entry, partition, None)
    wanted |= {c: getattr(standard, c) for c in ("dtype", "norm_mode", "probe_distribution")}
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    if not len(rows) or not rows["status"].isin(["ok", "zero"]).all():
        return False
    sampled = rows[(rows["method"] == "slq") & (rows["status"] == "ok")]
    asked = (sampled["num_steps"] == entry.num_steps) | sampled["breakdown"]
    enough = sampled.groupby("block")["probe"].count() >= entry.num_probes
    if not (asked.all() and enough.all()):
        return False
    if partition == "full":
        return True
    # A single block has nothing to be compared with.
    compared = len(set(rows.loc[rows["status"] == "ok", "block"])) > 1
    derived = rows_of(out, "heterogeneity" if compared else "blocks", entry.name)
    # Other seeds, partitions and cheap metrics say nothing of whether all blocks are there.
    here = (derived["stage"] == stage) & (derived["init_seed"] == STAGE_SEED)
    if compared:
        here &= (derived["partition"] == partition) & (derived["metric"] == "js0")
    else:
        here &= derived["trace"].notna()
    return bool(here.any())


def settings_of(entry: ModelEntry, partition: str, device: str | None) -> Settings:
    """Return an entry's own settings of a spectrum."""
    return Settings(
        partition=partition,
        num_probes=entry.num_probes,
        num_steps=entry.num_steps,
        device=device,
    )
