from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.registry.entry import ModelEntry, Recipe

sys.path.append(str(Path(__file__).parent))  # for factories named `small_networks:...`


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        num_steps=20,
        batch_size=32,
        sgd_lrs=(0.01, 1.0),
        adamw_lrs=(1e-3, 1e-1),
        warmup_steps=2,
        eval_size=128,
    )


@pytest.fixture
def make_entry(recipe: Recipe) -> Callable[..., ModelEntry]:
    def make(factory: str = "cnn", task: str = "digits", **changes: object) -> ModelEntry:
        fields: dict[str, object] = {
            "name": "tiny",
            "family": "test",
            "tier": "demo",
            "factory": f"small_networks:{factory}",
            "options": {},
            "task": task,
            "task_options": {},
            "hessian_batch_size": 50,
            "microbatch_size": 20,
            "recipe": recipe,
            "stages": ("init", "p50", "final"),
            "num_probes": 1,
            "num_steps": 5,
            "paper_blocks": None,
            "full_stages": (),
            "source": "own",
            "reference": "none",
            "licence": "none",
            "description": "a network for tests",
        }
        return ModelEntry(**{**fields, **changes})  # type: ignore[arg-type]

    return make
