"""Write checkpoints: whole or not at all, as one file, as shards with an index, or as a folder.

Everything is written under hidden temporary names beside the target and flushed to the disk first.  Then it is
renamed, the index last and under a lock of the folder, so that whoever looks at the final name finds the old
checkpoint, none, or the new one, even if the writer is killed (hidden ``.tmp`` files may then remain, and ``.old``
files with what was there, until the same target is overwritten again).
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from merging.errors import CheckpointError
from merging.folder import INDEX_SUFFIXES, SAFETENSORS_INDEX, companions, foreign, with_storage_type
from merging.lazy import Spec, specs
from merging.remote_path import last_name, shown, url_of
from merging.types import StateDict
from merging.writer import (
    Outline,
    atomic_file,
    check_writable,
    cleaning_up_on_sigterm,
    confirm,
    flushed_file,
    hidden,
    outline_of,
    sync_folder,
    write_safetensors,
)

logger = logging.getLogger(__name__)

Fill = Callable[[Sequence[tuple[Path, Outline]], Path | None], None]
"""Fills files (temporary names, with their outlines); the second argument is where a journal may be kept."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SUFFIX = ".safetensors"
_LOCKED = 600.0  # seconds after which another writer's renaming is taken to be stuck
_BUSY = 2.0  # seconds in which another process may look at a journal without writing what it is about
_PAUSE = 0.02
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
        if not last_name(url).endswith(_SUFFIX):
            raise CheckpointError(f"{shown(url)}: checkpoints are written as .safetensors only: change the suffix")
        save_checkpoint(path, tensors, metadata, overwrite=True)
        return
    target = Path(path)
    if target.suffix != _SUFFIX:
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
    with _disk_errors(place), cleaning_up_on_sigterm(), _Writer(fill, resume).alone(place) as writer:
        if place.suffix == _SUFFIX:
            if place.is_dir():
                raise CheckpointError(f"{place}: this is a folder: name a file in it")
            return _write_files(place, tensors, described, shards, header, writer, overwrite=overwrite)
        return _write_folder(place, tensors, described, shards, header, writer, overwrite=overwrite, source=source)


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


def _write_files(
    target: Path,
    tensors: StateDict,
    described: Mapping[str, Spec],
    shards: Sequence[Sequence[str]],
    header: Mapping[str, str],
    writer: _Writer,
    *,
    overwrite: bool,
) -> Path:
    """Write beside the target under temporary names, then publish."""
    single, index = target, target.with_name(target.name + ".index.json")
    if not overwrite:
        _refuse_existing((single, index))
    finals, main = _layout(target, shards)
    temporary = [(writer.temporary(path), path) for path in (*finals, main)]
    with writer.cleaning([path for path, _ in temporary]):
        writer.fill([path for path, _ in temporary[: len(shards)]], tensors, described, shards, header, target)
        if main == index:
            with suppress(FileNotFoundError):
                temporary[-1][0].unlink()  # of a writer that was killed
            with flushed_file(temporary[-1][0]) as handle:
                handle.write(_index(described, finals, shards, header))
        _publish(temporary[:-1], temporary[-1], (single, index), overwrite=overwrite)
    return main


def _write_folder(
    target: Path,
    tensors: StateDict,
    described: Mapping[str, Spec],
    shards: Sequence[Sequence[str]],
    header: Mapping[str, str],
    writer: _Writer,
    *,
    overwrite: bool,
    source: str | os.PathLike[str] | None,
) -> Path:
    """Write a hidden folder beside the target, then rename it."""
    _check_replaceable(target, overwrite=overwrite)
    carried = _carried(source)
    folder = writer.temporary(target)
    folder.mkdir(exist_ok=writer.resume is not None)
    with writer.cleaning([folder]):
        finals, main = _layout(folder / f"model{_SUFFIX}", shards)
        writer.fill(finals or [main], tensors, described, shards, header, target)
        for path in folder.iterdir():  # of a writer that was killed
            if path not in (finals or [main]):
                path.unlink()
        if finals:
            with flushed_file(main) as handle:
                handle.write(_index(described, finals, shards, header))
        types = {str(spec.dtype).removeprefix("torch.") for spec in described.values() if spec.floating}
        for name, content in carried:
            if name == "config.json" and len(types) == 1:
                content = with_storage_type(content, *types)
            with flushed_file(folder / name) as handle:
                handle.write(content)
        sync_folder(folder)
        with _locked(target.parent):
            _check_replaceable(target, overwrite=overwrite)
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
            _remove(target, _put_aside(target) if overwrite else [])
    return target


def _carried(source: str | os.PathLike[str] | None) -> tuple[tuple[str, bytes], ...]:
    if source is None:
        return ()
    url = url_of(source)
    if url is not None:
        from merging.remote import is_folder, remote_companions

        return tuple(remote_companions(url)) if is_folder(url) else ()
    return tuple(companions(Path(source))) if Path(source).is_dir() else ()


