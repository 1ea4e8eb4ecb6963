"""Networks small enough for a test, found by `factory` as `small_networks:...`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def cnn(num_classes: int, in_channels: int, width: int = 8, **_: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, num_classes),
    )


def linear(num_classes: int, image_size: int, **_: Any) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(image_size**2, num_classes))


class Silent(nn.Sequential):
    """Switches its mode and returns nothing, as authors forget to."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(image_size**2, num_classes))

    def train(self, mode: bool = True) -> None:
        super().train(mode)

    def eval(self) -> None:
        super().train(False)


class TiedLanguageModel(nn.Module):
    """Embed, mix by one hidden layer, and read out with the embedding itself."""

    def __init__(self, vocab_size: int, width: int = 16, **_: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.embedding(tokens)).tanh())
