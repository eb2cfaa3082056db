"""Pickles as data: what is written is read, and no file can make the reader call anything."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import tasks
from experiments.tasks.sources.pickles import read_pickle, text
from tests.experiments.vision_trees_b import cifar100, python2
from theory.errors import MergeboundError

ENTRY = tasks.find("cifar100")


def read(raw: bytes, folder: Path) -> dict[str, Any]:
    path = folder / "file"
    path.write_bytes(raw)
    return read_pickle(path, ENTRY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pickles")


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_a_malicious_batch_does_not_run(tmp_path: Path) -> None:
    cifar100(tmp_path, np.random.default_rng(0))
    mark = tmp_path / "it_ran"
    path = tmp_path / "cifar-100-python" / "test"
    attack = pickle.dumps({"data": Call(os.system, f"touch {mark}"), "fine_labels": [0]}, protocol=2)
    path.write_bytes(attack)
    with pytest.raises(MergeboundError, match=r"cifar-100-python/test: damaged.*system.*refused"):
        tasks.load("cifar100", tmp_path)
    assert not mark.exists()
    pickle.load(io.BytesIO(attack))  # the attack works on a reader that trusts the file
    assert mark.exists()


def attacks(mark: str) -> dict[str, bytes]:
    """Pickles that call something, by how they come to it."""
    touch = f"touch {mark}".encode()
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    end = b"\x85cnumpy\ndtype\nU\x02u1\x85R\x89U\x01xtbs."
    return {
        "reduce": b"\x80\x02cos\nsystem\nU" + bytes([len(touch)]) + touch + b"\x85R.",
        "inst": b"(S'" + touch + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nU" + bytes([len(touch)]) + touch + b"o.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93U" + bytes([len(touch)]) + touch + b"\x85R.",
        "eval": pickle.dumps(Call(eval, f"__import__('os').system({mark!r})")),
        "nested name": b"\x80\x04\x8c\x05numpy\x8c\x0cos.path.join\x93.",
        "getattr": pickle.dumps(Call(getattr, "text", "encode")),
        "numpy scalar": pickle.dumps({"data": np.float64(1)}),
        "numpy load": b"cnumpy\nload\nU\x04file\x85R.",
        "objects": pickle.dumps({"data": np.array([Call(os.system, mark)], dtype=object)}, protocol=2),
        "records": pickle.dumps({"data": np.zeros(2, dtype=[("a", "u1")])}, protocol=2),
        "text array": pickle.dumps({"data": np.array(["a"])}, protocol=4),
        "array of objects": b"\x80\x02}U\x01a" + array + b"(K\x01K\x01" + end.replace(b"u1", b"O8"),
        "state of a class": b"\x80\x02cnumpy\nndarray\n}U\x05state\x8a\x01\x01sb.",
        "attributes of a class": b"\x80\x02cnumpy\nndarray\nN}U\x08__init__Ncos\nsystem\ns\x86b.",
        "too few bytes": b"\x80\x02}U\x01a" + array + b"(K\x01K\x09" + end,
        "negative shape": b"\x80\x02}U\x01a" + array + b"(K\x01J\xff\xff\xff\xff" + end,
        "codec": b"\x80\x02}U\x01ac_codecs\nencode\nX\x01\x00\x00\x00aU\x03zip\x86Rs.",
        "elsewhere": b"\x80\x02U\x03pidQ.",
        "extension": b"\x80\x02\x82\x01.",
        "endless text": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
        "endless bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"x.",
        "far memo": b"\x80\x02}r\xff\xff\xff\x7fh\x01.",
        "not a dict": pickle.dumps([1, 2]),
        "nothing": b"",
        "no stop": b"\x80\x02}",
    }


@pytest.mark.parametrize("kind", attacks(""))
def test_no_call_no_object_no_hang(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    with pytest.raises(MergeboundError, match="file: damaged") as caught:
        read(attacks(str(mark))[kind], tmp_path)
    assert not mark.exists()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


plain = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.binary(max_size=300),
    st.lists(st.one_of(st.integers(0, 99), st.binary(max_size=9)), max_size=5),
)
arrays = st.builds(
    lambda rows, columns, seed: np.random.default_rng(seed).integers(0, 256, (rows, columns), dtype=np.uint8),
    st.integers(0, 4),
    st.integers(0, 40),
    st.integers(0, 99),
)
dicts = st.dictionaries(st.text("abc_", min_size=1, max_size=9), st.one_of(plain, arrays), max_size=4)


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, np.ndarray):
        return found.dtype == wanted.dtype and np.array_equal(found, wanted)
    return type(found) is type(wanted) and found == wanted


@given(wanted=dicts, protocol=st.sampled_from([0, 2, 3, 4, 5, "python 2"]), columns_first=st.booleans())
def test_plain_data_is_read_as_it_was_written(
    wanted: dict[str, Any], protocol: Any, columns_first: bool, folder: Path
) -> None:
    if protocol == "python 2":
        raw = python2(wanted)
    else:
        if columns_first:
            wanted = {k: np.asfortranarray(v) if isinstance(v, np.ndarray) else v for k, v in wanted.items()}
        raw = pickle.dumps(wanted, protocol=protocol)
    found = read(raw, folder)
    assert set(found) == set(wanted)
    assert all(same(found[key], wanted[key]) for key in wanted)


@given(kind=st.sampled_from(["<i8", ">i8", "<f4", ">u2", "|b1", "|i1"]), protocol=st.sampled_from([2, 4, 5]))
def test_arrays_of_other_numbers(kind: str, protocol: int, folder: Path) -> None:
    wanted = np.arange(6).reshape(2, 3).astype(kind)
    found = read(pickle.dumps({"a": wanted}, protocol=protocol), folder)["a"]
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == wanted.dtype


@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_a_changed_or_cut_file_gives_plain_data_or_an_error_that_names_it(
    place: int, byte: int, cut: bool, folder: Path
) -> None:
    raw = bytearray(python2({"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [1, 2, 300], "name": "x"}))
    place %= len(raw)
    if cut:
        del raw[place:]
    else:
        raw[place] = byte
    try:
        found = read(bytes(raw), folder)
    except MergeboundError:
        with pytest.raises(MergeboundError, match=re.escape(str(folder / "file"))):
            read(bytes(raw), folder)
        return
    for value in found.values():
        assert type(value) in (int, bool, float, bytes, str, list, dict, tuple, np.ndarray, type(None), bytearray)
        assert not isinstance(value, np.ndarray) or value.dtype.kind in "biuf"


def test_text_is_text() -> None:
    assert text(b"ap\xc3\xa9") == text("apé")
    for wrong in (3, None, b"\xff"):
        with pytest.raises(ValueError):
            text(wrong)
