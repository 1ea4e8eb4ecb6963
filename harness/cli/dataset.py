"""Commands that make, check and compare releases of the dataset, and bring them to the Hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from harness.cli.base import EXISTING, PATH, main, options, writable
from harness.errors import UserError
from spectra_db.project import DATASET, IS_PLACEHOLDER


def _published(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Return the id of a dataset; the placeholder is none."""
    if IS_PLACEHOLDER and value == DATASET:
        raise UserError(
            f"{DATASET} is a placeholder, the project's dataset has no address yet: name one, "
            "owner/name, or set DATASET in spectra_db/project.py"
        )
    return value


@main.group()
def dataset() -> None:
    """Make, check and compare releases."""


@dataset.command()
@click.argument("source", type=EXISTING)
@click.option(
    "--version",
    required=True,
    metavar="X.Y.Z",
    help="MAJOR protocol or schema, MINOR models or columns, PATCH text or corrections.",
)
@click.option("--merge", is_flag=True, help="Add each table as one file, for the Hub's page.")
@click.option("--note", "notes", multiple=True, help="A line for the data's changelog.")
@options("out", "registry")
def release(
    source: Path,
    version: str,
    merge: bool,
    notes: tuple[str, ...],
    out: Path,
    registry: Path | None,
) -> None:
    """Make a release of the tables in SOURCE: validated, with card, changelog and manifest.

    Models that `harness run` has not finished stay out, unless rows of status failed or pending
    say why. What lay at --out is replaced as a whole; SOURCE may be --out, to bring a release up
    to date.
    """
    from harness.campaign.unfinished import unfinished
    from harness.leaderboard.board import derive
    from spectra_db.release import release as make

    left_out = unfinished(source, registry)
    for model, reason in left_out.items():
        click.echo(f"left out: {model}: {reason}")
    known = {path.stem for path in (source / "models").glob("*.parquet")}
    made = make(
        source,
        out,
        version,
        models=known - set(left_out),
        notes=notes,
        derive=derive,
        merge=merge,
    )
    size = sum(file.bytes for file in made.files.values())
    click.echo(
        f"{len(made.models())} models, {len(made.files)} files, {size / 1e6:.1f} MB in {out}"
    )
    _report(_problems(out, None, registry), f"{out} is a sound release, version {made.version}")


@dataset.command("check")
@click.argument("folder", type=EXISTING, required=False)
@click.option("--previous", type=EXISTING, help="The release before: no row of it may be lost.")
@options("registry")
def check_(folder: Path | None, previous: Path | None, registry: Path | None) -> None:
    """Check a release: manifest, schema, invariants, keys, card, size, and what it follows.

    What follows from other tables is made anew: heterogeneity from spectra, gaps from training, the
    leaderboard from both. FOLDER is the bundled release if not given.
    """
    from spectra_db import manifest
    from spectra_db.loading import BUNDLED

    folder = folder or BUNDLED
    found = _problems(folder, previous, registry)
    known = None if found else manifest.read(folder)
    _report(found, f"{folder} is a sound release, version {known.version}" if known else "")


@dataset.command()
@click.argument("folder", type=EXISTING)
def derive(folder: Path) -> None:
    """Derive table heterogeneity of FOLDER anew where it is of an earlier protocol.

    From the spectra that are there: no product is taken, and rows of the last protocol stay. A
    release is then brought up to date by `harness dataset release FOLDER --out FOLDER`.
    """
    from harness.cli.progress import progress_bar
    from spectra_db.derived import renew

    with progress_bar("derive") as on_progress:
        found = renew(folder, on_progress)
    click.echo(f"{len(found)} models derived anew, the others are of the last protocol")


