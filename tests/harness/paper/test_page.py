from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from harness.cli import main
from harness.errors import UserError
from harness.paper import claims, page, result
from harness.paper.result import Result
from harness.paper.sections import SECTIONS, TITLES, run


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.replace("\\|", "/").strip("| ").split(" | ")]
            for line in lines[1:]]  # fmt: skip


def test_every_claim_has_a_section_that_decides_it():
    assert {claim.section for claim in claims.CLAIMS} <= set(SECTIONS)


def test_without_results_every_claim_is_not_tested_and_names_the_command(tmp_path):
    rows = table_rows(page.render(tmp_path, TITLES))
    assert len(rows) == len(claims.CLAIMS)
    for cells in rows:
        assert len(cells) == 6
        assert all(cells)
        assert cells[4] == f"**{claims.NOT_TESTED}**"
        assert cells[5].startswith("`harness paper ")


def test_what_a_release_lacks_is_said_in_the_cell(tmp_path):
    result.save("fig8", Result({}, missing=("case1 (needs a GPT)",)), tmp_path)
    [cells] = [c for c in table_rows(page.render(tmp_path, TITLES)) if c[0] == "Section 3, case 1"]
    assert cells[3] == "not in this release"
    assert cells[5] == "case1 (needs a GPT)"


def test_results_are_the_same_bytes_each_time_and_read_back(tmp_path):
    from matplotlib.figure import Figure

    for name in ("a", "b"):
        figure = Figure()
        figure.subplots().plot([1, 2])
        found = Result({"x": 1 / 3, "inf": float("inf")}, {"fig": figure}, ("m",))
        result.save("s", found, tmp_path / name)
    for file in ("s.json", "fig.svg"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert result.load("s", tmp_path / "a") == {
        "values": {"x": 0.3333, "inf": "inf"}, "figures": ["fig.svg"], "missing": ["m"],
    }  # fmt: skip
    assert result.load("t", tmp_path / "a") is None


def test_a_figure_of_many_lines_is_a_png_in_the_place_of_what_was_an_svg(tmp_path):
    from matplotlib.figure import Figure

    for count, name in ((1, "fig.svg"), (300, "fig.png")):
        figure = Figure()
        ax = figure.subplots()
        for k in range(count):
            ax.plot([k * (i % 7) for i in range(100)])
        result.save("s", Result({}, {"fig": figure}), tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {name, "s.json"}
        assert json.loads((tmp_path / "s.json").read_text())["figures"] == [name]


def test_a_result_that_was_altered_is_refused_by_name(tmp_path):
    (tmp_path / "fig8.json").write_text("{")
    with pytest.raises(UserError, match=r"fig8\.json is not a result"):
        result.load("fig8", tmp_path)


@pytest.mark.slow
def test_a_section_by_the_command_leaves_numbers_figures_and_page(tmp_path):
    answer = CliRunner().invoke(main, ["paper", "table2", "--out", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    assert json.loads((tmp_path / "paper" / "table2.json").read_text())["figures"] == ["table2.svg"]
    assert (tmp_path / "paper" / "table2.svg").stat().st_size > 1000
    rows = [c for c in table_rows((tmp_path / "paper.md").read_text()) if c[0] == "Table 2"]
    assert [c[4] for c in rows] == [f"**{claims.REPRODUCED}**"] * 2


def test_an_unknown_section_is_refused_with_the_known_ones(tmp_path):
    answer = CliRunner().invoke(main, ["paper", "fig99", "--out", str(tmp_path)])
    assert answer.exit_code == 2
    assert "no section 'fig99'" in answer.stderr
    assert "fig8" in answer.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_not_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    answer = CliRunner().invoke(main, ["paper", "fig12", "--out", str(tmp_path / "file" / "x")])
    assert answer.exit_code == 2
    assert "can't be written to" in answer.stderr


def judged(where: str, text: str, values: dict) -> str:
    [claim] = [c for c in claims.CLAIMS if c.where == where and text in c.text]
    return claims.verdict(claim, {"values": values, "missing": []})[0]


@pytest.mark.parametrize(
    ("cnn", "transformer", "p_value", "status"),
    [
        ((0.1, 0.2), (0.3, 0.4), 0.2, claims.REPRODUCED),
        ((0.1, 0.35), (0.3, 0.4), 0.01, claims.PARTLY),
        ((0.1, 0.35), (0.3, 0.4), 0.2, claims.NOT_REPRODUCED),
    ],
)
def test_heterogeneity_is_judged_by_separation_then_by_rank_test(cnn, transformer, p_value, status):
    found = {
        "cnn": dict(zip("ab", cnn, strict=True)),
        "transformer": dict(zip("cd", transformer, strict=True)),
        "p_value": p_value,
    }
    assert judged("Figure 4", "(js0)", {"js0": found}) == status


@pytest.mark.parametrize(
    ("probability", "status"),
    [(0.7, claims.REPRODUCED), (0.64, claims.PARTLY), (0.5, claims.NOT_REPRODUCED)],
)
def test_a_probability_is_judged_against_its_error(probability, status):
    values = {"ratio_at_most_1000": {"orthonormal": probability, "gaussian": 0.5}}
    assert judged("After Theorem 1", "r ≤ 1000", values | {"num_draws": 10_000}) == status


def test_on_par_and_worse_are_judged_model_by_model_of_those_that_are_trained():
    def model(answer: str) -> dict:
        return {"answer": answer} | ({"gap": 0.2, "error": 0.01} if answer != "not trained" else {})

    def status(where: str, *answers: str) -> str:
        models = {f"m{i}": model(answer) for i, answer in enumerate(answers)}
        return judged(where, "", {"models": models})

    for where in ("Figure 9", "Figure 10"):
        assert status(where, "yes", "no") == claims.PARTLY
        assert status(where, "yes", "unclear", "unclear", "no") == claims.UNDECIDED
        assert status(where, "not trained", "–") == claims.NOT_TESTED
    assert status("Figure 10", "yes", "not trained") == claims.REPRODUCED
    assert status("Figure 9", "yes", "not trained") == claims.NOT_REPRODUCED
    assert status("Figure 9", "no", "yes", "yes", "unclear") == claims.NOT_REPRODUCED


def sweep(**changes) -> dict:
    row = {"sgd": 0.9, "adamw": 0.95, "sgd_lr": 1e-4, "adamw_lr": 1e-3}
    rows = [row | {"c": c, "sgd_edge": "", "adamw_edge": ""} for c in (1, 2, 3, 4, 5)]
    for changed in rows[2:]:
        changed |= changes
    rising = {"rho": 0.9, "p_value": 0.01}
    values = {"rows": rows, "num_models": 5, "c against gap": rising}
    return values | {"c against accuracy_gap": rising, "c against sgd": {"rho": -1, "p_value": 0}}


def test_a_sweep_whose_grid_ends_is_partly_reproduced_at_most_and_the_edge_is_named():
    [claim] = [c for c in claims.CLAIMS if c.where == "Figure 5" and "SGD falls" in c.text]
    status, _, note = claims.verdict(claim, {"values": sweep(), "missing": []})
    assert (status, "edge" in note) == (claims.REPRODUCED, False)
    status, _, note = claims.verdict(claim, {"values": sweep(sgd_edge="least"), "missing": []})
    assert status == claims.PARTLY
    assert "SGD's best rate is its least one, 0.0001, for c = 3 to 5" in note


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, claims.REPRODUCED),
        ({"sgd_edge": "least"}, claims.PARTLY),
        ({"adamw": 0.1}, claims.PARTLY),  # Adam isn't unaffected
    ],
)
def test_curves_of_the_sweep_are_judged_by_what_adam_keeps_and_sgd_loses(changes, status):
    assert judged("Figure 14", "", sweep(**changes)) == status


def test_table_1_is_not_testable_whatever_agrees_and_the_best_readings_are_named():
    names = [*claims.READINGS, "trace_spread", "w1 lambda10"]
    readings = {n: {"rho": 0.1 * i, "factor": 100.0 - i} for i, n in enumerate(names)}
    values = {"systems": list("abcd"), "ours": {"systems": list("abcd"), "readings": readings}}
    [claim] = [c for c in claims.CLAIMS if c.where == "Table 1"]
    status, ours, note = claims.verdict(claim, {"values": values, "missing": []})
    assert status == claims.NOT_TESTABLE
    assert ours.endswith("w1 lambda10 ρ = 0.50; trace_spread ρ = 0.40")
    assert all(name in ours for name in claims.READINGS)
    assert note.startswith("definition unpublished")
    assert "nearest in size is w1 lambda10, off by a factor of 95" in note


def case_values(**changes) -> dict:
    draws = {"gradient_descent": 15000.0, "adam": 50.0, "ratio": 300.0, "ratio_q10": 40.0}
    draws |= {"ratio_q90": 900.0}
    steps = {"steps_gd": 15000.0, "steps_adam099": 15000.0}
    for key, value in changes.items():
        (steps if key in steps else draws)[key] = value
    names = ("case1", "case2", "case3", "case4")
    return {
        **dict.fromkeys(names, steps),
        "draws": dict.fromkeys(names, draws),
        "tolerance": 1e-6,
        "num_draws": 100,
    }


@pytest.mark.parametrize(
    ("case", "changes", "status"),
    [
        ("case 3", {}, claims.REPRODUCED),
        ("case 3", {"ratio_q10": 0.5}, claims.PARTLY),
        ("case 1", {"ratio": 0.2, "ratio_q10": 0.02}, claims.NOT_REPRODUCED),
        ("case 1", {"ratio": 0.2, "ratio_q10": 0.02, "steps_adam099": 5000.0}, claims.PARTLY),
        ("case 1", {"ratio": 0.2, "ratio_q10": 0.02, "steps_adam099": "inf"},
         claims.NOT_REPRODUCED),
        ("case 4", {"ratio": 1.5}, claims.REPRODUCED),
        ("case 4", {"ratio": 0.01}, claims.PARTLY),  # a hundred times slower isn't alike
        ("case 4", {"ratio": 0.01, "steps_adam099": "inf"}, claims.NOT_REPRODUCED),
    ],
)  # fmt: skip
def test_quadratic_cases_are_judged_on_both_sides_and_for_both_decays(case, changes, status):
    assert judged(f"Section 3, {case}", "", case_values(**changes)) == status


def test_more_than_half_of_the_gap_must_be_so_by_two_standard_errors():
    def values(error: float) -> dict:
        share = {"closed": {"value": 0.55, "error": error}}
        return {"models": {"m": {"sgd_gap": {"value": 0.1}, "init, p = 1": share}}}

    assert judged("Beyond the paper", "", values(0.02)) == claims.REPRODUCED
    assert judged("Beyond the paper", "", values(0.06)) == claims.NOT_REPRODUCED


def test_notes_say_what_the_numbers_say_and_not_what_they_once_said():
    def note(where: str, text: str, values: dict) -> str:
        [claim] = [c for c in claims.CLAIMS if c.where == where and text in c.text]
        return claims.verdict(claim, {"values": values, "missing": []})[2]

    ratio = {"ratio_at_most_1000": {"orthonormal": 0.5, "gaussian": 0.66}, "num_draws": 10_000}
    assert "fits better" not in note("After Theorem 1", "r ≤ 1000", ratio)
    milder = {"q10": [0.1] * 3, "median": [0.5] * 3, "q90": [20.0] * 3, "mean": [0.6] * 3}
    assert "worse in 0 of 3" in note("After Theorem 1", "multiplies", {"preconditioned": milder})
    names = ("N(0, 0.02²), at the start", "N(0, 0.02²), trained", "torch's, at the start",
             "torch's, trained")  # fmt: skip
    everywhere = {name: {"diagonal_over_others": 50.0} for name in names}
    assert "holds in 4 of 4" in note("Figure 2", "", everywhere)


def test_a_condition_number_far_from_the_papers_in_every_block_is_not_reproduced():
    values = {"q10": [50.0] * 3, "median": [60.0] * 3, "q90": [70.0] * 3, "mean": [60.0] * 3}
    status = judged("After Theorem 1", "multiplies", {"preconditioned": values})
    assert status == claims.NOT_REPRODUCED


def test_a_folder_that_can_not_be_written_is_refused_before_anything_is_computed(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("harness.paper.sections.run", lambda *_: pytest.fail("it was computed"))
    (tmp_path / "file").write_text("")
    answer = CliRunner().invoke(main, ["paper", "fig12", "--out", str(tmp_path / "file" / "x")])
    assert answer.exit_code == 2
    assert "--out" in answer.stderr


def test_a_measurement_of_another_shape_is_refused_by_its_folder(tmp_path):
    folder = tmp_path / "paper" / "blockdiagonal"
    folder.mkdir(parents=True)
    (folder / "mlp-mnist-init.json").write_text('{"model": "mlp-mnist"}')
    source = tmp_path / "nowhere"
    with pytest.raises(UserError, match="blockdiagonal holds what is no measurement; delete it"):
        run("blockdiagonal", source, tmp_path)


def test_a_figure_that_fails_leaves_the_old_one(tmp_path):
    from matplotlib.figure import Figure

    class Broken(Figure):
        def savefig(self, file, **options):
            file.write(b"half")
            raise OSError(28, "No space left on device")

    (tmp_path / "fig.svg").write_text("old")
    with pytest.raises(UserError, match="No space left"):
        result.save("s", Result({}, {"fig": Broken()}), tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("fig.svg", "old")]


def test_nan_is_a_dash_in_a_table():
    assert [page._number(x) for x in (None, "nan", 0.12345)] == ["–", "–", "0.123"]


def test_what_is_not_in_the_release_is_explained_only_where_something_is_not(tmp_path):
    needs = "needs the spectra of the named entries"
    assert needs not in page.render(tmp_path, TITLES)
    result.save("fig8", Result({}, missing=("case1 (needs a GPT)",)), tmp_path)
    assert needs in page.render(tmp_path, TITLES)
