"""What lies where a store is to be copied to: read before anything is written, so that no copy is lost to another."""

from __future__ import annotations

import json
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.engines.errors import EngineError
from experiments.store.database import DATABASE

BESIDE = ("-wal", "-shm")
"""What SQLite leaves beside a database that is at work or whose process was killed."""


@dataclass(frozen=True)
class Held:
    """What a database holds, as far as a copy over it could lose it.

    Attributes:
        name: of its grid.
        digests: of its specification and of those that it has grown from.
        results: digest and content of every run that is done.
        merges: keys of its rows about merges.
    """

    name: str = ""
    digests: frozenset[str | None] = frozenset()
    results: frozenset[tuple[str, str]] = frozenset()
    merges: frozenset[str] = frozenset()


def held_by(file: Path) -> Held:
    """What a store's database holds.

    Raises:
        sqlite3.Error: it is none.
    """
    with closing(sqlite3.connect(file)) as connection:
        row = connection.execute("SELECT value FROM meta WHERE key = 'meta'").fetchone()
        results = connection.execute("SELECT r.digest, s.content FROM results s JOIN runs r ON r.id = s.run").fetchall()
        merges = connection.execute("SELECT key FROM merges").fetchall()
    about: dict[str, Any] = json.loads(row[0]) if row else {}
    return Held(
        str((about.get("grid") or {}).get("name", "")),
        frozenset([about.get("digest"), *about.get("extended", [])]),
        frozenset((str(run), str(content)) for run, content in results),
        frozenset(str(row[0]) for row in merges),
    )


def there(system: Any, target: str, url: str) -> Held | None:
    """What is held where a store is to be copied to; ``None`` where there is no database.

    Args:
        system: of fsspec.
        target: folder in it.
        url: of the folder, for messages.

    Raises:
        EngineError: a file of the database's name that is no store's.
        OSError: the other side refuses.
    """
    if stamp(system, target) is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / DATABASE
        for end in ("", BESIDE[0]):  # what a killed process had not written into the database itself counts too
            try:
                system.get_file(f"{target}/{DATABASE}{end}", f"{file}{end}")
            except FileNotFoundError:
                continue
        try:
            return held_by(file)
        except (sqlite3.Error, ValueError) as error:
            raise EngineError(
                f"{url}: {DATABASE} there is not a store's database, or is damaged ({error}); give --mirror another "
                "folder, or replace it with --mirror-replace"
            ) from error


def stamp(system: Any, target: str) -> str | None:
    """What the other side says about the database there (size, time, version); ``None`` where there is none."""
    system.invalidate_cache()
    try:
        return str(sorted((str(key), str(value)) for key, value in system.info(f"{target}/{DATABASE}").items()))
    except FileNotFoundError:
        return None


def check_replaced(own: Held, found: Held, folder: str | Path, url: str) -> None:
    """Refuse a copy that would lose what is there.

    Args:
        own: of the store.
        found: of the place that it is to be copied to.
        folder, url: of both, for messages.

    Raises:
        EngineError: it is another grid's, or holds results or merges that the store lacks.
    """
    other = "give --mirror another folder, or lose what is there with --mirror-replace"
    if not own.digests & found.digests:
        raise EngineError(f"{url}: holds a copy of another grid, {found.name!r} ({len(found.results):,} runs); {other}")
    lost, merges = found.results - own.results, found.merges - own.merges
    if not lost and not merges:
        return
    parts = [f"{len(lost):,} of its {len(found.results):,} results"] if lost else []
    parts += [f"{len(merges):,} of its {len(found.merges):,} merges"] if merges else []
    back = (
        f"python -c \"import fsspec; fs, path = fsspec.core.url_to_fs('{url}'); fs.get(path + '/', 'out/back', "
        'recursive=True)"'
    )
    raise EngineError(
        f"{url}: {' and '.join(parts)} are not in {folder}, such as {_one(lost, merges)}, and a copy would lose them; "
        f"copy it back ({back}) and go on with that (`mergebound grid resume out/back`), or {other}"
    )


def _one(lost: frozenset[tuple[str, str]], merges: frozenset[str]) -> str:
    return f"run {min(lost)[0][:12]}" if lost else f"merge {min(merges)[:12]}"
