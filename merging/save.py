"""Write checkpoints: whole or not at all, as one file, as shards with an index, or as a folder.

Everything is written under hidden temporary names beside the target and flushed to the disk first.  Then it is
renamed, the index last and under a lock of the folder, so that whoever looks at the final name finds the old
checkpoint, none, or the new one, even if the writer is killed (hidden ``.tmp`` files may then remain, and ``.old``
files with what was there, until the same target is overwritten again).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from merging.errors import CheckpointError
from merging.file_locks import locked_folder
from merging.folder import companions, with_storage_type
from merging.lazy import Spec, specs
from merging.publish import check_replaceable, publish, put_aside, refuse_existing, remove_stale
from merging.remote_path import last_name, shown, url_of
from merging.shards import SUFFIX, index_of, layout_of, parse_size, split_shards
from merging.types import StateDict
from merging.unfinished import Fill, Writer
from merging.writer import (
    atomic_file,
    check_writable,
    cleaning_up_on_sigterm,
    confirm,
    flushed_file,
    hidden,
    sync_folder,
    write_safetensors,
)

_OTHER_FORMATS = (".pt", ".pth", ".bin", ".ckpt", ".h5", ".npz", ".onnx", ".gguf", ".msgpack", ".json", ".pkl")


def save_state_dict(
    path: str | os.PathLike[str], tensors: StateDict, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write one safetensors file atomically: complete under its name, or not there (an older file is replaced).

    Args:
        path: target, ending in ``.safetensors``.
        tensors: what to write; tensors that share memory are written separately.
        metadata: a JSON-serialisable record of how the checkpoint came about.

    Raises:
        CheckpointError: wrong suffix, missing folder, or the disk refuses.
    """
    url = url_of(path)
    if url is not None:
        if not last_name(url).endswith(SUFFIX):
            raise CheckpointError(f"{shown(url)}: checkpoints are written as .safetensors only: change the suffix")
        save_checkpoint(path, tensors, metadata, overwrite=True)
        return
    target = Path(path)
    if target.suffix != SUFFIX:
        raise CheckpointError(f"{target}: checkpoints are written as .safetensors only: change the suffix")
    _check_parent(target)
    if target.is_dir():
        raise CheckpointError(f"{target}: this is a folder: name a file in it")
    header = _header(target, metadata)
    with _disk_errors(target), atomic_file(target) as handle:
        write_safetensors(handle, tensors, header)


def save_checkpoint(
    target: str | os.PathLike[str],
    tensors: StateDict,
    metadata: Mapping[str, Any] | None = None,
    *,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    source: str | os.PathLike[str] | None = None,
    fill: Fill | None = None,
    resume: str | None = None,
) -> Path:
    """Write a checkpoint as a file, as shards, or as a folder.

    ``name.safetensors`` becomes one file or, if it exceeds ``max_shard_size``, ``name-00001-of-00003.safetensors`` and
    so on with ``name.safetensors.index.json`` (Hugging Face's convention; tensors fill the shards in the order of
    their names).  Any other target is a folder with ``model.safetensors`` or its shards, and the configuration,
    tokenizer and license files of ``source``.  The same content gives the same bytes, whatever the mapping's order.

    Args:
        target: where to; its parent must exist.  A URL works too: see :mod:`merging.remote_write`.
        tensors: what to write; a lazy mapping is fetched tensor by tensor.
        metadata: a JSON-serialisable record of how the checkpoint came about, kept in every shard and in the index.
        max_shard_size: bytes, or text such as ``"5GB"`` (10^9) or ``"500MiB"`` (2^20); a larger tensor gets a shard of
            its own.
        overwrite: replace a checkpoint that is there; its other shards are removed once the new one is in place.
        source: a folder whose files beside the weights are carried along, when the target is a folder
            (see :func:`merging.folder.companions`).
        fill: writes the files of weights under their temporary names, complete and flushed; default: tensor by tensor.
        resume: a key of what is written (:func:`merging.streaming.run.key_of`).  The temporary files are then named by
            it, and stay when the writer is killed or interrupted, so that the next call with this key can go on from
            there; they are removed when an error ends it, and, together with what interrupted writers of this target
            left under other keys, when a checkpoint is in its place.  (On a file system that cannot lock files,
            nothing is kept: two writers could not be told apart.)

    Returns:
        What to open: the file, the index, or the folder.

    Raises:
        CheckpointError: the target exists, cannot be written, or is of another format; a tensor cannot be stored.
    """
    url = url_of(target)
    if url is not None:
        from merging.remote_write import save_remote

        def save(place: Path) -> Path:
            return save_checkpoint(
                place, tensors, metadata, max_shard_size=max_shard_size, source=source, fill=fill, resume=resume
            )

        return save_remote(url, save, overwrite=overwrite, resume=resume)
    place = Path(target)
    _check_parent(place)
    if not tensors:
        raise CheckpointError(f"{place}: there are no tensors to write: give a state dict that holds some")
    if place.suffix in _OTHER_FORMATS:
        raise CheckpointError(
            f"{place}: checkpoints are written as .safetensors, in shards if max_shard_size is set, or as a folder "
            "(a name without suffix): change the name"
        )
    described = specs(tensors)
    check_writable(described)
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    shards = split_shards(described, limit)
    header = _header(place, metadata)
    with _disk_errors(place), cleaning_up_on_sigterm(), Writer(fill, resume).alone(place) as writer:
        if place.suffix == SUFFIX:
            if place.is_dir():
                raise CheckpointError(f"{place}: this is a folder: name a file in it")
            return _write_files(place, tensors, described, shards, header, writer, overwrite=overwrite)
        return _write_folder(place, tensors, described, shards, header, writer, overwrite=overwrite, source=source)


