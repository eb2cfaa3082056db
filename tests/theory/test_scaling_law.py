"""The merging scaling law: exact on quadratics, recovered by the fit, honest about its uncertainty."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from theory import MergeboundError
from theory.scaling_law import fit_merging_law, fit_size_law, merging_law_formula
from theory.symbolic import evaluate

K = np.arange(1, 13)


def law(k: np.ndarray, floor: float = 1.2, tail: float = 0.8, shift: float = 0.7) -> np.ndarray:
    return floor + tail / (k + shift)


@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0, 40.0])
def test_noiseless_curves_are_recovered(shift: float) -> None:
    fitted = fit_merging_law(K, law(K, shift=shift), seed=0, bootstrap=0)
    assert fitted.shift == pytest.approx(shift, rel=1e-3, abs=1e-5)
    assert fitted.floor == pytest.approx(1.2, rel=1e-4)
    assert fitted.rmse < 1e-7
    assert np.allclose(fitted.predict(np.array([20, 100])), law(np.array([20, 100]), shift=shift), rtol=1e-4)
    assert ("shift" in fitted.at_bound) == (shift == 0.0)


def test_law_is_exact_for_subset_averages_on_a_quadratic() -> None:
    """All subsets of k of 6 experts, a quadratic joint risk: the mean loss is exactly floor + tail/k."""
    rng = np.random.default_rng(3)
    experts = rng.standard_normal((6, 4))
    root = rng.standard_normal((4, 4))
    H, theta = root @ root.T, rng.standard_normal(4)

    def risk(x: np.ndarray) -> float:
        return 0.5 * float((x - theta) @ H @ (x - theta)) + 0.3

    means = [
        np.mean([risk(experts[list(chosen)].mean(axis=0)) for chosen in itertools.combinations(range(6), k)])
        for k in range(1, 7)
    ]
    centred = experts - experts.mean(axis=0)
    covariance = centred.T @ centred / 5
    fitted = fit_merging_law(range(1, 7), means, seed=0, bootstrap=0)
    assert fitted.shift == pytest.approx(0.0, abs=1e-6)
    assert fitted.tail == pytest.approx(0.5 * np.trace(H @ covariance), rel=1e-6)
    assert fitted.floor + fitted.tail / 6 == pytest.approx(risk(experts.mean(axis=0)), rel=1e-6)


def test_a_floor_with_a_bound_is_the_bounded_least_squares_optimum() -> None:
    """A falling straight line asks for a floor far below zero; scipy's bounded problem at every shift is the truth."""
    from scipy.optimize import lsq_linear

    y = 2.0 - 0.02 * K + 0.01 * np.cos(7.0 * K)
    free = fit_merging_law(K, y, seed=0, bootstrap=0)
    fitted = fit_merging_law(K, y, seed=0, bootstrap=20, least_floor=0.0)
    assert free.floor < -1.0
    assert fitted.floor >= 0.0
    assert fitted.draws[:, 0].min() >= 0.0
    least = min(
        2 * lsq_linear(np.stack([np.ones(K.size), 1 / (K + shift)], axis=1), y, (0.0, np.inf)).cost
        for shift in np.expm1(np.linspace(0.0, np.log1p(1e3), 400))
    )
    assert K.size * fitted.rmse**2 <= least * (1 + 1e-6)
    assert fitted.floor == 0.0
    assert "floor" in fitted.at_bound
    same = fit_merging_law(K, law(K), seed=0, bootstrap=0, least_floor=0.0)
    assert (same.floor, same.tail) == pytest.approx((1.2, 0.8), rel=1e-3)


def test_fit_is_the_least_squares_optimum() -> None:
    rng = np.random.default_rng(4)
    y = law(K) + 0.02 * rng.standard_normal(K.size)
    fitted = fit_merging_law(K, y, seed=0, bootstrap=0)
    best = np.sum((fitted.predict(K) - y) ** 2)
    for _ in range(1000):
        floor, tail, shift = fitted.floor, fitted.tail, fitted.shift
        other = law(
            K, floor + 0.1 * rng.standard_normal(), abs(tail + 0.1 * rng.standard_normal()), shift * rng.uniform(0, 3)
        )
        assert best <= np.sum((other - y) ** 2) * (1 + 1e-9)


def test_bootstrap_is_reproducible_and_covers() -> None:
    inside, trials = 0, 30
    for trial in range(trials):
        rng = np.random.default_rng(100 + trial)
        k = np.repeat(np.arange(1, 8), 6)
        y = law(k) + 0.05 * rng.standard_normal(k.size)
        fitted = fit_merging_law(k, y, seed=trial, bootstrap=50)
        low, high = fitted.interval(4, 0.9)
        inside += bool(low <= law(np.asarray(4)) <= high)
    # nominal 90 %; the percentile bootstrap of 6 points per k is a little short
    assert 0.75 * trials <= inside <= trials
    again = fit_merging_law(k, y, seed=trials - 1, bootstrap=50)
    other = fit_merging_law(k, y, seed=trials, bootstrap=50)
    assert np.array_equal(again.draws, fitted.draws)
    assert not np.array_equal(other.draws, fitted.draws)
    intervals = fitted.parameter_intervals()
    assert intervals["floor"][0] <= fitted.floor <= intervals["floor"][1]