@dataset.command()
@click.argument("old", type=EXISTING)
@click.argument("new", type=EXISTING)
@click.option(
    "--rows",
    "num_rows",
    default=10,
    show_default=True,
    type=click.IntRange(0),
    help="Rows to print.",
)
@options("json")
def diff(old: Path, new: Path, num_rows: int, as_json: bool) -> None:
    """Say which rows were added, removed, or changed beyond their stated errors."""
    from harness.cli.display import print_differences
    from spectra_db.diff import compare
    from spectra_db.schema import TABLES

    for folder in (old, new):
        if not any((folder / table).is_dir() for table in TABLES):
            raise UserError(f"{folder} holds no tables; name a folder of them, or a release")
    changes = {table: compare(old, new, table) for table in TABLES}
    if as_json:
        rows = {t: json.loads(c.to_json(orient="records")) for t, c in changes.items() if len(c)}
        click.echo(json.dumps(rows, indent=2))
    else:
        print_differences(changes, num_rows)


@dataset.command()
@click.argument("sources", type=EXISTING, nargs=-1, required=True)
@options("out")
def merge(sources: tuple[Path, ...], out: Path) -> None:
    """Bring the tables of several folders together in --out, which may hold some already.

    No row is lost and none replaced, but failed and pending ones by those that came of it; where
    folders say different things of the same, nothing is written and they are named.
    """
    from spectra_db.merge import merge as bring_together

    found = bring_together(sources, out)
    if found.conflicts:
        _report([*found.conflicts, "nothing was written: merge one of them alone"], "")
    for row in found.derived:
        click.echo(f"left out, `harness run` derives it again: {row}")
    added = ", ".join(f"{count} of {table}" for table, count in found.added.items() if count)
    click.echo(f"rows added: {added or 'none'}; tables in {out}")


def _problems(folder: Path, previous: Path | None, registry: Path | None) -> list[str]:
    from harness.cli.progress import progress_bar
    from harness.leaderboard.board import derived_of_release
    from spectra_db import check

    with progress_bar("check") as on_progress:
        return check.problems(
            folder, previous, derived=derived_of_release(registry), on_progress=on_progress
        )


def _report(found: list[str], sound: str) -> None:
    """Print problems and exit with 1, or say that there are none."""
    for problem in found:
        click.echo(problem, err=True)
    if found:
        click.echo(f"{len(found)} problem{'s' * (len(found) > 1)}", err=True)
        sys.exit(1)
    click.echo(sound)


@main.command()
@click.argument("repo", default=DATASET, callback=_published)
@click.option("--source", type=EXISTING, help="A release.  [default: the bundled one]")
@click.option(
    "--dry-run/--no-dry-run", default=True, show_default=True, help="Print what would change."
)
@click.option("--create-pr", is_flag=True, help="A pull request instead of a commit to main.")
def publish(repo: str, source: Path | None, dry_run: bool, create_pr: bool) -> None:
    """Publish a release as dataset REPO (owner/name) on the Hugging Face Hub.

    Without REPO it is the project's own dataset.

    One commit, then the tag vX.Y.Z. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from harness.leaderboard.board import derived_of_release
    from spectra_db import publish as publication
    from spectra_db.loading import BUNDLED

    folder = source or BUNDLED
    planned = publication.plan(folder, repo, derived=derived_of_release())
    for sign, paths in zip("+~-", (planned.added, planned.changed, planned.removed), strict=True):
        for path in paths:
            click.echo(f"{sign} {path}")
    counts = f"{len(planned.added)} added, {len(planned.changed)} changed"
    click.echo(
        f"{repo}: {counts}, {len(planned.removed)} removed, {planned.num_bytes / 1e6:.1f} MB"
    )
    if planned.is_empty and planned.tagged:
        click.echo(f"{planned.tag} is published already")
    elif dry_run:
        click.echo(f"dry run: nothing is published; --no-dry-run publishes {planned.tag}")
    else:
        click.echo(f"published: {publication.publish(folder, planned, create_pr=create_pr)}")


@main.command()
@click.argument("repo", default=DATASET, callback=_published)
@click.option("--revision", help="Tag, branch or commit.  [default: main]")
@click.option("--out", type=PATH, callback=writable, help="Folder to put a copy in.")
def pull(repo: str, revision: str | None, out: Path | None) -> None:
    """Download a release from the Hugging Face Hub and check it; offline it is there afterwards."""
    from spectra_db import hub

    folder, known = hub.pull(repo, revision, out)
    models = len(known.models())
    click.echo(f"{repo} {known.version}: {models} models, every file as the manifest lists it")
    click.echo(f"in {folder}")
