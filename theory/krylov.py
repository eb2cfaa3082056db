"""What a Lanczos run with a random start says about the ends of a spectrum."""

from __future__ import annotations

import numpy as np

from theory.errors import MergeboundError


def lanczos_excess(width: float, size: int, steps: int, chance: float) -> float:
    """How far the extreme eigenvalues can lie beyond the extreme Ritz values, with probability at least 1 - chance.

    For a symmetric matrix of order ``size`` and a start vector that is uniform on the sphere (a normal one will do),
    after ``steps`` k the largest eigenvalue exceeds the largest Ritz value by at most ``e (l_max - l_min)`` with
    probability at least ``1 - d``, where ``1.648 sqrt(size) exp(-sqrt(e) (2k - 1)) = d``; likewise at the lower end.
    With ``d = chance/2`` for each end, ``l_max - l_min <= width/(1 - 2e)``, so that each end is within
    ``e width/(1 - 2e)`` of its Ritz value: ``inf`` where ``e >= 1/2`` (too few steps).

    Args:
        width: largest minus smallest Ritz value (unit of the matrix).
        size: order of the matrix.
        steps: dimension of the Krylov space.
        chance: in (0, 1).

    Raises:
        MergeboundError: values outside their domains.

    Source: Kuczynski and Wozniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a
    random start", SIAM J. Matrix Anal. Appl. 13(4), 1992, theorem 4.2, applied to ``A - l_min I`` and ``l_max I - A``
    (Krylov spaces do not change under shifts).

    >>> round(lanczos_excess(1.0, 10_000, 40, 0.01), 4), lanczos_excess(1.0, 10_000, 5, 0.01)
    (0.018, inf)
    """
    if not (width >= 0 and size >= 1 and steps >= 1 and 0 < chance < 1):
        raise MergeboundError(
            f"width = {width}, size = {size}, steps = {steps}, chance = {chance}: give a width of at least 0, "
            "counts of at least 1, and a chance between 0 and 1"
        )
    if steps >= size or width == 0:
        return 0.0
    relative = float(np.log(2 * 1.648 * np.sqrt(size) / chance) / (2 * steps - 1)) ** 2
    return float("inf") if relative >= 0.5 else relative * width / (1 - 2 * relative)
