"""Packing loses no bit, and the store gives back what it was given."""

import csv
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from experiments.bases.base import tensors_digest
from experiments.store import Store, StoreError
from experiments.store.codec import decode, encode
from experiments.store.joined import Reference
from tests.experiments.store.samples import BASE, result, specs

BITS = {torch.float32: np.int32, torch.float64: np.int64, torch.bfloat16: np.int16, torch.float16: np.int16}


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(list(BITS)))
def test_every_pattern_of_bits_comes_back(data: st.DataObject, dtype: torch.dtype) -> None:
    """NaN payloads, signed zeros, denormals and infinities included; with and without a counterpart in the base."""
    draw = lambda: torch.from_numpy(data.draw(npst.arrays(BITS[dtype], st.integers(0, 40))).copy()).view(dtype)  # noqa: E731
    state = {"x": draw(), "y": draw(), "n": torch.tensor([1, 2]), "b": torch.tensor(True)}
    base = {"x": torch.from_numpy(data.draw(npst.arrays(BITS[dtype], len(state["x"]))).copy()).view(dtype)}
    base["y"] = state["y"].clone()
    stored, header = encode(state, base, "k")
    again = decode(stored, header, base, "k")
    assert list(again) == list(state)
    assert tensors_digest(again) == tensors_digest(state)
    assert "y" in header["same"]


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from([*BITS, torch.bool]), st.booleans())
def test_joined_states_are_packed_to_the_same_bits(data: st.DataObject, dtype: torch.dtype, alike: bool) -> None:
    """A reference is only quicker: for tensors that the base has, has not, has in another shape or with these bits."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))

    def draw(rows: int) -> torch.Tensor:
        bits = torch.from_numpy(rng.integers(0, 256, (rows, 16), dtype=np.uint8))
        return bits.view(dtype) if dtype in BITS else bits > 99

    names = data.draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True))
    base = {name: draw(8) for name in "abc"} | {"d": draw(4), "n": torch.tensor(0)}
    state = {name: draw(8).T.contiguous().T for name in names} | {"n": torch.tensor(3)}
    state |= {"a": base["a"].clone()} if alike else {}
    known = Reference(base)
    for _ in range(2):  # the second time with what the first has made
        (stored, header), (quick, same) = encode(state, base, "k"), encode(state, known, "k")
        assert (same, list(same["packed"])) == (header, list(header["packed"]))
        assert quick.keys() == stored.keys()
        assert all(torch.equal(quick[name].view(torch.uint8), stored[name].view(torch.uint8)) for name in stored)
        assert tensors_digest(decode(quick, same, base, "k")) == tensors_digest(state)


def test_large_tensors_are_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.store.codec._ELEMENTS", 100)
    monkeypatch.setattr("experiments.store.codec._SAMPLE", 16)
    generator = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(7, 50, generator=generator), "b": torch.randn(30, generator=generator)}
    state = {name: tensor + 1e-4 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}
    stored, header = encode(state, base, "k")
    assert len(header["packed"]["float32"]["blocks"]) > 3
    assert tensors_digest(decode(stored, header, base, "k")) == tensors_digest(state)


def test_small_changes_take_less_space_than_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(50_000, generator=generator)}
    state = {"a": base["a"] * (1 + 1e-4 * torch.randn(50_000, generator=generator))}
    stored, _ = encode(state, base, "k")
    assert sum(t.nbytes for t in stored.values()) < 0.6 * state["a"].nbytes


def test_a_damaged_plane_is_an_error() -> None:
    state = {"a": torch.randn(100)}
    stored, header = encode(state, {}, "k")
    header["packed"]["float32"]["blocks"][0][0] = 99
    with pytest.raises(StoreError, match="cannot be read"):
        decode(stored, header, {}, "k")


def test_states_log_and_numbers_come_back(tmp_path) -> None:
    """With the base, before the base was there, and through a reopened store."""
    runs = specs(2)
    first, second = runs
    with Store.create(tmp_path / "s") as store:
        store.add_runs(runs, BASE.digest, "s")
        store.commit(first, result(0))  # no base yet: stored whole
        store.add_base(BASE)
        rows = [dict(step=4, part="test", name=n, value=v) for n, v in
                (("nan", math.nan), ("inf", math.inf), ("none", None), ("low", -math.inf))]  # fmt: skip
        given_ = result(1)
        store.commit(second, type(given_)(given_.outcome, given_.states, given_.log, tuple(rows), 2.5))
    with Store.open(tmp_path / "s", "r") as store:
        for seed, name in enumerate((first, second)):
            for step in (2, 4):
                assert tensors_digest(store.state(name, step)) == tensors_digest(result(seed).states[step])
            np.testing.assert_array_equal(store.log(name).batch_loss, result(seed).log.batch_loss)
        assert tensors_digest(store.state(first)) == tensors_digest(result(0).states[4])
        values = {row["name"]: row["value"] for row in store.metrics(second)}
        assert math.isnan(values.pop("nan"))
        assert values == {"inf": math.inf, "low": -math.inf, "none": None}
        assert store.export(tmp_path / "x.csv") == 4
        rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
        assert [row["test_nan"] for row in rows] == ["", "", "", "nan"]
        assert len(store.query("isnan(test_nan)")) == 1
        assert len(store.query("test_inf > 1e300")) == 1
        with pytest.raises(StoreError, match="choose from 2, 4"):
            store.state(first, 3)


def test_bfloat16_task_vectors_round_the_backbone_only(tmp_path) -> None:
    with Store.create(tmp_path / "s", task_vectors="bfloat16") as store:
        store.add_base(BASE)
        (name,) = runs = specs(1)
        store.add_runs(runs, BASE.digest, "s")
        given_ = result(0).states[4]
        store.commit(name, result(0))
        kept = store.state(name)
        for exact in ("bn.running_var", "bn.num_batches_tracked", "head.weight"):
            assert torch.equal(kept[exact], given_[exact])
        x_0 = BASE.state["a.weight"]
        assert torch.equal(kept["a.weight"], x_0 + (given_["a.weight"] - x_0).to(torch.bfloat16).float())
        assert not torch.equal(kept["a.weight"], given_["a.weight"])
        assert not store.commit(name, result(0))  # the same run again is the same run
        assert store.verify(lambda d, run: result(run.seed), sample=1, deep=True).good
