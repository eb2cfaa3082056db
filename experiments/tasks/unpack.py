"""Unpacking archives from elsewhere: nothing leaves the folder, no link leads out, a half never looks like a whole.

Everything is unpacked into a hidden folder beside its destination and renamed into place when the archive has been
read to its end: what was interrupted leaves a hidden folder, which the next call removes.
"""

from __future__ import annotations

import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from experiments.tasks.download import SPARE
from experiments.tasks.partial import locked
from theory.errors import MergeboundError

TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
SUFFIXES = (".zip", *TAR, ".gz")
"""What can be unpacked."""

RATIO = 250
"""An archive may unpack to so many times its size, and to :data:`FREE` in any case."""
FREE = 1 << 30
MEMBERS = 3_000_000
"""Most files in one archive."""
LOCK_SECONDS = 3600.0

_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    OSError,
    KeyError,
    ValueError,
)


def kind(name: str) -> str | None:
    """The suffix of an archive that can be unpacked, None for other files.

    >>> kind("images.tar.gz"), kind("train-labels.gz"), kind("train.mat")
    ('.tar.gz', '.gz', None)
    """
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)


def unpack(archive: Path, folder: Path, *, most: int | None = None, lock: Path | None = None) -> tuple[str, ...]:
    """Unpack a .zip, .tar (also gzip, bzip2, xz), or a .gz of one file, into a folder.

    Files that are there already are replaced, others are left alone.

    Args:
        archive: the file.
        folder: made if it is not there.
        most: bytes that the archive may unpack to; default :data:`RATIO` times its size and at least :data:`FREE`.
        lock: the file whose lock is held meanwhile (see :func:`~experiments.tasks.partial.locked`); default one in
            ``folder``.

    Returns:
        Names of the top entries, relative to ``folder``.

    Raises:
        MergeboundError: damaged, cut short or another format; a member that is a symbolic link or device, or
            that would lie outside; more bytes than ``most`` or than the disk has room for.  Names the archive; nothing
            is left.
    """
    suffix = kind(archive.name)
    if suffix is None:
        raise MergeboundError(f"{archive}: not an archive that can be unpacked ({', '.join(SUFFIXES)})")
    try:
        size = archive.stat().st_size
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MergeboundError(f"{archive}: cannot be unpacked into {folder} ({error.strerror})") from error
    if not size:
        raise MergeboundError(f"{archive}: is empty; remove it and get the data set again")
    room = shutil.disk_usage(folder).free - SPARE
    budget = _Budget(archive, most if most is not None else max(FREE, RATIO * size), room)
    hidden = folder / f".{archive.name}.unpacking"
    with locked(lock or folder / archive.name, LOCK_SECONDS), _hidden(hidden) as inside:
        try:
            if suffix == ".zip":
                _zip(archive, inside, budget)
            elif suffix == ".gz":
                _gzip(archive, inside, budget)
            else:
                _tar(archive, inside, budget)
        except MergeboundError:
            raise
        except tarfile.FilterError as error:
            raise MergeboundError(f"{archive}: {_one_line(error)}; do not use this archive") from error
        except _BROKEN as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise MergeboundError(f"{archive}: cannot be unpacked into {folder} ({error.strerror})") from error
            advice = "remove it and get the data set again"
            raise MergeboundError(f"{archive}: damaged or cut short ({_one_line(error)}); {advice}") from error
        names = tuple(sorted(entry.name for entry in inside.iterdir()))
        if not names:
            raise MergeboundError(f"{archive}: holds no files; remove it and get the data set again")
        _merge(inside, folder)
    return names


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Budget:
    """Bytes and members that may still come."""

    def __init__(self, archive: Path, most: int, room: int) -> None:
        self._archive, self._most, self._room = archive, most, room
        self._bytes = self._members = 0

    def take(self, size: int, members: int = 0) -> None:
        self._bytes += size
        self._members += members
        if self._bytes > self._most or self._members > MEMBERS:
            raise MergeboundError(
                f"{self._archive}: unpacks to over {self._most / 1e9:.2f} GB or {MEMBERS} files, which looks like an "
                "attack; unpack it by hand if you trust it"
            )
        if self._bytes > self._room:
            raise MergeboundError(
                f"{self._archive}: needs over {self._room / 1e9:.2f} GB, which the disk does not have; make room"
            )


@contextmanager
def _hidden(folder: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _inside(archive: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "\0" in name or (path.parts and path.parts[0].endswith(":")):
        raise MergeboundError(f"{archive}: its member {name!r} would lie outside the folder; do not use this archive")
    return path


def _zip(archive: Path, inside: Path, budget: _Budget) -> None:
    with zipfile.ZipFile(archive) as opened:
        members = opened.infolist()
        for member in members:
            _inside(archive, member.filename)
            mode = member.external_attr >> 16
            if stat.S_ISLNK(mode):
                raise MergeboundError(f"{archive}: its member {member.filename!r} is a link; do not use this archive")
            if member.flag_bits & 1:
                raise MergeboundError(f"{archive}: is encrypted; unpack it by hand")
            budget.take(member.file_size, 1)
        for member in members:
            opened.extract(member, inside)


def _tar(archive: Path, inside: Path, budget: _Budget) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise MergeboundError(f"{archive}: unpacking it safely needs Python 3.11.4 or later; update Python")
    with tarfile.open(archive, "r:*") as opened:
        while (member := opened.next()) is not None:
            _inside(archive, member.name)
            if member.islnk():  # to a member that lies inside: there are no other links that could lead out
                _inside(archive, member.linkname)
            if member.issym():
                raise MergeboundError(f"{archive}: its member {member.name!r} is a link; do not use this archive")
            budget.take(member.size, 1)
            if member.name.strip("./"):
                opened.extract(member, inside, set_attrs=True, filter="data")
            opened.members = []  # type: ignore[attr-defined]  # the list of members would grow with the archive
        stream: IO[bytes] = opened.fileobj  # type: ignore[assignment]
        if stream.tell() < opened.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without the mark of its end")
        while rest := stream.read(1 << 20):  # to the checksum of the compression
            budget.take(len(rest))


def _gzip(archive: Path, inside: Path, budget: _Budget) -> None:
    with gzip.open(archive, "rb") as source, (inside / archive.name[: -len(".gz")]).open("wb") as target:
        while piece := source.read(1 << 20):
            budget.take(len(piece))
            target.write(piece)


def _merge(source: Path, target: Path) -> None:
    """Rename what is in ``source`` into ``target``; only folders that are in both are entered."""
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if entry.is_dir() and place.is_dir() and not place.is_symlink():
            _merge(entry, place)
            continue
        if place.is_dir():
            raise MergeboundError(f"{place}: is a folder where the archive has a file; move it away")
        if entry.is_dir() and place.exists():
            raise MergeboundError(f"{place}: is a file where the archive has a folder; move it away")
        entry.replace(place)
