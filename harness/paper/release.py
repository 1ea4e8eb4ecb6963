"""What the paper's figures read from the dataset: spectra, gaps and runs of models, if there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import spectra_db
from harness.leaderboard.tables import in_network_order
from spectra_db.derived import STANDARD
from spectra_db.loading import optional
from spectra_db.words import WITH_RULE

# Folder of tables, or None for the bundled release.
Source = Path | str | None


def models(source: Source) -> pd.DataFrame:
    """Return table `models`, indexed by model.

    Raises:
        NotFound: The source has no such table: there is nothing to draw.
    """
    return spectra_db.load("models", source=source).set_index("model")


def spectrum(
    source: Source, model: str, stage: str = "init", partition: str | None = None
) -> pd.DataFrame:
    """Return the rows of one spectrum, blocks in the order of the network; none if not there.

    A spectrum whose blocks are not all there yet, or failed, counts as not there: metrics are
    written with its last block.

    Args:
        source: Where from.
        model: Whose.
        stage: At which stage.
        partition: None for the blocks (paper or weights, whichever there is), or "full".
    """
    wanted = [partition] if partition else ["paper", "weights"]
    found = optional("spectra", source, model=model, stage=stage, init_seed=1, **STANDARD)
    for name in wanted:
        part = found[found["partition"] == name]
        metrics = optional("heterogeneity", source, model=model, stage=stage, partition=name)
        complete = len(part) > 0 and (name == "full" or len(metrics) > 0)
        if complete and part["status"].isin(WITH_RULE).all():
            return in_network_order(part)
    return found[:0]


def first_spectrum(source: Source, names: Sequence[str]) -> tuple[str, pd.DataFrame] | None:
    """Return the first of some models that has a spectrum at initialisation, with its rows."""
    for name in names:
        found = spectrum(source, name)
        if len(found):
            return name, found
    return None
