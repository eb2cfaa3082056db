"""Second-order errors of secant and tangent: exact families, Taylor orders, and bounds that hold and are attained."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.certificate import remainder_bound
from theory.errors import MergeboundError
from theory.function_space import (
    Array,
    LogitField,
    combine,
    cross_entropy,
    log_softmax,
    predict_risk,
    secant,
    tangent,
)
from theory.linearization_error import (
    LogitCurvature,
    best_weight,
    combined_error,
    curvature_from_merges,
    error_account,
    largest_loss_formula,
    loss_change,
    loss_interval,
    mixed_spread,
    own_curvature,
    pair_interpolant,
    risk_error,
    risk_error_form,
    secant_error,
    tangent_error,
    taylor_factor,
    taylor_factor_formula,
)
from theory.symbolic import evaluate

SEEDS = st.integers(0, 2**32 - 1)


class Network:
    """Logits ``c + sum a_i t_i + 1/2 sum a_i a_k B_ik + cubic (sum_i a_i w_i)^3`` of n images and C classes."""

    def __init__(self, seed: int, experts: int = 3, n: int = 7, classes: int = 4, cubic: float = 0.0) -> None:
        rng = np.random.default_rng(seed)
        self.constant = rng.standard_normal((n, classes))
        self.slopes = rng.standard_normal((experts, n, classes))
        table = rng.standard_normal((experts, experts, n, classes))
        self.table = 0.5 * (table + table.swapaxes(0, 1))
        self.third = cubic * rng.standard_normal((n, classes))
        self.mix = rng.standard_normal(experts)
        self.labels = rng.integers(0, classes, n)

    def __call__(self, alpha: Array) -> Array:
        a = np.asarray(alpha)
        quadratic = 0.5 * np.einsum("i,k,iknc->nc", a, a, self.table)
        return self.constant + np.einsum("i,inc->nc", a, self.slopes) + quadratic + (a @ self.mix) ** 3 * self.third

    @property
    def size(self) -> int:
        return len(self.slopes)

    def secant(self, scale: float = 1.0) -> LogitField:
        return secant(self(np.zeros(self.size)), np.stack([self(scale * e) for e in np.eye(self.size)]), self.labels)

    def tangent(self, scale: float = 1.0) -> LogitField:
        return tangent(self.constant, scale * self.slopes, self.labels)

    def curvature(self, scale: float = 1.0) -> LogitCurvature:
        index = np.arange(self.size)
        return LogitCurvature(scale**2 * self.table[index, index], scale**2 * self.table)


# --- the errors in the logits ----------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(SEEDS)
def test_errors_are_exact_for_quadratic_logits(seed: int) -> None:
    net, rng = Network(seed), np.random.default_rng(seed + 1)
    curvature, alphas, anchor = net.curvature(), 2 * rng.standard_normal((4, 3)), rng.standard_normal(3)
    truth = np.stack([net(a) for a in alphas])
    chords, slopes = net.secant(), net.tangent()
    np.testing.assert_allclose(chords.at(alphas) + secant_error(curvature, alphas), truth, atol=1e-9)
    np.testing.assert_allclose(slopes.at(alphas) + tangent_error(curvature, alphas), truth, atol=1e-9)
    mixed = combine(chords, slopes, 0.3).at(alphas)
    np.testing.assert_allclose(mixed + combined_error(curvature, alphas, 0.3), truth, atol=1e-9)
    products = net.slopes + np.einsum("k,iknc->inc", anchor, net.table)
    away = tangent(net(anchor), products, net.labels, anchor)
    np.testing.assert_allclose(away.at(alphas) + tangent_error(curvature, alphas, anchor), truth, atol=1e-9)


def test_errors_as_a_symbolic_identity() -> None:
    """The coefficients of B_ik, from Taylor's theorem and nothing else."""
    a, b = sympy.symbols("a b")
    t1, t2, b11, b12, b22 = sympy.symbols("t1 t2 b11 b12 b22")

    def logit(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr:
        return t1 * x + t2 * y + (b11 * x**2 + 2 * b12 * x * y + b22 * y**2) / 2

    chord = a * logit(1, 0) + b * logit(0, 1)
    missed = sympy.expand(logit(a, b) - chord)
    claimed = (a**2 * b11 + 2 * a * b * b12 + b**2 * b22 - a * b11 - b * b22) / 2
    assert sympy.simplify(missed - claimed) == 0
    curvature = LogitCurvature(np.array([[[1.0]], [[3.0]]]), np.array([[[[1.0]], [[2.0]]], [[[2.0]], [[3.0]]]]))
    number = float(claimed.subs({a: 0.3, b: -0.7, b11: 1, b12: 2, b22: 3}))
    assert secant_error(curvature, [0.3, -0.7]).item() == pytest.approx(number, rel=1e-12)


def test_secant_error_vanishes_at_base_and_experts_and_tangent_error_at_its_anchor() -> None:
    curvature = Network(5).curvature()
    np.testing.assert_allclose(secant_error(curvature, np.vstack([np.zeros(3), np.eye(3)])), 0.0, atol=1e-14)
    np.testing.assert_allclose(tangent_error(curvature, np.eye(3)[1], np.eye(3)[1]), 0.0, atol=1e-14)


@pytest.mark.parametrize("kind", ["secant", "tangent"])
def test_the_error_left_is_of_third_order(kind: str) -> None:
    """Shrinking the task vectors by t leaves an error of t^3 in logits that have a cubic term."""
    net, alpha, left = Network(11, cubic=0.7), np.array([0.6, -0.4, 0.9]), []
    for scale in (1e-1, 1e-2):
        curvature = net.curvature(scale)
        field = net.secant(scale) if kind == "secant" else net.tangent(scale)
        missed = secant_error(curvature, alpha) if kind == "secant" else tangent_error(curvature, alpha)
        left.append(np.abs(net(scale * alpha) - field.at(alpha) - missed).max())
    assert np.log10(left[0] / left[1]) == pytest.approx(3.0, abs=0.01)


def test_second_differences_of_merges_are_exact_for_quadratics_at_any_step() -> None:
    net = Network(2)
    for scale in (1.0, 0.25, -2.0):
        eye = scale * np.eye(3)
        single = np.stack([net(e) for e in eye])
        double = np.stack([[net(e + f) for f in eye] for e in eye])
        found = curvature_from_merges(net.constant, single, double, scale)
        np.testing.assert_allclose(found.mixed, net.table, atol=1e-9)
        np.testing.assert_allclose(found.own, net.curvature().own, atol=1e-9)
    np.testing.assert_allclose(own_curvature(net.secant(), net.tangent()).own, net.curvature().own, atol=1e-9)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(SEEDS)
def test_pairs_interpolate_any_network_and_are_the_secant_plus_its_error(seed: int) -> None:
    """Corners and pairs of a network that is far from quadratic, then every alpha against the secant's account."""
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((5, 8)), rng.standard_normal((8, 4))
    vectors = np.vstack([np.zeros(5), rng.standard_normal((3, 5))])  # the base and three experts

    def logits(b: Array) -> Array:
        return np.array([np.tanh(np.asarray(b) @ vectors @ first + x) @ second for x in (0.0, 0.5, -1.0)])

    corners = np.stack([logits(e) for e in np.eye(4)])
    middles = np.stack([[logits((e + f) / 2) for f in np.eye(4)] for e in np.eye(4)])
    for i in range(4):
        np.testing.assert_allclose(pair_interpolant(corners, middles, np.eye(4)[i]), corners[i], atol=1e-12)
        for k in range(i):
            pair = 0.5 * (np.eye(4)[i] + np.eye(4)[k])
            np.testing.assert_allclose(pair_interpolant(corners, middles, pair), middles[i, k], atol=1e-12)
    chords = secant(corners[0], corners[1:], np.zeros(3, dtype=np.int64))
    half = np.stack([middles[0, i] for i in (1, 2, 3)])
    table = middles[1:, 1:].copy()
    table[np.arange(3), np.arange(3)] = corners[1:]
    curvature = curvature_from_merges(corners[0], half, table, 0.5)
    alphas = rng.uniform(-0.5, 1.0, (6, 3))
    shares = np.concatenate([1 - alphas.sum(axis=1, keepdims=True), alphas], axis=1)
    expected = chords.at(alphas) + secant_error(curvature, alphas)
    np.testing.assert_allclose(pair_interpolant(corners, middles, shares), expected, atol=1e-10)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(SEEDS, st.floats(0.01, 0.99))
def test_one_expert_is_bracketed_between_secant_and_tangent(seed: int, a: float) -> None:
    """theory.md: together they bracket the truth; a theorem for one expert and quadratic logits."""
    net = Network(seed, experts=1)
    low, high = net.secant().at([a]), net.tangent().at([a])
    truth = net(np.array([a]))
    assert (truth >= np.minimum(low, high) - 1e-12).all()
    assert (truth <= np.maximum(low, high) + 1e-12).all()


def test_mixed_terms_can_leave_the_bracket() -> None:
    """Trap: with several experts the bracket is not a theorem, because both miss the mixed terms."""
    table = np.zeros((2, 2, 1, 2))
    table[0, 1, 0, 0] = table[1, 0, 0, 0] = 1.0
    curvature = LogitCurvature(np.zeros((2, 1, 2)), table)
    assert secant_error(curvature, [0.5, 0.5])[0, 0] == pytest.approx(0.25)
    assert tangent_error(curvature, [0.5, 0.5])[0, 0] == pytest.approx(0.25)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(SEEDS, st.floats(0.05, 1.5))
def test_best_weight_is_the_least_squares_minimum(seed: int, size: float) -> None:
    curvature, alpha = Network(seed).curvature(), size * np.array([1.0, 0.5, 0.2])

    def left(weight: float) -> float:
        e = combined_error(curvature, alpha, weight)
        return float(((e - e.mean(-1, keepdims=True)) ** 2).sum())

    best = float(best_weight(curvature, alpha))
    assert left(best) <= min(left(w) for w in np.linspace(-3, 4, 141)) + 1e-12
    own = LogitCurvature(curvature.own)
    assert float(best_weight(own, np.full(3, 0.4))) == pytest.approx(0.6)
    assert float(best_weight(own, np.zeros(3))) == 0.5


# --- the effect on the loss ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS, st.sampled_from([1e-3, 0.1, 1.0, 5.0, 60.0]), st.integers(2, 6))
def test_loss_change_is_bounded_on_both_sides(seed: int, size: float, classes: int) -> None:
    rng = np.random.default_rng(seed)
    h, e = 3 * rng.standard_normal((20, classes)), size * rng.standard_normal((20, classes))
    y = rng.integers(0, classes, 20)
    found = loss_change(h, y, e)
    exact = cross_entropy(h + e, y) - cross_entropy(h, y)
    slack = 1e-12 * (1 + np.abs(e).max() + np.abs(h).max())
    assert (found.lower <= exact + slack).all()
    assert (exact <= found.upper + slack).all()


def test_bounds_of_the_loss_change_close_as_the_change_shrinks_and_are_attained() -> None:
    rng = np.random.default_rng(3)
    h, e, y = rng.standard_normal((50, 5)), rng.standard_normal((50, 5)), rng.integers(0, 5, 50)
    widths, errors = [], []
    for size in (1e-1, 1e-2):
        found = loss_change(h, y, size * e)
        widths.append(float((found.upper - found.lower).max()))
        exact = cross_entropy(h + size * e, y) - cross_entropy(h, y)
        errors.append(float(np.abs(exact - found.estimate).max()))
    assert np.log10(widths[0] / widths[1]) == pytest.approx(3.0, abs=0.15)
    assert np.log10(errors[0] / errors[1]) == pytest.approx(3.0, abs=0.15)
    # the third-moment constant: two classes, probabilities (1 -+ 1/sqrt 3)/2, attained to leading order
    p = 0.5 * (1 - 1 / np.sqrt(3))
    two, r = np.log(np.array([[1 - p, p]])), 1e-2
    change = np.array([[0.0, r]])
    exact = cross_entropy(two + change, np.array([0])) - cross_entropy(two, np.array([0]))
    found = loss_change(two, np.array([0]), change)
    assert ((exact - found.estimate) / (r**3 / (36 * np.sqrt(3)))).item() == pytest.approx(1.0, abs=2e-2)


def test_third_central_moment_of_a_bounded_variable() -> None:
    """The constant 1 / (6 sqrt 3) by brute force over three-point distributions on [0, 1]."""
    grid = np.linspace(0, 1, 41)
    q, s = np.meshgrid(grid, grid, indexing="ij")
    keep = q + s <= 1
    q, s = q[keep], s[keep]
    for middle in grid:
        mean = q * middle + s
        third = (1 - q - s) * (0 - mean) ** 3 + q * (middle - mean) ** 3 + s * (1 - mean) ** 3
        assert np.abs(third).max() <= 1 / (6 * np.sqrt(3)) + 1e-15


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(-700, 700), st.booleans())
def test_taylor_factor_to_fifty_digits(r: float, near: bool) -> None:
    r = r / 500 if near else r
    with mpmath.workdps(100):
        x = mpmath.mpf(r)
        exact = (mpmath.expm1(x) - x) / x**2 if abs(r) > 1e-25 else mpmath.mpf("0.5")
    assert float(taylor_factor(r)) == pytest.approx(float(exact), rel=1e-13)


