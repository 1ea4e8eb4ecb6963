"""The checks of an entry's Hessian: it exists, it is one, and it is what the estimator computes."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from math import ceil, inf

import torch
from torch import nn
from torch.func import functional_call

from harness.campaign.survey import runs_of
from harness.errors import UserError
from harness.estimator import Block
from harness.estimator.batches import Batch, take
from harness.estimator.checks import fixed_arithmetic
from harness.estimator.cost import forecast
from harness.estimator.device import device_memory
from harness.estimator.hessian import BlockHessian
from harness.estimator.objective import Objective
from harness.estimator.operations import PiecewiseOperations
from harness.estimator.settings import EXACT_SIZE, Settings
from harness.submission import locate
from harness.submission.draft import names
from harness.submission.subject import CPU, Caution, Failed, Subject
from harness.tasks.base import Task

# Relative, by the precision of the arithmetic.
_SYMMETRY = {torch.float64: 1e-7, torch.float32: 1e-3}
_DENSE = {torch.float64: 1e-8, torch.float32: 1e-3}
_DENSE_BLOCKS = 2


def second_derivatives(s: Subject) -> str:
    """Take one product with each block that there is time for; say which are zero or unused."""
    with fixed_arithmetic(s.model):
        try:
            hessian = s.hessian(torch.float32)
            products = _products(s, hessian)
        except UserError as error:
            where = locate.without_second_derivative(s.model, s.task.loss, take(s.batch, 0, 2))
            raise Failed(f"in {where}: {error}" if where else str(error)) from error
        odd = [hessian.blocks[i].name for i, p in products.items() if not torch.isfinite(p).all()]
        if odd:
            raise Failed(
                f"products with {names(odd)} are not finite; look for sqrt, norm or abs at zero, "
                "whose derivatives are infinite there"
            )
        return _about_zero_blocks(s, hessian, products)


def _products(s: Subject, hessian: BlockHessian) -> dict[int, torch.Tensor]:
    """Return products by block: of all blocks, or of those that half of the time is enough for.

    Some block before the head that is not zero is among them, if there is one.
    """
    products: dict[int, torch.Tensor] = {}
    vectors = _draw(hessian.blocks, torch.float32)
    until, begin = s.time_for(0.5), time.process_time()

    def lives(i: int) -> bool:
        return hessian.blocks[i].kind != "head" and bool(products[i].any())

    order = _shuffled(len(vectors))
    for some in s.in_time(order, lambda: until if any(map(lives, products)) else inf):
        found = hessian.products([(i, vectors[i]) for i in some])
        products.update(zip(some, found, strict=True))
    s.product_seconds = (time.process_time() - begin) / len(products)
    return dict(sorted(products.items()))


def _about_zero_blocks(s: Subject, hessian: BlockHessian, products: dict[int, torch.Tensor]) -> str:
    blocks = hessian.blocks
    zero = [i for i, p in products.items() if not p.any()]
    if zero:  # perhaps of these samples alone
        wider = s.hessian(torch.float32, s.mates)
        vectors = _draw(blocks, torch.float32)
        again = wider.products([(i, vectors[i]) for i in zero])
        zero = [i for i, p in zip(zero, again, strict=True) if not p.any()]
    unused = [
        n for n, g in hessian.gradient().items() if g is None and s.model.get_parameter(n).numel()
    ]
    told = f"{len(products) - len(zero)} of {len(products)} blocks have a Hessian that isn't zero"
    if left := len(blocks) - len(products):
        told += f"; the other {left} take about {left * s.product_seconds:.0f} s more of --budget"
    if unused:
        told += f"; not used by the loss, so remove or freeze them: {names(unused)}"
    if alike := [blocks[i].name for i in zero if blocks[i].parts[0].parameter not in unused]:
        told += f"; exactly zero, so left out of comparisons at initialisation: {names(alike)}"
    if all(i in zero or blocks[i].kind == "head" for i in products):
        _take_a_step(s, told)
    if zero or unused:
        raise Caution(told)
    return told


def _take_a_step(s: Subject, told: str) -> None:
    """Let the checks that follow be of the model after a step, at which a zero head has moved.

    Raises:
        Failed: The entry isn't trained, or all blocks but the head's are zero even then.
        Caution: There are others.
    """
    told = f"{told}; that is all but the head"
    remedy = "Does the head, or the last scale of the branches, start at zero? Start it elsewhere"
    if s.entry.grid_recipe is None:
        raise Failed(f"{told}. {remedy} (timm: zero_init_last=False), or name later stages, too")
    s.model = copy.deepcopy(s.model)
    parameters = [p for p in s.model.parameters() if p.requires_grad]
    rate = s.entry.grid_recipe.adamw_lrs[0]
    for _ in range(2):  # the second step moves what is behind a branch that starts at zero
        loss = s.task.loss(s.model, s.mates)
        gradient = torch.autograd.grad(loss, parameters, materialize_grads=True)
        for p, g in zip(parameters, gradient, strict=True):
            p.data.sub_(g.sign(), alpha=rate)  # as AdamW's first step
    hessian = s.hessian(torch.float32)
    found = _products(s, hessian)
    alive = [hessian.blocks[i].name for i, p in found.items() if p.any()]
    if all(hessian.blocks[i].kind == "head" for i, p in found.items() if p.any()):
        raise Failed(f"{told}, even after two steps. {remedy} (timm: zero_init_last=False)")
    later = [stage for stage in s.entry.stages if stage != "init"]
    raise Caution(
        f"{told}, which starts at zero: there is no heterogeneity at init, that of {later[0]} is "
        f"the first. After two steps {len(alive)} of {len(found)} blocks have a Hessian that isn't "
        "zero; the checks that follow are of the model there"
    )


def symmetric(s: Subject) -> str:
    """Compare uᵀHv with vᵀHu, block by block."""
    worst, done = 0.0, 0
    with fixed_arithmetic(s.model):
        hessian = _precise(s)
        tolerance = _SYMMETRY[s.precision]
        us, vs = _draw(hessian.blocks, s.dtype, 1), _draw(hessian.blocks, s.dtype, 2)
        until = s.time_for(0.3)
        for some in s.in_time(_shuffled(len(us)), lambda: until):
            found = hessian.products([(i, w[i]) for i in some for w in (us, vs)])
            for i, Hu, Hv in zip(some, found[::2], found[1::2], strict=True):
                scale = float(Hv.norm() * us[i].norm())
                error = abs(float(us[i] @ Hv - vs[i] @ Hu)) / scale if scale else 0.0
                worst, done = max(worst, error), done + 1
                if error > tolerance:
                    raise Failed(
                        f"uᵀHv and vᵀHu of {hessian.blocks[i].name} differ by {error:.1e} of "
                        f"|u||Hv|{_hint(_wrong_gradient(s))}"
                    )
    on = f"on {done} of {len(us)} blocks"
    return f"uᵀHv = vᵀHu {on}, within {worst:.0e} of |u||Hv|{_left(s, 'symmetric', done, len(us))}"


def differences(s: Subject) -> str:
    """Compare Hv with central differences of the gradient, block by block."""
    worst, done, unclear = 0.0, 0, 0
    with fixed_arithmetic(s.model):
        hessian = _precise(s)
        vectors = _draw(hessian.blocks, s.dtype)
        tolerance = locate.TOLERANCES[s.precision]
        until = s.time_for(0.5)
        for some in s.in_time(_shuffled(len(vectors)), lambda: until):
            found = hessian.products([(i, vectors[i]) for i in some])
            for i, product in zip(some, found, strict=True):
                error, is_wrong = _deviation(hessian, i, vectors[i], product.double(), tolerance)
                done += 1
                if error <= tolerance:
                    worst = max(worst, error)
                    continue
                name = hessian.blocks[i].name
                _blame(s, name, error, is_wrong=is_wrong, is_first=not unclear)
                unclear += 1
    told = f"Hv equals differences of the gradient on {done - unclear} of {len(vectors)} blocks"
    told += _left(s, "differences", done, len(vectors))
    if unclear:
        raise Caution(
            f"{told}; on {unclear} the Hessian is too small beside the gradient, or has too many "
            "kinks, for differences to tell. The gradient of each module is the slope of its output"
        )
    return f"{told}, within {worst:.0e} of its norm"


def _blame(s: Subject, block: str, error: float, *, is_wrong: bool, is_first: bool) -> None:
    """Raise if a module explains that a product is off the differences of the gradient."""
    off = f"Hv of {block} is {error:.1e} of its norm off the differences of the gradient"
    if is_first and (culprit := _wrong_gradient(s)) is not None:
        raise Failed(f"{off}{_hint(culprit)}")
    if is_wrong:
        culprit = _of_copy(s, locate.with_wrong_second_derivative)
        raise Failed(
            f"{off}, which agree with each other: the second derivative of "
            f"{culprit or 'some module'} isn't the slope of its gradient; look for a custom "
            "backward that computes with other than what save_for_backward kept"
        )


# Products that a check takes with a block, about: those in float64 are twice as slow.
_PRODUCTS = {"symmetric": 4, "differences": 6}


def seconds_of(s: Subject, check: str, num_blocks: int | None = None) -> float:
    """Forecast the processor time of a check on so many blocks; None: on all."""
    blocks = s.blocks(s.entry.partition)
    count = len(blocks) if num_blocks is None else num_blocks
    if check == "dense":
        sizes = sorted(b.num_params for b in blocks if b.num_params <= EXACT_SIZE)
        return 4 * sum(sizes[:_DENSE_BLOCKS]) * s.product_seconds
    return _PRODUCTS[check] * count * s.product_seconds


def _left(s: Subject, check: str, done: int, count: int) -> str:
    """Say what the blocks that there was no time for would take, "" if there are none."""
    left = seconds_of(s, check, count - done)
    return f"; the other {count - done} take about {left:.0f} s more of --budget" if left else ""


def _deviation(
    hessian: BlockHessian, index: int, v: torch.Tensor, product: torch.Tensor, tolerance: float
) -> tuple[float, bool]:
    """Return how far a product is from central differences of the gradient, and if it is wrong.

    The deviation is that of the first step that is within the tolerance, else the least. The
    product is wrong if none is and those of two steps agree with each other: rounding and kinks
    make differences that depend on the step.
    """
    errors, slopes = [], []
    for step in locate.STEPS:
        slopes.append(hessian.differences.slope(index, v, step))
        errors.append(_relative(slopes[-1], product))
        if errors[-1] <= tolerance:
            return errors[-1], False
    agree = any(_relative(a, b) <= tolerance for a, b in combinations(slopes, 2))
    return min(errors), agree and bool(slopes[0].any())


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |a − b| / (|a| + |b|), 0 of zeros."""
    size = float(a.norm() + b.norm())
    return float((a - b).norm()) / size if size else 0.0


