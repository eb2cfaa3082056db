"""Linear methods as numbers: what each expert's task vector is multiplied by.

The definition of a linear method computes its numbers here once, for the merge in memory (:func:`apply_form`) and for
the compiled loops of streamed merges alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from merging.method import Rows, combine


@dataclass(frozen=True)
class LinearForm:
    """``(sum_i w_i Delta_i) * factor / divisor``, rounded after every step.

    Attributes:
        weights: one per expert; ``None``: the plain sum.
        factor: not applied where it is one.
        divisor: not applied where it is one.
    """

    weights: Sequence[float] | None = None
    factor: float = 1.0
    divisor: float = 1.0


def apply_form(rows: Rows, form: LinearForm) -> Tensor:
    """The merged task vector of N rows of shape ``(P,)``."""
    merged = combine(rows, form.weights)
    if form.factor != 1.0:
        merged.mul_(form.factor)
    if form.divisor != 1.0:
        merged.div_(form.divisor)
    return merged
