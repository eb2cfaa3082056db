"""Normalised performance: ratios by hand, pairing, zero denominators, which reference the study uses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from experiments.evaluate.evaluate import combine, evaluation
from experiments.evaluate.metrics import score
from experiments.evaluate.normalised import Comparison, normalised
from experiments.evaluate.results import Evaluation, EvaluationSet
from experiments.evaluate.transfer import TransferFeatures, transfer
from experiments.tasks.types import Split
from theory.errors import MergeboundError

N = 200
_NONE = Split(torch.zeros(0), torch.zeros(0, dtype=torch.int64), np.zeros(0, dtype=np.int64))


def result(task: str, correct: np.ndarray, digest: str = "d") -> Evaluation:
    logits = torch.stack([torch.from_numpy(correct.astype(float)), torch.full((len(correct),), 0.5)], dim=1)
    return evaluation(EvaluationSet(task, _NONE, digest), score(logits, torch.zeros(len(correct), dtype=torch.int64)))


def hits(count: int, n: int = N) -> np.ndarray:
    return np.arange(n) < count


def by_name(rows: list[Comparison]) -> dict[tuple[str, str, str], Comparison]:
    return {(row.group, row.against, row.task): row for row in rows}


def test_ratios_by_hand() -> None:
    merged = combine([result("a", hits(120)), result("b", hits(150)), result("c", hits(90))], resamples=0)
    experts = {"a": result("a", hits(160)), "b": result("b", hits(180))}
    base = {name: result(name, hits(count)) for name, count in (("a", 80), ("b", 60), ("c", 100))}
    rows = by_name(normalised(merged, experts=experts, base=base, held_out=["c"]))
    assert rows["held_in", "expert", "a"].ratio.value == pytest.approx(120 / 160)
    assert rows["held_in", "expert", "a"].difference.value == pytest.approx(-40 / N)
    assert rows["held_in", "base", "b"].ratio.value == pytest.approx(150 / 60)
    assert rows["held_out", "base", "c"].ratio.value == pytest.approx(0.9)
    mean = rows["held_in", "expert", "mean_of_ratios"]
    assert mean.ratio.value == pytest.approx((120 / 160 + 150 / 180) / 2)
    assert rows["held_in", "expert", "ratio_of_means"].ratio.value == pytest.approx(270 / 340)
    assert (mean.tasks, mean.n, mean.left_out, mean.protocol) == (2, 2 * N, 0, True)
    assert not rows["held_in", "base", "a"].protocol
    assert rows["held_out", "base", "c"].protocol
    assert ("held_out", "expert", "c") not in rows
    row = mean.to_row()
    assert row["ratio_low"] < row["ratio"] < row["ratio_high"]
    assert (row["tier"], row["group"], row["against"]) == ("measured", "held_in", "expert")


def test_the_interval_is_paired() -> None:
    """A merge that is right wherever the expert is, but for a few images: the ratio hardly varies."""
    expert = np.random.default_rng(0).permutation(hits(100))
    merged = expert.copy()
    merged[np.flatnonzero(expert)[:5]] = False
    row = normalised([result("a", merged)], experts={"a": result("a", expert)}, resamples=4000)[0]
    assert row.ratio.value == pytest.approx(0.95)
    # binomial: five of the hundred right images lost
    assert row.ratio.high - row.ratio.low == pytest.approx(2 * 1.96 * math.sqrt(0.05 * 0.95 / 100), rel=0.15)
    assert row.difference.high - row.difference.low == pytest.approx(2 * 1.96 * math.sqrt(0.025 * 0.975 / N), rel=0.15)


def test_a_model_against_itself_is_exactly_one() -> None:
    one = result("a", hits(70))
    row = normalised([one], experts={"a": one})[0]
    assert (row.ratio.low, row.ratio.value, row.ratio.high) == (1.0, 1.0, 1.0)
    assert (row.difference.low, row.difference.value, row.difference.high) == (0.0, 0.0, 0.0)


def test_zero_denominators() -> None:
    merged = [result("a", hits(10)), result("b", hits(50))]
    base = {"a": result("a", hits(0)), "b": result("b", hits(100))}
    rows = by_name(normalised(merged, base=base, held_out=["a", "b"]))
    none = rows["held_out", "base", "a"]
    assert math.isnan(none.ratio.value)
    assert math.isnan(none.ratio.low)
    assert none.undefined == 1.0
    assert none.difference.value == pytest.approx(10 / N)
    mean = rows["held_out", "base", "mean_of_ratios"]
    assert (mean.ratio.value, mean.left_out) == (0.5, 1)
    assert rows["held_out", "base", "ratio_of_means"].ratio.value == pytest.approx(60 / 100)
    rare = normalised([result("a", hits(10))], base={"a": result("a", hits(1))}, held_out=["a"])[0]
    assert rare.undefined == pytest.approx(math.exp(-1), abs=0.06)  # the only right image is missed
    assert rare.ratio.value == 10.0
    assert math.isnan(rare.ratio.high)
    both = normalised([result("a", hits(0))], base={"a": result("a", hits(0))}, held_out=["a"])
    assert all(math.isnan(row.ratio.value) for row in both)


def test_transfer_results_can_be_compared() -> None:
    rng = np.random.default_rng(3)

    def scored(noise: float) -> dict[str, object]:
        labels = torch.arange(60) % 3
        x = torch.eye(3, dtype=torch.float64)[labels] + noise * torch.from_numpy(rng.standard_normal((60, 3)))
        parts = [(x[20 * i : 20 * i + 20], labels[20 * i : 20 * i + 20]) for i in range(3)]
        return dict(transfer(TransferFeatures("t", 3, *parts, "d"), ["ncm_cosine"], resamples=0))

    merged, base = scored(0.1)["ncm_cosine"], scored(3.0)["ncm_cosine"]
    row = normalised([merged], base={"t": base}, held_out=["t"])[0]  # type: ignore[list-item,dict-item]
    assert row.ratio.value > 1.0


def test_errors() -> None:
    a = result("a", hits(10))
    with pytest.raises(MergeboundError, match="held-in task 'a' has no expert"):
        normalised([a])
    with pytest.raises(MergeboundError, match="held-out task 'a' has no base"):
        normalised([a], held_out=["a"])
    with pytest.raises(MergeboundError, match="'b' was not evaluated"):
        normalised([a], held_out=["b"])
    with pytest.raises(MergeboundError, match="different test images"):
        normalised([a], experts={"a": result("a", hits(10), "other")})
    with pytest.raises(MergeboundError, match="different test images"):
        normalised([a], experts={"a": result("a", hits(10, 100))})
