"""Constants that contradict each other are refused by name; what some loss has is accepted, up to its very edge.

Admissible instances are explicit: quadratics that attain an inequality, finite sums of logistic losses.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from theory import AssumptionError, Expert, Merge, RecipeError, expert_moments, master_bound
from theory.ties import CONSTANTS, TIES, impossible

RUN: dict[str, Any] = dict(n=1000, batch_size=10, learning_rate=0.1, steps=10)
STATED: dict[str, Any] = dict(shared_samples=False, data_independent_choices=True, per_sample_loss=True)
# f = (L/2) |x - z|^2 with L = 2, x_0 at distance 3 from the mean, z at distance 1 from it, half on each side
L, FAR, SIDE = 2.0, 3.0, 1.0
BOWL = dict(L=L, initial_gradient_norm=L * FAR, sigma0=L * SIDE, initial_risk=L / 2 * (FAR**2 + SIDE**2))
BOWL |= dict(minimal_risk=L / 2 * SIDE**2, minimizer_distance=FAR)
OMEGA = 0.5
# the same without noise and around 0, with weight decay: everything is exact again
DECAYED = dict(L=L, weight_decay=OMEGA, base_norm=FAR, initial_gradient_norm=(L + OMEGA) * FAR, minimal_risk=0.0)
DECAYED |= dict(initial_risk=L / 2 * FAR**2, minimizer_distance=FAR)
STRONG = dict(curvature="strongly_convex", mu=L)


def part(whole: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    return {name: whole[name] for name in names} | more


# (tie, the attaining instance, the field that is pushed beyond, up or down)
EDGES: list[tuple[str, dict[str, Any], str, int]] = [
    ("minimal_risk and initial_risk", part(BOWL, "minimal_risk", initial_risk=L / 2 * SIDE**2), "minimal_risk", 1),
    ("minimal_risk and training_risk", part(BOWL, "minimal_risk", training_risk=L / 2 * SIDE**2), "training_risk", -1),
    (
        "initial_gradient_norm and initial_risk",
        part(BOWL, "L", "initial_gradient_norm", "initial_risk", "minimal_risk"),
        "initial_gradient_norm",
        1,
    ),
    (
        "initial_gradient_norm and initial_risk",
        part(DECAYED, "L", "initial_gradient_norm", "initial_risk", "weight_decay", "base_norm"),
        "initial_gradient_norm",
        1,
    ),
    ("sigma0 and initial_risk", part(BOWL, "L", "initial_gradient_norm", "initial_risk", "sigma0"), "sigma0", 1),
    (
        "initial_gradient_norm and weight_decay",  # the minimum at 2 x_0: the loss pulls against the decay
        dict(L=L, weight_decay=4.0, base_norm=FAR, initial_risk=L / 2 * FAR**2, initial_gradient_norm=(4.0 - L) * FAR),
        "initial_gradient_norm",
        -1,
    ),
    (
        "pl_constant and initial_gradient_norm",
        part(BOWL, "initial_gradient_norm", "initial_risk", "minimal_risk", pl_constant=L),
        "initial_gradient_norm",
        -1,
    ),
    (
        "pl_constant and initial_gradient_norm",
        part(BOWL, "initial_gradient_norm", "initial_risk", training_risk=L / 2 * SIDE**2, **STRONG),
        "training_risk",
        -1,
    ),
    (
        "pl_constant and initial_gradient_norm",
        part(DECAYED, "weight_decay", "base_norm", "minimal_risk", "initial_gradient_norm", "initial_risk", **STRONG),
        "initial_gradient_norm",
        -1,
    ),
    ("minimizer_distance and L", part(BOWL, "L", "initial_gradient_norm", "minimizer_distance"), "L", -1),
    (
        "minimizer_distance and initial_risk",
        part(BOWL, "L", "initial_risk", "minimal_risk", "minimizer_distance"),
        "minimizer_distance",
        -1,
    ),
    (
        "minimizer_distance and mu",
        part(BOWL, "initial_risk", "minimal_risk", "minimizer_distance", **STRONG),
        "minimizer_distance",
        1,
    ),
    (
        "minimizer_distance and the gradient, strongly convex",
        part(BOWL, "initial_gradient_norm", "minimizer_distance", **STRONG),
        "initial_gradient_norm",
        -1,
    ),
    (
        "minimizer_distance and the gradient, convex",  # Huber's function: quadratic up to 1, then linear
        dict(L=L, initial_gradient_norm=L, minimizer_distance=FAR, initial_risk=L * FAR - L / 2, minimal_risk=0.0)
        | {"curvature": "convex"},
        "minimizer_distance",
        -1,
    ),
    ("sigma0 and D_inf", dict(sigma0=1.0, D_inf=np.sqrt(2.0)), "sigma0", 1),
    ("sigma0 and D_envelope", dict(sigma0=1.0, D_envelope=np.sqrt(2.0)), "D_envelope", -1),
    ("sigma0 and D_2", dict(sigma0=1.0, D_2=np.sqrt(2.0)), "D_2", -1),
    ("sigma and D_inf", dict(sigma=1.0, D_inf=np.sqrt(2.0)), "sigma", 1),
    ("sigma and D_envelope", dict(sigma=1.0, D_envelope=np.sqrt(2.0)), "sigma", 1),
    ("sigma and D_2", dict(sigma=1.0, D_2=1.0), "D_2", -1),
    ("sigma0 and sigma", dict(sigma0=1.0, sigma=1.0), "sigma", -1),
    ("initial_risk and B", part(DECAYED, "initial_risk", B=L / 2 * FAR**2), "B", -1),
    ("training_risk and B", dict(training_risk=0.3, B=0.3), "training_risk", 1),
    ("minimal_risk and B", dict(minimal_risk=0.3, B=0.3), "minimal_risk", 1),
    ("initial_gradient_norm and G", part(BOWL, "initial_gradient_norm", "sigma0", G=L * np.hypot(FAR, SIDE)), "G", -1),
    ("sigma0 and G", part(BOWL, "sigma0", G=L * SIDE), "G", -1),  # x_0 at the mean
    ("sigma and G", dict(sigma=1.0, G=1.0), "sigma", 1),
]


def test_every_tie_has_an_edge() -> None:
    assert {edge[0] for edge in EDGES} == {tie.name for tie in TIES}


@pytest.mark.parametrize(("name", "stated", "field", "way"), EDGES, ids=[f"{e[0]}: {e[2]}" for e in EDGES])
def test_edge(name: str, stated: dict[str, Any], field: str, way: int) -> None:
    """At equality and within rounding a recipe is possible; a millionth beyond it is not, unless it was measured."""
    tie = next(tie for tie in TIES if tie.name == name)

    def pushed(by: float) -> dict[str, Any]:
        return stated | {field: stated[field] * (1 + way * by)}

    for good in (stated, pushed(1e-10), pushed(-0.0)):
        assert Expert("a", **RUN, **good).n == 1000
    with pytest.raises(AssumptionError, match="contradict each other") as refusal:
        Expert("a", **RUN, **pushed(1e-6))
    message = str(refusal.value)
    assert "expert 'a'" in message
    assert all(f"{known} " in message for known in tie.fields), message
    assert tie.remedy in message
    assert Expert("a", **RUN, **pushed(1e-6), measured=frozenset(stated) & frozenset(CONSTANTS)).name == "a"
    many = stated | {field: np.array([[stated[field]], [pushed(1e-3)[field]], [pushed(1e-6)[field]]])}
    with pytest.raises(
        AssumptionError, match=re.escape("impossible in 2 of 3 configurations, the first at index 1, 0")
    ):
        Expert("a", **RUN, **many)
    many = stated | {field: np.array([stated[field], pushed(1e-10)[field]])}
    assert not impossible(Expert("a", **RUN, **many)).any()


def test_possible_but_surprising() -> None:
    """Loose bounds beside sharp ones, flat losses, risks that rise, gradients larger than any bound on the path."""
    for stated in (
        dict(G=1.0, D_inf=50.0, D_2=70.0, B=1e9, initial_risk=0.0, training_risk=1e6),
        dict(L=1e9, initial_risk=1.0, initial_gradient_norm=0.0, minimal_risk=0.0, curvature="convex"),
        dict(L=1.0, initial_gradient_norm=30.0, initial_risk=2.0, weight_decay=3.0),  # the base may be far away
        dict(L=1.0, initial_gradient_norm=30.0, initial_risk=2.0, weight_decay=3.0, base_norm=10.0),
        dict(minimal_risk=5.0, training_risk=1.0, weight_decay=0.1),  # the minimum contains the decay
        dict(minimal_risk=5.0, initial_risk=1.0, weight_decay=0.1, base_norm=10.0),
        dict(pl_constant=1.0, initial_risk=5.0, initial_gradient_norm=0.0),  # the minimum may be 5
        dict(L=1.0, minimizer_distance=1e9, initial_risk=0.0, minimal_risk=0.0, initial_gradient_norm=0.0),
        dict(sigma=3.0, sigma0=0.0, D_inf=5.0),
        dict(L=1.0, mu=1.0 + 1e-12, curvature="strongly_convex"),
    ):
        assert Expert("a", **RUN, **stated).n == 1000  # type: ignore[arg-type]


def test_impossible_with_decay() -> None:
    for stated, words in (
        (dict(L=1.0, initial_gradient_norm=0.1, initial_risk=0.5, weight_decay=3.0, base_norm=10.0), "base_norm"),
        (dict(minimal_risk=7.0, initial_risk=1.0, weight_decay=0.1, base_norm=10.0), "weight_decay"),
    ):
        with pytest.raises(AssumptionError, match=words):
            Expert("a", **RUN, **stated)  # type: ignore[arg-type]
    mixed = dict(L=1.0, initial_gradient_norm=3.0, initial_risk=2.0, weight_decay=np.array([1.0, 0.0, 2.0]))
    with pytest.raises(AssumptionError, match=r"weight_decay 0 .*1 of 3 configurations, the first at index 1"):
        Expert("a", **RUN, **mixed)  # type: ignore[arg-type]
    assert Expert("a", **RUN, **mixed, measured=frozenset({"L"})).L == 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["mu", "pl_constant"])
def test_convexity_above_smoothness_names_both(field: str) -> None:
    more = {"curvature": "strongly_convex"} if field == "mu" else {}
    with pytest.raises(RecipeError, match=rf"{field} 2 exceeds L.* 1: "):
        Expert("a", **RUN, L=1.0, **{field: 2.0}, **more)  # type: ignore[arg-type]


def test_logistic_regressions_are_possible() -> None:
    """Finite sums of logistic losses with and without decay: constants by brute force, minimiser by Newton's method."""
    rng = np.random.default_rng(0)
    decayed = 0
    for _ in range(60):
        n, omega = int(rng.integers(2, 12)), float(rng.choice([0.0, 0.05, 1.0]))
        if omega == 0:  # a minimiser needs data that cannot be separated
            half = rng.standard_normal((n, 2)) * np.exp(rng.uniform(-1, 1))
            data = np.concatenate([half, -half * rng.uniform(0.2, 1, (n, 1))])
        else:
            data = rng.standard_normal((n, 2)) * np.exp(rng.uniform(-1, 1))
        n, x0 = len(data), rng.standard_normal(2) * 2

        def risk(x: np.ndarray, data: np.ndarray = data) -> np.ndarray:
            return np.logaddexp(0, data @ x)

        def gradients(x: np.ndarray, data: np.ndarray = data) -> np.ndarray:
            return data / (1 + np.exp(-data @ x))[:, None]

        best = np.zeros(2)
        for _step in range(200):
            chance = 1 / (1 + np.exp(-data @ best))
            hessian = (data.T * (chance * (1 - chance))) @ data / n + omega * np.eye(2)
            step = np.linalg.solve(hessian, gradients(best).mean(axis=0) + omega * best)
            best = best - step / (1 + np.linalg.norm(step))
        each = gradients(x0)
        constants = dict(
            L=float((data**2).sum(axis=1).max() / 4),
            initial_gradient_norm=float(np.linalg.norm(each.mean(axis=0) + omega * x0)),
            sigma0=float(np.sqrt(((each - each.mean(axis=0)) ** 2).sum(axis=1).mean())),
            D_inf=float(np.linalg.norm(each[:, None] - each[None], axis=2).max()),
            G=float(np.linalg.norm(each, axis=1).max()),
            B=float(max(risk(x0).max(), risk(best).max())),
            initial_risk=float(risk(x0).mean()),
            minimal_risk=float(risk(best).mean() + omega / 2 * best @ best),
            minimizer_distance=float(np.linalg.norm(x0 - best)),
            base_norm=float(np.linalg.norm(x0)),
        )
        made = Expert(
            "a", n=n, batch_size=1, learning_rate=0.1, steps=3, weight_decay=omega, curvature="convex", **constants
        )  # type: ignore[arg-type]
        decayed += made.weight_decay > 0
        for field in ("initial_gradient_norm", "minimizer_distance")[: 1 + (omega > 0)]:
            with pytest.raises(AssumptionError, match="contradict"):
                replace(made, **{field: 1e4 * constants[field]}, G=None)  # type: ignore[arg-type]
    assert decayed >= 20


