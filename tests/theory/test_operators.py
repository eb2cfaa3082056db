"""Operators as theory objects: formulas against enumeration and 50 digits, readings, refusals, recipes, fuzz."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import Expert, Merge, explain_method, l1_gap, master_bound, merge_with, operator
from theory.errors import AssumptionError, MergeboundError, RecipeError
from theory.operators import (
    agreement,
    drop_probabilities,
    elected_sensitivity,
    fisher_shares,
    iso_c_gain,
    karcher_coefficients,
    l1_mask_sensitivity,
    mask_variance,
    model_stock_coefficients,
    model_stock_ratio,
    operators,
    regmean_maps,
    slerp_coefficients,
    span_sensitivity,
    trim_change,
    wudi_sensitivity,
)
from theory.operators.masks import (
    mask_noise_formula,
    mask_sensitivity_formula,
    plain_mask_noise_formula,
    plain_mask_sensitivity_formula,
)
from theory.operators.matrices import iso_gain_formula
from theory.operators.span import (
    _stretch,
    model_stock_ratio_formula,
    model_stock_slope_formula,
    slerp_weight_formula,
)
from theory.symbols import symbol

STATED: dict[str, Any] = dict(shared_samples=False, data_independent_choices=True, per_sample_loss=True)
RUN: dict[str, Any] = dict(
    n=100, batch_size=10, learning_rate=0.1, steps=20, curvature="convex", L=1.0, D_inf=1.0,
    initial_gradient_norm=0.5, sigma0=0.5, training_risk=0.05, G=1.0,
)  # fmt: skip
PAIR = (Expert("a", **RUN), Expert("b", **RUN))


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [True, False])
def test_mask_moments_by_enumeration_with_50_digits(rescale: bool) -> None:
    """All 2^n masks: second moment of the coefficient (squared sensitivity), variance of the merge (noise)."""
    with mpmath.workdps(50):
        alpha, drop = mpmath.mpf("-0.3"), mpmath.mpf("0.37")
        x = [mpmath.mpf(v) for v in ("1.5", "-2", "0.25")]
        shift = [mpmath.mpf(v) for v in ("0.1", "0.7", "-0.4")]
        gain = alpha / (1 - drop) if rescale else alpha
        second, variance, ratio = mpmath.mpf(0), mpmath.mpf(0), mpmath.mpf(0)
        mean = [alpha * v * (1 if rescale else 1 - drop) for v in x]
        for mask in itertools.product((0, 1), repeat=3):
            p = mpmath.fprod((1 - drop) if m else drop for m in mask)
            merged = [gain * m * v for m, v in zip(mask, x, strict=True)]
            variance += p * mpmath.fsum((a - b) ** 2 for a, b in zip(merged, mean, strict=True))
            ratio += p * mpmath.fsum((gain * m * s) ** 2 for m, s in zip(mask, shift, strict=True))
            second += p * (gain * mask[0]) ** 2
        c = (mask_sensitivity_formula if rescale else plain_mask_sensitivity_formula)().expression
        noise = (mask_noise_formula if rescale else plain_mask_noise_formula)().expression
        numbers = {symbol("alpha"): alpha, symbol("drop"): drop}
        exact = mpmath.mpf(str(c.evalf(50, subs=numbers)))
        assert mpmath.almosteq(exact**2, second, 1e-40)
        assert mpmath.almosteq(exact**2, ratio / mpmath.fsum(s**2 for s in shift), 1e-40)
        added = mpmath.mpf(str(noise.evalf(50, subs=numbers))) * mpmath.fsum(v**2 for v in x)
        assert mpmath.almosteq(added, variance, 1e-40)
    effect = operator("dare").effect(1, drop=0.37, rescale=rescale, coefficient=-0.3)
    assert effect.sensitivity is not None
    assert effect.noise is not None
    np.testing.assert_allclose(effect.sensitivity[0], float(exact), rtol=1e-14)
    np.testing.assert_allclose(effect.noise[0], float(variance / mpmath.fsum(v**2 for v in x)), rtol=1e-14)


def test_coefficients_of_slerp_and_model_stock_are_their_formulas_with_50_digits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        v = rng.standard_normal((2, 5))
        gram = v @ v.T
        t = float(rng.uniform(0.05, 0.95))
        found = slerp_coefficients(gram.astype(complex), t)
        with mpmath.workdps(50):
            cosine = mpmath.mpf(gram[0, 1]) / mpmath.sqrt(mpmath.mpf(gram[0, 0]) * mpmath.mpf(gram[1, 1]))
            angle = mpmath.acos(cosine)
            expression = slerp_weight_formula().expression
            for weight, fraction in zip(found.real, (1 - t, t), strict=True):
                numbers = {symbol("fraction"): mpmath.mpf(fraction), symbol("angle"): angle}
                assert abs(float(expression.evalf(50, subs=numbers)) - weight) < 1e-13
            numbers = {symbol("N"): 2, symbol("cosine"): cosine}
            ratio = float(model_stock_ratio_formula().expression.evalf(50, subs=numbers))
            slope = float(model_stock_slope_formula().expression.evalf(50, subs=numbers))
        stock = model_stock_coefficients(gram.astype(complex)).real
        np.testing.assert_allclose(stock, ratio / 2, rtol=1e-13)
        np.testing.assert_allclose(model_stock_ratio(2, float(cosine)), ratio, rtol=1e-13)
        step = 1e-6  # the slope with respect to the cosine, by differences of the ratio
        difference = (model_stock_ratio(2, float(cosine) + step) - model_stock_ratio(2, float(cosine) - step)) / 2e-6
        np.testing.assert_allclose(difference, slope, rtol=1e-6)


def test_slerp_sensitivity_with_50_digits() -> None:
    """The Jacobian of SLERP in R^3, differentiated by mpmath, and its largest singular value."""
    a, b, t = [0.3, -1.2, 0.7], [1.1, 0.4, -0.2], 0.3
    with mpmath.workdps(50):

        def merged(k: int, *x: Any) -> Any:
            u, v = list(x), [mpmath.mpf(y) for y in b]
            inner = mpmath.fsum(p * q for p, q in zip(u, v, strict=True))
            lengths = [mpmath.sqrt(mpmath.fsum(p * p for p in w)) for w in (u, v)]
            angle = mpmath.acos(inner / lengths[0] / lengths[1])
            return mpmath.sin((1 - mpmath.mpf(t)) * angle) / mpmath.sin(angle) * u[k] + (
                mpmath.sin(mpmath.mpf(t) * angle) / mpmath.sin(angle) * v[k]
            )

        point = [mpmath.mpf(y) for y in a]
        J = mpmath.matrix(3, 3)
        for k in range(3):
            for j in range(3):
                order = tuple(int(j == i) for i in range(3))
                J[k, j] = mpmath.diff(lambda *x, k=k: merged(k, *x), tuple(point), order)
        exact = float(max(mpmath.svd_r(J, compute_uv=False)))
    rows = np.array([a, b])
    found = span_sensitivity(rows @ rows.T, lambda G: slerp_coefficients(G, t))
    np.testing.assert_allclose(found[0], exact, rtol=1e-12)


def test_angle_over_sine_with_50_digits() -> None:
    places = np.concatenate([1 - np.logspace(-16, -0.3, 40), np.linspace(-0.99, 0.9, 20), [1.0]])
    found = _stretch(places.astype(complex)).real
    with mpmath.workdps(50):
        exact = [
            1.0 if c == 1 else float(mpmath.acos(mpmath.mpf(c)) / mpmath.sqrt(1 - mpmath.mpf(c) ** 2)) for c in places
        ]
    np.testing.assert_allclose(found, exact, rtol=1e-13)


def test_karcher_coefficients_solve_the_stationarity_equation() -> None:
    rng = np.random.default_rng(3)
    v = rng.standard_normal((4, 6)) + 1.0
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    lengths = np.linalg.norm(v, axis=1)
    point = karcher_coefficients((v @ v.T).astype(complex), weights).real @ v
    u = point / np.linalg.norm(point)
    np.testing.assert_allclose(np.linalg.norm(point), weights @ lengths, rtol=1e-12)
    cosine = v @ u / lengths
    logs = (np.arccos(cosine) / np.sqrt(1 - cosine**2))[:, None] * (v / lengths[:, None] - cosine[:, None] * u)
    np.testing.assert_allclose(weights @ logs, 0.0, atol=1e-12)


def test_span_sensitivity_of_a_linear_merge_and_without_room() -> None:
    gram = np.diag([1.0, 4.0])
    constant = np.array([0.3, -0.7])
    np.testing.assert_allclose(span_sensitivity(gram, lambda G: constant + 0 * G[0]), [0.3, 0.7])
    rows = np.random.default_rng(0).standard_normal((2, 2))  # two vectors fill the plane: no direction is left over
    tight = span_sensitivity(rows @ rows.T, lambda G: slerp_coefficients(G, 0.5), room=False)
    loose = span_sensitivity(rows @ rows.T, lambda G: slerp_coefficients(G, 0.5))
    assert np.all(tight <= loose + 1e-15)


def test_iso_gain_formula_and_its_extremes() -> None:
    expression = iso_gain_formula().expression
    value = float(expression.subs({symbol("s_mean"): 2.0, symbol("s_low"): 1.0, symbol("s_next"): 3.0}))
    assert value == iso_c_gain([3.0, 1.0, 2.0], (3, 3)) * 0 + 1.0
    assert iso_c_gain([5.0, 1.0, 3.0], (3, 3)) == pytest.approx(2 * 3 / (1 + 3))
    assert iso_c_gain([5.0], (1, 1)) == 1.0
    assert iso_c_gain([1e300, 1e-300], (2, 2)) == pytest.approx(1.0)
    assert iso_c_gain([1e300, 1e-300], (2, 3)) == np.inf


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6))
@settings(max_examples=50, deadline=None)
def test_iso_c_is_never_contracting(values: list[float]) -> None:
    assert iso_c_gain(values, (len(values), len(values))) >= 1.0


def test_trim_change_is_the_identity_of_the_dispersion() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        p, lam, d = rng.uniform(0, 1), rng.uniform(-1, 2), rng.uniform(0, 3)
        before = p * (1 - lam) ** 2 * d**2 + (1 - p) * lam**2 * d**2
        np.testing.assert_allclose(trim_change(p, lam, d), p * d**2 - before, atol=1e-12)
    with pytest.raises(RecipeError, match="weight"):
        trim_change(1.5, 0.3, 1.0)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_shares_and_maps_sum_to_one(experts: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    fisher = rng.exponential(size=(experts, size)) * (rng.random((experts, size)) < 0.7)
    weights = rng.exponential(size=experts) + 0.01
    np.testing.assert_allclose(fisher_shares(fisher, weights, floor=0.0).sum(axis=0), 1.0, rtol=1e-12)
    inputs = rng.standard_normal((experts, rng.integers(1, 2 * size + 2), size))
    maps = regmean_maps(np.einsum("isk,isl->ikl", inputs, inputs), weights, float(rng.choice([0.0, 0.9, 1.0])))
    np.testing.assert_allclose(maps.sum(axis=0), np.eye(size), atol=1e-6)
    votes = rng.random((experts, size)) < 0.5
    c = elected_sensitivity(votes, weights)
    assert np.all(c <= 1 + 1e-12)
    assert np.all((c > 0) == votes.any(axis=1))


@given(st.integers(0, 10**6), st.floats(0.0, 0.8), st.floats(0.05, 1.0))
@settings(max_examples=40, deadline=None)
def test_della_probabilities_keep_mean_and_range(seed: int, drop: float, share: float) -> None:
    window = share * 2 * min(drop, 0.99 - drop)
    row = np.random.default_rng(seed).standard_normal(int(seed % 9) + 1)
    p = drop_probabilities(row, drop, window)
    assert np.all((p >= drop - window / 2 - 1e-12) & (p <= drop + window / 2 + 1e-12))
    np.testing.assert_allclose(p.mean(), drop, atol=1e-12)
    order = np.argsort(-np.abs(row), kind="stable")
    assert np.all(np.diff(p[order]) >= -1e-12)


def test_agreement_is_empty_where_votes_cancel() -> None:
    assert agreement([[1.0, 2.0], [-1.0, 1.0]]).tolist() == [[False, True], [False, True]]


# --- readings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(operators()))
def test_every_method_has_a_reading(name: str) -> None:
    found = operator(name)
    text = str(explain_method(name))
    terms = {action.term for action in found.actions}
    assert terms <= {"training", "dispersion", "instability"}
    assert {"dispersion", "instability"} <= terms | {"training"}
    for piece in (found.statement, found.sensitivity, found.bias, found.second_moment, found.source):
        assert piece in text
    for action in found.actions:
        assert f"{action.term}: {action.direction}" in text
        assert action.under == "always" or f"if {action.under}" in text
    assert ("no guarantee" in text) == (found.guarantee in ("local", "none") or "no guarantee" in found.sensitivity)
    assert text.isascii()


def test_the_reading_of_ties() -> None:
    text = str(explain_method("ties"))
    assert "guarantee: no guarantee: the operator is discontinuous" in text
    assert "dispersion: lowers (if lambda > 2 p_i" in text
    numbers = explain_method("ties", 4, coefficient=0.5)
    assert "c_i = 0.5 (no guarantee, estimated)" in str(numbers)
    assert numbers.effect is not None
    assert numbers.effect.tier == "estimated"
    certain = str(explain_method("task_arithmetic", 2, coefficient=0.3, coefficients=[1.0, -2.0]))
    assert "c_i = 0.3, 0.6 (certified)" in certain
    assert "c_i: none" in str(explain_method("tsv_m", 2))
    assert "assumption 10" in str(explain_method("fisher", 2, fisher=np.ones((2, 3))))


def test_refusals_name_field_and_remedy() -> None:
    for call, words in (
        (lambda: operator("tie"), "did you mean 'ties'"),
        (lambda: explain_method("nothing_like_it"), "choose one of"),
        (lambda: operator("ties").effect(2, densty=0.1), "did you mean 'density'"),
        (lambda: operator("average").effect(0), "experts"),
        (lambda: operator("slerp").effect(3), "at most 2"),
        (lambda: operator("weighted").effect(2), "coefficients is missing"),
        (lambda: operator("weighted").effect(2, coefficients=[1.0, -1.0]), "sum to zero"),
        (lambda: operator("dare").effect(2, drop=1.0), "drop is outside"),
        (lambda: operator("dare").effect(2, drop=float("nan")), "NaN"),
        (lambda: operator("della").effect(2, drop=0.95, window=0.2), "window"),
        (lambda: operator("ties").effect(2, aggregation="median"), "choose one of mean, sum"),
        (lambda: operator("fisher").effect(2, fisher=[[1.0, -1.0], [1.0, 1.0]]), "negative"),
        (lambda: operator("regmean").effect(2, grams=np.eye(3)), "grams"),
        (lambda: operator("model_stock").effect(2, gram=[[1.0, 3.0], [3.0, 1.0]]), "positive semidefinite"),
        (lambda: operator("iso_c").effect(2, spectra=[3.0]), "spectra"),
        (lambda: operator("task_arithmetic").effect(2, coefficients=[1.0, 2.0, 3.0]), "coefficients has shape"),
        (lambda: operator("greedy_soup").effect(2, ingredients=[5]), "ingredients"),
        (lambda: wudi_sensitivity(np.zeros((2, 2, 2)), 0), "zero"),
        (lambda: mask_variance([[1.0]], [[1.0]], [1.0]), "probabilities"),
        (lambda: explain_method("ties", coefficient=0.5), "experts"),
        (lambda: operator("ties").effect(2).dispersion(np.eye(2)), "measure V"),
        (lambda: operator("ties").effect(2).bias(np.eye(2)), "measure M"),
    ):
        with pytest.raises(RecipeError, match=words):
            call()


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_linear_methods_by_name_are_their_task_arithmetic() -> None:
    plain = master_bound(Merge(PAIR, method="task_arithmetic", coefficients=0.3, **STATED))
    shrunk = master_bound(merge_with(PAIR, "wise_ft", {"alpha": 0.6}, **STATED))
    assert shrunk.value == plain.value
    assert shrunk.tier == plain.tier == "certified"
    average, soup = (master_bound(Merge(PAIR, method=m, **STATED)) for m in ("average", "uniform_soup"))  # type: ignore[arg-type]
    assert average.value == soup.value
    normal = master_bound(merge_with(PAIR, "weighted", {"coefficients": [3.0, 1.0]}, **STATED))
    by_hand = master_bound(Merge(PAIR, method="weighted", coefficients=[0.75, 0.25], **STATED))
    assert normal.value == by_hand.value
    dare = master_bound(merge_with(PAIR, "dare", {"drop": 0.5, "coefficient": 0.3}, **STATED))
    assert dare.value == master_bound(Merge(PAIR, method="dare", coefficients=0.3, drop_rate=0.5, **STATED)).value
    assert dare.tier == "certified"


def test_coefficients_found_from_the_experts_are_never_certified() -> None:
    for method in ("risk_optimal", "curvature_optimal", "adamerging"):
        bound = master_bound(merge_with(PAIR, method, {"coefficients": [0.3, 0.3]}, **STATED))
        assert bound.tier == "estimated"
        assert any("do not change with the experts" in item.statement for item in bound.assumptions)
        assert l1_gap(merge_with(PAIR, method, {"coefficients": [0.3, 0.3]}, **STATED)).tier == "estimated"


def test_methods_with_statistics_enter_by_their_sensitivity() -> None:
    shares = np.array([[3.0, 1.0], [1.0, 1.0]])
    merge = merge_with(PAIR, "fisher", {"fisher": shares}, dispersion=0.1, **STATED)
    np.testing.assert_allclose(merge.sensitivity, [0.75, 0.5])
    bound = master_bound(merge)
    assert bound.tier == "estimated"  # V is measured, and the diagonals are frozen
    np.testing.assert_allclose([row.sensitivity for row in bound.experts], [0.75, 0.5])
    local = merge_with(PAIR, "ties", {"coefficient": 0.4}, dispersion=0.1, **STATED)
    assert master_bound(local).tier == "estimated"
    claimed = replace(local, measured=frozenset())  # calling a local sensitivity known does not make it certified
    assert master_bound(claimed).tier == "estimated"
    assert l1_gap(claimed).tier == "estimated"


def test_methods_without_a_sensitivity_are_refused_by_name_with_the_reason() -> None:
    for name in ("tsv_m", "iso_cts", "pcb", "regmean", "slerp", "karcher", "wudi"):
        with pytest.raises(AssumptionError, match=name):
            merge_with(PAIR, name, dispersion=0.1)
        with pytest.raises(AssumptionError, match=f"'{name}'.*give sensitivity"):
            master_bound(Merge(PAIR, method=name, dispersion=0.1))  # type: ignore[arg-type]
        measured = Merge(PAIR, method=name, dispersion=0.1, sensitivity=[0.6, 0.7], **STATED)  # type: ignore[arg-type]
        assert master_bound(measured).tier == "estimated"
        with pytest.raises(AssumptionError, match="dispersion"):
            master_bound(replace(measured, dispersion=None))
    with pytest.raises(AssumptionError, match="dispersion"):
        merge_with(PAIR, "risk_optimal", {"coefficients": [0.5, 0.5], "groups": {"a": [0.1, 0.2]}})
    layered = {"coefficients": [0.5, 0.5], "groups": {"a": [0.1, 0.9]}}
    merge = merge_with(PAIR, "risk_optimal", layered, dispersion=0.2)
    np.testing.assert_allclose(merge.sensitivity, [0.5, 0.9])
    with pytest.raises(AssumptionError, match="dare"):
        merge_with(PAIR, "dare", {"rescaling": "l1"}, dispersion=0.2)
    with pytest.raises(RecipeError, match="settings"):
        merge_with(PAIR, "dare", {}, drop_rate=0.5)


# --- fuzz -------------------------------------------------------------------------------------------------------------

EXTREME = [
    0.0,
    -1.0,
    1e-300,
    1e300,
    -1e300,
    np.inf,
    -np.inf,
    np.nan,
    0.5,
    1.0,
    3,
    True,
    None,
    "x",
    [],
    [1.0],
    [1.0, 2.0],
]


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_fuzz_effects_are_numbers_or_typed_errors(data: st.DataObject) -> None:
    found = operators()[data.draw(st.sampled_from(sorted(operators())))]
    names = [item.name for item in found.settings] + list(found.statistics) + ["coefficients"]
    chosen = data.draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
    arrays = [np.eye(2), np.ones((2, 3)), np.zeros((2, 2)), np.ones((2, 2, 2)), [np.ones((2, 2, 2))], np.array(1e300)]
    values = {name: data.draw(st.sampled_from([*EXTREME, *arrays])) for name in chosen}
    try:
        effect = found.effect(data.draw(st.integers(0, 3)), **values)
    except MergeboundError:
        return
    for part in (effect.sensitivity, effect.surely, effect.mean, effect.noise):
        assert part is None or not np.any(np.isnan(part))
    assert effect.sensitivity is None or np.all(effect.sensitivity >= 0)
    assert effect.reason


def test_units_do_not_matter() -> None:
    """Sensitivities are ratios of lengths: rescaling the task vectors, up to overflow, changes nothing."""
    rng = np.random.default_rng(0)
    rows, parts = rng.standard_normal((2, 6)), rng.standard_normal((2, 3, 2))
    for scale in (1e-120, 1e120):
        for name, key, value, power in (
            ("model_stock", "gram", rows @ rows.T, 2),
            ("slerp", "gram", rows @ rows.T, 2),
            ("sce", "selected", rows, 1),
            ("fisher", "fisher", rows**2, 1),
            ("regmean", "grams", np.stack([part.T @ part for part in parts]), 1),
        ):
            more = {"floor": 0.0} if name == "fisher" else {}
            one = operator(name).effect(2, **{key: value}, **more).sensitivity
            two = operator(name).effect(2, **{key: value * scale**power}, **more).sensitivity
            np.testing.assert_allclose(one, two, rtol=1e-9)
        np.testing.assert_allclose(
            wudi_sensitivity(parts, 0).value, wudi_sensitivity(parts * scale, 0).value, rtol=1e-6
        )
        mask = [True, True, False, True, False, False]
        np.testing.assert_allclose(l1_mask_sensitivity(rows[0] * scale, mask), l1_mask_sensitivity(rows[0], mask))