@dataclass(frozen=True)
class _Writer:
    """How files of weights are filled, and what becomes of temporary files."""

    given: Fill | None
    resume: str | None

    def temporary(self, path: Path) -> Path:
        if self.resume is None:
            return hidden(path)
        return path.with_name(f".{path.name}.{self.resume[:12]}.partial")

    def journal(self, target: Path) -> Path | None:
        if self.resume is None:
            return None
        return _journal(target, self.resume[:12])

    def fill(
        self,
        paths: Sequence[Path],
        tensors: StateDict,
        described: Mapping[str, Spec],
        shards: Sequence[Sequence[str]],
        header: Mapping[str, str],
        target: Path,
    ) -> None:
        if self.given is None:
            for path, members in zip(paths, shards, strict=True):
                with flushed_file(path) as handle:
                    write_safetensors(handle, tensors, header, members)
            return
        outlines = [outline_of({name: described[name] for name in members}, header) for members in shards]
        self.given(list(zip(paths, outlines, strict=True)), self.journal(target))

    @contextmanager
    def cleaning(self, paths: Sequence[Path]) -> Iterator[None]:
        """Remove temporary files at the end, unless a merge that can go on was interrupted."""
        try:
            yield
        except BaseException as error:
            if self.resume is None or isinstance(error, Exception):
                _discard(paths)
            raise
        _discard(paths)

    @contextmanager
    def alone(self, target: Path) -> Iterator[_Writer]:
        """Refuse a second writer of the same thing; at the end, remove journals and what they speak of.

        Gives the writer to use: one that keeps nothing, if the file system cannot lock.
        """
        journal = self.journal(target)
        if journal is None:
            yield self
            return
        held = _hold(journal, _BUSY)
        if held is None:
            _discard([journal])
            yield replace(self, resume=None)
            return
        if held is False:
            raise CheckpointError(f"{target}: another process is writing just this: wait until it is done")
        try:
            yield self
        except BaseException as error:
            if isinstance(error, Exception):
                _discard([journal])
            else:
                logger.warning("%s: interrupted; the same command goes on from the hidden files beside it", target)
            raise
        else:
            _discard([path for path in leftovers(target) if path.name.split(".")[-2] == journal.name.split(".")[-2]])
            _discard([journal])
            _tidy(target)
        finally:
            os.close(held)


def leftovers(target: Path) -> list[Path]:
    """Temporary files of interrupted writers of a target: what :func:`save_checkpoint` would go on from, and others."""
    pattern = re.compile(_hidden_names(target, 12, "(partial|journal)"))
    return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name))


def _hidden_names(target: Path, digits: int, suffix: str) -> str:
    """The hidden names of a target's file, shards and index, or of its folder, as a regular expression."""
    name = re.escape(target.name.removesuffix(_SUFFIX))
    shards = rf"(-\d{{5}}-of-\d{{5}})?{re.escape(_SUFFIX)}(\.index\.json)?" if target.suffix == _SUFFIX else ""
    return rf"\.{name}{shards}\.[0-9a-f]{{{digits}}}\.{suffix}"


def _tidy(target: Path) -> None:
    """Remove what interrupted writers of a target left, unless they are at work."""
    found: dict[str, list[Path]] = {}
    for path in leftovers(target):
        found.setdefault(path.name.split(".")[-2], []).append(path)
    for key, paths in found.items():
        journal = _journal(target, key)
        with suppress(OSError):
            held = _hold(journal, 0.0)
            if held is None or held is False:
                continue
            try:
                _discard([*paths, journal])
            finally:
                os.close(held)


def _journal(target: Path, key: str) -> Path:
    return target.with_name(f".{target.name}.{key}.journal")


