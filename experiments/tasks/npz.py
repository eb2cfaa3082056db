"""Reading ``.npz`` files safely: headers first, then one array at a time; objects are never unpickled."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from theory.errors import MergeboundError


@dataclass(frozen=True)
class Header:
    """What an array's header says, before its values are read."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


def read_headers(path: Path) -> dict[str, Header]:
    """Shape and type of every array of a file, by name, without reading the values.

    Raises:
        MergeboundError: missing, not an ``.npz`` file, damaged, or with an array that holds objects; names the file.
    """
    with reporting(path), zipfile.ZipFile(path) as archive:
        return {
            entry.filename.removesuffix(".npy"): _read_header(path, archive, entry)
            for entry in archive.infolist()
            if entry.filename.endswith(".npy")
        }


def read_array(path: Path, key: str) -> np.ndarray:
    """One array of a file.

    Raises:
        MergeboundError: as :func:`read_headers`; its checksum is wrong, or it is longer than memory; names the file.
    """
    with reporting(path), np.load(path, allow_pickle=False) as archive:
        array: np.ndarray = archive[key]
        return array


def read_names(path: Path, headers: Mapping[str, Header], key: str = "class_names") -> tuple[str, ...]:
    """An array of names as strings; empty if the file has none.

    Raises:
        MergeboundError: it is not one row of text; names the file.
    """
    if key not in headers:
        return ()
    if len(headers[key].shape) != 1 or headers[key].dtype.kind not in "US":
        raise MergeboundError(f"{path}: {key} is {headers[key]}; store names as a row of text, numpy.array([...])")
    return tuple(each.decode() if isinstance(each, bytes) else str(each) for each in read_array(path, key))


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into an error that names it."""
    try:
        yield
    except MergeboundError:
        raise
    except FileNotFoundError as error:
        raise MergeboundError(f"{path}: there is no such file; check the path") from error
    except MemoryError as error:
        raise MergeboundError(
            f"{path}: its arrays do not fit in memory; save the images as a folder of class-named sub-folders"
        ) from error
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        RuntimeError,
        SyntaxError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = " ".join((str(error).partition("\n")[0] or type(error).__name__).replace(str(path), path.name).split())
        raise MergeboundError(
            f"{path}: cannot be read as .npz ({reason}); save plain arrays with numpy.savez_compressed"
        ) from error


def _read_header(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Header:
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)
        place = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{entry.filename} holds Python objects, which allow_pickle=False refuses")
    missing = prod(shape) * dtype.itemsize - (entry.file_size - place)
    if missing > 0:
        raise ValueError(f"{entry.filename} is cut short: {missing} bytes are missing")
    return Header(tuple(int(size) for size in shape), dtype)
