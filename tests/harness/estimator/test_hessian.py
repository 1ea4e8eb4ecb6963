from __future__ import annotations

from functools import cache

import curvlinops
import pytest
import torch
from hessian_eigenthings import HessianOperator
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.errors import UserError
from harness.estimator.blocks import Block, Part, find_blocks
from harness.estimator.checks import fixed_arithmetic
from harness.estimator.cost import forecast
from harness.estimator.hessian import BlockHessian
from harness.estimator.objective import Objective
from harness.estimator.settings import Settings

from .models import cross_entropy, num_terms, problem, split

CPU = torch.device("cpu")
MODELS = ("cnn", "vit", "gpt", "mlp")


def dense_hessian(model, loss_fn, batch, partition, *, vectorize=True):
    """Return blocks and their dense Hessians by autograd on the whole flat parameter vector."""
    return _blocks_of(model, _whole_hessian(model, loss_fn, batch, vectorize), partition)


def exact_blocks(name, partition):
    """Return those of a problem under the usual loss."""
    return _blocks_of(problem(name)[0], _hessian_of_problem(name), partition)


def _whole_hessian(model, loss_fn, batch, vectorize=True):
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(vector):
        pieces = vector.split([s.numel() for s in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        wrapped = lambda x: torch.func.functional_call(model, values, (x,))  # noqa: E731
        return loss_fn(wrapped, batch)

    model.eval()
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, flat, vectorize=vectorize)


@cache  # it takes seconds
def _hessian_of_problem(name):
    model, batch = problem(name)
    return _whole_hessian(model, cross_entropy, batch)


def _blocks_of(model, H, partition):
    blocks, index = columns_of(model, partition)
    return blocks, [H[i][:, i] for i in index]


def columns_of(model, partition):
    """Return blocks and the places of their parameters in the flat vector of all."""
    numbers, start = {}, 0
    for name, p in model.named_parameters():
        numbers[name] = torch.arange(start, start + p.numel()).view(p.shape)
        start += p.numel()
    blocks = find_blocks(model, partition)
    return blocks, [
        torch.cat([p.of(numbers[p.parameter]).flatten() for p in b.parts]) for b in blocks
    ]


def block_hessian(model, loss_fn, batches, blocks, *, batch_weights=None, **options):
    settings = {"device": CPU, "dtype": torch.float64, "memory_budget": 2**30} | options
    objective = Objective(model, loss_fn, batches, batch_weights)
    with fixed_arithmetic(model):
        return BlockHessian(objective, blocks, Settings(**settings))


@pytest.mark.parametrize("partition", ["weights", "all", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_block_products_equal_the_dense_autograd_hessian(name, partition):
    model, batch = problem(name)
    blocks, expected = exact_blocks(name, partition)
    hessian = block_hessian(model, cross_entropy, [batch], blocks, batch_weights=num_terms)
    with fixed_arithmetic(model):
        for i, H in enumerate(expected):
            assert (hessian.dense(i) - H).norm() <= 1e-10 * max(H.norm(), 1e-3)


@pytest.mark.parametrize("sizes", [[3, 3], [1, 5], [4, 1, 1], [1] * 6])
@pytest.mark.parametrize("name", MODELS)
def test_products_do_not_depend_on_the_split_ragged_or_not(name, sizes):
    model, batch = problem(name)
    blocks = find_blocks(model)
    whole = block_hessian(model, cross_entropy, [batch], blocks, batch_weights=num_terms)
    parts = block_hessian(
        model, cross_entropy, split(batch, sizes), blocks, batch_weights=num_terms
    )
    requests = [(i, torch.randn(b.num_params).double()) for i, b in enumerate(blocks)]
    with fixed_arithmetic(model):
        pairs = zip(whole.products(requests), parts.products(requests), strict=True)
        for a, b in pairs:
            assert (a - b).norm() <= 1e-12 * max(a.norm(), 1e-6)


def test_rebuilt_graphs_give_the_same_products_as_kept_ones():
    model, batch = problem("gpt")
    blocks = find_blocks(model)
    batches, options = split(batch, [3, 3]), {"batch_weights": num_terms}
    kept = block_hessian(model, cross_entropy, batches, blocks, **options)
    options["memory_budget"] = kept.product_bytes
    rebuilt = block_hessian(model, cross_entropy, batches, blocks, **options)
    assert kept.keeps_graphs
    assert not rebuilt.keeps_graphs
    v = torch.ones(blocks[0].num_params, dtype=torch.float64)
    with fixed_arithmetic(model):
        assert torch.equal(kept.products([(0, v)])[0], rebuilt.products([(0, v)])[0])


def test_a_microbatch_that_does_not_fit_is_halved_and_the_products_stay():
    model, batch = problem("gpt")
    blocks = find_blocks(model)
    whole = block_hessian(model, cross_entropy, [batch], blocks, batch_weights=num_terms)
    budget = whole.product_bytes * 2 // 3
    halved = block_hessian(
        model, cross_entropy, [batch], blocks, batch_weights=num_terms, memory_budget=budget
    )
    assert (whole.microbatch_size, halved.microbatch_size) == (6, 3)
    v = torch.ones(blocks[1].num_params, dtype=torch.float64)
    with fixed_arithmetic(model):
        torch.testing.assert_close(whole.products([(1, v)]), halved.products([(1, v)]))
    with pytest.raises(UserError, match="raise the budget"):
        block_hessian(
            model, cross_entropy, [batch], blocks, batch_weights=num_terms, memory_budget=100
        )


def test_linear_regression_has_the_closed_form_hessian():
    X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    batches = split((X, torch.zeros(20).double()), [7, 7, 6])
    loss = lambda m, b: F.mse_loss(m(b[0])[:, 0], b[1])  # noqa: E731
    hessian = block_hessian(model, loss, batches, find_blocks(model))
    torch.testing.assert_close(hessian.dense(0), 2 * X.T @ X / 20)


def test_softmax_regression_has_the_closed_form_hessian():
    X = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.Linear(3, 4, bias=False).double()
    p = torch.softmax(X @ model.weight.detach().T, 1)
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    H = torch.einsum("bij,bk,bl->ikjl", S, X, X).reshape(12, 12) / 9
    batch = (X, torch.arange(9) % 4)
    hessian = block_hessian(model, cross_entropy, [batch], find_blocks(model))
    torch.testing.assert_close(hessian.dense(0), H)


def test_agrees_with_curvlinops():
    model, batch = problem("cnn")
    model.eval()
    reference = curvlinops.HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), split(batch, [4, 2])
    )
    hessian = block_hessian(model, cross_entropy, [batch], find_blocks(model, "full"))
    v = torch.randn(hessian.blocks[0].num_params, dtype=torch.float64)
    with fixed_arithmetic(model):
        torch.testing.assert_close(hessian.products([(0, v)])[0], reference @ v)


def test_agrees_with_hessian_eigenthings():
    model, batch = problem("mlp")
    reference = HessianOperator(model, [batch], cross_entropy)
    hessian = block_hessian(model, cross_entropy, [batch], find_blocks(model, "full"))
    v = torch.randn(hessian.blocks[0].num_params, dtype=torch.float64)
    torch.testing.assert_close(hessian.products([(0, v)])[0], reference.matvec(v))


def test_dropout_left_on_by_hand_is_found_and_named():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.noise = nn.Linear(36, 4), nn.Identity()
            self.noise.forward = lambda x: F.dropout(x, 0.5, training=True)

        def forward(self, x):
            return self.noise(self.layer(x.flatten(1)))

    model = Noisy().double()
    _, batch = problem("mlp")
    with pytest.raises(UserError, match=r"random numbers are drawn in noise \(aten\.\w*"):
        block_hessian(model, cross_entropy, [batch], find_blocks(model))


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_randomness_is_found_however_small_the_loss(scale):
    dropout = nn.Dropout()
    dropout.eval = lambda: dropout
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), dropout).double()
    _, batch = problem("mlp")
    loss = lambda m, b: scale * F.cross_entropy(F.dropout(m(b[0])), b[1])  # noqa: E731
    with pytest.raises(UserError, match="random numbers are drawn"):
        block_hessian(model, loss, [batch], find_blocks(model))