def dense(s: Subject) -> str:
    """Compare the smallest blocks with Hessians of torch.autograd.functional."""
    with fixed_arithmetic(s.model):
        hessian = _precise(s)
        small = [i for i, b in enumerate(hessian.blocks) if b.num_params <= EXACT_SIZE]
        small.sort(key=lambda i: hessian.blocks[i].num_params)
        if not small:
            return f"no block has at most {EXACT_SIZE:,} parameters"
        model = copy.deepcopy(s.model).to(s.dtype)
        told: list[str] = []
        until = s.time_for(0.5)
        for i in small[:_DENSE_BLOCKS]:
            if told and time.process_time() > until:
                break
            block = hessian.blocks[i]
            H, known = hessian.dense(i), _dense_hessian(s.task, model, hessian.batches[0], block)
            error = float((H - known).norm() / max(float(known.norm()), 1e-30))
            if known.any() and error > _DENSE[s.precision]:
                raise Failed(
                    f"the Hessian of {block.name} is {error:.1e} of its norm off the dense one"
                    f"{_hint(_wrong_gradient(s))}"
                )
            told.append(f"{block.name} ({block.num_params})")
    return f"equal to the dense Hessian: {', '.join(told)}"


def _dense_hessian(task: Task, model: nn.Module, batch: Batch, block: Block) -> torch.Tensor:
    """Return a block's Hessian by torch.autograd.functional, shape (n, n)."""
    [part] = block.parts
    whole = model.get_parameter(part.parameter).detach()

    def loss(w: torch.Tensor) -> torch.Tensor:
        changed = w.view(block.shape)
        if part.dim is not None:
            before = whole.narrow(part.dim, 0, part.start)
            after = whole.narrow(part.dim, part.stop, whole.shape[part.dim] - part.stop)
            changed = torch.cat([before, changed, after], part.dim)

        return functional_call(_Loss(model, task), {f"model.{part.parameter}": changed}, (batch,))

    with PiecewiseOperations():
        return torch.autograd.functional.hessian(loss, part.of(whole).flatten())


