"""How a spectrum is taken: one frozen value, checked once; needs no torch."""

from __future__ import annotations

import math
import numbers
import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from harness.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

# Blocks up to this size are diagonalised: n products cost no more than 10 probes x 100 steps. Where
# more are asked for, larger blocks are, up to one whose matrix and its eigenvalues take seconds.
EXACT_SIZE, MOST_EXACT = 1000, 4000
# What may be chosen; the first is the protocol's.
CHOICES = {
    "norm_mode": ("eval", "train"),
    "dtype": ("float32", "float64"),
    "probe_distribution": ("gaussian", "rademacher"),
    "matmul_precision": ("highest", "high", "medium"),
    "operator": ("hessian", "ggn"),
    "product": ("autograd", "differences"),
}


@dataclass(frozen=True)
class Settings:
    """How a spectrum is taken.

    Attributes:
        partition: Of the parameters into blocks, as `find_blocks` has them, or custom.
        num_probes: Probes per block; 10 in the paper. Errors of metrics need at least 3.
        num_steps: Lanczos steps per probe; 100 in the paper.
        dtype: Arithmetic of the products, float32 or float64 (or the torch.dtype of that name);
            alphas and betas are float64 always.
        device: Where to compute; None: where the model is.
        norm_mode: eval: batch norms use running statistics. train: those of the microbatch.
        probe_distribution: gaussian (normalised, as in the paper) or rademacher.
        reorthogonalize: Full reorthogonalisation; keeps num_steps vectors per probe.
        matmul_precision: highest: float32; high: TF32; medium: bfloat16, where the device can.
        memory_budget: Bytes for graphs and vectors; None: half of the device's memory, on CPU
            divided among the processes that torchrun starts. A microbatch that takes more is
            halved, and so is one for which the device's memory turns out not to be enough. Not
            counted: the model, the first check of the loss, one pass without a graph over each
            batch as it is given, and freed memory that an allocator doesn't give back.
        exact_size: Blocks of at most this many parameters are diagonalised; None: 1,000, as by the
            protocol, or as many as the products of a block's probes (4,000 at most).
        operator: What the spectrum is of: hessian, or ggn, the generalised Gauss-Newton matrix
            Jᵀ (∇²c) J, with J the derivative of the outputs and c the criterion of a `SplitLoss`.
        product: autograd: exact, by differentiating twice. differences: of two gradients, for what
            can't be differentiated twice; rows then hold its error.
        gram: Diagonalise blocks of whatever size through the Gram matrix of the derivatives of the
            outputs of a `SplitLoss`: with operator hessian those in which the outputs are locally
            linear, with ggn all, where there are at most 4,096 outputs, or parameters, and the
            matrices fit the memory budget: a backward pass over the batch for each output of a
            sample. The others are taken as without it. None: where a sample has at most 100
            outputs, of a `SplitLoss`, in one process, without differences.

    Raises:
        UserError: One of them is out of range, or differences are asked for with ggn or gram.
    """

    partition: str = "weights"
    num_probes: int = 10
    num_steps: int = 100
    dtype: str = "float32"
    device: str | None = None
    norm_mode: str = "eval"
    probe_distribution: str = "gaussian"
    reorthogonalize: bool = False
    matmul_precision: str = "highest"
    memory_budget: int | None = None
    exact_size: int | None = None
    operator: str = "hessian"
    product: str = "autograd"
    gram: bool | None = False

    def __post_init__(self) -> None:
        """Check the values, and write them plainly."""
        plain: dict[str, Any] = {
            "num_probes": whole_number("num_probes", self.num_probes, 1),
            "num_steps": whole_number("num_steps", self.num_steps, 1),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": None if self.device is None else str(self.device),
        }
        if self.exact_size is not None:
            plain["exact_size"] = whole_number("exact_size", self.exact_size, 0)
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        budget = self.memory_budget
        is_number = isinstance(budget, numbers.Real) and not isinstance(budget, bool)
        if budget is not None and not (is_number and 0 < budget < math.inf):
            raise UserError(
                f"memory_budget is {budget!r}; it must be a number of bytes above 0, such as "
                "4 * 2**30 for 4 GiB, or None for half of the device's memory"
            )
        for name, allowed in CHOICES.items():
            given = getattr(self, name)
            if given not in allowed:
                raise UserError(f"{name} is {given!r}; choose one of {', '.join(allowed)}")
        if not (self.gram is None or isinstance(self.gram, bool)):
            raise UserError(f"gram is {self.gram!r}; choose one of True, False, None")
        if self.operator == "ggn" and self.product == "differences":
            raise UserError("operator ggn takes first derivatives alone: leave product='autograd'")
        if self.gram and self.product == "differences":
            raise UserError("gram takes derivatives of the outputs: leave product='autograd'")

    @property
    def derives(self) -> bool:
        """Whether tables `blocks` and `heterogeneity` follow from spectra of these settings.

        They have no column for another arithmetic or mode than the protocol's, and compare blocks.
        """
        plain = all(getattr(self, name) == allowed[0] for name, allowed in CHOICES.items())
        return plain and self.partition != "full"

    @property
    def key(self) -> dict[str, Any]:
        """The columns by which rows of these settings differ from rows of others."""
        names = ("partition", "operator", "norm_mode", "dtype", "probe_distribution")
        return {name: getattr(self, name) for name in names}

    @property
    def columns(self) -> dict[str, Any]:
        """All columns of table `spectra` that the settings stand for."""
        return self.key | {
            "reorthogonalized": self.reorthogonalize,
            "matmul_precision": self.matmul_precision,
        }

    def is_exact(self, num_params: int) -> bool:
        """Tell whether a block of that many parameters is diagonalised."""
        by_cost = max(EXACT_SIZE, min(self.num_probes * self.num_steps, MOST_EXACT))
        return num_params <= (by_cost if self.exact_size is None else self.exact_size)

    def num_products(self, num_params: int) -> int:
        """Return the products that a block of that many parameters takes."""
        return num_params if self.is_exact(num_params) else self.num_probes * self.num_steps

    def complete(self, rows: pd.DataFrame) -> set[str]:
        """Return the blocks that have all that these settings ask for, or more.

        Args:
            rows: Rows of table `spectra` of one model, stage and seed.
        """
        # By numpy: a run asks often, of few rows, on which pandas takes ten times as long.
        of = {name: rows[name].to_numpy() for name in ("status", "method", "block", "num_steps")}
        zero = of["status"] == "zero"
        kept = (of["status"] == "ok") | zero
        for column, value in self.columns.items():
            kept &= rows[column].to_numpy() == value
        kept &= rows["product"].fillna(CHOICES["product"][0]).to_numpy() == self.product
        single = kept & ((of["method"] == "exact") | zero)
        asked = single | kept & ((of["num_steps"] >= self.num_steps) | rows["breakdown"].to_numpy())
        alone = set(of["block"][single])
        counts = Counter(of["block"][asked])
        return {b for b, count in counts.items() if b in alone or count >= self.num_probes}


def check_names(what: str, given: Iterable[str]) -> None:
    """Raise unless `Settings` knows the names of what something was given beside its own."""
    known = [field.name for field in fields(Settings)]
    if unknown := set(given) - set(known):
        raise UserError(
            f"{what} has no argument {min(unknown)!r}; beside its own it takes "
            f"{', '.join(known[3:])}"
        )


def whole_number(name: str, value: Any, least: int) -> int:
    """Return a count as an integer.

    Raises:
        UserError: It is none, or less than the least.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return number
