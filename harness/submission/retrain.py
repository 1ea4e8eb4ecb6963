"""Repeat published training runs from their seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from harness import tasks
from harness.errors import UserError, reason_of
from harness.registry import ModelEntry
from harness.submission.recompute import Means, TooLong
from harness.submission.verify import Check, runs_of
from harness.training import train
from spectra_db.derived import rows_of

# Of the progress from the first loss to the last. On one machine a run repeats to the last bit;
# on another rounding grows along it, while a curve that was drawn or taken from another rate
# differs by more.
_ALLOWED = 0.1
# Of the loss before the first step, which rounding alone moves.
_START = 1e-4
_TRIED = 4  # steps that tell what the others take


def verify_runs(
    folder: Path,
    models: Sequence[str],
    find_entry: Callable[[str], ModelEntry],
    num_runs: int,
    means: Means,
    *,
    seed: int,
) -> list[Check]:
    """Repeat some training runs, one of a model, as far as time allows.

    Args:
        folder: Folder of tables.
        models: Whose runs are drawn from.
        find_entry: Name ↦ entry; raises UserError for a name it doesn't know.
        num_runs: Runs at most.
        means: Where data and the weights lie that entries start from, where to compute, and when
            the last run must end.
        seed: Draws them.
    """
    generator = np.random.default_rng(seed)
    checks: list[Check] = []
    for model in generator.permutation(sorted(set(models))).tolist():
        training = rows_of(folder, "training", model)
        runs = runs_of(training)
        if not runs or len(checks) >= num_runs or time.monotonic() > means.deadline:
            continue
        optimizer, lr, run_seed = runs[generator.integers(len(runs))]
        place = (model, "training", "", f"{optimizer} at {lr:g}", run_seed)
        mine = training["optimizer"].eq(optimizer) & training["lr"].eq(lr)
        published = training[mine & training["seed"].eq(run_seed)]
        try:
            entry = find_entry(model)
            data = tasks.of(entry).load(means.data_root)
            run = train(
                entry,
                data,
                optimizer=optimizer,
                lr=lr,
                seed=run_seed,
                pretrained_dir=means.checkpoint_dir,
                device=means.device or "cpu",
                on_step=_limit(means.deadline),
            )
        except TooLong:
            continue
        except UserError as error:
            checks.append(Check(*place, "unverifiable", reason=str(error)))
        except Exception as error:  # of the author's code
            checks.append(Check(*place, "unverifiable", reason=reason_of(error)))
        else:
            size, reason = compare_runs(published, pd.DataFrame(run.rows))
            outcome = "deviates" if reason else "agrees"
            checks.append(Check(*place, outcome, size, _ALLOWED, reason))
    return checks


def compare_runs(published: pd.DataFrame, made: pd.DataFrame) -> tuple[float, str | None]:
    """Return how far two curves of one run are apart, over their progress, and what is wrong.

    That is the most of: the difference at the end on either split, and the mean difference of the
    minibatches' losses. The loss before the first step must be the same.
    """
    at = ["step", "split", "metric"]
    losses = [rows[rows["metric"] == "loss"].set_index(at)["value"] for rows in (published, made)]
    if set(losses[0].index) != set(losses[1].index) or made["diverged"].any():
        return np.inf, "the run ends elsewhere, or is recorded at other steps"
    was, now = losses[0], losses[1].reindex(losses[0].index)
    moved = (was - now).abs()
    start = (0, "train", "loss")
    progress = max(abs(was[start] - now.xs("train", level="split").iloc[-1]), 1e-12)
    batch = was.index.get_level_values("split") == "batch"
    end = ~batch & (was.index.get_level_values("step") > 0)
    size = float(max(moved[end].max(), moved[batch].mean()) / progress)
    if moved[start] > _START * abs(was[start]):
        return size, f"it begins at a loss of {now[start]:.6g}, not {was[start]:.6g}"
    return size, None if size <= _ALLOWED else "the curve is another"


def _limit(deadline: float) -> Callable[[int, int], None]:
    """Return what stops a run that, by its first steps, would end after the deadline."""
    begin = time.monotonic()
    last = [begin]

    def on_step(done: int, total: int) -> None:
        now = time.monotonic()
        took, last[0] = now - last[0], now
        if now > deadline or (done == _TRIED and now + took * (total - done) > deadline):
            raise TooLong

    return on_step
