"""What a reviewer would ask of a model that predicts: does it see the answer, does it learn?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from harness import registry as catalogue
from harness import tasks
from harness.submission import draft, validate
from harness.submission.source import parse_source
from harness.submission.subject import Caution, Failed, Subject
from harness.tasks.base import Data, Task

TEXT = {"task": "pydoc", "task_options": {"context": 6}, "hessian_batch_size": 4}


@pytest.fixture
def subject(registry):
    """Return a maker of subjects: a stranger's network on a task, without other checks."""
    catalogue.entries(registry_dir=registry)

    def make(stranger: str, own: Task | None = None, **values: object) -> Subject:
        fields = {"factory": f"strangers:{stranger}", "options": {}, "name": "stranger"}
        entry = replace(catalogue.get("cnn-digits"), **(fields | values))
        made = Subject(entry, None, 1e9)
        made.task = own or tasks.get(entry.task, **entry.task_options)
        made.data = made.task.load(None)
        made.model = draft.build(entry, made.data).eval()
        made.batch = made.mates = made.task.fixed(made.data, "train", 4)
        return made

    return make


def leaks(subject):
    return validate.leaks.leaks(subject)


@pytest.mark.parametrize("stranger", ["Reader", "NanoGPT", "ZeroStart"])
def test_a_causal_model_sees_no_token_before_its_turn(subject, stranger):
    assert leaks(subject(stranger, **TEXT)) == (
        "the logits don't know the targets; no token of 6 moves logits before it"
    )


@pytest.mark.parametrize(
    ("stranger", "seen"),
    [("unmasked", (0, 1)), ("hidden_leak", (0, 1)), ("BothSides", (0, 1))],
)
def test_a_causal_model_that_sees_later_tokens_is_told_which_position_does(subject, stranger, seen):
    with pytest.raises(
        Failed, match="position {} change with token {}, which comes af".format(*seen)
    ):
        leaks(subject(stranger, **TEXT))


@pytest.mark.parametrize(
    ("stranger", "said"),
    [("BothSides", None), ("unmasked", None), ("Reader", "no position sees the tokens after it")],
)
def test_a_masked_task_asks_for_a_model_that_sees_both_sides(subject, stranger, said):
    task = Blanks()
    made = subject(stranger, task, **TEXT)
    if said is None:
        assert leaks(made).endswith("positions see the tokens on both sides")
    else:
        with pytest.raises(Caution, match=said):
            leaks(made)


class Blanks(tasks.get("pydoc", context=6).__class__):
    """The words of pydoc, to be told from both sides."""

    causal = False

    def __init__(self):
        super().__init__(context=6)


def test_a_masked_task_of_one_s_own_gets_a_network_that_sees_both_sides():
    assert parse_source("transformers:bert", Blanks()).options["head"] == "MaskedLM"


class Peeks(tasks.get("digits").__class__):
    """Gives the model its targets."""

    def logits(self, model, batch):
        logits = model(batch[0])
        return logits + F.one_hot(batch[1], logits.shape[-1])


def test_a_model_that_gets_its_targets_is_found(subject):
    with pytest.raises(Failed, match="the logits change with the targets: forward, or `logits` of"):
        leaks(subject("Encoder", Peeks()))
    assert leaks(subject("Encoder")) == "the logits don't know the targets"


class Weighed(tasks.get("digits").__class__):
    """Gives the model a second tensor of the batch, and the targets are the third."""

    def take(self, data, split, indices, generator):
        images, labels = super().take(data, split, indices, generator)
        return images, labels.float().sqrt(), labels

    def logits(self, model, batch):
        return model(batch[0] * batch[1][:, None, None, None])

    def targets(self, batch):
        return batch[2]


def test_what_else_a_batch_holds_may_be_seen(subject):
    assert leaks(subject("Encoder", Weighed())) == "the logits don't know the targets"


def test_nanogpt_s_logits_are_those_of_all_positions(subject):
    made = subject("NanoGPT", **TEXT)
    logits = made.task.logits(made.model, made.batch)
    assert logits.shape == (4, 6, 97)
    expected = made.model(made.batch[0], targets=made.batch[1])
    torch.testing.assert_close(logits, expected[0])
    torch.testing.assert_close(made.task.loss(made.model, made.batch), expected[1])


