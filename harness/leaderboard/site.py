"""The page that shows the tables of a folder: one HTML file and its figures."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

import spectra_db
from harness.errors import UserError
from harness.registry.entry import partition_of
from spectra_db import plot
from spectra_db.heterogeneity import Estimate
from spectra_db.load import NotFound
from spectra_db.schema import STAGES, TABLES

# Of every interval on the page.
LEVEL = 0.95
# The settings of PROTOCOL's spectra; a folder may hold others beside them.
STANDARD = {
    "operator": "hessian",
    "norm_mode": "eval",
    "dtype": "float32",
    "probe_distribution": "gaussian",
}


def build(source: Path | str | None, out: Path) -> Path:
    """Write `index.html` and `figures/` into a folder.

    Args:
        source: Folder of tables, or None for the bundled release.
        out: Folder to write to; links to the tables work if it is the source itself.

    Returns:
        The path of the page.

    Raises:
        NotFound: The source has no table `models`.
        UserError: The folder can't be written to.
    """
    models = _load("models", source, required=True)
    figures = out / "figures"
    try:
        figures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{figures} can't be made: {error.strerror}") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("harness.leaderboard"), autoescape=True
    )
    sections = [_section(dict(row), source, out) for _, row in models.iterrows()]
    same = source is not None and Path(source).resolve() == out.resolve()
    page = environment.get_template("index.html").render(
        models=sections, links=same, protocol_version=spectra_db.PROTOCOL_VERSION
    )
    path = out / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _section(model: dict[str, Any], source: Path | str | None, out: Path) -> dict[str, Any]:
    """Gather what the page says of one model, and draw its figures."""
    name = model["model"]
    rows = _in_order(_load("spectra", source, model=name))
    partition = partition_of(model["tier"])
    stages = []
    for stage in STAGES:
        at_stage = _standard(rows[(rows["stage"] == stage) & (rows["partition"] == partition)])
        if len(at_stage):
            full = _standard(rows[(rows["stage"] == stage) & (rows["partition"] == "full")])
            stages.append(_stage(name, stage, at_stage, full, out))
    training = _load("training", source, model=name)
    curves = None
    if len(training):
        curves = _save(out, f"{name}-training", lambda: plot.training_curves(training))
    gaps = _load("gaps", source, model=name)
    runs = _load("runs", source, model=name).sort_values("started")
    return {
        **model,
        "stages": stages,
        "js0": next((s["js0"] for s in stages if s["stage"] == "init"), None),
        "curves": curves,
        "gap": _gap(gaps.iloc[0]) if len(gaps) else None,
        "runs": runs.to_dict("records"),
        "tables": [table for table in TABLES if len(_load(table, source, model=name))],
    }


def _standard(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one spectrum of several of a stage: the protocol's settings first, then low seeds."""
    if rows.empty:
        return rows
    settings = list(STANDARD)
    rank = (rows[settings] != pd.Series(STANDARD)).sum(axis=1)
    spectrum = [*settings, "init_seed", "train_run", "batch_hash"]
    first = rows.assign(rank=rank).sort_values(["rank", *spectrum], kind="stable").iloc[0]
    return rows[(rows[spectrum] == first[spectrum]).all(axis=1)]


def _stage(
    name: str, stage: str, at_stage: pd.DataFrame, full: pd.DataFrame, out: Path
) -> dict[str, Any]:
    """Draw a stage's figures and compute its JS⁰."""
    facts: dict[str, Any] = {"stage": stage, "js0": None}
    failed = at_stage[at_stage["status"] == "failed"]
    if len(failed):
        return facts | {"reason": failed["reason"].iloc[0]}
    prefix = f"{name}-{stage}"
    facts["spectra"] = _save(out, f"{prefix}-blocks", lambda: plot.spectra(at_stage))
    if len(full) and (full["status"] == "ok").all():
        facts["full"] = _save(out, f"{prefix}-full", lambda: plot.spectra(full))
    nonzero = at_stage.loc[at_stage["status"] == "ok", "block"].nunique()
    if nonzero >= 2:
        facts["heatmap"] = _save(out, f"{prefix}-js", lambda: plot.js_heatmap(at_stage))
        facts["js0"] = _interval(spectra_db.js0(at_stage))
    return facts


def _in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Sort blocks as a network is read: embeddings, layers by their numbers, the head."""
    ends = {"embedding": 0, "position": 0, "head": 2}

    def place(row: Any) -> tuple[int, list[tuple[int, str]], int]:
        words = re.findall(r"\d+|\D+", row.block)
        numbered = [(int(word), "") if word.isdigit() else (-1, word) for word in words]
        return ends.get(row.block_kind, 1), numbered, row.probe

    places = [place(row) for row in rows.itertuples()]
    return rows.iloc[sorted(range(len(rows)), key=places.__getitem__)]


def _interval(estimate: Estimate) -> str:
    """Write an estimate with its interval."""
    if estimate.corrected != estimate.corrected:
        return f"{estimate.value:.3f} (plug-in)"
    low, high = estimate.interval(LEVEL)
    return f"{estimate.corrected:.3f} [{low:.3f}, {high:.3f}]"


def _gap(row: pd.Series) -> dict[str, Any]:
    """Write a gap with its interval, or why there is none."""
    if row["status"] != "ok":
        return {"ok": False, "text": f"{row['status']}: {row['reason']}"}
    text = f"{row['gap']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    return {"ok": True, "text": text, "adam_needed": bool(row["adam_needed"])}


def _save(out: Path, name: str, draw: Callable[[], Any]) -> str:
    """Save a figure as SVG and return its path relative to the page."""
    import matplotlib as mpl

    relative = f"figures/{name}.svg"
    # No date and fixed ids: the same tables give the same bytes.
    with mpl.rc_context({"svg.hashsalt": name}):
        draw().savefig(out / relative, metadata={"Date": None})
    return relative


def _load(
    table: str, source: Path | str | None, *, required: bool = False, **filters: Any
) -> pd.DataFrame:
    """Load rows; none where the table or the model is not there and need not be."""
    try:
        return spectra_db.load(table, source=source, **filters)
    except NotFound:
        if required:
            raise
        return pd.DataFrame(columns=TABLES[table].names)
