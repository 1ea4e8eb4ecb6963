"""Each predictor against an oracle: a dense Hessian, per-sample gradients, or a closed form."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call, hessian

from harness import tasks
from harness.estimator.settings import Settings
from harness.predictors import FAMILIES, PREDICTORS
from harness.predictors.curvature import (
    _cauchy,
    _rademacher,
    diagonal_ratio,
    largest_eigenvalue,
    linf_smoothness,
    of_blocks,
    of_full,
    row_norms,
    sharpness,
)
from harness.predictors.dummies import label_imbalance, of_problem
from harness.predictors.gradients import density, gini, gradients_of, noise_share, of_gradients
from harness.registry import get
from harness.training import Problem
from tests.harness.estimator import models

SETTINGS = Settings(dtype="float64", device="cpu")


def made_up(num_samples: int = 40) -> Problem:
    """A perceptron of 291 parameters in float64 as the problem of an entry."""
    model, batch = models.problem("mlp", num_samples)
    batches = models.split(batch, [num_samples // 2, num_samples - num_samples // 2])
    return Problem(
        entry=get("cnn-digits"),
        stage="init",
        model=model,
        loss_fn=models.cross_entropy,
        batches=batches,
        task=tasks.get("digits"),
        step=0,
        progress=0.0,
        init_seed=1,
        train_run="",
        batch_size=num_samples,
        microbatch_size=num_samples // 2,
        num_terms=num_samples,
        data_source="made up",
    )


@pytest.fixture(scope="module")
def problem() -> Problem:
    return made_up()


@pytest.fixture(scope="module")
def dense(problem):
    """The gradient and the Hessian of all parameters, by torch.func."""
    whole = tuple(torch.cat(t) for t in zip(*problem.batches, strict=True))
    named = {n: p.detach() for n, p in problem.model.named_parameters()}
    shapes = {n: p.shape for n, p in named.items()}

    def loss(flat):
        pieces = flat.split([s.numel() for s in shapes.values()])
        named = {n: p.view(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
        return models.cross_entropy(lambda x: functional_call(problem.model, named, (x,)), whole)

    w = torch.cat([p.flatten() for p in named.values()])
    return torch.func.grad(loss)(w), hessian(loss)(w)


@pytest.fixture(scope="module")
def full(problem):
    return of_full(problem, SETTINGS)


def contrast(a: float, b: float) -> float:
    return (a - b) / math.hypot(a, b) / math.sqrt(2)


def test_sharpness_is_the_curvature_along_the_gradient_and_its_sign(dense, full):
    g, H = dense
    s = g.sign()
    b = float(s @ H @ s / len(s))
    assert full["sign_sharpness"].value == pytest.approx(b, rel=1e-9)
    a = float(g @ H @ g / (g @ g))
    assert full["sharpness_contrast"].value == pytest.approx(contrast(a, b), rel=1e-9)
    spent = [full[name].num_full_products for name in ("sign_sharpness", "sharpness_contrast")]
    assert spent == [1, 2]


def test_a_coordinate_without_a_gradient_is_no_part_of_the_step():
    g = torch.tensor([3.0, 0.0, -4.0])
    H = torch.diag(torch.tensor([1.0, 100.0, 2.0]))
    found = sharpness(g, H @ g, H @ g.sign())
    assert found["sign_sharpness"].value == pytest.approx(1.5)
    assert found["sharpness_contrast"].value == pytest.approx(contrast((9 + 32) / 25, 1.5))


def test_the_contrast_ranks_as_the_ratio_and_goes_on_where_a_curvature_is_negative():
    g = torch.tensor([1.0, 3.0])

    def of(first: float, second: float) -> float:
        Hg = torch.tensor([first, second]) * g
        Hs = torch.tensor([first, second]) * g.sign()
        return sharpness(g, Hg, Hs)["sharpness_contrast"].value

    # Along g they count 1 : 9, along its sign 1 : 1.
    found = [of(1, -4), of(4, 0), of(4, 1), of(1, 1), of(1, 4), of(0, 4), of(-4, 4), of(-4, 2)]
    assert found[1:] == sorted(found[1:])
    assert found[3] == pytest.approx(0)
    assert found[6] == pytest.approx(1 / math.sqrt(2))
    assert found[7] > found[6]
    assert -1 < found[0] < 0
    assert sharpness(g, 0 * g, 0 * g)["sharpness_contrast"].value is None
    assert sharpness(0 * g, g, g)["sign_sharpness"].reason == "the gradient is zero"


def test_the_diagonal_is_hutchinsons_and_its_ratio_that_of_the_dense_one(problem, dense, full):
    g, H = dense
    z = torch.stack(_rademacher(problem, g)) * len(H) ** 0.5
    assert torch.allclose(z.abs(), torch.ones(()).double())
    estimate = (z * (z @ H)).mean(0).abs().numpy()
    found = full["diagonal_ratio"]
    assert found.value == pytest.approx(estimate.max() / np.median(estimate), rel=1e-6)
    # A diagonal matrix has no error.
    D = torch.linspace(1, 9, len(H), dtype=torch.float64)
    unit = list(z / len(H) ** 0.5)
    assert diagonal_ratio(unit, [D * v for v in unit]).value == pytest.approx(9 / 5)


def test_half_a_diagonal_of_zeros_has_no_ratio():
    probe = torch.ones(4) / 2
    assert "zero" in diagonal_ratio([probe], [torch.tensor([1.0, 0, 0, 0])]).reason


def test_linf_smoothness_is_that_of_the_dense_hessian_within_its_error(problem, dense, full):
    g, H = dense
    found = full["linf_smoothness"]
    v = torch.stack(_cauchy(problem, g))
    top = float(torch.linalg.eigvalsh(H).abs().max())
    estimate = float((v @ H).abs().quantile(0.5, dim=0).sum()) / top
    assert found.value == pytest.approx(estimate, rel=2e-2)  # λmax to 1 %
    exact = float(H.abs().sum()) / len(H) / top
    assert abs(found.value - exact) < 4 * found.standard_error
    assert found.standard_error < 0.2 * exact
    assert 50 < found.num_full_products <= 80


def test_row_norms_are_too_high_by_the_medians_bias_alone():
    rng = np.random.default_rng(0)
    H = rng.standard_normal((6, 6)) ** 3
    ratios = [row_norms(rng.standard_cauchy((50, 6)) @ H.T) / np.abs(H).sum(1) for _ in range(2000)]
    assert np.mean(ratios) == pytest.approx(1 + math.pi**2 / (8 * 52), abs=0.01)


def test_a_zero_hessian_has_no_linf_smoothness():
    assert linf_smoothness([torch.zeros(3)] * 50, 0.0, 1).reason == "the Hessian is zero"


def test_the_largest_eigenvalue_is_found_to_one_per_cent_whatever_its_sign():
    values = torch.cat([torch.linspace(-1, 1, 300), torch.tensor([-4.0])]).double()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(301, generator=generator, dtype=torch.float64)
    found, steps = largest_eigenvalue(lambda v: values * v, start)
    assert found == pytest.approx(4, rel=1e-2)
    assert steps < 20


def test_spreads_are_those_of_the_dense_blocks(problem, dense):
    blocks = problem.blocks("weights")
    _, H = dense
    starts = np.cumsum([0, *(p.numel() for p in problem.model.parameters())])
    names = [n for n, _ in problem.model.named_parameters()]
    own = []
    for block in blocks:
        i = names.index(block.name)
        own.append(H[starts[i] : starts[i + 1], starts[i] : starts[i + 1]])
    found = of_blocks(problem, SETTINGS)
    largest = [math.log10(float(torch.linalg.eigvalsh(B).abs().max())) for B in own]
    assert found["lambda_max_spread"].value == pytest.approx(np.std(largest), abs=2e-3)
    assert found["lambda_max_spread"].num_products == 10
    rms = [math.log10(float(B.norm()) / len(B) ** 0.5) for B in own]
    assert found["lambda_rms_spread"].value == pytest.approx(
        np.std(rms), abs=4 * found["lambda_rms_spread"].standard_error
    )
    assert found["lambda_rms_spread"].num_products == 3


def test_gradients_give_spread_gini_and_density_of_the_whole_gradient(problem, dense):
    g, _ = dense
    found = of_gradients(problem, SETTINGS, training_batch=10)
    parts = g.split([252, 7, 28, 4])
    rms = np.array([float(parts[i].square().mean().sqrt()) for i in (0, 2)])  # weights alone
    assert found["gradient_rms_spread"].value == pytest.approx(np.log10(rms).std())
    assert found["gradient_rms_gini"].value == pytest.approx(abs(np.diff(rms))[0] / rms.sum() / 2)
    expected = float(g.abs().sum() ** 2 / (len(g) * g.square().sum()))
    assert found["gradient_density"].value == pytest.approx(expected)


def test_density_is_one_for_signs_and_1_over_d_for_one_coordinate():
    assert density(torch.tensor([1.0, -1, 1, 1])).value == 1
    assert density(torch.tensor([0.0, 5, 0, 0])).value == 0.25
    assert density(torch.zeros(4)).reason == "the gradient is zero"


def test_gini_is_the_mean_difference_over_twice_the_mean():
    x = np.array([0.1, 3.0, 0.2, 7.0])
    expected = np.abs(x[:, None] - x).mean() / (2 * x.mean())
    assert gini(x) == pytest.approx(expected)


def test_the_noise_is_without_bias():
    problem = made_up(64)
    x = torch.cat([x for x, _ in problem.batches])
    y = torch.zeros(64, dtype=torch.long)  # one class: a gradient above its noise
    parameters = list(problem.model.parameters())
    losses = [models.cross_entropy(problem.model, (x[i, None], y[i, None])) for i in range(64)]
    gradients = [torch.autograd.grad(loss, parameters) for loss in losses]
    each = torch.stack([torch.cat([g.flatten() for g in found]) for found in gradients])
    variance = float(each.var(dim=0).sum())
    # Over orders of the samples the estimate from sixteen chunks is that from single ones.
    estimates = []
    for seed in range(20):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        found = gradients_of(replace(problem, batches=[(x[order], y[order])]), SETTINGS)
        estimates.append(found.term_variance)
    assert np.mean(estimates) == pytest.approx(variance, rel=0.05)
    assert torch.allclose(found.flat, each.mean(0))
    signal = float(each.mean(0).square().sum()) - found.term_variance / 64
    ratio = found.term_variance / 8 / signal
    assert noise_share(found, 8).value == pytest.approx(ratio / (1 + ratio))
    assert noise_share(replace(found, num_terms=1), 8).value == 1


def test_chunks_count_by_their_terms():
    problem = made_up(37)
    found = gradients_of(problem, SETTINGS)
    x, y = (torch.cat(t) for t in zip(*problem.batches, strict=True))
    parameters = list(problem.model.parameters())
    chunks = list(zip(x.split(3), y.split(3), strict=True))
    assert [len(y) for _, y in chunks][-2:] == [3, 1]
    means = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(models.cross_entropy(problem.model, c), parameters)
                ]
            )
            for c in chunks
        ]
    )
    terms = torch.tensor([float(len(y)) for _, y in chunks]).double()
    mean = terms @ means / 37
    expected = float(terms @ (means - mean).square().sum(1)) / (len(chunks) - 1)
    assert found.term_variance == pytest.approx(expected)
    assert torch.allclose(found.flat, mean)


def test_label_imbalance_is_the_divergence_from_balanced_labels():
    assert label_imbalance(math.log(4), 4).value == pytest.approx(0, abs=1e-12)
    assert label_imbalance(0.0, 4).value == pytest.approx(math.log(4))


def test_targets_that_are_no_classes_have_no_imbalance_and_say_so():
    model, _ = models.problem("mlp")
    found = of_problem(model, None, None)
    assert found["label_imbalance"].value is found["log_classes"].value is None
    assert found["label_imbalance"].reason == "the targets are no classes"


@pytest.mark.parametrize(("name", "attends"), [("gpt", 1), ("vit", 1), ("cnn", 0), ("mlp", 0)])
def test_dummies_see_attention_and_count_parameters_and_classes(name, attends):
    model, _ = models.problem(name)
    found = of_problem(model, 0.0, 100)
    num_params = sum(p.numel() for p in model.parameters())
    assert found["has_attention"].value == attends
    assert found["log_params"].value == pytest.approx(math.log10(num_params))
    assert found["log_classes"].value == 2


def test_the_list_names_each_predictor_once_with_its_cost_and_direction():
    names = [p.name for p in PREDICTORS]
    assert len(set(names)) == len(names)
    assert {p.family for p in PREDICTORS} == set(FAMILIES)
    assert {p.direction for p in PREDICTORS} == {1, -1}
    assert [p.name for p in PREDICTORS if p.label == "J"] == ["js0_raw"]
    assert {p.needs for p in PREDICTORS} == {
        "a spectrum", "3 products a block", "10 products a block", "none", "1 full products",
        "2 full products", "10 full products", "80 full products",
    }  # fmt: skip
