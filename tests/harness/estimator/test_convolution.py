from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from harness.estimator.blocks import find_blocks
from harness.estimator.checks import fixed_arithmetic

from .models import cross_entropy
from .test_hessian import block_hessian, dense_hessian


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class Shared(nn.Module):
    """Uses one convolution twice, and its weight a third time as a matrix before."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 1), nn.Linear(72, 3)

    def forward(self, x):
        x = torch.einsum("bchw,dc->bdhw", x, self.conv.weight[:, :, 0, 0]).tanh()
        return self.head(self.conv(self.conv(x).tanh()).tanh().flatten(1))


class InList(nn.Module):
    """Uses a convolution's weight inside of lists before it convolves with it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 1), nn.Linear(72, 3)

    def forward(self, x):
        mixing = torch.cat([self.conv.weight, self.conv.weight]).narrow(0, 1, 2)[:, :, 0, 0]
        x = torch.einsum("bchw,dc->bdhw", x, mixing).tanh()
        return self.head(self.conv(x).tanh().flatten(1))


class ByKeyword(nn.Conv1d):
    """Calls as transformers' Mamba does."""

    def forward(self, x):
        return F.conv1d(input=x, weight=self.weight, bias=self.bias)


def net(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


NETS = {
    "strided, dilated, grouped": lambda: net(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2, dilation=2, groups=2)
    ),
    "depthwise without bias": lambda: net(
        nn.Conv2d(2, 2, 3, groups=2, bias=False), nn.Tanh(), nn.Conv2d(2, 3, 1), nn.Tanh()
    ),
    "padding by name": lambda: net(
        nn.Conv2d(2, 3, 3, padding="same", dilation=2),
        nn.Tanh(),
        nn.Conv2d(3, 2, 3, padding="valid"),
    ),
    "more padding on one side": lambda: net(
        nn.Conv2d(2, 3, 2, padding="same"), nn.Tanh(), nn.Conv2d(3, 2, 3)
    ),
    "one dimension": lambda: net(
        nn.Flatten(2), nn.Conv1d(2, 3, 5, stride=3), nn.Tanh(), nn.Conv1d(3, 2, 2, padding=2)
    ),
    "arguments by keyword": lambda: net(nn.Flatten(2), ByKeyword(2, 3, 5), nn.Tanh()),
    "transposed": lambda: net(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.ConvTranspose2d(3, 2, 2), nn.Tanh()
    ),
    "computed weights": lambda: net(
        nn.Conv2d(2, 3, 3), nn.Tanh(), Standardised(3, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 1)
    ),
    "shared weights": Shared,
    "weights in a list": InList,
}


@pytest.mark.parametrize("partition", ["weights", "all", "full"])
@pytest.mark.parametrize("name", NETS)
def test_products_through_convolutions_equal_the_dense_hessian(name, partition):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 6, 6, generator=generator, dtype=torch.float64)
    batch = (x, torch.tensor([0, 1, 2]))
    model = NETS[name]().double()
    model(x)
    blocks, expected = dense_hessian(model, cross_entropy, batch, partition)
    hessian = block_hessian(model, cross_entropy, [batch], blocks)
    with fixed_arithmetic(model):
        for i, H in enumerate(expected):
            assert (hessian.dense(i) - H).norm() <= 1e-10 * max(H.norm(), 1e-3)


def test_a_loss_that_differentiates_inside_has_the_dense_hessian():
    def penalised(model, x):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return slope.square().mean()

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 5, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Conv1d(2, 2, 2), nn.Tanh()).double()
    blocks, expected = dense_hessian(model, penalised, x, "all")
    hessian = block_hessian(model, penalised, [x], blocks)
    with fixed_arithmetic(model):
        for i, H in enumerate(expected):
            torch.testing.assert_close(hessian.dense(i), H)


def test_convolutions_under_autocast_have_products():
    class Half(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    batch = (torch.randn(3, 2, 6, 6), torch.tensor([0, 1, 2]))
    model = Half(nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))
    hessian = block_hessian(model, cross_entropy, [batch], find_blocks(model), dtype=torch.float32)
    with fixed_arithmetic(model):
        (product,) = hessian.products([(0, torch.ones(36))])
    assert torch.isfinite(product).all()
    assert product.any()


def test_a_weight_may_be_used_oftener_in_one_batch_than_in_another():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 1)

        def forward(self, x):
            for _ in range(x.shape[2]):
                x = self.conv(x).tanh()
            return x.sum(2)

    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 2, 3), (2, 2, 1)]
    labels = torch.tensor([0, 1])
    batches = [(torch.randn(s, generator=generator, dtype=torch.float64), labels) for s in sizes]
    model = Recurrent().double()
    found = block_hessian(model, cross_entropy, batches, find_blocks(model)).dense(0)
    each = [dense_hessian(model, cross_entropy, b, "weights")[1][0] for b in batches]
    torch.testing.assert_close(found, (each[0] + each[1]) / 2)


@pytest.mark.parametrize("padding", [1, "same"])
def test_a_product_costs_two_convolutions_a_layer_behind_and_two_in_the_block(padding):
    """At the block: forward with v, and the weight's gradient; behind it one up, one down."""
    width, size, depth = 4, 8, 4
    layers = [nn.Conv2d(width, width, 3, padding=padding, bias=False) for _ in range(depth)]
    model = nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())))
    loss = lambda m, x: F.mse_loss(m(x), torch.zeros_like(x))  # noqa: E731
    x = torch.randn(2, width, size, size)
    blocks = find_blocks(model)
    hessian = block_hessian(model, loss, [x], blocks, dtype=torch.float32)
    one = 2 * 2 * size**2 * width**2 * 9
    hessian.products([])
    for i, block in enumerate(blocks):
        with FlopCounterMode(display=False) as counter:
            hessian.products([(i, torch.ones(block.num_params))])
        behind = depth - 1 - i
        # Tanh bends: the activations' second-order terms need the down pass of every layer
        # behind the block, and of the block's own weight.
        assert counter.get_total_flops() == (2 + 2 * behind) * one
