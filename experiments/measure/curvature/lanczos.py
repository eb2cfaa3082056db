"""Extreme eigenvalues and the spectral density of symmetric operators, by Lanczos with full reorthogonalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from experiments.measure.curvature.number import Number
from theory.errors import MergeboundError
from theory.krylov import lanczos_excess

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse.linalg import LinearOperator

Array = npt.NDArray[np.float64]
Which = Literal["largest", "smallest"]
LANCZOS = 0x1A2C
"""Names the stream of Lanczos' start vectors."""
_EXHAUSTED = 1e-12


@dataclass(frozen=True, eq=False)
class Krylov:
    """``A Q = Q T + residual``: ``diagonal`` (m,) and ``off`` (m,) of T (the last entry is the residual's norm), and
    the orthonormal ``basis`` Q, (P, m)."""

    diagonal: Array
    off: Array
    basis: Array

    @property
    def steps(self) -> int:
        """Products m."""
        return len(self.diagonal)

    def ritz(self) -> tuple[Array, Array]:
        """Eigenvalues of T, ascending, and its eigenvectors (m, m)."""
        from scipy.linalg import eigh_tridiagonal

        values, vectors = eigh_tridiagonal(self.diagonal, self.off[:-1])
        return np.asarray(values), np.asarray(vectors)


def lanczos(operator: LinearOperator, steps: int, start: Array, stop: Callable[[Krylov], bool] | None = None) -> Krylov:
    """Run Lanczos from a start vector; every new vector is made orthogonal to all earlier ones twice.

    Args:
        operator: symmetric, (P, P).
        steps: products at most; fewer where the Krylov space is exhausted (then Ritz values are eigenvalues).
        start: (P,), not zero.
        stop: asked after every fourth step whether that is enough.

    Raises:
        MergeboundError: products that are not finite.
    """
    size = operator.shape[0]
    count = min(steps, size)
    basis = np.empty((size, count), order="F")
    diagonal, off = np.empty(count), np.empty(count)
    vector = start / np.linalg.norm(start)
    largest, k = 0.0, 0
    while True:
        basis[:, k] = vector
        product = np.asarray(operator @ vector, dtype=np.float64)
        if not np.isfinite(product).all():
            raise MergeboundError("a curvature product is not finite: check the point, or take float64")
        diagonal[k] = vector @ product
        known = basis[:, : k + 1]
        product = product - known @ (known.T @ product)
        product -= known @ (known.T @ product)
        off[k] = np.linalg.norm(product)
        largest = max(largest, abs(diagonal[k]), off[k])
        so_far = Krylov(diagonal[: k + 1], off[: k + 1], known)
        if off[k] <= _EXHAUSTED * largest or k + 1 == count:
            return so_far
        if stop is not None and k % 4 == 3 and stop(so_far):
            return so_far
        vector = product / off[k]
        k += 1


@dataclass(frozen=True, eq=False)
class Eigenvalues:
    """Extreme eigenvalues.

    Attributes:
        values: (k,), the most extreme first.  The first largest (smallest) is a Rayleigh quotient, hence never above
            (below) the true one.
        vectors: (P, k), of norm one.
        residuals: ``|A v - value v|``, computed, (k,): an eigenvalue of A lies within it of the value.
        limit: with probability at least ``1 - chance`` over the start vector, the extreme eigenvalue does not lie
            beyond this; infinite where the steps were too few to say anything.
        chance: see ``limit``.
        which: ``largest`` or ``smallest``.
        steps: products of the run.
        seed: of the start vector.
        tier: of the values (at this point, on these images).
    """

    values: Array
    vectors: Array
    residuals: Array
    limit: float
    chance: float
    which: str
    steps: int
    seed: int
    tier: str = "estimated"

    def number(self, index: int = 0) -> Number:
        """One of them with its residual interval; a Lanczos start does not see copies of a multiple eigenvalue."""
        value, error = float(self.values[index]), float(self.residuals[index])
        covers = "an eigenvalue, at this point on these images (residual bound)"
        return Number(value, value - error, value + error, float("nan"), covers, self.seed, self.tier)

    def to_frame(self) -> pd.DataFrame:
        """One row per eigenvalue."""
        import pandas as pd

        return pd.DataFrame(
            {
                "index": np.arange(len(self.values)),
                "eigenvalue": self.values,
                "residual": self.residuals,
                "limit": np.where(np.arange(len(self.values)) == 0, self.limit, np.nan),
                "tier": self.tier,
                "seed": self.seed,
            }
        )


