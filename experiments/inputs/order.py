"""The order in which samples are visited: a function of seed and epoch, so that a run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from theory.errors import MergeboundError

_ORDER = 0x0DE2


def epoch_order(n: int, epoch: int, seed: int) -> np.ndarray:
    """A permutation of 0 .. n - 1, (n,) int64, named by seed and epoch."""
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(n)


def shuffled(
    n: int, size: int, *, seed: int, epochs: int | None = 1, start: tuple[int, int] = (0, 0)
) -> Iterator[tuple[np.ndarray, int]]:
    """Rows and epoch of each batch; every sample once per epoch, the last batch of an epoch may be short.

    Args:
        n: samples.
        size: samples of a batch.
        seed: names the permutations.
        epochs: how many in all, counted from 0; ``None`` for no end.
        start: epoch and step within it to begin at: what comes is what an unbroken run would have given from there.

    Raises:
        MergeboundError: a number out of range.
    """
    steps = -(-n // size) if size > 0 else 0
    for name, value, good in (
        ("n", n, n >= 1),
        ("size", size, size >= 1),
        ("epochs", epochs, epochs is None or epochs >= 0),
        ("start", start, start[0] >= 0 and 0 <= start[1] <= steps),
    ):
        if not good:
            raise MergeboundError(f"{name} = {value}: out of range for {n} samples in batches of {size}")
    return _batches(n, size, seed, epochs, start)


def _batches(
    n: int, size: int, seed: int, epochs: int | None, start: tuple[int, int]
) -> Iterator[tuple[np.ndarray, int]]:
    epoch, step = start
    while epochs is None or epoch < epochs:
        order = epoch_order(n, epoch, seed)
        for first in range(step * size, n, size):
            yield order[first : first + size], epoch
        epoch, step = epoch + 1, 0


def with_epochs(batches: Iterable[np.ndarray], n: int) -> Iterator[tuple[np.ndarray, int]]:
    """Each batch with the epoch of its first sample: how often ``n`` samples had been drawn before it."""
    drawn = 0
    for rows in batches:
        yield rows, drawn // n
        drawn += len(rows)
