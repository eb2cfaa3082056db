"""Averaging: ``M = x_0 + (1/N) sum_i Delta_i``, the mean of the experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.flat import FlatSpace
from merging.linear_form import LinearForm, apply_form
from merging.method import Method, Rows, always, apply_flat
from merging.types import TaskVector


def average(task_vectors: Sequence[TaskVector]) -> dict[str, Tensor]:
    """The mean task vector of N experts, tensor by tensor.

    Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
    increasing inference time", ICML 2022 (arXiv:2203.05482); the uniform soup.
    """
    return apply_flat(task_vectors, average_flat)


def average_flat(rows: Rows, space: FlatSpace) -> Tensor:
    """:func:`average` on N rows of shape ``(P,)``."""
    return apply_form(rows, average_form(len(rows)))


def average_form(experts: int, tensor: str = "") -> LinearForm:
    """The sum, divided by N."""
    return LinearForm(divisor=experts)


METHOD = Method(
    name="average",
    function=average,
    flat=average_flat,
    summary="mean of the experts (uniform soup)",
    paper="Wortsman et al. 2022, arXiv:2203.05482",
    linear=True,
    base_free=always,
    elementwise=True,
    idempotent=True,
    lipschitz=True,
    linear_form=average_form,
)
