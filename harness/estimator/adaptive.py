"""A metric to a tolerance: probes and steps are added until its error is small enough."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from harness.errors import UserError
from harness.estimator.blocks import Block
from harness.estimator.device import memory_share
from harness.estimator.hessian import BlockHessian
from harness.estimator.lanczos import Kept, Recurrence
from harness.estimator.settings import Settings, whole_number
from harness.estimator.spectrum import OnProgress, gathered, rules
from spectra_db.heterogeneity import EXTREMES, METRICS, MOMENTS, WHOLE, measure, settled, that_need
from spectra_db.jackknife import MIN_PROBES, Estimate
from spectra_db.schema import TABLES

# Three times the paper's probes and twice its steps; probes of one product may be more.
MAX_PROBES, MAX_STEPS, MAX_MOMENT_PROBES = 30, 200, 300
# Part of the memory budget for recurrences that wait to go on.
_KEPT_SHARE = 0.25


@dataclass(frozen=True)
class Reached:
    """A metric with its errors, and the spectrum that it was taken from.

    Attributes:
        rows: Rows of table `spectra`.
        estimate: The metric, with its jackknife standard error.
        truncation_error: What more steps may change, by what the last ones did.
        num_probes: Probes per block that were needed.
        num_steps: Steps per probe that were needed, of the blocks that took the most.
        tolerance: What was asked for, relative to the corrected value; None: nothing.
    """

    rows: pd.DataFrame
    estimate: Estimate
    truncation_error: float
    num_probes: int
    num_steps: int
    tolerance: float | None

    @property
    def needs_steps(self) -> bool:
        """Whether more steps are needed to be within the tolerance."""
        return self.tolerance is not None and not self.truncation_error <= self.allowed

    @property
    def needs_probes(self) -> bool:
        """Whether more probes are needed to be within the tolerance."""
        return self.tolerance is not None and not self.estimate.standard_error <= self.allowed

    @property
    def is_within(self) -> bool:
        """Whether both errors are within the tolerance."""
        return not (self.needs_steps or self.needs_probes)

    @property
    def allowed(self) -> float:
        """The largest error that is within the tolerance."""
        return (self.tolerance or 0.0) * abs(self.estimate.corrected)


def limits(
    metric: str, tolerance: float | None, max_probes: int | None, max_steps: int | None
) -> tuple[int, int]:
    """Return the most probes per block and steps per probe that a metric may take.

    Args:
        metric: One of those of a spectrum.
        tolerance: As `estimate_to_tolerance`.
        max_probes: As asked for, at least 3; None: 30, or 300 of one step each.
        max_steps: As asked for; None: 200, or 1 for moments.

    Raises:
        UserError: One is out of range.
    """
    if metric not in (known := that_need(MOMENTS, EXTREMES, WHOLE)):
        raise UserError(f"metric is {metric!r}; choose one of {', '.join(known)}")
    if max_probes is not None:  # an error needs as many
        max_probes = whole_number("max_probes", max_probes, MIN_PROBES)
    if max_steps is not None:
        max_steps = whole_number("max_steps", max_steps, 1)
    moments = METRICS[metric].needs is MOMENTS
    most = MAX_MOMENT_PROBES if moments else MAX_PROBES, 1 if moments else MAX_STEPS
    if tolerance is None:
        most = METRICS[metric].needs
    return max_probes or most[0], max_steps or most[1]


def beside_recurrences(settings: Settings, device: torch.device) -> Settings:
    """Return settings that leave a quarter of the memory to recurrences that wait to go on."""
    budget = settings.memory_budget or memory_share(device)
    return replace(settings, memory_budget=budget - int(_KEPT_SHARE * budget))


def estimate_to_tolerance(
    hessian: BlockHessian,
    settings: Settings,
    source: Mapping[str, Any],
    *,
    metric: str = "js0",
    tolerance: float | None,
    known: pd.DataFrame | None = None,
    on_round: Callable[[Reached], None] | None = None,
    on_progress: OnProgress | None = None,
) -> Reached:
    """Estimate a metric of a model's block spectra until its errors are below a tolerance.

    Steps are added, half as many again, while more of them may change the metric by more than the
    tolerance, to the blocks that are not `settled`; then probes, as the standard error's square
    asks for but at most twice as many at a time, and again. Recurrences go on from where they are,
    as far as their vectors fit the memory that `beside_recurrences` leaves.

    Args:
        hessian: The products.
        settings: How rules are taken, with at most so many probes and steps as `limits` says.
            Without a tolerance these are the numbers themselves.
        source: As `spectrum.rules`.
        metric: One of `spectra_db.heterogeneity.METRICS` that needs products.
        tolerance: Largest standard error and truncation error, relative to the corrected value.
            None: one round.
        known: Rows of the same spectrum that are there already: their products are not repeated
            unless their probes have to go on.
        on_round: Called with what each round reached.
        on_progress: Called with (products done, products in all) of each round.

    Returns:
        What was reached; `is_within` says whether that is the tolerance.

    Raises:
        UserError: The metric is unknown, the tolerance out of range, or there are too few blocks.
    """
    is_number = isinstance(tolerance, numbers.Real)
    if tolerance is not None and not (is_number and 0 < tolerance < 1):
        raise UserError(f"tolerance is {tolerance!r}; it must be between 0 and 1, for example 0.02")
    max_probes, max_steps = settings.num_probes, settings.num_steps
    kept = Kept(int(_KEPT_SHARE / (1 - _KEPT_SHARE) * hessian.memory_budget))
    rows = pd.DataFrame(columns=TABLES["spectra"].names) if known is None else known
    begin = METRICS[metric].needs if tolerance is not None else (max_probes, max_steps)
    num_probes, num_steps = min(begin[0], max_probes), min(begin[1], max_steps)
    steps = {block.name: num_steps for block in hessian.blocks}
    for row in rows.to_dict("records"):
        T = (list(row["alphas"]), list(row["betas"]))
        done = Recurrence(torch.empty(0), None, *T, None, row["breakdown"])
        kept.put((row["block"], row["probe"]), done)
        # The probes of a block belong together: what is there is added to, never cut.
        num_probes = max(num_probes, row["probe"] + 1)
        steps[row["block"]] = max(steps[row["block"]], row["num_steps"])
    while True:
        single = rows[(rows["method"] == "exact") | (rows["status"] == "zero")]
        todo = {b.name: range(num_probes) for b in hessian.blocks}
        todo = {name: probes for name, probes in todo.items() if name not in set(single["block"])}
        if todo:
            now = replace(settings, num_probes=num_probes, num_steps=max(steps.values()))
            parts = rules(
                hessian,
                now,
                {"tolerance": tolerance, **source},
                probes=todo,
                steps=steps,
                kept=kept,
                on_progress=on_progress,
            )
            rows = _joined(single, gathered(parts, hessian.blocks), rows, hessian.blocks)
        try:
            estimate, truncation_error = measure(rows, metric)
        except ValueError as error:  # too few blocks that are not zero
            raise UserError(f"{metric}: {error}") from error
        num_steps = max(steps.values())
        reached = Reached(rows, estimate, truncation_error, num_probes, num_steps, tolerance)
        if on_round is not None:
            on_round(reached)
        ended = rows.groupby("block")["breakdown"].all()  # more steps would change nothing
        shorter = {name for name in todo if steps[name] < max_steps and not ended[name]}
        if reached.needs_steps and shorter:
            # Where all that are left have settled nevertheless, all of them go on.
            unsettled = shorter - settled(rows, metric, reached.allowed)
            for name in unsettled or shorter:
                steps[name] = min(math.ceil(steps[name] * 1.5), max_steps)
        elif reached.needs_probes and not reached.needs_steps and num_probes < max_probes:
            excess = math.inf
            if reached.allowed:
                excess = reached.estimate.standard_error / reached.allowed
            wanted = num_probes * min(excess, 2.0) ** 2
            num_probes = min(max(math.ceil(wanted), num_probes + 1), 2 * num_probes, max_probes)
        else:
            return reached


def _joined(
    single: pd.DataFrame, fresh: pd.DataFrame, before: pd.DataFrame, blocks: Sequence[Block]
) -> pd.DataFrame:
    """Put the rows of a round together, each with the time of all rounds."""
    key = ["block", "probe"]
    order = {block.name: i for i, block in enumerate(blocks)}
    if len(before):
        times = before.set_index(key)["seconds"]
        mine = pd.MultiIndex.from_frame(fresh[key])
        fresh = fresh.assign(seconds=fresh["seconds"] + times.reindex(mine, fill_value=0).values)
    rows = pd.concat([single, fresh], ignore_index=True) if len(single) else fresh
    by = lambda c: c.map(order) if c.name == "block" else c  # noqa: E731
    return rows.sort_values(key, key=by, ignore_index=True)
