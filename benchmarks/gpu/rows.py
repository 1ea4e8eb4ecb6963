"""Rows of two devices against each other: one model of each family, in four arithmetics."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.gpu.desk import Desk
from benchmarks.gpu.entries import load
from harness.campaign.spectrum import take_spectrum
from harness.errors import UserError
from harness.estimator.settings import Settings
from harness.records.ledger import Ledger
from harness.registry import entries
from harness.training import Problem
from spectra_db import js0, rules

BATCH = 16  # samples
NUM_PROBES, NUM_STEPS = 3, 10
# Name, whether on the device, dtype, precision of products: the coarse ones follow the fine.
ARITHMETICS: dict[str, tuple[bool, str, str]] = {
    "cpu float64": (False, "float64", "highest"),
    "cpu float32": (False, "float32", "highest"),
    "float64": (True, "float64", "highest"),
    "float32": (True, "float32", "highest"),
    "float32 again": (True, "float32", "highest"),
    "TF32": (True, "float32", "high"),
}


@dataclass(frozen=True)
class Agreement:
    """How far apart two sets of rows are, and whether rounding explains it.

    Attributes:
        first: Largest difference of a probe's first product, relative to its norm.
        second_moment: Largest relative difference of a block's mean wᵀθ², the estimate of ‖H‖².
        rules: Largest distance of two rules over what rounding and truncation allow.
        js0: Difference of JS⁰.
        js0_error: The coarse rows' standard error of JS⁰, all that js0 may differ by.
        agree: Whether all first products, second moments (squares of products: twice their
            rounding), rules and JS⁰ are as close as allowed.
        worst: Block whose rules are furthest apart.
    """

    first: float
    second_moment: float
    rules: float
    js0: float
    js0_error: float
    agree: bool
    worst: str


def compare_rows(coarse: pd.DataFrame, fine: pd.DataFrame) -> Agreement:
    """Compare rows of one spectrum that two devices, or two arithmetics, took.

    Args:
        coarse: Rows of table `spectra`; their arithmetic decides what rounding is.
        fine: Of the same blocks and probes; best in float64.

    Raises:
        ValueError: They are of different blocks or probes.
    """
    keys = ["block", "probe"]
    both = coarse.merge(fine, on=keys, suffixes=("", "_fine"), how="outer", indicator=True)
    if not (both["_merge"] == "both").all():
        raise ValueError(f"the rows are of different blocks or probes: {both[keys].values}")
    live = both[both["status"] == "ok"]
    other = ("alphas", "betas", "nodes", "weights")
    found = [
        (rules.compare(row, {name: row[f"{name}_fine"] for name in other}), row["block"])
        for row in live.to_dict("records")
    ]
    far, worst = max((d.distance / d.allowed if d.allowed else 0.0, name) for d, name in found)
    one, two = js0(coarse), js0(fine)
    apart = abs(one.value - two.value)
    moment = _moment_difference(live)
    alike = all(d.is_explained for d, _ in found)
    alike &= moment <= 2 * rules.product_rounding(live.iloc[0])
    return Agreement(
        first=max(d.first for d, _ in found),
        second_moment=moment,
        rules=far,
        js0=apart,
        js0_error=one.standard_error,
        agree=bool(alike and apart <= one.standard_error),
        worst=worst,
    )


def _moment_difference(live: pd.DataFrame) -> float:
    """Return by how much the second moments of a block differ at most."""
    moments = pd.DataFrame({"block": live["block"]})
    for suffix in ("", "_fine"):
        lists = zip(live["nodes" + suffix], live["weights" + suffix], strict=True)
        moments[f"m{suffix}"] = [float(np.dot(w, np.square(n))) for n, w in lists]
    means = moments.groupby("block").mean()
    return float((means["m"] / means["m_fine"] - 1).abs().max())


def compare_devices(desk: Desk) -> bool:
    """Take the spectrum of one model of each family on both devices, and compare."""
    for name in models(desk.rehearse):
        if desk.known(name):
            continue
        if desk.left <= 0:
            return False
        try:
            problem = load(name, batch_size=BATCH, rehearse=desk.rehearse)
        except UserError as error:
            desk.say(name, status="no data", reason=str(error))
            continue
        desk.say(name, **_compare(desk, problem))
    return True


def models(rehearse: bool) -> list[str]:
    """Return one small entry of each family, those of the paper's question first."""
    if rehearse:
        return ["tiny-gpt"]
    first: dict[str, str] = {}
    for entry in entries("small"):
        first.setdefault(entry.family, entry.name)
    return sorted(first.values(), key=lambda name: not name.startswith(("gpt", "vit", "resnet")))


def _compare(desk: Desk, problem: Problem) -> dict[str, Any]:
    taken: dict[str, pd.DataFrame] = {}
    for variant, (there, dtype, precision) in ARITHMETICS.items():
        settings = Settings(
            num_probes=NUM_PROBES,
            num_steps=2 if desk.rehearse else NUM_STEPS,
            dtype=dtype,
            device=desk.device if there else "cpu",
            matmul_precision=precision,
        )
        ledger = Ledger(desk.folder / variant.replace(" ", "-"))
        taken[variant] = take_spectrum(problem, settings, ledger, command="benchmarks.gpu")
    exact = taken.pop("cpu float64")
    found = {variant: asdict(compare_rows(rows, exact)) for variant, rows in taken.items()}
    lists = ["block", "probe", "alphas", "betas", "nodes", "weights"]
    twice = _equal(taken["float32"][lists], taken["float32 again"][lists])
    verdicts = {variant: numbers["agree"] for variant, numbers in found.items()}
    return {"agree": all(verdicts.values()), "twice_the_same": twice, "against_float64": found}


def _equal(one: pd.DataFrame, two: pd.DataFrame) -> bool:
    """Tell whether two frames hold the same lists, bit for bit."""
    return all(
        np.array_equal(a, b)
        for column in one
        for a, b in zip(one[column], two[column], strict=True)
    )
