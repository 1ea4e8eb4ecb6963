"""The recipe: blocks → block products → Lanczos → quadrature rules → rows of table `spectra`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import nn

from harness.errors import UserError
from harness.estimator import gram, lanczos, shortcuts
from harness.estimator.batches import Batch, NumTerms, batch_hash
from harness.estimator.blocks import Block, find_blocks, unclassified
from harness.estimator.checks import warn_of_asymmetry
from harness.estimator.device import device_name, peak_bytes
from harness.estimator.hessian import BlockHessian
from harness.estimator.kinds import class_name
from harness.estimator.objective import LossFn, Objective
from harness.estimator.operators import opened
from harness.estimator.probes import draw_probe, probe_seed
from harness.estimator.settings import Settings, check_names, whole_number
from spectra_db.quadrature import gauss_rule
from spectra_db.schema import PROTOCOL_VERSION, TABLES

Row = dict[str, Any]
OnProgress = Callable[[int, int], None]


def estimate_spectra(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Batch],
    *,
    blocks: str | Sequence[Block] = "weights",
    num_probes: int = 10,
    num_steps: int = 100,
    seed: int = 0,
    batch_weights: Sequence[float] | NumTerms | None = None,
    on_progress: OnProgress | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Estimate the spectra of a model's Hessian blocks by stochastic Lanczos quadrature.

    For each block and each random unit vector v (probe) num_steps of Lanczos give a Gauss rule
    (θ_i, w_i) with Σ w_i f(θ_i) ≈ vᵀ f(H) v, in expectation tr f(H) / n (Zhang et al. 2024,
    arXiv 2402.16788, Algorithms 4 and 5; Ubaru, Chen & Saad 2017). Blocks of at most 1,000
    parameters are diagonalised instead, or of as many as their probes would take products (4,000 at
    most).

    Args:
        model: Any module; it stays as it was. Of one that FSDP2's `fully_shard` has sharded all
            processes call this with the same arguments, product="differences" among them, divide
            the samples themselves and get the same rows (docs/scale.md).
        loss_fn: (model, batch) ↦ the mean loss of the batch, a scalar tensor.
        batches: The fixed batch, split into microbatches: each a tensor or a tuple, list or
            dict of tensors whose leading dimension counts samples.
        blocks: A partition, as `find_blocks` has them, or a list of `Block`.
        num_probes: Probes per block; 10 in the paper. Errors of metrics need at least 3.
        num_steps: Lanczos steps per probe; 100 in the paper.
        seed: Seeds the probes, together with the names of model, stage and block.
        batch_weights: Number of terms that each batch's mean averages: one number per batch, or
            a function of the batch. None: its leading dimension.
        on_progress: Called with (products done, products in all).
        **settings: device, dtype, norm_mode, probe_distribution, reorthogonalize,
            matmul_precision, memory_budget, exact_size, product, operator and gram, as `Settings`
            has them; operator ggn and gram need a `SplitLoss`.

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
    partition = blocks if isinstance(blocks, str) else "custom"
    check_names("estimate_spectra", settings)
    how = Settings(partition, num_probes, num_steps, **settings)
    seed = whole_number("seed", seed, 0)
    objective = Objective(model, loss_fn, batches, batch_weights)
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
    source = {
        "model": class_name(model),
        "stage": "current",
        "init_seed": seed,
        "train_run": "",
        "batch_hash": batch_hash(objective.batches),
        "run_id": "",
        "step": 0,
        "progress": 0.0,
        "data_source": "",
    }
    with opened(objective, blocks, how) as hessian:
        return gathered(rules(hessian, how, source, on_progress=on_progress), blocks)


def gathered(parts: Iterable[list[Row]], blocks: Sequence[Block]) -> pd.DataFrame:
    """Return rows of table `spectra` in the order of blocks and probes."""
    order = {block.name: i for i, block in enumerate(blocks)}
    rows = sorted(
        (r for part in parts for r in part), key=lambda r: (order[r["block"]], r["probe"])
    )
    return pd.DataFrame(rows, columns=TABLES["spectra"].names)


def rules(
    hessian: BlockHessian,
    settings: Settings,
    source: Mapping[str, Any],
    *,
    probes: Mapping[str, Sequence[int]] | None = None,
    steps: Mapping[str, int] | None = None,
    kept: lanczos.Kept | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[list[Row]]:
    """Yield the rows of table `spectra` of each block as it is finished.

    Args:
        hessian: The products.
        settings: How the rules are taken; those that the Hessian was opened with.
        source: The columns that say of what: model, stage and init_seed, which seed the probes,
            together with the block's name, train_run, batch_hash, run_id, step, progress and
            data_source.
        probes: The probes of each block to take, by its name; None: all of all blocks.
        steps: The steps of each block's probes, by its name; None: the settings' of all.
        kept: Recurrences by block and probe. Those found there go on instead of starting, and
            all are left there.
        on_progress: Called with (products done, products in all).

    Raises:
        FloatingPointError: A product is not finite.
    """
    if probes is None:
        probes = {block.name: range(settings.num_probes) for block in hessian.blocks}
    shared = settings.columns | {
        "protocol_version": PROTOCOL_VERSION,
        "batch_size": hessian.batch_size,
        "num_terms": round(hessian.num_terms),
        "device": device_name(hessian.device),
        "tolerance": None,
        "product": settings.product,
        "status": "ok",
        "reason": None,
        **source,
    }
    if steps is None:
        steps = dict.fromkeys(probes, settings.num_steps)
    kept = lanczos.Kept(0) if kept is None else kept
    plan = _Plan(hessian, settings, shared, probes, steps, kept)
    return _run(plan, on_progress or (lambda done, total: None))


@dataclass(frozen=True)
class _Plan:
    """What is asked of one Hessian."""

    hessian: BlockHessian
    settings: Settings
    shared: Row
    probes: Mapping[str, Sequence[int]]
    steps: Mapping[str, int]
    kept: lanczos.Kept

    def seed(self, index: int, probe: int) -> int:
        """Return the seed of a probe of a block."""
        of, block = self.shared, self.hessian.blocks[index].name
        return probe_seed(of["init_seed"], of["model"], of["stage"], block, probe)

    @property
    def todo(self) -> list[tuple[int, Block]]:
        """The blocks that are asked for, with their numbers."""
        return [(i, b) for i, b in enumerate(self.hessian.blocks) if b.name in self.probes]


def _run(plan: _Plan, on_progress: OnProgress) -> Iterator[list[Row]]:
    """Yield the rows of each block as it is finished."""
    if most_outputs := gram.most_outputs(plan.hessian, plan.settings):
        taken = yield from _gram_rows(plan, most_outputs)
        if plan.settings.gram and not taken:
            warnings.warn(
                "gram=True takes none of the blocks that are left: the outputs bend in each, or "
                "the criterion is not convex in them, or outputs or memory do not allow it; they "
                "are taken as without it",
                stacklevel=2,
            )
        others = {name: some for name, some in plan.probes.items() if name not in taken}
        plan = replace(plan, probes=others)
        if not others:
            on_progress(0, 0)
    blocks, settings = plan.hessian.blocks, plan.settings
    most = settings.num_probes * settings.num_steps
    shortcuts.prepare(plan.hessian, [i for i, _ in plan.todo], most)
    # Before the first product: processes of which one runs out of memory keep to one plan.
    groups = list(_groups(plan))
    total = sum(
        b.num_params
        if settings.is_exact(b.num_params)
        else len(plan.probes[b.name]) * plan.steps[b.name]
        for _, b in plan.todo
    )
    done = 0
    finished: dict[int, list[Row]] = {}
    for index, block in plan.todo:
        if settings.is_exact(block.num_params):
            yield [_diagonalised(plan, index)]
            done += block.num_params
            on_progress(done, total)
    for pairs in groups:
        begin = time.perf_counter()
        ends = [plan.steps[blocks[index].name] for index, _ in pairs]
        states = [
            plan.kept.take((blocks[index].name, probe), end) or _started(plan, index, probe)
            for (index, probe), end in zip(pairs, ends, strict=True)
        ]
        while live := [
            (pair[0], state)
            for pair, state, end in zip(pairs, states, ends, strict=True)
            if not state.is_done(end)
        ]:
            products = plan.hessian.products([(index, state.vector) for index, state in live])
            lanczos.advance([state for _, state in live], products)
            made = (
                end if s.breakdown else len(s.alphas) for s, end in zip(states, ends, strict=True)
            )
            on_progress(done + sum(made), total)
        done += sum(ends)
        on_progress(done, total)
        both = zip(pairs, states, strict=True)
        found = [(blocks[index].name, state.asymmetry) for (index, _), state in both]
        if plan.hessian.is_autograd:
            warn_of_asymmetry(found, plan.hessian.precision)
        seconds = (time.perf_counter() - begin) / len(pairs)
        for (index, probe), state in zip(pairs, states, strict=True):
            rows = finished.setdefault(index, [])
            rows.append(_slq_row(plan, index, probe, state, seconds))
            plan.kept.put((blocks[index].name, probe), state)
            if len(rows) == len(plan.probes[blocks[index].name]):
                yield _unless_zero(plan, index, finished.pop(index))


def _groups(plan: _Plan) -> Iterator[list[tuple[int, int]]]:
    """Yield (block, probe) pairs that are advanced together.

    With kept graphs a block at a time, since nothing is gained by more; else as many as fit the
    memory beside a graph, since they share its forward and backward pass.
    """
    hessian = plan.hessian
    free = hessian.memory_budget - hessian.most_bytes
    group: list[tuple[int, int]] = []
    used = 0
    for index, block in plan.todo:
        if plan.settings.is_exact(block.num_params):
            continue
        for probe in plan.probes[block.name]:
            vectors = 3 + (plan.steps[block.name] if plan.settings.reorthogonalize else 0)
            size = vectors * block.num_params * hessian.dtype.itemsize
            full = used + size > free or (hessian.keeps_graphs and group and group[0][0] != index)
            if group and full:
                yield group
                group, used = [], 0
            group.append((index, probe))
            used += size
    if group:
        yield group


def _started(plan: _Plan, index: int, probe: int) -> lanczos.Recurrence:
    """Begin the recurrence of one block and probe."""
    hessian, settings = plan.hessian, plan.settings
    num_params = hessian.blocks[index].num_params
    v0 = draw_probe(num_params, plan.seed(index, probe), settings.probe_distribution)
    v0 = hessian.shard(index, v0).to(hessian.device, hessian.dtype)
    return lanczos.start(v0, reorthogonalize=settings.reorthogonalize, inner=hessian.inner)


def _row(plan: _Plan, index: int, rule: gram.Rule, num_products: int, seconds: float) -> Row:
    """Make a row of a block; what is not given is as of an exact spectrum."""
    block = plan.hessian.blocks[index]
    return plan.shared | {
        "block": block.name,
        "probe": 0,
        "block_kind": block.kind,
        "num_params": block.num_params,
        "method": "exact",
        "probe_seed": 0,
        "num_steps": 0,
        "breakdown": False,
        "alphas": [],
        "betas": [],
        "nodes": rule[0],
        "weights": rule[1],
        "num_products": num_products,
        "seconds": seconds,
        "peak_bytes": peak_bytes(plan.hessian.device),
        "product_error": plan.hessian.product_error(index),
        # Halved on the way if memory ran out.
        "microbatch_size": plan.hessian.microbatch_size,
    }


def _slq_row(plan: _Plan, index: int, probe: int, state: lanczos.Recurrence, seconds: float) -> Row:
    nodes, weights = gauss_rule(state.alphas, state.betas)
    steps = len(state.alphas)
    return _row(plan, index, (nodes.tolist(), weights.tolist()), steps, seconds) | {
        "probe": probe,
        "method": "slq",
        "probe_seed": plan.seed(index, probe),
        "num_steps": steps,
        "breakdown": state.breakdown,
        "alphas": list(state.alphas),  # the recurrence may go on
        "betas": list(state.betas),
    }


def _gram_rows(plan: _Plan, most_outputs: float) -> Generator[list[Row], None, set[str]]:
    """Yield the rows of blocks whose spectra are those of Gram matrices; return their names."""
    begin = time.perf_counter()
    done, hessian = set(), plan.hessian
    todo = [i for i, _ in plan.todo]
    for index, rule, num_passes in gram.spectra(hessian, todo, most_outputs):
        yield [_exact_row(plan, index, rule, num_passes, begin)]
        done.add(hessian.blocks[index].name)
        begin = time.perf_counter()
    return done


def _diagonalised(plan: _Plan, index: int) -> Row:
    begin = time.perf_counter()
    block = plan.hessian.blocks[index]
    n = block.num_params
    H = plan.hessian.dense(index).double()
    if not torch.isfinite(H).all():
        raise FloatingPointError(
            f"the Hessian of block {block.name!r} is not finite; use a wider dtype or look for inf "
            "or nan in the second derivative"
        )
    nodes = torch.linalg.eigvalsh(H).tolist() if H.any() else [0.0]
    return _exact_row(plan, index, (nodes, [1.0 / len(nodes)] * len(nodes)), n, begin)


def _exact_row(plan: _Plan, index: int, rule: gram.Rule, num_products: int, begin: float) -> Row:
    """Make the row of a block whose eigenvalues are known, of status `zero` where all are 0."""
    is_zero = rule[0] == [0.0]
    zero = {"status": "zero", "reason": _reason_of_zero(plan, index)} if is_zero else {}
    return _row(plan, index, rule, num_products, time.perf_counter() - begin) | zero


def _unless_zero(plan: _Plan, index: int, rows: list[Row]) -> list[Row]:
    """Replace the probes of an exactly zero block by its one row of status `zero`."""
    if any(row["alphas"] != [0.0] or row["betas"] != [0.0] for row in rows):
        return rows
    reason = _reason_of_zero(plan, index, "every product with ")
    products = sum(row["num_products"] for row in rows)
    return [rows[0] | {"status": "zero", "reason": reason, "num_products": products}]


def _reason_of_zero(plan: _Plan, index: int, what: str = "") -> str:
    """Return why a block is of status zero; warn if its gradient changes all the same."""
    is_hessian = plan.settings.operator == "hessian"
    what += "the block's Hessian" if is_hessian else "the block's Gauss-Newton matrix"
    if not is_hessian or not plan.hessian.differences.is_nonzero(index):
        return f"{what} is exactly zero"
    if not plan.hessian.is_autograd:
        warnings.warn(
            f"{plan.hessian.blocks[index].name}: differences of its gradients in "
            f"{plan.settings.dtype} are rounding alone, but it is not zero; take dtype float64",
            stacklevel=2,
        )
        return f"{what} is zero to rounding of differences, but the block's Hessian is not"
    warnings.warn(
        f"{plan.hessian.blocks[index].name}: {what} is exactly zero, but the gradient changes "
        "along a random direction: a second derivative of the model is wrong. In the backward of "
        "custom autograd functions, compute with what save_for_backward kept, in differentiable "
        "operations",
        stacklevel=2,
    )
    return f"{what} is exactly zero, but the gradient changes: a second derivative is wrong"
