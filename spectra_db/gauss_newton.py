"""How much of a block's Hessian is its Gauss-Newton matrix."""

from __future__ import annotations

import numpy as np
import pandas as pd

from spectra_db.densities import blocks_of


def ggn_share(rows: pd.DataFrame) -> pd.Series:
    """Return per block tr G² / tr H², with H the Hessian and G the Gauss-Newton matrix.

    H = G + R, where R has the second derivatives of the outputs. The share is 1 where R is zero, as
    in blocks in which the outputs are locally linear. Where tr G R is zero, tr H² is the sum of
    tr G² and tr R², and the share lies between 0 and 1; it is above 1 where R takes from G. Both
    traces are n Σ w̄ θ², averaged over probes, and those of one seed are the same for both.

    Args:
        rows: Rows of table `spectra` of one model, stage and partition, of both operators.

    Returns:
        Indexed by block, in the order of the rows; nan where the Hessian is zero.

    Raises:
        ValueError: One operator has no rows, a block is of one alone, or rows are of several
            spectra.

    Example:
        >>> import numpy as np, pandas as pd
        >>> one = {"block": "head", "probe": 0, "method": "exact", "status": "ok", "reason": None}
        >>> one |= {"num_params": 2, "num_products": 2, "breakdown": False, "weights": [0.5, 0.5]}
        >>> one |= {"alphas": [], "betas": []}
        >>> H = one | {"operator": "hessian", "nodes": [3.0, 4.0]}
        >>> G = one | {"operator": "ggn", "nodes": [0.0, 4.0]}
        >>> float(ggn_share(pd.DataFrame([H, G]))["head"])
        0.64
    """
    squares = {}
    if "operator" not in rows:
        raise ValueError("the rows have no column operator; pass whole rows of table spectra")
    for operator in ("hessian", "ggn"):
        blocks = [b.with_second_moments() for b in blocks_of(rows[rows["operator"] == operator])]
        found = {b.name: float(np.dot(b.average()[1], b.average()[0] ** 2)) for b in blocks}
        squares[operator] = pd.Series(found)
    H, G = squares["hessian"], squares["ggn"]
    if alone := sorted(set(H.index) ^ set(G.index)):
        raise ValueError(f"block {alone[0]!r} has rows of one operator alone; take both")
    return (G.reindex(H.index) / H.where(H > 0)).rename("ggn_share")
