"""Low-level calculators and predictions refuse what they cannot use by a typed error, and never answer NaN."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from theory import (
    MergeboundError,
    RecipeError,
    assemble_master,
    layered_risk,
    matrix_risk,
    moved_risk,
    predict_risk,
    secant,
    tangent,
    theorem_1,
)
from theory.function_space import LogitField, minimise_risk
from theory.surfaces import risk_surface
from theory.what_if import lambda_curve

HALVES, ONES = [0.5, 0.5], [1.0, 1.0]
LABELS = np.array([0, 1])


def field(**changes: object) -> LogitField:
    given: dict[str, object] = dict(base_logits=np.zeros((2, 2)), expert_logits=np.ones((2, 2, 2)), labels=LABELS)
    return secant(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: theorem_1(-1.0, HALVES, ONES, ONES), "empirical_risk"),
        (lambda: theorem_1(np.nan, HALVES, ONES, ONES), "empirical_risk"),
        (lambda: theorem_1(1.0, [0.5, 0.7], ONES, ONES), "weights do not sum to one"),
        (lambda: theorem_1(1.0, HALVES, [1.0, 1.0, 1.0], ONES), "shapes do not fit"),
        (lambda: theorem_1(1.0, HALVES, ONES, "big"), "stability"),  # type: ignore[arg-type]
        (lambda: assemble_master([-1.0, 1.0], HALVES, ONES, 1.0, 1.0, 1.0), "expert_risks"),
        (lambda: assemble_master([np.nan, 1.0], HALVES, ONES, 1.0, 1.0, 1.0), "expert_risks"),
        (lambda: assemble_master(ONES, ONES, ONES, 1.0, 1.0, 1.0), "weights do not sum to one"),
        (lambda: assemble_master(ONES, HALVES, ONES, -1.0, 1.0, 1.0), "dispersion"),
        (lambda: matrix_risk(1.0, [[1.0, 2.0]], [1.0]), "curvature has shape"),
        (lambda: matrix_risk(1.0, "x", [1.0]), "curvature"),  # type: ignore[arg-type]
        (lambda: layered_risk(1.0, [1.0, 2.0], [1.0, 2.0, 3.0]), "shapes do not fit"),
        (lambda: moved_risk([1.0, 2.0], 1.0, [1.0, 2.0, 3.0]), "shapes do not fit"),
    ],
)
def test_calculators(ask: Callable[[], object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        ask()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: field(base_logits=np.array([[np.nan, 0.0], [0.0, 0.0]])), "base_logits.*not finite"),
        (lambda: field(expert_logits=np.full((2, 2, 2), np.inf)), "expert_logits.*not finite"),
        (lambda: field(labels=np.array([0.5, 1.0])), "labels.*whole numbers"),
        (lambda: field(base_logits=np.zeros((0, 2)), expert_logits=np.zeros((2, 0, 2)), labels=LABELS[:0]), "constant"),
        (lambda: tangent(np.zeros((2, 2)), np.zeros((2, 3, 2)), LABELS), "products"),
        (lambda: tangent(np.zeros((2, 2)), np.zeros((2, 2, 2)), LABELS, np.zeros(3)), "alpha has shape"),
        (lambda: predict_risk([], HALVES), "fields is empty"),
        (lambda: predict_risk([field()], [0.5, np.nan]), "alpha.*not finite"),
        (lambda: predict_risk([field()], ["a", 1.0]), "alpha"),  # type: ignore[list-item]
        (lambda: predict_risk([field()], HALVES, [-1.0]), "nonnegative"),
        (lambda: predict_risk([field()], HALVES, [np.nan]), "nonnegative"),
        (lambda: minimise_risk([field()], [1.0, 1.0]), "weights"),
        (lambda: minimise_risk([]), "fields is empty"),
        (lambda: lambda_curve(risk_surface([field()]), [1.0]).barrier(), "two different ends"),
    ],
)
def test_predictions(ask: Callable[[], object], words: str) -> None:
    with pytest.raises(MergeboundError, match=words):
        ask()


def test_lists_and_single_precision_are_taken() -> None:
    lists = secant([[0.0, 0.0]], [[[2.0, 0.0]], [[0.0, 2.0]]], [0])  # type: ignore[arg-type]
    single = secant(np.zeros((1, 2), np.float32), np.array([[[2, 0]], [[0, 2]]], np.float32), np.array([0]))
    assert float(predict_risk([lists], HALVES).risk) == pytest.approx(np.log(2))
    assert float(predict_risk([single], HALVES).risk) == pytest.approx(np.log(2))
