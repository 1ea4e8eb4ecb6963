"""Commands that train, that do whole entries, and that measure untrained ones."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from harness.campaign.unit import KINDS
from harness.cli.base import choice, device_of, main, options
from harness.errors import UserError
from spectra_db.words import OPTIMIZERS, TIERS


@main.command()
@click.argument("model")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default="adamw")
@click.option("--lr", type=float, help="Peak learning rate.  [default: best of the grid in --out]")
@options("registry", "data_root", "out", "seed", "device", "log")
def train(
    model: str,
    optimizer: str,
    lr: float | None,
    registry: Path | None,
    data_root: Path | None,
    out: Path,
    seed: int,
    device: str | None,
    log: Path | None,
) -> None:
    """Train a model once; AdamW runs leave their stages under OUT/checkpoints."""
    from harness import tasks
    from harness.campaign.claims import claim_or_refuse
    from harness.campaign.unit import Unit
    from harness.cli.progress import progress_bar
    from harness.records import version
    from harness.records.ledger import Ledger
    from harness.registry import get
    from harness.training import grid
    from harness.training import train as run_training

    entry, ledger = get(model, registry_dir=registry), Ledger(out)
    version.check(entry, ledger)
    if entry.speedup is not None:
        raise UserError(
            f"{model} is trained by protocol 2, whose learning rates, lengths and seeds depend on "
            f"each other; run: harness run {model} --only trial --out {out}"
        )
    if lr is None:
        rows = ledger.rows("training", entry.name)
        lr = None if entry.recipe is None else grid.best(rows, optimizer, entry.recipe)
        if lr is None:
            raise UserError(f"{out} has no {optimizer} grid of {model} to choose from: pass --lr")
    if not 0 < lr < float("inf"):
        raise UserError(f"--lr is {lr}; it must be positive")
    data = tasks.of(entry).load(data_root)
    unit = Unit(entry.name, "train", optimizer, lr, seed)
    with (
        claim_or_refuse(out, unit),
        progress_bar(f"{entry.name} {optimizer} at {lr:g}", log=log) as on_progress,
    ):
        version.note(entry, ledger)
        result = run_training(
            entry,
            data,
            optimizer=optimizer,
            lr=lr,
            seed=seed,
            checkpoint_dir=ledger.checkpoints if optimizer == "adamw" else None,
            pretrained_dir=ledger.checkpoints,
            device=device_of(device),
            on_step=on_progress,
        )
        ledger.write_training(result)
    outcome = "diverged" if result.diverged else f"loss {result.final_loss:.4f}"
    click.echo(f"{outcome} (from {result.init_loss:.4f}) in {result.seconds:.1f} s; rows in {out}")


@main.command()
@click.argument("models", nargs=-1)
@click.option("--tier", type=click.Choice(TIERS), help="A whole tier.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes, each of one thread, or of OMP_NUM_THREADS.",
)
@choice("engine", "local", "ray")
@click.option(
    "--only",
    type=click.Choice(KINDS),
    multiple=True,
    help="Do units of this kind alone; may be given more than once.",
)
@click.option("--address", help="Address of a Ray cluster.  [default: a new one on this machine]")
@click.option(
    "--dry-run",
    is_flag=True,
    is_eager=True,  # --out can be left out then
    help="Print the forecast and stop, without --out; --device may be one that is not here: h100.",
)
@click.option(
    "--throughput", type=float, help="TFLOP/s for the forecast.  [default: measured, or assumed]"
)
@options("registry", "data_root", "out", "device", "log")
def run(
    models: tuple[str, ...],
    tier: str | None,
    jobs: int,
    engine: str,
    only: tuple[str, ...],
    address: str | None,
    dry_run: bool,
    throughput: float | None,
    registry: Path | None,
    data_root: Path | None,
    out: Path,
    device: str | None,
    log: Path | None,
) -> None:
    """Do everything for some models: grid, seeds, stages, spectra, metrics, gap.

    The same command continues where it was stopped. Several may work in one folder at the same
    time, each on what the others don't do.
    """
    from harness import registry as catalogue
    from harness.campaign.forecast import DEVICES, outlook, throughput_of
    from harness.campaign.run import run_entries
    from harness.campaign.survey import survey
    from harness.campaign.work import Job, num_threads
    from harness.cli.display import print_outlooks, print_results, print_surveys
    from harness.cli.progress import units_bar
    from harness.records.ledger import Ledger
    from harness.records.provenance import command_line

    elsewhere = dry_run and device in DEVICES
    if bool(models) == (tier is not None):
        raise UserError("name models, or pass --tier" + ", not both" * bool(models))
    if throughput is not None and not dry_run:
        raise UserError("--throughput is of the forecast: pass --dry-run too")
    if engine == "ray":
        from harness.campaign.engines.ray import import_ray, task_device

        import_ray()  # the survey takes long
        on_cluster = task_device(device) == "cuda" and address is not None
        elsewhere |= on_cluster and not dry_run
    elif address is not None:
        raise UserError("--address is that of a Ray cluster: pass --engine ray too")
    if tier is not None:
        chosen = catalogue.entries(tier, registry_dir=registry)
    else:
        chosen = [catalogue.get(name, registry_dir=registry) for name in dict.fromkeys(models)]
    starts = {e.pretrained for e in chosen if e.pretrained} - {e.name for e in chosen}
    chosen += [catalogue.get(name, registry_dir=registry) for name in sorted(starts)]
    device = str(device) if elsewhere else device_of(device)
    surveys = [survey(entry, data_root) for entry in chosen]
    reasons = [s.reason for s in surveys if s.reason is not None]
    if len(reasons) == len(surveys):
        raise UserError(f"nothing can be done: {reasons[0]}")
    if dry_run:
        live = [s for s in surveys if s.reason is None]
        rates = [throughput_of(s, data_root, device, throughput) for s in live]
        outlooks = [outlook(s, rate) for s, rate in zip(live, rates, strict=True)]
        print_outlooks(outlooks, device, rates[0].source)
        for s in surveys:
            if s.reason is not None:
                click.echo(f"left out: {s.entry.name}: {s.reason}")
        return
    print_surveys(surveys)
    job = Job(
        ledger=Ledger(out),
        entries={entry.name: entry for entry in chosen},
        data_root=data_root,
        device=device,
        num_threads=num_threads(),
        command=command_line(),
        kinds=only,
    )
    cluster = None
    if engine == "ray":
        from functools import partial

        from harness.campaign.engines.ray import Tasks

        cluster = partial(
            Tasks,
            costs={s.entry.name: s.costs for s in surveys},
            address=address,
            num_cpus=job.num_threads,
            num_gpus=int(device.startswith("cuda")),
            jobs=jobs,
        )
    left = sum(len(job.missing(s.entry)) for s in surveys if not s.reason)
    with units_bar(left, log) as event:
        failed = run_entries(surveys, job, jobs=jobs, engine=cluster, on_event=event)
    print_results(out, [s.entry for s in surveys if s.reason is None])
    for unit, reason in failed.items():
        click.echo(f"failed: {unit}: {reason}", err=True)
    click.echo(f"tables in {out}")
    if failed:
        sys.exit(1)


@main.command()
@click.argument("models", nargs=-1, required=True)
@options("registry", "data_root", "out", "device", "log")
def predictors(
    models: tuple[str, ...],
    registry: Path | None,
    data_root: Path | None,
    out: Path,
    device: str | None,
    log: Path | None,
) -> None:
    """Measure what may predict Adam's gain: untrained models, for three initialisations.

    Those that follow from a spectrum read the spectra at init that --out holds, of seeds 1 to 3;
    what is missing of them is pending, until the same command finds it. docs/predictors.md says
    what each is.
    """
    from harness import registry as catalogue
    from harness.campaign.claims import claim_or_refuse
    from harness.campaign.unit import Unit
    from harness.cli.progress import progress_bar
    from harness.predictors.take import take
    from harness.records import version
    from harness.records.ledger import Ledger
    from harness.records.provenance import command_line

    entries = [catalogue.get(name, registry_dir=registry) for name in dict.fromkeys(models)]
    for entry in entries:
        version.check(entry, Ledger(out))
    for entry in entries:
        unit = Unit(entry.name, "predictors", stage="init")
        with (
            claim_or_refuse(out, unit),
            progress_bar(f"{entry.name} predictors", log=log) as on_progress,
        ):
            rows = take(
                entry, data_root, out, device_of(device), on_progress, command=command_line()
            )
        counts = rows["status"].value_counts()
        said = ", ".join(f"{n} {status}" for status, n in counts.items())
        click.echo(f"{entry.name}: {said}, {rows['unstable'].eq(True).sum()} unstable; in {out}")
