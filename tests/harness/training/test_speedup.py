from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from harness.registry.entry import SpeedupRecipe
from harness.training import speedup
from harness.training.speedup import Sample, Trial, crossing, pending

T = 100
RECIPE = SpeedupRecipe(num_steps=T, batch_size=8, sgd_lr=0.1, adamw_lr=1e-3)
INIT = 5.0
ENTROPY = 4.0


def row_of(trial: Trial, loss: float | None) -> dict:
    return {
        "model": "net",
        "optimizer": trial.optimizer,
        "num_steps": trial.num_steps,
        "lr": trial.lr,
        "seed": trial.seed,
        "init_loss": INIT,
        "reference_loss": min(INIT, ENTROPY),
        "final_loss": loss,
        "accuracy": None if loss is None else 1 / loss,
        "diverged": loss is None,
    }


def world(behind=0.0, slope=0.5, noise=0.001, best=0.1, floor=2.0):
    """Return the loss of a run: AdamW's floor, SGD `behind` it and falling by `slope` a doubling.

    A negative `behind` puts AdamW behind; rates off the best cost as their squared logarithm.
    """
    start = {"sgd": best, "adamw": 1e-3}

    def loss(trial: Trial) -> float:
        late = {"sgd": max(behind, 0), "adamw": max(-behind, 0)}[trial.optimizer]
        off = math.log10(trial.lr / start[trial.optimizer]) ** 2
        draw = np.random.default_rng([trial.seed, trial.num_steps, trial.optimizer == "sgd"])
        fallen = slope * math.log2(trial.num_steps / T)
        return floor + late - fallen + off + noise * draw.standard_normal()

    return loss


def run_all(loss, recipe=RECIPE) -> pd.DataFrame:
    """Do what is pending until nothing is."""
    rows: list[dict] = []
    frame = pd.DataFrame(columns=list(row_of(Trial("sgd", T, 1.0, 0), 1.0)))
    while todo := pending(frame, recipe):
        assert not {(t.optimizer, t.num_steps, t.lr, t.seed) for t in todo} & {
            (r["optimizer"], r["num_steps"], r["lr"], r["seed"]) for r in rows
        }
        rows += [row_of(trial, loss(trial)) for trial in todo]
        frame = pd.DataFrame(rows)
    return frame


def result(loss) -> dict:
    return speedup.speedup("net", run_all(loss), RECIPE)


def test_sgd_behind_by_0_4_nats_and_falling_by_half_a_nat_a_doubling_needs_2_to_the_0_8():
    found = result(world(behind=0.4, noise=0.02))
    assert found["log2_speedup"] == pytest.approx(0.8, abs=0.05)
    assert found["slower"] == "sgd"
    assert found["adam_needed"] == "yes"
    assert found["ci_low"] < 0.8 < found["ci_high"]
    assert found["longest"] == 2
    assert found["relative_gap"] == pytest.approx(0.2, abs=0.02)


def test_where_2t_is_not_enough_4t_is_run():
    found = result(world(behind=0.7))
    assert found["log2_speedup"] == pytest.approx(1.4, abs=0.01)
    assert found["longest"] == 4
    assert not found["censored"]


def test_beyond_4t_the_speedup_is_tied_at_the_top_and_has_no_upper_end():
    found = result(world(behind=1.5))
    assert found["log2_speedup"] == 2
    assert found["censored"]
    assert found["ci_high"] is None
    assert found["ci_low"] == pytest.approx(2, abs=0.2) or found["ci_low"] is None
    assert found["adam_needed"] == "yes"


def test_where_sgd_wins_the_roles_are_exchanged_and_y_is_negative():
    found = result(world(behind=-0.3))
    assert found["log2_speedup"] == pytest.approx(-0.6, abs=0.01)
    assert found["slower"] == "adamw"
    assert found["adam_needed"] == "no"
    assert found["ci_low"] < -0.6 < found["ci_high"] < 0.5


def test_level_optimizers_have_a_speedup_of_zero_with_an_interval():
    rows = run_all(world(behind=0.0))
    found = speedup.speedup("net", rows, RECIPE)
    assert found["log2_speedup"] == pytest.approx(0, abs=0.02)
    assert found["ci_low"] < 0.1
    assert found["adam_needed"] == "no"
    assert 2 * T in set(rows["num_steps"])  # a single length has no slope


def test_near_the_threshold_ten_seeds_are_run_at_both_lengths_that_enter():
    rows = run_all(world(behind=0.25, noise=0.05))
    assert set(rows.loc[(rows["num_steps"] == T), "seed"]) == {*range(11), *speedup.TUNING_SEEDS}
    assert set(rows.loc[(rows["num_steps"] == 2 * T), "seed"]) == set(range(11))
    found = speedup.speedup("net", rows, RECIPE)
    assert found["num_seeds"] == 10


