"""Which models of a folder of tables were verified: a note beside the tables, bound to the rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from spectra_db import store
from spectra_db.files import read_notes, sha256_of, write_notes
from spectra_db.schema import TABLES

NOTE = "verified.json"


@dataclass(frozen=True)
class Extent:
    """How much of a model was checked: rows of table `spectra` and training runs, of how many."""

    rows_checked: int
    rows: int
    runs_checked: int
    runs: int

    def __str__(self) -> str:
        text = f"{self.rows_checked} of {self.rows} rows"
        return text + (f", {self.runs_checked} of {self.runs} runs" if self.runs else "")


def mark(root: Path, agreed: Mapping[str, Extent], wrong: Collection[str]) -> None:
    """Note models of which everything that was drawn agreed; unmark those that deviate.

    Args:
        root: Folder of tables.
        agreed: Model ↦ how much was checked.
        wrong: Models of which something deviated.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    notes = _read(root) | {
        model: {"tables_sha256": digest_of(root, model), **asdict(extent), "verified": now}
        for model, extent in agreed.items()
    }
    write_notes(root / NOTE, {m: note for m, note in notes.items() if m not in wrong})


def verified_models(root: Path) -> dict[str, Extent]:
    """Return the models whose tables are, byte for byte, those that were verified: how much."""
    return {
        model: Extent(*(int(note[name]) for name in _COUNTS))
        for model, note in _read(root).items()
        if note["tables_sha256"] == digest_of(root, model)
    }


def copy(source: Path, target: Path) -> None:
    """Copy the note to the same tables written anew, whose bytes may differ."""
    notes = _read(source)
    kept = {
        model: note | {"tables_sha256": digest}
        for model, note in notes.items()
        if note["tables_sha256"] == digest_of(source, model)
        and (digest := digest_of(target, model)) is not None
    }
    if notes:
        write_notes(target / NOTE, kept)


_COUNTS = [field.name for field in fields(Extent)]


def _read(root: Path) -> dict[str, dict[str, Any]]:
    try:
        notes = read_notes(root / NOTE)
    except ValueError:  # none of ours: nothing is known to be verified
        notes = {}
    return {m: n for m, n in notes.items() if isinstance(n, dict) and _is_note(n)}


def _is_note(note: dict[str, Any]) -> bool:
    counts = [note.get(name) for name in _COUNTS]
    return "tables_sha256" in note and all(type(count) is int for count in counts)


def digest_of(root: Path, model: str) -> str | None:
    """Return a sha256 of all tables of a model; None where it has no spectra."""
    try:
        paths = {table: store.path_of(root, table, model) for table in TABLES}
        if not paths["spectra"].is_file():
            return None
        found = {table: sha256_of(path) for table, path in paths.items() if path.is_file()}
    except (OSError, store.InvalidTable):
        return None
    return sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
