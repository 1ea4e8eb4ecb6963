"""Predictors that look at the task and the architecture alone: dummies that others must beat."""

from __future__ import annotations

import math

from torch import nn

from harness.estimator import find_blocks
from harness.predictors import Value
from spectra_db.words import ATTENTION


def of_problem(
    model: nn.Module, entropy: float | None, num_classes: int | None
) -> dict[str, Value]:
    """Measure label imbalance, and the dummies: attention, log10 d, log10 C.

    None has halves of a batch: they are of the data and the network.

    d counts trainable parameters, tied ones once. C is the number of outputs: classes, or the size
    of the vocabulary, of which Dong et al. (arXiv 2505.02809) say that it drives the Hessian
    towards block-diagonal form. A model has attention if one of its blocks of partition `weights`
    is a query, key, value or fused attention weight.

    Args:
        model: The model.
        entropy: Of the targets' frequencies, in nats; None where they are no classes.
        num_classes: C; None likewise.
    """
    kinds = {block.kind for block in find_blocks(model, "weights")}
    num_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    no_classes = Value(None, reason="the targets are no classes")
    imbalance = classes = no_classes
    if num_classes is not None:
        classes = Value(math.log10(num_classes))
        if entropy is not None:
            imbalance = label_imbalance(entropy, num_classes)
    return {
        "label_imbalance": imbalance,
        "has_attention": Value(float(bool(kinds & ATTENTION))),
        "log_params": Value(math.log10(num_params)),
        "log_classes": classes,
    }


def label_imbalance(entropy: float, num_classes: int) -> Value:
    """Measure ln C − H, H the entropy of the targets' frequencies, in nats.

    The Kullback-Leibler divergence of the targets from balanced ones: 0 if they are balanced, ln C
    if all are one class. N targets of k classes that occur add about (k − 1) / 2N to it. Kunstner
    et al. 2024 (arXiv 2402.19449) make heavy-tailed imbalance the cause of Adam's gain; they vary
    it (classes by a power law) and define no such number.

    Args:
        entropy: H, in nats.
        num_classes: C.
    """
    return Value(math.log(num_classes) - entropy)