class _Loss(nn.Module):
    """The loss of a model as a module, so that its parameters can be replaced."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.task.loss(self.model, batch)


def cost(s: Subject) -> str:
    """Forecast time and memory, at the speed of this machine."""
    entry = s.entry
    batch = s.task.fixed(s.data, "train", entry.hessian_batch_size)
    stages = {entry.partition: entry.stages, "full": entry.full_stages}
    costs, note = {}, ""
    for partition in (p for p, some in stages.items() if some):
        blocks = s.blocks(partition)
        fit = max(8, int(s.seconds_left / 2 / max(s.product_seconds, 1e-9)))
        few = blocks[:: ceil(len(blocks) / fit)]  # evenly over the depth
        settings = Settings(partition, entry.num_probes, entry.num_steps)
        found = forecast(Objective(s.model, s.task.loss, [batch]), few, settings)
        if len(few) < len(blocks):
            of_products = (found.flops - found.pass_flops) * len(blocks) // len(few)
            found = replace(found, flops=found.pass_flops + of_products)
            note = f"; for want of time forecast from {len(few)} of {len(blocks)} blocks"
        costs[partition] = found
    product_bytes = max(cost.product_bytes for cost in costs.values())
    memory = device_memory(CPU)
    per_sample = max(cost.graph_bytes for cost in costs.values()) / entry.hessian_batch_size
    if per_sample > memory / 2:
        raise Failed(
            f"the graph of one sample takes {per_sample / 2**30:,.1f} GiB, half of this machine's "
            f"memory is {memory / 2**31:,.1f} GiB; choose a smaller configuration"
        )
    flops = sum(cost.flops * len(stages[partition]) for partition, cost in costs.items())
    pass_flops = costs[entry.partition].pass_flops / entry.hessian_batch_size
    _, samples = runs_of(entry)
    flops += round(samples * pass_flops)
    speed = _speed(s, pass_flops)
    return (
        f"a spectrum about {_duration(costs[entry.partition].flops / speed)} here, the whole entry "
        f"{flops / 1e12:.3g} TFLOP, about {_duration(flops / speed)}; a product takes "
        f"{product_bytes / 2**20:,.0f} MiB, of {memory / 2**21:,.0f} MiB that may be used{note}"
    )


def _speed(s: Subject, per_sample: float) -> float:
    """Measure the operations per second of forward and backward passes."""
    parameters = [p for p in s.model.parameters() if p.requires_grad]
    begin, passes = time.perf_counter(), 0
    while passes < 2 or (passes < 20 and time.perf_counter() - begin < 0.5):
        torch.autograd.grad(s.task.loss(s.model, s.mates), parameters, allow_unused=True)
        passes += 1
    return passes * len(s.mates[0]) * max(per_sample, 1.0) / (time.perf_counter() - begin)


def _precise(s: Subject) -> BlockHessian:
    """Return the block Hessian in float64, or in float32 where the model knows no other."""
    if s.precise is None:
        try:
            with warnings.catch_warnings(action="ignore"):  # of float32 inside
                s.precise = s.hessian(torch.float64)
        except Exception:  # an assertion of the model's own, too; what else is wrong comes again
            s.precise = s.hessian(torch.float32)
            s.dtype = torch.float32
        if s.precise.precision != torch.float64:
            s.precision = torch.float32
    return s.precise


def _wrong_gradient(s: Subject) -> str | None:
    """Name the module whose gradient isn't the slope of its output, None if there is none."""
    return _of_copy(s, locate.with_wrong_gradient)


def _of_copy(s: Subject, find: Callable[..., str | None]) -> str | None:
    """Return the module that is found in a copy of the model on few samples, None if none is."""
    model = copy.deepcopy(s.model).to(s.dtype)
    few = take(s.batch, 0, 2)
    batch = tuple(t.to(s.dtype) if t.is_floating_point() else t for t in few)
    return find(model, s.task.loss, batch, s.precision)


def _hint(culprit: str | None) -> str:
    """Return what to say of a gradient that isn't that of the loss."""
    text = (
        f": the gradient of {culprit or 'some module'} isn't the slope of its output; look for a "
        "custom backward, a straight-through estimator, or detach"
    )
    if culprit is not None and culprit.endswith("(Embedding)"):
        text += ", or a padding_idx that is a token of the data: its row has no gradient"
    return text


def _draw(blocks: list[Block], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(b.num_params, generator=generator) for b in blocks]
    return [v.to(dtype) for v in vectors]


def _shuffled(count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
