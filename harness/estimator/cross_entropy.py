"""Cross-entropy whose product with the Hessian of the logits reads them twice.

Torch differentiates the backward pass of log-softmax and of the likelihood one by one, by both of
their inputs: a dozen passes over the logits, which of a small model with many classes is most of a
product. Of mean cross-entropy with probabilities p and N targets the second derivative is known:
(diag(p) − p pᵀ) / N for each row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Compute what torch's does; differentiable twice where it is the plain one, of rows.

    Args:
        input: Logits; of shape (N, C) in float32 or float64 they are the plain case.
        target: Class indices, shape (N,), or probabilities.
        weight: As torch; None in the plain case, like the two that torch deprecates.
        size_average: As torch.
        ignore_index: As torch.
        reduce: As torch.
        reduction: As torch; mean or sum in the plain case.
        label_smoothing: As torch; 0 in the plain case.
    """
    asks_more = weight is not None or size_average is not None or reduce is not None
    is_plain = input.dim() == 2 and target.dtype == torch.int64 and reduction in ("mean", "sum")
    is_plain &= input.dtype in (torch.float32, torch.float64) and label_smoothing == 0
    # Autocast casts the arguments of torch's own alone.
    if asks_more or not is_plain or torch.is_autocast_enabled(input.device.type):
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    found: torch.Tensor = _CrossEntropy.apply(input, target, ignore_index, reduction)
    return found


class _CrossEntropy(torch.autograd.Function):
    """The loss; its derivative by the logits is `_Slope`."""

    @staticmethod
    def forward(
        ctx: Any, z: torch.Tensor, target: torch.Tensor, ignore_index: int, reduction: str
    ) -> torch.Tensor:
        counts = target != ignore_index
        total = counts.sum().to(z.dtype)
        # As many tensors, of the same shapes, as torch keeps: where a checkpointed part goes
        # forward again, torch's own takes its place, whose log-probabilities do as logits too.
        ctx.save_for_backward(z, z, target, total)
        ctx.ignore_index, ctx.is_mean = ignore_index, reduction == "mean"
        return F.cross_entropy(z, target, ignore_index=ignore_index, reduction=reduction)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, _, target, total = ctx.saved_tensors
        counts = target != ctx.ignore_index
        # Where no row counts the mean is nan and its gradient 0, as torch's.
        each = counts / total.clamp(min=1) if ctx.is_mean else counts.to(z.dtype)
        return _Slope.apply(z, slope, torch.where(counts, target, 0), each), None, None, None


class _Slope(torch.autograd.Function):
    """The gradient s c_i (p_i − e_i) of s Σ_i c_i CE_i by the logits of each row i."""

    @staticmethod
    def forward(
        ctx: Any, z: torch.Tensor, slope: torch.Tensor, target: torch.Tensor, each: torch.Tensor
    ) -> torch.Tensor:
        of_row = (slope * each)[:, None]
        scaled = z.softmax(1).mul_(of_row)
        ctx.save_for_backward(scaled, of_row, z, target, each)
        found = scaled.clone()
        found[torch.arange(len(z), device=z.device), target] -= of_row[:, 0]
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return s c_i (diag(p_i) − p_i p_iᵀ) u_i, and what the gradient is by s."""
        scaled, of_row, z, target, each = ctx.saved_tensors
        change = scaled * u
        mean = change.sum(1, keepdim=True) / torch.where(of_row == 0, 1, of_row)
        change.addcmul_(scaled, mean, value=-1)
        by_slope = None
        if ctx.needs_input_grad[1]:
            along = (z.softmax(1) * u).sum(1) - u.gather(1, target[:, None])[:, 0]
            by_slope = (each * along).sum()
        return change, by_slope, None, None
