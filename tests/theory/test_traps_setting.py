"""Traps of sections 1 to 3 (setting, Lemma 1, Theorem 1): the naive formula fails on an instance, ours holds there.

The table of all traps, and of the tests of other files, is docs/theory-traps.md.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest

from theory import (
    AssumptionError,
    Expert,
    Merge,
    RecipeError,
    clock,
    directional_risk,
    head_split,
    high_probability,
    l1_gap,
    layered_risk,
    local_sensitivity,
    master_bound,
    moved_risk,
    network_bound,
    operator,
    task_stability,
    theorem_1,
)
from theory.clocks import step_excess
from theory.generalization import twin_reach
from theory.lemma import curvature_on_segment
from theory.operators import operator_assumptions

STATED: dict[str, Any] = dict(shared_samples=False, data_independent_choices=True, per_sample_loss=True)
SLACK = 1 + 1e-9


# --- section 1: assumptions -------------------------------------------------------------------------------------------


def test_sum_of_sensitivities_needs_equal_sample_sizes() -> None:
    """A1: expert 2 reads one of its four samples, and that one is all that task 1 has.

    Averaged over its own four samples expert 2 looks stable; the one that task 1 shares with it moves it fully.
    """
    spread = 1.0  # of a sample; f = (x - z)^2/2
    epsilon = np.array([0.0, np.sqrt(2 * spread**2 / 4)])  # x_2 = z_1: one of four samples moves it by sqrt(2)
    alpha, n = np.array([0.0, 1.0]), np.array([1.0, 4.0])
    exact_gap = spread**2  # task 1: F_S(M) = 0 because M is its only sample, F(M) = E (z - z')^2/2
    exact_movement = 2 * spread**2
    naive = float((alpha @ epsilon) ** 2)  # (sum c_l eps_l)^2
    assert naive < 0.3 * exact_movement
    assert float(theorem_1(0.0, [1.0], [1.0], [naive])) < 0.3 * exact_gap
    ours = task_stability(alpha, epsilon, shared_samples=True, samples=n)
    assert float(ours[0]) == pytest.approx(exact_movement)
    assert float(theorem_1(0.0, [1.0], [1.0], ours[:1])) == pytest.approx(exact_gap)


def test_coefficients_chosen_on_the_training_samples_are_refused() -> None:
    """A2: two fixed models, which no sample moves; the one that fits the only training sample is taken."""
    models, samples = np.array([-1.0, 1.0]), np.array([-1.0, 1.0])
    chosen = np.array([models[np.argmin((models - z) ** 2)] for z in samples])
    training = float(np.mean((chosen - samples) ** 2 / 2))
    risk = float(np.mean((chosen[:, None] - samples[None, :]) ** 2 / 2))
    naive = float(theorem_1(training, [1.0], [1.0], task_stability([1.0], [0.0])))  # eps = 0: nothing was trained
    assert naive == 0.0 < risk == 1.0
    run = Expert("a", 1, 1, 0.1, 1, curvature="convex", L=1.0, epsilon=0.0, drift=1.0, training_risk=0.0)
    broken = Merge((run,), data_independent_choices=False)
    for ask in (master_bound, l1_gap):
        with pytest.raises(AssumptionError, match="data_independent_choices"):
            ask(broken)


def test_a_loss_that_depends_on_the_batch_is_refused() -> None:
    """A3: inputs divided by the root mean square of the batch, as in train-mode BatchNorm; one full-batch step.

    One exchanged sample changes what all others say: the mean of n equal inputs drops to almost nothing.
    """
    n, eta = 100, 0.1
    data = np.full(n, 1e-3)
    twin = data.copy()
    twin[-1] = -1.0

    def after_one_step(z: np.ndarray) -> float:
        return float(eta * np.mean(z / np.sqrt(np.mean(z**2))))  # linear loss: minus the normalised input

    exact = abs(after_one_step(data) - after_one_step(twin))
    own = abs(data[-1] / np.sqrt(np.mean(data**2)) - twin[-1] / np.sqrt(np.mean(twin**2)))  # gap of the exchanged one
    run = Expert("a", n, n, eta, 1, curvature="convex", L=1.0, D_inf=own, drift=1.0, training_risk=0.1)
    naive = own * float(clock(run).tau) / n  # Theorem 2, full batch
    assert naive < 0.15 * exact
    with pytest.raises(AssumptionError, match="per_sample_loss"):
        master_bound(Merge((run,), per_sample_loss=False))


def test_population_smoothness_is_not_per_sample_smoothness_in_theorem_1() -> None:
    """f = (1 - cos w(x - z))/2 with z = 0 or pi/w: the population risk is flat, one step reaches the only sample."""
    w = 2.0

    def loss(x: Any, z: Any) -> Any:
        return (1 - np.cos(w * (x - z))) / 2

    samples, base = np.array([0.0, np.pi / w]), np.pi / (2 * w)
    eta = base / (w / 2)
    ends = base - eta * w / 2 * np.sin(w * (base - samples))
    np.testing.assert_allclose(ends, samples, atol=1e-12)
    training = float(np.mean(loss(ends, samples)))
    risk = float(np.mean([loss(x, z) for x, z in product(ends, samples)]))
    moved = float(np.mean((ends[:, None] - ends[None, :]) ** 2))
    naive_L = 0.0  # the population risk is 1/2 everywhere
    naive = float(theorem_1(training, [1.0], [naive_L], [moved]))
    assert naive < 1e-12 < risk == pytest.approx(0.5)
    assert risk <= float(theorem_1(training, [1.0], [w**2 / 2], [moved]))


def test_population_smoothness_is_not_per_sample_smoothness_in_the_clock() -> None:
    """f = s h x^2/2 with s = -1 or 1 equally often: F is flat, and a kick still grows in mean square."""
    eta, h, steps = 0.5, 2.0, 8
    responses = [eta * math.prod(1 - eta * h * s for s in signs) for signs in product((-1, 1), repeat=steps - 1)]
    exact = float(np.sqrt(np.mean(np.square(responses))))  # rms response of the last iterate to a kick at step 0
    naive = eta  # the clock of a flat risk
    assert naive < 0.2 * exact
    run = Expert("a", 2, 1, eta, steps, curvature="smooth", L=h)
    ours = eta * (1 + float(step_excess(run, eta))) ** (steps - 1)
    assert max(np.abs(responses)) <= ours * SLACK
    assert exact <= float(clock(run).tau)


@pytest.mark.parametrize(
    ("case", "fields", "naive", "mode"),
    [
        # naive kappa, used outside its range of step sizes; the mode h that shows it
        ("convex beyond 2/L", dict(curvature="convex", learning_rate=2.5), 0.0, 1.0),
        ("strongly convex beyond 2/(L+mu)", dict(curvature="strongly_convex", mu=0.5, learning_rate=1.9), -0.5, 1.0),
        ("decay beyond 2/(L+2 omega)", dict(curvature="convex", weight_decay=0.5, learning_rate=1.25), -0.5, 1.0),
        ("smooth, eta omega > 1", dict(curvature="smooth", weight_decay=3.0, learning_rate=0.8), 1.0 - 3.0, 1.0),
        ("smooth read as convex", dict(curvature="smooth", learning_rate=0.5), 0.0, -1.0),
        ("contracting by L + omega", dict(curvature="convex", weight_decay=0.1, learning_rate=0.5), -1.1, 0.0),
    ],
)
def test_one_step_factor_outside_its_range(case: str, fields: dict[str, Any], naive: float, mode: float) -> None:
    """A quadratic mode h separates by |1 - eta (h + omega)| per step; the rate kappa of the wrong range is below it."""
    eta, omega = fields["learning_rate"], fields.get("weight_decay", 0.0)
    exact = abs(1 - eta * (mode + omega))
    assert abs(1 + eta * naive) < exact - 0.05, case
    run = Expert("a", 10, 2, steps=5, L=1.0, **fields)
    assert exact <= (1 + float(step_excess(run, eta))) * SLACK
    assert eta * exact**4 <= float(clock(run).tau) * SLACK  # response of the last iterate to the first of five kicks


def test_curvature_measured_at_a_point_is_only_an_estimate() -> None:
    """1 - cos at its inflection has no curvature: L measured there says that a risk of 1/2 never rises."""
    start, L_there, L = 0.5, abs(0.5 * np.cos(np.pi / 2)), 0.5  # f = (1 - cos x)/2 at pi/2
    truth = (1 - np.cos(np.pi)) / 2
    assert float(moved_risk(start, L_there, np.pi / 2)) < truth - 0.4
    assert truth <= float(moved_risk(start, L, np.pi / 2))
    known = dict(n=100, batch_size=10, learning_rate=0.1, steps=5, curvature="convex", D_inf=1.0, training_risk=0.1)
    known |= dict(initial_gradient_norm=0.5, sigma=0.5)
    measured = Expert("a", L=1.0, measured=frozenset({"L"}), **known)  # type: ignore[arg-type]
    bound = master_bound(Merge((measured,), **STATED))
    assert (bound.tier, bound.measured) == ("estimated", ("a: L",))
    assert next(item.verdict for item in bound.assumptions if item.name == "A4") == "unknown"
    assert master_bound(Merge((Expert("a", L=1.0, **known),), **STATED)).tier == "certified"  # type: ignore[arg-type]
    network = network_bound(
        [0.1], 2.0, [1.0], shared_samples=False, data_independent_choices=True, per_sample_loss=True
    )
    assert network.tier == "estimated"  # whatever is claimed


def test_adaptive_steps_are_not_covered() -> None:
    """Adam's first step has length eta however small the gradient is; the clock of SGD prices it by the gradient."""
    eta, tiny = 1e-3, 1e-8
    gradients = np.array([tiny, -tiny])  # of the only sample and of its twin
    first_step = -eta * gradients / np.sqrt(gradients**2)  # m/sqrt(v), both corrected for their bias
    exact = abs(first_step[0] - first_step[1])
    sgd = Expert("a", 1, 1, eta, 1, curvature="convex", L=1.0)
    naive = 2 * tiny * float(clock(sgd).tau)
    assert naive < 1e-6 * exact
    with pytest.raises(AssumptionError, match="adamw"):
        clock(Expert("a", 1, 1, eta, 1, curvature="convex", L=1.0, optimizer="adamw"))


