"""Columns of Arrow tables as images and labels: what ``datasets`` writes into files, read without running anything."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tasks.images import ReadImages
from theory.errors import MergeboundError, nearest

IMAGE_NAMES = ("image", "img", "jpg", "png", "jpeg", "webp")
LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class")
SAMPLED = 1024
"""Images whose bytes enter the fingerprint; of the others, their lengths and labels do."""


@dataclass(frozen=True)
class Rows:
    """Encoded images in a column of Arrow tables; opened anew in every process that reads them.

    Attributes:
        files: Parquet files, or Arrow streams, in order.
        column: of structs with ``bytes`` (and ``path``), or of plain bytes.
        folder: images without ``bytes`` are the files that ``path`` names below it.
        grey: read as grey, one channel.
    """

    files: tuple[Path, ...]
    column: str
    folder: Path
    grey: bool = False

    @cached_property
    def values(self) -> Any:
        """The column, of all files."""
        return read_table(self.files, (self.column,)).column(self.column)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("files", "column", "folder", "grey")}

    def __call__(self, row: int) -> np.ndarray:
        """One image, (height, width, 1 or 3) uint8."""
        return decoded(self.values[row].as_py(), self.folder, self.grey)


def read_table(files: Sequence[Path], columns: Sequence[str] | None) -> Any:
    """Some columns of Parquet files (read into memory) or Arrow streams (mapped), one after the other.

    Raises:
        MergeboundError: a file is damaged or unlike the others; names it.
    """
    import pyarrow as pa
    import pyarrow.parquet

    tables = []
    for path in files:
        try:
            if path.suffix == ".parquet":
                table = pyarrow.parquet.read_table(path, columns=None if columns is None else list(columns))
            else:
                table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
                table = table if columns is None else table.select(list(columns))
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise MergeboundError(f"{path}: cannot be read ({_short(error)}); get the data set again") from error
        tables.append(table)
        if table.schema.types != tables[0].schema.types:
            raise MergeboundError(f"{path}: its columns are unlike those of {files[0].name}; get the data set again")
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables])


def read_schema(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrow types by column, and the features that ``datasets`` wrote into the file (empty where there are none).

    Raises:
        MergeboundError: damaged; names the file.
    """
    import pyarrow as pa
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            schema = pyarrow.parquet.read_schema(path)
        else:
            schema = pa.ipc.open_stream(pa.memory_map(str(path))).schema
    except (OSError, ValueError, pa.ArrowException) as error:
        raise MergeboundError(f"{path}: cannot be read ({_short(error)}); get the data set again") from error
    types = {field.name: field.type for field in schema}
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        features = {}
    return types, features if isinstance(features, dict) else {}


def image_column(where: Path, wanted: str | None, types: Mapping[str, Any], features: Mapping[str, Any]) -> str:
    """The column of images: the one wanted, else the only one that can be it.

    Raises:
        MergeboundError: none or several; lists the columns.
    """
    import pyarrow as pa

    def fits(name: str) -> bool:
        kind = types[name]
        struct = pa.types.is_struct(kind) and any(kind.field(n).name == "bytes" for n in range(kind.num_fields))
        plain = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        return struct or plain

    if wanted is not None:
        if wanted not in types or not fits(wanted):
            usable = [name for name in types if fits(name)]
            raise MergeboundError(
                f"{where}: no images in a column {wanted!r}; "
                + (nearest(wanted, usable) if usable else f"there is none among {', '.join(types)}")
            )
        return wanted
    declared = [name for name in types if _declared(features, name) == "Image" and fits(name)]
    return _only(where, "images", declared or [name for name in types if fits(name)], IMAGE_NAMES, types)


def label_column(where: Path, wanted: str | None, types: Mapping[str, Any], features: Mapping[str, Any]) -> str:
    """The column of labels: the one wanted, else the only one that can be it.

    Raises:
        MergeboundError: none or several; lists the columns.
    """
    import pyarrow as pa

    def fits(name: str) -> bool:
        kind = types[name]
        return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind))

    if wanted is not None:
        if wanted not in types or not fits(wanted):
            usable = [name for name in types if fits(name)]
            raise MergeboundError(
                f"{where}: no labels in a column {wanted!r}; "
                + (nearest(wanted, usable) if usable else f"there is none among {', '.join(types)}")
            )
        return wanted
    declared = [name for name in types if _declared(features, name) == "ClassLabel"]
    return _only(where, "labels", declared or [name for name in types if fits(name)], LABEL_NAMES, types)


