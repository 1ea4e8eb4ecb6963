"""The Lanczos recurrence, for one operator or for many in lockstep.

Takes vectors and the operator's products with them; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

# A residual of at most this many rounding errors of the product's arithmetic, relative to the norm
# of T, can't be told from zero (docs/protocol.md, Stochastic Lanczos quadrature). 64 of them took
# bulks under an outlier of 1e5 times their size for exhausted; going on from a residual that is
# rounding costs products, not accuracy: the nodes that it adds have no weight.
_BREAKDOWN_EPS = 1.0
# Entries summed in float64 at a time: keeps the copies in cache.
_DOT_CHUNK = 1 << 20


class Inner:
    """The inner product of vectors, accumulated in float64; as tensors on their device."""

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ⟨a, b⟩."""
        chunks = zip(a.split(_DOT_CHUNK), b.split(_DOT_CHUNK), strict=True)
        return torch.stack([torch.dot(x.double(), y.double()) for x, y in chunks]).sum()

    def norm(self, a: torch.Tensor) -> torch.Tensor:
        """Return ‖a‖."""
        return torch.linalg.vector_norm(a, dtype=torch.float64)

    def size(self, a: torch.Tensor) -> int:
        """Return the number of entries of a."""
        return a.numel()


WHOLE = Inner()


@dataclass
class Recurrence:
    """The state of one Lanczos recurrence, advanced in place by `advance`.

    Attributes:
        vector: The vector to multiply next, unit norm, shape (n,).
        previous: The one before it, shape (n,); None at the start.
        alphas: Diagonal of T so far, as Python floats.
        betas: Off-diagonal of T, the last being the residual norm.
        basis: All vectors so far if reorthogonalising, else None.
        breakdown: The residual is zero to rounding, and the recurrence over: the rule is exact
            for an operator that differs by as much as the products' rounding.
        asymmetry: |⟨v_1, A v_2⟩ − ⟨v_2, A v_1⟩| / ‖T‖ after two steps; rounding if A is symmetric.
        size: n; 0 of one that is left without vectors.
        inner: The inner product.
    """

    vector: torch.Tensor
    previous: torch.Tensor | None = None
    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    basis: list[torch.Tensor] | None = None
    breakdown: bool = False
    asymmetry: float = 0.0
    size: int = 0
    inner: Inner = WHOLE

    @property
    def nbytes(self) -> int:
        """Memory of the vectors."""
        own = [self.vector] if self.previous is None else [self.vector, self.previous]
        return sum(v.nbytes for v in own + (self.basis or []))

    def is_done(self, num_steps: int) -> bool:
        """Tell whether that many steps are taken, or as many as there are."""
        return self.breakdown or len(self.alphas) >= num_steps


class Kept:
    """Recurrences that may go on later: as many with their vectors as fit.

    One without is still good for its alphas and betas; to go on it starts again.
    """

    def __init__(self, budget: int) -> None:
        self._free = budget
        self._states: dict[object, Recurrence] = {}

    def put(self, key: object, state: Recurrence) -> None:
        """Keep a recurrence; its vectors only if they fit what is left of the budget in bytes."""
        if state.breakdown or state.nbytes > self._free:
            nothing = state.vector.new_empty(0)
            state = Recurrence(nothing, None, state.alphas, state.betas, None, state.breakdown)
        self._free -= state.nbytes
        self._states[key] = state

    def take(self, key: object, num_steps: int) -> Recurrence | None:
        """Return a recurrence, to be put back, if it is as long or can go on; else None."""
        state = self._states.pop(key, None)
        if state is None:
            return None
        self._free += state.nbytes
        return state if state.is_done(num_steps) or state.size else None


def start(v0: torch.Tensor, *, reorthogonalize: bool = False, inner: Inner = WHOLE) -> Recurrence:
    """Begin a recurrence at v0 / ‖v0‖.

    Args:
        v0: Nonzero vector, shape (n,).
        reorthogonalize: Keep all vectors and orthogonalise each new one against them.
        inner: The inner product, where v0 is not the whole vector.

    Raises:
        ValueError: v0 is zero or not finite.
    """
    norm = float(inner.norm(v0))
    if not 0.0 < norm < float("inf"):
        raise ValueError(f"the start vector has norm {norm}; it must be positive and finite")
    vector = (v0.double() / norm).to(v0.dtype)
    basis = [vector] if reorthogonalize else None
    return Recurrence(vector, basis=basis, size=inner.size(v0), inner=inner)


