"""The recipes on which Theorem 2 is judged: fixed before they were run.

(The first list for the digits had batches of 16 in its centre, which its smallest shares cannot fill; it stopped there,
after nine recipes, and was replaced as a whole.)

For each network one centre, the four hyperparameters of the theorem changed one at a time over a factor of eight
(twelve recipes, from which exponents are read), six other update rules and samplings, and fourteen recipes that differ
in everything at once: thirty-three in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.bases.spec import BaseSpec
from experiments.grid.run_spec import RunSpec
from theory.errors import MergeboundError

_MIXED = 0x2EC1
SWEPT = {"learning_rate": (0.25, 0.5, 2.0), "steps": (0.25, 0.5, 2.0), "batch_size": (0.25, 0.5, 2.0),
         "data_share": (0.25, 0.5, 2.0)}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A run and why it is there.

    Attributes:
        group: ``centre``, ``sweep:FIELD``, ``rule`` or ``mixed``.
        run: what is run.
    """

    group: str
    run: RunSpec


@dataclass(frozen=True)
class Setup:
    """A network with its tasks and its centre.

    Attributes:
        base: x_0.
        tasks: in turn over the mixed recipes; the first one elsewhere.
        centre: hyperparameters.
        twins: exchanged samples of each recipe.
        images: training images of its smallest task: batches of mixed recipes are at most three quarters of what a
            share leaves of them.
    """

    base: BaseSpec
    tasks: tuple[str, ...]
    centre: dict[str, Any]
    twins: int
    images: int


def setups() -> dict[str, Setup]:
    """By name: two networks on digits, two on real images."""
    digits = ("digits8:rotate90", "digits8:flip", "digits8:invert")
    real = ("npz8:mnist", "npz8:fashion_mnist", "npz8:notmnist")
    small: dict[str, Any] = {"learning_rate": 0.02, "steps": 64, "batch_size": 8, "data_share": 0.5}
    large: dict[str, Any] = {"learning_rate": 0.01, "steps": 24, "batch_size": 16, "data_share": 0.04}

    def pretrained(architecture: str, data: str, options: dict[str, Any], steps: int) -> BaseSpec:
        quality = {"steps": steps, "batch_size": 64}
        content = {"kind": "pretrain", "architecture": architecture, "data": data, "options": options}
        return BaseSpec.model_validate({**content, "quality": quality})

    resnet20 = BaseSpec.model_validate(
        {
            "kind": "checkpoint",
            "architecture": "cifar_resnet20",
            "classes": 10,
            "weights": "cifar10_resnets/resnet20-12fca82f.safetensors",
        }
    )
    return {
        "digits8-resnet_bn": Setup(pretrained("resnet_bn", "digits8:identity", {}, 300), digits, small, 32, 80),
        "digits8-vit": Setup(pretrained("vit", "digits8:identity", {}, 300), digits, small, 32, 80),
        "npz8-resnet20": Setup(resnet20, real, large, 16, 6000),
        "npz8-vit_s1": Setup(pretrained("vit_s1", "npz8:cifar10", {"img_size": 32}, 300), real, large, 16, 6000),
    }


def recipes(name: str) -> tuple[Recipe, ...]:
    """The recipes of a setup.

    Raises:
        MergeboundError: an unknown name.
    """
    known = setups()
    if name not in known:
        raise MergeboundError(f"setup {name!r}: choose from {', '.join(known)}")
    setup = known[name]

    def run(task: str, **fields: Any) -> RunSpec:
        values = {"sampling": "without_replacement", **setup.centre, **fields}
        steps = values["steps"]
        return RunSpec(task=task, base=setup.base, checkpoints=(max(1, steps // 2), steps), **values)

    first, centre = setup.tasks[0], setup.centre
    found = [Recipe("centre", run(first))]
    for field, factors in SWEPT.items():
        for factor in factors:
            value = centre[field] * factor
            value = int(value) if field in ("steps", "batch_size") else min(1.0, value)
            found.append(Recipe(f"sweep:{field}", run(first, **{field: value})))
    rules: tuple[dict[str, Any], ...] = (
        {"momentum": 0.9, "learning_rate": centre["learning_rate"] / 5},
        {"momentum": 0.9, "learning_rate": centre["learning_rate"] / 5, "nesterov": True},
        {"optimizer": "adamw", "momentum": 0.9, "learning_rate": 1e-3, "weight_decay": 0.01},
        {"sampling": "reshuffle"},
        {"sampling": "with_replacement"},
        {"weight_decay": 0.01, "schedule": "cosine"},
    )
    found += [Recipe("rule", run(first, **rule)) for rule in rules]
    rng = np.random.default_rng([_MIXED, sorted(known).index(name)])
    for k in range(14):
        momentum = float(rng.choice([0.0, 0.5, 0.9]))
        found.append(
            Recipe(
                "mixed",
                run(
                    setup.tasks[k % len(setup.tasks)],
                    learning_rate=float(centre["learning_rate"] * np.exp(rng.uniform(-1.4, 0.7)) * (1 - momentum)),
                    steps=int(centre["steps"] * rng.choice([0.25, 0.5, 1.0, 2.0])),
                    **_sizes(setup, float(rng.choice([0.25, 0.5, 1.0, 2.0])), float(rng.choice([0.25, 0.5, 1.0, 2.0]))),
                    momentum=momentum,
                    weight_decay=float(rng.choice([0.0, 1e-3, 1e-2])),
                    sampling=str(rng.choice(["without_replacement", "with_replacement", "reshuffle"])),
                    seed=k,
                ),
            )
        )
    return tuple(found)


def _sizes(setup: Setup, batch: float, share: float) -> dict[str, Any]:
    """Batch size and share as multiples of the centre's; batches at most three quarters of the images that are left."""
    kept = float(min(1.0, setup.centre["data_share"] * share))
    return {
        "batch_size": min(int(setup.centre["batch_size"] * batch), int(0.75 * setup.images * kept)),
        "data_share": kept,
    }
