"""Data sets in the formats of the Hugging Face hub: by name, from a clone with Parquet files, or from ``save_to_disk``.

Only data files are fetched and read (Parquet and Arrow, through ``pyarrow``); a repository's code is never run, so that
repositories which are no more than a loading script are refused: many have a converted copy under the revision
``refs/convert/parquet``.  Nothing is downloaded unless ``download=True``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tasks.catalogue import find
from experiments.tasks.dataset import DataSet
from experiments.tasks.hub_columns import (
    Rows,
    class_names_of,
    image_column,
    images_of,
    label_column,
    raw_labels,
    read_schema,
)
from experiments.tasks.hub_names import HUB
from experiments.tasks.images import Images
from theory.errors import MergeboundError, nearest

EXTRA = "pip install 'mergebound[hub]'"
IN_MEMORY = 2 << 30
"""Parquet files of a part up to so many bytes are read into memory; larger ones are mapped through ``datasets``."""
VALIDATION = ("validation", "valid", "val")

_SHARD = re.compile(r"(?P<part>.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?")


@dataclass(frozen=True)
class Stored:
    """Files of each part, in order, and the folder that stored paths are relative to."""

    folder: Path
    parts: dict[str, tuple[Path, ...]]


def load_hub(
    name_or_path: str | Path,
    *,
    image: str | None = None,
    label: str | None = None,
    train: str = "train",
    test: str | None = "test",
    validation: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    download: bool = False,
    name: str | None = None,
) -> DataSet:
    """A data set of the hub, or a local folder in one of its formats.

    Args:
        name_or_path: ``owner/name`` on the hub; or a folder: a clone with Parquet files, or what ``save_to_disk`` of
            the library ``datasets`` wrote.
        image: column of the images; default: the only one that can be it.
        label: column of the labels: class numbers, false and true, or names; default: the only one that can be it.
        train, test: names of the parts; ``test=None`` where there is none (then a seed makes one).
        validation: name of the part; default: the one that is called so, if there is one.
        config: folder (configuration) in the repository, where there are several.
        revision: branch, tag or commit; None is the default branch.
        token: for repositories that are not public; default: the one that the hub's own login stored.
        download: fetch what is not in the hub's cache; otherwise nothing is sent over the network.
        name: of the data set; default: the last part of ``name_or_path``.

    Raises:
        MergeboundError: not installed, not downloaded, no data files, damaged files, unclear columns, or labels unlike
            the class names; says which and what to do.
    """
    require()
    given = Path(name_or_path).expanduser()
    source = str(name_or_path)
    wanted = [part for part in (train, test, validation) if part]
    if given.is_dir():
        stored = find_parts(given, config)
    elif isinstance(name_or_path, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise MergeboundError(f"{source}: there is no such folder; check the path")
    else:
        useful = [*wanted, *(part for part in VALIDATION if validation is None and part not in wanted)]
        stored = find_parts(fetch(source, useful, config, revision, token, download), config)
    for part in wanted:
        if part not in stored.parts:
            advice = f"{nearest(part, stored.parts)}" + (", or test=None" if part == test else "")
            raise MergeboundError(f"{source}: there is no part {part!r}; {advice}")
    if validation is None:
        others = (part for part in VALIDATION if part in stored.parts and part not in wanted)
        validation = next(others, None)
    chosen = {"train": train, "validation": validation, "test": test}
    files = {kind: mapped(stored.parts[part]) for kind, part in chosen.items() if part}
    types, features = read_schema(files["train"][0])
    where = stored.folder
    columns = image_column(where, image, types, features), label_column(where, label, types, features)
    return _assemble(name or source.rstrip("/").rpartition("/")[2], where, files, columns, features)


def load_published(name: str, *, token: str | None = None, download: bool = False) -> DataSet:
    """A data set of the catalogue from its place on the hub (:data:`experiments.tasks.hub_names.HUB`).

    Class names are those that the hub's copy states (numbers where it states none); splits are the copy's own.

    Args:
        name: in any usual spelling.
        token, download: as for :func:`load_hub`.

    Raises:
        MergeboundError: unknown name; or as :func:`load_hub`.
    """
    entry = find(name)
    place = HUB[entry.name]
    return load_hub(
        place.repository,
        image=place.image,
        label=place.label,
        train=place.train,
        test=place.test,
        config=place.config or None,
        revision=place.revision,
        token=token,
        download=download,
        name=entry.name,
    )


def _assemble(
    name: str, where: Path, files: dict[str, tuple[Path, ...]], columns: tuple[str, str], features: dict[str, Any]
) -> DataSet:
    raw = {kind: raw_labels(where, paths, columns[1]) for kind, paths in files.items()}
    names = class_names_of(features, columns[1])
    if any(values.dtype.kind not in "iU" for values in raw.values() if len(values)):
        raise MergeboundError(f"{where}: column {columns[1]!r} holds neither class numbers nor names; name another")
    if raw["train"].dtype.kind == "U":
        names = names or tuple(sorted(set(raw["train"].tolist())))
        raw = {kind: _numbered(where, kind, values, names) for kind, values in raw.items()}
    elif not names:
        kind = read_schema(files["train"][0])[0][columns[1]]
        count = 1 + max(int(values.max(initial=0)) for values in raw.values())
        names = ("false", "true") if str(kind) == "bool" else tuple(str(number) for number in range(count))
    parts: dict[str, Images] = {}
    for kind, paths in files.items():
        if len(raw[kind]):
            origin = str(paths[0]) if len(paths) == 1 else f"{where} ({kind})"
            parts[kind] = images_of(Rows(paths, columns[0], where), raw[kind].astype(np.int64), origin)
    return DataSet(name, names, parts)


def _numbered(where: Path, kind: str, values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    number = {name: index for index, name in enumerate(names)}
    unknown = sorted(set(values.tolist()) - set(number))
    if unknown:
        raise MergeboundError(f"{where}: the {kind} part has class {unknown[0]!r}, which the training part has not")
    return np.asarray([number[value] for value in values.tolist()], dtype=np.int64)


# --- where the files are ---------------------------------------------------------------------------------------------


def require() -> None:
    """Check that what reads the formats is there.

    Raises:
        MergeboundError: it is not; gives the line that installs it.
    """
    try:
        import huggingface_hub
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise MergeboundError(
            f"data sets of the Hugging Face hub need more libraries ({error.name}): {EXTRA}"
        ) from error
    del huggingface_hub


def fetch(
    repository: str,
    parts: Sequence[str],
    config: str | None,
    revision: str | None,
    token: str | None,
    download: bool,
) -> Path:
    """Folder of a repository's Parquet files in the hub's cache, downloaded first if asked.

    Args:
        parts: fetch these parts only.

    Raises:
        MergeboundError: not in the cache and ``download`` false, no such repository, no network.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository,
            repo_type="dataset",
            revision=revision,
            token=token,
            allow_patterns=patterns(parts, config),
            local_files_only=not download,
        )
    except Exception as error:  # the hub's library raises a dozen kinds
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        if not download:
            raise MergeboundError(
                f"{repository}: is not in the hub's cache; give download=True, or: mergebound data get --hub NAME"
            ) from error
        raise MergeboundError(f"{repository}: not downloaded from the hub ({reason})") from error
    return Path(folder)


