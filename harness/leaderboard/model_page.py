"""What a model's page draws: its blocks' scales and densities, distances, training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.leaderboard.tables import in_network_order
from harness.registry.entry import partition_of
from spectra_db.densities import density
from spectra_db.derived import standard
from spectra_db.extremes import at_a_gap, without_each
from spectra_db.heterogeneity import pairwise_js
from spectra_db.loading import optional
from spectra_db.plot import FLOOR, KINDS
from spectra_db.schema import BEST_RATES
from spectra_db.words import in_order

_BINS_PER_UNIT = 20  # of the axis, which is arsinh of the eigenvalue: σ = 0.05 near zero
_POINTS = 250  # of a training curve
# Of both protocols' runs, and of their ends.
_RUN = ["optimizer", "lr", "seed", "step", "value", "diverged"]
_END = ["optimizer", "seed", "value"]


def charts(
    name: str, tier: str, source: Path | str | None, *, weights_alone: bool = False
) -> dict[str, Any]:
    """Return the data of a model's figures.

    `kinds` gives kinds of blocks their colours; `blocks` names the blocks, in the network's order,
    and their kinds; `scales` has per stage their rms eigenvalues, in that order, null where not
    known; `spectra` per stage and block the density as [first bin, log10 in hundredths, ...] over
    bins of arsinh of the scaled eigenvalue, null where it is below the floor; `heatmaps` per
    stage the distances in thousandths, without biases if `weights_alone`, and `_readings` of them;
    `full` the spectra of all parameters as one block; `training` the training runs, None where
    there are none.
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
        "kinds": KINDS,
        "scales": {},
        "training": _training(name, source),
    }
    named: dict[str, str] = {}
    for stage in in_order(rows["stage"]):
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
                "readings": _readings(distances, compared),
            }
    found["blocks"] = [{"name": block, "kind": kind} for block, kind in named.items()]
    found["scales"] = _scales(optional("blocks", source, model=name), list(named))
    return found


def _readings(distances: pd.DataFrame, rows: pd.DataFrame) -> dict[str, Any]:
    """Return which blocks make the mean of the distances, and where λ10 depends on the probes.

    `extreme` is the most extreme block, and `without` the mean of the others; `inner` that without
    embeddings, positions and heads, null where fewer than two blocks are left.
    """
    found: dict[str, Any] = {"extreme": None, "inner": None, "at_gap": at_a_gap(rows)}
    if len(distances) > 2:
        without = without_each(distances)
        found |= {"extreme": without.idxmin(), "without": round(float(without.min()), 4)}
    kinds = rows.drop_duplicates("block").set_index("block")["block_kind"]
    ends = kinds.index[kinds.isin(["embedding", "position", "head"])]
    inner = [name for name in distances if name not in ends]
    if 2 <= len(inner) < len(distances):
        pairs = distances.loc[inner, inner].to_numpy()[np.triu_indices(len(inner), 1)]
        found["inner"] = round(float(pairs.mean()), 4)
    return found


def _scales(blocks: pd.DataFrame, names: list[str]) -> dict[str, list[float | None]]:
    """Return each block's rms eigenvalue ‖H‖_F / √n at each stage, of the lowest seed."""
    found = {}
    for stage in in_order(blocks["stage"]):
        rows = blocks[blocks["stage"] == stage].sort_values(["init_seed", "train_run"])
        first = rows.drop_duplicates("block").set_index("block").reindex(names)
        sizes = first["frobenius"].to_numpy(float) / np.sqrt(first["num_params"].to_numpy(float))
        if np.any(sizes > 0):
            found[stage] = [float(f"{v:.4g}") if v > 0 else None for v in sizes]
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