def test_formulas_are_what_runs() -> None:
    r = np.array([-30.0, -2.0, 0.7, 3.0, 20.0])
    np.testing.assert_allclose(evaluate(taylor_factor_formula, r), taylor_factor(r), rtol=1e-13)
    ell = np.array([1e-3, 0.1, 1.0, 2.0, 9.0])
    np.testing.assert_allclose(evaluate(largest_loss_formula, ell, np.abs(r)), loss_interval(ell, np.abs(r))[1])
    assert np.isinf(taylor_factor(1e4))
    assert taylor_factor([-np.inf, np.inf]).tolist() == [0.0, np.inf]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(1e-12, 2000), st.floats(0, 2000))
def test_loss_interval_to_fifty_digits(loss: float, spread: float) -> None:
    low, high = loss_interval(loss, spread)
    with mpmath.workdps(50):
        odds = mpmath.expm1(mpmath.mpf(loss))
        exact = [mpmath.log1p(odds * mpmath.exp(sign * mpmath.mpf(spread))) for sign in (-1, 1)]
    assert float(low) == pytest.approx(float(exact[0]), rel=1e-11, abs=1e-300)
    assert float(high) == pytest.approx(float(exact[1]), rel=1e-11)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS, st.sampled_from([0.01, 1.0, 8.0]))
