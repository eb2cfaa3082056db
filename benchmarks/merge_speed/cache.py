"""The page cache: evict files, read them in, and say how much of them is resident (Linux)."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from os import PathLike

_BLOCK = 1 << 22


def evict(files: Iterable[str | PathLike[str]]) -> None:
    """Flush files to the disk and drop them from the page cache, as far as nobody else has them mapped."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def warm(files: Iterable[str | PathLike[str]]) -> None:
    """Read files once."""
    buffer = bytearray(_BLOCK)
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def resident(files: Iterable[str | PathLike[str]]) -> float:
    """The share of the pages of files that is in the page cache, by ``mincore(2)``; NaN where it cannot be asked."""
    library = ctypes.CDLL(None, use_errno=True)
    inside = total = 0
    for file in files:
        size = os.path.getsize(file)
        if size == 0:
            continue
        descriptor = os.open(file, os.O_RDONLY)
        try:
            # private and writable, so that ctypes may take its address; nothing is written and no page is touched
            with mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
                pages = -(-size // mmap.PAGESIZE)
                vector = (ctypes.c_ubyte * pages)()
                view = (ctypes.c_char * size).from_buffer(mapped)
                failed = library.mincore(
                    ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), ctypes.byref(vector)
                )
                del view
        finally:
            os.close(descriptor)
        if failed:
            return float("nan")
        inside += sum(byte & 1 for byte in bytes(vector))
        total += pages
    return inside / total if total else float("nan")
