from __future__ import annotations

import numpy as np
import pytest

from spectra_db.extremes import at_a_gap, without_each
from spectra_db.heterogeneity import js0, pairwise_js

from .synthetic import exact_rows, slq_rows


def test_js0_without_a_block_is_that_of_the_rows_without_it():
    rng = np.random.default_rng(0)
    rows = exact_rows([rng.normal(size=n) ** p for n, p in ((40, 1), (60, 3), (80, 5), (50, 1))])
    without = without_each(pairwise_js(rows))
    for block, value in without.items():
        assert value == pytest.approx(js0(rows[rows["block"] != block]).corrected)
    assert without.idxmin() == "layers.2.weight"


def test_two_blocks_have_no_js0_without_one_of_them():
    rows = exact_rows([np.arange(1.0, 5), np.arange(1.0, 9)])
    with pytest.raises(ValueError, match="2 blocks"):
        without_each(pairwise_js(rows))


def test_a_block_whose_ten_largest_eigenvalues_stand_apart_has_lambda10_at_a_gap():
    rng = np.random.default_rng(0)
    bulk = rng.uniform(0, 1, 990)
    apart = np.concatenate([np.linspace(90, 100, 10), bulk])
    further = np.concatenate([np.linspace(90, 100, 30), bulk])
    rows = slq_rows([apart, further, bulk], 3, 30, rng)
    assert at_a_gap(rows) == ["layers.0.weight"]
    assert at_a_gap(exact_rows([apart, bulk])) == []


def test_a_block_of_few_eigenvalues_has_no_gap_at_the_tenth():
    low_rank = np.concatenate([np.full(5, 3.0), np.zeros(100)])
    assert at_a_gap(slq_rows([low_rank, low_rank], 3, 5, np.random.default_rng(0))) == []
