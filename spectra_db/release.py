"""Making a release: a folder of validated tables with card, changelog and manifest."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from spectra_db import card, manifest, merged, store, verified
from spectra_db.files import replaced
from spectra_db.manifest import InvalidRelease, Manifest
from spectra_db.schema import PROTOCOL_VERSION, TABLES

_HEADING = (
    "# Changelog of the data\n\n"
    "MAJOR: protocol or schema; MINOR: models or columns; PATCH: text or corrections.\n"
)
_COUNTS = "- Holds "


def release(
    source: Path,
    out: Path,
    version: str,
    *,
    models: Collection[str] | None = None,
    notes: Sequence[str] = (),
    derive: Callable[[Path], None] | None = None,
    merge: bool = False,
) -> Manifest:
    """Write a release of a folder's tables; what lay at `out` is replaced as a whole.

    Every file is read, validated and written anew; checkpoints, locks and what else lies in the
    folder stay out. The same tables and version give the same bytes. `source` may be `out`, which
    brings card and manifest up to date.

    Args:
        source: Folder of tables.
        out: Folder of the release: empty, absent, or an earlier release.
        version: MAJOR.MINOR.PATCH, no lower than that of the release at `out`.
        models: Models to take; None for all of table `models`.
        notes: Lines for the changelog.
        derive: Writes the derived table `leaderboard` into a folder of tables.
        merge: Write each table as one file too, and an overview of the models, as the Hub's
            readers want them; the changelog goes on from the source's.

    Raises:
        InvalidRelease: The version is lower, `out` is something else, or there are no models.
        InvalidTable: A table is not valid.
    """
    wanted = manifest.version_of(version)
    out = out.absolute()  # "." has no parent to build beside
    before = _earlier(out)
    if before is not None and wanted < manifest.version_of(before.version):
        raise InvalidRelease(f"{out} is version {before.version}; {version} is lower")
    known = {path.stem for path in (source / "models").glob("*.parquet")}
    chosen = known if models is None else known & set(models)
    if not chosen:
        raise InvalidRelease(f"{source} has no model to release")
    with replacing(out) as staging:
        _copy(source, staging, chosen)
        if derive is not None:
            derive(staging)
        for leftover in [*staging.glob("*/.*"), *staging.glob(".*")]:
            leftover.unlink()  # locks
        if merge:
            merged.write(staging)
        tables = Manifest(version, PROTOCOL_VERSION, describe_files(staging))
        pages = {
            manifest.CHANGELOG: _changelog(source if merge else out, tables, before, notes),
            manifest.CARD: card.render(staging, version),
        }
        for name, text in pages.items():
            (staging / name).write_text(text, encoding="utf-8")
        described = {name: manifest.describe(staging / name) for name in pages}
        written = replace(tables, files={**tables.files, **described})
        manifest.write(staging, written)
    return written


def describe_files(folder: Path) -> dict[str, manifest.File]:
    """Return the entries of all files of a folder but the manifest.

    Raises:
        InvalidRelease: A file is none of a release's.
        InvalidTable: A table is not valid.
    """
    files = {}
    for path in list_files(folder):
        if not manifest.belongs(path):
            raise InvalidRelease(f"{folder / path}: no file of a release")
        table = path.partition("/")[0]
        rows = store.read(folder / path, table).num_rows if manifest.is_table(path) else None
        files[path] = manifest.describe(folder / path, rows)
    return files


def list_files(folder: Path) -> list[str]:
    """Return the relative paths of all files in a folder but the manifest, locks left out."""
    found = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    locks = re.compile(r"(.*/)?\.[^/]*\.lock")
    return [name for name in names if name != manifest.NAME and not locks.fullmatch(name)]


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield an empty folder, which takes the place of a release, or of nothing, when it is whole.

    Raises:
        InvalidRelease: What lies at `out` is no release.
    """
    with replaced(out) as staging:
        yield staging
        _earlier(out)


def _earlier(out: Path) -> Manifest | None:
    """Return the manifest of the release to be replaced; refuse to replace anything else."""
    if not out.exists():
        return None
    known = manifest.read(out) if out.is_dir() else None
    strange = [p for p in list_files(out) if not manifest.belongs(p)] if out.is_dir() else ["."]
    if strange:
        raise InvalidRelease(
            f"{out} is no release: it holds {strange[0]}; name an empty folder, or a release"
        )
    return known


def _copy(source: Path, staging: Path, models: Collection[str]) -> None:
    """Copy the tables of some models, and the note on which of them were verified.

    Table `leaderboard` is of all models that a folder holds, and so never another folder's. All
    files of a table have the columns that any of them has, for who reads them as one; a column
    that none has yet stays out, so that no file changes that has the same numbers.
    """
    for table in TABLES:
        paths = [p for p in sorted((source / table).glob("*.parquet")) if p.stem in models]
        columns = {name for path in paths for name in store.columns_of(path)}
        for path in paths:
            store.rewrite(path, staging / table / path.name, table, columns)
    verified.copy(source, staging)


def _changelog(history: Path, now: Manifest, before: Manifest | None, notes: Sequence[str]) -> str:
    """Return the changelog with a section for the version.

    Released again under its own version, the section keeps its lines and gets the new counts.
    """
    version = now.version
    path = history / manifest.CHANGELOG
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise InvalidRelease(
            f"{path}: damaged, no UTF-8 ({error}); put a whole copy there"
        ) from None
    _, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    lines = [f"- {note}" for note in dict.fromkeys(notes)]
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    if sections and sections[0].startswith(f"## {version} "):
        title, *old = sections.pop(0).strip().splitlines()
        date = title.split()[-1].strip("()")
        kept = [line for line in old if line and not line.startswith(_COUNTS)]
        lines = kept + [line for line in lines if line not in kept]
    elif before is not None:
        added = sorted(set(now.models()) - set(before.models()))
        gone = sorted(set(before.models()) - set(now.models()))
        lines += [f"- New models: {', '.join(added)}."] if added else []
        lines += [f"- Without {', '.join(gone)}."] if gone else []
    counts = ", ".join(f"{count:,} rows of {table}" for table, count in now.rows().items())
    lines.append(f"{_COUNTS}{len(now.models())} models: {counts}.")
    section = "\n".join([f"## {version} ({date})", "", *lines, ""])
    return "\n".join([_HEADING, section, *(s.rstrip() + "\n" for s in sections)])