def test_a_sensitivity_below_the_coefficients_is_refused() -> None:
    pair = (Expert("a", **RUN, L=1.0), Expert("b", **RUN, L=1.0))
    known = dict(measured=frozenset[str]())
    for given, least in (
        (dict(), 0.5),
        (dict(method="weighted", coefficients=[-0.3, 0.7]), 0.7),
        (dict(method="weighted", weights=[0.1, 0.9]), 0.9),
        (dict(method="task_arithmetic", coefficients=0.3), 0.3),
        (dict(method="dare", coefficients=0.3, drop_rate=0.75), 0.6),
        (dict(method="dare", coefficients=0.3, drop_rate=0.75, rescale=False), 0.15),
    ):
        Merge(pair, sensitivity=least, **known, **given)  # type: ignore[arg-type]
        Merge(pair, sensitivity=0.9 * least, **given)  # type: ignore[arg-type]  # measured
        with pytest.raises(AssumptionError, match=r"sensitivity .* is below .*method"):
            Merge(pair, sensitivity=0.9 * least, **known, **given)  # type: ignore[arg-type]
    Merge(pair, method="ties", sensitivity=0.0, dispersion=1.0, **known)  # type: ignore[arg-type]


def test_experts_share_one_base() -> None:
    def pair(head: Any, *norms: Any) -> tuple[Expert, ...]:
        return tuple(Expert(f"e{i}", **RUN, L=1.0, head=head, base_norm=norm) for i, norm in enumerate(norms))

    Merge(pair("none", 2.0, None, 2.0 * (1 + 1e-12)))
    Merge(pair("frozen", 2.0, 3.0))
    with pytest.raises(AssumptionError, match=r"base_norm of 'e0' \(2\) and of 'e2' \(3\) differ"):
        Merge(pair("none", 2.0, None, 3.0))


