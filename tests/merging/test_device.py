"""Tensors merged as a whole on a second device: no method mixes it with the processor; devices that are not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from merging import tensorwise
from merging.device import check_device
from merging.errors import MethodError
from merging.registry import get, methods
from merging.tensorwise import merge_stream
from tests.merging.other_device import other_device
from tests.merging.streamed import stream_of
from tests.merging.test_tensorwise import arguments, is_streamable, layered

State = dict[str, Tensor]
Family = Callable[..., tuple[State, dict[str, State]]]


def variants(name: str) -> list[dict[str, Any]]:
    """The defaults, and every other choice of one parameter."""
    found: list[dict[str, Any]] = [{}]
    for parameter in get(name).parameters:
        if isinstance(parameter.default, bool):
            found.append({parameter.name: not parameter.default})
        found += [{parameter.name: c} for c in parameter.choices or () if c not in (parameter.default, "global")]
    if name == "dare_ties":
        found += [{"density": 0.5}]
    return [arguments(name, 2) | changes for changes in found]


@pytest.mark.parametrize("name", [name for name in methods() if is_streamable(name)])
def test_methods_stay_on_their_device_and_give_the_same(name: str, family: Family) -> None:
    base, experts = family(2)
    base, experts = layered(base), {who: layered(state) for who, state in experts.items()}
    for given in variants(name):
        stream = stream_of(name, base, experts, seed=3, **given)
        expected = dict(merge_stream(stream))
        with other_device() as device:
            found = dict(merge_stream(replace(stream, device=device)))
        for key, tensor in expected.items():
            assert type(found[key]) is Tensor, (given, key)
            assert torch.equal(found[key], tensor), (given, key)


def test_the_stand_in_refuses_to_mix() -> None:
    with other_device() as device:
        there = torch.ones(3, device=device)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        assert torch.equal((there + there).cpu(), 2 * torch.ones(3))


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "cpu:0", "cuda:0 "])
def test_names_of_no_device(name: str) -> None:
    with pytest.raises(MethodError, match=r"no name of a device: choose among cpu, cuda"):
        check_device(name)


@pytest.mark.parametrize(("count", "name", "seen"), [(0, "cuda", "none"), (0, "cuda:0", "none"), (2, "cuda:2", "2")])
def test_devices_that_are_not_there(count: int, name: str, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(MethodError, match=rf"--device {name}: there is no such device .*finds here: {seen}.*leave"):
        check_device(name)
    assert check_device("cpu") == torch.device("cpu")
    if count:
        assert check_device("cuda:1") == torch.device("cuda:1")


def test_a_tensor_too_large_for_the_device(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    base, experts = family(2)
    lazy = merge_stream(stream_of("tsv_m", base, experts))
    monkeypatch.setattr(tensorwise, "merge_flat", full)
    with pytest.raises(MethodError, match=r"^tensor '.*' does not fit into the memory of cpu with method 'tsv_m': .*$"):
        dict(lazy)