def advance(recurrences: Sequence[Recurrence], products: Sequence[torch.Tensor]) -> None:
    """Take one step of each recurrence, given A v for its current vector.

    The three-term recurrence in the order that loses least (paper Algorithm 4; Paige 1972):
    w = A v_j − β_{j−1} v_{j−1}, α_j = ⟨w, v_j⟩, w ← w − α_j v_j, β_j = ‖w‖, v_{j+1} = w / β_j.
    Inner products are accumulated in float64, and the host waits for the device once per call,
    however many recurrences there are.

    Args:
        recurrences: The states, none of them broken down; changed in place.
        products: The operator's product with each `vector`, same shapes; overwritten.

    Raises:
        FloatingPointError: A product is not finite.
    """
    if not recurrences:
        return
    scalars = []
    zero = torch.zeros((), dtype=torch.float64, device=products[0].device)
    for r, w in zip(recurrences, products, strict=True):
        lean = zero
        if r.previous is not None:
            w.add_(r.previous, alpha=-r.betas[-1])
            if len(r.alphas) == 1:  # once tells, and costs a product of vectors
                lean = r.inner.dot(w, r.previous)
        alpha = r.inner.dot(w, r.vector)
        w.addcmul_(r.vector, alpha.to(w.dtype), value=-1)
        if r.basis is not None:
            for _ in range(2):  # twice is enough (Parlett 1998, section 6.9)
                for q in r.basis:
                    w.addcmul_(q, r.inner.dot(w, q).to(w.dtype), value=-1)
        scalars += [alpha, r.inner.norm(w), lean]
    values = torch.stack(scalars).view(-1, 3).tolist()  # the one synchronisation
    for r, w, (alpha, beta, lean) in zip(recurrences, products, values, strict=True):
        if not (abs(alpha) < float("inf") and beta < float("inf")):
            raise FloatingPointError(
                f"product {len(r.alphas) + 1} of the operator is not finite; use a wider dtype "
                "or look for inf or nan in the second derivative"
            )
        r.alphas.append(alpha)
        r.betas.append(beta)
        if lean:
            r.asymmetry = abs(lean) / _norm(r)
        r.breakdown = beta <= _BREAKDOWN_EPS * torch.finfo(w.dtype).eps * _norm(r)
        r.breakdown |= len(r.alphas) == r.size
        if not r.breakdown:
            r.previous, r.vector = r.vector, w.div_(beta)
            if r.basis is not None:
                r.basis.append(r.vector)


def lanczos(
    matvec: Callable[[torch.Tensor], torch.Tensor],
    v0: torch.Tensor,
    num_steps: int,
    *,
    reorthogonalize: bool = False,
) -> Recurrence:
    """Run at most num_steps steps on one symmetric operator (paper Algorithm 4).

    Args:
        matvec: v ↦ A v for vectors of shape (n,); the result is not overwritten.
        v0: Start vector, shape (n,), nonzero.
        num_steps: Upper bound on the number of products; fewer at breakdown.
        reorthogonalize: Full reorthogonalisation; costs num_steps vectors of memory.

    Returns:
        The final state: `alphas` and `betas` of length m ≤ num_steps, the last beta the
        residual. With a basis Q of shape (n, m): A Q = Q T + β_m q_{m+1} e_mᵀ.

    Raises:
        ValueError: num_steps < 1 or v0 is zero.
        FloatingPointError: A product is not finite.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
        >>> run = lanczos(lambda v: A @ v, torch.ones(2, dtype=torch.float64), 5)
        >>> [round(a, 12) for a in run.alphas], run.breakdown
        ([2.0, 2.0], True)
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; at least 1 is needed")
    state = start(v0, reorthogonalize=reorthogonalize)
    while len(state.alphas) < num_steps and not state.breakdown:
        advance([state], [matvec(state.vector).clone()])
    return state


def _norm(r: Recurrence) -> float:
    """Return the largest row sum of |T|, at least its spectral norm."""
    rows = zip([0.0, *r.betas], r.alphas, [*r.betas[:-1], 0.0], strict=False)
    return max(abs(left) + abs(middle) + abs(right) for left, middle, right in rows)
