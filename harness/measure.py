"""One metric of a registry entry at a stage, as cheaply as it can be had or to a tolerance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from harness.errors import UserError
from harness.spectra import (
    Settings,
    blocks_of,
    describe_run,
    facts_of,
    identity_of,
    options_of,
    rows_of,
    stored_rows,
    write_derived,
)
from spectra_db import store
from spectra_db.heterogeneity import MOMENT_METRICS, SPECTRUM_METRICS, gradient_rms_spread

if TYPE_CHECKING:
    from harness.estimator.adaptive import Reached
    from harness.training import Problem
    from spectra_db.jackknife import Estimate

GRADIENT_METRIC = "gradient_rms_spread"
METRICS = (*SPECTRUM_METRICS, GRADIENT_METRIC)
# What says enough for a spectrum too short for other metrics.
_CHEAP = (*MOMENT_METRICS, "lambda_max_spread")


def take_metric(
    problem: Problem,
    settings: Settings,
    out: Path,
    metric: str,
    *,
    tolerance: float | None,
    max_probes: int | None = None,
    max_steps: int | None = None,
    command: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> Reached:
    """Take as much of a problem's spectrum as a metric needs, and write it.

    What the store holds of the same spectrum is used and added to, never cut. The rows of each
    round are written when it ends, `blocks` and `heterogeneity` at the end: of a spectrum that
    was taken for a scale metric only the scale metrics.

    Args:
        problem: The model at a stage, and its batch.
        settings: How products are taken; the numbers of probes and steps are those of a whole
            spectrum: with fewer steps a scale metric is written alone.
        out: Folder of the tables.
        metric: One of SPECTRUM_METRICS.
        tolerance: As `estimate_to_tolerance`.
        max_probes: As `estimate_to_tolerance`.
        max_steps: As `estimate_to_tolerance`.
        command: The command line, for table `runs`.
        on_progress: Called with (products done, products in all) of each round.

    Raises:
        UserError: As `estimate_to_tolerance`, or the partition has one block.
    """
    from harness.estimator.adaptive import estimate_to_tolerance

    blocks = blocks_of(problem, settings.partition)
    if len(blocks) < 2:
        raise UserError(
            f"{metric} compares blocks, and partition {settings.partition} of "
            f"{problem.entry.name!r} has one; choose another partition"
        )
    identity = identity_of(problem, settings)
    asked = {"metric": metric, "tolerance": tolerance}
    run = describe_run(identity | asked, settings, problem.init_seed, command)

    def write_round(reached: Reached) -> None:
        store.write(out, "runs", [run])
        store.write(out, "spectra", reached.rows)

    reached = estimate_to_tolerance(
        problem.model,
        problem.loss_fn,
        problem.batches,
        metric=metric,
        tolerance=tolerance,
        blocks=blocks,
        max_probes=max_probes,
        max_steps=max_steps,
        known=_known(out, settings, problem),
        identity=identity | facts_of(problem, run),
        on_round=write_round,
        on_progress=on_progress,
        **options_of(problem, settings),
    )
    few_steps = metric in _CHEAP and reached.num_steps < settings.num_steps
    write_derived(problem, settings, out, blocks, reached.rows, names=_CHEAP if few_steps else None)
    return reached


def take_gradient_metric(problem: Problem, settings: Settings, out: Path) -> Estimate:
    """Take the spread of the blocks' gradients from one gradient, and write it.

    Rows of table `blocks` with the sizes alone are written where there are none yet.

    Args:
        problem: The model at a stage, and its batch.
        settings: As `take_metric`.
        out: Folder of the tables.
    """
    from harness.estimator.summary import block_sizes

    blocks = blocks_of(problem, settings.partition)
    sizes = block_sizes(
        problem.model,
        problem.loss_fn,
        problem.batches,
        blocks,
        batch_weights=options_of(problem, settings)["batch_weights"],
    )
    try:
        estimate = gradient_rms_spread(pd.DataFrame(sizes), [block.name for block in blocks])
    except ValueError as error:
        raise UserError(
            f"{problem.entry.name!r}, partition {settings.partition}: {error}"
        ) from error
    keys = ("model", "stage", "init_seed", "train_run", "protocol_version")
    shared = {key: value for key, value in identity_of(problem, settings).items() if key in keys}
    if settings.partition == "full" or not settings.is_protocol:
        return estimate
    known = rows_of(out, "blocks", problem.entry.name)
    for column, value in shared.items() if len(known) else ():
        known = known[known[column] == value]
    present = set(known["block"]) if len(known) else set()
    new = [shared | size for size in sizes if size["block"] not in present]
    if new:
        store.write(out, "blocks", new)
    row = shared | {"partition": settings.partition, "metric": GRADIENT_METRIC, "scale": "none"}
    row |= {"sigma": 0.0, "value": estimate.value, "corrected": estimate.corrected}
    row |= {"standard_error": 0.0, "truncation_error": 0.0, "batch_error": None}
    row |= {"num_blocks": estimate.num_blocks, "num_zero_blocks": 0, "num_products": 0}
    store.write(out, "heterogeneity", [row])
    return estimate


def _known(out: Path, settings: Settings, problem: Problem) -> pd.DataFrame | None:
    """Return the rows in the store that are of this spectrum and its settings."""
    rows = stored_rows(out, identity_of(problem, settings))
    same = rows["status"].isin(["ok", "zero"])
    same &= rows["reorthogonalized"] == settings.reorthogonalize
    same &= rows["matmul_precision"] == settings.matmul_precision
    same &= rows["block"].isin([block.name for block in blocks_of(problem, settings.partition)])
    return rows[same] if same.any() else None
