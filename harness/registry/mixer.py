"""MLP-Mixers."""

from __future__ import annotations

from dataclasses import replace

from harness.registry.entry import ModelEntry
from harness.registry.recipes import CIFAR10, IMAGES, MNIST, SMALL, TIMM

_MIXER = "Tolstikhin et al. 2021, arXiv 2105.01601"
_FACTORY = "harness.registry.networks.libraries:mixer"

ENTRIES = (
    ModelEntry(
        name="mixer-cifar10",
        family="mixer",
        factory=_FACTORY,
        options={"patch_size": 4, "num_blocks": 4, "embed_dim": 64, "mlp_ratio": (0.5, 4.0)},
        reference=_MIXER,
        description="Four layers of width 64 on 4×4 patches, with a head that is not zero",
        **TIMM,
        **SMALL,
        **CIFAR10 | {"hessian_batch_size": 64},
    ),
    ModelEntry(
        name="mixer-mnist",
        family="mixer",
        factory=_FACTORY,
        options={"patch_size": 7, "num_blocks": 8, "embed_dim": 48, "mlp_ratio": (1.0, 2.0)},
        reference=_MIXER,
        description="Eight layers of width 48 on 7×7 patches, with a head that is not zero",
        **TIMM,
        **SMALL,
        **MNIST | {"recipe": replace(IMAGES, batch_size=128)},
    ),
)
