"""Take the predictors of registry entries: seed by seed, on a batch and on both its halves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness import tasks
from harness.campaign.metric import halves
from harness.campaign.spectrum import source_of, stored_rows
from harness.errors import UserError
from harness.estimator.batches import batch_hash
from harness.estimator.settings import Settings
from harness.predictors import FAMILIES, PREDICTORS, Value
from harness.predictors.curvature import of_blocks, of_full
from harness.predictors.dummies import of_problem
from harness.predictors.gradients import of_gradients
from harness.predictors.spectra import of_spectrum
from harness.records import version
from harness.records.ledger import Ledger
from harness.records.provenance import describe_run
from harness.registry import ModelEntry, Recipe
from harness.registry.entry import SpeedupRecipe
from harness.tasks.base import target_entropy
from harness.training import Problem, load_problem
from spectra_db.schema import VERSIONS

SEEDS = (1, 2, 3)
IMAGES, TOKENS = 512, 8192
# How much of its value a measure may differ between the halves of the batch.
STABLE = 0.2

Parts = tuple[dict[str, Value], dict[str, Value], dict[str, Value]]


def take(
    entry: ModelEntry,
    data_root: Path | None,
    out: Path,
    device: str | None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    command: str = "",
) -> pd.DataFrame:
    """Measure all predictors of an entry for three initialisations, and write what is missing.

    What is measured together is written together, so that the same command continues after a stop.
    The spectra are not taken here: those in the store are read, each time anew.

    Args:
        entry: An entry that is trained.
        data_root: Folder of data sets.
        out: Folder of the tables; OUT/checkpoints has the weights that the entry starts from.
        device: Where to compute; None: on the CPU.
        on_progress: Called with (families of predictors done, in all).
        command: The command line, for table `runs`.

    Returns:
        The entry's rows of table `predictors`.

    Raises:
        UserError: The entry is not trained or can't be measured.
    """
    settings, ledger = Settings(entry.partition, device=device), Ledger(out)
    steps = [(seed, family) for family in FAMILIES for seed in SEEDS]
    for done, (seed, family) in enumerate(steps):
        on_progress(done, len(steps))
        problem = load(entry, seed, data_root, ledger)
        if _is_done(problem, family, ledger):
            continue
        begin = time.perf_counter()
        if family == "spectrum":
            parts, facts = _from_store(problem, settings, ledger)
            if _lacks_halves_of_rows(problem, parts, ledger):
                continue
        else:
            parts, facts = _measure(problem, settings, family, data_root), _facts(problem)
        asked = {"predictors": family}
        run = describe_run(source_of(problem) | settings.key | asked, settings, command)
        facts |= {
            "model": entry.name,
            "init_seed": seed,
            "protocol_version": VERSIONS["predictors"],
            "seconds": time.perf_counter() - begin,
            "run_id": run["run_id"],
        }
        version.note(entry, ledger)
        ledger.write("runs", [run])
        ledger.write("predictors", [facts | row for row in _rows(family, parts)])
    on_progress(len(steps), len(steps))
    return ledger.rows("predictors", entry.name)


def load(entry: ModelEntry, seed: int, data_root: Path | None, ledger: Ledger) -> Problem:
    """Return an entry at initialisation with the predictors' batch: 512 images, or 8,192 tokens."""
    context = getattr(tasks.of(entry), "context", None)
    return load_problem(
        entry,
        "init",
        seed,
        data_root=data_root,
        checkpoint_dir=ledger.checkpoints,
        batch_size=IMAGES if context is None else max(1, TOKENS // context),
    )


def training_of(entry: ModelEntry) -> Recipe | SpeedupRecipe:
    """Return the recipe whose runs are compared.

    Raises:
        UserError: It has none.
    """
    recipe = entry.speedup or entry.recipe
    if recipe is None:
        raise UserError(f"{entry.name!r} is not trained: there is nothing to predict")
    return recipe


def _is_done(problem: Problem, family: str, ledger: Ledger) -> bool:
    """Tell whether the store has a family of predictors on this batch; of spectra never."""
    names = {p.name for p in PREDICTORS if p.family == family}
    of = {"init_seed": problem.init_seed, "batch_hash": batch_hash(problem.batches)}
    rows = ledger.rows("predictors", problem.entry.name, **of)
    rows = rows[rows["status"].isin(["ok", "failed"])]
    return family != "spectrum" and names <= set(rows["predictor"])


def _measure(problem: Problem, settings: Settings, family: str, data_root: Path | None) -> Parts:
    """Measure a family on the whole batch and on its halves."""
    if family == "problem":
        return _look(problem, data_root)
    batch = training_of(problem.entry).batch_size
    measures: dict[str, Callable[[Problem], dict[str, Value]]] = {
        "gradient": lambda part: of_gradients(part, settings, batch),
        "blocks": lambda part: of_blocks(part, settings),
        "full": lambda part: of_full(part, settings),
    }
    first, second = halves(problem, settings)
    measure = measures[family]
    return measure(problem), measure(first), measure(second)


def _look(problem: Problem, data_root: Path | None) -> Parts:
    """Measure what the task and the architecture say, the targets on the fixed training subset."""
    task, data = problem.task, problem.task.load(data_root)
    subset = task.training_subset(data, training_of(problem.entry).eval_size)
    entropy = target_entropy(task, subset)
    options = data.model_options
    num_classes = options.get("num_classes") or options.get("vocab_size")
    return of_problem(problem.model, entropy, num_classes), {}, {}


def _from_store(
    problem: Problem, settings: Settings, ledger: Ledger
) -> tuple[Parts, dict[str, Any]]:
    """Measure the spectra that the store has, of whichever batch, and say of which."""
    places = (ledger, *ledger.halves)
    found = [stored_rows(problem, settings, place, any_batch=True) for place in places]
    whole, first, second = ({} if rows.empty else of_spectrum(rows) for rows in found)
    if not whole:
        return (whole, first, second), _facts(problem)
    row = found[0].iloc[0]
    return (whole, first, second), {fact: row[fact] for fact in _facts(problem)}


def _lacks_halves_of_rows(problem: Problem, parts: Parts, ledger: Ledger) -> bool:
    """Tell whether the rows have these values with those of the halves, whose spectra are gone."""
    whole, *of_halves = parts
    rows = ledger.rows("predictors", problem.entry.name, init_seed=problem.init_seed)
    rows = rows.set_index("predictor")
    if all(of_halves) or not whole or not set(whole) <= set(rows.index):
        return False
    rows = rows.loc[list(whole)]
    has_halves = rows[["first_half", "second_half"]].notna().all(axis=None)
    values = [np.nan if found.value is None else found.value for found in whole.values()]
    return bool(has_halves and np.allclose(values, rows["value"], equal_nan=True))


def _facts(problem: Problem) -> dict[str, Any]:
    names = ("batch_size", "num_terms", "data_source")
    facts = {name: getattr(problem, name) for name in names}
    return facts | {"batch_hash": batch_hash(problem.batches)}


def _rows(family: str, parts: Parts) -> Iterator[dict[str, Any]]:
    """Yield the columns of each predictor of a family that say what was found."""
    nothing = Value(None)
    for predictor in (p for p in PREDICTORS if p.family == family):
        absent = replace(nothing, reason="no spectrum at init; take it: harness spectrum MODEL")
        whole = parts[0].get(predictor.name, absent)
        first, second = (part.get(predictor.name, nothing).value for part in parts[1:])
        status = "ok" if whole.value is not None else "pending" if whole is absent else "failed"
        yield {
            "predictor": predictor.name,
            "value": whole.value,
            "first_half": first,
            "second_half": second,
            "unstable": is_unstable(whole.value, first, second),
            "standard_error": whole.standard_error,
            "num_products": whole.num_products,
            "num_full_products": whole.num_full_products,
            "status": status,
            "reason": whole.reason,
        }


def is_unstable(value: float | None, first: float | None, second: float | None) -> bool | None:
    """Tell whether a measure on the two halves of a batch differs by more than 20 % of its value.

    >>> is_unstable(1.0, 0.95, 1.2), is_unstable(-1.0, -1.0, -1.1), is_unstable(1.0, None, 1.0)
    (True, False, None)
    """
    if value is None or first is None or second is None:
        return None
    return abs(first - second) > STABLE * abs(value)
