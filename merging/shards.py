"""Which tensors go into which file of a checkpoint, and what the files and their index are called."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from merging.errors import CheckpointError
from merging.folder import SAFETENSORS_INDEX
from merging.lazy import Spec

SUFFIX = ".safetensors"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(size: int | str, what: str = "the shard size") -> int:
    """Bytes in a size such as ``5000``, ``"500MB"`` (10^6) or ``"5GiB"`` (2^30).

    Args:
        size: the size.
        what: whose size that is, for the error.

    Raises:
        CheckpointError: not a positive size.
    """
    text = str(size).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    count = 0
    if match is not None and match[2].upper() in _UNITS and not isinstance(size, bool):
        count = int(float(match[1]) * _UNITS[match[2].upper()])
    if count < 1:
        raise CheckpointError(f"{what} '{text}' is not a positive size: write bytes, or as in 500MB or 5GB")
    return count


def split_shards(described: Mapping[str, Spec], limit: int | None) -> list[list[str]]:
    """Names by shard, in the order of names, each shard at most ``limit`` bytes (a larger tensor is alone)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(described):
        size = described[name].nbytes
        if limit is not None and shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def layout_of(target: Path, shards: Sequence[Sequence[str]]) -> tuple[list[Path], Path]:
    """Final names: the shards (none if one file holds everything), and the file to open."""
    if len(shards) == 1:
        return [], target
    stem = target.name.removesuffix(SUFFIX)
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}{SUFFIX}" for number in range(1, len(shards) + 1)]
    return [target.with_name(name) for name in names], target.with_name(stem + SAFETENSORS_INDEX)


def index_of(
    described: Mapping[str, Spec], finals: Sequence[Path], shards: Sequence[Sequence[str]], header: Mapping[str, str]
) -> bytes:
    """The index of a checkpoint in shards, in Hugging Face's form; bytes of JSON."""
    content = {
        "metadata": {
            "mergebound": header["mergebound"],
            "total_size": sum(spec.nbytes for spec in described.values()),
        },
        "weight_map": {name: path.name for path, members in zip(finals, shards, strict=True) for name in members},
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
