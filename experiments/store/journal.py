"""Which journal a store's database gets: WAL where the file system can, a rollback journal where it cannot.

WAL lets readers and one writer work at the same time, but its index is shared memory: processes on two machines that
share a folder over a network do not see the same memory, and the database would be damaged.
"""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import Literal

from experiments.store.errors import StoreError

_LOG = logging.getLogger(__name__)
Journal = Literal["auto", "wal", "delete"]
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs")
"""File systems, as Linux names them, that may be shared by several machines; so are those of FUSE that say so."""
_SHARED_FUSE = ("fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.juicefs")


def file_system(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Type of the file system that holds a folder; empty where the system does not say."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
        place = folder.resolve()
    except OSError:
        return ""
    best, found = -1, ""
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(fields[1].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\"))
        if (place == point or point in place.parents) and len(point.parts) >= best:  # later mounts cover earlier ones
            best, found = len(point.parts), fields[2]
    return found


def choose_journal(connection: sqlite3.Connection, file: Path, wanted: Journal = "auto") -> str:
    """Set the journal of a database and how it waits for the disk.

    With WAL, ``synchronous=NORMAL``: a killed process loses nothing; a power cut may lose the last commits, never
    damage the file, and a run whose row was lost is absent and is done again (its weights, which are on the disk
    before the row is written, are then an orphan).  A rollback journal needs ``FULL`` for the same promise.

    Returns:
        ``wal`` or ``delete``, as it is in force.
    """
    current = str(connection.execute("PRAGMA journal_mode").fetchone()[0])
    kind = file_system(file.parent)
    shared = kind in NETWORK or kind in _SHARED_FUSE
    if wanted == "wal" and shared:
        raise StoreError(f"{file}: lies on {kind}, where a write-ahead log is not safe; leave the journal to 'auto'")
    mode = "delete" if wanted == "delete" or shared else "wal"
    new = connection.execute("PRAGMA user_version").fetchone()[0] == 0
    if current != mode:
        try:
            got = str(connection.execute(f"PRAGMA journal_mode = {mode}").fetchone()[0])
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # the shared memory is opened here
        except sqlite3.OperationalError as error:
            if "locked" in str(error) or "busy" in str(error):
                raise
            got = str(connection.execute("PRAGMA journal_mode = delete").fetchone()[0])
        mode = got
    if new and mode != "wal" and wanted != "delete":
        reason = f"it lies on {kind}" if shared else "the file system has no shared memory for a write-ahead log"
        _LOG.warning("%s: a rollback journal is used, because %s; many runners at once are slower", file, reason)
    connection.execute(f"PRAGMA synchronous = {'NORMAL' if mode == 'wal' else 'FULL'}")
    return mode
