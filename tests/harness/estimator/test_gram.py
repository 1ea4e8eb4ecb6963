"""Exact spectra from Gram matrices, against dense block Hessians by autograd."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from harness import SplitLoss, estimate_spectra
from harness.errors import UserError
from harness.estimator import gram, gram_matrix
from harness.estimator.blocks import find_blocks
from harness.estimator.checks import fixed_arithmetic
from spectra_db import store

from .models import cross_entropy, num_terms, problem, split
from .test_gauss_newton import CROSS_ENTROPY, SQUARES, gauss_newton
from .test_hessian import block_hessian

OPTIONS = {"gram": True, "num_probes": 1, "num_steps": 2, "exact_size": 0, "dtype": "float64"}


class Twice(nn.Module):
    """A ReLU net in which one weight is used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = nn.Linear(36, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.first(x.flatten(1)).relu()
        return self.head(self.again(self.again(x).relu()).relu())


def relu_cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 2, stride=1),
        nn.LeakyReLU(),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


def gelu_mlp():
    middle = nn.Linear(6, 5)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.GELU(), middle, nn.Linear(5, 4))


@cache
def net(name, num_samples=6):
    """Return a net with statistics of batch norm that are not those of the start, and a batch."""
    _, batch = problem("mlp", num_samples)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = {"cnn": relu_cnn, "gelu": gelu_mlp, "twice": Twice}[name]().double()
        model(torch.randn(9, 1, 6, 6).double())
    return model, batch


def dense(hessian, index, model):
    with fixed_arithmetic(model):
        return torch.linalg.eigvalsh(hessian.dense(index))


def whole(row):
    """Return all eigenvalues of an exact row, the zeros too."""
    times = (torch.tensor(row["weights"]) * row["num_params"]).round().long()
    return torch.tensor(row["nodes"], dtype=torch.float64).repeat_interleave(times)


@pytest.mark.parametrize(("partition", "sizes"), [("weights", [6]), ("all", [4, 2])])
def test_a_relu_net_has_the_eigenvalues_of_its_dense_blocks(partition, sizes, tmp_path):
    model, batch = net("cnn")
    rows = estimate_spectra(model, CROSS_ENTROPY, split(batch, sizes), blocks=partition, **OPTIONS)
    assert set(rows["method"]) == {"exact"}
    hessian = block_hessian(model, cross_entropy, [batch], find_blocks(model, partition))
    for index, row in enumerate(rows.to_dict("records")):
        expected = dense(hessian, index, model)
        size = expected.abs().max()
        torch.testing.assert_close(whole(row), expected, rtol=0, atol=float(1e-14 * size))
        zeros = int((expected < 1e-13 * size).sum())
        assert len(row["nodes"]) == min(row["num_params"], row["num_params"] - zeros + 1)
    store.write(tmp_path, "spectra", rows.assign(model="net"))


def test_one_block_of_all_weights_is_not_linear_and_falls_back():
    model, batch = net("cnn")
    [row] = estimate_spectra(model, CROSS_ENTROPY, [batch], blocks="full", **OPTIONS).to_dict(
        "records"
    )
    assert row["method"] == "slq"


class Tokens(nn.Module):
    """Layers on each place of a sequence, convolutions that pad with what is there, a bias."""

    def __init__(self):
        super().__init__()
        self.inner, self.wide = nn.Linear(6, 5), nn.Linear(5, 40)
        self.conv = nn.Conv1d(40, 3, 3, padding=1, padding_mode="circular")
        self.image = nn.Conv2d(3, 20, (2, 1), stride=(1, 2), padding=(0, 1), dilation=(2, 1))
        self.head = nn.Linear(20, 4)

    def forward(self, x):
        x = self.wide(F.relu(self.inner(x[:, 0]), inplace=True)).relu()
        x = self.conv(x.transpose(1, 2)).relu().unflatten(2, (3, 2))
        return self.head(self.image(x).relu().mean((2, 3)))


class Shared(nn.Module):
    """A layer that is called once, and its weight used once more."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(36, 5), nn.Linear(36, 4)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(x) + (self.first(x) + F.linear(x.square(), self.first.weight))[:, :4]


@pytest.mark.parametrize("kind", [Tokens, Shared])
@pytest.mark.parametrize("places", [True, False])
def test_layers_of_any_shape_have_the_eigenvalues_of_their_dense_blocks(kind, places, monkeypatch):
    _, batch = net("cnn")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = kind().double()
    if not places:  # the other way to the same matrix
        monkeypatch.setattr(gram_matrix, "_add_by_places", None)
        monkeypatch.setattr(gram_matrix, "CHUNK", 1 << 7)
        monkeypatch.setattr(gram_matrix, "_pays_by_places", lambda *_: False)
    rows = estimate_spectra(model, CROSS_ENTROPY, split(batch, [4, 2]), **OPTIONS)
    assert set(rows["method"]) == {"exact"}
    hessian = block_hessian(model, cross_entropy, [batch], find_blocks(model))
    for index, row in enumerate(rows.to_dict("records")):
        expected = dense(hessian, index, model)
        atol = float(1e-14 * expected.abs().max())
        torch.testing.assert_close(whole(row), expected, rtol=0, atol=atol)


class Images(nn.Module):
    """A convolution that is given its samples one by one, without a dimension of the batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 1, 3), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.stack([self.conv(image).flatten() for image in x]))


