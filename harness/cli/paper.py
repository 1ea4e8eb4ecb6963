"""The command that regenerates the paper's tables and figures."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.base import main, options


@main.command()
@click.argument("sections", nargs=-1)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="docs",
    show_default=True,
    help="Folder of paper.md, and of paper/ with figures and numbers.",
)
@options("source")
def paper(sections: tuple[str, ...], out: Path, source: Path | None) -> None:
    """Regenerate tables and figures of the paper, all or some (fig8, theory, ...).

    Section by section: numbers as JSON, figures as SVG and PNG in OUT/paper, and the page
    OUT/paper.md that sets the paper's claims beside them.
    """
    import time

    from harness.errors import UserError
    from harness.paper.sections import SECTIONS, run

    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise UserError(f"no section {unknown[0]!r}; choose from {', '.join(SECTIONS)}")
    for name in dict.fromkeys(sections) or SECTIONS:
        started = time.perf_counter()
        result = run(name, source, out)
        click.echo(f"{name}: {SECTIONS[name].title} ({time.perf_counter() - started:.0f} s)")
        for text in result.missing:
            click.echo(f"  not in this release: {text}")
    click.echo(f"page: {out / 'paper.md'}")
