"""How far a metric may be from its value of all steps, by what the last ones changed."""

from __future__ import annotations

from collections.abc import Mapping

from spectra_db.schema import VERSIONS

# The truncation error compares with a rule of three quarters of the steps, and of raw eigenvalues,
# which settle late and not evenly, with one of half of them too.
TRUNCATION, HALF = 0.75, 0.5
# How many times the change over a quarter of the steps the value may be off, by version of the
# protocol; the last covers the true error in 90 of 100 cases of each reading (docs/accuracy.md,
# Rules that are continued).
CHANGES = {1: 1.0, 2: 3.0, 3: 5.0, 4: 5.0}
_HALF_SINCE = 4


def parts_of(scale: str, version: int = VERSIONS["heterogeneity"]) -> tuple[float, ...]:
    """Return the parts of the steps with which a reading's truncation error compares.

    Args:
        scale: What eigenvalues are divided by.
        version: Of the protocol.
    """
    return (TRUNCATION, HALF) if scale == "raw" and version >= _HALF_SINCE else (TRUNCATION,)


def truncation_error(
    value: float, fewer: Mapping[float, float], version: int = VERSIONS["heterogeneity"]
) -> float:
    """Return how far a metric may be from its value of all steps (docs/protocol.md, Error).

    Args:
        value: With the steps that were taken.
        fewer: Part of the steps, as `parts_of` has them ↦ the value with so many.
        version: Of the protocol.
    """
    quarters = [abs(v - value) * (1 - TRUNCATION) / (1 - part) for part, v in fewer.items()]
    return CHANGES[version] * max(quarters)
