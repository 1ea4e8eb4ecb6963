"""Convolutions whose derivatives compute only what a block's product needs.

Torch's double backward of a convolution computes the gradient of the weight whether it was asked
for or not, and so does the second pass through the forward convolutions: for a block's product
that is one convolution in two thrown away. The three operations here are each other's
derivatives, all being parts of the trilinear form ⟨g, conv(x, w)⟩, and skip what autograd's engine
would throw away: it knows of each pass which nodes lead to what it differentiates by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from torch.nn import grad as conv_grad

from harness.estimator.passes import is_used

# Operation, gradient of its input, gradient of its weight.
OPERATIONS = {
    torch.conv1d: (F.conv1d, conv_grad.conv1d_input, conv_grad.conv1d_weight),
    torch.conv2d: (F.conv2d, conv_grad.conv2d_input, conv_grad.conv2d_weight),
    torch.conv3d: (F.conv3d, conv_grad.conv3d_input, conv_grad.conv3d_weight),
}
_PLACES = _OUTPUT, _INPUT, _WEIGHT = range(3)  # of ⟨g, conv(x, w)⟩: g, x and w


def convolve(
    func: Any,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Compute what one of `OPERATIONS` does; its derivatives compute only what is used.

    Args:
        func: Which one; the other arguments are named as it names them.
        input: (B, C, ...).
        weight: (D, C / groups, ...).
        bias: (D,).
        stride: As torch.
        padding: As torch.
        dilation: As torch.
        groups: As torch.
    """
    x, w = input, weight
    if isinstance(padding, str):
        padding = _as_numbers(padding, w.shape[2:], dilation)
    # Of complex numbers the derivatives are conjugate, and no part of the trilinear form.
    plain = isinstance(padding, str) or x.dim() != w.dim() or x.is_complex()
    # Autocast casts the arguments of torch's own convolutions alone.
    if plain or torch.is_autocast_enabled(x.device.type):
        return func(x, w, bias, stride, padding, dilation, groups)
    call = func, x.shape, w.shape, (stride, padding, dilation, groups)
    y: torch.Tensor = _Derivative.apply(x, w, _OUTPUT, call)
    return y if bias is None else y + bias.view(-1, *[1] * (w.dim() - 2))


class _Derivative(torch.autograd.Function):
    """The derivative of ⟨g, conv(x, w)⟩ by the one of g, x and w that it is not given.

    That by g is conv(x, w) itself. Those by what it is given are such derivatives again, of one
    call: its function, the shapes of x and w, and the settings.
    """

    @staticmethod
    def forward(
        ctx: Any, first: torch.Tensor, second: torch.Tensor, by: int, call: tuple[Any, ...]
    ) -> torch.Tensor:
        ctx.save_for_backward(first, second)
        ctx.by, ctx.call = by, call
        func, shape_of_x, shape_of_w, settings = call
        conv, input_gradient, weight_gradient = OPERATIONS[func]
        if by == _INPUT:
            return input_gradient(shape_of_x, second, first, *settings)
        if by == _WEIGHT:
            return weight_gradient(second, shape_of_w, first, *settings)
        return conv(first, second, None, *settings)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given = [place for place in _PLACES if place != ctx.by]
        filled = dict(zip(given, ctx.saved_tensors, strict=True)) | {ctx.by: cotangent}
        found = [
            _Derivative.apply(*(filled[p] for p in _PLACES if p != by), by, ctx.call)
            if is_used(ctx, i)
            else None
            for i, by in enumerate(given)
        ]
        return *found, None, None


def _as_numbers(
    padding: str, kernel: Sequence[int], dilation: int | Sequence[int]
) -> str | Sequence[int]:
    """Return a named padding as numbers; as it is where the two sides of a dimension differ."""
    if padding == "valid":
        return [0] * len(kernel)
    steps = [dilation] * len(kernel) if isinstance(dilation, int) else dilation
    spans = [d * (k - 1) for d, k in zip(steps, kernel, strict=True)]
    return padding if any(span % 2 for span in spans) else [span // 2 for span in spans]
