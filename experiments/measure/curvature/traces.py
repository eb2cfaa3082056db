"""Stochastic trace and diagonal of symmetric operators, with standard errors over the probes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt

from experiments.measure.curvature.number import NORMAL, Number
from theory.errors import MergeboundError, nearest

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse.linalg import LinearOperator

Array = npt.NDArray[np.float64]
Method = Literal["hutchinson", "hutch++", "xtrace"]
METHODS: tuple[Method, ...] = get_args(Method)
PROBES = 0x7ACE
"""Names the stream of probes."""
_COLUMNS = 16


@dataclass(frozen=True)
class Trace:
    """A trace with its error.

    Attributes:
        value: the estimate; unbiased.
        standard_error: over the probes, given the images; zero where the operator's rank was exhausted.  For
            ``hutch++`` given its sketch; for ``xtrace`` its authors' estimate (leave-one-out values are dependent).
        method: one of :data:`METHODS`.
        products: matrix-vector products used.
        seed: of the probes.
        parts: traces of the diagonal blocks that were asked for, by name (``hutchinson`` only).
        tier: of the value.
    """

    value: float
    standard_error: float
    method: str
    products: int
    seed: int
    parts: Mapping[str, Number]
    tier: str = "estimated"

    @property
    def number(self) -> Number:
        """With its 95 % interval."""
        return Number.normal(self.value, self.standard_error, _COVERS, self.seed)

    def to_frame(self) -> pd.DataFrame:
        """One row for the whole and one for every part."""
        import pandas as pd

        rows = {"all": self.number, **self.parts}
        return pd.DataFrame(
            [
                {"part": name, **n.row("trace"), "standard_error": n.standard_error, "tier": n.tier, "seed": n.seed}
                for name, n in rows.items()
            ]
        )


_COVERS = "probes (95 %), at this point on these images"


def stochastic_trace(
    operator: LinearOperator,
    products: int,
    *,
    method: Method = "hutchinson",
    parts: Mapping[str, npt.NDArray[np.int64]] | None = None,
    seed: int = 0,
) -> Trace:
    """The trace of a symmetric operator from matrix-vector products.

    * ``hutchinson``: ``v'Av`` with random signs v; variance ``2(|A|_F^2 - sum a_ii^2)/m`` (Hutchinson, 1990);
    * ``hutch++``: the trace on a sketch of the range exactly, Hutchinson on the rest: for positive semidefinite A an
      error of order 1/m in place of 1/sqrt(m) (Meyer, Musco, Musco and Woodruff, 2021, arXiv:2010.09649, algorithm 1);
    * ``xtrace``: every probe serves sketch and rest in turn (Epperly, Tropp and Webber, 2024, arXiv:2301.07825).

    Args:
        operator: symmetric, (P, P).
        products: matrix-vector products; rounded down to a multiple of 3 (``hutch++``) or 2 (``xtrace``).
        method: which estimator.
        parts: names of blocks and their coordinates, (m,) each: their traces come from the same products.
        seed: names the probes.

    Raises:
        MergeboundError: an unknown method, too few products for a standard error, or parts with another method.
    """
    if method not in METHODS:
        raise MergeboundError(f"method = {method!r}: {nearest(method, METHODS)}")
    if parts and method != "hutchinson":
        raise MergeboundError(f"parts: traces of blocks come from hutchinson, not from {method}")
    least = {"hutchinson": 2, "hutch++": 6, "xtrace": 4}[method]
    if products < least:
        raise MergeboundError(f"products = {products}: {method} needs at least {least} for a standard error")
    rng = np.random.default_rng([seed, PROBES])
    if method == "hutchinson":
        return _hutchinson(operator, products, rng, parts or {}, seed)
    if method == "hutch++":
        value, error, used = _hutch(operator, products // 3, rng)
    else:
        value, error, used = _xtrace(operator, products // 2, rng)
    return Trace(value, error, method, used, seed, {})


def _signs(rng: np.random.Generator, size: int, count: int) -> Array:
    return np.asarray(rng.integers(0, 2, (count, size), dtype=np.int8).T * 2.0 - 1.0)


def _mean(values: Array) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def _hutchinson(
    operator: LinearOperator,
    products: int,
    rng: np.random.Generator,
    parts: Mapping[str, npt.NDArray[np.int64]],
    seed: int,
) -> Trace:
    whole: list[Array] = []
    pieces: dict[str, list[Array]] = {name: [] for name in parts}
    for start in range(0, products, _COLUMNS):
        v = _signs(rng, operator.shape[0], min(_COLUMNS, products - start))
        energy = v * (operator @ v)
        whole.append(energy.sum(axis=0))
        for name, place in parts.items():
            pieces[name].append(energy[place].sum(axis=0))
    value, error = _mean(np.concatenate(whole))
    found = {name: Number.normal(*_mean(np.concatenate(p)), _COVERS, seed) for name, p in pieces.items()}
    return Trace(value, error, "hutchinson", products, seed, found)


def _hutch(operator: LinearOperator, count: int, rng: np.random.Generator) -> tuple[float, float, int]:
    size = operator.shape[0]
    basis = np.linalg.qr(operator @ _signs(rng, size, min(count, size)))[0]
    known = float((basis * (operator @ basis)).sum())
    probes = _signs(rng, size, count)
    rest = probes - basis @ (basis.T @ probes)
    value, error = _mean((rest * (operator @ rest)).sum(axis=0))
    return known + value, error, 3 * count


def _xtrace(operator: LinearOperator, count: int, rng: np.random.Generator) -> tuple[float, float, int]:
    size = operator.shape[0]
    count = min(count, size)
    probes = _signs(rng, size, count)
    sketch = operator @ probes
    basis, corner = np.linalg.qr(sketch)
    image = operator @ basis
    form = basis.T @ image
    diagonal = np.abs(np.diag(corner))
    if count == size or diagonal.min() <= 1e-10 * max(diagonal.max(), 1e-300):  # the sketch holds the whole range
        return float(np.trace(form)), 0.0, 2 * count
    left = np.linalg.inv(corner).T  # column i is orthogonal to every column of R but the i-th
    left /= np.linalg.norm(left, axis=0)
    values = np.empty(count)
    for i in range(count):
        s = left[:, i]
        inside = basis.T @ probes[:, i]
        inside -= s * (s @ inside)
        rest = probes[:, i] - basis @ inside
        moved = sketch[:, i] - image @ inside
        values[i] = np.trace(form) - s @ form @ s + rest @ moved
    value, error = _mean(values)
    return value, error, 2 * count


@dataclass(frozen=True, eq=False)
class Diagonal:
    """An estimated diagonal.

    Attributes:
        value: (P,), unbiased.
        standard_error: of each entry over the probes, (P,).
        products: matrix-vector products used.
        seed: of the probes.
        tier: of the values.
    """

    value: Array
    standard_error: Array
    products: int
    seed: int
    tier: str = "estimated"

    @property
    def low(self) -> Array:
        """Lower ends of 95 % intervals, entry by entry."""
        return self.value - NORMAL * self.standard_error

    @property
    def high(self) -> Array:
        """Upper ends of 95 % intervals, entry by entry."""
        return self.value + NORMAL * self.standard_error


def stochastic_diagonal(operator: LinearOperator, products: int, *, deflate: int = 0, seed: int = 0) -> Diagonal:
    """The diagonal of a symmetric operator: mean of ``v * (A v)`` over random signs v.

    The variance of entry i is ``sum over k != i of a_ik^2``, over the number of probes.  With ``deflate`` > 0 the part
    on a sketch of the range is exact, and the probes see what is left (Diag++: Baston and Nakatsukasa, 2022,
    arXiv:2201.10684); the standard error is then given the sketch.  For a Gauss-Newton matrix the exact diagonal is
    :func:`experiments.measure.fisher.fisher_diagonal` (one pass per class).

    Args:
        operator: symmetric, (P, P).
        products: matrix-vector products in all, of which the sketch takes ``2 * deflate``.
        deflate: columns of the sketch.
        seed: names the probes.

    Raises:
        MergeboundError: fewer than two probes are left.
    """
    probes = products - 2 * deflate
    if probes < 2 or deflate < 0:
        raise MergeboundError(
            f"products = {products}, deflate = {deflate}: two products or more must be left for probes"
        )
    rng = np.random.default_rng([seed, PROBES, 1])
    size = operator.shape[0]
    known, basis = np.zeros(size), np.zeros((size, 0))
    if deflate:
        basis = np.linalg.qr(operator @ _signs(rng, size, min(deflate, size)))[0]
        known = (basis * (operator @ basis)).sum(axis=1)
    mean, spread, count = np.zeros(size), np.zeros(size), 0
    for start in range(0, probes, _COLUMNS):
        v = _signs(rng, size, min(_COLUMNS, probes - start))
        moved = operator @ v
        entries = v * (moved - basis @ (basis.T @ moved))
        for column in entries.T:
            count += 1
            change = column - mean
            mean += change / count
            spread += change * (column - mean)
    return Diagonal(known + mean, np.sqrt(spread / (count - 1) / count), products, seed)
