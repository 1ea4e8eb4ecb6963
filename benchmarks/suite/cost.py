"""What a lockstep step costs: operations, time, memory, ours and others'."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch

from benchmarks import peers
from benchmarks.cases import Case, count_flops, resnet18
from benchmarks.peers import CASES
from harness import find_blocks
from harness.estimator.checks import fixed_arithmetic
from harness.estimator.objective import Objective
from harness.estimator.operators import opened
from harness.estimator.settings import Settings

# More operations than these per step are an error, which `make bench-check` reports.
MOST_GFLOP = {"gpt-10m": 600, "resnet18": 110, "shortcuts": 12}
# The largest part of the paper's time; and probes × steps that leave 2 % of JS⁰ by λ10
# (docs/accuracy.md, Few products). All blocks of ResNet18 are exact, at any setting.
MOST_PART = {"gpt-10m": 1 / 120, "resnet18": 1 / 500}
FEW = (2, 8)
REPEATS = {"gpt-10m": 1, "resnet18": 3}  # of minutes each, and of seconds
BUDGET = 8 << 30


def lockstep_flops(case: Case) -> int:
    """Count one lockstep step of `estimate_spectra`: two steps less one."""
    spectra = partial(case.spectra, num_probes=1, memory_budget=BUDGET)
    one, two = (count_flops(partial(spectra, num_steps=num_steps)) for num_steps in (1, 2))
    return two - one


def checked(gflop: float, most: float) -> float:
    """Return the operations of a step; more than are allowed are an error."""
    if gflop > most:
        raise ValueError(f"{gflop:.1f} GFLOP per step; at most {most} are allowed")
    return gflop


class Step:
    """One product with every block: operations."""

    params = (list(CASES),)
    param_names = ("case",)
    timeout = 900

    def setup(self, name: str) -> None:
        self.case = CASES[name]()

    def track_gflop(self, name: str) -> float:
        return checked(lockstep_flops(self.case) / 1e9, MOST_GFLOP[name])

    track_gflop.unit = "GFLOP per step"  # type: ignore[attr-defined]


class Shortcuts:
    """One product with every block of ResNet18, each a layer forth and back."""

    timeout = 900

    def setup(self) -> None:
        self.step = peers.ours(resnet18())

    def time_step(self) -> None:
        self.step()

    def track_gflop(self) -> float:
        return checked(count_flops(self.step) / 1e9, MOST_GFLOP["shortcuts"])

    track_gflop.unit = "GFLOP per step"  # type: ignore[attr-defined]


class Products:
    """Time of the same products by our estimator and by others."""

    params = (list(CASES), list(peers.PEERS))
    param_names = ("case", "way")
    timeout = 900
    number = 1
    repeat = 3
    warmup_time = 0

    def setup(self, name: str, way: str) -> None:
        self.step = peers.PEERS[way](CASES[name]())

    def time_step(self, name: str, way: str) -> None:
        self.step()


class Whole:
    """2 × 8 steps, or exact where outputs are locally linear, beside the paper's 10 × 100."""

    params = (list(CASES),)
    param_names = ("case",)
    timeout = 1800

    def track_part(self, name: str) -> float:
        case = CASES[name]()
        step = peers.paper_algorithm(case)
        paper = 10 * 100 * _least_cpu_seconds(step, 3)
        settings = {"num_probes": FEW[0], "num_steps": FEW[1], "gram": True}
        spectra = partial(case.spectra, **settings, memory_budget=BUDGET)
        ours = _least_cpu_seconds(spectra, REPEATS[name])
        if ours > MOST_PART[name] * paper:
            raise ValueError(f"1/{paper / ours:.0f}; at most 1/{1 / MOST_PART[name]:.0f}")
        return ours / paper

    track_part.unit = "of the processor time of the paper's algorithm"  # type: ignore[attr-defined]


class Exact:
    """Exact spectra of all blocks of ResNet18, from Gram matrices."""

    timeout = 900
    number = 1
    repeat = 3
    warmup_time = 0

    def setup(self) -> None:
        self.case = resnet18()

    def time_spectra(self) -> None:
        self.spectra()

    def track_sampled(self) -> int:
        return int((self.spectra()["method"] == "slq").sum())

    track_sampled.unit = "blocks that are not exact"  # type: ignore[attr-defined]

    def spectra(self) -> pd.DataFrame:
        # One product of each block that would not be exact.
        return self.case.spectra(gram=True, num_probes=1, num_steps=1, memory_budget=BUDGET)


class Memory:
    """Peak memory of a whole spectrum, which must not grow with the steps."""

    params = ([5, 40],)
    param_names = ("num_steps",)
    timeout = 900

    def peakmem_spectrum(self, num_steps: int) -> None:
        case = resnet18()
        blocks = find_blocks(case.model)[-4:]
        case.spectra(blocks=blocks, num_probes=2, num_steps=num_steps, memory_budget=BUDGET)


class Rebuilt:
    """A step where the graph does not fit and is built again, its passes shared by all blocks."""

    timeout = 900
    number = 1
    repeat = 3

    def setup(self) -> None:
        case = resnet18()
        self.blocks = find_blocks(case.model)
        halves = [tuple(t[i : i + 8] for t in case.batch) for i in (0, 8)]
        of = Objective(case.model, case.loss_fn, halves), self.blocks
        # Enough for a product with one half, not for the graphs of both.
        with opened(*of, Settings(device="cpu", memory_budget=BUDGET)) as hessian:
            one = hessian.product_bytes
        with opened(*of, Settings(device="cpu", memory_budget=one)) as self.hessian:
            pass

    def time_step(self) -> None:
        assert not self.hessian.keeps_graphs
        with fixed_arithmetic(torch.nn.Module()):
            self.hessian.products(
                [(i, torch.ones(b.num_params)) for i, b in enumerate(self.blocks)]
            )


def _least_cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        seconds.append(time.process_time() - begin)
    return min(seconds)
