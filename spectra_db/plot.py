"""Figures of spectra, of distances between blocks, and of training runs.

Every function returns a matplotlib Figure and touches no global state of matplotlib.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spectra_db.densities import SCALES, density
from spectra_db.heterogeneity import pairwise_js
from spectra_db.schema import BEST_RATES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, told apart by the colour-blind.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_KINDS = ("embedding", "query", "key", "value", "mlp", "conv")
# Densities below this are drawn at the floor: less than one eigenvalue of any block.
_FLOOR = 1e-5


def spectra(rows: pd.DataFrame, *, scale: str = "lambda10", sigma: float = 0.05) -> Figure:
    """Draw the smoothed spectral density of each block, on a logarithmic axis.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition.
        scale: What eigenvalues are divided by, as in `spectra_db.density`.
        sigma: Width of the smoothing, in units of the scale.
    """
    from matplotlib.patches import Patch

    _check_columns(rows, "spectra", "block", "block_kind", "status")
    blocks = rows.drop_duplicates("block").set_index("block")
    densities = density(rows, scale=scale, sigma=sigma)
    figure, axes, columns = _panels(blocks, 1.5 * float(densities.to_numpy().max()), scale)
    for ax, (name, block) in zip(axes, blocks.iterrows(), strict=False):
        if block["status"] == "zero":
            ax.text(0.5, 0.5, "exactly zero", transform=ax.transAxes, ha="center", fontsize=8)
        else:
            _draw_density(ax, densities[name], _colour(str(block["block_kind"])))
    kinds = [k for k in _KINDS if k in set(blocks["block_kind"])]
    others = sorted(set(blocks["block_kind"]) - set(_KINDS))
    patches = [Patch(color=_colour(k), alpha=0.6, label=k) for k in kinds]
    if others:
        patches.append(Patch(color=_COLOURS[-1], alpha=0.6, label=", ".join(others)))
    if len(blocks) > 1:
        ncols = 7 if columns > 2 else 3
        figure.legend(
            handles=patches, loc="outside upper left", ncols=ncols, fontsize=8, frameon=False
        )
    return figure


def stages(rows: pd.DataFrame, *, scale: str = "lambda10", sigma: float = 0.05) -> Figure:
    """Draw each block's spectral density at every stage of training, from dark to light.

    Args:
        rows: Rows of table `spectra` of one model and partition at several stages; of some blocks,
            where fewer panels are wanted.
        scale: What eigenvalues are divided by at each stage, as in `spectra_db.density`; `raw`
            shows how they grow.
        sigma: Width of the smoothing, in units of the scale.

    Raises:
        ValueError: The rows of a stage are of several spectra, or there are none.
    """
    from matplotlib import colormaps

    used = ("block", "block_kind", "status", "stage", "progress", "step")
    _check_columns(rows, "spectra", *used)
    order = rows.sort_values(["progress", "step"])["stage"].drop_duplicates()
    parts = {stage: rows[rows["stage"] == stage] for stage in order}
    densities = {stage: density(part, scale=scale, sigma=sigma) for stage, part in parts.items()}
    if not densities:
        raise ValueError("there are no rows; check the filters")
    blocks = rows.drop_duplicates("block").set_index("block")
    top = 1.5 * max(float(values.to_numpy().max()) for values in densities.values())
    figure, axes, _ = _panels(blocks, top, scale)
    # The light end of the map is too pale for a line on white.
    shades = colormaps["viridis"](np.linspace(0, 0.85, len(densities)))
    for shade, (stage, values) in zip(shades, densities.items(), strict=True):
        part = parts[stage]
        zero = set(part.loc[part["status"] == "zero", "block"])
        progress = float(part["progress"].iloc[0])
        lines = []
        for ax, name in zip(axes, blocks.index, strict=False):
            if name in values.columns and name not in zero:
                x, y = _broken(values[name])
                lines += ax.plot(x, y, color=shade, linewidth=1.0)
        if lines:
            share = "" if stage in ("init", "final") else f" ({progress:.0%} of the steps)"
            lines[0].set_label(f"{stage}{share}")
    figure.legend(loc="outside upper left", ncols=min(5, len(axes)), fontsize=8, frameon=False)
    return figure


def js_heatmap(rows: pd.DataFrame, *, scale: str = "lambda10", sigma: float = 0.05) -> Figure:
    """Draw the matrix of Jensen-Shannon distances between the blocks' spectra.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition.
        scale: What eigenvalues are divided by, as in `spectra_db.js0`.
        sigma: Width of the smoothing, in units of the scale.
    """
    from matplotlib.figure import Figure

    distances = pairwise_js(rows, scale=scale, sigma=sigma)
    count = len(distances)
    size = max(4.5, 0.19 * count + 2.6)
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    ax = figure.subplots()
    # From 0 to the largest: models whose blocks are alike would be all of one colour up to 1.
    image = ax.imshow(distances, cmap="cividis", vmin=0)
    labels = _short(list(distances.columns))
    ax.set_xticks(range(count), labels, rotation=90, fontsize=7)
    ax.set_yticks(range(count), labels, fontsize=7)
    figure.colorbar(image, ax=ax, label="Jensen-Shannon distance", shrink=0.7)
    return figure


def training_curves(rows: pd.DataFrame, gaps: pd.DataFrame | None = None) -> Figure:
    """Draw the minibatch loss of a model's runs of the lowest seed, the grid's: SGD and AdamW.

    Args:
        rows: Rows of table `training` of one model.
        gaps: Rows of table `gaps`: the rates that the model's gap is taken at are drawn thick. None
            where they are not to be told.

    Raises:
        ValueError: The rows are of several models, or of another table.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    models = sorted(rows["model"].unique()) if "model" in rows else []
    if len(models) > 1:
        raise ValueError(f"the rows are of several models ({', '.join(models[:4])}); select one")
    used = ("model", "seed", "metric", "step", "split", "diverged", "optimizer", "lr", "value")
    _check_columns(rows, "training", *used)
    seed = rows["seed"].min()
    losses = rows[(rows["metric"] == "loss") & (rows["seed"] == seed)].sort_values("step")
    ours = None if gaps is None else gaps[gaps["model"].isin(models)]
    losses = losses[losses["split"] == "batch"]
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, optimizer, colour in zip(axes, ("sgd", "adamw"), _COLOURS, strict=False):
        rates = () if ours is None else ours[BEST_RATES[optimizer]].to_numpy()
        ax.set_title({"sgd": "SGD with momentum", "adamw": "AdamW"}[optimizer], fontsize=10)
        ax.set_xlabel("step")
        for lr, run in losses[losses["optimizer"] == optimizer].groupby("lr"):
            best = lr in rates
            style = {"linewidth": 2.2} if best else {"linewidth": 0.9, "alpha": 0.45}
            label = f"learning rate {lr:.3g} (best)" if best else None
            ax.plot(run["step"], run["value"], color=colour, label=label, **style)
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=8, frameon=False)
    if len(losses) and losses["value"].min() > 0:
        ceiling = 1.3 * float(losses.loc[losses["step"] == losses["step"].min(), "value"].max())
        axes[0].set(yscale="log", ylim=(0.8 * float(losses["value"].min()), ceiling))
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("loss of the minibatch")
    return figure


