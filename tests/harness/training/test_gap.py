from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from harness.registry.entry import Recipe
from harness.training import grid
from harness.training.gap import FROM_REFERENCE, gap

INIT = 2.0


def rows_of(
    recipe: Recipe,
    sgd: tuple[float, ...],
    adamw: tuple[float, ...],
    init: tuple[float, ...] = (INIT, INIT, INIT),
) -> pd.DataFrame:
    rows = []

    def add(optimizer: str, lr: float, seed: int, start: float, end: float) -> None:
        for step, value in ((0, start), (20, end)):
            rows.append(("tiny", optimizer, lr, seed, step, "train", "loss", value))

    for optimizer, finals in (("sgd", sgd), ("adamw", adamw)):
        rates = grid.learning_rates(recipe, optimizer)
        for k, lr in enumerate(rates):
            add(optimizer, lr, 0, INIT, 1 + abs(k - 2))
        for seed, (start, end) in enumerate(zip(init, finals, strict=False), 1):
            add(optimizer, rates[2], seed, start, end)
    columns = ["model", "optimizer", "lr", "seed", "step", "split", "metric", "value"]
    return pd.DataFrame(rows, columns=columns)


def test_equal_seeds_give_the_exact_gap_without_error(recipe: Recipe) -> None:
    row = gap("tiny", rows_of(recipe, (1.0,) * 3, (0.5,) * 3), recipe)
    assert row["gap"] == pytest.approx(1 / 3)
    assert row["standard_error"] == pytest.approx(0, abs=1e-12)
    assert (row["sgd_lr"], row["adam_lr"]) == (0.1, 0.01)
    assert (row["num_lrs"], row["num_seeds"], row["at_edge"]) == (5, 3, False)
    assert row["adam_needed"] is True
    assert (row["status"], row["reason"]) == ("ok", None)


def test_the_error_is_that_of_the_delta_method(recipe: Recipe) -> None:
    sgd, adamw = np.array([1.1, 0.9, 1.0]), np.array([0.5, 0.4, 0.6])
    row = gap("tiny", rows_of(recipe, tuple(sgd), tuple(adamw)), recipe)
    value = (1.0 - 0.5) / (2.0 - 0.5)
    residuals = (sgd - adamw) - value * (INIT - adamw)
    error = residuals.std(ddof=1) / math.sqrt(3) / 1.5
    assert row["gap"] == pytest.approx(value)
    assert row["standard_error"] == pytest.approx(error)
    # Student's t for 2 degrees of freedom at 97.5 %: 4.302653 (any table).
    assert row["ci_high"] - row["gap"] == pytest.approx(4.302653 * error, rel=1e-6)
    assert row["gap"] - row["ci_low"] == pytest.approx(4.302653 * error, rel=1e-6)


def test_the_stated_error_is_the_scatter_of_repeated_experiments(recipe: Recipe) -> None:
    rng = np.random.default_rng(0)
    rows = [
        gap(
            "tiny",
            rows_of(
                recipe, tuple(1 + 0.02 * rng.normal(size=3)), tuple(0.5 + 0.02 * rng.normal(size=3))
            ),
            recipe,
        )
        for _ in range(300)
    ]
    scatter = np.std([row["gap"] for row in rows])
    stated = math.sqrt(np.mean([row["standard_error"] ** 2 for row in rows]))
    # 300 repetitions know the scatter to 4 %, 600 degrees of freedom the stated error to 3 %.
    assert stated == pytest.approx(scatter, rel=0.15)
    covered = np.mean([row["ci_low"] <= 1 / 3 <= row["ci_high"] for row in rows])
    assert 0.91 < covered < 0.99


def test_adam_is_not_needed_where_sgd_is_as_good(recipe: Recipe) -> None:
    row = gap("tiny", rows_of(recipe, (0.51, 0.49, 0.5), (0.5, 0.5, 0.5)), recipe)
    assert row["adam_needed"] is False
    noisy = gap("tiny", rows_of(recipe, (1.9, 0.4, 0.4), (0.5, 0.5, 0.5)), recipe)
    assert noisy["gap"] > 0.1
    assert noisy["adam_needed"] is False


def test_progress_within_noise_leaves_the_gap_undefined(recipe: Recipe) -> None:
    row = gap("tiny", rows_of(recipe, (2.0,) * 3, (1.9, 2.05, 2.0)), recipe)
    assert row["status"] == "failed"
    assert "within noise" in row["reason"]
    assert row["gap"] is None
    assert row["adam_needed"] is None
    assert row["adam_loss"] == pytest.approx(1.98333, rel=1e-4)


def test_sgd_that_always_diverges_has_a_gap_of_one(recipe: Recipe) -> None:
    row = gap("tiny", rows_of(recipe, (INIT,) * 3, (0.4, 0.5, 0.6)), recipe)
    assert row["gap"] == pytest.approx(1.0)
    assert row["adam_needed"] is True


