"""Two runs of Lanczos on one spectrum, each disturbed by rounding, are of the same probe."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import spectra_db
from harness.estimator.lanczos import lanczos
from spectra_db.quadrature import gauss_rule
from spectra_db.rules import compare

EPS = 2.0**-23


def rule(eigenvalues: torch.Tensor, probe: torch.Tensor, seed: int, num_steps: int) -> dict:
    """Return the rule of a diagonal matrix, each product off by one rounding error of float32."""
    noise = torch.Generator().manual_seed(seed)

    def multiply(v: torch.Tensor) -> torch.Tensor:
        product = eigenvalues * v
        off = torch.randn(len(v), generator=noise, dtype=v.dtype)
        return product + EPS * product.norm() / len(v) ** 0.5 * off

    run = lanczos(multiply, probe, num_steps, reorthogonalize=False)
    nodes, weights = gauss_rule(run.alphas, run.betas)
    return {"alphas": run.alphas, "betas": run.betas, "nodes": nodes, "weights": weights}


@pytest.mark.parametrize("model", ["cifar-resnet8", "cifar-mlp", "bpe-mamba", "vit-cls-mnist"])
@pytest.mark.parametrize("num_steps", [20, 40])
def test_rounding_explains_what_two_arithmetics_make_of_a_probe(model, num_steps):
    rows = spectra_db.load("spectra", model=model, stage="init", method="exact", status="ok")
    rows = rows[rows["num_params"].between(100, 2000)]
    facts = {"method": "slq", "dtype": "float32", "matmul_precision": "highest"}
    facts |= {"breakdown": False, "num_params": 100}  # and more
    compared = 0
    for row in rows.to_dict("records"):
        counts = np.rint(row["weights"] * row["num_params"]).astype(int)
        eigenvalues = torch.from_numpy(np.repeat(row["nodes"], counts))
        if (eigenvalues.abs() > 1e-6 * eigenvalues.abs().max()).sum() < 60:
            continue  # Lanczos ends
        probe = torch.randn(len(eigenvalues), generator=torch.Generator().manual_seed(0)).double()
        one, other = (rule(eigenvalues, probe, seed, num_steps) for seed in (1, 2))
        assert compare(facts | one, other).is_explained, row["block"]
        higher = other["nodes"].copy()
        higher[-1] *= 1.5  # a weight of nothing or not
        assert not compare(facts | one, other | {"nodes": higher}).is_explained
        last = 10 * np.abs(one["nodes"]).max()  # metrics go on by it
        betas = [*other["betas"][:-1], last]
        assert not compare(facts | one, other | {"betas": betas}).is_explained
        compared += 1
    assert compared
