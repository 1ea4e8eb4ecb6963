"""What a Python loop would take for the divergences of all pairs: `python -m benchmarks.loop`."""

from __future__ import annotations

import math
import time

import numpy as np

from benchmarks.suite.pieces import Rule, scaled_rules, synthetic_rows
from spectra_db.densities import SIGMA


def loop_seconds(num_blocks: int = 100) -> float:
    """Return what a Python loop over 50,000 grid points takes for all pairs, from a part of it.

    Densities point by point, the 1,000 nodes at once by numpy, and the integrand of each pair
    point by point: two densities and one pair, at every tenth point.
    """
    rules = scaled_rules(synthetic_rows(2, 10, 100))
    low, high = min(n.min() for n, _ in rules), max(n.max() for n, _ in rules)
    grid = np.linspace(low - 1, high + 1, 50_000)[::10]

    def density_at(rule: Rule, x: float) -> float:
        return float(rule[1] @ np.exp(-0.5 * ((x - rule[0]) / SIGMA) ** 2))

    begin = time.process_time()
    p, q = ([density_at(rule, x) for x in grid] for rule in rules)
    per_density = (time.process_time() - begin) * 10 / 2
    begin, total = time.process_time(), 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        total += (a * math.log(a / m) if a > 0 else 0.0) + (b * math.log(b / m) if b > 0 else 0.0)
    per_pair = (time.process_time() - begin) * 10
    return num_blocks * per_density + num_blocks * (num_blocks - 1) / 2 * per_pair


if __name__ == "__main__":
    print(f"a Python loop for what time_all_pairs does: {loop_seconds():.0f} s of processor")
