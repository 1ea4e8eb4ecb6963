"""One spectrum over the processes that torchrun started, one per device.

Two ways to share the work. By probes: each process takes some (block, probe) pairs, on the whole
batch, and hands the finished rows to process 0; nothing is communicated in between, and the rows
are those of one process bit for bit. By samples: each process takes a part of every microbatch,
and each product is the sum of all parts; so is a single large block shared, and so fits a graph
that is too large for one device. The rows are those of one process to rounding.

Process 0 alone reads and writes the store.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from harness.errors import UserError, reason_of
from harness.estimator.blocks import Block
from harness.estimator.cost import Forecast, cut
from harness.estimator.device import choose_device, local_device, memory_share
from harness.estimator.objective import Objective
from harness.estimator.operators import opened
from harness.estimator.settings import Settings
from harness.estimator.share import Share
from harness.estimator.spectrum import OnProgress, Row, rules

# What a byte over the wire costs in operations: 10 TFLOP/s at 100 GB/s, 100 GFLOP/s at 1 GB/s.
FLOPS_PER_BYTE = 100
_BUCKET = 1 << 24  # elements summed at once
_POLL = 0.05  # seconds

OnBlock = Callable[[list[Row]], None]
Probes = dict[str, list[int]]  # of each block


@dataclass
class Team:
    """The processes of a job.

    Attributes:
        rank, size: Which process this is, of how many.
        device: Where it computes.
        way: probes or samples; auto takes what is forecast to be faster.
    """

    rank: int
    size: int
    device: str
    way: str
    _store: Any
    _sent: int = 0
    _taken: Counter[int] = field(default_factory=Counter)

    @property
    def leads(self) -> bool:
        """Whether this is process 0, which reads, writes and prints."""
        return self.rank == 0

    def agree(self, value: Any) -> Any:
        """Return process 0's value in all processes."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def add_up(self, tensors: list[torch.Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        start = 0
        while start < len(tensors):
            stop, size = start, 0
            while stop < len(tensors) and (
                stop == start or size + tensors[stop].numel() <= _BUCKET
            ):
                size += tensors[stop].numel()
                stop += 1
            some = tensors[start:stop]
            flat = torch.cat([t.flatten() for t in some])
            dist.all_reduce(flat)
            for t, total in zip(some, flat.split([t.numel() for t in some]), strict=True):
                t.copy_(total.view_as(t))
            start = stop

    def send(self, what: Any) -> None:
        """Leave something for process 0 to fetch."""
        self._store.set(f"{self.rank}/{self._sent}", json.dumps(what))
        self._sent += 1

    def fetch(self) -> Iterator[tuple[int, Any]]:
        """Yield what other processes have left so far, each with the process."""
        for rank in range(1, self.size):
            while self._store.check([key := f"{rank}/{self._taken[rank]}"]):
                self._taken[rank] += 1
                yield rank, json.loads(self._store.get(key))
                self._store.delete_key(key)


