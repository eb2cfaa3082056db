"""The specification of the study of hyperparameters: what is trained, merged, predicted, and how it is judged."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.finetune.loop import Sampling
from experiments.spec_pages import pages_in, read_page
from theory.errors import MergeboundError, nearest

FOLDER = "experiments.presets.studies"
PREFIX = "hyperparameters-"
HYPERPARAMETERS = ("learning_rate", "batch_size", "data_share", "momentum", "weight_decay", "sampling")
"""Factors that are varied one at a time by training other experts."""
FACTORS = (*HYPERPARAMETERS, "step", "experts", "coefficient")
"""All factors: ``step`` compares checkpoints of the same runs, ``experts`` sizes of groups, ``coefficient`` lambda of
task arithmetic."""

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]
Level = float | int | str


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Centre(_Strict):
    """The recipe at which every other factor is held."""

    learning_rate: Positive
    batch_size: Count
    steps: Count
    data_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    sampling: Sampling = "reshuffle"


class Levels(_Strict):
    """Levels of every factor, ascending (``sampling``: in the order in which Gamma of theory.md section 5 grows).

    A factor that is left out is not part of the study.
    """

    learning_rate: tuple[Positive, ...] = ()
    batch_size: tuple[Count, ...] = ()
    data_share: tuple[Positive, ...] = ()
    momentum: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    weight_decay: tuple[Positive, ...] = ()
    sampling: tuple[Sampling, ...] = ()
    step: tuple[Count, ...] = ()
    experts: tuple[Annotated[int, Field(ge=2)], ...] = ()
    coefficient: tuple[Positive, ...] = ()

    def of(self, factor: str) -> tuple[Level, ...]:
        """Levels of one factor."""
        return tuple(getattr(self, factor))

    @property
    def factors(self) -> tuple[str, ...]:
        """Those that have levels, in the order of :data:`FACTORS`."""
        return tuple(name for name in FACTORS if self.of(name))


class Joint(_Strict):
    """Heterogeneous experts: every expert has a recipe of its own.

    Attributes:
        count: recipes, points of a scrambled Sobol sequence; unused where grids are given.  Groups tell the effects of
            all axes apart only where there are more recipes than axes, by one at least.
        axes: as :class:`experiments.grid.spec.Joint` takes them; likewise.
        groups: drawn for each base.
    """

    count: Count = 6
    axes: dict[str, Any] = {}
    groups: Count = 40


class ConstantsSpec(_Strict):
    """How the constants of an expert are measured: see :func:`experiments.measure.noise.constants.constants_of`."""

    samples: Annotated[int, Field(ge=2)] = 128
    pairs: Count = 32
    curvature_samples: Count = 8
    curvature_iterations: Count = 8
    lanczos: Count = 12
    batches: Annotated[int, Field(ge=0)] = 2
    checkpoints: Annotated[int, Field(ge=0)] = 1


class Rule(_Strict):
    """How a verdict is reached, fixed before any result.

    A curve over the levels of a factor is, on a log scale, and averaged over matched groups:

    * ``minimum`` or ``maximum`` where an inner level lies beyond both ends: both paired differences have intervals on
      that side of 0 (level ``1 - (1 - level) / (number of inner levels)``) and are at least ``least`` long;
    * else ``rises`` or ``falls`` where the interval of its mean log-log slope leaves out 0 and its ends differ by
      at least ``least`` in log;
    * else ``undecided``.

    Verdict: ``undecided`` where the measured or the predicted curve is, ``agrees`` where both are the same, else
    ``disagrees``.

    Attributes:
        level: of all intervals.
        least: smallest difference in log that counts.
        resamples: of groups, and of experts in tables over all groups.
    """

    level: Share = 0.95
    least: Positive = 0.02
    resamples: Annotated[int, Field(ge=50)] = 1000


class StudySpec(_Strict):
    """Everything that the study draws and does.

    Attributes:
        name: of the study.
        seed: names every draw of the study; groups have the seeds ``seed``, ``seed + 1``, ...
        tasks, base: as :class:`experiments.grid.spec.GridSpec` takes them.
        grids: names of grids whose experts are used, in place of ``tasks`` and ``base``: every combination of a
            factor's levels with ``centre`` must be in them, and heterogeneous groups are drawn from all their recipes.
        centre: where the other factors are held.
        levels: of the factors.
        checkpoint_every: steps between checkpoints.
        heterogeneous: experts with recipes of their own; ``None`` leaves them out.
        groups, size: matched groups per level, and experts per group (protocol A: 10 and 6).
        method: that merges in all factors but ``coefficient``, where it is task arithmetic.
        calibration_images: per task, of its validation part: predictions.
        test_images: per task, of its test part: measurements; ``None`` for all.
        predictors: of :data:`experiments.measure.predictors.zoo.ZOO`, first those that are shown.
        calibrated: two of them, between which (in log, with a constant factor) the calibrated prediction lies.
        shared_samples: whether tasks share training images (A1), ``None`` where it is not known.
        constants: how bounds get their constants; ``None`` leaves the bounds out.
        rule: for verdicts.
    """

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    tasks: tuple[str, ...] = ()
    base: Any = None
    grids: tuple[str, ...] = ()
    centre: Centre
    levels: Levels
    checkpoint_every: Count | None = None
    heterogeneous: Joint | None = Joint()
    groups: Annotated[int, Field(ge=2)] = 10
    size: Annotated[int, Field(ge=2)] = 6
    method: Literal["average"] = "average"
    calibration_images: Annotated[int, Field(ge=8)] = 128
    test_images: Annotated[int, Field(ge=8)] | None = None
    predictors: Annotated[tuple[str, ...], Field(min_length=1)] = ("secant", "tangent_base", "secant_tangent")
    calibrated: tuple[str, str] = ("secant", "tangent_base")
    shared_samples: bool | None = None
    constants: ConstantsSpec | None = ConstantsSpec()
    rule: Rule = Rule()

    @model_validator(mode="after")
    def _fits(self) -> StudySpec:
        from experiments.measure.predictors.zoo import ZOO

        if bool(self.grids) == bool(self.tasks) or (self.tasks and self.base is None):
            raise ValueError("tasks: give tasks and a base, or the names of grids, and not both")
        for factor in self.levels.factors:
            levels = self.levels.of(factor)
            if len(levels) < 2 or len(set(levels)) < len(levels):
                raise ValueError(f"levels.{factor}: {list(levels)}; give two or more different ones")
            if factor != "sampling" and list(levels) != sorted(levels):
                raise ValueError(f"levels.{factor}: {list(levels)} do not ascend; sort them")
            if factor in HYPERPARAMETERS and getattr(self.centre, factor) not in levels:
                raise ValueError(f"levels.{factor}: the centre {getattr(self.centre, factor)} is none of them; add it")
        if self.levels.step:
            if max(self.levels.step) != self.centre.steps:
                raise ValueError(f"levels.step: must end with centre.steps = {self.centre.steps}")
            every = self.checkpoint_every
            if self.tasks and (every is None or any(step % every for step in self.levels.step[:-1])):
                raise ValueError("levels.step: levels must be checkpoints; give checkpoint_every, which divides them")
        if self.tasks and self.heterogeneous is not None and not self.heterogeneous.axes:
            raise ValueError("heterogeneous.axes: give the axes of the recipes, or heterogeneous: null")
        for name in (*self.predictors, *self.calibrated):
            if name not in ZOO:
                raise ValueError(f"predictors: {name!r} is none; {nearest(name, tuple(ZOO))}")
        if not set(self.calibrated) <= set(self.predictors) or len(set(self.calibrated)) < 2:
            raise ValueError(f"calibrated: {list(self.calibrated)}; give two different ones of predictors")
        if self.tasks:
            self.enough_tasks(self.tasks)
        return self

    def enough_tasks(self, tasks: Sequence[str]) -> None:
        """Refuse groups that the tasks cannot fill (one expert per task), before anything is trained.

        Args:
            tasks: as :func:`experiments.tasks.named.expand` takes them.

        Raises:
            MergeboundError: too few tasks for a size of groups, or for the number of heterogeneous groups.
        """
        from experiments.tasks.named import expand

        count = len(expand(tasks))
        used = bool(set(self.levels.factors) - {"experts"}) or self.heterogeneous is not None
        for name, size in (("size", self.size if used else 0), ("levels.experts", max(self.levels.experts, default=0))):
            if size > count:
                raise MergeboundError(
                    f"{name}: groups of {size} experts need {size} tasks, one for each, but there are {count}; ask for "
                    "smaller groups, or name more tasks"
                )
        if self.heterogeneous is None or not self.tasks:
            return
        most = math.comb(count, self.size) * self.heterogeneous.count**self.size
        if self.heterogeneous.groups > most:
            raise MergeboundError(
                f"heterogeneous.groups: {self.heterogeneous.groups} different groups of {self.size} experts are "
                f"wanted, but {count} tasks with {self.heterogeneous.count} recipes have {most}; ask for fewer"
            )

    def digest(self) -> str:
        """Content hash, 12 hexadecimal digits; it does not depend on what is only judged (``rule``)."""
        text = json.dumps(self.model_dump(mode="json", exclude={"rule"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def study_presets() -> tuple[str, ...]:
    """Sizes that come with the package."""
    return pages_in(FOLDER, PREFIX)


def read_study(source: str | Path) -> StudySpec:
    """Read a study from a YAML file, or one of the sizes (``tiny``, ``small``, ``paper``).

    Raises:
        MergeboundError: no such file or size, or an entry that is not valid (named with its place).
    """
    return read_page(source, StudySpec, FOLDER, PREFIX)
