"""What must hold before the first step: fixed arithmetic and a deterministic loss."""

from __future__ import annotations

import hashlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from harness.errors import UserError

Batch = Any
LossFn = Callable[[nn.Module, Batch], torch.Tensor]


@contextmanager
def fixed_arithmetic(model: nn.Module, matmul_precision: str = "highest") -> Iterator[None]:
    """Enforce deterministic kernels, the given matmul precision and twice differentiable attention.

    Fused attention and fused recurrent kernels have no second derivative: the math kernel stands
    in for the first, the native one for the second. Compiled models, whose graphs have none either,
    run as they are written. Everything is restored afterwards.

    Args:
        model: Looked at for recurrent modules.
        matmul_precision: As in `torch.set_float32_matmul_precision`: highest (float32), high
            (TF32), medium (bfloat16).
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())  # whatever the caller computes under
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # slow to import, and nothing is compiled without it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(_set(torch.backends.mkldnn, enabled=False))
            stack.enter_context(_set(torch.backends.cudnn, enabled=False))
        stack.enter_context(_matmul_precision(matmul_precision))
        # Deterministic mode fills what nothing has written to yet, 2.6 times the fills of a
        # product. Kernels that read it would not pass the check that the loss repeats.
        stack.enter_context(_set(torch.utils.deterministic, fill_uninitialized_memory=False))
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """Multiply float32 matrices in the given precision, on whatever device."""
    tf32 = "ieee" if precision == "highest" else "tf32"
    mkldnn: Any = torch.backends.mkldnn
    cudnn: Any = torch.backends.cudnn
    backends: list[tuple[Any, str]] = []
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # since torch 2.9
        backends = [
            (torch.backends.cuda.matmul, tf32),
            (cudnn.conv, tf32),
            (cudnn.rnn, tf32),
            (mkldnn.conv, "ieee"),
            (mkldnn.matmul, "bf16" if precision == "medium" else tf32),
        ]
    with ExitStack() as stack:
        for backend, _ in backends:
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
        # The older settings as well, since torch raises where the two differ; where a caller has
        # used the newer ones they can't be read.
        with suppress(RuntimeError):
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision(precision)
        with suppress(RuntimeError):
            stack.enter_context(_set(cudnn, allow_tf32=tf32 == "tf32"))
        for backend, value in backends:
            backend.fp32_precision = value
        yield


@contextmanager
def _set(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes, and restore them afterwards."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def leading_size(batch: Batch) -> int:
    """Return the leading dimension that the batch's tensors share (of the first where not)."""
    sizes = [leaf.shape[0] for leaf in tree_leaves(batch) if _has_rows(leaf)]
    if not sizes:
        raise UserError(
            f"a batch of type {type(batch).__name__} holds no tensor with a leading dimension; "
            "pass a tensor, or a tuple, list or dict of tensors"
        )
    return int(sizes[0])


def take(batch: Batch, start: int, stop: int) -> Batch:
    """Return samples start:stop of every tensor that has the batch's leading dimension."""
    size = leading_size(batch)

    def rows(t: torch.Tensor) -> torch.Tensor:
        return t[start:stop] if t.dim() and t.shape[0] == size else t

    return tree_map_only(torch.Tensor, rows, batch)


