"""The unfinished file of a download: ``NAME.part``, what it is a part of, and its checksum; locks between processes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from experiments.tasks.transfer import Version
from theory.errors import MergeboundError


def verify(path: Path, *, md5: str | None = None, sha256: str | None = None, size: int | None = None) -> str | None:
    """What is wrong with a file in one clause, None where size and checksums are as given.

    Raises:
        OSError: it cannot be read.
    """
    found = path.stat().st_size
    if size is not None and found != size:
        return f"it has {found} bytes, not {size}"
    for kind, wanted in (("sha256", sha256), ("md5", md5)):
        if wanted is None:
            continue
        digest = hashlib.new(kind, usedforsecurity=False)
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
        got = digest.hexdigest()
        if got != wanted.lower():
            return f"its {kind} is {got}, not {wanted.lower()}"
    return None


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock file beside ``path``; the system lets go of it when its holder dies, so that none stays behind.

    Raises:
        MergeboundError: another process holds it for longer than ``seconds``.
    """
    from filelock import FileLock, Timeout

    lock = path.with_name(f".{path.name}.lock")
    try:
        with FileLock(lock, timeout=seconds):
            yield
    except Timeout as error:
        raise MergeboundError(
            f"{path}: another process has been working on it for over {seconds:g} s ({lock.name} is held); wait for it "
            "or end it, then run the command again"
        ) from error


@dataclass(frozen=True)
class Partial:
    """A file that is wanted, and its ``.part`` as far as it has come.

    Attributes:
        target: where the file goes.
        md5, sha256, size: as published, None where unknown.
    """

    target: Path
    md5: str | None
    sha256: str | None
    size: int | None

    @property
    def part(self) -> Path:
        """The bytes so far."""
        return self.target.with_name(f"{self.target.name}.part")

    @property
    def state(self) -> Path:
        """Which bytes they are."""
        return self.target.with_name(f"{self.target.name}.part.json")

    @property
    def sealed(self) -> bool:
        """Whether wrong bytes would be noticed."""
        return bool(self.md5 or self.sha256)

    def check(self, path: Path) -> None:
        """Refuse a file of another size or checksum.

        Raises:
            MergeboundError: it is; names it.
        """
        wrong = verify(path, md5=self.md5, sha256=self.sha256, size=self.size)
        if wrong:
            raise MergeboundError(f"{path}: {wrong}; remove it to download it anew")

    def have(self) -> int:
        """Bytes so far."""
        return self.part.stat().st_size if self.part.exists() else 0

    def begun(self, address: str) -> Version:
        """The version that the ``.part`` is of; with no total where it is of no use for this address."""
        try:
            record = json.loads(self.state.read_text())
            version = Version(str(record["etag"]), str(record["modified"]), record["total"])
            same = record["address"] == address
        except (OSError, ValueError, KeyError, TypeError):
            return Version()
        if same:
            return version
        return Version(total=version.total) if self.sealed else Version()

    def begin(self, address: str, version: Version) -> None:
        """An empty ``.part`` of a version, which is written down before the first byte."""
        with self.part.open("wb"):
            pass
        record = {"address": address, "etag": version.etag, "modified": version.modified, "total": version.total}
        fresh = self.state.with_name(f"{self.state.name}.new")
        fresh.write_text(json.dumps(record))
        fresh.replace(self.state)

    def drop(self) -> None:
        """Forget what has come."""
        for path in (self.state, self.part):
            path.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the file its name, when its bytes are on the disk."""
        with self.part.open("rb+") as stream:
            os.fsync(stream.fileno())
        self.part.replace(self.target)
        self.state.unlink(missing_ok=True)
        with suppress(OSError):
            folder = os.open(self.target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
