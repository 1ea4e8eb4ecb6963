"""Which models of a folder of tables were verified: a note beside the tables, bound to the rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from spectra_db import store
from spectra_db.files import sha256_of, whole

if TYPE_CHECKING:
    from harness.submission.verify import Check

NOTE = "verified.json"


def mark_verified(root: Path, checks: Sequence[Check]) -> None:
    """Note the models of which recomputed rows agreed and none deviated; unmark those that deviate.

    Args:
        root: Folder of tables.
        checks: What came of a sample of its rows.

    Raises:
        UserError: The tables are not in a folder.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder of tables: what is verified is noted beside them")
    notes = _read(root)
    wrong = {check.model for check in checks if check.outcome == "deviates"}
    agreed = Counter(check.model for check in checks if check.outcome == "agrees")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for model, num_rows in agreed.items():
        note = {"spectra_sha256": _digest(root, model), "num_rows": num_rows, "verified": now}
        notes[model] = note
    notes = {model: note for model, note in notes.items() if model not in wrong}
    with whole(root / NOTE) as part:
        part.write_text(json.dumps(notes, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def verified_models(root: Path) -> set[str]:
    """Return the models whose spectra are, byte for byte, those that a sample was verified of."""
    notes = _read(root)
    return {m for m, note in notes.items() if note["spectra_sha256"] == _digest(root, m)}


def _read(root: Path) -> dict[str, dict[str, Any]]:
    """Return the notes; a file that is none of ours counts as empty."""
    try:
        notes = json.loads((root / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(notes, dict):
        return {}
    return {m: n for m, n in notes.items() if isinstance(n, dict) and "spectra_sha256" in n}


def _digest(root: Path, model: str) -> str | None:
    """Return the sha256 of a model's spectra; None where there are none."""
    try:
        return sha256_of(store.path_of(root, "spectra", model))
    except (OSError, store.InvalidTable):
        return None
