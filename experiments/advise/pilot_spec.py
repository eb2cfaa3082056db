"""What a pilot tries: recipes that fill the space of hyperparameters, with a share of the budget."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.bases.spec import BaseSpec
from experiments.grid.run_spec import RunSpec
from experiments.spec_pages import validated
from theory.errors import MergeboundError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class PilotSpec(BaseModel):
    """How a pilot is made.

    Attributes:
        recipes: points of a scrambled Sobol sequence, each trained on every task.
        share: of every expert's samples that the pilot may use.
        rates: smallest and largest effective learning rate eta / (1 - beta), log-uniform.
        batch_sizes, momenta, decays: levels.
        parts: of a run's steps at which its checkpoint is measured.
        scales: lambda N of task arithmetic at which merges are measured; 1 is the average.  Networks with BatchNorm
            are measured up to 1.
        images: validation images per task on which merges are measured.
        cap: losses above this many times the loss of guessing, and runs that diverged, count as that.
        seed: names the points, the batches, the images and the groups.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipes: Annotated[int, Field(ge=4)] = 8
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    rates: tuple[Positive, Positive] = (0.002, 0.5)
    batch_sizes: Annotated[tuple[Count, ...], Field(min_length=1)] = (8, 32)
    momenta: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)] = (0.0, 0.9)
    decays: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (1e-4, 1e-2)
    parts: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (0.125, 0.25, 0.5, 1.0)
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 1.0, 1.5, 2.0)
    images: Annotated[int, Field(ge=8)] = 128
    cap: Positive = 3.0
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _fits(self) -> PilotSpec:
        if not self.rates[0] < self.rates[1]:
            raise ValueError(f"rates: {list(self.rates)}; give the smaller first")
        if 1.0 not in self.parts:
            raise ValueError("parts: the last checkpoint, 1.0, is missing")
        return self

    def digest(self) -> str:
        """Content hash, 12 hexadecimal digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def pilot_of(content: dict[str, Any], source: str = "pilot") -> PilotSpec:
    """A pilot from plain data.

    Raises:
        MergeboundError: an entry that is not valid, named.
    """
    return validated(content, PilotSpec, source, source)


def recipes(pilot: PilotSpec, samples: float, largest_batch: int) -> tuple[dict[str, float], ...]:
    """The hyperparameters of every recipe.

    Args:
        pilot: what is tried.
        samples: of one expert, for all recipes together.
        largest_batch: training images of the smallest task; larger batches are made that small, and so small that
            every checkpoint has a step of its own.

    Returns:
        ``learning_rate``, ``batch_size``, ``steps``, ``momentum``, ``weight_decay`` of each.

    Raises:
        MergeboundError: fewer samples than one step of every checkpoint takes.
    """
    from scipy.stats import qmc

    bits = int(np.ceil(np.log2(pilot.recipes)))  # Sobol points are balanced in powers of two; the first are taken
    points = qmc.Sobol(4, rng=np.random.default_rng([pilot.seed, 0xAD715E])).random_base2(bits)[: pilot.recipes]
    low, high = np.log(pilot.rates)
    each = samples / pilot.recipes
    if each < len(pilot.parts):
        raise MergeboundError(
            f"budget: {samples:,.0f} samples are {each:.1f} for each of {pilot.recipes} recipes; a pilot needs "
            f"{len(pilot.parts)} or more, raise the budget or lower the recipes"
        )
    found = []
    for u in points:
        momentum = _pick(pilot.momenta, float(u[1]))
        batch = min(int(_pick(pilot.batch_sizes, float(u[2]))), largest_batch, int(each // len(pilot.parts)))
        steps = int(each // batch)
        rate = float(np.exp(low + (high - low) * float(u[0]))) * (1.0 - momentum)
        found.append(
            {
                "learning_rate": float(f"{rate:.4g}"),
                "batch_size": batch,
                "steps": steps,
                "momentum": momentum,
                "weight_decay": _pick(pilot.decays, float(u[3])),
            }
        )
    return tuple(found)


def _pick(levels: Sequence[float], u: float) -> float:
    return levels[min(int(u * len(levels)), len(levels) - 1)]


def pilot_runs(
    pilot: PilotSpec, tasks: Sequence[str], base: BaseSpec, samples: float, largest_batch: int
) -> tuple[tuple[RunSpec, ...], ...]:
    """The runs of every recipe, in the order of the tasks: constant learning rate, no augmentation, all data.

    Raises:
        MergeboundError: as :func:`recipes` raises.
    """
    found = []
    for one in recipes(pilot, samples, largest_batch):
        steps = int(one["steps"])
        checkpoints = tuple(sorted({max(1, round(part * steps)) for part in pilot.parts}))
        content: dict[str, Any] = {
            "base": base,
            "learning_rate": one["learning_rate"],
            "batch_size": int(one["batch_size"]),
            "steps": steps,
            "momentum": one["momentum"],
            "weight_decay": one["weight_decay"],
            "checkpoints": checkpoints,
            "seed": pilot.seed,
        }
        found.append(tuple(RunSpec(task=task, **content) for task in tasks))
    return tuple(found)