def test_clipped_gradients_are_not_covered() -> None:
    """f = x'Hx/2 is convex, eta L = 1, and clipped steps separate: projection and Hessian do not commute."""
    H = np.array([[1.0, 0.0], [0.0, 0.01]])

    def step(x: np.ndarray, eta: float = 1.0, radius: float = 0.01) -> np.ndarray:
        g = H @ x
        return x - eta * g * min(1.0, radius / float(np.linalg.norm(g)))

    x = np.array([0.01, 1.0])  # gradient (0.01, 0.01): both directions count alike
    direction = np.linalg.svd(np.eye(2) - 1.0 * 0.01 / (0.01 * np.sqrt(2)) * np.array([[0.5, -0.5], [-0.5, 0.5]]) @ H)[
        2
    ][0]
    y = x + 1e-6 * direction
    ratio = float(np.linalg.norm(step(x) - step(y)) / np.linalg.norm(x - y))
    naive = 1.0  # convex, eta <= 2/L: two runs on the same batch do not separate
    assert ratio > naive + 0.01
    with pytest.raises(AssumptionError, match="gradient_clipping"):
        clock(Expert("a", 10, 2, 0.1, 5, curvature="convex", L=1.0, gradient_clipping=True))


def test_blocks_of_a_trained_head_are_coupled() -> None:
    """Shared and private parameter of f = (x + y - z)^2/2: the head moves the shared part at the second step."""
    eta, steps = 0.4, 6
    H = np.ones((2, 2))
    kick = np.array([0.0, 1.0])  # the exchanged sample's gradients differ in the head alone, say at step 0
    moved = np.linalg.matrix_power(np.eye(2) - eta * H, steps - 1) @ (eta * kick)
    naive = 0.0  # two recursions without L_sp: what happens in the head stays there
    assert naive < abs(moved[0])
    run = Expert("a", 1, 1, eta, steps, curvature="convex", L=2.0, head="trained", D_inf_shared=0.0, D_inf_private=1.0)
    shared, private = head_split(run)  # cross smoothness (L - m)/2 = 1 unless a smaller one is given
    assert abs(moved[0]) <= float(shared) * SLACK
    assert abs(moved[1]) <= float(private) * SLACK


