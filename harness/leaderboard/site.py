"""The site: static pages that show the dataset and the leaderboard, also from file://."""

from __future__ import annotations

import json
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

import spectra_db
from harness import registry
from harness.errors import UserError
from harness.leaderboard import docs, model_page, preview, report, standings
from harness.leaderboard.board import leaderboard
from harness.leaderboard.export import export
from harness.leaderboard.ranking import ranking
from harness.leaderboard.standings import short
from harness.leaderboard.statistics import measurements
from harness.leaderboard.tables import Dataset, natural_key, read
from harness.training import gap as protocol_1
from harness.training import speedup as protocol_2
from spectra_db import card, manifest, project, store
from spectra_db.heterogeneity import LEADING, METRICS, is_leading
from spectra_db.loading import folder_of
from spectra_db.schema import TABLES
from spectra_db.words import ANSWERS, in_order

_STATIC = Path(__file__).parent / "static"
# Above which Adam is needed, of the gap and of the log2 speed-up.
_THRESHOLDS = {"gap": protocol_1.THRESHOLD, "speedup": protocol_2.THRESHOLD}


def build(source: Path | str | None, out: Path, docs_folder: Path | None = None) -> Path:
    """Write `index.html`, a page per model, and what they need, into a folder.

    Args:
        source: Folder of tables, id of a dataset on the Hub, or None for the bundled release.
        out: Folder to write to. The tables are copied there for download, unless it is the source
            itself.
        docs_folder: Folder of Markdown files that become pages, such as `docs.DOCS`; None for none.

    Returns:
        The path of the first page.

    Raises:
        NotFound: The source has no table `models`.
        UserError: The folder can't be written to.
    """
    data = read(source)
    joined = measurements(data.models, data.heterogeneity, data.gaps)
    board = leaderboard(data)
    folder = folder_of(source, paths=[manifest.NAME, *standings.FILES])
    models = _models(data, joined, folder)
    found = ranking(folder)
    release = manifest.read(folder)
    shown = standings.of_entries(found)
    _add_speedups(models, shown)
    for part in (out, out / "models", out / "data" / "models"):
        try:
            part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{part} can't be made: {error.strerror}") from error
    shutil.copytree(_STATIC, out / "static", dirs_exist_ok=True)
    export(data, board, out)
    pages = docs.pages(docs_folder) if docs_folder else []
    environment = _environment(data, pages)
    if docs_folder:
        citation = docs_folder.with_name("CITATION.cff")
        if citation.is_file():
            shutil.copyfile(citation, out / citation.name)
            environment.globals["citation"] = citation.name
        docs.copy_figures(docs_folder, out / "docs")
        for page in pages:
            _write(out / "docs" / f"{page.name}.html", environment, "doc.html", {"page": page})
    with_page = [model for model in models if model["has_page"]]
    for model in with_page:
        ours = joined[joined["model"] == model["model"]]
        _write_model(model, models, ours, data.runs, source, environment, out)
    archive = [model for model in models if model["tier"] not in standings.SPEEDUP_TIERS]
    pages_of = {model["model"] for model in with_page}
    shown = [row | {"has_page": row["model"] in pages_of} for row in shown]
    if project.SITE:
        preview.write(out, found.verdict, shown)
    verified = [model["model"] for model in archive if model["provenance"] == "verified"]
    _write(out / "index.html", environment, "index.html", {
        "models": archive,
        "verified": verified,
        "sentences": report.sentences(board, joined),
        "num_pending": len(data.pending),
        "has_board": len(board) > 0,
        "stages": in_order(joined["stage"]),
        "bibtex": card.bibtex(release.version if release else None),
        "verdict": found.verdict,
        "measures": standings.measure_table(found.verdict.measures),
        "pairs": standings.pair_table(found),
        "entries": shown,
        "measured": standings.points(shown),
        "example": _example(archive),
        "claims": _claims(pages),
        "thresholds": _THRESHOLDS,
    })  # fmt: skip
    _write_js(out / "data" / "index.js", index_data(archive, joined, board, shown))
    _write(out / "compare.html", environment, "compare.html", {"models": models})
    return out / "index.html"


