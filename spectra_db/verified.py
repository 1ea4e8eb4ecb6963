"""Which models of a folder of tables were verified: a note beside the tables, bound to the rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spectra_db import store
from spectra_db.files import sha256_of, whole

NOTE = "verified.json"


def mark(root: Path, agreed: Mapping[str, int], wrong: Collection[str]) -> None:
    """Note models that a recomputed sample agreed of and none deviated; unmark those that deviate.

    Args:
        root: Folder of tables.
        agreed: Model ↦ number of rows that agreed.
        wrong: Models of which a row deviated.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    notes = _read(root) | {
        model: {"spectra_sha256": _digest(root, model), "num_rows": num_rows, "verified": now}
        for model, num_rows in agreed.items()
    }
    _write(root, {model: note for model, note in notes.items() if model not in wrong})


def verified_models(root: Path) -> set[str]:
    """Return the models whose spectra are, byte for byte, those that a sample was verified of."""
    notes = _read(root)
    return {m for m, note in notes.items() if note["spectra_sha256"] == _digest(root, m)}


def copy(source: Path, target: Path) -> None:
    """Copy the note to the same tables written anew, whose bytes may differ."""
    notes = _read(source)
    kept = {
        model: note | {"spectra_sha256": digest}
        for model, note in notes.items()
        if note["spectra_sha256"] == _digest(source, model)
        and (digest := _digest(target, model)) is not None
    }
    if notes:
        _write(target, kept)


def _read(root: Path) -> dict[str, dict[str, Any]]:
    """Return the notes; a file that is none of ours counts as empty."""
    try:
        notes = json.loads((root / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(notes, dict):
        return {}
    return {m: n for m, n in notes.items() if isinstance(n, dict) and "spectra_sha256" in n}


def _write(root: Path, notes: dict[str, dict[str, Any]]) -> None:
    with whole(root / NOTE) as part:
        part.write_text(json.dumps(notes, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _digest(root: Path, model: str) -> str | None:
    """Return the sha256 of a model's spectra; None where there are none."""
    try:
        return sha256_of(store.path_of(root, "spectra", model))
    except (OSError, store.InvalidTable):
        return None
