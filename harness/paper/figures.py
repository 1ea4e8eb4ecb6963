"""Figures 1, 3 to 7, 9, 10 and 14 and Table 1, from the dataset alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu, spearmanr

from harness import registry
from harness.leaderboard import report, statistics, tables
from harness.paper import release
from harness.paper.claims import READINGS
from harness.paper.drawing import heat_map, panels
from harness.paper.result import Result
from harness.training import grid
from harness.training.gap import SEEDS
from spectra_db import density, plot
from spectra_db.densities import GROUP
from spectra_db.heterogeneity import METRICS, pairwise_js
from spectra_db.loading import optional
from spectra_db.schema import BEST_RATES
from spectra_db.words import ANSWERS, OPTIMIZERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

CNNS = ("resnet", "vgg", "convnext")
TRANSFORMERS = ("gpt", "llama", "bert", "vit")
_SCALE = "lambda10"  # what blocks are compared by in the claims
_COMPARED = ("CNN", "Transformer")
_OPTIMIZERS = tuple(
    (name, label, *plot.OPTIMIZERS[name][1:])
    for name, label in (("sgd", "SGD"), ("adamw", "AdamW"))
)
# Scales of the sweep whose training curves are drawn.
CURVES_OF = (1, 4, 7, 9, 12, 15)
# Every metric in each of its readings, the first the metric: Table 1 is set beside all.
EVERY_READING = [
    f"{name} {scale}".removesuffix(" none")
    for name, metric in METRICS.items()
    for scale in metric.scales
]
# Table 1: the paper's system, its JS⁰, our entry of the same architecture, our small kin.
TABLE1 = (
    ("ResNet18", 0.10, "resnet18-imagenet", ("resnet8-cifar10", "resnet14-mnist")),
    ("VGG16", 0.09, "vgg16-imagenet", ("vgg7-cifar10", "vgg4-mnist")),
    ("GPT2 (pretrained)", 18.84, "gpt2-sft", ("gpt-nano-sft",)),
    ("MLP-mixer", 34.90, "mixer-imagenet", ("mixer-cifar10", "mixer-mnist")),
    ("BERT", 53.38, "bert-cornell", ("bert-4x48-cornell", "bert-2x64-cornell")),
    ("GPT2", 83.23, "gpt2-wikitext", ("gpt-6x48-untied-shakespeare", "gpt-2x64-shakespeare")),
    ("ViT-base", 286.41, "vit-base-imagenet", ("vit-cifar10", "vit-cls-mnist")),
)
# The batch of a product, as the paper gives it.
PAPER_BATCHES = {
    "ResNet18": "1,024 images",
    "VGG16": "1,024 images",
    "BERT": "327,680 tokens",
    "GPT2": "245,760 tokens",
    "ViT-base": "1,024 images",
}
PRETRAINED, SCRATCH = "gpt-nano-sft", "gpt-nano-books"


def fig1(source: release.Source) -> Result:
    """Compare full spectra of CNNs and Transformers over stages; draw three models of each."""
    spectra = _full_spectra(source)
    if not spectra:
        return Result(missing=("full spectra",))
    classes = _classes(source)
    every = dict.fromkeys(model for model, _ in spectra)
    chosen = {kind: [m for m in every if classes.get(m) == kind][:3] for kind in _COMPARED}
    found = {stage: _between(spectra, classes, stage) for stage in ("init", "final")}
    values = {stage: distances for stage, distances in found.items() if distances}
    models = [model for group in chosen.values() for model in group]
    missing = tuple(f"a full spectrum of a {kind}" for kind in _COMPARED if not chosen[kind])
    return Result(values, {"fig1": _overlay(spectra, models)}, missing)


def fig3(source: release.Source) -> Result:
    """Show spectra of four blocks of a CNN and of a Transformer at initialisation."""
    values: dict[str, Any] = {}
    figures, missing = {}, []
    wanted = {
        "cnn": ("vgg16-imagenet", "vgg7-cifar10", "vgg4-mnist"),
        "transformer": ("bert-cornell", "bert-4x48-cornell", "bert-2x64-cornell"),
    }
    for kind, names in wanted.items():
        found = release.first_spectrum(source, names)
        if found is None:
            missing.append(f"a spectrum of {' or '.join(names)}")
            continue
        model, rows = found
        blocks = list(rows["block"].drop_duplicates())
        four = [blocks[i] for i in np.linspace(0, len(blocks) - 1, 4).round().astype(int)]
        rows = rows[rows["block"].isin(four)]
        distances = pairwise_js(rows, scale=_SCALE).to_numpy()
        values[kind] = {
            "model": model,
            "blocks": four,
            "mean_distance": distances[np.triu_indices(len(distances), 1)].mean(),
        }
        figures[f"fig3-{kind}"] = plot.spectra(rows, scale=_SCALE)
    return Result(values, figures, tuple(missing))


def fig4(source: release.Source) -> Result:
    """Show heat maps of JS distances of CNNs and Transformers, and compare JS⁰ of all models."""
    table = _metrics_table(source)
    values: dict[str, Any] = {}
    for name, column in (("js0", "js0 lambda10"), ("js0_paper", "js0_paper lambda10")):
        groups = [table.loc[table["class"] == kind, column].dropna() for kind in _COMPARED]
        if min(map(len, groups)) >= 2:
            cnn, transformer = groups
            values[name] = {
                "cnn": cnn.to_dict(),
                "transformer": transformer.to_dict(),
                "p_value": float(mannwhitneyu(transformer, cnn, alternative="greater").pvalue),
            }
    chosen = [str(m) for kind in _COMPARED for m in table.index[table["class"] == kind][:3]]
    if not chosen:
        return Result(missing=("initial spectra of CNNs and Transformers",))
    figure, axes = panels(5.0, 2, 3, used=len(chosen))
    # Squares leave no room for the titles of the second row.
    figure.set_layout_engine("constrained", hspace=0.12)
    for ax, model in zip(axes, chosen, strict=False):
        image = _draw_distances(ax, source, model)
        facts = table.loc[model].to_dict()
        title = f"{model}\n{facts['class']}, JS⁰ {facts['js0 lambda10']:.3f}"
        ax.set_title(title, fontsize=8)
    figure.colorbar(image, ax=list(axes), label="Jensen-Shannon distance", shrink=0.6)
    figure.supxlabel("block, in the order of the network", fontsize=8)
    missing = () if len(values) else ("two CNNs and two Transformers",)
    return Result(values, {"fig4": figure}, missing)


def fig5(source: release.Source) -> Result:
    """Show the sweep of perceptrons: heterogeneity, and SGD against Adam, against the scale c."""
    found = _sweep(source)
    if len(found) < 5:
        return Result(missing=(f"the MLP sweep ({len(found)} of 15 models)",))
    values: dict[str, Any] = {"num_models": len(found), "rows": found.to_dict("records")}
    for name in ("gap", "accuracy_gap", *READINGS):
        values[f"c against {name}"] = _spearman(found["c"], found[name])
    for name in READINGS:
        values[f"{name} against accuracy_gap"] = _spearman(found[name], found["accuracy_gap"])
    figure, (left, middle, right) = panels(2.3, 1, 3)
    left.plot(found["c"], found["js0 lambda10"], "o-", color="black", label="JS⁰ (by λ10)")
    left.plot(found["c"], found["js0 raw"], "s--", color="gray", label="JS⁰ (raw)")
    left.set(xlabel="c", ylabel="JS⁰", ylim=(0, 1.05))
    left.legend()
    for optimizer, label, colour, dashes, marker in _OPTIMIZERS:
        middle.plot(found["c"], found[optimizer], marker + dashes, color=colour, label=label)
        edge = found[found[f"{optimizer}_edge"] != ""]
        middle.plot(edge["c"], edge[optimizer], marker, color=colour, markerfacecolor="white")
    middle.set(xlabel="c (open: best rate at the grid's edge)")
    middle.set(ylabel="test accuracy after one epoch")
    middle.legend()
    right.errorbar(found["c"], found["gap"], 2 * found["error"], fmt="o-", color="black", capsize=2)
    right.set(xlabel="c", ylabel="gap of the loss (protocol 1)")
    right.axhline(0, color="gray", linewidth=0.8)
    return Result(values, {"fig5": figure})


def fig14(source: release.Source) -> Result:
    """Show training curves of SGD and AdamW on some of the scaled perceptrons."""
    found, gaps = _sweep(source), _gaps(source)
    shown = found[found["c"].isin(CURVES_OF)] if len(found) else found
    if len(shown) < 2:
        return Result(missing=(f"training runs of the MLP sweep ({len(found)} of 15 models)",))
    figure, axes = panels(3.6, 2, 3, used=len(shown))
    for ax, row in zip(axes, shown.to_dict("records"), strict=False):
        _draw_curves(ax, source, f"mlp-mnist-c{row['c']}", gaps)
        ax.set_title(f"c = {row['c']}: SGD {row['sgd_lr']:.2g}, AdamW {row['adamw_lr']:.2g}")
        ax.set_yscale("log")
    axes[0].legend(loc="lower left")
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("loss of the minibatch at the best rates", fontsize=8)
    columns = ["c", *(f"{o}{end}" for o in OPTIMIZERS for end in ("", "_lr", "_edge"))]
    values: dict[str, Any] = {"rows": found[columns].to_dict("records")}
    values["c against sgd"] = _spearman(found["c"], found["sgd"])
    return Result(values, {"fig14": figure})


def fig6(source: release.Source) -> Result:
    """Compare a pretrained GPT before fine-tuning with the same one from scratch."""
    table, gaps = _metrics_table(source), _gaps(source)
    lacking = [m for m in (PRETRAINED, SCRATCH) if m not in table.index or m not in gaps.index]
    if lacking:
        return Result(missing=tuple(f"spectrum and gap of {m}" for m in lacking))
    values: dict[str, dict[str, Any]] = {
        model: {
            "js0": table.loc[model, "js0 lambda10"],
            "js0_error": table.loc[model, "error"],
            "gap": gaps.loc[model, "gap"],
            "gap_error": gaps.loc[model, "standard_error"],
        }
        for model in (PRETRAINED, SCRATCH)
    }
    figure, axes = panels(4.4, 2, 2)
    for left, right, model in zip(axes[::2], axes[1::2], (PRETRAINED, SCRATCH), strict=True):
        image = _draw_distances(left, source, model)
        left.set_title(f"{model}, JS⁰ {values[model]['js0']:.3f}", fontsize=8)
        left.set(xlabel="block", ylabel="block")
        figure.colorbar(image, ax=left, label="JS distance", shrink=0.8)
        _draw_curves(right, source, model, gaps)
        right.set_title(f"gap {values[model]['gap']:.3f}", fontsize=8)
        right.set(xlabel="step", ylabel="loss of the minibatch")
    axes[1].legend()
    return Result(values, {"fig6": figure})


def fig7(source: release.Source) -> Result:
    """Set the SGD-Adam gap against JS⁰ for all models that have both."""
    both = _metrics_table(source).join(_gaps(source), how="inner")
    both = both[both["tier"] == "small"]
    if len(both) < 5:
        return Result(missing=(f"at least 5 models of tier small ({len(both)})",))
    values: dict[str, Any] = {"num_models": len(both), "num_families": both["family"].nunique()}
    values |= _with_intervals(source)
    figure, (ax, key) = panels(4.2, 1, 2, width_ratios=(4, 1))
    markers = {
        "CNN": ("o", plot.KINDS["conv"]),
        "Transformer": ("s", plot.KINDS["query"]),
        "other": ("^", "gray"),
    }
    for kind, (marker, colour) in markers.items():
        part = both[both["class"] == kind]
        if len(part):
            ax.errorbar(
                part["js0 lambda10"], part["gap"], 2 * part["standard_error"], 2 * part["error"],
                fmt=marker, color=colour, label=kind, elinewidth=0.5, alpha=0.8,
            )  # fmt: skip
    ordered = both.sort_values("gap", ascending=False)
    for i, (_, x, y) in enumerate(ordered[["js0 lambda10", "gap"]].itertuples()):
        # Names would hide each other: numbers, by turns around their points.
        place = ((4, 3), (4, -8), (-9, 3), (-9, -8))[i % 4]
        ax.annotate(f"{i + 1}", (x, y), xytext=place, textcoords="offset points", fontsize=6)
    names = "\n".join(f"{i + 1} {model}" for i, model in enumerate(ordered.index))
    key.text(0, 1, names, fontsize=6, linespacing=1.5, va="top", transform=key.transAxes)
    key.set_axis_off()
    ax.set(xlabel="JS⁰ at initialisation", ylabel="gap of protocol 1 (± 2 standard errors)")
    ax.axhline(0, color="black", linewidth=0.6)
    ax.legend()
    return Result(values, {"fig7": figure})


def table1(source: release.Source) -> Result:
    """Set every metric of the paper's systems, and of our small ones, beside Table 1."""
    table = _metrics_table(source)
    values: dict[str, Any] = {"systems": [system for system, *_ in TABLE1]}
    chosen = {
        "ours": [name if name in table.index else None for _, _, name, _ in TABLE1],
        "small": [next((n for n in kin if n in table.index), None) for *_, kin in TABLE1],
    }
    for column, names in chosen.items():
        there = [(row, n) for row, n in zip(TABLE1, names, strict=True) if n is not None]
        paper = [value for (_, value, *_), _ in there]
        found = table.loc[[name for _, name in there], EVERY_READING]
        readings: dict[str, Any] = {}
        for reading in EVERY_READING:
            numbers = [None if pd.isna(x) else float(x) for x in found[reading]]
            readings[reading] = {"values": numbers}
            known = pd.DataFrame({"theirs": paper, "ours": numbers}, dtype=float).dropna()
            if len(known) >= 4:
                theirs, ours = known["theirs"], known["ours"]
                readings[reading] |= _spearman(theirs, ours) | {"factor": _factor(theirs, ours)}
        systems = [system for (system, *_), _ in there]
        values[column] = {
            "systems": systems,
            "paper": paper,
            "models": [name for _, name in there],
            "paper_batches": [PAPER_BATCHES.get(system) for system in systems],
            "batches": [_batch(source, name) for _, name in there],
            "readings": readings,
        }
    reasons = release.models(source)["reason"].dropna().to_dict()
    missing = [
        f"{system} at real size ({name}: {reasons.get(name, 'not computed yet')})"
        for system, _, name, _ in TABLE1
        if name not in table.index
    ]
    return Result(values, missing=tuple(missing))


