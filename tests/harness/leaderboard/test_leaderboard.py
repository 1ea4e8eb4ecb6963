from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import spectra_db
from harness.cli import main
from harness.leaderboard import report, statistics, tables
from harness.leaderboard.board import derive, leaderboard
from harness.leaderboard.export import export
from harness.leaderboard.model_page import charts
from harness.leaderboard.ranking import ranking
from harness.submission.verify import Check, mark_verified
from spectra_db import store
from spectra_db.loading import BUNDLED
from spectra_db.release import release
from spectra_db.schema import KEYS
from spectra_db.verified import Extent
from tests.harness.leaderboard.tables import gap_row, made_up, model_row
from tests.harness.leaderboard.test_site import spectrum_rows

ROOT = Path(__file__).parents[3]
FAMILIES = ["a", "a", "b", "b", "c", "c", "d", "d"]
released = pytest.mark.skipif(
    not any(BUNDLED.glob("gaps/*.parquet")), reason="no release is bundled with this checkout"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return a folder of tables: eight models, of which JS⁰ orders the gaps and w1 does not."""
    out = tmp_path_factory.mktemp("made")
    gaps = np.r_[np.linspace(0, 0.05, 4), np.linspace(0.2, 0.3, 4)]
    values = {"js0": np.exp(gaps), "w1": np.r_[1:5, 1:5] + gaps}
    parts = made_up(values, gaps, FAMILIES, errors=1e-4)
    for table, rows in zip(("models", "heterogeneity", "gaps"), parts, strict=True):
        store.write(out, table, rows)
    return out


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch) -> None:
    """Let intervals be of fewer draws; those of the release are made before any test."""
    monkeypatch.setitem(statistics.leaderboard.__kwdefaults__, "num_draws", 400)


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """Return a copy of it, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "data"))


def call(*arguments: object):
    return CliRunner().invoke(main, ["leaderboard", *map(str, arguments)])