def _check_columns(rows: pd.DataFrame, table: str, *columns: str) -> None:
    """Raise ValueError if rows are not whole rows of a table."""
    if absent := [column for column in columns if column not in rows]:
        raise ValueError(f"the rows have no column {absent[0]!r}; pass whole rows of table {table}")


def _panels(blocks: pd.DataFrame, top: float, scale: str) -> tuple[Figure, list[Axes], int]:
    """Return a figure with a titled panel per block, density logarithmic, and its columns."""
    from matplotlib.figure import Figure

    columns = min(4 if len(blocks) <= 24 else 8, len(blocks))
    shape = (ceil(len(blocks) / columns), columns)
    # A single panel is drawn larger; it stands alone.
    size = (5.2, 3.4) if len(blocks) == 1 else (2.6 * columns, 1.9 * shape[0] + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True).ravel()
    axes[0].set(yscale="log", ylim=(_FLOOR, top))
    axes[0].set_xscale("symlog", linthresh=1, linscale=0.7)
    axes[0].xaxis.set_major_formatter(lambda value, position: f"{value:g}".replace("-", "−"))
    kinds = blocks["block_kind"].astype(str)
    for ax, title, kind in zip(axes, _short(list(blocks.index)), kinds, strict=False):
        ax.set_title(_title(title, kind), fontsize=8)
        ax.tick_params(labelsize=7)
    for ax in axes[len(blocks) - columns : len(blocks)]:
        ax.tick_params(labelbottom=True)
    for ax in axes[len(blocks) :]:
        ax.set_axis_off()
    unit = "eigenvalue" if scale == "raw" else f"eigenvalue / {SCALES[scale].meaning}"
    figure.supxlabel(unit, fontsize=9)
    figure.supylabel("density", fontsize=9)
    return figure, list(axes), columns


def _broken(values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return a density's points above the floor, with nan where the line is to break."""
    x, y = values.index.to_numpy(), np.maximum(values.to_numpy(), _FLOOR)
    spacing = np.diff(x).min()
    drawn = np.convolve(y > _FLOOR, [True, True, True], mode="same") > 0
    x, y = x[drawn], y[drawn]
    gaps = np.flatnonzero(np.diff(x) > 1.5 * spacing) + 1
    return np.insert(x, gaps, np.nan), np.insert(y, gaps, np.nan)


def _draw_density(ax: Axes, values: pd.Series, colour: str) -> None:
    """Fill the area under a density, broken where the lattice has gaps."""
    x, y = _broken(values)
    ax.fill_between(x, _FLOOR, y, color=colour, alpha=0.35, linewidth=0)
    ax.plot(x, y, color=colour, linewidth=0.9)


def _colour(kind: str) -> str:
    return _COLOURS[_KINDS.index(kind)] if kind in _KINDS else _COLOURS[-1]


def _title(name: str, kind: str) -> str:
    """Name a panel; a bare index or an unnamed block says little without its kind."""
    if name == "__full__":
        return "all parameters"
    return f"{name} ({kind})" if len(name) <= 4 else name


def _short(names: list[str], length: int = 32) -> list[str]:
    """Shorten blocks' names to about `length`: layer numbers and last parts tell them apart.

    What all names begin with goes; then parts are cut to their first letters, the first part first.
    """
    split = [name.replace(".weight", "").split(".") for name in names]
    shared = 0
    if len(split) > 1:
        while len({tuple(parts[: shared + 1]) for parts in split}) == 1:
            shared += 1
            if any(len(parts) <= shared + 1 for parts in split):
                break
    shorter = []
    for parts in (parts[shared:] for parts in split):
        for kept in (3, 1):
            for i, part in enumerate(parts[:-1]):
                if len(".".join(parts)) > length and not part.isdigit():
                    parts[i] = part[:kept]
        name = ".".join(parts)
        shorter.append(name if len(name) <= length else f"{name[:8]}…{name[9 - length :]}")
    return shorter
