"""What of a release follows from its other tables, the leaderboard too. Imports no torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd

from harness import registry
from harness.leaderboard import statistics, tables
from harness.records.derived import derived
from spectra_db import store
from spectra_db.derived import Derive


def leaderboard(data: tables.Dataset) -> pd.DataFrame:
    """Return table `leaderboard`: a release's own, else made from the other tables."""
    if len(data.leaderboard):
        return data.leaderboard
    return statistics.leaderboard(data.models, data.heterogeneity, data.gaps)


def derive(folder: Path) -> None:
    """Write the table that is derived from all models of a folder together: `leaderboard`."""
    board = _board(folder)
    if len(board):
        store.write(folder, "leaderboard", board, replace=True)


def derived_of_release(registry_dir: Path | None = None) -> dict[str, Derive]:
    """Return what makes each derived table of a release anew, `leaderboard` too."""
    find_entry = partial(registry.get, registry_dir=registry_dir) if registry_dir else registry.get
    return derived(find_entry) | {"leaderboard": _board}


def _board(folder: Path, stored: pd.DataFrame | None = None) -> pd.DataFrame:
    data = tables.read(folder)  # entries that are not in it have no numbers to enter
    return statistics.leaderboard(data.models, data.heterogeneity, data.gaps)
