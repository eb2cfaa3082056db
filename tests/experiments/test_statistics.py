"""Weighted rank statistics against scipy and scikit-learn; coverage of the expert bootstrap by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from experiments import statistics as st


@pytest.mark.parametrize("ties", [False, True])
def test_unit_weights_agree_with_scipy(ties: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = rng.normal(size=60)
        y = x + rng.normal(size=60)
        if ties:
            x, y = np.round(x), np.round(y)
        assert st.spearman(x, y)[0] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        assert st.kendall(x, y)[0] == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
        assert st.auc(x, y > 0)[0] == pytest.approx(roc_auc_score(y > 0, x), abs=1e-12)


def test_integer_weights_equal_repeated_rows() -> None:
    rng = np.random.default_rng(1)
    x, y = np.round(rng.normal(size=30), 1), np.round(rng.normal(size=30), 1)
    counts = rng.integers(0, 4, size=(5, 30)).astype(float)
    for row, value, tau, area, middle in zip(
        counts,
        st.spearman(x, y, counts),
        st.kendall(x, y, counts),
        st.auc(x, y > 0, counts),
        st.mean(x, counts),
        strict=True,
    ):
        repeat = row.astype(int)
        a, b = np.repeat(x, repeat), np.repeat(y, repeat)
        assert value == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)
        assert tau == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)
        assert area == pytest.approx(roc_auc_score(b > 0, a), abs=1e-12)
        assert middle == pytest.approx(a.mean())


def test_weighted_auc_agrees_with_sklearn_sample_weights() -> None:
    rng = np.random.default_rng(2)
    score, flag, weight = np.round(rng.normal(size=80), 1), rng.uniform(size=80) < 0.3, rng.uniform(size=80)
    assert st.auc(score, flag, weight)[0] == pytest.approx(roc_auc_score(flag, score, sample_weight=weight))


def test_hand_computed() -> None:
    # concordant pairs 2 (weights 1*2 and 1*3), discordant 1 (weight 2*3): tau = (2 + 3 - 6) / 11
    assert st.kendall([1, 2, 3], [1, 3, 2], [1, 2, 3])[0] == pytest.approx(-1 / 11)
    assert st.midranks([5, 1, 5], [1, 2, 3])[0] == pytest.approx([4.0, 1.0, 4.0])
    assert st.quantile([1, 2, 3], 0.5)[0] == pytest.approx(2.0)
    # midranks of the weights 1, 1, 2 are at 1/8, 3/8 and 3/4 of the mass: the median interpolates 2 and 3
    assert st.quantile([1, 2, 3], 0.5, [1, 1, 2])[0] == pytest.approx(2 + 1 / 3)


def test_undefined_statistics_are_nan() -> None:
    assert np.isnan(st.spearman([1, 1, 1], [1, 2, 3])[0])
    assert np.isnan(st.kendall([1, 1, 1], [1, 2, 3])[0])
    assert np.isnan(st.auc([1, 2], [True, True])[0])
    assert np.isnan(st.mean_interval([np.nan], st.membership([["a"]])).value)
    with pytest.raises(ValueError, match="columns"):
        st.mean([1, 2, 3], [[1, 1]])


def test_within_averages_strata_by_count() -> None:
    x = np.array([1, 2, 3, 1, 2, 3, 4, 9, 9])
    y = np.array([1, 2, 3, 4, 3, 2, 1, 1, 2])
    size = np.array([2, 2, 2, 4, 4, 4, 4, 8, 8])  # the last stratum has two merges: left out
    assert st.within(st.spearman, x, y, size)(np.ones((1, 9)))[0] == pytest.approx((3 * 1 + 4 * -1) / 7)


def test_weights_are_seeded_and_centred() -> None:
    groups = [["a", "b"], ["c", "d"], ["a", "c", "e"], ["b", "d", "e"]]
    members = st.membership(groups)
    assert members.experts == ("a", "b", "c", "d", "e")
    first, again = st.expert_weights(members, 400, seed=3), st.expert_weights(members, 400, seed=3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, st.expert_weights(members, 400, seed=4))
    assert (first >= 0).all()
    assert first.mean() == pytest.approx(1.0, abs=0.02)


Draw = tuple[NDArray[np.float64], NDArray[np.float64], list[list[str]], NDArray[np.int64]]


def _design(rng: np.random.Generator, experts: int, sizes: tuple[int, ...], per_size: int, noise: float) -> Draw:
    """Two methods per group; a merge's values are means of expert effects plus noise of group and merge."""
    a = rng.normal(size=experts)
    b = 0.9 * a + np.sqrt(1 - 0.81) * rng.normal(size=experts)
    x, y, groups = [], [], []
    for size in sizes:
        for _ in range(per_size):
            group = rng.choice(experts, size, replace=False)
            own = rng.normal(size=2) * noise / 2
            for _ in range(2):
                x.append(a[group].mean() + own[0] + rng.normal() * noise)
                y.append(b[group].mean() + own[1] + rng.normal() * noise)
                groups.append([str(i) for i in group])
    return np.array(x), np.array(y), groups, np.array([len(group) for group in groups])


