"""Risk-optimal merging: ``M = x_0 + sum_i alpha_i Delta_i`` with coefficients that minimise a predicted risk."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.flat import FlatSpace
from merging.grouped import Groups, combine_groups, grouped_form
from merging.method import Method, Rows, apply_flat
from merging.types import TaskVector


def risk_optimal(
    task_vectors: Sequence[TaskVector],
    *,
    coefficients: Sequence[float],
    groups: Groups | None = None,
) -> dict[str, Tensor]:
    """Apply coefficients that were solved for elsewhere (nothing is optimised here).

    Args:
        task_vectors: N mappings over the same tensors.
        coefficients: alpha, one per expert.
        groups: coefficients of their own for some tensors (one set per layer): regular expression on the whole tensor
            name to one coefficient per expert; the first expression that matches wins, tensors without a match use
            ``coefficients``.

    Raises:
        MethodError: coefficients that are not finite or not one per expert; an invalid expression.

    Source: this project; the coefficients minimise the function-space prediction of the merged risk, which is convex in
    alpha.
    """
    return apply_flat(
        task_vectors,
        lambda rows, space: risk_optimal_flat(rows, space, coefficients=coefficients, groups=groups),
    )


def risk_optimal_flat(
    rows: Rows,
    space: FlatSpace,
    *,
    coefficients: Sequence[float],
    groups: Groups | None = None,
) -> Tensor:
    """:func:`risk_optimal` on N rows of shape ``(P,)``."""
    return combine_groups(rows, space, coefficients, groups)


METHOD = Method(
    name="risk_optimal",
    function=risk_optimal,
    flat=risk_optimal_flat,
    summary="given coefficients, chosen to minimise the predicted risk",
    paper="this project",
    coefficients="required",
    linear=True,
    elementwise=True,
    extras=("groups",),
    lipschitz=True,
    linear_form=grouped_form,
)
