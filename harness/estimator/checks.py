"""What must hold before the first step: fixed arithmetic and a deterministic loss."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.errors import UserError
from harness.estimator.batches import Batch, join, leading_size, take, tensors_of
from harness.estimator.causes import BY_DIFFERENCES, explained, operations
from harness.estimator.objective import LossFn


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
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))  # whatever the caller computes under
        stack.enter_context(torch.enable_grad())
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
        stack.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield


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
    with ExitStack() as stack:
        for name, value in values.items():
            stack.callback(setattr, target, name, getattr(target, name))
            setattr(target, name, value)
        yield


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
    mean of its halves, and their numbers of terms.

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
    largest = max(batches, key=leading_size)
    for i, batch in enumerate(batches):
        with explained(model, loss_fn, batch):
            first, second = _loss(model, loss_fn, batch, i), _loss(model, loss_fn, batch, i)
        eps = torch.finfo(first.dtype).eps
        if not math.isclose(float(first), float(second), rel_tol=100 * eps):
            raise UserError(
                f"two passes over batch {i} gave the losses {float(first):.9g} and "
                f"{float(second):.9g}; {_random_source(model, loss_fn, batch)}"
            )
        size = leading_size(batch)
        if not batch_mates or num_terms is None:
            continue
        if size > 1:
            halves = [take(batch, 0, size // 2), take(batch, size // 2, size)]
            _check_counts(num_terms(batch), sum(map(num_terms, halves)), i)
            mean = _mean(model, loss_fn, halves, num_terms, i)
            _compare(float(first), mean, eps, f"the loss of batch {i}", "its halves")
        few = min(size, 2)  # some models fail on one sample
        following = batches[i + 1 : i + 2]
        pieces = [take(b, 0, few) for b in (batch, *following) if leading_size(b) >= few]
        whole = join(pieces[0], pieces[1], largest) if len(pieces) == 2 else None
        if whole is not None and all(num_terms(piece) for piece in pieces):
            mean = _mean(model, loss_fn, pieces, num_terms, i)
            both = float(_loss(model, loss_fn, whole, i))
            what = f"the loss of the first samples of batches {i} and {i + 1} together"
            _compare(both, mean, eps, what, "the two")


def _check_counts(whole: float, halves: float, index: int) -> None:
    """Raise unless the terms of a batch are those of its halves: pieces are weighted by theirs."""
    if not math.isclose(whole, halves, rel_tol=1e-6):
        raise UserError(
            f"batch_weights gives {whole:g} for batch {index}, and {halves:g} for its halves "
            "together: pass batch_weights as a function that counts the terms of the mean, or as "
            "one number per batch"
        )


def _mean(
    model: nn.Module,
    loss_fn: LossFn,
    pieces: Sequence[Batch],
    num_terms: Callable[[Batch], float],
    index: int,
) -> float | None:
    """Return the mean of the losses of pieces of a batch, None if they have no terms."""
    terms = [num_terms(piece) for piece in pieces]
    losses = [
        float(_loss(model, loss_fn, piece, index)) if n else 0.0
        for piece, n in zip(pieces, terms, strict=True)
    ]
    if sum(terms) == 0:
        return None
    return sum(n * x for n, x in zip(terms, losses, strict=True)) / sum(terms)


def _compare(whole: float, mean: float | None, eps: float, what: str, pieces: str) -> None:
    """Raise if a loss is not the mean of its pieces' losses."""
    # The pieces sum in another order, and matrix products of another size round differently; a
    # loss near zero may be what is left of terms that cancel.
    if mean is None or math.isclose(whole, mean, rel_tol=math.sqrt(eps), abs_tol=100 * eps):
        return
    raise UserError(
        f"{what} is {whole:.9g}, but {pieces} average to {mean:.9g}: either samples depend on "
        "their batch mates (batch statistics: pass norm_mode='train'), or the loss averages over "
        "something else than samples (masked tokens: pass batch_weights as a function that counts "
        "them)"
    )


def check_twice_differentiable(gradients: Iterable[torch.Tensor | None]) -> torch.dtype:
    """Raise if a custom function marked `once_differentiable` lies in the gradients' graph.

    Autograd cuts the graph there, and a backward pass pruned to a block would not run into the
    error that torch planted, but go round it: the product would be wrong without a word.

    Returns:
        The coarsest dtype that the graph computes in.
    """
    stack = [g.grad_fn for g in gradients if g is not None]
    seen = set()
    coarsest = torch.float64
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise UserError(
                "a custom autograd function of the model is marked once_differentiable and has "
                "no second derivative; write its backward in differentiable operations"
                f"{BY_DIFFERENCES}"
            )
        outputs = node._input_metadata
        for output in outputs:
            # One of several outputs that is not computed is noted as a scalar in float32.
            is_there = len(outputs) == 1 or len(output.shape)
            if output.dtype.is_floating_point and is_there:
                coarsest = max(coarsest, output.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        stack += [following for following, _ in node.next_functions]
    return coarsest


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


def warn_of_precision(
    model: nn.Module, loss_fn: LossFn, batch: Batch, precision: torch.dtype
) -> None:
    """Warn that a model in float64 computes in a coarser dtype inside, and say where."""

    def casts(func: Any, args: Any, result: Any) -> bool:
        dtypes = {t.dtype for t in tensors_of(list(args)) if t.is_floating_point()}
        coarse = isinstance(result, torch.Tensor) and result.dtype == precision
        return coarse and torch.float64 in dtypes

    found = dict.fromkeys(path for path, _ in operations(model, loss_fn, batch, casts))
    names = ", ".join(list(found)[:3]) + (", ..." if len(found) > 3 else "")
    of = f" (in {names})" if names else ""
    kind = str(precision).removeprefix("torch.")
    warnings.warn(
        f"the model computes in {kind} inside{of}, whatever its parameters' dtype: the rows say "
        f"float64, but are as accurate as {kind}; let it cast to the dtype of what it is given",
        stacklevel=3,
    )


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
    found = operations(
        model, loss_fn, batch, lambda func, *_: torch.Tag.nondeterministic_seeded in func.tags
    )
    if found:
        where = ", ".join(f"{path} ({name})" for path, name in found)
        return f"random numbers are drawn in {where}: switch that off, or draw them beforehand"
    return "the cause is a nondeterministic kernel or state kept between passes: remove it"
