"""What a prediction says of a group of checkpoints: estimates, the bound, verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from theory.assumptions import Assumption

Objective = Literal["secant", "tangent", "middle"]

OBJECTIVES: tuple[Objective, ...] = ("secant", "tangent", "middle")

KINDS: dict[Objective, str] = {"secant": "secant", "tangent": "tangent_base", "middle": "secant_tangent"}


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty: ``standard_error`` from the calibration images, ``tier`` as everywhere."""

    value: float
    standard_error: float
    tier: str = "estimated"


@dataclass(frozen=True)
class TaskRisk:
    """Predicted risk of a merge on one task, in nats."""

    expert: str
    secant: Estimate | None
    tangent: Estimate | None
    middle: Estimate | None


@dataclass(frozen=True)
class MasterBound:
    """The master bound of one merge: value in nats, terms as square roots (sqrt of nats) with their shares."""

    value: float
    tier: str
    terms: Mapping[str, float]
    shares: Mapping[str, float]
    vacuous: bool
    assumptions: tuple[Assumption, ...]


@dataclass(frozen=True)
class MethodPrediction:
    """Prediction for one merge.

    Attributes:
        label: method and what was set.
        method, settings: as ``mergebound merge`` takes them.
        coefficients: alpha; for non-linear methods the least-squares projection on the task vectors.
        linear: whether alpha is all there is.
        risk: the headline: the middle (logits of secant and tangent averaged; it may lie outside the two risks), or the
            secant without tangents.
        secant, tangent: the ends of the bracket.
        cost: merging cost, ``risk`` minus the experts' own (the standard error is that of the paired difference).
        accuracy: share of the images that the headline's logits classify rightly, mean over tasks.
        width: largest minus smallest of secant, tangent and middle.
        verdict: ``narrow``, ``medium``, ``wide`` or ``unknown``; ``advice`` says what to do about it.
        dispersion: V = mean_j |M - x_j|^2.
        optimality_gap: the prediction exceeds its minimum over the allowed coefficients by at most this.
        clamped: share of BatchNorm's running variances that this merge makes negative and merging clamps at zero
            (measured from the checkpoints); above 0 no prediction holds, and the numbers are NaN.
        command: makes this merge.
    """

    label: str
    method: str
    settings: Mapping[str, Any]
    coefficients: tuple[float, ...]
    linear: bool
    risk: Estimate
    secant: Estimate
    tangent: Estimate | None
    cost: Estimate
    accuracy: Estimate
    width: float | None
    verdict: str
    advice: str
    tasks: tuple[TaskRisk, ...]
    dispersion: float
    optimality_gap: float | None
    clamped: float
    bound: MasterBound | None
    command: str


@dataclass(frozen=True)
class ExpertSummary:
    """One expert on its own calibration images: risks in nats, drift |x_i - x_0|, measured smoothness L."""

    name: str
    file: str
    data: str
    split: str
    images: int
    images_available: int
    classes: int
    risk: Estimate
    accuracy: float
    base_risk: Estimate
    drift: float
    smoothness: float | None


@dataclass(frozen=True)
class Report:
    """Everything that was predicted; plain data, see :func:`dataclasses.asdict`.

    ``best`` is the label of the method with the smallest predicted risk; ``risk_optimal`` the label of the row with
    the coefficients that minimise ``objective``.
    """

    tier: str
    seed: int
    architecture: str
    parameters: int
    base: str
    private: tuple[str, ...]
    tangents: bool
    tangents_rule: str
    objective: str
    verdict_rule: str
    experts: tuple[ExpertSummary, ...]
    expert_risk: Estimate
    base_risk: Estimate
    methods: tuple[MethodPrediction, ...]
    best: str
    risk_optimal: str | None
    assumptions: tuple[Assumption, ...]
    notes: tuple[str, ...]
    seconds: float
