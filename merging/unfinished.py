"""What writers leave that were killed or interrupted: found by name, gone on from, or removed."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from merging.errors import CheckpointError
from merging.file_locks import hold
from merging.lazy import Spec
from merging.shards import SUFFIX
from merging.types import StateDict
from merging.writer import (
    Outline,
    flushed_file,
    hidden,
    outline_of,
    write_safetensors,
)

_BUSY = 2.0  # seconds in which another process may look at a journal without writing what it is about

logger = logging.getLogger(__name__)

Fill = Callable[[Sequence[tuple[Path, Outline]], Path | None], None]
"""Fills files (temporary names, with their outlines); the second argument is where a journal may be kept."""


@dataclass(frozen=True)
class Writer:
    """How files of weights are filled, and what becomes of temporary files."""

    given: Fill | None
    resume: str | None

    def temporary(self, path: Path) -> Path:
        """The hidden name beside ``path`` under which a file or folder is written."""
        if self.resume is None:
            return hidden(path)
        return path.with_name(f".{path.name}.{self.resume[:12]}.partial")

    def journal(self, target: Path) -> Path | None:
        """Where a journal of a target is kept; ``None``: nowhere."""
        if self.resume is None:
            return None
        return journal_of(target, self.resume[:12])

    def fill(
        self,
        paths: Sequence[Path],
        tensors: StateDict,
        described: Mapping[str, Spec],
        shards: Sequence[Sequence[str]],
        header: Mapping[str, str],
        target: Path,
    ) -> None:
        """Write the files of weights, one per shard, complete and flushed."""
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
                discard(paths)
            raise
        discard(paths)

    @contextmanager
    def alone(self, target: Path) -> Iterator[Writer]:
        """Refuse a second writer of the same thing; at the end, remove journals and what they speak of.

        Gives the writer to use: one that keeps nothing, if the file system cannot lock.
        """
        journal = self.journal(target)
        if journal is None:
            yield self
            return
        held = hold(journal, _BUSY)
        if held is None:
            discard([journal])
            yield replace(self, resume=None)
            return
        if held is False:
            raise CheckpointError(f"{target}: another process is writing just this: wait until it is done")
        try:
            yield self
        except BaseException as error:
            if isinstance(error, Exception):
                discard([journal])
            else:
                logger.warning("%s: interrupted; the same command goes on from the hidden files beside it", target)
            raise
        else:
            discard([path for path in leftovers(target) if path.name.split(".")[-2] == journal.name.split(".")[-2]])
            discard([journal])
            _tidy(target)
        finally:
            os.close(held)


def leftovers(target: Path) -> list[Path]:
    """Temporary files of interrupted writers of a target: what :func:`save_checkpoint` would go on from, and others."""
    pattern = re.compile(hidden_names(target, 12, "(partial|journal)"))
    return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name))


def hidden_names(target: Path, digits: int, suffix: str) -> str:
    """The hidden names of a target's file, shards and index, or of its folder, as a regular expression."""
    name = re.escape(target.name.removesuffix(SUFFIX))
    shards = rf"(-\d{{5}}-of-\d{{5}})?{re.escape(SUFFIX)}(\.index\.json)?" if target.suffix == SUFFIX else ""
    return rf"\.{name}{shards}\.[0-9a-f]{{{digits}}}\.{suffix}"


def _tidy(target: Path) -> None:
    """Remove what interrupted writers of a target left, unless they are at work."""
    found: dict[str, list[Path]] = {}
    for path in leftovers(target):
        found.setdefault(path.name.split(".")[-2], []).append(path)
    for key, paths in found.items():
        journal = journal_of(target, key)
        with suppress(OSError):
            held = hold(journal, 0.0)
            if held is None or held is False:
                continue
            try:
                discard([*paths, journal])
            finally:
                os.close(held)


def journal_of(target: Path, key: str) -> Path:
    """The hidden journal of a writer, beside its target."""
    return target.with_name(f".{target.name}.{key}.journal")


def discard(paths: Sequence[Path]) -> None:
    """Remove files and folders, as far as that can be done."""
    for path in paths:
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
