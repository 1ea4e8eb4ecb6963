"""Figures of spectra, of distances between blocks, and of training runs.

Every function returns a matplotlib Figure in one style, made for a paper of two columns (7 inches)
and for 300 dpi, and leaves matplotlib's global state as it was. Vector files come of
`figure.savefig("name.pdf")` or `.svg`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spectra_db.densities import SCALE, SCALES, SIGMA, check_columns, density
from spectra_db.heterogeneity import pairwise_js
from spectra_db.schema import BEST_RATES
from spectra_db.words import FRACTIONS, in_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe & Ito's palette, told apart by the colour-blind; in grey by dashes and markers. Every
# figure of the project draws the optimizers so, those of the pages too.
OPTIMIZERS = {
    "sgd": ("SGD with momentum", "#0072B2", "--", "o"),
    "adamw": ("AdamW", "#D55E00", "-", "s"),
}
WIDTH = 7.0  # inches, of a page of two columns
_STYLE: dict[Any, Any] = {
    "figure.dpi": 300, "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7, "legend.frameon": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4, "ytick.minor.width": 0.4, "lines.linewidth": 1.0,
    "lines.markersize": 4, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
# A colour for each kind of block, of middle tones that show on white and on black.
KINDS = {
    "embedding": "#0072B2", "position": "#56B4E9", "query": "#D55E00", "key": "#E69F00",
    "value": "#CC79A7", "attention": "#B8860B", "attention_output": "#8C564B", "mlp": "#009E73",
    "conv": "#7B5EC6", "recurrent": "#C0392B", "head": "#6E7B8B", "state": "#008B8B",
    "norm": "#7F9F2F", "bias": "#A9A9A9", "other": "#8A8A8A",
}  # fmt: skip
# The least density that figures and pages show: less than one eigenvalue of any block.
FLOOR = 1e-5


@contextmanager
def style() -> Iterator[None]:
    """Set what all figures share while it is entered: small type, thin lines, 300 dpi."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        yield


@style()
def spectra(rows: pd.DataFrame, *, scale: str = SCALE, sigma: float = SIGMA) -> Figure:
    """Draw the smoothed spectral density of each block, on a logarithmic axis.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition.
        scale: What eigenvalues are divided by, as in `spectra_db.density`.
        sigma: Width of the smoothing, in units of the scale.
    """
    from matplotlib.patches import Patch

    check_columns(rows, "spectra", "block", "block_kind", "status")
    blocks = rows.drop_duplicates("block").set_index("block")
    densities = density(rows, scale=scale, sigma=sigma)
    figure, axes, columns = _panels(blocks, 1.5 * float(densities.to_numpy().max()), scale)
    for ax, (name, block) in zip(axes, blocks.iterrows(), strict=False):
        if block["status"] == "zero":
            ax.text(0.5, 0.5, "exactly zero", transform=ax.transAxes, ha="center")
        else:
            _draw_density(ax, densities[name], _colour(str(block["block_kind"])))
    present = sorted(set(blocks["block_kind"]), key=[*KINDS, *blocks["block_kind"]].index)
    patches = [Patch(color=_colour(k), alpha=0.6, label=k.replace("_", " ")) for k in present]
    if len(blocks) > 1:
        figure.legend(handles=patches, loc="outside upper left", ncols=8 if columns > 2 else 3)
    return figure


@style()
def stages(rows: pd.DataFrame, *, scale: str = SCALE, sigma: float = SIGMA) -> Figure:
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

    used = ("block", "block_kind", "status", "stage")
    check_columns(rows, "spectra", *used)
    parts = {stage: rows[rows["stage"] == stage] for stage in in_order(rows["stage"])}
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
        lines = []
        for ax, name in zip(axes, blocks.index, strict=False):
            if name in values.columns and name not in zero:
                x, y = _broken(values[name])
                lines += ax.plot(x, y, color=shade)
        if lines:
            share = FRACTIONS.get(stage, 1.0) % 1.0
            lines[0].set_label(f"{stage} ({share:.0%} of the steps)" if share else stage)
    figure.legend(loc="outside upper left", ncols=min(5, len(axes)))
    return figure