def test_tuning_seeds_are_not_scored():
    rows = run_all(world(behind=0.4))
    is_tuning = rows["seed"].isin(speedup.TUNING_SEEDS)
    moved = rows.assign(final_loss=rows["final_loss"].where(~is_tuning, rows["final_loss"] + 0.1))
    one, other = (speedup.speedup("net", r, RECIPE)["log2_speedup"] for r in (rows, moved))
    assert one == other


def test_a_rate_that_is_best_on_the_first_seed_alone_is_not_chosen():
    plain = world(behind=0.4)

    def unstable(trial):
        is_too_much = trial.optimizer == "sgd" and trial.lr > 0.08 and trial.seed != 0
        return plain(trial) + (0.5 if is_too_much else 0.0)

    rows = run_all(unstable)
    found = speedup.speedup("net", rows, RECIPE)
    assert found["sgd_lr"] == pytest.approx(0.1 * 10**-0.25, rel=1e-4)
    at = rows[(rows["optimizer"] == "sgd") & (rows["num_steps"] == T) & (rows["seed"] == 12)]
    assert at["lr"].min() == pytest.approx(0.1 * 10**-0.5, rel=1e-4)  # a worse neighbour


def test_an_entry_whose_adamw_gains_less_than_a_tenth_of_r_does_not_count():
    rows = run_all(world(behind=0.1, floor=3.7))
    found = speedup.speedup("net", rows, RECIPE)
    assert found["trained"] is False
    assert found["status"] == "ok"
    assert found.get("log2_speedup") is None
    assert set(rows["num_steps"]) == {T}  # no longer runs


def test_a_diverged_seed_counts_as_r():
    loss = world(behind=0.4)

    def diverging(trial):
        alone = (trial.optimizer, trial.seed, trial.num_steps) == ("sgd", 2, T)
        return None if alone else loss(trial)

    found = result(diverging)
    sgd = [loss(Trial("sgd", T, 0.1, s)) for s in speedup.MORE_SEEDS[: found["num_seeds"]]]
    sgd[1] = 4.0
    assert found["sgd_loss"] == pytest.approx(np.mean(sgd))


def test_a_loss_without_a_best_rate_fails_with_the_reason():
    found = speedup.speedup("net", _endless(), RECIPE)
    assert found["status"] == "failed"
    assert "decades" in found["reason"]


def _endless() -> pd.DataFrame:
    rows = []
    for optimizer, start in (("sgd", 0.1), ("adamw", 1e-3)):
        for k in range(0, 40, 2):
            lr = float(f"{start * 10 ** (k / 4):.6g}")
            rows.append(row_of(Trial(optimizer, T, lr, 0), 3.0 - 0.01 * k))
    return pd.DataFrame(rows)


def test_an_entry_with_runs_to_do_is_pending():
    found = speedup.speedup("net", run_all(world())[:5], RECIPE)
    assert found["status"] == "pending"


def test_the_typical_entry_takes_what_the_protocol_forecasts():
    rows = run_all(world(behind=0.4))
    cost = (rows["num_steps"] / T).sum()
    assert 40 <= cost <= 75
    assert 40 <= (run_all(world(behind=0.7))["num_steps"] / T).sum() <= 75


def sample(mean: float, spread: float, count: int) -> Sample:
    values = np.linspace(-1, 1, count)
    return Sample(mean + spread * values / values.std(ddof=1))


def test_the_interval_is_that_of_welchs_test():
    ends, target = [sample(3.0, 0.1, 5), sample(2.0, 0.1, 3)], sample(2.6, 0.05, 5)
    found = crossing(ends, target)
    assert found.value == pytest.approx(0.4)
    for end, sign in ((found.low, 1), (found.high, -1)):
        a, b = (1 - end) ** 2 * 0.01 / 5, end**2 * 0.01 / 3
        c = 0.0025 / 5
        freedom = (a + b + c) ** 2 / (a**2 / 4 + b**2 / 2 + c**2 / 4)
        behind = (1 - end) * 3 + end * 2 - 2.6
        width = student.ppf(0.975, freedom) * math.sqrt(a + b + c)
        assert behind / width == pytest.approx(sign, abs=0.03)
    # By the delta method, at the value itself.
    assert found.error == pytest.approx(
        math.sqrt(0.36 * 0.002 + 0.16 * 0.01 / 3 + 0.0005), rel=1e-6
    )


def test_a_flat_curve_has_no_interval():
    found = crossing([sample(3.0, 0.1, 5), sample(3.0, 0.1, 3)], sample(3.0, 0.1, 5))
    assert math.isinf(found.error)
    assert math.isinf(found.high)
    assert math.isinf(found.low)


def test_repeated_draws_are_covered_by_the_interval():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        draws = [Sample(rng.normal(m, 0.1, n)) for m, n in ((3.0, 5), (2.0, 3), (2.6, 5))]
        found = crossing(draws[:2], draws[2])
        covered += found.low <= 0.4 <= found.high
    assert covered / 200 >= 0.90
