"""Images that stay on disk: decoded in workers shortly before they are needed, in bounded memory and stated order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from experiments.inputs.augment import PRESETS, Augmentation, augmentation
from experiments.inputs.order import shuffled
from experiments.inputs.prefetch import WAIT_S, Batch, Order, ordered
from experiments.inputs.processes import START_S, ThreadReader, WorkerProcess
from experiments.inputs.reader import Decode, Reader, source_rows
from experiments.inputs.resident_data import Resident
from experiments.inputs.transforms import Views, views_by_name
from experiments.tasks.form import InputFormat
from experiments.tasks.images import Images
from theory.errors import MergeboundError

CHUNK = 8
"""Images that a worker makes at a time."""
Kind = Literal["threads", "processes"]


@dataclass(frozen=True)
class _Chunk:
    """Part of a batch: rows of the images, the batch's rows, and where in the batch the part goes."""

    rows: np.ndarray
    epoch: int
    batch: np.ndarray
    first: int


@dataclass(frozen=True, eq=False)
class Streamed:
    """Data read from disk batch by batch (a :class:`experiments.inputs.training_data.TrainingData`).

    Without ``views`` the numbers are those of :class:`experiments.inputs.resident_data.Resident`, bit by bit.

    Attributes:
        images: the source.
        form: what the network takes.
        source: (N,) int64, one number for each of ``images``, which names its draws.
        views: random crops and operations on the full-size image; ``None`` for evaluation's view.
        augmentation: light augmentation of the view, as for data in memory.
        seed, name: name the draws; give data sets different names.
        workers: how many images are decoded at a time.
        kind: ``threads`` (Pillow decodes and resizes without holding the interpreter) or ``processes`` (started by
            each :meth:`loader`; they outlive what kills a decoder and do not share an interpreter).
        ahead_bytes: decoded pixels held for batches to come, at most; a chunk of eight images per worker always.
        limit_s: seconds that any wait may take.
        decode: see :class:`experiments.inputs.reader.Reader`.
        device, dtype, channels_last: of the batches.
        rows: (n,) int64 rows of ``images`` that are the samples; default all of them in order.
    """

    images: Images
    form: InputFormat
    source: np.ndarray
    views: Views | None = None
    augmentation: Augmentation = PRESETS["none"]
    seed: int = 0
    name: str = ""
    workers: int = 2
    kind: Kind = "threads"
    ahead_bytes: int = 64 << 20
    limit_s: float = WAIT_S
    decode: Decode = "exact"
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    rows: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("workers", self.workers >= 1, "at least 1"),
            ("kind", self.kind in ("threads", "processes"), "'threads' or 'processes'"),
            ("ahead_bytes", self.ahead_bytes >= 0, "a number of bytes"),
            ("limit_s", self.limit_s > 0, "a positive number of seconds"),
        ):
            if not good:
                raise MergeboundError(f"{name} = {getattr(self, name)!r}: give {wanted}")
        if self.source.shape != (len(self.images),):
            raise MergeboundError(f"source: shape {self.source.shape} for {len(self.images)} images; give one of each")
        self._resident(np.empty((0, self.form.channels, self.form.height, self.form.width), np.uint8), np.arange(0))

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.arange(len(self.images)) if self.rows is None else self.rows

    @cached_property
    def _all_labels(self) -> np.ndarray:
        return np.asarray(self.images.labels, dtype=np.int64)

    @cached_property
    def labels(self) -> Tensor:
        """Classes, (n,) int64, on the device."""
        return torch.from_numpy(self._all_labels[self._rows]).to(self.device)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: np.ndarray, epoch: int) -> Batch:
        """Images (m, channels, height, width), normalised, and labels (m,); decoded now, in threads.

        Raises:
            MergeboundError: an image cannot be read (names the file) or was not read in time; a row that is not there.
        """
        data = self if self.kind == "threads" else replace(self, kind="threads")
        loaded = data.loader([(rows, epoch)])
        try:
            return next(loaded)
        finally:
            loaded.close()

    def loader(self, order: Order) -> Generator[Batch, None, None]:
        """The batches of ``order``, each equal to ``batch(rows, epoch)``, prepared ahead of their use.

        ``order`` is consumed ahead, in the caller's thread.  Close the generator to end its workers early.

        Raises:
            MergeboundError: as :meth:`batch`, and where a worker process ended.
        """
        form = self.form
        reader = Reader(self.images, form, self.views, self.seed, self.name, self.source, self.decode)
        calls: list[ThreadReader] | list[WorkerProcess]
        if self.kind == "threads":
            calls, limit = [ThreadReader(reader) for _ in range(self.workers)], self.limit_s
        else:  # these have limits of their own, which name the image
            calls, limit = _processes(reader, self.workers, self.limit_s), START_S + self.limit_s + 30
        chunk_bytes = CHUNK * form.channels * form.height * form.width
        done = ordered(
            [_Work(call) for call in calls],
            self._chunks(order),
            ahead=max(self.workers, self.ahead_bytes // chunk_bytes),
            limit_s=limit,
            told=lambda chunk: self._told(chunk, calls),
        )
        try:
            pixels = np.empty(0, dtype=np.uint8)
            for chunk, part in done:
                if chunk.first == 0:
                    pixels = np.empty((len(chunk.batch), *part.shape[1:]), dtype=np.uint8)
                stop = chunk.first + len(chunk.rows)
                pixels[chunk.first : stop] = part
                if stop == len(chunk.batch):
                    whole = self._resident(pixels, chunk.batch)
                    yield whole.batch(np.arange(len(chunk.batch)), chunk.epoch)
        finally:
            done.close()

    def epochs(
        self, size: int, epochs: int | None = 1, *, start: tuple[int, int] = (0, 0), seed: int | None = None
    ) -> Generator[Batch, None, None]:
        """Shuffled batches of whole epochs (:func:`experiments.inputs.order.shuffled`).

        Args:
            size: images of a batch.
            epochs: how many in all; ``None`` for no end.
            start: epoch and step within it to go on from.
            seed: names the order; by default the draws' seed.
        """
        return self.loader(
            shuffled(len(self), size, seed=self.seed if seed is None else seed, epochs=epochs, start=start)
        )

    def take(self, rows: np.ndarray) -> Streamed:
        """The data of some rows only; a sample keeps its draws.

        Raises:
            MergeboundError: a row that is not there.
        """
        return replace(self, rows=self._chosen(rows))

    def evaluation(self) -> Streamed:
        """The same samples as they are evaluated: nothing random."""
        return replace(self, views=None, augmentation=PRESETS["none"])

    def _chosen(self, rows: np.ndarray) -> np.ndarray:
        asked = np.asarray(rows, dtype=np.int64)
        if asked.ndim != 1 or (len(asked) and (asked.min() < 0 or asked.max() >= len(self))):
            raise MergeboundError(
                f"rows: shape {asked.shape} with values {asked.min(initial=0)} to {asked.max(initial=0)}; give a row "
                f"of numbers in 0 .. {len(self) - 1}"
            )
        found: np.ndarray = self._rows[asked]
        return found

    def _chunks(self, order: Order) -> Iterator[_Chunk]:
        for rows, epoch in order:
            batch = self._chosen(rows)
            for first in range(0, max(1, len(batch)), CHUNK):
                yield _Chunk(batch[first : first + CHUNK], epoch, batch, first)

    def _resident(self, pixels: np.ndarray, rows: np.ndarray) -> Resident:
        """A batch's pixels as data in memory, which augments and normalises them."""
        return Resident(
            torch.from_numpy(pixels).to(self.device),
            torch.from_numpy(self._all_labels[rows]).to(self.device),
            self.source[rows],
            self.form,
            self.augmentation,
            self.seed,
            self.name,
            self.dtype,
            self.channels_last,
        )

    def _told(self, chunk: _Chunk, calls: list[ThreadReader] | list[WorkerProcess]) -> str:
        """The image that a worker is at, or the first of the chunk."""
        rows = {int(row) for row in chunk.rows}
        at = [call.reading for call in calls if isinstance(call, ThreadReader) and call.reading in rows]
        return self.images.place(at[0] if at else int(chunk.rows[0]))


class _Work:
    """A worker's call on a chunk."""

    def __init__(self, call: ThreadReader | WorkerProcess) -> None:
        self.call = call
        self.stop: Callable[[], None] = getattr(call, "stop", lambda: None)

    def __call__(self, chunk: _Chunk) -> tuple[_Chunk, np.ndarray]:
        return chunk, self.call(chunk.rows, chunk.epoch)


def _processes(reader: Reader, count: int, limit_s: float) -> list[WorkerProcess]:
    found: list[WorkerProcess] = []
    try:
        for _ in range(count):
            found.append(WorkerProcess(reader, CHUNK, limit_s))
    except BaseException:
        for worker in found:
            worker.stop()
        raise
    return found


def stream(
    images: Images,
    form: InputFormat,
    *,
    views: str | Views | None = None,
    augment: str | Augmentation | None = None,
    seed: int = 0,
    name: str = "",
    first_row: int = 0,
    workers: int = 2,
    kind: Kind = "threads",
    limit_s: float = WAIT_S,
    decode: Decode = "exact",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Streamed:
    """All of some images, left on disk.

    Args:
        images, form: the images, and what the network takes.
        views: random views of the full-size image, or the name of some
            (:data:`experiments.inputs.transforms.VIEWS`); default evaluation's view.
        augment: light augmentation of the view, or a preset's name; default nothing.
        first_row: added to the source rows, as in :func:`experiments.inputs.resident.load_resident`.
        seed, name, workers, kind, limit_s, decode, device, dtype, channels_last: see :class:`Streamed`.

    Raises:
        MergeboundError: a bad argument.
    """
    return Streamed(
        images,
        form,
        first_row + source_rows(images),
        views_by_name(views) if views is None or isinstance(views, str) else views,
        augmentation(augment),
        seed,
        name,
        workers,
        kind,
        limit_s=limit_s,
        decode=decode,
        device=device,
        dtype=dtype,
        channels_last=channels_last,
    )
