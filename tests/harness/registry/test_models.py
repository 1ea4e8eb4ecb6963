"""Every model of the registry is built, run and differentiated twice, on data of its task's shape.

`python tests/harness/registry/test_models.py` writes block_names.json anew; its diff is to be read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from harness import registry, tasks
from harness.estimator.blocks import find_blocks
from harness.estimator.checks import fixed_arithmetic
from harness.registry import ModelEntry

BLOCK_NAMES = Path(__file__).with_name("block_names.json")
IMAGES = {
    "digits": {"num_classes": 10, "image_size": 8, "in_channels": 1},
    "mnist": {"num_classes": 10, "image_size": 28, "in_channels": 1},
    "mnist-barcodes": {"num_classes": 2010, "image_size": 28, "in_channels": 1},
    "cifar10": {"num_classes": 10, "image_size": 32, "in_channels": 3},
    "imagenet": {"num_classes": 1000, "image_size": 224, "in_channels": 3},
}
# Kinds that partition `weights` may hold; docs/protocol.md, Blocks.
KINDS = {
    "embedding",
    "position",
    "query",
    "key",
    "value",
    "attention_output",
    "mlp",
    "conv",
    "head",
    "recurrent",
}
# Softmax regression starts from zero, whatever the seed.
TRAINED = [e for e in registry.entries() if e.tier != "paper" and e.family != "softmax"]


def model_options(entry: ModelEntry) -> dict[str, Any]:
    """Say what the task would say of its data, without the data."""
    if entry.task in IMAGES:
        return IMAGES[entry.task]
    given = {"context": 64} | dict(entry.task_options)
    if entry.task == "gaussian-classes":
        return {"num_classes": 256, "dimension": 128}
    if entry.task == "masked-books" or given.get("tokenizer") == "bpe":
        size = 2048
    elif entry.task == "cornell" or given.get("tokenizer") == "word":
        size = given["vocab_size"]
    elif given.get("tokenizer") == "gpt2":
        size = 50_257
    else:
        size = 65 if entry.task == "tiny-shakespeare" else 97
    return {"vocab_size": size, "context": given["context"]}


def tiny_batch(entry: ModelEntry) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw two random samples and their targets, of the task's shape."""
    options = model_options(entry)
    generator = torch.Generator().manual_seed(0)
    if entry.task in IMAGES:
        side = options["image_size"]
        images = torch.randn(2, options["in_channels"], side, side, generator=generator)
        return images, torch.tensor([1, 3])
    if "dimension" in options:
        return torch.randn(2, options["dimension"], generator=generator), torch.tensor([1, 3])
    tokens = torch.randint(options["vocab_size"], (2, options["context"] + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    out = model(batch[0])
    logits = getattr(out, "logits", out)
    return cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def block_names(entry: ModelEntry) -> list[list[Any]]:
    with torch.device("meta"):
        model = entry.build(model_options(entry), 0)
    return [[b.name, b.kind, list(b.shape)] for b in find_blocks(model, "weights")]


@pytest.mark.parametrize("entry", TRAINED, ids=lambda entry: entry.name)
def test_a_model_is_seeded_and_has_finite_second_derivatives(entry: ModelEntry) -> None:
    model = entry.build(model_options(entry), 1).eval()
    again = entry.build(model_options(entry), 1)
    other = entry.build(model_options(entry), 2)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    assert any(
        not torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )

    num_params = sum(p.numel() for p in model.parameters())
    assert num_params <= (60_000 if entry.tier == "demo" else 500_000)

    parameters = [p for p in model.parameters() if p.requires_grad]
    with fixed_arithmetic(model):
        loss = loss_of(model, tiny_batch(entry))
        assert torch.isfinite(loss)
        gradients = torch.autograd.grad(
            loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        product = torch.autograd.grad(
            sum(g.sum() for g in gradients), parameters, allow_unused=True, materialize_grads=True
        )
    assert all(torch.isfinite(p).all() for p in product)
    assert any(p.any() for p in product)


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda entry: entry.name)
def test_the_blocks_of_a_model_are_those_on_record(entry: ModelEntry) -> None:
    recorded = json.loads(BLOCK_NAMES.read_text())
    assert block_names(entry) == recorded[entry.name], (
        f"the blocks of {entry.name} changed; if that is meant, run python {__file__} and read "
        "the difference: published rows have the old names"
    )


def test_the_record_has_no_model_too_many() -> None:
    assert set(json.loads(BLOCK_NAMES.read_text())) == {e.name for e in registry.entries()}


def test_every_block_is_of_a_kind_that_the_partition_admits() -> None:
    for name, blocks in json.loads(BLOCK_NAMES.read_text()).items():
        assert {kind for _, kind, _ in blocks} <= KINDS, name


@pytest.mark.parametrize("entry", registry.entries("paper"), ids=lambda entry: entry.name)
def test_the_paper_s_blocks_exist(entry: ModelEntry) -> None:
    with torch.device("meta"):
        model = entry.build(model_options(entry), 0)
    assert find_blocks(model, "paper", paper_blocks=entry.paper_blocks)


def test_the_mixer_s_head_is_not_zero() -> None:
    entry = registry.get("mixer-cifar10")
    head = entry.build(model_options(entry), 0).get_parameter("head.weight")
    assert head.std().item() == pytest.approx(0.02, rel=0.2)


def test_mamba_is_that_of_transformers() -> None:
    entry = registry.get("mamba-3x32-books")
    ours = entry.build(model_options(entry), 0).double()
    theirs = transformers.MambaForCausalLM(ours.config).double()
    theirs.load_state_dict(ours.state_dict())
    tokens, targets = tiny_batch(entry)
    losses, products = [], []
    for model in (ours, theirs):
        loss = loss_of(model, (tokens, targets))
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        losses.append(loss.item())
        products.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters))
    # Theirs casts to float32 on the way, whatever the model's dtype.
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)
    for mine, reference in zip(*products, strict=True):
        assert (mine - reference).norm() < 1e-5 * reference.norm()


@pytest.mark.parametrize("name", ["digits", "pydoc"])
def test_embedded_tasks_say_what_these_tests_assume(name: str) -> None:
    entry = next(entry for entry in TRAINED if entry.task == name)
    data = tasks.get(entry.task, **entry.task_options).load(None)
    assert dict(data.model_options) == model_options(entry)


if __name__ == "__main__":
    rows = {entry.name: block_names(entry) for entry in registry.entries()}
    models = ",\n".join(
        f'"{name}": [\n' + ",\n".join(json.dumps(block) for block in blocks) + "\n]"
        for name, blocks in rows.items()
    )
    BLOCK_NAMES.write_text("{\n" + models + "\n}\n")
