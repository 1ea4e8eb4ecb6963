"""Every step of every entry: its real architecture and real data, on batches of two samples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness import registry, tasks
from harness.estimator.operators import opened
from harness.estimator.settings import Settings
from harness.registry import ModelEntry, Recipe
from harness.training import load_problem, train
from harness.training.stages import checkpoint_path

# One of the sweep stands for all: they differ in a factor.
ENTRIES = [
    entry
    for entry in registry.entries()
    if entry.status == "ok"
    and entry.recipe is not None  # the others have trials
    and (entry.family != "mlp-sweep" or entry.name == "mlp-mnist-c3")
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_trains_keeps_its_stages_and_has_a_hessian(
    entry: ModelEntry, data_root: Path, tmp_path: Path
) -> None:
    assert isinstance(entry.recipe, Recipe)
    recipe = replace(entry.recipe, num_steps=1, batch_size=2, warmup_steps=0, eval_size=2)
    tiny = replace(
        entry,
        recipe=recipe,
        stages=("init", "final"),
        full_stages=(),
        pretrained=None,
        hessian_batch_size=2,
        microbatch_size=None,
    )
    if not entry.trains and "context" in entry.task_options:  # as the others, in seconds
        tiny = replace(tiny, task_options={**entry.task_options, "context": 64})
    task = tasks.get(tiny.task, **tiny.task_options)
    data = task.load(data_root)
    if task.metric == "accuracy":  # images are scored on the whole test split
        data = replace(data, test=tuple(tensor[:2] for tensor in data.test))
    for optimizer, rates in (("sgd", recipe.sgd_lrs), ("adamw", recipe.adamw_lrs)):
        if entry.trains:  # the paper's systems at their size are not
            run = train(
                tiny, data, optimizer=optimizer, lr=rates[0], seed=1, checkpoint_dir=tmp_path
            )
            assert run.final_loss != run.init_loss or run.diverged

    stage = "final" if entry.trains else "init"
    problem = load_problem(tiny, stage, 1, data_root=data_root, checkpoint_dir=tmp_path)
    checkpoint_path(tmp_path, tiny.name, 1, "final").unlink(missing_ok=True)
    assert problem.step == (1 if entry.trains else 0)
    block = min(problem.blocks(entry.partition), key=lambda block: block.num_params)
    with opened(problem.objective, [block], Settings(device="cpu")) as hessian:
        [product] = hessian.products([(0, torch.ones(block.num_params))])
    assert product.isfinite().all()
    assert product.any()
