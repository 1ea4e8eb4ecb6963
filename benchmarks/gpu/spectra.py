"""Initial spectra of the paper's systems, on batches as large as the minutes allow."""

from __future__ import annotations

import torch

from benchmarks.gpu.desk import Desk, report
from benchmarks.gpu.entries import PAPER, TINY, load, split
from benchmarks.gpu.products import matmul_rate
from harness.campaign.spectrum import take_spectrum
from harness.errors import UserError, reason_of
from harness.estimator.device import device_memory
from harness.estimator.settings import Settings
from harness.records.ledger import Ledger
from harness.training import Problem
from spectra_db import js0

NUM_PROBES = 3
STEPS = (10, 20, 30)  # of all systems first, then of all again
_SHARE_OF_MATMUL = 0.3  # a guess of what products reach, where nothing was measured
_MEMORY = 0.8  # of the device
_PIECE = 64  # samples of the first look at a batch, which takes no graph


def take_spectra(desk: Desk) -> bool:
    """Take 3 probes of 10 steps of each system, then more steps, while there is time."""
    systems = {TINY: 8} if desk.rehearse else PAPER
    rate = _rate(desk)
    for num_steps in (2, 3) if desk.rehearse else STEPS:
        todo = [name for name in systems if not desk.known(f"{name} {num_steps} steps")]
        for position, name in enumerate(todo):
            seconds = desk.left / (len(todo) - position)
            try:
                if not _take(desk, name, systems[name], num_steps, seconds, rate):
                    return False
            # The others can do without this one.
            except (UserError, RuntimeError, ValueError) as error:
                desk.say(f"{name} {num_steps} steps", status="failed", reason=reason_of(error))
    return True


def _take(desk: Desk, name: str, largest: int, num_steps: int, seconds: float, rate: float) -> bool:
    """Take one spectrum, on the batch of the first time or else the largest that is affordable.

    Returns:
        Whether there was time to take it.
    """
    problem = load(name, rehearse=desk.rehearse)
    problem.model.to(desk.device)
    settings = Settings(
        partition=problem.entry.partition,
        num_probes=NUM_PROBES,
        num_steps=num_steps,
        device=desk.device,
        memory_budget=int(_MEMORY * device_memory(torch.device(desk.device))),
    )
    cost = problem.forecast(settings)
    # Graphs of large batches are not kept: each step takes the shared passes again.
    per_sample = (cost.flops + num_steps * cost.pass_flops) / problem.batch_size
    chosen = desk.known(f"{name} batch")
    if chosen is None:
        batch_size = affordable(problem, largest, seconds * rate / per_sample)
        desk.say(f"{name} batch", samples=batch_size, flops=per_sample * batch_size)
    else:
        batch_size = chosen["samples"]
    if per_sample * batch_size / rate > desk.left:
        return False
    large = split(load(name, batch_size=batch_size, rehearse=desk.rehearse), _PIECE)
    # Raw rows alone: the derived tables have no column for the batch, and the dataset's are of its.
    names = [block.name for block in large.blocks(settings.partition)]
    rows = take_spectrum(large, settings, Ledger(desk.folder), command="benchmarks.gpu", only=names)
    estimate = js0(rows)
    desk.say(
        f"{name} {num_steps} steps",
        samples=batch_size,
        blocks=rows["block"].nunique(),
        js0=estimate.value,
        js0_error=estimate.standard_error,
        seconds=float(rows["seconds"].sum()),
        microbatch=int(rows["microbatch_size"].max()),
        peak_gib=float(rows["peak_bytes"].max()) / 2**30,
    )
    return True


def affordable(problem: Problem, largest: int, samples: float) -> int:
    """Return the largest batch, or else the entry's, doubled as often as so many samples allow."""
    if samples >= largest:
        return largest
    size = problem.batch_size
    while 2 * size <= samples:
        size *= 2
    return size


def _rate(desk: Desk) -> float:
    """Return operations per second of products, measured in an earlier stage or guessed."""
    measured = [x["tflops"] for x in report(desk.out) if x["item"].endswith("float32 steps")]
    if measured:
        return 1e12 * min(measured)
    return _SHARE_OF_MATMUL * matmul_rate(torch.device(desk.device))
