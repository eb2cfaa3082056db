"""Random, extreme and malformed recipes: never NaN, never another exception than the typed refusals.

More than 10,000 recipes: arrays of extreme numbers (vectorised), single recipes with fields of the wrong kind, and
hypothesis on top.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import (
    Expert,
    Merge,
    Schedule,
    assemble_master,
    clock,
    expert_drift,
    expert_epsilon,
    master_bound,
    network_bound,
    task_stability,
)
from theory.dispersion import centred_bound, orthogonal_bound, triangle_bound
from theory.drift import drift_saturation
from theory.errors import MergeboundError, RecipeError
from theory.generalization import high_probability, l1_gap, theorem_1
from theory.lemma import directional_risk, layered_risk, moved_risk
from theory.side_by_side import compare
from theory.stability import epsilon_cap, epsilon_rms, epsilon_sup, gamma
from theory.ties import CONSTANTS

TINY, HUGE = 5e-324, 1.7e308
EDGES = np.array([0.0, TINY, 1e-300, 1e-150, 1e-9, 0.1, 1.0, 2.0, 1e9, 1e150, 1e300, HUGE])


def numbers(found: Any, seen: int = 0) -> Iterator[np.ndarray]:
    """Every floating array inside a result, whatever dataclasses and containers it is wrapped in."""
    if seen > 4 or found is None or isinstance(found, (str, bytes, bool, frozenset, Expert, Merge)):
        return
    if isinstance(found, (float, np.floating, np.ndarray)):
        if np.asarray(found).dtype.kind == "f":
            yield np.asarray(found)
    elif isinstance(found, dict):
        for item in found.values():
            yield from numbers(item, seen + 1)
    elif isinstance(found, (tuple, list)):
        for item in found:
            yield from numbers(item, seen + 1)
    elif hasattr(found, "__dataclass_fields__"):
        for field in fields(found):
            yield from numbers(getattr(found, field.name), seen + 1)


def survive(call: Callable[[], Any]) -> tuple[Any, bool]:
    """Run a call: a result without NaN, or a typed refusal that says something; anything else is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = call()
        except MergeboundError as refusal:
            message = str(refusal)
        else:
            message = ""
    if message:
        assert ":" in message or "give" in message, message
        return None, True
    for array in numbers(found):
        assert not np.isnan(array).any(), found
    return found, False


def extreme(rng: np.random.Generator, size: int, *, low: float = 0.0) -> np.ndarray:
    """Edges of the floating range and everything in between."""
    spread = np.exp(rng.uniform(np.log(1e-300), np.log(1e300), size))
    mixed = np.where(rng.random(size) < 0.4, rng.choice(EDGES, size), spread)
    return np.maximum(np.where(rng.random(size) < 0.3, rng.random(size), mixed), low)


def array_recipe(rng: np.random.Generator, size: int) -> dict[str, Any]:
    """A recipe of ``size`` configurations with extreme, but well-formed, numbers."""
    stepwise = rng.random() < 0.5
    n = np.floor(np.exp(rng.uniform(0, np.log(1e15), size)))
    recipe: dict[str, Any] = {
        "n": n,
        "batch_size": np.maximum(np.floor(n * rng.choice([1e-6, 0.3, 1.0], size)), 1.0),
        "learning_rate": extreme(rng, size, low=TINY),
        "steps": rng.integers(1, 30, size) if stepwise else np.floor(np.exp(rng.uniform(0, np.log(1e15), size))),
        "L": extreme(rng, size),
        "weight_decay": extreme(rng, size) if rng.random() < 0.5 else 0.0,
        "curvature": str(rng.choice(["convex", "smooth"])),
        "sampling": str(rng.choice(["without_replacement", "with_replacement", "reshuffle"] if stepwise else
                                   ["without_replacement", "with_replacement"])),
    }  # fmt: skip
    if stepwise and rng.random() < 0.7:
        recipe["momentum"] = rng.choice([0.0, TINY, 0.5, 0.999999, np.nextafter(1.0, 0.0)], size)
        recipe["nesterov"] = bool(rng.random() < 0.5)
        recipe["decoupled_decay"] = bool(rng.random() < 0.3)
    if stepwise and rng.random() < 0.3 and recipe["sampling"] != "reshuffle":
        recipe["steps"] = 7
        recipe["learning_rate"] = Schedule(np.stack([extreme(rng, size) for _ in range(7)], axis=-1))
    if rng.random() < 0.2:
        recipe["curvature"], recipe["mu"] = "strongly_convex", np.maximum(recipe["L"] * rng.random(size), TINY)
        recipe["L"] = np.maximum(recipe["L"], recipe["mu"])
    share = rng.choice([0.6, 1.0])
    for field in ("initial_gradient_norm", "sigma", "sigma0", "D_inf", "D_2", "D_envelope", "initial_risk", "G", "B",
                  "training_risk", "minimal_risk", "base_norm", "drift", "epsilon"):  # fmt: skip
        if rng.random() < share:
            recipe[field] = extreme(rng, size)
    if rng.random() < 0.4:
        return possible(recipe, rng, size)
    return recipe | {"measured": frozenset(recipe) & frozenset(CONSTANTS)}  # measured numbers may contradict each other


