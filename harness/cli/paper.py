"""The command that regenerates the paper's tables and figures."""

from __future__ import annotations

from pathlib import Path

import click

from harness.cli.base import FOLDER, main, options, writable


@main.command()
@click.argument("sections", nargs=-1)
@click.option(
    "--out",
    type=FOLDER,
    default="docs",
    show_default=True,
    callback=writable,  # before hours of work
    help="Folder of paper.md, and of paper/ with figures and numbers.",
)
@options("source", "data_root")
def paper(
    sections: tuple[str, ...], out: Path, source: Path | None, data_root: Path | None
) -> None:
    """Regenerate tables and figures of the paper, all or some (fig4, theory, ...).

    Section by section: numbers as JSON, figures as SVG (PNG where that is large) in OUT/paper, and
    the page OUT/paper.md that sets the paper's claims beside them.

    The long sections (blockdiagonal, causal, sweep) train or differentiate models, in minutes: they
    are measured when they are named, unit by unit, and go on where they were stopped. Otherwise
    they are drawn from what was measured before; to measure again, delete OUT/paper/SECTION.
    """
    import time

    from harness.paper.sections import SECTIONS, code_of, measure, run

    names = list(dict.fromkeys(sections) or SECTIONS)
    for name in names:
        code_of(name)  # what is unknown or not installed is said before the first is made
    for name in names:
        started = time.perf_counter()
        if sections and SECTIONS[name].is_long:
            measure(name, source, out, data_root, click.echo)
        result = run(name, source, out)
        click.echo(f"{name}: {SECTIONS[name].title} ({time.perf_counter() - started:.0f} s)")
        for text in result.missing:
            click.echo(f"  not there: {text}")
    click.echo(f"page: {out / 'paper.md'}")
