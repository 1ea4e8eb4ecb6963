"""Compute Hessian spectra of neural networks, and the dataset made of them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from harness.errors import extra_missing

# Resolved on first use, so that `harness --help` and the registry import no torch.
_EXPORTS = {
    "Block": "harness.estimator.blocks",
    "Recorder": "harness.campaign.recorder",
    "SplitLoss": "harness.estimator.objective",
    "estimate_spectra": "harness.estimator.spectrum",
    "find_blocks": "harness.estimator.blocks",
}
__all__ = ["Block", "Recorder", "SplitLoss", "estimate_spectra", "find_blocks"]


def __getattr__(name: str) -> Any:
    """Import an export of this package when it is first used.

    Raises:
        ModuleNotFoundError: It needs what the base install leaves out; the text says what to do.
    """
    if name not in _EXPORTS:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    try:
        return getattr(import_module(_EXPORTS[name]), name)
    except ModuleNotFoundError as error:
        if said := extra_missing(error, f"harness.{name}"):
            raise ModuleNotFoundError(said, name=error.name) from None
        raise
