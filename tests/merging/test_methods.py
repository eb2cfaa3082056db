"""The first methods against their definitions in a few lines of numpy (declared properties: ``tests/conformance``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from merging.errors import CheckpointError, MethodError
from merging.mergekit_arithmetic import FAMILY, Row, arithmetic
from merging.method import Parameter
from merging.methods.average import average
from merging.methods.dare import dare
from merging.methods.risk_optimal import risk_optimal
from merging.methods.task_arithmetic import task_arithmetic
from merging.methods.ties import kept, largest, ties
from merging.methods.weighted import weighted
from merging.registry import get

Array = NDArray[np.float64]
SHAPES = {"a": (3, 5), "b": (4,), "c": (), "d": (0, 2), "e": (2, 2, 2)}
NAMES = list(SHAPES)


def vectors(seed: int, experts: int, ties_in_values: bool = False) -> list[dict[str, Tensor]]:
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(experts):
        values = {n: generator.normal(size=s) for n, s in SHAPES.items()}
        if ties_in_values:
            values = {n: np.round(v) / 2 for n, v in values.items()}
        drawn.append({n: torch.tensor(v, dtype=torch.float32) for n, v in values.items()})
    return drawn


def flat(vector: dict[str, Tensor]) -> Array:
    return np.concatenate([vector[n].numpy().astype(np.float64).ravel() for n in NAMES])


def numpy_trim(values: Array, density: float, rounding: str) -> Array:
    share = round(density * 1000) * len(values)
    count = -(-share // 1000) if rounding == "up" else share // 1000
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))  # of equal magnitudes, the first
    result = np.zeros_like(values)
    result[order[:count]] = values[order[:count]]
    return result


def numpy_ties(
    taus: list[dict[str, Tensor]], density: float, scope: str, aggregation: str, coefficient: float, rounding: str
) -> Array:
    if scope == "global":
        trimmed = np.stack([numpy_trim(flat(t), density, rounding) for t in taus])
    else:
        rows = [[numpy_trim(t[n].numpy().astype(float).ravel(), density, rounding) for n in NAMES] for t in taus]
        trimmed = np.stack([np.concatenate(row) for row in rows])
    gamma = np.sign(trimmed.sum(axis=0))
    merged = np.zeros(trimmed.shape[1])
    for j in range(trimmed.shape[1]):
        agreeing = [v for v in trimmed[:, j] if np.sign(v) == gamma[j] != 0]
        if agreeing:
            merged[j] = np.mean(agreeing) if aggregation == "mean" else np.sum(agreeing)
    return coefficient * merged


def close(merged: dict[str, Tensor], expected: Array) -> None:
    assert {n: tuple(t.shape) for n, t in merged.items()} == SHAPES
    np.testing.assert_allclose(flat(merged), expected, rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 999), experts=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_linear_methods_are_their_definitions(seed: int, experts: int) -> None:
    taus = vectors(seed, experts)
    stacked = np.stack([flat(t) for t in taus])
    alpha = np.random.default_rng(seed).uniform(-1, 2, experts)
    close(average(taus), stacked.mean(axis=0))
    close(task_arithmetic(taus, coefficient=0.4), 0.4 * stacked.sum(axis=0))
    close(task_arithmetic(taus, coefficient=0.4, coefficients=alpha), 0.4 * alpha @ stacked)
    close(risk_optimal(taus, coefficients=alpha), alpha @ stacked)
    close(weighted(taus, coefficients=alpha, normalize=False), alpha @ stacked)
    weights = np.abs(alpha) + 0.1
    close(weighted(taus, coefficients=weights), weights / weights.sum() @ stacked)


@given(
    seed=st.integers(0, 999),
    experts=st.integers(1, 6),
    density=st.sampled_from([0.05, 0.2, 0.3, 0.5, 0.9, 1.0]),
    scope=st.sampled_from(["global", "tensor"]),
    aggregation=st.sampled_from(["mean", "sum"]),
    rounding=st.sampled_from(["up", "down"]),
    tied=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_ties_is_its_definition(
    seed: int, experts: int, density: float, scope: Any, aggregation: Any, rounding: Any, tied: bool
) -> None:
    taus = vectors(seed, experts, tied)
    merged = ties(taus, density=density, scope=scope, aggregation=aggregation, coefficient=0.7, rounding=rounding)
    close(merged, numpy_ties(taus, density, scope, aggregation, 0.7, rounding))


def test_ties_applies_coefficients_after_the_election() -> None:
    taus = [{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([-3.0, 1.0])}, {"x": torch.tensor([1.0, 1.0])}]
    alpha = (0.6, 0.1, 0.3)
    # signs: 1 - 3 + 1 < 0 whatever the coefficients; the second coordinate is all positive
    mean = ties(taus, density=1.0, coefficients=alpha)["x"]
    torch.testing.assert_close(mean, torch.tensor([-3.0, 1.2 + 0.1 + 0.3]))
    total = ties(taus, density=1.0, aggregation="sum", coefficients=alpha)["x"]
    torch.testing.assert_close(total, torch.tensor([-0.3, 1.6]))
    with pytest.raises(MethodError, match="positive coefficients"):
        ties(taus, coefficients=(1.0, 0.0, 1.0))


def test_ties_elects_by_the_weighted_sum_where_asked() -> None:
    taus = [{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([-3.0, 1.0])}, {"x": torch.tensor([1.0, 1.0])}]
    alpha = (0.6, 0.1, 0.3)
    # signs: 0.6 - 0.3 + 0.3 > 0, where the plain sum is negative
    mean = ties(taus, density=1.0, election="weighted", coefficients=alpha)["x"]
    torch.testing.assert_close(mean, torch.tensor([1.0, 1.2 + 0.1 + 0.3]))
    total = ties(taus, density=1.0, election="weighted", aggregation="sum", coefficients=alpha)["x"]
    torch.testing.assert_close(total, torch.tensor([0.9, 1.6]))
    # a negative weight turns an expert around: 1, 3, -1 and 2, -1, -1
    turned = ties(taus, density=1.0, election="weighted", aggregation="sum", coefficients=(1.0, -1.0, -1.0))["x"]
    torch.testing.assert_close(turned, torch.tensor([4.0, 0.0]))
    plain = ties(taus, density=1.0, election="weighted")["x"]  # without coefficients there is nothing to weigh by
    torch.testing.assert_close(plain, ties(taus, density=1.0)["x"])


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_with_weights_is_mergekits_where_that_is_asked_for(normalize: bool) -> None:
    taus = vectors(3, 4)
    alpha = (0.4, 0.3, 0.2, 0.1)
    row = Row(alpha, (0.3,) * 4, (0.0,) * 4, (0.0,) * 4, normalize, False, 0.7)
    theirs = arithmetic(taus, variant=FAMILY["ties"], table={name: row for name in taus[0]}, names=tuple("abcd"))
    ours = ties(
        taus,
        density=0.3,
        scope="tensor",
        rounding="down",
        election="weighted",
        aggregation="mean" if normalize else "sum",
        coefficient=0.7,
        coefficients=alpha,
    )
    for name in taus[0]:
        torch.testing.assert_close(ours[name], theirs[name].to(ours[name]))


def test_ties_exact_cancellation_merges_to_zero() -> None:
    taus = [{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([-1.0, 2.0])}]
    assert ties(taus, density=1.0)["x"].tolist() == [0.0, 2.0]


@given(
    values=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_selection_keeps_exactly_the_first_of_equal_magnitudes(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    mask = largest(torch.tensor([values], dtype=torch.float32), count)[0]
    brute = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert sorted(brute) == torch.nonzero(mask).flatten().tolist()


def test_selection_ranks_denormals() -> None:
    tiny = torch.tensor([[1.4e-45, 4.2e-45, 2.8e-45, 0.0]])
    assert largest(tiny, 2)[0].tolist() == [False, True, True, False]


def test_kept_is_exact_in_decimals() -> None:
    assert kept(10, 0.3) == 3
    assert kept(10, 0.7) == 7  # 0.7 * 10 is 7.000000000000001 in some orders of binary arithmetic
    assert kept(2968, 0.2) == 594
    assert kept(2968, 0.2, "down") == 593
    assert kept(0, 0.2) == 0
    assert kept(3, 0.001) == 1


@given(seed=st.integers(0, 99), experts=st.integers(1, 8))
@settings(max_examples=15, deadline=None)
def test_identical_experts(seed: int, experts: int) -> None:
    tau = vectors(seed, 1)[0]
    copies = [tau] * experts
    close(average(copies), flat(tau))
    close(weighted(copies, coefficients=[1 + i for i in range(experts)]), flat(tau))
    close(ties(copies, density=1.0), flat(tau))
    close(task_arithmetic(copies, coefficient=1 / experts), flat(tau))


@given(seed=st.integers(0, 99), data=st.data())
@settings(max_examples=25, deadline=None)
def test_simplex_coefficients_stay_between_the_experts(seed: int, data: st.DataObject) -> None:
    taus = vectors(seed, 4)
    alpha = data.draw(st.lists(st.floats(0.01, 1), min_size=4, max_size=4))
    merged = flat(weighted(taus, coefficients=alpha))
    stacked = np.stack([flat(t) for t in taus])
    assert np.all(merged <= stacked.max(axis=0) + 1e-5)
    assert np.all(merged >= stacked.min(axis=0) - 1e-5)


def test_groups_of_tensors_have_their_own_coefficients() -> None:
    taus = vectors(0, 2)
    merged = risk_optimal(taus, coefficients=(1.0, 0.0), groups={"[ab]": (0.0, 1.0), "a": (9.0, 9.0)})
    for name in NAMES:
        assert torch.equal(merged[name], taus[1 if name in "ab" else 0][name])
    with pytest.raises(MethodError, match="not a regular expression"):
        risk_optimal(taus, coefficients=(1.0, 0.0), groups={"[": (0.0, 1.0)})


def test_bad_input_is_named() -> None:
    taus = vectors(0, 2)
    with pytest.raises(MethodError, match="at least one expert"):
        average([])
    with pytest.raises(MethodError, match="3 coefficients were given for 2 experts"):
        weighted(taus, coefficients=(1, 1, 1))
    with pytest.raises(MethodError, match="sum to zero"):
        weighted(taus, coefficients=(1, -1))
    with pytest.raises(MethodError, match="coefficient 2 is nan"):
        risk_optimal(taus, coefficients=(1, float("nan")))
    with pytest.raises(MethodError, match="distinct name"):
        dare(taus, names=["same", "same"])
    with pytest.raises(CheckpointError, match="tensor 'b' is missing"):
        average([taus[0], {"a": taus[1]["a"]}])
    with pytest.raises(CheckpointError, match="tensor 'a' has shape"):
        average([taus[0], taus[1] | {"a": torch.zeros(2)}])


class TestRegistry:
    def test_close_matches(self) -> None:
        with pytest.raises(MethodError, match=r"unknown merging method 'tie': did you mean ties"):
            get("tie")
        with pytest.raises(MethodError, match="did you mean task_arithmetic"):
            get("Task-Arithmetic")
        with pytest.raises(MethodError, match="choose among average"):
            get("zzz")

    @pytest.mark.parametrize(
        ("method", "bad"),
        [
            ("ties", {"density": 0.0}),
            ("ties", {"density": 1.5}),
            ("ties", {"density": float("nan")}),
            ("ties", {"density": True}),
            ("ties", {"scope": "layer"}),
            ("ties", {"coefficient": float("inf")}),
            ("dare", {"drop": 1.0}),
            ("dare", {"drop": -0.1}),
            ("dare", {"rescale": 1}),
            ("average", {"density": 0.2}),
        ],
    )
    def test_domains(self, method: str, bad: dict[str, Any]) -> None:
        with pytest.raises(MethodError, match=next(iter(bad))):
            get(method).settings(bad)

    def test_parsing(self) -> None:
        parameters = {p.name: p for p in get("dare").parameters + get("ties").parameters}
        assert parameters["rescale"].parse("False") is False
        assert parameters["density"].parse("1e-1") == 0.1
        assert parameters["scope"].parse("tensor") == "tensor"
        with pytest.raises(MethodError, match="outside its domain"):
            parameters["density"].parse("lots")
        assert Parameter("x", 1.0, "", low=0.0, low_open=True).domain == "(0, inf)"
