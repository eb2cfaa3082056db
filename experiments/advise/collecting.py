"""What a budget can afford to collect, and statistics in two parts: one to choose on, one to judge on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from experiments.measure.predictors.collect import collect_fields
from experiments.measure.predictors.kinds import forward_equivalents, passes
from experiments.measure.predictors.statistics import FieldStatistics
from experiments.measure.subject import Subject
from experiments.tasks.types import Split
from theory.errors import MergeboundError

STAGES = ("secant", "pairs", "tangent_base")
"""Collected in this order, as far as the budget goes."""
LARGEST = 8
"""Experts up to which pairs and tangents are collected without a budget: both grow as the cube or square of N."""
TANGENT_WORK = 3e11
"""Parameters x images x experts^2 up to which tangents are collected without a budget."""
LEAST = 8
"""Images of each task in either half at least; fewer give no standard error that is worth its name."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MergeBudget:
    """What advice on existing experts may cost.  At most one of both.

    Attributes:
        samples: images that pass through the network (a Jacobian product counts as three); decides the same on every
            machine.
        minutes: of one core's time, converted by the measured speed of the first passes; may decide otherwise on
            another machine (the choice is reported, and ``kinds`` repeats it).
    """

    samples: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise MergeboundError(f"budget: {name} = {value}: give a positive number")
        if self.samples is not None and self.minutes is not None:
            raise MergeboundError("budget: give samples or minutes, not both")


@dataclass(frozen=True)
class Collected:
    """Statistics and what they cost.

    Attributes:
        subject: whose calibration images were used.
        statistics: of all kinds.
        samples: images passed, products counted as three.
        left: samples of the budget that are left, ``None`` without a budget.
        skipped: kinds that the budget or the size forbade, and why.
    """

    subject: Subject
    statistics: FieldStatistics
    samples: float
    left: float | None
    skipped: tuple[str, ...]


def kinds_cost(kinds: Sequence[str], subject: Subject) -> float:
    """Samples that some kinds take on all tasks."""
    images = sum(len(split) for split in subject.calibration)
    return images * sum(forward_equivalents(kind, subject.size) for kind in kinds)


def collect_within(
    subject: Subject,
    budget: MergeBudget = MergeBudget(),
    *,
    kinds: Sequence[str] | None = None,
    seed: int = 0,
    verify: int = 0,
    progress: Progress | None = None,
) -> Collected:
    """Collect the secant, and pairs and tangents as far as the budget goes.

    Args:
        subject: base, experts, calibration images.
        budget: samples or minutes; without one, all of :data:`STAGES` for up to :data:`LARGEST` experts (tangents up
            to :data:`TANGENT_WORK`).
        kinds: exactly these instead.
        seed: of the calibration images.
        verify: merges that will be evaluated: their passes are kept free.
        progress: called with stage, done, total.

    Raises:
        MergeboundError: a budget that does not pay for the secant, or as :func:`collect_fields` raises.
    """
    if kinds is not None:
        chosen = tuple(dict.fromkeys(("secant", *kinds)))
        return Collected(
            subject, collect_fields(subject, kinds=chosen, seed=seed, progress=progress), kinds_cost(chosen, subject),
            None, (),
        )  # fmt: skip
    images = sum(len(split) for split in subject.calibration)
    total = budget.samples
    if budget.minutes is not None:
        total = 60.0 * budget.minutes * _speed(subject)
    spent = kinds_cost(("secant",), subject)
    if total is not None and total < spent:
        raise MergeboundError(
            f"budget: {total:,.0f} samples do not pay for the secant ({spent:,.0f}: {subject.size + 1} passes over "
            f"{images} images); raise it, or lower --images"
        )
    kept, skipped = ["secant"], []
    for kind in STAGES[1:]:
        cost = kinds_cost((kind,), subject)
        if not passes(kind, subject.size):
            continue
        if total is None:
            reason = _too_large(kind, subject, images)
        else:
            reason = "" if spent + cost + verify * images <= total else f"would take {cost:,.0f} samples more"
        if reason:
            skipped.append(f"{kind}: {reason}")
        else:
            kept.append(kind)
            spent += cost
    try:
        statistics = collect_fields(subject, kinds=kept, seed=seed, progress=progress)
    except MergeboundError as error:
        if "forward-mode" not in str(error) or "tangent_base" not in kept:
            raise
        kept.remove("tangent_base")
        spent -= kinds_cost(("tangent_base",), subject)
        skipped.append(f"tangent_base: {error}")
        statistics = collect_fields(subject, kinds=kept, seed=seed, progress=progress)
    return Collected(subject, statistics, spent, None if total is None else total - spent, tuple(skipped))


def _speed(subject: Subject, images: int = 32) -> float:
    """Images per second of forward passes, measured on a few (the best of three passes)."""
    pixels = subject.calibration[0].images[:images]
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        subject.networks[0].features(subject.base, pixels)
        taken.append(time.perf_counter() - started)
    return len(pixels) / max(min(taken), 1e-9)


def _too_large(kind: str, subject: Subject, images: int) -> str:
    if subject.size > LARGEST:
        return f"more than {LARGEST} experts; give a budget, or name kinds"
    pixels = subject.calibration[0].images
    work = subject.base.numel() * max(1.0, pixels.shape[-1] * pixels.shape[-2] / 256.0) * images * subject.size
    if kind == "tangent_base" and work > TANGENT_WORK:
        return "the network is large; give a budget, or name kinds"
    return ""


def halves(subject: Subject, statistics: FieldStatistics) -> tuple[tuple[Subject, FieldStatistics], ...]:
    """Two parts of the calibration images: the first chooses, the second judges.

    Raises:
        MergeboundError: a task with too few images (:func:`enough_images`).
    """
    enough_images(subject)
    counts = [n // 2 for n in statistics.images]
    return tuple(
        (_images(subject, parts), _rows(statistics, parts))
        for parts in ([slice(0, n) for n in counts], [slice(n, None) for n in counts])
    )


def enough_images(subject: Subject) -> None:
    """Refuse calibration images whose halves hold fewer than :data:`LEAST` of some task.

    Raises:
        MergeboundError: names the task.
    """
    for task, split in zip(subject.tasks, subject.calibration, strict=True):
        if len(split) < 2 * LEAST:
            raise MergeboundError(
                f"calibration: {len(split)} images of {task}, of which one half chooses and the other judges; give "
                f"{2 * LEAST} or more (--images, and that many in the data)"
            )


def _images(subject: Subject, parts: Sequence[slice]) -> Subject:
    splits = (
        Split(s.images[p], s.labels[p], s.source[p]) for s, p in zip(subject.calibration, parts, strict=True)
    )  # fmt: skip
    return replace(subject, calibration=tuple(splits))


def _rows(statistics: FieldStatistics, parts: Sequence[slice]) -> FieldStatistics:
    return replace(
        statistics,
        labels=tuple(y[p] for y, p in zip(statistics.labels, parts, strict=True)),
        sources=tuple(s[p] for s, p in zip(statistics.sources, parts, strict=True)),
        data=tuple(
            {k: v[:, p] for k, v in one.items()} for one, p in zip(statistics.data, parts, strict=True)
        ),
    )  # fmt: skip
