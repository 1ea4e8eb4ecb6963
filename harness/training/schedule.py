"""The learning rate's schedule, the same one for both optimizers."""

from __future__ import annotations

import math

# nanoGPT's choice: decay to a tenth of the peak rather than to zero.
FINAL_FRACTION = 0.1


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    num_steps: int,
    schedule: str = "cosine",
    final_fraction: float = FINAL_FRACTION,
) -> float:
    """Return the learning rate of one step.

    Linear warmup, peak (step + 1) / (warmup_steps + 1), then constant or a cosine from the peak
    to a fraction of it at `num_steps`.

    Args:
        step: 0 for the first update.
        peak: the learning rate of the grid.
        warmup_steps: updates below the peak; 0 for none.
        num_steps: the whole budget.
        schedule: "cosine" or "constant".
        final_fraction: Of the peak, at the end of the cosine.

    >>> [round(learning_rate(s, peak=1, warmup_steps=1, num_steps=5), 3) for s in range(6)]
    [0.5, 1.0, 0.868, 0.55, 0.232, 0.1]

    Source: nanoGPT's `get_lr`.
    """
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"unknown schedule {schedule!r}; choose cosine or constant")
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * (final_fraction + (1 - final_fraction) * (1 + math.cos(math.pi * done)) / 2)
