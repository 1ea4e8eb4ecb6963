from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from harness import registry as catalogue
from harness.cli import main
from harness.estimator.checks import fixed_arithmetic
from harness.estimator.hessian import BlockHessian
from harness.registry import ModelEntry
from harness.submission import locate, products
from harness.submission import validate as checks
from harness.submission.subject import Caution
from harness.submission.validate import Finding, validate
from tests.harness.estimator.models import cross_entropy, problem

HESSIAN = ("second derivatives", "cost", "symmetric", "differences", "dense")


@pytest.fixture
def entry(registry) -> Callable[..., ModelEntry]:
    """Return a maker of entries of the strangers' networks."""
    catalogue.entries(registry_dir=registry)  # their folder is searched from now on

    def make(stranger: str, **values: object) -> ModelEntry:
        fields = {"factory": f"strangers:{stranger}", "options": {}, "name": "stranger"}
        return replace(catalogue.get("cnn-digits"), **(fields | values))

    return make


def findings(entry: ModelEntry, **options: object) -> dict[str, Finding]:
    return {finding.check: finding for finding in validate(entry, **options)}


def failed(entry: ModelEntry) -> dict[str, str]:
    return {f.check: f.text for f in validate(entry) if f.outcome == "failed"}


@pytest.mark.parametrize("factory", ["Encoder", "frozen", "saved", "float32_alone"])
def test_sound_networks_pass_every_check(entry, factory):
    found = findings(entry(factory))
    assert {f.outcome for f in found.values()} == {"ok"}
    assert "equal to the dense Hessian" in found["dense"].text


@pytest.mark.slow
def test_the_demo_models_pass_every_check():
    for name in ("vit-digits", "gpt-pydoc"):
        found = findings(catalogue.get(name), budget=60.0)
        assert {f.outcome for f in found.values()} == {"ok"}, found


def test_models_that_compute_partly_in_float32_are_held_to_its_precision(entry):
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    options |= {"intermediate_size": 24, "model_type": "llama", "head": "CausalLM"}
    llama = entry(
        "",
        factory="harness.registry.networks.libraries:transformers_model",
        options=options,
        task="pydoc",
        task_options={"context": 8},
        hessian_batch_size=8,
    )
    assert {f.outcome for f in findings(llama).values()} == {"ok"}


# What is wrong, the check that must find it, and what it must say.
WRONG = [
    ("dropout_on", "deterministic", r"drawn in middle \(aten.bernoulli_\): switch that off"),
    ("batch_mates", "deterministic", r"batch mates in middle.norm \(BatchNorm1d\); use running"),
    ("in_place", "second derivatives", r"in middle \(InPlace, strangers.py line \d+\): an in-pl"),
    ("fused_attention", "second derivatives", r"in middle \(FusedAttention, .*scaled_dot_product"),
    ("once", "second derivatives", r"in middle \(Rounded, .*marked once_differentiable"),
    ("straight", "differences", r"gradient of middle \(Straight, .* straight-through"),
    ("detached", "differences", r"gradient of middle \(Detached, .* detach"),
    ("wrong", "differences", r"gradient of middle \(Wrong, .* custom backward"),
    ("kept", "differences", r"second derivative of middle \(Kept, .* save_for_backward"),
    ("nan", "forward", r"is nan: middle \(Logarithm, strangers.py line \d+\) makes it"),
    (
        "wrong_classes",
        "forward",
        r"returns \(16, 7\); .* task's 10 classes: let the factory",
    ),
    ("own_generator", "build", r"differ in middle.linear.weight; draw .*\(numpy.random and"),
    ("raises", "build", r"FileNotFoundError: weights.pt is not there"),
    ("no_module", "build", r"must return a torch.nn.Module"),
    ("needs_arguments", "build", r"missing 1 required"),
    ("huge", "size", r"choose a smaller configuration"),
    ("complex_filter", "parameters", r"complex parameters: middle.filter; .*view_as_complex"),
]


