"""One published row taken again, from its recorded seeds, weights and data."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from harness.errors import UserError
from harness.estimator import gram, shortcuts
from harness.estimator.batches import batch_hash
from harness.estimator.blocks import Block
from harness.estimator.hessian import BlockHessian
from harness.estimator.lanczos import lanczos
from harness.estimator.operators import opened
from harness.estimator.probes import draw_probe, probe_seed
from harness.estimator.settings import CHOICES, MOST_EXACT, Settings
from harness.registry import ModelEntry
from harness.training import Problem, load_problem
from harness.training.stages import STAGE_SEED, checkpoint_path
from spectra_db.files import sha256_of
from spectra_db.jackknife import MIN_PROBES
from spectra_db.quadrature import gauss_rule


class TooLong(Exception):  # noqa: N818
    """What was begun would not end within the time that is left."""


class Unverifiable(UserError):  # noqa: N818
    """A row that can't be recomputed here; the text says why."""


class Wrong(Exception):  # noqa: N818
    """What a row says of itself is not so."""


@dataclass(frozen=True)
class Means:
    """What there is to make published results again with.

    Attributes:
        data_root: Folder of data sets.
        checkpoint_dir: Folder of checkpoints, which stages after init need; None: there is none.
        device: Where to compute.
        deadline: When it must end, in the time of `time.monotonic`.
    """

    data_root: Path | None = None
    checkpoint_dir: Path | None = None
    device: str | None = None
    deadline: float = math.inf


def problem_of(
    row: dict[Any, Any], entry: ModelEntry, published: pd.DataFrame, means: Means
) -> Problem:
    """Load the row's problem, from weights and data that are provably the published ones.

    Args:
        row: Of table `spectra`.
        entry: Its entry.
        published: Rows of table `stages` beside it.
        means: Where data and checkpoints lie.

    Raises:
        UserError: The data or the weights are not here.
        Wrong: Data or batch are not what the row says.
    """
    needed = checkpoint_of(entry, row["stage"], row["init_seed"])
    if needed is not None:
        _check_checkpoint(published, *needed, means.checkpoint_dir)
    problem = load_problem(
        entry,
        row["stage"],
        row["init_seed"],
        data_root=means.data_root,
        checkpoint_dir=means.checkpoint_dir,
    )
    elsewhere = f"the data here are {problem.data_source}, not {row['data_source']}"
    if batch_hash(problem.batches) != row["batch_hash"]:
        same = problem.data_source == row["data_source"]
        raise Wrong("the data are the same, the batch is not" if same else elsewhere)
    if problem.data_source != row["data_source"]:
        raise Wrong(elsewhere)
    return problem


def checkpoint_of(entry: ModelEntry, stage: str, seed: int) -> tuple[str, int, str] | None:
    """Return model, seed and stage of the weights that a stage has; None: its seed gives them."""
    if stage != "init":
        return entry.name, seed, stage
    return None if entry.pretrained is None else (entry.pretrained, STAGE_SEED, "final")


def _check_checkpoint(
    published: pd.DataFrame, model: str, seed: int, stage: str, checkpoint_dir: Path | None
) -> None:
    """Raise unless the checkpoint lies here and is the published one."""
    known = published[
        (published["model"] == model)
        & (published["stage"] == stage)
        & (published["seed"] == seed)
        & (published["optimizer"] == "adamw")
    ]
    if known.empty:
        raise Unverifiable(f"table stages has no checkpoint of {model} at {stage}")
    path = checkpoint_path(checkpoint_dir or "", model, seed, stage)
    if checkpoint_dir is None or not path.is_file():
        raise Unverifiable(f"the checkpoint of {model} at {stage} is not here")
    if sha256_of(path) != known.iloc[0]["checkpoint_sha256"]:
        raise Unverifiable(f"the checkpoint of {model} at {stage} here is not the published one")