# --- section 2: Lemma 1 -----------------------------------------------------------------------------------------------


def test_lemma_1_needs_a_nonnegative_function() -> None:
    """f = (x^2 - 1)/2 is zero at 1 and rises at once; shifted to be nonnegative, the lemma holds with equality."""
    truth = (2.0**2 - 1) / 2
    assert float(moved_risk(0.0, 1.0, 1.0)) < 0.5 * truth
    assert float(moved_risk(0.0 + 0.5, 1.0, 1.0)) == pytest.approx(truth + 0.5)
    with pytest.raises(RecipeError, match="risk"):
        moved_risk(-0.5, 1.0, 1.0)  # its value at 0


def test_directional_curvature_already_contains_the_length() -> None:
    """f = x^2/2 from 0 to u = 0.1: A = u'Hu = 0.01; times the squared length again it is too small."""
    u = 0.1
    truth, A = u**2 / 2, u**2
    assert float(directional_risk(0.0, A * u**2)) < 0.1 * truth
    assert float(directional_risk(0.0, A)) == pytest.approx(truth)


def test_zero_over_zero_is_zero_at_a_minimum() -> None:
    """At a minimum of value 0 the slope is 0 too: the literal quotient is no number, the lemma reads 0."""
    slope, value = np.float64(0.0), np.float64(0.0)
    with np.errstate(invalid="ignore"):
        assert np.isnan(slope**2 / (2 * value))
    assert float(curvature_on_segment(1.0, slope, value)) == 1.0
    assert float(directional_risk(value, curvature_on_segment(1.0, slope, value))) == pytest.approx(0.5)


