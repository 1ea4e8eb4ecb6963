"""The problems that are measured: two of the size that matters, and small ones known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from harness import SplitLoss, estimate_spectra
from harness.estimator.objective import Batch, LossFn
from harness.registry import get
from harness.registry.networks.convolutional import cnn
from harness.registry.networks.transformer import GPT, ViT
from harness.training import load_problem

# Mean over samples, or over tokens.
CROSS_ENTROPY = SplitLoss(
    lambda model, batch: model(batch[0]),
    lambda z, batch: F.cross_entropy(z.flatten(0, -2), batch[1].flatten()),
)


@dataclass(frozen=True)
class Case:
    """A model with its loss and one batch."""

    model: nn.Module
    loss_fn: LossFn
    batch: Batch

    def spectra(self, **options: Any) -> pd.DataFrame:
        """Estimate its spectra, with options of `estimate_spectra`."""
        return estimate_spectra(self.model, self.loss_fn, [self.batch], **options)


def gpt_10m(num_sequences: int = 2) -> Case:
    """GPT of 10.8 M parameters, 39 blocks, at sequences of 256 tokens."""
    model = gpt(65, 256, num_layers=6, num_heads=6, width=384)
    return Case(model, CROSS_ENTROPY, tokens(65, num_sequences, 256))


def gpt(vocab_size: int, context: int, **options: int) -> nn.Module:
    """Return a GPT without biases, its head untied from the embedding."""
    return seeded(lambda: GPT(vocab_size, context, tied=False, bias=False, **options))


def resnet18() -> Case:
    """ResNet18 of torchvision with 10 classes, 21 blocks, 16 images of 64×64."""
    from torchvision.models import resnet18 as build

    return Case(seeded(lambda: build(num_classes=10)), CROSS_ENTROPY, images(10, 16, 3, 64, 64))


def entry(name: str) -> Case:
    """Return a registry entry at initialisation, with its Hessian's batch in one piece.

    Raises:
        UserError: There is no such entry, or its data are not here.
    """
    problem = load_problem(get(name))
    return Case(problem.model, problem.loss_fn, problem.whole)


def small(kind: str) -> Case:
    """A net of a few thousand parameters, whose dense block Hessians are quick to diagonalise."""
    if kind == "gpt":
        model = seeded(lambda: GPT(32, 16, num_layers=2, num_heads=2, width=24, tied=False))
        return Case(model, CROSS_ENTROPY, tokens(32, 16, 16))
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
    return Case(seeded(build[kind]), CROSS_ENTROPY, images(10, 64, 1, 8, 8))


KINDS = ("gpt", "vit", "cnn", "mlp")


def tokens(vocab_size: int, num_sequences: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random tokens and what follows each, shape (num_sequences, context) both."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(vocab_size, (num_sequences, context + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def images(num_classes: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images of a shape (N, C, H, W), and their labels, shape (N,)."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(shape, generator=generator)
    return drawn, torch.randint(num_classes, shape[:1], generator=generator)


def count_flops(run: Callable[[], object]) -> int:
    """Return the floating-point operations that something takes, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model whose weights are drawn with seed 0; it is in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build().eval()
