"""Vision Transformers and MLP-Mixers."""

from __future__ import annotations

from typing import Any

from harness.registry.entry import ModelEntry, Recipe

_OWN: dict[str, Any] = {"source": "harness.registry.networks", "licence": "Apache-2.0"}
_VIT = "Dosovitskiy et al. 2021, arXiv 2010.11929"

ENTRIES = (
    ModelEntry(
        name="vit-digits",
        family="vit",
        tier="demo",
        factory="harness.registry.networks.transformer:ViT",
        options={"patch_size": 2, "num_layers": 2, "num_heads": 4, "width": 32},
        task="digits",
        hessian_batch_size=256,
        recipe=Recipe(
            num_steps=150,
            batch_size=64,
            sgd_lrs=(3e-3, 3e-1),
            adamw_lrs=(3e-4, 3e-2),
            warmup_steps=10,
            eval_size=1024,
        ),
        stages=("init", "final"),
        full_stages=("init", "final"),
        reference=_VIT,
        description="Two pre-norm layers of width 32 on 2×2 patches of 8×8 digits",
        **_OWN,
    ),
)
