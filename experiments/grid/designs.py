"""Joint designs: points in the space of several hyperparameters, Sobol's or independent ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.grid.axes import HYPERPARAMETERS, at, stream

if TYPE_CHECKING:
    from experiments.grid.spec import Joint


def sobol(dimensions: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Scrambled Sobol points (Owen 1998, as scipy.stats.qmc has them): the first ``count`` of a power of two.

    Returns:
        (count, dimensions) in [0, 1).
    """
    from scipy.stats import qmc

    exponent = max(0, (count - 1).bit_length())
    found: np.ndarray = qmc.Sobol(dimensions, scramble=True, rng=rng).random_base2(exponent)[:count]
    return found


def design(kind: str, number: int, joint: Joint, seed: int) -> tuple[tuple[str, ...], tuple[tuple[Any, ...], ...]]:
    """The points of a joint design, without repetition; fewer points are the beginning of more.

    Args:
        kind: ``sobol`` or ``random``.
        number: of the design among those of its kind: each has a stream of its own.
        joint: count and axes.
        seed: names the draws.

    Returns:
        the hyperparameters, in the order of a run's fields, and one value for each in every point.
    """
    names = tuple(name for name in HYPERPARAMETERS if name in joint.axes)
    rng = stream(seed, f"{kind} {number}")
    shape = (joint.count, len(names))
    places = sobol(shape[1], shape[0], rng) if kind == "sobol" else rng.random(shape)
    rows = (tuple(at(n, joint.axes[n], float(u)) for n, u in zip(names, row, strict=True)) for row in places)
    return names, tuple(dict.fromkeys(rows))