def _training(name: str, source: Path | str | None) -> dict[str, Any] | None:
    """Return a model's training runs: those of protocol 2 where there are some, else protocol 1's.

    `loss` says what they are of; `grid` are those of the lowest seed at every rate, `tuned` those
    at each optimizer's best rate on the other seeds (the lowest where there are no others);
    `ends` their last losses on the fixed subset, where `loss` is not of it; `diverged` the rates
    at which a run of an optimizer did.
    """
    trials = optional("trials", source, model=name)
    ends = pd.DataFrame(columns=_END)
    if len(trials):
        result = optional("speedups", source, model=name)
        best, scored = _best_rates(result), result["num_seeds"].max() if len(result) else 0
        runs = _of_trials(trials[trials["seed"] <= scored])  # without those of tuning but the first
        loss = f"loss on a fixed training subset, in runs of {trials['num_steps'].min():,} steps"
    else:
        rows = optional("training", source, model=name)
        best = _best_rates(optional("gaps", source, model=name))
        rows = rows[rows["metric"] == "loss"]
        runs, loss = rows[rows["split"] == "batch"], "loss of the minibatch"
        ends = rows[rows["split"] == "train"].sort_values("step")
        ends = ends[ends["lr"] == ends["optimizer"].map(best)]
        ends = ends.drop_duplicates(["optimizer", "seed"], keep="last")
    if runs.empty:
        return None
    diverged = runs.loc[runs["diverged"].eq(True), ["optimizer", "lr"]].drop_duplicates()
    runs = runs[_RUN].dropna(subset="value")
    lowest = runs["seed"].min()
    at_best = runs[runs["lr"] == runs["optimizer"].map(best)]
    further = at_best[at_best["seed"] > lowest]
    tuned = further if len(further) else at_best
    ends = ends[ends["seed"].isin(set(tuned["seed"]))]
    return {
        "loss": loss,
        "grid": _curves(runs[runs["seed"] == lowest], best),
        "tuned": _curves(tuned, best),
        "ends": [
            {"optimizer": optimizer, "seed": seed, "loss": float(f"{value:.4g}")}
            for optimizer, seed, value in ends[_END].dropna(subset="value").itertuples(index=False)
        ],
        "diverged": {
            str(optimizer): sorted(float(f"{lr:.3g}") for lr in rows["lr"])
            for optimizer, rows in diverged.groupby("optimizer")
        },
    }


def _best_rates(result: pd.DataFrame) -> dict[str, float]:
    """Return each optimizer's best rate as a model's row of `speedups` or `gaps` has it."""
    known = {o: result[c].dropna() for o, c in BEST_RATES.items()}
    return {optimizer: float(rates.iloc[0]) for optimizer, rates in known.items() if len(rates)}


def _of_trials(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the losses of the runs of T steps, a row each."""
    runs = trials[trials["num_steps"] == trials["num_steps"].min()]
    long = runs.explode(["eval_steps", "eval_losses"])
    long = long.rename(columns={"eval_steps": "step", "eval_losses": "value"})
    return long.astype({"step": "float", "value": "float"})


def _curves(runs: pd.DataFrame, best: dict[Any, float]) -> list[dict[str, Any]]:
    """Return the runs' losses, those at the best rates marked."""
    curves = []
    for (optimizer, lr, _), run in runs.groupby(["optimizer", "lr", "seed"]):
        run = run.sort_values("step")
        run = run.iloc[:: max(1, len(run) // _POINTS)]
        curves.append(
            {
                "optimizer": optimizer,
                "lr": float(f"{lr:.3g}"),
                "seed": int(run["seed"].iloc[0]),
                "best": lr == best.get(optimizer),
                "diverged": bool(run["diverged"].any()),
                "steps": run["step"].astype(int).tolist(),
                "losses": [float(f"{v:.4g}") for v in run["value"]],
            }
        )
    return curves


def standing(model: dict[str, Any], models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return where a model stands among the others, for each number that it has.

    Each has a label, the model's value, those of the others, and how many of them are smaller.
    """
    found = []
    for key, label in (
        ("speedup", "log₂ of the steps SGD needs over AdamW's"),
        ("js0", "JS⁰ at initialisation"),
        ("gap", "SGD-Adam gap (protocol 1)"),
    ):
        others = [m[key] for m in models if m[key] is not None and m["model"] != model["model"]]
        if model[key] is not None and others:
            smaller = sum(value < model[key] for value in others)
            found.append(
                {"label": label, "value": model[key], "others": others, "smaller": smaller}
            )
    return found
