"""Tables of several folders brought together in one: no row lost, none silently replaced."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from spectra_db import store
from spectra_db.files import NOTES
from spectra_db.schema import KEYS, TABLES
from spectra_db.words import WITH_RULE

# Differ between two computations of the same.
_TIMINGS = ("seconds", "peak_bytes", "run_id", "started", "command")
# Follow from other tables, of all folders together.
_DERIVED = ("gaps", "speedups", "leaderboard")

Key = tuple[object, ...]


@dataclass
class Merged:
    """What came of it.

    Attributes:
        added: Rows that the folder did not have before, by table.
        conflicts: What two folders say differently; then nothing is written.
        derived: Rows that differ since more is known now, and are left out to be derived again.
    """

    added: dict[str, int] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)
    derived: list[str] = field(default_factory=list)


def merge(sources: Sequence[Path], out: Path) -> Merged:
    """Add the rows of folders to those of another, with the runs that they came from.

    The probes of a block belong together, as do the steps of a training run: they come from one
    folder. Rows that are alike but for timings stay as the first folder has them, and those of
    status ok or zero take the place of failed and pending ones. Checkpoints are not brought along.

    Args:
        sources: Folders of tables.
        out: Where to; may hold tables already, or not be there.

    Raises:
        InvalidTable: A file is not valid, or files are of several protocols; nothing is written.
    """
    found = Merged()
    roots = [root for root in (out, *sources) if root.exists()]
    places = {p.relative_to(root) for root in roots for p in root.rglob("*.parquet")}
    plans = {}
    for place in sorted(p for p in places if p.parent.name in TABLES):
        plans[place] = _gather(roots, place, out, found)
    notes = _notes(roots, found)
    if found.conflicts:
        return found
    for place, (before, rows) in plans.items():
        table = place.parent.name
        if rows.num_rows:
            store.write(out / place.parents[1], table, rows.to_pylist(), replace=True)
        else:
            (out / place).unlink(missing_ok=True)
        found.added[table] = found.added.get(table, 0) + max(0, rows.num_rows - before)
    for place, source in notes.items():
        if not (out / place).exists():
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, out / place)
    return found


def _gather(roots: Sequence[Path], place: Path, out: Path, found: Merged) -> tuple[int, pa.Table]:
    """Return how many rows of a file are there already, and the rows of all roots."""
    table = place.parent.name
    kept: dict[Key, tuple[Path, pa.Table]] = {}
    again: set[Key] = set()
    before = 0
    versions: dict[int, Path] = {}
    for root in roots:
        if not (root / place).exists():
            continue
        rows = store.read(root / place, table)
        versions |= {int(v): root for v in rows["protocol_version"].unique().to_pylist()}
        if len(versions) > 1:
            unlike = ", ".join(f"{root} has protocol version {v}" for v, root in versions.items())
            raise store.InvalidTable(
                f"{place}: {unlike}; `harness dataset derive FOLDER` brings a folder up to date"
            )
        before = rows.num_rows if root == out else before
        for key, group in _groups(table, rows).items():
            first, known = kept.setdefault(key, (root, group))
            columns = ", ".join(_differing(known, group))
            if not columns:
                continue
            if table in _DERIVED:
                again.add(key)
            elif _is_good(group) and not _is_good(known):
                kept[key] = root, group
            elif _is_good(group):
                found.conflicts.append(
                    f"{place}: {_named(table, key)}: {first} and {root} differ in {columns}"
                )
    found.derived += [f"{place}: {_named(table, key)}" for key in sorted(again, key=str)]
    groups = [group for key, (_, group) in kept.items() if key not in again]
    return before, pa.concat_tables(groups) if groups else TABLES[table].empty_table()


def _names(table: str) -> list[str]:
    """Return the columns of the key of what comes from one folder."""
    return [name for name in KEYS[table] if name not in store.TOGETHER.get(table, ())]


def _groups(table: str, rows: pa.Table) -> dict[Key, pa.Table]:
    """Return the rows of each thing that comes from one folder, by its key."""
    names = _names(table)
    frame = rows.select(names).to_pandas()
    places = frame.groupby(names, sort=False, dropna=False).indices
    order = [(name, "ascending") for name in KEYS[table]]
    return {
        key if isinstance(key, tuple) else (key,): rows.take(some).sort_by(order)
        for key, some in places.items()
    }


def _differing(one: pa.Table, two: pa.Table) -> list[str]:
    """Return the columns that differ, beside timings."""
    return [n for n in one.schema.names if n not in _TIMINGS and not one[n].equals(two[n])]


def _is_good(rows: pa.Table) -> bool:
    if "status" not in rows.schema.names:
        return True
    return set(rows["status"].to_pylist()) <= set(WITH_RULE)


def _named(table: str, key: Key) -> str:
    pairs = zip(_names(table), key, strict=True)
    return ", ".join(f"{n} {v}" for n, v in pairs if n != "protocol_version" and v != "")


def _notes(roots: Sequence[Path], found: Merged) -> dict[Path, Path]:
    """Return the notes of entries' versions by place; of unlike ones, results don't go together."""
    notes: dict[Path, Path] = {}
    for root in roots:
        for path in sorted(root.glob(f"{NOTES}/*.json")):
            first = notes.setdefault(path.relative_to(root), path)
            if first.read_bytes() != path.read_bytes():
                found.conflicts.append(f"{first} and {path} are of different versions of the entry")
    return notes
