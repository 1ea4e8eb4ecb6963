"""Compute Hessian spectra of neural networks, and the dataset made of them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Resolved on first use, so that `harness --help` and the registry import no torch.
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
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
