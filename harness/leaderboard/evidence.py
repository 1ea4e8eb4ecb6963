"""What every measure has to say of the speed-up: tables in, tables out. No torch.

docs/verdict.md defines the columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import ndtri

from harness.errors import UserError
from harness.leaderboard import inference
from harness.leaderboard.ranks import Array
from harness.leaderboard.resampling import (
    LEVEL,
    MIN_MODELS,
    NUM_DRAWS,
    interval,
    left_out_accuracy,
    resampled,
)
from spectra_db.words import ANSWERS

PRIMARY = "J"
# What every measure must beat; more of each is guessed to need Adam more.
DUMMIES = {"has_attention": 1, "log_params": 1, "log_classes": 1}
MODALITIES = ("images", "text")
CENSORED_AT = 2.0  # log2 of the longest schedule, 4T
_OUTCOMES = ["y", "y_error", "y_prime"]
_COLUMNS = [
    *("model", "family", "modality", "y", "y_error", "censored", "y_prime", "trained"),
    *("at_edge", "adam_needed", *DUMMIES, PRIMARY),
]


class Pair(NamedTuple):
    """Two entries that differ in one factor."""

    name: str
    model_a: str
    model_b: str


def checked(
    entries: pd.DataFrame, rivals: Mapping[str, int], pairs: Sequence[Pair]
) -> pd.DataFrame:
    """Return the entries by name, their numbers as floats, infinite predictors kept.

    Raises:
        UserError: A column or a value of an entry that counts is missing or not allowed, an entry
            is there twice, a pair names an entry that is not there, or a direction is not 1 or -1.
    """
    absent = [c for c in [*_COLUMNS, *rivals] if c not in entries]
    if absent:
        raise UserError(f"the table of entries lacks the columns {', '.join(absent)}")
    twice = entries.loc[entries["model"].duplicated(), "model"].tolist()
    unknown = sorted({m for p in pairs for m in p[1:]} - set(entries["model"]))
    wrong = [f"{name}: {sign}" for name, sign in rivals.items() if sign not in (1, -1)]
    if twice or unknown or wrong:
        raise UserError(
            f"entries that are there twice: {twice}; in a pair but not there: {unknown}; "
            f"directions that are neither 1 nor -1: {wrong}"
        )
    numbers = [*_OUTCOMES, *DUMMIES, PRIMARY, *rivals]
    rows = entries.astype(dict.fromkeys(numbers, np.float64)).sort_values("model")
    flags = ["trained", "censored", "at_edge"]
    rows[flags] = rows[flags].eq(True)
    rows["y_error"] = rows["y_error"].where(~rows["censored"], 0.0)
    _check_values(rows[rows["trained"]])
    return rows.reset_index(drop=True)


def _check_values(rows: pd.DataFrame) -> None:
    """Raise unless every entry that counts has its outcome, and with J its dummies."""
    size = rows["y"].abs()
    columns = (_OUTCOMES, list(DUMMIES))
    known, whole = (np.isfinite(rows[c].to_numpy(np.float64)).all(axis=1) for c in columns)
    faults: dict[str, pd.Series] = {
        "no finite y, y_error or y_prime": pd.Series(~known, index=rows.index),
        f"{PRIMARY} and no finite dummy": rows[PRIMARY].notna() & ~whole,
        "a negative y_error": rows["y_error"] < 0,
        f"a y beyond {CENSORED_AT:g}, or censored at another value": (size > CENSORED_AT)
        | (rows["censored"] & (size != CENSORED_AT)),
        f"a modality other than {MODALITIES}": ~rows["modality"].isin(MODALITIES),
        f"an answer other than {ANSWERS}": ~rows["adam_needed"].isin(ANSWERS),
    }
    found = [f"{fault}: {rows.loc[m, 'model'].tolist()}" for fault, m in faults.items() if m.any()]
    if found:
        raise UserError(f"entries that count have {'; '.join(found)}")


def compare_pairs(rows: pd.DataFrame, pairs: Sequence[Pair]) -> pd.DataFrame:
    """Return each pair's difference in y and whether it is decided.

    Decided means |Δy| > 2 √(error_a² + error_b²). A y beyond 4T is a bound and has no error of its
    own, so that the difference to it is the least it can be.

    Args:
        rows: What `checked` returned.
        pairs: The pairs.

    Returns:
        Columns pair, model_a, model_b, dy (y_a - y_b), dy_error, decided, why (not decided, else
        empty), dj (J_a - J_b), and right: None where not decided, or where J is missing, else
        whether the larger J has the larger y. Equal ones tell nothing and are wrong.
    """
    of: dict[Any, Any] = {row.model: row for row in rows.itertuples()}
    table = []
    for name, a, b in pairs:
        first, second = of[a], of[b]
        dy, error = first.y - second.y, math.hypot(first.y_error, second.y_error)
        why = _why_undecided(first, second, dy, error)
        dj = getattr(first, PRIMARY) - getattr(second, PRIMARY)
        table.append(
            {"pair": name, "model_a": a, "model_b": b, "dy": dy, "dy_error": error}
            | {"decided": not why, "why": why, "dj": dj}
            | {"right": None if why else bool(dj * dy > 0)}
        )
    columns = ["pair", "model_a", "model_b", "dy", "dy_error", "decided", "why", "dj", "right"]
    return pd.DataFrame(table, columns=columns).astype({"decided": bool})


def _why_undecided(first: Any, second: Any, dy: float, error: float) -> str:
    """Return why a pair tells nothing; empty where it does."""
    untrained = [e.model for e in (first, second) if not e.trained]
    if untrained:
        return f"not trained: {', '.join(untrained)}"
    missing = [e.model for e in (first, second) if np.isnan(getattr(e, PRIMARY))]
    if missing:
        return f"no {PRIMARY}: {', '.join(missing)}"
    if first.censored and second.censored and dy == 0:
        return "both beyond 4T"
    if abs(dy) <= 2 * error:
        return f"|Δy| = {abs(dy):.2f} is within 2 standard errors, {2 * error:.2f}"
    return ""


class Design(NamedTuple):
    """What stays as it is when a predictor is exchanged for another.

    Attributes:
        y: Outcomes, shape (n,).
        has_attention: Shape (n,).
        a, b: Places of the entries of each decided pair, shape (m,).
        sign: Sign of y_a - y_b, shape (m,).
    """

    y: Array
    has_attention: Array
    a: npt.NDArray[np.intp]
    b: npt.NDArray[np.intp]
    sign: Array

    @classmethod
    def of(cls, rows: pd.DataFrame, compared: pd.DataFrame) -> Design:
        """Take the decided pairs whose entries are both among the rows."""
        y, attention = (rows[c].to_numpy(np.float64) for c in ("y", "has_attention"))
        known = pd.Index(rows["model"])
        decided = compared[compared["decided"]]
        a, b = (known.get_indexer(decided[c]) for c in ("model_a", "model_b"))
        both = (a >= 0) & (b >= 0)  # -1 is not there
        a, b = a[both], b[both]
        return cls(y, attention, a, b, np.sign(y[a] - y[b]))

    def right_pairs(self, x: Array) -> Array:
        """Return in how many pairs the larger x has the larger y; x of shape (..., n)."""
        return ((x[..., self.a] - x[..., self.b]) * self.sign > 0).sum(-1)


def measures(rows: pd.DataFrame, rivals: Mapping[str, int], compared: pd.DataFrame) -> pd.DataFrame:
    """Return a row per measure: J, the rivals, the dummies.

    Args:
        rows: The entries that count, as `checked` returned them.
        rivals: Column of each rival, and 1 if more of it is said to need Adam more, else -1. A
            negative ρ is one against what is said.
        compared: What `compare_pairs` returned.

    Returns:
        Columns measure, kind (primary, rival, dummy), sign; n, rho, p of the permutation test;
        p_holm of the rivals; right_pairs of decided_pairs; family_low and family_high, without_low
        (the lowest ρ without a family) and without (that family); noise_low and noise_high;
        rho_images, rho_text; rho_y_prime; given_attention, given_params; difference to J's ρ over
        the entries that have both, with its interval; accuracy (`left_out_accuracy`) and majority
        (of always giving the more frequent answer), over the entries whose answer is yes or no.
    """
    kinds = {PRIMARY: ("primary", 1)} | {r: ("rival", s) for r, s in rivals.items()}
    kinds |= {d: ("dummy", s) for d, s in DUMMIES.items()}
    table = pd.DataFrame(
        {"measure": name, "kind": kind, "sign": sign} | _one(rows, name, sign, compared)
        for name, (kind, sign) in kinds.items()
    )
    of_rivals = table["kind"] == "rival"
    table.insert(6, "p_holm", np.nan)
    table.loc[of_rivals, "p_holm"] = inference.holm(table.loc[of_rivals, "p"])
    return table


def _one(rows: pd.DataFrame, name: str, sign: int, compared: pd.DataFrame) -> dict[str, object]:
    """Return the numbers of one measure over the entries that have it."""
    rows = rows[rows[name].notna()]
    row: dict[str, object] = {"n": len(rows), "rho": np.nan, "p": np.nan}
    row |= {"right_pairs": 0, "decided_pairs": 0}
    if len(rows) < MIN_MODELS:
        return row
    x, y, y_prime = (rows[c].to_numpy(np.float64) for c in (name, "y", "y_prime"))
    x = sign * x
    generator = np.random.default_rng(0)
    row["rho"], row["p"] = inference.permutation_test(x, y)
    row |= _over_families(rows, x, generator) | _under_noise(rows, name, sign, generator)
    for modality in MODALITIES:
        here = (rows["modality"] == modality).to_numpy()
        enough = here.sum() >= MIN_MODELS
        row[f"rho_{modality}"] = float(inference.spearman(x[here], y[here])) if enough else np.nan
    row["rho_y_prime"] = float(inference.spearman(x, y_prime))
    row["given_attention"] = float(inference.partial(x, y, rows["has_attention"]))
    row["given_params"] = float(inference.partial(x, y, rows["log_params"]))
    row |= _less_primary(rows, x, generator)
    design = Design.of(rows, compared)
    row |= {"right_pairs": int(design.right_pairs(x)), "decided_pairs": len(design.sign)}
    return row | _accuracy(rows, x)


def _over_families(
    rows: pd.DataFrame, x: Array, generator: np.random.Generator
) -> dict[str, object]:
    """Return ρ's interval with families resampled, and the lowest without one of them."""
    families, names, drawn = resampled(rows["family"], generator, NUM_DRAWS)
    count = len(names)
    kept = np.arange(count)[:, None] != families
    kept &= kept.sum(axis=1, keepdims=True) >= MIN_MODELS
    weights = np.vstack([kept, drawn]).astype(np.float64)
    rho = inference.weighted_spearman(x, rows["y"], weights)
    low, high = interval(rho[count:]) if count > 1 else (np.nan, np.nan)
    found: dict[str, object] = {"family_low": low, "family_high": high}
    if np.isnan(rho[:count]).all():
        return found | {"without_low": np.nan, "without": ""}
    lowest = int(np.nanargmin(rho[:count]))
    return found | {"without_low": float(rho[lowest]), "without": str(names[lowest])}


