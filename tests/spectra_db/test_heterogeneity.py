from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import spectra_db
from spectra_db import store
from spectra_db.densities import blocks_of, lambda10
from spectra_db.energy import energy_js
from spectra_db.gauss_newton import ggn_share
from spectra_db.heterogeneity import (
    Estimate,
    js0,
    js0_paper,
    metrics,
    pairwise_js,
    spread,
    w1,
)
from spectra_db.quadrature import gauss_rule
from spectra_db.rules import compare
from spectra_db.schema import TABLES
from spectra_db.truncation import truncation_error

from .synthetic import (
    compact_row,
    exact_rows,
    failed_row,
    like_a_network,
    power_of_normal,
    slq_rows,
    zero_row,
)


@pytest.fixture(scope="module")
def sampled() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return slq_rows([like_a_network(rng, n) for n in (500, 700, 1100)], 4, 30, rng)


def repeat(spectra, num_probes, repetitions):
    """Return the true js0 and the estimates of repeated samples."""
    truth = js0(exact_rows(spectra)).value
    generator = np.random.default_rng(1)
    estimates = [js0(slq_rows(spectra, num_probes, 30, generator)) for _ in range(repetitions)]
    return truth, estimates


def coverage(truth: float, estimates: list[Estimate]) -> float:
    return float(np.mean([e.ci_low <= truth <= e.ci_high for e in estimates]))


def test_js0_of_equal_blocks_is_zero_and_exact_blocks_have_no_error():
    estimate = js0(exact_rows([power_of_normal(300, 1.0)] * 3))
    assert estimate.value == pytest.approx(0, abs=1e-6)
    assert estimate.standard_error == 0
    assert estimate.ci_low == estimate.ci_high == estimate.corrected


def test_js0_is_at_most_one_and_reaches_it():
    far = [np.full(300, 1.0), np.full(300, -1.0)]
    assert js0(exact_rows(far)).value == pytest.approx(1, abs=1e-5)


def test_js0_is_unchanged_when_blocks_are_multiplied_but_not_if_raw():
    spectra = [power_of_normal(400, 1.0), power_of_normal(500, 1.5)]
    scaled = [100 * spectra[0], spectra[1]]
    assert js0(exact_rows(scaled)).value == pytest.approx(js0(exact_rows(spectra)).value, abs=1e-6)
    raw = [js0(exact_rows(s), scale="raw").value for s in (spectra, scaled)]
    assert raw[1] > raw[0]


@pytest.mark.slow
@pytest.mark.parametrize("num_probes", [3, 5])
def test_small_js0_is_corrected_and_its_90_percent_intervals_cover(num_probes):
    spectra = [power_of_normal(n, a) for n, a in ((500, 1.05), (800, 1.0), (1200, 0.9))]
    truth, estimates = repeat(spectra, num_probes, 120)
    assert truth < 0.1
    plug_in = np.array([e.value for e in estimates])
    corrected = np.array([e.corrected for e in estimates])
    assert np.mean(np.abs(corrected - truth)) < 0.6 * np.mean(np.abs(plug_in - truth))
    assert abs(corrected.mean() - truth) < 0.2 * abs(plug_in.mean() - truth)
    assert 0.80 <= coverage(truth, estimates) <= 0.97


@pytest.mark.slow
def test_large_js0_is_corrected_and_its_90_percent_intervals_cover():
    rng = np.random.default_rng(0)
    spectra = [
        rng.normal(size=500),
        rng.exponential(size=600),
        rng.normal(size=700) ** 2,
        rng.uniform(size=800),
    ]
    truth, estimates = repeat(spectra, 3, 120)
    assert truth > 0.4
    plug_in = np.array([e.value for e in estimates])
    corrected = np.array([e.corrected for e in estimates])
    assert np.mean(np.abs(corrected - truth)) < np.mean(np.abs(plug_in - truth))
    assert 0.80 <= coverage(truth, estimates) <= 0.97


@pytest.mark.slow
def test_intervals_cover_where_the_noise_of_lambda10_dominates():
    # Its bias is negative here and isn't corrected (docs/protocol.md, Error): the correction of
    # the other, positive part may leave the estimate a little farther, not more.
    rng = np.random.default_rng(0)
    spectra = [rng.normal(size=500), rng.exponential(size=600), power_of_normal(700, 2.0) ** 2]
    truth, estimates = repeat(spectra, 3, 120)
    plug_in = np.array([e.value for e in estimates])
    corrected = np.array([e.corrected for e in estimates])
    assert np.mean(np.abs(corrected - truth)) < 1.15 * np.mean(np.abs(plug_in - truth))
    assert 0.80 <= coverage(truth, estimates) <= 0.97


