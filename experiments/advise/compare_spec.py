"""The specification of the comparison of advice with customary recipes and methods, fixed before any result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.advise.pilot_spec import PilotSpec
from experiments.spec_pages import pages_in, read_page

FOLDER, PREFIX = "experiments.presets.studies", "advice-"
Count = Annotated[int, Field(ge=1)]


class CompareSpec(BaseModel):
    """What is compared.

    Attributes:
        name: of the comparison.
        seed: names splits, groups, images and pilots.
        tasks: families or tasks.
        base: content of a base; ``networks`` are its architectures.
        networks: names.
        samples: budgets of one expert.
        advised: tasks that the advice sees; the others are judged.
        splits: how many ways to choose them.
        pilot: of the advice.
        recipes: customary ones by name: fields of :class:`experiments.grid.run_spec.RunSpec`, without steps.
        methods: that merge experts of customary recipes, with settings.
        groups: of experts with recipes of their own, merged as `advise merge` says; 0 leaves that part out.
        group_methods: methods beside it.
        calibration_images, test_images: per task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    base: dict[str, Any]
    networks: Annotated[tuple[str, ...], Field(min_length=1)]
    samples: Annotated[tuple[Count, ...], Field(min_length=1)]
    advised: Annotated[int, Field(ge=2)]
    splits: Count
    pilot: PilotSpec = PilotSpec()
    recipes: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    methods: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    groups: Annotated[int, Field(ge=0)] = 0
    group_methods: dict[str, dict[str, Any]] = {}
    calibration_images: Annotated[int, Field(ge=16)] = 128
    test_images: Annotated[int, Field(ge=8)] = 300

    @model_validator(mode="after")
    def _fits(self) -> CompareSpec:
        for name in self.recipes:
            if name == "advice":
                raise ValueError("recipes: 'advice' is the name of what is compared; choose another")
        for name, fields in self.recipes.items():
            if {"steps", "task", "base"} & set(fields):
                raise ValueError(f"recipes.{name}: steps follow from the budget; leave steps, task and base out")
        return self

    def digest(self) -> str:
        """Content hash, 12 hexadecimal digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_comparison(source: str | Path) -> CompareSpec:
    """Read a comparison from a YAML file, or the size ``tiny``.

    Raises:
        MergeboundError: no such file or size, or an entry that is not valid (named with its place).
    """
    return read_page(source, CompareSpec, FOLDER, PREFIX, kind="comparison")


def comparison_sizes() -> tuple[str, ...]:
    """Sizes that come with the package."""
    return pages_in(FOLDER, PREFIX)
