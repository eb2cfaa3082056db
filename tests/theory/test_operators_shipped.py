"""Operators as theory objects against the shipped methods: measured ratios, Jacobians, masks, jumps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from merging.flat import FlatSpace
from merging.methods.della import drop_probabilities as shipped_probabilities
from merging.random_masks import keep_mask
from merging.registry import builtin_methods
from theory.operators import (
    agreement,
    drop_probabilities,
    iso_c_gain,
    mask_variance,
    model_stock_sensitivity,
    operator,
    operators,
    regmean_maps,
    sce_sensitivity,
    trim_change,
    trimmed,
)
from theory.operators.effects import Effect

Array = np.ndarray
SHAPES = {"blocks.0.w": (4, 3), "blocks.1.w": (2, 3), "norm.b": (5,)}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
SQUARE = {"w": (3, 3)}


def named(row: Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    parts = np.split(row, np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1])
    return {
        name: torch.from_numpy(part.reshape(shape).copy())
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def shipped(name: str, shapes: dict[str, tuple[int, ...]] | None = None, **settings: Any) -> Callable[[Array], Array]:
    """``(N, P)`` task vectors to the merged one, by the method's own function, in double precision."""
    method, layout = builtin_methods()[name], SHAPES if shapes is None else shapes
    takes = inspect.signature(method.function).parameters

    def merge(rows: Array) -> Array:
        given = dict(settings)
        if "names" in takes:
            given.setdefault("names", [f"e{i}" for i in range(len(rows))])
        if "base" in takes:
            base = np.random.default_rng(7).standard_normal(rows.shape[1])
            given.setdefault("base", named(base, layout))
        merged = method.function([named(row, layout) for row in rows], **given)
        return np.concatenate([merged[key].numpy().ravel() for key in layout])

    return merge


def jacobian_norms(merge: Callable[[Array], Array], rows: Array, step: float = 1e-6) -> Array:
    """Operator norm of the dense Jacobian with respect to each expert, by central differences."""
    norms = []
    for i in range(len(rows)):
        columns = []
        for k in range(rows.shape[1]):
            up, down = rows.copy(), rows.copy()
            up[i, k] += step
            down[i, k] -= step
            columns.append((merge(up) - merge(down)) / (2 * step))
        norms.append(np.linalg.norm(np.stack(columns, axis=1), 2))
    return np.asarray(norms)


def random_rows(seed: int, experts: int = 3, size: int = SIZE) -> Array:
    return np.random.default_rng(seed).standard_normal((experts, size))


def steepest(merge: Callable[[Array], Array], a: Array, b: Array, halvings: int = 36) -> float:
    """Follow the half of a segment in which the merge changes more: finite slope if it is smooth, huge at a jump."""
    fa, fb = merge(a), merge(b)
    for _ in range(halvings):
        middle = (a + b) / 2
        fm = merge(middle)
        if np.linalg.norm(fm - fa) >= np.linalg.norm(fb - fm):
            b, fb = middle, fm
        else:
            a, fa = middle, fm
    return float(np.linalg.norm(fb - fa) / np.linalg.norm(b - a))


# --- every method has one --------------------------------------------------------------------------------------------


def test_every_registered_method_has_an_operator_and_no_other() -> None:
    assert set(operators()) == set(builtin_methods())


@pytest.mark.parametrize("name", sorted(builtin_methods()))
def test_settings_are_those_of_the_method(name: str) -> None:
    method, found = builtin_methods()[name], operator(name)
    assert found.coefficients == method.coefficients
    assert found.experts == method.experts
    ours = {item.name: item for item in found.settings}
    assert set(ours) == {item.name for item in method.parameters}
    for theirs in method.parameters:
        mine = ours[theirs.name]
        assert (mine.default, mine.low, mine.high, mine.low_open, mine.high_open, set(mine.choices)) == (
            *(theirs.default, theirs.low, theirs.high, theirs.low_open, theirs.high_open, set(theirs.choices)),
        )


@pytest.mark.parametrize("name", sorted(builtin_methods()))
def test_guarantees_agree_with_the_declaration_lipschitz(name: str) -> None:
    method = builtin_methods()[name]
    given: dict[str, Any] = {"coefficients": [0.2, 0.5]} if method.coefficients == "required" else {}
    if name == "regmean":
        given["grams"] = np.stack([np.eye(2), 2 * np.eye(2)])
    effect = operator(name).effect(2, **given)
    assert (effect.guarantee in ("global", "mean square")) == method.lipschitz
    if not method.lipschitz:
        assert effect.tier == "estimated"
        assert any(
            word in effect.reason for word in ("no guarantee", "discontinuous", "not Lipschitz", "without bound")
        )


# --- global sensitivities: never exceeded, and attained ---------------------------------------------------------------

FISHER = np.abs(np.random.default_rng(3).standard_normal((3, SIZE))) ** 3


def fisher_settings(**more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"fisher": [named(row, SHAPES) for row in FISHER], **more}, {"fisher": FISHER, **more}


