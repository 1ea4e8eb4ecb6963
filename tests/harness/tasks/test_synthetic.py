from __future__ import annotations

import math

import pytest
import torch

from harness import tasks
from harness.errors import UserError
from harness.registry.networks.mlp import Softmax
from harness.tasks.base import target_entropy

SIZES = {"num_classes": 10, "dimension": 30, "num_samples": 200}


def test_balanced_labels_are_equally_frequent() -> None:
    task = tasks.get("gaussian-classes", **SIZES | {"num_samples": 203})
    labels = task.load().train[1]
    assert len(labels) == 203
    assert set(labels.bincount().tolist()) == {20, 21}


def test_zipf_labels_are_as_frequent_as_one_over_their_rank() -> None:
    sizes = SIZES | {"num_samples": 20_000, "dimension": 1}
    labels = tasks.get("gaussian-classes", frequencies="zipf", **sizes).load().train[1]
    harmonic = sum(1 / k for k in range(1, 11))
    expected = [20_000 / k / harmonic for k in range(1, 11)]
    assert labels.bincount().tolist() == pytest.approx(expected, abs=10)


def test_every_class_has_a_sample() -> None:
    sizes = {"num_classes": 100, "dimension": 2, "num_samples": 100}
    labels = tasks.get("gaussian-classes", frequencies="zipf", **sizes).load().train[1]
    assert labels.bincount().tolist() == [1] * 100


def test_inputs_have_the_mean_and_do_not_depend_on_the_labels() -> None:
    flat, steep = (
        tasks.get("gaussian-classes", frequencies=frequencies, mean=2, **SIZES).load()
        for frequencies in ("balanced", "zipf")
    )
    assert flat.train[0].equal(steep.train[0])
    assert flat.train[0].mean() == pytest.approx(2, abs=5 / math.sqrt(6_000))
    assert flat.train[0].std() == pytest.approx(1, abs=0.05)
    other = tasks.get("gaussian-classes", mean=2, seed=1, **SIZES).load()
    assert len({flat.checksum, steep.checksum, other.checksum}) == 3


def test_the_regression_begins_at_the_uniform_answer_with_a_gradient() -> None:
    task = tasks.get("gaussian-classes", frequencies="zipf", **SIZES)
    data = task.load()
    batch = task.fixed(data, "train", 200)
    model = Softmax(**data.model_options)
    loss = task.loss(model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(10), rel=1e-6)
    assert target_entropy(task, batch) < loss.item() - 0.2
    frequencies = batch[1].bincount() / 200
    torch.testing.assert_close(model.head.bias.grad, 0.1 - frequencies)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequencies": "uniform"}, "frequencies is 'uniform'; choose balanced or zipf"),
        ({"num_samples": 9, "num_classes": 10}, "9 samples are too few"),
        ({"num_classes": 1}, "num_classes is 1"),
    ],
)
def test_labels_that_can_not_be_are_refused(options, message) -> None:
    with pytest.raises(UserError, match=message):
        tasks.get("gaussian-classes", **options)
