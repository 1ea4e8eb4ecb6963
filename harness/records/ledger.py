"""What a folder of results holds of an entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from harness.training.stages import checkpoint_path, run_name
from spectra_db import store
from spectra_db.schema import LISTS, TABLES

if TYPE_CHECKING:
    from harness.training import TrainingRun


@dataclass(frozen=True)
class Ledger:
    """A folder of results: the tables, and the checkpoints beside them.

    Attributes:
        folder: Need not exist yet.
    """

    folder: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "checkpoints"

    @property
    def halves(self) -> tuple[Ledger, Ledger]:
        """What the folder holds of the first and of the second half of batches."""
        return Ledger(self.folder / "halves" / "first"), Ledger(self.folder / "halves" / "second")

    @property
    def larger(self) -> Ledger:
        """What the folder holds of batches larger than a spectrum's."""
        return Ledger(self.folder / "larger_batch")

    def rows(self, table: str, model: str, **columns: Any) -> pd.DataFrame:
        """Return a model's rows of a table, none where there is no file; read once per change.

        Args:
            table: Name of the table.
            model: Name of the entry.
            **columns: Values that columns must have.

        Raises:
            InvalidTable: The file is damaged; says the remedy.
        """
        path = store.path_of(self.folder, table, model)
        try:
            state = path.stat()
        except FileNotFoundError:
            rows = TABLES[table].empty_table().to_pandas()
        else:  # a file is replaced as a whole, by another inode
            rows = _read(path, table, (state.st_ino, state.st_mtime_ns, state.st_size))
            rows = rows.copy(deep=False)
        kept = np.ones(len(rows), dtype=bool)
        for column, value in columns.items():
            kept &= rows[column].to_numpy() == value
        return rows[kept] if columns else rows

    def write(self, table: str, rows: pd.DataFrame | Sequence[Mapping[str, Any]]) -> None:
        """Add rows to a table in the place of those of the same keys, as `store.write`."""
        store.write(self.folder, table, rows)

    def checkpoint(self, model: str, stage: str, seed: int) -> Path:
        """Return where the checkpoint of a stage lies."""
        return checkpoint_path(self.checkpoints, model, seed, stage)

    def checkpoint_sha256(self, model: str, stage: str, seed: int) -> str | None:
        """Return the hash that table `stages` has of a checkpoint, None where it has none."""
        rows = self.rows("stages", model, optimizer="adamw", seed=seed, stage=stage)
        return None if rows.empty else str(rows.iloc[0]["checkpoint_sha256"])

    def write_stages(self, stage_rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of a run's stages; spectra of those whose weights changed are pending.

        They would be taken for those of the new weights, which nothing in their key tells apart.
        """
        if not stage_rows:
            return
        first = stage_rows[0]
        model, seed = first["model"], first["seed"]
        known = self.rows("stages", model, optimizer=first["optimizer"], seed=seed)
        before = dict(zip(known["stage"], known["checkpoint_sha256"], strict=True))
        now = {row["stage"]: row["checkpoint_sha256"] for row in stage_rows}
        changed = [stage for stage in now if before.get(stage, now[stage]) != now[stage]]
        if changed:
            rows = self.rows("spectra", model, train_run=run_name(seed), probe=0)
            stale = rows[rows["stage"].isin(changed)].copy()
            for column in LISTS:
                stale[column] = [()] * len(stale)
            reason = "the stage was trained again, with other weights"
            self.write("spectra", stale.assign(status="pending", reason=reason))
        self.write("stages", stage_rows)

    def write_training(self, run: TrainingRun) -> None:
        """Write the rows of a training run and of its stages."""
        self.write_stages(run.stage_rows)
        self.write("training", run.rows)


@lru_cache(maxsize=64)
def _read(path: Path, table: str, state: tuple[int, int, int]) -> pd.DataFrame:
    """Read a file in a state of it; whoever changes what it returns changes a copy."""
    return store.read(path, table).to_pandas()
