from __future__ import annotations

import pytest

from harness.campaign.plan import settings_of
from harness.registry import get
from harness.training import load_problem, problem


@pytest.mark.parametrize(
    ("name", "most", "taken"),
    [("cnn-digits", 100, True), ("cnn-digits", 9, False), ("gpt-pydoc", 100, False)],
)
def test_gram_matrices_are_taken_unasked_where_a_sample_has_few_outputs(
    monkeypatch, name, most, taken
):
    monkeypatch.setattr(problem, "MOST_OUTPUTS", most)
    found = load_problem(get(name))
    settings = settings_of(found.entry)
    assert found.by_gram(settings).gram is taken