@pytest.mark.parametrize(("factory", "check", "said"), WRONG, ids=[case[0] for case in WRONG])
def test_what_is_wrong_is_found_with_cause_and_remedy_by_module(entry, factory, check, said):
    found = findings(entry(factory))
    assert found[check].outcome == "failed"
    assert re.search(said, found[check].text), found[check].text
    earlier = [f.outcome for name, f in found.items() if name not in HESSIAN]
    assert "failed" in earlier or check in HESSIAN


def test_a_padding_index_that_is_a_token_is_named():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.embed(x)).flatten(0, 1)

    model, tokens = Padded().double(), torch.arange(10).view(2, 5) % 5
    loss = lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1].flatten())  # noqa: E731
    with fixed_arithmetic(model):
        found = locate.with_wrong_gradient(model, loss, (tokens, tokens), torch.float64)
    assert found == "embed (Embedding)"
    assert "a padding_idx that is a token of the data" in products._hint(found)


def test_a_network_that_learns_nothing_is_found(entry):
    found = findings(entry("blind"))["learns"]
    assert found.outcome == "warning"
    assert re.search(r"R, that of having learnt nothing, is \d\.\d+: it learns nothing", found.text)


def test_what_needs_a_failed_check_is_skipped_and_says_so(entry):
    found = findings(entry("dropout_on"))
    assert re.search(r"loss \d\.\d+ in \d+ steps of few samples, R \d\.", found["learns"].text)
    assert [name for name, f in found.items() if f.outcome == "skipped"] == list(HESSIAN)
    assert found["cost"].text == "needs second derivatives"
    assert found["training"].outcome == "ok"


@pytest.mark.parametrize(
    ("factory", "check", "said"),
    [
        ("unused", "second derivatives", "remove or freeze them: middle.linear.weight"),
        ("integer_order", "parameters", "in no block: middle.order; register_buffer"),
        (
            "zero_head",
            "second derivatives",
            "at init, that of final is the first. After two steps 3 of 3",
        ),
        ("matrix", "blocks", 'middle.matrix (mlp); the entry says what they are by blocks={"'),
        ("pair_bias", "blocks", "so in none of them: middle.pair_bias, 14% of the parameters"),
    ],
)
def test_what_a_review_accepts_is_a_warning(entry, factory, check, said):
    found = findings(entry(factory))
    assert said in found[check].text
    assert {f.check: f.outcome for f in found.values() if f.outcome != "ok"} == {check: "warning"}


def test_the_kinds_are_told_and_those_that_the_entry_gives_are_no_guesses(entry):
    found = findings(entry("Encoder"))["blocks"].text
    assert found == (
        "8 disjoint blocks: 3 mlp, 1 query, 1 key, 1 value, 1 attention_output, 1 head; all kinds "
        "known"
    )
    given = findings(entry("matrix", blocks={"*.matrix": "mlp"}))["blocks"]
    assert (given.outcome, given.text[-54:]) == (
        "ok", "1 head; kinds by the entry itself: *.matrix; all kinds known"[-54:],
    )  # fmt: skip


def test_zero_blocks_are_counted_and_no_failure(entry):
    found = findings(entry("zero_branch"))
    assert found["second derivatives"].outcome == "warning"
    assert "2 of 3 blocks" in found["second derivatives"].text
    assert "left out of comparisons" in found["second derivatives"].text
    assert {f.outcome for f in found.values()} == {"ok", "warning"}


def test_a_hessian_too_small_for_differences_is_no_failure(entry):
    found = findings(entry("deep"))
    assert found["differences"].outcome == "warning"
    assert "too small beside the gradient" in found["differences"].text
    assert "failed" not in {f.outcome for f in found.values()}