def test_loss_interval_holds_is_attained_and_beats_the_square_root_form(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    h, y = 2 * rng.standard_normal((15, 5)), rng.integers(0, 5, 15)
    r = size * rng.uniform(0, 1, (15, 5))
    spread = r.max(-1) - r.min(-1)
    low, high = loss_interval(cross_entropy(h, y), spread)
    moved = cross_entropy(h + r, y)
    assert (low <= moved + 1e-12).all()
    assert (moved <= high + 1e-12).all()
    worst = np.where(np.arange(5) == y[:, None], 0.0, spread[:, None])
    np.testing.assert_allclose(cross_entropy(h + worst, y), high, rtol=1e-12)
    np.testing.assert_allclose(cross_entropy(h - worst, y), low, rtol=1e-9, atol=1e-13)
    assert high.mean() <= remainder_bound(h, y, r) + 1e-12


def test_nothing_known_and_nothing_lost() -> None:
    low, high = loss_interval([0.0, 0.0, 0.3, np.inf, np.inf], [0.0, np.inf, np.inf, 1.0, np.inf])
    np.testing.assert_array_equal(low, [0.0, 0.0, 0.0, np.inf, 0.0])
    np.testing.assert_array_equal(high, [0.0, 0.0, np.inf, np.inf, np.inf])


# --- the account -----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SEEDS)
def test_account_is_exact_for_quadratic_logits(seed: int) -> None:
    net, rng = Network(seed), np.random.default_rng(seed)
    alphas, curvature = rng.uniform(0, 1, (5, 3)), net.curvature()
    truth = np.array([cross_entropy(net(a), net.labels).mean() for a in alphas])
    for field, missed in (
        (net.secant(), secant_error(curvature, alphas)),
        (net.tangent(), tangent_error(curvature, alphas)),
    ):
        found = error_account(field, alphas, missed)
        np.testing.assert_allclose(found.corrected, truth, rtol=1e-9)
        np.testing.assert_allclose(found.lower, truth, rtol=1e-9)
        np.testing.assert_allclose(found.upper, truth, rtol=1e-9)
        np.testing.assert_allclose(found.predicted, predict_risk([field], alphas).risk, rtol=1e-12)
        assert found.tier == "estimated"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SEEDS, st.floats(0.05, 1.0))
