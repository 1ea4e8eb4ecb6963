"""MLP-Mixers."""

from __future__ import annotations

from harness.registry.entry import ModelEntry
from harness.registry.recipes import CIFAR10, MNIST, SMALL, TIMM

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
        options={"patch_size": 4, "num_blocks": 6, "embed_dim": 48, "mlp_ratio": (0.5, 2.0)},
        reference=_MIXER,
        description="Six layers of width 48 on 4×4 patches, with a head that is not zero",
        **TIMM,
        **SMALL,
        **MNIST | {"hessian_batch_size": 64},
    ),
)
