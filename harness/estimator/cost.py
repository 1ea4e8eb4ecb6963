"""What a spectrum costs, before it is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.estimator import gram
from harness.estimator.batches import leading_size, take_most
from harness.estimator.blocks import Block
from harness.estimator.checks import fixed_arithmetic
from harness.estimator.device import choose_device, device_memory
from harness.estimator.objective import Objective
from harness.estimator.operators import block_hessian
from harness.estimator.prepare import on_few
from harness.estimator.settings import Settings

# The eigenvalues of a matrix of r rows in float64 take as long as 4 r³ operations of products of
# small models in float32 (one core, 2,000 and 3,000 rows).
_EIGENVALUES = 4


@dataclass(frozen=True)
class Forecast:
    """What a spectrum costs.

    Attributes:
        num_products: Hessian-vector products over all blocks and probes.
        flops: Floating-point operations of all of them, the shared passes included.
        pass_flops: Operations of one forward and backward pass over the batch.
        graph_bytes: Memory of the kept graph of the batch, in bytes.
        product_bytes: The most memory that a product takes, that graph included.
        block_flops: Operations of one product with each block, in the order of the blocks.
        block_names: Their names.
        block_products: Products with each block.
        num_steps: Lanczos steps of a probe.
        num_exact: Blocks that are diagonalised.
        vector_bytes: Memory of the Lanczos vectors of all probes at once.
        stored_numbers: Numbers in the lists of the rows.
        num_gram: Blocks that are taken by Gram matrices, with no products.
        gram_passes: Backward passes over the batch that these take, all together.
    """

    num_products: int
    flops: int
    pass_flops: int
    graph_bytes: int
    block_flops: tuple[int, ...]
    block_names: tuple[str, ...] = ()
    block_products: tuple[int, ...] = ()
    num_steps: int = 1
    num_exact: int = 0
    vector_bytes: int = 0
    stored_numbers: int = 0
    product_bytes: int = 0
    num_gram: int = 0
    gram_passes: int = 0

    @property
    def spectrum_flops(self) -> list[int]:
        """Operations of the spectrum of each block, without the shared passes."""
        return [n * f for n, f in zip(self.block_products, self.block_flops, strict=True)]

    def flops_within(self, memory_budget: int) -> float:
        """Return the operations where graphs and vectors have so many bytes.

        A batch of which a product takes more goes forward and backward again at each step, for as
        many vectors at a time as fit beside the graph of a microbatch.
        """
        if self.product_bytes <= memory_budget:
            return float(self.flops)
        # Microbatches are halved until one fits, which leaves a quarter or more of the memory.
        groups = -(-4 * self.vector_bytes // memory_budget)
        passes = self.num_exact + self.num_steps * groups
        return float(self.flops + self.pass_flops * (passes - 1))


def forecast(
    objective: Objective,
    blocks: Sequence[Block],
    settings: Settings,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Forecast:
    """Count the cost of a spectrum on one sample and scale it to the batch.

    Takes one product with each block on the first batch's sample of most terms, or on two where
    the model fails on one, on the model's device.

    Args:
        objective: The loss.
        blocks: The blocks.
        settings: Probes, steps and what else tells the products apart.
        on_progress: Called with (blocks done, blocks in all).
    """
    size, first = objective.batch_size, objective.batches[0]
    count = objective.count if callable(objective.count) else leading_size

    def of(num_samples: int) -> Objective:
        some = take_most(first, num_samples, count)
        return Objective(objective.model, objective.loss_fn, [some], [1.0])

    device = choose_device(objective.model, None)
    here = replace(settings, device=str(device), memory_budget=device_memory(device))
    with fixed_arithmetic(objective.model):
        few, hessian = on_few(first, lambda few: block_hessian(of(few), blocks, here))
        with _counter() as shared:
            hessian.products([])
        block_flops = []
        for index, block in enumerate(blocks):
            vector = torch.ones(block.num_params, dtype=hessian.dtype, device=device)
            if not hessian.is_autograd:  # the first product with a block looks for its step
                hessian.products([(index, vector)])
            with _counter() as counter:
                hessian.products([(index, vector)])
            block_flops.append(counter.get_total_flops() * size // few)
            on_progress(index + 1, len(blocks))
        by_gram, passes = gram.foreseen(hessian, settings, size)
        more = take_most(first, 2 * few, count)
        added = leading_size(more) - few
        grows = (hessian.measure_peak(more) - hessian.product_bytes) // added if added else 0
    pass_flops = shared.get_total_flops() * size // few
    others = [b for i, b in enumerate(blocks) if i not in by_gram]
    counts = [
        0 if i in by_gram else settings.num_products(b.num_params) for i, b in enumerate(blocks)
    ]
    sizes = [b.num_params for b in others if not settings.is_exact(b.num_params)]
    ranks = [min(blocks[i].num_params, passes * size) for i in by_gram]
    flops = sum(n * f for n, f in zip(counts, block_flops, strict=True))
    flops += passes * pass_flops + sum(_EIGENVALUES * rank**3 for rank in ranks)
    return Forecast(
        num_products=sum(counts),
        flops=flops + pass_flops,
        pass_flops=pass_flops,
        graph_bytes=hessian.graph_bytes * size // few,
        product_bytes=hessian.product_bytes + max(grows, hessian.graph_bytes // few) * (size - few),
        block_flops=tuple(block_flops),
        block_names=tuple(b.name for b in blocks),
        block_products=tuple(counts),
        num_steps=settings.num_steps,
        num_exact=len(others) - len(sizes),
        # Three vectors of 4 bytes a probe; alphas, betas, nodes and weights, or eigenvalues alone.
        vector_bytes=12 * settings.num_probes * sum(sizes),
        stored_numbers=sum(
            n if settings.is_exact(b.num_params) else 4 * n
            for n, b in zip(counts, blocks, strict=True)
        )
        + 2 * sum(rank + 1 for rank in ranks),
        num_gram=len(by_gram),
        gram_passes=passes,
    )


def _counter() -> FlopCounterMode:
    """Return a counter that does not follow modules.

    To follow them it hooks into their inputs, which are leaves where they are parametrizations,
    and `torch.autograd.grad` refuses such hooks on the leaves that it differentiates by.
    """
    counter = FlopCounterMode(display=False)
    nothing: dict[str, Any] = {"__enter__": lambda: None, "__exit__": lambda *_: None}
    counter.mod_tracker = SimpleNamespace(parents={"Global"}, **nothing)  # type: ignore[assignment]
    return counter


def cut(costs: Sequence[float], num_parts: int) -> list[int]:
    """Return the part of each piece of work, laid out in a row and cut into equal costs.

    >>> cut([3, 1, 1, 1, 2], 2)
    [0, 0, 1, 1, 1]
    """
    total, before, places = sum(costs), 0.0, []
    for cost in costs:
        middle = (before + cost / 2) / total if total else 0.0
        places.append(min(num_parts - 1, int(num_parts * middle)))
        before += cost
    return places
