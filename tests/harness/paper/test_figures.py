from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

import spectra_db
from harness.leaderboard import statistics, tables
from harness.leaderboard.model_page import charts
from harness.paper import figures, result
from harness.paper.sections import SECTIONS
from spectra_db import plot, store
from spectra_db.loading import BUNDLED

SWEEP = [f"mlp-mnist-c{c}" for c in range(1, 6)]
MODELS = [*SWEEP, "vgg4-mnist", "gpt-2x64-shakespeare"]
DATASET = [name for name, section in SECTIONS.items() if section.function.startswith("figures:")]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a folder with a few models of the release."""
    folder = tmp_path_factory.mktemp("release")
    for table in ("models", "spectra", "heterogeneity", "gaps", "training", "blocks"):
        (folder / table).mkdir()
        for model in MODELS:
            path = BUNDLED / table / f"{model}.parquet"
            if not path.is_file():
                pytest.skip(f"the release has no {table} of {model}")
            shutil.copy(path, folder / table)
    return folder


@pytest.mark.parametrize("name", DATASET)
def test_a_section_shows_what_there_is_and_names_what_is_not(source, name, tmp_path):
    found = getattr(figures, SECTIONS[name].function.partition(":")[2])(source)
    assert found.figures or found.missing or name == "table1"
    result.save(name, found, tmp_path)
    record = result.load(name, tmp_path)
    assert record is not None
    for figure in record["figures"]:
        assert (tmp_path / figure).stat().st_size > 2000
    assert "nan" not in str(record["values"])


@pytest.mark.parametrize("name", DATASET)
def test_a_source_without_spectra_and_runs_is_no_error(source, name, tmp_path):
    (tmp_path / "models").mkdir()
    shutil.copy(source / "models" / "vgg4-mnist.parquet", tmp_path / "models")
    found = getattr(figures, SECTIONS[name].function.partition(":")[2])(tmp_path)
    assert found.missing
    assert not found.figures


def test_the_sweep_has_the_values_of_the_tables(source):
    values = figures.fig5(source).values
    assert [row["c"] for row in values["rows"]] == [1, 2, 3, 4, 5]
    gaps = spectra_db.load("gaps", source=source, model=SWEEP).set_index("model")["gap"]
    np.testing.assert_allclose([r["gap"] for r in values["rows"]], gaps[SWEEP])
    best = max(values["rows"], key=lambda row: row["adamw"])
    assert 0.9 < best["adamw"] < 1


def test_curves_and_classes_are_those_of_the_families(source):
    assert list(figures.fig9(source).values["models"]) == ["vgg4-mnist"]
    assert list(figures.fig10(source).values["models"]) == ["gpt-2x64-shakespeare"]


def test_table_1_without_a_system_says_which_and_gives_every_metric_of_the_rest(source):
    found = figures.table1(source)
    assert "ResNet18 at real size (resnet18-imagenet: not computed yet)" in found.missing
    values = found.values
    assert "VGG16" in values["systems"]
    assert "VGG16" not in values["ours"]["systems"]
    small = values["small"]
    place = small["systems"].index("VGG16")
    assert small["models"][place] == "vgg4-mnist"
    assert small["paper"][place] == 0.09
    stored = spectra_db.load("heterogeneity", source=source, model="vgg4-mnist", stage="init")
    assert len(stored) == len(small["readings"]) == 15
    for row in stored.itertuples():
        reading = row.metric if row.scale == "none" else f"{row.metric} {row.scale}"
        shown = small["readings"][reading]["values"][place]
        assert shown == pytest.approx(row.corrected)


def test_both_batches_stand_in_table_1(source):
    small = figures.table1(source).values["small"]
    for system, paper in (("VGG16", "1,024 images"), ("GPT2", "245,760 tokens")):
        place = small["systems"].index(system)
        assert small["paper_batches"][place] == paper
        columns = ["batch_size", "num_terms"]
        model = small["models"][place]
        rows = spectra_db.load("spectra", source=source, model=model, stage="init", columns=columns)
        size, terms = rows.iloc[0]
        text = "images" if size == terms else f"terms of {size} samples"
        assert small["batches"][place] == f"{terms:,} {text}"


def test_how_far_a_reading_is_off_is_a_factor_up_or_down():
    theirs, ours = pd.Series([1.0, 10.0, 5.0]), pd.Series([10.0, 1.0, 5.0])
    assert figures._factor(theirs, ours) == pytest.approx(100 ** (1 / 3))


def test_the_curves_of_the_sweep_are_of_the_best_rates_and_their_edge_is_told(source):
    found = figures.fig14(source)
    assert [row["c"] for row in found.values["rows"]] == [1, 2, 3, 4, 5]
    gaps = spectra_db.load("gaps", source=source, model=SWEEP).set_index("model")
    for row in found.values["rows"]:
        stored = gaps.loc[f"mlp-mnist-c{row['c']}"]
        assert (row["sgd_lr"], row["adamw_lr"]) == (stored["sgd_lr"], stored["adam_lr"])
        assert bool(row["sgd_edge"] or row["adamw_edge"]) == stored["at_edge"]
    assert found.values["rows"][0]["sgd_edge"] == "largest"
    drawn = [ax for ax in found.figures["fig14"].axes if ax.lines]
    assert [ax.get_title()[:5] for ax in drawn] == ["c = 1", "c = 4"]
    for ax in drawn:
        assert ax.get_legend_handles_labels()[1] == ["SGD", "AdamW"]


def test_a_run_at_a_rate_tried_by_hand_is_drawn_nowhere_as_the_best(source, tmp_path):
    """One run of seed 0 that is no part of the grid ends lower than all of it."""
    folder, model = shutil.copytree(source, tmp_path / "tables"), "mlp-mnist-c2"
    runs = spectra_db.load("training", source=folder, model=model)
    gap = spectra_db.load("gaps", source=folder, model=model)
    best = gap["sgd_lr"].item()
    by_hand = runs[(runs["optimizer"] == "sgd") & (runs["lr"] == best) & (runs["seed"] == 0)]
    by_hand = by_hand.assign(lr=1.7 * best, value=by_hand["value"].where(by_hand["step"] == 0, 0.0))
    store.write(folder, "training", by_hand)
    row = figures.fig14(folder).values["rows"][1]
    assert (row["sgd_lr"], row["sgd"]) == (best, figures.fig14(source).values["rows"][1]["sgd"])
    curves = charts(model, "paper", folder)["training"]["grid"]
    assert float(f"{1.7 * best:.3g}") in {c["lr"] for c in curves}
    assert {c["lr"] for c in curves if c["best"] and c["optimizer"] == "sgd"} == {best}
    labels = plot.training_curves(spectra_db.load("training", source=folder, model=model), gap)
    assert labels.axes[0].get_legend_handles_labels()[1] == [
        f"learning rate {best:.3g} (best, 3 seeds)"
    ]


def test_a_rank_correlation_with_table_1_takes_four_systems(source, monkeypatch):
    kin = ("vgg4-mnist", "gpt-2x64-shakespeare", "mlp-mnist-c1", "mlp-mnist-c2")
    rows = tuple((name, float(i), "not-there", (name,)) for i, name in enumerate(kin))
    monkeypatch.setattr(figures, "TABLE1", rows[:3])
    assert "rho" not in figures.table1(source).values["small"]["readings"]["js0 raw"]
    monkeypatch.setattr(figures, "TABLE1", rows)
    reading = figures.table1(source).values["small"]["readings"]["js0 raw"]
    assert reading["rho"] == pytest.approx(spearmanr(range(4), reading["values"]).statistic)


def test_a_reading_that_a_model_lacks_is_left_out_of_its_row_alone(source, monkeypatch):
    table = figures._metrics_table(source)
    table.loc["vgg4-mnist", "w1 lambda10"] = np.nan
    monkeypatch.setattr(figures, "_metrics_table", lambda source: table)
    small = figures.table1(source).values["small"]
    place = small["models"].index("vgg4-mnist")
    assert small["readings"]["w1 lambda10"]["values"][place] is None
    assert small["readings"]["js0 raw"]["values"][place] > 0


def test_correlations_come_with_the_leaderboard_s_intervals(bundled, monkeypatch):
    monkeypatch.setattr(tables, "read", lambda source: bundled)
    monkeypatch.setitem(statistics.leaderboard.__kwdefaults__, "num_draws", 200)  # here and there
    values = figures.fig7(BUNDLED).values
    rows = bundled.heterogeneity
    at_init = rows[(rows["stage"] == "init") & (rows["metric"] == "js0_paper")]
    small = bundled.models[bundled.models["tier"] == "small"]
    board = statistics.leaderboard(small, at_init, bundled.gaps)
    row = board[board["statistic"] == "spearman"]
    row = row[(row["metric"] == "js0_paper") & (row["scale"] == "raw") & (row["left_out"] == "")]
    found = values["js0_paper raw"]
    assert row[["value", "ci_low", "ci_high"]].values.tolist() == [[*found.values()]]
    assert values["num_models"] == row["num_models"].item()
