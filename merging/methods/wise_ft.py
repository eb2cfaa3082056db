"""WiSE-FT: interpolate between the base and the fine-tuned weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.flat import FlatSpace
from merging.linear_form import LinearForm, apply_form
from merging.method import Method, Parameter, Rows, apply_flat
from merging.types import TaskVector


def wise_ft(task_vectors: Sequence[TaskVector], *, alpha: float = 0.5) -> dict[str, Tensor]:
    """``alpha mean_i(Delta_i)``: the model ``(1 - alpha) x_0 + alpha mean_i(x_i)``.

    The paper has one fine-tuned model; several are averaged first (a soup, moved towards the base).

    Args:
        task_vectors: N mappings over the same tensors.
        alpha: 0 is the base, 1 the (mean of the) experts; the paper recommends one half where nothing else is known.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022 (arXiv:2109.01903), section 3.
    """
    return apply_flat(task_vectors, lambda rows, space: wise_ft_flat(rows, space, alpha=alpha))


def wise_ft_flat(rows: Rows, space: FlatSpace, *, alpha: float = 0.5) -> Tensor:
    """:func:`wise_ft` on N rows of shape ``(P,)``."""
    return apply_form(rows, wise_ft_form(len(rows), alpha=alpha))


def wise_ft_form(experts: int, tensor: str = "", *, alpha: float = 0.5) -> LinearForm:
    """The sum, times alpha / N."""
    return LinearForm(factor=alpha / experts)


METHOD = Method(
    name="wise_ft",
    function=wise_ft,
    flat=wise_ft_flat,
    summary="between the base and the (mean of the) experts",
    paper="Wortsman et al. 2022, arXiv:2109.01903",
    parameters=(Parameter("alpha", 0.5, "0 is the base, 1 the experts", low=0.0, high=1.0),),
    linear=True,
    elementwise=True,
    lipschitz=True,
    linear_form=wise_ft_form,
)
