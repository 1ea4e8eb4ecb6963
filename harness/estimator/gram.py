"""Exact spectra from Gram matrices: of blocks in which the outputs are locally linear, and of GGN.

With z the outputs, J_l their derivative by block l and ∇²c = S Sᵀ that of the criterion, the
Gauss-Newton matrix J_lᵀ S Sᵀ J_l has the nonzero eigenvalues of the Gram matrix A_l A_lᵀ, where
A_l = Sᵀ J_l has no more rows than there are outputs. Where z is linear in w_l the Hessian is that
matrix: in networks of ReLU, max-pooling and norms in eval mode at each weight by itself (Botev,
Ritter & Barber 2017, arXiv 1706.03662).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any

import torch

from harness.estimator.batches import Batch, leading_size, place
from harness.estimator.blocks import Block
from harness.estimator.checks import check_twice_differentiable
from harness.estimator.gram_matrix import (
    CHUNK,
    OnRows,
    Roots,
    bytes_of_layers,
    bytes_of_rows,
    of_layers,
    of_parameters,
)
from harness.estimator.graphs import criterion_at, slope_of, split_or_refuse
from harness.estimator.hessian import BlockHessian
from harness.estimator.memory import is_out_of_memory, release_cache
from harness.estimator.objective import SplitLoss
from harness.estimator.probes import draw_probe
from harness.estimator.settings import Settings
from harness.estimator.shortcuts import linear_blocks

# The eigenvalues of so many rows take half a minute of one core.
MOST_ROWS = 4096
# Unasked they are taken of samples with so many outputs: of 1,000 they take longer than sampling
# (VGG-16 on two images half an hour and more, 3 × 10 steps seven minutes).
FEW_OUTPUTS = 100
# What of a singular value of A is rounding, in eps of its dtype and relative to the largest.
_ROUNDING = 64
# Relative steps of differences, so small that few kinks lie between, how well two of them must
# agree to be believed, and how far off them a product is wrong.
_STEPS, _AGREEMENT, _OFF = (1e-6, 1e-5, 1e-4), 0.01, 0.1
_PIECES = 2  # what is wrong with a model is wrong with few samples

Rule = tuple[list[float], list[float]]  # nodes and weights
Way = Callable[[BlockHessian, Roots, Sequence[int], OnRows], dict[int, torch.Tensor]]


def most_outputs(hessian: BlockHessian, settings: Settings) -> float:
    """Return of how many outputs of a sample matrices are taken; unasked, 0 where they can't be."""
    if settings.gram is not None:
        return math.inf if settings.gram else 0
    can = hessian.is_autograd and not hessian.is_shared and isinstance(hessian.loss_fn, SplitLoss)
    return FEW_OUTPUTS if can else 0


