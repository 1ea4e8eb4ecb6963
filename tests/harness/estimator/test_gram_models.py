"""Gram matrices of models and losses that are odd, against dense block Hessians by autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from harness import SplitLoss, estimate_spectra
from harness.errors import UserError
from harness.estimator import gram, gram_matrix
from harness.estimator.blocks import find_blocks
from harness.estimator.cost import forecast
from harness.estimator.objective import Objective
from harness.estimator.operators import opened
from harness.estimator.settings import Settings

from .models import cross_entropy
from .test_gauss_newton import CROSS_ENTROPY
from .test_gram import OPTIONS, dense, net, whole
from .test_hessian import block_hessian


def batch_of(*shape, num_classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.randn(*shape, dtype=torch.float64), torch.randint(num_classes, shape[:1])


def made(build):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build().double().eval()


def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def agree_with_dense(rows, model, loss, batches, *, atol=1e-12, **options):
    """Compare exact rows with dense Hessians of the loss as a plain one; return their blocks."""
    exact = rows[rows["method"] == "exact"]
    plain = block_hessian(model, lambda m, b: loss(m, b), batches, find_blocks(model), **options)
    names = [block.name for block in plain.blocks]
    for row in exact.to_dict("records"):
        expected = dense(plain, names.index(row["block"]), model)
        torch.testing.assert_close(whole(row), expected, rtol=0, atol=atol)
    return exact["block"].tolist()


class Keeps(nn.Module):
    """Keeps what its last pass made, as models with attention maps or auxiliary losses do."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        self.last = self.first(x)
        return self.head(self.last.relu())


class Slope(nn.Module):
    """Gives the derivative of a scalar by its input, as models of forces do."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        energy = self.head(self.first(x).tanh()).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0][:, :3]


class SlopeOfEach(Slope):
    """The same by torch.func, sample by sample."""

    def forward(self, x):
        def energy(v):
            return self.head(self.first(v.unsqueeze(0)).tanh()).sum()

        return torch.vmap(torch.func.grad(energy))(x)[:, :3]


class OneByOne(nn.Module):
    """A layer that is given vectors."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(5, 1), nn.Linear(1, 1)

    def forward(self, x):
        return torch.stack([self.scale(self.inner(sample)) for sample in x])


SQUARE = SplitLoss(CROSS_ENTROPY.outputs, lambda z, b: z.square().mean())


@pytest.mark.parametrize(
    ("build", "loss", "taken"),
    [
        (Keeps, CROSS_ENTROPY, 2),
        (Slope, SQUARE, 1),  # in the first layer it bends
        (SlopeOfEach, SQUARE, 1),
        (OneByOne, SQUARE, 2),
    ],
    ids=["keeps", "slope", "slopes", "vectors"],
)
@pytest.mark.parametrize("num_samples", [1, 6])
def test_models_that_do_more_than_map_have_the_eigenvalues_of_their_dense_blocks(
    build, loss, taken, num_samples
):
    model, batch = made(build), batch_of(num_samples, 5)
    rows = estimate_spectra(model, loss, [batch], **OPTIONS)
    assert len(agree_with_dense(rows, made(build), loss, [batch])) == taken


BY_SIZE = SplitLoss(
    lambda m, b: m(b[0]) / len(b[0]) ** 0.5,
    lambda z, b: (z - F.one_hot(b[1], 3).to(z) / len(z) ** 0.5).square().sum(),
)
SCALED = SplitLoss(lambda m, b: m(b[0]) * b[2].sum(), CROSS_ENTROPY.criterion)
STRETCHED = SplitLoss(lambda m, b: m(b[0]) * b[2], CROSS_ENTROPY.criterion)
IN_PLACE = SplitLoss(CROSS_ENTROPY.outputs, lambda z, b: F.cross_entropy(z.mul_(0.5), b[1]))


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
@pytest.mark.parametrize("sizes", [(40,), (6, 3)])
@pytest.mark.parametrize(
    "loss", [BY_SIZE, SCALED, STRETCHED, IN_PLACE], ids=["size", "scaled", "stretched", "in place"]
)
def test_losses_that_know_more_than_a_sample_have_the_eigenvalues_of_their_dense_blocks(
    loss, sizes, operator
):
    model, (x, y) = made(mlp), batch_of(sum(sizes), 5)
    shared = torch.tensor([2.0], dtype=torch.float64)
    batches = [(*part, shared) for part in zip(x.split(sizes), y.split(sizes), strict=True)]
    rows = estimate_spectra(model, loss, batches, **OPTIONS | {"operator": operator})
    # In networks of ReLU a block's Hessian is its Gauss-Newton matrix.
    assert len(agree_with_dense(rows, model, loss, batches)) == 2


def test_batches_that_differ_in_more_than_tensors_are_not_joined():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 4)
            self.heads = nn.ModuleDict({name: nn.Linear(4, 3) for name in "ab"})

        def forward(self, x, name):
            return self.heads[name](self.first(x).relu())

    x, y = batch_of(9, 5)
    ends = ((0, 5, "a"), (5, 8, "a"), (8, 9, "b"))
    batches = [{"x": x[i:j], "y": y[i:j], "head": head} for i, j, head in ends]
    loss = SplitLoss(lambda m, b: m(b["x"], b["head"]), lambda z, b: F.cross_entropy(z, b["y"]))
    rows = estimate_spectra(made(Heads), loss, batches, **OPTIONS)
    assert len(agree_with_dense(rows, made(Heads), loss, batches)) == 3


