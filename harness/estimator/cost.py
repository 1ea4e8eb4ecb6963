"""What a spectrum costs, before it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness.estimator.blocks import Block
from harness.estimator.checks import Batch, LossFn, fixed_arithmetic, leading_size, take
from harness.estimator.device import choose_device, device_memory
from harness.estimator.hessian import BlockHessian

# Blocks up to this size are diagonalised: n products cost no more than 10 probes x 100 steps.
EXACT_SIZE = 1000


@dataclass(frozen=True)
class Forecast:
    """What a spectrum costs.

    Attributes:
        num_products: Hessian-vector products over all blocks and probes.
        flops: Floating-point operations of all of them, the shared passes included.
        pass_flops: Operations of one forward and backward pass over the batch.
        graph_bytes: Memory of the kept graph of the batch, in bytes.
        block_flops: Operations of one product with each block, in the order of the blocks.
    """

    num_products: int
    flops: int
    pass_flops: int
    graph_bytes: int
    block_flops: tuple[int, ...]


def forecast(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Batch],
    blocks: Sequence[Block],
    *,
    num_probes: int,
    num_steps: int,
) -> Forecast:
    """Count the cost of a spectrum on one sample and scale it to the batch.

    Takes one product with each block on the first sample, in evaluation mode, on the model's
    device.
    """
    size = sum(leading_size(b) for b in batches)
    device = choose_device(model, None)
    with fixed_arithmetic(model):
        hessian = BlockHessian(
            model,
            loss_fn,
            [take(batches[0], 0, 1)],
            blocks,
            device=device,
            memory_budget=device_memory(device),
        )
        with FlopCounterMode(display=False) as shared:
            hessian.products([])
        block_flops = []
        for index, block in enumerate(blocks):
            vector = torch.ones(block.num_params, dtype=hessian.dtype, device=device)
            with FlopCounterMode(display=False) as counter:
                hessian.products([(index, vector)])
            block_flops.append(counter.get_total_flops() * size)
    sampled = num_probes * num_steps
    counts = [b.num_params if b.num_params <= EXACT_SIZE else sampled for b in blocks]
    flops = sum(n * f for n, f in zip(counts, block_flops, strict=True))
    return Forecast(
        num_products=sum(counts),
        flops=flops + shared.get_total_flops() * size,
        pass_flops=shared.get_total_flops() * size,
        graph_bytes=hessian.graph_bytes * size,
        block_flops=tuple(block_flops),
    )
