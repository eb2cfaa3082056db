"""Resized images kept on disk: decoded once, mapped into memory afterwards.

A cache file is a plain ``.npy`` array, uint8 (n, stored, height, width), of the views that evaluation uses; stored is 1
where the images are grey.  Its name
is a digest of the images' fingerprint and of what shaped the pixels, so that other images or another size never meet
an old file.  It is written under a temporary name, flushed to disk and renamed: a run that is stopped leaves no cache,
and its remains are removed a day later.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from experiments.inputs.prefetch import WAIT_S, ordered
from experiments.inputs.processes import ThreadReader
from experiments.inputs.reader import Decode, Reader
from experiments.tasks.form import InputFormat
from experiments.tasks.images import Images
from theory.errors import MergeboundError

_log = logging.getLogger(__name__)

_VERSION = 1
"""Counts changes of :func:`experiments.inputs.transforms.evaluation_view` that change pixels."""
_CHUNK = 16
_STALE_S = 86400.0
_SPARE = 64 << 20


def cache_file(images: Images, form: InputFormat, folder: Path, *, decode: Decode = "exact") -> Path:
    """Where the cache of some images lies or would lie."""
    shape = (_VERSION, form.channels, form.height, form.width, form.interpolation, form.crop, decode, len(images))
    key = hashlib.sha256(f"{images.fingerprint}\n{shape!r}".encode()).hexdigest()
    return Path(folder) / f"{key[:32]}.npy"


def open_cache(images: Images, form: InputFormat, folder: Path, *, decode: Decode = "exact") -> np.ndarray | None:
    """The cached pixels, uint8 (n, stored, height, width), mapped copy-on-write; ``None`` if there are none.

    A file that is not what its name says (cut short, overwritten) is removed with a warning.
    """
    path = cache_file(images, form, folder, decode=decode)
    shapes = [(len(images), stored, form.height, form.width) for stored in (1, form.channels)]
    try:
        mapped: np.ndarray = np.load(path, mmap_mode="c", allow_pickle=False)
        if mapped.shape not in shapes or mapped.dtype != np.uint8 or not mapped.flags.c_contiguous:
            raise ValueError(f"{mapped.dtype} of shape {mapped.shape} instead of uint8 {shapes[-1]}")
    except OSError:  # not there, or not readable: writing it will tell
        return None
    except (ValueError, EOFError) as error:
        _log.warning("%s: damaged cache (%s); it is made again", path, " ".join(str(error).split()))
        path.unlink(missing_ok=True)
        return None
    return mapped


def cached(
    images: Images,
    form: InputFormat,
    folder: Path,
    *,
    workers: int = 2,
    limit_s: float = WAIT_S,
    decode: Decode = "exact",
) -> np.ndarray:
    """The resized pixels of some images, from the cache in ``folder``, which is made if it is not there.

    Args:
        images: the source; read only where there is no cache.
        form: size, interpolation and crop.
        folder: where caches lie; made if needed.
        workers: threads that decode.
        limit_s: seconds that any wait may take.
        decode: see :class:`experiments.inputs.reader.Reader`.

    Returns:
        uint8, (n, stored, height, width), mapped copy-on-write: writing to it changes no file.

    Raises:
        MergeboundError: an image cannot be read (names it), or the folder cannot be written or has too little room.
    """
    found = open_cache(images, form, folder, decode=decode)
    if found is not None:
        return found
    path = cache_file(images, form, folder, decode=decode)
    stored = min(int(images.read(0).shape[2]), form.channels) if len(images) else form.channels
    needed = len(images) * stored * form.height * form.width
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        free = shutil.disk_usage(path.parent).free
        if free < needed + _SPARE:
            raise MergeboundError(
                f"{path.parent}: {needed / 1e9:.2f} GB are needed for resized images, {free / 1e9:.2f} GB are free; "
                "choose another folder or stream without a cache"
            )
        _log.info("%s: caching %d resized images (%.2f GB)", path, len(images), needed / 1e9)
        with open(temporary, "xb") as handle:
            _write(handle, Reader(images, form, decode=decode), stored, workers, limit_s)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise MergeboundError(
            f"{path.parent}: resized images cannot be cached ({error.strerror or error}); choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    found = open_cache(images, form, folder, decode=decode)
    if found is None:
        raise MergeboundError(f"{path}: the cache vanished while it was made; keep others from cleaning its folder")
    return found


def _write(handle: BinaryIO, reader: Reader, stored: int, workers: int, limit_s: float) -> None:
    count, form = len(reader.images), reader.form
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, stored, form.height, form.width)}
    np.lib.format.write_array_header_1_0(handle, header)
    calls = [ThreadReader(reader, stored) for _ in range(max(1, workers))]

    def told(rows: np.ndarray) -> str:
        at = [call.reading for call in calls if call.reading in rows]
        return reader.images.place(int(at[0] if at else rows[0]))

    works = [_OfRows(call) for call in calls]
    chunks = (np.arange(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK))
    for pixels in ordered(works, chunks, ahead=2 * len(calls), limit_s=limit_s, told=told):
        handle.write(pixels.data)


class _OfRows:
    """A reader's call on rows alone: evaluation's views are the same in every epoch."""

    def __init__(self, call: ThreadReader) -> None:
        self.call = call

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return self.call(rows, 0)


def _sweep(folder: Path) -> None:
    """Remove what stopped runs left a day ago or earlier."""
    for left in folder.glob(".*.part"):
        try:
            if time.time() - left.stat().st_mtime > _STALE_S:
                left.unlink()
        except OSError:
            continue


def _sync(folder: Path) -> None:
    """Make a rename last, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)
