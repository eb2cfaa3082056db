"""Batches of many experts: the reference's, gathered in one call where experts share their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from experiments.finetune.loop import batches
from experiments.grid.run_spec import RunSpec
from experiments.inputs.order import with_epochs
from experiments.inputs.prefetch import Loads, in_order
from experiments.inputs.resident_data import Resident
from experiments.inputs.shares import nested_subset
from experiments.inputs.training_data import TrainingData


class Supply:
    """One expert's batches, in the reference's order; close it where training ends early.

    Args:
        run: its seed, share, batch size, steps and sampling.
        data: the training part.

    Raises:
        MergeboundError: the batch is larger than the share of the data.
    """

    def __init__(self, run: RunSpec, data: TrainingData) -> None:
        used = nested_subset(len(data), run.data_share, run.seed)
        rng = np.random.default_rng([run.seed, 0xBA7C])
        order = with_epochs(batches(len(used), run.batch_size, run.steps, run.sampling, rng), len(used))
        self.sample = data.take(used)
        self._loads = isinstance(self.sample, Loads)
        self._order = None if self._loads else order
        self._loaded = in_order(self.sample, order) if self._loads else None
        self.rows = np.empty(0, dtype=np.int64)
        self.epoch = 0
        self.batch: tuple[Tensor, Tensor] | None = None

    def advance(self) -> int:
        """Go to the next batch; how many samples it has."""
        if self._loaded is not None:
            self.batch = next(self._loaded)
            return len(self.batch[1])
        assert self._order is not None
        self.rows, self.epoch = next(self._order)
        return len(self.rows)

    def close(self) -> None:
        """Give up what works in the background."""
        if self._loaded is not None:
            self._loaded.close()


def gather(supplies: Sequence[Supply], size: int) -> tuple[Tensor, Tensor]:
    """The current batches of M experts, shorter ones filled up with their own first samples.

    Args:
        size: samples of each expert, B.

    Returns:
        Images [B, M, ...] and labels [M, B].
    """
    if all(isinstance(supply.sample, Resident) for supply in supplies):
        shared = _shared([supply.sample for supply in supplies])  # type: ignore[misc]
        if shared is not None:
            rows = np.stack([_filled(_rows(s.sample, s.rows), size) for s in supplies], axis=1)  # type: ignore[arg-type]
            images, labels = shared.batch(rows.reshape(-1), 0)
            return images.view(size, len(supplies), *images.shape[1:]), labels.view(size, len(supplies)).t()
    parts = [_own(supply, size) for supply in supplies]
    return torch.stack([images for images, _ in parts], dim=1), torch.stack([labels for _, labels in parts])


def _own(supply: Supply, size: int) -> tuple[Tensor, Tensor]:
    if supply.batch is None:
        return supply.sample.batch(_filled(supply.rows, size), supply.epoch)
    images, labels = supply.batch
    index = torch.from_numpy(_filled(np.arange(len(labels)), size)).to(labels.device)
    return (images, labels) if len(labels) == size else (images[index], labels[index])


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    return np.resize(rows, size) if len(rows) < size else rows


def _rows(sample: Resident, rows: np.ndarray) -> np.ndarray:
    return rows if sample.rows is None else sample.rows[rows]


def _shared(samples: Sequence[Resident]) -> Resident | None:
    """The images that all samples are taken from, if they are the same ones and are not augmented."""
    first = samples[0]
    for sample in samples:
        if sample.store is not first.store or sample.store_labels is not first.store_labels:
            return None
        if not sample.augmentation.nothing or (sample.form, sample.dtype) != (first.form, first.dtype):
            return None
    return first if first.rows is None else _whole(first)


def _whole(sample: Resident) -> Resident:
    return replace(sample, rows=None)