@pytest.mark.slow
def test_the_standard_error_is_the_spread_of_repeated_estimates():
    # λ10 jumps between nodes, which doubles a plain jackknife's error at 10 probes.
    spectra = [power_of_normal(n, a) for n, a in ((500, 1.1), (800, 1.0), (1200, 0.8))]
    _, estimates = repeat(spectra, 10, 40)
    spread_of_estimates = np.std([e.corrected for e in estimates], ddof=1)
    errors = np.mean([e.standard_error for e in estimates])
    assert 0.7 * spread_of_estimates < errors < 1.6 * spread_of_estimates


def test_fewer_than_three_probes_give_a_value_without_error(sampled):
    estimate = js0(sampled[sampled["probe"] < 2])
    assert 0 < estimate.value < 1
    assert np.isnan([estimate.corrected, estimate.standard_error, estimate.ci_low]).all()


def test_exact_blocks_beside_sampled_ones_contribute_no_error(sampled):
    exact = exact_rows([power_of_normal(300, 1.0)]).assign(block="small", dtype="float64")
    mixed = js0(pd.concat([sampled, exact], ignore_index=True))
    assert mixed.num_blocks == 4
    assert 0 < mixed.standard_error < 1
    assert 3 <= mixed.dof <= 9


def test_one_node_for_all_zeros_changes_no_reading(sampled, tmp_path):
    rng = np.random.default_rng(0)
    spectra = [np.append(like_a_network(rng, n), np.zeros(3 * n)) for n in (50, 70, 110)]
    spectra.append(np.append([-2.0, 5.0], np.zeros(90)))  # fewer than ten are not zero
    whole = exact_rows(spectra)
    compact = pd.DataFrame([compact_row(s, f"layers.{k}.weight") for k, s in enumerate(spectra)])
    assert (compact["nodes"].map(len) < whole["nodes"].map(len)).all()
    store.write(tmp_path, "spectra", compact)
    beside = sampled.assign(block="sampled." + sampled["block"])
    for others in (beside[:0], beside):
        a, b = (metrics(pd.concat([rows, others])) for rows in (compact, whole))
        pd.testing.assert_frame_equal(a, b, rtol=1e-12)
        a, b = (spectra_db.density(pd.concat([rows, others])) for rows in (compact, whole))
        pd.testing.assert_frame_equal(a, b, rtol=1e-9, atol=1e-12)
    assert energy_js(compact).value == pytest.approx(energy_js(whole).value, rel=1e-12)
    for a, b in zip(compact.to_dict("records"), whole.to_dict("records"), strict=True):
        assert compare(a, b).distance < 1e-13
        assert lambda10(a["nodes"], a["weights"], a["num_params"]) == lambda10(
            b["nodes"], b["weights"], b["num_params"]
        )


def test_the_share_of_gauss_newton_is_a_ratio_of_squares_by_block(sampled):
    half = sampled.assign(operator="ggn", nodes=sampled["nodes"] / 2, alphas=sampled["alphas"] / 2)
    share = ggn_share(pd.concat([sampled, half]))
    assert share.tolist() == pytest.approx([0.25] * 3)
    with pytest.raises(ValueError, match="one operator alone"):
        ggn_share(pd.concat([sampled, half[half["block"] != half["block"].iloc[0]]]))


def test_zero_blocks_are_left_out_and_counted(sampled):
    rows = pd.concat([sampled, pd.DataFrame([zero_row(64, "head")])], ignore_index=True)
    estimate = js0(rows)
    assert (estimate.num_blocks, estimate.num_zero_blocks) == (3, 1)
    assert estimate.value == js0(sampled).value
    assert "head" not in pairwise_js(rows).index


def test_paper_reading_is_the_mean_divergence_over_dx():
    spectra = [power_of_normal(300, 1.0), power_of_normal(400, 2.0)]
    rows = exact_rows(spectra)
    scaled = np.concatenate([s / lambda10(s, np.full(len(s), 1 / len(s)), len(s)) for s in spectra])
    dx = (scaled.max() - scaled.min() + 2) / 50_000
    distance = pairwise_js(rows, scale="lambda10", sigma=0.01).to_numpy()[0, 1]
    assert js0_paper(rows, scale="lambda10").value == pytest.approx(distance**2 * np.log(2) / dx)
    # The sum of the paper over its grid, without dx.
    t = np.linspace(scaled.min() - 1, scaled.max() + 1, 50_000)
    P = []
    for _k, s in enumerate(spectra):
        nodes = s / lambda10(s, np.full(len(s), 1 / len(s)), len(s))
        kernel = np.exp(-0.5 * ((t[:, None] - nodes[None]) / 0.01) ** 2).mean(axis=1)
        P.append(kernel / (0.01 * np.sqrt(2 * np.pi)))
    m = (P[0] + P[1]) / 2
    logs = [np.log(np.maximum(p, 1e-300) / np.maximum(m, 1e-300)) for p in P]
    summed = 0.5 * sum(p @ log for p, log in zip(P, logs, strict=True))
    assert js0_paper(rows, scale="lambda10").value == pytest.approx(summed, rel=1e-3)