def _factor(theirs: pd.Series, ours: pd.Series) -> float:
    """Return by which factor ours are off, up or down, as a geometric mean."""
    return float(10 ** np.abs(np.log10(ours.abs() / theirs)).mean())


def _batch(source: release.Source, model: str) -> str | None:
    """Say what a model's initial spectrum is of; None where the rows don't."""
    columns = ["batch_size", "num_terms"]
    rows = optional("spectra", source, model=model, stage="init", columns=columns).dropna()
    if rows.empty:
        return None
    size, terms = (int(n) for n in rows.iloc[0])
    samples = "1 sample" if size == 1 else f"{size:,} samples"
    return f"{size:,} images" if size == terms else f"{terms:,} terms of {samples}"


def _sweep(source: release.Source) -> pd.DataFrame:
    """Return what there is of the sweep of perceptrons, a row for each scale c."""
    table, gaps = _metrics_table(source), _gaps(source)
    rows = []
    for c in range(1, 16):
        model = f"mlp-mnist-c{c}"
        if model not in table.index or model not in gaps.index:
            continue
        runs = optional("training", source, model=model)
        row: dict[str, Any] = {"c": c, "gap": gaps.loc[model, "gap"]}
        row |= {"error": gaps.loc[model, "standard_error"]}
        row |= {name: table.loc[model, name] for name in READINGS}
        for optimizer, *_ in _OPTIMIZERS:
            recipe = registry.get(model).recipe
            assert recipe is not None
            rates = grid.grid_losses(recipe, optimizer, runs).index
            best = float(gaps[BEST_RATES[optimizer]][model])
            edge = "least" if best == rates[0] else "largest" if best == rates[-1] else ""
            row |= {f"{optimizer}_lr": best, f"{optimizer}_edge": edge}
            row[optimizer] = _accuracy(runs, optimizer, best)
        rows.append(row | {"accuracy_gap": row["adamw"] - row["sgd"]})
    return pd.DataFrame(rows)


