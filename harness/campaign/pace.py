"""How long what is left will take, from the operations of units and the time that others took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from harness.campaign.unit import Unit


class Pace:
    """Seconds per operation, for each model and kind of unit, from this run's own units.

    A unit is expected to take what its model's units of that kind took, else what other models'
    did, else what any did. Units in flight count by the part of them that is done.

    Args:
        costs: Operations of a unit by model, then by `Survey.unit_flops`' keys.
        clock: Seconds from some beginning.
    """

    def __init__(
        self, costs: Mapping[str, Mapping[str, float]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._costs, self._clock = costs, clock
        self._begun: dict[Unit, float] = {}
        self._fractions: dict[Unit, float] = {}
        self._spent: dict[tuple[str, str], tuple[float, float]] = {}  # seconds, operations
        self._width = 1

    def start(self, unit: Unit) -> None:
        """Note that a unit begins."""
        self._begun[unit], self._fractions[unit] = self._clock(), 0.0
        self._width = max(self._width, len(self._begun))

    def progress(self, unit: Unit, fraction: float) -> None:
        """Note how far a unit is, from 0 to 1."""
        self._fractions[unit] = fraction

    def finish(self, unit: Unit, *, counts: bool) -> float:
        """Note that a unit ended; return its seconds. One that failed teaches nothing."""
        seconds = self._clock() - self._begun.pop(unit, self._clock())
        self._fractions.pop(unit, None)
        if counts:
            key = (unit.model, unit.kind)
            time_, flops = self._spent.get(key, (0.0, 0.0))
            self._spent[key] = time_ + seconds, flops + self._flops(unit)
        return seconds

    def remaining(self, left: Sequence[Unit]) -> float | None:
        """Return the seconds that units will take, in flight or to come; None if nothing is known.

        As many are done at once as were so far, or as are left.
        """
        total = 0.0
        for unit in left:
            rate = self._rate(unit)
            if rate is None:
                return None
            total += rate * self._flops(unit) * (1 - self._fractions.get(unit, 0.0))
        return total / max(1, min(self._width, len(left)))

    def _flops(self, unit: Unit) -> float:
        costs = self._costs.get(unit.model, {})
        return (costs.get(unit.partition or unit.kind, 0.0) or 1.0) * max(unit.num_steps, 1)

    def _rate(self, unit: Unit) -> float | None:
        """Return the seconds per operation expected of a unit."""
        now = self._clock()
        spent = dict(self._spent)
        for other, begun in self._begun.items():
            if (fraction := self._fractions[other]) > 0:
                key = (other.model, other.kind)
                time_, flops = spent.get(key, (0.0, 0.0))
                spent[key] = time_ + now - begun, flops + fraction * self._flops(other)
        for alike in (
            [spent[key] for key in spent if key == (unit.model, unit.kind)],
            [spent[key] for key in spent if key[1] == unit.kind],
            list(spent.values()),
        ):
            if alike:
                return sum(t for t, _ in alike) / sum(f for _, f in alike)
        return None
