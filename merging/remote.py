"""Read safetensors behind URLs (``s3://``, ``gs://``, ``hf://``, ``https://``, ``memory://``, ...) by ranges.

Any file system of fsspec (https://filesystem-spec.readthedocs.io) will do; fsspec is optional and imported only when a
URL is used.  Pickles are never read from elsewhere.  Every request is repeated for a while when it fails and has a time
limit, and an object that changes while it is read is an error.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merging.errors import CheckpointError
from merging.folder import LEGACY_INDEX, SAFETENSORS_INDEX, choose_weights, is_companion, read_index
from merging.lazy import sample_window
from merging.legacy import LEGACY_SUFFIXES
from merging.remote_path import beside, last_name, shown, within
from merging.remote_requests import Answered, Limits, Requests, is_missing, persistently
from merging.safetensors_file import Identity, SafetensorsFile, parse_safetensors, typed

T = TypeVar("T")

INSTALL = "pip install 'mergebound[remote]'"
BLOCK = 1 << 21
"""Bytes of one request of a streamed merge."""

_KEPT = 6  # blocks of a file that are held at the same time
_AHEAD = 2  # blocks that are asked for before they are needed, where a file is read from front to back
_HEAD = 1 << 16  # bytes that are fetched to begin with: most headers fit
_PIECE = 1 << 23  # bytes of one request when a tensor is read as a whole
_SMALL = 64 << 20  # companions and indices are not larger than this
_CHECKED = 30.0  # seconds between two looks at whether an object changed, during a merge
_MARKS: tuple[str, ...] = (
    *("ETag", "etag", "e_tag", "md5Hash", "md5", "crc32c", "Content-MD5", "Digest", "generation", "VersionId"),
    *("version_id", "sha256", "blob_id", "mtime", "LastModified", "Last-Modified", "last_modified", "updated"),
    *("created", "ino", "commit"),
)
_WEB = ("http", "https")


@dataclass(frozen=True)
class Place:
    """A file system of fsspec and a path in it.

    Attributes:
        shown: the URL without credentials.
        protocols: names of the file system.
    """

    fs: Any = field(repr=False)
    path: str = field(repr=False)
    url: str = field(repr=False)
    shown: str
    protocols: tuple[str, ...]

    @property
    def web(self) -> bool:
        """Whether this is a plain web address, which has no folders."""
        return any(name in _WEB for name in self.protocols)

    def at(self, url: str) -> Place:
        """The same file system at another URL."""
        return Place(self.fs, self.fs._strip_protocol(url), url, shown(url), self.protocols)


def connect(url: str) -> Place:
    """The file system of a URL; nothing is asked of it yet.

    Raises:
        CheckpointError: fsspec or the package for this scheme is not installed, or the scheme is unknown.
    """
    safe = shown(url)
    if "::" in url:
        raise CheckpointError(f"{safe.partition('::')[0]}: chained URLs are not read: name the object itself")
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise CheckpointError(f"{safe}: URLs need the package fsspec, which is not installed: {INSTALL}") from None
    scheme = url.partition(":")[0]
    try:
        fs, path = url_to_fs(url)
    except ImportError as error:
        needed = getattr(error, "name", None) or "see the documentation of fsspec"
        raise CheckpointError(
            f"{safe}: {scheme}:// needs another package, which is not installed ({needed}): {INSTALL}, and the one "
            "for this scheme (s3fs, gcsfs, huggingface_hub, ...)"
        ) from None
    except ValueError:
        raise CheckpointError(f"{safe}: '{scheme}://' is not a known kind of address: check it") from None
    except Exception as error:  # credentials that are missing or malformed, as the clients see it
        raise CheckpointError(
            f"{safe}: the client for {scheme}:// cannot be set up ({type(error).__name__}): check credentials and "
            "settings"
        ) from None
    names = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
    return Place(fs, path, url, safe, names)


@dataclass(frozen=True)
class RemoteFile:
    """An object as it was when it was opened.

    Attributes:
        place: where it is.
        size: in bytes.
        marks: what changes when it changes: its entity tag, checksum, version or time, as far as they are known.
        limits: of its requests.
    """

    place: Place
    size: int
    marks: tuple[tuple[str, str], ...]
    limits: Limits

    @property
    def shown(self) -> str:
        """Its URL without credentials."""
        return self.place.shown

    @property
    def identity(self) -> Identity:
        """The same in four numbers, as :class:`merging.lazy.Region` has them."""
        digest = sha256(repr((self.shown, self.size, self.marks)).encode()).digest()
        return (-1, int.from_bytes(digest[:7], "big"), self.size, int.from_bytes(digest[7:14], "big"))

    @property
    def held(self) -> int:
        """Bytes that a :class:`RangeReader` holds at most: its blocks, and as many answers on their way."""
        return min(self.size, 2 * _KEPT * BLOCK)

    def read(self, begin: int, end: int, stop: threading.Event | None = None) -> bytes:
        """Bytes ``begin`` to ``end``, in one request.

        Raises:
            CheckpointError: no complete answer within the limits.
        """
        if begin == end:
            return b""

        def ask() -> bytes:
            more = {"cache_type": "none"} if "hf" in self.place.protocols else {}  # it would read ahead by itself
            data: bytes = self.place.fs.cat_file(self.place.path, start=begin, end=end, **more)
            if len(data) != end - begin:
                if len(data) > end - begin:
                    raise CheckpointError(f"{self.shown}: this server does not serve parts of files: download it first")
                raise Answered(f"{len(data)} of {end - begin} bytes")
            return data

        return persistently(ask, self.shown, self.limits, stop=stop, again=self.check)

    def read_into(self, view: memoryview, begin: int) -> None:
        """Fill ``view`` with the bytes from ``begin`` on, several requests at a time.

        Raises:
            CheckpointError: no complete answer within the limits, or the object changed.
        """
        if len(view) <= _PIECE:
            view[:] = self.read(begin, begin + len(view))
        else:
            starts = range(0, len(view), _PIECE)
            with requests(self.limits) as pool:
                waiting: list[Future[bytes]] = []
                for number, start in enumerate(starts):
                    while len(waiting) < min(len(starts), number + self.limits.parallel):
                        first = starts[len(waiting)]
                        last = min(first + _PIECE, len(view))
                        waiting.append(pool.submit(partial(self.read, begin + first, begin + last, pool.stop)))
                    data = _result(waiting[number], self.shown, self.limits)
                    view[start : start + len(data)] = data
                    waiting[number] = Future()  # the bytes are not needed twice
        self.check()

    def check(self) -> None:
        """Check that the object is the one that was opened.

        Raises:
            CheckpointError: it is another one, or it is gone.
        """
        if look(self.place, self.limits) != (self.size, self.marks):
            raise CheckpointError(f"{self.shown}: the file changed while it was in use: open it again")


@dataclass(frozen=True)
class RemoteWeights:
    """Everything that is known of a checkpoint behind a URL without its weights.

    Attributes:
        main: the file to open: a safetensors file, or an index.
        files: ``main``, and the shards by name if it is an index.
        contents: the tables of the safetensors files among them, in the same order.
        index: tensor to shard, and the index's metadata.
    """

    main: RemoteFile
    files: tuple[RemoteFile, ...]
    contents: tuple[SafetensorsFile, ...]
    index: tuple[dict[str, str], dict[str, object]] | None

    @property
    def shards(self) -> tuple[RemoteFile, ...]:
        """The files of ``contents``."""
        return self.files if self.index is None else self.files[1:]


def open_weights(url: str, limits: Limits | None = None) -> RemoteWeights:
    """Find a checkpoint and read its headers.

    A ``.safetensors`` file, an index of them, or a folder with either.

    Raises:
        CheckpointError: nothing there, refused, no answer, damaged, or a format that is not read from elsewhere.
    """
    given = Limits() if limits is None else limits
    main = _main(url, given)
    if not main.shown.endswith(SAFETENSORS_INDEX):
        return RemoteWeights(main, (main,), (_contents(main),), None)
    if main.size > _SMALL:
        raise CheckpointError(f"{main.shown}: an index of {main.size} bytes is damaged: save the checkpoint again")
    table, metadata = read_index(main.shown, SAFETENSORS_INDEX, main.read(0, main.size))
    main.check()
    names = sorted(set(table.values()))

    def open_shard(name: str) -> tuple[RemoteFile, SafetensorsFile]:
        try:
            shard = open_file(beside(main.place.url, name), given)
        except Missing:
            raise CheckpointError(f"{main.shown}: the shard '{name}' is missing: put it in the same folder") from None
        return shard, _contents(shard)

    with requests(given) as pool:
        waiting = [pool.submit(partial(open_shard, name)) for name in names]
        opened = [_result(future, main.shown, given) for future in waiting]
    files = tuple(shard for shard, _ in opened)
    return RemoteWeights(main, (main, *files), tuple(found for _, found in opened), (table, dict(metadata)))


def open_file(url: str, limits: Limits | None = None) -> RemoteFile:
    """An object behind a URL: its size and version.

    Raises:
        CheckpointError: nothing there, refused, or no answer.
    """
    given = Limits() if limits is None else limits
    place = connect(url)
    size, marks = look(place, given)
    return RemoteFile(place, size, marks, given)


def read_remote_tensor(file: RemoteFile, contents: SafetensorsFile, name: str) -> Tensor:
    """One tensor, in memory of its own (CPU).

    Raises:
        CheckpointError: no complete answer within the limits, or the object changed.
    """
    begin, end = contents.offsets[name]
    flat = torch.empty(end - begin, dtype=torch.uint8)
    if end > begin:
        file.read_into(flat.numpy().data, begin)
    return typed(contents, name, flat)


def read_remote_sample(file: RemoteFile, contents: SafetensorsFile, name: str) -> Tensor:
    """The bytes that :func:`merging.lazy.sample_bytes` takes of a tensor."""
    begin, end = contents.offsets[name]
    start, stop = sample_window(end - begin)
    return torch.from_numpy(np.frombuffer(bytearray(file.read(begin + start, begin + stop)), dtype=np.uint8))


def remote_hash(url: str, limits: Limits | None = None) -> str:
    """SHA-256 of a checkpoint's weights as :func:`merging.checkpoint.file_hash` takes it; reads everything.

    Raises:
        CheckpointError: see :func:`open_weights`.
    """
    given = Limits() if limits is None else limits
    digest = sha256()
    weights = open_weights(url, given)
    with requests(given) as pool:
        for file in weights.files:
            reader = RangeReader(file, pool)
            buffer = np.empty(min(BLOCK, file.size), dtype=np.uint8)
            for begin in range(0, file.size, BLOCK):
                part = buffer[: min(BLOCK, file.size - begin)]
                reader.read_into(part, begin)
                digest.update(part.data)
            file.check()
    return digest.hexdigest()


def version_of(url: str, limits: Limits | None = None) -> dict[str, Any]:
    """What is recorded of a remote source: its URL without credentials, its size in bytes, and its version.

    Raises:
        CheckpointError: see :func:`open_weights`.
    """
    main = _main(url, Limits() if limits is None else limits)
    return {"url": shown(url), "size": main.size, "version": {key: value[:200] for key, value in main.marks}}


def is_folder(url: str) -> bool:
    """Whether a URL names something else than a file of weights or an index."""
    return not last_name(url).endswith((".safetensors", SAFETENSORS_INDEX, LEGACY_INDEX, *LEGACY_SUFFIXES))


def remote_companions(url: str, limits: Limits | None = None) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files beside the weights, as :func:`merging.folder.companions` (none for web addresses).

    Raises:
        CheckpointError: a file cannot be read.
    """
    given = Limits() if limits is None else limits
    place = connect(url)
    if place.web:
        return
    for name in list_names(place, given):
        if is_companion(name):
            file = open_file(within(url, name), given)
            if file.size > _SMALL:
                continue
            content = file.read(0, file.size)
            if content[:1] != b"\x80" and content[:2] != b"PK":
                yield name, content


