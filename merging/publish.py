"""Temporary files get their final names, the index last; what they replace is removed at the end."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from merging.errors import CheckpointError
from merging.file_locks import locked_folder
from merging.folder import INDEX_SUFFIXES, foreign
from merging.shards import SUFFIX
from merging.unfinished import hidden_names
from merging.writer import (
    confirm,
    hidden,
    sync_folder,
)


def publish(
    shards: Sequence[tuple[Path, Path]], main: tuple[Path, Path], names: tuple[Path, Path], *, overwrite: bool
) -> None:
    """Rename temporary files to their final names, the index last; what they replace is removed at the end.

    Shards whose names are taken by the old checkpoint are never replaced under the old index: that is moved aside
    first.
    """
    folder = main[1].parent
    aside: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    with locked_folder(folder):
        previous = _previous(names) if overwrite else []
        if not overwrite:
            refuse_existing(names)
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
        remove_stale(main[1], [*stale, *(put_aside(names[0]) if overwrite else ())])


def put_aside(target: Path) -> list[Path]:
    """What writers that were killed while they replaced a target put aside (none does now: the folder is locked)."""
    return sorted(path for path in target.parent.iterdir() if re.fullmatch(hidden_names(target, 8, "old"), path.name))


def remove_stale(target: Path, stale: Sequence[Path]) -> None:
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
    stem = re.escape(single.name.removesuffix(SUFFIX))
    pattern = re.compile(stem + r"-\d{5}-of-\d{5}" + re.escape(SUFFIX))
    found = [path for path in names if os.path.lexists(path)]
    if index in found:
        found += [path for path in sorted(index.parent.iterdir()) if pattern.fullmatch(path.name)]
    return found


def refuse_existing(paths: Sequence[Path]) -> None:
    """Raise :class:`~merging.errors.CheckpointError` if a name is taken."""
    for path in paths:
        if os.path.lexists(path):
            raise _exists(path)


def check_replaceable(target: Path, *, overwrite: bool) -> None:
    """Refuse a folder that may not be replaced by a checkpoint.

    Raises:
        CheckpointError: a file or a link, a folder with something else in it, or a checkpoint without ``overwrite``.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise CheckpointError(
            f"{target}: this is a file or a link, where a folder would be written: choose another name, or one that "
            f"ends in {SUFFIX}"
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
    if not any(name.endswith((SUFFIX, ".bin", *INDEX_SUFFIXES)) for name in inside):
        raise CheckpointError(
            f"{target}: the folder holds no checkpoint, so it is not replaced: choose another target, or empty it"
        )


def _exists(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: this exists already: choose another name, or allow it to be overwritten")
