r"""Logits of every merge from a few known logits and derivatives: polynomial interpolation in the coefficients.

Let ``h(alpha)`` be the logits of one task at ``x_0 + sum_i alpha_i Delta_i``.  Known are D numbers per image and class:
values ``h(a)`` (forward passes) and derivatives ``d^o h(a)`` (Jacobian products and second directional derivatives) at
points a in coefficient space.  A polynomial ``h(alpha) = sum_m c_m phi_m(alpha)`` through all of them is *linear in
what is known*:

    h(alpha) = sum_d w_d(alpha) known_d,        w(alpha) = phi(alpha)' Omega (Phi Omega)^+,

with ``Phi_dm`` the m-th basis function under the d-th observation, and Omega the prior sizes of the coefficients (the
smallest solution counts where the observations do not determine the polynomial; where they are too many, least
squares, in which values count far more than derivatives).  So one collection prices every
alpha at the cost of a small matrix product, with gradients.  Secant and tangent (theory.md section 8) are the two
simplest cases; exact for polynomial logits that the observations determine.  Tier *estimated*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement
from math import factorial, perm

import numpy as np
import numpy.typing as npt

from theory.errors import MergeboundError
from theory.function_space import Array, Labels

_SINGULAR = 1e-9
_DERIVATIVES = 1e-2
"""Weight of derivatives against values where a polynomial cannot satisfy all of them (least squares)."""
Orders = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Known:
    """What was observed: D values or derivatives of the logits.

    Attributes:
        points: a, (D, K).
        orders: how often each coefficient is differentiated by, (D, K); a row of zeros is a value.
    """

    points: Array
    orders: Orders

    def __post_init__(self) -> None:
        if self.points.ndim != 2 or self.points.shape != self.orders.shape:
            raise MergeboundError(
                f"points have shape {self.points.shape} and orders {self.orders.shape}: give (observations, "
                "coefficients) for both"
            )

    def __len__(self) -> int:
        return len(self.points)

    @property
    def size(self) -> int:
        """Number of coefficients K."""
        return int(self.points.shape[1])


def values(points: npt.ArrayLike) -> Known:
    """Values at the points (D, K)."""
    at = np.atleast_2d(np.asarray(points, dtype=np.float64))
    return Known(at, np.zeros(at.shape, dtype=np.int64))


def derivatives(point: npt.ArrayLike, orders: npt.ArrayLike) -> Known:
    """Derivatives of the given orders (D, K), all at one point (K,)."""
    wanted = np.atleast_2d(np.asarray(orders, dtype=np.int64))
    return Known(np.tile(np.asarray(point, dtype=np.float64), (len(wanted), 1)), wanted)


def together(parts: Sequence[Known]) -> Known:
    """All observations of several kinds, in their order."""
    return Known(np.concatenate([p.points for p in parts]), np.concatenate([p.orders for p in parts]))


@dataclass(frozen=True)
class Basis:
    """Functions phi of the coefficients: combinations of monomials.

    Attributes:
        exponents: of the monomials, (M, K).
        mix: the functions in terms of monomials, (B, M).
        sizes: prior sizes of the functions' coefficients, (B,): where observations leave a choice, the solution with
            the smallest sum of squares of coefficient over size is taken.
    """

    exponents: Orders
    mix: Array
    sizes: Array

    def under(self, points: Array, orders: Orders) -> Array:
        """The functions' derivatives of the given orders at the points, both (D, K): (D, B)."""
        return np.asarray(_monomials(self.exponents, points, orders) @ self.mix.T)

    def at(self, alpha: Array) -> Array:
        """The functions at ``alpha`` (A, K): (A, B)."""
        return self.under(alpha, np.zeros(alpha.shape, dtype=np.int64))


def polynomials(size: int, degree: int) -> Basis:
    """All monomials up to a degree, with the prior ``prod_i 1 / sqrt(e_i!)``: that of the exponential kernel
    ``exp(alpha . alpha')``, under which derivatives of every order are expected to be of one size.
    """
    rows = [e for total in range(degree + 1) for e in combinations_with_replacement(range(size), total)]
    exponents = np.array([np.bincount(np.array(e, dtype=np.int64), minlength=size) for e in rows], dtype=np.int64)
    sizes = np.array([1.0 / np.sqrt(np.prod([float(factorial(int(v))) for v in e])) for e in exponents])
    return Basis(exponents, np.eye(len(exponents)), sizes)


def affine(size: int) -> Basis:
    """1 and every coefficient."""
    return polynomials(size, 1)


def own_squares(size: int) -> Basis:
    """1, every coefficient and its square: no mixed terms."""
    exponents = np.concatenate([np.zeros((1, size)), np.eye(size), 2 * np.eye(size)]).astype(np.int64)
    return Basis(exponents, np.eye(len(exponents)), np.ones(len(exponents)))


def with_common_pairs(basis: Basis) -> Basis:
    """One more function, ``sum_{i<k} alpha_i alpha_k``: it vanishes at the base and at every expert, so that a single
    further point (the average) determines it.  With one expert there are no pairs and nothing is added."""
    size = basis.exponents.shape[1]
    if size < 2:
        return basis
    first, second = np.triu_indices(size, 1)
    pairs = np.zeros((len(first), size), dtype=np.int64)
    pairs[np.arange(len(first)), first] = 1
    pairs[np.arange(len(first)), second] = 1
    count, monomials = basis.mix.shape
    mix = np.zeros((count + 1, monomials + len(pairs)))
    mix[:count, :monomials] = basis.mix
    mix[count, monomials:] = 1.0
    return Basis(np.concatenate([basis.exponents, pairs]), mix, np.append(basis.sizes, 1.0))


