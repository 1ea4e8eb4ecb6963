"""How many times as many steps SGD needs for AdamW's loss. Pure: rows of `trials` in.

Protocol 2 (docs/protocol.md). With S(n) and A(n) the mean final losses of tuned SGD and AdamW over
seeds after a full schedule of n steps,

    y = log2(τ / T),    S(τ) = A(T),

S interpolated linearly in log n between T, 2T and 4T. Where SGD is ahead at T by two standard
errors the roles are exchanged and y is negative. The loss of a run is at most R, what a model has
that learnt nothing (`reference.reference_loss`); a diverged run counts as R.

The interval is that of a test: it holds each place at which the two losses don't differ at 95 % by
Welch's t. Means of different lengths and optimizers count as independent; seeds are paired (same
initialisation and data), so that this errs to the wide side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from harness.registry.entry import SpeedupRecipe
from harness.training import climb
from harness.training.gap import CONFIDENCE, learnt, relative_gap
from spectra_db.schema import VERSIONS
from spectra_db.words import OPTIMIZERS, answer

LENGTHS = (1, 2, 4)  # in T; beyond the last one a speed-up is not measured
TUNING_SEEDS = (0, 11, 12)  # rates are chosen on them, and they are not scored
CLIMB_SEED = TUNING_SEEDS[0]
SEEDS = (1, 2, 3, 4, 5)  # scored at T
LONG_SEEDS = (1, 2, 3)  # scored at 2T and 4T
MORE_SEEDS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)  # where y is near the threshold
THRESHOLD = 0.5  # of y: SGD takes 1.4 times the steps
NEAR = 2.0  # standard errors
_REACH = 3.0  # how far y is searched for the ends of the interval


@dataclass(frozen=True)
class Trial:
    """A training run to be done.

    Attributes:
        optimizer: "sgd" or "adamw".
        num_steps: Of the whole schedule.
        lr: Peak learning rate.
        seed: Of the initialisation and the order of the data.
    """

    optimizer: str
    num_steps: int
    lr: float
    seed: int


@dataclass(frozen=True)
class Sample:
    """Final losses over seeds, shape (seeds,), with the mean and the variance of that mean."""

    values: np.ndarray

    @property
    def mean(self) -> float:
        """Of the losses."""
        return float(self.values.mean())

    @property
    def variance(self) -> float:
        """Of the mean."""
        return float(self.values.var(ddof=1) / len(self.values))


class Trials:
    """Answers questions of an entry's rows of table `trials`.

    Args:
        rows: The entry's rows.
        recipe: Its recipe.
    """

    def __init__(self, rows: pd.DataFrame, recipe: SpeedupRecipe) -> None:
        self.rows, self.recipe = rows, recipe
        every: Iterable[Any] = rows.itertuples()
        self._runs = {Trial(r.optimizer, r.num_steps, r.lr, r.seed): r for r in every}

    def start(self, optimizer: str) -> float:
        """Return the rate at which the climb begins."""
        return self.recipe.sgd_lr if optimizer == "sgd" else self.recipe.adamw_lr

    def scores(self, optimizer: str, seed: int = CLIMB_SEED) -> dict[int, climb.Score]:
        """Return the scores of the runs of T steps on one seed, the climb's unless named, by k."""
        start, steps = self.start(optimizer), self.recipe.num_steps
        return {
            round(climb.PER_DECADE * math.log10(trial.lr / start)): _score(row)
            for trial, row in self._runs.items()
            if (trial.optimizer, trial.num_steps, trial.seed) == (optimizer, steps, seed)
        }

    def means(self, optimizer: str) -> dict[int, climb.Score]:
        """Return the mean scores of the rates that all tuning seeds have run at T, by k."""
        found = [self.scores(optimizer, seed) for seed in TUNING_SEEDS]
        common = set.intersection(*map(set, found))
        return {k: climb.mean([scores[k] for scores in found]) for k in common}

    def best_rate(self, optimizer: str) -> float:
        """Return the best rate at T, of a climb that has ended."""
        return climb.rate(self.start(optimizer), climb.best(self.means(optimizer)))

    def long_rates(self, optimizer: str) -> list[float]:
        """Return the rates that are tried at 2T and 4T: the best at T and half a decade below."""
        k = climb.best(self.means(optimizer))
        return [climb.rate(self.start(optimizer), j) for j in (k - climb.HALF, k)]

    def rate_at(self, optimizer: str, length: int) -> float:
        """Return the chosen rate of a length, in T; of a long one from its two tuning runs."""
        if length == 1:
            return self.best_rate(optimizer)
        steps = length * self.recipe.num_steps
        tried = self.long_rates(optimizer)
        return min(
            tried, key=lambda lr: _score(self._runs[Trial(optimizer, steps, lr, CLIMB_SEED)])
        )

    def missing(self, optimizer: str, length: int, lr: float, seeds: Sequence[int]) -> list[Trial]:
        """Return those runs that are not there."""
        steps = length * self.recipe.num_steps
        wanted = [Trial(optimizer, steps, lr, seed) for seed in seeds]
        return [trial for trial in wanted if trial not in self._runs]

    def column(self, name: str, optimizer: str, length: int, seeds: Sequence[int]) -> np.ndarray:
        """Return a column of the runs at the chosen rate, over seeds; nan where it is null."""
        steps, lr = length * self.recipe.num_steps, self.rate_at(optimizer, length)
        found = [getattr(self._runs[Trial(optimizer, steps, lr, seed)], name) for seed in seeds]
        return np.array(found, dtype=float)

    def losses(self, optimizer: str, length: int, seeds: Sequence[int]) -> Sample:
        """Return the final losses at the chosen rate, each at most R."""
        ends = self.column("final_loss", optimizer, length, seeds)
        references = self.column("reference_loss", optimizer, length, seeds)
        return Sample(np.fmin(ends, references))  # fmin: nan, of a diverged run, is left out

    def num_seeds(self, optimizer: str, length: int) -> int:
        """Count the scored seeds that are there, from the first without a gap."""
        absent = self.missing(optimizer, length, self.rate_at(optimizer, length), MORE_SEEDS)
        return MORE_SEEDS.index(absent[0].seed) if absent else len(MORE_SEEDS)