def test_upward_curvature_is_not_offset_by_downward_curvature() -> None:
    """phi = 1 - cos(pi t): on [0, 1] the curvature has mean zero, yet the risk rises from 0 to 2."""
    truth, start = 2.0, 0.0
    bends = np.pi**2 * np.cos(np.pi * np.linspace(0, 1, 1001))
    assert float(directional_risk(start, max(float(bends.mean()), 0.0))) < 1e-3 < truth
    assert truth <= float(directional_risk(start, curvature_on_segment(bends.max(), 0.0, start)))


def test_layers_add_before_they_are_squared() -> None:
    """f = (x + y)^2/2 from 0 by (1, 1): the blocks have curvature 1 each; the root of their sum of squares is short."""
    truth = 2.0
    naive = (np.sqrt(0.0) + np.sqrt(0.5 * 1.0 + 0.5 * 1.0)) ** 2
    assert naive == pytest.approx(0.5 * truth)
    assert float(layered_risk(0.0, [1.0, 1.0], [1.0, 1.0])) == pytest.approx(truth)


# --- section 3: Theorem 1 ---------------------------------------------------------------------------------------------


def test_mean_smoothness_is_not_enough_where_tasks_differ() -> None:
    """The stiff task is the one whose sample moves the merge: sum p_i L_i E_i, not mean L times mean E."""
    L, p = np.array([10.0, 0.05]), np.array([0.5, 0.5])
    # one sample each, z = -1 or 1; the merge is the sample of task 1
    training = p[0] * 0.0 + p[1] * L[1] / 2 * 2.0
    risk = p[0] * L[0] / 2 * 2.0 + p[1] * L[1] / 2 * 2.0
    moved = np.array([2.0, 0.0])
    naive = (np.sqrt(training) + np.sqrt(p @ L / 2 * (p @ moved))) ** 2
    assert naive < 0.7 * risk
    assert risk <= float(theorem_1(training, p, L, moved))


