"""MLP-Mixers."""

from __future__ import annotations

from typing import Any

from harness.registry.entry import ModelEntry
from harness.registry.recipes import CIFAR10, MNIST, SMALL, TIMM

_MIXER: dict[str, Any] = {
    "family": "mixer",
    "factory": "harness.registry.networks.libraries:mixer",
    "hessian_batch_size": 64,
    "reference": "Tolstikhin et al. 2021, arXiv 2105.01601",
    **TIMM,
    **SMALL,
}

ENTRIES = (
    ModelEntry(
        name="mixer-cifar10",
        options={"patch_size": 4, "num_blocks": 4, "embed_dim": 64, "mlp_ratio": (0.5, 4.0)},
        description="Four layers of width 64 on 4×4 patches, with a head that is not zero",
        **CIFAR10 | _MIXER,
    ),
    ModelEntry(
        name="mixer-mnist",
        options={"patch_size": 4, "num_blocks": 6, "embed_dim": 48, "mlp_ratio": (0.5, 2.0)},
        description="Six layers of width 48 on 4×4 patches, with a head that is not zero",
        **MNIST | _MIXER,
    ),
)
