"""What goes into a release: the models that are done."""

from __future__ import annotations

from pathlib import Path

from harness import registry
from harness.campaign.plan import Unit, missing
from harness.campaign.spectrum import rows_of
from harness.errors import UserError
from harness.registry import ModelEntry


def unfinished(source: Path, registry_dir: Path | None = None) -> dict[str, str]:
    """Return the models of a folder that stay out of a release, with the reason.

    A model is finished when every training run and spectrum of its entry is there, or a row of
    status failed or pending says why one is not.
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