def test_blocks_that_the_budget_leaves_no_time_for_are_counted(entry, monkeypatch):
    now, products = [0.0], BlockHessian.products

    def slow(hessian, requests):
        now[0] += len({index for index, _ in requests})
        return products(hessian, requests)

    monkeypatch.setattr(BlockHessian, "products", slow)
    for module in ("validate", "subject", "products"):
        clock = SimpleNamespace(process_time=lambda: now[0], perf_counter=time.perf_counter)
        monkeypatch.setattr(f"harness.submission.{module}.time", clock)
    found = findings(entry("Encoder"), budget=12)
    some = r"(\d) of \1 blocks have a Hessian that isn't zero; the other \d take about \d+ s more"
    assert re.match(some, found["second derivatives"].text)
    now[0] = 0.0
    found = findings(entry("Encoder"), budget=25)
    for check in ("symmetric", "differences"):
        assert re.search(
            r"on \d of 8 blocks.*; the other \d take about \d+ s more", found[check].text
        )
    assert "the whole entry" in found["cost"].text


def test_checks_that_there_is_no_time_for_are_untried_and_the_model_not_ready(entry, registry):
    found = findings(entry("Encoder"), budget=1e-9)
    untried = {name for name, f in found.items() if f.outcome == "untried"}
    assert untried == {"symmetric", "differences", "dense"}
    assert re.match(r"1e-09 s are over; it takes about \d+ s more of --budget", found["dense"].text)
    assert "the whole entry" in found["cost"].text
    result = run(registry, "vit-digits", "--budget", "1e-9")
    assert result.exit_code == 1
    assert "vit-digits has not failed, and is not ready: 3 checks are untried" in result.stderr


def test_fields_to_be_filled_in_fail_the_entry(entry):
    todo = entry("Encoder", licence="TODO: the licence")
    assert failed(todo) == {"entry": "licence not filled in yet; edit the entry's file"}


def test_data_that_differ_from_call_to_call_are_found(entry, registry):
    (registry / "noisy.py").write_text(
        "import torch\n"
        "from harness.tasks.images import Digits\n"
        "class Noisy(Digits):\n"
        "    def take(self, data, split, indices, generator):\n"
        "        x, y = super().take(data, split, indices, generator)\n"
        "        return x + torch.randn_like(x), y\n"
    )
    [text] = failed(entry("Encoder", task="noisy:Noisy")).values()
    assert "two fixed batches of task noisy:Noisy differ" in text
    assert "the generator that it gets" in text


_TASK = """
import torch
from torch.nn import functional as F
from harness.tasks.images import Digits
class Odd(Digits):
    {}
"""
_SUM = "def loss_of(self, logits, batch): return F.cross_entropy(logits, batch[1], reduction='sum')"
_WEIGHTED = (
    "def loss_of(self, logits, batch):\n"
    "        return F.cross_entropy(logits, batch[1], weight=torch.arange(1.0, 11.0))"
)


@pytest.mark.parametrize(
    ("code", "check", "said"),
    [
        ("def num_terms(self, batch): return 1", "terms", r"is 1 for 16 samples, and 1 \+ 1 for"),
        (
            "def num_terms(self, batch): return 10 * len(batch[0])",
            "terms",
            "is 160 for a batch of 16 targets; let it count the terms that `loss_of` averages",
        ),
        (_SUM, "deterministic", r"weighted by num_terms: let `loss_of` .* \(a sum is none\)"),
        (
            _WEIGHTED,
            "deterministic",
            "`num_terms` count those that it averages, without what it leav",
        ),
    ],
)
def test_terms_that_are_not_those_of_the_mean_are_found(entry, registry, code, check, said):
    name = f"odd{len(code)}"  # a module of its own
    (registry / f"{name}.py").write_text(_TASK.format(code))
    [(found, text)] = failed(entry("Encoder", task=f"{name}:Odd")).items()
    assert found == check
    assert re.search(said, text), text


def test_a_batch_larger_than_the_data_is_found(entry):
    [text] = failed(entry("Encoder", task_options={"train_size": 9})).values()
    assert text == "hessian_batch_size is 256; the data have 9 training samples"


