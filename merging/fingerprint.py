"""A quick stand-in for the hash of a large checkpoint: its header and samples instead of every byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

from merging.checkpoint import file_hash, open_checkpoint
from merging.safetensors_file import opened


def quick_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of what tells checkpoints apart without reading them whole, in hexadecimal.

    Over the size of every file of weights, the headers of safetensors files, every tensor's name, shape and type, and
    up to 4 KiB from the middle of each.  Training moves those; two checkpoints that differ elsewhere only have the
    same quick hash, which :func:`merging.checkpoint.file_hash` would tell apart.

    Raises:
        CheckpointError: a file is missing, unreadable or damaged.
    """
    checkpoint = open_checkpoint(path)
    digest = sha256(b"mergebound quick 1")
    for file in checkpoint.files:
        with opened(Path(file)) as (handle, identity):
            digest.update(identity[2].to_bytes(8, "little"))
            if file.suffix == ".safetensors":
                length = handle.read(8)
                digest.update(length + handle.read(int.from_bytes(length, "little")))
    for name in sorted(checkpoint):
        spec = checkpoint.specs[name]
        digest.update(repr((name, spec.shape, str(spec.dtype))).encode())
        sample = checkpoint.sample(name)
        if sample.numel():
            digest.update(sample.contiguous().numpy().data)
    return digest.hexdigest()


HASHES: Mapping[str, Callable[[Path], str]] = {"sha256": file_hash, "quick_sha256": quick_hash}
"""Hashes of a merge's sources by their key in its record."""