def test_account_with_the_unexplained_range_holds_for_cubic_logits_and_from_own_terms_alone(
    seed: int, cubic: float
) -> None:
    net, rng = Network(seed, cubic=cubic), np.random.default_rng(seed)
    alphas = rng.uniform(0, 1, (6, 3))
    truth = np.array([cross_entropy(net(a), net.labels).mean() for a in alphas])
    third = net.third.max(-1) - net.third.min(-1)
    cube = np.abs(alphas @ net.mix)[:, None] ** 3 * third
    whole, own = net.curvature(), LogitCurvature(net.curvature().own)
    pairs = mixed_spread(net.table.max(-1) - net.table.min(-1), alphas)
    for curvature, rest in ((whole, cube), (own, cube + pairs)):
        found = error_account(net.tangent(), alphas, tangent_error(curvature, alphas), rest)
        assert (found.lower <= truth + 1e-12).all()
        assert (truth <= found.upper + 1e-12).all()
        assert (found.lower <= found.corrected).all()
        assert (found.corrected <= found.upper).all()
    without = error_account(net.tangent(), alphas, tangent_error(own, alphas), cube)
    assert (without.upper <= found.upper + 1e-12).all()


@pytest.mark.parametrize("kind", ["secant", "tangent"])
def test_risk_error_form_is_hessian_minus_gauss_newton_and_its_error_is_of_third_order(kind: str) -> None:
    net, alpha, left = Network(4, cubic=0.3), np.array([0.7, 0.5, -0.3]), []
    form = risk_error_form(net.constant, net.labels, net.curvature())
    step = 1e-3

    def risk(a: Array) -> float:
        return float(cross_entropy(net(a), net.labels).mean())

    eye = step * np.eye(3)
    hessian = np.array(
        [[(risk(e + f) - risk(e - f) - risk(f - e) + risk(-e - f)) / (4 * step**2) for f in eye] for e in eye]
    )
    p = np.exp(log_softmax(net.constant))
    centred = net.slopes - (p * net.slopes).sum(-1, keepdims=True)
    gauss_newton = np.einsum("inc,nc,knc->ik", centred, p, centred) / len(p)
    np.testing.assert_allclose(form, hessian - gauss_newton, atol=1e-5)
    for scale in (3e-2, 3e-3):
        field = net.secant(scale) if kind == "secant" else net.tangent(scale)
        truth = cross_entropy(net(scale * alpha), net.labels).mean() - predict_risk([field], alpha).risk
        left.append(abs(float(truth) - float(risk_error(scale**2 * form, alpha, kind))))
    assert np.log10(left[0] / left[1]) == pytest.approx(3.0, abs=0.2)


