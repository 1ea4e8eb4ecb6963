"""Where units of work are done: in this process, in worker processes, on a Ray cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from harness.campaign.unit import Unit

# (unit, on_progress) ↦ the reason if it failed.
Execute = Callable[[Unit, Callable[[int, int], None]], "str | None"]


class Engine(ABC):
    """What does units; a broken future (`BrokenExecutor`) says that its worker died.

    Attributes:
        dies_whole: Whether all units in flight are lost with one worker.
    """

    dies_whole = False

    @abstractmethod
    def slots(self) -> int:
        """Return how many units may be in flight now, at least one."""

    @abstractmethod
    def submit(self, unit: Unit) -> Future[str | None]:
        """Begin a unit; its future gives the reason if it failed.

        Raises:
            BrokenExecutor: Workers died, and none is there to begin it.
        """

    def parts(self, unit: Unit) -> list[Unit]:
        """Return parts that are to be done before a unit as a whole; fewer than two: none."""
        return []

    def progress(self) -> Iterable[tuple[Unit, float]]:
        """Yield units with the part of them that is done, where it is known."""
        return ()

    def revive(self) -> None:  # noqa: B027
        """Make up for workers that died."""

    def close(self, *error: Any) -> None:  # noqa: B027
        """End; what is in flight ends at once. Given what `__exit__` is given."""
