"""The pieces around the products: Lanczos, quadrature, densities, divergences, loading."""

from __future__ import annotations

import tempfile

import numpy as np
import pandas as pd
import torch
from scipy.special import xlogy

import spectra_db
from benchmarks.study import rows_of
from harness.estimator.lanczos import advance, lanczos, start
from spectra_db import store
from spectra_db.densities import SIGMA, Array, density, lattice_densities
from spectra_db.divergence import js_divergences
from spectra_db.jackknife import Blocks
from spectra_db.quadrature import gauss_rule

Rule = tuple[Array, Array]  # nodes and weights


def synthetic_rows(num_blocks: int, num_probes: int, num_steps: int) -> pd.DataFrame:
    """Return rows of blocks with power-law spectra, by Lanczos on diagonal matrices."""
    generator = torch.Generator().manual_seed(0)
    blocks, runs = [], {}
    for k in range(num_blocks):
        name, n = f"block{k:03d}", 2000 + 10 * k
        diagonal = torch.arange(1, n + 1, dtype=torch.float64) ** -(0.5 + k / num_blocks)
        starts = (
            torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(num_probes)
        )
        runs[name] = [
            lanczos(lambda v, d=diagonal: d * v, v0, num_steps, reorthogonalize=True)
            for v0 in starts
        ]
        blocks.append({"model": "synthetic", "block": name, "num_params": n, "status": "ok"})
    return rows_of(pd.DataFrame(blocks), runs, range(num_probes), num_steps)


def scaled_rules(rows: pd.DataFrame) -> list[Rule]:
    """Return each block's rule, averaged over probes, its nodes divided by λ10."""
    blocks = Blocks.of(rows)
    averages = (block.average() for block in blocks.blocks)
    pairs = zip(averages, blocks.scales("lambda10"), strict=True)
    return [(nodes / scale, weights) for (nodes, weights), scale in pairs]


def all_pairs(rows: pd.DataFrame) -> Array:
    """Return the divergence of every pair of blocks, in nats, without errors; shape (K, K)."""
    rules = scaled_rules(rows)
    _, densities = lattice_densities(rules, SIGMA)
    return js_divergences(densities, np.arange(len(rules)), len(rules))


def reference(rules: list[Rule]) -> Array:
    """Return all divergences by the rectangle rule at σ/40; shape (K, K).

    Its error is that of leaving out what lies 12 σ from a node: it converges exponentially.
    """
    low, high = min(n.min() for n, _ in rules), max(n.max() for n, _ in rules)
    dx = SIGMA / 40
    x = np.arange(low - 12 * SIGMA, high + 12 * SIGMA, dx)
    P = np.zeros((len(rules), len(x)))
    for p, (nodes, weights) in zip(P, rules, strict=True):
        for node, weight in zip(nodes, weights, strict=True):
            near = slice(*np.searchsorted(x, [node - 12 * SIGMA, node + 12 * SIGMA]))
            p[near] += weight * np.exp(-0.5 * ((x[near] - node) / SIGMA) ** 2)
    P /= SIGMA * np.sqrt(2 * np.pi)
    own = dx * xlogy(P, P).sum(axis=1) / 2
    mixed = [[dx * xlogy(m := (p + q) / 2, m).sum() for q in P] for p in P]
    return own[:, None] + own - np.array(mixed)


def js_error(rows: pd.DataFrame) -> float:
    """Return the largest error of a divergence, in nats, over the pairs of every 11th block."""
    some = rows[rows["block"].isin(sorted(rows["block"].unique())[::11])]
    return float(np.abs(all_pairs(some) - reference(scaled_rules(some))).max())


class PostProcessing:
    """Densities and all pairwise JS of 100 blocks × 10 probes × 100 nodes; js0 with its errors."""

    timeout = 600
    number = 1

    def setup_cache(self) -> pd.DataFrame:
        return synthetic_rows(100, 10, 100)

    def setup(self, rows: pd.DataFrame) -> None:
        torch.set_num_threads(1)

    def time_density(self, rows: pd.DataFrame) -> None:
        density(rows)

    def time_all_pairs(self, rows: pd.DataFrame) -> None:
        all_pairs(rows)

    def time_js0(self, rows: pd.DataFrame) -> None:
        spectra_db.js0(rows)

    def track_js_error(self, rows: pd.DataFrame) -> float:
        return max(js_error(rows), 1e-7)

    track_js_error.unit = "nats"  # type: ignore[attr-defined]


class Recurrence:
    """Lanczos and quadrature without the products."""

    def setup(self) -> None:
        self.state = start(torch.randn(10**6))
        self.product = torch.randn(10**6)
        self.alphas, self.betas = np.random.default_rng(0).random((2, 100))

    def time_lanczos_step(self) -> None:
        self.state.betas, self.state.alphas, self.state.previous = [], [], None
        advance([self.state], [self.product.clone()])

    def time_quadrature(self) -> None:
        gauss_rule(self.alphas, self.betas)


class Import:
    """Importing the package that reads, and asking the command line for help."""

    def timeraw_import(self) -> str:
        return "import spectra_db"

    def timeraw_help(self) -> str:
        # asv reads the time from what the program prints: nothing else may be there, nor an end.
        return (
            "from contextlib import redirect_stdout, suppress; from io import StringIO\n"
            "from harness.cli import main\n"
            "with redirect_stdout(StringIO()), suppress(SystemExit): main(['--help'])"
        )


class Load:
    """Reading a table of 50 files."""

    def setup(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        models = [{"model": f"m{i}", "protocol_version": 1} for i in range(50)]
        text = ("family", "tier", "task", "source", "licence", "reference")
        numbers = {"num_params": 1, "num_blocks": 1, "status": "ok"}
        rows = [m | dict.fromkeys(text, "x") | numbers for m in models]
        store.write(self.folder.name, "models", rows)

    def teardown(self) -> None:
        self.folder.cleanup()

    def time_load(self) -> None:
        spectra_db.load("models", source=self.folder.name)
