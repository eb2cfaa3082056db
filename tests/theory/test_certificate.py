"""Certificates in logit space against the true loss, and curvatures against dense matrices and differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from theory.certificate import (
    curvature_risk,
    directional_curvature,
    directional_slope,
    gauss_newton_form,
    gradient_aware_risk,
    logit_range,
    output_bound,
    output_bound_everywhere,
    output_bound_labelled,
    remainder_bound,
)
from theory.errors import MergeboundError
from theory.function_space import Array, Labels

SEEDS = st.integers(0, 2**32 - 1)
SCALES = st.sampled_from([0.01, 1.0, 10.0, 100.0])


def losses(logits: Array, labels: Labels) -> Array:
    return -log_softmax(logits, axis=-1)[np.arange(len(labels)), labels]


def mean_loss(logits: Array, labels: Labels) -> float:
    return float(losses(logits, labels).mean())


def draw(seed: int, scale: float, step: float) -> tuple[Array, Labels, Array]:
    """Logits, labels (mostly fitted, as experts are), and a change of the logits."""
    rng = np.random.default_rng(seed)
    n, classes = int(rng.integers(1, 8)), int(rng.integers(2, 6))
    logits = scale * rng.standard_normal((n, classes))
    labels = np.where(rng.random(n) < 0.7, logits.argmax(axis=1), rng.integers(0, classes, n))
    return logits, labels, step * rng.standard_normal((n, classes))


# --- certificates ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SEEDS, SCALES, SCALES)
def test_certificates_hold_for_every_pair_of_logits(seed: int, scale: float, step: float) -> None:
    logits, labels, change = draw(seed, scale, step)
    truth, own = mean_loss(logits + change, labels), mean_loss(logits, labels)
    slack = 1e-9 * (1 + truth + step)
    free, labelled = output_bound(own, change), output_bound_labelled(logits, labels, change)
    assert remainder_bound(logits, labels, change) >= truth - slack
    assert free >= truth - slack
    assert labelled >= truth - slack
    assert labelled <= free + slack, "labels can only help: |slope| <= range sqrt(loss / 2) for every image"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS, SCALES, SCALES)
def test_root_form_also_holds_for_the_difference_of_roots(seed: int, scale: float, step: float) -> None:
    logits, labels, change = draw(seed, scale, step)
    difference = abs(np.sqrt(mean_loss(logits + change, labels)) - np.sqrt(mean_loss(logits, labels)))
    assert difference <= np.sqrt((np.ptp(change, axis=-1) ** 2).mean() / 8) + 1e-9 * (1 + step)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SEEDS)
def test_a_shift_common_to_all_classes_costs_nothing(seed: int) -> None:
    logits, labels, change = draw(seed, 1.0, 1.0)
    shift = np.random.default_rng(seed).standard_normal((len(labels), 1)) * np.ones_like(change)
    own = mean_loss(logits, labels)
    np.testing.assert_allclose(logit_range(shift), 0.0, atol=1e-14)
    np.testing.assert_allclose(remainder_bound(logits, labels, shift), own, rtol=1e-10)
    np.testing.assert_allclose(output_bound_labelled(logits, labels, shift), own, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(output_bound(own, change + shift), output_bound(own, change), rtol=1e-10)


def test_labelled_form_is_attained_where_the_label_has_no_mass() -> None:
    logits, labels = np.array([[-60.0, 0.0, 0.0]]), np.array([0])
    change = np.array([[-9.0, 3.0, 3.0]])
    truth = mean_loss(logits + change, labels)
    np.testing.assert_allclose(output_bound_labelled(logits, labels, change), truth, rtol=1e-12)


def test_labelled_form_is_attained_to_second_order_by_a_coin() -> None:
    logits, labels = np.zeros((1, 2)), np.array([0])
    for step in (0.1, 0.01):
        change = step * np.array([[-0.5, 0.5]])
        truth = mean_loss(logits + change, labels)
        bound = float(output_bound_labelled(logits, labels, change))
        assert 0 <= bound - truth <= step**4 / 100, "log cosh: the next term is step^4 / 192"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SEEDS)
def test_many_changes_at_once_equal_a_loop(seed: int) -> None:
    logits, labels, _ = draw(seed, 1.0, 1.0)
    changes = np.random.default_rng(seed + 1).standard_normal((4, *logits.shape))
    own = mean_loss(logits, labels)
    for many, one in (
        (remainder_bound(logits, labels, changes), lambda c: remainder_bound(logits, labels, c)),
        (output_bound(own, changes), lambda c: output_bound(own, c)),
        (output_bound_labelled(logits, labels, changes), lambda c: output_bound_labelled(logits, labels, c)),
        (directional_curvature(logits, changes), lambda c: directional_curvature(logits, c)),
        (directional_slope(logits, labels, changes), lambda c: directional_slope(logits, labels, c)),
    ):
        np.testing.assert_allclose(many, [one(change) for change in changes], rtol=1e-12)


# --- curvature -------------------------------------------------------------------------------------------------------


def dense_gauss_newton(logits: Array, jacobian: Array) -> Array:
    """Mean over images of J^T (diag p - p p^T) J for J of shape (n, C, P)."""
    total = np.zeros((jacobian.shape[-1],) * 2)
    for row, matrix in zip(softmax(logits, axis=-1), jacobian, strict=True):
        total += matrix.T @ (np.diag(row) - np.outer(row, row)) @ matrix
    return total / len(logits)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SEEDS, st.sampled_from([0.1, 1.0, 5.0]))
def test_gauss_newton_form_equals_the_dense_matrix(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    n, classes, size = 4, 3, 7
    logits, jacobian = scale * rng.standard_normal((n, classes)), rng.standard_normal((n, classes, size))
    first, second = rng.standard_normal((3, size)), rng.standard_normal((2, size))
    products = [np.stack([jacobian @ d for d in side]) for side in (first, second)]
    dense = dense_gauss_newton(logits, jacobian)
    np.testing.assert_allclose(gauss_newton_form(logits, *products), first @ dense @ second.T, rtol=1e-9, atol=1e-12)
    own = gauss_newton_form(logits, products[0])
    np.testing.assert_allclose(own, first @ dense @ first.T, rtol=1e-9, atol=1e-12)
    assert np.linalg.eigvalsh((own + own.T) / 2).min() >= -1e-12
    np.testing.assert_allclose(directional_curvature(logits, products[0]), np.diag(own), rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SEEDS, st.sampled_from([0.1, 1.0, 3.0]))
def test_slope_and_curvature_are_derivatives_of_the_loss_along_a_line_of_logits(seed: int, scale: float) -> None:
    logits, labels, change = draw(seed, scale, 1.0)
    step = 1e-3
    left, centre, right = (mean_loss(logits + t * change, labels) for t in (-step, 0.0, step))
    np.testing.assert_allclose(directional_slope(logits, labels, change), (right - left) / (2 * step), atol=1e-5)
    np.testing.assert_allclose(
        directional_curvature(logits, change), (right - 2 * centre + left) / step**2, rtol=1e-4, atol=1e-4
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS, SCALES)
def test_curvature_never_exceeds_a_quarter_of_the_squared_range(seed: int, scale: float) -> None:
    logits, _, change = draw(seed, scale, 1.0)
    quarter = (np.ptp(change, axis=-1) ** 2).mean() / 4
    assert directional_curvature(logits, change) <= quarter * (1 + 1e-12)


# --- risks from curvature --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS)
def test_curvature_risk_bounds_convex_parabolas_and_is_attained_away_from_the_minimum(seed: int) -> None:
    """Lemma 1 for phi(t) = a (t - m)^2 / 2 from 0 to 1; at m <= 0 the step leads away and the lemma is an equality."""
    rng = np.random.default_rng(seed)
    curvature, minimum = rng.exponential(size=2), rng.standard_normal(2)
    start, end = (curvature * (t - minimum) ** 2 / 2 for t in (0.0, 1.0))
    weights = np.array([0.25, 0.75])
    assert curvature_risk(start, curvature, weights) >= end @ weights - 1e-12
    away = -np.abs(minimum)
    start, end = (curvature * (t - away) ** 2 / 2 for t in (0.0, 1.0))
    np.testing.assert_allclose(curvature_risk(start, curvature, weights), end @ weights, rtol=1e-10)
    slope = -curvature * away
    np.testing.assert_allclose(gradient_aware_risk(start, slope, curvature, weights), end @ weights, rtol=1e-10)


def test_negative_curvature_counts_as_none_and_taylor_stays_nonnegative() -> None:
    own, weights = np.array([0.5, 2.0]), np.array([0.5, 0.5])
    assert curvature_risk(own, np.array([-1.0, -3.0]), weights) == pytest.approx(1.25)
    assert gradient_aware_risk(own, np.array([-9.0, 0.0]), np.array([-1.0, 0.0]), weights) == pytest.approx(1.0)


def _pool(rng: np.random.Generator, experts: int, images: int) -> tuple[Array, Array, Labels, int]:
    """Constant and slopes of an affine logit field, labels, and the place of the own expert."""
    slopes = rng.standard_normal((experts, images, 4)) * rng.uniform(0.1, 2.0, (experts, 1, 1))
    return rng.standard_normal((images, 4)), slopes, rng.integers(0, 4, images), int(rng.integers(experts))


@pytest.mark.parametrize("seed", range(8))
def test_certificate_everywhere_on_a_pool(seed: int) -> None:
    """Never below the loss of any mixture of affine logits, never below the certificate of that mixture alone."""
    rng = np.random.default_rng(seed)
    constant, slopes, labels, own = _pool(rng, 3, 30)
    alpha = rng.uniform(-0.5, 1.5, (200, 3))
    ours = constant + slopes[own]
    bound = output_bound_everywhere(losses(ours, labels), logit_range(slopes), alpha, own)
    for a, upper in zip(alpha, bound, strict=True):
        moved = constant + np.tensordot(a, slopes, axes=1)
        assert losses(moved, labels).mean() <= upper
        assert output_bound(losses(ours, labels).mean(), moved - ours) <= upper * (1 + 1e-12)


def test_trap_certificate_of_a_pool_is_none_of_the_population() -> None:
    """Ten images of a population: the pool's certificate is below the population's risk in more than a tenth of the
    draws; with confidence limits the bounds of all coefficients hold at once far more often than stated."""
    rng = np.random.default_rng(0)
    constant, slopes, labels, own = _pool(rng, 2, 500)
    hard = np.arange(500) < 50  # where the expert is wrong by far; nothing moves there
    constant[hard], slopes[:, hard] = 0.0, 0.0
    constant[hard, (labels[hard] + 1) % 4] = 6.0
    constant[~hard, labels[~hard]] += 8.0
    slopes *= 0.05
    alpha = np.array([[x, y] for x in np.linspace(0, 1, 5) for y in np.linspace(0, 1, 5)])
    ours, ranges = losses(constant + slopes[own], labels), logit_range(slopes)
    truth = np.array([losses(constant + np.tensordot(a, slopes, axes=1), labels).mean() for a in alpha])
    limits = dict(delta=0.1, largest_loss=float(ours.max()), largest_range=float(ranges.max()))
    naive, sure, draws = 0, 0, 400
    for _ in range(draws):
        seen = rng.integers(0, 500, 10)
        naive += bool(np.any(output_bound_everywhere(ours[seen], ranges[:, seen], alpha, own) < truth))
        sure += bool(np.any(output_bound_everywhere(ours[seen], ranges[:, seen], alpha, own, **limits) < truth))  # type: ignore[arg-type]
    assert naive > 0.1 * draws
    assert sure <= 0.1 * draws


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(own_losses=[[0.1]]), "own_losses"),
        (dict(ranges=[[1.0], [2.0]]), "ranges"),
        (dict(alpha=[0.5]), "alpha"),
        (dict(alpha=[0.5, np.nan]), "alpha"),
        (dict(own=2), "own"),
        (dict(own_losses=[0.1, -0.1]), "own_losses"),
        (dict(delta=0.1), "largest_loss"),
        (dict(delta=1.0, largest_loss=1.0, largest_range=9.0), "delta"),
        (dict(delta=0.1, largest_loss=0.1, largest_range=9.0), "exceed"),
        (dict(delta=0.1, largest_loss=1.0, largest_range=1.0), "exceed"),
    ],
)
def test_certificate_everywhere_refuses_by_name(changes: dict[str, object], words: str) -> None:
    good: dict[str, object] = dict(own_losses=[0.1, 0.2], ranges=[[1.0, 2.0], [0.5, 0.1]], alpha=[0.5, 0.5], own=0)
    with pytest.raises(MergeboundError, match=words):
        output_bound_everywhere(**(good | changes))  # type: ignore[arg-type]
