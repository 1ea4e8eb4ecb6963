"""The sweep of perceptrons (figure 5) with learning rates that are free downwards.

Zhang et al. 2024 (arXiv 2402.16788) scale each layer's output of a perceptron by c and draw the
best test accuracy over learning rates from 1e-4 to 1e-1. The release has those runs and chooses
among them by the training loss. Here the rates go on below the paper's grid for both optimizers,
and the same runs are read in several ways: chosen by loss or by accuracy, on the paper's grid or on
all rates. Variants change one thing that
the paper may have had otherwise.

ReLU(c z) = c ReLU(z), so the scale may stand before or after it. A net whose initial weights and
biases are c times as large, trained at the rate η, makes the same function at each step as one with
scaled outputs at η / c² (SGD, whose gradients are c times smaller there) or η / c (Adam, whose
steps have a size of their own, ε aside): such a variant only moves the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from harness import tasks
from harness.paper import release
from harness.paper import sweep_readings as readings
from harness.paper.result import Result
from harness.paper.sweep_readings import DECADES, GRID, READINGS, SCALES, START, Row
from harness.registry import get
from harness.registry.entry import ModelEntry, Recipe
from harness.registry.networks.mlp import MLP
from harness.tasks.base import Data
from harness.tasks.images import Mnist
from harness.training import climb, train
from harness.training.gap import SEEDS
from harness.training.grid import GRID_SEED
from spectra_db.loading import optional
from spectra_db.words import OPTIMIZERS

VARIANT_SCALES = (5, 15)
_FACTORY = "harness.paper.sweep:{}".format
# Where the numbers that a run ends with stand: split and metric.
_ENDS = {"loss": ("train", "loss"), "train": ("train", "accuracy"), "test": ("test", "accuracy")}
_COLUMNS = ("optimizer", "k", "seed", *_ENDS)


def initially_scaled(
    in_channels: int, image_size: int, num_classes: int, *, widths: Sequence[int], scale: float
) -> MLP:
    """Return a perceptron whose initial weights and biases are scaled, not its outputs."""
    model = MLP(in_channels, image_size, num_classes, widths=widths)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


class HiddenScaled(MLP):
    """A perceptron whose last layer is not scaled."""

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, K)
        """Return the logits."""
        return super().forward(images) / self.scale


class UnitPixels(MLP):
    """A perceptron that sees MNIST's pixels in [0, 1] instead of normalised."""

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, K)
        """Return the logits."""
        return super().forward(images * Mnist.std[0] + Mnist.mean[0])


class _Plain(Recipe):
    """A recipe whose SGD has no momentum."""

    momentum = 0.0


def _with_recipe(entry: ModelEntry, kind: type[Recipe] = Recipe, **changed: Any) -> ModelEntry:
    return replace(entry, recipe=kind(**vars(entry.recipe) | changed))


# What is otherwise than in the release's sweep, and for which optimizers.
Change = Callable[[ModelEntry], ModelEntry]
VARIANTS: dict[str, tuple[Change, Sequence[str]]] = {
    "last layer not scaled": (partial(replace, factory=_FACTORY("HiddenScaled")), OPTIMIZERS),
    "pixels in [0, 1]": (partial(replace, factory=_FACTORY("UnitPixels")), OPTIMIZERS),
    "rate decays by a cosine": (partial(_with_recipe, schedule="cosine"), OPTIMIZERS),
    "SGD without momentum": (partial(_with_recipe, kind=_Plain), ("sgd",)),
    "c in the initial weights": (
        partial(replace, factory=_FACTORY("initially_scaled")),
        OPTIMIZERS,
    ),
}


def units(source: release.Source) -> list[str]:
    """List the scales, each climbed, and the variants, each on the paper's grid in decades."""
    return [f"c{c}" for c in SCALES] + [
        f"v{i}-c{c}" for i in range(len(VARIANTS)) for c in VARIANT_SCALES
    ]


def forecast(todo: Sequence[str], data_root: Path | None) -> str:
    """Say what the units cost."""
    return f"about {15 * len(todo)} training runs, 3 to 6 s each on a core"


def measure(unit: str, source: release.Source, data_root: Path | None) -> dict[str, Any]:
    """Train what the release lacks of a scale or of a variant; return the new runs by column."""
    variant, _, c = unit.rpartition("c")
    entry = get(f"mlp-mnist-c{c}")
    data = tasks.of(entry).load(data_root)
    if variant:
        change, optimizers = list(VARIANTS.values())[int(variant.strip("v-"))]
        todo = [(optimizer, k) for optimizer in optimizers for k in DECADES]
        runs = [_run(change(entry), data, optimizer, k, GRID_SEED) for optimizer, k in todo]
    else:
        known = ends(optional("training", source, model=entry.name))
        runs = explore(entry, data, known, readings.seeds_of(int(c)))
    return {name: [run[name] for run in runs] for name in _COLUMNS}