def _classes(source: release.Source) -> dict[str, str]:
    """Say of each model whether it is a CNN, a Transformer or other."""
    families = release.models(source)["family"]
    kinds = dict.fromkeys(CNNS, "CNN") | dict.fromkeys(TRANSFORMERS, "Transformer")
    return {str(model): kinds.get(family, "other") for model, family in families.items()}


def _metrics_table(source: release.Source) -> pd.DataFrame:
    """Return every metric at init, corrected, by model; with its tier, family and class."""
    rows = optional("heterogeneity", source, stage="init", init_seed=1)
    rows["reading"] = [
        f"{m} {s}".removesuffix(" none") for m, s in rows[["metric", "scale"]].values
    ]
    rows["number"] = rows["corrected"].fillna(rows["value"])
    rows = rows.sort_values("partition").drop_duplicates(["model", "reading"])
    numbers = rows.set_index(["model", "reading"])["number"].unstack()  # noqa: PD010
    error = rows[rows["reading"] == EVERY_READING[0]].set_index("model")["standard_error"]
    models = release.models(source)
    table = models.loc[models["tier"] != "demo", ["tier", "family"]]
    table = table.join(numbers.reindex(columns=EVERY_READING)).join(error.rename("error"))
    classes = _classes(source)
    table["class"] = [classes[str(model)] for model in table.index]
    return table.dropna(subset=EVERY_READING[:1])