def possible(recipe: dict[str, Any], rng: np.random.Generator, size: int) -> dict[str, Any]:
    """Extreme constants that one loss can have: gradients below G and below what L and the risk at the base allow."""
    loud = dict(recipe)
    G, share = loud.get("G", extreme(rng, size)), rng.random(size)
    L, risk = loud["L"], loud.get("initial_risk", extreme(rng, size))
    most = np.minimum(G, np.sqrt(L) * np.sqrt(risk)) / 2
    for field in ("initial_gradient_norm", "sigma0", "sigma"):
        if field in loud:
            loud[field] = most * (share if field != "sigma" else 1.0)
    for field in ("D_inf", "D_2", "D_envelope"):
        if field in loud:
            loud[field] = np.maximum(loud[field], 2 * most)
    still = loud["curvature"] == "strongly_convex" or np.any(loud["weight_decay"])
    if still:  # a lower bound on the gradient, too
        loud.pop("minimal_risk", None)
    for field in ("minimal_risk", "training_risk"):
        if field in loud:
            loud[field] = risk if still else risk * share / 2
    if "B" in loud:
        loud["B"] = np.maximum(loud["B"], risk)
    if np.any(loud["weight_decay"]) or "base_norm" in loud:
        loud["base_norm"] = np.zeros(size)  # one base for all experts
    return loud | ({"initial_risk": risk} if "initial_risk" in recipe else {})


def refuse_or_build(name: str, recipe: dict[str, Any]) -> Expert | None:
    found, _ = survive(lambda: Expert(name, **recipe))
    return found if isinstance(found, Expert) else None


@pytest.mark.parametrize("seed", range(8))
def test_extreme_arrays(seed: int) -> None:
    """8 x 6 merges of up to three experts over 256 configurations: 12,288 recipes of extreme numbers."""
    rng = np.random.default_rng(seed)
    answered = 0
    for _ in range(6):
        built = [refuse_or_build(f"e{i}", array_recipe(rng, 256)) for i in range(int(rng.integers(1, 4)))]
        experts = tuple(expert for expert in built if expert is not None)
        assert experts, "well-formed extreme recipes are accepted"
        for expert in experts:
            timing, refused = survive(lambda expert=expert: clock(expert))  # type: ignore[misc]
            if not refused:
                assert (timing.tau >= 0).all()
                assert (timing.nu >= 0).all()
                assert (survive(lambda e=expert, t=timing: gamma(e, t))[0] >= 0).all()  # type: ignore[misc]
            survive(lambda expert=expert: expert_drift(expert))  # type: ignore[misc]
            survive(lambda expert=expert: expert_epsilon(expert))  # type: ignore[misc]
        size = len(experts)
        merge, _ = survive(
            lambda experts=experts, size=size: Merge(  # type: ignore[misc]
                experts,
                method=str(rng.choice(["average", "task_arithmetic", "dare"])),  # type: ignore[arg-type]
                coefficients=None if rng.random() < 0.5 else rng.uniform(-1, 1, (size, 1)) * extreme(rng, 256),
                shared_samples=bool(rng.random() < 0.3),
            )
        )
        if merge is None:
            merge = Merge(experts)
        bound, refused = survive(lambda merge=merge: master_bound(merge))  # type: ignore[misc]
        if not refused:
            answered += 1
            assert (bound.value >= 0).all()
            assert np.isinf(bound.value[bound.vacuous]).all()
            shares = sum(term.share for term in bound.terms)
            assert np.all((np.abs(shares - 1) < 1e-9) | (bound.value == 0) | (np.abs(shares) < 1e-9))
            assert "nan" not in bound.explain()
        survive(lambda merge=merge: l1_gap(merge))  # type: ignore[misc]
        survive(lambda merge=merge: high_probability(merge, 0.1, 0.05))  # type: ignore[misc]
        survive(lambda merge=merge: compare(merge))  # type: ignore[misc]
    assert answered >= 1, "some extreme recipes have everything a bound needs"


