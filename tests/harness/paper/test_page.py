from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from harness.cli import main
from harness.errors import UserError
from harness.paper import claims, page, result
from harness.paper.result import Result
from harness.paper.sections import SECTIONS

STATUSES = {claims.REPRODUCED, claims.PARTLY, claims.NOT_REPRODUCED, claims.NOT_TESTED}


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.replace("\\|", "/").strip("| ").split(" | ")]
            for line in lines[1:]]  # fmt: skip


def test_every_claim_has_a_section_that_decides_it():
    assert {claim.section for claim in claims.CLAIMS} <= set(SECTIONS)


def test_without_results_every_claim_is_not_tested_and_names_the_command(tmp_path):
    rows = table_rows(page.render(tmp_path))
    assert len(rows) == len(claims.CLAIMS)
    for cells in rows:
        assert len(cells) == 6
        assert all(cells)
        assert cells[4] == f"**{claims.NOT_TESTED}**"
        assert cells[5].startswith("`harness paper ")


def test_what_a_release_lacks_is_said_in_the_cell(tmp_path):
    result.save("fig8", Result({}, missing=("case1 (needs a GPT)",)), tmp_path)
    [cells] = [c for c in table_rows(page.render(tmp_path)) if c[0] == "Section 3, case 1"]
    assert cells[3] == "not in this release"
    assert cells[5] == "case1 (needs a GPT)"


def test_results_are_the_same_bytes_each_time_and_read_back(tmp_path):
    from matplotlib.figure import Figure

    for name in ("a", "b"):
        figure = Figure()
        figure.subplots().plot([1, 2])
        found = Result({"x": 1 / 3, "inf": float("inf")}, {"fig": figure}, ("m",))
        result.save("s", found, tmp_path / name)
    for file in ("s.json", "fig.svg", "fig.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert result.load("s", tmp_path / "a") == {
        "values": {"x": 0.3333, "inf": "inf"}, "figures": ["fig"], "missing": ["m"],
    }  # fmt: skip
    assert result.load("t", tmp_path / "a") is None


def test_a_result_that_was_altered_is_refused_by_name(tmp_path):
    (tmp_path / "fig8.json").write_text("{")
    with pytest.raises(UserError, match=r"fig8\.json is not a result"):
        result.load("fig8", tmp_path)


def test_a_section_by_the_command_leaves_numbers_figures_and_page(tmp_path):
    answer = CliRunner().invoke(main, ["paper", "table2", "--out", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    assert json.loads((tmp_path / "paper" / "table2.json").read_text())["figures"] == ["table2"]
    assert (tmp_path / "paper" / "table2.svg").stat().st_size > 1000
    assert (tmp_path / "paper" / "table2.png").stat().st_size > 1000
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


def test_on_par_and_worse_are_judged_model_by_model():
    gaps = {"a": {"gap": 0.2, "error": 0.01, "adam_needed": True},
            "b": {"gap": 0.0, "error": 0.01, "adam_needed": False}}  # fmt: skip
    for where in ("Figure 9", "Figure 10"):
        assert judged(where, "", {"models": gaps}) == claims.PARTLY
    assert judged("Figure 10", "", {"models": {"a": gaps["a"]}}) == claims.REPRODUCED
    assert judged("Figure 9", "", {"models": {"a": gaps["a"]}}) == claims.NOT_REPRODUCED
