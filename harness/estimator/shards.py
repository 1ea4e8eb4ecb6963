"""Where the vectors of a sharded model's blocks lie, and their inner product.

`torch.distributed.fsdp.fully_shard` leaves each process a part of the rows of every parameter,
those that `torch.chunk` would give it, and the last ones none where there are too few.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from harness.estimator.blocks import Block, Part
from harness.estimator.lanczos import Inner


class ShardedInner(Inner):
    """The inner product of vectors of which each process has its shard.

    What all processes have is summed up by each in the order of their ranks, so that all go on
    with the same numbers to the last bit.
    """

    def __init__(self, copies: int) -> None:
        """Say in how many processes each entry lies."""
        self.copies = copies

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ⟨a, b⟩."""
        return self.total(super().dot(a, b))

    def norm(self, a: torch.Tensor) -> torch.Tensor:
        """Return ‖a‖."""
        return self.total(super().norm(a).square()).sqrt()

    def size(self, a: torch.Tensor) -> int:
        """Return the number of entries of the whole vector."""
        return int(self.total(torch.tensor(a.numel(), device=a.device)))

    def total(self, mine: torch.Tensor) -> torch.Tensor:
        """Return the sum over the shards of a number, as a tensor."""
        numbers = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(numbers, mine)
        return torch.stack(numbers).sum() / self.copies


@dataclass(frozen=True)
class LocalPart:
    """What of a part of a block lies in one process: rows `first:last` of its parameter.

    Attributes:
        part: The part.
        shape: Of the part.
        dim: Dimension along which the parameter is sharded.
        first: Of the rows along it.
        last: The row after the last one.
    """

    part: Part
    shape: tuple[int, ...]
    dim: int
    first: int
    last: int

    def of(self, shard: torch.Tensor) -> torch.Tensor:
        """Return the part's view of the parameter's shard."""
        if self.part.dim is None:
            return shard
        if self.part.dim % shard.dim() != self.dim:
            return self.part.of(shard)
        return _rows(shard, self.dim, self.part.start - self.first, self.part.stop - self.first)

    def of_whole(self, values: torch.Tensor) -> torch.Tensor:
        """Return the process's view of a tensor of the part's shape."""
        is_along = self.part.dim is not None and self.part.dim % len(self.shape) == self.dim
        start = self.part.start if is_along else 0
        return _rows(values, self.dim, self.first - start, self.last - start)


class Layout:
    """Where the vectors of blocks lie.

    Attributes:
        blocks: The parts of each block in this process.
        copies: In how many processes each entry lies.
    """

    def __init__(self, parameters: Mapping[str, Any], blocks: Sequence[Block]) -> None:
        self.blocks = [
            [_local_part(part, _sharded(parameters[part.parameter])) for part in block.parts]
            for block in blocks
        ]
        mesh = _sharded(parameters[blocks[0].parts[0].parameter]).device_mesh
        self.copies = mesh.size() // mesh.size(mesh.ndim - 1)

    def shard(self, index: int, vector: torch.Tensor) -> torch.Tensor:
        """Return what of a whole vector of a block lies in this process."""
        parts = self.blocks[index]
        pieces = vector.split([torch.Size(part.shape).numel() for part in parts])
        views = [
            part.of_whole(piece.view(part.shape)) for part, piece in zip(parts, pieces, strict=True)
        ]
        return torch.cat([view.flatten() for view in views])


def reshard(model: nn.Module) -> None:
    """Let go of gathered parameters, so that shards are the model's parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard, to be changed in place."""
    with torch.no_grad():
        return _sharded(tensor).to_local()


def _sharded(tensor: torch.Tensor) -> DTensor:
    assert isinstance(tensor, DTensor)
    return tensor


def _local_part(part: Part, parameter: DTensor) -> LocalPart:
    mesh = parameter.device_mesh
    dim: int = parameter.placements[-1].dim  # type: ignore[attr-defined]
    size = parameter.shape[dim]
    rows = -(-size // mesh.size(mesh.ndim - 1))  # as torch.chunk has it
    first = min(mesh.get_local_rank(mesh.ndim - 1) * rows, size)
    shape = part.of(torch.empty(parameter.shape, device="meta")).shape
    return LocalPart(part, tuple(shape), dim, first, min(first + rows, size))


def _rows(tensor: torch.Tensor, dim: int, start: int, stop: int) -> torch.Tensor:
    """Return those of the rows `start:stop` along a dimension that are there."""
    start, stop = (min(max(i, 0), tensor.shape[dim]) for i in (start, stop))
    return tensor.narrow(dim, start, stop - start)
