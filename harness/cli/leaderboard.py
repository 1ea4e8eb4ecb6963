"""Commands that ask the dataset: leaderboard, verdict, site, predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.base import EXISTING, FILE, PATH, device_of, main, options, writable
from spectra_db.words import STAGES

if TYPE_CHECKING:
    import pandas as pd


@main.command()
@click.option(
    "--out",
    type=PATH,
    callback=writable,
    help="Folder to write leaderboard/all.parquet, leaderboard.csv and models.csv to.",
)
@click.option(
    "--docs",
    type=FILE,
    help="Page, docs/leaderboard.md, whose part between the markers is written anew.",
)
@click.option(
    "--stage",
    type=click.Choice(STAGES),
    default="init",
    show_default=True,
    help="Of the printed table.",
)
@options("source", "registry", "json")
def leaderboard(
    out: Path | None,
    docs: Path | None,
    stage: str,
    source: Path | None,
    registry: Path | None,
    as_json: bool,
) -> None:
    """Tell which measure of heterogeneity predicts the SGD-Adam gap."""
    from harness.cli.display import print_leaderboard
    from harness.leaderboard import board, report, statistics, tables
    from harness.leaderboard.export import export
    from spectra_db.schema import PROTOCOL_VERSION

    data = tables.read(source, registry_dir=registry)
    rows = board.leaderboard(data)
    if out is not None:
        for path in export(data, rows, out):
            click.echo(f"written: {path}", err=True)
    if docs is not None:
        report.write_part(docs, report.docs_block(rows, data))
        click.echo(f"written: {docs}", err=True)
    measured = statistics.measurements(data.models, data.heterogeneity, data.gaps)
    said = report.sentences(rows, measured)
    if as_json:
        facts: dict[str, Any] = {
            "updated": None if data.updated is None else data.updated.isoformat(),
            "protocol_version": PROTOCOL_VERSION,
            "statements": said,
            "leaderboard": _records(rows),
            "pending": data.pending.to_dict("records"),
        }
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    shown = {c: report.COLUMNS[c] for c in ("spearman", "auc")}
    print_leaderboard(report.ranking(rows, stage), shown, stage)
    for sentence in said:
        click.echo(f"- {sentence}")
    click.echo(f"data: {data.age}; {len(data.pending)} models pending (--json lists them)")


@main.command()
@click.option(
    "--readme",
    type=FILE,
    help="Page whose part between the markers becomes the verdict's sentence.",
)
@click.option("--picture", type=FILE, help="Draw the entries that are measured, a PNG.")
@options("source", "json")
def verdict(readme: Path | None, picture: Path | None, source: Path | None, as_json: bool) -> None:
    """Tell whether JS⁰ at initialisation ranks models by what AdamW gains over SGD.

    By the rules of docs/verdict.md, from tables speedups and predictors; what is not measured yet
    is listed with the reason.
    """
    from harness.cli.display import print_measures, print_pairs, print_speedups
    from harness.leaderboard import preview, standings
    from harness.leaderboard.ranking import ranking
    from harness.leaderboard.report import write_part
    from spectra_db.loading import folder_of

    found = ranking(folder_of(source))
    shown = standings.of_entries(found)
    if readme is not None:
        write_part(readme, "**{}**: {}".format(*found.verdict.parts))
        click.echo(f"written: {readme}", err=True)
    if picture is not None:
        preview.draw(picture, shown)
        click.echo(f"written: {picture}", err=True)
    if as_json:
        facts = {
            "answer": found.verdict.answer,
            "sentence": found.verdict.sentence,
            "lines": found.verdict.lines,
            "pending": found.pending,
            "measures": _records(found.verdict.measures),
            "pairs": _records(found.verdict.pairs),
            "entries": _records(found.entries),
            "references": _records(found.references),
        }
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    click.echo(found.verdict.sentence)
    print_speedups(shown)
    print_measures(standings.measure_table(found.verdict.measures))
    print_pairs(standings.pair_table(found))
    for line in found.verdict.lines:
        click.echo(f"- {line}")
    for model, reason in found.pending.items():
        click.echo(f"pending: {model}: {reason}")


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(rows.to_json(orient="records", double_precision=15))


@main.command()
@options("source", "out")
def site(source: Path | None, out: Path) -> None:
    """Build the page that shows the tables of a folder, or those of a submission."""
    from harness.leaderboard.docs import DOCS
    from harness.leaderboard.site import build

    if source is not None and (source / "submission.json").is_file():
        from harness.submission.submit import tables_of

        source, _ = tables_of(source)
    click.echo(f"page: {build(source, out, DOCS if DOCS.is_dir() else None)}")


@main.command()
@click.argument("target")
@click.option("--task", help="Task of a target that is no entry; options as in 'books?context=32'.")
@click.option(
    "--checkpoints",
    type=EXISTING,
    help="Folder of checkpoints, for an entry that starts from another's weights.",
)
@click.option("--js0", "with_js0", is_flag=True, help="Take the whole spectrum, for JS⁰ too.")
@options("source", "registry", "data_root", "device", "json")
def predict(
    target: str,
    task: str | None,
    checkpoints: Path | None,
    with_js0: bool,
    source: Path | None,
    registry: Path | None,
    data_root: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Say, before any training, whether a model will need Adam.

    TARGET is an entry of the registry, or module:factory, timm:NAME or 'transformers:TYPE?...'
    with --task. Without --js0 it takes six products per block.
    """
    from harness.cli.display import cost_line, print_prediction
    from harness.cli.progress import progress_bar
    from harness.submission import predict as prediction

    device = device_of(device)  # what is missing here is said before the tables are read
    entry = prediction.resolve(target, task, registry_dir=registry, data_root=data_root)
    prediction.check_checkpoints(entry, checkpoints)
    known = prediction.read_known(entry, source, with_js0=with_js0)
    with progress_bar(target) as on_progress:
        found, cost = prediction.measure(
            entry,
            with_js0=with_js0,
            data_root=data_root,
            checkpoint_dir=checkpoints,
            device=device,
            on_forecast=lambda *cost: click.echo(cost_line(*cost), err=True),
            on_progress=on_progress,
        )
    result = prediction.predict(entry, found, known) | {"target": target, "cost": cost}
    if as_json:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print_prediction(result)
