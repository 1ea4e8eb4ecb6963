"""Decoder-only language models."""

from __future__ import annotations

from typing import Any

from harness.registry.entry import ModelEntry, Recipe

_OWN: dict[str, Any] = {"source": "harness.registry.networks", "licence": "Apache-2.0"}
_GPT2 = "Radford et al. 2019, Language Models are Unsupervised Multitask Learners"

ENTRIES = (
    ModelEntry(
        name="gpt-pydoc",
        family="gpt",
        tier="demo",
        factory="harness.registry.networks.transformer:GPT",
        options={"num_layers": 2, "num_heads": 4, "width": 32},
        task="pydoc",
        task_options={"context": 32},
        hessian_batch_size=64,
        recipe=Recipe(
            num_steps=150,
            batch_size=32,
            sgd_lrs=(1e-2, 1.0),
            adamw_lrs=(1e-3, 1e-1),
            adamw_betas=(0.9, 0.95),
            clip=1.0,
            warmup_steps=10,
            eval_size=256,
        ),
        stages=("init", "final"),
        full_stages=("init", "final"),
        reference=_GPT2,
        description="Two layers of width 32 on the characters of Python's documentation",
        **_OWN,
    ),
)
