"""What goes into a release: the models that are done, and the tables derived from them."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from harness import registry
from harness.campaign.plan import Unit, missing
from harness.campaign.spectrum import rows_of
from harness.errors import UserError
from harness.records.derived import derived
from harness.registry import ModelEntry
from harness.registry.entry import MIN_STEPS
from spectra_db.derived import Derive


def unfinished(
    source: Path, registry_dir: Path | None = None, *, rehearsals: bool = False
) -> dict[str, str]:
    """Return the models of a folder that stay out of a release, with the reason.

    A model is finished when every training run and spectrum of its entry is there, or a row of
    status failed or pending says why one is not. A rehearsal is no result, unless `rehearsals` are
    asked for.
    """
    entries = {entry.name: entry for entry in registry.entries(registry_dir=registry_dir)}
    reasons = {}
    for path in sorted((source / "models").glob("*.parquet")):
        model = path.stem
        if model not in entries:
            reasons[model] = "not in the registry; --registry DIR adds entries"
            continue
        if (rows_of(source, "models", model)["status"] != "ok").any():
            continue  # the row has the reason
        entry = entries[model]
        try:
            left = [unit for unit in missing(entry, source) if not _explained(unit, entry, source)]
        except UserError as error:
            reasons[model] = str(error)
            continue
        gaps = rows_of(source, "gaps", model)
        if left:
            reasons[model] = f"{len(left)} units are missing, the first {left[0]}"
        elif entry.trains and gaps.empty:
            reasons[model] = "its gap is missing"
        elif entry.is_rehearsal and not rehearsals and entry.recipe is not None:
            reasons[model] = (
                f"its runs of {entry.recipe.num_steps} steps are a rehearsal, from {MIN_STEPS} on "
                "they are results"
            )
    return reasons


def _explained(unit: Unit, entry: ModelEntry, source: Path) -> bool:
    """Tell whether rows say why a unit is missing; moments wait for their stage's spectrum."""
    if unit.kind == "train":
        rows = rows_of(source, "gaps", unit.model)
    else:
        rows = rows_of(source, "spectra", unit.model)
        partition = unit.partition or entry.partition
        rows = rows[(rows["stage"] == unit.stage) & (rows["partition"] == partition)]
    return bool(rows["status"].isin(["failed", "pending"]).any())


def derive(folder: Path, registry_dir: Path | None = None) -> None:
    """Write the derived tables of a folder of tables: `leaderboard`, with its CSV files."""
    from harness.leaderboard import statistics, tables
    from harness.leaderboard.export import export

    data = tables.read(folder, registry_dir=registry_dir)
    board = statistics.leaderboard(data.models, data.heterogeneity, data.gaps)
    if len(board):
        export(data, board, folder)


def derived_of_release(registry_dir: Path | None = None) -> dict[str, Derive]:
    """Return what makes each derived table of a release anew, `leaderboard` too."""
    find_entry = partial(registry.get, registry_dir=registry_dir)
    return derived(find_entry) | {"leaderboard": partial(_board, registry_dir)}


def _board(registry_dir: Path | None, folder: Path, stored: pd.DataFrame) -> pd.DataFrame:
    """Return table `leaderboard`; raise where its CSV files hold other numbers."""
    from harness.leaderboard import statistics, tables
    from harness.leaderboard.export import export

    data = tables.read(folder, registry_dir=registry_dir)
    board = statistics.leaderboard(data.models, data.heterogeneity, data.gaps)
    with tempfile.TemporaryDirectory() as temporary:
        export(data, board, Path(temporary))
        # What is pending depends on the registry, which may have grown since.
        for name in ("leaderboard.csv", "models.csv"):
            made, there = Path(temporary, "leaderboard", name), folder / "leaderboard" / name
            if not there.is_file() or not _alike(pd.read_csv(there), pd.read_csv(made)):
                raise ValueError(f"{there} is not what the tables give")
    return board


def _alike(rows: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Tell whether two tables hold the same, to rounding."""
    if rows.shape != other.shape or list(rows) != list(other):
        return False
    numbers = [c for c in rows if pd.api.types.is_float_dtype(other[c])]
    close = np.allclose(rows[numbers], other[numbers], rtol=1e-5, atol=1e-7, equal_nan=True)
    return close and rows.drop(columns=numbers).equals(other.drop(columns=numbers))