@style()
def js_heatmap(rows: pd.DataFrame, *, scale: str = SCALE, sigma: float | None = None) -> Figure:
    """Draw the matrix of Jensen-Shannon distances between the blocks' spectra.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition.
        scale: What eigenvalues are divided by, as in `spectra_db.js0`.
        sigma: Width of the smoothing, in units of the scale; None: as in `spectra_db.js0`.
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


@style()
def training_curves(rows: pd.DataFrame, gaps: pd.DataFrame | None = None) -> Figure:
    """Draw the minibatch loss of a model's runs: SGD and AdamW, at every learning rate.

    Thin lines are runs of the lowest seed, the grid's. At the best rates a thick line is the mean
    over the other seeds, which are drawn beside it. Titles say which rates diverged.

    Args:
        rows: Rows of table `training` of one model.
        gaps: Rows of table `gaps`: the rates that the model's gap is taken at are drawn thick. None
            where they are not to be told.

    Raises:
        ValueError: There are no rows, or they are of several models, or of another table.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    models = sorted(rows["model"].unique()) if "model" in rows else []
    if len(models) > 1:
        raise ValueError(f"the rows are of several models ({', '.join(models[:4])}); select one")
    used = ("model", "seed", "metric", "step", "split", "diverged", "optimizer", "lr", "value")
    check_columns(rows, "training", *used)
    if rows.empty:
        raise ValueError("there are no rows; check the filters")
    losses = rows[(rows["metric"] == "loss") & (rows["split"] == "batch")].sort_values("step")
    first = losses["seed"] == losses["seed"].min()
    ours = None if gaps is None else gaps[gaps["model"].isin(models)]
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (optimizer, (title, colour, dashes, _)) in zip(axes, OPTIMIZERS.items(), strict=True):
        rates = () if ours is None else ours[BEST_RATES[optimizer]].to_numpy()
        of_it = losses["optimizer"] == optimizer
        diverged = losses.loc[of_it & losses["diverged"].eq(True), "lr"].unique()
        said = ", ".join(f"{lr:.3g}" for lr in sorted(diverged))
        ax.set_title(title + (f" (diverged at {said})" if said else ""))
        ax.set_xlabel("step")
        for lr, run in losses[of_it].groupby("lr"):
            grid = run[first.loc[run.index]]
            further = run[~first.loc[run.index]] if lr in rates else run.iloc[:0]
            for _, one in [*grid.groupby("seed"), *further.groupby("seed")]:
                ax.plot(one["step"], one["value"], color=colour, linewidth=0.6, alpha=0.45)
            if lr in rates:
                seeds = further if len(further) else grid
                mean = seeds.groupby("step")["value"].mean()
                count = f", {seeds['seed'].nunique()} seeds" if len(further) else ""
                ax.plot(
                    mean.index, mean, dashes, color=colour, linewidth=1.8,
                    label=f"learning rate {lr:.3g} (best{count})",
                )  # fmt: skip
        if ax.get_legend_handles_labels()[1]:
            ax.legend()
    if len(losses) and losses["value"].min() > 0:
        ceiling = 1.3 * float(losses.loc[losses["step"] == losses["step"].min(), "value"].max())
        low = 0.8 * float(losses["value"].min())
        axes[0].set(yscale="log", ylim=(low, ceiling))
        narrow = ceiling < 10 * low  # too narrow for ticks at powers of ten
        axes[0].yaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("loss of the minibatch")
    return figure


def _panels(blocks: pd.DataFrame, top: float, scale: str) -> tuple[Figure, list[Axes], int]:
    """Return a figure with a titled panel per block, density logarithmic, and its columns."""
    from matplotlib.figure import Figure

    columns = min(4 if len(blocks) <= 24 else 8, len(blocks))
    shape = (ceil(len(blocks) / columns), columns)
    # A single panel is drawn larger; it stands alone.
    width = WIDTH if columns >= 4 else WIDTH / 4 * columns + 0.2
    size = (3.4, 2.3) if len(blocks) == 1 else (width, 1.2 * shape[0] + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True).ravel()
    axes[0].set(yscale="log", ylim=(FLOOR, top))
    axes[0].set_xscale("symlog", linthresh=1, linscale=0.7)
    axes[0].xaxis.set_major_formatter(lambda value, position: f"{value:g}".replace("-", "−"))
    kinds = blocks["block_kind"].astype(str)
    for ax, title, kind in zip(axes, _short(list(blocks.index)), kinds, strict=False):
        ax.set_title(_title(title, kind), fontsize=7 if columns <= 4 else 4.5)
        if columns > 4:
            ax.tick_params(labelsize=5)
    for ax in axes[len(blocks) - columns : len(blocks)]:
        ax.tick_params(labelbottom=True)
    for ax in axes[len(blocks) :]:
        ax.set_axis_off()
    unit = "eigenvalue" if scale == "raw" else f"eigenvalue / {SCALES[scale].meaning}"
    figure.supxlabel(unit, fontsize=8)
    figure.supylabel("density", fontsize=8)
    return figure, list(axes), columns


def _broken(values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return a density's points above the floor, with nan where the line is to break."""
    x, y = values.index.to_numpy(), np.maximum(values.to_numpy(), FLOOR)
    spacing = np.diff(x).min()
    drawn = np.convolve(y > FLOOR, [True, True, True], mode="same") > 0
    x, y = x[drawn], y[drawn]
    gaps = np.flatnonzero(np.diff(x) > 1.5 * spacing) + 1
    return np.insert(x, gaps, np.nan), np.insert(y, gaps, np.nan)


def _draw_density(ax: Axes, values: pd.Series, colour: str) -> None:
    """Fill the area under a density, broken where the lattice has gaps."""
    x, y = _broken(values)
    ax.fill_between(x, FLOOR, y, color=colour, alpha=0.35, linewidth=0)
    ax.plot(x, y, color=colour, linewidth=0.9)


def _colour(kind: str) -> str:
    return KINDS.get(kind, KINDS["other"])


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
    levels = zip(*(parts[:-1] for parts in split), strict=False)
    same = takewhile(lambda level: len(set(level)) == 1, levels)
    shared = len(list(same)) if len(split) > 1 else 0
    shorter = []
    for parts in (parts[shared:] for parts in split):
        for kept in (3, 1):
            for i, part in enumerate(parts[:-1]):
                if len(".".join(parts)) > length and not part.isdigit():
                    parts[i] = part[:kept]
        name = ".".join(parts)
        shorter.append(name if len(name) <= length else f"{name[:8]}…{name[9 - length :]}")
    return shorter