def explore(entry: ModelEntry, data: Data, known: Sequence[Row], seeds: Sequence[int]) -> list[Row]:
    """Train at the paper's rates, then climb by accuracy and by loss, each seed by itself.

    Args:
        entry: What to train.
        data: The entry's data.
        known: Runs that are not to be done again.
        seeds: Of initialisation and order of the data.

    Returns:
        The runs that were done.
    """
    runs = list(known)
    for optimizer, seed in product(OPTIMIZERS, seeds):
        while missing := _missing(runs, optimizer, seed):
            runs += [_run(entry, data, optimizer, k, seed) for k in missing]
    return runs[len(known) :]


def _missing(runs: Sequence[Row], optimizer: str, seed: int) -> list[int]:
    """Return the rates to run next, by k: the paper's grid, then the climbs."""
    tuning = {run["k"]: run for run in readings.of(runs, optimizer, seed)}
    wanted = [k for k in GRID if k not in tuning]
    for score in (readings.accuracy_score, readings.loss_score):
        scores = {k: score(run) for k, run in tuning.items()}
        # Half-decades alone: a finer rate adds a percent where the question is of tens.
        wanted = wanted or [k for k in climb.next_rates(scores) if k % climb.HALF == 0]
    return wanted


def ends(rows: pd.DataFrame) -> list[Row]:
    """Return how runs ended, of rows of table `training`, at the half-decades of the climb.

    loss and train: on the fixed training subset; test: accuracy on the test split. All are None
    where the run diverged.
    """
    last = rows[(rows["step"] > 0) & (rows["split"] != "batch")]
    k = (climb.PER_DECADE * np.log10(last["lr"] / START)).round()
    on_climb = np.isclose(last["lr"], START * 10 ** (k / climb.PER_DECADE), rtol=1e-4)
    last = last.assign(k=k.astype(int))[on_climb]
    found = []
    for _, group in last.groupby(["optimizer", "k", "seed"]):
        first, values = group.iloc[0], group.set_index(["split", "metric"])["value"]
        run = {k: None if first["diverged"] else float(values[at]) for k, at in _ENDS.items()}
        facts = {"optimizer": first["optimizer"], "k": int(first["k"]), "seed": int(first["seed"])}
        found.append(facts | run)
    return found


def _run(entry: ModelEntry, data: Data, optimizer: str, k: int, seed: int) -> Row:
    run = train(entry, data, optimizer=optimizer, lr=climb.rate(START, k), seed=seed)
    [row] = ends(pd.DataFrame(run.rows))
    return row


def summarise(records: Mapping[str, dict[str, Any]], source: release.Source) -> Result:
    """Read the runs of the release and the measured ones in each setting."""
    measured = {unit: _rows(record) for unit, record in records.items()}
    sweep = {
        c: ends(optional("training", source, model=f"mlp-mnist-c{c}")) + measured[f"c{c}"]
        for c in SCALES
        if f"c{c}" in measured
    }
    missing = tuple(unit for unit in units(source) if unit not in measured)
    if not sweep:
        return Result(missing=missing)
    settings = [readings.setting(name, reading, sweep) for name, reading in READINGS.items()]
    for i, name in enumerate(VARIANTS):
        runs = {c: measured[f"v{i}-c{c}"] for c in VARIANT_SCALES if f"v{i}-c{c}" in measured}
        # Without AdamW's of its own a variant changes SGD alone.
        for c in runs.keys() & sweep.keys():
            own = {run["optimizer"] for run in runs[c]}
            runs[c] += [run for run in sweep[c] if run["optimizer"] not in own]
        if runs:
            settings.append(readings.setting(name, READINGS["rates in decades"], runs))
    rows = [readings.row(c, runs) for c, runs in sweep.items()]
    values = {
        "rows": rows,
        "settings": settings,
        "num_variants": len(settings) - len(READINGS),
        "shown": readings.SHOWN,
        "unaffected": readings.UNAFFECTED,
        "seeds": SEEDS,
    }
    return Result(values, {"sweep": readings.draw(rows)}, missing)


def _rows(record: Mapping[str, Sequence[Any]]) -> list[Row]:
    columns = [record[name] for name in _COLUMNS]
    return [dict(zip(_COLUMNS, values, strict=True)) for values in zip(*columns, strict=True)]
