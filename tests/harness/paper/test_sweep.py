from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from harness import tasks
from harness.paper import page, result, sections, sweep
from harness.paper import sweep_readings as readings
from harness.registry import get
from harness.registry.entry import Recipe
from harness.registry.networks.mlp import MLP
from harness.training import climb
from harness.training.loop import make_optimizer

C = 8.0  # exact in float32, in which networks are built


@pytest.fixture(scope="module")
def small():
    """Return a scaled perceptron on digits that trains for ten steps, and its data."""
    recipe = Recipe(10, 32, (1e-4, 1e-1), (1e-4, 1e-1), schedule="constant", eval_size=64)
    entry = replace(
        get("mlp-mnist-c3"), task="digits", recipe=recipe, options={"widths": (12,), "scale": 3.0}
    )
    return entry, tasks.get("digits").load()


def run(k: int, test: float | None, loss: float | None, optimizer: str = "sgd", seed: int = 0):
    return {"optimizer": optimizer, "k": k, "seed": seed, "loss": loss, "train": test, "test": test}


def accuracies(runs) -> dict[str, float]:
    return {name: reading.choose(runs, "sgd")["accuracy"]
            for name, reading in readings.READINGS.items()}  # fmt: skip


def perceptron(scale: float, factory=MLP) -> MLP:
    torch.manual_seed(0)
    return factory(1, 4, 3, widths=(6, 5), scale=scale).double()


def test_without_biases_the_scale_is_a_temperature():
    x = torch.randn(8, 1, 4, 4, dtype=torch.float64)
    plain, scaled = perceptron(1.0), perceptron(C)
    for model in (plain, scaled):
        for layer in (*model.layers, model.head):
            torch.nn.init.zeros_(layer.bias)
    torch.testing.assert_close(scaled(x), C**3 * plain(x))


@pytest.mark.parametrize(("optimizer", "power"), [("sgd", 2), ("adamw", 1)])
def test_a_scale_of_the_initial_weights_is_that_of_outputs_at_another_rate(optimizer, power):
    recipe = Recipe(1, 1, (1e-4, 1e-1), (1e-4, 1e-1))
    x, y = torch.randn(8, 1, 4, 4, dtype=torch.float64), torch.arange(8) % 3
    logits = []
    for factory, rate in ((sweep.initially_scaled, 1e-3), (MLP, 1e-3 / C**power)):
        model = perceptron(C, factory)
        update = make_optimizer(model, recipe, optimizer, rate)
        for group in update.param_groups:
            group["eps"] = 1e-30  # of no weight, but not 0/0 at dead units
        for _ in range(5):
            update.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            update.step()
        logits.append(model(x).detach())
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-9, atol=1e-9)
    before = perceptron(C)(x).detach()
    assert (logits[0] - before).norm() > 0.01 * before.norm()


def test_variants_change_what_they_say(small):
    entry, data = small
    changes = [change for change, _ in sweep.VARIANTS.values()]
    images = tasks.get("digits").fixed(data, "train", 4)[0]
    plain = entry.build(data.model_options, 0)
    hidden, pixels = (change(entry).build(data.model_options, 0) for change in changes[:2])
    torch.testing.assert_close(hidden(images), plain(images) / 3)
    torch.testing.assert_close(pixels(images), plain(images * 0.3081 + 0.1307))
    cosine, still = (change(entry) for change in changes[2:4])
    assert cosine.recipe == replace(entry.recipe, schedule="cosine")
    momenta = {make_optimizer(plain, e.recipe, "sgd", 0.1).defaults["momentum"]
               for e in (entry, still)}  # fmt: skip
    assert momenta == {0.9, 0.0}


def test_the_climb_leaves_the_papers_grid_and_ends_inside(small):
    entry, data = small
    runs = sweep.explore(entry, data, [], (0, 2))
    assert {run["seed"] for run in runs} == {0, 2}
    for optimizer in ("sgd", "adamw"):
        for seed in (0, 2):
            mine = readings.of(runs, optimizer, seed)
            tuned = {r["k"] for r in mine}
            assert set(readings.GRID) <= tuned
            for score in (readings.accuracy_score, readings.loss_score):
                best = climb.best({r["k"]: score(r) for r in mine})
                assert {best - 4, best - 2, best, best + 2, best + 4} <= tuned
    assert sweep.explore(entry, data, runs, (0, 2)) == []  # what is known is not done again


