"""Intervals of eps_i cover on the quadratic family, where percentiles of resampled means do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.measure.twins.estimates import log_interval, stability, summary
from experiments.measure.twins.merges import MergeChoice, MergeTwins, _ratio_interval
from experiments.measure.twins.quadratic import quadratic_twins
from merging.merge import flat_space
from merging.partition import partition
from theory.quadratic import QuadraticTask
from theory.recipe import Expert


def _distances(replicates: int) -> np.ndarray:
    """(R, n) distances of all twins of R data sets."""
    rng = np.random.default_rng(0)
    root = rng.standard_normal((4, 4))
    task = QuadraticTask(root @ root.T / 4, np.ones(4), np.diag([0.3, 0.5, 1.0, 2.0]))
    expert = Expert("a", n=120, batch_size=4, learning_rate=0.005, steps=30, L=4.0, sampling="reshuffle")
    runs = quadratic_twins(task, np.zeros(4), expert, replicates, 1)
    return np.asarray(np.linalg.norm(runs[:, 1:] - runs[:, :1], axis=2))


def test_intervals_of_few_twins_cover() -> None:
    every, rng = _distances(20), np.random.default_rng(5)
    truth = np.sqrt((every**2).mean(axis=1))
    for twins, least in ((4, 0.89), (8, 0.88), (16, 0.89)):
        inside, plain = [], []
        for row, true in zip(every, truth, strict=True):
            for _ in range(8):
                chosen = row[rng.permutation(len(row))[:twins]]
                found = summary([chosen], "rms", seed=len(inside), resamples=200)
                inside.append(found.low <= true <= found.high)
                draws = np.sqrt((chosen[rng.integers(0, twins, (200, twins))] ** 2).mean(axis=1))
                plain.append(np.quantile(draws, 0.025) <= true <= np.quantile(draws, 0.975))
        assert np.mean(inside) > least, twins
        assert np.mean(plain) < np.mean(inside) - 0.04, twins  # what stood here before


def test_intervals_over_replicates_cover_the_mean_over_data_sets() -> None:
    every, rng = _distances(60), np.random.default_rng(6)
    every = every * np.exp(0.3 * rng.standard_normal(60))[:, None]  # data sets differ by more than their twins
    truth, inside, alone = np.sqrt((every**2).mean()), [], []
    for trial in range(80):
        rows = rng.permutation(60)[:3]
        groups = [every[r, rng.permutation(120)[:16]] for r in rows]
        found = summary(groups, "rms", seed=trial, resamples=200)
        inside.append(found.low <= truth <= found.high)
        pooled = summary([np.concatenate(groups)], "rms", seed=trial, resamples=200)
        alone.append(pooled.low <= truth <= pooled.high)
    assert np.mean(inside) > 0.92
    assert np.mean(alone) < np.mean(inside)


def test_scale_units_and_edges() -> None:
    rng = np.random.default_rng(1)
    values = rng.exponential(size=12)
    for kind in ("mean", "rms"):
        one, other = (summary([scale * values], kind, seed=3) for scale in (1.0, 7.0))  # type: ignore[arg-type]
        assert [other.value, other.low, other.high, other.error] == pytest.approx(
            [7 * v for v in (one.value, one.low, one.high, one.error)]
        )
        assert one.low < one.value < one.high
    wide, narrow = (summary([values], "rms", seed=3, level=level) for level in (0.99, 0.9))
    assert wide.low < narrow.low
    assert wide.high > narrow.high
    same = summary([np.full(5, 2.0)], "rms")
    assert (same.value, same.low, same.high, same.error) == (2.0, 2.0, 2.0, 0.0)
    none = summary([np.zeros(4)], "rms")
    assert (none.value, none.low, none.high) == (0.0, 0.0, np.inf)  # nobody moved yet, and others may have
    assert summary([np.zeros(4)], "rms", exhaustive=True).high == 0.0
    low, high = log_interval(np.array([2.0, 0.0]), np.random.default_rng(0))
    assert low < 0
    assert high == np.inf  # two twins say nothing of the spread
    q = summary([values], "sup")
    assert (q.low, q.high) == (values.max(), np.inf)


def test_sensitivities_of_linear_merges_have_no_interval_and_others_cover() -> None:
    rng, inside = np.random.default_rng(2), []
    own = rng.exponential(size=10)
    assert _ratio_interval(own**2, 0.09 * own**2, 0.3, rng) == pytest.approx((0.3, 0.3, 0.0))
    for _ in range(150):  # moved / own independent of own: the true ratio of means is that of the factors
        own, factor = rng.exponential(size=8), rng.uniform(0.2, 1.8, size=8)
        value = np.sqrt((own * factor).sum() / own.sum())
        low, high, _ = _ratio_interval(own, own * factor, value, rng)
        inside.append(low <= 1.0 <= high)
    assert np.mean(inside) > 0.9


def test_linear_merges_of_single_precision_have_no_interval() -> None:
    rng = torch.Generator().manual_seed(1)
    start = {"w": torch.randn(300, generator=rng)}
    parts = partition(start)
    space = flat_space(start, parts)
    vectors = start["w"] + 0.1 * torch.randn(2, 300, generator=rng)
    merger = MergeTwins(start["w"], vectors, space, parts, 0, [MergeChoice("average")], 3)
    for twin in range(-1, 5):
        merger.collect(twin, 3, {"w": vectors[0] + 1e-3 * max(twin, 0) * torch.randn(300, generator=rng)})
    found = merger.results(5)[0].sensitivity
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5), rel=1e-9)


def test_few_twins_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    from types import SimpleNamespace

    def run(twins: int) -> SimpleNamespace:
        distances = np.random.default_rng(0).exponential(size=(twins, 1, 3))
        pairs = SimpleNamespace(samples=np.arange(twins))
        return SimpleNamespace(steps=np.array([5]), distances=distances, n=50, pairs=pairs)

    stability([run(8)], resamples=50)  # type: ignore[list-item]
    assert not caplog.records
    stability([run(5)], resamples=50)  # type: ignore[list-item]
    assert "5 twins" in caplog.text
