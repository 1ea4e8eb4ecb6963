"""Commands that ask the dataset: leaderboard, site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from harness.cli.base import main, options


@main.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write leaderboard/all.parquet, leaderboard.csv and models.csv to.",
)
@click.option(
    "--readme",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File whose part between the markers is written anew.",
)
@click.option("--stage", default="init", show_default=True, help="Stage of the printed table.")
@options("source", "registry", "json")
def leaderboard(
    out: Path | None,
    readme: Path | None,
    stage: str,
    source: Path | None,
    registry: Path | None,
    as_json: bool,
) -> None:
    """Tell which measure of heterogeneity predicts the SGD-Adam gap."""
    from harness.display import print_leaderboard
    from harness.errors import UserError
    from harness.leaderboard import report, statistics, tables
    from harness.leaderboard.export import export
    from spectra_db.schema import STAGES

    if stage not in STAGES:
        raise UserError(f"--stage is {stage!r}; choose one of {', '.join(STAGES)}")
    data = tables.read(source, registry_dir=registry)
    board = statistics.leaderboard(data.models, data.heterogeneity, data.gaps)
    if out is not None:
        for path in export(data, board, out):
            click.echo(f"written: {path}", err=True)
    if readme is not None:
        report.write_readme(readme, report.readme_block(board, data))
        click.echo(f"written: {readme}", err=True)
    if as_json:
        facts: dict[str, Any] = {
            "updated": None if data.updated is None else data.updated.isoformat(),
            "protocol_version": int(data.models["protocol_version"].iloc[0]),
            "statements": report.sentences(board),
            "leaderboard": json.loads(board.to_json(orient="records", double_precision=15)),
            "pending": data.pending.to_dict("records"),
        }
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    shown = {c: report.COLUMNS[c] for c in ("spearman", "auc")}
    print_leaderboard(report.ranking(board, stage), shown, stage)
    for sentence in report.sentences(board):
        click.echo(f"- {sentence}")
    click.echo(f"data: {data.age}; {len(data.pending)} models pending (--json lists them)")


@main.command()
@options("source", "out")
def site(source: Path | None, out: Path) -> None:
    """Build the page that shows the tables of a folder."""
    from harness.leaderboard.site import build

    click.echo(f"page: {build(source, out)}")
