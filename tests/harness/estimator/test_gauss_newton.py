"""The Gauss-Newton matrix, against J^T (d2 criterion) J by torch.func and against curvlinops."""

from __future__ import annotations

from functools import cache

import curvlinops
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from harness import SplitLoss, estimate_spectra
from harness.errors import UserError
from harness.estimator.blocks import find_blocks
from harness.estimator.checks import fixed_arithmetic

from .models import cross_entropy, num_terms, problem, split
from .test_hessian import block_hessian, columns_of

CROSS_ENTROPY = SplitLoss(
    lambda model, batch: model(batch[0]),
    lambda z, batch: F.cross_entropy(z.flatten(0, -2), batch[1].flatten(), ignore_index=-100),
)
SQUARES = SplitLoss(
    lambda model, batch: model(batch[0]),
    lambda z, batch: F.mse_loss(z, F.one_hot(batch[1], z.shape[-1]).to(z)),
)
LOSSES = {"cross entropy": CROSS_ENTROPY, "mse": SQUARES}


def factors(model, loss, batch):
    """Return J by all parameters and the criterion's Hessian, dense."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def outputs(vector):
        pieces = vector.split([s.numel() for s in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        return loss.outputs(lambda x: torch.func.functional_call(model, values, (x,)), batch)

    model.eval()
    with fixed_arithmetic(model):
        z = outputs(flat).detach()
        J = torch.autograd.functional.jacobian(outputs, flat).reshape(z.numel(), -1)
        of_z = lambda flat: loss.criterion(flat.view_as(z), batch)  # noqa: E731
        return J, torch.autograd.functional.hessian(of_z, z.flatten())


def gauss_newton(model, loss, batches, blocks, **options):
    return block_hessian(model, loss, batches, blocks, operator="ggn", **options)


@cache
def oracle(name, loss):
    """Return a problem with its factors."""
    model, batch = problem(name, 2)
    return model, batch, *factors(model, LOSSES[loss], batch)


@pytest.mark.parametrize(
    ("name", "loss", "sizes"),
    [
        ("gpt", "cross entropy", [2]),  # tied weights, slices, ignored targets
        ("gpt", "cross entropy", [1, 1]),
        ("cnn", "mse", [1, 1]),
        ("mlp", "cross entropy", [2]),
    ],
)
def test_products_are_those_of_the_dense_matrix(name, loss, sizes):
    model, batch, J, H = oracle(name, loss)
    blocks, places = columns_of(model, "weights")
    options = {"batch_weights": num_terms}
    found = gauss_newton(model, LOSSES[loss], split(batch, sizes), blocks, **options)
    vectors = [torch.randn(b.num_params, dtype=torch.float64) for b in blocks]
    with fixed_arithmetic(model):
        products = found.products(list(enumerate(vectors)))
    for columns, v, product in zip(places, vectors, products, strict=True):
        expected = J[:, columns].T @ (H @ (J[:, columns] @ v))
        assert (product - expected).norm() <= 1e-11 * expected.norm()


def test_a_microbatch_that_does_not_fit_is_halved_and_the_products_stay():
    model, batch = problem("gpt")
    blocks, options = find_blocks(model), {"batch_weights": num_terms}
    whole = gauss_newton(model, CROSS_ENTROPY, [batch], blocks, **options)
    options["memory_budget"] = whole.product_bytes * 2 // 3
    halved = gauss_newton(model, CROSS_ENTROPY, [batch], blocks, **options)
    assert (whole.microbatch_size, halved.microbatch_size) == (6, 3)
    v = torch.ones(blocks[1].num_params, dtype=torch.float64)
    with fixed_arithmetic(model):
        torch.testing.assert_close(whole.products([(1, v)]), halved.products([(1, v)]))


def test_curvlinops_has_the_same_matrix():
    model, batch = problem("mlp")
    model.eval()
    parameters = list(model.parameters())
    parts = split(batch, [4, 2])
    other = curvlinops.GGNLinearOperator(model, nn.CrossEntropyLoss(), parameters, parts)
    found = gauss_newton(model, CROSS_ENTROPY, [batch], find_blocks(model, "full"))
    with fixed_arithmetic(model):
        v = torch.randn(found.blocks[0].num_params, dtype=torch.float64)
        torch.testing.assert_close(found.products([(0, v)])[0], other @ v)


def test_its_gradient_is_that_of_the_loss():
    model, batch = problem("gpt")
    options = {"batch_weights": num_terms}
    blocks = find_blocks(model)
    ours = gauss_newton(model, CROSS_ENTROPY, [batch], blocks, **options)
    other = block_hessian(model, cross_entropy, [batch], blocks, **options)
    with fixed_arithmetic(model):
        found, expected = ours.gradient(), other.gradient()
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g)


def test_a_split_loss_gives_the_rows_of_the_plain_one():
    model, batch = problem("mlp")
    options = {"num_probes": 1, "num_steps": 2, "exact_size": 0, "batch_weights": num_terms}
    plain, parts = (
        estimate_spectra(model, loss, [batch], **options) for loss in (cross_entropy, CROSS_ENTROPY)
    )
    assert plain["alphas"].tolist() == parts["alphas"].tolist()
    assert set(plain["operator"]) == {"hessian"}


def test_rows_say_ggn_and_a_linear_criterion_has_none():
    model, batch = problem("mlp")
    mean = SplitLoss(lambda m, b: m(b[0]), lambda z, b: z.mean())
    options = {"num_probes": 2, "num_steps": 2, "exact_size": 0, "operator": "ggn"}
    rows = estimate_spectra(model, mean, [batch], **options)
    assert set(rows["operator"]) == {"ggn"}
    assert set(rows["status"]) == {"zero"}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (cross_entropy, r"operator='ggn' needs the loss in two parts: pass harness.SplitLoss\("),
        (SplitLoss(lambda m, b: (m(b[0]),), lambda z, b: z[0].mean()), "returned tuple; it must"),
        (SplitLoss(lambda m, b: m(b[0]), lambda z, b: b[0].mean()), "does not depend on the out"),
    ],
)
def test_losses_that_are_not_in_two_parts_are_refused_in_a_line(loss, message):
    model, batch = problem("mlp")
    with pytest.raises(UserError, match=message):
        estimate_spectra(model, loss, [batch], operator="ggn")
