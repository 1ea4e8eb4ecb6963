"""Cross-entropy's derivatives against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from harness.estimator.blocks import find_blocks
from harness.estimator.checks import fixed_arithmetic
from harness.estimator.cross_entropy import cross_entropy
from harness.estimator.objective import SplitLoss

from .test_hessian import block_hessian, dense_hessian

N, C = 6, 5
TARGETS = torch.tensor([0, 4, -100, 2, 2, -100])


def logits(scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(N, C, dtype=torch.float64, generator=generator)


def derivatives(loss, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return a loss of logits, its gradient, and that gradient's derivative along a direction."""
    z = z.clone().requires_grad_()
    value = loss(z)
    (g,) = torch.autograd.grad(value, z, create_graph=True)
    (Hv,) = torch.autograd.grad(g, z, z.detach().cos())
    return value.detach(), g.detach(), Hv


PLAIN = [
    {},
    {"reduction": "sum"},
    {"ignore_index": 2},
    {"ignore_index": 7},  # no class
]
NONE = torch.full_like(TARGETS, -100)
OTHER = [
    {"label_smoothing": 0.1},
    {"weight": torch.arange(1.0, C + 1, dtype=torch.float64)},
    {"reduction": "none"},
]


@pytest.mark.parametrize("options", [*PLAIN, *OTHER])
@pytest.mark.parametrize("after", [torch.sum, lambda t: t.sum().square() / 2 + t.sum()])
def test_it_has_the_first_two_derivatives_of_torchs(options, after):
    targets = torch.where(TARGETS == -100, options.get("ignore_index", -100), TARGETS)
    found, expected = (
        derivatives(lambda z, f=f: after(f(z, targets, **options)), logits())
        for f in (cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("z", "targets"),
    [
        (logits().T.reshape(1, C, N), TARGETS[None]),
        (logits()[0], TARGETS[0]),
        (logits(), logits().softmax(1)),
        (logits(), NONE),  # a piece of a batch may be all padding: its loss is nan, its gradient 0
        (logits()[:0], TARGETS[:0]),
    ],
)
def test_other_shapes_and_rows_that_do_not_count_are_as_torchs(z, targets):
    found, expected = (
        derivatives(lambda z, f=f: f(z, targets), z) for f in (cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_certain_rows_and_a_slope_of_zero_have_finite_products():
    _, g, Hv = derivatives(lambda z: cross_entropy(z, TARGETS), logits(1e3))
    assert g.isfinite().all()
    assert Hv.isfinite().all()
    found, expected = (
        derivatives(lambda z, f=f: 0 * f(z, TARGETS), logits())
        for f in (cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def counted(batch):
    return int((batch[1] != -100).sum())


class Head(nn.Module):
    """A model whose loss goes forward again in the backward pass, as of long texts."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def plain(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def checkpointed(model, batch):
    def loss(h):
        return F.cross_entropy(model.second(h), batch[1])

    return checkpoint(loss, model.first(batch[0]).tanh(), use_reentrant=False)


def squared_slope(model, batch):
    """Return a loss that differentiates cross-entropy itself: its Hessian has three derivatives."""
    x = batch[0].detach().requires_grad_()
    loss = F.cross_entropy(model(x), batch[1], reduction="sum")
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    return (loss + g.square().sum()) / counted(batch)


@pytest.mark.parametrize(
    ("loss", "same"), [(plain, plain), (checkpointed, plain), (squared_slope, squared_slope)]
)
def test_blocks_have_the_hessian_of_double_backward(loss, same):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = Head().double(), (torch.randn(N, 3, dtype=torch.float64), TARGETS)
    blocks, expected = dense_hessian(model, same, batch, "all")
    hessian = block_hessian(model, loss, [batch], blocks, batch_weights=counted)
    with fixed_arithmetic(model):
        found = [hessian.dense(i) for i in range(len(blocks))]
    torch.testing.assert_close(found, expected)


def test_the_criterion_of_a_loss_in_two_parts_is_no_other():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = Head().double(), (torch.randn(N, 3, dtype=torch.float64), TARGETS)
    blocks = find_blocks(model, "all")
    last = len(blocks) - 2  # second.weight: the outputs are linear in it
    split = SplitLoss(lambda m, b: m(b[0]), lambda z, b: F.cross_entropy(z, b[1]))
    found = []
    for operator in ("hessian", "ggn"):
        hessian = block_hessian(
            model, split, [batch], blocks, batch_weights=counted, operator=operator
        )
        with fixed_arithmetic(model):
            found.append(hessian.dense(last))
    torch.testing.assert_close(*found)
