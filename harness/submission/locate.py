"""Which module of a model is to blame: each is called alone with the inputs that it gets.

Modules are tried from the innermost outwards, so that the first that misbehaves is named, not those
around it. To be used inside `checks.fixed_arithmetic`.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from harness.errors import UserError
from harness.estimator.batches import Batch, leading_size, take
from harness.estimator.checks import check_twice_differentiable
from harness.estimator.objective import LossFn

_HARNESS = Path(__file__).parents[1]
# Steps of central differences, relative to the size of what is moved: kinks spoil large ones,
# rounding small ones. A gradient that is right agrees at one of them, mostly at the first.
STEPS = (1e-4, 1e-5, 1e-3, 1e-6, 1e-2, 1e-7)
# Of derivatives by central differences, relative; the best steps leave about eps^(2/3).
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-2}

Call = tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]


def without_second_derivative(model: nn.Module, loss_fn: LossFn, batch: Batch) -> str | None:
    """Name the module that can't be differentiated twice, None if each can."""
    return _first(model, loss_fn, batch, _differentiate_twice)


def with_wrong_gradient(
    model: nn.Module, loss_fn: LossFn, batch: Batch, precision: torch.dtype
) -> str | None:
    """Name the module whose gradient isn't the slope of its output, None if there is none.

    Such are custom functions with a backward of their own mind, straight-through estimators and
    detached parts. The model is altered and put back, up to rounding.
    """
    return _first(model, loss_fn, batch, partial(_compare_slope, tolerance=TOLERANCES[precision]))


def with_wrong_second_derivative(
    model: nn.Module, loss_fn: LossFn, batch: Batch, precision: torch.dtype
) -> str | None:
    """Name the module whose second derivative isn't the slope of its first, None if none is.

    Such are custom functions whose backward computes with what autograd does not follow.
    """
    check = partial(_compare_slope, tolerance=TOLERANCES[precision], second=True)
    return _first(model, loss_fn, batch, check)


def with_batch_mates(model: nn.Module, loss_fn: LossFn, batch: Batch) -> str | None:
    """Name the module whose outputs for a sample depend on the other samples, None if none."""
    with torch.no_grad():
        return _first(model, loss_fn, batch, _compare_halves)


def not_finite(model: nn.Module, loss_fn: LossFn, batch: Batch) -> str | None:
    """Name the module that makes a nan or an infinity of finite inputs, None if there is none."""

    def check(call: Call) -> None:
        _, module, args, kwargs = call
        if finite((args, kwargs)) and not finite(module(*args, **kwargs)):
            raise _Misbehaves

    with torch.no_grad():
        return _first(model, loss_fn, batch, check)


