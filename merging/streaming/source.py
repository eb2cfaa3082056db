"""Chunks of tensors of many checkpoints, without copies where the file allows it.

A tensor that lies in one piece in a local file is mapped, and the pages of a chunk are brought in by
``madvise(MADV_POPULATE_READ)`` just before they are used: unlike touching them, that reports a disk's errors and a
file that was cut short.  Where the system does not have it (before Linux 5.14, other systems), chunks are read into
buffers.  Other tensors (legacy files, adapters, state dicts in memory) are fetched whole, once, and dropped after their
last chunk.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merging.errors import CheckpointError
from merging.lazy import LazyState, Region, specs
from merging.types import StateDict

if TYPE_CHECKING:
    from merging.remote_file import RangeReader, RemoteFile
    from merging.remote_requests import Requests

_POPULATE_READ = 22
_DONT_NEED = 4
_TOGETHER = 32 << 20  # bytes of mapped pages that are let go in one call
_AHEAD = 8 << 20  # bytes of each file that the system is told of in advance


class MappedFile:
    """A file for reading in pieces, as it was when it was opened.

    Raises:
        CheckpointError: it cannot be read, or is another file than the one whose header was read.
    """

    def __init__(self, path: Path, identity: tuple[int, int, int, int], *, mapped: bool = True) -> None:
        self.path = path
        self.identity = identity
        try:
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise _unreadable(path, error) from error
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()
        self._dropped = (0, 0)
        self._bytes: NDArray[np.uint8] | None = None
        self.address = 0
        try:
            self.check()
            if mapped and identity[2] > 0:
                self._try_to_map()
        except BaseException:
            self.close()
            raise

    @property
    def mapped(self) -> bool:
        """Whether chunks can be used where they are."""
        return self._map is not None

    def check(self) -> None:
        """Check that nobody wrote to the file or cut it short.

        Raises:
            CheckpointError: somebody did.
        """
        status = os.fstat(self.descriptor)
        if (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) != self.identity:
            raise CheckpointError(f"{self.path}: the file changed while it was in use: merge again")

    def populate(self, begin: int, end: int) -> int:
        """Bring bytes into memory; returns the address of the first.

        Raises:
            CheckpointError: the disk refuses, or the file was cut short.
        """
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(self, self.address + first, end - first, _POPULATE_READ)
        return self.address + begin

    def drop(self, begin: int, end: int) -> None:
        """Let go of mapped pages (the system keeps them while it has room), but for those that others may be using.

        Neighbouring pieces are let go together, some time later.
        """
        with self._lock:
            first, last = self._dropped
            if begin <= last and end >= first:
                first, last = min(first, begin), max(last, end)
                if last - first < _TOGETHER:
                    self._dropped = first, last
                    return
                self._dropped = last, last
            else:
                self._dropped = begin, end
        first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and last > first:
            with suppress(CheckpointError):
                _advise(self, self.address + first, last - first, _DONT_NEED)

    def read_into(self, buffer: NDArray[np.uint8], begin: int) -> None:
        """Read ``len(buffer)`` bytes from ``begin`` on.

        Raises:
            CheckpointError: the disk refuses, or the file was cut short.
        """
        view = buffer.data
        while view:
            try:
                count = os.preadv(self.descriptor, [view], begin)
            except OSError as error:
                raise _unreadable(self.path, error) from error
            if count == 0:
                raise CheckpointError(f"{self.path}: the file was cut short while it was in use: merge again")
            view, begin = view[count:], begin + count

    def announce(self, begin: int, end: int) -> None:
        """Tell the system that bytes will be needed soon."""
        if hasattr(os, "posix_fadvise") and end > begin:
            with suppress(OSError):
                os.posix_fadvise(self.descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Unmap and close; addresses are invalid from now on."""
        self._unmap()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _try_to_map(self) -> None:
        if sys.platform != "linux":
            return
        try:
            found = mmap.mmap(self.descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except (OSError, ValueError):
            return
        self._bytes = np.frombuffer(found, dtype=np.uint8)
        self._map, self.address = found, int(self._bytes.ctypes.data)
        if _madvise()(self.address, 1, _POPULATE_READ) != 0 and ctypes.get_errno() == errno.EINVAL:
            self._unmap()

    def _unmap(self) -> None:
        self._bytes = None
        if self._map is not None:
            self._map.close()
            self._map = None


@cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


def _advise(file: MappedFile, address: int, length: int, advice: int) -> None:
    call = _madvise()
    while call(address, length, advice) != 0:
        code = ctypes.get_errno()
        if code in (errno.EINTR, errno.EAGAIN):
            continue
        raise CheckpointError(
            f"{file.path}: cannot be read ({os.strerror(code)}): the file was cut short, or the disk has errors"
        )


@dataclass
class Buffers:
    """Memory of one thread, by purpose, made when first needed and kept."""

    held: dict[object, NDArray[np.uint8]] = field(default_factory=dict)
    used: dict[int, Tensor] = field(default_factory=dict)  # by checkpoint: what its last address points into

    def bytes(self, purpose: object, size: int) -> NDArray[np.uint8]:
        """At least ``size`` bytes, aligned for any type."""
        found = self.held.get(purpose)
        if found is None or found.size < size:
            self.held[purpose] = found = np.empty(size, dtype=np.uint8)
        return found[:size]

    def floats(self, purpose: object, count: int) -> NDArray[np.float32]:
        """``count`` float32 numbers."""
        return self.bytes(purpose, 4 * count).view(np.float32)

    def words(self, purpose: object, count: int) -> NDArray[np.uint32]:
        """``count`` 32-bit words."""
        return self.bytes(purpose, 4 * count).view(np.uint32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self.held.values())


@dataclass(frozen=True)
class Chunk:
    """Entries ``start`` to ``stop`` of one tensor of every checkpoint, as float32.

    Attributes:
        base: address of the base's entries (zeros where there is no base).
        experts: addresses of the experts' entries, shape ``(N,)``.
        size: number of entries.
    """

    base: int
    experts: NDArray[np.int64]
    size: int


class Inputs:
    """Checkpoints opened for reading in chunks; to be closed (or used in a ``with`` statement).

    Args:
        base: the base, or ``None`` (zeros).
        experts: the experts, in the order in which sums are taken.
        mapped: use files where they are, if the system can.

    Raises:
        CheckpointError: a file cannot be opened, or changed since its header was read.
    """

    def __init__(self, base: StateDict | None, experts: Sequence[StateDict], *, mapped: bool = True) -> None:
        self.base = base
        self.experts = tuple(experts)
        self._mapped = mapped
        self._files: dict[object, MappedFile | RangeReader] = {}
        self._requests: Requests | None = None
        self._whole: dict[tuple[int, str], Tensor] = {}
        self._lock = threading.Lock()
        self._announced: dict[tuple[int, str], int] = {}
        self._stopped = False

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._whole.clear()
        if self._requests is not None:
            self._requests.close()

    def stop(self) -> None:
        """Refuse every further chunk, so that threads at work end soon."""
        self._stopped = True
        if self._requests is not None:
            self._requests.stop.set()

    def chunk(self, name: str, start: int, stop: int, buffers: Buffers) -> Chunk:
        """Entries ``start`` to ``stop`` of a tensor; valid until the thread's next chunk.

        Raises:
            CheckpointError: they cannot be read.
        """
        if self.base is None:
            zeros = buffers.held.get("zeros")
            if zeros is None or zeros.size < 4 * (stop - start):
                buffers.held["zeros"] = zeros = np.zeros(4 * (stop - start), dtype=np.uint8)
            origin = int(zeros.ctypes.data)
        else:
            origin = self.address(0, name, start, stop, buffers)
        if self._requests is not None:
            self._ask(name, start, stop)
        addresses = [self.address(1 + i, name, start, stop, buffers) for i in range(len(self.experts))]
        return Chunk(origin, np.array(addresses, dtype=np.int64), stop - start)

    def pair(
        self, expert: int, name: str, start: int, stop: int, buffers: Buffers, *, ahead: bool = True
    ) -> tuple[int, int]:
        """Addresses of the base's and of one expert's entries, as :meth:`chunk`."""
        if self.base is None:
            zeros = buffers.held.get("zeros")
            if zeros is None or zeros.size < 4 * (stop - start):
                buffers.held["zeros"] = zeros = np.zeros(4 * (stop - start), dtype=np.uint8)
            origin = int(zeros.ctypes.data)
        else:
            origin = self.address(0, name, start, stop, buffers, ahead=ahead)
        return origin, self.address(1 + expert, name, start, stop, buffers, ahead=ahead)

    def announce(self, expert: int, name: str, start: int, stop: int) -> None:
        """Tell the system that entries of the base and of one expert will be needed."""
        for which in (0, 1 + expert) if self.base is not None else (1 + expert,):
            state = self._state(which)
            region = state.region(name) if isinstance(state, LazyState) else None
            if region is not None:
                width = specs(state)[name].dtype.itemsize
                self.file(region).announce(region.begin + width * start, region.begin + width * stop)

    def address(self, which: int, name: str, start: int, stop: int, buffers: Buffers, *, ahead: bool = True) -> int:
        """Address of entries of one checkpoint (0: the base, i + 1: expert i), as :meth:`chunk`."""
        if self._stopped:
            raise CheckpointError("the merge was given up")
        state = self._state(which)
        region = state.region(name) if isinstance(state, LazyState) else None
        spec = specs(state)[name]
        if region is None:
            flat = self._fetch(which, name)[start:stop]
            if flat.dtype == torch.float32:
                buffers.used[which] = flat  # another thread may release it meanwhile
                return int(flat.data_ptr())
            target = buffers.floats(which, stop - start)
            torch.from_numpy(target).copy_(flat)
            return int(target.ctypes.data)
        file = self.file(region)
        width = spec.dtype.itemsize
        begin, end = region.begin + width * start, region.begin + width * stop
        if ahead:
            self._announce(which, name, region, begin, end)
        if file.mapped and begin % width == 0:
            address = file.populate(begin, end) if end > begin else file.address + begin
            if spec.dtype == torch.float32:
                return address
            raw = np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(address))
        elif spec.dtype == torch.float32:
            target = buffers.floats(which, stop - start)
            file.read_into(target.view(np.uint8), begin)
            return int(target.ctypes.data)
        else:
            raw = buffers.bytes((which, "raw"), end - begin)
            file.read_into(raw, begin)
        target = buffers.floats(which, stop - start)
        if raw.size:
            torch.from_numpy(target).copy_(torch.from_numpy(raw).view(spec.dtype))
        return int(target.ctypes.data)

    def file(self, region: Region) -> MappedFile | RangeReader:
        """The open file of a region, or the reader of a remote one."""
        with self._lock:
            found = self._files.get(region.source)
            if found is None:
                if region.remote is None:
                    found = MappedFile(region.path, region.identity, mapped=self._mapped)
                else:
                    found = self._reader(region.remote)
                self._files[region.source] = found
            return found

    def confirm(self) -> None:
        """Check, after the last chunk, that no remote file changed (others are checked when tensors are released).

        Raises:
            CheckpointError: one did.
        """
        with self._lock:
            files = list(self._files.values())
        for file in files:
            if not isinstance(file, MappedFile):
                file.confirm()

    def release(self, name: str, experts: Sequence[int] | None = None) -> None:
        """Say that a tensor is not needed any more: of some experts, or (default) of all and the base.

        Files that changed under it are noticed here at the latest.

        Raises:
            CheckpointError: a file changed while it was in use.
        """
        everything = range(0 if self.base is not None else 1, 1 + len(self.experts))
        for which in everything if experts is None else [1 + expert for expert in experts]:
            state = self._state(which)
            region = state.region(name) if isinstance(state, LazyState) else None
            if region is not None:
                file = self.file(region)
                file.check()
                file.drop(region.begin, region.end)
            with self._lock:
                self._whole.pop((which, name), None)
                self._whole.pop((0, name), None)  # if others still need the base's, they fetch it anew
                self._announced.pop((which, name), None)

    def forget(self, name: str, expert: int) -> None:
        """Drop a tensor of the base and of one expert that were fetched whole; they are fetched anew if needed."""
        with self._lock:
            self._whole.pop((0, name), None)
            self._whole.pop((1 + expert, name), None)

    def _reader(self, remote: RemoteFile) -> RangeReader:
        from merging.remote_file import RangeReader
        from merging.remote_requests import Requests

        if self._requests is None:
            self._requests = Requests(remote.limits)
        return RangeReader(remote, self._requests)

    def _ask(self, name: str, start: int, stop: int) -> None:
        """Ask for the entries of all experts that are behind URLs before waiting for the first."""
        for which in range(1, 1 + len(self.experts)):
            state = self._state(which)
            region = state.region(name) if isinstance(state, LazyState) else None
            if region is not None and region.remote is not None:
                width = specs(state)[name].dtype.itemsize
                self._announce(which, name, region, region.begin + width * start, region.begin + width * stop)

    def _state(self, which: int) -> StateDict:
        if which > 0:
            return self.experts[which - 1]
        assert self.base is not None
        return self.base

    def _fetch(self, which: int, name: str) -> Tensor:
        with self._lock:
            found = self._whole.get((which, name))
            if found is None:
                tensor = self._state(which)[name].detach()
                kept = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
                found = (tensor if kept else tensor.to(torch.float32)).cpu().contiguous().reshape(-1)
                self._whole[which, name] = found
            return found

    def _announce(self, which: int, name: str, region: Region, begin: int, end: int) -> None:
        """Keep the system some way ahead of the reader."""
        known = self._announced.get((which, name), region.begin)
        if end + _AHEAD // 2 <= known or known >= region.end:
            return
        start = max(known, begin)
        stop = min(region.end, end + _AHEAD)
        self._announced[which, name] = stop
        self.file(region).announce(start, stop)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read ({error.strerror}): check the path, permissions and the disk")
