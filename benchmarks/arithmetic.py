"""What rounding does to spectra: other arithmetics, and rules that alternate near zero."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import wasserstein_distance
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import small
from benchmarks.study import estimate, reference_entries
from harness import estimate_spectra
from harness.estimator.batches import take
from harness.training import load_problem
from spectra_db.quadrature import gauss_rule


class TF32(TorchDispatchMode):
    """Rounds what is multiplied to the 10 bits of TF32's mantissa; sums stay float32.

    What a GPU's tensor cores do, where there is none: for the deviation, not for the speed.
    """

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.PRODUCTS:
            first = 1 if name in ("addmm", "baddbmm") else 0
            rounded = [_to_tf32(a) for a in args[first : first + 2]]
            if name == "convolution_backward":
                rounded.append(_to_tf32(args[2]))
            args = (*args[:first], *rounded, *args[first + len(rounded) :])
        return func(*args, **(kwargs or {}))


def _to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to nearest, ties to even, at 10 bits of the mantissa."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32).view_as(x)


ARITHMETIC: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "float64": (nullcontext, {"dtype": torch.float64}),
    "float32": (nullcontext, {}),
    "TF32 (emulated)": (TF32, {}),
    "float32, `medium`": (nullcontext, {"matmul_precision": "medium"}),
}


def arithmetic(kind: str) -> pd.DataFrame:
    """Take one spectrum in every arithmetic, with the same probes."""
    case = small(kind)
    results = []
    wide = pd.DataFrame()
    for name, (mode, options) in ARITHMETIC.items():
        with mode():
            rows = case.spectra(num_probes=3, num_steps=40, exact_size=0, **options)
        wide = rows if name == "float64" else wide
        ends, distances = [], []
        for a, b in zip(wide.itertuples(), rows.itertuples(), strict=True):
            size = np.abs(a.nodes).max()
            ends.append(abs(np.abs(b.nodes).max() / size - 1))
            rms = np.sqrt(np.dot(a.weights, np.square(a.nodes)))
            distances.append(wasserstein_distance(a.nodes, b.nodes, a.weights, b.weights) / rms)
        results.append(
            {"arithmetic": name, "largest": np.max(ends), "w1": np.mean(distances)} | estimate(rows)
        )
    return pd.DataFrame(results)


def full() -> pd.DataFrame:
    """Follow the full spectrum of a perceptron on digits, most of it near zero, step by step.

    With the same probe in float32, in float64, and in float64 with reorthogonalisation, whose
    rule of many steps stands for the truth. W1 in units of the rms eigenvalue.
    """
    entry, num_samples = reference_entries()["mlp"]
    problem = load_problem(replace(entry, options={"widths": (256, 128)}))
    batch = take(problem.batches[0], 0, num_samples)
    wide: dict[str, Any] = {"dtype": torch.float64, "num_steps": 61}
    settings = {
        "float32": {"num_steps": 61},
        "float64": wide,
        "reorthogonalised": wide | {"num_steps": 250, "reorthogonalize": True},
    }
    runs = {
        name: estimate_spectra(
            problem.model, problem.loss_fn, [batch], blocks="full", num_probes=2, **options
        )
        for name, options in settings.items()
    }

    def rule(name: str, m: int, probe: int = 0) -> tuple[Any, Any]:
        row = runs[name].iloc[probe]
        return gauss_rule(row["alphas"][:m], row["betas"][:m])

    truth = rule("reorthogonalised", 250)
    rms = np.sqrt(truth[1] @ truth[0] ** 2)

    def distance(a: tuple[Any, Any], b: tuple[Any, Any]) -> float:
        return float(wasserstein_distance(a[0], b[0], a[1], b[1]) / rms)

    found = []
    for m in (20, 30, 36, 38, 40, 42, 44, 46, 48, 50, 55, 60):
        errors = {f"{name}: error": distance(rule(name, m), truth) for name in settings}
        others = {
            "float32 to float64": rule("float32", m),
            "to the next step": rule("float64", m + 1),
            "to the other probe": rule("float64", m, 1),
        }
        distances = {name: distance(other, rule("float64", m)) for name, other in others.items()}
        found.append({"num_steps": m} | errors | distances)
    near_zero = truth[1][np.abs(truth[0]) < 0.02 * rms].sum()
    size = runs["float32"]["num_params"].iloc[0]
    return pd.DataFrame(found).assign(num_params=size, near_zero=near_zero)
