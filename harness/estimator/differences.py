"""Difference quotients of the gradient: what the products with a Hessian must equal."""

from __future__ import annotations

import torch

from harness.estimator.hessian import BlockHessian

# Relative to the size of what is moved, from steps that cross few kinks to ones whose difference
# stands out from the rounding of a model that computes in float32 inside.
_STEPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
# What of a gradient is taken for rounding, relative to it, and how well two slopes must agree.
_ROUNDING, _AGREEMENT = 1e-12, 0.1


def seems_nonzero(hessian: BlockHessian, index: int) -> bool:
    """Tell whether the gradient of a block whose products are zero changes with its parameters.

    It does if two difference quotients of it, of different steps along one random direction,
    agree: kinks and rounding give quotients that depend on the step. Mostly the first is zero
    and settles it, at the price of two gradients.
    """
    block = hessian.blocks[index]
    v = torch.randn(block.num_params, generator=torch.Generator().manual_seed(0))
    v = (v / v.norm()).to(hessian.device)
    parts = [part.of(hessian.parameter(part.parameter)) for part in block.parts]
    scale = max(float(torch.cat([p.flatten() for p in parts]).double().norm()), 1e-3)
    before = None
    for step in _STEPS:
        ahead, behind = hessian.moved_gradients(index, v, step * scale)
        if float((ahead - behind).norm()) <= _ROUNDING * float(ahead.norm()):
            return False
        slope = (ahead - behind) / step
        if before is not None:
            both = float(slope.norm() + before.norm())
            if float((slope - before).norm()) <= _AGREEMENT * both / 2:
                return True
        before = slope
    return False