def patterns(parts: Sequence[str], config: str | None) -> list[str]:
    """Which files of a repository are wanted.

    >>> patterns(["train"], None)
    ['train-*.parquet', '*/train-*.parquet', 'train.parquet', '*/train.parquet', '*/train/*.parquet', 'train/*.parquet']
    """
    prefix = f"{config}/" if config else ""
    shapes = ("{}-*.parquet", "*/{}-*.parquet", "{}.parquet", "*/{}.parquet", "*/{}/*.parquet", "{}/*.parquet")
    return [prefix + shape.format(part) for part in parts for shape in shapes]


def find_parts(folder: Path, config: str | None = None) -> Stored:
    """Data files of each part in a local folder.

    Raises:
        MergeboundError: none; several configurations and none chosen; a file that is named in it is missing.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _json(folder / "dataset_dict.json").get("splits", [])
        return Stored(folder, {str(part): _saved(folder / str(part)) for part in names})
    if (folder / "state.json").is_file():
        return Stored(folder, {"train": _saved(folder)})
    base = folder / config if config else folder
    found: dict[str, list[Path]] = {}
    configs: set[str] = set()
    for path in sorted(base.rglob("*.parquet")):
        inner = path.relative_to(base)
        if any(each.startswith(".") for each in inner.parts):
            continue
        shard = _SHARD.fullmatch(path.stem)
        numbered = re.fullmatch(r"\d+", path.stem)
        part = shard["part"] if shard else path.parent.name if numbered else path.stem
        above = inner.parts[: -2 if numbered else -1]
        configs.add("/".join(above))
        found.setdefault(part, []).append(path)
    if not found:
        scripts = sorted(each.name for each in base.glob("*.py")) if base.is_dir() else []
        why = f"it is a loading script ({scripts[0]}), which is never run" if scripts else "no .parquet files"
        raise MergeboundError(f"{base}: holds no data set in a format of the hub: {why}; see refs/convert/parquet")
    if len(configs) > 1:
        raise MergeboundError(
            f"{base}: has several configurations; choose with config= among {', '.join(sorted(configs))}"
        )
    return Stored(base, {part: tuple(paths) for part, paths in found.items()})


def _saved(folder: Path) -> tuple[Path, ...]:
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise MergeboundError(f"{folder}: its rows are picked by an index file; save it again after flatten_indices()")
    try:
        names = [str(each["filename"]) for each in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise MergeboundError(f"{folder / 'state.json'}: names no data files; save the data set again") from error
    paths = tuple(folder / Path(name).name for name in names)
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise MergeboundError(f"{missing[0] if missing else folder}: is missing; save the data set again")
    return paths


def _json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MergeboundError(f"{path}: cannot be read; save the data set again") from error
    return record if isinstance(record, dict) else {}


def mapped(files: tuple[Path, ...]) -> tuple[Path, ...]:
    """The files, or, where they are Parquet files too large for memory, Arrow files that ``datasets`` makes of them.

    Raises:
        MergeboundError: too large, and ``datasets`` is not installed.
    """
    size = sum(path.stat().st_size for path in files if path.suffix == ".parquet")
    if size <= IN_MEMORY:
        return files
    try:
        import datasets
    except ImportError as error:
        raise MergeboundError(
            f"{files[0]}: {size / 1e9:.1f} GB are too much for memory; to map them, {EXTRA}"
        ) from error
    try:
        table = datasets.load_dataset("parquet", data_files=[str(path) for path in files], split="train")
    except Exception as error:  # as many kinds as formats
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise MergeboundError(f"{files[0]}: cannot be read ({reason}); get the data set again") from error
    return tuple(Path(each["filename"]) for each in table.cache_files)
