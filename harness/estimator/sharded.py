"""The block Hessian of a model whose parameters several processes hold together (FSDP2).

`torch.distributed.fsdp.fully_shard` leaves each process a part of the rows of every parameter, and
gathers a module's parameters when it is called. Such a model can't be copied and has no second
derivative. So it is moved in place, by differences, and put back bit for bit; vectors are shards
as the parameters are, of which only inner products are ever summed up. HessFormer and Granziol &
Juarev (2025, arXiv 2505.11564; 2026, arXiv 2602.00816) take full Hessians of such models.

Every process is given the whole batch and computes its part of each microbatch; sums of gradients
are those that FSDP makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from harness.errors import UserError
from harness.estimator.batches import Batch, batch_hash, leading_size, place
from harness.estimator.blocks import Block
from harness.estimator.differences import Differences
from harness.estimator.hessian import DTYPES, BlockHessian
from harness.estimator.objective import LossFn, Objective
from harness.estimator.prepare import check_parameters, set_modes
from harness.estimator.quotients import DifferenceHessian
from harness.estimator.settings import Settings
from harness.estimator.shards import Layout, LocalPart, ShardedInner, local, reshard
from harness.estimator.share import Share

# Relative steps at which the gradient is compared with the loss, how well two quotients must agree
# to be believed, and how far off them a gradient is wrong.
_STEPS, _AGREEMENT, _OFF = (1e-5, 1e-4, 1e-3, 1e-2), 0.05, 0.2


@contextmanager
def opened(
    objective: Objective, blocks: Sequence[Block], settings: Settings
) -> Iterator[BlockHessian]:
    """Yield the Hessian of a sharded model; the model is as it was afterwards.

    To be used inside `checks.fixed_arithmetic`, in all processes at once.

    Raises:
        UserError: As `ShardedHessian`.
    """
    with _held(objective.model):
        yield ShardedHessian(objective, blocks, settings)


class ShardedHessian(DifferenceHessian):
    """The block Hessian of a sharded model, by differences; the same in all processes.

    Vectors are what of them lies in this process, where the parameters' rows lie. Works on the
    model itself. Microbatches are taken as they are given, a part of each by every process, and
    never halved: a process that runs out of memory can't do so alone.
    """

    def __init__(self, objective: Objective, blocks: Sequence[Block], settings: Settings) -> None:
        """Check that all processes are given the same, and that FSDP's gradients are the loss's.

        Raises:
            UserError: As `BlockHessian`; or the settings or the sharding are others than such a
                model has, or the processes were given different things.
        """
        _check(objective, blocks, settings)
        rank, size = dist.get_rank(), dist.get_world_size()
        share = Share(rank, size, lambda tensors: None)  # FSDP adds up
        super().__init__(objective, blocks, settings, share=share)
        most, _ = share.sizes(objective.batches, cut=self._count is not None)
        # All go through as many passes; those without samples through some that don't count.
        spare = self.batches or [place(objective.batches[0], self.device, self.dtype)]
        missing = most - len(self.batches)
        self.batches = [*self.batches, *spare[:1] * missing]
        self.weights = [*self.weights, *[0.0] * missing]
        self._share = self._count = None
        self.most_bytes = self.memory_budget  # nothing is gained by probes in lockstep
        self.inner = self.differences.inner
        _check_precision(self.model)
        _check_scale(self._differences_of(self.joined().blocks))

    def shard(self, index: int, vector: torch.Tensor) -> torch.Tensor:
        """Return what of a vector of a block, shape (n_l,), this process holds."""
        return self.differences.shard(index, vector)

    def measure_peak(self, batch: Batch) -> int:
        """Return 0: microbatches are not cut."""
        return 0

    @cached_property
    def differences(self) -> _ShardedDifferences:
        """What the products are made of."""
        return self._differences_of(self.blocks)

    def _own(
        self, model: nn.Module, norm_mode: str, device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        check_parameters(model)
        set_modes(model, norm_mode)
        return model

    def _quotients(self, share: Share | None) -> Differences:
        return self.differences

    def _differences_of(self, blocks: Sequence[Block]) -> _ShardedDifferences:
        return _ShardedDifferences(self.model, self.loss_fn, self.batches, self.weights, blocks)

    def _whole(self, index: int, shards: torch.Tensor) -> torch.Tensor:
        n = self.blocks[index].num_params
        whole = shards.new_zeros(len(shards), n)
        whole[:, self.shard(index, torch.arange(n, device=whole.device))] = shards
        dist.all_reduce(whole)
        return whole / self.differences.inner.copies


class _ShardedDifferences(Differences):
    """Differences of gradients that FSDP sums up, by moving what of a block lies here.

    The model's own gradients are expected to be None, and are so afterwards.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Sequence[Batch],
        weights: Sequence[float],
        blocks: Sequence[Block],
    ) -> None:
        """Take the model as it is; weights are of this process's batches in the mean over all."""
        reshard(model)
        super().__init__(model, loss_fn, batches, weights, blocks, None)
        self._layout = Layout(self._parameters, blocks)
        self.inner: ShardedInner = ShardedInner(self._layout.copies)

    def shard(self, index: int, vector: torch.Tensor) -> torch.Tensor:
        """Return what of a vector of a block, shape (n_l,), this process holds."""
        return self._layout.shard(index, vector)

    def scales(self) -> list[float]:
        """Return slopes of the loss along the first block's gradient, over the gradient's norm.

        Near 1 but for bends and rounding, by differences of several steps; none where it is zero.
        """
        block = self._blocks[0]
        gradient = self._gradient(block)
        norm = float(self.inner.norm(gradient))
        size = float(self.inner.norm(torch.cat([view.flatten() for view in self._views(block)])))
        found = []
        for step in _STEPS if norm and size else ():
            losses = []
            for sign in (1, -1):
                with self._moved(block, gradient / norm, sign * step * size):
                    losses.append(self._loss())
            found.append((losses[0] - losses[1]) / (2 * step * size * norm))
        return found

    def _views(self, block: Block) -> list[torch.Tensor]:
        # What is gathered still, after a pass without a backward one, would not be gathered again.
        reshard(self._model)
        return [part.of(local(self._parameters[part.part.parameter])) for part in self._of(block)]

    def _of(self, block: Block) -> list[LocalPart]:
        return self._layout.blocks[self._blocks.index(block)]

    def _gradient(self, block: Block) -> torch.Tensor:
        parts = self._of(block)
        size = sum(view.numel() for view in self._views(block))
        total = torch.zeros(size, dtype=torch.float64, device=self._device)
        for batch, weight in zip(self._batches, self._weights, strict=True):
            loss = self._loss_fn(self._model, place(batch, self._device, self._dtype))
            _check_loss(loss)
            # FSDP takes the mean over the processes.
            (dist.get_world_size() * weight * loss.reshape(())).backward()
            reshard(self._model)
            if all(p.grad is None for p in self._parameters.values()):
                raise UserError(
                    "no gradients came back: loss_fn must use the model that it is given, and FSDP "
                    "sum them up, set_requires_gradient_sync(True)"
                )
            pieces = [
                torch.zeros_like(part.of(local(p))) if p.grad is None else part.of(local(p.grad))
                for part, p in ((part, self._parameters[part.part.parameter]) for part in parts)
            ]
            total += torch.cat([piece.flatten() for piece in pieces])
            self._model.zero_grad(set_to_none=True)
        return total

    def _loss(self) -> float:
        """Return the mean loss over the batches of all processes."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch, weight in zip(self._batches, self._weights, strict=True):
            with torch.no_grad():
                loss = self._loss_fn(self._model, place(batch, self._device, self._dtype))
            total += weight * loss.reshape(())
            reshard(self._model)
        return float(self.inner.total(total)) * self.inner.copies


@contextmanager
def _held(model: nn.Module) -> Iterator[None]:
    """Take a model without gradients, and put its modes, buffers and gradients back afterwards."""
    reshard(model)
    modes = [
        (m, {k: v for k, v in vars(m).items() if k in ("training", "sparse")})
        for m in model.modules()
    ]
    buffers = [
        (m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers("", False)
    ]
    gradients = [(p, p.grad) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        reshard(model)
        for module, mode in modes:
            vars(module).update(mode)
        with torch.no_grad():
            for module, name, buffer, values in buffers:
                setattr(module, name, buffer.copy_(values))
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _check(objective: Objective, blocks: Sequence[Block], settings: Settings) -> None:
    """Raise unless this is a Hessian that can be had, and all processes ask for the same."""
    if settings.product != "differences":
        raise UserError(
            "the model's parameters are sharded, which leaves no second derivative and no outputs "
            "to take apart: pass product='differences', without operator='ggn' and gram=True"
        )
    given = {
        "batches": (batch_hash(objective.batches), list(map(leading_size, objective.batches))),
        "blocks": list(blocks),
        "settings": replace(settings, device=None, memory_budget=None),
    }
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, given)
    for name, value in given.items():
        if any(other[name] != value for other in said):
            raise UserError(
                f"the processes were given different {name}; give each of them the same, the "
                "whole batch too: a sharded model's processes divide its samples themselves"
            )
    if not any(isinstance(module, FSDPModule) for module in objective.model.modules()):
        raise UserError(
            "the model's parameters are DTensors, but not of fully_shard, by which alone it may be "
            "sharded: its processes divide the samples among them, those of other ways don't"
        )
    parameters = dict(objective.model.named_parameters())
    for name in dict.fromkeys(part.parameter for block in blocks for part in block.parts):
        if name in parameters and (reason := _reason(parameters[name], settings)):
            raise UserError(f"the parameter {name} {reason}")


def _reason(parameter: torch.Tensor, settings: Settings) -> str | None:
    """Return why a parameter can't be moved, and what to do; None if it can."""
    if not isinstance(parameter, DTensor):
        return "is not sharded, others are: call fully_shard(model) last, without ignored_params"
    mesh, (*others, last) = parameter.device_mesh, parameter.placements
    plain = last.is_shard() and all(p.is_replicate() for p in others)
    if not plain or mesh.size() != dist.get_world_size():
        return (
            f"is laid out as {parameter.placements} over {mesh.size()} of {dist.get_world_size()} "
            "processes; shard it by fully_shard alone, over all of them"
        )
    if parameter.device.type != mesh.device_type:
        return f"is kept on {parameter.device.type}: leave CPUOffloadPolicy out of fully_shard"
    if settings.device and torch.device(settings.device).type != mesh.device_type:
        return f"is on {mesh.device_type}, and device is {settings.device!r}: leave it out"
    if parameter.dtype != DTYPES[settings.dtype]:
        return (
            f"is {parameter.dtype}, and can't be cast where it is: pass that as dtype, float32 or "
            f"float64, or shard the model in {settings.dtype}"
        )
    if getattr(parameter, "_post_accumulate_grad_hooks", None):
        return "has a hook that runs at each backward pass, such as an optimizer's: remove it"
    return None


