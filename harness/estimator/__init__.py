"""The estimator: from any PyTorch model to the spectra of its Hessian's blocks.

In the order the data flows: `blocks` names the parts of the model, `hessian` multiplies their
Hessians with vectors, `lanczos` and `quadrature` turn products into rules, `spectrum` is the
recipe that puts them together: read that one first.
"""

from __future__ import annotations

from harness.estimator.blocks import Block, find_blocks
from harness.estimator.spectrum import estimate_spectra

__all__ = ["Block", "estimate_spectra", "find_blocks"]
