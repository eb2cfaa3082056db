"""Key policies against their definitions, spelled out with sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merging.checkpoint import open_checkpoint, save_state_dict
from merging.errors import CheckpointError, MethodError
from merging.keys import Harmonised, KeyReport, harmonise
from merging.lazy import LazyState, specs
from merging.merge import merge_state_dicts
from merging.partition import partition
from merging.tied import dealias

State = dict[str, Tensor]


def tensor(seed: int, shape: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def base() -> State:
    return {"a": tensor(0), "b": tensor(1), "n": torch.tensor(3), "head.weight": tensor(2)}


@pytest.fixture
def experts() -> dict[str, State]:
    return {
        "one": {
            "a": tensor(10),
            "n": torch.tensor(5),
            "x": tensor(11),
            "y": tensor(12),
            "head.weight": tensor(13, (5, 3)),
        },
        "two": {"b": tensor(20), "a": tensor(21), "n": torch.tensor(6), "x": tensor(22), "head.bias": tensor(23)},
    }


def merged(found: Harmonised) -> State:
    """What a caller does with the result."""
    merge = merge_state_dicts("average", found.base, found.experts, partition=found.parts)
    return {name: found.carried[name] if name in found.carried else merge[name] for name in found.order}


class TestStrict:
    def test_as_check_compatible(self, base: State, experts: dict[str, State]) -> None:
        with pytest.raises(CheckpointError, match="one: tensor 'b' of the base is missing"):
            harmonise(base, experts, "strict")
        expert = {name: t + 1 for name, t in base.items()}
        with pytest.raises(CheckpointError, match="e: tensor 'extra' does not exist in the base"):
            harmonise(base, {"e": expert | {"extra": tensor(1)}})
        found = harmonise(base, {"e": expert})
        assert found.base is base
        assert found.experts["e"] is expert
        assert found.report == KeyReport()
        assert found.report.empty
        assert found.order == tuple(base)
        assert found.parts == partition(base)
        assert len(found.carried) == 0

    def test_unknown(self, base: State) -> None:
        with pytest.raises(MethodError, match="the key policy is 'loose': choose among strict, union, intersection"):
            harmonise(base, {}, "loose")  # type: ignore[arg-type]


class TestIntersection:
    def test_what_is_left(self, base: State, experts: dict[str, State]) -> None:
        found = harmonise(base, experts, "intersection")
        assert list(found.base) == ["a", "n", "head.weight"]
        assert found.parts.coordinates == ("a",)
        assert found.parts.constants == ("n",)
        assert found.report == KeyReport(kept=("b",), dropped={"one": ("x", "y"), "two": ("x",)})
        assert set(found.experts["one"]) == {"a", "n", "head.weight"}
        assert set(found.experts["two"]) == {"a", "n", "head.bias"}
        assert found.order == tuple(base)
        assert found.carried["b"] is base["b"]
        result = merged(found)
        assert torch.equal(result["b"], base["b"])
        delta = sum((e["a"] - base["a"]).double().numpy() for e in experts.values()) / 2
        np.testing.assert_allclose(result["a"].numpy(), base["a"].double().numpy() + delta, rtol=1e-6)

    @pytest.mark.parametrize(
        "other", [tensor(9, (3, 2)), tensor(9, (2, 3)).int(), tensor(9, (0, 3)), tensor(9).cfloat()]
    )
    def test_conflicts_are_kept(self, base: State, other: Tensor) -> None:
        expert = {name: t + 1 for name, t in base.items()} | {"b": other}
        found = harmonise(base, {"e": expert}, "intersection")
        assert found.report == KeyReport(kept=("b",))
        assert list(found.experts["e"]) == ["a", "n", "head.weight"]
        assert torch.equal(merged(found)["b"], base["b"])

    def test_widths_may_differ(self, base: State) -> None:
        expert = {name: t if name == "n" else t.half() for name, t in base.items()}
        found = harmonise(base, {"e": expert}, "intersection")
        assert found.report.empty
        assert found.experts["e"] is expert

    def test_nothing_in_common(self, base: State) -> None:
        with pytest.raises(
            CheckpointError, match="nothing is left to merge: the base and the experts have no floating"
        ):
            harmonise(base, {"e": {"z": tensor(0), "n": torch.tensor(1)}}, "intersection")


class TestUnion:
    def test_what_is_added(self, base: State, experts: dict[str, State]) -> None:
        found = harmonise(base, experts, "union")
        assert found.base is base
        assert found.parts == partition(base)
        assert found.report == KeyReport(unmoved={"one": ("b",)}, added={"x": ("one", "two"), "y": ("one",)})
        assert found.experts["one"]["b"] is base["b"]
        assert list(found.experts["one"]) == ["a", "b", "n", "head.weight"]
        assert "x" not in found.experts["one"]
        assert "head.bias" in found.experts["two"]
        assert found.order == ("a", "b", "n", "head.weight", "x", "y")
        assert found.carried["y"] is experts["one"]["y"]
        result = merged(found)
        assert list(result) == list(found.order)
        expected = (experts["one"]["x"].numpy() + experts["two"]["x"].numpy()) / np.float32(2)
        np.testing.assert_array_equal(result["x"].numpy(), expected)
        half = base["b"].double() + (experts["two"]["b"] - base["b"]).double() / 2
        np.testing.assert_allclose(result["b"].numpy(), half.numpy(), rtol=1e-6)

    def test_one_rounding(self, base: State) -> None:
        """Three bfloat16 tensors are summed in float32: rounding each sum would lose the small ones."""
        values = [256.0, 1.0, 1.0]
        experts = {
            name: {**base, "x": torch.full((2, 2), value).to(torch.bfloat16)}
            for name, value in zip("abc", values, strict=True)
        }
        found = harmonise(base, experts, "union")
        exact = torch.tensor(258.0 / 3).to(torch.bfloat16)
        assert torch.equal(found.carried["x"], exact.expand(2, 2))
        assert found.carried["x"].dtype == torch.bfloat16

    def test_the_order_of_experts_does_not_matter(self, base: State) -> None:
        experts = {str(i): {**base, "x": tensor(i, (50,)) * 10.0**i, f"own{i}": tensor(i)} for i in range(4)}
        one = harmonise(base, experts, "union")
        other = harmonise(base, dict(reversed(experts.items())), "union")
        assert one.order == other.order
        assert torch.equal(one.carried["x"], other.carried["x"])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"b": tensor(0, (3, 2))}, r"two: tensor 'b' has shape \(3, 2\) where the base has \(2, 3\): use experts"),
            (
                {"b": tensor(0).int()},
                "two: tensor 'b' has type torch.int32 where the base has torch.float32: convert it",
            ),
            ({"x": tensor(0, (7,))}, r"two: tensor 'x' has shape \(7,\) where one has \(2, 3\)"),
            ({"x": tensor(0).int()}, "two: tensor 'x' has type torch.int32 where one has torch.float32"),
        ],
    )
    def test_conflicts(self, base: State, experts: dict[str, State], change: State, message: str) -> None:
        experts["two"] |= change
        with pytest.raises(CheckpointError, match=message):
            harmonise(base, experts, "union")

    def test_integers(self, base: State) -> None:
        experts = {"a": {**base, "k": torch.tensor([1, 2])}, "b": {**base, "k": torch.tensor([1, 2])}}
        assert torch.equal(harmonise(base, experts, "union").carried["k"], torch.tensor([1, 2]))
        experts["b"]["k"] = torch.tensor([1, 3])
        with pytest.raises(CheckpointError, match=r"b: the integer tensor 'k'.*cannot be averaged: remove it"):
            harmonise(base, experts, "union")

    def test_mixed_widths(self, base: State) -> None:
        kinds = {"a": torch.float16, "b": torch.bfloat16}
        experts = {name: {**base, "x": torch.ones(2, dtype=kind)} for name, kind in kinds.items()}
        assert harmonise(base, experts, "union").carried["x"].dtype == torch.float32
        experts = {
            name: {**base, "x": torch.ones(2).to(kind)} for name, kind in (("a", torch.float8_e4m3fn), *kinds.items())
        }
        carried = harmonise(base, experts, "union").carried
        assert isinstance(carried, LazyState)
        assert carried["x"].dtype == carried.dtype("x")


NAMES = "abcde"


@st.composite
def families(draw: st.DrawFn) -> tuple[State, dict[str, State]]:
    subsets = st.sets(st.sampled_from(NAMES))
    states = [{n: tensor(100 * i + ord(n)) for n in sorted(draw(subsets))} for i in range(draw(st.integers(2, 4)))]
    return {"w": tensor(0), **states[0]}, {f"e{i}": {"w": tensor(i), **s} for i, s in enumerate(states[1:])}


class TestDefinitions:
    @given(families())
    @settings(max_examples=40, deadline=None)
    def test_against_sets(self, family: tuple[State, dict[str, State]]) -> None:
        base, experts = family
        before = {name: dict(state) for name, state in experts.items()}
        common = set(base).intersection(*experts.values())
        found = harmonise(base, experts, "intersection")
        assert set(found.base) == common == set(found.parts.coordinates)
        assert set(found.carried) == set(base) - common
        assert all(set(state) == common for state in found.experts.values())
        found = harmonise(base, experts, "union")
        result = merged(found)
        assert set(result) == set(base).union(*experts.values())
        for name, value in result.items():
            if name in base:
                deltas = [(s[name] - base[name]).numpy() if name in s else np.zeros((2, 3)) for s in experts.values()]
                expected = base[name].numpy() + np.mean(deltas, axis=0)
            else:
                expected = np.mean([s[name].numpy() for s in experts.values() if name in s], axis=0)
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5, atol=1e-6)
        for who, state in found.experts.items():
            assert set(state) == set(base)
            assert all(state[n] is (experts[who][n] if n in experts[who] else base[n]) for n in base)
        assert all(before[who][n] is state[n] for who, state in experts.items() for n in state)


class TestLazy:
    @pytest.mark.parametrize("policy", ["strict", "union", "intersection"])
    def test_files_are_not_read(
        self, tmp_path: Path, base: State, experts: dict[str, State], policy: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if policy == "strict":
            experts = {"one": {n: t + 1 for n, t in base.items()}}
        for name, state in {"base": base, **experts}.items():
            save_state_dict(tmp_path / f"{name}.safetensors", state)
        origin = open_checkpoint(tmp_path / "base.safetensors")
        opened = {name: open_checkpoint(tmp_path / f"{name}.safetensors") for name in experts}
        with monkeypatch.context() as patch:
            patch.setattr(LazyState, "__getitem__", None)
            found = harmonise(origin, opened, policy)
            lazy = [found.base, *found.experts.values()]
            assert all(isinstance(state, LazyState) for state in lazy)
            assert [dict(specs(state)) for state in lazy]
        in_memory = harmonise(base, experts, policy)
        assert found.order[: len(base)] == origin.names
        expected = merged(in_memory)
        result = merged(found)
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(result[name], value)


class TestTied:
    """Hugging Face files leave out the second name of a tied weight."""

    def test_an_expert_lacks_the_alias(self) -> None:
        base = {"embed": tensor(0), "w": tensor(1)}
        base["out"] = base["embed"]
        expert = {"embed": tensor(10), "w": tensor(11)}
        for policy in ("union", "intersection"):
            for origin in (base, {name: t.clone() for name, t in base.items()}):
                found = harmonise(origin, {"e": expert}, policy)
                assert found.experts["e"]["out"] is expert["embed"]
                assert found.report == KeyReport(tied={"e": ("out",)})
                assert found.parts.coordinates == ("embed", "w", "out")
                assert dealias(found.base, found.experts, found.parts.coordinates) == {"out": "embed"}

    def test_the_base_lacks_the_alias(self) -> None:
        base = {"embed": tensor(0), "w": tensor(1)}
        expert = {"embed": tensor(10), "w": tensor(11)}
        for out in (expert["embed"], expert["embed"].clone()):
            for policy in ("union", "intersection"):
                found = harmonise(base, {"e": {**expert, "out": out}}, policy)
                assert found.report == KeyReport(tied={"e": ("out",)})
                assert set(found.order) == {"embed", "w"}
                assert set(found.experts["e"]) == {"embed", "w"}

    def test_through_lazy_files(self, tmp_path: Path) -> None:
        base = {"embed": tensor(0), "w": tensor(1)}
        base["out"] = base["embed"]
        torch.save(base, tmp_path / "base.pt")
        save_state_dict(tmp_path / "e.safetensors", {"embed": tensor(10), "w": tensor(11)})
        origin, expert = open_checkpoint(tmp_path / "base.pt"), open_checkpoint(tmp_path / "e.safetensors")
        found = harmonise(origin, {"e": expert}, "union")
        assert torch.equal(found.experts["e"]["out"], tensor(10))
        assert dealias(found.base, found.experts) == {"out": "embed"}

    def test_coincidence_is_no_tie(self) -> None:
        base = {"n1": torch.ones(3), "n2": torch.ones(3), "A": torch.zeros(2, 2), "B": torch.zeros(2, 2)}
        expert = {"n1": 2 * torch.ones(3), "A": torch.ones(2, 2)}
        found = harmonise(base, {"e": expert}, "union")
        assert found.report == KeyReport(unmoved={"e": ("n2", "B")})
