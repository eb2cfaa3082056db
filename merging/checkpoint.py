"""Read checkpoints without running what is in them, tensor by tensor; :mod:`merging.save` writes them.

Read: ``.safetensors``, sharded ``*.safetensors.index.json``, ``.pt`` / ``.pth`` / ``.bin`` / ``.ckpt`` through
``torch.load(weights_only=True)`` only, their shards (``*.bin.index.json``), and folders that hold one of these.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from merging.compatible import check_compatible
from merging.errors import CheckpointError
from merging.folder import INDEX_SUFFIXES, SAFETENSORS_INDEX, find_weights, weight_map
from merging.lazy import LazyState, Region, Spec, sample_bytes, specs
from merging.legacy import LEGACY_SUFFIXES, read_legacy
from merging.remote_path import shown, url_of
from merging.safetensors_file import (
    Identity,
    check_unchanged,
    map_file,
    map_tensor,
    open_safetensors,
    opened,
    read_sample,
    read_tensor,
)
from merging.save import save_checkpoint, save_state_dict
from merging.tied import tied_groups

__all__ = [
    "LEGACY_SUFFIXES",
    "Checkpoint",
    "check_compatible",
    "file_hash",
    "load_state_dict",
    "open_checkpoint",
    "read_metadata",
    "save_checkpoint",
    "save_state_dict",
]

_Mode = Literal["copied", "mapped", "loaded"]
_PREFIXES = ("module.", "_orig_mod.")
_BLOCK = 1 << 22


class Checkpoint(LazyState):
    """A checkpoint on disk, as a mapping whose tensors are read when they are asked for.

    Every access reads the tensor anew into memory of its own, or gives a view of the mapped file; if a file is replaced
    meanwhile, that is an error.  (Legacy files are always mapped where their format allows it, and held in memory as a
    whole where it does not.)

    Attributes:
        path: as given (of a URL: without user, password and query).
        files: all files that hold its weights: the index first if there is one, then its shards by name.
    """

    def __init__(
        self,
        path: Path,
        files: tuple[Path, ...],
        sources: Mapping[str, _Source],
        record: object,
        tied: tuple[tuple[str, ...], ...],
        sizes: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(
            {name: source.spec for name, source in sources.items()},
            lambda name: sources[name].read(),
            tied=tied,
            sample=lambda name: sources[name].sample(),
            region=lambda name: sources[name].region,
        )
        self.path = path
        self.files = files
        self._record = record
        self._sizes = sizes

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each of ``files``."""
        return tuple(file.stat().st_size for file in self.files) if self._sizes is None else self._sizes

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open; the ``with`` form is there for those who like to see where a checkpoint is used."""

    def __repr__(self) -> str:
        return f"Checkpoint({shown(self.path)!r}, {len(self)} tensors, {self.nbytes} bytes)"

    @property
    def metadata(self) -> dict[str, Any]:
        """What :mod:`merging.save` recorded (empty for files that others wrote).

        Raises:
            CheckpointError: the record is damaged.
        """
        if self._record is None:
            return {}
        try:
            metadata = json.loads(self._record) if isinstance(self._record, str) else self._record
        except (ValueError, RecursionError):
            metadata = None
        if not isinstance(metadata, dict):
            raise CheckpointError(f"{shown(self.path)}: the recorded metadata is damaged: merge again to renew it")
        return metadata


def open_checkpoint(path: str | os.PathLike[str], *, mapped: bool = False) -> Checkpoint:
    """Open a checkpoint for lazy reading; nothing in it is executed.

    A ``.safetensors`` file, an index of shards, a legacy file, or a folder (:func:`merging.folder.find_weights`).  A
    legacy file may hold the state dict itself or nest it (:data:`merging.legacy.NESTED`).  The prefixes ``module.`` and
    ``_orig_mod.`` are removed when all tensors share them.

    Args:
        path: the checkpoint; a URL (``s3://``, ``hf://``, ``https://``, ...; see :mod:`merging.remote`) works too.
        mapped: let tensors be views of the file mapped into memory instead of copies: faster, in particular where
            tensors are fetched more than once, and the system can drop pages that are not in use.  The price: if
            someone cuts the file short while a view is in use, the process dies.  Writing to a view does not change
            the file.

    Raises:
        CheckpointError: no such file, an unknown suffix, a truncated or damaged file, a pickle that needs more
            than plain tensors, a shard or a tensor that is missing.
    """
    return _open(path, "mapped" if mapped else "copied")


def load_state_dict(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read a checkpoint into memory (CPU); nothing in it is executed.

    Args:
        path: anything that :func:`open_checkpoint` opens.
        names: read only these tensors (safetensors: the others are not touched on disk).

    Raises:
        CheckpointError: see :func:`open_checkpoint`; or one of ``names`` is missing.
    """
    checkpoint = _open(path, "loaded")
    chosen = checkpoint.names if names is None else tuple(names)
    for name in chosen:
        if name not in checkpoint:
            raise CheckpointError(
                f"{shown(path)}: tensor '{name}' is missing: use a checkpoint of the same architecture"
            )
    return {name: checkpoint[name] for name in chosen}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What :mod:`merging.save` recorded in a checkpoint (empty for those that others wrote, and for legacy files).

    Raises:
        CheckpointError: the checkpoint cannot be read, or the record is damaged.
    """
    if url_of(path) is not None:
        return open_checkpoint(path).metadata
    source = _existing(Path(path))
    if _weights(source).name.endswith(LEGACY_SUFFIXES):
        return {}
    return open_checkpoint(source).metadata


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a checkpoint's weights, in hexadecimal.

    Of a sharded one over the index followed by its shards in name order; of a folder over the weights in it.

    Raises:
        CheckpointError: a file is missing or unreadable.
    """
    url = url_of(path)
    if url is not None:
        from merging.remote import remote_hash

        return remote_hash(url)
    source = _weights(_existing(Path(path)))
    files = [source]
    if source.name.endswith(INDEX_SUFFIXES):
        files += [source.parent / shard for shard in sorted(set(weight_map(source)[0].values()))]
    digest = sha256()
    for file in files:
        with opened(file) as (handle, _):
            while block := handle.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Source:
    """Where one tensor comes from."""

    spec: Spec
    read: Callable[[], Tensor]
    sample: Callable[[], Tensor]
    region: Region | None = None


def _open(given: str | os.PathLike[str], mode: _Mode) -> Checkpoint:
    url = url_of(given)
    if url is not None:
        return _open_url(url)
    path = Path(given)
    file = _weights(_existing(path))
    files: tuple[Path, ...] = (file,)
    record: object = None
    groups: tuple[tuple[str, ...], ...] = ()
    if file.name.endswith(INDEX_SUFFIXES):
        table, described = weight_map(file)
        record = described.get("mergebound")
        shards = sorted(set(table.values()))
        files += tuple(file.parent / shard for shard in shards)
        found: dict[str, _Source] = {}
        for shard in shards:
            if not (file.parent / shard).is_file():
                raise CheckpointError(f"{file}: the shard '{shard}' is missing: put it in the same folder")
            sources, written, tied = _open_file(file.parent / shard, mode)
            if record is None and shard == shards[0]:
                record = written
            wanted = [name for name, where in table.items() if where == shard]
            for name in wanted:
                if name not in sources:
                    raise CheckpointError(
                        f"{file.parent / shard}: tensor '{name}', which the index places in this shard, is missing: "
                        "save the checkpoint again"
                    )
                found[name] = sources[name]
            kept = (tuple(name for name in group if name in found) for group in tied)
            groups += tuple(group for group in kept if len(group) > 1)
        content = {name: found[name] for name in table}
    elif file.name.endswith((".safetensors", *LEGACY_SUFFIXES)):
        content, record, groups = _open_file(file, mode)
    else:
        raise CheckpointError(
            f"{file}: the suffix '{file.suffix}' is not a known checkpoint format: use .safetensors, "
            f"{SAFETENSORS_INDEX}, {', '.join(LEGACY_SUFFIXES)}, or a folder with one of them"
        )
    return _assembled(path, files, content, record, groups)


def _open_url(url: str) -> Checkpoint:
    """A checkpoint behind a URL; every access asks for the bytes anew."""
    from merging.remote import open_weights, read_remote_sample, read_remote_tensor

    weights = open_weights(url)
    found = {
        file: {
            name: _Source(
                spec,
                partial(read_remote_tensor, file, contents, name),
                partial(read_remote_sample, file, contents, name),
                Region(contents.path, contents.identity, *contents.offsets[name], file),
            )
            for name, spec in contents.specs.items()
        }
        for file, contents in zip(weights.shards, weights.contents, strict=True)
    }
    record: object = weights.contents[0].metadata.get("mergebound") if weights.contents else None
    if weights.index is None:
        content = found[weights.main]
    else:
        table, described = weights.index
        record = described.get("mergebound", record)
        shards = dict(zip(sorted(set(table.values())), weights.shards, strict=True))
        content = {}
        for name, shard in table.items():
            if name not in found[shards[shard]]:
                raise CheckpointError(
                    f"{shards[shard].shown}: tensor '{name}', which the index places in this shard, is missing: save "
                    "the checkpoint again"
                )
            content[name] = found[shards[shard]][name]
    files = tuple(Path(file.shown) for file in weights.files)
    return _assembled(Path(shown(url)), files, content, record, (), tuple(file.size for file in weights.files))


def _assembled(
    path: Path,
    files: tuple[Path, ...],
    content: Mapping[str, _Source],
    record: object,
    groups: tuple[tuple[str, ...], ...],
    sizes: tuple[int, ...] | None = None,
) -> Checkpoint:
    if not content:
        raise CheckpointError(
            f"{shown(files[0])}: the checkpoint holds no tensors: save model.state_dict() and try again"
        )
    shorter = _strip_prefixes(tuple(content))
    return Checkpoint(
        path,
        files,
        {shorter[name]: source for name, source in content.items()},
        record,
        tuple(tuple(shorter[name] for name in group) for group in groups),
        sizes,
    )


def _open_file(path: Path, mode: _Mode) -> tuple[dict[str, _Source], object, tuple[tuple[str, ...], ...]]:
    """Where the tensors of one file come from, the record in it, and the groups of names that it stores once."""
    if path.suffix == ".safetensors":
        file = open_safetensors(path)
        fetch = partial(map_tensor, file, map_file(file)) if mode == "mapped" else partial(read_tensor, file)
        sources = {
            name: _Source(
                spec,
                partial(fetch, name),
                partial(read_sample, file, name),
                Region(file.path, file.identity, *file.offsets[name]),
            )
            for name, spec in file.specs.items()
        }
        return sources, file.metadata.get("mergebound"), ()
    state, identity = read_legacy(path, mapped=mode != "loaded")
    described = specs(state)
    sources = {
        name: _Source(described[name], partial(_give, path, identity, tensor, mode), partial(sample_bytes, tensor))
        for name, tensor in state.items()
    }
    return sources, None, tied_groups(state)


def _give(path: Path, identity: Identity, tensor: Tensor, mode: _Mode) -> Tensor:
    if mode == "loaded":
        return tensor
    check_unchanged(path, identity)  # reading what is mapped and was cut short would kill the process
    return tensor if mode == "mapped" else tensor.clone(memory_format=torch.contiguous_format)


def _existing(path: Path) -> Path:
    try:
        found = path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): check the path and permissions") from error
    if not found and path.is_symlink():
        raise CheckpointError(f"{path}: this link leads to a file that does not exist: check where it leads")
    if not found:
        raise CheckpointError(f"{path}: there is no such file: check the path")
    return path


def _weights(path: Path) -> Path:
    return find_weights(path) if path.is_dir() else path


def _strip_prefixes(names: tuple[str, ...]) -> dict[str, str]:
    """Each name without the wrappers' prefixes that all of them share."""
    shorter = {name: name for name in names}
    while prefix := next((p for p in _PREFIXES if all(s.startswith(p) and s != p for s in shorter.values())), None):
        shorter = {name: short.removeprefix(prefix) for name, short in shorter.items()}
    return shorter
