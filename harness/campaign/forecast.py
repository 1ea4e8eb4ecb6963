"""What entries take on a device: hours, memory and disk, before anything is computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.campaign.plan import settings_of
from harness.campaign.survey import Survey
from harness.campaign.work import num_threads
from harness.errors import UserError
from harness.training.stages import STAGE_SEED
from spectra_db.words import WHOLE

if TYPE_CHECKING:
    from torch import nn

    from harness.registry.entry import Recipe, SpeedupRecipe
    from harness.tasks.base import Batch, Task

# float32 without tensor cores, dense, as the makers' data sheets have it (operations per second),
# and memory (bytes). The protocol computes in float32 without TF32.
DEVICES = {
    "v100": (15.7e12, 32e9),
    "a100": (19.5e12, 80e9),
    "l40s": (91.6e12, 48e9),
    "rtx4090": (82.6e12, 24e9),
    "h100": (67e12, 80e9),
    "h200": (67e12, 141e9),
}
# The part of the peak that is taken for granted where nothing was measured.
EFFICIENCY = 0.4
_SAMPLE_FLOPS = 1e10  # of a measurement: a second or so on one core
_MEASURED_BLOCKS = 6
_FILE_BYTES = 16_384  # of a file of table `spectra` beside its lists
_TRAINING_STATE = 4  # weights, gradient and two moments of AdamW


@dataclass(frozen=True)
class Throughput:
    """Operations per second, of the products and of training; memory of the device in bytes."""

    products: float
    training: float
    memory: float
    source: str


@dataclass(frozen=True)
class Outlook:
    """What an entry takes.

    Attributes:
        model: Name of the entry.
        num_products: Hessian-vector products.
        flops: Operations, shared passes that the memory forces to repeat included.
        hours: Hours of one device.
        memory_bytes: Of the device, at most.
        disk_bytes: Of tables and checkpoints.
    """

    model: str
    num_products: int
    flops: float
    hours: float
    memory_bytes: float
    disk_bytes: float


def outlook(survey: Survey, throughput: Throughput) -> Outlook:
    """Return what an entry takes on a device of a throughput."""
    budget = int(throughput.memory // 2)
    times = [(cost, survey.counts[partition]) for partition, cost in survey.costs.items()]
    spectra = sum(cost.flops_within(budget) * count for cost, count in times)
    weights = 4.0 * survey.num_params
    kept = max(min(cost.product_bytes, budget) for cost, _ in times)
    # With the graph kept one block's probes are advanced at a time: at most those of the full one.
    vectors = max(min(cost.vector_bytes, budget) for cost, _ in times)
    entry = survey.entry
    trains = entry.trained_by is not None
    # Of trials the final weights alone are kept, where others start from them.
    kept_stages = len(entry.stages) if entry.grid_recipe else entry.stages.count("final")
    # float64 of random mantissas hardly compresses.
    tables = _FILE_BYTES + sum(8.0 * cost.stored_numbers * count for cost, count in times)
    return Outlook(
        model=entry.name,
        num_products=survey.num_products,
        flops=spectra + survey.training_flops,
        hours=(spectra / throughput.products + survey.training_flops / throughput.training) / 3600,
        memory_bytes=max(weights + kept + vectors, _TRAINING_STATE * weights * trains),
        disk_bytes=tables + weights * kept_stages,
    )


def named(device: str, tflops: float | None) -> Throughput:
    """Return the throughput of a device that need not be here.

    Args:
        device: One of `DEVICES`.
        tflops: TFLOP/s that it was found to sustain; None: `EFFICIENCY` of its peak.
    """
    peak, memory = DEVICES[device]
    if tflops is not None:
        return Throughput(tflops * 1e12, tflops * 1e12, memory, f"given: {tflops:g} TFLOP/s")
    rate = EFFICIENCY * peak
    source = f"assumed: {EFFICIENCY:.0%} of the {peak / 1e12:g} TFLOP/s of the data sheet"
    return Throughput(rate, rate, memory, source)


def measured(
    survey: Survey,
    data_root: Path | None,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> Throughput:
    """Measure the throughput of an entry on a device that is here, in a few seconds.

    Takes products with some blocks, and training steps, on as many samples as are worth a second,
    once to warm up and once by the clock, with the threads that a run has.
    """
    import torch

    from harness.estimator.batches import take
    from harness.estimator.device import choose_device, device_memory
    from harness.estimator.operators import opened
    from harness.training import load_problem

    torch.set_num_threads(num_threads())
    entry = survey.entry
    fresh = replace(entry, pretrained=None)
    problem = load_problem(fresh, "init", STAGE_SEED, data_root=data_root)
    target = choose_device(problem.model, device)
    memory = device_memory(target)
    cost = survey.costs[entry.partition]
    blocks = problem.blocks(entry.partition)
    every = max(1, len(blocks) // _MEASURED_BLOCKS)
    chosen = range(every // 2, len(blocks), every)
    per_sample = sum(cost.block_flops[i] for i in chosen) / problem.batch_size
    size = min(problem.microbatch_size, max(1, round(_SAMPLE_FLOPS / max(per_sample, 1))))
    batch = take(problem.batches[0], 0, size)

    def synchronize() -> None:
        if target.type == "cuda":
            torch.cuda.synchronize(target)

    def seconds(work: Callable[[], Any], repeats: int) -> float:
        work()
        synchronize()
        begin = clock()
        for _ in range(repeats):
            work()
        synchronize()
        return (clock() - begin) / repeats

    def repeats(flops: float) -> int:
        return max(1, min(20, round(_SAMPLE_FLOPS / max(flops, 1))))

    settings = replace(settings_of(entry, device=device), memory_budget=memory)
    with opened(problem.on([batch]).objective, blocks, settings) as hessian:
        requests = [
            (i, torch.ones(blocks[i].num_params, dtype=hessian.dtype, device=target))
            for i in chosen
        ]
        flops = per_sample * size
        products = flops / seconds(lambda: hessian.products(requests), repeats(flops))
    training = products
    if (recipe := entry.trained_by) is not None:
        size = max(1, min(problem.microbatch_size, recipe.batch_size))
        some = tuple(t.to(target) for t in take(problem.batches[0], 0, size))
        step = _training_step(problem.model.to(target), problem.task, recipe, some)
        flops = cost.pass_flops / problem.batch_size * size
        training = flops / seconds(step, repeats(flops))
    return Throughput(products, training, memory, f"measured on this machine's {target.type}")


def _training_step(
    model: nn.Module, task: Task, recipe: Recipe | SpeedupRecipe, batch: Batch
) -> Callable[[], None]:
    """Return a step of AdamW, at a rate that moves nothing far."""
    from harness.training.loop import make_optimizer

    model.train()
    update = make_optimizer(model, recipe, "adamw", 1e-6)

    def step() -> None:
        task.loss(model, batch).backward()
        update.step()
        update.zero_grad(set_to_none=True)

    return step


def total(outlooks: Sequence[Outlook]) -> Outlook:
    """Return the sum of entries; of memory the most."""
    return Outlook(
        WHOLE,
        sum(o.num_products for o in outlooks),
        sum(o.flops for o in outlooks),
        sum(o.hours for o in outlooks),
        max(o.memory_bytes for o in outlooks),
        sum(o.disk_bytes for o in outlooks),
    )


def throughput_of(
    survey: Survey, data_root: Path | None, device: str, tflops: float | None
) -> Throughput:
    """Return the throughput of an entry on a named device, or as given, or measured here."""
    if tflops is not None and not 0 < tflops < float("inf"):
        raise UserError(f"--throughput is {tflops}; it must be positive, in TFLOP/s")
    if device in DEVICES:
        return named(device, tflops)
    if tflops is None:
        return measured(survey, data_root, device)
    import torch

    from harness.estimator.device import device_memory

    memory = device_memory(torch.device(device))
    return Throughput(tflops * 1e12, tflops * 1e12, memory, f"given: {tflops:g} TFLOP/s")
