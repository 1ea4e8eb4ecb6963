"""Units on a Ray cluster: one task per training run, and per spectrum or group of its blocks.

The tasks read and write the folder of results themselves, so it must be on a file system that all
machines share, as for the local engine's processes. What a lost machine was at is tried elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import BrokenExecutor, Future
from dataclasses import replace
from functools import partial
from typing import Any

from harness.campaign.engines import Engine, Execute
from harness.campaign.unit import Unit
from harness.errors import UserError
from harness.estimator.cost import Forecast, cut

RETRIES = 3  # of a task whose worker died
# Operations that are worth a task of their own, beside loading the model and its data again.
GROUP_FLOPS = 1e13
_BASE_BYTES = 1 << 30  # of a process with torch, before any graph


def import_ray() -> Any:
    """Return the module.

    Raises:
        UserError: It is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--engine ray needs Ray, which is not installed: pip install 'hessian-spectra[ray]'"
        ) from error
    return ray


def task_device(device: str | None) -> str | None:
    """Return the device of a task; the machine that starts the run need not have it.

    Raises:
        UserError: One of several GPUs is named: to each task Ray shows its own, as the first.
    """
    if device is not None and device.startswith("cuda:"):
        raise UserError(
            f"--device {device} names one GPU, and Ray gives each task its own: pass --device cuda"
        )
    return device


class Tasks(Engine):
    """Tasks on a Ray cluster; a spectrum that is worth it is cut into groups of its blocks.

    Args:
        execute: Does one unit; sent to the tasks.
        costs: Forecasts of spectra by model and partition, for memory and groups of blocks.
        address: Of the cluster; None: a cluster on this machine, for the time of the run.
        num_cpus: Processors of a task.
        num_gpus: GPUs of a task.
        jobs: Tasks at once on this machine, where no address is given.
        group_flops: A spectrum is cut into groups of blocks of at least so many operations.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(
        self,
        execute: Execute,
        *,
        costs: Mapping[str, Mapping[str, Forecast]],
        address: str | None = None,
        num_cpus: int = 1,
        num_gpus: int = 0,
        jobs: int = 1,
        group_flops: float = GROUP_FLOPS,
    ) -> None:
        self._ray = ray = import_ray()
        here = {"num_cpus": jobs * num_cpus, "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, **({"address": address} if address else here))
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {address!r}: {error}") from error
        self._execute, self._costs, self._group_flops = execute, costs, group_flops
        self._needs = {"CPU": num_cpus, "GPU": num_gpus}
        self._remote = ray.remote(_do)

    def slots(self) -> int:
        """Return how many tasks the cluster has room for; at least one, for it to grow."""
        there = self._ray.cluster_resources()
        room = [there.get(name, 0) // need for name, need in self._needs.items() if need]
        return max(1, int(min(room)))

    def parts(self, unit: Unit) -> list[Unit]:
        """Return groups of blocks of about equal cost."""
        cost = self._costs.get(unit.model, {}).get(unit.partition)
        if unit.kind != "spectrum" or cost is None:
            return []
        number = min(self.slots(), len(cost.block_names), int(cost.flops // self._group_flops))
        if number < 2:
            return []
        groups: dict[int, list[str]] = {}
        places = cut(cost.spectrum_flops, number)
        for name, place in zip(cost.block_names, places, strict=True):
            groups.setdefault(place, []).append(name)
        return [replace(unit, blocks=tuple(names)) for names in groups.values()]

    def submit(self, unit: Unit) -> Future[str | None]:
        """Begin a task; Ray tries it elsewhere where its worker dies."""
        needs: dict[str, int] = {"num_cpus": self._needs["CPU"], "num_gpus": self._needs["GPU"]}
        cost = self._costs.get(unit.model, {}).get(unit.partition)
        if cost is not None and not self._needs["GPU"]:
            # Never more than the largest machine has: it would wait for ever.
            largest = max(node["Resources"].get("memory", 0) for node in self._ray.nodes())
            memory = _BASE_BYTES + cost.product_bytes + cost.vector_bytes
            needs["memory"] = int(min(memory, largest / 2))
        task = self._remote.options(**needs, max_retries=RETRIES).remote(self._execute, unit)
        future: Future[str | None] = Future()
        task.future().add_done_callback(partial(self._settle, future))
        return future

    def _settle(self, future: Future[str | None], task: Future[Any]) -> None:
        """Hand on how a task ended; its worker may have died, again and again."""
        errors = self._ray.exceptions
        error = task.exception()
        if isinstance(error, errors.RayError) and not isinstance(error, errors.RayTaskError):
            future.set_exception(BrokenExecutor(str(error)))
        elif error is not None:
            future.set_exception(error)
        else:
            reason, number, text = task.result()
            if number is None:
                future.set_result(reason)
            else:
                future.set_exception(OSError(number, text))

    def close(self, *error: Any) -> None:
        """Leave the cluster."""
        self._ray.shutdown()


def _do(execute: Execute, unit: Unit) -> tuple[str | None, int | None, str | None]:
    """Execute a unit in a task; an error of the disk comes back as its number and text."""
    try:
        return execute(unit, lambda done, total: None), None, None
    except OSError as error:
        return None, error.errno, error.strerror
