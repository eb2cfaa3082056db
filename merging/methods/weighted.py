"""Weighted averaging: ``M = x_0 + sum_i w_i Delta_i`` with weights that are normalised to sum to one."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from torch import Tensor

from merging.errors import MethodError
from merging.flat import FlatSpace
from merging.linear_form import LinearForm, apply_form
from merging.method import Method, Parameter, Rows, apply_flat, check_coefficients
from merging.types import TaskVector


def weighted(
    task_vectors: Sequence[TaskVector], *, coefficients: Sequence[float], normalize: bool = True
) -> dict[str, Tensor]:
    """A weighted mean of N task vectors.

    Args:
        task_vectors: N mappings over the same tensors.
        coefficients: one weight per expert.
        normalize: divide the weights by their sum (default; then ``M = sum_i w_i x_i`` whatever the base); ``False``
            uses them as they are.

    Raises:
        MethodError: weights that sum to zero, are not finite, or are not one per expert.

    Source: Matena and Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022 (arXiv:2111.09832),
    section 2 (isotropic merging with weights).
    """
    return apply_flat(
        task_vectors,
        lambda rows, space: weighted_flat(rows, space, coefficients=coefficients, normalize=normalize),
    )


def weighted_flat(rows: Rows, space: FlatSpace, *, coefficients: Sequence[float], normalize: bool = True) -> Tensor:
    """:func:`weighted` on N rows of shape ``(P,)``."""
    return apply_form(rows, weighted_form(len(rows), coefficients=coefficients, normalize=normalize))


def weighted_form(
    experts: int, tensor: str = "", *, coefficients: Sequence[float], normalize: bool = True
) -> LinearForm:
    """The coefficients, divided by their sum if they are to be normalised."""
    weights = check_coefficients(coefficients, experts)
    if normalize:
        total = fsum(weights)
        if total == 0.0:
            raise MethodError(
                "the coefficients sum to zero and cannot be normalised: change one, or set normalize=false"
            )
        weights = tuple(weight / total for weight in weights)
    return LinearForm(weights)


METHOD = Method(
    name="weighted",
    function=weighted,
    flat=weighted_flat,
    summary="weighted mean of the experts",
    paper="Matena and Raffel 2022, arXiv:2111.09832",
    parameters=(Parameter("normalize", True, "divide the coefficients by their sum"),),
    coefficients="required",
    linear=True,
    base_free=lambda settings: bool(settings["normalize"]),
    elementwise=True,
    idempotent=True,
    lipschitz=True,
    linear_form=weighted_form,
)
