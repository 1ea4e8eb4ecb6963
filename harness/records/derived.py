"""What of a model's tables is made anew from others, where its entry is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from harness.errors import UserError
from harness.registry import ModelEntry, get
from harness.training.gap import FROM_REFERENCE, gap
from harness.training.reference import reference_loss
from harness.training.speedup import speedup
from spectra_db.derived import DERIVED, Derive, rows_of

FindEntry = Callable[[str], ModelEntry]


def derived(find_entry: FindEntry = get) -> dict[str, Derive]:
    """Return what makes each derived table of a model anew, for `spectra_db.derived`.

    Args:
        find_entry: Name ↦ entry, whose recipe has the grid; raises UserError for an unknown name.
            With our own entries, which are code, what was found to follow is not made again.
    """
    of_entries: dict[str, Callable[..., pd.DataFrame]] = {"gaps": _gaps, "speedups": _speedups}
    if find_entry is not get:
        of_entries = {t: partial(make, find_entry=find_entry) for t, make in of_entries.items()}
    return DERIVED | of_entries


def _entry(find_entry: FindEntry, model: str) -> ModelEntry:
    try:
        return find_entry(model)
    except UserError as error:
        raise ValueError(f"{error}; --registry DIR adds entries") from error


def _speedups(folder: Path, stored: pd.DataFrame, find_entry: FindEntry = get) -> pd.DataFrame:
    model = str(stored["model"].iloc[0])
    entry = _entry(find_entry, model)
    if entry.speedup is None:
        raise ValueError(f"the entry {model} has no trials")
    made = speedup(model, rows_of(folder, "trials", model), entry.speedup)
    return pd.DataFrame([made]).drop(columns="reason", errors="ignore")


def _gaps(folder: Path, stored: pd.DataFrame, find_entry: FindEntry = get) -> pd.DataFrame:
    """Return the gap of a model from its training; one that failed for want of runs says why."""
    model = str(stored["model"].iloc[0])
    entry = _entry(find_entry, model)
    if entry.recipe is None:
        raise ValueError(f"the entry {model} is not trained")
    known = stored["target_entropy"].iloc[0]  # of the data, which a release doesn't hold
    entropy = None if pd.isna(known) else float(known)
    made = gap(
        model,
        rows_of(folder, "training", model),
        entry.recipe,
        entropy=entropy,
        reference=partial(reference_loss, entry, entropy=entropy),
    )
    if entropy is None:  # a release before 0.10.0
        made = {name: value for name, value in made.items() if name not in FROM_REFERENCE}
    runs_failed = made["status"] == "pending" and stored["status"].iloc[0] in ("failed", "pending")
    kept = {} if runs_failed else {"status": made["status"]}
    left_out = ("status", "reason")
    return pd.DataFrame([{k: v for k, v in made.items() if k not in left_out} | kept])
