"""What the entries of a tier share: recipes and fields.

Small recipes: 400 steps, in 20 to 30 s on two cores. No weight decay, which in SGD is another
function than in AdamW: both minimise the same loss. The ranges of the learning rates are five
rates half a decade apart; the grid is extended where the best lies at an edge.
"""

from __future__ import annotations

from typing import Any

from harness.registry.entry import Recipe
from spectra_db.words import STAGES

# Fields of ModelEntry for networks written here.
OWN: dict[str, Any] = {"source": "harness.registry.networks", "licence": "Apache-2.0"}
# Fields of ModelEntry for networks of libraries; all three are Apache-2.0 or BSD-3-Clause.
TIMM: dict[str, Any] = {"source": "timm", "licence": "Apache-2.0"}
TORCHVISION: dict[str, Any] = {"source": "torchvision", "licence": "BSD-3-Clause"}
TRANSFORMERS: dict[str, Any] = {"source": "transformers", "licence": "Apache-2.0"}

DEMO: dict[str, Any] = {
    "tier": "demo",
    "stages": ("init", "final"),
    "full_stages": ("init", "final"),
}
SMALL: dict[str, Any] = {"tier": "small", "stages": STAGES, "full_stages": ("init", "final")}

# Convolutions train with SGD at larger rates than AdamW's; both ranges have the best inside.
IMAGES = Recipe(
    num_steps=400,
    batch_size=64,
    sgd_lrs=(3e-3, 3e-1),
    adamw_lrs=(3e-4, 3e-2),
    warmup_steps=20,
)
# Clipping and beta2 as in the paper (and nanoGPT) for language; 65,536 tokens for the final loss.
LANGUAGE = Recipe(
    num_steps=400,
    batch_size=16,
    sgd_lrs=(1e-2, 1.0),
    adamw_lrs=(3e-4, 3e-2),
    adamw_betas=(0.9, 0.95),
    clip=1.0,
    warmup_steps=20,
    eval_size=1024,
)

# 10,000 images: 400 steps of 64 go over them two and a half times.
CIFAR10: dict[str, Any] = {
    "task": "cifar10",
    "task_options": {"train_size": 10_000},
    "hessian_batch_size": 128,
    "recipe": IMAGES,
}
MNIST: dict[str, Any] = {
    "task": "mnist",
    "task_options": {"train_size": 10_000, "test_size": 2_000},
    "hessian_batch_size": 128,
    "recipe": IMAGES,
}
# 2,048 tokens of text for the Hessian.
SHAKESPEARE: dict[str, Any] = {
    "task": "tiny-shakespeare",
    "task_options": {"context": 64},
    "hessian_batch_size": 32,
    "recipe": LANGUAGE,
}
BOOKS: dict[str, Any] = {**SHAKESPEARE, "task": "books"}
