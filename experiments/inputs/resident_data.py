"""Images that stay in memory as 8-bit pixels, on the device that trains: a batch is gathered, augmented and normalised.

On a CPU that is one pass in a compiled kernel; elsewhere whole tensors on the device, with the same result bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from experiments.inputs.augment import NOTHING, Augmentation, augment, check_shift, draw
from experiments.inputs.normalise import bits, cutout_colour, look_up, normalisation_table
from experiments.tasks.form import InputFormat
from experiments.tasks.types import Split
from theory.errors import MergeboundError


@dataclass(frozen=True, eq=False)
class Resident:
    """n samples of one part of a task (a :class:`experiments.inputs.training_data.TrainingData`).

    Attributes:
        store: uint8 (N, stored, height, width), contiguous, on the device; stored is 1 for grey images (repeated for
            networks that take more channels) or ``form.channels``.
        store_labels: int64 (N,) on the device.
        store_source: (N,) int64 row numbers of the underlying data set, below 2^32; they name the augmentation's
            draws.
        form: what the network takes; images have its size already.
        augmentation: what may happen to images.
        seed, name: name the augmentation's draws; give data sets different names.
        dtype: of batches: float32, bfloat16, float16 or float64.
        channels_last: memory order of batches.
        rows: (n,) int64 rows of the store that are the samples; default all of them in order.
    """

    store: Tensor
    store_labels: Tensor
    store_source: np.ndarray
    form: InputFormat
    augmentation: Augmentation = NOTHING
    seed: int = 0
    name: str = ""
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    rows: np.ndarray | None = None

    def __post_init__(self) -> None:
        size = (self.form.height, self.form.width)
        good = self.store.dtype == torch.uint8 and self.store.ndim == 4 and self.store.shape[2:] == size
        if not good or self.store.shape[1] not in (1, self.form.channels) or not self.store.is_contiguous():
            raise MergeboundError(
                f"images: {self.store.dtype} of shape {tuple(self.store.shape)}; give contiguous uint8 of shape "
                f"(n, {self.form.channels}, {size[0]}, {size[1]}), or with one channel, as load_resident does"
            )
        count = len(self.store)
        if self.store_labels.shape != (count,) or self.store_source.shape != (count,):
            raise MergeboundError(
                f"images: {count} of them, but labels have shape {tuple(self.store_labels.shape)} and source rows "
                f"{self.store_source.shape}; give one of each per image"
            )
        bits(self.dtype)
        check_shift(self.augmentation, *size)

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.arange(len(self.store)) if self.rows is None else self.rows

    @cached_property
    def _table(self) -> Tensor:
        return normalisation_table(self.form, self.dtype).to(self.store.device)

    @property
    def images(self) -> Tensor:
        """The samples' pixels, uint8 (n, stored, height, width)."""
        return self.store if self.rows is None else self.store[self._index(self.rows)]

    @cached_property
    def labels(self) -> Tensor:
        """Classes, (n,) int64."""
        return self.store_labels if self.rows is None else self.store_labels[self._index(self.rows)]

    @property
    def source(self) -> np.ndarray:
        """Row numbers of the underlying data set, (n,) int64."""
        found: np.ndarray = self.store_source if self.rows is None else self.store_source[self.rows]
        return found

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        """Images (m, channels, height, width), augmented and normalised, and labels (m,) of some rows.

        Raises:
            MergeboundError: a row that is not there.
        """
        chosen = self._chosen(rows)
        labels = self.store_labels[self._index(chosen)]
        if self.store.device.type == "cpu":
            return self._batch_on_cpu(chosen, epoch), labels
        return self._batch_on_device(chosen, epoch), labels

    def _batch_on_device(self, chosen: np.ndarray, epoch: int) -> Tensor:
        spec, form = self.augmentation, self.form
        pixels = self.store[self._index(chosen)].expand(-1, form.channels, -1, -1)
        if not spec.nothing:
            draws = draw(
                spec, self.store_source[chosen], epoch, form.height, form.width, seed=self.seed, name=self.name
            )
            pixels = augment(pixels, spec, draws, cutout_colour(form))
        return look_up(pixels, self._table).contiguous(memory_format=self._order)

    def _batch_on_cpu(self, chosen: np.ndarray, epoch: int) -> Tensor:
        from experiments.inputs import kernels

        spec, form = self.augmentation, self.form
        shape = (len(chosen), form.channels, form.height, form.width)
        images = torch.empty(shape, dtype=self.dtype, memory_format=self._order)
        integers, unsigned = bits(self.dtype)
        table = self._table.view(integers).numpy().view(unsigned)
        pixels = self.store.numpy()
        if not spec.nothing:
            draws = draw(spec, self.store_source[chosen], epoch, *shape[2:], seed=self.seed, name=self.name)
            fill = np.array(cutout_colour(form), dtype=np.uint8)
            stored, pixels = pixels, np.empty(shape, dtype=np.uint8)
            kernels.augment(stored, chosen, draws.table(), spec.pad == "reflect", spec.cutout, fill, pixels)
            chosen = np.arange(len(chosen))
        steps = np.array([images.stride(0), images.stride(1), images.stride(3)], dtype=np.int64)
        flat = torch.as_strided(images, (images.numel(),), (1,)).view(integers).numpy().view(unsigned)
        kernels.look_up(pixels.reshape(*pixels.shape[:2], shape[2] * shape[3]), chosen, table, flat, steps)
        return images

    def take(self, rows: np.ndarray) -> Resident:
        """The data of some rows only; pixels are shared with this one, and a sample keeps its draws.

        Raises:
            MergeboundError: a row that is not there.
        """
        return replace(self, rows=self._chosen(rows))

    def evaluation(self) -> Resident:
        """The same samples without augmentation."""
        return replace(self, augmentation=NOTHING)

    def split(self) -> Split:
        """The same samples without augmentation, normalised once and for all: float32, four times as large."""
        images, labels = replace(self.evaluation(), dtype=torch.float32).batch(np.arange(len(self)), 0)
        return Split(images, labels, self.source)

    @property
    def _order(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def _chosen(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the store, (m,) int64, contiguous."""
        asked = np.asarray(rows, dtype=np.int64)
        if asked.ndim != 1 or (len(asked) and (asked.min() < 0 or asked.max() >= len(self))):
            raise MergeboundError(
                f"rows: shape {asked.shape} with values {asked.min(initial=0)} to {asked.max(initial=0)}; give a row "
                f"of numbers in 0 .. {len(self) - 1}"
            )
        return np.ascontiguousarray(asked if self.rows is None else self.rows[asked])

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self.store.device)
