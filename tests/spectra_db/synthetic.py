"""Rows of table `spectra` for diagonal matrices, whose spectra are known."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.linalg import eigh_tridiagonal
from scipy.stats import norm

from spectra_db import store
from spectra_db.heterogeneity import metrics

COMMON: dict[str, Any] = {
    "model": "made-up",
    "stage": "init",
    "init_seed": 1,
    "train_run": "",
    "partition": "weights",
    "operator": "hessian",
    "norm_mode": "eval",
    "dtype": "float64",
    "probe_distribution": "gaussian",
    "batch_hash": "0123456789abcdef",
    "protocol_version": 1,
    "run_id": "run",
    "step": 0,
    "progress": 0.0,
    "block_kind": "mlp",
    "probe_seed": 0,
    "reorthogonalized": True,
    "seconds": 0.1,
    "peak_bytes": None,
    "microbatch_size": 8,
    "batch_size": 8,
    "num_terms": 8,
    "data_source": "made up",
    "matmul_precision": "highest",
    "device": "cpu",
    "tolerance": None,
    "status": "ok",
    "reason": None,
}


def exact_row(eigenvalues: np.ndarray, block: str) -> dict[str, Any]:
    n = len(eigenvalues)
    return COMMON | {
        "block": block,
        "probe": 0,
        "num_params": n,
        "method": "exact",
        "num_steps": 0,
        "breakdown": False,
        "alphas": np.array([]),
        "betas": np.array([]),
        "nodes": np.sort(eigenvalues),
        "weights": np.full(n, 1 / n),
        "num_products": n,
    }


def compact_row(eigenvalues: np.ndarray, block: str) -> dict[str, Any]:
    """The row of `exact_row` with one node 0 for all zeros."""
    n, nonzero = len(eigenvalues), np.sort(eigenvalues[eigenvalues != 0])
    zeros = n - len(nonzero)
    nodes = np.append(nonzero, 0.0)
    order = np.argsort(nodes)
    weights = np.append(np.full(len(nonzero), 1 / n), zeros / n)
    return exact_row(eigenvalues, block) | {"nodes": nodes[order], "weights": weights[order]}


def slq_row(eigenvalues: np.ndarray, block: str, probe: int, start: np.ndarray, m: int) -> dict:
    alphas, betas = lanczos(eigenvalues, start, m)
    nodes, vectors = eigh_tridiagonal(alphas, betas[:-1])
    return COMMON | {
        "block": block,
        "probe": probe,
        "num_params": len(eigenvalues),
        "method": "slq",
        "num_steps": len(alphas),
        "breakdown": len(alphas) < m,
        "alphas": alphas,
        "betas": betas,
        "nodes": nodes,
        "weights": vectors[0] ** 2 / (vectors[0] ** 2).sum(),
        "num_products": len(alphas),
    }


def zero_row(n: int, block: str) -> dict[str, Any]:
    row = exact_row(np.zeros(1), block)
    return row | {"num_params": n, "status": "zero", "reason": "exactly zero"}


def failed_row(block: str) -> dict[str, Any]:
    row = exact_row(np.ones(1), block)
    return row | {"nodes": [], "weights": [], "status": "failed", "reason": "out of memory"}


def exact_rows(spectra: Sequence[np.ndarray]) -> pd.DataFrame:
    return pd.DataFrame([exact_row(s, f"layers.{k}.weight") for k, s in enumerate(spectra)])


def slq_rows(
    spectra: Sequence[np.ndarray], num_probes: int, m: int, generator: np.random.Generator
) -> pd.DataFrame:
    return pd.DataFrame(
        [
            slq_row(s, f"layers.{k}.weight", p, generator.standard_normal(len(s)), m)
            for k, s in enumerate(spectra)
            for p in range(num_probes)
        ]
    )


def lanczos(eigenvalues: np.ndarray, start: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Run m steps on a diagonal matrix, reorthogonalised twice; stop at breakdown."""
    Q = np.zeros((m, len(eigenvalues)))
    alphas, betas = [], []
    q = start / np.linalg.norm(start)
    for j in range(m):
        Q[j] = q
        w = eigenvalues * q
        alphas.append(q @ w)
        for _ in range(2):
            w = w - Q[: j + 1].T @ (Q[: j + 1] @ w)
        betas.append(np.linalg.norm(w))
        if betas[-1] < 64 * np.finfo(np.float64).eps * np.abs(eigenvalues).max():
            break
        q = w / betas[-1]
    return np.array(alphas), np.array(betas)