def _monomials(exponents: Orders, points: Array, orders: Orders) -> Array:
    """Derivatives of monomials, (D, M): ``prod_k e!/(e - o)! a^(e - o)``, zero where a derivative is too high."""
    top = int(exponents.max(initial=0)) + 1
    table = np.array([[float(perm(e, o)) for o in range(int(orders.max(initial=0)) + 1)] for e in range(top)])
    out = np.ones((len(points), len(exponents)))
    for k in range(points.shape[1]):
        e, o = exponents[None, :, k], orders[:, None, k]
        out *= table[e, o] * points[:, None, k] ** np.maximum(e - o, 0)
    return out


@dataclass(frozen=True)
class Rule:
    """How a prediction depends on what is known: a sum over parts of ``scale * w(alpha)``.

    Attributes:
        parts: (scale, bases, rows of ``known`` that the part interpolates).  The first basis is fitted to the rows, the
            next to what the first leaves of them, and so on: a quadratic that explains everything stays one.
        known: all observations, D rows.
    """

    parts: tuple[tuple[float, tuple[Basis, ...], tuple[int, ...]], ...]
    known: Known

    @cached_property
    def _solved(self) -> tuple[tuple[Array, ...], ...]:
        """For every part and basis: coefficients of the functions as a linear map of the rows, (B, rows)."""
        found = []
        for _, bases, rows in self.parts:
            chosen = list(rows)
            orders = self.known.orders[chosen]
            trust = np.where(orders.sum(axis=1) == 0, 1.0, _DERIVATIVES)
            left, maps = np.eye(len(chosen)), []
            for basis in bases:
                seen = basis.under(self.known.points[chosen], orders)
                inverse = np.linalg.pinv(trust[:, None] * seen * basis.sizes, rcond=_SINGULAR)
                maps.append(basis.sizes[:, None] * inverse * trust @ left)
                left = left - seen @ maps[-1]
            found.append(tuple(maps))
        return tuple(found)

    def weights(self, alpha: npt.ArrayLike) -> Array:
        """w(alpha), (..., D), for alpha (..., K).

        Raises:
            MergeboundError: coefficients that do not fit or are not finite.
        """
        a = self._coefficients(alpha)
        return self._weights(a, np.zeros(a.shape, dtype=np.int64))

    def slopes(self, alpha: npt.ArrayLike) -> Array:
        """Derivatives of w by each coefficient, (..., K, D), for alpha (..., K)."""
        a = self._coefficients(alpha)
        units = np.eye(self.known.size, dtype=np.int64)
        return np.stack([self._weights(a, np.broadcast_to(unit, a.shape)) for unit in units], axis=-2)

    def _weights(self, alpha: Array, orders: Orders) -> Array:
        flat, flat_orders = alpha.reshape(-1, self.known.size), orders.reshape(-1, self.known.size)
        out = np.zeros((len(flat), len(self.known)))
        for (scale, bases, rows), maps in zip(self.parts, self._solved, strict=True):
            for basis, solved in zip(bases, maps, strict=True):
                out[:, list(rows)] += scale * basis.under(flat, flat_orders) @ solved
        return out.reshape(*alpha.shape[:-1], len(self.known))

    def _coefficients(self, alpha: npt.ArrayLike) -> Array:
        a = np.asarray(alpha, dtype=np.float64)
        if a.shape[-1:] != (self.known.size,) or not np.isfinite(a).all():
            raise MergeboundError(
                f"alpha has shape {a.shape} or is not finite: give {self.known.size} numbers, one per expert"
            )
        return a


@dataclass(frozen=True)
class InterpolatedField:
    """Logits of one task by a :class:`Rule`: what :func:`theory.function_space.predict_risk` takes.

    R~ is convex in alpha only if the rule is affine; otherwise a minimiser is a stationary point.

    Attributes:
        rule: how the logits depend on what is known.
        data: what is known, (D, n, C), in logits (per unit of each coefficient that it is differentiated by).
        labels: (n,).
        kind: name of the predictor.

    >>> rule = Rule(((1.0, (affine(1),), (0, 1)),), values([[0.0], [1.0]]))
    >>> field = InterpolatedField(rule, np.array([[[0.0, 0.0]], [[2.0, -2.0]]]), np.array([0]), "secant")
    >>> field.at([0.5]).round(9).tolist()
    [[1.0, -1.0]]
    """

    rule: Rule
    data: Array
    labels: Labels
    kind: str

    def __post_init__(self) -> None:
        if self.data.ndim != 3 or len(self.data) != len(self.rule.known):
            raise MergeboundError(
                f"data of the predictor {self.kind} have shape {self.data.shape}, expected "
                f"({len(self.rule.known)}, images, classes)"
            )

    def at(self, alpha: npt.ArrayLike) -> Array:
        """Logits at the coefficients ``alpha`` of shape (..., K): shape (..., n, C)."""
        return np.asarray(np.tensordot(self.rule.weights(alpha), self.data, axes=1))

    def slopes_at(self, alpha: npt.ArrayLike) -> Array:
        """Derivative of the logits by each coefficient, (..., K, n, C)."""
        return np.asarray(np.tensordot(self.rule.slopes(alpha), self.data, axes=1))

    @cached_property
    def slopes(self) -> Array:
        """Derivatives at the base, (K, n, C)."""
        return self.slopes_at(np.zeros(self.rule.known.size))
