"""Downloads that can be interrupted at any moment and go on where they stopped.

While it runs, ``NAME`` is ``NAME.part`` beside ``NAME.part.json`` (address, ETag or Last-Modified, size): a later call
asks only for the rest where the server can do that and the file is still the same, and starts again otherwise.  A file
gets its name only when it is whole and its checksum right.  What was killed leaves a ``.part`` and nothing else.

A server that says neither how long a file is nor frames what it sends cannot be told from a cut connection: such a
file is taken only if its size or checksum is known.
"""

from __future__ import annotations

import errno
import http.client
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.tasks.partial import Partial, locked, verify
from experiments.tasks.transfer import Opened, TransferError, open_source
from theory.errors import MergeboundError

_log = logging.getLogger(__name__)

CHUNK = 1 << 18
MUCH = 1 << 20
"""Bytes that count as progress: attempts are counted anew after them."""
SPARE = 64 << 20
"""Bytes of the disk that are left free."""


@dataclass(frozen=True)
class Limits:
    """How long a download waits, in seconds, and how often it tries.

    Attributes:
        timeout: for a connection, and for each read.
        stalled: at least ``slowest`` bytes must come in this time.
        slowest: see ``stalled``.
        attempts: in a row without progress, per address.
        pause: before the second attempt; doubled each time, up to ``longest_pause``.
        longest_pause: see ``pause``; also the longest that a server's Retry-After is followed.
        lock: for another process that downloads the same file.
    """

    timeout: float = 30.0
    stalled: float = 60.0
    slowest: int = 16 << 10
    attempts: int = 5
    pause: float = 1.0
    longest_pause: float = 30.0
    lock: float = 600.0


@dataclass(frozen=True)
class Progress:
    """How far a download is: bytes on disk, bytes of the whole (None: unknown), bytes per second of this call."""

    done: int
    total: int | None
    rate: float


Report = Callable[[Progress], None]