@pytest.mark.parametrize("scale", [None, "raw", "lambda10"])
def test_paper_reading_is_the_one_that_tables_hold(scale):
    rows = exact_rows([power_of_normal(30, 1.0), power_of_normal(40, 2.0)])
    table = metrics(rows, names=["js0_paper"]).set_index("scale")
    stored = table.loc[scale or spectra_db.heterogeneity.LEADING["js0_paper"], "value"]
    assert js0_paper(rows, **{"scale": scale} if scale else {}).value == stored


def test_lambda10_is_the_tenth_largest_eigenvalue_by_size():
    values = np.array([*range(-20, 0), *np.linspace(0, 0.5, 30)], dtype=float)
    assert lambda10(values, np.full(50, 1 / 50), 50) == 11


@pytest.mark.parametrize(
    "values", [np.arange(1.0, 8.0), np.array([5.0] + [1e-12] * 40), np.array([5.0] + [0.0] * 40)]
)
def test_lambda10_is_the_largest_where_fewer_than_ten_are_not_zero(values):
    n = len(values)
    assert lambda10(values, np.full(n, 1 / n), n) == np.abs(values).max()


def test_spreads_are_deviations_of_log10():
    spectra = [np.full(100, 1.0), np.full(100, 10.0), np.full(100, -100.0)]
    rows = exact_rows(spectra)
    for statistic in ("lambda_rms", "lambda_max", "trace"):
        assert spread(rows, statistic).value == pytest.approx(np.std([0, 1, 2]))


def test_moments_are_charged_one_product_a_probe(sampled):
    assert spread(sampled, "trace").num_products == 3 * 4
    assert spread(sampled, "lambda_max").num_products == 3 * 4 * 30
    first = {name: [x[:1] for x in sampled[name]] for name in ("alphas", "betas")}
    one_step = sampled.assign(**first, nodes=first["alphas"], weights=[np.ones(1)] * len(sampled))
    assert spread(one_step, "trace").value == pytest.approx(spread(sampled, "trace").value)


def test_w1_is_the_mean_distance_of_scaled_spectra():
    rows = exact_rows([np.linspace(0, 1, 300), np.linspace(0, 1, 300) + 2])
    assert w1(rows, scale="raw").value == pytest.approx(2)


def test_metrics_fill_the_table_of_heterogeneity(sampled, tmp_path):
    rows = metrics(sampled)
    store.write(tmp_path, "heterogeneity", rows)
    back = spectra_db.load("heterogeneity", source=tmp_path)
    assert list(back.columns) == TABLES["heterogeneity"].names
    assert len(back) == len(rows) == 14
    first = back[(back["metric"] == "js0") & (back["scale"] == "own_rms")].iloc[0]
    assert first["corrected"] == js0(sampled).corrected
    assert back["batch_error"].isna().all()


@pytest.mark.parametrize(
    ("version", "scale", "times"),
    [
        *[(1, "raw", {22: 1}), (2, "raw", {22: 3}), (3, "raw", {22: 5})],
        *[(4, "raw", {22: 5, 15: 2.5}), (4, "own_rms", {22: 5})],
    ],
)
def test_truncation_error_is_of_the_change_over_a_quarter_of_the_steps(
    sampled, version, scale, times
):
    reading = {"scale": scale, "extend": version > 1}
    now, stated = js0(sampled, **reading).value, []
    assert {len(x) for x in sampled["alphas"]} == {30}
    for num_steps, factor in times.items():
        T = {name: [x[:num_steps] for x in sampled[name]] for name in ("alphas", "betas")}
        nodes, weights = zip(*map(gauss_rule, *T.values()), strict=True)
        shorter = sampled.assign(**T, nodes=nodes, weights=weights)
        stated.append(factor * abs(js0(shorter, **reading).value - now))
    table = metrics(sampled, version=version, names=["js0"]).set_index("scale")
    assert table.loc[scale, "truncation_error"] == pytest.approx(max(stated))
    assert max(stated) > 0


def test_truncation_error_takes_the_larger_of_the_changes_per_step():
    assert truncation_error(1.0, {0.75: 1.1}) == pytest.approx(0.5)
    assert truncation_error(1.0, {0.75: 1.1, 0.5: 0.7}) == pytest.approx(0.75)
    assert truncation_error(1.0, {0.75: 1.1, 0.5: 0.9}) == pytest.approx(0.5)


