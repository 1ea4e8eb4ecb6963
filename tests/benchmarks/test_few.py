from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks import few
from harness import estimate_spectra


def test_the_fewest_products_are_of_the_error_in_root_mean_square():
    errors = {(2, 8): [0.03, 0.0], (4, 8): [0.021, -0.015], (3, 8): [0.04, 0.04]}
    table = pd.DataFrame(
        [
            {"num_probes": p, "num_steps": m, "scale": "raw", "error": e, "truncation": False}
            for (p, m), of_setting in errors.items()
            for e in of_setting
        ]
        + [{"num_probes": 1, "num_steps": 8, "scale": "raw", "error": 0.0, "truncation": True}]
    )
    assert few.products_within(table, "raw") == 32
    assert few.products_within(table, "raw", 0.0213) == 16
    assert few.products_within(table, "raw", 0.001) is None
    assert few.products_within(table, "lambda10") is None


def test_probes_and_steps_bring_the_value_near_the_exact_one(monkeypatch):
    monkeypatch.setattr(few, "LADDER", ((2, 8), (12, 20)))
    monkeypatch.setattr(few, "REPETITIONS", 6)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 8))
    batch = torch.randn(32, 12), torch.randn(32, 8)
    truth = estimate_spectra(
        model, lambda m, b: ((m(b[0]) - b[1]) ** 2).mean(), [batch], dtype=torch.float64
    )
    assert set(truth["method"]) == {"exact"}
    errors = few.few(truth, ["raw"])
    assert len(errors) == 2 * 6
    rms = np.sqrt((errors["error"] ** 2).groupby(errors["num_probes"]).mean())
    assert rms[12] < min(0.02, rms[2])


@pytest.mark.parametrize("num_probes", [1, 2])
def test_of_few_probes_the_value_is_the_plug_in_one(num_probes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    rows = estimate_spectra(
        model, lambda m, b: m(b).square().mean(), [torch.randn(9, 6)], num_probes=num_probes,
        num_steps=6, exact_size=0,
    )  # fmt: skip
    assert 0 < few.best(rows, "own_rms") < 1