def _gaps(source: release.Source) -> pd.DataFrame:
    rows = optional("gaps", source)
    rows = rows[rows["status"] == "ok"].set_index("model")
    columns = ["gap", "standard_error", "gap_from_reference", "gap_from_reference_error"]
    columns += BEST_RATES.values()
    return rows[columns].assign(answer=[report.answer(row) for row in rows.to_dict("records")])


def _full_spectra(source: release.Source) -> dict[tuple[str, str], pd.DataFrame]:
    """Return the full spectra of models that are not of the sweep, by model and stage."""
    models = release.models(source)
    found = {}
    for model in models.index[(models["tier"] != "demo") & (models["family"] != "mlp-sweep")]:
        for stage in ("init", "final"):
            rows = release.spectrum(source, model, stage, "full")
            if len(rows) and (rows["status"] == "ok").all():
                found[str(model), stage] = rows
    return found


def _between(
    spectra: dict[tuple[str, str], pd.DataFrame], classes: dict[str, str], stage: str
) -> dict[str, Any]:
    """Return mean JS distances of full spectra within CNNs, within Transformers, and between."""
    parts = [
        rows.assign(block=model)
        for (model, at), rows in spectra.items()
        if at == stage and classes[model] != "other"
    ]
    if len(parts) < 4:
        return {}
    shared = {c: parts[0][c].iloc[0] for c in GROUP}
    distances = pairwise_js(pd.concat([part.assign(**shared) for part in parts]), scale=_SCALE)
    kinds = np.array([classes[str(model)] for model in distances.columns])
    found: dict[str, Any] = {"num_models": len(kinds)}
    for name, first, second in (
        ("cnn", "CNN", "CNN"),
        ("transformer", "Transformer", "Transformer"),
        ("between", "CNN", "Transformer"),
    ):
        mask = np.outer(kinds == first, kinds == second) & ~np.eye(len(kinds), dtype=bool)
        if not mask.any():
            return {}
        found[name] = float(distances.to_numpy()[mask].mean())
    return found


