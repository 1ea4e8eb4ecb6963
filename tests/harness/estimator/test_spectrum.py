from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import weight_norm

import spectra_db
from harness import estimate_spectra, find_blocks, registry
from harness.errors import UserError
from harness.estimator.cost import forecast
from harness.estimator.objective import Objective
from harness.estimator.operators import opened
from harness.estimator.settings import Settings
from harness.estimator.spectrum import rules
from harness.estimator.summary import block_sizes, block_summaries
from harness.training import load_problem
from spectra_db import store
from spectra_db.schema import TABLES

from .models import ViT, cross_entropy, num_terms, problem, split
from .test_hessian import block_hessian, exact_blocks

# Tiny blocks are sampled too, so that their exact spectra are at hand to compare with.
SETTINGS = {"num_probes": 3, "num_steps": 5, "dtype": torch.float64, "exact_size": 20}


def rows_of(name="gpt", **options):
    model, batch = problem(name)
    return estimate_spectra(
        model, cross_entropy, [batch], batch_weights=num_terms, **(SETTINGS | options)
    )


def numbers(rows):
    """Return the rows without what differs from run to run."""
    return rows.drop(columns=["seconds", "peak_bytes"])


def test_rows_have_the_columns_of_the_table_and_pass_its_validation(tmp_path):
    rows = rows_of()
    assert list(rows.columns) == TABLES["spectra"].names
    rows["model"] = "gpt"
    store.write(tmp_path, "spectra", rows)
    assert len(spectra_db.load("spectra", source=tmp_path)) == len(rows)


@pytest.mark.parametrize("name", ["cnn", "vit", "gpt", "mlp"])
def test_trace_and_trace_of_square_lie_within_their_errors(name):
    blocks, expected = exact_blocks(name, "weights")
    # Two steps give the moments up to the third without an error of their own.
    rows = rows_of(name, num_probes=30, num_steps=2, probe_distribution="rademacher")
    for block, H in zip(blocks, expected, strict=True):
        mine = rows[rows["block"] == block.name]
        for power in (1, 2):
            truth = float(torch.linalg.matrix_power(H, power).trace()) / block.num_params
            samples = np.array([w @ np.asarray(t) ** power for t, w in _rules(mine)])
            error = samples.std(ddof=1) / len(samples) ** 0.5 if len(samples) > 1 else 0.0
            # 60 comparisons: four standard errors leave 1 % for a false alarm among all.
            assert abs(samples.mean() - truth) <= 4 * error + 1e-9 * abs(truth) + 1e-14


def test_spectrum_is_near_the_exact_one_in_wasserstein_distance():
    blocks, expected = exact_blocks("gpt", "weights")
    pairs = {b.kind: (b, H) for b, H in zip(blocks, expected, strict=True)}
    pairs = [pairs[kind] for kind in ("embedding", "query", "mlp")]
    rows = rows_of(num_probes=20, num_steps=25, blocks=[block for block, _ in pairs])
    for block, H in pairs:
        eigenvalues = torch.linalg.eigvalsh(H).numpy()
        rules = _rules(rows[rows["block"] == block.name])
        nodes = np.concatenate([t for t, _ in rules])
        weights = np.concatenate([w for _, w in rules])
        size = np.abs(eigenvalues).max()
        assert wasserstein_distance(eigenvalues, nodes, None, weights) < 0.02 * size


def test_exact_blocks_hold_the_eigenvalues():
    blocks, expected = exact_blocks("mlp", "weights")
    rows = rows_of("mlp", exact_size=1000).set_index("block")
    for block, H in zip(blocks, expected, strict=True):
        assert rows.loc[block.name, "method"] == "exact"
        np.testing.assert_allclose(
            rows.loc[block.name, "nodes"], torch.linalg.eigvalsh(H), atol=1e-14
        )


