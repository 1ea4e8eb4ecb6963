from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

from harness import tasks
from harness.estimator import find_blocks
from harness.paper import causal, result, sections
from harness.registry import get
from harness.training import train
from harness.training.gap import relative_gap
from harness.training.loop import _DATA_SEED, evaluate
from harness.training.schedule import learning_rate


def short(name: str, num_steps: int = 8):
    """Return a demo entry with few steps, and its data."""
    entry = get(name)
    recipe = replace(entry.recipe, num_steps=num_steps, warmup_steps=2, eval_size=32)
    entry = replace(entry, recipe=recipe)
    return entry, tasks.get(entry.task, **entry.task_options).load()


@pytest.mark.parametrize("name", ["cnn-digits", "gpt-pydoc"])  # without and with clipping
def test_without_factors_it_is_the_training_loop_to_the_last_bit(name):
    entry, data = short(name)
    run = train(entry, data, optimizer="sgd", lr=0.1, seed=3)
    assert causal.train_blockwise(entry, data, lr=0.1, seed=3, factors={}) == (
        run.init_loss,
        run.final_loss,
    )


def test_a_rate_per_block_is_sgd_on_reparametrised_blocks():
    """Train u with w = s u by one rate; the loss must end where rates s² take w."""
    entry, data = short("cnn-digits")
    task, recipe = tasks.get(entry.task), entry.recipe
    model = entry.build(data.model_options, 3)
    blocks = find_blocks(model)
    factors = {b.name: f for b, f in zip(blocks, (4.0, 0.25, 1.5, 0.5), strict=True)}
    roots = {b.name: factors[b.name] ** 0.5 for b in blocks}
    roots |= {b.name.replace("weight", "bias"): roots[b.name] for b in blocks}
    names = [n for n, _ in model.named_parameters()]
    u = {n: (p.detach() / roots[n]).requires_grad_() for n, p in model.named_parameters()}
    momentum = {n: torch.zeros_like(p) for n, p in u.items()}
    batches = task.batches(data, recipe.batch_size, torch.Generator().manual_seed(3 + _DATA_SEED))
    for step in range(recipe.num_steps):
        rate = learning_rate(
            step, peak=0.05, warmup_steps=recipe.warmup_steps, num_steps=recipe.num_steps,
            schedule=recipe.schedule,
        )  # fmt: skip
        images, labels = next(batches)
        w = {n: roots[n] * u[n] for n in names}
        loss = torch.nn.functional.cross_entropy(
            torch.func.functional_call(model, w, (images,)), labels
        )
        grads = dict(zip(names, torch.autograd.grad(loss, [u[n] for n in names]), strict=True))
        with torch.no_grad():
            for n in names:
                momentum[n].mul_(0.9).add_(grads[n])
                u[n].sub_(rate * momentum[n])
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(roots[n] * u[n])
    expected, _ = evaluate(task, model, task.fixed(data, "train", recipe.eval_size), 256)
    _, found = causal.train_blockwise(entry, data, lr=0.05, seed=3, factors=factors)
    assert found == pytest.approx(expected, rel=1e-5)
    _, plain = causal.train_blockwise(entry, data, lr=0.05, seed=3, factors={})
    assert plain != pytest.approx(expected, rel=1e-4)


def test_a_diverged_run_ends_at_its_initial_loss():
    entry, data = short("cnn-digits")
    first, last = causal.train_blockwise(entry, data, lr=1e6, seed=1, factors={})
    assert first == last


def test_factors_equalise_what_the_blocks_curvatures_become():
    curvatures = pd.Series({"a": 0.01, "b": 1.0, "c": 100.0, "zero": 0.0})
    for power in (0.5, 1.0):
        factors = causal.block_factors(curvatures, power)
        in_u = [curvatures[n] * factors[n] for n in "abc"]
        assert max(in_u) / min(in_u) == pytest.approx(1e4 ** (1 - power))
        assert factors["zero"] == 1


def test_shares_of_a_closed_gap():
    sgd, adam, init = [2.0, 2.2], [1.0, 1.2], [5.0, 5.2]
    assert causal.closed_share(adam, sgd, adam)["value"] == pytest.approx(1)
    assert causal.closed_share(sgd, sgd, adam) == {"value": 0, "error": 0}
    assert causal.closed_share([1.5, 1.7], sgd, adam)["value"] == pytest.approx(0.5)
    assert relative_gap(sgd, adam, init)[0] == pytest.approx(0.25)


def test_what_was_measured_is_kept_and_drawn_and_the_rest_named(tmp_path):
    gap = {"value": 0.1, "error": 0.01}
    record = {"model": "vit-cifar10", "stage": "init", "power": 0.5, "spread": 0.5, "lr": 0.1,
              "gap": gap, "sgd_gap": gap, "closed": {"value": 0.0, "error": 0.1}}  # fmt: skip
    result.write_json(tmp_path / "paper" / "causal" / "vit-cifar10-init-p0.5.json", record)
    found = sections.run("causal", None, tmp_path)
    assert list(found.values["models"]) == ["vit-cifar10"]
    assert "vit-cifar10-init-p1" in found.missing
    assert (tmp_path / "paper" / "causal.svg").is_file()
    assert "vit-cifar10 (gap 0.10) init, p = 0.5: 0% ± 10%" in (tmp_path / "paper.md").read_text()
