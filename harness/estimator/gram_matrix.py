"""A Aᵀ of rows that are pulled back, of a block's parameters or of a layer: for `gram`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from harness.estimator.batches import Batch, join, leading_size, tensors_of
from harness.estimator.hessian import BlockHessian
from harness.estimator.layers import Layer, agrees, layers_of, places, traced
from harness.estimator.probes import draw_probe

# Pieces of the batch, each with Sᵀ by its outputs, shape (rank, *outputs).
Roots = Sequence[tuple[Batch, torch.Tensor]]
Factors = tuple[torch.Tensor, torch.Tensor]
OnRows = Callable[[int, int], None]
# Entries of A that are taken to float64 at a time: 8 MiB, so that its memory is used again.
CHUNK = 1 << 20
_TOGETHER = 32  # samples whose rows are pulled back at once: more save little


def bytes_of_rows(num_params: int, num_rows: int, dtype: torch.dtype) -> int:
    """Return the memory of a block's matrix, its eigenvalues' workspace and, if it is kept, A."""
    kept = num_rows * num_params * dtype.itemsize if num_params > num_rows else 0
    return kept + 3 * 8 * min(num_params, num_rows) ** 2


def of_parameters(
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
        for columns in A.split(max(1, CHUNK // max(1, num_rows)), dim=1):
            _add_gram(found[i], columns)
    return found


def bytes_of_layers(hessian: BlockHessian, roots: Roots, indices: Sequence[int]) -> dict[int, int]:
    """Return the memory that `of_layers` takes, of the blocks that are a layer's weight.

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


def of_layers(
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
    isn't are left out, such as those whose weights are used elsewhere too. So must be the part of
    one piece, gone through by itself: outputs may depend on how many samples there are. All are
    left out where the outputs of several pieces are not theirs one after the other.
    """
    batch, first = some[0]
    whole = max(hessian.batches, key=leading_size)
    for piece, _ in some[1:]:
        joined = join(batch, piece, whole)
        if joined is None:
            return {}
        batch = joined
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
    by_piece: dict[int, dict[int, torch.Tensor]] = {}  # of the one that weighs most in each layer
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
            k = int((own.flatten(1).norm(dim=1) * X.flatten(1).norm(dim=1)).argmax())
            by_piece.setdefault(k, {})[i] = (own[k].T @ X[k]).flatten()
    if len(some) > 1:
        for k, parts in by_piece.items():
            for i in _unlike(hessian, some[k][0], mixed[k], parts):
                del found[i]
    return found


def _unlike(
    hessian: BlockHessian, piece: Batch, mixed: torch.Tensor, parts: Mapping[int, torch.Tensor]
) -> list[int]:
    """Return the blocks whose part of a mixture is not what the piece gives by itself."""
    blocks = [hessian.blocks[i] for i in parts]
    alone = [torch.empty_like(part).unsqueeze(0) for part in parts.values()]
    hessian.pull_back(piece, mixed.unsqueeze(0), blocks, alone)
    pairs = zip(parts.items(), alone, strict=True)
    return [i for (i, part), [expected] in pairs if not agrees(part, expected)]


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
        width = max(1, CHUNK // (num_rows * X.shape[1]))
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

    The rows U of a piece at a time, with as many U′ as `CHUNK` allows.
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
            for rows in torch.arange(num_rows).split(max(1, CHUNK // (len(left) * V.shape[1]))):
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
