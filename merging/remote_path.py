"""Which paths are URLs, and how they are shown: without the parts that may hold credentials.

A ``pathlib.Path`` keeps one of the slashes behind the scheme; such paths are understood too, so that a URL can travel
wherever a path can.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.*)", re.DOTALL)  # one letter would be a drive


def url_of(path: str | os.PathLike[str]) -> str | None:
    """The URL that a path stands for, or ``None`` for a path of this machine.

    ``Path("s3://bucket/a")`` reads ``s3:/bucket/a``; that is a URL too, unless there is a folder named ``s3:`` here.
    """
    text = os.fspath(path)
    found = _URL.fullmatch(text)
    if found is None:
        return None
    scheme, slashes, rest = found.groups()
    if len(slashes) > 1:
        return text
    if Path(f"{scheme}:").exists():
        return None
    return f"{scheme}:///{rest}" if scheme.lower() == "file" else f"{scheme}://{rest}"


def shown(path: str | os.PathLike[str]) -> str:
    """A path as it is named in messages and records; a URL without user, password, query and fragment."""
    url = url_of(path)
    if url is None:
        return os.fspath(path)
    scheme, _, rest = url.partition("://")
    place, slash, inside = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    host = place.rpartition("@")[2]
    name, colon, port = host.rpartition(":")
    if colon and not port.isdigit() and not name.startswith("["):
        host = name  # a password that was not escaped
    return f"{scheme}://{host}{slash}{inside}"


def last_name(path: str | os.PathLike[str]) -> str:
    """The last part of a path or URL: the name of the file or folder."""
    return shown(path).partition("://")[2 if url_of(path) is not None else 0].rstrip("/").rpartition("/")[2]


def beside(url: str, name: str) -> str:
    """The URL of a file in the same folder (with the same query, if it is a web address)."""
    path, query = _split(url)
    return path.rstrip("/").rpartition("/")[0] + "/" + _quoted(url, name) + query


def within(url: str, name: str) -> str:
    """The URL of a file in a folder (with the same query, if it is a web address)."""
    path, query = _split(url)
    return path.rstrip("/") + "/" + _quoted(url, name) + query


def _quoted(url: str, name: str) -> str:
    return quote(name) if _is_web(url) else name


def _split(url: str) -> tuple[str, str]:
    """A URL and its query; stores of objects allow question marks in names."""
    cut = re.search(r"[?#]", url) if _is_web(url) else None
    return (url, "") if cut is None else (url[: cut.start()], url[cut.start() :])


def _is_web(url: str) -> bool:
    return url.partition(":")[0].lower() in ("http", "https")