def test_blocks_that_are_cheaper_exact_are_diagonalised():
    assert Settings(num_probes=3, num_steps=40).is_exact(1000)
    assert not Settings(num_probes=10, num_steps=100).is_exact(1001)
    assert Settings(num_probes=20, num_steps=100).is_exact(2000)
    assert not Settings(num_probes=20, num_steps=100).is_exact(2001)
    assert not Settings(num_probes=100, num_steps=100).is_exact(4001)
    assert not Settings(num_probes=20, num_steps=100, exact_size=0).is_exact(1)


def test_rows_do_not_depend_on_the_order_of_blocks_or_on_the_others():
    model, batch = problem("gpt")
    blocks = find_blocks(model)
    options = SETTINGS | {"batch_weights": num_terms}
    together = estimate_spectra(model, cross_entropy, [batch], blocks=blocks, **options)
    reverse = estimate_spectra(model, cross_entropy, [batch], blocks=blocks[::-1], **options)
    alone = estimate_spectra(model, cross_entropy, [batch], blocks=blocks[3:4], **options)
    key = ["block", "probe"]
    sort = lambda rows: numbers(rows).sort_values(key).reset_index(drop=True)  # noqa: E731
    assert sort(together).equals(sort(reverse))
    mine = together[together["block"] == blocks[3].name]
    assert sort(alone).equals(sort(mine))


