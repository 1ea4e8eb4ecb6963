"""Activations' derivatives against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from harness.estimator.activations import activate
from harness.estimator.blocks import find_blocks
from harness.estimator.checks import fixed_arithmetic

from .models import cross_entropy
from .test_hessian import block_hessian, dense_hessian

CALLS = [
    (F.gelu, {}),
    (F.gelu, {"approximate": "tanh"}),
    (F.silu, {}),
    (F.silu, {"inplace": False}),
]


def points(dtype=torch.float64) -> torch.Tensor:
    return torch.linspace(-12, 12, 101, dtype=dtype).reshape(1, 101)


@pytest.mark.parametrize(("func", "options"), CALLS)
def test_they_have_the_first_two_derivatives_of_torchs(func, options):
    found = []
    for call in (lambda x: activate(func, x, **options), lambda x: func(x, **options)):
        x, g = points().requires_grad_(), points().cos().requires_grad_()
        y = call(x)
        (slope,) = torch.autograd.grad(y, x, g, create_graph=True)
        second = torch.autograd.grad(slope, (x, g), x.detach().sin(), retain_graph=True)
        again = torch.autograd.grad(y, x, x.detach().sin())  # the derivative is kept by now
        alone = torch.autograd.grad(call(x), x, g)
        found.append((y, slope, *second, *again, *alone))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_what_is_coarse_or_in_place_is_torchs():
    x = points(torch.bfloat16).requires_grad_()
    assert "Activation" not in activate(F.gelu, x).grad_fn.name()
    for options in ({"inplace": True}, {}):
        place = points().clone()
        y = activate(F.silu, place, *([] if options else [True]), **options)
        assert y is place


class Net(nn.Module):
    def __init__(self, activation, is_checkpointed: bool):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.activation, self.head = activation, nn.Linear(4, 3)
        self.is_checkpointed = is_checkpointed

    def body(self, x):
        return self.activation(self.second(self.activation(self.first(x))))

    def forward(self, x):
        h = checkpoint(self.body, x, use_reentrant=False) if self.is_checkpointed else self.body(x)
        return self.head(h)


def with_slope(model, batch):
    """Return a loss whose Hessian has third derivatives."""
    x = batch[0].detach().requires_grad_()
    (g,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x, create_graph=True)
    return cross_entropy(model, batch) + g.square().sum(1).mean()


def check_blocks(model, plain, loss, batch):
    """Compare a model's blocks with the dense Hessians of one that is the same but plain."""
    plain.load_state_dict(model.state_dict())
    blocks, expected = dense_hessian(plain, loss, batch, "all")
    hessian = block_hessian(model, loss, [batch], find_blocks(model, "all"))
    with fixed_arithmetic(model):
        found = [hessian.dense(i) for i in range(len(blocks))]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", [cross_entropy, with_slope])
@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_blocks_have_the_hessian_of_double_backward(loss, activation, is_checkpointed):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(activation, is_checkpointed).double()
        plain = Net(activation, False).double()
        batch = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 1])
    check_blocks(model, plain, loss, batch)
