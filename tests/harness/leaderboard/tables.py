"""Tables made up for the leaderboard's tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from spectra_db.heterogeneity import LEADING
from spectra_db.schema import TABLES


def model_row(model: str, **changes: object) -> dict[str, object]:
    return {
        "model": model, "family": "cnn", "tier": "small", "task": "digits", "num_params": 4002,
        "num_blocks": 3, "source": "ours", "licence": "Apache-2.0", "reference": "a <paper>",
        "status": "ok", "reason": None, "protocol_version": 1,
    } | changes  # fmt: skip


def gap_row(model: str, gap: float, error: float = 0.0, **changes: object) -> dict[str, object]:
    return {
        "model": model, "protocol_version": 1, "gap": gap, "standard_error": error,
        "ci_low": gap - 2 * error, "ci_high": gap + 2 * error, "sgd_loss": 1.0, "adam_loss": 0.9,
        "init_loss": 2.0, "sgd_lr": 0.1, "adam_lr": 0.01, "at_edge": False, "num_lrs": 5,
        "num_seeds": 3, "adam_needed": gap > 0.1 and gap > 2 * error, "status": "ok",
        "reason": None, "target_entropy": 2.3, "reference_loss": 2.0, "trained": True,
        "gap_from_reference": gap, "gap_from_reference_error": error,
        "gap_from_reference_low": gap - 2 * error, "gap_from_reference_high": gap + 2 * error,
        "adam_needed_now": _answer(gap - 2 * error, gap + 2 * error),
    } | changes  # fmt: skip


def _answer(low: float, high: float) -> str:
    return "yes" if low > 0.1 else "no" if high < 0.1 else "unclear"


def metric_row(model: str, metric: str, value: float, **changes: object) -> dict[str, object]:
    return {
        "model": model, "stage": "init", "init_seed": 1, "train_run": "", "partition": "weights",
        "metric": metric, "scale": LEADING.get(metric, "none"),
        "sigma": 0.05 if metric == "js0" else 0.0, "protocol_version": 1, "value": value,
        "corrected": value, "standard_error": 0.0, "truncation_error": 0.0, "batch_error": None,
        "num_blocks": 4, "num_zero_blocks": 0, "num_products": 480 if metric == "js0" else 12,
    } | changes  # fmt: skip


def frame(table: str, rows: Sequence[dict[str, object]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=TABLES[table].names)


def made_up(
    values: dict[str, np.ndarray],
    gaps: np.ndarray,
    families: Sequence[str],
    sizes: Sequence[int] | None = None,
    errors: float = 0.0,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return tables of models m0, m1, ... with the values of some metrics, and gaps."""
    names = [f"m{i}" for i in range(len(gaps))]
    sizes = sizes or range(1000, 1000 + len(gaps))
    models = [
        model_row(n, family=f, num_params=s) for n, f, s in zip(names, families, sizes, strict=True)
    ]
    metrics = [
        metric_row(name, metric, float(value), standard_error=errors * float(value))
        for metric, several in values.items()
        for name, value in zip(names, several, strict=True)
    ]
    rows = [gap_row(name, float(gap), errors) for name, gap in zip(names, gaps, strict=True)]
    return frame("models", models), frame("heterogeneity", metrics), frame("gaps", rows)


def speedup_row(model: str, y: float = 1.0, **changes: object) -> dict:
    answer = "yes" if y > 0.6 else "no" if y < 0.4 else "unclear"
    return {
        "model": model, "protocol_version": 2, "log2_speedup": y, "standard_error": 0.05,
        "ci_low": y - 0.1, "ci_high": y + 0.1, "censored": False, "slower": "sgd",
        "trained": True, "adam_needed": answer, "relative_gap": y / 4, "num_steps": 600,
        "longest": 2, "num_seeds": 5, "num_trials": 40, "status": "ok", "reason": None,
    } | changes  # fmt: skip
