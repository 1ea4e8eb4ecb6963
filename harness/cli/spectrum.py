"""The command `spectrum`: one spectrum, of an entry or of a model without one."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.base import LateChoice, choice, device_of, main, options, processes
from harness.errors import UserError
from harness.estimator.settings import CHOICES
from spectra_db.words import STAGES, listed

if TYPE_CHECKING:
    from harness.estimator.settings import Settings
    from harness.records.ledger import Ledger
    from harness.training import Problem


def _metrics() -> list[str]:
    from spectra_db.heterogeneity import METRICS

    return list(METRICS)


@main.command()
@click.argument("model")
@click.option(
    "--from",
    "source",
    metavar="SOURCE",
    help="A model without an entry, as `add-model` takes it: timm:NAME, transformers:TYPE, ...",
)
@click.option("--task", help="Data and loss of --from, as `add-model` takes them.")
@click.option(
    "--weights",
    metavar="FILE|OWNER/NAME",
    help="Weights of --from: .safetensors, a saved state_dict, or a model on the Hub.",
)
@click.option("--stage", default="init", show_default=True, help=f"{listed(STAGES)}.")
@click.option("--metric", type=LateChoice(_metrics), default="js0", show_default=True)
@click.option("--tol", type=float, help="Relative error to reach, such as 0.02.")
@click.option("--num-probes", type=click.IntRange(1), help="Per block; with --tol at most.")
@click.option("--num-steps", type=click.IntRange(1), help="Per probe; with --tol at most.")
@choice("operator", *CHOICES["operator"])
@choice("product", *CHOICES["product"])
@choice("dtype", *CHOICES["dtype"])
@choice("norm-mode", *CHOICES["norm_mode"])
@choice("probe-distribution", *CHOICES["probe_distribution"])
@choice("matmul-precision", *CHOICES["matmul_precision"])
@click.option("--reorthogonalize", is_flag=True, help="Full reorthogonalisation.")
@click.option(
    "--gram/--no-gram",
    default=None,
    help="Exact spectra where outputs are locally linear, and of ggn. Default: of whole spectra, "
    "where a sample has at most 100 outputs.",
)
@click.option("--memory-budget", type=float, help="GiB for graphs and vectors.")
@click.option("--batch-error", is_flag=True, help="Also take each half of the batch.")
@click.option(
    "--share",
    type=click.Choice(["auto", "probes", "samples"]),
    default="auto",
    show_default=True,
    help="What processes of torchrun share.",
)
@options("partition", "registry", "data_root", "out", "seed", "device", "log")
def spectrum(
    model: str,
    source: str | None,
    task: str | None,
    weights: str | None,
    stage: str,
    metric: str,
    tol: float | None,
    num_probes: int | None,
    num_steps: int | None,
    memory_budget: float | None,
    batch_error: bool,
    share: str,
    gram: bool | None,
    partition: str | None,
    registry: Path | None,
    data_root: Path | None,
    out: Path,
    seed: int,
    device: str | None,
    log: Path | None,
    **settings: Any,
) -> None:
    """Take the spectrum of a model at a stage and write it to the tables.

    As many probes and steps as the entry says, unless given; what --out holds already with as many
    or more is kept. --tol 0.02 takes what it needs for the metric's standard error and what more
    steps may change to be at most 2 % of it. The scale metrics
    (lambda_rms_spread, trace_spread, lambda_max_spread) take about ten products a block, or as many
    as it has parameters, which makes it exact, if it has at most 1,000; gradient_rms_spread takes
    one gradient. --batch-error takes each half of the batch as well, at the whole's cost again, and
    stores how far apart the metrics are.

    With --from SOURCE --task TASK the model needs no entry, and MODEL is what its rows are called:
    harness spectrum mine --from timm:resnet18 --task cifar10 --weights mine.safetensors --out OUT

    Started by torchrun, its processes share the work, one per device:
    torchrun --nproc-per-node=8 -m harness spectrum MODEL --out OUT
    """
    from harness.campaign.claims import claim_or_refuse
    from harness.campaign.plan import settings_of
    from harness.campaign.unit import Unit
    from harness.estimator.device import choose_device
    from harness.records import version
    from harness.records.ledger import Ledger
    from harness.records.provenance import describe_model
    from harness.registry import get
    from harness.training import load_problem
    from spectra_db.heterogeneity import WHOLE, that_need

    ledger = Ledger(out)
    if (source is None) != (task is None) or (weights is not None and source is None):
        raise UserError("--from SOURCE goes with --task TASK, and --weights with both")
    if source is not None and stage != "init":
        raise UserError(f"--stage is {stage}; a model without an entry is taken as it is")
    if tol is not None and not 0 < tol < 1:
        raise UserError(f"--tol is {tol}; it must be between 0 and 1, for example 0.02")
    if memory_budget is not None and not 0 < memory_budget < float("inf"):
        raise UserError(f"--memory-budget is {memory_budget}; it must be positive, in GiB")
    if source is None or task is None:
        entry = get(model, registry_dir=registry)
        version.check(entry, ledger)
        problem = load_problem(
            entry,
            stage,
            seed,
            data_root=data_root,
            checkpoint_dir=ledger.checkpoints,
            sha256=ledger.checkpoint_sha256(entry.name, stage, seed),
        )
    else:
        from harness.submission.outside import outside_problem

        problem = outside_problem(
            model, source, task, weights=weights, seed=seed, folder=registry, data_root=data_root
        )
        entry = problem.entry
        version.check(entry, ledger)
    own = settings_of(entry, partition)
    chosen = replace(
        own,
        num_probes=num_probes or own.num_probes,
        num_steps=num_steps or own.num_steps,
        device=device_of(device),
        memory_budget=None if memory_budget is None else int(memory_budget * 2**30),
        **settings,
    )
    choose_device(problem.model, chosen.device)
    cheaply = tol is not None or metric not in that_need(WHOLE)
    if gram is not None or cheaply or processes() > 1:
        chosen = replace(chosen, gram=bool(gram))
    if processes() > 1 and (cheaply or batch_error or chosen.gram):
        raise UserError("--tol, --batch-error, --gram and the scale metrics run without torchrun")
    if cheaply and batch_error:
        raise UserError("--batch-error goes with whole spectra: leave out --tol, scale metrics")
    of_stage = {"stage": problem.stage, "partition": chosen.partition}
    unit = Unit(entry.name, "spectrum", seed=seed, **of_stage)
    mine = processes() == 1 or os.environ["RANK"] == "0"  # who does what touches files
    with claim_or_refuse(out, unit) if mine else nullcontext():
        if mine and source is not None:
            num_params = sum(p.numel() for p in problem.model.parameters())
            num_blocks = len(problem.blocks(entry.partition))
            ledger.write("models", [describe_model(entry, num_params, num_blocks)])
        if cheaply:
            _take_metric(problem, chosen, ledger, metric, tol, (num_probes, num_steps), log)
        else:
            _take_whole(problem, chosen, ledger, metric, share, log, batch_error=batch_error)


def _take_whole(
    problem: Problem,
    settings: Settings,
    ledger: Ledger,
    metric: str,
    share: str,
    log: Path | None,
    *,
    batch_error: bool,
) -> None:
    """Take a whole spectrum, with all processes that there are, and the halves' if asked."""
    from harness.campaign.metric import halves, take_batch_error
    from harness.campaign.spectrum import take_spectrum
    from harness.cli.display import cost_line, estimate_line
    from harness.cli.progress import progress_bar
    from harness.estimator.distributed import team
    from harness.records.provenance import command_line
    from spectra_db.heterogeneity import is_leading, measure

    parts = halves(problem, settings) if batch_error else None
    name = f"{problem.entry.name} {problem.stage}"
    with team(str(settings.device), share) as together:
        leads, cost = together is None or together.leads, None
        if leads:
            with progress_bar(f"{name}: a product with each block") as on_progress:
                cost = problem.forecast(settings, on_progress)
            click.echo(cost_line(settings.num_probes, settings.num_steps, cost))
        with progress_bar(name, shown=leads, log=log if leads else None) as on_progress:
            rows = take_spectrum(
                problem,
                settings,
                ledger,
                command=command_line(),
                on_progress=on_progress,
                together=together,
                cost=cost,
            )
    if not leads:
        return
    click.echo(f"{len(rows)} rows of {rows['block'].nunique()} blocks in {ledger.folder}")
    if rows.loc[rows["status"] == "ok", "block"].nunique() > 1:
        click.echo(estimate_line(metric, *measure(rows, metric)))
    if parts is not None:
        with progress_bar(f"{name}, halves of the batch", log=log) as on_progress:
            found = take_batch_error(
                parts, settings, ledger, command=command_line(), on_progress=on_progress
            )
        apart = found.loc[(found["metric"] == metric) & is_leading(found), "batch_error"].item()
        click.echo(f"{metric} of the batch's halves: {apart:.4f} apart")


