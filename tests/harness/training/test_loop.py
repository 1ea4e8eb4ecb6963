from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from harness import tasks
from harness.errors import UserError
from harness.registry.entry import ModelEntry, Recipe
from harness.tasks.base import Data
from harness.training import train
from harness.training.gap import gap
from harness.training.loop import evaluate, make_optimizer
from harness.training.schedule import learning_rate
from spectra_db.schema import TABLES

MakeEntry = Callable[..., ModelEntry]


@pytest.fixture(scope="module")
def digits() -> Data:
    return tasks.get("digits").load()


def test_the_schedule_warms_up_linearly_and_ends_at_a_tenth() -> None:
    shape = {"peak": 3.0, "warmup_steps": 4, "num_steps": 24}
    rates = [learning_rate(step, **shape) for step in range(25)]
    assert rates[:4] == pytest.approx([0.6, 1.2, 1.8, 2.4])
    assert rates[4] == 3.0
    assert rates[14] == pytest.approx(3.0 * 0.55)  # halfway down the cosine
    assert rates[24] == pytest.approx(0.3)
    assert all(a > b for a, b in pairwise(rates[4:]))


def test_the_constant_schedule_stays_at_its_peak() -> None:
    rates = {
        learning_rate(step, peak=0.5, warmup_steps=0, num_steps=9, schedule="constant")
        for step in range(9)
    }
    assert rates == {0.5}
    with pytest.raises(ValueError, match="choose cosine or constant"):
        learning_rate(3, peak=1, warmup_steps=0, num_steps=9, schedule="step")


def test_sgd_takes_momentum_steps_and_decays_matrices_alone(recipe: Recipe) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    recipe = dataclasses.replace(recipe, weight_decay=0.1)
    update = make_optimizer(model, recipe, "sgd", 0.2)
    weight, bias = (p.detach().clone() for p in (model.weight, model.bias))
    velocity_w, velocity_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for step in range(4):
        x = torch.randn(5, 3, dtype=torch.float64)
        model(x).square().mean().backward()
        residual = 2 * (x @ weight.T + bias) / 10
        velocity_w = 0.9 * velocity_w + residual.T @ x + 0.1 * weight
        velocity_b = 0.9 * velocity_b + residual.sum(0)
        weight, bias = weight - 0.2 * velocity_w, bias - 0.2 * velocity_b
        update.step()
        update.zero_grad()
        assert torch.allclose(model.weight, weight, rtol=1e-12), step
        assert torch.allclose(model.bias, bias, rtol=1e-12), step


