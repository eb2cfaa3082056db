"""Bringing data sets of the catalogue to disk: what is there, what would come, and fetching it, stopped at any moment.

Notes lie in ``<root>/.mergebound/<name>/``: the archives while they are needed, and an ``<archive>.done.json`` for each
that was unpacked.  A data set whose files were put there by other means (torchvision, by hand) needs no notes; once
there are some, it is complete only when every archive is.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.tasks.download import SPARE, Limits, Progress, download
from experiments.tasks.partial import locked, verify
from experiments.tasks.unpack import kind, unpack
from experiments.tasks.vision_data import Archive, VisionData
from theory.errors import MergeboundError

_log = logging.getLogger(__name__)

ROOT_VARIABLE = "MERGEBOUND_DATA"
LOCK_SECONDS = 600.0
FileReport = Callable[[Archive, Progress], None]


def find_root(given: Path | None) -> Path:
    """The folder of the data sets: the one given, else the one that ``MERGEBOUND_DATA`` names.

    Raises:
        MergeboundError: neither is set.
    """
    named = os.environ.get(ROOT_VARIABLE, "")
    if given is None and not named:
        raise MergeboundError(f"no folder of data sets: give --root DIR or set {ROOT_VARIABLE} to it")
    return (given if given is not None else Path(named)).expanduser()


@dataclass(frozen=True)
class Standing:
    """How much of a data set lies below a root.

    Attributes:
        entry: the data set.
        root: the folder.
        missing: expected files and folders that are not there.
        halves: archives whose unpacking was interrupted.
        wanted: archives that are still to be fetched and unpacked.
    """

    entry: VisionData
    root: Path
    missing: tuple[str, ...]
    halves: tuple[str, ...]
    wanted: tuple[Archive, ...]

    @property
    def complete(self) -> bool:
        """Whether all is there."""
        return not self.missing and not self.wanted

    @property
    def begun(self) -> bool:
        """Whether something is there, but not all."""
        return not self.complete and len(self.missing) < len(self.entry.files)

    @property
    def to_download(self) -> int | None:
        """Bytes still to come, None where a size is unknown; what lies in a ``.part`` counts as there."""
        left = 0
        for archive in self.wanted:
            if archive.size is None:
                return None
            have = [path.stat().st_size for path in _places(self.entry, archive, self.root) if path.exists()]
            left += max(0, archive.size - max(have, default=0))
        return left

    @property
    def unknown(self) -> int:
        """How many archives have an unknown size."""
        return sum(archive.size is None for archive in self.wanted)


def standing(entry: VisionData, root: Path) -> Standing:
    """What is there and what is wanted; looks at names only."""
    missing = tuple(names for names in entry.files if not any(_there(root, name) for name in names.split("|")))
    if not missing and not _notes(entry, root).is_dir():
        return Standing(entry, root, (), (), ())
    records = {archive: _record(entry, archive, root) for archive in entry.archives}
    halves = tuple(each.filename for each, record in records.items() if record.get("state") == "unpacking")
    wanted = tuple(archive for archive, record in records.items() if not _done(archive, record, root))
    return Standing(entry, root, missing, halves, wanted)


def get(
    entry: VisionData,
    root: Path,
    *,
    keep_archives: bool = False,
    limits: Limits | None = None,
    progress: FileReport | None = None,
) -> Standing:
    """Download and unpack what is missing of a data set; interrupted at any moment, the next call goes on.

    Args:
        entry: of the catalogue.
        root: as torchvision's class of the data set is given it; made if it is not there.
        keep_archives: keep them, in ``<root>/.mergebound/<name>/``.
        limits: of waiting.
        progress: called with the archive and how far it is.

    Raises:
        MergeboundError: nothing may be downloaded for this data set (says what to do by hand), no room, no connection,
            wrong checksum, damaged archive, or files that are still missing afterwards.
    """
    before = standing(entry, root)
    if before.complete:
        return before
    if not entry.archives:
        raise MergeboundError(f"{entry.name}: cannot be downloaded automatically: {' '.join(entry.manual.split())}")
    notes = _notes(entry, root)
    try:
        notes.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MergeboundError(f"{root}: cannot be written ({error.strerror}); give another --root") from error
    with locked(notes / "get", (limits or Limits()).lock):
        before = standing(entry, root)
        check_room([before])
        for archive in before.wanted:
            _fetch(entry, archive, root, keep_archives, limits, progress)
    after = standing(entry, root)
    if after.missing:
        names = ", ".join(after.missing[:3]) + (" and more" if len(after.missing) > 3 else "")
        raise MergeboundError(
            f"{root}: all archives of {entry.title} are unpacked, but {names} is missing: the source has changed, or "
            f"files were removed since; remove {notes} and run the command again"
        )
    return after


def check_room(standings: list[Standing]) -> None:
    """Check that what is still to come fits, as far as sizes are known, before the first byte.

    Raises:
        MergeboundError: it does not.
    """
    for root in {each.root for each in standings}:
        folder = next(each for each in (root, *root.absolute().parents) if each.is_dir())
        free = shutil.disk_usage(folder).free
        need = sum(each.to_download or 0 for each in standings if each.root == root)
        if need > free - SPARE:
            raise MergeboundError(
                f"{root}: {need / 1e9:.2f} GB to download (more when unpacked) but {free / 1e9:.2f} GB free; make room "
                "or give another --root"
            )


def _fetch(
    entry: VisionData,
    archive: Archive,
    root: Path,
    keep: bool,
    limits: Limits | None,
    progress: FileReport | None,
) -> None:
    if Path(archive.filename).name != archive.filename or not archive.filename:
        raise MergeboundError(f"{entry.name}: {archive.url} names no file; report it")
    folder = root / archive.into
    packed = archive.unpack and kind(archive.filename) is not None
    hidden, placed = _places(entry, archive, root)[:2]
    found = placed.is_file()
    sums = {"md5": archive.md5, "sha256": archive.sha256, "size": archive.size}
    if found:
        wrong = verify(placed, md5=archive.md5, sha256=archive.sha256, size=archive.size)
        if wrong:
            raise MergeboundError(f"{placed}: {wrong}; remove it and run the command again")
    else:
        report = None if progress is None else lambda now: progress(archive, now)
        download((archive.url, *archive.mirrors), hidden, **sums, limits=limits, progress=report)  # type: ignore[arg-type]
    source = placed if found else hidden
    if packed:
        _note(entry, archive, root, {"state": "unpacking"})
        names = unpack(source, folder, lock=hidden)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        if not found:
            hidden.replace(placed)
        names = (archive.filename,)
    _note(entry, archive, root, {"state": "done", "url": archive.url, **sums, "entries": list(names)})
    if packed and not found and not keep:
        source.unlink(missing_ok=True)


def _there(root: Path, name: str) -> bool:
    path = root / name.rstrip("/")
    if not name.endswith("/"):
        return path.exists() or path.with_name(f"{path.name}.gz").exists()
    return path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir())


def _notes(entry: VisionData, root: Path) -> Path:
    return root / ".mergebound" / entry.name


def _places(entry: VisionData, archive: Archive, root: Path) -> tuple[Path, Path, Path]:
    """Where an archive may lie: our folder, torchvision's, and unfinished in ours."""
    hidden = _notes(entry, root) / archive.filename
    return hidden, root / archive.into / archive.filename, hidden.with_name(f"{hidden.name}.part")


def _record(entry: VisionData, archive: Archive, root: Path) -> dict[str, object]:
    try:
        record = json.loads((_notes(entry, root) / f"{archive.filename}.done.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _done(archive: Archive, record: dict[str, object], root: Path) -> bool:
    names = record.get("entries")
    if record.get("state") != "done" or not isinstance(names, list) or not names:
        return False
    return all((root / archive.into / str(name)).exists() for name in names)


def _note(entry: VisionData, archive: Archive, root: Path, record: dict[str, object]) -> None:
    path = _notes(entry, root) / f"{archive.filename}.done.json"
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(json.dumps(record, indent=1))
    fresh.replace(path)
