"""Units on a Ray cluster: one task per training run, and per spectrum or group of its blocks.

The tasks read and write the folder of results themselves, so it must be on a file system that all
machines share, as for the local engine's processes. What a lost machine was at is tried elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.estimator.cost import Forecast, cut

if TYPE_CHECKING:
    from harness.campaign.plan import Unit
    from harness.campaign.run import Agenda

RETRIES = 3  # of a task whose worker died
# Operations that are worth a task of their own, beside loading the model and its data again.
GROUP_FLOPS = 1e13
_BASE_BYTES = 1 << 30  # of a process with torch, before any graph
_LOOK = 1.0  # seconds between looks at the size of the cluster


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


def run_on_ray(
    agenda: Agenda,
    execute: Callable[..., str | None],
    *,
    costs: Mapping[str, Mapping[str, Forecast]],
    address: str | None = None,
    num_cpus: int = 1,
    num_gpus: int = 0,
    jobs: int = 1,
    group_flops: float = GROUP_FLOPS,
) -> None:
    """Keep a Ray cluster busy with what is ready.

    Args:
        agenda: What there is to do.
        execute: Does one unit; returns the reason if it failed.
        costs: Forecasts of spectra by model and partition, for memory and groups of blocks.
        address: Of the cluster; None: a cluster on this machine, for the time of the run.
        num_cpus: Processors of a task.
        num_gpus: GPUs of a task.
        jobs: Tasks at once on this machine, where no address is given.
        group_flops: A spectrum is cut into groups of blocks of at least so many operations.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
        OSError: A task could not write.
    """
    ray = import_ray()
    here = {"num_cpus": jobs * num_cpus, "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, **({"address": address} if address else here))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"no Ray cluster at {address!r}: {error}") from error
    try:
        _Cluster(ray, agenda, execute, costs, num_cpus, num_gpus, group_flops).run()
    finally:
        ray.shutdown()


class _Cluster:
    """The tasks in flight."""

    def __init__(
        self,
        ray: Any,
        agenda: Agenda,
        execute: Callable[..., str | None],
        costs: Mapping[str, Mapping[str, Forecast]],
        num_cpus: int,
        num_gpus: int,
        group_flops: float,
    ) -> None:
        self._ray, self._agenda, self._execute = ray, agenda, execute
        self._costs, self._group_flops = costs, group_flops
        self._needs = {"CPU": num_cpus, "GPU": num_gpus}
        self._remote = ray.remote(_do)
        self._running: dict[Any, Unit] = {}
        self._groups: dict[Unit, int] = {}  # groups in flight of a spectrum that is cut
        self._claims: dict[Unit, ExitStack] = {}

    def run(self) -> None:
        """Do all there is to do."""
        try:
            while True:
                while len(self._running) < self._slots() and (unit := self._agenda.start()):
                    self._begin(unit)
                if not self._running:
                    if self._agenda.wait():
                        continue
                    return
                done, _ = self._ray.wait(list(self._running), timeout=_LOOK)
                for task in done:
                    self._end(task, self._running.pop(task))
        finally:
            for claim in self._claims.values():
                claim.close()

    def _slots(self) -> int:
        """Return how many tasks the cluster has room for; at least one, for it to grow."""
        there = self._ray.cluster_resources()
        room = [there.get(name, 0) // need for name, need in self._needs.items() if need]
        return max(1, int(min(room)))

    def _begin(self, unit: Unit) -> None:
        groups = self._cut(unit)
        if len(groups) < 2:
            self._submit(unit)
            return
        # While groups are taken, the spectrum is this run's.
        claim = ExitStack()
        if claim.enter_context(self._agenda.claim(unit)):
            self._claims[unit] = claim
            self._groups[unit] = len(groups)
            for group in groups:
                self._submit(replace(unit, blocks=group))
        else:
            claim.close()
            self._submit(unit)  # which will find out

    def _cut(self, unit: Unit) -> list[tuple[str, ...]]:
        """Return groups of blocks of about equal cost."""
        cost = self._costs.get(unit.model, {}).get(unit.partition)
        if unit.kind != "spectrum" or cost is None:
            return []
        number = min(self._slots(), len(cost.block_names), int(cost.flops // self._group_flops))
        if number < 2:
            return []
        groups: dict[int, list[str]] = {}
        places = cut(cost.spectrum_flops, number)
        for name, place in zip(cost.block_names, places, strict=True):
            groups.setdefault(place, []).append(name)
        return [tuple(names) for names in groups.values()]

    def _submit(self, unit: Unit) -> None:
        needs: dict[str, int] = {"num_cpus": self._needs["CPU"], "num_gpus": self._needs["GPU"]}
        cost = self._costs.get(unit.model, {}).get(unit.partition)
        if cost is not None and not self._needs["GPU"]:
            # Never more than the largest machine has: it would wait for ever.
            largest = max(node["Resources"].get("memory", 0) for node in self._ray.nodes())
            memory = _BASE_BYTES + cost.product_bytes + cost.vector_bytes
            needs["memory"] = int(min(memory, largest / 2))
        task = self._remote.options(**needs, max_retries=RETRIES)
        self._running[task.remote(self._execute, unit)] = unit

    def _end(self, task: Any, unit: Unit) -> None:
        died = False
        reason: str | None = None
        try:
            reason, number, text = self._ray.get(task)
            if number is not None:
                raise OSError(number, text)
        except self._ray.exceptions.RayTaskError:
            raise
        except self._ray.exceptions.RayError:  # the worker died, again and again
            died = True
        if unit.blocks:
            whole = replace(unit, blocks=())
            self._groups[whole] -= 1
            if not self._groups[whole]:
                # Tries again what failed, and has the derived tables follow.
                self._claims.pop(whole).close()
                self._submit(whole)
        elif died:
            self._agenda.lost(unit)
        else:
            self._agenda.settle(unit, reason)


def _do(
    execute: Callable[..., str | None], unit: Unit
) -> tuple[str | None, int | None, str | None]:
    """Execute a unit in a task; an error of the disk comes back as its number and text."""
    try:
        return execute(unit), None, None
    except OSError as error:
        return None, error.errno, error.strerror
