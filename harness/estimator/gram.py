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
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, islice, pairwise
from typing import Any

import torch

from harness.estimator.batches import Batch, join, leading_size, place, tensors_of
from harness.estimator.blocks import Block
from harness.estimator.checks import check_twice_differentiable
from harness.estimator.graphs import slope_of, split_or_refuse
from harness.estimator.hessian import BlockHessian
from harness.estimator.layers import Layer, agrees, layers_of, places, traced
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
# Entries of A that are taken to float64 at a time: 8 MiB, so that its memory is used again.
_CHUNK = 1 << 20
# What of a singular value of A is rounding, in eps of its dtype and relative to the largest.
_ROUNDING = 64
# Relative steps of differences, so small that few kinks lie between, how well two of them must
# agree to be believed, and how far off them a product is wrong.
_STEPS, _AGREEMENT, _OFF = (1e-6, 1e-5, 1e-4), 0.01, 0.1
_PIECES = 2  # what is wrong with a model is wrong with few samples
_TOGETHER = 32  # samples whose rows are pulled back at once: more save little

# Pieces of the batch, each with Sᵀ by its outputs, shape (rank, *outputs).
Roots = Sequence[tuple[Batch, torch.Tensor]]
Factors = tuple[torch.Tensor, torch.Tensor]
Rule = tuple[list[float], list[float]]  # nodes and weights
OnRows = Callable[[int, int], None]
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
    free = hessian.memory_budget - hessian.product_bytes - 8 * _CHUNK
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
        (_of_layers, _bytes_of_layers(hessian, roots, fitting)),
        (_of_parameters, {i: _bytes_of_rows(n, num_rows, hessian.dtype) for i, n in sizes.items()}),
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


def _bytes_of_rows(num_params: int, num_rows: int, dtype: torch.dtype) -> int:
    """Return the memory of a block's matrix, its eigenvalues' workspace and, if it is kept, A."""
    kept = num_rows * num_params * dtype.itemsize if num_params > num_rows else 0
    return kept + 3 * 8 * min(num_params, num_rows) ** 2


def _first_outputs(hessian: BlockHessian) -> tuple[int, int]:
    """Return how many outputs the first piece of the batch has, and how many samples."""
    piece, _ = next(iter(hessian.pieces()))
    return hessian.outputs(piece).numel(), leading_size(piece)


def _knows_more(hessian: BlockHessian, split: SplitLoss) -> bool:
    """Tell, and warn, whether the criterion depends on the model beside by the outputs.

    As one does that adds a penalty which `outputs` left somewhere: H_l holds it, J_l does not.
    """
    piece, _ = next(iter(hessian.pieces()))
    place = hessian.outputs(piece).detach().requires_grad_()
    value = split.criterion(place, piece).reshape(())
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


