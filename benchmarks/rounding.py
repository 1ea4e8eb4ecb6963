"""How far rows move with the number of threads and the arithmetic: a table of docs/scale.md.

`python -m benchmarks.rounding` takes a minute, with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

import spectra_db
from harness import estimate_spectra
from harness.registry import get
from harness.training import load_problem

CASES = {"the same again": (1, "float32"), "2 threads": (2, "float32"), "4 threads": (4, "float32")}
CASES |= {"float64": (1, "float64")}


def rows_of(threads: int, dtype: str) -> pd.DataFrame:
    """Take the spectrum of cnn-digits at initialisation, sampled: 3 probes of 40 steps."""
    torch.set_num_threads(threads)
    problem = load_problem(get("cnn-digits"))
    return estimate_spectra(
        problem.model,
        problem.loss_fn,
        problem.batches,
        num_probes=3,
        num_steps=40,
        gram=False,
        dtype=dtype,
        batch_weights=problem.task.num_terms,
    )


def apart(rows: pd.DataFrame, others: pd.DataFrame) -> tuple[float, float, float]:
    """Return how far first products, largest eigenvalues and nodes of one place are apart."""
    pairs = list(zip(rows.to_dict("records"), others.to_dict("records"), strict=True))
    product = max(
        abs(a["alphas"][0] - b["alphas"][0]) / np.hypot(a["alphas"][0], a["betas"][0])
        for a, b in pairs
        if a["method"] == "slq"
    )
    nodes = [tuple(np.sort(row["nodes"]) for row in pair) for pair in pairs]
    scales = [abs(a).max() for a, _ in nodes]
    largest = max(abs(s - abs(b).max()) / s for s, (_, b) in zip(scales, nodes, strict=True))
    of_place = max(
        abs(a - b).max() / s for s, (a, b) in zip(scales, nodes, strict=True) if len(a) == len(b)
    )
    return float(product), float(largest), float(of_place)


def main() -> None:
    """Print the table."""
    rows = rows_of(1, "float32")
    js0 = spectra_db.js0(rows)
    error = f"{js0.corrected:.4f} ± {js0.standard_error:.4f}"
    print(f"| | first product, relative | largest eigenvalue, relative | JS⁰ ({error}) |")
    print("|---|---:|---:|---:|")
    worst = 0.0
    for name, case in CASES.items():
        others = rows_of(*case)
        product, largest, of_place = apart(rows, others)
        moved = abs(spectra_db.js0(others).corrected - js0.corrected)
        print(f"| {name} | {product:.1e} | {largest:.1e} | {moved:.1e} |")
        worst = max(worst, of_place)
    print(f"\nnodes in one place of the list: up to {worst:.2f} of the largest apart")


if __name__ == "__main__":
    main()
