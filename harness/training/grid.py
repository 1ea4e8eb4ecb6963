"""The grid of learning rates, extended while the best is at an edge. Pure: rows in, rates out.

The rates of an optimizer are r_k = low * ratio^k, k = 0 .. num_lrs - 1, from `low` to `high` of the
recipe; an extension continues the same sequence to k < 0 or k >= num_lrs. At most `MAX_EXTENSIONS`
rates are added, two decades at half a decade each: a model whose best is further off has a wrong
range, and its gap says `at_edge`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from harness.registry.entry import Recipe
from spectra_db.words import OPTIMIZERS, listed

MAX_EXTENSIONS = 4
GRID_SEED = 0  # learning rates are chosen on seed 0 and never on the seeds of the gap


def learning_rates(recipe: Recipe, optimizer: str) -> list[float]:
    """Return the recipe's `num_lrs` log-spaced learning rates, ascending.

    Rounded to 6 digits, so that a rate is the same key in every table.
    """
    return [_rate(recipe, optimizer, k) for k in range(recipe.num_lrs)]


def final_losses(rows: pd.DataFrame, optimizer: str, seed: int = GRID_SEED) -> pd.Series:
    """Return the final losses of the finished runs, indexed by ascending learning rate.

    A run is finished when it has the loss on the fixed training subset (split "train") after its
    last step; a diverged one carries its initial loss there.
    """
    of = {"optimizer": optimizer, "seed": seed, "split": "train", "metric": "loss"}
    kept = rows["step"].to_numpy() > 0
    for column, value in of.items():  # by numpy: on few rows pandas takes ten times as long
        kept &= rows[column].to_numpy() == value
    last = dict(zip(*(rows[c].to_numpy()[kept].tolist() for c in ("lr", "value")), strict=True))
    rates = sorted(last)
    return pd.Series([last[lr] for lr in rates], pd.Index(rates, dtype=float), float, "value")


def grid_losses(recipe: Recipe, optimizer: str, rows: pd.DataFrame) -> pd.Series:
    """Return the final losses on seed 0 at the recipe's rates and those that continue them.

    Other rates, such as those tried by hand, are no part of the grid.

    Args:
        recipe: gives the range; `extend_grid` False leaves out what continues it.
        optimizer: "sgd" or "adamw".
        rows: table `training` of one model.
    """
    losses = final_losses(rows, optimizer)
    ks = _extended(recipe, optimizer, losses) if recipe.extend_grid else range(recipe.num_lrs)
    rates = [_rate(recipe, optimizer, k) for k in ks]
    found = losses.index.to_numpy(dtype=float)
    return losses[np.isclose(found[:, None], rates, rtol=1e-4).any(1)]


def best(rows: pd.DataFrame, optimizer: str, recipe: Recipe) -> float | None:
    """Return the rate of the grid of least final loss on seed 0, the smaller of equals, or None.

    Where a row of table `gaps` is there, it names this rate.

    Args:
        rows: table `training` of one model.
        optimizer: "sgd" or "adamw".
        recipe: gives the range.
    """
    losses = grid_losses(recipe, optimizer, rows)
    return None if losses.empty else float(losses.index.to_numpy()[losses.argmin()])


def pending(recipe: Recipe, optimizer: str, rows: pd.DataFrame) -> list[float]:
    """Return the learning rates to run next on seed 0; empty when the grid is complete.

    First what is missing of the recipe's grid; then, while the best is at an edge and the recipe
    allows it, the next rate beyond that edge.

    Args:
        recipe: gives the range.
        optimizer: "sgd" or "adamw".
        rows: table `training` of one model, so far.
    """
    losses = final_losses(rows, optimizer)
    missing = [lr for lr in learning_rates(recipe, optimizer) if not _has(losses, lr)]
    if missing:
        return missing
    ks, chosen = _extended(recipe, optimizer, losses), best(rows, optimizer, recipe)
    if not recipe.extend_grid or len(ks) - recipe.num_lrs >= MAX_EXTENSIONS or chosen is None:
        return []
    for edge, beyond in ((ks[0], ks[0] - 1), (ks[-1], ks[-1] + 1)):
        if np.isclose(chosen, _rate(recipe, optimizer, edge), rtol=1e-4):
            return [_rate(recipe, optimizer, beyond)]
    return []


def at_edge(recipe: Recipe, optimizer: str, rows: pd.DataFrame) -> bool:
    """Tell whether the best rate on seed 0 is the smallest or the largest of the grid."""
    losses = grid_losses(recipe, optimizer, rows)
    return not losses.empty and losses.idxmin() in (losses.index[0], losses.index[-1])


def _rate(recipe: Recipe, optimizer: str, k: int) -> float:
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; choose {listed(OPTIMIZERS)}")
    low, high = recipe.sgd_lrs if optimizer == "sgd" else recipe.adamw_lrs
    return float(f"{low * (high / low) ** (k / (recipe.num_lrs - 1)):.6g}")


def _has(losses: pd.Series, lr: float) -> bool:
    return bool(np.isclose(losses.index.to_numpy(dtype=float), lr, rtol=1e-4).any())


def _extended(recipe: Recipe, optimizer: str, losses: pd.Series) -> range:
    """Return the k of the recipe's grid and of the rates run beyond its ends without a gap."""
    low, high = 0, recipe.num_lrs
    while _has(losses, _rate(recipe, optimizer, low - 1)):
        low -= 1
    while _has(losses, _rate(recipe, optimizer, high)):
        high += 1
    return range(low, high)
