"""Write checkpoints behind URLs: first whole to a local folder, then uploaded, the file that makes it one last.

Where a file system can move (``file://``, ``memory://``, ``sftp://``, ...), everything is uploaded under hidden
temporary names and moved when all of it is there.  Stores of objects (``s3://``, ``gs://``, ``az://``, ``hf://``)
show an object only when it is complete; there the shards are uploaded first and the index, or the only file, last.  A
checkpoint that is replaced stays whole until then: new shards whose names it uses get other names.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from merging.errors import CheckpointError
from merging.folder import SAFETENSORS_INDEX, is_companion, read_index
from merging.remote_file import open_file
from merging.remote_path import beside, last_name, shown, within
from merging.remote_place import Missing, Place, connect, list_names, look
from merging.remote_requests import Answered, Limits, is_missing, persistently

STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "oss", "oci"})
"""Protocols of stores that show an object only when it is complete, and that move by copying."""

_SUFFIX = ".safetensors"
_CLEANING = 10.0  # seconds for the removal of a file after a failure
_SLOWEST = 1e6  # bytes per second; an upload that is slower is given up
_RESULT, _STATE, _LOCK, _RENAMED = "result", "uploads.json", "lock", "renamed.json"
_log = logging.getLogger(__name__)

Save = Callable[[Path], Path]
"""Writes a checkpoint to a local target; returns what to open."""


def save_remote(
    url: str,
    save: Save,
    *,
    overwrite: bool = False,
    resume: str | None = None,
    limits: Limits | None = None,
    direct: bool | None = None,
) -> Path:
    """Write a checkpoint to a URL: a ``.safetensors`` file (or shards and their index), or a folder.

    The whole result is kept in the system's folder for temporary files (``TMPDIR``) until it is uploaded.

    Args:
        url: where to.
        save: writes it locally; not called if an interrupted call with the same ``resume`` had come that far.
        overwrite: replace a checkpoint that is there.
        resume: a key of what is written.  If the upload is interrupted, or given up, the local result stays, and the
            next call with this key and URL uploads the files that are missing.
        limits: of every request.
        direct: whether objects appear only when they are complete; default: known for the usual stores.

    Returns:
        What to open (a URL as a path).

    Raises:
        CheckpointError: something is there already, access is refused, no answer, or no space left for the local copy.
    """
    given = Limits() if limits is None else limits
    name = last_name(url)
    folder = connect(url if not name.endswith(_SUFFIX) else beside(url, ""))
    refuse_existing(url, overwrite=overwrite, limits=given)
    stores = any(protocol in STORES for protocol in folder.protocols) if direct is None else direct
    with _staging(shown(url), resume) as local:
        files = _finished(local, name)
        if files is None:
            save(local / (name if name.endswith(_SUFFIX) else _RESULT))
            files = _finished(local, name)
        assert files is not None
        token = secrets.token_hex(4) if resume is None else sha256(resume.encode()).hexdigest()[:8]
        upload = _Upload(folder, given, token, stores, local / _STATE, resume is not None)
        upload.publish(files, _previous(folder, name, given), local / _RENAMED, overwrite=overwrite)
    return Path(url)


def refuse_existing(url: str, *, overwrite: bool = False, limits: Limits | None = None) -> None:
    """Check that a URL can be written to, and that nothing is there that may not be replaced.

    Raises:
        CheckpointError: it cannot, or there is.
    """
    given = Limits() if limits is None else limits
    name = last_name(url)
    place = connect(url)
    if place.web:
        raise CheckpointError(f"{shown(url)}: web addresses are only read: write to a folder, or to a store of objects")
    if not name:
        raise CheckpointError(f"{shown(url)}: this is a place rather than a name: name a file or a new folder in it")
    single = name.endswith(_SUFFIX)
    if not single and name.endswith((".json", ".pt", ".pth", ".bin", ".ckpt")):
        raise CheckpointError(
            f"{shown(url)}: checkpoints are written as .safetensors, or as a folder (a name without suffix): change "
            "the name"
        )
    if not overwrite:
        there = _names(connect(beside(url, "")) if single else place, given)
        taken = [other for other in _mains(name) if other in there] if single else _not_ours(there)
        if taken:
            raise _exists(url)


def _not_ours(there: Sequence[str]) -> list[str]:
    """What an interrupted upload would not have left: shards without an index, and perhaps companions of weights."""
    shards = [name for name in there if re.fullmatch(r"model(-[0-9a-f]{8})?-\d{5}-of-\d{5}\.safetensors", name)]
    return [name for name in there if name not in shards and not (shards and is_companion(name))]


@dataclass(frozen=True)
class _Upload:
    """Files on their way to a remote folder."""

    folder: Place
    limits: Limits
    token: str
    direct: bool
    state: Path
    lasting: bool

    def publish(self, files: Sequence[Path], previous: Mapping[str, bool], renamed: Path, *, overwrite: bool) -> None:
        """Upload, the last file last, then remove what it replaces.

        Args:
            files: local files by their names there.
            previous: names of the files of the checkpoint that is there, and whether they are what is opened.
            renamed: where an index with other names of shards may be written.
            overwrite: whether there may be one.
        """
        if previous and not overwrite and any(previous.values()):
            raise _exists(self.folder.at(within(self.folder.url, next(n for n, m in previous.items() if m))).url)
        local = {path.name: path for path in files}
        main = files[-1].name
        clash = [name for name in local if previous.get(name) is False]
        if clash:
            names = {name: _renamed(name, self.token) for name in local if name.endswith(_SUFFIX)}
            content = json.loads(local[main].read_bytes())
            content["weight_map"] = {tensor: names[shard] for tensor, shard in content["weight_map"].items()}
            renamed.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
            local = {names.get(name, name): path for name, path in local.items()} | {main: renamed}
        order = [*(name for name in local if name != main), main]
        if not self.direct:
            self._ask(lambda: self.folder.fs.makedirs(self.folder.path, exist_ok=True), self.folder.shown)
        uploaded: dict[str, str] = {}
        try:
            for number, name in enumerate(order):
                _log.info("uploading %s (%d of %d)", name, number + 1, len(order))
                uploaded[name] = self._put(local[name], name, fresh=name == main)
            if not self.direct:
                for name in order:
                    self._move(uploaded[name], name, local[name].stat().st_size)
        except BaseException:
            if not self.lasting:
                shards = [name for name in uploaded if name.endswith(_SUFFIX) and name not in previous]
                hasty = replace(self, limits=replace(self.limits, total=min(self.limits.total, _CLEANING)))
                hasty._remove([*(place for name, place in uploaded.items() if place != name), *shards])
            raise
        stale = [name for name in previous if name not in local]
        left = self._remove(stale)
        if left:
            raise CheckpointError(
                f"{self.folder.shown}: the checkpoint was written, but what it replaces could not be removed "
                f"({left[0]}): remove that yourself"
            )

    def _at(self, name: str) -> Place:
        return self.folder.at(within(self.folder.url, name))

    def _put(self, path: Path, name: str, *, fresh: bool) -> str:
        """Upload a file unless that was done before; returns the name that it has there now."""
        size = path.stat().st_size
        known = self._known().get(name)
        if known is not None and not fresh and known["size"] == size:
            with suppress(Missing):
                there, version = look(self._at(known["place"]), self.limits)
                if there == size and [list(mark) for mark in version] == known["marks"]:
                    return str(known["place"])
        attempts = 0

        def ask() -> tuple[str, list[list[str]]]:
            nonlocal attempts
            attempts += 1  # an attempt that was given up may still be writing: the next has a name of its own
            there = name if self.direct else f".{name}.{self.token}.{attempts}.tmp"
            target = self._at(there)
            self.folder.fs.put_file(os.fspath(path), target.path)
            self.folder.fs.invalidate_cache(self.folder.path)
            found, marks = look(target, self.limits)
            if found != size:
                raise Answered(f"{found} of {size} bytes arrived")
            return there, [list(mark) for mark in marks]

        patient = replace(self.limits, attempt=self.limits.attempt + size / _SLOWEST)
        patient = replace(patient, total=self.limits.total + 2.0 * patient.attempt)
        place, marks = persistently(ask, self._at(name).shown, patient)
        self._note(name, {"place": place, "size": size, "marks": marks})
        return place

    def _move(self, here: str, there: str, size: int) -> None:
        """Give a file its final name."""
        if here == there:
            return
        source, target = self._at(here), self._at(there)

        def ask() -> None:
            try:
                self.folder.fs.mv(source.path, target.path)
            except Exception as error:
                if not is_missing(error) or look(target, self.limits)[0] != size:  # an earlier attempt may have done it
                    raise

        self._ask(ask, target.shown)
        self._note(there, {"place": there, "size": size, "marks": [list(m) for m in look(target, self.limits)[1]]})

    def _remove(self, names: Sequence[str]) -> list[str]:
        """Remove files; those that could not be removed."""
        left: list[str] = []
        for name in names:
            place = self._at(name)
            try:
                self._ask(partial(self.folder.fs.rm_file, place.path), place.shown)
            except CheckpointError:
                try:
                    there = name in _names(self.folder, self.limits)
                except CheckpointError:  # no answer any more
                    return [*left, name]
                left += [name] if there else []
        return left

    def _ask(self, call: Callable[[], Any], what: str) -> None:
        persistently(call, what, self.limits)

    def _known(self) -> dict[str, Any]:
        try:
            content = json.loads(self.state.read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _note(self, name: str, entry: Mapping[str, Any]) -> None:
        if self.lasting:
            part = self.state.with_suffix(".part")
            part.write_text(json.dumps(self._known() | {name: dict(entry)}))
            os.replace(part, self.state)


def _finished(local: Path, name: str) -> list[Path] | None:
    """The files of a complete local result, what is opened last; ``None``: there is none."""
    if name.endswith(_SUFFIX):
        folder, mains = local, _mains(name)
    else:
        folder, mains = local / _RESULT, _mains("model" + _SUFFIX)
    main = next((folder / other for other in mains if (folder / other).is_file()), None)
    if main is None:
        return None
    ours = {_STATE, _LOCK, _RENAMED, main.name}
    others = sorted(p for p in folder.iterdir() if p.is_file() and p.name not in ours and not p.name.startswith("."))
    shards = [path for path in others if path.name.endswith(_SUFFIX)]
    return [*shards, *(path for path in others if path not in shards), main]


def _mains(name: str) -> tuple[str, str]:
    return name, name.removesuffix(_SUFFIX) + SAFETENSORS_INDEX


def _previous(folder: Place, name: str, limits: Limits) -> dict[str, bool]:
    """Files of the checkpoint that is there, and whether they are what is opened (the index, the single file)."""
    there = _names(folder, limits)
    found: dict[str, bool] = {}
    for main in _mains(name if name.endswith(_SUFFIX) else "model" + _SUFFIX):
        if main not in there:
            continue
        found[main] = True
        if main.endswith(SAFETENSORS_INDEX):
            index = open_file(within(folder.url, main), limits)
            with suppress(CheckpointError):  # a damaged index names no shards
                table, _ = read_index(index.shown, main, index.read(0, index.size))
                found = dict.fromkeys((shard for shard in table.values() if shard in there), False) | found
    return found


def _names(folder: Place, limits: Limits) -> list[str]:
    try:
        return list_names(folder, limits)
    except Missing:
        return []


def _renamed(name: str, token: str) -> str:
    """``model-00001-of-00002.safetensors`` with a token behind the stem."""
    stem, numbers = name[: -len("-00001-of-00001" + _SUFFIX)], name[-len("-00001-of-00001" + _SUFFIX) :]
    return f"{stem}-{token}{numbers}"


def _exists(url: str) -> CheckpointError:
    return CheckpointError(f"{shown(url)}: this exists already: choose another name, or allow it to be overwritten")


@contextmanager
def _staging(where: str, resume: str | None) -> Iterator[Path]:
    """A local folder for the result: of its own, or one that the next call with the same key finds again."""
    if resume is None:
        with tempfile.TemporaryDirectory(prefix="mergebound-", ignore_cleanup_errors=True) as path:
            yield Path(path)
        return
    folder = Path(tempfile.gettempdir()) / f"mergebound-{sha256(repr((where, resume)).encode()).hexdigest()[:24]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    owner = getattr(os, "getuid", lambda: status.st_uid)()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != owner or status.st_mode & 0o022:
        raise CheckpointError(f"{folder}: this belongs to somebody else: set TMPDIR to a folder of your own")
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not _lock(descriptor):
            raise CheckpointError(f"{where}: another process is writing just this: wait until it is done")
        try:
            yield folder
        except BaseException:
            if not any(path.name != _LOCK for path in folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems cannot lock
        return True
    return True
