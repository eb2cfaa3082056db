"""What a grid costs before it is run: samples, operations, bytes; time is left to a calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from experiments.bases.base import build
from experiments.bases.spec import BaseSpec
from experiments.grid.facts import TaskFacts
from experiments.grid.run_spec import RunSpec
from experiments.inputs.shares import subset_size
from experiments.models import count_flops, count_parameters, input_format
from experiments.tasks.form import InputFormat
from theory.errors import MergeboundError

PASSES = {"full": 3.0, "backbone": 3.0, "low_rank": 3.0, "head": 1.0}
"""Operations of a training step per forward pass: the backward pass costs two (a frozen backbone needs none)."""

_FEW, _MANY = 10, 20


@dataclass(frozen=True)
class NetworkFacts:
    """Sizes of a network as functions of its number of classes, all linear.

    Attributes:
        architecture: its name.
        form: what it takes.
        parameters, numbers, flops: (a, b) of a + b x classes: parameters; bytes of the state dict; floating-point
            operations of one image's forward pass, a multiply-add counting as two.
    """

    architecture: str
    form: InputFormat
    parameters: tuple[float, float]
    bytes: tuple[float, float]
    flops: tuple[float, float]

    def at(self, classes: int) -> tuple[int, int, float]:
        """Parameters, bytes of a checkpoint and operations per image for so many classes."""
        found = [a + b * classes for a, b in (self.parameters, self.bytes, self.flops)]
        return round(found[0]), round(found[1]), found[2]


@dataclass(frozen=True)
class Cost:
    """What runs cost; sums.

    Attributes:
        runs, checkpoints, steps: how many.
        samples: images that are trained on, repeats counted.
        evaluated: images that are evaluated: validation and test images at every checkpoint.
        flops: floating-point operations of training.
        evaluation_flops: of evaluation.
        bytes: of all checkpoints as they are in memory, stored without loss.
    """

    runs: int = 0
    checkpoints: int = 0
    steps: int = 0
    samples: int = 0
    evaluated: int = 0
    flops: float = 0.0
    evaluation_flops: float = 0.0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.runs + other.runs,
            self.checkpoints + other.checkpoints,
            self.steps + other.steps,
            self.samples + other.samples,
            self.evaluated + other.evaluated,
            self.flops + other.flops,
            self.evaluation_flops + other.evaluation_flops,
            self.bytes + other.bytes,
        )


def network_facts(base: BaseSpec) -> NetworkFacts:
    """Sizes of a base's network; nothing but shapes is computed where the network allows it.

    Raises:
        MergeboundError: an architecture or option that there is not.
    """
    few, many = (_counted(base, classes) for classes in (_FEW, _MANY))
    slopes = [(b - a) / (_MANY - _FEW) for a, b in zip(few[1], many[1], strict=True)]
    lines = [(a - slope * _FEW, slope) for a, slope in zip(few[1], slopes, strict=True)]
    return NetworkFacts(base.architecture, few[0], lines[0], lines[1], lines[2])


def _counted(base: BaseSpec, classes: int) -> tuple[InputFormat, tuple[int, int, int]]:
    network = shapes(base, classes)
    size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    return input_format(network), (count_parameters(network), size, count_flops(network))


def shapes(base: BaseSpec, classes: int) -> nn.Module:
    """The network without numbers, or with them where its constructor needs them.

    Raises:
        MergeboundError: an architecture or option that there is not.
    """
    make = partial(build, base.architecture, classes, base.options, base.seed)
    try:
        with torch.device("meta"):
            return make()
    except (MergeboundError, RuntimeError, NotImplementedError):
        return make()


def samples_of(run: RunSpec, images: int) -> int:
    """Images that a run trains on, repeats counted: with ``reshuffle`` the last batch of an epoch may be short.

    Args:
        run: the run.
        images: of the task's training part.
    """
    used = subset_size(images, run.data_share)
    if run.sampling != "reshuffle":
        return run.steps * run.batch_size
    per_epoch = -(-used // run.batch_size)
    epochs, rest = divmod(run.steps, per_epoch)
    return epochs * used + min(rest * run.batch_size, used)


def cost_of(run: RunSpec, network: NetworkFacts, task: TaskFacts) -> Cost:
    """What one run costs."""
    _, size, flops = network.at(task.classes)
    samples = samples_of(run, task.train)
    evaluated = len(run.checkpoints) * (task.validation + task.test)
    passes = PASSES[run.trained] * (2.0 if run.optimizer == "sam" else 1.0)
    return Cost(
        1,
        len(run.checkpoints),
        run.steps,
        samples,
        evaluated,
        passes * flops * samples,
        flops * evaluated,
        size * len(run.checkpoints),
    )


def costs(
    runs: Sequence[RunSpec], networks: Mapping[int, NetworkFacts], bases: Sequence[int], tasks: Mapping[str, TaskFacts]
) -> dict[int, Cost]:
    """Sums over the runs of each base.

    Args:
        runs: of the grid.
        networks: by number of the base.
        bases: number of the base of each run.
        tasks: by name.
    """
    found: dict[int, Cost] = {}
    for run, number in zip(runs, bases, strict=True):
        found[number] = found.get(number, Cost()) + cost_of(run, networks[number], tasks[run.task])
    return found