@pytest.mark.parametrize("build", [Shared, Images, lambda: torch.jit.script(relu_cnn().double())])
def test_one_block_that_is_no_plain_layer_has_the_eigenvalues_of_its_dense_block(build):
    _, batch = net("cnn")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = build().double().eval()
    block = find_blocks(model)[0]
    [row] = estimate_spectra(model, CROSS_ENTROPY, [batch], blocks=[block], **OPTIONS).to_dict(
        "records"
    )
    assert row["method"] == "exact"
    expected = dense(block_hessian(model, cross_entropy, [batch], [block]), 0, model)
    atol = float(1e-14 * expected.abs().max())
    torch.testing.assert_close(whole(row), expected, rtol=0, atol=atol)


def test_a_criterion_whose_second_derivative_is_nan_is_said_to_have_one():
    model, batch = net("gelu")
    kink = SplitLoss(lambda m, b: m(b[0]) * 0, lambda z, b: z.norm(dim=1).mean())
    with pytest.raises(FloatingPointError, match="not finite"):
        estimate_spectra(model, kink, [batch], **OPTIONS)


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("gelu", ["3.weight", "4.weight"]),  # those after the last bend
        ("twice", ["first.weight", "head.weight"]),
    ],
)
def test_blocks_in_which_the_outputs_bend_are_sampled(name, linear):
    model, batch = net(name)
    rows = estimate_spectra(model, CROSS_ENTROPY, [batch], **OPTIONS)
    assert rows.loc[rows["method"] == "exact", "block"].tolist() == linear
    assert (rows["method"] == "slq").sum() == 1
    hessian = block_hessian(model, cross_entropy, [batch], find_blocks(model))
    for row in rows[rows["method"] == "exact"].to_dict("records"):
        index = [b.name for b in hessian.blocks].index(row["block"])
        torch.testing.assert_close(whole(row), dense(hessian, index, model), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "loss"), [("gpt", CROSS_ENTROPY), ("mlp", SQUARES)], ids=["gpt", "mlp"]
)
def test_gauss_newton_is_exact_in_any_net(name, loss):
    model, batch = problem(name, 2)
    blocks = find_blocks(model)[-3:]
    counted = {"batch_weights": num_terms}
    rows = estimate_spectra(
        model, loss, [batch], blocks=blocks, operator="ggn", **OPTIONS, **counted
    )
    assert set(rows["method"]) == {"exact"}
    matrix = gauss_newton(model, loss, [batch], blocks, **counted)
    for index, row in enumerate(rows.to_dict("records")):
        torch.testing.assert_close(whole(row), dense(matrix, index, model), rtol=0, atol=1e-12)


def test_float32_derivatives_keep_small_eigenvalues():
    model, batch = net("cnn", 4)
    rows = {}
    for dtype in ("float32", "float64"):
        options = OPTIONS | {"dtype": dtype}
        rows[dtype] = estimate_spectra(model, CROSS_ENTROPY, [batch], **options).to_dict("records")
    for narrow, wide in zip(rows["float32"], rows["float64"], strict=True):
        a, b = whole(narrow), whole(wide)
        # To the root of what products in float32 tell: a singular value is off by one rounding.
        torch.testing.assert_close(a.sqrt(), b.sqrt(), rtol=0, atol=float(1e-5 * b.max().sqrt()))
        assert len(narrow["nodes"]) == len(wide["nodes"])


def test_what_does_not_fit_falls_back_and_a_zero_block_says_so():
    model, batch = net("cnn")
    options = OPTIONS | {"memory_budget": 10**6}
    rows = estimate_spectra(model, CROSS_ENTROPY, [batch], **options)
    assert set(rows["method"]) == {"slq"}
    still = SplitLoss(lambda m, b: m(b[0]), lambda z, b: z.mean())
    rows = estimate_spectra(model, still, [batch], **OPTIONS)
    assert set(rows["status"]) == {"zero"}


