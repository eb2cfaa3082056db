"""Pickles that hold plain data (numbers, text, bytes, lists, dicts, numeric arrays), read without running any code.

A pickle is a program: it may name any function and call it.  Here a few names only are known, those with which numpy
writes arrays and Python 3 writes bytes, and they stand for inert records of this module: numpy itself is called after
the pickle has been read, on checked values.  Any other name is refused before it is looked up.  The machine is the one
of the standard library in Python, not the one in C, whose table of remembered objects a 20-byte file can blow up to
gigabytes.

The format of the CIFAR files: Python 2's protocol 2, text as bytes, arrays as ``numpy.core.multiarray._reconstruct``.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tasks.sources.common import damaged
from experiments.tasks.vision_data import VisionData

KINDS = {"b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"}
"""Array elements that are read."""


def read_pickle(path: Path, entry: VisionData) -> dict[str, Any]:
    """The dict of a pickle, with text as keys; byte strings of Python 2 stay bytes, arrays are numpy's.

    Raises:
        MergeboundError: not a pickle of a dict, cut short, or with anything but plain data; names the file, and
            nothing of it has run.
    """
    try:
        with path.open("rb") as file:
            found = _PlainUnpickler(file, encoding="bytes").load()
        if type(found) is not dict:
            raise pickle.UnpicklingError(f"it holds a {type(found).__name__}, not a dict")
        return {text(key): _plain(value) for key, value in found.items()}
    except MemoryError as error:
        raise damaged(path, "it asks for more memory than there is", entry) from error
    except RecursionError as error:
        raise damaged(path, "it is nested too deeply", entry) from error
    except Exception as error:  # a damaged pickle fails in many ways: struct, index, key, type, attribute, end of file
        told = error if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__}: {error}"
        raise damaged(path, told, entry) from error


def text(value: object) -> str:
    """Text of a pickle, whether Python 2 or Python 3 wrote it.

    Raises:
        ValueError: neither text nor bytes of UTF-8.
    """
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, str):
        return value
    raise ValueError(f"text was expected, not a {type(value).__name__}")


class _Kind:
    """What a pickle says of an array's elements: ``dtype('u1', False, True)`` and then its state."""

    def __init__(self, *arguments: Any) -> None:
        self.name = text(arguments[0]) if arguments else ""
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        order = text(state[1])
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("an array of records")
        self.order = order


class _Array:
    """What a pickle says of an array: ``_reconstruct(ndarray, (0,), 'b')`` and then its state."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Buffer(_Array):
    """``_frombuffer(bytes, dtype, shape, order)``, as numpy writes arrays in protocol 5."""

    def __init__(self, *arguments: Any) -> None:
        buffer, kind, shape, order = arguments[:4]
        if type(buffer) not in (bytes, bytearray) or order not in ("C", "F"):
            raise pickle.UnpicklingError("an array in another order than C or F")
        self.state = (1, shape, kind, order == "F", bytes(buffer))


class _Word:
    """``_codecs.encode(text, 'latin1')`` and ``bytes()``, as Python 3 writes bytes in old protocols."""

    def __init__(self, *arguments: Any) -> None:
        if not arguments:
            self.bytes = b""
            return
        if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] not in ("latin1", "latin-1", b"latin1"):
            raise pickle.UnpicklingError("bytes in another encoding than latin1")
        self.bytes = arguments[0].encode("latin1")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("bytes with a state")


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.numeric", "_frombuffer"): _Buffer,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _Word,
    ("__builtin__", "bytes"): _Word,
}


class _PlainUnpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it wants to use {module}.{name}, which plain data does not need; refused")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file; refused")


def _plain(value: Any) -> Any:
    """A record as the value that it stands for; lists one level deep, as no file needs more."""
    if isinstance(value, _Array):
        return _array(value.state)
    if isinstance(value, _Word):
        return value.bytes
    if type(value) is list:
        return [item.bytes if isinstance(item, _Word) else item for item in value]
    return value


def _array(state: Any) -> np.ndarray:
    """An array from the state that numpy wrote: (version, shape, dtype, whether column-major, bytes)."""
    _, shape, kind, columns_first, raw = state
    if not isinstance(kind, _Kind):
        raise pickle.UnpicklingError("an array without a type")
    name = kind.name.lstrip("<>|=")
    if name not in KINDS:
        raise pickle.UnpicklingError(f"an array of {kind.name!r}, not of numbers")
    if isinstance(raw, _Word):
        raw = raw.bytes
    if type(raw) is not bytes or type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError("an array without bytes or shape")
    found = np.frombuffer(raw, dtype=np.dtype(f"{kind.order.replace('|', '=')}{name}"))
    array: np.ndarray = found.reshape(shape, order="F" if columns_first else "C")
    return array