def one_step(count: int, **fields: Any) -> Merge:
    """f = 1 - z x on [-1, 1] with z = -1 or 1, one step from 0 on the only sample: x = eta z, gap eta."""
    run = dict(n=1, batch_size=1, learning_rate=0.1, steps=1, curvature="convex", L=1.0, G=1.0, B=2.0)
    return Merge(tuple(Expert(f"e{i}", **{**run, **fields}) for i in range(count)), **STATED)  # type: ignore[arg-type]


def test_the_l1_form_does_not_divide_a_trained_head() -> None:
    """All that was trained is the head: averaging four experts leaves every task's own gap as it is."""
    gap = float(np.mean([1 - z * 0.1 * y - (1 - y * 0.1 * y) for z, y in product((-1, 1), repeat=2)]))
    assert gap == pytest.approx(0.1)
    merge = one_step(4, head="trained")
    naive = float(l1_gap(one_step(4)).value)  # c = 1/4 on everything
    assert naive < gap
    assert gap <= float(l1_gap(merge).value)


def test_the_deviation_counts_the_sample_in_the_training_risk() -> None:
    """Nothing is trained and nothing moves, and F - F_S still fluctuates by p B/n per sample."""
    frozen = one_step(1, learning_rate=1e-12)
    found = high_probability(frozen, 0.0, 0.4)
    gaps = np.array([1.0 - (1 - z * 0.9) for z in (-1, 1)])  # the fixed model x = 0.9: F = 1, F_S = 1 - 0.9 z
    naive = math.sqrt(0.5 * math.log(1 / 0.4) * (2 * float(found.reach[0])) ** 2) + float(found.shift)
    assert np.mean(gaps > naive) == 0.5 > 0.4
    assert np.mean(gaps > float(found.shift + found.deviation)) <= 0.4


def test_a_sample_of_a_light_task_can_move_the_others() -> None:
    """The merge is expert 1, whose task weighs 0.01: its sample acts on the joint risk through task 2."""
    run = dict(n=1, batch_size=1, learning_rate=0.1, steps=1, curvature="convex", L=1.0, G=1.0, B=2.0)
    pair = tuple(Expert(name, sampling="reshuffle", **run) for name in "ab")  # type: ignore[arg-type]
    p = np.array([0.01, 0.99])

    def gap(first: float, second: float) -> float:
        """F(M) - F_S(M) with f = 1 - z x and M = 0.1 z_1: the joint risk is 1 everywhere."""
        return float(1 - p @ (1 - np.array([first, second]) * 0.1 * first))

    exact = max(abs(gap(1, z) - gap(-1, z)) for z in (-1, 1))
    found = high_probability(Merge(pair, method="weighted", weights=p, coefficients=[1.0, 0.0], **STATED), 0.0, 0.1)
    s = float(found.reach[0])
    naive, ours = 2 * 0.01 * s + 0.01 * 2, 2 * 1.0 * s + 0.01 * 2  # p_i G_i in place of G = sum p_t G_t
    assert naive < 0.2 * exact
    assert exact <= ours
    spread = ours**2 + (0.99 * 2) ** 2  # the second task's sample moves nothing
    assert float(found.deviation) == pytest.approx(math.sqrt(0.5 * math.log(10) * spread))


