"""Schedules against their closed forms."""

from __future__ import annotations

import math

import pytest

from experiments.finetune.schedules import schedule
from theory.errors import MergeboundError


def test_cosine_is_half_a_cosine_after_a_linear_warm_up() -> None:
    factor = schedule("cosine", 12, warm_up=2)
    assert [factor(0), factor(1)] == [1 / 3, 2 / 3]
    for k in range(2, 12):
        assert factor(k) == pytest.approx(math.cos(math.pi * (k - 2) / 20) ** 2, abs=1e-15)  # cos^2 half angle


def test_linear_and_constant() -> None:
    assert [schedule("linear", 4)(k) for k in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [schedule("constant", 4, warm_up=1)(k) for k in range(4)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("warm_up", [-1, 4, 9])
def test_a_warm_up_that_leaves_no_step_is_refused(warm_up: int) -> None:
    with pytest.raises(MergeboundError, match="warm_up"):
        schedule("cosine", 4, warm_up=warm_up)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(MergeboundError, match="constant, cosine, linear"):
        schedule("step", 4)  # type: ignore[arg-type]
