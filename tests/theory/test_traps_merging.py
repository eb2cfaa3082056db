"""Traps of sections 7 to 12 (dispersion, predictions, exact family, operators): the naive formula fails, ours holds.

The table of all traps, and of the tests of other files, is docs/theory-traps.md.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from theory import (
    AssumptionError,
    Expert,
    Merge,
    QuadraticTask,
    RecipeError,
    Schedule,
    best_lambda,
    directional_risk,
    expert_moments,
    lambda_law,
    local_sensitivity,
    master_bound,
    merge_moments,
    network_bound,
    operator,
    secant,
    tangent,
    theorem_1,
    with_true_constants,
)
from theory.certificate import output_bound, output_bound_labelled, remainder_bound
from theory.curvature import positive_part
from theory.dispersion import centred_bound, dispersion, dispersion_split, orthogonal_bound, triangle_bound
from theory.function_space import cross_entropy, minimise_risk
from theory.lemma import curvature_on_segment, first_derivative_curvature
from theory.linearization_error import LogitCurvature, secant_error, tangent_error
from theory.operators import added_dispersion, fisher_shares, regmean_maps, sensitivity
from theory.quadratic import constant_gap
from theory.training import pl_training_risk

STATED: dict[str, Any] = dict(shared_samples=False, data_independent_choices=True, per_sample_loss=True)
SLACK = 1 + 1e-9
BOWL = QuadraticTask(np.eye(1), np.zeros(1), np.eye(1))


def bowl(n: int, b: Any, eta: Any, steps: int | None = None, **more: Any) -> Expert:
    return Expert("a", n, b, eta, steps, **{"curvature": "strongly_convex", "L": 1.0, "mu": 1.0, **more})


# --- section 7: dispersion --------------------------------------------------------------------------------------------


def test_the_plain_average_is_not_the_least_dispersed_merge() -> None:
    """Only the p-average is; for weights 0.9 and 0.1 the plain average pays more than twice as much."""
    experts, p = np.array([[0.0], [1.0]]), np.array([0.9, 0.1])
    plain, best = float(dispersion([0.5], experts, p)), float(dispersion(p @ experts, experts, p))
    assert plain > 2 * best
    away, least = dispersion_split([0.5], experts, p)
    assert float(least) == pytest.approx(best)
    assert float(away + least) == pytest.approx(plain)


@pytest.mark.parametrize("N", [2, 3])
def test_short_forms_of_dispersion_need_uniform_weights(N: int) -> None:
    """mean(d^2)(1 - 1/N) and sum p_j d_j^2 are about uniform p; here all weight is on one task."""
    d, alpha, p = np.array([1.0, *[3.0] * (N - 1)]), np.full(N, 1 / N), np.eye(N)[0]
    opposed = np.zeros((N, 1))
    opposed[:, 0] = [1.0, *[-3.0] * (N - 1)]
    exact = float(dispersion(alpha @ opposed, opposed, p))
    assert float(p @ d**2) < 0.3 * exact  # sum p_j d_j^2, valid for averaging with uniform p
    assert exact <= float(triangle_bound(d, alpha, p)) * SLACK
    assert exact <= float(centred_bound(d, alpha, p)) * SLACK
    apart, far = np.eye(N), np.array([1.0, *[0.1] * (N - 1)])
    vectors = apart * far
    truth = float(dispersion(alpha @ vectors, vectors, p))
    if N == 3:
        assert float(np.mean(far**2) * (1 - 1 / N)) < 0.6 * truth
    assert truth == pytest.approx(float(orthogonal_bound(far, alpha, p)))


def test_the_base_is_an_anchor_with_the_final_heads_only() -> None:
    """f = (s h - 1)^2/2, s shared: base (1, 1) and expert (2, 1/2) fit, the base with the final head does not."""
    risk = (1.0 * 0.5 - 1) ** 2 / 2  # a merge that stays at the base takes the expert's head along
    naive = 0.0  # F(x_0) with its own head, at no distance
    assert naive < risk == 0.125
    run = Expert(
        "a", 10, 10, 0.1, 5, L=4.0, head="trained", drift=1.0, epsilon=0.0, initial_risk=0.0, training_risk=0.0
    )
    bound = master_bound(Merge((run,), method="task_arithmetic", coefficients=1e-9))
    assert "base" not in bound.dispersion_form
    assert risk <= float(bound.value)


def test_lambda_law_without_cross_terms_misses_the_best_coefficient() -> None:
    """Two task vectors that undo most of each other under either curvature."""
    vectors = np.array([[1.0, -0.8], [-0.8, 1.0]])
    H = np.stack([np.diag([1.0, 0.0]), np.diag([0.0, 1.0])])
    forms = np.einsum("ia,jab,kb->jik", vectors, H, vectors)

    def cost(lam: float) -> float:
        total = vectors.sum(axis=0)
        return float(np.mean([(lam * total - v) @ h @ (lam * total - v) for v, h in zip(vectors, H, strict=True)]))

    naive, best = float(best_lambda(np.einsum("jii->ji", forms))), float(best_lambda(forms, cross_terms=True))
    assert naive == pytest.approx(float(lambda_law(2, 0.64)))
    grid = np.linspace(-10, 10, 2001)
    assert cost(best) <= min(map(cost, grid)) + 1e-12
    assert cost(naive) > cost(best) + 0.7


def test_lambda_law_is_about_dispersion_and_not_about_risk() -> None:
    """One expert that was stopped early: the law keeps it (lambda = 1), the risk still falls beyond it."""
    field = secant(np.zeros((1, 2)), np.array([[[1.0, 0.0]]]), np.array([0]))  # a linear model
    law = float(lambda_law(1, 0.5))
    found = minimise_risk([field], bounds=(0.0, 2.0))
    assert law == 1.0
    assert float(cross_entropy(field.at([law]), field.labels).mean()) > 2 * found.risk
    assert found.alpha[0] == pytest.approx(2.0)


@pytest.mark.parametrize("independent", [True, False])
def test_masks_add_dispersion_and_common_masks_add_more(independent: bool) -> None:
    """Two equal task vectors, every mask listed: V of the mean merge is too small; for one common mask so is
    lambda^2 q/(1-q) sum |Delta_i|^2, because the masked vectors add up before they are squared."""
    lam, drop, p = 0.5, 0.5, np.array([0.5, 0.5])
    exact = 0.0
    for bits in product((0, 1), repeat=2):
        kept = bits if independent else (bits[0], bits[0])
        merged = lam * sum(kept) / (1 - drop)
        exact += float(dispersion([merged], [[1.0], [1.0]], p)) / 4
    mean = float(dispersion([2 * lam], [[1.0], [1.0]], p))
    assert mean < exact
    runs = tuple(Expert(name, 10, 2, 0.1, 5, L=1.0) for name in "ab")
    merge = Merge(runs, method="dare", coefficients=lam, drop_rate=drop, independent_masks=independent)
    separate = mean + lam**2 * drop / (1 - drop) * 2
    assert (separate < 0.6 * exact) == (not independent)
    assert exact == pytest.approx(mean + float(added_dispersion(merge, np.ones(2))))


# --- section 8: master bound and training risk ------------------------------------------------------------------------


def test_excess_risk_is_subtracted_after_squaring() -> None:
    """f = (x - z)^2/2, x = bias + mean of four samples, biased so that F_S = F*: F* may not leave the root early."""
    n, noise = 4, 1.0
    bias2 = noise / n
    training = (bias2 + noise - noise / n) / 2
    risk, least = (bias2 + noise + noise / n) / 2, noise / 2
    epsilon = math.sqrt(2 * noise) / n
    assert training == pytest.approx(least)
    naive = (math.sqrt(max(training - least, 0.0)) + math.sqrt(0.5) * epsilon) ** 2
    assert naive < 0.3 * (risk - least)
    bound = float(theorem_1(training, [1.0], [1.0], [epsilon**2])) - least
    assert risk - least <= bound
    run = bowl(n, n, 1.0, 1, drift=1.0, epsilon=epsilon, training_risk=training)
    whole = master_bound(Merge((run,), **STATED))
    assert float(whole.excess(least)) == pytest.approx(float(whole.value) - least)
    assert risk - least <= float(whole.excess(least)) * SLACK


def test_training_risks_need_the_instability_term() -> None:
    """One sample, fully fitted: training risk and dispersion are 0, the risk is 1.  Held-out risks do without."""
    run = with_true_constants(BOWL, [0.0], bowl(1, 1, 1.0, 1))
    exact = merge_moments([BOWL], [0.0], [run], [1.0], [1.0])
    bound = master_bound(Merge((run,), method="weighted", coefficients=[1.0], dispersion=0.0, **STATED))
    naive = float(bound.terms[0].value + bound.terms[1].value) ** 2
    assert naive == 0.0 < float(exact.risk) == pytest.approx(1.0)
    assert float(exact.risk) <= float(bound.value) * SLACK
    for held_out, risks in ((False, [0.0]), (True, [float(exact.risk)])):
        known = dict(dispersion=0.0, epsilon=[float(np.sqrt(2))], held_out=held_out)
        assert float(exact.risk) <= float(network_bound(risks, 1.0, [1.0], **known).value) * SLACK  # type: ignore[arg-type]


def literal_pl(run: Expert, minimal: float) -> float:
    """(F_0 - F*) (1 - mu eta)^K above F*, without noise."""
    start, mu, eta, steps = (float(np.asarray(x)) for x in (run.initial_risk, run.mu, run.learning_rate, run.steps))
    return minimal + (start - minimal) * (1 - mu * eta) ** steps


def test_pl_rate_needs_small_steps() -> None:
    """Curvatures 0.1 and 1, eta = 1.98: the stiff direction swings, nearly undamped."""
    task = QuadraticTask(np.diag([0.1, 1.0]), np.zeros(2), np.zeros((2, 2)))
    run = Expert("a", 4, 4, 1.98, 10, curvature="strongly_convex", L=1.0, mu=0.1)
    run = with_true_constants(task, [0.0, 1.0], run)
    exact = float(expert_moments(task, [0.0, 1.0], run).training_risk)
    assert literal_pl(run, 0.0) < 0.5 * exact
    with pytest.raises(AssumptionError, match="exceeds 1/"):
        pl_training_risk(run)
    gentle = with_true_constants(task, [0.0, 1.0], replace(run, learning_rate=1.0))
    assert float(expert_moments(task, [0.0, 1.0], gentle).training_risk) <= float(pl_training_risk(gentle)) * SLACK


def test_pl_rate_does_not_lead_to_zero() -> None:
    """Ten samples of variance 1: the training risk stays above 0.45; with F* = 0 the rate passes below it."""
    run = with_true_constants(BOWL, [2.0], bowl(10, 10, 0.5, 30))
    exact = float(expert_moments(BOWL, [2.0], run).training_risk)
    assert literal_pl(run, 0.0) < 1e-6 < exact
    assert exact <= float(pl_training_risk(run)) * SLACK
    with pytest.raises(RecipeError, match="minimal_risk"):
        pl_training_risk(replace(run, minimal_risk=None))


def test_pl_rate_with_decay_is_about_the_decayed_objective() -> None:
    """f = (x - 1)^2/2 with decay 1 stops half-way, although f itself interpolates."""
    task = QuadraticTask(np.eye(1), np.ones(1), np.zeros((1, 1)))
    run = with_true_constants(task, [0.0], bowl(4, 4, 0.25, 60, weight_decay=1.0))
    exact = float(expert_moments(task, [0.0], run).training_risk)
    assert exact == pytest.approx(0.125)
    assert literal_pl(run, 0.0) < 1e-6
    assert exact <= float(pl_training_risk(run)) * SLACK
    away = with_true_constants(task, [0.5], run)  # decay needs the norm of the base
    with pytest.raises(RecipeError, match="base_norm"):
        pl_training_risk(replace(away, base_norm=None))


# --- section 8: predictions -------------------------------------------------------------------------------------------


def test_secant_and_tangent_do_not_always_bracket_the_truth() -> None:
    """Logits x_1 x_2 against 0: base and experts are all 0, and so are both predictions; the average is not."""
    labels, alpha = np.array([1]), [0.5, 0.5]
    chord = secant(np.zeros((1, 2)), np.zeros((2, 1, 2)), labels)
    line = tangent(np.zeros((1, 2)), np.zeros((2, 1, 2)), labels)
    logits = np.array([[0.5 * 0.5, 0.0]])
    truth = float(cross_entropy(logits, labels).mean())
    low, high = sorted(float(cross_entropy(field.at(alpha), labels).mean()) for field in (chord, line))
    assert low == high < truth - 0.1
    table = np.zeros((2, 2, 1, 2))
    table[0, 1, 0, 0] = table[1, 0, 0, 0] = 1.0
    curvature = LogitCurvature(np.zeros((2, 1, 2)), table)
    for field, error in ((chord, secant_error), (line, tangent_error)):  # the second-order account is exact here
        np.testing.assert_allclose(field.at(alpha) + error(curvature, alpha), logits, atol=1e-12)


def test_secant_is_the_mean_of_logits_only_for_coefficients_of_sum_one() -> None:
    base, experts, labels = np.array([[1.0, 0.0]]), np.array([[[3.0, 0.0]], [[0.0, 2.0]]]), np.array([0])
    field = secant(base, experts, labels)
    np.testing.assert_allclose(field.at([0.5, 0.5]), experts.mean(axis=0))
    ensemble = 0.3 * experts.sum(axis=0)
    assert np.abs(ensemble - field.at([0.3, 0.3])).max() > 0.39
    np.testing.assert_allclose(field.at([0.3, 0.3]), base + 0.3 * (experts - base).sum(axis=0))


def test_a_prediction_without_its_remainder_is_no_bound() -> None:
    labels, field = np.array([1]), np.zeros((1, 2))
    remainder = np.array([[0.25, 0.0]])
    truth = float(cross_entropy(field + remainder, labels).mean())
    assert float(cross_entropy(field, labels).mean()) < truth - 0.1
    assert truth <= float(remainder_bound(field, labels, remainder))


def test_curvature_at_a_saturated_expert_says_nothing() -> None:
    """Logistic loss of margin 10 - 20 t: flat at the expert, ten at the other end."""
    t = np.linspace(0, 1, 2001)
    margin = 10 - 20 * t
    loss, p = np.logaddexp(0, -margin), 1 / (1 + np.exp(margin))
    slope, bend = 20 * p, 400 * p * (1 - p)
    truth, start = loss[-1], loss[0]
    assert float(directional_risk(start, bend[0])) < 2e-3 * truth
    assert truth <= float(directional_risk(start, curvature_on_segment(bend.max(), slope[0], start)))
    assert truth <= float(directional_risk(start, first_derivative_curvature(slope, loss)))


def test_eigenvalues_are_clipped_and_not_the_form() -> None:
    """An indefinite form cut at zero is not convex: zero at both ends, two in the middle."""
    Q = np.array([[0.0, 1.0], [1.0, 0.0]])
    ends, middle = np.array([[2.0, 0.0], [0.0, 2.0]]), np.array([1.0, 1.0])

    def form(matrix: np.ndarray, d: np.ndarray) -> float:
        return max(float(d @ matrix @ d), 0.0)

    assert form(Q, middle) > 1.9 + np.mean([form(Q, end) for end in ends])
    clipped = positive_part(Q)
    assert form(clipped, middle) <= np.mean([form(clipped, end) for end in ends]) * SLACK
    rng = np.random.default_rng(0)
    assert all(form(Q, d) <= form(clipped, d) * SLACK for d in rng.standard_normal((100, 2)))


def test_the_certificate_needs_the_slope_and_the_whole_range() -> None:
    logits, labels, change = np.zeros((1, 2)), np.array([1]), np.array([[0.5, -0.5]])
    own = float(cross_entropy(logits, labels).mean())
    truth = float(cross_entropy(logits + change, labels).mean())
    assert own + 1.0**2 / 8 < truth - 0.4  # the min form without (p - e_y) . delta, which needs the label
    assert (
        np.sqrt(own) + np.sqrt(np.abs(change).max() ** 2 / 8)
    ) ** 2 < truth - 0.2  # the largest entry, not the range
    assert truth <= float(output_bound(own, change))
    assert truth <= float(output_bound_labelled(logits, labels, change))


# --- section 9: exact family ------------------------------------------------------------------------------------------


def test_the_exact_family_needs_the_signed_clock() -> None:
    """eta h = 1.5 overshoots: x goes 1.5, 0.75, 1.125 times the mean; with |1 - eta h| it would be 2.625."""
    task = QuadraticTask(np.eye(1), np.ones(1), np.zeros((1, 1)))
    x = 0.0
    for _ in range(3):
        x -= 1.5 * (x - 1)
    unsigned = sum(1.5 * abs(1 - 1.5) ** k for k in range(3))
    assert abs(unsigned - x) > 1.4
    assert float(expert_moments(task, [0.0], bowl(4, 4, 1.5, 3)).mean[0]) == pytest.approx(x)


def test_the_mean_with_decay_is_pulled_to_zero() -> None:
    task = QuadraticTask(np.eye(1), np.ones(1), np.zeros((1, 1)))
    x, w = 2.0, 0.0
    for _ in range(5):
        x -= 0.2 * ((x - 1) + 0.5 * x)
        w = 0.2 + (1 - 0.2 * 1.5) * w
    without = 2.0 + w * (1.0 - 2.0)  # x_0 + h tau (theta - x_0)
    assert abs(without - x) > 0.5
    exact = expert_moments(task, [2.0], bowl(4, 4, 0.2, 5, weight_decay=0.5))
    assert float(exact.mean[0]) == pytest.approx(x)
    assert x == pytest.approx(2.0 + w * (1.0 * (1.0 - 2.0) - 0.5 * 2.0))


def test_batches_add_their_own_variance() -> None:
    """One step on one of two samples: x = eta z has variance eta^2, not (eta)^2/n as if it were their mean."""
    exact = 0.5**2
    naive = exact / 2
    assert naive < 0.6 * exact
    run = bowl(2, 1, 0.5, 1)
    assert float(expert_moments(BOWL, [0.0], run).covariance[0, 0]) == pytest.approx(exact)


@pytest.mark.parametrize(
    "change",
    [dict(momentum=0.5), dict(weight_decay=0.5), dict(learning_rate=Schedule(np.array([0.1, 0.5])), steps=None)],
)
def test_the_short_gap_is_for_plain_sgd_at_a_constant_rate(change: dict[str, Any]) -> None:
    """p alpha tr(H (I - (I - eta H)^K) Omega)/n, against the mean of products over the two steps, by hand."""
    run = replace(bowl(4, 4, 0.3, 2), **change)
    rates = np.array([0.1, 0.5]) if isinstance(run.learning_rate, Schedule) else np.full(2, 0.3)
    x, v = 0.0, 0.0  # response of x to the mean of the samples
    for eta in rates:
        v = float(run.momentum) * v + (x - 1) + float(run.weight_decay) * x  # type: ignore[arg-type]
        x -= eta * v
    naive = (1 - (1 - float(rates.mean())) ** 2) / 4
    exact = x / 4
    assert abs(naive - exact) > 0.004
    assert float(merge_moments([BOWL], [0.0], [run], [1.0], [1.0]).gap) == pytest.approx(exact)
    with pytest.raises(AssumptionError, match="constant_gap"):
        constant_gap([BOWL], [run], [1.0], [1.0])


def test_the_gap_does_not_pair_eigenvalues() -> None:
    """H and Omega with exchanged axes: the trace of the product is not the product of sorted eigenvalues."""
    task = QuadraticTask(np.diag([1.0, 0.1]), np.zeros(2), np.diag([0.1, 1.0]))
    run = Expert("a", 4, 4, 0.5, 3, curvature="convex", L=1.0)
    h, noise = np.array([0.1, 1.0]), np.array([0.1, 1.0])
    paired = float(np.sum(h * (1 - (1 - 0.5 * h) ** 3) * noise)) / 4
    exact = float(np.sum(h * (1 - (1 - 0.5 * h) ** 3) * noise[::-1])) / 4
    assert abs(paired - exact) > 0.1
    assert float(merge_moments([task], np.zeros(2), [run], [1.0], [1.0]).gap) == pytest.approx(exact)


# --- section 10: operators --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [True, False])
def test_unbiased_masks_are_not_harmless(rescale: bool) -> None:
    """One coordinate, mask listed: c^2 is lambda^2/(1-q), or lambda^2 (1-q); the mean merge moves by less."""
    lam, drop = 0.6, 0.75
    scale = lam / (1 - drop) if rescale else lam
    exact = math.sqrt((1 - drop) * scale**2)  # the one coordinate is kept with probability 1 - q
    naive = lam if rescale else lam * (1 - drop)
    assert naive <= 0.5 * exact
    runs = (Expert("a", 10, 2, 0.1, 5, L=1.0),)
    merge = Merge(runs, method="dare", coefficients=lam, drop_rate=drop, rescale=rescale)
    assert float(sensitivity(merge)[0]) == pytest.approx(exact)


def test_fisher_sensitivity_is_the_largest_share() -> None:
    """An expert that alone knows a coordinate carries it whole, whatever its mean share is."""
    fisher = np.array([[1.0, 9.0], [1.0, 1.0]])
    shares = fisher_shares(fisher, np.ones(2), floor=0.0)
    change = np.array([0.0, 1.0])
    exact = float(np.linalg.norm(shares[0] * change))
    assert float(shares[0].mean()) < 0.8 * exact
    found = operator("fisher").effect(2, fisher=fisher, floor=0.0).sensitivity
    assert found is not None
    assert float(found[0]) == pytest.approx(exact)


def test_fisher_needs_the_weights_of_the_tasks() -> None:
    """Equal information, p = (0.9, 0.1): without the weights the result is not the minimiser of the joint form."""
    fisher, p, experts = np.ones((2, 1)), np.array([0.9, 0.1]), np.array([0.0, 1.0])

    def joint(x: float) -> float:
        return float(np.sum(p * fisher[:, 0] * (x - experts) ** 2))

    plain, weighted = (float(fisher_shares(fisher, w)[:, 0] @ experts) for w in (np.ones(2), p))
    assert joint(plain) > 2 * joint(weighted)
    assert joint(weighted) == pytest.approx(min(map(joint, np.linspace(0, 1, 1001))))


def test_regmean_weighs_tasks_by_their_sample_count() -> None:
    """Gram sums of 900 and of 100 samples of one distribution: 0.9 and 0.1, not one half each."""
    grams = np.array([900.0, 100.0])[:, None, None] * np.eye(2)
    maps = regmean_maps(grams)
    np.testing.assert_allclose(maps, np.array([0.9, 0.1])[:, None, None] * np.eye(2), atol=1e-12)
    normalised = regmean_maps(grams / np.array([900.0, 100.0])[:, None, None])
    np.testing.assert_allclose(normalised, 0.5 * np.stack([np.eye(2)] * 2), atol=1e-12)
    assert np.abs(maps - normalised).max() > 0.39


def test_power_iteration_gives_a_lower_estimate() -> None:
    """Few steps on a spectrum without gaps: the value is below the norm, the stated upper bound is not."""
    J = np.diag(np.linspace(0.5, 1.0, 50))
    found = local_sensitivity(lambda v: J @ v, lambda u: J.T @ u, 50, iterations=3)
    assert found.value < 0.97 < 1.0 <= found.upper
    assert found.tier == "estimated"


# --- section 11: laws -------------------------------------------------------------------------------------------------


def test_larger_batches_are_not_always_more_stable() -> None:
    """Ten samples, reshuffled: batches of nine leave one sample alone in its batch, batches of five leave none."""
    exact = {b: float(expert_moments(BOWL, [0.0], bowl(10, b, 0.05, 8, sampling="reshuffle")).epsilon) for b in (5, 9)}
    assert exact[9] > 1.2 * exact[5]
    for b, value in exact.items():
        run = with_true_constants(BOWL, [0.0], bowl(10, b, 0.05, 8, sampling="reshuffle"))
        row = master_bound(Merge((run,), **STATED)).experts[0]
        assert value <= float(row.epsilon) * SLACK
