"""Resampled intervals against enumeration, other software, Monte Carlo coverage and asymptotic formulas."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.errors import MergeboundError
from theory.function_space import (
    LogitField,
    QuadraticField,
    cross_entropy,
    joint_standard_error,
    minimise_risk,
    predict_from_logits,
    predict_risk,
)
from theory.resampling import (
    Images,
    asymptotic_optimism,
    cross_fitted_risk,
    difference_interval,
    minimiser_interval,
    prediction_interval,
    risk_interval,
    risk_optimal_fit,
    share_below_zero,
    take,
)

SEEDS = st.integers(0, 2**32 - 1)


def task(rng: np.random.Generator, n: int, experts: int = 2, classes: int = 3) -> LogitField:
    """Images whose labels follow logits that the experts know in part, so that an interior minimiser exists."""
    constant = 0.5 * rng.standard_normal((n, classes))
    slopes = rng.standard_normal((experts, n, classes))
    truth = constant + np.tensordot(np.linspace(0.4, 0.8, experts), slopes, axes=1)
    labels = (truth + rng.gumbel(size=truth.shape)).argmax(axis=-1)
    return LogitField(constant, slopes, labels, "secant")


# --- draws -----------------------------------------------------------------------------------------------------------


def test_draws_keep_the_size_of_every_task_and_move_shared_images_together() -> None:
    rng = np.random.default_rng(0)
    alone = Images.of([5, 9]).draw(50, rng)
    assert [c.shape for c in alone] == [(50, 5), (50, 9)]
    for counts in alone:
        np.testing.assert_array_equal(counts.sum(axis=1), counts.shape[1])
    names = [np.arange(60), np.arange(30, 90)[::-1]]  # thirty of their own each, thirty shared
    first, second = Images.of([60, 60], names).draw(40, rng)
    np.testing.assert_array_equal(first.sum(axis=1), 60)
    np.testing.assert_array_equal(second.sum(axis=1), 60)
    np.testing.assert_array_equal(first[:, 30:], second[:, ::-1][:, :30])
    assert np.abs(first.mean(axis=0) - 1.0).max() < 0.6


def test_a_task_is_never_left_empty() -> None:
    names = [np.array([0, 1]), np.array([1, 2, 3, 4, 5, 6])]
    for counts in Images.of([2, 6], names).draw(2000, np.random.default_rng(1)):
        assert (counts.sum(axis=1) > 0).all()


def test_resampling_distribution_by_enumeration() -> None:
    """Three images have 27 resamples: the replicates are those, as often as they should be."""
    losses = np.array([0.1, 0.7, 3.0])
    exact = np.sort([np.mean(s) for s in product(losses, repeat=3)])
    found = risk_interval([losses], resamples=40_000, seed=2, method="percentile")
    np.testing.assert_allclose(
        np.quantile(found.replicates, np.linspace(0.05, 0.95, 7)), np.quantile(exact, np.linspace(0.05, 0.95, 7)), 0.15
    )
    values, counts = np.unique(found.replicates.round(9), return_counts=True)
    expected, often = np.unique(exact.round(9), return_counts=True)
    np.testing.assert_allclose(values, expected)
    np.testing.assert_allclose(counts / 40_000, often / 27, atol=0.01)


def test_folds_are_even_in_every_task_and_keep_shared_images_together() -> None:
    rng = np.random.default_rng(3)
    for fold in Images.of([10, 21]).folds(5, rng):
        assert np.ptp(np.bincount(fold)) <= 1
    names = [np.arange(40), np.arange(20, 60)]
    first, second = Images.of([40, 40], names).folds(4, rng)
    np.testing.assert_array_equal(first[20:], second[:20])


# --- intervals of risks ----------------------------------------------------------------------------------------------


def test_standard_errors_agree_with_the_formula_also_for_shared_images() -> None:
    rng = np.random.default_rng(4)
    hard = rng.gamma(1.0, size=80)
    losses = [hard * rng.uniform(0.5, 1.5, 80), hard * rng.uniform(0.5, 1.5, 80), rng.gamma(1.0, size=50)]
    weights = np.array([0.5, 0.3, 0.2])
    names = [np.arange(80), np.arange(80), 100 + np.arange(50)]
    for sources in (None, names):
        found = risk_interval(losses, weights, sources=sources, resamples=4000, seed=1)
        exact = joint_standard_error(losses, sources, weights)
        assert float(found.standard_error) == pytest.approx(exact, rel=0.06)
        assert float(found.estimate) == pytest.approx(sum(w * x.mean() for w, x in zip(weights, losses, strict=True)))


def test_images_of_many_patterns_are_pooled() -> None:
    """Trap: every image in a stratum of its own would show no variance at all."""
    rng = np.random.default_rng(14)
    names = [np.flatnonzero(rng.random(120) < 0.5) for _ in range(6)]
    losses = [rng.gamma(1.0, size=len(s)) for s in names]
    found = risk_interval(losses, sources=names, resamples=3000, seed=0)
    assert float(found.standard_error) == pytest.approx(joint_standard_error(losses, names), rel=0.15)


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_intervals_agree_with_another_implementation(method: str) -> None:
    losses = np.random.default_rng(5).gamma(0.5, size=60)
    ours = risk_interval([losses], resamples=6000, seed=1, method=method, level=0.9)  # type: ignore[arg-type]
    theirs = scipy.stats.bootstrap(
        (losses,), np.mean, n_resamples=6000, confidence_level=0.9, method=method, rng=np.random.default_rng(2)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert float(ours.low) == pytest.approx(theirs.low, abs=0.04 * width)
    assert float(ours.high) == pytest.approx(theirs.high, abs=0.04 * width)


def test_coverage_for_skewed_losses_of_two_tasks() -> None:
    rng, covered = np.random.default_rng(6), 0
    for seed in range(250):
        losses = [rng.exponential(1.0, 40), rng.exponential(2.0, 60)]
        found = risk_interval(losses, [0.5, 0.5], resamples=300, seed=seed)
        covered += bool(found.low <= 1.5 <= found.high)
    assert 0.89 <= covered / 250 <= 0.975


def test_trap_shared_images_counted_as_independent_cover_too_little() -> None:
    rng, joint, naive = np.random.default_rng(7), 0, 0
    names = [np.arange(50)] * 4
    for seed in range(150):
        hard = rng.exponential(1.0, 50)
        losses = [hard * s for s in (0.5, 1.0, 1.5, 1.0)]
        right = risk_interval(losses, sources=names, resamples=300, seed=seed)
        wrong = risk_interval(losses, resamples=300, seed=seed)
        joint += bool(right.low <= 1.0 <= right.high)
        naive += bool(wrong.low <= 1.0 <= wrong.high)
    assert 0.86 <= joint / 150 <= 0.99
    assert naive / 150 < 0.80


def test_trap_paired_differences_see_what_overlapping_intervals_hide() -> None:
    rng = np.random.default_rng(8)
    hard = rng.exponential(2.0, 100)
    first, second = [hard], [hard + 0.05 + 0.02 * rng.standard_normal(100)]
    one, other = risk_interval(first), risk_interval(second)
    assert one.high > other.low
    found = difference_interval(first, second)
    assert found.high < 0.0
    assert share_below_zero(found) == 1.0
    same = difference_interval(first, first)
    assert (float(same.low), float(same.high), float(share_below_zero(same))) == (0.0, 0.0, 0.5)


def test_many_merges_at_once_equal_one_by_one() -> None:
    rng = np.random.default_rng(9)
    fields, alphas = [task(rng, 30), task(rng, 25)], rng.uniform(0, 1, (2, 3, 2))
    together = prediction_interval(fields, alphas, [0.3, 0.7], resamples=200, seed=5)
    np.testing.assert_allclose(together.estimate, predict_risk(fields, alphas, [0.3, 0.7]).risk, rtol=1e-12)
    assert together.replicates.shape == (200, 2, 3)
    alone = prediction_interval(fields, alphas[1, 2], [0.3, 0.7], resamples=200, seed=5)
    for name in ("estimate", "low", "high", "standard_error"):
        np.testing.assert_allclose(getattr(together, name)[1, 2], getattr(alone, name), rtol=1e-9)
    assert (together.low < together.high).all()
    again = prediction_interval(fields, alphas, [0.3, 0.7], resamples=200, seed=6)
    assert not np.array_equal(together.replicates, again.replicates)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SEEDS, st.floats(0.1, 1e6), st.floats(-5.0, 5.0))
def test_intervals_scale_and_shift_with_the_losses(seed: int, scale: float, shift: float) -> None:
    losses = np.random.default_rng(seed).gamma(1.0, size=20)
    plain = risk_interval([losses], resamples=100, seed=3)
    moved = risk_interval([scale * losses + shift], resamples=100, seed=3)
    for name in ("low", "high"):
        np.testing.assert_allclose(getattr(moved, name), scale * getattr(plain, name) + shift, rtol=1e-6, atol=1e-6)


def test_constant_losses_have_no_width() -> None:
    found = risk_interval([np.full(7, 0.3)], resamples=50)
    assert float(found.low) == pytest.approx(0.3)
    assert float(found.high) == pytest.approx(0.3)


# --- minimisers ------------------------------------------------------------------------------------------------------


def test_weighted_copies_are_copies() -> None:
    rng = np.random.default_rng(10)
    field = task(rng, 12)
    index = np.array([0, 0, 3, 7, 7, 7])
    drawn = take(field, index)
    np.testing.assert_allclose(
        cross_entropy(drawn.at([0.3, 0.2]), drawn.labels), cross_entropy(field.at([0.3, 0.2]), field.labels)[index]
    )
    curved = QuadraticField(field.constant, field.slopes, field.slopes, field.labels, "second_order")
    np.testing.assert_allclose(take(curved, index).at([0.3, 0.2]), curved.at([0.3, 0.2])[index], rtol=1e-12)


def test_spread_and_optimism_of_the_minimiser_against_fresh_images() -> None:
    """Monte Carlo truth of both, against bootstrap, cross-fitting and the sandwich formula."""
    rng, n = np.random.default_rng(11), 80
    population = task(rng, 20_000)
    wide = {"bounds": (-3.0, 4.0)}
    fit = risk_optimal_fit(bounds=(-3.0, 4.0))
    chosen, optimism = [], []
    for _ in range(150):
        sample = take(population, rng.integers(0, 20_000, n))
        found = minimise_risk([sample], bounds=wide["bounds"])
        chosen.append(found.alpha)
        optimism.append(float(predict_risk([population], found.alpha).risk) - found.risk)
    spread, bias = np.std(chosen, axis=0), float(np.mean(optimism))
    noise = float(np.std(optimism)) / np.sqrt(150)
    resampled, crossed, formula, errors = [], [], [], []
    for seed in range(8):
        sample = take(population, rng.integers(0, 20_000, n))
        found = minimiser_interval([sample], fit, resamples=25, seed=seed)
        resampled.append(found.optimism)
        errors.append(found.alpha.standard_error)
        assert found.corrected == found.risk + found.optimism
        crossed.append(cross_fitted_risk([sample], fit, folds=5, resamples=50, seed=seed).optimism)
        predicted, covariance = asymptotic_optimism([sample], found.alpha.estimate)
        formula.append((predicted, *np.sqrt(np.diag(covariance))))
    assert bias > 3 * noise  # the trap: the minimum is too low on its own images
    np.testing.assert_allclose(np.mean(errors, axis=0), spread, rtol=0.3)
    np.testing.assert_allclose(np.mean(formula, axis=0)[1:], spread, rtol=0.25)
    assert np.mean(formula, axis=0)[0] == pytest.approx(bias, abs=3 * noise + 0.2 * bias)
    assert np.mean(resampled) == pytest.approx(bias, abs=3 * noise + 0.5 * bias)
    assert np.mean(crossed) == pytest.approx(bias, abs=3 * noise + 1.0 * bias)


def test_intervals_of_the_coefficients_cover() -> None:
    rng, covered = np.random.default_rng(12), 0
    population = task(rng, 20_000, experts=1)
    truth = minimise_risk([population], bounds=(-3.0, 4.0)).alpha
    fit = risk_optimal_fit(bounds=(-3.0, 4.0), start=truth)
    for seed in range(30):
        sample = take(population, rng.integers(0, 20_000, 60))
        found = minimiser_interval([sample], fit, resamples=30, seed=seed, level=0.9).alpha
        covered += bool(found.low[0] <= truth[0] <= found.high[0])
    assert covered / 30 >= 0.75


def test_choosing_the_best_of_many_is_optimistic_and_cross_fitting_says_so() -> None:
    """Pure noise: no lambda is better than another on fresh images, the chosen one only looks it."""
    rng = np.random.default_rng(13)
    grid = np.linspace(0, 1, 11)

    def best_of_grid(fields):  # type: ignore[no-untyped-def]
        return grid[[int(np.argmin(predict_risk(fields, grid[:, None]).risk))]]

    gaps = []
    for seed in range(20):
        labels = rng.integers(0, 2, 30)
        field = LogitField(np.zeros((30, 2)), rng.standard_normal((1, 30, 2)), labels, "noise")
        found = cross_fitted_risk([field], best_of_grid, folds=5, repeats=2, resamples=50, seed=seed)
        gaps.append(found.optimism)
        assert found.in_sample <= np.log(2) + 1e-12  # lambda = 0 is in the grid
        assert found.fold_alphas.shape == (10, 1)
    assert np.mean(gaps) > 2 * np.std(gaps) / np.sqrt(20)


def test_cross_fitting_prices_each_image_at_coefficients_chosen_without_it() -> None:
    rng = np.random.default_rng(15)
    fields, seen = [task(rng, 10), task(rng, 13)], []
    names = [np.arange(10), np.arange(100, 113)]

    def record(parts):  # type: ignore[no-untyped-def]
        seen.append([part.labels.shape[0] for part in parts])
        return np.array([0.2, 0.1 * len(seen)])

    found = cross_fitted_risk(fields, record, [0.4, 0.6], folds=2, sources=names, resamples=20, seed=0)
    assert seen[0] == [10, 13]
    assert np.add(seen[1], seen[2]).tolist() == [10, 13]
    losses = [
        [cross_entropy(f.at([0.2, 0.1 * k]), f.labels) for k in (2, 3)] for f in fields
    ]  # each image has one of two
    lowest = sum(w * np.min(x, axis=0).mean() for w, x in zip([0.4, 0.6], losses, strict=True))
    highest = sum(w * np.max(x, axis=0).mean() for w, x in zip([0.4, 0.6], losses, strict=True))
    assert lowest < found.risk.estimate < highest
    assert found.in_sample == pytest.approx(float(predict_risk(fields, [0.2, 0.1], [0.4, 0.6]).risk))


def test_asymptotics_leave_fixed_coefficients_alone_and_count_shared_images_once() -> None:
    rng = np.random.default_rng(16)
    field = task(rng, 60)
    alpha = minimise_risk([field], bounds=(-3.0, 4.0)).alpha
    optimism, covariance = asymptotic_optimism([field], alpha, free=[True, False])
    assert covariance[1].tolist() == [0.0, 0.0]
    assert 0 < optimism < asymptotic_optimism([field], alpha)[0]
    assert asymptotic_optimism([field], alpha, free=[False, False])[0] == 0.0
    twice = asymptotic_optimism([field, field], alpha, sources=[np.arange(60)] * 2)
    np.testing.assert_allclose(twice[1], asymptotic_optimism([field], alpha)[1], rtol=1e-9)
    apart = asymptotic_optimism([field, field], alpha)
    np.testing.assert_allclose(apart[1], twice[1] / 2, rtol=1e-9)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused_by_name() -> None:
    losses, rng = [np.ones(4), np.ones(6)], np.random.default_rng(0)
    field = task(rng, 6)
    curved = QuadraticField(field.constant, field.slopes, field.slopes, field.labels, "q")
    flat = LogitField(field.constant, 0 * field.slopes, field.labels, "flat")
    for named, call in (
        ("level", lambda: risk_interval(losses, level=1.0)),
        ("method", lambda: risk_interval(losses, method="basic")),  # type: ignore[arg-type]
        ("weights", lambda: risk_interval(losses, [1.0])),
        ("weights", lambda: risk_interval(losses, [1.0, -1.0])),
        ("resamples", lambda: risk_interval(losses, resamples=1)),
        ("sources", lambda: risk_interval(losses, sources=[np.arange(4), np.arange(5)])),
        ("finite", lambda: risk_interval([np.array([1.0, np.nan])])),
        ("losses", lambda: risk_interval([np.ones((2, 4)), np.ones(6)])),
        ("task", lambda: risk_interval([])),
        ("sizes", lambda: Images.of([3, 0])),
        ("same images", lambda: difference_interval(losses, losses[::-1])),
        ("folds", lambda: cross_fitted_risk([field], folds=7)),
        ("repeats", lambda: cross_fitted_risk([field], repeats=0)),
        ("affine", lambda: asymptotic_optimism([curved], [0.1, 0.1])),
        ("flat", lambda: asymptotic_optimism([flat], [0.1, 0.1])),
        ("free", lambda: asymptotic_optimism([field], [0.1, 0.1], free=[True])),
    ):
        with pytest.raises(MergeboundError, match=named):
            call()


def test_one_image_has_no_standard_error() -> None:
    """A mean of one number has no spread that the number could show: not 0, which would be an interval of no width."""
    two, one = np.array([1.0, 3.0]), np.array([2.0])
    assert np.isnan(joint_standard_error([two, one]))
    assert np.isnan(joint_standard_error([one, one], [np.array([0]), np.array([0])]))
    assert joint_standard_error([two, one], weights=[1.0, 0.0]) > 0.0  # a task that does not count asks for nothing
    found = predict_from_logits([np.zeros((3, 1, 4)), np.zeros((3, 2, 4))], [np.array([1]), np.array([0, 1])])
    assert np.isnan(found.standard_error).all()
    assert found.risk == pytest.approx(np.log(4.0))
