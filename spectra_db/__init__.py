"""The dataset of Hessian spectra and how to read it: no torch, no harness.

Imports are eager, because the functions `density` and `load` must win over the modules of the same
names; what takes long to import (matplotlib, huggingface_hub) is imported where it is used.
"""

from __future__ import annotations

from spectra_db import plot
from spectra_db.density import density
from spectra_db.heterogeneity import js0
from spectra_db.jackknife import Estimate
from spectra_db.load import load
from spectra_db.schema import PROTOCOL_VERSION

__all__ = ["PROTOCOL_VERSION", "Estimate", "density", "js0", "load", "plot"]
