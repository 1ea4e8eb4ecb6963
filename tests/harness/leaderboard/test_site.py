from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from harness.errors import UserError
from harness.leaderboard.site import build
from spectra_db import store
from spectra_db.load import NotFound
from spectra_db.schema import TABLES


def spectrum_rows(model: str) -> list[dict[str, object]]:
    """Return rows of two sampled blocks of different shape, and an exact one."""
    generator = np.random.default_rng(0)
    shared = {
        "model": model, "stage": "init", "init_seed": 1, "train_run": "", "partition": "weights",
        "operator": "hessian", "norm_mode": "eval", "dtype": "float32",
        "probe_distribution": "gaussian", "batch_hash": "0", "protocol_version": 1, "run_id": "r",
        "step": 0, "progress": 0.0, "probe_seed": 0, "reorthogonalized": False,
        "breakdown": False, "num_products": 5, "seconds": 0.1, "microbatch_size": 8,
        "batch_size": 8, "num_terms": 8, "data_source": "none", "matmul_precision": "highest",
        "device": "cpu", "status": "ok",
    }  # fmt: skip
    rows = []
    for block, kind, power in (("layers.10.w", "conv", 1), ("layers.2.w", "conv", 3)):
        for probe in range(3):
            nodes = np.sort(generator.normal(size=5) ** power)
            slq = {"method": "slq", "num_steps": 5, "alphas": [0.0] * 5, "betas": [1.0] * 5}
            rule = {"nodes": nodes.tolist(), "weights": [0.2] * 5, "num_params": 2000}
            rows.append(shared | slq | rule | {"block": block, "block_kind": kind, "probe": probe})
    exact = {"method": "exact", "num_steps": 0, "alphas": [], "betas": [], "probe": 0}
    rule = {"nodes": [0.0, 1.0], "weights": [0.5, 0.5], "num_params": 2}
    return [*rows, shared | exact | rule | {"block": "embed.w", "block_kind": "embedding"}]


def model_row(model: str, **changes: object) -> dict[str, object]:
    return {
        "model": model, "family": "cnn", "tier": "demo", "task": "digits", "num_params": 4002,
        "num_blocks": 3, "source": "ours", "licence": "Apache-2.0", "reference": "a <paper>",
        "status": "ok", "protocol_version": 1,
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Return the page of one complete model, a pending one, and one whose spectrum failed."""
    out = tmp_path_factory.mktemp("site")
    store.write(
        out,
        "models",
        [
            model_row("good"),
            model_row("late", num_params=0, num_blocks=0, status="pending", reason="no data"),
            model_row("bad"),
        ],
    )
    store.write(out, "spectra", spectrum_rows("good"))
    failed = {"nodes": [], "weights": [], "alphas": [], "betas": [], "status": "failed"}
    [row] = [row for row in spectrum_rows("bad") if row["method"] == "exact"]
    store.write(out, "spectra", [row | failed | {"reason": "out of memory"}])
    gap = {"model": "good", "protocol_version": 1, "gap": 0.25, "standard_error": 0.01}
    gap |= {"ci_low": 0.2, "ci_high": 0.3, "at_edge": False, "num_lrs": 5, "num_seeds": 3}
    store.write(out, "gaps", [gap | {"adam_needed": True, "status": "ok"}])
    curves = [
        {
            "model": "good", "optimizer": optimizer, "lr": 0.1, "seed": 0, "step": step,
            "split": split, "metric": "loss", "protocol_version": 1, "value": 2.0 - step / 10,
            "diverged": False,
        }
        for optimizer in ("sgd", "adamw")
        for split, step in (("train", 0), ("batch", 0), ("batch", 5), ("train", 10))
    ]  # fmt: skip
    store.write(out, "training", curves)
    return build(out, out)


class Links(HTMLParser):
    """Gathers what a page refers to, and the images without a text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: list[str] = []
        self.silent: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.targets += [found[key] for key in ("href", "src") if key in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag == "img" and len(found.get("alt") or "") < 20:
            self.silent.append(found["src"])


def test_everything_the_page_shows_lies_beside_it(page):
    links = Links(page)
    local = [target for target in links.targets if not target.startswith(("#", "https://arxiv"))]
    assert len([target for target in local if target.endswith(".svg")]) == 3
    assert all((page.parent / target).is_file() for target in local)
    assert all(t[1:] in links.ids for t in links.targets if t.startswith("#"))


def test_the_page_asks_nothing_of_the_network(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|iframe)|@import|url\(|src=\"http", text)


def test_every_figure_has_a_text_for_those_who_do_not_see_it(page):
    assert Links(page).silent == []


def test_the_table_gives_js0_and_the_gap_with_intervals(page):
    text = page.read_text(encoding="utf-8")
    row = re.search(r'<tr><td class="name"><a href="#good">.*?</tr>', text, re.DOTALL)
    assert row is not None
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row.group())[1:]
    assert cells[:3] == ["cnn", "4,002", "3"]
    assert re.fullmatch(r"\d\.\d{3} \[-?\d\.\d{3}, \d\.\d{3}\]", cells[3])
    assert cells[4:] == ["0.250 [0.200, 0.300]", "yes"]


def test_what_failed_or_is_pending_says_why(page):
    text = page.read_text(encoding="utf-8")
    assert "pending: no data" in text
    assert "Failed: out of memory" in text


def test_text_from_tables_is_escaped(page):
    assert "a &lt;paper&gt;" in page.read_text(encoding="utf-8")


def test_blocks_stand_in_the_order_of_the_network(page):
    figure = (page.parent / "figures" / "good-init-blocks.svg").read_text(encoding="utf-8")
    titles = re.findall(r"<!-- (embed|layers)\.(\w+)", figure)
    assert titles == [("embed", "w"), ("layers", "2"), ("layers", "10")]


def test_the_same_tables_give_the_same_page(page, tmp_path):
    again = build(page.parent, tmp_path)
    for figure in sorted((page.parent / "figures").iterdir()):
        assert (tmp_path / "figures" / figure.name).read_bytes() == figure.read_bytes()
    assert "good.parquet" in page.read_text(encoding="utf-8")
    assert "good.parquet" not in again.read_text(encoding="utf-8")  # the tables are elsewhere


def test_of_several_spectra_of_a_stage_the_standard_one_of_the_lowest_seed_is_shown(page, tmp_path):
    first = spectrum_rows("good")
    store.write(tmp_path, "models", [model_row("good")])
    for changes in ({"init_seed": 5}, {"dtype": "bfloat16"}, {"norm_mode": "train"}, {}):
        odd = {"nodes": [-1.0, 1.0], "weights": [0.5, 0.5]} if changes else {}
        exact = [row | odd if row["method"] == "exact" else row for row in first]
        store.write(tmp_path, "spectra", [row | changes for row in exact])
    build(tmp_path, tmp_path)
    name = "figures/good-init-js.svg"
    assert (tmp_path / name).read_bytes() == (page.parent / name).read_bytes()


def test_a_source_without_models_is_refused(tmp_path):
    with pytest.raises(NotFound, match="no table models"):
        build(tmp_path, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_an_out_that_is_a_file_is_refused(page, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be made"):
        build(page.parent, tmp_path / "file")


def test_every_table_has_a_name_the_page_can_link(page):
    linked = {target.split("/")[0] for target in Links(page).targets if "parquet" in target}
    assert linked == {"models", "spectra", "training", "gaps"}
    assert linked <= set(TABLES)
