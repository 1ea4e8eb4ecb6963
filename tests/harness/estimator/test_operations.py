"""Losses that differentiate inside, by torch.autograd or by torch.func."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from harness.errors import UserError
from harness.estimator.blocks import find_blocks
from harness.estimator.checks import fixed_arithmetic
from harness.estimator.operations import SoundOperations

from .models import cross_entropy
from .test_hessian import block_hessian, dense_hessian


class Formula(nn.Module):
    """LayerNorm without a kernel."""

    def __init__(self, like):
        super().__init__()
        self.weight, self.bias, self.dims = like.weight, like.bias, len(like.normalized_shape)

    def forward(self, x):
        dims = list(range(-self.dims, 0))
        y = (x - x.mean(dims, keepdim=True)) / (x.var(dims, False, keepdim=True) + 1e-5).sqrt()
        return y if self.weight is None else y * self.weight + self.bias


def by_autograd(model, x):
    z = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(model(z).logsumexp(1).sum(), z, create_graph=True)
    return g


def by_func(model, x):
    return torch.func.grad(lambda z: model(z).logsumexp(1).sum())(x)


def by_sample(model, x):
    return torch.func.vmap(torch.func.grad(lambda z: model(z[None]).logsumexp(1).sum()))(x)


def by_jacobian(model, x):
    return torch.func.jacrev(lambda z: model(z).logsumexp(1).sum())(x)


def forward(model, x):
    """Return a derivative along a direction, by forward differentiation."""
    return torch.func.jvp(lambda z: model(z).logsumexp(1), (x,), (x.cos(),))[1][:, None]


def along(model, x):
    return (by_autograd(model, x) * x.cos()).flatten(1).sum(1)[:, None]


def with_slope(slope):
    """Return a loss with the squared slope of each sample."""

    def loss(model, batch):
        squares = slope(model, batch[0]).square().flatten(1).sum(1)
        return cross_entropy(model, batch) + squares.mean()

    return loss


def dense(model, loss, batch):
    blocks = find_blocks(model, "all")
    hessian = block_hessian(model, loss, [batch], blocks)
    with fixed_arithmetic(model):
        return [hessian.dense(i) for i in range(len(blocks))]


def convolutional():
    return nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))


def normed(norm):
    return nn.Sequential(nn.Flatten(), nn.Linear(5, 4), norm, nn.Linear(4, 3))


def problem(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
        batch = (torch.randn(4, 1, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    return model, batch


@pytest.mark.parametrize(
    ("slope", "same"),
    [
        (by_func, by_autograd),
        (by_sample, by_autograd),
        (by_jacobian, by_autograd),
        (forward, along),
    ],
)
def test_transforms_of_torch_func_have_the_hessian_of_double_backward(slope, same):
    model, batch = problem(convolutional)
    _, expected = dense_hessian(model, with_slope(same), batch, "all")
    torch.testing.assert_close(dense(model, with_slope(slope), batch), expected)


@pytest.mark.parametrize("slope", [by_autograd, by_func, forward])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norms_have_the_third_derivative_of_their_formula(slope, affine):
    norm = nn.LayerNorm(4, elementwise_affine=affine)
    model, batch = problem(lambda: normed(norm))
    _, expected = dense_hessian(normed_like(model), with_slope(slope), batch, "all")
    torch.testing.assert_close(dense(model, with_slope(slope), batch), expected)


def normed_like(model):
    return nn.Sequential(*model[:2], Formula(model[2]), model[3])


class HardFormula(nn.Module):
    """Hardsigmoid or hardswish as they are defined."""

    def __init__(self, module):
        super().__init__()
        self.is_swish = isinstance(module, nn.Hardswish)

    def forward(self, x):
        gate = (x + 3).clamp(0, 6) / 6
        return x * gate if self.is_swish else gate


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("make", [nn.Hardsigmoid, nn.Hardswish])
def test_hard_activations_have_the_second_derivative_of_their_formula(make, inplace):
    model, batch = problem(lambda: normed(make(inplace=inplace)))
    model[1].weight.data.mul_(4)  # on both sides of the kinks
    like = nn.Sequential(*model[:2], HardFormula(model[2]), model[3])
    _, expected = dense_hessian(like, cross_entropy, batch, "all")
    torch.testing.assert_close(dense(model, cross_entropy, batch), expected)
    with SoundOperations():
        torch.testing.assert_close(model(batch[0]), like(batch[0]))


class Checkpointed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(5, 3)

    def forward(self, x):
        x = checkpoint(lambda z: self.layer(z).tanh(), x, use_reentrant=False)
        return self.head(x.flatten(1))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Squaring(nn.Linear):
    def forward(self, x):
        return Square.apply(super().forward(x.flatten(1)))


@pytest.mark.parametrize(
    ("make", "slope", "said"),
    [
        (lambda: Squaring(5, 3), by_func, "`setup_context` and .*torch.autograd.grad"),
        (lambda: Squaring(5, 3), forward, "`setup_context` and .*torch.autograd.grad"),
        (lambda: Checkpointed(nn.Linear(5, 5)), by_func, "what is checkpointed.*autograd.grad"),
        (lambda: Checkpointed(nn.LayerNorm(5)), by_autograd, "leave the checkpoint out"),
        (lambda: Checkpointed(weight_norm(nn.Linear(5, 5))), by_autograd, "leave the checkpoint"),
    ],
)
def test_what_can_not_be_differentiated_so_says_what_to_write_instead(make, slope, said):
    model, batch = problem(make)
    with pytest.raises(UserError, match=said):
        dense(model, with_slope(slope), batch)


def test_a_complex_convolution_has_the_dense_hessian():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(2, 1, 3, 2)), nn.Linear(6, 3)

        def forward(self, x):
            z = F.conv1d(torch.complex(x, x.sin()), torch.view_as_complex(self.weight))
            return self.head(z.abs().flatten(1))

    model, batch = problem(Complex)
    _, expected = dense_hessian(model, cross_entropy, batch, "all", vectorize=False)
    torch.testing.assert_close(dense(model, cross_entropy, batch), expected)
