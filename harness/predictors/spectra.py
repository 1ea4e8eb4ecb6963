"""Predictors that follow from rows of table `spectra` alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd

from harness.predictors import Value
from spectra_db.densities import SIGMA
from spectra_db.energy import energy_js
from spectra_db.heterogeneity import RAW_SIGMA, js0
from spectra_db.jackknife import Estimate

_METRICS: dict[str, Callable[[pd.DataFrame], Estimate]] = {
    "js0_raw": partial(js0, scale="raw", sigma=RAW_SIGMA, extend=False),
    "js0_own_rms": partial(js0, scale="own_rms", sigma=SIGMA, extend=False),
    "js0_lambda10": partial(js0, scale="lambda10", sigma=SIGMA, extend=False),
    "energy_js": energy_js,
}


def of_spectrum(rows: pd.DataFrame) -> dict[str, Value]:
    """Measure J, J′ and E: how far apart the spectra of the blocks are.

    `js0` of raw eigenvalues with σ = √1e-5 (J), of eigenvalues over their block's rms and λ10 with
    σ = 0.05 (J′), and `energy_js` (E). Each is the value corrected for the bias of few probes; with
    fewer than 3 in a block, whose bias nothing tells, there is none.

    Args:
        rows: Rows of table `spectra` of one model at initialisation.
    """
    spent = int(rows.groupby("block")["num_products"].sum().max())
    return {name: _value(metric, rows, spent) for name, metric in _METRICS.items()}


def _value(metric: Callable[[pd.DataFrame], Estimate], rows: pd.DataFrame, spent: int) -> Value:
    try:
        found = metric(rows)
    except ValueError as error:
        return Value(None, num_products=spent, reason=str(error))
    if found.corrected != found.corrected:
        return Value(None, num_products=spent, reason="a block has fewer than 3 probes")
    return Value(found.corrected, found.standard_error, num_products=spent)
