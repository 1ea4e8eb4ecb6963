"""Products that cost a layer, not a network: of its weight, where the outputs are linear in it.

With z the outputs and y = f(x, w) a layer that is linear in its weight w, the derivative of z by w
is that of z by y, a matrix for each sample, after f(x, ·). Where z is linear in w, as in each
weight by itself of a network of ReLU, max-pooling and norms in eval mode, the Hessian is that of
the criterion between the two (Botev, Ritter & Barber 2017, arXiv 1706.03662); the Gauss-Newton
matrix is it anywhere. Once the matrices are there, at a backward pass for each output of a sample,
a product is the layer forth and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn

from harness.estimator.batches import Batch, leading_size
from harness.estimator.graphs import slope_of
from harness.estimator.hessian import BlockHessian
from harness.estimator.layers import Layer, Traces, agrees, layers_of, traced, without_bias
from harness.estimator.memory import is_out_of_memory, release_cache
from harness.estimator.objective import SplitLoss
from harness.estimator.probes import draw_probe


def prepare(hessian: BlockHessian, indices: Sequence[int], num_products: int) -> None:
    """Give the Hessian shortcuts for those of some blocks that have any, if that pays.

    A block has one if it is the whole weight of a linear layer or a convolution, the outputs are
    linear in it or the Gauss-Newton matrix is asked for, what it keeps fits the memory budget,
    and its product with a random vector is the ordinary one to rounding. So nothing need be known
    of what the network does with the layer: the product is another if it is used twice, or if
    samples depend on each other. A Hessian that has shortcuts keeps them as they are.

    Args:
        hessian: The products.
        indices: The blocks to look at.
        num_products: How many each of them will take.
    """
    split = hessian.loss_fn
    can = hessian.is_autograd and not (hessian.is_shared or hessian.shortcuts)
    if not (can and isinstance(split, SplitLoss)):
        return
    layers = layers_of(hessian, indices)
    piece, _ = next(hessian.pieces())
    z, traces = _traced_by_sample(hessian, piece, layers)
    if not traces or 2 * z[0].numel() > num_products:
        return
    found = list(traces)
    if hessian.operator == "hessian":
        # Of few samples first: mostly, outputs that bend anywhere bend there.
        for batches in ([piece], hessian.batches):
            found = linear_blocks(hessian, split, found, batches)
    if not found:
        return
    vectors = {i: _random(hessian, i) for i in found}
    expected = dict(zip(found, hessian.products(list(vectors.items())), strict=True))
    hessian.release()
    sizes = _bytes(hessian, {i: layers[i] for i in found})
    free = hessian.memory_budget - hessian.product_bytes
    fitting = {}
    for i, nbytes in sizes.items():
        if nbytes <= free:
            fitting[i] = layers[i]
            free -= nbytes
    if not fitting:
        return
    try:
        parts = [
            _Part(hessian, split, batch, weight, fitting)
            for batch, weight in zip(hessian.batches, hessian.weights, strict=True)
        ]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        release_cache(hessian.device)
        return
    right = {
        i for i in fitting if expected[i].any() and agrees(_sum(parts, i, vectors[i]), expected[i])
    }
    for part in parts:
        part.keep(right)
    if right:
        shortcuts = {i: partial(_sum, parts, i) for i in right}
        hessian.take_shortcuts(shortcuts, sum(sizes[i] for i in right))


def linear_blocks(
    hessian: BlockHessian,
    split: SplitLoss,
    indices: Sequence[int],
    batches: Sequence[Batch] | None = None,
) -> list[int]:
    """Return the blocks in which the outputs are locally linear.

    The Hessian of ⟨z, u⟩, u drawn at random, is then zero, and so is each entry of its product with
    a random vector: at kinks torch's derivatives are of one side. Of others none is, to rounding,
    but with probability zero.
    """
    if not indices:
        return []
    seeds = count()  # another u for each microbatch: bends of opposite ones would cancel

    def functional(model: nn.Module, batch: Batch) -> torch.Tensor:
        z = split.outputs(model, batch)
        u = draw_probe(z.numel(), next(seeds), "gaussian").to(z)
        return (z * u.view_as(z)).sum()

    requests = [(i, _random(hessian, i)) for i in indices]
    products = hessian.of(functional, batches).products(requests)
    return [i for i, product in zip(indices, products, strict=True) if not product.any()]


def _traced_by_sample(
    hessian: BlockHessian, batch: Batch, layers: Mapping[int, Layer]
) -> tuple[torch.Tensor, Traces]:
    """Return what `traced` does; of no layer where the outputs aren't rows of samples."""
    z, traces = traced(hessian, batch, layers)
    return z, traces if z.dim() > 1 and len(z) == leading_size(batch) else {}


def _bytes(hessian: BlockHessian, layers: Mapping[int, Layer]) -> dict[int, int]:
    """Return what is kept of each layer that all microbatches go through."""
    sizes = dict.fromkeys(layers, 0)
    for batch in hessian.batches:
        z, traces = _traced_by_sample(hessian, batch, layers)
        sizes = {
            i: sizes[i] + x.nbytes + z[0].numel() * y.nbytes
            for i, (x, y) in traces.items()
            if i in sizes
        }
    return sizes


class _Part:
    """One microbatch's part of the products with some blocks.

    For each: the layer, its inputs x, and the derivative of the outputs by what it returns, shape
    (samples, outputs, entries of y).
    """

    def __init__(
        self,
        hessian: BlockHessian,
        split: SplitLoss,
        batch: Batch,
        weight: float,
        layers: Mapping[int, Layer],
    ) -> None:
        self._weight, self._layers = weight, dict(layers)
        z, traces = traced(hessian, batch, layers)
        places = [y for _, y in traces.values()]
        sums = z.flatten(1).sum(0)
        tails = [y.new_empty(len(y), len(sums), y[0].numel()) for y in places]
        for k, one in enumerate(sums):
            found = torch.autograd.grad(one, places, retain_graph=True, materialize_grads=True)
            for tail, slope in zip(tails, found, strict=True):
                tail[:, k] = slope.flatten(1)
        pairs = zip(traces.items(), tails, strict=True)
        self._kept = {i: (x, tail) for (i, (x, _)), tail in pairs}
        self._place, self._slope = slope_of(split, z, batch)

    def keep(self, indices: set[int]) -> None:
        """Forget the other blocks."""
        self._kept = {i: kept for i, kept in self._kept.items() if i in indices}

    def product(self, index: int, vector: torch.Tensor) -> torch.Tensor:
        """Return weight · H_l v of these samples, shape (n_l,)."""
        if not self._slope.requires_grad:  # the criterion is linear
            return torch.zeros_like(vector)
        layer, (x, tail) = self._layers[index], self._kept[index]
        v = vector.detach().view_as(layer.weight).requires_grad_()
        y = without_bias(layer, x, v)
        change = (tail @ y.detach().flatten(1).unsqueeze(2)).to(self._place)  # maybe another dtype
        kept: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
        (back,) = torch.autograd.grad(self._slope, self._place, change.view_as(self._place), **kept)
        cotangent = (back.flatten(1).unsqueeze(1).to(tail) @ tail).view_as(y)
        (product,) = torch.autograd.grad(y, v, cotangent)
        return self._weight * product.flatten()


def _sum(parts: Sequence[_Part], index: int, vector: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(vector)
    for part in parts:
        total += part.product(index, vector)
    return total


def _random(hessian: BlockHessian, index: int) -> torch.Tensor:
    vector = draw_probe(hessian.blocks[index].num_params, 0, "gaussian")
    return vector.to(hessian.device, hessian.dtype)