def download(
    sources: str | Sequence[str],
    target: Path,
    *,
    md5: str | None = None,
    sha256: str | None = None,
    size: int | None = None,
    limits: Limits | None = None,
    progress: Report | None = None,
) -> Path:
    """Bring one file to disk, or find that it is there.

    Args:
        sources: address or addresses of the same bytes, tried in order: http(s), ``file://`` or local paths.
        target: where the file goes; its folder is made.
        md5, sha256: published checksums in hexadecimal; what does not match never gets the name ``target``.
        size: bytes, where known; a file of another size is refused.
        limits: of time and attempts.
        progress: called at most ten times a second.

    Returns:
        ``target``.

    Raises:
        MergeboundError: no source delivers the right bytes, too little space, another process holds the file for too
            long, or a file of that name is there with another checksum.
    """
    limits = limits or Limits()
    addresses = [sources] if isinstance(sources, str) else list(sources)
    want = Partial(target, md5, sha256, size)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target, limits.lock):
            if target.exists():
                want.check(target)
                return target
            failures: list[str] = []
            for address in addresses:
                try:
                    _from_one(address, want, limits, progress)
                    return target
                except TransferError as error:
                    failures.append(str(error))
                    _log.info("%s", error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "make room and run the command again: what is there is kept"
            raise MergeboundError(f"{target}: the disk is full; {advice}") from error
        raise MergeboundError(f"{target}: cannot be written ({error.strerror}); check the folder") from error
    more = f"; before it, {'; '.join(failures[:-1])}" if len(failures) > 1 else ""
    kept = "; what has come is kept, run the command again to go on" if want.part.exists() else ""
    raise MergeboundError(f"{target.name}: not downloaded: {failures[-1] if failures else 'no address'}{more}{kept}")


def _from_one(address: str, want: Partial, limits: Limits, progress: Report | None) -> None:
    """All attempts with one address."""
    failed, restarted, pause = 0, False, limits.pause
    meter = _Meter(progress)
    while True:
        before = want.have()
        try:
            resumed = _attempt(address, want, limits, meter)
        except TransferError as error:
            much = want.have() - before >= MUCH
            failed, pause = (1, limits.pause) if much else (failed + 1, pause)
            if error.anew:
                want.drop()
            if not error.passing or failed >= limits.attempts:
                raise
            _log.info("%s; attempt %d of %d follows", error, failed + 1, limits.attempts)
            time.sleep(min(error.wait if error.wait is not None else pause, limits.longest_pause))
            pause = min(2 * pause, limits.longest_pause)
            continue
        wrong = verify(want.part, md5=want.md5, sha256=want.sha256, size=want.size)
        if wrong is None:
            want.finish()
            return
        want.drop()
        if not resumed or restarted:
            raise TransferError(f"{address}: what came is not the published file, {wrong}; removed", passing=False)
        restarted = True  # the pieces may be of two versions: once more from the start
        _log.info("%s: %s; starting again", address, wrong)


def _attempt(address: str, want: Partial, limits: Limits, meter: _Meter) -> bool:
    """One connection; returns, when the file is whole, whether its beginning came from an earlier one."""
    begun = want.begun(address)
    usable = begun.known or (want.sealed and begun.total is not None)
    offset = want.have() if usable else 0
    if offset and offset == begun.total:
        return True
    with open_source(address, offset, begun, timeout=limits.timeout, plain_http=want.sealed) as source:
        version = source.version
        total = version.total if version.total is not None else (begun.total if source.start else None)
        changed = source.start and not (
            version.same(begun) or (want.sealed and not (version.known and begun.known) and total == begun.total)
        )
        if changed:
            said = f"{address}: the file has changed since its beginning came"
            raise TransferError(said, passing=True, wait=0.0, anew=True)
        total = total if total is not None else want.size
        if want.size is not None and total is not None and total != want.size:
            raise TransferError(f"{address}: has {total} bytes, not the published {want.size}", passing=False)
        if total is None and not source.framed and not want.sealed:
            raise TransferError(
                f"{address}: the server does not say how long the file is and no checksum is known, so that a cut "
                "connection would not be noticed",
                passing=False,
            )
        _check_room(want.part, total, source.start)
        if not source.start:
            want.begin(address, replace(version, total=total))
        _receive(address, source, want.part, total, limits, meter)
    return source.start > 0


def _receive(address: str, source: Opened, part: Path, total: int | None, limits: Limits, meter: _Meter) -> None:
    done = source.start
    meter.start(done, total)
    window, began = done, time.monotonic()
    with part.open("rb+") as stream:
        stream.truncate(done)
        stream.seek(done)
        while total is None or done < total or source.version.total is None:
            try:
                piece = source.read(CHUNK)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise TransferError(f"{address}: the connection broke ({reason})", passing=True) from error
            if not piece:
                break
            if total is not None and done + len(piece) > total:
                raise TransferError(f"{address}: sent more than the {total} bytes that it announced", passing=False)
            stream.write(piece)
            done += len(piece)
            meter.at(done)
            now = time.monotonic()
            if now - began > limits.stalled:
                if done - window < limits.slowest:
                    raise TransferError(f"{address}: stalled at {done} bytes", passing=True)
                window, began = done, now
    if total is not None and done < total:
        raise TransferError(f"{address}: the connection ended after {done} of {total} bytes", passing=True)
    meter.at(done, last=True)


def _check_room(part: Path, total: int | None, have: int) -> None:
    free = shutil.disk_usage(part.parent).free
    already = part.stat().st_size if part.exists() and not have else 0
    if total is not None and total - have > free + already - SPARE:
        raise MergeboundError(
            f"{part.parent}: {(total - have) / 1e9:.2f} GB to download but {free / 1e9:.2f} GB free; make room or give "
            "another --root"
        )


class _Meter:
    """Bytes, rate over this call, and when to tell."""

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self._began, self._told = time.monotonic(), 0.0
        self._last, self._got = 0, 0
        self._total: int | None = None

    def start(self, done: int, total: int | None) -> None:
        self._last, self._total = done, total

    def at(self, done: int, *, last: bool = False) -> None:
        self._got += done - self._last
        self._last = done
        now = time.monotonic()
        if self._report is not None and (last or now - self._told >= 0.1):
            self._told = now
            self._report(Progress(done, self._total, self._got / max(now - self._began, 1e-6)))
