"""What a block Hessian begins with: a copy of the model, its blocks, microbatches that fit."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from harness.errors import UserError
from harness.estimator.batches import Batch, NumTerms, halves, leading_size, take_most
from harness.estimator.blocks import Block, Part
from harness.estimator.memory import is_out_of_memory

T = TypeVar("T")


def is_sharded(model: nn.Module) -> bool:
    """Tell whether several processes hold a model together, as FSDP2 and tensor parallelism do."""
    # Slow to import, and no model is of theirs without it.
    known = (("fsdp", "FSDPModule"), ("tensor", "DTensor"))
    found = [getattr(sys.modules.get(f"torch.distributed.{m}"), kind, ()) for m, kind in known]
    return any(isinstance(x, tuple(found)) for x in (*model.modules(), *model.parameters()))


def check_parameters(model: nn.Module) -> None:
    """Raise unless the parameters are real numbers that are there."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(
                f"the parameter {name} is on the meta device, where tensors have no values; build "
                "the model on cpu or cuda, or fill it with model.to_empty(...) and initial values"
            )
        if parameter.is_complex():
            raise UserError(
                f"the parameter {name} is {parameter.dtype}; keep its real and imaginary parts as "
                "one real parameter and use torch.view_as_complex on it in forward"
            )


def working_copy(model: nn.Module, norm_mode: str) -> nn.Module:
    """Copy the model into evaluation mode; batch norms keep batch statistics if asked."""
    check_parameters(model)
    try:
        clone = copy.deepcopy(model)
    except Exception as error:
        raise UserError(
            f"the model {type(model).__name__} cannot be copied ({error}); make it deep-copyable: "
            "keep no generators, files or non-leaf tensors in it"
        ) from error
    set_modes(clone, norm_mode)
    return clone


def set_modes(model: nn.Module, norm_mode: str) -> None:
    """Put a model into evaluation mode; batch norms keep batch statistics if asked."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # sparse gradients are the same, and have no second derivative
    if norm_mode == "train":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.train()


def check_blocks(blocks: Sequence[Block], model: nn.Module) -> None:
    """Raise unless the blocks name existing parameters and do not overlap."""
    parameters = dict(model.named_parameters())
    if not blocks:
        raise UserError("blocks is empty; pass a partition or a list of Block")
    taken: dict[str, list[Part]] = {}
    for block in blocks:
        for part in block.parts:
            if part.parameter not in parameters:
                raise UserError(
                    f"block {block.name!r} names the parameter {part.parameter!r}, which "
                    f"{type(model).__name__} does not have"
                )
            if not parameters[part.parameter].requires_grad:
                raise UserError(
                    f"block {block.name!r} names the parameter {part.parameter!r}, which is "
                    "frozen; leave it out, or set its requires_grad"
                )
            shape = parameters[part.parameter].shape
            part.of(torch.empty(shape, device="meta"))  # raises beyond its end
            others = taken.setdefault(part.parameter, [])
            if any(_overlap(part, other, len(shape)) for other in others):
                raise UserError(f"block {block.name!r} overlaps another in {part.parameter!r}")
            others.append(part)
    repeated = [name for name, n in Counter(b.name for b in blocks).items() if n > 1]
    if repeated:
        raise UserError(f"two blocks have the name {repeated[0]!r}; each needs its own")


def _overlap(a: Part, b: Part, num_dims: int) -> bool:
    """Tell whether two parts of a parameter have entries in common."""
    if a.dim is None or b.dim is None or (a.dim - b.dim) % num_dims:
        return True
    return max(a.start, b.start) < min(a.stop, b.stop)


def fit(
    batches: list[Batch],
    count: NumTerms | None,
    memory_budget: int,
    kept: Callable[[Batch], int],
    peak: Callable[[Batch], int],
) -> tuple[list[Batch], int, int, int]:
    """Halve microbatches until a product fits.

    Args:
        batches: The microbatches.
        count: Counts the terms of a piece of a batch; None: batches can't be cut, and the largest
            is measured as a whole.
        memory_budget: Bytes.
        kept: Measures what the graph of a batch keeps, in bytes.
        peak: Measures the most that a graph and a product with it take.

    Returns:
        The microbatches, halved if need be; samples that the model takes at least, 1 or 2; and
        estimates, in bytes, of what the largest microbatch's graph keeps, and of the most that a
        product takes.

    Raises:
        UserError: A product takes more than the budget even with the fewest samples.
    """
    sample = max(batches, key=leading_size)
    few, size = 1, leading_size(sample)
    if count is None:
        graph_bytes, product_bytes = kept(sample), peak(sample)
    else:
        few, graph_of_few = on_few(sample, lambda few: kept(take_most(sample, few, count)))
        least = peak(take_most(sample, few, count))
        per_sample = least / few
        if size >= 2 * few:
            # What doesn't grow with the samples, such as gradients, counts once.
            per_sample = max(peak(take_most(sample, 2 * few, count)) - least, 0) / few
    while True:
        if count is not None:
            size = max(leading_size(b) for b in batches)
            graph_bytes = graph_of_few * size // few
            product_bytes = least + int((size - few) * per_sample)
        product_bytes = max(graph_bytes, product_bytes)
        if product_bytes <= memory_budget:
            return batches, few, graph_bytes, product_bytes
        if count is None or size < 2 * few:
            raise UserError(
                f"a product with one microbatch of {size} samples takes about "
                f"{product_bytes / 2**30:.2g} GiB, more than the memory budget of "
                f"{memory_budget / 2**30:.2g} GiB; raise the budget or pass smaller batches"
            )
        batches = [piece for b in batches for piece in halves(b, size, count)]


def on_few(batch: Batch, compute: Callable[[int], T]) -> tuple[int, T]:
    """Return how few samples of a batch the model takes, 1 or 2, and what is computed on so many.

    Some models fail on one: `squeeze` takes the dimension of its batch away.
    """
    try:
        return 1, compute(1)
    except UserError:
        raise
    except Exception as error:
        if leading_size(batch) < 2 or is_out_of_memory(error):
            raise
    return 2, compute(2)
