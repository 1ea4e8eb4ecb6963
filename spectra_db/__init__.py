"""The dataset of Hessian spectra and how to read it: no torch, no harness."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectra_db import plot
    from spectra_db.densities import density
    from spectra_db.heterogeneity import js0
    from spectra_db.jackknife import Estimate
    from spectra_db.loading import load
    from spectra_db.schema import PROTOCOL_VERSION

# Resolved on first use, so that who asks for words alone (`harness --help`) imports no pandas.
_EXPORTS = {
    "PROTOCOL_VERSION": "schema",
    "Estimate": "jackknife",
    "density": "densities",
    "js0": "heterogeneity",
    "load": "loading",
}
__all__ = ["PROTOCOL_VERSION", "Estimate", "density", "js0", "load", "plot"]


def __getattr__(name: str) -> Any:
    """Import an export of this package when it is first used."""
    if name in _EXPORTS:
        return getattr(import_module(f"spectra_db.{_EXPORTS[name]}"), name)
    if name == "plot":
        return import_module("spectra_db.plot")
    raise AttributeError(f"module 'spectra_db' has no attribute {name!r}")
