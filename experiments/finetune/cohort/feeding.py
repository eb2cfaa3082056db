"""What experts see: the reference's batches as index matrices, and the samples of many steps gathered at once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experiments.finetune.loop import batches
from experiments.grid.run_spec import RunSpec
from experiments.inputs.order import with_epochs
from experiments.inputs.resident_data import Resident
from experiments.inputs.shares import nested_subset
from experiments.inputs.training_data import TrainingData
from experiments.tasks.types import Split
from theory.errors import MergeboundError

TABLE_BYTES = 1 << 28
"""Samples that never change are normalised once and for all if all experts' together take no more."""
BLOCK_BYTES = 1 << 25
"""Else so much is gathered at a time."""
BLOCK_STEPS = 512


@dataclass(frozen=True)
class Order:
    """Batches of one run.

    Attributes:
        rows: (steps, batch) int64 rows of the data; behind a short batch, any others.
        counts: (steps,) int64 samples of each batch.
        epochs: (steps,) int64, which name the augmentation's draws.
    """

    rows: np.ndarray
    counts: np.ndarray
    epochs: np.ndarray


def orders(run: RunSpec, n: int, blocks: Sequence[int]) -> Iterator[Order]:
    """The run's batches, block by block; those of the reference loop.

    Args:
        run: its seed, share, batch size, steps and sampling.
        n: samples of the data.
        blocks: steps of each block; together at most the run's.

    Raises:
        MergeboundError: the batch is larger than the share of the data.
    """
    used = nested_subset(n, run.data_share, run.seed)
    size, rng = run.batch_size, np.random.default_rng([run.seed, 0xBA7C])
    if run.sampling == "reshuffle" and size <= len(used):
        yield from _cut(_epochs(used, size, rng), blocks)
        return
    stream = with_epochs(batches(len(used), size, run.steps, run.sampling, rng), len(used))
    for length in blocks:
        taken = [next(stream) for _ in range(length)]
        rows, epochs = np.stack([batch for batch, _ in taken]), np.array([epoch for _, epoch in taken])
        yield Order(used[rows], np.full(length, size), epochs)


