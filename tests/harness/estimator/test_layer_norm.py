"""Layer norms' derivatives against torch's own, and against those of their formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from harness.estimator.layer_norm import by_formula, normalize
from harness.estimator.operations import SoundOperations

from .models import cross_entropy
from .test_activations import Net, check_blocks


def derivatives(call, shape, normed, has_weight, has_bias):
    """Return a call's value, its gradients, and what they are by its inputs along directions."""
    generator = torch.Generator().manual_seed(0)

    def draw(of) -> torch.Tensor:
        return torch.randn(of, dtype=torch.float64, generator=generator).requires_grad_()

    x, g = draw(shape), draw(shape)
    weight, bias = (draw(normed) if there else None for there in (has_weight, has_bias))
    given = [part for part in (x, weight, bias) if part is not None]
    y = call(x, normed, weight, bias, 1e-3)
    gradients = torch.autograd.grad(y, given, g, create_graph=True)
    along = [draw(part.shape).detach() for part in given]
    by = [part for part in (x, g, weight) if part is not None]
    zeros = {"retain_graph": True, "materialize_grads": True}
    together = torch.autograd.grad(gradients, by, along, **zeros)
    alone = [
        torch.autograd.grad(gradient, by, u, **zeros)
        for gradient, u in zip(gradients, along, strict=True)
    ]
    of_one = [torch.autograd.grad(gradients[0], [part], along[0], **zeros) for part in by]
    return y, gradients, together, alone, of_one, torch.autograd.grad(y, given, g)


@pytest.mark.parametrize(
    ("shape", "normed"), [((3, 5, 8), (8,)), ((4, 2, 3), (2, 3)), ((6,), (6,)), ((0, 7), (7,))]
)
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_they_have_the_first_two_derivatives_of_their_formula(shape, normed, has_weight, has_bias):
    found, expected = (
        derivatives(call, shape, normed, has_weight, has_bias) for call in (normalize, by_formula)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_they_have_those_of_torchs_kernel():
    found, expected = (
        derivatives(call, (3, 8), (8,), True, True) for call in (normalize, F.layer_norm)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_what_is_coarse_or_mixed_is_torchs():
    weight = torch.ones(4, requires_grad=True)
    coarse = normalize(torch.randn(2, 4).bfloat16(), (4,), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        cast = normalize(torch.randn(2, 4), (4,), weight)
    for found in (coarse, cast):
        assert "_LayerNorm" not in found.grad_fn.name()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_blocks_have_the_hessian_of_double_backward(affine, is_checkpointed):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        norm = nn.LayerNorm(4, elementwise_affine=affine)
        model = Net(norm, is_checkpointed).double()
        batch = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 1])
    check_blocks(model, Net(norm, False).double(), cross_entropy, batch)


def test_it_takes_the_place_of_torchs_where_two_derivatives_are_enough():
    with SoundOperations():
        y = nn.LayerNorm(4)(torch.randn(2, 4))
    assert "_LayerNorm" in y.grad_fn.name()
