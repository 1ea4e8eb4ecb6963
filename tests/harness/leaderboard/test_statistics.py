from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from harness.errors import UserError
from harness.leaderboard.resampling import left_out_accuracy
from harness.leaderboard.statistics import _between, _correlations, leaderboard, measurements
from spectra_db import store
from tests.harness.leaderboard.tables import frame, gap_row, made_up, metric_row, model_row

FAMILIES = ["a", "a", "a", "b", "b", "c", "d", "d", "e", "f", "f", "f"]
N = len(FAMILIES)


def some_data(seed: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return a metric and gaps that hang together, with a tie each, and numbers of parameters."""
    generator = np.random.default_rng(seed)
    x = generator.lognormal(size=N)
    gap = 0.1 * np.log(x) + 0.1 * generator.normal(size=N) + 0.1
    x[3], gap[5] = x[4], gap[6]
    return x, gap, [int(s) for s in generator.integers(10**3, 10**6, N)]


def statistic(board: pd.DataFrame, name: str, metric: str = "js0", **where: object) -> pd.Series:
    rows = board[(board["statistic"] == name) & (board["metric"] == metric)]
    for column, value in ({"left_out": "", "stage": "init"} | where).items():
        rows = rows[rows[column] == value]
    [row] = [row for _, row in rows.iterrows()]
    return row


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_those_of_scipy_and_sklearn(seed):
    x, gap, sizes = some_data(seed)
    board = leaderboard(*made_up({"js0": x}, gap, FAMILIES, sizes), num_draws=10)
    expected = {
        "spearman": stats.spearmanr(x, gap).statistic,
        "kendall": stats.kendalltau(x, gap).statistic,
        "pearson_log": stats.pearsonr(np.log10(x), gap).statistic,
        "auc": roc_auc_score(gap > 0.1, x),
    }
    for name, value in expected.items():
        assert statistic(board, name)["value"] == pytest.approx(value, abs=1e-6), name


def test_a_model_drawn_twice_counts_as_two_models():
    x, gap, sizes = some_data(0)
    weights = np.array([0, 2, 1, 3, 1, 1, 1, 0, 2, 1, 1, 1])
    log_size = np.log10(sizes)
    needed = (gap > 0.1).astype(float)
    found = _correlations(x[None], gap[None], log_size, needed[None], weights[None].astype(float))
    x2, gap2, size2, needed2 = (np.repeat(a, weights) for a in (x, gap, log_size, needed))
    rank = stats.rankdata
    residuals = []
    for ranks in (rank(x2), rank(gap2)):
        slope, intercept = np.polyfit(rank(size2), ranks, 1)
        residuals.append(ranks - slope * rank(size2) - intercept)
    assert found["spearman"][0] == pytest.approx(stats.spearmanr(x2, gap2).statistic, abs=1e-6)
    assert found["kendall"][0] == pytest.approx(stats.kendalltau(x2, gap2).statistic, abs=1e-6)
    assert found["auc"][0] == pytest.approx(roc_auc_score(needed2, x2), abs=1e-6)
    # The partial correlation is that of what is left of both after the regression on size.
    partial = stats.pearsonr(*residuals).statistic
    assert found["partial_spearman"][0] == pytest.approx(partial, abs=1e-6)


def test_between_families_each_family_counts_once_however_many_members_it_has():
    x, gap, _ = some_data(1)
    codes, names = pd.factorize(pd.Series(FAMILIES))
    found = _between(x[None], gap[None], codes, len(names), np.ones((1, N)))
    means = pd.DataFrame({"x": x, "y": gap, "f": FAMILIES}).groupby("f").mean()
    assert found[0] == pytest.approx(stats.spearmanr(means["x"], means["y"]).statistic, abs=1e-6)
    twice = np.where(codes == 0, 2.0, 1.0)[None]
    found = _between(x[None], gap[None], codes, len(names), twice)
    again = pd.concat([means, means.loc[["a"]]])
    assert found[0] == pytest.approx(stats.spearmanr(again["x"], again["y"]).statistic, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_for_a_family_is_set_on_the_others_alone(seed):
    x, gap, _ = some_data(seed)
    needed = (gap > 0.1).astype(float)
    codes, names = pd.factorize(pd.Series(FAMILIES))
    accuracy, majority = left_out_accuracy(x[None], needed[None], codes, np.ones((1, N)))
    right = of_majority = 0
    for family in range(len(names)):
        train, test = codes != family, codes == family
        every = np.sort(x[train])
        widths = [0, *(np.diff(every) / np.diff(every).max()), 0]
        middles = [-np.inf, *((every[1:] + every[:-1]) / 2), np.inf]

        def score(i, train=train, middles=middles, widths=widths):
            return ((x[train] >= middles[i]) != needed[train]).sum() - widths[i] / 2

        free = [i for i, width in enumerate(widths) if width > 0 or i in (0, len(every))]
        best = middles[min(free, key=score)]
        right += ((x[test] >= best) == needed[test]).sum()
        of_majority += ((needed[train].mean() > 0.5) == needed[test]).sum()
    assert accuracy[0] == pytest.approx(right / N)
    assert majority[0] == pytest.approx(of_majority / N)


def test_a_metric_that_orders_the_gaps_predicts_them_and_its_opposite_fails():
    gap = np.r_[np.linspace(0, 0.05, N // 2), np.linspace(0.2, 0.3, N // 2)]
    families = [f"f{i // 2}" for i in range(N)]
    tables = made_up({"js0": np.exp(gap), "w1": np.exp(-gap)}, gap, families, errors=1e-4)
    board = leaderboard(*tables, num_draws=200)
    best = statistic(board, "spearman")
    assert best["value"] == 1
    assert best["ci_low"] > 0.95
    assert statistic(board, "auc")["value"] == 1
    assert statistic(board, "accuracy")["value"] == 1
    assert statistic(board, "spearman", "w1")["ci_high"] < -0.95
    assert statistic(board, "auc", "w1")["value"] == 0
    assert statistic(board, "advantage", "w1")["value"] == pytest.approx(0, abs=1e-9)
    assert best["num_models"] == N
    assert best["num_families"] == N / 2


def test_without_a_family_the_correlation_is_that_of_the_other_models():
    x, gap, sizes = some_data(2)
    board = leaderboard(*made_up({"js0": x}, gap, FAMILIES, sizes), num_draws=10)
    for family in set(FAMILIES):
        kept = np.array(FAMILIES) != family
        row = statistic(board, "spearman", left_out=family)
        assert row["value"] == pytest.approx(stats.spearmanr(x[kept], gap[kept])[0], abs=1e-6)
        assert (row["num_models"], row["num_families"]) == (kept.sum(), 5)


def test_members_of_a_family_are_drawn_together():
    # One model copied is not new evidence: the interval is as wide with 4 copies of each.
    x, gap, _ = some_data(3)
    alone = [f"f{i}" for i in range(N)]
    one = statistic(leaderboard(*made_up({"js0": x}, gap, alone)), "spearman")
    copies = made_up({"js0": np.repeat(x, 4)}, np.repeat(gap, 4), list(np.repeat(alone, 4)))
    four = statistic(leaderboard(*copies), "spearman")
    assert four["value"] == pytest.approx(one["value"], abs=1e-6)
    width = one["ci_high"] - one["ci_low"]
    assert four["ci_high"] - four["ci_low"] == pytest.approx(width, rel=0.2)
    unrelated = made_up(
        {"js0": np.repeat(x, 4)}, np.repeat(gap, 4), [f"g{i}" for i in range(4 * N)]
    )
    narrow = statistic(leaderboard(*unrelated), "spearman")
    assert narrow["ci_high"] - narrow["ci_low"] < 0.7 * width


def test_intervals_carry_the_error_of_the_measurements():
    x, gap, _ = some_data(4)
    widths = []
    for errors in (0.0, 0.2):
        row = statistic(leaderboard(*made_up({"js0": x}, gap, FAMILIES, errors=errors)), "kendall")
        widths.append(row["ci_high"] - row["ci_low"])
    assert widths[1] > 1.2 * widths[0]


def test_the_interval_of_two_unrelated_quantities_holds_zero_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    families = [f"f{i // 2}" for i in range(24)]
    holds = []
    for _ in range(40):
        x = np.repeat(generator.normal(size=12), 2) + 0.3 * generator.normal(size=24)
        y = np.repeat(generator.normal(size=12), 2) + 0.3 * generator.normal(size=24)
        tables = made_up({"js0": np.exp(x)}, y, families)
        row = statistic(leaderboard(*tables, num_draws=200), "spearman")
        holds.append(row["ci_low"] <= 0 <= row["ci_high"])
    assert 0.8 <= np.mean(holds) <= 1.0


def test_one_family_has_a_value_and_no_interval_and_three_models_have_neither():
    x, gap, _ = some_data(0)
    row = statistic(leaderboard(*made_up({"js0": x}, gap, ["a"] * N)), "spearman")
    assert np.isfinite(row["value"])
    assert np.isnan([row["ci_low"], row["ci_high"]]).all()
    row = statistic(leaderboard(*made_up({"js0": x[:3]}, gap[:3], ["a", "b", "c"])), "spearman")
    assert np.isnan(row["value"])
    assert row["num_models"] == 3


def test_demo_models_and_failed_gaps_do_not_enter():
    x, gap, _ = some_data(0)
    models, metrics, gaps = made_up({"js0": x}, gap, FAMILIES)
    models.loc[0, "tier"] = "demo"
    gaps.loc[1, ["status", "reason", "gap"]] = ["failed", "undefined", None]
    joined = measurements(models, metrics, gaps.drop(index=2))
    assert joined.set_index("model")["enters"].to_dict() == {f"m{i}": i > 2 for i in range(N)}
    board = leaderboard(models, metrics, gaps.drop(index=2), num_draws=10)
    row = statistic(board, "spearman")
    assert row["num_models"] == N - 3
    assert row["value"] == pytest.approx(stats.spearmanr(x[3:], gap[3:]).statistic, abs=1e-6)


def test_a_metric_that_doubles_in_training_has_a_ratio_of_two():
    x, gap, _ = some_data(0)
    models, metrics, gaps = made_up({"js0": x}, gap, FAMILIES)
    later = metrics.assign(stage="final", corrected=2 * metrics["corrected"])
    board = leaderboard(models, pd.concat([metrics, later]), gaps, num_draws=50)
    row = statistic(board, "ratio_to_init", stage="final")
    assert [row["value"], row["ci_low"], row["ci_high"]] == pytest.approx([2, 2, 2])
    assert statistic(board, "fraction_rising", stage="final")["value"] == 1
    assert not len(board[(board["stage"] == "init") & (board["statistic"] == "ratio_to_init")])


def test_a_metric_that_some_models_lack_is_that_of_the_others():
    x, gap, _ = some_data(1)
    models, metrics, gaps = made_up({"js0": x, "w1": x}, gap, FAMILIES)
    metrics = metrics[~((metrics["metric"] == "w1") & metrics["model"].isin(["m0", "m7"]))]
    kept = [i for i in range(N) if i not in (0, 7)]
    row = statistic(leaderboard(models, metrics, gaps, num_draws=10), "spearman", "w1")
    assert row["value"] == pytest.approx(stats.spearmanr(x[kept], gap[kept])[0], abs=1e-6)
    assert row["num_models"] == N - 2


def test_the_plug_in_stands_where_there_is_no_positive_correction():
    rows = [metric_row("m", "js0", 0.3, corrected=None, standard_error=None)]
    rows.append(metric_row("m", "w1", 0.2, corrected=-0.01))
    tables = frame("models", [model_row("m")]), frame("heterogeneity", rows)
    joined = measurements(*tables, frame("gaps", [gap_row("m", 0.1)])).set_index("metric")
    assert joined["estimate"].to_dict() == {"js0": 0.3, "w1": 0.2}
    assert joined.loc["js0", "standard_error"] == 0


def test_the_same_tables_give_the_same_board_in_any_order(tmp_path):
    x, gap, sizes = some_data(0)
    models, metrics, gaps = made_up({"js0": x, "w1": 1 / x}, gap, FAMILIES, sizes, errors=0.01)
    board = leaderboard(models, metrics, gaps, num_draws=20)
    store.write(tmp_path, "leaderboard", board)
    again = leaderboard(models.iloc[::-1], metrics.iloc[::-1], gaps.iloc[::-1], num_draws=20)
    pd.testing.assert_frame_equal(board, again)


def test_tables_of_several_protocols_are_refused():
    models, metrics, gaps = made_up({"js0": np.ones(4)}, np.ones(4), list("abcd"))
    gaps.loc[2, "protocol_version"] = 2
    with pytest.raises(UserError, match=r"protocol versions \[1, 2\].*reads 1 alone"):
        leaderboard(models, metrics, gaps)


def test_metrics_of_several_protocols_are_refused_with_the_command_that_makes_them_one():
    models, metrics, gaps = made_up({"js0": np.ones(4)}, np.ones(4), list("abcd"))
    metrics.loc[2, "protocol_version"] = 2
    with pytest.raises(UserError, match=r"of several protocol versions.*dataset derive"):
        leaderboard(models, metrics, gaps)


def test_a_change_in_training_is_of_the_models_that_have_both_ends():
    x, gap, _ = some_data(0)
    models, metrics, gaps = made_up({"js0": x, "w1": x}, gap, FAMILIES)
    later = metrics.assign(stage="final", corrected=2 * metrics["corrected"])
    start = metrics[
        (metrics["metric"] == "js0") & metrics["model"].isin([f"m{i}" for i in range(5)])
    ]
    board = leaderboard(models, pd.concat([start, later]), gaps, num_draws=50)
    row = statistic(board, "ratio_to_init", stage="final")
    assert (row["num_models"], row["num_families"]) == (5, 2)
    # Draws that lack both families say nothing, rather than that nothing changes.
    assert [row["value"], row["ci_low"], row["ci_high"]] == pytest.approx([2, 2, 2])
    assert statistic(board, "spearman", stage="final")["num_models"] == N
    row = statistic(board, "ratio_to_init", "w1", stage="final")
    assert row["num_models"] == 0
    assert np.isnan(row["value"])


def test_one_family_has_no_other_one_to_set_a_threshold_on():
    x, gap, _ = some_data(0)
    board = leaderboard(*made_up({"js0": x}, gap, ["a"] * N), num_draws=10)
    assert np.isnan(statistic(board, "accuracy")["value"])
    assert np.isnan(statistic(board, "accuracy_majority")["value"])


def test_metrics_over_other_blocks_do_not_enter():
    x, gap, _ = some_data(0)
    models, metrics, gaps = made_up({"js0": x}, gap, FAMILIES)
    metrics.loc[metrics["model"] == "m3", "partition"] = "all"
    joined = measurements(models, metrics, gaps).set_index("model")
    assert joined.index[~joined["enters"]].tolist() == ["m3"]


def test_attention_and_size_stand_beside_the_measures_at_initialisation_alone():
    x, gap, sizes = some_data(3)
    models, metrics, gaps = made_up({"js0": x}, gap, FAMILIES, sizes)
    has = np.array([i % 3 == 0 for i in range(N)])
    later = metrics.assign(stage="final")
    models = models.assign(has_attention=has)
    board = leaderboard(models, pd.concat([metrics, later]), gaps, num_draws=50)
    for metric, value in (("has_attention", has), ("num_params", sizes)):
        row = statistic(board, "spearman", metric)
        assert row["value"] == pytest.approx(stats.spearmanr(value, gap).statistic, abs=1e-6)
        assert (row["num_models"], row["num_products"], row["scale"]) == (N, 0, "none")
        assert statistic(board, "auc", metric)["value"] == pytest.approx(
            roc_auc_score(gap > 0.1, value)
        )
        js0 = statistic(board, "spearman")["value"]
        assert statistic(board, "advantage", metric)["value"] == pytest.approx(
            abs(row["value"]) - abs(js0)
        )
    assert set(board.loc[board["stage"] == "final", "metric"]) == {"js0"}
    # Given size, size says nothing.
    assert np.isnan(statistic(board, "partial_spearman", "num_params")["value"])
    without = leaderboard(*made_up({"js0": x}, gap, FAMILIES, sizes), num_draws=50)
    assert set(without["metric"]) == {"js0", "num_params"}
    kept = board[(board["metric"] == "js0") & (board["stage"] == "init")]
    ours = without[without["metric"] == "js0"]
    np.testing.assert_array_equal(kept["value"].to_numpy(), ours["value"].to_numpy())
