"""Rules of T continued where Lanczos stopped: what stays exact, what gets nearer, and when not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from spectra_db import derived, store
from spectra_db.densities import blocks_of
from spectra_db.heterogeneity import METRICS, MOMENTS, js0, metrics, spread, that_need
from spectra_db.quadrature import extended, gauss_rule
from spectra_db.schema import KEYS, VERSIONS
from spectra_db.store import InvalidTable
from spectra_db.truncation import CHANGES

from .synthetic import COMMON, exact_rows, lanczos, power_of_normal, slq_rows

STEPS = 10


@pytest.fixture(scope="module")
def spectra() -> list[np.ndarray]:
    """Semicircles of unlike widths and centres, on whose measures coefficients settle."""
    angles = (np.arange(600) + 0.5) * np.pi / 600
    return [np.cos(angles) + shift for shift in (0.0, 0.8, 2.0)]


@pytest.fixture(scope="module")
def rows(spectra) -> pd.DataFrame:
    return slq_rows(spectra, 3, STEPS, np.random.default_rng(0))


def test_the_moments_that_lanczos_knows_stay_and_so_do_the_spreads_of_moments(spectra, rows):
    d, v = spectra[1], np.random.default_rng(1).standard_normal(600)
    nodes, weights = gauss_rule(*extended(*lanczos(d, v, STEPS)))
    assert len(nodes) == 60
    measure = v**2 / (v @ v)
    for j in range(2 * STEPS + 1):  # one more than of the rule that ends
        assert weights @ nodes**j == pytest.approx(measure @ d**j, rel=1e-10)
    ended, w = gauss_rule(*lanczos(d, v, STEPS))
    assert w @ ended ** (2 * STEPS) != pytest.approx(measure @ d ** (2 * STEPS), rel=1e-10)
    both = [metrics(rows, version=v, names=that_need(MOMENTS))["value"] for v in (1, 3)]
    np.testing.assert_allclose(*both, rtol=1e-12)


def test_no_node_lies_beyond_the_largest_row_of_t():
    T = lanczos(power_of_normal(500, 3.0), np.random.default_rng(2).standard_normal(500), STEPS)
    nodes, _ = gauss_rule(*extended(*T))
    alphas, betas = T
    assert np.abs(nodes).max() <= (np.abs(alphas) + np.append(0, betas[:-1]) + betas).max()


def test_the_bias_of_few_steps_goes(spectra, rows):
    truth = js0(exact_rows(spectra), scale="own_rms").value
    ended, continued = (js0(rows, scale="own_rms", extend=e).corrected for e in (False, True))
    assert abs(continued - truth) < 0.2 * abs(ended - truth)


def test_exact_blocks_rules_that_broke_down_and_those_of_few_steps_stay(spectra, rows):
    few = slq_rows(spectra, 3, 5, np.random.default_rng(0))
    ended = slq_rows([np.repeat([1.0, 2, 3, 4, 5, 6, 7], 80)] * 2, 3, 30, np.random.default_rng(0))
    assert ended["breakdown"].all()
    for some in (exact_rows(spectra), few, ended):
        for block in blocks_of(some):
            np.testing.assert_array_equal(block.extended().rules, block.rules)
    assert all(len(nodes) == 60 for b in blocks_of(rows) for nodes, _ in b.extended().rules)


def test_what_is_stored_decides_by_its_protocol_what_it_is_compared_with(rows, tmp_path):
    store.write(tmp_path, "spectra", rows)
    for version in CHANGES:
        table = metrics(rows, version=version)
        store.write(tmp_path, "heterogeneity", table, replace=True)
        assert derived.differences(tmp_path, derived.DERIVED) == []
    store.write(tmp_path, "heterogeneity", table.assign(protocol_version=1), replace=True)
    [problem] = derived.differences(tmp_path, derived.DERIVED)
    assert "rows are not what other tables give" in problem


def test_metrics_of_protocol_1_are_derived_anew_and_what_no_spectrum_tells_is_kept(rows, tmp_path):
    store.write(tmp_path, "spectra", rows)
    older = metrics(rows, version=1).assign(batch_error=0.25)
    larger = older["metric"].isin(that_need(MOMENTS))
    older.loc[larger, ["batch_size", "value", "truncation_error"]] = 99, 0.5, 0.01
    store.write(tmp_path, "heterogeneity", older)
    with pytest.raises(InvalidTable, match=r"protocol versions \[1, 4\] .*dataset derive"):
        store.write(tmp_path, "heterogeneity", metrics(rows, names=["w1"]))
    assert derived.renew(tmp_path) == [COMMON["model"]]
    key = list(KEYS["heterogeneity"])
    found = derived.rows_of(tmp_path, "heterogeneity", COMMON["model"])
    assert set(found["protocol_version"]) == {VERSIONS["heterogeneity"]}
    assert set(found["batch_error"]) == {0.25}
    assert set(found.loc[found["batch_size"] == 99, "value"]) == {0.5}
    assert set(found.loc[found["batch_size"] == 99, "truncation_error"]) == {0.05}
    assert set(found.loc[found["batch_size"] == 99, "metric"]) == set(that_need(MOMENTS))
    both = found.merge(metrics(rows), on=key, suffixes=("", "_anew"))
    of_spectrum = both["batch_size"] == both["batch_size_anew"]
    np.testing.assert_allclose(both["value"][of_spectrum], both["value_anew"][of_spectrum])
    assert derived.renew(tmp_path) == []


def test_halves_within_a_folder_are_derived_anew_with_it(rows, tmp_path):
    half = tmp_path / "halves" / "first"
    for folder in (tmp_path, half):
        store.write(folder, "spectra", rows)
    store.write(half, "heterogeneity", metrics(rows, version=2))
    store.write(tmp_path, "heterogeneity", metrics(rows))
    assert derived.renew(tmp_path) == [COMMON["model"]]
    found = derived.rows_of(half, "heterogeneity", COMMON["model"])
    assert set(found["protocol_version"]) == {VERSIONS["heterogeneity"]}
    assert derived.renew(tmp_path) == []


def test_every_metric_is_one_entry_of_one_table(rows):
    assert spread(rows, "trace").num_products == 3 * 3
    table = metrics(rows)
    expected = [
        (name, *reading)
        for name, metric in METRICS.items()
        for reading in metric.readings
        if name != "gradient_rms_spread"
    ]
    assert list(table[["metric", "scale", "sigma"]].itertuples(index=False, name=None)) == expected
