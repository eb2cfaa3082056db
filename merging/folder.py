"""Folders as Hugging Face and timm lay them out: which file holds the weights, and what belongs beside them."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from merging.errors import CheckpointError
from merging.legacy import LEGACY_SUFFIXES
from merging.safetensors_file import opened, parse_json

SAFETENSORS_INDEX = ".safetensors.index.json"
LEGACY_INDEX = ".bin.index.json"
INDEX_SUFFIXES = (SAFETENSORS_INDEX, LEGACY_INDEX)

COMPANIONS = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "tokenizer*",
    "vocab*",
    "merges*",
    "LICENSE*",
    "NOTICE*",
)
"""Files that are carried along to a merged folder (glob patterns on the file name)."""

_NEVER = (
    "*.index.json",
    "trainer_state.json",
    "*.safetensors",
    "*.py",
    "*.pkl",
    "*.pickle",
    "*.npz",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.tmp",
    ".*",
    *(f"*{suffix}" for suffix in LEGACY_SUFFIXES),
)
_LARGEST = 64 * 2**20
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_AUXILIARY = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*", "scaler.*")
_MODEL, _LEGACY = "model.safetensors", "pytorch_model.bin"
_log = logging.getLogger(__name__)


def find_weights(folder: Path) -> Path:
    """The file of a folder that holds its weights: a checkpoint file, or the index of shards.

    ``model.safetensors`` or its index, otherwise ``pytorch_model.bin`` or its index, otherwise the only index,
    ``.safetensors`` file or legacy file that there is.  Where both formats lie side by side, safetensors is read.

    Raises:
        CheckpointError: the folder is unreadable, holds no weights, or several that could be meant.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{folder}: the folder cannot be read ({error.strerror}): check permissions") from error
    return folder / choose_weights(str(folder), names)


def choose_weights(folder: str, names: Sequence[str]) -> str:
    """The name of the file that :func:`find_weights` finds, from all names in a folder, in order.

    Raises:
        CheckpointError: there are no weights among them, or several that could be meant.
    """
    for single, index in ((_MODEL, "model" + SAFETENSORS_INDEX), (_LEGACY, "pytorch_model" + LEGACY_INDEX)):
        present = [name for name in (single, index) if name in names]
        if len(present) == 1:
            return present[0]
        if present:
            raise _ambiguous(folder, present)
    candidates = [name for name in names if not _SHARD.search(name) and not _matches(name, _AUXILIARY)]
    for suffixes in ((SAFETENSORS_INDEX,), (".safetensors",), (LEGACY_INDEX,), LEGACY_SUFFIXES):
        found = [name for name in candidates if name.endswith(suffixes)]
        if len(found) == 1:
            return found[0]
        if found:
            raise _ambiguous(folder, found)
    if any(_SHARD.search(name) for name in names):
        raise CheckpointError(f"{folder}: this folder holds shards without their index: copy the .index.json file too")
    raise CheckpointError(
        f"{folder}: this is a folder without a checkpoint in it: name the file, or a folder with {_MODEL}"
    )


def weight_map(path: Path) -> tuple[dict[str, str], Mapping[str, object]]:
    """The table of an index, tensor to file (all beside the index), and its metadata.

    Raises:
        CheckpointError: not an index, or it points to files elsewhere or of the other format.
    """
    with opened(path) as (handle, _):
        text = handle.readall()
    return read_index(str(path), path.name, text or b"")


def read_index(path: str, name: str, text: bytes) -> tuple[dict[str, str], Mapping[str, object]]:
    """:func:`weight_map` of an index that was read already.

    Args:
        path: how it is named in messages.
        name: its file name, which says what format the shards have.
        text: what it holds.

    Raises:
        CheckpointError: see :func:`weight_map`.
    """
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a readable JSON index ({str(error)[:100]}): save the checkpoint again"
        ) from error
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        raise CheckpointError(f"{path}: the index has no 'weight_map' of tensor to file: save the checkpoint again")
    suffixes = (".safetensors",) if name.endswith(SAFETENSORS_INDEX) else LEGACY_SUFFIXES
    for file in sorted(set(table.values())):
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"{path}: the index points outside its folder ({file[:100]!r}): name files beside it only"
            )
        if not file.endswith(suffixes):
            raise CheckpointError(
                f"{path}: the index names '{file}', which is not a {suffixes[0]} file: save the checkpoint again"
            )
    metadata = content.get("metadata")
    return table, metadata if isinstance(metadata, dict) else {}


def companions(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files that belong to a model beside its weights: configuration, tokenizer, license.

    Only regular files at the top of the folder are read, up to 64 MiB each; weights, pickles and programs never, nor
    links that lead out of the folder (other than to the ``blobs`` of a Hugging Face cache, where every file is a link).
    What matches and is not carried is logged.

    Raises:
        CheckpointError: a file cannot be read.
    """
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    for path in sorted(folder.iterdir()):
        if not is_companion(path.name):
            continue
        if not any(path.resolve().is_relative_to(root) for root in roots):
            _log.warning("%s is not carried along: it is a link that leads out of its folder", path)
            continue
        if not path.is_file():
            continue
        if path.stat().st_size > _LARGEST:
            _log.warning("%s is not carried along: it is larger than %d MiB", path, _LARGEST >> 20)
            continue
        with opened(path) as (handle, _):
            content = handle.readall() or b""
        if content[:1] == b"\x80" or content[:2] == b"PK":
            _log.warning("%s is not carried along: it is a pickle or an archive", path)
            continue
        yield path.name, content


def with_storage_type(content: bytes, dtype: str) -> bytes:
    """A ``config.json`` that names the type that the weights are stored in; other content is returned as it is.

    Hugging Face's loaders follow ``torch_dtype`` (``dtype`` in newer files), so it has to be true of the weights.
    """
    try:
        config = json.loads(content)
    except ValueError:
        return content
    stale = [key for key in ("torch_dtype", "dtype") if isinstance(config, dict) and isinstance(config.get(key), str)]
    if all(config[key] == dtype for key in stale):
        return content
    return json.dumps(config | dict.fromkeys(stale, dtype), indent=2).encode() + b"\n"


def is_companion(name: str) -> bool:
    """Whether a file of this name is carried along to a merged folder."""
    return _matches(name, COMPANIONS) and not _matches(name, _NEVER)


def foreign(folder: Path) -> list[str]:
    """What a folder holds besides weights and their companions: reasons not to replace the folder as a whole."""
    found = []
    for path in sorted(folder.iterdir()):
        mode = path.lstat().st_mode
        known = is_companion(path.name) or path.name.endswith((".safetensors", *INDEX_SUFFIXES, *LEGACY_SUFFIXES))
        known = known or path.name in ("README.md", ".gitattributes")
        if not stat.S_ISREG(mode) or not known or _matches(path.name, _AUXILIARY):
            found.append(path.name)
    return found


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _ambiguous(folder: str, names: list[str]) -> CheckpointError:
    listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return CheckpointError(f"{folder}: the folder holds several checkpoints ({listed}): name the one that is meant")
