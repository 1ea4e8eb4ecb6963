"""Multilayer perceptrons: two small ones, and the paper's sweep.

The sweep is Zhang et al. 2024 (arXiv 2402.16788): a perceptron of four layers, 784-300-128-64-10,
with ReLU, each layer's output scaled by c; MNIST, batch 128, one epoch, learning rates 1e-4 to 1e-1
for both optimizers, test accuracy at the end. Ours, as the paper does not state them or we could
not read it: c = 1, 2, ..., 15, torch's initialisation, seven rates half a decade apart, a constant
rate without warm-up, no weight decay, SGD's momentum of 0.9. The gap chooses its rates by the
training loss, the paper by test accuracy, which is another result: docs/mlp-sweep.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.registry.entry import ModelEntry, Recipe
from harness.registry.recipes import CIFAR10, IMAGES, MNIST, OWN, SMALL

_FACTORY = "harness.registry.networks.mlp:MLP"
_SMALL: dict[str, Any] = {
    "family": "mlp",
    "factory": _FACTORY,
    "recipe": replace(IMAGES, batch_size=128),
    "reference": "Rumelhart, Hinton & Williams 1986, Nature 323, 533-536",
    **OWN,
    **SMALL,
}
_SWEEP = Recipe(
    num_steps=468,  # an epoch of 60,000 images, its ragged last batch dropped
    batch_size=128,
    sgd_lrs=(1e-4, 1e-1),
    adamw_lrs=(1e-4, 1e-1),
    num_lrs=7,
    schedule="constant",
    extend_grid=False,
)

ENTRIES = (
    ModelEntry(
        name="mlp-mnist",
        options={"widths": (256, 128)},
        description="Two hidden layers, 256 and 128",
        **MNIST | _SMALL,
    ),
    ModelEntry(
        name="mlp-deep-cifar10",
        options={"widths": (128, 128, 128, 128, 128)},
        description="Five hidden layers of 128",
        **CIFAR10 | _SMALL,
    ),
    *(
        ModelEntry(
            name=f"mlp-mnist-c{c}",
            family="mlp-sweep",
            tier="paper",
            factory=_FACTORY,
            options={"widths": (300, 128, 64), "scale": float(c)},
            task="mnist",
            hessian_batch_size=1024,
            recipe=_SWEEP,
            stages=("init", "final"),
            reference="Zhang et al. 2024, arXiv 2402.16788",
            description=f"Hidden layers of 300, 128 and 64, each layer's output scaled by {c}",
            **OWN,
        )
        for c in range(1, 16)
    ),
)