def test_extreme_arguments_of_plain_calculators() -> None:
    """Every calculator on all pairs and triples of the edges of the floating range."""
    a, b, c = (axis.ravel() for axis in np.meshgrid(EDGES, EDGES, EDGES))
    ones = np.ones_like(a)
    for call in (
        lambda: moved_risk(a, b, c),
        lambda: directional_risk(a, b),
        lambda: layered_risk(a, np.stack([b, c], -1), np.stack([c, b], -1)),
        lambda: epsilon_sup(a, b, 1 + c, b),
        lambda: epsilon_rms(a, b, 1 + c, b),
        lambda: epsilon_cap(a),
        lambda: drift_saturation(a, b, c, a, 1 + b),
        lambda: triangle_bound(np.stack([a, b]), np.stack([c, -c]), np.stack([ones / 2, ones / 2])),
        lambda: centred_bound(np.stack([a, b]), np.stack([c, -c]), np.stack([ones / 2, ones / 2])),
        lambda: orthogonal_bound(np.stack([a, b]), np.stack([c, -c]), np.stack([ones / 2, ones / 2])),
        lambda: task_stability(np.stack([a, b]), np.stack([b, c]), shared_samples=True),
        lambda: theorem_1(a, np.stack([ones / 2, ones / 2]), np.stack([b, c]), np.stack([c, a])),
        lambda: assemble_master(np.stack([a, b]), np.stack([ones / 2] * 2), np.stack([b, c]), c, np.stack([a, c]), 1.0),
        lambda: network_bound(np.stack([a, b]), 1.0, np.stack([b, c])),
    ):
        found, refused = survive(call)
        assert not refused
        assert all((array >= 0).all() for array in numbers(found))


JUNK: tuple[Any, ...] = (
    *(None, True, False, "ten", "", b"1", float("nan"), float("inf"), -float("inf"), -1, -0.5, 0, 0.0, 1.5, 10**400),
    *(1 + 2j, [], [[]], [1, "x"], [1, [2, 3]], {}, {"a": 1}, set(), object(), lambda: 1, np.array([]), np.array("x")),
    *(np.array([1.0, np.nan]), np.array([1, 2, 3]), np.ones((2, 3)), np.array([1 + 1j]), np.array([None, 1]), range(3)),
    *(np.float32(2), np.int8(3), np.bool_(True), np.datetime64("2020-01-01"), HUGE, TINY, -HUGE, Exception, type),
)
GOOD: dict[str, Any] = dict(
    n=100, batch_size=10, learning_rate=0.1, steps=20, curvature="convex", L=1.0, initial_gradient_norm=0.5, sigma=0.8,
    sigma0=0.8, D_inf=2.0, training_risk=0.05, initial_risk=1.0, G=1.0, B=1.0,
)  # fmt: skip
SAFE_STEPS = (HUGE, 10**400)