@pytest.mark.parametrize("sampling", ["without_replacement", "with_replacement"])
def test_twins_of_independent_batches_can_be_pushed_at_every_step(sampling: Any) -> None:
    """One push per epoch is what reshuffling guarantees; independent batches may draw the sample again and again."""
    run = Expert("a", 4, 2, 0.1, 6, sampling=sampling, curvature="convex", L=1.0, D_inf=2.0)
    largest = 1.0 if sampling == "with_replacement" else 0.5  # multiplicity over b, when the sample is drawn
    exact = 6 * 0.1 * largest * 2.0  # linear losses of slope -1 and 1, the sample in every batch
    naive = float(twin_reach(Expert("a", 4, 2, 0.1, 6, sampling="reshuffle", curvature="convex", L=1.0, D_inf=2.0)))
    assert naive <= 0.5 * exact
    assert exact <= float(twin_reach(run)) * SLACK


# --- sections 1 and 10: A2 is not enough -----------------------------------------------------------------------------


def test_coefficients_found_through_the_experts_are_not_constants() -> None:
    """One expert x in the plane, scaled to come closest to a target on other data: M = (x't) x / |x|^2.

    A2 holds to the letter (the target is independent of the samples).  With x at a right angle to the target the
    coefficient is 0, so the frozen sensitivity is 0; a turn of x moves M by |t|/|x| per unit.
    """
    x, target = np.array([0.1, 0.0]), np.array([0.0, 1.0])

    def merge(v: np.ndarray) -> np.ndarray:
        return np.asarray((v @ target) / (v @ v) * v)

    frozen = abs(float(x @ target) / float(x @ x))
    step = 1e-6
    jacobian = np.stack([(merge(x + step * e) - merge(x - step * e)) / (2 * step) for e in np.eye(2)], axis=1)
    exact = float(np.linalg.norm(jacobian, 2))
    assert frozen == 0.0 < 9.9 < exact
    found = local_sensitivity(lambda v: jacobian @ v, lambda u: jacobian.T @ u, 2)
    assert found.value == pytest.approx(exact)
    assert found.tier == "estimated"
    pair = tuple(Expert(name, 10, 2, 0.1, 5, L=1.0) for name in "ab")
    for method in ("risk_optimal", "curvature_optimal", "adamerging", "fisher", "regmean"):
        known = dict(coefficients=[0.5, 0.5]) if method not in ("fisher", "regmean") else {}
        doubts = operator_assumptions(Merge(pair, method=method, **known))  # type: ignore[arg-type]
        assert [item.verdict for item in doubts] == ["unknown"], method


def test_fisher_shares_move_with_the_experts() -> None:
    """Logistic curvature p(1 - p) as information, taken at each expert: c_i is not the frozen share."""

    def information(x: float) -> float:
        return math.exp(-x) / (1 + math.exp(-x)) ** 2

    def merge(a: float, b: float) -> float:
        return (information(a) * a + information(b) * b) / (information(a) + information(b))

    a, b, step = 0.0, 6.0, 1e-5
    exact = abs(merge(a, b + step) - merge(a, b - step)) / (2 * step)
    frozen = operator("fisher").effect(2, fisher=np.array([[information(a)], [information(b)]]), floor=0.0)
    assert frozen.sensitivity is not None
    share = information(b) / (information(a) + information(b))
    assert float(frozen.sensitivity[1]) == pytest.approx(share)
    assert share < 0.3 * exact
    assert frozen.tier == "estimated"  # the assumption that statistics are constants is not granted
    assert [item.verdict for item in frozen.assumptions] == ["unknown"]


def test_regmean_statistics_move_with_the_experts() -> None:
    """Two layers: the first weight decides the input energy of the second, hence its share."""
    first, second = np.array([1.0, 1.0]), np.array([1.0, -1.0])

    def merged(w: np.ndarray) -> float:
        return float((w**2 @ second) / (w**2).sum())

    step, change = 1e-6, np.array([1e-6, 0.0])
    exact = abs(merged(first + change) - merged(first - change)) / (2 * step)
    naive = 0.0  # with frozen Gram matrices the second layer of M does not depend on anyone's first layer
    assert naive < 0.9 < exact
    frozen = operator("regmean").effect(2, grams=(first**2)[:, None, None])
    assert frozen.tier == "estimated"
    assert [item.verdict for item in frozen.assumptions] == ["unknown"]
