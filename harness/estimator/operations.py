"""Torch's operations, replaced in a forward pass where their higher derivatives are not to be had.

Convolutions, cross-entropy, layer norms and activations by ones that compute less; weight norms,
and layer norms where the loss differentiates, by their formulas, since the derivatives of torch's
own kernels are wrong; hardsigmoid and hardswish by theirs, since torch's have no second derivative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from harness.estimator import activations, convolution, layer_norm
from harness.estimator.cross_entropy import cross_entropy

_DERIVATIVES = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)


class SoundOperations(TorchFunctionMode):
    """Replaces operations by ones whose products with the Hessian are right, and cheap.

    To be entered around forward passes. The backward passes, in which checkpointed parts go forward
    again, are torch's own: what computes less keeps the same tensors there, a norm others, which
    raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self._looks = self._differentiates = False

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Find out whether the loss, computed inside, takes derivatives itself."""
        self._looks = True
        try:
            with self:
                yield
        finally:
            self._looks = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._looks:
            self._differentiates |= func in _DERIVATIVES
        elif func in _PIECEWISE:
            return _PIECEWISE[func](*args, **kwargs)
        elif func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        elif func in layer_norm.OPERATIONS and (self._differentiates or _transforms()):
            return layer_norm.by_formula(*args, **kwargs)
        elif torch.is_grad_enabled() and not _transforms():
            if func in convolution.OPERATIONS:
                return convolution.convolve(func, *args, **kwargs)
            if not self._differentiates:  # what follows has two derivatives
                if func in activations.OPERATIONS:
                    return activations.activate(func, *args, **kwargs)
                if func in layer_norm.OPERATIONS:
                    return layer_norm.normalize(*args, **kwargs)
                if func is F.cross_entropy:
                    return cross_entropy(*args, **kwargs)
        return func(*args, **kwargs)


class PiecewiseOperations(TorchFunctionMode):
    """Replaces but the operations that have no second derivative of torch's own."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _PIECEWISE.get(func, func)(*args, **(kwargs or {}))


def _hardsigmoid(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """Return min(max(x + 3, 0), 6) / 6 (Howard et al. 2019, arXiv 1905.02244, section 5.2)."""
    found = F.relu6(input + 3) / 6
    return input.copy_(found) if inplace else found


def _hardswish(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """Return x hardsigmoid(x)."""
    x = input.clone() if inplace else input
    found = x * _hardsigmoid(x)
    return input.copy_(found) if inplace else found


_PIECEWISE = {
    F.hardsigmoid: _hardsigmoid,
    F.hardswish: _hardswish,
    torch._C._nn.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardswish: _hardswish,
}


def _transforms() -> bool:
    """Tell whether a transform of torch.func, or forward differentiation, is at work."""
    at_work: bool = torch._C._functorch.peek_interpreter_stack() is not None
    return at_work or forward_ad._current_level >= 0


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Return v g / |v|: the second derivative of torch's own kernel is wrong (seen on CPU)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))