def _take_metric(
    problem: Problem,
    settings: Settings,
    ledger: Ledger,
    metric: str,
    tol: float | None,
    most: tuple[int | None, int | None],
    log: Path | None,
) -> None:
    """Take one metric, to a tolerance if there is one, and say what was reached."""
    from harness.campaign.metric import GRADIENT_METRIC, take_gradient_metric, take_metric
    from harness.cli.display import estimate_line
    from harness.cli.progress import progress_bar
    from harness.records.provenance import command_line
    from spectra_db.jackknife import MIN_PROBES

    if metric == GRADIENT_METRIC:
        click.echo(estimate_line(metric, take_gradient_metric(problem, settings, ledger), 0.0))
        return
    if most[0] is not None and most[0] < MIN_PROBES:
        raise UserError(f"--num-probes is {most[0]}; an error needs at least {MIN_PROBES} probes")
    with progress_bar(f"{problem.entry.name} {problem.stage}", log=log) as on_progress:
        reached = take_metric(
            problem,
            settings,
            ledger,
            metric,
            tolerance=tol,
            most=most,
            command=command_line(),
            on_progress=on_progress,
        )
    numbers = f"{reached.num_probes} probes × {reached.num_steps} steps"
    click.echo(
        f"{len(reached.rows)} rows of {reached.rows['block'].nunique()} blocks in {ledger.folder}"
    )
    click.echo(f"{estimate_line(metric, reached.estimate, reached.truncation_error)} at {numbers}")
    if not reached.is_within:
        options = {"--num-steps": reached.needs_steps, "--num-probes": reached.needs_probes}
        more = " and ".join(name for name, needed in options.items() if needed)
        raise click.ClickException(
            f"the relative error of {metric} is still above {tol:g}; what was reached is kept: "
            f"raise {more}"
        )
