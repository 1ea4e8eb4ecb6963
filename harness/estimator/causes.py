"""What torch's errors mean for a model, and where in it they come from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.errors import UserError

# The way without a second derivative.
BY_DIFFERENCES = ", or take products by differences (product='differences')"
_FUNC = "write torch.autograd.grad(..., create_graph=True) in its place"
# What torch says, and what to do about it.
_CAUSES = {
    "inplace operation": "an in-place operation overwrote what the second derivative needs; use "
    "the out-of-place form",
    "saved tensor hooks": "a transform of torch.func differentiates through what is checkpointed, "
    f"or has other hooks on saved tensors, which it can't; leave those out, or {_FUNC}",
    "setup_context": "a transform of torch.func meets a custom autograd function that knows none; "
    f"give that `setup_context` and `generate_vmap_rule = True`, or {_FUNC}",
    "forward AD": "an operation has no forward derivative, which torch.func.jvp, jacfwd and "
    f"hessian take; {_FUNC}",
    "use_reentrant=True": "reentrant checkpoints have no second derivative; pass "
    "use_reentrant=False to torch.utils.checkpoint",
    "captured Tensor": "a transform of torch.func meets a module that changes its own state, such "
    f"as a batch norm its running statistics; pass norm_mode='eval', or {_FUNC}",
    "torch.utils.checkpoint: ": "what is checkpointed goes otherwise the second time: it has a "
    "weight norm, or a layer norm in a loss that differentiates inside, which are computed by "
    "their formulas here; leave the checkpoint out",
    "on the same device": "a tensor that belongs neither to the model nor to the batch stays on "
    "its device; put it into one of them, or move it with .to(outputs)",
}
_NO_DERIVATIVE = re.compile(r"derivative .*not implemented|double backwards? |3rd\+ order deriv")
_DTYPES = re.compile(r"\b(double|float64|float|float32|half|bfloat16|float16)\b", re.I)
_ALIKE = {"double": "float64", "float": "float32", "half": "float16"}
# What has the same values, or like ones, and second derivatives.
_REMEDIES = {
    "roi_align": "take F.grid_sample, which interpolates likewise",
    "attention": "take torch's scaled_dot_product_attention",
    "embedding_bag": "take nn.Embedding, and the sum or mean of its rows",
    "batch_norm": "pass norm_mode='eval', or write the mean and the variance out",
}


@contextmanager
def explained(model: nn.Module, loss_fn: Callable[..., Any], batch: Any) -> Iterator[None]:
    """Turn torch's errors about derivatives, dtypes and devices into one line each.

    Raises:
        UserError: With the operation and its module, where it is known, and the remedy.
    """
    try:
        yield
    except (RuntimeError, TypeError, AttributeError) as error:
        text = str(error).splitlines()[0].split(" Hint:")[0] if str(error) else ""
        said = _cause(text, error, model, loss_fn, batch)
        if said is None:
            raise
        raise UserError(f"{said}: {text}") from error


def operations(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    batch: Any,
    wanted: Callable[[Any, Any, Any], bool],
) -> list[tuple[str, str]]:
    """List the modules and operations of a forward pass that are wanted, each pair once.

    A pass that fails is listed as far as it comes.

    Args:
        model: The model.
        loss_fn: Called with the model and the batch.
        batch: As above.
        wanted: Called with each operation of torch, its arguments and its result.
    """
    stack: list[str] = []
    found: list[tuple[str, str]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if wanted(func, args, result):
                found.append((stack[-1] if stack else "loss_fn", str(func.overloadpacket)))
            return result

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            name = path or type(module).__name__
            enter = module.register_forward_pre_hook(lambda *_, name=name: stack.append(name))
            leave = module.register_forward_hook(lambda *_: stack.pop() and None)
            hooks.enter_context(enter)
            hooks.enter_context(leave)
        with Watch(), torch.enable_grad(), suppress(Exception):
            loss_fn(model, batch)
    return list(dict.fromkeys(found))


def _cause(
    text: str, error: Exception, model: nn.Module, loss_fn: Callable[..., Any], batch: Any
) -> str | None:
    """Return what an error of torch means, None if it is not known to mean anything else."""
    if not isinstance(error, RuntimeError):
        is_criterion = getattr(loss_fn, "__module__", "").startswith("torch.nn.")
        is_criterion |= not callable(loss_fn)
        named = type(model).__name__ in text or "positional argument" in text
        is_order = is_criterion or (named and not _calls(model, loss_fn, batch))
        return _ORDER if is_order else None
    for sign, cause in _CAUSES.items():
        if sign in text:
            return cause
    if _NO_DERIVATIVE.search(text):
        return _without_derivative(text, model, loss_fn, batch)
    if len({_ALIKE.get(word.lower(), word) for word in _DTYPES.findall(text)}) > 1:
        return (
            "tensors of two dtypes meet; those that belong neither to the model nor to the batch, "
            "such as weights of classes, keep theirs: put them into one of the two, or cast them "
            "with .to(outputs)"
        )
    return None


_ORDER = (
    "loss_fn is called with (model, batch) and has to call the model itself; of a criterion that "
    "takes outputs and targets, pass lambda m, b: criterion(m(b[0]), b[1])"
)


def _without_derivative(
    text: str, model: nn.Module, loss_fn: Callable[..., Any], batch: Any
) -> str:
    """Name the operation that lacks a derivative, its module and what to take instead."""
    words = {word.removesuffix("_backward").strip("_") for word in re.findall(r"\w+", text)}

    def is_meant(func: Any, args: Any, result: Any) -> bool:
        name = func.overloadpacket.__name__.removeprefix("native_").strip("_")
        return name in words

    found = operations(model, loss_fn, batch, is_meant)
    remedy = next((r for word, r in _REMEDIES.items() if word in text), "write it in others")
    which = "third" if "3rd" in text else "second"
    remedy += BY_DIFFERENCES if which == "second" else ""
    if not found:
        return f"an operation of the model has no {which} derivative; {remedy}"
    where = ", ".join(dict.fromkeys(_described(model, path) for path, _ in found))
    return f"{found[0][1]}, used in {where}, has no {which} derivative; {remedy}"


def _described(model: nn.Module, path: str) -> str:
    module = dict(model.named_modules()).get(path)
    return path if module is None else f"{path} ({type(module).__name__})"


def _calls(model: nn.Module, loss_fn: Callable[..., Any], batch: Any) -> bool:
    """Tell whether a loss calls the model before it fails."""
    called: list[bool] = []
    with model.register_forward_pre_hook(lambda *_: called.append(True)), suppress(Exception):
        loss_fn(model, batch)
    return bool(called)
