"""Hardt, Recht, Singer (2016), *Train faster, generalize better* (arXiv 1509.01240), carried to merges.

The paper bounds the uniform stability of one run of SGD.  A linear (or c-sensitive) merge passes on at most ``c_i``
times the distance of expert i's twins, and the gap of the joint risk is ``sum_i p_i`` times the stability of task i's
loss at the merge (frozen heads, independent tasks).  Three cases:

* convex, ``eta_k <= 2/L``: ``c 2 G^2 sum(eta)/n``;
* strongly convex, constant ``eta <= 1/L``, iterates in a bounded set: ``c 2 G^2/(mu n)``;
* nonconvex, ``0 <= f <= B``, ``eta_k <= a/k``: ``B (1 + 1/(La))/(n-1) (2 a c G^2/B)^(1/(La+1)) K^(La/(La+1))``.

In the nonconvex case the sensitivity enters inside the power: the burn-in, in which nothing is lost because the sample
was not drawn, does not shrink with c.

The constants were checked against restatements of the paper and by the derivations in the docstrings; each holds for
every sampling in which a sample is drawn at step k with marginal probability 1/n: twins are pushed apart by at most
``I_k 2 G eta_k`` and only expectations of ``I_k`` are taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from theory.assumptions import Assumption
from theory.clocks import _stepwise, smoothness, step_count
from theory.errors import AssumptionError
from theory.published.common import (
    PublishedBound,
    align,
    bounded_assumption,
    constants,
    evaluated,
    lipschitz_assumption,
    published,
    rate_sum,
    refuse_merge,
    require_convex,
    require_plain_sgd,
    require_rate,
    sensitivities,
    single_samples,
    stack,
    used,
    weighted,
)
from theory.recipe import Expert, Merge, Schedule
from theory.symbolic import FloatArray, Formula, evaluate, times, vacuous
from theory.symbols import symbol

PAPER = "Hardt, Recht, Singer 2016, arXiv 1509.01240"
CHECKED = (
    "the paper's first pages and a restatement of its three theorems with proofs were read; constants re-derived; "
    "the factor c and mini-batches are ours"
)


def convex_formula() -> Formula:
    """``c 2 G^2 T/n``, T the sum of learning rates."""
    c, G, T, n = (symbol(key) for key in ("c", "G", "T", "n"))
    return Formula("gap", ("c", "G", "T", "n"), 2 * c * G**2 * T / n, f"{PAPER}, convex")


def strongly_convex_formula() -> Formula:
    """``c 2 G^2/(mu n)``."""
    c, G, mu, n = (symbol(key) for key in ("c", "G", "mu", "n"))
    return Formula("gap", ("c", "G", "mu", "n"), 2 * c * G**2 / (mu * n), f"{PAPER}, strongly convex")


def nonconvex_formula() -> Formula:
    """``B (1 + 1/(La))/(n-1) (2 a c G^2/B)^(1/(La+1)) K^(La/(La+1))``."""
    keys = ("B", "L", "a", "n", "c", "G", "K")
    B, L, a, n, c, G, K = (symbol(key) for key in keys)
    power = 1 / (L * a + 1)
    expression = B * (1 + 1 / (L * a)) / (n - 1) * (2 * a * c * G**2 / B) ** power * K ** (L * a * power)
    return Formula("gap", keys, expression, f"{PAPER}, nonconvex")


def burn_in_formula() -> Formula:
    """``B m_0/n + 2 c G^2/(L n) (prod_{l=m_0+1}^K (1 + La/l) - 1)``: the same argument at a whole burn-in m_0."""
    import sympy

    keys = ("B", "L", "a", "n", "c", "G", "K", "m0")
    B, L, a, n, c, G, K, m = (symbol(key) for key in keys)
    product = sympy.gamma(K + 1 + L * a) * sympy.gamma(m + 1) / (sympy.gamma(K + 1) * sympy.gamma(m + 1 + L * a))
    expression = B * m / n + 2 * c * G**2 / (L * n) * (product - 1)
    return Formula("gap", keys, expression, f"{PAPER}, nonconvex, whole burn-in (ours)")


def hardt_convex(merge: Merge) -> PublishedBound:
    """``E[F(M) - F_S(M)] <= sum_i p_i c_i 2 G_i^2 T_i/n_i`` for convex losses.

    Assumes convex, L-smooth, G-Lipschitz per-sample losses, ``eta_k <= 2/L``, plain SGD, any sampling with marginal
    rate b/n (the paper: b = 1).  Needs ``G`` of every expert; raises :class:`RecipeError` if it is missing and
    :class:`AssumptionError` naming what is violated.

    >>> from theory import Expert, Merge
    >>> e = Expert("a", n=100, batch_size=1, learning_rate=0.1, steps=50, curvature="convex", L=1.0, G=1.0)
    >>> round(float(hardt_convex(Merge((e,))).value), 12)
    0.1
    """
    name = "Hardt-Recht-Singer, convex"
    refuse_merge(merge, name)
    G = constants(merge, "G", name)
    for expert in merge.experts:
        require_plain_sgd(expert, name)
        require_convex(expert, name)
        require_rate(expert, 2.0, name)
    total = stack([rate_sum(expert) for expert in merge.experts])
    n = stack([np.asarray(expert.n, dtype=np.float64) for expert in merge.experts])
    rows = align(sensitivities(merge), G, total, n)
    return published(
        merge,
        name,
        "gap",
        weighted(merge, evaluated(convex_formula, rows)),
        convex_formula(),
        needs=(
            lipschitz_assumption(merge),
            Assumption("HRS", "convex losses and eta <= 2/L", "holds", "from the recipe"),
        ),
        measured=used(merge, ("L", "G")),
        source=f"{PAPER}, uniform stability of SGD, convex case",
        checked=CHECKED,
    )


def hardt_strongly_convex(merge: Merge) -> PublishedBound:
    """``E[F(M) - F_S(M)] <= sum_i p_i c_i 2 G_i^2/(mu_i n_i)`` for strongly convex losses, however long the training.

    Assumes mu-strongly convex, L-smooth per-sample losses that are G-Lipschitz on a convex set that the iterates never
    leave (by projection, or because steps are averages), constant ``eta <= 1/L``, plain SGD.  A strongly convex loss is
    not Lipschitz on all of space: ``G`` must hold where iterates and merge can be.

    >>> from theory import Expert
    >>> run = dict(n=100, batch_size=10, learning_rate=0.1, steps=50, L=1.0, G=1.0)
    >>> merge = Merge((Expert("a", curvature="strongly_convex", mu=0.5, **run),))
    >>> float(hardt_strongly_convex(merge).value)
    0.04
    """
    name = "Hardt-Recht-Singer, strongly convex"
    refuse_merge(merge, name)
    G = constants(merge, "G", name)
    for expert in merge.experts:
        require_plain_sgd(expert, name)
        if expert.curvature != "strongly_convex":
            raise AssumptionError(
                f"expert {expert.name!r}: curvature is {expert.curvature!r}, but {name} needs 'strongly_convex' and mu"
            )
        rates = _stepwise(expert.learning_rate)
        if isinstance(expert.learning_rate, Schedule) and np.any(rates != rates[..., :1]):
            raise AssumptionError(f"expert {expert.name!r}: learning_rate changes, but {name} needs a constant one")
        require_rate(expert, 1.0, name)
    mu = stack([np.asarray(expert.mu, dtype=np.float64) for expert in merge.experts])
    n = stack([np.asarray(expert.n, dtype=np.float64) for expert in merge.experts])
    rows = align(sensitivities(merge), G, mu, n)
    return published(
        merge,
        name,
        "gap",
        weighted(merge, evaluated(strongly_convex_formula, rows)),
        strongly_convex_formula(),
        needs=(
            lipschitz_assumption(merge),
            Assumption("HRS", "strongly convex, constant eta <= 1/L", "holds", "from the recipe"),
        ),
        measured=used(merge, ("L", "mu", "G")),
        source=f"{PAPER}, uniform stability of projected SGD, strongly convex case",
        checked=CHECKED,
    )


def hardt_nonconvex(merge: Merge, *, whole_burn_in: bool = False) -> PublishedBound:
    """Nonconvex case: ``0 <= f <= B``, L-smooth, G-Lipschitz, ``eta_k <= a/k`` with k from 1, batches of one sample.

    *Proof (with the merge):* if the exchanged sample is not drawn in the first ``m`` steps (missed with probability at
    most ``m/n``, and then the loss changes by at most B), twins start to separate after m steps, and with
    ``E I_k = 1/n`` the expected change is at most ``2 c G^2/n sum_{k>m} (a/k) prod_{l>k} (1 + La/l)``.  The products
    telescope: the sum is ``(prod_{l>m} (1 + La/l) - 1)/L``.  The paper bounds that by ``(K/m)^(La)/L``, 1/n
    by 1/(n-1), and takes a real m.  ``whole_burn_in`` keeps the first form at the best whole m: same assumptions, ours,
    and never larger (checked numerically, which also settles that the paper's real m is harmless).

    ``a = max_k k eta_k`` by default; the theorem holds for every larger a too, and the smallest value over a grid of
    them is returned.  The paper's monotone learning rates are not needed.  Needs ``G`` and ``B``; n = 1 gives
    ``inf``.  Raises :class:`AssumptionError` for b > 1, momentum, decay.

    >>> from theory import Expert
    >>> run = dict(n=100, batch_size=1, learning_rate=0.1, steps=50, L=1.0, G=1.0, B=1.0)
    >>> rates = Schedule(0.1 / np.arange(1.0, 51.0))
    >>> merge = Merge((Expert("a", n=100, batch_size=1, learning_rate=rates, L=1.0, G=1.0, B=1.0),))
    >>> found = hardt_nonconvex(merge)
    >>> bool(hardt_nonconvex(merge, whole_burn_in=True).value <= found.value), round(float(found.value), 4)
    (True, 0.0367)
    """
    name = "Hardt-Recht-Singer, nonconvex" + (", whole burn-in" if whole_burn_in else "")
    refuse_merge(merge, name)
    G = constants(merge, "G", name)
    B = constants(merge, "B", name)
    c = sensitivities(merge)
    gaps = []
    for index, expert in enumerate(merge.experts):
        require_plain_sgd(expert, name)
        single_samples(expert, name)
        a = _rate_scale(expert)
        arguments = (B[index], smoothness(expert), a, np.asarray(expert.n, dtype=np.float64), c[index], G[index])
        compute = best_burn_in if whole_burn_in else stated_nonconvex
        gaps.append(compute(*arguments, step_count(expert)))
    return published(
        merge,
        name,
        "gap",
        weighted(merge, stack(gaps)),
        burn_in_formula() if whole_burn_in else nonconvex_formula(),
        needs=(
            lipschitz_assumption(merge),
            bounded_assumption(merge),
            Assumption("HRS", "batches of one sample, eta_k <= a/k", "holds", "from the recipe"),
        ),
        measured=used(merge, ("L", "G", "B")),
        source=f"{PAPER}, uniform stability of SGD, nonconvex case",
        checked=CHECKED,
    )


RATE_FACTORS = np.exp(np.linspace(0.0, np.log(1e4), 41))


def stated_nonconvex(
    B: ArrayLike, L: ArrayLike, a: ArrayLike, n: ArrayLike, c: ArrayLike, G: ArrayLike, K: ArrayLike
) -> FloatArray:
    """The closed form of the paper, smallest over constants ``a' >= a``; broadcasts; never NaN; at most B.

    >>> round(float(stated_nonconvex(1.0, 1.0, 1.0, 101, 1.0, 1.0, 100)), 4)
    0.2828
    """
    arrays = [np.asarray(value, dtype=np.float64) for value in (B, L, a, n, c, G, K)]
    b, smooth, rate, samples, sensitive, lip, steps = arrays
    best = np.full(np.broadcast_shapes(*(array.shape for array in arrays)), np.inf)
    for factor in RATE_FACTORS:
        best = np.minimum(best, _stated(b, smooth, rate * factor, samples, sensitive, lip, steps))
    best = np.where((sensitive == 0) | (lip == 0) | (b == 0), 0.0, best)
    return np.asarray(np.where(samples <= 1, np.inf, np.minimum(best, b)))


@vacuous
def _stated(
    B: FloatArray, L: FloatArray, a: FloatArray, n: FloatArray, c: FloatArray, G: FloatArray, K: FloatArray
) -> FloatArray:
    return evaluate(nonconvex_formula, B, L, a, n, c, G, K)


def best_burn_in(
    B: ArrayLike, L: ArrayLike, a: ArrayLike, n: ArrayLike, c: ArrayLike, G: ArrayLike, K: ArrayLike
) -> FloatArray:
    """The argument behind the paper's closed form at whole burn-ins; smallest over those tried; at most B.

    Any whole number of steps gives a valid bound; the bound is convex in it, so the best one is found by bisection.
    """
    from scipy.special import gammaln

    arrays = [np.asarray(value, dtype=np.float64) for value in (B, L, a, n, c, G, K)]
    b, smooth, rate, _, sensitive, lip, steps = np.broadcast_arrays(*arrays)
    with np.errstate(all="ignore"):
        power = smooth * rate
        start = np.log(2 * rate * sensitive * lip**2 / b) + gammaln(steps + 1 + power) - gammaln(steps + 1)
        low, high = np.zeros(b.shape), steps.copy()
        for _ in range(int(np.ceil(np.log2(max(float(steps.max()), 1.0)))) + 1):
            middle = np.floor((low + high) / 2)
            # does one more step of burn-in lower the bound?
            lower = start - np.log(middle + 1) + gammaln(middle + 2) - gammaln(middle + 2 + power) > 0
            low, high = np.where(lower & (middle < high), middle + 1, low), np.where(lower, high, middle)
    best = np.minimum(_whole(arrays, low), _whole(arrays, np.zeros(b.shape)))
    return np.asarray(np.minimum(best, b))


@vacuous
def _whole(arrays: Sequence[FloatArray], m: FloatArray) -> FloatArray:
    """:func:`burn_in_formula` in log space; no division by L = 0; rounding errors are added, not subtracted.

    ``sum_{l=m+1}^K ln(1 + La/l) <= La ln((K+1/2)/(m+1/2))`` takes over where log-gammas cancel.
    """
    from scipy.special import gammaln

    B, L, a, n, c, G, K = arrays
    power = L * a
    plain = np.log(K + 0.5) - np.log(m + 0.5)
    terms = [gammaln(K + 1 + power), gammaln(m + 1), gammaln(K + 1), gammaln(m + 1 + power)]
    rounding = 4e-15 * sum((np.abs(term) for term in terms), np.zeros(()))
    exact = terms[0] + terms[1] - terms[2] - terms[3] + rounding
    exponent = np.minimum(power * plain, np.where(np.isnan(exact), np.inf, np.maximum(exact, 0.0)))
    scale = np.where(power == 0, plain, exponent / np.where(power == 0, 1.0, power))
    relative = np.where(exponent == 0, 1.0, np.expm1(exponent) / np.where(exponent == 0, 1.0, exponent))
    return B * m / n + times(2 * c * G**2 / n * a * scale, relative)


def _rate_scale(expert: Expert) -> FloatArray:
    """The smallest a with ``eta_k <= a/k``, k from 1."""
    if isinstance(expert.learning_rate, Schedule):
        values = expert.learning_rate.values
        return np.asarray(np.max(values * np.arange(1, values.shape[-1] + 1), axis=-1))
    return np.asarray(np.asarray(expert.learning_rate, dtype=np.float64) * step_count(expert))
