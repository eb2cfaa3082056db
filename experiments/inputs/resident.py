"""From images that are read one by one to images in memory: counted before they are read, and fitted to the network."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np
import torch

from experiments.inputs.augment import Augmentation, augmentation
from experiments.inputs.memory import available_bytes
from experiments.inputs.prefetch import ordered
from experiments.inputs.reader import source_rows
from experiments.inputs.resident_data import Resident
from experiments.tasks.dataset import ImageTask
from experiments.tasks.fit import fit, scaled_size
from experiments.tasks.form import InputFormat
from experiments.tasks.images import ArrayImages, Images, Subset
from theory.errors import MergeboundError

__all__ = ["Resident", "load_resident", "residents"]

SHARE_OF_MEMORY = 0.75
"""At most this share of the memory that is available is taken, unless a limit is given."""

WAIT_S = 600.0
"""Seconds that a thread may take to read 256 images."""

_CHUNK = 256
_log = logging.getLogger(__name__)


def load_resident(
    images: Images,
    form: InputFormat,
    *,
    seed: int = 0,
    augment: str | Augmentation | None = None,
    device: str | torch.device = "cpu",
    threads: int = 1,
    limit_bytes: int | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    name: str = "",
    first_row: int = 0,
) -> Resident:
    """Read all images once, scaled and cut as timm evaluates (:func:`experiments.tasks.fit.fit`).

    Args:
        images: the images.
        form: what the network takes.
        seed, name: name the augmentation's draws.
        augment: a preset's name, or what may happen to training images; default nothing.
        device: where the pixels stay.
        threads: that decode and resize.
        limit_bytes: how large the pixels may be; default three quarters of the memory that is available.
        dtype, channels_last: of batches.
        first_row: added to the source rows, so that parts that come from different sources differ.

    Raises:
        MergeboundError: an image cannot be read (named), colour images for a network that takes grey ones, images that
            do not fit in memory, or a bad argument.
    """
    spec = augmentation(augment)
    if threads < 1:
        raise MergeboundError(f"threads = {threads}: give 1 or more")
    if not len(images):
        raise MergeboundError("there are no images to load; check the data set and its split")
    place = _device(device)
    stored = _stored_channels(images, form)
    needed = len(images) * stored * form.height * form.width
    for where in {torch.device("cpu"), place}:
        _check_memory(needed, limit_bytes, where, images)
    pixels = np.empty((len(images), stored, form.height, form.width), dtype=np.uint8)
    _fill(pixels, images, form, threads)
    source = first_row + source_rows(images)
    if source.max() >= 2**32:
        raise MergeboundError(f"source rows go up to {source.max()}; they must stay below 2^32, lower first_row")
    store, labels = torch.from_numpy(pixels).to(place), torch.from_numpy(images.labels.astype(np.int64)).to(place)
    return Resident(store, labels, source, form, spec, seed, name, dtype, channels_last)


def residents(
    task: ImageTask,
    form: InputFormat,
    *,
    seed: int = 0,
    augment: str | Augmentation | None = None,
    device: str | torch.device = "cpu",
    threads: int = 1,
    limit_bytes: int | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    first_row: int = 0,
) -> tuple[Resident, Resident, Resident]:
    """Training, validation and test images of a task, in memory; only training images are augmented.

    Parts of one source keep its row numbers, and each further source is counted on from the one before, so that no two
    images of the task share a number.  The task's name names the draws.

    Args:
        limit_bytes: for each part.

    Raises:
        MergeboundError: as :func:`load_resident`.
    """
    first: dict[int, int] = {}
    found = []
    for number, part in enumerate((task.train, task.validation, task.test)):
        whole = _whole(part)
        if id(whole) not in first:
            first[id(whole)] = first_row
            first_row += len(whole)
        one = load_resident(
            part,
            form,
            seed=seed,
            augment=augment if number == 0 else None,
            device=device,
            threads=threads,
            limit_bytes=limit_bytes,
            dtype=dtype,
            channels_last=channels_last,
            name=task.name,
            first_row=first[id(whole)],
        )
        found.append(one)
    return found[0], found[1], found[2]


# --- reading ---------------------------------------------------------------------------------------------------------


def _stored_channels(images: Images, form: InputFormat) -> int:
    stored = int(images.read(0).shape[2])
    if stored not in (1, form.channels):
        raise MergeboundError(
            f"{images.place(0)}: {stored} channels, but the network takes {form.channels}; read the images as grey "
            "(grey=True) or build the network for colour"
        )
    return stored


def _fill(pixels: np.ndarray, images: Images, form: InputFormat, threads: int) -> None:
    array, rows = _array(images)
    size = (form.height, form.width)
    if array is not None and array.shape[1:3] == size and scaled_size(*size, form) != size:
        _log.warning(
            "%s: the images have the network's size, but are scaled and cut because form.crop is %g; give crop 1 to "
            "take them as they are",
            images.place(0),
            form.crop,
        )
    elif array is not None and array.shape[1:3] == size:
        for start in range(0, len(pixels), 4096):
            pixels[start : start + 4096] = array[rows[start : start + 4096]].transpose(0, 3, 1, 2)
        return

    def read(start: int) -> None:
        for row in range(start, min(start + _CHUNK, len(pixels))):
            image = images.read(row)
            if image.ndim != 3 or image.shape[2] != pixels.shape[1] or image.dtype != np.uint8:
                raise MergeboundError(
                    f"{images.place(row)}: {image.dtype} of shape {image.shape}, but the first image has "
                    f"{pixels.shape[1]} channel(s) of uint8; convert all images alike"
                )
            pixels[row] = fit(image, form).transpose(2, 0, 1)

    _run(read, range(0, len(pixels), _CHUNK), threads, images)


def _run(read: Callable[[int], None], starts: Iterable[int], threads: int, images: Images) -> None:
    if threads == 1:
        for start in starts:
            read(start)
        return

    def told(start: int) -> str:
        return f"{images.place(start)} and the images up to {_CHUNK} after it"

    for _ in ordered([read] * threads, starts, ahead=2 * threads, limit_s=WAIT_S, told=told):
        pass


def _whole(images: Images) -> Images:
    while isinstance(images, Subset):
        images = images.whole
    return images


def _array(images: Images) -> tuple[np.ndarray | None, np.ndarray]:
    whole = _whole(images)
    return (whole.array if isinstance(whole, ArrayImages) else None), source_rows(images)


# --- memory ----------------------------------------------------------------------------------------------------------


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).partition("\n")[0].split())
        raise MergeboundError(f"device = {str(device)!r} cannot be used ({reason}); use 'cpu'") from error
    return place


def _check_memory(needed: int, limit: int | None, device: torch.device, images: Images) -> None:
    if limit is None:
        room = available_bytes(device)
        allowed = None if room is None else int(SHARE_OF_MEMORY * room)
    else:
        allowed = limit
    if allowed is not None and needed > allowed:
        raise MergeboundError(
            f"{images.place(0)} and {len(images) - 1} more images need {needed} bytes ({needed / 2**30:.2f} GiB) on "
            f"{device}, more than the {allowed} bytes allowed; use streamed inputs, smaller images or a larger limit"
        )