def test_adamw_moves_by_the_rate_at_first_and_decouples_its_decay(recipe: Recipe) -> None:
    model = nn.Linear(2, 1, bias=False).double()
    recipe = dataclasses.replace(recipe, weight_decay=0.5)
    before = model.weight.detach().clone()
    update = make_optimizer(model, recipe, "adamw", 0.01)
    model.weight.grad = torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    update.step()
    # The first step's corrected moments are g and g^2, so it is lr sign(g).
    expected = before * (1 - 0.01 * 0.5) - 0.01 * torch.tensor([[1.0, -1.0]])
    assert torch.allclose(model.weight, expected, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_seed_decides_a_run_bit_for_bit_dropout_included(
    optimizer: str, make_entry: MakeEntry, digits: Data
) -> None:
    entry = make_entry("linear")
    first = train(entry, digits, optimizer=optimizer, lr=0.01, seed=3)
    torch.manual_seed(99)
    again = train(entry, digits, optimizer=optimizer, lr=0.01, seed=3)
    other = train(entry, digits, optimizer=optimizer, lr=0.01, seed=4)
    assert first.rows == again.rows
    assert first.final_loss != other.final_loss


def test_training_leaves_the_global_generator_alone(make_entry: MakeEntry, digits: Data) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train(make_entry("linear"), digits, optimizer="sgd", lr=0.01, seed=0)
    assert torch.rand(1) == expected


def test_both_optimizers_start_from_one_loss_and_lower_it(
    make_entry: MakeEntry, digits: Data
) -> None:
    entry = make_entry()
    sgd = train(entry, digits, optimizer="sgd", lr=0.1, seed=1)
    adamw = train(entry, digits, optimizer="adamw", lr=0.01, seed=1)
    assert sgd.init_loss == adamw.init_loss
    assert max(sgd.final_loss, adamw.final_loss) < 0.5 * sgd.init_loss
    assert not sgd.diverged
    assert adamw.final_score > 0.5


def test_rows_hold_the_curve_the_fixed_subset_and_the_test_split(
    make_entry: MakeEntry, digits: Data
) -> None:
    run = train(make_entry(), digits, optimizer="sgd", lr=0.1, seed=2)
    rows = pd.DataFrame(run.rows)
    assert set(rows["seed"]) == {2}
    curve = rows[rows["split"] == "batch"]
    assert curve["step"].tolist() == list(range(20))
    ends = rows[(rows["split"] == "train") & (rows["metric"] == "loss")]
    assert ends["step"].tolist() == [0, 20]
    assert ends["value"].tolist() == [run.init_loss, run.final_loss]
    test = rows[rows["split"] == "test"]
    assert sorted(test["metric"]) == ["accuracy", "loss"]
    assert set(test["step"]) == {20}
    keys = ["model", "optimizer", "lr", "seed", "step", "split", "metric"]
    assert not rows.duplicated(keys).any()


@pytest.mark.parametrize("lr", [1e4, 1e30])
def test_a_diverged_run_is_flagged_and_counts_as_its_initial_loss(
    lr: float, make_entry: MakeEntry, digits: Data, tmp_path: Path
) -> None:
    run = train(make_entry(), digits, optimizer="adamw", lr=lr, seed=1, checkpoint_dir=tmp_path)
    rows = pd.DataFrame(run.rows)
    assert run.diverged
    assert rows["diverged"].all()
    assert run.final_loss == run.init_loss
    assert rows["value"].map(math.isfinite).all()
    final = rows[(rows["split"] == "train") & (rows["metric"] == "loss") & (rows["step"] > 0)]
    assert final["value"].tolist() == [run.init_loss]


def test_a_run_that_turns_to_nan_stops_early(
    make_entry: MakeEntry, digits: Data, recipe: Recipe
) -> None:
    entry = make_entry(recipe=dataclasses.replace(recipe, warmup_steps=0))
    run = train(entry, digits, optimizer="sgd", lr=1e20, seed=1)
    assert run.diverged
    assert max(row["step"] for row in run.rows) < 20


def test_clipping_bounds_the_first_step(
    make_entry: MakeEntry, digits: Data, recipe: Recipe
) -> None:
    one = dataclasses.replace(recipe, num_steps=1, warmup_steps=0, clip=1e-3)
    entry = make_entry(recipe=one)
    run = train(entry, digits, optimizer="sgd", lr=1.0, seed=1)
    free = train(
        make_entry(recipe=dataclasses.replace(one, clip=None)),
        digits,
        optimizer="sgd",
        lr=1.0,
        seed=1,
    )
    assert abs(run.final_loss - run.init_loss) < 0.1 * abs(free.final_loss - free.init_loss)


def test_rows_have_the_columns_of_their_tables(
    make_entry: MakeEntry, digits: Data, tmp_path: Path
) -> None:
    entry = make_entry()
    run = train(entry, digits, optimizer="adamw", lr=0.01, seed=1, checkpoint_dir=tmp_path)
    assert all(set(row) == set(TABLES["training"].names) for row in run.rows)
    assert all(set(row) == set(TABLES["stages"].names) for row in run.stage_rows)
    accuracies = [
        row["value"] for row in run.rows if (row["split"], row["metric"]) == ("test", "accuracy")
    ]
    assert run.stage_rows[-1]["metric"] == accuracies[-1]
    row = gap("tiny", pd.DataFrame(run.rows), entry.recipe)
    assert set(row) == set(TABLES["gaps"].names)


def test_progress_is_reported_after_every_step(make_entry: MakeEntry, digits: Data) -> None:
    seen: list[tuple[int, int]] = []
    train(
        make_entry(),
        digits,
        optimizer="sgd",
        lr=0.1,
        seed=1,
        on_step=lambda step, total: seen.append((step, total)),
    )
    assert seen == [(step, 20) for step in range(1, 21)]


def test_evaluation_does_not_depend_on_its_chunks(digits: Data) -> None:
    task = tasks.get("digits")
    batch = task.fixed(digits, "train", 100)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5))
    whole, ragged = evaluate(task, model, batch, 100), evaluate(task, model, batch, 33)
    assert whole == pytest.approx(ragged, rel=1e-6)


def test_a_language_run_has_no_accuracy(make_entry: MakeEntry) -> None:
    entry = make_entry("TiedLanguageModel", "pydoc")
    data = tasks.get("pydoc").load()
    run = train(entry, data, optimizer="adamw", lr=0.01, seed=1)
    assert run.final_score is None
    assert {row["metric"] for row in run.rows} == {"loss"}
    assert run.final_loss < run.init_loss


def test_mistakes_are_named(make_entry: MakeEntry, digits: Data) -> None:
    with pytest.raises(UserError, match="no training recipe"):
        train(make_entry(recipe=None, stages=("init",)), digits, optimizer="sgd", lr=1.0, seed=0)
    with pytest.raises(UserError, match="unknown optimizer 'adam'; choose one of sgd, adamw"):
        train(make_entry(), digits, optimizer="adam", lr=1.0, seed=0)
