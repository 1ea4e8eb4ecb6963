"""Layer norms whose product with a Hessian is a pass of torch's kernel and a few of sums.

With x̂ = (x − mean) r, r = 1 / √(variance + eps), the gradient of a layer norm (Ba et al. 2016,
arXiv 1607.06450) is r P(w g), P a = a − mean(a) − x̂ mean(x̂ a). Torch differentiates that
elementwise operation by operation. But r P is symmetric, and the derivative of x̂ itself: the
gradient's derivatives are made of it again, which torch's kernel computes in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from harness.estimator.passes import is_used

OPERATIONS = (F.layer_norm, torch.layer_norm)
_gradient = torch.ops.aten.native_layer_norm_backward


def normalize(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    """Compute what torch's does; differentiable twice in float32 and float64.

    Args:
        input: Ends in `normalized_shape`.
        normalized_shape: As torch.
        weight: As torch.
        bias: As torch.
        eps: As torch.
        cudnn_enable: As torch, which does not use it.
    """
    is_coarse = input.dtype not in (torch.float32, torch.float64)
    is_mixed = any(part is not None and part.dtype != input.dtype for part in (weight, bias))
    # Autocast casts the arguments of torch's own alone.
    if is_coarse or is_mixed or torch.is_autocast_enabled(input.device.type):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    found: torch.Tensor = _LayerNorm.apply(input, weight, bias, list(normalized_shape), eps)
    return found


def by_formula(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    """Compute x̂ · weight + bias in torch's operations, differentiable any number of times.

    The third derivative of torch's own kernel is wrong (pytorch issue 175754); a loss that
    differentiates inside needs it. Arguments as of `normalize`.
    """
    dims = list(range(-len(normalized_shape), 0))
    x = input.to(torch.promote_types(input.dtype, torch.float32))  # as the kernel accumulates
    centred = x - x.mean(dims, keepdim=True)
    y = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(input.dtype)


class _LayerNorm(torch.autograd.Function):
    """y = x̂ w + b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        shape: list[int],
        eps: float,
    ) -> torch.Tensor:
        y, mean, r = torch.native_layer_norm(x, shape, weight, bias, eps)
        # What torch keeps, in its order: where a checkpointed part goes forward again, torch's own
        # takes its place.
        ctx.save_for_backward(bias, x, weight, mean, r)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        bias, x, weight, mean, r = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = _Slope.apply(x, g, weight, bias, mean, r, ctx.shape)
        else:
            places = count()
            used = [p is not None and is_used(ctx, next(places)) for p in (x, weight, bias)]
            found = _gradient(g, x, ctx.shape, mean, r, weight, bias, used)
        return *found, None, None


class _Slope(torch.autograd.Function):
    """The gradient of ⟨g, y⟩ by x, w and b: r P(w g), Σ g x̂ and Σ g over the rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        g: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        r: torch.Tensor,
        shape: list[int],
    ) -> tuple[torch.Tensor | None, ...]:
        there = [True, weight is not None, bias is not None]
        by_x, by_weight, by_bias = _gradient(g, x, shape, mean, r, weight, bias, there)
        weighted = g if weight is None else g * weight
        lean = _average((x - mean) * r, weighted, shape)
        ctx.save_for_backward(x, g, weight, mean, r, by_x, lean)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        return by_x, by_weight, by_bias

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        u: torch.Tensor | None,
        u_weight: torch.Tensor | None,
        u_bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Return what ⟨u, r P(w g)⟩ + ⟨u_weight, Σ g x̂⟩ + ⟨u_bias, Σ g⟩ is by x, g and w.

        Its first term by x, each mean over a row:
        −r² (x̂ mean(P u w g) + P u mean(x̂ w g) + P(w g) mean(x̂ u)).
        """
        x, g, weight, mean, r, slope, lean = ctx.saved_tensors
        normed = (x - mean) * r
        by_x = by_g = by_weight = None

        def project(a: torch.Tensor) -> torch.Tensor:
            only_x = [True, False, False]
            return _gradient(a.contiguous(), x, ctx.shape, mean, r, None, None, only_x)[0]

        if u is not None:
            along = project(u)
            by_g = along if weight is None else along * weight
            if is_used(ctx, 0):
                by_x = normed * (-r * _average(u, slope, ctx.shape))
                by_x.addcmul_(along, -r * lean)
                by_x.addcmul_(slope, -r * _average(u, normed, ctx.shape))
            if weight is not None and is_used(ctx, 2):
                by_weight = (along * g).sum_to_size(ctx.shape)
        if u_weight is not None:
            by_g = normed * u_weight if by_g is None else by_g.addcmul(normed, u_weight)
            if is_used(ctx, 0):
                change = project(g * u_weight)
                by_x = change if by_x is None else by_x.add_(change)
        if u_bias is not None:
            by_g = u_bias.expand_as(g) if by_g is None else by_g + u_bias
        return by_x, by_g, by_weight, None, None, None, None


def _average(a: torch.Tensor, b: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Return the mean of a b over each row, of what is normalised together."""
    return (a * b).mean(tuple(range(-len(shape), 0)), keepdim=True)
