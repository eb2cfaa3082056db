"""The validated specification of a validation run: family, base, regimes, groups, methods and seeds.

A spec is read from YAML (``experiments/presets/*.yaml``) and decides everything that is drawn.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.models import DIGIT_ARCHITECTURES
from experiments.spec_pages import packaged_page, pages_in, parsed
from experiments.tasks.digits8 import EIGHT, digits8
from merging.registry import get
from theory.errors import MergeboundError

NUMERICS_VERSION = 5
"""Raised whenever the same spec would give other bits; part of the hash that names stored results."""

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FamilySpec(_Strict):
    """Images: how the embedded digits are split (see :func:`experiments.tasks.digits8.digits8`)."""

    tasks: tuple[str, ...] = EIGHT
    share_images: bool = False
    train_per_task: Count = 80
    pretraining: Count = 500
    calibration: Count = 256
    calibration_per_task: Count = 128
    test: Count = 400


class BaseSpec(_Strict):
    """Pretraining of the base x_0 on the spot."""

    steps: Annotated[int, Field(ge=0)] = 200
    learning_rate: Positive = 0.005
    batch_size: Count = 64
    turns: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of pretraining images that are turned and mirrored at random."""


class RegimeSpec(_Strict):
    """Distribution of the experts' hyperparameters: pairs are log-uniform ranges, tuples of choices are uniform."""

    learning_rate: tuple[Positive, Positive]
    steps: tuple[Count, Count]
    batch_size: Annotated[tuple[Count, ...], Field(min_length=1)]
    data_share: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]
    momentum: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)]
    weight_decay: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _ordered(self) -> RegimeSpec:
        for name in ("learning_rate", "steps"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the range [{low}, {high}] is upside down; write the smaller value first")
        return self


class MethodSpec(_Strict):
    """One merging method with its settings, as the merging registry knows it."""

    name: str
    settings: dict[str, float | str | bool] = {}


class ValidationSpec(_Strict):
    """Everything that a validation run draws and does."""

    name: str
    seed: int = 0
    architectures: Annotated[tuple[Literal[DIGIT_ARCHITECTURES], ...], Field(min_length=1)]  # type: ignore[valid-type]
    heads: Literal["trained", "frozen", "shared"] = "trained"
    family: FamilySpec = FamilySpec()
    base: BaseSpec = BaseSpec()
    regimes: Annotated[dict[str, RegimeSpec], Field(min_length=1)]
    experts_per_task: Annotated[int, Field(ge=2)] = 6
    group_sizes: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = (2, 4, 6, 8)
    groups_per_size: Annotated[int, Field(ge=2)] = 24
    methods: Annotated[tuple[MethodSpec, ...], Field(min_length=1)]
    sweep_groups: Annotated[int, Field(ge=0)] = 8
    sweep_values: tuple[float, ...] = tuple(round(0.1 * k, 1) for k in range(13))
    lines: Annotated[int, Field(ge=0)] = 4
    optimal_groups: Annotated[int, Field(ge=0)] = 24

    @model_validator(mode="after")
    def _fits(self) -> ValidationSpec:
        _check_names(self)
        largest = max(self.group_sizes)
        if self.heads == "shared" and largest > self.experts_per_task // 2:
            raise ValueError(
                f"group_sizes: a soup of {largest} experts of one task needs experts_per_task >= {2 * largest} "
                f"(two halves), but it is {self.experts_per_task}"
            )
        if self.heads != "shared" and largest > len(self.family.tasks):
            raise ValueError(
                f"group_sizes: a group of {largest} needs {largest} tasks but family.tasks has {len(self.family.tasks)}"
            )
        pool = self.family.train_per_task * (len(self.family.tasks) if self.family.share_images else 1)
        for name, regime in self.regimes.items():
            smallest = max(1, round(min(regime.data_share) * pool))
            if max(regime.batch_size) > smallest:
                raise ValueError(
                    f"regimes.{name}.batch_size: {max(regime.batch_size)} exceeds the smallest training sample "
                    f"({smallest} images); lower it or raise family.train_per_task"
                )
        return self

    def digest(self) -> str:
        """Content hash of the spec and the numerics version, 12 hexadecimal digits."""
        text = json.dumps({"numerics": NUMERICS_VERSION, **self.model_dump(mode="json")}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_names(spec: ValidationSpec) -> None:
    """What would fail only after fine-tuning: transformations, split sizes, methods and their settings."""
    repeated = [task for k, task in enumerate(spec.family.tasks) if task in spec.family.tasks[:k]]
    if repeated:
        raise ValueError(f"family.tasks: {repeated[0]!r} is listed twice; name every task once")
    try:
        digits8(seed=spec.seed, **spec.family.model_dump())
    except MergeboundError as error:
        raise ValueError(f"family: {error}") from error
    for k, method in enumerate(spec.methods):
        try:
            get(method.name).settings(method.settings)
        except MergeboundError as error:
            raise ValueError(f"methods.{k}: {error}") from error


def load_spec(source: str | Path) -> ValidationSpec:
    """Read a spec from a YAML file, or a preset by name (``digits8``).

    Raises:
        MergeboundError: no such file or preset, or an entry that is not valid (named with its place).
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise MergeboundError(f"{path}: no such file; give a YAML file or a preset ({', '.join(presets())})")
        text = path.read_text()
    else:
        if str(source) not in presets():
            raise MergeboundError(f"no preset is called {str(source)!r}; choose from {', '.join(presets())}")
        text = packaged_page("experiments.presets", str(source))
    return parsed(text, ValidationSpec, str(source), "spec")


def presets() -> tuple[str, ...]:
    """Names of the presets that come with the package."""
    return pages_in("experiments.presets")
