"""Where bytes of a download come from: http(s) addresses, ``file://`` addresses and local paths, from any offset."""

from __future__ import annotations

import http.client
import os
import re
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from theory.errors import MergeboundError

AGENT = "mergebound"
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP answers after which another attempt may succeed."""


class TransferError(MergeboundError):
    """A source did not deliver.

    Attributes:
        passing: whether another attempt may succeed.
        wait: seconds that the server asks to wait, None where it says nothing.
        anew: whether what has come so far is of no use any more.
    """

    def __init__(self, message: str, *, passing: bool, wait: float | None = None, anew: bool = False) -> None:
        super().__init__(message)
        self.passing = passing
        self.wait = wait
        self.anew = anew


@dataclass(frozen=True)
class Version:
    """What tells whether the bytes of an address are still the same.

    Attributes:
        etag: strong ETag, empty where there is none.
        modified: Last-Modified as the server writes it, or a file's time in nanoseconds.
        total: bytes of the whole file, None where the server does not say.
    """

    etag: str = ""
    modified: str = ""
    total: int | None = None

    @property
    def known(self) -> bool:
        """Whether a change would be noticed."""
        return bool(self.etag or self.modified)

    def same(self, other: Version) -> bool:
        """Whether the other is of the same bytes, as far as one can know."""
        if self.total is not None and other.total is not None and self.total != other.total:
            return False
        if self.etag and other.etag:
            return self.etag == other.etag
        return bool(self.modified) and self.modified == other.modified


@dataclass(frozen=True)
class Opened(AbstractContextManager["Opened"]):
    """A source that is open.

    Attributes:
        start: offset of the first byte that ``read`` gives.
        version: of the whole file.
        read: next bytes, at most so many; empty at the end.
        close: lets go.
        framed: whether a cut connection raises (chunked), although ``version.total`` is unknown.
    """

    start: int
    version: Version
    read: Callable[[int], bytes]
    close: Callable[[], None]
    framed: bool = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def local_path(source: str) -> Path | None:
    """The path of a ``file://`` address or of a plain path; None for http(s).

    Raises:
        MergeboundError: another scheme, or ``file://`` with another machine's name.
    """
    parts = urlsplit(source)
    if parts.scheme in ("http", "https"):
        if not parts.hostname:
            raise MergeboundError(f"{source}: an address without a host; give http(s)://host/path or a local path")
        return None
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise MergeboundError(f"{source}: names another machine; write file:///path for a local file")
        return Path(unquote(parts.path))
    if "://" in source:
        raise MergeboundError(f"{source}: {parts.scheme} is not supported; give http, https, file or a local path")
    return Path(source)


def open_source(source: str, offset: int, expected: Version, *, timeout: float, plain_http: bool) -> Opened:
    """Open a source, from an offset where that is possible and the bytes are those expected.

    Args:
        source: address or path.
        offset: where to go on; 0 for the whole.
        expected: the version that the first ``offset`` bytes are of.
        timeout: seconds for connecting and for each read.
        plain_http: whether https may be redirected to http (sensible only where a checksum is known).

    Raises:
        TransferError: no connection, an error of the server, or no such file.
    """
    path = local_path(source)
    if path is not None:
        return _open_file(path, offset, expected)
    return _open_http(source, offset, expected, timeout, plain_http)


def _open_file(path: Path, offset: int, expected: Version) -> Opened:
    try:
        stream = path.open("rb")
        status = os.fstat(stream.fileno())
    except OSError as error:
        raise TransferError(f"{path}: cannot be read ({error.strerror}); check the path", passing=False) from error
    version = Version(modified=str(status.st_mtime_ns), total=status.st_size)
    start = offset if offset and offset <= status.st_size and version.same(expected) else 0
    stream.seek(start)
    return Opened(start, version, stream.read, stream.close)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Only to http(s), and from https to http only where that is allowed."""

    def __init__(self, plain_http: bool) -> None:
        self._plain_http = plain_http

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urlsplit(newurl).scheme
        if scheme not in ("http", "https"):
            raise TransferError(f"{req.full_url}: redirected to {newurl}, which is not http(s)", passing=False)
        if scheme == "http" and urlsplit(req.full_url).scheme == "https" and not self._plain_http:
            raise TransferError(
                f"{req.full_url}: redirected from https to {newurl}; refused since no checksum is known", passing=False
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open_http(source: str, offset: int, expected: Version, timeout: float, plain_http: bool) -> Opened:
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if expected.known:
            headers["If-Range"] = expected.etag or expected.modified
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(plain_http),
    ):
        opener.add_handler(handler)
    try:
        response = opener.open(urllib.request.Request(source, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:
                said = f"{source}: the server has nothing after byte {offset}, the file has changed"
                raise TransferError(said, passing=True, wait=0.0, anew=True) from error
            raise TransferError(
                f"{source}: the server answered {error.code} ({_one_line(error.reason)})",
                passing=error.code in PASSING,
                wait=_seconds(error.headers.get("Retry-After")),
            ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        unknown = isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN
        lasting = unknown or isinstance(reason, ssl.SSLCertVerificationError | http.client.InvalidURL)
        raise TransferError(f"{source}: no connection ({_one_line(reason)})", passing=not lasting) from error
    if response is None:
        raise TransferError(f"{source}: this answer of the server is not understood", passing=False)
    try:
        return _opened(source, response, offset)
    except BaseException:
        response.close()
        raise


def _opened(source: str, response: Any, offset: int) -> Opened:
    length = response.headers.get("Content-Length")
    framed = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
    size = int(length) if length is not None and length.isdecimal() and not framed else None
    if response.status == 206:
        range_ = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if not range_ or not offset or int(range_[1]) != offset:
            said = response.headers.get("Content-Range")
            raise TransferError(f"{source}: the server sent the wrong part of the file ({said})", passing=True)
        total = None if range_[3] == "*" else int(range_[3])
        if total is not None and int(range_[2]) != total - 1:
            framed, size = False, None  # a shorter part than asked for: the rest comes with the next attempt
        return Opened(offset, _version(response.headers, total), response.read1, response.close, framed)
    if response.status != 200:
        raise TransferError(f"{source}: the server answered {response.status}", passing=False)
    return Opened(0, _version(response.headers, size), response.read1, response.close, framed)


def _version(headers: Any, total: int | None) -> Version:
    etag = headers.get("ETag", "").strip()
    return Version("" if etag.startswith("W/") else etag, headers.get("Last-Modified", "").strip(), total)


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.strip().isdecimal() else None


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split()) or type(reason).__name__
