"""What whole entries take when nothing is done yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.campaign.plan import partitions_of, settings_of
from harness.errors import UserError, reason_of
from harness.registry import ModelEntry
from harness.training.gap import SEEDS
from harness.training.stages import STAGE_SEED

if TYPE_CHECKING:
    from harness.estimator.cost import Forecast

# Of an entry, for the forecast: two climbs, the seeds, and 2T and 4T for half of the entries.
TYPICAL_TRIALS, TYPICAL_LENGTH = 40, 50


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
    from harness.training import load_problem

    # The pretraining's weights change no cost, and may not be there yet.
    fresh = replace(entry, pretrained=None)
    problem = load_problem(fresh, "init", STAGE_SEED, data_root=data_root)
    counts = Counter(
        partition for stage in entry.stages for partition in partitions_of(entry, stage)
    )
    costs = {p: problem.forecast(settings_of(entry, p)) for p in counts}
    if entry.moments_batch_size is not None:
        larger = load_problem(
            fresh, "init", STAGE_SEED, data_root=data_root, batch_size=entry.moments_batch_size
        )
        few = replace(settings_of(entry), num_steps=1, exact_size=entry.num_probes, gram=False)
        cost = larger.forecast(few)
        # Halves take as many products each, of half the samples.
        costs["moments"] = replace(cost, num_products=3 * cost.num_products, flops=2 * cost.flops)
        counts["moments"] = 1
    per_sample = costs[entry.partition].pass_flops / problem.batch_size
    runs, samples = runs_of(entry)
    training = per_sample * samples
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
        run_flops=training / runs if entry.grid_recipe else 0.0,
        step_flops=per_sample * entry.speedup.batch_size if entry.speedup else 0.0,
    )


def runs_of(entry: ModelEntry) -> tuple[int, float]:
    """Return how many runs an entry trains if none is done yet, and the samples that all see.

    Of a sample seen a pass forward and backward; forward alone is a third of it.
    """
    if entry.speedup is not None:
        steps = entry.speedup.num_steps * TYPICAL_LENGTH
        return TYPICAL_TRIALS, float(steps * entry.speedup.batch_size)
    if (recipe := entry.grid_recipe) is not None:
        runs = 2 * (recipe.num_lrs + len(SEEDS))
        # The fixed subset is seen forward before and after a run.
        return runs, runs * (recipe.num_steps * recipe.batch_size + 2 * recipe.eval_size / 3)
    return 0, 0.0
