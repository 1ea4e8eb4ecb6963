"""Every step of every entry: its real architecture and real data, on batches of two samples.

What takes long at its size is made there of shapes alone, and computed with less width.
"""

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
from tests.harness.registry.test_models import IMAGES, model_options

# One of the sweep stands for all: they differ in a factor.
ENTRIES = [
    entry
    for entry in registry.entries()
    if entry.status == "ok"
    and entry.recipe is not None  # the others have trials
    and (entry.family != "mlp-sweep" or entry.name == "mlp-mnist-c3")
]
# Options of the network, or of the task, with which they take a second or two.
LARGE = {
    "gpt2-books": ({"num_heads": 2, "width": 8}, {}),
    "gpt2-wikitext": ({"num_heads": 2, "width": 8}, {}),
    "mixer-imagenet": ({"embed_dim": 16}, {}),
    "vgg16-imagenet": ({}, {"image_size": 32}),
    "vit-base-imagenet": ({"embed_dim": 24, "num_heads": 3}, {}),
}


def of_few_data(entry: ModelEntry) -> ModelEntry:
    """Return an entry on few images, or, of the paper's size, on short sequences."""
    few: dict[str, int] = {}
    if entry.task in IMAGES:
        few = {"train_size": 8} | ({} if entry.task == "imagenet" else {"test_size": 2})
    elif not entry.grid_recipe and "context" in entry.task_options:
        few = {"context": 64}
    return replace(entry, task_options={**entry.task_options, **few})


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_large_network_has_second_derivatives_of_its_parameters_shapes(
    name: str, data_root: Path
) -> None:
    entry = of_few_data(registry.get(name))
    task = tasks.get(entry.task, **entry.task_options)
    data = task.load(data_root)
    with torch.device("meta"):
        model = entry.build(data.model_options, 1).eval()
        loss = task.loss(model, tuple(t.to("meta") for t in task.fixed(data, "train", 2)))
    assert loss.shape == ()
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    products = torch.autograd.grad(sum(g.sum() for g in gradients), parameters)
    assert [p.shape for p in products] == [p.shape for p in parameters]


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_trains_keeps_its_stages_and_has_a_hessian(
    entry: ModelEntry, data_root: Path, tmp_path: Path
) -> None:
    assert isinstance(entry.recipe, Recipe)
    entry = of_few_data(entry)
    options, task_options = LARGE.get(entry.name, ({}, {}))
    recipe = replace(entry.recipe, num_steps=1, batch_size=2, warmup_steps=0, eval_size=2)
    tiny = replace(
        entry,
        options={**entry.options, **options},
        task_options={**entry.task_options, **task_options},
        recipe=recipe,
        stages=("init", "final"),
        full_stages=(),
        pretrained=None,
        hessian_batch_size=2,
        microbatch_size=None,
    )
    task = tasks.get(tiny.task, **tiny.task_options)
    data = task.load(data_root)
    if not task_options:
        assert dict(data.model_options) == model_options(tiny)
    for optimizer, rates in (("sgd", recipe.sgd_lrs), ("adamw", recipe.adamw_lrs)):
        if entry.grid_recipe:  # the paper's systems at their size are not
            run = train(
                tiny, data, optimizer=optimizer, lr=rates[0], seed=1, checkpoint_dir=tmp_path
            )
            assert run.final_loss != run.init_loss or run.diverged

    stage = "final" if entry.grid_recipe else "init"
    problem = load_problem(tiny, stage, 1, data_root=data_root, checkpoint_dir=tmp_path)
    checkpoint_path(tmp_path, tiny.name, 1, "final").unlink(missing_ok=True)
    assert problem.step == (1 if entry.grid_recipe else 0)
    block = min(problem.blocks(entry.partition), key=lambda block: block.num_params)
    with opened(problem.objective, [block], Settings(device="cpu")) as hessian:
        # Layer norms are blind to a constant, such as ones would add to an embedding.
        vector = torch.randn(block.num_params, generator=torch.Generator().manual_seed(0))
        [product] = hessian.products([(0, vector)])
    assert product.isfinite().all()
    assert product.any()
