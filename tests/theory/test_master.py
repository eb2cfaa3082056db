"""The optimisation side task by task, base anchors, per-task smoothness, and bounds in pieces."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic_recipes import random_problem

from theory import Expert, Merge, RecipeError, Schedule, master_bound, merge_moments, network_bound
from theory import chunks as pieces
from theory.master import assemble_master, optimization_side, sharpest_side
from theory.symbolic import times

STATED = dict(shared_samples=False, data_independent_choices=True, per_sample_loss=True)
SLACK = 1 + 1e-8


def expert(name: str, **changes: object) -> Expert:
    known: dict[str, object] = dict(
        n=200,
        batch_size=20,
        learning_rate=0.1,
        steps=50,
        curvature="convex",
        L=1.0,
        initial_gradient_norm=0.5,
        sigma=1.0,
        sigma0=1.0,
        D_inf=2.0,
        training_risk=0.05,
    )
    known.update(changes)
    return Expert(name, **known)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_sharpest_aggregation_is_valid_and_never_above_minkowski(seed: int) -> None:
    """Literal points and literal L-smooth quadratics: Theorem 4 with the best anchor per task."""
    rng = np.random.default_rng(seed)
    N, dim = int(rng.integers(1, 6)), 3
    L, p = np.exp(rng.uniform(-2, 2, N)), rng.dirichlet(np.ones(N))
    centres, base, points = rng.standard_normal((N, dim)), rng.standard_normal(dim), rng.standard_normal((N, dim))
    merged = base + rng.uniform(-0.5, 1.5, N) @ (points - base) / N
    values = np.array(
        [
            [l / 2 * np.sum((x - c) ** 2) for x in (merged, xj, base)]
            for l, c, xj in zip(L, centres, points, strict=True)
        ]
    )
    truth = np.sqrt(p @ values[:, 0])
    moved = np.sum((merged - points) ** 2, axis=1)
    near = np.sum((merged - base) ** 2)
    one, _, none = sharpest_side(values[:, 1], p, L, moved)
    both, anchors, from_base = sharpest_side(values[:, 1], p, L, moved, values[:, 2], near)
    assert truth <= both * SLACK
    assert both <= one * SLACK
    assert one <= (np.sqrt(p @ values[:, 1]) + np.sqrt(p @ (L / 2 * moved))) * SLACK
    assert not none.any()
    chosen = np.where(from_base, values[:, 2], values[:, 1])
    assert float(anchors) == pytest.approx(float(np.sqrt(p @ chosen)))
    # directional: exact curvatures along the segment in place of L and distances
    bends = np.array([2 * (l / 2) * m for l, m in zip(L, moved, strict=True)])
    directional, _, _ = sharpest_side(values[:, 1], p, 1.0, bends)
    assert float(directional) == pytest.approx(float(one))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_bounds_with_base_anchors_and_unequal_smoothness(seed: int) -> None:
    """exact <= bound when tasks differ much in L and p, for small coefficients, where the base is the nearer anchor."""
    rng = np.random.default_rng(seed)
    problem = random_problem(seed, size=int(rng.integers(2, 5)))
    size = len(problem.experts)
    p = rng.dirichlet(np.ones(size) * 0.5)
    p /= p.sum()
    alpha = rng.uniform(-0.1, 0.3, size)
    merge = Merge(problem.experts, method="weighted", weights=p, coefficients=alpha, **STATED)  # type: ignore[arg-type]
    exact = merge_moments(problem.tasks, problem.base, problem.experts, alpha, p)
    bound = master_bound(merge)
    assert bound.tier == "certified"
    assert exact.risk <= float(bound.value) * SLACK
    without = replace(merge, experts=tuple(replace(item, initial_risk=None) for item in problem.experts))
    with suppress(RecipeError):  # the drift may need the base risk
        assert float(bound.value) <= float(master_bound(without).value) * SLACK


def test_base_side_wins_for_small_coefficients() -> None:
    """lambda -> 0 keeps the base: the bound tends to the base's risk, not to drift squared."""
    pair = tuple(expert(name, initial_risk=0.3, sigma=None, sigma0=0.5) for name in "ab")
    bound = master_bound(Merge(pair, method="task_arithmetic", coefficients=1e-6, **STATED))
    assert bound.dispersion_form == "task by task, base anchors"
    assert float(bound.value) == pytest.approx(0.3, rel=1e-3)
    far = master_bound(Merge(pair, method="task_arithmetic", coefficients=0.9, **STATED))
    assert "base" not in far.dispersion_form
    measured = tuple(replace(item, measured=frozenset({"initial_risk"})) for item in pair)
    lowered = master_bound(Merge(measured, method="task_arithmetic", coefficients=1e-6, **STATED))
    assert lowered.tier == "estimated"
    assert "a: initial_risk" in lowered.measured
    assert master_bound(Merge(measured, method="task_arithmetic", coefficients=0.9, **STATED)).tier == "certified"
    trained = tuple(replace(item, head="trained") for item in pair)  # F_j(x_0) would need the final heads
    heads = master_bound(Merge(trained, method="task_arithmetic", coefficients=1e-6, **STATED))
    assert "base" not in heads.dispersion_form
    network = network_bound(
        [0.1, 0.1], 2.0, [1.0, 1.0], method="task_arithmetic", coefficients=1e-9, base_risks=[0.3] * 2, held_out=True
    )
    assert float(network.value) == pytest.approx(0.3, rel=1e-6)
    assert "base risks" in network.measured


