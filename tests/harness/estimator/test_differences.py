"""Products by differences of gradients: against exact ones, and where there are no exact ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from harness import estimate_spectra, find_blocks
from harness.errors import UserError
from harness.estimator.cost import forecast
from harness.estimator.objective import Objective
from harness.estimator.operators import opened
from harness.estimator.settings import Settings

from .models import cross_entropy, num_terms, problem, split

# How far a product is from the exact one, and the error that is stated is at most so small.
TOLERANCES = {"float64": 1e-6, "float32": 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", ["cnn", "vit", "gpt"])
def test_products_are_the_exact_ones_within_the_error_that_is_stated(name, dtype):
    model, batch = problem(name)
    blocks = find_blocks(model)
    objective = Objective(model, cross_entropy, split(batch, (4, 2)), num_terms)
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(b.num_params, generator=generator).double() for b in blocks]
    requests = [(i, v / v.norm()) for i, v in enumerate(vectors)]
    with opened(objective, blocks, Settings(dtype="float64")) as hessian:
        exact = hessian.products(requests)
    here = Settings(dtype=dtype, product="differences")
    with opened(objective, blocks, here) as hessian:
        given = [(i, v.to(hessian.dtype)) for i, v in requests]
        found = hessian.products(given)
        again = hessian.products(given)
        errors = [hessian.product_error(i) for i in range(len(blocks))]
    for product, same, expected, error in zip(found, again, exact, errors, strict=True):
        assert torch.equal(product, same)
        apart = float((product.double() - expected).norm() / expected.norm())
        assert apart <= 2 * error + 1e-9
        assert error < TOLERANCES[dtype]


def test_rows_say_how_products_were_made_and_metrics_agree_with_exact_ones():
    model, batch = problem("gpt")
    model.float()
    options = {"num_probes": 3, "num_steps": 8, "exact_size": 20, "batch_weights": num_terms}
    exact = estimate_spectra(model, cross_entropy, [batch], **options)
    rows = estimate_spectra(model, cross_entropy, [batch], product="differences", **options)
    assert set(exact["product"]) == {"autograd"}
    assert exact["product_error"].isna().all()
    assert set(rows["product"]) == {"differences"}
    assert rows["product_error"].between(0, 0.03).all()
    for one, other, error in zip(exact["nodes"], rows["nodes"], rows["product_error"], strict=True):
        assert abs(max(one) - max(other)) <= 2 * error * np.abs(one).max()


class FlashLike(torch.autograd.Function):
    """As fused kernels are: a derivative, and none of it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class Once(nn.Module):
    def forward(self, x):
        return FlashLike.apply(x)


def test_a_model_without_a_second_derivative_has_the_spectrum_of_its_twin_that_has_one():
    def network(middle):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), middle, nn.Linear(3, 2)).double()

    def loss(model, batch):
        return mse_loss(model(batch), batch[:, :2])

    batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).double()
    options = {"blocks": "all", "dtype": "float64"}
    with pytest.raises(UserError, match="once_differentiable"):
        estimate_spectra(network(Once()), loss, [batch], **options)
    rows = estimate_spectra(network(Once()), loss, [batch], product="differences", **options)
    twin = estimate_spectra(network(nn.Tanh()), loss, [batch], **options)
    for found, expected in zip(rows["nodes"], twin["nodes"], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-7 * np.abs(expected).max())


def steep(curvature):
    """Return a loss with much more slope than curvature, by the weights of a linear model."""
    return lambda model, batch: model(batch).mean() + curvature * model(batch).square().mean()


def linear_net():
    torch.manual_seed(0)
    return nn.Linear(8, 2), torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


def test_steps_at_which_rounding_alone_is_left_are_not_taken_for_agreement():
    model, batch = linear_net()
    options = {"dtype": "float32", "num_probes": 1}
    exact, rows = (
        estimate_spectra(model, steep(1e-4), [batch], product=product, **options)
        for product in ("autograd", "differences")
    )
    [found], [expected] = rows["nodes"], exact["nodes"]
    [error] = rows["product_error"]
    assert 0 < error < 0.2
    assert abs(max(found) - max(expected)) <= 2 * error * max(expected)


def test_a_block_that_differences_can_not_tell_from_zero_says_so():
    model, batch = linear_net()
    with pytest.warns(UserWarning, match=r"float32 are rounding alone.*take dtype float64"):
        [row] = estimate_spectra(
            model, steep(1e-6), [batch], product="differences", num_probes=1
        ).to_dict("records")
    assert row["status"] == "zero"
    assert "second derivative" not in row["reason"]


def test_the_error_is_of_a_random_direction_though_the_first_may_change_nothing():
    model, batch = linear_net()
    batch = batch.clone()
    batch[:, 0] = 0.0  # as a pixel of the border: the first unit vector of the block
    [row] = estimate_spectra(
        model, steep(1.0), [batch], product="differences", num_probes=1
    ).to_dict("records")
    assert row["method"] == "exact"
    assert row["product_error"] > 0


def test_a_block_whose_gradient_does_not_change_is_zero():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.zero_()
    batch = torch.ones(5, 4)
    rows = estimate_spectra(
        model, lambda m, b: m(b).mean(), [batch], product="differences", num_probes=1, num_steps=2
    )
    assert list(rows["status"]) == ["zero", "zero"]


def test_the_model_stays_as_it_was_and_the_forecast_counts_two_gradients_a_product():
    model, batch = problem("mlp")
    before = {name: p.clone() for name, p in model.named_parameters()}
    objective, blocks = Objective(model, cross_entropy, [batch], num_terms), find_blocks(model)
    exact, by_differences = (
        forecast(objective, blocks, Settings(product=product))
        for product in ("autograd", "differences")
    )
    assert by_differences.num_products == exact.num_products
    assert by_differences.pass_flops == 0
    # A pass goes backwards to all blocks, a gradient to one.
    assert max(by_differences.block_flops) <= 2 * exact.pass_flops
    assert min(by_differences.block_flops) > exact.pass_flops
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_differences_of_the_gauss_newton_matrix_are_refused():
    with pytest.raises(UserError, match="operator ggn takes first derivatives alone"):
        Settings(operator="ggn", product="differences")
