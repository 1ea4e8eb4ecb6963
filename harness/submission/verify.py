"""Recompute published rows from their recorded seeds, one probe each."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import spectra_db
from harness.errors import UserError, reason_of
from harness.records.derived import derived
from harness.registry import ModelEntry
from harness.submission import locate
from harness.submission.recompute import (
    Means,
    TooLong,
    Wrong,
    checkpoint_of,
    problem_of,
    product_error,
    recompute,
)
from harness.training.stages import checkpoint_path
from spectra_db import rules, store, verified
from spectra_db.derived import DERIVED, differences, rows_of, wrong_rules
from spectra_db.loading import optional
from spectra_db.verified import Extent


@dataclass(frozen=True)
class Check:
    """What came of one row.

    Attributes:
        model, stage, partition, block, probe: Which row; of a training run stage is "training",
            block its optimizer and rate, probe its seed; of a table made anew stage is "table".
        outcome: agrees, deviates, or unverifiable: it can't be recomputed here.
        deviation: Distance between the published rule and the recomputed one, as
            `spectra_db.rules.Difference` has it, over the published rule's rms eigenvalue; None
            where nothing was recomputed.
        allowed: The largest deviation that rounding and the truncation error explain.
        reason: Why the outcome is not agrees.
    """

    model: str
    stage: str
    partition: str
    block: str
    probe: int
    outcome: str
    deviation: float | None = None
    allowed: float | None = None
    reason: str | None = None


def sample_rows(rows: pd.DataFrame, num_rows: int, seed: int) -> pd.DataFrame:
    """Draw rows of table `spectra`, without replacement, in random order."""
    return rows.sample(n=min(num_rows, len(rows)), random_state=seed)


def at_hand(
    rows: pd.DataFrame,
    find_entry: Callable[[str], ModelEntry],
    checkpoint_dir: Path | None,
) -> pd.DataFrame:
    """Return the rows whose weights follow from their seed, or whose checkpoint is there.

    Args:
        rows: Rows of table `spectra`.
        find_entry: As `verify_sample`; rows of entries that it doesn't know are left out.
        checkpoint_dir: Folder of checkpoints; None for none.
    """

    def is_there(model: str, stage: str, seed: int) -> bool:
        try:
            needed = checkpoint_of(find_entry(model), stage, seed)
        except UserError:
            return False
        if needed is None or checkpoint_dir is None:
            return needed is None
        return checkpoint_path(checkpoint_dir, *needed).is_file()

    places = rows[["model", "stage", "init_seed"]]
    known = {p: is_there(*p) for p in places.drop_duplicates().itertuples(index=False, name=None)}
    return rows[[known[place] for place in places.itertuples(index=False, name=None)]]


def verify(
    row: dict[Any, Any],
    entry: ModelEntry,
    stages: pd.DataFrame,
    means: Means,
) -> Check:
    """Recompute one row of table `spectra` and compare.

    The rule must be that of its coefficients, data and batch those of the entry here, and the first
    coefficients and the rules as close as `spectra_db.rules` says.

    Args:
        row: The published row.
        entry: Its entry.
        stages: Rows of table `stages` published beside it; they have the checkpoints' sha256.
        means: Where data and checkpoints lie, where to compute, and until when.

    Raises:
        TooLong: By the time of its second product it would end later.
    """
    try:
        if wrong_rules(pd.DataFrame([row])).any():
            raise Wrong("the rule is not that of its alphas and betas")
        problem = problem_of(row, entry, stages, means)
        other = recompute(row, problem, means)
        found = rules.compare(row | other, row)
        if not found.is_explained:  # are products of this network further off than most are?
            with suppress(UserError, RuntimeError):  # float64 is not everywhere: then it stays
                off = product_error(row, problem, means.device)
                found = rules.compare(row | other, row, product_error=off)
    except TooLong:
        raise
    except UserError as error:
        return _check(row, "unverifiable", reason=str(error))
    except Wrong as error:
        return _check(row, "deviates", reason=str(error))
    except Exception as error:  # of the author's code
        said = reason_of(error) + locate.frame_of(error)
        return _check(row, "unverifiable", reason=said)
    rms = float(np.sqrt(row["weights"] @ row["nodes"] ** 2))
    if rms == 0.0:
        return _check(row, "deviates", reason="the published rule is zero, its status is ok")
    outcome, reason = "deviates", None
    if not found.is_first_alike:
        reason = (
            f"the first products differ by {found.first:.1e} of their size: another probe or batch"
        )
    elif not found.is_explained:
        reason = "the rules are further apart than rounding and truncation explain"
    elif not found.is_telling:
        outcome, reason = (
            "unverifiable",
            (
                f"products in {row['dtype']}, precision {row['matmul_precision']}, may be off by "
                f"{found.product:.1e} of their norm here, which another probe's may differ by, too"
            ),
        )
    else:
        outcome = "agrees"
    size = {"deviation": found.distance / rms, "allowed": found.allowed / rms}
    return _check(row, outcome, **size, reason=reason)


def verify_sample(
    rows: pd.DataFrame,
    stages: pd.DataFrame,
    find_entry: Callable[[str], ModelEntry],
    means: Means,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Check]:
    """Verify rows one after another; give up those that would not end before the deadline.

    What a row takes follows from its second product here.

    Args:
        rows: Rows of table `spectra`, as `sample_rows` returns them.
        stages: Table `stages` beside them.
        find_entry: Name ↦ entry; raises UserError for a name it doesn't know.
        means: As `verify`.
        on_progress: Called with (rows done, rows in all).

    Returns:
        One check per row that was not given up, in the order of the rows.
    """
    checks = []
    for done, row in enumerate(rows.to_dict("records")):
        on_progress(done, len(rows))
        if time.monotonic() > means.deadline:
            break
        try:
            entry = find_entry(row["model"])
        except UserError as error:
            checks.append(_check(row, "unverifiable", reason=str(error)))
            continue
        mine = stages[stages["model"].isin([entry.name, entry.pretrained])]
        with suppress(TooLong):
            checks.append(verify(row, entry, mine, means))
    on_progress(len(rows), len(rows))
    return checks


def mark_verified(
    root: Path, checks: Sequence[Check], chosen: pd.DataFrame, rows: pd.DataFrame
) -> None:
    """Note which models everything that was drawn agreed of, and how much that was.

    Args:
        root: Folder of tables.
        checks: What came of the rows, runs and tables.
        chosen: The rows that were drawn.
        rows: All rows that could be drawn.

    Raises:
        UserError: The tables are not in a folder.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder of tables: what is verified is noted beside them")
    agreed, wrong = {}, set()
    for model, drawn in chosen.groupby("model"):
        mine = [check for check in checks if check.model == model]
        outcomes = {check.outcome for check in mine}
        places = Counter(check.stage for check in mine)
        runs, tables = places.pop("training", 0), places.pop("table", 0)
        if "deviates" in outcomes:
            wrong.add(str(model))
        elif outcomes == {"agrees"} and len(mine) - runs - tables == len(drawn):
            known = runs_of(rows_of(root, "training", str(model)))
            holds = int(rows["model"].eq(model).sum())
            agreed[str(model)] = Extent(len(drawn), holds, runs, len(known))
    verified.mark(root, agreed, wrong)


