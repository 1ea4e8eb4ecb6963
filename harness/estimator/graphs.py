"""The gradients of one microbatch, ready to be differentiated again: by what, is the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from harness.errors import UserError
from harness.estimator.batches import Batch
from harness.estimator.objective import SplitLoss

Tensors = Sequence[torch.Tensor]


class Graph(dict[str, torch.Tensor | None]):
    """Gradients of the mean loss by the names of parameters; their derivatives are the Hessian's.

    Attributes:
        value: What they are gradients of, with its graph.
        cotangent: What it is multiplied with; None: it is a scalar.
    """

    def __init__(self, value: torch.Tensor, cotangent: torch.Tensor | None = None) -> None:
        super().__init__()
        self.value, self.cotangent = value, cotangent

    def derivatives(
        self, gradients: Tensors, parameters: Tensors, directions: Tensors
    ) -> Sequence[torch.Tensor | None]:
        """Return ∂⟨gradients, directions⟩ / ∂parameters; the graph stays."""
        return torch.autograd.grad(
            gradients, parameters, directions, retain_graph=True, allow_unused=True
        )


class GaussNewtonGraph(Graph):
    """Gradients Jᵀu, whose dependence on u alone is differentiated.

    z are the outputs, J their derivative by the parameters and u = ∇c(z) the criterion's. Jᵀu is
    linear in u, so that ∂⟨Jᵀu, v⟩/∂u = J v (Townsend 2017, "A new trick for calculating
    Jacobian vector products"): a product Jᵀ (∇²c) J v takes no forward derivative.

    Attributes:
        value: z with its graph.
        cotangent: u, a leaf.
        place: z once more, a leaf.
        slope: ∇c at that place, with its graph.
    """

    def __init__(self, loss: SplitLoss, model: nn.Module, batch: Batch) -> None:
        """Go forward, and differentiate the criterion by the outputs."""
        outputs = loss.outputs_of(model, batch)
        self.place, self.slope = slope_of(loss, outputs, batch)
        super().__init__(outputs, self.slope.detach().requires_grad_())

    def derivatives(
        self, gradients: Tensors, parameters: Tensors, directions: Tensors
    ) -> Sequence[torch.Tensor | None]:
        """Return Jᵀ (∇²c) J v for the block of these parameters; the graph stays."""
        kept: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
        assert self.cotangent is not None
        (change,) = torch.autograd.grad(gradients, self.cotangent, directions, **kept)
        if not self.slope.requires_grad:  # the criterion is linear
            return [None] * len(parameters)
        (back,) = torch.autograd.grad(self.slope, self.place, change, **kept)
        return super().derivatives([self.value], parameters, [back])


def criterion_at(
    loss: SplitLoss, outputs: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs as a leaf, and the criterion of them, a scalar with its graph."""
    place = outputs.detach().requires_grad_()
    return place, loss.criterion(place.clone(), batch).reshape(())  # which may write into it


def slope_of(
    loss: SplitLoss, outputs: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs as a leaf, and the criterion's gradient by them with its graph."""
    place, value = criterion_at(loss, outputs, batch)
    if not value.requires_grad:
        raise UserError(
            "the criterion of the loss does not depend on the outputs that it is given; write it "
            "as a function of (outputs, batch)"
        )
    (slope,) = torch.autograd.grad(value, place, create_graph=True)
    return place, slope


def split_or_refuse(loss_fn: Any, what: str) -> SplitLoss:
    """Return a loss that is in two parts.

    Raises:
        UserError: It is not; says what to write.
    """
    if isinstance(loss_fn, SplitLoss):
        return loss_fn
    raise UserError(
        f"{what} needs the loss in two parts: pass harness.SplitLoss(outputs, criterion), such as "
        "SplitLoss(lambda m, b: m(b[0]), lambda z, b: F.cross_entropy(z, b[1])), not a plain "
        "function"
    )