@pytest.mark.parametrize("cast", ["float", "double", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_outputs_and_criteria_in_another_dtype_are_taken(cast, dtype):
    model, batch = made(mlp), batch_of(6, 5)
    coarse = {"float": 1e-5, "double": 1e-12, "bfloat16": 1e-2}[cast]
    atol = max(coarse, 1e-5 if dtype == "float32" else 0.0)
    outputs = SplitLoss(
        lambda m, b: getattr(m(b[0]), cast)(), lambda z, b: cross_entropy_of(z.double(), b)
    )
    criterion = SplitLoss(
        lambda m, b: m(b[0]), lambda z, b: cross_entropy_of(getattr(z, cast)(), b)
    )
    for loss in (outputs, criterion):
        rows = estimate_spectra(model, loss, [batch], **OPTIONS | {"dtype": dtype})
        assert len(agree_with_dense(rows, model, CROSS_ENTROPY, [batch], atol=atol)) == 2


def cross_entropy_of(z, batch):
    return F.cross_entropy(z, batch[1])


class Bends(nn.Module):
    """Odd in its input: of opposite samples second derivatives are opposite, too."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.head(self.first(x).tanh())


def test_opposite_bends_of_two_microbatches_do_not_pass_for_none():
    x, y = batch_of(4, 5)
    rows = estimate_spectra(made(Bends), CROSS_ENTROPY, [(x, y), (-x, y)], **OPTIONS)
    assert rows.set_index("block")["method"].to_dict() == {
        "first.weight": "slq",
        "head.weight": "exact",
    }


@pytest.mark.parametrize("asked", [True, None])
def test_a_criterion_that_knows_the_model_beside_its_outputs_is_sampled_with_a_warning(asked):
    model, batch = made(mlp), batch_of(6, 5)
    left = {}

    def outputs(m, b):
        left["penalty"] = sum(p.square().sum() for p in m.parameters())
        return m(b[0])

    loss = SplitLoss(outputs, lambda z, b: F.cross_entropy(z, b[1]) + left["penalty"])
    with pytest.warns(UserWarning, match="depends on the model beside its outputs"):
        rows = estimate_spectra(model, loss, [batch], **OPTIONS | {"gram": asked})
    assert set(rows["method"]) == {"slq"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_samples_of_which_the_model_is_sure_switch_nothing_off(dtype):
    x, _ = batch_of(48, 5)
    batch = x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    model = made(mlp).train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    rows = estimate_spectra(model, CROSS_ENTROPY, [batch], **OPTIONS | {"dtype": dtype})
    atol = 1e-12 if dtype == "float64" else 1e-6
    assert len(agree_with_dense(rows, model, CROSS_ENTROPY, [batch], atol=atol)) == 2


def test_asked_for_and_none_taken_is_said():
    model, batch = net("cnn")
    odd = SplitLoss(lambda m, b: m(b[0]), lambda z, b: z.sin().mean())
    with pytest.warns(UserWarning, match="gram=True takes none of the blocks"):
        estimate_spectra(model, odd, [batch], **OPTIONS)


@pytest.mark.parametrize(
    ("loss", "options"),
    [(cross_entropy, {}), (CROSS_ENTROPY, {"product": "differences"})],
    ids=["plain", "differences"],
)
def test_unasked_none_is_taken_where_none_can_be(loss, options):
    model, batch = net("cnn")
    rows = estimate_spectra(model, loss, [batch], **OPTIONS | {"gram": None} | options)
    assert set(rows["method"]) == {"slq"}


@pytest.mark.parametrize("asked", [0, 1, "no"])
def test_what_is_neither_true_nor_false_nor_none_is_refused(asked):
    with pytest.raises(UserError, match=r"gram is .*; choose one of True, False, None"):
        Settings(gram=asked)


@pytest.mark.parametrize("name", ["cnn", "gelu"])
def test_a_forecast_counts_the_passes_of_the_rows_in_place_of_products(name):
    model, batch = net(name)
    settings = Settings(**{k: v for k, v in OPTIONS.items() if k != "gram"}, gram=None)
    blocks = find_blocks(model)
    objective = Objective(copy.deepcopy(model), CROSS_ENTROPY, [batch])
    cost = forecast(objective, blocks, settings)
    rows = estimate_spectra(model, CROSS_ENTROPY, [batch], **OPTIONS)
    exact = rows["method"] == "exact"
    assert cost.num_gram == exact.sum()
    assert {cost.gram_passes} == set(rows.loc[exact, "num_products"])
    assert cost.num_products == rows.loc[~exact, "num_products"].sum()


def test_progress_is_told_by_rows(monkeypatch):
    monkeypatch.setattr(gram_matrix, "_TOGETHER", 2)
    model, batch = net("cnn")
    told = []
    objective = Objective(model, CROSS_ENTROPY, [batch])
    with opened(objective, find_blocks(model), Settings()) as hessian:
        taken = [i for i, *_ in gram.spectra(hessian, [0, 1], on_rows=lambda *a: told.append(a))]
    assert taken == [0, 1]
    assert told[0] == (0, 1)
    assert told[-3:] == [(0, 18), (6, 18), (12, 18)]


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_matrices_by_places_are_those_of_rows_that_are_written_out(chunk, monkeypatch):
    monkeypatch.setattr(gram_matrix, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    factors = [  # pieces of unlike ranks and places
        (torch.randn(k, p, 4, generator=generator), torch.randn(p, 5, generator=generator))
        for k, p in ((2, 3), (1, 3), (3, 2), (2, 3), (2, 1))
    ]
    A = torch.cat([torch.einsum("kpo,pi->koi", U, X).flatten(1) for U, X in factors]).double()
    total = torch.zeros(len(A), len(A), dtype=torch.float64)
    gram_matrix._add_by_places(total, factors)
    torch.testing.assert_close(total.tril(), (A @ A.T).tril(), rtol=0, atol=1e-5)
