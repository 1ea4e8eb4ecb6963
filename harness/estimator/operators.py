"""The operator that settings ask for: which matrix, and how its products are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from harness.estimator.blocks import Block
from harness.estimator.checks import fixed_arithmetic
from harness.estimator.hessian import BlockHessian
from harness.estimator.objective import Objective
from harness.estimator.prepare import is_sharded
from harness.estimator.quotients import DifferenceHessian
from harness.estimator.settings import Settings
from harness.estimator.share import Share


def block_hessian(
    objective: Objective,
    blocks: Sequence[Block],
    settings: Settings,
    *,
    share: Share | None = None,
) -> BlockHessian:
    """Return the operator; to be used inside `checks.fixed_arithmetic`, as `opened` does.

    Raises:
        UserError: As `BlockHessian`.
    """
    kind = DifferenceHessian if settings.product == "differences" else BlockHessian
    return kind(objective, blocks, settings, share=share)


@contextmanager
def opened(
    objective: Objective,
    blocks: Sequence[Block],
    settings: Settings,
    *,
    share: Share | None = None,
) -> Iterator[BlockHessian]:
    """Yield the block Hessian in its fixed arithmetic.

    Args:
        objective: What is differentiated.
        blocks: By which parameters.
        settings: Device, dtype, norm mode, precision and memory of the products.
        share: This process's part of the samples, if several make each product together.

    Raises:
        UserError: As `BlockHessian`.
    """
    with fixed_arithmetic(objective.model, settings.matmul_precision):
        if is_sharded(objective.model):
            from harness.estimator import sharded  # slow to import

            with sharded.opened(objective, blocks, settings) as hessian:
                yield hessian
            return
        yield block_hessian(objective, blocks, settings, share=share)
