"""What goes into a release: the models that are done."""

from __future__ import annotations

from pathlib import Path

from harness import registry
from harness.campaign.plan import missing
from harness.campaign.unit import Unit
from harness.errors import UserError
from harness.records.ledger import Ledger
from harness.registry import ModelEntry
from harness.registry.entry import MIN_STEPS


def unfinished(
    source: Path, registry_dir: Path | None = None, *, rehearsals: bool = False
) -> dict[str, str]:
    """Return the models of a folder that stay out of a release, with the reason.

    A model is finished when every training run and spectrum of its entry is there, or a row of
    status failed or pending says why one is not. A rehearsal is no result, unless `rehearsals` are
    asked for.
    """
    entries = {entry.name: entry for entry in registry.entries(registry_dir=registry_dir)}
    reasons, ledger = {}, Ledger(source)
    for path in sorted((source / "models").glob("*.parquet")):
        model = path.stem
        if model not in entries:
            reasons[model] = "not in the registry; --registry DIR adds entries"
            continue
        if (ledger.rows("models", model)["status"] != "ok").any():
            continue  # the row has the reason
        entry = entries[model]
        try:
            left = [unit for unit in missing(entry, ledger) if not _explained(unit, entry, ledger)]
        except UserError as error:
            reasons[model] = str(error)
            continue
        gaps = ledger.rows("gaps", model)
        if left:
            reasons[model] = f"{len(left)} units are missing, the first {left[0]}"
        elif entry.grid_recipe and gaps.empty:
            reasons[model] = "its gap is missing"
        elif entry.is_rehearsal and not rehearsals and entry.recipe is not None:
            reasons[model] = (
                f"its runs of {entry.recipe.num_steps} steps are a rehearsal, from {MIN_STEPS} on "
                "they are results"
            )
    return reasons


def _explained(unit: Unit, entry: ModelEntry, ledger: Ledger) -> bool:
    """Tell whether rows say why a unit is missing; moments wait for their stage's spectrum.

    A trial that has its row is missing for the weights that it kept, which no release holds.
    """
    if unit.kind == "trial":
        columns = {"optimizer": unit.optimizer, "lr": unit.lr, "seed": unit.seed}
        return not ledger.rows("trials", unit.model, num_steps=unit.num_steps, **columns).empty
    if unit.kind == "train":
        rows = ledger.rows("gaps", unit.model)
    else:
        rows = ledger.rows("spectra", unit.model)
        partition = unit.partition or entry.partition
        rows = rows[(rows["stage"] == unit.stage) & (rows["partition"] == partition)]
    return bool(rows["status"].isin(["failed", "pending"]).any())