def test_weighting_by_p_and_L_helps_where_the_stiff_task_is_rare() -> None:
    d, p, L = np.array([0.1, 3.0]), np.array([0.05, 0.95]), np.array([50.0, 0.1])
    risks = np.array([0.1, 0.1])
    side = optimization_side(risks, p, L, d, p, np.zeros(()), False)
    naive = np.sqrt(0.1) + np.sqrt(50 / 2 * float(p @ d**2))
    assert float(side.training + side.dispersion) < 0.5 * naive
    assert float(side.dispersion) ** 2 == pytest.approx(50 / 2 * float(side.effective_V))


def test_pieces_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    shape = (7, 5)
    recipes = (
        expert("a", learning_rate=rng.uniform(0.01, 2.5, shape), D_2=1.5, initial_risk=0.7 + rng.random((7, 1))),
        expert(
            "b",
            n=rng.integers(50, 90, (1, 5)),
            momentum=rng.choice([0.0, 0.5], (7, 1)),
            weight_decay=0.1,
            base_norm=1.0,
        ),
        expert("c", learning_rate=Schedule(rng.random((7, 1, 9))), steps=None, sampling="reshuffle"),
    )
    weights = rng.dirichlet(np.ones(3), (7, 1)).transpose(2, 0, 1)
    merge = Merge(
        recipes,
        method="dare",
        coefficients=rng.random((3, 1, 5)),
        weights=weights,
        drop_rate=rng.random(5) * 0.5,
        **STATED,
    )
    assert pieces.configurations(merge) == shape
    whole = master_bound(merge)
    for size in (1, 4, 11):
        monkeypatch.setattr(pieces, "PIECE", size)
        split = master_bound(merge)
        assert split.value.shape == shape
        assert np.allclose(split.value, whole.value, rtol=1e-13)
        assert np.allclose(split.V, np.broadcast_to(whole.V, shape), rtol=1e-13)
        for left, right in zip(split.terms, whole.terms, strict=True):
            assert np.allclose(left.value, right.value, rtol=1e-12)
            assert np.allclose(left.share, right.share, rtol=1e-12)
        for left_row, right_row in zip(split.experts, whole.experts, strict=True):
            assert np.allclose(left_row.epsilon, right_row.epsilon, rtol=1e-13)
            assert set(left_row.drift_form.split(" or ")) == set(right_row.drift_form.split(" or "))
        assert split.tier == whole.tier
        assert split.merge is merge
    monkeypatch.setattr(pieces, "PIECE", 16384)
    for index in ((0, 0), (6, 4), (3, 2)):
        one = (
            replace(
                recipes[0],
                learning_rate=float(recipes[0].learning_rate[index]),
                initial_risk=float(recipes[0].initial_risk[index[0], 0]),
            ),  # type: ignore[index]
            replace(recipes[1], n=int(recipes[1].n[0, index[1]]), momentum=float(recipes[1].momentum[index[0], 0])),  # type: ignore[index]
            replace(recipes[2], learning_rate=Schedule(recipes[2].learning_rate.values[index[0], 0])),  # type: ignore[union-attr]
        )
        alone = replace(
            merge,
            experts=one,
            weights=weights[:, index[0], 0],
            coefficients=merge.coefficients[:, 0, index[1]],  # type: ignore[call-overload,index]
            drop_rate=float(merge.drop_rate[index[1]]),  # type: ignore[index]
        )
        assert float(master_bound(alone).value) == pytest.approx(float(whole.value[index]), rel=1e-12)


