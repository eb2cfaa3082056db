"""Places behind URLs: the file system of fsspec, and what is there. Any of its file systems will do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from merging.errors import CheckpointError
from merging.remote_path import shown
from merging.remote_requests import Limits, is_missing, persistently

INSTALL = "pip install 'mergebound[remote]'"

_MARKS: tuple[str, ...] = (
    *("ETag", "etag", "e_tag", "md5Hash", "md5", "crc32c", "Content-MD5", "Digest", "generation", "VersionId"),
    *("version_id", "sha256", "blob_id", "mtime", "LastModified", "Last-Modified", "last_modified", "updated"),
    *("created", "ino", "commit"),
)

_WEB = ("http", "https")


@dataclass(frozen=True)
class Place:
    """A file system of fsspec and a path in it.

    Attributes:
        shown: the URL without credentials.
        protocols: names of the file system.
    """

    fs: Any = field(repr=False)
    path: str = field(repr=False)
    url: str = field(repr=False)
    shown: str
    protocols: tuple[str, ...]

    @property
    def web(self) -> bool:
        """Whether this is a plain web address, which has no folders."""
        return any(name in _WEB for name in self.protocols)

    def at(self, url: str) -> Place:
        """The same file system at another URL."""
        return Place(self.fs, self.fs._strip_protocol(url), url, shown(url), self.protocols)


def connect(url: str) -> Place:
    """The file system of a URL; nothing is asked of it yet.

    Raises:
        CheckpointError: fsspec or the package for this scheme is not installed, or the scheme is unknown.
    """
    safe = shown(url)
    if "::" in url:
        raise CheckpointError(f"{safe.partition('::')[0]}: chained URLs are not read: name the object itself")
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise CheckpointError(f"{safe}: URLs need the package fsspec, which is not installed: {INSTALL}") from None
    scheme = url.partition(":")[0]
    try:
        fs, path = url_to_fs(url)
    except ImportError as error:
        needed = getattr(error, "name", None) or "see the documentation of fsspec"
        raise CheckpointError(
            f"{safe}: {scheme}:// needs another package, which is not installed ({needed}): {INSTALL}, and the one "
            "for this scheme (s3fs, gcsfs, huggingface_hub, ...)"
        ) from None
    except ValueError:
        raise CheckpointError(f"{safe}: '{scheme}://' is not a known kind of address: check it") from None
    except Exception as error:  # credentials that are missing or malformed, as the clients see it
        raise CheckpointError(
            f"{safe}: the client for {scheme}:// cannot be set up ({type(error).__name__}): check credentials and "
            "settings"
        ) from None
    names = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
    return Place(fs, path, url, safe, names)


class Missing(CheckpointError):
    """There is no such object."""


def list_names(place: Place, limits: Limits) -> list[str]:
    """Names in a folder, in order.

    Raises:
        CheckpointError: there is no such folder, or no answer.
    """

    def ask() -> list[str]:
        _forget(place)
        return [str(entry) for entry in place.fs.ls(place.path, detail=False)]

    found = persistently(_telling(place, ask), place.shown, limits)
    return sorted(name for entry in found if (name := entry.rstrip("/").rpartition("/")[2]) and name[0] != ".")


def look(place: Place, limits: Limits) -> tuple[int, tuple[tuple[str, str], ...]]:
    """Size in bytes and version of an object, as they are now.

    Raises:
        CheckpointError: nothing there (:class:`Missing`), refused, no answer, or not a file.
    """

    def ask() -> dict[str, Any]:
        _forget(place)
        return dict(place.fs.info(place.path))

    info = persistently(_telling(place, ask), place.shown, limits)
    if info.get("type") == "directory":
        raise CheckpointError(f"{place.shown}: this is a folder: name the file in it")
    size = info.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0 or info.get("partial") is False:
        raise CheckpointError(f"{place.shown}: this server does not serve parts of files: download it first")
    return size, tuple((key, str(info[key])) for key in _MARKS if info.get(key) is not None)


def _telling(place: Place, ask: Any) -> Any:
    """The same request, with an error of its own for what is not there."""

    def call() -> Any:
        try:
            return ask()
        except Exception as error:
            if is_missing(error):
                raise Missing(f"{place.shown}: there is no such file: check the address") from None
            raise

    return call


def _forget(place: Place) -> None:
    place.fs.invalidate_cache(None if place.web else place.fs._parent(place.path))