def recompute(row: dict[Any, Any], problem: Problem, means: Means) -> dict[str, Any]:
    """Return alphas, betas, nodes and weights of the row's block and probe.

    Args:
        row: Of table `spectra`.
        problem: From `problem_of`.
        means: Where to compute, and until when.

    Raises:
        TooLong: By the time of the second product it would end later.
        Unverifiable: Its microbatches don't fit.
        Wrong: The block, the probe's seed or where the recurrence ended is not what the row says.
    """
    block, settings = _block_of(row, problem), _settings_of(row, means.device)
    with opened(problem.objective, [block], settings) as hessian:
        if row["norm_mode"] == "train" and hessian.microbatch_size != row["microbatch_size"]:
            raise Unverifiable(f"batch statistics of {row['microbatch_size']} samples don't fit")
        count = block.num_params if row["method"] == "exact" else row["num_steps"]
        _prepare(row, hessian)
        multiply = _timed(lambda v: hessian.products([(0, v)])[0], count, means.deadline)
        if row["method"] == "exact":
            if found := _by_gram(row, hessian, means.deadline):
                return found
            for _ in range(min(2, count)):
                multiply(torch.ones(count, dtype=hessian.dtype, device=hessian.device))
            eigenvalues = torch.linalg.eigvalsh(hessian.dense(0).double()).cpu().numpy()
            weights = np.full(len(eigenvalues), 1 / len(eigenvalues))
            return {"alphas": [], "betas": [], "nodes": eigenvalues, "weights": weights}
        names = (row["init_seed"], row["model"], row["stage"], row["block"], row["probe"])
        if probe_seed(*names) != row["probe_seed"]:
            raise Wrong("the probe's seed is not the one of its name")
        v0 = draw_probe(block.num_params, row["probe_seed"], row["probe_distribution"])
        run = lanczos(
            multiply,
            v0.to(hessian.device, hessian.dtype),
            row["num_steps"],
            reorthogonalize=row["reorthogonalized"],
        )
    if run.breakdown != row["breakdown"] or len(run.alphas) != len(row["alphas"]):
        raise Wrong(f"the recurrence took {len(run.alphas)} steps, breakdown {run.breakdown}")
    nodes, weights = gauss_rule(run.alphas, run.betas)
    return {"alphas": run.alphas, "betas": run.betas, "nodes": nodes, "weights": weights}


def product_error(row: dict[Any, Any], problem: Problem, device: str | None) -> float:
    """Return by how much of its norm a product of the row's arithmetic differs from float64's.

    Infinite where that norm is 0.

    Args:
        row: Of table `spectra`, whose block is that of the problem.
        problem: From `problem_of`.
        device: Where to compute.
    """
    block, settings = _block_of(row, problem), _settings_of(row, device)
    names = (row["init_seed"], row["model"], row["stage"], row["block"], 0)
    v = draw_probe(block.num_params, probe_seed(*names), "gaussian")
    found = []
    for each in (settings, replace(settings, dtype="float64", matmul_precision="highest")):
        with opened(problem.objective, [block], each) as hessian:
            _prepare(row, hessian)
            Hv = hessian.products([(0, v.to(hessian.device, hessian.dtype))])[0]
            found.append(Hv.double().cpu())
    norm = float(found[1].norm())
    return float((found[0] - found[1]).norm()) / norm if norm else float("inf")


def _block_of(row: dict[Any, Any], problem: Problem) -> Block:
    """Return the row's block; raise Wrong if there is none of its name and size."""
    found = problem.blocks(row["partition"])
    block = next((b for b in found if b.name == row["block"]), None)
    if block is None:
        raise Wrong(f"{problem.entry.name} has no block {row['block']!r} in {row['partition']}")
    if block.num_params != row["num_params"]:
        raise Wrong(f"the block has {block.num_params} parameters, not {row['num_params']}")
    return block


def _settings_of(row: dict[Any, Any], device: str | None) -> Settings:
    product = row.get("product")  # null in rows that are older than the column
    return Settings(
        row["partition"],
        dtype=row["dtype"],
        device=device,
        norm_mode=row["norm_mode"],
        matmul_precision=row["matmul_precision"],
        operator=row["operator"],
        product=product if isinstance(product, str) else CHOICES["product"][0],
    )


def _prepare(row: dict[Any, Any], hessian: BlockHessian) -> None:
    """Have products made as the row's were, with as many probes as an error needs."""
    if row["method"] == "slq":
        shortcuts.prepare(hessian, [0], MIN_PROBES * row["num_steps"])


def _by_gram(row: dict[Any, Any], hessian: BlockHessian, deadline: float) -> dict[str, Any] | None:
    """Return nodes and weights of an exact row that is of a Gram matrix; None if it is not."""
    n = row["num_params"]
    if row["num_products"] == n:  # one for each parameter
        return None
    for _, (nodes, weights), _ in gram.spectra(hessian, [0], on_rows=_until(deadline)):
        return {"alphas": [], "betas": [], "nodes": np.array(nodes), "weights": np.array(weights)}
    if n > MOST_EXACT:
        raise Unverifiable(
            "its Gram matrix is not to be had here, for want of memory or by rounding"
        )
    return None


def _until(deadline: float) -> Callable[[int, int], None]:
    """Return what stops work that, by how far it is, would end after the deadline."""
    begin = time.monotonic()

    def on_rows(done: int, total: int) -> None:
        nonlocal begin
        now = time.monotonic()
        begin = begin if done else now
        if now + (now - begin) * (total - done) / max(done, 1) > deadline:
            raise TooLong

    return on_rows


def _timed(
    product: Callable[[torch.Tensor], torch.Tensor], count: int, deadline: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the product; the second call of `count` tells when the last would end."""
    calls = itertools.count(1)

    def timed(v: torch.Tensor) -> torch.Tensor:
        begin, call = time.monotonic(), next(calls)
        result = product(v)
        now = time.monotonic()
        if now > deadline or (call == 2 and now + (now - begin) * (count - 2) > deadline):
            raise TooLong
        return result

    return timed
