"""The site: static pages that show the dataset and the leaderboard, also from file://."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

import spectra_db
from harness.errors import UserError
from harness.leaderboard import model_page, report
from harness.leaderboard.export import export
from harness.leaderboard.statistics import leaderboard, measurements
from harness.leaderboard.tables import Dataset, natural_key, read
from spectra_db import store
from spectra_db.loading import folder_of
from spectra_db.schema import TABLES
from spectra_db.words import STAGES

_STATIC = Path(__file__).parent / "static"
_DIGITS = 6


def build(source: Path | str | None, out: Path) -> Path:
    """Write `index.html`, a page per model, and what they need, into a folder.

    Args:
        source: Folder of tables, id of a dataset on the Hub, or None for the bundled release.
        out: Folder to write to. The tables are copied there for download, unless it is the source
            itself.

    Returns:
        The path of the first page.

    Raises:
        NotFound: The source has no table `models`.
        UserError: The folder can't be written to.
    """
    data = read(source)
    board = leaderboard(data.models, data.heterogeneity, data.gaps)
    for folder in (out, out / "models", out / "data" / "models"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} can't be made: {error.strerror}") from error
    shutil.copytree(_STATIC, out / "static", dirs_exist_ok=True)
    export(data, board, out)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("harness.leaderboard"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda x: f"{x:,}" if x else "–"
    environment.filters["signed"] = lambda x: f"{x:.3f}".replace("-", "−")
    joined = measurements(data.models, data.heterogeneity, data.gaps)
    models = _models(data, joined)
    shared = {"updated": data.updated, "protocol_version": spectra_db.PROTOCOL_VERSION}
    page = environment.get_template("index.html").render(
        models=models,
        sentences=report.sentences(board, joined),
        num_pending=len(data.pending),
        has_board=len(board) > 0,
        stages=[s for s in STAGES if s in set(joined["stage"])],
        **shared,
    )
    _write_js(out / "data" / "index.js", index_data(models, joined, board))
    for model in models:
        if not model["has_page"]:
            continue
        name = model["model"]
        ours = joined[joined["model"] == name]
        weights_alone = set(ours["partition"]) == {"weights"}
        charts = model_page.charts(name, model["tier"], source, weights_alone=weights_alone)
        _write_js(out / "data" / "models" / f"{name}.js", charts)
        runs = data.runs[data.runs["model"] == name].sort_values("started")
        html = environment.get_template("model.html").render(
            m=model,
            charts=charts,
            metrics=_metric_table(ours),
            without_biases=weights_alone and any(b["kind"] == "bias" for b in charts["blocks"]),
            runs=runs.to_dict("records"),
            downloads=_downloads(name, source, out),
            stages=STAGES,
            **shared,
        )
        (out / "models" / f"{name}.html").write_text(html, encoding="utf-8")
    path = out / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def index_data(
    models: list[dict[str, Any]], joined: pd.DataFrame, board: pd.DataFrame
) -> dict[str, Any]:
    """Return what the first page's script needs.

    `points` has, per stage and reading, rows of [index of the model, estimate, standard error];
    `board` has table `leaderboard` without the rows of families left out, as rows of `columns`.
    """
    order = {model["model"]: i for i, model in enumerate(models)}
    points: dict[str, dict[str, list[list[float | None]]]] = {}
    for (stage, metric, scale), rows in joined.groupby(["stage", "metric", "scale"]):
        measured = zip(rows["model"], rows["estimate"], rows["standard_error"], strict=True)
        found = [[order[m], _short(x), _short(e)] for m, x, e in measured]
        points.setdefault(str(stage), {})[f"{metric}:{scale}"] = found
    whole = board[board["left_out"] == ""]
    columns = ["stage", "metric", "scale", "statistic", "value", "ci_low", "ci_high"]
    columns += ["num_models", "num_families", "num_products"]
    rows = json.loads(whole[columns].to_json(orient="values", double_precision=15))
    keys = ("model", "family", "tier", "task", "gap", "low", "high", "needed", "enters")
    return {
        "models": [{key: model[key] for key in keys} for model in models],
        "points": points,
        "columns": columns,
        "board": rows,
        "labels": report.LABELS,
        "statistics": report.COLUMNS,
    }


def _models(data: Dataset, joined: pd.DataFrame) -> list[dict[str, Any]]:
    """Return what the pages say of each model."""
    js0 = joined[(joined["metric"] == "js0") & (joined["scale"] == "lambda10")]
    js0 = js0[js0["stage"] == "init"].set_index("model")
    gaps = data.gaps[data.gaps["status"] == "ok"].set_index("model")
    measured = set(joined["model"]) | set(data.runs["model"]) | set(data.gaps["model"])
    entering = set(joined.loc[joined["enters"], "model"])
    models = []
    for row in sorted(data.models.to_dict("records"), key=lambda row: natural_key(row["model"])):
        name = row["model"]
        columns = {
            "gap": "gap", "low": "ci_low", "high": "ci_high", "from_r": "gap_from_reference",
            "from_r_low": "gap_from_reference_low", "from_r_high": "gap_from_reference_high",
        }  # fmt: skip
        facts: dict[str, Any] = dict.fromkeys((*columns, "needed", "js0"))
        facts |= {"enters": name in entering, "has_page": name in measured}
        if name in gaps.index:
            gap = gaps.loc[name]
            facts |= {key: _short(float(gap[column])) for key, column in columns.items()}
            facts["needed"] = report.answer(gap)
        if name in js0.index:
            facts["js0"] = _short(js0.loc[name, "estimate"])
            facts["js0_error"] = _short(js0.loc[name, "standard_error"])
        models.append({str(key): value for key, value in row.items()} | facts)
    return models


def _metric_table(joined: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a row per reading, with estimate and error at each stage."""
    table = []
    for (metric, scale), rows in joined.groupby(["metric", "scale"], sort=False):
        at = rows.set_index("stage")
        cells = {
            stage: _with_error(at.loc[stage, "estimate"], at.loc[stage, "standard_error"])
            for stage in at.index
        }
        products = int(rows["num_products"].iloc[0])
        label = report.LABELS.get(str(metric), str(metric))
        table.append({"label": label, "scale": scale, "num_products": products, **cells})
    return table


def _with_error(value: float, error: float) -> str:
    """Write a value with two digits of its error, or four of its own."""
    if not 1e-6 * abs(value) < error < abs(value):
        return f"{value:.4g}"
    digits = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _downloads(name: str, source: Path | str | None, out: Path) -> list[tuple[str, str]]:
    """Return the model's tables and their links from its page, copied if they lie elsewhere."""
    folder = folder_of(source, paths=[f"*/{name}.parquet"])
    found = []
    for table in TABLES:
        path = store.path_of(folder, table, name)
        if not path.is_file():
            continue
        if folder.resolve() != out.resolve():
            target = out / "tables" / table / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            found.append((table, f"../tables/{table}/{path.name}"))
        else:
            found.append((table, f"../{table}/{path.name}"))
    return found


def _write_js(path: Path, content: dict[str, Any]) -> None:
    """Write data as a script: a page from file:// may not fetch, but it may load scripts."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    path.write_text(f"window.DATA={text};\n", encoding="utf-8")


def _short(value: float) -> float | None:
    """Round to six digits; None for nan."""
    return float(f"{value:.{_DIGITS}g}") if value == value else None