def _under_noise(
    rows: pd.DataFrame, name: str, sign: int, generator: np.random.Generator
) -> dict[str, object]:
    """Return ρ's interval when y and the measure are drawn anew, each from its error."""
    shape = (NUM_DRAWS, len(rows))
    x = rows[name].to_numpy() + error_of(rows, name) * generator.standard_normal(shape)
    y = rows["y"].to_numpy() + rows["y_error"].to_numpy() * generator.standard_normal(shape)
    drawn = inference.spearman(sign * x, np.clip(y, -CENSORED_AT, CENSORED_AT))
    low, high = interval(drawn)
    return {"noise_low": low, "noise_high": high}


def error_of(rows: pd.DataFrame, name: str) -> Array:
    """Return a measure's standard error over initialisation seeds, shape (n,); 0 where unknown.

    From column `<name>_error`, or from the 95 % interval of `<name>_low` and `<name>_high`.
    """
    error = pd.Series(0.0, index=rows.index)
    if f"{name}_error" in rows:
        error = rows[f"{name}_error"].astype(np.float64)
    elif {f"{name}_low", f"{name}_high"} <= set(rows):
        width = rows[f"{name}_high"].astype(np.float64) - rows[f"{name}_low"].astype(np.float64)
        error = width / (2 * ndtri((1 + LEVEL) / 2))
    return np.nan_to_num(error.to_numpy(np.float64), posinf=0.0)


