"""Summaries of blocks: sizes, moments and extreme eigenvalues (table `blocks`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from harness.estimator.hessian import BlockHessian
from spectra_db.densities import blocks_of
from spectra_db.quadrature import residual_bounds

Row = dict[str, Any]


def block_summaries(hessian: BlockHessian, rows: pd.DataFrame) -> list[Row]:
    """Summarise each block: weight and gradient size, moments and extreme eigenvalues.

    tr H = n Σ w θ and ‖H‖_F² = n Σ w θ², averaged over probes, with the standard error of that
    mean; the extreme eigenvalues are the extreme nodes over all probes, which lie inside the
    spectrum, with the residual bound of the node as error (0 for exact blocks).

    Args:
        hessian: Of the model at the stage of the rows, on their batch.
        rows: Rows of table `spectra` of its blocks.

    Returns:
        Rows of table `blocks`.
    """
    by_block = dict(list(rows.groupby("block", sort=False)))
    summaries = []
    for size in block_sizes(hessian):
        group = by_block[size["block"]]
        identity = ("model", "stage", "init_seed", "train_run", "protocol_version")
        shared = {key: group.iloc[0][key] for key in identity}
        summaries.append(shared | size | _moments(group, size["num_params"]))
    return summaries


def block_sizes(hessian: BlockHessian) -> list[Row]:
    """Return the rms of each block's weights and of its gradient, from one gradient.

    Returns:
        The columns block, kind, num_params, weight_rms and gradient_rms of table `blocks`.
    """
    gradient = hessian.gradient()
    rows = []
    for block in hessian.blocks:
        squares = {
            "weight_rms": [part.of(hessian.parameter(part.parameter)) for part in block.parts],
            "gradient_rms": [
                part.of(g) for part in block.parts if (g := gradient[part.parameter]) is not None
            ],
        }
        row: Row = {"block": block.name, "kind": block.kind, "num_params": block.num_params}
        for name, tensors in squares.items():
            total = sum(float(t.double().square().sum()) for t in tensors)
            row[name] = (total / block.num_params) ** 0.5
        rows.append(row)
    return rows


def _moments(group: pd.DataFrame, n: int) -> Row:
    """Return trace, Frobenius norm and extreme eigenvalues of one block's rows, with errors."""
    exact = bool((group["method"] == "exact").all())

    def mean(values: list[float]) -> tuple[float, float | None]:
        if exact:
            return values[0], 0.0
        few = len(values) < 2
        return float(np.mean(values)), (
            None if few else float(np.std(values, ddof=1) / len(values) ** 0.5)
        )

    [spectrum] = blocks_of(group)
    moments = spectrum.with_second_moments().rules
    trace, trace_error = mean([n * float(w @ t) for t, w in moments])
    square, square_error = mean([n * float(w @ t**2) for t, w in moments])
    frobenius = square**0.5
    frobenius_error = square_error
    if square_error is not None and frobenius > 0:
        frobenius_error = square_error / (2 * frobenius)
    row: Row = {
        "trace": trace,
        "trace_error": trace_error,
        "frobenius": frobenius,
        "frobenius_error": frobenius_error,
    }
    for name, end in (("lambda_max", -1), ("lambda_min", 0)):
        ends = [float(nodes[end]) for nodes in group["nodes"]]
        best = int(np.argmax(ends) if end else np.argmin(ends))
        alphas, betas = group["alphas"].iloc[best], group["betas"].iloc[best]
        bounds = residual_bounds(alphas, betas) if len(alphas) else [0.0]
        row |= {name: ends[best], f"{name}_error": float(bounds[end])}
    return row
