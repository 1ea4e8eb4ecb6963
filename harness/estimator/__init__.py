"""The estimator: from any PyTorch model to the spectra of its Hessian's blocks.

In the order the data flows: `blocks` names the parts of the model, `hessian` multiplies their
Hessians with vectors, `lanczos` and `spectra_db.quadrature` turn products into rules, `spectrum`
is the recipe that puts them together: read that one first.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Resolved on first use, so that products and Lanczos need no more than torch.
_EXPORTS = {
    "Block": "harness.estimator.blocks",
    "SplitLoss": "harness.estimator.objective",
    "estimate_spectra": "harness.estimator.spectrum",
    "find_blocks": "harness.estimator.blocks",
}
__all__ = ["Block", "SplitLoss", "estimate_spectra", "find_blocks"]


def __getattr__(name: str) -> Any:
    """Import an export of this package when it is first used."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'harness.estimator' has no attribute {name!r}")