def pending(rows: pd.DataFrame, recipe: SpeedupRecipe) -> list[Trial]:
    """Return the runs to do next, which may make others due; none when the entry is complete.

    Args:
        rows: The entry's rows of table `trials`.
        recipe: Its recipe.

    Raises:
        climb.NoBestRate: No learning rate is best.
    """
    return next(filter(None, _stages(Trials(rows, recipe))), [])


def _stages(trials: Trials) -> Iterator[list[Trial]]:
    """Yield what is missing of one thing after the other; each follows from those before."""
    due: list[Trial] = []
    for optimizer in OPTIMIZERS:
        start, ks = trials.start(optimizer), climb.next_rates(trials.scores(optimizer))
        rates = [climb.rate(start, k) for k in ks]
        due += [Trial(optimizer, trials.recipe.num_steps, lr, CLIMB_SEED) for lr in rates]
    yield due
    for optimizer in reversed(OPTIMIZERS):
        for k in climb.next_of_means(trials.scores(optimizer), trials.means(optimizer)):
            lr = climb.rate(trials.start(optimizer), k)
            due += trials.missing(optimizer, 1, lr, TUNING_SEEDS)
    yield due
    for optimizer in reversed(OPTIMIZERS):  # AdamW first: an entry that learns nothing ends there
        yield trials.missing(optimizer, 1, trials.best_rate(optimizer), SEEDS)
        if not _trained(trials):
            return
    slower = _slower(trials)
    for length in LENGTHS[1:]:
        if _reached(trials, slower, length // 2):
            break
        for lr in trials.long_rates(slower):
            yield trials.missing(slower, length, lr, [CLIMB_SEED])
        yield trials.missing(slower, length, trials.rate_at(slower, length), LONG_SEEDS)
    y = _speedup(trials, len(SEEDS), len(LONG_SEEDS))
    if abs(y.value - THRESHOLD) < NEAR * y.error:
        for optimizer in OPTIMIZERS:
            yield trials.missing(optimizer, 1, trials.best_rate(optimizer), MORE_SEEDS)
        yield trials.missing(slower, 2, trials.rate_at(slower, 2), MORE_SEEDS)


def _score(row: Any) -> climb.Score:
    loss = None if row.diverged else float(row.final_loss)
    return climb.score(loss, float(row.reference_loss))


def _trained(trials: Trials) -> bool:
    """Tell whether AdamW gained enough in every seed for the entry to count."""
    ends = trials.losses("adamw", 1, SEEDS).values
    references = trials.column("reference_loss", "adamw", 1, SEEDS)
    return learnt(ends, references)


def _slower(trials: Trials) -> str:
    """Return the optimizer that is behind at T: SGD, unless it is ahead by two standard errors."""
    sgd, adamw = (trials.losses(optimizer, 1, SEEDS).values for optimizer in OPTIMIZERS)
    ahead = adamw - sgd  # paired by seed
    error = ahead.std(ddof=1) / math.sqrt(len(ahead))
    return "adamw" if ahead.mean() > NEAR * error else "sgd"


def _other(optimizer: str) -> str:
    return "adamw" if optimizer == "sgd" else "sgd"


def _reached(trials: Trials, slower: str, length: int) -> bool:
    """Tell whether the slower optimizer has the other's loss by some length of 2T or more.

    A single length has no slope, so that 2T is run even where the two are level at T.
    """
    if length == 1:
        return False
    target = trials.losses(_other(slower), 1, SEEDS).mean
    lengths = [x for x in LENGTHS if x <= length]
    return any(trials.losses(slower, x, LONG_SEEDS).mean <= target for x in lengths)


@dataclass(frozen=True)
class Crossing:
    """Where falling losses cross a target, in log2 of the length.

    Attributes:
        value: The place; the longest length's where it is not reached.
        error: Its standard error.
        low, high: Ends of the 95 % interval; infinite where they are not bounded.
        censored: The target is not reached.
        longest: The longest length, in T.
    """

    value: float
    error: float
    low: float
    high: float
    censored: bool
    longest: int


def _speedup(trials: Trials, num_seeds: int, num_long: int) -> Crossing:
    """Return y from seeds 1 to `num_seeds` at T, 1 to `num_long` at 2T, three at 4T."""
    slower = _slower(trials)
    target = trials.losses(_other(slower), 1, MORE_SEEDS[:num_seeds])
    ends = [trials.losses(slower, 1, MORE_SEEDS[:num_seeds])]
    for length in LENGTHS[1:]:
        if _reached(trials, slower, length // 2):
            break
        seeds = MORE_SEEDS[:num_long] if length == 2 else LONG_SEEDS
        ends.append(trials.losses(slower, length, seeds))
    y = crossing(ends, target)
    # Where AdamW is behind the roles are exchanged.
    return y if slower == "sgd" else replace(y, value=-y.value, low=-y.high, high=-y.low)


def crossing(ends: Sequence[Sample], target: Sample) -> Crossing:
    """Return where mean losses at lengths 1, 2 (and 4) cross a target.

    Linear in log2 of the length, beyond the ends as the first and the last segment go, but not
    below -1: further than that nothing was measured.

    Args:
        ends: Losses at the lengths, two or three.
        target: Losses to be reached.
    """
    top = len(ends) - 1
    means = [sample.mean for sample in ends]
    censored = min(means) > target.mean
    first = next((i for i in range(top + 1) if means[i] <= target.mean), top)
    segment = max(first - 1, 0)
    drop = means[segment] - means[segment + 1]
    part = (means[segment] - target.mean) / drop if drop > 0 else 0.0
    value = float(top) if censored else max(segment + part, -1.0)
    at = np.array([float(segment + 1) if censored else value])
    _, variance, _ = _behind(ends, target, at, np.array([segment]))
    # The interval: from where the losses are no longer behind, to where they are ahead.
    places = np.linspace(-_REACH, _REACH, 1201)
    segments = np.clip(np.floor(places), 0, top - 1).astype(int)
    mean, variances, freedom = _behind(ends, target, places, segments)
    half_width = stdtrit(freedom, (1 + CONFIDENCE) / 2) * np.sqrt(variances)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = mean / half_width
    low, high = places[z < 1].min(initial=value), places[z > -1].max(initial=value)
    return Crossing(
        value=value,
        error=math.sqrt(variance[0]) / drop if drop > 0 else math.inf,
        low=float(low) if low > -_REACH else -math.inf,
        high=float(high) if high < _REACH and not censored else math.inf,
        censored=censored,
        longest=LENGTHS[top],
    )


def _behind(
    ends: Sequence[Sample], target: Sample, places: np.ndarray, segments: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how far losses between two lengths are above a target, the variance, its freedom.

    At places in log2 of the length, shape (n,), and so are the three arrays, each after the length
    that `segments` names. The freedom is Welch and Satterthwaite's.
    """
    part = places - segments
    means = np.array([sample.mean for sample in ends])
    variances = np.array([sample.variance for sample in ends])
    counts = np.array([len(sample.values) for sample in ends])
    mean = (1 - part) * means[segments] + part * means[segments + 1] - target.mean
    first, second = (1 - part) ** 2 * variances[segments], part**2 * variances[segments + 1]
    terms = np.stack([first, second, np.full_like(part, target.variance)])
    others = np.full_like(counts[segments], len(target.values))
    freedoms = np.stack([counts[segments], counts[segments + 1], others]) - 1
    total, spread = terms.sum(0), (terms**2 / freedoms).sum(0)
    # Equal losses in all seeds have no variance: any freedom will do.
    return mean, total, np.divide(total**2, spread, out=np.ones_like(total), where=spread > 0)


def speedup(model: str, rows: pd.DataFrame, recipe: SpeedupRecipe) -> dict[str, Any]:
    """Return the row of table `speedups` of one model.

    Args:
        model: Its name.
        rows: Table `trials`; other models' rows are left out.
        recipe: The entry's recipe.

    Returns:
        The row. Its status is "ok"; "pending" while runs are missing; "failed" where no learning
        rate is best. Of an entry whose AdamW learnt nothing `trained` is false, and y null.
    """
    rows = rows[rows["model"] == model]
    row: dict[str, Any] = {
        "model": model,
        "protocol_version": VERSIONS["speedups"],
        "num_steps": recipe.num_steps,
        "longest": int(rows["num_steps"].max() // recipe.num_steps) if len(rows) else 0,
        "num_seeds": 0,
        "num_trials": len(rows),
    }
    try:
        todo = pending(rows, recipe)
    except climb.NoBestRate as error:
        return row | {"status": "failed", "reason": str(error)}
    if todo:
        return row | {"status": "pending", "reason": f"{len(todo)} runs to do next"}
    trials = Trials(rows, recipe)
    row |= _at_first_length(trials)
    row |= {"status": "ok", "reason": None}
    if not row["trained"]:
        return row
    num_seeds = trials.num_seeds("adamw", 1)
    slower = _slower(trials)
    y = _speedup(trials, num_seeds, trials.num_seeds(slower, 2))
    return row | {
        "log2_speedup": y.value,
        "standard_error": y.error if math.isfinite(y.error) else None,
        "ci_low": y.low if math.isfinite(y.low) else None,
        "ci_high": y.high if math.isfinite(y.high) else None,
        "censored": y.censored,
        "slower": slower,
        "adam_needed": answer(y.low, y.high, THRESHOLD),
        "longest": y.longest,
    }


def _at_first_length(trials: Trials) -> dict[str, Any]:
    """Return what the runs of T steps give."""
    trained = _trained(trials)
    count = trials.num_seeds("adamw", 1)
    seeds = MORE_SEEDS[:count]
    found: dict[str, Any] = {
        "trained": trained,
        "num_seeds": count,
        "adam_lr": trials.best_rate("adamw"),
        "sgd_lr": trials.best_rate("sgd"),
    }
    for column in ("init_loss", "reference_loss"):
        found[column] = float(trials.column(column, "adamw", 1, seeds).mean())
    found["adam_loss"] = trials.losses("adamw", 1, seeds).mean
    if trained:
        sgd, adam = (trials.losses(optimizer, 1, seeds).values for optimizer in OPTIMIZERS)
        references = trials.column("reference_loss", "adamw", 1, seeds)
        value, error = relative_gap(sgd, adam, references)
        found |= {"sgd_loss": float(sgd.mean())}
        found |= {"relative_gap": value, "relative_gap_error": error}
    for column, optimizer in (("sgd_accuracy", "sgd"), ("adam_accuracy", "adamw")):
        if trained or optimizer == "adamw":
            values = trials.column("accuracy", optimizer, 1, seeds)
            if not np.isnan(values).all():
                found[column] = float(np.nanmean(values))
    return found
