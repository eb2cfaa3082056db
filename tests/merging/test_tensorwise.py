"""Merging tensor by tensor gives the bits of merging the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merging.checkpoint import open_checkpoint, save_state_dict
from merging.compatible import check_compatible
from merging.errors import CheckpointError, MethodError
from merging.lazy import LazyState, specs
from merging.merge import merge_state_dicts
from merging.partition import partition
from merging.registry import get, methods
from merging.settings import Gradient, Rule, resolve
from merging.tensorwise import Stream, can_stream, merge_stream

State = dict[str, Tensor]


def streamed(
    method: str, base: State | None, experts: dict[str, State], settings: dict[str, Any], **options: Any
) -> LazyState:
    chosen = get(method)
    reference = experts[min(experts)] if base is None else base
    parts = partition(reference)
    check_compatible(reference, experts, parts)
    covered = parts.coordinates if chosen.linear or chosen.merges_buffers else parts.shared
    weights = options.get("coefficients")
    groups = resolve(chosen, covered, settings, weights, options.get("rules", ()), tuple(experts))
    assert can_stream(chosen, groups, (reference, *experts.values()), parts)
    return merge_stream(Stream(chosen, base, reference, experts, parts, groups, options.get("seed", 0)))


def arguments(name: str, count: int) -> dict[str, Any]:
    """Settings under which each tensor is merged on its own."""
    method = get(name)
    found: dict[str, Any] = {"scope": "tensor"} if any(p.name == "scope" for p in method.parameters) else {}
    if method.coefficients == "required":
        found["coefficients"] = tuple(0.2 * (i + 1) for i in range(count))
    return found


def layered(state: State) -> State:
    """The same tensors in a network of two layers."""
    return {name.replace("stem.", "blocks.0.").replace("block.", "blocks.1."): tensor for name, tensor in state.items()}


def is_streamable(name: str) -> bool:
    method = get(name)
    settings = {p.name: p.default for p in method.parameters} | arguments(name, 2)
    return not method.needs_data and method.is_tensorwise(settings)


@pytest.mark.parametrize("name", [name for name in methods() if is_streamable(name)])
def test_bits_are_those_of_the_whole_model(name: str, family: Callable[..., tuple[State, dict[str, State]]]) -> None:
    base, experts = family(2)
    base, experts = layered(base), {who: layered(state) for who, state in experts.items()}
    given = arguments(name, 2)
    settings = {key: value for key, value in given.items() if key != "coefficients"}
    whole = merge_state_dicts(name, base, experts, seed=3, **given)
    lazy = streamed(name, base, experts, settings, coefficients=given.get("coefficients"), seed=3)
    assert set(lazy) == set(partition(base).coordinates)
    for key, tensor in lazy.items():
        assert torch.equal(tensor, whole[key]), key
        assert tensor.dtype == base[key].dtype


@pytest.mark.parametrize("name", ["average", "weighted"])
def test_without_a_base(name: str, family: Callable[..., tuple[State, dict[str, State]]]) -> None:
    _, experts = family(3)
    given = arguments(name, 3)
    whole = merge_state_dicts(name, None, experts, **given)
    lazy = streamed(name, None, experts, {}, **given)
    assert all(torch.equal(lazy[key], whole[key]) for key in lazy)


def test_rules_gradients_and_half_precision(family: Callable[..., tuple[State, dict[str, State]]]) -> None:
    base, experts = family(3)
    base, experts = layered(base), {who: layered(state) for who, state in experts.items()}
    half = {n: t.to(torch.float16) if t.is_floating_point() else t for n, t in base.items()}
    rules = [Rule("blocks.1.*", {"density": 0.5}), Rule(".*weight", {}, (0.2, 0.3, 0.4))]
    given = {"density": Gradient((0.2, 0.9)), "scope": "tensor"}
    whole = merge_state_dicts("ties", half, experts, rules=rules, **given)
    lazy = streamed("ties", half, experts, given, rules=rules)
    assert all(torch.equal(lazy[key], whole[key]) for key in lazy)


def test_what_cannot_be_streamed(family: Callable[..., tuple[State, dict[str, State]]]) -> None:
    base, experts = family(2)
    parts = partition(base)
    states = (base, *experts.values())

    def groups(name: str, **settings: Any) -> Any:
        return resolve(get(name), parts.shared, settings, None, (), tuple(experts))

    assert not can_stream(get("ties"), groups("ties"), states, parts)  # ranks over the whole model
    assert can_stream(get("ties"), groups("ties", scope="tensor"), states, parts)
    mixed = dict(base) | {"block.bias": base["block.bias"].double()}
    assert not can_stream(get("average"), groups("average"), (mixed, *experts.values()), parts)
    doubles = [{n: t.double() if t.is_floating_point() else t for n, t in state.items()} for state in states]
    assert can_stream(get("average"), groups("average"), doubles, parts)


def test_nothing_is_read_before_it_is_asked_for(
    tmp_path: Path, family: Callable[..., tuple[State, dict[str, State]]]
) -> None:
    base, experts = family(2)
    experts["expert1"]["block.weight"][0, 0] = float("nan")
    experts["expert0"]["stem.weight"] += 3e38
    base["stem.weight"] -= 3e38
    states = {}
    for name, state in {"base": base, **experts}.items():
        save_state_dict(tmp_path / f"{name}.safetensors", state)
        states[name] = open_checkpoint(tmp_path / f"{name}.safetensors")
    lazy = streamed("average", states["base"], {n: states[n] for n in experts}, {})  # type: ignore[arg-type]
    torch.testing.assert_close(
        lazy["block.bias"], (experts["expert0"]["block.bias"] + experts["expert1"]["block.bias"]) / 2
    )
    with pytest.raises(CheckpointError, match=r"expert1: tensor 'block\.weight' holds 1 NaN"):
        lazy["block.weight"]
    with pytest.raises((CheckpointError, MethodError), match=r"stem\.weight"):
        lazy["stem.weight"]
    assert specs(lazy)["block.weight"].shape == (7, 5)
