"""Pruning changes no product: random programs, against torch's own double backward."""

from __future__ import annotations

from threading import Thread

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from harness.estimator.blocks import find_blocks
from harness.estimator.checks import fixed_arithmetic

from .test_hessian import block_hessian

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def bend(w):
    return torch.sin(w).sum()


TRACED = torch.jit.trace(bend, torch.ones(2))


def in_a_thread(w):
    results = []
    thread = Thread(target=lambda: results.append(bend(w)))
    thread.start()
    thread.join()
    return results[0]


class Program(nn.Module):
    """Steps in a given order, each a use of the weights of two convolutions and a matrix."""

    def __init__(self, steps, dim, kernel):
        super().__init__()
        make = CONVOLUTIONS[dim]
        self.a = make(2, 2, kernel, padding=kernel // 2)
        self.b = make(2, 4, kernel, padding="same", groups=2, bias=False)
        self.mix, self.head = nn.Linear(2, 2), nn.Linear(2, 3)
        self.steps = steps

    def forward(self, x):
        for step in self.steps:
            x = STEPS[step](self, x)
        return self.head(x.flatten(2).mean(2))

    def with_weight(self, x, w):
        return self.a._conv_forward(x, w, self.a.bias).tanh()

    def with_a(self, x):
        return self.a(x).tanh()

    def with_b(self, x):
        y = self.b(x).tanh()
        return y[:, :2] * y[:, 2:]

    def both(self, x):
        return self.with_b(self.with_a(x))

    def slope(self, x):
        z = x if x.requires_grad else x.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.with_a(z).square().sum(), z, create_graph=True)
        return (x + g).tanh()

    def adapted(self, x):
        """Convolve with a weight after one step of gradient descent, as MAML does."""
        w = self.a.weight
        (g,) = torch.autograd.grad(self.with_a(x).square().sum(), w, create_graph=True)
        return self.with_weight(x, w - 0.1 * g)

    def functional_slope(self, x):
        return (x + torch.func.grad(lambda z: self.with_b(z).square().sum())(x)).tanh()


STEPS = {
    "a": Program.with_a,
    "b": Program.with_b,
    "a and b again from the same": lambda m, x: m.with_a(x) * m.with_b(x) + x,
    "mix": lambda m, x: m.mix(x.movedim(1, -1)).movedim(-1, 1).tanh(),
    "a, normed": lambda m, x: m.with_weight(x, m.a.weight / m.a.weight.norm()),
    "a, by the bias": lambda m, x: m.with_weight(x, m.a.weight * m.a.bias.sum().cos()),
    "weight of a": lambda m, x: x * (1 + bend(m.a.weight)),
    "weight of b, traced": lambda m, x: x * (1 + TRACED(m.b.weight)),
    "weight of a, in a thread": lambda m, x: x * (1 + in_a_thread(m.a.weight)),
    "slope": Program.slope,
    "adapted": Program.adapted,
    "functional slope": Program.functional_slope,
    "checkpointed": lambda m, x: checkpoint(m.both, x, use_reentrant=False),
}


def loss_with(penalised):
    """Return the cross entropy plus the squared gradients with respect to some parameters."""

    def loss(model, batch):
        value = F.cross_entropy(model(batch[0]), batch[1])
        if penalised:
            parameters = [model.get_parameter(name) for name in penalised]
            slopes = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
            value = value + sum(g.square().sum() for g in slopes if g is not None)
        return value

    return loss


def unpruned(model, loss, batch, blocks, vectors):
    """Return the products by torch's double backward through all parameters at once."""
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(
        loss(model, batch), list(named.values()), create_graph=True, allow_unused=True
    )
    slopes = dict(zip(named, gradients, strict=True))
    for block, vector in zip(blocks, vectors, strict=True):
        pieces = vector.split([part.of(named[part.parameter]).numel() for part in block.parts])
        dots = [
            (part.of(slopes[part.parameter]).flatten() * piece).sum()
            for part, piece in zip(block.parts, pieces, strict=True)
            if slopes[part.parameter] is not None
        ]
        total = sum(dots, 0 * model.head.weight.sum())
        derivatives = torch.autograd.grad(
            total, list(named.values()), retain_graph=True, materialize_grads=True
        )
        every = dict(zip(named, derivatives, strict=True))
        yield torch.cat([part.of(every[part.parameter]).flatten() for part in block.parts])


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4),
    dim=st.sampled_from(sorted(CONVOLUTIONS)),
    kernel=st.sampled_from([1, 3]),
    penalised=st.sets(st.sampled_from(["a.weight", "a.bias", "b.weight", "mix.weight"])),
    partition=st.sampled_from(["weights", "all", "full"]),
)
def test_pruned_products_equal_unpruned_ones(steps, dim, kernel, penalised, partition):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Program(steps, dim, kernel).double()
        batch = (torch.randn(2, 2, *[3] * dim, dtype=torch.float64), torch.tensor([0, 2]))
        blocks = find_blocks(model, partition)
        vectors = [torch.randn(block.num_params, dtype=torch.float64) for block in blocks]
    loss = loss_with(sorted(penalised))
    # One number, not a count: penalties are no means over samples.
    hessian = block_hessian(model, loss, [batch], blocks, batch_weights=[1.0])
    with fixed_arithmetic(model):
        found = hessian.products(list(enumerate(vectors)))
        expected = unpruned(model, loss, batch, blocks, vectors)
        for ours, right in zip(found, expected, strict=True):
            assert (ours - right).norm() <= 1e-10 * max(float(right.norm()), 1e-3)