GROUPS = {r"blocks\.1\..*": [0.9, -0.2, 0.1]}
GLOBAL: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("average", {}, {}),
    ("uniform_soup", {}, {}),
    ("weighted", *[{"coefficients": [1.0, 2.0, -0.5]}] * 2),
    ("weighted", *[{"coefficients": [1.0, 2.0, -0.5], "normalize": False}] * 2),
    ("task_arithmetic", *[{"coefficient": 0.7, "coefficients": [1.0, -2.0, 0.5]}] * 2),
    ("wise_ft", *[{"alpha": 0.8}] * 2),
    ("lines", {"alpha": 1.0, "beta": 0.5}, {"alpha": 1.0, "beta": 0.5}),
    ("lines", {"alpha": -1.5, "beta": 0.2}, {"alpha": -1.5, "beta": 0.2}),
    ("risk_optimal", *[{"coefficients": [0.3, 0.6, -0.1], "groups": GROUPS}] * 2),
    ("curvature_optimal", *[{"coefficients": [0.3, 0.6, -0.1]}] * 2),
    ("adamerging", *[{"coefficients": [0.3, 0.6, -0.1], "groups": GROUPS}] * 2),
    ("fisher", *fisher_settings()),
    ("fisher", *fisher_settings(floor=0.5, flooring="add", coefficients=[1.0, 3.0, 0.5])),
    ("fisher", *fisher_settings(normalize="model")),
    ("consensus_ta", *[{"threshold": 0.0, "coefficient": 0.6}] * 2),
    ("knots", *[{"inner": "task_arithmetic", "coefficient": 0.6, "coefficients": [1.0, 2.0, -1.0]}] * 2),
    ("iso_c", *[{"matrices": "none", "coefficient": 0.6}] * 2),
    ("wudi", *[{"matrices": "none", "coefficient": 0.6}] * 2),
    ("tsv_m", *[{"orthogonalize": False, "truncation": "none", "coefficient": 0.6}] * 2),
    ("wudi", *[{"steps": 0.0, "coefficient": 0.6}] * 2),
]


