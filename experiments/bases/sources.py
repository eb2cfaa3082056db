"""Files of published weights: found on this machine, or downloaded when that was asked for."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from experiments.bases.base import BaseError
from experiments.bases.known_hashes import cache_folder

_HASH = re.compile(r"-([0-9a-f]{6,64})\.")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def hub_file(
    repository: str, names: Sequence[str], *, download: bool, command: str, cache: Path | None = None
) -> tuple[Path, str | None]:
    """A file of a Hugging Face repository: the first of ``names`` that there is.

    Args:
        repository: ``owner/name``, optionally ``@revision``.
        names: file names in the order of preference.
        download: whether the network may be used; otherwise only what the local cache of Hugging Face holds.
        command: what to tell people to run where it is not there.
        cache: the cache's folder; default: Hugging Face's own.

    Returns:
        The file, and its SHA-256 as the repository publishes it (None where the cache does not tell).

    Raises:
        BaseError: not on this machine, no such file, or no connection.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    owner, _, revision = repository.partition("@")
    for name in names:
        try:
            with _errors_only():
                found = Path(
                    hf_hub_download(
                        owner, name, revision=revision or None, cache_dir=cache, local_files_only=not download
                    )
                )
        except LocalEntryNotFoundError as error:
            if download:  # it was asked for, and there is no connection
                raise BaseError(f"{repository}: {name} could not be downloaded ({_line(error)}); try later") from error
            continue
        except EntryNotFoundError:
            continue
        except Exception as error:  # the network's libraries raise many types
            raise BaseError(f"{repository}: {name} could not be fetched ({_line(error)}); try later") from error
        blob = found.resolve().name
        return found, blob if _SHA256.fullmatch(blob) else None
    if download:
        raise BaseError(f"{repository}: holds none of {', '.join(names)}; check the name")
    raise BaseError(f"{repository}: its weights are not on this machine; get them with: {command}")


def url_file(url: str, *, download: bool, command: str, cache: Path | None = None) -> tuple[Path, str | None]:
    """A file behind a web address, kept in ``<cache>/weights``.

    Returns:
        The file, and the first digits of its SHA-256 where its name has them (``resnet50-0676ba61.pth``).

    Raises:
        BaseError: not on this machine, or no connection.
    """
    name = urlsplit(url).path.rpartition("/")[2]
    target = (cache or cache_folder()) / "weights" / name
    if not target.is_file():
        if not download:
            raise BaseError(f"{name}: these weights are not on this machine; get them with: {command}")
        from experiments.tasks.download import download as fetch

        target.parent.mkdir(parents=True, exist_ok=True)
        fetch(url, target)
    digits = _HASH.search(name)
    return target, digits[1] if digits else None


@contextmanager
def _errors_only() -> Iterator[None]:
    """Keep the hub's library from telling of each attempt; the last failure is told."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
