"""Published tables verified: which they are, what is drawn of them, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harness.errors import UserError
from harness.records.ledger import Ledger
from harness.registry import ModelEntry
from harness.submission.recompute import Means
from harness.submission.retrain import verify_runs
from harness.submission.submit import check_registry, reseal, tables_of
from harness.submission.verify import (
    Check,
    at_hand,
    load_published,
    mark_verified,
    sample_rows,
    verify_sample,
    verify_tables,
)
from spectra_db.loading import folder_of

FindEntry = Callable[[str], ModelEntry]


@dataclass(frozen=True)
class Published:
    """Tables, and what lies beside them.

    Attributes:
        source: Their folder; None: the bundled release.
        model: The one that is meant; None: all of them.
        checkpoints: Folder of checkpoints; None: there is none.
        submission: The submission that they are part of, if they are part of one.
    """

    source: Path | None
    model: str | None
    checkpoints: Path | None
    submission: Path | None


@dataclass(frozen=True)
class Sample:
    """Rows of table `spectra` that are drawn.

    Attributes:
        rows: All that hold a rule.
        chosen: Those drawn, in random order.
        stages: Table `stages` beside them.
        num_away: Rows of checkpoints that are not here, or of unknown entries.
    """

    rows: pd.DataFrame
    chosen: pd.DataFrame
    stages: pd.DataFrame
    num_away: int


@dataclass(frozen=True)
class Checks:
    """What came of rows, of tables that follow from others, and of training runs.

    Attributes:
        folder: Of the tables.
        rows, tables, runs: The checks of each.
    """

    folder: Path
    rows: list[Check]
    tables: list[Check]
    runs: list[Check]

    @property
    def all(self) -> list[Check]:
        """All checks."""
        return [*self.rows, *self.tables, *self.runs]

    @property
    def agree(self) -> bool:
        """Whether nothing deviates, and some row agrees."""
        deviates = any(check.outcome == "deviates" for check in self.all)
        return not deviates and any(check.outcome == "agrees" for check in self.rows)


def find(
    target: str, source: Path | None, registry: Path | None, checkpoints: Path | None
) -> Published:
    """Find the tables that are meant; nothing of a submission is executed.

    Args:
        target: A model, a folder of tables or a submission; empty: all models of the source.
        source: Folder of tables, where the target is no folder; None: the bundled release.
        registry: Folder of further entry files.
        checkpoints: Folder of checkpoints; None: the one beside the tables, if there is one.

    Raises:
        UserError: There is no such folder, two are named, or it is a submission with problems or
            of a model that the registry doesn't know.
    """
    submission = None
    beside = None if source is None else Ledger(source).checkpoints
    if target and Path(target).is_dir():
        if source is not None:
            raise UserError(f"{target} is a folder, and --source names another: pass one of them")
        folder, target = Path(target), ""
        source, beside = tables_of(folder)
        check_registry(folder, registry)
        submission = folder if source != folder else None
    elif "/" in target:
        raise UserError(f"there is no folder {target}; name one, or a model of the tables")
    if checkpoints is None and beside is not None and beside.is_dir():
        checkpoints = beside
    return Published(source, target or None, checkpoints, submission)


def draw(published: Published, find_entry: FindEntry, num_rows: int, seed: int) -> Sample:
    """Draw rows of those whose weights are here; of all where none is.

    Args:
        published: The tables.
        find_entry: Name ↦ entry; raises UserError for a name it doesn't know.
        num_rows: Rows at most.
        seed: Draws them.

    Raises:
        NotFound, UserError: As `load_published`.
    """
    rows, stages = load_published(published.source, published.model)
    here = at_hand(rows, find_entry, published.checkpoints)
    chosen = sample_rows(here if len(here) else rows, num_rows, seed)
    return Sample(rows, chosen, stages, len(rows) - len(here))


def verify_all(
    published: Published,
    sample: Sample,
    find_entry: FindEntry,
    means: Means,
    *,
    num_runs: int,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Checks:
    """Verify what is drawn, and of its models the tables that follow and some training runs.

    Args:
        published: The tables.
        sample: What is drawn of them.
        find_entry: As `draw`.
        means: Where data and checkpoints lie, where to compute, and until when.
        num_runs: Training runs at most.
        seed: Draws them.
        on_progress: Called with (rows done, rows in all).
    """
    of_rows = verify_sample(
        sample.chosen, sample.stages, find_entry, means, on_progress=on_progress
    )
    models = sorted(set(sample.chosen["model"]))
    folder = folder_of(published.source, paths=[f"*/{model}.parquet" for model in models])
    of_tables = verify_tables(folder, models, find_entry)
    of_runs = verify_runs(folder, models, find_entry, num_runs, means, seed=seed)
    return Checks(folder, of_rows, of_tables, of_runs)


def note_verified(published: Published, sample: Sample, checks: Checks) -> None:
    """Note which models agree, beside the tables; a submission lists the note."""
    mark_verified(checks.folder, checks.all, sample.chosen, sample.rows)
    if published.submission is not None:
        reseal(published.submission)
