"""What the checks of an entry hand on to each other, and how they object."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from harness.errors import UserError
from harness.estimator import Block, find_blocks
from harness.estimator.batches import Batch
from harness.estimator.hessian import BlockHessian
from harness.estimator.objective import Objective
from harness.estimator.settings import Settings
from harness.registry.entry import ModelEntry
from harness.tasks.base import Data, Task

CPU = torch.device("cpu")


class Failed(UserError):  # noqa: N818
    """A check's refusal: cause; remedy."""


class Caution(UserError):  # noqa: N818
    """A check's objection that a review would accept."""


@dataclass
class Subject:
    """What the checks hand on to each other.

    Attributes:
        entry: The entry.
        data_root: Folder of data sets.
        deadline: When the checks are to end, in processor time (`time.process_time`), which a busy
            machine does not stretch.
        task, data, model: Of the entry.
        batch: Few samples, for products.
        mates: More, for the comparison of halves.
        dtype: Of the products that are compared with others.
        precision: Of the coarsest operation among them.
        product_seconds: What a product with a block took, on average, in processor time.
        precise: The Hessian whose products are compared with others.
    """

    entry: ModelEntry
    data_root: Path | None
    deadline: float
    task: Task = field(init=False)
    data: Data = field(init=False)
    model: nn.Module = field(init=False)
    batch: Batch = field(init=False)
    mates: Batch = field(init=False)
    dtype: torch.dtype = torch.float64
    precision: torch.dtype = torch.float64
    product_seconds: float = 0.0
    precise: BlockHessian | None = None

    @property
    def seconds_left(self) -> float:
        """Return what is left of the time, 0 if nothing is."""
        return max(0.0, self.deadline - time.process_time())

    def time_for(self, share: float) -> float:
        """Return until when a check may take that share of the time that is left."""
        return time.process_time() + share * self.seconds_left

    def in_time(
        self, indices: Sequence[int], until: Callable[[], float]
    ) -> Iterator[Sequence[int]]:
        """Yield indices of blocks, as many at once as there is time for by what those before took.

        Blocks at once share a graph. The first comes whatever the time.

        Args:
            indices: Of the blocks, in the order in which they are to come.
            until: Says when to end.
        """
        begin, done = time.process_time(), 0
        while done < len(indices) and (not done or time.process_time() < until()):
            took = (time.process_time() - begin) / max(done, 1)
            fit = int(min((until() - time.process_time()) / took if took else 1, len(indices)))
            some = indices[done : done + max(1, min(fit, 2 * done))]
            yield some
            done += len(some)

    def blocks(self, partition: str) -> list[Block]:
        """Return the blocks of the model, of the kinds that the entry gives."""
        return find_blocks(
            self.model, partition, paper_blocks=self.entry.paper_blocks, kinds=self.entry.blocks
        )

    def hessian(self, dtype: torch.dtype, batch: Batch | None = None) -> BlockHessian:
        """Return the block Hessian on few samples."""
        batches = [self.batch if batch is None else batch]
        objective = Objective(self.model, self.task.loss, batches, self.task.count_of(batches))
        blocks = self.blocks(self.entry.partition)
        return BlockHessian(objective, blocks, Settings(dtype=str(dtype), device="cpu"))
