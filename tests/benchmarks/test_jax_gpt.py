from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.cases import CROSS_ENTROPY, Case, gpt, tokens
from benchmarks.jax_gpt import products
from harness import find_blocks
from harness.estimator.objective import Objective
from harness.estimator.operators import opened
from harness.estimator.settings import Settings


@pytest.mark.slow
def test_jax_multiplies_as_we_do():
    case = Case(gpt(11, 6, num_layers=1, num_heads=2, width=8), CROSS_ENTROPY, tokens(11, 2, 6))
    blocks = {b.name: b for b in find_blocks(case.model)}
    vectors = {
        name: torch.randn(blocks[name].shape, generator=torch.Generator().manual_seed(0))
        for name in ("h.0.attn.query.weight", "h.0.mlp.0.weight")
    }
    objective = Objective(case.model, case.loss_fn, [case.batch])
    chosen = [blocks[name] for name in vectors]
    with opened(objective, chosen, Settings(device="cpu")) as hessian:
        ours = hessian.products([(i, v.flatten()) for i, v in enumerate(vectors.values())])
    theirs = products(case, {name: v.numpy() for name, v in vectors.items()})
    for mine, product in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(
            np.asarray(product()).ravel(), mine, rtol=1e-3, atol=1e-5 * float(mine.abs().max())
        )
