"""Commands by which a model comes into the dataset: add-model, validate, submit, verify."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.base import EXISTING, device_of, main, options
from harness.errors import UserError

if TYPE_CHECKING:
    from harness.submission.verify import Check


@main.command("add-model")
@click.argument("name")
@click.option(
    "--from",
    "source",
    required=True,
    metavar="SOURCE",
    help="module:factory, timm:NAME or transformers:TYPE; arguments as in 'timm:NAME?depth=4&...'.",
)
@click.option(
    "--task",
    required=True,
    metavar="TASK",
    help="Data and loss: a name, or module:Class of your own; options as in 'books?context=32'.",
)
@click.option("--family", help="Family of architectures.  [default: what SOURCE suggests]")
@click.option("--reference", help="Paper or page that defines the architecture.")
@click.option("--licence", help="Licence of the architecture's code.")
@click.option("--description", help="One sentence.")
@click.option("--stages", help="Stages with spectra, such as init,final; init alone: no training.")
@click.option("--train-steps", type=click.IntRange(1), help="Steps of a training run.")
@click.option("--batch-size", type=click.IntRange(1), help="Samples of a training step.")
@click.option(
    "--hessian-batch-size", type=click.IntRange(1), help="Samples of the Hessian's batch."
)
@click.option("--sgd-lrs", metavar="LOW,HIGH", help="Ends of the grid of SGD's learning rates.")
@click.option("--adamw-lrs", metavar="LOW,HIGH", help="The same of AdamW's.")
@click.option(
    "--recipe",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Another field of the recipe, such as clip=1.0, schedule=constant, weight_decay=0.1.",
)
@click.option("--dry-run", is_flag=True, help="Print the entry and what it costs, write nothing.")
@click.option("--force", is_flag=True, help="Replace the entry of this name.")
@options("registry", "data_root")
def add_model(
    name: str,
    source: str,
    task: str,
    stages: str | None,
    dry_run: bool,
    force: bool,
    registry: Path | None,
    data_root: Path | None,
    **given: Any,
) -> None:
    """Write the entry of a new model, from a factory and a task.

    The task tells the factory vocab_size and context, or num_classes, image_size and in_channels,
    as far as it has arguments of these names. The entry is one file NAME.py in the folder that
    --registry names, or in the tree.
    """
    from dataclasses import replace

    from harness import registry as catalogue
    from harness.campaign.plan import settings_of
    from harness.cli.display import cost_line, print_blocks
    from harness.registry.entry import check_slug
    from harness.submission import draft, entry_file
    from harness.training import load_problem

    check_slug("NAME", name)
    if given["family"] is not None:
        check_slug("--family", given["family"])
    folder = catalogue.SUBMITTED if registry is None else registry
    path = entry_file.path_of(folder, name)
    entry_file.check_free(path, force=force)
    known = catalogue.entries(registry_dir=registry if folder.is_dir() else None)
    replaces = force and path.exists()
    if name in [entry.name for entry in known] and not replaces:
        raise UserError(f"the registry has a model {name!r} already; choose another name")
    entry, data = draft.draft(
        name,
        source,
        task,
        folder=registry,
        data_root=data_root,
        stages=None if stages is None else tuple(stages.split(",")),
        **given,
    )
    draft.check_size(entry, data)
    findings = draft.inspect_model(draft.build(entry, data))
    entry = replace(entry, blocks=findings.guessed)
    text = entry_file.render(entry)
    if dry_run:
        click.echo(text)
    click.echo(f"{entry.name}: family {entry.family}, task {entry.task}")
    click.echo(f"parameters {findings.num_params:,}, blocks {len(findings.blocks)}")
    try:
        problem = load_problem(entry, data_root=data_root)
        cost = problem.forecast(settings_of(entry))
        forecast = cost_line(entry.num_probes, entry.num_steps, cost)
    except Exception as error:  # of the model: `validate` finds the module and the remedy
        cost, forecast = None, f"no forecast: {' '.join(str(error).split())}"
    if cost is not None:
        click.echo("GFLOP: of one product with the block")
    print_blocks(findings.blocks, cost)
    for line in findings.notes():
        click.echo(line)
    click.echo(forecast)
    if dry_run:
        click.echo(f"dry run: {path} is not written")
        return
    entry_file.write(path, text)
    click.echo(f"entry: {path}")
    for field in entry_file.todo(entry):
        click.echo(f"fill in there: {field}")
    where = "" if registry is None else f" --registry {registry}"
    click.echo(f"next: harness validate {name}{where}")


@main.command()
@click.argument("model")
@click.option(
    "--budget", default=120.0, show_default=True, help="Seconds of processor time, about."
)
@options("registry", "data_root", "json")
def validate(
    model: str, budget: float, registry: Path | None, data_root: Path | None, as_json: bool
) -> None:
    """Run every check that a review of an entry would make.

    Each failure comes with its cause and what to do. The exit code is 0 if none failed and there
    was time for all; warnings would pass a review.
    """
    from dataclasses import asdict

    from harness.cli.display import print_finding
    from harness.registry import get
    from harness.submission.standing import note_validated
    from harness.submission.validate import validate as run_checks

    if not 0 < budget < float("inf"):
        raise UserError(f"--budget is {budget}; it must be positive, in seconds")
    entry = get(model, registry_dir=registry)
    findings = []
    for finding in run_checks(entry, data_root=data_root, budget=budget):
        findings.append(finding)
        if not as_json:
            print_finding(finding)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    outcomes = Counter(finding.outcome for finding in findings)
    if outcomes["failed"]:
        text = f"is not ready: {outcomes['failed']} failed, {outcomes['skipped']} skipped"
    elif outcomes["untried"]:
        text = f"has not failed, and is not ready: {outcomes['untried']} checks are untried"
    else:
        text = f"is ready; warnings: {outcomes['warning']}"
    click.echo(f"{model} {text}", err=True)
    if outcomes["failed"] or outcomes["untried"]:
        sys.exit(1)
    if registry is not None:
        note_validated(entry, registry)
    where = "" if registry is None else f" --registry {registry}"
    click.echo(f"next: harness run {model}{where} --out FOLDER", err=True)


@main.command()
@click.argument("model")
@click.option(
    "--checkpoints/--no-checkpoints",
    default=True,
    show_default=True,
    help="Send the weights of the stages along, by which these can be verified.",
)
@click.option(
    "--rehearsal",
    is_flag=True,
    help="Pack runs of fewer than 100 steps, too, to try the way; the report says so.",
)
@click.option("--create-pr", is_flag=True, help="Open a pull request on the Hub.")
@click.option("--repo", metavar="OWNER/NAME", help="The dataset on the Hub, for --create-pr.")
@options("source", "registry", "data_root", "out")
def submit(
    model: str,
    checkpoints: bool,
    rehearsal: bool,
    create_pr: bool,
    repo: str | None,
    source: Path | None,
    registry: Path | None,
    data_root: Path | None,
    out: Path,
) -> None:
    """Assemble the submission of a finished model: tables, entry, code and a report.

    --source is the folder that `harness run` wrote. --out is a folder ready to be sent, if not by
    --create-pr, then by any other way.
    """
    from harness.campaign.unfinished import unfinished
    from harness.records import version
    from harness.records.ledger import Ledger
    from harness.records.provenance import code_version
    from harness.registry import get
    from harness.submission.submit import assemble
    from spectra_db.publish import check_can_write, open_pull_request

    if source is None:
        raise UserError("--source is missing: the folder that `harness run` wrote")
    if create_pr:
        if repo is None:
            raise UserError("--create-pr needs --repo: the dataset on the Hub, as in owner/name")
        check_can_write(repo)
    entry = get(model, registry_dir=registry)
    version.check(entry, Ledger(source))
    if reason := unfinished(source, registry, rehearsals=rehearsal).get(model):
        remedy = (
            "pass --rehearsal to try the way, or train it longer"
            if "rehearsal" in reason
            else f"`harness run {model} --out {source}` continues"
        )
        raise UserError(f"{model} is not finished: {reason}; {remedy}")
    found = assemble(
        entry,
        source,
        out,
        code_version=code_version(),
        registry=registry,
        data_root=data_root,
        checkpoints=checkpoints,
    )
    for problem in found:
        click.echo(problem, err=True)
    if found:
        click.echo(f"problems: {len(found)}; it is not ready to be sent", err=True)
        sys.exit(1)
    files = [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    click.echo((out / "README.md").read_text(encoding="utf-8"))
    click.echo(f"submission: {out}, {len(files)} files, {size / 1e6:.1f} MB, checked")
    if create_pr and repo is not None:
        title = f"Submit {model}" + " (a rehearsal)" * entry.is_rehearsal
        page = open_pull_request(out, repo, f"submissions/{model}", title)
        click.echo(f"pull request: {page}")


@main.command()
@click.argument("target", default="")
@click.option("--sample", default=10, show_default=True, type=click.IntRange(1), help="Rows.")
@click.option("--budget", default=600.0, show_default=True, help="Seconds.")
@click.option(
    "--checkpoints",
    type=EXISTING,
    help="Folder of checkpoints.  [default: `checkpoints` beside the tables]",
)
@click.option(
    "--runs",
    default=1,
    show_default=True,
    type=click.IntRange(0),
    help="Training runs to repeat, as far as time allows.",
)
@click.option("--mark", is_flag=True, help="Note the models that agree in verified.json.")
@click.option(
    "--seed", default=1, show_default=True, type=click.IntRange(0), help="Draws the sample."
)
@options("source", "registry", "data_root", "device", "json")
def verify(
    target: str,
    sample: int,
    budget: float,
    runs: int,
    checkpoints: Path | None,
    mark: bool,
    source: Path | None,
    registry: Path | None,
    data_root: Path | None,
    seed: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Recompute a sample of published rows, one probe each, and a training run, and compare.

    TARGET is a model, a folder of tables, or a submission; by default all models of the bundled
    release. Tables of the models drawn that follow from others are made anew. Reading a submission
    executes none of its code; to recompute it, read the code, then pass --registry
    SUBMISSION/entry. Rows are drawn of those at initialisation and of the stages whose checkpoints
    are here; those whose data are not here are listed as unverifiable. The exit code is 0 if all
    that was recomputed agrees, and some row did.
    """
    from dataclasses import asdict
    from functools import partial

    from harness.cli.display import print_checks
    from harness.cli.progress import progress_bar
    from harness.registry import get
    from harness.submission.published import draw, find, note_verified, verify_all
    from harness.submission.recompute import Means

    if not 0 < budget < float("inf"):
        raise UserError(f"--budget is {budget}; it must be positive, in seconds")
    published = find(target, source, registry, checkpoints)
    find_entry = partial(get, registry_dir=registry)
    drawn = draw(published, find_entry, sample, seed)
    chosen = drawn.chosen
    products, seconds = int(chosen["num_products"].sum()), float(chosen["seconds"].sum())
    click.echo(
        f"{len(chosen)} of {len(drawn.rows)} rows: {products:,} products, {seconds:,.0f} s where "
        f"they were made; at most {budget:,.0f} s here",
        err=True,
    )
    if drawn.num_away:
        click.echo(
            f"{drawn.num_away} rows are of checkpoints that are not here, or of unknown entries",
            err=True,
        )
    deadline = time.monotonic() + budget
    means = Means(data_root, published.checkpoints, device_of(device), deadline)
    with progress_bar("verify") as on_progress:
        checks = verify_all(
            published, drawn, find_entry, means, num_runs=runs, seed=seed, on_progress=on_progress
        )
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks.all], indent=2))
    else:
        print_checks(checks.all)
    if mark:
        note_verified(published, drawn, checks)
    rest = f"{len(chosen) - len(checks.rows)} left for want of time"
    click.echo(f"{_counts(checks.rows)}, {rest}", err=True)
    click.echo(f"tables that follow from others: {_counts(checks.tables)}", err=True)
    if runs:
        click.echo(f"training runs: {_counts(checks.runs)}", err=True)
    if not checks.agree:
        sys.exit(1)


def _counts(checks: list[Check]) -> str:
    counts = Counter(check.outcome for check in checks)
    return (
        f"{counts['agrees']} agree, {counts['deviates']} deviate, "
        f"{counts['unverifiable']} can't be verified here"
    )