def test_a_batch_without_terms_counts_for_nothing():
    model, (x, y) = problem("mlp")
    loss = lambda m, b: (  # noqa: E731
        F.cross_entropy(m(b[0]), b[1], ignore_index=-1, reduction="sum") / count(b)
    )
    count = lambda b: max(1, int((b[1] >= 0).sum()))  # noqa: E731
    terms = lambda b: int((b[1] >= 0).sum())  # noqa: E731
    blocks = find_blocks(model)
    masked = [(x, y), (x, torch.full_like(y, -1))]
    hessian = block_hessian(model, loss, masked, blocks, batch_weights=terms)
    expected = block_hessian(model, loss, [(x, y)], blocks).dense(0)
    torch.testing.assert_close(hessian.dense(0), expected)


def test_a_caller_without_gradients_and_sparse_embeddings_change_nothing():
    tokens, labels = torch.arange(6) % 5, torch.arange(6) % 3
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    model = nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    expected = block_hessian(model, loss, [(tokens, labels)], find_blocks(model)).dense(0)
    model[0].sparse = True
    with torch.no_grad():
        hessian = block_hessian(model, loss, [(tokens, labels)], find_blocks(model))
        with fixed_arithmetic(model):
            assert torch.equal(hessian.dense(0), expected)
    assert model[0].sparse


def test_dependence_on_batch_mates_is_found():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(36, 4)

        def forward(self, x):
            y = self.layer(x.flatten(1))
            return y - y.mean(0)

    model = Centred().double()
    _, batch = problem("mlp")
    with pytest.raises(UserError, match="batch mates"):
        block_hessian(model, cross_entropy, [batch], find_blocks(model))


