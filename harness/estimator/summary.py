"""Summaries of blocks: sizes, moments and extreme eigenvalues (table `blocks`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from harness.estimator.blocks import Block
from harness.estimator.checks import Batch, LossFn, fixed_arithmetic
from harness.estimator.device import choose_device, device_memory
from harness.estimator.hessian import BlockHessian, NumTerms
from harness.estimator.quadrature import residual_bounds

Row = dict[str, Any]


def block_summaries(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Batch],
    blocks: Sequence[Block],
    rows: pd.DataFrame,
    *,
    batch_weights: Sequence[float] | NumTerms | None = None,
) -> list[Row]:
    """Summarise each block: weight and gradient size, moments and extreme eigenvalues.

    tr H = n Σ w θ and ‖H‖_F² = n Σ w θ², averaged over probes, with the standard error of that
    mean; the extreme eigenvalues are the extreme nodes over all probes, which lie inside the
    spectrum, with the residual bound of the node as error (0 for exact blocks).

    Args:
        model: The model at the stage of the rows.
        loss_fn: Its mean loss.
        batches: The batch of the rows.
        blocks: The blocks of the rows.
        rows: Rows of table `spectra` of these blocks.
        batch_weights: As in `estimate_spectra`.

    Returns:
        Rows of table `blocks`.
    """
    device = choose_device(model, None)
    with fixed_arithmetic(model):
        hessian = BlockHessian(
            model,
            loss_fn,
            batches,
            blocks,
            batch_weights=batch_weights,
            device=device,
            memory_budget=device_memory(device),
        )
        gradient = hessian.gradient()
    by_block = dict(list(rows.groupby("block", sort=False)))
    summaries = []
    for block in blocks:
        group = by_block[block.name]
        squares = {
            "weight_rms": [part.of(hessian.parameter(part.parameter)) for part in block.parts],
            "gradient_rms": [
                part.of(g) for part in block.parts if (g := gradient[part.parameter]) is not None
            ],
        }
        first = group.iloc[0]
        summary: Row = {
            key: first[key]
            for key in ("model", "stage", "init_seed", "train_run", "block", "protocol_version")
        } | {"kind": block.kind, "num_params": block.num_params}
        for name, tensors in squares.items():
            total = sum(float(t.double().square().sum()) for t in tensors)
            summary[name] = (total / block.num_params) ** 0.5
        summaries.append(summary | _moments(group, block.num_params))
    return summaries


def _moments(group: pd.DataFrame, n: int) -> Row:
    """Return trace, Frobenius norm and extreme eigenvalues of one block's rows, with errors."""
    rules = [(np.asarray(r.nodes), np.asarray(r.weights)) for r in group.itertuples()]
    exact = bool((group["method"] == "exact").all())

    def mean(values: list[float]) -> tuple[float, float | None]:
        if exact:
            return values[0], 0.0
        few = len(values) < 2
        return float(np.mean(values)), (
            None if few else float(np.std(values, ddof=1) / len(values) ** 0.5)
        )

    trace, trace_error = mean([n * float(w @ t) for t, w in rules])
    square, square_error = mean([n * float(w @ t**2) for t, w in rules])
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
        ends = [float(t[end]) for t, _ in rules]
        best = int(np.argmax(ends) if end else np.argmin(ends))
        record = group.iloc[best]
        bounds = (
            residual_bounds(record["alphas"], record["betas"]) if len(record["alphas"]) else [0.0]
        )
        row |= {name: ends[best], f"{name}_error": float(bounds[end])}
    return row