def power_of_normal(n: int, exponent: float) -> np.ndarray:
    """Return n quantiles of sign(z) |z|^exponent, z normal: heavier tails for larger exponents."""
    z = norm.ppf((np.arange(n) + 0.5) / n)
    return np.sign(z) * np.abs(z) ** exponent


def like_a_network(generator: np.random.Generator, n: int) -> np.ndarray:
    """Return a bulk near zero, a third negative, and ten outliers over 1.5 decades."""
    sizes = 10 ** generator.normal(-3, 1, n)
    values = sizes * np.where(generator.random(n) < 0.3, -1, 1)
    values[:10] = 10 ** generator.uniform(0, 1.5, 10)
    return np.sort(values) * 10 ** generator.normal(0, 1)


def write_tables(root: Path, models: Sequence[str] = ("digits-cnn", "digits-mlp")) -> Path:
    """Write all tables of some models, two blocks with three probes each, at init and final."""
    for seed, model in enumerate(models):
        generator = np.random.default_rng(seed)
        spectra = [like_a_network(generator, 60), like_a_network(generator, 80)]
        parts = []
        for stage, run in (("init", ""), ("final", "adamw-seed1")):
            rows = slq_rows(spectra, 3, 10, generator)
            parts.append(rows.assign(model=model, stage=stage, train_run=run))
            store.write(root, "heterogeneity", metrics(parts[-1]))
            step = 0 if stage == "init" else 4
            key = {"model": model, "stage": stage, "protocol_version": 1, "seed": 1, "step": step}
            rest = {"optimizer": "adamw", "lr": 0.1, "checkpoint_sha256": "0" * 64}
            rest["loss"] = 2 / (1 + step)
            store.write(root, "stages", [key | rest])
        store.write(root, "spectra", pd.concat(parts, ignore_index=True))
        store.write(root, "models", [model_row(model)])
        store.write(root, "gaps", [gap_row(model)])
        store.write(root, "runs", [run_row(model)])
        store.write(root, "training", training_rows(model))
    return root


def model_row(model: str, **changes: Any) -> dict[str, Any]:
    row = {"model": model, "family": "mlp", "tier": "demo", "task": "digits", "num_params": 140}
    row |= {"num_blocks": 2, "source": "here", "licence": "Apache-2.0", "reference": "none"}
    return row | {"status": "ok", "protocol_version": 1} | changes


def gap_row(model: str, **changes: Any) -> dict[str, Any]:
    row = {"model": model, "gap": 0.2, "standard_error": 0.02, "at_edge": False, "num_lrs": 5}
    row |= {"sgd_loss": 0.4, "adam_loss": 0.0, "init_loss": 2.0, "sgd_lr": 0.1, "adam_lr": 0.01}
    return row | {"num_seeds": 3, "status": "ok", "protocol_version": 1} | changes


def training_rows(model: str, at_3: float = 0.5) -> list[dict[str, Any]]:
    """Return the rows of a run of five steps; no other table follows from its loss at step 3."""
    run = {"model": model, "optimizer": "adamw", "lr": 0.1, "seed": 1, "split": "train"}
    run |= {"metric": "loss", "diverged": False, "protocol_version": 1}
    losses = [2.0, 1.0, 2 / 3, at_3, 0.4]
    return [run | {"step": step, "value": loss} for step, loss in enumerate(losses)]


def run_row(model: str, **changes: Any) -> dict[str, Any]:
    row = {"model": model, "run_id": "run", "code_version": "0.1.0+abc", "torch_version": "2.6"}
    row |= {"device": "cpu", "num_threads": 1, "seeds": [1], "command": "harness run " + model}
    started = datetime(2026, 1, 1, tzinfo=UTC)
    return row | {"started": started, "protocol_version": 1} | changes
