"""Read the safetensors format tensor by tensor: strict about the header, copied out of the file or mapped.

A file that is mapped into memory and that someone truncates kills the process that reads it; copied, it is an error.
Format: https://huggingface.co/docs/safetensors (8-byte header length, JSON header, tensors without gaps).
"""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.errors import CheckpointError
from merging.lazy import Spec, sample_window

TYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""The format's names of types."""

MAX_HEADER = 100_000_000
"""The format's limit on the header, in bytes."""

_MAX_DIMENSIONS = 64

Identity = tuple[int, int, int, int]


@dataclass(frozen=True)
class SafetensorsFile:
    """A file's table of contents; its bytes are read by :func:`read_tensor`.

    Attributes:
        path: where it is.
        specs: shape and type by tensor, in the order of the header.
        offsets: first and last byte (exclusive) of each tensor, from the start of the file.
        metadata: the header's ``__metadata__``.
        identity: device, inode, size and time of change when the header was read.
    """

    path: Path
    specs: Mapping[str, Spec]
    offsets: Mapping[str, tuple[int, int]]
    metadata: Mapping[str, str]
    identity: Identity


def open_safetensors(path: Path) -> SafetensorsFile:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: unreadable, truncated, or anything in the header that contradicts itself or the file's size:
            duplicate names, overlaps, gaps, unknown types.
    """
    with opened(path) as (handle, identity):
        return parse_safetensors(path, identity, lambda begin, end: handle.read(end - begin))


def parse_safetensors(
    path: Path, identity: Identity, read: Callable[[int, int], bytes], *, label: str | None = None
) -> SafetensorsFile:
    """Read and check the header of a safetensors file, wherever its bytes come from.

    Args:
        path: where it is.
        identity: see :class:`SafetensorsFile`; the third number is the size in bytes.
        read: bytes from one place to another (exclusive), or fewer at the end of the file; called from front to back.
        label: how it is named in messages, if not by its path.

    Raises:
        CheckpointError: see :func:`open_safetensors`.
    """
    where, size = str(path) if label is None else label, identity[2]
    prefix = read(0, 8)
    if prefix == b"version ":
        raise CheckpointError(f"{where}: this is a Git LFS pointer, not the weights: run 'git lfs pull' first")
    if len(prefix) < 8:
        raise _damaged(where, "the file is empty" if not prefix else "it ends in the header's length")
    length = int.from_bytes(prefix, "little")
    if length > min(MAX_HEADER, size - 8):
        raise _damaged(where, f"a header of {length} bytes does not fit in a file of {size}")
    text = read(8, 8 + length)
    if not text.startswith(b"{"):
        raise _damaged(where, "the header is not JSON")
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"the header is not JSON, {str(error)[:100]}") from None
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(where, "the header's metadata are not text")
    found: dict[str, Spec] = {}
    offsets: dict[str, tuple[int, int]] = {}
    start = 8 + length
    for name, entry in content.items():
        found[name], (begin, end) = _entry(where, name, entry)
        offsets[name] = (start + begin, start + end)
    position = start
    for begin, end in sorted(offsets.values()):
        if begin != position:
            raise _damaged(where, "its tensors overlap or leave gaps")
        position = end
    if position != size:
        raise _damaged(where, f"its tensors take {position} bytes and the file has {size}")
    return SafetensorsFile(path, found, offsets, metadata, identity)


def read_tensor(file: SafetensorsFile, name: str) -> Tensor:
    """Read one tensor into memory of its own (CPU).

    Raises:
        CheckpointError: the file cannot be read any more, or is another one than when it was opened.
    """
    return typed(file, name, _read(file, *file.offsets[name]))


def map_file(file: SafetensorsFile) -> Tensor:
    """The whole file as flat uint8, mapped into memory (copy on write: writing to it does not change the file).

    Raises:
        CheckpointError: the file cannot be mapped.
    """
    try:
        return torch.from_file(str(file.path), shared=False, size=file.identity[2], dtype=torch.uint8)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointError(f"{file.path}: cannot be mapped into memory ({reason}): read it unmapped") from error


def map_tensor(file: SafetensorsFile, mapping: Tensor, name: str) -> Tensor:
    """One tensor as a view of :func:`map_file` (a copy where the file does not align it).

    Raises:
        CheckpointError: the file is another one than when it was opened.
    """
    check_unchanged(file.path, file.identity)
    begin, end = file.offsets[name]
    flat = mapping[begin:end]
    return typed(file, name, flat if begin % file.specs[name].dtype.itemsize == 0 else flat.clone())


def check_unchanged(path: Path, identity: Identity) -> None:
    """Check that a file is the one that was opened.

    Raises:
        CheckpointError: it was replaced, cut short or written to.
    """
    with opened(path) as (_, current):
        if current != identity:
            raise CheckpointError(f"{path}: the file changed while it was in use: open it again")


def typed(file: SafetensorsFile, name: str, flat: Tensor) -> Tensor:
    """A tensor from its bytes (flat uint8), without a copy but for booleans."""
    spec = file.specs[name]
    values = flat.ne(0) if spec.dtype == torch.bool else flat.view(spec.dtype)
    return values.reshape(spec.shape)


def read_sample(file: SafetensorsFile, name: str) -> Tensor:
    """The bytes that :func:`merging.lazy.sample_bytes` takes of a tensor, without reading the rest."""
    begin, end = file.offsets[name]
    start, stop = sample_window(end - begin)
    return _read(file, begin + start, begin + stop)


@contextmanager
def opened(path: Path) -> Iterator[tuple[io.FileIO, Identity]]:
    """Open a regular file for reading, with its identity.

    Raises:
        CheckpointError: it is missing, not a regular file, or cannot be read.
    """
    try:
        with open(path, "rb", buffering=0, opener=_without_waiting) as handle:
            status = os.fstat(handle.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: this is not a regular file: name a checkpoint file")
            yield handle, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file: check the path") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): check permissions and the disk") from error


def parse_json(text: bytes) -> Any:
    """Parse JSON in whose objects every key occurs once.

    Raises:
        ValueError: not JSON, or a key twice.
        RecursionError: nested too deeply.
    """
    return json.loads(text.decode("utf-8"), object_pairs_hook=_distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a named pipe would wait for its writer for ever


def _read(file: SafetensorsFile, begin: int, end: int) -> Tensor:
    flat = torch.empty(end - begin, dtype=torch.uint8)
    if begin == end:
        return flat
    with opened(file.path) as (handle, identity):
        if identity != file.identity:
            raise CheckpointError(f"{file.path}: the file changed while it was in use: open it again")
        handle.seek(begin)
        view = memoryview(flat.numpy().data)
        while view:
            count = handle.readinto(view)
            if not count:
                raise CheckpointError(f"{file.path}: the file changed while it was in use: open it again")
            view = view[count:]
    return flat


def _entry(path: str, name: str, entry: Any) -> tuple[Spec, tuple[int, int]]:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _damaged(path, f"the name {name!r} is not text") from None
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor '{name}' is not described by type, shape and offsets")
    shape, offsets, kind = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS or not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor '{name}' has the shape {shape} at {offsets}"[:200])
    if prod(max(size, 1) for size in shape) >= 2**63:  # an empty tensor may still claim dimensions beyond counting
        raise _damaged(path, f"tensor '{name}' has the shape {shape}"[:200])
    if not isinstance(kind, str) or kind not in TYPES:
        raise CheckpointError(
            f"{path}: tensor '{name}' has the type '{kind}', which is unknown here (or the header is damaged): convert "
            "it to a floating or integer type"
        )
    spec = Spec(tuple(shape), TYPES[kind])
    if offsets[1] - offsets[0] != spec.nbytes:
        raise _damaged(path, f"tensor '{name}' takes {spec.nbytes} bytes and its offsets leave {offsets}"[:200])
    return spec, (offsets[0], offsets[1])


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _damaged(path: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a complete safetensors file ({reason}): it is truncated or damaged, so copy or save it again"
    )
