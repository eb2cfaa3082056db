"""Write the safetensors format, byte for byte the same for the same content, and files that appear only when complete.

The package's own writer orders metadata at random and creates files that only their owner can read, hence this one.
Format: https://huggingface.co/docs/safetensors (8-byte header length, JSON header, tensors without gaps).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import torch

from merging.errors import CheckpointError
from merging.lazy import Spec, specs
from merging.safetensors_file import MAX_HEADER
from merging.types import StateDict

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def check_writable(described: Mapping[str, Spec]) -> None:
    """Check that the format can hold tensors of these names and types.

    Raises:
        CheckpointError: names the tensor and the remedy.
    """
    for name, spec in described.items():
        if spec.dtype not in _TYPES:
            raise CheckpointError(f"tensor '{name}' has type {spec.dtype}, which safetensors cannot store: convert it")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"the tensor name {name!r} is not text: rename it") from None
        if name == "__metadata__":
            raise CheckpointError("the tensor name '__metadata__' is reserved by safetensors: rename the tensor")


@dataclass(frozen=True)
class Outline:
    """A safetensors file before its tensors are known.

    Attributes:
        header: its first bytes.
        places: first and last byte (exclusive) of every tensor from the start of the file, in the file's order.
        size: bytes of the whole file.
    """

    header: bytes
    places: Mapping[str, tuple[int, int]]
    size: int


def outline_of(described: Mapping[str, Spec], metadata: Mapping[str, str]) -> Outline:
    """Lay tensors out: widest types first (so that all are aligned), then by name.

    Raises:
        CheckpointError: a name or a type that the format does not know, or too many of them.
    """
    check_writable(described)
    order = sorted(described, key=lambda name: (-described[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offsets: dict[str, tuple[int, int]] = {}
    position = 0
    for name in order:
        spec = described[name]
        end = position + spec.nbytes
        header[name] = {"dtype": _TYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
        offsets[name] = (position, end)
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"the header takes {len(text)} bytes, more than safetensors allows: write shards")
    start = 8 + len(text)
    places = {name: (start + begin, start + end) for name, (begin, end) in offsets.items()}
    return Outline(len(text).to_bytes(8, "little") + text, places, start + position)


def write_safetensors(
    handle: BinaryIO, tensors: StateDict, metadata: Mapping[str, str], names: Iterable[str] | None = None
) -> None:
    """Write tensors, widest types first (so that all are aligned) and then by name.

    Each tensor is fetched once, when its turn comes, so that a lazy mapping is written in bounded memory.

    Args:
        handle: where to.
        tensors: what to write.
        metadata: the header's ``__metadata__``.
        names: write only these.

    Raises:
        CheckpointError: a tensor type that the format does not know, or a lazy tensor that is not as announced.
        OSError: the disk refuses.
    """
    described = specs(tensors)
    if names is not None:
        described = {name: described[name] for name in names}
    outline = outline_of(described, metadata)
    handle.write(outline.header)
    for name in outline.places:
        tensor = tensors[name].detach()
        if Spec(tuple(tensor.shape), tensor.dtype) != described[name]:
            raise CheckpointError(
                f"tensor '{name}' is {tuple(tensor.shape)} {tensor.dtype}, announced as {described[name].shape} "
                f"{described[name].dtype}: correct the lazy mapping's specs"
            )
        flat = tensor.cpu().resolve_neg().contiguous().reshape(-1)
        if flat.numel():
            handle.write(flat.view(torch.uint8).numpy().data)


@contextmanager
def flushed_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, flushed to the disk at the end, and removed if anything is raised."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only once it is complete and flushed to the disk.

    Until then it has a hidden temporary name in the same folder, and it is removed if anything is raised, or if the
    process is asked to terminate (SIGTERM); what was at the name before is replaced.
    """
    temporary = hidden(target)
    with cleaning_up_on_sigterm():
        with flushed_file(temporary) as handle:
            yield handle
        try:
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    confirm(target)


def hidden(target: Path, suffix: str = "tmp") -> Path:
    """A hidden name beside ``target`` that nobody else uses."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{suffix}")


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def confirm(target: Path) -> None:
    """Flush the name of something that was just put in its place.

    Raises:
        CheckpointError: the disk refuses; what was written is there, but may not survive a power failure.
    """
    try:
        sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target}: this was written, but the disk did not confirm it ({error.strerror}): check the disk, and "
            "write it again"
        ) from error


class _Terminated(BaseException):
    """SIGTERM as an exception, so that ``finally`` clauses run."""


@contextmanager
def cleaning_up_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that temporary files are removed, before it ends the process.

    Only where nobody else handles that signal, and only in the main thread (others cannot); otherwise nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def unwind(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
