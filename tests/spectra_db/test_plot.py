from __future__ import annotations

import io
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest

from spectra_db import plot
from spectra_db.heterogeneity import pairwise_js

from .synthetic import exact_rows, like_a_network, slq_rows, zero_row


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    made = slq_rows([like_a_network(rng, 400) for _ in range(6)], 3, 20, rng)
    layer = made["block"].str.extract(r"(\d+)")[0]
    made["block"] = "transformer.encoder.layers." + layer + ".self_attention.in_proj_weight[q]"
    made["block_kind"] = "query"
    return pd.concat([made, pd.DataFrame([zero_row(10, "head.weight")])], ignore_index=True)


def drawn(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    return file.getvalue()


def test_every_block_has_a_panel_whose_title_names_its_layer(rows):
    figure = plot.spectra(rows)
    titles = [ax.get_title() for ax in figure.axes[:7]]
    assert len(set(titles)) == 7
    assert all(f".{k}." in titles[k] for k in range(6))
    assert max(map(len, titles)) <= 40
    assert figure.axes[6].texts[0].get_text() == "exactly zero"
    assert drawn(figure)


def test_a_block_that_begins_the_names_of_all_keeps_its_title():
    made = exact_rows([np.linspace(-1, 2, 5)] * 2)
    made["block"] = ["fc.weight", "fc.bias"]
    figure = plot.spectra(made)
    assert [ax.get_title().split()[0] for ax in figure.axes[:2]] == ["fc", "fc.bias"]


def test_the_full_spectrum_is_one_panel(rows):
    one = rows[rows["block"] == rows["block"].iloc[0]].assign(block="__full__")
    figure = plot.spectra(one)
    assert [ax.get_title() for ax in figure.axes] == ["all parameters"]


def test_the_heatmap_labels_the_blocks_that_are_not_zero(rows):
    figure = plot.js_heatmap(rows)
    labels = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert len(set(labels)) == 6
    assert drawn(figure)


@pytest.mark.parametrize("scale", ["raw", "own_rms"])
def test_the_heatmap_shows_the_distances_that_are_returned(rows, scale):
    [image] = plot.js_heatmap(rows, scale=scale).axes[0].get_images()
    assert np.array_equal(image.get_array(), pairwise_js(rows, scale=scale))


def test_the_rates_of_the_gap_are_labelled_and_no_others():
    runs = [
        {"model": "a", "optimizer": o, "lr": lr, "seed": 0, "step": step, "metric": "loss"}
        | {"split": split, "value": value, "diverged": diverged}
        for o in ("sgd", "adamw")
        for lr, end, diverged in ((0.01, 1.0, False), (0.1, 0.5, False), (1.0, 0.1, True))
        for step, value, split in (
            (10, end, "train"), (5, 9 - end, "train"), (0, 2.0, "batch"), (9, end, "batch")
        )
    ]  # fmt: skip
    gaps = pd.DataFrame({"model": ["a", "b"], "sgd_lr": [0.1, 0.01], "adam_lr": [0.01, 0.1]})
    figure = plot.training_curves(pd.DataFrame(runs), gaps)
    labels = [ax.get_legend_handles_labels()[1] for ax in figure.axes]
    assert labels == [["learning rate 0.1 (best)"], ["learning rate 0.01 (best)"]]
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["SGD with momentum (diverged at 1)", "AdamW (diverged at 1)"]
    assert drawn(figure)
    untold = plot.training_curves(pd.DataFrame(runs))
    assert not any(ax.get_legend_handles_labels()[1] for ax in untold.axes)


def test_the_best_rate_is_the_mean_over_its_further_seeds_told_apart_in_grey():
    runs = pd.DataFrame(
        {"model": "a", "optimizer": o, "lr": 0.1, "seed": seed, "step": step, "metric": "loss",
         "split": "batch", "value": 2.0 + seed - step, "diverged": False}
        for o in ("sgd", "adamw") for seed in range(4) for step in (0, 1)
    )  # fmt: skip
    gaps = pd.DataFrame({"model": ["a"], "sgd_lr": [0.1], "adam_lr": [0.1]})
    figure = plot.training_curves(runs, gaps)
    means = [ax.get_lines()[-1] for ax in figure.axes]
    assert [list(line.get_ydata()) for line in means] == [[4.0, 3.0]] * 2  # of seeds 1, 2 and 3
    assert means[0].get_label() == "learning rate 0.1 (best, 3 seeds)"
    assert [line.get_linestyle() for line in means] == ["--", "-"]
    assert [len(ax.get_lines()) for ax in figure.axes] == [5, 5]


def test_each_kind_of_block_has_a_colour_of_its_own(rows):
    assert len(set(plot.KINDS.values())) == len(plot.KINDS)
    # The zero block's kind is in the legend too.
    labels = [text.get_text() for text in plot.spectra(rows).legends[0].get_texts()]
    assert set(labels) == {kind.replace("_", " ") for kind in rows["block_kind"]}


def test_figures_are_made_for_print_and_leave_the_settings_as_they_were(rows):
    before = dict(matplotlib.rcParams)
    figure = plot.spectra(rows)
    assert figure.dpi == 300
    assert figure.get_figwidth() == plot.WIDTH
    assert dict(matplotlib.rcParams) == before


def test_curves_of_several_models_are_refused():
    rows = pd.DataFrame({"model": ["a", "b"], "seed": 0, "metric": "loss"})
    with pytest.raises(ValueError, match=r"several models \(a, b\); select one"):
        plot.training_curves(rows)


def test_curves_of_no_rows_are_refused():
    columns = ["model", "seed", "metric", "step", "split", "diverged", "optimizer", "lr", "value"]
    with pytest.raises(ValueError, match="there are no rows; check the filters"):
        plot.training_curves(pd.DataFrame(columns=columns))


def test_curves_of_another_table_are_refused(rows):
    with pytest.raises(ValueError, match="no column 'metric'; pass whole rows of table training"):
        plot.training_curves(rows.assign(seed=0))
    with pytest.raises(ValueError, match="no column 'model'; pass whole rows of table training"):
        plot.training_curves(rows.drop(columns="model"))


@pytest.mark.parametrize("draw", [plot.spectra, plot.js_heatmap, plot.stages])
@pytest.mark.parametrize("column", ["block", "status"])
def test_spectra_of_another_table_are_refused(rows, draw, column):
    with pytest.raises(ValueError, match=f"no column '{column}'; pass whole rows of table spectra"):
        draw(rows.drop(columns=column))


@pytest.mark.parametrize("draw", [plot.spectra, plot.js_heatmap])
def test_spectra_of_several_stages_are_refused(rows, draw):
    with pytest.raises(ValueError, match="several spectra"):
        draw(pd.concat([rows, rows.assign(stage="final")]))


def test_figures_touch_no_global_state(rows):
    before = "matplotlib.pyplot" in sys.modules  # another test's
    plot.spectra(rows)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_stages_are_lines_in_the_order_of_training_from_dark_to_light(rows):
    later = [rows.assign(stage=s, progress=p) for s, p in (("final", 1.0), ("p25", 0.25))]
    figure = plot.stages(pd.concat([*later, rows]))
    assert figure.axes[0].get_yscale() == "log"
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["init", "p25 (25% of the steps)", "final"]
    brightness = [sum(line.get_color()[:3]) for line in lines]
    assert brightness == sorted(brightness)
    assert [len(ax.get_lines()) for ax in figure.axes[:7]] == [3] * 6 + [0]  # the last is zero
    assert drawn(figure)


def test_steps_of_ones_own_training_have_no_share_of_it(rows):
    own = [rows.assign(stage=f"step-{n}", progress=0.0) for n in (0, 20, 100)]
    labels = [line.get_label() for line in plot.stages(pd.concat(own)).axes[0].get_lines()]
    assert labels == ["step-0", "step-20", "step-100"]


def test_stages_of_several_models_are_refused(rows):
    with pytest.raises(ValueError, match="several spectra"):
        plot.stages(pd.concat([rows, rows.assign(model="other")]))
    with pytest.raises(ValueError, match="there are no rows"):
        plot.stages(rows[:0])


def test_lines_break_where_a_spectrum_has_gaps():
    spectrum = np.array([0.0, 0.1, 50.0])
    [line] = plot.stages(exact_rows([spectrum])).axes[0].get_lines()
    y = line.get_ydata()
    assert np.isnan(y).sum() == 1
    assert np.nanmax(y[np.flatnonzero(np.isnan(y))[0] :]) > 1
