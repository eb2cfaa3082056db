"""Compiled loops against numpy and torch: words, linear combinations, elections, selection, inner products."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray

from merging.kernels.elect import drop, elect, largest_of
from merging.kernels.gram import add_gram
from merging.kernels.linear import beyond, copy, linear, linear_without_base
from merging.kernels.philox import keep, words
from merging.kernels.select import around, collect, count_equal, not_finite, place_of_equal
from merging.random_masks import stream_key, uniform_words
from merging.streaming import selection
from merging.streaming.selection import Threshold, next_above, select
from merging.streaming.source import Inputs

Floats = NDArray[np.float32]
LARGE = np.float32(np.finfo(np.float32).max)
NONE: Floats = np.empty(0, dtype=np.float32)
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 1.0, -1.0, 1.0000001, 0.1, -0.3, 3e38, -3e38, float(LARGE)]
NUMBERS = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False, allow_infinity=False))


def addresses(rows: Floats) -> NDArray[np.int64]:
    return np.array([row.ctypes.data for row in rows], dtype=np.int64)


def same(one: Floats, other: Any) -> bool:
    expected = np.asarray(other, dtype=np.float32)
    numbers = ~np.isnan(expected)
    return bool((one.view(np.uint32) == expected.view(np.uint32))[numbers].all() and np.isnan(one[~numbers]).all())


@st.composite
def rows_and_base(draw: st.DrawFn) -> tuple[Floats, Floats]:
    """Few special entries, repeated over more than a block."""
    experts, size = draw(st.integers(1, 5)), draw(st.sampled_from([1, 7, 2048, 4099]))
    few = np.array(draw(st.lists(NUMBERS, min_size=6, max_size=24)), dtype=np.float32)
    rng = np.random.default_rng(size)
    return rng.choice(few, (experts, size)), rng.choice(few, size)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    data=rows_and_base(),
    weights=st.lists(NUMBERS, min_size=5, max_size=5),
    factor=NUMBERS,
    divisor=st.sampled_from([1.0, 3.0, 0.1]),
    shift=st.sampled_from([0.0, 0.5, -1.5]),
    weighted=st.booleans(),
)
def test_linear_combinations_round_as_torch_does(
    data: tuple[Floats, Floats], weights: list[float], factor: float, divisor: float, shift: float, weighted: bool
) -> None:
    """Product by product and sum by sum, in the order of the rows; nothing is fused."""
    rows, base = data
    chosen = np.array(weights[: len(rows)], dtype=np.float32) if weighted else NONE
    moved = torch.from_numpy(rows) - torch.from_numpy(base)
    for origin, deltas in ((base, moved), (None, torch.from_numpy(rows))):
        total = None
        for i, row in enumerate(deltas.unbind(0)):
            term = row * float(chosen[i]) if weighted else row
            total = term if total is None else total + term
        assert total is not None
        if factor != 1.0:
            total = total * factor
        if divisor != 1.0:
            total = total / divisor
        out = np.empty(base.size, dtype=np.float32)
        last = np.float32(divisor)
        if origin is None:
            linear_without_base(out, addresses(rows), chosen, np.float32(factor), last)
            assert same(out, (total + 0.0).numpy())
            continue
        if shift != 0.0:
            total = total + torch.from_numpy(base) * shift
        linear(out, base.ctypes.data, addresses(rows), chosen, np.float32(factor), last, np.float32(shift))
        assert same(out, (total + torch.from_numpy(base)).numpy())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=rows_and_base(), factor=NUMBERS, seed=st.integers(0, 99))
def test_dropped_and_largest_entries(data: tuple[Floats, Floats], factor: float, seed: int) -> None:
    rows, base = data
    masks = np.random.default_rng(seed).integers(0, 2, rows.shape).astype(np.uint8)
    out = np.empty(base.size, dtype=np.float32)
    with np.errstate(all="ignore"):
        moved = rows - base
        total = moved[0] * masks[0].astype(np.float32)
        for row, mask in zip(moved[1:], masks[1:], strict=True):
            total = total + row * mask.astype(np.float32)
        drop(out, base.ctypes.data, addresses(rows), addresses(masks), NONE, NONE, np.float32(factor))
        assert same(out, total * np.float32(factor) + base)
        bad = largest_of(out, base.ctypes.data, addresses(rows), np.float32(factor))
        assert bad == np.count_nonzero(~np.isfinite(moved))
        high, low = moved.max(axis=0), moved.min(axis=0)
        expected = np.where(high >= -low, high, low) * np.float32(factor) + base
        assert np.array_equal(out, expected, equal_nan=True)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    data=rows_and_base(), mean=st.booleans(), weighted=st.booleans(), lowest=st.lists(NUMBERS, min_size=5, max_size=5)
)
def test_elections_against_numpy(data: tuple[Floats, Floats], mean: bool, weighted: bool, lowest: list[float]) -> None:
    rows, base = data
    n = len(rows)
    limits = np.abs(np.array(lowest[:n], dtype=np.float32))
    weights = np.linspace(0.5, 2.0, n).astype(np.float32) if weighted else NONE
    out = np.empty(base.size, dtype=np.float32)
    found = elect(
        out,
        base.ctypes.data,
        addresses(rows),
        limits,
        np.empty(0, dtype=np.int64),
        NONE,
        NONE,
        NONE,
        weights,
        mean,
        np.float32(0.7),
        np.empty((n, 2048), dtype=np.float32),
    )
    with np.errstate(all="ignore"):
        moved = rows - base
        assert found == np.count_nonzero(~np.isfinite(moved))
        kept = np.where(np.abs(moved) >= limits[:, None], moved, np.float32(0))
        vote, total, mass = (np.zeros_like(base) for _ in range(3))
        for row in kept:
            vote = vote + row
        for i, row in enumerate(kept):
            agrees = (np.sign(row) == np.sign(vote)) & (vote != 0)
            share = weights[i] if weighted else np.float32(1)
            total = total + np.where(agrees, np.abs(row) * share, np.float32(0))
            mass = mass + agrees * share
        if mean:
            total = np.where(mass > 0, total / mass, total)
        expected = total * np.sign(vote) * np.float32(0.7) + base
        fine = np.abs(moved.astype(np.float64)).sum(axis=0) < 1e38  # overflow: see test_streaming_equality.py
    assert np.array_equal(out[fine], expected[fine])


def test_words_beyond_counters_of_32_bits() -> None:
    """Block 2^32 is where the lower word of the counter overflows: entry 2^34 of a tensor."""
    key = stream_key(7, "expert", "tensor")
    for start in (0, 4, 4 * (2**32 - 2), 2**34, 4 * (2**33 - 1), 2**40):
        for count in (1, 3, 4, 9, 8192, 8195):
            out = np.empty(count, dtype=np.uint32)
            words(key, start, out)
            assert np.array_equal(out, uniform_words(7, "expert", "tensor", count, start)), (start, count)
            kept = np.empty(count, dtype=np.uint8)
            keep(key, start, np.uint32(2**31), kept)
            assert np.array_equal(kept, out >= 2**31)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=rows_and_base(), ends=st.tuples(NUMBERS, NUMBERS), number=st.integers(1, 3000))
def test_counting_and_collecting(data: tuple[Floats, Floats], ends: tuple[float, float], number: int) -> None:
    rows, base = data
    row = rows[0]
    with np.errstate(over="ignore"):
        magnitudes = np.abs(row - base)
    low, high = sorted(np.abs(np.array(ends, dtype=np.float32)))
    places = base.ctypes.data, row.ctypes.data, row.size
    inside = magnitudes[(magnitudes >= low) & (magnitudes <= high)]
    first, last = (int(np.float32(end).view(np.uint32)) for end in (low, high))
    shift = max(0, (last - first).bit_length() - 10)
    for kind in (np.int32, np.int64):
        histogram = np.zeros(((last - first) >> shift) + 1, dtype=kind)
        assert around(*places, low, high, first, shift, histogram) == np.count_nonzero(magnitudes > high)
        bins = (inside.view(np.uint32).astype(np.int64) - first) >> shift
        assert np.array_equal(histogram, np.bincount(bins, minlength=len(histogram)))
    room = np.empty(row.size, dtype=np.float32)
    assert collect(*places, low, high, room) == (np.count_nonzero(magnitudes > high), inside.size)
    assert np.array_equal(room[: inside.size], inside)
    small = np.full(min(3, inside.size), -1, dtype=np.float32)
    assert collect(*places, low, high, small)[1] == inside.size  # those that do not fit are counted all the same
    value = magnitudes[number % row.size]
    equal = np.flatnonzero(magnitudes == value)
    assert count_equal(*places, value) == equal.size
    wanted = row.size if number > equal.size else equal[number - 1] + 1
    assert place_of_equal(*places, value, number) == wanted
    assert not_finite(*places) == np.count_nonzero(~np.isfinite(magnitudes))


def test_counters_of_more_than_two_to_the_31() -> None:
    zeros = np.zeros(5000, dtype=np.float32)
    histogram = np.array([2**31 - 1], dtype=np.int64)
    around(zeros.ctypes.data, zeros.ctypes.data, zeros.size, np.float32(0), np.float32(0), 0, 0, histogram)
    assert histogram.tolist() == [2**31 + 4999]


def test_copies_limits_and_inner_products() -> None:
    values = np.array([*SPECIAL, np.nan, np.inf, -np.inf] * 300, dtype=np.float32)
    out = np.empty_like(values)
    copy(values.ctypes.data, out)
    assert np.array_equal(out.view(np.uint32), values.view(np.uint32))
    assert beyond(values, LARGE) == 3 * 300
    assert beyond(values, np.float32(1e38)) == 6 * 300
    rng = np.random.default_rng(0)
    rows, base = rng.standard_normal((5, 3001)).astype(np.float32), rng.standard_normal(3001).astype(np.float32)
    for on_weights in (False, True):
        found = np.zeros((5, 5))
        add_gram(base.ctypes.data, addresses(rows), 3001, on_weights, found)
        vectors = (rows - base).astype(np.float64) + (base.astype(np.float64) if on_weights else 0.0)
        assert np.allclose(found, vectors @ vectors.T, rtol=1e-13, atol=1e-11)
        assert np.array_equal(found, found.T)


def test_the_next_larger_magnitude() -> None:
    assert next_above(np.float32(0)) == np.float32(1e-45)
    assert next_above(LARGE) == np.inf
    assert np.isnan(next_above(np.float32(np.nan)))


def chosen_by(threshold: Threshold, flat: Floats) -> NDArray[np.bool_]:
    places = np.arange(flat.size)
    chosen: NDArray[np.bool_] = (flat > threshold.value) | ((flat == threshold.value) & (places < threshold.cut))
    return chosen


def values_of(rng: np.random.Generator, kind: str, sizes: list[tuple[str, int]]) -> dict[str, Floats]:
    found = {}
    for place, (name, size) in enumerate(sizes):
        values = rng.standard_normal(size)
        if kind == "few":
            values = np.round(values * 2) / 2
        elif kind == "uneven":  # scales that differ between tensors, and many zeros
            values = values * 10.0 ** (3 * place) * (values > 0)
        elif kind == "equal":
            values = np.full(size, 0.25)
        elif kind == "denormal":
            values = values * 1e-43
        elif kind == "sorted":
            values = np.sort(np.abs(values))
        elif kind == "lonely":  # a sample sees nothing of what is wanted
            values = np.where(np.arange(size) % 997 == 5, values * 1e6, 0.0)
        found[name] = values.astype(np.float32)
    return found


@pytest.mark.parametrize("kind", ["plain", "few", "uneven", "equal", "denormal", "sorted", "lonely"])
@pytest.mark.parametrize(("collected", "many"), [(0, 1 << 31), (0, 1), (1 << 24, 1 << 31)])
def test_selection_is_exact(kind: str, collected: int, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets that miss, histograms that are refined, ties across tensors: the first of equal ones in index order."""
    monkeypatch.setattr(selection, "SMALL", 100)
    monkeypatch.setattr(selection, "COLLECTED", collected)
    monkeypatch.setattr(selection, "_SAMPLED", 64 if many == 1 else 1 << 24)
    monkeypatch.setattr(selection, "_MANY", many)
    monkeypatch.setattr(selection, "_BINS", 1 << 12)
    monkeypatch.setattr(selection, "_RUNS", 48)
    rng = np.random.default_rng(len(kind))
    sizes = [("a", 5000), ("b", 70), ("c", 1), ("d", 0), ("e", 9011)]
    experts = [values_of(rng, kind, sizes) for _ in range(3)]
    states = [{name: torch.from_numpy(values) for name, values in found.items()} for found in experts]
    flats = [np.abs(np.concatenate([found[name] for name, _ in sizes])) for found in experts]
    orders = [np.argsort(-flat.astype(np.float64), kind="stable") for flat in flats]
    size = flats[0].size
    with Inputs(None, states) as inputs, ThreadPoolExecutor(2) as pool:
        for count in (0, 1, 17, 4321, size - 1, size):
            found = select(inputs, sizes, count, chunk=4096, pool=pool, workers=2)
            for threshold, flat, order in zip(found, flats, orders, strict=True):
                chosen = chosen_by(threshold, flat)
                assert chosen.sum() == count
                assert chosen[order[:count]].all()
        for number, threshold in enumerate(select(inputs, sizes, 4321, chunk=777)):
            assert chosen_by(threshold, flats[number])[orders[number][:4321]].all()
