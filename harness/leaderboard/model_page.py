"""What a model's page draws: densities per block and stage, distances, training curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.leaderboard.tables import in_network_order
from harness.registry.entry import partition_of
from spectra_db.densities import density
from spectra_db.derived import standard
from spectra_db.heterogeneity import pairwise_js
from spectra_db.loading import optional
from spectra_db.schema import BEST_RATES
from spectra_db.words import STAGES

# Densities below this are not drawn: less than one eigenvalue of any block.
FLOOR = 1e-5
_BINS_PER_UNIT = 20  # of the axis, which is arsinh of the eigenvalue: σ = 0.05 near zero
_POINTS = 250  # of a training curve


def charts(
    name: str, tier: str, source: Path | str | None, *, weights_alone: bool = False
) -> dict[str, Any]:
    """Return the data of a model's figures.

    `blocks` names the blocks, in the network's order, and their kinds; `spectra` has per stage and
    block the density as [first bin, log10 in hundredths, ...] over bins of arsinh of the scaled
    eigenvalue, null where it is below the floor; `heatmaps` per stage the distances in
    thousandths, without biases if `weights_alone`; `full` the spectra of all parameters as one
    block; `curves` the training runs.
    """
    rows = optional("spectra", source, model=name)
    partition = partition_of(tier)
    found: dict[str, Any] = {
        "bins_per_unit": _BINS_PER_UNIT,
        "floor": FLOOR,
        "blocks": [],
        "spectra": {},
        "heatmaps": {},
        "full": {},
        "failed": {},
        "curves": _curves(
            optional("training", source, model=name), optional("gaps", source, model=name)
        ),
    }
    named: dict[str, str] = {}
    for stage in [stage for stage in STAGES if stage in set(rows["stage"])]:
        at_stage = rows[rows["stage"] == stage]
        ours = in_network_order(standard(at_stage[at_stage["partition"] == partition]))
        full = standard(at_stage[at_stage["partition"] == "full"])
        if len(full) and (full["status"] == "ok").all():
            found["full"][stage] = _binned(density(full))["__full__"]
        if ours.empty:
            continue
        named |= dict(zip(ours["block"], ours["block_kind"], strict=True))
        lacking = ours[ours["status"].isin(["failed", "pending"])]
        if len(lacking):
            found["failed"][stage] = str(lacking["reason"].iloc[0])
            continue
        if not (ours["status"] == "ok").any():
            found["failed"][stage] = "all blocks are exactly zero"
            continue
        found["spectra"][stage] = _binned(density(ours[ours["status"] == "ok"]))
        compared = ours[ours["block_kind"] != "bias"] if weights_alone else ours
        if compared.loc[compared["status"] == "ok", "block"].nunique() >= 2:
            distances = pairwise_js(compared)
            found["heatmaps"][stage] = {
                "blocks": list(distances.columns),
                "values": (1000 * distances.to_numpy()).round().astype(int).tolist(),
            }
    found["blocks"] = [{"name": block, "kind": kind} for block, kind in named.items()]
    return found


def _binned(densities: pd.DataFrame) -> dict[str, list[int | None]]:
    """Reduce densities to the highest of each bin of the axis, so that no peak is lost."""
    bins = np.floor(np.arcsinh(densities.index.to_numpy()) * _BINS_PER_UNIT).astype(int)
    highest = densities.groupby(bins).max()
    result: dict[str, list[int | None]] = {}
    for block in highest:
        column = highest[block]
        column = column[column > FLOOR].reindex(range(bins.min(), bins.max() + 1))
        known = np.flatnonzero(column.notna())
        if not len(known):
            result[str(block)] = []
            continue
        column = column.iloc[known[0] : known[-1] + 1]
        logs = 100 * np.log10(column.to_numpy())
        values = [None if np.isnan(v) else round(float(v)) for v in logs]
        result[str(block)] = [int(column.index[0]), *values]
    return result


def _curves(training: pd.DataFrame, gaps: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the minibatch losses of the grid's runs, those of the lowest seed.

    The best are those at the rates that the model's row of table `gaps` names.
    """
    if training.empty:
        return []
    losses = training[(training["metric"] == "loss") & (training["seed"] == training["seed"].min())]
    curves = []
    batch = losses[losses["split"] == "batch"].dropna(subset="value")
    for (optimizer, lr), run in batch.groupby(["optimizer", "lr"]):
        run = run.sort_values("step")
        run = run.iloc[:: max(1, len(run) // _POINTS)]
        curves.append(
            {
                "optimizer": optimizer,
                "lr": float(f"{lr:.3g}"),
                "best": lr in gaps[BEST_RATES[optimizer]].to_numpy(),
                "diverged": bool(run["diverged"].any()),
                "steps": run["step"].tolist(),
                "losses": [float(f"{v:.4g}") for v in run["value"]],
            }
        )
    return curves