def _check_loss(loss: torch.Tensor) -> None:
    """Raise unless a loss can be differentiated by FSDP."""
    if isinstance(loss, DTensor):
        raise UserError(
            "loss_fn returned a DTensor; it must be made of the model's outputs and the batch"
        )
    if not loss.requires_grad:
        raise UserError("the loss does not depend on the parameters of the blocks")


def _check_precision(model: nn.Module) -> None:
    """Raise if modules compute in another dtype than their shards', where differences are lost."""
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        before = [p.dtype for p in module.parameters()]
        module.unshard()
        other = [p.dtype for p in module.parameters()]
        module.reshard()
        if other != before:
            raise UserError(
                f"the sharded model computes in {set(other) - set(before)}, in which differences "
                "are rounding: leave param_dtype out of fully_shard's MixedPrecisionPolicy"
            )


def _check_scale(quotients: _ShardedDifferences) -> None:
    """Raise unless the gradients that FSDP returns are the slopes of the loss.

    They are not where it was told to divide them by another number than of the processes, or not to
    sum them up, or where the loss uses shards beside the model's outputs.
    """
    seen = quotients.scales()
    sure = [b for a, b in pairwise(seen) if abs(a - b) < _AGREEMENT * abs(b)]
    if sure and all(abs(a - 1) > _OFF for a in seen):
        raise UserError(
            f"the gradients of the sharded model are {1 / sure[0]:.3g} times the slope of its "
            "loss; let FSDP take their mean over the processes, set_gradient_divide_factor("
            f"{dist.get_world_size()}), and loss_fn use the model's outputs alone"
        )
