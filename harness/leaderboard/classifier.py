"""Whether a model needs Adam, from measures of it: a logistic regression over the leaderboard.

docs/leaderboard.md, Prediction, says why it is as it is. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from harness.errors import UserError
from harness.leaderboard.ranks import Array
from harness.leaderboard.resampling import MIN_MODELS, interval, resampled
from spectra_db.heterogeneity import is_leading

CHEAP = ("gradient_rms_spread", "lambda_rms_spread", "trace_spread")
WITH_JS0 = (*CHEAP, "js0")
ANSWERS = ("SGD should do", "use Adam", "unclear")
NUM_DRAWS = 500
RIDGE = 1.0
_STEPS = 25  # of Newton's method; it has converged after about 10


@dataclass(frozen=True)
class Examples:
    """The leaderboard's models at initialisation.

    Attributes:
        names: n models.
        measures: Names of p measures.
        x: log10 of them, shape (n, p).
        error: Standard error of x, shape (n, p).
        needed: 1 where Adam is needed, shape (n,).
        gap: Shape (n,).
        families: Family of each.
    """

    names: tuple[str, ...]
    measures: tuple[str, ...]
    x: Array
    error: Array
    needed: Array
    gap: Array
    families: tuple[str, ...]

    @classmethod
    def of(cls, measured: pd.DataFrame, measures: Sequence[str]) -> Examples:
        """Take the models that enter the statistics and have all the measures.

        Args:
            measured: What `statistics.measurements` returned.
            measures: The metrics, at their first scale.
        """
        rows = measured[measured["enters"] & (measured["stage"] == "init")]
        rows = rows[is_leading(rows)]
        wide = rows.pivot_table(
            index="model", columns="metric", values=["estimate", "standard_error"]
        )
        wide = wide.reindex(
            columns=[(v, m) for v in ("estimate", "standard_error") for m in measures]
        ).dropna()
        of_model = rows.drop_duplicates("model").set_index("model").loc[wide.index]
        value = wide["estimate"].to_numpy(np.float64).reshape(-1, len(measures))
        error = wide["standard_error"].to_numpy(np.float64).reshape(-1, len(measures))
        return cls(
            names=tuple(wide.index),
            measures=tuple(measures),
            x=np.log10(value),
            error=error / value / np.log(10),
            needed=of_model["adam_needed"].to_numpy(np.float64),
            gap=of_model["gap"].to_numpy(np.float64),
            families=tuple(of_model["family"]),
        )

    def only(self, keep: npt.NDArray[np.bool_]) -> Examples:
        """Return the models of a mask."""
        kept: dict[str, Any] = {k: getattr(self, k)[keep] for k in ("x", "error", "needed", "gap")}
        kept |= {k: tuple(compress(getattr(self, k), keep)) for k in ("names", "families")}
        return replace(self, **kept)


@dataclass(frozen=True)
class Prediction:
    """What the regression says of a model.

    Attributes:
        probability: That Adam is needed.
        low, high: Ends of its 95 % interval.
        answer: One of ANSWERS.
        outside: Measures that lie outside the leaderboard's range: the answer is unclear then.
    """

    probability: float
    low: float
    high: float
    answer: str
    outside: tuple[str, ...]


def check(examples: Examples) -> None:
    """Raise unless there are enough models of both kinds.

    Raises:
        UserError: There are too few models, or all of one kind.
    """
    kinds = len(set(examples.needed.tolist()))
    if len(examples.names) < MIN_MODELS or kinds < 2:
        raise UserError(
            f"{len(examples.names)} models of {kinds} kinds are too few to predict from; give "
            "--source DIR with the tables of trained models that need Adam and of others that don't"
        )


def classify(examples: Examples, x: Array, error: Array) -> Prediction:
    """Return the probability that a model needs Adam, with its interval, and the answer.

    The interval is that of refits to resampled families, each with errors added to all measures,
    the model's included. The answer is clear where the interval lies on one side of one half.

    Args:
        examples: What to fit.
        x: log10 of the model's measures, shape (p,).
        error: Their standard errors, shape (p,).

    Raises:
        UserError: There are too few models, or all of one kind.
    """
    check(examples)
    generator = np.random.default_rng(0)
    families, _, drawn = resampled(pd.Series(examples.families), generator, NUM_DRAWS)
    per_member = 1 / np.bincount(families)[families]
    weights = np.vstack([np.ones(len(families)), drawn]) * per_member
    noise = generator.standard_normal((NUM_DRAWS, *examples.x.shape)) * examples.error
    own = generator.standard_normal((NUM_DRAWS, len(x))) * error
    centre, spread = examples.x.mean(axis=0), np.maximum(examples.x.std(axis=0), 1e-9)
    measures = (
        examples.x + np.concatenate([np.zeros((1, *noise.shape[1:])), noise]) - centre
    ) / spread
    target = (x + np.vstack([np.zeros(len(x)), own]) - centre) / spread
    coefficients = fit(measures, examples.needed, weights)
    logit = coefficients[:, 0] + (coefficients[:, 1:] * target).sum(axis=1)
    probability = 1 / (1 + np.exp(-logit))
    low, high = interval(probability[1:])
    beyond = (x < examples.x.min(axis=0) - error) | (x > examples.x.max(axis=0) + error)
    outside = tuple(m for m, out in zip(examples.measures, beyond, strict=True) if out)
    answer = ANSWERS[2]
    if not outside:
        answer = ANSWERS[0] if high < 0.5 else ANSWERS[1] if low > 0.5 else answer
    return Prediction(float(probability[0]), low, high, answer, outside)


def fit(x: Array, y: Array, weights: Array, *, ridge: float = RIDGE) -> Array:
    """Fit B weighted ridge logistic regressions by Newton's method.

    Half an observation of each kind at the centre is added, so that separated or one-sided draws
    stay finite; the intercept is not penalised otherwise.

    Args:
        x: Shape (B, n, p), standardised.
        y: 0 or 1, shape (n,).
        weights: Shape (B, n).
        ridge: Penalty: ridge / 2 times the squared coefficients.

    Returns:
        Intercept and coefficients, shape (B, p + 1).
    """
    draws, num_models, num_measures = x.shape
    design = np.concatenate([np.ones((draws, num_models, 1)), x], axis=2)
    centre = np.zeros((draws, 2, num_measures + 1))
    centre[:, :, 0] = 1.0
    design = np.concatenate([design, centre], axis=1)
    labels = np.concatenate([y, [0.0, 1.0]])
    weights = np.concatenate([weights, np.full((draws, 2), 0.5)], axis=1)
    penalty = ridge * np.diag([0.0] + [1.0] * num_measures)
    beta = np.zeros((draws, num_measures + 1))
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-np.einsum("bnp,bp->bn", design, beta)))
        gradient = np.einsum("bn,bnp->bp", weights * (labels - p), design) - beta @ penalty
        curvature = np.einsum("bn,bnp,bnq->bpq", weights * p * (1 - p), design, design) + penalty
        beta = beta + np.linalg.solve(curvature, gradient[..., None])[..., 0]
    return beta


def held_out(examples: Examples) -> pd.DataFrame:
    """Predict every model from the models of other families.

    Returns:
        Columns model, family, needed, probability, low, high, answer. Without a family that holds
        all models of one kind there is nothing to fit: probability and interval are null then.
    """
    columns = ["model", "family", "needed", "probability", "low", "high", "answer"]
    rows = []
    for i, (name, family) in enumerate(zip(examples.names, examples.families, strict=True)):
        others = examples.only(np.array(examples.families) != family)
        row = {"model": name, "family": family, "needed": bool(examples.needed[i])}
        if len(set(others.needed.tolist())) == 2 and len(others.names) >= MIN_MODELS:
            found = classify(others, examples.x[i], examples.error[i])
            rows.append(row | {column: getattr(found, column) for column in columns[3:]})
        else:
            rows.append(row | {"answer": ANSWERS[2]})
    return pd.DataFrame(rows, columns=columns)


def summary(predicted: pd.DataFrame) -> dict[str, Any]:
    """Return how good held-out predictions are: all by their probability, and the clear answers.

    Keys: num_models, accuracy (probability above one half, against needed), majority (accuracy of
    always giving the more frequent answer; both None where no model could be predicted), num_clear,
    clear_correct.
    """
    known = predicted.dropna(subset="probability")
    right = (known["probability"] > 0.5) == known["needed"].astype(bool)
    clear = known[known["answer"] != ANSWERS[2]]
    correct = (clear["answer"] == ANSWERS[1]) == clear["needed"].astype(bool)
    share = float(known["needed"].astype(float).mean()) if len(known) else None
    return {
        "num_models": len(known),
        "accuracy": float(right.mean()) if len(known) else None,
        "majority": None if share is None else max(share, 1 - share),
        "num_clear": len(clear),
        "clear_correct": int(correct.sum()),
    }
