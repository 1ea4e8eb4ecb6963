"""The files of `harness leaderboard`: Parquet of the dataset, and CSV for spreadsheets."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from harness.leaderboard.statistics import measurements
from harness.leaderboard.tables import Dataset
from spectra_db import store
from spectra_db.files import whole

# Of `measurements`, what a reader of the CSV needs.
COLUMNS = [
    *("model", "family", "tier", "task", "num_params", "stage", "partition"),
    *("metric", "scale", "sigma", "estimate", "standard_error", "truncation_error"),
    *("num_products", "block_products", "gap", "gap_standard_error", "gap_ci_low", "gap_ci_high"),
    *("sgd_loss", "init_loss", "at_edge", "adam_needed", "provenance", "enters"),
]


def export(data: Dataset, board: pd.DataFrame, out: Path) -> list[Path]:
    """Write table `leaderboard` and the CSV files beside it; return their paths.

    The table is derived: what an earlier one had is gone.
    """
    folder, table = out / "leaderboard", store.path_of(out, "leaderboard", "all")
    if len(board):
        store.write(out, "leaderboard", board, replace=True)
    else:
        table.unlink(missing_ok=True)
    # A folder that is published ships no lock; nothing but this function writes the table.
    table.with_name(f".{table.name}.lock").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    joined = measurements(data.models, data.heterogeneity, data.gaps)
    of_model = data.models.set_index("model")["provenance"]
    joined["provenance"] = joined["model"].map(of_model)
    files = {
        "leaderboard.csv": board,
        "models.csv": joined[COLUMNS].sort_values(["model", "stage", "metric", "scale"]),
        "pending.csv": data.pending,
    }
    for name, rows in files.items():
        with whole(folder / name) as part:
            rows.apply(_plain).to_csv(part, index=False)
    return [*([table] if len(board) else []), *(folder / name for name in files)]


def _plain(column: pd.Series) -> pd.Series:
    """Quote texts that a spreadsheet would take for a formula, by an apostrophe."""
    if not pd.api.types.is_string_dtype(column):
        return column
    return column.str.replace(r"^(?=[=+\-@\t\r])", "'", regex=True)
