"""One process's part of a batch, where several processes make each product together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from harness.estimator.batches import Batch, leading_size, take


@dataclass(frozen=True)
class Share:
    """Which part of the samples is this process's, and how the parts' sums are made.

    Attributes:
        rank, size: Which process this is, of how many.
        add_up: Replaces tensors, in place, by their sums over all processes.
    """

    rank: int
    size: int
    add_up: Callable[[list[torch.Tensor]], None]

    def of(
        self,
        batches: Sequence[Batch],
        weights: Sequence[float],
        num_terms: Callable[[Batch], float] | None,
    ) -> tuple[list[Batch], list[float]]:
        """Return this process's batches, and their weights in the whole.

        Whole microbatches where they go round evenly or can't be cut, else a piece of each.

        Args:
            batches: The microbatches of all processes.
            weights: Their weights in the mean.
            num_terms: Number of terms that a batch's mean averages; None: they can't be cut.
        """
        if num_terms is None or len(batches) % self.size == 0:
            return list(batches[self.rank :: self.size]), list(weights[self.rank :: self.size])
        pieces, parts = [], []
        for i, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            n, k = leading_size(batch), (self.rank + i) % self.size  # longer pieces go round
            start, stop = n * k // self.size, n * (k + 1) // self.size
            # A piece without terms, such as one without masked tokens, has no mean.
            if start < stop and (terms := num_terms(piece := take(batch, start, stop))) > 0:
                pieces.append(piece)
                parts.append(weight * terms / num_terms(batch))
        return pieces, parts

    def sizes(self, batches: Sequence[Batch], *, cut: bool) -> tuple[int, int]:
        """Return the most microbatches of any process, and the samples of the largest."""
        largest = max(map(leading_size, batches))
        if cut and len(batches) % self.size:
            return len(batches), -(-largest // self.size)
        return -(-len(batches) // self.size), largest
