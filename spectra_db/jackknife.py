"""Estimates with errors: the blocks of one spectrum, and the jackknife over their probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import scipy

from spectra_db.densities import (
    Array,
    BlockSpectrum,
    blocks_of,
    global_max,
    scale_of,
    smooth_log_lambda10,
)

# Two probes would leave one degree of freedom per block, and a bias as large as its estimate.
MIN_PROBES = 3
_LEVEL = 0.9


@dataclass(frozen=True)
class Estimate:
    """A metric of one model at one stage.

    Attributes:
        value: Plug-in estimate, biased upwards when probes are few.
        corrected: After the jackknife's correction; nan if a block has fewer than 3 probes.
        standard_error: Jackknife standard error over probes; nan as `corrected`.
        dof: Degrees of freedom of the standard error (Welch-Satterthwaite); inf if exact.
        num_blocks: Blocks that entered.
        num_zero_blocks: Exactly zero blocks, left out.
        num_products: Hessian-vector products that the metric needs, over all blocks.
    """

    value: float
    corrected: float
    standard_error: float
    dof: float
    num_blocks: int
    num_zero_blocks: int
    num_products: int

    def interval(self, level: float = _LEVEL) -> tuple[float, float]:
        """Return the two-sided Student's t interval of the corrected value; nan as `corrected`."""
        if not self.standard_error > 0:
            return self.corrected, self.corrected
        quantile = float(scipy.special.stdtrit(min(self.dof, 1e6), (1 + level) / 2))
        half = quantile * self.standard_error
        return self.corrected - half, self.corrected + half

    @property
    def ci_low(self) -> float:
        """Lower end of the 90 % interval."""
        return self.interval()[0]

    @property
    def ci_high(self) -> float:
        """Upper end of the 90 % interval."""
        return self.interval()[1]


@dataclass(frozen=True)
class Blocks:
    """The blocks of one spectrum that are not zero.

    Attributes:
        blocks: The blocks.
        num_zero_blocks: Blocks that are exactly zero.
        errors_known: Every sampled block has probes enough for the jackknife.
        extended: Their rules are those of T continued where Lanczos stopped.
    """

    blocks: list[BlockSpectrum]
    num_zero_blocks: int
    errors_known: bool
    extended: bool

    @classmethod
    def of(cls, rows: pd.DataFrame, *, extend: bool = True) -> Blocks:
        """Gather rows of table `spectra`.

        Args:
            rows: Rows of one model, stage and partition.
            extend: Continue each T by the mean of its last coefficients (docs/protocol.md).

        Raises:
            ValueError: As `blocks_of`, or fewer than two blocks are not zero.
        """
        every = blocks_of(rows)
        blocks = [b for b in every if not b.zero]
        if len(blocks) < 2:
            raise ValueError(
                f"{len(blocks)} of {len(every)} blocks are not zero; a distance between blocks "
                "needs at least two"
            )
        enough = all(b.exact or len(b.rules) >= MIN_PROBES for b in blocks)
        zero = len(every) - len(blocks)
        blocks = [b.extended() for b in blocks] if extend else blocks
        return cls(blocks, zero, errors_known=enough, extended=extend)

    def __len__(self) -> int:
        return len(self.blocks)

    @cached_property
    def deletions(self) -> list[tuple[int, int]]:
        """(block, probe) of every probe that the jackknife leaves out, by block."""
        if not self.errors_known:
            return []
        return [
            (k, i) for k, b in enumerate(self.blocks) if not b.exact for i in range(len(b.rules))
        ]

    @cached_property
    def divergences(self) -> dict[tuple[str, float], Any]:
        """Those that were computed of these blocks, by scale and σ."""
        return {}

    def truncated(self, fraction: float) -> Blocks:
        """Return the blocks after that fraction of the Lanczos steps, for plug-in values alone.

        As many were asked for as the probes took that did not break down; if all did, every rule
        stays.
        """
        took = [len(r.alphas) for b in self.blocks for r in b.recurrences if not r.breakdown]
        if not took:
            return replace(self, errors_known=False)
        shorter = [b.truncated(max(took), fraction, extend=self.extended) for b in self.blocks]
        return replace(self, blocks=shorter, errors_known=False)

    def scales(self, scale: str) -> Array:
        """Return what each block's eigenvalues are divided by, shape (K,)."""
        top = global_max(self.blocks)
        return np.array([scale_of(b.average(), b.num_params, scale, top) for b in self.blocks])

    def moved_scales(self, scale: str, scales: Array) -> Array:
        """Return the scale of each deletion, shape (D,): that of the probes that are left.

        λ10 moves as its smooth version does (`smooth_log_lambda10`). The global maximum is that
        of all probes always: one probe hardly moves it.
        """
        moved = np.array([scales[k] for k, _ in self.deletions])
        if scale in ("raw", "global_max"):
            return moved
        for d, (k, i) in enumerate(self.deletions):
            block = self.blocks[k]
            n, num_probes = block.num_params, len(block.rules)
            if scale != "lambda10":
                moved[d] = scale_of(block.average(i), n, scale, 0.0)
            else:
                change = smooth_log_lambda10(*block.average(i), n, num_probes)
                change -= smooth_log_lambda10(*block.average(), n, num_probes)
                moved[d] *= np.exp(change)
        return moved

    def by_block(self, values: Sequence[float] | Array) -> list[Array]:
        """Split values of all deletions into one array per sampled block."""
        owners = np.array([k for k, _ in self.deletions], dtype=int)
        return [np.asarray(values)[owners == k] for k in np.unique(owners)]

    def estimate(
        self, value: float, corrected: float, changed: Sequence[float] | Array
    ) -> Estimate:
        """Finish an estimate from the values with each probe of each sampled block left out.

        The variance of a block is (P − 1)/P Σ (x_i − x̄)² over its P probes; those of independent
        blocks add up (Efron & Stein 1981).
        """
        groups = self.by_block(changed)
        variances = np.array([(len(x) - 1) * float(np.var(x)) for x in groups])
        dofs = np.array([len(x) - 1 for x in groups])
        total = float(variances.sum())
        nan = float("nan")
        return Estimate(
            value=value,
            corrected=corrected if self.errors_known else nan,
            standard_error=total**0.5 if self.errors_known else nan,
            dof=total**2 / float((variances**2 / dofs).sum()) if total > 0 else float("inf"),
            num_blocks=len(self.blocks),
            num_zero_blocks=self.num_zero_blocks,
            num_products=sum(b.num_products for b in self.blocks),
        )

    def jackknife(
        self, value: float, fixed: Sequence[float] | Array, moved: Sequence[float] | Array
    ) -> Estimate:
        """Correct a metric and give its error from its values with each probe left out.

        Args:
            value: The metric.
            fixed: Per deletion, the scales being those of all probes: for the bias.
            moved: Per deletion, the scales moving too: for the error.
        """
        bias = sum((len(x) - 1) * (float(x.mean()) - value) for x in self.by_block(fixed))
        return self.estimate(value, value - bias, moved)