def _less_primary(rows: pd.DataFrame, x: Array, generator: np.random.Generator) -> dict[str, float]:
    """Return ρ less J's and its interval: the same entries are drawn for both."""
    both = rows[PRIMARY].notna().to_numpy()
    count = int(both.sum())
    if count < MIN_MODELS:
        return {}
    j, y = rows.loc[both, PRIMARY].to_numpy(), rows.loc[both, "y"].to_numpy()
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=NUM_DRAWS)
    weights = np.vstack([np.ones(count), drawn])
    rho, of_j = (inference.weighted_spearman(v, y, weights) for v in (x[both], j))
    low, high = interval((rho - of_j)[1:])
    return {"difference": float(rho[0] - of_j[0]), "difference_low": low, "difference_high": high}


def _accuracy(rows: pd.DataFrame, x: Array) -> dict[str, float]:
    """Return how often a threshold set on other families tells yes from no; unclear ones aside."""
    clear = (rows["adam_needed"] != ANSWERS[2]).to_numpy()
    if clear.sum() < MIN_MODELS:
        return {}
    needed = np.where(rows.loc[clear, "adam_needed"] == ANSWERS[0], 1.0, 0.0)
    families, _ = pd.factorize(rows.loc[clear, "family"])
    ours = inference.ranks(x[clear])[None]
    found = left_out_accuracy(ours, needed[None], families, np.ones((1, len(needed))))
    share = float(needed.mean())
    return {"accuracy": float(found[0][0]), "majority": max(share, 1 - share)}