def test_adamw_that_always_diverges_leaves_it_undefined(recipe: Recipe) -> None:
    row = gap("tiny", rows_of(recipe, (1.0,) * 3, (INIT,) * 3), recipe)
    assert row["status"] == "failed"


def test_missing_runs_leave_it_pending_and_are_named(recipe: Recipe) -> None:
    row = gap("tiny", rows_of(recipe, (1.0, 1.0), (0.5, 0.5, 0.5)), recipe)
    assert (row["status"], row["num_seeds"]) == ("pending", 2)
    assert row["reason"] == "not run: sgd seed 3"
    rows = rows_of(recipe, (1.0,) * 3, (0.5,) * 3)
    rows = rows[~((rows["seed"] == 0) & (rows["lr"] == 1.0))]
    row = gap("tiny", rows, recipe)
    assert row["status"] == "pending"
    assert row["reason"] == "learning rates not run on seed 0: sgd at [1.0]"
    none = rows.iloc[:0]
    assert gap("tiny", none, recipe)["status"] == "pending"


def test_other_models_rows_do_not_count(recipe: Recipe) -> None:
    rows = rows_of(recipe, (1.0,) * 3, (0.5,) * 3)
    other = rows.assign(model="other", value=rows["value"] * 7)
    assert gap("tiny", pd.concat([rows, other]), recipe) == gap("tiny", rows, recipe)


def from_entropy(entropy: float):
    return {"entropy": entropy, "reference": lambda init: min(init, entropy)}


def test_from_r_neither_labels_alone_nor_a_bad_start_count_as_learnt(recipe: Recipe) -> None:
    # Started at 200, chance is 2.3: SGD stops near chance, AdamW learns.
    sgd, adamw, init = np.array([1.8, 1.9, 1.7]), np.array([0.4, 0.5, 0.45]), (200.0,) * 3
    rows = rows_of(recipe, tuple(sgd), tuple(adamw), init)
    row = gap("tiny", rows, recipe, **from_entropy(2.3))
    assert row["gap"] < 0.01
    assert row["adam_needed"] is False
    value = (1.8 - 0.45) / (2.3 - 0.45)
    residuals = (sgd - adamw) - value * (2.3 - adamw)
    error = residuals.std(ddof=1) / math.sqrt(3) / (2.3 - 0.45)
    assert row["gap_from_reference"] == pytest.approx(value)
    assert row["gap_from_reference_error"] == pytest.approx(error)
    assert row["gap_from_reference_low"] == pytest.approx(value - 4.302653 * error)
    assert row["gap_from_reference_high"] == pytest.approx(value + 4.302653 * error)
    assert (row["target_entropy"], row["reference_loss"]) == (2.3, pytest.approx(2.3))
    assert (row["trained"], row["adam_needed_now"]) == (True, "yes")


@pytest.mark.parametrize(
    ("sgd", "answer"),
    [((0.9, 1.0, 1.1), "yes"), ((0.5, 0.51, 0.49), "no"), ((0.6, 0.7, 0.5), "unclear")],
)
def test_the_answer_is_yes_or_no_where_the_whole_interval_says_so(recipe, sgd, answer) -> None:
    row = gap("tiny", rows_of(recipe, sgd, (0.5,) * 3), recipe, **from_entropy(INIT))
    assert row["adam_needed_now"] == answer
    ends = row["gap_from_reference_low"], row["gap_from_reference_high"]
    assert [end > 0.1 for end in ends] == {
        "yes": [True, True], "no": [False, False], "unclear": [False, True]
    }[answer]  # fmt: skip


def test_sgd_that_ends_above_r_counts_as_r(recipe: Recipe) -> None:
    rows = rows_of(recipe, (500.0, 90.0, 3.0), (0.5,) * 3, (900.0,) * 3)
    row = gap("tiny", rows, recipe, **from_entropy(2.3))
    assert row["gap_from_reference"] == pytest.approx(1)
    assert row["adam_needed_now"] == "yes"


def test_a_model_that_gains_less_than_a_tenth_of_r_in_one_seed_is_not_trained(recipe) -> None:
    rows = rows_of(recipe, (1.0,) * 3, (0.5, 0.5, 1.7), (5.0,) * 3)
    row = gap("tiny", rows, recipe, **from_entropy(1.8))
    assert row["trained"] is False
    assert row["reference_loss"] == pytest.approx(1.8)
    assert row["gap_from_reference"] is row["adam_needed_now"] is None
    assert row["status"] == "ok"  # of the gap as it was


def test_without_r_the_columns_that_need_it_are_null(recipe: Recipe) -> None:
    row = gap("tiny", rows_of(recipe, (1.0,) * 3, (0.5,) * 3), recipe)
    assert {row[name] for name in ("target_entropy", *FROM_REFERENCE)} == {None}
