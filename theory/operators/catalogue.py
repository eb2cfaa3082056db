"""All operators by name, and what each says: :func:`operator`, :func:`operators`, :func:`explain_method`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np

from theory.errors import RecipeError
from theory.operators.effects import NO_GUARANTEE, Effect, Operator
from theory.operators.elected import elected_operators
from theory.operators.linear import linear_operators
from theory.operators.masks import mask_operators
from theory.operators.matrices import matrix_operators
from theory.operators.span import span_operators


@cache
def operators() -> Mapping[str, Operator]:
    """Every merging method's operator, by name."""
    families = (linear_operators(), mask_operators(), elected_operators(), span_operators(), matrix_operators())
    return MappingProxyType({item.name: item for family in families for item in family})


def operator(name: str) -> Operator:
    """The operator of a method.

    Raises :class:`RecipeError` with close matches for unknown names.

    >>> operator("fisher").guarantee, operator("ties").guarantee
    ('global', 'local')
    """
    known = operators()
    if name in known:
        return known[name]
    close = get_close_matches(str(name).lower().replace("-", "_"), known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
    raise RecipeError(f"operator: there is no method {name!r}; {hint}")


@dataclass(frozen=True, eq=False)
class Reading:
    """What a method means for the master bound; ``str(reading)`` is the text."""

    operator: Operator
    effect: Effect | None
    text: str

    def __str__(self) -> str:
        return self.text


_GUARANTEES = {
    "global": "holds for all experts, given the settings and statistics",
    "mean square": "holds for all experts, in mean square over the seeds",
    "local": f"{NO_GUARANTEE}: the operator is discontinuous; what follows is local, at fixed support, signs or ranks",
    "none": f"{NO_GUARANTEE}: no constant serves all experts",
}


def explain_method(name: str, experts: int | None = None, **given: Any) -> Reading:
    """The reading of a method: which term of the master bound it moves, which way, under which assumption.

    With ``experts`` (N) and settings or statistics as for :meth:`Operator.effect`, the numbers are added.  Where the
    operator is discontinuous the reading says ``no guarantee``.

    >>> print(explain_method("ties"))  # doctest: +ELLIPSIS
    ties: lambda mean{t_i : sign(t_i) = gamma}, t_i = trim(Delta_i), gamma = sign(sum t_i)
    guarantee: no guarantee: the operator is discontinuous; ...
    >>> print(explain_method("average", 4))  # doctest: +ELLIPSIS
    average: (1/N) sum_i Delta_i
    ...
    c_i = 0.25 (certified): linear with fixed coefficients: ...
    """
    found = operator(name)
    lines = [
        f"{found.name}: {found.statement}",
        f"guarantee: {_GUARANTEES[found.guarantee]}",
        f"sensitivity: {found.sensitivity}",
        f"bias: {found.bias}",
        f"randomness adds to V: {found.second_moment}",
    ]
    lines += [
        f"{action.term}: {action.direction} ({'' if action.under == 'always' else f'if {action.under}: '}{action.why})"
        for action in found.actions
    ]
    effect = None
    if experts is not None:
        effect = found.effect(experts, **given)
        if effect.sensitivity is None:
            lines.append(f"c_i: none: {effect.reason}")
        else:
            note = effect.tier if effect.guarantee in ("global", "mean square") else f"{NO_GUARANTEE}, {effect.tier}"
            lines.append(f"c_i = {_numbers(effect.sensitivity)} ({note}): {effect.reason}")
        lines += [
            f"assumption {item.name}: {item.statement}: {item.verdict} ({item.why})" for item in effect.assumptions
        ]
    elif given:
        raise RecipeError("explain_method: settings are given without experts; give the number of experts as well")
    lines.append(f"source: {found.source}; theory section 10")
    return Reading(found, effect, "\n".join(lines))


def _numbers(values: Any) -> str:
    flat = np.unique(np.asarray(values, dtype=np.float64))
    if flat.size > 8:
        return f"{flat.min():.4g} to {flat.max():.4g}"
    shown = flat if flat.size == 1 else np.asarray(values, dtype=np.float64).ravel()
    return ", ".join(f"{value:.4g}" for value in shown)