def _of_parameters(
    hessian: BlockHessian, roots: Roots, group: Sequence[int], on_rows: OnRows
) -> dict[int, torch.Tensor]:
    """Return A Aᵀ, or Aᵀ A if that is smaller, of each block, from one backward pass per row."""
    num_rows = sum(len(root) for _, root in roots)
    blocks = {i: hessian.blocks[i] for i in group}
    like: dict[str, Any] = {"dtype": hessian.dtype, "device": hessian.device}
    sizes = {i: min(block.num_params, num_rows) for i, block in blocks.items()}
    kept = {  # A
        i: torch.zeros(num_rows, block.num_params, **like)
        for i, block in blocks.items()
        if block.num_params > num_rows
    }
    found = {i: torch.zeros(n, n, **like | {"dtype": torch.float64}) for i, n in sizes.items()}
    start = 0
    for piece, root in roots:
        on_rows(start, num_rows)
        stop = start + len(root)
        rows = {
            i: kept[i][start:stop] if i in kept else torch.empty(len(root), n, **like)
            for i, n in sizes.items()
        }
        hessian.pull_back(piece, root, list(blocks.values()), list(rows.values()))
        for i in blocks.keys() - kept.keys():
            found[i].addmm_(rows[i].T.double(), rows[i].double())
        start = stop
    for i, A in kept.items():
        for columns in A.split(max(1, _CHUNK // max(1, num_rows)), dim=1):
            _add_gram(found[i], columns)
    return found


def _bytes_of_layers(hessian: BlockHessian, roots: Roots, indices: Sequence[int]) -> dict[int, int]:
    """Return the memory that `_of_layers` takes, of the blocks that are a layer's weight.

    That of what it keeps of each, twice over in float64, and of its matrix and eigenvalues.
    """
    layers = layers_of(hessian, indices)
    if not (layers and roots):
        return {}
    piece, _ = roots[0]
    _, traces = traced(hessian, piece, layers)
    num_rows = sum(len(root) for _, root in roots)
    found = {}
    for i, (x, y) in traces.items():
        if (inputs := places(layers[i], x, y)) is not None:
            of_inputs = inputs[0].numel() * hessian.batch_size // leading_size(piece)
            kept = (num_rows * y.numel() + of_inputs) * (hessian.dtype.itemsize + 16)
            found[i] = kept + 3 * 8 * min(hessian.blocks[i].num_params, num_rows) ** 2
    return found


def _of_layers(
    hessian: BlockHessian, roots: Roots, group: Sequence[int], on_rows: OnRows
) -> dict[int, torch.Tensor]:
    """Return A Aᵀ, or Aᵀ A if that is smaller, of layers' weights, without their rows.

    A row is Uᵀ X: U what is pulled back to the layer's outputs, shape (places, outputs), X what the
    weight multiplies there, shape (places, inputs). Samples do not depend on each other, so one
    backward pass pulls back a row of each of several pieces.
    """
    layers = layers_of(hessian, group)
    factors: dict[int, list[Factors]] = {i: [] for i in layers}
    num_rows, done = sum(len(root) for _, root in roots), 0
    for some in _together(hessian, roots):
        on_rows(done, num_rows)
        done += sum(len(root) for _, root in some)
        found = _factors(hessian, {i: layers[i] for i in factors}, some)
        factors = {i: [*factors[i], *more] for i, more in found.items()}
        if not factors:
            break
    return {i: _matrix_of(some, hessian.blocks[i].num_params) for i, some in factors.items()}


def _together(hessian: BlockHessian, roots: Roots) -> Iterator[Roots]:
    """Yield pieces that follow each other and have the same shapes, of few samples in all."""

    def shapes(of: tuple[Batch, torch.Tensor]) -> list[torch.Size]:
        piece, root = of
        return [t.shape for t in (*tensors_of(piece), root[0])]

    most = min(_TOGETHER, hessian.microbatch_size) if hessian.can_cut else 1
    for _, alike in groupby(roots, shapes):
        some = list(alike)
        step = max(1, most // leading_size(some[0][0]))
        yield from (some[start : start + step] for start in range(0, len(some), step))


def _factors(
    hessian: BlockHessian, layers: Mapping[int, Layer], some: Roots
) -> dict[int, list[Factors]]:
    """Return U and X of pieces that are alike, of each layer.

    One mixture of all their rows must be what autograd says it is, to rounding; layers of which it
    isn't are left out, such as those whose weights are used elsewhere too. So are all where the
    outputs of several pieces are not theirs one after the other.
    """
    batch, first = some[0]
    for piece, _ in some[1:]:
        whole = join(batch, piece)
        if whole is None:
            return {}
        batch = whole
    z, traces = traced(hessian, batch, layers)
    in_order = z.shape == (len(some) * first[0].shape[:1].numel(), *first.shape[2:])
    if not traces or not (in_order or len(some) == 1):
        return {}
    rows = z.new_zeros(max(len(root) for _, root in some), len(some), *first.shape[1:])
    for k, (_, root) in enumerate(some):
        rows[: len(root), k] = root
    mixture = draw_probe(rows.shape[0] * len(some), 0, "gaussian").to(rows).view(-1, len(some))
    mixed = torch.einsum("rk,rk...->k...", mixture, rows)
    blocks = [hessian.blocks[i] for i in layers]
    like: dict[str, Any] = {"dtype": hessian.dtype, "device": hessian.device}
    expected = [torch.empty(1, b.num_params, **like) for b in blocks]
    hessian.pull_back(batch, mixed.reshape(1, *z.shape), blocks, expected)
    kept: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
    outputs = [y for _, y in traces.values()]
    back = [torch.autograd.grad(z, outputs, row.view(z.shape), **kept) for row in rows]
    pulled = dict(zip(traces, zip(*back, strict=True), strict=True))
    found = {}
    for i, [row] in zip(layers, expected, strict=True):
        inputs = places(layers[i], *traces[i]) if i in traces else None
        if inputs is None:
            continue
        X, channels = inputs
        U = torch.stack(pulled[i]).movedim(channels + 1, -1).flatten(1, -2)
        U, X = U.unflatten(1, (len(some), -1)), X.unflatten(0, (len(some), -1))
        own = torch.einsum("rk,rkpo->kpo", mixture.to(U), U)
        if agrees(torch.einsum("kpo,kpi->oi", own, X).flatten(), row):
            found[i] = [(U[: len(root), k], X[k]) for k, (_, root) in enumerate(some)]
    return found


def _matrix_of(factors: Sequence[Factors], num_params: int) -> torch.Tensor:
    """Return A Aᵀ, or Aᵀ A if that is smaller, of a layer's weight, the cheapest way."""
    U, X = factors[0]
    num_rows = sum(len(U) for U, _ in factors)
    size = min(num_params, num_rows)
    total = torch.zeros(size, size, dtype=torch.float64, device=U.device)
    if num_params <= num_rows:
        for rows in (_rows(U, X) for U, X in factors):
            total.addmm_(rows.T.double(), rows.double())
    elif _pays_by_places(factors):
        _add_by_places(total, factors)
    else:
        width = max(1, _CHUNK // (num_rows * X.shape[1]))
        for start in range(0, U.shape[2], width):
            columns = [_rows(U[:, :, start : start + width], X) for U, X in factors]
            _add_gram(total, torch.cat(columns))
    return total


def _rows(U: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """Return the rows Uᵀ X, shape (rows, outputs · inputs)."""
    return (U.transpose(1, 2).flatten(0, 1) @ X).view(len(U), -1)


def _pays_by_places(factors: Sequence[Factors]) -> bool:
    """Compare the operations of `_add_by_places` with those of rows that are written out."""
    num_rows, num_outputs = sum(len(U) for U, _ in factors), factors[0][0].shape[2]
    pulled, kept = sum(len(U) * len(X) for U, X in factors), sum(len(X) for _, X in factors)
    num_inputs = factors[0][1].shape[1]
    by_places = pulled**2 * (num_outputs + 1) + kept**2 * num_inputs
    return by_places < num_rows**2 * num_outputs * num_inputs


def _add_by_places(total: torch.Tensor, factors: Sequence[Factors]) -> None:
    """Add A Aᵀ below its diagonal: ⟨Uᵀ X, U′ᵀ X′⟩ = Σ_pq (U U′ᵀ)_pq (X X′ᵀ)_pq.

    The rows U of a piece at a time, with as many U′ as `_CHUNK` allows.
    """
    groups = []  # of pieces with as many places
    for _, pieces in groupby(factors, lambda factor: len(factor[1])):
        us, xs = zip(*pieces, strict=True)
        sizes = torch.tensor([len(U) for U in us])
        owner = torch.arange(len(us)).repeat_interleave(sizes)  # the piece of each row
        groups.append((torch.cat(us).double(), torch.stack(xs).double(), owner.to(total.device)))
    stop = 0
    for U, X in factors:
        start, stop, first = stop, stop + len(U), 0
        left, inputs = U.double().flatten(0, 1), X.double()
        for V, Y, owner in groups:
            num_rows = min(len(V), stop - first)
            if num_rows <= 0:
                break
            of_inputs = torch.einsum("pi,nqi->pnq", inputs, Y[: owner[num_rows - 1] + 1])
            for rows in torch.arange(num_rows).split(max(1, _CHUNK // (len(left) * V.shape[1]))):
                some = slice(int(rows[0]), int(rows[-1]) + 1)
                both = (left @ V[some].flatten(0, 1).T).view(len(U), len(X), len(rows), -1)
                both *= of_inputs[:, owner[some]]
                columns = slice(first + some.start, first + some.stop)
                total[start:stop, columns] = both.sum((1, 3))
            first += len(V)


def _add_gram(total: torch.Tensor, columns: torch.Tensor) -> None:
    """Add A Aᵀ of some columns of A, in float64; of what is above the diagonal a quarter."""
    wide, half = columns.double(), -(-len(columns) // 2)
    total[:, :half].addmm_(wide, wide[:half].T)
    total[half:, half:].addmm_(wide[half:], wide[half:].T)


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
