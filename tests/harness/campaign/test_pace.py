from __future__ import annotations

import pytest

from harness.campaign.pace import Pace
from harness.campaign.plan import Unit

COSTS = {"a": {"train": 10.0, "weights": 1000.0}, "b": {"train": 100.0, "weights": 5000.0}}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def units(model: str) -> list[Unit]:
    runs = [Unit(model, "train", "sgd", 0.1, seed) for seed in range(4)]
    return [*runs, Unit(model, "spectrum", stage="init", partition="weights")]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock) -> Pace:
    return Pace(COSTS, clock)


def do(pace: Pace, clock: Clock, unit: Unit, seconds: float) -> None:
    pace.start(unit)
    clock.now += seconds
    assert pace.finish(unit, counts=True) == pytest.approx(seconds)


def test_nothing_is_foretold_before_anything_is_known(pace):
    assert pace.remaining(units("a")) is None


def test_a_unit_takes_what_its_operations_took_before(pace, clock):
    *runs, spectrum = units("a")
    do(pace, clock, runs[0], 5)
    assert pace.remaining(runs[1:]) == pytest.approx(15)
    # Of spectra nothing is known: they are taken to be as fast as the runs, per operation.
    assert pace.remaining([spectrum]) == pytest.approx(500)
    do(pace, clock, spectrum, 40)
    assert pace.remaining([spectrum, runs[1]]) == pytest.approx(45)


def test_another_model_is_as_fast_until_its_own_units_are_known(pace, clock):
    do(pace, clock, units("a")[0], 5)
    run = units("b")[0]
    assert pace.remaining([run]) == pytest.approx(50)
    do(pace, clock, run, 7)
    assert pace.remaining([run]) == pytest.approx(7)


def test_a_unit_in_flight_counts_by_what_is_left_of_it(pace, clock):
    spectrum = units("a")[-1]
    pace.start(spectrum)
    clock.now += 30
    assert pace.remaining([spectrum]) is None
    pace.progress(spectrum, 0.25)
    assert pace.remaining([spectrum]) == pytest.approx(90)


def test_units_at_the_same_time_take_turns_at_the_clock(pace, clock):
    runs = units("a")[:4]
    pace.start(runs[0])
    pace.start(runs[1])
    clock.now += 6
    pace.finish(runs[0], counts=True)
    pace.finish(runs[1], counts=True)
    assert pace.remaining(runs[2:]) == pytest.approx(6)


def test_a_failure_teaches_nothing(pace, clock):
    run = units("a")[0]
    pace.start(run)
    clock.now += 1
    pace.finish(run, counts=False)
    assert pace.remaining([run]) is None