def test_rows_do_not_depend_on_the_split_or_on_the_memory_budget():
    model, batch = problem("gpt")
    options = SETTINGS | {"batch_weights": num_terms}
    whole = estimate_spectra(model, cross_entropy, [batch], **options)
    parts = estimate_spectra(
        model, cross_entropy, split(batch, [3, 1, 2]), memory_budget=200_000, **options
    )
    assert set(parts["microbatch_size"]) == {3}
    for a, b in zip(whole["nodes"], parts["nodes"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)
    assert set(whole["batch_hash"]) == set(parts["batch_hash"])


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    first, again, other = (numbers(rows_of(num_steps=2, seed=seed)) for seed in (0, 0, 1))
    assert first.equals(again)
    assert not first["nodes"].equals(other["nodes"])


def test_the_model_comes_back_as_it_was():
    model, batch = problem("cnn")
    model.train()
    model[0].weight.requires_grad_(False)
    model[-1].weight.grad = torch.ones_like(model[-1].weight)
    before = copy.deepcopy(model)
    generator_state = torch.get_rng_state()
    precision = torch.get_float32_matmul_precision()
    estimate_spectra(model, cross_entropy, [batch], **(SETTINGS | {"dtype": torch.float32}))
    assert model.training == before.training
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert torch.get_float32_matmul_precision() == precision
    assert not torch.are_deterministic_algorithms_enabled()
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert (p.dtype, p.requires_grad) == (q.dtype, q.requires_grad), name
        assert torch.equal(p, q)
        assert (p.grad is None) == (name != "6.weight")
    for p, q in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(p, q)


def test_a_zero_block_gets_one_row_of_status_zero():
    model, batch = problem("vit")
    nn.init.zeros_(model.head.weight)
    rows = estimate_spectra(model, cross_entropy, [batch], **SETTINGS)
    zero = rows[rows["status"] == "zero"]
    assert set(zero["block"]) == set(rows["block"]) - {"head.weight"}
    assert zero["block"].is_unique
    assert [list(n) for n in zero["nodes"]] == [[0.0]] * len(zero)
    with pytest.raises(ValueError, match="at least two"):
        spectra_db.js0(rows)


def test_extremes_of_the_full_spectrum_lie_within_their_residual_bounds():
    model, batch = problem("mlp")
    (block,), (H,) = exact_blocks("mlp", "full")
    rows = estimate_spectra(model, cross_entropy, [batch], blocks="full", **SETTINGS)
    assert set(rows["method"]) == {"slq"}
    (summary,) = block_summaries(block_hessian(model, cross_entropy, [batch], [block]), rows)
    eigenvalues = torch.linalg.eigvalsh(H).numpy()
    for name in ("lambda_max", "lambda_min"):
        distance = np.abs(eigenvalues - summary[name]).min()
        assert distance <= summary[f"{name}_error"] + 1e-12


def test_summaries_give_the_moments_and_the_sizes_of_weights_and_gradient():
    model, batch = problem("mlp")
    blocks, expected = exact_blocks("mlp", "weights")
    settings = SETTINGS | {"num_probes": 40}
    rows = estimate_spectra(model, cross_entropy, [batch], blocks=blocks, **settings)
    cross_entropy(model, batch).backward()
    parameters = dict(model.named_parameters())
    summaries = block_summaries(block_hessian(model, cross_entropy, [batch], blocks), rows)
    for summary, H in zip(summaries, expected, strict=True):
        p = parameters[summary["block"]]
        assert summary["weight_rms"] == pytest.approx(float(p.detach().square().mean() ** 0.5))
        rms = float(p.grad.square().mean() ** 0.5)
        assert summary["gradient_rms"] == pytest.approx(rms)
        assert abs(summary["trace"] - float(H.trace())) <= 4 * summary["trace_error"]
        assert abs(summary["frobenius"] - float(H.norm())) <= 4 * summary["frobenius_error"]


def test_groups_of_probes_give_the_same_rows():
    model, batch = problem("gpt")
    options = SETTINGS | {"batch_weights": num_terms, "num_steps": 2}
    whole = estimate_spectra(model, cross_entropy, [batch], **options)
    graph = 78_000  # a product alone, so that one probe at a time fits beside it
    parts = estimate_spectra(
        model, cross_entropy, split(batch, [1] * 6), memory_budget=graph, **options
    )
    for a, b in zip(whole["nodes"], parts["nodes"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-10)


def test_progress_counts_every_product_and_blocks_are_handed_out_when_finished():
    progress, finished = [], []
    model, batch = problem("mlp")
    settings = Settings(num_probes=3, num_steps=8, exact_size=20)
    source = {"model": "mlp", "stage": "init", "init_seed": 0}
    with opened(Objective(model, cross_entropy, [batch]), find_blocks(model), settings) as hessian:
        for rows in rules(
            hessian, settings, source, on_progress=lambda *counts: progress.append(counts)
        ):
            assert len({row["block"] for row in rows}) == 1
            finished.append((rows[0]["block"], progress[-1][0] if progress else 0))
    done, total = progress[-1]
    assert done == total
    assert sorted(name for name, _ in finished) == sorted(b.name for b in find_blocks(model))
    assert finished[0][1] < total
    assert all(a[0] <= b[0] for a, b in pairwise(progress))


def test_model_with_unused_and_frozen_parameters_is_handled():
    class Partial(ViT):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(30, 2)
            self.head.weight.requires_grad_(False)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Partial().double()
    _, batch = problem("vit")
    rows = estimate_spectra(model, cross_entropy, [batch], **SETTINGS)
    assert "head.weight" not in set(rows["block"])
    assert set(rows.loc[rows["block"] == "unused.weight", "status"]) == {"zero"}


def test_attention_and_recurrent_kernels_without_second_derivative_are_avoided():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            y, _ = self.attention(x, x, x, need_weights=False)
            return self.head(self.lstm(y)[0][:, -1])

    batch = (torch.randn(5, 6, 8), torch.arange(5) % 4)
    rows = estimate_spectra(
        Net(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), [batch], num_probes=1, num_steps=3
    )
    kinds = set(rows["block_kind"])
    assert {"query", "key", "value", "attention_output", "recurrent", "head"} <= kinds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_probes": 0}, "num_probes is 0"),
        ({"num_steps": -1}, "num_steps is -1"),
        ({"probe_distribution": "uniform"}, "gaussian, rademacher"),
        ({"matmul_precision": "low"}, "highest, high, medium"),
        ({"dtype": torch.int64}, "float32, float64"),
        ({"dtype": torch.bfloat16}, "float32, float64"),
        ({"norm_mode": "both"}, "eval, train"),
        ({"blocks": "layer"}, "weights, paper, all, full"),
        ({"device": "tpu"}, "device 'tpu' cannot be used"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_is_allowed(options, message):
    with pytest.raises(UserError, match=message):
        rows_of(**options)


def small(*layers, loss_fn=lambda m, b: F.cross_entropy(m(b[0]), b[1]), **options):
    model = nn.Sequential(*layers, nn.Linear(4, 3))
    batch = (torch.linspace(0.1, 1, 48).reshape(8, 6), torch.arange(8) % 3)
    return estimate_spectra(model, loss_fn, **{"batches": [batch], "num_steps": 3} | options)


def test_batches_of_another_structure_are_refused():
    x, y = torch.ones(4, 6), torch.arange(4) % 3
    with pytest.raises(UserError, match="tensors is 1 in batch 1 and 2 in batch 0"):
        small(nn.Linear(6, 4), batches=[(x, y), (x,)])


def test_compiled_models_have_the_spectra_of_what_is_compiled():
    batch = (torch.linspace(0.1, 1, 48).reshape(8, 6), torch.arange(8) % 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    rows = [estimate_spectra(m, cross_entropy, [batch]) for m in (model, torch.compile(model))]
    assert rows[0]["block"].equals(rows[1]["block"])
    assert rows[0]["nodes"].tolist() == rows[1]["nodes"].tolist()


def test_the_sizes_of_gradients_do_not_depend_on_the_memory_budget():
    model, batch = problem("mlp", num_samples=8)
    whole = block_hessian(model, cross_entropy, [batch], find_blocks(model))
    budget = whole.product_bytes - 1
    parts = block_hessian(model, cross_entropy, [batch], whole.blocks, memory_budget=budget)
    assert [h.microbatch_size for h in (whole, parts)] == [8, 4]
    for a, b in zip(block_sizes(whole), block_sizes(parts), strict=True):
        assert a["gradient_rms"] == pytest.approx(b["gradient_rms"])


def test_matrices_are_weights_and_those_called_biases_are_left_out_with_a_warning():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.pair_bias = nn.Parameter(torch.eye(6, 4)), nn.Parameter(torch.eye(4))

        def forward(self, x):
            return torch.tanh(x @ self.W) @ self.pair_bias

    with pytest.warns(UserWarning, match=r"in no block .*: 0.pair_bias \(16 parameters\)"):
        assert "0.W" in set(small(Raw())["block"])
    assert "0.pair_bias" in set(small(Raw(), blocks="all")["block"])


def test_a_loss_of_another_model_than_the_one_given_is_refused():
    other = nn.Linear(6, 3)
    with pytest.raises(UserError, match="no parameter of the model that loss_fn is given"):
        small(nn.Linear(6, 4), loss_fn=lambda _, b: F.cross_entropy(other(b[0]), b[1]))


def test_blocks_without_a_finite_hessian_are_named():
    class Root(nn.Module):
        def forward(self, x):
            return torch.sqrt(x - x.detach())  # the slope at 0 is infinite

    with pytest.raises(FloatingPointError, match=r"Hessian of block '0.weight' is not finite"):
        small(nn.Linear(6, 4), Root())


def test_batches_may_come_from_a_generator_and_are_none_of_a_tensor():
    batch = (torch.linspace(0.1, 1, 48).reshape(8, 6), torch.arange(8) % 3)
    hashes = [
        small(nn.Linear(6, 4), batches=batches)["batch_hash"].unique().tolist()
        for batches in ([batch], (b for b in [batch]))
    ]
    assert hashes[0] == hashes[1]
    with pytest.raises(UserError, match="batches is a Tensor; pass a list of batches"):
        small(nn.Linear(6, 4), batches=batch[0])
    with pytest.raises(UserError, match=r"batches is a tuple; .* such as \[\(inputs, targets\)\]"):
        small(nn.Linear(6, 4), batches=batch)


def test_names_are_no_blocks():
    with pytest.raises(UserError, match=r"blocks holds 'weight'; pass a partition, or some of"):
        small(nn.Linear(6, 4), blocks=["weight"])


def test_weight_norm_has_the_spectrum_of_its_formula():
    class Formula(nn.Module):  # the derivative of torch's own kernel is no symmetric matrix
        def __init__(self, normed):
            super().__init__()
            self.g, self.v, self.bias = normed.weight_g, normed.weight_v, normed.bias

        def forward(self, x):
            return F.linear(x, self.v * (self.g / self.v.norm(dim=1, keepdim=True)), self.bias)

    layer = weight_norm(nn.Linear(6, 4))
    pair = layer.parametrizations.weight
    formula = Formula(
        SimpleNamespace(weight_g=pair.original0, weight_v=pair.original1, bias=layer.bias)
    )
    head = nn.Linear(4, 3)
    batch = (torch.linspace(0.1, 1, 48).reshape(8, 6), torch.arange(8) % 3)
    nodes = [
        estimate_spectra(
            nn.Sequential(each, nn.Tanh(), head),
            lambda m, b: F.cross_entropy(m(b[0]), b[1]),
            [batch],
            blocks="full",
            dtype=torch.float64,
        )["nodes"][0]
        for each in (layer, formula)
    ]
    assert np.allclose(nodes[0], nodes[1], rtol=1e-10, atol=1e-12)


def test_the_cost_of_parametrized_models_is_counted():
    model = nn.Sequential(weight_norm(nn.Linear(6, 4)), nn.Linear(4, 3))
    plain = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    batch = (torch.ones(8, 6), torch.arange(8) % 3)
    flops = [
        forecast(
            Objective(each, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [batch]),
            find_blocks(each, "full"),
            Settings(num_probes=1, num_steps=2),
        ).flops
        for each in (model, plain)
    ]
    assert flops[0] >= flops[1] > 0


def _rules(rows):
    return [(np.asarray(r.nodes), np.asarray(r.weights)) for r in rows.itertuples()]


class _Softmax(torch.autograd.Function):
    """Softmax whose first derivative is right and whose second is not."""

    @staticmethod
    def forward(ctx, x):
        y = x.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y - y * (g * y.detach()).sum(-1, keepdim=True)


@pytest.mark.parametrize("exact_size", [0, 1000])
def test_a_wrong_second_derivative_is_warned_of_where_it_leaves_the_hessian_asymmetric(exact_size):
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), torch.randn(8, 6)

    def loss(softmax):
        return lambda m, x: softmax(m[1](m[0](x).tanh())).square().mean()

    settings = {"num_probes": 1, "num_steps": 3, "exact_size": exact_size}
    with pytest.warns(UserWarning, match=r"Hessian of 0\.weight.* is not symmetric"):
        estimate_spectra(model, loss(_Softmax.apply), [batch], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_spectra(model, loss(lambda x: x.softmax(-1)), [batch], **settings)


@pytest.mark.parametrize("exact_size", [0, 1000])
def test_a_block_that_is_zero_but_for_rounding_is_warned_of(exact_size):
    # Softmax over the keys does not change if all keys are moved by the same vector.
    problem = load_problem(registry.get("vit-digits"), batch_size=8)
    model = problem.model
    blocks = [b for b in find_blocks(model, "all") if b.name.endswith(("key.bias", "value.bias"))]
    settings = {"num_probes": 1, "num_steps": 2, "exact_size": exact_size, "blocks": blocks}
    with pytest.warns(UserWarning, match="not symmetric") as caught:
        estimate_spectra(model, problem.loss_fn, problem.batches, **settings)
    text = " ".join(str(warning.message) for warning in caught)
    assert "attn.key.bias" in text
    assert "attn.value.bias" not in text
