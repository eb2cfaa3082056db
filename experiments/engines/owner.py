"""Names of runners that say which process they are, so that what a killed one held can be taken over at once."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

_FIELDS = 5


def owner_name() -> str:
    """A name for this process: host, space of process numbers, process, its start, a random part."""
    return ":".join([_host(), _space(), str(os.getpid()), _started(os.getpid()), secrets.token_hex(3)])


def is_gone(owner: str) -> bool:
    """Whether an owner was a process of this machine that does not run any more; false where that is not known."""
    parts = owner.split(":")
    if len(parts) != _FIELDS or parts[0] != _host() or parts[1] != _space() or not parts[2].isdigit():
        return False
    if not parts[1]:  # without /proc only the number is known, which may belong to another process by now
        return not _runs(int(parts[2]))
    return _started(int(parts[2])) != parts[3]


def short_name(owner: str) -> str:
    """Host and process of an owner, for people."""
    parts = owner.split(":")
    return f"{parts[0]}, process {parts[2]}" if len(parts) == _FIELDS else owner


def _host() -> str:
    return socket.gethostname().replace(":", "-") or "host"


def _space() -> str:
    """The boot and the name space that process numbers belong to."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:8]
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(process: int) -> str:
    """When a process was started, in ticks since the boot; empty if it is not there or has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
