"""Units in this process, or in worker processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from harness.campaign.engines import Engine, Execute
from harness.campaign.unit import Unit

# In a worker: its own two numbers among those of all workers, the unit's number and how far it is.
_slot: Any = None


class Here(Engine):
    """One unit after another in this process.

    Args:
        execute: Does one.
        on_progress: Called with the unit and the part of it that is done.
    """

    def __init__(self, execute: Execute, on_progress: Callable[[Unit, float], None]) -> None:
        self._execute, self._on_progress = execute, on_progress

    def slots(self) -> int:
        """Return one."""
        return 1

    def submit(self, unit: Unit) -> Future[str | None]:
        """Do a unit."""

        def on_progress(done: int, total: int) -> None:
            self._on_progress(unit, done / total if total else 1.0)

        future: Future[str | None] = Future()
        future.set_result(self._execute(unit, on_progress))
        return future


class Workers(Engine):
    """Spawned worker processes, since torch's threads don't survive a fork.

    Args:
        execute: Does one unit; sent to the workers.
        jobs: How many workers.
        spread: Whether each takes one of the GPUs, in turn.
    """

    dies_whole = True

    def __init__(self, execute: Execute, jobs: int, *, spread: bool = False) -> None:
        self._execute, self._jobs = execute, jobs
        self._gpus = visible_gpus() if spread else []
        self._units: dict[int, Unit] = {}
        self._futures: list[Future[str | None]] = []
        self._pool, self._numbers = self._start()

    def slots(self) -> int:
        """Return how many workers there are."""
        return self._jobs

    def submit(self, unit: Unit) -> Future[str | None]:
        """Hand a unit to a worker."""
        number = len(self._units) + 1
        future = self._pool.submit(_execute, self._execute, unit, number)
        self._units[number] = unit
        self._futures = [f for f in self._futures if not f.done()] + [future]
        return future

    def revive(self) -> None:
        """Start other workers."""
        self._pool.shutdown()
        self._pool, self._numbers = self._start()

    def progress(self) -> Iterable[tuple[Unit, float]]:
        """Yield what the workers left in the numbers that they share."""
        for i in range(0, len(self._numbers), 2):
            unit, fraction = self._units.get(int(self._numbers[i])), self._numbers[i + 1]
            if unit is not None and fraction > 0:
                yield unit, fraction

    def close(self, *error: Any) -> None:
        """End the workers; readers see whole files whatever one is at."""
        interrupted = any(not future.done() for future in self._futures)
        self._pool.shutdown(wait=not interrupted, cancel_futures=True)
        if interrupted:
            for process in multiprocessing.active_children():
                process.terminate()

    def _start(self) -> tuple[ProcessPoolExecutor, Any]:
        """Return a pool, and two shared numbers for each worker.

        The numbers have no lock, which a worker that is killed would take with it.
        """
        context = multiprocessing.get_context("spawn")
        numbers = context.Array("d", 2 * self._jobs, lock=False)
        counter = context.Value("i", 0)
        pool = ProcessPoolExecutor(
            self._jobs,
            mp_context=context,
            initializer=_start_worker,
            initargs=(counter, numbers, self._gpus),
        )
        return pool, numbers


def _start_worker(counter: Any, numbers: Any, gpus: Sequence[str]) -> None:
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
    _slot = numbers, 2 * index
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


def sharers(jobs: int, device: str | None) -> int:
    """Return how many of so many workers share the memory of a device."""
    import torch

    # Named alone, GPUs are taken in turn.
    return -(-jobs // max(1, torch.cuda.device_count())) if device == "cuda" else jobs


def _execute(execute: Execute, unit: Unit, number: int) -> str | None:
    """Execute a unit in a worker, leaving its progress where the parent looks."""
    numbers, at = _slot
    numbers[at + 1], numbers[at] = 0.0, number

    def on_progress(done: int, total: int) -> None:
        numbers[at + 1] = done / total if total else 1.0

    return execute(unit, on_progress)