@pytest.mark.parametrize("seed", range(40))
def test_base_anchor_where_no_bound_on_the_training_risk_applies(seed: int) -> None:
    """Momentum or reshuffling without a final risk: the base is the anchor; exact <= bound on quadratics."""
    from quadratic_recipes import random_problem

    from theory import merge_moments

    rng = np.random.default_rng(seed)
    change: dict[str, Any] = dict(momentum=0.5) if seed % 2 else dict(sampling="reshuffle", batch_size=1)
    problem = random_problem(seed, **change)
    size = len(problem.experts)
    alpha = rng.uniform(-0.2, 1.0, size)
    experts = tuple(replace(item, training_risk=None) for item in problem.experts)
    merge = Merge(experts, method="weighted", coefficients=alpha, **STATED)
    bound = master_bound(merge)
    exact = merge_moments(problem.tasks, problem.base, problem.experts, alpha, np.full(size, 1 / size))
    assert exact.risk <= float(bound.value) * (1 + 1e-8)
    assert bound.tier == "certified"
    assert bound.dispersion_form == "task by task, base anchors" or np.isinf(bound.value)
    assert all(row.risk_form == "no bound, base anchor" for row in bound.experts)
    with_end = master_bound(replace(merge, experts=problem.experts))
    assert float(with_end.value) <= float(bound.value) * (1 + 1e-12)
    blind = tuple(replace(item, initial_risk=None) for item in experts)
    with pytest.raises(AssumptionError, match="training_risk instead; or give initial_risk"):
        master_bound(replace(merge, experts=blind))
    drift = float(expert_moments(problem.tasks[0], problem.base, experts[0]).drift)
    assert drift >= 0
