"""Activations whose derivatives are taken once, not in every product.

y = f(x) elementwise: its gradient is g f′(x), and that gradient's derivatives are f′(x) by g and
g f″(x) by x. Torch computes both anew whenever it goes through them, in a dozen passes over x that
of a transformer are a third of a product; they depend on no vector, and are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from harness.estimator.passes import is_used

# Those of whose inputs torch keeps no more than the input, as `_Activation` does: where a
# checkpointed part goes forward again, torch's own takes its place.
OPERATIONS = (F.gelu, F.silu)


def activate(func: Any, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute what one of `OPERATIONS` does; differentiable twice in float32 and float64.

    Args:
        func: Which one.
        input: Any shape.
        *args: As torch.
        **kwargs: As torch.
    """
    in_place = kwargs.get("inplace", any(args))
    if in_place or input.dtype not in (torch.float32, torch.float64):
        return func(input, *args, **kwargs)
    found: torch.Tensor = _Activation.apply(input, partial(func, **kwargs))
    return found


class _Activation(torch.autograd.Function):
    """y = f(x), f′(x) being kept when it is known."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, f: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.f, ctx.first = f, None
        return f(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        if not torch.is_grad_enabled() and ctx.first is not None:
            return g * ctx.first, None
        (x,) = ctx.saved_tensors
        is_differentiated = torch.is_grad_enabled()
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (first,) = torch.autograd.grad(
                ctx.f(z), z, torch.ones_like(z), create_graph=is_differentiated
            )
        ctx.first = first.detach()
        if not is_differentiated:
            return g * ctx.first, None
        (second,) = torch.autograd.grad(first, z, torch.ones_like(z))
        return _Slope.apply(x, g, ctx.first, second), None


class _Slope(torch.autograd.Function):
    """The gradient g f′(x)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, g: torch.Tensor, first: torch.Tensor, second: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(first, g * second)
        return g * first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        first, bend = ctx.saved_tensors
        by_x = u * bend if is_used(ctx, 0) else None
        by_g = u * first if is_used(ctx, 1) else None
        return by_x, by_g, None, None
