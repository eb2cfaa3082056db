"""Curvature-optimal merging: ``M = x_0 + sum_i alpha_i Delta_i``, alpha minimising a quadratic model of each risk."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.flat import FlatSpace
from merging.grouped import Groups, combine_groups, grouped_form
from merging.method import Method, Rows, apply_flat
from merging.types import TaskVector


def curvature_optimal(
    task_vectors: Sequence[TaskVector], *, coefficients: Sequence[float], groups: Groups | None = None
) -> dict[str, Tensor]:
    """Apply coefficients that were solved for elsewhere (nothing is optimised here).

    The coefficients minimise ``sum_j p_j (sqrt(F_j(x_j)) + sqrt(max_s q_js(alpha) / 2))^2``, where ``q_js`` is the
    Gauss-Newton curvature of task j's risk along ``M - x_j`` at anchor s; see :mod:`theory.curvature`.

    Args:
        task_vectors: N mappings over the same tensors.
        coefficients: alpha, one per expert.
        groups: coefficients of their own for some tensors (one set per layer): regular expression on the whole tensor
            name to one coefficient per expert; the first expression that matches wins, tensors without a match use
            ``coefficients``.

    Raises:
        MethodError: coefficients that are not finite or not one per expert; an invalid expression.

    Source: this project.
    """
    return apply_flat(
        task_vectors,
        lambda rows, space: curvature_optimal_flat(rows, space, coefficients=coefficients, groups=groups),
    )


def curvature_optimal_flat(
    rows: Rows, space: FlatSpace, *, coefficients: Sequence[float], groups: Groups | None = None
) -> Tensor:
    """:func:`curvature_optimal` on N rows of shape ``(P,)``."""
    return combine_groups(rows, space, coefficients, groups)


METHOD = Method(
    name="curvature_optimal",
    function=curvature_optimal,
    flat=curvature_optimal_flat,
    summary="given coefficients, chosen to minimise a curvature model of the risk",
    paper="this project",
    coefficients="required",
    linear=True,
    elementwise=True,
    lipschitz=True,
    linear_form=grouped_form,
    needs_data=True,
    extras=("groups",),
)
