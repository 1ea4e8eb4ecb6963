"""What a section of the paper leaves: numbers as JSON, figures as SVG or, where large, PNG."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from spectra_db.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Digits that are kept: more would differ between processors.
_DIGITS = 4
_MAX_SVG = 150_000  # bytes


@dataclass(frozen=True)
class Result:
    """Hold what came of a section.

    Attributes:
        values: Numbers, texts and lists of them.
        figures: Name of the file -> figure.
        missing: What it would show but is not in the release, a text each.
    """

    values: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


def save(name: str, result: Result, out: Path) -> None:
    """Write OUT/NAME.json and each figure; the same result gives the same bytes.

    Raises:
        UserError: The folder can't be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = [_save_figure(figure, out / stem) for stem, figure in result.figures.items()]
        record = {"figures": sorted(files), "missing": list(result.missing)}
        write_json(out / f"{name}.json", record | {"values": result.values})
    except OSError as error:
        raise UserError(f"{out} can't be written to: {error.strerror}") from error


def load(name: str, out: Path) -> dict[str, Any] | None:
    """Return what `save` wrote of a section, None where it was not computed.

    Raises:
        UserError: The file is not what `save` writes.
    """
    path = out / f"{name}.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {key: record[key] for key in ("values", "figures", "missing")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result of `harness paper`; delete it") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, numbers rounded to a few significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(value), indent=1, ensure_ascii=False)
    with whole(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _save_figure(figure: Figure, stem: Path) -> str:
    """Write STEM.svg, or STEM.png where many lines make that large; return the file's name."""
    import matplotlib as mpl

    content = BytesIO()
    with mpl.rc_context({"svg.hashsalt": stem.name}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    kinds = [".svg", ".png"]
    if len(content.getvalue()) > _MAX_SVG:
        content = BytesIO()
        figure.savefig(content, format="png", dpi=300, metadata={"Software": None})
        kinds.reverse()
    path, other = (stem.with_name(stem.name + kind) for kind in kinds)
    with whole(path) as temporary:
        temporary.write_bytes(content.getvalue())
    other.unlink(missing_ok=True)
    return path.name


def rounded(value: Any) -> Any:
    """Round floats to significant digits; what is not finite becomes a text, as JSON has none.

    >>> rounded({"a": [0.123456, 3], "b": float("inf")})
    {'a': [0.1235, 3], 'b': 'inf'}
    """
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else str(value)
    return value
