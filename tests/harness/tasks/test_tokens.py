"""Losses of some tokens, against those of all logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from harness import tasks
from harness.estimator.blocks import find_blocks
from harness.estimator.cost import forecast
from harness.estimator.objective import Objective, SplitLoss
from harness.estimator.settings import Settings
from harness.estimator.spectrum import estimate_spectra
from harness.registry.networks import libraries
from harness.tasks.base import IGNORED
from harness.tasks.masked import MaskedBooks


def masked_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    return libraries.bert(100, 7, intermediate_size=8, **sizes).eval()


class Shifted(nn.Module):
    """A model of someone's own, with a shift of the logits by position that begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.shift = masked_model(), nn.Parameter(torch.zeros(7, 1))

    def get_output_embeddings(self) -> nn.Module:
        return self.body.get_output_embeddings()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.body(tokens).logits
        return logits + self.shift[: logits.shape[1]]


def few_targets(num_sequences: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets at 1 to 3 of the positions, of another number in each sequence."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(100, (num_sequences, length), generator=g)
    targets = torch.full_like(tokens, IGNORED)
    for row, target in enumerate(targets):
        places = torch.randperm(length, generator=g)[: 1 + row % 3]
        target[places] = torch.randint(100, (len(places),), generator=g)
    return tokens, targets


def seen_by_head(model: nn.Module) -> list[torch.Size]:
    """Return a list to which the shapes are added of what the last layer is given."""
    shapes: list[torch.Size] = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    return shapes


@pytest.mark.parametrize(("build", "is_known"), [(masked_model, True), (Shifted, False)])
@pytest.mark.parametrize("num_sequences", [1, 5, 7])
def test_the_last_layer_of_a_known_model_runs_for_the_targets_alone(
    build, is_known, num_sequences
) -> None:
    task, batch = tasks.get("masked-books", context=7), few_targets(num_sequences, 7)
    model = build().double()
    outputs, most = task.outputs(model, batch), min(num_sequences, 3)
    assert outputs.shape == (num_sequences, most, 100)
    expected = task.loss(model, batch).item()
    assert task.criterion(outputs, batch).item() == pytest.approx(expected, rel=1e-12)
    seen = seen_by_head(model)
    assert task.outputs(model, batch).equal(outputs)
    assert seen == [(num_sequences, most if is_known else 7, 6)]


@pytest.mark.parametrize("build", [masked_model, Shifted])
def test_what_is_seen_of_one_batch_holds_for_others(build) -> None:
    """A batch of targets alone tells nothing, and neither does one without."""
    task, model, few = tasks.get("masked-books", context=7), build(), few_targets(7, 7)
    tokens = torch.arange(49).view(7, 7)
    none = (tokens, torch.full_like(tokens, IGNORED))
    outputs = task.outputs(model, none)
    with pytest.raises(ValueError, match="every target is -100"):
        task.criterion(outputs, none)
    for batch in ((tokens, tokens), few, (tokens, tokens), few):
        found = task.criterion(task.outputs(model, batch), batch).item()
        assert found == pytest.approx(task.loss(model, batch).item(), rel=1e-5)


def test_logits_that_are_not_one_row_a_token_are_refused() -> None:
    task, (tokens, targets) = tasks.get("masked-books", context=7), few_targets(4, 7)
    targets[:, 3:] = IGNORED  # all are within what the model gives
    targets[:, 0] = 1
    model = nn.Sequential(nn.Embedding(100, 8), nn.AvgPool2d((2, 1)))
    with pytest.raises(ValueError, match=r"shape \(4, 3, 8\), the targets \(4, 7\)"):
        task.outputs(model, (tokens, targets))


def test_a_head_that_begins_at_zero_is_seen_by_its_gradient() -> None:
    task, batch, model = tasks.get("masked-books", context=7), few_targets(4, 7), masked_model()
    head = model.get_output_embeddings()
    nn.init.zeros_(head.weight)
    task.outputs(model, batch)
    nn.init.normal_(head.weight)
    found = task.criterion(task.outputs(model, batch), batch).item()
    assert found == pytest.approx(task.loss(model, batch).item(), rel=1e-6)


class Mixed(nn.Module):
    """A last layer that adds some of the mean over the tokens, a share that begins at zero."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.share = inner, nn.Parameter(torch.zeros(()))
        self.decoder = inner.decoder  # where transformers look for it

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.inner(hidden)
        return logits + self.share * logits.mean(1, keepdim=True)


def with_shift(model: nn.Module) -> None:
    shift = nn.Parameter(torch.zeros(7, 100))
    model.register_parameter("shift", shift)

    def hook(_, __, output):
        output.logits = output.logits + shift[: output.logits.shape[1]]

    model.register_forward_hook(hook)


def with_mixed(model: nn.Module) -> None:
    model.cls.predictions = Mixed(model.cls.predictions)


def with_few_words(model: nn.Module) -> None:
    with_mixed(model)
    nn.init.ones_(model.cls.predictions.share)
    model.cls.predictions.decoder.bias.data[10:] = -1e4


@pytest.mark.parametrize("change", [with_shift, with_mixed, with_few_words])
def test_what_is_changed_in_a_known_model_is_seen(change) -> None:
    model, batch = masked_model(), few_targets(5, 7)
    change(model)
    task = tasks.get("masked-books", context=7)
    task.outputs(model, batch)
    seen = seen_by_head(model)
    outputs = task.outputs(model, batch)
    assert seen == [(5, 7, 6)]
    assert task.criterion(outputs, batch).item() == pytest.approx(task.loss(model, batch).item())


def test_logits_of_ones_own_are_those_of_all_tokens() -> None:
    class Centred(MaskedBooks):
        """Less their mean over the sequence."""

        def logits(self, model, batch):
            logits = super().logits(model, batch)
            return logits - logits.mean(1, keepdim=True)

    model, batch = masked_model(), few_targets(5, 7)
    for task in (tasks.get("masked-books", context=7), Centred(context=7)):
        found = task.criterion(task.outputs(model, batch), batch).item()
        assert found == pytest.approx(task.loss(model, batch).item(), rel=1e-6)


def test_nothing_is_concluded_in_training() -> None:
    task, batch, model = tasks.get("masked-books", context=7), few_targets(4, 7), masked_model()
    task.outputs(model.train(), batch)
    model.eval()
    task.outputs(model, batch)
    seen = seen_by_head(model)
    task.outputs(model, batch)
    assert seen == [(4, 2 + 1, 6)]


def test_the_sample_of_most_targets_tells_what_a_spectrum_costs() -> None:
    task, (tokens, targets) = tasks.get("masked-books", context=7), few_targets(8, 7)
    targets[:, 1:] = IGNORED
    targets[:, 0] = 1
    targets[-1, :6] = 1
    costs = []
    for batch in ((tokens, targets), (tokens.flip(0), targets.flip(0))):
        loss = SplitLoss(task.outputs, task.criterion)
        objective = Objective(masked_model(), loss, [batch], task.num_terms)
        costs.append(forecast(objective, find_blocks(objective.model), Settings()))
    assert costs[0] == costs[1]
    # And a batch that begins with samples of none has a cost.
    targets[:2] = IGNORED
    assert (
        estimate_spectra(
            masked_model(), loss, [(tokens, targets)], num_steps=2, batch_weights=task.num_terms
        )["status"]
        .eq("ok")
        .all()
    )


def test_a_loss_of_ones_own_gets_all_logits() -> None:
    class Late(MaskedBooks):
        """The last position counts alone."""

        def loss_of(self, logits, batch):
            return functional.cross_entropy(logits[:, -1], batch[1][:, -1].clamp_min(0))

    task, batch, model = Late(context=7), few_targets(4, 7), masked_model()
    outputs = task.outputs(model, batch)
    assert outputs.equal(model(batch[0]).logits)
    assert task.criterion(outputs, batch).equal(task.loss(model, batch))


@pytest.mark.parametrize("build", [masked_model, Shifted])
@pytest.mark.parametrize("options", [{}, {"gram": True}, {"operator": "ggn"}], ids=str)
def test_the_spectrum_of_a_loss_of_few_tokens_is_that_of_the_whole_loss(build, options) -> None:
    task, batch = tasks.get("masked-books", context=7), few_targets(5, 7)
    how = {"dtype": "float64", "batch_weights": task.num_terms, **options}
    batches = [tuple(part[:3] for part in batch), tuple(part[3:] for part in batch)]
    some, every = (
        estimate_spectra(build().eval(), loss, batches, **how)
        for loss in (SplitLoss(task.outputs, task.criterion), SplitLoss(task.logits, task.loss_of))
    )
    for found, expected in zip(some["nodes"], every["nodes"], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
