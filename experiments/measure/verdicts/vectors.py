"""Orthogonality of task vectors: cosines with intervals and a null distribution (theory.md section 7).

The null hypothesis: the products ``<Delta_i, Delta_k>`` of the units (an output row of a tensor each) have symmetric,
independent signs.  Then ``T = sum_u t_u`` has ``P(|T| >= z sqrt(sum t_u^2)) <= 2 exp(-z^2/2)`` for any number of units
(Hoeffding for Rademacher sums), whatever the sizes of the products: no network's spectrum need be known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experiments.measure.subject import Subject
from experiments.measure.verdicts.finding import Evidence, Finding, Leaning, finding
from theory.dispersion import dispersion_from_gram, orthogonal_bound
from theory.errors import MergeboundError

LEVEL = 0.01
"""Chance that any pair of orthogonal task vectors is called not orthogonal."""
_ZERO = 1e-12


@dataclass(frozen=True)
class Cosine:
    """One pair of task vectors.

    Attributes:
        first, second: experts.
        value: cosine.
        low, high: 95 % interval over units (infinitesimal jackknife: units taken as exchangeable; Student's limits
            with ``effective - 1`` degrees of freedom).  It is too narrow where ``effective`` is small.
        null: standard deviation of the cosine under the null hypothesis.
        z: value / null.
        chance: bound on the chance of such a value under the null hypothesis.
        units: that have a product which is not zero.
        effective: participation ratio of the units' shares of the lengths: how many carry most of them.
    """

    first: str
    second: str
    value: float
    low: float
    high: float
    null: float
    z: float
    chance: float
    units: int
    effective: float
    tier: str = "estimated"


def units_of(subject: Subject) -> Tensor:
    """Number of the unit that each merged coordinate belongs to, (P,) int64: a unit is one output row of a tensor."""
    space = subject.networks[0].space
    pieces, start = [], 0
    for (_, piece), shape in zip(space.segments(), space.shapes, strict=True):
        count = piece.stop - piece.start
        rows = int(shape[0]) if len(shape) else 1
        pieces.append(start + torch.arange(count) // max(count // max(rows, 1), 1))
        start += rows
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)


def cosines(deltas: Tensor, units: Tensor, names: Sequence[str]) -> tuple[Cosine, ...]:
    """Cosines of all pairs of task vectors.

    Args:
        deltas: (N, P), none of them zero.
        units: unit of each coordinate, (P,) int64 from 0.
        names: of the experts.

    Raises:
        MergeboundError: shapes that do not fit, or an expert that did not move.
    """
    if deltas.shape != (len(names), len(units)):
        raise MergeboundError(f"deltas: shape {tuple(deltas.shape)}, expected ({len(names)}, {len(units)})")
    index = units.cpu().numpy()
    rows = [row.double().cpu().numpy() for row in deltas]
    count = int(index.max()) + 1 if len(index) else 0
    squares = [np.bincount(index, weights=row * row, minlength=count) for row in rows]
    for name, square in zip(names, squares, strict=True):
        if square.sum() == 0.0:
            raise MergeboundError(f"expert {name!r}: it is the base itself; leave it out")
    found = []
    for i, k in combinations(range(len(names)), 2):
        products = np.bincount(index, weights=rows[i] * rows[k], minlength=count)
        found.append(_cosine(names[i], names[k], products, squares[i], squares[k]))
    return tuple(found)


def _cosine(first: str, second: str, products: np.ndarray, a: np.ndarray, b: np.ndarray) -> Cosine:
    from scipy.stats import t

    scale = float(np.sqrt(a.sum() * b.sum()))
    value = float(products.sum()) / scale
    influence = products / scale - 0.5 * value * (a / a.sum() + b / b.sum())
    share = np.sqrt(a * b) if (a * b).any() else a + b
    effective = float(share.sum() ** 2 / (share**2).sum())
    half = float(t.ppf(0.975, max(effective - 1.0, 1.0)) * np.sqrt((influence**2).sum()))
    null = float(np.sqrt((products**2).sum())) / scale
    units = int((products != 0.0).sum())
    z = value / null if null > _ZERO else 0.0
    chance = min(1.0, 2.0 * float(np.exp(-0.5 * z * z)))
    low, high = max(value - half, -1.0), min(value + half, 1.0)
    return Cosine(first, second, value, low, high, null, z, chance, units, effective)


def judge_orthogonal(
    deltas: Tensor,
    pairs: Sequence[Cosine],
    *,
    coefficients: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
    level: float = LEVEL,
) -> Finding:
    """Whether task vectors are orthogonal, and whether V by that formula holds all the same.

    Args:
        deltas: (N, P).
        pairs: of :func:`cosines`.
        coefficients: alpha of the merge, default 1/N.
        weights: p, default 1/N.
        level: chance of a false alarm over all pairs (Bonferroni).

    Returns:
        ``holds`` where every product is zero (disjoint supports); ``violated`` where a pair is too far from the null
        hypothesis, ``covered`` if the measured V is below the formula's for these coefficients (positive cosines lower
        the V of the average); ``unknown`` and ``for`` elsewhere.
    """
    count = len(deltas)
    if count < 2:
        return finding("orthogonal", "merge", "holds", "there is one task vector")
    gram = (deltas.double() @ deltas.double().T).cpu().numpy()
    alpha = np.full(count, 1.0 / count) if coefficients is None else np.asarray(coefficients, dtype=np.float64)
    p = np.full(count, 1.0 / count) if weights is None else np.asarray(weights, dtype=np.float64)
    exact = float(dispersion_from_gram(gram, alpha, p))
    formula = float(orthogonal_bound(np.sqrt(np.diag(gram)), alpha, p))
    top = max(pairs, key=lambda c: abs(c.value))
    rarest = min(pairs, key=lambda c: c.chance)
    covers = f"95 % over {top.units} units ({top.effective:.0f} carry most), {top.first} and {top.second}"
    evidence = (
        Evidence("largest cosine", top.value, top.low, top.high, covers),
        Evidence.exact("its standard deviation if signs were random", top.null, "null hypothesis"),
        Evidence.exact("smallest chance of a pair, times pairs", min(1.0, len(pairs) * rarest.chance), "Hoeffding"),
        Evidence.exact("V measured", exact, "checkpoints"),
        Evidence.exact("V by the orthogonal formula", formula, "checkpoints' norms"),
    )
    if max(abs(c.value) + c.null for c in pairs) <= _ZERO:
        return finding("orthogonal", "merge", "holds", "every product of coordinates is zero", *evidence)
    if len(pairs) * rarest.chance < level:
        fits = exact <= formula * (1 + 1e-9)
        why = f"{rarest.first} and {rarest.second}: cosine {rarest.value:.3g}, {abs(rarest.z):.1f} null deviations"
        why += "; V by the formula is still above the measured V" if fits else "; V is above the formula"
        remedy = "take the triangle or the centred bound on V, or V of the checkpoints"
        return finding("orthogonal", "merge", "violated", why, *evidence, covered=fits, remedy=remedy)
    seen: Leaning = "for"
    why = "no cosine is further from zero than random signs allow; one draw of the experts proves no expectation"
    return finding("orthogonal", "merge", "unknown", why, *evidence, seen=seen, remedy="take V of the checkpoints")
