"""Products that cost a layer, against the ordinary ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from harness import SplitLoss, estimate_spectra
from harness.estimator import shortcuts
from harness.estimator.blocks import find_blocks
from harness.estimator.objective import Objective
from harness.estimator.operators import opened
from harness.estimator.settings import Settings

from .models import problem, split
from .test_gauss_newton import CROSS_ENTROPY, SQUARES
from .test_gram import Twice, gelu_mlp, net

MANY = 1000


class Sequences(nn.Module):
    """Convolutions of one dimension after a linear layer on each place, written into in place."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.conv = nn.Conv1d(6, 5, 3, padding="same", padding_mode="circular", dilation=2)
        self.grouped = nn.Conv1d(5, 10, 2, stride=2, groups=5, bias=False)
        self.head = nn.Linear(40, 4)

    def forward(self, x):
        x = F.leaky_relu(self.inner(x[:, 0]), inplace=True)
        x = F.relu(self.conv(input=x), inplace=True)
        return self.head(self.grouped(x).flatten(1))


class Mates(nn.Module):
    """A layer after which samples depend on each other."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(36, 5), nn.Linear(5, 4)

    def forward(self, x):
        x = self.first(x.flatten(1)).relu()
        return self.head(x - x.mean(0, keepdim=True))


def prepared(model, batches, loss=CROSS_ENTROPY, num_products=MANY, **settings):
    """Return the Hessian of all weights with its shortcuts, and that without."""
    blocks = find_blocks(model)
    both = []
    for prepare in (True, False):
        how = Settings(dtype="float64", device="cpu", **settings)
        with opened(Objective(model, loss, batches), blocks, how) as hessian:
            if prepare:
                shortcuts.prepare(hessian, range(len(blocks)), num_products)
        both.append(hessian)
    return both


def names(hessian):
    return [hessian.blocks[i].name for i in sorted(hessian.shortcuts)]


def requests(hessian):
    generator = torch.Generator().manual_seed(1)
    sizes = [b.num_params for b in hessian.blocks]
    return [(i, torch.randn(n, generator=generator).double()) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("sizes", [[6], [4, 2]])
@pytest.mark.parametrize("loss", [CROSS_ENTROPY, SQUARES], ids=["cross-entropy", "squares"])
@pytest.mark.parametrize("kind", ["cnn", "sequences"])
def test_a_network_of_kinks_has_them_at_all_weights(kind, loss, sizes):
    model, batch = net("cnn")
    if kind == "sequences":
        torch.manual_seed(3)
        model = Sequences().double()
    quick, ordinary = prepared(model, split(batch, sizes), loss)
    assert names(quick) == [b.name for b in quick.blocks]
    for ours, expected in zip(
        quick.products(requests(quick)), ordinary.products(requests(quick)), strict=True
    ):
        assert expected.norm() > 0
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("build", "settings", "expected"),
    [
        (gelu_mlp, {}, ["3.weight", "4.weight"]),
        (gelu_mlp, {"operator": "ggn"}, ["1.weight", "3.weight", "4.weight"]),
        (Twice, {}, ["first.weight", "head.weight"]),
        (Twice, {"operator": "ggn"}, ["first.weight", "head.weight"]),
        (Mates, {"norm_mode": "train"}, ["head.weight"]),
    ],
)
def test_others_have_them_where_the_ordinary_product_is_the_same(build, settings, expected):
    _, batch = net("cnn")
    torch.manual_seed(2)
    quick, ordinary = prepared(build().double(), [batch], **settings)
    assert names(quick) == expected
    for ours, product in zip(
        quick.products(requests(quick)), ordinary.products(requests(quick)), strict=True
    ):
        torch.testing.assert_close(ours, product, rtol=1e-12, atol=1e-14)


def test_rows_are_those_without_them():
    model, batch = net("cnn")
    plain = lambda m, b: CROSS_ENTROPY(m, b)  # noqa: E731
    of = {"num_probes": 3, "num_steps": 8, "exact_size": 40, "dtype": "float64"}
    quick, ordinary = (
        estimate_spectra(model, loss, [batch], **of) for loss in (CROSS_ENTROPY, plain)
    )
    assert set(quick["method"]) == {"slq", "exact"}
    for column in ("alphas", "betas", "nodes"):
        for a, b in zip(quick[column], ordinary[column], strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("why", "expected"),
    [
        ("few products", []),
        ("plain loss", []),
        ("a loss of sums", []),
        ("little memory", ["7.weight"]),
        ("batch statistics", ["4.weight", "7.weight"]),  # those behind them
    ],
)
def test_none_where_they_do_not_pay_or_cannot_be(why, expected):
    model, batch = net("cnn")
    loss, options = CROSS_ENTROPY, {}
    if why == "few products":
        options["num_products"] = 7  # with four outputs
    elif why == "plain loss":
        loss = lambda m, b: CROSS_ENTROPY(m, b)  # noqa: E731
    elif why == "batch statistics":
        options["norm_mode"] = "train"
    elif why == "a loss of sums":
        loss = SplitLoss(lambda m, b: m(b[0]).sum(1), lambda z, b: z.square().mean())
    elif why == "little memory":
        with opened(Objective(model, loss, [batch]), find_blocks(model), Settings()) as hessian:
            options["memory_budget"] = 2 * hessian.product_bytes
    quick, _ = prepared(model, [batch], loss, **options)
    assert names(quick) == expected


def test_graphs_are_neither_kept_nor_made_where_all_have_them():
    model, batch = net("cnn")
    quick, ordinary = prepared(model, split(batch, [3, 3]))
    assert ordinary.keeps_graphs
    assert not quick._kept
    passes = []
    handle = quick.model.register_forward_hook(lambda *_: passes.append(1))
    quick.products(requests(quick))
    handle.remove()
    assert passes == []


def test_a_product_counts_the_operations_of_a_layer():
    layers = [m for _ in range(5) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 3)).double()
    counts = []
    for hessian in prepared(model, [(torch.randn(4, 8, 4, 4), torch.tensor([0, 1, 2, 0]))]):
        hessian.products(requests(hessian))  # the graph is kept from here on
        with FlopCounterMode(display=False) as counter:
            hessian.products(requests(hessian))
        counts.append(counter.get_total_flops())
    assert counts[0] < counts[1] / 2


def test_memory_that_runs_out_gives_them_up():
    model, batch = net("cnn")
    quick, ordinary = prepared(model, [batch])

    def fails(vector):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    quick.shortcuts = dict.fromkeys(quick.shortcuts, fails)
    found = quick.products(requests(quick))
    assert not quick.shortcuts
    torch.testing.assert_close(found, ordinary.products(requests(quick)))


def test_a_transformer_has_them_behind_its_last_bend_alone():
    model, batch = problem("vit", 4)
    quick, _ = prepared(model, [batch])
    assert names(quick) == ["blocks.0.mlp.2.weight", "head.weight"]


class Routed(nn.Module):
    """Experts that are given some of the samples, and a layer of a class of one's own."""

    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    def __init__(self):
        super().__init__()
        self.first = self.Pair(36, 5)
        self.experts = nn.ModuleList(nn.Linear(5, 4) for _ in range(2))

    def forward(self, x):
        x, _ = self.first(x.flatten(1))
        y = x.new_zeros(len(x), 4)
        for k, expert in enumerate(self.experts):
            (mine,) = torch.where((x[:, 0] > 0).long() == k)
            y = y.index_put((mine,), expert(x[mine])) if len(mine) else y
        return y