def test_batch_statistics_are_used_only_when_asked_and_buffers_stay():
    model, batch = problem("cnn")
    model.train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    evaluated = block_hessian(model, cross_entropy, [batch], find_blocks(model)).dense(0)
    trained = block_hessian(
        model, cross_entropy, [batch], find_blocks(model), norm_mode="train"
    ).dense(0)
    assert not torch.allclose(evaluated, trained)
    assert model.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_operations_without_a_second_derivative_are_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * 2

    model = nn.Linear(36, 4).double()
    _, batch = problem("mlp")
    loss = lambda m, b: F.cross_entropy(Once.apply(m(b[0].flatten(1)).square()), b[1])  # noqa: E731
    with pytest.raises(UserError, match="once_differentiable"):
        block_hessian(model, loss, [batch], find_blocks(model)).dense(0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b[0]), "must return the mean loss"),
        (lambda m, b: F.cross_entropy(m(b[0]), b[1]) * float("nan"), "finite loss"),
    ],
)
def test_a_loss_that_is_no_finite_scalar_is_refused(loss, message):
    model, batch = problem("mlp")
    with pytest.raises(UserError, match=message):
        block_hessian(model, loss, [batch], find_blocks(model))


@pytest.mark.parametrize("sizes", [[6], [4, 2]])
def test_terms_that_do_not_add_up_are_refused(sizes):
    model, batch = problem("mlp", 6)
    with pytest.raises(UserError, match="gives 1 for batch 0, and 2 for its halves together: pass"):
        block_hessian(
            model, cross_entropy, split(batch, sizes), find_blocks(model), batch_weights=lambda b: 1
        )


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], 3.0])
def test_bad_batch_weights_are_refused(weights):
    model, batch = problem("mlp")
    with pytest.raises(UserError, match="batch_weights"):
        block_hessian(
            model, cross_entropy, split(batch, [3, 3]), find_blocks(model), batch_weights=weights
        )


def test_overlapping_and_unknown_blocks_are_refused():
    model, batch = problem("mlp")
    block = find_blocks(model)[0]
    with pytest.raises(UserError, match="overlaps"):
        block_hessian(model, cross_entropy, [batch], [block, block])
    twins = [Block("w", "mlp", (Part(f"{i}.weight"),), 1, (1,)) for i in (1, 3)]
    with pytest.raises(UserError, match="two blocks have the name 'w'"):
        block_hessian(model, cross_entropy, [batch], twins)
    model.get_parameter(block.parts[0].parameter).requires_grad_(False)
    with pytest.raises(UserError, match="is frozen"):
        block_hessian(model, cross_entropy, [batch], [block])
    unknown = Block("x", "mlp", (Part("x"),), 1, (1,))
    with pytest.raises(UserError, match="does not have"):
        block_hessian(model, cross_entropy, [batch], [unknown])


class Squeezing(nn.Module):
    """Takes the dimension of the batch away where that is one."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(F.adaptive_avg_pool2d(self.conv(x), 1).squeeze()))


@pytest.mark.parametrize("norm_mode", ["eval", "train"])
def test_models_that_fail_on_one_sample_are_sized_and_forecast_on_two(norm_mode):
    batch = (torch.randn(8, 1, 5, 5), torch.arange(8) % 3)
    model = Squeezing()
    blocks = find_blocks(model)
    options = {"dtype": torch.float32, "norm_mode": norm_mode}
    hessian = block_hessian(model, cross_entropy, [batch], blocks, **options)
    settings = Settings(num_probes=2, num_steps=3, norm_mode=norm_mode)
    cost = forecast(Objective(model, cross_entropy, [batch]), blocks, settings)
    with fixed_arithmetic(model), FlopCounterMode(display=False) as counter:
        hessian.products([(1, torch.ones(12))])
    assert cost.pass_flops + cost.block_flops[1] == counter.get_total_flops()
    if norm_mode == "eval":
        options["memory_budget"] = hessian.product_bytes - 1
        halved = block_hessian(model, cross_entropy, [batch], blocks, **options)
        assert halved.microbatch_size == 4


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precisions_set_in_either_way_are_overridden_and_come_back(precision):
    def state():
        backends = (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul)
        return [b.fp32_precision for b in backends], cudnn.enabled, mkldnn.enabled

    cuda, cudnn, mkldnn = (getattr(torch.backends, n) for n in ("cuda", "cudnn", "mkldnn"))
    if not hasattr(cuda.matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has one way")
    matmul, older = cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()
    try:
        for value in ("tf32", "ieee"):
            cuda.matmul.fp32_precision = value
            before = state()
            with fixed_arithmetic(nn.LSTM(2, 2), precision):
                assert cuda.matmul.fp32_precision == ("ieee" if precision == "highest" else "tf32")
                with cudnn.flags(enabled=False):  # raises where older and newer settings differ
                    pass
            assert state() == before
    finally:
        cuda.matmul.fp32_precision = matmul
        assert torch.get_float32_matmul_precision() == older
