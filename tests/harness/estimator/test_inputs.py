"""What people pass: batches of any kind, and what is told in one line."""

from __future__ import annotations

import warnings
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision.ops import roi_align
from transformers import BatchEncoding

from harness.errors import UserError
from harness.estimator import estimate_spectra
from harness.estimator.adaptive import limits
from harness.estimator.batches import batch_hash, join, take

X, Y = torch.linspace(-1, 1, 48).reshape(8, 6), torch.arange(8) % 3


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def spectra(model=None, loss_fn=cross_entropy, batches=((X, Y),), **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(6, 3) if model is None else model
    return estimate_spectra(model, loss_fn, list(batches), **options)


@dataclass(frozen=True)
class Pair:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "pair"


class Named(dict):
    """A dict that torch takes for a leaf."""


@pytest.mark.parametrize("kind", [UserDict, BatchEncoding, Named, lambda d: Pair(**d)])
def test_mappings_and_dataclasses_of_tensors_are_batches(kind):
    def loss(model, batch):
        assert type(batch) is type(whole)
        x, y = (batch.x, batch.y) if isinstance(batch, Pair) else (batch["x"], batch["y"])
        return F.cross_entropy(model(x), y)

    whole = kind({"x": X, "y": Y})
    expected = spectra(batches=[{"x": X, "y": Y}], loss_fn=lambda m, b: cross_entropy(m, (X, Y)))
    halves = spectra(loss_fn=loss, batches=[take(whole, 0, 3), take(whole, 3, 8)])
    torch.testing.assert_close(halves["nodes"][0], expected["nodes"][0], rtol=1e-4, atol=1e-7)
    assert halves["batch_hash"][0] == batch_hash([(X, Y)])
    assert take(whole, 0, 8) is not whole
    again = join(take(whole, 0, 3), take(whole, 3, 8), whole)
    assert batch_hash([again]) == batch_hash([whole])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tensors_that_all_samples_share_are_not_joined(size):
    shared = torch.arange(float(size))
    whole = {"x": X, "shared": shared}
    pieces = [take(whole, start, start + size) for start in (0, size)]
    again = join(*pieces, whole)
    assert again["x"].equal(X[: 2 * size])
    assert again["shared"].equal(shared)
    assert join(pieces[0], pieces[1] | {"shared": shared + 1}, whole) is None
    assert join(pieces[0] | {"name": "a"}, pieces[1] | {"name": "b"}, whole) is None


def test_batches_of_one_sample_may_share_a_tensor():
    batches = [{"x": X[i : i + 1], "y": Y[i : i + 1], "scale": torch.ones(1)} for i in range(8)]
    whole = spectra(batches=[{"x": X, "y": Y}], loss_fn=lambda m, b: cross_entropy(m, (X, Y)))

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]) * batch["scale"], batch["y"])

    found = spectra(batches=batches, loss_fn=loss)
    torch.testing.assert_close(found["nodes"][0], whole["nodes"][0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_terms_that_are_counted_by_a_tensor_are_counted(dtype):
    targets = Y.clone()
    targets[::3] = -100
    batches = [(X[:3], targets[:3]), (X[3:], targets[3:])]
    counts = [lambda b: (b[1] != -100).sum(), lambda b: int((b[1] != -100).sum())]
    by_tensor, by_number = (
        spectra(batches=batches, batch_weights=count, dtype=dtype) for count in counts
    )
    assert by_tensor["nodes"].tolist() == by_number["nodes"].tolist()


TOKENS = [torch.arange(7 * n).reshape(7, n)[:1] % 11 for n in (9, 4, 3)]


def next_token(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def language_model():
    return nn.Sequential(nn.Embedding(11, 4), nn.Tanh(), nn.Linear(4, 11))


def test_unequal_lengths_without_weights_are_warned_of():
    with pytest.warns(UserWarning, match=r"batch 0 have shape \(9,\), of batch 1 \(4,\).*_weights"):
        spectra(language_model(), next_token, TOKENS, num_probes=1, num_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counted = {"batch_weights": lambda tokens: tokens[:, 1:].numel()}
        spectra(language_model(), next_token, TOKENS, num_probes=1, num_steps=1, **counted)


def test_single_samples_of_unequal_terms_are_found_by_two_of_them_together():
    def masked(model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    x = torch.arange(12).reshape(2, 6)
    y = torch.where(torch.arange(6) < torch.tensor([[1], [5]]), x % 11, -100)
    singles = [(x[:1] % 11, y[:1]), (x[1:] % 11, y[1:])]
    with pytest.raises(UserError, match=r"of batches 0 and 1 together is .*pass batch_weights"):
        spectra(language_model(), masked, singles)
    count = lambda batch: int((batch[1] != -100).sum())  # noqa: E731
    rows = spectra(language_model(), masked, singles, batch_weights=count)
    assert rows["num_terms"][0] == 6


def test_float64_on_what_computes_in_float32_inside_is_said_so_and_not_called_asymmetric():
    class Upcast(nn.Module):
        def forward(self, x):
            return x * x.float().square().mean(-1, keepdim=True).add(0.1).rsqrt().to(x.dtype)

    model = nn.Sequential(nn.Linear(6, 5), Upcast(), nn.Linear(5, 3))
    with pytest.warns(UserWarning, match=r"computes in float32 inside \(in 1\)") as caught:
        spectra(model, dtype=torch.float64)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectra(model)
        spectra(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), dtype=torch.float64)


def test_spectra_inside_inference_mode_are_those_outside():
    with torch.inference_mode():
        inside = spectra(batches=[(X + 0, Y + 0)])
    assert inside["nodes"].tolist() == spectra()["nodes"].tolist()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.slope = 2 * x  # not followed by autograd
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.slope


@pytest.mark.parametrize("exact_size", [0, 1000])
def test_a_zero_block_whose_gradient_changes_is_warned_of(exact_size):
    settings = {"num_probes": 2, "num_steps": 2, "exact_size": exact_size}
    with pytest.warns(UserWarning, match=r"weight: .* but the gradient changes"):
        rows = spectra(loss_fn=lambda m, b: Square.apply(m(b[0])).mean(), **settings)
    assert rows["status"].tolist() == ["zero"]
    assert "a second derivative is wrong" in rows["reason"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = spectra(loss_fn=lambda m, b: m(b[0]).relu().mean(), **settings)
    assert rows["status"].tolist() == ["zero"]


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 1), nn.Linear(8, 3)

    def forward(self, x):
        boxes = torch.tensor([[i, 0.0, 0.0, 1.5, 1.5] for i in range(len(x))])
        x = self.conv(x.reshape(-1, 1, 2, 3)).tanh()
        return self.head(roi_align(x, boxes, (2, 2)).flatten(1))


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (nn.LazyLinear(3), {}, "lazy parameter weight has no shape yet; pass one batch through"),
        (nn.Linear(6, 3, device="meta"), {}, "weight is on the meta device.*build the model on"),
        (
            nn.Linear(6, 3).requires_grad_(False),
            {},
            "no trainable parameter in partition 'weights'",
        ),
        (None, {"memory_budget": "4GiB"}, r"memory_budget is '4GiB'; .* 4 \* 2\*\*30"),
        (None, {"memory_budget": 0}, "memory_budget is 0; it must be"),
        (None, {"num_probes": 2.5}, "num_probes is 2.5; it must be a whole number of at least 1"),
        (None, {"num_steps": "10"}, "num_steps is '10'; it must be a whole number"),
        (None, {"seed": None}, "seed is None; it must be a whole number"),
        (None, {"exact_size": True}, "exact_size is True; it must be a whole number"),
        (
            None,
            {"loss_fn": nn.CrossEntropyLoss()},
            r"lambda m, b: criterion\(m\(b\[0\]\), b\[1\]\)",
        ),
        (None, {"loss_fn": F.mse_loss}, r"lambda m, b: criterion\(m\(b\[0\]\), b\[1\]\)"),
        (None, {"loss_fn": lambda outputs: 0}, r"loss_fn is called with \(model, batch\)"),
        (None, {"loss_fn": "mse"}, r"loss_fn is called with \(model, batch\)"),
        (
            None,
            {
                "loss_fn": lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=torch.ones(3)),
                "dtype": torch.float64,
            },
            "weights of classes, keep theirs: put them into one of the two, or cast",
        ),
        (Pooled(), {}, r"torchvision.roi_align, used in Pooled, .* take F.grid_sample"),
        (None, {"batches": [SimpleNamespace(x=X)]}, "a batch of type SimpleNamespace holds no"),
    ],
)
def test_what_can_not_be_is_said_in_one_line_with_its_remedy(model, options, said):
    with pytest.raises(UserError, match=said) as caught:
        spectra(model, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_probes": 3.5}, "max_probes is 3.5"),
        ({"max_steps": "9"}, "max_steps is '9'"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"max_steps": -1}, "max_steps is -1"),
    ],
)
def test_limits_of_a_tolerance_are_numbers(options, said):
    with pytest.raises(UserError, match=said):
        limits("js0", 0.1, options.get("max_probes"), options.get("max_steps"))
