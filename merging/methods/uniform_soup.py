"""Uniform soup: the mean of all models, fine-tuned on one task with different hyper-parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.flat import FlatSpace
from merging.method import Method, Rows, always, apply_flat
from merging.methods.average import average_flat, average_form
from merging.types import TaskVector


def uniform_soup(task_vectors: Sequence[TaskVector]) -> dict[str, Tensor]:
    """The mean task vector of N models: :func:`merging.methods.average.average` under its name in the paper.

    A soup's ingredients share their task, hence their head, which belongs into the mean.  Heads are not merged by
    default: pass ``partition=partition(base, private=())``, or ``--private ''`` on the command line.

    Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
    increasing inference time", ICML 2022 (arXiv:2203.05482), section 2, table 2.
    """
    return apply_flat(task_vectors, uniform_soup_flat)


def uniform_soup_flat(rows: Rows, space: FlatSpace) -> Tensor:
    """:func:`uniform_soup` on N rows of shape ``(P,)``."""
    return average_flat(rows, space)


METHOD = Method(
    name="uniform_soup",
    function=uniform_soup,
    flat=uniform_soup_flat,
    summary="mean of models of one task (merge heads too: --private '')",
    paper="Wortsman et al. 2022, arXiv:2203.05482",
    linear=True,
    elementwise=True,
    idempotent=True,
    lipschitz=True,
    base_free=always,
    linear_form=average_form,
)