class _Deep(nn.Module):
    """The culprit lies inside of other modules."""

    def __init__(self, culprit: nn.Module):
        super().__init__()
        self.flatten = nn.Flatten()
        self.stack = nn.Sequential(nn.Linear(36, 7), nn.Sequential(nn.Tanh(), culprit))
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        return self.head(self.stack(self.flatten(x)))


class _Sqrt(nn.Module):
    def forward(self, x):
        return torch.sqrt(x - x.abs().max())


class _Mean(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class _Stop(nn.Module):
    def forward(self, x):
        return x * x.detach()


@pytest.mark.parametrize(
    ("culprit", "find"),
    [
        (_Sqrt(), locate.not_finite),
        (_Mean(), locate.with_batch_mates),
        (_Stop(), lambda *args: locate.with_wrong_gradient(*args, torch.float64)),
    ],
)
def test_the_innermost_module_to_blame_is_named_and_no_other(culprit, find):
    _, batch = problem("mlp")
    model = _Deep(culprit).double().eval()
    where = find(model, cross_entropy, batch)
    assert where is not None
    assert where.startswith(f"stack.1.1 ({type(culprit).__name__}, test_validate.py line ")
    innocent = _Deep(nn.GELU()).double().eval()
    assert find(innocent, cross_entropy, batch) is None


@pytest.mark.parametrize("name", ["cnn", "vit", "gpt", "mlp"])
def test_sound_models_have_no_module_to_blame(name):
    model, batch = problem(name)
    model.eval()
    before = [p.detach().clone() for p in model.parameters()]
    args = (model, cross_entropy, (batch[0], batch[1].clamp(min=0)))
    with fixed_arithmetic(model):
        assert locate.without_second_derivative(*args) is None
        assert locate.with_batch_mates(*args) is None
        assert locate.not_finite(*args) is None
        assert locate.with_wrong_gradient(*args, torch.float64) is None
        assert locate.with_wrong_second_derivative(*args, torch.float64) is None
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(old, new.detach(), rtol=1e-12, atol=1e-12)


def run(registry: Path, *arguments: str):
    return CliRunner().invoke(main, ["validate", *arguments, "--registry", str(registry)])


def test_the_command_ends_with_0_only_if_no_check_failed(registry):
    add = ["add-model", "net", "--task", "digits", "--registry", str(registry), "--force"]
    add += ["--licence", "MIT", "--reference", "mine", "--from"]
    CliRunner().invoke(main, [*add, "strangers:Encoder"])
    result = run(registry, "net")
    assert result.exit_code == 0, result.output
    assert "net is ready; warnings: 0" in result.stderr
    CliRunner().invoke(main, [*add, "strangers:nan"])
    result = run(registry, "net", "--json")
    assert result.exit_code == 1
    outcomes = {f["check"]: f["outcome"] for f in json.loads(result.stdout)}
    assert outcomes["forward"] == "failed"
    assert "net is not ready: 1 failed, 10 skipped" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["vit-digitz"], "did you mean"), (["vit-digits", "--budget", "nan"], "must be positive")],
)
def test_what_can_not_be_validated_is_a_usage_error(registry, arguments, said):
    result = run(registry, *arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_what_learns_slowly_at_one_rate_is_not_said_to_learn_nothing(monkeypatch):
    values = iter([1.0, 0.95, 1.0, 3.0, 1.0, float("nan")])  # two steps of each rate
    model = nn.Linear(1, 1)
    task = SimpleNamespace(loss=lambda m, batch: m.weight.sum() * 0 + next(values))
    subject = SimpleNamespace(
        entry=SimpleNamespace(trained_by="one"), task=task, model=model, mates=(torch.ones(1),),
        time_for=lambda share: float("inf"),
    )  # fmt: skip
    monkeypatch.setattr(checks, "_FIT_STEPS", 1)
    monkeypatch.setattr(checks, "target_entropy", lambda *_: None)
    monkeypatch.setattr(checks, "reference_loss", lambda entry, loss, entropy: loss)
    with pytest.raises(Caution, match=r"gets to 0\.950, .*it learns slowly"):
        checks._learns(subject)