def runs_of(training: pd.DataFrame) -> list[tuple[str, float, int]]:
    """Return (optimizer, rate, seed) of each training run that did not diverge."""
    found = training.loc[~training["diverged"], ["optimizer", "lr", "seed"]].drop_duplicates()
    return list(found.itertuples(index=False, name=None))


def _check(row: dict[Any, Any], outcome: str, **found: Any) -> Check:
    names = ("model", "stage", "partition", "block", "probe")
    return Check(**{name: row[name] for name in names}, outcome=outcome, **found)


def verify_tables(
    folder: Path, models: Collection[str], find_entry: Callable[[str], ModelEntry]
) -> list[Check]:
    """Make tables anew that follow from others, and compare; one check per model and table.

    Args:
        folder: Folder of tables.
        models: Their names; the gap of one whose entry is not known can't be made anew.
        find_entry: As `verify_sample`.
    """
    checks = []
    for model in sorted(models):
        row = {"model": model, "stage": "table", "partition": "", "probe": 0}
        known, unknown = derived(find_entry), ""
        try:
            find_entry(model)
        except UserError as error:
            unknown = str(error)
        for table, derive in known.items():
            if not store.path_of(folder, table, model).is_file():
                continue
            if unknown and table not in DERIVED:
                checks.append(_check(row | {"block": table}, "unverifiable", reason=unknown))
                continue
            found = differences(folder, {table: derive}, models=[model])
            outcome = "deviates" if found else "agrees"
            checks.append(_check(row | {"block": table}, outcome, reason="; ".join(found) or None))
    return checks


def load_published(source: Path | None, model: str | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of table `spectra` that hold a rule, and table `stages`.

    Args:
        source: A folder of tables; None for the bundled release.
        model: Of which; None for all.

    Raises:
        NotFound: The folder holds no spectra, or none of the model.
        UserError: None of them came of it.
    """
    only = {} if model is None else {"model": model}
    spectra = spectra_db.load("spectra", source=source, **only)
    rows = spectra[spectra["status"] == "ok"]
    if rows.empty:
        raise UserError(f"none of {len(spectra)} rows holds a spectrum: all failed, wait or are 0")
    return rows, optional("stages", source)  # there is none beside initial spectra alone