@contextmanager
def team(device: str, way: str = "auto") -> Iterator[Team | None]:
    """Join the processes that torchrun started; None if it did not start this one.

    On CUDA each process takes the device of its local rank, and sums go through NCCL; on CPU,
    through gloo.

    Raises:
        RuntimeError: Another process was lost, or NCCL or gloo fails; says the cause.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    own = local_device(device)
    cuda = own.type == "cuda"
    if cuda:
        torch.cuda.set_device(own)
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=size,
        )
        yield Team(rank, size, str(own), way, dist.PrefixStore("rows", store))
        dist.destroy_process_group()
    except (dist.DistError, RuntimeError) as error:
        kept = "what was finished is kept, the same command continues"
        if _is_loss(error):
            raise RuntimeError(
                "another process of the job was lost (killed, out of memory, or its machine); "
                f"{kept} ({reason_of(error)})"
            ) from error
        if isinstance(error, dist.DistError):
            raise RuntimeError(
                f"the processes of the job can't work together: {reason_of(error)}; {kept}"
            ) from error
        raise


def rules_together(
    together: Team,
    cost: Forecast | None,
    objective: Objective,
    blocks: Sequence[Block],
    settings: Settings,
    source: dict[str, Any],
    *,
    on_block: OnBlock,
    on_progress: OnProgress = lambda done, total: None,
) -> None:
    """Take rules with all processes: `spectrum.rules` for each process to call.

    Args:
        together: The processes.
        cost: What the blocks, and maybe others, cost; given in process 0 alone.
        objective: What is differentiated; as all that follows the same in all processes.
        blocks: What to take.
        settings: How; a memory budget of None is half of the device's memory, on CPU shared among
            the processes of the machine.
        source: As `spectrum.rules`.
        on_block: Called in process 0 with the rows of each block as soon as it is finished.
        on_progress: Called in process 0 with (products done, products in all).

    Raises:
        UserError: The settings ask for Gram matrices, which are of the whole batch.
    """
    if settings.gram:
        raise UserError("gram=True takes the whole batch in one process: leave torchrun out")
    budget = settings.memory_budget
    if budget is None:
        budget = memory_share(choose_device(objective.model, together.device))
    parts: list[Probes] | None = None
    if cost is not None:
        here = replace(settings, memory_budget=budget)
        parts = divide(cost, blocks, here, way=together.way, size=together.size)
    parts, budget = together.agree((parts, budget))
    settings = replace(settings, memory_budget=budget, device=together.device, gram=False)
    if parts is None:
        share = Share(together.rank, together.size, together.add_up)
        progress = on_progress if together.leads else None
        with opened(objective, blocks, settings, share=share) as hessian:
            for rows in rules(hessian, settings, source, on_progress=progress):
                if together.leads:
                    on_block(rows)
        return
    mine = parts[together.rank]
    total = sum(settings.num_products(block.num_params) for block in blocks)
    desk = _Desk(together, parts, on_block, on_progress, total)
    if own := [block for block in blocks if block.name in mine]:
        with opened(objective, own, settings) as hessian:
            for rows in rules(hessian, settings, source, probes=mine, on_progress=desk.note):
                desk.take(rows)
    while together.leads and any(desk.left.values()):
        desk.collect()
        time.sleep(_POLL)


class _Desk:
    """Where finished rows come together: process 0 gathers, the others send."""

    def __init__(
        self,
        together: Team,
        parts: list[Probes],
        on_block: OnBlock,
        on_progress: OnProgress,
        total: int,
    ) -> None:
        self._team, self._parts, self._total = together, parts, total
        self._on_block, self._on_progress = on_block, on_progress
        self.left: Counter[str] = Counter()  # probes of each block whose rows are to come still
        for part in parts:
            self.left.update({name: len(probes) for name, probes in part.items()})
        self._parts_of: dict[str, list[list[Row]]] = {}
        self._done = [0] * together.size
        self._looked = 0.0

    def take(self, what: list[Row] | int) -> None:
        """Accept what this process has: rows of a block's probes, or how many products are done."""
        if self._team.leads:
            self._accept(0, what)
        else:
            self._team.send(what)

    def note(self, done: int, total: int) -> None:
        """Accept this process's progress; look, a few times a second, what the others have."""
        now = time.monotonic()
        if now - self._looked < 5 * _POLL and done < total:
            return
        self._looked = now
        self.take(done)
        if self._team.leads:
            self.collect()

    def collect(self) -> None:
        """Take what the other processes sent."""
        for rank, what in self._team.fetch():
            self._accept(rank, what)
        self._on_progress(sum(self._done), self._total)

    def _accept(self, rank: int, what: list[Row] | int) -> None:
        if isinstance(what, int):
            self._done[rank] = what
            return
        name = what[0]["block"]
        self._parts_of.setdefault(name, []).append(what)
        self.left[name] -= len(self._parts[rank][name])
        if self.left[name] == 0:
            self._on_block(_join(self._parts_of.pop(name)))


def divide(
    cost: Forecast,
    blocks: Sequence[Block],
    settings: Settings,
    *,
    way: str,
    size: int,
) -> list[Probes] | None:
    """Return the probes of each of `size` processes; None if they shall share the samples.

    The pairs (block, probe) are laid out in a row, as long as they cost, and cut into equal
    lengths: blocks stay whole but at the cuts. Auto compares the longest part, with the shared
    passes that each process then makes on the whole batch, with an equal part of everything and
    the sums: 2 (N - 1) / N vectors over the wire per product.
    """
    pairs: list[tuple[str, int, float]] = []
    traffic = 0.0
    flops_of = dict(zip(cost.block_names, cost.block_flops, strict=True))
    for block in blocks:
        exact = settings.is_exact(block.num_params)
        products = block.num_params if exact else settings.num_steps
        probes = 1 if exact else settings.num_probes
        pairs += [(block.name, probe, flops_of[block.name] * products) for probe in range(probes)]
        traffic += 4 * block.num_params * products * probes  # bytes of float32
    weights = [weight for *_, weight in pairs]
    parts: list[Probes] = [{} for _ in range(size)]
    loads = [0.0] * size
    for (name, probe, weight), rank in zip(pairs, cut(weights, size), strict=True):
        parts[rank].setdefault(name, []).append(probe)
        loads[rank] += weight
    if way == "auto":
        fits = cost.product_bytes <= (settings.memory_budget or 0)
        passes = cost.pass_flops * (1 if fits else settings.num_steps)
        by_probes = max(loads) + passes
        wire = 2 * (size - 1) / size * traffic * FLOPS_PER_BYTE
        by_samples = (sum(weights) + passes) / size + wire
        return parts if by_probes <= by_samples else None
    return parts if way == "probes" else None


def _join(parts: list[list[Row]]) -> list[Row]:
    """Return the rows of one block in the order of the probes; an exactly zero one has one row."""
    rows = sorted((row for part in parts for row in part), key=lambda row: row["probe"])
    if len(parts) == 1 or any(row["status"] != "zero" for row in rows):
        return rows
    return [rows[0] | {"num_products": sum(row["num_products"] for row in rows)}]


def _is_loss(error: Exception) -> bool:
    """Tell whether an error of the communication means that another process has gone."""
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    # NCCL has one kind of error for all that it meets: no memory, two processes on one GPU.
    signs = (
        *("closed by peer", "Connection reset", "Broken pipe", "gloo/transport"),
        *("ncclRemoteError", "Connection closed", "watchdog", "store->get"),
    )
    return any(sign in str(error) for sign in signs)
