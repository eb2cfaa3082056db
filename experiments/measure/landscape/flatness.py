"""How flat the loss is around base, experts and merges: every measure of :mod:`.sharpness` as one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from experiments.measure.landscape.directions import units
from experiments.measure.landscape.lines import JOINT
from experiments.measure.landscape.objective import NetworkLoss, value
from experiments.measure.landscape.running import reestimated
from experiments.measure.landscape.scores import BatchNorm, Panel, Progress
from experiments.measure.landscape.sharpness import (
    Rise,
    Sharpness,
    average_sharpness,
    epsilon_sharpness,
    filter_rise,
    hessian_trace,
    sam_sharpness,
)
from experiments.measure.subject import Subject
from theory.errors import MergeboundError

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("sam", "sam_steps", "adaptive", "epsilon", "average", "average_filters", "trace")


@dataclass(frozen=True)
class FlatnessOptions:
    """What is measured.

    Attributes:
        measures: of :data:`MEASURES`: ``sam`` one step of ascent, ``sam_steps`` several, ``adaptive`` several in units
            of |x_i|, ``epsilon`` Keskar's, ``average`` plain Gaussian, ``average_filters`` in units of filter norms,
            ``trace`` of the Hessian.
        radius: of the plain ball (SAM's rho).
        adaptive: of the adaptive ball (ASAM's rho).
        steps: of ascent, where there are several.
        epsilon: of Keskar's box.
        noise: standard deviation of plain Gaussian perturbations.
        filter_noise: of those relative to filter norms.
        draws, probes: random draws of averages and traces.
        directions: filter-normalised random directions of the curves; 0 for none.
        reach: the curves go from -reach to reach, 1 being the filters' own norm.
        points: of the curves, made odd so that 0 is among them.
        level: of intervals.
    """

    measures: tuple[str, ...] = MEASURES
    radius: float = 0.05
    adaptive: float = 0.5
    steps: int = 10
    epsilon: float = 1e-3
    noise: float = 0.01
    filter_noise: float = 0.05
    draws: int = 8
    probes: int = 8
    directions: int = 4
    reach: float = 0.5
    points: int = 11
    level: float = 0.95

    def __post_init__(self) -> None:
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown:
            raise MergeboundError(f"measure {unknown[0]!r} is unknown: choose from {', '.join(MEASURES)}")


@dataclass(frozen=True)
class PointFlatness:
    """What was measured around one point.

    Attributes:
        point, task: names; ``joint`` for the mean over all tasks.
        loss: F at the point.
        sharpness: one entry per measure.
        rise: along filter-normalised directions, if asked for.
        images: that F is a mean over.
        part: where they come from.
        batchnorm: running statistics at the point: ``merged``, or estimated again (``reestimated`` of all tasks,
            ``task`` of the point's one task).
    """

    point: str
    task: str
    loss: float
    sharpness: tuple[Sharpness, ...]
    rise: Rise | None
    images: int
    part: str
    batchnorm: BatchNorm = "merged"

    def __getitem__(self, measure: str) -> Sharpness:
        for one in self.sharpness:
            if one.measure == measure:
                return one
        raise MergeboundError(f"measure {measure!r} was not taken at {self.point}")


@dataclass(frozen=True)
class Flatness:
    """Points that were measured."""

    points: tuple[PointFlatness, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per point and measure."""
        import pandas as pd

        rows = []
        for point in self.points:
            about = {"point": point.point, "task": point.task, "loss": point.loss}
            how = {"images": point.images, "part": point.part, "batchnorm": point.batchnorm}
            rows += [about | vars(one) | how for one in point.sharpness]
        return pd.DataFrame(rows)

    def rises_frame(self) -> pd.DataFrame:
        """One row per point and step along filter-normalised directions."""
        import pandas as pd

        rows = []
        for point in self.points:
            if point.rise is not None:
                rise = point.rise
                for s, mean, low, high in zip(rise.steps, rise.mean, rise.low, rise.high, strict=True):
                    row = {"point": point.point, "task": point.task, "step": s, "loss": mean, "low": low, "high": high}
                    rows.append(row | {"directions": len(rise.values), "tier": rise.tier, "seed": rise.seed})
        return pd.DataFrame(rows)


def flatness(
    subject: Subject,
    on: Panel,
    points: Mapping[str, Tensor],
    *,
    tasks: Mapping[str, Sequence[int]] | None = None,
    options: FlatnessOptions | None = None,
    batchnorm: BatchNorm = "merged",
    seed: int = 0,
    progress: Progress | None = None,
) -> Flatness:
    """Measure how flat the loss is around points.

    Running statistics and heads stay as they are at the point; the parameters move.

    Args:
        on: images.
        points: names and vectors (P,).
        tasks: by point, the tasks whose mean loss counts; default all (for an expert, give its own).
        options: which measures, and how.
        batchnorm: running statistics at the points, before anything moves: ``merged`` are the point's own;
            ``reestimated`` are estimated on the calibration images of all tasks; ``task`` on those of the point's task,
            or of all where several count (then they are called ``reestimated``).
        seed: names random directions, the same for all points.
    """
    chosen = options or FlatnessOptions()
    found = []
    for done, (name, vector) in enumerate(points.items()):
        members = tuple((tasks or {}).get(name, range(subject.size)))
        kind: BatchNorm = "reestimated" if batchnorm == "task" and len(members) > 1 else batchnorm
        own = members[0] if kind == "task" else None
        settled = vector if kind == "merged" else reestimated(subject, vector, own)
        found.append(replace(_point(subject, on, name, settled, members, chosen, seed), batchnorm=kind))
        if progress is not None:
            progress("flatness", done + 1, len(points))
    return Flatness(tuple(found))


def _point(
    subject: Subject, on: Panel, name: str, x: Tensor, tasks: tuple[int, ...], options: FlatnessOptions, seed: int
) -> PointFlatness:
    loss = NetworkLoss(subject, on, tasks)
    space, level = subject.networks[0].space, options.level
    plain = units(x, space, loss.moving, "plain")
    taken = []
    for measure in options.measures:
        if measure in ("sam", "sam_steps"):
            steps = 1 if measure == "sam" else options.steps
            one = sam_sharpness(loss, x, plain, options.radius, steps=steps, seed=seed, level=level, name=measure)
        elif measure == "adaptive":
            own = units(x, space, loss.moving, "elements")
            one = sam_sharpness(
                loss, x, own, options.adaptive, steps=options.steps, seed=seed, level=level, name=measure
            )
        elif measure == "epsilon":
            one = epsilon_sharpness(loss, x, epsilon=options.epsilon, steps=options.steps, seed=seed, level=level)
        elif measure == "average":
            one = average_sharpness(loss, x, plain, options.noise, draws=options.draws, seed=seed, level=level)
        elif measure == "average_filters":
            own = units(x, space, loss.moving, "filters")
            one = average_sharpness(
                loss, x, own, options.filter_noise, draws=options.draws, seed=seed, level=level, name=measure
            )
        else:
            one = hessian_trace(loss, x, probes=options.probes, seed=seed, level=level)
        taken.append(one)
    rise = None
    if options.directions:
        along = np.linspace(-options.reach, options.reach, options.points | 1)
        rise = filter_rise(
            loss, x, space, [float(s) for s in along], directions=options.directions, seed=seed, level=level
        )
    task = subject.names[tasks[0]] if len(tasks) == 1 else JOINT
    return PointFlatness(name, task, value(loss, x), tuple(taken), rise, loss.images, on.part)
