"""Units in this process, or in worker processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.campaign.plan import Unit
    from harness.campaign.run import Agenda

Execute = Callable[..., "str | None"]
_LOOK = 1.0  # seconds between looks at how far the workers are

# In a worker: its own two numbers among those of all workers, the unit's number and how far it is.
_slot: Any = None


def run_here(agenda: Agenda, execute: Execute) -> None:
    """Execute one unit after another in this process."""
    while True:
        while unit := agenda.start():

            def on_progress(done: int, total: int, unit: Unit = unit) -> None:
                agenda.progress(unit, done / total if total else 1.0)

            agenda.settle(unit, execute(unit, on_progress))
        if not agenda.wait():
            return


def run_in_workers(agenda: Agenda, execute: Execute, *, jobs: int, spread: bool = False) -> None:
    """Keep worker processes busy with what is ready.

    When a worker dies all units in flight are lost, and none can be told to be the cause. They
    are tried again one at a time; one that dies alone has failed. Spread, each worker takes one of
    the GPUs, in turn.
    """
    suspects: list[Unit] = []
    retried: set[Unit] = set()
    running: dict[Future[str | None], tuple[Unit, int]] = {}
    gpus = visible_gpus() if spread else []
    pool, slots = make_pool(jobs, gpus)
    number = 0
    try:
        while True:
            refused: list[Unit] = []
            while len(running) < jobs:
                if running and (suspects or any(unit in retried for unit, _ in running.values())):
                    break
                if suspects:
                    retried.add(suspects[-1])
                unit = suspects.pop() if suspects else agenda.start()
                if unit is None:
                    break
                number += 1
                try:
                    running[pool.submit(_execute, execute, unit, number)] = unit, number
                except BrokenProcessPool:  # a worker died since the last look
                    refused.append(unit)
                    break
            if running:
                wait(running, timeout=_LOOK, return_when=FIRST_COMPLETED)
                reached = {int(slots[i]): slots[i + 1] for i in range(0, len(slots), 2)}
                for unit, n in running.values():
                    if reached.get(n, 0.0) > 0:
                        agenda.progress(unit, reached[n])
            elif not refused:
                if agenda.wait():
                    continue
                return
            died = any(isinstance(f.exception(), BrokenProcessPool) for f in running if f.done())
            if died or refused:
                lost = [*(unit for unit, _ in running.values()), *refused]
                running.clear()
                pool.shutdown()
                pool, slots = make_pool(jobs, gpus)
                if len(lost) > 1 or refused:
                    suspects += lost
                    continue
                agenda.lost(lost[0])
            for future in [future for future in running if future.done()]:
                agenda.settle(running.pop(future)[0], future.result())
    finally:
        pool.shutdown(wait=not running, cancel_futures=True)
        if running:  # interrupted: readers see whole files whatever a worker is at
            for process in multiprocessing.active_children():
                process.terminate()


def make_pool(jobs: int, gpus: Sequence[str] = ()) -> tuple[ProcessPoolExecutor, Any]:
    """Return a pool of spawned workers, each on one of the GPUs, and two shared numbers for each.

    Spawned, since torch's threads don't survive a fork. The numbers have no lock, which a worker
    that is killed would take with it.
    """
    context = multiprocessing.get_context("spawn")
    slots = context.Array("d", 2 * jobs, lock=False)
    counter = context.Value("i", 0)
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start_worker, initargs=(counter, slots, gpus)
    )
    return pool, slots


def _start_worker(counter: Any, slots: Any, gpus: Sequence[str]) -> None:
    """Leave Ctrl-C to the parent, end with it even if it is killed, take one GPU of several."""
    global _slot
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    with counter.get_lock():
        index = counter.value
        counter.value += 1
    _slot = slots, 2 * index
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that workers may take.

    To be asked by the parent: without NVML torch counts them by starting CUDA, and a process that
    has started it can't choose any more.
    """
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(i) for i in range(torch.cuda.device_count())]
    return [name.strip() for name in named.split(",") if name.strip()]


def _execute(execute: Execute, unit: Unit, number: int) -> str | None:
    """Execute a unit in a worker, leaving its progress where the parent looks."""
    slots, at = _slot
    slots[at + 1], slots[at] = 0.0, number

    def on_progress(done: int, total: int) -> None:
        slots[at + 1] = done / total if total else 1.0

    return execute(unit, on_progress)
