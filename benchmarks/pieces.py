"""The pieces around the products: Lanczos, quadrature, densities, divergences, loading."""

from __future__ import annotations

import tempfile

import numpy as np
import pandas as pd
import torch

import spectra_db
from harness.estimator.lanczos import advance, lanczos, start
from harness.estimator.quadrature import gauss_rule
from spectra_db import store
from spectra_db.density import density


def synthetic_rows(num_blocks: int, num_probes: int, num_steps: int) -> pd.DataFrame:
    """Return rows of blocks with power-law spectra, by Lanczos on diagonal matrices."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for k in range(num_blocks):
        n = 2000 + 10 * k
        diagonal = torch.arange(1, n + 1, dtype=torch.float64) ** -(0.5 + k / num_blocks)
        for probe in range(num_probes):
            v0 = torch.randn(n, generator=generator, dtype=torch.float64)
            run = lanczos(lambda v, d=diagonal: d * v, v0, num_steps, reorthogonalize=True)
            nodes, weights = gauss_rule(run.alphas, run.betas)
            rows.append(
                {
                    "model": "synthetic",
                    "block": f"block{k:03d}",
                    "probe": probe,
                    "num_params": n,
                    "method": "slq",
                    "status": "ok",
                    "reason": None,
                    "breakdown": run.breakdown,
                    "num_steps": num_steps,
                    "num_products": num_steps,
                    "alphas": run.alphas,
                    "betas": run.betas,
                    "nodes": nodes,
                    "weights": weights,
                }
            )
    return pd.DataFrame(rows)


class PostProcessing:
    """Densities and all pairwise JS, with errors, of 100 blocks × 10 probes × 100 nodes."""

    timeout = 600
    number = 1

    def setup_cache(self) -> pd.DataFrame:
        return synthetic_rows(100, 10, 100)

    def setup(self, rows: pd.DataFrame) -> None:
        torch.set_num_threads(1)

    def time_density(self, rows: pd.DataFrame) -> None:
        density(rows)

    def time_js0(self, rows: pd.DataFrame) -> None:
        spectra_db.js0(rows)


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


class Load:
    """Reading a spectrum from its file."""

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