def foreseen(hessian: BlockHessian, settings: Settings, num_samples: int) -> tuple[list[int], int]:
    """Return the blocks that `spectra` takes of so many samples, if memory lasts, and its passes.

    Args:
        hessian: Of few of the samples, which are taken to be like the others.
        settings: Tell of how many outputs.
        num_samples: In the whole batch.
    """
    if not (most := most_outputs(hessian, settings)):
        return [], 0
    split = split_or_refuse(hessian.loss_fn, "gram=True")
    num_outputs, few = _first_outputs(hessian)
    found = list(range(len(hessian.blocks)))
    if num_outputs > min(MOST_ROWS, most * few):
        return [], 0
    if hessian.operator == "hessian":
        found = [] if _knows_more(hessian, split) else linear_blocks(hessian, split, found)
    roots = _roots(hessian, split, math.inf, hessian.memory_budget) if found else None
    num_rows = sum(len(root) for _, root in roots or ()) * num_samples // few
    found = [i for i in found if min(hessian.blocks[i].num_params, num_rows) <= MOST_ROWS]
    if roots is None or not found:
        return [], 0
    return found, -(-num_rows // num_samples) + (hessian.operator == "hessian")


def spectra(
    hessian: BlockHessian,
    indices: Sequence[int],
    most_outputs: float = math.inf,
    on_rows: OnRows = lambda done, total: None,
) -> Iterator[tuple[int, Rule, int]]:
    """Yield the spectra of those blocks to which this applies and whose matrices fit the memory.

    The matrix is A Aᵀ, or Aᵀ A where the block has fewer parameters than there are rows, of at most
    4,096 rows; it is summed up in float64, whatever the dtype of A. So its small eigenvalues are
    those of A, and have lost no digits to the largest: with A in float32 those below 6e-11 of the
    largest are rounding, and counted as zeros, in float64 those below 2e-16 times their number.

    Args:
        hessian: The products; it holds the whole batch.
        indices: The blocks to look at. But for the memory that is left, whether one is taken does
            not depend on the others.
        most_outputs: Of a sample; none are taken of more.
        on_rows: Called with (rows done, rows in all) of those blocks that fit the memory at a time,
            and with (0, 1) before.

    Yields:
        A block's index, its nodes, ascending, and weights, one node 0 for all zeros, and the
        backward passes over the whole batch that its rows took.

    Raises:
        UserError: The loss is not in two parts.
        FloatingPointError: A derivative is not finite.
    """
    split = split_or_refuse(hessian.loss_fn, "gram=True")
    free = hessian.memory_budget - hessian.product_bytes - 8 * CHUNK
    num_outputs, num_samples = _first_outputs(hessian)
    if num_outputs > min(MOST_ROWS, most_outputs * num_samples):
        return
    if hessian.operator == "hessian":
        if _knows_more(hessian, split):
            return
        indices = linear_blocks(hessian, split, indices)
    if not indices:
        return
    sizes = {i: hessian.blocks[i].num_params for i in indices}
    has_small = min(sizes.values()) <= MOST_ROWS  # of these A may have more rows
    roots = _roots(hessian, split, math.inf if has_small else MOST_ROWS, free, on_rows)
    if roots is None:
        return
    num_rows = sum(len(root) for _, root in roots)
    free -= sum(root.nbytes for _, root in roots)
    fitting = [i for i, n in sizes.items() if min(n, num_rows) <= MOST_ROWS]
    if fitting and hessian.operator == "hessian":
        _warn_of_wrong_derivatives(hessian)
    passes = -(-num_rows // hessian.batch_size) + (hessian.operator == "hessian")
    ways: list[tuple[Way, dict[int, int]]] = [
        (of_layers, bytes_of_layers(hessian, roots, fitting)),
        (of_parameters, {i: bytes_of_rows(n, num_rows, hessian.dtype) for i, n in sizes.items()}),
    ]
    for way, taken in ways:
        left = [i for i in fitting if taken.get(i, free + 1) <= free]
        while left:
            used, group = 0, []
            while left and used + taken[left[0]] <= free:
                used += taken[left[0]]
                group.append(left.pop(0))
            for i, matrix in way(hessian, roots, group, on_rows).items():
                fitting.remove(i)
                yield i, _rule(matrix, hessian.blocks[i], hessian.dtype), passes


def _first_outputs(hessian: BlockHessian) -> tuple[int, int]:
    """Return how many outputs the first piece of the batch has, and how many samples."""
    piece, _ = next(iter(hessian.pieces()))
    return hessian.outputs(piece).numel(), leading_size(piece)


def _knows_more(hessian: BlockHessian, split: SplitLoss) -> bool:
    """Tell, and warn, whether the criterion depends on the model beside by the outputs.

    As one does that adds a penalty which `outputs` left somewhere: H_l holds it, J_l does not.
    """
    piece, _ = next(iter(hessian.pieces()))
    place, value = criterion_at(split, hessian.outputs(piece), piece)
    if not value.requires_grad:  # `slope_of` says what that means
        return False
    trained = [p for p in hessian.model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, [place, *trained], allow_unused=True)[1:]
    if all(g is None for g in found):
        return False
    warnings.warn(
        "the criterion of the SplitLoss depends on the model beside its outputs, so that no block "
        "is taken by a Gram matrix, and operator='ggn' leaves that part out; let outputs return it",
        stacklevel=2,
    )
    return True


def _roots(
    hessian: BlockHessian,
    split: SplitLoss,
    most_rows: float,
    most_bytes: int,
    on_rows: OnRows = lambda done, total: None,
) -> list[tuple[Batch, torch.Tensor]] | None:
    """Return pieces of the batch, each with Sᵀ by its outputs, shape (rank, *outputs).

    None where a piece has too many outputs, all have too many rows or bytes, or the criterion is
    not convex in the outputs.
    """
    found: list[tuple[Batch, torch.Tensor]] = []
    num_rows = nbytes = 0
    lowest = allowed = 0.0
    for piece, weight in hessian.pieces():
        # Without no_grad, which models that differentiate inside don't know.
        on_rows(0, 1)
        z = hessian.outputs(piece).detach()
        parts = _root(split, z, piece) if z.numel() <= MOST_ROWS else None
        if parts is None:
            return None
        root, least, rounding = parts
        lowest, allowed = min(lowest, weight * least), max(allowed, weight * rounding)
        num_rows += len(root)
        nbytes += root.numel() * z.element_size()
        if num_rows > most_rows or nbytes > most_bytes:
            return None
        if len(root):
            found.append((piece, (weight**0.5 * root).to(z.dtype).view(-1, *z.shape)))
    return found if lowest >= -allowed else None


def _root(
    split: SplitLoss, z: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, float, float] | None:
    """Return Sᵀ, shape (rank, outputs), of ∇²c = S Sᵀ but for negative eigenvalues.

    In float64, but for a criterion with tensors of its own in another dtype.

    Returns:
        Sᵀ, the smallest eigenvalue, and how far below 0 one of any sample may be by rounding: √eps
        of the largest. Of samples of which the model is sure rounding decides the signs: p (1 − p)
        is off by eps, not by eps of itself. None where an entry isn't finite.
    """
    try:
        at, slope = slope_of(split, z.double(), place(batch, z.device, torch.float64))
    except RuntimeError:
        at, slope = slope_of(split, z, batch)
    H = torch.zeros(z.numel(), z.numel(), dtype=at.dtype, device=at.device)
    for row, unit in zip(H, torch.eye(len(H), dtype=at.dtype, device=at.device), strict=True):
        if slope.requires_grad:  # else the criterion is linear
            options: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
            (d,) = torch.autograd.grad(slope, at, unit.view_as(slope), **options)
            row.copy_(d.flatten())
    if not torch.isfinite(H).all():
        return None
    values, vectors = torch.linalg.eigh((H + H.T).double() / 2)
    dtypes = (at.dtype, check_twice_differentiable([slope]))
    eps, largest = max(torch.finfo(d).eps for d in dtypes), float(values.abs().max())
    kept = values > len(H) * eps * largest
    root = (vectors[:, kept] * values[kept].sqrt()).T
    return root, float(values.min()), math.sqrt(eps) * largest


def _warn_of_wrong_derivatives(hessian: BlockHessian) -> None:
    """Warn of blocks for which the derivative of the gradient is not its slope.

    A second derivative that is wrong hides a bend: the block then seems linear. One product with
    all blocks as one, on few samples, is compared with differences of the gradient: it is right
    with the first that agrees, and wrong where two agree with each other and not with it. They want
    a copy of the model; where there is no memory for it, none is made.
    """
    few = [piece for piece, _ in islice(hessian.pieces(), _PIECES)]
    joint = hessian.of(hessian.loss_fn, few).joined()
    vector = draw_probe(joint.blocks[0].num_params, 0, "gaussian").to(joint.device, joint.dtype)
    sizes = [block.num_params for block in hessian.blocks]
    slopes: list[tuple[torch.Tensor, ...]] = []
    try:
        [product] = joint.products([(0, vector)])
        products = product.double().split(sizes)
        for step in _STEPS:
            slopes.append(joint.differences.slope(0, vector, step).split(sizes))
            if all(_apart(a, b) <= _OFF for a, b in zip(slopes[-1], products, strict=True)):
                return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        release_cache(hessian.device)
        return
    odd = []
    for i, mine in enumerate(products):
        steps = pairwise(slope[i] for slope in slopes)
        if any(_apart(a, b) <= _AGREEMENT and _apart(b, mine) > _OFF for a, b in steps):
            odd.append(hessian.blocks[i].name)
    if odd:
        warnings.warn(
            f"the second derivatives by {', '.join(odd)} are wrong: the gradient changes otherwise "
            "along a random direction, so outputs that bend may pass for linear. In the backward "
            "of custom autograd functions, compute with what save_for_backward kept, in "
            "differentiable operations",
            stacklevel=2,
        )


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |a − b| relative to the larger, 0 of zeros."""
    size = max(float(a.norm()), float(b.norm()))
    return float((a - b).norm()) / size if size else 0.0


def _rule(matrix: torch.Tensor, block: Block, dtype: torch.dtype) -> Rule:
    """Return nodes and weights of a Gram matrix, one node for all that is zero to rounding."""
    if not torch.isfinite(matrix).all():
        raise FloatingPointError(
            f"the derivative of the outputs by block {block.name!r} is not finite; use a wider "
            "dtype or look for inf or nan in it"
        )
    values = torch.linalg.eigvalsh(matrix, UPLO="L").cpu()
    rounding = max(len(values) * 2.0**-52, (_ROUNDING * torch.finfo(dtype).eps) ** 2)
    # None where the criterion is linear.
    nodes = values[values > rounding * values[-1:]].tolist()
    zeros, weights = block.num_params - len(nodes), [1.0 / block.num_params] * len(nodes)
    return ([0.0, *nodes], [zeros / block.num_params, *weights]) if zeros else (nodes, weights)
