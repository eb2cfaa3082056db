"""The k-th largest magnitude of task vectors that are never held: exact, in one pass over the checkpoints.

1. A sample of short runs of entries, spread evenly, brackets the wanted rank by five standard errors.
2. One pass counts the magnitudes above the bracket and, inside it, how often every float32 value occurs (a histogram
   over bit patterns, which for positive numbers are in the order of the values; where the values inside the bracket
   take little memory they are collected instead).  If the rank is inside the bracket, the threshold is known exactly;
   if not, or if the bracket holds more values than the histogram has bins, the bracket is corrected and the pass
   repeated.
3. Of several entries of exactly that magnitude the first in index order are kept, as many as are wanted.  The place of
   the last of them is known from the values that were collected; after counting it is looked up in part of one more
   pass, over the experts for which that makes a difference.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merging.kernels.select import around, collect, count_equal, magnitudes_of, not_finite, place_of_equal, runs_of
from merging.streaming.source import Buffers, Inputs

logger = logging.getLogger(__name__)

SMALL = 1 << 18
"""Entries up to which a domain is simply sorted out in memory."""

COLLECTED = 1 << 27
"""Bytes of magnitudes inside the brackets that may be collected; beyond that they are counted by value."""

SPARE = 1 << 14  # entries of room for what a sample cannot foresee
_SAMPLED = 1 << 24
"""Entries up to which all of a domain is read for the sample (it is in memory when it is read again)."""

_RUN = 64  # entries of one run of the sample
_FEW_RUNS = 512  # in smaller domains
_RUNS = 768  # of two times 64 entries, in larger domains
_BINS = 1 << 22  # of all experts together that a thread looks at
_MANY = 1 << 31  # entries that 32-bit counters do not suffice for
_LARGEST = np.float32(np.finfo(np.float32).max)

Floats = NDArray[np.float32]
Counts = NDArray[np.int32] | NDArray[np.int64]

Domain = Sequence[tuple[str, int]]
"""Names and sizes of the tensors over which magnitudes are ranked, in index order."""


@dataclass(frozen=True)
class Threshold:
    """Which entries of one expert are kept: magnitudes above ``value``, and those equal to it at places below ``cut``.

    Attributes:
        value: a magnitude; NaN: nothing is kept.
        cut: a place in the domain (its size: all equal ones are kept).
    """

    value: np.float32
    cut: int


def select(
    inputs: Inputs, domain: Domain, keep: int, *, chunk: int, pool: Executor | None = None, workers: int = 1
) -> list[Threshold]:
    """The threshold of every expert that keeps exactly ``keep`` entries of largest ``|x_i - x_0|``.

    Args:
        inputs: the checkpoints.
        domain: what is ranked together.
        keep: entries to keep, from 0 to the size of the domain.
        chunk: entries to look at at a time.
        pool: where to run; default: here.
        workers: number of groups that the experts are divided into for that.

    Raises:
        CheckpointError: a checkpoint cannot be read.
    """
    size = sum(count for _, count in domain)
    experts = list(range(len(inputs.experts)))
    if keep <= 0:
        return [Threshold(np.float32(np.nan), 0) for _ in experts]
    if keep >= size:
        return [Threshold(np.float32(0.0), size) for _ in experts]
    groups = [experts[first::workers] for first in range(min(workers, len(experts)))]
    if pool is None:
        parts = [_select(inputs, domain, size, keep, group, chunk, COLLECTED // len(groups)) for group in groups]
    else:
        parts = list(
            pool.map(lambda group: _select(inputs, domain, size, keep, group, chunk, COLLECTED // len(groups)), groups)
        )
    found: dict[int, Threshold] = {}
    for group, thresholds in zip(groups, parts, strict=True):
        found.update(zip(group, thresholds, strict=True))
    return [found[expert] for expert in experts]


def _select(
    inputs: Inputs, domain: Domain, size: int, keep: int, group: Sequence[int], chunk: int, limit: int
) -> list[Threshold]:
    buffers = Buffers()
    if size <= SMALL:
        return [_sorted_out(inputs, domain, size, keep, expert, chunk, buffers) for expert in group]
    brackets, shares = {}, {}
    for expert in group:
        brackets[expert], shares[expert] = _bracket(inputs, domain, size, keep, expert, chunk, buffers)
    found: dict[int, Threshold] = {}
    rooms = {expert: min(size, int(1.25 * shares[expert] * size) + SPARE) for expert in group}
    if 4 * sum(rooms.values()) <= limit:
        found = _collected(inputs, domain, size, keep, brackets, rooms, chunk, buffers)
    missed = [expert for expert in group if expert not in found]
    if missed:
        found |= _counted(inputs, domain, size, keep, {e: brackets[e] for e in missed}, chunk, buffers)
    return [found[expert] for expert in group]


def _counted(
    inputs: Inputs,
    domain: Domain,
    size: int,
    keep: int,
    brackets: dict[int, tuple[np.float32, np.float32]],
    chunk: int,
    buffers: Buffers,
) -> dict[int, Threshold]:
    """Thresholds by counting values: memory that does not grow with the domain."""
    group = list(brackets)
    values: dict[int, tuple[np.float32, int, int]] = {}
    passes = 0
    while len(values) < len(group):
        passes += 1
        open_ones = [expert for expert in group if expert not in values]
        for expert, found in zip(open_ones, _pass(inputs, domain, open_ones, brackets, chunk, buffers), strict=True):
            above, histogram, first, shift = found
            low, high = brackets[expert]
            inside = int(histogram.sum())
            if (above >= keep and high >= _LARGEST) or (above + inside < keep and low <= 0.0):
                # infinite or NaN entries, which the merge itself will name
                values[expert] = (np.float32(np.inf) if above >= keep else np.float32(0.0), 0, 0)
            elif above >= keep:
                brackets[expert] = (_next(high), _LARGEST)
            elif above + inside < keep:
                brackets[expert] = (np.float32(0.0), _previous(low))
            else:
                from_top = np.cumsum(histogram[::-1])
                place = int(np.searchsorted(from_top, keep - above))
                bin_ = len(histogram) - 1 - place
                pattern = first + (bin_ << shift)
                if shift == 0:
                    larger = above + (int(from_top[place - 1]) if place > 0 else 0)
                    values[expert] = (_float(pattern), keep - larger, int(histogram[bin_]))
                else:
                    brackets[expert] = (_float(pattern), min(high, _float(pattern + (1 << shift) - 1)))
    if passes > 1:
        logger.info("selection took %d passes over %d entries", passes, size)
    return {
        expert: Threshold(values[expert][0], _cut(inputs, domain, size, expert, *values[expert], chunk, buffers))
        for expert in group
    }


def _collected(
    inputs: Inputs,
    domain: Domain,
    size: int,
    keep: int,
    brackets: dict[int, tuple[np.float32, np.float32]],
    rooms: dict[int, int],
    chunk: int,
    buffers: Buffers,
) -> dict[int, Threshold]:
    """Thresholds by collecting the magnitudes inside the brackets; experts whose bracket or room is too small miss.

    The magnitudes are in index order and it is known how many came from each chunk, so that the place of the last
    entry that is kept is looked up in one chunk only.
    """
    group = list(brackets)
    held = {expert: buffers.floats(("collected", place), rooms[expert]) for place, expert in enumerate(group)}
    above, inside = dict.fromkeys(group, 0), dict.fromkeys(group, 0)
    chunks = [(name, start, min(count, start + chunk)) for name, count in domain for start in range(0, count, chunk)]
    counts = np.zeros((len(group), len(chunks) + 1), dtype=np.int64)
    for number, (name, start, stop) in enumerate(chunks):
        for place, expert in enumerate(group):
            base, address = inputs.pair(expert, name, start, stop, buffers)
            room = held[expert][min(inside[expert], rooms[expert]) :]
            more, here = collect(base, address, stop - start, *brackets[expert], room)
            above[expert] += more
            inside[expert] += here
            counts[place, number + 1] = inside[expert]
        if len(domain) > 1 and (number + 1 == len(chunks) or chunks[number + 1][0] != name):
            inputs.release(name, group)
    offsets = dict(zip((name for name, _ in domain), np.cumsum([0, *(count for _, count in domain)]), strict=False))
    found: dict[int, Threshold] = {}
    for place, expert in enumerate(group):
        if inside[expert] > rooms[expert] or not above[expert] < keep <= above[expert] + inside[expert]:
            continue
        values = held[expert][: inside[expert]]
        rank = inside[expert] - (keep - above[expert])
        value = np.partition(values, rank)[rank]
        wanted = keep - above[expert] - int(np.count_nonzero(values > value))
        equal = np.flatnonzero(values == value)
        cut = size
        if wanted < len(equal):
            last = int(equal[wanted - 1])
            number = int(np.searchsorted(counts[place], last, side="right")) - 1
            name, start, stop = chunks[number]
            before = int(np.count_nonzero(equal < counts[place, number]))
            base, address = inputs.pair(expert, name, start, stop, buffers)
            within = place_of_equal(base, address, stop - start, value, wanted - before)
            cut = int(offsets[name]) + start + int(within)
        found[expert] = Threshold(value, cut)
    return found


def _pass(
    inputs: Inputs,
    domain: Domain,
    group: Sequence[int],
    brackets: dict[int, tuple[np.float32, np.float32]],
    chunk: int,
    buffers: Buffers,
) -> list[tuple[int, Counts, int, int]]:
    """Count above every expert's bracket and fill its histogram: one pass over these experts."""
    limit = max(1 << 12, _BINS // len(group))
    few = sum(count for _, count in domain) < _MANY
    found: list[tuple[Counts, int, int]] = []
    for expert in group:
        first, last = (_pattern(end) for end in brackets[expert])
        shift = 0
        while ((last - first) >> shift) + 1 > limit:
            shift += 1
        bins = ((last - first) >> shift) + 1
        found.append((np.zeros(bins, np.int32) if few else np.zeros(bins, np.int64), first, shift))
    above = [0] * len(group)
    for name, count in domain:
        for start in range(0, count, chunk):
            stop = min(count, start + chunk)
            for index, expert in enumerate(group):
                base, place = inputs.pair(expert, name, start, stop, buffers)
                low, high = brackets[expert]
                histogram, first, shift = found[index]
                above[index] += around(base, place, stop - start, low, high, first, shift, histogram)
        inputs.release(name, group)
    return [(number, *entry) for number, entry in zip(above, found, strict=True)]


def _bracket(
    inputs: Inputs, domain: Domain, size: int, keep: int, expert: int, chunk: int, buffers: Buffers
) -> tuple[tuple[np.float32, np.float32], float]:
    """Magnitudes between which the wanted one lies, almost surely: five standard errors of the sample to each side.

    The second result is about the share of all entries that are in between.

    The runs are spread evenly, so the spread of a share over them is estimated by differences between neighbours.
    """
    sample = (_sample_all if size <= _SAMPLED else _sample_some)(inputs, domain, size, expert, chunk, buffers)
    rows = len(sample)
    if rows < 16 or not bool(np.isfinite(sample).all()):
        return (np.float32(0.0), _LARGEST), 1.0
    ordered = np.sort(sample, axis=None)
    share = keep / size
    middle = ordered[min(len(ordered) - 1, int((1.0 - share) * len(ordered)))]
    shares = (sample > middle).mean(axis=1)
    error = float(np.sqrt(np.sum(np.diff(shares) ** 2) / 2.0 / rows) / np.sqrt(rows)) + 1.0 / len(ordered)
    low_rank = int(np.floor((1.0 - share - 5.0 * error) * len(ordered))) - 1
    high_rank = int(np.ceil((1.0 - share + 5.0 * error) * len(ordered))) + 1
    low = np.float32(0.0) if low_rank < 0 else ordered[low_rank]
    high = _LARGEST if high_rank >= len(ordered) else ordered[high_rank]
    inside = np.searchsorted(ordered, high, side="right") - np.searchsorted(ordered, low, side="left")
    return (np.float32(low), np.float32(high)), float(inside) / len(ordered)


def _sample_all(inputs: Inputs, domain: Domain, size: int, expert: int, chunk: int, buffers: Buffers) -> Floats:
    """Evenly spread runs of a domain that is about to be read, chunk by chunk; shape ``(runs, 64)``."""
    sample = np.empty((2 * _FEW_RUNS + len(domain), _RUN), dtype=np.float32)
    rows = 0
    for name, count in domain:
        for start in range(0, count, chunk):
            stop = min(count, start + chunk)
            runs = min(len(sample) - rows, (stop - start) // _RUN, -(-_FEW_RUNS * (stop - start) // size))
            if runs > 0:
                base, address = inputs.pair(expert, name, start, stop, buffers)
                runs_of(base, address, stop - start, sample[rows : rows + runs])
                rows += runs
    return sample[:rows]


def _sample_some(inputs: Inputs, domain: Domain, size: int, expert: int, chunk: int, buffers: Buffers) -> Floats:
    """Evenly spread runs of a large domain, which are all that is read of it; shape ``(runs, 128)``."""
    run = 2 * _RUN
    sample = np.empty((_RUNS, run), dtype=np.float32)
    offsets = np.cumsum([0, *(count for _, count in domain)])
    wanted: list[tuple[str, int]] = []
    for place in ((size - run) * np.arange(_RUNS) // (_RUNS - 1)).tolist():
        index = int(np.searchsorted(offsets, place, side="right")) - 1
        name, count = domain[index]
        if count >= run:  # shorter tensors are left out: the sample only steers
            wanted.append((name, min(place - int(offsets[index]), count - run)))
    for name, start in wanted:
        inputs.announce(expert, name, start, start + run)
    for index, (row, (name, start)) in enumerate(zip(sample, wanted, strict=False)):
        base, address = inputs.pair(expert, name, start, start + run, buffers, ahead=False)
        magnitudes_of(base, address, run, row)
        if index + 1 == len(wanted) or wanted[index + 1][0] != name:
            inputs.forget(name, expert)
    return sample[: len(wanted)]


def _sorted_out(
    inputs: Inputs, domain: Domain, size: int, keep: int, expert: int, chunk: int, buffers: Buffers
) -> Threshold:
    """The threshold of a small domain."""
    magnitudes = np.empty(size, dtype=np.float32)
    place = 0
    for name, count in domain:
        for start in range(0, count, chunk):
            stop = min(count, start + chunk)
            base, address = inputs.pair(expert, name, start, stop, buffers)
            magnitudes_of(base, address, stop - start, magnitudes[place : place + stop - start])
            place += stop - start
    value = np.partition(magnitudes, size - keep)[size - keep]
    wanted = keep - int(np.count_nonzero(magnitudes > value))
    equal = np.flatnonzero(magnitudes == value)
    return Threshold(value, size if wanted >= len(equal) else int(equal[wanted]))


def _cut(
    inputs: Inputs,
    domain: Domain,
    size: int,
    expert: int,
    value: np.float32,
    wanted: int,
    equal: int,
    chunk: int,
    buffers: Buffers,
) -> int:
    """The place behind the last of the ``equal`` entries of magnitude ``value`` that is kept."""
    if wanted >= equal:
        return size
    offset = seen = 0
    for name, count in domain:
        for start in range(0, count, chunk):
            stop = min(count, start + chunk)
            base, address = inputs.pair(expert, name, start, stop, buffers)
            here = count_equal(base, address, stop - start, value)
            if seen + here >= wanted:
                return offset + start + int(place_of_equal(base, address, stop - start, value, wanted - seen))
            seen += here
        offset += count
        inputs.release(name, [expert])
    return size


def count_not_finite(inputs: Inputs, domain: Domain, chunk: int) -> int:
    """How many entries of all task vectors are NaN or infinite."""
    buffers, bad = Buffers(), 0
    for name, count in domain:
        for start in range(0, count, chunk):
            stop = min(count, start + chunk)
            for expert in range(len(inputs.experts)):
                base, address = inputs.pair(expert, name, start, stop, buffers)
                bad += int(not_finite(base, address, stop - start))
    return bad


def _pattern(value: np.float32) -> int:
    return int(np.float32(value).view(np.uint32))


def _float(pattern: int) -> np.float32:
    return np.uint32(pattern).view(np.float32)


def next_above(value: np.float32) -> np.float32:
    """The next larger magnitude (infinity above the largest number, NaN above NaN)."""
    return np.float32(np.inf) if value >= _LARGEST else np.nextafter(value, np.float32(np.inf))


def _next(value: np.float32) -> np.float32:
    return np.float32(min(_LARGEST, next_above(value)))


def _previous(value: np.float32) -> np.float32:
    return np.float32(max(np.float32(0.0), np.nextafter(value, np.float32(0.0))))