def class_names_of(features: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """Names that a ClassLabel feature states, empty where it states none."""
    feature = features.get(column)
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, dict):  # {"0": "cat"}
        names = [names[key] for key in sorted(names, key=int)]
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def raw_labels(where: Path, files: Sequence[Path], column: str) -> np.ndarray:
    """Labels as stored: int64, or strings; false and true become 0 and 1.

    Raises:
        MergeboundError: some are missing; names the file's folder and the first row.
    """
    values = read_table(files, (column,)).column(column)
    if values.null_count:
        row = next(number for number, value in enumerate(values) if not value.is_valid)
        raise MergeboundError(f"{where}: image {row} has no label in column {column!r}; choose another part or column")
    array = np.asarray(values.to_pylist())
    if array.size and array.dtype.kind in "iub":
        return array.astype(np.int64)
    return array


def images_of(rows: Rows, labels: np.ndarray, where: str) -> ReadImages:
    """Images with labels, grey if the first one is, and a fingerprint.

    The fingerprint is the SHA-256 of all labels, the lengths of all encoded images, and the bytes of at most
    :data:`SAMPLED` of them, evenly spaced.
    """
    values = rows.values
    lengths = _lengths(values)
    digest = hashlib.sha256(np.ascontiguousarray(labels, dtype=np.int64).tobytes())
    digest.update(lengths.tobytes())
    for row in np.unique(np.linspace(0, len(values) - 1, min(SAMPLED, len(values))).astype(np.int64)):
        value = values[int(row)].as_py()
        digest.update((value.get("bytes") if isinstance(value, dict) else value) or repr(value).encode())
    try:
        grey = len(values) > 0 and _mode(values[0].as_py(), rows.folder) in ("1", "L")
    except (OSError, ValueError) as error:
        raise MergeboundError(f"{where}, image 0: not a readable image ({_short(error)})") from error
    return ReadImages(Rows(rows.files, rows.column, rows.folder, grey), labels, where, digest.hexdigest())


def decoded(value: Any, folder: Path, grey: bool) -> np.ndarray:
    """One stored image as uint8, (height, width, 1 or 3).

    Raises:
        ValueError, OSError: not an image (also :class:`MergeboundError`: over 8 bits a channel).
    """
    with _opened(value, folder) as image:
        if image.mode.startswith(("I", "F")):
            raise MergeboundError(f"{folder}: an image has more than 8 bits per channel ({image.mode}); convert it")
        array = np.asarray(image.convert("L" if grey else "RGB"))
    return array[..., None] if array.ndim == 2 else array


def _opened(value: Any, folder: Path) -> Any:
    from PIL import Image

    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    try:
        if content:
            return Image.open(io.BytesIO(content))
        if not path:
            raise ValueError("neither bytes nor the path of a file are stored")
        place = (folder / path).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise ValueError(f"its path {path!r} lies outside {folder}")
        return Image.open(place)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def _mode(value: Any, folder: Path) -> str:
    with _opened(value, folder) as image:
        return str(image.mode)


def _lengths(values: Any) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(values.type):
        values = pc.struct_field(values, "bytes")
    return np.asarray(pc.fill_null(pc.binary_length(values), -1).to_numpy(zero_copy_only=False), dtype=np.int64)


def _declared(features: Mapping[str, Any], name: str) -> str:
    feature = features.get(name)
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _only(where: Path, what: str, found: list[str], usual: Sequence[str], types: Mapping[str, Any]) -> str:
    if len(found) == 1:
        return found[0]
    likely = [name for name in usual if name in found]
    if likely and (what == "images" or len(likely) == 1):
        return likely[0]
    which = ", ".join(found) or ", ".join(types)
    option = "image" if what == "images" else "label"
    raise MergeboundError(f"{where}: which column holds the {what} is not clear ({which}); name it with {option}=")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