def _overlay(spectra: dict[tuple[str, str], pd.DataFrame], models: Sequence[str]) -> Figure:
    """Draw full spectra, start and end in one panel per model."""
    columns = min(6, len(models))
    rows = ceil(len(models) / columns)
    figure, axes = panels(
        1.5 * rows + 0.7, rows, columns, used=len(models), sharex=True, sharey=True
    )
    for ax, model in zip(axes, models, strict=False):
        for stage, colour, dashes in (("init", "#0072B2", "-"), ("final", "#E69F00", "--")):
            if (model, stage) in spectra:
                curve = density(spectra[model, stage], scale=_SCALE)["__full__"]
                x, y = curve.index.to_numpy(), curve.to_numpy()
                # Broken where the lattice has gaps.
                apart = np.diff(x, prepend=x[0]) > 1.5 * np.diff(x).min()
                ax.plot(
                    x, np.where(apart, np.nan, y), dashes, color=colour, label=stage, linewidth=1
                )
        ax.set_title(model, fontsize=7)
    axes[0].set(yscale="log", ylim=(1e-6, 20))
    axes[0].set_xscale("symlog", linthresh=1, linscale=0.7)
    axes[0].xaxis.set_major_formatter(lambda value, position: f"{value:g}".replace("-", "−"))
    handles = {line.get_label(): line for ax in axes for line in ax.lines}
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=2,
                  markerscale=6)  # fmt: skip
    figure.supxlabel("eigenvalue / 10th largest |eigenvalue|", fontsize=8)
    figure.supylabel("density", fontsize=8)
    return figure