ROW = SplitLoss(lambda m, b: m(b[0])[None], lambda z, b: F.cross_entropy(z[0], b[1]))
LINEAR = SplitLoss(lambda m, b: m(b[0]), lambda z, b: z[:, 0].mean())


@pytest.mark.parametrize(
    ("build", "loss"),
    [
        (Routed, CROSS_ENTROPY),
        (gelu_mlp, ROW),  # the first dimension is that of samples of a single one alone
        (gelu_mlp, LINEAR),
        (lambda: torch.jit.script(gelu_mlp().double()), CROSS_ENTROPY),
    ],
    ids=["experts", "row", "linear criterion", "scripted"],
)
def test_odd_models_keep_their_ordinary_products(build, loss):
    _, batch = net("cnn")
    torch.manual_seed(2)
    quick, ordinary = prepared(build().double(), [batch], loss)
    assert not quick.shortcuts
    torch.testing.assert_close(quick.products(requests(quick)), ordinary.products(requests(quick)))


def test_a_second_look_leaves_them_and_their_memory_as_they_are():
    model, batch = net("cnn")
    quick, _ = prepared(model, [batch])
    before = quick.shortcuts, quick.most_bytes
    shortcuts.prepare(quick, range(len(quick.blocks)), MANY)
    assert (quick.shortcuts, quick.most_bytes) == before
