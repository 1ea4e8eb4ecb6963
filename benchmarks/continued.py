"""What continuing T is worth: metrics of rules that end, and that go on, against exact measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch

from harness.estimator.lanczos import Recurrence, lanczos
from spectra_db.densities import Array, BlockSpectrum
from spectra_db.heterogeneity import METRICS, TRUNCATION
from spectra_db.jackknife import Blocks
from spectra_db.quadrature import LENGTH, WINDOW, extended, gauss_rule

STEPS, PROBES, GROUPS = (8, 10, 15, 20, 40), 3, 4
# Readings that three probes tell: of js0_paper that of raw eigenvalues alone.
READINGS = (
    *(("js0", scale) for scale in ("own_rms", "lambda10", "raw", "own_max", "global_max")),
    *(("js0_paper", "raw"), ("w1", "lambda10"), ("lambda_max_spread", "none")),
)
# Other parts of the steps to average, and other lengths.
VARIED = ((1 / 4, LENGTH), (1 / 2, LENGTH), (1.0, LENGTH), (WINDOW, 45), (WINDOW, 100))
# A rule of one probe: (eigenvalues, its measure on them, its recurrence) ↦ nodes and weights.
Rule = Callable[[Array, Array, Recurrence], tuple[Array, Array]]


def continued(truth: pd.DataFrame) -> pd.DataFrame:
    """Compare rules of known spectra with the probes' own measures, which no step cuts short.

    A probe v has the weights v_i² / |v|² at the eigenvalues: what its rule becomes with all steps.
    So the difference is truncation alone, and needs no average over probes.

    Returns:
        Per group of probes, reading, number of steps, window and length (both 0: T ends) the
        `error` relative to the measures' value, and `change`, that from three quarters of the
        steps.
    """
    pools = _pools(truth)
    found = []
    for group in range(GROUPS):
        probes = slice(PROBES * group, PROBES * (group + 1))
        exact = _values(pools, probes, lambda nodes, weights, run: (nodes, weights))
        for m, window, length in _settings():
            values, fewer = (
                _values(pools, probes, _rule(steps, window, length))
                for steps in (m, int(TRUNCATION * m))
            )
            for reading, true, value, before in zip(READINGS, exact, values, fewer, strict=True):
                numbers = {"group": group, "num_steps": m, "window": window, "length": length}
                numbers |= {"reading": " ".join(reading), "error": value / true - 1}
                found.append(numbers | {"change": abs(value - before) / true})
    return pd.DataFrame(found)


def _settings() -> Iterator[tuple[int, float, int]]:
    for m in STEPS:
        yield m, 0.0, 0
        yield m, WINDOW, LENGTH
        if m in (10, 20):
            yield from ((m, window, length) for window, length in VARIED)


def _pools(truth: pd.DataFrame) -> dict[str, list[tuple[Array, Array, Recurrence]]]:
    """Return per block the eigenvalues, and each probe's measure on them and recurrence."""
    generator = torch.Generator().manual_seed(0)
    pools = {}
    for row in truth.itertuples():
        d = torch.tensor(np.asarray(row.nodes), dtype=torch.float64)
        starts = torch.randn(PROBES * GROUPS, len(d), generator=generator, dtype=torch.float64)
        pools[str(row.block)] = [
            (d.numpy(), (v**2 / (v @ v)).numpy(), lanczos(lambda x, d=d: d * x, v, max(STEPS)))
            for v in starts
        ]
    return pools


def _rule(num_steps: int, window: float, length: int) -> Rule:
    def rule(nodes: Array, weights: Array, run: Recurrence) -> tuple[Array, Array]:
        T = run.alphas[:num_steps], run.betas[:num_steps]
        ended = run.breakdown and len(run.alphas) <= num_steps
        return gauss_rule(*(extended(*T, window=window, length=length) if not ended else T))

    return rule


def _values(
    pools: dict[str, list[tuple[Array, Array, Recurrence]]], probes: slice, rule: Rule
) -> list[float]:
    """Return the plug-in value of each reading, of some probes' rules."""
    spectra = []
    for name, probes_of in pools.items():
        nodes, weights = zip(*(rule(*probe) for probe in probes_of[probes]), strict=True)
        size = len(probes_of[0][0])
        spectra.append(BlockSpectrum(name, size, nodes, weights, False, False, (), 0))
    blocks = Blocks(spectra, 0, errors_known=False, extended=False)
    estimates = (
        METRICS[metric].estimate(blocks, *_reading(metric, scale)) for metric, scale in READINGS
    )
    return [e.value for e in estimates]


def _reading(metric: str, scale: str) -> tuple[str, float]:
    return next(reading for reading in METRICS[metric].readings if reading[0] == scale)