def frame_of(error: BaseException) -> str:
    """Return " (file.py, line n: code)" of the author's last line that an error went through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        ours = _HARNESS in path.parents and "networks" not in path.parts
        if not ours and "site-packages" not in path.parts and path.exists():
            return f" ({path.name}, line {frame.lineno}: {frame.line})"
    return ""


class _Misbehaves(Exception):  # noqa: N818
    """What a probe of a module raises."""


def _first(
    model: nn.Module, loss_fn: LossFn, batch: Batch, check: Callable[[Call], None]
) -> str | None:
    """Name the first module, from the innermost outwards, for which a check raises."""
    for call in _calls(model, loss_fn, batch):
        try:
            check(call)
        except _Misbehaves:
            return _describe(call[0], call[1])
        except Exception:  # the module doesn't stand being called alone
            continue
    return None


def _calls(model: nn.Module, loss_fn: LossFn, batch: Batch) -> Iterator[Call]:
    """Yield modules with the arguments of their last call, the innermost first."""
    calls: dict[str, Call] = {}
    names = {module: name for name, module in model.named_modules()}

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        # Copies: what follows may write into them.
        kept = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (args, kwargs))
        calls[names[module]] = (names[module], module, *kept)

    hooks = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in names]
    try:
        with torch.no_grad():
            loss_fn(model, batch)
    except Exception:  # those called before it are known
        pass
    finally:
        for hook in hooks:
            hook.remove()
    yield from sorted(calls.values(), key=lambda call: -len(call[0].split(".")) * bool(call[0]))


def _leaves(call: Call) -> tuple[list[torch.Tensor], Callable[[], list[torch.Tensor]]]:
    """Return what a module depends on, and a function that computes its outputs from them."""
    _, module, args, kwargs = call
    inputs = [t.requires_grad_() for t in _floating((args, kwargs))]
    known = {id(t) for t in inputs}

    def outputs() -> list[torch.Tensor]:
        # In-place operations may not touch leaves.
        fresh = tree_map_only(
            torch.Tensor, lambda t: t.clone() if id(t) in known else t, (args, kwargs)
        )
        return _floating(module(*fresh[0], **fresh[1]))

    weights = [p for p in module.parameters() if p.requires_grad and p.is_floating_point()]
    return inputs + weights, outputs


def _differentiate_twice(call: Call) -> None:
    leaves, outputs = _leaves(call)
    total = _sum_of_squares(outputs())
    if total is None or not leaves:
        return
    try:
        first = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        check_twice_differentiable(first)
        again = _sum_of_squares([g for g in first if g is not None])
        if again is not None:
            torch.autograd.grad(again, leaves, allow_unused=True)
    except (RuntimeError, NotImplementedError, UserError) as error:
        raise _Misbehaves from error


def _sum_of_squares(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    parts = [t.square().sum() for t in tensors if t.requires_grad]
    return torch.stack(parts).sum() if parts else None


def _compare_slope(call: Call, tolerance: float, *, second: bool = False) -> None:
    """Compare the gradient of a random sum of the outputs with their central differences.

    With `second` of a random sum of the gradient.
    """
    leaves, outputs = _leaves(call)
    generator = torch.Generator().manual_seed(0)

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    found = outputs()
    if not found or not leaves:
        return
    onto, directions = [draw(t) for t in found], [draw(t) for t in leaves]
    across = [draw(t) for t in leaves]

    def value() -> torch.Tensor:
        with torch.enable_grad():
            total = _dot(outputs(), onto)
            if not second:
                return total
            return _dot(_gradients(total, leaves, create_graph=True), across)

    here = value()
    gradients = _gradients(here, leaves)
    pairs = list(zip(gradients, directions, strict=True))
    slope = sum(float((g * v).sum()) for g, v in pairs)
    size = sum(float(g.norm() * v.norm()) for g, v in pairs) + 1e-3 * abs(here.item())
    scale = sum(float(t.detach().norm()) for t in leaves) or 1.0
    for step in STEPS:
        length = step * scale / sum(float(v.norm()) for v in directions)
        values = []
        for sign in (1, -1):
            _move(leaves, directions, sign * length)
            values.append(float(value().detach()))
            _move(leaves, directions, -sign * length)
        if abs((values[0] - values[1]) / (2 * length) - slope) <= tolerance * size:
            return
    raise _Misbehaves


def _gradients(
    total: torch.Tensor, leaves: list[torch.Tensor], *, create_graph: bool = False
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of a sum, zeros where it does not depend on a leaf."""
    if not total.requires_grad:
        return tuple(torch.zeros_like(t) for t in leaves)
    return torch.autograd.grad(total, leaves, create_graph=create_graph, materialize_grads=True)


def _dot(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    products = [(t * r).sum() for t, r in zip(tensors, others, strict=True)]
    return torch.stack(products).sum()


def _move(tensors: list[torch.Tensor], directions: list[torch.Tensor], length: float) -> None:
    for t, v in zip(tensors, directions, strict=True):
        t.data.add_(v, alpha=length)


def _compare_halves(call: Call) -> None:
    _, module, args, kwargs = call
    size = leading_size((args, kwargs))
    some_args, some_kwargs = take((args, kwargs), 0, size // 2)
    whole, half = module(*args, **kwargs), module(*some_args, **some_kwargs)
    for a, b in zip(tree_leaves(whole), tree_leaves(half), strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point() and a.dim() and len(a) == size:
            tolerance = torch.finfo(a.dtype).eps ** 0.5
            if not torch.allclose(a[: size // 2], b, rtol=tolerance, atol=tolerance):
                raise _Misbehaves


def finite(tree: Any) -> bool:
    """Tell whether all floating tensors of a tree are finite."""
    return all(bool(torch.isfinite(t).all()) for t in _floating(tree))


def _floating(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _describe(name: str, module: nn.Module) -> str:
    """Return a module's path, its class, and where that is defined if it is the author's."""
    kind = type(module)
    where = ""
    try:
        file = Path(inspect.getsourcefile(kind) or "")
        if file.name and "site-packages" not in file.parts:
            where = f", {file.name} line {inspect.getsourcelines(kind.forward)[1]}"
    except (TypeError, OSError):  # defined in a shell
        pass
    return f"{name or 'the model itself'} ({kind.__name__}{where})"
