"""Files that no run needs: what killed processes left behind."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from experiments.store.blobs import TEMPORARY, files, name_of, remove
from experiments.store.database import Database
from experiments.store.errors import StoreError
from experiments.store.leases import LIVE, SKEW, now

HOUR = 3600.0


@dataclass(frozen=True)
class Garbage:
    """What was found.

    Attributes:
        files: deleted, or to be deleted (``dry_run``), relative to the store's folder.
        bytes: of them.
        young: files that nobody needs yet, but that are too young to be deleted.
        strangers: files that are no blobs; they are left alone.
    """

    files: tuple[str, ...]
    bytes: int
    young: int
    strangers: tuple[str, ...]


def collect(database: Database, folder: Path, *, dry_run: bool = False, older_than: float = HOUR) -> Garbage:
    """Delete blobs that no row names and temporaries.

    The write lock of the database is held meanwhile: a runner that is about to commit waits, and then looks whether
    its blob is still there.  While somebody holds a lease, files stay for at least an hour.

    Args:
        database: of the store.
        folder: of the store.
        dry_run: delete nothing.
        older_than: seconds since a file was written, for it to be deleted.

    Raises:
        StoreError: a negative age, or the store may not be written to.
    """
    if not older_than >= 0:
        raise StoreError(f"older_than: {older_than!r} is no number of seconds; give 0 or more")
    if dry_run:
        return _sweep(database, folder, older_than, delete=False)
    with database.writing():
        return _sweep(database, folder, older_than, delete=True)


def _sweep(database: Database, folder: Path, older_than: float, *, delete: bool) -> Garbage:
    live = database.read(
        f"SELECT count(*) FROM cohorts WHERE missing > 0 AND {LIVE}",
        {"now": now(), "skew": SKEW},
    )[0][0]
    age = max(older_than, HOUR) if live else older_than
    needed = {row[0] for row in database.read("SELECT blob FROM results UNION SELECT blob FROM bases")}
    gone, strangers, young, size = [], [], 0, 0
    at = time.time()
    for path in (*files(folder), *sorted(folder.glob(f"{TEMPORARY}*"))):
        shown = path.relative_to(folder).as_posix()
        name = name_of(path)
        temporary = path.name.lstrip(".").startswith(TEMPORARY.lstrip("."))
        if name is None and not temporary:
            strangers.append(shown)
            continue
        if name in needed:
            continue
        try:
            found = path.stat()
        except FileNotFoundError:  # renamed or removed by another process
            continue
        if at - found.st_mtime < age:
            young += 1
            continue
        gone.append(shown)
        size += found.st_size
        if delete:
            remove(path)
    return Garbage(tuple(gone), size, young, tuple(strangers))
