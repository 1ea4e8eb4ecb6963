"""Commands that show the dataset: site."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.base import main, options


@main.command()
@options("source", "out")
def site(source: Path | None, out: Path) -> None:
    """Build the page that shows the tables of a folder."""
    from harness.leaderboard.site import build

    click.echo(f"page: {build(source, out)}")
