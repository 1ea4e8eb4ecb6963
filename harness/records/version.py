"""Which version of an entry a folder's results are of: a note per model beside the tables.

Rows say what a spectrum's batch and probes and a run's rate and steps were; of the network, the
task and the rest of the recipe the note does. A folder without one, such as a release, is taken
for the entry's.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.records.ledger import Ledger
from harness.registry.entry import ModelEntry
from harness.training.speedup import LENGTHS
from spectra_db.files import NOTES, locked, read_notes, write_notes
from spectra_db.words import WITH_RULE

# Runs at other rates are runs of the same grid.
_GRID = ("sgd_lrs", "adamw_lrs", "num_lrs", "extend_grid")
_CLIMB = ("sgd_lr", "adamw_lr")  # rates at which a climb begins


def check(entry: ModelEntry, ledger: Ledger, num_params: int | None = None) -> None:
    """Raise unless the results that the store holds of an entry are of this version of it.

    Args:
        entry: The entry.
        ledger: The folder.
        num_params: Of the model that it builds, where that is known.

    Raises:
        UserError: Their length, batch or model's size is another, or the note beside them differs.
    """
    out = ledger.folder
    runs = ledger.rows("training", entry.name)
    spectra = ledger.rows("spectra", entry.name)
    spectra = spectra[spectra["status"].isin(WITH_RULE)]
    if (recipe := entry.grid_recipe) is not None:
        ends = runs.loc[(runs["split"] == "train") & (runs["step"] > 0) & ~runs["diverged"]]
        if strange := set(ends["step"]) - {recipe.num_steps}:
            raise UserError(
                f"{out} holds runs of {entry.name} of {min(strange)} steps, its recipe has "
                f"{recipe.num_steps}: name another --out"
            )
    if strange := set(spectra["batch_size"]) - {entry.hessian_batch_size}:
        raise UserError(
            f"{out} holds spectra of {entry.name} on {min(strange)} samples, its batch has "
            f"{entry.hessian_batch_size}: name another --out"
        )
    trials = ledger.rows("trials", entry.name)
    if entry.speedup is not None:
        allowed = {length * entry.speedup.num_steps for length in LENGTHS}
        if strange := set(trials["num_steps"]) - allowed:
            raise UserError(
                f"{out} holds runs of {entry.name} of {min(strange)} steps, its recipe has "
                f"{', '.join(map(str, sorted(allowed)))}: name another --out"
            )
    if not (len(runs) or len(spectra) or len(trials)):
        return
    _check_note(entry, out)
    models = ledger.rows("models", entry.name)
    known = set(models.loc[models["status"] == "ok", "num_params"])
    if num_params is not None and (strange := known - {num_params}):
        raise UserError(
            f"{out} holds results of a {entry.name} of {min(strange):,} parameters, it has "
            f"{num_params:,} now: name another --out"
        )


def _check_note(entry: ModelEntry, out: Path) -> None:
    """Raise unless a folder's note, if there is one, is of this version of an entry."""
    noted, facts = _read(_path(out, entry.name)), _facts(entry)
    for name in sorted(noted.keys() & facts.keys()):
        before, now = (json.dumps(found[name], sort_keys=True) for found in (noted, facts))
        if before != now:
            raise UserError(
                f"{out} holds results of another {entry.name}: its {name} was {before}, it is "
                f"{now} now: name another --out"
            )


def note(entry: ModelEntry, ledger: Ledger) -> None:
    """Note that what a folder holds of an entry is of this version."""
    path = _path(ledger.folder, entry.name)
    noted = _read(path)
    facts = noted | _facts(entry)
    if facts != noted:
        with locked(path):
            write_notes(path, facts)


def _read(path: Path) -> dict[str, Any]:
    """Return a note; one that can't be read does not say which version the results are of."""
    try:
        return read_notes(path)
    except ValueError as error:
        raise UserError(
            f"{path}, which says of which version of the entry the results beside it are, can't "
            f"be read ({error}): restore it, or name another --out"
        ) from error


def _facts(entry: ModelEntry) -> dict[str, Any]:
    """Return what decides an entry's numbers and is in no row, as JSON has it."""
    facts: dict[str, Any] = {
        "factory": entry.factory,
        "options": dict(entry.options),
        "task": entry.task,
        "task_options": dict(entry.task_options),
        "pretrained": entry.pretrained,
        "paper_blocks": entry.paper_blocks,
        "blocks": dict(entry.blocks),
    }
    if entry.grid_recipe is not None:
        recipe = asdict(entry.grid_recipe)
        facts |= {f"recipe's {name}": recipe[name] for name in recipe if name not in _GRID}
    if entry.speedup is not None:
        recipe = asdict(entry.speedup)
        facts |= {f"speedup's {name}": recipe[name] for name in recipe if name not in _CLIMB}
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain


def _path(out: Path, model: str) -> Path:
    return out / NOTES / f"{model}.json"
