"""Tied weights: found by memory and by content, and not where tensors are equal by coincidence."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from merging.checkpoint import load_state_dict, open_checkpoint, save_state_dict
from merging.tied import dealias, equal_groups, tied_groups

State = dict[str, Tensor]


class Language(nn.Module):
    """An embedding that is also the output layer, and two blocks whose norms start equal."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight


def language(seed: int) -> State:
    torch.manual_seed(seed)
    return dict(Language().state_dict())


def separate(state: Mapping[str, Tensor]) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


class TestGroups:
    def test_by_memory(self) -> None:
        assert tied_groups(language(0)) == (("embed.weight", "out.weight"),)
        assert tied_groups(separate(language(0))) == ()

    def test_views_are_not_ties(self) -> None:
        whole = torch.arange(12.0).reshape(3, 4)
        state = {
            "whole": whole,
            "same": whole.view(3, 4),
            "first": whole[:1],
            "rest": whole[1:],
            "flat": whole.reshape(-1),
            "transposed": torch.arange(9.0).reshape(3, 3),
            "empty": whole[:0],
            "also empty": whole[:0],
            "bits": whole.view(torch.int32),
        }
        state["other way"] = state["transposed"].t()
        assert tied_groups(state) == (("whole", "same"),)

    def test_of_files(self, tmp_path: Path) -> None:
        torch.save(language(0), tmp_path / "m.pt")
        torch.save(
            {f"module.{n}": t for n, t in language(0).items()},
            tmp_path / "old.pt",
            _use_new_zipfile_serialization=False,
        )
        save_state_dict(tmp_path / "m.safetensors", language(0))
        for name in ("m.pt", "old.pt"):
            assert tied_groups(open_checkpoint(tmp_path / name)) == (("embed.weight", "out.weight"),)
            assert tied_groups(load_state_dict(tmp_path / name)) == (("embed.weight", "out.weight"),)
        for mapped in (False, True):
            checkpoint = open_checkpoint(tmp_path / "m.safetensors", mapped=mapped)
            assert tied_groups(checkpoint) == ()
            assert equal_groups(checkpoint) == (("embed.weight", "out.weight"),)

    @given(
        st.lists(
            st.tuples(st.sampled_from([(2, 3), (3, 2), (6,), (40, 60)]), st.sampled_from([0, 1, 2]), st.booleans()),
            max_size=7,
        )
    )
    @settings(max_examples=40, deadline=None)
    def test_equal_groups_against_all_pairs(self, kinds: list[tuple[tuple[int, ...], int, bool]]) -> None:
        state: State = {}
        for index, (shape, seed, half) in enumerate(kinds):
            tensor = torch.zeros(shape)
            tensor.view(-1)[0] = seed  # large tensors differ outside the sampled middle
            state[str(index)] = tensor.half() if half else tensor
        pairs = {frozenset(pair) for group in equal_groups(state) for pair in combinations(group, 2)}
        expected = {
            frozenset((a, b))
            for a, b in combinations(state, 2)
            if state[a].ndim >= 2 and state[a].dtype == state[b].dtype and torch.equal(state[a], state[b])
        }
        assert pairs == expected

    def test_not_a_number_is_equal_to_itself(self) -> None:
        tensor = torch.tensor([[float("nan"), 1.0]])
        assert equal_groups({"a": tensor, "b": tensor.clone()}) == (("a", "b"),)
        assert equal_groups({"a": torch.tensor([[0.0]]), "b": torch.tensor([[-0.0]])}) == ()


class TestDealias:
    def test_by_memory_and_by_content(self) -> None:
        tied = [language(seed) for seed in range(3)]
        for base in (tied[0], separate(tied[0])):
            for experts in ({"a": tied[1], "b": tied[2]}, {"a": separate(tied[1]), "b": tied[2]}):
                assert dealias(base, experts) == {"out.weight": "embed.weight"}

    def test_through_files(self, tmp_path: Path) -> None:
        torch.save(language(0), tmp_path / "base.pt")
        save_state_dict(tmp_path / "a.safetensors", language(1))
        torch.save(language(2), tmp_path / "b.pt")
        base, *experts = (open_checkpoint(tmp_path / name) for name in ("base.pt", "a.safetensors", "b.pt"))
        assert dealias(base, dict(zip("ab", experts, strict=True))) == {"out.weight": "embed.weight"}

    def test_a_tie_that_an_expert_broke(self, caplog: pytest.LogCaptureFixture) -> None:
        broken = separate(language(1))
        broken["out.weight"][0, 0] += 1
        with caplog.at_level(logging.WARNING):
            assert dealias(language(0), {"a": broken, "b": language(2)}) == {}
        assert "a: 'out.weight' is tied to 'embed.weight' in the base and not here" in caplog.text
        assert "b:" not in caplog.text

    def test_fresh_tensors_are_not_tied(self, caplog: pytest.LogCaptureFixture) -> None:
        """Ones and zeros of norms, biases and low-rank factors, in the base and in experts that left them alone."""
        base = {
            "n1": torch.ones(4),
            "n2": torch.ones(4),
            "A": torch.zeros(3, 2),
            "B": torch.zeros(3, 2),
            "s1": torch.ones(()),
        }
        base["s2"] = torch.ones(())
        moved = separate(base)
        moved["A"] += 1
        assert dealias(base, {"a": separate(base)}) == {}
        assert dealias(base, {"a": moved}) == {}
        assert caplog.text == ""

    def test_a_tie_that_starts_constant(self) -> None:
        base = {"A": torch.zeros(3, 2), "B": torch.zeros(3, 2)}
        expert = {"A": torch.arange(6.0).reshape(3, 2), "B": torch.arange(6.0).reshape(3, 2)}
        assert dealias(base, {"a": expert}) == {"B": "A"}

    def test_an_expert_without_the_alias(self, caplog: pytest.LogCaptureFixture) -> None:
        lacking = {name: tensor for name, tensor in language(1).items() if name != "out.weight"}
        assert dealias(language(0), {"a": lacking}) == {}
        assert "merged separately" in caplog.text

    def test_only_among_the_names_asked_for(self) -> None:
        state = language(0)
        assert dealias(state, {"a": language(1)}, ["embed.weight", "norms.0.weight"]) == {}
        assert dealias(state, {"a": language(1)}, ["out.weight", "embed.weight"]) == {"out.weight": "embed.weight"}

    def test_chains(self) -> None:
        """Three names, two in memory and the third a copy, have one canonical name."""
        tensor = torch.arange(6.0).reshape(2, 3)
        base = {"a": tensor, "b": tensor.clone(), "c": tensor}
        base["d"] = base["b"]
        assert dealias(base, {"e": separate(base)}) == {"b": "a", "c": "a", "d": "a"}

    def test_constants_are_no_ties(self) -> None:
        index = torch.arange(6).reshape(2, 3)
        assert dealias({"i": index, "j": index, "w": torch.ones(2)}, {}) == {}
