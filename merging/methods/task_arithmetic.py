"""Task arithmetic: ``M = x_0 + lambda sum_i alpha_i Delta_i``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.flat import FlatSpace
from merging.linear_form import LinearForm, apply_form
from merging.method import Method, Parameter, Rows, apply_flat, check_coefficients
from merging.types import TaskVector


def task_arithmetic(
    task_vectors: Sequence[TaskVector], *, coefficient: float = 0.3, coefficients: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The scaled sum of N task vectors.

    Args:
        task_vectors: N mappings over the same tensors.
        coefficient: the scale lambda.
        coefficients: alpha, one per expert (default: all one, as in the paper); a variant, not normalised.

    Source: Ilharco et al., "Editing models with task arithmetic", ICLR 2023 (arXiv:2212.04089), section 2.
    """
    return apply_flat(
        task_vectors,
        lambda rows, space: task_arithmetic_flat(rows, space, coefficient=coefficient, coefficients=coefficients),
    )


def task_arithmetic_flat(
    rows: Rows, space: FlatSpace, *, coefficient: float = 0.3, coefficients: Sequence[float] | None = None
) -> Tensor:
    """:func:`task_arithmetic` on N rows of shape ``(P,)``."""
    return apply_form(rows, task_arithmetic_form(len(rows), coefficient=coefficient, coefficients=coefficients))


def task_arithmetic_form(
    experts: int, tensor: str = "", *, coefficient: float = 0.3, coefficients: Sequence[float] | None = None
) -> LinearForm:
    """The coefficients (default: a plain sum), times the scale."""
    weights = None if coefficients is None else check_coefficients(coefficients, experts)
    return LinearForm(weights, factor=coefficient)


METHOD = Method(
    name="task_arithmetic",
    function=task_arithmetic,
    flat=task_arithmetic_flat,
    summary="scaled sum of the task vectors",
    paper="Ilharco et al. 2023, arXiv:2212.04089",
    parameters=(Parameter("coefficient", 0.3, "scale of the sum"),),
    coefficients="optional",
    linear=True,
    elementwise=True,
    lipschitz=True,
    linear_form=task_arithmetic_form,
)
