"""Our bounds and the published ones side by side on one recipe, and the smallest of those that can be compared.

Three quantities are kept apart and never mixed:

* ``training``: bounds on ``E F_S(M)``, the joint empirical risk of the merge;
* ``gap``: bounds on ``E[F(M) - F_S(M)]``;
* ``risk``: bounds on ``E F(M)``.

They are connected by two true statements.  With ``E F_S(M) <= R``: a gap g gives ``E F(M) <= R + g``; an instability I
(``sqrt(E F(M)) <= sqrt(E F_S(M)) + sqrt(I)``) gives the gap ``2 sqrt(R I) + I`` and the risk ``(sqrt R + sqrt I)^2``.
R is the smallest of the training bounds (or a given ``merged_training_risk``); our master bound is also shown as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from theory.assumptions import Assumption, Tier
from theory.bound import Bound
from theory.comparison import QUANTITIES, RANK, Comparable, Comparison, Row
from theory.errors import MergeboundError, RecipeError
from theory.generalization import l1_formula, l1_gap
from theory.master import master_formula
from theory.published.common import PublishedBound, constants, numbers, stack, weighted
from theory.published.fedavg import fedavg_one_round
from theory.published.hardt import hardt_convex, hardt_nonconvex, hardt_strongly_convex
from theory.published.lei_ying import lei_ying_l1, lei_ying_l2
from theory.published.pac_bayes import pac_bayes_expectation
from theory.recipe import Merge, Values
from theory.risk import master_bound
from theory.symbolic import FloatArray


def our_l1(merge: Merge) -> PublishedBound:
    """Our l1 form (:func:`theory.generalization.l1_gap`) as a row of the catalogue; frozen heads or trained ones."""
    found = l1_gap(merge)
    return PublishedBound(
        name="ours, l1",
        quantity="gap",
        value=found.value,
        tier=found.tier,
        formula=l1_formula(),
        assumptions=found.assumptions,
        measured=found.measured,
        source="Theorem 1, l1 form (theory section 3): " + " / ".join(dict.fromkeys(found.forms)),
        checked="our own theorem",
    )


@np.errstate(all="ignore")
def compare(
    merge: Merge,
    *,
    dimension: Values | None = None,
    joint_gradient_norm: Values = 0.0,
    merge_distance: Values | None = None,
    merged_training_risk: Values | None = None,
    measured: Collection[str] = (),
) -> Comparison:
    """Put the master bound, its l1 form and the published bounds side by side on one recipe.

    More knowledge opens more rows: ``G`` and ``B`` of the experts (B also marks rows that do not beat the largest joint
    loss ``sum p_i B_i`` as vacuous), ``batch_losses``, and here ``dimension`` (merged parameters),
    ``joint_gradient_norm`` (lower bound, for one-round FedAvg, loss/param), ``merge_distance`` rms ``||M - x_0||``
    (param), ``merged_training_risk`` ``E F_S(M)`` (loss).  Those listed in ``measured`` lower the tier of what uses
    them.  A bound that does not apply is listed with the reason; nothing is raised for that.  Raises
    :class:`RecipeError` for arguments out of their domain.

    >>> from theory import Expert, Merge
    >>> e = Expert("a", n=1000, batch_size=10, learning_rate=0.1, steps=100, curvature="convex", L=1.0, G=1.0,
    ...            initial_gradient_norm=0.5, sigma=1.0, training_risk=0.05)
    >>> result = compare(Merge((e,)))
    >>> [row.name for row in result.of("gap") if row.value is not None]
    ['ours, master bound', 'ours, l1', 'Hardt-Recht-Singer, convex']
    >>> str(result.smallest("gap").names)
    'ours, master bound'
    """
    allowed = ("dimension", "joint_gradient_norm", "merge_distance", "merged_training_risk")
    unknown = sorted(str(name) for name in measured if not isinstance(name, str) or name not in allowed)
    if unknown:
        raise RecipeError(f"compare: measured names {unknown[0]!r}; choose from {', '.join(sorted(allowed))}")
    limit = _largest_loss(merge)
    for field, value in (("joint_gradient_norm", joint_gradient_norm), ("merge_distance", merge_distance)):
        if value is not None:
            numbers(field, value)
    if dimension is not None:
        numbers("dimension", dimension, positive=True)

    def only(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if name in measured)

    rows: list[Row] = []
    master, refusal = _master(merge)
    training = _training_rows(merge, master, refusal, joint_gradient_norm, merged_training_risk, only, limit)
    rows.extend(training)
    start = _best_training(training)
    rows.extend(_master_rows(master, refusal, limit))
    pac_bayes = partial(
        pac_bayes_expectation,
        dimension=dimension,
        merge_distance=merge_distance,
        measured=only("dimension", "merge_distance"),
    )
    catalogue: list[tuple[str, Callable[[Merge], PublishedBound]]] = [
        ("ours, l1", our_l1),
        ("Hardt-Recht-Singer, convex", hardt_convex),
        ("Hardt-Recht-Singer, strongly convex", hardt_strongly_convex),
        ("Hardt-Recht-Singer, nonconvex", hardt_nonconvex),
        ("Hardt-Recht-Singer, nonconvex, whole burn-in", partial(hardt_nonconvex, whole_burn_in=True)),
        ("Lei-Ying, l1", lei_ying_l1),
        ("Lei-Ying, l2", lei_ying_l2),
        ("PAC-Bayes in expectation", pac_bayes),
    ]
    for name, build in catalogue:
        ours = name.startswith("ours")
        try:
            found = build(merge)
        except MergeboundError as error:
            rows.extend(_refused(name, quantity, ours, str(error)) for quantity in ("gap", "risk"))
            continue
        rows.extend(_gap_and_risk(found, ours, start, limit))
    order = {quantity: i for i, quantity in enumerate(QUANTITIES)}
    rows.sort(key=lambda row: (order[row.quantity], row.value is None))
    return Comparison(tuple(rows), merge)


def _master(merge: Merge) -> tuple[Bound | None, str]:
    try:
        return master_bound(merge), ""
    except MergeboundError as error:
        return None, str(error)


def _largest_loss(merge: Merge) -> FloatArray | None:
    """``sum p_i B_i``, which no joint risk exceeds, where B is known."""
    if any(expert.B is None for expert in merge.experts):
        return None
    return weighted(merge, constants(merge, "B", "the largest joint loss"))


def _empty(value: FloatArray, limit: FloatArray | None) -> np.ndarray:
    return np.asarray(np.isinf(value) if limit is None else np.isinf(value) | (value >= limit))


def _row(
    source: PublishedBound,
    quantity: Comparable,
    value: FloatArray,
    ours: bool,
    limit: FloatArray | None,
    assumptions: tuple[Assumption, ...],
    measured: tuple[str, ...],
    tier: Tier,
    how: str,
) -> Row:
    return Row(
        name=source.name,
        quantity=quantity,
        value=value,
        vacuous=_empty(value, limit),
        tier=tier,
        ours=ours,
        formula=source.latex(),
        source=source.source + how,
        checked=source.checked,
        assumptions=assumptions,
        measured=measured,
        reason="",
    )


def _refused(name: str, quantity: Comparable, ours: bool, reason: str) -> Row:
    return Row(name, quantity, None, None, None, ours, "", "", "", (), (), reason)


def _training_rows(
    merge: Merge,
    master: Bound | None,
    refusal: str,
    joint_gradient_norm: Values,
    given: Values | None,
    only: Callable[..., tuple[str, ...]],
    limit: FloatArray | None,
) -> list[Row]:
    rows: list[Row] = []
    name = "ours, Theorem 4 (dispersion)"
    if master is None:
        rows.append(_refused(name, "training", True, refusal))
    else:
        root = master.terms[0].value + master.terms[1].value
        rows.append(replace(_from_master(master, "training", root**2, limit), name=name, source="Theorem 4"))
    name = "one-round FedAvg with client drift"
    try:
        found = fedavg_one_round(merge, joint_gradient_norm=joint_gradient_norm, measured=only("joint_gradient_norm"))
    except MergeboundError as error:
        rows.append(_refused(name, "training", False, str(error)))
    else:
        rows.append(
            _row(found, "training", found.value, False, limit, found.assumptions, found.measured, found.tier, "")
        )
    if given is not None:
        value = numbers("merged_training_risk", given)
        tier: Tier = "estimated" if only("merged_training_risk") else "certified"
        rows.append(
            Row(
                name="given (merged_training_risk)",
                quantity="training",
                value=value,
                vacuous=_empty(value, limit),
                tier=tier,
                ours=True,
                formula="F_S(M)",
                source="given",
                checked="",
                assumptions=(),
                measured=only("merged_training_risk"),
                reason="",
            )
        )
    return rows


def _best_training(rows: Sequence[Row]) -> tuple[FloatArray, Tier, tuple[Row, ...]] | None:
    valid = [row for row in rows if row.value is not None]
    if not valid:
        return None
    values = stack([row.value for row in valid if row.value is not None])
    index = np.argmin(values, axis=0)
    winners = tuple(row for i, row in enumerate(valid) if np.any(index == i))
    tier: Tier = max((row.tier for row in winners if row.tier is not None), key=lambda item: RANK[item])
    return np.asarray(values.min(axis=0)), tier, winners


def _from_master(master: Bound, quantity: Comparable, value: FloatArray, limit: FloatArray | None) -> Row:
    value = np.where(np.isnan(value), np.inf, value)
    return Row(
        name="ours, master bound",
        quantity=quantity,
        value=value,
        vacuous=_empty(value, limit),
        tier=master.tier,
        ours=True,
        formula=master_formula().latex(),
        source="Theorems 1, 2, 4 (theory section 8)",
        checked="our own theorem",
        assumptions=master.assumptions,
        measured=master.measured,
        reason="",
    )


def _master_rows(master: Bound | None, refusal: str, limit: FloatArray | None) -> list[Row]:
    if master is None:
        return [_refused("ours, master bound", quantity, True, refusal) for quantity in ("gap", "risk")]
    training, dispersion, instability = (term.value for term in master.terms)
    return [
        _from_master(master, "gap", _gap_of_root(training + dispersion, instability), limit),
        _from_master(master, "risk", np.asarray(master.value), limit),
    ]


def _gap_of_root(root: FloatArray, instability: FloatArray) -> FloatArray:
    """``2 sqrt(R) sqrt(I) + I``, zero where I is zero."""
    cross = np.where(instability == 0, 0.0, 2 * root * instability)
    return np.asarray(cross + instability**2)


def _gap_and_risk(
    found: PublishedBound,
    ours: bool,
    start: tuple[FloatArray, Tier, tuple[Row, ...]] | None,
    limit: FloatArray | None,
) -> list[Row]:
    if found.quantity == "gap" and start is None:
        gap = _row(found, "gap", found.value, ours, limit, found.assumptions, found.measured, found.tier, "")
        return [gap, _refused(found.name, "risk", ours, "no bound on E F_S(M) applies; give merged_training_risk")]
    if start is None:
        why = "no bound on E F_S(M) applies, which an instability needs; give merged_training_risk"
        return [_refused(found.name, quantity, ours, why) for quantity in ("gap", "risk")]
    base, base_tier, winners = start
    assumptions = tuple(dict.fromkeys([*found.assumptions, *(item for row in winners for item in row.assumptions)]))
    measured = tuple(dict.fromkeys([*found.measured, *(item for row in winners for item in row.measured)]))
    both: Tier = max(found.tier, base_tier, key=lambda item: RANK[item])
    how = ", E F_S(M) by " + " or ".join(row.name for row in winners)
    if found.quantity == "gap":
        return [
            _row(found, "gap", found.value, ours, limit, found.assumptions, found.measured, found.tier, ""),
            _row(found, "risk", np.asarray(base + found.value), ours, limit, assumptions, measured, both, how),
        ]
    added = _gap_of_root(np.sqrt(base), np.sqrt(found.value))
    added = np.where(np.isnan(added), np.inf, added)
    return [
        _row(found, "gap", added, ours, limit, assumptions, measured, both, how),
        _row(found, "risk", np.asarray(base + added), ours, limit, assumptions, measured, both, how),
    ]
