from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from harness.estimator import find_blocks
from harness.paper import blockdiagonal
from harness.registry import get
from harness.training import load_problem


def exact_hessian(problem, blocks) -> np.ndarray:
    """Return the dense Hessian of all blocks by torch's own double loop, float64."""
    model = problem.model.double()
    names = [block.parts[0].parameter for block in blocks]
    named = dict(model.named_parameters())

    def loss(*tensors):
        changed = {**named, **dict(zip(names, tensors, strict=True))}
        total = 0.0
        for images, labels in problem.batches:
            logits = torch.func.functional_call(model, changed, (images.double(),))
            loss = torch.nn.functional.cross_entropy(logits, labels)
            total = total + loss * len(labels) / problem.num_terms
        return total

    tensors = tuple(named[name].detach() for name in names)
    rows = torch.autograd.functional.hessian(loss, tensors)
    sizes = [t.numel() for t in tensors]
    return np.block([[rows[i][j].reshape(sizes[i], sizes[j]).numpy() for j in range(len(sizes))]
                     for i in range(len(sizes))])  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    """Return squared norms by products and exactly, of a small perceptron on real digits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 10))
    problem = load_problem(get("cnn-digits"))
    images, labels = problem.batches[0]
    batches = [(images[:8], labels[:8]), (images[8:12], labels[8:12])]
    problem = replace(problem, model=net).on(batches)
    blocks = find_blocks(net)
    squares = blockdiagonal.squared_norms(problem, blocks, num_probes=100)
    H = exact_hessian(problem, blocks)
    cut = blocks[0].num_params
    exact = np.array([[np.linalg.norm(H[:cut, :cut]), np.linalg.norm(H[:cut, cut:])],
                      [np.linalg.norm(H[cut:, :cut]), np.linalg.norm(H[cut:, cut:])]])  # fmt: skip
    return squares, exact


def test_products_give_the_norms_of_all_blocks_within_their_error(measured):
    squares, exact = measured
    mean, error = squares.mean(0), squares.std(0, ddof=1) / np.sqrt(len(squares))
    assert (np.abs(mean - exact**2) < 4 * error).all()
    assert (error < 0.2 * exact**2).all()


def test_coupling_and_share_are_those_of_the_exact_hessian_within_their_error(measured):
    squares, exact = measured
    ratios, errors = blockdiagonal.coupling(squares)
    expected = exact[0, 1] / np.sqrt(exact[0, 0] * exact[1, 1])
    assert abs(ratios[0, 1] - expected) < 4 * errors[0, 1]
    np.testing.assert_allclose(np.diag(ratios), 1)
    share, error = blockdiagonal.diagonal_share(squares)
    assert abs(share - (np.diag(exact) ** 2).sum() / (exact**2).sum()) < 4 * error


def test_a_zero_block_couples_to_none():
    squares = np.ones((4, 2, 2)) * np.array([[1.0, 0.0], [0.0, 0.0]])
    ratios, errors = blockdiagonal.coupling(squares)
    np.testing.assert_array_equal(ratios, [[1, 0], [0, 0]])
    assert np.isfinite(errors).all()


def test_the_tiny_hessian_is_the_derivative_of_the_gradient():
    torch.manual_seed(0)
    model = blockdiagonal.TinyTransformer(11, 2, gpt_init=False).double()
    tokens, targets = torch.randint(11, (2, 5, 2))
    H = blockdiagonal.tiny_hessian(model, tokens, targets)
    assert H.shape == (192, 192)
    np.testing.assert_allclose(H, H.T)
    weights = [layer[name].weight for layer in model.stack()
               for names in blockdiagonal.GROUPS.values() for name in names]  # fmt: skip

    def gradient():
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).numpy()

    for index, (weight, entry) in {0: (weights[0], 0), 80: (weights[5], 0)}.items():
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.view(-1)[entry] += sign * 1e-5
            ends.append(gradient())
            with torch.no_grad():
                weight.view(-1)[entry] -= sign * 1e-5
        difference = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(H[index], difference, atol=1e-8, rtol=1e-5)


def test_mean_absolute_entries_are_taken_group_by_group():
    H = np.kron(np.array([[1.0, -2.0], [-2.0, 3.0]]), np.ones((32, 32)))
    np.testing.assert_array_equal(blockdiagonal.mean_absolute(H), [[1, 2], [2, 3]])
