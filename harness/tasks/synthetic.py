"""Synthetic classification: Gaussian inputs whose labels are balanced or follow Zipf's law."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from harness.errors import UserError
from harness.tasks import sources
from harness.tasks.base import Classification, Data, check_sizes

_FREQUENCIES = ("balanced", "zipf")


@dataclass(frozen=True)
class GaussianClasses(Classification):
    """Classify noise; a batch is (inputs (B, dimension) float32, labels (B,) int64).

    Inputs are drawn from N(mean, I), independently of the labels, whose counts are as equal as can
    be or proportional to 1/k, at least one of each. SGD is known to lag on Zipf's labels and not on
    balanced ones: the linear problem of Kunstner et al. 2024 (arXiv 2402.19449, appendix A.2 and
    their code). There inputs are uniform on [0, 1], whose mean is 1.73 of their standard deviation,
    and frequencies halve in steps, n = m 2^m, C = 2^m - 1, d = (m + 1) 2^m. The mean makes one
    direction stiff, which bounds SGD's rate, the more so the more frequent the most frequent class
    is. Seen at the default sizes on whole batches, one seed, a few rates: in 100 steps AdamW ends
    at 0.79 on Zipf's labels, SGD at 1.95, in 200 at 0.99, in 400 at 0.75; on balanced ones AdamW
    ends at 0.010, SGD at 0.002.

    Attributes:
        frequencies: "balanced" or "zipf".
        num_classes, dimension, num_samples: C, d and n; there is no test split.
        mean: mean of every coordinate of the inputs, in standard deviations.
        seed: seed of the inputs.
    """

    frequencies: str = "balanced"
    num_classes: int = 256
    dimension: int = 128
    num_samples: int = 2_048
    mean: float = 1.0
    seed: int = 0

    name: ClassVar[str] = "gaussian-classes"
    extent: ClassVar[str] = "2,048 of 128 dimensions, 256 classes, drawn"

    def __post_init__(self) -> None:
        check_sizes(self, num_classes=2, dimension=1, num_samples=1, seed=0)
        if self.frequencies not in _FREQUENCIES:
            raise UserError(
                f"task {self.name!r}: frequencies is {self.frequencies!r}; choose "
                f"{' or '.join(_FREQUENCIES)}"
            )
        if self.num_samples < self.num_classes:
            raise UserError(
                f"task {self.name!r}: {self.num_samples} samples are too few for one of each of "
                f"{self.num_classes} classes"
            )

    def read(self, root: Path | None) -> Data:
        """Draw the inputs; no root is needed."""
        generator = torch.Generator().manual_seed(self.seed)
        inputs = torch.randn(self.num_samples, self.dimension, generator=generator) + self.mean
        labels = torch.arange(self.num_classes).repeat_interleave(self._counts())
        options = {"num_classes": self.num_classes, "dimension": self.dimension}
        source = (
            f"{self.num_samples} Gaussian inputs of {self.dimension} dimensions drawn by seed "
            f"{self.seed}, {self.num_classes} {self.frequencies} classes"
        )
        checksum = sources.sha256([inputs.numpy().tobytes(), labels.numpy().tobytes()])
        return Data((inputs, labels), (inputs[:0], labels[:0]), source, checksum, options)

    def _counts(self) -> Tensor:
        """Return the samples of each class (C,): one, and its share of the rest by its frequency.

        The rest's shares are rounded where they add up, so that they sum to num_samples.
        """
        ranks = torch.arange(1, self.num_classes + 1, dtype=torch.float64)
        weights = 1 / ranks if self.frequencies == "zipf" else torch.ones_like(ranks)
        ends = (weights.cumsum(0) / weights.sum() * (self.num_samples - self.num_classes)).round()
        return 1 + ends.diff(prepend=torch.zeros(1, dtype=torch.float64)).long()
