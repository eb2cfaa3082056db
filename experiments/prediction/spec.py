"""The specification of a prediction study: experts, groups, methods, images and seeds, written before any merge."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.measure.predictors.zoo import ZOO
from experiments.spec import MethodSpec
from experiments.spec_pages import pages_in, read_page
from merging.registry import get
from theory.errors import MergeboundError

FOLDER = "experiments.presets.study"

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AdaMergingSpec(_Strict):
    """Adam on the entropy of unlabelled images: see :func:`experiments.measure.entropy.adapt_coefficients`."""

    steps: Count = 100
    rate: Positive = 0.01
    batch: Count = 16
    start: float = 0.3
    by: Literal["all", "layer", "tensor"] = "tensor"


class ComparisonSpec(_Strict):
    """Merging methods against ``risk_optimal``, everything chosen on calibration images.

    Attributes:
        sizes: which groups of the study take part, by their number of experts.
        tuning: coefficients lambda among which task arithmetic and TIES choose.
        objectives: predictors that ``risk_optimal`` minimises over one coefficient per expert.
        layer_groups: blocks of layers with coefficients of their own, at most; 0 leaves per-layer coefficients out.
        layer_images: calibration images (the first ones) for the products per block.
        fisher_images: for the Fisher diagonals, with one label drawn per image.
        adamerging: settings; ``None`` leaves it out.
    """

    sizes: tuple[Count, ...] = (4, 7)
    tuning: Annotated[tuple[float, ...], Field(min_length=1)] = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    objectives: Annotated[tuple[str, ...], Field(min_length=1)] = ("secant", "secant_tangent")
    layer_groups: Annotated[int, Field(ge=0)] = 4
    layer_images: Count = 64
    fisher_images: Count = 128
    adamerging: AdaMergingSpec | None = AdaMergingSpec()


class CurveSpec(_Strict):
    """How predictions change with the number of calibration images.

    Attributes:
        sizes: experts of the groups; the first ``groups`` groups of each of these sizes take part.
        images: numbers of images per task, ascending; a task with fewer validation images gives all that it has.
        repeats: disjoint draws of a number of images, where there are enough.
    """

    sizes: tuple[Count, ...] = (4,)
    groups: Count = 1
    images: Annotated[tuple[Count, ...], Field(min_length=1)] = (16, 32, 64, 128, 256, 512, 1024)
    repeats: Count = 4


class StudyMethod(MethodSpec):
    """A merging method with its settings, for groups of all sizes or of some."""

    sizes: tuple[Count, ...] | None = None

    def merges(self, size: int) -> bool:
        """Whether groups of this size are merged so."""
        return self.sizes is None or size in self.sizes


class StudySpec(_Strict):
    """Everything that a prediction study draws and does.

    Attributes:
        name, seed: of the study; every draw is named by the seed.
        regimes: name to the grid whose experts it takes (a preset or a file's name).
        halves: name to the recipes of that half, numbered in the order in which their learning rates first occur in the
            expanded grid; choices are fitted on one half and judged on another.
        groups: experts per group to number of groups, per regime, network and half; tasks of a group are distinct.
        methods: merging methods.
        calibration_images: per task, from its validation part.
        own_tangent_sizes: groups of these sizes are also linearised at each task's own expert; default all.
        test_images: per task, from its test part; for measuring only.
        reestimate: methods whose merges are also measured with BatchNorm statistics of the calibration images.
    """

    name: str
    seed: Annotated[int, Field(ge=0)] = 0
    regimes: Annotated[dict[str, str], Field(min_length=1)]
    halves: Annotated[dict[str, tuple[Annotated[int, Field(ge=0)], ...]], Field(min_length=1)]
    groups: Annotated[dict[Annotated[int, Field(ge=2)], Count], Field(min_length=1)]
    methods: Annotated[tuple[StudyMethod, ...], Field(min_length=1)]
    calibration_images: Annotated[int, Field(ge=8)] = 128
    own_tangent_sizes: tuple[Count, ...] | None = None
    test_images: Annotated[int, Field(ge=8)] = 500
    reestimate: tuple[str, ...] = ()
    comparison: ComparisonSpec | None = None
    curve: CurveSpec | None = None

    @model_validator(mode="after")
    def _fits(self) -> StudySpec:
        seen: dict[int, str] = {}
        for half, points in self.halves.items():
            for point in points:
                if point in seen:
                    raise ValueError(f"halves.{half}: recipe {point} is in half {seen[point]} as well; give it to one")
                seen[point] = half
        for k, method in enumerate(self.methods):
            try:
                get(method.name).settings(method.settings)
            except MergeboundError as error:
                raise ValueError(f"methods.{k}: {error}") from error
        names = [label(method) for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError("methods: two entries are the same; leave one out")
        for part, sizes in (("comparison", self.comparison), ("curve", self.curve)):
            if sizes is not None and not set(sizes.sizes) <= set(self.groups):
                raise ValueError(f"{part}.sizes: {list(sizes.sizes)} are not all sizes of groups; choose among them")
        if self.comparison is not None:
            unknown = [name for name in self.comparison.objectives if name not in ZOO]
            if unknown:
                raise ValueError(f"comparison.objectives: {unknown[0]!r} is no predictor; choose from {', '.join(ZOO)}")
        return self

    def own_tangents(self, size: int) -> bool:
        """Whether groups of this size are linearised at their own experts as well."""
        return self.own_tangent_sizes is None or size in self.own_tangent_sizes

    def digest(self) -> str:
        """Content hash, 12 hexadecimal digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def label(method: MethodSpec) -> str:
    """A method's name in tables: its registered name, with settings only where they were given."""
    inner = " ".join(f"{key}={value}" for key, value in sorted(method.settings.items()))
    return f"{method.name} {inner}".strip()


def study_presets() -> tuple[str, ...]:
    """Names of the studies that come with the package."""
    return pages_in(FOLDER)


def read_study(source: str | Path) -> StudySpec:
    """Read a study from a YAML file, or a preset by name (``npz8-prediction``).

    Raises:
        MergeboundError: no such file or preset, or an entry that is not valid (named with its place).
    """
    return read_page(source, StudySpec, FOLDER, called="study")
