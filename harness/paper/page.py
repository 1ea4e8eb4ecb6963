"""docs/paper.md: claims beside our numbers, then the sections; and docs/mlp-sweep.md, a study.

Generated whole, never edited.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from harness.errors import UserError
from harness.paper import claims, result
from spectra_db.files import whole


def write(out: Path, titles: Mapping[str, str]) -> Path:
    """Write OUT/paper.md from the JSON files in OUT/paper, and the study of the sweep if measured.

    Args:
        out: The folder.
        titles: Name of a section ↦ what it shows, in the order of the page.

    Raises:
        UserError: A file can't be written.
    """
    path, folder = out / "paper.md", out / "paper"
    _write(path, render(folder, titles))
    sweep = result.load("sweep", folder)
    if sweep is not None and sweep["values"]:
        _write(out / "mlp-sweep.md", _template("mlp-sweep.md").render(**sweep))
    return path


def render(folder: Path, titles: Mapping[str, str]) -> str:
    """Return the page."""
    records = {name: result.load(name, folder) for name in titles}
    rows = []
    for claim in claims.CLAIMS:
        status, ours, note = claims.verdict(claim, records[claim.section])
        rows.append({"claim": claim, "status": status, "ours": ours, "note": note})
    sections = {name: {"title": title, "record": records[name]} for name, title in titles.items()}
    counts = Counter(row["status"] for row in rows)
    return _template("paper.md").render(
        rows=rows, counts=counts, statuses=claims.STATUSES, sections=sections
    )


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("harness.paper"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = _cell
    environment.filters["number"] = _number
    return environment.get_template(name)


def _write(path: Path, text: str) -> None:
    try:
        with whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error


def _number(value: float | str | None) -> str:
    """Write a number; a dash for none, and for nan, which JSON has as a text."""
    return "–" if value is None or isinstance(value, str) else f"{value:.3g}"


def _cell(value: Any) -> str:
    """Make a text fit a cell of a Markdown table."""
    text = "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ").strip() or "–"
