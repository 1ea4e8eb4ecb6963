"""The dataset of Hessian spectra and how to read it: no torch, no harness."""

from __future__ import annotations

from spectra_db.density import density
from spectra_db.heterogeneity import Estimate, js0
from spectra_db.load import load
from spectra_db.schema import PROTOCOL_VERSION

__all__ = ["PROTOCOL_VERSION", "Estimate", "density", "js0", "load"]