@pytest.mark.parametrize(
    ("experts", "sizes", "per_size", "noise"),
    [(24, (2, 4, 6, 8), 15, 0.1), (48, (2, 4, 6, 8), 15, 0.1), (24, (8,), 25, 0.1)],
)
def test_coverage_of_the_expert_bootstrap(experts: int, sizes: tuple[int, ...], per_size: int, noise: float) -> None:
    rng = np.random.default_rng(5)
    means, ranks, naive = [], [], []
    for repeat in range(120):
        x, y, groups, _ = _design(rng, experts, sizes, per_size, noise)
        weights = st.expert_weights(st.membership(groups), 200, seed=repeat)
        means.append(st.interval(lambda w, y=y: st.mean(y, w), weights))
        ranks.append(st.interval(lambda w, x=x, y=y: st.spearman(x, y, w), weights, domain=(-1, 1)))
        draws = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=200)
        naive.append(np.quantile(draws @ y / len(y), [0.025, 0.975]))
    assert np.mean([e.low <= 0 <= e.high for e in means]) >= 0.90
    expected = np.mean([e.value for e in ranks])
    assert np.mean([e.low <= expected <= e.high for e in ranks]) >= 0.90
    spread = np.std([e.value for e in means])
    assert np.mean([e.high - e.low for e in means]) <= 1.6 * 2 * 1.96 * spread
    rank_spread = np.std([e.value for e in ranks])
    assert np.mean([e.high - e.low for e in ranks]) <= 3 * 2 * 1.96 * rank_spread
    assert np.mean([low <= 0 <= high for low, high in naive]) <= 0.75


def test_paired_differences_cover_and_are_narrower_than_unpaired() -> None:
    rng = np.random.default_rng(6)
    hits, ratio = [], []
    for repeat in range(120):
        effects, gains = rng.normal(size=24), 0.2 * rng.normal(size=24)
        groups = [rng.choice(24, size, replace=False) for size in (2, 4, 6, 8) for _ in range(10)]
        members = st.membership([[str(i) for i in group] for group in groups])
        base = np.array([effects[g].mean() for g in groups])
        other = base + np.array([0.3 + gains[g].mean() for g in groups]) + 0.02 * rng.normal(size=len(groups))
        paired = st.mean_interval(other - base, members, 200, seed=repeat)
        alone = st.mean_interval(other, members, 200, seed=repeat)
        hits.append(paired.low <= 0.3 <= paired.high)
        ratio.append((paired.high - paired.low) / (alone.high - alone.low))
    assert np.mean(hits) >= 0.90
    assert np.median(ratio) < 0.5


def test_interval_is_clipped_to_the_domain() -> None:
    x = np.arange(12.0)
    members = st.membership([[str(i), str(i + 1)] for i in range(12)])
    found = st.interval(lambda w: st.spearman(x, x, w), st.expert_weights(members, 100), domain=(-1, 1))
    assert (found.value, found.high) == (pytest.approx(1.0), 1.0)