def _hold(path: Path, patience: float) -> int | Literal[False] | None:
    """Lock a file, which is created if need be: a descriptor, or false if it is locked, ``None`` if nothing can be.

    Raises:
        OSError: it cannot be created.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    until = time.monotonic() + patience
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(descriptor)
                return False
            time.sleep(_PAUSE)
        except OSError:  # some network file systems cannot lock
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # locked by another process, or removed by one before it was locked here


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _discard(paths: Sequence[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _layout(target: Path, shards: Sequence[Sequence[str]]) -> tuple[list[Path], Path]:
    """Final names: the shards (none if one file holds everything), and the file to open."""
    if len(shards) == 1:
        return [], target
    stem = target.name.removesuffix(_SUFFIX)
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}{_SUFFIX}" for number in range(1, len(shards) + 1)]
    return [target.with_name(name) for name in names], target.with_name(stem + SAFETENSORS_INDEX)


def _publish(
    shards: Sequence[tuple[Path, Path]], main: tuple[Path, Path], names: tuple[Path, Path], *, overwrite: bool
) -> None:
    """Rename temporary files to their final names, the index last; what they replace is removed at the end.

    Shards whose names are taken by the old checkpoint are never replaced under the old index: that is moved aside
    first.
    """
    folder = main[1].parent
    aside: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    with _locked(folder):
        previous = _previous(names) if overwrite else []
        if not overwrite:
            _refuse_existing(names)
        try:
            taken = [path for _, path in shards if os.path.lexists(path)]
            if taken and overwrite:
                for path in (*(path for path in names if os.path.lexists(path)), *taken):
                    aside.append((hidden(path, "old"), path))
                    os.rename(path, aside[-1][0])
                sync_folder(folder)
            for temporary, path in shards:
                _place(temporary, path)
                placed.append(path)
            if shards:
                sync_folder(folder)
            if overwrite:
                os.replace(*main)
            else:
                _place(*main)
        except BaseException:
            for path in placed:
                with suppress(FileNotFoundError):
                    path.unlink()
            for backup, path in reversed(aside):
                if os.path.lexists(backup):
                    os.rename(backup, path)
            raise
        confirm(main[1])
        current = {main[1], *placed}
        stale = [*(path for path in previous if path not in current), *(backup for backup, _ in aside)]
        _remove(main[1], [*stale, *(_put_aside(names[0]) if overwrite else ())])


def _put_aside(target: Path) -> list[Path]:
    """What writers that were killed while they replaced a target put aside (no other does so now: see _locked)."""
    return sorted(path for path in target.parent.iterdir() if re.fullmatch(_hidden_names(target, 8, "old"), path.name))


def _remove(target: Path, stale: Sequence[Path]) -> None:
    """Remove what a target that is in its place has replaced."""
    for path in stale:
        try:
            with suppress(FileNotFoundError):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            raise CheckpointError(
                f"{target}: this was written, but what it replaces could not be removed ({path.name}: "
                f"{error.strerror}): remove that yourself"
            ) from error


def _place(temporary: Path, final: Path) -> None:
    """Give a file its final name, unless something else is there already (its temporary name may remain)."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        if not os.path.samefile(temporary, final):  # else: a writer was killed just after this
            raise _exists(final) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(final):
            raise _exists(final) from None
        os.rename(temporary, final)


def _previous(names: tuple[Path, Path]) -> list[Path]:
    """The files of the checkpoint under these names: file, index, and the shards that follow the convention."""
    single, index = names
    stem = re.escape(single.name.removesuffix(_SUFFIX))
    pattern = re.compile(stem + r"-\d{5}-of-\d{5}" + re.escape(_SUFFIX))
    found = [path for path in names if os.path.lexists(path)]
    if index in found:
        found += [path for path in sorted(index.parent.iterdir()) if pattern.fullmatch(path.name)]
    return found


def _refuse_existing(paths: Sequence[Path]) -> None:
    for path in paths:
        if os.path.lexists(path):
            raise _exists(path)


def _check_replaceable(target: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise CheckpointError(
            f"{target}: this is a file or a link, where a folder would be written: choose another name, or one that "
            f"ends in {_SUFFIX}"
        )
    inside = sorted(path.name for path in target.iterdir())
    if not inside:
        return
    if not overwrite:
        raise _exists(target)
    others = foreign(target)
    if others:
        raise CheckpointError(
            f"{target}: the folder holds more than a checkpoint ('{others[0]}'), so it is not replaced: choose another "
            "target, or remove it yourself"
        )
    if not any(name.endswith((_SUFFIX, ".bin", *INDEX_SUFFIXES)) for name in inside):
        raise CheckpointError(
            f"{target}: the folder holds no checkpoint, so it is not replaced: choose another target, or empty it"
        )


def _exists(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: this exists already: choose another name, or allow it to be overwritten")


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


def _index(
    described: Mapping[str, Spec], finals: Sequence[Path], shards: Sequence[Sequence[str]], header: Mapping[str, str]
) -> bytes:
    content = {
        "metadata": {
            "mergebound": header["mergebound"],
            "total_size": sum(spec.nbytes for spec in described.values()),
        },
        "weight_map": {name: path.name for path, members in zip(finals, shards, strict=True) for name in members},
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{target}: writing failed ({error.strerror}), and nothing was written: check free space and permissions"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other writers from publishing in the same folder at the same time, where the system can.

    Raises:
        OSError: another one has not come to an end for minutes.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        attempt = _attempt()
        until = time.monotonic() + _LOCKED
        while attempt is not None and not attempt(descriptor):
            if time.monotonic() >= until:
                raise OSError(errno.EBUSY, "another process holds the folder")
            time.sleep(_PAUSE)
        yield
    finally:
        os.close(descriptor)  # which also unlocks


def _attempt() -> Callable[[int], bool] | None:
    """Tries to lock; whether that is done (or cannot be)."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None

    def attempt(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # some network file systems
            return True
        return True

    return attempt
