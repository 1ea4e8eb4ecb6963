"""Convolutional networks."""

from __future__ import annotations

from typing import Any

from harness.registry.entry import ModelEntry, Recipe

_NETWORKS = "harness.registry.networks.convolutional"
_VGG = "Simonyan & Zisserman 2015, arXiv 1409.1556"
_OWN: dict[str, Any] = {"source": "harness.registry.networks", "licence": "Apache-2.0"}

ENTRIES = (
    ModelEntry(
        name="cnn-digits",
        family="cnn",
        tier="demo",
        factory=f"{_NETWORKS}:cnn",
        options={"widths": (16, 32, 32)},
        task="digits",
        hessian_batch_size=256,
        recipe=Recipe(
            num_steps=150,
            batch_size=64,
            sgd_lrs=(1e-3, 1e-1),
            adamw_lrs=(3e-4, 3e-2),
            warmup_steps=10,
            eval_size=1024,
        ),
        stages=("init", "final"),
        full_stages=("init", "final"),
        reference=_VGG,
        description="Three 3×3 convolutions with ReLU on 8×8 digits",
        **_OWN,
    ),
)