def test_runs_of_the_release_are_read_as_new_ones_and_other_rates_left_out():
    shared = {"model": "m", "optimizer": "sgd", "seed": 0, "step": 9, "diverged": False}
    values = [("train", "loss", 0.5), ("train", "accuracy", 0.8), ("test", "accuracy", 0.7)]
    rows = [shared | {"lr": lr, "split": s, "metric": m, "value": v}
            for lr in (climb.rate(readings.START, -2), 2e-3) for s, m, v in values]  # fmt: skip
    diverged = {"split": "train", "metric": "loss", "value": 35.0, "diverged": True, "lr": 1e-3}
    assert sweep.ends(pd.DataFrame([*rows, shared | diverged])) == [
        run(-2, 0.7, 0.5) | {"train": 0.8},
        run(0, None, None),
    ]


def test_loss_chooses_the_dead_network_and_accuracy_the_one_that_is_right():
    runs = [run(-4, 0.9, 12.0), run(2, 0.11, 2.28), run(4, None, None)]
    found = {
        name: reading.choose(runs, "sgd")["accuracy"] for name, reading in readings.READINGS.items()
    }
    assert found["as released: chosen by training loss"] == 0.11
    assert found["chosen by test accuracy"] == 0.9


def test_rates_below_the_grid_count_where_they_are_free():
    runs = [run(-12, 0.85, 9.0), run(-4, None, None), run(4, None, None)]  # 1e-6, 1e-4, 1e-2
    found = {
        name: reading.choose(runs, "sgd")["accuracy"] for name, reading in readings.READINGS.items()
    }
    assert found["chosen by test accuracy"] == readings.CHANCE
    assert found["rates free, chosen by test accuracy"] == 0.85


@pytest.mark.parametrize(("sgd", "adamw", "fits"), [
    (0.1, 0.9, True),  # SGD falls, AdamW doesn't
    (0.1, 0.5, False),  # both fall
    (0.85, 0.9, False),  # neither does
])  # fmt: skip
def test_the_papers_words_fit_where_sgd_alone_falls(sgd, adamw, fits):
    runs = {c: [run(0, s, 0.1), run(0, a, 0.1, "adamw")]
            for c, s, a in ((1, 0.96, 0.96), (15, sgd, adamw))}  # fmt: skip
    reading = readings.READINGS["chosen by test accuracy"]
    assert readings.setting("name", reading, runs)["fits"] is fits
    assert readings.setting("name", reading, {15: runs[15]})["fits"] is None  # nothing falls


def test_the_study_is_drawn_from_what_was_measured_and_names_the_rest(tmp_path):
    assert sections.run("sweep", tmp_path, tmp_path).missing  # no page without a run
    assert not (tmp_path / "mlp-sweep.md").exists()
    for c in (1, 15):
        runs = [run(k, 0.9 - 0.01 * c, 0.3, o, s) for o in ("sgd", "adamw")
                for k in (-4, 0, 4) for s in (0, 1, 2, 3)]  # fmt: skip
        record = {name: [r[name] for r in runs] for name in runs[0]}
        result.write_json(tmp_path / "paper" / "sweep" / f"c{c}.json", record)
    found = sections.run("sweep", tmp_path, tmp_path)
    assert [row["c"] for row in found.values["rows"]] == [1, 15]
    assert [x["accuracy"] for x in found.values["rows"][1]["sgd"]["free"]] == [0.75] * 4
    assert found.values["rows"][1]["sgd"]["carried"] == [0.75] * 3
    assert "c7" in found.missing
    text = (tmp_path / "mlp-sweep.md").read_text()
    assert "| 15 | 75.0 | 75.0 | 1e-04 | 0.30 | 0.30 (75.0) |" in text
    assert "[mlp-sweep.md](mlp-sweep.md)" in page.render(tmp_path / "paper", sections.TITLES)
