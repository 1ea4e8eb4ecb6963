"""The verdict as a picture: for README, and what a link to the site shows where it is posted."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.leaderboard import standings
from harness.leaderboard.verdict import Verdict
from harness.training.speedup import THRESHOLD
from spectra_db import plot
from spectra_db.files import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "preview.png"
SIZE = (1200, 630)  # pixels: what Open Graph's readers show whole
_QUESTION = "Does a network's Hessian tell beforehand that it needs Adam?"
_LINES = 8  # of speed-ups, as many as fit below the verdict
_TEXT, _RANKED, _REFERENCE = "#1c1e21", "#0b57a4", "#6e7b8b"


@plot.style()
def write(folder: Path, verdict: Verdict, shown: list[dict[str, Any]]) -> None:
    """Draw the verdict and the entries that are measured, with J once `standings.points` has it.

    Args:
        folder: Where the picture goes, as NAME.
        verdict: What it says.
        shown: As `standings.of_entries` returns them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0] / 100, SIZE[1] / 100))
    answer, reasons = verdict.parts
    lines = textwrap.wrap(reasons, 88, max_lines=3, placeholder=" …")
    for y, text, size, weight, colour in (
        (0.93, _QUESTION, 20, "bold", _TEXT),
        (0.83, f"{answer}:", 20, "bold", _RANKED),
        (0.745, "\n".join(lines), 16, "normal", _TEXT),
    ):
        figure.text(0.04, y, text, size=size, weight=weight, va="top", color=colour)
    figure.text(0.96, 0.03, "Hessian Spectra", size=15, ha="right", color=_REFERENCE)
    known = [row for row in shown if row["y"] is not None]
    if known:
        both = standings.points(shown)
        ax = figure.add_axes((0.09 if both else 0.2, 0.14, 0.86 if both else 0.74, 0.4))
        _draw(ax, both, known[:_LINES])
    figure.savefig(folder / NAME, dpi=100)


@plot.style()
def draw(path: Path, shown: list[dict[str, Any]]) -> None:
    """Draw the entries that are measured alone, for a page that has the words.

    Args:
        path: The picture, a PNG.
        shown: As `standings.of_entries` returns them.

    Raises:
        UserError: It can't be written.
    """
    from matplotlib.figure import Figure

    known = [row for row in shown if row["y"] is not None]
    both = standings.points(shown)
    height = 5 if both else 0.9 + 0.36 * len(known)
    figure = Figure(figsize=(9, height), layout="constrained")
    _draw(figure.add_subplot(), both, known)
    try:
        with whole(path) as part:
            figure.savefig(part, format="png", dpi=100)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error


def _draw(ax: Axes, both: list[dict[str, Any]], known: list[dict[str, Any]]) -> None:
    (_draw_both if both else _draw_speedups)(ax, both or known)
    ax.tick_params(labelsize=13)


def _draw_both(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Draw J against speed-up, a family named at its first point."""
    named: set[str] = set()
    known = [row[key] for row in rows for key in ("y", "low", "high") if row[key] is not None]
    ax.set_ylim(min(known) - 0.15, max(known) + 0.15)
    for row in rows:
        ax.errorbar(row["J"], row["y"], _ends(row), row["J_error"], **_marker(row))
        if row["family"] not in named:
            at = (row["J"], row["y"])
            ax.annotate(row["family"], at, xytext=(6, 5), textcoords="offset points", size=12)
        named.add(row["family"])
    ax.axhline(THRESHOLD, color="black", linestyle="--", linewidth=0.8)
    ax.set_xlabel("J: JS⁰ of raw eigenvalues at initialisation", size=14)
    ax.set_ylabel("log₂ of SGD's steps\nover AdamW's", size=14)


def _draw_speedups(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Draw a line for each entry, the largest speed-up above."""
    for i, row in enumerate(rows):
        ax.errorbar(row["y"], -i, xerr=_ends(row), **_marker(row))
    ax.set_yticks([-i for i in range(len(rows))], [row["model"] for row in rows])
    ax.set(xlim=(-2.1, 2.1), ylim=(0.6 - max(len(rows), 1), 0.6))
    ax.set_xticks([-2, -1, 0, 1, 2], ["4×", "2×", "as many", "2×", "4×"])
    ax.axvline(0, color="black", linewidth=0.8)
    ax.axvline(THRESHOLD, color="black", linestyle="--", linewidth=0.8)
    ax.set_xlabel("← steps that AdamW needs more · that SGD needs more →", size=14)


def _ends(row: dict[str, Any]) -> list[list[float]]:
    """Return how far the interval goes down and up: out of the picture where it has no bound.

    Not at all where y lies beyond that end.
    """
    low, high = row["low"], row["high"]
    beyond = 10.0
    return [
        [beyond if low is None else max(row["y"] - low, 0.0)],
        [beyond if high is None else max(high - row["y"], 0.0)],
    ]


def _marker(row: dict[str, Any]) -> dict[str, Any]:
    """Return how a point is drawn: filled if it is ranked, open if a reference."""
    colour = _RANKED if row["ranked"] else _REFERENCE
    face = colour if row["ranked"] else "white"
    return {"fmt": "o", "color": colour, "markersize": 9, "markerfacecolor": face, "capsize": 3}
