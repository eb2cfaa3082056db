"""AdaMerging: ``M = x_0 + sum_i lambda_i Delta_i`` with coefficients that were adapted to unlabelled images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.flat import FlatSpace
from merging.grouped import Groups, combine_groups, grouped_form
from merging.method import Method, Rows, apply_flat
from merging.types import TaskVector


def adamerging(
    task_vectors: Sequence[TaskVector], *, coefficients: Sequence[float], groups: Groups | None = None
) -> dict[str, Tensor]:
    """Apply adapted coefficients (they are found by ``experiments.measure.entropy.adapt_coefficients``).

    * task-wise: one ``lambda_i`` per expert (``coefficients`` alone);
    * layer-wise: one ``lambda_i^l`` per expert and layer.  A "layer" of the paper is a single *tensor* in the authors'
      code (one coefficient per entry of the state dict); ``groups`` may as well name blocks of tensors.

    The ++ variant, on trimmed and sign-elected task vectors, is ``adamerging_pp``.

    Args:
        task_vectors: N mappings over the same tensors.
        coefficients: lambda, one per expert.
        groups: coefficients of their own for some tensors: regular expression on the whole tensor name to one
            coefficient per expert; the first expression that matches wins, tensors without a match use
            ``coefficients``.

    Raises:
        MethodError: coefficients that are not finite or not one per expert; an invalid expression.

    Source: Yang et al., "AdaMerging: Adaptive model merging for multi-task learning", ICLR 2024 (arXiv:2310.02575),
    section 3.2.
    """
    return apply_flat(
        task_vectors,
        lambda rows, space: adamerging_flat(rows, space, coefficients=coefficients, groups=groups),
    )


def adamerging_flat(
    rows: Rows, space: FlatSpace, *, coefficients: Sequence[float], groups: Groups | None = None
) -> Tensor:
    """:func:`adamerging` on N rows of shape ``(P,)``."""
    return combine_groups(rows, space, coefficients, groups)


METHOD = Method(
    name="adamerging",
    function=adamerging,
    flat=adamerging_flat,
    summary="given coefficients, adapted to unlabelled images by their entropy",
    paper="Yang et al. 2024, arXiv:2310.02575",
    coefficients="required",
    linear=True,
    elementwise=True,
    lipschitz=True,
    linear_form=grouped_form,
    needs_data=True,
    extras=("groups",),
)
