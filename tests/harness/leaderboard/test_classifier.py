from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from harness.errors import UserError
from harness.leaderboard.classifier import ANSWERS, Examples, classify, fit, held_out, summary


def examples(x: np.ndarray, needed: np.ndarray, families: list[str]) -> Examples:
    names = tuple(f"m{i}" for i in range(len(x)))
    measures = tuple(f"x{j}" for j in range(x.shape[1]))
    gap = np.where(needed > 0, 0.2, 0.0)
    return Examples(names, measures, x, 0.01 + 0 * x, needed, gap, tuple(families))


def related(strength: float, seed: int = 0, num_models: int = 40) -> Examples:
    """Return models of which Adam is needed the more surely, the larger their measure."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(num_models, 1))
    needed = generator.random(num_models) < 1 / (1 + np.exp(-strength * x[:, 0]))
    return examples(x, needed.astype(float), [f"f{i % 12}" for i in range(num_models)])


@pytest.mark.parametrize("ridge", [0.3, 1.0])
def test_the_fit_is_that_of_scikit_learn(ridge):
    generator = np.random.default_rng(1)
    x, weights = generator.normal(size=(3, 20, 2)), generator.integers(0, 3, (3, 20)).astype(float)
    y = (generator.random(20) < 0.4).astype(float)
    found = fit(x, y, weights, ridge=ridge)
    for draw in range(3):
        model = LogisticRegression(C=1 / ridge, tol=1e-10, max_iter=1000)
        centre = np.zeros((2, 2))  # half an observation of each kind
        model.fit(
            np.vstack([x[draw], centre]), [*y, 0, 1], sample_weight=[*weights[draw], 0.5, 0.5]
        )
        np.testing.assert_allclose(found[draw, 0], model.intercept_[0], atol=1e-5)
        np.testing.assert_allclose(found[draw, 1:], model.coef_[0], atol=1e-5)


def test_separated_and_one_sided_samples_stay_finite():
    x = np.linspace(-1, 1, 10)[None, :, None]
    for y in (x[0, :, 0] > 0, np.zeros(10), np.ones(10)):
        assert np.isfinite(fit(x, y.astype(float), np.ones((1, 10)))).all()


def test_a_strong_relation_gives_clear_answers_at_its_ends_and_none_in_the_middle():
    strong = related(8.0)
    error = np.array([0.01])
    top, bottom = strong.x.max(axis=0), strong.x.min(axis=0)
    assert classify(strong, top, error).answer == ANSWERS[1]
    assert classify(strong, bottom, error).answer == ANSWERS[0]
    boundary = np.median(strong.x, axis=0)
    middle = classify(strong, boundary, error)
    assert middle.answer == ANSWERS[2]
    assert middle.low < 0.5 < middle.high


def test_a_measure_beyond_all_models_has_no_clear_answer():
    strong = related(8.0)
    found = classify(strong, strong.x.max(axis=0) + 1, np.array([0.01]))
    assert found.probability > 0.9
    assert found.outside == ("x0",)
    assert found.answer == ANSWERS[2]


def test_the_error_of_the_measure_widens_the_interval():
    some = related(3.0)
    x = np.array([0.5])
    sure, unsure = (classify(some, x, np.array([error])) for error in (0.0, 1.0))
    assert unsure.high - unsure.low > 1.2 * (sure.high - sure.low)


def test_held_out_predictions_find_skill_where_there_is_some_and_none_where_not():
    strong = summary(held_out(related(8.0)))
    assert strong["accuracy"] > strong["majority"] + 0.1
    assert strong["clear_correct"] >= 0.8 * strong["num_clear"] > 0
    none = summary(held_out(related(0.0)))
    assert none["accuracy"] < 0.7
    assert none["num_clear"] <= 10


def test_a_family_is_predicted_from_the_others_alone():
    # A family that breaks the rule: trained on itself it would be right.
    x = np.r_[np.linspace(-2, -1, 8), np.linspace(1, 2, 8), np.full(4, 1.5)][:, None]
    needed = np.r_[np.zeros(8), np.ones(8), np.zeros(4)]
    families = [f"f{i}" for i in range(16)] + ["odd"] * 4
    found = held_out(examples(x, needed, families)).set_index("family")
    assert (found.loc["odd", "probability"] > 0.8).all()


def test_too_few_models_or_one_kind_alone_are_refused():
    with pytest.raises(UserError, match="3 models of 2 kinds are too few"):
        classify(related(1.0, num_models=3), np.zeros(1), np.zeros(1))
    alike = examples(np.ones((8, 1)), np.ones(8), list("abcdefgh"))
    with pytest.raises(UserError, match="8 models of 1 kinds"):
        classify(alike, np.zeros(1), np.zeros(1))
    assert held_out(alike)["probability"].isna().all()