def list_names(place: Place, limits: Limits) -> list[str]:
    """Names in a folder, in order.

    Raises:
        CheckpointError: there is no such folder, or no answer.
    """

    def ask() -> list[str]:
        _forget(place)
        return [str(entry) for entry in place.fs.ls(place.path, detail=False)]

    found = persistently(_telling(place, ask), place.shown, limits)
    return sorted(name for entry in found if (name := entry.rstrip("/").rpartition("/")[2]) and name[0] != ".")


class RangeReader:
    """Reads an object in blocks, ahead of who uses them; a stand-in for :class:`merging.streaming.source.MappedFile`.

    At most six blocks of :data:`BLOCK` bytes are held.  Threads may share it.
    """

    mapped = False
    address = 0

    def __init__(self, file: RemoteFile, requests: Requests) -> None:
        self.file = file
        self.path = Path(file.shown)
        self._requests = requests
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._fresh: set[int] = set()
        self._last = -1
        self._checked = time.monotonic()

    def announce(self, begin: int, end: int) -> None:
        """Ask for bytes that will be needed soon, as far as there is room for them."""
        with self._lock:
            for number in range(begin // BLOCK, -(-end // BLOCK)):
                if len(self._fresh) >= _KEPT - 2:
                    return
                self._start(number)

    def read_into(self, buffer: NDArray[np.uint8], begin: int) -> None:
        """Read ``len(buffer)`` bytes from ``begin`` on.

        Raises:
            CheckpointError: no complete answer within the limits.
        """
        view = buffer.data
        while view:
            number, offset = divmod(begin, BLOCK)
            data = memoryview(self._block(number))[offset : offset + len(view)]
            view[: len(data)] = data
            view, begin = view[len(data) :], begin + len(data)

    def populate(self, begin: int, end: int) -> int:
        """Only files of this machine are mapped."""
        raise AssertionError("a remote file is not mapped")

    def drop(self, begin: int, end: int) -> None:
        """Blocks are let go of when others need the room."""

    def check(self) -> None:
        """As :meth:`RemoteFile.check`, at most every half minute (:meth:`confirm` does it at the end)."""
        if time.monotonic() - self._checked > _CHECKED:
            self.confirm()

    def confirm(self) -> None:
        """As :meth:`RemoteFile.check`."""
        self.file.check()
        self._checked = time.monotonic()

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            for future in self._blocks.values():
                future.cancel()
            self._blocks.clear()
            self._fresh.clear()

    def _block(self, number: int) -> bytes:
        with self._lock:
            future = self._start(number)
            self._fresh.discard(number)
            if number in (self._last, self._last + 1):
                for following in range(number + 1, number + 1 + _AHEAD):
                    if len(self._fresh) < _KEPT - 2:
                        self._start(following)
            self._last = number
        try:
            return _result(future, self.file.shown, self.file.limits)
        except BaseException:
            with self._lock:
                if self._blocks.get(number) is future:
                    del self._blocks[number]
                    self._fresh.discard(number)
            raise

    def _start(self, number: int) -> Future[bytes]:
        found = self._blocks.get(number)
        if found is not None:
            self._blocks.move_to_end(number)
            return found
        begin = number * BLOCK
        end = min(begin + BLOCK, self.file.size)
        if begin >= end:
            return Future()
        while len(self._blocks) >= _KEPT:
            oldest = next((other for other in self._blocks if other not in self._fresh), next(iter(self._blocks)))
            self._blocks.pop(oldest)
            self._fresh.discard(oldest)
        self._fresh.add(number)
        future = self._requests.submit(partial(self.file.read, begin, end, self._requests.stop))
        self._blocks[number] = future
        return future


@contextmanager
def requests(limits: Limits) -> Iterator[Requests]:
    """Requests that are given up at the end."""
    pool = Requests(limits)
    try:
        yield pool
    finally:
        pool.close()


class Missing(CheckpointError):
    """There is no such object."""


def _telling(place: Place, ask: Any) -> Any:
    """The same request, with an error of its own for what is not there."""

    def call() -> Any:
        try:
            return ask()
        except Exception as error:
            if is_missing(error):
                raise Missing(f"{place.shown}: there is no such file: check the address") from None
            raise

    return call


def _forget(place: Place) -> None:
    place.fs.invalidate_cache(None if place.web else place.fs._parent(place.path))


def look(place: Place, limits: Limits) -> tuple[int, tuple[tuple[str, str], ...]]:
    """Size in bytes and version of an object, as they are now.

    Raises:
        CheckpointError: nothing there (:class:`Missing`), refused, no answer, or not a file.
    """

    def ask() -> dict[str, Any]:
        _forget(place)
        return dict(place.fs.info(place.path))

    info = persistently(_telling(place, ask), place.shown, limits)
    if info.get("type") == "directory":
        raise CheckpointError(f"{place.shown}: this is a folder: name the file in it")
    size = info.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0 or info.get("partial") is False:
        raise CheckpointError(f"{place.shown}: this server does not serve parts of files: download it first")
    return size, tuple((key, str(info[key])) for key in _MARKS if info.get(key) is not None)


def _main(url: str, limits: Limits) -> RemoteFile:
    """The file that holds the weights, or their index."""
    name = last_name(url)
    if name.endswith((*LEGACY_SUFFIXES, LEGACY_INDEX)):
        raise _pickled(url)
    if name.endswith((".safetensors", SAFETENSORS_INDEX)):
        return open_file(url, limits)
    place = connect(url)
    if place.web:
        for candidate in ("model.safetensors", "model" + SAFETENSORS_INDEX):
            try:
                return open_file(within(url, candidate), limits)
            except Missing:
                continue
        raise CheckpointError(
            f"{shown(url)}: there is no model.safetensors and no index at this web address: name the file"
        )
    chosen = choose_weights(shown(url), list_names(place, limits))
    if chosen.endswith((*LEGACY_SUFFIXES, LEGACY_INDEX)):
        raise _pickled(within(url, chosen))
    if chosen == "adapter_model.safetensors":
        raise CheckpointError(f"{shown(url)}: LoRA adapters are read from local folders only: download it first")
    return open_file(within(url, chosen), limits)


def _pickled(url: str) -> CheckpointError:
    return CheckpointError(
        f"{shown(url)}: only safetensors are read from elsewhere, no pickles: download it, or convert it"
    )


def _contents(file: RemoteFile) -> SafetensorsFile:
    """The header of a remote safetensors file."""
    if file.place.web and file.size > _HEAD:
        _check_ranges(file)
    head = file.read(0, min(file.size, _HEAD))

    def read(begin: int, end: int) -> bytes:
        stop = min(end, file.size)
        return head[begin:stop] if stop <= len(head) else head[begin:] + file.read(max(begin, len(head)), stop)

    found = parse_safetensors(Path(file.shown), file.identity, read, label=file.shown)
    file.check()
    return found


def _check_ranges(file: RemoteFile) -> None:
    """Check that a web server serves parts of files, without downloading the whole where it does not."""

    def ask() -> None:
        with file.place.fs.open(file.place.path, "rb", size=file.size, block_size=_HEAD, cache_type="none") as handle:
            handle.seek(8)
            handle.read(8)

    def call() -> None:
        try:
            ask()
        except ValueError:
            raise CheckpointError(
                f"{file.shown}: this server does not serve parts of files: download it first"
            ) from None

    persistently(call, file.shown, file.limits)


def _result(future: Future[T], what: str, limits: Limits) -> T:
    """What a request gives, which may wait behind others."""
    try:
        return future.result(8.0 * limits.total + limits.attempt)
    except TimeoutError:
        raise CheckpointError(f"{what}: no answer in time: check the network, and try again") from None
    except CancelledError:
        raise CheckpointError(f"{what}: the request was given up") from None