def test_recursion_is_used_visible_and_optional() -> None:
    run = expert("a", D_inf=None, D_2=1.5, steps=400)
    sharp, plain = master_bound(Merge((run,), **STATED)), master_bound(Merge((run,), **STATED), recursion=False)
    assert sharp.experts[0].epsilon_form == "Theorem 2 (rms recursion)"
    assert plain.experts[0].epsilon_form == "Theorem 2 (rms)"
    assert float(sharp.value) < float(plain.value)
    logged = expert(
        "a", D_inf=None, steps=None, learning_rate=Schedule(np.full(50, 0.1)), batch_losses=Schedule(np.full(50, 0.2))
    )
    assert master_bound(Merge((logged,), **STATED)).experts[0].epsilon_form == "recursion, gap from the loss log"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (dict(steps=None, learning_rate=Schedule(np.linspace(0.1, 0.01, 40))), "learning_rate"),
        (dict(momentum=0.5), "learning_rate"),
        (dict(sampling="reshuffle"), "D_inf"),
        (dict(head="trained", sigma=1.1), "sigma0"),
        (dict(D_inf=None, D_2=2.0), "learning_rate"),
    ],
)
def test_elasticity_where_no_closed_expression_exists(changes: dict[str, object], field: str) -> None:
    merge = Merge((expert("a", **changes), expert("b", **changes)), **STATED)
    value = getattr(merge.experts[0], field)

    def log_bound(factor: float) -> float:
        scaled = Schedule(value.values * factor) if isinstance(value, Schedule) else value * factor
        return float(
            np.log(
                master_bound(
                    replace(merge, experts=tuple(replace(item, **{field: scaled}) for item in merge.experts))
                ).value
            )
        )

    slope = (log_bound(1.001) - log_bound(1 / 1.001)) / (2 * np.log(1.001))
    assert master_bound(merge).elasticity(field) == pytest.approx(slope, abs=1e-4)


def test_homogeneity_ties_the_elasticities_together() -> None:
    """Units: scaling every loss by s (gradients, L, risks; learning rates by 1/s) scales the bound by s."""
    bound = master_bound(Merge((expert("a", initial_risk=0.7), expert("b", L=2.0)), **STATED))
    fields = {
        "L": 1,
        "initial_gradient_norm": 1,
        "sigma": 1,
        "sigma0": 1,
        "D_inf": 1,
        "training_risk": 1,
        "initial_risk": 1,
        "learning_rate": -1,
    }
    total = sum(sign * bound.elasticity(field) for field, sign in fields.items())
    assert total == pytest.approx(1.0, abs=1e-9)


def test_side_and_master_agree_without_the_sharpest_form() -> None:
    rng = np.random.default_rng(0)
    risks, p, L, c, eps = rng.random(3), np.full(3, 1 / 3), rng.random(3) + 1, np.full(3, 1 / 3), rng.random(3)
    joint = assemble_master(risks, p, L, 0.7, c, eps)
    assert float(joint.dispersion) == pytest.approx(float(np.sqrt(L.max() / 2 * 0.7)))
    assert float(joint.instability) == pytest.approx(float(np.sqrt(times(p * L / 2, (c * eps) ** 2).sum())))
