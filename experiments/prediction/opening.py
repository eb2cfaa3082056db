"""Opening the experts of a pool: networks, coordinates, heads and images, from the store of their grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.measure.backbone import Backbone, Readout
from experiments.measure.opening import from_store
from experiments.measure.subject import Subject, draw
from experiments.prediction.bank import STRIDE
from experiments.prediction.draws import Pool
from experiments.prediction.material import Material, plain_backbone
from experiments.store import Store
from experiments.tasks.types import Split
from theory.errors import MergeboundError

TEST = 0x7E57
"""Added to the study's seed where test images are drawn."""


def open_pool(
    store: Store, pool: Pool, *, calibration: int, test: int, seed: int, root: str | Path | None = None
) -> Material:
    """A pool's experts with ``calibration`` validation images and ``test`` test images of each task.

    Raises:
        MergeboundError: what :func:`experiments.measure.opening.from_store` raises, or a task without test images.
    """
    digests = [expert.digest for expert in pool.experts]
    subject = from_store(store, digests, images=calibration, seed=seed, root=root)
    base = store.base(store.digests(digests[0])[0])
    return material_of(subject, pool, dict(base.state), test=test, seed=seed)


def material_of(subject: Subject, pool: Pool, base_state: dict[str, object], *, test: int, seed: int) -> Material:
    """The same from an opened subject whose experts are those of the pool, in its order."""
    backbone = Backbone.of(subject.model, base_state)  # type: ignore[arg-type]
    if backbone.space.names != subject.networks[0].space.names:
        raise MergeboundError(
            f"{subject.architecture}: its head is not one linear layer; the study needs such a network"
        )
    readouts = tuple(
        Readout(head[backbone.head + "weight"].detach(), head.get(backbone.head + "bias")) for head in subject.heads
    )
    tasks = [expert.task for expert in pool.experts]
    numbers = {task: k for k, task in enumerate(dict.fromkeys(tasks))}
    calibration: dict[str, Split] = {}
    held: dict[str, Split] = {}
    for j, task in enumerate(tasks):
        if task in calibration:
            continue
        data = subject.test[j]
        if data is None:
            raise MergeboundError(f"{task}: no test images; the study measures merges on them")
        calibration[task] = _named(subject.calibration[j], numbers[task])
        held[task] = _named(draw(data, test, seed + TEST), numbers[task])
    return Material(
        tuple(expert.name for expert in pool.experts),
        tuple(tasks),
        backbone,
        plain_backbone(backbone, subject.model),
        subject.model,
        base_state,  # type: ignore[arg-type]
        subject.base,
        subject.vectors,
        subject.heads,
        readouts,
        calibration,
        held,
    )


def _named(split: Split, number: int) -> Split:
    """Images named apart from those of other tasks."""
    return replace(split, source=np.asarray(split.source, dtype=np.int64) + number * STRIDE)
