"""Read safetensors behind URLs (``s3://``, ``gs://``, ``hf://``, ``https://``, ``memory://``, ...) by ranges.

Any file system of fsspec (https://filesystem-spec.readthedocs.io) will do; fsspec is optional and imported only when a
URL is used.  Pickles are never read from elsewhere.  Every request is repeated for a while when it fails and has a time
limit, and an object that changes while it is read is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merging.errors import CheckpointError
from merging.folder import LEGACY_INDEX, SAFETENSORS_INDEX, choose_weights, is_companion, read_index
from merging.lazy import sample_window
from merging.legacy import LEGACY_SUFFIXES
from merging.remote_file import BLOCK, RangeReader, RemoteFile, open_file, requests, result_of
from merging.remote_path import beside, last_name, shown, within
from merging.remote_place import Missing, connect, list_names
from merging.remote_requests import Limits, persistently
from merging.safetensors_file import SafetensorsFile, parse_safetensors, typed

_HEAD = 1 << 16  # bytes that are fetched to begin with: most headers fit

_SMALL = 64 << 20  # companions and indices are not larger than this


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
        opened = [result_of(future, main.shown, given) for future in waiting]
    files = tuple(shard for shard, _ in opened)
    return RemoteWeights(main, (main, *files), tuple(found for _, found in opened), (table, dict(metadata)))


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