def batch_hash(batches: Sequence[Batch]) -> str:
    """Return 16 hex digits of the SHA-256 of the batches' samples, independent of the split."""
    digest = hashlib.sha256()
    leaves = [[x for x in tree_leaves(b) if isinstance(x, torch.Tensor)] for b in batches]
    for tensors in zip(*leaves, strict=True):
        rows = [t.detach().cpu() for t in tensors]
        digest.update(f"{rows[0].dtype}{tuple(rows[0].shape[1:])}".encode())
        for t in rows:
            digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_deterministic(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Batch],
    num_terms: Callable[[Batch], float] | None,
    *,
    batch_mates: bool,
) -> None:
    """Raise unless the loss is finite, repeatable and, if asked, a mean over independent samples.

    Two passes over every microbatch must agree, and so must each microbatch and the weighted
    mean of its halves.

    Args:
        model: In the mode in which products will be taken.
        loss_fn: (model, batch) ↦ mean loss.
        batches: The microbatches.
        num_terms: Number of terms that the loss of a batch averages; None: not known, halves
            are not compared.
        batch_mates: Compare the halves too.

    Raises:
        UserError: Naming the cause: the module and operation that draw random numbers, the
            dependence on batch mates, or a loss that is no finite scalar.
    """
    for i, batch in enumerate(batches):
        first, second = _loss(model, loss_fn, batch, i), _loss(model, loss_fn, batch, i)
        eps = torch.finfo(first.dtype).eps
        if not math.isclose(float(first), float(second), rel_tol=100 * eps):
            raise UserError(
                f"two passes over batch {i} gave the losses {float(first):.9g} and "
                f"{float(second):.9g}; {_random_source(model, loss_fn, batch)}"
            )
        size = leading_size(batch)
        if not batch_mates or num_terms is None or size < 2:
            continue
        halves = [take(batch, 0, size // 2), take(batch, size // 2, size)]
        terms = [num_terms(half) for half in halves]
        losses = [
            float(_loss(model, loss_fn, half, i)) if n else 0.0
            for half, n in zip(halves, terms, strict=True)
        ]
        if sum(terms) == 0:
            continue
        mean = sum(n * x for n, x in zip(terms, losses, strict=True)) / sum(terms)
        # The halves sum in another order, and matrix products of another size round differently;
        # a loss near zero may be what is left of terms that cancel.
        if not math.isclose(float(first), mean, rel_tol=math.sqrt(eps), abs_tol=100 * eps):
            raise UserError(
                f"the loss of batch {i} is {float(first):.9g}, but its halves average to "
                f"{mean:.9g}: either samples depend on their batch mates (batch statistics: pass "
                "norm_mode='train'), or the loss averages over something else than samples "
                "(masked tokens: pass batch_weights as a function that counts them)"
            )


def check_twice_differentiable(gradients: Iterable[torch.Tensor | None]) -> None:
    """Raise if a custom function marked `once_differentiable` lies in the gradients' graph.

    Autograd cuts the graph there, and a backward pass pruned to a block would not run into the
    error that torch planted, but go round it: the product would be wrong without a word.
    """
    stack = [g.grad_fn for g in gradients if g is not None]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise UserError(
                "a custom autograd function of the model is marked once_differentiable and has "
                "no second derivative; write its backward in differentiable operations"
            )
        stack += [following for following, _ in node.next_functions]


def warn_of_asymmetry(asymmetries: Iterable[tuple[str, float]], dtype: torch.dtype) -> None:
    """Warn of blocks whose products are not those of a symmetric matrix, beyond rounding.

    Args:
        asymmetries: Names of blocks, a block once or once a probe, and how far uᵀHv and vᵀHu are
            apart, relative to ‖H‖.
        dtype: Of the products; what exceeds √eps of it is not taken for rounding.
    """
    allowed = math.sqrt(torch.finfo(dtype).eps)
    odd = [(name, value) for name, value in asymmetries if value > allowed]
    if odd:
        warnings.warn(
            f"the Hessian of {', '.join(dict.fromkeys(name for name, _ in odd))} is not symmetric: "
            f"uᵀHv and vᵀHu differ by up to {max(value for _, value in odd):.1e} of its norm. "
            "Either a second derivative of the model is wrong, or the block's Hessian is zero but "
            "for rounding, as that of attention's key biases is: then dtype=torch.float64 makes "
            "its eigenvalues smaller still",
            stacklevel=2,
        )


@contextmanager
def second_derivative_errors() -> Iterator[None]:
    """Turn autograd's errors about missing second derivatives into ones that say what to do."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).splitlines()[0].split(" Hint:")[0]
        causes = {
            "is not implemented": "an operation of the model has no second derivative; replace it "
            "by differentiable ones (for attention, torch's scaled_dot_product_attention)",
            "inplace operation": "an in-place operation overwrote what the second derivative "
            "needs; use the out-of-place form",
        }
        for sign, cause in causes.items():
            if sign in text:
                raise UserError(f"{cause}: {text}") from error
        raise


def _loss(model: nn.Module, loss_fn: LossFn, batch: Batch, index: int) -> torch.Tensor:
    loss = _forward(model, loss_fn, batch)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        what = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise UserError(
            f"loss_fn returned {what} for batch {index}; it must return the mean loss, "
            "a real scalar tensor"
        )
    if not torch.isfinite(loss).all():
        raise UserError(
            f"the loss of batch {index} is {float(loss)}; the spectrum needs a finite loss: "
            "look at the model's outputs and at the batch"
        )
    return loss


def _forward(model: nn.Module, loss_fn: LossFn, batch: Batch) -> Any:
    """Return the loss without a graph, unless it differentiates inside and so needs one."""
    try:
        with torch.no_grad():
            return loss_fn(model, batch)
    except RuntimeError as error:
        if "require grad" not in str(error):
            raise
    with torch.enable_grad():
        loss = loss_fn(model, batch)
    return loss.detach() if isinstance(loss, torch.Tensor) else loss


def _random_source(model: nn.Module, loss_fn: LossFn, batch: Batch) -> str:
    """Name the module and the operation that draw random numbers in a forward pass."""
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    stack: list[str] = []
    found: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if torch.Tag.nondeterministic_seeded in func.tags:
                found.append(f"{stack[-1] if stack else 'loss_fn'} ({func.overloadpacket})")
            return func(*args, **(kwargs or {}))

    hooks = []
    for module, name in names.items():
        enter = module.register_forward_pre_hook(lambda *_, name=name: stack.append(name))
        leave = module.register_forward_hook(lambda *_: stack.pop() and None)
        hooks += [enter, leave]
    try:
        with Watch():
            _forward(model, loss_fn, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        where = ", ".join(dict.fromkeys(found))
        return f"random numbers are drawn in {where}: switch that off, or draw them beforehand"
    return "the cause is a nondeterministic kernel or state kept between passes: remove it"


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0
