"""How long the bases of a grid are pretrained for, before its first run: timed steps of each kind of network."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from experiments.bases.base import build
from experiments.bases.spec import BaseSpec
from experiments.bases.training import QUALITIES, PretrainSpec, train
from experiments.grid.calibrate import FIRST_FLOPS
from experiments.grid.calibrate_cohorts import random_images
from experiments.grid.cost import NetworkFacts
from experiments.grid.facts import TaskFacts
from experiments.inputs.shares import subset_size

FORWARD = 1 / 3
"""Of a step's operations: what evaluating an image costs."""
MOST = 200
"""Steps that are timed, at most."""


@dataclass(frozen=True)
class Pretraining:
    """Bases of one network and quality, pretrained one after the other by all threads of the command.

    Attributes:
        architecture, quality, data: of the bases; ``quality`` is ``custom`` where the numbers themselves are given.
        bases: how many: one for each seed.
        steps, batch_size: of each.
        samples: images of all of them, repeats counted.
        seconds: of all of them, their accuracy included; ``None`` without calibration.
        low, high: between which ``seconds`` should lie.
    """

    architecture: str
    quality: str
    data: str
    bases: int
    steps: int
    batch_size: int
    samples: int
    seconds: float | None = None
    low: float | None = None
    high: float | None = None


def pretrained(bases: Sequence[BaseSpec]) -> dict[str, list[BaseSpec]]:
    """Those bases that are pretrained, by what decides how long that takes: all but the seed."""
    found: dict[str, list[BaseSpec]] = {}
    for base in bases:
        if base.kind == "pretrain" and numbers_of(base).steps:
            found.setdefault(base.model_copy(update={"seed": 0}).model_dump_json(), []).append(base)
    return found


def numbers_of(base: BaseSpec) -> PretrainSpec:
    """How much a base is pretrained."""
    return QUALITIES[base.quality] if isinstance(base.quality, str) else base.quality


def pretraining(
    alike: Sequence[BaseSpec],
    facts: NetworkFacts,
    tasks: Mapping[str, TaskFacts],
    *,
    device: str = "cpu",
    seconds: float = 4.0,
) -> Pretraining:
    """What some bases cost that differ in their seeds only.

    Steps of pretraining itself are timed on random images with all threads of this process, as the command that makes
    the bases has them.  Opening the data and keeping the state once a minute come on top.  Bases that the store or its
    cache has already cost nothing; that is not looked at.

    Args:
        alike: from :func:`pretrained`.
        facts: of their network.
        tasks: sizes of the tasks that bases are pretrained on, by name.
        device: where the grid will run.
        seconds: for the calibration, about; 0 leaves it out.
    """
    base, count = alike[0], len(alike)
    spec, task = numbers_of(base), tasks[base.data]
    used = subset_size(task.train, spec.share)
    batch = min(spec.batch_size, used)
    quality = base.quality if isinstance(base.quality, str) else "custom"
    steps = count * spec.steps
    found = (base.architecture, quality, base.data, count, spec.steps, batch, steps * batch)
    if seconds <= 0:
        return Pretraining(*found)
    times, scale = _timed(base, facts, spec, batch, base.classes or task.classes, device, seconds)
    each = scale * float(np.median(times))
    total = each * (steps + FORWARD * count * task.validation / batch)
    tenth, ninth = (float(q) * scale / each for q in np.quantile(times, (0.1, 0.9)))
    spread = (min(0.9, tenth), max(1.1, ninth)) if scale == 1.0 else (min(0.5, tenth), max(2.0, ninth))
    return Pretraining(*found, total, total * spread[0], total * spread[1])


def _timed(
    base: BaseSpec, facts: NetworkFacts, spec: PretrainSpec, batch: int, classes: int, device: str, seconds: float
) -> tuple[list[float], float]:
    """Seconds of steps, and what to multiply them with where they were of a smaller batch."""
    first = max(1, min(batch, int(FIRST_FLOPS / max(3.0 * facts.at(classes)[2], 1.0))))
    short = spec.model_copy(update={"steps": MOST, "share": 1.0, "batch_size": first, "learning_rate": 1e-6})
    network = build(base.architecture, classes, base.options, base.seed)
    images = random_images(facts, first, None, classes, device, 0)
    alone = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter  # of this process, so that its neighbours do not count
    ends = time.perf_counter() + seconds
    times: list[float] = []
    began = clock()
    for step in train(network, images, short, 0, device=device):
        now = clock()
        if step.step > 1:  # the first one warms up
            times.append(now - began)
        if times and time.perf_counter() > ends:
            break
        began = clock()
    return times, batch / first
