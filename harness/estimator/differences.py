"""Difference quotients of the gradient: what the products with a Hessian must equal."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from harness.estimator.batches import Batch, place
from harness.estimator.blocks import Block
from harness.estimator.lanczos import WHOLE, Inner
from harness.estimator.objective import LossFn
from harness.estimator.share import Share

# Relative to the size of what is moved, from steps that cross few kinks to ones whose difference
# stands out from the rounding of a model that computes in float32 inside.
_STEPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
# What of a gradient is taken for rounding, and how well two slopes must agree.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 5e-7}
_AGREEMENT = 0.1


class Differences:
    """Central differences of the blocks' gradients, by moving a model's parameters and back."""

    inner: Inner = WHOLE

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        batches: Sequence[Batch],
        weights: Sequence[float],
        blocks: Sequence[Block],
        share: Share | None,
    ) -> None:
        """Take the model as it is; arguments as `BlockHessian` holds them."""
        self._model, self._loss_fn, self._blocks, self._share = model, loss_fn, blocks, share
        self._parameters = dict(model.named_parameters())  # scripted modules know no get_parameter
        parameter = self._parameters[blocks[0].parts[0].parameter]
        self._device, self._dtype = parameter.device, parameter.dtype
        self._batches, self._weights = batches, weights

    @classmethod
    def precise(cls, model: nn.Module, loss_fn: LossFn, *parts: Any) -> Differences:
        """Return those of a copy in float64, if the model can: small steps cross no kinks."""
        parameter = next(model.parameters())
        try:
            copied = copy.deepcopy(model).double()
            with torch.no_grad():
                loss_fn(copied, place(parts[0][0], parameter.device, torch.float64))
        except Exception:  # knows no float64 or no no_grad, or keeps what its last pass made
            copied = model  # moved in place, and put back
        return cls(copied, loss_fn, *parts)

    def shard(self, index: int, vector: torch.Tensor) -> torch.Tensor:
        """Return what of a vector of a block, shape (n_l,), this process holds."""
        return vector

    def slope(self, index: int, vector: torch.Tensor, step: float) -> torch.Tensor:
        """Return (g(w + ε v) − g(w − ε v)) / 2ε ≈ H_l v, g the gradient of the block l.

        Zero where no more than rounding is left of the difference.

        Args:
            index: The block l.
            vector: Direction v, shape (n_l,).
            step: ε |v| / |w_l|; of blocks smaller than 1e-3 relative to that.
        """
        block = self._blocks[index]
        size = float(self.inner.norm(torch.cat([view.flatten() for view in self._views(block)])))
        length = step * max(size, 1e-3) / float(self.inner.norm(vector))
        ends = []
        for sign in (1, -1):
            with self._moved(block, vector, sign * length):
                ends.append(self._gradient(block))
        if self._share is not None:
            self._share.add_up(ends)
        change = ends[0] - ends[1]
        norm = self.inner.norm
        if float(norm(change)) <= _ROUNDING[self._dtype] * float(norm(ends[0])):
            return torch.zeros_like(change)
        return change / (2 * length)

    def is_nonzero(self, index: int) -> bool:
        """Tell whether a block's gradient changes along a random direction.

        It does if two quotients of different steps agree: kinks and rounding give quotients that
        depend on the step. Of a block that is zero the first is zero, mostly, and settles it.
        """
        v = torch.randn(self._blocks[index].num_params, generator=torch.Generator().manual_seed(0))
        v = self.shard(index, v).to(self._device)
        norm, before = self.inner.norm, None
        for step in _STEPS:
            slope = self.slope(index, v, step)
            if not norm(slope):
                return False
            if before is not None:
                both = float(norm(slope) + norm(before))
                if float(norm(slope - before)) <= _AGREEMENT * both / 2:
                    return True
            before = slope
        return False

    @contextmanager
    def _moved(self, block: Block, vector: torch.Tensor, length: float) -> Iterator[None]:
        """Move a block along a vector, and put it back as it was."""
        views = self._views(block)
        before = [view.clone() for view in views]
        pieces = vector.to(self._dtype).split([view.numel() for view in views])
        try:
            for view, piece in zip(views, pieces, strict=True):
                view.add_(piece.view_as(view), alpha=length)
            yield
        finally:
            for view, values in zip(views, before, strict=True):
                view.copy_(values)

    def _views(self, block: Block) -> list[torch.Tensor]:
        """Return the values of a block, to be changed in place."""
        return [part.of(self._parameters[part.parameter].data) for part in block.parts]

    def _gradient(self, block: Block) -> torch.Tensor:
        parameters = [self._parameters[part.parameter] for part in block.parts]
        total = torch.zeros(block.num_params, dtype=torch.float64, device=self._device)
        for batch, weight in zip(self._batches, self._weights, strict=True):
            loss = self._loss_fn(self._model, place(batch, self._device, self._dtype))
            found = torch.autograd.grad(loss.reshape(()), parameters, materialize_grads=True)
            parts = zip(block.parts, found, strict=True)
            total += weight * torch.cat([part.of(g).flatten() for part, g in parts])
        return total