def _example(models: list[dict[str, Any]]) -> str | None:
    """Return a model to look at first: of those that lack nothing the one of most blocks."""
    measured = [m for m in models if m["js0"] is not None]
    whole = [m for m in measured if not m["missing"] and m["needed"] in ANSWERS]
    return max(whole or measured, key=lambda m: m["num_blocks"], default={}).get("model")


def index_data(
    models: list[dict[str, Any]],
    joined: pd.DataFrame,
    board: pd.DataFrame,
    shown: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return what the first page's script needs.

    `points` has, per stage and reading, rows of [index of the model, estimate, standard error];
    `board` has table `leaderboard` without the rows of families left out, as rows of `columns`;
    `entries` are the standings of protocol 2, `measured` those with J and speed-up.
    """
    order = {model["model"]: i for i, model in enumerate(models)}
    points: dict[str, dict[str, list[list[float | None]]]] = {}
    known = joined[joined["model"].isin(set(order))]
    for (stage, metric, scale), rows in known.groupby(["stage", "metric", "scale"]):
        measured = zip(rows["model"], rows["estimate"], rows["standard_error"], strict=True)
        found = [[order[m], short(x), short(e)] for m, x, e in measured]
        points.setdefault(str(stage), {})[f"{metric}:{scale}"] = found
    whole = board[board["left_out"] == ""]
    columns = ["stage", "metric", "scale", "statistic", "value", "ci_low", "ci_high"]
    columns += ["num_models", "num_families", "num_products"]
    rows = json.loads(whole[columns].to_json(orient="values", double_precision=15))
    keys = ("model", "family", "gap", "low", "high", "needed", "enters")
    return {
        "models": [{key: model[key] for key in keys} for model in models],
        "entries": shown,
        "measured": standings.points(shown),
        "points": points,
        "columns": columns,
        "board": rows,
        "labels": report.LABELS,
        "leading": LEADING,
        "scales": report.SCALE_WORDS,
        "statistics": report.COLUMNS,
        "thresholds": _THRESHOLDS,
    }


def _environment(data: Dataset, pages: list[docs.Page]) -> jinja2.Environment:
    """Return the templates with what every page shows."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("harness.leaderboard"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda x: f"{x:,}" if x else "–"
    environment.filters["signed"] = lambda x: f"{x:.3f}".replace("-", "−")
    environment.filters["p_value"] = lambda p: "–" if pd.isna(p) else f"{p:.2g}"
    environment.filters["value"] = lambda x: "–" if pd.isna(x) else f"{x:.2f}".replace("-", "−")
    environment.globals |= {
        "updated": data.updated,
        "protocol_version": spectra_db.PROTOCOL_VERSION,
        "pages": {page.name: page for page in pages},
        "project_links": _project_links(),
        "site": project.SITE,
        "preview": preview,
    }
    return environment


def _project_links() -> dict[str, str]:
    """Return the project's addresses as its package names them; none where it isn't installed."""
    try:
        found = metadata.metadata("hessian-spectra").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return {}
    return dict(line.split(", ", 1) for line in found)


def _write(path: Path, environment: jinja2.Environment, name: str, facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(name).render(**facts), encoding="utf-8")


def _claims(pages: list[docs.Page]) -> str:
    """Return how many of the paper's claims came to what, as its page counts them."""
    body = next((page.body for page in pages if page.name == "paper"), "")
    found = re.search(r"<p>(\d+ reproduced, .*?)</p>", body)
    return found[1] if found else ""


def _write_model(
    model: dict[str, Any],
    models: list[dict[str, Any]],
    ours: pd.DataFrame,
    all_runs: pd.DataFrame,
    source: Path | str | None,
    environment: jinja2.Environment,
    out: Path,
) -> None:
    name = model["model"]
    weights_alone = set(ours["partition"]) == {"weights"}
    charts = model_page.charts(name, model["tier"], source, weights_alone=weights_alone)
    charts["standing"] = model_page.standing(model, models)
    _write_js(out / "data" / "models" / f"{name}.js", {"model": name, **charts})
    runs = all_runs[all_runs["model"] == name].sort_values("started")
    _write(out / "models" / f"{name}.html", environment, "model.html", {
        "m": model,
        "charts": charts,
        "metrics": _metric_table(ours),
        "without_biases": weights_alone and any(b["kind"] == "bias" for b in charts["blocks"]),
        "runs": runs.to_dict("records"),
        "downloads": _downloads(name, source, out),
        "stages": in_order([*ours["stage"], *charts["spectra"], *charts["failed"]]),
    })  # fmt: skip


def _models(data: Dataset, joined: pd.DataFrame, folder: Path) -> list[dict[str, Any]]:
    """Return what the pages say of each model."""
    js0 = joined[(joined["metric"] == "js0") & is_leading(joined)]
    js0 = js0[js0["stage"] == "init"].set_index("model")
    gaps = data.gaps[data.gaps["status"] == "ok"].set_index("model")
    measured = set(joined["model"]) | set(data.runs["model"]) | set(data.gaps["model"])
    measured |= {path.stem for path in (folder / "trials").glob("*.parquet")}
    entering = set(joined.loc[joined["enters"], "model"])
    said = {entry.name: entry.description for entry in registry.entries()}
    models = []
    for row in sorted(data.models.to_dict("records"), key=lambda row: natural_key(row["model"])):
        name = row["model"]
        columns = {
            "gap": "gap", "low": "ci_low", "high": "ci_high", "from_r": "gap_from_reference",
            "from_r_low": "gap_from_reference_low", "from_r_high": "gap_from_reference_high",
        }  # fmt: skip
        facts: dict[str, Any] = dict.fromkeys((*columns, "needed", "js0", "speedup"))
        facts |= {"enters": name in entering, "has_page": name in measured}
        facts["description"] = said.get(name, "")
        if name in gaps.index:
            gap = gaps.loc[name]
            facts |= {key: short(float(gap[column])) for key, column in columns.items()}
            facts["needed"] = report.answer(gap)
        if name in js0.index:
            facts["js0"] = short(js0.loc[name, "estimate"])
            facts["js0_error"] = short(js0.loc[name, "standard_error"])
        models.append({str(key): value for key, value in row.items()} | facts)
    return models


def _add_speedups(models: list[dict[str, Any]], shown: list[dict[str, Any]]) -> None:
    """Give each entry that is complete its speed-up, with its interval."""
    complete = {row["model"]: row for row in shown if row["y"] is not None}
    for model in models:
        if row := complete.get(model["model"]):
            model |= {key: row[key] for key in ("speedup", "needed")}


def _metric_table(joined: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a row per reading, with estimate and error at each stage."""
    table = []
    for (metric, scale), rows in joined.groupby(["metric", "scale"], sort=False):
        measured = zip(rows["stage"], rows["estimate"], rows["standard_error"], strict=True)
        cells = {stage: _with_error(value, error) for stage, value, error in measured}
        products = int(rows["num_products"].iloc[0])
        label = report.LABELS.get(str(metric), str(metric))
        words = report.SCALE_WORDS.get(str(scale), str(scale))
        table.append({"label": label, "scale": words, "num_products": products, **cells})
    order = [metric.meaning for metric in METRICS.values()]
    return sorted(table, key=lambda row: order.index(row["label"]))


def _with_error(value: float, error: float) -> str:
    """Write a value with two digits of its error, or four of its own."""
    if not 1e-6 * abs(value) < error < abs(value):
        return f"{value:.4g}"
    digits = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _downloads(name: str, source: Path | str | None, out: Path) -> list[tuple[str, str]]:
    """Return the model's tables and their links from its page, copied if they lie elsewhere."""
    folder = folder_of(source, paths=[f"*/{name}.parquet"])
    elsewhere = folder.resolve() != out.resolve()
    found = []
    for table in TABLES:
        path = store.path_of(folder, table, name)
        if not path.is_file():
            continue
        link = f"tables/{table}/{path.name}" if elsewhere else f"{table}/{path.name}"
        if elsewhere:
            (out / link).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / link)
        found.append((table, f"../{link}"))
    return found


def _write_js(path: Path, content: dict[str, Any]) -> None:
    """Write data as a script: a page from file:// may not fetch, but it may load scripts."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    path.write_text(f"window.DATA={text};\n", encoding="utf-8")
