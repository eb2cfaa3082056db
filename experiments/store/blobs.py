"""Content-addressed files: ``blobs/ab/cdef....safetensors`` is named by the SHA-256 of its bytes.

A blob is written under a temporary name, flushed to the disk, and renamed; whoever finds a blob's name finds all of it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from experiments.store.errors import StoreError

_LOG = logging.getLogger(__name__)
FOLDER = "blobs"
SUFFIX = ".safetensors"
TEMPORARY = ".tmp-"
_BLOCK = 1 << 22
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_folders(folder: Path) -> None:
    """Make the folders of all blobs, so that a commit need not wait for one.

    Raises:
        OSError: the disk refuses.
    """
    for number in range(256):
        (folder / FOLDER / f"{number:02x}").mkdir(parents=True, exist_ok=True)
    sync_folder(folder / FOLDER)


def blob_hash(data: bytes) -> str:
    """The name of some bytes: 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def blob_path(folder: Path, name: str) -> Path:
    """Where a blob lies in a store's folder."""
    return folder / FOLDER / name[:2] / f"{name[2:]}{SUFFIX}"


def put_blob(folder: Path, data: bytes, *, durable: bool = True) -> str:
    """Write a blob unless it is there; returns its name.

    Args:
        folder: of the store.
        data: the bytes.
        durable: wait until file and name are on the disk (without it, a power cut may leave a damaged blob, which
            ``verify`` finds; a killed process never does).

    Raises:
        StoreError: the disk is full or refuses; no part of the blob is left.
    """
    name = blob_hash(data)
    target = blob_path(folder, name)
    if _renewed(target, data):
        return name
    temporary = target.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        for attempt in (0, 1):
            _make_folder(target.parent, durable)
            with open(temporary, "xb") as handle:
                handle.write(data)
                if durable:
                    handle.flush()
                    os.fsync(handle.fileno())
            try:
                os.replace(temporary, target)
                break
            except FileNotFoundError:  # a clock that jumps may let gc of another machine take a fresh file
                if attempt:
                    raise
        if durable:
            sync_folder(target.parent)
    except OSError as error:
        remove(temporary)
        raise disk_error(error, target) from error
    except BaseException:
        remove(temporary)
        raise
    return name


def has_blob(folder: Path, name: str) -> bool:
    """Whether a blob's file is there."""
    return blob_path(folder, name).is_file()


def check_blob(folder: Path, name: str) -> str | None:
    """What is wrong with a blob, in words that name the file; ``None`` if its bytes are those of its name."""
    path = blob_path(folder, name)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as handle:
            while block := handle.read(_BLOCK):
                digest.update(block)
    except FileNotFoundError:
        return f"{path}: is missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if digest.hexdigest() != name:
        return f"{path}: is damaged ({path.stat().st_size} bytes, whose SHA-256 is not the name)"
    return None


def files(folder: Path) -> Iterator[Path]:
    """Every file below ``blobs``, in order of names."""
    for part in sorted((folder / FOLDER).glob("*")):
        if part.is_dir():
            yield from sorted(path for path in part.iterdir() if path.is_file())
        elif part.is_file():
            yield part


def name_of(path: Path) -> str | None:
    """The blob that a file below ``blobs`` is; ``None`` for temporaries and strangers."""
    name = path.parent.name + path.name.removesuffix(SUFFIX)
    whole = path.name.endswith(SUFFIX) and len(name) == 64 and set(name) <= set("0123456789abcdef")
    return name if whole else None


def remove(path: Path) -> None:
    """Delete a file if it is there."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _LOG.warning("%s: cannot be removed (%s)", path, error.strerror)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk (where the system can)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES):
            raise
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path) -> StoreError:
    """An error of the disk in words, with the remedy."""
    if error.errno in _FULL:
        return StoreError(f"{path}: the disk is full; free space and run the command again, nothing was half-written")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StoreError(f"{path}: may not be written; change the rights of the store's folder, or use another one")
    return StoreError(
        f"{path}: the disk refuses ({error.strerror or error}); run the command again when it is in order"
    )


def _renewed(target: Path, data: bytes) -> bool:
    """Whether a blob is there, whole; if so it is made young, so that ``gc`` takes it for one that is about to be used.

    A damaged file under its name is not: it is written again.
    """
    try:
        if target.stat().st_size != len(data) or target.read_bytes() != data:
            return False
        now = time.time()
        os.utime(target, (now, now))
    except OSError:
        return False
    return True


def _make_folder(folder: Path, durable: bool) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        if durable:
            sync_folder(folder.parent)
