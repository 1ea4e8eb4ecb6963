"""Multilayer perceptrons, and none at all: softmax regression."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them, each layer's output scaled.

    h_l = ReLU(scale · (W_l h_{l-1} + b_l)); the last layer is scaled too, without the ReLU.
    With scale 1 it is the usual perceptron; larger ones make the blocks of the Hessian differ
    (the sweep of Zhang et al. 2024, arXiv 2402.16788).

    Args:
        in_channels: Channels of the images, which are flattened.
        image_size: Their side.
        num_classes: Number of classes.
        widths: Widths of the hidden layers.
        scale: Factor of each layer's output.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        *,
        widths: Sequence[int],
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = (in_channels * image_size**2, *widths, num_classes)
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise(sizes[:-1]))
        self.head = nn.Linear(sizes[-2], num_classes)
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, K)
        x = images.flatten(1)
        for layer in self.layers:
            x = (layer(x) * self.scale).relu()
        return self.head(x) * self.scale


class Softmax(nn.Module):
    """A softmax regression: logits W x + b, from zero.

    Zero is where a convex problem may as well begin (all classes equally likely, no seed); its
    gradient and Hessian are not zero there. It has one block of weights, so no measure that
    compares blocks is defined on it.

    Args:
        dimension: Number of inputs.
        num_classes: Number of classes.
    """

    def __init__(self, dimension: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(dimension, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Tensor) -> Tensor:  # (B, D) -> (B, K)
        return self.head(inputs)
