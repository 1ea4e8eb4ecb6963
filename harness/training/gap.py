"""How far SGD falls behind AdamW. Pure: rows of table `training` in, one row of table `gaps` out.

With S, A, I the mean final losses of SGD and AdamW and the mean initial loss over the seeds,

    gap = (S - A) / (I - A).

The seeds are paired (same initialisation, same order of the data), so the error follows from the
residuals r_i = (S_i - A_i) - gap (I_i - A_i) by the delta method:

    standard_error = std(r) / (sqrt(n) (I - A)),    n - 1 degrees of freedom (Student's t).

That gap counts what needs no learning: how often each target occurs, or undoing a bad
initialisation. With R the loss of having learnt nothing (`reference.reference_loss`) there is also

    gap_from_reference = (min(S, R) - A) / (R - A),

only where AdamW learnt something, as protocol 2 asks of its entries (`learnt`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit  # scipy.stats takes a second to import

from harness.registry.entry import Recipe
from harness.training import grid
from spectra_db.schema import PROTOCOL_VERSION
from spectra_db.words import OPTIMIZERS, answer

Array = NDArray[np.float64]

SEEDS = (1, 2, 3)
CONFIDENCE = 0.95
QUANTILE = float(stdtrit(len(SEEDS) - 1, (1 + CONFIDENCE) / 2))
THRESHOLD = 0.1  # "Adam needed", fixed beforehand together with the two standard errors
LEAST_PROGRESS = 0.1  # of R: what AdamW must gain in every seed for an entry to count
# Columns that need R.
FROM_REFERENCE = (
    *("reference_loss", "trained", "gap_from_reference", "gap_from_reference_error"),
    *("gap_from_reference_low", "gap_from_reference_high", "adam_needed_now"),
)


def gap(
    model: str,
    rows: pd.DataFrame,
    recipe: Recipe,
    *,
    entropy: float | None = None,
    reference: Callable[[float], float] | None = None,
) -> dict[str, Any]:
    """Return the row of table `gaps` of one model.

    Args:
        model: its name.
        rows: table `training`; other models' rows are left out.
        recipe: the entry's recipe.
        entropy: H, of the targets' marginal over the fixed training subset; None where the targets
            are no classes.
        reference: from an initial loss to R; without it the columns that need R are null.

    Returns:
        The row. Its status is "ok"; "pending" while runs are missing; "failed" where the gap is
        undefined because AdamW's progress I - A is within noise (its 95 % interval reaches 0). The
        last two carry a reason and nulls for what is not known.
    """
    rows = rows[rows["model"] == model]
    row: dict[str, Any] = {"model": model, "protocol_version": PROTOCOL_VERSION}
    row |= dict.fromkeys(
        ("gap", "standard_error", "ci_low", "ci_high", "sgd_loss", "adam_loss", "init_loss")
    )
    row |= {"target_entropy": entropy} | dict.fromkeys(FROM_REFERENCE)
    rates = {optimizer: grid.best(rows, optimizer, recipe) for optimizer in OPTIMIZERS}
    row |= {"sgd_lr": rates["sgd"], "adam_lr": rates["adamw"]}
    row["at_edge"] = any(grid.at_edge(recipe, optimizer, rows) for optimizer in rates)
    row["num_lrs"] = min(len(grid.grid_losses(recipe, optimizer, rows)) for optimizer in rates)
    row |= {"num_seeds": 0, "adam_needed": None}

    left = {optimizer: grid.pending(recipe, optimizer, rows) for optimizer in rates}
    if any(left.values()):
        todo = "; ".join(f"{name} at {rest}" for name, rest in left.items() if rest)
        return row | {"status": "pending", "reason": f"learning rates not run on seed 0: {todo}"}
    losses = {
        optimizer: [grid.final_losses(rows, optimizer, seed).get(lr) for seed in SEEDS]
        for optimizer, lr in rates.items()
    }
    absent = [
        f"{name} seed {seed}"
        for name, values in losses.items()
        for seed, value in zip(SEEDS, values, strict=True)
        if value is None
    ]
    row["num_seeds"] = sum(None not in pair for pair in zip(*losses.values(), strict=True))
    if absent:
        return row | {"status": "pending", "reason": f"not run: {', '.join(absent)}"}

    sgd, adam = (np.array(losses[name], dtype=float) for name in OPTIMIZERS)
    starts = rows[(rows["step"] == 0) & (rows["split"] == "train") & (rows["metric"] == "loss")]
    # The loss before the first step, which both optimizers share.
    init = np.array([starts.loc[starts["seed"] == seed, "value"].mean() for seed in SEEDS])
    row |= {"sgd_loss": sgd.mean(), "adam_loss": adam.mean(), "init_loss": init.mean()}
    if reference is not None:
        row |= _from_reference(sgd, adam, np.array([reference(loss) for loss in init]))
    progress = init - adam
    noise = QUANTILE * progress.std(ddof=1) / math.sqrt(len(SEEDS))
    if progress.mean() <= noise:
        reason = (
            f"undefined: AdamW's progress {progress.mean():.3g} from the initial loss "
            f"{init.mean():.3g} is within noise ({noise:.3g})"
        )
        return row | {"status": "failed", "reason": reason}

    value, error = relative_gap(sgd, adam, init)
    return row | {
        "gap": value,
        "standard_error": error,
        "ci_low": value - QUANTILE * error,
        "ci_high": value + QUANTILE * error,
        "adam_needed": bool(needs_adam(value, error)),
        "status": "ok",
        "reason": None,
    }


def needs_adam(value: ArrayLike, error: ArrayLike) -> NDArray[np.bool_]:
    """Tell whether gaps are above the threshold, and above two of their standard errors."""
    gaps, errors = np.asarray(value, dtype=float), np.asarray(error, dtype=float)
    return (gaps > THRESHOLD) & (gaps > 2 * errors)


def _from_reference(sgd: Array, adam: Array, reference: Array) -> dict[str, Any]:
    """Return the columns that measure from R, given the losses of paired seeds."""
    trained = learnt(adam, reference)
    found: dict[str, Any] = {"reference_loss": reference.mean(), "trained": trained}
    if not trained:
        return found
    value, error = relative_gap(np.minimum(sgd, reference), adam, reference)
    low, high = value - QUANTILE * error, value + QUANTILE * error
    return found | {
        "gap_from_reference": value,
        "gap_from_reference_error": error,
        "gap_from_reference_low": low,
        "gap_from_reference_high": high,
        "adam_needed_now": answer(low, high, THRESHOLD),
    }


def learnt(adam: Array, reference: Array) -> bool:
    """Tell whether AdamW gained enough on R in every seed for a model to count as trained."""
    return bool((reference - adam >= LEAST_PROGRESS * reference).all())


def relative_gap(losses: ArrayLike, adam: ArrayLike, init: ArrayLike) -> tuple[float, float]:
    """Return Σ(L − L_adam) / Σ(L_init − L_adam) over paired seeds, and its standard error.

    Args:
        losses: Final losses, shape (seeds,).
        adam: Those of AdamW.
        init: Initial losses.
    """
    ours, best, start = (np.array(x, dtype=float) for x in (losses, adam, init))
    progress = start - best
    value = (ours - best).mean() / progress.mean()
    residuals = (ours - best) - value * progress  # by the delta method
    error = residuals.std(ddof=1) / (math.sqrt(len(ours)) * progress.mean())
    return float(value), float(error)
