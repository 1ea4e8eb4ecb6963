"""The recipe: blocks → block products → Lanczos → quadrature rules → rows of table `spectra`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn

from harness.errors import UserError
from harness.estimator import lanczos
from harness.estimator.batches import Batch, NumTerms, batch_hash, tensors_of
from harness.estimator.blocks import Block, find_blocks, unclassified
from harness.estimator.checks import (
    LossFn,
    check_bytes,
    fixed_arithmetic,
    warn_of_asymmetry,
    whole_number,
)
from harness.estimator.cost import EXACT_SIZE
from harness.estimator.device import choose_device, device_name, memory_share, peak_bytes
from harness.estimator.hessian import BlockHessian
from harness.estimator.probes import PROBE_DISTRIBUTIONS, draw_probe, probe_seed
from harness.estimator.quadrature import gauss_rule
from harness.estimator.share import Share
from spectra_db.schema import PROTOCOL_VERSION, TABLES

PRECISIONS = ("highest", "high", "medium")
DTYPES = {"float64": torch.float64, "float32": torch.float32}

Row = dict[str, Any]


def estimate_spectra(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Batch],
    *,
    blocks: str | Sequence[Block] = "weights",
    num_probes: int = 10,
    num_steps: int = 100,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    batch_weights: Sequence[float] | NumTerms | None = None,
    probe_distribution: str = "gaussian",
    reorthogonalize: bool = False,
    norm_mode: str = "eval",
    matmul_precision: str = "highest",
    memory_budget: int | None = None,
    exact_size: int = EXACT_SIZE,
    identity: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_block: Callable[[list[Row]], None] | None = None,
    probes: Mapping[str, Sequence[int]] | None = None,
    share: Share | None = None,
    kept: lanczos.Kept | None = None,
) -> pd.DataFrame:
    """Estimate the spectra of a model's Hessian blocks by stochastic Lanczos quadrature.

    For each block and each random unit vector v (probe) num_steps of Lanczos give a Gauss rule
    (θ_i, w_i) with Σ w_i f(θ_i) ≈ vᵀ f(H) v, in expectation tr f(H) / n (Zhang et al. 2024,
    arXiv 2402.16788, Algorithms 4 and 5; Ubaru, Chen & Saad 2017). Blocks of at most 1,000
    parameters are diagonalised instead.

    Args:
        model: Any module; it stays as it was.
        loss_fn: (model, batch) ↦ the mean loss of the batch, a scalar tensor.
        batches: The fixed batch, split into microbatches: each a tensor or a tuple, list or
            dict of tensors whose leading dimension counts samples.
        blocks: A partition (weights, paper, all, full) or a list of `Block`.
        num_probes: Probes per block; 10 in the paper. Errors of metrics need at least 3.
        num_steps: Lanczos steps per probe; 100 in the paper.
        seed: Seeds the probes, together with the names of model, stage and block.
        device: Where to compute; None: where the model is.
        dtype: Arithmetic of the products; alphas and betas are float64 always.
        batch_weights: Number of terms that each batch's mean averages: one number per batch, or
            a function of the batch. None: its leading dimension.
        probe_distribution: gaussian (normalised, as in the paper) or rademacher.
        reorthogonalize: Full reorthogonalisation; keeps num_steps vectors per probe.
        norm_mode: eval: batch norms use running statistics. train: those of the microbatch.
        matmul_precision: highest: float32; high: TF32; medium: bfloat16, where the device can.
        memory_budget: Bytes for graphs and vectors; None: half of the device's memory, on CPU
            divided among the processes that torchrun starts. A microbatch that takes more is
            halved, and so is one for which the device's memory turns out not to be enough. Not
            counted: the model, the first check of the loss, one pass without a graph over each
            batch as it is given, and freed memory that an allocator doesn't give back.
        exact_size: Blocks of at most this many parameters are diagonalised; 1,000 by the protocol.
        identity: Values of further columns of the rows: model, stage, init_seed, ...
        on_progress: Called with (products done, products in all).
        on_block: Called with the rows of each block as soon as it is finished.
        probes: The probes of each block to take here, by its name; None: all. See
            `harness.estimator.distributed`, which gives the others to other processes.
        share: This process's part of the samples, if several make each product together.
        kept: Recurrences by block and probe. Those found there go on instead of starting, and
            all are left there.

    Returns:
        One row per block and probe with the columns of table `spectra`. `spectra_db.js0` takes it.

    Raises:
        UserError: An argument is out of range, the loss is not deterministic, not finite or not
            twice differentiable, or the memory budget is too small.
        FloatingPointError: A product is not finite.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> model, batch = torch.nn.Linear(4, 3), (torch.ones(8, 4), torch.zeros(8).long())
        >>> rows = estimate_spectra(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [batch])
        >>> rows[["block", "num_params", "method"]].values.tolist()
        [['weight', 12, 'exact']]
    """
    num_probes, num_steps = (
        whole_number(name, value, 1)
        for name, value in (("num_probes", num_probes), ("num_steps", num_steps))
    )
    seed, exact_size = whole_number("seed", seed, 0), whole_number("exact_size", exact_size, 0)
    check_bytes(memory_budget)
    _check_settings(probe_distribution, matmul_precision, dtype)
    if isinstance(batches, torch.Tensor | Mapping) or (
        isinstance(batches, tuple) and all(isinstance(b, torch.Tensor) for b in batches)
    ):
        raise UserError(
            f"batches is a {type(batches).__name__}; pass a list of batches, such as "
            "[(inputs, targets)]"
        )
    try:
        batches = list(batches)  # once: a loader may shuffle, and a generator ends
    except TypeError as error:
        raise UserError(
            f"batches is a {type(batches).__name__}; pass a list of batches, such as "
            "[(inputs, targets)]"
        ) from error
    counts = [len(tensors_of(b)) for b in batches]
    for i, count in enumerate(counts):
        if count != counts[0]:
            raise UserError(
                f"the number of tensors is {count} in batch {i} and {counts[0]} in batch 0; pass "
                "batches of one structure, such as (inputs, targets)"
            )
    partition = blocks if isinstance(blocks, str) else "custom"
    blocks = find_blocks(model, blocks) if isinstance(blocks, str) else list(blocks)
    if partition == "weights" and (odd := unclassified(model)):
        warnings.warn(
            f"in no block of partition weights: {', '.join(b.name for b in odd)} "
            f"({sum(b.num_params for b in odd):,} parameters), called biases though they are "
            "matrices; blocks='all', or a list of Block, takes them too",
            stacklevel=2,
        )
    if strange := [block for block in blocks if not isinstance(block, Block)]:
        raise UserError(
            f"blocks holds {strange[0]!r}; pass a partition, or some of find_blocks(model)"
        )
    target = choose_device(model, device)
    budget = memory_share(target) if memory_budget is None else memory_budget
    with fixed_arithmetic(model, matmul_precision):
        hessian = BlockHessian(
            model,
            loss_fn,
            batches,
            blocks,
            batch_weights=batch_weights,
            device=target,
            dtype=dtype,
            norm_mode=norm_mode,
            memory_budget=budget,
            share=share,
        )
        shared = {
            "model": type(model).__name__,
            "stage": "current",
            "init_seed": seed,
            "train_run": "",
            "partition": partition,
            "operator": "hessian",
            "norm_mode": norm_mode,
            "dtype": str(dtype).removeprefix("torch."),
            "probe_distribution": probe_distribution,
            "batch_hash": batch_hash(batches),
            "protocol_version": PROTOCOL_VERSION,
            "run_id": "",
            "step": 0,
            "progress": 0.0,
            "reorthogonalized": reorthogonalize,
            "batch_size": hessian.batch_size,
            "num_terms": round(hessian.num_terms),
            "data_source": "",
            "matmul_precision": matmul_precision,
            "device": device_name(target),
            "tolerance": None,
            "status": "ok",
            "reason": None,
            **(identity or {}),
        }
        plan = _Plan(
            hessian,
            probes or {block.name: range(num_probes) for block in blocks},
            num_steps,
            seed,
            probe_distribution,
            reorthogonalize,
            exact_size,
            lanczos.Kept(0) if kept is None else kept,
        )
        rows: list[Row] = []
        for block_rows in _run(plan, shared, budget, on_progress or (lambda done, total: None)):
            rows += block_rows
            if on_block is not None:
                on_block(block_rows)
    order = {block.name: i for i, block in enumerate(blocks)}
    rows.sort(key=lambda row: (order[row["block"]], row["probe"]))
    return pd.DataFrame(rows, columns=TABLES["spectra"].names)


@dataclass(frozen=True)
class _Plan:
    """What is asked of one Hessian."""

    hessian: BlockHessian
    probes: Mapping[str, Sequence[int]]
    num_steps: int
    seed: int
    probe_distribution: str
    reorthogonalize: bool
    exact_size: int
    kept: lanczos.Kept

    def is_exact(self, block: Block) -> bool:
        """Tell whether a block is diagonalised."""
        return block.num_params <= self.exact_size


def _run(
    plan: _Plan, shared: Row, budget: int, on_progress: Callable[[int, int], None]
) -> Iterator[list[Row]]:
    """Yield the rows of each block as it is finished."""
    blocks = plan.hessian.blocks
    # Before the first product: processes of which one runs out of memory keep to one plan.
    groups = list(_groups(plan, budget))
    total = sum(
        b.num_params if plan.is_exact(b) else len(plan.probes[b.name]) * plan.num_steps
        for b in blocks
    )
    done = 0
    finished: dict[int, list[Row]] = {}
    for index, block in enumerate(blocks):
        if plan.is_exact(block):
            yield [_exact_row(plan, shared, index)]
            done += block.num_params
            on_progress(done, total)
    for pairs in groups:
        begin = time.perf_counter()
        states, seeds = [], []
        for index, probe in pairs:
            block = blocks[index]
            seeds.append(probe_seed(plan.seed, shared["model"], shared["stage"], block.name, probe))
            state = plan.kept.take((block.name, probe), plan.num_steps)
            if state is None:
                v0 = draw_probe(block.num_params, seeds[-1], plan.probe_distribution)
                v0 = v0.to(plan.hessian.device, plan.hessian.dtype)
                state = lanczos.start(v0, reorthogonalize=plan.reorthogonalize)
            states.append(state)
        while live := [
            (pair[0], state)
            for pair, state in zip(pairs, states, strict=True)
            if not state.is_done(plan.num_steps)
        ]:
            products = plan.hessian.products([(index, state.vector) for index, state in live])
            lanczos.advance([state for _, state in live], products)
            steps = [plan.num_steps if s.breakdown else len(s.alphas) for s in states]
            on_progress(done + sum(steps), total)
        done += len(pairs) * plan.num_steps
        on_progress(done, total)
        named = zip(pairs, states, strict=True)
        found = [(blocks[index].name, state.asymmetry) for (index, _), state in named]
        warn_of_asymmetry(found, plan.hessian.precision)
        seconds = (time.perf_counter() - begin) / len(pairs)
        for (index, probe), state, seed in zip(pairs, states, seeds, strict=True):
            rows = finished.setdefault(index, [])
            rows.append(_slq_row(plan, shared, index, probe, seed, state, seconds))
            plan.kept.put((blocks[index].name, probe), state)
            if len(rows) == len(plan.probes[blocks[index].name]):
                yield _unless_zero(plan, index, finished.pop(index))


def _groups(plan: _Plan, budget: int) -> Iterator[list[tuple[int, int]]]:
    """Yield (block, probe) pairs that are advanced together.

    With kept graphs a block at a time, since nothing is gained by more; else as many as fit the
    memory beside a graph, since they share its forward and backward pass.
    """
    hessian = plan.hessian
    free = budget - hessian.most_bytes
    vectors = 3 + (plan.num_steps if plan.reorthogonalize else 0)
    group: list[tuple[int, int]] = []
    used = 0
    for index, block in enumerate(hessian.blocks):
        if plan.is_exact(block):
            continue
        for probe in plan.probes[block.name]:
            size = vectors * block.num_params * hessian.dtype.itemsize
            full = used + size > free or (hessian.keeps_graphs and group and group[0][0] != index)
            if group and full:
                yield group
                group, used = [], 0
            group.append((index, probe))
            used += size
    if group:
        yield group


def _slq_row(
    plan: _Plan,
    shared: Row,
    index: int,
    probe: int,
    seed: int,
    state: lanczos.Recurrence,
    seconds: float,
) -> Row:
    """Make the row of one block and probe."""
    nodes, weights = gauss_rule(state.alphas, state.betas)
    block = plan.hessian.blocks[index]
    return shared | {
        "block": block.name,
        "probe": probe,
        "block_kind": block.kind,
        "num_params": block.num_params,
        "method": "slq",
        "probe_seed": seed,
        "num_steps": len(state.alphas),
        "breakdown": state.breakdown,
        "alphas": state.alphas,
        "betas": state.betas,
        "nodes": nodes.tolist(),
        "weights": weights.tolist(),
        "num_products": len(state.alphas),
        "seconds": seconds,
        "peak_bytes": peak_bytes(plan.hessian.device),
        # Halved on the way if memory ran out.
        "microbatch_size": plan.hessian.microbatch_size,
    }


def _exact_row(plan: _Plan, shared: Row, index: int) -> Row:
    """Diagonalise a small block."""
    begin = time.perf_counter()
    block = plan.hessian.blocks[index]
    n = block.num_params
    H = plan.hessian.dense(index).double()
    if not torch.isfinite(H).all():
        raise FloatingPointError(
            f"the Hessian of block {block.name!r} is not finite; use a wider dtype or look for inf "
            "or nan in the second derivative"
        )
    zero = not H.any()
    nodes = [0.0] if zero else torch.linalg.eigvalsh(H).tolist()
    reason = _reason_of_zero(plan, index, "the block's Hessian") if zero else None
    return (
        shared
        | {
            "block": block.name,
            "probe": 0,
            "block_kind": block.kind,
            "num_params": n,
            "method": "exact",
            "probe_seed": 0,
            "num_steps": 0,
            "breakdown": False,
            "alphas": [],
            "betas": [],
            "nodes": nodes,
            "weights": [1.0 / len(nodes)] * len(nodes),
            "num_products": n,
            "seconds": time.perf_counter() - begin,
            "peak_bytes": peak_bytes(plan.hessian.device),
            "microbatch_size": plan.hessian.microbatch_size,
        }
        | ({"status": "zero", "reason": reason} if zero else {})
    )


def _unless_zero(plan: _Plan, index: int, rows: list[Row]) -> list[Row]:
    """Replace the probes of an exactly zero block by its one row of status `zero`."""
    if any(row["alphas"] != [0.0] or row["betas"] != [0.0] for row in rows):
        return rows
    reason = _reason_of_zero(plan, index, "every product with the block's Hessian")
    products = sum(row["num_products"] for row in rows)
    return [rows[0] | {"status": "zero", "reason": reason, "num_products": products}]


def _reason_of_zero(plan: _Plan, index: int, what: str) -> str:
    """Return why a block is of status zero; warn if its gradient changes all the same."""
    if not plan.hessian.differences.is_nonzero(index):
        return f"{what} is exactly zero"
    warnings.warn(
        f"{plan.hessian.blocks[index].name}: {what} is exactly zero, but the gradient changes "
        "along a random direction: a second derivative of the model is wrong. In the backward of "
        "custom autograd functions, compute with what save_for_backward kept, in differentiable "
        "operations",
        stacklevel=2,
    )
    return f"{what} is exactly zero, but the gradient changes: a second derivative is wrong"


def _check_settings(distribution: str, precision: str, dtype: torch.dtype) -> None:
    """Raise unless the settings are known ones."""
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"dtype is {dtype!r}; pass a torch.dtype, such as torch.float32")
    for name, given, allowed in (
        ("probe_distribution", distribution, PROBE_DISTRIBUTIONS),
        ("matmul_precision", precision, PRECISIONS),
        ("dtype", str(dtype).removeprefix("torch."), tuple(DTYPES)),
    ):
        if given not in allowed:
            raise UserError(f"{name} is {given!r}; choose one of {', '.join(allowed)}")