def test_residual_bootstrap_where_every_count_occurs_once() -> None:
    rng = np.random.default_rng(8)
    y = law(K) + 0.01 * rng.standard_normal(K.size)
    fitted = fit_merging_law(K, y, seed=2, bootstrap=100)
    low, high = fitted.interval(K)
    assert np.all(low <= high)
    assert 0.002 < float(np.mean(high - low)) < 0.05


def test_held_out_counts_are_judged_apart() -> None:
    rng = np.random.default_rng(9)
    y = law(K) + 0.005 * rng.standard_normal(K.size)
    fitted = fit_merging_law(K[:6], y[:6], seed=0, bootstrap=50)
    held = fitted.evaluate(K[6:], y[6:])
    assert held.count == 6
    assert held.seen == ()
    assert held.rmse == pytest.approx(float(np.sqrt(np.mean((fitted.predict(K[6:]) - y[6:]) ** 2))))
    assert held.bias == pytest.approx(float(np.mean(fitted.predict(K[6:]) - y[6:])))
    assert held.coverage is not None
    assert held.rmse < 0.05
    assert fitted.evaluate([3], [1.0]).r_squared is None
    assert fitted.evaluate([3], [1.0]).seen == (3.0,)
    assert fit_merging_law(K, y, seed=0, bootstrap=0).evaluate(K, y).coverage is None


def test_number_of_experts_for_a_target() -> None:
    fitted = fit_merging_law(K, law(K), seed=0, bootstrap=0)
    needed = fitted.experts_needed(1.25)
    assert float(fitted.predict(needed)) == pytest.approx(1.25, rel=1e-9)
    assert fitted.experts_needed(1.0) == np.inf
    assert fitted.experts_needed(5.0) == 1.0


def test_losses_that_grow_with_k_have_no_tail() -> None:
    fitted = fit_merging_law(K, 1.0 + 0.1 * K, seed=0, bootstrap=0)
    assert fitted.tail == 0
    assert "tail" in fitted.at_bound
    assert fitted.floor == pytest.approx(float(np.mean(1.0 + 0.1 * K)))


def test_formula_is_what_is_predicted() -> None:
    fitted = fit_merging_law(K, law(K), seed=0, bootstrap=0)
    value = evaluate(merging_law_formula, fitted.floor, fitted.tail, 5, fitted.shift)
    assert float(fitted.predict(5)) == float(value)
    assert fitted.tier == "calibrated"


def test_size_law_recovers_and_extrapolates() -> None:
    k, size = (a.ravel() for a in np.meshgrid([1, 2, 3, 5, 8], [0.5e9, 1.5e9, 3e9, 7e9]))
    scale = size / 1e9

    def truth(k: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return 0.6 + 0.5 * scale**-0.4 + 0.4 * scale**-0.3 / (k + 0.5)

    fitted = fit_size_law(k, size, truth(k, scale), seed=0)
    assert fitted.rmse < 1e-4
    assert float(fitted.predict(9, 14e9)) == pytest.approx(float(truth(np.asarray(9), np.asarray(14.0))), rel=5e-3)


@pytest.mark.parametrize(
    ("k", "y", "named"),
    [
        ([1, 2], [1.0, 0.9], "at least three"),
        ([1, 2, 3], [1.0, 0.9], "same length"),
        ([0, 1, 2], [1.0, 0.9, 0.8], "experts"),
        ([1, 2, 3], [1.0, float("nan"), 0.8], "losses"),
        ([1, 2, 3], ["a", "b", "c"], "losses"),
        ([], [], "experts"),
    ],
)
def test_malformed_data_are_refused(k: list[float], y: list[float], named: str) -> None:
    with pytest.raises(MergeboundError, match=named):
        fit_merging_law(k, y, seed=0)


def test_malformed_settings_are_refused() -> None:
    fitted = fit_merging_law(K, law(K), seed=0, bootstrap=0)
    with pytest.raises(MergeboundError, match="bootstrap"):
        fitted.interval(3)
    with pytest.raises(MergeboundError, match="bootstrap"):
        fit_merging_law(K, law(K), seed=0, bootstrap=1)
    with pytest.raises(MergeboundError, match="largest_shift"):
        fit_merging_law(K, law(K), seed=0, largest_shift=-1.0)
    with pytest.raises(MergeboundError, match="experts"):
        fitted.predict(0)
    with pytest.raises(MergeboundError, match="level"):
        fit_merging_law(K, law(K), seed=0, bootstrap=5).interval(3, 1.5)
    with pytest.raises(MergeboundError, match="six parameters"):
        fit_size_law([1, 2, 3], [1, 1, 1], [1.0, 0.9, 0.8], seed=0)
    with pytest.raises(MergeboundError, match="size"):
        fit_size_law([1, 2, 3], [1, 1], [1.0, 0.9, 0.8], seed=0)