@pytest.mark.parametrize(("name", "settings", "known"), GLOBAL, ids=[f"{i}-{row[0]}" for i, row in enumerate(GLOBAL)])
def test_global_sensitivity_is_never_exceeded_and_attained(
    name: str, settings: dict[str, Any], known: dict[str, Any]
) -> None:
    effect = operator(name).effect(3, **known)
    merge = shipped(name, **settings)
    assert effect.guarantee == "global"
    assert effect.sensitivity is not None
    rng = np.random.default_rng(1)
    for scale in (1e-3, 1e3):
        for i in range(3):
            rows, moved = random_rows(int(rng.integers(1000))), random_rows(2)
            moved[i] = rows[i] + scale * rng.standard_normal(SIZE)
            moved[[j for j in range(3) if j != i]] = rows[[j for j in range(3) if j != i]]
            ratio = np.linalg.norm(merge(moved) - merge(rows)) / np.linalg.norm(moved - rows)
            assert ratio <= effect.sensitivity[i] * (1 + 1e-6) + 1e-12
    np.testing.assert_allclose(jacobian_norms(merge, random_rows(0)), effect.sensitivity, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("off_diagonal", [0.9, 1.0, 0.0])
@pytest.mark.parametrize("deficient", [False, True])
def test_regmean_against_the_shipped_solver(off_diagonal: float, deficient: bool) -> None:
    rng = np.random.default_rng(5)
    weights = [1.0, 2.0, 0.5]
    layers = {}
    for name in ("blocks.0.w", "blocks.1.w"):
        inputs = rng.standard_normal((3, 8, 3)) * np.array([3.0, 1.0, 0.05])
        if deficient:
            inputs[:, :, 1] = 0.0
        layers[name] = np.einsum("isk,isl->ikl", inputs, inputs)
    grams = [{name: torch.from_numpy(layer[i]) for name, layer in layers.items()} for i in range(3)]
    merge = shipped("regmean", grams=grams, off_diagonal=off_diagonal, coefficients=weights)
    effect = operator("regmean").effect(3, grams=list(layers.values()), off_diagonal=off_diagonal, coefficients=weights)
    maps = regmean_maps(layers["blocks.0.w"], weights, off_diagonal)
    rows = random_rows(0)
    first = sum(row[:12].reshape(4, 3) @ A for row, A in zip(rows, maps, strict=True))
    np.testing.assert_allclose(merge(rows)[:12].reshape(4, 3), first, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(maps.sum(axis=0), np.eye(3), atol=1e-9)
    others = np.asarray(weights) / np.sum(weights)  # the vector without a Gram matrix is averaged
    assert effect.sensitivity is not None
    np.testing.assert_allclose(
        jacobian_norms(merge, rows), np.maximum(effect.sensitivity, others), rtol=1e-6, atol=1e-8
    )
    assert [item.verdict for item in effect.assumptions] == ["unknown"]  # statistics move with the experts


def test_trap_regmean_can_exceed_one() -> None:
    grams = np.array([np.outer([1.0, 0.01], [1.0, 0.01]), np.diag([1.0, 1e-4])])
    c = operator("regmean").effect(2, grams=grams, off_diagonal=1.0).sensitivity
    assert c is not None
    assert c[0] > 30  # the naive reading, a share of at most one, is wrong
    layer = {"w": (2, 2)}
    given = [{"w": torch.from_numpy(gram)} for gram in grams]
    merge = shipped("regmean", layer, grams=given, off_diagonal=1.0)
    np.testing.assert_allclose(jacobian_norms(merge, random_rows(0, 2, 4)), c, rtol=1e-5)


# --- local sensitivities: the Jacobian's norm -------------------------------------------------------------------------


def masks_of(experts: int, drop: float, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Array:
    space = FlatSpace.of(named(np.zeros(sum(int(np.prod(s)) for s in shapes.values())), shapes))
    return np.stack([keep_mask(space, 0, f"e{i}", drop).numpy() for i in range(experts)])


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
def test_ties_local_sensitivity(seed: int, aggregation: str, weights: list[float] | None) -> None:
    rows = random_rows(seed)
    more = {} if weights is None else {"coefficients": weights, "election": "weighted" if seed % 2 else "plain"}
    settings: dict[str, Any] = {"density": 0.4, "aggregation": aggregation, "coefficient": 0.8, **more}
    settings["rounding"] = "down" if seed > 1 else "up"
    effect = operator("ties").effect(3, task_vectors=rows, **settings)
    assert effect.guarantee == "local"
    np.testing.assert_allclose(jacobian_norms(shipped("ties", **settings), rows), effect.sensitivity, rtol=1e-6)
    ceiling = operator("ties").effect(3, **settings).sensitivity
    assert ceiling is not None
    assert np.all(effect.sensitivity <= ceiling * (1 + 1e-12))


def test_trap_ties_is_not_divided_by_the_number_of_experts() -> None:
    rows = np.eye(4, SIZE) + 1e-3 * random_rows(0, 4)
    found = jacobian_norms(shipped("ties", density=0.05), rows)
    np.testing.assert_allclose(found, 1.0, rtol=1e-6)  # naive: lambda/N = 0.25
    np.testing.assert_allclose(operator("ties").effect(4, density=0.05, task_vectors=rows).sensitivity, found)


@pytest.mark.parametrize("election", ["none", "plain", "weighted"])
@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_breadcrumbs_local_sensitivity(election: str, aggregation: str) -> None:
    rows, weights = random_rows(11), [1.0, 2.0, 0.5]
    settings: dict[str, Any] = dict(
        density=0.5, gamma=0.1, election=election, aggregation=aggregation, coefficients=weights, coefficient=0.7
    )
    merge = shipped("breadcrumbs", **settings)
    found = jacobian_norms(merge, rows)
    ceiling = operator("breadcrumbs").effect(3, **settings).sensitivity
    assert ceiling is not None
    assert np.all(found <= ceiling * (1 + 1e-6))
    if election == "none":
        np.testing.assert_allclose(found, ceiling, rtol=1e-6)
        return
    single = np.stack([  # what is left of each expert alone: without an election, one expert at a time
        shipped("breadcrumbs", density=0.5, gamma=0.1, coefficient=1.0)(row[None]) for row in rows
    ])  # fmt: skip
    votes = None if election == "plain" else np.asarray(weights) @ single
    exact = operator("breadcrumbs").effect(3, agreeing=agreement(single, votes), **settings).sensitivity
    np.testing.assert_allclose(found, exact, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("magmax", {"coefficient": 0.6}),
        ("emr", {}),
        ("consensus_ta", {"coefficient": 0.6, "coefficients": [1.0, 2.0, 0.5], "mask_lambda": 0.3}),
        ("adamerging_pp", {"coefficients": [0.4, -0.7, 0.2], "density": 0.6}),
    ],
)
def test_elementwise_local_sensitivity(name: str, settings: dict[str, Any]) -> None:
    rows = random_rows(4)
    given = {**settings, "task_vectors": rows} if name in ("magmax", "emr") else settings
    effect = operator(name).effect(3, **given)
    np.testing.assert_allclose(jacobian_norms(shipped(name, **settings), rows), effect.sensitivity, rtol=1e-6)


def test_an_expert_that_never_wins_has_no_influence() -> None:
    rows = random_rows(4)
    rows[1] *= 1e-3
    np.testing.assert_allclose(operator("magmax").effect(3, task_vectors=rows).sensitivity, [0.5, 0.0, 0.5])
    np.testing.assert_allclose(jacobian_norms(shipped("magmax"), rows), [0.5, 0.0, 0.5], atol=1e-9)


def test_greedy_soup_at_a_fixed_selection() -> None:
    rows = random_rows(3, 4)
    merge = shipped("greedy_soup", scores=[0.5, 0.9, 0.8, 0.1], evaluate=lambda merged: 0.85)
    effect = operator("greedy_soup").effect(4, ingredients=[1])
    np.testing.assert_allclose(jacobian_norms(merge, rows), effect.sensitivity, atol=1e-9)
    kind = shipped("greedy_soup", scores=[0.5, 0.9, 0.8, 0.1], evaluate=lambda merged: 0.9)
    effect = operator("greedy_soup").effect(4, ingredients=range(4))
    np.testing.assert_allclose(jacobian_norms(kind, rows), effect.sensitivity, atol=1e-9)
    assert effect.tier == "estimated"


def test_wudi_by_adam_stays_close_to_the_sum() -> None:
    """The stated bias: steps times learning rate, per entry (Adam's steps are about the learning rate)."""
    rows = random_rows(5, 3, 12)
    merged = shipped("wudi", {"w": (4, 3)}, steps=50.0, learning_rate=1e-3)(rows)
    assert np.abs(merged - rows.sum(axis=0)).max() <= 1.05 * 50 * 1e-3


def test_lines_takes_the_largest_scale_of_a_layer() -> None:
    scales = [0.2, -0.9, 0.4]
    effect = operator("lines").effect(2, scales=scales)
    np.testing.assert_allclose(effect.sensitivity, [0.9, 0.9])
    assert operator("lines").effect(2, scales=[0.3]).mean is not None  # one layer: task arithmetic


@pytest.mark.parametrize("aggregation", ["sum", "mean"])
def test_consensus_ties_local_sensitivity(aggregation: str) -> None:
    rows = random_rows(12)
    settings: dict[str, Any] = dict(density=0.7, aggregation=aggregation, coefficient=0.9, mask_lambda=0.3)
    votes = agreement(trimmed(rows, 0.7))
    merge = shipped("consensus_ties", **settings)
    used = np.abs(merge(rows)) > 0
    effect = operator("consensus_ties").effect(3, agreeing=votes, used=used, **settings)
    np.testing.assert_allclose(jacobian_norms(merge, rows), effect.sensitivity, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_sce_bound_and_its_trap(seed: int) -> None:
    shapes = {"w": (4, 6)}
    rows = random_rows(seed, 3, 24)
    merge = shipped("sce", shapes, density=0.5)
    centred = rows - rows.mean(axis=0)
    kept = np.zeros(24)
    kept[np.argsort(-(centred**2).sum(axis=0))[:12]] = 1.0
    selected = rows * kept
    found, bound = jacobian_norms(merge, rows), sce_sensitivity(selected)
    assert np.all(found <= bound * (1 + 1e-6))
    assert np.all(bound <= 3 * found)
    effect = operator("sce").effect(3, density=0.5, selected=selected)
    np.testing.assert_allclose(effect.sensitivity, bound)
    energy = (selected**2).sum(axis=1)
    mass = (agreement(selected) * energy[:, None]).sum(axis=0)
    share = (agreement(selected) * energy[:, None] / np.where(mass > 0, mass, 1.0)).max(axis=1)
    assert np.any(found > share * (1 + 1e-3))  # the energies react as well: weights cannot be frozen


@pytest.mark.parametrize("drop", [0.3, 0.6])
def test_dare_l1_local_sensitivity(drop: float) -> None:
    shapes = {"w": (3, 4)}
    rows = random_rows(9, 3, 12)
    settings: dict[str, Any] = dict(drop=drop, rescaling="l1", coefficient=0.4, coefficients=[1.0, -2.0, 0.5])
    effect = operator("dare").effect(3, task_vectors=rows, masks=masks_of(3, drop, shapes), **settings)
    assert effect.guarantee == "local"
    np.testing.assert_allclose(jacobian_norms(shipped("dare", shapes, **settings), rows), effect.sensitivity, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_dare_l1_local_sensitivity_with_few_survivors(size: int) -> None:
    shapes = {"w": (size,)}
    for seed in range(6):
        rows = random_rows(seed, 2, size)
        settings: dict[str, Any] = dict(drop=0.4, rescaling="l1", coefficient=1.0)
        effect = operator("dare").effect(2, task_vectors=rows, masks=masks_of(2, 0.4, shapes), **settings)
        found = jacobian_norms(shipped("dare", shapes, **settings), rows)
        np.testing.assert_allclose(found, effect.sensitivity, rtol=1e-6, atol=1e-9)


def test_trap_l1_rescaling_has_no_constant() -> None:
    """What survives can be arbitrarily small: the factor is not that of rescaling by the probability."""
    shapes = {"w": (6,)}
    kept = masks_of(1, 0.5, shapes)[0]
    row = np.where(kept, 1e-4, 1.0)[None]
    assert jacobian_norms(shipped("dare", shapes, drop=0.5, rescaling="l1", coefficient=1.0), row, 1e-9)[0] > 1e3
    assert operator("dare").effect(1, rescaling="l1").sensitivity is None


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_ties_local_sensitivity(aggregation: str, rescale: bool) -> None:
    rows = random_rows(21)
    settings: dict[str, Any] = dict(drop=0.4, aggregation=aggregation, rescale=rescale, coefficient=0.7)
    votes = agreement(rows * masks_of(3, 0.4))
    effect = operator("dare_ties").effect(3, agreeing=votes, **settings)
    found = jacobian_norms(shipped("dare_ties", **settings), rows)
    np.testing.assert_allclose(found, effect.sensitivity, rtol=1e-6)
    ceiling = operator("dare_ties").effect(3, **settings).sensitivity
    assert ceiling is not None
    assert np.all(found <= ceiling * (1 + 1e-6))


def test_della_probabilities_are_the_shipped_ones() -> None:
    rows = random_rows(3, 4, 9)
    for kind in ("rank", "step", "magnitude"):
        mine = np.stack([drop_probabilities(row, 0.3, 0.14, kind) for row in rows])
        theirs = shipped_probabilities(torch.from_numpy(np.abs(rows)), 0.3, 0.14, kind).numpy()  # type: ignore[arg-type]
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)


def gram_of(rows: Array) -> Array:
    return rows @ rows.T


SPAN: list[tuple[str, dict[str, Any], int]] = [
    ("model_stock", {"scope": "global"}, 3),
    ("model_stock", {"scope": "global", "average": "angle"}, 4),
    ("slerp", {"scope": "global", "t": 0.3, "on": "task_vectors"}, 2),
    ("slerp", {"scope": "global", "t": 0.7, "on": "task_vectors", "magnitude": "interpolated"}, 2),
    ("slerp", {"scope": "global", "t": 0.5, "on": "weights"}, 2),
    ("multi_slerp", {"scope": "global", "on": "task_vectors"}, 3),
    ("multi_slerp", {"scope": "global", "on": "weights", "coefficients": [1.0, 2.0, 0.5]}, 3),
    ("multi_slerp", {"scope": "global", "on": "task_vectors", "projection": "logarithm", "normalize": False}, 3),
    ("karcher", {"scope": "global", "on": "task_vectors", "max_iter": 400.0, "tolerance": 1e-13}, 3),
    ("karcher", {"scope": "global", "on": "weights", "max_iter": 400.0, "tolerance": 1e-13}, 3),
]


@pytest.mark.parametrize(("name", "settings", "experts"), SPAN, ids=[f"{i}-{row[0]}" for i, row in enumerate(SPAN)])
def test_span_methods_from_the_gram_alone(name: str, settings: dict[str, Any], experts: int) -> None:
    rows = random_rows(31, experts) + 0.7
    base = np.random.default_rng(7).standard_normal(SIZE)
    vectors = rows + base if settings.get("on") == "weights" else rows
    effect = operator(name).effect(experts, gram=gram_of(vectors), **settings)
    found = jacobian_norms(shipped(name, **settings), rows, 1e-5)
    np.testing.assert_allclose(found, effect.sensitivity, rtol=2e-6)


def test_span_methods_per_tensor_take_the_worst_tensor() -> None:
    rows = random_rows(8, 3) + 0.4
    pieces = [slice(0, 12), slice(12, 18), slice(18, 23)]
    grams = np.stack([gram_of(rows[:, piece]) for piece in pieces])
    effect = operator("model_stock").effect(3, gram=grams)
    np.testing.assert_allclose(jacobian_norms(shipped("model_stock"), rows), effect.sensitivity, rtol=2e-6)


def test_trap_model_stock_with_a_frozen_ratio_is_too_small() -> None:
    rows = random_rows(0, 3) + 0.5
    rows[0] *= 0.05  # a short task vector turns easily
    found = jacobian_norms(shipped("model_stock", scope="global"), rows, 1e-7)
    frozen, full = model_stock_sensitivity(gram_of(rows))
    np.testing.assert_allclose(found, full, rtol=1e-5)
    assert found[0] > 5 * frozen[0]


def test_slerp_at_a_right_angle_is_above_its_weight() -> None:
    rows = np.zeros((2, SIZE))
    rows[0, 0] = rows[1, 1] = 1.0
    settings: dict[str, Any] = dict(on="task_vectors", scope="global")
    c = operator("slerp").effect(2, gram=gram_of(rows), **settings).sensitivity
    found = jacobian_norms(shipped("slerp", **settings), rows)
    np.testing.assert_allclose(found, c, rtol=1e-6)
    assert found[0] > np.sqrt(0.5) * 1.1


def test_karcher_of_two_is_slerp_with_interpolated_lengths() -> None:
    gram = gram_of(random_rows(2, 2) + 0.5)
    one = operator("karcher").effect(2, gram=gram, coefficients=[0.7, 0.3], on="task_vectors").sensitivity
    two = operator("slerp").effect(2, gram=gram, t=0.3, magnitude="interpolated", on="task_vectors").sensitivity
    np.testing.assert_allclose(one, two, rtol=1e-7)


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (2, 5)])
def test_iso_c_local_sensitivity(shape: tuple[int, int]) -> None:
    layout, size = {"w": shape}, shape[0] * shape[1]
    rows, weights = random_rows(17, 3, size), [1.0, -0.5, 2.0]
    total = sum(w * row.reshape(shape) for w, row in zip(weights, rows, strict=True))
    spectrum = np.linalg.svd(total, compute_uv=False)
    effect = operator("iso_c").effect(3, coefficient=0.8, coefficients=weights, spectra=[(spectrum, shape)])
    found = jacobian_norms(shipped("iso_c", layout, coefficient=0.8, coefficients=weights), rows)
    np.testing.assert_allclose(found, effect.sensitivity, rtol=1e-5)
    assert iso_c_gain([1.0, 0.0], (2, 2)) == np.inf


@pytest.mark.parametrize("shape", [(4, 3), (2, 7), (3, 3)])
def test_wudi_exact_local_sensitivity(shape: tuple[int, int]) -> None:
    layout, size = {"w": shape}, shape[0] * shape[1]
    rows = random_rows(23, 3, size)
    parts = rows.reshape(3, *shape)
    effect = operator("wudi").effect(3, solver="exact", coefficient=0.8, matrices_of_experts=[parts])
    found = jacobian_norms(shipped("wudi", layout, solver="exact", coefficient=0.8), rows)
    np.testing.assert_allclose(found, effect.sensitivity, rtol=1e-4)
    assert np.all(effect.sensitivity <= found * (1 + 1e-6))  # a lower estimate


def test_trap_wudi_is_not_regmean_with_frozen_matrices() -> None:
    parts = random_rows(23, 3, 12).reshape(3, 4, 3)
    grams = np.stack([D.T @ D / (D**2).sum() for D in parts])
    inverse = np.linalg.inv(grams.sum(axis=0))
    frozen = np.array([np.linalg.norm(G @ inverse, 2) for G in grams])
    found = jacobian_norms(shipped("wudi", {"w": (4, 3)}, solver="exact"), parts.reshape(3, -1))
    assert np.any(found > 1.2 * frozen)


# --- no guarantee means no guarantee ----------------------------------------------------------------------------------

JUMPING: list[tuple[str, dict[str, Any], int]] = [
    ("ties", {"density": 0.4}, 3),
    ("dare_ties", {"drop": 0.3}, 3),
    ("della", {}, 3),
    ("breadcrumbs", {"density": 0.5}, 3),
    ("sce", {"density": 0.5}, 3),
    ("consensus_ta", {}, 3),
    ("consensus_ties", {"density": 0.6}, 3),
    ("magmax", {}, 3),
    ("emr", {}, 3),
    ("pcb", {"density": 0.4}, 3),
    ("adamerging_pp", {"coefficients": [0.3, 0.3, 0.3], "density": 0.5}, 3),
    ("tsv_m", {}, 2),
    ("iso_cts", {"common": 0.5}, 2),
    ("knots", {}, 2),
]


@pytest.mark.parametrize(("name", "settings", "experts"), JUMPING, ids=[row[0] for row in JUMPING])
def test_no_guarantee_where_a_pair_breaks_every_constant(name: str, settings: dict[str, Any], experts: int) -> None:
    merge = shipped(name, **settings)
    assert any(steepest(merge, random_rows(s, experts), random_rows(s + 50, experts)) > 1e5 for s in range(6))
    effect = operator(name).effect(experts, **settings)
    assert effect.guarantee in ("local", "none")
    assert effect.tier == "estimated"


def test_singular_points_of_the_others() -> None:
    """Iso-C and WUDI at a drop of rank, SLERP at its threshold, Model Stock and multi-SLERP at zero vectors."""
    low = np.array([[1.0, 0.0, 0.0, 1e-7], [1.0, 0.0, 0.0, -1e-7]])[:, None].repeat(1, axis=1)
    merge = shipped("iso_c", {"w": (2, 2)})
    assert np.linalg.norm(merge(low[0]) - merge(low[1])) > 1e5 * np.linalg.norm(low[0] - low[1])
    settings: dict[str, Any] = dict(on="task_vectors", scope="global", threshold=0.9)
    slerp = shipped("slerp", **settings)
    angle = np.arccos(0.9)
    pair = np.zeros((2, 2, SIZE))
    for side, sign in enumerate((1, -1)):
        pair[side, 0, 0] = 1.0
        pair[side, 1, :2] = np.cos(angle + sign * 1e-9), np.sin(angle + sign * 1e-9)
    assert np.linalg.norm(slerp(pair[0]) - slerp(pair[1])) > 1e5 * np.linalg.norm(pair[0] - pair[1])
    for name, more in (
        ("model_stock", {"scope": "global"}),
        ("multi_slerp", {"scope": "global", "on": "task_vectors"}),
    ):
        rows = random_rows(1, 2)
        other = rows.copy()
        rows[0] *= 1e-10
        other[0] *= -1e-10
        merged = shipped(name, **more)
        assert np.linalg.norm(merged(rows) - merged(other)) > 1e5 * np.linalg.norm(rows - other)
    for name in ("model_stock", "slerp", "multi_slerp", "karcher", "iso_c", "wudi", "greedy_soup"):
        assert operator(name).effect(2).sensitivity is None


# --- random masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [True, False])
def test_dare_moments_and_dispersion_by_monte_carlo(rescale: bool) -> None:
    rows, drop, seeds = random_rows(40), 0.4, 600
    settings: dict[str, Any] = dict(drop=drop, rescale=rescale, coefficient=0.5, coefficients=[1.0, 2.0, -1.0])
    effect: Effect = operator("dare").effect(3, **settings)
    assert effect.mean is not None
    assert effect.noise is not None
    gram, p = gram_of(rows), np.array([0.5, 0.3, 0.2])
    draws = np.stack([shipped("dare", seed=seed, **settings)(rows) for seed in range(seeds)])
    away = ((draws - effect.mean @ rows) ** 2).sum(axis=1)
    np.testing.assert_allclose(away.mean(), effect.noise @ np.diag(gram), atol=5 * away.std() / np.sqrt(seeds))
    V = ((draws[:, None, :] - rows[None]) ** 2).sum(axis=2) @ p
    np.testing.assert_allclose(V.mean(), effect.dispersion(gram, p), atol=5 * V.std() / np.sqrt(seeds))
    np.testing.assert_allclose(
        draws.mean(axis=0), effect.mean @ rows, atol=5 * draws.std(axis=0).max() / np.sqrt(seeds)
    )
    bias = ((effect.mean - effect.reference) @ rows) ** 2
    np.testing.assert_allclose(effect.bias(gram), bias.sum(), rtol=1e-9, atol=1e-12)
    assert (effect.bias(gram) == 0) == rescale
    moved = rows.copy()
    moved[1] += np.random.default_rng(0).standard_normal(SIZE)
    gaps = np.array([
        ((shipped("dare", seed=seed, **settings)(moved) - draw) ** 2).sum() for seed, draw in enumerate(draws[:400])
    ])  # fmt: skip
    distance = ((moved - rows) ** 2).sum()
    assert effect.sensitivity is not None
    assert effect.surely is not None
    np.testing.assert_allclose(
        gaps.mean() / distance, effect.sensitivity[1] ** 2, atol=5 * gaps.std() / distance / np.sqrt(len(gaps))
    )
    assert gaps.max() / distance <= effect.surely[1] ** 2 * (1 + 1e-9)


def test_trap_the_root_mean_square_does_not_hold_for_every_seed() -> None:
    effect = operator("dare").effect(1, drop=0.75, coefficient=1.0)
    moved = np.zeros((2, 1, SIZE))
    moved[1, 0, 3] = 1.0
    ratios = [
        np.linalg.norm(merge(moved[1]) - merge(moved[0]))
        for merge in (shipped("dare", drop=0.75, coefficient=1.0, seed=seed) for seed in range(30))
    ]
    assert effect.sensitivity is not None
    assert effect.surely is not None
    assert max(ratios) > effect.sensitivity[0] * 1.5
    np.testing.assert_allclose(max(ratios), effect.surely[0])


@pytest.mark.parametrize("rescale", [True, False])
def test_della_second_moment_by_monte_carlo(rescale: bool) -> None:
    shapes = {"w": (12,)}
    rows, seeds, alpha = random_rows(6, 2, 12), 700, np.array([0.5, -0.8])
    settings: dict[str, Any] = dict(drop=0.4, window=0.5, election="none", aggregation="sum", rescale=rescale)
    chances = np.stack([drop_probabilities(row, 0.4, 0.5) for row in rows])
    draws = np.stack([
        shipped("della", shapes, seed=seed, coefficients=alpha.tolist(), **settings)(rows) for seed in range(seeds)
    ])  # fmt: skip
    exact = mask_variance(rows, chances, alpha, rescale=rescale)
    mean = alpha @ (rows if rescale else rows * (1 - chances))
    away = ((draws - mean) ** 2).sum(axis=1)
    np.testing.assert_allclose(away.mean(), exact, atol=5 * away.std() / np.sqrt(seeds))
    effect = operator("della").effect(2, coefficients=alpha, probabilities=chances, **settings)
    assert effect.noise is not None
    assert exact <= effect.noise @ np.diag(gram_of(rows)) * (1 + 1e-12)
    keep = 1 / (1 - chances) if rescale else 1 - chances
    np.testing.assert_allclose(effect.sensitivity, np.abs(alpha) * np.sqrt(keep.max(axis=1)))


def test_della_adds_less_than_dare_for_concentrated_mass_and_more_for_equal_magnitudes() -> None:
    p = drop_probabilities(np.arange(8, 0, -1.0), 0.5, 0.6)
    dare = np.full(8, 0.5)
    peak, flat = np.array([1.0, *[0.05] * 7]), np.ones(8)
    assert mask_variance(peak, p, 1.0) < mask_variance(peak, dare, 1.0)
    assert mask_variance(flat, p, 1.0) > mask_variance(flat, dare, 1.0)


def test_della_without_window_is_dare() -> None:
    given: dict[str, Any] = dict(drop=0.4, coefficient=0.5, coefficients=[1.0, 2.0])
    one = operator("della").effect(2, window=0.0, election="none", aggregation="sum", **given)
    two = operator("dare").effect(2, **given)
    assert one.guarantee == two.guarantee == "mean square"
    np.testing.assert_allclose(one.sensitivity, two.sensitivity)
    np.testing.assert_allclose(one.noise, two.noise)


def test_trap_magnitude_probabilities_are_not_lipschitz_in_mean_square() -> None:
    """``E|M - M'|^2`` is of first order in the distance: the ratio grows without bound as the pair gets closer."""
    x = np.array([3.0, 2.0, 1.0])
    ratios = []
    for step in (1e-2, 1e-4, 1e-6):
        y = x + np.array([0.0, step, 0.0])
        p, q = (drop_probabilities(v, 0.4, 0.4, "magnitude") for v in (x, y))
        low, high = np.minimum(1 - p, 1 - q), np.abs(p - q)  # a shared uniform: both kept, or one of them alone
        single = np.where(p < q, x / (1 - p), y / (1 - q))
        ratios.append((low * (x / (1 - p) - y / (1 - q)) ** 2 + high * single**2).sum() / step**2)
    assert ratios[1] > 50 * ratios[0]
    assert ratios[2] > 50 * ratios[1]
    assert operator("della").effect(2, election="none", probability="magnitude").sensitivity is None


# --- trimming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.1, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("p", [[0.5, 0.5], [0.2, 0.8]])
def test_trimming_disjoint_supports_lowers_dispersion_iff_lambda_exceeds_twice_the_weight(
    lam: float, p: list[float]
) -> None:
    rows = np.zeros((2, 10))
    rows[0, :5], rows[1, 5:] = [1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 4.0, 3.0, 2.0, 1.0]
    shapes = {"w": (10,)}

    def V(merged: Array) -> float:
        return float(sum(w * ((merged - row) ** 2).sum() for w, row in zip(p, rows, strict=True)))

    full = V(shipped("task_arithmetic", shapes, coefficient=lam)(rows))
    kept = trimmed(rows, 0.2)  # the two largest of each
    for i in range(2):
        half = rows.copy()
        half[i] = kept[i]
        change = V(lam * half.sum(axis=0)) - full
        expected = trim_change(p[i], lam, np.linalg.norm(rows[i] - kept[i]))
        np.testing.assert_allclose(change, expected, atol=1e-9)
        if abs(lam - 2 * p[i]) > 1e-9:
            assert (change < 0) == (lam > 2 * p[i])
    both = V(shipped("ties", shapes, density=0.2, aggregation="sum", coefficient=lam)(rows)) - full
    total = sum(float(trim_change(p[i], lam, np.linalg.norm(rows[i] - kept[i]))) for i in range(2))
    np.testing.assert_allclose(both, total, atol=1e-9)  # the shipped TIES, where supports are disjoint


def test_fisher_minimises_the_dispersion_in_the_fisher_norms() -> None:
    rows = random_rows(1)
    merged = shipped("fisher", fisher=[named(row, SHAPES) for row in FISHER], floor=0.0)(rows)

    def V(point: Array) -> float:
        return float((FISHER * (point - rows) ** 2).sum())

    rng = np.random.default_rng(0)
    assert all(V(merged) < V(merged + 0.01 * rng.standard_normal(SIZE)) for _ in range(50))
    gradient = (FISHER * (merged - rows)).sum(axis=0)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-9)
    plain = rows.mean(axis=0)
    assert ((merged - rows) ** 2).sum() > ((plain - rows) ** 2).sum()  # isotropic V can only rise


def test_shared_operators_are_sound_for_settings_over_configurations() -> None:
    drops = np.linspace(0, 0.9, 7)
    effect = operator("dare").effect(3, drop=drops, coefficients=np.ones((3, 7)) * 0.2, coefficient=1.0)
    assert effect.sensitivity is not None
    for k, drop in enumerate(drops):
        one = operator("dare").effect(3, drop=drop, coefficients=0.2, coefficient=1.0)
        np.testing.assert_allclose(effect.sensitivity[:, k], one.sensitivity)
    lam = np.array([0.1, 0.5])
    np.testing.assert_allclose(operator("ties").effect(3, coefficient=lam).sensitivity, np.stack([lam] * 3))
    np.testing.assert_allclose(operator("wise_ft").effect(4, alpha=lam).sensitivity, np.stack([lam / 4] * 4))
    rows = random_rows(3)
    several = operator("ties").effect(3, coefficient=lam, task_vectors=rows).sensitivity
    assert several is not None
    assert several.shape == (3, 2)
