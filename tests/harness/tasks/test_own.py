"""What authors of tasks and networks of their own return, and what is listed of ours."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from harness import tasks
from harness.errors import UserError
from harness.tasks.base import Data, Task

X = torch.zeros(2, 1)


def test_every_task_is_listed_with_what_it_predicts_and_the_terms_of_its_data():
    rows = {row["name"]: row for row in tasks.listing()}
    assert list(rows) == tasks.names()
    assert all(all(row.values()) for row in rows.values())
    predicts = {name: row["predicts"] for name, row in rows.items()}
    expected = {"mnist": "class", "books": "next token", "sft": "next token"}
    expected |= {"cornell": "masked token", "masked-books": "masked token"}
    assert {name: predicts[name] for name in expected} == expected
    assert "CC BY" in rows["digits"]["terms"]
    data = tasks.get("digits").load()
    train, test = len(data.train[0]), len(data.test[0])
    assert rows["digits"]["size"].startswith(f"{train:,} + {test} of 8 × 8")


class Careless(Task):
    """A task whose `read` returns what it should not."""

    name, metric = "careless", "loss"
    given: ClassVar[object] = None

    def read(self, root):
        return self.given

    def take(self, data, split, indices, generator):
        return data.part(split)

    def loss_of(self, logits, batch):
        return logits.mean()

    def num_terms(self, batch):
        return 1


def loaded(given):
    return type("Careless", (Careless,), {"given": given})().load()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train": X}, r"`read` of task 'careless' returned a dict; it must return .*Data\(train,"),
        (Data(X, (X,), "", "", {}), "gives train as Tensor; it must be a tuple of tensors"),
        (Data((X,), ([1],), "", "", {}), "gives test as tuple; it must be a tuple of tensors"),
        (Data((X,), (X,), "", "", ["vocab_size"]), "gives model_options as list; it must be a dic"),
    ],
)
def test_data_of_another_form_are_answered_with_the_form(given, said):
    with pytest.raises(UserError, match=said):
        loaded(given)


def test_the_identity_of_data_is_that_of_their_bytes_whatever_read_says():
    def checksum(x):
        return loaded(Data((x,), (x[:0],), "", "mine", {})).checksum

    assert checksum(X) == checksum(X.clone()) != checksum(X + 1)


class Answers(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self, x):
        return self.out


@pytest.mark.parametrize(
    "wrap", [lambda x: {"logits": x}, lambda x: (x, None), lambda x: (x, x.sum()), lambda x: x]
)
def test_logits_are_taken_out_of_a_dict_and_of_a_pair_with_a_loss(wrap):
    logits, batch = torch.ones(2, 3), (torch.zeros(2, 4), torch.zeros(2))
    assert tasks.get("digits").logits(Answers(wrap(logits)), batch) is logits


def test_a_pair_of_other_things_is_left_for_the_author_to_take_apart():
    pair = (torch.ones(2, 3), torch.ones(2, 3))
    assert tasks.get("digits").logits(Answers(pair), (torch.zeros(2, 4),)) is pair