def test_own_terms_give_the_diagonal_of_the_risk_error_form() -> None:
    net = Network(9)
    whole = risk_error_form(net.constant, net.labels, net.curvature())
    own = risk_error_form(net.constant, net.labels, LogitCurvature(net.curvature().own))
    np.testing.assert_allclose(own, np.diag(np.diag(whole)), rtol=1e-12)


# --- extremes and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e100, 1e200, 1e299])
def test_enormous_changes_stay_bounded_and_are_never_nan(size: float) -> None:
    h, y = np.array([[0.0, 1.0, -50.0]]), np.array([2])
    found = loss_change(h, y, size * np.array([[1.0, -0.5, 0.0]]))
    for part in (found.slope, found.curvature, found.lower, found.upper):
        assert not np.isnan(part).any()
    assert found.lower <= size <= found.upper * (1 + 1e-12)


def test_wrong_input_is_refused_by_name() -> None:
    net = Network(0)
    own, mixed = net.curvature().own, net.table
    with pytest.raises(MergeboundError, match="own"):
        LogitCurvature(own[0])
    with pytest.raises(MergeboundError, match="own"):
        LogitCurvature(own * np.nan)
    with pytest.raises(MergeboundError, match="mixed"):
        LogitCurvature(own, mixed[:2])
    with pytest.raises(MergeboundError, match="symmetric"):
        LogitCurvature(own, mixed + np.arange(3)[:, None, None, None])
    with pytest.raises(MergeboundError, match="mixed"):
        LogitCurvature(own, np.where(mixed > 1, np.inf, mixed))
    with pytest.raises(MergeboundError, match="alpha"):
        secant_error(net.curvature(), [1.0, 2.0])
    with pytest.raises(MergeboundError, match="alpha"):
        tangent_error(net.curvature(), [1.0, np.nan, 0.0])
    with pytest.raises(MergeboundError, match="scale"):
        curvature_from_merges(net.constant, net.slopes, net.table, 0.0)
    with pytest.raises(MergeboundError, match="single"):
        curvature_from_merges(net.constant[:2], net.slopes, net.table)
    with pytest.raises(MergeboundError, match="double"):
        curvature_from_merges(net.constant, net.slopes, net.slopes)
    with pytest.raises(MergeboundError, match="middles"):
        pair_interpolant(net.slopes, net.slopes, np.ones(3) / 3)
    with pytest.raises(MergeboundError, match="shares"):
        pair_interpolant(net.slopes, net.table, np.ones(3))
    with pytest.raises(MergeboundError, match="missed"):
        error_account(net.tangent(), np.zeros(3), np.zeros((1, 2)))
    with pytest.raises(MergeboundError, match="loss"):
        loss_interval(-0.1, 1.0)
    with pytest.raises(MergeboundError, match="spread"):
        loss_interval(0.1, np.nan)
    with pytest.raises(MergeboundError, match="change"):
        loss_change(net.constant, net.labels, net.constant * np.inf)
    with pytest.raises(MergeboundError, match="kind"):
        risk_error(np.eye(3), np.ones(3), "chord")
    with pytest.raises(MergeboundError, match="ranges"):
        mixed_spread(np.zeros((2, 3, 4)), np.ones(2))
    with pytest.raises(MergeboundError, match="experts"):
        own_curvature(net.secant(), LogitField(net.constant, net.slopes[:2], net.labels, "tangent"))
