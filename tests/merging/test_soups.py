"""Uniform and greedy soups."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merging.errors import MethodError
from merging.merge import merge_state_dicts
from merging.methods.average import average
from merging.methods.greedy_soup import GreedySoup, choose_ingredients, greedy_soup, on_checkpoints
from merging.methods.uniform_soup import uniform_soup
from merging.partition import partition

State = dict[str, Tensor]


def models(seed: int, count: int) -> list[State]:
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, 2), "b": (), "empty": (0, 2)}
    return [{n: torch.tensor(rng.normal(size=s)) for n, s in shapes.items()} for _ in range(count)]


def rounded_accuracy(vector: State) -> float:
    """A made-up accuracy with few values, so that ties occur."""
    return round(-float((vector["w"] - 0.3).square().mean() + (vector["b"] + 0.2).square()), 1)


def literal_recipe(vectors: list[State], scores: list[float], above: bool) -> list[int]:
    """Recipe 1: sort by accuracy, add a model to the soup if the average does not get worse."""
    ranked = sorted(range(len(vectors)), key=lambda i: (-scores[i], i))
    ingredients: list[int] = []
    best = -np.inf
    for index in ranked:
        trial = [*ingredients, index]
        mean = {n: torch.stack([vectors[i][n] for i in trial]).mean(0) for n in vectors[0]}
        accuracy = rounded_accuracy(mean)
        if not ingredients or (accuracy > best if above else accuracy >= best):
            ingredients, best = trial, accuracy
    return ingredients


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 7), accept=st.sampled_from(["at_least", "above"]))
def test_greedy_soup_is_recipe_1(seed: int, count: int, accept: Any) -> None:
    vectors = models(seed, count)
    scores = [rounded_accuracy(vector) for vector in vectors]
    calls: list[State] = []

    def evaluate(vector: State) -> float:
        calls.append(vector)
        return rounded_accuracy(vector)

    soup = choose_ingredients(vectors, scores=scores, evaluate=evaluate, accept=accept)
    assert list(soup.ingredients) == literal_recipe(vectors, scores, accept == "above")
    assert len(calls) == len(soup.trials) == count - 1
    expected = average([vectors[i] for i in soup.ingredients])
    assert all(torch.allclose(soup.task_vector[n], expected[n], atol=1e-14) for n in expected)
    assert soup.score == rounded_accuracy(soup.task_vector) >= max(scores)  # never worse than the best model
    merged = greedy_soup(vectors, scores=scores, evaluate=rounded_accuracy, accept=accept)
    assert all(torch.equal(merged[n], soup.task_vector[n]) for n in merged)


def constant(value: float) -> Any:
    return lambda vector: value


def test_equal_accuracy_is_enough_in_the_paper_and_not_in_its_code() -> None:
    vectors = models(0, 3)
    paper = choose_ingredients(vectors, scores=[0.5, 0.5, 0.5], evaluate=constant(0.5))
    code = choose_ingredients(vectors, scores=[0.5, 0.5, 0.5], evaluate=constant(0.5), accept="above")
    assert (paper.ingredients, code.ingredients) == ((0, 1, 2), (0,))
    assert paper.trials == ((1, 0.5, True), (2, 0.5, True))
    assert code.trials == ((1, 0.5, False), (2, 0.5, False))
    uniform = uniform_soup(vectors)
    assert all(torch.equal(paper.task_vector[n], uniform[n]) for n in uniform)
    assert all(torch.equal(code.task_vector[n], vectors[0][n]) for n in uniform)


def test_scores_decide_the_order() -> None:
    soup = choose_ingredients(models(1, 4), scores=[0.1, 0.9, 0.9, 0.4], evaluate=constant(1.0))
    assert soup.ingredients == (1, 2, 3, 0)
    assert soup.score == 1.0
    worse = choose_ingredients(models(1, 4), scores=[0.1, 0.9, 0.9, 0.4], evaluate=constant(0.2))
    assert worse == GreedySoup((1,), 0.9, ((2, 0.2, False), (3, 0.2, False), (0, 0.2, False)), worse.task_vector)


def test_a_later_trial_is_compared_with_the_soup_and_not_with_the_best_model() -> None:
    accuracies = iter([0.95, 0.94, 0.96])
    soup = choose_ingredients(models(2, 4), scores=[0.9, 0.8, 0.7, 0.6], evaluate=lambda vector: next(accuracies))
    assert soup.ingredients == (0, 1, 3)
    kept = [score for _, score, added in soup.trials if added]
    assert all(a <= b for a, b in pairwise([0.9, *kept]))


def test_through_the_merge_with_a_function_of_checkpoints(family: Any) -> None:
    base, experts = family(4)
    parts = partition(base, private=())
    experts = {name: {**state, "head.weight": state["head.weight"] + 0.1} for name, state in experts.items()}
    seen: list[State] = []

    def accuracy(checkpoint: State) -> float:
        assert set(checkpoint) == set(base)
        assert all(checkpoint[name].dtype == base[name].dtype for name in base)
        seen.append(checkpoint)
        return -float(checkpoint["block.weight"].sum().abs() + checkpoint["head.weight"].sum().abs())

    scores = {name: accuracy(state) for name, state in experts.items()}
    seen.clear()
    evaluate = on_checkpoints(base, accuracy)
    merged = merge_state_dicts("greedy_soup", base, experts, partition=parts, scores=scores, evaluate=evaluate)
    assert len(seen) == 3
    vectors = [{n: experts[e][n] - base[n] for n in parts.coordinates} for e in sorted(experts)]
    chosen = choose_ingredients(vectors, scores=[scores[e] for e in sorted(experts)], evaluate=evaluate).ingredients
    names = [sorted(experts)[index] for index in chosen]
    for name in ("block.weight", "head.weight", "norm.running_mean", "norm.running_var"):  # of the ingredients alone
        torch.testing.assert_close(merged[name], torch.stack([experts[e][name] for e in names]).mean(0))
    assert accuracy(merged) >= max(scores.values()) - 1e-4
    reordered = {name: experts[name] for name in reversed(experts)}
    listed = [scores[name] for name in reordered]
    again = merge_state_dicts("greedy_soup", base, reordered, partition=parts, scores=listed, evaluate=evaluate)
    assert all(torch.equal(again[name], merged[name]) for name in merged)


def test_uniform_soup_merges_heads_when_asked(family: Any) -> None:
    base, experts = family(3)
    usual = merge_state_dicts("uniform_soup", base, experts)
    soup = merge_state_dicts("uniform_soup", base, experts, partition=partition(base, private=()))
    assert torch.equal(usual["head.weight"], base["head.weight"])
    mean = torch.stack([state["head.weight"] for state in experts.values()]).mean(0)
    torch.testing.assert_close(soup["head.weight"], mean)
    torch.testing.assert_close(soup["block.weight"], merge_state_dicts("average", base, experts)["block.weight"])
    without_base = merge_state_dicts("uniform_soup", None, experts, partition=partition(base, private=()))
    assert all(torch.allclose(without_base[n], soup[n], atol=1e-6) for n in soup if "tracked" not in n)


@pytest.mark.parametrize(
    ("scores", "evaluate", "message"),
    [
        ([0.5, 0.5], constant(0.5), "2 scores were given for 3 models"),
        ([0.5, float("nan"), 0.5], constant(0.5), "of model 2 alone is nan"),
        ([0.5, 0.4, 0.3], constant(float("inf")), "of the soup with model 2 is inf"),
    ],
)
def test_refusals(scores: list[float], evaluate: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        choose_ingredients(models(0, 3), scores=scores, evaluate=evaluate)
    with pytest.raises(MethodError, match="nothing to merge"):
        choose_ingredients([], scores=[], evaluate=evaluate)