def test_rows_too_many_for_every_block_are_given_up_before_all_are_made(monkeypatch):
    model, batch = net("cnn")
    made = []
    root = gram._root
    monkeypatch.setattr(gram, "MOST_ROWS", 7)  # 3 of each of 6 samples; all blocks are larger
    monkeypatch.setattr(gram, "_root", lambda *a: made.append(a) or root(*a))
    rows = estimate_spectra(model, CROSS_ENTROPY, [batch], **OPTIONS)
    assert set(rows["method"]) == {"slq"}
    assert len(made) == 3


def test_of_more_rows_than_fit_a_matrix_small_blocks_are_taken(monkeypatch):
    model, batch = net("cnn", 20)
    monkeypatch.setattr(gram, "MOST_ROWS", 40)  # 3 of each sample; one block has 36 parameters
    rows = estimate_spectra(model, CROSS_ENTROPY, [batch], **OPTIONS)
    exact = rows[rows["method"] == "exact"]
    assert len(exact) == 1
    assert exact["num_params"].tolist() == [36]


@pytest.mark.parametrize("named", [1, 2, 3])
def test_what_is_taken_of_a_block_does_not_depend_on_how_many_blocks_are_asked_for(named):
    model, batch = net("cnn", 4)
    blocks = find_blocks(model)[:named]
    rows = estimate_spectra(model, CROSS_ENTROPY, [batch], **OPTIONS | {"blocks": blocks})
    assert set(rows["method"]) == {"exact"}


@pytest.mark.parametrize(("few", "method"), [(3, "slq"), (4, "exact")])
def test_unasked_they_are_taken_of_samples_with_few_outputs(monkeypatch, few, method):
    model, batch = net("cnn")  # of 4 outputs
    monkeypatch.setattr(gram, "FEW_OUTPUTS", few)
    for asked, expected in ((None, method), (True, "exact"), (False, "slq")):
        rows = estimate_spectra(model, CROSS_ENTROPY, [batch], **OPTIONS | {"gram": asked})
        assert set(rows["method"]) == {expected}


def test_a_criterion_that_is_not_convex_falls_back():
    model, batch = net("cnn")
    odd = SplitLoss(lambda m, b: m(b[0]), lambda z, b: z.sin().mean())
    assert set(estimate_spectra(model, odd, [batch], **OPTIONS)["method"]) == {"slq"}


def test_class_weights_in_another_dtype_are_taken():
    model, batch = net("cnn", 4)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    loss = SplitLoss(
        lambda m, b: m(b[0]),
        lambda z, b: F.cross_entropy(z, b[1], weights, reduction="none").mean(),
    )
    rows = estimate_spectra(model, loss, [batch], **OPTIONS | {"dtype": "float32"})
    assert set(rows["method"]) == {"exact"}


def test_a_plain_loss_is_refused():
    model, batch = net("cnn")
    with pytest.raises(UserError, match=r"gram=True needs the loss in two parts: pass harness.Sp"):
        estimate_spectra(model, cross_entropy, [batch], **OPTIONS)


class Square(torch.autograd.Function):
    """1.5 a², whose gradient is right and whose second derivative is lost."""

    @staticmethod
    def forward(ctx, a):
        ctx.slope = 3 * a
        return 1.5 * a * a

    @staticmethod
    def backward(ctx, g):
        return g * ctx.slope


class Sound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return 1.5 * a * a

    @staticmethod
    def backward(ctx, g):
        (a,) = ctx.saved_tensors
        return g * 3 * a


class Squares(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.head, self.function = nn.Linear(36, 6), nn.Linear(6, 4), function

    def forward(self, x):
        return self.head(self.function.apply(self.first(x.flatten(1))).relu())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_bend_that_a_wrong_second_derivative_hides_is_warned_of_by_block(dtype):
    _, batch = problem("mlp", 6)
    options = OPTIONS | {"dtype": dtype}
    with pytest.warns(UserWarning, match=r"second derivatives by first\.weight are wrong"):
        rows = estimate_spectra(Squares(Square), CROSS_ENTROPY, [batch], **options)
    assert set(rows["method"]) == {"exact"}  # it seems linear
    rows = estimate_spectra(Squares(Sound), CROSS_ENTROPY, [batch], **options)
    assert rows["method"].tolist() == ["slq", "exact"]


@pytest.mark.parametrize("name", ["cnn", "gelu", "twice"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sound_second_derivatives_are_not_warned_of_despite_kinks(name, dtype, recwarn):
    model, batch = net(name, 24)
    estimate_spectra(model, CROSS_ENTROPY, [batch], **OPTIONS | {"dtype": dtype})
    assert not [w for w in recwarn if "second derivatives" in str(w.message)]
