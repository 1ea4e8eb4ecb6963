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

from filelock import FileLock

from harness.errors import UserError
from harness.records.ledger import Ledger
from harness.registry.entry import ModelEntry
from harness.training.speedup import LENGTHS
from spectra_db.files import whole

FOLDER = "entries"
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
    spectra = spectra[spectra["status"].isin(["ok", "zero"])]
    if entry.trains and entry.recipe is not None:
        ends = runs.loc[(runs["split"] == "train") & (runs["step"] > 0) & ~runs["diverged"]]
        if strange := set(ends["step"]) - {entry.recipe.num_steps}:
            raise UserError(
                f"{out} holds runs of {entry.name} of {min(strange)} steps, its recipe has "
                f"{entry.recipe.num_steps}: name another --out"
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
    noted, facts = _read(out, entry.name), _facts(entry)
    for name in sorted(noted.keys() & facts.keys()):
        before, now = (json.dumps(found[name], sort_keys=True) for found in (noted, facts))
        if before != now:
            raise UserError(
                f"{out} holds results of another {entry.name}: its {name} was {before}, it is "
                f"{now} now: name another --out"
            )


def note(entry: ModelEntry, ledger: Ledger) -> None:
    """Note that what a folder holds of an entry is of this version."""
    path, noted = _path(ledger.folder, entry.name), _read(ledger.folder, entry.name)
    facts = noted | _facts(entry)
    if facts == noted:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        for torn in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
            torn.unlink(missing_ok=True)
        with whole(path) as part:
            part.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
    if entry.trains and entry.recipe is not None:
        recipe = asdict(entry.recipe)
        facts |= {f"recipe's {name}": recipe[name] for name in recipe if name not in _GRID}
    if entry.speedup is not None:
        recipe = asdict(entry.speedup)
        facts |= {f"speedup's {name}": recipe[name] for name in recipe if name not in _CLIMB}
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain


def _path(out: Path, model: str) -> Path:
    return out / FOLDER / f"{model}.json"


def _read(out: Path, model: str) -> dict[str, Any]:
    """Return the note; a file that is none of ours counts as empty."""
    try:
        noted = json.loads(_path(out, model).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}
