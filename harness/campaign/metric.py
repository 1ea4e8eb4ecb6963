"""A metric of a registry entry at a stage: cheaply, to a tolerance, or with its batch's error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from harness import tasks
from harness.campaign.spectrum import (
    Settings,
    blocks_of,
    describe_run,
    facts_of,
    identity_of,
    options_of,
    rows_of,
    stored_rows,
    take_spectrum,
    write_derived,
)
from harness.errors import UserError
from harness.estimator.cost import EXACT_SIZE
from harness.records import version
from spectra_db import store
from spectra_db.heterogeneity import EXTREMES, GRADIENT, METRICS, MOMENTS, that_need
from spectra_db.schema import KEYS, VERSIONS

if TYPE_CHECKING:
    from harness.estimator.adaptive import Reached
    from harness.training import Problem
    from spectra_db.jackknife import Estimate

[GRADIENT_METRIC] = that_need(GRADIENT)
# What says enough for a spectrum too short for other metrics.
_CHEAP = that_need(MOMENTS, EXTREMES)


def take_metric(
    problem: Problem,
    settings: Settings,
    out: Path,
    metric: str,
    *,
    tolerance: float | None,
    max_probes: int | None = None,
    max_steps: int | None = None,
    exact_size: int = EXACT_SIZE,
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
        metric: One that needs products.
        tolerance: As `estimate_to_tolerance`.
        max_probes: As `estimate_to_tolerance`.
        max_steps: As `estimate_to_tolerance`.
        exact_size: As `estimate_spectra`.
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
        version.note(problem.entry, out)
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
        exact_size=exact_size,
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
        device=settings.device,
        memory_budget=settings.memory_budget,
    )
    try:
        estimate = METRICS[GRADIENT_METRIC].estimate(
            pd.DataFrame(sizes), [block.name for block in blocks]
        )
    except ValueError as error:
        raise UserError(
            f"{problem.entry.name!r}, partition {settings.partition}: {error}"
        ) from error
    keys = ("model", "stage", "init_seed", "train_run", "protocol_version")
    shared = {key: value for key, value in identity_of(problem, settings).items() if key in keys}
    if settings.partition == "full" or not settings.is_protocol:
        return estimate
    known = rows_of(out, "blocks", problem.entry.name)
    for column, value in shared.items():
        known = known[known[column] == value]
    present = set(known["block"])
    new = [shared | size for size in sizes if size["block"] not in present]
    if new:
        store.write(out, "blocks", new)
    row = shared | {"protocol_version": VERSIONS["heterogeneity"], "partition": settings.partition}
    row |= {"metric": GRADIENT_METRIC, "scale": "none"}
    row |= {"sigma": 0.0, "value": estimate.value, "corrected": estimate.corrected}
    row |= {"standard_error": 0.0, "truncation_error": 0.0, "batch_error": None}
    row |= {"num_blocks": estimate.num_blocks, "num_zero_blocks": 0, "num_products": 0}
    row["batch_size"] = problem.batch_size
    store.write(out, "heterogeneity", [row])
    return estimate


def take_moments(
    problem: Problem,
    settings: Settings,
    out: Path,
    *,
    command: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Take the spreads of moments and of gradients on a batch larger than the spectrum's.

    They need one product a probe, and one gradient; blocks that would take more products to be
    exact than to be sampled are sampled. The rules are kept in OUT/larger_batch, apart
    from the spectrum; the metrics replace those of the spectrum's batch, and say their own.

    Args:
        problem: The model at a stage, and the larger batch.
        settings: As `take_metric`; as many probes as a spectrum's.
        out: Folder of the tables.
        command: The command line, for table `runs`.
        on_progress: Called with (products done, products in all).

    Returns:
        The rows of `heterogeneity`.
    """
    folder = out / "larger_batch"
    take_metric(
        problem,
        settings,
        folder,
        that_need(MOMENTS)[0],
        tolerance=None,
        max_probes=settings.num_probes,
        exact_size=settings.num_probes,
        command=command,
        on_progress=on_progress,
    )
    rows = rows_of(folder, "heterogeneity", problem.entry.name)
    rows = rows[rows["metric"].isin(that_need(MOMENTS, GRADIENT))]
    here = (rows["stage"] == problem.stage) & (rows["init_seed"] == problem.init_seed)
    rows = rows[here & (rows["partition"] == settings.partition)]
    store.write(out, "heterogeneity", rows)
    return rows


