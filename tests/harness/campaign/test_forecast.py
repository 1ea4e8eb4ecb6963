from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from harness import estimate_spectra
from harness.campaign.forecast import (
    DEVICES,
    Throughput,
    measured,
    named,
    outlook,
    throughput_of,
    total,
)
from harness.campaign.survey import survey
from harness.errors import UserError
from harness.estimator.cost import Forecast, cut
from harness.estimator.settings import Settings
from harness.registry.entry import SpeedupRecipe
from harness.training import load_problem
from tests.harness.campaign.test_run import do, tiny

SLOW = Throughput(products=1e9, training=2e9, memory=8e9, source="a test")


@pytest.fixture(scope="module")
def surveyed():
    return survey(tiny(), None)


@pytest.mark.parametrize("memory_budget", [None, 1_000_000])
def test_the_operations_are_those_of_a_real_spectrum(memory_budget):
    problem = load_problem(tiny(hessian_batch_size=64, full_stages=()))
    told = []
    cost = problem.forecast(
        Settings(num_probes=3, num_steps=4), lambda done, total: told.append((done, total))
    )
    num_blocks = len(problem.blocks("weights"))
    assert told == [(done, num_blocks) for done in range(1, num_blocks + 1)]
    with FlopCounterMode(display=False) as counter:
        estimate_spectra(
            problem.model, problem.loss_fn, problem.batches,
            blocks=problem.blocks("weights"), num_probes=3, num_steps=4,
            memory_budget=memory_budget,
        )  # fmt: skip
    kept = memory_budget is None
    assert kept == (cost.product_bytes <= (memory_budget or 1 << 40))
    forecast = cost.flops_within(memory_budget or 1 << 40)
    # On top come the passes that look for randomness, and those that size the graph.
    assert forecast == pytest.approx(counter.get_total_flops(), rel=0.3)
    assert kept or forecast > cost.flops


def test_hours_are_operations_over_throughput(surveyed):
    found = outlook(surveyed, SLOW)
    hours = (surveyed.spectra_flops / 1e9 + surveyed.training_flops / 2e9) / 3600
    assert found.hours == pytest.approx(hours)
    assert found.num_products == surveyed.num_products
    assert outlook(surveyed, replace(SLOW, products=5e8, training=1e9)).hours == pytest.approx(
        2 * hours
    )


def test_a_small_memory_makes_the_passes_dearer(surveyed):
    roomy, tight = outlook(surveyed, SLOW), outlook(surveyed, replace(SLOW, memory=1e5))
    assert tight.flops > roomy.flops
    assert tight.memory_bytes < roomy.memory_bytes


def test_the_disk_is_that_of_a_real_run(surveyed, tmp_path):
    entry = tiny(num_steps=60, num_probes=10)
    assert do(tmp_path, entry)[0] == {}
    kept = [*tmp_path.glob("spectra/*.parquet"), *tmp_path.glob("checkpoints/**/*.safetensors")]
    real = sum(path.stat().st_size for path in kept)
    # Blocks that turn out to be exact have one row.
    assert real <= outlook(survey(entry, None), SLOW).disk_bytes <= 1.5 * real


def test_a_measurement_divides_operations_by_the_clock(surveyed):
    ticks = itertools.count(0.0, 2.0)
    slow = measured(surveyed, None, "cpu", clock=lambda: next(ticks))
    ticks = itertools.count(0.0, 1.0)
    fast = measured(surveyed, None, "cpu", clock=lambda: next(ticks))
    assert fast.products == pytest.approx(2 * slow.products)
    assert fast.training == pytest.approx(2 * slow.training)
    assert 0 < fast.products < 1e12


def test_the_steps_of_trials_are_measured_and_their_state_is_counted():
    recipe = SpeedupRecipe(num_steps=20, batch_size=16, sgd_lr=0.1, adamw_lr=0.01, eval_size=64)
    entry = tiny(recipe=None, speedup=recipe, stages=("init",), full_stages=())
    alone = tiny(recipe=None, stages=("init",), full_stages=())
    found = survey(entry, None)
    rate = measured(found, None, "cpu")
    assert rate.training != rate.products
    assert outlook(found, SLOW).memory_bytes >= 16 * found.num_params
    kept = survey(replace(entry, stages=("init", "final")), None)
    spectra_alone = outlook(survey(alone, None), SLOW).disk_bytes
    assert outlook(found, SLOW).disk_bytes == spectra_alone
    assert outlook(kept, SLOW).disk_bytes == (2 * spectra_alone - 16_384 + 4 * found.num_params)


def test_a_device_that_is_not_here_has_its_data_sheet_or_a_given_throughput():
    assert named("h100", None).products < DEVICES["h100"][0]
    assert "assumed" in named("h100", None).source
    assert named("h100", 30.0).products == 30e12
    with pytest.raises(UserError, match=r"--throughput is -1\.0; it must be positive"):
        throughput_of(survey(tiny(), None), None, "h100", -1.0)


def test_the_whole_is_the_sum_and_the_most_memory(surveyed):
    one = outlook(surveyed, SLOW)
    both = total([one, replace(one, memory_bytes=1.0)])
    assert (both.hours, both.memory_bytes) == (2 * one.hours, one.memory_bytes)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_work_is_cut_into_parts_of_nearly_equal_cost(parts):
    costs = [3.0, 1.0, 1.0, 5.0, 2.0, 2.0, 0.0, 4.0]
    places = cut(costs, parts)
    assert places == sorted(places)
    loads = [sum(c for c, p in zip(costs, places, strict=True) if p == i) for i in range(parts)]
    assert max(loads) <= sum(costs) / parts + max(costs)


def test_the_cost_of_one_block_is_its_products_times_its_operations():
    cost = Forecast(7, 0, 0, 0, (3, 5), block_names=("a", "b"), block_products=(1, 6))
    assert cost.spectrum_flops == [3, 30]


def test_the_command_forecasts_for_a_device_that_is_not_here_and_writes_nothing(
    tmp_path: Path, monkeypatch
):
    from click.testing import CliRunner

    from harness.cli import main

    monkeypatch.chdir(tmp_path)
    arguments = ["run", "cnn-digits", "--device", "h100", "--throughput", "20"]
    done = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "device-hours" in done.output
    assert "on one h100; throughput given: 20 TFLOP/s" in done.output
    assert not list(tmp_path.iterdir())
    undone = CliRunner().invoke(main, ["run", "cnn-digits"])
    assert undone.exit_code == 2
    assert "Missing option '--out'" in undone.output
