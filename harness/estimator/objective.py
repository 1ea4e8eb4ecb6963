"""What is differentiated: one frozen value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.errors import UserError
from harness.estimator.batches import Batch, NumTerms, leading_size, take, tensors_of

LossFn = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass(frozen=True)
class SplitLoss:
    """A mean loss in two parts: (model, batch) ↦ criterion(outputs(model, batch), batch).

    Taken wherever a loss is. The Gauss-Newton matrix and exact spectra by Gram matrices need to
    know where the model ends and the criterion begins.

    Attributes:
        outputs: (model, batch) ↦ what the model says, one tensor of real numbers of any shape.
        criterion: (outputs, batch) ↦ their mean loss, a scalar tensor.

    Example:
        >>> from torch.nn import functional as F
        >>> loss = SplitLoss(lambda m, b: m(b[0]), lambda z, b: F.mse_loss(z, b[1]))
        >>> model = nn.Linear(2, 1)
        >>> loss(model, (torch.ones(3, 2), model(torch.ones(3, 2)).detach())).item()
        0.0
    """

    outputs: Callable[[nn.Module, Batch], torch.Tensor]
    criterion: Callable[[torch.Tensor, Batch], torch.Tensor]

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean loss of the batch."""
        return self.criterion(self.outputs(model, batch), batch)

    def outputs_of(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the outputs.

        Raises:
            UserError: They are no tensor of real numbers.
        """
        found: Any = self.outputs(model, batch)
        if isinstance(found, torch.Tensor) and found.is_floating_point():
            return found
        what = found.dtype if isinstance(found, torch.Tensor) else type(found).__name__
        raise UserError(
            f"outputs of the SplitLoss returned {what}; it must return one tensor of real numbers, "
            "such as lambda m, b: m(b[0]).logits"
        )


@dataclass(frozen=True)
class Objective:
    """The mean loss of a model over a fixed batch.

    Attributes:
        model: Any module; it stays as it was.
        loss_fn: (model, batch) ↦ the mean loss of the batch, a scalar tensor.
        batches: The fixed batch, split into microbatches: each a tensor or a tuple, list, mapping
            or dataclass of tensors whose leading dimension counts samples.
        count: Number of terms that each batch's mean averages: one number per batch, or a function
            of the batch. None: its leading dimension.

    Raises:
        UserError: The batches are none, or differ in structure.
    """

    model: nn.Module
    loss_fn: LossFn
    batches: Sequence[Batch]
    count: Sequence[float] | NumTerms | None = None

    def __post_init__(self) -> None:
        """Take the batches once, and check them."""
        object.__setattr__(self, "batches", taken(self.batches))

    @property
    def batch_size(self) -> int:
        """Samples in all batches."""
        return sum(leading_size(b) for b in self.batches)

    def first(self, num_samples: int) -> Objective:
        """Return the mean loss over the first samples, of one batch at most, that isn't cut."""
        some = take(self.batches[0], 0, num_samples)
        return Objective(self.model, self.loss_fn, [some], [1.0])


def taken(given: Sequence[Batch]) -> list[Batch]:
    """Return batches, gone through once: a loader may shuffle, and a generator ends.

    A batch in the place of the list of batches would be taken for as many as it has tensors.

    Raises:
        UserError: They are no list of batches, or differ in structure.
    """
    one = isinstance(given, torch.Tensor | Mapping) or (
        isinstance(given, tuple) and all(isinstance(b, torch.Tensor) for b in given)
    )
    try:
        batches = None if one else list(given)
    except TypeError:
        batches = None
    if batches is None:
        raise UserError(
            f"batches is a {type(given).__name__}; pass a list of batches, such as "
            "[(inputs, targets)]"
        )
    counts = [len(tensors_of(b)) for b in batches]
    for i, count in enumerate(counts):
        if count != counts[0]:
            raise UserError(
                f"the number of tensors is {count} in batch {i} and {counts[0]} in batch 0; "
                "pass batches of one structure, such as (inputs, targets)"
            )
    return batches
