"""Linear merges with coefficients of their own for groups of tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from merging.errors import MethodError
from merging.flat import FlatSpace
from merging.linear_form import LinearForm
from merging.method import Rows, check_coefficients, combine

Groups = Mapping[str, Sequence[float]]
"""Regular expression on the whole tensor name to one coefficient per expert; the first match wins."""


def combine_groups(rows: Rows, space: FlatSpace, coefficients: Sequence[float], groups: Groups | None) -> Tensor:
    """``sum_i alpha_i Delta_i`` over N rows of shape ``(P,)`` with the coefficients of each tensor's group.

    Args:
        coefficients: alpha of tensors that no group covers, one per expert.
        groups: coefficients by group.

    Raises:
        MethodError: coefficients that are not finite or not one per expert; an invalid expression.
    """
    default = check_coefficients(coefficients, len(rows))
    if not groups:
        return combine(rows, default)
    result = torch.empty_like(rows[0])
    for name, piece in space.segments():
        form = grouped_form(len(rows), name, coefficients=default, groups=groups)
        result[piece] = combine([row[piece] for row in rows], form.weights)
    return result


def grouped_form(
    experts: int, tensor: str = "", *, coefficients: Sequence[float], groups: Groups | None = None
) -> LinearForm:
    """The coefficients of one tensor's group."""
    default = check_coefficients(coefficients, experts)
    compiled = [(_compile(pattern), check_coefficients(values, experts)) for pattern, values in (groups or {}).items()]
    return LinearForm(next((values for expression, values in compiled if expression.fullmatch(tensor)), default))


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise MethodError(f"'{pattern}' is not a regular expression ({error}): correct the group's pattern") from None
