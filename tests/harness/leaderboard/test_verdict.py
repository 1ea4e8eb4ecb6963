from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harness.errors import UserError
from harness.leaderboard.evidence import Design, Pair, checked, compare_pairs, error_of, measures
from harness.leaderboard.verdict import (
    NOTHING,
    REFUTES,
    SUPPORTS,
    UNDECIDED,
    Gate,
    Rule,
    Verdict,
    verdict,
)

PASSED = Gate()
N = 18
NAMES = [f"e{i:02d}" for i in range(N)]
Y = np.linspace(-1.0, 1.9, N)
RIVALS = {"density": 1, "noise_scale": -1}
# 16 pairs of entries far apart in y.
PAIRS = [Pair(f"p{i}", NAMES[i], NAMES[(i + 7) % N]) for i in range(16)]
# Orders of J: by y; without relation to y; ρ = 0.35, between the bounds.
ALIKE = np.arange(N) + np.where(np.arange(N) % 2, -1, 1)
UNLIKE = np.r_[N - np.arange(N // 2), np.arange(N // 2)]
BETWEEN = np.array([7, 2, 14, 4, 8, 0, 12, 6, 1, 17, 3, 10, 16, 15, 5, 13, 9, 11])


def table(j: object = ALIKE, **changes: object) -> pd.DataFrame:
    y = np.asarray(changes.get("y", Y))
    rows = pd.DataFrame(
        {
            "model": NAMES, "family": [f"f{i % 6}" for i in range(N)],
            "modality": ["images"] * 10 + ["text"] * 8, "y": y, "y_error": 0.05,
            "censored": False, "y_prime": y / 2, "trained": True, "at_edge": False,
            "adam_needed": np.where(y > 0.7, "yes", np.where(y < 0.3, "no", "unclear")),
            "has_attention": [i % 3 == 0 for i in range(N)], "log_params": np.arange(N) % 5,
            "log_classes": np.arange(N) % 4, "J": j, "J_error": 0.1,
            "density": (7 * np.arange(N)) % N, "noise_scale": -Y,
        }
    )  # fmt: skip
    return rows.assign(**changes)


@cache
def of_kind(kind: str) -> Verdict:
    j = {"alike": ALIKE, "unlike": UNLIKE, "between": BETWEEN}[kind]
    return verdict(table(j), RIVALS, PAIRS, PASSED)


def cell(found: pd.DataFrame, measure: str, column: str) -> object:
    return found.loc[found["measure"] == measure, column].item()


def prepared(rows: pd.DataFrame, pairs: list[Pair] = PAIRS) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = checked(rows, RIVALS, pairs)
    return rows, compare_pairs(rows, pairs)


def test_an_order_like_that_of_y_is_supported():
    found = of_kind("alike")
    assert found.answer == SUPPORTS
    assert found.sentence.startswith("Supported: JS⁰")


def test_an_order_without_relation_to_y_is_refuted():
    found = of_kind("unlike")
    assert found.answer == REFUTES
    assert "below 0.25" in found.sentence


def test_a_correlation_between_the_bounds_is_undecided_and_the_sentence_says_what_it_lacks():
    found = of_kind("between")
    assert 0.25 < cell(found.measures, "J", "rho") < 0.40
    assert found.answer == UNDECIDED
    assert "lacks ρ above 0.40" in found.sentence


@pytest.mark.parametrize("kind", ["alike", "unlike", "between"])
def test_the_sentence_has_the_numbers_of_the_table(kind):
    found = of_kind(kind)
    j = found.measures.iloc[0]
    assert f"ρ = {j['rho']:.2f} over 18 entries" in found.sentence
    assert f"{j['right_pairs']} of {j['decided_pairs']} decided pairs" in found.sentence
    assert found.sentence.count(".") > 1
    assert found.sentence.endswith(".")
    expected = stats.spearmanr(table({"alike": ALIKE, "unlike": UNLIKE}.get(kind, BETWEEN))["J"], Y)
    assert j["rho"] == pytest.approx(expected.statistic)


def test_the_lines_give_the_power_at_the_n_that_is_there():
    found = of_kind("alike")
    [true, none] = found.chances.to_dict("records")
    assert true["primary"] == pytest.approx(0.84, abs=0.01)
    assert none["primary"] == pytest.approx(0.05, abs=0.005)
    assert true["supports"] < true["primary"]  # the pairs must agree as well
    assert any(f"Power at n = 18, were the true ρ 0.6: ρ > 0.40 with a chance of "
               f"{true['primary']:.2f}" in line for line in found.lines)  # fmt: skip


def test_a_failed_gate_ranks_nothing_and_gives_no_number():
    found = verdict(table(), RIVALS, PAIRS, Gate(("y of resnet8 is 0.9, above 0.5",)))
    assert found.answer == NOTHING
    assert found.sentence == (
        "Nothing is ranked: the gate does not hold (y of resnet8 is 0.9, above 0.5)."
    )
    assert found.measures.empty
    assert "ρ" not in "".join(found.lines)


def test_fewer_than_16_entries_with_j_rank_nothing():
    few = table(trained=np.arange(N) >= 2).assign(J=np.r_[ALIKE[:-1], np.nan])
    found = verdict(few, RIVALS, PAIRS, PASSED)
    assert found.answer == NOTHING
    assert "15 entries count and have J, where 16 are needed" in found.sentence
    assert found.lines[-2:] == ("Not trained: e00, e01.", "Without J: e17.")


def test_of_one_entry_nothing_is_said_to_be_the_same():
    found = verdict(table().iloc[:1], RIVALS, [], PASSED)
    assert found.sentence == "Nothing is ranked: 1 entry counts and has J, where 16 are needed."


def test_a_best_rate_at_an_edge_ranks_nothing_and_is_named():
    found = verdict(table(at_edge=np.arange(N) == 3), RIVALS, PAIRS, PASSED)
    assert (found.answer, found.sentence) == (
        NOTHING, "Nothing is ranked: a best learning rate is at an edge (e03).",
    )  # fmt: skip


def test_a_j_or_a_y_that_is_the_same_everywhere_ranks_nothing():
    found = verdict(table(1.0, y=np.full(N, 2.0), censored=True), RIVALS, PAIRS, PASSED)
    assert found.sentence == "Nothing is ranked: all entries have the same y and the same J."


def test_at_another_n_the_bounds_are_computed_and_what_did_not_learn_may_lack_everything():
    first = np.arange(N) == 0
    untrained = {"trained": ~first, "censored": np.where(first, None, False)}
    rows = table(ALIKE.astype(float), **untrained)
    rows.loc[0, ["y", "y_error", "y_prime", "J"]] = np.nan
    found = verdict(rows, {}, PAIRS, PASSED)
    assert found.answer == SUPPORTS
    assert found.lines[-1] == "Not trained: e00."
    assert found.pairs["why"].str.startswith("not trained: e00").sum() == 2
    # The critical value at n = 17 is 0.412, the 5 % quantile under a true ρ of 0.6 is 0.24.
    rows = rows.iloc[1:]
    rule = Rule.of(rows["J"].to_numpy(), Design.of(rows, found.pairs))
    assert rule.above == pytest.approx(0.412, abs=0.006)
    assert rule.below == pytest.approx(0.24, abs=0.02)
    assert f"ρ > {rule.above:.3f} (p < 0.05, computed at n = 17)" in found.lines[0]


def test_a_correlation_that_attention_explains_is_not_support():
    # Those with attention have the larger J and y; among each kind the order is reversed.
    attention = np.arange(N) >= 9
    reversed_within = np.r_[np.arange(9)[::-1], 9 + np.arange(9)[::-1]]
    pairs = [Pair(f"p{i}", NAMES[i % 9], NAMES[9 + i % 7]) for i in range(16)]
    found = verdict(table(reversed_within, has_attention=attention), {}, pairs, PASSED)
    j = found.measures.iloc[0]
    assert j["rho"] > 0.4
    assert j["right_pairs"] == j["decided_pairs"] == 16
    assert j["given_attention"] < 0
    assert found.answer == UNDECIDED
    assert "lacks a positive ρ given attention" in found.sentence


def test_a_correlation_is_not_support_where_too_few_pairs_are_decided():
    for num, answer in ((0, UNDECIDED), (4, UNDECIDED), (5, SUPPORTS)):
        rows, compared = prepared(table(), PAIRS[:num])
        design = Design.of(rows, compared)
        assert Rule.of(ALIKE, design).answers(ALIKE, design)[0] == answer
    assert "lacks 5 decided pairs" in verdict(table(), {}, PAIRS[:4], PASSED).sentence


def test_pairs_are_decided_by_their_errors_and_counted_by_hand():
    rows = table(ALIKE.astype(float), y_error=0.1).set_index("model")
    rows.loc[["e00", "e01", "e02", "e03"], "y"] = [0.0, 0.28, 0.29, 0.29]
    rows.loc[["e00", "e01", "e02", "e03"], "J"] = [1, 2, 0.5, 1]
    pairs = [Pair("near", "e00", "e01"), Pair("far", "e00", "e02"), Pair("tied J", "e00", "e03")]
    _, compared = prepared(rows.reset_index(), pairs)
    assert compared["decided"].tolist() == [False, True, True]  # 2 √2 0.1 = 0.283
    assert compared["right"].tolist() == [None, False, False]
    assert "within 2 standard errors, 0.28" in compared["why"][0]
    _, turned = prepared(rows.reset_index(), [Pair("far", "e02", "e00")])
    assert turned["right"].tolist() == [False]


def test_entries_beyond_the_longest_schedule_are_tied_at_the_top():
    y = np.r_[Y[:15], 2.0, 2.0, 2.0]
    rows, compared = prepared(
        table(y=y, censored=y == 2, y_error=np.where(y == 2, np.nan, 0.05)),
        [Pair("both", "e15", "e16"), Pair("one", "e00", "e17")],
    )
    found = measures(rows, RIVALS, compared)
    assert cell(found, "J", "rho") == pytest.approx(stats.spearmanr(ALIKE, y).statistic)
    assert compared["why"].tolist() == ["both beyond 4T", ""]
    assert compared["dy_error"].tolist() == [0.0, 0.05]


def test_one_family_with_all_entries_has_no_interval_and_no_accuracy_but_a_verdict():
    found = verdict(table(family="one"), {}, PAIRS, PASSED)
    j = found.measures.iloc[0]
    assert j[["family_low", "family_high", "without_low", "accuracy"]].isna().all()
    assert found.answer == SUPPORTS
    assert any("undefined" in line for line in found.lines)


def test_a_rival_is_compared_over_the_entries_that_have_it():
    j = np.array(BETWEEN, dtype=float)
    missing = np.where(np.arange(N) < 3, np.nan, 2 * j)
    rows, compared = prepared(table(j, density=missing, noise_scale=np.full(N, np.nan)))
    found = measures(rows, RIVALS, compared)
    assert cell(found, "density", "n") == 15
    assert cell(found, "density", "rho") == pytest.approx(stats.spearmanr(j[3:], Y[3:]).statistic)
    of_difference = [f"difference{end}" for end in ("", "_low", "_high")]
    assert [cell(found, "density", c) for c in of_difference] == [0, 0, 0]  # it ranks as J does
    # Of 16 pairs, those with the first three entries don't count for it.
    assert cell(found, "density", "decided_pairs") == 10
    # A rival that nobody has still counts in Holm's correction.
    assert np.isnan(cell(found, "noise_scale", "rho"))
    p = cell(found, "density", "p")
    assert cell(found, "density", "p_holm") == pytest.approx(2 * p)


def test_a_measure_said_to_fall_where_adam_is_needed_is_turned_round():
    found = of_kind("alike").measures
    assert cell(found, "noise_scale", "rho") == pytest.approx(1)
    assert cell(found, "noise_scale", "right_pairs") == 16
    assert cell(found, "J", "difference") == 0
    assert np.isnan(cell(found, "J", "p_holm"))
    assert np.isnan(cell(found, "log_params", "p_holm"))


def test_an_infinite_measure_ranks_at_the_top():
    rows, compared = prepared(table(density=np.r_[np.arange(N - 1.0), np.inf]))
    assert cell(measures(rows, RIVALS, compared), "density", "rho") == pytest.approx(1)


def test_images_and_text_stand_apart_and_y_prime_in_place_of_y():
    y_prime = np.random.default_rng(0).normal(size=N)
    rows, compared = prepared(table(BETWEEN, y_prime=y_prime))
    found = measures(rows, RIVALS, compared)
    for column, here, y in (
        ("rho_images", slice(0, 10), Y), ("rho_text", slice(10, N), Y),
        ("rho_y_prime", slice(0, N), y_prime),
    ):  # fmt: skip
        expected = stats.spearmanr(BETWEEN[here], y[here]).statistic
        assert cell(found, "J", column) == pytest.approx(expected), column


def test_the_lowest_correlation_without_an_architecture_names_it():
    # Family f0 alone makes the correlation.
    ours = np.arange(N) % 6 == 0
    rows, compared = prepared(table(np.where(ours, 10 * Y, -Y)))
    found = measures(rows, {}, compared).iloc[0]
    assert found["without"] == "f0"
    assert found["without_low"] == pytest.approx(-1)


def test_the_error_of_a_measure_is_given_or_from_its_interval():
    rows = pd.DataFrame({"J_low": [1.0, np.nan], "J_high": [1.0 + 2 * 1.959964, 2.0]})
    assert error_of(rows, "J") == pytest.approx([1, 0], abs=1e-6)
    assert error_of(rows.assign(J_error=0.3), "J") == pytest.approx([0.3, 0.3])


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        (table().drop(columns="y_prime"), "lacks the columns y_prime"),
        (table(model=["e00", "e00", *NAMES[2:]]), "twice: \\['e00'\\]"),
        (table(y=np.r_[np.nan, Y[1:]]), "no finite y"),
        (table(y=np.r_[2.5, Y[1:]]), "a y beyond 2"),
        (table(censored=np.arange(N) == 4), "censored at another value: \\['e04'\\]"),
        (table(modality="sound"), "a modality other than"),
        (table(y_error=-0.1), "a negative y_error"),
        (table(adam_needed="perhaps"), "an answer other than"),
    ],
)
def test_a_table_that_is_not_as_described_is_refused(rows, word):
    with pytest.raises(UserError, match=word):
        verdict(rows, RIVALS, PAIRS, PASSED)


def test_a_pair_or_a_direction_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="in a pair but not there: \\['gone'\\]"):
        verdict(table(), RIVALS, [Pair("p", "e00", "gone")], PASSED)
    with pytest.raises(UserError, match="density: 0"):
        verdict(table(), {"density": 0}, PAIRS, PASSED)
