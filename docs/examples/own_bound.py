"""A bound of one's own: the gap of a merge from nothing but how often each training sample was drawn."""

from theory import Merge
from theory.published.common import (
    PublishedBound,
    align,
    bounded_assumption,
    constants,
    evaluated,
    published,
    stack,
    used,
    weighted,
)
from theory.symbolic import Formula
from theory.symbols import symbol

NAME = "never drawn"


def formula() -> Formula:
    """``B min(1, K b/n)``, what one expert contributes; the numeric function is compiled from it."""
    import sympy

    B, K, b, n = (symbol(key) for key in ("B", "K", "b", "n"))
    return Formula("gap", ("B", "K", "b", "n"), B * sympy.Min(1, K * b / n), "exchange of one sample")


def never_drawn(merge: Merge) -> PublishedBound:
    """``E[F(M) - F_S(M)] <= sum_i p_i B_i min(1, K_i b_i/n_i)``.

    A sample that no batch of the expert contained can be exchanged without changing the merge.  It was contained in one
    with a probability of at most K b/n, and then costs at most B.  Nothing is smooth, convex or Lipschitz here, and the
    merge may be discontinuous (TIES).

    Assumes losses in [0, B], batches whose samples each have the marginal rate b/n, frozen heads, and A1 to A3.

    Raises:
        RecipeError: an expert lacks B; names it.
    """
    runs = (("K", "steps"), ("b", "batch_size"), ("n", "n"))
    numbers = [stack([getattr(expert, field) for expert in merge.experts]) for _, field in runs]
    value = weighted(merge, evaluated(formula, align(constants(merge, "B", NAME), *numbers)))
    return published(
        merge,
        NAME,
        "gap",
        value,
        formula(),
        needs=[bounded_assumption(merge)],
        measured=used(merge, ("B",)),
        source="ours, as an example",
        checked="attained by the algorithm that remembers one sample, see the tutorial",
    )
