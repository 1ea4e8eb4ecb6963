"""The report of a submission: what was found, and where the model would stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from harness.leaderboard.report import answer
from harness.registry.entry import ModelEntry
from spectra_db.card import plain
from spectra_db.densities import SCALE
from spectra_db.loading import optional
from spectra_db.words import STAGES

_JS0 = {"metric": "js0", "scale": SCALE}


def render(entry: ModelEntry, data: Path) -> str:
    """Return the report in Markdown.

    Args:
        entry: The model.
        data: Folder of its tables.
    """
    [model] = optional("models", data).to_dict("records")
    runs, spectra = optional("runs", data), optional("spectra", data)
    products, seconds = int(spectra["num_products"].sum()), float(spectra["seconds"].sum())
    paragraphs = [
        f"# {entry.name}",
        *_rehearsal(entry),
        f"{plain(entry.description)}. Architecture: {plain(entry.reference)}. Code: "
        f"{plain(entry.source)}, licence {plain(entry.licence)}.",
        f"Family {entry.family}, task {entry.task}, {model['num_params']:,} parameters, "
        f"{model['num_blocks']} blocks of partition {entry.partition}, protocol "
        f"{model['protocol_version']}.",
        "## Heterogeneity",
        _heterogeneity(entry, data),
        "## Training",
        _gap(data),
        "## Where it would stand",
        _standing(entry, data),
        "## How it was made",
        f"{products:,} Hessian-vector products in {seconds / 60:.1f} minutes; code "
        f"{_values(runs, 'code_version')}; torch {_values(runs, 'torch_version')}; device "
        f"{_values(runs, 'device')}. Data: {_values(spectra, 'data_source')}.",
        "To recompute a sample of it, which executes the code in `entry/`:",
        "    harness verify FOLDER --registry FOLDER/entry",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _rehearsal(entry: ModelEntry) -> list[str]:
    """Say that it is no result, if it is none."""
    if not entry.is_rehearsal or entry.recipe is None:
        return []
    steps = entry.recipe.num_steps
    return [f"**A rehearsal: runs of {steps} steps. These numbers are no results.**"]


def _values(rows: pd.DataFrame, column: str) -> str:
    return plain(", ".join(sorted(set(rows[column].astype(str))))) or "not recorded"


def _heterogeneity(entry: ModelEntry, data: Path) -> str:
    """Return JS⁰ by stage, as a table."""
    rows = optional("heterogeneity", data, partition=entry.partition, **_JS0)
    if rows.empty:
        return "There is none: fewer than two blocks have a spectrum."
    lines = ["| stage | JS⁰ | standard error | blocks | zero blocks |", "|---|---|---|---|---|"]
    order = {stage: i for i, stage in enumerate(STAGES)}
    for row in rows.sort_values("stage", key=lambda c: c.map(order)).to_dict("records"):
        number = f"{row['corrected']:.3f} | {row['standard_error']:.3f}"
        if pd.isna(row["corrected"]):
            number = f"{row['value']:.3f} (plug-in) | –"
        lines.append(
            f"| {row['stage']} | {number} | {row['num_blocks']} | {row['num_zero_blocks']} |"
        )
    return "\n".join(lines)


def _gap(data: Path) -> str:
    rows = optional("gaps", data)
    if rows.empty:
        return "Not trained."
    [row] = rows.to_dict("records")
    if row["status"] != "ok":
        return f"The SGD-Adam gap is {row['status']}: {plain(row['reason'])}."
    edge = "; a best rate lies at the edge of its grid" if row["at_edge"] else ""
    needed = {
        "yes": "Adam is needed",
        "no": "Adam is not needed",
        "unclear": "whether Adam is needed is unclear",
    }.get(answer(row), "too little is learnt to tell whether Adam is needed")
    return (
        f"SGD-Adam gap {row['gap']:.3f} ± {row['standard_error']:.3f} over {row['num_seeds']} "
        f"seeds: {needed}. From a loss of {row['init_loss']:.4f}, SGD reaches "
        f"{row['sgd_loss']:.4f} at {row['sgd_lr']:.2g}, AdamW {row['adam_loss']:.4f} at "
        f"{row['adam_lr']:.2g}{edge}."
    )


def _standing(entry: ModelEntry, data: Path) -> str:
    """Return the model's place among those of the bundled release, by JS⁰ and by gap."""
    lines = []
    asked: list[tuple[str, str, str, dict[str, Any]]] = [
        ("JS⁰ at initialisation", "heterogeneity", "corrected", {"stage": "init", **_JS0}),
        ("SGD-Adam gap", "gaps", "gap", {"status": "ok"}),
    ]
    for what, table, column, only in asked:
        mine = optional(table, data, **only).dropna(subset=[column])
        others = optional(table, None, **only).dropna(subset=[column])
        if table == "heterogeneity":
            mine, others = (rows[rows["partition"] == entry.partition] for rows in (mine, others))
        others = others[others["model"] != entry.name].drop_duplicates("model")
        if mine.empty or others.empty:
            continue
        value = float(mine.iloc[0][column])
        lines.append(f"- {what} {value:.3f}: {_place(value, others, column)}.")
    return "\n".join(lines) or "There is no release with such models to compare it with."


def _place(value: float, others: pd.DataFrame, column: str) -> str:
    """Say which place a value takes, from the largest, and between whom."""
    ranked = others.sort_values(column, ascending=False)
    above, below = ranked[ranked[column] > value], ranked[ranked[column] <= value]
    text = f"place {len(above) + 1} of {len(ranked) + 1} from the largest"
    for word, rows in (("after", above.tail(1)), ("before", below.head(1))):
        for row in rows.to_dict("records"):
            text += f", {word} {row['model']} ({row[column]:.3f})"
    return text
