"""The problems that are measured: two of the size that matters, and small ones known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from harness import SplitLoss
from harness.registry.networks.convolutional import cnn
from harness.registry.networks.transformer import GPT, ViT

# Mean over samples, or over tokens.
CROSS_ENTROPY = SplitLoss(
    lambda model, batch: model(batch[0]),
    lambda z, batch: F.cross_entropy(z.flatten(0, -2), batch[1].flatten()),
)


@dataclass(frozen=True)
class Case:
    """A model with its loss and one batch."""

    model: nn.Module
    loss_fn: SplitLoss
    batch: tuple[torch.Tensor, torch.Tensor]


def gpt_10m() -> Case:
    """GPT of 10.8 M parameters, 39 blocks, 2 sequences of 256 tokens."""
    return Case(
        gpt(65, 256, num_layers=6, num_heads=6, width=384), CROSS_ENTROPY, tokens(65, 2, 256)
    )


def gpt(vocab_size: int, context: int, **options: int) -> nn.Module:
    """Return a GPT without biases, its head untied from the embedding."""
    return _seeded(lambda: GPT(vocab_size, context, tied=False, bias=False, **options))


def resnet18() -> Case:
    """ResNet18 of torchvision with 10 classes, 21 blocks, 16 images of 64×64."""
    from torchvision.models import resnet18 as build

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 64, 64, generator=generator)
    labels = torch.randint(10, (16,), generator=generator)
    return Case(_seeded(lambda: build(num_classes=10)), CROSS_ENTROPY, (images, labels))


def small(kind: str) -> Case:
    """A net of a few thousand parameters, whose dense block Hessians are quick to diagonalise."""
    if kind == "gpt":
        model = _seeded(lambda: GPT(32, 16, num_layers=2, num_heads=2, width=24, tied=False))
        return Case(model, CROSS_ENTROPY, tokens(32, 16, 16))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (64,), generator=generator)
    build = {
        "vit": lambda: ViT(8, 1, 10, patch_size=2, num_layers=2, num_heads=2, width=24),
        "cnn": lambda: cnn(1, 10, widths=(8, 16, 16)),
        "mlp": lambda: nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        ),
    }
    return Case(_seeded(build[kind]), CROSS_ENTROPY, (images, labels))


KINDS = ("gpt", "vit", "cnn", "mlp")


def tokens(vocab_size: int, num_sequences: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random tokens and what follows each, shape (num_sequences, context) both."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(vocab_size, (num_sequences, context + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build().eval()
