"""Metrics against literal definitions, scikit-learn, and any split into batches."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from experiments.evaluate.metrics import ClasswiseBins, equal_mass, equal_width, join, score, summarise
from theory.errors import MergeboundError


def case(seed: int, n: int = 200, classes: int = 5, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    logits = scale * torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), labels] += 1.0
    return logits, labels


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def literal_ece(probabilities: list[list[float]], labels: list[int], bins: int) -> float:
    """Guo et al.: bins (b/B, (b+1)/B] of the confidence."""
    total = 0.0
    for b in range(bins):
        rows = [
            k for k, p in enumerate(probabilities) if b / bins < max(p) <= (b + 1) / bins or (b == 0 and max(p) == 0)
        ]
        if rows:
            accuracy = sum(probabilities[k].index(max(probabilities[k])) == labels[k] for k in rows) / len(rows)
            confidence = sum(max(probabilities[k]) for k in rows) / len(rows)
            total += len(rows) / len(labels) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("seed", [0, 1])
def test_against_literal_definitions_and_scikit_learn(seed: int) -> None:
    logits, labels = case(seed)
    found = summarise(score(logits, labels), bins=10)
    p = [softmax(row) for row in logits.double().tolist()]
    y = labels.tolist()
    predicted = [row.index(max(row)) for row in p]
    assert found.accuracy == pytest.approx(reference.accuracy_score(y, predicted), abs=1e-15)
    assert found.loss == pytest.approx(reference.log_loss(y, np.array(p), labels=range(5)), rel=1e-12)
    literal = sum(sum((row[c] - (c == label)) ** 2 for c in range(5)) for row, label in zip(p, y, strict=True)) / len(y)
    assert found.brier == pytest.approx(literal, rel=1e-12)
    assert found.ece == pytest.approx(literal_ece(p, y, 10), abs=1e-12)
    assert found.confidence == pytest.approx(sum(map(max, p)) / len(p), rel=1e-12)
    recall = reference.recall_score(y, predicted, average=None, labels=range(5))
    assert found.class_accuracy == pytest.approx(tuple(recall))
    assert found.balanced_accuracy == pytest.approx(reference.balanced_accuracy_score(y, predicted))
    assert found.class_n == tuple(np.bincount(y, minlength=5))
    assert found.correct == round(found.accuracy * found.n)


def test_loss_is_torch_s() -> None:
    logits, labels = case(3)
    wanted = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    assert np.allclose(score(logits, labels).loss, wanted.numpy(), rtol=1e-13, atol=0)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_any_split_into_batches_gives_the_same_numbers(seed: int, sizes: list[int]) -> None:
    logits, labels = case(seed, sum(sizes), 4)
    parts, classwise = [], ClasswiseBins(4)
    for piece, wanted in zip(torch.split(logits, sizes), torch.split(labels, sizes), strict=True):
        parts.append(score(piece, wanted))
        classwise.add(piece, wanted)
    whole = ClasswiseBins(4)
    whole.add(logits, labels)
    np.testing.assert_equal(asdict(summarise(join(parts))), asdict(summarise(score(logits, labels))))
    assert classwise.error == whole.error
    assert (classwise.counts == whole.counts).all()


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 12))
def test_order_of_images_does_not_matter(seed: int, bins: int) -> None:
    logits, labels = case(seed, 60, 3)
    logits = (2 * logits).round() / 2  # many equal confidences
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    one, two = (summarise(score(logits[o], labels[o]), bins=bins) for o in (torch.arange(60), order))
    assert (one.correct, one.class_n) == (two.correct, two.class_n)
    assert (one.ece, one.ece_mass, one.loss) == pytest.approx((two.ece, two.ece_mass, two.loss), abs=1e-12)


def test_bins_by_hand() -> None:
    values = np.array([0.0, 0.2, 0.2000001, 0.4, 1.0])
    assert equal_width(values, 5).tolist() == [0, 0, 1, 1, 4]
    assert equal_mass(np.array([0.1, 0.5, 0.3, 0.9, 0.7, 0.8]), 3).tolist() == [0, 1, 0, 2, 1, 2]
    assert equal_mass(np.array([0.5, 0.5, 0.5, 0.9]), 2).tolist() == [0, 0, 0, 1]
    assert equal_mass(np.array([0.3, 0.6]), 15).tolist() == [0, 7]
    # two images at 0.8, one right; one at 0.6, wrong; three bins: (|1 - 1.6| + |0 - 0.6|) / 3
    p = torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.6, 0.4]])
    found = summarise(score(p.log(), torch.tensor([0, 0, 1])), bins=3)
    assert found.ece == pytest.approx(0.4, abs=1e-7)
    assert found.accuracy == pytest.approx(1 / 3)


def test_equal_mass_without_ties_is_array_split() -> None:
    logits, labels = case(5, 97)
    scores = score(logits, labels)
    order = np.argsort(scores.confidence)
    cuts = [-(-k * 97 // 15) for k in range(16)]
    gaps = [(scores.correct - scores.confidence)[order[a:b]].sum() for a, b in pairwise(cuts)]
    assert summarise(scores).ece_mass == pytest.approx(np.abs(gaps).sum() / 97, abs=1e-12)


def test_classwise_against_its_definition() -> None:
    logits, labels = case(6, 150, 3)
    found = ClasswiseBins(3, 10)
    found.add(logits, labels)
    p, total = torch.softmax(logits.double(), dim=1).numpy(), 0.0
    for c in range(3):
        for b in range(10):
            rows = (p[:, c] > b / 10) & (p[:, c] <= (b + 1) / 10)
            total += abs((labels.numpy()[rows] == c).sum() - p[rows, c].sum()) / 150
    assert found.error == pytest.approx(total / 3, abs=1e-10)


def test_numbers_that_are_not_finite() -> None:
    logits = torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [float("inf"), 0.0], [0.0, -float("inf")]])
    found = summarise(score(logits, torch.tensor([0, 0, 0, 0])))
    assert (found.correct, found.nonfinite, found.loss) == (2, 2, float("inf"))
    assert math.isnan(found.ece)
    assert math.isnan(found.brier)
    masked = score(torch.tensor([[0.0, -float("inf")]]), torch.tensor([1]))
    assert masked.loss[0] == float("inf")
    assert masked.brier[0] == 2.0


def test_ties_go_to_the_first_class() -> None:
    assert score(torch.zeros(3, 4), torch.tensor([0, 1, 3])).predicted.tolist() == [0, 0, 0]


def test_errors() -> None:
    with pytest.raises(MergeboundError, match="label 3 of image 1"):
        score(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(MergeboundError, match=r"\(n, C\)"):
        score(torch.zeros(2, 3), torch.tensor([0]))
    with pytest.raises(MergeboundError, match="no images"):
        summarise(score(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(MergeboundError, match="bins = 0"):
        summarise(score(torch.zeros(1, 3), torch.tensor([0])), bins=0)
    with pytest.raises(MergeboundError, match="cannot be joined"):
        join([score(torch.zeros(1, 3), torch.tensor([0])), score(torch.zeros(1, 4), torch.tensor([0]))])
