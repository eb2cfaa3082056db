"""Every fast path against its definition: random shapes, types, ties, zeros, denormals, NaN and infinities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from merging.errors import CheckpointError, MethodError
from merging.settings import Gradient, PerLayer, Rule
from tests.merging.streamed import State, assert_same, bits, defined, saved, streamed

LARGE = float(np.finfo(np.float32).max)
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (3,), (2, 0, 5), (17,), (31, 7), (127,), (4, 5, 6), (1, 257)]
TYPES = [torch.float32] * 4 + [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
KINDS = ["normal", "ties", "zeros", "signs", "denormal", "large"]
NAMES = ["blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "norm.running_mean", "norm.running_var", "z.1.w"]

METHODS: list[tuple[str, dict[str, Any], str]] = [
    ("average", {}, "none"),
    ("weighted", {"normalize": False}, "given"),
    ("task_arithmetic", {"coefficient": -0.7}, "any"),
    ("wise_ft", {"alpha": 0.3}, "none"),
    ("lines", {"alpha": 0.9, "beta": 0.7}, "none"),
    ("risk_optimal", {}, "given"),
    ("magmax", {"coefficient": -0.7}, "none"),
    ("ties", {"density": 0.3}, "any"),
    ("ties", {"density": 0.3, "scope": "tensor"}, "none"),
    ("ties", {"density": 0.07, "rounding": "down", "aggregation": "sum", "coefficient": 0.4}, "none"),
    ("ties", {"density": 0.5, "election": "weighted", "aggregation": "sum"}, "given"),
    ("ties", {"density": 0.5, "election": "weighted"}, "positive"),
    ("dare", {"drop": 0.4}, "any"),
    ("dare", {"drop": 0.0, "rescale": False}, "any"),
    ("dare_ties", {"drop": 0.4}, "none"),
    ("dare_ties", {"drop": 0.7, "election": "weighted", "aggregation": "sum"}, "given"),
    ("consensus_ta", {}, "none"),
    ("emr", {}, "none"),
    ("breadcrumbs", {}, "none"),
    ("model_stock", {"scope": "row"}, "none"),
]


@dataclass(frozen=True)
class Case:
    """Checkpoints and a merge, from a few numbers."""

    seed: int
    method: int
    kind: str
    experts: int
    own_types: bool
    positive: bool

    def build(self) -> tuple[str, dict[str, Any], State, dict[str, State]]:
        rng = np.random.default_rng(self.seed)
        names = [NAMES[i] for i in rng.permutation(len(NAMES))[: rng.integers(1, 5)]]
        if all("running" in name for name in names):
            names.append("blocks.2.weight")
        shapes = {name: SHAPES[rng.integers(len(SHAPES))] for name in names}
        types = {name: TYPES[rng.integers(len(TYPES))] for name in names}

        def checkpoint(own: bool) -> State:
            state = {}
            for name in names:
                values = drawn(rng, self.kind, shapes[name])
                dtype = TYPES[rng.integers(len(TYPES))] if own else types[name]
                values = values if dtype == torch.float32 else np.clip(values, -400, 400)
                state[name] = torch.tensor(np.asarray(values, dtype=np.float32)).reshape(shapes[name]).to(dtype)
            return state

        method, chosen, weights = METHODS[self.method]
        signs = [1.0 if weights == "positive" or self.positive else (-1.0) ** i for i in range(self.experts)]
        given = weights in ("given", "positive") or (weights == "any" and self.positive)
        coefficients = [0.3 * sign * (i + 1) for i, sign in enumerate(signs)] if given else None
        base = checkpoint(False)
        experts = {f"e{i:02d}": checkpoint(self.own_types) for i in rng.permutation(self.experts)}
        return method, {**chosen, "coefficients": coefficients, "seed": 3}, base, experts


CASES = st.builds(
    Case,
    seed=st.integers(0, 2**32 - 1),
    method=st.integers(0, len(METHODS) - 1),
    kind=st.sampled_from(KINDS),
    experts=st.sampled_from([2, 3, 8, 1, 17]),
    own_types=st.booleans(),
    positive=st.booleans(),
)
WAYS = st.fixed_dictionaries(
    {"chunk": st.sampled_from([64, 101, 1 << 18]), "threads": st.integers(1, 3), "mapped": st.booleans()}
)


def drawn(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> Any:
    values = np.asarray(rng.standard_normal(shape))
    if kind == "ties":
        return np.round(values * 2) / 2
    if kind == "zeros":
        return np.where(rng.random(shape) < 0.7, 0.0, values)
    if kind == "signs":
        return np.where(rng.random(shape) < 0.5, np.copysign(0.0, values), np.sign(values))
    if kind == "denormal":
        return values * 1e-39
    if kind == "large":  # differences that overflow
        return np.where(rng.random(shape) < 0.005, np.copysign(LARGE, values), values)
    return values


def usable(case: Case) -> bool:
    return case.experts > 1 or METHODS[case.method][0] not in ("consensus_ta", "model_stock")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(case=CASES.filter(usable), way=WAYS, on_disk=st.booleans())
def test_same_bits_or_same_words(
    case: Case, way: dict[str, Any], on_disk: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    method, arguments, base, experts = case.build()
    expected = defined(method, base, experts, **arguments)
    folder = tmp_path_factory.mktemp("case")
    states: Any = saved(folder, base, experts) if on_disk else (base, experts)
    assert_same(streamed(method, *states, folder / "out.safetensors", **way, **arguments), expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    case=CASES.filter(usable),
    way=WAYS,
    value=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    place=st.integers(0, 2**31),
)
def test_not_a_number_is_named(
    case: Case, way: dict[str, Any], value: float, place: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In the base, in an expert, in running statistics, among what is trimmed, dropped or voted down."""
    method, arguments, base, experts = case.build()
    states = [base, *experts.values()]
    state = states[place % len(states)]
    full = [name for name, tensor in state.items() if tensor.numel()]
    if not full:
        return
    name = full[place // 7 % len(full)]
    poisoned = state[name].float().reshape(-1)
    poisoned[place // 11 % poisoned.numel()] = value
    state[name] = poisoned.reshape(state[name].shape)
    expected = defined(method, base, experts, **arguments)
    found = streamed(method, base, experts, tmp_path_factory.mktemp("case") / "out.safetensors", **way, **arguments)
    assert isinstance(expected, tuple)
    assert isinstance(found, tuple)
    if found != expected:  # of several things that are wrong, each names the one that it meets first
        assert "large" in (case.kind, method) or METHODS[case.method][0] == "lines"
        assert found[0] in (CheckpointError, MethodError)


OPPOSITE: list[tuple[str, dict[str, Any]]] = [
    ("ties", {}),
    ("ties", {"density": 1.0}),
    ("ties", {"density": 0.5, "scope": "tensor", "aggregation": "sum"}),
    ("dare_ties", {"drop": 0.1}),
    ("magmax", {}),
    ("average", {}),
    ("emr", {}),
]


@pytest.mark.parametrize(("method", "settings_"), OPPOSITE)
def test_differences_that_overflow_in_opposite_directions(
    method: str, settings_: dict[str, Any], tmp_path: Path
) -> None:
    """Infinite differences of finite weights cancel to no number, which no election may hide."""
    base = {"a": torch.zeros(40), "b": torch.tensor([-LARGE, LARGE, 0.5, 1.0])}
    moved = {"up": [LARGE, LARGE, 0.0, 1.0], "down": [-LARGE, -LARGE, 0.0, 2.0], "still": [0.0, 0.0, 0.0, 0.0]}
    experts = {who: {"a": torch.zeros(40), "b": torch.tensor(values)} for who, values in moved.items()}
    expected = defined(method, base, experts, **settings_)
    assert isinstance(expected, tuple)
    assert expected[0] is MethodError
    assert_same(streamed(method, base, experts, tmp_path / "out.safetensors", **settings_), expected)


def test_nothing_kept_is_nothing_even_of_infinite_differences(tmp_path: Path) -> None:
    base = {"a": torch.tensor([-LARGE, 1.0])}
    experts = {"one": {"a": torch.tensor([LARGE, 2.0])}, "two": {"a": torch.tensor([0.0, 2.0])}}
    given = {"density": 0.1, "rounding": "down"}
    expected = defined("ties", base, experts, **given)
    assert not isinstance(expected, tuple)
    assert bits(expected["a"]).tolist() == bits(base["a"]).tolist()
    assert_same(streamed("ties", base, experts, tmp_path / "out.safetensors", **given), expected)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("method", ["average", "ties", "weighted"])
def test_an_infinite_variance_is_not_clamped_away(method: str, value: float, tmp_path: Path) -> None:
    base = {"a": torch.zeros(4), "norm.running_var": torch.ones(3)}
    experts = {who: {name: tensor.clone() for name, tensor in base.items()} for who in ("one", "two")}
    experts["two"]["norm.running_var"][1] = value
    coefficients = [0.5, -0.5] if method == "weighted" else None
    arguments = {"coefficients": coefficients} | ({"normalize": False} if method == "weighted" else {})
    expected = defined(method, base, experts, **arguments)
    assert isinstance(expected, tuple)
    assert expected[1].startswith("two: tensor 'norm.running_var' holds 1 NaN")
    assert_same(streamed(method, base, experts, tmp_path / "out.safetensors", **arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_results_that_overflow_their_storage_type(dtype: torch.dtype, tmp_path: Path) -> None:
    limit = torch.finfo(dtype).max
    base = {"a": torch.zeros(7), "b": torch.zeros(200).to(dtype)}
    experts = {who: {"a": torch.ones(7), "b": torch.full((200,), limit).to(dtype)} for who in ("one", "two")}
    for coefficient, fits in ((0.5, True), (3.0, False)):
        expected = defined("task_arithmetic", base, experts, coefficient=coefficient)
        assert isinstance(expected, tuple) is not (fits or dtype == torch.float8_e4m3fn)  # which saturates
        for chunk in (64, 1 << 18):
            target = tmp_path / f"{coefficient}{chunk}.safetensors"
            found = streamed("task_arithmetic", base, experts, target, coefficient=coefficient, chunk=chunk)
            assert_same(found, expected)


GROUPS: list[tuple[str, dict[str, Any]]] = [
    ("ties", {"density": Gradient((0.1, 0.9))}),
    (
        "ties",
        {"rules": [Rule(r"blocks\.1\..*", {"density": 0.7, "scope": "tensor"}), Rule(".*bias", {"density": 0.9})]},
    ),
    ("ties", {"coefficient": PerLayer((0.3, 0.6)), "rules": [Rule(".*weight", {"aggregation": "sum"})]}),
    ("dare_ties", {"drop": Gradient((0.1, 0.8))}),
    ("dare", {"rules": [Rule(".*bias", {"drop": 0.9})]}),
    ("task_arithmetic", {"coefficient": Gradient((0.1, 0.5)), "rules": [Rule("z.*", {}, [1.0, 2.0, -3.0])]}),
    ("lines", {"alpha": 0.5, "rules": [Rule(".*bias", {"beta": 0.1})]}),
    ("weighted", {"coefficients": {"e2": 1.0, "e0": Gradient((0.5, 2.0)), "e1": 0.25}}),
]


@pytest.mark.parametrize(("method", "given_"), GROUPS)
def test_settings_of_single_tensors(method: str, given_: dict[str, Any], tmp_path: Path) -> None:
    """Entries are ranked over the whole model also where only some tensors have a density."""
    rng = np.random.default_rng(1)
    shapes = {"blocks.0.weight": (9, 40), "blocks.0.bias": (9,), "blocks.1.weight": (31, 7), "z.w": (5,), "z.e": (0,)}

    def checkpoint() -> State:
        return {name: torch.tensor(np.float32(np.round(rng.standard_normal(s), 1))) for name, s in shapes.items()}

    base = checkpoint()
    experts = {f"e{i}": checkpoint() for i in (2, 0, 1)}
    expected = defined(method, base, experts, **given_)
    ordered = dict(given_)
    if isinstance(ordered.get("coefficients"), dict):
        ordered["coefficients"] = [ordered["coefficients"][name] for name in experts]
    for chunk, threads in ((1 << 18, 1), (37, 3)):
        found = streamed(
            method, base, experts, tmp_path / f"{chunk}.safetensors", chunk=chunk, threads=threads, **ordered
        )
        assert not isinstance(found, tuple), found
        assert_same(found, expected)


@pytest.mark.parametrize("experts", [1, 2, 17])
@pytest.mark.parametrize("method", ["average", "weighted", "magmax", "ties", "dare", "dare_ties"])
def test_chunks_of_one_entry(method: str, experts: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(experts)

    def checkpoint() -> State:
        return {"a": torch.tensor(np.float32(np.round(rng.standard_normal(29), 1))), "b": torch.tensor(1.5)}

    base, states = checkpoint(), {f"e{i:02d}": checkpoint() for i in range(experts)}
    coefficients = [0.1 * (i + 1) for i in range(experts)] if method == "weighted" else None
    expected = defined(method, base, states, coefficients=coefficients)
    for chunk in (1, 3, 7):
        target = tmp_path / f"{chunk}.safetensors"
        assert_same(streamed(method, base, states, target, chunk=chunk, threads=2, coefficients=coefficients), expected)


@pytest.mark.parametrize("method", ["average", "weighted"])
def test_zeros_keep_or_lose_their_signs_without_a_base(method: str, tmp_path: Path) -> None:
    states = {who: {"a": torch.tensor([-0.0, 0.0, -1.0, 1e-45])} for who in ("b", "a")}
    coefficients = [0.25, 0.75] if method == "weighted" else None
    expected = defined(method, None, states, coefficients=coefficients)
    assert_same(streamed(method, None, states, tmp_path / "out.safetensors", coefficients=coefficients), expected)


def test_without_a_base_the_right_expert_is_named(tmp_path: Path) -> None:
    """Shapes and types come from the first by name, which errors call the base; the others keep their names."""
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    for experts in ({"b": {"a": bad}, "a": {"a": good}}, {"b": {"a": good}, "a": {"a": bad}}):
        expected = defined("average", None, experts)
        assert isinstance(expected, tuple)
        assert_same(streamed("average", None, experts, tmp_path / "out.safetensors"), expected)


SPANS: list[tuple[str, dict[str, Any]]] = [
    ("slerp", {}),
    ("slerp", {"scope": "global", "on": "task_vectors", "magnitude": "interpolated"}),
    ("karcher", {}),
    ("karcher", {"scope": "global", "on": "task_vectors"}),
    ("model_stock", {}),
    ("model_stock", {"scope": "global", "average": "angle"}),
]


@pytest.mark.parametrize(("method", "settings_"), SPANS)
@pytest.mark.parametrize("what", ["fine", "nan", "inf", "-inf", "over"])
@pytest.mark.filterwarnings("error::RuntimeWarning:merging.streaming")
def test_inner_products_of_anything(method: str, settings_: dict[str, Any], what: str, tmp_path: Path) -> None:
    """Also where the tensor that is not a number comes last and the problem is one for the whole model."""
    rng = np.random.default_rng(2)
    shapes = {"a": (7, 9), "e": (0, 3), "norm.running_var": (4,), "s": (), "z": (3,)}

    def checkpoint() -> State:
        return {name: torch.tensor(np.float32(np.abs(rng.standard_normal(shape)))) for name, shape in shapes.items()}

    base, experts = checkpoint(), {name: checkpoint() for name in ("b", "a")}
    if what == "over":
        base["z"][0], experts["b"]["z"][0] = -LARGE, LARGE
    elif what != "fine":
        experts["b"]["z"][1] = float(what)
    with np.errstate(all="ignore"):
        expected = defined(method, base, experts, **settings_)
    assert isinstance(expected, tuple) is (what != "fine")
    for chunk, threads in ((1 << 18, 1), (5, 3)):
        target = tmp_path / f"{chunk}.safetensors"
        found = streamed(method, base, experts, target, chunk=chunk, threads=threads, **settings_)
        if isinstance(expected, tuple) or isinstance(found, tuple):
            assert found == expected
            continue
        for name, tensor in found.items():
            assert torch.allclose(tensor, expected[name], rtol=1e-6, atol=0), name
