"""Which experts to merge, and what each is worth: the best k of N, and Shapley values (tier *estimated*).

The search is exact under the prediction, or says how far it can be from exact: ``gap``.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb, factorial

import numpy as np

from theory.constrained import coefficients_summing_to
from theory.convex import Minimum, Objective, minimise_over
from theory.errors import MergeboundError
from theory.function_space import Array
from theory.surfaces import (
    MergingRule,
    PredictedMerge,
    Surface,
    coefficients_of,
    domain_without,
    minimise_on,
    predicted_merge,
)

_EXACT_SHAPLEY = 10
_EXPENSIVE, _CHEAP = 200, 20_000


def best_subset(
    surface: Surface, rule: MergingRule, size: int, *, enumerate_up_to: int | None = None, max_nodes: int = 2000
) -> PredictedMerge:
    """The k experts whose merge has the lowest predicted risk.

    All subsets are tried where they are few; otherwise branch and bound.  A node has experts that are in, out and
    undecided; its lower bound is the minimum of the convex prediction with the undecided ones relaxed: for rules with a
    shared coefficient c, ``0 <= alpha_i <= c`` and ``sum alpha = k c``; for optimal coefficients, no limit on how many.

    Args:
        surface: the prediction.
        rule: how a subset is merged.
        size: k, from 0 to N.
        enumerate_up_to: largest number of subsets to try (default 20,000, and 200 if each needs an optimisation).
        max_nodes: limit of the branch and bound; when it is reached the best subset so far is returned with its gap.

    Returns:
        ``gap`` bounds the predicted risk minus the best subset's; 0 up to rounding after enumeration of a shared rule.

    >>> import numpy as np
    >>> from theory.function_space import LogitField
    >>> from theory.surfaces import averaging, risk_surface
    >>> slopes = np.array([[[2.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]]])
    >>> task = LogitField(np.zeros((1, 2)), slopes, np.array([0]), "secant")
    >>> best_subset(risk_surface([task]), averaging(), 2).experts
    (0, 2)
    """
    count = surface.experts
    if not 0 <= size <= count:
        raise MergeboundError(f"size = {size}, expected 0..{count}: as many experts as there are")
    if size == 0:
        return predicted_merge(surface, rule, ())
    most = (_EXPENSIVE if rule.kind == "optimal" else _CHEAP) if enumerate_up_to is None else enumerate_up_to
    if comb(count, size) <= most:
        return _enumerate(surface, rule, size)
    surface.require_convex("branch and bound")
    return _branch_and_bound(surface, rule, size, max_nodes)


def best_subsets(surface: Surface, rule: MergingRule, *, max_nodes: int = 2000) -> tuple[PredictedMerge, ...]:
    """The best subset of every size from 0 (the base) to N.

    >>> from theory import averaging, secant
    >>> from theory.surfaces import risk_surface
    >>> task = secant(np.zeros((1, 2)), np.array([[[2.0, 0.0]], [[0.0, 1.0]]]), np.array([0]))
    >>> asked = risk_surface([task])
    >>> [choice.experts for choice in best_subsets(asked, averaging())]
    [(), (0,), (0, 1)]
    """
    return tuple(best_subset(surface, rule, size, max_nodes=max_nodes) for size in range(surface.experts + 1))


def greedy_subset(surface: Surface, rule: MergingRule, size: int) -> PredictedMerge:
    """Add the expert that lowers the prediction most, ``size`` times.

    The gap is to one relaxed problem (that of :func:`best_subset` with nothing decided), ``inf`` where the prediction
    is not convex.
    """
    chosen: tuple[int, ...] = ()
    best = predicted_merge(surface, rule, ())
    for _ in range(size):
        trials = [predicted_merge(surface, rule, (*chosen, i)) for i in range(surface.experts) if i not in chosen]
        best = min(trials, key=lambda choice: choice.risk)
        chosen = best.experts
    if not surface.convex:
        return replace(best, gap=np.inf, method="greedy")
    found = _relaxed(surface, rule, size, frozenset(), frozenset()) if size else None
    lowest = best.risk if found is None else found.value - found.gap
    return replace(best, gap=max(best.risk - lowest, 0.0), method="greedy")


def _enumerate(surface: Surface, rule: MergingRule, size: int) -> PredictedMerge:
    subsets = list(combinations(range(surface.experts), size))
    if rule.kind != "optimal":
        alphas = coefficients_of(surface, rule, subsets)
        risks = surface.risk(alphas)
        k = int(np.argmin(risks))
        return PredictedMerge(subsets[k], alphas[k], float(risks[k]), 0.0, "enumeration")
    trials = [predicted_merge(surface, rule, subset) for subset in subsets]
    best = min(trials, key=lambda choice: choice.risk)
    lowest = min(choice.risk - choice.gap for choice in trials)
    return replace(best, gap=max(best.risk - lowest, 0.0), method="enumeration")


def _branch_and_bound(surface: Surface, rule: MergingRule, size: int, max_nodes: int) -> PredictedMerge:
    count = surface.experts
    best = greedy_subset(surface, rule, size)
    tolerance = 1e-9 * max(1.0, abs(best.risk))
    closed = np.inf  # smallest lower bound among the nodes that were closed
    root = _relaxed(surface, rule, size, frozenset(), frozenset())
    serial = 0
    heap: list[tuple[float, int, frozenset[int], frozenset[int], Array]] = [
        (root.value - root.gap, serial, frozenset(), frozenset(), root.point)
    ]
    nodes = 1
    while heap and nodes < max_nodes:
        bound, _, inside, outside, point = heapq.heappop(heap)
        if bound >= best.risk - tolerance:
            closed = min(closed, bound)
            break  # all others are higher
        strength = np.abs(point.reshape(count, -1)).max(axis=1)
        undecided = [i for i in range(count) if i not in inside and i not in outside]
        ranked = sorted(undecided, key=lambda i: -strength[i])
        trial = predicted_merge(surface, rule, (*inside, *ranked[: size - len(inside)]))
        if trial.risk < best.risk:
            best = trial
        split = ranked[0]
        for into, out in ((inside | {split}, outside), (inside, outside | {split})):
            if len(into) == size or count - len(out) == size:
                leaf = predicted_merge(surface, rule, into if len(into) == size else set(range(count)) - out)
                closed = min(closed, leaf.risk - leaf.gap)
                best = leaf if leaf.risk < best.risk else best
                continue
            found = _relaxed(surface, rule, size, into, out, start=point)
            nodes += 1
            lower = max(found.value - found.gap, bound)
            if lower >= best.risk - tolerance:
                closed = min(closed, lower)
            else:
                serial += 1
                heapq.heappush(heap, (lower, serial, into, out, found.point))
    lowest = min([closed, best.risk, *(node[0] for node in heap)])
    method = "branch and bound" if nodes < max_nodes or not heap else "branch and bound, stopped at its limit"
    return replace(best, gap=max(best.risk - lowest, 0.0), method=method)


def _relaxed(
    surface: Surface,
    rule: MergingRule,
    size: int,
    inside: frozenset[int],
    outside: frozenset[int],
    start: Array | None = None,
) -> Minimum:
    """Lower bound of all subsets between ``inside`` and everything but ``outside``."""
    if rule.kind == "optimal":
        return minimise_on(surface, domain_without(surface, rule, outside), start)
    c = rule.shared(size)
    low, high = min(c, 0.0), max(c, 0.0)
    domain = coefficients_summing_to(size * c, surface.experts, low, high)
    domain = domain.holding(sorted(inside), c).holding(sorted(outside), 0.0)
    return minimise_over(_whole(surface), domain, start, tolerance=1e-6)


def _whole(surface: Surface) -> Objective:
    """The prediction over one coefficient per expert."""

    def objective(alpha: Array) -> tuple[float, Array]:
        value, slope = surface.gradient(np.repeat(alpha, surface.layers))
        return value, slope.reshape(-1, surface.layers).sum(axis=1)

    return objective


@dataclass(frozen=True)
class Credit:
    """Shapley values of the experts.

    Attributes:
        value: nats of joint risk that each expert saves on average over the orders in which they can join, (N,); their
            sum is the base's risk minus the risk of merging all.
        error: each value is off by at most this (solver gaps); with sampled orders, one standard error.
        total: the sum.
        exact: all subsets were priced.
    """

    value: Array
    error: Array
    total: float
    exact: bool
    tier: str = "estimated"


def shapley(surface: Surface, rule: MergingRule, *, orders: int | None = None, seed: int = 0) -> Credit:
    """Shapley values of the experts for the game ``v(S) = R(base) - R(merge of S)``.

    Args:
        surface: the prediction; all tasks count in every subset.
        rule: how each subset is merged.
        orders: ``None``: exact from all 2^N subsets, N <= 10.  A number: that many random orders, each with its
            reverse, which costs 2 N ``orders`` merges.
        seed: of the random orders.

    Raises:
        MergeboundError: exact values of more than ten experts.

    >>> import numpy as np
    >>> from theory.function_space import LogitField
    >>> from theory.surfaces import risk_surface, task_arithmetic
    >>> task = LogitField(np.zeros((1, 2)), np.array([[[1.0, 0.0]], [[0.0, 0.0]]]), np.array([0]), "secant")
    >>> shapley(risk_surface([task]), task_arithmetic(1.0)).value.round(3).tolist()  # the second expert does nothing
    [0.38, 0.0]
    """
    count = surface.experts
    if orders is not None:
        return _sampled_shapley(surface, rule, orders, seed)
    if count > _EXACT_SHAPLEY:
        raise MergeboundError(f"{count} experts have {2**count} subsets: sample orders, or use leave_one_out")
    subsets = [tuple(i for i in range(count) if mask >> i & 1) for mask in range(2**count)]
    if rule.kind != "optimal":
        risks, gaps = surface.risk(coefficients_of(surface, rule, subsets)), np.zeros(len(subsets))
    else:
        choices = [predicted_merge(surface, rule, subset) for subset in subsets]
        risks, gaps = np.array([c.risk for c in choices]), np.array([c.gap for c in choices])
    sizes = np.array([len(subset) for subset in subsets])
    share = np.array([factorial(s) * factorial(count - s - 1) / factorial(count) for s in range(count)])
    masks = np.arange(2**count)
    value, error = np.zeros(count), np.zeros(count)
    for i in range(count):
        without = masks[(masks >> i & 1) == 0]
        joined = without | 1 << i
        p = share[sizes[without]]
        value[i] = float(p @ (risks[without] - risks[joined]))
        error[i] = float(max(p @ gaps[without], p @ gaps[joined]))
    return Credit(value, error, float(risks[0] - risks[-1]), True)


def _sampled_shapley(surface: Surface, rule: MergingRule, orders: int, seed: int) -> Credit:
    if orders < 2:
        raise MergeboundError(f"orders = {orders}: at least two, or None for exact values")
    rng, count = np.random.default_rng(seed), surface.experts
    known: dict[tuple[int, ...], float] = {}

    def risk(members: Sequence[int]) -> float:
        key = tuple(sorted(members))
        if key not in known:
            known[key] = predicted_merge(surface, rule, key).risk
        return known[key]

    draws = np.zeros((orders, count))
    for row in draws:
        order = [int(i) for i in rng.permutation(count)]
        for direction in (order, order[::-1]):
            for place, i in enumerate(direction):
                row[i] += 0.5 * (risk(direction[:place]) - risk(direction[: place + 1]))
    total = risk(()) - risk(range(count))
    return Credit(draws.mean(axis=0), draws.std(axis=0, ddof=1) / np.sqrt(orders), total, False)
