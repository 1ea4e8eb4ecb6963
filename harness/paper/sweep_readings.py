"""How runs of the perceptrons' sweep are read. Pure: runs in, numbers and a figure out.

A run is a row: optimizer, k (its rate is that of `climb.rate(START, k)`), seed, and loss, train and
test, which are None where it diverged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.training import climb
from harness.training.gap import SEEDS
from harness.training.grid import GRID_SEED
from harness.training.loop import OPTIMIZERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = tuple(range(1, 16))
SHOWN = (1, 5, 10, 15)  # of a setting
START = 1e-3  # in the middle of the paper's grid
GRID = range(-climb.PER_DECADE, 2 * climb.PER_DECADE + 1, climb.HALF)  # 1e-4 to 1e-1
DECADES = range(-climb.PER_DECADE, 2 * climb.PER_DECADE + 1, climb.PER_DECADE)
CHANCE = 0.1  # accuracy of knowing nothing of ten digits, which a diverged run counts as
UNAFFECTED = 0.1  # of accuracy: what AdamW may lose, and SGD must lose beyond it; fixed here
Row = dict[str, Any]
Score = Callable[[Row], climb.Score]


def accuracy_score(run: Row) -> climb.Score:
    """Return what a run is chosen by where test accuracy counts, as in the paper."""
    if run["loss"] is None:
        return 1.0, math.inf
    return 1 - run["test"], run["loss"]


def loss_score(run: Row) -> climb.Score:
    """Return what a run is chosen by where the training loss counts, as in the release."""
    return climb.score(run["loss"], math.log(10))


def chosen(runs: Sequence[Row], score: Score) -> Row:
    """Return the best run, of equals the one of the smallest rate."""
    return min(sorted(runs, key=lambda run: run["k"]), key=score)


@dataclass(frozen=True)
class Reading:
    """How the tuning runs become an accuracy.

    Attributes:
        rates: Whether a rate takes part, by its k.
        score: What they are chosen by.
        split: Whose accuracy it is.
    """

    rates: Callable[[int], bool]
    score: Score = accuracy_score
    split: str = "test"

    def accuracy(self, runs: Sequence[Row], optimizer: str) -> float:
        """Return the accuracy of an optimizer."""
        tuned = [r for r in runs if r["optimizer"] == optimizer and r["seed"] == GRID_SEED]
        best = chosen([r for r in tuned if self.rates(r["k"])], self.score)
        return CHANCE if best[self.split] is None else float(best[self.split])


READINGS = {
    "as released: chosen by training loss": Reading(lambda k: k in GRID, loss_score),
    "chosen by test accuracy": Reading(lambda k: k in GRID),
    "chosen by it, training accuracy": Reading(lambda k: k in GRID, split="train"),
    "rates in decades": Reading(lambda k: k in DECADES),
    "rates free, chosen by training loss": Reading(lambda k: True, loss_score),
    "rates free, chosen by test accuracy": Reading(lambda k: True),
}


def setting(name: str, reading: Reading, runs: Mapping[int, Sequence[Row]]) -> Row:
    """Return the accuracies of a setting at some scales, and whether the paper's words fit it.

    They do ("fits") where from the first of the scales to the last AdamW loses less than
    `UNAFFECTED`, and SGD loses that much more than AdamW; None where one scale is all there is.
    """
    found = {o: {c: reading.accuracy(runs[c], o) for c in runs} for o in OPTIMIZERS}
    first, last = min(runs), max(runs)
    lost = {o: values[first] - values[last] for o, values in found.items()}
    fits = lost["adamw"] < UNAFFECTED <= lost["sgd"] - lost["adamw"]
    shown = {o: [found[o].get(c) for c in SHOWN] for o in OPTIMIZERS}
    return {"name": name, **shown, "fits": bool(fits) if first != last else None}


def row(c: int, runs: Sequence[Row]) -> Row:
    """Return what is known of a scale: on the paper's grid, at all rates, and on other seeds."""
    found: Row = {"c": c}
    for optimizer in OPTIMIZERS:
        mine = [r for r in runs if r["optimizer"] == optimizer]
        tuned = [r for r in mine if r["seed"] == GRID_SEED]
        best, least = chosen(tuned, accuracy_score), chosen(tuned, loss_score)
        found[optimizer] = {
            "grid": READINGS["chosen by test accuracy"].accuracy(mine, optimizer),
            "free": _end(best),
            "least_loss": _end(least),
            "seeds": _seeds(mine, best["k"]),
            "seeds_below": _seeds(mine, best["k"] - climb.HALF),
        }
    return found


def _seeds(runs: Sequence[Row], k: int) -> list[Row]:
    scored = [r for r in runs if r["k"] == k and r["seed"] in SEEDS]
    return [_end(r) for r in sorted(scored, key=lambda r: r["seed"])]


def _end(run: Row) -> Row:
    accuracy = CHANCE if run["test"] is None else run["test"]
    return {"lr": climb.rate(START, run["k"]), "accuracy": accuracy, "loss": run["loss"]}


def draw(rows: Sequence[Row]) -> Figure:
    """Draw accuracies and best rates of both optimizers against c."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    c = [found["c"] for found in rows]
    for optimizer, colour in zip(OPTIMIZERS, ("#D55E00", "#0072B2"), strict=True):
        mine = [found[optimizer] for found in rows]
        grid, free = [m["grid"] for m in mine], [m["free"]["accuracy"] for m in mine]
        rates = [m["free"]["lr"] for m in mine]
        left.plot(c, grid, "--", color=colour, label=f"{optimizer}, 1e-4 to 1e-1")
        left.plot(c, free, "o-", color=colour, label=f"{optimizer}, rates free")
        right.semilogy(c, rates, "o-", color=colour, label=optimizer)
    right.axhspan(1e-4, 1e-1, color="gray", alpha=0.15, label="the paper's grid")
    left.set(xlabel="c", ylabel="test accuracy after one epoch", ylim=(0, 1))
    right.set(xlabel="c", ylabel="best learning rate")
    for ax in (left, right):
        ax.set_xticks(SCALES[::2])
        ax.legend(fontsize=8, frameon=False)
    return figure