def halves(problem: Problem, settings: Settings) -> tuple[Problem, Problem]:
    """Return the problem on the first and on the second half of its batch.

    Raises:
        UserError: Metrics of the halves would say nothing of those in the store: another stage
            than init, settings other than the protocol's, fewer than two blocks, or one sample.
    """
    name, size = problem.entry.name, problem.batch_size
    if problem.stage != "init" or not settings.is_protocol or settings.partition == "full":
        raise UserError(
            "the batch error is one of metrics at init with the protocol's settings; leave out "
            "--stage, --partition full, and options that change the arithmetic"
        )
    if len(blocks_of(problem, settings.partition)) < 2:
        raise UserError(f"{name!r} has one block, so that no metric compares blocks")
    if size < 2:
        raise UserError(f"the batch of {name!r} has one sample, and no halves")
    whole = tuple(torch.cat(tensors) for tensors in zip(*problem.batches, strict=True))
    task = tasks.get(problem.entry.task, **problem.entry.task_options)

    def part(start: int, stop: int) -> Problem:
        microbatch_size = min(problem.microbatch_size, stop - start)
        batches = tasks.split(tuple(t[start:stop] for t in whole), microbatch_size)
        weights = [task.num_terms(batch) for batch in batches]
        return replace(
            problem,
            batches=batches,
            batch_weights=weights,
            batch_size=stop - start,
            microbatch_size=microbatch_size,
            num_terms=sum(weights),
        )

    return part(0, size // 2), part(size // 2, size)


def take_batch_error(
    parts: tuple[Problem, Problem],
    settings: Settings,
    out: Path,
    *,
    command: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Take the spectra of both halves of a batch, and write by how much their metrics differ.

    The halves' tables are kept in OUT/halves/first and second, apart from the spectrum of the
    whole batch, which is in the store already; what is there is not taken again.

    Args:
        parts: From `halves`.
        settings: How the whole's spectrum was taken.
        out: Folder of the tables.
        command: The command line, for table `runs`.
        on_progress: Called with (products done, products in all) of each half.

    Returns:
        The rows of `heterogeneity` with their `batch_error`.
    """
    keys = list(KEYS["heterogeneity"])
    found = []
    for name, part in zip(("first", "second"), parts, strict=True):
        folder = out / "halves" / name
        take_spectrum(part, settings, folder, command=command, on_progress=on_progress)
        found.append(rows_of(folder, "heterogeneity", part.entry.name).set_index(keys))
    first, second = (rows["corrected"].fillna(rows["value"]) for rows in found)
    difference = (first - second).abs().rename("batch_error").reset_index()
    whole = rows_of(out, "heterogeneity", parts[0].entry.name).drop(columns="batch_error")
    # Metrics on a larger batch say nothing of these halves.
    whole = whole[whole["batch_size"] == sum(part.batch_size for part in parts)]
    rows = whole.merge(difference, on=keys)
    store.write(out, "heterogeneity", rows)
    return rows


def _known(out: Path, settings: Settings, problem: Problem) -> pd.DataFrame | None:
    """Return the rows in the store that are of this spectrum and its settings."""
    rows = stored_rows(out, identity_of(problem, settings))
    same = rows["status"].isin(["ok", "zero"])
    same &= rows["reorthogonalized"] == settings.reorthogonalize
    same &= rows["matmul_precision"] == settings.matmul_precision
    same &= rows["block"].isin([block.name for block in blocks_of(problem, settings.partition)])
    return rows[same] if same.any() else None
