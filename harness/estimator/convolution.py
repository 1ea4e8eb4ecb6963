"""Convolutions whose derivatives compute only what a block's product needs.

Torch's double backward of a convolution computes the gradient of the weight whether it was asked
for or not, and so does the second pass through the forward convolutions: for a block's product
that is one convolution in two thrown away. The three operations here are each other's
derivatives, all being parts of the trilinear form ⟨g, conv(x, w)⟩, and skip what the block in
hand does not need.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn import grad as conv_grad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Operation, gradient of its input, gradient of its weight.
_OPERATIONS = {
    torch.conv1d: (F.conv1d, conv_grad.conv1d_input, conv_grad.conv1d_weight),
    torch.conv2d: (F.conv2d, conv_grad.conv2d_input, conv_grad.conv2d_weight),
    torch.conv3d: (F.conv3d, conv_grad.conv3d_input, conv_grad.conv3d_weight),
}


class PrunedConvolutions(TorchFunctionMode):
    """Replaces the convolutions of a forward pass by ones that skip what is not needed.

    To be entered around the forward pass; `for_parameters` around a second backward pass says
    with respect to which parameters it differentiates. Weight norms, which are mostly those of
    convolutions, are replaced by their formula.
    """

    def __init__(self) -> None:
        super().__init__()
        self._uses: Counter[int] = Counter()  # of each parameter, in this forward pass
        self._targets: frozenset[int] | None = None
        self._in_forward = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._uses.update(id(a) for a in _leaves(args, kwargs) if isinstance(a, nn.Parameter))
        if func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        if func not in _OPERATIONS or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        return self._convolve(func, *args, **kwargs)

    def _convolve(
        self,
        func: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> torch.Tensor:
        # Named as torch names them: callers may pass them by keyword.
        x, w = input, weight
        if isinstance(padding, str):
            padding = _as_numbers(padding, w.shape[2:], dilation)
        plain = isinstance(padding, str) or x.dim() != w.dim()
        # Autocast casts the arguments of torch's own convolutions alone.
        if plain or torch.is_autocast_enabled(x.device.type):
            return func(x, w, bias, stride, padding, dilation, groups)
        weight_id = id(w) if isinstance(w, nn.Parameter) else None
        settings = (stride, padding, dilation, groups)
        shape = _Shape(self, func, x.shape, w.shape, weight_id, self._uses, settings)
        y = _Convolve.apply(x, w, shape)
        return y if bias is None else y + bias.view(-1, *[1] * (w.dim() - 2))

    def __enter__(self) -> Self:
        self._uses = Counter()  # kept graphs of other batches hold theirs
        self._in_forward = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._in_forward = False

    @contextmanager
    def for_parameters(self, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
        """Compute only what derivatives with respect to these parameters need."""
        self._targets = frozenset(map(id, parameters))
        try:
            yield
        finally:
            self._targets = None

    def count_gradient(self, weight: int | None) -> None:
        """Count one more use of a weight if the loss itself contains its convolution's gradient."""
        if self._in_forward and weight is not None:
            self._uses[weight] += 1

    def needs_weight(self, weight: int | None) -> bool:
        """Tell whether the gradient of a weight is asked for; of a computed one (None) always."""
        return self._targets is None or weight is None or weight in self._targets

    def needs_input(self, weight: int | None, uses: Counter[int]) -> bool:
        """Tell whether the input of a convolution can depend on the parameters asked for.

        Not if this convolution's weight is the only one and is used here alone.
        """
        return weight is None or self._targets != {weight} or uses[weight] > 1


@dataclass(frozen=True)
class _Shape:
    """What the three operations on one convolution share, beside their tensors."""

    mode: PrunedConvolutions
    func: Any
    input: torch.Size
    weight: torch.Size
    weight_id: int | None
    uses: Counter[int]
    settings: tuple[Any, ...]


class _Convolve(torch.autograd.Function):
    """(x, w) ↦ conv(x, w)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, shape: _Shape) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        ctx.shape = shape
        return _OPERATIONS[shape.func][0](x, w, None, *shape.settings)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w = ctx.saved_tensors
        ctx.shape.mode.count_gradient(ctx.shape.weight_id)
        return (
            _InputGradient.apply(g, w, ctx.shape) if _wants(ctx, 0) else None,
            _WeightGradient.apply(g, x, ctx.shape) if _wants(ctx, 1) else None,
            None,
        )


class _InputGradient(torch.autograd.Function):
    """(g, w) ↦ the gradient of ⟨g, conv(x, w)⟩ with respect to x."""

    @staticmethod
    def forward(ctx: Any, g: torch.Tensor, w: torch.Tensor, shape: _Shape) -> torch.Tensor:
        ctx.save_for_backward(g, w)
        ctx.shape = shape
        return _OPERATIONS[shape.func][1](shape.input, w, g, *shape.settings)

    @staticmethod
    def backward(ctx: Any, h: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        g, w = ctx.saved_tensors
        return (
            _Convolve.apply(h, w, ctx.shape) if ctx.needs_input_grad[0] else None,
            _WeightGradient.apply(g, h, ctx.shape) if _wants(ctx, 1) else None,
            None,
        )


class _WeightGradient(torch.autograd.Function):
    """(g, x) ↦ the gradient of ⟨g, conv(x, w)⟩ with respect to w."""

    @staticmethod
    def forward(ctx: Any, g: torch.Tensor, x: torch.Tensor, shape: _Shape) -> torch.Tensor:
        ctx.save_for_backward(g, x)
        ctx.shape = shape
        return _OPERATIONS[shape.func][2](x, shape.weight, g, *shape.settings)

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        g, x = ctx.saved_tensors
        shape = ctx.shape
        wants_x = ctx.needs_input_grad[1] and shape.mode.needs_input(shape.weight_id, shape.uses)
        return (
            _Convolve.apply(x, u, ctx.shape) if ctx.needs_input_grad[0] else None,
            _InputGradient.apply(g, u, ctx.shape) if wants_x else None,
            None,
        )


def _leaves(args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Any]:
    """Return the arguments of a call, those inside of lists too."""
    values = (*args, *kwargs.values())
    nested = any(isinstance(v, list | tuple | dict) for v in values)
    return tree_leaves(values) if nested else values


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Return v g / |v|: the second derivative of torch's own kernel is wrong (seen on CPU)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _as_numbers(
    padding: str, kernel: Sequence[int], dilation: int | Sequence[int]
) -> str | Sequence[int]:
    """Return a named padding as numbers; as it is where the two sides of a dimension differ."""
    if padding == "valid":
        return [0] * len(kernel)
    steps = [dilation] * len(kernel) if isinstance(dilation, int) else dilation
    spans = [d * (k - 1) for d, k in zip(steps, kernel, strict=True)]
    return padding if any(span % 2 for span in spans) else [span // 2 for span in spans]


def _wants(ctx: Any, index: int) -> bool:
    """Tell whether the gradient of the input (0) or of the weight (1) is worth computing."""
    mode, weight, uses = ctx.shape.mode, ctx.shape.weight_id, ctx.shape.uses
    asked = mode.needs_weight(weight) if index else mode.needs_input(weight, uses)
    return bool(ctx.needs_input_grad[index] and asked)
