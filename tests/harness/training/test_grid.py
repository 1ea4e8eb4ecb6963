from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from harness.registry.entry import Recipe
from harness.training import grid


def rows_of(losses: dict[float, float], optimizer: str = "sgd", seed: int = 0) -> pd.DataFrame:
    rows = [
        ("tiny", optimizer, seed, "loss", lr, step, split, value)
        for lr, loss in losses.items()
        for step, split, value in [(0, "train", 2.3), (9, "batch", 0.0), (20, "train", loss)]
    ]
    columns = ["model", "optimizer", "seed", "metric", "lr", "step", "split", "value"]
    return pd.DataFrame(rows, columns=columns)


def run_to_the_end(recipe: Recipe, loss: Callable[[float], float]) -> dict[float, float]:
    done: dict[float, float] = {}
    while todo := grid.pending(recipe, "sgd", rows_of(done)):
        done |= {lr: loss(lr) for lr in todo}
        assert len(done) < 100
    return done


def test_rates_are_half_a_decade_apart_from_end_to_end(recipe: Recipe) -> None:
    rates = grid.learning_rates(recipe, "sgd")
    assert rates[0] == 0.01
    assert rates[-1] == 1.0
    assert np.allclose(np.diff(np.log10(rates)), 0.5, atol=1e-5)
    assert grid.learning_rates(recipe, "adamw")[0] == 1e-3


def test_an_inner_optimum_ends_the_grid_at_its_five_rates(recipe: Recipe) -> None:
    done = run_to_the_end(recipe, lambda lr: abs(math.log10(lr) + 1))
    assert sorted(done) == grid.learning_rates(recipe, "sgd")
    assert grid.best(rows_of(done), "sgd", recipe) == 0.1
    assert not grid.at_edge(recipe, "sgd", rows_of(done))


@pytest.mark.parametrize(("optimum", "num_extra"), [(0.5, 2), (-2.5, 2), (-3.0, 3)])
def test_the_grid_grows_past_the_edge_until_the_best_is_inside(
    optimum: float, num_extra: int, recipe: Recipe
) -> None:
    done = run_to_the_end(recipe, lambda lr: abs(math.log10(lr) - optimum))
    assert len(done) == 5 + num_extra
    assert math.log10(grid.best(rows_of(done), "sgd", recipe)) == pytest.approx(optimum, abs=1e-4)
    assert not grid.at_edge(recipe, "sgd", rows_of(done))
    assert np.allclose(np.diff(np.log10(sorted(done))), 0.5, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_extension_is_bounded_and_then_says_at_edge(sign: int, recipe: Recipe) -> None:
    done = run_to_the_end(recipe, lambda lr: sign * math.log10(lr))
    assert len(done) == 5 + grid.MAX_EXTENSIONS
    assert grid.at_edge(recipe, "sgd", rows_of(done))


def test_a_fixed_grid_is_not_extended(recipe: Recipe) -> None:
    fixed = dataclasses.replace(recipe, extend_grid=False)
    assert len(run_to_the_end(fixed, math.log10)) == 5


@pytest.mark.parametrize("by_hand", [20.0, 10.0])
def test_a_rate_tried_by_hand_is_no_part_of_the_grid(by_hand: float, recipe: Recipe) -> None:
    done = dict.fromkeys(grid.learning_rates(recipe, "sgd"), 2.0) | {0.1: 1.0}
    rows = rows_of(done | {by_hand: 0.5})
    assert grid.best(rows, "sgd", recipe) == 0.1
    assert grid.pending(recipe, "sgd", rows) == []
    assert not grid.at_edge(recipe, "sgd", rows)
    assert list(grid.grid_losses(recipe, "sgd", rows)) == list(done.values())


def test_a_rate_tried_by_hand_does_not_end_the_grid(recipe: Recipe) -> None:
    rates = grid.learning_rates(recipe, "sgd")
    rows = rows_of({lr: -math.log10(lr) for lr in [*rates, 20.0]})
    assert grid.pending(recipe, "sgd", rows) == [pytest.approx(10**0.5, rel=1e-5)]


def test_pending_resumes_with_what_is_missing(recipe: Recipe) -> None:
    rates = grid.learning_rates(recipe, "sgd")
    rows = rows_of({rates[1]: 1.0, rates[3]: 1.0})
    assert grid.pending(recipe, "sgd", rows) == [rates[0], rates[2], rates[4]]
    unfinished = rows[rows["step"] < 20]
    assert grid.pending(recipe, "sgd", unfinished) == rates
    assert grid.pending(recipe, "adamw", rows) == grid.learning_rates(recipe, "adamw")


def test_other_seeds_choose_nothing(recipe: Recipe) -> None:
    rows = rows_of({0.1: 1.0}, seed=1)
    assert grid.best(rows, "sgd", recipe) is None
    assert len(grid.pending(recipe, "sgd", rows)) == 5


def test_where_all_diverge_the_grid_descends(recipe: Recipe) -> None:
    done = run_to_the_end(recipe, lambda lr: 2.3)
    assert grid.best(rows_of(done), "sgd", recipe) == min(done) == 1e-4


def test_another_optimizer_is_an_error(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="choose sgd or adamw"):
        grid.learning_rates(recipe, "adam")
