"""The command that answers the question of the leaderboard: verdict."""

from __future__ import annotations

import json
from pathlib import Path

import click

from harness.cli.base import main, options


@main.command()
@click.option(
    "--readme",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Page whose part between the markers becomes the verdict's sentence.",
)
@options("source", "json")
def verdict(readme: Path | None, source: Path | None, as_json: bool) -> None:
    """Tell whether JS⁰ at initialisation ranks models by what AdamW gains over SGD.

    By the rules of docs/verdict.md, from tables speedups and predictors; what is not measured yet
    is listed with the reason.
    """
    from harness.cli.display import print_speedups
    from harness.leaderboard.ranking import ranking
    from harness.leaderboard.report import write_part
    from spectra_db.loading import folder_of

    found = ranking(folder_of(source))
    if readme is not None:
        write_part(readme, f"**{found.verdict.plain}.** {found.verdict.sentence}")
        click.echo(f"written: {readme}", err=True)
    if as_json:
        facts = {
            "answer": found.verdict.answer,
            "sentence": found.verdict.sentence,
            "lines": found.verdict.lines,
            "pending": found.pending,
            "entries": json.loads(found.entries.to_json(orient="records", double_precision=15)),
            "references": json.loads(
                found.references.to_json(orient="records", double_precision=15)
            ),
        }
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    click.echo(found.verdict.sentence)
    print_speedups(found.entries, found.references)
    for line in found.verdict.lines:
        click.echo(f"- {line}")
    for model, reason in found.pending.items():
        click.echo(f"pending: {model}: {reason}")
