"""Arrays over configurations give, configuration by configuration, what each of them gives alone."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from theory import (
    AssumptionError,
    Expert,
    Merge,
    MergeboundError,
    QuadraticTask,
    Range,
    RecipeError,
    Schedule,
    bound_interval,
    bound_to_python,
    clock,
    expert_epsilon,
    expert_moments,
    head_split,
    l1_gap,
    master_bound,
    merge_moments,
    network_bound,
    pac_bayes_penalty,
)
from theory.generalization import high_probability
from theory.stability import epsilon_recursion
from theory.ties import CONSTANTS


def _cut(expert: Expert, place: int) -> Expert:
    changes: dict[str, object] = {}
    for item in fields(Expert):
        value = getattr(expert, item.name)
        if isinstance(value, Schedule) and value.values.ndim == 2:
            changes[item.name] = Schedule(value.values[place])
        elif isinstance(value, np.ndarray) and value.ndim:
            changes[item.name] = value[place]
    return replace(expert, **changes)


def _alone(merge: Merge, place: int) -> Merge:
    changes: dict[str, object] = {"experts": tuple(_cut(expert, place) for expert in merge.experts)}
    for name in ("weights", "coefficients"):
        value = getattr(merge, name)
        if isinstance(value, np.ndarray) and value.ndim == 2:
            changes[name] = value[:, place]
    if np.ndim(merge.drop_rate):
        changes["drop_rate"] = merge.drop_rate[place]  # type: ignore[index]
    return replace(merge, **changes)  # type: ignore[arg-type]


def _random_merge(rng: np.random.Generator) -> Merge:
    count = int(rng.integers(1, 4))
    size = int(rng.choice([2, 3, count]))

    def some(low: float, high: float) -> float | np.ndarray:
        values = rng.uniform(low, high, size)
        return values if rng.random() < 0.5 else float(values[0])

    experts = []
    for place in range(count):
        smooth = some(0.1, 5.0)
        limit = 2.1 / float(np.max(smooth))
        length = int(rng.integers(1, 9))
        scheduled = rng.random() < 0.5
        rates = rng.random((size, length) if rng.random() < 0.5 else length) * limit
        known = {
            name: some(0.0, 3.0)
            for name in (*("sigma", "sigma0", "D_2", "D_envelope", "base_norm", "initial_risk"), "minimal_risk")
            if rng.random() < 0.6
        }
        if rng.random() < 0.2:
            known |= {"drift": some(0.0, 3.0), "private_drift": some(0.0, 3.0)}
        experts.append(
            Expert(
                f"e{place}",
                n=rng.integers(20, 60, size) if rng.random() < 0.5 else 30,
                batch_size=rng.integers(1, 20, size) if rng.random() < 0.5 else 7,
                steps=None if scheduled else (rng.integers(1, 30, size) if rng.random() < 0.5 else 9),
                learning_rate=Schedule(rates) if scheduled else limit * some(0.1, 1.0),
                L=smooth,
                curvature=str(rng.choice(["convex", "smooth"])),  # type: ignore[arg-type]
                momentum=rng.choice([0.0, 0.5], size) if rng.random() < 0.5 else 0.0,
                weight_decay=rng.choice([0.0, 0.1], size) if rng.random() < 0.5 else 0.0,
                decoupled_decay=bool(rng.random() < 0.5),
                nesterov=bool(rng.random() < 0.5),
                sampling=str(rng.choice(["without_replacement", "with_replacement", "reshuffle"])),  # type: ignore[arg-type]
                head=str(rng.choice(["none", "trained"])),  # type: ignore[arg-type]
                initial_gradient_norm=some(0.0, 3.0),
                training_risk=some(0.0, 1.0),
                D_inf=some(0.0, 3.0),
                D_inf_private=some(0.0, 1.0),
                G=some(0.0, 3.0),
                measured=frozenset(CONSTANTS),  # no common loss
                **known,  # type: ignore[arg-type]
            )
        )
    coefficients = rng.uniform(-0.3, 1.3, (count, size) if rng.random() < 0.4 else count)
    weights = rng.dirichlet(np.ones(count), size).T if rng.random() < 0.4 else rng.dirichlet(np.ones(count))
    if rng.random() < 0.5:
        return Merge(tuple(experts), method="weighted", coefficients=coefficients, weights=weights)
    drop = rng.uniform(0.0, 0.9, size)
    masks = {"rescale": bool(rng.random() < 0.5), "independent_masks": bool(rng.random() < 0.5)}
    return Merge(tuple(experts), method="dare", coefficients=coefficients, weights=weights, drop_rate=drop, **masks)


def test_many_configurations_are_each_alone() -> None:
    rng = np.random.default_rng(5)
    compared = 0
    for _ in range(80):
        merge = _random_merge(rng)
        for name, compute in (("master", lambda m: master_bound(m).value), ("l1", lambda m: l1_gap(m).value)):
            try:
                together = compute(merge)
            except (AssumptionError, RecipeError):
                continue
            for place in range(len(np.atleast_1d(together))):
                try:
                    alone = compute(_alone(merge, place))
                except (AssumptionError, RecipeError):
                    continue
                found = float(np.atleast_1d(together)[place])
                np.testing.assert_allclose(found, float(alone), rtol=1e-9, atol=1e-14, err_msg=name)
                compared += 1
    assert compared > 80


@pytest.mark.parametrize("rescale", [True, False])
def test_one_drop_rate_per_configuration_with_one_coefficient_per_expert(rescale: bool) -> None:
    """Two experts and two drop rates: the axis of experts must not be taken for the axis of configurations."""
    run = dict(n=50, batch_size=10, learning_rate=0.1, steps=20, curvature="convex", L=1.0, G=1.0, B=1.0)
    pair = tuple(Expert(name, sampling="reshuffle", **run) for name in "ab")  # type: ignore[arg-type]
    lam, drops = np.array([0.9, 0.2]), np.array([0.0, 0.75])
    many = Merge(pair, method="dare", coefficients=lam, drop_rate=drops, rescale=rescale)
    kept = 1 - drops
    mean_square = 1 / np.sqrt(kept) if rescale else np.sqrt(kept)
    surely = 1 / kept if rescale else np.ones(2)
    twin = 2 * 0.1 * 20 / 50  # 2 G tau / n
    np.testing.assert_allclose(l1_gap(many).value, 0.5 * lam.sum() * mean_square * twin, rtol=1e-12)
    shift = np.broadcast_to(high_probability(many, 0.1, 0.05).shift, (2,))
    np.testing.assert_allclose(shift, 0.5 * lam.sum() * surely * twin, rtol=1e-12)


def test_recursion_with_a_schedule_common_to_several_smoothnesses() -> None:
    run = dict(n=20, batch_size=4, learning_rate=Schedule(np.array([0.5, 0.3, 0.1])), curvature="smooth")
    high = np.array([0.5, 1.0, 2.0])
    together = epsilon_recursion(Expert("a", L=high, **run), 1.5)  # type: ignore[arg-type]
    alone = [float(epsilon_recursion(Expert("a", L=value, **run), 1.5)) for value in high]  # type: ignore[arg-type]
    np.testing.assert_allclose(together, alone, rtol=1e-14)


def test_recursion_that_overflows_at_the_end_of_a_block_is_infinite() -> None:
    """The value of the step at which an array of runs stops is the one that is returned."""
    rate, factor = 1.0, 2.0
    steps = 256
    base = np.array([1.0, 1.0]) * 2.0 ** (1024 - steps) * 1.0001
    found = epsilon_recursion(
        Expert("a", n=1, batch_size=1, learning_rate=np.array([rate, rate]), steps=steps + 300, L=factor - 1), base
    )
    assert np.all(np.isinf(found))


def test_trained_heads_with_one_momentum_per_configuration() -> None:
    run = dict(n=20, batch_size=4, learning_rate=0.1, steps=5, L=1.0, head="trained", D_inf=1.0, D_inf_private=0.1)
    together = head_split(Expert("a", momentum=np.array([0.5, 0.0, 0.9]), **run))  # type: ignore[arg-type]
    for many, one in zip(together, head_split(Expert("a", **run)), strict=True):  # type: ignore[arg-type]
        np.testing.assert_allclose(many, [np.inf, float(one), np.inf])


def test_the_cap_takes_the_smaller_of_measured_and_bounded_drift_of_everything() -> None:
    """A long private part does not loosen the cap where a bound of Theorem 3 on the whole vector is smaller."""
    run = dict(n=20, batch_size=4, learning_rate=0.1, steps=5, curvature="convex", L=1.0, head="trained")
    known = dict(initial_gradient_norm=1.0, sigma0=1.0, training_risk=0.1)
    plain, cut = (
        master_bound(Merge((Expert("a", **run, **known, **more),))).experts[0].epsilon  # type: ignore[arg-type]
        for more in ({}, {"drift": 0.01, "private_drift": 50.0})
    )
    assert cut <= plain


def test_a_missing_training_risk_is_asked_for_by_name() -> None:
    run = dict(n=20, batch_size=4, learning_rate=0.1, steps=5, L=1.0, initial_gradient_norm=1.0, sigma0=1.0, D_inf=2.0)
    for change in ({"momentum": 0.9}, {"sampling": "reshuffle"}):
        with pytest.raises(AssumptionError, match="training_risk") as refusal:
            master_bound(Merge((Expert("a", **run, **change),)))  # type: ignore[arg-type]
        assert "drift" not in str(refusal.value)


def test_a_measured_base_norm_makes_decoupled_decay_with_momentum_an_estimate() -> None:
    """Drift by 6(b) reads the norm of the base where the decay bypasses the momentum buffer, and only there."""
    run = dict(n=30, batch_size=10, learning_rate=0.1, steps=10, curvature="convex", L=1.0, momentum=0.5)
    known = dict(initial_gradient_norm=1.0, sigma0=1.0, D_inf=2.0, training_risk=0.1, base_norm=2.0)
    claims = dict(shared_samples=False, data_independent_choices=True, per_sample_loss=True)
    for decay, tier in ((0.1, "estimated"), (0.0, "certified")):
        expert = Expert(
            "a",
            weight_decay=decay,
            decoupled_decay=True,
            measured=frozenset({"base_norm"}),
            **run,  # type: ignore[arg-type]
            **known,  # type: ignore[arg-type]
        )
        assert master_bound(Merge((expert,), **claims)).tier == tier  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["task_arithmetic", "weighted", "dare"])
def test_coefficients_per_configuration_meet_two_axes_of_configurations(method: str) -> None:
    """Axes of configurations are aligned at their end, also where both have the same length."""
    rng = np.random.default_rng(3)
    known = {"n": 100, "batch_size": 10, "steps": 20, "curvature": "convex", "L": 1.0, "initial_gradient_norm": 0.4}
    known |= {"sigma": 1.0, "sigma0": 1.0, "D_inf": 2.0, "training_risk": 0.1}
    rates, alpha = rng.uniform(0.01, 0.5, (3, 3)), rng.random((2, 3))

    def merge(rate: Any, coefficients: Any) -> Merge:
        experts = (Expert("a", learning_rate=rate, **known), Expert("b", learning_rate=0.1, **known))
        return Merge(experts, method=method, coefficients=coefficients)  # type: ignore[arg-type]

    together = master_bound(merge(rates, alpha))
    for i in range(3):
        for j in range(3):
            alone = master_bound(merge(float(rates[i, j]), alpha[:, j]))
            assert together.value[i, j] == pytest.approx(float(alone.value), rel=1e-12)


KNOWN: dict[str, Any] = {"n": 100, "batch_size": 10, "learning_rate": 0.1, "steps": 20, "curvature": "convex", "L": 1.0}
KNOWN |= {"initial_gradient_norm": 0.4, "sigma": 0.5, "D_inf": 2.0, "training_risk": 0.1, "G": 1.0}


@pytest.mark.parametrize("independent", [True, False])
def test_what_masks_add_is_no_number_per_expert(independent: bool) -> None:
    """Two experts whose distances differ, two drop rates: the added dispersion belongs to configurations."""
    pair = (Expert("a", **KNOWN), Expert("b", **{**KNOWN, "initial_gradient_norm": 1.0}))
    fixed: dict[str, Any] = {"method": "dare", "coefficients": [0.9, 0.2], "independent_masks": independent}
    drops = np.array([0.0, 0.9])
    together = master_bound(Merge(pair, drop_rate=drops, **fixed)).value
    alone = [float(master_bound(Merge(pair, drop_rate=drop, **fixed)).value) for drop in drops]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_weights_per_configuration_meet_one_displacement_per_expert() -> None:
    pair = (Expert("a", **KNOWN), Expert("b", **{**KNOWN, "n": 20}))
    p = np.array([[0.9, 0.2], [0.1, 0.8]])
    twin = 2 * 0.1 * 20 / np.array([100, 20])  # 2 G tau / n
    np.testing.assert_allclose(l1_gap(Merge(pair, weights=p)).value, 0.5 * twin @ p, rtol=1e-12)


def test_penalty_per_distance_is_not_one_per_expert() -> None:
    together = pac_bayes_penalty([1000, 10], [0.5, 0.5], np.array([0.1, 2.0]), 0.1, 0.05)
    alone = [float(pac_bayes_penalty([1000, 10], [0.5, 0.5], distance, 0.1, 0.05)) for distance in (0.1, 2.0)]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_private_drifts_per_configuration_meet_one_drift_per_expert() -> None:
    risks, shared, private = np.array([0.1, 0.2]), np.array([0.1, 3.0]), np.array([[0.5, 0.0], [1.0, 0.2]])
    together = network_bound(risks, 1.0, shared, private_drift=private, trained_heads=True)
    for place in range(2):
        alone = network_bound(risks, 1.0, shared, private_drift=private[:, place], trained_heads=True)
        assert together.value[place] == pytest.approx(float(alone.value), rel=1e-12)


def test_drop_rates_per_configuration_in_exact_merges() -> None:
    task = QuadraticTask(np.eye(1), np.ones(1), np.eye(1))
    runs = [
        Expert(name, n=10, batch_size=5, learning_rate=rate, steps=3, L=1.0) for name, rate in (("a", 0.1), ("b", 0.9))
    ]
    drops = np.array([0.0, 0.8])
    together = merge_moments([task] * 2, [0.0], runs, [0.9, 0.1], [0.5, 0.5], drop_rate=drops)
    for place, drop in enumerate(drops):
        alone = merge_moments([task] * 2, [0.0], runs, [0.9, 0.1], [0.5, 0.5], drop_rate=drop)
        assert np.asarray(together.risk)[place] == pytest.approx(float(alone.risk), rel=1e-12)


def test_batch_schedules_over_configurations_under_reshuffling() -> None:
    """Passes of 6 + 4 and of 3 + 3 + 4 samples of ten, in one array."""
    sizes = np.array([[6, 4, 6, 4, 6, 4], [3, 3, 4, 3, 3, 4]])
    run: dict[str, Any] = {"n": 10, "learning_rate": 0.1, "curvature": "convex", "L": 1.0, "sampling": "reshuffle"}
    together, _ = expert_epsilon(Expert("a", batch_size=Schedule(sizes), D_inf=1.0, **run))
    alone = [float(expert_epsilon(Expert("a", batch_size=Schedule(one), D_inf=1.0, **run))[0]) for one in sizes]
    np.testing.assert_allclose(together, alone, rtol=1e-12)
    with pytest.raises(RecipeError, match="batch_size schedule exceeds the 9 samples"):
        expert_epsilon(Expert("a", batch_size=Schedule(sizes), D_inf=1.0, **{**run, "n": np.array([10, 9])}))


def test_a_run_without_momentum_keeps_its_clock_among_others() -> None:
    """A measured rate replaces L; the response of momentum, which reads L, does not serve a run that has none."""
    run: dict[str, Any] = {"n": 20, "batch_size": 2, "learning_rate": 0.3, "steps": 9, "curvature": "convex", "L": 1.0}
    together = clock(Expert("a", momentum=np.array([0.0, 0.5]), kappa=0.2, **run)).tau
    alone = [float(clock(Expert("a", momentum=beta, kappa=0.2, **run)).tau) for beta in (0.0, 0.5)]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_pieces_say_inf_where_one_array_does() -> None:
    """More configurations than a piece holds: those that nothing covers are inf, wherever the pieces end."""
    momentum = np.where(np.arange(40_000) < 20_000, 0.0, 0.9)  # no form of the drift covers momentum here
    few = master_bound(Merge((Expert("a", **{**KNOWN, "momentum": momentum[[0, -1]]}), Expert("b", **KNOWN)))).value
    many = master_bound(Merge((Expert("a", **{**KNOWN, "momentum": momentum}), Expert("b", **KNOWN)))).value
    assert np.isfinite(few[0])
    assert np.isinf(few[1])
    np.testing.assert_array_equal(many, np.where(momentum == 0, few[0], np.inf))
    with pytest.raises(RecipeError, match="no bound on the drift") as refusal:
        master_bound(Merge((Expert("a", **{**KNOWN, "momentum": np.full(40_000, 0.9)}), Expert("b", **KNOWN))))
    assert "'a'" in str(refusal.value)


@pytest.mark.parametrize(
    "field", ["weights", "coefficients", "drop_rate", "dispersion", "sensitivity", "learning_rate"]
)
def test_searches_and_elasticities_take_one_recipe(field: str) -> None:
    """Configurations would be paired with the points of the search; they are refused by the name of their field."""
    rows = np.array([[0.5, 0.4], [0.5, 0.6]])
    changes: dict[str, dict[str, Any]] = {
        "weights": {"weights": rows},
        "coefficients": {"method": "weighted", "coefficients": rows},
        "drop_rate": {"method": "dare", "coefficients": 0.5, "drop_rate": np.array([0.1, 0.2])},
        "dispersion": {"dispersion": np.array([0.1, 0.2])},
        "sensitivity": {"dispersion": 0.1, "sensitivity": rows},
        "learning_rate": {},
    }
    run = {**KNOWN, "learning_rate": np.array([0.1, 0.2])} if field == "learning_rate" else KNOWN
    merge = Merge((Expert("a", **run), Expert("b", **KNOWN)), **changes[field])
    with pytest.raises(MergeboundError, match=f"{field} is an array"):
        master_bound(merge).elasticity("steps")
    with pytest.raises(MergeboundError, match=f"{field} is an array"):
        bound_to_python(master_bound(merge))
    with pytest.raises(RecipeError, match=f"{field} is an array"):
        bound_interval(merge, {"a.steps": Range(10, 30)})


def test_decays_per_configuration_outside_the_buffer_in_exact_moments() -> None:
    task = QuadraticTask(np.eye(2), np.ones(2), np.eye(2))
    run: dict[str, Any] = {"n": 10, "batch_size": 5, "learning_rate": 0.1, "steps": 3, "L": 1.0, "momentum": 0.5}
    together = expert_moments(
        task, [0.0, 1.0], Expert("a", weight_decay=np.array([0.0, 0.3]), decoupled_decay=True, **run)
    )
    for place, decay in enumerate((0.0, 0.3)):
        alone = expert_moments(task, [0.0, 1.0], Expert("a", weight_decay=decay, decoupled_decay=True, **run))
        assert np.asarray(together.risk)[place] == pytest.approx(float(alone.risk), rel=1e-12)