def _write_files(
    target: Path,
    tensors: StateDict,
    described: Mapping[str, Spec],
    shards: Sequence[Sequence[str]],
    header: Mapping[str, str],
    writer: Writer,
    *,
    overwrite: bool,
) -> Path:
    """Write beside the target under temporary names, then publish."""
    single, index = target, target.with_name(target.name + ".index.json")
    if not overwrite:
        refuse_existing((single, index))
    finals, main = layout_of(target, shards)
    temporary = [(writer.temporary(path), path) for path in (*finals, main)]
    with writer.cleaning([path for path, _ in temporary]):
        writer.fill([path for path, _ in temporary[: len(shards)]], tensors, described, shards, header, target)
        if main == index:
            with suppress(FileNotFoundError):
                temporary[-1][0].unlink()  # of a writer that was killed
            with flushed_file(temporary[-1][0]) as handle:
                handle.write(index_of(described, finals, shards, header))
        publish(temporary[:-1], temporary[-1], (single, index), overwrite=overwrite)
    return main


def _write_folder(
    target: Path,
    tensors: StateDict,
    described: Mapping[str, Spec],
    shards: Sequence[Sequence[str]],
    header: Mapping[str, str],
    writer: Writer,
    *,
    overwrite: bool,
    source: str | os.PathLike[str] | None,
) -> Path:
    """Write a hidden folder beside the target, then rename it."""
    check_replaceable(target, overwrite=overwrite)
    carried = _carried(source)
    folder = writer.temporary(target)
    folder.mkdir(exist_ok=writer.resume is not None)
    with writer.cleaning([folder]):
        finals, main = layout_of(folder / f"model{SUFFIX}", shards)
        writer.fill(finals or [main], tensors, described, shards, header, target)
        for path in folder.iterdir():  # of a writer that was killed
            if path not in (finals or [main]):
                path.unlink()
        if finals:
            with flushed_file(main) as handle:
                handle.write(index_of(described, finals, shards, header))
        types = {str(spec.dtype).removeprefix("torch.") for spec in described.values() if spec.floating}
        for name, content in carried:
            if name == "config.json" and len(types) == 1:
                content = with_storage_type(content, *types)
            with flushed_file(folder / name) as handle:
                handle.write(content)
        sync_folder(folder)
        with locked_folder(target.parent):
            check_replaceable(target, overwrite=overwrite)
            aside = hidden(target, "old") if target.is_dir() and any(target.iterdir()) else None
            if aside is not None:
                os.rename(target, aside)
            try:
                os.rename(folder, target)
            except BaseException:
                if aside is not None:
                    os.rename(aside, target)
                raise
            confirm(target)
            remove_stale(target, put_aside(target) if overwrite else [])
    return target


def _carried(source: str | os.PathLike[str] | None) -> tuple[tuple[str, bytes], ...]:
    if source is None:
        return ()
    url = url_of(source)
    if url is not None:
        from merging.remote import is_folder, remote_companions

        return tuple(remote_companions(url)) if is_folder(url) else ()
    return tuple(companions(Path(source))) if Path(source).is_dir() else ()


def _check_parent(target: Path) -> None:
    if target.name in ("", ".."):
        raise CheckpointError(f"{target}: this is a place rather than a name: name a file or a new folder in it")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target}: the folder '{target.parent}' does not exist: create it first")


def _header(target: Path, metadata: Mapping[str, Any] | None) -> dict[str, str]:
    try:
        return {"format": "pt", "mergebound": json.dumps(dict(metadata or {}), sort_keys=True)}
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{target}: the metadata cannot be written as JSON ({error}): use numbers, text, lists and dictionaries"
        ) from error


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{target}: writing failed ({error.strerror}), and nothing was written: check free space and permissions"
        ) from error
