"""Summaries of blocks: sizes, moments and extreme eigenvalues (table `blocks`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from harness.estimator.batches import Batch, NumTerms
from harness.estimator.blocks import Block
from harness.estimator.checks import LossFn, fixed_arithmetic
from harness.estimator.device import choose_device, memory_share
from harness.estimator.hessian import BlockHessian
from spectra_db.densities import blocks_of
from spectra_db.quadrature import residual_bounds

Row = dict[str, Any]


def block_summaries(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Batch],
    blocks: Sequence[Block],
    rows: pd.DataFrame,
    *,
    batch_weights: Sequence[float] | NumTerms | None = None,
    device: torch.device | str | None = None,
    memory_budget: int | None = None,
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
        device: As in `estimate_spectra`.
        memory_budget: As in `estimate_spectra`.

    Returns:
        Rows of table `blocks`.
    """
    sizes = block_sizes(
        model,
        loss_fn,
        batches,
        blocks,
        batch_weights=batch_weights,
        device=device,
        memory_budget=memory_budget,
    )
    by_block = dict(list(rows.groupby("block", sort=False)))
    summaries = []
    for size in sizes:
        group = by_block[size["block"]]
        identity = ("model", "stage", "init_seed", "train_run", "protocol_version")
        shared = {key: group.iloc[0][key] for key in identity}
        summaries.append(shared | size | _moments(group, size["num_params"]))
    return summaries


def block_sizes(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Batch],
    blocks: Sequence[Block],
    *,
    batch_weights: Sequence[float] | NumTerms | None = None,
    device: torch.device | str | None = None,
    memory_budget: int | None = None,
) -> list[Row]:
    """Return the rms of each block's weights and of its gradient, from one gradient.

    Args:
        model: As `block_summaries`.
        loss_fn: As `block_summaries`.
        batches: As `block_summaries`.
        blocks: As `block_summaries`.
        batch_weights: As `block_summaries`.
        device: As `block_summaries`.
        memory_budget: As `block_summaries`.

    Returns:
        The columns block, kind, num_params, weight_rms and gradient_rms of table `blocks`.
    """
    target = choose_device(model, device)
    with fixed_arithmetic(model):
        hessian = BlockHessian(
            model,
            loss_fn,
            batches,
            blocks,
            batch_weights=batch_weights,
            device=target,
            memory_budget=memory_share(target) if memory_budget is None else memory_budget,
        )
        gradient = hessian.gradient()
    rows = []
    for block in blocks:
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
    spectrum = spectrum.with_second_moments()
    moments = list(zip(spectrum.nodes, spectrum.weights, strict=True))
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
        record = group.iloc[best]
        bounds = (
            residual_bounds(record["alphas"], record["betas"]) if len(record["alphas"]) else [0.0]
        )
        row |= {name: ends[best], f"{name}_error": float(bounds[end])}
    return row
