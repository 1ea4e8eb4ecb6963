"""How runs of the perceptrons' sweep are read. Pure: runs in, numbers and a figure out.

A run is a row: optimizer, k (its rate is that of `climb.rate(START, k)`), seed, and loss, train and
test, which are None where it diverged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.paper.drawing import panels
from harness.training import climb
from harness.training.gap import SEEDS
from harness.training.grid import GRID_SEED
from spectra_db import plot
from spectra_db.words import OPTIMIZERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = tuple(range(1, 16))
SHOWN = (1, 5, 10, 15)  # in the table of settings, and trained on more seeds
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


def of(runs: Sequence[Row], optimizer: str, seed: int) -> list[Row]:
    """Return the runs of an optimizer on a seed."""
    return [run for run in runs if (run["optimizer"], run["seed"]) == (optimizer, seed)]


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

    def choose(self, runs: Sequence[Row], optimizer: str, seed: int = GRID_SEED) -> Row:
        """Return the rate that an optimizer gets on a seed, its accuracy and its loss."""
        best = chosen([r for r in of(runs, optimizer, seed) if self.rates(r["k"])], self.score)
        accuracy = CHANCE if best[self.split] is None else float(best[self.split])
        return {"lr": climb.rate(START, best["k"]), "accuracy": accuracy, "loss": best["loss"]}


READINGS = {
    "as released: chosen by training loss": Reading(lambda k: k in GRID, loss_score),
    "chosen by test accuracy": Reading(lambda k: k in GRID),
    "chosen by it, training accuracy": Reading(lambda k: k in GRID, split="train"),
    "rates in decades": Reading(lambda k: k in DECADES),
    "rates free, chosen by training loss": Reading(lambda k: True, loss_score),
    "rates free, chosen by test accuracy": Reading(lambda k: True),
}


# Of the table of all scales.
TABLE = {
    "grid": "chosen by test accuracy",
    "free": "rates free, chosen by test accuracy",
    "least_loss": "rates free, chosen by training loss",
}


def seeds_of(c: int) -> tuple[int, ...]:
    """Return the seeds that a scale is trained on."""
    return (GRID_SEED, *SEEDS) if c in SHOWN else (GRID_SEED,)


def setting(name: str, reading: Reading, runs: Mapping[int, Sequence[Row]]) -> Row:
    """Return the accuracies of a setting at some scales, and whether the paper's words fit it.

    They do ("fits") where from the first of the scales to the last AdamW loses less than
    `UNAFFECTED`, and SGD loses that much more than AdamW; None where one scale is all there is.
    """
    found = {o: {c: reading.choose(runs[c], o)["accuracy"] for c in runs} for o in OPTIMIZERS}
    first, last = min(runs), max(runs)
    lost = {o: values[first] - values[last] for o, values in found.items()}
    fits = lost["adamw"] < UNAFFECTED <= lost["sgd"] - lost["adamw"]
    shown = {o: [found[o].get(c) for c in SHOWN] for o in OPTIMIZERS}
    return {"name": name, **shown, "fits": bool(fits) if first != last else None}


def row(c: int, runs: Sequence[Row]) -> Row:
    """Return what is known of a scale, of each optimizer.

    Each reading of `TABLE` by seed, and as "carried" the accuracies of the other seeds at the free
    rate of the first, as far as they were run.
    """
    found: Row = {"c": c}
    for optimizer in OPTIMIZERS:
        mine = {
            key: [READINGS[name].choose(runs, optimizer, seed) for seed in seeds_of(c)]
            for key, name in TABLE.items()
        }
        rate = mine["free"][0]["lr"]
        others = [r for s in seeds_of(c)[1:] for r in of(runs, optimizer, s)]
        same = [r["test"] for r in others if climb.rate(START, r["k"]) == rate]
        found[optimizer] = mine | {"carried": [CHANCE if x is None else x for x in same]}
    return found


def draw(rows: Sequence[Row]) -> Figure:
    """Draw accuracies and best rates of both optimizers against c."""
    figure, (left, right) = panels(2.8, 1, 2)
    c = [found["c"] for found in rows]
    for optimizer in OPTIMIZERS:
        _, colour, dashes, marker = plot.OPTIMIZERS[optimizer]
        mine = [found[optimizer] for found in rows]
        grid, free = ([m[key][0]["accuracy"] for m in mine] for key in ("grid", "free"))
        rates = [m["free"][0]["lr"] for m in mine]
        left.plot(c, grid, dashes, color=colour, linewidth=0.7, label=f"{optimizer}, 1e-4 to 1e-1")
        left.plot(c, free, marker + dashes, color=colour, label=f"{optimizer}, rates free")
        right.semilogy(c, rates, marker + dashes, color=colour, label=optimizer)
    right.axhspan(1e-4, 1e-1, color="gray", alpha=0.15, label="the paper's grid")
    left.set(xlabel="c", ylabel="test accuracy after one epoch", ylim=(0, 1))
    right.set(xlabel="c", ylabel="best learning rate")
    for ax in (left, right):
        ax.set_xticks(SCALES[::2])
        ax.legend()
    return figure
