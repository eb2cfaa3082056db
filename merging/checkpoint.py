"""Read checkpoints without running what is in them; write them whole or not at all.

Read: ``.safetensors``, sharded ``*.safetensors.index.json``, and ``.pt`` / ``.pth`` / ``.bin`` / ``.ckpt`` through
``torch.load(weights_only=True)`` only.  Written: ``.safetensors``, to a temporary file beside the target that is
flushed to the disk and then renamed.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from merging.compatible import check_compatible
from merging.errors import CheckpointError
from merging.types import StateDict
from merging.writer import atomic_file, write_safetensors

__all__ = ["check_compatible", "file_hash", "load_state_dict", "read_metadata", "save_state_dict"]

LEGACY_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX_SUFFIX = ".safetensors.index.json"
_NESTED = ("state_dict", "model")
T = TypeVar("T")
_PREFIX = "module."
_BLOCK = 1 << 22


def load_state_dict(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read a checkpoint into memory (CPU); nothing in the file is executed.

    A legacy file may hold the state dict itself or nest it under ``"state_dict"`` or ``"model"``; a ``module.`` prefix
    that all tensors share is removed.

    Args:
        path: the checkpoint.
        names: read only these tensors (safetensors: the others are not touched on disk).

    Raises:
        CheckpointError: no such file, an unknown suffix, a truncated or damaged file, a pickle that needs more
            than plain tensors, a shard or a tensor that is missing.
    """
    source = _existing(Path(path))
    if source.name.endswith(INDEX_SUFFIX):
        state = _load_sharded(source, names)
    elif source.suffix == ".safetensors":
        state = _load_safetensors(source, names)
    elif source.suffix in LEGACY_SUFFIXES:
        state = _select(_load_legacy(source), names, source)
    else:
        raise CheckpointError(
            f"{source}: the suffix '{source.suffix}' is not a known checkpoint format: use .safetensors, "
            f"{INDEX_SUFFIX}, {', '.join(LEGACY_SUFFIXES)}"
        )
    if not state:
        raise CheckpointError(f"{source}: the checkpoint holds no tensors: save model.state_dict() and try again")
    return state


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :func:`save_state_dict` recorded in a safetensors file (empty for files that others wrote).

    Raises:
        CheckpointError: the file cannot be read.
    """
    source = _existing(Path(path))
    with _safetensors(source) as handle:
        recorded = (handle.metadata() or {}).get("mergebound", "{}")
    try:
        metadata = json.loads(recorded)
    except json.JSONDecodeError:
        metadata = None
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{source}: the recorded metadata is damaged: merge again to renew it")
    return metadata


def save_state_dict(
    path: str | os.PathLike[str], tensors: StateDict, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file atomically: complete under its name, or not there (an older file is then kept).

    Args:
        path: target, ending in ``.safetensors``.
        tensors: what to write; tensors that share memory are written separately.
        metadata: a JSON-serialisable record of how the checkpoint came about.

    Raises:
        CheckpointError: wrong suffix, missing folder, or the disk refuses.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target}: checkpoints are written as .safetensors only: change the suffix")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target}: the folder '{target.parent}' does not exist: create it first")
    if target.is_dir():
        raise CheckpointError(f"{target}: this is a folder: name a file in it")
    header = {"format": "pt", "mergebound": json.dumps(dict(metadata or {}), sort_keys=True)}
    try:
        with atomic_file(target) as handle:
            write_safetensors(handle, tensors, header)
    except OSError as error:
        raise CheckpointError(
            f"{target}: writing failed ({error.strerror}), and nothing was written: check free space and permissions"
        ) from error


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a checkpoint, in hexadecimal; of a sharded one, over the index followed by its shards in name order.

    Raises:
        CheckpointError: a file is missing or unreadable.
    """
    source = _existing(Path(path))
    files = [source]
    if source.name.endswith(INDEX_SUFFIX):
        files += [source.parent / shard for shard in sorted(set(_weight_map(source).values()))]
    digest = sha256()
    for file in files:
        try:
            with _existing(file).open("rb") as handle:
                while block := handle.read(_BLOCK):
                    digest.update(block)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}): check permissions") from error
    return digest.hexdigest()


def _existing(path: Path) -> Path:
    if path.is_dir():
        raise CheckpointError(f"{path}: this is a folder: name the checkpoint file in it")
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file: check the path")
    return path


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except CheckpointError:
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}): it is truncated or damaged, so copy or save it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): check permissions") from error


def _load_safetensors(path: Path, names: Iterable[str] | None) -> dict[str, Tensor]:
    with _safetensors(path) as handle:
        stored = tuple(handle.keys())
        chosen = _select(_strip_prefix(dict(zip(stored, stored, strict=True))), names, path)
        return {name: handle.get_tensor(key) for name, key in chosen.items()}


def _load_sharded(path: Path, names: Iterable[str] | None) -> dict[str, Tensor]:
    where = _weight_map(path)
    chosen = _select(_strip_prefix({name: name for name in where}), names, path)
    found: dict[str, Tensor] = {}
    for shard in sorted({where[key] for key in chosen.values()}):
        file = path.parent / shard
        if not file.is_file():
            raise CheckpointError(f"{path}: the shard '{shard}' is missing: put it in the same folder")
        with _safetensors(file) as handle:
            stored = set(handle.keys())
            for name, key in chosen.items():
                if where[key] != shard:
                    continue
                if key not in stored:
                    raise CheckpointError(
                        f"{file}: tensor '{key}', which the index places in this shard, is missing: save the "
                        "checkpoint again"
                    )
                found[name] = handle.get_tensor(key)
    return {name: found[name] for name in chosen}


def _weight_map(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable JSON index ({error}): save the checkpoint again") from error
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        raise CheckpointError(f"{path}: the index has no 'weight_map' of tensor to file: save the checkpoint again")
    for file in table.values():
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{path}: the index points outside its folder ('{file}'): name files beside it only")
    return table


def _load_legacy(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is said below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, because it is not plain tensors (it holds Python objects or code, which are never "
            "executed, or it is damaged): save model.state_dict(), best as .safetensors"
        ) from error
    except Exception as error:  # the bytes are untrusted, and the reader raises many types on damage
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path}: cannot be read ({reason}): it is truncated or damaged, so copy or save it again"
        ) from error
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict: save model.state_dict()")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            kind = type(tensor).__name__ if not isinstance(tensor, Tensor) else f"{tensor.layout} tensor"
            raise CheckpointError(
                f"{path}: entry '{name}' is a {kind}, not a dense tensor: save model.state_dict() only"
            )
    return _strip_prefix({name: tensor.detach() for name, tensor in content.items()})


def _strip_prefix(entries: dict[str, T]) -> dict[str, T]:
    if entries and all(name.startswith(_PREFIX) for name in entries):
        return {name.removeprefix(_PREFIX): entry for name, entry in entries.items()}
    return entries


def _select(entries: dict[str, T], names: Iterable[str] | None, path: Path) -> dict[str, T]:
    if names is None:
        return entries
    chosen = tuple(names)
    for name in chosen:
        if name not in entries:
            raise CheckpointError(f"{path}: tensor '{name}' is missing: use a checkpoint of the same architecture")
    return {name: entries[name] for name in chosen}