def _epochs(used: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[Order]:
    """Epoch after epoch of ``reshuffle``, as :func:`~experiments.finetune.loop.batches` draws them."""
    n, epoch = len(used), 0
    steps = -(-n // size)
    counts = np.full(steps, size)
    counts[-1] = n - (steps - 1) * size
    while True:
        rows = np.resize(used[rng.permutation(n)], (steps, size))
        yield Order(rows, counts, np.full(steps, epoch))
        epoch += 1


def _cut(stream: Iterator[Order], blocks: Sequence[int]) -> Iterator[Order]:
    """Blocks of so many steps from pieces of any length."""
    piece, begin = next(stream), 0
    for length in blocks:
        parts, wanted = [], length
        while wanted:
            if begin == len(piece.counts):
                piece, begin = next(stream), 0
            part = slice(begin, begin + wanted)
            parts.append((piece.rows[part], piece.counts[part], piece.epochs[part]))
            taken = len(parts[-1][1])
            begin, wanted = begin + taken, wanted - taken
        rows, counts, epochs = (np.concatenate(each) for each in zip(*parts, strict=True))
        yield Order(rows, counts, epochs)


@dataclass(frozen=True)
class Block:
    """Samples of some steps of M experts.

    Attributes:
        table: (rows, features) on the device.
        labels: (rows,) int64 on the device.
        index: (M, steps, batch) int64 rows of the table; behind short batches there is something to be ignored.
        counts: (M, steps) int64 samples of each batch.
    """

    table: Tensor
    labels: Tensor
    index: np.ndarray
    counts: np.ndarray


class Feed:
    """Blocks of steps for M experts; iterate over it once.

    Args:
        runs: M runs, longest first.
        data: of each; samples that never change are shared between runs that have the same object.
        stops: steps at which a block must end, ascending, the last being the longest run's.
        dtype: of the samples.
    """

    def __init__(
        self, runs: Sequence[RunSpec], data: Sequence[TrainingData], stops: Sequence[int], dtype: torch.dtype
    ) -> None:
        self._data, self._dtype = data, dtype
        self.labels_device = data[0].labels.device
        self._table = _table(data, dtype)
        self.blocks = _blocks(runs, data, stops, self._table is None, dtype)
        self._orders = [orders(run, len(d), _within(self.blocks, run.steps)) for run, d in zip(runs, data, strict=True)]
        self._runs = runs

    def __iter__(self) -> Iterator[Block]:
        width = max(run.batch_size for run in self._runs)
        done = 0
        for length in self.blocks:
            active = [m for m, run in enumerate(self._runs) if run.steps > done]
            found = [next(self._orders[m]) for m in active]
            index = np.zeros((len(active), length, width), dtype=np.int64)
            counts = np.stack([order.counts for order in found])
            if self._table is not None:
                table, labels, first = self._table
                for row, (m, order) in enumerate(zip(active, found, strict=True)):
                    index[row, :, : order.rows.shape[1]] = order.rows + first[m]
            else:
                table, labels = self._gathered(active, found, index)
            yield Block(table, labels, index, counts)
            done += length

    def _gathered(self, active: Sequence[int], found: Sequence[Order], index: np.ndarray) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        begin = 0
        for row, (m, order) in enumerate(zip(active, found, strict=True)):
            size = order.rows.shape[1]
            index[row, :, :size] = begin + np.arange(order.rows.size).reshape(order.rows.shape)
            for epoch in np.unique(order.epochs):  # ascending, as the steps are
                some, classes = self._data[m].batch(order.rows[order.epochs == epoch].reshape(-1), int(epoch))
                images.append(_flat(some, self._dtype))
                labels.append(classes)
            begin += order.rows.size
        return torch.cat(images), torch.cat(labels)


def _within(blocks: Sequence[int], steps: int) -> list[int]:
    """The blocks of a run of so many steps, one of which ends there."""
    ends = np.cumsum(blocks)
    return [int(length) for length, end in zip(blocks, ends, strict=True) if end <= steps]


def _blocks(
    runs: Sequence[RunSpec], data: Sequence[TrainingData], stops: Sequence[int], gathers: bool, dtype: torch.dtype
) -> list[int]:
    longest = BLOCK_STEPS
    if gathers:
        sample = data[0].batch(np.zeros(1, dtype=np.int64), 0)[0].numel() * dtype.itemsize
        longest = max(1, min(longest, BLOCK_BYTES // (sample * sum(run.batch_size for run in runs))))
    blocks, done = [], 0
    for stop in stops:
        while done < stop:
            blocks.append(min(longest, stop - done))
            done += blocks[-1]
    return blocks


def _table(data: Sequence[TrainingData], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[int]] | None:
    """All samples of all runs, their labels, and where each run's begin; nothing where that is not possible."""
    unique = {_identity(each): each for each in data}
    if not all(_still(each) for each in unique.values()):
        return None
    sizes = {_shape(each) for each in unique.values()}
    if len(sizes) > 1:
        raise MergeboundError(f"images of shapes {sorted(sizes)} cannot be trained on together; make cohorts of one")
    total = sum(len(each) for each in unique.values())
    if total * int(np.prod(sizes.pop())) * dtype.itemsize > TABLE_BYTES:
        return None
    first, begin = {}, 0
    images, labels = [], []
    for key, each in unique.items():
        some, classes = each.batch(np.arange(len(each)), 0)
        images.append(_flat(some, dtype))
        labels.append(classes)
        first[key] = begin
        begin += len(each)
    return torch.cat(images), torch.cat(labels), [first[_identity(each)] for each in data]


def _flat(images: Tensor, dtype: torch.dtype) -> Tensor:
    return images.reshape(len(images), -1).to(dtype)


def _still(data: TrainingData) -> bool:
    """Whether a sample looks the same in every epoch, for all that is known."""
    return isinstance(data, Split) or (isinstance(data, Resident) and data.augmentation.nothing)


def _identity(data: TrainingData) -> Hashable:
    if isinstance(data, Resident) and data.augmentation.nothing:
        return (id(data.store), None if data.rows is None else id(data.rows), data.form, data.dtype)
    return id(data)


def _shape(data: TrainingData) -> tuple[int, ...]:
    return tuple(data.batch(np.zeros(1, dtype=np.int64), 0)[0].shape[1:])
