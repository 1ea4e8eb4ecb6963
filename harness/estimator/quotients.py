"""The block Hessian by differences of gradients: how large their steps are, and their error."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import torch

from harness.estimator.batches import Batch, place
from harness.estimator.differences import Differences
from harness.estimator.hessian import BlockHessian
from harness.estimator.lanczos import Inner
from harness.estimator.memory import PeakMemory
from harness.estimator.probes import draw_probe
from harness.estimator.share import Share

_RATIO = 10**0.5  # of the steps that differences try


class DifferenceHessian(BlockHessian):
    """The block Hessian by central differences, for what has no second derivative.

    H_l v ≈ (g(w + ε v) − g(w − ε v)) / 2ε, g the gradient by the block's parameters: two gradients
    a product, whose error is ε²/6 of the third derivative along v and eps |g| / ε of rounding.
    Around eps^(1/3) |w_l| / |v| both are least (Nocedal & Wright 2006, section 8.1); of five steps
    there a block takes the one whose quotient along a random direction agrees best with the next
    larger's, and what is left between these two, there or of the first product, is the error that
    rows hold.
    """

    is_autograd = False

    @cached_property
    def _chosen(self) -> dict[int, tuple[float, float]]:
        """Per block that had a product, its relative step and the error of its products."""
        return {}

    def product_error(self, index: int) -> float | None:
        """Return the relative error of the products with a block; None before the first."""
        return self._chosen[index][1] if index in self._chosen else None

    def measure_peak(self, batch: Batch) -> int:
        """Measure the most memory, in bytes, that a gradient of a batch takes."""
        with PeakMemory(self.device) as memory:
            self.graph(place(batch, self.device, self.dtype), self._names(), create_graph=False)
        return memory.peak

    def _saved_bytes(self, batch: Batch) -> int:
        return self.measure_peak(batch)

    def _products(self, requests: Sequence[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
        """Return this process's part of the products, with steps that all processes share."""
        whole, mine = self._quotients(self._share), self._quotients(None)
        found = []
        for index, vector in requests:
            if index not in self._chosen:
                # Along one direction always: a probe that is taken again has the same step. A unit
                # vector may be of an input that is always 0, and tell of none.
                direction = draw_probe(self.blocks[index].num_params, 0, "gaussian")
                direction = self.shard(index, direction).to(vector)
                step, error = _best_step(whole, index, direction)
                larger, here = (whole.slope(index, vector, s) for s in (_RATIO * step, step))
                self._chosen[index] = step, max(error, _apart(self.inner, larger, here))
            found.append(mine.slope(index, vector, self._chosen[index][0]).to(vector.dtype))
        return found

    def _quotients(self, share: Share | None) -> Differences:
        parts = (self.model, self.loss_fn, self.batches, self.weights, self.blocks)
        return Differences(*parts, share)


def _best_step(quotients: Differences, index: int, vector: torch.Tensor) -> tuple[float, float]:
    """Return the relative step whose quotient agrees best with the next larger's, and how well.

    Steps so small that rounding alone is left agree with none.
    """
    middle = torch.finfo(vector.dtype).eps ** (1 / 3)
    steps = [middle * _RATIO**power for power in (2, 1, 0, -1, -2)]
    slopes = [quotients.slope(index, vector, step) for step in steps]
    inner = quotients.inner
    apart = [1.0, *(_apart(inner, a, b) for a, b in pairwise(slopes))]
    live = [i for i, slope in enumerate(slopes) if inner.norm(slope)]
    best = min(live, key=apart.__getitem__, default=None)
    return (middle, 0.0) if best is None else (steps[best], apart[best])


def _apart(inner: Inner, a: torch.Tensor, b: torch.Tensor) -> float:
    size = float(inner.norm(b)) or float(inner.norm(a)) or 1.0
    return float(inner.norm(a - b)) / size
