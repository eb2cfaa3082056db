"""All merges of :mod:`merging.many` as one table: what the compiled loops of :mod:`merging.kernels.many` are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from merging.errors import MethodError
from merging.many_plan import Form, Planner, Row
from merging.many_request import Asked
from merging.method import Method

Numbers = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Plan:
    """All merges, one entry each along the first axis.

    Attributes:
        forms: the different forms.
        form: ``(C,)`` which of them.
        members: ``(C, N)`` which experts, in the order of their sums.
        weights: ``(C, N)`` coefficients in double precision, as the definition applies them; 1 without.
        scales: ``(C,)`` last factors.
        densities: ``(C,)``.
    """

    forms: tuple[Form, ...]
    form: Integers
    members: Flags
    weights: Numbers
    scales: Numbers
    densities: Numbers


def plan_of(rows: Sequence[Row], members: Flags, weights: Numbers) -> Plan:
    """Put the rows of all merges together."""
    forms = {form: index for index, form in enumerate(dict.fromkeys(row.form for row in rows))}
    return Plan(
        tuple(forms),
        np.array([forms[row.form] for row in rows], dtype=np.int64),
        members,
        weights,
        np.array([row.scale for row in rows], dtype=np.float64),
        np.array([row.density for row in rows], dtype=np.float64),
    )


def plan_merges(
    method: Method, planner: Planner, labels: tuple[str, ...], wanted: Asked, dtype: torch.dtype
) -> Plan | int:
    """The fast path; where a merge has none (settings along the depth, or wrong ones), that merge's number."""
    experts, weighted = len(labels), wanted.coefficients is not None
    if (weighted and method.coefficients == "none") or (not weighted and method.coefficients == "required"):
        return 0
    known: dict[Any, Row | None] = {}
    rows = []
    for index in range(wanted.count):
        size = experts if wanted.members is None else len(wanted.members[index])
        seed = wanted.seed(index)
        key = (size, seed, *(values[index] for values in wanted.each.values()))
        try:
            row = known[key]
        except KeyError:
            try:
                row = known[key] = planner(method.settings(wanted.values(index)), size, seed, weighted)
            except MethodError:  # also gradients and lists per layer; the definition decides
                row = None
        except TypeError:
            row = None
        if row is None or size < max(1, method.experts[0]):
            return index
        rows.append(row)
    order = sorted(range(experts), key=labels.__getitem__)
    members = np.ones((wanted.count, experts), dtype=np.bool_)
    if wanted.members is not None:
        members[:] = False
        owner = np.repeat(np.arange(wanted.count), [len(who) for who in wanted.members])
        members[owner, [index for who in wanted.members for index in who]] = True
    weights = np.ones((wanted.count, experts))
    if wanted.coefficients is not None:
        weights[:] = wanted.coefficients
    members, weights = members[:, order], weights[:, order]
    for index, row in enumerate(rows):
        if row.normalise:
            total = fsum(weights[index, members[index]].tolist())
            weights[index] = weights[index] / total if total != 0.0 else np.nan
    plan = plan_of(rows, members, weights)
    wrong = np.flatnonzero(~_sound(plan, dtype))
    return plan if len(wrong) == 0 else int(wrong[0])


def _sound(plan: Plan, dtype: torch.dtype) -> NDArray[np.bool_]:
    """Which merges' numbers the definition takes: finite in the type of the rows, positive for a weighted mean."""
    limit = torch.finfo(dtype).max
    used = np.abs(np.where(plan.members, plan.weights, 0.0))
    good = (used <= limit).all(axis=1) & (np.abs(plan.scales) <= limit)
    means = np.array([form.kind == "elect_mean" and form.weighted for form in plan.forms], dtype=np.bool_)[plan.form]
    positive = (np.where(plan.members, plan.weights, 1.0) > 0.0).all(axis=1)
    found: NDArray[np.bool_] = good & (positive | ~means)
    return found


def linear_coefficients(plan: Plan, part: slice) -> NDArray[np.float64]:
    """The coefficients of linear merges, ``(block, N)``."""
    divide = np.array([form.divide for form in plan.forms])[plan.form[part]]
    weighted = np.array([form.weighted for form in plan.forms])[plan.form[part]]
    weights = np.where(plan.members[part], np.where(weighted[:, None], plan.weights[part], 1.0), 0.0)
    scales = plan.scales[part][:, None]
    result: NDArray[np.float64] = np.where(divide[:, None], weights / scales, weights * scales)
    return result
