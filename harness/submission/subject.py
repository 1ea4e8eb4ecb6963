"""What the checks of an entry hand on to each other, and how they object."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from harness.errors import UserError
from harness.estimator import Block, find_blocks
from harness.estimator.checks import Batch
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
        deadline: When the checks are to end, in the time of `time.monotonic`.
        task, data, model: Of the entry.
        batch: Few samples, for products.
        mates: More, for the comparison of halves.
        dtype: Of the products that are compared with others.
        precision: Of the coarsest operation among them.
        product_seconds: What a product with a block took, on average.
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
        return max(0.0, self.deadline - time.monotonic())

    def time_for(self, share: float) -> float:
        """Return until when a check may take that share of the time that is left."""
        return time.monotonic() + share * self.seconds_left

    def blocks(self, partition: str) -> list[Block]:
        """Return the blocks of the model, of the kinds that the entry gives."""
        return find_blocks(
            self.model, partition, paper_blocks=self.entry.paper_blocks, kinds=self.entry.blocks
        )

    def hessian(self, dtype: torch.dtype, batch: Batch | None = None) -> BlockHessian:
        """Return the block Hessian on few samples."""
        batches = [self.batch if batch is None else batch]
        objective = Objective(self.model, self.task.loss, batches, self.task.num_terms)
        blocks = self.blocks(self.entry.partition)
        return BlockHessian(objective, blocks, Settings(dtype=str(dtype), device="cpu"))
