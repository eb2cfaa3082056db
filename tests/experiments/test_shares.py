"""Shares of the data: nested, seeded, of the right size, and in the proportions of the classes where asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.finetune import loop
from experiments.inputs.shares import nested_subset, nested_subsets, stratified_subset, subset_size
from theory.errors import MergeboundError

SHARES = st.floats(0.001, 1.0)


@given(st.integers(1, 500), SHARES, SHARES, st.integers(0, 2**31))
def test_a_smaller_share_is_the_beginning_of_a_larger_one(n: int, one: float, other: float, seed: int) -> None:
    small, large = sorted((one, other))
    labels = np.random.default_rng(seed).integers(0, 7, n)
    for pick in (lambda share: nested_subset(n, share, seed), lambda share: stratified_subset(labels, share, seed)):
        less, more, everything = pick(small), pick(large), pick(1.0)
        assert len(less) == subset_size(n, small) == max(1, round(small * n))
        assert less.tolist() == more[: len(less)].tolist()
        assert sorted(everything.tolist()) == list(range(n))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=400), SHARES, st.integers(0, 1000))
def test_stratified_shares_keep_the_proportions(labels: list[int], share: float, seed: int) -> None:
    array = np.array(labels)
    rows = stratified_subset(array, share, seed)
    assert len(set(rows.tolist())) == len(rows)
    classes, counts = np.unique(array, return_counts=True)
    for value, count in zip(classes, counts, strict=True):
        exact = len(rows) * count / len(array)
        bound = 0.5 + len(classes) * count / (2 * len(array))
        assert abs(np.sum(array[rows] == value) - exact) <= bound + 1e-9


def test_equal_classes_get_equal_shares() -> None:
    labels = np.repeat(np.arange(10), 100)
    for share in (0.5, 0.8, 1.0):
        assert np.bincount(labels[stratified_subset(labels, share, 3)]).tolist() == [round(100 * share)] * 10


def test_bits_are_those_that_stored_experts_were_trained_with() -> None:
    expected = np.random.default_rng([5, 0x5EED]).permutation(40)
    assert nested_subset(40, 0.5, 5).tolist() == expected[:20].tolist()
    assert loop.nested_subset is nested_subset
    assert {share: rows.tolist() for share, rows in nested_subsets(40, (0.5, 1.0), 5).items()} == {
        0.5: expected[:20].tolist(),
        1.0: expected.tolist(),
    }


def test_every_sample_is_equally_likely() -> None:
    labels = np.repeat([0, 1], [3, 9])
    for pick in (lambda seed: nested_subset(12, 0.5, seed), lambda seed: stratified_subset(labels, 0.5, seed)):
        counts = np.bincount(np.concatenate([pick(seed) for seed in range(600)]), minlength=12)
        assert counts.min() > 300 - 5 * np.sqrt(150)
        assert counts.max() < 300 + 5 * np.sqrt(150)


def test_what_is_refused() -> None:
    for share in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(MergeboundError, match=r"data_share = .*must be in \(0, 1\]"):
            nested_subset(10, share, 0)
    with pytest.raises(MergeboundError, match="there are no samples"):
        nested_subset(0, 0.5, 0)
    with pytest.raises(MergeboundError, match=r"labels: float64 of shape \(3,\)"):
        stratified_subset(np.zeros(3), 0.5, 0)
