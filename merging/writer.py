"""Write the safetensors format, byte for byte the same for the same content.

The package's own writer orders metadata at random and creates files that only their owner can read, hence this one.
Format: https://huggingface.co/docs/safetensors (8-byte header length, JSON header, tensors without gaps).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch

from merging.errors import CheckpointError
from merging.types import StateDict

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
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


def write_safetensors(handle: BinaryIO, tensors: StateDict, metadata: Mapping[str, str]) -> None:
    """Write tensors, widest types first (so that all are aligned) and then by name.

    Raises:
        CheckpointError: a tensor type that the format does not know.
        OSError: the disk refuses.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _TYPES:
            raise CheckpointError(
                f"tensor '{name}' has type {tensor.dtype}, which safetensors cannot store: convert it"
            )
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    handle.write(len(text).to_bytes(8, "little"))
    handle.write(text)
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            handle.write(flat.view(torch.uint8).numpy().data)


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only once it is complete and flushed to the disk.

    Until then it has a hidden temporary name in the same folder, and it is removed if anything is raised.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