def everything(merge: Merge) -> None:
    survive(lambda: master_bound(merge).explain())
    survive(lambda: l1_gap(merge))
    survive(lambda: high_probability(merge, 0.1, 0.05))
    for expert in merge.experts:
        survive(lambda expert=expert: expert_epsilon(expert))  # type: ignore[misc]


def test_every_field_with_every_kind_of_junk() -> None:
    """Each field of Expert and Merge with each piece of junk, alone and wrapped in a schedule."""
    for field in (item.name for item in fields(Expert)):
        for junk in JUNK:
            expert = survive(lambda f=field, j=junk: Expert(**({"name": "a"} | GOOD | {f: j})))[0]  # type: ignore[misc, arg-type]
            if expert is not None:
                everything(Merge((expert,)))
            if field in ("learning_rate", "batch_size", "batch_losses", "batch_gradient_norms"):
                built = survive(
                    lambda f=field, j=junk: Expert(**({"name": "a"} | GOOD | {f: Schedule(j), "steps": None}))  # type: ignore[misc]
                )[0]
                if built is not None:
                    everything(Merge((built,)))
    pair = (Expert("a", **GOOD), Expert("b", **GOOD))
    for field in (item.name for item in fields(Merge)):
        for junk in JUNK:
            for method in ("average", "weighted", "dare", "ties"):
                merge = survive(lambda f=field, j=junk, m=method: Merge(**({"experts": pair, "method": m} | {f: j})))[0]  # type: ignore[misc, arg-type]
                if merge is not None:
                    survive(lambda merge=merge: master_bound(merge))  # type: ignore[misc]


def test_junk_in_arguments() -> None:
    merge = Merge((Expert("a", **GOOD), Expert("b", **GOOD)))
    for junk in JUNK:
        survive(lambda j=junk: high_probability(merge, j, 0.05))  # type: ignore[misc]
        survive(lambda j=junk: high_probability(merge, 0.1, j))  # type: ignore[misc]
        for place in range(3):
            arguments: list[Any] = [[0.1, 0.2], 1.0, [0.3, 0.4]]
            arguments[place] = junk
            survive(lambda a=tuple(arguments): network_bound(*a))  # type: ignore[misc]
        survive(lambda j=junk: moved_risk(j, 1.0, 1.0))  # type: ignore[misc]


def test_more_steps_than_memory_are_refused_by_name() -> None:
    for huge in (10**12, 1e15):
        for changes in ({"momentum": 0.9}, {"sampling": "reshuffle"}):
            expert = Expert("a", **(GOOD | {"steps": huge} | changes))  # type: ignore[arg-type]
            with pytest.raises(RecipeError, match="too many to write out"):
                clock(expert)
    assert np.isinf(clock(Expert("a", **(GOOD | {"steps": 10**12, "curvature": "smooth"}))).tau)


ANY = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**6), st.floats(), st.text(max_size=3),
    st.lists(st.floats(), max_size=3), st.lists(st.floats(0, 1), min_size=2, max_size=2).map(np.array),
)  # fmt: skip
KINDS = {
    "sampling": st.sampled_from(["without_replacement", "with_replacement", "reshuffle", "other"]),
    "curvature": st.sampled_from(["convex", "strongly_convex", "smooth", "flat"]),
    "head": st.sampled_from(["none", "frozen", "trained"]),
    "optimizer": st.sampled_from(["sgd", "adamw", "SGD", ""]),
    "steps": st.one_of(st.integers(-1, 300), st.floats(0, 50), st.none()),
    "momentum": st.one_of(st.floats(0, 1), st.floats()),
}


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_random_combinations_of_fields(data: st.DataObject) -> None:
    names = [item.name for item in fields(Expert) if item.name not in ("name", "measured")]
    recipe = dict(GOOD)
    for name in data.draw(st.lists(st.sampled_from(names), max_size=6, unique=True)):
        recipe[name] = data.draw(KINDS.get(name, ANY))
    expert = survive(lambda: Expert("a", **recipe))[0]
    if expert is not None:
        everything(Merge((expert, Expert("b", **GOOD))))
