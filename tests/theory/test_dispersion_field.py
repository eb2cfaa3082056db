"""What a bound calls V is a bound on the dispersion; the number behind its second term is not, and has another name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from quadratic_recipes import random_problem

from theory import Expert, Merge, master_bound, merge_moments, network_bound

SLACK = 1 + 1e-9
STATED = {"shared_samples": False, "data_independent_choices": True, "per_sample_loss": True}


def test_V_bounds_the_exact_dispersion_and_the_effective_one_need_not() -> None:
    below = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        problem = random_problem(seed, size=int(rng.integers(2, 5)))
        size = len(problem.experts)
        p = rng.dirichlet(np.ones(size) * 0.5)
        p /= p.sum()
        alpha = rng.uniform(-0.1, 1.0, size)
        merge = Merge(problem.experts, method="weighted", weights=p, coefficients=alpha, **STATED)  # type: ignore[arg-type]
        exact = merge_moments(problem.tasks, problem.base, problem.experts, alpha, p)
        bound = master_bound(merge)
        assert float(bound.V) * SLACK >= exact.V
        largest = max(float(np.asarray(item.L)) for item in problem.experts)
        assert float(bound.terms[1].value) == pytest.approx(np.sqrt(largest / 2 * float(bound.effective_V)), rel=1e-9)
        below += float(bound.effective_V) * SLACK < exact.V
    assert below > 0  # the trap: citing the effective number as the dispersion would be wrong


def known(name: str, **changes: object) -> Expert:
    run: dict[str, object] = dict(n=100, batch_size=10, learning_rate=0.05, steps=20, curvature="convex", L=1.0)
    run |= dict(initial_gradient_norm=0.5, sigma=1.0, D_inf=2.0, training_risk=0.1)
    return Expert(name, **(run | changes))  # type: ignore[arg-type]


def test_one_smoothness_and_measured_dispersion_leave_nothing_between_the_two() -> None:
    pair = (known("a", training_risk=0.0), known("b", training_risk=0.0))
    bound = master_bound(Merge(pair, dispersion=0.7, **STATED))  # type: ignore[arg-type]
    assert float(bound.V) == float(bound.effective_V) == 0.7
    assert bound.dispersion_form == "given (checkpoints)"
    network = network_bound([0.1, 0.2], 1.0, [1.0, 2.0], dispersion=0.3, held_out=True)
    assert float(network.V) == float(network.effective_V) == 0.3


def test_V_by_hand_where_smoothness_differs() -> None:
    """Average of two drifts measured as 1 and 3: V = mean of squares, whatever the smoothness of the tasks."""
    network = network_bound([0.0, 0.0], [10.0, 0.1], [1.0, 3.0], held_out=True)
    assert float(network.V) == pytest.approx(4.0)  # triangle: every ||M - x_j|| <= (1 + 3)/2
    assert float(network.effective_V) < 4.0


def test_arrays_give_what_each_configuration_gives() -> None:
    steps = np.array([5, 20, 80])
    pair = (known("a", steps=steps), known("b", L=0.2, training_risk=0.3))
    together = master_bound(Merge(pair, **STATED))  # type: ignore[arg-type]
    for index, count in enumerate(steps):
        alone = master_bound(Merge((replace(pair[0], steps=int(count)), pair[1]), **STATED))  # type: ignore[arg-type]
        assert np.broadcast_to(together.V, (3,))[index] == pytest.approx(float(alone.V))
        assert np.broadcast_to(together.effective_V, (3,))[index] == pytest.approx(float(alone.effective_V))


def test_orthogonality_is_listed_whenever_it_is_used() -> None:
    """Also where the anchors are taken task by task, whose distances use it."""
    pair = tuple(known(name, training_risk=0.05 + 0.4 * (name == "b")) for name in "ab")
    bound = master_bound(Merge(pair, orthogonal_task_vectors=True, **STATED))  # type: ignore[arg-type]
    without = master_bound(Merge(pair, **STATED))  # type: ignore[arg-type]
    assert bound.dispersion_form == "task by task"
    assert float(bound.value) < float(without.value)
    assert any("orthogonal" in item.statement for item in bound.assumptions)
    assert not any("orthogonal" in item.statement for item in without.assumptions)
