"""Commands that show the registry: list, describe."""

from __future__ import annotations

import json
from pathlib import Path

import click

from harness.cli.base import EXISTING, main, options
from harness.errors import UserError
from spectra_db.words import TIERS


@main.command("list")
@click.option("--tier", type=click.Choice(TIERS), help="One tier alone.")
@click.option("--tasks", "of_tasks", is_flag=True, help="The data and losses, instead of models.")
@click.option(
    "--source",
    type=EXISTING,
    help="Folder that `harness run` wrote, or a submission: where entries of --registry stand.",
)
@options("registry", "json")
def list_(
    tier: str | None, of_tasks: bool, source: Path | None, registry: Path | None, as_json: bool
) -> None:
    """List the models of the registry, or the tasks that a model can be trained on.

    With --registry it says where each entry stands, from draft to accepted, and for those of that
    folder what comes next.
    """
    from types import SimpleNamespace

    from harness.cli.display import print_entries
    from harness.registry import entries

    if source is not None and registry is None:
        raise UserError("--source is for entries of your own: name their folder by --registry")
    if of_tasks:
        from harness.tasks import listing

        if given := [n for n, v in (("--tier", tier), ("--registry", registry)) if v is not None]:
            raise UserError(f"{given[0]} is of models: leave it out, or leave --tasks out")
        tasks = listing()
        if as_json:
            click.echo(json.dumps(tasks, indent=2, ensure_ascii=False))
        else:
            print_entries([SimpleNamespace(**task) for task in tasks], [*tasks[0]])
            click.echo("or module:Class of your own: docs/add-a-model.md, Data of your own")
        return
    found = entries(tier, registry_dir=registry)
    fields = ["name", "family", "tier", "task", "status", "description"]
    listed = [{field: getattr(entry, field) for field in fields} for entry in found]
    if registry is not None:
        from harness.submission.standing import ACCEPTED, standing

        ours = {entry.name for entry in entries()}
        for entry, shown in zip(found, listed, strict=True):
            known = entry.name in ours
            stands = ACCEPTED if known else standing(entry, registry, source)
            shown |= {"stands": stands.status, "next": stands.following}
        fields[fields.index("status")] = "stands"
    if as_json:
        click.echo(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    # `describe` gives the description.
    print_entries([SimpleNamespace(**shown) for shown in listed], fields[:-1])
    for shown in listed:
        if following := shown.get("next"):
            click.echo(f"{shown['name']}: {shown['stands']}; next: {following}")


@main.command()
@click.argument("model")
@click.option(
    "--provenance", is_flag=True, help="Where its published numbers come from, row by row."
)
@options("partition", "source", "registry", "data_root", "json")
def describe(
    model: str,
    provenance: bool,
    partition: str | None,
    source: Path | None,
    registry: Path | None,
    data_root: Path | None,
    as_json: bool,
) -> None:
    """Describe a model: its blocks and what its spectrum costs."""
    if provenance:
        from harness.cli.display import print_provenance
        from spectra_db.provenance import trace

        found = trace(model, source)
        if as_json:
            click.echo(json.dumps(found, indent=2))
        else:
            print_provenance(found)
        return
    if source is not None:
        raise UserError("--source names published tables; it goes with --provenance")
    from dataclasses import replace

    from harness.campaign.plan import settings_of
    from harness.cli.display import cost_line, print_blocks
    from harness.cli.progress import progress_bar
    from harness.registry import get
    from harness.training import load_problem

    entry = get(model, registry_dir=registry)
    # The pretraining's weights change nothing that is shown.
    problem = load_problem(replace(entry, pretrained=None), data_root=data_root)
    settings = settings_of(entry, partition)
    blocks = problem.blocks(settings.partition)
    with progress_bar(f"{entry.name}: a product with each block") as on_progress:
        cost = problem.forecast(settings, on_progress)
    num_params = sum(p.numel() for p in problem.model.parameters())
    if as_json:
        facts = {
            **{field: getattr(entry, field) for field in ("name", "family", "tier")},
            "num_params": num_params,
            "blocks": [
                {"name": b.name, "kind": b.kind, "shape": b.shape, "num_params": b.num_params}
                for b in blocks
            ],
            "num_products": cost.num_products,
            "num_gram": cost.num_gram,
            "gram_passes": cost.gram_passes,
            "flops": cost.flops,
            "graph_bytes": cost.graph_bytes,
        }
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(f"{entry.name}: {entry.description} ({entry.reference})")
    click.echo(f"family {entry.family}, tier {entry.tier}, task {entry.task}")
    click.echo(f"{num_params:,} parameters, {len(blocks)} blocks of partition {settings.partition}")
    click.echo("GFLOP: of one product with the block")
    print_blocks(blocks, cost)
    click.echo(cost_line(entry.num_probes, entry.num_steps, cost))