def extreme_eigenvalues(
    operator: LinearOperator,
    count: int = 1,
    *,
    which: Which = "largest",
    steps: int = 40,
    tolerance: float = 1e-4,
    chance: float = 0.01,
    seed: int = 0,
) -> Eigenvalues:
    """The ``count`` largest or smallest eigenvalues and vectors of a symmetric operator.

    Lanczos runs for ``steps`` products, or until the residuals of all wanted pairs are below ``tolerance`` times the
    spectrum's width; then one product per pair gives the residuals that are reported.
    Eigenvalues of higher multiplicity are found once.

    Args:
        operator: symmetric, (P, P).
        count: how many.
        which: end of the spectrum.
        steps: products at most; memory P times this, float64.
        tolerance: relative residual at which to stop.
        chance: of ``limit`` being wrong.
        seed: names the start vector, normal.

    Raises:
        MergeboundError: counts that make no sense, or products that are not finite.

    Source: Parlett, "The symmetric eigenvalue problem", 1998, theorem 4.5.1 (residual bound) and section 13.8 (full
    reorthogonalisation); ``limit``: :func:`theory.krylov.lanczos_excess`.
    """
    if not 1 <= count <= steps or not 0.0 < chance < 1.0:
        raise MergeboundError(
            f"count = {count}, steps = {steps}, chance = {chance}: give 1 <= count <= steps and 0 < chance < 1"
        )
    if which not in ("largest", "smallest"):
        raise MergeboundError(f"which = {which!r}: choose largest or smallest")
    space = _run(operator, count, (which,), steps, tolerance, seed)
    return _eigenvalues(operator, space, count, which, chance, seed)


def both_ends(
    operator: LinearOperator, *, steps: int = 40, tolerance: float = 1e-4, chance: float = 0.01, seed: int = 0
) -> tuple[Eigenvalues, Eigenvalues]:
    """The smallest and the largest eigenvalue from one run; see :func:`extreme_eigenvalues`.

    Both limits hold together with probability at least ``1 - chance``.

    Raises:
        MergeboundError: fewer than two steps, or products that are not finite.
    """
    if steps < 2 or not 0.0 < chance < 1.0:
        raise MergeboundError(f"steps = {steps}, chance = {chance}: give 2 or more steps and 0 < chance < 1")
    space = _run(operator, 1, ("smallest", "largest"), steps, tolerance, seed)
    low = _eigenvalues(operator, space, 1, "smallest", chance, seed)
    return low, _eigenvalues(operator, space, 1, "largest", chance, seed)


def _order(values: Array, which: str, count: int) -> npt.NDArray[np.int64]:
    order = np.argsort(values)
    return order[::-1][:count] if which == "largest" else order[:count]


def _run(
    operator: LinearOperator, count: int, ends: tuple[str, ...], steps: int, tolerance: float, seed: int
) -> Krylov:
    def enough(space: Krylov) -> bool:
        if space.steps < 2 * count + 2:
            return False
        values, vectors = space.ritz()
        chosen = np.concatenate([_order(values, end, count) for end in ends])
        width = max(values[-1] - values[0], float(np.abs(values).max()))
        return bool((np.abs(space.off[-1] * vectors[-1, chosen]) <= tolerance * width).all())

    start = np.random.default_rng([seed, LANCZOS]).standard_normal(operator.shape[0])
    return lanczos(operator, steps, start, enough)


def _eigenvalues(
    operator: LinearOperator, space: Krylov, count: int, which: str, chance: float, seed: int
) -> Eigenvalues:
    values, vectors = space.ritz()
    found = space.basis @ vectors[:, _order(values, which, count)]
    found /= np.linalg.norm(found, axis=0)
    products = np.asarray(operator @ found)
    chosen = (found * products).sum(axis=0)
    residuals = np.linalg.norm(products - found * chosen, axis=0)
    exhausted = space.steps == operator.shape[0] or space.off[-1] <= _EXHAUSTED * float(np.abs(values).max())
    excess = 0.0 if exhausted else lanczos_excess(float(values[-1] - values[0]), operator.shape[0], space.steps, chance)
    limit = values[-1] + excess if which == "largest" else values[0] - excess
    return Eigenvalues(chosen, found, residuals, float(limit), chance, which, space.steps, seed)
