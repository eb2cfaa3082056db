"""Labelled images that are read one by one, from memory or from disk, and nothing is read before it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from theory.errors import MergeboundError


class Images(Protocol):
    """n labelled images.  What reads them may be pickled and used from several workers."""

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, (n,) int64."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what identifies the images and their labels (64 hexadecimal digits): pixels of arrays in memory;
        relative names and sizes of files."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> np.ndarray:
        """One image as uint8, (height, width, channels) with 1 or 3 channels.

        Raises:
            MergeboundError: it cannot be read; names the file.
        """

    def place(self, row: int) -> str:
        """Where an image comes from (file, or file and row), for messages."""


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory (or in a mapped file).

    Attributes:
        array: uint8, (n, height, width, channels), 1 or 3 channels.
        labels: (n,) int64.
        origin: the file that the array comes from.
        shared: (n,) int64 numbers of the images in a source that other data sets have too, or ``None``; images of equal
            numbers are drawn together where tasks are evaluated jointly.
    """

    array: np.ndarray
    labels: np.ndarray
    origin: str = "an array"
    shared: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[-1] not in (1, 3):
            raise MergeboundError(
                f"{self.origin}: images are {self.array.dtype} of shape {self.array.shape}; give uint8 of shape "
                "(n, height, width, 1) or (n, height, width, 3)"
            )
        if self.labels.dtype != np.int64 or self.labels.shape != self.array.shape[:1]:
            raise MergeboundError(
                f"{self.origin}: labels are {self.labels.dtype} of shape {self.labels.shape} for {len(self.array)} "
                "images; give int64, one per image"
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of shape, pixels and labels."""
        digest = hashlib.sha256(repr(self.array.shape).encode())
        for start in range(0, len(self.array), 4096):
            digest.update(np.ascontiguousarray(self.array[start : start + 4096]).tobytes())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[Callable[..., ArrayImages], tuple[object, ...]]:
        """Pixels in a mapped file are pickled as their place in the file."""
        place = _mapped(self.array)
        if place is None:
            return ArrayImages, (self.array, self.labels, self.origin, self.shared)
        return _from_mapped, (*place, self.labels, self.origin, self.shared)

    def read(self, row: int) -> np.ndarray:
        """One image."""
        image: np.ndarray = self.array[row]
        return image

    def place(self, row: int) -> str:
        """Origin and row."""
        return f"{self.origin}, image {row}"


def _mapped(array: np.ndarray) -> tuple[str, int, int, tuple[int, ...], tuple[int, ...]] | None:
    """File, its size, first byte, shape and strides of an array that lies in a file mapped for reading; else None."""
    whole: object = array
    while isinstance(whole, np.ndarray) and isinstance(whole.base, np.ndarray):
        whole = whole.base
    if not isinstance(whole, np.memmap) or whole.mode != "r" or whole.filename is None or not array.size:
        return None
    start = whole.offset + array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    return str(Path(whole.filename).resolve()), whole.offset + whole.nbytes, start, array.shape, array.strides


def _from_mapped(
    file: str,
    size: int,
    start: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    labels: np.ndarray,
    origin: str,
    shared: np.ndarray | None,
) -> ArrayImages:
    try:
        pixels = np.memmap(file, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise MergeboundError(
            f"{file}: cannot be mapped again ({error}); leave it in place while it is used"
        ) from error
    if len(pixels) < size:
        raise MergeboundError(f"{file}: shorter than when it was opened; leave it as it is while it is used")
    array: np.ndarray = np.ndarray(shape, np.uint8, pixels, start, strides)
    return ArrayImages(array, labels, origin, shared)


@dataclass(frozen=True)
class FileImages:
    """One file per image.

    Attributes:
        root: folder that the files lie in.
        files: names relative to ``root``, with ``/``.
        labels: (n,) int64.
        grey: whether images are grey (one channel); otherwise RGB.
    """

    root: Path
    files: tuple[str, ...]
    labels: np.ndarray
    grey: bool = False

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes in bytes and labels, and of whether the images are read as grey ones."""
        digest = hashlib.sha256(b"grey\n" if self.grey else b"")
        for name, label in zip(self.files, self.labels.tolist(), strict=True):
            path = self.root / name
            size = path.stat().st_size if path.is_file() else -1
            digest.update(f"{name}\0{size}\0{label}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, row: int) -> np.ndarray:
        """Decode one file."""
        return read_image(self.root / self.files[row], grey=self.grey)

    def place(self, row: int) -> str:
        """The file."""
        return str(self.root / self.files[row])


@dataclass(frozen=True)
class ReadImages:
    """Images behind a function, such as an archive that holds many.

    Attributes:
        reader: image of a row, uint8 (height, width, channels); errors are reported with the row's place.
        labels: (n,) int64.
        origin: the file that they come from.
        identity: the fingerprint, computed by whoever knows the file.
    """

    reader: Callable[[int], np.ndarray]
    labels: np.ndarray
    origin: str
    identity: str

    @property
    def fingerprint(self) -> str:
        """What was given as ``identity``."""
        return self.identity

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, row: int) -> np.ndarray:
        """One image through the function."""
        try:
            return self.reader(row)
        except MergeboundError:
            raise
        except (OSError, ValueError, KeyError, IndexError, EOFError, SyntaxError) as error:
            reason = " ".join(str(error).split())
            raise MergeboundError(f"{self.place(row)}: cannot be read ({reason}); get the data set again") from error

    def place(self, row: int) -> str:
        """Origin and row."""
        return f"{self.origin}, image {row}"


@dataclass(frozen=True)
class Subset:
    """Some rows of other images, in the order given.

    Attributes:
        whole: the images.
        rows: (m,) int64, row numbers of ``whole``.
    """

    whole: Images
    rows: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Labels of the rows, (m,)."""
        found: np.ndarray = self.whole.labels[self.rows]
        return found

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the whole's fingerprint and the rows."""
        digest = hashlib.sha256(self.whole.fingerprint.encode())
        digest.update(np.ascontiguousarray(self.rows, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> np.ndarray:
        """The image of ``rows[row]``."""
        return self.whole.read(int(self.rows[row]))

    def place(self, row: int) -> str:
        """Where ``rows[row]`` comes from."""
        return self.whole.place(int(self.rows[row]))


def shared_rows(images: Images) -> np.ndarray | None:
    """Numbers of the images in a source that others have too, (n,), or ``None``: :attr:`ArrayImages.shared`."""
    if isinstance(images, Subset):
        whole = shared_rows(images.whole)
        return None if whole is None else whole[images.rows]
    return images.shared if isinstance(images, ArrayImages) else None


def read_image(path: Path, *, grey: bool = False, at_least: tuple[int, int] | None = None) -> np.ndarray:
    """Decode one image file as uint8, (height, width, 1) or (height, width, 3).

    Transparent pixels are put on black, as Pillow's ``convert`` does; 16-bit images are refused.  A JPEG file may be
    shrunk by 2, 4 or 8 while it is decoded if height and width stay ``at_least`` this large.

    Raises:
        MergeboundError: missing, not an image, cut short, or more than 8 bits a channel; names the file.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                raise MergeboundError(f"{path}: more than 8 bits per channel ({opened.mode}); convert it to 8 bits")
            if at_least is not None:
                opened.draft(None, (at_least[1], at_least[0]))
            array = np.asarray(opened.convert("L" if grey else "RGB"))
    except MergeboundError:
        raise
    except FileNotFoundError as error:
        raise MergeboundError(f"{path}: there is no such file; the data set is incomplete, get it again") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).replace(str(path), path.name).split())
        raise MergeboundError(f"{path}: not a readable image ({reason}); remove or replace the file") from error
    return array[..., None] if array.ndim == 2 else array


def check_labels_of(images: Images, classes: int, origin: str) -> None:
    """Check that labels lie in 0 .. classes - 1.

    Raises:
        MergeboundError: names the first image whose label does not.
    """
    bad = np.flatnonzero((images.labels < 0) | (images.labels >= classes))
    if len(bad):
        row = int(bad[0])
        raise MergeboundError(
            f"{origin}: {images.place(row)} has label {int(images.labels[row])}, but there are {classes} classes "
            "numbered from 0; the labels are damaged or the class names incomplete"
        )


def class_counts(labels: np.ndarray, class_names: Sequence[str]) -> dict[str, int]:
    """Images per class, by name."""
    counts = np.bincount(labels, minlength=len(class_names))
    return {name: int(count) for name, count in zip(class_names, counts, strict=True)}
