"""Which blocks make JS⁰, and which readings of it their probes decide."""

from __future__ import annotations

import pandas as pd

from spectra_db.densities import lambda10_ratio
from spectra_db.jackknife import Blocks

# |eigenvalue| falls by as much at what counts as a gap.
_GAP = 2.0


def without_each(distances: pd.DataFrame) -> pd.Series:
    """Return what JS⁰ of the other blocks would be without each block, by its name.

    The block with the lowest number is the most extreme one, which lifts JS⁰ most. Where the scale
    is not the block's own (`global_max`), the others keep theirs.

    Args:
        distances: From `pairwise_js`, of three blocks or more.

    Raises:
        ValueError: There are fewer.

    Example:
        >>> import pandas as pd
        >>> distances = [[0, 0.1, 0.7], [0.1, 0, 0.9], [0.7, 0.9, 0]]
        >>> without_each(pd.DataFrame(distances, list("abc"), list("abc"))).round(6).to_dict()
        {'a': 0.9, 'b': 0.7, 'c': 0.1}
    """
    count = len(distances)
    if count < 3:
        raise ValueError(f"{count} blocks; without one of them there is no pair to compare")
    total = distances.to_numpy().sum() - 2 * distances.sum()
    return total / ((count - 1) * (count - 2))


def at_a_gap(rows: pd.DataFrame) -> list[str]:
    """Return the blocks whose λ10 lies at a gap of their spectrum, so that its probes decide it.

    Those where |eigenvalue| falls by more than half between the masses 10 ± √(20/P): by as much the
    mass of the ten largest varies from one sample of P Gaussian probes to another.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition. Exact blocks have no
            probes, and are never among them.

    Raises:
        ValueError: As `js0`.
    """
    return [
        b.name
        for b in Blocks.of(rows).blocks
        if not b.exact and lambda10_ratio(*b.average(), b.num_params, len(b.rules)) > _GAP
    ]
