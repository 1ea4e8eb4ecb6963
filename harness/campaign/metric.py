"""A metric of a registry entry at a stage: cheaply, to a tolerance, or with its batch's error."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from harness import tasks
from harness.campaign.spectrum import source_of, stored_rows, take_spectrum, write_derived
from harness.errors import UserError
from harness.estimator.adaptive import Reached, beside_recurrences, estimate_to_tolerance, limits
from harness.estimator.device import choose_device
from harness.estimator.settings import Settings
from harness.estimator.spectrum import OnProgress
from harness.estimator.summary import block_sizes
from harness.records import version
from harness.records.ledger import Ledger
from harness.records.provenance import describe_run
from harness.training import Problem
from spectra_db.heterogeneity import EXTREMES, GRADIENT, METRICS, MOMENTS, that_need
from spectra_db.jackknife import Estimate
from spectra_db.schema import KEYS, VERSIONS
from spectra_db.words import WITH_RULE

[GRADIENT_METRIC] = that_need(GRADIENT)
# What says enough for a spectrum too short for other metrics.
_CHEAP = that_need(MOMENTS, EXTREMES)


def take_metric(
    problem: Problem,
    settings: Settings,
    ledger: Ledger,
    metric: str,
    *,
    tolerance: float | None,
    most: tuple[int | None, int | None] = (None, None),
    command: str,
    on_progress: OnProgress | None = None,
) -> Reached:
    """Take as much of a problem's spectrum as a metric needs, and write it.

    What the folder holds of the same spectrum is used and added to, never cut. The rows of each
    round are written when it ends, `blocks` and `heterogeneity` at the end: of a spectrum that
    was taken for a scale metric only the scale metrics.

    Args:
        problem: The model at a stage, and its batch.
        settings: How products are taken; the numbers of probes and steps are those of a whole
            spectrum: with fewer steps a scale metric is written alone.
        ledger: Where to.
        metric: One that needs products.
        tolerance: As `estimate_to_tolerance`.
        most: Most probes and steps, as `adaptive.limits` takes them.
        command: The command line, for table `runs`.
        on_progress: Called with (products done, products in all) of each round.

    Raises:
        UserError: As `estimate_to_tolerance`, or the partition has one block.
    """
    if len(problem.blocks(settings.partition)) < 2:
        raise UserError(
            f"{metric} compares blocks, and partition {settings.partition} of "
            f"{problem.entry.name!r} has one; choose another partition"
        )
    source = source_of(problem)
    asked = {"metric": metric, "tolerance": tolerance}
    run = describe_run(source | settings.key | asked, settings, command)

    def write_round(reached: Reached) -> None:
        version.note(problem.entry, ledger)
        ledger.write("runs", [run])
        ledger.write("spectra", reached.rows)

    num_probes, num_steps = limits(metric, tolerance, *most)
    device = choose_device(problem.model, settings.device)
    beside = beside_recurrences(settings, device)
    with problem.hessian(beside) as hessian:
        reached = estimate_to_tolerance(
            hessian,
            replace(beside, num_probes=num_probes, num_steps=num_steps),
            source | {"run_id": run["run_id"]},
            metric=metric,
            tolerance=tolerance,
            known=_known(problem, settings, ledger),
            on_round=write_round,
            on_progress=on_progress,
        )
        if settings.derives:
            # Blocks have the steps that they needed: one of few is too short for other metrics.
            long = replace(settings, num_probes=1).complete(reached.rows)
            few_steps = metric in _CHEAP and not long >= set(reached.rows["block"])
            names = _CHEAP if few_steps else None
            write_derived(problem, ledger, hessian, reached.rows, names=names)
    return reached


def take_gradient_metric(problem: Problem, settings: Settings, ledger: Ledger) -> Estimate:
    """Take the spread of the blocks' gradients from one gradient, and write it.

    Rows of table `blocks` with the sizes alone are written where there are none yet.

    Args:
        problem: The model at a stage, and its batch.
        settings: As `take_metric`.
        ledger: Where to.
    """
    name = problem.entry.name
    # A gradient is one at whatever settings: in the protocol's arithmetic.
    plain = Settings(
        settings.partition, device=settings.device, memory_budget=settings.memory_budget
    )
    with problem.hessian(plain) as hessian:
        sizes = block_sizes(hessian)
    try:
        gradients = pd.DataFrame(sizes), [size["block"] for size in sizes]
        estimate = METRICS[GRADIENT_METRIC].estimate(*gradients)
    except ValueError as error:
        raise UserError(f"{name!r}, partition {settings.partition}: {error}") from error
    if not settings.derives:
        return estimate
    shared = {key: value for key, value in source_of(problem).items() if key in KEYS["blocks"]}
    present = set(ledger.rows("blocks", **shared)["block"])
    if new := [shared | size for size in sizes if size["block"] not in present]:
        ledger.write("blocks", new)
    row = shared | {"protocol_version": VERSIONS["heterogeneity"], "partition": settings.partition}
    row |= {"metric": GRADIENT_METRIC, "scale": "none"}
    row |= {"sigma": 0.0, "value": estimate.value, "corrected": estimate.corrected}
    row |= {"standard_error": 0.0, "truncation_error": 0.0, "batch_error": None}
    row |= {"num_blocks": estimate.num_blocks, "num_zero_blocks": 0, "num_products": 0}
    ledger.write("heterogeneity", [row | {"batch_size": problem.batch_size}])
    return estimate


def take_moments(
    problem: Problem,
    settings: Settings,
    ledger: Ledger,
    *,
    command: str,
    on_progress: OnProgress | None = None,
) -> pd.DataFrame:
    """Take the spreads of moments and of gradients on a batch larger than the spectrum's.

    They need one product a probe, and one gradient; blocks that would take more products to be
    exact than to be sampled are sampled. Their batch error takes as many products with each half.
    The rules are kept in `ledger.larger`, apart from the spectrum; the metrics replace those of
    the spectrum's batch, and say their own.

    Args:
        problem: The model at init, and the larger batch.
        settings: As `take_metric`; as many probes as a spectrum's.
        ledger: Where to.
        command: The command line, for table `runs`.
        on_progress: Called with (products done, products in all) of the batch, then of each half.

    Returns:
        The rows of `heterogeneity`.
    """
    few = replace(settings, exact_size=settings.num_probes, gram=False)
    larger, found = ledger.larger, []
    parts = (problem, *halves(problem, few))
    for part, folder in zip(parts, (larger, *larger.halves), strict=True):
        take_metric(
            part,
            few,
            folder,
            that_need(MOMENTS)[0],
            tolerance=None,
            most=(settings.num_probes, None),
            command=command,
            on_progress=on_progress,
        )
        rows = folder.rows("heterogeneity", problem.entry.name, **_place(problem, settings))
        found.append(rows[rows["metric"].isin(that_need(MOMENTS, GRADIENT))])
    rows = _with_batch_error(*found)
    ledger.write("heterogeneity", rows)
    return rows


def halves(problem: Problem, settings: Settings) -> tuple[Problem, Problem]:
    """Return the problem on the first and on the second half of its batch.

    Raises:
        UserError: Metrics of the halves would say nothing of those in the store: another stage
            than init, settings other than the protocol's, fewer than two blocks, or one sample.
    """
    name, size = problem.entry.name, problem.batch_size
    if problem.stage != "init" or not settings.derives:
        raise UserError(
            "the batch error is one of metrics at init with the protocol's settings; leave out "
            "--stage, --partition full, and options that change the arithmetic"
        )
    if len(problem.blocks(settings.partition)) < 2:
        raise UserError(f"{name!r} has one block, so that no metric compares blocks")
    if size < 2:
        raise UserError(f"the batch of {name!r} has one sample, and no halves")
    whole = problem.whole

    def part(start: int, stop: int) -> Problem:
        some = tuple(t[start:stop] for t in whole)
        return problem.on(tasks.split(some, min(problem.microbatch_size, stop - start)))

    return part(0, size // 2), part(size // 2, size)


def take_batch_error(
    parts: tuple[Problem, Problem],
    settings: Settings,
    ledger: Ledger,
    *,
    command: str,
    on_progress: OnProgress = lambda done, total: None,
) -> pd.DataFrame:
    """Take the spectra of both halves of a batch, and write by how much their metrics differ.

    The halves' tables are kept in `ledger.halves`, apart from the spectrum of the whole batch,
    which is in the store already; what is there is not taken again.

    Args:
        parts: From `halves`.
        settings: How the whole's spectrum was taken.
        ledger: Where to.
        command: The command line, for table `runs`.
        on_progress: Called with (products done, products in all) of each half.

    Returns:
        The rows of `heterogeneity` with their `batch_error`.
    """
    found = []
    for half, part in zip(ledger.halves, parts, strict=True):
        take_spectrum(part, settings, half, command=command, on_progress=on_progress)
        found.append(half.rows("heterogeneity", part.entry.name))
    # Metrics on a larger batch say nothing of these halves; the folders hold other seeds too.
    here = _place(parts[0], settings) | {"batch_size": sum(part.batch_size for part in parts)}
    whole = ledger.rows("heterogeneity", parts[0].entry.name, **here)
    rows = _with_batch_error(whole, *found)
    ledger.write("heterogeneity", rows)
    return rows


def _with_batch_error(
    whole: pd.DataFrame, first: pd.DataFrame, second: pd.DataFrame
) -> pd.DataFrame:
    """Return the rows of `heterogeneity` of a batch with how far those of its halves are apart."""
    keys = list(KEYS["heterogeneity"])
    one, other = (rows.set_index(keys) for rows in (first, second))
    moved = one["corrected"].fillna(one["value"]) - other["corrected"].fillna(other["value"])
    error = moved.abs().rename("batch_error").reset_index()
    return whole.drop(columns="batch_error").merge(error, on=keys)


def _place(problem: Problem, settings: Settings) -> dict[str, object]:
    """Return what tells a problem's rows of table `heterogeneity` from a model's others."""
    return {
        "stage": problem.stage,
        "init_seed": problem.init_seed,
        "partition": settings.partition,
    }


def _known(problem: Problem, settings: Settings, ledger: Ledger) -> pd.DataFrame | None:
    """Return the rows in the folder that are of this spectrum and its settings."""
    rows = stored_rows(problem, settings, ledger)
    same = rows["status"].isin(WITH_RULE)
    for column, value in settings.columns.items():
        same &= rows[column] == value
    same &= rows["block"].isin([block.name for block in problem.blocks(settings.partition)])
    return rows[same] if same.any() else None
