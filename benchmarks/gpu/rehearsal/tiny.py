"""The entry that a rehearsal takes for every other one: its data come with Python itself."""

from dataclasses import replace

from harness.registry import get
from harness.registry.entry import Recipe

ENTRIES = (
    replace(
        get("gpt-pydoc"),
        name="tiny-gpt",
        options={"num_layers": 1, "num_heads": 2, "width": 32},
        task_options={"context": 2},
        hessian_batch_size=4,
        num_steps=2,
        full_stages=(),
        recipe=Recipe(
            num_steps=4,
            batch_size=8,
            sgd_lrs=(0.01, 0.1),
            adamw_lrs=(1e-3, 1e-2),
            num_lrs=2,
            extend_grid=False,
            eval_size=64,
        ),
    ),
)
