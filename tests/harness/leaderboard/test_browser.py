"""The site in a real browser, opened from file://."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest

from harness import registry
from harness.leaderboard import site
from harness.leaderboard.report import ranking
from harness.leaderboard.site import build
from harness.leaderboard.statistics import leaderboard
from harness.leaderboard.tables import read
from harness.registry.ranked import PAIRS
from spectra_db import store
from tests.harness.leaderboard.tables import gap_row, made_up, metric_row, model_row
from tests.harness.leaderboard.test_ranking import folder  # noqa: F401
from tests.harness.leaderboard.test_site import (  # noqa: F401
    page,
    spectrum_rows,
    tables_folder,
)

pytestmark = pytest.mark.slow  # a browser and pages of its own


def column(tab_page, table: str, number: int) -> list[str]:
    return tab_page.eval_on_selector_all(
        f"#{table} tbody tr:not([hidden])",
        f"rows => rows.map(r => r.cells[{number}]?.textContent.trim() ?? '')",
    )


def numbers(cells: list[str]) -> list[float]:
    known = [c.replace("−", "-").split()[0] for c in cells if c and c[0] not in "–p"]
    return [float(c.replace(",", "")) for c in known]


def test_a_click_on_a_head_sorts_by_number_and_a_second_one_turns_it(tab, page):  # noqa: F811
    shown = tab.open(page)
    head = shown.locator("#models th", has_text="SGD-Adam gap")
    head.locator("button").click()
    falling = column(shown, "models", 5)
    assert numbers(falling) == sorted(numbers(falling), reverse=True)
    assert len(numbers(falling)) == 9
    assert falling[0][0] != "p"  # what is pending comes last
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").click()
    rising = column(shown, "models", 5)
    assert numbers(rising) == sorted(numbers(rising))
    assert rising[0][0] != "p"


def test_the_keyboard_alone_sorts_selects_and_opens_a_model(tab, page):  # noqa: F811
    shown = tab.open(page)
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.textContent") == "Skip to the content"
    head = shown.locator("#models th button", has_text="family")
    head.focus()
    shown.keyboard.press("Enter")
    families = column(shown, "models", 1)
    assert families == sorted(families)
    shown.locator("#reading").focus()
    shown.keyboard.press("ArrowDown")
    assert shown.locator("#reading").input_value() == "w1:lambda10"
    shown.locator("#scatter svg a").first.focus()
    shown.keyboard.press("Enter")
    shown.wait_for_url("**/models/*.html")


def test_search_and_filters_narrow_the_table(tab, page):  # noqa: F811
    shown = tab.open(page)
    every = len(column(shown, "models", 0))
    shown.fill("#search", "GOOD")
    assert column(shown, "models", 0) == ["good"]
    assert shown.inner_text("#count").startswith("1 of ")
    shown.fill("#search", "")
    shown.select_option("#family", "c")
    assert column(shown, "models", 0) == ["m4", "m5"]
    shown.select_option("#family", "")
    shown.select_option("#show", "pending")
    pending = column(shown, "models", 0)
    assert {"late", "bad"} <= set(pending)
    assert "m0" not in pending
    assert len(pending) + 9 == every


def test_measure_stage_and_family_choose_what_the_scatter_shows(tab, page):  # noqa: F811
    shown = tab.open(page)
    assert shown.locator("#scatter svg a").count() == 9
    assert "Spearman" in shown.inner_text("#statistics")
    shown.select_option("#reading", "w1:lambda10")
    assert shown.locator("#scatter svg a").count() == 8
    assert shown.get_by_role("link", name=re.compile("^m0: Wasserstein-1")).count() == 1
    shown.select_option("#scatter-family", "a")
    assert shown.locator("#scatter svg a").count() == 2
    shown.select_option("#scatter-family", "")
    shown.select_option("#reading", "js0:own_rms")
    shown.select_option("#stage", "final")
    assert shown.locator("#scatter svg a").count() == 1
    assert shown.url.endswith("stage=final")
    assert "measure at final" in shown.inner_text("#ranking thead").lower()


def test_an_address_with_a_fragment_opens_that_view(tab, page):  # noqa: F811
    shown = tab.open(page, "#reading=w1%3Alambda10&stage=init")
    assert shown.locator("#reading").input_value() == "w1:lambda10"
    shown = tab.open(page, "#reading=nothing&stage=nowhere")
    assert shown.locator("#stage").input_value() == "init"


def test_the_browser_shows_the_numbers_of_the_command(tab, page, tables_folder):  # noqa: F811
    data = read(tables_folder)
    rows = ranking(leaderboard(data.models, data.heterogeneity, data.gaps))
    # Nothing is established that would rank them: by name, what needs no spectrum last.
    rows.sort(key=lambda row: (row["label"].startswith("dummy"), row["label"].lower()))
    shown = tab.open(page)
    assert column(shown, "ranking", 0) == [row["label"] for row in rows]
    for number, statistic in enumerate(
        ("spearman", "kendall", "pearson_log", "spearman_families", "partial_spearman"), start=2
    ):
        cells = column(shown, "ranking", number)
        expected = [row[statistic].value for row in rows]
        # Undefined where size alone orders the gaps.
        assert [cell == "–" for cell in cells] == [bool(np.isnan(v)) for v in expected]
        known = [value for value in expected if not np.isnan(value)]
        assert numbers(cells) == pytest.approx(known, abs=0.00501)


def test_a_point_leads_to_its_model_and_back(tab, page):  # noqa: F811
    shown = tab.open(page)
    # By the name that a screen reader says, which has the numbers too.
    name = re.compile(r"^good: JS⁰ 0\.600 ± 0\.01, gap 0\.250")
    shown.locator("#scatter").get_by_role("link", name=name).click()
    shown.wait_for_url("**/models/good.html")
    assert shown.inner_text("h1") == "good"
    shown.get_by_role("link", name="Models", exact=True).click()
    shown.wait_for_url("**/index.html#models-title")


def test_a_models_page_draws_spectra_distances_and_curves(tab, page):  # noqa: F811
    shown = tab.open(page.parent / "models" / "good.html")
    shown.wait_for_selector("#spectra svg")
    assert shown.locator("#spectra figcaption").all_inner_texts() == [
        "embed.w (embedding)",
        "layers.2.w (conv)",
        "layers.10.w (conv)",
    ]
    lines = "#spectra figure:first-child [aria-label=line] path"
    assert shown.locator(lines).count() == 2
    shown.uncheck("#stages input[value=final]")
    shown.wait_for_selector("#spectra svg")
    assert shown.locator(lines).count() == 1
    assert shown.locator("#heatmap [aria-label=cell] rect").count() == 9
    assert "At init their mean" in shown.inner_text("#heatmap-note")
    shown.select_option("#heatmap-stage", "final")
    assert "At final their mean" in shown.inner_text("#heatmap-note")
    assert shown.locator("#curves svg").count() == 2
    assert "best at learning rate 0.1" in shown.inner_text("#curves")
    assert "at its best learning rate, 0.1, ends at 1.0" in shown.inner_text("#tuned-note")
    assert "JS⁰ at initialisation: 0.6, larger than in 4 of 8 others" in shown.inner_text(
        "#standing"
    )


LONG = [f"transformer.h.{i}.attention.attn.query_key_value.weight" for i in range(12)]


def test_labels_are_whole_and_no_tick_is_cut_off(tab, page, tmp_path):  # noqa: F811
    [row] = [row for row in spectrum_rows("long") if row["method"] == "exact"]
    rules = [{"nodes": [0.0, 1.0 + i], "weights": [0.5, 0.5]} for i in range(len(LONG))]
    store.write(tmp_path, "models", [model_row("long")])
    store.write(tmp_path, "gaps", [gap_row("long", 0.1)])
    blocks = zip(LONG, rules, strict=True)
    store.write(tmp_path, "spectra", [row | rule | {"block": name} for name, rule in blocks])
    build(tmp_path, tmp_path)
    tab.page.set_viewport_size({"width": 390, "height": 800})
    shown = tab.open(tmp_path / "models" / "long.html")
    # Of a heat map with its legend: what would be painted left of the drawing or right of it.
    cut = shown.eval_on_selector_all(
        "#heatmap svg",
        """charts => charts.flatMap(svg => {
          const frame = svg.getBoundingClientRect();
          return [...svg.querySelectorAll("text")].filter(text => {
            const box = text.getBoundingClientRect();
            return box.left < frame.left - 1 || box.right > frame.right + 1;
          }).map(text => text.textContent);
        })""",
    )
    assert cut == []
    labels = shown.locator("#heatmap svg >> nth=-1").text_content()
    assert "3.attention.attn.query_key_value" in labels


@pytest.fixture(scope="module")
def two_pages(tmp_path_factory):
    """Return the site of two models, one of them at two stages."""
    out = tmp_path_factory.mktemp("two")
    for name in ("first", "second"):
        store.write(out, "models", [model_row(name)])
        store.write(out, "gaps", [gap_row(name, 0.1)])
        store.write(out, "heterogeneity", [metric_row(name, "js0", 0.5)])
        stages = {"init": "", "final": "adamw-seed1"} if name == "first" else {"init": ""}
        for stage, run in stages.items():
            changes = {"stage": stage, "train_run": run}
            store.write(out, "spectra", [row | changes for row in spectrum_rows(name)])
    return build(out, out)


def test_two_models_and_two_stages_stand_side_by_side(tab, two_pages):
    shown = tab.open(two_pages.parent / "compare.html")
    shown.wait_for_selector("#heatmaps svg")
    assert shown.inner_text("#said") == "first at init beside second at init."
    panels = shown.locator("#spectra figcaption")
    panels.nth(1).wait_for()
    assert panels.all_inner_texts() == ["embedding", "conv"]
    shown.select_option("#model-b", "first")
    shown.wait_for_function("document.getElementById('stage-b').options.length == 2")
    shown.select_option("#stage-b", "final")
    shown.wait_for_function("document.getElementById('said').textContent.includes('final')")
    shown.locator("#spectra figcaption", has_text="layers.2.w").wait_for()
    assert shown.url.endswith("#a=first:init&b=first:final")
    assert shown.locator("#numbers tbody tr").count() >= 4


def test_an_address_opens_a_comparison(tab, two_pages):
    shown = tab.open(two_pages.parent / "compare.html", "#a=second:init&b=first:final")
    shown.wait_for_selector("#heatmaps svg")
    assert shown.inner_text("#said") == "second at init beside first at final."


def test_the_first_screen_says_the_verdict_and_draws_measure_against_speed_up(
    tab,
    folder,  # noqa: F811
    tmp_path,
):
    names = [entry.name for entry in registry.entries("ranked")]
    shutil.copytree(folder, tmp_path / "in")
    store.write(tmp_path / "in", "models", [model_row(n, tier="ranked") for n in names])
    shown = tab.open(build(tmp_path / "in", tmp_path / "out"))
    assert shown.inner_text(".verdict").startswith("Supported: JS⁰ of raw eigenvalues")
    assert "against J, 18 entries" in shown.get_attribute("#picture svg", "aria-label")
    assert "cifar-vit" in shown.text_content("#picture")
    assert column(shown, "measures", 0)[0] == "JS⁰ of raw eigenvalues (J)"
    assert column(shown, "pairs", 0) == [name for name, *_ in PAIRS]


def test_no_two_families_look_alike(tab, tmp_path, monkeypatch):
    monkeypatch.setitem(leaderboard.__kwdefaults__, "num_draws", 20)  # no interval is looked at
    monkeypatch.setattr(site, "_write_model", lambda *_: None)  # nor a model's page
    families = [f"family-{i}" for i in range(20)]
    x = np.linspace(0.1, 1, 20)
    tables = made_up({"js0": x}, x / 10, families)
    for table, rows in zip(("models", "heterogeneity", "gaps"), tables, strict=True):
        store.write(tmp_path, table, rows)
    shown = tab.open(build(tmp_path, tmp_path / "site"))
    looks = shown.eval_on_selector_all(
        "#scatter [aria-label=dot] path",
        "paths => paths.map(p => `${p.getAttribute('stroke')} ${p.getAttribute('d')}`)",
    )
    assert len(set(looks)) == len(looks) == 20


def test_every_model_page_of_numbers_alone_or_failures_opens(tab, page):  # noqa: F811
    for name in ("m0", "bad"):
        shown = tab.open(page.parent / "models" / f"{name}.html")
        assert shown.inner_text("h1") == name


@pytest.mark.parametrize("where", ["index.html", "models/good.html", "compare.html"])
def test_a_phone_scrolls_downwards_alone(tab, page, where):  # noqa: F811
    tab.page.set_viewport_size({"width": 360, "height": 740})
    shown = tab.open(page.parent / where)
    assert shown.evaluate("document.documentElement.scrollWidth") <= 360


def test_on_a_phone_the_first_column_stays_and_the_results_are_seen(tab, page):  # noqa: F811
    tab.page.set_viewport_size({"width": 390, "height": 800})
    shown = tab.open(page)
    table = shown.locator("#models")
    first = table.locator("tbody th").first
    before = first.bounding_box()
    shown.evaluate("document.querySelector('#models').parentElement.scrollLeft = 200")
    assert first.bounding_box()["x"] == pytest.approx(before["x"], abs=1)
    shown.evaluate("document.querySelector('#models').parentElement.scrollLeft = 0")
    ends = table.locator("thead th").evaluate_all(
        "cells => cells.map(c => c.getBoundingClientRect().right)"
    )
    assert 0 < ends[4] < ends[5] <= 390  # JS⁰ and the gap


def test_names_of_points_do_not_hide_each_other(tab, page):  # noqa: F811
    shown = tab.open(page)
    boxes = shown.locator("#scatter svg [aria-hidden] text").evaluate_all(
        "names => names.map(n => n.getBoundingClientRect()).map(b => [b.x, b.y, b.right, b.bottom])"
    )
    assert len(boxes) == 5  # families
    for i, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:i]:
            apart = right < other[0] or other[2] < left or bottom < other[1] or other[3] < top
            assert apart, (boxes[i], other)


def test_at_1280_the_page_stands_in_the_middle(tab, page):  # noqa: F811
    shown = tab.open(page)
    box = shown.locator("main").bounding_box()
    assert box["x"] == pytest.approx(
        shown.evaluate("document.body.clientWidth") - box["x"] - box["width"], abs=1
    )
    assert box["x"] > 30


def test_dark_mode_is_light_on_dark_and_the_charts_follow(tab, page):  # noqa: F811
    luminance = """selector => {
      const colour = getComputedStyle(document.querySelector(selector));
      const of = c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 765;
      return [of(getComputedStyle(document.body).backgroundColor), of(colour.color)];
    }"""
    for scheme, dark in (("light", False), ("dark", True)):
        tab.page.emulate_media(color_scheme=scheme)
        shown = tab.open(page)
        for selector in ("body", "#scatter svg", "#models th button"):
            back, ink = shown.evaluate(luminance, selector)
            assert abs(back - ink) > 0.6, selector
            assert (back < ink) == dark


def test_those_who_do_not_see_are_told(tab, page):  # noqa: F811
    shown = tab.open(page)
    assert "Scatter of the SGD-Adam gap" in shown.get_attribute(
        "#scatter svg >> nth=-1", "aria-label"
    )
    unnamed = shown.evaluate(
        "[...document.querySelectorAll('input, select, button, a[href]')].filter(e => "
        "!(e.textContent.trim() || e.labels?.length || e.ariaLabel || "
        "e.querySelector('[aria-label]') || e.getAttribute('aria-label'))).length"
    )
    assert unnamed == 0
    assert shown.evaluate("[...document.querySelectorAll('table th')].every(t => t.scope)")
    assert shown.locator("[aria-live=polite]").count() == 2
    assert shown.locator("nav[aria-label=Site] a").count() >= 3


def test_two_hundred_models_are_all_there(tab, tmp_path, monkeypatch):
    monkeypatch.setitem(leaderboard.__kwdefaults__, "num_draws", 20)  # no interval is looked at
    monkeypatch.setattr(site, "_write_model", lambda *_: None)  # nor a model's page
    generator = np.random.default_rng(0)
    x = generator.lognormal(size=200)
    families = [f"family-{i % 15}" for i in range(200)]
    tables = made_up({"js0": x}, 0.1 * np.log(x) + 0.1, families)
    for table, rows in zip(("models", "heterogeneity", "gaps"), tables, strict=True):
        store.write(tmp_path, table, rows)
    shown = tab.open(build(tmp_path, tmp_path / "site"))
    assert shown.locator("#scatter svg a").count() == 200
    shown.select_option("#family", "family-3")
    assert len(column(shown, "models", 0)) == families.count("family-3")