def _curves(source: release.Source, kind: str, name: str) -> Result:
    """Draw the training curves at the best rates, and list the gaps, of one class."""
    classes, gaps = _classes(source), _gaps(source)
    tiers = release.models(source)["tier"]
    models = [m for m in gaps.index if classes[m] == kind and tiers[m] != "demo"]
    if not models:
        return Result(missing=(f"training runs of a {kind}",))
    values = {}
    for model in models:
        facts = gaps.loc[model]
        values[model] = {"answer": facts["answer"]}
        if facts["answer"] in ANSWERS:
            gap, error = facts["gap_from_reference"], facts["gap_from_reference_error"]
            values[model] |= {"gap": gap, "error": error}
    columns = min(4, len(models))
    rows = ceil(len(models) / columns)
    figure, axes = panels(1.6 * rows + 0.4, rows, columns, used=len(models))
    for ax, model in zip(axes, models, strict=False):
        _draw_curves(ax, source, model, gaps)
        found = values[model]
        text = found["answer"]
        if "gap" in found:
            text = f"gap from R {found['gap']:.2f} ± {found['error']:.2f}"
        ax.set_title(f"{model}\n{text}", fontsize=7)
    axes[0].legend()
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("loss of the minibatch", fontsize=8)
    return Result({"models": values}, {name: figure})


fig9 = partial(_curves, kind="CNN", name="fig9")
fig10 = partial(_curves, kind="Transformer", name="fig10")


def _draw_distances(ax: Axes, source: release.Source, model: str) -> AxesImage:
    distances = pairwise_js(release.spectrum(source, model), scale=_SCALE)
    return heat_map(ax, distances, vmin=0, vmax=1)


def _draw_curves(ax: Axes, source: release.Source, model: str, gaps: pd.DataFrame) -> None:
    """Draw the minibatch losses at the rates of the gap: its seeds thin, their mean thick.

    Rates of the grid that diverged are named in the panel.
    """
    runs, gap = optional("training", source, model=model), gaps.loc[model]
    losses = runs[(runs["metric"] == "loss") & (runs["split"] == "batch")]
    lost = []
    for optimizer, label, colour, dashes, _ in _OPTIMIZERS:
        of_it = losses[losses["optimizer"] == optimizer]
        part = of_it[(of_it["lr"] == gap[BEST_RATES[optimizer]]) & of_it["seed"].isin(SEEDS)]
        for _, one in part.sort_values("step").groupby("seed"):
            ax.plot(one["step"], one["value"], color=colour, linewidth=0.4, alpha=0.5)
        curve = part.groupby("step")["value"].mean()
        ax.plot(curve.index, curve, dashes, color=colour, label=label, linewidth=1.2)
        rates = sorted(of_it.loc[of_it["diverged"].eq(True), "lr"].unique())
        if rates:
            said = ", ".join(f"{lr:.2g}" for lr in rates)
            if len(rates) > 3:
                said = f"{len(rates)} rates from {rates[0]:.2g} to {rates[-1]:.2g}"
            lost.append(f"{label} {said}")
    if lost:
        said = "diverged at\n" + "\n".join(lost)
        ax.text(
            0.98, 0.98, said, fontsize=5.5, color="#444444", transform=ax.transAxes,
            ha="right", va="top",
        )  # fmt: skip


def _accuracy(runs: pd.DataFrame, optimizer: str, lr: float) -> float:
    """Return the test accuracy at a learning rate, the mean over the seeds of the gap.

    A run that diverged has none and counts as chance of ten classes.
    """
    kept = runs[(runs["optimizer"] == optimizer) & (runs["lr"] == lr) & (runs["split"] == "test")]
    kept = kept[kept["metric"] == "accuracy"]
    found = dict(zip(kept["seed"], kept["value"], strict=True))
    return float(np.mean([found.get(seed, 0.1) for seed in SEEDS]))


def _spearman(x: pd.Series, y: pd.Series) -> dict[str, float]:
    found = spearmanr(x, y)
    return {"rho": float(found.statistic), "p_value": float(found.pvalue)}


def _with_intervals(source: release.Source) -> dict[str, Any]:
    """Return Spearman's correlation of JS⁰ and gap of the small models as the leaderboard does."""
    data = tables.read(source)
    small = data.models[data.models["tier"] == "small"]
    rows = data.heterogeneity[data.heterogeneity["stage"] == "init"]
    rows = rows[(rows["metric"] + " " + rows["scale"]).isin(READINGS)]
    board = statistics.leaderboard(small, rows, data.gaps)
    board = board[(board["statistic"] == "spearman") & (board["left_out"] == "")]
    board.index = board["metric"] + " " + board["scale"]
    columns = {"value": "rho", "ci_low": "low", "ci_high": "high"}
    found = board.rename(columns=columns).loc[list(READINGS), list(columns.values())]
    return {name: found.loc[name].to_dict() for name in READINGS}
