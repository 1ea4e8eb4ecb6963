"""What figures of the paper share: panels of one width, heat maps with few ticks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spectra_db import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


def panels(
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = plot.WIDTH,
    used: int | None = None,
    **options: Any,
) -> tuple[Figure, Any]:
    """Return a figure and its axes, row by row; those after the first `used` are left empty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for ax in axes[len(axes) if used is None else used :]:
        ax.set_axis_off()
    return figure, axes


def heat_map(ax: Axes, matrix: Any, **options: Any) -> AxesImage:
    """Draw a matrix over pairs of blocks."""
    from matplotlib.ticker import MaxNLocator

    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    return ax.imshow(matrix, cmap="cividis", **options)
