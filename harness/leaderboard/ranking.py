"""From tables `speedups` and `predictors` to the entries that the verdict is on. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness import registry
from harness.leaderboard.evidence import DUMMIES, PRIMARY, Pair
from harness.leaderboard.verdict import Gate, Verdict, verdict
from harness.predictors import PREDICTORS
from harness.registry import ranked
from spectra_db.loading import optional

# The reading that J is; the others, but for the dummies, are its rivals.
_J = next(p.name for p in PREDICTORS if p.label == "J")
RIVALS = {p.name: p.direction for p in PREDICTORS if p.name != _J and p.label != "0"}
_OUTCOMES = {
    "log2_speedup": "y",
    "standard_error": "y_error",
    "ci_low": "y_low",
    "ci_high": "y_high",
    "relative_gap": "y_prime",
}


@dataclass(frozen=True)
class Ranking:
    """What a folder says of the question.

    Attributes:
        verdict: The verdict.
        entries: A row per ranked entry whose speed-up is known, as `verdict` takes them.
        references: The same of reference entries: shown, not ranked.
        pending: Name of each other ranked entry, and why its speed-up is not known.
    """

    verdict: Verdict
    entries: pd.DataFrame
    references: pd.DataFrame
    pending: dict[str, str]


def ranking(folder: Path) -> Ranking:
    """Return the verdict on the tables of a folder.

    Args:
        folder: Folder of tables, such as that of the campaign.

    Raises:
        UserError: The tables contradict one another.
        InvalidTable: A table is not valid.
        InvalidRelease: A file of a release is not that of its manifest.
    """
    found: dict[str, list[dict[str, Any]]] = {"ranked": [], "reference": []}
    pending: dict[str, str] = {}
    for tier, rows in found.items():
        for entry in registry.entries(tier):
            row = _row(folder, entry)
            if isinstance(row, dict):
                rows.append(row)
            elif tier == "ranked":
                pending[entry.name] = row
    entries, references = (pd.DataFrame(rows, columns=_COLUMNS) for rows in found.values())
    there = set(entries["model"])
    pairs = [Pair(*pair) for pair in ranked.PAIRS if {*pair[1:]} <= there]
    said = verdict(entries, RIVALS, pairs, gate(folder))
    return Ranking(said, entries, references, pending)


def gate(folder: Path) -> Gate:
    """Tell whether the gate of protocol 2 holds, by the intervals."""
    reasons, unknown = [], []
    for model, expected in ranked.GATE.items():
        rows = optional("speedups", folder, model=model)
        found = rows.loc[rows["status"] == "ok", "adam_needed"]
        if found.isna().all():  # none, or not trained
            unknown.append(model)
        elif found.item() != expected:
            reasons.append(f"Adam needed for {model}: {found.item()}, not {expected}")
    return Gate(tuple(reasons), tuple(unknown))


_COLUMNS = [
    *("model", "family", "modality", "trained", "at_edge", "censored", "adam_needed"),
    *_OUTCOMES.values(),
    *(f"{name}{end}" for name in (PRIMARY, *RIVALS, *DUMMIES) for end in ("", "_error")),
]


def _row(folder: Path, entry: registry.ModelEntry) -> dict[str, Any] | str:
    """Return what the tables say of an entry, or why its speed-up is not known."""
    outcome = optional("speedups", folder, model=entry.name)
    if outcome.empty or outcome["status"].item() == "pending":
        return "training runs are missing"
    facts = outcome.iloc[0]
    row: dict[str, Any] = {
        "model": entry.name,
        "family": entry.family,
        "modality": ranked.modality(entry),
        "trained": outcome["trained"].eq(True).item(),
        "at_edge": facts["status"] == "failed",  # no best rate was found
        "censored": outcome["censored"].eq(True).item(),
        "adam_needed": facts["adam_needed"],
    }
    row |= {name: facts[column] for column, name in _OUTCOMES.items()}
    measured = optional("predictors", folder, model=entry.name)
    measured = measured[measured["status"] == "ok"]
    values = measured.groupby("predictor")["value"]
    means, errors = values.mean(), values.sem()  # over initialisations
    for name in (_J, *RIVALS, *DUMMIES):
        column = PRIMARY if name == _J else name
        row[column], row[f"{column}_error"] = means.get(name), errors.get(name)
    return row