def test_probes_that_broke_down_have_no_truncation_error():
    atoms = [np.repeat([1.0, 2.0, 5.0], 200), np.repeat([1.0, 4.0], 300)]
    rows = slq_rows(atoms, 3, 10, np.random.default_rng(0))
    assert rows["breakdown"].all()
    assert metrics(rows)["truncation_error"].max() == pytest.approx(0, abs=1e-10)
    # Asked for 10 steps by a third block.
    more = slq_rows([power_of_normal(500, 1.0)], 3, 10, np.random.default_rng(0))
    both = pd.concat([rows, more.assign(block="third")], ignore_index=True)
    pair = metrics(both).set_index("metric").loc["trace_spread", "truncation_error"]
    assert pair == pytest.approx(0, abs=1e-12)


def test_a_probe_that_broke_down_after_more_steps_than_others_took_keeps_three_quarters():
    [ended] = blocks_of(
        slq_rows([np.repeat([1.0, 2.0, 5.0], 200)], 1, 10, np.random.default_rng(0))
    )
    assert [len(r.alphas) for r in ended.recurrences if r.breakdown] == [3]
    short = ended.truncated(2, 0.75, extend=True)
    assert len(short.recurrences[0].alphas) == 2


@pytest.mark.parametrize("part", [0.75, 0.5])
def test_a_probe_that_broke_down_before_three_quarters_keeps_its_rule(part):
    [ended] = blocks_of(
        slq_rows([np.repeat([1.0, 2.0, 5.0], 200)], 1, 10, np.random.default_rng(0))
    )
    kept = ended.truncated(4, part, extend=True)
    np.testing.assert_allclose(kept.rules, ended.rules, rtol=1e-12)


def test_gradient_spread_comes_from_the_table_of_blocks(sampled):
    names = sampled["block"].unique()
    blocks = pd.DataFrame({"block": names, "gradient_rms": [1.0, 10.0, 100.0]})
    table = metrics(sampled, block_rows=blocks).set_index("metric")
    assert table.loc["gradient_rms_spread", "value"] == pytest.approx(np.std([0, 1, 2]))
    assert table.loc["gradient_rms_spread", "num_products"] == 0
    with pytest.raises(ValueError, match=r"no row of 'layers\.0\.weight'"):
        metrics(sampled, block_rows=blocks.iloc[1:])


def test_rows_of_several_spectra_are_refused_by_naming_what_varies(sampled):
    mixed = pd.concat([sampled, sampled.assign(stage="final")])
    with pytest.raises(ValueError, match=r"several spectra \(stage: 'init', 'final'\)"):
        js0(mixed)


def test_failed_blocks_are_refused_by_name_and_reason(sampled):
    rows = pd.concat([sampled, pd.DataFrame([failed_row("head")])], ignore_index=True)
    with pytest.raises(ValueError, match=r"'head' \(failed: out of memory\)"):
        js0(rows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rows: js0(rows, scale="lambda1"), "unknown scale 'lambda1'; choose one of"),
        (lambda rows: js0(rows, sigma=0.0), "sigma is 0.0; it must be a positive number"),
        (lambda rows: js0(rows.iloc[:0]), "there are no rows"),
        (lambda rows: js0(rows[rows["block"] == "layers.0.weight"]), "1 of 1 blocks are not zero"),
        (lambda rows: spread(rows, "median"), "unknown statistic 'median'"),
        (lambda rows: js0(rows[["block", "nodes"]]), "no column 'probe'; pass whole rows of table"),
        (lambda rows: js0(pd.concat([rows, rows])), "probe 0 of block '.*' is there twice"),
        (lambda rows: js0(rows.assign(weights=2 * rows["weights"])), "its weights sum to 1"),
        # Nodes that are nan went as places into a matrix, and ended the process.
        (lambda rows: spectra_db.density(rows.assign(nodes=np.nan * rows["nodes"])), "be finite"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(sampled, call, message):
    with pytest.raises(ValueError, match=message):
        call(sampled)


def test_density_integrates_to_one_and_names_the_blocks(sampled):
    dense = spectra_db.density(sampled)
    assert list(dense.columns) == list(sampled["block"].unique())
    step = 0.05 / 3
    assert np.allclose(dense.sum() * step, 1, atol=1e-5)


@pytest.mark.parametrize("scale", ["lambda10", "raw", "global_max", "own_max", "own_rms"])
def test_js0_of_every_scale_is_between_zero_and_one(sampled, scale):
    estimate = js0(sampled, scale=scale)
    assert 0 <= estimate.corrected <= 1
    assert estimate.standard_error >= 0
