"""Hashes of weights on this machine: the first use records one, every later use compares ("trust on first use").

That notices a file that changes between two uses.  It does not say that the first one was right: where the source
publishes a SHA-256, give it, and it is compared before anything is recorded.
"""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.bases.base import BaseError
from experiments.bases.waiting import alone
from merging.writer import atomic_file

_WAIT = 30.0
_DIGITS = re.compile(r"[0-9a-f]{6,64}")


def cache_folder() -> Path:
    """Where bases are kept: ``MERGEBOUND_CACHE``, else ``~/.cache/mergebound``."""
    given = os.environ.get("MERGEBOUND_CACHE", "")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "mergebound"


def default_record() -> Path:
    """The file that hashes are recorded in: ``bases.lock.json`` of :func:`cache_folder`."""
    return cache_folder() / "bases.lock.json"


def read_record(path: Path) -> dict[str, dict[str, Any]]:
    """All entries by name; empty where nothing was recorded yet.

    Raises:
        BaseError: damaged; names the file.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BaseError(f"{path}: cannot be read ({error}); repair or remove it") from error
    if not isinstance(content, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in content.values()
    ):
        raise BaseError(f"{path}: is not a record of hashes; repair or remove it")
    return content


def check_hash(found: str, expected: str, source: object) -> None:
    """Compare with a hash that was published or given; a beginning of six digits or more is enough.

    Raises:
        BaseError: it is no hash, or another one.
    """
    wanted = expected.lower().removeprefix("sha256:")
    if not _DIGITS.fullmatch(wanted):
        raise BaseError(f"sha256: {expected!r} is not a SHA-256; give 64 hexadecimal digits, or the first 6 or more")
    if not found.startswith(wanted):
        raise BaseError(
            f"{source}: its SHA-256 is {found}, not {wanted} as expected; the file is damaged or another one, so get "
            "it again"
        )


def remember(record: Path, name: str, found: str, size: int, source: str) -> str:
    """Record a hash, or compare it with the one recorded first.

    Args:
        record: the file of records; its folder is made.
        name: of the weights.
        found: SHA-256 of the file that is used now.
        size: bytes of that file.
        source: where it came from, for the record.

    Returns:
        What was done, in words.

    Raises:
        BaseError: another hash was recorded before; names when, and what to do.
    """
    record.parent.mkdir(parents=True, exist_ok=True)
    with alone(record.with_name(f".{record.name}.lock"), _WAIT):
        entries = read_record(record)
        if name in entries:
            first = entries[name]
            if first["sha256"] != found:
                raise BaseError(
                    f"{name}: its SHA-256 is {found}, but on {first.get('date', 'an earlier day')} it was "
                    f"{first['sha256']}; if the new file is the right one, give its SHA-256, or remove the entry from "
                    f"{record}"
                )
            return f"the SHA-256 is the one recorded on {first.get('date', 'an earlier day')}"
        date = datetime.now(UTC).date().isoformat()
        entries[name] = {"sha256": found, "bytes": size, "source": source, "date": date}
        _write(record, entries)
    return "the SHA-256 was recorded (trust on first use: it is compared from now on)"


def replace_entry(record: Path, name: str, found: str, size: int, source: str) -> None:
    """Record a hash that was checked against a given one, whatever was recorded before."""
    record.parent.mkdir(parents=True, exist_ok=True)
    with alone(record.with_name(f".{record.name}.lock"), _WAIT):
        entries = read_record(record)
        if entries.get(name, {}).get("sha256") != found:
            date = datetime.now(UTC).date().isoformat()
            _write(record, entries | {name: {"sha256": found, "bytes": size, "source": source, "date": date}})


def _write(record: Path, entries: dict[str, dict[str, Any]]) -> None:
    with atomic_file(record) as handle:
        handle.write((json.dumps(entries, indent=2, sort_keys=True) + "\n").encode())
