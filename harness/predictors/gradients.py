"""Predictors that need gradients alone: how they differ between blocks, coordinates and batches."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from harness import tasks
from harness.estimator import Block
from harness.estimator.checks import fixed_arithmetic
from harness.estimator.device import choose_device
from harness.estimator.hessian import DTYPES
from harness.estimator.settings import Settings
from harness.predictors import Value
from harness.training import Problem
from spectra_db.heterogeneity import gradient_rms_spread

NUM_CHUNKS = 16


@dataclass(frozen=True)
class Gradients:
    """The gradient of the mean loss over a batch, and how it varies.

    Attributes:
        mean: g, by parameter; zero where the loss does not depend on it.
        term_variance: tr Σ of the gradient of one term: a batch of t terms has tr Σ / t.
        num_terms: Terms of the batch.
    """

    mean: dict[str, Tensor]
    term_variance: float
    num_terms: int

    @property
    def flat(self) -> Tensor:
        """All of g, in float64, shape (d,)."""
        return torch.cat([g.flatten() for g in self.mean.values()])

    def rms(self, block: Block) -> float:
        """Return the root mean square of a block's gradient."""
        total = sum(
            float(part.of(self.mean[part.parameter]).square().sum()) for part in block.parts
        )
        return (total / block.num_params) ** 0.5


def gradients_of(problem: Problem, settings: Settings) -> Gradients:
    """Take the gradient chunk by chunk: of sixteen equal parts of the batch.

    With g_i the gradient of the mean over the t_i terms of chunk i of m, and ḡ = Σ t_i g_i / Σ t_i,
    tr Σ is estimated without bias by Σ t_i ‖g_i − ḡ‖² / (m − 1). Samples, not terms, are
    independent: for text it is tr Σ of a sample times its number of terms.

    Args:
        problem: The model and its batch.
        settings: Where and in which arithmetic.
    """
    device, dtype = choose_device(problem.model, settings.device), DTYPES[settings.dtype]
    model = copy.deepcopy(problem.model).to(device=device, dtype=dtype).eval()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    chunks = tasks.split(problem.whole, -(-problem.batch_size // NUM_CHUNKS))
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    squares, terms = 0.0, 0
    with fixed_arithmetic(model):
        for chunk in chunks:
            here = tuple(t.to(device, dtype if t.is_floating_point() else None) for t in chunk)
            t = problem.task.num_terms(chunk)
            loss = problem.loss_fn(model, here)
            found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            for name, g in zip(parameters, found, strict=True):
                total[name] += t * g.double()
                squares += t * float(g.double().square().sum())
            terms += t
    mean = {name: g / terms for name, g in total.items()}
    size = sum(float(g.square().sum()) for g in mean.values())
    return Gradients(mean, (squares - terms * size) / (len(chunks) - 1), terms)


def of_gradients(problem: Problem, settings: Settings, training_batch: int) -> dict[str, Value]:
    """Measure the spread and the Gini coefficient of the blocks, density and share of noise.

    The spread is the standard deviation over blocks of log10 of √(‖g_l‖² / n_l); blocks without a
    gradient enter neither it nor the Gini coefficient.

    Args:
        problem: The model and its batch.
        settings: Where and in which arithmetic; the partition of the blocks.
        training_batch: Samples of a training step.
    """
    found = gradients_of(problem, settings)
    blocks = problem.blocks(settings.partition)
    rms = pd.DataFrame(
        {"block": [b.name for b in blocks], "gradient_rms": [found.rms(b) for b in blocks]}
    )
    positive = rms.loc[rms["gradient_rms"] > 0, "gradient_rms"]
    if len(positive) < 2:
        spread = inequality = Value(
            None, reason=f"{len(positive)} blocks have a gradient; it takes two"
        )
    else:
        spread = Value(gradient_rms_spread(rms, list(rms["block"])).value)
        inequality = Value(gini(positive))
    per_sample = found.num_terms / problem.batch_size
    return {
        "gradient_rms_spread": spread,
        "gradient_rms_gini": inequality,
        "gradient_density": density(found.flat),
        "noise_share": noise_share(found, training_batch * per_sample),
    }


def gini(values: ArrayLike) -> float:
    """Return the Gini coefficient Σ_ij |x_i − x_j| / (2 K² x̄) of K positive numbers, in [0, 1).

    Of the blocks' rms gradients a measure of heterogeneity (Tomihari & Sato 2025, arXiv
    2502.00213).

    >>> gini([1.0, 1.0]), gini([1.0, 3.0])
    (0.0, 0.25)
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    ranks = np.arange(1, len(x) + 1)
    return float((2 * ranks - len(x) - 1) @ x / (len(x) * x.sum()))


def density(g: Tensor) -> Value:
    """Measure φ(g) = ‖g‖₁² / (d ‖g‖₂²), in [1/d, 1].

    1 if all coordinates are of one size, 1/d if one of them has all. Sign descent gains where the
    gradient is dense (Bernstein et al. 2018, arXiv 1802.04434, section 3).

    Args:
        g: The gradient, shape (d,).
    """
    square = float(g.square().sum())
    if square == 0:
        return Value(None, reason="the gradient is zero")
    return Value(float(g.abs().sum()) ** 2 / (len(g) * square))


def noise_share(found: Gradients, num_terms: float) -> Value:
    """Measure E‖g_b − g‖² / E‖g_b‖² of a training batch b: which part of its gradient is noise.

    With r = E‖g_b − g‖² / ‖g‖², the noise scale tr Σ / ‖g‖² over the batch (McCandlish et al. 2018,
    arXiv 1812.06162, equation 2.9), it is r / (1 + r), which ranks alike, and is estimated by

        (tr Σ / t) / (max(0, ‖ḡ‖² − tr Σ / T) + tr Σ / t)    in [0, 1],

    t being the terms of a training batch and T those of this one. ‖ḡ‖² − tr Σ / T estimates ‖g‖²
    without bias (there, appendix A.1). It is negative in networks whose gradient is below its noise
    on 512 images, of which r has no value and the share is 1. Where noise is larger SGD keeps up
    with Adam (Srećković et al. 2025, arXiv 2506.12543, who vary the batch and define no such
    number).

    Args:
        found: The gradient and its variance.
        num_terms: t.
    """
    noise = found.term_variance / num_terms
    size = sum(float(g.square().sum()) for g in found.mean.values())
    if size == 0:
        return Value(None, reason="the gradient is zero")
    return Value(noise / (max(0.0, size - found.term_variance / found.num_terms) + noise))
