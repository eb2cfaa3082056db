"""From a row number to the pixels that the network will see: read, decode, view, in any thread or process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.inputs.fast import fit_fast
from experiments.inputs.transforms import Views, training_view, view_generator
from experiments.tasks.fit import fit
from experiments.tasks.form import InputFormat
from experiments.tasks.images import FileImages, Images, Subset, read_image
from theory.errors import MergeboundError

Decode = Literal["exact", "fast", "draft"]


@dataclass(frozen=True)
class Reader:
    """Makes one sample's view.  May be pickled if its images may.

    Attributes:
        images: what is read.
        form: what the network takes.
        views: what training views are drawn from; ``None`` for evaluation's view.
        seed, name: name the draws.
        source: (n,) the number that names each image's draws; by default its row.
        decode: ``exact`` (Pillow: timm's pixels), ``fast`` (resized by torchvision: half of the time, pixels within
            two grey levels: :mod:`experiments.inputs.fast`) or ``draft`` (Pillow's decoder shrinks JPEG photographs by
            2, 4 or 8 where they stay large enough: a few grey levels at edges).
    """

    images: Images
    form: InputFormat
    views: Views | None = None
    seed: int = 0
    name: str = ""
    source: np.ndarray | None = None
    decode: Decode = "exact"

    def __post_init__(self) -> None:
        if self.form.channels not in (1, 3):
            raise MergeboundError(f"channels = {self.form.channels}: image files have 1 or 3 channels")
        if self.decode not in ("exact", "fast", "draft"):
            raise MergeboundError(f"decode = {self.decode!r}: give 'exact', 'fast' or 'draft'")

    def view(self, row: int, epoch: int) -> np.ndarray:
        """Pixels of one sample in one epoch, uint8 (form.height, form.width, channels); channels is 1 for grey images.

        Raises:
            MergeboundError: the image cannot be read or has the wrong channels; names the file.
        """
        try:
            image = self._read(row)
            if image.shape[-1] > self.form.channels:
                raise MergeboundError(
                    f"{self.images.place(row)}: a colour image, but the network takes one channel; convert the images "
                    "to grey"
                )
            if self.views is None:
                return fit(image, self.form) if self.decode != "fast" else fit_fast(image, self.form)
            number = row if self.source is None else int(self.source[row])
            rng = view_generator(self.seed, epoch, number, self.name)
            return training_view(image, self.form, self.views, rng, fast=self.decode == "fast")
        except MergeboundError:
            raise
        except Exception as error:  # whatever a decoder throws at a damaged file
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise MergeboundError(
                f"{self.images.place(row)}: cannot be read ({reason}); remove or replace the file"
            ) from error

    def fill(self, rows: np.ndarray, epoch: int, pixels: np.ndarray, at: Callable[[int], None]) -> None:
        """Put views of some rows into ``pixels``, uint8 (m, stored, height, width); grey is repeated to fit.

        Args:
            at: told each row before it is read.
        """
        for index, row in enumerate(rows.tolist()):
            at(row)
            view = self.view(row, epoch)
            if view.shape[2] > pixels.shape[1]:
                raise MergeboundError(
                    f"{self.images.place(row)}: a colour image among grey ones; convert all images alike"
                )
            pixels[index] = view.transpose(2, 0, 1)

    def _read(self, row: int) -> np.ndarray:
        path, grey = _file(self.images, row) if self.decode == "draft" else (None, False)
        return self.images.read(row) if path is None else read_image(path, grey=grey, at_least=self._least())

    def _least(self) -> tuple[int, int]:
        """Height and width that a decoded photograph must have at least: those of the resized one before its crop,
        and for random crops those that leave the smallest crop as large as the target."""
        share = self.form.crop if self.views is None else self.views.scale[0] ** 0.5
        return int(np.ceil(self.form.height / share)), int(np.ceil(self.form.width / share))


def source_rows(images: Images) -> np.ndarray:
    """Row numbers of the underlying images, (n,) int64, through subsets of subsets."""
    rows = np.arange(len(images), dtype=np.int64)
    while isinstance(images, Subset):
        rows = np.asarray(images.rows, dtype=np.int64)[rows]
        images = images.whole
    return rows


def _file(images: Images, row: int) -> tuple[Path | None, bool]:
    if isinstance(images, Subset):
        return _file(images.whole, int(images.rows[row]))
    if isinstance(images, FileImages):
        return images.root / images.files[row], images.grey
    return None, False