class Pairs(Task):
    """Two towers, each to find the partner among those of the batch."""

    name, metric, is_joint = "pairs", "loss", True

    def read(self, root):
        x = torch.randn(40, 2, 5, generator=torch.Generator().manual_seed(0))
        return Data((x,), (x[:0],), "drawn", "", {"num_features": 5})

    def take(self, data, split, indices, generator):
        return (data.part(split)[0][indices],)

    def logits(self, model, batch):
        left, right = F.normalize(model(batch[0]), dim=-1).unbind(1)
        return left @ right.mT

    def loss_of(self, logits, batch):
        return F.cross_entropy(logits, torch.arange(len(logits)))

    def num_terms(self, batch):
        return len(batch[0])


class Apart(Pairs):
    is_joint = False


def towers(subject, task):
    made = subject("Encoder")  # any: what counts comes below
    made.task, made.data = task, task.load(None)
    made.model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    made.batch = made.mates = task.fixed(made.data, "train", 8)
    return made


def test_samples_that_depend_on_each_other_are_accepted_where_the_task_says_so(subject):
    made = towers(subject, Pairs())
    assert "samples depend on each other, as the task says" in validate._deterministic(made)
    hessian = made.hessian(torch.float64)
    product = hessian.products([(0, torch.ones(30, dtype=torch.float64))])[0]
    assert product.any()
    with pytest.raises(Failed, match=r"contrastive\) says so: is_joint = True"):
        validate._deterministic(towers(subject, Apart()))


def test_a_batch_of_samples_that_depend_on_each_other_is_never_cut(subject):
    made = towers(subject, Pairs())
    assert made.task.count_of([made.batch]) == [8]
    assert Apart().count_of([made.batch])(made.batch) == 8


class Scattered(tasks.get("digits").__class__):
    def loss_of(self, logits, batch):
        return F.cross_entropy(logits, batch[1], reduction="none")


def test_a_loss_that_is_no_mean_is_answered_with_the_reduction(subject):
    with pytest.raises(Failed, match=r"returns \(4,\); .* a scalar tensor: reduction='mean'"):
        validate._forward(subject("Encoder", Scattered()))


@pytest.mark.parametrize(
    ("stranger", "values", "said"),
    [
        ("OneSize", {}, r"are 8 × 8, and the task's option image_size resizes them"),
        ("LookupTooSmall", TEXT, "an embedding is too small: tokens are below vocab_size 97"),
    ],
)
def test_a_forward_pass_of_other_sizes_is_answered_with_the_remedy(subject, stranger, values, said):
    with pytest.raises(Failed, match=said):
        validate._forward(subject(stranger, **values))


def test_a_network_that_starts_at_zero_is_checked_after_two_steps_with_a_warning(subject):
    values = TEXT | {
        "stages": ("init", "p10", "final"),
        "recipe": catalogue.get("gpt-pydoc").recipe,
    }
    made = subject("ZeroStart", **values)
    with pytest.raises(Caution, match=r"no heterogeneity at init, that of p10 .*7 of 7 blocks"):
        validate.products.second_derivatives(made)
    assert made.model.head.weight.any()
    untrained = subject("ZeroStart", **TEXT, recipe=None, stages=("init",), full_stages=())
    with pytest.raises(Failed, match=r"all but the head.* or name later stages, too"):
        validate.products.second_derivatives(untrained)


def test_the_estimator_s_advice_is_turned_into_an_author_s():
    text = "x: pass norm_mode='eval', or write the mean and the variance out"
    assert validate._for_authors(text) == "x: write the mean and the variance out"


class Rolls(tasks.get("digits").__class__):
    """Has dropout that stays on."""

    def logits(self, model, batch):
        return F.dropout(model(batch[0]))


def test_randomness_is_not_taken_for_a_leak(subject):
    with pytest.raises(Caution, match="two passes differ, so what the logits know can't be told"):
        leaks(subject("Encoder", Rolls()))
