"""Vision Transformers."""

from __future__ import annotations

from typing import Any

from harness.registry.entry import ModelEntry, Recipe
from harness.registry.recipes import CIFAR10, DEMO, MNIST, OWN, SMALL, TIMM

_VIT = "Dosovitskiy et al. 2021, arXiv 2010.11929"
_OURS: dict[str, Any] = {"factory": "harness.registry.networks.transformer:ViT", **OWN}
# Many blocks on many patches: 64 images keep a spectrum under two core-minutes.
_SMALL: dict[str, Any] = {"family": "vit", "hessian_batch_size": 64, **SMALL}
_WIDTH_48 = {"patch_size": 4, "num_layers": 3, "num_heads": 4, "width": 48}

ENTRIES = (
    ModelEntry(
        name="vit-digits",
        family="vit",
        options={"patch_size": 2, "num_layers": 2, "num_heads": 4, "width": 32},
        task="digits",
        hessian_batch_size=128,
        recipe=Recipe(
            num_steps=300,
            batch_size=64,
            sgd_lrs=(1e-2, 1.0),
            adamw_lrs=(3e-4, 3e-2),
            warmup_steps=10,
            eval_size=1024,
        ),
        reference=_VIT,
        description="Two pre-norm layers of width 32 on 2×2 patches of 8×8 digits",
        **_OURS,
        **DEMO,
    ),
    ModelEntry(
        name="vit-cifar10",
        options=_WIDTH_48,
        reference=_VIT,
        description="Three pre-norm layers of width 48 on 4×4 patches",
        **_OURS,
        **CIFAR10 | _SMALL,
    ),
    ModelEntry(
        name="vit-postnorm-cifar10",
        options={**_WIDTH_48, "pre_norm": False},
        reference=f"{_VIT}; norms as in Vaswani et al. 2017, arXiv 1706.03762",
        description="Three post-norm layers of width 48 on 4×4 patches",
        **_OURS,
        **CIFAR10 | _SMALL,
    ),
    ModelEntry(
        name="vit-cls-mnist",
        factory="timm.models.vision_transformer:VisionTransformer",
        options={
            "img_size": 28,
            "in_chans": 1,
            "patch_size": 7,
            "embed_dim": 64,
            "depth": 6,
            "num_heads": 4,
        },
        reference=_VIT,
        description="Six pre-norm layers of width 64 on 7×7 patches, read out at a class token",
        **TIMM,
        **MNIST | _SMALL,
    ),
)