def test_the_files_hold_the_numbers_that_are_printed(folder, tmp_path):
    result = call("--source", folder, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    stored = spectra_db.load("leaderboard", source=tmp_path / "out")
    csv = pd.read_csv(tmp_path / "out" / "leaderboard" / "leaderboard.csv")
    printed = pd.DataFrame(facts["leaderboard"])
    np.testing.assert_allclose(stored["value"], csv["value"], rtol=1e-12)
    np.testing.assert_allclose(stored["value"], printed["value"].astype(float), rtol=1e-12)
    models = pd.read_csv(tmp_path / "out" / "leaderboard" / "models.csv")
    assert len(models) == 16
    assert set(models["provenance"]) == {"self-reported"}
    assert models["enters"].all()


def test_a_release_s_own_table_is_read_and_that_of_a_growing_folder_is_made(folder, tmp_path):
    release(folder, tmp_path / "release", "0.1.0", derive=derive)
    stored = spectra_db.load("leaderboard", source=tmp_path / "release")
    pd.testing.assert_frame_equal(leaderboard(tables.read(tmp_path / "release")), stored)
    # What lies there may be of other rows, or no table at all.
    store.path_of(folder, "leaderboard", "all").parent.mkdir()
    store.path_of(folder, "leaderboard", "all").write_bytes(b"old")
    store.write(folder, "models", [model_row("m0", family="z")])
    assert "z" in set(leaderboard(tables.read(folder))["left_out"])


def test_what_an_earlier_table_held_is_gone(folder, tmp_path):
    assert call("--source", folder, "--out", tmp_path / "out").exit_code == 0
    store.write(folder, "models", [model_row("m0", family="z")])
    assert call("--source", folder, "--out", tmp_path / "out").exit_code == 0
    assert "z" in set(spectra_db.load("leaderboard", source=tmp_path / "out")["left_out"])
    store.write(folder, "models", [model_row("m0", family="a")])
    assert call("--source", folder, "--out", tmp_path / "out").exit_code == 0
    assert "z" not in set(spectra_db.load("leaderboard", source=tmp_path / "out")["left_out"])


def test_the_sentences_answer_the_questions_with_n_and_intervals(folder):
    result = call("--source", folder)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "Undecided: whether JS⁰" in text
    assert "these 8 models of 4 families" in text
    assert "8 of 8 count as trained" in text
    assert "above 0.1 in 4 (Adam needed), below in 4 (not needed)" in text
    assert "no runs are recorded" in text


def test_the_sentences_name_what_is_not_trained_and_whose_gap_r_moves(folder):
    gaps = spectra_db.load("gaps", source=folder).set_index("model")
    gaps.loc["m0", ["trained", "gap_from_reference", "adam_needed_now"]] = [False, None, None]
    gaps.loc["m1", ["gap_from_reference", "adam_needed_now"]] = [0.9, "yes"]
    gaps.loc["m4", "adam_needed_now"] = "unclear"
    store.write(folder, "gaps", gaps.reset_index())
    said = json.loads(call("--source", folder, "--json").stdout)["statements"]
    [sentence] = [sentence for sentence in said if "count as trained" in sentence]
    assert sentence.startswith("7 of 8 count as trained")
    assert "(not: m0)" in sentence
    assert "above 0.1 in 4 (Adam needed), below in 2 (not needed), and holds 0.1 in 1" in sentence
    assert sentence.endswith("It moves most in m1 (from 0.017 to 0.90).")


def test_tables_of_an_older_release_don_t_say_what_is_trained(folder):
    gaps = spectra_db.load("gaps", source=folder)
    store.write(folder, "gaps", gaps.assign(trained=None, adam_needed_now=None))
    said = json.loads(call("--source", folder, "--json").stdout)["statements"]
    assert not any("trained:" in sentence for sentence in said)
    assert said[0].startswith("Undecided")


def test_js0_is_set_against_attention_and_size(folder):
    kinds = {"m0": "conv", **dict.fromkeys(("m4", "m5"), "query")}
    for model, kind in kinds.items():
        rows = [row | {"block_kind": kind} for row in spectrum_rows(model)]
        store.write(folder, "spectra", rows)
    data = tables.read(folder)
    has = data.models.set_index("model")["has_attention"]
    assert set(has.index[has]) == {"m4", "m5"}
    said = json.loads(call("--source", folder, "--json").stdout)["statements"]
    [sentence] = [sentence for sentence in said if sentence.startswith("To be beaten")]
    assert re.search(r"has attention −\d.*; number of parameters \S+ \[.*, not apart\.$", sentence)


def test_a_page_gets_the_table_between_its_markers_and_keeps_the_rest(folder, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        f"before\n\n{report.BEGIN}\noutdated\n{report.END}\n\nafter\n", encoding="utf-8"
    )
    for _ in range(2):
        assert call("--source", folder, "--docs", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n\n<!--")
    assert text.endswith("-->\n\nafter\n")
    assert "outdated" not in text
    assert text.count("| JS⁰ | 120 | 1.00 [") == 1


def test_a_page_without_markers_is_left_as_it_is(folder, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing", encoding="utf-8")
    result = call("--source", folder, "--docs", page)
    assert result.exit_code == 2
    assert "needs a line" in result.stderr
    assert page.read_text(encoding="utf-8") == "nothing"


def test_an_unknown_stage_is_refused_with_those_there_are(folder):
    result = call("--source", folder, "--stage", "end")
    assert result.exit_code == 2
    assert "'end' is not one of 'init', 'p10', 'p25', 'p50', 'final'" in result.stderr


def test_few_models_are_said_to_be_few(tmp_path):
    store.write(tmp_path, "models", [model_row("m0", tier="demo")])
    result = call("--source", tmp_path)
    assert result.exit_code == 0, result.output
    assert "0 trained models of the tiers small and paper are too few" in result.stdout


def test_every_model_without_a_number_is_pending_with_the_reason(folder):
    store.write(folder, "models", [model_row("late", status="pending", reason="no data")])
    store.write(folder, "models", [model_row("dull")])
    store.write(folder, "gaps", [gap_row("m1", 0.1, status="failed", reason="undefined")])
    pending = tables.read(folder).pending.set_index("model")["reason"]
    assert pending["late"] == "no data"
    assert pending["dull"] == "no spectrum at initialisation yet"
    assert pending["m1"] == "gap failed: undefined"
    assert pending["vit-cifar10"] == "not computed yet"  # of the registry, in the same tier
    assert "cnn-digits" not in pending  # another tier
    assert "m0" not in pending


def test_only_models_of_which_all_that_was_drawn_agreed_are_verified_until_a_table_changes(folder):
    outcomes = {
        "m0": ["agrees", "agrees"],
        "m1": ["agrees", "deviates"],
        "m2": ["agrees", "agrees"],
        "m3": ["agrees", "unverifiable"],
        "m4": ["agrees"],  # the other was left for want of time
    }
    for model in outcomes:
        path = store.path_of(folder, "spectra", model)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(model.encode())
    checks = [
        Check(model, "init", "weights", "w", i, outcome)
        for model, several in outcomes.items()
        for i, outcome in enumerate(several)
    ]
    checks.append(Check("m0", "table", "", "gaps", 0, "agrees"))
    checks.append(Check("m0", "training", "", "sgd at 0.1", 1, "agrees"))
    rows = pd.DataFrame({"model": np.repeat(list(outcomes), 9), "status": "ok"})
    mark_verified(folder, checks, rows.groupby("model").head(2), rows)
    gaps = store.read(store.path_of(folder, "gaps", "m2"), "gaps").to_pandas()
    store.write(folder, "gaps", gaps.assign(gap=0.9))
    assert tables.verified_models(folder) == {"m0": Extent(2, 9, 1, 0)}
    assert str(Extent(2, 9, 1, 36)) == "2 of 9 rows, 1 of 36 runs"


def test_a_model_of_blocks_with_biases_is_compared_by_its_weights(tmp_path):
    # Partition paper of the MLP sweep has biases; the released heterogeneity has them in it.
    rows = spectra_db.load("spectra", source=_perceptron(tmp_path), model="p")
    with_biases = spectra_db.load("heterogeneity", source=tmp_path, model="p", metric="js0")
    found = tables.read(tmp_path).heterogeneity
    found = found[(found["metric"] == "js0") & (found["scale"] == "own_rms")].iloc[0]
    expected = spectra_db.js0(rows[rows["block_kind"] != "bias"])
    assert found["partition"] == "weights"
    assert found["corrected"] == pytest.approx(expected.corrected)
    assert found["num_blocks"] == 3
    assert with_biases["num_blocks"].iloc[0] == 4
    assert found["block_products"] == 3 * 5  # not those that diagonalise the exact block


def test_the_page_of_such_a_model_shows_the_distances_that_its_js0_is_the_mean_of(tmp_path):
    found = charts("p", "paper", _perceptron(tmp_path), weights_alone=True)
    assert [block["name"] for block in found["blocks"]][-1] == "layers.10.w"
    assert "layers.2.b" in [block["name"] for block in found["blocks"]]
    distances = np.array(found["heatmaps"]["init"]["values"]) / 1000
    data = tables.read(tmp_path).heterogeneity
    js0 = data[(data["metric"] == "js0") & (data["scale"] == "own_rms")].iloc[0]
    mean = distances[np.triu_indices(len(distances), 1)].mean()
    assert mean == pytest.approx(js0["corrected"], abs=1e-3)


def _perceptron(folder: Path) -> Path:
    """Write a model of partition paper with a bias, two sampled blocks and an exact one."""
    from spectra_db.heterogeneity import metrics

    rows = spectrum_rows("p")
    bias = rows[-1] | {"block": "layers.2.b", "block_kind": "bias", "nodes": [0.5, 3.0]}
    rows = [row | {"partition": "paper"} for row in [*rows, bias]]
    store.write(folder, "models", [model_row("p", tier="paper")])
    store.write(folder, "gaps", [gap_row("p", 0.1)])
    store.write(folder, "spectra", rows)
    stored = spectra_db.load("spectra", source=folder, model="p")
    store.write(folder, "heterogeneity", metrics(stored))
    return folder


def test_the_readme_has_the_verdict_on_the_release():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    verdict = ranking(BUNDLED).verdict
    said = "**{}**: {}".format(*verdict.parts)
    assert f"{report.BEGIN}\n\n{said}\n\n{report.END}" in text, "run: make leaderboard"


@released
def test_the_docs_show_the_release_and_how_well_it_predicts(bundled):
    board = leaderboard(bundled)
    text = (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8")
    assert report.docs_block(board, bundled) in text, "run: make leaderboard"


@released
def test_the_table_of_the_release_is_that_of_its_tables(bundled):
    made = statistics.leaderboard(bundled.models, bundled.heterogeneity, bundled.gaps, num_draws=9)
    # Intervals take all draws, and are compared where a release is made and checked.
    key, of_draws = list(KEYS["leaderboard"]), ["ci_low", "ci_high"]
    made, stored = (
        board.drop(columns=of_draws).sort_values(key, ignore_index=True)
        for board in (made, leaderboard(bundled))
    )
    pd.testing.assert_frame_equal(made, stored, check_dtype=False)


def test_every_stage_of_a_model_with_biases_is_compared_by_its_weights(tmp_path):
    from spectra_db.heterogeneity import metrics

    rows = spectra_db.load("spectra", source=_perceptron(tmp_path), model="p")
    later = rows.assign(stage="final", train_run="adamw-seed1")
    store.write(tmp_path, "spectra", later)
    store.write(tmp_path, "heterogeneity", metrics(later))
    # Someone took the weights alone at initialisation, and a spectrum in float64 too.
    alone = rows[rows["block_kind"] != "bias"].assign(partition="weights")
    store.write(tmp_path, "heterogeneity", metrics(alone))
    store.write(tmp_path, "spectra", later.assign(dtype="float64"))
    found = tables.read(tmp_path).heterogeneity
    assert set(found["partition"]) == {"weights"}
    js0 = found[(found["metric"] == "js0") & (found["scale"] == "own_rms")].set_index("stage")
    assert js0.loc["final", "corrected"] == pytest.approx(js0.loc["init", "corrected"])


def test_a_model_without_a_comparable_spectrum_at_initialisation_says_so(folder):
    for model, change in (("m0", {"stage": "final"}), ("m1", {"partition": "all"})):
        path = store.path_of(folder, "heterogeneity", model)
        rows = spectra_db.load("heterogeneity", source=folder, model=model)
        path.unlink()
        store.write(folder, "heterogeneity", rows.assign(**change))
    pending = tables.read(folder).pending.set_index("model")["reason"]
    assert pending["m0"] == "no spectrum at initialisation yet"
    assert pending["m1"] == "no spectrum of partition weights yet"


def test_one_family_has_no_intervals_and_the_sentences_none_of_nan():
    gaps = np.r_[np.linspace(0, 0.05, 4), np.linspace(0.2, 0.3, 4)]
    parts = made_up({"js0": np.exp(-gaps)}, gaps, ["a"] * 8)
    board, measured = statistics.leaderboard(*parts), statistics.measurements(*parts)
    assert report.ranking(board)[0]["spearman"].value == -1
    assert "nan" not in " ".join(report.sentences(board, measured))


def test_gaps_at_the_edge_of_a_grid_are_named(folder):
    said = json.loads(call("--source", folder, "--json").stdout)["statements"]
    assert not any("edge" in sentence for sentence in said)
    gaps = spectra_db.load("gaps", source=folder).set_index("model")
    gaps.loc[["m6", "m7"], "at_edge"] = True
    gaps.loc["m7", ["sgd_loss", "gap"]] = [gaps.loc["m7", "init_loss"], 1.0]
    store.write(folder, "gaps", gaps.reset_index())
    said = json.loads(call("--source", folder, "--json").stdout)["statements"]
    [sentence] = [sentence for sentence in said if "edge" in sentence]
    assert sentence.startswith("In 2 of 8 models a best learning rate is at the edge")
    assert "could change the gap: m6, m7. In m7 SGD diverged at every rate" in sentence


def test_docs_of_tables_that_predict_nothing_say_so(tmp_path):
    store.write(tmp_path, "models", [model_row("m0", tier="demo")])
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n", encoding="utf-8")
    result = call("--source", tmp_path, "--docs", page)
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert "No model can be predicted from other families yet." in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{report.END}\n{report.BEGIN}\n".encode(), "and after it a line"),
        (b"\xff\xfe", "no UTF-8 text"),
    ],
)
def test_a_page_that_has_no_part_to_write_is_refused(folder, tmp_path, content, message):
    page = tmp_path / "README.md"
    page.write_bytes(content)
    result = call("--source", folder, "--docs", page)
    assert result.exit_code == 2
    assert message in result.stderr
    assert page.read_bytes() == content


@pytest.mark.parametrize("sign", ["=", "+", "-", "@"])
def test_a_spreadsheet_takes_no_text_for_a_formula(folder, tmp_path, sign):
    store.write(folder, "models", [model_row("late", status="pending", reason=f"{sign}1+1")])
    data = tables.read(folder)
    board = statistics.leaderboard(data.models, data.heterogeneity, data.gaps, num_draws=5)
    export(data, board, tmp_path / "out")
    pending = pd.read_csv(tmp_path / "out" / "leaderboard" / "pending.csv", index_col="model")
    assert pending.loc["late", "reason"] == f"'{sign}1+1"
    assert pd.read_csv(tmp_path / "out" / "leaderboard" / "leaderboard.csv")["value"].dtype == float
